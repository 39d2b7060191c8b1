r"""NVAE as two Pyro programs.

Latent groups :math:`z_0` (top, coarsest) to :math:`z_{G-1}`; with :math:`s_g` the decoder's features behind
:math:`z_0, \dots, z_{g-1}` and :math:`r_g` the encoder's features at the same place,

.. math::

    p(x, z) &= p(x \mid z) \prod_g \mathcal N(z_g \mid \mu_g(s_g), \sigma_g(s_g)^2), \\
    q(z \mid x) &= \prod_g F_{g\,\#}\, \mathcal N(\mu'_g(s_g, r_g), \sigma'_g(s_g, r_g)^2)(z_g),

where the flow :math:`F_g` may be absent. Both programs walk the same top-down path through ``s_g``.

Reference: NVAE: A Deep Hierarchical Variational Autoencoder, A. Vahdat and J. Kautz, NeurIPS 2020,
https://arxiv.org/abs/2007.03898.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ...types import Latents, LatentsLike
from . import likelihoods
from .config import NVAEConfig
from .flows import build_flows
from .layers import Conv2d
from .samplers import build_posterior_samplers, build_prior_samplers, gaussian
from .towers import DecoderTower, EncoderTower, build_post_process, build_pre_process


class TopDownState(NamedTuple):
    """Where the top-down path stands in front of a group."""

    features: Tensor
    """Decoder features ``s_g``, ``(N, C, h, w)``."""
    prior: Tensor
    """Raw parameters of the group's prior, ``(N, 2 L, h, w)``."""


@dataclass(frozen=True)
class GroupTerms:
    """One latent group in a pass over images; maps have shape ``(N, L, h, w)``, nats."""

    posterior: dist.Normal
    """Gaussian before the flows."""
    prior: dist.Normal
    z_base: Tensor
    """Sample of ``posterior``."""
    z: Tensor
    """The latent: ``z_base`` behind the flows."""

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
        """Elementwise KL(q || p): exact without flows, else the one-sample estimate ``log q - log p``."""
        if self.z is self.z_base:
            return kl_divergence(self.posterior, self.prior)
        return self.log_q_map - self.log_p_map


@dataclass(frozen=True)
class Terms:
    """Everything a loss is made of, from one pass over images; per image and group, from the top down, nats."""

    groups: tuple[GroupTerms, ...]
    logits: Tensor
    """Output of the network, ``(N, C_out, S, S)``."""
    reconstruction_loss: Tensor
    """``-log p(x | z)``, ``(N,)``."""

    @property
    def kl(self) -> Tensor:
        """KL, ``(N, G)``; see :attr:`GroupTerms.kl_map`."""
        return self._per_group([g.kl_map for g in self.groups])

    @property
    def log_q(self) -> Tensor:
        """log q of the sample, ``(N, G)``."""
        return self._per_group([g.log_q_map for g in self.groups])

    @property
    def log_p(self) -> Tensor:
        """log p of the sample, ``(N, G)``."""
        return self._per_group([g.log_p_map for g in self.groups])

    @staticmethod
    def _per_group(maps: list[Tensor]) -> Tensor:
        return torch.stack([m.flatten(1).sum(dim=1) for m in maps], dim=1)


@dataclass
class _SharedPath:
    """The path a guide walked, for the model that is run next on the very same latents."""

    stamp: object = None
    latents: list[Tensor] = field(default_factory=list)
    states: list[TopDownState] = field(default_factory=list)

    def covers(self, latents: list[Tensor]) -> bool:
        return all(mine is theirs for mine, theirs in zip(self.latents, latents))

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles of the network do not carry the path along.
        return (_SharedPath, ())


