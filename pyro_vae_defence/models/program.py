r"""Reading a VAE written as a pair of Pyro programs.

Everything the library does to a VAE goes through this module, so any object with ``model(x)`` and
``guide(x)`` will do (:class:`pyro_vae_defence.types.VAE`): the names and number of latent sites,
which observations are the image and in which units, nested plates and supports are found in traces.
Arguments beside the images are bound by :func:`at_images`; below, programs take images alone.

The energy of image :math:`n`, in nats, is

.. math:: U_n(z) = -\log p(x_n \mid z_n) - \sum_k \log p(z_{n,k} \mid z_{n,>k}),

the sum of *unscaled* log-probabilities of the model's sites: a model trained under
``poutine.scale(beta)`` is still sampled at p(x|z)p(z), not at p(x|z)p(z)^beta. Latents with
constrained support are moved on the unconstrained scale of :func:`torch.distributions.biject_to`,
whose log-determinant enters the energy. Discrete latents are summed out
(:mod:`pyro_vae_defence.models.enumeration`).

Throughout, ``vae`` is any Pyro VAE, ``x`` are images ``(N, C, H, W)``, and ``streams`` the random
streams of these images, which make a row's draws independent of the batch around it; without them
noise comes from torch's global seed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_vae_defence.models.conditions import (
    BoundProgram,
    BoundVAE,
    bind,
    fold,
    split,
    take,
    taken,
)
from pyro_vae_defence.models.contract import (
    as_networks,
    check_guide_rows,
    check_latents,
    check_networks_on_device,
    check_rows,
    once,
    run_on,
    run_untouched,
)
from pyro_vae_defence.models.contract import at_images as at_images
from pyro_vae_defence.models.contract import check_images as check_images
from pyro_vae_defence.models.contract import check_vae as check_vae
from pyro_vae_defence.models.contract import evaluation_mode as evaluation_mode
from pyro_vae_defence.models.enumeration import (
    enumerable,
    in_parallel,
    is_enumerated,
    log_density,
    marginal_mean,
    marginalised,
)
from pyro_vae_defence.models.observation import ImageMap, read_images
from pyro_vae_defence.models.perturbation import Perturbation, PerturbationAware
from pyro_vae_defence.models.sites import (
    Kind,
    Site,
    aside,
    auxiliary_sites,
    check_density,
    check_density_everywhere,
    data_frame,
    get_trace,
    image_rows,
    kind,
    latent_sites,
    log_prob_per_image,
    made_of_noise,
    random_sites,
    sample_sites,
    with_mask,
)
from pyro_vae_defence.models.supports import transform_of
from pyro_vae_defence.ops import distributions
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.boundary import Pause, fetched, public, uncast
from pyro_vae_defence.ops.checks import check_tensor
from pyro_vae_defence.ops.draws import Noise, draw
from pyro_vae_defence.ops.precision import full_on
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import VAE, Latents, LatentsLike, Potential, PyroProgram

# --- Traces ---------------------------------------------------------------------------------------


def _draw(program: PyroProgram, x: Tensor, streams: Streams | None) -> poutine.Trace:
    return get_trace(program if streams is None else _StreamMessenger(streams)(program), x)


def _continuous(trace: poutine.Trace) -> list[Site]:
    return [site for site in latent_sites(trace) if kind(site) is not Kind.DISCRETE]


def _latents(trace: poutine.Trace) -> Latents:
    """Values of the continuous latent sites; discrete ones are summed out wherever they matter.

    Their rows are images, or a ``ValueError`` says which site's are not.
    """
    check_latents(trace)
    return {site["name"]: site["value"] for site in _continuous(trace)}


def _get_marginal_trace(
    program: PyroProgram, latents: LatentsLike, *args: Any, **kwargs: Any
) -> poutine.Trace:
    """A trace at these latents, in which discrete sites, if there are any, are enumerated.

    Where the latents are all, it is checked that enumeration is what the program means.
    """
    conditioned = poutine.condition(program, data=dict(latents))
    plain = get_trace(conditioned, *args, **kwargs)
    discrete = enumerable(plain)
    if not discrete:
        return plain
    frame = data_frame(plain.nodes[discrete[0]])
    return marginalised(conditioned, plain, frame, *args, **kwargs)[0]


def _energy(trace: poutine.Trace, start: Tensor, *, enumerated: bool | None = None) -> Tensor:
    """``start`` of shape ``(N,)`` minus the unscaled log-probability of every site, in nats.

    Whether discrete sites are ``enumerated`` is looked up if it is not said.
    """
    if is_enumerated(trace) if enumerated is None else enumerated:
        frame = data_frame(next(iter(sample_sites(trace).values())), start.shape[0])
        return start - log_density(trace, frame)
    for site in sample_sites(trace).values():
        start = start - log_prob_per_image(site, start.shape[0])
    return start


# --- The guide ------------------------------------------------------------------------------------


class _StreamMessenger(Messenger):
    """Draw sites from streams where :func:`pyro_vae_defence.ops.draws.draw` knows how, others from
    the global seed."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.noise = Noise(streams, 2048)  # clear of the sampler's own purposes

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None:
            return
        fn = msg["fn"]
        # A plate's own site is no distribution.
        if getattr(fn, "batch_shape", ())[:1] == self.noise.streams.image.shape:
            msg["value"] = draw(fn, self.noise)


