"""Objectives and training agree between devices, and go on from files."""

from __future__ import annotations

import copy

import objectives_programs
import pyro
import pytest
import torch
from devices import agree, to
from test_nvae_programs import CONFIGS, build

from pyro_vae_defence import training
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.objectives import (
    AVAE,
    AVAESS,
    SE,
    SEAVAE,
    BetaELBO,
    BetaTCVAE,
    NVAEObjective,
)

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("float64")]


def perturb(x):
    ramp = torch.linspace(-0.1, 0.1, x.shape[-1], dtype=x.dtype, device=x.device)
    return (x + ramp).clamp(0, 1)


OBJECTIVES = {
    "elbo": BetaELBO,
    "beta": lambda: BetaELBO(4.0, num_particles=2),
    "mws": lambda: BetaTCVAE(5.0, 100, "mws"),
    "mss": lambda: BetaTCVAE(5.0, 100, "mss"),
    "published": lambda: BetaTCVAE(5.0, 100, "published"),
    "se": lambda: SE(perturb, 2.0),
    "avae": AVAE,
    "avae-ss": AVAESS,
    "se-avae": lambda: SEAVAE(perturb, 2.0),
}


class Draws(pyro.poutine.messenger.Messenger):
    """Latents drawn on the CPU, so that both devices see the same."""

    def _pyro_sample(self, msg):
        if msg["done"] or msg["is_observed"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        fn = msg["fn"]
        noise = torch.randn(fn.shape(), dtype=torch.float64).to(fn.mean)
        msg["value"] = fn.mean + fn.stddev * noise
        msg["done"] = True


class SameDraws(objectives_programs.TutorialVAE):
    """Draws so wherever it is called, also where a caller's handlers see nothing."""

    def guide(self, x):
        with Draws():
            return super().guide(x)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients(device, name):
    vae, x = objectives_programs.TutorialVAE(), torch.rand(5, 1, 8, 8)

    def run(place):
        mine = to(vae, place)
        with Draws():
            loss = OBJECTIVES[name]().loss_and_grads(mine.model, mine.guide, x.to(place))
        grads = {n: p.grad for n, p in mine.named_parameters() if p.grad is not None}
        return float(loss), grads

    agree(run, device)


def test_nvae(device):
    network, x = build(CONFIGS["grey"]), torch.rand(2, 1, 28, 28)
    # Singular vectors start at random: those of the CPU.
    vectors = NVAEObjective(network, 100).state_dict()

    def run(place):
        vae = to(network, place).train()
        objective = NVAEObjective(vae, 100)
        objective.load_state_dict(copy.deepcopy(vectors))
        torch.manual_seed(1)  # the vectors that were replaced were drawn on the device
        with Draws():
            loss = objective.loss_and_grads(vae.model, vae.guide, x.to(place))
        return float(loss), {n: p.grad for n, p in vae.named_parameters()}

    agree(run, device, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "clip_norm": 1.0}], ids=str)
def test_fit(device, options):
    vae, x = SameDraws(), torch.rand(12, 1, 8, 8)

    def run(place):
        mine = to(vae, place)
        config = training.FitConfig(2, schedule="constant", progress=False, **options)
        result = training.fit(mine, BetaELBO(), list(x.split(4)), config)  # images on the CPU
        losses = [entry["train_loss"] for entry in result.history]
        return losses, dict(mine.state_dict())

    agree(run, device, rtol=1e-5, atol=1e-7)


def test_fit_goes_on_from_a_file(device, tmp_path):
    if device.type == "lazy":
        pytest.skip("no file holds tensors of this device")
    vae, x = objectives_programs.TutorialVAE().to(device), torch.rand(12, 1, 8, 8)
    again = to(vae, device)

    def fit(one, epochs, **options):
        pyro.clear_param_store()
        config = training.FitConfig(epochs, schedule="constant", progress=False)
        return training.fit(one, BetaELBO(), list(x.split(4)), config, **options)

    torch.manual_seed(3)
    fit(vae, 3)
    torch.manual_seed(3)
    path = tmp_path / "fit.pt"

    class StopError(Exception):
        pass

    def stop(entry):
        if entry["epoch"] == 2:
            raise StopError

    with pytest.raises(StopError):
        fit(again, 3, checkpoint=path, on_epoch=stop)
    fit(again, 3, checkpoint=path)
    for name, value in vae.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)


def test_bfloat16_trains(device):
    if device.type == "lazy":
        pytest.skip("torch.autocast knows no such device")
    torch.set_default_dtype(torch.float32)
    vae, x = ConvVAE().to(device), torch.rand(8, 1, 28, 28)
    config = training.FitConfig(2, schedule="constant", progress=False, precision="bfloat16")
    result = training.fit(vae, BetaELBO(), [x, x], config)
    assert result.history[1]["train_loss"] < result.history[0]["train_loss"]
    assert all(p.dtype == torch.float32 for p in vae.parameters())
