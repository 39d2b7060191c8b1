"""Sections ``chains``: gold run, gradients until each kernel is stationary, effective sample size
afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae_defence import attacks, diagnostics, metrics
from pyro_vae_defence.defence import NoDefence
from pyro_vae_defence.experiments.benchmark.config import BenchmarkConfig
from pyro_vae_defence.experiments.benchmark.samplers import GOLD, SAMPLERS, Sampler
from pyro_vae_defence.experiments.benchmark.settling import running_means, settled
from pyro_vae_defence.experiments.study import VARIANT, interval
from pyro_vae_defence.mcmc.kernels import BatchedKernel
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import Latents

_POINTS = 60  # of a trajectory in the result file


class Problem(NamedTuple):
    """Attacked images, and the reconstructions a defence should get back.

    Attributes:
        x_adv: ``(N, C, H, W)``.
        decoded: reconstruction of each reference from one draw of the guide, same shape.
    """

    x_adv: Tensor
    decoded: Tensor


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


def attack(vae: ConvVAE, x_ref: Tensor, radius: float, generator: torch.Generator) -> Problem:
    """The paper's attack on the encoder, one restart."""
    pgd = attacks.PGD(attacks.symmetric_kl(vae), Linf(radius), preset="paper")
    x_adv = pgd(x_ref, generator).x_adv[0]
    return Problem(x_adv, NoDefence(vae)(x_ref, generator).reconstruction)


