r"""Energies of one set of latents under the attacks that another set must bear as well.

Of two sets of latents A and B, an attack wants the mass of A small and that of B large. The attack
that hurts one latent of A most, and the one that serves one latent of B most, are two images; an
attack is one. Let it be within :math:`\epsilon \le \delta` of the clean image :math:`x^r`, and q
the perturbation-aware posterior of the clean image in the smaller ball, restricted to A, :math:`q
\propto e^{-U_{\delta-\epsilon}(z; x^r)}`. By Jensen's inequality

.. math::
    \log M_A^\delta(x) \ge \log M_A^{\delta-\epsilon}(x^r) + G(x), \qquad
    G(x) = E_q[U_{\delta-\epsilon}(z; x^r) - U_\delta(z; x)],

for every image x, where the gain :math:`G(x) \ge 0` for those that attacks can reach. Hence for
each of these

.. math::
    \frac{M_B^\delta(x)}{M_A^\delta(x)} \le
    \frac{1}{M_A^{\delta-\epsilon}(x^r)} \int_B e^{-V(z)}\,dz, \qquad
    V(z) = \min_{\|x - x^r\|_\infty \le \epsilon,\; 0 \le x \le 1} [U_\delta(z; x) + G(x)],

and :math:`V(z) \ge U_{\delta+\epsilon}(z; x^r)`: never a worse bound than that of two attacks, and
a better one wherever a pixel that serves B would serve A, too.

V is in closed form where a likelihood's logarithm is linear in the image with slopes s(z), as a
Bernoulli's is, in an L_inf ball. A pixel of the most likely image in reach of x is then

.. math:: h = \min(x + \delta, 1) \text{ where } s > 0, \qquad l = \max(x - \delta, 0)
    \text{ where } s < 0,

so that :math:`U_\delta(z; x)` has the terms :math:`-s^+ h(x) + s^- l(x)`, and G the same with the
means of :math:`s^+` and :math:`s^-` over q in the place of both, less their value at the clean
image. As h is concave in x and l convex, both increasing, and one of :math:`s^+` and :math:`s^-` is
zero, their sum is concave in the pixel or monotone: its least value is at an end of the interval.

The means over q are estimated by draws (:class:`MeanSlopes`). V is concave in them, so that their
error makes the bound more careful, on average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae_defence.models.conditions import BoundProgram
from pyro_vae_defence.models.enumeration import enumerable
from pyro_vae_defence.models.observation import ImageMap, ImageSite
from pyro_vae_defence.models.perturbation import PerturbationAware, linear_slopes
from pyro_vae_defence.models.program import ModelPotential, image_map
from pyro_vae_defence.models.sites import aside, get_trace, rows_dim
from pyro_vae_defence.ops.balls import Ball, Linf
from pyro_vae_defence.ops.distributions import Reweighted
from pyro_vae_defence.types import VAE, LatentsLike, PyroProgram

_UP, _DOWN = "_slopes_up_", "_slopes_down_"  # keywords of a program, with a site's name


class MeanSlopes:
    """Mean slopes of the log-likelihood in the image, over draws of latents, image by image.

    Args:
        vae: the VAE, bound to the images' conditions if it has any.
        x: clean images ``(N, C, H, W)``.

    Attributes:
        means: tensors by keyword, a row for each image: what :func:`potential` takes.
    """

    def __init__(self, vae: VAE, x: Tensor) -> None:
        self.vae, self.x, self._number = vae, x, 0
        self._images = image_map(vae, x)
        self.means: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, latents: LatentsLike) -> None:
        """Count draws in, constrained, rows that are copies of the images."""
        copies = len(next(iter(latents.values()))) // len(self.x)
        model = poutine.condition(self.vae.model, data=dict(latents))
        found = slopes_of(get_trace(model, self.x.repeat(copies, 1, 1, 1)), self._images)
        assert found is not None
        self._number += copies
        for name, part in keywords(found).items():
            mean = part.unflatten(0, (copies, len(self.x))).mean(0)
            before = self.means.get(name, torch.zeros_like(mean))
            self.means[name] = before + (mean - before) * (copies / self._number)


def is_known(vae: VAE, x: Tensor, ball: Ball) -> bool:
    """Whether :func:`potential` has a closed form: an L_inf ball, and likelihoods of all pixels
    whose logarithms are linear in them, none of them masked, without discrete latents.

    The images ``x``, one is enough, are those of which the model is asked.
    """
    if not isinstance(ball, Linf):
        return False
    with torch.no_grad(), aside(x.device):
        trace = get_trace(vae.model, x)
    return not enumerable(trace) and slopes_of(trace, image_map(vae, x)) is not None


def potential(
    vae: VAE, x: Tensor, ball: Linf, delta: float, means: Mapping[str, Tensor]
) -> ModelPotential:
    """The energy V of the module's text, where :func:`is_known` says that it is one.

    Args:
        vae: the VAE, bound to the images' conditions if it has any.
        x: clean images ``(M, C, H, W)``, as many as ``means`` has rows or copies of them.
        ball: the attacker's.
        delta: radius that the defender assumes.
        means: of :class:`MeanSlopes`, over draws of the set that the attack wants small.
    """
    model = vae.model
    bound = model if isinstance(model, BoundProgram) else BoundProgram(model, (), {})
    program = UnderCommonAttack(bound.program, ball, delta)
    return ModelPotential(BoundProgram(program, bound.conditions, {**bound.keywords, **means}), x)


def slopes_of(trace: Trace, images: ImageMap) -> dict[str, Tensor] | None:
    """Slopes of a run's log-likelihoods in pixels in [0, 1], by image site, a row per image;
    ``None`` where a site has none or a mask, or a plate of pixels left of the images'."""
    found = {}
    for site in images.sites:
        node: Any = trace.nodes[site.name]
        shape = node["value"].shape
        slopes = None if isinstance(node["mask"], Tensor) else linear_slopes(node["fn"], site)
        if slopes is None or rows_dim(node) != -len(shape):
            return None
        found[site.name] = slopes.expand(shape)
    return found


