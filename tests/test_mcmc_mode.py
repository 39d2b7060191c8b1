"""Mode search: closed form, no coupling between images, rows without a gradient, arguments."""

from __future__ import annotations

import math

import pytest
import torch
from programs import HierarchicalVAE
from torch.optim import Adam
from torch.optim.lr_scheduler import LinearLR

from pyro_vae_defence.mcmc.mode import search_mode
from pyro_vae_defence.models import program

pytestmark = pytest.mark.usefixtures("float64")


def test_finds_the_mode_of_the_linear_gaussian_vae(linear_vae):
    x = torch.rand(5, 1, 4, 4)
    mean, _ = linear_vae.exact(x)
    found, gradients = search_mode(
        program.potential(linear_vae, x), {"z": torch.zeros(5, 3)}, num_steps=300, learning_rate=0.1
    )
    assert torch.allclose(found["z"], mean, atol=1e-4)
    assert gradients.tolist() == [301] * 5


def test_steps_are_those_of_torchs_adam():
    scale = torch.tensor([1.0, 3.0, 10.0])

    def energy(z):
        return (0.5 * (z / scale).square() + 0.1 * z.pow(4)).sum(-1)

    start = 0.5 + torch.rand(4, 3)
    z = start.clone().requires_grad_()
    optimiser = Adam([z], lr=0.05)
    schedule = LinearLR(optimiser, 1.0, 0.1, total_iters=9)  # 1, .9, ..., .1
    for _ in range(10):
        optimiser.zero_grad()
        energy(z).sum().backward()
        optimiser.step()
        schedule.step()
    # The energy falls all the way here, so that the last point is the best.
    found, _ = search_mode(lambda s: energy(s["z"]), {"z": start}, num_steps=10, learning_rate=0.05)
    assert torch.allclose(found["z"], z)


def test_rows_do_not_see_each_other_and_energy_never_rises():
    x = torch.rand(4, 1, 4, 4)
    energy = program.potential(HierarchicalVAE(), x)
    start = {n: 3 * torch.randn_like(v) for n, v in energy.prototype.items()}
    # A rate that overshoots.
    found, _ = search_mode(energy, start, num_steps=12, learning_rate=5.0)
    assert (energy(found) <= energy(start)).all()
    for i in range(4):
        rows = slice(i, i + 1)
        alone, _ = search_mode(
            program.potential(HierarchicalVAE(), x[rows]),
            {n: v[rows] for n, v in start.items()},
            num_steps=12,
            learning_rate=5.0,
        )
        for name, value in alone.items():
            assert torch.allclose(value, found[name][rows], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_meets_a_non_finite_energy_keeps_its_best_point(value):
    def cliff(latents):
        z = latents["z"].sum(-1)
        return z.square() + torch.where(z.abs() < 1, value, 0.0)

    found, _ = search_mode(cliff, {"z": torch.tensor([[3.0], [0.5]])}, num_steps=40)
    assert 1 <= found["z"][0] < 3
    assert found["z"][1] == 0.5


def test_runs_on_a_device_that_cannot_answer():
    start = {"z": torch.empty(5, 3, device="meta")}
    found, gradients = search_mode(lambda s: s["z"].square().sum(-1), start, num_steps=2)
    assert found["z"].device.type == gradients.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "num_steps must be an integer of at least 0, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive finite number, got 0.0"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        search_mode(lambda s: s["z"].square().sum(-1), {"z": torch.zeros(1, 1)}, **options)
