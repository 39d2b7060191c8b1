r"""Controls: what a defence must beat before its chain deserves the credit.

Each stands behind the interface of the defences and costs no gradient. They draw from the guide at
images that went through a fixed filter f,

.. math:: z_k \sim q(z \mid f(x)), \qquad k = 1, \dots, K,

with f the identity (*many encoder samples*: does averaging alone help?), a clip of pixels that a
perturbation of radius :math:`\delta` could have lit up (*dark-pixel clipping*: the attacks of the
paper live in the black background, where this undoes them), or a *median* or *Gaussian* filter.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vae_defence.defence.mcmc import DefenceResult
from pyro_vae_defence.models.program import (
    check_images,
    check_vae,
    decode,
    encode,
    evaluation_mode,
    observation_site,
)
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import VAE, Latents, Perturb


class EncoderDefence:
    """Draws from the guide at filtered images: no chain, no gradient.

    Args:
        vae: any Pyro VAE.
        num_samples: draws per image, >= 1; the last one is decoded.
        preprocess: filter of images, e.g. ``functools.partial(clip_dark_pixels, delta=0.1)``; none
            by default.
        batch_size: most images at a time; results do not depend on it, unless the guide has latents
            that are not Gaussian, which come from torch's global seed.

    Raises:
        ValueError: if an argument is out of range, or images, filtered or not, are not in [0, 1].

    Example:
        >>> from pyro_vae_defence.models import ConvVAE
        >>> control = EncoderDefence(ConvVAE(), 5, functools.partial(clip_dark_pixels, delta=0.1))
        >>> control(torch.rand(2, 1, 28, 28)).samples["z"].shape
        torch.Size([1, 5, 2, 64])
    """

    def __init__(
        self,
        vae: VAE,
        num_samples: int = 20,
        preprocess: Perturb | None = None,
        *,
        batch_size: int = 4096,
    ) -> None:
        self.vae = check_vae(vae)
        check_integer("num_samples", num_samples)
        check_integer("batch_size", batch_size)
        if not (preprocess is None or callable(preprocess)):
            raise ValueError(
                f"preprocess must map images to images, such as median_filter, got {preprocess!r}"
            )
        self.num_samples = num_samples
        self.preprocess = preprocess
        self.batch_size = batch_size

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Latents:
        """The last draw of each image: site -> ``(N, *event)``."""
        return self(x, generator).latents

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> DefenceResult:
        """Filter, encode and decode images ``(N, C, H, W)`` in [0, 1].

        The result's ``x`` holds the filtered images.

        Args:
            x: images, attacked or not.
            generator: source of the run's seed; torch's global seed when ``None``.
        """
        check_images(x)
        started = time.perf_counter()
        filtered = x if self.preprocess is None else self.preprocess(x)
        if filtered.shape != x.shape:
            raise ValueError(
                f"preprocess must keep the shape of images, {tuple(x.shape)} became "
                f"{tuple(filtered.shape)}"
            )
        check_images(filtered, "preprocess(x)")
        seed = draw_seed(generator)
        with torch.no_grad(), evaluation_mode(self.vae):
            parts = [
                self._draw(filtered[first : first + self.batch_size], seed, first)
                for first in range(0, x.shape[0], self.batch_size)
            ]
            samples = {name: torch.cat([part[name] for part in parts], 2) for name in parts[0]}
            latents = {name: value[0, -1] for name, value in samples.items()}
            reconstruction = decode(self.vae, latents, tuple(x.shape[1:]))
            site = observation_site(self.vae.model, x)
        return DefenceResult(
            latents,
            reconstruction,
            samples,
            {},
            {name: value[:, 0] for name, value in samples.items()},
            filtered,
            torch.zeros(x.shape[0], dtype=torch.long, device=x.device),
            time.perf_counter() - started,
            site,
            {
                "defence": "encoder",
                "num_samples": self.num_samples,
                "preprocess": _describe(self.preprocess),
            },
        )

    def _draw(self, x: Tensor, seed: int, first_image: int) -> Latents:
        image = torch.arange(first_image, first_image + x.shape[0], device=x.device)
        draws = [
            encode(self.vae, x, streams=Streams(seed, image, torch.full_like(image, number)))
            for number in range(self.num_samples)
        ]
        return {name: torch.stack([draw[name] for draw in draws])[None] for name in draws[0]}


def clip_dark_pixels(x: Tensor, delta: float) -> Tensor:
    """Set to 0 every value that a perturbation of at most ``delta`` could have made out of 0: x ->
    0 where x <= delta.

    Args:
        x: images ``(N, C, H, W)`` in [0, 1]; channels are clipped one by one.
        delta: largest value to clip, in [0, 1].

    Raises:
        ValueError: if ``delta`` is out of range.
    """
    _check_delta(delta)
    return torch.where(x <= delta, 0.0, x)


def clip_extreme_pixels(x: Tensor, delta: float) -> Tensor:
    """:func:`clip_dark_pixels`, and the same for bright ones: x -> 0 where x <= delta, x -> 1 where
    x >= 1 - delta.

    The stronger control where a background is white instead of black.

    Args:
        x: images ``(N, C, H, W)`` in [0, 1].
        delta: distance from 0 and 1 up to which values are clipped, in [0, 1]; dark wins above 1/2.

    Raises:
        ValueError: if ``delta`` is out of range.
    """
    _check_delta(delta)
    return torch.where(x <= delta, 0.0, torch.where(x >= 1 - delta, 1.0, x))


def median_filter(x: Tensor, size: int = 3) -> Tensor:
    """Median of the window of ``size`` x ``size`` pixels around each pixel; borders are replicated.

    Args:
        x: images ``(N, C, H, W)``.
        size: side of the window, odd.

    Raises:
        ValueError: if ``size`` is even or not positive.
    """
    if not (isinstance(size, int) and size >= 1 and size % 2 == 1):
        raise ValueError(f"size must be an odd integer of at least 1, got {size!r}")
    margin = size // 2
    padded = F.pad(x, (margin,) * 4, mode="replicate")
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    return windows.flatten(-2).median(-1).values


def gaussian_filter(x: Tensor, sigma: float = 1.0) -> Tensor:
    """Convolution with a Gaussian that is cut off at three standard deviations; borders are
    replicated.

    Args:
        x: images ``(N, C, H, W)``.
        sigma: standard deviation in pixels, > 0.

    Raises:
        ValueError: if ``sigma`` is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, in pixels, got {sigma!r}")
    margin = math.ceil(3 * sigma)
    offset = torch.arange(-margin, margin + 1, device=x.device, dtype=x.dtype)
    window = torch.exp(-0.5 * (offset / sigma) ** 2)
    window = window / window.sum()
    padded = F.pad(x, (margin,) * 4, mode="replicate")
    rows = padded.unfold(2, len(window), 1) @ window
    # Weights that sum to 1 up to rounding may leave the range of images by as much.
    return (rows.unfold(3, len(window), 1) @ window).clamp(0.0, 1.0)


def _check_delta(delta: float) -> None:
    if not 0 <= delta <= 1:
        raise ValueError(f"delta must lie in [0, 1], the range of images, got {delta!r}")


def _describe(preprocess: Callable[..., Any] | None) -> str:
    if isinstance(preprocess, functools.partial):
        options = ", ".join(f"{name}={value}" for name, value in preprocess.keywords.items())
        return f"{_describe(preprocess.func)}({options})"
    return "none" if preprocess is None else getattr(preprocess, "__name__", repr(preprocess))
