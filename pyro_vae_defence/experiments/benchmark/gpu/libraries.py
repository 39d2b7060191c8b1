"""Sections ``numpyro`` and ``torchebm``: the same chains in other libraries, on the same card.

Both get the same decoder, images, starting latents, metric, leapfrog steps per transition and
number of transitions, one independent chain per row, and take turns with this library's chains.

*NumPyro*: HMC with a step size of its own for every chain, adapted over the same transitions, in
one ``lax.scan``, ``vmap`` over rows, ``jit``. It runs in a process of its own, whose memory is not
taken in advance. Compilation is stated apart. JAX rounds float32 products to TF32 on a card unless
it is told not to, so that it is timed in both precisions.

*torchebm*: its ``HamiltonianMonteCarlo`` on the decoder's energy in plain torch, without Pyro, the
way its documentation uses it. It accepts per row, takes a diagonal mass and one step size for all
rows, which nothing adapts; so the step size is fixed on both sides. It asks for two gradients per
leapfrog step and two energies per transition, where one gradient per step would do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence.experiments.benchmark.chains import encodings
from pyro_vae_defence.experiments.benchmark.engines import (
    NO_NUMPYRO,
    no_numpyro,
    numpyro_worker,
    same_decoder,
)
from pyro_vae_defence.experiments.benchmark.gpu.config import GPUBenchmarkConfig
from pyro_vae_defence.experiments.benchmark.gpu.timing import Call, release, turns
from pyro_vae_defence.experiments.benchmark.gpu.ways import (
    CAPTURED,
    EAGER,
    FORCES,
    Note,
    Way,
    cycled,
    hmc,
    why_not,
)
from pyro_vae_defence.experiments.benchmark.numpyro_engine import Job
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import Latents

NUMPYRO = {"NumPyro, float32": "highest", "NumPyro, TF32": "default"}
"""What tables call it, and JAX's name of the precision."""

OURS = (
    CAPTURED, *(Way("captured", p) for p in FORCES if p != CAPTURED.precision), EAGER,
    Way("captured, compiled", "bfloat16"),
)  # fmt: skip
"""This library's ways beside it: a capture in every precision, no preparation, and the fastest."""


