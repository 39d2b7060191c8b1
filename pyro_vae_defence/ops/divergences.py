r"""Divergences between the guide's distributions at two inputs, one value per image.

For independent Gaussians :math:`q = N(m, s^2)` and :math:`q' = N(m', s'^2)`,

.. math::
    \mathrm{KL}(q \| q') = \sum_d \log\frac{s'_d}{s_d}
        + \frac{s_d^2 + (m_d - m'_d)^2}{2 s_d'^2} - \frac12,
    \qquad
    \mathrm{SKL} = \tfrac12 \mathrm{KL}(q \| q') + \tfrac12 \mathrm{KL}(q' \| q),
    \qquad
    W_2^2 = \sum_d (m_d - m'_d)^2 + (s_d - s'_d)^2 .

Other families go through :func:`torch.distributions.kl_divergence`. Arguments are dicts from site
name to distribution with batch shape ``(N,)``; several sites add up. Results have shape ``(N,)``.

Elements that a mask leaves out, in either argument, count for nothing. A ``Delta`` has no density:
only its mean can be compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.transforms import Normalize
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import (
    Distribution,
    HalfCauchy,
    HalfNormal,
    Normal,
    TransformedDistribution,
    kl_divergence,
)
from torch.distributions.kl import _KL_REGISTRY
from torch.distributions.transforms import (
    AbsTransform,
    ComposeTransform,
    IndependentTransform,
    SoftmaxTransform,
)

from pyro_vae_defence.ops.distributions import (
    counted,
    innermost,
    is_angle,
    is_of,
    is_point,
    mean,
    own_methods,
    wrapped,
)
from pyro_vae_defence.ops.latents import sum_sites

Posterior = Mapping[str, Distribution]
_FOLDS = (AbsTransform, Normalize, SoftmaxTransform)


def kl(p: Posterior, q: Posterior) -> Tensor:
    """KL(p || q) per image, in nats."""
    return _over_sites(p, q, _kl_site)


def symmetric_kl(p: Posterior, q: Posterior) -> Tensor:
    """Half the sum of both KL-divergences per image, in nats (Table 1 of the paper)."""
    return 0.5 * (kl(p, q) + kl(q, p))


def squared_mean_distance(p: Posterior, q: Posterior) -> Tensor:
    """Squared Euclidean distance between the means per image (appendix C.6 of the paper)."""
    return _over_sites(p, q, _squared_mean_distance_site)


def squared_wasserstein(p: Posterior, q: Posterior) -> Tensor:
    """Squared 2-Wasserstein distance between factorised Gaussians per image."""
    return _over_sites(p, q, _squared_wasserstein_site)


def known_kl(p: Distribution, q: Distribution) -> Tensor:
    """KL(p || q) in closed form, in the batch shape.

    Raises:
        NotImplementedError: if none is registered, or only one of classes that a user's class with
            a density of its own derives from, or of what stands before a transform that is not
            one to one.
    """
    if any(map(_is_folded, (p, q))):
        raise NotImplementedError("a divergence changes under a transform that is not one to one")
    # What is registered for wrappers is that of what is inside.
    layers = _layers(p), _layers(q)
    for position, own in enumerate(layers):
        kind = next((kind for kind in own if "log_prob" in own_methods(kind, object)), None)
        if kind is None:
            continue
        families = {
            pair[position]
            for pair in _KL_REGISTRY
            if any(issubclass(other, pair[1 - position]) for other in layers[1 - position])
        }
        family = next((base for base in kind.__mro__ if base in families), None)
        if family is not None and "log_prob" in own_methods(kind, family):
            raise NotImplementedError(
                f"{kind.__name__} has a log_prob of its own, which may be another density than "
                f"that of {family.__name__}"
            )
    return kl_divergence(p, q)


def _is_folded(distribution: Distribution) -> bool:
    """Whether several draws of what it transforms become one, as with an absolute value.

    Half Gaussians and half Cauchys fold what is symmetric, which changes no divergence.
    """
    inside = innermost(distribution)
    if isinstance(inside, (HalfNormal, HalfCauchy)) or not isinstance(
        inside, TransformedDistribution
    ):
        return False
    parts = ComposeTransform(inside.transforms).parts
    folds = any(isinstance(_base_transform(part), _FOLDS) for part in parts)
    return folds or _is_folded(inside.base_dist)


def _base_transform(transform: Any) -> Any:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform


def _layers(distribution: Distribution) -> list[type]:
    """Classes of a distribution, of what it wraps, and so on."""
    kinds: list[type] = []
    inner: Any = distribution
    while inner is not None:
        kinds.append(type(inner))
        inner = getattr(inner, "base_dist", None)
    return kinds


def _kl_site(site: str, p: Distribution, q: Distribution) -> Tensor:
    if is_point(p) or is_point(q):
        raise ValueError(
            f"site {site!r} is a Delta: a point has no density and no KL-divergence; "
            "compare means (attacks.mean_distance) or outputs (attacks.maximum_damage)"
        )
    count: Tensor | bool = True
    bare = []
    for distribution in (p, q):
        while isinstance(distribution, MaskedDistribution):
            count = distribution._mask & count
            distribution = distribution.base_dist
        bare.append(distribution)
    try:
        divergence = known_kl(*bare)
    except NotImplementedError as error:
        raise ValueError(
            f"site {site!r}: no KL-divergence is registered between {bare[0]} and {bare[1]}: "
            f"{error}; register one for these classes with torch.distributions.kl.register_kl, or "
            "compare means (attacks.mean_distance) or outputs (attacks.maximum_damage)"
        ) from error
    return _counting(divergence, count)


def _squared_mean_distance_site(site: str, p: Distribution, q: Distribution) -> Tensor:
    mend = "compare distributions (attacks.symmetric_kl) or outputs (attacks.maximum_damage)"
    difference = mean(p, site, mend) - mean(q, site, mend)
    if is_angle(p):
        difference = wrapped(difference)
    return _counting(difference.square(), counted(p) & counted(q))


def _squared_wasserstein_site(site: str, p: Distribution, q: Distribution) -> Tensor:
    for distribution in (p, q):
        if not is_of(innermost(distribution), Normal):
            raise ValueError(
                f"site {site!r}: squared_wasserstein needs factorised Gaussian distributions, "
                f"got {distribution}; use attacks.{_known_objective(site, p, q)}"
            )
    square = (p.mean - q.mean).square() + (p.stddev - q.stddev).square()
    return _counting(square, counted(p) & counted(q))


def _known_objective(site: str, p: Distribution, q: Distribution) -> str:
    """The objective that compares such distributions, or else their images."""
    for name, divergence in (
        ("symmetric_kl", _kl_site),
        ("mean_distance", _squared_mean_distance_site),
    ):
        with contextlib.suppress(ValueError):
            divergence(site, p, q)
            return name
    return "maximum_damage"


def _counting(value: Tensor, count: Tensor | bool) -> Tensor:
    return value if count is True else scale_and_mask(value, mask=count)


def _over_sites(
    p: Posterior, q: Posterior, divergence: Callable[[str, Distribution, Distribution], Tensor]
) -> Tensor:
    if p.keys() != q.keys():
        raise ValueError(
            f"both arguments must have the same latent sites, got {sorted(p)} and {sorted(q)}"
        )
    return sum_sites({name: divergence(name, p[name], q[name]) for name in p})
