"""Clocks that wait for the device, and turns that survive what fails."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Call = Callable[[], Any]
"""What is timed. It may return the seconds it took by its own clock, a float."""

_MEBIBYTE = 2**20
_LONGEST = 300  # characters of an error in a result file


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Call, device: torch.device, count: int = 1) -> float:
    """Mean wall time in seconds of ``count`` calls, until the device is done with them."""
    wait(device)
    began = time.perf_counter()
    own = [call() for _ in range(count)]
    wait(device)
    seconds = time.perf_counter() - began
    return (sum(own) if isinstance(own[0], float) else seconds) / count


def turns(
    makers: Mapping[str, Callable[[], Call]],
    device: torch.device,
    budget: float,
    repeats: int,
    note: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Time several things in turn: the median of up to ``repeats`` turns within ``budget`` seconds.

    A maker sets one of them up and returns what is timed. Making and first call, which records,
    compiles and captures, count apart (``first_seconds``). The first turn is one call each and says
    how many fit into the later ones; it counts where there are no others. What fails anywhere gets
    an ``error`` and takes no further part.

    Returns:
        Per name ``seconds``, of one call, ``turns`` and ``first_seconds``; on a GPU also
        ``peak_mib``, the most memory that making and the first call took on top of what was taken.
    """
    entries: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    times: dict[str, list[float]] = {}

    def attempt(name: str, action: Callable[[], None]) -> None:
        note(name)
        try:
            action()
        except Exception as error:  # whatever it is, the others go on
            entries[name] = entries.get(name, {}) | failure(error)
            calls.pop(name, None)
            release(device)

    def first(name: str) -> None:
        before = memory(device)
        began = time.perf_counter()
        calls[name] = makers[name]()
        timed(calls[name], device)
        entries[name] = {"first_seconds": time.perf_counter() - began}
        if before is not None:
            peak = torch.cuda.max_memory_allocated(device)
            entries[name]["peak_mib"] = (peak - before) / _MEBIBYTE
        times[name] = []

    def again(name: str) -> None:
        share = budget / (repeats * len(makers))
        count = int(min(max(share / times[name][0], 1), 1000)) if times[name] else 1
        times[name].append(timed(calls[name], device, count))

    for name in makers:
        attempt(name, lambda name=name: first(name))  # type: ignore[misc]
    end = time.perf_counter() + budget
    for turn in range(repeats):
        for name in list(calls):
            if turn == 0 or time.perf_counter() < end:
                attempt(name, lambda name=name: again(name))  # type: ignore[misc]
    for name in calls:
        counted = times[name][1:] or times[name]
        entries[name] |= {"seconds": float(np.median(counted)), "turns": len(counted)}
    return entries


def failure(error: Exception) -> dict[str, str]:
    """An entry of a result file in place of what was to be measured."""
    text = " ".join(str(error).split())
    return {"error": f"{type(error).__name__}: {text}"[:_LONGEST]}


def memory(device: torch.device) -> int | None:
    """Bytes taken on a GPU; its record of the most starts anew. ``None`` elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def release(device: torch.device) -> None:
    """Give back memory that nothing holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
