"""Sections ``chains``: gold run, gradients until a kernel is stationary, effective sample size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae_defence import diagnostics, metrics
from pyro_vae_defence.defence import NoDefence
from pyro_vae_defence.experiments.benchmark.config import BenchmarkConfig
from pyro_vae_defence.experiments.benchmark.samplers import GOLD, SAMPLERS, Sampler
from pyro_vae_defence.experiments.benchmark.settling import running_means, settled
from pyro_vae_defence.experiments.study import VARIANT, encoder_attack, interval
from pyro_vae_defence.mcmc.kernels import BatchedKernel
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import Latents

_POINTS = 60  # of a trajectory in the result file


class Trace(NamedTuple):
    """A run of all chains (rows), state by state.

    Attributes:
        gradients: what the batch has computed per row when it reaches a state, ``(K,)``; the start
            costs one.
        energy: ``(K, rows)``, in nats.
        position: whitened latents ``(K, rows, D)``.
        similarity_at: of which states the similarity is known, ``(J,)``.
        similarity: MSSSIM[paper] to the reference's reconstruction, ``(J, rows)``.
        acceptance: mean acceptance probability after warm-up.
        divergences: number of divergent transitions after warm-up.
        warm: index of the first state after warm-up.
        last: latents of the last state.
    """

    gradients: np.ndarray
    energy: np.ndarray
    position: np.ndarray
    similarity_at: np.ndarray
    similarity: np.ndarray
    acceptance: float
    divergences: int
    warm: int
    last: Latents


def encodings(vae: ConvVAE, x: Tensor, num_chains: int, seed: int) -> tuple[Latents, Streams]:
    """Where a defence starts, draws from q(z | x), a row per chain and image; and their streams."""
    streams = Streams.create(len(x), num_chains, seed=seed, device=x.device)
    with torch.no_grad():
        return program.encode(vae, x.repeat(num_chains, 1, 1, 1), streams=streams), streams


def run(
    vae: ConvVAE,
    sampler: Sampler,
    x: Tensor,
    start: Latents,
    streams: Streams,
    num_gradients: int,
    warmup_gradients: int,
    decoded: Tensor | None = None,
    similarity_every: int = 1,
    after_warmup: bool = False,
) -> Trace:
    """Run one kernel on rows ``x`` from ``start`` until each has spent ``num_gradients``.

    ``warmup_gradients`` of these are spent on adaptation, in transitions of the sampler's usual
    length; with ``after_warmup`` the budget begins with the end of the warm-up. The similarity is
    that to ``decoded``, the reference's reconstruction of each row, at states that lie at least
    ``similarity_every`` gradients apart; it is left out when that is ``None``.
    """
    warmup = max(1, warmup_gradients // sampler.gradients)
    kernel = _set_up(vae, sampler, x, streams, warmup)
    scale = {name: value.rsqrt() for name, value in (vae.mean_posterior_variance or {}).items()}
    gradients: list[int] = []
    energies: list[Tensor] = []
    positions: list[Tensor] = []
    at: list[int] = []
    similarities: list[Tensor] = []

    @torch.no_grad()
    def look(state: Latents, energy: Tensor, spent: int) -> None:
        gradients.append(spent)
        energies.append(energy)
        whitened = lat.multiply(state, scale)
        positions.append(torch.cat([value.flatten(1) for value in whitened.values()], 1))
        if decoded is not None and (not at or spent - gradients[at[-1]] >= similarity_every):
            at.append(len(gradients) - 1)
            found = program.decode(vae, state, tuple(decoded.shape[1:]))
            similarities.append(metrics.ms_ssim(decoded, found, variant=VARIANT))

    with torch.no_grad():
        look(start, program.potential(vae, x)(start), 1)
    state = dict(start)
    end = math.inf if after_warmup else num_gradients
    while gradients[-1] < end:
        state = kernel.sample(state)
        assert kernel.info is not None
        # A batch moves in step: smaller trees of NUTS wait for the largest.
        look(state, kernel.state.energy, gradients[-1] + int(kernel.info.num_steps.max()))
        if after_warmup and len(gradients) == warmup + 1:
            end = gradients[-1] + num_gradients
    found = kernel.diagnostics()
    return Trace(
        np.array(gradients),
        torch.stack(energies).double().numpy(),
        torch.stack(positions).numpy(),
        np.array(at, dtype=int),
        torch.stack(similarities).double().numpy() if similarities else np.empty((0, len(x))),
        float(found["acceptance rate"].mean()),
        int(found["divergences per image"].sum()),
        min(warmup, len(gradients) - 1),
        state,
    )


class Gold(NamedTuple):
    """The gold run: mean energy and similarity per image ``(N,)``, last latents, its summary."""

    energy: np.ndarray
    similarity: np.ndarray
    last: Latents
    summary: dict[str, Any]


def gold_run(
    vae: ConvVAE, x_adv: Tensor, x: Tensor, decoded: Tensor, config: BenchmarkConfig, seed: int
) -> Gold:
    """Long run of whitened HMC; even chains start from the encoding, odd ones from the prior.

    So spread out, the chains agree (R-hat near 1) only if they have forgotten their starts.
    """
    start, streams = encodings(vae, x_adv, config.num_chains, seed)
    with torch.no_grad():
        overdispersed = program.prior(vae, x, streams=streams)
    start = lat.where(streams.chain % 2 == 0, start, overdispersed)
    budget, every = (config.gold_gradients, config.gold_warmup), config.similarity_every
    trace = run(vae, SAMPLERS[GOLD], x, start, streams, *budget, decoded, every, after_warmup=True)
    warm, tree = trace.warm, _tree(trace, config.num_chains)
    # A chain that never moved has no variance; its R-hat is infinite, as it should be.
    with np.errstate(divide="ignore", invalid="ignore"):
        rhat, ess = diagnostics.rhat(tree), diagnostics.ess(tree)
    energy = _per_image(trace.energy[warm:].mean(0), config.num_chains)
    spread = _per_image(trace.energy[warm:].var(0), config.num_chains)
    similarity = trace.similarity[trace.similarity_at >= warm].mean(0)
    similarity = _per_image(similarity, config.num_chains)
    # Images are independent: the variance of the mean over them is their mean variance by number.
    error = float(np.sqrt((spread / ess["energy"]).mean() / len(energy)))
    summary = {
        "energy": float(energy.mean()),
        "energy_monte_carlo_error": error,
        "similarity": _interval(similarity),
        "rhat_energy": _quantiles(rhat["energy"]),
        "rhat_latents": _quantiles(rhat["latents"]),
        "gradients_per_chain": int(trace.gradients[-1] - trace.gradients[warm]),
        "transitions_per_chain": len(trace.gradients) - warm,
        "chains": config.num_chains,
        "acceptance_rate": trace.acceptance,
        "divergences": trace.divergences,
    }
    return Gold(energy, similarity, trace.last, summary)


def chains(
    vae: ConvVAE,
    x_ref: Tensor,
    radius: float,
    names: tuple[str, ...],
    config: BenchmarkConfig,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Everything about one radius: gold run, settling and effective sample size of every kernel."""
    generator = torch.Generator().manual_seed(config.seed)
    # The paper's attack on the encoder, one restart; what comes back should be `decoded`.
    x_adv = encoder_attack(vae, radius)(x_ref, generator).x_adv[0]
    decoded = NoDefence(vae)(x_ref, generator).reconstruction.repeat(config.num_chains, 1, 1, 1)
    x = x_adv.repeat(config.num_chains, 1, 1, 1)
    gold_seed, start_seed, ess_seed = (draw_seed(generator) for _ in range(3))
    note(f"radius {radius:g}: gold run")
    gold = gold_run(vae, x_adv, x, decoded, config, gold_seed)
    start, streams = encodings(vae, x_adv, config.num_chains, start_seed)
    some = streams.image < config.ess_images
    again, fresh = lat.index(gold.last, some), Streams(ess_seed, *(s[some] for s in streams[1:]))
    samplers: dict[str, Any] = {}
    for name in names:
        sampler = SAMPLERS[name]
        note(f"radius {radius:g}: {sampler.label}")
        budget = config.max_gradients * sampler.patience
        warmup = config.warmup_gradients * sampler.patience
        every = config.similarity_every
        trace = run(vae, sampler, x, start, streams, budget, warmup, decoded, every)
        samplers[name] = _settling(trace, gold, config)
        if config.ess_gradients > 0:
            samplers[name]["ess"] = _effective(vae, sampler, x[some], again, fresh, config)
    return {"radius": radius, "gold": gold.summary, "samplers": samplers}


