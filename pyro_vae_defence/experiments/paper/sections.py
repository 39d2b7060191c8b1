r"""What is made of result files for an item of the paper: a table or picture, and its words.

A printed number stands beside the measured one of the same model, defence, measure and radius, with
their difference. Its interval is a normal one of 95%,

.. math:: d \pm 1.96 \sqrt{s_1^2 + s_2^2},

of the printed standard error and ours over references; where none is printed, of ours alone. A
share of 0 or 1 whose error is 0, since all references agree, has a Wilson interval over their
number in place of :math:`1.96 s`.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pyro_vae_defence.defence.mcmc import PAPER_SETTINGS
from pyro_vae_defence.experiments import tables
from pyro_vae_defence.experiments.benchmark.seconds import BenchmarkSeconds
from pyro_vae_defence.experiments.drawing import (
    interval_curve,
    legend_below,
    new_figure,
    save_figure,
)
from pyro_vae_defence.experiments.evaluate import MSE, nll_name
from pyro_vae_defence.experiments.paper.claims import result
from pyro_vae_defence.experiments.paper.printed import (
    TABLE_4,
    Printed,
    corrected,
    printed,
    quoted,
)
from pyro_vae_defence.experiments.published import ENCODER, Published, fallback, references_of
from pyro_vae_defence.experiments.study import METRIC
from pyro_vae_defence.experiments.train import DATASETS, MODELS, model_label
from pyro_vae_defence.models import ConvVAE

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

Section = Callable[[Path, Path], list[str]]
"""Lines of Markdown from the directories of all results and of pictures, which it draws."""

_Z = 1.96  # a normal interval of 95%
_PRINTED_REFERENCES = 50  # of the paper's attacks, by its Table 8
NOTHING = "Nothing is measured yet."


# --- Printed numbers and ours ---------------------------------------------------------------------


class Difference(NamedTuple):
    """Ours less what is printed, and its interval."""

    estimate: float
    low: float
    high: float


def standard_error(entry: Mapping[str, float]) -> float:
    """That of an entry of a result file, from its interval where it has none."""
    found = entry.get("standard_error")
    return (entry["high"] - entry["low"]) / (2 * _Z) if found is None else found


def difference(
    each: Printed, entry: Mapping[str, float], num_references: int = _PRINTED_REFERENCES
) -> Difference:
    """Of a printed number and ours.

    Args:
        each: what is printed.
        entry: ours, of a result file.
        num_references: over how many references ours is.
    """
    share = each.measure in ("class", "color")
    value, printed_value = entry["estimate"], float(each.value)
    ours = _margins(value, standard_error(entry), num_references, share)
    error = float(each.standard_error or 0)
    theirs = _margins(printed_value, error, _PRINTED_REFERENCES, share and each.standard_error)
    found = value - printed_value
    return Difference(
        found, found - math.hypot(ours[0], theirs[1]), found + math.hypot(ours[1], theirs[0])
    )


def _margins(value: float, error: float, number: int, share: object) -> tuple[float, float]:
    """How far an interval goes below and above a value; ``error`` is its standard error."""
    if share and error == 0 and value in (0, 1):
        beyond = _Z**2 / (number + _Z**2)
        return (beyond, 0.0) if value == 1 else (0.0, beyond)
    return _Z * error, _Z * error


class Ours(NamedTuple):
    """A measured number, and the result it stands in."""

    entry: dict[str, float]
    result: dict[str, Any]


def _under_attack(results: Path, each: Printed) -> Ours | None:
    """Ours of an entry of Tables 2, 3 and 4."""
    found = result(results, "published", each.model)
    clean = each.at in ("", "0")
    what = ENCODER if clean or each.measure == "ms_ssim" else each.measure
    places = {"ms_ssim": "ms_ssim", "mse": "mse"}
    asked = "correct" if clean else "unchanged"
    place = places.get(each.measure, f"accuracy/{each.measure}/{asked}")
    entry = tables.at(found, f"radii/{each.at or '0'}/{what}/{each.defence}/{place}")
    return Ours(entry, found) if found and entry else None


def _of_test_set(results: Path, each: Printed) -> Ours | None:
    """Ours of an entry of Table 7, of the full test set if that is there."""
    for name in (f"{each.model}_full", each.model):
        if found := result(results, "evaluate", name):
            samples = found["config"]["num_samples"]
            place = {"nll": nll_name(samples), "mse": MSE}.get(each.measure, "")
            entry = found["metrics"].get(place)
            return Ours(entry, found) if entry else None
    return None


_MEASURES = {
    "ms_ssim": METRIC, "class": "class", "color": "colour", "mse": "MSE", "nll": "NLL (nats)",
}  # fmt: skip


def compared(item: str, find: Callable[[Path, Printed], Ours | None]) -> Section:
    """A line per printed number of a table that is measured here; what is not is counted."""

    def section(results: Path, images: Path) -> list[str]:
        rows, without, inside, number, alone = [], 0, 0, 0, 0
        sources: dict[str, dict[str, Any]] = {}
        for one in printed():
            if one.item != item or one.measure not in _MEASURES:
                continue
            ours = find(results, one)
            if ours is None:
                without += 1
                continue
            each = corrected(one)
            sources[ours.result["name"]] = ours.result
            references = ours.result["config"].get("num_references", _PRINTED_REFERENCES)
            found = difference(each, ours.entry, references)
            if not quoted(each):
                number += 1
                inside += found.low <= 0 <= found.high
                alone += not each.standard_error
            digits = 1 if each.measure in ("mse", "nll") else 2
            at = {"": "", "0": ", clean"}.get(each.at, f", radius {each.at}")
            said = each.value + (f" ({each.standard_error})" if each.standard_error else "")
            if each != one:
                said += f" of Table 4; here {one.value}, which is MNIST's"
            if quoted(each):
                said += ", quoted"
            rows.append(
                [
                    _line(each),
                    f"{_MEASURES[each.measure]}{at}",
                    said,
                    tables.interval(ours.entry, digits),
                    tables.interval(found._asdict(), digits),
                ]
            )
        if not rows:
            return [NOTHING, ""]
        columns = ["", "", "printed (standard error)", "ours", "ours − printed"]
        said = f"Of {number} printed numbers that are measured, ours differs from "
        said += f"{number - inside} by more than chance (95%)."
        if alone:
            said += f" For {alone} no error is printed, and their intervals have ours alone."
        if len(rows) > number:
            said += f" {len(rows) - number} that the paper quotes from Cemgil et al., of another "
            said += "protocol, are not counted."
        if without:
            said += f" {without} are not measured yet."
        return [
            *[said, "", *_measured_on(sources.values())],
            *tables.folded("All of them", tables.table(columns, rows)),
            *tables.sources(sources.values()),
        ]

    return section


def _measured_on(results: Iterable[dict[str, Any]]) -> list[str]:
    """On which images results of ``published`` are, and how their chains were run."""
    by_words: dict[str, list[str]] = {}
    for each in results:
        if each["study"] == Published.kind:
            words = f"{references_of(each)}.{fallback(each)}"
            by_words.setdefault(words, []).append(f"`{each['name']}`")
    lines = [f"- {', '.join(names)}: {words}" for words, names in by_words.items()]
    return [*lines, ""] if lines else []


def _line(each: Printed) -> str:
    name = f"{DATASETS[MODELS[each.model].dataset]}, {model_label(each.model)}"
    return f"{name} + HMC" if each.defence == "hmc" else name


# --- Pictures -------------------------------------------------------------------------------------


def drawn(name: str, alt: str, draw: Callable[[Path], Figure | None]) -> Section:
    """A picture of result files, where they are there."""

    def section(results: Path, images: Path) -> list[str]:
        figure = draw(results)
        if figure is None:
            return [NOTHING, ""]
        path = images / f"paper_{name}.png"
        save_figure(figure, path)
        return [f"![{alt}]({path})", ""]

    return section


def _published(results: Path, names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Results of ``published`` that are there, by their titles."""
    found = {title: result(results, "published", name) for name, title in names.items()}
    return {title: each for title, each in found.items() if each}


