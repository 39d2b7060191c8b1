r"""Controls: what a defence must beat before its chain deserves the credit.

Each stands behind the interface of the defences and costs no gradient. They draw from the guide at
images that went through a fixed filter f,

.. math:: z_k \sim q(z \mid f(x)), \qquad k = 1, \dots, K,

with f the identity (*many encoder samples*: does averaging alone help? One sample is *no defence*),
a clip of pixels that a perturbation of radius :math:`\delta` could have lit up (*dark-pixel
clipping*: the attacks of the paper live in the black background, where this undoes them), or a
*median* or *Gaussian* filter.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vae_defence.defence.base import BaseDefence
from pyro_vae_defence.defence.result import Chains, DefenceResult, setting
from pyro_vae_defence.models.program import check_images, encode, evaluation_mode, potential
from pyro_vae_defence.ops.boundary import uncast
from pyro_vae_defence.ops.checks import check_integer, check_positive, check_within
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import VAE, Perturb

_HOW = "preprocess=functools.partial(clip_dark_pixels, delta=0.1)"


def _needed(function: Callable[..., Any]) -> list[str]:
    """Arguments that a function needs beside its first; none where that is not known."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variable]


@dataclass(eq=False, repr=False)
class EncoderDefence(BaseDefence):
    """Draws from the guide at filtered images: no chain, no gradient.

    Args:
        num_samples: draws per image, >= 1; the last one is decoded.
        preprocess: filter of images, e.g. ``functools.partial(clip_dark_pixels, delta=0.1)``; none
            by default.
        batch_size: most images at a time; results do not depend on it, unless the guide has latents
            of families unknown to :mod:`pyro_vae_defence.ops.draws`, such as ``VonMises``, which
            come from torch's global seed.

    A result's ``initial`` is the undefended encoding: the first draw's, with the same noise, at the
    image before the filter.

    Raises:
        ValueError: if an argument is out of range, or images, filtered or not, are not in [0, 1].

    Example:
        >>> import functools
        >>> from pyro_vae_defence.models import ConvVAE
        >>> control = EncoderDefence(ConvVAE(), 5, functools.partial(clip_dark_pixels, delta=0.1))
        >>> control(torch.rand(2, 1, 28, 28)).samples["z"].shape
        torch.Size([1, 5, 2, 64])
    """

    num_samples: int = 20
    preprocess: Perturb | None = None

    def _check(self) -> None:
        super()._check()
        if callable(self.num_samples):
            raise ValueError(
                "num_samples must be an integer of at least 1, got a function; pass a filter by "
                f"name, EncoderDefence(vae, {_HOW})"
            )
        check_integer("num_samples", self.num_samples)
        if not (self.preprocess is None or callable(self.preprocess)):
            raise ValueError(
                f"preprocess must map images to images, such as median_filter, got "
                f"{self.preprocess!r}"
            )
        if self.preprocess is not None and (needed := _needed(self.preprocess)):
            raise ValueError(
                f"preprocess is called with images alone, but needs {', '.join(needed)} too; bind "
                f"the rest beforehand, such as {_HOW}"
            )

    def _filter(self, x: Tensor) -> Tensor:
        if self.preprocess is None:
            return x
        filtered = self.preprocess(x.clone())  # which it may change
        if filtered.shape != x.shape:
            raise ValueError(
                f"preprocess must keep the shape of images, {tuple(x.shape)} became "
                f"{tuple(filtered.shape)}"
            )
        return check_images(filtered, "preprocess(x)")

    def _defend(
        self,
        vae: VAE,
        x: Tensor,
        seed: int,
        first_image: int,
        generator: torch.Generator | None,
    ) -> DefenceResult:
        result = super()._defend(vae, x, seed, first_image, generator)
        if self.preprocess is None:
            return result
        streams = Streams.create(len(x), seed=seed, first_image=first_image, device=x.device)
        with torch.no_grad(), evaluation_mode(vae):
            undefended = encode(vae, x, streams=streams)
        return replace(result, initial={name: value[None] for name, value in undefended.items()})

    @torch.no_grad()
    def _run(self, vae: VAE, x: Tensor, streams: Streams) -> Chains:
        # A draw is a chain of its own, of one state.
        chains = [torch.full_like(streams.chain, number) for number in range(self.num_samples)]
        draws = [encode(vae, x, streams=streams._replace(chain=chain)) for chain in chains]
        energy = potential(vae, x)
        energy.check(energy.unconstrain(draws[0]))  # guide and model have the same latents
        samples = {name: torch.stack([draw[name] for draw in draws])[None] for name in draws[0]}
        initial = {name: value[:, 0] for name, value in samples.items()}
        return Chains(initial, samples, {}, torch.zeros_like(streams.image))

    def _settings(self) -> dict[str, Any]:
        preprocess = "none" if self.preprocess is None else setting(self.preprocess)
        return {"defence": "encoder", "num_samples": self.num_samples, "preprocess": preprocess}


