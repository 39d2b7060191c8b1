"""What a loader yields, as programs take it: images and their conditions, checked and moved."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence.models import conditions, program
from pyro_vae_defence.models.contract import as_networks
from pyro_vae_defence.models.modules import networks_of
from pyro_vae_defence.ops.boundary import Pause, fetched, ordinary
from pyro_vae_defence.training.config import NonFiniteImagesError
from pyro_vae_defence.types import VAE


class Reader:
    """Reads loaders for a VAE.

    Args:
        vae: whose programs are called with the batches.
        warn: whether to say, once, that a loader has entries which the programs do not take.
        device: where batches go; to the VAE's first parameter when ``None``.

    Attributes:
        pause: of the public call that makes the reader, while it waits for a batch.
    """

    def __init__(self, vae: VAE, warn: bool = False, device: torch.device | None = None) -> None:
        self.vae, self.warn, self.device = vae, warn, device
        self.pause = Pause()

    def read(self, loader: Iterable[Any], name: str) -> Iterator[tuple[Tensor, ...]]:
        """Batches ``(x, *conditions)``, checked and moved.

        Args:
            loader: batches of images, or tuples that start with one.
            name: the argument's name in messages.

        Raises:
            ValueError: for images or conditions that programs cannot take: all of it at the first
                batch, what is not finite at any.
        """
        device = self.device
        if device is None:
            networks = networks_of(self.vae).values()
            parameters = (parameter for network in networks for parameter in network.parameters())
            first = next(parameters, None)
            device = None if first is None else first.device
        widths: dict[Any, int] = {}
        for number, batch in enumerate(fetched(loader, self.pause)):
            batch = ordinary(batch)
            entries = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            given = tuple(entry is not None for entry in entries)
            if given not in widths:
                widths[given] = len(conditions.taken(entries, self.vae))
            moved = (
                entry if device is None or not hasattr(entry, "to") else entry.to(device)
                for entry in entries[: widths[given]]
            )
            # A gradient of theirs would be left in the caller's images.
            moved = (entry.detach() if isinstance(entry, Tensor) else entry for entry in moved)
            where = f"{name}'s first batch" if number == 0 else f"{name}'s batch {number + 1}"
            x, others = conditions.split(tuple(moved), where)
            program.check_images(x, where, unit_interval=False, half=True)
            _check_finite(x, where)
            if number == 0:
                program.check_images(x, where, half=True)
                self._say_ignored(sum(given[widths[given] :]), name)
            yield (as_networks(self.vae, x), *others)

    def _say_ignored(self, count: int, name: str) -> None:
        if count and self.warn:
            self.warn = False
            warnings.warn(
                f"{name} yields {count} more {'entry' if count == 1 else 'entries'} beside the "
                "images, which model and guide do not take by position: ignored. Programs of a "
                "conditional VAE take them right after the images, model(self, x, y) or "
                "model(self, x, y=None); for any other give a loader of images alone, e.g. "
                "data.batches(..., labels=False)",
                UserWarning,
                stacklevel=2,
            )


def _check_finite(x: Tensor, where: str) -> None:
    # One pass; half precision would overflow in its own dtype.
    if x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite():
        return
    rows = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if rows:
        raise NonFiniteImagesError(
            f"{where} has NaN or infinite values in the images at rows {rows}; repair these images "
            "or leave them out"
        )
