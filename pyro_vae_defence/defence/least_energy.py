r"""Least energies: scores by which a detector rejects what is far from the data, and no attack.

An alarm at attacked images can be turned against its owner: whoever changes a few pixels has a good
image rejected. The energy of the perturbation-aware posterior,

.. math:: U_\delta(z; x) = -\log p(z) - \max_{\|e\| \le \delta} \log p(x - e \mid z),

allows a score that a perturbation within the ball cannot raise: if :math:`\|x^a - x^r\| \le \delta`
and :math:`x^r` is in the range of images, then :math:`U_\delta(z; x^a) \le U_0(z; x^r)` for *every*
z, since the clean image is among those that the maximum is over. So for every set Z of latents

.. math:: \min_{z \in Z} U_\delta(z; x^a) \;\le\; \min_{z \in Z} U_0(z; x^r) .

The detector scores images by the left side, and takes its threshold from right sides of clean
images. The right side of a clean image exceeds the threshold with a probability of at most
:math:`\alpha`; hence so does the left one, whatever the attack knows. An alarm then says that
there is no clean-looking image within the ball, up to :math:`\alpha`. Two sets:

``anchor_energy``
    Z are *anchors* :math:`z_1, \dots, z_n`, the modes of :math:`U_0` found for the n calibration
    images. They do not depend on the image, so nothing can go wrong in a search: the bound holds
    with no assumption about optimisation, and up to rounding in floating point. A calibration
    image's own anchor would explain it better than any explains a new image, and is left out,

    .. math:: s_i = \min_{j \ne i} U_0(z_j; x_i) .

    This is safe: were the new image's mode an anchor too, the n + 1 scores without the own anchor
    would be exchangeable; without it the :math:`s_i`, and the threshold, can only be higher.

``least_energy``
    Z are all latents, by L-BFGS. A search finds *upper* bounds, :math:`\hat s \ge s`. On
    calibration images that is safe, the threshold is too high rather than too low. On the image in
    question it is not: a search that an attack keeps from the minimum gives false alarms. The bound
    is therefore *for an exact minimum*, or one that is missed by less than the attack leaves
    between the two sides. Searches start at the guide's mean, which an attacker controls, and at
    the anchors of least energy, which they do not; no score is above the image's ``anchor_energy``.

The second threshold is lower, as modes explain images better than anchors do; on the other hand
every image finds a better explanation. Which of both rejects more of what is strange is a matter of
data and of n; more calibration images make anchors denser.

What is not said: that what is accepted is right (attacks within the ball are accepted, by
construction), nor anything of images that were chosen for being strange, of perturbations beyond
the ball, which rounding to 8 bits may add to, or of likelihoods whose :math:`U_\delta` is inexact,
beyond that inexactness (:mod:`pyro_vae_defence.models.perturbation`).

References: Vovk, Gammerman, Shafer, "Algorithmic learning in a random world", 2005; Jeary, Kuipers,
Hosseini, Paoletti, "Verifiably robust conformal prediction", NeurIPS 2024,
https://arxiv.org/abs/2405.18942, who set the least score over a ball beside clean calibration
scores, too, and bound it by verification of networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_vae_defence.defence.base import Defence
from pyro_vae_defence.mcmc.mode import search_mode_lbfgs
from pyro_vae_defence.models import program
from pyro_vae_defence.models.conditions import take
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import Ball
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.types import VAE, ImagesLike, Latents

ENERGY_SCORES = ("anchor_energy", "least_energy")
"""Scores of the module's text; of defences that assume a perturbation in one ball."""

_NUM_STEPS = 50  # of a search; ends within .05 nats of 200, also at attacked images of MNIST
_NUM_ANCHORS = 3  # that a search starts at, beside the guide's mean


def energy_score_names(defence: Defence) -> tuple[str, ...]:
    """Those of :data:`ENERGY_SCORES` that a defence has: all or none."""
    return ENERGY_SCORES if isinstance(getattr(defence, "perturbation", None), Ball) else ()