def keywords(slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :class:`UnderCommonAttack` is told of slopes: their positive parts, and their negative
    ones."""
    up = {_UP + site: value.clamp(min=0) for site, value in slopes.items()}
    return up | {_DOWN + site: (-value).clamp(min=0) for site, value in slopes.items()}


class UnderCommonAttack:
    """A model whose likelihood is that of the attack that serves its latents best, less what this
    gives to those of another set: minus its log-density is V of the module's text.

    Its arguments are those of the model, and by keyword the means of :func:`keywords` of the other
    set's slopes, rows as the images.

    Args:
        model: Pyro model p(x, z) that observes its image.
        ball: the attacker's.
        delta: radius that the defender assumes, at least the attacker's.
    """

    def __init__(self, model: PyroProgram, ball: Linf, delta: float) -> None:
        self.epsilon, self.delta = ball.radius, delta
        self._aware = PerturbationAware(model, Linf(delta))

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the model with its likelihood replaced."""
        own = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith((_UP, _DOWN))}
        images = self._aware.images(x, args, kwargs)
        with _Attacked(self, images, own):
            return self._aware.model(x, *args, **kwargs)

    def slopes(self, trace: Trace, x: Tensor, *args: Any) -> dict[str, Tensor] | None:
        """:func:`slopes_of` a run of the model on these arguments."""
        return slopes_of(trace, self._aware.images(x, args, {}))


class _Attacked(Messenger):
    """Replace likelihoods of the image."""

    def __init__(
        self, program: UnderCommonAttack, images: ImageMap, means: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.program, self.means = program, means
        self.images = {site.name: site for site in images.sites}

    def _pyro_sample(self, msg: Any) -> None:
        site = self.images.get(msg["name"])
        if site is not None:
            up, down = self.means[_UP + site.name], self.means[_DOWN + site.name]
            msg["fn"] = _Likelihood(msg["fn"], site, self.program, up, down)


class _Likelihood(Reweighted):
    """The likelihood of a clean image as it was observed, by the attack of the module's text."""

    def __init__(
        self, likelihood: Any, site: ImageSite, program: UnderCommonAttack, up: Tensor,
        down: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(likelihood)
        self.site, self.program, self.up, self.down = site, program, up, down

    def log_prob(self, value: Tensor) -> Tensor:
        slopes = linear_slopes(self.likelihood, self.site)
        assert slopes is not None
        x, narrow = self.site.to_pixels(value), self.program.delta - self.program.epsilon
        with torch.no_grad():
            high, low = self._reached(slopes, x)
            closest = torch.where(slopes > 0, high, low)
        gain = self.up * (high - (x + narrow).clamp(max=1))
        gain = gain - self.down * (low - (x - narrow).clamp(min=0))
        log_prob = self.likelihood.log_prob(self.site.to_units(closest))
        return log_prob - sum_rightmost(gain, len(self.event_shape))

    def _reached(self, slopes: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the defender reaches from the best attack, upwards and downwards."""
        epsilon, delta = self.program.epsilon, self.program.delta
        attacked = torch.stack([(x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)])
        high, low = (attacked + delta).clamp(max=1), (attacked - delta).clamp(min=0)
        energy = (self.up - slopes.clamp(min=0)) * high - (self.down + slopes.clamp(max=0)) * low
        best = energy.argmin(0, keepdim=True)
        return high.gather(0, best)[0], low.gather(0, best)[0]
