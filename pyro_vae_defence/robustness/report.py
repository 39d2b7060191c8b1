"""What an evaluation found, in Python and in JSON, and how reports of several images are one.

A report holds its figures image by image, and what its checks have measured image by image. Means,
intervals and verdicts are functions of these, so that :meth:`RobustnessReport.join` makes them anew
for the images of many reports. In JSON such numbers are one text, ``"float32 0.95 1.0"``: their
type, and each as short as it can be for that type, hence exact.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence import plots
from pyro_vae_defence.defence.result import of_defence
from pyro_vae_defence.defence.store import fingerprint
from pyro_vae_defence.ops.files import write_atomically
from pyro_vae_defence.ops.html import interval as interval_text
from pyro_vae_defence.robustness import html
from pyro_vae_defence.robustness.checks import CHECKS, Interval, Seen, join
from pyro_vae_defence.robustness.fidelity import Fidelity, estimators
from pyro_vae_defence.robustness.scoring import Bounds, Fresh, figure_bounds, interval
from pyro_vae_defence.robustness.suite import KNOWLEDGE

SUMMARIES = ("mean", "single", "worst_of_n", "averaged")
"""What a report says of the draws of an image."""

_IMAGES = ("x_adv", "examples", "x_ref", "labels", "conditions")  # not in JSON
_CHECK = "check "  # how the reasons of checks begin


class Check(NamedTuple):
    """A sanity check: ``passed`` is ``None`` where it does not apply."""

    name: str
    passed: bool | None
    detail: str


class AttackOutcome(NamedTuple):
    """One attack, scored on fresh seeds.

    Attributes:
        name, knowledge: as in :data:`~pyro_vae_defence.robustness.suite.KNOWLEDGE`.
        num_draws: draws (or chains) averaged per step.
        figure: mean figure and interval.
        evaluations, seconds: decoder evaluations per image, and wall time.
    """

    name: str
    num_draws: int
    figure: dict[str, float]
    evaluations: float
    seconds: float
    knowledge: str

    @property
    def place(self) -> str:
        """Where :attr:`RobustnessReport.values` has its figure, image by image."""
        return f"attacks/{self.name}/{self.num_draws}"


@dataclass(frozen=True)
class RobustnessReport:
    """What :func:`~pyro_vae_defence.robustness.evaluate.evaluate_robustness` found; ``print`` shows
    a table.

    Attributes:
        figure: what is measured, e.g. ``"accuracy"`` or ``"ms_ssim[paper]"``; higher is better.
        threat_model: norm, radius, target and reading.
        robust: the per-image worst case: ``mean``, ``single``, ``worst_of_n`` and ``averaged``,
            each with estimate, interval and number of images.
        clean: the same without an attack.
        undefended_clean: mean figure of the VAE alone without an attack; for reconstructions the
            noise floor, two draws of the guide at the reference.
        random_noise: mean figure under random noise of the same radius.
        attacks: every attack that ran.
        skipped: attacks that did not, and why.
        checks: sanity checks.
        reasons: why the report is unreliable; empty if it is not.
        cost: of defending one clean image, and of the suite.
        seed, budget, defence, versions: what the run was made with.
        strongest: per image, the attack that was its worst.
        per_image: mean figure of the worst case, ``(N,)``.
        x_adv: its images ``(N, C, H, W)``; ``None`` for a report that was read from JSON.
        examples: the first 8 images, not chosen, ``(3, n, C, H, W)``: reference, worst case, and
            what the defence makes of that; ``None`` as ``x_adv``.
        values: every figure image by image, ``(N,)`` each, by where the report has its interval,
            such as ``"robust/mean"`` or ``"attacks/bpda/20"`` for 20 draws. Empty for a report
            that an earlier version has written.
        evidence: what the checks have measured, by their names.
        images: a hash of the images, of each report that was joined; empty for a report that an
            earlier version has written.
        weights: a hash of the networks of VAE and classifier; empty likewise.
        earlier_seeds: of the reports on which it goes on, see
            :func:`~pyro_vae_defence.robustness.evaluate.evaluate_robustness`.
        x_ref, labels, conditions: the references ``(N, C, H, W)``, their classes if these are what
            is measured, and what else the programs take; ``None`` and empty as ``x_adv``. What
            :func:`~pyro_vae_defence.robustness.published.save_attacked` writes.
    """

    figure: str
    threat_model: dict[str, Any]
    robust: dict[str, dict[str, float]]
    clean: dict[str, dict[str, float]]
    undefended_clean: dict[str, float]
    random_noise: dict[str, float]
    attacks: tuple[AttackOutcome, ...]
    skipped: dict[str, str]
    checks: tuple[Check, ...]
    reasons: tuple[str, ...]
    cost: dict[str, float]
    seed: int
    budget: dict[str, Any]
    defence: dict[str, Any]
    versions: dict[str, str]
    strongest: tuple[str, ...]
    per_image: Tensor
    x_adv: Tensor | None
    examples: Tensor | None
    values: dict[str, Tensor]
    evidence: dict[str, Seen]
    images: tuple[str, ...] = ()
    weights: str = ""
    earlier_seeds: tuple[int, ...] = ()
    x_ref: Tensor | None = None
    labels: Tensor | None = None
    conditions: tuple[Tensor | None, ...] = ()

    @property
    def reliable(self) -> bool:
        """Whether every attack that applies to the defence ran, and the checks, and none failed."""
        return not self.reasons

    @property
    def fidelity(self) -> dict[str, Fidelity]:
        """How far the gradients of each attack can be trusted
        (:mod:`~pyro_vae_defence.robustness.fidelity`); empty for a report without this check."""
        seen = self.evidence.get("fidelity")
        return {} if seen is None else estimators(seen.values)

    def __repr__(self) -> str:
        mean, kind = self.robust["mean"], "" if self.reliable else ", unreliable"
        return (
            f"RobustnessReport({self.figure} {mean['estimate']:.3f} [{mean['low']:.3f}, "
            f"{mean['high']:.3f}] under {len(self.attacks)} attacks, {len(self.strongest)} images"
            f"{kind}; print shows more)"
        )

    def __str__(self) -> str:
        threat, number = self.threat_model, len(self.strongest)
        figures = {
            "undefended, clean": self.undefended_clean,
            "clean": self.clean["mean"],
            "random noise": self.random_noise,
            "robust, mean": self.robust["mean"],
            "robust, averaged": self.robust["averaged"],
            "robust, worst draw": self.robust["worst_of_n"],
        }
        known = ", whose seed attackers know" if "defence_seed" in threat else ""
        lines = [
            f"{self.figure} of {threat['target']}, {threat['norm']} radius {threat['radius']:g}, "
            f"{number} images, defence {self.defence.get('defence', 'unknown')}{known}; higher "
            "is more robust; heuristic, not certified",
            "",
            *(f"{what:24s}{interval_text(found)}" for what, found in figures.items()),
            "",
            f"{'attack (draws per step)':24s}{'figure':24s}worst for",
        ]
        for each in self.attacks:
            name, worst = f"{each.name} ({each.num_draws})", self.strongest.count(each.name)
            lines.append(f"{name:24s}{interval_text(each.figure):24s}{worst} of {number}")
        if self.fidelity:
            lines += ["", "fidelity of gradients"]
            lines += [f"{name:24s}{each}" for name, each in self.fidelity.items()]
        if self.reasons:
            lines += ["", "Unreliable:", *(f"- {reason}" for reason in self.reasons)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, as JSON knows it."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in _IMAGES:
            del found[name]
        for name in ("weights", "earlier_seeds"):
            if not found[name]:  # so reports of earlier versions come out again as they were
                del found[name]
        for name in ("attacks", "checks"):
            found[name] = [entry._asdict() for entry in found[name]]
        found["per_image"] = self.per_image.tolist()
        found["values"] = _texts(self.values)
        found["evidence"] = {
            name: {"values": _texts(seen.values), "facts": seen.facts}
            for name, seen in self.evidence.items()
        }
        found["fidelity"] = {name: each._asdict() for name, each in self.fidelity.items()}
        found["unreliable"] = not self.reliable
        found["note"] = "Heuristic, not certified: an upper bound of the true robustness."
        return found

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as one page that loads nothing from elsewhere; its path."""
        found = self.to_dict()
        if self.examples is not None and self.examples.shape[2] in (1, 3):
            found["examples"] = plots.picture(self.examples)
        title = f"{self.threat_model['target']}, {self.defence.get('defence', 'defence')}"
        body = ["<h1>Robustness report</h1>", html.INTRODUCTION, html.summary({title: found})]
        write_atomically(Path(path), html.page([*body, *html.details(title, found)]).encode())
        return Path(path)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> RobustnessReport:
        """The report of :meth:`to_dict`, also of one that has been through JSON, without images."""
        names = {field.name for field in dataclasses.fields(cls)}
        own = {name: value for name, value in found.items() if name in names}
        evidence = {
            name: Seen(_tensors(seen["values"]), seen["facts"])
            for name, seen in found.get("evidence", {}).items()
        }
        values = _tensors(found.get("values", {}))
        per_image = torch.tensor(found["per_image"], dtype=torch.float64, device="cpu")
        own |= {
            "attacks": tuple(AttackOutcome(**entry) for entry in found["attacks"]),
            "checks": tuple(Check(**entry) for entry in found["checks"]),
            "reasons": tuple(found["reasons"]),
            "strongest": tuple(found["strongest"]),
            "per_image": values.get("robust/mean", per_image),
            "values": values,
            "evidence": evidence,
            "x_adv": None,
            "examples": None,
            "images": tuple(found.get("images", ())),
            "earlier_seeds": tuple(found.get("earlier_seeds", ())),
        }
        return cls(**own)

    @classmethod
    def join(cls, reports: Iterable[RobustnessReport]) -> RobustnessReport:
        """The report of all images of several reports on one defence, in their order.

        Intervals are bootstrapped over all images, and the checks judge what they have measured in
        all reports. One that only earlier versions knew fails where it failed in any report. An
        attack that only some have made is reported on their images alone. Costs
        per image are means over images, seconds are sums; the seed is the first report's, from
        which the bootstrap's are drawn.

        Raises:
            ValueError: for no report, reports of different figures, threat models, budgets,
                defences or, as far as they hold a hash of them, weights, of the same images, which
                would count twice (single ones are known where reports hold ``x_ref``), or one that
                an earlier version has written without values per image.
        """
        reports = list(reports)
        if not reports:
            raise ValueError("reports is empty; join needs one at least")
        first = reports[0]
        if len(reports) == 1:
            return first
        for name in ("figure", "threat_model", "budget", "defence"):
            several = [getattr(report, name) for report in reports]
            if name == "defence":  # what it is, and not how a run went
                several = list(map(of_defence, several))
            if any(each != several[0] for each in several):
                raise ValueError(f"reports of different {name} are not joined: {several[0]}, ...")
        known = {report.weights: number for number, report in enumerate(reports) if report.weights}
        if len(known) > 1:
            raise ValueError(
                f"reports {' and '.join(map(str, known.values()))} are of models or classifiers "
                "with different weights, whose mean is no one's; join those of one model"
            )
        _check_apart(reports)
        if not all(report.values for report in reports):
            raise ValueError(
                "a report holds no values per image, an earlier version has written it; evaluate "
                "its images again"
            )
        fresh = Fresh(first.seed)

        def of_fresh_seed(values: Tensor, bounds: Bounds = None) -> dict[str, float]:
            return interval(values, fresh(), bounds)

        evidence = _joined_evidence([report.evidence for report in reports])
        verdicts = [
            Check(check.name, *check.judge(evidence[check.name], of_fresh_seed))
            for check in CHECKS
            if check.name in evidence
        ]
        verdicts += _joined_verdicts(reports, {check.name for check in CHECKS})
        others = (r for report in reports for r in report.reasons if not r.startswith(_CHECK))
        sizes = [len(report.per_image) for report in reports]
        return dataclasses.replace(
            first,
            **conclude(
                _joined_values([report.values for report in reports]),
                _joined_attacks(reports, sizes),
                verdicts,
                tuple(dict.fromkeys(others)),
                functools.partial(of_fresh_seed, bounds=figure_bounds(first.figure)),
            ),
            skipped=_joined_skipped(reports),
            cost={
                name: sum(r.cost[name] for r in reports)
                if name == "seconds"
                else _weighted([r.cost[name] for r in reports], sizes)
                for name in first.cost
            },
            versions={
                name: ", ".join(dict.fromkeys(report.versions[name] for report in reports))
                for name in first.versions
            },
            strongest=tuple(name for report in reports for name in report.strongest),
            x_adv=_joined(reports, "x_adv"),
            x_ref=_joined(reports, "x_ref"),
            labels=_joined(reports, "labels"),
            conditions=_joined_conditions(reports),
            evidence=evidence,
            weights=next(iter(known), ""),
            earlier_seeds=tuple(seed for report in reports for seed in report.earlier_seeds),
            images=tuple(each for report in reports for each in report.images),
        )


