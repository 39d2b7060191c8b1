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

from pyro_vae_defence.models.nvae import likelihoods
from pyro_vae_defence.models.nvae.flows import FlowPosterior
from pyro_vae_defence.models.nvae.nvae import NVAE, Path, TopDownState
from pyro_vae_defence.models.nvae.samplers import gaussian
from pyro_vae_defence.types import Latents, LatentsLike


class NonCentredNVAE:
    """The programs of ``vae`` over the noise sites ``eps_00`` (top), ``eps_01``, ...

    Same contract and, as distributions of images, same model; the guide is that of ``vae`` carried
    over. The weights belong to ``vae``. These programs do not share their top-down paths.

    Args:
        vae: the network.
    """

    def __init__(self, vae: NVAE) -> None:
        self.vae = vae

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of the images."""
        return self.vae.image_shape

    @property
    def mean_posterior_variance(self) -> Latents | None:
        """The training set's mean variance of the guide per site, where it is known."""
        return self.vae.mean_noise_variance

    @staticmethod
    def site(group: int) -> str:
        """Name of the noise site of ``group``, counted from the top."""
        return f"eps_{group:02d}"

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the noise sites, from the top down."""
        return tuple(self.site(group) for group in range(self.vae.config.num_groups))

    def model(self, x: Tensor) -> TorchDistribution:
        """Generative program p(x, noise), as :meth:`NVAE.model`."""
        image = self.vae._image(x)
        self.vae._register()

        def choose(group: int, state: TopDownState) -> Tensor:
            prior = gaussian(state.prior)
            zeros = torch.zeros_like(prior.loc)
            standard = dist.Normal(zeros, torch.ones_like(zeros), validate_args=False)
            noise = pyro.sample(self.site(group), standard.to_event(3))
            z: Tensor = prior.loc + prior.scale * noise
            return z

        with pyro.plate("data", x.shape[0]):
            path = self.vae._walk(x.shape[0], choose)
            observation = likelihoods.observation(self.vae.config, self.vae._output(path))
            pyro.sample("obs", observation, obs=image)
        return observation

    def guide(self, x: Tensor) -> Latents:
        """Inference program q(noise | x), as :meth:`NVAE.guide`.

        Returns:
            Site name -> noise ``(N, L, h, w)``.
        """
        encoded = self.vae._encode(x)
        self.vae._register()
        sampled: Latents = {}

        def choose(group: int, state: TopDownState) -> Tensor:
            prior = gaussian(state.prior)
            posterior, flow = self.vae._posterior(group, state, encoded)
            q: TorchDistribution
            if flow:
                to_noise = AffineTransform(
                    -prior.loc / prior.scale, 1 / prior.scale, event_dim=3, cache_size=1
                )
                q = FlowPosterior(posterior.to_event(3), [*flow, to_noise], validate_args=False)
            else:
                loc = (posterior.loc - prior.loc) / prior.scale
                q = dist.Normal(loc, posterior.scale / prior.scale, validate_args=False).to_event(3)
            sampled[self.site(group)] = noise = pyro.sample(self.site(group), q)
            z: Tensor = prior.loc + prior.scale * noise
            return z

        with pyro.plate("data", x.shape[0]):
            self.vae._walk(x.shape[0], choose)
        return sampled

    def to_latents(self, noise: LatentsLike) -> Latents:
        """Noise by site name -> latents of ``vae`` by site name.

        Raises:
            ValueError: a site is missing, unknown, or has the wrong shape.
        """
        return dict(zip(self.vae.sites, self._path(noise).latents))

    def to_noise(self, latents: LatentsLike) -> Latents:
        """Latents of ``vae`` -> noise; inverse of :meth:`to_latents`, with the same errors."""
        values = self.vae._checked(latents, self.vae.sites)
        path = self.vae._walk(values[0].shape[0], lambda group, _: values[group])
        priors = [gaussian(state.prior) for state in path.states]
        return {
            site: (z - prior.loc) / prior.scale
            for site, z, prior in zip(self.sites, values, priors)
        }

    def observation(self, noise: LatentsLike) -> TorchDistribution:
        """p(x | noise), batch shape ``(N,)``; errors as in :meth:`to_latents`."""
        return likelihoods.observation(self.vae.config, self.vae._output(self._path(noise)))

    def decode(self, noise: LatentsLike) -> Tensor:
        """Mean of p(x | noise): images ``(N, C, H, W)``; errors as in :meth:`to_latents`."""
        images: Tensor = self.observation(noise).mean
        return images

    def _path(self, noise: LatentsLike) -> Path:
        draws = self.vae._checked(noise, self.sites)

        def choose(group: int, state: TopDownState) -> Tensor:
            prior = gaussian(state.prior)
            z: Tensor = prior.loc + prior.scale * draws[group]
            return z

        return self.vae._walk(draws[0].shape[0], choose)
