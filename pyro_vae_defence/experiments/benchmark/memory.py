"""Section ``memory``: peak resident memory by the number of images, each in a fresh process."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyro_vae_defence.experiments.benchmark.config import BenchmarkConfig

_MEBIBYTE = 2**20


def memory(
    models: str | os.PathLike[str] | None, config: BenchmarkConfig, note: Callable[[str], None]
) -> dict[str, Any]:
    """Peak memory in MiB of HMC on so many images, in micro-batches of ``memory_batch_size``.

    The weights are those of ``config.model`` in the directory ``models``.
    """
    context = multiprocessing.get_context("spawn")
    measured = []
    for images in config.memory_images:
        note(f"memory of {images} images")
        here, there = context.Pipe(duplex=False)
        worker = context.Process(target=_defend, args=(there, models, images, config))
        worker.start()
        there.close()
        try:
            idle, peak = here.recv()
        except EOFError:
            worker.join()
            raise ValueError(
                f"the process with {images} images ended with exit code {worker.exitcode}; "
                "choose smaller memory_images"
            ) from None
        worker.join()
        measured.append({"images": images, "idle_mib": idle, "peak_mib": peak})
    return {"batch_size": config.memory_batch_size, "measured": measured}


def _defend(connection: Any, models: Any, num_images: int, config: BenchmarkConfig) -> None:
    import torch

    from pyro_vae_defence.defence import MCMCDefence
    from pyro_vae_defence.mcmc import BatchedHMC
    from pyro_vae_defence.models.pretrained import load_pretrained

    vae = load_pretrained(config.model, models)
    metric = vae.mean_posterior_variance
    kernel = functools.partial(BatchedHMC, num_steps=1, jitter=0.0, inverse_mass_matrix=metric)
    transitions, batch_size = config.memory_transitions, config.memory_batch_size
    defence = MCMCDefence(vae, kernel, transitions, 0, batch_size=batch_size)
    generator = torch.Generator().manual_seed(config.seed)
    defence(torch.rand(2, *vae.image_shape, generator=generator), generator)
    idle = peak_memory()
    defence(torch.rand(num_images, *vae.image_shape, generator=generator), generator)
    connection.send((idle, peak_memory()))


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its maximum is inherited from the process that started this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / _MEBIBYTE
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MEBIBYTE