def _settling(trace: Trace, gold: Gold, config: BenchmarkConfig) -> dict[str, Any]:
    num_chains, window, tolerance = config.num_chains, config.window, config.tolerance
    gradients, at = trace.gradients, trace.gradients[trace.similarity_at]
    excess = trace.energy - np.tile(gold.energy, num_chains)
    mean_excess = excess.mean(1)
    gain = (trace.similarity - trace.similarity[0]).mean(1)
    start = _per_image(trace.similarity[0], num_chains)
    gold_gain = _interval(gold.similarity - start)
    last = running_means(gradients, excess, window)[-1]
    last_similarity = _per_image(running_means(at, trace.similarity, window)[-1], num_chains)
    thinned = np.unique(np.geomspace(1, len(excess), min(_POINTS, len(excess))).astype(int)) - 1
    points = zip(gradients[thinned], mean_excess[thinned])
    return {
        "gradients_energy": settled(gradients, mean_excess, -tolerance, tolerance, window),
        "gradients_similarity": settled(at, gain, gold_gain["low"], gold_gain["high"], window),
        "similarity_start": float(start.mean()),
        "gold_gain_of_similarity": gold_gain,
        "budget": int(gradients[-1]),
        "excess_energy_last": _interval(_per_image(last, num_chains)),
        "similarity_last_minus_gold": _interval(last_similarity - gold.similarity),
        "acceptance_rate": trace.acceptance,
        "divergences": trace.divergences,
        "transitions": len(gradients) - 1,
        "trajectory": [[int(g), round(float(v), 3)] for g, v in points],
    }


