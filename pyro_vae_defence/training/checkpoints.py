"""Checkpoint files, and the states of random generators."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
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


def get_rng(*loaders: Iterable[Any] | None) -> dict[str, Any]:
    """States of the global generators of torch, NumPy and Python, and of the loaders' own."""
    numpy: Any = np.random.get_state()  # noqa: NPY002  # the global one's
    name, words, *rest = numpy
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(words.astype(np.int64)), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    own, others = _generators(loaders)
    if own is not None:
        state["loader"] = own.get_state()
    state["samplers"] = [generator.get_state() for generator in others]
    return state


def set_rng(state: dict[str, Any], *loaders: Iterable[Any] | None) -> None:
    """Undo :func:`get_rng`; files of earlier versions do not hold all of it."""
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        name, words, *rest = state["numpy"]
        words = words.numpy().astype(np.uint32)
        np.random.set_state((name, words, *rest))  # noqa: NPY002
    if "python" in state:
        random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    own, others = _generators(loaders)
    if own is not None and "loader" in state:
        own.set_state(state["loader"])
    for generator, known in zip(others, state.get("samplers", ())):
        generator.set_state(known)


def chain(loader: Any) -> Iterator[Any]:
    """A loader, its sampler, that one's, and so on."""
    while loader is not None:
        yield loader
        inner = getattr(loader, "batch_sampler", None)
        loader = getattr(loader, "sampler", None) if inner is None else inner


def _generators(
    loaders: tuple[Iterable[Any] | None, ...],
) -> tuple[torch.Generator | None, list[torch.Generator]]:
    """The first loader's own generator, if it has one, and all others: of samplers and loaders."""
    found = [getattr(each, "generator", None) for loader in loaders for each in chain(loader)]
    own = found[0] if isinstance(found[0], torch.Generator) else None
    others = [each for each in found[1:] if isinstance(each, torch.Generator)]
    return own, [each for each in dict.fromkeys(others) if each is not own]
