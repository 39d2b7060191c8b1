"""The table of the README: what defences leave of two figures, from the result files of other
studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_vae_defence.experiments import tables
from pyro_vae_defence.experiments.defences import label
from pyro_vae_defence.experiments.study import load

RADIUS = "0.2"
BLACK, TEXTURED = "mnist", "color_mnist_textured"
DEFENCES = ("none", "dark_clip", "median", "hmc", "aware")
READING = "reencoded/mean"


def front_table(results: Path) -> str:
    """Similarity and accuracy under attack on two kinds of background, in Markdown.

    Args:
        results: directory whose subdirectories ``compare`` and ``robustness`` hold result files.

    Raises:
        ValueError: for a damaged result file.
    """
    black, textured = (load(results / f"compare/{name}.json") for name in (BLACK, TEXTURED))
    directories = ("robustness", "robustness_controls")
    paths = [results / each / f"{BLACK}_radius_{RADIUS}.json" for each in directories]
    suites = [load(path) for path in paths if path.exists()]
    reports = {name: report for suite in suites for name, report in suite["reports"].items()}
    columns = ["", "black background", "textured background", "black, attacker knows the defence"]
    rows = [["without an attack", _clean(black), _clean(textured), ""]]
    for name in DEFENCES:
        found = (reports.get(f"{target}/{name}") for target in ("reconstruction", "classification"))
        known = [tables.at(report, "robust/mean/estimate") for report in found]
        both = [_under_attack(result, name) for result in (black, textured)]
        mark = " (recommended)" if name == "aware" else ""
        rows.append([label(name) + mark, *both, _pair(*known)])
    shown = [report for name, report in reports.items() if name.split("/")[1] in DEFENCES]
    note = (
        "Similarity (MSSSIM) of reconstructions / share of digits read right, on MNIST and on "
        f"ColorMNIST with textured backgrounds, under attacks of L_inf radius {RADIUS} = δ; 1 is "
        "best. The attacker of the first two columns does not know the defence. Without an attack: "
        "two undefended reconstructions, and the undefended classifier. The last column counts the "
        "worst of a suite of attacks for each image, also where there is no defence to know; it is "
        "of other images, and not to be compared with the first. The last row has the recommended "
        "target in shorter chains; on the textured background the burn-in, too. "
        f"95% intervals of the first two columns are about {_width(black):.2f} wide; "
        f"the last rests on {shown[0]['clean']['mean']['num_images']} images, with intervals about "
        f"{_mean_width([report['robust']['mean'] for report in shown]):.1f} wide, and a stronger "
        "attack may lower it."
    )
    return "\n".join([*tables.table(columns, rows), note, ""])


def _pair(similarity: float | None, accuracy: float | None) -> str:
    if similarity is None or accuracy is None:
        return tables.NOT_MEASURED
    return f"{similarity:.2f} / {accuracy:.2f}"


def _clean(result: Mapping[str, Any]) -> str:
    floor = tables.at(result, "noise_floor/full/estimate")
    return _pair(floor, tables.at(result, "clean/class/estimate"))


def _figures(result: Mapping[str, Any], name: str) -> list[dict[str, float]]:
    entry = result["radii"][RADIUS][name]
    accuracy = entry["accuracy"]["class"]
    reading = accuracy.get(READING) or next(iter(accuracy.values()))
    return [entry["ms_ssim"], reading["attacked"]["correct"]]


def _under_attack(result: Mapping[str, Any], name: str) -> str:
    return _pair(*(figure["estimate"] for figure in _figures(result, name)))


def _width(result: Mapping[str, Any]) -> float:
    return _mean_width([figure for name in DEFENCES for figure in _figures(result, name)])


def _mean_width(figures: Sequence[Mapping[str, float]]) -> float:
    return sum(figure["high"] - figure["low"] for figure in figures) / len(figures)
