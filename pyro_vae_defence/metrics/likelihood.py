"""Estimates of the marginal likelihood log p(x), one value per image, in nats.

*Importance sampling* from the guide (the paper's NLL, with K = 1000), z_k ~ q(z | x):

    log p(x) ~ log (1/K) sum_k w_k,    log w_k = log p(x, z_k) - log q(z_k | x).

*Annealed importance sampling* starts at the guide and moves along pi_b, proportional to
q(z | x)^{1-b} p(x, z)^b, at inverse temperatures 0 = b_0 < ... < b_K = 1:

    log w = sum_k (b_k - b_{k-1}) [log p(x, z_{k-1}) - log q(z_{k-1} | x)],  z_k ~ T_k(. | z_{k-1}),

where T_k leaves pi_{b_k} invariant. In both, E[w] = p(x), so the average of log w is a lower bound
of log p(x), in expectation. The same walk with falling temperatures, from an *exact* sample of
p(z | x) and with reversible T_k, gives E[1/w] = 1/p(x), an upper bound. Exact posterior samples
exist for simulated data: draw z from the prior and x from p(x | z). The two bounds then bracket
log p(x) (bidirectional Monte Carlo).

Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", 2016;
https://arxiv.org/abs/1509.00519
Neal, "Annealed importance sampling", 2001; https://arxiv.org/abs/physics/9803008
Grosse, Ghahramani, Adams, "Sandwiching the marginal likelihood using bidirectional Monte Carlo",
2015; https://arxiv.org/abs/1511.02543
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import (
    check_integer,
    check_per_row,
    check_positive,
    check_tensor,
)
from pyro_vae_defence.types import Latents, LatentsLike, Potential

Transition: TypeAlias = Callable[[Latents, Potential, int], Latents]
"""``(latents, potential, step) -> latents``: moves every row, leaving exp(-potential) invariant.

