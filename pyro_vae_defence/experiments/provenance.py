"""Where a result comes from: commit, versions, machine."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "torchvision", "pyro-ppl", "numpy", "arviz")


def commit() -> str:
    """The checkout's commit, marked ``-dirty`` when the package differs from it; else the
    version."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", str(here.parent))
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return f"release {metadata.version('pyro-vae-defence')}"


def provenance() -> dict[str, Any]:
    """Commit, versions of the libraries results depend on, processor and threads."""
    import torch

    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _LIBRARIES},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
