r"""The Metropolis-adjusted microcanonical sampler (MAMS), one independent chain per image.

A transition draws a direction u uniformly from the unit sphere of whitened coordinates, follows
microcanonical dynamics (:func:`~pyro_vae_defence.mcmc.integrators.isokinetic`) for L steps, and
accepts the end with probability

.. math:: \alpha = \min\{1, e^{-W}\}, \qquad W = U(z^*) - U(z) + \sum_l \Delta K_l ,

where :math:`\Delta K_l` is the integrator's change of kinetic energy in step l. A speed that never
changes is what sets it apart from HMC: down a steep energy a chain does not gather speed, which the
next gradient would have to stop.

Reference: Robnik, Cohn-Gordon, Seljak, "Metropolis adjusted microcanonical Hamiltonian Monte
Carlo", 2025, https://arxiv.org/abs/2503.01707.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae_defence.mcmc.hmc import HMCInfo, HMCState, accept, draw_momentum
from pyro_vae_defence.mcmc.integrators import Phase, isokinetic, normalise
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import LatentsLike, Potential


def step(
    potential: Potential,
    state: HMCState,
    streams: Streams,
    step_size: Tensor,
    num_steps: int,
    inverse_mass: LatentsLike | None = None,
) -> tuple[HMCState, HMCInfo]:
    """One transition of every chain: ``num_steps`` isokinetic steps, a gradient each.

    Arguments as :func:`~pyro_vae_defence.mcmc.hmc.step`; there must be two latent dimensions or
    more.
    """
    # A standard normal vector has a uniform direction.
    direction = normalise(draw_momentum(streams, state.step, state.position, None))
    phase = Phase(state.position, direction, state.energy, state.gradient)
    kinetic = torch.zeros_like(state.energy)
    for _ in range(num_steps):
        phase, change = isokinetic(potential, phase, step_size, inverse_mass)
        kinetic = kinetic + change
    end = phase.energy + kinetic
    return accept(state, phase, state.energy, end, streams, step_size, num_steps)
