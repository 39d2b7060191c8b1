"""Leapfrog: reversible, volume preserving, second order, one step size per image, any diagonal metric."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyro_vae_defence.mcmc import hmc, nuts
from pyro_vae_defence.mcmc.integrators import (
    Phase,
    energy_and_gradient,
    kinetic_energy,
    leapfrog,
)
from pyro_vae_defence.ops.streams import Streams

pytestmark = pytest.mark.usefixtures("float64")


def anharmonic(latents):
    """Two coupled sites of different shape; no symmetry that could hide an error."""
    a, b = latents["a"], latents["b"].flatten(1)
    coupled = (a.sum(-1) * b.sum(-1)).sin()
    return 0.25 * a.pow(4).sum(-1) + (b.exp() - 0.5 * b).sum(-1) + coupled


INVERSE_MASS = {"a": torch.tensor([0.5, 2.0]).double(), "b": torch.tensor([[1.5]]).double()}


def start(rows: int) -> Phase:
    position = {"a": 0.5 * torch.randn(rows, 2), "b": 0.5 * torch.randn(rows, 1, 1)}
    momentum = {"a": torch.randn(rows, 2), "b": torch.randn(rows, 1, 1)}
    return Phase(position, momentum, *energy_and_gradient(anharmonic, position))


def integrate(phase, step_size, num_steps, inverse_mass=None):
    for _ in range(num_steps):
        phase = leapfrog(anharmonic, phase, step_size, inverse_mass)
    return phase


def hamiltonian(phase, inverse_mass=None):
    return phase.energy + kinetic_energy(phase.momentum, inverse_mass)


def flat(latents):
    return torch.cat([value.flatten(1) for value in latents.values()], 1)


@pytest.mark.parametrize("inverse_mass", [None, INVERSE_MASS], ids=["identity", "diagonal"])
def test_reversible(inverse_mass):
    first = start(20)
    step_size = torch.linspace(0.02, 0.2, 20)
    there = integrate(first, step_size, 25, inverse_mass)
    turned = there._replace(momentum={n: -r for n, r in there.momentum.items()})
    back = integrate(turned, step_size, 25, inverse_mass)
    assert (flat(there.position) - flat(first.position)).abs().min() > 1e-3  # it did move
    assert (flat(back.position) - flat(first.position)).abs().max() < 1e-10
    assert (flat(back.momentum) + flat(first.momentum)).abs().max() < 1e-10


def test_a_negative_step_size_integrates_backwards():
    first, step_size = start(5), torch.full((5,), 0.1)
    back = integrate(integrate(first, step_size, 10), -step_size, 10)
    assert (flat(back.position) - flat(first.position)).abs().max() < 1e-10
    assert (flat(back.momentum) - flat(first.momentum)).abs().max() < 1e-10


@pytest.mark.parametrize("inverse_mass", [None, INVERSE_MASS], ids=["identity", "diagonal"])
def test_preserves_volume(inverse_mass):
    """The determinant of d(z*, r*)/d(z, r) is 1.

    The matrix comes from central differences of order h^4, since leapfrog detaches its inputs.
    """
    first = start(1)
    packed = torch.cat([flat(first.position), flat(first.momentum)], 1)[0]

    def flow(values):  # (B, 6) -> (B, 6)
        position = {"a": values[:, :2], "b": values[:, 2:3, None]}
        momentum = {"a": values[:, 3:5], "b": values[:, 5:, None]}
        phase = Phase(position, momentum, *energy_and_gradient(anharmonic, position))
        end = integrate(phase, torch.full((len(values),), 0.2), 7, inverse_mass)
        return torch.cat([flat(end.position), flat(end.momentum)], 1)

    h = 1e-3
    offsets = h * torch.eye(6)
    near = flow(packed + offsets) - flow(packed - offsets)
    far = flow(packed + 2 * offsets) - flow(packed - 2 * offsets)
    jacobian = (8 * near - far) / (12 * h)
    assert (jacobian - torch.eye(6)).abs().max() > 0.5  # far from the identity
    assert abs(torch.linalg.det(jacobian) - 1) < 1e-7


def test_energy_error_is_second_order():
    """Over a fixed time the energy error goes as the square of the step size."""
    first = start(64)
    step_sizes = 0.1 * 0.5 ** np.arange(5)
    errors = []
    for step_size in step_sizes:
        end = integrate(first, torch.full((64,), step_size), round(1.0 / step_size))
        error = (hamiltonian(end) - hamiltonian(first)).abs()
        errors.append(float(error.median()))
    slope = np.polyfit(np.log(step_sizes), np.log(errors), 1)[0]
    assert 1.8 < slope < 2.2


def test_harmonic_oscillator_in_closed_form():
    """One step on U = z^2 / 2 is a known matrix, per image with its own step size."""
    step_size = torch.tensor([0.01, 0.5, 1.9])
    z, r = torch.randn(3, 1), torch.randn(3, 1)

    def energy(latents):
        return 0.5 * latents["z"].square().sum(-1)

    end = leapfrog(energy, Phase({"z": z}, {"z": r}, energy({"z": z}), {"z": z}), step_size)
    e = step_size[:, None]
    assert torch.allclose(end.position["z"], (1 - e**2 / 2) * z + e * r)
    assert torch.allclose(end.momentum["z"], (1 - e**2 / 2) * r - e * (1 - e**2 / 4) * z)


def test_each_image_has_its_own_step_size():
    first = start(4)
    step_size = torch.tensor([0.01, 0.05, 0.1, 0.3])
    together = integrate(first, step_size, 6)
    for i in range(4):
        row = Phase(*[{n: v[i : i + 1] for n, v in p.items()} for p in first[:2]], None, None)
        row = Phase(row.position, row.momentum, *energy_and_gradient(anharmonic, row.position))
        alone = integrate(row, step_size[i : i + 1], 6)
        assert torch.allclose(flat(alone.position), flat(together.position)[i], rtol=1e-13)


@pytest.mark.parametrize("kernel", ["hmc", "nuts"])
def test_a_metric_is_a_change_of_variables(kernel):
    """Inverse mass S on U(z) takes the same trajectory as the identity on U(S^(1/2) y)."""
    scale = {"a": torch.tensor([0.1, 3.0]), "b": torch.tensor([[0.7]])}
    inverse_mass = {name: value**2 for name, value in scale.items()}

    def whitened(latents):
        return anharmonic({name: scale[name] * value for name, value in latents.items()})

    y = {"a": torch.randn(12, 2) / scale["a"], "b": torch.randn(12, 1, 1) / scale["b"]}
    z = {name: scale[name] * value for name, value in y.items()}
    streams = Streams.create(12, seed=5)
    step_size = torch.linspace(0.02, 0.2, 12)
    in_z, in_y = hmc.init(anharmonic, z), hmc.init(whitened, y)
    for _ in range(4):
        if kernel == "hmc":
            in_z, info_z = hmc.step(anharmonic, in_z, streams, step_size, 5, inverse_mass)
            in_y, info_y = hmc.step(whitened, in_y, streams, step_size, 5)
        else:
            in_z, info_z = nuts.step(anharmonic, in_z, streams, step_size, 6, inverse_mass)
            in_y, info_y = nuts.step(whitened, in_y, streams, step_size, 6)
        assert torch.equal(info_z.num_steps, info_y.num_steps)
        assert torch.equal(info_z.accepted, info_y.accepted)
        for name in z:
            expected = scale[name] * in_y.position[name]
            assert torch.allclose(in_z.position[name], expected, rtol=1e-9, atol=1e-12)
    assert info_z.accepted.any()


def test_only_the_latents_are_differentiated():
    weight = torch.randn(3, requires_grad=True)
    energy, gradient = energy_and_gradient(
        lambda latents: (latents["z"] * weight).square().sum(-1), {"z": torch.randn(4, 3)}
    )
    assert weight.grad is None
    assert not energy.requires_grad
    assert not gradient["z"].requires_grad
