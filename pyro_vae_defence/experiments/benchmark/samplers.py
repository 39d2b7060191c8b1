"""The kernels that are compared; a new one is one more line of :data:`SAMPLERS`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from pyro_vae_defence.defence import KernelFactory
from pyro_vae_defence.defence.mcmc import PAPER_SETTINGS
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS
from pyro_vae_defence.models import ConvVAE


class Sampler(NamedTuple):
    """How a kernel takes part.

    Attributes:
        label: what tables call it.
        make: from a trained VAE to what makes a kernel from a Pyro model.
        gradients: gradients of a usual transition, which turns a warm-up in gradients into transitions.
        patience: its budget of gradients, as a multiple of ``max_gradients``.
    """

    label: str
    make: Callable[[ConvVAE], KernelFactory]
    gradients: int
    patience: int = 1


def _plain(kernel: Any, **options: Any) -> Callable[[ConvVAE], KernelFactory]:
    return lambda vae: functools.partial(kernel, **options)


def _whitened(kernel: Any, **options: Any) -> Callable[[ConvVAE], KernelFactory]:
    """In the metric of the training set's mean posterior variance, where 1 is a natural unit of length."""
    return lambda vae: functools.partial(
        kernel, inverse_mass_matrix=vae.mean_posterior_variance, **options
    )


SAMPLERS: dict[str, Sampler] = {
    "hmc": Sampler("HMC, whitened", _whitened(BatchedHMC, step_size=0.5, num_steps=4), 4),
    "nuts": Sampler("NUTS, whitened", _whitened(BatchedNUTS, step_size=0.5, max_tree_depth=6), 8),
    "hmc_plain": Sampler(
        "HMC, not whitened", _plain(BatchedHMC, step_size=0.1, num_steps=4), 4, patience=4
    ),
    "paper": Sampler(
        "HMC, the paper's setting",
        _plain(BatchedHMC, step_size=PAPER_SETTINGS["mnist"][1], preset="paper"),
        20,
        patience=10,
    ),
}
"""Name -> sampler."""

GOLD = "hmc"
"""The sampler of the gold-standard run."""
