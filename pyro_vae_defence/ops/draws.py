r"""One draw of a distribution for every row of a batch, from the rows' random streams.

A draw is a fixed function of its parameters and of noise: the same noise at other parameters gives
a draw that belongs to the first, and its derivative is the pathwise one.

- Gaussians, and what is a function of uniforms u: a location plus scaled noise, or the inverse of
  the cumulative distribution at u; the Gumbel-softmax of relaxed classes.
- Gamma(a), and Beta, Dirichlet, Student's t and F, which are functions of it: Marsaglia and Tsang's
  proposals :math:`d (1 + c\,\xi)^3`, :math:`d = a - 1/3`, :math:`c = 1 / \sqrt{9 d}`, each accepted
  with a probability of at least 0.95, of which the first accepted of 8 is taken (none is in 4 of
  10^11 draws, which are then d). For a < 1 it is a draw of Gamma(a + 1) times
  :math:`u^{1 / a}`. The derivative is implicit, :math:`-\partial_a F / \partial_z F` of the
  cumulative distribution F.
- Cholesky factors of correlations: left of the diagonal each row has a squared length of a Beta
  family, in a direction without preference (Lewandowski, Kurowicka, Joe, 2009).
- Mixtures of these, whose draws have no derivative, and whatever is made of them by transforms.

Marsaglia, Tsang, "A simple method for generating gamma variables", 2000,
https://doi.org/10.1145/358407.358414.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.distributions as td
from pyro.distributions import Logistic, ProjectedNormal
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.nn.functional import pad

from pyro_vae_defence.ops.distributions import own_methods
from pyro_vae_defence.ops.streams import Streams

_PROPOSALS = 8


class Noise:
    """Noise of the rows, other at each call.

    Args:
        streams: of the rows.
        purpose: of the first call; those that follow take the next ones.
    """

    def __init__(self, streams: Streams, purpose: int) -> None:
        self.streams, self.purpose = streams, purpose

    def _next(self) -> int:
        self.purpose += 1
        return self.purpose - 1

    def normal(self, like: Tensor, *event: int) -> Tensor:
        """Standard normals ``(*like.shape, *event)``."""
        shape = (*like.shape[1:], *event)
        return self.streams.normal(0, self._next(), shape, like.dtype)

    def uniform(self, like: Tensor, *event: int) -> Tensor:
        """Uniforms on (0, 1], ``(*like.shape, *event)``."""
        shape = (*like.shape[1:], *event)
        return self.streams.uniform(0, self._next(), shape, like.dtype)

    def inside(self, like: Tensor) -> Tensor:
        """Uniforms on (0, 1), ``like.shape``."""
        return self.uniform(like).clamp(max=1 - torch.finfo(like.dtype).eps)


def draw(distribution: Any, noise: Noise) -> Tensor | None:
    """A draw of a ``distribution`` whose first batch dimension is the rows; ``None`` if unknown.

    Unknown is also what a user's class draws that samples in its own way.
    """
    kind = type(distribution)
    family = next((base for base in kind.__mro__ if base in _draw.registry), object)
    if own_methods(kind, family) & {"sample", "rsample"}:
        return None
    return _draw(distribution, noise)


@functools.singledispatch
def _draw(distribution: Any, noise: Noise) -> Tensor | None:
    return None


@_draw.register(td.Independent)
@_draw.register(MaskedDistribution)
def _wrapped(fn: Any, noise: Noise) -> Tensor | None:
    return draw(fn.base_dist, noise)


@_draw.register
def _transformed(fn: td.TransformedDistribution, noise: Noise) -> Tensor | None:
    if type(fn).rsample is not td.TransformedDistribution.rsample:
        return None  # such as a straight-through gradient
    value = draw(fn.base_dist, noise)
    return None if value is None else td.transforms.ComposeTransform(fn.transforms)(value)


@_draw.register
def _normal(fn: td.Normal, noise: Noise) -> Tensor:
    return fn.loc + fn.scale * noise.normal(fn.loc)


@_draw.register
def _multivariate(fn: td.MultivariateNormal, noise: Noise) -> Tensor:
    return fn.loc + (fn.scale_tril @ noise.normal(fn.loc)[..., None])[..., 0]


@_draw.register
def _projected(fn: ProjectedNormal, noise: Noise) -> Tensor:
    return torch.nn.functional.normalize(fn.concentration + noise.normal(fn.concentration), dim=-1)


@_draw.register
def _low_rank(fn: td.LowRankMultivariateNormal, noise: Noise) -> Tensor:
    factor = fn.cov_factor @ noise.normal(fn.cov_factor[..., 0, :])[..., None]
    return fn.loc + factor[..., 0] + fn.cov_diag.sqrt() * noise.normal(fn.loc)


@_draw.register
def _uniform(fn: td.Uniform, noise: Noise) -> Tensor:
    return fn.low + noise.inside(fn.low) * (fn.high - fn.low)


@_draw.register
def _laplace(fn: td.Laplace, noise: Noise) -> Tensor:
    u = noise.inside(fn.loc)  # of which 2 u - 1 may round to -1
    return fn.loc + fn.scale * (u - 0.5).sign() * -(2 * torch.minimum(u, 1 - u)).log()


@_draw.register
def _exponential(fn: td.Exponential, noise: Noise) -> Tensor:
    return -noise.inside(fn.rate).log() / fn.rate


@_draw.register
def _cauchy(fn: td.Cauchy, noise: Noise) -> Tensor:
    return fn.loc + fn.scale * (math.pi * (noise.inside(fn.loc) - 0.5)).tan()


@_draw.register
def _logistic(fn: Logistic, noise: Noise) -> Tensor:
    return fn.loc + fn.scale * noise.inside(fn.loc).logit()


@_draw.register
def _relaxed_classes(fn: td.relaxed_categorical.ExpRelaxedCategorical, noise: Noise) -> Tensor:
    gumbel = -(-noise.inside(fn.logits).log()).log()
    value = ((fn.logits + gumbel) / fn.temperature).log_softmax(-1)
    # Of whose exponential zero is no element of the simplex.
    return value.clamp(min=math.log(torch.finfo(value.dtype).tiny))


@_draw.register
def _relaxed_bit(fn: td.relaxed_bernoulli.LogitRelaxedBernoulli, noise: Noise) -> Tensor:
    return (noise.inside(fn.logits).logit() + fn.logits) / fn.temperature


@_draw.register
def _gamma(fn: td.Gamma, noise: Noise) -> Tensor:
    return _standard_gamma(fn.concentration, noise) / fn.rate


@_draw.register
def _beta(fn: td.Beta, noise: Noise) -> Tensor:
    one, other = (_log_standard_gamma(c, noise) for c in (fn.concentration1, fn.concentration0))
    return _inside((one - other).sigmoid())


@_draw.register
def _dirichlet(fn: td.Dirichlet, noise: Noise) -> Tensor:
    return _inside(_log_standard_gamma(fn.concentration, noise).softmax(-1))


@_draw.register
def _correlations(fn: td.LKJCholesky, noise: Noise) -> Tensor:
    """Not torch's, whose rows left of the diagonal are longer than by its own density (2.14)."""
    number = torch.arange(1, fn.dim, device=fn.concentration.device)  # of elements in each
    rest = fn.concentration[..., None] + (fn.dim - 1 - number) / 2
    one, other = (_log_standard_gamma(c, noise) for c in ((number / 2).expand_as(rest), rest))
    rows = noise.normal(fn.concentration, fn.dim - 1, fn.dim).tril()
    rows = rows * ((one - other).sigmoid() / rows.square().sum(-1)).sqrt()[..., None]
    diagonal = pad((other - one).sigmoid().sqrt(), (1, 0), value=1.0)
    return pad(rows, (0, 0, 1, 0)) + diagonal.diag_embed()


