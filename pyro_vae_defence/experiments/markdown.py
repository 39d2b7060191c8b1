"""Pieces of the Markdown that tables are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def interval(entry: dict[str, float], digits: int = 3) -> str:
    """An entry of a result file, such as ``0.968 [0.951, 0.980]``."""
    return f"{entry['estimate']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


def row(cells: Iterable[str]) -> str:
    """One row of a table."""
    return f"| {' | '.join(cells)} |"


def source(result: dict[str, Any]) -> str:
    """Where a result comes from: command, commit, version of torch, threads."""
    versions = result["provenance"]
    return (
        f"`{result['command']}`, commit `{versions['commit'][:12]}`, torch {versions['torch']}, "
        f"{versions['threads']} thread(s)"
    )
