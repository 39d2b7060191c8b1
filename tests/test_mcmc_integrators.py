"""Integrators: reversible, volume preserving, second order, a step size per image, any metric."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernels import FACTORIES, KERNELS

from pyro_vae_defence.mcmc import hmc
from pyro_vae_defence.mcmc.burn_in import burn_in
from pyro_vae_defence.mcmc.integrators import (
    Phase,
    energy_and_gradient,
    isokinetic,
    kinetic_energy,
    leapfrog,
    normalise,
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
    # Further on, steep sides multiply rounding a millionfold.
    there = integrate(first, step_size, 12, inverse_mass)
    turned = there._replace(momentum={n: -r for n, r in there.momentum.items()})
    back = integrate(turned, step_size, 12, inverse_mass)
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


@pytest.mark.parametrize("name", KERNELS)
def test_a_metric_is_a_change_of_variables(name):
    """Inverse mass S on U(z) takes the same trajectory as the identity on U(S^(1/2) y)."""
    scale = {"a": torch.tensor([0.1, 3.0]), "b": torch.tensor([[0.7]])}
    inverse_mass = {name: value**2 for name, value in scale.items()}

    def whitened(latents):
        return anharmonic({name: scale[name] * value for name, value in latents.items()})

    y = {"a": torch.randn(12, 2) / scale["a"], "b": torch.randn(12, 1, 1) / scale["b"]}
    z = {name: scale[name] * value for name, value in y.items()}
    streams = Streams.create(12, seed=5)
    step_size = torch.linspace(0.02, 0.2, 12)

    def begin(potential, start, metric=None):
        kernel = FACTORIES[name](potential_fn=potential)
        kernel.inverse_mass = metric
        state = burn_in(potential, hmc.init(potential, start), streams, 3, metric)
        return kernel, kernel._extend(state, streams)

    (kernel_z, in_z), (kernel_y, in_y) = begin(anharmonic, z, inverse_mass), begin(whitened, y)
    for _ in range(4):
        in_z, info_z = kernel_z._transition(in_z, streams, step_size)
        in_y, info_y = kernel_y._transition(in_y, streams, step_size)
        assert torch.equal(info_z.num_steps, info_y.num_steps)
        assert torch.equal(info_z.accepted, info_y.accepted)
        for site in z:
            expected = scale[site] * in_y.position[site]
            assert torch.allclose(in_z.position[site], expected, rtol=1e-9, atol=1e-12)
    assert info_z.accepted.any()


def test_only_the_latents_are_differentiated():
    weight = torch.randn(3, requires_grad=True)
    energy, gradient = energy_and_gradient(
        lambda latents: (latents["z"] * weight).square().sum(-1), {"z": torch.randn(4, 3)}
    )
    assert weight.grad is None
    assert not energy.requires_grad
    assert not gradient["z"].requires_grad


# --- Isokinetic -----------------------------------------------------------------------------------


def start_on_the_sphere(rows):
    phase = start(rows)
    return phase._replace(momentum=normalise(phase.momentum))


def integrate_isokinetic(phase, step_size, num_steps, inverse_mass=None):
    kinetic = torch.zeros_like(phase.energy)
    for _ in range(num_steps):
        phase, change = isokinetic(anharmonic, phase, step_size, inverse_mass)
        kinetic = kinetic + change
    return phase, kinetic


@pytest.mark.parametrize("inverse_mass", [None, INVERSE_MASS], ids=["identity", "diagonal"])
def test_isokinetic_is_reversible(inverse_mass):
    first = start_on_the_sphere(20)
    step_size = torch.linspace(0.02, 0.2, 20)
    there, kinetic = integrate_isokinetic(first, step_size, 25, inverse_mass)
    turned = there._replace(momentum={n: -u for n, u in there.momentum.items()})
    back, kinetic_back = integrate_isokinetic(turned, step_size, 25, inverse_mass)
    assert (flat(there.position) - flat(first.position)).abs().min() > 1e-4  # it did move
    assert (flat(back.position) - flat(first.position)).abs().max() < 1e-9
    assert (flat(back.momentum) + flat(first.momentum)).abs().max() < 1e-9
    assert (kinetic + kinetic_back).abs().max() < 1e-9
    assert (flat(there.momentum).norm(dim=1) - 1).abs().max() < 1e-14


@pytest.mark.parametrize("inverse_mass", [None, INVERSE_MASS], ids=["identity", "diagonal"])
def test_isokinetic_energy_error_is_second_order(inverse_mass):
    """Over a fixed time U + K is kept up to the square of the step size."""
    first = start_on_the_sphere(64)
    step_sizes = 0.1 * 0.5 ** np.arange(5)
    errors = []
    for step_size in step_sizes:
        num_steps = round(1.0 / step_size)
        end, kinetic = integrate_isokinetic(
            first, torch.full((64,), step_size), num_steps, inverse_mass
        )
        errors.append(float((end.energy + kinetic - first.energy).abs().median()))
    slope = np.polyfit(np.log(step_sizes), np.log(errors), 1)[0]
    assert 1.8 < slope < 2.2


def test_isokinetic_kinetic_energy_is_the_change_of_volume():
    """In 2 dimensions, u as an angle: det d(z*, angle*) / d(z, angle) = exp(-change of K)."""

    def energy(latents):
        z = latents["z"]
        return 0.25 * z.pow(4).sum(-1) + (z[:, 0] * z[:, 1]).sin() + z[:, 0]

    def flow(values):  # (B, 3) -> (B, 3), (B,)
        position = {"z": values[:, :2]}
        direction = {"z": torch.stack([values[:, 2].cos(), values[:, 2].sin()], 1)}
        phase = Phase(position, direction, *energy_and_gradient(energy, position))
        kinetic = torch.zeros(len(values))
        for _ in range(3):
            phase, change = isokinetic(energy, phase, torch.full((len(values),), 0.15))
            kinetic = kinetic + change
        u = phase.momentum["z"]
        angle = torch.atan2(u[:, 1], u[:, 0])[:, None]
        return torch.cat([phase.position["z"], angle], 1), kinetic

    h = 1e-3
    for _ in range(5):
        first = torch.randn(3)
        offsets = h * torch.eye(3)
        near = flow(first + offsets)[0] - flow(first - offsets)[0]
        far = flow(first + 2 * offsets)[0] - flow(first - 2 * offsets)[0]
        turn = 2 * torch.pi  # an angle may jump by it
        near[:, 2], far[:, 2] = (v[:, 2] - turn * (v[:, 2] / turn).round() for v in (near, far))
        determinant = torch.linalg.det((8 * near - far) / (12 * h))
        kinetic = flow(first[None])[1][0]
        assert abs(kinetic) > 1e-2
        assert torch.allclose(determinant.log(), -kinetic, rtol=1e-6, atol=1e-8)


def test_isokinetic_survives_steep_and_vanishing_gradients():
    def steep(latents):
        return 1e6 * latents["z"][:, 0]

    def flat_energy(latents):
        return 0.0 * latents["z"].sum(-1)

    position = {"z": torch.randn(6, 4)}
    direction = normalise({"z": torch.randn(6, 4)})
    for energy in (steep, flat_energy):
        phase = Phase(position, direction, *energy_and_gradient(energy, position))
        end, kinetic = isokinetic(energy, phase, torch.full((6,), 0.5))
        assert kinetic.isfinite().all()
        assert torch.allclose(end.momentum["z"].norm(dim=1), torch.ones(6))
    assert (kinetic.abs() < 1e-300).all()
    assert torch.allclose(end.position["z"], position["z"] + 0.5 * 2 * direction["z"])
