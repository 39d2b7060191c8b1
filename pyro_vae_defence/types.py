"""The few contracts everything meets through.

A *VAE* is any object with two Pyro programs, ``model(x)`` and ``guide(x)``. Both open one data
plate ``pyro.plate("data", x.shape[0])``, put every sample site inside it and share their continuous
latent sites; ``model`` observes the image. Nothing else is asked of it. Further arguments, such as
labels, come with the images: ``model(x, y)`` and ``guide(x, y)`` get those of a tuple ``(x, y)``.

Shapes: ``N`` images (or images times chains), ``C, H, W`` channels, height and width, ``D`` latent
dimensions. A value *per image* has shape ``(N,)``; callers reduce, the library does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

Latents: TypeAlias = dict[str, Tensor]
"""One value per latent site, site name -> tensor of shape ``(N, *event)``."""

LatentsLike: TypeAlias = Mapping[str, Tensor]

ImagesLike: TypeAlias = Tensor | Sequence[Any]
"""Images ``(N, C, H, W)``, or a tuple ``(x, *conditions)`` of images and arguments of the programs
with one row per image each, as a loader yields them."""

PyroProgram: TypeAlias = Callable[..., Any]
"""A model or a guide; its first argument is images ``(N, C, H, W)``."""

Objective: TypeAlias = Callable[[Tensor], Tensor]
"""What an attacker maximises, images ``(N, C, H, W)`` -> one value per image ``(N,)``."""

PreparedObjective: TypeAlias = Callable[..., Objective]
"""Reference images ``(N, C, H, W)`` -> the :data:`Objective` against these references.

It may take a second argument ``streams``, the rows' random streams (:class:`ops.streams.Streams`);
attacks pass them, so that noise and what is known per image stay with a row wherever it is
computed."""

Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Has an attack succeeded? Images ``(N, C, H, W)`` and objective ``(N,)`` -> bool ``(N,)``."""

PreparedCriterion: TypeAlias = Callable[..., Criterion]
"""Reference images, and perhaps ``streams`` -> the :data:`Criterion` against these references."""

Encode: TypeAlias = Callable[[Tensor], Latents]
"""Images ``(N, C, H, W)`` -> latents; may be random (an encoder, or an encoder and a defence)."""

ImageEnergy: TypeAlias = Callable[[Tensor, Latents], Tensor]
"""Images and latents of ``N`` rows -> energies U(z; x), ``(N,)``, differentiable in both."""

Perturb: TypeAlias = Callable[[Any], Tensor]
"""Images ``(N, C, H, W)`` -> perturbed images of the same shape."""


@runtime_checkable
class VAE(Protocol):
    """Two Pyro programs over the same latent sites; see the module's text for the contract."""

    def model(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Generative program p(x, z), observing ``x``."""

    def guide(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Inference program q(z | x)."""


class Potential(Protocol):
    """Energy of a chain per image: ``U(z) = -log p(x, z)`` in nats, up to a constant."""

    def __call__(self, latents: Latents, /) -> Tensor:
        """Latents with ``N`` rows -> energies of shape ``(N,)``."""
