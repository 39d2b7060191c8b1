"""Names under which networks register their parameters with Pyro."""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import pyro
from torch import nn

from pyro_vae_defence.ops.boundary import drop_references

_instances: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
_gone: deque[str] = deque()  # scopes of networks that are no more


class ScopedModule(nn.Module):
    """A module with a name of its own, ``scope``, for Pyro's parameter store.

    The store is global and keyed by name: two networks under one name would share weights by
    accident. So every instance has its own, copies and unpickled ones included. One that is gone
    leaves the store, which would keep its parameters for ever, when the next one is made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scope = self._new_scope()

    def __getstate__(self) -> dict[str, Any]:
        drop_references(self.modules())
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.scope = self._new_scope()

    def _new_scope(self) -> str:
        name = type(self).__name__
        scope = f"{name}_{next(_instances[name])}"
        _forget_gone()
        # Objects may go at any time, also while someone looks through the store.
        weakref.finalize(self, _gone.append, scope).atexit = False
        return scope


def _forget_gone() -> None:
    """Take the parameters of the networks that are gone out of Pyro's store."""
    store = pyro.get_param_store()
    gone = {_gone.popleft() for _ in range(len(_gone))}
    for name in [name for name in store if name.partition(".")[0] in gone]:
        tensor = store._params.pop(name)
        store._constraints.pop(name)
        # A tensor that several names have is known by the last of them.
        if store._param_to_name.get(tensor) == name:
            del store._param_to_name[tensor]
