"""What every defence does alike: it divides images into micro-batches, decodes, and joins."""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate

from pyro_vae_defence.defence import store
from pyro_vae_defence.defence.result import Chains, DefenceResult
from pyro_vae_defence.models import program
from pyro_vae_defence.models.conditions import kept, rows_of, split, take, taken
from pyro_vae_defence.models.modules import modules_of
from pyro_vae_defence.ops.boundary import drop_references, public
from pyro_vae_defence.ops.checks import (
    as_device,
    check_finite,
    check_integer,
    check_tensor,
    plain,
)
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import VAE, ImagesLike, Latents


class Defence(Protocol):
    """What a defence is to whoever uses it: images to a :class:`DefenceResult`."""

    vae: VAE

    def __call__(self, x: ImagesLike, generator: torch.Generator | None = None) -> DefenceResult:
        """Defend images ``(N, C, H, W)`` in [0, 1], or ``(x, *conditions)``."""


def check_defence(defence: Any, *, needs_vae: bool = True) -> Defence:
    """``defence``, or a ``ValueError`` unless it can be called and, if it must, has a VAE."""
    if not hasattr(defence, "vae") and callable(getattr(defence, "guide", None)):
        raise ValueError(
            f"defence is a VAE, a {type(defence).__name__}; pass NoDefence(vae) for what it does "
            "without a defence"
        )
    if not callable(defence):
        raise ValueError(f"defence must be callable, images to a DefenceResult, got {defence!r}")
    if needs_vae:
        if not hasattr(defence, "vae"):
            raise ValueError(
                f"defence must know its VAE, as NoDefence(vae) and MCMCDefence(vae) do; "
                f"{type(defence).__name__} has no attribute 'vae'"
            )
        program.check_vae(defence.vae)
    return defence


