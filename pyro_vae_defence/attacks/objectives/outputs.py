r"""Attacks on the reconstruction: squared distance between decoded images (Table 1 of the paper).

With :math:`g(z)` the decoder's mean and :math:`\tilde z \sim q(z|x)`,

.. math:: \Delta(x) = \| g(\tilde z) - g(\tilde z') \|_2^2 ,

where :math:`\tilde z'` encodes the reference (maximum damage, eq. 3) or the target (targeted
output, eq. 4). Both are draws with the same noise, which each row takes from its own stream and
keeps: the objective is a deterministic function of the image. Pixel values are in [0, 1], distances
are summed over pixels.

References: Gondim-Ribeiro, Tabacof, Valle, 2018, https://arxiv.org/abs/1806.04646 (targeted);
Camuto, Willetts, Roberts, Holmes, Rainforth, "Towards a theoretical understanding of the robustness
of variational autoencoders", AISTATS 2021, https://arxiv.org/abs/2007.07365 (maximum damage)."""

from __future__ import annotations

import functools

from torch import Tensor

from pyro_vae_defence.attacks.objectives._rows import LatentsOf, between, check_latents, reconstruct
from pyro_vae_defence.types import VAE, PreparedObjective


def maximum_damage(
    vae: VAE, *, latents: LatentsOf = "sample", num_draws: int = 1
) -> PreparedObjective:
    """Squared distance of the reconstruction from the reference's, to be made large (unsupervised).

    Args:
        vae: any Pyro VAE.
        latents: decode a ``"sample"`` of the guide, or its ``"mean"``.
        num_draws: noise draws averaged over; one is enough for means.
    """
    return _between_outputs(vae, None, latents, num_draws)


def targeted_output(
    vae: VAE, x_target: Tensor, *, latents: LatentsOf = "sample", num_draws: int = 1
) -> PreparedObjective:
    """Minus the squared distance of the reconstruction from the target's (supervised).

    Args:
        x_target: target images ``(N, C, H, W)``, one per reference or a single one.
        vae, latents, num_draws: as for :func:`maximum_damage`.
    """
    return _between_outputs(vae, x_target, latents, num_draws)


def _between_outputs(
    vae: VAE, x_target: Tensor | None, latents: LatentsOf, num_draws: int
) -> PreparedObjective:
    check_latents(latents)
    reader = functools.partial(reconstruct, latents)
    return between(
        vae, reader, lambda a, b: (a - b).square().flatten(1).sum(1), x_target, num_draws
    )
