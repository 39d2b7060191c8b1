"""Weights of a file or a state dict into a network that fits them.

Nothing is believed that was not compared: the network is made without memory first (on the device
``meta``), its keys, shapes and types are compared with what was found, and only then is it made in
earnest, as large as the weights are. A refusal says what does not fit; the caller names the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_vae_defence.ops.files import reason

M = TypeVar("M", bound=nn.Module)

# What DistributedDataParallel and torch.compile put before the names of what they wrap.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")


def plain_names(weights: Mapping[Any, Any]) -> dict[str, Tensor]:
    """A state dict under the names of the network itself, without those of what wraps it.

    Raises:
        ValueError: it is no mapping of names to tensors, or has weights with and without a wrapper.
    """
    if not isinstance(weights, Mapping):
        raise ValueError(f"the weights are a {type(weights).__name__}, not names and tensors")
    others = [k for k, v in weights.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if others:
        raise ValueError(f"the weights hold other things than tensors: {few(map(str, others))}")
    named = {_WRAPPERS.sub("", key): value for key, value in weights.items()}
    if len(named) != len(weights):
        raise ValueError("the weights are there twice, with and without a prefix such as module.")
    return named


def fill(make: Callable[[], M], weights: Mapping[str, Tensor], optional: str = "") -> M:
    """The network that ``make`` makes, with these weights, in eval mode on the CPU.

    Args:
        make: called twice, the first time on the device ``meta``.
        weights: name -> tensor of floating point where the network has one, of any precision.
        optional: end of the names that may be missing, and then keep their initial values.

    Raises:
        ValueError: the network cannot be made; names are missing or unknown; shapes or types
            differ; or weights are not finite.
    """
    try:
        with torch.device("meta"), _WithoutDraws():
            expected = make().state_dict()
    except Exception as error:  # whatever a constructor makes of arguments from a file
        raise ValueError(f"the configuration is that of no network: {reason(error)}") from error
    check(expected, weights, optional)
    network = make()
    network.load_state_dict(network.state_dict() | dict(weights))
    return network.eval()


class _WithoutDraws(TorchFunctionMode):
    """Leaves out initial values, which say nothing on ``meta`` but import a compiler there."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        drawn = func is Tensor.normal_ or func is Tensor.uniform_
        # Some functions of torch.nn.init are asked about as a whole, by keywords.
        if drawn or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def check(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], optional: str) -> None:
    """The comparison of :func:`fill`; ``expected`` may be on the device ``meta``."""
    left_out = {key for key in expected if optional and key.endswith(optional)}
    both = sorted(key for key in weights if key in expected)
    problems = {
        "keys are missing": sorted(set(expected) - left_out - set(weights)),
        "keys are unexpected": sorted(set(weights) - set(expected)),
        "shapes are wrong": [
            f"{key} {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in both
            if _dense(weights[key]) and weights[key].shape != expected[key].shape
        ],
    }
    if found := [f"{what}: {few(items)}" for what, items in problems.items() if items]:
        raise ValueError("the weights do not fit the configuration; " + "; ".join(found))
    check_finite({key: weights[key] for key in both if expected[key].is_floating_point()})
    if counts := [
        key for key in both if not expected[key].is_floating_point() and not _is_count(weights[key])
    ]:
        raise ValueError(f"these are no counts from 0 to below 2^53: {few(counts)}")


def _is_count(value: Tensor) -> bool:
    """Whether a tensor holds whole numbers from 0 to below 2^53, which floating point has exactly;
    earlier versions wrote them so."""
    if not _dense(value) or not (value.dtype == torch.int64 or value.is_floating_point()):
        return False
    counts = value.double()
    return bool(((counts == counts.round()) & (counts >= 0) & (counts < 2**53)).all())


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """``ValueError`` naming those that are no dense tensors of finite floating-point numbers."""
    if spoiled := [
        key
        for key, value in weights.items()
        if not (_dense(value) and value.is_floating_point() and value.float().isfinite().all())
    ]:
        raise ValueError(
            f"these weights are not finite numbers of floating point: {few(sorted(spoiled))}"
        )


def few(items: Sequence[str] | Any) -> str:
    """The first of many names."""
    items = list(items)
    shown = ", ".join(items[:5])
    return shown if len(items) <= 5 else f"{shown} and {len(items) - 5} more"


def _dense(value: Tensor) -> bool:
    """Whether a tensor has a plain number at each place of its shape."""
    plain = value.layout is torch.strided and not (value.is_nested or value.is_quantized)
    return plain and not value.is_meta
