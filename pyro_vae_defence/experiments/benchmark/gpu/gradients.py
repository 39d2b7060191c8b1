"""Sections ``gradients`` and ``compiled``: gradients per second of exact chains, against rows.

They are those of real transitions: momenta are drawn, leapfrog steps made, energies in full float32
compared, moves accepted. A transition of L steps counts L gradients; the energy that a chain with
reduced forces asks for at its end is not counted, but takes its time. What is timed first takes the
longest: recording, capture and compilation are stated apart.

Since a fast wrong gradient is worth nothing, every way ends with the energies that its chains
believe in beside those of a plain run of the model in float32 at the same latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence.experiments.benchmark.chains import encodings
from pyro_vae_defence.experiments.benchmark.gpu.config import GPUBenchmarkConfig
from pyro_vae_defence.experiments.benchmark.gpu.timing import Call, turns
from pyro_vae_defence.experiments.benchmark.gpu.ways import Note, Way, cycled, transitions, why_not
from pyro_vae_defence.mcmc.kernels import BatchedKernel
from pyro_vae_defence.models import ConvVAE, program


def gradients(
    vae: ConvVAE,
    x: Tensor,
    rows: int,
    ways: Sequence[Way],
    config: GPUBenchmarkConfig,
    note: Note,
) -> dict[str, Any]:
    """Gradients per second of each way with ``rows`` chains, the ways taking turns."""
    images = cycled(x, rows)
    start, streams = encodings(vae, images, 1, config.seed)
    kernels: dict[str, BatchedKernel] = {}

    def maker(way: Way) -> Callable[[], Call]:
        def make() -> Call:
            kernels[str(way)], call = transitions(vae, images, start, streams, way, config)
            return call

        return make

    makers = {str(way): maker(way) for way in ways}
    found = turns(makers, images.device, config.seconds, config.repeats, note)
    for name, entry in found.items():
        if "error" not in entry:
            entry["gradients_per_second"] = rows * config.num_steps / entry["seconds"]
            entry |= why_not(kernels[name]) | _state(vae, images, kernels[name])
    return found


def _state(vae: ConvVAE, x: Tensor, kernel: BatchedKernel) -> dict[str, float]:
    """How the chains do, and how far off the energies are that they compare."""
    with torch.no_grad():
        energy = program.potential(vae, x)(kernel.state.position)
    assert kernel.info is not None
    return {
        "acceptance_rate": float(kernel.info.acceptance_rate.mean()),
        "energy": float(energy.mean()),
        "largest_energy_error": float((kernel.state.energy - energy).abs().max()),
    }
