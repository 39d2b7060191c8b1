r"""Attacks that see values of the objective only: Square and NES.

Square is a random search: a candidate changes the perturbation inside a random square to values on
the boundary of the ball, and is kept if the objective rises. The share of pixels a square covers
starts at ``share`` and is halved at the published iterations. For L_inf a square gets one of
:math:`\pm r` per channel; for L2 it takes its budget from a second square, which is zeroed, and
adds a pattern of two pyramids of opposite signs to what was there. It starts from vertical stripes
or, for L2, tiles of such patterns, unless it is told otherwise
(:mod:`~pyro_vae_defence.attacks.starts`). A random objective should have the same noise in all
queries, averaged over draws: candidates are compared with the best one so far, which fresh noise
would have favoured. :func:`pyro_vae_defence.attacks.adaptive.expected` makes such an objective.

NES estimates a gradient from antithetic Gaussian directions :math:`u_i`,

.. math:: \hat g = \frac{1}{2 \sigma n} \sum_{i=1}^{n}
   \bigl[\Delta(x + \sigma u_i) - \Delta(x - \sigma u_i)\bigr] u_i ,

and climbs along it as PGD does. Images it queries are clipped to [0, 1]; pairs of which one has no
finite value are left out of the mean.

References: Andriushchenko, Croce, Flammarion, Hein, "Square attack: a query-efficient black-box
adversarial attack via random search", ECCV 2020, https://arxiv.org/abs/1912.00049; Ilyas, Engstrom,
Athalye, Lin, "Black-box adversarial attacks with limited queries and information", ICML 2018,
https://arxiv.org/abs/1804.08598."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae_defence.attacks.base import (
    BLACK_BOX_PURPOSE,
    Attack,
    Problem,
    State,
    first_result,
    keep_best,
    random_signs,
)
from pyro_vae_defence.attacks.pgd import Ascent
from pyro_vae_defence.ops.balls import L2, Linf
from pyro_vae_defence.ops.checks import check_integer, check_positive, check_within
from pyro_vae_defence.ops.latents import rows
from pyro_vae_defence.types import Objective

# Iterations of 10,000 at which the share of changed pixels is halved (Square attack, section 3).
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square_share(share: float, t: int, num_steps: int) -> float:
    """Share of pixels that the square of step ``t`` covers.

    >>> [square_share(0.8, t, 10_000) for t in (0, 11, 51, 9_999)]
    [0.8, 0.4, 0.2, 0.0015625]
    """
    scaled = t * 10_000 // num_steps
    return share / 2 ** sum(scaled > halving for halving in _HALVINGS)


@dataclass(frozen=True)
class Square(Attack):
    """Random search over squares in an L_inf or L2 ball; one query per step.

    Args:
        share: share of pixels in the first squares, in (0, 1]; that of AutoAttack by default.
    """

    num_steps: int = 1000
    share: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.ball, (Linf, L2)):
            raise ValueError(f"Square needs an Linf or L2 ball, got {self.ball!r}; use NES for L1")
        check_within("share", self.share, "(0, 1]")

    def _start(self, problem: Problem) -> State:
        if self.start is not None:
            return first_result(problem.start())
        return first_result((_stripes if isinstance(self.ball, Linf) else _tiles)(problem))

    def _step(self, problem: Problem, state: State, t: int) -> State:
        candidate = state["result"]
        if t > 0:
            height, width = problem.x_ref.shape[-2:]
            side = round((square_share(self.share, t, self.num_steps) * height * width) ** 0.5)
            move = _linf_move if isinstance(self.ball, Linf) else _l2_move
            candidate = move(problem, candidate, side, t)
        return keep_best(state, candidate, problem.value(candidate))


@dataclass(frozen=True)
class NES(Ascent):
    """Ascent along estimated gradients; ``num_directions + 1`` queries per step.

    Args:
        num_directions: evaluations per estimate, even, >= 2: half as many directions, both ways.
        scale: standard deviation of the directions, in units of the image range.
    """

    num_directions: int = 50
    scale: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num_directions", self.num_directions)
        check_positive("scale", self.scale)
        if self.num_directions % 2:
            raise ValueError(f"num_directions must be even, got {self.num_directions!r}")

    def _direction(self, problem: Problem, state: State, t: int) -> tuple[Tensor, Tensor, State]:
        perturbation = state["perturbation"]
        shape, dtype = tuple(perturbation.shape[1:]), perturbation.dtype
        gradient = antithetic_gradient(
            lambda step: problem.value(perturbation + step),
            lambda i: problem.streams.normal(t, BLACK_BOX_PURPOSE + i, shape, dtype),
            self.num_directions // 2,
            self.scale,
        )
        gradient = torch.where(gradient.isfinite(), gradient, 0.0)
        return problem.value(perturbation), gradient, {}


def antithetic_gradient(
    value: Objective, direction: Callable[[int], Tensor], num_pairs: int, scale: float
) -> Tensor:
    """NES's estimate from ``value`` at ``2 num_pairs`` displacements, plus and minus ``scale``
    times the i-th standard normal ``direction`` of every row.

    Averaged over the pairs whose difference is finite; NaN where a row has none."""

    def part(i: int) -> tuple[Tensor, Tensor]:
        step = scale * direction(i)
        rise = value(step) - value(-step)
        seen = rise.isfinite()
        rise = torch.where(seen, rise, 0.0)
        return rows(rise, step) * step / (2 * scale**2 * num_pairs), seen

    total, count = part(0)
    for i in range(1, num_pairs):
        more, seen = part(i)
        total, count = total + more, count + seen.to(total)
    share = count.to(total) / num_pairs
    return total / rows(share, total)


# --- Square's moves -------------------------------------------------------------------------------


def _signs(problem: Problem, t: int, purpose: int, *shape: int) -> Tensor:
    return random_signs(problem.streams, t, purpose, shape, problem.x_ref.dtype)


def _window(problem: Problem, side: int, t: int, purpose: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random square: its mask ``(rows, 1, H, W)``, and pixels' places in it, clamped to it."""

    def along(length: int, purpose: int) -> tuple[Tensor, Tensor]:
        """Which of ``length`` places are in the square, and where in it they lie."""
        uniform = problem.streams.uniform(t, BLACK_BOX_PURPOSE + purpose, (), torch.float64)
        first = ((1.0 - uniform) * (length - side + 1)).long().clamp(max=length - side)
        place = torch.arange(length, device=first.device) - first[:, None]
        return (place >= 0) & (place < side), place.clamp(0, side - 1)

    height, width = problem.x_ref.shape[-2:]
    (rows_in, down), (columns_in, across) = along(height, purpose), along(width, purpose + 1)
    return (rows_in[:, :, None] & columns_in[:, None, :])[:, None], down, across


