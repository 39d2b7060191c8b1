"""Checks of arguments that many parts share."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
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


def check_tensor(name: str, value: Any) -> None:
    """``ValueError`` naming the argument unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a tensor, got a {type(value).__name__}; torch.as_tensor makes one"
        )


def is_integer(value: Tensor) -> bool:
    """Whether a tensor may be classes: a mask, such as ``prediction == label``, is none."""
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def check_generator(generator: Any) -> None:
    """``ValueError`` unless it is a generator, or ``None``."""
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise ValueError(
            "generator must be a torch.Generator, such as torch.Generator().manual_seed(0), or "
            f"None, got {generator!r}"
        )


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """``ValueError`` naming the argument unless ``value`` is an integer of at least ``least``."""
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (integer and value >= least):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """``ValueError`` naming the argument unless it is a bool: any text, "false" too, is true."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_positive(name: str, value: Any) -> float:
    """``value``, or a ``ValueError`` naming the argument unless it is positive and finite."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number and 0 < value < math.inf):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return plain(value)


def check_not_negative(name: str, value: Any) -> None:
    """``ValueError`` naming the argument unless it is finite and at least 0."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number and 0 <= value < math.inf):
        raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")


def check_within(name: str, value: Any, interval: str, mend: str = "") -> None:
    """``ValueError`` naming the argument unless ``value`` is a number of an interval, ``"[0, 1)"``
    as it is written: a bracket takes its end in."""
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    low, high = map(float, interval[1:-1].split(","))
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (
        number
        and (low <= value if interval[0] == "[" else low < value)
        and (value <= high if interval[-1] == "]" else value < high)
    ):
        raise ValueError(f"{name} must lie in {interval}, got {value!r}" + (mend and f"; {mend}"))


def plain(value: Any) -> Any:
    """``value``, a scalar of NumPy as Python's number, so that settings compare and are stored."""
    return value.item() if isinstance(value, np.generic) else value


def check_precision(name: str, dtype: torch.dtype) -> None:
    """``ValueError`` naming the argument for half precision.

    Energies and divergences are sums over pixels, of which it resolves no differences: noise
    vanishes in them, and chains accept what they should not.
    """
    if dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"{name} has dtype {dtype}, in which sums over pixels overflow or lose their "
            "differences; convert the images and the VAE to float32, x.float() and vae.float()"
        )


def check_finite(name: str, value: Tensor, mend: str) -> None:
    """``ValueError`` naming rows of ``value`` that are not finite; one look at the device."""
    if value.device.type == "meta":
        return
    bad = (~value.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{name} is not finite for {len(bad)} of {len(value)} rows (first rows: {bad[:5]}); "
            + mend
        )


def check_per_row(name: str, values: Any, count: int) -> Tensor:
    """What ``name`` has returned, or a ``ValueError`` unless it is one number per row,
    ``(count,)``: another shape would broadcast against these."""
    check_tensor(f"what {name} returns", values)
    if tuple(values.shape) != (count,):
        raise ValueError(
            f"{name} must return one number per row, shape ({count},), got {tuple(values.shape)}; "
            "sum over latents and pixels, and not over rows"
        )
    found: Tensor = values
    return found


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
