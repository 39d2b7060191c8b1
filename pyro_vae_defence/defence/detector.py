r"""An alarm whose rate on clean images is set beforehand, from any score of suspicion.

With scores :math:`s_1, \dots, s_n` of clean images that the threshold is *calibrated* on (split
conformal prediction), and a wanted rate of false alarms :math:`\alpha`, the alarm is raised where

.. math:: s > s_{(k)}, \qquad k = \lceil (n + 1)(1 - \alpha) \rceil,

the k-th smallest of them, or, which is the same, where the *p-value*
:math:`p = (1 + \#\{i : s_i \ge s\}) / (n + 1)` is at most :math:`\alpha`.

What that guarantees: if a new image is exchangeable with the calibration images, as one drawn from
the same source is that none of them was chosen for, then it raises the alarm with a probability of
at most :math:`\alpha`, whatever the score; with ties among scores less. Scores that depend on a
chain's noise are covered too, since every image has noise of its own, as long as the seed is fresh
at every call; not covered are kernels that couple the images of a batch, as the paper's preset
does. The probability is over calibration and new images together: given *these* calibration images
the rate varies around it, by about :math:`\sqrt{\alpha (1 - \alpha) / n}`.

What it does not: the VAE's own training images are explained better than new ones, hence are no
calibration images; images of another source, or of a class that was not among them, may raise the
alarm more often; nothing is said of how many attacks are caught, least of all of attackers who know
the detector and keep its score low while they attack.

**Which score.** ``energy_drop`` where the defence assumes a perturbation, else ``start_error``,
unless another is asked for. Both are fixed beforehand, because no rule that sees clean images and
random noise alone was found to choose better: the score that noise moves least is one that attacks
move little as well, and the one that noise moves most, the energy at the start, is the one that
tells noise and attacks apart worst on MNIST. On MNIST and Fashion-MNIST the two were the best or
near the best of their defences against the paper's attack, judged by clean images and by noise
alike. That is a choice between aims: where few alarms at mere noise do not matter, the energies may
catch more. :meth:`Detector.report` measures all scores against both; whoever chooses one by such a
table measures it again on other images.

Two scores of :mod:`pyro_vae_defence.defence.least_energy` have another purpose, to reject what is
far from the data without giving attackers a means to have good images rejected: with
``anchor_energy`` and ``least_energy`` the rate of false alarms holds for attacked images, too.

References: Vovk, Gammerman, Shafer, "Algorithmic learning in a random world", 2005; Bates, Candes,
Lei, Romano, Sesia, "Testing for outliers with conformal p-values", 2023,
https://arxiv.org/abs/2104.08279.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_vae_defence import metrics
from pyro_vae_defence.attacks.noise import random_noise
from pyro_vae_defence.defence.base import BaseDefence, Defence, check_defence, runs
from pyro_vae_defence.defence.detection import (
    check_variance,
    detection_scores,
    score_names,
)
from pyro_vae_defence.defence.least_energy import (
    ENERGY_SCORES,
    calibrate_energies,
    energy_score_names,
    energy_scores,
    infinite_if_unknown,
)
from pyro_vae_defence.defence.store import fingerprint
from pyro_vae_defence.metrics.intervals import Interval, check_bootstrap
from pyro_vae_defence.models.conditions import fold, split
from pyro_vae_defence.models.modules import networks_of
from pyro_vae_defence.models.program import check_images
from pyro_vae_defence.ops import html
from pyro_vae_defence.ops.balls import Ball, check_ball
from pyro_vae_defence.ops.checks import check_on_device, check_within, is_integer
from pyro_vae_defence.ops.files import write_atomically
from pyro_vae_defence.types import ImagesLike, LatentsLike

_Score = TypeVar("_Score")


@dataclass(eq=False, repr=False)
class Detector:
    """Raises the alarm where what a defence reveals of an image is unlike clean images.

    Args:
        defence: any defence or control.
        score_name: one of :func:`~pyro_vae_defence.defence.detection_scores`, or, of a defence that
            assumes a perturbation in a ball, ``"anchor_energy"`` or ``"least_energy"`` of
            :mod:`~pyro_vae_defence.defence.least_energy`, which need no run of the defence;
            ``None`` for the default of the module's text.
        variance: unit of distances, see there; the VAE's ``mean_posterior_variance`` when ``None``,
            where it has one, else 1.

    Attributes:
        threshold: the alarm is raised by scores above it; set by :meth:`fit`.
        false_alarm: largest probability of a false alarm, set by :meth:`fit`.
        clean_scores: scores of the calibration images, ascending, ``(n,)``; set by :meth:`fit`. For
            ``anchor_energy`` and ``least_energy`` these assume no perturbation.

    Raises:
        ValueError: if an argument is not what it should be, or the defence has no such score.

    Example:
        >>> from pyro_vae_defence.defence import PosteriorModeDefence
        >>> from pyro_vae_defence.models import ConvVAE
        >>> detector = Detector(PosteriorModeDefence(ConvVAE(), num_steps=2))
        >>> detector = detector.fit(torch.rand(19, 1, 28, 28), false_alarm=0.05)
        >>> detector.predict(torch.zeros(3, 1, 28, 28)).dtype
        torch.bool
    """

    defence: Defence
    score_name: str | None = None
    variance: LatentsLike | None = None

    def __post_init__(self) -> None:
        check_defence(self.defence)
        if self.variance is None:
            self.variance = getattr(self.defence.vae, "mean_posterior_variance", None)
        if self.variance is not None:
            check_variance(self.variance)
        if self.score_name is None:
            aware = getattr(self.defence, "perturbation", None) is not None
            self.score_name = "energy_drop" if aware else "start_error"
        names = score_names(self.defence) + energy_score_names(self.defence)
        if self.score_name in ENERGY_SCORES and self.score_name not in names:
            raise ValueError(
                f"score_name={self.score_name!r} needs a defence that assumes a perturbation in "
                "one ball, such as PosteriorModeDefence(vae, perturbation=Linf(0.1))"
            )
        _check_name(self.score_name, names)

    def fit(
        self,
        x: ImagesLike,
        false_alarm: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> Detector:
        """Set the threshold; returns the detector.

        Args:
            x: clean images ``(n, C, H, W)``, or ``(x, *conditions)``, which the VAE was not trained
                on, from the source of those to come.
            false_alarm: largest probability of an alarm for a clean image, in (0, 1).
            generator: source of the defence's seed; torch's global seed when ``None``.

        Raises:
            ValueError: if images are too few for such a rate, or more of them than it have a score
                that is not finite.
        """
        images, _ = split(x)
        check_images(images)
        rank = conformal_rank(len(images), false_alarm)
        if self.score_name in ENERGY_SCORES:
            anchors, found = calibrate_energies(self.defence, x, self.score_name)
        else:
            anchors, found = None, self.score(x, generator)
        found = found.sort().values
        threshold = float(found[rank - 1])
        if threshold == math.inf:
            count = int(found.isinf().sum())
            raise ValueError(
                f"{count} of {len(found)} clean images have a {self.score_name} that is not "
                f"finite, more than false_alarm={false_alarm} allows: choose another score_name, "
                "or mend the VAE"
            )
        self.false_alarm, self.threshold, self.clean_scores = float(false_alarm), threshold, found
        self._anchors, self._fitted_to = anchors, self.score_name
        self._fitted_with = self._held()
        self._calibration = {fingerprint(image) for image in images}
        return self

    def score(self, x: ImagesLike, generator: torch.Generator | None = None) -> Tensor:
        """Suspicion of each image, ``(N,)``, high where an attack is suspected.

        Arguments are those of the defence. A score that is not finite becomes infinity, which
        raises the alarm: an image that cannot be scored is not passed for a clean one.

        Raises:
            ValueError: before :meth:`fit`, for ``anchor_energy`` and ``least_energy``.
        """
        if self.score_name in ENERGY_SCORES:
            return self._energies(x)
        return infinite_if_unknown(self._of(self._scores(x, generator)))

    def predict(self, x: ImagesLike, generator: torch.Generator | None = None) -> Tensor:
        """Whether each image raises the alarm, bool ``(N,)``; arguments are those of the defence.

        Raises:
            ValueError: before :meth:`fit`.
        """
        self._check_fitted()
        return self.score(x, generator) > self.threshold

    def p_value(self, x: ImagesLike, generator: torch.Generator | None = None) -> Tensor:
        """Probability of such a score, or a higher one, for a clean image: float64 ``(N,)``.

        At most ``false_alarm`` where :meth:`predict` raises the alarm, and only there. Otherwise as
        :meth:`predict`.
        """
        self._check_fitted()
        found, clean = self.score(x, generator), self.clean_scores
        not_below = len(clean) - torch.searchsorted(clean.to(found), found)
        return (1 + not_below).double() / (len(clean) + 1)

    def report(
        self,
        x: ImagesLike,
        x_adv: Tensor,
        ball: Ball,
        level: float = 0.95,
        generator: torch.Generator | None = None,
        *,
        labels: Tensor | None = None,
        classify: Callable[[Any], Tensor] | None = None,
    ) -> DetectionReport:
        """How many clean images, attacked ones, and ones with noise raise the alarm.

        With labels and a classifier the report also says how many are accepted with their right
        class, the accuracy where an alarm is not answered, and how many with a wrong one.

        Args:
            x: clean images ``(N, C, H, W)``, or ``(x, *conditions)``: neither training nor
                calibration images, which raise fewer alarms than new ones.
            x_adv: the same images, attacked: inside the ball around ``x``, or next to it if they
                were rounded to 8 bits.
            ball: norm and radius of the attack, e.g. ``Linf(0.1)``, which are those of the noise.
            level: of the intervals.
            generator: source of the seeds of defence, noise and intervals, on the CPU.
            labels: classes of ``x``, integers ``(N,)``; with ``classify``.
            classify: images, or ``(x, *conditions)``, to their classes ``(N,)``, such as
                :meth:`DefendedClassifier.predict
                <pyro_vae_defence.defence.DefendedClassifier.predict>`. It is called once, and
                draws from torch's global seed.

        Raises:
            ValueError: before :meth:`fit`, if images do not fit each other or the ball, are fewer
                than two, or some of ``x`` were given to :meth:`fit`; if ``labels`` or ``classify``
                comes without the other, or classes are no integers ``(N,)``.
        """
        self._check_fitted()
        check_ball(ball)
        check_bootstrap(level, 1, generator)
        clean, conditions = split(x)
        check_images(clean)
        check_images(x_adv, "x_adv")
        if clean.shape != x_adv.shape or len(clean) < 2:
            raise ValueError(
                f"x and x_adv must be the same two or more images before and after the attack, got "
                f"shapes {tuple(clean.shape)} and {tuple(x_adv.shape)}"
            )
        check_on_device("x_adv", x_adv, "x", clean.device)
        _check_attack(clean, x_adv, ball)
        _check_classes(labels, classify, clean)
        known = sum(fingerprint(image) in self._calibration for image in clean)
        if known:
            raise ValueError(
                f"{known} of {len(clean)} images of x are among those that the detector was fitted "
                "on, which raise fewer alarms than new ones: pass images that it has not seen"
            )
        kinds = ("clean", "attacked", "noise")
        images = torch.cat([clean, x_adv, random_noise(clean, ball, generator)])
        repeated = tuple(fold(value, len(images)) for value in conditions)
        given = (images, *repeated)
        scores = self._scores(given, generator)
        if self.score_name in ENERGY_SCORES:
            scores[self.score_name] = self._energies(given)
        found = {
            name: dict(zip(kinds, infinite_if_unknown(value).split(len(clean))))
            for name, value in scores.items()
        }
        raised = {kind: value > self.threshold for kind, value in self._of(found).items()}
        alarms = {kind: metrics.rate_interval(value, level) for kind, value in raised.items()}
        outcomes = None
        if labels is not None and classify is not None:
            classes = classify(given if repeated else images)
            _check_integers("classify returned", classes, len(images))
            right = metrics.correct(classes, labels.repeat(len(kinds))) > 0
            by_kind = dict(zip(kinds, right.split(len(clean))))
            outcomes = {
                kind: {
                    "accepted, right": metrics.rate_interval(~raised[kind] & by_kind[kind], level),
                    "accepted, wrong": metrics.rate_interval(~raised[kind] & ~by_kind[kind], level),
                    "rejected": alarms[kind],
                }
                for kind in kinds
            }
        auroc = {
            name: {
                f"against_{kind}": metrics.detection_interval(
                    metrics.auroc, values[kind], values["attacked"], level, generator=generator
                )
                for kind in ("clean", "noise")
            }
            for name, values in found.items()
        }
        return DetectionReport(
            str(self.score_name),
            self.threshold,
            self.false_alarm,
            str(ball),
            alarms,
            auroc,
            outcomes,
            self._guarantee(clean, x_adv),
        )

    def _guarantee(self, x: Tensor, x_adv: Tensor) -> str | None:
        """What the report says of attacks within the defence's ball."""
        if self.score_name not in ENERGY_SCORES:
            return None
        ball: Ball = self.defence.perturbation  # type: ignore[attr-defined]
        inside = int((ball.norm(x_adv - x) <= ball.radius).sum())
        exact = {
            "anchor_energy": "It assumes nothing of a search",
            "least_energy": "It is for an exact minimum, which a search may miss",
        }[self.score_name]
        return (
            f"No attack within {ball} raises the alarm for more than {self.false_alarm:.1%} of "
            "clean images from the source of the calibration images, on average over both. "
            f"{exact}. {inside} of {len(x)} attacked images lie in this ball as computed; nothing "
            "is said of others, nor that what is accepted is right."
        )

    def _energies(self, x: ImagesLike) -> Tensor:
        self._check_fitted()
        assert self.score_name is not None
        assert self._anchors is not None
        return energy_scores(self.defence, x, self.score_name, self._anchors)

    def _scores(self, x: ImagesLike, generator: torch.Generator | None) -> dict[str, Tensor]:
        parts = [
            detection_scores(self.defence, result, self.variance)
            for result in runs(self.defence, x, generator)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _of(self, scores: dict[str, _Score]) -> _Score:
        return scores[_check_name(self.score_name, scores)]

    def _check_fitted(self) -> None:
        if not hasattr(self, "threshold"):
            raise ValueError("the detector has no threshold yet: call fit(clean_images) first")
        if self._fitted_to != self.score_name:
            raise ValueError(
                f"the threshold is of score_name={self._fitted_to!r}, which is "
                f"{self.score_name!r} now: call fit(clean_images) again"
            )
        now = self._held()
        was = getattr(self, "_fitted_with", now)
        for name, value in now.items():
            if not _same(was.get(name), value):
                raise ValueError(
                    f"the threshold is of another {name} than the detector has now: call "
                    "fit(clean_images) again"
                )

    def _held(self) -> dict[str, Any]:
        """What a threshold is of, by name: objects that are called, and hashes of others, which may
        have been changed since."""
        defence: Any = self.defence
        held: dict[str, Any] = {"variance": self.variance}
        if isinstance(defence, BaseDefence):
            own = {k: v for k, v in defence.own_settings().items() if k != "prepare"}
            held |= {f"defence.{name}": value for name, value in own.items()}
        held = {name: v if callable(v) else fingerprint(v) for name, v in held.items()}
        weights = fingerprint(networks_of(defence.vae))
        return {"defence": defence, "vae": defence.vae, "weights of the VAE": weights, **held}


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, str) and one == other)


