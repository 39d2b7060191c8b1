"""What objectives read of a VAE's two traces beside their sites: Gaussian latents, the decoder's
mean, mean field.

As in :mod:`pyro_vae_defence.models.sites`, the axis of plate ``"data"`` comes first, so that ``N``
rows come out whatever other plates, event shapes or number of latent sites a program has.
"""

from __future__ import annotations

import torch
from pyro.distributions import Independent, Normal
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae_defence.models.sites import Site, image_site, latent_sites, rows


def decoder_mean(model_trace: Trace, x: Tensor) -> Tensor:
    """Mean of the image's distribution, in the shape of the images ``x``."""
    site = image_site(model_trace)
    try:
        mean = site["fn"].mean
    except NotImplementedError:
        raise ValueError(
            f"site {site['name']!r} has a {type(site['fn']).__name__} without a mean; "
            "this objective re-encodes the decoder's mean and needs one"
        ) from None
    return rows(mean, site, site["fn"].event_dim).reshape(x.shape)


def _normal(site: Site) -> Normal:
    fn = site["fn"]
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if not isinstance(fn, Normal):
        raise ValueError(
            f"site {site['name']!r} is {type(fn).__name__}; this objective needs Gaussian latents: "
            "sample pyro.distributions.Normal(loc, scale).to_event()"
        )
    return fn


def gaussians(sites: list[Site]) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of Gaussian sites, each ``(N, D)``, ``D`` over all sites.

    Raises ``ValueError`` for a site that is not Gaussian with diagonal covariance.
    """
    locs, scales = [], []
    for site in sites:
        normal, event_dim = _normal(site), site["fn"].event_dim
        locs.append(rows(normal.loc, site, event_dim))
        scales.append(rows(normal.scale, site, event_dim))
    return torch.cat(locs, 1), torch.cat(scales, 1)


def values(sites: list[Site]) -> Tensor:
    """Sampled latents ``(N, D)``, in the order of :func:`gaussians`."""
    return torch.cat([rows(site["value"], site, site["fn"].event_dim) for site in sites], 1)


def check_mean_field(*traces: Trace) -> None:
    """Refuse a hierarchy: the distribution of one latent site depends on another site's sample.

    An objective that compares q(z | x) with q(z | x') in closed form means the joint posterior; for
    a hierarchy the parameters seen in one trace are those of a conditional. The autograd graph
    tells the two apart (when there is one), at no cost for a single site.
    """
    for trace in traces:
        sites = latent_sites(trace)
        samples = [site["value"] for site in sites if site["value"].requires_grad]
        if len(sites) < 2 or not samples:
            continue
        # With the values detached, only the distributions' parameters can lead back to a sample.
        log_probs = [site["fn"].log_prob(site["value"].detach()).sum() for site in sites]
        total = torch.stack(log_probs).sum()
        if not total.requires_grad:
            continue
        found = torch.autograd.grad(total, samples, retain_graph=True, allow_unused=True)
        if any(gradient is not None for gradient in found):
            names = [site["name"] for site in sites]
            raise ValueError(
                f"latent sites {names} depend on each other; this objective needs sites that are "
                "independent given the image (mean field); train a hierarchy with BetaELBO"
            )
