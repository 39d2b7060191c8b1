"""Work that the processes of ``torchrun`` share item by item, each item done by one of them.

The processes need not run in step and have no process group. Whoever is free claims the next item:
torchrun's own key-value store counts the claims of each, atomically. Claims die with the launch, so
a killed process leaves no lock behind; what it has finished is in files, for their owner to find.

Nobody waits for who does not come: a process at work gives a sign of life every few seconds, and
those that wait for it raise an error that names it when the signs stay away, or when it has failed.

Without torchrun there is one process, which gets every item.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

_POLL = 0.2  # seconds between looks at what others have done
_BEAT = 5.0  # seconds between signs of life, and between looks at those of others
_PATIENCE = 600.0  # seconds without one after which a process is given up


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

    A context: within it this process is at work, and an error that leaves it is known to others.

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
        self._ended = threading.Event()

    def __enter__(self) -> Claims:
        if self.size > 1:
            self._count(f"signs {self.rank}", 1)
            threading.Thread(target=self._live, daemon=True).start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._ended.set()
        if self.size > 1:
            self._count(f"{'ended' if kind is None else 'failed'} {self.rank}", 1)

    def agree(self, what: str) -> None:
        """``ValueError`` if another process is at something else.

        Args:
            what: the items, in words that are the same in all processes.
        """
        if self.size > 1:
            key = f"pyro_vae_defence {self._name} what"
            theirs = _store().compare_set(key, "", what).decode()
            if theirs != what:
                raise ValueError(
                    f"process {self.rank} is at other work than those before it: {what} instead "
                    f"of {theirs}; give all processes the same settings and data"
                )

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

    def waiting(self, until: Callable[[], bool] | None = None) -> Iterator[None]:
        """Moments until all processes have left, or until something else holds.

        Raises:
            RuntimeError: naming a process that has failed, or of which there is no sign of life.
        """
        # Of the other processes: what was counted last, and when that was new.
        seen = dict.fromkeys(set(range(self.size)) - {self.rank}, (0, time.monotonic()))
        look = time.monotonic()
        while not (self._count("left", 0) >= self.size if until is None else until()):
            if time.monotonic() >= look:
                self._look(seen, until is None)
                look = time.monotonic() + _BEAT
            yield
            time.sleep(_POLL)

    def _look(self, seen: dict[int, tuple[int, float]], may_end: bool) -> None:
        """Raise a ``RuntimeError`` if one of the processes is given up."""
        for other, (before, since) in seen.items():
            if self._count(f"failed {other}", 0):
                raise RuntimeError(f"process {other} has failed; what it says tells why")
            ended = self._count(f"ended {other}", 0)
            signs = self._count(f"signs {other}", 0)
            if signs != before or (ended and may_end):
                seen[other] = signs, time.monotonic()
            elif time.monotonic() - since > _PATIENCE:
                what = "gives no sign of life any more" if before else "does not take part"
                what = "has ended, and what it has made is not seen" if ended else what
                raise RuntimeError(
                    f"process {other} {what} for {_PATIENCE:g} seconds; run all processes again"
                )

    def _live(self) -> None:
        """Give signs of life until this process has ended the work."""
        while not self._ended.wait(_BEAT):
            try:
                self._count(f"signs {self.rank}", 1)
            except RuntimeError:  # the store is gone, and with it whoever might ask
                return

    def _count(self, key: str, more: int) -> int:
        if self.size == 1:
            return 1
        return _store().add(f"pyro_vae_defence {self._name} {key}", more)


@functools.cache
def _store() -> dist.Store:
    """The store that torchrun's agent keeps, the same for all processes of a launch."""
    return next(iter(dist.rendezvous("env://")))[0]
