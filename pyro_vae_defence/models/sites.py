"""Sites of a traced program: which are latent, which is the image, and values per image.

:mod:`pyro_vae_defence.models.program` and the objectives read their traces with these.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Site = Any

DATA_PLATE = "data"


def sample_sites(trace: Trace) -> dict[str, Site]:
    """Sample sites with a density: neither plates' subsampling nor ``pyro.deterministic``."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not (site["infer"] or {}).get("_deterministic")
    }


def latent_sites(trace: Trace) -> list[Site]:
    """The sites a program samples, in program order.

    The order of the guide may differ from the model's; index the other trace by name.
    """
    return [site for site in sample_sites(trace).values() if not site["is_observed"]]


def image_site(model_trace: Trace, conditioned: Container[str] = ()) -> Site:
    """The one site at which the model observes the image; sites ``conditioned`` from outside are
    not it.

    Raises:
        ValueError: if the model observes nothing, or more than one site.
    """
    observed = [
        site
        for name, site in sample_sites(model_trace).items()
        if site["is_observed"] and name not in conditioned
    ]
    if len(observed) != 1:
        names = [site["name"] for site in observed]
        raise ValueError(
            f"model must observe the image at exactly one site, found {names or 'none'}; "
            'write pyro.sample("obs", likelihood, obs=x) once, and make other observations '
            "pyro.deterministic"
        )
    return observed[0]


def rows(value: Tensor, site: Site, event_dim: int = 0) -> Tensor:
    """``value``, with the site's batch axes and ``event_dim`` more, as ``(N, everything else)``.

    The axis of plate ``"data"`` comes first, whatever other plates the site stands in.

    Raises:
        ValueError: if the site stands outside that plate.
    """
    for frame in site["cond_indep_stack"]:
        if frame.name == DATA_PLATE:
            return value.movedim(frame.dim - event_dim, 0).flatten(1)
    raise ValueError(
        f"site {site['name']!r} lies outside plate 'data'; "
        'open pyro.plate("data", x.shape[0]) around every sample site'
    )


def per_image(value: Tensor, site: Site) -> Tensor:
    """Sum of one value per batch element (a log-probability, a KL) within each image, ``(N,)``."""
    return rows(value.unsqueeze(-1), site, event_dim=1).sum(1)
