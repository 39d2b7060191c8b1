"""The page of results at a glance: headline figures of all studies and one picture, from the result
files alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pyro_vae_defence.experiments import study, tables
from pyro_vae_defence.experiments.benchmark.samplers import SAMPLERS
from pyro_vae_defence.experiments.compare import ADVISED, Headline, headline
from pyro_vae_defence.experiments.defences import colour, label
from pyro_vae_defence.experiments.drawing import save_figure
from pyro_vae_defence.ops.files import write_atomically

_CONTROL = "best control"
_SERIES = ("none", *ADVISED, _CONTROL)
_KERNELS = ("hmc_burn_in", "nuts", "paper")


def write_summary(results: str | os.PathLike[str], images: str | os.PathLike[str]) -> list[Path]:
    """Write ``summary.md`` into the directory of all results, and its picture.

    Args:
        results: directory with the folders ``compare``, ``robustness`` and ``benchmark``, each with
            result files.
        images: directory of the picture.

    Raises:
        ValueError: for a folder without result files, or a damaged file.
    """
    results, picture = Path(results), Path(images) / "summary.png"
    found = list(study.read(results / "compare", "compare").values())
    headlines = [line for line in map(headline, found) if line is not None]
    save_figure(summary_figure(headlines), picture)
    link = Path(os.path.relpath(picture, results)).as_posix()
    lines = [
        *_defended(headlines, link),
        *_adaptive(study.read(results / "robustness", "robustness")),
        *_kernels(study.load(results / "benchmark" / "samplers.json", "benchmark")),
    ]
    page = results / "summary.md"
    write_atomically(page, "\n".join(lines).encode())
    return [page, picture]


def summary_figure(headlines: list[Headline]) -> Figure:
    """Correct classes under attack: a row per dataset, a point with its interval per defence."""
    figure = Figure(figsize=(8, 1.2 + 0.6 * len(headlines)), layout="constrained")
    axes = figure.subplots()
    for number, series in enumerate(_SERIES):
        shift = 0.6 * ((number + 0.5) / len(_SERIES) - 0.5)
        points = [
            (row + shift, entry)
            for row, line in enumerate(headlines)
            if (entry := _entry(line, series)) is not None
        ]
        places = [place for place, _ in points]
        estimate = [entry["estimate"] for _, entry in points]
        error = [
            [entry["estimate"] - entry["low"] for _, entry in points],
            [entry["high"] - entry["estimate"] for _, entry in points],
        ]
        control = series == _CONTROL
        style: dict[str, Any] = {"fmt": "D" if control else "o", "ms": 6, "lw": 1.5}
        color, text = ("dimgray", _CONTROL) if control else (colour(series), label(series))
        axes.errorbar(estimate, places, xerr=error, color=color, label=text, **style)
    axes.set_yticks(range(len(headlines)), [line.name for line in headlines])
    axes.set(xlim=(0, 1.02), ylim=(len(headlines) - 0.5, -0.5), xlabel="correct under attack")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def _entry(line: Headline, series: str) -> dict[str, float] | None:
    return line.accuracy[line.control] if series == _CONTROL else line.accuracy.get(series)


def _defended(headlines: list[Headline], link: str) -> Iterator[str]:
    seen = "; ".join(
        f"{line.name}: "
        + ", ".join(
            f"{_CONTROL if series == _CONTROL else label(series)} {entry['estimate']:.3f}"
            for series in _SERIES
            if (entry := _entry(line, series)) is not None
        )
        for line in headlines
    )
    yield f"![Points for correct classes under attack, one row per data set. {seen}.]({link})"
    yield ""
    yield "Correct classes under the paper's attack on the encoder, by data set and radius:"
    yield ""
    rows = [
        [line.name, *(tables.interval(_entry(line, series)) for series in _SERIES)]
        for line in headlines
    ]
    heads = [_CONTROL if series == _CONTROL else label(series) for series in _SERIES]
    yield from tables.table(["data set, radius", *heads], rows)


def _adaptive(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    names = ("none", "hmc", "aware")
    yield "Worst case per image over all attacks, those that know the defence among them:"
    yield ""
    rows = []
    for result in results.values():
        config = result["config"]
        for target in config["targets"]:
            reports = {name: result["reports"].get(f"{target}/{name}") for name in names}
            some = next((report for report in reports.values() if report), None)
            if some is not None:
                what = f"`{config['model']}`, {config['radius']:g}, {some['figure']}"
                rows.append([what, *map(_worst_case, reports.values())])
    yield from tables.table(["model, radius, figure", *map(label, names)], rows)
    yield "A *?* marks a report that calls itself unreliable."
    yield ""


def _worst_case(report: dict[str, Any] | None) -> str:
    if report is None:
        return tables.NOT_MEASURED
    return tables.interval(report["robust"]["mean"]) + (" *?*" if report["unreliable"] else "")


def _kernels(result: dict[str, Any]) -> Iterator[str]:
    chains = [
        entry["results"] for name, entry in result["sections"].items() if name.startswith("chains")
    ]
    yield "Gradients until the energy of the chains is stationary, by the radius of the attack:"
    yield ""
    rows = []
    for section in chains:
        cells = [section["samplers"].get(name) for name in _KERNELS]
        rows.append([f"{section['radius']:g}", *map(_gradients, cells)])
    yield from tables.table(["radius", *(SAMPLERS[name].label for name in _KERNELS)], rows)


def _gradients(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return tables.NOT_MEASURED
    needed = entry["gradients_energy"]
    return f"not within {entry['budget']:,}" if needed is None else f"{needed:,}"
