"""Checks of arguments that many parts share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class RefusalError(ValueError):
    """A ``ValueError`` of this library from inside a user's program; nobody adds that it failed."""


def check_on_device(name: str, value: Tensor, other_name: str, device: torch.device) -> None:
    """``ValueError`` unless ``value`` is on ``device``, that of what ``other_name`` names."""
    if value.device != device:
        raise ValueError(
            f"{name} is on {value.device} but {other_name} on {device}; pass "
            f"{name}.to({str(device)!r})"
        )


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """``ValueError`` naming the argument unless ``value`` is an integer of at least ``least``."""
    if not (isinstance(value, int) and value >= least):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_positive(name: str, value: Any) -> float:
    """``value``, or a ``ValueError`` naming the argument unless it is positive and finite."""
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return value


def as_device(name: str, value: torch.device | str) -> torch.device:
    """The device, or a ``ValueError`` naming the argument unless tensors can be there."""
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name}={value!r} is no device that this machine has ({reason}); name one, such as "
            "'cpu' or 'cuda'"
        ) from error
    return device
