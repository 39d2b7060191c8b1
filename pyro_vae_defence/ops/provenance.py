"""Where a result comes from: commit, versions, machine."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("torch", "torchvision", "pyro-ppl", "numpy", "arviz")


def commit() -> str:
    """The checkout's commit, ``-dirty`` when the package differs from it; else the version."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", str(package))
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return f"release {metadata.version('pyro-vae-defence')}"


def provenance() -> dict[str, Any]:
    """Commit, versions of the libraries results depend on, processor and threads."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _LIBRARIES},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
