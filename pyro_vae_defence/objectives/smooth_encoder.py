r"""SE, the smooth encoder: a training image and its worst neighbour must have similar posteriors.

For an image :math:`x` with posterior :math:`N(m, s^2)` and a neighbour :math:`x'` with
:math:`N(m', s'^2)`, maximise

.. math:: \mathcal L(x) - KL(q(z|x') \| p(z)) - \Omega_\gamma(x, x').

:math:`\Omega_\gamma` is the entropy-regularised transport cost between the two posteriors, the
minimum over their jointly Gaussian couplings, with correlation r in each latent dimension, of

.. math:: \tfrac\gamma2 E|z - z'|^2 + I(z; z')
   = \sum \tfrac\gamma2 [(m - m')^2 + s^2 + s'^2 - 2 r s s'] - \tfrac12 \log(1 - r^2).

With :math:`p = 2 \gamma s s'` and :math:`u = \sqrt{1 + p^2}` the minimiser is
:math:`r = (u - 1) / p`, hence

.. math:: \Omega_\gamma = \tfrac\gamma2 \sum [(m - m')^2 + s^2 + s'^2]
   - \tfrac12 \sum [(u - 1) - \log\tfrac{u + 1}2].

It is 0 at :math:`\gamma = 0`, and for large :math:`\gamma` it becomes

.. math:: \tfrac\gamma2 W_2^2 + \tfrac12 \sum [1 + \log(\gamma s s')] + O(1/\gamma), \qquad
   W_2^2 = \sum (m - m')^2 + (s - s')^2.

The neighbour should maximise :math:`W_2^2` in a ball around x. How it is found is an attack, and
objectives do not know attacks: ``SE`` receives it as a callable.

Cemgil, Ghaisas, Dvijotham, Kohli, "Adversarially Robust Representations with Smooth Encoders",
2020, https://openreview.net/forum?id=H1gfFaEYDS
"""

from __future__ import annotations

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae_defence.models.sites import gaussians, per_image
from pyro_vae_defence.objectives.elbo import MeanFieldELBO, Run, Terms, site_kl
from pyro_vae_defence.ops.checks import check_positive
from pyro_vae_defence.types import Perturb


class SE(MeanFieldELBO):
    """The smooth encoder's objective; see the module's text.

    ``perturb`` maps images ``(N, C, H, W)``, a conditional VAE's as ``(x, *conditions)``, to their
    worst neighbours under the encoder *as it is now*, so it closes over the guide. The paper's
    takes 20 steps of projected gradient ascent on the squared 2-Wasserstein distance from a random
    start in the L_inf ball of radius 0.1 or 0.2, clipped to [0, 1]. It is called once per draw of
    the latents, with gradients enabled and hidden from Pyro's handlers; its result is a constant.
    It must not add to the ``grad`` of the parameters (use ``torch.autograd.grad``). Gradients flow
    through both encodings; ``x`` is reconstructed.

    ``gamma`` is the strength of the coupling, positive; the paper does not publish its value.
    Terms: ``reconstruction``, ``kl``, ``kl_adv`` (of the neighbour), ``omega``, ``loss``.

    Raises ``ValueError`` if ``gamma`` is not positive, if ``perturb`` changes the shape, and for a
    guide that is not Gaussian or whose sites depend on each other.
    """

    def __init__(self, perturb: Perturb, gamma: float, *, num_particles: int = 1) -> None:
        super().__init__(num_particles=num_particles)
        self.perturb = perturb
        self.gamma = check_positive("gamma", gamma)

    def extra_terms(self, run: Run) -> Terms:
        """The neighbour's KL and the coupling."""
        x = run.images[0]
        with torch.enable_grad(), poutine.block():
            x_adv = self.perturb(x if len(run.images) == 1 else run.images).detach()
        if x_adv.shape != x.shape:
            raise ValueError(
                f"perturb returned shape {tuple(x_adv.shape)} for images of shape "
                f"{tuple(x.shape)}; it must keep the shape"
            )
        neighbour = run.encode(x_adv)
        kl_adv = [per_image(site_kl(site, run.model_trace), site) for site in neighbour]
        coupling = omega(*gaussians(run.sites), *gaussians(neighbour), self.gamma)
        return {"kl_adv": torch.stack(kl_adv).sum(0), "omega": coupling}


def omega(loc: Tensor, scale: Tensor, loc_adv: Tensor, scale_adv: Tensor, gamma: float) -> Tensor:
    """Entropy-regularised transport cost of diagonal Gaussians: ``(N, D)`` each -> ``(N,)``, nats.

    Written as ``gamma / 2`` times the squared Wasserstein distance plus a remainder that is a sum
    of non-negative terms, so that nothing cancels at either end of ``gamma >= 0``.
    """
    p = 2 * gamma * scale * scale_adv
    u = (1 + p**2).sqrt()
    wasserstein = (loc - loc_adv) ** 2 + (scale - scale_adv) ** 2
    # p - (u - 1) and log((u + 1) / 2), with u - 1 = p^2 / (u + 1) and u - p = 1 / (u + p)
    remainder = p * (1 + 1 / (u + p)) / (u + 1) + torch.log1p(p**2 / (2 * (u + 1)))
    return 0.5 * (gamma * wasserstein + remainder).sum(1)
