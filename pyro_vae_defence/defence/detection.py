r"""Suspicion: what a defence reveals about whether its image was attacked, one score per image.

An attacked encoding is a bad explanation of the image, so a chain moves far and downhill. With
:math:`z_0` the undefended encoding, where chains start, :math:`z_t` for :math:`t = 1, \dots, T` the
draws of the defence, x the image that it looks at, :math:`U_0` the energy of the model and U that
which the defence samples (:math:`U_\delta` if it assumes a perturbation, else :math:`U_0`), g the
decoder, and v a variance of the latents per dimension, all averaged over chains:

- ``energy_drop``: :math:`U(z_0) - \overline{U(z_t)}`, in nats;
- ``perturbation_gain``: :math:`U_0(z_T) - U_\delta(z_T)`: how many nats the assumption of a
  perturbation is worth;
- ``start_energy``, ``end_energy``: :math:`U_0(z_0)` and :math:`U_0(z_T)`;
- ``start_error``, ``end_error``: :math:`\|x - g(z_0)\|^2` and :math:`\|x - g(z_T)\|^2` per pixel;
- ``distance``: from :math:`z_0` to the mean of the draws, root mean square over the dimensions in
  units of :math:`\sqrt v`;
- ``disagreement``: root mean square distance of the chains' means from their common mean, in the
  same units. Draws of the guide are chains of one draw each.

All are high where an attack is suspected. ``start_energy`` and ``start_error`` need no chain: they
are the controls among the scores, and with ``disagreement`` all that :class:`EncoderDefence` and
:class:`NoDefence` have without a filter. With a filter, :math:`z_0` is the encoding of the image
before it, so that ``distance`` is what the filter changes (*feature squeezing*, Xu, Evans, Qi,
2018, https://arxiv.org/abs/1704.01155). Chains that start at the prior, or at walks from it, have
no :math:`z_0`, and none of its four scores. Latents are compared on the unconstrained scale, where
chains move and ``mean_posterior_variance`` is given; angles, of ``VonMises``, on both sides of the
border between -pi and pi are far apart there.

:class:`~pyro_vae_defence.defence.Detector` turns a score into an alarm whose rate on clean images
is set beforehand. :func:`pyro_vae_defence.metrics.auroc` and
:func:`~pyro_vae_defence.metrics.fpr_at_tpr` measure a score, against clean images, and against
random noise of the same size, which tells a detector of attacks from one of anything unusual.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence.defence.base import BaseDefence, Defence, check_defence, runs
from pyro_vae_defence.defence.controls import EncoderDefence
from pyro_vae_defence.defence.result import ROWS, DefenceResult, some_images
from pyro_vae_defence.models.conditions import bind, take
from pyro_vae_defence.models.program import Decoder, at_images, evaluation_mode, potential
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.types import VAE, ImagesLike, Latents, LatentsLike

SCORES = (
    "energy_drop", "perturbation_gain", "start_energy", "start_error", "end_energy", "end_error",
    "distance", "disagreement",
)  # fmt: skip
"""Scores of the module's text, in the order of tables."""


