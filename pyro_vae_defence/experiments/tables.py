"""Pieces of the Markdown that tables are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

NOT_MEASURED = "not measured"

MOST_COLUMNS = 5
"""Of a table in the text; a page has no room for more."""


def interval(entry: dict[str, float] | None, digits: int = 3) -> str:
    """An entry of a result file, such as ``0.968 [0.951, 0.980]``; nothing for ``None``."""
    if entry is None:
        return ""
    return f"{entry['estimate']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


def at(entry: Any, place: str) -> Any:
    """What stands at a place of a result, such as ``"clean/mean"``; ``None`` for nothing."""
    for part in place.split("/"):
        entry = entry.get(part) if entry else None
    return entry


def intervals(entry: Any, *places: str, digits: int = 3) -> list[str]:
    """The intervals that stand at some places of a result."""
    return [interval(at(entry, place), digits) for place in places]


def row(cells: Iterable[str]) -> str:
    """One row of a table."""
    return f"| {' | '.join(cells)} |"


def table(
    columns: Sequence[str], rows: Iterable[Iterable[str]], shown: Sequence[str] = ()
) -> list[str]:
    """The lines of a table, with an empty one behind it.

    A table of more than :data:`MOST_COLUMNS` is folded away; before it stand the columns ``shown``,
    the first ones by default.
    """
    every = [list(cells) for cells in rows]
    whole = [row(columns), row(["---"] * len(columns)), *map(row, every), ""]
    if len(columns) <= MOST_COLUMNS:
        return whole
    places = [list(columns).index(name) for name in shown] or list(range(MOST_COLUMNS))
    some = [[cells[place] for place in places] for cells in every]
    return [
        *table([columns[place] for place in places], some),
        *folded(f"All {len(columns)} columns", whole),
    ]


def folded(summary: str, lines: Iterable[str]) -> list[str]:
    """Lines that are seen once their summary is clicked, in HTML that Markdown lets through."""
    return [f"<details><summary>{summary}</summary>", "", *lines, "</details>", ""]


def source(result: dict[str, Any]) -> str:
    """Where a result comes from: command, and commit, version of torch, threads; the same of the
    cells that were computed otherwise."""
    others = [
        f"; of {', '.join(f'`{cell}`' for cell in each['cells'])}: {_versions(each)}"
        for each in result.get("earlier", [])
        if "cells" in each
    ]
    return f"`{result['command']}`, {_versions(result['provenance'])}{''.join(others)}"


def _versions(provenance: dict[str, Any]) -> str:
    commit, dash, dirty = provenance["commit"].partition("-")
    return (
        f"commit `{commit[:12]}{dash}{dirty}`, torch {provenance['torch']}, "
        f"{provenance['threads']} thread(s)"
    )


def sources(results: Iterable[dict[str, Any]]) -> list[str]:
    """Where results come from, folded away."""
    return folded("Commands, commits, versions", [*(f"- {source(each)}" for each in results), ""])


def section(title: str, note: str, lines: Iterable[str], result: dict[str, Any]) -> str:
    """A result in Markdown: its heading, a note if any, lines of tables, and its source."""
    notes = [note, ""] if note else []
    return "\n".join([title, "", *notes, *lines, *sources([result])])
