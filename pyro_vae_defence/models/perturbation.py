r"""The perturbation-aware posterior, for a defender who assumes that x may have been perturbed.

The posterior of an attacked image is the wrong posterior: it takes the perturbation for signal. If
the perturbation is assumed to lie in a ball of radius :math:`\delta`, the energy becomes

.. math::
    U_\delta(z; x) = \min_{\|e\|_p \le \delta,\; 0 \le x - e \le 1}
    \bigl[-\log p(x - e \mid z)\bigr] - \log p(z).

For every attack inside the ball, :math:`e = x^a - x^r` is feasible, hence
:math:`U_\delta(z; x^a) \le U_0(z; x^r)` for all z: no such attack can lower the unnormalised
density of a latent that explained the reference; it can only add others. :math:`\delta` is the
defender's choice, not knowledge of the attack, and :math:`\delta = 0` is the paper's defence.

The minimiser :math:`x^* = x - e` is found per likelihood by :func:`most_likely_image`:

============================  ============  ========================================
likelihood                    balls         minimiser
============================  ============  ========================================
Bernoulli                     Linf, L2, L1  exact: the log-likelihood is linear in x
ContinuousBernoulli           Linf, L2, L1  exact, likewise
Normal, GaussianImage         Linf, L2, L1  exact: weighted projection of the mean
Laplace                       Linf          exact
DiscretisedLogisticMixture    Linf          grid levels, up to rounding (below)
============================  ============  ========================================

The last one is exact up to 1e-4 nats a pixel in float64; in float32, in which its log-probability
is no more exact, up to about 0.01 nats per channel. The inequality above holds up to as much. Its
images are those of grid levels, and the observed values; what lies between two levels is not
searched.

Ball and range are those of images in [0, 1], whatever units the model observes them in: a
likelihood of rescaled pixels is read as one of pixels, which is known for Bernoulli,
ContinuousBernoulli, Normal and Laplace.

Discrete latents y that the likelihood depends on are summed out with an :math:`x^*` for each of
their values, in Linf balls alone:

.. math:: U_\delta(z; x) = -\log \sum_y p(z, y) \max_e p(x - e \mid z, y) .

This is a lower bound of the minimum over one e for all of them; the inequality above still holds,
since it holds for every y.

For the gradient in z :math:`x^*` is a constant, by the envelope theorem; energies use it in full,
so that Hamiltonian kernels stay exact for :math:`\exp(-U_\delta)`.

An attacker asks for the gradient in x, too. A pixel of :math:`x^*` moves with x where the ball
holds it, and stays where the range [0, 1] or the likelihood's maximum does, so in an L_inf ball

.. math:: \nabla_x U_\delta(z; x) = -\nabla \log p(x^* \mid z) \odot 1[|x^* - x| = \delta].

Where x requires a gradient, :math:`x^*` therefore carries its derivative in x, and that of a
Gaussian's mean it has reached, without which second derivatives would be wrong. For L2 and L1 balls
pixels move with x unless they are 0 or 1; this neglects that a pixel at the edge of the range still
takes its share of the ball, and second derivatives of the projection.

**An unknown radius.** :math:`U_\delta` falls as :math:`\delta` grows, for every image, so a prior
over :math:`\delta` alone would always choose the largest: :math:`\exp(-U_\delta)` is a profile, not
a density of x, and its total mass grows with the ball. :class:`UnknownRadius` takes a grid with

.. math:: U(z; x) = -\log \sum_k \exp\bigl(-U_{\delta_k}(z; x) - c_k\bigr).

The exact normaliser :math:`\log \int \max_e p(x - e \mid z) dx` would be the penalty of a
calibrated likelihood. Image likelihoods are not calibrated (a Bernoulli pixel with logit -8 expects
intensities about .125, which no black background shows), so penalties are to be measured on clean
images instead, as what the radius gains there: :func:`pyro_vae_defence.defence.calibrate_radius`.
Each term bounds the sum, so :math:`U(z; x^a) \le U_0(z; x^r) + c_k` for attacks within
:math:`\delta_k`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Bernoulli, ContinuousBernoulli, Independent, Laplace, Normal

from pyro_vae_defence.models.observation import ImageMap, ImageSite, read_images_with
from pyro_vae_defence.ops import reach
from pyro_vae_defence.ops.balls import Ball, Linf
from pyro_vae_defence.ops.checks import RefusalError
from pyro_vae_defence.ops.distributions import (
    Reweighted,
    counted,
    innermost,
    is_of,
    own_methods,
)
from pyro_vae_defence.types import PyroProgram

__all__ = ["Perturbation", "PerturbationAware", "UnknownRadius", "most_likely_image"]


@functools.singledispatch
def most_likely_image(likelihood: Any, x: Tensor, ball: Ball) -> Tensor:
    """The image x - e most probable to ``likelihood`` with e in the ball and values in [0, 1].

    To add a likelihood, register a function of the same three arguments for its class, one line by
    :mod:`pyro_vae_defence.ops.reach` where its logarithm is linear or quadratic in x::

        @most_likely_image.register
        def _(likelihood: MyLikelihood, x: Tensor, ball: Ball) -> Tensor:
            return reach.nearest(likelihood.loc, likelihood.precision, x, ball)

    Args:
        likelihood: p(x | z) with one row per image.
        x: observed images, of the shape the likelihood observes, rows first, values in [0, 1].
        ball: where perturbations live. Its norm is that of a row over all other dimensions.

    Returns:
        Images of the shape of ``x``, inside the ball around it and in [0, 1] exactly.

    Raises:
        ValueError: for a likelihood or a ball without a known minimiser.
    """
    raise RefusalError(
        f"no perturbation-aware posterior is known for the likelihood {type(likelihood).__name__}; "
        "register its minimiser with most_likely_image.register"
    )


@most_likely_image.register
def _(likelihood: Independent, x: Tensor, ball: Ball) -> Tensor:
    return most_likely_image(likelihood.base_dist, x, ball)


@most_likely_image.register
def _(likelihood: MaskedDistribution, x: Tensor, ball: Ball) -> Tensor:
    if not isinstance(ball, Linf):
        raise RefusalError(
            f"perturbation must be an Linf ball for a masked likelihood, whose masked pixels take "
            f"no share of it, got {ball!r}"
        )
    return most_likely_image(likelihood.base_dist, x, ball)


@most_likely_image.register(Bernoulli)
@most_likely_image.register(ContinuousBernoulli)
def _(likelihood: Any, x: Tensor, ball: Ball) -> Tensor:
    # Linear in x, with the logits as slope.
    return reach.maximise_linear(likelihood.logits, x, ball)


@most_likely_image.register
def _(likelihood: Normal, x: Tensor, ball: Ball) -> Tensor:
    return reach.nearest(likelihood.loc, likelihood.scale**-2, x, ball)


@most_likely_image.register
def _(likelihood: Laplace, x: Tensor, ball: Ball) -> Tensor:
    if not isinstance(ball, Linf):
        message = f"perturbation must be an Linf ball for a Laplace likelihood, got {ball!r}"
        raise RefusalError(message)
    # As close to the mode as one can get, and on it where that is in reach: the density has a kink
    # there, where rounding would make a force.
    mode = likelihood.loc.expand_as(x)
    reached = ((mode - x).abs() <= ball.radius) & (mode >= 0.0) & (mode <= 1.0)
    return torch.where(reached, mode, reach.nearest(mode, 1.0, x, ball))


@functools.singledispatch
def in_pixels(likelihood: Any, site: ImageSite) -> Any:
    """A likelihood of rescaled pixels as one of pixels in [0, 1], up to a constant factor.

    Raises ``ValueError`` where it is not known.
    """
    raise RefusalError(
        f"site {site.name!r} observes a rescaled image with a {type(likelihood).__name__}, for "
        "which no perturbation-aware posterior is known; observe the image in [0, 1]"
    )


@in_pixels.register
def _(likelihood: Independent, site: ImageSite) -> Any:
    base = in_pixels(likelihood.base_dist, site)
    return Independent(base, likelihood.reinterpreted_batch_ndims, validate_args=False)


@in_pixels.register
def _(likelihood: MaskedDistribution, site: ImageSite) -> Any:
    return MaskedDistribution(in_pixels(likelihood.base_dist, site), likelihood._mask)


@in_pixels.register(Normal)
@in_pixels.register(Laplace)
def _(likelihood: Any, site: ImageSite) -> Any:
    family = Normal if isinstance(likelihood, Normal) else Laplace
    assert site.scale is not None
    scale = likelihood.scale / site.scale.to(likelihood.scale).abs()
    return family(site.to_pixels(likelihood.loc), scale, validate_args=False)


@in_pixels.register(Bernoulli)
@in_pixels.register(ContinuousBernoulli)
def _(likelihood: Any, site: ImageSite) -> Any:
    assert site.scale is not None
    logits = likelihood.logits * site.scale.to(likelihood.logits)
    return type(likelihood)(logits=logits, validate_args=False)


def linear_slopes(likelihood: Any, site: ImageSite) -> Tensor | None:
    """Slopes of log p(x | z) in pixels in [0, 1], where it is linear in them; ``None`` elsewhere,
    and where elements of the likelihood are masked."""
    if counted(likelihood) is not True:
        return None
    rescaled = likelihood if site.scale is None else in_pixels(likelihood, site)
    found = innermost(rescaled)
    linear = is_of(found, Bernoulli) or is_of(found, ContinuousBernoulli)
    return found.logits if linear else None


def most_likely_value(likelihood: Any, value: Tensor, ball: Ball, site: ImageSite) -> Tensor:
    """:func:`most_likely_image` in the units of a site, with derivatives in ``value``."""
    if site.scale is None:
        return _moving_image(likelihood, value, ball)
    _check_own_density(likelihood, in_pixels)
    rescaled = in_pixels(likelihood, site)
    pixels = _moving_image(rescaled, site.to_pixels(value), ball)
    closest = site.to_units(pixels)
    likelihood, rescaled = innermost(likelihood), innermost(rescaled)
    if isinstance(likelihood, Laplace):
        # On the mode exactly here too.
        closest = torch.where(pixels == rescaled.loc, likelihood.loc.detach(), closest)
    return closest


def _moving_image(likelihood: Any, x: Tensor, ball: Ball) -> Tensor:
    """The most likely image, with its derivatives where ``x`` has one."""
    _check_own_density(likelihood, most_likely_image)
    with torch.no_grad():
        closest = most_likely_image(likelihood, x, ball)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return closest
    rounding = 8 * torch.finfo(x.dtype).eps
    if not isinstance(ball, Linf):
        held = (closest > 0) & (closest < 1)
        return closest + torch.where(held, x - x.detach(), 0.0)
    held = (closest - x).abs() >= ball.radius - rounding
    moving = closest + torch.where(held, x - x.detach(), 0.0)
    likelihood = innermost(likelihood)
    if isinstance(likelihood, Normal):
        mean = likelihood.loc
        reached = ~held & ((closest - mean).abs() <= rounding)
        moving = moving + torch.where(reached, mean - mean.detach(), 0.0)
    return moving


def _check_own_density(likelihood: Any, known: Any) -> None:
    """Refuse a likelihood of another density than the class that ``known`` has registered."""
    kind = type(innermost(likelihood))
    family = next(base for base in kind.__mro__ if base in known.registry)
    if family is not object and "log_prob" in own_methods(kind, family):
        raise RefusalError(
            f"the likelihood {kind.__name__} has a log_prob of its own, and what is known of "
            f"{family.__name__} need not hold for it; register its minimiser with "
            f"most_likely_image.register({kind.__name__}, minimiser), which is "
            f"most_likely_image.dispatch({family.__name__}) where the density is the same, and "
            "observe the image in [0, 1]"
        )


@dataclass(frozen=True)
class UnknownRadius:
    """A perturbation in one of several balls, with a penalty in nats for each.

    Args:
        ball: the kind of ball, e.g. ``Linf``.
        radii: increasing radii >= 0; 0 stands for an unperturbed image.
        penalties: one finite number c_k per radius, added to its energy: what the radius gains on
            clean images, see :func:`pyro_vae_defence.defence.calibrate_radius`, minus the logarithm
            of a prior probability if there is one. Only their differences matter to the posterior.

    Raises:
        ValueError: if radii are not increasing, or too large for the ball, or there are not as many
            penalties.

    Example:
        >>> unknown = UnknownRadius(Linf, (0.0, 0.1, 0.2), (0.0, 20.0, 45.0))
        >>> unknown.balls[1:]
        (Linf(radius=0.1), Linf(radius=0.2))
    """

    ball: type[Ball]
    radii: tuple[float, ...]
    penalties: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (isinstance(self.ball, type) and issubclass(self.ball, Ball)):
            raise ValueError(f"ball must be a kind of ball such as Linf, got {self.ball!r}")
        object.__setattr__(self, "radii", tuple(map(float, self.radii)))
        object.__setattr__(self, "penalties", tuple(map(float, self.penalties)))
        increasing = all(a < b for a, b in zip(self.radii, self.radii[1:], strict=False))
        if not (self.radii and increasing and self.radii[0] >= 0 and self.radii[-1] < math.inf):
            raise ValueError(f"radii must be finite, >= 0 and increasing, got {self.radii}")
        if len(self.penalties) != len(self.radii) or not all(map(math.isfinite, self.penalties)):
            raise ValueError(
                f"penalties must be one finite number for each of the {len(self.radii)} radii, "
                f"got {self.penalties}"
            )
        _ = self.balls  # each refuses a radius that is too large for it

    def __str__(self) -> str:
        return f"UnknownRadius({self.ball.__name__}, {self.radii}, {self.penalties})"

    @property
    def balls(self) -> tuple[Ball | None, ...]:
        """The ball of each radius; ``None`` for radius 0."""
        return tuple(self.ball(radius) if radius else None for radius in self.radii)

    def log_joint(self, likelihood: Any, value: Tensor, site: ImageSite) -> Tensor:
        """log p(x* | z) - c_k of every image and radius, ``(N, radii)``, in nats.

        Its softmax over radii is the posterior probability of each radius given z. Arguments as in
        :func:`most_likely_value`.
        """
        columns = []
        for ball, penalty in zip(self.balls, self.penalties, strict=True):
            closest = value
            if ball is not None:
                closest = most_likely_value(likelihood, value, ball, site)
            columns.append(likelihood.log_prob(closest) - penalty)
        return torch.stack(columns, -1)


Perturbation: TypeAlias = Ball | UnknownRadius
"""What a defender assumes about perturbations: a ball, or several."""


class UnknownRadiusLikelihood(Reweighted):
    """The mixture over radii, as the likelihood of the image as it was observed at ``site``."""

    def __init__(self, likelihood: Any, perturbation: UnknownRadius, site: ImageSite) -> None:
        super().__init__(likelihood)
        self.perturbation, self.site = perturbation, site

    def log_joint(self, value: Tensor) -> Tensor:
        """As :meth:`UnknownRadius.log_joint`."""
        return self.perturbation.log_joint(self.likelihood, value, self.site)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_joint(value).logsumexp(-1)


class _MostLikely(Messenger):
    """Replace the image by the most likely one, or its likelihood by the mixture over radii."""

    def __init__(self, perturbation: Perturbation, images: ImageMap) -> None:
        super().__init__()
        self.perturbation = perturbation
        self.images = {site.name: site for site in images.sites}

    def _pyro_sample(self, msg: Any) -> None:
        site = self.images.get(msg["name"])
        if site is None:
            return
        if isinstance(self.perturbation, Ball):
            if not isinstance(self.perturbation, Linf):
                self._check_rows(msg)
            value, shape = msg["value"], msg["fn"].shape()
            # Discrete latents enumerated on the left have a most likely image each.
            value = value.expand(shape) if value.dim() < len(shape) else value
            msg["value"] = most_likely_value(msg["fn"], value, self.perturbation, site)
        else:
            self._check_rows(msg)
            msg["fn"] = UnknownRadiusLikelihood(msg["fn"], self.perturbation, site)

    def _check_rows(self, msg: Any) -> None:
        """Norms and mixtures over a whole image need rows that are images, and nothing masked."""
        rows = msg["value"].shape[0] == msg["fn"].batch_shape.numel()
        if not rows or isinstance(msg["mask"], Tensor) or len(self.images) > 1:
            raise RefusalError(
                f"site {msg['name']!r}: an L2 or L1 ball and an unknown radius need one image per "
                "row, observed at one site; declare the pixels' dimensions with .to_event(...) and "
                "mask none, or use an Linf ball"
            )


class PerturbationAware:
    """A Pyro model whose observation is the most likely image within a ball around its argument.

    Conditioned on latents, minus its log-density is :math:`U_\\delta(z; x)`; any kernel takes it.
    Ball and range are those of images in [0, 1], whatever units the model observes them in.

    Args:
        model: Pyro model p(x, z) that observes its image.
        perturbation: what the defender assumes, e.g. ``Linf(0.1)``, or an :class:`UnknownRadius`.

    Raises:
        ValueError: if ``perturbation`` is neither; when called, for a likelihood without a known
            minimiser, pixels that are no event dimensions but for an Linf ball, and a model that
            observes something else than pixels, or reads its image otherwise.

    Example:
        >>> from pyro_vae_defence.models import ConvVAE
        >>> from pyro_vae_defence.models.program import ModelPotential
        >>> vae, x = ConvVAE().eval(), torch.rand(2, 1, 28, 28)
        >>> z = {"z": torch.ones(2, 64)}
        >>> aware = ModelPotential(PerturbationAware(vae.model, Linf(0.1)), x)
        >>> bool((aware(z) < ModelPotential(vae.model, x)(z)).all())
        True
    """

    def __init__(self, model: PyroProgram, perturbation: Perturbation) -> None:
        if not isinstance(perturbation, (Ball, UnknownRadius)):
            raise ValueError(
                "perturbation must be a ball such as Linf(0.1), an UnknownRadius, or None, "
                f"got {perturbation!r}"
            )
        self.model = model
        self.perturbation = perturbation
        self._images: dict[Any, ImageMap] = {}

    # Made anew for each micro-batch, whose recordings are those of the same model and perturbation.

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PerturbationAware) or type(other) is not type(self):
            return NotImplemented
        return (self.model, self.perturbation) == (other.model, other.perturbation)

    def __hash__(self) -> int:
        return hash((self.model, self.perturbation))

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the model with its observation, or its likelihood, replaced."""
        with _MostLikely(self.perturbation, self.images(x, args, kwargs)):
            return self.model(x, *args, **kwargs)

    def images(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ImageMap:
        """How the model observes images like ``x``, read once; a ``ValueError`` as the class."""
        key = (tuple(x.shape[1:]), x.dtype, x.device)
        if key not in self._images:
            images = read_images_with(self.model, x, args, kwargs)
            images.check_perturbable()
            self._images[key] = images
        return self._images[key]