@_draw.register
def _ratio(fn: td.FisherSnedecor, noise: Noise) -> Tensor:
    one, other = (_log_standard_gamma(df / 2, noise) - df.log() for df in (fn.df1, fn.df2))
    return (one - other).exp().clamp(min=torch.finfo(one.dtype).tiny)


@_draw.register
def _student(fn: td.StudentT, noise: Noise) -> Tensor:
    chi2 = 2 * _standard_gamma(fn.df / 2, noise)
    return fn.loc + fn.scale * noise.normal(fn.loc) * (fn.df / chi2).sqrt()


@_draw.register
def _bit(fn: td.Bernoulli, noise: Noise) -> Tensor:
    return (noise.uniform(fn.probs) <= fn.probs).to(fn.probs.dtype)


@_draw.register(td.Categorical)
@_draw.register(td.OneHotCategorical)
def _class(fn: Any, noise: Noise) -> Tensor | None:
    if fn.has_rsample:
        return None  # a straight-through gradient
    uniform = noise.uniform(fn.probs[..., 0])
    value = (uniform[..., None] > fn.probs.cumsum(-1)[..., :-1]).sum(-1)
    if isinstance(fn, td.Categorical):
        return value
    return torch.nn.functional.one_hot(value, fn.probs.shape[-1]).to(fn.probs.dtype)


@_draw.register
def _mixture(fn: td.MixtureSameFamily, noise: Noise) -> Tensor | None:
    which, parts = draw(fn.mixture_distribution, noise), draw(fn.component_distribution, noise)
    if which is None or parts is None:
        return None
    index = which.reshape(which.shape + (1,) * (1 + len(fn.event_shape)))
    index = index.expand(*which.shape, 1, *fn.event_shape)
    # A component's derivative is not the mixture's.
    return parts.detach().gather(which.dim(), index).squeeze(which.dim())


def _inside(value: Tensor) -> Tensor:
    limits = torch.finfo(value.dtype)
    return value.clamp(limits.tiny, 1 - limits.eps)


def _standard_gamma(concentration: Tensor, noise: Noise) -> Tensor:
    value = _log_standard_gamma(concentration, noise).exp()
    return value.clamp(min=torch.finfo(value.dtype).tiny)


def _log_standard_gamma(concentration: Tensor, noise: Noise) -> Tensor:
    """The logarithm, since most draws at a small concentration are below the smallest number."""
    a = concentration.detach()
    limits = torch.finfo(a.dtype)
    with torch.no_grad():
        d = (torch.where(a < 1, a + 1, a) - 1 / 3)[..., None]
        xi = noise.normal(a, _PROPOSALS)
        v = (1 + xi * (9 * d).rsqrt()) ** 3
        log_u = noise.uniform(a, _PROPOSALS).log()
        accepted = (v > 0) & (log_u < xi.square() / 2 + d * (1 - v + v.clamp(min=1e-30).log()))
        first = accepted.int().argmax(-1, keepdim=True)
        chosen = torch.where(accepted.any(-1, keepdim=True), v.gather(-1, first), 1.0)
        boost = torch.where(a < 1, noise.uniform(a).log() / a, 0.0)
        log_value = (d * chosen)[..., 0].log() + boost
        value = log_value.exp().clamp(min=limits.tiny)
        slope = torch._standard_gamma_grad(a, value) / value
        # F(z) is z^a / Gamma(a + 1) at such z.
        slope = torch.where(value < limits.eps, ((a + 1).digamma() - log_value) / a, slope)
    return log_value + slope * (concentration - a)
