"""Pieces that figures of result files are made of."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_vae_defence import plots
from pyro_vae_defence.ops.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def interval_curve(
    axes: Axes, x: Sequence[float], entries: Sequence[dict[str, float]], label: str
) -> Axes:
    """A line through entries of a result file, with their intervals as a band."""
    estimate, low, high = ([entry[key] for entry in entries] for key in ("estimate", "low", "high"))
    return plots.curve(axes, x, estimate, low, high, label)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically; equal figures make equal files, since neither date nor version is in them."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
