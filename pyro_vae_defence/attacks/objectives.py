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
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import VAE, Objective, PreparedObjective


def symmetric_kl(vae: VAE, *, sites: int | None = None) -> PreparedObjective:
    """Unsupervised encoder attack: symmetric KL between the guides at x and at the reference, in nats.

    Args:
        vae: any Pyro VAE whose guide's distributions have a registered KL-divergence.
        sites: the first so many latent sites of the guide count, the topmost groups of a hierarchy (the paper's
            :math:`k_A`); all when ``None``. Groups are conditional on draws of those above, which are made with the
            same noise at x and at the reference.
    """
    return _between_posteriors(vae, divergences.symmetric_kl, sites)


def squared_wasserstein(vae: VAE) -> PreparedObjective:
    """Squared 2-Wasserstein distance between the guides at x and at the reference (Table 1, PGD attack).

    Args:
        vae: any Pyro VAE with a factorised Gaussian guide.
    """
    return _between_posteriors(vae, divergences.squared_wasserstein)


def _between_posteriors(
    vae: VAE,
    divergence: Callable[[divergences.Posterior, divergences.Posterior], Tensor],
    sites: int | None = None,
) -> PreparedObjective:
    check_vae(vae)
    if sites is not None and not (isinstance(sites, int) and sites >= 1):
        raise ValueError(f"sites must be a number of at least 1, or None for all; got {sites!r}")

    def prepare(x_ref: Tensor) -> Objective:
        streams = Streams.create(x_ref.shape[0], device=x_ref.device)

        def at(x: Tensor) -> divergences.Posterior:
            with evaluation_mode(vae):
                q = posterior(vae, x, streams=streams)
            if sites is not None and sites > len(q):
                raise ValueError(f"sites={sites}, but the guide has {len(q)} latent sites")
            return dict(list(q.items())[:sites])

        with torch.no_grad():
            q_ref = at(x_ref)

        def objective(x: Tensor) -> Tensor:
            return divergence(at(x), q_ref)

        return objective

    return prepare