@public
def run_defence(
    defence: Defence, x: ImagesLike, generator: torch.Generator | None = None
) -> DefenceResult:
    """What ``defence`` returns, or a ``ValueError`` unless it is a result of these images.

    It is given copies, which it may change, and what it draws from torch's global generators
    follows from the ``generator``.
    """
    images, conditions = split(x)
    check_tensor("x", images)
    given = kept((images, *conditions) if conditions else images)
    if generator is None:
        found = defence(given, None)
    else:
        before = generator.get_state()
        found = defence(given, generator)
        if torch.equal(generator.get_state(), before):
            draw_seed(generator)  # or the next run would meet the same noise of torch's
    if not isinstance(found, DefenceResult):
        raise ValueError(
            f"defence must map images to a DefenceResult, it returned a {type(found).__name__}"
            "; what makes images of images can be the preprocess of an EncoderDefence"
        )
    parts = {
        "x": (found.x, 0),
        "the reconstruction": (found.reconstruction, 0),
        **{f"latents[{name!r}]": (value, 0) for name, value in found.latents.items()},
        **{f"samples[{name!r}]": (value, 2) for name, value in found.samples.items()},
    }
    for name, (value, dim) in parts.items():
        number = value.shape[dim] if value.dim() > dim else 0
        if number != len(images):
            raise ValueError(
                f"defence must return one row per image: of {len(images)} images it returned "
                f"{number} of {name}"
            )
    return found


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
        self._check()

    def _check(self) -> None:
        """``ValueError`` for settings out of range; asked again by each run, as they may have been
        replaced."""
        program.check_vae(self.vae)
        check_integer("batch_size", self.batch_size)
        for entry in fields(self):
            setattr(self, entry.name, plain(getattr(self, entry.name)))

    def __getstate__(self) -> dict[str, Any]:
        drop_references(modules_of(self.vae))
        return self.__dict__

    def encode(self, x: ImagesLike, generator: torch.Generator | None = None) -> Latents:
        """Latents of images ``(N, C, H, W)`` after the defence: site -> ``(N, *event)``."""
        return self(x, generator).latents

    @public
    def __call__(self, x: ImagesLike, generator: torch.Generator | None = None) -> DefenceResult:
        """Defend images ``(N, C, H, W)`` in [0, 1], attacked or not.

        A conditional VAE takes a tuple ``(x, *conditions)``, each with one row per image.
        ``generator`` is the source of the run's seed; torch's global seed when ``None``.
        """
        # Drawn before anything that consumes randomness in proportion to the batch.
        parts = self.parts(x, "x", draw_seed(generator), 0, generator is not None)
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
            yield from self.parts(images, "batches", seed, first, generator is not None)
            first += len(images[0])

    def to_zarr(
        self,
        dataset: Any,
        path: str | os.PathLike[str],
        *,
        generator: torch.Generator,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        observed_data: bool = False,
        progress: bool = False,
    ) -> Path:
        """Defend a dataset of any size in constant memory, and write results as they come.

        What is made is a Zarr store with groups ``posterior`` and ``sample_stats`` as
        :meth:`DefenceResult.to_datatree` has them, and ``defence``: ``reconstruction``,
        ``num_gradients`` and what is known of convergence, per image. ``xarray.open_datatree(path,
        engine="zarr")`` reads it lazily. Images are numbered by their place in the dataset, so that
        the results are those of one call on all images.

        It stands at ``PATH.partial`` until it is whole. A call that was interrupted is taken up by
        the same call; so is one by any number of processes of ``torchrun``, which share the chunks.
        The finished store is the same in all cases, bit for bit.

        Args:
            dataset: map-style: ``len(dataset)``, and ``dataset[i]`` an image ``(C, H, W)`` in
                [0, 1] or a tuple that starts with one. What the VAE's programs take of the other
                entries are conditions, the rest is ignored. It must give the same every time.
            path: of the store, a directory that is made; with several machines on a shared disk.
            generator: source of the run's seed, the same in all processes and at every call.
            chunk_size: images per chunk, which are in memory at a time; as many as make a
                micro-batch when ``None``. Multiples of these change no bit of the results, others
                round differently.
            device: where the images are moved to; they stay where they are when ``None``.
            observed_data: also write the images that the chains were conditioned on.
            progress: show a progress bar over chunks.

        Kernels that are not of this library draw from torch's global generators, which are seeded
        per chunk for them.

        Returns:
            ``path``, absolute.

        Raises:
            ValueError: if an argument is out of range, or ``path`` holds another run's results, or
                another run is writing it.
            ImportError: without Zarr, an extra of this package.
        """
        self._check()
        at_once = max(1, self.batch_size // self.num_chains)
        chunk_size = at_once if chunk_size is None else chunk_size
        check_integer("chunk_size", chunk_size)
        chunk_size = plain(chunk_size)
        device = None if device is None else as_device("device", device)
        if not isinstance(generator, torch.Generator):
            raise ValueError(
                "generator must be a torch.Generator, such as torch.Generator().manual_seed(0), so "
                f"that an interrupted call can be repeated; got {generator!r}"
            )
        store.check_zarr()
        store.check_dataset(dataset)
        seed = draw_seed(generator)

        def given(batch: Any) -> tuple[Any, ...]:
            images = taken(batch, self.vae)
            if device is None:
                return images
            return tuple(e.to(device) if isinstance(e, Tensor) else e for e in images)

        def defend(batch: Any, first: int) -> DefenceResult:
            images = given(batch)
            with _seeded(seed + first, images[0]):
                return DefenceResult.join(list(self.parts(images, "dataset", seed, first)))

        vae, x = program.at_images(self.vae, given(default_collate([dataset[0]])), "dataset")
        with _seeded(seed, x), torch.no_grad(), program.evaluation_mode(vae):
            vae.guide(x), vae.model(x)  # only then are all of their parameters there
        own = self.own_settings()
        identity = {
            "settings": self._settings(),
            "seed": seed,
            "defence_hash": store.fingerprint(type(self).__qualname__, own),
            "weights_hash": store.weights_fingerprint(self.vae),
        }
        return store.write(path, dataset, chunk_size, defend, identity, observed_data, progress)

    def parts(
        self, images: ImagesLike, name: str, seed: int, first: int, governs: bool = False
    ) -> Iterator[DefenceResult]:
        """One result per micro-batch of images, numbered from ``first``; errors say ``name``.

        ``governs`` says whether what comes from torch's global generators is to follow the seed.
        """
        self._check()
        conditions = split(images, name)[1]
        vae, x = program.at_images(self.vae, images, name)
        at_once = max(1, self.batch_size // self.num_chains)
        for start in range(0, x.shape[0], at_once):
            rows = slice(start, start + at_once)
            number = first + start
            generator = torch.Generator().manual_seed(seed + number) if governs else None
            result = self._defend(take(vae, rows), x[rows], seed, number, generator)
            yield replace(result, conditions=kept(rows_of(conditions, rows)))

    def own_settings(self) -> dict[str, Any]:
        """Its arguments by name, but for the VAE and what changes no result."""
        apart = ("vae", "batch_size", "progress")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}

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

    @public
    def _defend(
        self,
        vae: VAE,
        x: Tensor,
        seed: int,
        first_image: int,
        generator: torch.Generator | None,
    ) -> DefenceResult:
        # The generator is there for what :func:`public` does with it.
        started = time.perf_counter()
        x = kept(x)
        with program.evaluation_mode(vae):
            x = self._filter(x)
            streams = Streams.create(
                x.shape[0], self.num_chains, seed=seed, first_image=first_image, device=x.device
            )
            decode = program.Decoder(vae, x)
            decode.check()
            chains = self._run(vae, x, streams)
            # Copies: whoever keeps the latents alone does not keep all draws with them.
            latents = {name: value[0, -1].clone() for name, value in chains.samples.items()}
            with torch.no_grad():
                # A Gaussian likelihood's mean may leave the range of images.
                reconstruction = decode(latents, x).clamp(0.0, 1.0)
        check_finite(
            "the reconstruction",
            reconstruction,
            f"rows count from image {first_image}; see what guide and model return for these",
        )
        return DefenceResult(
            latents=latents,
            reconstruction=reconstruction,
            x=x,
            seconds=time.perf_counter() - started,
            observation=decode.images.name,
            settings=self._settings(),
            **chains._asdict(),
        )


def runs(
    defence: Defence, x: ImagesLike, generator: torch.Generator | None
) -> Iterator[DefenceResult]:
    """What ``defence`` returns for images, in micro-batches whose chains can be forgotten.

    All at once of a defence that is called in a way of its own.
    """
    if isinstance(defence, BaseDefence) and type(defence).__call__ is BaseDefence.__call__:
        yield from defence.parts(x, "x", draw_seed(generator), 0, generator is not None)
    else:
        yield run_defence(defence, x, generator)


@contextlib.contextmanager
def _seeded(seed: int, like: Tensor) -> Iterator[None]:
    """torch's global generators of the CPU and of a tensor's device seeded, and then as before."""
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        torch.manual_seed(seed)
        yield
