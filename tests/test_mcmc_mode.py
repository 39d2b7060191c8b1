"""Mode search: closed form, no coupling between images, rows without a gradient, arguments."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from programs import HierarchicalVAE
from torch.optim import Adam
from torch.optim.lr_scheduler import LinearLR

from pyro_vae_defence.mcmc.mode import _inverse_hessian, search_mode, search_mode_lbfgs
from pyro_vae_defence.models import program
from pyro_vae_defence.ops.latents import index

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


# --- L-BFGS ---------------------------------------------------------------------------------------


def rosenbrock(latents):
    a, b = latents["a"][:, 0], latents["b"][:, 0, 0]
    return (1 - a).square() + 100 * (b - a.square()).square()


def test_lbfgs_goes_where_adam_does_not():
    start = {"a": torch.tensor([[-1.2], [0.5]]), "b": torch.tensor([[[1.0]], [[2.0]]])}
    found, gradients = search_mode_lbfgs(rosenbrock, start, num_steps=80)
    for name in ("a", "b"):
        assert found[name].shape == start[name].shape
        assert torch.allclose(found[name], torch.ones_like(found[name]), atol=1e-5)
    assert gradients.tolist() == [81, 81]
    adam, _ = search_mode(rosenbrock, start, num_steps=80)
    assert (rosenbrock(adam) > 1e-6).all()


def test_lbfgs_on_sites_without_event_dimensions():
    start = {"a": torch.tensor([-1.2, 0.5]), "b": torch.tensor([1.0, 2.0])}
    found, _ = search_mode_lbfgs(
        lambda z: rosenbrock({"a": z["a"][:, None], "b": z["b"][:, None, None]}),
        start, num_steps=80,
    )  # fmt: skip
    for value in found.values():
        torch.testing.assert_close(value, torch.ones(2), atol=1e-5, rtol=0)


def test_lbfgs_converges_superlinearly_on_the_linear_gaussian_vae(linear_vae):
    x = torch.rand(5, 1, 4, 4)
    mean, _ = linear_vae.exact(x)
    found, _ = search_mode_lbfgs(
        program.potential(linear_vae, x), {"z": torch.zeros(5, 3)}, num_steps=15
    )
    assert torch.allclose(found["z"], mean, atol=1e-5)


def test_lbfgs_takes_no_step_that_raises_the_energy():
    """Newton's steps on sqrt(1 + z^2) lead from z to -z^3, away from the mode at 0."""
    asked = []

    def energy(latents):
        asked.append((1 + latents["z"].square()).sqrt().sum(-1))
        return asked[-1]

    found, _ = search_mode_lbfgs(energy, {"z": torch.tensor([[2.0], [9.0]])}, num_steps=20)
    least = torch.stack(asked).amin(0)
    assert (energy(found) <= least + 1e-3).all()
    assert found["z"].abs().max() < 1e-2


def test_two_loops_are_the_update_of_the_inverse_hessian():
    # H' = (I - r s y^T) H (I - r y s^T) + r s s^T, from H = (s.y / y.y) I of the newest pair.
    changes, slopes = torch.randn(3, 5), torch.randn(3, 5)
    slopes = torch.where((changes * slopes).sum(1, keepdim=True) > 0, slopes, -slopes)
    matrix = torch.eye(5) * (changes[-1] @ slopes[-1]) / (slopes[-1] @ slopes[-1])
    for s, y in zip(changes, slopes, strict=True):
        left = torch.eye(5) - torch.outer(s, y) / (s @ y)
        matrix = left @ matrix @ left.T + torch.outer(s, s) / (s @ y)
    gradient = torch.randn(1, 5)
    # Two empty slots before them.
    pairs = torch.cat([torch.zeros(2, 2, 1, 5), torch.stack([changes, slopes], 1)[:, :, None]])
    assert torch.allclose(_inverse_hessian(pairs, gradient), gradient @ matrix)


# --- Both searches --------------------------------------------------------------------------------


both = pytest.mark.parametrize("search", [search_mode, search_mode_lbfgs])


@pytest.mark.parametrize(
    ("search", "falls", "tolerance"),
    [
        # A rate that overshoots.
        (functools.partial(search_mode, num_steps=12, learning_rate=5.0), torch.le, 1e-9),
        (functools.partial(search_mode_lbfgs, num_steps=12), torch.lt, 1e-6),
    ],
)
def test_rows_do_not_see_each_other_and_energy_never_rises(search, falls, tolerance):
    x = torch.rand(4, 1, 4, 4)
    energy = program.potential(HierarchicalVAE(), x)
    start = {n: 3 * torch.randn_like(v) for n, v in energy.prototype.items()}
    found, _ = search(energy, start)
    assert falls(energy(found), energy(start)).all()
    for i in range(4):
        alone, _ = search(
            program.potential(HierarchicalVAE(), x[i : i + 1]), index(start, slice(i, i + 1))
        )
        for name, value in alone.items():
            torch.testing.assert_close(
                value, found[name][i : i + 1], rtol=tolerance, atol=tolerance
            )


@both
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_meets_a_non_finite_energy_keeps_its_best_point(search, value):
    def cliff(latents):
        z = latents["z"].sum(-1)
        return z.square() + torch.where(z.abs() < 1, value, 0.0)

    found, _ = search(cliff, {"z": torch.tensor([[3.0], [0.5]])}, num_steps=40)
    assert 1 <= found["z"][0] < (3 if search is search_mode else 1.5)
    assert found["z"][1] == 0.5


@both
def test_a_row_that_meets_a_gradient_that_is_no_number_goes_on_from_its_best_point(search):
    """The energy is z^2, without a gradient at 0.5 and without a value below it. No search asks for
    the energy at what is no number, which a model's distributions would refuse for all rows."""
    asked = []

    def energy(latents):
        asked.append(latents["z"].detach())
        return (latents["z"].square() + 0.0 * (latents["z"] - 0.5).sqrt()).sum(-1)

    # A step of unit length leads L-BFGS from 1.5 to the point without a gradient.
    found, _ = search(energy, {"z": torch.tensor([[2.9], [1.5], [0.2]])}, num_steps=40)
    visited = torch.stack(asked)[..., 0]
    assert visited.isfinite().all()
    first_met = (visited[:, 0] <= 0.5).double().argmax()
    assert 0 < first_met < 30
    assert 0.5 < found["z"][0] < visited[:first_met, 0].min() - 1e-3
    assert 0.5 < found["z"][1] < 0.9
    assert found["z"][2] == 0.2


@both
def test_runs_on_a_device_that_cannot_answer(search):
    start = {"z": torch.empty(5, 3, device="meta")}
    found, gradients = search(lambda s: s["z"].square().sum(-1), start, num_steps=2)
    assert found["z"].device.type == gradients.device.type == "meta"


@pytest.mark.parametrize(
    ("search", "options", "message"),
    [
        (search_mode, {"num_steps": -1}, "num_steps must be an integer of at least 0, got -1"),
        (search_mode, {"learning_rate": 0.0}, "learning_rate must be .* finite number, got 0.0"),
        (search_mode_lbfgs, {"num_steps": -1}, "num_steps must be .* of at least 0, got -1"),
        (search_mode_lbfgs, {"memory": 0}, "memory must be an integer of at least 1, got 0"),
    ],
)
def test_arguments(search, options, message):
    with pytest.raises(ValueError, match=message):
        search(lambda s: s["z"].square().sum(-1), {"z": torch.zeros(1, 1)}, **options)