@public
def posterior(vae: VAE, x: Tensor, *, streams: Streams | None = None) -> dict[str, td.Distribution]:
    """How q(z | x) spreads: site name -> distribution, batch shape ``(N,)`` or with plates.

    It is the guide's distribution of every latent site, as a ``MaskedDistribution`` where the
    program masks it. In place of a ``Delta`` made of auxiliary noise stand the auxiliary sites,
    under their own names: divergences do not change under a bijection, as long as it is the same
    for all images, which is tried on one more image.

    For a hierarchical guide the lower sites' distributions are conditional on sampled upper sites.

    Raises ``ValueError`` for a ``Delta`` that depends on noise *and* image, and for sites that
    depend on a discrete one, given which alone they have a distribution.
    """
    trace = _draw(vae.guide, x, streams)
    if enumerable(trace):
        for site in random_sites(_get_marginal_trace(vae.guide, {}, x)):
            _known(site)
    _check_bijections(vae, x, trace)
    return {site["name"]: with_mask(site) for site in random_sites(trace)}


def _check_bijections(vae: VAE, x: Tensor, trace: poutine.Trace) -> None:
    """The same noise has to become the same latents at other images."""
    if not (made := made_of_noise(trace)):
        return
    noise = {site["name"]: site["value"] for site in auxiliary_sites(trace)}
    with torch.no_grad():
        other = get_trace(poutine.condition(vae.guide, data=noise), 1.0 - x)
    for name in made:
        here, there = (_latents(each)[name] for each in (trace, other))
        if not torch.allclose(here, there):
            raise ValueError(
                f"site {name!r} of the guide makes a latent of auxiliary noise by a function of "
                "the image, so that divergences of the noise say nothing of the latents; sample "
                "the latent itself, e.g. from Normal(loc, scale), or attack the outputs "
                "(attacks.maximum_damage)"
            )


def check_guide(vae: VAE, x: Tensor, *, streams: Streams | None = None) -> None:
    """Run ``vae.guide`` on ``x`` once and see whether it keeps the contract of :class:`types.VAE`.

    Raises:
        ValueError: if it fails on such images, has no latent site, or one outside its data plate.
    """
    check_vae(vae)
    with torch.no_grad(), evaluation_mode(vae):
        if isinstance(vae, BoundVAE):  # on copies of what comes with the images
            vae = vae.take(torch.arange(vae.num_images, device=x.device))
        handler = None if streams is None else _StreamMessenger(streams)
        trace = run_untouched("vae.guide", vae.guide, x, handler=handler)
    if not latent_sites(trace):
        raise ValueError("vae.guide has no latent site; it must sample every latent of the model")
    for site in sample_sites(trace).values():
        data_frame(site, x.shape[0])
    check_latents(trace)
    if x.device.type != "meta":
        check_guide_rows(vae, x)


@public
def encode(vae: VAE, x: Tensor, *, streams: Streams | None = None) -> Latents:
    """One draw from the guide q(z | x) per image: site name -> ``(N, *event)``.

    Only the model's latents: auxiliary noise of the guide stays behind.
    """
    return _latents(_draw(vae.guide, x, streams))


def _of_latents(guide: PyroProgram) -> PyroProgram:
    """A guide without its own observations, which are no part of q(z | x); factors are.

    It may observe a label, or run the model for its priors (``GuideMessenger`` of Pyro).
    """

    def observes(msg: Any) -> bool:
        return bool(msg["is_observed"]) and not isinstance(msg["fn"], dist.Unit)

    blocked: PyroProgram = poutine.block(guide, hide_fn=observes)
    return blocked


@public
def sample_with_log_prob(
    vae: VAE, x: Tensor, *, streams: Streams | None = None
) -> tuple[Latents, Tensor]:
    """One draw z per image, as :func:`encode`, and log q(z | x), shape ``(N,)``, in nats.

    Raises ``ValueError`` for a guide whose draws have no known density, such as a ``Delta`` that is
    a function of the image.
    """
    guide = _of_latents(vae.guide)
    trace = _draw(guide, x, streams)
    check_density(trace)
    latents = _latents(trace)
    if enumerable(trace):
        trace = _get_marginal_trace(guide, latents, x)
    return latents, -_energy(trace, x.new_zeros(x.shape[0]))


class GuideDraws:
    """Draws from the guide at the same images, over and over.

    A guide of one Gaussian site, like the paper's, runs once for all draws; any other runs for
    every draw. Either way the draws are those of :func:`sample_with_log_prob` on repeated images.
    """

    def __init__(self, vae: VAE, x: Tensor) -> None:
        self.vae, self.x = vae, x
        self.site = ""
        streams = Streams.create(len(x), seed=0, device=x.device)
        trace = _draw(_of_latents(vae.guide), x, streams)
        check_density(trace)
        if made := made_of_noise(trace):
            _check_log_density(take(vae, slice(0, 1)), x[:1], made)
        sites = sample_sites(trace)
        if len(sites) != 1:
            return
        (site,) = sites.values()
        fn = site["fn"]
        gaussian = _is_plain(fn, td.Independent) and _is_plain(fn.base_dist, td.Normal)
        plain = site["mask"] is None and not site["is_observed"]
        if gaussian and plain and fn.batch_shape == (len(x),):
            self.site, self.events = site["name"], fn.reinterpreted_batch_ndims
            self.loc, self.scale = fn.base_dist.loc, fn.base_dist.scale

    def __call__(self, count: int, streams: Streams) -> tuple[Latents, Tensor]:
        """Latents of ``count * N`` rows, draws folded in front of images, and log q(z | x)."""
        if not self.site:
            return sample_with_log_prob(self.vae, self.x.repeat(count, 1, 1, 1), streams=streams)
        parameters = lat.repeat({"loc": self.loc, "scale": self.scale}, count)
        fn = dist.Normal(**parameters, validate_args=False)
        draws = dist.Independent(fn, self.events, validate_args=False)
        with poutine.block(), _StreamMessenger(streams):
            z = pyro.sample(self.site, draws)
        return {self.site: z}, draws.log_prob(z)