def _plain(what: str) -> dict[str, str]:
    """Name of each dataset's result -> what the dataset is called."""
    return {f"{dataset}_{what}": title for dataset, title in DATASETS.items()}


def _rows(entry: str, number: int) -> list[np.ndarray]:
    """The rows of images in a picture of a result file."""
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(base64.b64decode(entry)))
    side = (pixels.shape[0] - 1) // number
    return [pixels[row * side : (row + 1) * side + 1] for row in range(number)]


def examples_figure(results: Path) -> Figure | None:
    """References, attacked images and reconstructions, a panel per dataset, and of the NVAE that
    is attacked in all of its groups (Figure 3)."""
    found = _published(results, _plain("vae"))
    cells = {title: tables.at(each, f"radii/0.1/{ENCODER}") or {} for title, each in found.items()}
    if hierarchy := result(results, "nvae", "mnist_nvae_radius_0.1"):
        most = max(hierarchy["groups"], key=int, default="")
        cells["MNIST, NVAE"] = tables.at(hierarchy, f"groups/{most}/defences") or {}
    cells = {
        title: cell
        for title, cell in cells.items()
        if all("examples" in cell.get(name, {}) for name in ("none", "hmc"))
    }
    if not cells:
        return None
    import numpy as np

    titles = ("reference", "its reconstruction", "attacked", "reconstruction", "behind HMC")
    figure = new_figure(3 * len(cells) + 2, 3.2)
    panels = figure.subplots(1, len(cells), squeeze=False)[0]
    for axes, (title, cell) in zip(panels, cells.items(), strict=True):
        rows = [*_rows(cell["none"]["examples"], 4), _rows(cell["hmc"]["examples"], 4)[3]]
        axes.imshow(np.concatenate(rows))
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[])
    step = rows[0].shape[0]
    panels[0].set_yticks([(row + 0.5) * step for row in range(5)], titles, fontsize=9)
    return figure


