"""Pictures of attacks, defences and chains: functions that take matplotlib axes and return them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def show_image(axes: Axes, image: Tensor) -> Axes:
    """Draw one image ``(C, H, W)`` with values in [0, 1], or of 8 bits, without ticks.

    Raises:
        ValueError: if it is no such image, grey or with three or four channels.
    """
    values = _in_range(image)
    if values.ndim != 3 or values.shape[0] not in (1, 3, 4):
        raise ValueError(
            f"image must have shape (C, H, W) with 1, 3 or 4 channels, got {tuple(values.shape)}"
        )
    pixels = values.permute(1, 2, 0).numpy()
    grey = pixels.shape[2] == 1
    axes.imshow(pixels[..., 0] if grey else pixels, cmap="gray" if grey else None, vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def panel(axes: np.ndarray, columns: Mapping[str, Tensor]) -> np.ndarray:
    """Images side by side: one column per entry, one row per image.

    Args:
        axes: array of axes ``(rows, len(columns))``.
        columns: title -> images ``(N, C, H, W)`` with ``N >= rows``.

    Raises:
        ValueError: if the axes do not fit the columns.
    """
    axes = np.atleast_2d(axes)
    if len(columns) == 1:  # of one column plt.subplots makes a vector, as of one row
        axes = axes.reshape(-1, 1)
    if axes.shape[1] != len(columns):
        raise ValueError(f"axes must have {len(columns)} columns, got shape {axes.shape}")
    for number, (title, images) in enumerate(columns.items()):
        if len(images) < axes.shape[0]:
            raise ValueError(f"{title!r} has {len(images)} images for {axes.shape[0]} rows")
        for row in range(axes.shape[0]):
            show_image(axes[row, number], images[row])
        axes[0, number].set_title(title, fontsize=9)
    return axes


def trace(axes: Axes, draws: Any, label: str = "") -> Axes:
    """Trace plot of one scalar: draws ``(chain, draw)``, one line per chain."""
    draws = _chains(draws)
    for number, chain in enumerate(draws):
        axes.plot(chain, lw=0.8, label=f"chain {number}")
    axes.set_xlabel("draw")
    axes.set_ylabel(label)
    return axes


def rank(axes: Axes, draws: Any, label: str = "", bins: int = 10) -> Axes:
    """Rank plot of one scalar: each chain's ranks among all draws, flat when chains agree.

    Equal draws share the mean of their ranks.

    Reference: Vehtari et al., "Rank-normalization, folding, and localization: an improved R-hat",
    2021, https://doi.org/10.1214/20-BA1221.

    Args:
        axes: where to draw.
        draws: ``(chain, draw)``.
        label: title of the plot.
        bins: number of bins.

    Raises:
        ValueError: if draws have another shape, some are NaN, which have no rank, or ``bins`` is no
            positive integer.
    """
    draws = _chains(draws)
    if count := int(np.isnan(draws).sum()):
        raise ValueError(f"draws has {count} values that are NaN, which have no rank")
    if not (isinstance(bins, (int, np.integer)) and bins >= 1):
        raise ValueError(f"bins must be an integer of at least 1, got {bins!r}")
    _, value, counts = np.unique(draws.ravel(), return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts + 1) / 2)[value].reshape(draws.shape)
    edges = np.linspace(0, draws.size, bins + 1)
    for number, chain in enumerate(ranks):
        counts, _ = np.histogram(chain, edges)
        axes.stairs(counts, edges, label=f"chain {number}")
    axes.axhline(draws.shape[1] / bins, color="black", lw=0.8, ls=":")
    axes.set_xlabel("rank among all draws")
    axes.set_ylabel("count")
    axes.set_title(label, fontsize=9)
    return axes


def posterior_ratios(axes: Axes, before: Tensor, after: Tensor) -> Axes:
    """Histograms of log posterior ratios before and after a defence (Figures 2 and 7), in nats.

    Raises:
        ValueError: if some are not finite, which no histogram has a place for.
    """
    values = [v.detach().cpu().numpy().ravel() for v in (before, after)]
    for name, value in zip(("before", "after"), values):
        if count := int((~np.isfinite(value)).sum()):
            raise ValueError(f"{name} has {count} values that are not finite: leave them out")
    edges = np.histogram_bin_edges(np.concatenate(values), bins=30)
    styles: dict[str, dict[str, Any]] = {
        "undefended": {"alpha": 0.6},
        # Told apart without colours, too.
        "defended": {"alpha": 0.6, "histtype": "stepfilled", "edgecolor": "black", "hatch": "///"},
    }
    for value, (label, style) in zip(values, styles.items(), strict=True):
        axes.hist(value, list(edges), label=label, **style)
    axes.set_xlabel("log posterior ratio (nats)")
    axes.legend(fontsize=8)
    return axes


def curve(
    axes: Axes,
    x: Sequence[float],
    estimate: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    label: str = "",
    color: str | None = None,
) -> Axes:
    """A line with its interval as a band, in the next colour of the axes when it is ``None``."""
    (line,) = axes.plot(x, estimate, marker="o", ms=3, label=label, color=color)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)
    return axes


def _chains(draws: Any) -> np.ndarray:
    values = np.asarray(draws.detach().cpu() if isinstance(draws, Tensor) else draws)
    if values.ndim != 2:
        raise ValueError(f"draws must have shape (chain, draw), got {values.shape}")
    return values


def _in_range(images: Tensor) -> Tensor:
    """Images in [0, 1] on the CPU; those of 8 bits are divided by 255."""
    if not isinstance(images, Tensor):
        raise ValueError(f"image must be a tensor, got a {type(images).__name__}")
    pixels = images.detach().cpu()
    if pixels.dtype == torch.uint8:
        return pixels / 255
    if not (pixels.is_floating_point() or pixels.dtype == torch.bool):
        raise ValueError(
            f"image has dtype {pixels.dtype}: pass floating-point values in [0, 1], or 8 bits, "
            "image.to(torch.uint8)"
        )
    return pixels.to(torch.promote_types(pixels.dtype, torch.float32)).clamp(0, 1)


def picture(rows: Sequence[Tensor] | Tensor) -> str:
    """Images ``(N, C, H, W)`` in [0, 1], one row per entry, as the base64 text of a PNG file.

    Raises:
        ValueError: without rows, or if they are not equally many images of one shape.
    """
    import matplotlib.image
    from torchvision.utils import make_grid

    shapes = {tuple(row.shape) for row in rows}
    if len(shapes) != 1 or any(len(shape) != 4 for shape in shapes):
        raise ValueError(
            "rows must be one or more tensors of images of one shape (N, C, H, W), got "
            f"{[tuple(row.shape) for row in rows]}"
        )
    tiles = torch.cat([_in_range(row) for row in rows])
    grid = make_grid(tiles, nrow=len(rows[0]), padding=1, pad_value=0.5)
    buffer = io.BytesIO()
    plain: dict[str, Any] = {"Software": None}  # no version: equal images make equal text
    matplotlib.image.imsave(buffer, grid.permute(1, 2, 0).numpy(), format="png", metadata=plain)
    return base64.b64encode(buffer.getvalue()).decode()
