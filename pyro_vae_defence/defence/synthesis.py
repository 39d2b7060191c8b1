r"""Analysis by synthesis: the class that explains an image best, were the image perturbed.

One conditional decoder :math:`p(x \mid z, y)` with a prior :math:`p(z \mid y)` is a classifier by
Bayes' rule. For a defender who assumes a perturbation of radius :math:`\delta`, the mass of class y
at image x integrates the perturbation-aware posterior's density,

.. math::
    M_y^\delta(x) = \int e^{-U_{\delta,y}(z; x)}\,dz, \qquad
    U_{\delta,y}(z; x) = \min_{\|e\| \le \delta,\; 0 \le x - e \le 1}
        \bigl[-\log p(x - e \mid z, y)\bigr] - \log p(z \mid y),

and the class is :math:`\arg\max_y\, [\log \pi_y + \log M_y^\delta(x)]`. There is no encoder in it
that an attack could lead astray.

*A bound without an attack.* For :math:`\|x^a - x^r\| \le \epsilon \le \delta` the energies are
ordered at every z, :math:`U_{\delta+\epsilon}(z; x^r) \le U_\delta(z; x^a) \le
U_{\delta-\epsilon}(z; x^r)`, class by class, hence

.. math:: M_y^{\delta-\epsilon}(x^r) \;\le\; M_y^\delta(x^a) \;\le\; M_y^{\delta+\epsilon}(x^r).

The class stays y under *every* attack in the ball if :math:`\pi_y M_y^{\delta-\epsilon}(x^r)`
exceeds all :math:`\pi_k M_k^{\delta+\epsilon}(x^r)` of other classes k, which are functions of the
clean image. Where one attack on both classes can be told
(:mod:`pyro_vae_defence.models.common_attack`), masses of other classes are those under attacks that
y must bear as well, which are smaller. No walk has to be kept in a set of latents, as for
:func:`~pyro_vae_defence.robustness.mass_bound`. It is estimated, for exact inference: the
inequality is proved; the masses are estimated, not certified.

*Estimating masses.* Walks rise through inverse temperatures to the target
(:mod:`pyro_vae_defence.mcmc.annealed`) from a mixture: a Gaussian fitted to draws of :math:`p(z
\mid y)`, and one around each end of a few pilots, which have risen from that Gaussian. The mean
weight is the mass in expectation, whatever pilots have found; its logarithm errs downwards. For the
bound other walks fall from where these have ended, gone on for a while, back to the mixture: as far
as they start at draws of the target, they err upwards. The bound takes the less favourable
estimate. Step sizes are tuned, for each pair of an image and a class, on walks that are then thrown
away. All classes are treated alike, and no walk starts at an encoding of the image, which is the
attacker's.

*Gradient.* In x, a logarithm of a mass has the derivative :math:`-E[\partial_x U_{\delta,y}(z; x)]`
over the posterior of its class, where the walks end.

The idea is that of Schott, Rauber, Bethge, Brendel, "Towards the first adversarially robust neural
network model on MNIST", ICLR 2019, https://arxiv.org/abs/1805.09190, who take one VAE per class, a
lower bound of log p(x | y) by optimisation, and bound the L2 perturbation that changes the class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_vae_defence.defence.store import fingerprint, weights_fingerprint
from pyro_vae_defence.mcmc import annealed
from pyro_vae_defence.mcmc.kernels import check_inverse_mass
from pyro_vae_defence.metrics.likelihood import sigmoid_schedule
from pyro_vae_defence.models import common_attack, program
from pyro_vae_defence.models.common_attack import MeanSlopes
from pyro_vae_defence.models.sites import (
    aside,
    get_trace,
    image_rows,
    log_prob_per_image,
    observed_sites,
)
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import Ball, Linf, check_ball, reaches
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import check_finite, check_integer, is_integer
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import VAE, Latents, LatentsLike

_PRIOR_DRAWS = 200  # of each class, which a Gaussian is fitted to
_LEAST_SCALE = 1e-6  # of that Gaussian
_PILOTS = 4  # walks of each image and class that look for modes
_TUNING = 2  # walks that tune step sizes
_WIDE = 0.2  # weight of the class's own Gaussian, beside those around the pilots' ends
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
# Purposes of the streams, beside those of HMC and of redrawing.
_START, _COMPONENT, _CHOICE = 3, 4, 5


class ClassMasses(NamedTuple):
    """Estimates of the log-mass of every class at every image, ``(N, K)`` each.

    Attributes:
        log_mass: in nats, with one unknown constant in common where the likelihood has one. Its
            derivative in the images is that of the integral.
        standard_error: of it; 1 and more says that it is larger.
        acceptance_rate: of the walks' moves.
    """

    log_mass: Tensor
    standard_error: Tensor
    acceptance_rate: Tensor


class MarginBound(NamedTuple):
    """What no attack in a ball can change, for exact inference; estimated.

    Attributes:
        right: log-mass of the label's class in the smaller ball, prior included, ``(N,)``, in nats:
            the smaller of two estimates.
        wrong: log-masses of all classes in the larger ball, or what of them one attack on both
            classes leaves, likewise, ``(N, K)``: the larger of two estimates, and -inf for the
            label itself.
        standard_error: of the margin, by the spread of weights of rising walks, ``(N,)``.
        gap: what falling walks say more than rising ones, of the right class and of the wrong one
            that decides, ``(N, 2)``: near 0 the masses are known.
        common_attack: whether it is one attack on both classes.
    """

    right: Tensor
    wrong: Tensor
    standard_error: Tensor
    gap: Tensor
    common_attack: bool

    @property
    def margin(self) -> Tensor:
        """Log-odds of the label against the most likely other class under the worst attack,
        ``(N,)``, or less; -inf where a mass was not found."""
        known = self.right.isfinite() & (self.wrong < math.inf).all(1)
        return torch.where(known, self.right - self.wrong.amax(1), -math.inf)

    @property
    def kept(self) -> Tensor:
        """Whether the label is the predicted class under every attack, bool ``(N,)``."""
        return self.margin > 0


@dataclass(eq=False, repr=False)
class AnalysisBySynthesis:
    r"""A classifier from one conditional VAE, which assumes that images may be perturbed.

    Args:
        vae: any Pyro VAE whose programs take images and their class as a one-hot vector,
            ``model(x, y)`` and ``guide(x, y)``, such as a
            :class:`~pyro_vae_defence.models.ConditionalVAE`. The guide is checked and not used.
        num_classes: number of classes K, 2 or more.
        perturbation: the ball of perturbations that is assumed, of radius :math:`\delta`; ``None``
            for none.
        log_prior: logarithms of the classes' probabilities, ``(K,)``, up to a constant; all alike
            when ``None``, or those of a model that weighs its class, ``pyro.sample("y",
            OneHotCategorical(probs), obs=y)`` or a ``pyro.factor``, whose masses have them.
        inverse_mass_matrix: variances of the unconstrained latents given an image, site -> one
            image's shape, such as ``vae.mean_posterior_variance``: the scales on which walks move
            near the target. ``None`` takes those of the prior.
        num_temperatures: steps of a walk, >= 3.
        num_steps: leapfrog steps for each, one gradient each.
        num_walks: walks per image and class, 2 or more.
        rows: walks computed at once: bounds the memory, not the result.

    Raises:
        ValueError: if an argument is out of range; when called, for a VAE without such programs,
            and for a ``log_prior`` beside a model that weighs its class.

    Example:
        >>> from pyro_vae_defence.models import ConditionalVAE
        >>> from pyro_vae_defence.ops.balls import Linf
        >>> classify = AnalysisBySynthesis(
        ...     ConditionalVAE(), 10, Linf(0.1), num_temperatures=3, num_walks=2
        ... )
        >>> classify.predict(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2])
    """

    vae: VAE
    num_classes: int
    perturbation: Ball | None = None
    log_prior: Tensor | None = None
    inverse_mass_matrix: LatentsLike | None = None
    num_temperatures: int = 20
    num_steps: int = 3
    num_walks: int = 8
    rows: int = 1600

    def __post_init__(self) -> None:
        self._check()
        self._fitted: tuple[VAE, tuple[object, ...], _Base] | None = None

    def _check(self) -> None:
        """``ValueError`` for arguments out of range; asked again by each call, as they may have
        been replaced."""
        program.check_vae(self.vae)
        if not (self.perturbation is None or isinstance(self.perturbation, Ball)):
            raise ValueError(
                f"perturbation must be a ball such as Linf(0.1), or None, got {self.perturbation!r}"
            )
        for name, least in (
            ("num_classes", 2),
            ("num_temperatures", 3),
            ("num_steps", 1),
            ("num_walks", 2),
            ("rows", 1),
        ):
            check_integer(name, getattr(self, name), least)
        if self.log_prior is not None:
            try:
                found = torch.as_tensor(self.log_prior, device="cpu")
            except (TypeError, ValueError, RuntimeError):  # text, and whatever has no numbers
                found = torch.empty(0)
            if tuple(found.shape) != (self.num_classes,) or not bool(found.isfinite().all()):
                raise ValueError(
                    f"log_prior must be {self.num_classes} finite numbers, one per class, got "
                    f"{self.log_prior!r}"
                )
        if self.inverse_mass_matrix is not None:
            check_inverse_mass(self.inverse_mass_matrix)

    @public
    def log_masses(self, x: Tensor, generator: torch.Generator | None = None) -> ClassMasses:
        """Log-masses of all classes, without ``log_prior``.

        Args:
            x: images ``(N, C, H, W)`` in [0, 1].
            generator: source of the seed; torch's global seed when ``None``. The noise of an image
                goes by its position among ``x`` and the class.

        Raises:
            ValueError: if the images are no such images, or the programs do not take them and a
                one-hot class.
        """
        self._check_images(x)
        seed, parts = draw_seed(generator), []
        number, every = (torch.arange(n, device=x.device) for n in (len(x), self.num_classes))
        pairs = _Pairs(number.repeat_interleave(len(every)), every.repeat(len(number)))
        with program.evaluation_mode(self.vae):
            for some in self._parts(pairs):
                walks = _Walks(self, x, some, _within(self.perturbation), seed)
                risen = walks.rise()
                mass, rate = walks.differentiable(x, risen), _rate(risen, self.num_walks)
                parts.append(ClassMasses(mass, risen.variance.sqrt(), rate))
        joined = map(torch.cat, zip(*parts, strict=True))
        return ClassMasses(*(value.view(len(x), -1) for value in joined))

    def log_posterior(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Log-probabilities of classes, ``(N, K)``, normalised; as :meth:`log_masses`."""
        found = self.log_masses(x, generator).log_mass
        return (found + self._prior(found)).log_softmax(1)

    def predict(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Classes of images, int64 ``(N,)``; arguments as for :meth:`log_masses`.

        Raises:
            ValueError: as there, and for images that no class explains.
        """
        with torch.no_grad():
            found = self.log_posterior(x, generator)
        check_finite(
            "the log-probability of the likeliest class",
            found.amax(1, keepdim=True),
            "log_masses(x) shows what is known there; a likelihood that has no density at these "
            "pixels, as a Beta has none at 0 and 1, needs images that keep off its border",
        )
        return found.argmax(1)

    @public
    @torch.no_grad()
    def explain(
        self, x: Tensor, classes: Tensor, generator: torch.Generator | None = None
    ) -> Latents:
        """Latents by which given classes explain images, site -> ``(num_walks, N, *event)``.

        They are draws of the classes' perturbation-aware posteriors, as far as walks are long
        enough, on the scale of the model's latents: ``program.decode`` shows them.

        Args:
            x: images ``(N, C, H, W)`` in [0, 1].
            classes: one for each image, int64 ``(N,)``.
            generator: as for :meth:`log_masses`.

        Raises:
            ValueError: if an argument does not fit.
        """
        self._check_images(x)
        pairs = _Pairs(
            torch.arange(len(x), device=x.device), self.check_classes("classes", classes, x)
        )
        seed, parts = draw_seed(generator), []
        with program.evaluation_mode(self.vae):
            for some in self._parts(pairs):
                walks = _Walks(self, x, some, _within(self.perturbation), seed)
                end = walks.energy.constrain(walks.rise().end.position)
                end = program.in_guide_order(walks.vae, walks.x, end)
                parts.append({name: lat.unfold(v, self.num_walks) for name, v in end.items()})
        return {name: torch.cat([each[name] for each in parts], 1) for name in parts[0]}

    @public
    @torch.no_grad()
    def margin_bound(
        self,
        x: Tensor,
        labels: Tensor,
        ball: Ball,
        *,
        num_falling: int = 2,
        generator: torch.Generator | None = None,
    ) -> MarginBound:
        """What no attack within ``ball`` can change: see the module's text.

        Args:
            x: clean images ``(N, C, H, W)`` in [0, 1].
            labels: their classes, int64 ``(N,)``.
            ball: where the attacker's perturbations live, of the kind of ``perturbation`` and at
                most its radius.
            num_falling: falling walks per image and class, at most ``num_walks``.
            generator: source of the seed; torch's global seed when ``None``.

        Raises:
            ValueError: if an argument does not fit.
        """
        self._check_images(x)
        check_ball(ball)
        if type(self.perturbation) is not type(ball):
            raise ValueError(
                f"ball must be of the kind of the perturbation that is assumed, got {ball!r} and "
                f"perturbation={self.perturbation!r}: make them alike"
            )
        assert self.perturbation is not None
        narrow, wide = reaches(ball, self.perturbation.radius)
        check_integer("num_falling", num_falling)
        if num_falling > self.num_walks:
            raise ValueError(
                f"num_falling={num_falling} must be at most num_walks={self.num_walks}"
            )
        labels = self.check_classes("labels", labels, x)
        seed = draw_seed(generator)
        # Pairs of an image and another class, image after image.
        others = torch.arange(1, self.num_classes, device=x.device)
        image = torch.arange(len(x), device=x.device)
        wrong = (labels[:, None] + others) % self.num_classes
        pairs = _Pairs(image.repeat_interleave(len(others)), wrong.flatten())
        with program.evaluation_mode(self.vae):
            slopes: list[MeanSlopes] | None = None
            if common_attack.is_known(*_at(self, x[:1], labels[:1]), ball):
                slopes = []
            within = _within(narrow)
            of_right = self._both(x, _Pairs(image, labels), within, seed, num_falling, slopes)
            energies = _within(wide)
            if slopes is not None and isinstance(ball, Linf):
                energies = _under_attack(ball, self.perturbation.radius, slopes)
            of_wrong = self._both(x, pairs, energies, seed, num_falling)
        prior = self._prior(of_right.rising)
        right = torch.minimum(of_right.rising, of_right.falling) + prior[labels]
        most = torch.maximum(of_wrong.rising, of_wrong.falling)
        # No estimate at all is no small mass.
        lost = ~(of_wrong.rising.isfinite() & of_wrong.falling.isfinite())
        most = most.masked_fill(lost, math.inf).view_as(wrong) + prior[wrong]
        every = right.new_full((len(x), self.num_classes), -math.inf).scatter(1, wrong, most)
        decides = most.argmax(1) + len(others) * image
        error = of_right.standard_error.square() + of_wrong.standard_error[decides].square()
        gaps = [each.falling - each.rising for each in (of_right, of_wrong)]
        gap = torch.stack([gaps[0], gaps[1][decides]], 1)
        return MarginBound(right, every, error.sqrt(), gap, slopes is not None)

    def _both(
        self,
        x: Tensor,
        pairs: _Pairs,
        energies: _Energies,
        seed: int,
        num_falling: int,
        slopes: list[MeanSlopes] | None = None,
    ) -> _Both:
        parts = []
        for some in self._parts(pairs):
            walks = _Walks(self, x, some, energies, seed)
            risen = walks.rise()
            seen = None
            if slopes is not None:
                seen = MeanSlopes(walks.vae, walks.x)
                slopes.append(seen)
            fallen = walks.fall(risen, num_falling, seen)
            parts.append(_Both(risen.log_mass, fallen.log_mass, risen.variance.sqrt()))
        return _Both(*map(torch.cat, zip(*parts, strict=True)))

    def _parts(self, pairs: _Pairs) -> Iterator[_Pairs]:
        """As many pairs as are computed at once."""
        size = max(1, self.rows // max(self.num_walks, _PILOTS))
        for first in range(0, len(pairs.image), size):
            yield _Pairs(*(value[first : first + size] for value in pairs))

    def _prior(self, like: Tensor) -> Tensor:
        if self.log_prior is None:
            return like.new_zeros(self.num_classes)
        return torch.as_tensor(self.log_prior, dtype=like.dtype, device=like.device)

    def _check_images(self, x: Tensor) -> None:
        if isinstance(x, (tuple, list)):
            raise ValueError(
                "x must be images alone, got a tuple: the classes, which are the programs' "
                "condition, are all tried"
            )
        self._check()
        program.check_images(x)
        if self.log_prior is not None:
            with program.evaluation_mode(self.vae):
                self._check_prior(x[:1])

    @torch.no_grad()
    def _check_prior(self, x: Tensor) -> None:
        """Refuse a prior of classes beside one of the model, at one image."""
        classes = torch.arange(self.num_classes, device=x.device)
        with aside(x.device):  # latents are drawn anew for each
            here, elsewhere = (
                {site["name"]: site for site in observed_sites(get_trace(vae.model, images))}
                for vae, images in (
                    _at(self, at.expand(len(classes), -1, -1, -1), classes) for at in (x, 1 - x)
                )
            )
        for name in here.keys() & elsewhere.keys():
            sites = here[name], elsewhere[name]
            values, other_values = (image_rows(site["value"], site).double() for site in sites)
            weights, other_weights = (log_prob_per_image(site, len(classes)) for site in sites)
            # What differs by class, and not by image or latents, is of the class alone.
            of_class = (
                torch.allclose(each, other) and not torch.allclose(each, each[:1])
                for each, other in ((values, other_values), (weights, other_weights))
            )
            if any(of_class) and not torch.allclose(weights, weights[:1]):
                raise ValueError(
                    f"log_prior is given, and the model weighs classes itself at site {name!r}, so "
                    "that priors of classes would count twice; leave log_prior out, or hide the "
                    f"site, poutine.block(vae.model, hide=[{name!r}])"
                )

    def check_classes(self, name: str, classes: Tensor, x: Tensor) -> Tensor:
        """Classes as int64 on the device of ``x``; a ``ValueError`` unless each row has one."""
        found = torch.as_tensor(classes, device=x.device)
        if not is_integer(found):
            raise ValueError(f"{name} must be integers from 0 on, got dtype {found.dtype}")
        if tuple(found.shape) != (len(x),):
            raise ValueError(f"{name} must have shape ({len(x)},), got {tuple(found.shape)}")
        least, most = int(found.min()), int(found.max())
        if least < 0 or most >= self.num_classes:
            raise ValueError(
                f"{name} must lie in 0..{self.num_classes - 1}, got values from {least} to {most}"
            )
        return found.long()

    def _base(self, x: Tensor) -> _Base:
        """Gaussians for images like ``x``, fitted once to a VAE with its weights as they are."""
        held = weights_fingerprint(self.vae), fingerprint(self.inverse_mass_matrix)
        key = (*held, self.num_classes, x.shape[1:], x.dtype, x.device)
        if self._fitted is None or self._fitted[0] is not self.vae or self._fitted[1] != key:
            self._fitted = self.vae, key, _Base.fit(self, x)
        return self._fitted[2]


class _Pairs(NamedTuple):
    """Numbers of images and of classes, ``(P,)`` each."""

    image: Tensor
    classes: Tensor


class _Both(NamedTuple):
    """Log-masses of pairs by rising and by falling walks, ``(P,)``."""

    rising: Tensor
    falling: Tensor
    standard_error: Tensor


# --- Where walks start ----------------------------------------------------------------------------


class _Base(NamedTuple):
    """A Gaussian per class on the unconstrained scale, site -> ``(K, *event)``; pilots' metric
    there, and that of walks and at the target, site -> ``(1, *event)``."""

    loc: Latents
    scale: Latents
    variance: Latents
    at_target: Latents

    @classmethod
    @torch.no_grad()
    def fit(cls, of: AnalysisBySynthesis, x: Tensor) -> _Base:
        """To draws of the prior given each class."""
        number, at_once = of.num_classes, max(1, of.rows // _PRIOR_DRAWS)
        draw, parts = torch.arange(_PRIOR_DRAWS, device=x.device)[:, None], []
        for some in torch.arange(number, device=x.device).split(at_once):
            classes, row = some.repeat(_PRIOR_DRAWS), (number * draw + some).flatten()
            energy = program.potential(
                *_at(of, x[:1].detach().expand(len(row), -1, -1, -1), classes)
            )
            drawn = energy.prior(Streams(0, row, torch.zeros_like(row)))
            parts.append({name: lat.unfold(value, _PRIOR_DRAWS) for name, value in drawn.items()})
        by_class = {name: torch.cat([each[name] for each in parts], 1) for name in parts[0]}
        loc = {name: value.mean(0) for name, value in by_class.items()}
        scale = {name: value.std(0).clamp(min=_LEAST_SCALE) for name, value in by_class.items()}
        variance = {name: value.square().mean(0, keepdim=True) for name, value in scale.items()}
        at_target = variance
        if of.inverse_mass_matrix is not None:
            at_target = _check_metric(of.inverse_mass_matrix, variance)
        return cls(loc, scale, variance, at_target)

    def metric(self, b: float) -> Latents:
        """Variances between those of the Gaussians and those at the target."""
        return {
            name: 1 / ((1 - b) / value + b / self.at_target[name])
            for name, value in self.variance.items()
        }


def _check_metric(metric: LatentsLike, like: Latents) -> Latents:
    """Variances with a first dimension of 1, if they fit the latents."""
    shapes = {name: tuple(value.shape[1:]) for name, value in like.items()}
    found = {name: tuple(value.shape) for name, value in metric.items()}
    if found != shapes:
        raise ValueError(f"inverse_mass_matrix has shapes {found}, the latents {shapes}")
    return {name: metric[name][None].to(value) for name, value in like.items()}


class _Mixture:
    """Energy -log q of rows, normalised, each with its own mixture of Gaussians.

    Args:
        loc, scale: site -> ``(components, rows, *event)``.
        log_weights: of the components, ``(components,)``.
    """

    def __init__(self, loc: Latents, scale: Latents, log_weights: Tensor) -> None:
        self.loc, self.scale, self.log_weights = loc, scale, log_weights
        constant = _sum_events({n: v.log() + _HALF_LOG_2PI for n, v in scale.items()})
        self.constant = log_weights[:, None] - constant

    def __call__(self, latents: LatentsLike) -> Tensor:
        return self.energy_and_gradient(latents)[0]

    def energy_and_gradient(self, latents: LatentsLike) -> tuple[Tensor, Latents]:
        away = {name: latents[name] - value for name, value in self.loc.items()}
        pull = {name: value / self.scale[name].square() for name, value in away.items()}
        log_q = self.constant - 0.5 * _sum_events(lat.multiply(away, pull))
        shares = log_q.softmax(0)
        force = {n: (value * _events(shares, value)).sum(0) for n, value in pull.items()}
        return -log_q.logsumexp(0), force

    def draw(self, streams: Streams, number: int) -> Latents:
        """One draw per row; of ``number`` walks of a pair, components have their shares."""
        pairs = len(streams.image) // number
        uniform = streams.uniform(0, _COMPONENT, (), torch.float64).view(number, pairs)[:1]
        place = (torch.arange(number, device=uniform.device)[:, None] + uniform) / number
        ends = self.log_weights.double().softmax(0).cumsum(0)[:-1]
        component = torch.bucketize(place.flatten().clamp(max=1 - 1e-6), ends, right=True)
        row = torch.arange(len(component), device=component.device)
        return {
            name: value[component, row]
            + self.scale[name][component, row]
            * streams.normal(k, _START, tuple(value.shape[2:]), value.dtype)
            for k, (name, value) in enumerate(self.loc.items())
        }


def _events(value: Tensor, like: Tensor) -> Tensor:
    """``(components, rows)`` with singleton dimensions appended."""
    return value.reshape(value.shape + (1,) * (like.dim() - 2))


def _sum_events(values: LatentsLike) -> Tensor:
    """Sums over sites and events, ``(components, rows)``."""
    return torch.stack([value[..., None].flatten(2).sum(2) for value in values.values()]).sum(0)


def _at(of: AnalysisBySynthesis, x: Tensor, classes: Tensor) -> tuple[VAE, Tensor]:
    """A VAE of images alone, bound to these classes, and the images."""
    given = one_hot(classes, of.num_classes).to(x.dtype)
    return program.at_images(of.vae, (x, given))


# --- Walks ----------------------------------------------------------------------------------------


_Energies: TypeAlias = Callable[[VAE, Tensor, _Pairs], program.ModelPotential]
"""The energy of pairs, from a VAE that is bound to their classes and from their images."""


def _within(reach: Ball | None) -> _Energies:
    """With the perturbation that serves every latent best."""
    return lambda vae, images, pairs: program.potential(vae, images, reach)


def _under_attack(ball: Linf, delta: float, slopes: Sequence[MeanSlopes]) -> _Energies:
    """With the attack that serves every latent best, which the right class must bear as well."""
    names = slopes[0].means
    means = {name: torch.cat([each.means[name] for each in slopes]) for name in names}
    return lambda vae, images, pairs: common_attack.potential(
        vae, images, ball, delta, {name: mean[pairs.image] for name, mean in means.items()}
    )


class _Walks:
    """Walks of pairs of an image and a class, in rows walk after walk."""

    def __init__(
        self,
        of: AnalysisBySynthesis,
        x: Tensor,
        pairs: _Pairs,
        energies: _Energies,
        seed: int,
    ) -> None:
        self.of, self.pairs = of, pairs
        self.vae, self.x = _at(of, x.detach()[pairs.image], pairs.classes)
        self.energy = energies(self.vae, self.x, pairs)
        self.base = of._base(self.x)
        self.streams = Streams(seed, pairs.image, pairs.classes)
        self.schedule = sigmoid_schedule(of.num_temperatures)

    def rise(self) -> annealed.WalkResult:
        """From a mixture to the target, which pilots have told where to look and how far to step.

        Pilots rise from the class's Gaussian; the mixture has it and a Gaussian around each of
        their ends.
        """
        start = self.x.new_full((self.of.num_temperatures - 1, len(self.x)), 0.3)
        wide = {name: value[None, self.pairs.classes] for name, value in self.base.loc.items()}
        scale = {name: value[None, self.pairs.classes] for name, value in self.base.scale.items()}
        self.mixture = wide, scale, self.x.new_zeros(1)
        pilot = self._rise(start, _PILOTS, self._seeded(3), self.base.metric, tune=True)
        ends = {n: lat.unfold(v, _PILOTS) for n, v in pilot.end.position.items()}
        narrow = {n: v.sqrt().expand_as(ends[n]) for n, v in self.base.at_target.items()}
        weights = self.x.new_tensor([_WIDE] + [(1 - _WIDE) / _PILOTS] * _PILOTS)
        self.mixture = (
            {name: torch.cat([value, ends[name]]) for name, value in wide.items()},
            {name: torch.cat([value, narrow[name]]) for name, value in scale.items()},
            weights.log(),
        )
        tuned = self._rise(start, _TUNING, self._seeded(4), self._metric, tune=True)
        self.sizes = lat.unfold(tuned.step_sizes.T, _TUNING).log().mean(0).exp().T
        return self._rise(self.sizes, self.of.num_walks, self._seeded(0), self._metric)

    def _metric(self, b: float) -> Latents:
        return self.base.at_target

    def _rise(
        self,
        sizes: Tensor,
        number: int,
        streams: Streams,
        metric: Callable[[float], Latents],
        tune: bool = False,
    ) -> annealed.WalkResult:
        rows = self._repeat(streams, number)
        target, base = self._densities(number)
        return annealed.walk(
            target, base, base.draw(rows, number), number, self.schedule, rows,
            sizes.repeat(1, number), self.of.num_steps, metric, tune=tune,
        )  # fmt: skip

    def fall(
        self, risen: annealed.WalkResult, number: int, slopes: MeanSlopes | None = None
    ) -> annealed.WalkResult:
        """Back to the mixture, from where rising walks have ended and gone on; counts slopes there
        in."""
        walks, pairs = self.of.num_walks, len(self.x)
        # Some at random: walks that were drawn anew are next to their copies.
        first = (self.streams.uniform(0, _CHOICE, (), torch.float64) * walks).long()
        apart = walks // number * torch.arange(number, device=first.device)[:, None]
        chosen = (first + apart).remainder(walks) * pairs
        chosen = (chosen + torch.arange(pairs, device=first.device)).flatten()
        target, base = self._densities(number)
        rows = self._repeat(self._seeded(1), number)
        point, size = risen.end.take(chosen), self.sizes[-1].repeat(number)
        draws = [risen.end.position]
        for step in range(self.of.num_temperatures // 2):
            point, _ = annealed.move(
                target, base, point, 1.0, step, rows, size, self.of.num_steps, self._metric(1.0)
            )
            draws.append(point.position)
        if slopes is not None:
            for each in draws:
                slopes.add(self.energy.constrain(each))
        return annealed.walk(
            target, base, point.position, number, self.schedule.flip(0),
            self._repeat(self._seeded(2), number), self.sizes.flip(0).repeat(1, number),
            self.of.num_steps, self._metric,
        )  # fmt: skip

    def differentiable(self, x: Tensor, risen: annealed.WalkResult) -> Tensor:
        """The log-masses, with their derivative in ``x`` if that is asked for."""
        if not (x.requires_grad and torch.is_grad_enabled()):
            return risen.log_mass
        number = self.of.num_walks
        images = x[self.pairs.image].to(self.x.dtype)
        energies = self.energy.at(images.repeat(number, 1, 1, 1))(lat.detach(risen.end.position))
        finite = torch.where(energies.isfinite(), energies, 0.0)
        mean = lat.unfold(finite, number).mean(0)
        return risen.log_mass - (mean - mean.detach())

    def _densities(self, number: int) -> tuple[program.ModelPotential, _Mixture]:
        """Energies of target and base, of rows that are copies of the pairs."""
        target = self.energy.at(self.x.repeat(number, 1, 1, 1))
        loc, scale, log_weights = self.mixture
        loc, scale = (
            {n: v.repeat(1, number, *(1,) * (v.dim() - 2)) for n, v in each.items()}
            for each in (loc, scale)
        )
        return target, _Mixture(loc, scale, log_weights)

    def _seeded(self, purpose: int) -> Streams:
        return self.streams._replace(seed=(self.streams.seed + purpose) % 2**64)

    def _repeat(self, streams: Streams, number: int) -> Streams:
        """Streams of so many walks of each pair: every class has chains of its own."""
        walk = torch.arange(number, device=streams.chain.device)
        chain = walk[:, None] * self.of.num_classes + streams.chain
        return Streams(streams.seed, streams.image.repeat(number), chain.flatten())


def _rate(risen: annealed.WalkResult, number: int) -> Tensor:
    """Mean acceptance rate of each pair's walks, ``(P,)``."""
    return lat.unfold(risen.acceptance_rate.mean(0), number).mean(0)