def _is_plain(fn: Any, family: type) -> bool:
    return isinstance(fn, family) and not distributions.own_methods(type(fn), family)


_MOST_NOISE = 1024  # numbers, up to which a Jacobian is worth its time


def _check_log_density(vae: VAE, x: Tensor, made: list[str]) -> None:
    """At one image, Deltas made of noise must have minus the log-determinant of their function."""
    energy = potential(vae, x)
    noise = {s["name"]: s["value"] for s in auxiliary_sites(get_trace(vae.guide, x))}
    sizes = [value.numel() for value in noise.values()]
    if x.device.type == "meta" or sum(sizes) > _MOST_NOISE:
        return

    def run(flat: Tensor) -> poutine.Trace:
        parts = zip(noise.items(), flat.split(sizes), strict=True)
        values = {name: part.reshape(value.shape) for (name, value), part in parts}
        return get_trace(poutine.condition(vae.guide, data=values), x)

    def function(flat: Tensor) -> Tensor:
        latents = _latents(run(flat))
        moved = energy.unconstrain({name: latents[name] for name in made})
        return torch.cat([value.flatten() for value in moved.values()])

    flat = torch.cat([value.detach().flatten() for value in noise.values()])
    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(function, flat)
    if jacobian.shape[0] != jacobian.shape[1]:
        raise ValueError(
            f"sites {made} of the guide hold {jacobian.shape[0]} numbers made of "
            f"{jacobian.shape[1]} of auxiliary noise, so that they have no density; make each "
            "latent a bijection of its noise"
        )
    trace = run(flat)
    expected = -torch.linalg.slogdet(jacobian).logabsdet
    for name in made:
        if (transform := energy.transforms.get(name)) is not None:
            point = transform.inv(trace.nodes[name]["value"])
            expected = expected - transform.log_abs_det_jacobian(point, transform(point)).sum()
    given = sum(distributions.innermost(trace.nodes[name]["fn"]).log_density.sum() for name in made)
    for site in sample_sites(trace).values():
        if isinstance(site["fn"], dist.Unit):  # a factor may hold it as well
            given = given + site["fn"].log_prob(site["value"]).sum()
    if not torch.allclose(
        torch.as_tensor(given, device=expected.device), expected, rtol=1e-3, atol=1e-2
    ):
        raise ValueError(
            f"sites {made} of the guide have the log_density {float(given):.6g} where their "
            f"function of the noise has {float(expected):.6g}; pass log_density, minus the "
            "log-determinant of its Jacobian, to the Delta"
        )


@public
def posterior_mean(vae: VAE, x: Tensor) -> Latents:
    """Mean of the guide's distribution of every site: site name -> ``(N, *event)``.

    In a hierarchical guide each site is conditioned on the means above it. A ``Delta`` made of
    auxiliary noise is where it puts the noise's mean: for Gaussian noise and an increasing function
    the median of each element, not the mean.

    Raises ``ValueError`` for a site that is discrete or whose mean is not known, such as a flow.
    """
    trace = get_trace(_MeanMessenger()(vae.guide), x)
    means = _latents(trace)
    if enumerable(trace):
        names, means = list(means), {}
        for name in names:
            enumerated = _get_marginal_trace(vae.guide, means, x)
            frame = data_frame(trace.nodes[name], x.shape[0])
            means[name] = marginal_mean(enumerated, frame, name, means)
        _get_marginal_trace(vae.guide, means, x)  # for its check
    return means


@public
@torch.no_grad()
def mean_of_draws(vae: VAE, x: Tensor, draws: LatentsLike) -> Latents:
    """Mean over draws ``(K, N, *event)`` of latents, given images ``(N, C, H, W)``: site ->
    ``(N, *event)``. Of angles, those of ``VonMises`` in either program, it is their direction."""
    to, back = scale_of_means(angles(vae, x))
    return back({name: value.mean(0) for name, value in to(draws).items()})


def angles(vae: VAE, x: Tensor) -> set[str]:
    """Names of the latent sites whose values are angles, those of ``VonMises`` in either program,
    given images ``(N, C, H, W)``."""
    with torch.no_grad(), evaluation_mode(vae), aside(x.device):
        traces = get_trace(vae.guide, x), get_trace(vae.model, x)
    sites = (site for trace in traces for site in latent_sites(trace))
    return {site["name"] for site in sites if distributions.is_angle(site["fn"])}


_Map = Callable[[LatentsLike], Latents]


def scale_of_means(angles: set[str]) -> tuple[_Map, _Map]:
    """The scale on which draws of latents are averaged, and the way back: their own, but for
    ``angles``, which are points of the unit circle there, so that a mean is a direction."""

    def to(latents: LatentsLike) -> Latents:
        return {
            n: torch.stack([z.cos(), z.sin()], -1) if n in angles else z for n, z in latents.items()
        }

    def back(means: LatentsLike) -> Latents:
        return {
            n: torch.atan2(z[..., 1], z[..., 0]) if n in angles else z for n, z in means.items()
        }

    return to, back


class _MeanMessenger(Messenger):
    """Set every continuous latent and auxiliary site to the mean of its distribution."""

    def _pyro_sample(self, msg: Any) -> None:
        if kind(msg) in (Kind.LATENT, Kind.POINT, Kind.AUXILIARY):
            mend = 'use a draw instead: initial="guide" of a defence, latents="sample" of an attack'
            msg["value"] = distributions.mean(msg["fn"], msg["name"], mend)


