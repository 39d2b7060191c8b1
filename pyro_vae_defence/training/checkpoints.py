"""Checkpoint files, and the states of random generators."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pyro_vae_defence.ops.files import load_tensors, naming

FORMAT = 4


def read(path: Path) -> dict[str, Any]:
    """Contents of a checkpoint; ``ValueError`` if it cannot be read or has another format."""
    mend = "it is damaged or no checkpoint of fit: delete it to train from the start"
    with naming(f"checkpoint {path} cannot be read", mend):
        state = load_tensors(path)
        found = state["format"]
    if found != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {found}, this version reads {FORMAT}; "
            "delete it to train from the start"
        )
    return state


def get_rng(loader: Iterable[Any]) -> dict[str, Any]:
    """States of torch's global generators and of the loader's own."""
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    generator = getattr(loader, "generator", None)
    if isinstance(generator, torch.Generator):
        state["loader"] = generator.get_state()
    return state


def set_rng(state: dict[str, Any], loader: Iterable[Any]) -> None:
    """Undo :func:`get_rng`."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    generator = getattr(loader, "generator", None)
    if isinstance(generator, torch.Generator) and "loader" in state:
        generator.set_state(state["loader"])
