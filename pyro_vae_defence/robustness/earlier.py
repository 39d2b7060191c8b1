"""Reports on which an evaluation goes on: what they share with it, and what they bring.

A suite grows. The attacks of an earlier report need not run again beside a new one: its worst
images are a candidate more, chosen and scored anew on fresh seeds, and its attacks count as run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence.defence.result import of_defence
from pyro_vae_defence.robustness.report import RobustnessReport
from pyro_vae_defence.robustness.scoring import Accuracy, Scores
from pyro_vae_defence.robustness.suite import ATTACKS, Candidate, Suite, is_attack

_MEND = "give the report of the same evaluation with fewer attacks, as load_attacked reads it"


def check_earlier(
    report: RobustnessReport,
    suite: Suite,
    conditions: tuple[Tensor | None, ...],
    threat_model: Mapping[str, Any],
    weights: str,
    seed: int,
) -> None:
    """Raise ``ValueError`` unless a report is of what is evaluated now, with its images."""
    if report.x_adv is None or report.x_ref is None:
        raise ValueError(f"earlier has no images, as reports from JSON have none; {_MEND}")
    x, scorer = suite.x, suite.scorer
    labels = scorer.labels if isinstance(scorer, Accuracy) else None
    before, now = (report.x_ref, report.labels, *report.conditions), (x, labels, *conditions)
    budget = dataclasses.asdict(suite.budget) | {"num_draws": list(suite.budget.num_draws)}
    shared = budget.keys() & report.budget.keys() - {"max_evaluations"}
    differs = {
        "images, labels or conditions": len(before) != len(now) or not all(map(_same, before, now)),
        "figure": report.figure != scorer.figure,
        "threat model": report.threat_model != threat_model,
        "budget": any(report.budget[name] != budget[name] for name in shared),
        "weights": report.weights not in ("", weights),
    }
    if found := [name for name, other in differs.items() if other]:
        raise ValueError(f"earlier is a report of other {', '.join(found)}; {_MEND}")
    unknown = {each.name for each in report.attacks} - {row.name for row in ATTACKS}
    if unknown or not report.values:
        raise ValueError(f"earlier was written by another version; {_MEND}, of this version")
    if seed in (report.seed, *report.earlier_seeds):
        raise ValueError(
            f"earlier has the seed that generator gives, {seed}, so that its attacks have seen the "
            "noise on which they would be scored; give a generator with another seed"
        )
    if not bool(is_attack(report.x_adv.to(x), x, suite.ball).all()):
        raise ValueError(f"earlier has images that leave [0, 1] or {suite.ball}; {_MEND}")


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one.to(other), other)


def check_same_defence(report: RobustnessReport, settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless a report is of a defence with these settings."""
    before, now = of_defence(report.defence), of_defence(settings)
    if before != now:
        names = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
        raise ValueError(
            f"earlier is a report of another defence, by its {', '.join(names)}; {_MEND}"
        )


def of_earlier(
    report: RobustnessReport, x_adv: Tensor, num_draws: int
) -> tuple[list[Candidate], list[Scores]]:
    """Each attack of a report by its figures, for checks: as if in all of ``num_draws`` draws an
    image had its mean. The images ``x_adv`` are those of the worst of them."""
    rows = {row.name: row for row in ATTACKS}
    found, scores = [], []
    for each in report.attacks:
        figure = report.values[each.place].to(x_adv.device)
        found.append(
            Candidate(
                rows[each.name], each.num_draws, x_adv, figure, each.evaluations, each.seconds
            )
        )
        scores.append(Scores(figure.expand(num_draws, -1), figure))
    return found, scores
