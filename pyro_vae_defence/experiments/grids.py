r"""Posteriors over two latent dimensions on a grid, where all of their properties are sums.

With the prior N(0, I), and likelihoods that are exponential families in the image,

.. math:: \log p(x|z) = x^\top \eta(z) - A(z) + c(x)

(Bernoulli on intensities: :math:`\eta` the logits, :math:`A = \sum \log(1 + e^\eta)`; Gaussian:
:math:`\eta = \mu / \sigma^2`, :math:`A = \sum \mu^2 / 2 \sigma^2`), one pass of the decoder over
the nodes gives the energies :math:`U(z; x) = A(z) + |z|^2 / 2 - x^\top \eta(z)` of any number of
images, up to c(x), which no posterior knows. Integrals are sums over nodes. Between the nodes
:class:`Table` interpolates, so that chains cost next to nothing: they are exact for a density that
differs from the decoder's by what the interpolation leaves, which studies measure.

Reference: Keys, "Cubic convolution interpolation for digital image processing", 1981,
https://doi.org/10.1109/TASSP.1981.1163711.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.distributions import Bernoulli
from torch import Tensor

from pyro_vae_defence.types import LatentsLike

_NODES_AT_ONCE = 1000
_MOST_OUTSIDE = 1e-4
# Sums over nodes are off integrals of a normal by 2 exp(-2 (pi scale / spacing)^2): 3e-4 here.
_LEAST_SCALE = 0.67

# Polynomial in the place between the inner two of four nodes (Keys' kernel with a = -1/2, which
# reproduces parabolas): coefficients by power, of the values.
_KEYS = (
    (0.0, 2.0, 0.0, 0.0),
    (-1.0, 0.0, 1.0, 0.0),
    (2.0, -5.0, 4.0, -1.0),
    (-1.0, 3.0, -3.0, 1.0),
)


class Grid(NamedTuple):
    """Square cells that cover [-half_width, half_width]^2; nodes are their centres."""

    half_width: float
    spacing: float

    @property
    def size(self) -> int:
        """Cells of a side."""
        return round(2 * self.half_width / self.spacing)

    @property
    def axis(self) -> Tensor:
        """Coordinates of the nodes of a side, ``(size,)``, float64."""
        return (torch.arange(self.size, dtype=torch.float64) + 0.5) * self.spacing - self.half_width

    @property
    def nodes(self) -> Tensor:
        """All nodes ``(size, size, 2)``."""
        return torch.stack(torch.meshgrid(self.axis, self.axis, indexing="ij"), -1)

    def contains(self, latents: LatentsLike) -> Tensor:
        """Which latents ``z``, ``(N, 2)``, lie on it; bool ``(N,)``."""
        return (latents["z"].abs() < self.half_width).all(-1)

    def shares(self, z: Tensor, block: int) -> Tensor:
        """Share of points ``(N, 2)`` in each square of ``block`` x ``block`` cells, flat."""
        side = self.size // block
        cell = ((z + self.half_width) / (block * self.spacing)).floor().long().clamp(0, side - 1)
        counts = torch.bincount(cell[:, 0] * side + cell[:, 1], minlength=side * side)
        return counts.double() / len(z)


def check_grid(half_width: float, spacing: float, block: int | None = None) -> None:
    """Raise a ``ValueError`` unless cells fill the square, in an even number of blocks if any."""
    cells = 2 * half_width / spacing
    multiple = 2 * (block or 0) or 1
    if abs(cells - round(cells)) > 1e-6 or round(cells) % multiple or round(cells) < 4:
        many = "" if block is None else f", a multiple of 2 block = {multiple}"
        raise ValueError(
            f"spacing={spacing!r} must divide 2 half_width = {2 * half_width:g} into at least 4 "
            f"cells{many}"
        )


# --- Densities ------------------------------------------------------------------------------------


@torch.no_grad()
def energies(vae: Any, x: Tensor, grid: Grid) -> Tensor:
    """-log p(x, z) at the nodes up to c(x), float64 ``(N, size, size)`` on the CPU, in nats.

    Args:
        vae: with ``observation(z)``, Bernoulli or Gaussian, and the prior N(0, I) on two latents.
        x: images ``(N, C, H, W)``.
        grid: where.
    """
    flat, nodes = x.flatten(1).double(), grid.nodes.flatten(0, 1)
    found = torch.empty(len(x), len(nodes), dtype=torch.float64)
    for first in range(0, len(nodes), _NODES_AT_ONCE):
        some = slice(first, first + _NODES_AT_ONCE)
        pixels = vae.observation(nodes[some].to(x)).base_dist
        if isinstance(pixels, Bernoulli):
            eta = pixels.logits.flatten(1).double()
            partition = torch.nn.functional.softplus(eta).sum(1)
        else:
            mean, variance = (v.flatten(1).double() for v in (pixels.mean, pixels.variance))
            eta, partition = mean / variance, (mean.square() / (2 * variance)).sum(1)
        found[:, some] = (partition - flat @ eta.T).cpu() + 0.5 * nodes[some].square().sum(1)
    return found.reshape(len(x), grid.size, grid.size)


def posterior(energy: Tensor) -> Tensor:
    """Log masses of the cells, ``(N, size * size)``, of energies ``(N, size, size)``."""
    return (-energy.flatten(1)).log_softmax(1)


def guide(q: Any, grid: Grid) -> Tensor:
    """Log masses of the cells, ``(N, size * size)``, of a distribution over latents.

    Args:
        q: independent normals, batch ``(N,)``, event ``(2,)``.
        grid: where.

    Raises:
        ValueError: if more than a ten-thousandth of a mass lies off the grid, or a standard
            deviation is below 0.67 of the spacing, where sums over nodes are no integrals.
    """
    nodes = grid.nodes.flatten(0, 1)
    loc, scale = (value.cpu().double()[:, None] for value in (q.mean, q.stddev))
    least = scale.amin((1, 2))
    if (narrow := least < _LEAST_SCALE * grid.spacing).any():
        raise ValueError(
            f"spacing={grid.spacing!r} is too wide for the guides of images "
            f"{narrow.nonzero().flatten().tolist()}, whose standard deviations go down to "
            f"{float(least.min()):.3g}; make it {float(least.min()) / _LEAST_SCALE:.3g} or smaller"
        )
    found = torch.distributions.Normal(loc, scale).log_prob(nodes).sum(-1)
    inside = torch.distributions.Normal(loc, scale)
    ends = inside.cdf(torch.tensor(grid.half_width)) - inside.cdf(torch.tensor(-grid.half_width))
    if (outside := float(1 - ends.prod(-1).min())) > _MOST_OUTSIDE:
        raise ValueError(
            f"half_width={grid.half_width!r} leaves {outside:.2g} of a guide's mass off the grid; "
            "make it larger"
        )
    return found.log_softmax(1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, ``(N,)``, of log masses ``(N, cells)``."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the sum of absolute differences, in [0, 1], of masses ``(N, cells)``."""
    return 0.5 * (p - q).abs().sum(-1)


