"""Work that the processes of ``torchrun`` share item by item, each item done by one of them.

The processes need not run in step and have no process group. Whoever is free claims the next item:
torchrun's own key-value store counts the claims of each, atomically. Claims die with the launch, so
a killed process leaves no lock behind; what it has finished is in files, for their owner to find.

Without torchrun there is one process, which gets every item.
"""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist

_POLL = 0.2  # seconds between looks at what others have done


def world_size() -> int:
    """Number of processes that torchrun has started, on all machines."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    return int(os.environ["WORLD_SIZE"]) if launched else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def take_gpu() -> None:
    """Let ``"cuda"`` be a GPU of this process alone, of those of its machine.

    Raises:
        ValueError: if the machine has fewer of them than processes.
    """
    if world_size() == 1:
        return
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"process {number} of this machine has no GPU of its own, there are {count}; start "
            f"torchrun with --nproc-per-node={count}"
        )
    torch.cuda.set_device(number)


class Claims:
    """Items of one piece of work; all processes make the same ones in the same order.

    Args:
        name: what the work is called, for the store.

    Raises:
        ValueError: for processes that have a process group but were not started by torchrun.
    """

    _made: Counter[str] = Counter()

    def __init__(self, name: str) -> None:
        self.rank, self.size = rank(), world_size()
        grouped = dist.is_available() and dist.is_initialized()
        if self.size == 1 and grouped and dist.get_world_size() > 1:
            raise ValueError(
                f"{dist.get_world_size()} processes have a process group, but torchrun has not "
                "started them, whose store says who does what; start them with torchrun"
            )
        # The same work again is another work, and so is one after torchrun's restart of all.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._name = f"{name} {self._made[name]} {restarts}"
        self._made[name] += 1

    def claim(self, item: object) -> bool:
        """Whether this process is the first to ask for an item, and so the one to do it."""
        return self._count(f"item {item}", 1) == 1

    def order(self, count: int) -> Iterator[int]:
        """Numbers below ``count`` in the order in which to claim them.

        Each process begins with a share of its own, since neighbours may have work in common.
        """
        first = self.rank * count // self.size
        yield from range(first, count)
        yield from range(first)

    def leave(self) -> None:
        """Say that this process has nothing left to do."""
        self._count("left", 1)

    def waiting(self) -> Iterator[None]:
        """Moments until all processes have left."""
        while self._count("left", 0) < self.size:
            yield
            time.sleep(_POLL)

    def _count(self, key: str, more: int) -> int:
        if self.size == 1:
            return 1
        return _store().add(f"pyro_vae_defence {self._name} {key}", more)


@functools.cache
def _store() -> dist.Store:
    """The store that torchrun's agent keeps, the same for all processes of a launch."""
    return next(iter(dist.rendezvous("env://")))[0]
