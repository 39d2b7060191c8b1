r"""beta-TCVAE: weight the total correlation of the latents, not their whole KL, by beta.

With the aggregate posterior :math:`q(z) = \frac1N \sum_n q(z|x_n)` of the data, an image's loss is

.. math:: -\mathcal L(x_i) + (\beta - 1) TC_i, \qquad
   TC_i = \log \hat q(z_i) - \sum_d \log \hat q(z_{id}), \quad z_i \sim q(z|x_i).

The densities are estimated from a batch of size :math:`M`. With :math:`l_{ijd} = \log q(z_{id} |
x_j)` and a weight :math:`W_{ij}` for encoding j as seen from sample i,

.. math:: \log \hat q(z_i) = \mathrm{LSE}_j (\log W_{ij} + \textstyle\sum_d l_{ijd}), \qquad
   \log \hat q(z_{id}) = \mathrm{LSE}_j (\log W_{ij} + l_{ijd}).

``mws``
    Minibatch weighted sampling, :math:`W_{ij} = 1/(NM)`. Its value is off by the constant
    :math:`(D - 1) \log N`, which has no gradient.
``mss``
    Minibatch stratified sampling, with :math:`m = M - 1`: :math:`W_{ii} = 1/N`, one other
    :math:`(N - m)/(N m)`, the remaining ones :math:`1/m`. :math:`\hat q(z_i)` is unbiased given
    that :math:`x_i` is in the batch, its logarithm is not.
``published``
    What the code published with the paper trained: the weights of ``mws``, but reduced over the
    samples i instead of the encodings j. It estimates no density; it reproduces that model.

**A batch barely sees the total correlation.** The logarithm of a density is resolved only by
batches that are large against :math:`\chi^2`, the chi-squared information between images and
latents, and that grows exponentially with the information the latents carry. At the paper's M =
128 with 64 latents it is out of reach: each sample is so much closer to its own encoding than to
all others that the densities saturate there. For Gaussian encodings with standard deviation 0.1,
true total correlations of 0 and of 27 nats get the same estimate within a few nats (a test shows
it). Expect beta to act as a regulariser of some kind, not as a weight on the total correlation.

Chen, Li, Grosse, Duvenaud, "Isolating Sources of Disentanglement in Variational Autoencoders",
2018, https://arxiv.org/abs/1802.04942
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_vae_defence.models.sites import gaussians, latent_sites, latent_values
from pyro_vae_defence.objectives import elbo
from pyro_vae_defence.objectives.elbo import ImageELBO, Schedule, Terms
from pyro_vae_defence.ops.checks import check_within
from pyro_vae_defence.types import PyroProgram

Estimator = Literal["mws", "mss", "published"]


class BetaTCVAE(ImageELBO):
    """The ELBO with the total correlation in its KL weighted by beta; see the module's text.

    ``beta`` is a positive number or schedule, 1 being the plain ELBO; ``data_size`` is N, the
    number of training images. Terms: ``reconstruction``, ``kl``, ``total_correlation``, ``loss``.

    Raises ``ValueError`` for ``beta`` not positive, ``data_size`` below 1 or the batch size,
    an unknown ``estimator``, and a guide that is not Gaussian or whose sites depend on each other.
    """

    def __init__(
        self,
        beta: float | Schedule,
        data_size: int,
        estimator: Estimator = "mws",
        *,
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles=num_particles)
        _check_estimator(estimator)
        check_within("data_size", data_size, "[1, inf)", "it is the number of training images")
        self.beta, self.data_size = elbo.check_weight("beta", beta), data_size
        self.estimator: Estimator = estimator

    def particle_terms(
        self, model: PyroProgram, guide: PyroProgram, x: Tensor, *args: Any, **kwargs: Any
    ) -> Terms:
        """Add ``(beta - 1) total_correlation`` to the negative ELBO."""
        beta = elbo.weight_at("beta", self.beta, self.step)
        traces = model_trace, guide_trace = self._get_trace(model, guide, (x, *args), kwargs)
        self.check_mean_field(traces, model, guide, x, *args, **kwargs)
        sites = latent_sites(guide_trace)
        terms = elbo.elbo_terms(model_trace, guide_trace, mean_field=True)
        z, (loc, scale) = latent_values(sites), gaussians(sites)
        tc = total_correlation(z, loc, scale, self.data_size, self.estimator)
        return terms | {"total_correlation": tc, "loss": terms["loss"] + (beta - 1) * tc}


def total_correlation(
    latents: Tensor, loc: Tensor, scale: Tensor, data_size: int, estimator: Estimator = "mws"
) -> Tensor:
    """Estimate of the total correlation at each sample of a batch, ``(M,)`` in nats.

    ``latents`` of shape ``(M, D)`` are samples of the Gaussians ``loc``, ``scale``, ``(M, D)``
    each; memory is ``M * M * D``. That of ``mws`` contains the constant ``(D - 1) log(data_size)``.

    Raises ``ValueError`` for an unknown ``estimator``, ``data_size < M``, and ``mss`` with M = 1.
    """
    _check_estimator(estimator)
    batch_size = latents.shape[0]
    if data_size < batch_size:
        raise ValueError(
            f"data_size={data_size} is smaller than the batch of {batch_size}; "
            "give the number of training images"
        )
    log_density = (  # axes: sample i, encoding j, dimension d
        -0.5 * ((latents.unsqueeze(1) - loc) / scale) ** 2
        - scale.log()
        - 0.5 * math.log(2 * math.pi)
    )
    if estimator == "mss":
        log_weights = _stratified_log_weights(batch_size, data_size).to(latents)
    else:
        log_weights = latents.new_full((batch_size, batch_size), -math.log(data_size * batch_size))
    axis = 0 if estimator == "published" else 1
    joint = torch.logsumexp(log_density.sum(2) + log_weights, axis)
    marginals = torch.logsumexp(log_density + log_weights.unsqueeze(2), axis)
    return joint - marginals.sum(1)


def _stratified_log_weights(batch_size: int, data_size: int) -> Tensor:
    """Logarithms of the weights of ``mss``, ``(M, M)``, float64; each row of weights sums to one.

    The image itself is in the batch with certainty and stands for itself alone; the others stand
    for the rest of the data. The successor in the batch is the "one other".
    """
    if batch_size < 2:
        raise ValueError("estimator='mss' needs batches of at least 2 images; use 'mws' or drop it")
    others = batch_size - 1
    weights = torch.full((batch_size, batch_size), 1 / others, dtype=torch.float64, device="cpu")
    image = torch.arange(batch_size, device="cpu")
    weights[image, (image + 1) % batch_size] = (data_size - others) / (data_size * others)
    weights[image, image] = 1 / data_size
    return weights.log()


def _check_estimator(estimator: str) -> None:
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator={estimator!r} must be one of {get_args(Estimator)}")
