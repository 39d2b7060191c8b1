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

import torch
from torch import Tensor

from pyro_vae_defence.attacks.objectives._rows import (
    LatentsOf,
    average,
    check_latents,
    draws,
    of_rows,
    own_streams,
    reconstruct,
)
from pyro_vae_defence.models.program import (
    check_guide,
    check_images,
    check_vae,
    evaluation_mode,
)
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import VAE, Objective, PreparedObjective


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
        vae: any Pyro VAE.
        x_target: target images ``(N, C, H, W)``, one per reference or a single one.
        latents: decode a ``"sample"`` of the guide, or its ``"mean"``.
        num_draws: noise draws averaged over; one is enough for means.
    """
    check_images(x_target, "x_target")
    return _between_outputs(vae, x_target, latents, num_draws)


def _between_outputs(
    vae: VAE, x_target: Tensor | None, latents: LatentsOf, num_draws: int
) -> PreparedObjective:
    check_vae(vae)
    check_latents(latents)
    check_integer("num_draws", num_draws)
    sign = 1.0 if x_target is None else -1.0

    def prepare(x_ref: Tensor, streams: Streams | None = None) -> Objective:
        streams = own_streams(x_ref, streams)
        noises = draws(streams, num_draws)
        other = x_ref if x_target is None else of_rows(x_target, streams, "x_target")

        def at(x: Tensor) -> list[Tensor]:
            with evaluation_mode(vae):
                return [reconstruct(vae, x, latents, noise) for noise in noises]

        with torch.no_grad():
            check_guide(vae, x_ref, streams=streams)
            fixed = at(other)

        def objective(x: Tensor) -> Tensor:
            distances = [(a - b).square().flatten(1).sum(1) for a, b in zip(at(x), fixed)]
            return sign * average(distances)

        return objective

    return prepare