# --- The model ------------------------------------------------------------------------------------


def prior(vae: VAE, x: Tensor, *, streams: Streams | None = None) -> Latents:
    """One draw from p(z) per image of ``x``: site name -> ``(N, *event)``."""
    return in_guide_order(vae, x, _latents(_draw(vae.model, x, streams)))


def in_guide_order(vae: VAE, x: Tensor, latents: Latents) -> Latents:
    """The same latents in the order in which the guide samples them, which classifiers of latents
    are trained on; a model may sample them in another."""
    if len(latents) < 2:
        return latents
    with torch.no_grad(), aside(x.device):
        names = [site["name"] for site in latent_sites(get_trace(vae.guide, x))]
    return {name: latents[name] for name in (*names, *latents) if name in latents}


def initial_latents(vae: VAE, x: Tensor, initial: str, streams: Streams) -> Latents:
    """Where a chain or a search starts: site name -> ``(N, *event)``, on the constrained scale.

    ``initial`` is ``"guide"`` or ``"prior"``, a draw from it, or ``"mean"``, the guide's mean.
    """
    if initial == "mean":
        return posterior_mean(vae, x)
    return (prior if initial == "prior" else encode)(vae, x, streams=streams)


# How far images of a VAE's own method may leave [0, 1], as a Gaussian's mean does before training.
_OVERSHOOT = 0.25


class Decoder:
    """Latents to images: the mean of p(x | z), the paper's g(z).

    Where it depends on discrete latents y, it is the mean of p(x | z, y) over p(y | z).

    The model's observations are read once (:mod:`pyro_vae_defence.models.observation`). A VAE with
    a method ``to_images(latents, *conditions)`` is asked instead.

    Args:
        vae: any Pyro VAE.
        like: images ``(N, C, H, W)``, of which shape, dtype and device matter.

    Attributes:
        images: how the model observes images.

    Raises:
        ValueError: when called, if the latents are not the model's, or do not say what the image
            looks like, or its likelihood has no finite mean.
    """

    def __init__(self, vae: VAE, like: Tensor) -> None:
        self.vae = vae
        self.to_images = getattr(vae.vae if isinstance(vae, BoundVAE) else vae, "to_images", None)
        self.images = image_map(vae, like)
        self._like = like[:1]
        self._checked = False

    def check(self) -> None:
        """Raise the ``ValueError`` of a call, but for what hinges on the latents."""
        if not self._checked:
            if self.to_images is None:
                self.images.check_mean()
            else:
                programs = self.to_images, self.vae.model
                once("to_images", programs, self._like, self._check_to_images)
            self._checked = True

    @torch.no_grad()
    def _check_to_images(self) -> None:
        """Refuse images that are noise, not of their own latents alone, or in other units."""
        number = self.vae.num_images if isinstance(self.vae, BoundVAE) else 3
        if self._like.is_meta:
            return
        rows = torch.arange(min(number, 3), device=self._like.device)
        few = take(self.vae, rows)
        # Another number of rows is rounded otherwise in TF32.
        device = self._like.device
        with evaluation_mode(self.vae), aside(device), full_on(device):
            latents = prior(few, self._like.repeat(len(rows), 1, 1, 1))
            if not latents:
                return
            together, again = (self._own_images(few, latents) for _ in range(2))
            alone = torch.cat(
                [self._own_images(take(few, n), lat.index(latents, n)) for n in rows.split(1)]
            )
        if not torch.allclose(together, again, rtol=1e-3, atol=1e-4):
            raise ValueError(
                "vae.to_images gives other images in another call with the same latents; return "
                "the mean image, without noise"
            )
        if not torch.allclose(together, alone, rtol=1e-3, atol=1e-4):
            raise ValueError(
                "vae.to_images gives another image for latents among others than for them alone; "
                "make each image of its own latents"
            )
        low, high = float(together.min()), float(together.max())
        if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
            raise ValueError(
                f"vae.to_images must return images in [0, 1], got values from {low:g} to {high:g}; "
                "rescale them, such as (images + 1) / 2 where they lie in [-1, 1], or return "
                "images.clamp(0, 1) where a mean in [0, 1] leaves it"
            )

    @uncast
    def __call__(self, latents: LatentsLike, x: Tensor | None = None) -> Tensor:
        """Images ``(M, C, H, W)`` of latents with ``M`` rows, on the constrained scale.

        Images ``x`` that the latents explain tell of discrete latents: means are over
        p(y | z, x), which is a reconstruction, in place of p(y | z).
        """
        self.check()
        if not latents:
            raise ValueError(
                "there is no continuous site, so that there is nothing to decode; relax discrete "
                "ones, e.g. to a RelaxedOneHotCategorical"
            )
        if self.to_images is None:
            return self._assemble(latents, functools.partial(_mean, latents), x)
        return self._own_images(self.vae, latents)

    def _own_images(self, vae: VAE, latents: LatentsLike) -> Tensor:
        num_rows, model = next(iter(latents.values())).shape[0], vae.model
        bound = model.arguments(num_rows) if isinstance(model, BoundProgram) else ((), {})
        assert self.to_images is not None
        images: Tensor = self.to_images(dict(latents), *bound[0], **bound[1])
        if tuple(images.shape) != (num_rows, *self.images.shape):
            raise ValueError(
                f"vae.to_images must return images {(num_rows, *self.images.shape)} for latents "
                f"of {num_rows} rows, got {tuple(images.shape)}"
            )
        return images

    @uncast
    def sample(self, latents: LatentsLike) -> Tensor:
        """Images drawn from p(x | z), ``(M, C, H, W)``, not clipped to [0, 1].

        Raises ``ValueError`` where the likelihood depends on discrete latents.
        """
        self.images.check_known()

        def read(trace: poutine.Trace, seen: list[str], site: Site) -> Tensor:
            drawn: Tensor = distributions.over(_known(site)["fn"], site["value"].shape).sample()
            return drawn

        return self._assemble(latents, read, None)

    @uncast
    def log_likelihood(self, latents: LatentsLike, x: Tensor) -> Tensor:
        """log p(x_i | z) of every value of images ``x``, ``(M, C, H, W)``, in nats.

        ``latents`` have M rows. A density is one of the value that the model observes, in its
        units. The values of an image must be independent given continuous latents: ``ValueError``
        where the likelihood depends on discrete ones, or is one number for several values.
        """
        self.images.check_known()
        sites = observed(self.vae.model, latents, x)
        return self.images.arrange([_pointwise(sites[s.name]) for s in self.images.sites], len(x))

    def _assemble(
        self, latents: LatentsLike, read: Callable[..., Tensor], x: Tensor | None
    ) -> Tensor:
        first = next(iter(latents.values()))
        template = first.new_zeros((first.shape[0], *self.images.shape))
        trace = _at_latents(self.vae.model, latents, template)
        seen: list[str] = []
        if x is not None and is_enumerated(trace):
            trace = _at_latents(self.vae.model, latents, x)
            seen = list(_observed(trace, latents))
        sites = _observed(trace, latents)
        return self.images.assemble(lambda site: read(trace, seen, site=site), sites, len(template))


