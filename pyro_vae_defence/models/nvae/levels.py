r"""The most likely colour of a pixel within reach, of a discretised mixture of logistics.

A pixel's log-probability is :math:`\log \sum_m w_m R_m(r) G_m(g; r) B_m(b; r, g)`: the channels are
coupled, and a mixture has many maxima, so that steps from any start may miss the highest by many
nats. All triples of 256 levels are too many to try. Branch and bound finds the highest all the
same: in a box of levels :math:`[r_0, r_1] \times [g_0, g_1] \times [b_0, b_1]` the means of a
component range over an interval, a channel's mass falls with the distance from its mean, and so

.. math:: \log \sum_m w_m \max_\text{box} R_m \max_\text{box} G_m \max_\text{box} B_m

bounds the box from above, and is the value itself where the box is one colour. Boxes whose bound is
below the best colour known, or not above it by more than :data:`TOLERANCE`, are dropped, the
others halved. Some hundred boxes per pixel decide. In float32 the log-probability itself is exact
to about 0.01 nats per channel, and so is what is found.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Branch points of the mixture of logistics (Salimans et al., PixelCNN++, 2017; NVAE's official
# values): colours of a channel, in [-1, 1], from which on a level owns a tail.
LOWER_EDGE, UPPER_EDGE = -0.999, 0.99
MIN_DELTA = 1e-5

TOLERANCE = 1e-4
"""By how many nats a pixel may fall short of the most likely colour in reach, besides rounding.