def in_blocks(log_p: Tensor, grid: Grid, block: int) -> Tensor:
    """Masses of squares of ``block`` x ``block`` cells, ``(N, squares)``, of log masses."""
    side = grid.size // block
    parts = log_p.exp().reshape(-1, side, block, side, block)
    return parts.sum((2, 4)).flatten(1)


def draws(log_p: Tensor, grid: Grid, number: int, generator: torch.Generator) -> Tensor:
    """Points ``(number, 2)`` of a density that is constant in cells of log masses ``(cells,)``."""
    cells = torch.multinomial(log_p.exp(), number, replacement=True, generator=generator)
    place = torch.rand(number, 2, generator=generator, dtype=torch.float64) - 0.5
    return grid.nodes.flatten(0, 1)[cells] + grid.spacing * place


# --- Between the nodes ----------------------------------------------------------------------------


class Table:
    """Energies of one image between the nodes: a potential for chains, any number of rows.

    Args:
        energy: at the nodes, ``(size, size)``.
        grid: of the nodes.
    """

    def __init__(self, energy: Tensor, grid: Grid) -> None:
        keys = 0.5 * torch.tensor(_KEYS, dtype=torch.float64)
        around = energy.unfold(0, 4, 1).unfold(1, 4, 1)
        self.grid, self.side = grid, len(around)
        self.coefficients = (keys @ around @ keys.T).reshape(-1, 4, 4)

    def __call__(self, latents: LatentsLike) -> Tensor:
        """Energies ``(N,)`` of ``z``, float64 ``(N, 2)``; constant off the grid."""
        place = (latents["z"] + self.grid.half_width) / self.grid.spacing - 1.5
        cell = place.detach().floor().clamp(0, self.side - 1)
        first, second = (place - cell).clamp(0, 1).unbind(1)
        index = cell.long()
        polynomial = self.coefficients[index[:, 0] * self.side + index[:, 1]]
        along = polynomial[..., 3]
        for power in (2, 1, 0):
            along = along * second[:, None] + polynomial[..., power]
        value = along[:, 3]
        for power in (2, 1, 0):
            value = value * first + along[:, power]
        return value
