"""Where a result comes from: commit, versions, machine, and the card where there was one."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pyro_vae_defence import __version__

_LIBRARIES = ("torch", "torchvision", "pyro-ppl", "numpy", "arviz")

COMMIT = "PYRO_VAE_DEFENCE_COMMIT"
"""Environment variable that names the commit of a copy without its repository."""


def commit() -> str:
    """The checkout's commit, ``-dirty`` when the package differs from it.

    Of a copy that is no checkout, what the environment variable :data:`COMMIT` says, else the
    version.
    """
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        # An installed copy may lie inside the repository of something else.
        git("ls-files", "--error-unmatch", "--", str(package / "__init__.py"))
        dirty = git("status", "--porcelain", "--", str(package))
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT) or f"release {__version__}"


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """Commit, versions of the libraries results depend on, processor and threads.

    Of a run on a GPU also its card, the driver, and CUDA's and cuDNN's versions.
    """
    on_gpu = device is not None and device.type == "cuda"
    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _LIBRARIES},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **(_card(device) if on_gpu else {}),
    }


def _card(device: torch.device | None) -> dict[str, Any]:
    found = {
        "device": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return found
    return {**found, "driver": asked.stdout.split("\n")[0].strip()}
