r"""How much posterior mass any attack can take from the right class: a bound without an attack.

The energy of the perturbation-aware posterior is a minimum over images in reach of the one that is
seen. For an attack :math:`\|x^a - x^r\| \le \epsilon \le \delta`, an image within :math:`\delta` of
:math:`x^a` is within :math:`\delta + \epsilon` of :math:`x^r`, and one within :math:`\delta -
\epsilon` of :math:`x^r` is within :math:`\delta` of :math:`x^a`. Hence for every z

.. math:: U_{\delta+\epsilon}(z; x^r) \le U_\delta(z; x^a) \le U_{\delta-\epsilon}(z; x^r).

Let a draw z have the class that the classifier reads from the guide's mean of the decoded draw, A
be the set of latents of class y, and :math:`M_A^r(x) = \int_A e^{-U_r(z; x)}\,dz`. Then the share
of draws of class y, under *every* attack in the ball, is at least

.. math::
    P_\delta(A \mid x^a) \ge \frac{1}{1 + M_{\neg A}^{\delta+\epsilon}(x^r)
    / M_A^{\delta-\epsilon}(x^r)},

which is a function of the clean image alone. Where it exceeds one half, the majority of draws
(``reading="vote"``) keeps class y.

The two sides are those of two attacks, one that hurts each latent of A and one that serves each of
the others. For likelihoods of which :mod:`pyro_vae_defence.models.common_attack` knows how, the
mass of the others is therefore that under attacks which A must bear as well: a smaller one, and a
better bound.

The inequality is proved; the two masses are *estimated*. Both walks are kept in their set of
latents, at whose border they bounce (:mod:`~pyro_vae_defence.mcmc.bouncing`): most of a set's mass
may lie there, which walks that are merely rejected outside are slow to find. *Rising* walks are
sequential Monte Carlo from a mixture of Gaussians, fitted to encodings of clean images of the
classes and restricted to the set, through inverse temperatures to the target; where the weights of
an image's walks have become too uneven, the walks are drawn anew by their weights. Such an estimate
is the mass in expectation, so its logarithm falls short of the mass's: the error is on the safe
side for the right class, but not for the others. *Falling* walks are therefore made as well, from
where rising ones have ended and gone on in the set for a while, back to the Gaussians: as far as
these are draws from the target, the logarithm of their estimate exceeds the mass's. The bound takes
the less favourable of the two for either set. Their difference is how far the masses are known.

It is a bound for exact inference, and not for a chain of finite length; that no walk has overlooked
a region of large mass is not proved. Estimated, not certified. The perturbation-aware energy must
be exact, or the inequality does not hold; :mod:`pyro_vae_defence.models.perturbation` says for
which likelihoods it is.

Del Moral, Doucet, Jasra, "Sequential Monte Carlo samplers", 2006,
https://doi.org/10.1111/j.1467-9868.2006.00553.x. Grosse, Ghahramani, Adams, "Sandwiching the
marginal likelihood using bidirectional Monte Carlo", 2015, https://arxiv.org/abs/1511.02543. Lee,
Whiteley, "Variance estimation in the particle filter", 2018, https://arxiv.org/abs/1509.00394 (the
standard error).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence.defence.classifier import reencode
from pyro_vae_defence.mcmc import annealed, bouncing
from pyro_vae_defence.models import common_attack, program
from pyro_vae_defence.models.classifier import class_margin, class_scores, flatten_latents
from pyro_vae_defence.models.conditions import BoundVAE
from pyro_vae_defence.models.contract import check_networks_on_device
from pyro_vae_defence.models.enumeration import enumerable
from pyro_vae_defence.models.sites import get_trace
from pyro_vae_defence.ops.balls import Ball, Linf, check_ball, reaches
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.files import as_json
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.robustness.evaluate import check_labels
from pyro_vae_defence.types import VAE, ImagesLike, Latents, LatentsLike

ROWS = 2000
"""Walks computed at once: some 200 MB for the paper's VAE."""

