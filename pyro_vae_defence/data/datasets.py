"""Datasets that keep 8-bit images and hand out floating-point ones.

All are ordinary torch datasets that also take whole lists of indices, so that a batch is one gather
and one division instead of a Python loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

Index = int | slice | Tensor | Sequence[int]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "magenta": (1, 0, 1),
    "cyan": (0, 1, 1),
    "white": (1, 1, 1),
}
"""The seven corners of the RGB cube other than black, in the order of ColorMNIST's colour
labels."""


class Images(Dataset[tuple[Tensor, Tensor]], ABC):
    """What every dataset of this package offers, wherever its images are.

    ``dataset[i]`` is an image ``(C, H, W)`` and its label; ``dataset[indices]`` for a slice, list
    or tensor is a batch ``(B, C, H, W)`` and its labels. Images are float32 in [0, 1].

    Attributes:
        labels: int64, ``(N,)`` or ``(N, columns)``.
        name: dataset's name.
        split: split's name.
        class_names: one name per class.
    """

    def __init__(self, labels: Tensor, name: str, split: str, class_names: Sequence[str]) -> None:
        self.labels = labels
        self.name = name
        self.split = split
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.split!r}, {len(self)} images)"

    def __getitem__(self, index: Index) -> tuple[Tensor, Tensor]:
        return self.images(index), self.labels[index]

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of one image."""

    @abstractmethod
    def images(self, index: Index | None = None) -> Tensor:
        """Images at ``index`` (all of them when ``None``), float32 in [0, 1]."""


class ImageDataset(Images):
    """Images and labels in memory.

    Args:
        images: uint8 ``(N, C, H, W)``.
        labels: int64 ``(N,)``.
        name: dataset's name.
        split: split's name.
        class_names: one name per class.

    Attributes:
        labels: int64, ``(N,)``; ``(N, 2)`` for digit and colour in :class:`ColoredImages`.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        name: str,
        split: str,
        class_names: Sequence[str],
    ) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(
                f"images must be uint8 of shape (N, C, H, W), got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        if labels.shape[:1] != images.shape[:1]:
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        super().__init__(labels, name, split, class_names)
        self._images = images

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of one image."""
        channels, height, width = self._images.shape[1:]
        return channels, height, width

    def images(self, index: Index | None = None) -> Tensor:
        """Images at ``index`` (all of them when ``None``), float32 in [0, 1]."""
        chosen = self._images if index is None else self._images[index]
        return chosen.float().div_(255)


class ColoredImages(ImageDataset):
    """Grey images in each of seven colours: item ``7 * i + c`` is image ``i`` in colour ``c``.

    A view: images are coloured when they are asked for. Labels have two columns, the class of the
    image and its colour (see :data:`COLORS`). Following Cemgil et al. (2020), ColorMNIST multiplies
    the digit's intensity by a corner of the RGB cube; the background stays black.
    """

    def __init__(self, grey: ImageDataset, name: str) -> None:
        table = torch.tensor(list(COLORS.values()), dtype=torch.uint8)
        count = len(table)
        labels = torch.stack(
            [
                grey.labels.repeat_interleave(count),
                torch.arange(count).repeat(len(grey)),
            ],
            1,
        )
        super().__init__(
            grey._images.expand(-1, 3, -1, -1), grey.labels, name, grey.split, grey.class_names
        )
        self.labels = labels
        self.color_names = tuple(COLORS)
        self._table = table

    def images(self, index: Index | None = None) -> Tensor:
        """Images at ``index`` (all of them when ``None``), float32 in [0, 1], three channels."""
        items = torch.arange(len(self)) if index is None else torch.arange(len(self))[index]
        colors = self._table[items % len(self._table)].float()
        grey = self._images[items // len(self._table)][..., :1, :, :]
        return grey.float().div_(255) * colors[..., :, None, None]
