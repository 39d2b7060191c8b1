"""Section ``engines``: this library, Pyro image by image and NumPyro vectorised take turns.

All run the same number of transitions of the same decoder at the same images from the same latents:
HMC with the same fixed number of leapfrog steps, hence with the same number of gradients, and NUTS
with trees of the same largest depth.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import pyro.infer
import torch
from torch import Tensor, nn

from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.experiments.benchmark.chains import encodings
from pyro_vae_defence.experiments.benchmark.config import BenchmarkConfig
from pyro_vae_defence.experiments.benchmark.numpyro_engine import Job, Layer, Place, serve
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
    """Seconds per image of each engine at images ``(N, C, H, W)``: median over turns.

    Stock Pyro runs ``config.one_by_one_images`` of them in all, over the turns.
    """
    start, _ = encodings(vae, x, 1, config.seed)
    samples = config.engine_transitions - config.engine_warmup
    depth = config.engine_tree_depth

    def defence(kernel: Any, **options: Any) -> MCMCDefence:
        made = functools.partial(kernel, **options)
        return MCMCDefence(vae, made, samples, config.engine_warmup)

    ours = {"step_size": _STEP_SIZE, "inverse_mass_matrix": vae.mean_posterior_variance}
    stock = {"step_size": _PLAIN_STEP_SIZE, "adapt_mass_matrix": False}
    length = {"num_steps": config.engine_steps}
    defences = {
        "hmc": defence(BatchedHMC, **ours, **length, jitter=0.0),
        "nuts": defence(BatchedNUTS, **ours, max_tree_depth=depth),
        "pyro_hmc": defence(pyro.infer.HMC, **stock, **length),
        "pyro_nuts": defence(pyro.infer.NUTS, **stock, max_tree_depth=depth),
    }
    result: dict[str, Any] = {"images": len(x), "transitions": config.engine_transitions}
    runs: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    missing = no_numpyro()
    with nullcontext() if missing else numpyro_worker(vae, x, start["z"]) as numpyro:
        if numpyro is None:
            result["numpyro"] = NO_NUMPYRO
        else:
            versions = numpyro.recv()["versions"]
            result["numpyro"] = {**versions, **same_decoder(vae, x, start["z"], numpyro)}
        for turn in range(config.repeats):
            generator = torch.Generator().manual_seed(config.seed + turn)
            some = x[turn :: config.repeats][: -(-config.one_by_one_images // config.repeats)]
            for name, defend in defences.items():
                note(f"engines, turn {turn + 1}: {name}")
                images = some if name.startswith("pyro") else x
                outcome = defend(images, generator)
                acceptance = outcome.sample_stats["acceptance_rate"]
                runs[name].append(
                    {
                        "seconds_per_image": outcome.seconds / len(images),
                        "gradients": float(outcome.num_gradients.double().mean()),
                        "acceptance_rate": float(acceptance.mean()),
                    }
                )
            if numpyro is None:
                continue
            for algorithm, steps in (("HMC", config.engine_steps), ("NUTS", depth)):
                note(f"engines, turn {turn + 1}: NumPyro {algorithm}")
                numbers = config.engine_warmup, config.engine_transitions, steps
                numpyro.send(Job(algorithm, *numbers, _STEP_SIZE, config.seed))
                found = numpyro.recv()
                if not found["finite"]:
                    raise ValueError(f"NumPyro's {algorithm} left the finite numbers")
                kept = ("gradients", "acceptance_rate", "compile_seconds")
                entry = {"seconds_per_image": found["seconds"] / len(x)}
                entry.update({name: found[name] for name in kept})
                runs[f"numpyro_{algorithm.lower()}"].append(entry)
    result["engines"] = {
        name: {key: float(np.median([turn[key] for turn in turns])) for key in turns[0]}
        for name, turns in runs.items()
    }
    return result


def decoder_layers(vae: ConvVAE) -> list[Layer]:
    """The decoder's transposed convolutions for JAX, their kernels turned around."""
    layers = []
    for module in vae.decoder:
        if isinstance(module, nn.ConvTranspose2d):
            assert module.bias is not None
            weight = module.weight.detach().cpu().flip(2, 3).permute(2, 3, 0, 1)
            bias = module.bias.detach().cpu().numpy()
            # Both dimensions are alike in this decoder.
            (stride, _), (dilation, _) = module.stride, module.dilation
            padding = int(module.padding[0])
            layers.append(Layer(weight.contiguous().numpy(), bias, stride, padding, dilation))
    return layers


class Worker:
    """A process that runs NumPyro, seen from this one.

    Args:
        connection: end of a pipe to it.
        limit: longest wait for an answer in seconds; ``None`` for any.
    """

    def __init__(self, connection: Any, limit: float | None = None) -> None:
        self.connection, self.limit = connection, limit

    def send(self, request: Any) -> None:
        """Ask for something."""
        self.connection.send(request)

    def recv(self) -> Any:
        """The next answer.

        Raises:
            RuntimeError: if it does not come in time, the process has ended, or it says so.
        """
        if not self.connection.poll(self.limit):
            raise RuntimeError(f"NumPyro did not answer within {self.limit:g} seconds")
        try:
            found = self.connection.recv()
        except EOFError:
            raise RuntimeError("the process that runs NumPyro has ended") from None
        if isinstance(found, dict) and "error" in found:
            raise RuntimeError(f"NumPyro failed: {found['error']}")
        return found


def no_numpyro() -> bool:
    """Whether JAX or NumPyro is missing."""
    return any(importlib.util.find_spec(name) is None for name in ("jax", "numpyro"))


@contextmanager
def numpyro_worker(
    vae: ConvVAE, x: Tensor, start: Tensor, limit: float | None = None
) -> Iterator[Worker]:
    """A process with NumPyro, the decoder, images and starts, on the same kind of device."""
    assert vae.mean_posterior_variance is not None
    # A fresh interpreter: JAX must not be forked into, nor inherit torch's threads.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    metric = vae.mean_posterior_variance["z"].cpu().numpy()
    images = x.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    place = Place(x.device.type, x.device.index or 0, torch.get_num_threads())
    model = place, decoder_layers(vae), metric, images, start.cpu().numpy()
    worker = context.Process(target=serve, args=(there, *model), daemon=True)
    worker.start()
    there.close()  # so that a worker that dies ends recv() by EOFError
    try:
        yield Worker(here, limit)
    finally:
        with suppress(OSError):  # it has ended
            here.send(None)
        worker.join(5)
        worker.terminate()
        here.close()


def same_decoder(vae: ConvVAE, x: Tensor, z: Tensor, numpyro: Any) -> dict[str, float]:
    """Relative differences of energies and gradients between torch and JAX; too large: an error."""
    energies, gradients = energy_and_gradient(program.potential(vae, x), {"z": z})
    numpyro.send("energy")
    theirs = [torch.from_numpy(np.array(part)).to(x) for part in numpyro.recv()]
    errors = {
        f"{name}_difference": float((a - b).norm() / a.norm())
        for name, a, b in zip(("energy", "gradient"), (energies, gradients["z"]), theirs)
    }
    if not max(errors.values()) < _RELATIVE_ERROR:
        raise ValueError(f"the decoders in torch and JAX disagree: relative differences {errors}")
    return errors
