"""Images that stay in their files and are decoded when they are asked for.

*CelebA* is read from torchvision's layout, ``<root>/celeba``: the aligned images of 178x218 in
``img_align_celeba``, the published split in ``list_eval_partition.txt`` (162,770 / 19,867 / 19,962
images), and 40 binary attributes in ``list_attr_celeba.txt``. The identities, boxes and landmarks
beside them are not needed. As in NVAE, the box (left 15, top 40, right 163, bottom 188) is cut out
and its 148x148 pixels are scaled to 64x64 (bilinear, with antialiasing).

Any other folder is read by :func:`load_folder`.

Liu, Luo, Wang, Tang, "Deep learning face attributes in the wild", 2015;
https://arxiv.org/abs/1411.7766 Vahdat, Kautz, "NVAE: a deep hierarchical variational autoencoder",
2020; https://arxiv.org/abs/2007.03898
"""

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

CELEBA_BOX = (15, 40, 163, 188)
"""Left, top, right and bottom of the face in an aligned image (NVAE)."""

CELEBA_SIZE = 64
_CELEBA_ALIGNED = (178, 218)
_PARTITION = {"train": 0, "validation": 1, "test": 2}
_MODES = {1: "L", 3: "RGB"}


class ImageFiles(Images):
    """Images decoded one by one from their files, float32 in [0, 1].

    Args:
        paths: one file per image.
        labels: int64, ``(N,)`` or ``(N, columns)``.
        name: dataset's name.
        split: split's name.
        class_names: one name per class, or per column of binary labels.
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
        self._shape = image_shape
        self._prepare = prepare

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of one image."""
        return self._shape

    def images(self, index: Index | None = None) -> Tensor:
        """Images at ``index`` (all of them when ``None``, as large as that may be).

        Raises:
            ValueError: naming the file, if one is missing, truncated, no image, or unfit.
        """
        items = torch.arange(len(self)) if index is None else torch.arange(len(self))[index]
        pixels = [self._read(self.paths[item]) for item in items.flatten().tolist()]
        stacked = torch.stack(pixels) if pixels else torch.empty(0, *self._shape, dtype=torch.uint8)
        return stacked.float().div_(255).reshape((*items.shape, *self._shape))

    def _read(self, path: str) -> Tensor:
        channels, height, width = self._shape
        try:
            with Image.open(path) as file:
                image = self._prepare(file.convert(_MODES[channels]))
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow's decoders raise
            raise ValueError(
                f"cannot read image {path} ({error}); restore or remove the file"
            ) from error
        return torch.from_numpy(np.array(image)).reshape(height, width, channels).permute(2, 0, 1)