class Chains:
    """This library's side: whole runs from the same starts.

    A run is ``library_transitions`` transitions after the first energy, set-up on the clock, all
    draws kept. What is recorded, captured or compiled at the first run is used by the others.
    """

    def __init__(
        self,
        vae: ConvVAE,
        x: Tensor,
        start: Latents,
        streams: Streams,
        config: GPUBenchmarkConfig,
        adapt: bool,
    ) -> None:
        self.vae, self.x, self.start, self.streams, self.config = vae, x, start, streams, config
        self.adapt = adapt
        self.found: dict[str, dict[str, Any]] = {}

    def maker(self, way: Way) -> Callable[[], Call]:
        """What :func:`turns` takes."""

        def make() -> Call:
            prepare = way.prepare()
            return lambda: self.run(str(way), prepare)

        return make

    def run(self, name: str, prepare: Any) -> None:
        """One run; what it found is kept."""
        config = self.config
        options: dict[str, Any] = {"step_size": config.step_size, "num_steps": config.num_steps}
        kernel = hmc(
            self.vae, self.x, self.streams, None, config.library_warmup, prepare,
            adapt_step_size=self.adapt, **options,
        )  # fmt: skip
        position, draws = self.start, []
        for _ in range(config.library_transitions):
            position = kernel.sample(position)
            draws.append(position)
        acceptance = kernel.diagnostics()["acceptance rate"]
        self.found[name] = {"acceptance": acceptance, **why_not(kernel)}

    def complete(self, entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Entries of :func:`turns` with gradients per second, and what runs have found."""
        gradients = 1 + self.config.library_transitions * self.config.num_steps
        for name, entry in entries.items():
            if "error" in entry:
                continue
            entry["gradients_per_second"] = len(self.x) * gradients / entry["seconds"]
            found = dict(self.found.get(name, {}))
            if "acceptance" in found:
                entry["acceptance_rate"] = float(found.pop("acceptance").mean())
            entry |= found
        return entries


def _rows(x_adv: Tensor, config: GPUBenchmarkConfig) -> Tensor:
    return cycled(x_adv, config.num_images)


def numpyro(vae: ConvVAE, x_adv: Tensor, config: GPUBenchmarkConfig, note: Note) -> dict[str, Any]:
    """Seconds of a run, this library's ways and NumPyro taking turns."""
    if no_numpyro():
        raise ValueError(NO_NUMPYRO)
    images = _rows(x_adv, config)
    start, streams = encodings(vae, images, config.num_chains, config.seed)
    x = images.repeat(config.num_chains, 1, 1, 1)
    ours = Chains(vae, x, start, streams, config, adapt=True)
    makers = {str(way): ours.maker(way) for way in OURS}
    release(x.device)  # for the other process
    results: dict[str, Any] = {"rows": len(x)}
    limit = config.library_seconds
    with numpyro_worker(vae, x, start["z"], limit) as worker:
        versions = worker.recv()["versions"]
        results |= versions | same_decoder(vae, x, start["z"], worker)

        def theirs(name: str, precision: str) -> Callable[[], Call]:
            numbers = config.library_warmup, config.library_transitions, config.num_steps
            job = Job("HMC", *numbers, config.step_size, config.seed, precision)

            def call() -> float:
                worker.send(job)
                found = worker.recv()
                if not found["finite"]:
                    raise ValueError("NumPyro left the finite numbers")
                kept = ("acceptance_rate", "compile_seconds")
                ours.found[name] = {key: found[key] for key in kept}
                return found["seconds"]

            return lambda: call

        makers |= {name: theirs(name, precision) for name, precision in NUMPYRO.items()}
        found = turns(makers, x.device, config.seconds, config.repeats, note)
    return results | {"ways": ours.complete(found)}


def torchebm(vae: ConvVAE, x_adv: Tensor, config: GPUBenchmarkConfig, note: Note) -> dict[str, Any]:
    """Seconds of a run, this library's ways and torchebm taking turns, at a fixed step size."""
    if importlib.util.find_spec("torchebm") is None:
        raise ValueError("torchebm is not installed; pip install 'pyro-vae-defence[bench]'")
    images = _rows(x_adv, config)
    start, streams = encodings(vae, images, config.num_chains, config.seed)
    x = images.repeat(config.num_chains, 1, 1, 1)
    ours = Chains(vae, x, start, streams, config, adapt=False)
    makers = {str(way): ours.maker(way) for way in (CAPTURED, EAGER)}
    makers["torchebm"] = lambda: _torchebm(vae, x, start["z"], config, ours.found)
    found = turns(makers, x.device, config.seconds, config.repeats, note)
    version = {"rows": len(x), "torchebm": metadata.version("torchebm")}
    return version | {"ways": ours.complete(found)}


def _torchebm(
    vae: ConvVAE, x: Tensor, z: Tensor, config: GPUBenchmarkConfig, found: dict[str, Any]
) -> Call:
    from torchebm.core import BaseModel
    from torchebm.samplers import HamiltonianMonteCarlo

    assert vae.mean_posterior_variance is not None

    class Energy(BaseModel):
        evaluations = gradients = 0

        def forward(self, z: Tensor) -> Tensor:
            self.evaluations += 1
            return 0.5 * z.square().sum(1) - vae.observation(z).log_prob(x)

        def gradient(self, x: Tensor, model_kwargs: Any = None) -> Tensor:
            self.gradients += 1
            return super().gradient(x, model_kwargs)

    energy = Energy(device=x.device)
    _check_energy(vae, x, z, energy)
    # The class is typed for numbers and schedules; a diagonal mass is one value per dimension.
    sampler = HamiltonianMonteCarlo(
        energy,
        step_size=config.step_size,
        n_leapfrog_steps=config.num_steps,
        mass=vae.mean_posterior_variance["z"].reciprocal().to(z),
        device=x.device,
    )

    def call() -> None:
        energy.evaluations = energy.gradients = 0
        generator = torch.Generator(x.device).manual_seed(config.seed)
        # Its diagnostics would ask for a third energy per transition; draws are kept as ours are.
        draws = sampler.sample(
            z, n_steps=config.library_transitions, return_trajectory=True, generator=generator
        )
        moved = (draws[:, 1:] != draws[:, :-1]).any(-1)
        transitions = config.library_transitions
        found["torchebm"] = {
            "acceptance": moved.float(),
            "gradients_per_transition": energy.gradients / transitions,
            "energies_per_transition": (energy.evaluations - energy.gradients) / transitions,
        }

    return call


def _check_energy(vae: ConvVAE, x: Tensor, z: Tensor, energy: Callable[[Tensor], Tensor]) -> None:
    """Raise unless an energy differs from the model's by one constant."""
    with torch.no_grad():
        difference = energy(z) - program.potential(vae, x)({"z": z})
        apart = float((difference - difference.mean()).abs().max())
    if not apart < 0.1:
        raise ValueError(f"the energy written for torchebm is off by {apart:.3g} nats")
