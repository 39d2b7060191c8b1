"""Result files: what every one says about itself, runs that go on from one, their randomness and
intervals."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence import metrics
from pyro_vae_defence.experiments.provenance import provenance
from pyro_vae_defence.ops.files import write_atomically


def header(experiment: str, config: Any, weights: Any, command: str, **more: Any) -> dict[str, Any]:
    """What a result is of: experiment, configuration as JSON holds it, weights, command and
    provenance."""
    return {
        "experiment": experiment,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "weights": weights,
        **more,
        "command": command,
        "provenance": provenance(),
    }


def resume(path: Path, result: dict[str, Any], *parts: str) -> None:
    """Take over the ``parts`` that an earlier call has left in the file, if there is one.

    Raises:
        ValueError: if the file is damaged, of another configuration or of other weights.
    """
    if not path.exists():
        return
    earlier = load(path)
    for key in ("config", "weights"):
        if earlier.get(key) != result[key]:
            raise ValueError(
                f"{path} belongs to another run (its {key} differs); "
                "move it away, or choose another output directory"
            )
    result.update({part: earlier[part] for part in parts})


def read(
    directory: str | os.PathLike[str], run: str = "an experiment"
) -> dict[str, dict[str, Any]]:
    """The result files of a directory by name, in order of their names; ``run`` is what would make
    some.

    Raises:
        ValueError: if there is none, or one is damaged.
    """
    files = sorted(Path(directory).glob("*.json"))
    if not files:
        raise ValueError(f"no result files (*.json) in {directory}; run {run} first")
    return {path.stem: load(path, run) for path in files}


def load(path: Path, run: str = "the experiment") -> dict[str, Any]:
    """One result file; ``run`` is what would make it again.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"result file {path} is damaged ({error}); move it away and run {run} again"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no result file: it holds a {type(found).__name__}")
    return found


def save(path: Path, result: dict[str, Any], indent: int = 2) -> None:
    """Write a result file atomically."""
    write_atomically(path, (json.dumps(result, indent=indent) + "\n").encode())


def generator(seed: int, purpose: str) -> torch.Generator:
    """Randomness of one purpose, whatever ran before it, in this process or an interrupted one."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {purpose}".encode()))


def interval(
    values: Tensor, image: Tensor | None = None, statistic: str = "mean"
) -> dict[str, float]:
    """Estimate and bootstrap interval over images; with ``image``, restarts of one stay
    together."""
    found = metrics.bootstrap_interval(
        values, image, statistic=statistic, generator=torch.Generator().manual_seed(0)
    )
    return as_entry(found)


def as_entry(found: metrics.Interval) -> dict[str, float]:
    """An interval as result files hold it."""
    return {"estimate": found.estimate, "low": found.low, "high": found.high}
