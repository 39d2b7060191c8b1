r"""Balls :math:`\{\varepsilon : \|\varepsilon\|_p \le r\}` of perturbations, one perturbation per image.

Each ball knows ``project`` (the nearest point of the ball; exactly inside, also in floating point),
``steepest_ascent`` (the maximiser of :math:`\langle g, d\rangle` over :math:`\|d\|_p \le 1`) and ``random_start``.
Images have a range as well: ``project_box`` and ``climb`` are the first two on the intersection of the ball with a
box :math:`l \le \varepsilon \le u` that contains 0. Clipping a projection, or projecting a clipped point, finds a
point of the intersection but not the nearest one, and a step along the steepest coordinate of an L1 ball gets stuck
at a saturated pixel. Perturbations have shape ``(N, *event)``; norms are per row. ``Linf`` is the paper's choice
(Table 8).

References: Duchi, Shalev-Shwartz, Singer, Chandra, "Efficient projections onto the l1-ball", ICML 2008,
https://doi.org/10.1145/1390156.1390191; Croce, Hein, "Mind the box: l1-APGD for sparse adversarial attacks on
image classifiers", ICML 2021, https://arxiv.org/abs/2103.01208 (why the box matters).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_vae_defence.ops.latents import rows
from pyro_vae_defence.ops.streams import Streams

# Halvings of a bracket; the bracket of a projection ends narrower than float32 resolves.
_BISECTIONS = 32

# More than enough: rounding adds a few units in the last place of the image to a perturbation.
_ROUNDING_STEPS = 4


@dataclass(frozen=True)
class Ball:
    """A norm ball of perturbations; use one of :class:`Linf`, :class:`L2`, :class:`L1`.

    Args:
        radius: largest norm of a perturbation, in units of the image range [0, 1]; must be > 0.
    """

    radius: float
    norm_name: ClassVar[str]

    def __post_init__(self) -> None:
        if not (isinstance(self.radius, (int, float)) and 0 < self.radius < math.inf):
            raise ValueError(
                f"radius must be a positive finite number in units of the image range [0, 1], "
                f"got {self.radius!r}; the paper uses 0.1 and 0.2"
            )

    def norm(self, perturbation: Tensor) -> Tensor:
        """Norm of each perturbation, shape ``(N,)``."""
        raise NotImplementedError

    def project(self, perturbation: Tensor) -> Tensor:
        """Nearest point of the ball (Euclidean distance), same shape."""
        raise NotImplementedError

    def steepest_ascent(self, gradient: Tensor) -> Tensor:
        """Direction of unit norm with the largest inner product with ``gradient``, same shape."""
        raise NotImplementedError

    def random_start(self, like: Tensor, streams: Streams) -> Tensor:
        """A random point of the ball for each row of ``like``, drawn from its own stream."""
        raise NotImplementedError

    def project_box(self, perturbation: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Nearest point of the ball's intersection with ``low <= perturbation <= high``.

        Args:
            perturbation: ``(N, *event)``.
            low, high: bounds of every value, same shape, ``low <= 0 <= high``.
        """
        raise NotImplementedError

    def climb(self, gradient: Tensor, length: Tensor | float, low: Tensor, high: Tensor) -> Tensor:
        """Step of norm at most ``length`` inside the box with the largest inner product with ``gradient``.

        Args:
            gradient: ``(N, *event)``.
            length: longest step, a number or one per row ``(N,)``.
            low, high: bounds of the step's values, same shape as ``gradient``, ``low <= 0 <= high``.
        """
        raise NotImplementedError

    def inside(self, x_ref: Tensor, x_adv: Tensor) -> Tensor:
        """Move ``x_adv`` by the last bits it takes for ``x_adv - x_ref``, as computed, to be inside.

        A projected perturbation may leave the ball again when it is added to an image and rounded. The
        result lies between the two images, hence in [0, 1] if they do.
        """
        shrink = 1.0 - 16 * torch.finfo(x_adv.dtype).eps
        for _ in range(_ROUNDING_STEPS):
            difference = x_adv - x_ref
            outside = rows(self.norm(difference) > self.radius, x_adv)
            x_adv = torch.where(outside, x_ref + shrink * difference, x_adv)
        return x_adv


