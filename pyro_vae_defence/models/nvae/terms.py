"""What one pass over images leaves for a loss: log-densities and KL terms of every latent group."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence


@dataclass(frozen=True)
class GroupTerms:
    """One latent group; its maps have shape ``(N, L, h, w)``, in nats.

    Attributes:
        posterior: the Gaussian before the flows.
        prior: the Gaussian prior given the groups above.
        z_base: sample of ``posterior``.
        z: the latent: ``z_base`` behind the flows, or ``z_base`` itself where there are none.
    """

    posterior: dist.Normal
    prior: dist.Normal
    z_base: Tensor
    z: Tensor

    @property
    def log_q_map(self) -> Tensor:
        """Elementwise log q; the flows preserve volume."""
        return self.posterior.log_prob(self.z_base)

    @property
    def log_p_map(self) -> Tensor:
        """Elementwise log p."""
        return self.prior.log_prob(self.z)

    @property
    def kl_map(self) -> Tensor:
        """Elementwise KL(q || p): exact without flows, else the estimate ``log q - log p``."""
        if self.z is self.z_base:
            return kl_divergence(self.posterior, self.prior)
        return self.log_q_map - self.log_p_map


@dataclass(frozen=True)
class NVAETerms:
    """All groups from the top down, and the likelihood.

    Attributes:
        groups: the terms of every group.
        logits: output of the network, ``(N, C_out, S, S)``.
        reconstruction_loss: ``-log p(x | z)``, ``(N,)``, in nats.
    """

    groups: tuple[GroupTerms, ...]
    logits: Tensor
    reconstruction_loss: Tensor

    @property
    def kl(self) -> Tensor:
        """KL per image and group, ``(N, G)``; see :attr:`GroupTerms.kl_map`."""
        return _per_group([group.kl_map for group in self.groups])

    @property
    def log_q(self) -> Tensor:
        """Log q of the sample per image and group, ``(N, G)``."""
        return _per_group([group.log_q_map for group in self.groups])

    @property
    def log_p(self) -> Tensor:
        """Log p of the sample per image and group, ``(N, G)``."""
        return _per_group([group.log_p_map for group in self.groups])


def _per_group(maps: list[Tensor]) -> Tensor:
    return torch.stack([values.flatten(1).sum(dim=1) for values in maps], dim=1)
