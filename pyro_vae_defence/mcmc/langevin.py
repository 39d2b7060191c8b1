r"""Langevin dynamics without a Metropolis test, one independent chain per image: biased.

A step of size :math:`\epsilon` of the overdamped dynamics is

.. math::
    z^* = z - \tfrac{\epsilon^2}{2} M^{-1} \nabla U(z) + \epsilon M^{-1/2} \xi, \qquad
    \xi \sim N(0, 1),

which is HMC with one leapfrog step that is never rejected. **The chain does not sample the
target.** On a Gaussian of variance :math:`\sigma^2` it is an autoregression whose stationary
variance is

.. math:: \frac{\sigma^2}{1 - \epsilon^2 / (4 \sigma^2 M)}

(for :math:`\epsilon^2 < 4 \sigma^2 M`; beyond that it has none), too wide by a share that only
falls as :math:`\epsilon^2`. It serves as a baseline: what the test costs, and what it buys.

With the test it is the Metropolis-adjusted Langevin algorithm (MALA), which is
:func:`pyro_vae_defence.mcmc.hmc.step` with one leapfrog step.

Reference: Roberts, Tweedie, "Exponential convergence of Langevin distributions and their discrete
approximations", Bernoulli, 1996, https://doi.org/10.2307/3318418.
"""

from __future__ import annotations

from torch import Tensor

from pyro_vae_defence.mcmc.hmc import HMCInfo, HMCState, accept, draw_momentum, trajectory
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import LatentsLike, Potential


def step(
    potential: Potential,
    state: HMCState,
    streams: Streams,
    step_size: Tensor,
    inverse_mass: LatentsLike | None = None,
) -> tuple[HMCState, HMCInfo]:
    """One unadjusted step of every chain: one gradient.

    ``acceptance_rate`` is what a Metropolis test would have accepted, a measure of the bias that is
    not corrected; ``accepted`` is true of every chain but those whose energy would not be finite,
    which stay where they are. Arguments as :func:`~pyro_vae_defence.mcmc.hmc.step`.
    """
    momentum = draw_momentum(streams, state.step, state.position, inverse_mass)
    phase, start, end = trajectory(potential, state, momentum, step_size, 1, inverse_mass)
    return accept(state, phase, start, end, streams, step_size, 1, adjusted=False)