def observed(model: PyroProgram, latents: LatentsLike, x: Tensor) -> dict[str, Site]:
    """The observed sites of a model at images ``x``, given ``latents`` with as many rows.

    ``latents`` are on the constrained scale, site name -> ``(M, *event)``. Raises ``ValueError``
    for a latent that the model does not sample, and if a site depends on discrete latents.
    """
    sites = _observed(_at_latents(model, latents, x), latents)
    return {name: _known(site) for name, site in sites.items()}


def _at_latents(model: PyroProgram, latents: LatentsLike, x: Tensor) -> poutine.Trace:
    trace = _get_marginal_trace(model, latents, x)
    missing = set(latents) - set(trace.nodes)
    if missing:
        raise ValueError(f"model has no latent site named {sorted(missing)}; pass its own latents")
    return trace


def _observed(trace: poutine.Trace, latents: LatentsLike) -> dict[str, Site]:
    sites = sample_sites(trace).items()
    return {n: site for n, site in sites if site["is_observed"] and n not in latents}


def _mean(latents: LatentsLike, trace: poutine.Trace, seen: list[str], site: Site) -> Tensor:
    if is_enumerated(trace):
        return marginal_mean(trace, data_frame(site), site["name"], [*latents, *seen])
    mean: Tensor = site["fn"].mean
    return mean


def _known(site: Site) -> Site:
    """The site, if its distribution does not depend on discrete latents that are enumerated."""
    shape = site["fn"].batch_shape
    if any(-dim <= len(shape) and shape[dim] > 1 for dim in site["infer"].get("_dim_to_id", ())):
        raise ValueError(
            f"site {site['name']!r} depends on discrete latents; given the others it is a mixture "
            "that Pyro does not know as a distribution: make it a MixtureSameFamily, or attack the "
            "outputs (attacks.maximum_damage)"
        )
    return site


def _pointwise(site: Site) -> Tensor:
    """The log-probability of every element of an observation, ``(M, elements)``."""
    fn, value = site["fn"], site["value"]
    while distributions.is_of(fn, td.Independent):
        fn = fn.base_dist
    if fn.event_shape:
        raise ValueError(
            f"the likelihood at {site['name']!r} is {type(fn).__name__}, one number for several "
            "values of an image; log-likelihoods of pixels need them independent given the latents"
        )
    if distributions.is_of(fn, td.Bernoulli):
        # Its own log_prob rounds to 0, for every z, where a pixel is all but certain.
        logits, value = fn.logits.double(), value.double()
        log_prob = value * logsigmoid(logits) + (1 - value) * logsigmoid(-logits)
    else:
        log_prob = fn.log_prob(value)
    log_prob = scale_and_mask(log_prob, mask=site["mask"])
    return image_rows(log_prob.expand(value.shape), site)


@public
def decode(vae: VAE, latents: LatentsLike, image_shape: tuple[int, ...]) -> Tensor:
    """Mean of p(x | z): latents with ``M`` rows to images ``(M, C, H, W)``; see :class:`Decoder`.

    It reads the model's observations anew; whoever decodes in a loop makes a :class:`Decoder`.
    """
    first = next(iter(latents.values()))
    return Decoder(vae, first.new_empty((1, *image_shape)))(latents)


def image_map(vae: VAE, like: Tensor) -> ImageMap:
    """How the model of ``vae`` observes images of the shape, dtype and device of ``like``."""
    model = vae.model
    if isinstance(model, BoundProgram):  # it may be another under other conditions
        return read_images(model, like)
    return once("image_map", (model,), like, lambda: read_images(model, like))


class LatentSite(NamedTuple):
    """A latent site: name, shape of an image's unconstrained value, transform, distribution.

    The transform is ``None`` where the two scales are the same.
    """

    name: str
    shape: tuple[int, ...]
    transform: td.Transform | None
    fn: Any


