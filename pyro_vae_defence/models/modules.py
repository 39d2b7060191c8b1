"""The networks of a VAE: every ``nn.Module`` that its programs can reach, however they are held.

A VAE is any object with two programs, and a program is any callable. Its networks may be attributes
(also inside lists, tuples, dicts and other objects), stand behind a bound method or a
``functools.partial``, in the closure or the defaults of a function, or be globals that a function
names. Who sets modes, moves batches to a device or stores weights asks here which there are.

The walk goes through data and code. It ends at tensors, data sets and optimisers, at sets, which
have no order, and at the code of installed packages unless they define one of the programs.
"""

from __future__ import annotations

import argparse
import contextlib
import dis
import functools
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

__all__ = ["modules_of", "networks_of"]

# What holds no module, by exact type: most of what stands in attributes and globals.
_LEAVES = {
    *map(type, (None, ..., NotImplemented, True, 0, 0.0, 0j, "", b"", slice(None))),
    *(set, frozenset, range, object, ModuleType, BuiltinFunctionType),
    *(Tensor, nn.Parameter, torch.dtype, torch.device, torch.Size, torch.Generator),
}
_ENDS = (Tensor, ModuleType, Dataset, DataLoader, Optimizer)
# Attributes that every module has; its children are read from one of them.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_OWN = __name__.partition(".")[0]
# Packages whose code leads to themselves, not to a VAE: this one too, whose models hold their
# networks as attributes. Nor do objects of the standard ones, but for those that hold attributes
# and those that wrap a function, which has one of three names.
_STANDARD = frozenset(sys.stdlib_module_names) - {"__main__"}
_FOREIGN = _STANDARD | {"torch", "pyro", _OWN}
_HOLDERS = (SimpleNamespace, argparse.Namespace)
_CACHED = type(functools.lru_cache(len))
_WRAPPERS = (property, staticmethod, classmethod, functools.cached_property, _CACHED)
_WRAPPED = ("__wrapped__", "fget", "func")
_PATHS = sysconfig.get_paths()
_INSTALLED = tuple({_PATHS[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def modules_of(*programs: Any) -> list[nn.Module]:
    """Every module that VAEs, models, guides or classifiers can reach, each once.

    Args:
        programs: objects with ``model`` and ``guide``, programs, or modules.
    """
    return _Walk(programs).modules


def networks_of(*programs: Any) -> dict[str, nn.Module]:
    """The outermost of these modules by the path on which each is reached, such as ``"parts.0"``.

    The path of a module given itself is the empty string, so that the names of its parameters are
    those of its ``state_dict``. Paths are the same in every process.
    """
    walk = _Walk(programs)
    inner = {id(child) for module in walk.modules for child in module._modules.values()}
    networks: dict[str, nn.Module] = {}
    for position, value in enumerate(walk.objects):
        if isinstance(value, nn.Module) and id(value) not in inner:
            name = walk.path(position)
            while name in networks:
                name += "'"
            networks[name] = value
    return networks


class _Walk:
    """Visits everything that may hold a module, breadth first, so that paths are short.

    Attributes:
        modules: those found.
        objects: what was visited, but for children of modules. It holds on to objects that might
            go otherwise and leave their ids to others.
        origins: of each object the position of what held it, and its label there.
    """

    def __init__(self, programs: tuple[Any, ...]) -> None:
        self.modules: list[nn.Module] = []
        self.objects: list[Any] = []
        self.origins: list[tuple[int, Any]] = []
        self._seen: set[int] = set()
        self._packages: set[str] = set()
        for program in programs:
            self._visit(program, -1, "")
        for position in range(len(self.objects)):
            program = self.objects[position]
            self._packages.add(_package(type(program)))
            # Properties and delegates have programs that no attribute shows.
            self._visit(getattr(program, "model", None), position, "model")
            self._visit(getattr(program, "guide", None), position, "guide")
        position = 0
        while position < len(self.objects):
            self._enter(self.objects[position], position)
            position += 1

    def path(self, position: int) -> str:
        """Labels from a program to an object, with dots between."""
        labels: list[Any] = []
        while position >= 0:
            position, label = self.origins[position]
            labels.append(label)
        return ".".join(str(label) for label in reversed(labels) if label != "")

    def _visit(self, value: Any, position: int, label: Any) -> None:
        kind = type(value)
        if kind in _LEAVES or id(value) in self._seen:
            return
        # Most sequences hold numbers, strings or tensors; this look at them is quick.
        if (kind is tuple or kind is list) and _LEAVES.issuperset(map(type, value)):
            return
        self._seen.add(id(value))
        self.objects.append(value)
        self.origins.append((position, label))

    def _visit_all(self, held: Iterable[tuple[Any, Any]], position: int) -> None:
        for label, value in held:
            if type(value) not in _LEAVES:
                self._visit(value, position, label)

    def _enter(self, value: Any, position: int) -> None:
        """Visit what an object holds."""
        if isinstance(value, nn.Module):
            self._enter_module(value, position)
        elif isinstance(value, FunctionType):
            self._enter_function(value, position)
        elif isinstance(value, MethodType):
            self._packages.add(_package(value.__func__))
            self._visit(value.__self__, position, "")
            self._visit(value.__func__, position, "")
        elif isinstance(value, functools.partial):
            self._visit(value.func, position, "")
            self._visit_all(enumerate(value.args), position)
            self._visit_all(value.keywords.items(), position)
        elif isinstance(value, (list, tuple, deque)):
            self._visit_all(enumerate(value), position)
        elif isinstance(value, dict):
            self._visit_all(value.items(), position)
        elif isinstance(value, type):
            self._enter_class(value, position)
        elif not isinstance(value, _ENDS):
            self._enter_instance(value, position)

    def _enter_module(self, root: nn.Module, position: int) -> None:
        """Take a module and its children, of which there may be hundreds, in order."""
        seen, modules, kinds = self._seen, self.modules, dict[type, bool]()
        stack = [root]
        while stack:
            module = stack.pop()
            modules.append(module)
            kind = type(module)
            if kind not in kinds:
                kinds[kind] = _package(kind) == "torch"
            if children := module._modules:
                for child in reversed(children.values()):
                    if child is not None and id(child) not in seen:
                        seen.add(id(child))
                        stack.append(child)
            # Layers of torch have no attributes that hold modules.
            if not kinds[kind]:
                for name, value in module.__dict__.items():
                    if type(value) not in _LEAVES and name not in _OF_EVERY_MODULE:
                        self._visit(value, position, name)
        for kind in kinds:
            self._packages.add(_package(kind))
            self._visit(kind, position, "")

    def _enter_instance(self, value: Any, position: int) -> None:
        kind = type(value)
        if _package(kind) in _STANDARD:
            if isinstance(value, _HOLDERS):
                self._visit_all(vars(value).items(), position)
            elif isinstance(value, _WRAPPERS):
                for name in _WRAPPED:
                    self._visit(getattr(value, name, None), position, "")
            return
        self._visit_all(getattr(value, "__dict__", {}).items(), position)
        for base in kind.__mro__:
            slots = base.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if not name.startswith("__"):
                    self._visit(getattr(value, name, None), position, name)
        self._visit(kind, position, "")

    def _enter_class(self, owner: type, position: int) -> None:
        for base in owner.__mro__:
            if _package(base) not in _FOREIGN:
                for name, value in base.__dict__.items():
                    if isinstance(value, FunctionType):
                        self._enter_function(value, position)
                    elif not name.startswith("__"):
                        self._visit(value, position, name)

    def _enter_function(self, function: FunctionType, position: int) -> None:
        if function.__closure__:
            for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True):
                with contextlib.suppress(ValueError):  # not assigned yet
                    self._visit(cell.cell_contents, position, name)
        if function.__defaults__:
            self._visit_all(enumerate(function.__defaults__), position)
        if function.__kwdefaults__:
            self._visit_all(function.__kwdefaults__.items(), position)
        # Decorators keep what they wrap there.
        if function.__dict__:
            self._visit_all(function.__dict__.items(), position)
        known = function.__globals__
        # Where it is written: what functools.wraps makes goes by the name of what it wraps.
        if (known.get("__name__") or "").partition(".")[0] == _OWN:
            return
        installed, names = _reading(function.__code__)
        if not installed or _package(function) in self._packages - _FOREIGN:
            for name in names:
                if type(value := known.get(name)) not in _LEAVES:
                    self._visit(value, position, name)
                elif isinstance(value, ModuleType):
                    if value.__name__.partition(".")[0] in _FOREIGN:
                        continue
                    for attribute in function.__code__.co_names:  # networks.decoder
                        self._visit(vars(value).get(attribute), position, f"{name}.{attribute}")


def _package(owner: Any) -> str:
    """The package in which a class or a function is defined."""
    return (owner.__module__ or "").partition(".")[0]


@functools.lru_cache(maxsize=4096)
def _reading(code: CodeType) -> tuple[bool, tuple[str, ...]]:
    """Whether a function's code is an installed package's, and the globals that it names."""
    names = dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= dict.fromkeys(_reading(constant)[1])
    return code.co_filename.startswith(_INSTALLED), tuple(names)
