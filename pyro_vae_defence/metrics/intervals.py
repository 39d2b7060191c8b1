"""Intervals over images by the bootstrap.

From G resampling units (images, or groups of values that belong to one image) draw G with
replacement, many times, and recompute the statistic t. Its quantiles give an interval; BCa moves
the quantile levels to correct the bias and skewness of t. With Phi the normal distribution function
and a tail (1 - level)/2,

    alpha' = Phi(z0 + (z0 + z) / (1 - a (z0 + z))),    z = -+ Phi^{-1}(1 - tail) for low and high,
    z0 = Phi^{-1}(share of resampled t below the estimate, ties counted half),
    a = sum_g d_g^3 / (6 (sum_g d_g^2)^{3/2}),         d_g = average of t_(-h) over h, minus t_(-g),

where t_(-g) leaves unit g out. For the median a = 0: leaving one out says nothing of its skewness.

Values that are all equal, as those of an accuracy of 1, are equal in every resample, and those that
nearly are, as shares of draws, hardly differ in any. That G units miss a share s of all has a
probability of (1 - s)^G, so that with tail p the share is at most

    s = 1 - p^(1/G)

(Clopper, Pearson; about 3.7/G at the level 95%): where the range of values is known, the interval
reaches to where such a share lies at either end of it, t + s (end - t), or further.

Efron, "Better bootstrap confidence intervals", 1987; https://doi.org/10.1080/01621459.1987.10478410
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence.ops.checks import check_generator, check_integer, check_tensor

# Bound the memory, and do not change the draws: a generator's are the same in parts and at once.
_RESAMPLES_AT_ONCE = 256
_VALUES_AT_ONCE = 2_560_000


class Interval(NamedTuple):
    """A statistic over images and its bootstrap interval.

    >>> f"{Interval(0.9712, 0.962, 0.98, 0.95, 100, 50):.2f}"
    '0.97 [0.96, 0.98]'
    """

    estimate: float
    """The statistic of all values."""
    low: float
    high: float
    level: float
    """Nominal probability that the interval covers the true value."""
    num_values: int
    num_groups: int
    """Independent units: equal to ``num_values`` without groups."""

    def to_dict(self) -> dict[str, float]:
        """Estimate, low and high by name, as result files hold them."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high}

    def __format__(self, spec: str) -> str:
        """The three numbers in the format of a number; without one, like ``str``."""
        if not spec:
            return str(self)
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap_interval(
    values: Tensor,
    groups: Tensor | None = None,
    level: float = 0.95,
    num_resamples: int = 2000,
    statistic: str = "mean",
    generator: torch.Generator | None = None,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """BCa bootstrap interval of a mean or median over images, in float64 on the CPU.

    Attacks restarted on one image are not independent: pass the image's index as ``groups``, and
    whole images are resampled. Values that are all equal (an accuracy of 0 or 1), or nearly, give a
    mean an interval of no or hardly any width, which understates the uncertainty, unless ``bounds``
    says how far others may lie.

    Args:
        values: one value per image, shape ``(N,)``, finite.
        groups: integers of shape ``(N,)``; values with the same one are resampled together.
        level: nominal coverage, between 0 and 1. With 50 units BCa is a percent or two short.
        num_resamples: bootstrap samples.
        statistic: ``"mean"`` or ``"median"``, of the values (a larger group weighs more).
        generator: randomness, on the CPU; the global one by default.
        bounds: range of values that are possible, (0, 1) for accuracies; for means only.

    Raises:
        ValueError: values outside of ``bounds``, empty, non-finite or non-vector values, fewer than
            two groups, groups of another shape or dtype, or a level, number of resamples or
            statistic out of range.
    """
    check_tensor("values", values)
    if values.is_complex():
        raise ValueError(f"values has dtype {values.dtype}: pass real numbers")
    if values.ndim != 1 or values.shape[0] == 0:
        raise ValueError(f"values has shape {tuple(values.shape)}: pass one value per image, (N,)")
    if count := int((~torch.isfinite(values)).sum()):
        raise ValueError(f"values has {count} non-finite entries: report and drop them first")
    groups = torch.arange(len(values), device="cpu") if groups is None else groups
    check_tensor("groups", groups)
    if groups.shape != values.shape or groups.is_floating_point():
        raise ValueError(
            f"groups has shape {tuple(groups.shape)} and dtype {groups.dtype}: "
            f"pass {len(values)} integers, one per value"
        )
    check_bootstrap(level, num_resamples, generator)
    if statistic not in ("mean", "median"):
        raise ValueError(f"statistic={statistic!r} is unknown: choose 'mean' or 'median'")
    sample = values.detach().to("cpu", torch.float64)
    if bounds is not None:
        _check_bounds(bounds, sample, statistic)
    unit = torch.unique(groups.cpu(), return_inverse=True)[1]
    num_units = int(unit.max()) + 1
    if num_units < 2:
        raise ValueError("values come from one image or group: an interval needs two or more")

    of_weighted = _weighted_mean if statistic == "mean" else _weighted_median
    estimate = of_weighted(sample, torch.ones_like(sample)[None])
    parts = []
    for drawn in resamples(num_units, num_resamples, generator, len(sample)):
        # A resample is a count per unit.
        ones = torch.ones_like(drawn, dtype=sample.dtype)
        counts = torch.zeros_like(ones).scatter_add_(1, drawn, ones)
        parts.append(of_weighted(sample, counts[:, unit]))
    resampled = torch.cat(parts)
    acceleration = _acceleration_of_mean(sample, unit, num_units) if statistic == "mean" else 0.0
    low, high = torch.quantile(resampled, _bca_levels(resampled, estimate, acceleration, level))
    if bounds is not None:
        least, most = unseen_reach(float(estimate), num_units, level, bounds)
        low, high = min(float(low), least), max(float(high), most)
    return Interval(float(estimate), float(low), float(high), level, len(sample), num_units)


def resamples(
    num_units: int, num_resamples: int, generator: torch.Generator | None, num_values: int
) -> Iterator[Tensor]:
    """Units drawn with replacement, ``(some, num_units)``, for all resamples in parts of so many
    that ``num_values`` for each of them fit into memory."""
    at_once = min(_RESAMPLES_AT_ONCE, _VALUES_AT_ONCE // num_values)
    return drawn_in_parts(num_units, (num_resamples, num_units), at_once, generator)


def drawn_in_parts(
    high: int, shape: tuple[int, int], at_once: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Integers below ``high``, ``(at_once, shape[1])`` at a time, or a row; those of one draw."""
    num_rows, at_once = shape[0], max(1, at_once)
    for start in range(0, num_rows, at_once):
        part = (min(at_once, num_rows - start), shape[1])
        yield torch.randint(high, part, generator=generator, device="cpu")


def unseen_reach(
    value: float, num_units: int, level: float = 0.95, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """How far a mean reaches to either bound if the largest share that so many units may have
    missed lies there: where all agree, the ends of an exact interval."""
    share = 1 - float(tails(level)[0]) ** (1 / num_units)
    low, high = (value + share * (end - value) for end in bounds)
    return low, high


def _check_bounds(bounds: tuple[float, float], sample: Tensor, statistic: str) -> None:
    pair = isinstance(bounds, Sequence) and len(bounds) == 2
    if not (pair and all(isinstance(end, numbers.Real) for end in bounds)):
        raise ValueError(f"bounds must be two numbers, such as (0, 1), got {bounds!r}")
    if statistic != "mean":
        raise ValueError(f"bounds are for a mean, got statistic={statistic!r}; leave them out")
    low, high = bounds
    if not low <= float(sample.min()) <= float(sample.max()) <= high:
        raise ValueError(
            f"values lie between {float(sample.min()):g} and {float(sample.max()):g}, beyond "
            f"bounds={bounds}; pass the range of all possible values"
        )


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return weights @ values / weights.sum(dim=1)


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Median of values repeated ``weights`` times; the middle two are averaged as usual."""
    ordered, order = values.sort()
    upto = weights[:, order].cumsum(dim=1)
    half = upto[:, -1:] / 2
    lower = torch.searchsorted(upto, half)  # first value with at least half at or below it
    upper = torch.searchsorted(upto, half, right=True)  # first with more than half
    return (ordered[lower] + ordered[upper]).squeeze(1) / 2


def _acceleration_of_mean(values: Tensor, unit: Tensor, num_units: int) -> Tensor:
    def total(per_value: Tensor) -> Tensor:
        return values.new_zeros(num_units).index_add(0, unit, per_value)

    sums, counts = total(values), total(torch.ones_like(values))
    left_out = (sums.sum() - sums) / (counts.sum() - counts)
    deviation = left_out.mean() - left_out
    # Its unit cancels, and might overflow or vanish in a cube.
    deviation = deviation / deviation.abs().max().clamp(min=torch.finfo(values.dtype).tiny)
    scale = deviation.square().sum() ** 1.5
    return torch.where(scale > 0, deviation.pow(3).sum() / (6 * scale), 0.0)


def _bca_levels(
    resampled: Tensor, estimate: Tensor, acceleration: Tensor | float, level: float
) -> Tensor:
    below = (resampled < estimate).double().mean() + (resampled == estimate).double().mean() / 2
    # All resamples on one side would send z0 to infinity; half a resample is the finest share seen.
    finest = 0.5 / resampled.shape[0]
    z0 = torch.special.ndtri(below.clamp(finest, 1 - finest))
    z = z0 + torch.special.ndtri(tails(level))
    return torch.special.ndtr(z0 + z / (1 - acceleration * z))


def tails(level: float) -> Tensor:
    """Levels of the two quantiles between which a share ``level`` lies, float64 ``(2,)``."""
    levels = [(1 - level) / 2, (1 + level) / 2]
    return torch.tensor(levels, dtype=torch.float64, device="cpu")


def check_bootstrap(level: float, num_resamples: int, generator: torch.Generator | None) -> None:
    """``ValueError`` unless the options of a bootstrap interval are in range."""
    check_generator(generator)
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"generator is on {generator.device}, but images are resampled on the CPU; pass "
            "torch.Generator()"
        )
    if not (isinstance(level, numbers.Real) and 0 < float(level) < 1):
        raise ValueError(f"level={level!r} must lie between 0 and 1: use 0.95 for 95 percent")
    check_integer("num_resamples", num_resamples)
