r"""What NVAE's training adds to the ELBO: balanced KL terms, spectral and batch-norm penalties.

The training loss is

.. math::

    \frac1N \sum_n \Bigl( -\log p(x_n \mid z_n) + \beta \sum_g c_g\, \mathrm{KL}_{ng} \Bigr)
    + \lambda \Bigl( \sum_\text{conv} \sigma_{\max}(W)
    + \sum_\text{bn} \max_c \lvert\gamma_c\rvert \Bigr).

Reference: NVAE: A Deep Hierarchical Variational Autoencoder, A. Vahdat and J. Kautz, NeurIPS 2020,
https://arxiv.org/abs/2007.03898.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vae_defence.models.nvae.config import NVAEConfig
from pyro_vae_defence.models.nvae.layers import effective_weight

NORMALISE_EPS = 1e-3


def batch_norm_penalty(network: nn.Module) -> Tensor:
    """Sum over batch-norm layers of the largest absolute gain; a scalar."""
    gains = [m.weight.abs().amax() for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    return torch.stack(gains).sum()


class SpectralPenalty(nn.Module):
    """Sum over convolutions of the largest singular value of the weight as ``(C_out, -1)`` matrix.

    Power iteration whose vectors persist from call to call and are batched over weights of equal
    shape. The network is not registered as a submodule; the vectors are buffers, so that an
    interrupted training resumes exactly. Create it once the network is on its device.

    Args:
        network: any module; its ``nn.Conv2d`` are penalised.
        num_iterations: power iterations per call.
        warmup_iterations: power iterations at creation, from random vectors.
    """

    def __init__(
        self, network: nn.Module, *, num_iterations: int = 4, warmup_iterations: int = 40
    ) -> None:
        super().__init__()
        for name, value in dict(
            num_iterations=num_iterations, warmup_iterations=warmup_iterations
        ).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.num_iterations = num_iterations
        by_shape: dict[tuple[int, int], list[nn.Conv2d]] = {}
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                rows = module.weight.shape[0]
                by_shape.setdefault((rows, module.weight.numel() // rows), []).append(module)
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


class BalancedKL(NamedTuple):
    """KL terms as the training loss weighs them."""

    per_image: Tensor
    """``beta * sum_g c_g KL_ng``, shape ``(N,)``, nats."""
    coefficients: Tensor
    """The ``c_g``, shape ``(G,)``, mean 1, without gradient."""


def kl_balance_weights(config: NVAEConfig) -> Tensor:
    """KL a group should carry, relative to the least one: ``(G,)``, from the top down.

    Per scale it grows as the number of latent variables, and the groups of a scale share it.
    """
    groups = list(reversed(config.groups_per_scale))
    alpha = torch.tensor(
        [4.0**scale / count for scale, count in enumerate(groups) for _ in range(count)]
    )
    return alpha / alpha.min()


def balance_kl(kl: Tensor, alpha: Tensor, beta: float) -> BalancedKL:
    """Weigh the KL terms so that no group is switched off while ``beta`` is annealed.

    Args:
        kl: KL per image and group, ``(N, G)``, nats.
        alpha: from :func:`kl_balance_weights`, ``(G,)``.
        beta: KL coefficient in (0, 1]; at 1 the terms are not balanced any more.

    Raises:
        ValueError: ``beta`` out of range.
    """
    if not 0 < beta <= 1:
        raise ValueError(f"beta={beta} must lie in (0, 1]")
    if beta == 1:
        return BalancedKL(kl.sum(dim=1), torch.ones_like(kl[0]))
    size = kl.detach().abs().mean(dim=0) + 0.01
    coefficients = size / alpha.to(size) * size.sum()
    coefficients = coefficients / coefficients.mean()
    return BalancedKL(beta * (coefficients * kl).sum(dim=1), coefficients)


def kl_coefficient(
    step: int,
    num_steps: int,
    *,
    anneal_portion: float = 0.3,
    constant_portion: float = 1e-4,
    constant: float = 1e-4,
) -> float:
    """``beta`` at step ``step`` of ``num_steps``: constant, then linear up to 1, then 1.

    Raises:
        ValueError: ``num_steps`` or ``anneal_portion`` is not positive.
    """
    if num_steps < 1 or anneal_portion <= 0:
        raise ValueError(
            f"num_steps={num_steps} and anneal_portion={anneal_portion} must be positive"
        )
    ramp = (step - constant_portion * num_steps) / (anneal_portion * num_steps)
    return max(min(ramp, 1.0), constant)
