"""ColorMNIST: every digit of MNIST in each of seven colours.

The digit's intensity is multiplied by a corner of the RGB cube; the background stays black.

Cemgil, Ghaisas, Dvijotham, Kohli, "Adversarially robust representations with smooth encoders",
2020; https://openreview.net/forum?id=H1gfFaEYDS
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pyro_vae_defence.data.datasets import Images, Index
from pyro_vae_defence.data.mnist import MNIST

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0),
    "magenta": (1, 0, 1), "cyan": (0, 1, 1), "white": (1, 1, 1),
}  # fmt: skip
"""The corners of the RGB cube other than black, in the order of the colour labels."""


class ColoredImages(Images):
    """Grey images in each of seven colours: item ``7 * i + c`` is image ``i`` in colour ``c``.

    A view: images are coloured when they are asked for. Labels have two columns, the class of the
    image and its colour (see :data:`COLORS`).
    """

    color_names = tuple(COLORS)

    def __init__(self, grey: Images, name: str) -> None:
        count = len(COLORS)
        columns = (
            grey.labels.repeat_interleave(count),
            torch.arange(count, device="cpu").repeat(len(grey)),
        )
        super().__init__(torch.stack(columns, 1), name, grey.split, grey.class_names)
        self._grey = grey
        self.image_shape = 3, *grey.image_shape[1:]

    def images(self, index: Index | None = None) -> Tensor:
        """Images at ``index`` (all of them when ``None``), float32 in [0, 1], three channels."""
        items = self._items(index)
        colors = torch.tensor([*COLORS.values()], dtype=torch.float32, device="cpu")[
            items % len(COLORS)
        ]
        return self._grey.images(items // len(COLORS)) * colors[..., None, None]

    def origins(self, index: Index | None = None) -> Tensor:
        """Which grey image each is, int64 ``(B,)``."""
        return self._grey.origins(self._items(index) // len(COLORS))


def load_color_mnist(root: Path, split: str, download: bool) -> ColoredImages:
    """One split of ColorMNIST, made from MNIST's files."""
    return ColoredImages(MNIST.load(root, split, download), "color_mnist")


def load_color_mnist_subset(root: Path, split: str, download: bool) -> ColoredImages:
    """The same of the subset of MNIST that comes with the library; needs no ``root``."""
    return ColoredImages(MNIST.load_subset(root, split, download), "color_mnist_subset")
