"""Distributions of an image given the network's output.

Images ``x`` lie in [0, 1]; colour likelihoods work on ``y = 2x - 1``. All have event shape
``(C, H, W)`` and one log-probability per image, in nats.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from pyro_vae_defence.models.nvae.config import NVAEConfig
from pyro_vae_defence.models.nvae.gaussian import gaussian
from pyro_vae_defence.models.nvae.levels import (
    LOWER_EDGE,
    UPPER_EDGE,
    Choices,
    Components,
    log_inside,
    most_likely,
)
from pyro_vae_defence.models.perturbation import most_likely_image
from pyro_vae_defence.ops.balls import Ball, Linf, next_towards

# Parameters of the mixture of logistics (NVAE's official values).
MIN_LOG_SCALE = -7.0
UNIFORM_MARGIN = 1e-5


def image_likelihood(config: NVAEConfig, logits: Tensor) -> TorchDistribution:
    """Distribution of the image, batch shape ``(N,)``, event shape ``config.image_shape``.

    ``logits`` are the output of the network, ``(N, config.output_channels, S, S)``.
    """
    if config.is_grey:
        return dist.Bernoulli(logits=crop(config, logits), validate_args=False).to_event(3)
    if config.num_mixture_dec == 1:
        return GaussianImage(logits).to_event(3)
    return DiscretisedLogisticMixture(logits, num_bits=config.num_x_bits, validate_args=False)


def crop(config: NVAEConfig, images: Tensor) -> Tensor:
    """The part of the network's square that is image: 28x28 of 32x32 for grey images."""
    margin = (config.input_size - config.image_shape[-1]) // 2
    inside = slice(margin, config.input_size - margin)
    return images[..., inside, inside]


def pad(config: NVAEConfig, images: Tensor) -> Tensor:
    """Images with the zero border that :func:`crop` takes off."""
    margin = (config.input_size - config.image_shape[-1]) // 2
    return F.pad(images, (margin,) * 4) if margin else images


def quantise(images: Tensor, num_bits: int) -> Tensor:
    """Images in [0, 1] of 256 levels reduced to ``2 ** num_bits`` levels, in [0, 1].

    Models with ``num_x_bits`` below 8 are trained on such images, and see no others: their programs
    call this. Images that have those levels stay as they are, and all do with 8 bits. The
    derivative is that of the identity (straight-through), so that attacks have one to follow.
    """
    if num_bits not in range(1, 9):
        raise ValueError(f"num_bits={num_bits!r} must be one of 1..8")
    if num_bits == 8:
        return images
    levels = torch.floor(images.detach() * 255 / 2 ** (8 - num_bits)) / (2**num_bits - 1)
    return levels + (images - images.detach())


