r"""Which observed sites are the image, and the map between their units and [0, 1].

A model may observe its image as it is, or rescaled, with its pixels in another order, or a part at
each of several sites. Every element of such an observation is an affine function of one pixel,

.. math:: v_j = a_j x_{\pi(j)} + b_j .

:func:`read_images` finds :math:`a`, :math:`b` and :math:`\pi` by running the model at a handful of
images of its own: two constant ones give a and b, two that number the pixels give :math:`\pi`, and
a random one must come out as foretold. What is no such function of the image (a binarisation, an
average of pixels, noise) is found out by that. Means of the likelihood, draws from it, and the ball
and range of a perturbation go through the map; a user's images stay in [0, 1].

A model that *reads* its image otherwise than to observe it has no mean image given latents alone:
with latents the same and images not, its likelihood differs; where pixels that are exactly black or
white stand for missing ones, at these alone. Such programs are not decoded. They pass what they
read as a condition (:mod:`pyro_vae_defence.models.conditions`), or have a method
``to_images(latents, *conditions)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import broadcast_shape  # torch's own imports its compiler
from torch import Tensor

from pyro_vae_defence.models.conditions import BoundProgram
from pyro_vae_defence.models.contract import run_on, run_untouched
from pyro_vae_defence.models.sites import (
    Site,
    aside,
    data_frame,
    get_trace,
    image_rows,
    log_prob_per_image,
    rows_dim,
    sample_sites,
)
from pyro_vae_defence.ops.checks import RefusalError
from pyro_vae_defence.ops.distributions import innermost, is_point, mean_is_own
from pyro_vae_defence.types import PyroProgram

ADVICE = (
    "give the VAE a method to_images(latents, *conditions) that returns images (M, C, H, W) in "
    "[0, 1], or observe the image itself, rescaled if need be"
)


class ImageSite(NamedTuple):
    """An observed site that is the image, or a part of it.

    Attributes:
        name: of the site.
        pixels: number of the pixel that each element of a row is, ``(E,)``, elements and pixels in
            the order of memory; ``None`` if the elements are all pixels in order.
        scale, shift: a and b in the layout of the site's value, with one row; ``None`` if the
            elements are the pixels' own values.
    """

    name: str
    pixels: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def to_pixels(self, value: Tensor) -> Tensor:
        """Elements ``(M, ...)`` in the model's units -> in those of the image."""
        if self.scale is None or self.shift is None:
            return value
        return (value - self.shift.to(value)) / self.scale.to(value)

    def to_units(self, value: Tensor) -> Tensor:
        """Undo :meth:`to_pixels`."""
        if self.scale is None or self.shift is None:
            return value
        return value * self.scale.to(value) + self.shift.to(value)


