r"""How well a score tells attacked images from others: two error rates and their intervals.

A detector raises the alarm where a score s exceeds a threshold. With scores s of attacked images
(positives) and t of others (negatives), independent of any threshold,

.. math:: \mathrm{AUROC} = P(s > t) + \tfrac12 P(s = t),

the Mann-Whitney statistic: 1 for a perfect detector, 1/2 for a blind one, less where the score
points the wrong way. At the largest threshold that still catches a share :math:`\tau` of the
attacked images, the *false positive rate at TPR* :math:`\tau` is the share of the others that raise
the alarm as well.

Reference: Hanley, McNeil, "The meaning and use of the area under a receiver operating
characteristic (ROC) curve", 1982, https://doi.org/10.1148/radiology.143.1.7063747.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence.metrics.intervals import (
    Interval,
    check_bootstrap,
    resamples,
    tails,
    unseen_reach,
)
from pyro_vae_defence.ops.checks import check_on_device, check_tensor, check_within


def auroc(negatives: Tensor, positives: Tensor) -> Tensor:
    """Probability that an attacked image scores above another one, ties counted half: a float64.

    Args:
        negatives: scores of images that are not attacked, ``(N,)``.
        positives: scores of attacked images, ``(M,)``, high where an attack is suspected.

    Raises:
        ValueError: if an argument is not a vector of scores, or devices differ.
    """
    _check(negatives, positives)
    return _auroc(negatives, positives)


def fpr_at_tpr(negatives: Tensor, positives: Tensor, tpr: float = 0.95) -> Tensor:
    """Share of other images that raise the alarm when at least ``tpr`` of the attacked ones do.

    Scores, result and errors are those of :func:`auroc`; a ``tpr`` outside (0, 1] is an error, too.
    """
    _check(negatives, positives)
    check_within("tpr", tpr, "(0, 1]", "use 0.95 for 95 percent")
    return _fpr_at_tpr(negatives, positives, tpr)


def _auroc(negatives: Tensor, positives: Tensor) -> Tensor:
    """:func:`auroc` of ``(..., N)`` and ``(..., M)``."""
    pairs = negatives.shape[-1] * positives.shape[-1]
    return _twice_in_order(negatives, positives).double() / (2 * pairs)


def _twice_in_order(negatives: Tensor, positives: Tensor) -> Tensor:
    """Two for each pair whose positive scores above, one for each tie: int64 ``(...)``."""
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives)
    not_above = torch.searchsorted(ordered, positives, right=True)
    return (below + not_above).sum(-1)


def _auroc_of_others(negatives: Tensor, positives: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`auroc` of resamples ``rows``, ``(R, N)``, without pairs of an image with itself; the
    same for both ends.

    A resample of one image alone, which has no others, counts as the sample.
    """
    alone = (rows == rows[:, :1]).all(1, keepdim=True)
    rows = torch.where(alone, torch.arange(rows.shape[1], device=rows.device), rows)
    times = torch.zeros_like(rows).scatter_add(1, rows, torch.ones_like(rows)).square()
    own = 2 * (positives > negatives).long() + (positives == negatives).long()
    in_order = _twice_in_order(negatives[rows], positives[rows]) - (times * own).sum(1)
    found = in_order.double() / (2 * (rows.shape[1] ** 2 - times.sum(1)))
    return found, found


def _most_in_order(lower: Tensor, higher: Tensor) -> bool:
    """Whether most of one kind are on the right side of all of the other."""
    above, below = higher > lower.max(), lower < higher.min()
    return bool(above.double().mean() > 0.5) or bool(below.double().mean() > 0.5)


def _fpr_at_tpr(negatives: Tensor, positives: Tensor, tpr: float = 0.95) -> Tensor:
    """:func:`fpr_at_tpr` of ``(..., N)`` and ``(..., M)``."""
    threshold = positives.sort(descending=True).values[..., _caught(positives, tpr) - 1, None]
    return (negatives >= threshold).double().mean(-1)


def _caught(positives: Tensor, tpr: float) -> int:
    """How many of the positives make a share of ``tpr``."""
    # Rounding must not ask for one image more than the share does (0.95 * 20 > 19 in binary).
    return max(math.ceil(tpr * positives.shape[-1] - 1e-9), 1)


def _fpr_of_others(
    negatives: Tensor, positives: Tensor, rows: Tensor, tpr: float = 0.95
) -> tuple[Tensor, Tensor]:
    """:func:`fpr_at_tpr` of resamples ``rows``, ``(R, N)``, where no copy of the image that sets
    the threshold raises the alarm, and where all do."""
    # Of images that tie, the one whose own score is least, whatever their order.
    order = negatives.argsort(stable=True)
    order = order[positives[order].argsort(stable=True)]
    rows, negatives, positives = order.argsort()[rows], negatives[order], positives[order]
    own = rows.sort(descending=True).values[:, _caught(rows, tpr) - 1, None]
    alarms = (negatives[rows] >= positives[own]) & (rows != own)
    return alarms.double().mean(1), (alarms | (rows == own)).double().mean(1)


# Of many resamples at once, of scores that have been checked: for the low and for the high end.
_OF_RESAMPLES: tuple[tuple[Any, Callable[..., tuple[Tensor, Tensor]]], ...] = (
    (auroc, _auroc_of_others),
    (fpr_at_tpr, _fpr_of_others),
)


