"""Configurations of studies: frozen dataclasses of fields that are documented, typed and checked.

A field's annotation says what it may be: ``Count``, ``Radius``, ``Literal["a", "b"]``, a tuple of
such, another configuration. It is checked when the configuration is made, before anything is
computed; the class's docstring is what ``--help`` prints of it; ``override`` is ``--set``.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pyro_vae_defence.data.loading import DATASETS
from pyro_vae_defence.ops.checks import check_integer

Mark = Callable[[str, Any], None]
"""A condition of an annotation: raises a ``ValueError`` that names the field and its value."""


def at_least(least: int) -> Mark:
    """An integer not below ``least``."""
    return lambda name, value: check_integer(name, value, least)


def between(least: int, most: int) -> Mark:
    """An integer of a range, both ends included."""
    return must_be(
        f"an integer of {least}..{most}",
        lambda value: isinstance(value, int) and least <= value <= most,
    )


def within(low: float, high: float, of_images: bool = True, without_low: bool = False) -> Mark:
    """A number of the interval, which is open on the left where ``without_low``."""

    def check(name: str, value: Any) -> None:
        if not (_is_number(value) and low <= value <= high and not (without_low and value == low)):
            why = ", the range of images" if of_images else ""
            start = "(" if without_low else "["
            raise ValueError(f"{name} must lie in {start}{low:g}, {high:g}]{why}, got {value!r}")

    return check


def must_be(what: str, holds: Callable[[Any], Any]) -> Mark:
    """A condition in words and as a function."""

    def check(name: str, value: Any) -> None:
        if not holds(value):
            raise ValueError(f"{name} must be {what}, got {value!r}")

    return check


def one_of(known: Iterable[str]) -> Mark:
    """One of some names."""
    names = tuple(known)
    return must_be(f"one of {', '.join(names)}", names.__contains__)


not_empty = must_be("a tuple that is not empty", lambda value: isinstance(value, tuple) and value)

Count = Annotated[int, at_least(1)]
_for_torch = must_be("below 2**63, as torch's seeds are", lambda value: value < 2**63)
Natural = Annotated[int, at_least(0), _for_torch]
Several = Annotated[int, at_least(2)]
"""Of images whose figures get an interval."""
_positive = must_be("positive and finite", lambda value: _is_number(value) and 0 < value < math.inf)
Positive = Annotated[float, _positive]
_not_negative = must_be("finite and not negative", lambda value: _is_finite(value) and value >= 0)
NotNegative = Annotated[float, _not_negative]
Radius = Annotated[float, within(0, 1)]
"""Of a ball of images; 0 is no attack."""
AttackRadius = Annotated[float, within(0, 1, without_low=True)]
Share = Annotated[float, within(0, 1, of_images=False)]
Dataset = Annotated[str, one_of(DATASETS)]
"""Of :func:`pyro_vae_defence.data.load`."""


@dataclass(frozen=True)
class Configuration:
    """Base of configurations: a field that is not what its annotation says is a ``ValueError``."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            _check(name, getattr(self, name), hint)

    def refuse_idle(self, why: str, *names: str) -> None:
        """Raise a ``ValueError`` if a field without effect was given a value of its own.

        Args:
            why: where it has none, such as ``"without a model"``.
            names: of the fields.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in names and value != field.default:
                raise ValueError(f"{field.name}={value!r} has no effect {why}; leave it out")

    def refuse_above(self, **most: str) -> None:
        """Raise a ``ValueError`` if a number is larger than one of which it is a part.

        Args:
            most: field -> the field that has the largest value it may have.
        """
        for name, other in most.items():
            value, limit = getattr(self, name), getattr(self, other)
            if limit is not None and value > limit:
                raise ValueError(f"{name} must be at most {other} = {limit!r}, got {value!r}")


def same_name(value: Any) -> str:
    """What result files call a value of a tuple; radii may agree in that."""
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class ChainConfig(Configuration):
    """Chains of a defence.

    Args:
        num_samples: transitions per chain after the warm-up.
        warmup_steps: transitions before them, during which the step size adapts.
        num_chains: chains per image.
        num_steps: leapfrog steps of a transition.
        step_size: where the step size starts, in units of the metric.
        burn_in: gradients of microcanonical dynamics before the first transition.
    """

    num_samples: Count = 10
    warmup_steps: Natural = 15
    num_chains: Count = 1
    num_steps: Count = 4
    step_size: Positive = 0.5
    burn_in: Natural = 0


_engine = must_be("APGD, PGD or MomentumPGD", ("APGD", "PGD", "MomentumPGD").__contains__)
Engine = Annotated[Literal["APGD", "PGD", "MomentumPGD"], _engine]
"""Optimisers of :mod:`pyro_vae_defence.attacks`."""

Config = TypeVar("Config")


def override(config: Config, changes: Mapping[str, Any] | None) -> Config:
    """A configuration with some fields changed, nested ones by names such as ``chain.step_size``.

    Raises:
        ValueError: for an unknown field, or a value that does not fit.
    """
    known = [name for name, _, _ in describe(config)]
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in (changes or {}).items():
        if key not in known:
            raise ValueError(f"unknown setting {key!r}; choose from {', '.join(known)}")
        field, _, rest = key.partition(".")
        if rest:
            nested.setdefault(field, {})[rest] = value
        else:
            own[key] = value
    for field, inner in nested.items():
        try:
            own[field] = override(getattr(config, field), inner)
        except ValueError as error:
            raise ValueError(f"{field}.{error}") from error
    return dataclasses.replace(config, **own)  # type: ignore[type-var]


def parse_setting(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` of the command line; a value that is no Python literal is a string.

    Raises:
        ValueError: without an equals sign.
    """
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--set takes KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """:func:`parse_setting` of each, by key.

    Raises:
        ValueError: also for a key that is given two values.
    """
    found: dict[str, Any] = {}
    for key, value in map(parse_setting, texts):
        if key in found and found[key] != value:
            raise ValueError(f"{key} is set twice, to {found[key]!r} and {value!r}; set it once")
        found[key] = value
    return found


