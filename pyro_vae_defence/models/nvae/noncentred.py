r"""An NVAE over standard normal noise in place of its latents.

.. math::

    \varepsilon_g = (z_g - \mu_g(s_g)) / \sigma_g(s_g), \qquad
    p(x, \varepsilon) = p(x \mid z(\varepsilon)) \prod_g \mathcal N(\varepsilon_g \mid 0, I).

The prior is isotropic and its groups are independent, which suits a sampler that moves all groups
at once: below a group that moves, the latents follow their prior instead of falling out of it.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions.transforms import AffineTransform

from pyro_vae_defence.models.nvae.flows import FlowPosterior
from pyro_vae_defence.models.nvae.gaussian import from_noise, gaussian
from pyro_vae_defence.models.nvae.network import NVAENetwork, TopDownPath, TopDownState
from pyro_vae_defence.types import Latents, LatentsLike


class NonCentredNVAE:
    """The programs of ``vae`` over the noise sites ``eps_00`` (top), ``eps_01``, ...

    Same contract and, as distributions of images, same model; the guide is that of ``vae`` carried
    over. The weights belong to ``vae``. These programs do not share their top-down paths.

    Args:
        vae: the network.

    Attributes:
        image_shape: shape ``(C, H, W)`` of the images.
        sites: names of the noise sites, from the top down.
    """

    def __init__(self, vae: NVAENetwork) -> None:
        self.vae = vae
        self.image_shape = vae.image_shape
        self.sites = tuple(site.replace("z", "eps") for site in vae.sites)

    @property
    def mean_posterior_variance(self) -> Latents | None:
        """The training set's mean variance of the guide per site, where it is known."""
        return self.vae.mean_noise_variance

    def model(self, x: Tensor) -> TorchDistribution:
        """Generative program p(x, noise), as :meth:`NVAE.model`."""
        self.vae.check_images(x)
        self.vae.register()

        def choose(group: int, state: TopDownState) -> Tensor:
            prior = gaussian(state.prior)
            zeros = torch.zeros_like(prior.loc)
            standard = dist.Normal(zeros, torch.ones_like(zeros), validate_args=False)
            return from_noise(prior, pyro.sample(self.sites[group], standard.to_event(3)))

        with pyro.plate("data", x.shape[0]):
            observation = self.vae.likelihood(self.vae.walk(x.shape[0], choose))
            pyro.sample("obs", observation, obs=x)
        return observation

    def guide(self, x: Tensor) -> Latents:
        """Inference program q(noise | x), as :meth:`NVAE.guide`; site name -> ``(N, L, h, w)``."""
        encoded = self.vae.bottom_up(x)
        self.vae.register()
        sampled: Latents = {}

        def choose(group: int, state: TopDownState) -> Tensor:
            prior = gaussian(state.prior)
            posterior, flow = self.vae.posterior(group, state, encoded)
            q: TorchDistribution
            if flow:
                shift, stretch = -prior.loc / prior.scale, 1 / prior.scale
                to_noise = AffineTransform(shift, stretch, event_dim=3, cache_size=1)
                q = FlowPosterior(posterior.to_event(3), [*flow, to_noise], validate_args=False)
            else:
                loc = (posterior.loc - prior.loc) / prior.scale
                q = dist.Normal(loc, posterior.scale / prior.scale, validate_args=False).to_event(3)
            sampled[self.sites[group]] = noise = pyro.sample(self.sites[group], q)
            return from_noise(prior, noise)

        with pyro.plate("data", x.shape[0]):
            self.vae.walk(x.shape[0], choose)
        return sampled

    def to_latents(self, noise: LatentsLike) -> Latents:
        """Noise by site name -> latents of ``vae`` by site name.

        Raises:
            ValueError: a site is missing, unknown, or has the wrong shape.
        """
        return dict(zip(self.vae.sites, self._path(noise).latents))

    def to_noise(self, latents: LatentsLike) -> Latents:
        """Latents of ``vae`` -> noise; inverse of :meth:`to_latents`, with the same errors."""
        path = self.vae.walk_through(latents)
        priors = [gaussian(state.prior) for state in path.states]
        noise = [(z - prior.loc) / prior.scale for z, prior in zip(path.latents, priors)]
        return dict(zip(self.sites, noise))

    def observation(self, noise: LatentsLike) -> TorchDistribution:
        """p(x | noise), batch shape ``(N,)``; errors as in :meth:`to_latents`."""
        return self.vae.likelihood(self._path(noise))

    def decode(self, noise: LatentsLike) -> Tensor:
        """Mean of p(x | noise): images ``(N, C, H, W)``; errors as in :meth:`to_latents`."""
        return self.observation(noise).mean

    def _path(self, noise: LatentsLike) -> TopDownPath:
        return self.vae.walk_by_noise(self.vae.in_order(noise, self.sites))
