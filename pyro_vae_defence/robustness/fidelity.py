r"""Fidelity: whether a gradient foretells what an attacker's step does to the expected objective.

A chain's end is no smooth function of the image. The derivative of one trajectory, its noise
frozen, may be exact and yet say nothing of a step of the size that attacks make; what an attacker
climbs is the expectation over the noise, :math:`J(x) = E[f(z)]`. So that is what a gradient is
compared with. For an image x, half-way to a random extreme point of the ball around its reference,
a direction d of norm 1 and a step h of half the ball's radius, which ends inside of it, let

.. math:: \Delta(d) = J(x + h d) - J(x - h d), \qquad p_e(d) = \langle g_e, 2 h d \rangle,

both ends clipped to [0, 1], and :math:`2 h d` their difference. The truth :math:`\Delta` is
estimated by common random numbers, the same streams of the defence at both ends, over many chains;
its standard error is the jackknife's over chains (where f is averaged, the usual one). The
prediction :math:`p_e` is made of the gradient :math:`g_e` of an estimator e, averaged over
as many calls as the checks' attacks have steps. The directions are every estimator's own, in which
an attack steps along :math:`g_e`, and random ones. A difference is *clear* if it is larger than
twice its standard error, and than rounding. Four numbers per estimator:

- *agreement*: the share of clear differences, over images and directions, of which :math:`p_e` has
  the sign. A prediction of zero has no sign, and is wrong. Chance: 1/2.
- *images*: of the images for most of whose clear differences the sign is right or wrong, those for
  which it is right. Chance: binomial, with probability 1/2, see below.
- *cosine*: of the angle between predictions and truths over directions,
  :math:`\sum_d p_e \Delta / \sqrt{\sum_d p_e^2 \sum_d \Delta^2}`, mean over images with a clear
  difference. 1 for a gradient of J, or of any increasing function of it, as far as steps are small
  and truths without noise, which lowers it. Chance: 0.
- *share*: :math:`\Delta(d_e)` along the estimator's own direction, summed over images, by that of
  the best estimator.

Chance is exact where errors of different images are independent. If a gradient knows nothing of the
truth, :math:`-g_e` is as likely as :math:`g_e`, image by image; and turning the sign of one turns
its own direction, all its agreements, and the sign of its cosine and increase, however the truths
of one image hang together. A gradient that is the same wrong one at *all* images, where truths are
alike, too (one class, one target), is one draw and not many, and passes more often: the sign of its
cosine and other classes tell. An estimator
*reaches the bar* if its agreement is at least 70%, and so many right images, or more, come by
chance with a probability of at most 1%: 7 of 7, 8 of 8, 14 of 16. That is the rate at which such
an estimator is accepted, hence at most K% for one of K. Fewer than 7 images with
clear differences decide nothing, and reach no bar.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence.attacks import adaptive, random_noise
from pyro_vae_defence.attacks.adaptive import PreparedGoal
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import Ball
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.robustness.scoring import Fresh
from pyro_vae_defence.robustness.suite import Candidate, Suite
from pyro_vae_defence.types import Latents, Objective

RANDOM_DIRECTIONS = 2
STEP = 0.5  # of the radius: what is left to the edge of the ball
LEAST_AGREEMENT, LARGEST_CHANCE = 0.7, 0.01


class Fidelity(NamedTuple):
    """That of one estimator's gradients, see the module's text.

    Attributes:
        agreement: in [0, 1]; ``None`` without a clear difference.
        right, images: images on which it is right, of those that decide.
        chance: probability of so many or more by chance.
        cosine: in [-1, 1]; ``None`` without a clear difference.
        share: of the best estimator's increase, at most 1; ``None`` if no estimator's is positive.
        reached: whether it reaches the bar.
    """

    agreement: float | None
    right: int
    images: int
    chance: float
    cosine: float | None
    share: float | None
    reached: bool

    def __str__(self) -> str:
        if self.agreement is None or self.cosine is None:
            return "no clear difference"
        share = "" if self.share is None else f", share {self.share:.2f}"
        return (
            f"agreement {self.agreement:.2f}, right on {self.right} of {self.images} images, "
            f"cosine {self.cosine:.2f}{share}"
        )


def measure(suite: Suite, found: Sequence[Candidate]) -> dict[str, Tensor]:
    """What fidelity is made of, image by image.

    Args:
        suite: of the images that are looked at.
        found: the gradient attacks, each with the number of draws it has averaged.

    Returns:
        Per attack ``NAME``, ``(N,)`` each: ``NAME/clear``, the number of clear differences,
        ``NAME/agree``, those of the right sign, ``NAME/cosine``, and ``NAME/rise``, the difference
        along its own direction.
    """
    budget, fresh, ball = suite.budget, suite.scorer.fresh, suite.ball
    # A stream of seeds of its own: the number of estimators changes nothing elsewhere.
    scorer = copy.copy(suite.scorer)
    scorer.fresh = Fresh(draw_seed(fresh()))
    own = dataclasses.replace(suite, scorer=scorer)
    streams = Streams.create(len(suite.x), generator=scorer.fresh(), device=suite.x.device)
    x = suite.x + 0.5 * (random_noise(suite.x, ball, fresh()) - suite.x)
    seed = draw_seed(fresh())
    gradients = {
        each.row.name: mean_gradient(
            own.objective(each.row, each.num_draws)(suite.x), x, budget.check_steps
        )
        for each in found
    }
    noise = [
        streams.normal(number, 0, tuple(x.shape[1:]), x.dtype)
        for number in range(RANDOM_DIRECTIONS)
    ]
    differences, limits, moves = [], [], []
    for direction in (*gradients.values(), *noise):
        step = STEP * ball.radius * unit_direction(ball, direction)
        ahead, behind = ((x + sign * step).clamp(0.0, 1.0) for sign in (1, -1))
        difference, limit = expected_difference(suite, ahead, behind, budget.check_draws, seed)
        differences.append(difference)
        limits.append(limit)
        moves.append(ahead - behind)
    truth, limit = torch.stack(differences), torch.stack(limits)
    truth = torch.where((truth + limit).isfinite(), truth, 0.0)  # an overflow says nothing
    clear = truth.abs() > limit
    values: dict[str, Tensor] = {}
    for number, (name, gradient) in enumerate(gradients.items()):
        predicted = torch.stack([(gradient * move).flatten(1).sum(1) for move in moves])
        values |= {
            f"{name}/clear": clear.sum(0),
            f"{name}/agree": (clear & (predicted.sign() * truth > 0)).sum(0),
            f"{name}/cosine": _cosine(predicted, truth),
            f"{name}/rise": truth[number],
        }
    return values


def mean_gradient(objective: Objective, x: Tensor, num_calls: int) -> Tensor:
    """Gradient of a prepared objective at images ``(N, C, H, W)``, mean over calls; what is not
    finite counts as zero."""
    total = torch.zeros_like(x)
    for _ in range(num_calls):
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(objective(leaf).sum(), leaf)
        total += torch.where(gradient.isfinite(), gradient, 0.0)
    return total / num_calls


def unit_direction(ball: Ball, gradient: Tensor) -> Tensor:
    """In which attacks in a ball step, of norm 1 there; zero where the gradient is."""
    direction = ball.step_direction(gradient)
    norm = ball.norm(direction)
    return direction / lat.rows(torch.where(norm > 0, norm, 1.0), direction)


@torch.no_grad()
def expected_difference(
    suite: Suite, ahead: Tensor, behind: Tensor, num_draws: int, seed: int
) -> tuple[Tensor, Tensor]:
    """What the defence makes of the goal's expectation at images ``ahead`` less that at ``behind``,
    ``(N,)``, and twice the standard error, or what rounding may have made of it.

    Both see the same noise, that of ``num_draws`` >= 2 chains with this ``seed``. Against a defence
    that averages latents the goal is that at their mean. Where the seed of the defence is known,
    there is one noise, its own, and no error but rounding.
    """
    goal = suite.goal()
    if suite.known_draws:
        prepared = adaptive.expected(
            suite.seen.forwards(), goal, *suite.known_draws, **suite.options()
        )
        objective = prepared(suite.x)
        first, second = objective(ahead), objective(behind)
        return first - second, _rounding(first, second)
    (first, first_without), (second, second_without) = (
        _with_and_without(
            _ends(suite, x, num_draws, seed), x, goal, suite.x, num_draws, suite.of_mean
        )
        for x in (ahead, behind)
    )
    without = first_without - second_without
    error = ((num_draws - 1) * without.var(0, correction=0)).sqrt()
    return first - second, torch.maximum(2 * error, _rounding(first, second))


def _rounding(first: Tensor, second: Tensor) -> Tensor:
    """What rounding may have made of a difference."""
    return 100 * torch.finfo(first.dtype).eps * (1 + torch.maximum(first.abs(), second.abs()))


def _ends(suite: Suite, x: Tensor, num_draws: int, seed: int) -> Latents:
    """Where the defence ends, draw after draw, with independent noise in each."""
    encode = suite.box.forwards()
    if suite.box.steps or not suite.box.has_chain:
        streams = Streams.create(len(x), num_draws, seed=seed, device=x.device)
        return encode(x.repeat(num_draws, 1, 1, 1), streams)
    # Another defence may draw one noise for all images of a call.
    ends = [
        encode(x, Streams.create(len(x), seed=(seed + number) % 2**63, device=x.device))
        for number in range(num_draws)
    ]
    return {name: torch.cat([each[name] for each in ends]) for name in ends[0]}


def _with_and_without(
    latents: Latents,
    x: Tensor,
    goal: PreparedGoal,
    x_ref: Tensor,
    num_draws: int,
    of_mean: bool | adaptive.Scale,
) -> tuple[Tensor, Tensor]:
    """The goal's expectation from all draws, ``(N,)``, and without each of them, ``(draws, N)``."""
    copies, images = goal(x_ref.repeat(num_draws, 1, 1, 1)), x.repeat(num_draws, 1, 1, 1)
    if not of_mean:
        values = lat.unfold(copies(latents, images), num_draws)
        mean = values.mean(0)
        return mean, mean + (mean - values) / (num_draws - 1)
    to, back = adaptive.scale_of(of_mean)
    draws = {name: lat.unfold(value, num_draws) for name, value in to(latents).items()}
    means = {name: value.mean(0) for name, value in draws.items()}
    # Not the mean less a part of each, which may leave a support by rounding.
    others = {
        name: torch.cat([torch.cat([z[:k], z[k + 1 :]]).mean(0) for k in range(num_draws)])
        for name, z in draws.items()
    }
    return goal(x_ref)(back(means), x), lat.unfold(copies(back(others), images), num_draws)


