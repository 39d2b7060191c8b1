"""Sections ``training`` and ``attack``: seconds per epoch, and per step of an attack.

An epoch of the paper's VAE through :func:`~pyro_vae_defence.training.fit`, the second of two, since
the first warms up and compiles. Images come from the host, as they do in training; where the
training set has fewer than an epoch is to have, they are taken in turn. A step of an attack is a
share of a whole APGD attack: its gradient of the symmetric KL-divergence, or of the classifier's
margin behind the recommended defence with one chain (BPDA: the chain's end with the derivative of
its start), and its move.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae_defence import attacks
from pyro_vae_defence.attacks import adaptive
from pyro_vae_defence.data.loading import batches
from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.experiments.benchmark.gpu.config import GPUBenchmarkConfig
from pyro_vae_defence.experiments.benchmark.gpu.timing import (
    Call,
    failure,
    release,
    turns,
)
from pyro_vae_defence.experiments.benchmark.gpu.ways import CAPTURED, EAGER, Note, Way
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.objectives import BetaELBO
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.precision import tf32
from pyro_vae_defence.robustness.whitebox import WhiteBox
from pyro_vae_defence.training import FitConfig, fit
from pyro_vae_defence.types import PreparedObjective

WAYS = (CAPTURED, EAGER)
_FEW = 3  # gradients of an attack that runs a defence for each

TRAININGS: dict[str, tuple[bool, dict[str, Any]]] = {
    "float32": (False, {}),
    "TF32": (True, {}),
    "bfloat16": (False, {"precision": "bfloat16"}),
    "TF32, compiled": (True, {"compile": True}),
}
"""Name -> whether TF32 is allowed, and options of :class:`FitConfig`."""


def training(
    x: Tensor, config: GPUBenchmarkConfig, device: torch.device, note: Note
) -> dict[str, Any]:
    """Seconds per epoch on images ``x`` by batch size and way."""
    found: dict[str, Any] = {}
    for batch_size in config.epoch_batch_sizes:
        for name, (allowed, options) in TRAININGS.items():
            note(f"training, {batch_size} images per batch: {name}")
            key = f"{name}, batches of {batch_size}"
            try:
                with tf32(allowed):
                    found[key] = _epoch(x, batch_size, options, config, device)
            except Exception as error:  # the others go on
                found[key] = failure(error)
            release(device)
    return found


def _epoch(
    x: Tensor,
    batch_size: int,
    options: dict[str, Any],
    config: GPUBenchmarkConfig,
    device: torch.device,
) -> dict[str, Any]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        pyro.clear_param_store()
        vae = ConvVAE().to(device)
        loader = batches(x, batch_size, shuffle=True)
        result = fit(
            vae,
            BetaELBO(1.0),
            loader,
            FitConfig(
                epochs=2, schedule="constant", posterior_variance=False, progress=False, **options
            ),
        )
    pyro.clear_param_store()
    first, second = result.history
    return {
        "first_seconds": first["seconds"],
        "seconds": second["seconds"],
        "train_loss": second["train_loss"],
    }


def ascent(
    vae: ConvVAE,
    classifier: Any,
    x: Tensor,
    labels: Tensor,
    config: GPUBenchmarkConfig,
    note: Note,
) -> dict[str, Any]:
    """Seconds per APGD step at images ``x`` by objective."""

    def maker(prepared: Callable[[], PreparedObjective], num_steps: int) -> Callable[[], Call]:
        def make() -> Call:
            attack = attacks.APGD(prepared(), Linf(config.radius), num_steps=num_steps)

            def call() -> None:
                attack(x, torch.Generator().manual_seed(config.seed))

            return call

        return make

    def adaptively(way: Way) -> PreparedObjective:
        lengths = {"warmup_steps": config.warmup_steps, "num_samples": config.num_samples}
        defence = MCMCDefence.recommended(
            vae, None, num_chains=1, batch_size=config.batch_size, prepare=way.prepare(), **lengths
        )
        box = WhiteBox(vae, defence, x)
        goal = adaptive.misclassification(lambda latents, x: classifier(latents), labels)
        return adaptive.expected(adaptive.bpda(box.start, box.chain), goal)

    objectives: dict[str, tuple[Callable[[], PreparedObjective], int]] = {
        "symmetric KL": (lambda: attacks.symmetric_kl(vae), config.ascent_steps)
    }
    for way in WAYS:
        # Each of its steps runs the whole defence.
        objectives[f"misclassification, BPDA, chains {way.engine}"] = (
            functools.partial(adaptively, way),
            _FEW,
        )
    makers = {name: maker(*objective) for name, objective in objectives.items()}
    found = turns(makers, x.device, config.seconds, config.repeats, note)
    for name, entry in found.items():
        if "error" not in entry:
            entry["seconds_per_step"] = entry["seconds"] / objectives[name][1]
    return found
