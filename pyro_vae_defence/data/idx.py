"""Datasets in the files of MNIST, and their subsets that come with the library.

A full dataset is read through torchvision from its own layout, ``<root>/<class>/raw``. Since
torchvision verifies only what it downloads, every file is compared here with the sha256 of the
original before it is read. Splits are those of the paper, 55,000 / 5,000 / 10,000: validation is
the last 5,000 of the 60,000 training images, so that no random number is involved.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_vae_defence.data.datasets import ROOT_VARIABLE, ImageDataset

NUM_VALIDATION = 5000
PACKAGED = Path(__file__).parent / "packaged"
SIZES = {
    "train-images-idx3-ubyte": 16 + 60_000 * 784,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 784,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}


@dataclass(frozen=True)
class IdxDataset:
    """70,000 grey images of 28x28 pixels, and a class-balanced subset of 7,500 of them.

    Args:
        name: dataset's name; the subset's is ``<name>_subset``.
        torchvision_class: name of torchvision's class and of its directory.
        class_names: one name per class.
        sha256: of the four files, in the order of :data:`SIZES`.
        subset_sha256: of the packaged file.
    """

    name: str
    torchvision_class: str
    class_names: tuple[str, ...]
    sha256: tuple[str, str, str, str]
    subset_sha256: str

    def load(self, root: Path, split: str, download: bool) -> ImageDataset:
        """One split of the full dataset; see :func:`pyro_vae_defence.data.loading.load`."""
        # Imported here: the packaged subsets need no torchvision, and its import takes a second.
        import torchvision.datasets

        dataset_class = getattr(torchvision.datasets, self.torchvision_class)
        raw = root / self.torchvision_class / "raw"
        if download and not all((raw / file).exists() for file in SIZES):
            try:
                _download(dataset_class, root, raw)
            except Exception as error:
                raise FileNotFoundError(
                    f"downloading {self.name} to {root} failed ({type(error).__name__}: {error}); "
                    f"check the network, copy the files to {raw}, or use the packaged "
                    f"'{self.name}_subset'"
                ) from error
        # torchvision asks for all four files, whichever split is wanted.
        for file, sha256 in zip(SIZES, self.sha256, strict=True):
            self._verify(raw / file, sha256)
        read = dataset_class(root, train=split != "test")
        part = {
            "train": slice(None, -NUM_VALIDATION),
            "validation": slice(-NUM_VALIDATION, None),
            "test": slice(None),
        }[split]
        images, labels = read.data[part, None], read.targets[part]
        return ImageDataset(images, labels, self.name, split, self.class_names)

    def load_subset(self, root: Path, split: str, download: bool) -> ImageDataset:
        """One split of the packaged subset, 6,000 / 500 / 1,000 images; needs no ``root``."""
        name = f"{self.name}_subset"
        path = PACKAGED / f"{name}.npz"
        mend = "reinstall pyro-vae-defence"
        if not path.exists():
            raise FileNotFoundError(f"{name}: no file {path}, which comes with the library; {mend}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.subset_sha256:
            raise ValueError(f"{name}: {path} is damaged (its sha256 is wrong); {mend}")
        with np.load(path, allow_pickle=False) as arrays:
            images = torch.from_numpy(arrays[f"{split}_images"])[:, None]
            labels = torch.from_numpy(arrays[f"{split}_labels"]).long()
        return ImageDataset(images, labels, name, split, self.class_names)

    def _verify(self, path: Path, sha256: str) -> None:
        if not path.exists():
            raise FileNotFoundError(
                f"{self.name}: no file {path}; pass download=True, point root= or ${ROOT_VARIABLE} "
                "to a directory in torchvision's layout, or use the packaged "
                f"'{self.name}_subset'"
            )
        mend = "delete it and load again with download=True"
        size, found = SIZES[path.name], path.stat().st_size
        if found != size:
            kind = "truncated" if found < size else "too long"
            raise ValueError(
                f"{self.name}: {path} is {kind} ({found:,} bytes instead of {size:,}); {mend}"
            )
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise ValueError(
                f"{self.name}: {path} is corrupted (its sha256 is not that of the original file); "
                f"{mend}"
            )


def _download(dataset_class: Any, root: Path, raw: Path) -> None:
    """Fetch the missing files. They appear in their place when whole; files that are there stay."""
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
        dataset_class(temporary, download=True)
        for file in SIZES:
            if not (raw / file).exists():
                os.replace(Path(temporary) / raw.relative_to(root) / file, raw / file)