@public
@torch.no_grad()
def detection_scores(
    defence: Defence, result: DefenceResult, variance: LatentsLike | None = None
) -> dict[str, Tensor]:
    """Scores of every image from a run of ``defence``: name -> ``(N,)``, see the module's text.

    Args:
        defence: the defence or control that made the run.
        result: what it returned.
        variance: site -> variances of one image's shape that define the unit of distance, e.g. the
            training set's ``mean_posterior_variance``, which an attacker cannot move; 1 by default.

    Returns:
        The scores that such a defence has: which ones depends on its settings, never on images.

    Raises:
        ValueError: if ``variance`` has other sites or shapes than the latents, or a number that is
            not positive.
    """
    if variance is not None:
        check_variance(variance)
        if variance.keys() != result.samples.keys():
            raise ValueError(
                f"variance must have the latents' sites {sorted(result.samples)}, got "
                f"{sorted(variance)}"
            )
        for name, value in variance.items():
            event = tuple(result.samples[name].shape[3:])
            ends = zip(reversed(value.shape), reversed(event))
            if value.dim() > len(event) or any(size not in (1, full) for size, full in ends):
                raise ValueError(
                    f"variance[{name!r}] must have one image's shape {event}, got "
                    f"{tuple(value.shape)}"
                )
    num_chains = len(next(iter(result.samples.values())))
    at_once = max(1, ROWS // num_chains)
    vae, parts = bind(defence.vae, result.x, result.conditions), []
    for first in range(0, len(result.x), at_once):
        rows = slice(first, first + at_once)
        parts.append(_scores(defence, take(vae, rows), some_images(result, rows), variance))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _scores(
    defence: Defence, vae: VAE, result: DefenceResult, variance: LatentsLike | None
) -> dict[str, Tensor]:
    """The same, of arguments that have been checked, by the VAE at these images."""
    perturbation = getattr(defence, "perturbation", None)
    encoder, moves = isinstance(defence, EncoderDefence), _moves(defence)
    encoded = _encoded(defence)
    num_chains, num_draws = next(iter(result.samples.values())).shape[:2]
    x = result.x.repeat(num_chains, 1, 1, 1)

    def over_chains(values: Tensor) -> Tensor:
        return lat.unfold(values, num_chains).mean(0)

    def unfold(name: str, latents: Latents) -> Tensor:
        return lat.unfold(latents[name], num_chains)

    with evaluation_mode(vae):
        plain = potential(vae, x)
        sampled = plain if perturbation is None else potential(vae, x, perturbation)
        decode = Decoder(vae, x)

        def error(latents: Latents) -> Tensor:
            return over_chains((decode(latents, x).clamp(0.0, 1.0) - x).square().mean((1, 2, 3)))

        def draw(number: int) -> Latents:
            return _fold({name: value[:, number] for name, value in result.samples.items()})

        initial = _fold(result.initial)
        start = sampled.unconstrain(initial)
        end = sampled.unconstrain(draw(-1))
        samples = result.samples
        if sampled.transforms:
            draws = [sampled.unconstrain(draw(number)) for number in range(num_draws)]
            samples = {n: torch.stack([unfold(n, z) for z in draws], 1) for n in samples}
        scores = {}
        if moves:
            if "lp" in result.sample_stats:
                after = -result.sample_stats["lp"].mean(1)
            else:
                energies = [sampled(sampled.unconstrain(draw(t))) for t in range(num_draws)]
                after = lat.unfold(torch.stack(energies).mean(0), num_chains)
            if encoded:
                scores["energy_drop"] = (lat.unfold(sampled(start), num_chains) - after).mean(0)
            end_energy = plain(end)
            if perturbation is not None:
                scores["perturbation_gain"] = over_chains(end_energy - sampled(end))
        if encoded:
            scores["start_energy"] = over_chains(plain(start))
            scores["start_error"] = error(initial)
        if moves:
            scores["end_energy"] = over_chains(end_energy)
            scores["end_error"] = error(draw(-1))
    means = {name: value.mean(1) for name, value in samples.items()}
    if moves and encoded:
        moved = {name: means[name] - unfold(name, start) for name in means}
        scores["distance"] = _length(moved, variance).mean(0)
    if encoder:
        means = {name: value.flatten(0, 1) for name, value in samples.items()}
    if num_chains > 1 or (encoder and num_draws > 1):
        spread = {name: value - value.mean(0) for name, value in means.items()}
        scores["disagreement"] = _length(spread, variance).square().mean(0).sqrt()
    return scores


def check_variance(variance: Any) -> None:
    """``ValueError`` unless it holds positive numbers by site."""
    if not (isinstance(variance, Mapping) and all(map(torch.is_tensor, variance.values()))):
        raise ValueError(
            f"variance must be a dict from site to tensor, got {type(variance).__name__}"
        )
    for name, value in variance.items():
        if not value.is_meta and not bool(((value > 0) & value.isfinite()).all()):
            raise ValueError(f"variance[{name!r}] must be positive and finite everywhere")


def score_names(defence: Defence) -> tuple[str, ...]:
    """The scores that :func:`detection_scores` has of a defence, as far as its settings say.

    Of somebody else's, whose number of chains is not known, ``disagreement`` is among them.
    """
    aware = getattr(defence, "perturbation", None) is not None
    if isinstance(defence, EncoderDefence):
        several = defence.num_samples > 1
    else:
        several = not isinstance(defence, BaseDefence) or defence.num_chains > 1
    has = {
        **dict.fromkeys(("end_energy", "end_error"), _moves(defence)),
        **dict.fromkeys(("energy_drop", "distance"), _moves(defence) and _encoded(defence)),
        **dict.fromkeys(("start_energy", "start_error"), _encoded(defence)),
        "perturbation_gain": aware and _moves(defence),
        "disagreement": several,
    }
    return tuple(name for name in SCORES if has.get(name, True))


def _encoded(defence: Defence) -> bool:
    """Whether chains start at the encoding, or where it has led."""
    return getattr(defence, "initial", "guide") not in ("prior", "annealed")


def _moves(defence: Defence) -> bool:
    """Whether latents may end elsewhere than the encoder has put them."""
    return not (isinstance(defence, EncoderDefence) and defence.preprocess is None)


@public
@torch.no_grad()
def anomaly_scores(
    defence: Defence, x: ImagesLike, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    r"""How badly the model explains images, as detectors of anomalies by VAEs ask: ``(N,)`` each.

    With :class:`NoDefence` these are the usual scores; compare them with those behind a defence. An
    attack in the encoder can hide an anomaly, or make one of a normal image, by the latents that it
    leads to; latents after a defence answer to the image alone. A chain of the paper's target
    lowers ``error`` for nearly every image, anomalies among them; one that assumes a perturbation
    gives up part of the image, and its ``energy``, which assumes none, may be above the encoder's.
    So scores need thresholds of their own, and may tell anomalies apart better or worse: measure
    it.

    Args:
        defence: any defence or control.
        x: images ``(N, C, H, W)``, or ``(x, *conditions)``, as for the defence.
        generator: as for the defence.

    Returns:
        ``error``, the reconstruction error :math:`\|x - g(z)\|^2` per pixel, and ``energy``,
        :math:`U_0(z; x) = -\log p(x \mid z) - \log p(z)` in nats, both averaged over the draws z
        of the defence and about the image that was passed, before any filter. For draws of the
        guide the energy is -ELBO plus the guide's entropy; :func:`pyro_vae_defence.metrics.nll` is
        -ELBO with ``num_samples=1``, and importance-weighted with more.

    Raises:
        ValueError: if ``defence`` is none, or as the defence for its images.
    """
    check_defence(defence)
    parts: dict[str, list[Tensor]] = {"error": [], "energy": []}
    of_all, every = at_images(defence.vae, x)
    first = 0
    for result in runs(defence, x, generator):
        rows = slice(first, first := first + len(result.x))
        vae, images = take(of_all, rows), every[rows]
        with evaluation_mode(vae):
            energy, decode = potential(vae, images), Decoder(vae, images)
            draws = _draws(result)
            # Draw by draw: of all together there would be an image for each.
            errors = torch.stack(
                [(decode(z, images).clamp(0, 1) - images).square().mean((1, 2, 3)) for z in draws]
            )
            unconstrained = [energy.unconstrain(z) for z in draws]
            # log p(z) is that of z itself, not of the scale on which chains move.
            energies = torch.stack([energy(u) - energy.log_determinant(u) for u in unconstrained])
        parts["error"].append(errors.mean(0))
        parts["energy"].append(energies.mean(0))
    return {name: torch.cat(values) for name, values in parts.items()}


def _draws(result: DefenceResult) -> list[Latents]:
    """Every draw of every chain, one row per image each."""
    samples = {name: value.flatten(0, 1) for name, value in result.samples.items()}
    count = len(next(iter(samples.values())))
    return [lat.index(samples, number) for number in range(count)]


def _fold(latents: LatentsLike) -> Latents:
    return {name: value.flatten(0, 1) for name, value in latents.items()}


def _length(latents: LatentsLike, variance: LatentsLike | None) -> Tensor:
    """Root mean square over latent dimensions, in standard deviations: ``(chain, N)``."""
    if variance is not None:
        latents = {name: v / variance[name].to(v).sqrt() for name, v in latents.items()}
    whitened = [value[..., None].flatten(2) for value in latents.values()]
    return torch.cat(whitened, 2).square().mean(2).sqrt()
