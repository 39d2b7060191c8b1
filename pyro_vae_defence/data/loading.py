"""Finding, checking and splitting datasets.

Full datasets are read through torchvision from its own layout, ``<root>/MNIST/raw`` and
``<root>/FashionMNIST/raw``. Since torchvision verifies only what it downloads, every file is
compared here with the sha256 of the original before it is read. Splits are those of the paper,
55,000 / 5,000 / 10,000: validation is the last 5,000 of the 60,000 training images, so that no
random number is involved.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from pyro_vae_defence.data.datasets import ColoredImages, ImageDataset, Images
from pyro_vae_defence.data.files import load_celeba
from pyro_vae_defence.data.variants import (
    ImageTransform,
    TexturedImages,
    TransformedImages,
    invert,
)
from pyro_vae_defence.ops.checks import check_integer

Split = Literal["train", "validation", "test"]

SPLITS = ("train", "validation", "test")
_PLAIN = ("mnist", "fashion_mnist", "color_mnist", "mnist_subset", "fashion_mnist_subset")
_VARIANTS = ("textured", "inverted")
DATASETS = (*_PLAIN, "celeba64", *(f"{name}_{variant}" for name in _PLAIN for variant in _VARIANTS))

ROOT_VARIABLE = "PYRO_VAE_DEFENCE_DATA"
NUM_VALIDATION = 5000

_DIGITS = tuple(str(digit) for digit in range(10))
_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class _Source:
    """A dataset in torchvision's raw layout."""

    torchvision_class: str
    class_names: tuple[str, ...]
    sha256: dict[str, str]
    packaged: str


_SIZES = {
    "train-images-idx3-ubyte": 16 + 60_000 * 784,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 784,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}

_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_SOURCES = {
    "mnist": _Source("MNIST", _DIGITS, _MNIST_SHA256, "mnist_subset"),
    "fashion_mnist": _Source(
        "FashionMNIST", _CLOTHES, _FASHION_MNIST_SHA256, "fashion_mnist_subset"
    ),
}

_PACKAGED = Path(__file__).parent / "packaged"
_PACKAGED_SHA256 = {
    "mnist_subset": "6376ecdba919dc0eb5d44829ac441810f5e142d71d02890da1e072d6b133055e",
    "fashion_mnist_subset": "85f39641f596f180c39f309c5069f9261b0fc5e9b5354a5d81c8f03d98f77207",
}


def default_root() -> Path:
    """Where full datasets are looked for: ``$PYRO_VAE_DEFENCE_DATA``, or the user's cache."""
    if os.environ.get(ROOT_VARIABLE):
        return Path(os.environ[ROOT_VARIABLE])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pyro_vae_defence"


