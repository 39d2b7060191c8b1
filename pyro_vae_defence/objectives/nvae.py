r"""NVAE's training objective: the ELBO with annealed and balanced KL terms, and two penalties.

For image :math:`x_n`, with one Kullback-Leibler term per latent group :math:`g`, the loss is

.. math::

    -\log p(x_n | z_n) + \beta \sum_g c_g KL_{ng}
    + \lambda \Bigl( \sum_\text{conv} \sigma_{\max}(W)
    + \sum_\text{bn} \max_c |\gamma_c| \Bigr).

:math:`\beta` rises linearly during the first part of the training. While it is below 1, the
coefficients :math:`c_g` of mean 1 keep a group from being switched off: they grow with the group's
KL relative to what its size lets expect. The penalties bound how fast features and KLs can change.

Vahdat, Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", NeurIPS 2020,
https://arxiv.org/abs/2007.03898
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vae_defence.models.nvae import NVAE, NVAEConfig
from pyro_vae_defence.models.nvae.layers import effective_weight
from pyro_vae_defence.models.sites import latent_sites, per_image
from pyro_vae_defence.objectives.elbo import ImageELBO, Terms, log_likelihood, site_kl
from pyro_vae_defence.ops.checks import check_not_negative, check_within
from pyro_vae_defence.types import PyroProgram

NORMALISE_EPS = 1e-3


class NVAEObjective(ImageELBO):
    """Trains an :class:`~pyro_vae_defence.models.nvae.NVAE` as published.

    Terms: ``reconstruction``, ``kl`` (unweighted), ``penalty`` (weighted, one number), ``loss``.

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
        check_within("num_steps", num_steps, "[1, inf)")
        check_within("kl_anneal", kl_anneal, "(0, 1]")
        check_not_negative("penalty", penalty)
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
        reconstruction = log_likelihood(model_trace)
        sites = latent_sites(guide_trace)
        kl = torch.stack([per_image(site_kl(site, model_trace), site) for site in sites], dim=1)
        beta = kl_coefficient(self.step, self.num_steps, anneal_portion=self.kl_anneal)
        weighed, _ = balance_kl(kl, kl_balance_weights(self.vae.config), beta)
        penalty = self.penalty * (self.spectral() + batch_norm_penalty(self.vae))
        penalty = penalty.expand_as(reconstruction)
        terms = {"reconstruction": reconstruction, "kl": kl.sum(dim=1), "penalty": penalty}
        return terms | {"loss": -reconstruction + weighed + penalty}

    def state_dict(self) -> dict[str, Any]:
        """The step, and the singular vectors, which move on at every call."""
        return super().state_dict() | {"spectral": self.spectral.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        super().load_state_dict(state)
        self.spectral.load_state_dict(state["spectral"])


# --- Penalties ------------------------------------------------------------------------------------


def batch_norm_penalty(network: nn.Module) -> Tensor:
    """Sum over batch-norm layers of the largest absolute gain; a scalar."""
    gains = [m.weight.abs().amax() for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    # Cells of res_elu have no batch norm.
    return torch.stack(gains).sum() if gains else next(network.parameters()).new_zeros(())


class SpectralPenalty(nn.Module):
    """Sum over convolutions of the largest singular value of the weight as ``(C_out, -1)`` matrix.

    Power iteration, batched over weights of equal shape. Its vectors persist from call to call, as
    buffers, so that an interrupted training resumes exactly; the network is no submodule. Create it
    once the network is on its device.

    Args:
        network: any module; its ``nn.Conv2d`` are penalised.
        num_iterations: power iterations per call.
        warmup_iterations: power iterations at creation, from random vectors.
    """

    def __init__(
        self, network: nn.Module, *, num_iterations: int = 4, warmup_iterations: int = 40
    ) -> None:
        super().__init__()
        if min(num_iterations, warmup_iterations) < 1:
            raise ValueError(f"{num_iterations=} and {warmup_iterations=} must be at least 1")
        self.num_iterations = num_iterations
        by_shape: dict[torch.Size, list[nn.Conv2d]] = {}
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                by_shape.setdefault(module.weight.flatten(1).shape, []).append(module)
        # In a tuple, so that the network's parameters are not registered here once more.
        self._convs = tuple(tuple(convs) for convs in by_shape.values())
        with torch.no_grad():
            for index, convs in enumerate(self._convs):
                weights = self._matrices(convs)
                u = F.normalize(torch.randn_like(weights[:, :, 0]), dim=1, eps=NORMALISE_EPS)
                self.register_buffer(f"u_{index}", self._iterate(weights, u, warmup_iterations)[0])

    @staticmethod
    def _matrices(convs: tuple[nn.Conv2d, ...]) -> Tensor:
        return torch.stack([effective_weight(conv).flatten(1) for conv in convs])

    @staticmethod
    def _iterate(weights: Tensor, u: Tensor, num_iterations: int) -> tuple[Tensor, Tensor]:
        """Left and right singular vectors, ``(B, rows)`` and ``(B, columns)``."""
        for _ in range(num_iterations):
            v = F.normalize(torch.einsum("bi,bij->bj", u, weights), dim=1, eps=NORMALISE_EPS)
            u = F.normalize(torch.einsum("bij,bj->bi", weights, v), dim=1, eps=NORMALISE_EPS)
        return u, v

    def forward(self) -> Tensor:
        """The penalty, a scalar; the vectors move on by ``num_iterations``."""
        total: list[Tensor] = []
        for index, convs in enumerate(self._convs):
            weights = self._matrices(convs)
            buffer = self.get_buffer(f"u_{index}")
            with torch.no_grad():
                u, v = self._iterate(weights, buffer, self.num_iterations)
                buffer.copy_(u)
            total.append(torch.einsum("bi,bij,bj->", u, weights, v))
        return torch.stack(total).sum()


# --- Weights of the KL terms ----------------------------------------------------------------------


def kl_balance_weights(config: NVAEConfig) -> Tensor:
    """KL a group should carry, relative to the least one: ``(G,)``, from the top down.

    Per scale it grows as the number of latent variables, and the groups of a scale share it.
    """
    groups = enumerate(reversed(config.groups_per_scale))
    shares = [4.0**scale / count for scale, count in groups for _ in range(count)]
    alpha = torch.tensor(shares, device="cpu")
    return alpha / alpha.min()


def balance_kl(kl: Tensor, alpha: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Weigh the KL terms so that no group is switched off while ``beta`` is annealed.

    Args:
        kl: KL per image and group, ``(N, G)``, nats.
        alpha: from :func:`kl_balance_weights`, ``(G,)``.
        beta: KL coefficient in (0, 1]; at 1 the terms are not balanced any more.

    Returns:
        ``beta * sum_g c_g KL_ng``, ``(N,)``, and the ``c_g``, ``(G,)``, mean 1, without gradient.

    Raises:
        ValueError: ``beta`` out of range.
    """
    check_within("beta", beta, "(0, 1]")
    if beta == 1:
        return kl.sum(dim=1), torch.ones_like(kl[0])
    size = kl.detach().abs().mean(dim=0) + 0.01
    coefficients = size / alpha.to(size, non_blocking=True)
    coefficients = coefficients / coefficients.mean()
    return beta * (coefficients * kl).sum(dim=1), coefficients


def kl_coefficient(
    step: int, num_steps: int, *, anneal_portion: float = 0.3, constant_portion: float = 1e-4
) -> float:
    """``beta`` at step ``step`` of ``num_steps``: 1e-4, then linear up to 1, then 1."""
    ramp = (step - constant_portion * num_steps) / (anneal_portion * num_steps)
    return max(min(ramp, 1.0), 1e-4)
