"""The marginal likelihood of images under any Pyro VAE, one value per image, in nats.

:mod:`pyro_vae_defence.metrics.likelihood` has the estimators; here the program supplies the
densities log p(x, z) = -U(z; x) and log q(z | x), both sums of unscaled log-probabilities over the
sites of model and guide. Latents of constrained support are moved on the unconstrained scale, whose
log-determinant enters both and leaves log p(x) as it is. Every image has its own random stream:
its estimate depends on the seed and its place in the batch, never on how much is computed at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributions as td

from pyro_vae_defence.metrics.likelihood import (
    Transition,
    ais,
    check_schedule,
    importance_nll,
    sigmoid_schedule,
)
from pyro_vae_defence.models import program
from pyro_vae_defence.models.conditions import take
from pyro_vae_defence.models.observation import ImageMap
from pyro_vae_defence.models.sites import (
    aside,
    check_same_masks,
    get_trace,
    log_prob_per_image,
    sample_sites,
)
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.distributions import innermost
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import VAE, ImagesLike, Latents, LatentsLike

ROWS = 1000
"""Pairs of image and latents computed at once: some 100 MB for the paper's VAE."""


@public
@torch.no_grad()
def nll(
    vae: VAE,
    x: ImagesLike,
    num_samples: int = 1000,
    rows: int = ROWS,
    generator: torch.Generator | None = None,
) -> Tensor:
    """-log p(x) of every image by importance sampling from the guide (Table 7 of the paper).

    ``(N,)``, in nats, without gradient, in eval mode: an upper bound in expectation (IWAE's).
    Where the guide's support is a part of the prior's, it stays one however many the samples.

    Args:
        vae: any Pyro VAE.
        x: images ``(N, C, H, W)``, or ``(x, *conditions)`` for a conditional VAE's -log p(x | c).
            In [0, 1], unless the model's likelihood knows other values, as a Gaussian's does.
        num_samples: draws from the guide per image; 1000 in the paper.
        rows: pairs of image and draw computed at once: bounds the memory, not the result.
        generator: source of randomness; torch's global seed when ``None``.

    Raises:
        ValueError: ``vae`` or ``x`` is unsuitable, or a number is not positive.
    """
    vae, x = program.at_images(vae, x, unit_interval=False)
    check_integer("num_samples", num_samples)
    check_integer("rows", rows)
    _check(vae, x, rows)
    seed = draw_seed(generator)
    results = []
    with program.evaluation_mode(vae):
        for first in range(0, x.shape[0], rows):
            batch = x[first : first + rows]
            streams = Streams.create(len(batch), seed=seed, first_image=first, device=x.device)
            chunk = max(1, min(rows // len(batch), num_samples))
            weights = _weights(take(vae, slice(first, first + rows)), batch, streams)
            results.append(importance_nll(weights, num_samples, chunk))
    result = torch.cat(results)
    if x.device.type != "meta" and (rows_of_nan := result.isnan().nonzero()[:, 0].tolist()):
        raise ValueError(
            f"log p(x) of images {rows_of_nan[:5]} is not a number: a log-probability of model or "
            "guide is none there; look at their parameters, and at x"
        )
    return result


@torch.no_grad()
def _check(vae: VAE, x: Tensor, rows: int) -> None:
    """Refuse latents of which guide and model mask different elements, and images out of [0, 1]
    that a Bernoulli observes: its formula has a value there, which is no log-probability."""
    if x.device.type == "meta":
        return
    with program.evaluation_mode(vae), aside(x.device):
        for first in range(0, len(x), rows):
            few = slice(first, first + rows)
            part, batch = take(vae, few), x[few]
            trace = get_trace(part.model, batch)
            check_same_masks(trace, get_trace(part.guide, batch))
            sites = sample_sites(trace)
            for name in sorted(site.name for site in program.image_map(part, batch).sites):
                likelihood, value = innermost(sites[name]["fn"]), sites[name]["value"]
                low, high = float(value.min()), float(value.max())
                of_intensities = isinstance(likelihood, (td.Bernoulli, td.ContinuousBernoulli))
                if of_intensities and (low < 0 or high > 1):
                    raise ValueError(
                        f"x must lie in [0, 1] where site {name!r} observes it, whose likelihood "
                        f"is of intensities; got values from {low:g} to {high:g}"
                    )


def _weights(vae: VAE, x: Tensor, streams: Streams) -> Callable[[int], Tensor]:
    """Log-weights ``(k, N)`` of the next k draws per image; draws are numbered as chains are."""
    draw = program.GuideDraws(vae, x)
    drawn = 0

    # Reading a model's sites runs it once: only the last chunk may differ in size.
    @functools.lru_cache(maxsize=1)
    def potential(count: int) -> program.ModelPotential:
        return program.potential(vae, x.repeat(count, 1, 1, 1))

    def weigh(count: int) -> Tensor:
        nonlocal drawn
        chain = torch.arange(drawn, drawn + count, device=x.device).repeat_interleave(len(x))
        drawn += count
        energy = potential(count)
        values, log_q = draw(count, Streams(streams.seed, streams.image.repeat(count), chain))
        latents = energy.check(energy.unconstrain(values))
        # U holds minus the log-determinant of the transforms; q, read on the support, does not.
        log_joint = energy.log_determinant(latents) - energy(latents)
        # Outside the prior's support the joint density is zero, wherever a transform leads.
        inside = energy.supported(values)
        return torch.where(inside, log_joint - log_q, -torch.inf).view(count, len(x))

    return weigh


@public
def ais_log_weights(
    vae: VAE,
    x: ImagesLike,
    transition: Transition,
    schedule: Tensor | None = None,
    num_chains: int = 10,
    initial: LatentsLike | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Log-weights of annealed importance sampling between the guide and p(z | x).

    Shape ``(num_chains, N)``, in nats, without gradient. With a rising schedule their
    ``log_mean_exp`` estimates log p(x) from below. With a falling one, and ``initial`` drawn from
    the exact posterior, ``-log_mean_exp`` of them does from above.

    Args:
        vae: any Pyro VAE.
        x: images ``(N, C, H, W)``, or ``(x, *conditions)``; as drawn by :func:`simulate`, which a
            Gaussian likelihood does not keep in [0, 1].
        transition: moves ``num_chains * N`` rows of unconstrained latents, chains folded in.
        schedule: inverse temperatures; 100 of :func:`sigmoid_schedule` when ``None``.
        num_chains: M, independent chains per image.
        initial: latents of ``num_chains * N`` rows on their support; by default the guide's draws.
        generator: source of the draws from the guide, and of what ``transition`` draws from torch's
            global seed; that seed itself when ``None``.

    Raises:
        ValueError: an argument does not fit, or a falling schedule comes without ``initial``.
    """
    vae, x = program.at_images(vae, x, unit_interval=False)
    check_integer("num_chains", num_chains)
    schedule = sigmoid_schedule(100) if schedule is None else schedule
    if initial is None and check_schedule(schedule)[0] != 0.0:
        raise ValueError(
            "schedule falls, and initial is None: pass exact draws of p(z | x), as simulate returns"
        )
    _check(vae, x, len(x))
    repeated = x.repeat(num_chains, 1, 1, 1)
    with program.evaluation_mode(vae):
        potential = program.potential(vae, repeated)
        guide = program.guide_potential(vae, repeated, potential)
        if initial is None:
            streams = Streams.create(len(x), num_chains, generator=generator, device=x.device)
            with torch.no_grad():
                initial = program.encode(vae, repeated, streams=streams)
        elif generator is not None:
            draw_seed(generator)  # or the next call's transition would meet the same noise
        start = potential.check(potential.unconstrain(initial))
        log_weights = ais(
            potential, lambda latents: -guide(latents), lat.detach(start), transition, schedule
        )
    return lat.unfold(log_weights, num_chains)


@public
@torch.no_grad()
def simulate(vae: VAE, x: ImagesLike) -> tuple[Latents, Tensor]:
    """Latents of ``N`` rows from the prior, and images ``(N, C, H, W)`` from p(x | z).

    The latents are an exact draw from p(z | x), as bidirectional Monte Carlo needs.

    Args:
        vae: any Pyro VAE whose likelihood can be sampled.
        x: images ``(N, C, H, W)``, of which only shape, dtype and device matter, or
            ``(x, *conditions)``.

    Raises:
        ValueError: for a likelihood that cannot be sampled, and for a model in which p(x, z) is not
            the prior times that likelihood: it reads the image in another place, observes more
            that tells of the latents, or clips what is drawn.
    """
    vae, x = program.at_images(vae, x, unit_interval=False)
    with program.evaluation_mode(vae):
        latents = program.prior(vae, x)
        decoder = program.Decoder(vae, x)
        images = decoder.sample(latents)
        _check_joint(vae, x, latents, decoder.images)
        _check_observed(vae, latents, images, decoder.images)
        return latents, images


def _check_observed(vae: VAE, latents: Latents, images: Tensor, sites: ImageMap) -> None:
    """Refuse a model that observes something else than what was drawn."""
    if images.device.type == "meta":
        return
    found = program.observed(vae.model, latents, images)
    seen = sites.assemble(lambda site: site["value"], found, len(images))
    far = (seen - images).abs() > 1e-3 * images.abs().clamp(min=1.0)
    if bool(far.any()):
        raise ValueError(
            f"the model clips {int(far.sum())} of {far.numel()} pixels drawn from its likelihood, "
            f"which lie between {float(images.min()):g} and {float(images.max()):g}, before it "
            "observes them, so that its latents are none of p(z | x) at the images simulated; "
            "observe x itself"
        )


def _check_joint(vae: VAE, x: Tensor, latents: Latents, images: ImageMap) -> None:
    """Refuse a model whose latents, given the image, depend on more than prior and likelihood."""
    if images.others_read:
        raise ValueError(
            "the model reads the image otherwise than to observe it, as a prior p(z | x) does, so "
            "that draws of its prior are none of p(z | x) at the images simulated; pass what it "
            "reads as a condition, model(x, part) called with (x, part)"
        )
    if x.device.type == "meta":
        return
    with aside(x.device):
        others = program.prior(vae, x)
    known = {site.name for site in images.sites}
    here, there = (
        {
            name: log_prob_per_image(site, len(x))
            for name, site in program.observed(vae.model, values, x).items()
            if name not in known
        }
        for values in (latents, others)
    )
    if telling := [name for name in here if not torch.allclose(here[name], there[name])]:
        raise ValueError(
            f"the model observes {telling} beside the image, and these depend on the latents, so "
            "that draws of its prior are none of p(z | x) given them; simulate from a model that "
            "does not observe them"
        )