class GaussianImage(dist.Normal):
    """Gaussian on ``y = 2x - 1`` seen as a distribution of ``x``; parameters ``(N, 6, H, W)``.

    ``loc`` and ``scale`` are those of ``x``. The log-density is with respect to ``y``, as published
    figures are; with respect to ``x`` it is larger by ``log 2`` per channel and pixel.
    """

    def __init__(self, logits: Tensor) -> None:
        y = gaussian(logits)
        super().__init__((y.loc + 1) / 2, y.scale / 2, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Elementwise log-density of ``2 value - 1``, ``(N, 3, H, W)``."""
        return super().log_prob(value) - math.log(2)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GaussianImage:
        """The same distribution on a larger batch."""
        new = self._get_checked_instance(GaussianImage, _instance)
        return super().expand(batch_shape, _instance=new)


class DiscretisedLogisticMixture(TorchDistribution):
    r"""Mixture of logistics over the levels of three colour channels (DMOL).

    A pixel picks one of ``M`` components; within it, each channel is a logistic integrated over the
    width of one level, and its mean depends linearly on the channels before it (red, green, blue).

    Args:
        logits: ``(N, 10 M, H, W)``: M mixture logits, then per colour M means, M log-scales and M
            coefficients before their tanh. The coefficients of red, green, blue slots are those of
            green on red, blue on red, blue on green.
        num_bits: bits per channel; images have ``2 ** num_bits`` equally spaced levels in [0, 1].
            With fewer than 8, an image's probability is that of the levels it falls in
            (:func:`quantise`).
        validate_args: whether :meth:`log_prob` checks that images lie in [0, 1].
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.unit_interval, 3)
    has_rsample = False

    def __init__(
        self, logits: Tensor, num_bits: int = 8, validate_args: bool | None = None
    ) -> None:
        if logits.dim() < 3 or logits.shape[-3] % 10 or not logits.shape[-3]:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} do not have 10 channels per component"
            )
        num_components = logits.shape[-3] // 10
        self.logits, self.num_bits = logits, num_bits
        self.mixture_logits = logits[..., :num_components, :, :]
        per_colour = logits[..., num_components:, :, :].unflatten(-3, (3, 3, num_components))
        # Each of shape (N, 3 colours, M, H, W).
        self.loc = per_colour[..., 0, :, :, :]
        self.log_scale = per_colour[..., 1, :, :, :].clamp(min=MIN_LOG_SCALE)
        self.coefficients = per_colour[..., 2, :, :, :].tanh()
        event_shape = torch.Size((3, *logits.shape[-2:]))
        super().__init__(logits.shape[:-3], event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretisedLogisticMixture:
        """The same distribution on a larger batch."""
        logits = self.logits.expand(tuple(batch_shape) + self.logits.shape[-3:])
        return DiscretisedLogisticMixture(logits, self.num_bits, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of images ``(N, 3, H, W)`` in [0, 1]: ``(N,)``, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        return self.log_prob_map(value).sum(dim=(-2, -1))

    def log_prob_map(self, value: Tensor) -> Tensor:
        """Log-probability of every pixel, ``(N, H, W)``."""
        y = (2 * quantise(value, self.num_bits) - 1).unsqueeze(-3)
        red, green, _ = y.unbind(-4)
        on_red, blue_on_red, blue_on_green = self.coefficients.unbind(-4)
        for_green = on_red * red
        for_blue = blue_on_red * red + blue_on_green * green
        from_others = torch.stack([torch.zeros_like(for_green), for_green, for_blue], dim=-4)
        half_width = 1 / (2**self.num_bits - 1)
        distance = y - (self.loc + from_others)
        inside, upper, lower = log_inside(distance, self.log_scale, half_width)
        # The outermost levels own the tails.
        not_lowest = torch.where(y > UPPER_EDGE, -F.softplus(lower), inside)
        log_mass = torch.where(y < LOWER_EDGE, upper - F.softplus(upper), not_lowest)
        log_weights = self.mixture_logits.log_softmax(dim=-3)
        return (log_mass.sum(dim=-4) + log_weights).logsumexp(dim=-3)

    @property
    def mean(self) -> Tensor:
        """The official "mean image", ``(N, 3, H, W)``: averaged parameters, colours in turn."""
        weights = self.mixture_logits.softmax(dim=-3).unsqueeze(-4)
        loc = (weights * self.loc).sum(dim=-3)
        coefficients = (weights * self.coefficients).sum(dim=-3)
        return self._recursion(loc, coefficients)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Images in [0, 1] (not rounded to levels), ``(*sample_shape, N, 3, H, W)``."""
        shape = torch.Size(sample_shape) + self._batch_shape
        mixture_shape = shape + self.mixture_logits.shape[-3:]

        def uniform(size: torch.Size) -> Tensor:
            return self.logits.new_empty(size).uniform_(UNIFORM_MARGIN, 1 - UNIFORM_MARGIN)

        with torch.no_grad():
            return self.draw(uniform(mixture_shape), uniform(shape + self._event_shape))

    def draw(
        self, uniform_mixture: Tensor, uniform_logistic: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Images from given uniforms in (0, 1).

        Args:
            uniform_mixture: ``(*, M, H, W)``, chooses the component (Gumbel trick).
            uniform_logistic: ``(*, 3, H, W)``, the noise of the colours.
            temperature: divides the mixture logits and, as in the official program, the scales.
        """
        score = self.mixture_logits / temperature - (-uniform_mixture.log()).log()
        choice = score.argmax(dim=-3, keepdim=True).unsqueeze(-4)

        def chosen(parameter: Tensor) -> Tensor:
            shape = choice.shape[:-4] + parameter.shape[-4:]
            index = choice.expand((*choice.shape[:-4], 3, *choice.shape[-3:]))
            return parameter.expand(shape).gather(-3, index).squeeze(-3)

        logistic = uniform_logistic.log() - (1 - uniform_logistic).log()
        y = chosen(self.loc) + chosen(self.log_scale).exp() / temperature * logistic
        return self._recursion(y, chosen(self.coefficients))

    @staticmethod
    def _recursion(y: Tensor, coefficients: Tensor) -> Tensor:
        on_red, blue_on_red, blue_on_green = coefficients.unbind(-3)
        red, green, blue = y.unbind(-3)
        red = red.clamp(-1, 1)
        green = (green + on_red * red).clamp(-1, 1)
        blue = (blue + blue_on_red * red + blue_on_green * green).clamp(-1, 1)
        return torch.stack([red, green, blue], dim=-3) / 2 + 0.5


# --- The most likely image within a ball ----------------------------------------------------------


@most_likely_image.register
def _(likelihood: DiscretisedLogisticMixture, x: Tensor, ball: Ball) -> Tensor:
    """The most likely levels of each pixel in an L_inf ball.

    They are exact up to 1e-4 nats a pixel in float64, and about 0.01 nats per channel in float32,
    in which the log-probability is no more exact.

    ``log_prob_map`` is maximised per pixel over the levels within reach of the observed values, and
    over these themselves, which need not be on the grid, by the branch and bound of
    :mod:`pyro_vae_defence.models.nvae.levels`. Of continuous values between two levels, which no
    image of 8 bits has, only the observed ones are tried.

    With fewer than 8 bits every value in reach falls into a level, and all that can be reached are
    tried: the result is a value that falls into the best.
    """
    if not isinstance(ball, Linf):
        raise ValueError(
            "perturbation must be an Linf ball for a DiscretisedLogisticMixture likelihood, got "
            f"{ball!r}"
        )
    if x.is_meta:
        return x

    def pixels(values: Tensor) -> Tensor:
        """``(*, C, H, W)`` -> ``(*HW, C)``."""
        return values.movedim(-3, -1).reshape(-1, values.shape[-3])

    batch = broadcast_shape(x.shape[:-3], likelihood.batch_shape)
    x = x.detach().expand(*batch, *x.shape[-3:])
    of_pixels = pixels(likelihood.expand(batch).logits.detach())[:, :, None, None]
    rows = DiscretisedLogisticMixture(of_pixels, likelihood.num_bits, validate_args=False)
    components = Components.of(
        rows.mixture_logits.log_softmax(1).flatten(1),
        rows.loc.flatten(2),
        rows.log_scale.flatten(2),
        rows.coefficients.flatten(2),
        1 / (2**likelihood.num_bits - 1),
    )
    reach = _Reach(pixels(x), ball.radius, likelihood.num_bits)
    choices = reach.choices()
    found = most_likely(components, choices)
    best = torch.where(found == choices.own, reach.x, reach.images(choices.level(found)))
    return best.reshape(*batch, *x.shape[-2:], 3).movedim(-1, -3)


class _Reach(NamedTuple):
    """What values of a channel may be changed to."""

    x: Tensor
    radius: float
    num_bits: int

    def choices(self) -> Choices:
        """The levels in reach."""
        last, bits = 2**self.num_bits - 1, self.num_bits
        down, up = ((self.x + change).clamp(0, 1) for change in (-self.radius, self.radius))
        observed = quantise(self.x, bits)
        if bits == 8:
            slack = 1e-3  # for rounding, which is looked at below
            lowest, highest = (down * last - slack).ceil(), (up * last + slack).floor()
            below = (self.x * last).floor()
        else:
            ends = (down, up, observed)
            lowest, highest, below = ((quantise(end, bits) * last).round() for end in ends)
        lowest, highest = lowest + self._misses(lowest), highest - 1.0 * self._misses(highest)
        # No level is in reach, and each end may have stepped over it: the observed value alone.
        none = highest < lowest
        lowest, highest = torch.where(none, below + 1, lowest), torch.where(none, below, highest)
        return Choices(lowest, highest, below, observed, last)

    def images(self, level: Tensor) -> Tensor:
        """A value in reach of each level: with 8 bits its own, else one that falls into it."""
        if self.num_bits == 8:
            return level / 255
        middle = ((level + 0.5) * 2 ** (8 - self.num_bits) / 255).clamp(max=1)
        value = torch.minimum(torch.maximum(middle, self.x - self.radius), self.x + self.radius)
        outside = (value - self.x).abs() > self.radius  # by rounding
        return torch.where(outside, next_towards(value, self.x), value)

    def _misses(self, level: Tensor) -> Tensor:
        value = self.images(level)
        fallen = quantise(value, self.num_bits) * (2**self.num_bits - 1)
        return (fallen.round() != level) | ((value - self.x).abs() > self.radius)
