r"""Hamiltonian Monte Carlo, one independent chain per image (Algorithm 1 of the paper).

A transition draws :math:`r \sim N(0, M)`, integrates L leapfrog steps from (z, r) to (z*, r*), and
accepts z* with probability

.. math::
    \alpha = \min\{1, \exp(H(z, r) - H(z^*, r^*))\}, \qquad
    H = U(z) + \tfrac12 r^\top M^{-1} r ,

image by image. A non-finite energy, or one that has risen by more than 1000 nats, is a divergence:
it is rejected and recorded.

Everything here is a pure function of its arguments: the noise comes from per-image streams, so an
image moves in a batch exactly as it moves alone.

Reference: Neal, "MCMC using Hamiltonian dynamics", 2011, https://arxiv.org/abs/1206.1901.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence.mcmc import integrators
from pyro_vae_defence.mcmc.integrators import (
    Drift,
    Phase,
    energy_and_gradient,
    kinetic_energy,
    leapfrog,
)
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import Latents, LatentsLike, Potential

DIVERGENCE_THRESHOLD = 1000.0
"""Energy error in nats beyond which a trajectory counts as divergent (as in Stan and Pyro)."""

# Purposes of the random streams: NUTS takes 1 to 31, the guide those from 2048 on. Within the noise
# of momenta, 1024 + site refreshes them between trajectories, 1536 + site serves a second draw of a
# transition.
_ACCEPT = 0
MOMENTUM = 1024
SECOND_MOMENTUM = 1536


class HMCState(NamedTuple):
    """What the next transition needs.

    Attributes:
        position: unconstrained latents, site -> ``(N, *event)``.
        energy: potential energy, ``(N,)``, in nats.
        gradient: gradient of the energy at ``position``.
        step: number of transitions made, which selects the noise of the next.
    """

    position: Latents
    energy: Tensor
    gradient: Latents
    step: int


class HMCInfo(NamedTuple):
    """What diagnostics need; every tensor has shape ``(N,)``.

    Attributes:
        acceptance_rate: acceptance probability of the proposal (for NUTS: mean over the
            trajectory).
        accepted: whether the chain moved.
        diverging: whether the trajectory diverged.
        energy: Hamiltonian at the new state, in nats, the quantity of the energy diagnostics.
        step_size: step size used.
        num_steps: integrator steps taken, each one gradient.
        tree_depth: doublings made by NUTS; 0 for the others.
        offset: integrator steps from the old state to the new one, int64: negative against time,
            0 for a chain that stayed.
    """

    acceptance_rate: Tensor
    accepted: Tensor
    diverging: Tensor
    energy: Tensor
    step_size: Tensor
    num_steps: Tensor
    tree_depth: Tensor
    offset: Tensor


def init(potential: Potential, position: LatentsLike) -> HMCState:
    """State at ``position``: one gradient."""
    energy, gradient = energy_and_gradient(potential, position)
    return HMCState(lat.detach(position), energy, gradient, 0)


def draw_momentum(
    streams: Streams,
    step: int,
    like: LatentsLike,
    inverse_mass: LatentsLike | None,
    purpose: int = MOMENTUM,
) -> Latents:
    """Momentum from N(0, M), from each image's own stream; sites count on from ``purpose``."""
    momentum = {
        name: streams.normal(step, purpose + number, tuple(value.shape[1:]), value.dtype)
        for number, (name, value) in enumerate(like.items())
    }
    if inverse_mass is None:
        return momentum
    return {name: value * inverse_mass[name].rsqrt() for name, value in momentum.items()}


def energy_error(end: Tensor, start: Tensor) -> Tensor:
    """``end - start``, infinite where ``end`` is not finite.

    That includes minus infinity: a chain that went there would never leave.
    """
    return (end - start).masked_fill(~end.isfinite(), torch.inf)


