r"""The support of a latent site, and the way to it from the unconstrained scale.

A chain moves :math:`u \in \mathbb{R}^d`; the site's value is :math:`z = T(u)` for a bijection T
onto the support of its distribution, and :math:`\log |\det T'(u)|` enters the energy. A wrong
support is a wrong density. So what a distribution says of itself is taken only where it is the
whole truth:

* a mixture has the support of its components, which must agree on it;
* a wrapper (masked, expanded, independent, zuko's in Pyro) has that of what it wraps;
* a transformed distribution has the codomain of its last transform where every transform receives
  all it is defined on, else what the transforms reach from the support of the base distribution:
  :math:`2 \exp(v) - 1` is never below -1, though an affine transform has all numbers as codomain;
* bounds must be the same for all images;
* a distribution that says nothing is unconstrained if its density shows it.

Torch's bijections are taken, but for that of the simplex: its last element is computed as what the
others leave of one, which rounds all that is below some 1e-7 in float32. The mass of a sparse
``Dirichlet`` lies there (:class:`StickBreaking`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import VonMises, constraints
from torch.nn.functional import logsigmoid

from pyro_vae_defence.ops.distributions import (
    innermost_constraint,
    is_discrete,
    reaches_less_than_stated,
    stated_support,
    unwrapped,
)

# Where the density on all real numbers has to be finite, and where it has to be lower than at a
# draw by some nats: neither half of a line nor a period of a circle.
_SPREAD = (-100.0, -10.0, -1.0, -0.1, 0.1, 1.0, 10.0, 100.0)
_FAR, _LOWER = (-1e6, 1e6), 5.0


def transform_of(fn: Any, value: Tensor) -> td.Transform | None:
    """The transform from the unconstrained scale to the support of a latent site.

    Args:
        fn: the site's distribution.
        value: a draw from it, rows first.

    Returns:
        A bijection, for any number of rows; ``None`` where the support is all real numbers.

    Raises:
        ValueError: if the support is discrete, not known, without a bijection, or differs between
            rows; the message begins with the distribution's name.
    """
    if is_discrete(fn) or not value.is_floating_point():
        raise ValueError(
            f"{_title(fn)} is discrete; Hamiltonian kernels need continuous latents, so "
            "marginalise it out or use a continuous relaxation"
        )
    with torch.no_grad():
        transform = _transform(fn, value)
        if transform is not None and transform(transform.inv(value[:1])).shape != value[:1].shape:
            raise ValueError(
                f"{_title(fn)} has transforms with parameters per image; give the parameters one "
                "row, or declare its `support`"
            )
    return transform


def _transform(fn: Any, value: Tensor) -> td.Transform | None:
    fn = unwrapped(fn)
    if isinstance(fn, td.Independent):
        inner, events = _transform(fn.base_dist, value), fn.reinterpreted_batch_ndims
        if inner is None or events == 0:
            return inner
        return td.transforms.IndependentTransform(inner, events)
    if reaches_less_than_stated(fn):
        first = _transform(fn.base_dist, value)
        parts = fn.transforms if first is None else [first, *fn.transforms]
        return td.transforms.ComposeTransform(parts)
    support = _map_bounds(_support(fn, value), lambda bound: _one_row(fn, bound, value))
    if innermost_constraint(support) is constraints.real:
        return None
    try:
        return _exact(td.biject_to(support))
    except NotImplementedError:
        raise ValueError(
            f"{_title(fn)} has the support {support}, which no bijection from the unconstrained "
            "scale is known for; register one with torch.distributions.biject_to.register"
        ) from None


class StickBreaking(td.StickBreakingTransform):
    r"""Torch's transform onto the simplex, by logarithms: small elements are exact, too.

    With :math:`v_k = u_k - \log(K - k)` for :math:`k = 1, \dots, K - 1`,

    .. math:: \log z_k = \log\sigma(v_k) + \sum_{j < k} \log\sigma(-v_j), \qquad
              \log z_K = \sum_{j < K} \log\sigma(-v_j).
    """

    def _call(self, x: Tensor) -> Tensor:
        parts, left = self._logarithms(x)
        logs = torch.cat([parts, left[..., -1:]], -1)
        return logs.exp().clamp(min=torch.finfo(x.dtype).tiny)

    def _inverse(self, y: Tensor) -> Tensor:
        y = y.clamp(min=torch.finfo(y.dtype).tiny)
        left = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        return y[..., :-1].log() - left.log() + self._offset(left)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Of :math:`z_1, \dots, z_{K-1}` with respect to u."""
        parts, _ = self._logarithms(x)
        return (parts + logsigmoid(self._offset(x) - x)).sum(-1)

    def _logarithms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log z_1 to z_{K-1}, and logarithms of what is left after each."""
        v = x - self._offset(x)
        left = logsigmoid(-v).cumsum(-1)
        before = torch.cat([torch.zeros_like(left[..., :1]), left[..., :-1]], -1)
        return logsigmoid(v) + before, left

    def _offset(self, x: Tensor) -> Tensor:
        number = x.shape[-1]
        return torch.arange(number, 0, -1, dtype=x.dtype, device=x.device).log()


def _exact(transform: td.Transform) -> td.Transform:
    """A transform with torch's onto the simplex replaced by ours."""
    if isinstance(transform, td.IndependentTransform):
        inner = _exact(transform.base_transform)
        return td.IndependentTransform(inner, transform.reinterpreted_batch_ndims)
    return StickBreaking() if type(transform) is td.StickBreakingTransform else transform


