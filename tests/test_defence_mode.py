"""The posterior mode as a defence: closed form, contract, micro-batches, arguments."""

from __future__ import annotations

import math

import pytest
import torch
from programs import HierarchicalVAE

from pyro_vae_defence.defence import PosteriorModeDefence
from pyro_vae_defence.models import program
from pyro_vae_defence.ops.balls import Linf

STEPS = {"adam": 200, "lbfgs": 25}


@pytest.mark.parametrize("optimiser", STEPS)
@pytest.mark.parametrize("initial", ["guide", "mean", "prior"])
@pytest.mark.usefixtures("float64")
def test_ends_at_the_mode_of_the_linear_gaussian_vae(linear_vae, optimiser, initial):
    x = torch.rand(5, 1, 4, 4)
    result = PosteriorModeDefence(
        linear_vae, optimiser, STEPS[optimiser], learning_rate=0.1, initial=initial
    )(x)
    mean, _ = linear_vae.exact(x)
    assert torch.allclose(result.latents["z"], mean, atol=1e-3)
    energy = program.potential(linear_vae, x)
    assert torch.allclose(result.sample_stats["lp"][0, 0], -energy(result.latents))


@pytest.mark.parametrize("optimiser", STEPS)
def test_contract(tutorial_vae, optimiser, tmp_path):
    x = torch.rand(3, 1, 28, 28)
    defence = PosteriorModeDefence(tutorial_vae, optimiser, 6, perturbation=Linf(0.1))
    result = defence(x, torch.Generator().manual_seed(1))
    assert result.latents["latent"].shape == (3, 5)
    assert result.samples["latent"].shape == (1, 1, 3, 5)
    assert result.initial["latent"].shape == (1, 3, 5)
    assert result.num_gradients.tolist() == [7, 7, 7]
    decoded = program.decode(tutorial_vae, result.latents, (1, 28, 28))
    assert torch.allclose(result.reconstruction, decoded, atol=1e-6)
    again = defence.encode(x, torch.Generator().manual_seed(1))
    assert torch.equal(again["latent"], result.latents["latent"])
    result.to_arviz().to_netcdf(str(tmp_path / "mode.nc"))
    # The energy has fallen, and it is that of the assumed perturbation.
    energy = program.potential(tutorial_vae, x, Linf(0.1))
    assert (energy(result.latents) < energy({"latent": result.initial["latent"][0]})).all()
    assert torch.allclose(-result.sample_stats["lp"][0, 0], energy(result.latents))


def test_the_mean_makes_it_deterministic_and_constraints_are_kept(tutorial_vae):
    x = torch.rand(2, 1, 28, 28)
    defence = PosteriorModeDefence(tutorial_vae, num_steps=2, initial="mean")
    assert torch.equal(defence.encode(x)["latent"], defence.encode(x)["latent"])
    for optimiser in STEPS:
        found = PosteriorModeDefence(HierarchicalVAE(), optimiser, 10).encode(
            torch.rand(3, 1, 4, 4)
        )
        assert (found["rate"] > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimiser": "sgd"}, "optimiser must be 'adam' or 'lbfgs', got 'sgd'"),
        ({"initial": "zero"}, "initial must be one of .*, got 'zero'"),
        ({"num_steps": -1}, "num_steps must be an integer of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive finite number, got 0.0"),
        ({"learning_rate": math.inf}, "learning_rate must be a positive finite number, got inf"),
        ({"perturbation": 0.1}, "perturbation must be a ball"),
    ],
)
def test_arguments(tutorial_vae, settings, message):
    with pytest.raises(ValueError, match=message):
        PosteriorModeDefence(tutorial_vae, **settings)
