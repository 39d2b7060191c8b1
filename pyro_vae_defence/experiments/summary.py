"""The page of results at a glance: headline figures of all studies and one picture, from the result
files alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae_defence.defence.mcmc import RECOMMENDED_KERNEL, RECOMMENDED_LENGTHS
from pyro_vae_defence.experiments import study, tables
from pyro_vae_defence.experiments.benchmark.samplers import SAMPLERS
from pyro_vae_defence.experiments.compare import ADVISED, Headline, headline
from pyro_vae_defence.experiments.defences import chain_words, chained, colour, label
from pyro_vae_defence.experiments.drawing import legend_below, new_figure, save_figure
from pyro_vae_defence.experiments.leaderboard import Entry, by_defence
from pyro_vae_defence.experiments.robustness import reports, so_far
from pyro_vae_defence.experiments.train import DATASETS
from pyro_vae_defence.ops.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CONTROL = "best control"
_SERIES = ("none", *ADVISED, _CONTROL)
_PROTOCOL = ("none", "dark_clip", "hmc", "aware", "recommended", "aware_mode")
_KERNELS = ("hmc_burn_in", "nuts", "paper")
MARKED = (
    "*?* marks a report that calls itself unreliable: a check of its attacks failed, or one that "
    "applies was left out, and they may be weaker than they look, so its figure is not shown to be "
    "better than one without the mark."
)


def write_summary(results: str | os.PathLike[str], images: str | os.PathLike[str]) -> list[Path]:
    """Write ``summary.md`` into the directory of all results, its picture, and ``adaptive.md``, the
    part of it about attackers who know the defence.

    Args:
        results: directory with the folders ``compare``, ``robustness`` and ``benchmark``, each with
            result files; further ones of ``robustness`` may lie in ``robustness_controls``, and
            those of more images, which then come first, in ``robustness_protocol``.
        images: directory of the picture.

    Raises:
        ValueError: for a folder without result files, a damaged file, or two results of one defence
            in one setting.
    """
    results, picture = Path(results), Path(images) / "summary.png"
    found = list(study.read(results / "compare", "compare").values())
    headlines = [line for line in map(headline, found) if line is not None]
    save_figure(summary_figure(headlines), picture)
    link = Path(os.path.relpath(picture, results)).as_posix()
    suites = list(study.read(results / "robustness", "robustness").values())
    if (controls := results / "robustness_controls").exists():
        suites += study.read(controls, "robustness").values()
    known = [*adaptive(suites)]
    if (protocol := results / "robustness_protocol").exists():
        known[:0] = adaptive(list(study.read(protocol, "robustness").values()), _PROTOCOL)
    lines = [
        *_defended(headlines, link),
        *known,
        *_kernels(study.load(results / "benchmark" / "samplers.json", "benchmark")),
    ]
    pages = {"summary": lines, "adaptive": known}
    for name, text in pages.items():
        write_atomically(results / f"{name}.md", "\n".join(text).encode())
    return [*(results / f"{name}.md" for name in pages), picture]


def summary_figure(headlines: list[Headline]) -> Figure:
    """Correct classes under attack: a row per dataset, a point with its interval per defence."""
    figure = new_figure(8, 1.2 + 0.6 * len(headlines))
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
    legend_below(figure, axes, columns=2)
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


def adaptive(
    suites: list[dict[str, Any]], names: Sequence[str] = ("none", "dark_clip", "hmc", "aware")
) -> Iterator[str]:
    """A row per setting and figure: what the worst of all attacks leaves of each defence."""
    every: dict[tuple[Any, ...], list[Entry]] = {}
    targets = list(
        dict.fromkeys(target for suite in suites for target in suite["config"]["targets"])
    )
    for suite in suites:
        config = suite["config"]
        models = [f"{name}_vae" for name in DATASETS]
        place = models.index(config["model"]) if config["model"] in models else len(models)
        for key, report in reports(suite).items():
            target, name = key.split("/")
            entry = Entry(suite, name, report)
            row = (place, config["radius"], targets.index(target), entry.setting)
            every.setdefault(row, []).append(entry)
    found = {row: by_defence(entries) for row, entries in every.items()}
    numbers = sorted({suite["config"]["num_images"] for suite in suites})
    restarts = sorted({suite["config"]["budget"]["num_restarts"] for suite in suites})
    yield (
        "Attackers who know the defence: the worst case per image over all attacks of the suite, "
        "by data set, radius and figure (similarity of reconstructions is `ms_ssim[paper]`), "
        f"{' or '.join(map(str, numbers))} images, {' or '.join(map(str, restarts))} restart(s). "
        "*Clean* is without attack and defence; classes are then read at the encoding of the image."
        + readers(suites)
    )
    yield ""
    rows = []
    for row in sorted(found):
        first = next(iter(found[row].values()))
        config, report = first.config, first.report
        figure = "accuracy" if report["figure"] == "accuracy" else "similarity"
        title = DATASETS.get(config["model"].removesuffix("_vae"), f"`{config['model']}`")
        clean = report["undefended_clean"]["estimate"]
        what = f"{title}, {config['radius']:g}, {figure}{first.unlike}; clean {clean:.2f}"
        rows.append([what, *(worst_case(found[row].get(name)) for name in names)])
    yield from tables.table(["data set, radius, figure", *map(label, names)], rows)
    found_marks = any("*?*" in cell for cells in rows for cell in cells)
    moved = [s for s in suites if any(chained(name) for name in s["config"]["defences"])]
    chains = dict.fromkeys(chain_words(suite["config"]["chain"]) for suite in moved)
    own = f"`MCMCDefence.recommended` runs {chain_words(RECOMMENDED_KERNEL | RECOMMENDED_LENGTHS)}."
    of_chains = f"Chains: {'; '.join(chains)}. {own}" if chains else own
    yield f"{MARKED} {of_chains}" if found_marks else of_chains
    yield ""


def readers(suites: list[dict[str, Any]]) -> str:
    """Who reads classes, where that is not the paper's linear classifier."""
    names = [s["config"].get("classifier") for s in suites]  # older results do not name it
    others = dict.fromkeys(f"`{name}`" for name in names if name is not None)
    return f" Classes are read by {', '.join(others)}." if others else ""


def worst_case(entry: Entry | None) -> str:
    """What the worst of all attacks leaves, with its interval and an unreliable report's mark."""
    if entry is None:
        return tables.NOT_MEASURED
    mark = " *?*" if entry.report["unreliable"] else ""
    return (
        tables.interval(entry.report["robust"]["mean"], 2)
        + mark
        + so_far(entry.report, entry.config)
    )


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