def _support(fn: Any, value: Tensor) -> Any:
    fn = unwrapped(fn)
    if isinstance(fn, td.MixtureSameFamily):
        components = fn._component_distribution
        dim = -1 - len(components.event_shape)
        support = _support(components, value.unsqueeze(dim))
        return _map_bounds(support, lambda bound: _one_component(fn, bound, dim))
    if reaches_less_than_stated(fn):
        raise ValueError(
            f"{_title(fn)} is transformed onto less than its transforms' codomain, as part of a "
            "mixture; derive a class from it and declare its `support`"
        )
    if isinstance(fn, VonMises):
        return constraints.interval(-math.pi, math.pi)  # torch declares all numbers
    support = stated_support(fn)
    if support is None:
        _check_unconstrained(fn, value)
        return constraints.real
    return support


def _check_unconstrained(fn: Any, value: Tensor) -> None:
    """Refuse a distribution without a support unless its density is one on all real numbers."""
    if value.is_meta:
        return
    # Of zuko's flows, whose splines know no bounds.
    base = stated_support(getattr(fn, "base", None))
    if base is None or innermost_constraint(base) is constraints.real:
        tails = fn.log_prob(value) - _LOWER
        finite = all(bool(fn.log_prob(value * 0 + at).isfinite().all()) for at in _SPREAD)
        if finite and not any(bool((fn.log_prob(value * 0 + at) > tails).any()) for at in _FAR):
            return
    raise ValueError(
        f"{_title(fn)} declares no support, and its density does not show it to be unconstrained; "
        "declare `support`, e.g. support = torch.distributions.constraints.positive in its class"
    )


# --- What distributions say -----------------------------------------------------------------------


def _title(fn: Any) -> str:
    return f"{type(fn).__name__} of shape {tuple(fn.batch_shape)}, {tuple(fn.event_shape)}"


def _map_bounds(support: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The constraint with every bound that is a tensor replaced; itself if there is none."""
    parts = dict(vars(support))
    for name, part in parts.items():
        if isinstance(part, constraints.Constraint):
            parts[name] = _map_bounds(part, change)
        elif isinstance(part, Tensor):
            parts[name] = change(part)
    if all(part is getattr(support, name) for name, part in parts.items()):
        return support  # ``real`` and ``positive`` are known by identity
    changed = copy.copy(support)
    vars(changed).update(parts)
    return changed


def _one_row(fn: Any, bound: Tensor, value: Tensor) -> Tensor:
    if bound.dim() < value.dim():
        return bound
    if not (bound.is_meta or bool((bound == bound[:1]).all())):
        raise ValueError(
            f"{_title(fn)} has a support that differs between images; sample a latent of fixed "
            "support and transform it in the program"
        )
    return bound[:1]


def _one_component(fn: Any, bound: Tensor, dim: int) -> Tensor:
    if bound.dim() < -dim:
        return bound
    first = bound.select(dim, 0)
    if not (bound.is_meta or bool((bound == first.unsqueeze(dim)).all())):
        raise ValueError(
            f"{_title(fn)} has components of different supports, which no bijection covers; give "
            "them one support"
        )
    return first
