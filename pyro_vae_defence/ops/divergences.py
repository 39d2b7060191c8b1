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
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from pyro_vae_defence.ops.latents import sum_sites

Posterior = Mapping[str, Distribution]


def kl(p: Posterior, q: Posterior) -> Tensor:
    """KL(p || q) per image, in nats."""
    return _over_sites(p, q, _kl_site)


def symmetric_kl(p: Posterior, q: Posterior) -> Tensor:
    """Half the sum of both KL-divergences per image, in nats (Table 1 of the paper)."""
    return 0.5 * (kl(p, q) + kl(q, p))


def squared_mean_distance(p: Posterior, q: Posterior) -> Tensor:
    """Squared Euclidean distance between the means per image (appendix C.6 of the paper)."""
    return _over_sites(p, q, lambda a, b: (a.mean - b.mean).square())


def squared_wasserstein(p: Posterior, q: Posterior) -> Tensor:
    """Squared 2-Wasserstein distance between factorised Gaussians per image."""
    return _over_sites(p, q, _squared_wasserstein_site)


def _kl_site(p: Distribution, q: Distribution) -> Tensor:
    try:
        return kl_divergence(p, q)
    except NotImplementedError as error:
        raise ValueError(
            f"no KL-divergence is registered between {p} and {q}; register one with "
            "torch.distributions.kl.register_kl, or compare means with squared_mean_distance"
        ) from error


def _squared_wasserstein_site(p: Distribution, q: Distribution) -> Tensor:
    for distribution in (p, q):
        base = distribution
        while isinstance(base, Independent):
            base = base.base_dist
        if not isinstance(base, Normal):
            raise ValueError(
                f"squared_wasserstein needs factorised Gaussian distributions, got {distribution}; "
                "use symmetric_kl for other families"
            )
    return (p.mean - q.mean).square() + (p.stddev - q.stddev).square()


def _over_sites(
    p: Posterior, q: Posterior, divergence: Callable[[Distribution, Distribution], Tensor]
) -> Tensor:
    if p.keys() != q.keys():
        raise ValueError(
            f"both arguments must have the same latent sites, got {sorted(p)} and {sorted(q)}"
        )
    return sum_sites({name: divergence(p[name], q[name]) for name in p})
