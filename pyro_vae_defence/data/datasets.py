"""Datasets that keep 8-bit images and hand out floating-point ones.

All are ordinary torch datasets that also take whole lists of indices, so that a batch is one gather
and one division instead of a Python loop.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vae_defence.ops.checks import check_tensor

Index = int | slice | Tensor | Sequence[int]
Split = Literal["train", "validation", "test"]

SPLITS = ("train", "validation", "test")
ROOT_VARIABLE = "PYRO_VAE_DEFENCE_DATA"


def default_root() -> Path:
    """Where full datasets are looked for: ``$PYRO_VAE_DEFENCE_DATA``, or the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(ROOT_VARIABLE) or cache / "pyro_vae_defence")


def as_index(index: Any) -> Any:
    """What tensors are to be indexed with: a tuple is for them one index per dimension, and a bool
    a mask of them as a whole."""
    if isinstance(index, (bool, np.bool_)):
        raise ValueError(f"index must be the numbers of images, got {index!r}")
    if index is None:
        return slice(None)
    return list(index) if isinstance(index, tuple) else index


class Images(Dataset[tuple[Tensor, Tensor]], ABC):
    """What every dataset of this package offers, wherever its images are.

    ``dataset[i]`` is an image ``(C, H, W)`` and its label; ``dataset[indices]`` for a slice, list
    or tensor is a batch ``(B, C, H, W)`` and its labels. Images are float32 in [0, 1].

    Attributes:
        labels: int64, ``(N,)`` or ``(N, columns)``.
        name, split: names of the dataset and of its split.
        class_names: one name per class.
        image_shape: ``(C, H, W)`` of one image, which a derived class sets.
    """

    image_shape: tuple[int, int, int]

    def __init__(self, labels: Tensor, name: str, split: str, class_names: Sequence[str]) -> None:
        self.labels, self.class_names = labels, tuple(class_names)
        self.name, self.split = name, split

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.split!r}, {len(self)} images)"

    def __getitem__(self, index: Index) -> tuple[Tensor, Tensor]:
        return self.images(index), self.labels[as_index(index)]

    @abstractmethod
    def images(self, index: Index | None = None) -> Tensor:
        """Images at ``index`` (all of them when ``None``), float32 in [0, 1]."""

    def origins(self, index: Index | None = None) -> Tensor:
        """What the images at ``index`` are made of, int64 ``(B,)``: those of one number, as the
        colours of a digit, are not independent, and intervals resample them together."""
        return self._items(index)

    def _items(self, index: Index | None) -> Tensor:
        """The numbers of the images at ``index``, int64; a scalar for one image."""
        return torch.arange(len(self), device="cpu")[as_index(index)]


class ImageDataset(Images):
    """Images in memory, uint8 ``(N, C, H, W)``; other arguments are attributes of the base."""

    def __init__(
        self, images: Tensor, labels: Tensor, name: str, split: str, class_names: Sequence[str]
    ) -> None:
        check_tensor("images", images)
        if images.dtype != torch.uint8 or images.dim() != 4:
            found = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images must be uint8 of shape (N, C, H, W), got {found}")
        check_tensor("labels", labels)
        if labels.shape[:1] != images.shape[:1]:
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        super().__init__(labels, name, split, class_names)
        self._images = images
        channels, height, width = images.shape[1:]
        self.image_shape = channels, height, width

    def images(self, index: Index | None = None) -> Tensor:
        """Images at ``index`` (all of them when ``None``), float32 in [0, 1]."""
        return self._images[as_index(index)].float().div_(255)


class PartOfImages(Images):
    """The images of ``dataset`` at ``items``, int64 ``(M,)``, in that order; ``split`` is new."""

    def __init__(self, dataset: Images, items: Tensor, split: str) -> None:
        super().__init__(dataset.labels[items], dataset.name, split, dataset.class_names)
        self._dataset, self.items = dataset, items
        self.image_shape = dataset.image_shape

    def images(self, index: Index | None = None) -> Tensor:
        """Images at ``index`` (all of them when ``None``), float32 in [0, 1]."""
        return self._dataset.images(self.items[self._items(index)])

    def origins(self, index: Index | None = None) -> Tensor:
        """Those of the dataset that this is a part of."""
        return self._dataset.origins(self.items[self._items(index)])
