"""The robustness report as one HTML file: tables, curves and example images, nothing loaded from
elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pyro_vae_defence.experiments.drawing import interval_curve
from pyro_vae_defence.experiments.tables import interval, intervals

EXAMPLES = ("reference", "attacked", "defended")
"""Rows of a report's picture of examples, from the top."""

ROBUST = ("robust/mean", "robust/averaged", "robust/worst_of_n")
"""Where a report has its figures under attack."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { font-weight: 600; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bad { color: #a40000; } .good { color: #1a6b1a; } .note { color: #555; }
section { border-top: 2px solid #1c1c1c; margin-top: 2.5rem; }
img.examples { image-rendering: pixelated; max-width: 100%; }
"""  # noqa: E501


def robustness_page(results: Sequence[dict[str, Any]]) -> str:
    """The result files of ``robustness`` as one self-contained page.

    Args:
        results: result files, blocks joined to ``reports``; those of the same model are curves over
            the radius.

    Raises:
        ValueError: if there is none.
    """
    results = [result for result in results if "reports" in result]
    if not results:
        raise ValueError("results holds no report; run the experiment robustness first")
    results = sorted(results, key=lambda r: (r["config"]["model"], r["config"]["radius"]))
    body = [
        "<h1>Robustness report</h1>",
        "<p>Figures are means over images with 95% bootstrap intervals; higher is more robust. "
        "<em>Robust</em> is the per-image worst case over all attacks, scored on seeds that no "
        "attack has seen. "
        "What attacks leave is an upper bound of the true robustness: heuristic, not certified. "
        "A report whose checks fail, or that only transfer attacks have tested, is marked "
        "unreliable.</p>",
        *_curves(results),
    ]
    for result in results:
        body += _result(result)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Robustness '
        "report</title>"
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _curves(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One picture per model and target: the figure against the radius, clean images at radius 0."""
    groups: dict[tuple[str, str], dict[str, list[tuple[float, dict[str, Any]]]]] = {}
    for result in results:
        for key, report in result["reports"].items():
            target, defence = key.split("/")
            lines = groups.setdefault((result["config"]["model"], target), {})
            lines.setdefault(defence, []).append((result["config"]["radius"], report))
    for (model, target), lines in groups.items():
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        for defence, points in lines.items():
            # The clean figure of a defence that assumes a radius depends on it: that of the
            # smallest.
            entries = [(0.0, points[0][1]["clean"]["mean"])]
            entries += [(radius, report["robust"]["mean"]) for radius, report in points]
            radii, figures = zip(*entries, strict=True)
            interval_curve(axes, radii, figures, defence)
        axes.set_xlabel("radius of the attack (0: clean images)")
        axes.set_ylabel(f"robust {next(iter(lines.values()))[0][1]['figure']}")
        axes.legend(fontsize=8)
        yield f"<h2>{escape(model)}, {escape(target)}</h2>\n{_svg(figure)}"


def _svg(figure: Figure) -> str:
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
    yield (
        f"<p><code>{escape(result['command'])}</code>, commit <code>{escape(commit)}</code>. "
        f"{config['num_images']} images, model <code>{escape(config['model'])}</code>, seed "
        f"{config['seed']}.</p>"
    )
    head = (
        "target/defence", "figure", "undefended, clean", "clean", "random noise", "robust, mean",
        "robust, averaged", "robust, worst draw", "reliable",
    )  # fmt: skip
    rows = [
        [
            escape(key),
            escape(report["figure"]),
            *intervals(report, "undefended_clean", "clean/mean", "random_noise", *ROBUST),
            '<span class="bad">no</span>' if report["unreliable"] else "yes",
        ]
        for key, report in result["reports"].items()
    ]
    yield _table(head, rows)
    for key, report in result["reports"].items():
        yield from _report(key, report)
    yield "</section>"


def _report(key: str, report: dict[str, Any]) -> Iterator[str]:
    number = report["robust"]["mean"]["num_images"]
    yield f"<h3>{escape(key)}, {number} images</h3>"
    if report["unreliable"]:
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in report["reasons"])
        yield f'<p class="bad">Unreliable:</p><ul class="bad">{reasons}</ul>'
    cost = {name.replace("_", " "): f"{value:,.4g}" for name, value in report["cost"].items()}
    facts = {
        "Threat model": report["threat_model"],
        "Defence": report["defence"],
        "Budget": report["budget"],
        "Cost": cost,
        "Seed": {"": report["seed"]},
        "Versions": report["versions"],
    }
    table = ""
    for what, values in facts.items():
        text = ", ".join(f"{name} {value}".strip() for name, value in values.items())
        table += f"<tr><th>{what}</th><td>{escape(text)}</td></tr>"
    yield f"<table>{table}</table>"
    strongest = report["strongest"]
    yield _table(
        ("attack", "what the attacker knows", "draws per step", report["figure"], "worst for",
         "evaluations per image", "seconds"),
        (
            [
                escape(attack["name"]),
                escape(attack["knowledge"]),
                str(attack["num_draws"]),
                interval(attack["figure"]),
                f"{strongest.count(attack['name'])} of {len(strongest)}",
                f"{attack['evaluations']:,.0f}",
                f"{attack['seconds']:,.0f}",
            ]
            for attack in report["attacks"]
        ),
    )  # fmt: skip
    for name, why in report["skipped"].items():
        yield f'<p class="note">Skipped {escape(name)}: {escape(why)}.</p>'
    marks = {True: ("good", "passed"), False: ("bad", "failed"), None: ("note", "does not apply")}
    rows = []
    for check in report["checks"]:
        mark = '<span class="{}">{}</span>'.format(*marks[check["passed"]])
        rows.append([escape(check["name"]), mark, escape(check["detail"])])
    yield _table(("check", "", "what it saw"), rows)
    if "examples" in report:
        yield (
            "<p>The first images under their worst attack; rows from the top: "
            f"{', '.join(EXAMPLES)}.</p>"
            '<img class="examples" width="560" alt="examples" '
            f'src="data:image/png;base64,{report["examples"]}">'
        )


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    def cells(kind: str, texts: Iterable[str]) -> str:
        tag = kind.split()[0]
        return "<tr>" + "".join(f"<{kind}>{text}</{tag}>" for text in texts) + "</tr>"

    lines = [cells("th", map(escape, head)), *(cells('td class="number"', row) for row in rows)]
    return "<table>" + "\n".join(lines) + "</table>"