def conclude(
    values: dict[str, Tensor],
    attacks: Sequence[AttackOutcome],
    verdicts: Sequence[Check],
    other_reasons: Sequence[str],
    interval: Interval,
) -> dict[str, Any]:
    """What a report says of its ``values``: fields of :class:`RobustnessReport`, by name.

    The figures of ``attacks`` are theirs; ``other_reasons`` not to believe the report are no
    checks'.
    """
    of_draws = {
        what: {name: interval(values[f"{what}/{name}"]) for name in SUMMARIES}
        for what in ("robust", "clean")
    }
    failed = (f"{_CHECK}{c.name}: {c.detail}" for c in verdicts if c.passed is False)
    return {
        **of_draws,
        "undefended_clean": interval(values["undefended_clean"]),
        "random_noise": interval(values["random_noise"]),
        "attacks": tuple(each._replace(figure=interval(values[each.place])) for each in attacks),
        "checks": tuple(verdicts),
        "reasons": (*failed, *other_reasons),
        "per_image": values["robust/mean"].detach().cpu(),
        "values": {name: value.detach().cpu() for name, value in values.items()},
    }


# --- Joining --------------------------------------------------------------------------------------


def _check_apart(reports: Sequence[RobustnessReport]) -> None:
    """Raise a ``ValueError`` if two of the reports are of the same images, all or some.

    One that was read from JSON knows its images as a whole, by a hash of all of them; for each of
    them it would need one of its own.
    """
    known: dict[str, int] = {}
    for number, report in enumerate(reports):
        each = () if report.x_ref is None else report.x_ref.detach().cpu()
        for images in (*report.images, *set(map(fingerprint, each))):
            if images in known:
                raise ValueError(
                    f"reports {known[images]} and {number} are of the same images, all or some, "
                    "which would count twice; join reports that have none in common"
                )
            known[images] = number


