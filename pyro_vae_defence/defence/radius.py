r"""How large a perturbation to assume: what clean images say about it.

The radius :math:`\delta` of the perturbation-aware posterior is the defender's choice. Too small,
and part of an attack still counts as signal; too large, and details of clean images are explained
away. Nothing here looks at an attack.

- :func:`calibrate_radius` leaves the radius open: a grid, each with the penalty that makes clean
  images prefer none.
- :func:`choose_radius` fixes it: the largest whose cost on clean images stays within a bound.
- :func:`scores_by_radius` measures what a wrong guess costs, on whatever images it is given.

The penalty of :math:`\delta` is a quantile over clean images of the gain at the posterior modes,

.. math:: G_\delta(x) = \min_z U_0(z; x) - \min_z U_\delta(z; x) \ge 0 .

The quantile q of n gains is the k-th smallest, :math:`k = \lceil (n + 1) q \rceil`: a further
clean image, exchangeable with these, gains more with a probability of at most 1 - q. With .95 and
19 images or more, at most one clean image in twenty prefers that radius to none (by the densities
at the modes; the volumes around them are taken for equal). An attack's gain is larger:
every pixel it has moved away from its explanation adds to it, up to the attack's own radius, and
beyond that it grows about as on clean images. Radii that are too small are excluded, those that are
too large only as far as their penalty goes on growing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence import metrics
from pyro_vae_defence.defence.controls import NoDefence
from pyro_vae_defence.defence.mcmc import MCMCDefence
from pyro_vae_defence.defence.result import DefenceResult
from pyro_vae_defence.mcmc.mode import search_mode_lbfgs
from pyro_vae_defence.models import program
from pyro_vae_defence.models.conditions import split, take
from pyro_vae_defence.models.perturbation import UnknownRadius, UnknownRadiusLikelihood
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import Ball, Linf
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import (
    check_integer,
    check_not_negative,
    check_per_row,
    check_within,
    plain,
)
from pyro_vae_defence.ops.streams import draw_seed
from pyro_vae_defence.types import VAE, ImagesLike, LatentsLike

ResultScore = Callable[[DefenceResult], Tensor]
"""A defence's result -> one score per image ``(N,)``, higher is better."""


class RadiusChoice(NamedTuple):
    """What :func:`choose_radius` found.

    Attributes:
        radius: the largest radius within the bound.
        clean_costs: undefended minus defended score of every radius and image, ``(radii, N)``.
    """

    radius: float
    clean_costs: Tensor


def similarity_to_input(result: DefenceResult) -> Tensor:
    """MS-SSIM, variant ``paper``, between each image and its reconstruction, ``(N,)``."""
    return metrics.ms_ssim(result.x, result.reconstruction, variant="paper")


@public
def calibrate_radius(
    vae: VAE,
    clean_images: ImagesLike,
    radii: Iterable[float],
    *,
    ball: type[Ball] = Linf,
    quantile: float = 0.95,
    num_steps: int = 30,
    batch_size: int = 1024,
) -> UnknownRadius:
    """An unknown radius whose penalties are the gains of clean images.

    Args:
        vae: any Pyro VAE.
        clean_images: ``(N, C, H, W)`` in [0, 1], or ``(x, *conditions)``; a hundred will do, of the
            validation set rather than the test set.
        radii: increasing radii >= 0. With 0 among them clean images keep the paper's posterior.
        ball: kind of ball.
        quantile: share q of clean images, 0 to 1, that gain no more than the penalty. So many are
            promised of further ones from q / (1 - q) images on, 19 for .95; of fewer the penalty is
            the largest gain.
        num_steps: L-BFGS steps of each search, from the guide's mean.
        batch_size: most images at a time.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from pyro_vae_defence.models import ConvVAE
        >>> unknown = calibrate_radius(
        ...     ConvVAE().eval(), torch.rand(4, 1, 28, 28), (0.0, 0.1), num_steps=2
        ... )
        >>> unknown.penalties[0], unknown.penalties[1] > 0
        (0.0, True)
    """
    vae, x = program.at_images(vae, clean_images, "clean_images")
    check_within("quantile", quantile, "[0, 1]")
    check_integer("num_steps", num_steps, 0)
    check_integer("batch_size", batch_size)
    radii = _as_radii(radii)
    balls = UnknownRadius(ball, radii, (0.0,) * len(radii)).balls
    with program.evaluation_mode(vae):
        parts = [slice(n, n + batch_size) for n in range(0, len(x), batch_size)]
        gains = [_gains(take(vae, part), x[part], balls, num_steps) for part in parts]
    rank = math.ceil((len(x) + 1) * quantile - 1e-9)  # which rounding may not raise
    penalties = torch.cat(gains, 1).kthvalue(min(max(rank, 1), len(x)), dim=1).values
    return UnknownRadius(ball, radii, tuple(penalties.tolist()))


def _gains(vae: VAE, x: Tensor, balls: Iterable[Ball | None], num_steps: int) -> Tensor:
    """What each ball gains at the posterior modes, ``(balls, N)``, in nats."""
    unperturbed = program.potential(vae, x)
    with torch.no_grad():
        start = lat.detach(unperturbed.unconstrain(program.posterior_mean(vae, x)))
    mode, _ = search_mode_lbfgs(unperturbed, start, num_steps=num_steps)
    gains = []
    for ball in balls:
        energy = program.potential(vae, x, ball)
        # From the same mode, so that a gain is never negative.
        closer, _ = search_mode_lbfgs(energy, mode, num_steps=0 if ball is None else num_steps)
        with torch.no_grad():
            gains.append(unperturbed(mode) - energy(closer))
    return torch.stack(gains)


