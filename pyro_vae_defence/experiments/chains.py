"""The kernel that most experiments run."""

from __future__ import annotations

import functools
from collections.abc import Callable

from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models.pretrained import TrainedVAE


def whitened_hmc(
    vae: TrainedVAE, step_size: float, num_steps: int, burn_in: int = 0
) -> Callable[..., BatchedHMC]:
    """HMC in the metric of the training set's mean posterior variance, for :class:`MCMCDefence`.

    Args:
        vae: a trained VAE, which carries that variance.
        step_size: at the start; it adapts during the warm-up.
        num_steps: leapfrog steps of a transition.
        burn_in: gradients of microcanonical dynamics before the first transition.
    """
    return functools.partial(
        BatchedHMC,
        step_size=step_size,
        num_steps=num_steps,
        inverse_mass_matrix=vae.mean_posterior_variance,
        burn_in=burn_in,
    )