def _joined_values(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


def _joined_evidence(parts: Sequence[dict[str, Seen]]) -> dict[str, Seen]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: join([part[name] for part in parts if name in part]) for name in names}


def _joined_verdicts(reports: Sequence[RobustnessReport], known: set[str]) -> list[Check]:
    """Checks of earlier versions, whose rule is not known any more: a failure stays one."""
    old: dict[str, list[Check]] = {}
    for report in reports:
        for check in report.checks:
            if check.name not in known:
                old.setdefault(check.name, []).append(check)
    found = []
    for name, several in old.items():
        judged = [check.passed for check in several if check.passed is not None]
        details = dict.fromkeys(check.detail for check in several)
        found.append(Check(name, all(judged) if judged else None, "; ".join(details)))
    return found


def _joined_attacks(
    reports: Sequence[RobustnessReport], sizes: Sequence[int]
) -> list[AttackOutcome]:
    """Every attack that a report has, in the suite's order."""
    ran: dict[str, list[tuple[AttackOutcome, int]]] = {}
    for report, size in zip(reports, sizes, strict=True):
        for each in report.attacks:
            ran.setdefault(each.place, []).append((each, size))
    found = []
    for made in ran.values():
        of = [size for _, size in made]
        evaluations = _weighted([each.evaluations for each, _ in made], of)
        seconds = sum(each.seconds for each, _ in made)
        found.append(made[0][0]._replace(evaluations=evaluations, seconds=seconds))
    order = list(KNOWLEDGE)
    return sorted(found, key=lambda each: (order.index(each.name), each.num_draws))


