"""Arguments on different devices: named, with the mend, before anything is computed.

The other device is ``meta``, whose tensors have no values: whoever computes fails otherwise.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from programs import LinearGaussianVAE, PlaneVAE, TutorialVAE
from test_conditions import VAE as CONDITIONAL

from pyro_vae_defence import attacks, data, metrics
from pyro_vae_defence.defence import (
    DefendedClassifier,
    MCMCDefence,
    NoDefence,
    PosteriorModeDefence,
    calibrate_radius,
)
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import ConvClassifier, LinearClassifier
from pyro_vae_defence.models.contract import check_networks_on_device
from pyro_vae_defence.models.pretrained import load_pretrained
from pyro_vae_defence.ops.balls import L2, Linf
from pyro_vae_defence.robustness import RobustnessReport, mass_bound

X = torch.rand(3, 1, 28, 28)
LABELS = torch.tensor([0, 1, 2])


def elsewhere(value):
    return value.to("meta")


def vae():
    return TutorialVAE().eval()


def attack(objective, x=X):
    return attacks.PGD(objective, Linf(0.1), num_steps=1)(x)


def classify(images):
    classifier = LinearClassifier(5, 4)
    return DefendedClassifier(NoDefence(vae()), classifier, "last")(images)


CLASSIFIER = LinearClassifier(5, 4)
SCORES = torch.rand(5)

# What is called, and what the message names: which is where, and the mend.
VAE_IS_ELSEWHERE = r"x is on cpu but the parameters of vae on meta; pass x\.to\('meta'\)"
CASES = {
    "chains": (lambda: MCMCDefence(elsewhere(vae()))(X), VAE_IS_ELSEWHERE),
    "no chain": (lambda: NoDefence(elsewhere(vae()))(X), VAE_IS_ELSEWHERE),
    "mode": (lambda: PosteriorModeDefence(elsewhere(vae()))(X), VAE_IS_ELSEWHERE),
    "images": (lambda: NoDefence(vae())(elsewhere(X)), r"x is on meta .*vae\.to\('meta'\)"),
    "stream": (
        lambda: list(NoDefence(elsewhere(vae())).stream([X])), "batches is on cpu .* on meta"
    ),
    "likelihood": (lambda: metrics.nll(elsewhere(vae()), X), VAE_IS_ELSEWHERE),
    "simulate": (lambda: metrics.simulate(elsewhere(vae()), X), VAE_IS_ELSEWHERE),
    "radius": (lambda: calibrate_radius(elsewhere(vae()), X, (0.1,)), "clean_images is on cpu"),
    "variance": (
        lambda: program.mean_posterior_variance(elsewhere(vae()), [X]), "batches is on cpu"
    ),
    "margin": (
        lambda: attacks.r_margin(
            elsewhere(vae()), attacks.PGD(attacks.maximum_damage(vae()), L2(1.0)), X, 1.0
        ),
        "x_ref is on cpu .* on meta",
    ),
    "conditions": (
        lambda: NoDefence(CONDITIONAL)((X[:, :, :4, :4], elsewhere(LABELS))),
        r"x\[1\] is on meta but x\[0\] on cpu; pass x\[1\]\.to\('cpu'\)",
    ),
    "conditions of an attack": (
        lambda: attack(attacks.mean_distance(CONDITIONAL), (X[:, :, :4, :4], elsewhere(LABELS))),
        r"x_ref\[1\] is on meta but x_ref\[0\] on cpu",
    ),
    "posteriors": (lambda: attack(attacks.symmetric_kl(elsewhere(vae()))), "x_ref is on cpu"),
    "outputs": (lambda: attack(attacks.maximum_damage(elsewhere(vae()))), "x_ref is on cpu"),
    "target": (
        lambda: attack(attacks.symmetric_kl(vae(), elsewhere(X))),
        r"x_target is on meta but x_ref on cpu; pass x_target\.to\('cpu'\)",
    ),
    "labels": (
        lambda: attack(attacks.cross_entropy(vae(), CLASSIFIER, elsewhere(LABELS))),
        "labels is on meta but x_ref on cpu",
    ),
    "target classes": (
        lambda: attack(attacks.dlr(vae(), CLASSIFIER, targets=elsewhere(LABELS))),
        "targets is on meta but x_ref on cpu",
    ),
    "classifier": (
        lambda: attack(attacks.cross_entropy(vae(), LinearClassifier(5, 4).to("meta"))),
        r"x_ref is on cpu but the parameters of classifier on meta.*classifier\.to\('cpu'\)",
    ),
    "defended classifier": (
        lambda: DefendedClassifier(NoDefence(vae()), LinearClassifier(5, 4).to("meta"))(X),
        "x is on cpu but the parameters of classifier on meta",
    ),
    "similarity": (lambda: metrics.ms_ssim(X, elsewhere(X)), "y is on meta but x on cpu"),
    "error": (lambda: metrics.mse(X, elsewhere(X)), "y is on meta but x on cpu"),
    "accuracy": (
        lambda: metrics.adversarial_accuracy(LABELS, elsewhere(LABELS)),
        "prediction_adv is on meta but prediction_ref on cpu",
    ),
    "correct": (lambda: metrics.correct(LABELS, elsewhere(LABELS)), "label is on meta"),
    "detection": (
        lambda: metrics.auroc(SCORES, elsewhere(SCORES)), "positives is on meta but negatives on"
    ),
    "features": (
        lambda: metrics.frechet_distance(SCORES[:, None], elsewhere(SCORES[:, None])),
        "other is on meta but features on cpu",
    ),
    "extractor": (
        lambda: metrics.frechet(X, X, ConvClassifier(1, 4).to("meta").features),
        "x is on cpu but the parameters of extractor on meta",
    ),
    "other images": (
        lambda: metrics.frechet(X, elsewhere(X), ConvClassifier(1, 4).features), "y is on meta"
    ),
    "posterior ratio": (
        lambda: metrics.log_posterior_ratio(
            program.potential(vae(), X), {"latent": X[:, 0, 0, :5]},
            {"latent": elsewhere(X[:, 0, 0, :5])},
        ),
        r"latents_2\['latent'\] is on meta but latents_1\['latent'\] on cpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_devices_are_named_with_the_mend(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_vae_without_parameters_follows_its_images():
    check_networks_on_device("vae", LinearGaussianVAE(), "x", elsewhere(X))


def test_networks_on_several_devices_are_their_programs_affair():
    spread = vae()
    spread.decoder.to("meta")
    check_networks_on_device("vae", spread, "x", X)
    check_networks_on_device("vae", spread, "x", elsewhere(X))


def test_a_metric_follows_the_latents():
    kernel = MCMCDefence(vae(), num_samples=1, warmup_steps=1)
    assert kernel(X).latents["latent"].device == X.device


def _report(values):
    names = [field.name for field in dataclasses.fields(RobustnessReport)]
    lists = dict.fromkeys(("attacks", "checks", "reasons", "strongest"), ())
    return RobustnessReport.from_dict(
        {**dict.fromkeys(names), **lists, "per_image": [0.5], "evidence": {}, "values": values}
        | {"images": (), "earlier_seeds": ()}
    )


def _seeded():
    return torch.Generator("cpu").manual_seed(0)


def _bound():
    x = torch.rand(300, 1, 2, 4, generator=_seeded(), dtype=torch.float64, device="cpu")
    return mass_bound(
        PLANE, lambda z: torch.stack([z[:, 0], -z[:, 0]], 1), x[:2], [0, 1], Linf(0.05), 0.1, x,
        num_temperatures=3, num_steps=1, num_walks=2, num_falling=1, generator=_seeded(),
    )  # fmt: skip


PAIR = vae(), X
PLANE = PlaneVAE()
# What is made for images on the CPU, and computed there.
ON_THE_CPU = {
    "mean": lambda: torch.tensor(metrics.bootstrap_interval(SCORES), device="cpu"),
    "median": lambda: torch.tensor(
        metrics.bootstrap_interval(SCORES, statistic="median"), device="cpu"
    ),
    "detection": lambda: torch.tensor(
        metrics.detection_interval(metrics.auroc, SCORES, SCORES + 0.1), device="cpu"
    ),
    "chains": lambda: MCMCDefence(PAIR[0], num_samples=1)(PAIR[1], _seeded()).latents["latent"],
    "likelihood": lambda: metrics.nll(*PAIR, num_samples=3, generator=_seeded()),
    "schedule": lambda: metrics.sigmoid_schedule(5),
    "bound": lambda: _bound().log_ratio,
    "images": lambda: data.load("color_mnist_subset_textured", "test").images([1, 2]),
    "chosen": lambda: data.stratified(data.load("mnist_subset", "test"), 20, _seeded()),
    "report": lambda: _report({"robust/mean": "float32 0.5"}).per_image,
    "weights": lambda: next(load_pretrained("mnist_vae").parameters()),
}


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_torchs_default_device_decides_nothing(name):
    def found():
        torch.manual_seed(0)
        return ON_THE_CPU[name]()

    expected = found()
    torch.set_default_device("meta")
    try:
        result = found()
    finally:
        torch.set_default_device(None)
    assert result.device.type == "cpu"
    assert torch.equal(result, expected)