def encodings(vae: ConvVAE, x: Tensor, num_chains: int, seed: int) -> tuple[Latents, Streams]:
    """Where a defence starts, draws from q(z | x), one row per chain and image; and the rows'
    streams."""
    streams = Streams.create(len(x), num_chains, seed=seed, device=x.device)
    folded = x.repeat(num_chains, 1, 1, 1)
    with torch.no_grad():
        return program.encode(vae, folded, streams=streams), streams


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
    """Run one kernel on rows ``x`` from ``start`` until the batch has spent ``num_gradients`` per
    row.

    Args:
        vae: the VAE.
        sampler: the kernel's entry.
        x: attacked image of each row.
        start: latents of each row.
        streams: random streams of the rows.
        num_gradients: budget per row.
        warmup_gradients: of these, spent on adaptation; in transitions of the sampler's usual
            length.
        decoded: reference's reconstruction of each row, for the similarity; left out when ``None``.
        similarity_every: least number of gradients between two similarities.
        after_warmup: whether the budget begins with the end of the warm-up.
    """
    potential = program.potential(vae, x)
    warmup = max(1, warmup_gradients // sampler.gradients)
    kernel = _set_up(vae, sampler, x, streams, warmup)
    scale = {name: value.rsqrt() for name, value in (vae.mean_posterior_variance or {}).items()}
    with torch.no_grad():
        energies, at = [potential(start)], [0]
    positions = [_flat(lat.multiply(start, scale))]
    similarities = [] if decoded is None else [_similarity(vae, start, decoded)]
    gradients = [1]
    state: Latents = dict(start)

    def spent() -> int:
        if not after_warmup:
            return gradients[-1]
        return gradients[-1] - gradients[warmup] if len(gradients) > warmup else -1

    while spent() < num_gradients:
        state = kernel.sample(state)
        assert kernel.state is not None
        assert kernel.info is not None
        # A batch moves in step: smaller trees of NUTS wait for the largest.
        gradients.append(gradients[-1] + int(kernel.info.num_steps.max()))
        energies.append(kernel.state.energy)
        positions.append(_flat(lat.multiply(state, scale)))
        if decoded is not None and gradients[-1] - gradients[at[-1]] >= similarity_every:
            at.append(len(gradients) - 1)
            similarities.append(_similarity(vae, state, decoded))
    found = kernel.diagnostics()
    return Trace(
        np.array(gradients),
        torch.stack(energies).double().numpy(),
        torch.stack(positions).numpy(),
        np.array(at),
        torch.stack(similarities).double().numpy() if similarities else np.empty((0, len(x))),
        float(found["acceptance rate"].mean()),
        int(found["divergences per image"].sum()),
        min(warmup, len(gradients) - 1),
        state,
    )


def gold_run(
    vae: ConvVAE, problem: Problem, config: BenchmarkConfig, seed: int
) -> tuple[dict[str, Any], Trace]:
    """Long run of whitened HMC; even chains start from the attacked encoding, odd ones from the
    prior.

    So spread out, the chains agree (R-hat near 1) only if they have forgotten their starts.

    Returns:
        What the result file keeps, and the run after its warm-up.
    """
    x = problem.x_adv.repeat(config.num_chains, 1, 1, 1)
    start, streams = encodings(vae, problem.x_adv, config.num_chains, seed)
    with torch.no_grad():
        overdispersed = program.prior(vae, x, streams=streams)
    start = lat.where(streams.chain % 2 == 0, start, overdispersed)
    decoded = problem.decoded.repeat(config.num_chains, 1, 1, 1)
    trace = run(
        vae,
        SAMPLERS[GOLD],
        x,
        start,
        streams,
        config.gold_gradients,
        config.gold_warmup,
        decoded,
        config.similarity_every,
        after_warmup=True,
    )
    warm = trace.warm
    keep = trace.similarity_at >= warm
    trace = trace._replace(
        gradients=trace.gradients[warm:],
        energy=trace.energy[warm:],
        position=trace.position[warm:],
        similarity_at=trace.similarity_at[keep] - warm,
        similarity=trace.similarity[keep],
        warm=0,
    )
    tree = _tree(trace, config.num_chains)
    # A chain that never moved has no variance; its R-hat is infinite, as it should be.
    with np.errstate(divide="ignore", invalid="ignore"):
        rhat, ess = diagnostics.rhat(tree), diagnostics.ess(tree)
    energy = _per_image(trace.energy.mean(0), config.num_chains)
    spread = _per_image(trace.energy.var(0), config.num_chains)
    # Images are independent: the variance of the mean over images is the mean variance over their
    # number.
    error = float(np.sqrt((spread / ess["energy"]).mean() / len(energy)))
    similarity = _per_image(trace.similarity.mean(0), config.num_chains)
    return {
        "energy": float(energy.mean()),
        "energy_monte_carlo_error": error,
        "similarity": _interval(similarity),
        "rhat_energy": _quantiles(rhat["energy"]),
        "rhat_latents": _quantiles(rhat["latents"]),
        "gradients_per_chain": int(trace.gradients[-1] - trace.gradients[0]),
        "transitions_per_chain": len(trace.gradients),
        "chains": config.num_chains,
        "acceptance_rate": trace.acceptance,
        "divergences": trace.divergences,
    }, trace


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
    problem = attack(vae, x_ref, radius, generator)
    seeds = [draw_seed(generator) for _ in range(3)]
    note(f"radius {radius:g}: gold run")
    gold, reference = gold_run(vae, problem, config, seeds[0])
    result: dict[str, Any] = {"radius": radius, "gold": gold, "samplers": {}}
    energy = _per_image(reference.energy.mean(0), config.num_chains)
    similarity = _per_image(reference.similarity.mean(0), config.num_chains)
    x = problem.x_adv.repeat(config.num_chains, 1, 1, 1)
    decoded = problem.decoded.repeat(config.num_chains, 1, 1, 1)
    start, streams = encodings(vae, problem.x_adv, config.num_chains, seeds[1])
    some = streams.image < config.ess_images
    for name in names:
        note(f"radius {radius:g}: {SAMPLERS[name].label}")
        trace = run(
            vae,
            SAMPLERS[name],
            x,
            start,
            streams,
            config.max_gradients * SAMPLERS[name].patience,
            config.warmup_gradients * SAMPLERS[name].patience,
            decoded,
            config.similarity_every,
        )
        entry = _settling(trace, energy, similarity, config)
        if config.ess_gradients > 0:
            entry["ess"] = _effective(
                vae,
                SAMPLERS[name],
                x[some],
                lat.index(reference.last, some),
                Streams(seeds[2], streams.image[some], streams.chain[some]),
                config,
            )
        result["samplers"][name] = entry
    return result


def _settling(
    trace: Trace, energy: np.ndarray, similarity: np.ndarray, config: BenchmarkConfig
) -> dict[str, Any]:
    excess = trace.energy - np.tile(energy, config.num_chains)
    mean_excess = excess.mean(1)
    gain = trace.similarity - trace.similarity[0]
    start = _per_image(trace.similarity[0], config.num_chains)
    gold_gain = _interval(similarity - start)
    at = trace.gradients[trace.similarity_at]
    window = config.window
    last = running_means(trace.gradients, excess, window)[-1]
    last_similarity = running_means(at, trace.similarity, window)[-1]
    thinned = np.unique(np.geomspace(1, len(excess), min(_POINTS, len(excess))).astype(int)) - 1
    return {
        "gradients_energy": settled(
            trace.gradients, mean_excess, -config.tolerance, config.tolerance, window
        ),
        "gradients_similarity": settled(
            at, gain.mean(1), gold_gain["low"], gold_gain["high"], window
        ),
        "similarity_start": float(start.mean()),
        "gold_gain_of_similarity": gold_gain,
        "budget": int(trace.gradients[-1]),
        "excess_energy_last": _interval(_per_image(last, config.num_chains)),
        "similarity_last_minus_gold": _interval(
            _per_image(last_similarity, config.num_chains) - similarity
        ),
        "acceptance_rate": trace.acceptance,
        "divergences": trace.divergences,
        "transitions": len(trace.gradients) - 1,
        "trajectory": [
            [int(g), round(float(v), 3)]
            for g, v in zip(trace.gradients[thinned], mean_excess[thinned])
        ],
    }


def _effective(
    vae: ConvVAE, sampler: Sampler, x: Tensor, start: Latents, streams: Streams, config: Any
) -> dict[str, Any]:
    """ESS per gradient, over all chains of an image, of a run that starts where the gold run
    ended."""
    # A kernel of long transitions needs more gradients for a meaningful autocorrelation.
    budget = config.ess_gradients * max(1, sampler.gradients // 4)
    warmup = config.warmup_gradients * sampler.patience
    trace = run(vae, sampler, x, start, streams, budget, warmup, after_warmup=True)
    kept = trace._replace(energy=trace.energy[trace.warm :], position=trace.position[trace.warm :])
    ess = diagnostics.ess(_tree(kept, config.num_chains))
    spent = int(trace.gradients[-1] - trace.gradients[trace.warm]) * config.num_chains
    return {
        "energy_per_gradient": float(np.median(ess["energy"])) / spent,
        "latents_per_gradient": float(np.median(ess["latents"])) / spent,
        "worst_latent_per_gradient": float(np.median(ess["latents"].min(1))) / spent,
        "gradients_per_image": spent,
        "draws_per_chain": len(kept.energy),
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
            sampler = SAMPLERS[name]
            kernel = _set_up(vae, sampler, x, streams, 1000)
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
    kernel = sampler.make(vae)(vae.model)
    if not isinstance(kernel, BatchedKernel):
        raise ValueError(f"{sampler.label} must make a batched kernel, got {kernel!r}")
    kernel.streams = streams
    kernel.setup(warmup, x)
    return kernel


def _similarity(vae: ConvVAE, latents: Latents, decoded: Tensor) -> Tensor:
    with torch.no_grad():
        found = program.decode(vae, latents, tuple(decoded.shape[1:]))
    return metrics.ms_ssim(decoded, found, variant=VARIANT)


def _flat(latents: Latents) -> Tensor:
    return torch.cat([value.flatten(1) for value in latents.values()], 1)


def _per_image(values: np.ndarray, num_chains: int) -> np.ndarray:
    """Mean over chains: ``(rows,)`` to ``(N,)``."""
    return values.reshape(num_chains, -1).mean(0)


def _tree(trace: Trace, num_chains: int) -> Any:
    def unfold(values: np.ndarray) -> np.ndarray:
        draws, rows = values.shape[:2]
        return values.reshape(draws, num_chains, rows // num_chains, *values.shape[2:]).swapaxes(
            0, 1
        )

    return diagnostics.to_datatree(
        {"energy": unfold(trace.energy), "latents": unfold(trace.position)}
    )


def _interval(values: np.ndarray) -> dict[str, float]:
    """Mean over images with its 95% bootstrap interval."""
    return interval(torch.from_numpy(values))


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {
        "median": float(np.median(values)),
        "q99": float(np.quantile(values, 0.99, method="higher")),
        "max": float(np.max(values)),
    }