_BASE_DRAWS = 300  # draws of each class's Gaussian: where walks start
_LEAST_DRAWS = 30  # of these in a set, below which their share is not known well enough
_LEAST_SCALE = 1e-3  # of a Gaussian, for a guide that has no variance
_STEP_SIZE = 0.3  # which tuning begins with
# Of inverse temperatures: rising and falling walks part at small ones, and hardly above 0.8.
_POWER = 3
_START, _CHOICE = 3, 4  # purposes of the streams, beside those of HMC and of redrawing
_TUNING = 4  # walks of each image and set that tune step sizes


class Masses(NamedTuple):
    """Estimates of the log-mass of a set around each image, ``(N,)`` each, in nats.

    Attributes:
        rising, falling: by rising and by falling walks.
        standard_error: of the rising ones; 1 and more says that it is larger. It has the error of
            the Gaussians' shares in the set, which both walks have in common.
        effective: effective number of rising walks at the end.
        acceptance_rate: of the rising walks' moves.
    """

    rising: Tensor
    falling: Tensor
    standard_error: Tensor
    effective: Tensor
    acceptance_rate: Tensor

    @property
    def gap(self) -> Tensor:
        """What falling walks say more than rising ones: near 0 the mass is known."""
        return self.falling - self.rising


@dataclass(frozen=True)
class MassBound:
    """Masses around clean images, and what they promise under any attack, for exact inference.

    All figures are estimates. Masses are relative to one factor common to all.

    Attributes:
        epsilon, delta: radii of the attacker's and of the defender's ball.
        right: masses of the latents read as the label, in the ball of radius delta - epsilon.
        wrong: masses of all others, in that of radius delta + epsilon, or what of them one attack
            for both sets leaves.
        common_attack: whether it is one attack for both.
    """

    epsilon: float
    delta: float
    right: Masses
    wrong: Masses
    common_attack: bool

    @property
    def log_ratio(self) -> Tensor:
        """Log-mass of the right set less that of the wrong one, ``(N,)``, in nats: the smaller
        estimate of the first less the larger of the second; -inf where no walk has found a mass."""
        right = torch.minimum(self.right.rising, self.right.falling)
        wrong = torch.maximum(self.wrong.rising, self.wrong.falling)
        known = right.isfinite() & self.wrong.rising.isfinite() & self.wrong.falling.isfinite()
        return torch.where(known, right - wrong, -torch.inf)

    @property
    def standard_error(self) -> Tensor:
        """Of the log-ratio, by the spread of weights of rising walks, ``(N,)``, in nats; 1 and more
        says only that it is larger."""
        return (self.right.standard_error.square() + self.wrong.standard_error.square()).sqrt()

    @property
    def probability(self) -> Tensor:
        """Share of draws of the right class that no attack takes, ``(N,)``."""
        return self.log_ratio.sigmoid()

    @property
    def vote(self) -> Tensor:
        """Whether most draws keep the right class under any attack, bool ``(N,)``."""
        return self.log_ratio > 0

    def to_dict(self) -> dict[str, Any]:
        """All estimates image by image, as JSON knows them: ``None`` where no walk has found a mass
        (the log-ratio is then -inf)."""
        found: dict[str, Any] = {"epsilon": self.epsilon, "delta": self.delta}
        found["common_attack"] = self.common_attack
        found["log_ratio"] = self.log_ratio.tolist()
        for name, masses in (("right", self.right), ("wrong", self.wrong)):
            found[name] = {key: value.tolist() for key, value in masses._asdict().items()}
        plain: dict[str, Any] = as_json(found)
        return plain


