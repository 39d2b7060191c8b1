"""The table of the README: what defences leave of two figures, from the result files of other
studies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_vae_defence.defence.mcmc import RECOMMENDED_KERNEL, RECOMMENDED_LENGTHS
from pyro_vae_defence.experiments import tables
from pyro_vae_defence.experiments.defences import chain_words, label
from pyro_vae_defence.experiments.study import shown
from pyro_vae_defence.experiments.summary import protocol
from pyro_vae_defence.experiments.train import DATASETS

RADIUS = "0.2"
BLACK, TEXTURED = "mnist", "color_mnist_textured"
KNOWN = ("mnist", "fashion_mnist")
"""Where attackers who know the defence were measured."""

DEFENCES = ("none", "dark_clip", "median", "mode", "hmc", "aware_mode", "aware")
COMPARED = ("dark_clip", "aware")
READING = "reencoded/mean"
_TARGETS = ("reconstruction", "classification")


def front_table(results: Path) -> str:
    """Similarity and accuracy under attack, by what the attacker knows, in Markdown.

    Args:
        results: directory whose subdirectories ``compare`` and ``robustness*`` hold result files.

    Raises:
        ValueError: for a damaged result file.
    """
    unaware = [shown(results / f"compare/{name}.json") for name in (BLACK, TEXTURED)]
    suites = {name: _suites(results, name) for name in KNOWN}
    reports = {
        name: {key: report for suite in found for key, report in suite["reports"].items()}
        for name, found in suites.items()
    }
    columns = ["", "MNIST (black background)", "ColorMNIST (textured background)"]
    columns += [f"{DATASETS[name]}, attacker knows the defence" for name in KNOWN]
    rows = [["without an attack", *map(_clean, unaware)]]
    rows[0] += [_reported(found, "none", "undefended_clean", False) for found in reports.values()]
    for name in DEFENCES:
        mark = " (recommended target)" if name == "aware" else ""
        cells = [_under_attack(result, name) for result in unaware]
        cells += [_reported(found, name, "robust/mean") for found in reports.values()]
        rows.append([label(name) + mark, *cells])
    lines = tables.table(columns, rows)
    lines += [*_notes(unaware, suites, reports), "", *protocol(results)]
    return "\n".join(lines)


def _suites(results: Path, name: str) -> list[dict[str, Any]]:
    """Results of the suite of attacks: of chains, and of controls where there are any."""
    chains, controls = (
        results / each / f"{name}_radius_{RADIUS}.json"
        for each in ("robustness", "robustness_controls")
    )
    return [shown(chains), *([shown(controls)] if controls.exists() else [])]


def _notes(
    unaware: Sequence[Mapping[str, Any]],
    suites: Mapping[str, Sequence[Mapping[str, Any]]],
    reports: Mapping[str, Mapping[str, Any]],
) -> Iterable[str]:
    shown = [
        report
        for found in reports.values()
        for key, report in found.items()
        if key.split("/")[1] in DEFENCES
    ]
    number = shown[0]["clean"]["mean"]["num_images"]
    plain = [found["classification/none"] for found in reports.values()]
    here, there = (
        " and ".join(f"{tables.at(report, place)['estimate']:.2f}" for report in plain)
        for place in ("undefended_clean", "clean/mean")
    )
    yield (
        "Similarity (`ms_ssim[paper]`) of reconstructions / share of classes read right, under "
        f"attacks of L_inf radius {RADIUS} = δ; 1 is best. Without an attack: two undefended "
        "reconstructions, and the class at the encoding of the image. The leaderboard's *no "
        "defence* is read as defences are, at the encoding of a reconstruction, over "
        f"{plain[0]['budget']['scoring_draws']} draws: of the same images as in the last two "
        f"columns it has {there} where this table has {here}."
    )
    yield ""
    yield (
        "- The attacker of the first two columns does not know the defence. 95% intervals are "
        f"{_widths(unaware[0])} wide in the first, {_widths(unaware[1])} in the second. A *mode* "
        "descends the same energy and runs no chain."
    )
    intervals = "; ".join(
        f"{DATASETS[name]}, "
        + ", ".join(
            f"{label(each)} {tables.interval(report['robust']['mean'], 2)}"
            for each in COMPARED
            if (report := found.get(f"classification/{each}"))
        )
        for name, found in reports.items()
    )
    yield (
        "- The last two columns count the worst of a suite of attacks for each image, also where "
        f"there is no defence to know. They are of {number} other images, and not to be compared "
        f"with the first two. Classes read right, with 95% intervals: {intervals}. A "
        "stronger attack may lower all of it. On textured backgrounds nobody who knows the "
        "defence has attacked it."
    )
    marked = [report for report in shown if report["unreliable"]]
    if marked:
        # "check fidelity: gradients that foretell ..." -> its name.
        why = Counter(
            reason.partition(":")[0].removeprefix("check ")
            for report in marked
            for reason in report["reasons"]
        )
        checks = ", ".join(f"`{check}` in {count}" for check, count in why.most_common())
        yield (
            f"- *?* marks a figure whose report calls itself unreliable, {len(marked)} of "
            f"{len(shown)} here: a check of its attacks failed ({checks}), and they may be "
            "weaker than they look. What a stronger attacker leaves may be less, so a marked "
            "figure is not shown to be better than one without the mark."
        )
    chains = {DATASETS[name]: found[0]["config"]["chain"] for name, found in suites.items()}
    words = ", ".join(dict.fromkeys(map(chain_words, chains.values())))
    first, second = (chain_words(result["config"]["chain"]) for result in unaware)
    own = chain_words(RECOMMENDED_KERNEL | RECOMMENDED_LENGTHS)
    yield (
        f"- `MCMCDefence.recommended` runs {own}. The chains of the table are others: "
        f"of the first column, {first}; of the second, {second}; of the last two, {words}."
    )


def _pair(similarity: str | None, accuracy: str | None) -> str:
    if similarity is None or accuracy is None:
        return tables.NOT_MEASURED
    return f"{similarity} / {accuracy}"


def _clean(result: Mapping[str, Any]) -> str:
    floor = tables.at(result, "noise_floor/full/estimate")
    return _pair(f"{floor:.2f}", f"{tables.at(result, 'clean/class/estimate'):.2f}")


def _figures(result: Mapping[str, Any], name: str) -> list[dict[str, float]]:
    entry = result["radii"][RADIUS][name]
    accuracy = entry["accuracy"]["class"]
    reading = accuracy.get(READING) or next(iter(accuracy.values()))
    return [entry["ms_ssim"], reading["attacked"]["correct"]]


def _under_attack(result: Mapping[str, Any], name: str) -> str:
    return _pair(*(f"{figure['estimate']:.2f}" for figure in _figures(result, name)))


def _reported(reports: Mapping[str, Any], name: str, place: str, attacked: bool = True) -> str:
    """Both figures of a defence's reports; marked if attacks gave them that are not reliable."""
    cells: list[str | None] = []
    for target in _TARGETS:
        report = reports.get(f"{target}/{name}")
        if report is None:
            cells.append(None)
            continue
        mark = " *?*" if attacked and report["unreliable"] else ""
        cells.append(f"{tables.at(report, place)['estimate']:.2f}{mark}")
    return _pair(*cells)


def _widths(result: Mapping[str, Any]) -> str:
    """The narrowest and the widest interval of the defences."""
    figures = [figure for name in DEFENCES for figure in _figures(result, name)]
    widths = [figure["high"] - figure["low"] for figure in figures]
    return f"{min(widths):.2f} to {max(widths):.2f}"
