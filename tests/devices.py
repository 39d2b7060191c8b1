"""The same computation on two devices, and what must be equal then."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


def to(value: Any, device: torch.device) -> Any:
    """A copy of tensors and modules in a nest, and of objects with such attributes, on a device."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device)
    if isinstance(value, Tensor):
        return value.detach().clone().to(device)
    if isinstance(value, Mapping):
        return type(value)({name: to(v, device) for name, v in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(to(v, device) for v in value)
    return value


def agree(
    run: Callable[[torch.device], Any],
    device: torch.device,
    *,
    rtol: float = 1e-7,
    atol: float = 1e-9,
) -> Any:
    """Compare what ``run`` computes on the CPU and on ``device``; what it computed there.

    Tensors must be close, and those of ``device`` must lie there; everything else must be equal.
    """
    found = []
    for place in (CPU, device):
        pyro.clear_param_store()
        torch.manual_seed(0)
        found.append(run(place))
    here, there = (dict(leaves(value)) for value in found)
    assert here.keys() == there.keys()
    assert here
    for name, expected in here.items():
        actual = there[name]
        if isinstance(expected, Tensor):
            assert actual.device.type == device.type, name
            actual = actual.detach().cpu()
            torch.testing.assert_close(
                actual, expected.detach(), rtol=rtol, atol=atol, equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip
        elif isinstance(expected, float):
            assert abs(actual - expected) <= atol + rtol * abs(expected), (name, actual, expected)
        else:
            assert actual == expected, name
    return found[1]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names and leaves of a nest of mappings, sequences, named tuples and dataclasses."""
    if isinstance(value, Mapping):
        items = value.items()
    elif hasattr(value, "_asdict"):
        items = value._asdict().items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    else:
        if isinstance(value, (Tensor, float, int, str, bool)):
            yield name, value
        return
    for key, inner in items:
        if key == "seconds":
            continue
        yield from leaves(inner, f"{name}.{key}")
