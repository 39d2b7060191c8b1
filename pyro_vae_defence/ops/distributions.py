"""Reading distribution objects: what is inside wrappers, which elements count, and the mean.

A distribution may stand in :class:`~torch.distributions.Independent`, which moves batch dimensions
to the event, and in Pyro's ``MaskedDistribution``, whose mask says which elements of the batch have
a density at all. Neither changes what is drawn.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
    TorchDistribution,
)
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    TransformedDistribution,
    VonMises,
    constraints,
)
from torch.distributions.transforms import ComposeTransform, IndependentTransform

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


def unwrapped(distribution: Any) -> Any:
    """The distribution inside wrappers that leave the values' dimensions as they are."""
    while isinstance(distribution, (MaskedDistribution, ExpandedDistribution, ZukoToPyro)):
        zuko = isinstance(distribution, ZukoToPyro)
        if zuko and type(distribution).support is not ZukoToPyro.support:
            break  # a class derived from it that declares its own
        distribution = distribution.dist if zuko else distribution.base_dist
    return distribution


def stated_support(distribution: Any) -> Any:
    """The constraint that a distribution declares; ``None`` for a family that does not say (zuko's
    flows)."""
    try:
        return unwrapped(distribution).support
    except (AttributeError, NotImplementedError):
        return None


def innermost_constraint(constraint: Any) -> Any:
    """That of one element."""
    while hasattr(constraint, "base_constraint"):  # independent, and of mixtures since torch 2.7
        constraint = constraint.base_constraint
    return constraint


def support(distribution: Any) -> Any:
    """The constraint that a distribution declares for one element; ``None`` if it does not say."""
    return innermost_constraint(stated_support(distribution))


def steps(transforms: Iterable[Any]) -> list[Any]:
    """Transforms one after the other, those inside compositions too."""
    found = []
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            found += steps(transform.parts)
        elif isinstance(transform, IndependentTransform):
            found += steps([transform.base_transform])
        else:
            found.append(transform)
    return found


def reaches_less_than_stated(distribution: Any) -> bool:
    """Whether a transformed distribution states its last transform's codomain as support and some
    transform receives less than its domain.

    A class with a ``support`` of its own, e.g. Pareto, is taken at its word.
    """
    stated = getattr(type(distribution), "support", None)
    if stated is not TransformedDistribution.support:
        return False
    received = stated_support(distribution.base_dist)
    for transform in steps(distribution.transforms):
        if received is None or not _same(received, transform.domain):
            return True
        received = transform.codomain
    return False


def _ends(constraint: Any) -> tuple[Any, Any] | None:
    if constraint is constraints.real:
        return -math.inf, math.inf
    if not _has_bounds(constraint):
        return None
    low = getattr(constraint, "lower_bound", -math.inf)
    return low, getattr(constraint, "upper_bound", math.inf)


def _has_bounds(constraint: Any) -> bool:
    return hasattr(constraint, "lower_bound") or hasattr(constraint, "upper_bound")


def _same(one: Any, other: Any) -> bool:
    """Whether two constraints allow the same values, up to the ends of intervals."""
    one, other = innermost_constraint(one), innermost_constraint(other)
    ends, others = _ends(one), _ends(other)
    if ends is None or others is None:
        return type(one) is type(other)
    pairs = zip(ends, others, strict=True)
    on_host = [[torch.as_tensor(end, device="cpu") for end in pair] for pair in pairs]
    return all(bool((a == b).all()) for a, b in on_host)


def within_bounds(distribution: Any, value: Tensor) -> Tensor | None:
    """Which elements of ``value`` lie between the bounds of the support, where it has bounds.

    What else a support asks for, such as a sum of 1, may hold up to rounding only. Of a transformed
    distribution that reaches less than it states, all elements of an event are judged together, by
    what its transforms have made them of, up to rounding.
    """
    inner = unwrapped(distribution)
    while is_of(inner, Independent):
        inner = unwrapped(inner.base_dist)
    if not reaches_less_than_stated(inner):
        found = support(inner)
        return found.check(value) if _has_bounds(found) else None
    slack = 8 * torch.finfo(value.dtype).eps * value.abs().clamp(min=1.0)
    nearby = [_made_of(inner, value + sign * slack) for sign in (-1.0, 0.0, 1.0)]
    inside = torch.stack(nearby).any(0)
    return inside.reshape(inside.shape + (1,) * len(inner.event_shape)).expand(value.shape)


def _made_of(distribution: Any, value: Tensor) -> Tensor:
    """Which events of ``value`` a transformed distribution can draw."""
    lead = value.shape[: value.dim() - len(distribution.event_shape)]
    inside = torch.ones(lead, dtype=torch.bool, device=value.device)
    for transform in reversed(steps(distribution.transforms)):
        codomain = innermost_constraint(transform.codomain)
        if _has_bounds(codomain):
            inside = inside & codomain.check(value).reshape(*lead, -1).all(-1)
        value = transform.inv(value)
    base = within_bounds(distribution.base_dist, value)
    return inside if base is None else inside & base.reshape(*lead, -1).all(-1)


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