@public
def radius_probabilities(
    vae: VAE, latents: LatentsLike, x: ImagesLike, perturbation: UnknownRadius
) -> Tensor:
    """Posterior probability of every radius given latents, ``(N, radii)``.

    Args:
        vae: any Pyro VAE.
        latents: one row per image, as in :attr:`DefenceResult.latents`.
        x: the images that were defended, ``(N, C, H, W)``.
        perturbation: what the defence assumed.
    """
    vae, x = program.at_images(vae, x)
    model = program.target(vae, perturbation)
    with torch.no_grad(), program.evaluation_mode(vae):
        for site in program.observed(model, latents, x).values():
            if isinstance(site["fn"], UnknownRadiusLikelihood):
                return site["fn"].log_joint(site["value"]).reshape(len(x), -1).softmax(-1)
    raise AssertionError("a perturbation-aware model observes its image")


@public
def scores_by_radius(
    vae: VAE,
    x: ImagesLike,
    radii: Iterable[float],
    *,
    score: ResultScore = similarity_to_input,
    ball: type[Ball] = Linf,
    defence: Callable[..., Any] = MCMCDefence,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Score of a defence that assumes each radius, ``(radii, N)``: what a wrong guess costs.

    Call it with clean images, and with attacked ones and a score that compares with what they were,
    e.g. ``score=lambda result: metrics.ms_ssim(reference, result.reconstruction)``.

    Args:
        vae: any Pyro VAE.
        x: images ``(N, C, H, W)`` in [0, 1], clean or attacked.
        radii: radii >= 0; 0 is the paper's target.
        score: one value per image, higher is better.
        ball: kind of ball.
        defence: called as ``defence(vae, perturbation=...)``, e.g. ``functools.partial(MCMCDefence,
            num_samples=20)`` or ``PosteriorModeDefence``. All radii share one seed, so that their
            noise is common.
        generator: source of that seed; torch's global seed when ``None``.
    """
    program.check_vae(vae)
    return _scores(_assuming(vae, _as_radii(radii), ball, defence), x, score, draw_seed(generator))


def _assuming(
    vae: VAE, radii: Iterable[float], ball: type[Ball], defence: Callable[..., Any]
) -> list[Any]:
    """The defence that assumes each radius, all of which check their settings before any runs."""
    return [defence(vae, perturbation=ball(radius) if radius else None) for radius in radii]


def _scores(defences: Iterable[Any], x: ImagesLike, score: ResultScore, seed: int) -> Tensor:
    """Those of each defence, with the same noise, ``(defences, N)``."""
    num_images, scores = len(split(x)[0]), []
    for run in defences:
        found = score(run(x, torch.Generator().manual_seed(seed)))
        values = check_per_row("score", found, num_images).detach()
        # Classes that are right, as bool or uint8, have no differences.
        scores.append(values.to(torch.promote_types(values.dtype, torch.float32)))
    return torch.stack(scores)


def _as_radii(radii: Iterable[float]) -> tuple[float, ...]:
    """At least one number, none of them negative."""
    if isinstance(radii, Tensor):
        radii = radii.tolist()
    if isinstance(radii, str) or not isinstance(radii, Iterable):
        raise ValueError(f"radii must be several numbers, such as (0.1, 0.2), got {radii!r}")
    found = tuple(map(plain, radii))
    if not found:
        raise ValueError("radii is empty; give at least one radius")
    for radius in found:
        check_not_negative("each of radii", radius)
    return found


@public
def choose_radius(
    vae: VAE,
    clean_images: ImagesLike,
    radii: Iterable[float],
    *,
    max_clean_cost: float,
    score: ResultScore = similarity_to_input,
    ball: type[Ball] = Linf,
    defence: Callable[..., Any] = MCMCDefence,
    generator: torch.Generator | None = None,
) -> RadiusChoice:
    """The largest radius whose clean cost stays within a bound.

    The cost of a radius is the mean score of the undefended VAE minus that of the defence, both on
    clean images and with the same noise. For a loss of accuracy, score whether a label is right:
    ``score=lambda result: (classify(result.latents) == labels).float()``.

    Args:
        vae: any Pyro VAE.
        clean_images: ``(N, C, H, W)`` in [0, 1], not of the test set.
        radii: candidates >= 0.
        max_clean_cost: largest mean loss of score that is accepted.
        score, ball, defence, generator: as for :func:`scores_by_radius`.

    Raises:
        ValueError: if no radius stays within the bound.
    """
    radii = _as_radii(radii)
    check_within("max_clean_cost", max_clean_cost, "[-inf, inf]")
    runs = [NoDefence(vae), *_assuming(vae, radii, ball, defence)]
    undefended, *defended = _scores(runs, clean_images, score, draw_seed(generator))
    costs = undefended - torch.stack(defended)
    means = costs.double().mean(1).tolist()
    fitting = [radius for radius, mean in zip(radii, means, strict=True) if mean <= max_clean_cost]
    if not fitting:
        raise ValueError(
            f"no radius of {radii} keeps the clean cost within max_clean_cost={max_clean_cost:g} "
            f"(the least is {min(means):.3g}); allow more, or add smaller radii"
        )
    return RadiusChoice(max(fitting), costs)
