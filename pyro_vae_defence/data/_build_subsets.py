"""Cut the packaged subsets from the full datasets.

``python -m pyro_vae_defence.data._build_subsets ROOT`` takes, for every class, 600 images of the
training split, 50 of the validation split and 100 of the test split, at even distances through the
class (the first half of MNIST's test set is the easier one). ``<split>_indices`` is where they
stood.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import numpy as np
import torch

from pyro_vae_defence.data.datasets import Images
from pyro_vae_defence.data.idx import PACKAGED
from pyro_vae_defence.data.loading import load

PER_CLASS = {"train": 600, "validation": 50, "test": 100}


def some_of_each_class(dataset: Images, count: int) -> torch.Tensor:
    """Indices of ``count`` images of every class at even distances, in their original order."""
    chosen = []
    for label in dataset.labels.unique():
        members = (dataset.labels == label).nonzero().flatten()
        chosen.append(members[torch.arange(count) * len(members) // count])
    return torch.cat(chosen).sort().values


def main(root: str) -> None:
    """Write both subsets and print their sha256, which loading checks."""
    for name in ("mnist", "fashion_mnist"):
        arrays: dict[str, Any] = {}
        for split, count in PER_CLASS.items():
            dataset = load(name, split, root)  # type: ignore[arg-type]
            indices = some_of_each_class(dataset, count)
            images, labels = dataset[indices]
            arrays[f"{split}_images"] = (images[:, 0] * 255).round().byte().numpy()
            arrays[f"{split}_labels"] = labels.byte().numpy()
            arrays[f"{split}_indices"] = indices.int().numpy()
        path = PACKAGED / f"{name}_subset.npz"
        np.savez_compressed(path, **arrays)
        print(path.name, hashlib.sha256(path.read_bytes()).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1])
