"""The ways of this library to a gradient: what runs it, and in which precision its forces are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence.experiments.benchmark.gpu.config import GPUBenchmarkConfig
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.mcmc.captured import Graph
from pyro_vae_defence.mcmc.kernels import BatchedKernel
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.compiled import Recorder, ReducedForce
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import Latents

FORCES: dict[str, Any] = {"float32": None, "TF32": "tf32", "bfloat16": torch.bfloat16}
"""Precision -> the argument of :class:`ReducedForce`. Energies are in float32 in all of them."""


class Way(NamedTuple):
    """An engine and a precision.

    Attributes:
        engine: ``"eager"`` runs the model's Python every time; ``"recorded"`` replays its
            operations; ``"captured"`` replays whole transitions as CUDA graphs; ``"compiled"`` and
            ``"captured, compiled"`` are the last two after ``torch.compile``.
        precision: of the forces, a key of :data:`FORCES`.
    """

    engine: str
    precision: str = "float32"

    def __str__(self) -> str:
        """What results and tables call it."""
        return f"{self.engine}, {self.precision}"

    def prepare(self) -> Any:
        """A fresh ``prepare`` of a kernel or defence."""
        force = FORCES[self.precision]
        if self.engine.startswith("captured"):
            return Graph(force_dtype=force, compile=self.engine == "captured, compiled")
        reduce = None if force is None else functools.partial(ReducedForce, dtype=force)
        if self.engine == "eager":
            return reduce
        recorder = Recorder(compile=self.engine == "compiled")
        return recorder if reduce is None else lambda potential: recorder(reduce(potential))


CAPTURED, EAGER, RECORDED = Way("captured"), Way("eager"), Way("recorded")
PLAIN = tuple(Way(e, p) for p in FORCES for e in ("captured", "eager", "recorded"))
"""All that needs no compiler, the precision that most rests on first."""

COMPILED = (CAPTURED, Way("compiled"), *(Way("captured, compiled", p) for p in FORCES))
"""What does, beside one way that does not."""


def why_not(kernel: BatchedKernel) -> dict[str, str]:
    """Why a kernel's gradients come another way than it was prepared for, if they do."""
    for part in (kernel.prepare, kernel.potential):
        if (reason := getattr(part, "why_not", None)) is not None:
            return {"why_not": reason}
    return {}


def hmc(
    vae: ConvVAE,
    x: Tensor,
    streams: Streams,
    way: Way | None = None,
    warmup: int = 0,
    prepare: Any = None,
    **options: Any,
) -> BatchedKernel:
    """Whitened HMC of fixed length, set up at images ``x``, one row per chain.

    It is prepared by ``prepare``, or else afresh for its ``way``.
    """
    metric = vae.mean_posterior_variance
    kernel = BatchedHMC(vae.model, jitter=0.0, inverse_mass_matrix=metric, **options)
    kernel.streams = streams
    kernel.prepare = prepare if way is None else way.prepare()
    kernel.setup(warmup, x)
    return kernel


def transitions(
    vae: ConvVAE,
    x: Tensor,
    start: Latents,
    streams: Streams,
    way: Way,
    config: GPUBenchmarkConfig,
) -> tuple[BatchedKernel, Callable[[], None]]:
    """A kernel of fixed step size at images ``x``, and what makes its next transition."""
    kernel = hmc(
        vae, x, streams, way,
        adapt_step_size=False, step_size=config.step_size, num_steps=config.num_steps,
    )  # fmt: skip
    position = start

    def transition() -> None:
        nonlocal position
        position = kernel.sample(position)

    return kernel, transition


def cycled(x: Tensor, count: int) -> Tensor:
    """``count`` rows of ``x``, which are taken in turn where there are fewer."""
    return x[torch.arange(count, device=x.device) % len(x)]


Note = Callable[[str], None]
"""Says what is running."""
