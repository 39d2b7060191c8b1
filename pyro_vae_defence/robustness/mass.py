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

The inequality is proved; the two masses are *estimated*. Both walks are kept in their set of
latents, Hamiltonian moves out of it being rejected. *Rising* walks are sequential Monte Carlo from
a mixture of Gaussians, fitted to encodings of clean images of the classes and restricted to the
set, through inverse temperatures to the target; where the weights of an image's walks have become
too uneven, the walks are drawn anew by their weights. Such an estimate is the mass in expectation,
so its logarithm falls short of the mass's: the error is on the safe side for the right class, but
not for the others. *Falling* walks are therefore made as well, from where rising ones have ended
and gone on in the set for a while, back to the Gaussians: as far as these are draws from the
target, the logarithm of their estimate exceeds the mass's. The bound takes the rising walks for the
right class, and for the others whichever of the two says more. The difference of the two is how far
the masses are known.

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
from pyro_vae_defence.mcmc import annealed
from pyro_vae_defence.metrics.likelihood import sigmoid_schedule
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import class_scores, flatten_latents
from pyro_vae_defence.models.conditions import take
from pyro_vae_defence.models.contract import check_networks_on_device
from pyro_vae_defence.ops.balls import Ball, check_ball
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import check_integer, check_on_device
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import VAE, ImagesLike, Latents, LatentsLike

ROWS = 2000
"""Walks computed at once: some 200 MB for the paper's VAE."""

_BASE_DRAWS = 300  # draws of each class's Gaussian: where walks start
_PILOTS = 4  # clean images on which step sizes are tuned


class Masses(NamedTuple):
    """Estimates of the log-mass of a set around each image, ``(N,)`` each, in nats.

    Attributes:
        rising, falling: by rising and by falling walks.
        standard_error: of the rising ones; at most 1, which says that it is larger.
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
        wrong: masses of all others, in that of radius delta + epsilon.
    """

    epsilon: float
    delta: float
    right: Masses
    wrong: Masses

    @property
    def log_ratio(self) -> Tensor:
        """Log-mass of the right set less that of the wrong one, ``(N,)``, in nats: by rising walks
        less the larger of two estimates."""
        return self.right.rising - torch.maximum(self.wrong.rising, self.wrong.falling)

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
        """All estimates image by image, as JSON knows them."""
        found: dict[str, Any] = {"epsilon": self.epsilon, "delta": self.delta}
        found["log_ratio"] = self.log_ratio.tolist()
        for name, masses in (("right", self.right), ("wrong", self.wrong)):
            found[name] = {key: value.tolist() for key, value in masses._asdict().items()}
        return found


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
        vae: any Pyro VAE with a perturbation-aware posterior.
        classifier: latents ``(M, D)`` of all sites to scores ``(M, classes)``, which reads the
            guide's means.
        x: clean images ``(N, C, H, W)`` in [0, 1], or ``(x, *conditions)``.
        labels: their classes, int64 ``(N,)``.
        ball: where the attacker's perturbations live; its radius is epsilon.
        delta: radius of the ball of the same kind that the defender assumes, >= epsilon.
        clean_images: other images, such as 1,000 of the training set, whose encodings say where
            walks start; some of each class. No labels are needed.
        num_temperatures: steps of a walk, >= 3; more bring rising and falling walks together.
        num_steps: leapfrog steps per temperature, one gradient each.
        num_walks: rising walks per image and set, 2 or more.
        num_falling: falling walks per image and set.
        rows: walks computed at once: bounds the memory, not the result.
        generator: source of the seed; torch's global seed when ``None``.

    Raises:
        ValueError: if an argument does not fit, or hardly an encoding of ``clean_images`` is read
            as some class.
    """
    at_x, x = program.at_images(vae, x)
    at_clean, clean = program.at_images(vae, clean_images, name="clean_images")
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
    seed = draw_seed(generator)
    settings = _Settings(sigmoid_schedule(num_temperatures), num_steps, num_walks, num_falling)
    with program.evaluation_mode(vae), program.evaluation_mode(classifier):
        base = _Base.fit(at_clean, clean, classifier, seed)
        labels = _check_labels(labels, x, len(base.loc))
        # On clean images, so that no image's walk depends on who is beside it.
        few = slice(0, min(_PILOTS, len(clean)))
        pilots = _Walks(take(at_clean, few), clean[few], base.labels[few], classifier, base)
        streams = Streams.create(len(clean[few]), num_walks, seed=seed + 1, device=x.device)
        tuned = [
            pilots.tune(reach, outside, settings, streams)
            for reach, outside in ((right, False), (wrong, True))
        ]
        found = []
        size = max(1, rows // num_walks)
        for first in range(0, len(x), size):
            part = slice(first, first + size)
            walks = _Walks(take(at_x, part), x[part], labels[part], classifier, base)
            streams = Streams.create(
                len(x[part]), num_walks, seed=seed + 2, first_image=first, device=x.device
            )
            found.append(
                [
                    walks.masses(reach, outside, step_sizes, settings, streams)
                    for reach, outside, step_sizes in (
                        (right, False, tuned[0]),
                        (wrong, True, tuned[1]),
                    )
                ]
            )
    of_right, of_wrong = (
        Masses(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*found, strict=True)
    )
    return MassBound(ball.radius, float(delta), of_right, of_wrong)


def reaches(ball: Ball, delta: float) -> tuple[Ball | None, Ball]:
    """Balls around the clean image of radius delta - epsilon, ``None`` for 0, and delta + epsilon.

    Raises:
        ValueError: if delta is below epsilon, the radius of ``ball``, or the larger ball is none.
    """
    epsilon = ball.radius
    number = isinstance(delta, (int, float)) and not isinstance(delta, bool)
    if not number or not epsilon <= delta < math.inf:
        raise ValueError(
            f"delta must be a radius of at least the attacker's {epsilon:g}, got {delta!r}: from a "
            "smaller ball an attack leads out, and no mass can be promised"
        )
    kind = type(ball)
    return kind(delta - epsilon) if delta > epsilon else None, kind(delta + epsilon)


def _check_labels(labels: Tensor, x: Tensor, num_classes: int) -> Tensor:
    integers = isinstance(labels, Tensor) and not labels.is_floating_point()
    if not integers or labels.shape != x.shape[:1]:
        got = tuple(labels.shape) if isinstance(labels, Tensor) else labels
        raise ValueError(f"labels must be int64 classes of shape ({len(x)},), got {got!r}")
    check_on_device("labels", labels, "x", x.device)
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels must lie in 0..{num_classes - 1}, the classes of the classifier, got values "
            f"from {int(labels.min())} to {int(labels.max())}"
        )
    return labels.long()


class _Settings(NamedTuple):
    schedule: Tensor
    num_steps: int
    num_walks: int
    num_falling: int


# --- The sets, and where walks start --------------------------------------------------------------


def _reader(vae: VAE, x: Tensor, classifier: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Latents on their support to the classes read from the guide's means of their images."""
    decode = functools.partial(program.Decoder(vae, x), x=x)

    @torch.no_grad()
    def read(latents: LatentsLike) -> Tensor:
        classes: Tensor = classifier(flatten_latents(reencode(vae, latents, decode))).argmax(-1)
        return classes

    return read


