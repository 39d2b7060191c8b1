"""Annealed importance sampling with this library's HMC: the wiring of ``metrics.ais`` and
``mcmc.hmc``.

The metric is the guide's own variance at the image, so that the walk starts at a round Gaussian.
Step sizes differ by temperature and chain; a transition must not depend on the states it visits, so
that they are tuned on a pilot walk and then frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence import metrics
from pyro_vae_defence.mcmc import hmc
from pyro_vae_defence.mcmc.integrators import energy_and_gradient
from pyro_vae_defence.models import program
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import VAE, Latents, LatentsLike, Potential

TARGET_ACCEPTANCE = 0.8
# Change of the log step size per temperature for an acceptance rate wrong by one.
_GAIN = 0.3


@dataclass(eq=False)
class HMCTransition:
    """One HMC transition per temperature, a :data:`pyro_vae_defence.metrics.Transition`.

    Args:
        streams: random streams of the rows.
        step_size: per temperature and row, ``(K - 1, N)``, or one for all, ``(N,)``.
        num_steps: leapfrog steps L >= 1, each one gradient; one more starts the transition.
        inverse_mass: diagonal of M^-1 per site; identity when ``None``.
        tune: a pilot walk: every row moves its step size towards an acceptance rate of 0.8, which
            makes the weights worthless and the step sizes useful.

    Attributes:
        acceptance_rates: one tensor ``(N,)`` per temperature visited.
        step_sizes: the step sizes used, likewise.
    """

    streams: Streams
    step_size: Tensor
    num_steps: int = 4
    inverse_mass: LatentsLike | None = None
    tune: bool = False
    acceptance_rates: list[Tensor] = field(default_factory=list, init=False)
    step_sizes: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.num_steps >= 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1")

    def __call__(self, latents: Latents, potential: Potential, step: int) -> Latents:
        """Move every row once, leaving exp(-potential) invariant."""
        size = self.step_size if self.step_size.dim() == 1 else self.step_size[step]
        state = hmc.HMCState(latents, *energy_and_gradient(potential, latents), step)
        state, info = hmc.step(
            potential, state, self.streams, size, self.num_steps, self.inverse_mass
        )
        self.acceptance_rates.append(info.acceptance_rate)
        self.step_sizes.append(size)
        if self.tune:
            self.step_size = size * (_GAIN * (info.acceptance_rate - TARGET_ACCEPTANCE)).exp()
        return state.position


class AISResult(NamedTuple):
    """Log-weights of a walk and what tells whether it went well.

    Attributes:
        log_weights: ``(num_chains, N)``, in nats.
        acceptance_rate: average over temperatures and chains, ``(N,)``.
    """

    log_weights: Tensor
    acceptance_rate: Tensor

    @property
    def nll(self) -> Tensor:
        """-log p(x) per image, ``(N,)``, in nats: an upper bound in expectation."""
        return -metrics.log_mean_exp(self.log_weights)


def guide_variance(vae: VAE, x: Tensor) -> Latents | None:
    """The guide's variance per image as a metric, ``None`` where latents are constrained."""
    if program.potential(vae, x).transforms:
        return None
    with torch.no_grad(), program.evaluation_mode(vae):
        return {name: q.variance.detach() for name, q in program.posterior(vae, x).items()}


def ais(
    vae: VAE,
    x: Tensor,
    schedule: Tensor | Sequence[float] | None = None,
    num_chains: int = 4,
    num_steps: int = 4,
    step_size: float = 0.5,
    initial: LatentsLike | None = None,
    generator: torch.Generator | None = None,
) -> AISResult:
    """Annealed importance sampling from the guide with tuned HMC.

    Args:
        vae: any Pyro VAE.
        x: images ``(N, C, H, W)``.
        schedule: three or more inverse temperatures; by default 100 of
            :func:`pyro_vae_defence.metrics.sigmoid_schedule`.
        num_chains: independent chains per image.
        num_steps: leapfrog steps per temperature.
        step_size: where tuning starts, in units of the metric.
        initial: exact posterior draws for a falling schedule, ``num_chains * N`` rows.
        generator: source of randomness; torch's global seed when ``None``.
    """
    schedule = metrics.sigmoid_schedule(100) if schedule is None else torch.as_tensor(schedule)
    if len(schedule) < 3:
        why = "pass three or more, or use metrics.nll, which needs no walk"
        raise ValueError(f"schedule has {len(schedule)} temperatures: {why}")
    rising = bool(schedule[0] < schedule[-1])
    variance = guide_variance(vae, x.repeat(num_chains, 1, 1, 1))

    def walk(
        step_sizes: Tensor, temperatures: Tensor, start: LatentsLike | None, tune: bool = False
    ) -> tuple[HMCTransition, Tensor]:
        streams = Streams.create(len(x), num_chains, generator=generator, device=x.device)
        transition = HMCTransition(streams, step_sizes, num_steps, variance, tune)
        log_weights = metrics.ais_log_weights(
            vae, x, transition, temperatures, num_chains, start, generator
        )
        return transition, log_weights

    # The pilot starts at the guide: step sizes that knew `initial` would bias the walk from it.
    start = x.new_full((num_chains * len(x),), step_size)
    pilot, _ = walk(start, schedule if rising else schedule.flip(0), None, tune=True)
    step_sizes = torch.stack(pilot.step_sizes)
    transition, log_weights = walk(step_sizes if rising else step_sizes.flip(0), schedule, initial)
    acceptance = torch.stack(transition.acceptance_rates).mean(0).view(num_chains, len(x)).mean(0)
    return AISResult(log_weights, acceptance)
