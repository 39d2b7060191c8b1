"""Images that stay in their files and are decoded when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pyro_vae_defence.data.datasets import Images, Index

Prepare: TypeAlias = Callable[[Image.Image], Image.Image]
"""Cuts and scales a decoded image; raises ``ValueError`` for one that does not fit."""

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
"""Names of files that :func:`load_folder` takes for images end so, in either case."""

_MODES = {1: "L", 3: "RGB"}


class ImageFiles(Images):
    """Images decoded one by one from their files, float32 in [0, 1].

    Args:
        paths: one file per image.
        labels, name, split, class_names: see :class:`~pyro_vae_defence.data.datasets.Images`.
        image_shape: ``(C, H, W)`` with 1 or 3 channels.
        prepare: cuts and scales a decoded image to ``H`` by ``W``.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        labels: Tensor,
        name: str,
        split: str,
        class_names: Sequence[str],
        image_shape: tuple[int, int, int],
        prepare: Prepare,
    ) -> None:
        if labels.shape[:1] != (len(paths),):
            raise ValueError(f"{len(paths)} images but labels of shape {tuple(labels.shape)}")
        if image_shape[0] not in _MODES:
            raise ValueError(
                f"channels must be 1 (grey) or 3 (colour), got {image_shape[0]}; "
                "others can be made by a transform"
            )
        super().__init__(labels, name, split, class_names)
        self.paths = tuple(os.fspath(path) for path in paths)
        self.image_shape, self._prepare = image_shape, prepare

    def images(self, index: Index | None = None) -> Tensor:
        """Images at ``index`` (all of them when ``None``, as large as that may be).

        Raises:
            ValueError: naming the file, if one is missing, truncated, no image, or unfit.
        """
        items = self._items(index)
        pixels = torch.empty(items.numel(), *self.image_shape, dtype=torch.uint8)
        for row, item in zip(pixels, items.flatten().tolist()):
            row.copy_(self._read(self.paths[item]))
        return pixels.float().div_(255).reshape((*items.shape, *self.image_shape))

    def _read(self, path: str) -> Tensor:
        channels, height, width = self.image_shape
        try:
            with Image.open(path) as file:
                image = self._prepare(file.convert(_MODES[channels]))
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow's decoders raise
            message = f"cannot read image {path} ({error}); restore or remove the file"
            raise ValueError(message) from error
        return torch.from_numpy(np.array(image)).reshape(height, width, channels).permute(2, 0, 1)


def load_folder(
    path: str | os.PathLike[str],
    image_size: int | tuple[int, int],
    channels: int = 3,
    split: str | None = None,
) -> ImageFiles:
    """The images of a folder and its subfolders, in the order of their paths.

    They are decoded when asked for. Each is scaled (bilinear, with antialiasing) until it just
    covers the target, whose centre is kept. Where all images lie in subfolders, the first level of
    these names the classes; otherwise every label is 0.

    Args:
        path: the folder.
        image_size: height and width, or one number for both.
        channels: 1 for grey, 3 for colour; images are converted.
        split: read the subfolder of this name only, e.g. ``"train"``; all of them when ``None``.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if it holds no image, or a size or number of channels is out of range.
    """
    folder = Path(path) if split is None else Path(path) / split
    if not folder.is_dir():
        raise FileNotFoundError(f"path={str(folder)!r} is no folder: pass one that holds images")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < 1 or width < 1:
        raise ValueError(f"image_size={image_size} must be positive")
    files = sorted(
        file.relative_to(folder)
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
    if not files:
        raise ValueError(
            f"path={str(folder)!r} holds no image; names must end in {', '.join(sorted(SUFFIXES))}"
        )
    name = Path(path).resolve().name
    nested = all(len(file.parts) > 1 for file in files)
    class_of = [file.parts[0] if nested else name for file in files]
    classes = sorted(set(class_of))
    labels = torch.tensor([classes.index(label) for label in class_of])

    def cover(image: Image.Image) -> Image.Image:
        scale = max(height / image.height, width / image.width)
        wide = max(width, round(image.width * scale))
        high = max(height, round(image.height * scale))
        left, top = (wide - width) // 2, (high - height) // 2
        resized = image.resize((wide, high), Image.Resampling.BILINEAR)
        return resized.crop((left, top, left + width, top + height))

    paths, shape = [folder / file for file in files], (channels, height, width)
    return ImageFiles(paths, labels, name, split or "all", classes, shape, cover)