class _Shapes(NamedTuple):
    """Unconstrained latents as vectors, and back."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

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
        away = flatten_latents(latents)[:, None] - self.loc
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
        labels: classes read from the clean images themselves, ``(M,)``.
    """

    loc: Tensor
    scale: Tensor
    draws: Tensor
    read: Tensor
    variance: Tensor
    labels: Tensor

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: VAE, x: Tensor, classifier: Callable[[Tensor], Tensor], seed: int) -> _Base:
        """To encodings of clean images."""
        scores = class_scores(classifier, program.posterior_mean(vae, x))
        energy, read = program.potential(vae, x), _reader(vae, x, classifier)
        shapes = _Shapes(tuple((site.name, site.shape) for site in energy.sites))
        streams = Streams.create(len(x), seed=seed, device=x.device)
        drawn = program.encode(vae, x, streams=streams)
        classes, encodings = read(drawn), flatten_latents(energy.check(energy.unconstrain(drawn)))
        metric = program.mean_posterior_variance(vae, [x], torch.Generator().manual_seed(seed))
        gaussians: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for number in range(scores.shape[-1]):
            own = encodings[classes == number]
            if len(own) < 2:
                raise ValueError(
                    f"clean_images holds {len(own)} images whose encodings are read as class "
                    f"{number}, and at least 2 are needed: pass more images of that class"
                )
            loc, scale = own.mean(0), own.std(0).clamp(min=1e-3)
            # As many at a time as there are clean images, whose conditions they take.
            chains = -(-_BASE_DRAWS // len(x))
            streams = Streams.create(len(x), chains, seed=seed, device=x.device)
            noise = streams.normal(0, number, tuple(loc.shape), loc.dtype)
            made = loc + scale * noise
            parts = made.split(len(x))
            found = torch.cat([read(energy.constrain(shapes.split(part))) for part in parts])
            gaussians.append((loc, scale, made, found))
        variance = flatten_latents({name: value[None] for name, value in metric.items()})[0]
        locs, scales, draws, reads = map(torch.stack, zip(*gaussians, strict=True))
        return cls(locs, scales, draws, reads, variance, scores.argmax(-1))

    def inside(self, labels: Tensor, outside: bool) -> Tensor:
        """Share of each class's draws that lie in the set of each row, ``(rows, classes)``."""
        read = self.read == labels[:, None, None]
        return (~read if outside else read).double().mean(-1)

    def log_weights(self, labels: Tensor, outside: bool) -> Tensor:
        """Of the mixture of each row, whose components, restricted to its set, are normalised."""
        number = len(self.loc)
        own = torch.nn.functional.one_hot(labels, number).bool()
        shares = self.inside(labels, outside)
        weights = (~own).double() / (number - 1) if outside else own.double()
        if bool(((shares == 0) & (weights > 0)).any()):
            raise ValueError(
                "no draw of a Gaussian fitted to the encodings of some class lies where it is "
                "wanted; see how the classifier reads decoded latents, or pass more clean_images"
            )
        return torch.where(weights > 0, (weights / shares).log(), -torch.inf).to(self.loc.dtype)

    def starts(self, labels: Tensor, outside: bool, streams: Streams, num_walks: int) -> Tensor:
        """A draw of each row's restricted mixture, ``(rows, D)``; walks of one image start in
        different classes in turn."""
        number = len(self.loc)
        uniform = streams.uniform(0, 3, (2,)).double().clamp(max=1 - 1e-9)
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
    """Walks of some images, each in the set of its label or outside it."""

    def __init__(
        self,
        vae: VAE,
        x: Tensor,
        labels: Tensor,
        classifier: Callable[[Tensor], Tensor],
        base: _Base,
    ) -> None:
        self.vae, self.x, self.labels, self.base = vae, x, labels, base
        self.read = _reader(vae, x, classifier)
        self.energy = program.potential(vae, x)
        self.shapes = _Shapes(tuple((site.name, site.shape) for site in self.energy.sites))

    def allowed(self, labels: Tensor, outside: bool) -> Callable[[Latents], Tensor]:
        """Whether latents lie in the set of their row."""
        return lambda z: (self.read(self.energy.constrain(z)) == labels) != outside

    def metric(self, b: float) -> Latents:
        """Variances between the Gaussians' and the guide's."""
        of_base = self.base.scale.square().mean(0)
        return self.shapes.split((1 / ((1 - b) / of_base + b / self.base.variance))[None])

    def densities(
        self, reach: Ball | None, outside: bool, labels: Tensor
    ) -> tuple[program.ModelPotential, _Mixture]:
        """Energies of target and base, of rows that are copies of the images."""
        copies = len(labels) // len(self.x)
        target = program.potential(self.vae, self.x.repeat(copies, 1, 1, 1), reach)
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
            step_sizes,
            settings.num_steps,
            self.metric,
            self.allowed(labels, outside),
            tune,
        )

    def tune(
        self, reach: Ball | None, outside: bool, settings: _Settings, streams: Streams
    ) -> Tensor:
        """A step size for each temperature, ``(K - 1,)``, the median over rows."""
        sizes = self.base.loc.new_full((len(settings.schedule) - 2,), 0.3)
        return self.rising(reach, outside, sizes, settings, streams, True).step_sizes.median(-1)[0]

    def masses(
        self,
        reach: Ball | None,
        outside: bool,
        step_sizes: Tensor,
        settings: _Settings,
        streams: Streams,
    ) -> Masses:
        """Both estimates of the log-mass of the set."""
        risen = self.rising(reach, outside, step_sizes, settings, streams)
        images, number = len(self.x), settings.num_falling
        # Of the walks, drawn anew by their weights, some at random.
        chosen = (streams.uniform(0, 4).view(-1, images)[:1] * settings.num_walks).long()
        chosen = (chosen + torch.arange(number, device=chosen.device)[:, None]).remainder(
            settings.num_walks
        )
        rows = (chosen * images + torch.arange(images, device=chosen.device)).flatten()
        labels = self.labels.repeat(number)
        target, base = self.densities(reach, outside, labels)
        allowed = self.allowed(labels, outside)
        streams = Streams(streams.seed + 1, streams.image[rows], rows // images)
        point, size = risen.end.take(rows), step_sizes[-1].expand(len(rows))
        for step in range(len(settings.schedule) // 4):
            point, _ = annealed.move(
                target, base, point, 1.0, step, streams, size, settings.num_steps,
                self.metric(1.0), allowed,
            )  # fmt: skip
        fallen = annealed.walk(
            target,
            base,
            point.position,
            number,
            settings.schedule.flip(0),
            streams._replace(seed=streams.seed + 1),
            step_sizes.flip(0),
            settings.num_steps,
            self.metric,
            allowed,
        )
        return Masses(
            risen.log_mass,
            fallen.log_mass,
            risen.variance.sqrt(),
            risen.effective,
            risen.acceptance_rate.mean(0).view(-1, images).mean(0),
        )