def radii_images_figure(results: Path) -> Figure | None:
    """Attacked images over the radius, a panel per dataset (Figure 14)."""
    import numpy as np

    found = _published(results, _plain("radii"))
    panels = {}
    for title, each in found.items():
        over = _over_radii(each)
        columns = [(r, _rows(cell["examples"], 4)[2]) for r, cell in over if "examples" in cell]
        if columns:
            panels[title] = columns
    if not panels:
        return None
    figure = new_figure(8, 1.1 * len(panels) + 0.4)
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (title, columns) in zip(grid, panels.items(), strict=True):
        width = columns[0][1].shape[0]
        shown = [pixels[:, : 2 * width - 1] for _, pixels in columns]  # two images of each
        axes.imshow(np.concatenate(shown, 1))
        step = shown[0].shape[1]
        axes.set_xticks([(k + 0.5) * step for k in range(len(columns))], [r for r, _ in columns])
        axes.set_yticks([])
        axes.set_ylabel(title, fontsize=9)
    grid[-1].set_xlabel("radius of the attack")
    return figure


def _over_radii(each: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Undefended cells of attacks on the encoder, by radius."""
    cells = {radius: what.get(ENCODER, {}).get("none") for radius, what in each["radii"].items()}
    return [(radius, cells[radius]) for radius in sorted(cells, key=float) if cells[radius]]


def radii_figure(results: Path) -> Figure | None:
    """Similarities over the radius: images (a), reconstructions (b); Figure 13."""
    found = _published(results, _plain("radii"))
    if not found:
        return None
    figure = new_figure(8, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    places = {"ms_ssim_images": "reference and attacked image", "ms_ssim": "reconstructions"}
    for axes, (place, title) in zip(panels, places.items(), strict=True):
        for name, each in found.items():
            over = _over_radii(each)
            entries = [cell[place] for _, cell in over]
            interval_curve(axes, [float(radius) for radius, _ in over], entries, name)
        axes.set(xlabel="radius of the attack", title=title, ylim=(0, 1.02))
    panels[0].set_ylabel(METRIC)
    legend_below(figure, panels[0])
    return figure


def _chains(results: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Dataset and cells at radius 0.1 of the longest chain that is measured: on the encoder and on
    the classifier; and their result."""
    for dataset, title in DATASETS.items():
        for name in (f"{dataset}_transitions", f"{dataset}_vae"):
            found = result(results, "published", name)
            sets = tables.at(found, "radii/0.1") or {}
            cells = [sets.get(what, {}).get("hmc") for what in (ENCODER, "class")]
            if found and all(cells):
                yield title, cells[0], cells[1], found
                break


def transitions_figure(results: Path) -> Figure | None:
    """Similarity and unchanged classes over the number of transitions (Figure 15)."""
    found = list(_chains(results))
    if not found:
        return None
    figure = new_figure(8, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    for title, on_encoder, on_classifier, _ in found:
        for axes, cell, place in zip(
            panels,
            (on_encoder, on_classifier),
            ("ms_ssim", "accuracy/class/unchanged"),
            strict=True,
        ):
            read = cell["transitions"]
            entries = [tables.at(entry, place) for entry in read.values()]
            interval_curve(axes, [int(count) for count in read], entries, title)
    for axes, title in zip(panels, (METRIC, "class unchanged"), strict=True):
        axes.set(xlabel="transitions, T // 2 + T of the paper's T", title=title, ylim=(0, 1.02))
        axes.set_xscale("symlog", linthresh=5)
        axes.axvspan(0, 300, color="gray", alpha=0.1, lw=0)  # the paper shows T up to 200
    legend_below(figure, panels[0])
    return figure


def seconds_figure(results: Path) -> Figure | None:
    """Similarity against seconds per image (Figure 6): a point per number of transitions."""
    found = list(_chains(results))
    if not found:
        return None
    figure = new_figure(5, 3.6)
    axes = figure.subplots()
    for title, cell, *_ in found:
        read = cell["transitions"]
        last = max(map(int, read))
        seconds = [cell["seconds_per_image"] * int(count) / last for count in read]
        interval_curve(axes, seconds, [entry["ms_ssim"] for entry in read.values()], title)
    axes.set(xlabel="seconds per image", ylabel=METRIC, ylim=(0, 1.02))
    legend_below(figure, axes)
    return figure


def gains_figure(results: Path, measure: str) -> Figure | None:
    """From no defence to HMC, ours and printed, a panel per dataset and radius (Figures 8, 9)."""
    tasks = [(dataset, measure) for dataset in DATASETS]
    if measure == "class":
        tasks.append(("color_mnist", "color"))
    kinds = [name.removeprefix("mnist_") for name in TABLE_4 if name.startswith("mnist_")]
    figure = new_figure(2.4 * len(tasks), 5)
    grid = figure.subplots(2, len(tasks), sharey=True, squeeze=False)
    any_found = False
    for line, radius in zip(grid, ("0.1", "0.2"), strict=True):
        for axes, (dataset, of) in zip(line, tasks, strict=True):
            for place, kind in enumerate(kinds):
                for which, colour, shift in (
                    ("printed", "gray", 0.12),
                    ("ours", "tab:blue", -0.12),
                ):
                    ends = [
                        _end(results, f"{dataset}_{kind}", defence, of, radius, which)
                        for defence in ("none", "hmc")
                    ]
                    if None in ends:
                        continue
                    any_found |= which == "ours"
                    x = place + shift
                    arrow = {"arrowstyle": "->", "color": colour, "lw": 1.6}
                    axes.annotate("", (x, ends[1]), (x, ends[0]), arrowprops=arrow)
                    axes.plot([x], [ends[0]], "o", color=colour, ms=3, label=which)
            axes.set_xticks(range(len(kinds)), [model_label(f"mnist_{kind}") for kind in kinds])
            axes.tick_params(axis="x", labelsize=7, rotation=20)
            title = DATASETS[dataset] + (", colour" if of == "color" else "")
            axes.set_title(f"{title}, radius {radius}", fontsize=9)
            axes.set(ylim=(0, 1.02), xlim=(-0.5, len(kinds) - 0.5))
    for line in grid:
        line[0].set_ylabel(METRIC if measure == "ms_ssim" else "class unchanged")
    legend_below(figure, *figure.axes, columns=2)
    return figure if any_found else None


def _end(
    results: Path, model: str, defence: str, measure: str, radius: str, which: str
) -> float | None:
    """One end of an arrow."""
    if which == "printed":
        return tables.at(TABLE_4[model], f"{defence}/{measure}/{radius}")
    each = Printed("table_4", model, defence, measure, radius, "0", "")
    ours = _under_attack(results, each)
    return None if ours is None else ours.entry["estimate"]


# --- Tables of their own --------------------------------------------------------------------------

_MODE = {
    "none": "no defence",
    "mode": "mode of the paper's target, L-BFGS",
    "hmc": "HMC on it",
    "aware_mode": "mode, perturbation-aware",
    "aware": "HMC, perturbation-aware",
}


def mode_section(results: Path, images: Path) -> list[str]:
    """Mode against chain on both targets, from the results of ``compare`` (appendix B.3)."""
    rows, sources = [], []
    for dataset, title in DATASETS.items():
        found = result(results, "compare", dataset)
        if found is None:
            continue
        sources.append(found)
        reading = found["config"]["reading"]
        for radius in ("0.1", "0.2"):
            for name, label in _MODE.items():
                cell = tables.at(found, f"radii/{radius}/{name}")
                if cell is None:
                    continue
                how = reading if reading in cell["accuracy"]["class"] else "guide's mean"
                rows.append(
                    [
                        f"{title}, radius {radius}",
                        label,
                        tables.interval(cell["ms_ssim"]),
                        tables.interval(cell["accuracy"]["class"][how]["attacked"]["correct"], 2),
                        f"{cell['gradients_per_image']:.0f}",
                    ]
                )
    if not rows:
        return [NOTHING, ""]
    columns = ["", "", METRIC, "classes correct", "gradients per image"]
    return [*tables.table(columns, rows), *tables.sources(sources)]


def seconds_section(results: Path, images: Path) -> list[str]:
    """Table 5 from the benchmark, and what the protocol's own runs took."""
    lines = []
    if benchmark := result(results, "benchmark", "seconds"):
        lines += BenchmarkSeconds.section(benchmark, []).splitlines()[2:]
    rows = []
    for title, cell, _, found in _chains(results):
        last = max(map(int, cell["transitions"]))
        seconds = cell["seconds_per_image"]
        config = found["config"]
        batch = config["num_references"] * config["num_restarts"]
        rows.append(
            [
                title,
                f"{batch} images on {found['provenance'].get('device', 'a CPU')}",
                f"{last:,}",
                f"{seconds:.3g}",
                f"{seconds / last:.3g}",
            ]
        )
    if rows:
        lines += ["The published chain in the runs of `published`, all images at once:", ""]
        columns = ["", "at once", "transitions", "seconds per image", "per transition"]
        lines += tables.table(columns, rows)
    return lines or [NOTHING, ""]


def architecture_section(results: Path, images: Path) -> list[str]:
    """Table 6 from the model itself."""
    grey, colour = ConvVAE(), ConvVAE(3)
    rows = []
    layers = zip(grey.named_modules(), colour.modules(), strict=True)
    for (name, one), other in layers:
        if not list(one.children()):  # a layer
            differs = "" if str(one) == str(other) else f"`{other}`"
            rows.append([name, f"`{one}`", differs])
    count = sum(parameter.numel() for parameter in grey.parameters())
    said = f"{grey.latent_dim} latents, {count:,} parameters; printed here from the model."
    return [said, "", *tables.table(["", "grey images", "in colour, where it differs"], rows)]


def settings_section(results: Path, images: Path) -> list[str]:
    """Table 8 from the presets, beside what is printed."""
    fields = ("num_transitions", "step_size", "num_steps", "adaptive")
    rows = []
    for name, preset in PAPER_SETTINGS.items():
        model = name if name.endswith("_nvae") else f"{name}_vae"
        of_paper = {p.measure: p.value for p in printed() if p[:3] == ("table_8", model, "hmc")}
        for field in fields:
            value = getattr(preset, field)
            rows.append(
                [
                    name,
                    field,
                    of_paper.get(field, ""),
                    f"{value:g}" if field != "adaptive" else str(value),
                ]
            )
    return tables.table(["", "of MCMCDefence.paper", "printed", "preset"], rows)


SECTIONS: dict[str, Section] = {
    "figure_3": drawn(
        "figure_3",
        "A panel of five examples per dataset, and one of MNIST by an NVAE, as far as they are "
        "measured: rows of references, their reconstructions, attacked images, reconstructions of "
        "these without a defence and behind HMC.",
        examples_figure,
    ),
    "table_2": compared("table_2", _under_attack),
    "table_3": compared("table_3", _under_attack),
    "figure_6": drawn(
        "figure_6", "Similarity over seconds per image, a curve per dataset.", seconds_figure
    ),
    "table_4": compared("table_4", _under_attack),
    "figure_8": drawn(
        "figure_8",
        "Arrows from the similarity without a defence to that behind HMC, ours blue, printed gray.",
        lambda results: gains_figure(results, "ms_ssim"),
    ),
    "figure_9": drawn(
        "figure_9",
        "Arrows from the share of unchanged classes without a defence to that behind HMC, ours "
        "blue, printed gray.",
        lambda results: gains_figure(results, "class"),
    ),
    "figure_13": drawn(
        "figure_13",
        "Two panels over the radius of the attack, a curve per dataset: similarity of reference "
        "and attacked image, and of their undefended reconstructions.",
        radii_figure,
    ),
    "figure_14": drawn(
        "figure_14",
        "Two attacked images per dataset and radius, from 0 to 0.5.",
        radii_images_figure,
    ),
    "figure_15": drawn(
        "figure_15",
        "Similarity and share of unchanged classes over the number of transitions, a curve per "
        "dataset; what the paper shows, up to T = 200 or 300 transitions, is shaded.",
        transitions_figure,
    ),
    "appendix_b_3": mode_section,
    "table_5": seconds_section,
    "table_6": architecture_section,
    "table_7": compared("table_7", _of_test_set),
    "table_8": settings_section,
}  # fmt: skip
"""Items of which something is made here, beside the tables and figures of their studies."""
