"""Sites of a traced program: which are latent, which is the image, and values per image.

The only reader of traces: :mod:`pyro_vae_defence.models.program` and the objectives ask here. The
axis of the data plate comes first, so that ``N`` rows come out whatever other plates, event shapes
or number of latent sites a program has.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent, Normal
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae_defence.types import PyroProgram

Site: TypeAlias = Any

DATA_PLATE = "data"


def get_trace(program: PyroProgram, *args: Any, **kwargs: Any) -> Trace:
    """The trace of a run that no handler from outside sees, without Pyro's validation.

    Validation would force a device synchronisation per distribution, and raise inside a sampler
    where a non-finite value has a defined meaning (a divergence).
    """
    with poutine.block(), pyro.validation_enabled(False):
        return poutine.trace(program).get_trace(*args, **kwargs)


# --- Which sites there are ------------------------------------------------------------------------


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
    """The one observed site other than those ``conditioned``; ``ValueError`` if not just one."""
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


# --- Values per image -----------------------------------------------------------------------------


class DataFrame(NamedTuple):
    """Where a site has its rows: the dimension of the data plate, and how many there are."""

    name: str
    dim: int
    size: int


def data_frame(site: Site, num_images: int | None = None) -> DataFrame:
    """The data plate a site stands in: the one called ``"data"``, or else the leftmost.

    Raises:
        ValueError: if there is none, or it has not ``num_images`` rows, where that is given.
    """
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    named = [frame for frame in frames if frame.name == DATA_PLATE]
    if not frames:
        raise ValueError(
            f"site {site['name']!r} stands in no data plate. If it has a value per image, open "
            f'pyro.plate("{DATA_PLATE}", x.shape[0]) around it; if it is global, shared by all '
            "images, give it a value first, e.g. "
            f"poutine.condition(vae.model, data={{{site['name']!r}: value}}), and drop it from the "
            "guide"
        )
    frame = named[0] if named else min(frames, key=lambda frame: frame.dim)
    size = frame.size
    if size < 0:
        # A plate without a size takes what its sites bring along.
        batch = site["fn"].batch_shape
        size = batch[frame.dim] if len(batch) >= -frame.dim else 1
    if num_images not in (None, size):
        raise ValueError(
            f"site {site['name']!r} has {size} rows in its data plate {frame.name!r}, but x holds "
            f"{num_images} images; open the plate with x.shape[0]"
        )
    return DataFrame(frame.name, frame.dim, size)


def per_image(value: Tensor, site: Site, num_images: int | None = None) -> Tensor:
    """Sum of one value per batch element (a log-probability, a KL) within each image, ``(N,)``.

    Raises ``ValueError`` as :func:`data_frame`, or if the value has no row per image.
    """
    frame = data_frame(site, num_images)
    if value.dim() < -frame.dim or value.shape[frame.dim] not in (1, frame.size):
        raise ValueError(
            f"site {site['name']!r}: its log-probability of shape {tuple(value.shape)} has no row "
            f"per image at dimension {frame.dim}; declare event dimensions with .to_event(...)"
        )
    rows = value.movedim(frame.dim, 0)
    return rows.reshape(rows.shape[0], -1).sum(-1).expand(frame.size)


def log_prob_per_image(site: Site, num_images: int) -> Tensor:
    """Log-probability of a site within each image, masked as it says but not scaled: ``(N,)``."""
    log_prob = site["fn"].log_prob(site["value"])
    return per_image(scale_and_mask(log_prob, mask=site["mask"]), site, num_images)


def image_rows(value: Tensor, site: Site) -> Tensor:
    """``value``, of the site's batch and event shape, as ``(N, everything else)``."""
    return value.movedim(data_frame(site).dim - site["fn"].event_dim, 0).flatten(1)


def latent_values(sites: list[Site]) -> Tensor:
    """Sampled latents of all sites, ``(N, D)``."""
    return torch.cat([image_rows(site["value"], site) for site in sites], 1)


def gaussians(sites: list[Site]) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of Gaussian sites, each ``(N, D)``, as :func:`latent_values`.

    Raises ``ValueError`` for a site that is not Gaussian with diagonal covariance.
    """
    locs, scales = [], []
    for site in sites:
        fn = site["fn"]
        while isinstance(fn, Independent):
            fn = fn.base_dist
        if not isinstance(fn, Normal):
            raise ValueError(
                f"site {site['name']!r} is {type(fn).__name__}; this objective needs Gaussian "
                "latents: sample pyro.distributions.Normal(loc, scale).to_event()"
            )
        locs.append(image_rows(fn.loc, site))
        scales.append(image_rows(fn.scale, site))
    return torch.cat(locs, 1), torch.cat(scales, 1)


def decoder_mean(model_trace: Trace, x: Tensor) -> Tensor:
    """Mean of the image's distribution, in the shape of ``x``; ``ValueError`` if it has none."""
    site = image_site(model_trace)
    try:
        mean = site["fn"].mean
    except NotImplementedError:
        raise ValueError(
            f"site {site['name']!r} has a {type(site['fn']).__name__} without a mean; "
            "this objective re-encodes the decoder's mean and needs one"
        ) from None
    return image_rows(mean, site).reshape(x.shape)
