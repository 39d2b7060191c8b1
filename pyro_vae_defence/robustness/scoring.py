"""Figures of images behind a defence, on fresh seeds; nothing here knows an attacker.

What a figure is, and how draws are summarised, :mod:`pyro_vae_defence.robustness.evaluate` says.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from pyro_vae_defence import metrics
from pyro_vae_defence.defence import DefenceResult, DefendedClassifier, NoDefence, Reading
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import class_scores
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.checks import check_finite
from pyro_vae_defence.robustness.whitebox import WhiteBox

Compare: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Fresh:
    """Returns a generator with a seed of its own at every call.

    Attributes:
        seed: that all of them are counted from.
        number: of calls so far.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.number = seed, 0

    def __call__(self) -> torch.Generator:
        """The next one."""
        self.number += 1
        return torch.Generator().manual_seed((self.seed + self.number) % 2**63)


Bounds = tuple[float, float] | None
"""Range of all possible values of a figure, where that is known."""


def figure_bounds(figure: str) -> Bounds:
    """Those of a figure of this name."""
    return (0.0, 1.0) if figure == Accuracy.figure else None


def interval(values: Tensor, generator: torch.Generator, bounds: Bounds = None) -> dict[str, float]:
    """Mean over images of values ``(N,)`` with its 95% bootstrap interval, and their number."""
    found = metrics.bootstrap_interval(values.detach(), generator=generator, bounds=bounds)
    return {**found.to_dict(), "num_images": found.num_values}


def strongest_of(selections: Tensor, num_draws: int) -> Tensor:
    """Which candidate is an image's worst case: numbers ``(N,)`` from figures ``(A, N)``, means of
    so many draws.

    Few draws of a class say little of one image, and candidates tie on many. What a candidate does
    on all images counts as one further draw on each: ties go to who is strongest in general, and
    not to who happens to come first, which would leave more than single attacks do.
    """
    general = selections.mean(1, keepdim=True)
    return ((num_draws * selections + general) / (num_draws + 1)).argmin(0)


class Scores(NamedTuple):
    """Figures of one set of images: per draw ``(S, N)``, and of the draws' mean output ``(N,)``."""

    per_draw: Tensor
    averaged: Tensor

    def mean(self) -> Tensor:
        """Mean figure of each image, ``(N,)``."""
        return self.per_draw.mean(0)

    def summaries(self) -> dict[str, Tensor]:
        """The four summaries of draws that a report has, ``(N,)`` each."""
        return {
            "mean": self.mean(),
            "single": self.per_draw[0],
            "worst_of_n": self.per_draw.amin(0),
            "averaged": self.averaged,
        }

    def choose(self, others: list[Scores], winner: Tensor) -> Scores:
        """The scores of candidate ``winner[i]`` for image i; candidate 0 is this one."""
        every = [self, *others]
        image = torch.arange(len(winner), device=winner.device)
        per_draw = torch.stack([s.per_draw for s in every])[winner, :, image].T
        return Scores(per_draw, torch.stack([s.averaged for s in every])[winner, image])


def worst_case(
    clean: Scores, scores: Sequence[Scores], selections: Tensor, num_draws: int
) -> tuple[Scores, Tensor]:
    """Scores of the worst case, and whose it is: 0 for the clean image, ``k + 1`` for attack k.

    Image by image it is the :func:`strongest_of` the candidates. Where one of these leaves less by
    itself, in the mean over images, it is that one on all images: an attacker need not choose by a
    few draws. So no single attack leaves less than the worst case.

    Args:
        clean, scores: of clean images, and of what each of the attacks has found.
        selections, num_draws: as for :func:`strongest_of`, the clean images first.
    """
    winner = strongest_of(selections, num_draws)
    chosen = clean.choose(list(scores), winner)
    every = [chosen, clean, *scores]
    least = int(torch.stack([each.mean().mean() for each in every]).argmin())
    return every[least], winner if least == 0 else torch.full_like(winner, least - 1)


class Scorer:
    """Runs a defence and says what its outputs are worth; all seeds are fresh.

    Attributes:
        figure, target, reading: what is measured, of which use of the latents, read in which way.
        undefended: figure of the VAE alone without an attack, ``(N,)``.
    """

    figure: str
    target: str
    reading: Reading = "last"
    undefended: Tensor

    def __init__(self, box: WhiteBox, fresh: Fresh) -> None:
        self.defence, self.fresh = box, fresh

    def at(self, rows: slice) -> Scorer:
        """The scorer of the images at ``rows``, in the same stream of seeds."""
        other = copy.copy(self)
        other.defence = self.defence.at(rows)
        return other

    def score(self, x: Tensor, num_draws: int) -> Scores:
        """Run the defence ``num_draws`` times on images that stem from the references; once if its
        seed is known, since it would be the same again."""
        num_draws = num_draws if self.defence.seed is None else 1
        result = self.defence(x.repeat(num_draws, 1, 1, 1), self.fresh())
        scores = self._scores(result, num_draws)
        check_finite(f"the {self.figure}", scores.per_draw.T, "see what is compared there")
        return scores

    def _scores(self, result: DefenceResult, num_draws: int) -> Scores:
        """Figures of runs that were folded into one batch."""
        raise NotImplementedError

    def interval(self, values: Tensor) -> dict[str, float]:
        """As the function of this name, on a seed of its own."""
        return interval(values, self.fresh())

    def of_figure(self, values: Tensor) -> dict[str, float]:
        """The same of values that are figures, not differences of them."""
        return interval(values, self.fresh(), figure_bounds(self.figure))


