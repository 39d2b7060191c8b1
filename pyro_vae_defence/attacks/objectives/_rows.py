"""What all objectives share: rows that belong to images, and noise that belongs to rows.

An attack folds restarts into the batch, cuts the batch into micro-batches and drops the rows it has
solved. What an objective knows per image (targets, labels) therefore has to follow the rows, and
the noise of a random encoder has to be a row's own: both go by the row's random stream, whose
``image`` numbers the references in the order in which the attack was given them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from pyro_vae_defence.models.program import (
    check_guide,
    check_images,
    check_vae,
    decode,
    encode,
    evaluation_mode,
    posterior_mean,
)
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import VAE, Latents, Objective, PreparedObjective

LatentsOf = Literal["sample", "mean"]
T = TypeVar("T")


def prepare(prepared: Callable[..., Any], x_ref: Tensor, streams: Streams) -> Any:
    """``prepared(x_ref, streams=streams)``, or ``prepared(x_ref)`` where it takes no streams."""
    if "streams" in inspect.signature(prepared).parameters:
        return prepared(x_ref, streams=streams)
    return prepared(x_ref)


def own_streams(x_ref: Tensor, streams: Streams | None) -> Streams:
    """The rows' streams; when ``None``, new ones with a seed from torch's global one."""
    if streams is None:
        return Streams.create(x_ref.shape[0], device=x_ref.device)
    return streams


def draws(streams: Streams, num_draws: int) -> list[Streams]:
    """Independent streams for draws of the same rows; the first is ``streams`` itself."""
    return [streams._replace(seed=(streams.seed + i) % 2**64) for i in range(num_draws)]


def of_rows(value: Tensor, streams: Streams, name: str) -> Tensor:
    """The entry of ``value`` that belongs to each row's image.

    Args:
        value: one entry per reference image of the attack, or a single one for all.
        streams: streams of the rows.
        name: the argument's name in messages.
    """
    if value.shape[0] == 1:
        return value.expand(streams.image.shape[0], *value.shape[1:])
    if value.device.type != "meta" and int(streams.image.max()) >= value.shape[0]:
        raise ValueError(
            f"{name} has {value.shape[0]} entries, but the attack has at least "
            f"{int(streams.image.max()) + 1} images; give one entry per image, or a single one"
        )
    return value[streams.image]


def encode_rows(vae: VAE, x: Tensor, of: LatentsOf, streams: Streams | None = None) -> Latents:
    """A draw from the guide with the rows' own noise, or its means."""
    return encode(vae, x, streams=streams) if of == "sample" else posterior_mean(vae, x)


def reconstruct(vae: VAE, x: Tensor, of: LatentsOf, streams: Streams) -> Tensor:
    """Mean image of the decoder at :func:`encode_rows`, ``(N, C, H, W)``."""
    return decode(vae, encode_rows(vae, x, of, streams), tuple(x.shape[1:]))


def average(values: list[Tensor]) -> Tensor:
    """Mean over draws of values per image."""
    return torch.stack(values).mean(0)


def between(
    vae: VAE,
    read: Callable[[Tensor, Streams], T],
    distance: Callable[[T, T], Tensor],
    x_target: Tensor | None,
    num_draws: int,
) -> PreparedObjective:
    """Distance of what is read of an image from what is read of its reference, to be made large; or
    minus that from what is read of its target.

    Args:
        vae: any Pyro VAE.
        read: images and the noise of one draw to what is compared.
        distance: of two readings, ``(N,)``.
        x_target: target images ``(N, C, H, W)``, one per reference or a single one.
        num_draws: noise draws averaged over, the same for both images.
    """
    check_vae(vae)
    check_integer("num_draws", num_draws)
    if x_target is not None:
        check_images(x_target, "x_target")
    sign = 1.0 if x_target is None else -1.0

    def prepare(x_ref: Tensor, streams: Streams | None = None) -> Objective:
        streams = own_streams(x_ref, streams)
        noises = draws(streams, num_draws)
        other = x_ref if x_target is None else of_rows(x_target, streams, "x_target")

        def at(x: Tensor) -> list[T]:
            with evaluation_mode(vae):
                return [read(x, noise) for noise in noises]

        with torch.no_grad():
            check_guide(vae, x_ref, streams=streams)
            fixed = at(other)

        def objective(x: Tensor) -> Tensor:
            return sign * average([distance(p, q) for p, q in zip(at(x), fixed, strict=True)])

        return objective

    return prepare


def check_latents(of: str) -> None:
    """Raise a ``ValueError`` unless ``of`` names what is decoded or classified."""
    if of not in ("sample", "mean"):
        raise ValueError(f"latents must be 'sample' or 'mean', got {of!r}")
