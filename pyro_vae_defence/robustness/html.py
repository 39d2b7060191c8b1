"""A robustness report in HTML: tables and example images, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

EXAMPLES = ("reference", "attacked", "defended")
"""Rows of a report's picture of examples, from the top."""

INTRODUCTION = (
    "<p>Figures are means over images with 95% bootstrap intervals; higher is more robust. "
    "<em>Robust</em> is the per-image worst case over all attacks, scored on seeds that no "
    "attack has seen. "
    "What attacks leave is an upper bound of the true robustness: heuristic, not certified. "
    "A report whose checks fail, or that only transfer attacks have tested, is marked "
    "unreliable.</p>"
)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: .8rem 0; display: block; overflow-x: auto; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { font-weight: 600; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bad { color: #a40000; } .good { color: #1a6b1a; } .note { color: #555; }
section { border-top: 2px solid #1c1c1c; margin-top: 2.5rem; }
svg { max-width: 100%; height: auto; }
img.examples { image-rendering: pixelated; max-width: 100%; }
"""  # noqa: E501


def page(body: Iterable[str]) -> str:
    """A whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Robustness '
        "report</title>"
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def summary(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """A table with a row per report, as :meth:`RobustnessReport.to_dict` has them, by title."""
    head = (
        "", "figure", "undefended, clean", "clean", "random noise", "robust, mean",
        "robust, averaged", "robust, worst draw", "reliable",
    )  # fmt: skip
    rows = [
        [
            escape(title),
            escape(report["figure"]),
            *(
                _interval(entry)
                for entry in (
                    report["undefended_clean"],
                    report["clean"]["mean"],
                    report["random_noise"],
                    *(report["robust"][name] for name in ("mean", "averaged", "worst_of_n")),
                )
            ),
            '<span class="bad">no</span>' if report["unreliable"] else "yes",
        ]
        for title, report in reports.items()
    ]
    return _table(head, rows)


def details(title: str, report: Mapping[str, Any]) -> Iterator[str]:
    """All of a report but its summary; ``examples`` in it is the text of a PNG file."""
    number = report["robust"]["mean"]["num_images"]
    yield f"<h3>{escape(title)}, {number} images</h3>"
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
                _interval(attack["figure"]),
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


def _interval(entry: Mapping[str, float]) -> str:
    return f"{entry['estimate']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    def cells(kind: str, texts: Iterable[str]) -> str:
        tag = kind.split()[0]
        return "<tr>" + "".join(f"<{kind}>{text}</{tag}>" for text in texts) + "</tr>"

    lines = [cells("th", map(escape, head)), *(cells('td class="number"', row) for row in rows)]
    return "<table>" + "\n".join(lines) + "</table>"