def _effective(
    vae: ConvVAE,
    sampler: Sampler,
    x: Tensor,
    start: Latents,
    streams: Streams,
    config: BenchmarkConfig,
) -> dict[str, Any]:
    """ESS per gradient, over all chains of an image, of a run from where the gold run ended."""
    # A kernel of long transitions needs more gradients for a meaningful autocorrelation.
    budget = config.ess_gradients * max(1, sampler.gradients // 4)
    warmup = config.warmup_gradients * sampler.patience
    trace = run(vae, sampler, x, start, streams, budget, warmup, after_warmup=True)
    ess = diagnostics.ess(_tree(trace, config.num_chains))
    spent = int(trace.gradients[-1] - trace.gradients[trace.warm]) * config.num_chains
    return {
        "energy_per_gradient": float(np.median(ess["energy"])) / spent,
        "latents_per_gradient": float(np.median(ess["latents"])) / spent,
        "worst_latent_per_gradient": float(np.median(ess["latents"].min(1))) / spent,
        "gradients_per_image": spent,
        "draws_per_chain": len(trace.gradients) - trace.warm,
    }


def seconds_per_gradient(
    vae: ConvVAE, x_ref: Tensor, names: tuple[str, ...], config: BenchmarkConfig
) -> dict[str, float]:
    """Seconds per gradient and row of every kernel, the kernels taking turns; median over turns."""
    x = x_ref.repeat(config.num_chains, 1, 1, 1)
    start, streams = encodings(vae, x_ref, config.num_chains, config.seed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(config.repeats + 1):
        for name in names:
            kernel = _set_up(vae, SAMPLERS[name], x, streams, 1000)
            state = kernel.sample(start)  # outside the clock: it also evaluates the start
            spent, began = 0, time.perf_counter()
            while spent < config.timed_gradients:
                state = kernel.sample(state)
                assert kernel.info is not None
                spent += int(kernel.info.num_steps.max())
            # The first turn warms caches and allocators up.
            if turn > 0:
                seconds[name].append((time.perf_counter() - began) / (spent * len(x)))
    return {name: float(np.median(values)) for name, values in seconds.items()}


def _set_up(
    vae: ConvVAE, sampler: Sampler, x: Tensor, streams: Streams, warmup: int
) -> BatchedKernel:
    kernel = sampler.make(vae)
    kernel.streams = streams
    kernel.setup(warmup, x)
    return kernel


def _per_image(values: np.ndarray, num_chains: int) -> np.ndarray:
    """Mean over chains: ``(rows,)`` to ``(N,)``."""
    return values.reshape(num_chains, -1).mean(0)


def _tree(trace: Trace, num_chains: int) -> Any:
    """Energies and latents after warm-up as ArviZ reads them."""

    def unfold(values: np.ndarray) -> np.ndarray:
        draws, rows, *rest = values[trace.warm :].shape
        folded = values[trace.warm :].reshape(draws, num_chains, rows // num_chains, *rest)
        return folded.swapaxes(0, 1)

    found = {"energy": unfold(trace.energy), "latents": unfold(trace.position)}
    return diagnostics.to_datatree(found)


def _interval(values: np.ndarray) -> dict[str, float]:
    """Mean over images with its 95% bootstrap interval."""
    return interval(torch.from_numpy(values))


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {
        "median": float(np.median(values)),
        "q99": float(np.quantile(values, 0.99, method="higher")),
        "max": float(np.max(values)),
    }
