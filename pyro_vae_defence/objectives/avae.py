r"""AVAE: the encoder must recognise the images that its own decoder makes.

For :math:`z \sim q(z|x) = N(m, s^2)`, re-encode the reconstruction as a constant image,
:math:`N(\tilde m, \tilde s^2) = q(\tilde z \,|\, \mathrm{sg}[\mathrm{decoder\ mean}(z)])`. Latents
of an image and of its reconstruction are tied by the transition
:math:`p_\rho(\tilde z|z) = N(\rho z, 1 - \rho^2)`, under which N(0, 1) is invariant. Minimise
:math:`-\mathcal L(x)` plus

.. math:: E_{q(z|x)} KL(q(\tilde z) \| p_\rho(\tilde z|z))
   = \sum \frac{\tilde s^2 + \rho^2 s^2 + (\tilde m - \rho m)^2}{2 (1 - \rho^2)}
   - \tfrac12 \log(2 \pi e \tilde s^2) + \tfrac12 \log(2 \pi (1 - \rho^2)),

with :math:`\rho = 0.975`. Its least value for given s, at :math:`\tilde m = \rho m` and
:math:`\tilde s^2 = 1 - \rho^2`, is :math:`\sum \rho^2 s^2 / (2 (1 - \rho^2))`. The transition
presumes the prior N(0, 1).

SE-AVAE adds the same term to the loss of SE. AVAE-SS is self-supervised post-processing of a
trained VAE: latents from the prior are decoded, and the encoder alone learns from these images.

Cemgil, Ghaisas, Dvijotham, Gowal, Kohli, "The Autoencoding Variational Autoencoder", 2020,
https://arxiv.org/abs/2012.03715
"""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Normal
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae_defence.models.sites import (
    Site,
    gaussians,
    image_rows,
    latent_sites,
)
from pyro_vae_defence.objectives.elbo import (
    EncodeSites,
    ImageELBO,
    MeanFieldELBO,
    Run,
    Terms,
    add_terms,
    check_trainable,
    log_likelihood,
)
from pyro_vae_defence.objectives.smooth_encoder import SE
from pyro_vae_defence.ops.checks import check_within
from pyro_vae_defence.types import Perturb, PyroProgram


class AVAE(MeanFieldELBO):
    """The autoencoding VAE's objective; see the module's text.

    ``rho`` in [0, 1) is the correlation that ties an image's latents to its reconstruction's.
    Terms: ``reconstruction``, ``kl``, ``autoencoding``, ``loss``.

    Raises ``ValueError`` for ``rho`` outside [0, 1), for an image distribution without a mean, and
    for a guide that is not Gaussian or whose sites depend on each other.
    """

    def __init__(self, rho: float = 0.975, *, num_particles: int = 1) -> None:
        super().__init__(num_particles=num_particles)
        self.rho = _correlation(rho)

    def extra_terms(self, run: Run) -> Terms:
        """The autoencoding term."""
        return _autoencoding_terms(run.sites, run.encode, run.decode(), self.rho)


class SEAVAE(SE):
    """SE-AVAE: the loss of SE plus AVAE's term, the ELBO once.

    Arguments and errors are those of the two classes. Terms: ``reconstruction``, ``kl``,
    ``kl_adv``, ``omega``, ``autoencoding``, ``loss``.
    """

    def __init__(
        self, perturb: Perturb, gamma: float, rho: float = 0.975, *, num_particles: int = 1
    ) -> None:
        super().__init__(perturb, gamma, num_particles=num_particles)
        self.rho = _correlation(rho)

    def extra_terms(self, run: Run) -> Terms:
        """The terms of both objectives."""
        smoothness = super().extra_terms(run)
        return smoothness | _autoencoding_terms(run.sites, run.encode, run.decode(), self.rho)


