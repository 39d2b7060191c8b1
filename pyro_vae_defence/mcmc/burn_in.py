r"""Burn-in: microcanonical dynamics without a test, from a bad start to the target's mass.

An attacked encoding lies far above the energies its posterior is made of. HMC comes down slowly:
what a trajectory loses in potential energy it gains in speed, so that its steps must be small, and
rejections cost moves. Underdamped microcanonical Langevin dynamics keep the speed. Each step of
size :math:`\epsilon` (:func:`~pyro_vae_defence.mcmc.integrators.isokinetic`) follows a partial
refreshment of the direction u,

.. math::
    u \leftarrow \frac{c\, u + \sqrt{1 - c^2}\, \xi / \sqrt d}
        {|c\, u + \sqrt{1 - c^2}\, \xi / \sqrt d|}, \qquad
    c = e^{-\gamma \epsilon}, \quad \xi \sim N(0, 1) .

Without a test the dynamics are biased, so they only choose where a chain starts; the chain's own
test takes the bias out. A row that went astray stays at its start: one whose energy at the end is
not finite, or above that of its start by more than the number of dimensions, which is twice the
mean height of a Gaussian's mass above its mode.

The step is not adapted. It suits a metric that whitens the posterior up to a factor of a few, as
mean posterior variances do.

Reference: Robnik, De Luca, Silverstein, Seljak, "Microcanonical Hamiltonian Monte Carlo", JMLR
2023, https://arxiv.org/abs/2212.08549.
"""

from __future__ import annotations

import math

import torch

from pyro_vae_defence.mcmc import integrators
from pyro_vae_defence.mcmc.hmc import MOMENTUM, SECOND_MOMENTUM, HMCState, draw_momentum
from pyro_vae_defence.mcmc.integrators import Phase, dimension, normalise
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import LatentsLike, Potential

STEP_SIZE = 0.35
"""Size of a step, in units of the whitened posterior's width."""

FRICTION = 1.0
"""Rate gamma of forgetting a direction, per unit of time."""

# Steps of a burn-in count down from the top of a stream's 32 bits, clear of transitions.
_LAST_STEP = 2**32 - 1


def burn_in(
    potential: Potential,
    state: HMCState,
    streams: Streams,
    num_steps: int,
    inverse_mass: LatentsLike | None = None,
) -> HMCState:
    """State after ``num_steps`` >= 0 steps of every chain, one gradient each.

    The other arguments are those of :func:`~pyro_vae_defence.mcmc.hmc.step`.

    Raises:
        ValueError: if there are fewer than two latent dimensions.
    """
    if num_steps == 0:
        return state
    integrators.check_dimension(state.position, "burn_in > 0")
    kept = math.exp(-FRICTION * STEP_SIZE)
    fresh = math.sqrt((1 - kept**2) / dimension(state.position))
    step_sizes = torch.full_like(state.energy, STEP_SIZE)
    # A standard normal vector has a uniform direction.
    direction = normalise(draw_momentum(streams, _LAST_STEP, state.position, None, SECOND_MOMENTUM))
    phase = Phase(state.position, direction, state.energy, state.gradient)
    for number in range(num_steps):
        noise = draw_momentum(streams, _LAST_STEP - number, state.position, None, MOMENTUM)
        turned = {name: kept * u + fresh * noise[name] for name, u in phase.momentum.items()}
        phase = phase._replace(momentum=normalise(turned))
        phase, _ = integrators.isokinetic(potential, phase, step_sizes, inverse_mass)
    # Comparisons with NaN are false; minus infinity is no place to be.
    limit = state.energy + dimension(state.position)
    settled = (phase.energy < limit) & phase.energy.isfinite()
    return HMCState(
        lat.where(settled, phase.position, state.position),
        torch.where(settled, phase.energy, state.energy),
        lat.where(settled, phase.gradient, state.gradient),
        state.step,
    )
