"""Section ``engines``: this library, stock Pyro image by image, and NumPyro vectorised over images,
taking turns.

All run the same number of transitions of the same decoder at the same images from the same latents:
HMC with the same fixed number of leapfrog steps, hence with the same number of gradients, and NUTS
with trees of the same largest depth.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro.infer
import torch
from torch import Tensor, nn

from pyro_vae_defence.defence import DefenceResult, MCMCDefence
from pyro_vae_defence.experiments.benchmark.chains import encodings
from pyro_vae_defence.experiments.benchmark.config import BenchmarkConfig
from pyro_vae_defence.experiments.benchmark.numpyro_engine import Job, Layer, serve
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS
from pyro_vae_defence.mcmc.integrators import energy_and_gradient
from pyro_vae_defence.models import ConvVAE, program

_STEP_SIZE = 0.5  # whitened; the start of the adaptation
_PLAIN_STEP_SIZE = 0.1  # stock Pyro takes no metric
_RELATIVE_ERROR = 1e-3  # of energies and gradients in float32 between the two decoders

NO_NUMPYRO = "NumPyro is not installed; pip install 'pyro-vae-defence[bench]'"


def engines(
    vae: ConvVAE, x: Tensor, config: BenchmarkConfig, note: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds per image of each engine: median over turns.

    Args:
        vae: trained VAE with Bernoulli likelihood.
        x: images ``(N, C, H, W)``; stock Pyro runs ``one_by_one_images`` of them in all, over the
            turns.
        config: ``engine_*``, ``one_by_one_images``, ``repeats`` and ``seed``.
        note: told what comes next.
    """
    start, _ = encodings(vae, x, 1, config.seed)
    samples = config.engine_transitions - config.engine_warmup
    depth = config.engine_tree_depth
    metric = vae.mean_posterior_variance

    def defence(kernel: Any, **options: Any) -> MCMCDefence:
        made = functools.partial(kernel, **options)
        return MCMCDefence(vae, made, samples, config.engine_warmup)

    ours = {"step_size": _STEP_SIZE, "inverse_mass_matrix": metric}
    stock = {"step_size": _PLAIN_STEP_SIZE, "adapt_mass_matrix": False}
    length = {"num_steps": config.engine_steps}
    batched = {
        "hmc": defence(BatchedHMC, **ours, **length, jitter=0.0),
        "nuts": defence(BatchedNUTS, **ours, max_tree_depth=depth),
    }
    one_by_one = {
        "pyro_hmc": defence(pyro.infer.HMC, **stock, **length),
        "pyro_nuts": defence(pyro.infer.NUTS, **stock, max_tree_depth=depth),
    }
    result: dict[str, Any] = {"images": len(x), "transitions": config.engine_transitions}
    runs: dict[str, list[dict[str, float]]] = {}

    def record(
        name: str, seconds: float, images: int, gradients: float, acceptance: float, **more: float
    ) -> None:
        per_image = {
            "seconds_per_image": seconds / images,
            "gradients": gradients,
            "acceptance_rate": acceptance,
            **more,
        }
        runs.setdefault(name, []).append(per_image)

    with _numpyro(vae, x, start["z"]) as numpyro:
        if numpyro is None:
            result["numpyro"] = NO_NUMPYRO
        else:
            result["numpyro"] = numpyro.recv()["versions"]
            result["numpyro"].update(_same_decoder(vae, x, start["z"], numpyro))
        for turn in range(config.repeats):
            generator = torch.Generator().manual_seed(config.seed + turn)
            for name, defend in batched.items():
                note(f"engines, turn {turn + 1}: {name}")
                outcome = defend(x, generator)
                record(name, outcome.seconds, len(x), *_counted(outcome))
            for name, defend in one_by_one.items():
                note(f"engines, turn {turn + 1}: {name}")
                some = x[turn :: config.repeats][: -(-config.one_by_one_images // config.repeats)]
                began = time.perf_counter()
                outcome = defend(some, generator)
                seconds = time.perf_counter() - began
                record(name, seconds, len(some), *_counted(outcome))
            if numpyro is not None:
                for algorithm, steps in (("HMC", config.engine_steps), ("NUTS", depth)):
                    note(f"engines, turn {turn + 1}: NumPyro {algorithm}")
                    numpyro.send(
                        Job(
                            algorithm,
                            config.engine_warmup,
                            config.engine_transitions,
                            steps,
                            _STEP_SIZE,
                            config.seed,
                        )
                    )
                    found = numpyro.recv()
                    if not found["finite"]:
                        raise ValueError(f"NumPyro's {algorithm} left the finite numbers")
                    record(
                        f"numpyro_{algorithm.lower()}",
                        found["seconds"],
                        len(x),
                        found["gradients"],
                        found["acceptance_rate"],
                        compile_seconds=found["compile_seconds"],
                    )
    result["engines"] = {
        name: {key: float(np.median([turn[key] for turn in turns])) for key in turns[0]}
        for name, turns in runs.items()
    }
    return result


def _counted(outcome: DefenceResult) -> tuple[float, float]:
    """Gradients per image and mean acceptance probability."""
    gradients = float(outcome.num_gradients.double().mean())
    return gradients, float(outcome.sample_stats["acceptance_rate"].mean())


def decoder_layers(vae: ConvVAE) -> list[Layer]:
    """The decoder's transposed convolutions for JAX: kernels ``(height, width, in, out)``, turned
    around."""
    layers = []
    for module in vae.decoder:
        if isinstance(module, nn.ConvTranspose2d):
            assert module.bias is not None
            weight = module.weight.detach().flip(2, 3).permute(2, 3, 0, 1)
            bias = module.bias.detach().numpy()
            # Both dimensions are alike in this decoder.
            (stride, _), (dilation, _) = module.stride, module.dilation
            padding = int(module.padding[0])
            layers.append(Layer(weight.contiguous().numpy(), bias, stride, padding, dilation))
    return layers


@contextmanager
def _numpyro(vae: ConvVAE, x: Tensor, start: Tensor) -> Iterator[Any]:
    """A connection to a process that runs NumPyro, or ``None`` when it is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("jax", "numpyro")):
        yield None
        return
    assert vae.mean_posterior_variance is not None
    # A fresh interpreter: JAX must not be forked into, nor inherit torch's threads.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(
        target=serve,
        args=(
            there,
            torch.get_num_threads(),
            decoder_layers(vae),
            vae.mean_posterior_variance["z"].numpy(),
            x.permute(0, 2, 3, 1).contiguous().numpy(),
            start.numpy(),
        ),
        daemon=True,
    )
    worker.start()
    there.close()  # so that a worker that dies ends recv() by EOFError
    try:
        yield here
    finally:
        if worker.is_alive():
            here.send(None)
        worker.join(10)
        worker.terminate()
        here.close()


def _same_decoder(vae: ConvVAE, x: Tensor, z: Tensor, numpyro: Any) -> dict[str, float]:
    """Largest relative differences of energies and gradients between torch and JAX; too large ones
    are an error."""
    energies, gradients = energy_and_gradient(program.potential(vae, x), {"z": z})
    numpyro.send("energy")
    theirs = [torch.from_numpy(np.array(part)) for part in numpyro.recv()]
    errors = {
        f"{name}_difference": float((a - b).norm() / a.norm())
        for name, a, b in zip(("energy", "gradient"), (energies, gradients["z"]), theirs)
    }
    if not max(errors.values()) < _RELATIVE_ERROR:
        raise ValueError(f"the decoders in torch and JAX disagree: relative differences {errors}")
    return errors