class AVAESS(ImageELBO):
    """AVAE-SS: AVAE's loss for the encoder of a trained VAE, on images decoded from the prior.

    The images passed in only set number, shape, device and dtype: the objective draws as many
    latents from the model's Gaussian prior and trains on their decoder means. The model is frozen:
    no gradient reaches it, however its parameters are registered and even if the guide shares them,
    and SVI does not learn of its parameters. Put a decoder with batch norm or dropout into eval
    mode. Scales and masks of the programs are ignored. Terms, ``rho`` and errors: :class:`AVAE`.
    """

    def __init__(self, rho: float = 0.975, *, num_particles: int = 1) -> None:
        super().__init__(num_particles=num_particles)
        self.rho = _correlation(rho)

    def particle_terms(
        self, model: PyroProgram, guide: PyroProgram, x: Tensor, *args: Any, **kwargs: Any
    ) -> Terms:
        """AVAE's terms on images made by the model, with a gradient for the guide only."""
        frozen = poutine.block(model, hide_types=["param"])
        with torch.no_grad():
            made = poutine.trace(frozen).get_trace(x, *args, **kwargs)
            x = self.mean_image(made, model, x, *args, **kwargs)

        def run_guide(x: Tensor) -> Trace:
            return poutine.trace(guide).get_trace(x, *args, **kwargs)

        guide_trace = run_guide(x)
        sites = latent_sites(guide_trace)
        # The model sees copies of the latents that are leaves of its graph: its gradient is taken
        # at these leaves and handed on to the guide from there, so it never runs into the decoder.
        cut_trace = guide_trace.copy()
        leaves = []
        for site in sites:
            leaf = site["value"].detach().requires_grad_()
            cut_trace.nodes[site["name"]] = {**site, "value": leaf}
            leaves.append(leaf)
        replayed = poutine.replay(frozen, trace=cut_trace)
        model_trace = poutine.trace(replayed).get_trace(x, *args, **kwargs)
        check_trainable(model_trace, guide_trace)
        self.check_mean_field((model_trace, guide_trace), frozen, guide, x, *args, **kwargs)

        model_trace.compute_log_prob(lambda name, site: site["is_observed"])
        reconstruction = log_likelihood(model_trace)
        if torch.is_grad_enabled():
            gradients = torch.autograd.grad(reconstruction.sum(), leaves)
            reconstruction = reconstruction.detach()
            for site, gradient in zip(sites, gradients):
                # Zero in value, the chain rule in gradient.
                chain = (site["value"] - site["value"].detach()) * gradient
                reconstruction = reconstruction + image_rows(chain, site).sum(1)

        loc, scale = gaussians([model_trace.nodes[site["name"]] for site in sites])
        kl = kl_divergence(Normal(*gaussians(sites)), Normal(loc.detach(), scale.detach()))
        terms = {"reconstruction": reconstruction, "kl": kl.sum(1)}

        def encode(x: Tensor) -> list[Site]:
            return latent_sites(run_guide(x))

        again = self.mean_image(model_trace, model, x, *args, **kwargs)
        extra = _autoencoding_terms(sites, encode, again, self.rho)
        return add_terms(terms | {"loss": terms["kl"] - reconstruction}, extra)


def autoencoding(
    loc: Tensor, scale: Tensor, loc_again: Tensor, scale_again: Tensor, rho: float
) -> Tensor:
    """Expected KL of the second posterior to the transition: ``(N, D)`` each -> ``(N,)``, nats."""
    variance = 1 - rho**2
    ratio = scale_again**2 / variance
    mismatch = (rho**2 * scale**2 + (loc_again - rho * loc) ** 2) / variance
    return 0.5 * (ratio - 1 - ratio.log() + mismatch).sum(1)


def _autoencoding_terms(
    sites: list[Site], encode: EncodeSites, decoded: Tensor, rho: float
) -> Terms:
    again = encode(decoded.detach())
    return {"autoencoding": autoencoding(*gaussians(sites), *gaussians(again), rho)}


def _correlation(rho: float) -> float:
    check_within("rho", rho, "[0, 1)")
    return rho
