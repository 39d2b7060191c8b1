"""``python tests/fewer_images.py SCRIPT ARGUMENTS``: a script, with fewer images to train on.

What examples do with a training set they do with a part of it as well, sooner.
"""

from __future__ import annotations

import functools
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from pyro_vae_defence import data
from pyro_vae_defence.data.datasets import Images, PartOfImages

NUM_TRAIN = 1280


def fewer(load: Any) -> Any:
    """``data.load`` with the first ``NUM_TRAIN`` images of every training split."""

    @functools.wraps(load)
    def loaded(name: str, split: str, *args: Any) -> Images:
        found = load(name, split, *args)
        return PartOfImages(found, torch.arange(NUM_TRAIN), split) if split == "train" else found

    return loaded


if __name__ == "__main__":
    script = Path(sys.argv[1])
    del sys.argv[0]
    sys.path[0] = str(script.parent)  # as Python does for a script
    data.load = fewer(data.load)
    runpy.run_path(str(script), run_name="__main__")
