"""Tables and figures of ``compare``, from its result files alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pyro_vae_defence.experiments.compare import UNDEFENDED_READING
from pyro_vae_defence.experiments.config import CONTROLS, defence_spec
from pyro_vae_defence.experiments.defences import label
from pyro_vae_defence.experiments.drawing import interval_curve, write_pages
from pyro_vae_defence.experiments.markdown import interval, row, source


def write_comparison(
    results: str | os.PathLike[str], images: str | os.PathLike[str]
) -> tuple[Path, list[Path]]:
    """Write ``tables.md`` beside the result files of a directory, and their figures into
    ``images``.

    Raises:
        ValueError: if the directory holds no result file.
    """
    return write_pages(results, images, "compare", _figures, section)


def _figures(result: dict[str, Any]) -> dict[str, Figure]:
    """By radius, and by cost where that was measured."""
    by_cost = {"cost": cost_figure(result)} if result["costs"] else {}
    return {"": radius_figure(result), **by_cost}


def section(name: str, result: dict[str, Any], figures: list[str]) -> str:
    """Markdown of one dataset: a table per fully measured radius, ways of classifying, detection,
    figures."""
    config = result["config"]
    clean = ", ".join(f"{task} {_text(value)}" for task, value in result["clean"].items())
    floor = next(iter(result["noise_floor"].values()))
    lines = [
        f"## {name}",
        "",
        f"Model `{config['model']}`; undefended accuracy on clean images: {clean}; noise floor of "
        f"{result['metric']}: {_text(floor)}; seed {config['seed']}.",
        "",
    ]
    for radius in config["full_radii"]:
        cells = result["radii"].get(f"{radius:g}", {})
        if cells:
            lines += _main_table(result, radius, cells)
            lines += _readings_table(radius, cells)
            lines += _detection_table(radius, cells)
    lines += [
        line for figure in figures for line in (f"![{name}: {Path(figure).stem}]({figure})", "")
    ]
    lines += [
        f"{source(result)}.",
        "",
    ]
    return "\n".join(lines)


def _main_table(result: dict[str, Any], radius: float, cells: dict[str, Any]) -> Iterator[str]:
    tasks = list(result["clean"])
    some = next(iter(cells.values()))
    yield f"### Radius {radius:g}"
    yield ""
    yield (
        f"{some['num_attacks']} attacks on {result['config']['num_references']} references, "
        f"{some['num_classified']} images classified (reading `{result['config']['reading']}`; no "
        "defence: by the "
        f"{UNDEFENDED_READING}). 95% intervals over images. "
        f"*Verdict*: against the best control, on {result['metric']} of the mean of draws and on "
        f"correct {tasks[0]} "
        "under attack."
    )
    yield ""
    columns = ["", f"{result['metric']}, one draw", "mean of draws"]
    for task in tasks:
        of = "" if len(tasks) == 1 else f" ({task})"
        columns += [
            f"correct, attacked{of}",
            f"unchanged{of}",
            f"correct, clean{of}",
            f"correct, noise{of}",
        ]
    columns += ["gradients / image", "seconds / image", "verdict"]
    yield row(columns)
    yield row(["---"] * len(columns))
    for name, cell in cells.items():
        values = [label(name), _text(cell["ms_ssim"]), _text(cell["ms_ssim_of_mean"])]
        for task in tasks:
            found = _reading(result, cell, task)
            values += [
                _text(found.get("attacked", {}).get("correct")),
                _text(found.get("attacked", {}).get("unchanged")),
                _text(found["clean"]["correct"]),
                _text(found.get("noise", {}).get("correct")),
            ]
        values += [f"{cell['gradients_per_image']:.0f}", f"{cell['seconds_per_image']:.2g}"]
        yield row([*values, verdict(result, cells, name)])
    yield ""


def verdict(result: dict[str, Any], cells: dict[str, Any], name: str) -> str:
    """Whether a defence beats the best control of its table, on similarity and on accuracy under
    attack.

    *Better* and *worse* are said only where the 95% intervals do not overlap.
    """
    if defence_spec(name).kind in ("none", *CONTROLS):
        return ""
    task = next(iter(result["clean"]))

    def similarity(cell: dict[str, Any]) -> dict[str, float]:
        return cell["ms_ssim_of_mean"]

    def accuracy(cell: dict[str, Any]) -> dict[str, float]:
        return _reading(result, cell, task)["attacked"]["correct"]

    controls = [other for other in cells if defence_spec(other).kind in CONTROLS]
    words = []
    for what, value in (("similarity", similarity), ("accuracy", accuracy)):
        if not controls or "attacked" not in _reading(result, cells[name], task):
            continue
        best = max(controls, key=lambda other: value(cells[other])["estimate"])
        own, other = value(cells[name]), value(cells[best])
        than = label(best).removeprefix("control: ")
        if own["low"] > other["high"]:
            words.append(f"{what}: better than {than}")
        elif own["high"] < other["low"]:
            words.append(f"{what}: **worse** than {than}")
        else:
            words.append(f"{what}: not told apart from {than}")
    return "; ".join(words)


def _readings_table(radius: float, cells: dict[str, Any]) -> Iterator[str]:
    """Correct classes under attack and without, for every way to classify."""
    defended = {name: cell for name, cell in cells.items() if defence_spec(name).kind != "none"}
    if not defended:
        return
    first = next(iter(defended.values()))["accuracy"]
    for task, ways in first.items():
        yield f"Ways to classify ({task}, radius {radius:g}): correct under attack / on clean images."
        yield ""
        yield row(["", *ways])
        yield row(["---"] * (1 + len(ways)))
        for name, cell in defended.items():
            entries = cell["accuracy"][task].values()
            yield row(
                [
                    label(name),
                    *(
                        " / ".join(
                            f"{of[kind]['correct']['estimate']:.3f}"
                            for kind in ("attacked", "clean")
                            if kind in of
                        )
                        for of in entries
                    ),
                ]
            )
        yield ""


def _detection_table(radius: float, cells: dict[str, Any]) -> Iterator[str]:
    """AUROC and false positive rates of every score."""
    rows = [
        [
            label(name),
            score.replace("_", " "),
            *(_text(found[kind][metric]) for kind in found for metric in ("auroc", "fpr_at_tpr")),
        ]
        for name, cell in cells.items()
        for score, found in cell.get("detection", {}).items()
    ]
    if not rows:
        return
    yield f"Telling attacked images from others (radius {radius:g}); *start energy* needs no chain and is the control."
    yield ""
    columns = ["", "score"]
    for kind in ("clean images", "noise of equal radius"):
        columns += [f"AUROC, {kind}", "FPR at 95% TPR"]
    yield row(columns)
    yield row(["---"] * len(columns))
    yield from (row(cells) for cells in rows)
    yield ""


def radius_figure(result: dict[str, Any]) -> Figure:
    """Accuracy under attack and similarity against the attack's radius, a line per defence;
    controls are dashed."""
    task = next(iter(result["clean"]))
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in result["config"]["defences"]:
        found = [(float(r), cells[name]) for r, cells in result["radii"].items() if name in cells]
        if not found:
            continue
        radii = [radius for radius, _ in found]
        accuracy = [_under_attack(result, cell, task) for _, cell in found]
        similarity = [cell["ms_ssim_of_mean"] for _, cell in found]
        for axes, values in ((left, accuracy), (right, similarity)):
            interval_curve(axes, radii, values, label(name))
            if defence_spec(name).kind in CONTROLS:
                axes.lines[-1].set_linestyle("--")
    left.set_ylabel(f"correct {task}")
    right.set_ylabel(f"{result['metric']}, mean of draws")
    for axes in (left, right):
        axes.set_xlabel("radius of the attack")
        axes.set_ylim(0, 1.02)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    return figure


def cost_figure(result: dict[str, Any]) -> Figure:
    """Accuracy and similarity at one radius against gradients per image; what needs none stands at
    0 as a line."""
    radius, task = result["config"]["cost_radius"], next(iter(result["clean"]))
    free = {
        name: cell
        for name, cell in result["radii"].get(f"{radius:g}", {}).items()
        if defence_spec(name).kind in ("none", "dark_clip", "median")
    }
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, quality in zip(
        figure.subplots(1, 2), (f"correct {task}", result["metric"]), strict=True
    ):

        def value(cell: dict[str, Any], quality: str = quality) -> dict[str, float]:
            if quality == result["metric"]:
                return cell["ms_ssim_of_mean"]
            return _under_attack(result, cell, task)

        families: dict[str, list[dict[str, Any]]] = {}
        for name, cell in result["costs"].items():
            families.setdefault(name.partition("@")[0], []).append(cell)
        for name, cells in families.items():
            values = [value(cell) for cell in cells]
            gradients = [cell["gradients_per_image"] for cell in cells]
            interval_curve(axes, gradients, values, label(name))
        for number, (name, cell) in enumerate(free.items()):
            axes.axhline(
                value(cell)["estimate"], ls="--", lw=1, color=f"C{4 + number}", label=label(name)
            )
        axes.set_xlabel(f"gradients per image, radius {radius:g}")
        axes.set_ylabel(quality)
        axes.set_ylim(0, 1.02)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _reading(result: dict[str, Any], cell: dict[str, Any], task: str) -> dict[str, Any]:
    """Kind of images -> accuracies, in the reading of the main table."""
    found = cell["accuracy"][task]
    return found.get(result["config"]["reading"]) or found[UNDEFENDED_READING]


def _under_attack(result: dict[str, Any], cell: dict[str, Any], task: str) -> dict[str, float]:
    found = _reading(result, cell, task)
    return found.get("attacked", found["clean"])["correct"]


def _text(entry: dict[str, float] | None) -> str:
    return "" if entry is None else interval(entry)
