"""Metrics agree between devices, in float64 within rounding."""

from __future__ import annotations

import functools

import pytest
import torch
from devices import agree, to
from programs import TutorialVAE

from pyro_vae_defence import metrics
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import ConvClassifier

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("float64")]


def pairs(count=6, size=28):
    x = torch.rand(count, 1, size, size)
    return x, (x + 0.1 * torch.randn_like(x)).clamp(0, 1)


def seeded():
    return torch.Generator().manual_seed(2)


SCORES = torch.linspace(0, 1, 24).square()
METRICS = {
    **{
        f"ms_ssim-{variant}": lambda x, y, scores, variant=variant: metrics.ms_ssim(x, y, variant)
        for variant in metrics.MS_SSIM_VARIANTS
    },
    "ssim": lambda x, y, scores: metrics.ssim(x, y),
    "mse": lambda x, y, scores: metrics.mse(x, y),
    "frechet_distance": lambda x, y, scores: metrics.frechet_distance(
        x.flatten(1)[:, :4], y.flatten(1)[:, :4]
    ),
    "accuracy": lambda x, y, scores: metrics.adversarial_accuracy(
        (9 * x[:, 0, 0, 0]).long(), (9 * y[:, 0, 0, 0]).long()
    ),
    "correct": lambda x, y, scores: metrics.correct(
        (9 * x[:, 0, 0, 0]).long(), (9 * y[:, 0, 0, 0]).long()
    ),
    "auroc": lambda x, y, scores: metrics.auroc(scores, scores.sqrt()),
    "fpr_at_tpr": lambda x, y, scores: metrics.fpr_at_tpr(scores, scores.sqrt()),
    "active_units": lambda x, y, scores: metrics.active_units(x.flatten(1)),
}
NUMBERS = {
    "interval": lambda scores: metrics.bootstrap_interval(
        scores, num_resamples=100, generator=seeded()
    ),
    "median of groups": lambda scores: metrics.bootstrap_interval(
        scores, torch.arange(24, device=scores.device) // 2, num_resamples=100,
        statistic="median", generator=seeded(),
    ),
    "detection": lambda scores: metrics.detection_interval(
        metrics.auroc, scores, scores.sqrt(), num_resamples=50, generator=seeded()
    ),
    "ks_test": lambda scores: metrics.ks_test(scores, scores.sqrt()),
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_scores_of_images(device, name):
    if "ms_ssim" in name and name != "ms_ssim-paper":
        x, y = pairs(2, 192)
    else:
        x, y = pairs()
    agree(lambda place: METRICS[name](x.to(place), y.to(place), SCORES.double().to(place)), device)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_scores(device, name):
    agree(lambda place: NUMBERS[name](SCORES.double().to(place)), device)


def test_frechet_distance_of_features(device):
    (x, y), extractor = pairs(12), ConvClassifier(1, 28, 10).eval()

    def run(place):
        return metrics.frechet(x.to(place), y.to(place), to(extractor, place).features, rows=5)

    # The roots of small eigenvalues have half the digits.
    agree(run, device, rtol=1e-4, atol=1e-8)


@pytest.fixture
def vae():
    return TutorialVAE().eval()


def test_likelihood(device, vae):
    x, _ = pairs(4)

    def run(place):
        return metrics.nll(to(vae, place), x.to(place), 20, rows=12, generator=seeded())

    agree(run, device)


def test_evidence_between_guide_and_posterior(device, vae):
    x, _ = pairs(2)

    def run(place):
        step = functools.partial(BatchedHMC, num_steps=2, step_size=0.05, adapt_step_size=False)

        def transition(latents, potential, number):
            kernel = step(potential_fn=potential, generator=seeded())
            kernel.setup(0)
            with torch.enable_grad():
                return kernel.sample({name: v.detach() for name, v in latents.items()})

        schedule = metrics.sigmoid_schedule(3)
        return metrics.ais_log_weights(
            to(vae, place), x.to(place), transition, schedule, 2, generator=seeded()
        )

    agree(run, device)


def test_simulated_images_lie_where_the_images_do(device, vae):
    latents, x = metrics.simulate(to(vae, device), pairs(3)[0].to(device))
    assert latents["latent"].device.type == x.device.type == device.type
    assert x.shape == (3, 1, 28, 28)


def test_posterior_ratio(device, vae):
    x, _ = pairs(3)

    def run(place):
        energy = program.potential(to(vae, place), x.to(place))
        one, other = ({"latent": torch.full((3, 5), v, device=place)} for v in (0.1, 0.3))
        return metrics.log_posterior_ratio(energy, one, other)

    agree(run, device)
