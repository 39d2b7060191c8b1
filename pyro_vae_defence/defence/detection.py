r"""Suspicion: what a chain reveals about whether its image was attacked, one score per image.

An attacked encoding is a bad explanation of the image, so the chain moves far and downhill. With
:math:`z_0` the start of a chain, :math:`z_t` its draws, U the energy it samples and v a variance of
the latents per dimension:

- ``energy_drop``: :math:`U(z_0) - \overline{U(z_t)}`, averaged over chains, in nats;
- ``perturbation_gain``: :math:`U_0(z_T) - U_\delta(z_T)`, averaged over chains: how many nats the
  assumption of a perturbation is worth; only where the defence makes it;
- ``distance``: from the start of a chain to the mean of its draws, root mean square over the
  dimensions in units of :math:`\sqrt v`, averaged over chains;
- ``disagreement``: root mean square distance of the chains' means from their common mean, in the
  same units; only with two chains or more;
- ``start_energy``: :math:`U_0(z_0)`, which needs no chain at all: the control among the scores.

All are high where an attack is suspected. They are measured by
:func:`pyro_vae_defence.metrics.auroc` and :func:`~pyro_vae_defence.metrics.fpr_at_tpr`, against
clean images, and against random noise of the same size, which tells a detector of attacks from one
of anything unusual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae_defence.defence.mcmc import MCMCDefence
from pyro_vae_defence.defence.result import DefenceResult
from pyro_vae_defence.models.conditions import bind
from pyro_vae_defence.models.program import evaluation_mode, potential
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.types import Latents, LatentsLike


@torch.no_grad()
def detection_scores(
    defence: MCMCDefence, result: DefenceResult, variance: LatentsLike | None = None
) -> dict[str, Tensor]:
    """Scores of every image from a run of ``defence``: name -> ``(N,)``, see the module's text.

    Args:
        defence: the defence that made the run.
        result: what it returned.
        variance: site -> variances of one image's shape that define the unit of distance, e.g. the
            training set's ``mean_posterior_variance``, which an attacker cannot move; 1 by default.

    Raises:
        ValueError: if ``variance`` has other sites than the latents.
    """
    if variance is None:
        variance = {name: torch.ones_like(value[0]) for name, value in result.latents.items()}
    if variance.keys() != result.samples.keys():
        raise ValueError(
            f"variance must have the latents' sites {sorted(result.samples)}, got "
            f"{sorted(variance)}"
        )
    num_chains = next(iter(result.initial.values())).shape[0]
    vae = bind(defence.vae, result.x, result.conditions)
    folded = result.x.repeat(num_chains, 1, 1, 1)
    with evaluation_mode(vae):
        plain = potential(vae, folded)
        sampled = potential(vae, folded, defence.perturbation)
        start = sampled.unconstrain(_fold(result.initial))
        end = sampled.unconstrain(_fold({n: v[:, -1] for n, v in result.samples.items()}))
        before = lat.unfold(sampled(start), num_chains)
        scores = {"energy_drop": (before + result.sample_stats["lp"].mean(1)).mean(0)}
        if defence.perturbation is not None:
            gain = plain(end) - sampled(end)
            scores["perturbation_gain"] = lat.unfold(gain, num_chains).mean(0)
        scores["start_energy"] = lat.unfold(plain(start), num_chains).mean(0)
    means = {name: value.mean(1) for name, value in result.samples.items()}
    moved = {name: means[name] - result.initial[name] for name in means}
    scores["distance"] = _length(moved, variance).mean(0)
    if num_chains > 1:
        spread = {name: value - value.mean(0) for name, value in means.items()}
        scores["disagreement"] = _length(spread, variance).square().mean(0).sqrt()
    return scores


def _fold(latents: LatentsLike) -> Latents:
    return {name: value.flatten(0, 1) for name, value in latents.items()}


def _length(latents: LatentsLike, variance: LatentsLike) -> Tensor:
    """Root mean square over latent dimensions, in standard deviations: ``(chain, N)``."""
    whitened = [(v / variance[n].to(v).sqrt()).flatten(2) for n, v in latents.items()]
    return torch.cat(whitened, 2).square().mean(2).sqrt()