def _cosine(predicted: Tensor, truth: Tensor) -> Tensor:
    """Over directions, the first dimension; zero where either is."""
    # Gradients of any size: their squares may leave the range of numbers.
    predicted, truth = (
        each / torch.where(each.abs().amax(0) > 0, each.abs().amax(0), 1.0)
        for each in (predicted, truth)
    )
    norm = (predicted.square().sum(0) * truth.square().sum(0)).sqrt()
    return (predicted * truth).sum(0) / torch.where(norm > 0, norm, 1.0)


def estimators(values: Mapping[str, Tensor]) -> dict[str, Fidelity]:
    """The fidelity of each estimator, by name, from what :func:`measure` found."""
    names = dict.fromkeys(name.partition("/")[0] for name in values)
    rises = {name: float(values[f"{name}/rise"].double().mean()) for name in names}
    best = max(rises.values(), default=0.0)
    return {
        name: _fidelity(
            values[f"{name}/clear"],
            values[f"{name}/agree"],
            values[f"{name}/cosine"],
            rises[name] / best if best > 0 else None,
        )
        for name in names
    }


def _fidelity(clear: Tensor, agree: Tensor, cosine: Tensor, share: float | None) -> Fidelity:
    right, wrong = int((2 * agree > clear).sum()), int((2 * agree < clear).sum())
    images, total = right + wrong, int(clear.sum())
    chance = sum(math.comb(images, k) for k in range(right, images + 1)) / 2**images
    agreement = int(agree.sum()) / total if total else None
    reached = (agreement or 0.0) >= LEAST_AGREEMENT and chance <= LARGEST_CHANCE
    mean = float(cosine[clear > 0].double().mean()) if total else None
    return Fidelity(agreement, right, images, chance, mean, share, reached)
