"""What every defence does alike: it divides images into micro-batches, decodes, and joins."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_vae_defence.defence.result import Chains, DefenceResult
from pyro_vae_defence.models import program
from pyro_vae_defence.models.conditions import rows_of, split, take, taken
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import VAE, ImagesLike, Latents


class Defence(Protocol):
    """What a defence is to whoever uses it: images to a :class:`DefenceResult`."""

    vae: VAE

    def __call__(self, x: ImagesLike, generator: torch.Generator | None = None) -> DefenceResult:
        """Defend images ``(N, C, H, W)`` in [0, 1], or ``(x, *conditions)``."""


@dataclass(eq=False, repr=False)
class BaseDefence(ABC):
    """A defence of this package: its settings, and in ``_run`` what it does with a micro-batch.

    Args:
        vae: any Pyro VAE.
        batch_size: most images at a time, >= 1.

    Raises:
        ValueError: if an argument is out of range, or images are not in [0, 1].
    """

    vae: VAE
    batch_size: int = field(default=4096, kw_only=True)
    num_chains = 1  # per image

    def __post_init__(self) -> None:
        program.check_vae(self.vae)
        check_integer("batch_size", self.batch_size)

    def encode(self, x: ImagesLike, generator: torch.Generator | None = None) -> Latents:
        """Latents of images ``(N, C, H, W)`` after the defence: site -> ``(N, *event)``."""
        return self(x, generator).latents

    def __call__(self, x: ImagesLike, generator: torch.Generator | None = None) -> DefenceResult:
        """Defend images ``(N, C, H, W)`` in [0, 1], attacked or not.

        A conditional VAE takes a tuple ``(x, *conditions)``, each with one row per image.
        ``generator`` is the source of the run's seed; torch's global seed when ``None``.
        """
        # Drawn before anything that consumes randomness in proportion to the batch.
        parts = self._parts(x, "x", draw_seed(generator), 0)
        return DefenceResult.join(list(parts))

    def stream(
        self, batches: Iterable[Any], generator: torch.Generator | None = None
    ) -> Iterator[DefenceResult]:
        """Defend any number of images in constant memory: one result per micro-batch, in turn.

        Images are numbered through: together the results are those of one call on all images.

        Args:
            batches: iterable of images ``(N, C, H, W)`` in [0, 1], or of tuples that start with
                them, e.g. a ``DataLoader``; those above ``batch_size`` are divided. What the VAE's
                programs take of the other entries are conditions, the rest is ignored.
            generator: as for a call.
        """
        seed = draw_seed(generator)
        first = 0
        for batch in batches:
            images = taken(batch, self.vae)
            yield from self._parts(images, "batches", seed, first)
            first += len(images[0])

    def _parts(
        self, images: ImagesLike, name: str, seed: int, first: int
    ) -> Iterator[DefenceResult]:
        """One result per micro-batch of images, numbered from ``first``."""
        conditions = split(images, name)[1]
        vae, x = program.at_images(self.vae, images, name)
        at_once = max(1, self.batch_size // self.num_chains)
        for start in range(0, x.shape[0], at_once):
            rows = slice(start, start + at_once)
            result = self._defend(take(vae, rows), x[rows], seed, first + start)
            yield replace(result, conditions=rows_of(conditions, rows))

    def _filter(self, x: Tensor) -> Tensor:
        """The images that the defence looks at in place of ``x``."""
        return x

    @abstractmethod
    def _run(self, vae: VAE, x: Tensor, streams: Streams) -> Chains:
        """The chains of one micro-batch, whose ``streams`` have a row for each of them.

        ``vae`` is :attr:`vae`, with the conditions of ``x`` where it has any.
        """

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What :attr:`DefenceResult.settings` are to say."""

    def _defend(self, vae: VAE, x: Tensor, seed: int, first_image: int) -> DefenceResult:
        started = time.perf_counter()
        with program.evaluation_mode(vae):
            x = self._filter(x)
            streams = Streams.create(
                x.shape[0], self.num_chains, seed=seed, first_image=first_image, device=x.device
            )
            decode = program.Decoder(vae, x)
            decode.check()
            chains = self._run(vae, x, streams)
            latents = {name: value[0, -1] for name, value in chains.samples.items()}
            with torch.no_grad():
                # A Gaussian likelihood's mean may leave the range of images.
                reconstruction = decode(latents, x).clamp(0.0, 1.0)
        return DefenceResult(
            latents=latents,
            reconstruction=reconstruction,
            x=x,
            seconds=time.perf_counter() - started,
            observation=decode.images.name,
            settings=self._settings(),
            **chains._asdict(),
        )
