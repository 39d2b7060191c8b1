"""One pass of an NVAE as the official program makes it, beside the library's two Pyro programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vae_defence.models.nvae import NVAE, NVAEConfig
from pyro_vae_defence.models.nvae.gaussian import gaussian
from pyro_vae_defence.models.nvae.likelihoods import image_likelihood
from pyro_vae_defence.models.nvae.network import TopDownState

SMALL = NVAEConfig(
    dataset="mnist",
    num_latent_scales=2,
    num_groups_per_scale=2,
    ada_groups=True,
    num_latent_per_group=2,
    num_channels_enc=4,
    num_channels_dec=4,
    num_preprocess_cells=1,
    num_postprocess_cells=1,
    use_se=True,
    res_dist=True,
)


@dataclass(frozen=True)
class Group:
    """One latent group; its maps have shape ``(N, L, h, w)``, in nats.

    ``posterior`` is the Gaussian before the flows, ``z_base`` its sample, ``z`` that behind them.
    """

    posterior: dist.Normal
    prior: dist.Normal
    z_base: Tensor
    z: Tensor

    @property
    def log_q_map(self) -> Tensor:
        return self.posterior.log_prob(self.z_base)  # the flows preserve volume

    @property
    def log_p_map(self) -> Tensor:
        return self.prior.log_prob(self.z)

    @property
    def kl_map(self) -> Tensor:
        if self.z is self.z_base:
            return kl_divergence(self.posterior, self.prior)
        return self.log_q_map - self.log_p_map


@dataclass(frozen=True)
class OnePass:
    """All groups from the top down, and the likelihood; terms have shape ``(N, G)``."""

    groups: tuple[Group, ...]
    logits: Tensor
    reconstruction_loss: Tensor

    @property
    def kl(self) -> Tensor:
        return per_group([group.kl_map for group in self.groups])

    @property
    def log_q(self) -> Tensor:
        return per_group([group.log_q_map for group in self.groups])

    @property
    def log_p(self) -> Tensor:
        return per_group([group.log_p_map for group in self.groups])


def official_state_dict(vae: NVAE) -> dict[str, Tensor]:
    """State dict with the official keys in their order: what is not normalised appears twice."""
    official: dict[str, Tensor] = {}
    for key, value in vae.state_dict().items():
        official[key] = value
        name, _, kind = key.rpartition(".")
        if kind == "weight" and type(vae.get_submodule(name)) is nn.Conv2d:
            official[f"{name}.weight_normalized"] = value
    return official


def per_group(maps: list[Tensor]) -> Tensor:
    return torch.stack([values.flatten(1).sum(dim=1) for values in maps], dim=1)


def one_pass(vae: NVAE, x: Tensor, noise: Sequence[Tensor] | None = None) -> OnePass:
    """Sample the posterior of images ``x`` by standard normal ``noise`` per group, and decode."""
    shapes = [(len(x), *shape) for shape in vae.config.latent_shapes]
    draws = noise or [vae.prior_ftr0.new_empty(shape).normal_() for shape in shapes]
    encoded = vae.bottom_up(x)
    groups: list[Group] = []

    def choose(index: int, state: TopDownState) -> Tensor:
        posterior, flow = vae.posterior(index, state, encoded)
        z = z_base = posterior.loc + posterior.scale * draws[index]
        for transform in flow:
            z = transform(z)
        groups.append(Group(posterior, gaussian(state.prior), z_base, z))
        return z

    logits = vae.output(vae.walk(len(x), choose))
    log_likelihood = image_likelihood(vae.config, logits).log_prob(x)
    return OnePass(tuple(groups), logits, -log_likelihood)


def traces(
    guide: Callable[[Tensor], None], model: Callable[[Tensor], None], x: Tensor
) -> tuple[poutine.Trace, poutine.Trace]:
    """Of the guide, and of the model at its draws, with log-probabilities."""
    of_guide = poutine.trace(guide).get_trace(x)
    of_model = poutine.trace(poutine.replay(model, trace=of_guide)).get_trace(x)
    of_guide.compute_log_prob()
    of_model.compute_log_prob()
    return of_guide, of_model


def log_probs(trace: poutine.Trace, sites: tuple[str, ...]) -> Tensor:
    return torch.stack([trace.nodes[site]["log_prob"] for site in sites], dim=1)
