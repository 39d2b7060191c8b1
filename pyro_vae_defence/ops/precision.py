"""Whether products of float32 on CUDA round their factors to TensorFloat-32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def _switches() -> list[tuple[Any, str]]:
    """Where torch keeps whether products of float32 round to TF32: convolutions, matrices."""
    if hasattr(torch.backends.cudnn, "conv"):  # torch 2.9
        name = "fp32_precision"
        return [(torch.backends.cudnn.conv, name), (torch.backends.cuda.matmul, name)]
    return [(torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32")]


def tf32_settings() -> tuple[Any, ...]:
    """How torch is set for convolutions and matrix products of float32 on CUDA."""
    return tuple(getattr(place, name) for place, name in _switches())


def full_on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """No rounding to TF32 inside this block where the device is a GPU."""
    return tf32(False) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let float32 products on CUDA round their factors to TF32, or not, inside this block."""
    switches, before = _switches(), tf32_settings()
    values = {"allow_tf32": on, "fp32_precision": "tf32" if on else "ieee"}
    try:
        for place, name in switches:
            setattr(place, name, values[name])
        yield
    finally:
        for (place, name), value in zip(switches, before, strict=True):
            setattr(place, name, value)