def load(
    name: str,
    split: Split,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    transform: ImageTransform | None = None,
) -> Images:
    """Load one split of a dataset.

    Args:
        name: ``"mnist"``, ``"fashion_mnist"`` or ``"color_mnist"`` (55,000 / 5,000 / 10,000 images
            of 28x28; ColorMNIST has each in seven colours), or one of the class-balanced subsets
            packaged with the library, ``"mnist_subset"`` and ``"fashion_mnist_subset"`` (6,000 /
            500 / 1,000). Any of these with ``_textured`` or ``_inverted`` appended is a harder
            variant (:mod:`pyro_vae_defence.data.variants`). ``"celeba64"`` is decoded from its
            files on demand (:mod:`pyro_vae_defence.data.files`).
        split: ``"train"``, ``"validation"`` or ``"test"``.
        root: directory of the full datasets; :func:`default_root` when ``None``.
        download: fetch missing files through torchvision.
        transform: applied on the fly to float batches ``(B, C, H, W)``.

    Raises:
        ValueError: for an unknown name or split, or a truncated or corrupted file.
        FileNotFoundError: if a file is missing; there is no fallback to another dataset.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}; got {name!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if transform is not None:
        return TransformedImages(load(name, split, root, download), transform)
    plain, _, variant = name.rpartition("_")
    if variant == "textured":
        return TexturedImages(load(plain, split, root, download), name)
    if variant == "inverted":
        return TransformedImages(load(plain, split, root, download), invert, name)
    if name in _PACKAGED_SHA256:
        return _load_packaged(name, split)
    if name == "color_mnist":
        return ColoredImages(_load_full("mnist", split, _root(root), download), "color_mnist")
    if name == "celeba64":
        return load_celeba(_root(root), split, download)
    return _load_full(name, split, _root(root), download)


def _root(root: str | os.PathLike[str] | None) -> Path:
    return default_root() if root is None else Path(root)


def batches(
    dataset: Any,
    batch_size: int,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
    drop_last: bool = False,
) -> DataLoader[Any]:
    """A loader that fetches whole batches with one index.

    The order depends on ``generator``, or on torch's global seed when it is ``None``, and on
    nothing else, so that a training run can be resumed exactly.

    Args:
        dataset: any of this package's datasets, or any dataset that takes lists of indices.
        batch_size: images per batch, >= 1.
        shuffle: a new random order for every pass.
        generator: source of the order.
        drop_last: leave out a last batch that is not full.
    """
    check_integer("batch_size", batch_size)
    sampler: Any = (
        RandomSampler(dataset, generator=generator) if shuffle else SequentialSampler(dataset)
    )
    return DataLoader(
        dataset,
        sampler=BatchSampler(sampler, batch_size, drop_last),
        batch_size=None,
        generator=generator,
    )


def stratified(
    dataset: Images,
    num: int,
    generator: torch.Generator | None = None,
    column: int = 0,
) -> Tensor:
    """Indices of ``num`` random images with the same number from each class (appendix D.2).

    Where ``num`` is no multiple of the number of classes, the first classes have one more.

    Args:
        dataset: dataset to draw from.
        num: number of images, >= 1.
        generator: source of randomness; torch's global seed when ``None``.
        column: which label to stratify by when there are several (ColorMNIST: 0 digit, 1 colour).

    Returns:
        int64 ``(num,)``, ordered by class in turn: any leading part is as balanced as it can be.
    """
    labels = dataset.labels if dataset.labels.dim() == 1 else dataset.labels[:, column]
    classes = labels.unique()
    check_integer("num", num)
    rounds = -(-num // len(classes))
    chosen = []
    for label in classes:
        members = (labels == label).nonzero().flatten()
        if len(members) < rounds:
            raise ValueError(
                f"num={num} needs {rounds} images of class {int(label)}, {dataset!r} has "
                f"{len(members)}; ask for at most {len(members) * len(classes)}"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:rounds]])
    return torch.stack(chosen, 1).flatten()[:num]


# --- Full datasets
# ---------------------------------------------------------------------------------


def _load_full(name: str, split: str, root: Path, download: bool) -> ImageDataset:
    source = _SOURCES[name]
    # Imported here: the packaged subsets need no torchvision, and its import takes a second.
    import torchvision.datasets

    dataset_class = getattr(torchvision.datasets, source.torchvision_class)
    raw = root / source.torchvision_class / "raw"
    if download and not all((raw / file).exists() for file in source.sha256):
        try:
            _download(dataset_class, root, raw)
        except Exception as error:
            raise FileNotFoundError(
                f"downloading {name} to {root} failed ({type(error).__name__}: {error}); check the "
                f"network, copy the files to {raw}, or use the packaged {source.packaged!r}"
            ) from error
    # torchvision asks for all four files, whichever split is wanted.
    for file, sha256 in source.sha256.items():
        _verify(raw / file, sha256, _SIZES[file], name, source.packaged)
    read = dataset_class(root, train=split != "test")
    images, labels = read.data[:, None], read.targets
    if split == "train":
        images, labels = images[:-NUM_VALIDATION], labels[:-NUM_VALIDATION]
    elif split == "validation":
        images, labels = images[-NUM_VALIDATION:], labels[-NUM_VALIDATION:]
    return ImageDataset(images, labels, name, split, source.class_names)


def _download(dataset_class: Any, root: Path, raw: Path) -> None:
    """Fetch the missing files. They appear in their place when whole; files that are there stay."""
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
        dataset_class(temporary, download=True)
        for file in _SIZES:
            if not (raw / file).exists():
                os.replace(Path(temporary) / raw.relative_to(root) / file, raw / file)


def _verify(path: Path, sha256: str, size: int, name: str, packaged: str) -> None:
    if not path.exists():
        raise FileNotFoundError(
            f"{name}: no file {path}; pass download=True, point root= or ${ROOT_VARIABLE} to a "
            f"directory in torchvision's layout, or use the packaged {packaged!r}"
        )
    found = path.stat().st_size
    if found != size:
        kind = "truncated" if found < size else "too long"
        raise ValueError(
            f"{name}: {path} is {kind} ({found:,} bytes instead of {size:,}); "
            "delete it and load again with download=True"
        )
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(
            f"{name}: {path} is corrupted (its sha256 is not that of the original file); "
            "delete it and load again with download=True"
        )


# --- Packaged subsets
# ------------------------------------------------------------------------------


def _load_packaged(name: str, split: str) -> ImageDataset:
    path = _PACKAGED / f"{name}.npz"
    mend = "reinstall pyro-vae-defence"
    if not path.exists():
        raise FileNotFoundError(f"{name}: no file {path}, which comes with the library; {mend}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != _PACKAGED_SHA256[name]:
        raise ValueError(f"{name}: {path} is damaged (its sha256 is wrong); {mend}")
    with np.load(path, allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays[f"{split}_images"])[:, None]
        labels = torch.from_numpy(arrays[f"{split}_labels"]).long()
    class_names = _SOURCES[name.removesuffix("_subset")].class_names
    return ImageDataset(images, labels, name, split, class_names)
