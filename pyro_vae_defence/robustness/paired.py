r"""Whether one defence leaves more than another: paired differences, image by image.

Two defences that were attacked on the same images are compared by :math:`d_i = m_i - m_i'`, the
difference of what their worst cases leave of image i. Most of what makes figures differ between
images is common to both, so that the mean of :math:`d_i` has a narrower interval than either
figure, and two intervals that overlap say little.

The interval of the mean is bootstrapped over images. Where most of them do not differ, it reaches
as far as images that none of these resembles could move the mean
(:func:`~pyro_vae_defence.metrics.bootstrap_interval`). That is not enough: of 20 classes, 5 that
one defence alone has right give an interval above zero, and so many would be right by chance, in
either direction, in one case of sixteen. Hence a second condition: with random signs of the
:math:`d_i`, which are as likely as the true ones if neither defence is better, a mean at least as
far from zero must be rare.

What an unreliable report says is no more than an upper bound that nobody has tested; whoever
compares reports has to ask them for that.

Reference: Good, "Permutation, parametric and bootstrap tests of hypotheses", 3rd edition, 2005,
section 3.2.1 (one sample, sign changes).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence import metrics
from pyro_vae_defence.defence.store import fingerprint
from pyro_vae_defence.metrics.intervals import drawn_in_parts
from pyro_vae_defence.robustness.budget import effort
from pyro_vae_defence.robustness.report import RobustnessReport
from pyro_vae_defence.robustness.scoring import figure_bounds

_FLIPS, _AT_ONCE, _SIGNS_AT_ONCE = 10_000, 500, 5_000_000


class Difference(NamedTuple):
    """How much more one defence leaves than another.

    Attributes:
        estimate, low, high: mean of the images' differences, and its interval.
        chance: probability of a mean at least as far from zero, were the signs random.
        level: nominal probability that the interval covers the true mean.
        num_images: which both defences were attacked on.
    """

    estimate: float
    low: float
    high: float
    chance: float
    level: float
    num_images: int

    @property
    def told_apart(self) -> bool:
        """Whether the interval excludes zero, and chance is at most one minus the level."""
        return not self.low <= 0.0 <= self.high and self.chance <= 1.0 - self.level


def same_images(report: RobustnessReport, other: RobustnessReport) -> bool:
    """Whether two reports may be of the same images: as many, one at least, and where both reports
    hold them, or else a hash of them, the same ones. Reports of early versions hold none."""
    if not 0 < len(report.per_image) == len(other.per_image):
        return False
    if report.x_ref is not None and other.x_ref is not None:  # whose parts may be others
        return fingerprint(report.x_ref) == fingerprint(other.x_ref)
    return not (report.images and other.images) or report.images == other.images


def paired_difference(
    report: RobustnessReport,
    other: RobustnessReport,
    *,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> Difference:
    """The mean figure of a report's worst cases less that of another's, image by image.

    Args:
        report, other: of two defences, of one VAE or of two, on the same images in the same order.
        level: coverage of the interval, between 0 and 1; with K comparisons 1 - 0.05 / K makes all
            of them right together in 95% of cases.
        generator: of the resampling, on the CPU; torch's global one when ``None``.

    Raises:
        ValueError: for reports of different figures, threat models, budgets (but for their
            ``max_evaluations`` and checks), images or, as far as both hold them, labels or
            conditions, or a level out of range.
    """
    for name in ("figure", "threat_model"):
        pair = getattr(report, name), getattr(other, name)
        if pair[0] != pair[1]:
            raise ValueError(f"reports of different {name} are not compared: {pair[0]}, {pair[1]}")
    efforts = effort(report.budget), effort(other.budget)
    for name, value in efforts[0].items():
        if value != efforts[1][name]:
            raise ValueError(
                f"reports of different budgets are not compared, {name}={value} and "
                f"{efforts[1][name]}: who is attacked less has more left; attack both with one"
            )
    if not same_images(report, other):
        raise ValueError(
            f"reports of different images are not paired, {len(report.per_image)} and "
            f"{len(other.per_image)} of them; evaluate both defences on the same"
        )
    pairs = [("labels", (report.labels, other.labels))]
    pairs += [("conditions", pair) for pair in zip(report.conditions, other.conditions)]
    for name, (one, two) in pairs:
        if one is not None and two is not None and fingerprint(one) != fingerprint(two):
            raise ValueError(
                f"reports of different {name} are not paired; evaluate both defences with the same"
            )
    values = report.per_image.double() - other.per_image.double()
    bounds = figure_bounds(report.figure)
    if bounds is not None:  # differences that are alike, and not equal, speak for themselves
        most_agree = bool((values == values.median()).double().mean() > 0.5)
        bounds = (bounds[0] - bounds[1], bounds[1] - bounds[0]) if most_agree else None
    found = metrics.bootstrap_interval(values, level=level, generator=generator, bounds=bounds)
    chance = sign_flip_chance(values, generator)
    return Difference(found.estimate, found.low, found.high, chance, found.level, found.num_values)


def sign_flip_chance(values: Tensor, generator: torch.Generator | None = None) -> float:
    """Probability that a sum of values ``(N,)`` with random signs is at least as far from zero as
    their own, from 10,000 draws of signs and the own ones."""
    values = values.double()
    # Equal sums count, however the figures were rounded.
    bar = float(values.sum().abs() - 1e-6 * values.abs().sum())
    reached = 1
    at_once = min(_AT_ONCE, _SIGNS_AT_ONCE // len(values))
    for ones in drawn_in_parts(2, (_FLIPS, len(values)), at_once, generator):
        reached += int((((2 * ones - 1).double() @ values).abs() >= bar).sum())
    return reached / (_FLIPS + 1)
