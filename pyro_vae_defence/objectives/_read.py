"""Reading the traces of a VAE's two programs: latent sites, the image site, values per image.

Every reader puts the axis of plate ``"data"`` first, so that ``N`` rows come out whatever other
plates, event shapes or number of latent sites a program has.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Independent, Normal
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Site = Any


def rows(value: Tensor, site: Site, event_dim: int = 0) -> Tensor:
    """``value``, with the site's batch axes and ``event_dim`` more, as ``(N, everything else)``."""
    for frame in site["cond_indep_stack"]:
        if frame.name == "data":
            return value.movedim(frame.dim - event_dim, 0).flatten(1)
    raise ValueError(
        f"site {site['name']!r} lies outside plate 'data'; "
        'open pyro.plate("data", x.shape[0]) around every sample site'
    )


def per_image(value: Tensor, site: Site) -> Tensor:
    """Sum of one value per batch element (a log-probability, a KL) within each image, ``(N,)``."""
    return rows(value.unsqueeze(-1), site, event_dim=1).sum(1)


def latent_sites(trace: Trace) -> list[Site]:
    """The sites a program samples (neither observed nor a plate's subsample), in program order.

    The order of the guide may differ from the model's; index the other trace by name.
    """
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    ]


def image_site(model_trace: Trace) -> Site:
    """The one site at which the model observes the image."""
    observed = [
        site
        for site in model_trace.nodes.values()
        if site["type"] == "sample"
        and site["is_observed"]
        and not (site["infer"] or {}).get("_deterministic")
    ]
    if len(observed) != 1:
        names = [site["name"] for site in observed]
        raise ValueError(
            f"model must observe the image at exactly one site, not at {names}; "
            "sample it with obs=x and make other observations pyro.deterministic"
        )
    return observed[0]


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
