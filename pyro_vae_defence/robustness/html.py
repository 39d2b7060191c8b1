"""A robustness report in HTML: tables and example images, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

from pyro_vae_defence.ops import html

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


def page(body: Iterable[str]) -> str:
    """A whole page."""
    return html.page("Robustness report", body)


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
                html.interval(entry)
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
    return html.table(head, rows)


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
        "Seeds of earlier reports": {seed: "" for seed in report.get("earlier_seeds", ())},
        "Versions": report["versions"],
    }
    table = ""
    for what, values in facts.items():
        if not values:
            continue
        text = ", ".join(f"{name} {value}".strip() for name, value in values.items())
        table += f"<tr><th>{what}</th><td>{escape(text)}</td></tr>"
    yield f"<table>{table}</table>"
    strongest = report["strongest"]
    yield html.table(
        ("attack", "what the attacker knows", "draws per step", report["figure"], "worst for",
         "evaluations per image", "seconds"),
        (
            [
                escape(attack["name"]),
                escape(attack["knowledge"]),
                str(attack["num_draws"]),
                html.interval(attack["figure"]),
                f"{strongest.count(attack['name'])} of {len(strongest)}",
                f"{attack['evaluations']:,.0f}",
                f"{attack['seconds']:,.0f}",
            ]
            for attack in report["attacks"]
        ),
    )  # fmt: skip
    for name, why in report["skipped"].items():
        yield f'<p class="note">Skipped {escape(name)}: {escape(why)}.</p>'
    # Reports of earlier versions have no fidelity.
    if report.get("fidelity"):
        rows = [
            [
                escape(name),
                '<span class="good">reached</span>' if each["reached"] else "not reached",
                _share(each["agreement"]),
                f"{each['right']} of {each['images']}",
                _share(each["cosine"]),
                _share(each["share"]),
            ]
            for name, each in report["fidelity"].items()
        ]
        head = (
            "gradient of", "bar of fidelity", "agreement, chance 0.5", "right on images",
            "cosine, chance 0", "share of the best increase",
        )  # fmt: skip
        yield html.table(head, rows)
    marks = {True: ("good", "passed"), False: ("bad", "failed"), None: ("note", "does not apply")}
    rows = []
    for check in report["checks"]:
        mark = '<span class="{}">{}</span>'.format(*marks[check["passed"]])
        rows.append([escape(check["name"]), mark, escape(check["detail"])])
    yield html.table(("check", "", "what it saw"), rows)
    if "examples" in report:
        yield (
            "<p>The first images under their worst attack; rows from the top: "
            f"{', '.join(EXAMPLES)}.</p>"
            '<img class="examples" width="560" alt="examples" '
            f'src="data:image/png;base64,{report["examples"]}">'
        )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
