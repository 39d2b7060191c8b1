r"""NVAE as two Pyro programs.

The latent groups are :math:`z_0` (top, coarsest) to :math:`z_{G-1}`. With :math:`s_g` the decoder's
features behind :math:`z_0, \dots, z_{g-1}`, and :math:`r_g` the encoder's at the same place,

.. math::

    p(x, z) &= p(x \mid z) \prod_g \mathcal N(z_g \mid \mu_g(s_g), \sigma_g(s_g)^2), \\
    q(z \mid x) &= \prod_g F_{g\#}\, \mathcal N(\mu'_g(s_g, r_g), \sigma'_g(s_g, r_g)^2)(z_g),

where the flow :math:`F_g` may be absent. Both programs walk the same top-down path through the
:math:`s_g`; that walk is written once, and they differ in how they choose the next latent.

Reference: NVAE: A Deep Hierarchical Variational Autoencoder, A. Vahdat and J. Kautz, NeurIPS 2020,
https://arxiv.org/abs/2007.03898.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions.transforms import Transform
from torch.utils.checkpoint import checkpoint

from pyro_vae_defence.models.nvae import likelihoods
from pyro_vae_defence.models.nvae.config import NVAEConfig
from pyro_vae_defence.models.nvae.flows import FlowPair, FlowPosterior, build_flows
from pyro_vae_defence.models.nvae.layers import Conv2d
from pyro_vae_defence.models.nvae.samplers import (
    build_posterior_samplers,
    build_prior_samplers,
    gaussian,
)
from pyro_vae_defence.models.nvae.terms import GroupTerms, Terms
from pyro_vae_defence.models.nvae.towers import (
    DecoderTower,
    EncoderTower,
    build_post_process,
    build_pre_process,
)
from pyro_vae_defence.types import Latents, LatentsLike

if TYPE_CHECKING:
    from pyro_vae_defence.models.nvae.noncentred import NonCentredNVAE

_instances = itertools.count()


class TopDownState(NamedTuple):
    """Where the top-down path stands in front of a group.

    Attributes:
        features: the decoder's features ``s_g``, ``(N, C, h, w)``.
        prior: raw parameters of the group's prior, ``(N, 2 L, h, w)``.
    """

    features: Tensor
    prior: Tensor


class Path(NamedTuple):
    """A walk down all groups.

    Attributes:
        latents: the latent of every group, from the top down.
        states: the state in front of every group.
    """

    latents: list[Tensor]
    states: list[TopDownState]


Choose = Callable[[int, TopDownState], Tensor]
"""Number of a group and the state in front of it -> its latent ``(N, L, h, w)``."""


@dataclass(frozen=True)
class _SharedPath:
    """The path a guide walked, for a model run on the very same latents."""

    stamp: object = None
    path: Path = field(default_factory=lambda: Path([], []))

    def state(self, latents: list[Tensor], num: int) -> TopDownState | None:
        """The state behind ``latents`` of ``num`` images if the path went there."""
        # Before the first latent, the number of images alone tells whose path it is.
        if not self.path.states or self.path.latents[0].shape[0] != num:
            return None
        same = all(mine is theirs for mine, theirs in zip(self.path.latents, latents))
        return self.path.states[len(latents)] if same else None


class NVAE(nn.Module):
    """Hierarchical VAE: latent sites ``z_00`` (top), ``z_01``, ..., and the image at ``obs``.

    Images have shape ``(N, *image_shape)`` and values in [0, 1] (not checked: that would wait for
    the device at every call). Grey images are 28x28 and padded to 32x32 for the encoder; images
    already padded to 32x32 are taken as they are, and cropped to 28x28 for ``obs``.

    **Sharing.** The guide walks the top-down path to build its posteriors. A model run that follows
    on the very same latent tensors (``poutine.replay``), with nothing changed in between, takes the
    features over instead of computing them again, so an ELBO costs one pass. Any other model run
    computes its own. The guide's features are kept until the next call of a program;
    ``share=False`` switches this off.

    **Modes.** In train mode batch statistics are used and updated, and the parameters are
    registered with Pyro's parameter store so that ``SVI`` finds them, under a name of this
    instance's own. In eval mode neither happens.

    **Memory.** With ``checkpointing`` a backward pass computes the activations of the towers anew,
    segment by segment, instead of keeping them: about a third more time, and memory for one
    segment and the features between segments. In train mode, where a second pass would move the
    statistics of batch norm once more, it has no effect.

    Args:
        config: the architecture.
        share: whether a model run may take over the guide's path.
        checkpointing: whether backward passes recompute activations; may be set at any time.

    Example:
        >>> config = NVAEConfig(num_groups_per_scale=2, num_channels_enc=4, num_channels_dec=4)
        >>> vae = NVAE(config).eval()
        >>> {site: tuple(z.shape) for site, z in vae.guide(torch.rand(3, 1, 28, 28)).items()}
        {'z_00': (3, 20, 8, 8), 'z_01': (3, 20, 8, 8)}
    """

    mean_posterior_variance: Latents | None = None
    """The training set's mean variance of the guide per site, where it is known."""

    mean_noise_variance: Latents | None = None
    """The same for the sites of :meth:`noncentred`."""

    def __init__(
        self, config: NVAEConfig, *, share: bool = True, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.share = share
        self.checkpointing = checkpointing
        self._shared = _SharedPath()
        self._scope = self._new_scope()
        top_enc = config.num_channels_enc * config.downsampling
        top_dec = config.num_channels_dec * config.downsampling
        top_shape = config.latent_shapes[0][1:]
        # Names and order are those of the official state dict.
        self.prior_ftr0 = nn.Parameter(torch.rand(top_dec, *top_shape))
        self.stem = Conv2d(config.image_shape[0], config.num_channels_enc, 3)
        self.pre_process = build_pre_process(config)
        self.enc_tower = EncoderTower(config)
        self.enc0 = nn.Sequential(nn.ELU(), Conv2d(top_enc, top_enc, 1), nn.ELU())
        self.enc_sampler = build_posterior_samplers(config)
        self.dec_sampler = build_prior_samplers(config)
        self.nf_cells = build_flows(config)
        self.dec_tower = DecoderTower(config)
        if config.is_flat:
            self.stem_decoder = Conv2d(config.num_latent_per_group, top_enc, 1)
        self.post_process = build_post_process(config)
        self.image_conditional = nn.Sequential(
            nn.ELU(), Conv2d(config.num_channels_dec, config.output_channels, 3)
        )

    # Pyro's parameter store is global and keyed by name: two networks under one name would share
    # weights by accident, so every instance, copies included, has its own.
    @staticmethod
    def _new_scope() -> str:
        return f"NVAE_{next(_instances)}"

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles do not carry a path, part of an autograd graph, along.
        return self.__dict__ | {"_shared": _SharedPath()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scope = self._new_scope()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of the images."""
        return self.config.image_shape

    @staticmethod
    def site(group: int) -> str:
        """Name of the latent site of ``group``, counted from the top."""
        return f"z_{group:02d}"

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the latent sites, from the top down."""
        return tuple(self.site(group) for group in range(self.config.num_groups))

    # --- The two programs -------------------------------------------------------------------------

    def model(self, x: Tensor) -> TorchDistribution:
        """Generative program p(x, z): the latent sites, then ``x`` observed at ``obs``.

        Returns:
            The distribution of the image given the latents, batch shape ``(N,)``.

        Raises:
            ValueError: ``x`` has the wrong shape.
        """
        image = self._image(x)
        self._register()
        shared, self._shared = self._shared, _SharedPath()
        if shared.stamp != self._stamp(shared.path.latents):
            shared = _SharedPath()

        def choose(group: int, state: TopDownState) -> Tensor:
            z: Tensor = pyro.sample(self.site(group), gaussian(state.prior).to_event(3))
            return z

        with pyro.plate("data", x.shape[0]):
            path = self._walk(x.shape[0], choose, shared)
            observation = likelihoods.observation(self.config, self._output(path))
            pyro.sample("obs", observation, obs=image)
        return observation

    def guide(self, x: Tensor) -> Latents:
        """Inference program q(z | x).

        The distribution of a site is a Gaussian or, with flows, a :class:`flows.FlowPosterior`.

        Returns:
            Site name -> latent ``(N, L, h, w)``.

        Raises:
            ValueError: ``x`` has the wrong shape.
        """
        self._shared = _SharedPath()  # frees the last path before the next one is built
        encoded = self._encode(x)
        self._register()

        def choose(group: int, state: TopDownState) -> Tensor:
            posterior, flow = self._posterior(group, state, encoded)
            q = posterior.to_event(3)
            if flow:
                q = FlowPosterior(q, flow, validate_args=False)
            z: Tensor = pyro.sample(self.site(group), q)
            return z

        with pyro.plate("data", x.shape[0]):
            path = self._walk(x.shape[0], choose)
        if self.share:
            self._shared = _SharedPath(self._stamp(path.latents), path)
        return dict(zip(self.sites, path.latents))

    # --- Without Pyro -----------------------------------------------------------------------------

    def forward(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> Terms:
        """One pass as the official program makes it: sample the posterior, decode, keep the terms.

        Args:
            x: images, as for the programs.
            noise: standard normal draws ``(N, L, h, w)`` per group, from the top down; drawn from
                the global seed when ``None``.

        Raises:
            ValueError: ``x`` or ``noise`` has the wrong shape.
        """
        image = self._image(x)
        draws = self._noise(x.shape[0], noise)
        encoded = self._encode(x)
        groups: list[GroupTerms] = []

        def choose(group: int, state: TopDownState) -> Tensor:
            posterior, flow = self._posterior(group, state, encoded)
            z = z_base = posterior.loc + posterior.scale * draws[group]
            for transform in flow:
                z = transform(z)
            groups.append(GroupTerms(posterior, gaussian(state.prior), z_base, z))
            return z

        logits = self._output(self._walk(x.shape[0], choose))
        log_likelihood = likelihoods.observation(self.config, logits).log_prob(image)
        return Terms(tuple(groups), logits, -log_likelihood)

    def logits(self, latents: LatentsLike) -> Tensor:
        """Output of the network for latents by site name: ``(N, C_out, S, S)``.

        Raises:
            ValueError: a site is missing, unknown, or has the wrong shape.
        """
        values = self._checked(latents, self.sites)
        return self._output(self._walk(values[0].shape[0], lambda group, _: values[group]))

    def observation(self, latents: LatentsLike) -> TorchDistribution:
        """p(x | z) for latents by site name, batch shape ``(N,)``; errors as in :meth:`logits`."""
        return likelihoods.observation(self.config, self.logits(latents))

    def decode(self, latents: LatentsLike) -> Tensor:
        """Mean of p(x | z) for latents by site name: images ``(N, C, H, W)``."""
        images: Tensor = self.observation(latents).mean
        return images

    def sample_latents(
        self, num: int, temperature: float = 1.0, *, noise: Sequence[Tensor] | None = None
    ) -> Latents:
        """Latents of ``num`` images from the prior, by site name.

        Args:
            num: number of images.
            temperature: factor of all standard deviations, positive; below 1 images become typical.
            noise: as in :meth:`forward`.

        Raises:
            ValueError: ``num`` or ``temperature`` is not positive, or ``noise`` has wrong shapes.
        """
        return dict(zip(self.sites, self._ancestral(num, temperature, noise).latents))

    def sample(self, num: int, temperature: float = 1.0) -> Tensor:
        """``num`` images ``(num, C, H, W)`` in [0, 1], as the official program shows them.

        Grey images are the Bernoulli's probabilities, colour images are draws from the likelihood.
        Arguments and errors as in :meth:`sample_latents`.
        """
        logits = self._output(self._ancestral(num, temperature, None))
        observation = likelihoods.observation(self.config, logits)
        images: Tensor = observation.mean if self.config.is_grey else observation.sample()
        return images.clamp(0, 1)

    def noncentred(self) -> NonCentredNVAE:
        """The same model over the noise of its latents; see :class:`noncentred.NonCentredNVAE`."""
        from pyro_vae_defence.models.nvae.noncentred import NonCentredNVAE

        return NonCentredNVAE(self)

    # --- Files ------------------------------------------------------------------------------------

    @classmethod
    def from_official(
        cls, path: str | os.PathLike[str], *, ignore_args: tuple[str, ...] = ()
    ) -> NVAE:
        """Model from an official ``checkpoint.pt``; see :func:`checkpoint.load_official`."""
        from pyro_vae_defence.models.nvae.checkpoint import load_official

        return load_official(path, ignore_args=ignore_args)

    @classmethod
    def from_safetensors(cls, path: str | os.PathLike[str]) -> NVAE:
        """Model from a file of this library; see :func:`checkpoint.load_safetensors`."""
        from pyro_vae_defence.models.nvae.checkpoint import load_safetensors

        return load_safetensors(path)

    def save_safetensors(self, path: str | os.PathLike[str]) -> None:
        """Write weights and configuration; see :func:`checkpoint.save_safetensors`."""
        from pyro_vae_defence.models.nvae.checkpoint import save_safetensors

        save_safetensors(self, path)

    # --- Parts ------------------------------------------------------------------------------------

    def _encode(self, x: Tensor) -> list[Tensor]:
        """The encoder's features at every group, from the top down."""
        if self._image(x) is x:
            x = likelihoods.pad(self.config, x)
        features = self._segment(lambda image: self.pre_process(self.stem(2 * image - 1)), x)
        top, at_combiners = self.enc_tower(features, self._segment)
        return [self.enc0(top), *at_combiners]

    def _segment(self, part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``part(*inputs)``, whose activations are kept or, with checkpointing, computed anew."""
        if self.training or not (self.checkpointing and torch.is_grad_enabled()):
            return part(*inputs)
        # There is no randomness to repeat.
        out: Tensor = checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
        return out

    def _posterior(
        self, group: int, state: TopDownState, encoded: list[Tensor]
    ) -> tuple[dist.Normal, list[Transform]]:
        """The group's Gaussian, and the flows behind it."""
        features = encoded[group]
        if group > 0:
            features = self.enc_tower.combiners()[group - 1](features, state.features)
        raw = self.enc_sampler[group](features)
        # A residual posterior's raw parameters are relative to the prior's, which are 0 at the top.
        posterior = gaussian(raw + state.prior if self.config.res_dist else raw)
        flow: list[Transform] = []
        for index in range(group * self.config.num_nf, (group + 1) * self.config.num_nf):
            pair = self.nf_cells[index]
            assert isinstance(pair, FlowPair)
            flow += pair.transforms()
        return posterior, flow

    def _walk(self, num: int, choose: Choose, shared: _SharedPath | None = None) -> Path:
        """Walk down the groups; ``choose`` gives the latent of each."""
        path = Path([], [])
        for group in range(self.config.num_groups):
            state = shared.state(path.latents, num) if shared is not None else None
            if state is None:
                state = self._descend(path) if group > 0 else self._top(num)
            path.states.append(state)
            path.latents.append(choose(group, state))
        return path

    def _top(self, num: int) -> TopDownState:
        constant = self.prior_ftr0
        num_latents, height, width = self.config.latent_shapes[0]
        prior = constant.new_zeros(num, 2 * num_latents, height, width)
        return TopDownState(constant.expand(num, *constant.shape), prior)

    def _descend(self, path: Path) -> TopDownState:
        features = self._take_in(path)
        return TopDownState(features, self.dec_sampler[len(path.latents) - 1](features))

    def _take_in(self, path: Path) -> Tensor:
        """Features behind the last latent of ``path``."""
        z = path.latents[-1]
        if self.config.is_flat:
            features: Tensor = self.stem_decoder(z)
            return features
        group, above = len(path.latents) - 1, path.states[-1].features
        return self._segment(self.dec_tower.advance, group, above, z)

    def _output(self, path: Path) -> Tensor:
        """Output of the network behind a complete path."""
        return self._segment(
            lambda features: self.image_conditional(self.post_process(features)),
            self._take_in(path),
        )

    def _ancestral(self, num: int, temperature: float, noise: Sequence[Tensor] | None) -> Path:
        if num < 1:
            raise ValueError(f"num={num} must be at least 1")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive")
        draws = self._noise(num, noise)

        def choose(group: int, state: TopDownState) -> Tensor:
            prior = gaussian(state.prior, temperature)
            z: Tensor = prior.loc + prior.scale * draws[group]
            return z

        return self._walk(num, choose)

    def _noise(self, num: int, noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        shapes = [(num, *shape) for shape in self.config.latent_shapes]
        if noise is None:
            return [self.prior_ftr0.new_empty(shape).normal_() for shape in shapes]
        given = [tuple(draw.shape) for draw in noise]
        if given != shapes:
            raise ValueError(f"noise has shapes {given}; the groups have {shapes}")
        return noise

    def _checked(self, latents: LatentsLike, sites: Sequence[str]) -> list[Tensor]:
        """The values of ``latents`` in the order of ``sites``."""
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

    def _image(self, x: Tensor) -> Tensor:
        """What the likelihood sees of ``x``."""
        channels, height, width = self.image_shape
        size = self.config.input_size
        if tuple(x.shape[1:]) == (channels, height, width):
            return x
        if tuple(x.shape[1:]) == (channels, size, size):
            return likelihoods.crop(self.config, x)
        raise ValueError(
            f"x has shape {tuple(x.shape)}; images of dataset {self.config.dataset!r} have shape "
            f"(N, {channels}, {height}, {width})"
        )

    def _register(self) -> None:
        if self.training:
            for name, parameter in self.named_parameters():
                if parameter.requires_grad:
                    pyro.param(f"{self._scope}.{name}", parameter)

    def _stamp(self, latents: list[Tensor]) -> object:
        """Two equal stamps: features computed at the first are right at the second."""
        if not latents:
            return None
        if torch.is_inference_mode_enabled():
            return object()  # nothing has a version there; equal to no other stamp
        tensors = [*latents, *self.parameters(), *self.buffers()]
        device_type = self.prior_ftr0.device.type
        autocast = torch.amp.is_autocast_available(device_type)
        return (
            torch.is_grad_enabled(),
            autocast and torch.is_autocast_enabled(device_type),
            [module.training for module in self.modules()],
            [(id(t), t.device, t.dtype, t.requires_grad, t._version) for t in tensors],
        )
