"""Distributions of an image given the network's output.

Images ``x`` lie in [0, 1]; colour likelihoods work on ``y = 2x - 1``. All have event shape
``(C, H, W)`` and one log-probability per image, in nats.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from pyro_vae_defence.models.nvae.config import NVAEConfig
from pyro_vae_defence.models.nvae.gaussian import gaussian
from pyro_vae_defence.models.perturbation import most_likely_image
from pyro_vae_defence.ops.balls import Ball, Linf

# Parameters and branch points of the mixture of logistics (Salimans et al., PixelCNN++, 2017;
# NVAE's official values).
MIN_LOG_SCALE = -7.0
LOWER_EDGE, UPPER_EDGE = -0.999, 0.99
MIN_DELTA = 1e-5
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

    Models with ``num_x_bits`` below 8 are trained on such images.
    """
    if num_bits not in range(1, 9):
        raise ValueError(f"num_bits={num_bits!r} must be one of 1..8")
    if num_bits == 8:
        return images
    return torch.floor(images * 255 / 2 ** (8 - num_bits)) / (2**num_bits - 1)


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
        y = (2 * value - 1).unsqueeze(-3)
        red, green, _ = y.unbind(-4)
        on_red, blue_on_red, blue_on_green = self.coefficients.unbind(-4)
        for_green = on_red * red
        for_blue = blue_on_red * red + blue_on_green * green
        from_others = torch.stack([torch.zeros_like(for_green), for_green, for_blue], dim=-4)
        half_width = 1 / (2**self.num_bits - 1)
        distance = y - (self.loc + from_others)
        inverse_scale = (-self.log_scale).exp()
        upper = inverse_scale * (distance + half_width)
        lower = inverse_scale * (distance - half_width)
        middle = inverse_scale * distance
        delta = upper.sigmoid() - lower.sigmoid()
        # Where the level's mass underflows, the density at its centre times its width.
        log_density = middle - self.log_scale - 2 * F.softplus(middle)
        inside = torch.where(
            delta > MIN_DELTA, delta.clamp(min=1e-10).log(), log_density + math.log(2 * half_width)
        )
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
    """Search of the most likely grid levels of each pixel in an L_inf ball.

    ``log_prob_map`` is maximised per pixel over the grid levels within the radius of the observed
    values, and over these themselves, which need not be on the grid. The mixture and the means of
    green and blue couple the three channels, and all triples are too many. So: the best of the
    observed pixel and, for every component, the levels in reach closest to its means in turn; then
    steps of single channels by .., 4, 2, 1 levels up and down, each kept where the likelihood
    rises: some 50 evaluations at a radius of .1 and 8 bits. The result is the optimum of most
    pixels but not proved to be: with random logits all triples do better in one pixel of twenty
    (the tests compare), by a nat or two; the ball gains hundreds.
    """
    if not isinstance(ball, Linf):
        raise ValueError(
            "perturbation must be an Linf ball for a DiscretisedLogisticMixture likelihood, got "
            f"{ball!r}"
        )
    last = 2**likelihood.num_bits - 1

    def in_reach(level: Tensor, otherwise: Tensor) -> Tensor:
        value = level.clamp(0, last) / last
        return torch.where((value - x).abs() <= ball.radius, value, otherwise)

    best, best_log_prob = x, likelihood.log_prob_map(x)

    def consider(candidate: Tensor) -> None:
        nonlocal best, best_log_prob
        log_prob = likelihood.log_prob_map(candidate)
        better = log_prob > best_log_prob
        best = torch.where(better.unsqueeze(-3), candidate, best)
        best_log_prob = torch.where(better, log_prob, best_log_prob)

    lowest = torch.ceil((x - ball.radius).clamp(min=0) * last)
    highest = torch.floor((x + ball.radius).clamp(max=1) * last)
    for component in range(likelihood.mixture_logits.shape[-3]):
        coefficients = likelihood.coefficients.select(-3, component)
        on_red, blue_on_red, blue_on_green = coefficients.unbind(-3)
        red_loc, green_loc, blue_loc = likelihood.loc.select(-3, component).unbind(-3)

        def closest(y: Tensor, channel: int) -> Tensor:
            level = torch.round((y + 1) / 2 * last)
            return level.clamp(lowest.select(-3, channel), highest.select(-3, channel))

        red = closest(red_loc, 0)
        red_y = 2 * red / last - 1
        green = closest(green_loc + on_red * red_y, 1)
        green_y = 2 * green / last - 1
        blue = closest(blue_loc + blue_on_red * red_y + blue_on_green * green_y, 2)
        consider(in_reach(torch.stack([red, green, blue], -3), x))
    # One row per channel, to change that channel alone.
    channels = torch.eye(3, dtype=x.dtype, device=x.device)[:, :, None, None]
    # The first step reaches both ends from anywhere: the outermost levels own the tails of the
    # components.
    widest = min(last, math.ceil(2 * ball.radius * last))
    for power in reversed(range(widest.bit_length() + 1)):
        for channel in channels:
            for change in (2**power * channel, -(2**power) * channel):
                level = torch.round(best * last) + change
                consider(in_reach(level.clamp(lowest, highest), best))
    return best
