"""What a public call takes of its caller's context: images and grad mode, nothing else.

A serving process calls from :func:`torch.inference_mode`, from :func:`torch.autocast`, and from
several threads; images may have been made in inference mode. Chains and attacks differentiate,
their energies are sums over pixels that need the precision of the images, and Pyro's stack of
handlers, its parameter store and the train mode of networks are one for the whole process. So a
public call runs

- outside inference mode, on ordinary copies of tensors that were made in it; what it returns has no
  gradient there, as under :func:`torch.no_grad`;
- without autocast, in the dtype of the images;
- one at a time: calls from other threads wait.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_DEVICES = ("cpu", "cuda")
_lock = threading.RLock()


def _renew_lock() -> None:
    """A child that is forked while another thread holds the lock would wait forever."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def public(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function, but no generator, a public call as the module's text describes it."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with _lock, contextlib.ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())  # leaving inference mode turned it on
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            arguments = {name: _ordinary(value) for name, value in kwargs.items()}
            return function(*map(_ordinary, args), **arguments)

    return cast("Callable[P, T]", call)


def _ordinary(value: Any) -> Any:
    """``value`` with copies of the tensors made in inference mode, which cannot be saved."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) in (tuple, list):
        return type(value)(map(_ordinary, value))
    # Anything else, such as a dict of a chain's latents, keeps its identity unless it has to go.
    if type(value) is dict and any(
        isinstance(v, Tensor) and v.is_inference() for v in value.values()
    ):
        return {name: _ordinary(entry) for name, entry in value.items()}
    return value
