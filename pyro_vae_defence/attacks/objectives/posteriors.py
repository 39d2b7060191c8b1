r"""Attacks on the encoder: divergences between the guides at two images (Table 1 of the paper).

A factory such as :func:`symmetric_kl` takes the VAE and returns a *prepared objective*: given
reference images it computes once what belongs to them and returns the objective proper, images
``(N, C, H, W)`` to one value per image ``(N,)``. Without targets the attack is unsupervised and
maximises

.. math:: \Delta\bigl[q(z|x), q(z|x^r)\bigr]

(eq. 3); with targets it is supervised and maximises :math:`-\Delta[q(z|x), q(z|x^t)]` (eq. 4). At
:math:`x = x^r` every unsupervised objective has its minimum and a gradient of exactly zero: start
from a random point.

Hierarchical guides: a lower group's distribution is conditional on a draw of the groups above it.
Each row draws that noise from its own stream, once, and the same for both images, so that the
objective is a deterministic function of the image, and of nothing else in its batch; ``num_draws``
averages over several. The divergences of the groups add up; what a program masks, in either image,
counts for nothing. (The joint KL-divergence would condition both sides on the same latents instead;
NVAE attacks, the paper's among them, sum the groups as done here.) Families other than Gaussians,
transformed or not, and classes draw from torch's global seed.

Guides that make a latent of auxiliary noise, a ``Delta`` of an auxiliary site, are compared by the
noise: divergences are those of the latents, since a bijection ties both, the same for all images.
The means of :func:`mean_distance` are then those of the noise, and ``sites`` has its name. A
``Delta`` that is a function of the image has a mean alone.

Each factory takes

- ``vae``: any Pyro VAE;
- ``x_target``: target images ``(N, C, H, W)``, one per reference or a single one; ``None`` for
  unsupervised;
- ``sites``: the latent groups that count: names, or a number k for the first k of the guide, the
  paper's :math:`k_A` topmost ones; all when ``None``;
- ``num_draws``: noise draws averaged over. One evaluation costs as many passes through the encoder.

and raises a ``ValueError`` for bad settings at once, and for guides that break the contract, or
families without such a divergence, when given references.

References: Gondim-Ribeiro, Tabacof, Valle, "Adversarial attacks on variational autoencoders", 2018,
https://arxiv.org/abs/1806.04646 (latent attack); Kuzina, Welling, Tomczak, "Diagnosing
vulnerability of variational auto-encoders to adversarial attacks", 2021,
https://arxiv.org/abs/2103.06701 (symmetric KL); paper, appendix C.6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pyro_vae_defence.attacks.objectives._rows import between
from pyro_vae_defence.models.program import posterior
from pyro_vae_defence.ops import divergences
from pyro_vae_defence.ops.checks import plain
from pyro_vae_defence.ops.divergences import Posterior
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import VAE, PreparedObjective

Sites = int | str | Sequence[str] | None


def symmetric_kl(
    vae: VAE, x_target: Tensor | None = None, *, sites: Sites = None, num_draws: int = 1
) -> PreparedObjective:
    """Half the sum of both KL-divergences between the guides at the two images, in nats."""
    return _between_posteriors(vae, divergences.symmetric_kl, x_target, sites, num_draws)


def forward_kl(
    vae: VAE, x_target: Tensor | None = None, *, sites: Sites = None, num_draws: int = 1
) -> PreparedObjective:
    """KL(q at the attacked image || q at the other), in nats (Table 1, latent space attack)."""
    return _between_posteriors(vae, divergences.kl, x_target, sites, num_draws)


def reverse_kl(
    vae: VAE, x_target: Tensor | None = None, *, sites: Sites = None, num_draws: int = 1
) -> PreparedObjective:
    """KL(q at the other image || q at the attacked), in nats (appendix C.6)."""
    return _between_posteriors(vae, lambda p, q: divergences.kl(q, p), x_target, sites, num_draws)


def mean_distance(
    vae: VAE, x_target: Tensor | None = None, *, sites: Sites = None, num_draws: int = 1
) -> PreparedObjective:
    """Squared Euclidean distance between the guides' means (appendix C.6)."""
    return _between_posteriors(vae, divergences.squared_mean_distance, x_target, sites, num_draws)


def squared_wasserstein(
    vae: VAE, x_target: Tensor | None = None, *, sites: Sites = None, num_draws: int = 1
) -> PreparedObjective:
    """Squared 2-Wasserstein distance between factorised Gaussian guides (Table 1, PGD attack)."""
    return _between_posteriors(vae, divergences.squared_wasserstein, x_target, sites, num_draws)


def _between_posteriors(
    vae: VAE,
    divergence: Callable[[Posterior, Posterior], Tensor],
    x_target: Tensor | None,
    sites: Sites,
    num_draws: int,
) -> PreparedObjective:
    sites = plain(sites)
    if isinstance(sites, int):
        fits = sites >= 1 and not isinstance(sites, bool)
    else:
        sites = sites if sites is None or isinstance(sites, str) else tuple(sites)
        fits = sites is None or (bool(sites) and all(isinstance(name, str) for name in sites))
    if not fits:
        raise ValueError(f"sites must be names, or a number of at least 1, got {sites!r}")

    def reader(vae: VAE, x_ref: Tensor) -> Callable[[Tensor, Streams], Posterior]:
        return lambda x, noise: _choose(posterior(vae, x, streams=noise), sites)

    return between(vae, reader, divergence, x_target, num_draws, kept=True)


def _choose(q: Posterior, sites: Sites) -> Posterior:
    if sites is None:
        return q
    if isinstance(sites, int):
        if sites > len(q):
            raise ValueError(f"sites={sites}, but the guide has {len(q)} latent sites: {list(q)}")
        names = list(q)[:sites]
    else:
        names = [sites] if isinstance(sites, str) else list(sites)
    unknown = [name for name in names if name not in q]
    if unknown:
        raise ValueError(f"the guide has no latent site {unknown}; it has {list(q)}")
    return {name: q[name] for name in names}