def describe(config: Any) -> Iterator[tuple[str, str, str]]:
    """Name, default and first sentence of the documentation of every field, nested ones dotted.

    Args:
        config: a configuration, or a class of them.
    """
    text = inspect.getdoc(config if isinstance(config, type) else type(config)) or ""
    documented = _arguments(text)
    for field in dataclasses.fields(config):
        default = getattr(config, field.name, field.default)
        if dataclasses.is_dataclass(default):
            for name, inner, line in describe(default):
                yield f"{field.name}.{name}", inner, line
        else:
            shown = "" if default in ("", dataclasses.MISSING) else repr(default)
            yield field.name, shown, documented.get(field.name, "")


def _arguments(text: str) -> dict[str, str]:
    """First sentences of the section ``Args`` of a docstring, by the name of the argument."""
    found: dict[str, str] = {}
    names: tuple[str, ...] = ()
    for line in text.partition("Args:\n")[2].splitlines():
        if line and not line.startswith("    "):
            break
        if start := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            names, words = tuple(start[1].split(", ")), start[2]
        else:
            words = line.strip()
        for name in names:
            found[name] = f"{found.get(name, '')} {words}".strip()
    return {name: re.split(r"[.;](?: |$)", words)[0] for name, words in found.items()}


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _check(name: str, value: Any, hint: Any) -> None:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for mark in hint.__metadata__:
            mark(name, value)
        _check(name, value, inner[0])
    elif origin in (typing.Union, types.UnionType):
        if value is not None or type(None) not in inner:
            _check_any(name, value, [each for each in inner if each is not type(None)])
    elif origin is Literal:
        if value not in inner:
            raise ValueError(f"{name} must be one of {inner}, got {value!r}")
    elif origin is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{name} must be a tuple such as ('a', 'b') or (1, 2), got {value!r}")
        for each in value:
            _check(name, each, inner[0])
        names = list(map(same_name, value))
        if twice := [each for each in names if names.count(each) > 1]:
            raise ValueError(f"{name} must hold {twice[0]} once, got {value!r}")
    elif hint is float:
        if not _is_finite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
    elif hint is not Any:
        kind = origin or hint
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")


def _check_any(name: str, value: Any, hints: Sequence[Any]) -> None:
    for number, hint in enumerate(hints, 1):
        try:
            return _check(name, value, hint)
        except ValueError:
            if number == len(hints):
                raise


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
