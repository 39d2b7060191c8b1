"""A process that defends and attacks for weeks: what calls keep, share and need."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import LinearGaussianVAE
from torch import nn

from pyro_vae_defence import attacks
from pyro_vae_defence.defence import (
    DefendedClassifier,
    Detector,
    EncoderDefence,
    MCMCDefence,
    NoDefence,
    PosteriorModeDefence,
    anomaly_scores,
)
from pyro_vae_defence.defence.result import Chains
from pyro_vae_defence.models import compiled
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.robustness import evaluate_robustness

SHORT = {"num_samples": 3, "warmup_steps": 1}


class LabelledVAE:
    """Images 1x4x4 given their labels, N(z + y / 10, 0.3^2) pixel by pixel."""

    def model(self, x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 16), 1.0).to_event(1))
            mean = (z + y[:, None] / 10).reshape(-1, 1, 4, 4)
            pyro.sample("obs", dist.Normal(mean, 0.3).to_event(3), obs=x)

    def guide(self, x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.flatten(1) - y[:, None] / 10, 0.3).to_event(1))


def tensors(nest):
    """All tensors in a result."""
    if isinstance(nest, torch.Tensor):
        return [nest]
    if isinstance(nest, dict):
        nest = nest.values()
    elif not isinstance(nest, (tuple, list)):
        nest = getattr(nest, "__dict__", {}).values()
    return [found for part in nest for found in tensors(part)]


def seeded():
    return torch.Generator().manual_seed(1)


def defend(defence):
    return lambda x, y: defence((x, y), seeded())


def stream(defence):
    return lambda x, y: list(defence.stream([(x, y)], seeded()))


def attack(kind):
    vae = LabelledVAE()
    return lambda x, y: kind(attacks.symmetric_kl(vae), Linf(0.1), num_steps=2)((x, y), seeded())


def evaluate(x, y):
    vae = LabelledVAE()
    options = {"classifier": nn.Linear(16, 3), "attacks": ["encoder"], "checks": False}
    return evaluate_robustness(vae, NoDefence(vae), (x, y), y, generator=seeded(), **options)


@pytest.mark.parametrize(
    "call",
    [
        *(
            pytest.param(how(defence), id=f"{how.__name__} {name}")
            for how in (defend, stream)
            for name, defence in {
                "chains": MCMCDefence(LabelledVAE(), **SHORT),
                "micro-batches": MCMCDefence(LabelledVAE(), batch_size=2, **SHORT),
                "modes": PosteriorModeDefence(LabelledVAE(), num_steps=2),
                "encoder": EncoderDefence(LabelledVAE(), 2),
            }.items()
        ),
        pytest.param(attack(attacks.PGD), id="gradient"),
        pytest.param(attack(attacks.Square), id="black box"),
        pytest.param(evaluate, id="evaluation"),
    ],
)
def test_who_reuses_a_buffer_changes_no_result(call):
    x, y = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
    result = call(x, y)
    before = [value.clone() for value in tensors(result)]
    assert any(value.shape[1:] == x.shape[1:] for value in before)  # images among them
    x.fill_(0.5)
    y.fill_(0)
    for value, then in zip(tensors(result), before, strict=True):
        torch.testing.assert_close(value, then, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("batch_size", [4096, 2])
def test_latents_do_not_keep_all_draws(tutorial_vae, batch_size):
    defence = MCMCDefence(tutorial_vae, num_samples=5, warmup_steps=1, batch_size=batch_size)
    latents = defence.encode(torch.rand(3, 1, 28, 28))["latent"]
    assert latents.untyped_storage().nbytes() == latents.numel() * latents.element_size()


def test_images_that_are_done_together_are_not_copied_again(tutorial_vae, monkeypatch):
    for name in ("take", "join"):
        monkeypatch.delattr(Chains, name)
    result = MCMCDefence(tutorial_vae, num_chains=2, **SHORT)(torch.rand(3, 1, 28, 28))
    assert result.samples["latent"].shape == (2, 3, 3, 5)
    assert all(value.is_contiguous() for value in tensors(result))


class Widest:
    """The largest batch that programs of a VAE have seen."""

    def __init__(self):
        self.rows = 0

    def __call__(self, module, inputs):
        self.rows = max(self.rows, len(inputs[0]))


@pytest.mark.parametrize("reading", ["reencoded", "vote"])
def test_a_classifier_reads_in_micro_batches(float64, tutorial_vae, reading):
    vae, x = tutorial_vae.double(), torch.rand(30, 1, 28, 28, dtype=torch.float64)
    classifier = nn.Linear(5, 3).double()
    whole = DefendedClassifier(EncoderDefence(vae, 4), classifier, reading)(x, seeded())
    widest = Widest()
    for module in (vae.hidden, vae.decoder):
        module.register_forward_pre_hook(widest)
    few = EncoderDefence(vae, 4, batch_size=10)
    parts = DefendedClassifier(few, classifier, reading)(x, seeded())
    torch.testing.assert_close(parts, whole)
    assert widest.rows == 10


def test_a_defence_that_is_called_in_its_own_way_is_called_for_scores(float64, tutorial_vae):
    class Inverted(EncoderDefence):
        def __call__(self, x, generator=None):
            return super().__call__(1 - x, generator)

    vae, x = tutorial_vae.double(), torch.rand(4, 1, 28, 28, dtype=torch.float64)
    own, plain = Inverted(vae, 1), EncoderDefence(vae, 1)
    found = Detector(own).score(x, seeded())
    torch.testing.assert_close(found, Detector(plain).score(1 - x, seeded()))
    error = anomaly_scores(own, x, seeded())["error"]
    decoded = plain(1 - x, seeded()).reconstruction
    torch.testing.assert_close(error, (decoded - x).square().mean((1, 2, 3)))


def test_a_recorder_keeps_a_bounded_number_of_recordings(monkeypatch, float64):
    monkeypatch.setattr(compiled, "_MOST_RECORDINGS", 2)
    vae, recorder = LinearGaussianVAE(), compiled.Recorder()
    recorded = MCMCDefence(vae, prepare=recorder, **SHORT)
    plain = MCMCDefence(vae, **SHORT)
    x = torch.rand(4, 1, 4, 4)
    for size in (1, 2, 3, 4, 1):
        found = recorded(x[:size], seeded())
        torch.testing.assert_close(found.samples, plain(x[:size], seeded()).samples)
        assert "prepare_why_not" not in found.settings
        assert len(recorder.recordings) <= 2
