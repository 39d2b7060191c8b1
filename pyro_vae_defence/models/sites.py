"""Sites of a traced program: which are latent, which is the image, and values per image.

The only reader of traces: :mod:`pyro_vae_defence.models.program` and the objectives ask here. The
axis of the data plate comes first, so that ``N`` rows come out whatever other plates, event shapes
or number of latent sites a program has.
"""

from __future__ import annotations

import contextlib
import enum
from typing import Any, NamedTuple, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.distributions import Normal
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae_defence.ops.distributions import (
    counted,
    innermost,
    is_discrete,
    is_of,
    is_point,
)
from pyro_vae_defence.types import PyroProgram

Site: TypeAlias = Any

DATA_PLATE = "data"


def get_trace(program: PyroProgram, *args: Any, **kwargs: Any) -> Trace:
    """The trace of a run that no handler from outside sees, without Pyro's validation.

    Validation would force a device synchronisation per distribution, and raise inside a sampler
    where a non-finite value has a defined meaning (a divergence).
    """
    with poutine.block(), KeepFrozen(), AnyNumber(), pyro.validation_enabled(False):
        try:
            return poutine.trace(program).get_trace(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            # Pyro raises a copy with the shapes of all sites, one for each handler.
            first: BaseException = error
            while type(first.__cause__) is type(error):
                first = first.__cause__
            raise first from None


class KeepFrozen(Messenger):
    """Keeps the frozen parameters of a ``PyroModule`` frozen.

    Pyro's store has every parameter that it is given require a gradient, for good. ``pyro.module``
    gives it none that is frozen, a ``PyroModule`` gives it all.
    """

    def _pyro_param(self, msg: Any) -> None:
        given = (v for v in msg["args"] if isinstance(v, nn.Parameter))
        self._frozen = [parameter for parameter in given if not parameter.requires_grad]

    def _pyro_post_param(self, msg: Any) -> None:
        for parameter in self._frozen:  # not the store's value, which another network may train
            parameter.requires_grad_(False)


class AnyNumber(Messenger):
    """Lets a plate subsample more rows than it has: ``subsample_size=len(x)`` of folded images.

    Pyro would hand out as many as there are, and complain.
    """

    def _pyro_sample(self, msg: Any) -> None:
        number = getattr(msg["fn"], "subsample_size", None) if site_is_subsample(msg) else None
        if msg["value"] is None and number is not None and number > msg["fn"].size:
            msg["value"] = torch.arange(number, device=msg["fn"].device)


def aside(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """While it lasts, random numbers are drawn that nobody will miss."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


# --- Which sites there are ------------------------------------------------------------------------


class Kind(enum.Enum):
    """What a sample site of a trace is.

    Masks are another matter: any site with a density may stand under one.
    """

    PLATE = "the subsampling of a plate"
    DETERMINISTIC = "pyro.deterministic, or what poutine.reparam leaves of a site"
    OBSERVED = "the image, another observation, a value conditioned on, or a pyro.factor"
    AUXILIARY = "noise of a guide alone, of which Deltas make latents: infer is_auxiliary"
    POINT = "a latent that is a Delta, and has no density but its log_density"
    DISCRETE = "a latent with discrete support"
    LATENT = "any other latent"


def kind(site: Site) -> Kind:
    """The kind of a sample site."""
    infer = site["infer"] or {}
    if site_is_subsample(site):
        return Kind.PLATE
    if infer.get("_deterministic"):
        return Kind.DETERMINISTIC
    if site["is_observed"]:
        replaced = is_point(site["fn"]) and counted(site["fn"]) is False
        return Kind.DETERMINISTIC if replaced else Kind.OBSERVED
    if infer.get("is_auxiliary"):
        return Kind.AUXILIARY
    if is_point(site["fn"]):
        return Kind.POINT
    return Kind.DISCRETE if is_discrete(site["fn"]) else Kind.LATENT


def _of_kind(trace: Trace, *kinds: Kind) -> list[Site]:
    sites = (site for site in trace.nodes.values() if site["type"] == "sample")
    return [site for site in sites if kind(site) in kinds]


def _names(sites: list[Site]) -> list[str]:
    return [site["name"] for site in sites]


def sample_sites(trace: Trace) -> dict[str, Site]:
    """Sample sites with a density: neither plates' subsampling nor deterministic ones."""
    without = (Kind.PLATE, Kind.DETERMINISTIC)
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and kind(site) not in without
    }


def latent_sites(trace: Trace) -> list[Site]:
    """The latents a program samples, in program order, without a guide's auxiliary noise.

    The order of the guide may differ from the model's; index the other trace by name.
    """
    return _of_kind(trace, Kind.LATENT, Kind.POINT, Kind.DISCRETE)


def observed_sites(model_trace: Trace) -> list[Site]:
    """All that a model observes, in program order: the image, other data, every ``pyro.factor``.

    A latent conditioned on is observed too. Raises ``ValueError`` if there is nothing.
    """
    sites = _of_kind(model_trace, Kind.OBSERVED)
    if not sites:
        raise ValueError(
            "model observes nothing; write pyro.sample('obs', likelihood, obs=x) for the image"
        )
    return sites


def auxiliary_sites(guide_trace: Trace) -> list[Site]:
    """The noise of a guide of which Deltas make latents, in program order."""
    return _of_kind(guide_trace, Kind.AUXILIARY)


def made_of_noise(guide_trace: Trace) -> list[str]:
    """Names of the Deltas that a guide makes of auxiliary noise; any other is a function of x.

    A trace does not say what a value was computed from. Deltas take, in program order, the noise
    sampled before them, one number per element, and the last one may get less: a point of a simplex
    has an element more than dimensions.
    """
    return _match_noise(guide_trace)[0]


def _match_noise(guide_trace: Trace) -> tuple[list[str], int]:
    """Names as above, and how many numbers of noise no Delta has taken."""
    made: list[str] = []
    left = 0
    for site in _of_kind(guide_trace, Kind.AUXILIARY, Kind.POINT):
        if kind(site) is Kind.AUXILIARY:
            left += site["value"].numel()
        elif left > 0:
            made.append(site["name"])
            left = max(0, left - site["value"].numel())
    return made, left


def random_sites(guide_trace: Trace) -> list[Site]:
    """The sites of a guide that say how q(z | x) spreads, in program order.

    These are its latents, but for a Delta made of auxiliary noise the noise.
    """
    made = made_of_noise(guide_trace)
    sites = _of_kind(guide_trace, Kind.AUXILIARY, Kind.LATENT, Kind.POINT, Kind.DISCRETE)
    return [site for site in sites if site["name"] not in made]


def with_mask(site: Site) -> Any:
    """The site's distribution, carrying the mask it stands under."""
    mask = site["mask"]
    return site["fn"] if mask is None or mask is True else MaskedDistribution(site["fn"], mask)


def asks_enumeration(site: Site) -> bool:
    """Whether the program asks for a latent to be summed out."""
    return bool((site["infer"] or {}).get("enumerate"))


# --- What a pair of programs must keep ------------------------------------------------------------


def check_same_latents(model_trace: Trace, guide_trace: Trace, *, summed_out: bool = False) -> None:
    """Refuse a guide that lacks a latent of the model or has one that the model lacks.

    Neither a guide's auxiliary noise nor what a model alone sums out counts; nor, if they are
    ``summed_out`` of both, do discrete latents.
    """
    if noise := _names(_of_kind(model_trace, Kind.AUXILIARY)):
        raise ValueError(
            f"model marks its sites {noise} as auxiliary; only a guide has auxiliary sites, so "
            "drop infer={'is_auxiliary': True} there and sample them in the guide"
        )
    left_out = (Kind.DISCRETE,) if summed_out else ()
    guide = [s["name"] for s in latent_sites(guide_trace) if kind(s) not in left_out]
    model = [
        site["name"]
        for site in latent_sites(model_trace)
        if kind(site) not in left_out and (site["name"] in guide or not asks_enumeration(site))
    ]
    if set(model) != set(guide):
        raise ValueError(
            f"model has the latent sites {sorted(model)}, the guide {sorted(guide)}; sample the "
            "same ones in both, and mark noise of the guide alone infer={'is_auxiliary': True}"
        )


def check_density(guide_trace: Trace) -> None:
    """Refuse a guide whose draws have no known density.

    The log-probabilities of all sites add up to log q(z | x) where each latent has a density, or is
    a Delta made of as many numbers of auxiliary noise and carries the log-determinant
    (``pyro.infer.autoguide`` writes such guides).
    """
    made, left = _match_noise(guide_trace)
    for site in _of_kind(guide_trace, Kind.POINT):
        if site["name"] not in made and not bool(innermost(site["fn"]).log_density.any()):
            raise ValueError(
                f"site {site['name']!r} of the guide is a Delta: a point has no density q(z | x), "
                "and -log p(x, z) there is not -log p(x); sample from a distribution with a "
                "density, such as Normal"
            )
    if left:
        names = _names(auxiliary_sites(guide_trace))
        raise ValueError(
            f"auxiliary sites {names} of the guide hold more numbers than the Deltas made of them: "
            "the density q(z | x) is an integral over the noise and not known; make each latent a "
            "bijection of its noise, with log_density"
        )


def check_density_everywhere(guide_trace: Trace) -> None:
    """Refuse a guide whose density is not known but, at best, at its own draws."""
    for site in sample_sites(guide_trace).values():
        if is_point(site["fn"]) or kind(site) is Kind.AUXILIARY:
            raise ValueError(
                f"site {site['name']!r} of the guide is auxiliary or a Delta: its density q(z | x) "
                "at given latents is not known; sample the latents from a distribution with a "
                "density, such as TransformedDistribution, or use metrics.nll, which needs draws"
            )


def check_same_masks(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuse a latent of which the model masks other elements than the guide.

    The ratio of both densities would be one of different elements, and log p(x) another number.
    """
    model = {site["name"]: site for site in latent_sites(model_trace)}
    for site in latent_sites(guide_trace):
        other = model.get(site["name"])
        if other is None or Kind.DISCRETE in (kind(site), kind(other)):
            continue
        ones = torch.ones_like(site["value"])
        in_guide, in_model = (counted(with_mask(each)) * ones for each in (site, other))
        if not torch.equal(in_guide, in_model):
            raise ValueError(
                f"latent site {site['name']!r} is masked for {int((in_model == 0).sum())} of "
                f"{ones.numel()} elements in the model and for {int((in_guide == 0).sum())} in the "
                "guide, or for others, so that p(x, z) / q(z | x) compares densities of different "
                "elements; mask the same ones in both, with poutine.mask(mask=...) around "
                "pyro.sample (an obs_mask masks NAME_unobserved by ~obs_mask)"
            )


def sampled_in_order(model_trace: Trace, guide_trace: Trace) -> set[str]:
    """Names of the latents that the guide samples after all which the model samples before them.

    Given what it samples before, the guide's distribution of such a latent is that of its trace,
    also where the model's distribution depends on other latents: closed forms hold in expectation.
    """
    names = _names(latent_sites(model_trace))
    found, seen = set(), set()
    for name in _names(latent_sites(guide_trace)):
        seen.add(name)
        if name in names and seen.issuperset(names[: names.index(name)]):
            found.add(name)
    return found


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
        name, mend = site["name"], "hide it, poutine.block(vae.model, hide=[{0!r}])"
        if not site["is_observed"]:
            mend = (
                "give it a value and hide it, poutine.block(poutine.condition(vae.model, "
                "data={{{0!r}: value}}), hide=[{0!r}]), and drop it from the guide"
            )
        raise ValueError(
            f"site {name!r} stands in no data plate. If it has a value per image, open "
            f'pyro.plate("{DATA_PLATE}", x.shape[0]) around it; if it is global, shared by all '
            f"images, {mend.format(name)}"
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


def whole_size(site: Site, num_images: int) -> int:
    """The size of the data plate of a site, of which ``num_images`` were given: more than these if
    it subsamples, for which Pyro scales log-probabilities by the ratio of both."""
    for frame in site["cond_indep_stack"]:
        given = frame.vectorized and frame.size == num_images
        if given and frame.full_size not in (None, num_images):
            return int(frame.full_size)
    return num_images


def rows_dim(site: Site) -> int:
    """Dimension of a site's value that has one row per image, counted from the end."""
    return data_frame(site).dim - int(site["fn"].event_dim)


def per_image(value: Tensor, site: Site, num_images: int | None = None) -> Tensor:
    """Sum of one value per batch element (a log-probability, a KL) within each image, ``(N,)``.

    Raises ``ValueError`` as :func:`data_frame`, or if the value has no row per image.
    """
    frame = data_frame(site, num_images)
    # Pyro counts the dimensions, too, unless its validation is off.
    plates = max(-each.dim for each in site["cond_indep_stack"] if each.vectorized)
    fits = -frame.dim <= value.dim() <= plates and value.shape[frame.dim] in (1, frame.size)
    if not fits:
        raise ValueError(
            f"site {site['name']!r}: its log-probability of shape {tuple(value.shape)} has no row "
            f"per image at dimension {frame.dim}, or more dimensions than plates, {plates}; "
            "declare event dimensions with .to_event(...)"
        )
    rows = value.movedim(frame.dim, 0)
    return rows.reshape(rows.shape[0], -1).sum(-1).expand(frame.size)


def log_prob_per_image(site: Site, num_images: int) -> Tensor:
    """Log-probability of a site within each image, masked as it says but not scaled: ``(N,)``."""
    log_prob = site["fn"].log_prob(site["value"])
    return per_image(scale_and_mask(log_prob, mask=site["mask"]), site, num_images)


def image_rows(value: Tensor, site: Site) -> Tensor:
    """``value``, of the site's batch and event shape, as ``(N, everything else)``."""
    rows = value.movedim(rows_dim(site), 0)
    return rows.reshape(rows.shape[0], -1)


def latent_values(sites: list[Site]) -> Tensor:
    """Sampled latents of all sites, ``(N, D)``."""
    return torch.cat([image_rows(site["value"], site) for site in sites], 1)


def gaussians(sites: list[Site]) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of Gaussian sites, each ``(N, D)``, as :func:`latent_values`.

    Raises ``ValueError`` for a site that is not Gaussian with diagonal covariance.
    """
    locs, scales = [], []
    for site in sites:
        fn = innermost(site["fn"])
        if not is_of(fn, Normal):
            raise ValueError(
                f"site {site['name']!r} is {type(fn).__name__}; this objective needs Gaussian "
                "latents: sample pyro.distributions.Normal(loc, scale).to_event()"
            )
        locs.append(image_rows(fn.loc, site))
        scales.append(image_rows(fn.scale, site))
    return torch.cat(locs, 1), torch.cat(scales, 1)
