"""CelebA at 64x64, with 40 binary attributes.

Read from torchvision's layout, ``<root>/celeba``: the aligned images of 178x218 in
``img_align_celeba``, the published split in ``list_eval_partition.txt`` (162,770 / 19,867 / 19,962
images), and the attributes in ``list_attr_celeba.txt``. The identities, boxes and landmarks beside
them are not needed. As in NVAE, the box (left 15, top 40, right 163, bottom 188) is cut out and its
148x148 pixels are scaled to 64x64 (bilinear, with antialiasing).

Liu, Luo, Wang, Tang, "Deep learning face attributes in the wild", 2015;
https://arxiv.org/abs/1411.7766
Vahdat, Kautz, "NVAE: a deep hierarchical variational autoencoder", 2020;
https://arxiv.org/abs/2007.03898
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from pyro_vae_defence.data.datasets import SPLITS
from pyro_vae_defence.data.files import ImageFiles

BOX = (15, 40, 163, 188)
"""Left, top, right and bottom of the face in an aligned image (NVAE)."""

SIZE = 64
_ALIGNED = (178, 218)


def load_celeba(root: Path, split: str, download: bool = False) -> ImageFiles:
    """One split of CelebA; labels are the attributes, 0 or 1, ``(N, 40)``.

    ``root`` holds ``celeba``; ``download`` fetches missing files through torchvision (1.4 GB; needs
    the package gdown). Raises ``FileNotFoundError`` if files are missing, and ``ValueError`` if a
    list is truncated or damaged.
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
                f"downloading celeba64 to {root} failed ({type(error).__name__}: {error}); "
                f"copy the files to {folder} in torchvision's layout"
            ) from error
    for path in (*lists, pictures):
        if not path.exists():
            raise FileNotFoundError(
                f"celeba64: no {path}; pass download=True, or point root= to a directory that "
                "holds celeba/ in torchvision's layout"
            )
    partition = _read_partition(lists[0])
    names, attributes = _read_attributes(lists[1])
    if attributes.keys() != partition.keys():
        raise ValueError(
            f"{lists[0]} and {lists[1]} list different images ({len(partition):,} and "
            f"{len(attributes):,}): one is truncated; fetch it again"
        )
    chosen = [file for file, part in partition.items() if part == SPLITS.index(split)]
    paths = [pictures / file for file in chosen]
    signs = torch.tensor([attributes[file] for file in chosen], device="cpu")
    labels = (signs.reshape(-1, len(names)) + 1) // 2
    return ImageFiles(paths, labels, "celeba64", split, names, (3, SIZE, SIZE), _crop_face)


def _crop_face(image: Image.Image) -> Image.Image:
    if image.size != _ALIGNED:
        raise ValueError(f"it has {image.width}x{image.height} pixels, aligned images have 178x218")
    face = image.crop(BOX)
    return face.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def _read_partition(path: Path) -> dict[str, int]:
    """File -> number of its split, in the order of :data:`SPLITS`."""
    partition = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if len(fields) != 2 or fields[1] not in ("0", "1", "2"):
            raise ValueError(f"{path}, line {number}: expected a file and 0, 1 or 2, got {line!r}")
        partition[fields[0]] = int(fields[1])
    return partition


def _read_attributes(path: Path) -> tuple[list[str], dict[str, list[int]]]:
    """Names of the attributes, and file -> one value of -1 or 1 per attribute."""
    lines = path.read_text(encoding="utf-8").splitlines()
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
