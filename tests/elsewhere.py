"""A device that is not the CPU, on any machine: what would fail or wait on a GPU fails here.

Tensors of the device ``lazy`` hold tensors of the CPU. Within :class:`Elsewhere`, every operation
on them is done on these, so that numbers are the CPU's own, but what a GPU refuses is refused: an
operation on tensors of both devices (numbers, that is CPU tensors without dimensions, excepted), a
generator of the other device, and NumPy. :func:`waits` notes where the host waits for the
device: where it reads a value, asks how many entries of a mask are set, or copies to it or from it.
That is what ``torch.cuda.set_sync_debug_mode("error")`` refuses on a GPU.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
HERE, THERE = torch.device("cpu"), torch.device("lazy")

# What answers the host, be it by a number or by a shape.
_READS = {
    aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.nonzero_static,
    aten.masked_select, aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.bincount,
    aten.repeat_interleave,
}  # fmt: skip
_COPIES = {aten._to_copy, aten.copy_, aten.copy}
_INDEXING = {aten.index, aten.index_put, aten.index_put_}


class There(Tensor):
    """A tensor of the device ``lazy``, its entries in ``inner``."""

    inner: Tensor
    __slots__ = ["inner"]

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        found = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=THERE,
        )
        found.inner = inner
        return found

    def __repr__(self, **_: Any) -> str:
        return f"There({self.inner!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()  # which torch does not do for subclasses

    def __deepcopy__(self, memo: dict[int, Any]) -> There:
        if id(self) not in memo:
            found = self.detach().clone().requires_grad_(self.requires_grad)
            memo[id(self)] = (
                torch.nn.Parameter(found, self.requires_grad)
                if isinstance(self, torch.nn.Parameter)
                else found
            )
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors: list[Tensor] = []
    plain_args = [_unwrap(value, tensors) for value in args]
    plain_kwargs = {name: _unwrap(value, tensors) for name, value in kwargs.items()}
    device = kwargs.get("device")
    device = None if device is None else torch.device(torch.device(device).type)
    if device == THERE:
        plain_kwargs["device"] = HERE
        generator = kwargs.get("generator")
        if generator is not None and generator.device != THERE:
            raise RuntimeError(f"a generator of {generator.device} for a tensor of {THERE}: {func}")
    there = any(isinstance(t, There) for t in tensors)
    if not there and device != THERE:
        return func(*args, **kwargs)
    packet = func.overloadpacket
    if packet in _COPIES:
        target = tensors[0].device if packet is not aten._to_copy else device or tensors[0].device
        if tensors[-1].device != target and not kwargs.get("non_blocking"):
            _note(func, f" from {tensors[-1].device} to {target}")
        there = target == THERE
    elif there:
        _check_devices(func, args, tensors)
    else:
        there = True  # made there
    result = func(*plain_args, **plain_kwargs)
    if not there:
        return result
    if isinstance(result, Tensor):
        # In place, the tensor that was given is what comes back.
        same = next((t for t in tensors if isinstance(t, There) and t.inner is result), None)
        return There(result) if same is None else same
    if isinstance(result, (tuple, list)):
        return type(result)(There(v) if isinstance(v, Tensor) else v for v in result)
    return result


def _unwrap(value: Any, tensors: list[Tensor]) -> Any:
    """Tensors of the CPU in the place of others; all are noted in ``tensors``."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.inner if isinstance(value, There) else value
    if isinstance(value, (list, tuple)):
        return [_unwrap(each, tensors) for each in value]
    return value


def _check_devices(func: Any, args: Any, tensors: list[Tensor]) -> None:
    packet = func.overloadpacket
    wrong = [t for t in tensors if t.device == HERE and t.dim() > 0]
    if packet in _INDEXING:
        # Indices of the CPU are allowed: they are copied, for which the host waits.
        indices = [i for i in args[1] if i is not None]
        wrong = [t for t in wrong if not any(t is i for i in indices)]
        if any(i.device == HERE for i in indices):
            _note(func, f" with indices of {HERE}")
        elif any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            _note(func, " with a mask")
    if wrong:
        shapes = [(str(t.device), tuple(t.shape)) for t in tensors]
        raise RuntimeError(f"{func} of tensors on different devices: {shapes}")
    if packet in _READS:
        _note(func)


class Elsewhere(TorchDispatchMode):
    """The device ``lazy`` is there while this is entered."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and what skips it is slow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __enter__(self) -> Elsewhere:
        # torch.tensor(..., device=...) makes a tensor of the CPU first, and copies that.
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        super().__exit__(*error)


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    """A list that fills with what the host waits for, and the line of the package that asks it."""
    found: list[str] = []
    _listeners.append(found)
    try:
        yield found
    finally:
        _listeners.remove(found)


_listeners: list[list[str]] = []


def _note(func: Any, why: str = "") -> None:
    if _listeners:
        frames = traceback.extract_stack()
        own = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "pyro_vae" in f.filename]
        for found in _listeners:
            found.append(f"{func}{why} in {own[-1] if own else 'a test'}")