In float64 rounding is far below it. In float32 it is not: :func:`log_inside` is a difference of two
probabilities down to :data:`MIN_DELTA`, which leaves it about 0.01 nats per channel. Bounds are
more exact than the values they are compared with, and may lie that far below them.
"""

_PIXELS_AT_ONCE = 2**14  # bounds memory: some 50 boxes of a pixel are open at a time


class Components(NamedTuple):
    """Parameters of P pixels with M components, in units of ``y = 2x - 1``.

    Attributes:
        log_weights: ``(P, M)``.
        loc, log_scale, coefficients: ``(P, 3, M)``; the coefficients are those of green on red,
            blue on red, blue on green.
        inverse_scale, scaled_half_width, log_both: ``(P, 3, M)``, what bounds need of the scale.
        half_width: half a level.
    """

    log_weights: Tensor
    loc: Tensor
    log_scale: Tensor
    coefficients: Tensor
    inverse_scale: Tensor
    scaled_half_width: Tensor
    log_both: Tensor
    half_width: float

    @classmethod
    def of(
        cls,
        log_weights: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        coefficients: Tensor,
        half_width: float,
    ) -> Components:
        """Those with these parameters."""
        inverse_scale = (-log_scale).exp()
        width = inverse_scale * half_width
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)); a series where the last
        # factor may underflow.
        series = math.log(2 * half_width) - log_scale - width + width.square() / 6
        log_both = torch.where(width > 1e-3, (-torch.expm1(-2 * width)).log(), series)
        given = (log_weights, loc, log_scale, coefficients)
        return cls(*given, inverse_scale, width, log_both, half_width)

    def at(self, index: Tensor) -> Components:
        """Those of some pixels."""
        return self._replace(**_rows(self, index))

    def log_prob(self, y: Tensor) -> Tensor:
        """Log-probability of colours ``(P, 3)``: ``(P,)``, in nats."""
        distance = y[..., None] - self._means(y)
        log_mass, upper, lower = log_inside(distance, self.log_scale, self.half_width)
        log_mass = torch.where(y[..., None] > UPPER_EDGE, F.logsigmoid(-lower), log_mass)
        log_mass = torch.where(y[..., None] < LOWER_EDGE, F.logsigmoid(upper), log_mass)
        return (self.log_weights + log_mass.sum(1)).logsumexp(-1)

    def box_bound(self, low: Tensor, high: Tensor) -> Tensor:
        """Bounds of the log-probability, ``(P,)``, with colours in ``[low, high]``, ``(P, 3)``.

        No channel may have both kinds of level, those that own a tail and others.
        """
        on_red, blue_on_red, blue_on_green = self.coefficients.unbind(1)
        ends = [
            (coefficient * low[:, source, None], coefficient * high[:, source, None])
            for coefficient, source in ((on_red, 0), (blue_on_red, 0), (blue_on_green, 1))
        ]
        (green_low, red_low, more_low), (green_high, red_high, more_high) = (
            [of(*pair) for pair in ends] for of in (torch.minimum, torch.maximum)
        )
        none = torch.zeros_like(green_low)
        others_low = torch.stack([none, green_low, red_low + more_low], 1)
        others_high = torch.stack([none, green_high, red_high + more_high], 1)
        least = low[..., None] - self.loc - others_high
        most = high[..., None] - self.loc - others_low
        has_lower, has_upper = _kinds(low, high)
        # The distance from the mean with the largest mass; tails grow towards their end.
        distance = torch.where(has_lower, least.clamp(min=0) + most.clamp(max=0), most)
        distance = torch.where(has_upper, distance, least)
        *_, log_mass = self._ends(distance, has_lower, has_upper)
        return (self.log_weights + log_mass).logsumexp(-1)

    def tangent_bound(self, low: Tensor, high: Tensor) -> Tensor:
        """Bounds as :meth:`box_bound`, tighter in small boxes.

        The logarithm of a component's mass is concave in the colours, hence below its tangent at
        the box's middle; the sum of exponentials of tangents is convex, hence largest at a corner.
        """
        middle, half = (low + high) / 2, (high - low) / 2
        on_red, blue_on_red, blue_on_green = self.coefficients.unbind(1)
        distance = middle[..., None] - self._means(middle)
        below_upper, above_lower, log_mass = self._ends(distance, *_kinds(low, high))
        # What has no such end has log sigmoid 0, and slope 0.
        slope = self.inverse_scale * (above_lower.exp() - below_upper.exp())
        red, green, blue = slope.unbind(1)
        red = red - on_red * green - blue_on_red * blue
        slope = torch.stack([red, green - blue_on_green * blue, blue], 1)
        signs = torch.cartesian_prod(*3 * [low.new_tensor([-1.0, 1.0])])
        corners = (signs * half[:, None])[..., None]
        # No matrix product, which a GPU may be told to take in TF32: the bound would be none.
        change = sum(corners[:, :, c] * slope[:, None, c] for c in range(3))
        return ((self.log_weights + log_mass)[:, None] + change).logsumexp(-1).amax(1)

    def _means(self, y: Tensor) -> Tensor:
        """Means ``(P, 3, M)`` at colours ``(P, 3)``."""
        red, green, _ = y[..., None].unbind(1)
        on_red, blue_on_red, blue_on_green = self.coefficients.unbind(1)
        for_blue = blue_on_red * red + blue_on_green * green
        others = [torch.zeros_like(for_blue), on_red * red, for_blue]
        return self.loc + torch.stack(others, 1)

    def _ends(
        self, distance: Tensor, has_lower: Tensor, has_upper: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log sigmoid(upper), log sigmoid(-lower), and the log-mass of all channels, ``(P, M)``.

        The mass is sigmoid(upper) - sigmoid(lower), also where that underflows. The lowest level
        has no lower end, the highest no upper one.
        """
        scaled = self.inverse_scale * distance
        below_upper = F.logsigmoid(self.scaled_half_width + scaled) * has_upper
        above_lower = F.logsigmoid(self.scaled_half_width - scaled) * has_lower
        both = torch.where(has_lower & has_upper, self.log_both, 0.0)
        return below_upper, above_lower, (below_upper + above_lower + both).sum(1)


def _rows(parts: Any, index: Tensor) -> dict[str, Any]:
    """Rows of the tensors of a named tuple."""
    tensors = {name: part for name, part in parts._asdict().items() if isinstance(part, Tensor)}
    return {name: part.index_select(0, index) for name, part in tensors.items()}