def detection_interval(
    statistic: Callable[[Tensor, Tensor], Tensor | float],
    negatives: Tensor,
    positives: Tensor,
    level: float = 0.95,
    num_resamples: int = 500,
    generator: torch.Generator | None = None,
) -> Interval:
    """Percentile bootstrap interval of :func:`auroc` or :func:`fpr_at_tpr` over images.

    The two scores of one image mostly say more of each other than those of two images do, and a
    resample pairs images with their own copies twice as often as the sample does with themselves.
    So areas of resamples are over pairs of two images, as the probability that is estimated; the
    estimate is over all, and the interval reaches to it. Likewise, whether the image that sets the
    threshold of a rate raises the alarm itself is a matter of its own pair: none of its copies does
    for the low end of the interval, and all do for the high one.

    Where all resamples agree, as where scores tell all images apart, the bootstrap has no width.
    An area A lets the n // 2 independent pairs of one image before and another after the attack all
    be in order with a probability of at most A^(n // 2), so that both statistics get the interval
    of n // 2 values that agree, as of :func:`~pyro_vae_defence.metrics.bootstrap_interval` with
    bounds. That of an area reaches as far on the side where few images may have been missed, if
    most attacked ones score above all others, or most others below all attacked ones (or, where the
    score points the wrong way, the reverse).

    Args:
        statistic: one of the two, or ``functools.partial(fpr_at_tpr, tpr=0.9)``, which are
            resampled as said above; or another function of negatives and positives, which
            returns one number and is called once per resample.
        negatives, positives: scores of the same images before and after the attack, ``(N,)`` each.
            Images are resampled, both their scores together.
        level, num_resamples, generator: as for ``metrics.bootstrap_interval``.

    Raises:
        ValueError: if lengths differ, images are fewer than two, or an argument is out of range.
    """
    if not callable(statistic):
        raise ValueError(f"statistic must be a function such as metrics.auroc, got {statistic!r}")
    _check(negatives, positives)
    num_images = negatives.shape[0]
    if positives.shape[0] != num_images or num_images < 2:
        raise ValueError(
            f"negatives has {num_images} scores and positives {positives.shape[0]}: pass one of "
            "each for every image, of two images or more"
        )
    check_bootstrap(level, num_resamples, generator)
    negatives, positives = (v.detach().to("cpu", torch.float64) for v in (negatives, positives))
    drawn = resamples(num_images, num_resamples, generator, num_images)
    estimate = float(statistic(negatives, positives))
    kind: Any = statistic
    options: dict[str, Any] = {}
    if isinstance(kind, functools.partial) and not kind.args:
        kind, options = kind.func, kind.keywords
    of_resamples = next((many for one, many in _OF_RESAMPLES if one is kind), None)
    if of_resamples is not None:
        both = zip(
            *(of_resamples(negatives, positives, rows, **options) for rows in drawn), strict=True
        )
        least, most = map(torch.cat, both)
    else:
        found = [
            float(statistic(negatives[rows], positives[rows])) for part in drawn for rows in part
        ]
        least = most = torch.tensor(found, dtype=torch.float64, device="cpu")
    ends = zip((least, most), tails(level), strict=True)
    low, high = (float(torch.quantile(values, tail)) for values, tail in ends)
    if of_resamples is not None:
        reach = functools.partial(unseen_reach, num_units=num_images // 2, level=level)
        if bool((least == least[0]).all()):
            low, farthest = reach(low)
            high = max(high, farthest)
        elif of_resamples is _auroc_of_others and _most_in_order(negatives, positives):
            low = min(low, reach(estimate)[0])
        elif of_resamples is _auroc_of_others and _most_in_order(positives, negatives):
            high = max(high, reach(estimate)[1])
        low, high = min(low, estimate), max(high, estimate)
    return Interval(estimate, low, high, level, num_images, num_images)


def rate_interval(alarms: Tensor, level: float = 0.95) -> Interval:
    """Share of images that raise the alarm, with Wilson's score interval.

    It has a width where none or all of them do, which the bootstrap has not.

    Args:
        alarms: bool ``(N,)``.
        level: nominal coverage, between 0 and 1.

    Raises:
        ValueError: if ``alarms`` is no such vector, or ``level`` is out of range.

    Reference: Wilson, "Probable inference, the law of succession, and statistical inference", 1927,
    https://doi.org/10.1080/01621459.1927.10502953.
    """
    check_tensor("alarms", alarms)
    if alarms.ndim != 1 or alarms.shape[0] == 0 or alarms.dtype != torch.bool:
        raise ValueError(
            f"alarms has shape {tuple(alarms.shape)} and dtype {alarms.dtype}: pass one bool per "
            "image, (N,)"
        )
    check_bootstrap(level, 1, None)
    count = alarms.shape[0]
    rate = float(alarms.double().mean())
    z = float(torch.special.ndtri(tails(level)[1]))
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(rate * (1 - rate) / count + (z / (2 * count)) ** 2) / (1 + z**2 / count)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Interval(rate, low, high, level, count, count)


def _check(negatives: Tensor, positives: Tensor) -> None:
    for name, scores in (("negatives", negatives), ("positives", positives)):
        check_tensor(name, scores)
        if scores.ndim != 1 or scores.shape[0] == 0 or not scores.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(scores.shape)} and dtype {scores.dtype}: "
                "pass one floating-point score per image, (N,)"
            )
        if scores.device.type != "meta" and bool(scores.isnan().any()):
            raise ValueError(f"{name} has scores that are not a number: drop these images first")
    check_on_device("positives", positives, "negatives", negatives.device)