def load_folder(
    path: str | os.PathLike[str],
    image_size: int | tuple[int, int],
    channels: int = 3,
    split: str | None = None,
) -> ImageFiles:
    """The images of a folder and its subfolders, in the order of their paths, decoded when asked
    for.

    Each is scaled (bilinear, with antialiasing) until it just covers the target, whose centre is
    kept. Where all images lie in subfolders, the first level of these names the classes; otherwise
    every label is 0.

    Args:
        path: the folder.
        image_size: height and width, or one number for both.
        channels: 1 for grey, 3 for colour; images are converted.
        split: read the subfolder of this name only, e.g. ``"train"``; ``None`` reads the whole
            folder.

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
    classes = [name]
    labels = torch.zeros(len(files), dtype=torch.long)
    if all(len(file.parts) > 1 for file in files):
        classes = sorted({file.parts[0] for file in files})
        labels = torch.tensor([classes.index(file.parts[0]) for file in files])

    def cover(image: Image.Image) -> Image.Image:
        scale = max(height / image.height, width / image.width)
        wide, high = (
            max(width, round(image.width * scale)),
            max(height, round(image.height * scale)),
        )
        left, top = (wide - width) // 2, (high - height) // 2
        resized = image.resize((wide, high), Image.Resampling.BILINEAR)
        return resized.crop((left, top, left + width, top + height))

    return ImageFiles(
        [folder / file for file in files],
        labels,
        name,
        split or "all",
        classes,
        (channels, height, width),
        cover,
    )


def load_celeba(root: Path, split: str, download: bool = False) -> ImageFiles:
    """One split of CelebA at 64x64; see the module's text. Labels are the attributes, 0 or 1, ``(N,
    40)``.

    Args:
        root: directory that holds ``celeba``.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        download: fetch missing files through torchvision (1.4 GB; needs the package gdown).

    Raises:
        FileNotFoundError: if files are missing.
        ValueError: if a list is truncated or damaged.
    """
    folder = root / "celeba"
    pictures = folder / "img_align_celeba"
    lists = folder / "list_eval_partition.txt", folder / "list_attr_celeba.txt"
    if download and not (pictures.is_dir() and all(path.exists() for path in lists)):
        import torchvision.datasets

        try:
            torchvision.datasets.CelebA(root, download=True)
        except Exception as error:
            raise FileNotFoundError(
                f"downloading celeba64 to {root} failed ({type(error).__name__}: {error}); copy "
                "the files "
                f"to {folder} in torchvision's layout"
            ) from error
    for path in (*lists, pictures):
        if not path.exists():
            raise FileNotFoundError(
                f"celeba64: no {path}; pass download=True, or point root= to a directory that "
                "holds "
                "celeba/ in torchvision's layout"
            )
    partition = _read_partition(lists[0])
    names, attributes = _read_attributes(lists[1])
    if attributes.keys() != partition.keys():
        raise ValueError(
            f"{lists[0]} and {lists[1]} list different images ({len(partition):,} and "
            f"{len(attributes):,}): one is truncated; fetch it again"
        )
    chosen = [file for file, part in partition.items() if part == _PARTITION[split]]
    return ImageFiles(
        [pictures / file for file in chosen],
        (torch.tensor([attributes[file] for file in chosen]).reshape(-1, len(names)) + 1) // 2,
        "celeba64",
        split,
        names,
        (3, CELEBA_SIZE, CELEBA_SIZE),
        _crop_face,
    )


def _crop_face(image: Image.Image) -> Image.Image:
    if image.size != _CELEBA_ALIGNED:
        raise ValueError(f"it has {image.width}x{image.height} pixels, aligned images have 178x218")
    face = image.crop(CELEBA_BOX)
    return face.resize((CELEBA_SIZE, CELEBA_SIZE), Image.Resampling.BILINEAR)


def _read_partition(path: Path) -> dict[str, int]:
    partition = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split()
        if len(fields) != 2 or fields[1] not in ("0", "1", "2"):
            raise ValueError(f"{path}, line {number}: expected a file and 0, 1 or 2, got {line!r}")
        partition[fields[0]] = int(fields[1])
    return partition


def _read_attributes(path: Path) -> tuple[list[str], dict[str, list[int]]]:
    """Names of the attributes, and file -> one value of -1 or 1 per attribute."""
    lines = path.read_text().splitlines()
    if len(lines) < 2 or not lines[0].strip().isdigit():
        raise ValueError(
            f"{path} must start with the number of images and the attributes' names; fetch it again"
        )
    count, names = int(lines[0]), lines[1].split()
    attributes = {}
    for number, line in enumerate(lines[2:], 3):
        fields = line.split()
        if len(fields) != 1 + len(names) or not set(fields[1:]) <= {"-1", "1"}:
            raise ValueError(
                f"{path}, line {number}: expected a file and {len(names)} times -1 or 1, got "
                f"{line!r}"
            )
        attributes[fields[0]] = [int(value) for value in fields[1:]]
    if len(attributes) != count:
        raise ValueError(f"{path} is truncated: {len(attributes):,} images instead of {count:,}")
    return names, attributes
