"""Checks of arguments that many parts share."""

from __future__ import annotations

from typing import Any


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """``ValueError`` naming the argument unless ``value`` is an integer of at least ``least``."""
    if not (isinstance(value, int) and value >= least):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_positive(name: str, value: float) -> float:
    """``value``, or a ``ValueError`` naming the argument unless it is positive and finite."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r} must be positive and finite")
    return value