def accept(
    state: HMCState,
    proposal: Phase,
    start: Tensor,
    end: Tensor,
    streams: Streams,
    step_size: Tensor,
    num_steps: int,
    adjusted: bool = True,
) -> tuple[HMCState, HMCInfo]:
    """The Metropolis test: chains move to ``proposal`` with probability min(1, exp(start - end)).

    ``start`` and ``end`` are the Hamiltonian before and after, ``(N,)``; a kernel's energy error is
    their difference. ``step_size`` and ``num_steps`` are for the record. ``adjusted=False`` leaves
    the test out: every chain moves but those whose energy would not be finite.
    """
    error = energy_error(end, start)
    if adjusted:
        log_uniform = streams.uniform(state.step, _ACCEPT, (), error.dtype).log()
        accepted = log_uniform < -error
    else:
        accepted = error.isfinite()
    info = HMCInfo(
        acceptance_rate=(-error).clamp(max=0.0).exp(),
        accepted=accepted,
        diverging=error > DIVERGENCE_THRESHOLD,
        energy=torch.where(accepted, end, start),
        step_size=step_size,
        num_steps=torch.full_like(step_size, num_steps, dtype=torch.long),
        tree_depth=torch.zeros_like(step_size, dtype=torch.long),
        offset=num_steps * accepted.long(),
    )
    moved = HMCState(
        lat.where(accepted, proposal.position, state.position),
        torch.where(accepted, proposal.energy, state.energy),
        lat.where(accepted, proposal.gradient, state.gradient),
        state.step + 1,
    )
    return moved, info


def trajectory_length(seed: int, step: int, num_steps: int, jitter: float) -> int:
    """Steps of transition ``step``, uniform on (1 - jitter) to (1 + jitter) ``num_steps``.

    A function of seed and transition alone, like all noise of a run; at least 1.
    """
    # Rounded first: 0.7 of 10 below 10 is 3, and not 4 by a unit in the last place.
    low = max(1, math.ceil(round((1 - jitter) * num_steps, 9)))
    high = max(low, math.floor(round((1 + jitter) * num_steps, 9)))
    return random.Random(seed * 2**32 + step).randint(low, high)


def trajectory(
    potential: Potential,
    state: HMCState,
    momentum: Latents,
    step_size: Tensor,
    num_steps: int,
    inverse_mass: LatentsLike | None,
    drift: Drift = integrators.drift,
) -> tuple[Phase, Tensor, Tensor]:
    """``num_steps`` leapfrog steps: where they end, the Hamiltonian before and after, ``(N,)``."""
    phase = Phase(state.position, momentum, state.energy, state.gradient)
    start = state.energy + kinetic_energy(momentum, inverse_mass)
    for number in range(num_steps):
        # Only the last energy is read.
        last = number == num_steps - 1
        phase = leapfrog(potential, phase, step_size, inverse_mass, needs_energy=last, drift=drift)
    return phase, start, phase.energy + kinetic_energy(phase.momentum, inverse_mass)


def step(
    potential: Potential,
    state: HMCState,
    streams: Streams,
    step_size: Tensor,
    num_steps: int,
    inverse_mass: LatentsLike | None = None,
    allowed: Callable[[Latents], Tensor] | None = None,
    drift: Drift = integrators.drift,
) -> tuple[HMCState, HMCInfo]:
    """One transition of every chain: ``num_steps`` gradients.

    Args:
        potential: energy per image.
        state: current state.
        streams: random streams of the chains.
        step_size: per chain ``(N,)``.
        num_steps: leapfrog steps L >= 1, common to the batch and independent of the state.
        inverse_mass: diagonal of M^-1 per site; identity when ``None``.
        allowed: latents to bool ``(N,)``: the set in which chains stay, that of rows for which it
            holds; a proposal outside is rejected, and the target is the density restricted to it.
        drift: of leapfrog steps, as :func:`~pyro_vae_defence.mcmc.integrators.leapfrog` takes it.
    """
    momentum = draw_momentum(streams, state.step, state.position, inverse_mass)
    phase, start, end = trajectory(
        potential, state, momentum, step_size, num_steps, inverse_mass, drift
    )
    if allowed is not None:
        end = end.masked_fill(~allowed(phase.position), torch.inf)
    return accept(state, phase, start, end, streams, step_size, num_steps)
