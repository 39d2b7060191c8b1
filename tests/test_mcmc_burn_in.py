"""Burn-in: it comes down fast, keeps what went astray, and leaves the target of the chain alone."""

from __future__ import annotations

import math

import pytest
import torch
from mcmc_reference import assert_moments
from pyro.infer import MCMC

from pyro_vae_defence.mcmc import BatchedGHMC, BatchedHMC, hmc
from pyro_vae_defence.mcmc.burn_in import burn_in
from pyro_vae_defence.ops.streams import Streams

pytestmark = pytest.mark.usefixtures("float64")

# Curvatures over a factor of 20, as whitened posteriors of a decoder have them.
PRECISION = torch.linspace(0.25, 5.0, 20).double()


def gaussian(latents):
    return 0.5 * (latents["z"].square() * PRECISION).sum(-1)


def far_start(rows):
    """Some 250 nats above the 10 of the target."""
    return {"z": 3.0 + torch.randn(rows, 20) * PRECISION.rsqrt()}


def test_thirty_gradients_come_down_from_afar():
    """To within a few nats, where HMC at the same number of gradients is still far above."""
    start, streams = far_start(200), Streams.create(200, seed=0)
    first = hmc.init(gaussian, start)
    assert first.energy.mean() > 200
    settled = burn_in(gaussian, first, streams, 30)
    assert abs(float(settled.energy.mean()) - 10) < 4
    assert torch.allclose(settled.energy, gaussian(settled.position))
    assert torch.allclose(settled.gradient["z"], PRECISION * settled.position["z"])


def test_directions_are_refreshed_in_part():
    """Where no force acts, against the formula: c = exp(-0.35), steps of 0.35 sqrt(d)."""
    first = hmc.init(lambda latents: 0.0 * latents["z"].sum(-1), {"z": torch.zeros(5, 4)})
    streams, kept = Streams.create(5, seed=0), math.exp(-0.35)
    last, momentum, second = 2**32 - 1, hmc.MOMENTUM, hmc.SECOND_MOMENTUM
    direction = streams.normal(last, second, (4,), torch.float64)
    direction, end = direction / direction.norm(dim=1, keepdim=True), torch.zeros(5, 4)
    for number in range(2):
        noise = streams.normal(last - number, momentum, (4,), torch.float64)
        direction = kept * direction + math.sqrt((1 - kept**2) / 4) * noise
        direction = direction / direction.norm(dim=1, keepdim=True)
        end = end + 0.35 * 2 * direction
    found = burn_in(lambda latents: 0.0 * latents["z"].sum(-1), first, streams, 2)
    torch.testing.assert_close(found.position["z"], end)


def test_rows_at_the_mode_leave_it():
    """Where hardly any of the target's mass lies: energies of mean 10 and standard deviation 3."""
    first = hmc.init(gaussian, {"z": torch.zeros(50, 20)})
    settled = burn_in(gaussian, first, Streams.create(50, seed=0), 30)
    assert (settled.energy > 2).double().mean() > 0.9


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_go_astray_stay(value):
    """One row far too narrow for the step, one beside a hole without energy, one that is fine."""
    scale = torch.tensor([1e-4, 1.0, 1.0])

    def potential(latents):
        z = latents["z"]
        energy = 0.5 * (z / scale[:, None]).square().sum(-1)
        left = torch.arange(3).eq(1) & z.ne(2.0).any(-1)
        return torch.where(left, value, energy)

    first = hmc.init(potential, {"z": torch.tensor([[1e-4], [2.0], [5.0]]).expand(3, 4).clone()})
    settled = burn_in(potential, first, Streams.create(3, seed=0), 8)
    assert torch.equal(settled.position["z"][:2], first.position["z"][:2])
    assert torch.equal(settled.energy[:2], first.energy[:2])
    assert settled.energy[2] < 0.5 * first.energy[2]


def test_its_gradients_are_counted_and_its_noise_is_its_own(used_noise):
    infos = []
    kernel = BatchedGHMC(potential_fn=gaussian, burn_in=7)
    MCMC(
        kernel,
        num_samples=3,
        warmup_steps=2,
        initial_params=far_start(4),
        hook_fn=lambda kernel, *_: infos.append(kernel.info.num_steps),
        disable_progbar=True,
    ).run()
    assert torch.stack(infos)[:, 0].tolist() == [8, 1, 1, 1, 1]
    assert len(set(used_noise)) == len(used_noise)


# Error rate: 40 moments at 5.7e-7 each.
def test_the_chain_after_it_samples_the_target():
    generator = torch.Generator().manual_seed(0)
    kernel = BatchedHMC(
        potential_fn=gaussian, step_size=0.3, num_steps=4, burn_in=30, generator=generator
    )
    mcmc = MCMC(kernel, 30, 40, initial_params=far_start(400), disable_progbar=True)
    mcmc.run()
    assert_moments(mcmc.get_samples()["z"] * PRECISION.sqrt(), 2.5 * 400)
