"""The table of datasets by name, and what takes images from them: batches and samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    default_convert,
)

from pyro_vae_defence.data.celeba import load_celeba
from pyro_vae_defence.data.color_mnist import load_color_mnist, load_color_mnist_subset
from pyro_vae_defence.data.datasets import SPLITS, Images, PartOfImages, Split, default_root
from pyro_vae_defence.data.fashion_mnist import FASHION_MNIST
from pyro_vae_defence.data.mnist import MNIST
from pyro_vae_defence.data.variants import ImageTransform, TexturedImages, TransformedImages, invert
from pyro_vae_defence.ops.checks import as_device, check_generator, check_integer, plain

# A new dataset is a file of this package and a line here: root, split, download -> images.
_PLAIN: dict[str, Callable[[Path, str, bool], Images]] = {
    "mnist": MNIST.load,
    "fashion_mnist": FASHION_MNIST.load,
    "color_mnist": load_color_mnist,
    "mnist_subset": MNIST.load_subset,
    "fashion_mnist_subset": FASHION_MNIST.load_subset,
    "color_mnist_subset": load_color_mnist_subset,
    "celeba64": load_celeba,
}
_VARIANTS: dict[str, Callable[[Images, str], Images]] = {
    "textured": TexturedImages,
    "inverted": lambda images, name: TransformedImages(images, invert, name),
}
DATASETS = (
    *_PLAIN,
    *(f"{name}_{variant}" for name in _PLAIN if name != "celeba64" for variant in _VARIANTS),
)


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
            500 / 1,000), and ``"color_mnist_subset"``, the former in seven colours. Any of these
            with ``_textured`` or ``_inverted`` appended is a harder variant
            (:mod:`pyro_vae_defence.data.variants`). ``"celeba64"`` is decoded from its files on
            demand (:mod:`pyro_vae_defence.data.celeba`).
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
    plain, _, variant = name.rpartition("_")
    if variant in _VARIANTS:
        images = _VARIANTS[variant](load(plain, split, root, download), name)
    else:
        images = _PLAIN[name](default_root() if root is None else Path(root), split, download)
    return images if transform is None else TransformedImages(images, transform)


def batches(
    dataset: Any,
    batch_size: int,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
    drop_last: bool = False,
    labels: bool = True,
    device: str | torch.device | None = None,
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
        labels: whether a batch is a pair of images and labels, or images alone.
        device: where batches are put; where the dataset has them when ``None``.

    Raises:
        ValueError: if ``batch_size`` is below 1, or there is no such device.
    """
    check_integer("batch_size", batch_size)
    check_generator(generator)
    place = None if device is None else as_device("device", device)
    order: Any = SequentialSampler(dataset)
    if shuffle:
        order = RandomSampler(dataset, generator=generator)
    sampler = BatchSampler(order, plain(batch_size), drop_last)
    collate: Any = None if labels else images_alone
    if place is not None:
        collate = partial(_moved, place, collate or default_convert)
    return DataLoader(
        dataset, sampler=sampler, batch_size=None, generator=generator, collate_fn=collate
    )


def images_alone(batch: Any) -> Any:
    """The images of a batch, which is them or a tuple that starts with them."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _moved(place: torch.device, collate: Callable[[Any], Any], batch: Any) -> Any:
    """What ``collate`` makes of a batch, on a device."""
    batch = collate(batch)
    if isinstance(batch, Tensor):
        return batch.to(place)
    return [entry.to(place) if isinstance(entry, Tensor) else entry for entry in batch]


def _check_dataset(dataset: Any) -> None:
    """``ValueError`` unless images and labels can be taken from it by their numbers."""
    if not isinstance(dataset, Images):
        raise ValueError(
            f"dataset must be one of this package's, as load or load_folder return, got a "
            f"{type(dataset).__name__}; images at hand are an ImageDataset((255 * x).byte(), "
            'labels, name, "all", class_names), or are chosen by torch.randperm(len(x))'
        )


def stratified(
    dataset: Images, num: int, generator: torch.Generator | None = None, column: int = 0
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
    _check_dataset(dataset)
    check_integer("column", column, 0)
    check_generator(generator)
    columns = dataset.labels if dataset.labels.dim() > 1 else dataset.labels[:, None]
    if column >= columns.shape[1]:
        raise ValueError(
            f"column={column!r} must be below {columns.shape[1]}, the labels of {dataset!r}"
        )
    labels = columns[:, column]
    classes = labels.unique()
    check_integer("num", num)
    shares = [len(range(turn, num, len(classes))) for turn in range(len(classes))]
    chosen = []
    for label, share in zip(classes, shares):
        members = (labels == label).nonzero().flatten()
        if len(members) < share:
            most = _most(torch.bincount(labels.unique(return_inverse=True)[1]).tolist())
            raise ValueError(
                f"num={num} needs {share} images of class {int(label)}, {dataset!r} has "
                f"{len(members)}; ask for at most {most}"
            )
        order = torch.randperm(len(members), generator=generator, device="cpu")
        chosen.append(members[order[:share]])
    return pad_sequence(chosen).flatten()[:num]  # the last classes may have one less


def _most(sizes: list[int]) -> int:
    """How many images classes of these sizes have in turn, before one of them has none left."""
    least = min(sizes)
    return least * len(sizes) + sizes.index(least)


def random_split(
    dataset: Images, fractions: Sequence[float], generator: torch.Generator | None = None
) -> tuple[PartOfImages, ...]:
    """Divide a dataset at random into parts, e.g. for training, validation and test.

    Images that are made of the same one, as the colours of a digit in ColorMNIST are, stay together
    (:meth:`Images.origins`): a part that held others of them would have been seen by the rest.

    Args:
        dataset: any of this package's datasets, such as a folder of images.
        fractions: share of each part, of images that are made of different ones; positive, 1
            together.
        generator: source of randomness; torch's global seed when ``None``. The same parts need the
            same seed and the same files.

    Raises:
        ValueError: if fractions are out of range, or a part would be empty.

    Example:
        >>> digits = load("mnist_subset", "test")
        >>> [len(part) for part in random_split(digits, (0.5, 0.3, 0.2))]
        [500, 300, 200]
    """
    _check_dataset(dataset)
    check_generator(generator)
    shares = [float(fraction) for fraction in fractions]
    if not all(share > 0 for share in shares) or not abs(sum(shares) - 1) <= 1e-6:
        raise ValueError(f"fractions={fractions} must be positive and sum to 1, e.g. (0.8, 0.2)")
    shuffled = torch.randperm(len(dataset), generator=generator, device="cpu")
    found, origin = dataset.origins().unique(return_inverse=True)
    turn = torch.arange(len(dataset), device="cpu")
    if len(found) < len(dataset):
        turn = torch.randperm(len(found), generator=generator, device="cpu")[origin[shuffled]]
    ends = [round(len(found) * sum(shares[: i + 1])) for i in range(len(shares))]
    parts = [shuffled[(start <= turn) & (turn < end)] for start, end in zip([0, *ends], ends)]
    if not all(len(part) for part in parts):
        raise ValueError(
            f"fractions={fractions} of {dataset!r} leave a part empty: use more images, or fewer "
            "parts"
        )
    count = len(parts)
    return tuple(
        PartOfImages(dataset, part, f"{dataset.split}, part {number} of {count}")
        for number, part in enumerate(parts, 1)
    )