@dataclass(eq=False, repr=False)
class NoDefence(EncoderDefence):
    """The undefended VAE: one draw from the guide, decoded."""

    num_samples: int = field(default=1, init=False)
    preprocess: Perturb | None = field(default=None, init=False)

    def _settings(self) -> dict[str, Any]:
        return {"defence": "none"}


def clip_dark_pixels(x: Tensor, delta: float) -> Tensor:
    """Set to 0 every value that a perturbation of at most ``delta`` could have made out of 0.

    Args:
        x: images ``(N, C, H, W)`` in [0, 1].
        delta: largest value to clip, in [0, 1].

    Raises:
        ValueError: for a single image, integers, or ``delta`` out of range.
    """
    check_images(x, unit_interval=False, half=True)
    check_within("delta", delta, "[0, 1]", "it is in units of the range of images")
    return torch.where(x <= delta, 0.0, x)


def clip_extreme_pixels(x: Tensor, delta: float) -> Tensor:
    """:func:`clip_dark_pixels`, and the same for bright ones: x -> 1 where x >= 1 - delta.

    The stronger control where a background is white instead of black; dark wins above 1/2.
    """
    dark = clip_dark_pixels(x, delta)
    return torch.where((x >= 1 - delta) & (x > delta), 1.0, dark)


def median_filter(x: Tensor, size: int = 3) -> Tensor:
    """Median of the window of ``size`` x ``size`` pixels around each pixel; borders are replicated.

    Args:
        x: images ``(N, C, H, W)``.
        size: side of the window, odd.

    Raises:
        ValueError: for a single image, integers, or ``size`` even or not positive.
    """
    check_images(x, unit_interval=False, half=True)
    check_integer("size", size)
    if size % 2 == 0:
        raise ValueError(f"size must be an odd integer of at least 1, got {size!r}")
    size = int(size)
    margin = size // 2
    padded = F.pad(x, (margin,) * 4, mode="replicate")
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    return windows.flatten(-2).median(-1).values


@uncast
def gaussian_filter(x: Tensor, sigma: float = 1.0) -> Tensor:
    """Convolution with a Gaussian, cut off at three standard deviations; borders are replicated.

    Args:
        x: images ``(N, C, H, W)``.
        sigma: standard deviation in pixels, > 0.

    Raises:
        ValueError: for a single image, integers, or ``sigma`` not positive.
    """
    check_images(x, unit_interval=False, half=True)
    check_positive("sigma", sigma)
    margin = math.ceil(3 * sigma)
    offset = torch.arange(-margin, margin + 1, device=x.device, dtype=x.dtype)
    window = torch.exp(-0.5 * (offset / sigma) ** 2)
    window = window / window.sum()
    padded = F.pad(x, (margin,) * 4, mode="replicate")
    rows = padded.unfold(2, len(window), 1) @ window
    # Weights that sum to 1 up to rounding may leave the range of images by as much.
    return (rows.unfold(3, len(window), 1) @ window).clamp(0.0, 1.0)
