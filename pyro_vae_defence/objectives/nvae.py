r"""NVAE's training objective: the ELBO with annealed and balanced KL terms, and two penalties.

For image :math:`x_n`, with one Kullback-Leibler term per latent group :math:`g`, the loss is

.. math::

    -\log p(x_n | z_n) + \beta \sum_g c_g KL_{ng}
    + \lambda \Bigl( \sum_\text{conv} \sigma_{\max}(W)
    + \sum_\text{bn} \max_c |\gamma_c| \Bigr).

:math:`\beta` rises linearly during the first part of the training. While it is below 1, the
coefficients :math:`c_g` of mean 1 keep a group from being switched off: they grow with the group's
KL relative to what its size lets expect. The penalties bound how fast features, and with them the
KL terms, can change.

Vahdat, Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", NeurIPS 2020,
https://arxiv.org/abs/2007.03898
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence.models.nvae import NVAE
from pyro_vae_defence.models.nvae.regularisers import (
    SpectralPenalty,
    balance_kl,
    batch_norm_penalty,
    kl_balance_weights,
    kl_coefficient,
)
from pyro_vae_defence.models.sites import image_site, latent_sites, per_image
from pyro_vae_defence.objectives.elbo import ImageELBO, Terms, site_kl
from pyro_vae_defence.ops.checks import check_positive
from pyro_vae_defence.types import PyroProgram


class NVAEObjective(ImageELBO):
    """Trains an :class:`~pyro_vae_defence.models.nvae.NVAE` as published.

    Terms: ``reconstruction``, ``kl`` (unweighted), ``penalty`` (times its weight; one number for
    all images), ``loss``.

    Args:
        vae: the network; its weights are penalised, whatever wraps its programs.
        num_steps: optimisation steps of the whole training, over which the KL is annealed.
        kl_anneal: share of them in which beta rises to 1, in (0, 1].
        penalty: weight lambda of the penalties, at least 0; the official ``weight_decay_norm``.
        num_particles: draws of the latents per image.

    Raises:
        ValueError: ``vae`` is no NVAE, or a number is out of range.
    """

    def __init__(
        self,
        vae: NVAE,
        num_steps: int,
        *,
        kl_anneal: float = 0.3,
        penalty: float = 1e-2,
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles=num_particles)
        if not isinstance(vae, NVAE):
            raise ValueError(
                f"vae must be an NVAE, got {type(vae).__name__}; train other models with BetaELBO"
            )
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps!r} must be at least 1")
        if not 0 < kl_anneal <= 1:
            raise ValueError(f"kl_anneal={kl_anneal!r} must lie in (0, 1]")
        if penalty != 0:
            check_positive("penalty", penalty)
        self.vae = vae
        self.num_steps = num_steps
        self.kl_anneal = kl_anneal
        self.penalty = penalty
        self.spectral = SpectralPenalty(vae)

    def particle_terms(
        self, model: PyroProgram, guide: PyroProgram, x: Tensor, *args: Any, **kwargs: Any
    ) -> Terms:
        """Run both programs, which share one pass, and weigh the KL of every group."""
        model_trace, guide_trace = self._get_trace(model, guide, (x, *args), kwargs)
        image = image_site(model_trace)
        reconstruction = per_image(image["unscaled_log_prob"], image)
        sites = latent_sites(guide_trace)
        kl = torch.stack([per_image(site_kl(site, model_trace), site) for site in sites], dim=1)
        beta = kl_coefficient(self.step, self.num_steps, anneal_portion=self.kl_anneal)
        balanced = balance_kl(kl, kl_balance_weights(self.vae.config).to(kl), beta)
        penalty = self.penalty * (self.spectral() + batch_norm_penalty(self.vae))
        penalty = penalty.expand_as(reconstruction)
        return {
            "reconstruction": reconstruction,
            "kl": kl.sum(dim=1),
            "penalty": penalty,
            "loss": -reconstruction + balanced.per_image + penalty,
        }

    def state_dict(self) -> dict[str, Any]:
        """The step, and the singular vectors, which move on at every call."""
        return super().state_dict() | {"spectral": self.spectral.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        super().load_state_dict(state)
        self.spectral.load_state_dict(state["spectral"])