class ModelPotential:
    """Energy per image of a Pyro model given its arguments; a :class:`types.Potential`.

    Calling it with *unconstrained* latents of ``N`` rows returns energies ``(N,)`` in nats.

    Args:
        model: Pyro model with one data plate around all its sites.
        args, kwargs: its arguments; the first tensor's first dimension is the number of images.

    Attributes:
        num_images: number of rows.
        sites: the continuous latent sites in the order of the trace; discrete ones are summed out
            (:mod:`pyro_vae_defence.models.enumeration`).

    Raises:
        ValueError: if a site stands outside the data plate, there is no continuous latent, or a
            discrete one cannot be enumerated.
    """

    @uncast
    def __init__(self, model: PyroProgram, *args: Any, **kwargs: Any) -> None:
        batch = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)), None)
        if batch is None or batch.dim() == 0:
            raise ValueError("the model needs a tensor argument whose first dimension is the batch")
        self.num_images: int = batch.shape[0]
        if isinstance(model, BoundProgram):
            conditions, keywords = model.arguments(self.num_images)
            model, args, kwargs = model.program, (*args, *conditions), {**kwargs, **keywords}
        self._model, self._args, self._kwargs = model, args, kwargs
        with torch.no_grad():
            trace = run_on("vae.model", model, *args, **kwargs)
            discrete = enumerable(trace)
            self._prototype = _latents(trace)
            self.sites = tuple(self._read_site(site) for site in _continuous(trace))
            if not self.sites:
                raise ValueError(
                    "the model has no continuous latent site to sample; no chain can run on it"
                )
            self._program = model
            if discrete:
                frame = data_frame(trace.nodes[discrete[0]], self.num_images)
                known = poutine.condition(model, data=self._prototype)
                plain = get_trace(known, *args, **kwargs)
                _, expand = marginalised(known, plain, frame, *args, **kwargs)
                self._program = in_parallel(model, trace, expand)
            if batch.device.type != "meta":
                perturbation, others = None, [*args, *kwargs, *kwargs.values()]
                if isinstance(model, PerturbationAware):
                    perturbation, model = model.perturbation, model.model
                once("potential", (model,), batch, self._check, [perturbation, *others])

    def _check(self) -> None:
        batch = self.tensors[0]
        check_rows("vae.model", self._run_few, self.num_images, batch)
        self._check_supports(batch)

    def _run_few(self, rows: Tensor, latents: LatentsLike) -> poutine.Trace:
        few = self.take(rows)
        return run_untouched("vae.model", self._model, *few._args, latents=latents, **few._kwargs)

    def _check_supports(self, x: Tensor) -> None:
        """Refuse bounds of a latent that hinge on other latents or on the image.

        Rows of one image, or of one image and latents, would not show it.
        """
        if not self.transforms:
            return
        pair = self.take(torch.zeros(2, dtype=torch.long, device=x.device))
        first, *others = pair.tensors
        if first[0].dim() == 3:  # an image
            pair = pair.with_tensors([torch.stack([first[0], 1.0 - first[0]]), *others])
        with aside(x.device):
            trace = run_on("vae.model", self._model, *pair._args, **pair._kwargs)
        for site in _continuous(trace):
            pair._read_site(site)

    def _read_site(self, site: Any) -> LatentSite:
        name, fn, value = site["name"], site["fn"], site["value"]
        data_frame(site, self.num_images)
        try:
            transform = transform_of(fn, value)
        except ValueError as error:
            raise ValueError(f"latent site {name!r}: {error}") from None
        unconstrained = value if transform is None else transform.inv(value)
        return LatentSite(name, tuple(unconstrained.shape[1:]), transform, fn)

    def at(self, x: Tensor) -> ModelPotential:
        """The energy of the same model at other images; sites are not read again.

        Any number of them, or, with conditions, copies of as many as there were.
        """

        def folded(value: Any) -> Any:
            return fold(value, x.shape[0]) if isinstance(value, Tensor) else value

        other = copy.copy(self)
        other._args = (x, *map(folded, self._args[1:]))
        other._kwargs = {name: folded(value) for name, value in self._kwargs.items()}
        other.num_images = x.shape[0]
        return other

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors among the model's positional arguments, the batch of images first."""
        return tuple(arg for arg in self._args if isinstance(arg, Tensor))

    @property
    def signature(self) -> tuple[Any, ...]:
        """What, besides the values of :attr:`tensors` and of the latents, an energy depends on."""
        arguments = (
            (tuple(arg.shape), arg.stride(), arg.dtype, arg.device)
            if isinstance(arg, Tensor)
            else id(arg)
            for arg in self._args
        )
        keywords = ((name, id(value)) for name, value in self._kwargs.items())
        # A bound method is a new object each time, but equal.
        return (self._model, *arguments, *keywords)

    def with_tensors(self, tensors: Sequence[Tensor]) -> ModelPotential:
        """The same energy with other values, of the same shapes, for :attr:`tensors`."""
        values = iter(tensors)
        other = copy.copy(self)
        other._args = tuple(next(values) if isinstance(a, Tensor) else a for a in self._args)
        return other

    def take(self, rows: Tensor) -> ModelPotential:
        """The energy of the images at ``rows``, int64 ``(M,)``, alone."""

        def select(value: Any) -> Any:
            per_image = isinstance(value, Tensor) and value.shape[:1] == (self.num_images,)
            return value[rows] if per_image else value

        other = copy.copy(self)
        other._args = tuple(select(arg) for arg in self._args)
        other._kwargs = {name: select(value) for name, value in self._kwargs.items()}
        other._prototype = {name: value[rows] for name, value in self._prototype.items()}
        other.num_images = rows.shape[0]
        return other

    @property
    def transforms(self) -> dict[str, td.Transform]:
        """Transforms of the constrained sites, from the unconstrained scale to the support."""
        return {site.name: site.transform for site in self.sites if site.transform is not None}

    @property
    def prototype(self) -> Latents:
        """A draw from the prior on the unconstrained scale, for its shapes, dtype and device."""
        return self.unconstrain(self._prototype)

    def prior(self, streams: Streams) -> Latents:
        """A draw from the prior on the unconstrained scale, from the rows' own streams."""
        with torch.no_grad():
            trace = get_trace(_StreamMessenger(streams)(self._model), *self._args, **self._kwargs)
        return self.unconstrain(_latents(trace))

    def constrain(self, latents: LatentsLike) -> Latents:
        """Unconstrained latents to the support of each site."""
        transforms = self.transforms
        return {n: transforms[n](v) if n in transforms else v for n, v in latents.items()}

    def unconstrain(self, latents: LatentsLike) -> Latents:
        """Latents on their support to the unconstrained scale."""
        transforms = self.transforms
        return {n: transforms[n].inv(v) if n in transforms else v for n, v in latents.items()}

    def supported(self, latents: LatentsLike) -> Tensor:
        """Whether rows of latents lie on the support of all sites, bool ``(N,)``."""
        inside = torch.ones(self.num_images, dtype=torch.bool, device=self.tensors[0].device)
        for site in self.sites:
            found = distributions.within_bounds(site.fn, latents[site.name])
            if found is not None:
                inside = inside & found.reshape(self.num_images, -1).all(1)
        return inside

    def check(self, latents: LatentsLike) -> Latents:
        """Return ``latents`` if they fit the model's sites, else raise a ``ValueError``.

        Those of another dtype, as NumPy's numbers have, come in the model's own.
        """
        expected = {site.name: (self.num_images, *site.shape) for site in self.sites}
        if latents.keys() != expected.keys():
            raise ValueError(
                f"latents must have the model's sites {sorted(expected)}, got {sorted(latents)}"
            )
        for name, shape in expected.items():
            check_tensor(f"latents[{name!r}]", latents[name])
            if (found := tuple(latents[name].shape)) != shape:
                raise ValueError(
                    f"latents[{name!r}] must have shape {shape} (one row per image), got {found}"
                )
        return {name: value.to(self._prototype[name].dtype) for name, value in latents.items()}

    @uncast
    def __call__(self, latents: LatentsLike) -> Tensor:
        """Energies of shape ``(N,)``, in nats."""
        return self._evaluate(latents)

    def _evaluate(self, latents: LatentsLike) -> Tensor:
        """As a call, in whatever precision is set."""
        conditioned = poutine.condition(self._program, data=self.constrain(latents))
        trace = get_trace(conditioned, *self._args, **self._kwargs)
        enumerated = self._program is not self._model
        return _energy(trace, self.log_determinant(latents), enumerated=enumerated)

    @uncast
    def prior_energy(self, latents: LatentsLike) -> Tensor:
        """Energies -log p(z) of what :meth:`prior` draws from, ``(N,)``, in nats.

        Whatever is observed is left out, be it the image, other data or a ``pyro.factor``.

        Raises:
            ValueError: if a latent is masked out of the model, and has no such density.
        """
        conditioned = poutine.condition(self._program, data=self.constrain(latents))
        trace = get_trace(conditioned, *self._args, **self._kwargs)
        for name, site in sample_sites(trace).items():
            masked_out = site["mask"] is False or distributions.counted(site["fn"]) is False
            if name in latents and masked_out:
                raise ValueError(
                    f"latent site {name!r} is masked out of the model, so that p(z) is no density "
                    'to start from; use initial="guide"'
                )
            if site["is_observed"] and name not in latents:
                trace.remove_node(name)
        enumerated = self._program is not self._model
        return _energy(trace, self.log_determinant(latents), enumerated=enumerated)

    def log_determinant(self, latents: LatentsLike) -> Tensor:
        """Minus the log-determinant of the constraining transforms (zero without any)."""
        total = next(iter(latents.values())).new_zeros(self.num_images)
        for name, transform in self.transforms.items():
            log_det = transform.log_abs_det_jacobian(latents[name], transform(latents[name]))
            total = total - log_det.reshape(self.num_images, -1).sum(-1)
        return total


