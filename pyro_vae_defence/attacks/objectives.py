r"""What the attacker maximises (Table 1 of the paper).

A factory such as :func:`symmetric_kl` takes the VAE and returns a *prepared objective*: given reference
images it computes once what belongs to them and returns the objective proper, images ``(N, C, H, W)`` to one
value per image ``(N,)``. The unsupervised encoder attack maximises

.. math:: \Delta(x) = \tfrac12 \mathrm{KL}(q(z|x) \| q(z|x^r)) + \tfrac12 \mathrm{KL}(q(z|x^r) \| q(z|x)),

eq. 3 with the symmetric KL-divergence, summed over latent dimensions. At :math:`x = x^r` its gradient is
exactly zero, so an attack has to start from a random point.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae_defence.models.program import check_vae, evaluation_mode, posterior
from pyro_vae_defence.ops import divergences
from pyro_vae_defence.types import VAE, Objective, PreparedObjective


def symmetric_kl(vae: VAE) -> PreparedObjective:
    """Unsupervised encoder attack: symmetric KL between the guides at x and at the reference, in nats.

    Args:
        vae: any Pyro VAE whose guide's distributions have a registered KL-divergence.
    """
    return _between_posteriors(vae, divergences.symmetric_kl)


def squared_wasserstein(vae: VAE) -> PreparedObjective:
    """Squared 2-Wasserstein distance between the guides at x and at the reference (Table 1, PGD attack).

    Args:
        vae: any Pyro VAE with a factorised Gaussian guide.
    """
    return _between_posteriors(vae, divergences.squared_wasserstein)


def _between_posteriors(
    vae: VAE, divergence: Callable[[divergences.Posterior, divergences.Posterior], Tensor]
) -> PreparedObjective:
    check_vae(vae)

    def prepare(x_ref: Tensor) -> Objective:
        with torch.no_grad(), evaluation_mode(vae):
            q_ref = posterior(vae, x_ref)

        def objective(x: Tensor) -> Tensor:
            with evaluation_mode(vae):
                return divergence(posterior(vae, x), q_ref)

        return objective

    return prepare