``step`` counts from 0, for a step size that depends on it. It must not depend on the states
visited, which would break the invariance: tune it on another run.
"""


@public
@torch.no_grad()
def importance_nll(
    sample_and_weight: Callable[[int], Tensor], num_samples: int = 1000, chunk: int = 100
) -> Tensor:
    """-log p(x) per image by importance sampling (the paper's NLL), summed as a stream.

    ``(N,)``, in nats, without gradient: an upper bound in expectation, tighter for more samples.

    Args:
        sample_and_weight: for k, draws k latents per image from the proposal and returns
            log p(x, z) - log q(z | x), shape ``(k, N)``. Draws of different calls are independent.
        num_samples: K, positive; 1000 in the paper.
        chunk: the largest k asked for at once, positive; bounds the memory.

    Raises:
        ValueError: a number is not positive, or the weights do not have ``k`` rows.
    """
    check_integer("num_samples", num_samples)
    check_integer("chunk", chunk)
    sums: list[Tensor] = []  # per call, in logarithms
    for start in range(0, num_samples, chunk):
        rows = min(chunk, num_samples - start)
        log_weights = sample_and_weight(rows)
        check_tensor("what sample_and_weight returns", log_weights)
        if log_weights.ndim != 2 or log_weights.shape[0] != rows:
            raise ValueError(
                f"sample_and_weight({rows}) has shape {tuple(log_weights.shape)}: "
                f"return log-weights of shape ({rows}, N), one per sample and image"
            )
        if sums and log_weights.shape[1] != len(sums[0]):
            raise ValueError(
                f"sample_and_weight({rows}) has log-weights of {log_weights.shape[1]} images, "
                f"before of {len(sums[0])}: return them of the same images in every call"
            )
        sums.append(log_weights.logsumexp(dim=0))
    return math.log(num_samples) - torch.stack(sums).logsumexp(dim=0)


@public
@torch.no_grad()
def ais(
    potential: Potential,
    log_q: Callable[[Latents], Tensor],
    initial: LatentsLike,
    transition: Transition,
    schedule: Tensor | Sequence[float],
) -> Tensor:
    """Log-weights of annealed importance sampling, one chain per row, in nats, without gradient.

    Each result is log w with a rising schedule and ``initial`` drawn from q, and -log w with a
    falling schedule, ``initial`` drawn from p(z | x) and a reversible ``transition``. Several
    chains per image are rows of ``initial``::

        lower = log_mean_exp(ais(potential, log_q, from_guide, transition, schedule).view(M, N))
        upper = -log_mean_exp(ais(potential, log_q, from_posterior, transition, falling).view(M, N))

    Args:
        potential: U(z) = -log p(x, z) in nats, *including* the constant.
        log_q: log q(z | x), latents of ``N`` rows to ``(N,)``, normalised.
        initial: latents of ``N`` rows.
        transition: called with the annealed potential -(1-b) log q - b log p once per inner
            temperature; it runs without gradient and opens ``torch.enable_grad()`` if it needs one.
        schedule: inverse temperatures, strictly rising from 0 to 1 or falling from 1 to 0.

    Raises:
        ValueError: the schedule does not run from one end to the other, ``potential`` or ``log_q``
            does not return one number per row, or ``transition`` no such latents as it was given.
    """
    temperatures = check_schedule(schedule)
    latents = dict(initial)
    shapes = {name: value.shape for name, value in latents.items()}
    num_rows = len(next(iter(latents.values())))

    def log_ratio() -> Tensor:
        energy, log_density = potential(latents), log_q(latents)
        for name, value in (("potential", energy), ("log_q", log_density)):
            check_per_row(name, value, num_rows)
        return -energy - log_density

    def annealed(temperature: float, latents: Latents) -> Tensor:
        return temperature * potential(latents) - (1 - temperature) * log_q(latents)

    log_weights = (temperatures[1] - temperatures[0]) * log_ratio()
    for step, (now, following) in enumerate(itertools.pairwise(temperatures[1:])):
        latents = transition(latents, functools.partial(annealed, now), step)
        # Fewer rows would be taken for copies in a plate.
        if not isinstance(latents, Mapping) or shapes != {n: v.shape for n, v in latents.items()}:
            raise ValueError(
                f"transition must return latents of the sites and shapes that it was given, "
                f"{ {name: tuple(shape) for name, shape in shapes.items()} }, got {latents!r:.100}"
            )
        log_weights = log_weights + (following - now) * log_ratio()
    return log_weights


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Log of the average weight over the first dimension: ``(M, N)`` to ``(N,)``.

    Raises:
        ValueError: if there is no weight.
    """
    check_tensor("log_weights", log_weights)
    if log_weights.ndim == 0 or log_weights.shape[0] == 0:
        raise ValueError(
            f"log_weights has shape {tuple(log_weights.shape)}: pass (M, N), one row or more"
        )
    return log_weights.logsumexp(dim=0) - math.log(log_weights.shape[0])


def sigmoid_schedule(num_steps: int, steepness: float = 4.0) -> Tensor:
    """Rising inverse temperatures that move slowly at both ends, where the weights vary most.

    b_k is the logistic function on an even grid of [-steepness, steepness], rescaled to [0, 1] (Wu,
    Burda, Salakhutdinov, Grosse, "On the quantitative analysis of decoder-based generative models",
    2017; https://arxiv.org/abs/1611.04273). ``.flip(0)`` falls.

    Shape ``(num_steps + 1,)``, float64, from exactly 0 to exactly 1.

    Args:
        num_steps: K, positive.
        steepness: positive; near 0 the schedule is linear.

    Raises:
        ValueError: an argument is not positive, or temperatures agree to the last digit.
    """
    check_integer("num_steps", num_steps)
    check_positive("steepness", steepness)
    ends = -steepness, steepness
    grid = torch.linspace(*ends, num_steps + 1, dtype=torch.float64, device="cpu")
    logistic = grid.sigmoid()
    if not bool((logistic.diff() > 0).all()):
        raise ValueError(
            f"steepness={steepness!r} leaves no difference between temperatures in float64; use "
            "one between 0.001 and 30"
        )
    return (logistic - logistic[0]) / (logistic[-1] - logistic[0])


def check_schedule(schedule: Tensor | Sequence[float]) -> list[float]:
    """The inverse temperatures, or a ``ValueError`` unless they run from one end to the other."""
    try:
        temperatures = [float(value) for value in schedule]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"schedule must be inverse temperatures, such as sigmoid_schedule(100), got "
            f"{schedule!r:.100}"
        ) from error
    steps = [following - now for now, following in itertools.pairwise(temperatures)]
    rising = temperatures[:1] == [0.0] and temperatures[-1:] == [1.0] and all(s > 0 for s in steps)
    falling = temperatures[:1] == [1.0] and temperatures[-1:] == [0.0] and all(s < 0 for s in steps)
    if not (rising or falling):
        raise ValueError(
            f"schedule={temperatures[:3]}..{temperatures[-1:]} must run strictly from 0 to 1, or "
            "from 1 to 0: use sigmoid_schedule(num_steps)"
        )
    return temperatures