def _kinds(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Whether levels of boxes have a lower and an upper end, ``(P, 3, 1)``."""
    return (low >= LOWER_EDGE)[..., None], (high <= UPPER_EDGE)[..., None]


def log_inside(
    distance: Tensor, log_scale: Tensor, half_width: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-mass of a level at a distance from the mean, and the scaled distances of its two ends."""
    inverse_scale = (-log_scale).exp()
    upper = inverse_scale * (distance + half_width)
    lower = inverse_scale * (distance - half_width)
    middle = inverse_scale * distance
    delta = upper.sigmoid() - lower.sigmoid()
    # Where the level's mass underflows, the density at its centre times its width.
    log_density = middle - log_scale - 2 * F.softplus(middle)
    inside = torch.where(
        delta > MIN_DELTA, delta.clamp(min=1e-10).log(), log_density + math.log(2 * half_width)
    )
    return inside, upper, lower


class Choices(NamedTuple):
    """What each channel of P pixels may be: levels in reach, and the value that was observed.

    A choice is a number: the levels from ``lowest`` to ``highest`` in order, with the observed
    value behind those that are not above it.

    Attributes:
        lowest, highest: first and last level in reach, ``(P, 3)``; where none is, ``below + 1`` and
            ``below``.
        below: last level that is not above the observed value.
        observed: the observed value as the likelihood sees it, in [0, 1].
        last: the highest level there is.
    """

    lowest: Tensor
    highest: Tensor
    below: Tensor
    observed: Tensor
    last: int

    def at(self, index: Tensor) -> Choices:
        """Those of some pixels."""
        return self._replace(**_rows(self, index))

    @property
    def edges(self) -> tuple[Tensor, Tensor]:
        """The first choices behind the levels that own the lower tail, and of the upper one's."""
        y = 2 * self.observed - 1
        first_upper = math.floor((UPPER_EDGE + 1) / 2 * self.last) + 1
        lower = (self.lowest <= 0).to(y) + (y < LOWER_EDGE)
        upper = (self.highest - first_upper + 1).clamp(min=0) + (y > UPPER_EDGE)
        return lower, self.highest - self.lowest + 2 - upper

    @property
    def own(self) -> Tensor:
        """The choice of the observed values."""
        return self.below - self.lowest + 1

    def level(self, choice: Tensor) -> Tensor:
        """Of choices other than :attr:`own`."""
        return self.lowest + choice - (choice > self.own).to(choice)

    def y(self, choice: Tensor) -> Tensor:
        """Colours of choices, in [-1, 1]."""
        return (
            2 * torch.where(choice == self.own, self.observed, self.level(choice) / self.last) - 1
        )

    def closest(self, y: Tensor, channel: int) -> Tensor:
        """Choices of one channel: the levels in reach closest to colours ``y``, ``(P,)``."""
        lowest, highest = self.lowest[:, channel], self.highest[:, channel]
        level = torch.round((y + 1) / 2 * self.last)
        level = torch.minimum(torch.maximum(level, lowest), highest)
        level = torch.where(highest < lowest, self.below[:, channel], level)
        choice = level - lowest + (level > self.below[:, channel])
        return torch.where(highest < lowest, self.own[:, channel], choice)


def most_likely(components: Components, choices: Choices) -> Tensor:
    """The choices ``(P, 3)`` of largest log-probability, up to :data:`TOLERANCE` and rounding.

    Rounding is about 0.01 nats per channel in float32.
    """
    every = torch.arange(len(choices.lowest), device=choices.lowest.device)
    parts = every.split(_PIXELS_AT_ONCE)
    return torch.cat([_search(components.at(part), choices.at(part)) for part in parts])


def _search(components: Components, choices: Choices) -> Tensor:
    best, best_value = _start(components, choices)
    rounding = 8 * torch.finfo(best.dtype).eps
    edges = choices.edges
    pixel = torch.arange(len(best), device=best.device)
    low, high = torch.zeros_like(best), choices.highest - choices.lowest + 1
    # Asking for a value keeps recordings from taking one run's number of rounds for all runs'.
    while len(pixel) and bool(best_value.isfinite().any()):
        colours, offered = components.at(pixel), choices.at(pixel)
        y_low, y_high = offered.y(low), offered.y(high)
        single = (low == high).all(1)
        found = single.nonzero().flatten()
        if len(found):
            value, where = colours.at(found).log_prob(y_low[found]), pixel[found]
            better = value > best_value[where]
            best_value = best_value.scatter_reduce(0, where, value, "amax")
            # One of the best, always the same.
            winner = (better & (value == best_value[where])).nonzero().flatten()
            chosen = pixel.new_full((len(best),), -1)
            chosen = chosen.scatter_reduce(0, where[winner], found[winner], "amax")
            best = torch.where((chosen >= 0)[:, None], low[chosen], best)
        mixed = [(low < edge[pixel]) & (edge[pixel] <= high) for edge in edges]
        is_mixed = (mixed[0] | mixed[1]).any(1)
        least = best_value[pixel]
        least = least + TOLERANCE + rounding * (1 + least.abs())
        kept = ~single & (is_mixed | (colours.box_bound(y_low, y_high) > least))
        kept = kept.nonzero().flatten()
        bound = colours.at(kept).tangent_bound(y_low[kept], y_high[kept])
        kept = kept[is_mixed[kept] | (bound > least[kept])]
        # Halves along the longest side, but first where levels own a tail.
        pixel, low, high = pixel[kept], low[kept], high[kept]
        side = (high - low).argmax(1, keepdim=True)
        middle = ((low + high) / 2).floor()
        for edge, cut in zip(edges, mixed):
            cut = cut[kept]
            middle = torch.where(cut, edge[pixel] - 1, middle)
            side = torch.where(cut.any(1, keepdim=True), cut.int().argmax(1, keepdim=True), side)
        middle = middle.gather(1, side)
        pixel = torch.cat([pixel, pixel])
        low, high = (
            torch.cat([low, low.scatter(1, side, middle + 1)]),
            torch.cat([high.scatter(1, side, middle), high]),
        )
    return best


def _start(components: Components, choices: Choices) -> tuple[Tensor, Tensor]:
    """The best of the observed colours and, for each component, those closest to its means."""
    best = choices.own
    y = choices.y(best)
    best_value = components.log_prob(y)
    for component in range(components.log_weights.shape[-1]):
        loc = components.loc[:, :, component]
        on_red, blue_on_red, blue_on_green = components.coefficients[:, :, component].unbind(1)
        choice = choices.own.clone()
        choice[:, 0] = choices.closest(loc[:, 0], 0)
        red = choices.y(choice)[:, 0]
        choice[:, 1] = choices.closest(loc[:, 1] + on_red * red, 1)
        green = choices.y(choice)[:, 1]
        mean = loc[:, 2] + blue_on_red * red + blue_on_green * green
        choice[:, 2] = choices.closest(mean, 2)
        y = choices.y(choice)
        value = components.log_prob(y)
        best = torch.where((value > best_value)[:, None], choice, best)
        best_value = torch.maximum(value, best_value)
    # Steps of one channel at a time.
    highest = choices.highest - choices.lowest + 1
    widest = int(highest.max()) if len(best) else 0
    for power in reversed(range(widest.bit_length())):
        for channel in range(3):
            for step in (2**power, -(2**power)):
                choice = best.clone()
                choice[:, channel] = (choice[:, channel] + step).clamp(min=0)
                choice = torch.minimum(choice, highest)
                y = choices.y(choice)
                value = components.log_prob(y)
                best = torch.where((value > best_value)[:, None], choice, best)
                best_value = torch.maximum(value, best_value)
    return best, best_value
