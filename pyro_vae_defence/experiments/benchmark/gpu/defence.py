r"""Section ``defence``: the wall time until many images' chains have reached the stationary energy.

*Stationary* is said of the energy's mean over images and chains, less that of a gold run, as in the
benchmark of the sampler engine (:mod:`~pyro_vae_defence.experiments.benchmark.settling`): from some
number of gradients on, its running mean stays within ``tolerance`` nats of zero to the end of the
run. That run is the recommended defence from beginning to end, plain, with nobody looking at a
clock; it gives a number of transitions. Then each way makes a defence of so many transitions,
through :class:`~pyro_vae_defence.defence.MCMCDefence`: encoding, set-up, burn-in, transitions and
the decoding of what they reach are all on the clock, and the mean energy where its chains end
stands beside it. The recommended defence is timed to its end as well.

The gold run is the same sampler for many more transitions on the first ``gold_images`` images, half
of the chains from the encoding and half from the prior. How far the halves' mean energies are apart
says whether both have forgotten where they came from.

Where the dataset has fewer images than are defended, these are taken in turn; each copy has random
streams of its own, hence other starts and chains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.experiments.benchmark.chains import encodings
from pyro_vae_defence.experiments.benchmark.gpu.config import GPUBenchmarkConfig
from pyro_vae_defence.experiments.benchmark.gpu.timing import Call, turns
from pyro_vae_defence.experiments.benchmark.gpu.ways import (
    CAPTURED,
    EAGER,
    RECORDED,
    Note,
    Way,
    cycled,
)
from pyro_vae_defence.experiments.benchmark.settling import settled
from pyro_vae_defence.mcmc.kernels import BatchedKernel
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import Latents

WAYS = (CAPTURED, EAGER, Way("captured", "TF32"), Way("captured", "bfloat16"), RECORDED)


def defence(vae: ConvVAE, x_adv: Tensor, config: GPUBenchmarkConfig, note: Note) -> dict[str, Any]:
    """Gold run, transitions until stationary, and wall times; ``x_adv`` are different images."""
    note("gold run")
    few = x_adv[: config.gold_images]
    gold = gold_run(vae, few, config)
    images = cycled(x_adv, config.num_images)
    known = torch.arange(len(images), device=x_adv.device) % len(x_adv)
    compared = known < len(few)
    reference = gold.energy[known[compared]]
    note("until stationary")
    gradients, excess = _trajectory(vae, images, compared, reference, config)
    reached = settled(gradients, excess, -config.tolerance, config.tolerance, config.window)
    number = len(gradients) - 1 if reached is None else int(np.searchsorted(gradients, reached))
    number = max(1, number)
    ends: dict[str, Tensor] = {}

    def maker(name: str, way: Way, warmup: int, samples: int) -> Callable[[], Call]:
        def make() -> Call:
            prepare = way.prepare()
            made = _recommended(vae, config, warmup, samples, prepare=prepare)

            def call() -> None:
                result = made(images, torch.Generator().manual_seed(config.seed))
                ends[name] = -result.sample_stats["lp"][:, -1, compared]
                reasons[name] = getattr(prepare, "why_not", None)

            return call

        return make

    reasons: dict[str, str | None] = {}
    makers = {str(way): maker(str(way), way, number - 1, 1) for way in WAYS}
    full = f"{CAPTURED}, to the end"
    makers[full] = maker(full, CAPTURED, config.warmup_steps, config.num_samples)
    found = turns(makers, x_adv.device, config.seconds, config.repeats, note)
    for name, entry in found.items():
        if "error" not in entry:
            entry["energy_above_gold"] = float((ends[name] - reference).mean())
            if reasons[name] is not None:
                entry["why_not"] = reasons[name]
    return {
        "images": len(images),
        "different_images": min(len(images), len(x_adv)),
        "chains": config.num_chains,
        "gold": gold.summary,
        "settled": reached is not None,
        "gradients_per_chain": int(gradients[number]),
        "transitions": number,
        "gradients_to_the_end": int(gradients[-1]),
        "trajectory": [[int(g), round(float(v), 3)] for g, v in zip(gradients, excess)],
        "ways": found,
    }


def _recommended(
    vae: ConvVAE, config: GPUBenchmarkConfig, warmup: int, samples: int, **options: Any
) -> MCMCDefence:
    """The recommended sampler on the paper's target, of another length."""
    lengths: dict[str, Any] = {
        "warmup_steps": warmup, "num_samples": samples, "num_chains": config.num_chains,
        "batch_size": config.batch_size,
    }  # fmt: skip
    return MCMCDefence.recommended(vae, None, **lengths, **options)