class Accuracy(Scorer):
    """Whether the class is the label's, by default that predicted undefended."""

    figure, target = "accuracy", "classification"

    def __init__(
        self,
        box: WhiteBox,
        x: Tensor,
        labels: Tensor | None,
        classifier: DefendedClassifier,
        fresh: Fresh,
    ) -> None:
        super().__init__(box, fresh)
        with torch.no_grad():
            scores = class_scores(classifier.classifier, program.posterior_mean(box.vae, x))
        self.classifier, self.reading = classifier, classifier.reading
        self.num_classes = scores.shape[-1]
        if self.num_classes < 2:
            raise ValueError(
                f"classifier must return scores of two or more classes, got {self.num_classes}; "
                "one of two classes with a single logit s is torch.cat([-s, s], -1)"
            )
        if (
            labels is not None
            and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes
        ):
            raise ValueError(
                f"labels must lie in 0..{self.num_classes - 1}, the classes of the classifier, got "
                f"values from {int(labels.min())} to {int(labels.max())}"
            )
        self.labels = scores.argmax(-1) if labels is None else labels
        self.undefended = metrics.correct(scores.argmax(-1), self.labels)

    def at(self, rows: slice) -> Accuracy:
        """As :meth:`Scorer.at`."""
        other = cast(Accuracy, super().at(rows))
        other.labels = self.labels[rows]
        return other

    def _scores(self, result: DefenceResult, num_draws: int) -> Scores:
        log_probs = lat.unfold(self.classifier.log_probabilities(result), num_draws)
        predicted = (each.argmax(-1) for each in log_probs)
        per_draw = torch.stack([metrics.correct(classes, self.labels) for classes in predicted])
        return Scores(per_draw, metrics.correct(log_probs.exp().mean(0).argmax(-1), self.labels))


class Similarity(Scorer):
    """Similarity of reconstructions to the reference's, one undefended draw; the paper's MSSSIM by
    default. Undefended it is the noise floor, that of a second draw."""

    target = "reconstruction"

    def __init__(self, box: WhiteBox, x: Tensor, compare: Compare | None, fresh: Fresh) -> None:
        super().__init__(box, fresh)
        self.figure = "similarity" if compare else metrics.metric_name("ms_ssim", "paper")
        own = functools.partial(_on_copies, compare) if compare else None
        self.compare: Compare = own or functools.partial(metrics.ms_ssim, variant="paper")
        self.reference, again = (NoDefence(box.vae)(x, fresh()).reconstruction for _ in range(2))
        if compare is not None:
            _check_similarity(compare, self.reference)
        self.undefended = self.compare(self.reference, again)

    def at(self, rows: slice) -> Similarity:
        """As :meth:`Scorer.at`."""
        other = cast(Similarity, super().at(rows))
        other.reference = self.reference[rows]
        return other

    def _scores(self, result: DefenceResult, num_draws: int) -> Scores:
        images = lat.unfold(result.reconstruction, num_draws)
        per_draw = torch.stack([self.compare(image, self.reference) for image in images])
        return Scores(per_draw, self.compare(images.mean(0), self.reference))


def _on_copies(compare: Compare, one: Tensor, other: Tensor) -> Tensor:
    """What somebody's function says of images, which it may change."""
    return compare(one.clone(), other.clone())


def _check_similarity(compare: Any, images: Tensor) -> None:
    """``ValueError`` unless it says per image how alike two are, and not how far apart."""
    if not callable(compare):
        raise ValueError(f"similarity must map two batches of images to numbers, got {compare!r}")
    with torch.no_grad():
        same, inverted = (_on_copies(compare, images, other) for other in (images, 1 - images))
    for found in (same, inverted):
        shape = tuple(found.shape) if isinstance(found, Tensor) else None
        if shape != (len(images),) or not found.is_floating_point():
            what = type(found).__name__ if shape is None else f"{found.dtype} of shape {shape}"
            raise ValueError(
                "similarity must return one floating-point number per pair of images, shape "
                f"({len(images)},), got {what}; average over pixels, not over images"
            )
    if bool(inverted.mean() > same.mean()):
        raise ValueError(
            "similarity must be 1 for equal images and less for others, but it is "
            f"{float(same.mean()):.4g} for images and themselves, {float(inverted.mean()):.4g} for "
            "them and their inverse: a distance has to be turned round, such as 1 - distance"
        )


def make_scorer(
    box: WhiteBox,
    x: Tensor,
    labels: Tensor | None,
    classifier: Any,
    compare: Compare | None,
    fresh: Fresh,
) -> Scorer:
    """The accuracy of a ``classifier``, as it comes or behind the defence, or without one the
    similarity."""
    if classifier is None:
        return Similarity(box, x, compare, fresh)
    if not isinstance(classifier, DefendedClassifier):
        classifier = DefendedClassifier(box, classifier, "last")
    return Accuracy(box, x, labels, classifier, fresh)
