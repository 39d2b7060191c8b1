"""The leaderboard: defences of each model ranked by what attackers who know them leave, from the
result files of the study ``robustness``.

As in RobustBench (Croce et al., 2021, https://arxiv.org/abs/2010.09670), results are compared
within one threat model alone, here one model, data set and radius, under one suite of attacks with
one budget; and what is ranked is the worst case image by image. A report that calls itself
unreliable is never ranked above one that does not. Beside the worst case stand the figure without
an attack and under the paper's attack on the encoder, whose attacker does not know the defence.

Before the rankings stands what follows from them: each defence against the best control of its
ranking, by paired differences on the same images, and in one line which one is to be preferred.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyro_vae_defence.experiments import study, tables
from pyro_vae_defence.experiments.defences import chain_words, defence_spec, label
from pyro_vae_defence.experiments.robustness import reports, scored_draws
from pyro_vae_defence.ops.files import write_atomically
from pyro_vae_defence.robustness import Difference, RobustnessReport, paired_difference
from pyro_vae_defence.robustness.budget import effort
from pyro_vae_defence.robustness.paired import same_images
from pyro_vae_defence.robustness.suite import OF_CHAINS

UNAWARE = "transfer"
"""The attack whose attacker does not know the defence: symmetric KL-divergence of the encoder."""

_TITLES = {
    "classification": "## Share of classes read right",
    "reconstruction": "## Similarity of reconstructions, `ms_ssim[paper]`",
}
_SHORT = {"classification": "accuracy", "reconstruction": "similarity"}
_LEGEND = (
    "Ranked by the last column, within one model, radius and number of images: first the reports "
    "that pass their own checks, then those marked *?*, which do not. The attacks on a marked "
    "defence may be weaker than they look, so its figure is not shown to be better than any above "
    "it, and the order of marked ones says little."
)
# What two evaluations must agree in to be compared, in this order on the page.
_ALIKE = (
    "model", "classifier", "radius", "dataset", "num_images", "engine", "reading", "defence_seed",
    "seed",
)  # fmt: skip
_COLUMNS = [
    "model, radius, images", "defence", "clean", "attacked, defence unknown",
    "attacked, defence known",
]  # fmt: skip
_PREFERRED = (
    "Each defence against the control of its ranking that leaves most, under attackers who know "
    "either: mean of the differences image by image, with intervals that hold for all defences of "
    "a ranking together in 95% of cases. *Better* and *worse* are said where the interval excludes "
    "0, random signs of the differences would seldom lead as far, and the report of the one that "
    "is ahead passes its own checks; a lead in a report that does not may be that of weak attacks. "
    "The control is the best of several on the same images, which is in its favour. Where the mode "
    "of the target that chains sample was attacked, it is a second rival of theirs."
)
_BETTER, _WORSE, _NOT_APART = "better", "worse", "not told apart"
_AHEAD, _BEHIND = "ahead in an unreliable report", "behind an unreliable report"
_FURTHER = ["random noise", "worst of all draws", "attacks", "reliable"]


class Entry(NamedTuple):
    """A defence under a suite of attacks: the result that has it, its name, the report."""

    result: dict[str, Any]
    defence: str
    report: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration."""
        found: dict[str, Any] = self.result["config"]
        return found

    @property
    def setting(self) -> tuple[str, ...]:
        """What is equal where defences are compared, as text, which sorts.

        Attacks on chains alone need not be: no other defence can have them, and a report of a chain
        without one that applies is unreliable.
        """
        config, weights = self.config, self.result["weights"]
        names = [config["model"]]
        if self.report["figure"] == "accuracy":
            names.append(config.get("classifier") or f"{config['model']}_classifier")
        else:  # nobody reads a class
            config = config | {"classifier": None, "reading": None}
        alike: list[Any] = [config.get(name) for name in _ALIKE]
        alike.append([name for name in config["attacks"] if name not in OF_CHAINS])
        alike += effort(config["budget"]).values()
        return tuple(map(repr, alike + [weights.get(name) for name in names]))

    @property
    def unlike(self) -> str:
        """What is not as in most settings, to go on with."""
        unlike = ""
        if self.report["figure"] == "accuracy" and self.config["reading"] != "reencoded":
            unlike += f", read `{self.config['reading']}`"
        if self.config.get("defence_seed") is not None:  # which older results do not name
            unlike += ", seed known"
        return unlike

    @property
    def worst_case(self) -> float:
        """What is ranked."""
        found: float = self.report["robust"]["mean"]["estimate"]
        return found

    @property
    def num_images(self) -> int:
        """How many images the report has, all or those so far."""
        found: int = self.report["robust"]["mean"]["num_images"]
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
    entries: dict[str, list[Entry]] = {target: [] for target in _TITLES}
    for result in found:
        for key, report in reports(result).items():
            target, name = key.split("/")
            entries[target].append(Entry(result, name, report))
    lines = [_LEGEND, "", *_preferred(entries)]
    for target, title in _TITLES.items():
        rows = _rows(entries[target])
        lines += [title, "", *tables.table(_COLUMNS + _FURTHER, rows, _COLUMNS)]
    lines += ["## Settings", "", *_settings(found), "", *tables.sources(found)]
    page = results / "leaderboard.md"
    write_atomically(page, "\n".join(lines).encode())
    return page


