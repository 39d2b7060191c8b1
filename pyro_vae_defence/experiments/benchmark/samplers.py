"""The kernels that are compared; a new one is one more line of :data:`SAMPLERS`."""

from __future__ import annotations

from typing import Any, NamedTuple

from pyro_vae_defence import mcmc
from pyro_vae_defence.defence.mcmc import PAPER_SETTINGS, RECOMMENDED_KERNEL
from pyro_vae_defence.mcmc.kernels import BatchedKernel
from pyro_vae_defence.models import ConvVAE


class Sampler(NamedTuple):
    """How a kernel takes part.

    Attributes:
        label: what tables call it.
        kernel: its class.
        options: what the kernel is made with.
        gradients: of a usual transition, which turns a warm-up in gradients into transitions.
        whitened: whether its metric is the training set's mean posterior variance, where 1 is a
            natural unit of length.
        exact: whether its draws come from the target.
        patience: budget and warm-up, as multiples of ``max_gradients`` and ``warmup_gradients``.
    """

    label: str
    kernel: type[BatchedKernel]
    options: dict[str, Any]
    gradients: int
    whitened: bool = True
    exact: bool = True
    patience: int = 1

    def make(self, vae: ConvVAE) -> BatchedKernel:
        """A fresh kernel on a trained VAE's model."""
        metric = vae.mean_posterior_variance if self.whitened else None
        return self.kernel(vae.model, inverse_mass_matrix=metric, **self.options)


_STEPS = {"step_size": 0.5, "num_steps": 4}
_PLAIN = {"step_size": 0.1, "num_steps": 4}
_PAPER = {"step_size": PAPER_SETTINGS["mnist"].step_size, "preset": "paper"}
_STEP = {"step_size": 0.5}
_TREE = {"step_size": 0.5, "max_tree_depth": 6}

SAMPLERS: dict[str, Sampler] = {
    "hmc": Sampler("HMC, whitened", mcmc.BatchedHMC, _STEPS, 4),
    "hmc_burn_in": Sampler(
        "HMC as recommended: whitened, burn-in of 30", mcmc.BatchedHMC, RECOMMENDED_KERNEL, 4
    ),
    "nuts": Sampler("NUTS, whitened", mcmc.BatchedNUTS, _TREE, 24, patience=3),
    "mala": Sampler("MALA, whitened", mcmc.BatchedMALA, _STEP, 1),
    "ghmc": Sampler("generalised HMC, whitened", mcmc.BatchedGHMC, _STEP, 1),
    "mams": Sampler("MAMS, whitened", mcmc.BatchedMAMS, _STEPS, 4),
    "ula": Sampler(
        "unadjusted Langevin, whitened (biased)", mcmc.BatchedULA, _STEP, 1, exact=False
    ),
    "hmc_plain": Sampler(
        "HMC, not whitened", mcmc.BatchedHMC, _PLAIN, 4, whitened=False, patience=4
    ),
    "paper": Sampler(
        "HMC, the paper's setting", mcmc.BatchedHMC, _PAPER, 20, whitened=False, patience=10
    ),
}
"""Name -> sampler."""

GOLD = "hmc"
"""The sampler of the gold-standard run."""
