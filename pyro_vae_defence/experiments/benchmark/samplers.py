"""The kernels that are compared; a new one is one more line of :data:`SAMPLERS`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from pyro_vae_defence.defence import KernelFactory
from pyro_vae_defence.defence.mcmc import PAPER_SETTINGS
from pyro_vae_defence.mcmc import (
    BatchedGHMC,
    BatchedHMC,
    BatchedMALA,
    BatchedMAMS,
    BatchedNUTS,
    BatchedULA,
)
from pyro_vae_defence.models import ConvVAE


class Sampler(NamedTuple):
    """How a kernel takes part.

    Attributes:
        label: what tables call it.
        make: from a trained VAE to what makes a kernel from a Pyro model.
        gradients: gradients of a usual transition, which turns a warm-up in gradients into
            transitions.
        exact: whether its draws come from the target.
        patience: its budget and warm-up, as multiples of ``max_gradients`` and
            ``warmup_gradients``.
    """

    label: str
    make: Callable[[ConvVAE], KernelFactory]
    gradients: int
    exact: bool = True
    patience: int = 1


def _plain(kernel: Any, **options: Any) -> Callable[[ConvVAE], KernelFactory]:
    return lambda vae: functools.partial(kernel, **options)


def _whitened(kernel: Any, **options: Any) -> Callable[[ConvVAE], KernelFactory]:
    """In the metric of the training set's mean posterior variance, where 1 is a natural unit of
    length."""
    return lambda vae: functools.partial(
        kernel, inverse_mass_matrix=vae.mean_posterior_variance, **options
    )


SAMPLERS: dict[str, Sampler] = {
    "hmc": Sampler("HMC, whitened", _whitened(BatchedHMC, step_size=0.5, num_steps=4), 4),
    "hmc_burn_in": Sampler(
        "HMC as recommended: whitened, burn-in of 30",
        _whitened(BatchedHMC, step_size=0.2, num_steps=4, burn_in=30),
        4,
    ),
    "nuts": Sampler(
        "NUTS, whitened", _whitened(BatchedNUTS, step_size=0.5, max_tree_depth=6), 24, patience=3
    ),
    "mala": Sampler("MALA, whitened", _whitened(BatchedMALA, step_size=0.5), 1),
    "ghmc": Sampler("generalised HMC, whitened", _whitened(BatchedGHMC, step_size=0.5), 1),
    "mams": Sampler("MAMS, whitened", _whitened(BatchedMAMS, step_size=0.5, num_steps=4), 4),
    "ula": Sampler(
        "unadjusted Langevin, whitened (biased)",
        _whitened(BatchedULA, step_size=0.5),
        1,
        exact=False,
    ),
    "hmc_plain": Sampler(
        "HMC, not whitened", _plain(BatchedHMC, step_size=0.1, num_steps=4), 4, patience=4
    ),
    "paper": Sampler(
        "HMC, the paper's setting",
        _plain(BatchedHMC, step_size=PAPER_SETTINGS["mnist"].step_size, preset="paper"),
        20,
        patience=10,
    ),
}
"""Name -> sampler."""

GOLD = "hmc"
"""The sampler of the gold-standard run."""
