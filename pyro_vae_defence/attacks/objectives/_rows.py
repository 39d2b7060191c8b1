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

from pyro_vae_defence.models import program
from pyro_vae_defence.models.conditions import BoundVAE, bind, take
from pyro_vae_defence.models.contract import check_kept_guide, check_networks_on_device
from pyro_vae_defence.ops.boundary import uncast
from pyro_vae_defence.ops.checks import check_integer, check_on_device
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import VAE, Latents, Objective, PreparedObjective

Classifier = Callable[[Latents], Tensor] | Callable[[Tensor], Tensor]
LatentsOf = Literal["sample", "mean"]
T = TypeVar("T")


def prepare(
    prepared: Callable[..., Any],
    images: tuple[Tensor, ...],
    streams: Streams | None,
    *,
    needs_conditions: bool = True,
) -> Any:
    """``prepared(x_ref, streams=streams, conditions=conditions)`` of what it takes of these.

    Raises:
        ValueError: if there are conditions and it takes none, unless it may do without.
    """
    x_ref, *conditions = images
    parameters = inspect.signature(prepared).parameters
    further: dict[str, Any] = {"streams": streams} if "streams" in parameters else {}
    if conditions and ("conditions" in parameters or needs_conditions):
        if "conditions" not in parameters:
            raise ValueError(
                f"the objective {prepared!r} takes no conditions; attack the images alone, or let "
                "it take an argument conditions, the rows' further arguments of the programs"
            )
        further["conditions"] = tuple(conditions)
    return prepared(x_ref, **further)


def vae_of_rows(vae: VAE, x_ref: Tensor, streams: Streams, conditions: tuple[Tensor, ...]) -> VAE:
    """The VAE at the rows of an attack: with their conditions, if there are any.

    Those that the VAE has itself are of all images of the attack, and go by the rows' numbers.
    """
    if isinstance(vae, BoundVAE) and not conditions:
        return take(vae, streams.image % vae.num_images)
    return bind(vae, x_ref, conditions, streams.image)


def own_streams(x_ref: Tensor, streams: Streams | None) -> Streams:
    """The rows' streams; when ``None``, new ones with a seed from torch's global one."""
    return streams or Streams.create(x_ref.shape[0], device=x_ref.device)


def draws(streams: Streams, num_draws: int) -> list[Streams]:
    """Independent streams for draws of the same rows; the first is ``streams`` itself."""
    return [streams._replace(seed=(streams.seed + i) % 2**64) for i in range(num_draws)]


def of_rows(value: Tensor, streams: Streams, name: str) -> Tensor:
    """Each row's entry of ``value``, which has one per image of the attack, or a single one."""
    check_on_device(name, value, "x_ref", streams.image.device)
    if value.shape[0] == 1:
        return value.expand(streams.image.shape[0], *value.shape[1:])
    if value.device.type != "meta" and int(streams.image.max()) >= value.shape[0]:
        raise ValueError(
            f"{name} has {value.shape[0]} entries, but the attack has at least "
            f"{int(streams.image.max()) + 1} images; give one entry per image, or a single one"
        )
    return value[streams.image]


def with_entries(prepared: Callable[..., T], **values: Tensor | None) -> Callable[..., T]:
    """``prepared``, which says how many entries each of these has per image, if it is there."""
    entries = {name: value.shape[0] for name, value in values.items() if value is not None}
    prepared.entries = entries  # type: ignore[attr-defined]
    return prepared


def with_entries_of(inner: Callable[..., Any], prepared: Callable[..., T]) -> Callable[..., T]:
    """``prepared``, which knows per image what ``inner`` does."""
    prepared.entries = getattr(inner, "entries", {})  # type: ignore[attr-defined]
    return prepared


def check_entries(prepared: Callable[..., Any], num_images: int) -> None:
    """``ValueError`` unless what ``prepared`` knows per image is of so many images, or of one.

    Of more, those of the first images would be taken for these.
    """
    for name, number in getattr(prepared, "entries", {}).items():
        if number not in (1, num_images):
            raise ValueError(
                f"{name} has {number} entries, but the attack has {num_images} images; give one "
                "entry per image, or a single one"
            )


def encode_rows(vae: VAE, x: Tensor, of: LatentsOf, streams: Streams | None = None) -> Latents:
    """A draw from the guide with the rows' own noise, or its means."""
    if of == "sample":
        return program.encode(vae, x, streams=streams)
    return program.posterior_mean(vae, x)


def reconstruct(of: LatentsOf, vae: VAE, like: Tensor) -> Callable[[Tensor, Streams], Tensor]:
    """What reads images' reconstructions: mean images of the decoder at :func:`encode_rows`."""
    with program.evaluation_mode(vae):
        decode = program.Decoder(vae, like)
    return lambda x, streams: decode(encode_rows(vae, x, of, streams), x)


class GuideCheck:
    """Checks references, and a guide once for those of each shape: attacks prepare many times.

    Args:
        kept: whether its distributions are kept, to be compared with those at other images.
    """

    def __init__(self, *, kept: bool = False) -> None:
        self._seen: set[Any] = set()
        self._kept = kept

    def __call__(self, vae: VAE, x: Tensor, streams: Streams) -> None:
        """As :func:`~pyro_vae_defence.models.program.check_guide`."""
        program.check_images(x, "x_ref")
        kind = (x.shape[1:], x.dtype, x.device)
        if kind not in self._seen:
            check_networks_on_device("vae", vae, "x_ref", x)
            program.check_guide(vae, x, streams=streams)
            if self._kept and x.device.type != "meta":
                check_kept_guide(vae, x)
            self._seen.add(kind)


def between(
    vae: VAE,
    reader: Callable[[VAE, Tensor], Callable[[Tensor, Streams], T]],
    distance: Callable[[T, T], Tensor],
    x_target: Tensor | None,
    num_draws: int,
    *,
    kept: bool = False,
) -> PreparedObjective:
    """Distance of what is read of an image from what is read of its reference, or minus that from
    its target: averaged over draws, whose noise is the same for both images.

    ``reader`` is given the VAE at some rows, and their references, and returns what reads images:
    distributions of the guide if they are ``kept``.
    """
    program.check_vae(vae)
    check_integer("num_draws", num_draws)
    if x_target is not None:
        program.check_images(x_target, "x_target")
    sign = 1.0 if x_target is None else -1.0
    check = GuideCheck(kept=kept)

    @uncast
    def prepare(
        x_ref: Tensor, streams: Streams | None = None, conditions: tuple[Tensor, ...] = ()
    ) -> Objective:
        streams = own_streams(x_ref, streams)
        rows = vae_of_rows(vae, x_ref, streams, conditions)
        noises = draws(streams, num_draws)
        other = x_ref
        if x_target is not None:
            other = of_rows(x_target, streams, "x_target").to(x_ref.dtype)

        def at(x: Tensor) -> list[T]:
            with program.evaluation_mode(vae):
                return [read(x, noise) for noise in noises]

        check(rows, x_ref, streams)
        read = reader(rows, x_ref)
        with torch.no_grad():
            fixed = at(other)
            distance(fixed[0], fixed[0])  # families without this distance are told so here

        @uncast
        def objective(x: Tensor) -> Tensor:
            distances = [distance(p, q) for p, q in zip(at(x), fixed, strict=True)]
            return sign * torch.stack(distances).mean(0)

        return objective

    return with_entries(prepare, x_target=x_target)


def check_latents(of: str) -> None:
    """Raise a ``ValueError`` unless ``of`` names what is decoded or classified."""
    if of not in ("sample", "mean"):
        raise ValueError(f"latents must be 'sample' or 'mean', got {of!r}")