@public
@torch.no_grad()
def calibrate_energies(defence: Defence, x: ImagesLike, name: str) -> tuple[Latents, Tensor]:
    """Anchors of clean images, unconstrained, site -> ``(n, *event)``, and their scores ``(n,)``.

    Args:
        defence: one that assumes a perturbation in a ball; it is not run.
        x: clean images ``(n, C, H, W)``, or ``(x, *conditions)``, two or more.
        name: one of :data:`ENERGY_SCORES`.

    Raises:
        ValueError: if images are no such images.
    """
    vae, images = program.at_images(defence.vae, x)
    if len(images) < 2:
        raise ValueError(f"{name} needs two clean images or more, got {len(images)}")
    with program.evaluation_mode(vae):
        found = [_search(*part, None, None) for part in _parts(defence, vae, images)]
        anchors = {site: torch.cat([z[site] for z, _ in found]) for site in found[0][0]}
        if name == "least_energy":
            return anchors, torch.cat([energy for _, energy in found])
        parts = _parts(defence, vae, images)
        energies = torch.cat([_at_anchors(defence, *part, None, anchors) for part in parts], 1)
    return anchors, energies.fill_diagonal_(math.inf).amin(0)


@public
@torch.no_grad()
def energy_scores(defence: Defence, x: ImagesLike, name: str, anchors: Latents) -> Tensor:
    r"""Least :math:`U_\delta` of each image, ``(N,)`` in nats; infinity where none is finite.

    Args:
        defence, name: as for :func:`calibrate_energies`.
        x: images ``(N, C, H, W)``, attacked or not, or ``(x, *conditions)``.
        anchors: from :func:`calibrate_energies`.
    """
    vae, images = program.at_images(defence.vae, x)
    scores = []
    with program.evaluation_mode(vae):
        for part in _parts(defence, vae, images):
            ball: Ball = defence.perturbation  # type: ignore[attr-defined]
            energies = _at_anchors(defence, *part, ball, anchors)
            score = energies.amin(0)
            if name == "least_energy":
                number = min(_NUM_ANCHORS, len(energies))
                nearest = energies.topk(number, 0, largest=False).indices.flatten()
                score = score.minimum(_search(*part, ball, lat.index(anchors, nearest))[1])
            scores.append(score)
    return torch.cat(scores)


def _parts(defence: Defence, vae: VAE, x: Tensor) -> Iterator[tuple[VAE, Tensor]]:
    """Micro-batches of images, each with a VAE for it."""
    size = _batch_size(defence)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        yield take(vae, rows), x[rows]


def _batch_size(defence: Defence) -> int:
    return int(getattr(defence, "batch_size", 1024))


def _search(
    vae: VAE, x: Tensor, ball: Ball | None, starts: Latents | None
) -> tuple[Latents, Tensor]:
    """The best of the searches from the guide's mean, and from ``starts``, copies of the rows.

    Latents, unconstrained, and their energies ``(N,)``.
    """
    energy = program.potential(vae, x, ball)
    start = lat.detach(energy.unconstrain(program.posterior_mean(vae, x)))
    energy.check(start)
    if starts is not None:
        start = {site: torch.cat([value, starts[site]]) for site, value in start.items()}
    copies = len(next(iter(start.values()))) // len(x)
    energy = energy.at(x.repeat(copies, 1, 1, 1))
    found, _ = search_mode_lbfgs(energy, start, num_steps=_NUM_STEPS)
    energies, best = lat.unfold(infinite_if_unknown(energy(found)), copies).min(0)
    rows = best * len(x) + torch.arange(len(x), device=x.device)
    return lat.index(found, rows), energies


def _at_anchors(
    defence: Defence, vae: VAE, x: Tensor, ball: Ball | None, anchors: Latents
) -> Tensor:
    """Energies of every anchor at every image, ``(anchors, N)``."""
    energy = program.potential(vae, x, ball)
    count = len(next(iter(anchors.values())))
    at_once = max(1, _batch_size(defence) // len(x))
    energies = []
    for start in range(0, count, at_once):
        some = lat.index(anchors, slice(start, start + at_once))
        z = {site: value.repeat_interleave(len(x), 0) for site, value in some.items()}
        copies = min(at_once, count - start)
        found = energy.at(x.repeat(copies, 1, 1, 1))(z)
        energies.append(lat.unfold(infinite_if_unknown(found), copies))
    return torch.cat(energies)


def infinite_if_unknown(values: Tensor) -> Tensor:
    """The worst there is in place of what is no finite number, of energies and scores."""
    return torch.where(values.isfinite(), values, math.inf)
