r"""Balls :math:`\{\varepsilon : \|\varepsilon\|_p \le r\}` of perturbations, one per image.

Perturbations have shape ``(N, *event)``; norms are per row. Images have a range as well:
``project_box`` projects on the intersection of the ball with a box :math:`l \le \varepsilon \le u`
that contains 0. Clipping a projection, or projecting a clipped point, finds a point of the
intersection but not the nearest one, and projected gradient ascent then stops short of the maximum.
``Linf`` is the paper's choice (Table 8).

References: Duchi, Shalev-Shwartz, Singer, Chandra, "Efficient projections onto the l1-ball", ICML
2008, https://doi.org/10.1145/1390156.1390191; Croce, Hein, "Mind the box: l1-APGD for sparse
adversarial attacks on image classifiers", ICML 2021, https://arxiv.org/abs/2103.01208 (the box).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_vae_defence.ops.latents import rows
from pyro_vae_defence.ops.streams import Streams

# Halvings of a projection's bracket, which ends narrower than float32 resolves.
_BISECTIONS = 32
# More than enough: rounding adds a few units in the last place of the image to a perturbation.
_ROUNDING_STEPS = 4


@dataclass(frozen=True)
class Ball:
    """A norm ball of perturbations; use one of :class:`Linf`, :class:`L2`, :class:`L1`.

    ``radius`` > 0 is the largest norm of a perturbation, in units of the image range [0, 1]. Who
    counts in grey levels writes ``Linf(8 / 255)``; a radius of ``Linf`` above 1 is refused. One of
    ``L2`` or ``L1`` may cover all images, as a bound that does not bind.

    Raises:
        ValueError: if ``radius`` is no positive finite number, above 1 in ``Linf``, or larger than
            any image and float32 allow in the others.
    """

    radius: float
    norm_name: ClassVar[str]
    largest: ClassVar[float] = 1e12
    """Beyond which a radius is a mistake, whatever the images."""

    def __post_init__(self) -> None:
        radius = self.radius
        number = isinstance(radius, numbers.Real) and not isinstance(radius, bool)
        if not (number and 0 < radius < math.inf):
            raise ValueError(
                f"radius must be a positive finite number in units of the image range [0, 1], "
                f"got {radius!r}; the paper uses 0.1 and 0.2"
            )
        if radius > self.largest:
            raise ValueError(
                f"radius of {type(self).__name__} must be at most {self.largest:g}, in units of "
                f"the image range [0, 1], got {radius!r}; if it counts the grey levels of 8-bit "
                f"images, write {radius:g}/255"
            )
        if not isinstance(radius, (int, float)):  # numpy's scalars
            object.__setattr__(self, "radius", float(radius))

    def wider(self, by: float) -> Ball:
        """The ball whose radius is larger by so much, or the largest, which holds all images."""
        return type(self)(min(self.radius + by, self.largest))

    def norm(self, perturbation: Tensor) -> Tensor:
        """Norm of each perturbation, shape ``(N,)``."""
        raise NotImplementedError

    def project(self, perturbation: Tensor) -> Tensor:
        """Nearest point of the ball (Euclidean distance), exactly inside also when rounded."""
        raise NotImplementedError

    def steepest_ascent(self, gradient: Tensor) -> Tensor:
        """Direction d, of norm <= 1, with the largest inner product with ``gradient``."""
        raise NotImplementedError

    def step_direction(self, gradient: Tensor) -> Tensor:
        """Direction of a step before ``project_box``: steepest ascent, for L1 the Euclidean one.

        The projection of a Euclidean step on an L1 ball chooses how many coordinates move; steepest
        ascent moves one, and gets stuck once that one has reached the box.
        """
        return self.steepest_ascent(gradient)

    def random_start(self, like: Tensor, streams: Streams) -> Tensor:
        """A random point of the ball for each row of ``like``, drawn from its own stream."""
        raise NotImplementedError

    def project_box(self, perturbation: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Nearest point of the ball's cut with the box ``low <= perturbation <= high`` around 0."""
        raise NotImplementedError

    def _bisect(
        self,
        at: Callable[[Tensor], Tensor],
        inner: Tensor,
        outer: Tensor,
        middle_of: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The point ``at`` the parameter nearest to ``outer`` that is inside; ``inner``'s is."""
        inner = torch.where(self.norm(at(outer)) <= self.radius, outer, inner)
        for _ in range(_BISECTIONS):
            middle = middle_of(inner, outer)
            inside = self.norm(at(middle)) <= self.radius
            inner = torch.where(inside, middle, inner)
            outer = torch.where(inside, outer, middle)
        return at(inner)

    def inside(self, x_ref: Tensor, x_adv: Tensor) -> Tensor:
        """Move ``x_adv`` by the last bits it takes for ``x_adv - x_ref`` to be inside.

        A projected perturbation may leave the ball again when it is added to an image and rounded.
        The result lies between the two images, hence in [0, 1] if they do.
        """
        eps = torch.finfo(x_adv.dtype).eps
        for attempt in range(_ROUNDING_STEPS):
            difference = x_adv - x_ref
            norm = self.norm(difference)
            # In small balls it takes more: pixels are rounded by their own size, not the radius's.
            excess = (norm - self.radius) / norm.clamp(min=1e-30) * (4**attempt - 1)
            shrink = 1.0 - rows(excess.clamp(min=16 ** (attempt + 1) * eps, max=1.0), x_adv)
            outside = rows(norm > self.radius, x_adv)
            # Rounding to the nearest may undo what shrinks by less than a pixel resolves.
            shrunk = next_towards(x_ref + shrink * difference, x_ref)
            x_adv = torch.where(outside, shrunk, x_adv)
        return x_adv


def next_towards(value: Tensor, goal: Tensor) -> Tensor:
    """``torch.nextafter`` with the derivative of ``value``, which older versions of it lack."""
    with torch.no_grad():
        step = torch.nextafter(value, goal) - value  # exact, as is their sum
    return value + step


def check_ball(ball: Any) -> Ball:
    """``ball``, or a ``ValueError`` unless it is a :class:`Ball`."""
    if not isinstance(ball, Ball):
        raise ValueError(f"ball must be a Ball such as Linf(0.1), got {ball!r}")
    return ball


def reaches(ball: Ball, delta: float) -> tuple[Ball | None, Ball]:
    """Balls around the clean image of radius delta - epsilon, ``None`` for 0, and delta + epsilon,
    or the largest one, which holds all images.

    Raises:
        ValueError: if delta is below epsilon, the radius of ``ball``, or no radius of such a ball.
    """
    epsilon, kind = ball.radius, type(ball)
    number = isinstance(delta, numbers.Real) and not isinstance(delta, bool)
    if not number or not epsilon <= delta <= kind.largest:
        raise ValueError(
            f"delta must be a radius of at least the attacker's {epsilon:g} and at most "
            f"{kind.largest:g}, got {delta!r}: from a smaller ball an attack leads out, and no "
            "mass can be promised"
        )
    delta = float(delta)
    return kind(delta - epsilon) if delta > epsilon else None, ball.wider(delta)


class Linf(Ball):
    """Largest absolute value at most ``radius``, at most 1."""

    norm_name = "Linf"
    largest = 1.0

    def norm(self, perturbation: Tensor) -> Tensor:
        """Largest absolute value of each row."""
        return perturbation.flatten(1).abs().amax(1)

    def project(self, perturbation: Tensor) -> Tensor:
        """Clamp every value to [-radius, radius]."""
        return perturbation.clamp(-self.radius, self.radius)

    def inside(self, x_ref: Tensor, x_adv: Tensor) -> Tensor:
        """Move single pixels that rounding has put outside."""
        for _ in range(_ROUNDING_STEPS):
            outside = (x_adv - x_ref).abs() > self.radius
            x_adv = torch.where(outside, next_towards(x_adv, x_ref), x_adv)
        return x_adv

    def project_box(self, perturbation: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Clamp every value to both intervals."""
        return torch.minimum(torch.maximum(self.project(perturbation), low), high)

    def steepest_ascent(self, gradient: Tensor) -> Tensor:
        """Sign of the gradient."""
        return gradient.sign()

    def random_start(self, like: Tensor, streams: Streams) -> Tensor:
        """Uniform in the cube."""
        uniform = streams.uniform(0, 0, tuple(like.shape[1:]), like.dtype)
        return self.radius * (2.0 * uniform - 1.0)


class L2(Ball):
    """Euclidean norm at most ``radius``."""

    norm_name = "L2"

    def norm(self, perturbation: Tensor) -> Tensor:
        """Euclidean norm of each row."""
        return perturbation.flatten(1).norm(dim=1)

    def project(self, perturbation: Tensor) -> Tensor:
        """Scale rows that lie outside back to the sphere."""
        norm = self.norm(perturbation)
        # A hair less than the radius keeps the rounded norm inside the ball.
        radius = self.radius * (1 - 8 * torch.finfo(norm.dtype).eps)
        outside = rows(norm > self.radius, perturbation)
        return torch.where(outside, radius * _normalised(perturbation), perturbation)

    def project_box(self, perturbation: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """clip(s v, low, high) with the largest s <= 1 inside."""

        def at(scale: Tensor) -> Tensor:
            scaled = rows(scale, perturbation) * perturbation
            return torch.minimum(torch.maximum(scaled, low), high)

        inner = (self.radius / self.norm(perturbation).clamp(min=1e-30)).clamp(max=1.0)
        return self._bisect(at, inner, torch.ones_like(inner), lambda a, b: (a * b).sqrt())

    def steepest_ascent(self, gradient: Tensor) -> Tensor:
        """Normalised gradient (zero where the gradient is zero)."""
        return _normalised(gradient)

    def random_start(self, like: Tensor, streams: Streams) -> Tensor:
        """Uniform in the Euclidean ball."""
        event = tuple(like.shape[1:])
        direction = self.steepest_ascent(streams.normal(0, 0, event, like.dtype))
        depth = streams.uniform(0, 1, (), like.dtype) ** (1.0 / math.prod(event))
        return self.project(self.radius * direction * rows(depth, like))


class L1(Ball):
    """Sum of absolute values at most ``radius``."""

    norm_name = "L1"

    def norm(self, perturbation: Tensor) -> Tensor:
        """Sum of absolute values of each row."""
        return perturbation.flatten(1).abs().sum(1)

    def project(self, perturbation: Tensor) -> Tensor:
        """Euclidean projection by soft thresholding (Duchi et al. 2008)."""
        flat = perturbation.flatten(1)
        magnitude = flat.abs()
        # Counted from the largest: sums of large values would round off the radius. What is lower
        # by more than that becomes zero in any case.
        height = (magnitude - magnitude.amax(1, keepdim=True)).clamp(min=-self.radius)
        ordered = height.sort(dim=1, descending=True).values
        excess = ordered.cumsum(1) - self.radius
        count = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
        active = (ordered > excess / count).sum(1).clamp(min=1)
        threshold = excess.gather(1, active[:, None] - 1)[:, 0] / active
        shrunk = flat.sign() * (height - threshold[:, None]).clamp(min=0)
        # Soft thresholding meets the sphere up to rounding; one rescaling puts it inside.
        norm = shrunk.abs().sum(1)
        limit = self.radius * (1 - 64 * torch.finfo(flat.dtype).eps)
        scale = torch.where(norm > limit, limit / norm.clamp(min=1e-30), 1.0)
        inside = magnitude.sum(1, keepdim=True) <= self.radius
        return torch.where(inside, flat, shrunk * scale[:, None]).reshape(perturbation.shape)

    def project_box(self, perturbation: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Soft thresholding, then clamping, with the smallest threshold that ends inside."""

        def at(threshold: Tensor) -> Tensor:
            shrunk = (perturbation.abs() - rows(threshold, perturbation)).clamp(min=0)
            return torch.minimum(torch.maximum(perturbation.sign() * shrunk, low), high)

        inner = perturbation.flatten(1).abs().amax(1)
        return self._bisect(at, inner, torch.zeros_like(inner), lambda a, b: 0.5 * (a + b))

    def steepest_ascent(self, gradient: Tensor) -> Tensor:
        """The coordinate with the largest absolute gradient, with its sign."""
        flat = gradient.flatten(1)
        largest = flat.abs().argmax(1, keepdim=True)
        direction = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign())
        return direction.reshape(gradient.shape)

    def step_direction(self, gradient: Tensor) -> Tensor:
        """Gradient over its Euclidean norm (zero where the gradient is zero)."""
        return _normalised(gradient)

    def random_start(self, like: Tensor, streams: Streams) -> Tensor:
        """Uniform in the L1 ball: signed exponential spacings."""
        event = tuple(like.shape[1:])
        spacings = -streams.uniform(0, 0, event, like.dtype).log()
        signs = (streams.uniform(0, 1, event, like.dtype) - 0.5).sign()
        rest = -streams.uniform(0, 2, (), like.dtype).log()
        total = spacings.flatten(1).sum(1) + rest
        return self.project(self.radius * signs * spacings / rows(total, like))


def _normalised(vector: Tensor) -> Tensor:
    """Each row over its Euclidean norm, whatever its scale; zero where it is zero."""
    largest = vector.flatten(1).abs().amax(1)
    # Squares of gradients of a saturated softmax would all be zero, others overflow.
    vector = vector / rows(torch.where(largest > 0, largest, 1.0), vector)
    norm = vector.flatten(1).norm(dim=1)
    return vector / rows(norm.clamp(min=1.0), vector)
