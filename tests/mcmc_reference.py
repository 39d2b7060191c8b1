r"""Sampler truth: a recursive NUTS to compare with, and targets whose moments are known.

The recursive sampler follows Hoffman and Gelman (2014, algorithm 3) with multinomial weights, one
chain at a time, in NumPy, from closed-form gradients: it shares no code with
:mod:`pyro_vae_defence.mcmc`, only the random numbers. A tree is the list of its leaves, so every
sum over a (sub)tree is taken directly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

# --- NUTS, recursively ----------------------------------------------------------------------------


class Leaf(NamedTuple):
    position: np.ndarray
    momentum: np.ndarray
    gradient: np.ndarray
    hamiltonian: float


class Noise(NamedTuple):
    """Random numbers of one transition: per doubling, and per leaf of the subtree it adds."""

    forward: np.ndarray  # (max_tree_depth,) bool
    log_uniform_subtree: np.ndarray  # (max_tree_depth,)
    log_uniform_leaf: list[np.ndarray]  # (2 ** depth,) each


class Transition(NamedTuple):
    position: np.ndarray
    hamiltonian: float
    accepted: bool
    offset: int  # leapfrog steps from the start to the state chosen
    diverging: bool
    num_leaves: int
    depth: int
    acceptance: float


@dataclass(frozen=True)
class RecursiveNUTS:
    """One transition of multinomial NUTS on ``density``: position -> (energy, gradient)."""

    density: Callable[[np.ndarray], tuple[float, np.ndarray]]
    step_size: float
    max_tree_depth: int
    inverse_mass: np.ndarray
    threshold: float = 1000.0

    def leaf(self, position: np.ndarray, momentum: np.ndarray) -> Leaf:
        energy, gradient = self.density(position)
        kinetic = 0.5 * np.sum(self.inverse_mass * momentum**2)
        return Leaf(position, momentum, gradient, energy + kinetic)

    def leapfrog(self, start: Leaf, step: float) -> Leaf:
        half = start.momentum - 0.5 * step * start.gradient
        position = start.position + step * self.inverse_mass * half
        _, gradient = self.density(position)
        return self.leaf(position, half - 0.5 * step * gradient)

    def has_turned(self, leaves: list[Leaf]) -> bool:
        first, last = leaves[0].momentum, leaves[-1].momentum
        total = np.sum([leaf.momentum for leaf in leaves], axis=0)
        middle = self.inverse_mass * (total - 0.5 * (first + last))
        return bool(first @ middle <= 0 or last @ middle <= 0)

    def build_tree(
        self, edge: Leaf, step: float, depth: int, start: float
    ) -> tuple[list[Leaf], bool, bool]:
        """Leaves beyond ``edge`` in order; whether all went well; whether one diverged."""
        if depth == 0:
            leaf = self.leapfrog(edge, step)
            diverging = not leaf.hamiltonian - start <= self.threshold
            return [leaf], not diverging, diverging
        first, valid, diverging = self.build_tree(edge, step, depth - 1, start)
        if not valid:
            return first, False, diverging
        second, valid, diverging = self.build_tree(first[-1], step, depth - 1, start)
        leaves = first + second
        return leaves, valid and not self.has_turned(leaves), diverging

    def transition(self, position: np.ndarray, momentum: np.ndarray, noise: Noise) -> Transition:
        start = self.leaf(position, momentum)

        def log_weights(leaves: list[Leaf]) -> np.ndarray:
            return np.array([start.hamiltonian - leaf.hamiltonian for leaf in leaves])

        # The tree's leaves lie on one orbit, the start at number ``origin``.
        tree, origin, candidate, accepted = [start], 0, start, False
        num_leaves, depth, acceptance, diverging = 0, 0, 0.0, False
        while depth < self.max_tree_depth:
            ahead = noise.forward[depth]
            edge, step = (tree[-1], self.step_size) if ahead else (tree[0], -self.step_size)
            new, valid, diverging = self.build_tree(edge, step, depth, start.hamiltonian)
            num_leaves += len(new)
            for leaf in new:
                error = leaf.hamiltonian - start.hamiltonian
                acceptance += 0.0 if math.isnan(error) else math.exp(-max(error, 0.0))
            depth += 1
            if not valid:
                break
            weights = log_weights(new)
            shares = weights - np.logaddexp.accumulate(weights)
            for leaf, share, log_uniform in zip(new, shares, noise.log_uniform_leaf[depth - 1]):
                if leaf is new[0] or log_uniform < share:
                    chosen = leaf
            change = np.logaddexp.reduce(weights) - np.logaddexp.reduce(log_weights(tree))
            if noise.log_uniform_subtree[depth - 1] < change:
                candidate, accepted = chosen, True
            tree = tree + new if ahead else new[::-1] + tree
            origin += 0 if ahead else len(new)
            if self.has_turned(tree):
                break
        return Transition(
            candidate.position,
            candidate.hamiltonian,
            accepted,
            next(i for i, leaf in enumerate(tree) if leaf is candidate) - origin,
            diverging,
            num_leaves,
            depth,
            acceptance / num_leaves,
        )


# --- Targets with known moments -------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A density on one site ``z`` with ``dim`` coordinates.

    ``standardise`` maps draws ``(..., dim)`` to statistics ``(..., K)`` of mean 0 and variance 1
    under the target.
    """

    dim: int
    potential: Callable[[dict[str, torch.Tensor]], torch.Tensor]
    standardise: Callable[[torch.Tensor], torch.Tensor]

    def start(self, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A start that is not the target: shifted, and half as wide as a unit normal."""
        noise = torch.randn(rows, self.dim, generator=generator, dtype=torch.get_default_dtype())
        return {"z": 1.0 + 0.5 * noise}


def correlated_gaussian(dim: int, correlation: float) -> Target:
    """Autoregressive correlation, standard deviations from 0.5 to 1.5, a mean that is not 0.

    Statistics: the coordinates, and the whitened coordinates, which see the covariance too.
    """
    index = torch.arange(dim, dtype=torch.float64)
    scale = torch.linspace(0.5, 1.5, dim, dtype=torch.float64)
    covariance = correlation ** (index[:, None] - index).abs() * scale * scale[:, None]
    cholesky = torch.linalg.cholesky(covariance)
    whiten = torch.linalg.inv(cholesky)
    mean = torch.sin(index)

    def potential(latents):
        z = latents["z"]
        return 0.5 * ((z - mean.to(z)) @ whiten.T.to(z)).square().sum(-1)

    def standardise(z):
        centred = z - mean.to(z)
        return torch.cat([centred / scale.to(z), centred @ whiten.T.to(z)], -1)

    return Target(dim, potential, standardise)


def log_gamma(*shapes: float) -> Target:
    """``exp(z) ~ Gamma(shape, 1)`` per coordinate: skewed, with one light and one heavy tail."""
    shape = torch.tensor(shapes, dtype=torch.float64)
    mean, variance = torch.digamma(shape), torch.polygamma(1, shape)

    def potential(latents):
        z = latents["z"]
        return (z.exp() - shape.to(z) * z).sum(-1)

    return Target(len(shapes), potential, lambda z: (z - mean.to(z)) * variance.rsqrt().to(z))


def funnel(scale: float = 1.0) -> Target:
    """Neal's funnel with a mild neck: ``v ~ N(0, scale^2)`` and two coordinates ``N(0, exp(v))``.

    Statistics: v, and both coordinates divided by exp(v / 2), which are standard normal.
    """

    def potential(latents):
        v, x = latents["z"][:, 0], latents["z"][:, 1:]
        return (
            0.5 * (v / scale).square()
            + 0.5 * x.square().sum(-1) * (-v).exp()
            + 0.5 * x.shape[1] * v
        )

    def standardise(z):
        return torch.cat([z[..., :1] / scale, z[..., 1:] * (-0.5 * z[..., :1]).exp()], -1)

    return Target(3, potential, standardise)


TARGETS = {
    "gaussian-2": correlated_gaussian(2, 0.8),
    "gaussian-8": correlated_gaussian(8, 0.6),
    "gaussian-64": correlated_gaussian(64, 0.5),
    "log-gamma": log_gamma(0.7, 1.0, 4.0),
    "funnel": funnel(),
}


# --- The statistical check ------------------------------------------------------------------------

STANDARD_ERRORS = 5.0


def assert_moments(statistics: torch.Tensor, min_ess: float) -> None:
    """Means 0 and variances 1 within 5 Monte-Carlo standard errors, and enough independent draws.

    Rows are independent chains, so the averages of the chains are independent and their spread
    gives the standard error without any model of autocorrelation. With hundreds of rows the ratio
    is close to a standard normal, which exceeds 5 with probability 5.7e-7: a correct sampler fails
    a call with 2K moments with probability below 1.2e-6 K.

    Args:
        statistics: ``(draws, rows, K)``, each of mean 0 and variance 1 under the target.
        min_ess: independent draws, over all rows together, that the estimate of each mean must be
            worth. Without it a chain that stands still could pass by having no power.
    """
    assert statistics.isfinite().all(), "a chain has left for infinity"
    statistics = statistics.double()
    for name, values in (("mean", statistics), ("variance", statistics.square() - 1.0)):
        per_row = values.mean(0)
        error = per_row.std(0) / per_row.shape[0] ** 0.5
        score = per_row.mean(0) / error
        worst = int(score.abs().argmax())
        assert score.abs().max() < STANDARD_ERRORS, (
            f"{name} of statistic {worst} is off by {per_row.mean(0)[worst]:+.3f}, "
            f"{score[worst]:+.1f} standard errors"
        )
        if name == "mean":
            ess = error.square().reciprocal().min()
    assert ess >= min_ess, (
        f"the draws are worth {ess:.0f} independent ones (ESS), not {min_ess:.0f}"
    )