class Ranking(NamedTuple):
    """What is compared: entries of one setting, the most robust first, and what they are of; and
    where another ranking has the same title, the number of this one."""

    title: str
    other: str
    entries: list[Entry]

    def named(self, number: int) -> str:
        """The title, with a number of images."""
        return f"{self.title}, {number}{self.other}"


def _rankings(entries: Iterable[Entry]) -> Iterator[Ranking]:
    """Setting by setting, reliable reports first, and of these the most robust defence."""

    def rank(entry: Entry) -> tuple[Any, ...]:
        return entry.setting, entry.report["unreliable"], -entry.worst_case, entry.defence

    titles: Counter[str] = Counter()
    ordered = sorted(entries, key=rank)
    for _, group in itertools.groupby(ordered, lambda entry: entry.setting):
        found = list(group)
        config = found[0].config
        title, unlike = f"`{config['model']}`, {config['radius']:g}", found[0].unlike
        alike = f"{title}, {config['num_images']}{unlike}"
        titles[alike] += 1
        # Another ranking, since something differs that the title does not say.
        other = unlike + ("" if titles[alike] == 1 else f", setting {titles[alike]}")
        kept = by_defence(found)
        yield Ranking(title, other, [each for each in found if kept[each.defence] is each])


def by_defence(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Entries of one setting by their defence: of two results of the same chains the one that has
    all attacks of the other and more.

    Raises:
        ValueError: for two results of one defence otherwise, which differ in what no setting says,
            such as its chains.
    """
    found: dict[str, Entry] = {}
    for entry in entries:
        known = found.setdefault(entry.defence, entry)
        if known is entry:
            continue
        one, other = (set(each.config["attacks"]) for each in (known, entry))
        if not (one < other or other < one) or known.config["chain"] != entry.config["chain"]:
            of = f"{entry.config['model']}, radius {entry.config['radius']:g}"
            raise ValueError(f"two results of {entry.defence!r} in one setting ({of}); keep one")
        if one < other:
            found[entry.defence] = entry
    return found


def _preferred(entries: dict[str, list[Entry]]) -> Iterator[str]:
    """Which defence is to be preferred, a line for each ranking with a control, and the table that
    it rests on; between two comments, by which a page takes it."""
    lines, rows, without = [], [], []
    for target in _TITLES:
        what = _SHORT[target]
        for ranking in _rankings(entries[target]):
            controls = [e for e in ranking.entries if defence_spec(e.defence).role == "control"]
            if not controls:
                without.append(ranking.named(ranking.entries[0].num_images))
                continue
            best = max(controls, key=lambda entry: entry.worst_case)
            name = label(best.defence).removeprefix("control: ")
            rivals = [(best, ranking.entries, f"the best control ({name})")]
            for mode in ranking.entries:
                if chains := [e for e in ranking.entries if _is_mode_of(mode, e)]:
                    rivals.append((mode, chains, f"the {label(mode.defence)}, of the same target"))
            for rival, entries_of, words in rivals:
                of = ranking.named(rival.num_images)  # those that are compared
                found = dict(_against(rival, entries_of))
                lines.append(f"- {of}, {what}: {_sentence(found, words)}")
                for name, (difference, word) in found.items():
                    shown = tables.interval(difference._asdict(), 2)
                    rows.append([word, f"{of}, {what}", label(name), label(rival.defence), shown])
    columns = ["verdict", "model, radius, images", "defence", "rival", "difference"]
    yield from ("## Which defence to prefer", "", "<!-- begin preferred -->", "", _PREFERRED, "")
    yield from (*lines, "")
    if without:
        names = "; ".join(dict.fromkeys(without))
        yield f"No control was attacked, so that nothing can be preferred: {names}."
        yield ""
    yield from tables.table(columns, rows) if rows else ()
    yield from ("<!-- end preferred -->", "")


def _is_mode_of(mode: Entry, chain: Entry) -> bool:
    """Whether one defence is the mode of the target that the other's chains sample."""
    one, other = defence_spec(mode.defence), defence_spec(chain.defence)
    chains = ("aware", "annealed", "recommended")
    return one.kind == "aware_mode" and other.kind in chains and one.radius == other.radius


def _against(
    other: Entry, entries: Iterable[Entry]
) -> Iterator[tuple[str, tuple[Difference, str]]]:
    """Defences that have been attacked on a rival's images: difference and verdict."""
    rival = RobustnessReport.from_dict(other.report)
    compared = [
        (entry, report)
        for entry in entries
        if defence_spec(entry.defence).role == "defence"
        for report in [RobustnessReport.from_dict(entry.report)]
        if same_images(report, rival)
    ]
    for entry, report in compared:
        level, seeded = 1.0 - 0.05 / len(compared), torch.Generator().manual_seed(0)
        difference = paired_difference(report, rival, level=level, generator=seeded)
        word = _NOT_APART
        if difference.told_apart and difference.estimate > 0:
            word = _BETTER if report.reliable else _AHEAD
        elif difference.told_apart:
            word = _WORSE if rival.reliable else _BEHIND
        yield entry.defence, (difference, word)


def _sentence(found: dict[str, tuple[Difference, str]], rival: str) -> str:
    """Which of some defences is to be preferred to a rival."""
    if not found:
        return f"no defence is known image by image on the images of {rival}."
    said = {
        word: [name for name, (_, of) in found.items() if of == word]
        for word in (_BETTER, _NOT_APART, _AHEAD, _BEHIND, _WORSE)
    }
    if said[_NOT_APART] == list(found):
        return f"**none** can be told apart from {rival}."
    best = max(said[_BETTER], key=lambda name: found[name][0].estimate, default=None)
    choice = "none" if best is None else label(best)
    parts = [f"{word}: {', '.join(map(label, names))}" for word, names in said.items() if names]
    return f"**{choice}** is to be preferred to {rival}; {'; '.join(parts)}."


def _rows(entries: Iterable[Entry]) -> Iterator[list[str]]:
    """The rankings, a row for each entry."""
    for ranking in _rankings(entries):
        for entry in ranking.entries:
            _, defence, report = entry
            figures = {each["name"]: each["figure"] for each in report["attacks"]}
            yield [
                ranking.named(entry.num_images),
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
        classifier = config.get("classifier")  # which results before this setting do not name
        read_by = "" if classifier is None else f" by `{classifier}`"
        known = "" if config.get("defence_seed") is None else " of a seed that attackers know"
        draws = scored_draws(config)
        yield (
            f"- `{config['model']}`, {config['radius']:g} ({names}): {config['num_images']} "
            f"class-stratified test images, {budget['num_steps']} steps of {config['engine']}, "
            f"{budget['num_restarts']} restart(s), {draws} scored draw{'s' * (draws > 1)}{known}, "
            f"classes read `{config['reading']}`{read_by}"
            f"{''.join(f'; {words}' for words in chains)}"
        )


def _chains(report: dict[str, Any]) -> str:
    """The chains of a report in words, as its defence was; empty where it ran none."""
    defence = report["defence"]
    if defence["defence"] != "mcmc":
        return ""
    kernel = {name: defence.get(f"kernel_{name}", 0) for name in ("step_size", "burn_in")}
    return chain_words({**defence, **kernel})