def _joined_skipped(reports: Sequence[RobustnessReport]) -> dict[str, str]:
    """What some have skipped, and why; in how many reports, unless in all."""
    found = {}
    for name in dict.fromkeys(name for report in reports for name in report.skipped):
        why = [report.skipped[name] for report in reports if name in report.skipped]
        some = "" if len(why) == len(reports) else f" ({len(why)} of {len(reports)} parts)"
        found[name] = "; ".join(dict.fromkeys(why)) + some
    return found


def _joined(reports: Sequence[RobustnessReport], name: str) -> Tensor | None:
    found = [value for report in reports if (value := getattr(report, name)) is not None]
    return torch.cat(found) if len(found) == len(reports) else None


def _joined_conditions(reports: Sequence[RobustnessReport]) -> tuple[Tensor | None, ...]:
    if any(report.x_ref is None for report in reports):
        return ()
    kinds = [[value is None for value in report.conditions] for report in reports]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            "reports with other conditions are not joined: give all or none of their images the "
            "labels, or what else the programs take"
        )
    places = zip(*(report.conditions for report in reports), strict=True)
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in places)


def _weighted(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


# --- JSON -----------------------------------------------------------------------------------------


def _texts(values: dict[str, Tensor]) -> dict[str, str]:
    return {name: _text(value) for name, value in values.items()}


def _text(values: Tensor) -> str:
    """Type and numbers, each as short as gives the same number of that type again."""
    kind = str(values.dtype).removeprefix("torch.")
    numbers = values.detach().cpu()
    wider = {"bool": torch.int32, "bfloat16": torch.float32}.get(kind, numbers.dtype)
    return " ".join([kind, *map(str, numbers.to(wider).numpy())])


def _tensors(texts: Mapping[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, text in texts.items():
        kind, *numbers = text.split()
        exact = torch.tensor([*map(float, numbers)], dtype=torch.float64, device="cpu")
        found[name] = exact.to(getattr(torch, kind))
    return found