@dataclass(frozen=True)
class DetectionReport:
    """What :meth:`Detector.report` found; ``print`` shows it as a table.

    Attributes:
        score_name, threshold, false_alarm: those of the detector.
        ball: of the noise, and said to be the attack's.
        alarms: ``clean``, ``attacked`` and ``noise`` -> share of these images that raise the alarm.
        auroc: every score of the defence -> ``against_clean`` and ``against_noise`` -> how well it
            tells attacked images from these, whatever the threshold: 1/2 is blind.
        outcomes: ``clean``, ``attacked`` and ``noise`` -> shares of images ``accepted, right``,
            ``accepted, wrong`` and ``rejected``, which sum to 1, if there were labels: a wrong
            class that was accepted is an error, a clean image that was rejected a false alarm.
        guarantee: what holds for every attack, and what it assumes; of ``anchor_energy`` and
            ``least_energy`` alone.
    """

    score_name: str
    threshold: float
    false_alarm: float
    ball: str
    alarms: dict[str, Interval]
    auroc: dict[str, dict[str, Interval]]
    outcomes: dict[str, dict[str, Interval]] | None = None
    guarantee: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON knows it."""
        return {
            **vars(self),
            "alarms": {kind: rate.to_dict() for kind, rate in self.alarms.items()},
            "auroc": _as_dicts(self.auroc),
            "outcomes": None if self.outcomes is None else _as_dicts(self.outcomes),
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __repr__(self) -> str:
        rates = ", ".join(f"{kind} {rate:.3f}" for kind, rate in self.alarms.items())
        return f"DetectionReport({self.score_name}, alarms: {rates}; print shows more)"

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as one page that loads nothing from elsewhere; its path."""
        found = self.to_dict()
        count = self.alarms["clean"].num_values
        set_for = f"set for at most {self.false_alarm:.1%} of clean images"
        body = [
            "<h1>Detection report</h1>",
            f"<p>Alarm: {escape(self.score_name)} above {self.threshold:.6g}, {set_for}; {count} "
            f"images of each kind; attack and noise in {escape(self.ball)}.</p>",
            *([] if self.guarantee is None else [f"<p>{escape(self.guarantee)}</p>"]),
            html.table(
                ("images", "raise the alarm"),
                ([kind, html.interval(rate)] for kind, rate in found["alarms"].items()),
            ),
            *self._html_of_outcomes(),
            "<p>How well each score tells attacked images from others, whatever the threshold: "
            "area under the ROC curve, 1/2 is blind.</p>",
            html.table(
                ("score", "against clean images", "against noise of equal size"),
                (
                    [escape(name), *(html.interval(each) for each in of_score.values())]
                    for name, of_score in found["auroc"].items()
                ),
            ),
        ]
        write_atomically(Path(path), html.page("Detection report", body).encode())
        return Path(path)

    def _html_of_outcomes(self) -> list[str]:
        if self.outcomes is None:
            return []
        shares = _as_dicts(self.outcomes)
        names = next(iter(shares.values()))
        rows = ([kind, *map(html.interval, of.values())] for kind, of in shares.items())
        return [html.table(("images", *names), rows)]

    def __str__(self) -> str:
        count = self.alarms["clean"].num_values
        lines = [
            f"Alarm: {self.score_name} above {self.threshold:.6g}, set for at most "
            f"{self.false_alarm:.1%} of clean images; {count} images, {self.ball}",
            "",
            *(f"{kind:10s}{rate:.3f} raise the alarm" for kind, rate in self.alarms.items()),
            "",
        ]
        if self.guarantee is not None:
            lines += [*textwrap.wrap(self.guarantee, 88), ""]
        if self.outcomes is not None:
            lines.append(f"{'':10s}" + "".join(f"{n:24s}" for n in self.outcomes["clean"]).rstrip())
            for kind, shares in self.outcomes.items():
                row = "".join(f"{format(share, '.3f'):24s}" for share in shares.values())
                lines.append(f"{kind:10s}{row.rstrip()}")
            lines.append("")
        lines += [f"{'AUROC, attacked against':26s}{'clean images':24s}noise of equal size"]
        for name, of_score in self.auroc.items():
            mark = "* " if name == self.score_name else "  "
            cells = [f"{found:.3f}" for found in of_score.values()]
            lines.append(f"{mark + name:26s}{cells[0]:24s}{cells[1]}")
        return "\n".join(lines)


