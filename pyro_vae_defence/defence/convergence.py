r"""When has a chain forgotten its start? Split R-hat over replicas, and the drift of the energy.

With C chains per image, each cut into halves of n draws, so that m = 2C sequences with means
:math:`\bar\theta_j` and variances :math:`s_j^2` remain,

.. math::
    W = \frac1m \sum_j s_j^2, \qquad
    B = \frac{n}{m - 1} \sum_j (\bar\theta_j - \bar\theta)^2, \qquad
    \hat R = \sqrt{\frac{n - 1}{n} + \frac{B}{n W}} .

It is read of the energy, and of all latents together: whitened by W, so that every dimension counts
alike, and with B / W averaged over dimensions, since the largest of hundreds of noisy values
exceeds any useful bound by chance. The *drift* is the mean over chains of the difference between
the energy's mean in the second half and in the first, in units of its standard error over chains,
which autocorrelation within a chain does not bias.

Reference: Gelman, Carlin, Stern, Dunson, Vehtari, Rubin, "Bayesian Data Analysis", 3rd edition,
2013, section 11.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence.ops.checks import check_integer, check_within
from pyro_vae_defence.types import LatentsLike

MIN_CHAINS = 4
MIN_DRAWS = 4


@dataclass(frozen=True)
class ConvergenceRule:
    """When an image's chains count as converged.

    The later half of the transitions since warm-up is looked at.

    Args:
        max_r_hat: largest R-hat, of the energy and of the whitened latents, > 1.
        max_drift: largest drift of the energy in standard errors, > 0. With 4 chains a stationary
            one exceeds 3 in 6% of the looks.
        check_every: transitions between two looks, >= 8.
    """

    max_r_hat: float = 1.05
    max_drift: float = 3.0
    check_every: int = 20

    def __post_init__(self) -> None:
        check_within("max_r_hat", self.max_r_hat, "(1, inf)")
        check_within("max_drift", self.max_drift, "(0, inf]")
        check_integer("check_every", self.check_every, 2 * MIN_DRAWS)


class Convergence(NamedTuple):
    """What was seen, per image; every tensor has shape ``(N,)``.

    Attributes:
        converged: whether every bound of the rule was kept.
        r_hat: the larger R-hat of the energy and of the whitened latents.
        energy_drift: drift of the energy, in standard errors; positive where it rises.
        forgotten_after: transitions, warm-up included, before the draws that kept the rule: by then
            the chain had forgotten its start. -1 where it had not converged.
    """

    converged: Tensor
    r_hat: Tensor
    energy_drift: Tensor
    forgotten_after: Tensor


def split_r_hat(draws: Tensor) -> Tensor:
    """Split R-hat of draws ``(chain, draw, *rest)``: shape ``(*rest)``.

    Equal to ``arviz.rhat(..., method="split")``. NaN where nothing moves, and of one chain, whose
    halves may agree on a mode that others do not share.

    Raises:
        ValueError: with fewer than 4 draws.
    """
    found = _r_hat(*_variances(draws))
    return found if draws.shape[0] > 1 else torch.full_like(found, torch.nan)


def _variances(draws: Tensor) -> tuple[Tensor, int]:
    """B / W of the halves of chains, ``(*rest)``, and their number of draws n."""
    if draws.dim() < 2 or draws.shape[1] < MIN_DRAWS:
        raise ValueError(
            f"draws must have shape (chain, draw, ...) with at least {MIN_DRAWS} draws, "
            f"got {tuple(draws.shape)}"
        )
    half = draws.shape[1] // 2
    halves = torch.cat([draws[:, :half], draws[:, -half:]])
    between = half * halves.mean(1).var(0)
    return between / halves.var(1).mean(0), half


def _r_hat(ratio: Tensor, num_draws: int) -> Tensor:
    return ((ratio + num_draws - 1) / num_draws).sqrt()


def energy_drift(energy: Tensor) -> Tensor:
    """Rise of the energy ``(chain, draw, N)`` between halves, in standard errors: ``(N,)``."""
    half = energy.shape[1] // 2
    change = energy[:, -half:].mean(1) - energy[:, :half].mean(1)
    return change.mean(0) / (change.std(0) / change.shape[0] ** 0.5)


def assess(
    energy: Tensor, latents: LatentsLike, rule: ConvergenceRule, first: int = 0
) -> Convergence:
    """Look at the later half of the draws.

    Args:
        energy: potential energies ``(chain, draw, N)`` in nats, of at least 4 chains and 8 draws.
        latents: unconstrained draws, site -> ``(chain, draw, N, *event)``.
        rule: the bounds.
        first: transitions before the first draw.
    """
    num_chains, num_draws = energy.shape[:2]
    if num_chains < MIN_CHAINS:
        raise ValueError(f"convergence needs at least {MIN_CHAINS} chains, got {num_chains}")
    start = num_draws // 2
    ratios = []
    for value in latents.values():
        ratio, half = _variances(value[:, start:])
        ratios.append(ratio.flatten(1) if ratio.dim() > 1 else ratio[:, None])
    of_latents = _r_hat(torch.cat(ratios, 1).mean(1), half)
    r_hat = torch.maximum(split_r_hat(energy[:, start:]), of_latents)
    drift = energy_drift(energy[:, start:])
    # NaN, of chains that do not move, is not converged.
    converged = (r_hat <= rule.max_r_hat) & (drift.abs() <= rule.max_drift)
    forgotten = torch.where(converged, first + start, -1)
    return Convergence(converged, r_hat, drift, forgotten)
