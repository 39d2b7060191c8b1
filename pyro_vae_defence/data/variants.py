r"""Datasets made from others while they are read: transformed, inverted, on a textured background.

The paper's images have a background of exact zeros, where encoder attacks live and where a clip of
small intensities undoes them. Two harder variants take that away, without new data:

- *inverted*: x' = 1 - x, so that the background is as bright as can be;
- *textured*: :math:`x' = x + (1 - a)\,t`, with opacity a = the largest of a pixel's channels and a
  smooth texture t of values in (0, 0.5], one per image and channel.

The texture of item i of split s (train 0, validation 1, test 2) is the 7x7 grid of uniforms that
the counter-based generator of :mod:`pyro_vae_defence.ops.streams` gives for seed 0x74657874, image
i, chain 0, step s and purpose 0 in the order (channel, row, column), halved, and interpolated
bilinearly to the image's size with the grid's corners in the image's corners. It depends on nothing
else, hence is the same in every batch and on every machine (up to rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vae_defence.data.datasets import SPLITS, Images, Index
from pyro_vae_defence.ops.streams import Streams

ImageTransform: TypeAlias = Callable[[Tensor], Tensor]
"""Float images ``(B, C, H, W)`` -> as many images, perhaps of another shape or range."""

TEXTURE_SEED = 0x74657874
TEXTURE_STRENGTH = 0.5
TEXTURE_CELLS = 7


class TransformedImages(Images):
    """A dataset whose images go through ``transform`` whenever they are read; labels stay.

    A random transform draws from torch's global seed, hence makes other images at every pass.

    Args:
        dataset: where the images come from.
        transform: applied to float batches ``(B, C, H, W)``, also for a single image.
        name: the dataset's new name; the old one when ``None``.

    Raises:
        ValueError: if the transform does not return one floating-point image per image.
    """

    def __init__(self, dataset: Images, transform: ImageTransform, name: str | None = None) -> None:
        super().__init__(dataset.labels, name or dataset.name, dataset.split, dataset.class_names)
        self._dataset = dataset
        self._transform = transform
        # One image tells the shape; its draws must not shift those of the user's run.
        with torch.random.fork_rng(devices=[]):
            channels, height, width = self._apply(
                torch.zeros(1, *dataset.image_shape, device="cpu")
            ).shape[1:]
        self.image_shape = channels, height, width

    def images(self, index: Index | None = None) -> Tensor:
        """Transformed images at ``index`` (all of them when ``None``)."""
        x = self._dataset.images(index)
        return self._apply(x[None])[0] if x.dim() == 3 else self._apply(x)

    def origins(self, index: Index | None = None) -> Tensor:
        """Those of the dataset that is transformed."""
        return self._dataset.origins(index)

    def _apply(self, x: Tensor) -> Tensor:
        found = self._transform(x)
        if found.dim() != 4 or len(found) != len(x) or not found.is_floating_point():
            raise ValueError(
                f"transform returned {found.dtype} of shape {tuple(found.shape)} for "
                f"{tuple(x.shape)}: it must return one floating-point image (C, H, W) per image"
            )
        return found


def invert(x: Tensor) -> Tensor:
    """1 - x, for images in [0, 1]."""
    return 1 - x


class TexturedImages(Images):
    """A dataset on a textured background; see the module's text.

    Raises:
        ValueError: if the dataset's split is none of those that have textures.
    """

    def __init__(self, dataset: Images, name: str) -> None:
        if dataset.split not in SPLITS:
            raise ValueError(
                f"dataset must be a whole split, {', '.join(SPLITS)}, whose textures differ, got "
                f"{dataset!r}; divide what comes out instead"
            )
        super().__init__(dataset.labels, name, dataset.split, dataset.class_names)
        self._dataset = dataset
        self.image_shape = dataset.image_shape

    def images(self, index: Index | None = None) -> Tensor:
        """Images at ``index`` (all of them when ``None``), float32 in [0, 1]."""
        items = self._items(index)
        x = self._dataset.images(index)
        texture = textures(items.flatten(), self.image_shape, self.split).reshape(x.shape)
        return x + (1 - x.amax(-3, keepdim=True)) * texture

    def origins(self, index: Index | None = None) -> Tensor:
        """Those of the dataset that has no texture."""
        return self._dataset.origins(index)


def textures(items: Tensor, image_shape: tuple[int, int, int], split: str) -> Tensor:
    """Textures in (0, 0.5] of the items (int64, ``(N,)``) of a split, float32 ``(N, C, H, W)``."""
    channels, height, width = image_shape
    streams = Streams(TEXTURE_SEED, items, torch.zeros_like(items))
    shape = (channels, TEXTURE_CELLS, TEXTURE_CELLS)
    grid = TEXTURE_STRENGTH * streams.uniform(SPLITS.index(split), 0, shape, torch.float32)
    return F.interpolate(grid, (height, width), mode="bilinear", align_corners=True)
