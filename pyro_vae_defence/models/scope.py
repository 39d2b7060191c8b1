"""Names under which networks register their parameters with Pyro."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn


def drop_references(*modules: nn.Module) -> None:
    """Take off what Pyro's store hangs on parameters at each use, a weak reference.

    It is on the way of pickling and of ``torch.save``.
    """
    for module in modules:
        for parameter in module.parameters():
            vars(parameter).pop("unconstrained", None)


_instances: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


class ScopedModule(nn.Module):
    """A module with a name of its own, ``scope``, for Pyro's parameter store.

    The store is global and keyed by name: two networks under one name would share weights by
    accident. So every instance has its own, copies and unpickled ones included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scope = self._new_scope()

    def __getstate__(self) -> dict[str, Any]:
        drop_references(self)
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.scope = self._new_scope()

    def _new_scope(self) -> str:
        name = type(self).__name__
        return f"{name}_{next(_instances[name])}"