@public
def mass_bound(
    vae: VAE,
    classifier: Callable[[Tensor], Tensor],
    x: ImagesLike,
    labels: Tensor,
    ball: Ball,
    delta: float,
    clean_images: ImagesLike,
    *,
    num_temperatures: int = 100,
    num_steps: int = 5,
    num_walks: int = 8,
    num_falling: int = 2,
    rows: int = ROWS,
    generator: torch.Generator | None = None,
) -> MassBound:
    """Estimate the share of draws of the right class that no attack within ``ball`` can take.

    Args:
        vae: any Pyro VAE with a perturbation-aware posterior, without discrete latents and without
            conditions.
        classifier: latents ``(M, D)`` of all sites to scores ``(M, classes)``, which reads the
            guide's means.
        x: clean images ``(N, C, H, W)`` in [0, 1].
        labels: their classes, int64 ``(N,)``.
        ball: where the attacker's perturbations live; its radius is epsilon.
        delta: radius of the ball of the same kind that the defender assumes, >= epsilon.
        clean_images: other images, such as 1,000 of the training set, whose encodings say where
            walks start; some of each class. No labels are needed.
        num_temperatures: of a walk, both ends included, >= 3; more bring rising and falling walks
            together.
        num_steps: leapfrog steps per temperature, one gradient each.
        num_walks: rising walks per image and set, 2 or more.
        num_falling: falling walks per image and set, at most ``num_walks``.
        rows: walks computed at once: bounds the memory, not the result.
        generator: source of the seed; torch's global seed when ``None``.

    Raises:
        ValueError: if an argument does not fit, or hardly an encoding of ``clean_images`` is read
            as some class.
    """
    at_x, x = program.at_images(vae, x)
    _, clean = program.at_images(vae, clean_images, name="clean_images")
    if isinstance(at_x, BoundVAE) or isinstance(clean_images, tuple):
        raise ValueError(
            "vae is conditional: latents are then read by each image's own condition, for which no "
            "bound is known here"
        )
    if enumerable(get_trace(vae.model, x[:1])):
        raise ValueError(
            "vae has discrete latents: a decoded image then depends on the one that was attacked, "
            "and so does the class that is read, for which no bound is known"
        )
    check_networks_on_device("classifier", classifier, "x", x)
    right, wrong = reaches(check_ball(ball), delta)
    for name, value, least in (
        ("num_temperatures", num_temperatures, 3),
        ("num_steps", num_steps, 1),
        ("num_walks", num_walks, 2),
        ("num_falling", num_falling, 1),
        ("rows", rows, 1),
    ):
        check_integer(name, value, least)
    if num_falling > num_walks:
        raise ValueError(f"num_falling={num_falling} must be at most num_walks={num_walks}")
    found = check_labels(labels, x, classifier)
    if found is None:
        raise ValueError("labels must be the classes of x, got None")
    seed = draw_seed(generator)
    grid = torch.linspace(0, 1, num_temperatures, dtype=torch.float32, device="cpu")
    settings = _Settings(grid**_POWER, num_steps, num_walks, num_falling)
    with program.evaluation_mode(vae), program.evaluation_mode(classifier):
        attack = None
        if isinstance(ball, Linf) and common_attack.is_known(vae, x[:1], ball):
            attack = ball, float(delta)
        base = _Base.fit(vae, clean, classifier, found, seed)
        # A set has four seeds of its own.
        sets = [(right, False, seed + 1), (wrong, True, seed + 5)]
        parts: list[list[Masses]] = [[], []]
        size = max(1, rows // num_walks)
        for first in range(0, len(x), size):
            part = slice(first, first + size)
            walks = _Walks(vae, x[part], found[part], classifier, base, attack)
            for number, (reach, outside, own) in enumerate(sets):
                streams = Streams.create(
                    len(x[part]), num_walks, seed=own, first_image=first, device=x.device
                )
                masses = walks.masses(reach, outside, settings, streams)
                parts[number].append(masses)
    of_right, of_wrong = (Masses(*map(torch.cat, zip(*each, strict=True))) for each in parts)
    return MassBound(ball.radius, float(delta), of_right, of_wrong, attack is not None)


class _Settings(NamedTuple):
    schedule: Tensor
    num_steps: int
    num_walks: int
    num_falling: int


# --- The sets, and where walks start --------------------------------------------------------------


def _scorer(vae: VAE, x: Tensor, classifier: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Latents on their support to the classifier's scores of the guide's means of their images."""
    decode = functools.partial(program.Decoder(vae, x), x=x)
    return lambda latents: class_scores(classifier, reencode(vae, latents, decode))


@torch.no_grad()
def _read(scorer: Callable[..., Tensor], latents: LatentsLike) -> Tensor:
    """The classes of the highest scores."""
    return scorer(latents).argmax(-1)


class _Shapes(NamedTuple):
    """Unconstrained latents as vectors, sites in the model's order, and back."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, energy: program.ModelPotential) -> _Shapes:
        """Those of a model."""
        return cls(tuple((site.name, site.shape) for site in energy.sites))

    def join(self, latents: LatentsLike) -> Tensor:
        """Site -> ``(N, *event)`` to ``(N, D)``."""
        return flatten_latents({name: latents[name] for name, _ in self.shapes})

    def split(self, flat: Tensor) -> Latents:
        """``(N, D)`` to site -> ``(N, *event)``."""
        parts = flat.split([math.prod(shape) for _, shape in self.shapes], 1)
        return {
            name: part.reshape(len(part), *shape)
            for (name, shape), part in zip(self.shapes, parts, strict=True)
        }


class _Mixture:
    """Energy -log q of a mixture of Gaussians, with log-weights ``(rows, classes)``."""

    def __init__(self, loc: Tensor, scale: Tensor, log_weights: Tensor, shapes: _Shapes) -> None:
        self.loc, self.precision, self.shapes = loc, scale**-2, shapes
        constant = scale.log().sum(-1) + 0.5 * math.log(2 * math.pi) * loc.shape[1]
        self.log_weights = log_weights - constant

    def __call__(self, latents: LatentsLike) -> Tensor:
        return self.energy_and_gradient(latents)[0]

    def energy_and_gradient(self, latents: LatentsLike) -> tuple[Tensor, Latents]:
        away = self.shapes.join(latents)[:, None] - self.loc
        pull = away * self.precision
        log_q = self.log_weights - 0.5 * (away * pull).sum(-1)
        force = (log_q.softmax(-1)[..., None] * pull).sum(1)
        return -log_q.logsumexp(-1), self.shapes.split(force)


class _Base(NamedTuple):
    """A Gaussian per class on the unconstrained scale, fitted to encodings of clean images.

    Attributes:
        loc, scale: ``(classes, D)``.
        draws: from them, ``(classes, draws, D)``.
        read: the classes these are read as, ``(classes, draws)``.
        variance: the guide's, the metric at the target, ``(D,)``.
    """

    loc: Tensor
    scale: Tensor
    draws: Tensor
    read: Tensor
    variance: Tensor

    @classmethod
    @torch.no_grad()
    def fit(
        cls, vae: VAE, x: Tensor, classifier: Callable[[Tensor], Tensor], labels: Tensor, seed: int
    ) -> _Base:
        """To encodings of clean images ``x``, for the sets of ``labels``."""
        scores = class_scores(classifier, program.posterior_mean(vae, x))
        number = scores.shape[-1]
        if not 0 <= int(labels.min()) <= int(labels.max()) < number or number < 2:
            raise ValueError(
                f"labels must lie in 0..{number - 1}, the classes of the classifier, of which two "
                f"or more are needed, got values from {int(labels.min())} to {int(labels.max())}"
            )
        energy, scorer = program.potential(vae, x), _scorer(vae, x, classifier)
        shapes = _Shapes.of(energy)
        drawn = program.encode(vae, x, streams=Streams.create(len(x), seed=seed, device=x.device))
        classes = _read(scorer, drawn)
        encodings = shapes.join(energy.check(energy.unconstrain(drawn)))
        metric = program.mean_posterior_variance(vae, [x], torch.Generator().manual_seed(seed))
        variance = shapes.join({name: value[None] for name, value in metric.items()})[0]
        streams = Streams.create(_BASE_DRAWS, seed=seed, device=x.device)
        scorer = _scorer(vae, x[:1].expand(_BASE_DRAWS, -1, -1, -1), classifier)
        gaussians: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for each in range(number):
            own = encodings[classes == each]
            if len(own) < 2:
                raise ValueError(
                    f"clean_images holds {len(own)} images whose encodings are read as class "
                    f"{each}, and at least 2 are needed: pass more images of that class"
                )
            loc, scale = own.mean(0), own.std(0).clamp(min=_LEAST_SCALE)
            made = loc + scale * streams.normal(each, _START, tuple(loc.shape), loc.dtype)
            found = _read(scorer, energy.constrain(shapes.split(made)))
            gaussians.append((loc, scale, made, found))
        locs, scales, draws, reads = map(torch.stack, zip(*gaussians, strict=True))
        variance = variance.clamp(min=_LEAST_SCALE**2)
        base = cls(locs, scales, draws, reads, variance)
        base._check_sets(labels.unique())
        return base

    def _check_sets(self, labels: Tensor) -> None:
        """Refuse sets of which too few draws are at hand to know their share."""
        for outside in (False, True):
            shares, weights = self.shares(labels, outside), self.weights(labels, outside)
            few = (shares * _BASE_DRAWS < _LEAST_DRAWS) & (weights > 0)
            if bool(few.any()):
                row, component = few.nonzero()[0].tolist()
                where = "outside the class" if outside else "in the class"
                raise ValueError(
                    f"less than {_LEAST_DRAWS} of {_BASE_DRAWS} draws of the Gaussian fitted to "
                    f"encodings of class {component} lie {where} {int(labels[row])}; see how the "
                    "classifier reads decoded latents, or pass more clean_images"
                )

    def shares(self, labels: Tensor, outside: bool) -> Tensor:
        """Share of each class's draws that lie in the set of each row, ``(rows, classes)``."""
        table = torch.nn.functional.one_hot(self.read, len(self.loc)).double().mean(1)
        inside = table.T[labels]
        return 1 - inside if outside else inside

    def weights(self, labels: Tensor, outside: bool) -> Tensor:
        """Of the components of each row's mixture, ``(rows, classes)``."""
        own = torch.nn.functional.one_hot(labels, len(self.loc)).double()
        return (1 - own) / (len(self.loc) - 1) if outside else own

    def log_weights(self, labels: Tensor, outside: bool) -> Tensor:
        """Their logarithms, where a component is normalised in the row's set."""
        weights = self.weights(labels, outside)
        normalised = weights / self.shares(labels, outside)
        return torch.where(weights > 0, normalised.log(), -torch.inf).to(self.loc.dtype)

    def variance_of_shares(self, labels: Tensor, outside: bool) -> Tensor:
        """What not knowing the shares exactly adds to the relative variance of a mass, ``(N,)``,
        were all components to matter alike."""
        shares, weights = self.shares(labels, outside), self.weights(labels, outside)
        each = torch.where(weights > 0, (1 - shares) / (shares * _BASE_DRAWS), 0.0)
        return (weights.square() * each).sum(-1).to(self.loc.dtype)

    def starts(self, labels: Tensor, outside: bool, streams: Streams, num_walks: int) -> Tensor:
        """A draw of each row's restricted mixture, ``(rows, D)``; walks of one image start in
        different classes in turn."""
        number = len(self.loc)
        uniform = streams.uniform(0, _START, (2,), torch.float64)
        component = labels
        if outside:
            turn = (uniform[:, 0].view(num_walks, -1)[:1] * (number - 1)).long()
            turn = turn + torch.arange(num_walks, device=turn.device)[:, None]
            component = (labels + 1 + turn.flatten() % (number - 1)) % number
        eligible = self.read[component] == labels[:, None]
        eligible = ~eligible if outside else eligible
        wanted = (uniform[:, 1] * eligible.sum(-1)).long() + 1
        place = (eligible.cumsum(-1) == wanted[:, None]).double().argmax(-1)
        return self.draws[component, place]


# --- Walks ----------------------------------------------------------------------------------------


class _Walks:
    """Walks of some images, each in the set of its label or outside it.

    With an ``attack``, those in the set come first: those outside are under the same attack.
    """

    def __init__(
        self,
        vae: VAE,
        x: Tensor,
        labels: Tensor,
        classifier: Callable[[Tensor], Tensor],
        base: _Base,
        attack: tuple[Linf, float] | None = None,
    ) -> None:
        self.vae, self.x, self.labels, self.base, self.attack = vae, x, labels, base, attack
        self.slopes = None if attack is None else common_attack.MeanSlopes(vae, x)
        self.scorer = _scorer(vae, x, classifier)
        self.energy = program.potential(vae, x)
        self.shapes = _Shapes.of(self.energy)

    def margin(self, labels: Tensor, outside: bool) -> bouncing.Margin:
        """Score of the label less the highest other one, or the other way around."""

        def margin(latents: Latents, rows: Tensor) -> Tensor:
            lead = class_margin(self.scorer(self.energy.constrain(latents)), labels[rows])
            return -lead if outside else lead

        return margin

    def metric(self, b: float) -> Latents:
        """Variances between the Gaussians' and the guide's."""
        of_base = self.base.scale.square().mean(0)
        return self.shapes.split((1 / ((1 - b) / of_base + b / self.base.variance))[None])

    def densities(
        self, reach: Ball | None, outside: bool, labels: Tensor
    ) -> tuple[program.ModelPotential, _Mixture]:
        """Energies of target and base, of rows that are copies of the images."""
        x = self.x.repeat(len(labels) // len(self.x), 1, 1, 1)
        if outside and self.attack is not None and self.slopes is not None:
            target = common_attack.potential(self.vae, x, *self.attack, self.slopes.means)
        else:
            target = program.potential(self.vae, x, reach)
        weights = self.base.log_weights(labels, outside)
        return target, _Mixture(self.base.loc, self.base.scale, weights, self.shapes)

    def rising(
        self,
        reach: Ball | None,
        outside: bool,
        step_sizes: Tensor,
        settings: _Settings,
        streams: Streams,
        tune: bool = False,
    ) -> annealed.WalkResult:
        """From the Gaussians to the target."""
        number = settings.num_walks
        labels = self.labels.repeat(number)
        start = self.shapes.split(self.base.starts(labels, outside, streams, number))
        return annealed.walk(
            *self.densities(reach, outside, labels),
            start,
            number,
            settings.schedule,
            streams,
            step_sizes.repeat(1, number),
            settings.num_steps,
            self.metric,
            self.margin(labels, outside),
            tune,
        )

    def tune(
        self, reach: Ball | None, outside: bool, settings: _Settings, streams: Streams
    ) -> Tensor:
        """Step sizes of each temperature and image, ``(K - 1, N)``, on walks of their own."""
        number, images = min(_TUNING, settings.num_walks), len(self.x)
        first = slice(0, number * images)
        own = Streams(streams.seed + 3, streams.image[first], streams.chain[first])
        sizes = self.base.loc.new_full((len(settings.schedule) - 2, images), _STEP_SIZE)
        few = settings._replace(num_walks=number)
        tuned = self.rising(reach, outside, sizes, few, own, True).step_sizes
        return tuned.unflatten(1, (number, images)).log().mean(1).exp()

    def masses(
        self, reach: Ball | None, outside: bool, settings: _Settings, streams: Streams
    ) -> Masses:
        """Both estimates of the log-mass of the set."""
        step_sizes = self.tune(reach, outside, settings, streams)
        risen = self.rising(reach, outside, step_sizes, settings, streams)
        images, number = len(self.x), settings.num_falling
        draws = [risen.end.position]
        # Of the walks, drawn anew by their weights, some at random: neighbours may be copies.
        uniform = streams.uniform(0, _CHOICE, (), torch.float64).view(-1, images)[:1]
        first = (uniform * settings.num_walks).long()
        apart = settings.num_walks // number * torch.arange(number, device=first.device)
        chosen = (first + apart[:, None]).remainder(settings.num_walks)
        rows = (chosen * images + torch.arange(images, device=chosen.device)).flatten()
        labels = self.labels.repeat(number)
        target, base = self.densities(reach, outside, labels)
        margin = self.margin(labels, outside)
        streams = Streams(streams.seed + 1, streams.image[rows], rows // images)
        point, size = risen.end.take(rows), step_sizes[-1].repeat(number)
        for step in range(len(settings.schedule) // 4):
            point, _ = annealed.move(
                target, base, point, 1.0, step, streams, size, settings.num_steps,
                self.metric(1.0), margin,
            )  # fmt: skip
            draws.append(point.position)
        if self.slopes is not None and not outside:
            for each in draws:
                self.slopes.add(self.energy.constrain(each))
        fallen = annealed.walk(
            target,
            base,
            point.position,
            number,
            settings.schedule.flip(0),
            streams._replace(seed=streams.seed + 1),
            step_sizes.flip(0).repeat(1, number),
            settings.num_steps,
            self.metric,
            margin,
        )
        return Masses(
            risen.log_mass,
            fallen.log_mass,
            (risen.variance + self.base.variance_of_shares(self.labels, outside)).sqrt(),
            risen.effective,
            risen.acceptance_rate.mean(0).view(-1, images).mean(0),
        )
