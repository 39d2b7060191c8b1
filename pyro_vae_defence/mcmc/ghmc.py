r"""Generalised Hamiltonian Monte Carlo: the momentum outlives a transition.

A transition refreshes the momentum in part, with persistence :math:`\alpha \in [0, 1)`,

.. math:: r \leftarrow \alpha r + \sqrt{1 - \alpha^2}\, \xi, \qquad \xi \sim N(0, M),

integrates L leapfrog steps to (z*, r*), and accepts them with probability
:math:`\min\{1, \exp(H(z, r) - H(z^*, r^*))\}`. On rejection the momentum turns: the next state is
(z, -r). Without that flip the chain has another stationary distribution. With one leapfrog step and
persistent momentum a chain moves on as on a long trajectory, but is tested after every gradient;
:math:`\alpha = 0` is HMC.

Reference: Horowitz, "A generalized guided Monte Carlo algorithm", Physics Letters B, 1991,
https://doi.org/10.1016/0370-2693(91)90812-5.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from pyro_vae_defence.mcmc import hmc
from pyro_vae_defence.mcmc.hmc import HMCInfo, HMCState
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import Latents, LatentsLike, Potential


class GHMCState(NamedTuple):
    """An :class:`~pyro_vae_defence.mcmc.hmc.HMCState` and the momentum, shaped as its position."""

    position: Latents
    energy: Tensor
    gradient: Latents
    step: int
    momentum: Latents


def init(state: HMCState, streams: Streams, inverse_mass: LatentsLike | None = None) -> GHMCState:
    """``state`` with a momentum drawn from N(0, M)."""
    purpose = hmc.SECOND_MOMENTUM
    momentum = hmc.draw_momentum(streams, state.step, state.position, inverse_mass, purpose)
    return GHMCState(*state, momentum)


def refresh(momentum: LatentsLike, noise: LatentsLike, persistence: float) -> Latents:
    """Keep ``persistence`` of a momentum and draw the rest anew."""
    fresh = math.sqrt(1 - persistence**2)
    return {name: persistence * value + fresh * noise[name] for name, value in momentum.items()}


def step(
    potential: Potential,
    state: GHMCState,
    streams: Streams,
    step_size: Tensor,
    num_steps: int,
    persistence: float,
    inverse_mass: LatentsLike | None = None,
) -> tuple[GHMCState, HMCInfo]:
    """One transition of every chain: ``num_steps`` gradients.

    ``persistence`` in [0, 1) is the share of the momentum that is kept; the other arguments are
    those of :func:`~pyro_vae_defence.mcmc.hmc.step`.
    """
    noise = hmc.draw_momentum(streams, state.step, state.position, inverse_mass)
    momentum = refresh(state.momentum, noise, persistence)
    before = HMCState(*state[:4])
    path = hmc.trajectory(potential, before, momentum, step_size, num_steps, inverse_mass)
    moved, info = hmc.accept(before, *path, streams, step_size, num_steps)
    turned = {name: -value for name, value in momentum.items()}
    return GHMCState(*moved, lat.where(info.accepted, path[0].momentum, turned)), info
