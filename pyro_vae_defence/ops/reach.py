r"""Optimisation over what lies in reach of an image: the ball around it, cut with the valid range.

Two problems over :math:`R(x) = \{x' : \|x' - x\|_p \le r,\; 0 \le x' \le 1\}`, one per row, are
solved here,

.. math::
    \max_{x' \in R(x)} \sum_i s_i x'_i \qquad\text{and}\qquad
    \min_{x' \in R(x)} \sum_i \tfrac{a_i}{2} (x'_i - \mu_i)^2 .

Both move every pixel towards a known side, by :math:`m_i` up to the room :math:`c_i` it has there
(to the edge of [0, 1]; for the second, not beyond :math:`\mu_i`), so that only the magnitudes are
to be found.

- L_inf: pixels are independent, :math:`m_i = \min(r, c_i)`.
- L2: by the conditions of Karush, Kuhn and Tucker :math:`m_i(t) = \min(h_i(t), c_i)` with one
  multiplier t >= 0 per row, :math:`h_i = |s_i| t`, respectively :math:`h_i = |\mu_i - x_i| \, a_i t
  / (1 + a_i t)`, and t is the largest with :math:`\sum_i m_i^2 \le r^2`. As a function of t^2 the
  sum increases and is concave in both cases (a minimum of concave functions), so that Newton's
  method from the left never leaves the ball and converges monotonically: for the linear problem,
  piecewise linear in t^2, in finitely many steps.
- L1, linear: the budget r goes to the pixels in the order of their slopes, each up to its room.
- L1, quadratic: :math:`m_i(\lambda) = \mathrm{clip}(|\mu_i - x_i| - \lambda / a_i, 0, c_i)` with
  the smallest :math:`\lambda \ge 0` whose sum is at most r, by bisection.

Results are inside exactly: with ``x`` in [0, 1] they are in [0, 1], and their distance from ``x``,
as computed by ``ball.norm``, is at most the radius.

Reference: Boyd, Vandenberghe, "Convex optimization", 2004, section 5.5.3,
https://web.stanford.edu/~boyd/cvxbook/.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae_defence.ops.balls import L1, L2, Ball, Linf
from pyro_vae_defence.ops.latents import rows

# Measured with weights over 8 decades: 8 leave a relative 1e-5 of the optimum, 16 nothing that
# float64 shows.
_NEWTON_STEPS = 16
# Halvings of an interval of numbers; 64 reach neighbours in float32 and nearly so in float64.
_BISECTION_STEPS = 64

_UNKNOWN = "ball must be an Linf, L2 or L1 ball, got {!r}"


def maximise_linear(slope: Tensor, x: Tensor, ball: Ball) -> Tensor:
    """The point in reach of ``x`` with the largest inner product with ``slope``.

    Args:
        slope: ``(N, *event)``, or broadcastable to it. Where it is zero, pixels stay.
        x: images ``(N, *event)``, values in [0, 1].
        ball: around each row of ``x``.

    Raises:
        ValueError: for a ball other than ``Linf``, ``L2`` and ``L1``.
    """
    shape = x.shape
    slope, x = _flat(slope.expand_as(x)), _flat(x)
    room = torch.where(slope == 0, 0.0, torch.where(slope > 0, 1.0 - x, x))
    weight = slope.abs()
    if isinstance(ball, Linf):
        magnitude = room.clamp(max=ball.radius)
    elif isinstance(ball, L2):
        magnitude = _euclidean(weight, torch.zeros_like(weight), room, ball.radius)
    elif isinstance(ball, L1):
        magnitude = _greedy(weight, room, ball.radius)
    else:
        raise ValueError(_UNKNOWN.format(ball))
    return _move(x, slope.sign(), magnitude, ball).reshape(shape)


def nearest(target: Tensor, precision: Tensor | float, x: Tensor, ball: Ball) -> Tensor:
    """The point in reach of ``x`` nearest to ``target``, squares weighted by ``precision``.

    Args:
        target: ``(N, *event)``, or broadcastable to it; any values.
        precision: positive weights, broadcastable to ``(N, *event)``, e.g. inverse variances.
        x, ball: as for :func:`maximise_linear`, with the same error.
    """
    shape = x.shape
    precision = torch.as_tensor(precision, dtype=x.dtype, device=x.device)
    target, precision = _flat(target.expand_as(x)), _flat(precision.expand_as(x))
    x = _flat(x)
    distance = (target - x).abs()
    room = torch.minimum(distance, torch.where(target > x, 1.0 - x, x))
    if isinstance(ball, Linf):
        magnitude = room.clamp(max=ball.radius)
    elif isinstance(ball, L2):
        # With t in units of the largest precision; only their ratios matter.
        bend = precision / rows(precision.amax(1), x)
        magnitude = _euclidean(distance * bend, bend, room, ball.radius)
    elif isinstance(ball, L1):
        magnitude = _soft_threshold(distance, precision, room, ball.radius)
    else:
        raise ValueError(_UNKNOWN.format(ball))
    return _move(x, (target - x).sign(), magnitude, ball).reshape(shape)


def _flat(value: Tensor) -> Tensor:
    """``(N, *event)`` to ``(N, D)``; of a single pixel, without event dimensions, D is 1."""
    return value.reshape(len(value), -1)


def _euclidean(slope: Tensor, bend: Tensor, room: Tensor, radius: float) -> Tensor:
    """Magnitudes min(slope t / (1 + bend t), room), t as large as their norm allows."""
    # In units in which the radius is 1 and so is t where the tangent at 0 reaches it, which is
    # Newton's first point.
    size = slope.norm(dim=1)
    unit = rows(torch.where(size > 0, radius / size, 0.0), slope)
    slope, bend, room = slope * unit / radius, bend * unit, room / radius
    squared = torch.ones_like(size)
    for _ in range(_NEWTON_STEPS):
        t = rows(squared.sqrt(), slope)
        free = slope * t / (1.0 + bend * t)
        stuck = free >= room
        spent = torch.where(stuck, room, free).square().sum(1)
        rate = torch.where(stuck, 0.0, slope.square() / (1.0 + bend * t) ** 3).sum(1)
        squared = squared + torch.where(rate > 0, (1.0 - spent).clamp(min=0.0) / rate, 0.0)
    t = rows(squared.sqrt(), slope)
    magnitude = torch.minimum(slope * t / (1.0 + bend * t), room)
    # Where all the room is in the ball, t is infinite.
    all_of_it = rows(room.square().sum(1) <= 1.0, room)
    return torch.where(all_of_it, room, magnitude) * radius


def _greedy(weight: Tensor, room: Tensor, radius: float) -> Tensor:
    """Spend ``radius`` on the largest weights first, on each up to its room."""
    order = weight.argsort(dim=1, descending=True)
    ordered = room.gather(1, order)
    left = radius - (ordered.cumsum(1) - ordered)
    spent = torch.minimum(left.clamp(min=0.0), ordered)
    return torch.zeros_like(spent).scatter(1, order, spent)


def _soft_threshold(distance: Tensor, precision: Tensor, room: Tensor, radius: float) -> Tensor:
    """Magnitudes clip(distance - level / precision, 0, room), level as low as their sum allows."""

    def magnitude(level: Tensor) -> Tensor:
        return torch.minimum((distance - rows(level, room) / precision).clamp(min=0.0), room)

    high = (distance * precision).amax(1)
    low = torch.zeros_like(high)
    for _ in range(_BISECTION_STEPS):
        middle = 0.5 * (low + high)
        too_much = magnitude(middle).sum(1) > radius
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return magnitude(high)


def _move(x: Tensor, direction: Tensor, magnitude: Tensor, ball: Ball) -> Tensor:
    """``x`` moved by ``direction * magnitude``, exactly inside the ball and in [0, 1]."""
    change = direction * magnitude
    norm = ball.norm(change)
    change = change * rows(torch.where(norm > ball.radius, ball.radius / norm, 1.0), change)
    moved = ball.inside(x, (x + change).clamp(0.0, 1.0))
    # Rounding to the image's own grid changes a pixel by half a unit at most: much in a tiny ball.
    rounding = torch.finfo(x.dtype).eps * ball.norm(torch.ones_like(x)) / ball.radius
    smaller = x + change * rows((1.0 - rounding).clamp(min=0.0), change)
    return torch.where(rows(ball.norm(moved - x) > ball.radius, x), smaller, moved)
