"""Did the latents fall out of the reference's posterior, and does the defence bring them back?

The log posterior ratio (paper, equations 11 and 62) compares two latents as explanations of one
reference image. The evidence p(x) cancels, so the potential U(z) = -log p(x, z) of the conditioned
model suffices::

    log PR(z_1, z_2) = log p(z_1 | x) - log p(z_2 | x) = U(z_2) - U(z_1).

The two-sample Kolmogorov-Smirnov test (paper, C.1) asks whether ratios before and after the defence
have one distribution. Its statistic is ``D = sup_t |F_a(t) - F_b(t)|``, F the empirical
distribution functions of n and m values. Under the null hypothesis every interleaving of the two
samples is equally likely; an interleaving is a lattice path from (0, 0) to (n, m), and the p-value
is the share of paths that reach ``|i/n - j/m| >= D`` somewhere. Path counting gives it exactly,
here as a probability: with Q(i, j) the chance that a random path to (i, j) has reached it::

    Q(i, j) = 1 where |i/n - j/m| >= D, else  i/(i+j) Q(i-1, j) + j/(i+j) Q(i, j-1).

Hodges, "The significance probability of the Smirnov two-sample test", 1958;
https://doi.org/10.1007/BF02589501
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import check_on_device, check_per_row, check_tensor
from pyro_vae_defence.types import LatentsLike, Potential


@public
def log_posterior_ratio(
    potential: Potential, latents_1: LatentsLike, latents_2: LatentsLike
) -> Tensor:
    """Difference log p(z_1 | x) - log p(z_2 | x) per image, ``(N,)`` in nats (paper, equation 11).

    In the paper z_1 encodes the reference, z_2 the attacked image: low is good for the defence.

    Args:
        potential: energy of the model conditioned on the *reference* images.
        latents_1, latents_2: latents of ``N`` rows, of the same sites and shapes.

    Raises:
        ValueError: sites, shapes or devices differ between the two, or ``potential`` does not
            return one number per row.
    """
    shapes_1, shapes_2 = ({n: tuple(v.shape) for n, v in z.items()} for z in (latents_1, latents_2))
    if shapes_1 != shapes_2:
        raise ValueError(
            f"latents_2 has sites {shapes_2} but latents_1 has {shapes_1}: "
            "pass latents of one model for the same images"
        )
    for name, value in latents_2.items():
        check_on_device(
            f"latents_2[{name!r}]", value, f"latents_1[{name!r}]", latents_1[name].device
        )
    energy_1, energy_2 = potential(dict(latents_1)), potential(dict(latents_2))
    for energy in (energy_1, energy_2):
        check_per_row("potential", energy, len(next(iter(latents_1.values()))))
    return energy_2 - energy_1


class KSTest(NamedTuple):
    """Result of :func:`ks_test`."""

    statistic: float
    """Largest distance between the two empirical distribution functions, in [0, 1]."""
    p_value: float
    """Probability of at least this distance if both samples have one continuous distribution."""


def ks_test(a: Tensor, b: Tensor) -> KSTest:
    """Two-sample, two-sided Kolmogorov-Smirnov test with its exact p-value (paper, C.1).

    The p-value assumes independent values, within each sample and between them. Restarts on one
    image are dependent, and so are ratios of one image before and after a defence: then read the
    statistic as a distance and take intervals from
    :func:`~pyro_vae_defence.metrics.intervals.bootstrap_interval`. With ties it is conservative.
    Cost grows as n (n + m): a second or two for 10,000 values each.

    Args:
        a, b: values, shapes ``(n,)`` and ``(m,)``.

    Raises:
        ValueError: a sample is empty, not a vector or contains NaN.
    """
    first, second = _sorted_sample("a", a), _sorted_sample("b", b)
    n, m = first.size, second.size
    values = np.concatenate([first, second])
    below = (np.searchsorted(sample, values, side="right") for sample in (first, second))
    # Distances in units of 1/(n m) are integers: no rounding decides whether a path touches.
    distance = int(np.abs(next(below) * m - next(below) * n).max())
    return KSTest(distance / (n * m), _probability_of_distance(distance, n, m))


def _probability_of_distance(distance: int, n: int, m: int) -> float:
    """Q(n, m) for the bound ``distance / (n m)``, by diagonals i + j = length."""
    i = np.arange(n + 1)
    reached = np.ones(n + 1)  # reached[i] = Q(i, length - i); D = 0 is reached at the start
    reached[0] = float(distance <= 0)
    for length in range(1, n + m + 1):
        j = length - i
        from_left = np.concatenate([[0.0], reached[:-1]])
        mixed = (i * from_left + j * reached) / length
        touches = np.abs(i * m - j * n) >= distance
        # Off the lattice (j < 0, where it stays 1, or j > m) no entry has weight in one on it.
        reached = np.where(touches, 1.0, mixed)
    return float(reached[n])


def _sorted_sample(name: str, sample: Tensor) -> np.ndarray:
    check_tensor(name, sample)
    if sample.ndim != 1 or sample.shape[0] == 0:
        raise ValueError(f"{name} has shape {tuple(sample.shape)}: pass a vector with values")
    values = np.sort(sample.detach().cpu().double().numpy())
    if np.isnan(values).any():
        raise ValueError(f"{name} contains NaN: drop or repair these values first")
    return values