def potential(vae: VAE, x: Tensor, perturbation: Perturbation | None = None) -> ModelPotential:
    """Energy U(z; x) (eq. 9 of the paper).

    With a ``perturbation`` that the defender assumes, e.g. ``Linf(0.1)`` or an ``UnknownRadius``,
    it is :math:`U_\\delta(z; x)` of :mod:`pyro_vae_defence.models.perturbation`.
    """
    return ModelPotential(target(vae, perturbation), x)


def target(vae: VAE, perturbation: Perturbation | None = None) -> PyroProgram:
    """The model whose posterior a defence samples: ``vae.model``, or it perturbation-aware."""
    model = vae.model
    if perturbation is None:
        return model
    if isinstance(model, BoundProgram):
        return model.around(PerturbationAware(model.program, perturbation))
    return PerturbationAware(model, perturbation)


def guide_potential(
    vae: VAE, x: Tensor, model_potential: ModelPotential | None = None
) -> Potential:
    """Energy -log q(z | x) of the guide per image, normalised, on the scale of :func:`potential`.

    It has the same unconstrained latents and log-determinants, so that ``guide_potential(vae,
    x)(z) - potential(vae, x)(z)`` is the log-weight log p(x, z) - log q(z | x); the latter may be
    given as ``model_potential``. When called, it raises ``ValueError`` if the latent sites of the
    guide are not those of the model.
    """
    energy = potential(vae, x) if model_potential is None else model_potential
    names = {site.name for site in energy.sites}

    @uncast
    def energy_of_guide(latents: LatentsLike) -> Tensor:
        trace = _get_marginal_trace(_of_latents(vae.guide), energy.constrain(latents), x)
        check_density_everywhere(trace)
        others = {s["name"] for s in latent_sites(trace) if kind(s) is Kind.DISCRETE}
        others |= {n for n, s in sample_sites(trace).items() if isinstance(s["fn"], dist.Unit)}
        if (sites := sample_sites(trace).keys() - others) != names:
            raise ValueError(
                f"guide has the latent sites {sorted(sites)}, the model {sorted(names)}; "
                "a density of the guide needs the same sites in both"
            )
        found = _energy(trace, energy.log_determinant(latents))
        for site in () if is_enumerated(trace) else sample_sites(trace).values():
            inside = distributions.within_bounds(site["fn"], site["value"])
            if inside is not None:  # a formula may have a value beyond, as an Exponential's has
                found = torch.where(image_rows(inside, site).all(1), found, torch.inf)
        return found

    return energy_of_guide