class NVAE(nn.Module):
    """Hierarchical VAE: ``model(x)`` and ``guide(x)`` over latent sites ``z_00`` (top) to ``z_{G-1}``.

    Images ``x`` have shape ``(N, C, H, W) = (N, *config.image_shape)`` and values in [0, 1] (not checked: that would wait for
    the device on every call). For grey data 28x28 images are padded to 32x32 for the encoder; 32x32 images are
    taken as they are. Site ``obs`` always holds the 28x28 image.

    Sharing: the guide walks the top-down path to build its posteriors. A model run that follows, on the very same latent
    tensors (``poutine.replay``) and with unchanged weights, takes the features over from the guide instead of computing them
    again, so an ELBO costs one pass; any other model run computes its own. The guide's features live until the
    next call of either program; ``share=False`` switches this off.

    Training mode: batch statistics are used and updated, and the parameters are registered with Pyro's parameter store under a
    name of this instance's own, so that ``SVI`` finds them. In eval mode neither happens.

    Args:
        config: the architecture.
        share: whether a model run may reuse the guide's path.
    """

    def __init__(self, config: NVAEConfig, *, share: bool = True) -> None:
        super().__init__()
        self.config = config
        self.share = share
        self._shared = _SharedPath()
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

    # ---------------------------------------------------------------- the two programs

    def model(self, x: Tensor) -> TorchDistribution:
        """Generative program: latent sites, then ``x`` observed at ``obs``.

        Returns:
            The distribution of the image, batch shape ``(N,)``.

        Raises:
            ValueError: ``x`` has the wrong shape.
        """
        image = self._image(x)
        self._register()
        path, self._shared = self._shared, _SharedPath()
        if path.states and path.stamp != self._stamp():
            path = _SharedPath()

        def choose(group: int, state: TopDownState) -> Tensor:
            z: Tensor = pyro.sample(self.site(group), gaussian(state.prior).to_event(3))
            return z

        with pyro.plate("data", x.shape[0]):
            latents, states = self._walk(x.shape[0], choose, path)
            observation = self.observation(self._output(states[-1], latents[-1]))
            pyro.sample("obs", observation, obs=image)
        return observation

    def guide(self, x: Tensor) -> Latents:
        """Inference program q(z | x).

        A site's distribution is a Gaussian or, with flows, a ``TransformedDistribution`` of one; two of the latter from the
        same group have an exact KL divergence.

        Returns:
            Site name -> latent ``(N, L, h, w)``.

        Raises:
            ValueError: ``x`` has the wrong shape.
        """
        encoded = self._encode(x)
        self._register()
        self._shared = _SharedPath()  # frees the last path before this one is built

        def choose(group: int, state: TopDownState) -> Tensor:
            z: Tensor = pyro.sample(self.site(group), self._posterior(group, state, encoded))
            return z

        with pyro.plate("data", x.shape[0]):
            latents, states = self._walk(x.shape[0], choose)
        if self.share:
            self._shared = _SharedPath(self._stamp(), latents, states)
        return self._named(latents)

    # ---------------------------------------------------------------- without Pyro

    def forward(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> Terms:
        """One pass as the official program makes it: sample the posterior, decode, collect the terms.

        Args:
            x: images, see the class.
            noise: standard normal draws ``(N, L, h, w)`` per group, from the top down; drawn when ``None``.

        Raises:
            ValueError: ``x`` or ``noise`` has the wrong shape.
        """
        image = self._image(x)
        draws = self._noise(x.shape[0], noise)
        encoded = self._encode(x)
        groups: list[GroupTerms] = []

        def choose(group: int, state: TopDownState) -> Tensor:
            posterior = self._posterior_base(group, state, encoded)
            z = z_base = posterior.loc + posterior.scale * draws[group]
            for transform in self._flow(group):
                z = transform(z)
            groups.append(GroupTerms(posterior, gaussian(state.prior), z_base, z))
            return z

        latents, states = self._walk(x.shape[0], choose)
        logits = self._output(states[-1], latents[-1])
        return Terms(tuple(groups), logits, -self.observation(logits).log_prob(image))

    def decode(self, latents: LatentsLike) -> TorchDistribution:
        """p(x | z): latents by site name -> distribution of images, batch shape ``(N,)``; its ``mean`` is an image.

        Raises:
            ValueError: a site is missing, unknown or has the wrong shape.
        """
        return self.observation(self.logits(latents))

    def logits(self, latents: LatentsLike) -> Tensor:
        """Output of the network ``(N, C_out, S, S)`` for latents by site name; errors as in :meth:`decode`."""
        values = self._checked(latents)
        values, states = self._walk(values[0].shape[0], lambda group, _: values[group])
        return self._output(states[-1], values[-1])

    def sample_latents(
        self, num: int, temperature: float = 1.0, *, noise: Sequence[Tensor] | None = None
    ) -> Latents:
        """Latents of ``num`` images from the prior, standard deviations multiplied by ``temperature``.

        Args:
            num: number of images.
            temperature: positive; below 1 gives more typical images.
            noise: standard normal draws ``(num, L, h, w)`` per group; drawn when ``None``.

        Raises:
            ValueError: ``num`` or ``temperature`` is not positive, or ``noise`` has the wrong shape.
        """
        return self._named(self._ancestral(num, temperature, noise)[0])

    def sample(self, num: int, temperature: float = 1.0) -> Tensor:
        """``num`` images ``(num, C, H, W)`` in [0, 1], as the official program shows them.

        Grey images are the Bernoulli probabilities; colour images are drawn from the likelihood.

        Raises:
            ValueError: ``num`` or ``temperature`` is not positive.
        """
        latents, states = self._ancestral(num, temperature, None)
        observation = self.observation(self._output(states[-1], latents[-1]))
        images: Tensor = observation.mean if self.config.is_grey else observation.sample()
        return images.clamp(0, 1)

    def observation(self, logits: Tensor) -> TorchDistribution:
        """Distribution of the image given the network's output; see :func:`likelihoods.observation`."""
        return likelihoods.observation(self.config, logits)

    @staticmethod
    def site(group: int) -> str:
        """Name of the latent site of ``group``, counted from the top."""
        return f"z_{group:02d}"

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the latent sites, from the top down."""
        return tuple(self.site(group) for group in range(self.config.num_groups))

    # ---------------------------------------------------------------- files

    @classmethod
    def from_official(
        cls, path: str | os.PathLike[str], *, ignore_args: tuple[str, ...] = ()
    ) -> NVAE:
        """Model from an official ``checkpoint.pt``; see :func:`checkpoint.load_official`."""
        from .checkpoint import load_official

        return load_official(path, ignore_args=ignore_args)

    @classmethod
    def from_safetensors(cls, path: str | os.PathLike[str]) -> NVAE:
        """Model from a file of :meth:`save_safetensors`; see :func:`checkpoint.load_safetensors`."""
        from .checkpoint import load_safetensors

        return load_safetensors(path)

    def save_safetensors(self, path: str | os.PathLike[str]) -> None:
        """Write weights and configuration; see :func:`checkpoint.save_safetensors`."""
        from .checkpoint import save_safetensors

        save_safetensors(self, path)

    # ---------------------------------------------------------------- parts

    def _encode(self, x: Tensor) -> list[Tensor]:
        """Encoder features at every group, from the top down."""
        self._image(x)
        if x.shape[-1] != self.config.input_size:
            x = likelihoods.pad(self.config, x)
        features = self.pre_process(self.stem(2 * x - 1))
        top, at_combiners = self.enc_tower(features)
        return [self.enc0(top), *at_combiners]

    def _posterior_base(self, group: int, state: TopDownState, encoded: list[Tensor]) -> dist.Normal:
        features = encoded[group]
        if group > 0:
            features = self.enc_tower.combiners()[group - 1](features, state.features)
        raw = self.enc_sampler[group](features)
        # Residual posteriors: raw parameters are relative to the prior's (zero at the top).
        return gaussian(raw + state.prior if self.config.res_dist else raw)

    def _posterior(self, group: int, state: TopDownState, encoded: list[Tensor]) -> TorchDistribution:
        base = self._posterior_base(group, state, encoded).to_event(3)
        flow = self._flow(group)
        return dist.TransformedDistribution(base, flow, validate_args=False) if flow else base

    def _flow(self, group: int) -> list[Any]:
        pairs = range(group * self.config.num_nf, (group + 1) * self.config.num_nf)
        return [transform for j in pairs for transform in self.nf_cells[j].transforms()]

    def _walk(
        self,
        num: int,
        choose: Callable[[int, TopDownState], Tensor],
        path: _SharedPath | None = None,
    ) -> tuple[list[Tensor], list[TopDownState]]:
        """Walk down the groups; ``choose`` gives the latent of each. ``path`` is reused while its latents are met."""
        latents: list[Tensor] = []
        states: list[TopDownState] = []
        for group in range(self.config.num_groups):
            if path is not None and path.states and path.covers(latents):
                state = path.states[group]
            elif group == 0:
                state = self._start(num)
            else:
                features = self._take_in(group - 1, states[-1], latents[-1])
                state = TopDownState(features, self.dec_sampler[group - 1](features))
            states.append(state)
            latents.append(choose(group, state))
        return latents, states

    def _start(self, num: int) -> TopDownState:
        constant = self.prior_ftr0
        num_latent, height, width = self.config.latent_shapes[0]
        return TopDownState(
            constant.expand(num, *constant.shape),
            constant.new_zeros(num, 2 * num_latent, height, width),
        )

    def _take_in(self, group: int, state: TopDownState, z: Tensor) -> Tensor:
        if self.config.is_flat:
            out: Tensor = self.stem_decoder(z)
            return out
        return self.dec_tower.advance(group, state.features, z)

    def _output(self, state: TopDownState, z: Tensor) -> Tensor:
        features = self._take_in(self.config.num_groups - 1, state, z)
        out: Tensor = self.image_conditional(self.post_process(features))
        return out

    def _ancestral(
        self, num: int, temperature: float, noise: Sequence[Tensor] | None
    ) -> tuple[list[Tensor], list[TopDownState]]:
        if num < 1:
            raise ValueError(f"num={num} must be at least 1")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive")
        draws = self._noise(num, noise)

        def choose(group: int, state: TopDownState) -> Tensor:
            prior = gaussian(state.prior, temperature)
            return prior.loc + prior.scale * draws[group]

        return self._walk(num, choose)

    def _noise(self, num: int, noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        shapes = [(num, *shape) for shape in self.config.latent_shapes]
        if noise is None:
            return [self.prior_ftr0.new_empty(shape).normal_() for shape in shapes]
        given = [tuple(draw.shape) for draw in noise]
        if given != shapes:
            raise ValueError(f"noise has shapes {given}; expected {shapes}")
        return noise

    def _named(self, latents: Sequence[Tensor]) -> Latents:
        return dict(zip(self.sites, latents))

    def _checked(self, latents: LatentsLike) -> list[Tensor]:
        if set(latents) != set(self.sites):
            raise ValueError(f"latents have sites {sorted(latents)}; expected {list(self.sites)}")
        values = [latents[site] for site in self.sites]
        num = values[0].shape[0]
        for site, value, shape in zip(self.sites, values, self.config.latent_shapes):
            if tuple(value.shape) != (num, *shape):
                raise ValueError(
                    f"latents[{site!r}] has shape {tuple(value.shape)}; expected {(num, *shape)}"
                )
        return values

    def _image(self, x: Tensor) -> Tensor:
        """What the likelihood sees of ``x``."""
        channels, height, width = self.config.image_shape
        size = self.config.input_size
        accepted = {(channels, height, width), (channels, size, size)}
        if x.dim() != 4 or tuple(x.shape[1:]) not in accepted:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; images of {self.config.dataset!r} have shape "
                f"{' or '.join(str(('N', *shape)) for shape in sorted(accepted))}"
            )
        return x if x.shape[-1] == width else likelihoods.crop(self.config, x)

    def _register(self) -> None:
        # Two networks under one name would silently share weights in Pyro's global store, hence the id, which stays
        # taken as long as the store holds the parameter. It is costly, and nothing needs it in eval mode.
        if self.training:
            pyro.module(f"nvae_{id(self.prior_ftr0):x}", self)

    def _stamp(self) -> object:
        """Changes with anything that could make the features of a path stale."""
        if torch.is_inference_mode_enabled():
            return object()  # no version counters there: equal to no other stamp
        tensors = [*self.parameters(), *self.buffers()]
        return (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(self.prior_ftr0.device.type),
            [module.training for module in self.modules()],
            [(id(t), t.device, t.dtype, t.requires_grad, t._version) for t in tensors],
        )