def conformal_rank(num_images: int, false_alarm: float) -> int:
    """k of the module's text: the k-th smallest of that many scores is the threshold.

    Raises:
        ValueError: if ``false_alarm`` is not in (0, 1), or the images are too few for it.
    """
    check_within("false_alarm", false_alarm, "(0, 1)", "use 0.05 for 5 percent")
    # How many of n + 1 may raise the alarm; rounding must not take one away (0.05 * 20 is 1).
    allowed = math.floor((num_images + 1) * false_alarm + 1e-9)
    if allowed < 1:
        needed = math.ceil(1 / false_alarm - 1e-9) - 1
        raise ValueError(
            f"{num_images} clean images cannot set false_alarm={false_alarm}: the rarest alarm of "
            f"so many has 1 in {num_images + 1}; pass at least {needed} images"
        )
    return num_images + 1 - allowed


def _check_name(name: Any, names: Iterable[str]) -> str:
    """``name``, or a ``ValueError`` unless it is among the ``names`` of a defence's scores."""
    if name not in (names := tuple(names)):
        raise ValueError(
            f"score_name must be one of {', '.join(names)}, which this defence has, got {name!r}"
        )
    return name


def _check_attack(x: Tensor, x_adv: Tensor, ball: Ball) -> None:
    """Refuse images that are no attack on ``x`` in ``ball``, but for rounding to 8 bits."""
    if torch.equal(x, x_adv):
        raise ValueError(
            "x_adv equals x: pass the images after the attack, such as "
            "attacks.PGD(attacks.symmetric_kl(vae), ball)(x).best()"
        )
    size = ball.norm(x_adv - x)
    allowed = ball.radius + float(ball.norm(torch.full_like(x[:1], 0.5 / 255)))
    if bool((size > allowed).any()):
        raise ValueError(
            f"x_adv leaves the ball around x for {int((size > allowed).sum())} of {len(x)} images, "
            f"by a perturbation of norm {float(size.max()):.3g} in {ball}: pass the ball of the "
            "attack, and the attacked images in the order of x"
        )


def _check_classes(
    labels: Tensor | None, classify: Callable[[Any], Tensor] | None, x: Tensor
) -> None:
    if (labels is None) != (classify is None):
        raise ValueError(
            "labels and classify go together: pass both, e.g. labels=labels, "
            "classify=DefendedClassifier(defence, classifier).predict, or neither"
        )
    if labels is None:
        return
    if not callable(classify):
        raise ValueError(f"classify must be callable, images to classes, got {classify!r}")
    _check_integers("labels has", labels, len(x))
    check_on_device("labels", labels, "x", x.device)


def _check_integers(what: str, classes: Any, count: int) -> None:
    if not isinstance(classes, Tensor):
        raise ValueError(f"{what} type {type(classes).__name__}: make it a tensor of classes")
    if tuple(classes.shape) != (count,) or not is_integer(classes):
        raise ValueError(
            f"{what} shape {tuple(classes.shape)} and dtype {classes.dtype}: make it integer "
            f"classes, one for each of {count} images, such as logits.argmax(-1)"
        )


def _as_dicts(table: dict[str, dict[str, Interval]]) -> dict[str, dict[str, Any]]:
    return {key: {k: found.to_dict() for k, found in of.items()} for key, of in table.items()}
