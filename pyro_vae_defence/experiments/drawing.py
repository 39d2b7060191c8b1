"""Pieces that figures of result files are made of."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.image
import torch
from torch import Tensor
from torchvision.utils import make_grid

from pyro_vae_defence import plots
from pyro_vae_defence.experiments import results as result_files
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
    """Write a figure atomically; equal figures make equal files, since neither date nor version is
    in them."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def picture(rows: Sequence[Tensor]) -> str:
    """Images ``(N, C, H, W)`` in [0, 1], one row per entry, as the base64 text of a PNG file."""
    tiles = torch.cat([row.detach().cpu() for row in rows]).clamp(0, 1)
    grid = make_grid(tiles, nrow=len(rows[0]), padding=1, pad_value=0.5)
    buffer = io.BytesIO()
    plain: dict[str, Any] = {"Software": None}  # no version: equal images make equal text
    matplotlib.image.imsave(buffer, grid.permute(1, 2, 0).numpy(), format="png", metadata=plain)
    return base64.b64encode(buffer.getvalue()).decode()


def write_pages(
    results: str | os.PathLike[str],
    images: str | os.PathLike[str],
    command: str,
    figures: Callable[[dict[str, Any]], Mapping[str, Figure]],
    section: Callable[[str, dict[str, Any], list[str]], str],
) -> tuple[Path, list[Path]]:
    """Write ``tables.md`` beside the result files of a directory, and their figures into
    ``images``.

    Args:
        results: directory of the result files.
        images: directory of the figures, ``COMMAND_NAME_WHAT.png``.
        command: the experiment the files are of.
        figures: from a result to its figures by what they show; no more than a name where that is
            empty.
        section: Markdown of a result, from its file's name, the result and the relative paths of
            its figures.

    Raises:
        ValueError: if the directory holds no result file.
    """
    sections, drawn = [], []
    for name, result in result_files.read(results, f"{command} on a dataset").items():
        links = []
        for what, figure in figures(result).items():
            target = Path(images) / ("_".join(filter(None, (command, name, what))) + ".png")
            save_figure(figure, target)
            links.append(Path(os.path.relpath(target, results)).as_posix())
            drawn.append(target)
        sections.append(section(name, result, links))
    tables = Path(results) / "tables.md"
    write_atomically(tables, "\n".join(sections).encode())
    return tables, drawn