def _kernel(
    vae: ConvVAE, x: Tensor, streams: Streams, config: GPUBenchmarkConfig, warmup: int
) -> BatchedKernel:
    """The sampler of :func:`_recommended`, set up at images of one row per chain."""
    kernel = _recommended(vae, config, warmup, 1).kernel(vae.model)
    assert isinstance(kernel, BatchedKernel)
    kernel.streams = streams
    kernel.setup(warmup, x)
    return kernel


class Gold(NamedTuple):
    """A gold run: mean energy per image ``(N,)``, and its summary."""

    energy: Tensor
    summary: dict[str, Any]


def gold_run(vae: ConvVAE, x: Tensor, config: GPUBenchmarkConfig) -> Gold:
    """Mean energies of the stationary distribution at images ``x``."""
    start, streams = encodings(vae, x, config.num_chains, config.seed + 1)
    images = x.repeat(config.num_chains, 1, 1, 1)
    with torch.no_grad():
        overdispersed = program.prior(vae, images, streams=streams)
    position: Latents = lat.where(streams.chain % 2 == 0, start, overdispersed)
    kernel = _kernel(vae, images, streams, config, config.gold_warmup)
    total = torch.zeros(len(images), device=x.device)
    for number in range(config.gold_warmup + config.gold_samples):
        position = kernel.sample(position)
        if number >= config.gold_warmup:
            total = total + kernel.state.energy
    energy = (total / config.gold_samples).reshape(config.num_chains, len(x))
    halves = [energy[first::2].mean() for first in (0, 1)] if config.num_chains > 1 else None
    summary = {
        "images": len(x),
        "energy": float(energy.mean()),
        "halves_apart": None if halves is None else float(halves[0] - halves[1]),
        "transitions_per_chain": config.gold_samples,
    }
    return Gold(energy.mean(0), summary)


def _trajectory(
    vae: ConvVAE,
    x: Tensor,
    compared: Tensor,
    reference: Tensor,
    config: GPUBenchmarkConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients per chain at each state of the recommended defence, and the mean excess energy."""
    start, streams = encodings(vae, x, config.num_chains, config.seed)
    at_once = max(1, config.batch_size // config.num_chains)
    sums: list[Tensor] = []
    for rows in torch.arange(len(x), device=x.device).split(at_once):
        # Row c N + i of a batch is chain c of image i.
        chains = torch.arange(config.num_chains, device=x.device)[:, None]
        folded = (chains * len(x) + rows).flatten()
        some = Streams(streams.seed, streams.image[folded], streams.chain[folded])
        images = x[rows].repeat(config.num_chains, 1, 1, 1)
        with torch.no_grad():
            position = lat.index(start, folded)
            energies = [program.potential(vae, images)(position)]
        kernel = _kernel(vae, images, some, config, config.warmup_steps)
        gradients = [1]
        for step in range(config.warmup_steps + config.num_samples):
            position = kernel.sample(position)
            energies.append(kernel.state.energy)
            gradients.append(gradients[-1] + kernel.gradients_of(streams.seed, step))
        inside = compared[rows]
        columns = torch.stack(energies).reshape(len(energies), config.num_chains, len(rows))
        first = int(compared[: int(rows[0])].sum())
        own = reference[first : first + int(inside.sum())]
        sums.append((columns[:, :, inside] - own).mean(1).sum(1))
    excess = torch.stack(sums).sum(0) / len(reference)
    return np.array(gradients), excess.double().cpu().numpy()