DRAWS_PER_IMAGE = 32
"""For a variance without a closed form; the average over images does the rest."""


@public
def mean_posterior_variance(
    vae: VAE,
    batches: Iterable[Any],
    generator: torch.Generator | None = None,
) -> Latents:
    """Average over images of the guide's variance, a metric that no attacker can move.

    The variance is that of the unconstrained latents, which kernels move: of log z for a
    ``LogNormal``, of one element less for a ``Dirichlet``. It has a closed form for families on the
    whole space that know it, and for ``LogNormal``. For others (constrained supports, flows, a
    ``Delta`` made of auxiliary noise) it is estimated from 32 draws per image, which runs the guide
    32 times more. A ``Delta`` that is a function of the image has variance zero, which no kernel
    takes as a metric. Discrete sites are left out.

    Args:
        vae: any Pyro VAE.
        batches: image batches ``(N, C, H, W)``, or tuples that start with one, e.g. a loader. What
            the programs take of the other entries are conditions, the rest is ignored.
        generator: source of the seed of draws, and of a hierarchy's upper groups, on draws of which
            a closed form is conditional; torch's global seed when ``None``.

    Returns:
        Site name -> tensor of one image's shape, on the unconstrained scale.

    Raises:
        ValueError: ``batches`` is empty, not on the VAE's device, or lacks conditions that the
            programs need, or a variance is not finite (a ``Cauchy``'s).
    """
    totals: Latents = {}
    count = 0
    seed = draw_seed(generator)
    with torch.no_grad(), evaluation_mode(vae):
        for batch in fetched(batches, Pause()):
            x, conditions = split(taken(batch, vae), "batches")
            check_images(x, "batches", unit_interval=False)
            check_networks_on_device("vae", vae, "batches", x)
            x = as_networks(vae, x)
            at_x = bind(vae, x, conditions)
            streams = Streams.create(len(x), seed=seed, first_image=count, device=x.device)
            for name, variance in _unconstrained_variances(at_x, x, streams).items():
                total = variance.sum(0)
                totals[name] = totals[name] + total if name in totals else total
            count += x.shape[0]
    if count == 0:
        raise ValueError("batches is empty; pass a loader of the training set")
    for name, total in totals.items():
        if total.device.type != "meta" and not bool(total.isfinite().all()):
            raise ValueError(
                f"the guide's variance of site {name!r} is not finite for some image of batches; "
                "look for images that are not"
            )
    return {name: total / count for name, total in totals.items()}


def _unconstrained_variances(vae: VAE, x: Tensor, streams: Streams) -> Latents:
    """The guide's variance of every unconstrained latent, ``(N, *event)``."""
    sites = [s for s in latent_sites(_draw(vae.guide, x, streams)) if kind(s) is not Kind.DISCRETE]
    known = {site["name"]: _closed_form_variance(site["fn"]) for site in sites}
    if any(variance is None for variance in known.values()):
        unconstrain = potential(vae, x).unconstrain
        draws = [
            unconstrain(encode(vae, x, streams=streams._replace(chain=streams.chain + draw)))
            for draw in range(DRAWS_PER_IMAGE)
        ]
    variances = {}
    for site in sites:
        name, variance = site["name"], known[site["name"]]
        if variance is None:
            values = torch.stack([draw[name] for draw in draws])
            variance = (values - values[0]).var(0)  # exactly 0 where all are equal
        gaussian = isinstance(distributions.innermost(site["fn"]), td.Normal)
        if not gaussian and not bool(variance.isfinite().all()):
            raise ValueError(
                f"site {name!r} of the guide, {site['fn']}, has a variance that is not finite; "
                "give the kernel an inverse_mass_matrix of your own, or none"
            )
        variances[name] = variance
    return variances


def _closed_form_variance(distribution: td.Distribution) -> Tensor | None:
    """Variance of the unconstrained value; ``None`` where no closed form is known."""
    innermost = distributions.innermost(distribution)
    kind = type(innermost)
    if distributions.own_methods(kind, object) and "variance" not in vars(kind):
        return None  # it may be that of a family the user's class derives from
    if isinstance(innermost, td.LogNormal):
        return innermost.base_dist.variance
    if distributions.is_point(innermost) or not distributions.is_unconstrained(distribution):
        return None
    try:
        return distribution.variance
    except (NotImplementedError, AttributeError):
        return None