class ImageMap(NamedTuple):
    """How a model observes images ``(C, H, W)``.

    Attributes:
        shape: of an image.
        sites: those whose elements are pixels.
        others: names of the sites that depend on the image in another way.
        noisy: names of the sites that observe something else, or have another mean, at every run.
        reads: whether the mean image depends on the image when the latents do not.
        others_read: whether any density does, at the same observation.
        without_mean: names of image sites whose distribution has no finite mean, or not its own.
        weighed: names of image sites whose density depends on the image beyond their values.
        clipped: names of image sites that observe black or white as another value.
    """

    shape: tuple[int, ...]
    sites: tuple[ImageSite, ...]
    others: tuple[str, ...] = ()
    noisy: tuple[str, ...] = ()
    reads: bool = False
    others_read: bool = False
    without_mean: tuple[str, ...] = ()
    weighed: tuple[str, ...] = ()
    clipped: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the observation: that of its site, or ``"x"`` where that is not one."""
        return self.sites[0].name if len(self.sites) == 1 else "x"

    def _counts(self) -> Tensor:
        """How often each pixel is observed."""
        size = torch.Size(self.shape).numel()
        seen = [
            torch.arange(size, device="cpu") if s.pixels is None else s.pixels.cpu()
            for s in self.sites
        ]
        every = torch.cat([torch.empty(0, dtype=torch.long, device="cpu"), *seen])
        return torch.bincount(every, minlength=size)

    def check_known(self) -> None:
        """Raise a ``ValueError`` unless every pixel is observed at one place, and only observed."""
        if self.noisy:
            raise ValueError(
                "the model observes an image as something else in another run or batch, or expects "
                f"another, at {list(self.noisy)}: it draws noise outside pyro.sample, such as a "
                "binarisation, dequantisation or dropout, couples images by batch statistics, or "
                "subtracts what the latents say; do it to the images beforehand, or in train mode "
                f"only, as F.dropout(h, training=self.training), or {ADVICE}"
            )
        counts = self._counts()
        once = bool((counts == 1).all())
        if self.others and not once:
            raise ValueError(
                f"the model observes a function of the image at {list(self.others)} that is not "
                "affine in single pixels, the same for all images, such as a crop by averaging, a "
                f"binarisation, or a scale that is a condition; {ADVICE}"
            )
        if self.reads:
            raise ValueError(
                "the model reads the image otherwise than to observe it, so that latents alone do "
                "not say what it looks like; pass what it reads as a condition, model(x, part) "
                f"called with (x, part), or {ADVICE}"
            )
        if self.others and self.weighed:
            raise ValueError(
                f"the model observes a function of the image at {list(self.others)}, which tells "
                f"which pixels count at {list(self.weighed)}, as a hurdle model does, so that "
                f"their mean is not that of the image; {ADVICE}"
            )
        if not once:
            raise ValueError(
                f"the model observes {int((counts > 0).sum())} of {len(counts)} values of the image"
                f"{', some more than once' if bool((counts > 1).any()) else ''}, at "
                f"{[site.name for site in self.sites] or 'no site'}; {ADVICE}"
            )

    def check_perturbable(self) -> None:
        """Raise a ``ValueError`` unless a perturbation of the image is one of its observation."""
        if self.noisy or self.others or not self.sites:
            raise RefusalError(
                f"a perturbation-aware posterior needs pixels, observed as they are or rescaled; "
                f"the model observes {[site.name for site in self.sites]} so, and a function of "
                f"the image of another kind at {[*self.noisy, *self.others]}"
            )
        if self.reads or self.others_read:
            raise RefusalError(
                "the model reads the image otherwise than to observe it, so that a perturbation of "
                "the image is not one of its observation alone; pass what it reads as a condition, "
                "model(x, part) called with (x, part)"
            )
        if self.clipped:
            raise RefusalError(
                f"the model clips the image that it observes at {list(self.clipped)}, as in "
                "x.clamp(0.005, 0.995), so that a perturbation of the image is not one of its "
                "observation; observe x itself where the likelihood has a density at 0 and 1"
            )
        if bool((self._counts() > 1).any()):
            raise RefusalError(
                f"the model observes pixels more than once, at {[s.name for s in self.sites]}; a "
                "perturbation-aware posterior needs each at one place"
            )

    def check_mean(self) -> None:
        """As :meth:`check_known`, and every site must have a finite mean."""
        self.check_known()
        if self.without_mean:
            raise ValueError(
                f"the likelihood at {list(self.without_mean)} has no mean that is known and "
                "finite, so that there is nothing to decode to (a class with a log_prob of its own "
                f"needs a mean of its own); {ADVICE}"
            )

    def assemble(
        self, read: Callable[[Site], Tensor], sites: dict[str, Site], num_rows: int
    ) -> Tensor:
        """Images ``(M, C, H, W)`` from what is read of each image site, in the model's units.

        What is read may be one number for several elements of the site, as a mean may be.
        ``ValueError`` if that has not ``num_rows`` rows, M.
        """
        rows = []
        for site in self.sites:
            found, value = read(sites[site.name]), sites[site.name]["value"]
            found = found.expand(broadcast_shape(found.shape, value.shape))
            rows.append(image_rows(site.to_pixels(found), sites[site.name]))
        return self.arrange(rows, num_rows)

    def arrange(self, rows: list[Tensor], num_rows: int) -> Tensor:
        """Images ``(M, C, H, W)`` of rows ``(M, elements)`` of each image site.

        ``ValueError`` if these are not ``num_rows``, M.
        """
        if any(len(part) != num_rows for part in rows):
            raise ValueError(
                f"the model's observation has {len(rows[0])} rows for latents of {num_rows}; make "
                "the data plate the leftmost one, with x.shape[0] rows"
            )
        if len(rows) == 1 and self.sites[0].pixels is None:
            return rows[0].reshape((-1, *self.shape))
        order = torch.cat([s.pixels for s in self.sites if s.pixels is not None]).argsort()
        return torch.cat(rows, 1)[:, order].reshape((-1, *self.shape))


# --- Reading --------------------------------------------------------------------------------------

_LOW, _HIGH = 0.25, 0.75  # between which the pixels are numbered
_EDGES = (0.01, 0.99)  # up to which a map must hold; likelihoods on (0, 1) clamp beyond
NUM_PROBES = 7


def probes(like: Tensor) -> Tensor:
    """Images ``(7, C, H, W)``: two constant ones, two that number the pixels, two at the edges, a
    random one."""
    size = like[0].numel()
    digits = int((size - 1) ** 0.5) + 1
    number = torch.arange(size, device=like.device)
    unit = [
        torch.zeros_like(number),
        torch.full_like(number, digits),
        number // digits,
        number % digits,
    ]
    rows = [_LOW + (_HIGH - _LOW) * value.to(like.dtype) / digits for value in unit]
    rows += [torch.full_like(rows[0], edge) for edge in _EDGES]
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(size, generator=generator, dtype=torch.float64, device="cpu").to(like)
    rows.append(_EDGES[0] + (_EDGES[1] - _EDGES[0]) * noise)
    return torch.stack(rows).reshape((NUM_PROBES, *like.shape[1:]))


def read_images_with(
    model: PyroProgram, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ImageMap:
    """:func:`read_images` of a model at images ``x`` and its further arguments.

    Tensors among these have one row per image; what else there is stays as it is.
    """
    settings = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
    keywords = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    bound = BoundProgram(functools.partial(model, **settings), args, keywords)
    return read_images(bound, x)


@torch.no_grad()
def read_images(model: PyroProgram, like: Tensor) -> ImageMap:
    """How a model observes images of the shape, dtype and device of ``like``, ``(N, C, H, W)``.

    It is run at some images of its own; no random number that anyone else would draw is used up.
    Of a program with conditions they are those of its first image; with the others it must observe
    alike.

    Raises:
        ValueError: if the model fails on these images, or declares too few event dimensions.
    """
    shape = tuple(like.shape[1:])
    x = probes(like)
    if like.device.type == "meta":  # no values to look at
        names = [n for n, s in sample_sites(get_trace(model, x)).items() if _observes(s)]
        return ImageMap(shape, tuple(ImageSite(n, None, None, None) for n in names))
    first = torch.zeros(1, dtype=torch.long, device=like.device)
    one = model.take(first) if isinstance(model, BoundProgram) else model
    with aside(like.device):
        trace = run_untouched("vae.model", one, x)
        sites = sample_sites(trace)
        latents = {n: site["value"] for n, site in sites.items() if not site["is_observed"]}
        # Latents as they were, other images, and more of them: what changes has seen images.
        dims = {n: rows_dim(s) for n, s in sites.items()}
        extremes = torch.stack([torch.zeros_like(x[0]), torch.ones_like(x[0])])
        others_x = torch.cat([x.roll(1, 0), extremes])
        rows_of = torch.arange(len(others_x), device=x.device)
        rows_of = rows_of.masked_fill(rows_of >= len(x), 0)
        more = {n: v.index_select(dims[n], rows_of) for n, v in latents.items()}
        conditioned = poutine.condition(one, data=more)
        moved = sample_sites(run_on("vae.model", conditioned, others_x))
        for each, number in ((sites, len(x)), (moved, len(others_x))):
            for site in each.values():
                data_frame(site, number)
        # One image, and another, under the conditions of all.
        every, other = {}, {}
        if isinstance(model, BoundProgram) and model.num_images > 1:
            number = model.num_images
            whole = model.take(torch.arange(number, device=like.device))
            every, other = (
                sample_sites(run_untouched("vae.model", whole, same.repeat(number, 1, 1, 1)))
                for same in (x[-1:], x[:1])
            )
    images: list[ImageSite] = []
    others: list[str] = []
    noisy: list[str] = []
    without_mean: list[str] = []
    clipped: list[str] = []
    reads = False
    for name, site in sites.items():
        if not _observes(site):
            continue
        value = site["value"]
        rows, again = image_rows(value, site), image_rows(moved[name]["value"], moved[name])
        if rows.shape[1:] != again.shape[1:]:
            raise ValueError(
                f"site {name!r} observes a value of shape {tuple(value.shape)}, which has no row "
                f"per image at dimension {rows_dim(site)}, where the data plate and "
                f"{site['fn'].event_dim} event dimensions place it; declare all event dimensions "
                "with .to_event(...)"
            )
        if _differ(rows, again[: len(x)].roll(-1, 0)):
            noisy.append(name)
            continue
        # A program in float32 rounds images of float64.
        exact = x.float() if value.dtype == torch.float32 else x
        found = _read_site(name, rows.to(exact.dtype), exact.flatten(1))
        if found is not None and found.scale is not None and found.shift is not None:
            scale, shift = (_in_layout(part, site) for part in (found.scale, found.shift))
            found = found._replace(scale=scale, shift=shift)
        label = found is not None and found.pixels is not None and len(found.pixels) == 0
        ends = again[len(x) :]
        if label and _differ(ends, rows[:1].expand_as(ends)):
            found, label = None, False  # such as which pixels are black
        alike = True
        if every:
            under_all = image_rows(every[name]["value"], every[name])
            expected = image_rows(other[name]["value"], other[name]) if label else rows[-1:]
            alike = not _differ(under_all, expected)
        if found is None or not alike:
            others.append(name)
            continue
        if label:
            continue  # a further observation, whatever the conditions
        images.append(found)
        pixels = image_rows(found.to_pixels(moved[name]["value"]), moved[name])[len(x) :]
        if _differ(pixels, extremes.flatten(1)[:, :1].to(pixels).expand_as(pixels)):
            clipped.append(name)
        try:
            mean = site["fn"].mean
        except NotImplementedError:
            without_mean.append(name)
            continue
        if not mean_is_own(site["fn"]):
            without_mean.append(name)
            continue
        # Where no density is finite either, the fault is another, which energies will show.
        if not bool(mean.isfinite().all()) and bool(site["fn"].log_prob(value).isfinite().all()):
            without_mean.append(name)
            continue
        if not _spans(mean.shape, value.shape):
            raise ValueError(
                f"site {name!r} observes images {shape} as a value of shape {tuple(value.shape)} "
                f"under a distribution of shape {tuple(mean.shape)}; pass images (C, H, W) as the "
                "VAE was made for, x.permute(0, 3, 1, 2) where channels come last"
            )
        here, there = (
            each.expand(s["value"].shape)
            for each, s in ((mean, site), (moved[name]["fn"].mean, moved[name]))
        )
        reads |= _differ(image_rows(here, site)[rows_of], image_rows(there, moved[name]))
    if reads:  # unless it is noise
        with aside(like.device):
            second = sample_sites(run_on("vae.model", poutine.condition(one, data=latents), x))
        with_mean = [site.name for site in images if site.name not in without_mean]
        noisy += [n for n in with_mean if _differ(sites[n]["fn"].mean, second[n]["fn"].mean)]
    weighed = [
        name
        for name, site in sites.items()
        if not (_is_replaced(site) or _same_density(site, moved[name], dims[name], rows_of))
    ]
    return ImageMap(
        shape,
        tuple(images),
        tuple(others),
        tuple(noisy),
        reads,
        bool(weighed),
        tuple(without_mean),
        tuple(site.name for site in images if site.name in weighed),
        tuple(clipped),
    )


def _same_density(site: Site, moved: Site, dim: int, rows: Tensor) -> bool:
    """Whether a site has the same density at its values, of these ``rows``, in both runs."""
    again = {**moved, "value": site["value"].index_select(dim, rows)}
    here = log_prob_per_image(site, data_frame(site).size)[rows]
    there = log_prob_per_image(again, len(rows))
    return torch.allclose(here, there, rtol=1e-4, atol=1e-3, equal_nan=True)


def _spans(shape: torch.Size, whole: torch.Size) -> bool:
    """Whether a tensor of one shape can be expanded to the other."""
    own = (1,) * (len(whole) - len(shape)) + tuple(shape)
    return len(own) == len(whole) and all(a in (1, b) for a, b in zip(own, whole, strict=True))


def _in_layout(row: Tensor, site: Site) -> Tensor:
    """A row of :func:`image_rows` as one row of the site's value."""
    dim = rows_dim(site)
    rest = site["value"].movedim(dim, 0).shape[1:]
    return row.reshape(1, *rest).movedim(0, dim)


