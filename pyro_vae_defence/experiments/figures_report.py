"""Tables and pictures of ``figures``, from its result files alone."""

from __future__ import annotations

import base64
import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from pyro_vae_defence.experiments.drawing import interval_curve, write_pages
from pyro_vae_defence.experiments.figures import KINDS
from pyro_vae_defence.experiments.markdown import interval, row, source

_ATTACKERS = {
    "without_mcmc": "does not know the defence",
    "with_mcmc": "knows the defence",
}
_DEFENCES = {"undefended": "no defence", "defended": "HMC"}
_SHOWN = {"images": "image", "undefended": "no defence", "defended": "HMC"}

# (attacker, reconstructions) -> where the paper shows it.
_PANELS = {
    ("without_mcmc", "undefended"): "Figure 10 (a)",
    ("without_mcmc", "defended"): "Figures 10 (b), 5 (a)",
    ("with_mcmc", "undefended"): "not in the paper",
    ("with_mcmc", "defended"): "Figures 11, 5 (b)",
}


class _Measure(NamedTuple):
    """A quantity of cells: its key, what it is called, where a successful attack moves it, how it
    is printed."""

    key: str
    title: str
    direction: str
    digits: int = 3

    def of(self, cell: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Name of the reconstruction or ``""`` -> entry, as the cell has it."""
        name, _, part = self.key.partition("/")
        found = cell.get(name, {})
        if part:
            return {"": found[part]} if found else {}
        if "estimate" in found:
            return {"": found}
        return {key: entry for key, entry in found.items() if key != "images"}


_MEASURES = (
    _Measure("ms_ssim/images", "images: reference, attacked", "↑"),
    _Measure("ms_ssim", "reconstructions: reference, attacked", "↓"),
    _Measure("symmetric_kl", "symmetric KL to the reference (nats)", "↑", 1),
    _Measure("unchanged", "class unchanged", "↓"),
    _Measure("target_ms_ssim", "reconstructions: target, attacked", "↑"),
    _Measure("target_symmetric_kl", "symmetric KL to the target (nats)", "↓", 1),
)


def write_figures(
    results: str | os.PathLike[str], images: str | os.PathLike[str]
) -> tuple[Path, list[Path]]:
    """Write ``tables.md`` beside the result files of a directory, and their figures into
    ``images``.

    Raises:
        ValueError: if the directory holds no result file.
    """
    return write_pages(
        results,
        images,
        "figures",
        lambda result: {what: draw(result) for what, draw in _FIGURES.items()},
        lambda _, result, links: section(result, links),
    )


# --- Tables ---------------------------------------------------------------------------------------


def section(result: dict[str, Any], figures: list[str] | None = None) -> str:
    """Markdown of one result: budgets, figures, a table per section."""
    config = result["config"]
    lines = [
        f"## {result['experiment'].removeprefix('figures ')}",
        "",
        f"{config['num_images']} images, model `{config['model']}`, seed {config['seed']}; L_inf "
        "balls. Every attack: "
        f"{config['num_steps']} steps of {config['engine']} from one random start. Defence: one "
        "HMC chain per image on "
        f"the paper's target, {config['warmup_steps']} + {config['num_samples']} transitions of "
        f"{config['leapfrog_steps']} leapfrog steps on average, whitened; its last draw is "
        "decoded, classes are read "
        f"by `{config['reading']}`. {result['metric']} of reconstructions is to one undefended "
        "draw at the "
        "reference. 95% intervals over images. Heuristic, not certified.",
        "",
        *(line for figure in figures or () for line in (f"![{Path(figure).stem}]({figure})", "")),
        *_knowledge_table(result),
        *_objectives_tables(result),
        f"{source(result)}.",
        "",
    ]
    return "\n".join(lines)


def _knowledge_table(result: dict[str, Any]) -> Iterator[str]:
    config = result["config"]
    yield "### Attackers with and without knowledge of the defence (Figures 5, 10, 11)"
    yield ""
    yield (
        f"Both maximise eq. 64, the one without knowledge over {config['num_chains']} draws of "
        "the guide per image and "
        f"step, the other over {config['num_chains']} chains, which go on from the last step for "
        f"{config['persistent_transitions']} transition(s), by each of the gradients "
        f"{', '.join(config['gradients'])}, "
        "of whose results the one with the largest objective on fresh chains is kept, image by "
        "image."
    )
    yield ""
    metric = result["metric"]
    columns = [
        "radius",
        "attacker",
        f"{metric}: images",
        "reconstructions, no defence",
        "reconstructions, HMC",
        "class unchanged, no defence",
        "class unchanged, HMC",
        "symmetric KL (nats)",
        "seconds per image of the attack",
        "best gradient, images",
    ]
    yield row(columns)
    yield row(["---"] * len(columns))
    yield row(["0", "none", *_values(result["clean"]["reference"]), "", ""])
    for radius, cells in result["knowledge"].items():
        for attacker, cell in cells.items():
            seconds = f"{cell['attack_seconds_per_image']:.2g}"
            strongest = ", ".join(f"{name} {count}" for name, count in cell["strongest"].items())
            yield row([radius, _ATTACKERS[attacker], *_values(cell), seconds, strongest])
    yield ""


def _values(cell: dict[str, Any]) -> list[str]:
    """Similarities, classes and divergence as :func:`_knowledge_table` orders them."""
    return [
        *(interval(cell["ms_ssim"][name]) for name in _SHOWN),
        *(interval(cell["unchanged"][name]) for name in _DEFENCES),
        interval(cell["symmetric_kl"], 1),
    ]


def _objectives_tables(result: dict[str, Any]) -> Iterator[str]:
    yield "### Objectives (Figure 16)"
    yield ""
    for radius, kinds in result["objectives"].items():
        for kind, cells in kinds.items():
            if not cells:
                continue
            yield f"Radius {radius}, {kind}; arrows show where a successful attack moves a figure."
            yield ""
            some = next(iter(cells.values()))
            columns = ["objective"]
            for measure in _MEASURES:
                columns += [
                    f"{measure.title}{f', {_DEFENCES[name]}' if name else ''} {measure.direction}"
                    for name in measure.of(some)
                ]
            yield row(columns)
            yield row(["---"] * len(columns))
            for name, cell in cells.items():
                values = [
                    interval(entry, measure.digits)
                    for measure in _MEASURES
                    for entry in measure.of(cell).values()
                ]
                yield row([_label(name), *values])
            yield ""


def _label(objective: str) -> str:
    return objective.replace("_", " ").replace("kl", "KL").replace("wass", "Wass")


# --- Figures --------------------------------------------------------------------------------------


def knowledge_figure(result: dict[str, Any]) -> Figure:
    """Similarity of images (blue) and reconstructions (orange) over the radius (Figures 5, 10 and
    11)."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for axes, ((attacker, defence), place) in zip(panels, _PANELS.items(), strict=True):
        found = {0.0: result["clean"]["reference"]} | {
            float(radius): cells[attacker]
            for radius, cells in result["knowledge"].items()
            if attacker in cells
        }
        for name, label in (("images", "images"), (defence, "reconstructions")):
            entries = [cell["ms_ssim"][name] for cell in found.values()]
            interval_curve(axes, list(found), entries, label)
        floor = result["clean"]["reference"]["ms_ssim"]["undefended"]["estimate"]
        axes.axhline(floor, color="black", lw=0.8, ls=":", label="two draws at the reference")
        axes.set_title(
            f"attacker {_ATTACKERS[attacker]}; {_DEFENCES[defence]}\n({place})", fontsize=9
        )
        axes.set_ylim(0, 1.02)
    for axes in figure.axes[2:]:
        axes.set_xlabel("radius of the attack")
    for axes in figure.axes[::2]:
        axes.set_ylabel(result["metric"])
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def examples_figure(result: dict[str, Any]) -> Figure:
    """Attacked images over the radius and their reconstructions, a row of panels per attacker
    (Figure 12)."""
    number = result["config"]["num_examples"]
    width, height = 0.6 * number + 0.1, 0.6 * len(_SHOWN) + 0.35
    columns = {"reference": dict.fromkeys(_ATTACKERS, result["clean"]["reference"])}
    columns |= {f"radius {radius}": cells for radius, cells in result["knowledge"].items()}
    figure = Figure(
        figsize=(len(columns) * width + 1, len(_ATTACKERS) * height), layout="constrained"
    )
    grid = figure.subplots(len(_ATTACKERS), len(columns), squeeze=False)
    for panels, (attacker, title) in zip(grid, _ATTACKERS.items(), strict=True):
        for axes, (column, cells) in zip(panels, columns.items(), strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(column, fontsize=7)
            if attacker in cells:
                pixels = imread(io.BytesIO(base64.b64decode(cells[attacker]["examples"])))
                axes.imshow(pixels)
        tile = pixels.shape[0] / len(_SHOWN)
        centres = [(place + 0.5) * tile for place in range(len(_SHOWN))]
        panels[0].set_yticks(centres, list(_SHOWN.values()), fontsize=7)
        panels[0].set_ylabel(f"attacker\n{title}", fontsize=8)
    return figure


def objectives_figure(result: dict[str, Any]) -> Figure:
    """What each objective does to each metric (Figure 16): a panel per metric, a row of them per
    kind of attack."""
    objectives = result["config"]["objectives"]
    figure = Figure(figsize=(3 * len(_MEASURES), 7), layout="constrained")
    grid = figure.subplots(len(KINDS), len(_MEASURES), sharey=True, squeeze=False)
    for kind, panels in zip(KINDS, grid, strict=True):
        for measure, axes in zip(_MEASURES, panels, strict=True):
            series = _series(result, kind, measure)
            if not series:
                axes.set_axis_off()
                continue
            for number, (label, one) in enumerate(series.items()):
                shift = 0.6 * ((number + 0.5) / len(series) - 0.5)
                low, estimate, high = (
                    torch.tensor([entry[key] for entry in one.entries])
                    for key in ("low", "estimate", "high")
                )
                axes.errorbar(
                    estimate,
                    [place + shift for place in one.places],
                    xerr=torch.stack([estimate - low, high - estimate]).clamp(min=0),
                    fmt=one.marker,
                    color=one.color,
                    ms=4,
                    lw=1,
                    label=label,
                )
            axes.set_title(f"{measure.title} {measure.direction}", fontsize=8)
        panels[0].set_yticks(range(len(objectives)), [_label(name) for name in objectives])
        panels[0].set_ylabel(kind)
        panels[0].set_ylim(len(objectives) - 0.5, -0.5)
    # The first panel with both defences.
    handles = grid[0, 1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8)
    return figure


class _Series(NamedTuple):
    """Points of one radius and defence: number of the objective and its entry."""

    color: str
    marker: str
    places: list[int]
    entries: list[dict[str, float]]


def _series(result: dict[str, Any], kind: str, measure: _Measure) -> dict[str, _Series]:
    """Label -> points; what an interrupted run lacks is left out."""
    found: dict[str, _Series] = {}
    markers = itertools.cycle("os^vD")
    for (radius, kinds), marker in zip(result["objectives"].items(), markers):
        for place, objective in enumerate(result["config"]["objectives"]):
            for name, entry in measure.of(kinds.get(kind, {}).get(objective, {})).items():
                label = ", ".join(filter(None, (_DEFENCES.get(name), f"radius {radius}")))
                color = {"undefended": "C0", "defended": "C1"}.get(name, "black")
                one = found.setdefault(label, _Series(color, marker, [], []))
                one.places.append(place)
                one.entries.append(entry)
    return found


_FIGURES = {
    "knowledge": knowledge_figure,
    "examples": examples_figure,
    "objectives": objectives_figure,
}
