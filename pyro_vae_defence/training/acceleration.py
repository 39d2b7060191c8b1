"""Lower precision and compiled layers, for any Pyro program.

Under :func:`in_bfloat16` matrix products and convolutions run in bfloat16, and so does what a
program computes from them up to its distributions. There everything returns to float32: sampling,
log-probabilities and divergences, hence the loss, never see less. Weights, their gradients and the
optimiser are float32 throughout. bfloat16 has the exponents of float32, so that no loss scaling is
needed, but only 8 significant bits: let programs pass logits, not probabilities that round to 1.

Both pay on hardware made for them; measure first. On a CPU that has bfloat16 instructions but no
matrix unit for them (AVX-512 without AMX) training the paper's convolutional VAE was *slower* in
bfloat16 at every batch size tried, and compilation gained nothing over the vendor's convolutions.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution


def in_bfloat16(program: Callable[..., Any]) -> Callable[..., Any]:
    """``program(x, ...)`` with its layers in bfloat16 and its distributions in float32."""

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Only the program: what an objective computes with its distributions, and the backward
        # pass, stay outside.
        with torch.autocast(x.device.type, dtype=torch.bfloat16), _Float32Sites():
            return program(x, *args, **kwargs)

    return run


class _Float32Sites(Messenger):
    """Give every sample site a distribution in float32."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = _to_float32(msg["fn"])


def _to_float32(value: Any) -> Any:
    """A bfloat16 tensor in float32, a distribution with all it holds in float32, else ``value``."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.bfloat16 else value
    if not isinstance(value, Distribution):
        return value
    converted = copy.copy(value)
    for name, held in vars(value).items():
        setattr(converted, name, _to_float32(held))
    return converted


@contextlib.contextmanager
def compiled_children(vae: Any) -> Iterator[None]:
    """Compile the children of a module in place, for a while.

    Pyro's handlers around them stay Python. A child takes part where it is *called*, not where
    its own children are called one by one. Parameters and their names stay what they are.

    Raises:
        ValueError: if ``vae`` is no ``nn.Module``.
    """
    if not isinstance(vae, nn.Module):
        raise ValueError(
            f"compile=True needs a vae that is an nn.Module, got {type(vae).__name__}; "
            "compile its networks yourself"
        )
    children = [(child, child._compiled_call_impl) for child in vae.children()]
    try:
        for child, _ in children:
            child.compile()
        yield
    finally:
        for child, before in children:
            child._compiled_call_impl = before