def _differ(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)


def _observes(site: Site) -> bool:
    """Whether a site may hold the image: neither a factor nor what a reparametrisation leaves."""
    return bool(site["is_observed"]) and not (isinstance(site["fn"], Unit) or _is_replaced(site))


def _is_replaced(site: Site) -> bool:
    """Whether a site is a point at its own value: what ``poutine.reparam`` leaves of a latent."""
    return is_point(site["fn"]) and innermost(site["fn"]).v is site["value"]


def _read_site(name: str, rows: Tensor, x: Tensor) -> ImageSite | None:
    """The map from probes ``x``, ``(>= 5, pixels)``, to a site's ``rows``; ``None`` without one.

    A site that does not depend on the image has a map without elements.
    """
    nothing = ImageSite(name, torch.empty(0, dtype=torch.long, device=x.device), None, None)
    if rows.shape[0] != x.shape[0]:
        return nothing if rows.shape[0] == 1 else None
    if bool((rows == rows[:1]).all()):
        return nothing
    size = x.shape[1]
    digits = int((size - 1) ** 0.5) + 1
    scale = (rows[1] - rows[0]) / (_HIGH - _LOW)
    shift = rows[0] - _LOW * scale
    high, low = ((rows[2:4] - shift) / scale - _LOW) / (_HIGH - _LOW) * digits
    pixels = high.round() * digits + low.round()
    if not bool((pixels.isfinite() & (pixels >= 0) & (pixels < size)).all()):
        return None
    pixels = pixels.long()
    foretold = scale * x[:, pixels] + shift
    rounding = 64 * torch.finfo(x.dtype).eps * (scale.abs() + shift.abs())
    if not bool(((rows - foretold).abs() <= rounding).all()):
        return None
    ordered = len(pixels) == size and bool((pixels == torch.arange(size, device=x.device)).all())
    plain = bool(((scale - 1).abs() <= rounding).all() and (shift.abs() <= rounding).all())
    return ImageSite(
        name,
        None if ordered else pixels,
        None if plain else scale,
        None if plain else shift,
    )
