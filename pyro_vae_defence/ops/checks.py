"""Checks of arguments that many parts share."""

from __future__ import annotations

import math
from typing import Any

import torch


class RefusalError(ValueError):
    """A ``ValueError`` of this library from inside a user's program; nobody adds that it failed."""


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """``ValueError`` naming the argument unless ``value`` is an integer of at least ``least``."""
    if not (isinstance(value, int) and value >= least):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_device(name: str, value: torch.device | str) -> torch.device:
    """The device, or a ``ValueError`` naming the argument if this machine does not have it."""
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        why = "is no device; give for example 'cpu' or 'cuda'"
        raise ValueError(f"{name}={value!r} {why}") from error
    if device.type == "cuda":
        number = torch.cuda.device_count()
        if (device.index or 0) >= number:
            raise ValueError(f"{name}={value!r} is not there: torch sees {number} CUDA devices")
    return device


def check_positive(name: str, value: Any) -> float:
    """``value``, or a ``ValueError`` naming the argument unless it is positive and finite."""
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return value


def check_device(device: Any) -> torch.device:
    """The device of that name, or a ``ValueError`` unless tensors can be there."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device={device!r} is none that this machine has ({reason}); name one, such as 'cpu' "
            "or 'cuda', or leave it out"
        ) from error
    return place
