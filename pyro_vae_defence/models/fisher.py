r"""A metric for samplers from the model alone: its Fisher information at latents of the prior.

The curvature of the energy :math:`U(z; x)` in Gauss-Newton form is :math:`\Lambda + J^\top F J`:
the prior's precision, and the Fisher information F of the likelihood (Bernoulli: :math:`p (1 - p)`;
Gaussian: 1 / variance) drawn back through the Jacobian J of the decoder. Its diagonal, averaged
over latents of the prior, is

.. math:: \pi_i = \mathbb E_{z \sim p(z)}\, \mathbb E_{x \sim p(x|z)} \bigl[ (\partial_{z_i} U(z; x))^2 \bigr] ,

since given z the score :math:`J^\top v` of the likelihood has mean 0 and covariance :math:`J^\top F
J` (for the Bernoulli likelihood :math:`v = x - p` by the logits), and under the prior the squared
slope of -log p(z) has its mean curvature for expectation. So one draw (z, x) of the model is one
stochastic probe of the diagonal, in the manner of Hutchinson, at one gradient. No Jacobian is
formed, and any likelihood will do that can be drawn from.

:math:`1 / \pi` is an inverse mass matrix that no image enters, hence no attacker. It is narrower
than mean posterior variances, which average the variances instead of the precisions.

Reference: Amari, "Natural gradient works efficiently in learning", Neural Computation, 1998,
https://doi.org/10.1162/089976698300017746; Hutchinson, "A stochastic estimator of the trace of the
influence matrix", 1989, https://doi.org/10.1080/03610918908812806.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae_defence.models.program import (
    check_vae,
    evaluation_mode,
    observation,
    potential,
    prior,
)
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.types import VAE, Latents


def gauss_newton_variance(
    vae: VAE, x: Tensor, *, num_probes: int = 4096, batch_size: int = 512
) -> Latents:
    """Inverse of the mean Gauss-Newton diagonal of the energy, an ``inverse_mass_matrix`` for
    kernels.

    The relative standard error of an entry is about ``sqrt(2 / num_probes)``, 2 % by default, and
    more for dimensions whose curvature differs much between latents. Noise comes from torch's
    global seed.

    Args:
        vae: any Pyro VAE.
        x: images ``(N, C, H, W)``, of which only one image's shape, the dtype and the device are
            read.
        num_probes: draws of (z, x) from the model, >= 1, one gradient each.
        batch_size: draws at a time, >= 1.

    Returns:
        Site name -> tensor of one image's shape, on the unconstrained scale, positive.

    Raises:
        ValueError: if an argument is out of range, or the model's energy has no finite gradient at
            its own draws.
    """
    check_vae(vae)
    check_integer("num_probes", num_probes)
    check_integer("batch_size", batch_size)
    totals: Latents = {}
    with evaluation_mode(vae):
        for first in range(0, num_probes, batch_size):
            rows = min(batch_size, num_probes - first)
            for name, slope in _score(vae, x.new_zeros((rows, *x.shape[1:]))).items():
                total = slope.square().sum(0)
                totals[name] = totals[name] + total if name in totals else total
    for name, total in totals.items():
        if total.device.type != "meta" and not bool((total.isfinite() & (total > 0)).all()):
            raise ValueError(
                f"vae's energy has no usable gradient by site {name!r} at draws of its own; "
                "check the model's weights and its prior"
            )
    return {name: num_probes / total for name, total in totals.items()}


def _score(vae: VAE, template: Tensor) -> Latents:
    """Gradient of the energy at as many draws (z, x) of the model as ``template`` has rows."""
    with torch.no_grad():
        latents = prior(vae, template)
        x = observation(vae, latents, tuple(template.shape[1:])).sample().reshape(template.shape)
        energy = potential(vae, x)
        position = energy.unconstrain(latents)
    return lat.value_and_gradient(energy, position)[1]
