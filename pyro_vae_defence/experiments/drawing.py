"""Pieces that figures of result files are made of."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae_defence import plots
from pyro_vae_defence.ops.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. Who only computes does not wait for matplotlib."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def interval_curve(
    axes: Axes,
    x: Sequence[float],
    entries: Sequence[dict[str, float]],
    label: str,
    color: str | None = None,
) -> Axes:
    """A line through entries of a result file, with their intervals as a band."""
    estimate, low, high = ([entry[key] for entry in entries] for key in ("estimate", "low", "high"))
    return plots.curve(axes, x, estimate, low, high, label, color)


def legend_below(figure: FigureBase, *panels: Axes, columns: int = 3) -> None:
    """One legend of a figure or a part of it: what is labelled in ``panels``, each text once."""
    shown: dict[str, Any] = {}
    for axes in panels:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(text, handle)
    if shown:
        figure.legend(shown.values(), shown, loc="outside lower center", ncols=columns, fontsize=9)


def save_figure(figure: Figure, path: Path, dpi: float = 110) -> None:
    """Write a figure atomically; without date and version, equal figures make equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