def _stripes(problem: Problem) -> Tensor:
    """The L_inf start: vertical stripes of +-r, one sign per channel and column."""
    channels, _, width = problem.x_ref.shape[1:]
    signs = _signs(problem, 0, 0, channels, 1, width)
    return problem.project((problem.ball.radius * signs).expand_as(problem.x_ref))


def _linf_move(problem: Problem, perturbation: Tensor, side: int, t: int) -> Tensor:
    side = min(max(side, 1), *problem.x_ref.shape[-2:])
    mask, _, _ = _window(problem, side, t, 1)
    signs = _signs(problem, t, 0, problem.x_ref.shape[1], 1, 1)
    return problem.project(torch.where(mask, problem.ball.radius * signs, perturbation))


def _pyramid(height: int, width: int, device: torch.device) -> Tensor:
    """Concentric rectangles whose values grow towards the centre (eq. 2 of the Square attack), not
    wider than high."""
    half = height // 2
    down = torch.arange(height, device=device)[:, None] - half
    across = torch.arange(width, device=device) - width // 2
    order = torch.arange(half + 1, dtype=torch.float64, device=device)
    terms = 1.0 / (half + 1 - order) ** 2
    return terms.cumsum(0)[half - torch.maximum(down.abs(), across.abs())]


def _pattern(side: int, like: Tensor) -> Tensor:
    """Two pyramids of opposite signs side by side, ``(side, side)``, of unit norm."""
    left, device = side // 2, like.device
    pattern = torch.cat([_pyramid(side, left, device), -_pyramid(side, side - left, device)], 1)
    return (pattern / pattern.norm()).to(like)


def _tiles(problem: Problem) -> Tensor:
    """The L2 start: patterns with random signs on a grid of about 5 x 5 tiles, on the sphere."""
    channels, height, width = problem.x_ref.shape[1:]
    side = max(min(height, width) // 5, 2)
    pattern = _pattern(side, problem.x_ref)
    repeats = (-(-height // side), -(-width // side))
    signs = _signs(problem, 0, 0, channels, *repeats)
    tiled = signs.repeat_interleave(side, 2).repeat_interleave(side, 3) * pattern.repeat(repeats)
    return _on_sphere(problem, tiled[..., :height, :width])


def _l2_move(problem: Problem, perturbation: Tensor, side: int, t: int) -> Tensor:
    channels, height, width = problem.x_ref.shape[1:]
    # An odd side of at least 3, as published, where the image has room for it.
    side = min(max(side, 3) | 1, height, width)
    mask, down, across = _window(problem, side, t, 1)
    other, _, _ = _window(problem, side, t, 3)
    signs = _signs(problem, t, 0, channels, 1, 1)

    pattern = _pattern(side, perturbation)
    # Transposed for every other row, at random.
    flip = _signs(problem, t, 5, 1, 1) > 0
    straight = pattern[down[:, :, None], across[:, None, :]]
    turned = pattern[across[:, None, :], down[:, :, None]]
    pattern = torch.where(flip, straight, turned)[:, None]

    def norm(values: Tensor, dims: tuple[int, ...] = (2, 3)) -> Tensor:
        return values.square().sum(dims, keepdim=True).sqrt()

    inside = torch.where(mask, perturbation, 0.0)
    both = torch.where(mask | other, perturbation, 0.0)
    unused = (problem.ball.radius**2 - norm(perturbation, (1, 2, 3)).square()).clamp(min=0.0)
    budget = (unused / channels + norm(both).square()).sqrt()
    added = torch.where(mask, signs * pattern, 0.0) + inside / norm(inside).clamp(min=1e-12)
    added = added / norm(added).clamp(min=1e-12) * budget
    changed = torch.where(mask, added, torch.where(other, 0.0, perturbation))
    return _on_sphere(problem, changed)


def _on_sphere(problem: Problem, perturbation: Tensor) -> Tensor:
    """Scale to the radius, then clip to the range of images."""
    norm = problem.ball.norm(perturbation).clamp(min=1e-12)
    return problem.project(rows(problem.ball.radius / norm, perturbation) * perturbation)
