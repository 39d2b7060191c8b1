"""Reading distribution objects: what is inside wrappers, which elements count, and the mean.

A distribution may stand in :class:`~torch.distributions.Independent`, which moves batch dimensions
to the event, and in Pyro's ``MaskedDistribution``, whose mask says which elements of the batch have
a density at all. Neither changes what is drawn.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution, TorchDistribution
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    VonMises,
    constraints,
)

_KNOWN = {"torch", "pyro", __name__.partition(".")[0]}


class Reweighted(TorchDistribution):
    """A likelihood made of another, of its shapes and support; a subclass says its ``log_prob``."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, likelihood: Any) -> None:
        self.likelihood = likelihood
        super().__init__(likelihood.batch_shape, likelihood.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """The likelihood's."""
        return self.likelihood.support


def innermost(distribution: Any) -> Any:
    """The distribution inside all ``Independent`` and ``MaskedDistribution``; a user's class that
    derives from these and has a density of its own is one by itself."""
    while is_of(distribution, Independent) or is_of(distribution, MaskedDistribution):
        distribution = distribution.base_dist
    return distribution


def own_methods(kind: type, family: type) -> frozenset[str]:
    """Which of ``log_prob``, ``sample`` and ``rsample`` a user's class has made anew of a family.

    A truncated Gaussian may well be derived from ``Normal``, but formulas for Gaussians are not its
    own. Classes that torch, Pyro and this library derive are what their family is.
    """
    kinds = kind.__mro__
    derived = kinds[: kinds.index(family)] if family in kinds else kinds
    users = [k for k in derived if k.__module__.partition(".")[0] not in _KNOWN]
    methods = ("log_prob", "sample", "rsample")
    return frozenset(name for name in methods if any(name in vars(k) for k in users))


def is_of(distribution: Any, family: type) -> bool:
    """Whether a distribution is of a family and has its density."""
    found = isinstance(distribution, family)
    return found and "log_prob" not in own_methods(type(distribution), family)


def is_point(distribution: Any) -> bool:
    """Whether all mass is on one point (``pyro.distributions.Delta``)."""
    return isinstance(innermost(distribution), Delta)


def support(distribution: Any) -> Any:
    """The constraint of one element; ``None`` for a family that does not say (zuko's flows)."""
    try:
        found = distribution.support
    except (NotImplementedError, AttributeError):
        return None
    while hasattr(found, "base_constraint"):  # independent, or torch's of a mixture
        found = found.base_constraint
    return found


def within_bounds(distribution: Any, value: Tensor) -> Tensor | None:
    """Which elements of ``value`` lie between the bounds of the support, where it has bounds.

    What else a support asks for, such as a sum of 1, may hold up to rounding only.
    """
    found = support(distribution)
    if not (hasattr(found, "lower_bound") or hasattr(found, "upper_bound")):
        return None
    inside: Tensor = found.check(value)
    return inside


def is_discrete(distribution: Any) -> bool:
    """Whether its values are of a discrete kind."""
    return bool(getattr(support(distribution), "is_discrete", False)) and not is_point(distribution)


def is_unconstrained(distribution: Any) -> bool:
    """Whether its support is known to be the whole space."""
    return support(distribution) is constraints.real


def is_angle(distribution: Any) -> bool:
    """Whether its values are angles, of which -pi and pi are the same."""
    return isinstance(innermost(distribution), VonMises)


def wrapped(angle: Tensor) -> Tensor:
    """The same angle between -pi and pi, as draws and chains have it."""
    return torch.atan2(angle.sin(), angle.cos())


def counted(distribution: Any) -> Tensor | bool:
    """Which elements no mask leaves out: a bool, or a bool tensor that broadcasts against draws."""
    found: Tensor | bool = True
    while isinstance(distribution, (Independent, MaskedDistribution)):
        if isinstance(distribution, MaskedDistribution):
            mask = distribution._mask
            if isinstance(mask, Tensor):
                mask = mask.reshape(mask.shape + (1,) * len(distribution.event_shape))
            found = mask & found
        distribution = distribution.base_dist
    return found


def over(distribution: Any, shape: torch.Size) -> Any:
    """A distribution whose ``log_prob`` broadcasts over values of ``shape``, as one of that shape.

    A parameter that serves several elements, such as the one mean of three channels, is that of
    each; draws of these are independent.
    """
    if distribution.batch_shape + distribution.event_shape == shape:
        return distribution
    if is_of(distribution, Independent):
        base, number = distribution.base_dist, distribution.reinterpreted_batch_ndims
        return Independent(over(base, shape), number, validate_args=False)
    return distribution.expand(shape[: len(shape) - len(distribution.event_shape)])


def mean(distribution: Distribution, site: str, mend: str) -> Tensor:
    """Its mean, in the shape of a draw; of angles the mean direction, wrapped.

    Raises:
        ValueError: if it has none, it is not finite or that of another density; the message names
            the ``site`` and ends with ``mend``.
    """
    kind = innermost(distribution)
    title = f"site {site!r} is {type(kind).__name__}"
    try:
        found: Tensor = distribution.mean
    except (NotImplementedError, AttributeError):
        raise ValueError(f"{title}, whose mean is not known; {mend}") from None
    if not mean_is_own(distribution):
        raise ValueError(
            f"{title}, which has a log_prob of its own and has inherited the mean of another "
            f"density; define mean in its class, or {mend}"
        )
    # The two families of which it is known cost no synchronisation with the device.
    if not isinstance(kind, (Normal, Delta)) and not bool(found.isfinite().all()):
        value = "NaN" if bool(found.isnan().any()) else "infinite"
        raise ValueError(f"{title}, whose mean is {value}; {mend}")
    return wrapped(found) if is_angle(kind) else found


def mean_is_own(distribution: Any) -> bool:
    """Whether a distribution that has a mean has that of its density.

    A user's class with a ``log_prob`` of its own, such as a truncated Gaussian, may have inherited
    the mean of its family. Where both densities are the same around the mean, it is taken for that.
    """
    inside = innermost(distribution)
    if is_of(inside, MixtureSameFamily):
        return mean_is_own(inside.component_distribution)
    kind = type(inside)
    family: Any = next((base for base in kind.__mro__ if "mean" in vars(base)), object)
    if "log_prob" not in own_methods(kind, family):
        return True
    inside = copy.copy(inside)
    inside._validate_args = False  # the mean of integers is none
    with torch.no_grad():
        near = [inside.mean + step for step in (-0.1, 0.0, 0.1)]
        # Formulas that are written in another way round in another way.
        return all(
            torch.allclose(
                inside.log_prob(at), family.log_prob(inside, at), 1e-4, 1e-5, equal_nan=True
            )
            for at in near
        )
