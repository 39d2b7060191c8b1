"""The leaderboard: defences of each model ranked by what attackers who know them leave, from the
result files of the study ``robustness``.

As in RobustBench (Croce et al., 2021, https://arxiv.org/abs/2010.09670), results are compared
within one threat model alone, here one model, data set and radius, under one suite of attacks with
one budget; and what is ranked is the worst case image by image. A report that calls itself
unreliable is never ranked above one that does not. Beside the worst case stand the figure without
an attack and under the paper's attack on the encoder, whose attacker does not know the defence.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pyro_vae_defence.experiments import study, tables
from pyro_vae_defence.experiments.defences import chain_words, label
from pyro_vae_defence.experiments.robustness import reports
from pyro_vae_defence.ops.files import write_atomically

UNAWARE = "transfer"
"""The attack whose attacker does not know the defence: symmetric KL-divergence of the encoder."""

_TITLES = {
    "classification": "## Share of classes read right",
    "reconstruction": "## Similarity of reconstructions, `ms_ssim[paper]`",
}
_LEGEND = (
    "Ranked by the last column, within one model, radius and number of images: first the reports "
    "that pass their own checks, then those marked *?*, which do not. The attacks on a marked "
    "defence may be weaker than they look, so its figure is not shown to be better than any above "
    "it, and the order of marked ones says little."
)
# What two evaluations must agree in to be compared, in this order on the page.
_ALIKE = ("model", "radius", "dataset", "num_images", "attacks", "engine", "reading", "seed")
_EFFORT = ("num_steps", "num_restarts", "num_draws", "num_chains", "scoring_draws")
_COLUMNS = [
    "model, radius, images", "defence", "clean", "attacked, defence unknown",
    "attacked, defence known",
]  # fmt: skip
_FURTHER = ["random noise", "worst of all draws", "attacks", "reliable"]


class Entry(NamedTuple):
    """A defence under a suite of attacks: the configuration, its name, the report."""

    config: dict[str, Any]
    defence: str
    report: dict[str, Any]

    @property
    def setting(self) -> tuple[str, ...]:
        """What is equal where defences are compared, as text, which sorts."""
        budget = self.config["budget"]
        alike = [self.config.get(name) for name in _ALIKE] + [budget.get(name) for name in _EFFORT]
        return tuple(map(repr, alike))

    @property
    def worst_case(self) -> float:
        """What is ranked."""
        found: float = self.report["robust"]["mean"]["estimate"]
        return found


def write_leaderboard(results: str | os.PathLike[str]) -> Path:
    """Write ``leaderboard.md`` into the directory of all results.

    Args:
        results: directory whose subdirectories ``robustness*`` hold result files.

    Raises:
        ValueError: without any result file, for a damaged one, or for two results of one defence in
            one setting.
    """
    results = Path(results)
    places = sorted({path.parent for path in results.glob("robustness*/*.json")})
    if not places:
        raise ValueError(f"no result files {results}/robustness*/*.json; run robustness first")
    found = [each for place in places for each in study.read(place, "robustness").values()]
    lines: list[str] = [_LEGEND, ""]
    for target, title in _TITLES.items():
        entries = [
            Entry(result["config"], name, report)
            for result in found
            for key, report in reports(result).items()
            for of, name in [key.split("/")]
            if of == target
        ]
        lines += [title, "", *tables.table(_COLUMNS + _FURTHER, _rows(entries), _COLUMNS)]
    lines += ["## Settings", "", *_settings(found), "", *tables.sources(found)]
    page = results / "leaderboard.md"
    write_atomically(page, "\n".join(lines).encode())
    return page


def _rows(entries: Iterable[Entry]) -> Iterator[list[str]]:
    """Setting by setting, reliable reports first, and of these the most robust defence."""

    def rank(entry: Entry) -> tuple[Any, ...]:
        return entry.setting, entry.report["unreliable"], -entry.worst_case, entry.defence

    titles: Counter[str] = Counter()
    ordered = sorted(entries, key=rank)
    for _, group in itertools.groupby(ordered, lambda entry: entry.setting):
        first, *others = group
        title = f"`{first.config['model']}`, {first.config['radius']:g}"
        alike = f"{title}, {first.config['num_images']}"
        titles[alike] += 1
        # Another ranking, since something differs that the title does not say.
        other = "" if titles[alike] == 1 else f", setting {titles[alike]}"
        seen: set[str] = set()
        for config, defence, report in (first, *others):
            if defence in seen:
                of = f"{config['model']}, radius {config['radius']:g}"
                raise ValueError(f"two results of {defence!r} in one setting ({of}); keep one")
            seen.add(defence)
            figures = {each["name"]: each["figure"] for each in report["attacks"]}
            number = report["robust"]["mean"]["num_images"]
            yield [
                f"{title}, {number}{other}",
                label(defence),
                tables.interval(report["clean"]["mean"], 2),
                tables.interval(figures.get(UNAWARE), 2) or tables.NOT_MEASURED,
                tables.interval(report["robust"]["mean"], 2)
                + (" *?*" if report["unreliable"] else ""),
                *tables.intervals(report, "random_noise", "robust/worst_of_n", digits=2),
                ", ".join(figures),
                "no" if report["unreliable"] else "yes",
            ]


def _settings(results: Iterable[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        config = result["config"]
        budget = config["budget"]
        names = "; ".join(label(name) for name in config["defences"])
        chains = dict.fromkeys(filter(None, map(_chains, reports(result).values())))
        yield (
            f"- `{config['model']}`, {config['radius']:g} ({names}): {config['num_images']} "
            f"class-stratified test images, {budget['num_steps']} steps of {config['engine']}, "
            f"{budget['num_restarts']} restart(s), {budget['scoring_draws']} scored draws, classes "
            f"read `{config['reading']}`{''.join(f'; {words}' for words in chains)}"
        )


def _chains(report: dict[str, Any]) -> str:
    """The chains of a report in words, as its defence was; empty where it ran none."""
    defence = report["defence"]
    if defence["defence"] != "mcmc":
        return ""
    kernel = {name: defence.get(f"kernel_{name}", 0) for name in ("step_size", "burn_in")}
    return chain_words({**defence, **kernel})
