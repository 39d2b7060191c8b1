"""The robustness report as one HTML file: tables, curves and example images, nothing loaded from
elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from pyro_vae_defence.experiments.defences import colour, label
from pyro_vae_defence.experiments.drawing import interval_curve, legend_below, new_figure
from pyro_vae_defence.robustness.html import INTRODUCTION, details, page, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROBUST = ("robust/mean", "robust/averaged", "robust/worst_of_n")
"""Where a report has its figures under attack."""


def robustness_page(results: Sequence[dict[str, Any]]) -> str:
    """The result files of ``robustness`` as one self-contained page.

    Args:
        results: result files, blocks joined to ``reports``; those of one model that differ in
            nothing else are curves over the radius.

    Raises:
        ValueError: if there is none.
    """
    results = [result for result in results if "reports" in result]
    if not results:
        raise ValueError("results holds no report; run the experiment robustness first")
    results = sorted(results, key=lambda r: (r["config"]["model"], r["config"]["radius"]))
    body = [
        "<h1>Robustness report</h1>",
        INTRODUCTION,
        *_curves(results),
    ]
    for result in results:
        body += _result(result)
    return page(body)


def _curves(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One picture per model, target and setting: the figure against the radius, clean images at
    radius 0.

    All have one scale. What a report that calls itself unreliable says is a hollow point.
    """
    groups: dict[tuple[str, str, str], dict[str, list[tuple[float, dict[str, Any]]]]] = {}
    names: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        config = result["config"]
        apart = ("radius", "defences", "targets")
        alike = repr({field: value for field, value in config.items() if field not in apart})
        for key, report in result["reports"].items():
            target, defence = key.split("/")
            group = config["model"], target, alike
            lines = groups.setdefault(group, {})
            lines.setdefault(defence, []).append((config["radius"], report))
            if result["name"] not in names.setdefault(group, []):
                names[group].append(result["name"])
    for group, lines in groups.items():
        model, target, _ = group
        figure = new_figure(5.6, 4)
        axes = figure.subplots()
        hollow: dict[str, Any] = {"ls": "", "marker": "o", "ms": 7, "mfc": "white", "zorder": 3}
        unreliable = False
        for defence, points in lines.items():
            # The clean figure of a defence that assumes a radius depends on it: that of the
            # smallest.
            entries = [(0.0, points[0][1]["clean"]["mean"])]
            entries += [(radius, report["robust"]["mean"]) for radius, report in points]
            radii, figures = zip(*entries, strict=True)
            interval_curve(axes, radii, figures, label(defence), colour(defence))
            for (radius, report), entry in zip(points, figures[1:], strict=True):
                if report["unreliable"]:
                    unreliable = True
                    axes.plot(radius, entry["estimate"], color=colour(defence), **hollow)
        axes.set(xlabel="radius of the attack (0: clean images)", ylim=(-0.03, 1.03))
        axes.set_ylabel(f"robust {next(iter(lines.values()))[0][1]['figure']}")
        text = "The worst case per image over all attacks, with 95% intervals over images."
        if unreliable:
            axes.plot([], [], color="dimgray", label="unreliable report", **hollow)
            text += " Hollow points are of reports that call themselves unreliable."
        legend_below(figure, axes, columns=2)
        several = sum(other[:2] == group[:2] for other in groups) > 1
        of = f": {', '.join(names[group])}" if several else ""
        yield f"<h2>{escape(model)}, {escape(target)}{escape(of)}</h2>"
        yield f'<p class="note">{text}</p>\n{_svg(figure)}'


def _svg(figure: Figure) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Without a date and with a fixed salt, equal results make equal files.
    with matplotlib.rc_context({"svg.hashsalt": "robustness", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _result(result: dict[str, Any]) -> Iterator[str]:
    config, provenance = result["config"], result["provenance"]
    yield f"<section><h2>robustness {escape(result['name'])}</h2>"
    commit = provenance["commit"][:12]
    classifier = config.get("classifier")  # which results before this setting do not name
    read_by = "" if classifier is None else f", classifier <code>{escape(classifier)}</code>"
    yield (
        f"<p><code>{escape(result['command'])}</code>, commit <code>{escape(commit)}</code>. "
        f"{config['num_images']} images, model <code>{escape(config['model'])}</code>{read_by}, "
        f"seed {config['seed']}.</p>"
    )
    titles = {
        f"{target}, {label(defence)}": report
        for key, report in result["reports"].items()
        for target, defence in [key.split("/")]
    }
    yield summary(titles)
    for title, report in titles.items():
        yield from details(title, report)
    yield "</section>"
