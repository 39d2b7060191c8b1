r"""NVAE's network: from the image up, and down through the latent groups to the image.

The latent groups are :math:`z_0` (top, coarsest) to :math:`z_{G-1}`. With :math:`s_g` the decoder's
features behind :math:`z_0, \dots, z_{g-1}`, and :math:`r_g` the encoder's at the same place,

.. math::

    p(x, z) &= p(x \mid z) \prod_g \mathcal N(z_g \mid \mu_g(s_g), \sigma_g(s_g)^2), \\
    q(z \mid x) &= \prod_g F_{g\#}\, \mathcal N(\mu'_g(s_g, r_g), \sigma'_g(s_g, r_g)^2)(z_g),

where the flow :math:`F_g` may be absent. Everything walks the same top-down path through the
:math:`s_g`; that walk is written once, and callers say how the next latent is chosen.

Reference: NVAE: A Deep Hierarchical Variational Autoencoder, A. Vahdat and J. Kautz, NeurIPS 2020,
https://arxiv.org/abs/2007.03898.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions.transforms import Transform
from torch.utils.checkpoint import checkpoint

from pyro_vae_defence.models.nvae import towers
from pyro_vae_defence.models.nvae.config import NVAEConfig
from pyro_vae_defence.models.nvae.flows import FlowPair, ShiftTransform
from pyro_vae_defence.models.nvae.gaussian import from_noise, gaussian
from pyro_vae_defence.models.nvae.layers import Conv2d
from pyro_vae_defence.models.nvae.likelihoods import image_likelihood, pad, quantise
from pyro_vae_defence.models.scope import ScopedModule
from pyro_vae_defence.ops.checks import check_integer, check_within
from pyro_vae_defence.types import Latents, LatentsLike


class TopDownState(NamedTuple):
    """Where the top-down path stands in front of a group.

    Attributes:
        features: the decoder's features ``s_g``, ``(N, C, h, w)``.
        prior: raw parameters of the group's prior, ``(N, 2 L, h, w)``.
    """

    features: Tensor
    prior: Tensor


class TopDownPath(NamedTuple):
    """A walk down all groups: the latent of each, from the top down, and the state in front."""

    latents: list[Tensor]
    states: list[TopDownState]

    def behind(self, latents: list[Tensor], num: int) -> TopDownState | None:
        """State behind these very latents of ``num`` images, if this path went there."""
        # Before the first latent, the number of images alone tells whose path it is.
        if self.latents[0].shape[0] != num:
            return None
        same = all(mine is theirs for mine, theirs in zip(self.latents, latents))
        return self.states[len(latents)] if same else None


Choose: TypeAlias = Callable[[int, TopDownState], Tensor]
"""Number of a group and the state in front of it -> its latent ``(N, L, h, w)``."""


class NVAENetwork(ScopedModule):
    """The layers of an NVAE and the passes through them, without programs.

    Images have shape ``(N, *image_shape)`` and values in [0, 1] (not checked: that would wait for
    the device at every call). Grey images are 28x28 and padded to 32x32 inside; images that are
    padded already are refused, since an attack would change a border that no likelihood sees. A
    network of fewer than 8 bits per channel (``num_x_bits``) reduces images to its levels itself,
    for the encoder and the likelihood; the derivative goes straight through
    (:func:`~pyro_vae_defence.models.nvae.likelihoods.quantise`).

    Args:
        config: the architecture.
        checkpointing: whether backward passes recompute activations; may be set at any time.

    Attributes:
        image_shape: shape ``(C, H, W)`` of the images.
        sites: names of the latent groups, from the top down.
        mean_posterior_variance: the training set's mean variance of the guide per site, if known.
        mean_noise_variance: the same for the sites of the non-centred form.
    """

    mean_posterior_variance: Latents | None = None
    mean_noise_variance: Latents | None = None

    def __init__(self, config: NVAEConfig, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        self.image_shape = config.image_shape
        self.sites = tuple(f"z_{group:02d}" for group in range(config.num_groups))
        encoder, decoder = config.num_channels_enc, config.num_channels_dec
        latents, side, _ = config.latent_shapes[0]
        # Channels grow as the resolution falls: by these factors in front of the groups.
        top, *lower = factors = [config.input_size // shape[-1] for shape in config.latent_shapes]
        # Names and order are those of the official state dict. Entries per group go top down.
        self.prior_ftr0 = nn.Parameter(torch.rand(decoder * top, side, side))
        self.stem = Conv2d(config.image_shape[0], encoder, 3)
        self.pre_process = towers.build_pre_process(config)
        self.enc_tower = towers.EncoderTower(config)
        self.enc0 = nn.Sequential(nn.ELU(), Conv2d(encoder * top, encoder * top, 1), nn.ELU())
        # Raw parameters of the posteriors, and of the priors of all groups but the top one.
        self.enc_sampler = nn.ModuleList(Conv2d(encoder * f, 2 * latents, 3) for f in factors)
        self.dec_sampler = nn.ModuleList(
            nn.Sequential(nn.ELU(), Conv2d(decoder * f, 2 * latents, 1)) for f in lower
        )
        num_flows = config.num_groups * config.num_nf
        self.nf_cells = nn.ModuleList(FlowPair(latents) for _ in range(num_flows))
        self.dec_tower = towers.DecoderTower(config)
        if config.is_flat:
            self.stem_decoder = Conv2d(latents, encoder * top, 1)
        self.post_process = towers.build_post_process(config)
        self.image_conditional = nn.Sequential(nn.ELU(), Conv2d(decoder, config.output_channels, 3))

    # --- Whole passes -----------------------------------------------------------------------------

    def observation(self, latents: LatentsLike) -> TorchDistribution:
        """p(x | z) for latents by site name, batch shape ``(N,)``; errors as :meth:`in_order`."""
        return self.likelihood(self.walk_through(latents))

    def decode(self, latents: LatentsLike) -> Tensor:
        """Mean of p(x | z) for latents by site name: images ``(N, C, H, W)``."""
        return self.observation(latents).mean

    def sample(self, num: int, temperature: float = 1.0) -> Tensor:
        """``num`` images ``(num, C, H, W)`` in [0, 1], as the official program shows them.

        Grey images are the Bernoulli's probabilities, colour images are draws from the likelihood.
        ``temperature`` is a positive factor of all standard deviations of the prior; below 1 images
        become typical. Noise comes from the global seed.

        Raises:
            ValueError: ``num`` or ``temperature`` is not positive.
        """
        check_integer("num", num)
        check_within("temperature", temperature, "(0, inf]")
        shapes = self.config.latent_shapes
        noise = [self.prior_ftr0.new_empty(num, *shape).normal_() for shape in shapes]
        observation = self.likelihood(self.walk_by_noise(noise, temperature))
        images = observation.mean if self.config.is_grey else observation.sample()
        return images.clamp(0, 1)

    # --- Parts of a pass --------------------------------------------------------------------------

    def check_images(self, x: Tensor) -> None:
        """``ValueError`` for images of a wrong shape."""
        if x.shape[1:] == self.image_shape:
            return
        channels, height, width = self.image_shape
        padded = x.shape[1:] == (channels, *2 * (self.config.input_size,))
        mend = "; the network pads them itself: pass x[..., 2:-2, 2:-2]" if padded else ""
        raise ValueError(
            f"x has shape {tuple(x.shape)}; images of dataset {self.config.dataset!r} have shape "
            f"(N, {channels}, {height}, {width}){mend}"
        )

    def in_order(self, latents: LatentsLike, sites: Sequence[str]) -> list[Tensor]:
        """Values of all groups, from the top down, by the names ``sites`` they have in ``latents``.

        Raises:
            ValueError: a site is missing, unknown, or has the wrong shape.
        """
        if set(latents) != set(sites):
            raise ValueError(f"latents have the sites {sorted(latents)}; expected {list(sites)}")
        values = [latents[site] for site in sites]
        num = values[0].shape[0]
        for site, value, shape in zip(sites, values, self.config.latent_shapes):
            if tuple(value.shape) != (num, *shape):
                raise ValueError(
                    f"latents[{site!r}] has shape {tuple(value.shape)}; expected {(num, *shape)}"
                )
        return values

    def bottom_up(self, x: Tensor) -> list[Tensor]:
        """The encoder's features of images ``x`` at every group, from the top down."""
        self.check_images(x)
        x = pad(self.config, quantise(x, self.config.num_x_bits))
        features = self._segment(lambda image: self.pre_process(self.stem(2 * image - 1)), x)
        top, at_combiners = self.enc_tower(features, self._segment)
        return [self.enc0(top), *at_combiners]

    def posterior(
        self, group: int, state: TopDownState, encoded: list[Tensor]
    ) -> tuple[dist.Normal, list[Transform]]:
        """The group's Gaussian given :meth:`bottom_up`'s features, and the flows behind it."""
        features = encoded[group]
        if group > 0:
            features = self.enc_tower.combiners()[group - 1](features, state.features)
        raw = self.enc_sampler[group](features)
        # A residual posterior's raw parameters are relative to the prior's, which are 0 at the top.
        posterior = gaussian(raw + state.prior if self.config.res_dist else raw)
        first = group * self.config.num_nf
        pairs = self.nf_cells[first : first + self.config.num_nf]
        return posterior, [ShiftTransform(flow) for pair in pairs for flow in pair.children()]

    def walk(self, num: int, choose: Choose, known: TopDownPath | None = None) -> TopDownPath:
        """Walk down the groups for ``num`` images, by the latents that ``choose`` gives.

        The features of an earlier path, ``known``, are taken over while the latents are its own.
        """
        path = TopDownPath([], [])
        for group in range(self.config.num_groups):
            state = known.behind(path.latents, num) if known is not None else None
            if state is None:
                state = self._descend(path) if group > 0 else self._top(num)
            path.states.append(state)
            path.latents.append(choose(group, state))
        return path

    def walk_through(self, latents: LatentsLike) -> TopDownPath:
        """Walk down the groups through latents by site name; errors as :meth:`in_order`."""
        values = self.in_order(latents, self.sites)
        return self.walk(values[0].shape[0], lambda group, _: values[group])

    def walk_by_noise(self, noise: Sequence[Tensor], temperature: float = 1.0) -> TopDownPath:
        """Walk to the latents that standard normal draws per group stand for under the prior."""

        def choose(group: int, state: TopDownState) -> Tensor:
            return from_noise(gaussian(state.prior, temperature), noise[group])

        return self.walk(noise[0].shape[0], choose)

    def output(self, path: TopDownPath) -> Tensor:
        """Output of the network behind a complete path, ``(N, C_out, S, S)``."""
        last = self._take_in(path)
        return self._segment(lambda s: self.image_conditional(self.post_process(s)), last)

    def likelihood(self, path: TopDownPath) -> TorchDistribution:
        """Distribution of the image behind a complete path, batch shape ``(N,)``."""
        return image_likelihood(self.config, self.output(path))

    def register(self) -> None:
        """In train mode, register the parameters with Pyro's store, so that ``SVI`` finds them."""
        if self.training:
            for name, parameter in self.named_parameters():
                if parameter.requires_grad:
                    pyro.param(f"{self.scope}.{name}", parameter)

    def _segment(self, part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``part(*inputs)``, whose activations are kept or, with checkpointing, computed anew."""
        if self.training or not (self.checkpointing and torch.is_grad_enabled()):
            return part(*inputs)
        # There is no randomness to repeat.
        return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _top(self, num: int) -> TopDownState:
        constant = self.prior_ftr0
        num_latents, height, width = self.config.latent_shapes[0]
        prior = constant.new_zeros(num, 2 * num_latents, height, width)
        return TopDownState(constant.expand(num, *constant.shape), prior)

    def _descend(self, path: TopDownPath) -> TopDownState:
        features = self._take_in(path)
        return TopDownState(features, self.dec_sampler[len(path.latents) - 1](features))

    def _take_in(self, path: TopDownPath) -> Tensor:
        """Features behind the last latent of ``path``."""
        z = path.latents[-1]
        if self.config.is_flat:
            return self.stem_decoder(z)
        group, above = len(path.latents) - 1, path.states[-1].features
        return self._segment(self.dec_tower.advance, group, above, z)