class Linf(Ball):
    """Largest absolute value at most ``radius``."""

    norm_name = "Linf"

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
            x_adv = torch.where(outside, torch.nextafter(x_adv, x_ref), x_adv)
        return x_adv

    def project_box(self, perturbation: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Clamp every value to both intervals."""
        return torch.minimum(torch.maximum(self.project(perturbation), low), high)

    def steepest_ascent(self, gradient: Tensor) -> Tensor:
        """Sign of the gradient."""
        return gradient.sign()

    def climb(self, gradient: Tensor, length: Tensor | float, low: Tensor, high: Tensor) -> Tensor:
        """``length`` in every coordinate, or as far as the box allows."""
        step = gradient.sign() * _column(length, gradient)
        return torch.minimum(torch.maximum(step, low), high)

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
        scale = self.radius / self.norm(perturbation).clamp(min=1e-30)
        # A hair under 1 keeps the rounded norm inside the ball.
        scale = torch.where(scale < 1, scale * (1 - 8 * torch.finfo(scale.dtype).eps), 1.0)
        return perturbation * rows(scale, perturbation)

    def project_box(self, perturbation: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The perturbation scaled and clamped: clip(s v, low, high) with the largest s <= 1 inside."""
        norm = self.norm(perturbation)
        inner = (self.radius / norm.clamp(min=1e-30)).clamp(max=1.0)
        return self._scaled(perturbation, inner, torch.ones_like(inner), self.radius, low, high)

    def climb(self, gradient: Tensor, length: Tensor | float, low: Tensor, high: Tensor) -> Tensor:
        """The gradient scaled and clamped: saturated coordinates leave their share to the others."""
        norm = self.norm(gradient)
        inner = length / torch.where(norm > 0, norm, 1.0)
        # Coordinates with a millionth of the gradient's norm need not be moved to the box's edge.
        return self._scaled(gradient, inner, 1e6 * inner, length, low, high)

    def _scaled(
        self,
        direction: Tensor,
        inner: Tensor,
        outer: Tensor,
        limit: Tensor | float,
        low: Tensor,
        high: Tensor,
    ) -> Tensor:
        """clip(s v, low, high) with the largest s in [inner, outer] of norm at most ``limit``."""

        def at(scale: Tensor) -> Tensor:
            scaled = rows(scale, direction) * direction
            return torch.minimum(torch.maximum(scaled, low), high)

        fits = self.norm(at(outer)) <= limit
        inner = torch.where(fits, outer, inner)
        for _ in range(_BISECTIONS):
            middle = (inner * outer).sqrt()
            inside = self.norm(at(middle)) <= limit
            inner = torch.where(inside, middle, inner)
            outer = torch.where(inside, outer, middle)
        return at(inner)

    def steepest_ascent(self, gradient: Tensor) -> Tensor:
        """Normalised gradient (zero where the gradient is zero)."""
        norm = self.norm(gradient)
        return gradient / rows(torch.where(norm > 0, norm, 1.0), gradient)

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
        ordered = magnitude.sort(dim=1, descending=True).values
        excess = ordered.cumsum(1) - self.radius
        count = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
        active = (ordered > excess / count).sum(1).clamp(min=1)
        threshold = excess.gather(1, active[:, None] - 1)[:, 0] / active
        inside = magnitude.sum(1) <= self.radius
        threshold = torch.where(inside, 0.0, threshold)
        shrunk = flat.sign() * (magnitude - threshold[:, None]).clamp(min=0)
        # Soft thresholding meets the sphere up to rounding; one rescaling puts it inside.
        norm = shrunk.abs().sum(1)
        limit = self.radius * (1 - 64 * torch.finfo(flat.dtype).eps)
        scale = torch.where(norm > limit, limit / norm.clamp(min=1e-30), 1.0)
        scale = torch.where(inside, 1.0, scale)
        return (shrunk * scale[:, None]).reshape(perturbation.shape)

    def project_box(self, perturbation: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Soft thresholding, then clamping, with the smallest threshold that ends inside."""

        def at(threshold: Tensor) -> Tensor:
            shrunk = (perturbation.abs() - rows(threshold, perturbation)).clamp(min=0)
            return torch.minimum(torch.maximum(perturbation.sign() * shrunk, low), high)

        outer = torch.zeros_like(self.norm(perturbation))
        inner = perturbation.flatten(1).abs().amax(1)
        inner = torch.where(self.norm(at(outer)) <= self.radius, outer, inner)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (inner + outer)
            inside = self.norm(at(middle)) <= self.radius
            inner = torch.where(inside, middle, inner)
            outer = torch.where(inside, outer, middle)
        return at(inner)

    def climb(self, gradient: Tensor, length: Tensor | float, low: Tensor, high: Tensor) -> Tensor:
        """Move the coordinates of the largest gradients to the box's edge until ``length`` is used up."""
        flat = gradient.flatten(1)
        room = torch.where(gradient > 0, high, -low).flatten(1) * (flat != 0)
        order = flat.abs().argsort(dim=1, descending=True, stable=True)
        ordered = room.gather(1, order)
        left = _column(length, flat) - (ordered.cumsum(1) - ordered)
        moved = torch.minimum(ordered, left.clamp(min=0))
        step = torch.zeros_like(flat).scatter(1, order, moved) * flat.sign()
        return step.reshape(gradient.shape)

    def steepest_ascent(self, gradient: Tensor) -> Tensor:
        """The coordinate with the largest absolute gradient, with its sign."""
        flat = gradient.flatten(1)
        largest = flat.abs().argmax(1, keepdim=True)
        direction = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign())
        return direction.reshape(gradient.shape)

    def random_start(self, like: Tensor, streams: Streams) -> Tensor:
        """Uniform in the L1 ball: signed exponential spacings."""
        event = tuple(like.shape[1:])
        spacings = -streams.uniform(0, 0, event, like.dtype).log()
        signs = (streams.uniform(0, 1, event, like.dtype) - 0.5).sign()
        rest = -streams.uniform(0, 2, (), like.dtype).log()
        total = spacings.flatten(1).sum(1) + rest
        return self.project(self.radius * signs * spacings / rows(total, like))


def _column(length: Tensor | float, like: Tensor) -> Tensor | float:
    return rows(length, like) if isinstance(length, Tensor) else length
