r"""Walks through temperatures, kept in a set: log-masses of a density by sequential Monte Carlo.

Between a base q and a target :math:`e^{-U}` stand the densities :math:`\pi_b \propto q^{1-b}
e^{-bU}`, at inverse temperatures :math:`b_0, \dots, b_K`. R walks of every image move along them,
each temperature by one Hamiltonian transition that leaves :math:`\pi_b`, restricted to a set A,
invariant (:mod:`~pyro_vae_defence.mcmc.bouncing`). From :math:`b_{k-1}` to :math:`b_k` a walk's
weight takes the factor

.. math:: \exp\bigl[(b_k - b_{k-1})(-U(z) - \log q(z))\bigr].

Rising from draws of q restricted to A, the mean weight is :math:`\int_A e^{-U}` in expectation;
falling from draws of the target restricted to A, it is the inverse of that, if q integrates to 1
over A. Where the weights of an image's rising walks have become uneven (an effective number below
R/2) the walks are drawn anew by their weights, which leaves the expectation as it is.

A transition must not depend on the states visited, which would bias the weights: step sizes are
tuned on a walk of their own and then frozen.

Everything here is a pure function of tensors. References: Del Moral, Doucet, Jasra, "Sequential
Monte Carlo samplers", 2006, https://doi.org/10.1111/j.1467-9868.2006.00553.x; Lee, Whiteley,
"Variance estimation in the particle filter", 2018, https://arxiv.org/abs/1509.00394.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence.mcmc import bouncing, hmc
from pyro_vae_defence.mcmc.integrators import energy_and_gradient
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import Latents, LatentsLike, Potential

TARGET_ACCEPTANCE = 0.8
_GAIN = 0.3  # change of the log step size per temperature for an acceptance rate wrong by one
_REDRAW = 2  # purpose of the streams, beside those of HMC


class Point(NamedTuple):
    """Where walks are, and what is known there: rows ``(R * N)``, walk after walk.

    Attributes:
        position: latents.
        target, base: energies U and -log q, ``(R * N,)``, in nats.
        target_force, base_force: their gradients.
    """

    position: Latents
    target: Tensor
    base: Tensor
    target_force: Latents
    base_force: Latents

    @classmethod
    def at(cls, target: Potential, base: Potential, position: LatentsLike) -> Point:
        """Both energies and their gradients at latents."""
        energy, force = energy_and_gradient(target, position)
        energy_of_base, force_of_base = energy_and_gradient(base, position)
        return cls(lat.detach(position), energy, energy_of_base, force, force_of_base)

    def where(self, rows: Tensor, other: Point) -> Point:
        """This one's ``rows``, bool, and the other's elsewhere."""
        return Point(
            lat.where(rows, self.position, other.position),
            torch.where(rows, self.target, other.target),
            torch.where(rows, self.base, other.base),
            lat.where(rows, self.target_force, other.target_force),
            lat.where(rows, self.base_force, other.base_force),
        )

    def take(self, rows: Tensor) -> Point:
        """The rows of these numbers."""
        return Point(
            lat.index(self.position, rows),
            self.target[rows],
            self.base[rows],
            lat.index(self.target_force, rows),
            lat.index(self.base_force, rows),
        )

    def tempered(self, b: float) -> tuple[Tensor, Latents]:
        """Energy and its gradient at inverse temperature ``b``."""
        force = {n: b * self.target_force[n] + (1 - b) * self.base_force[n] for n in self.position}
        return b * self.target + (1 - b) * self.base, force


class _Tempered:
    """The energy of one temperature, which remembers what it was made of."""

    def __init__(self, target: Potential, base: Potential, b: float) -> None:
        self.target, self.base, self.b = target, base, b
        self.last: Point | None = None

    def __call__(self, latents: LatentsLike) -> Tensor:
        return self.energy_and_gradient(latents)[0]

    def energy_and_gradient(self, latents: LatentsLike) -> tuple[Tensor, Latents]:
        self.last = Point.at(self.target, self.base, latents)
        return self.last.tempered(self.b)


class WalkResult(NamedTuple):
    """What walks have found.

    Attributes:
        log_mass: estimate of log of the integral of exp(-U) over the set, ``(N,)``, in nats.
        variance: of that estimate relative to the mass, from which walks the present ones stem,
            ``(N,)``: Lee and Whiteley's without its factor for the number of times that walks were
            drawn anew, which systematic drawing does not need. At most 1, which says that it is
            larger.
        effective: effective number of walks at the end, 1 to R, ``(N,)``.
        end: where the walks are; rows drawn anew by their weights if they rose.
        acceptance_rate: of each transition, ``(K - 1, R * N)``.
        step_sizes: likewise.
    """

    log_mass: Tensor
    variance: Tensor
    effective: Tensor
    end: Point
    acceptance_rate: Tensor
    step_sizes: Tensor


def move(
    target: Potential,
    base: Potential,
    point: Point,
    b: float,
    step: int,
    streams: Streams,
    step_size: Tensor,
    num_steps: int,
    inverse_mass: LatentsLike | None = None,
    margin: bouncing.Margin | None = None,
) -> tuple[Point, Tensor]:
    """One transition at inverse temperature ``b``, and its acceptance rates: ``num_steps``
    gradients. Arguments as those of :func:`walk`."""
    energy = _Tempered(target, base, b)
    state = hmc.HMCState(point.position, *point.tempered(b), step)
    if margin is None:
        _, info = hmc.step(energy, state, streams, step_size, num_steps, inverse_mass)
    else:
        _, info = bouncing.step(energy, state, streams, step_size, num_steps, margin, inverse_mass)
    assert energy.last is not None
    return energy.last.where(info.accepted, point), info.acceptance_rate


def walk(
    target: Potential,
    base: Potential,
    start: LatentsLike,
    num_walks: int,
    schedule: Tensor | Sequence[float],
    streams: Streams,
    step_sizes: Tensor,
    num_steps: int,
    inverse_mass: Callable[[float], LatentsLike | None] = lambda b: None,
    margin: bouncing.Margin | None = None,
    tune: bool = False,
) -> WalkResult:
    """Let ``num_walks`` walks of each image rise from the base, or fall from the target.

    Args:
        target, base: energies U and -log q, of ``num_walks * N`` rows.
        start: latents of these rows in the set: draws of the base, or of the target.
        num_walks: R.
        schedule: inverse temperatures, from 0 to 1 or from 1 to 0.
        streams: of the rows.
        step_sizes: one for each transition, ``(K - 1,)``, or ``(K - 1, R * N)``.
        num_steps: leapfrog steps of a transition.
        inverse_mass: diagonal of M^-1 by inverse temperature.
        margin: how far inside of its set each row lies; all latents do when ``None``.
        tune: every row moves its step size towards an acceptance rate of 0.8, which makes the
            weights worthless and the step sizes useful.
    """
    temperatures = [float(value) for value in schedule]
    rising = temperatures[0] < temperatures[-1]
    point = Point.at(target, base, start)
    rows = point.target.shape[0]
    log_weights = point.target.new_zeros((num_walks, rows // num_walks))
    log_mass = torch.zeros_like(log_weights[0])
    number = torch.arange(num_walks, device=log_weights.device)[:, None].expand_as(log_weights)
    ancestors = number
    rates, sizes = [], []
    factor = point.target.new_ones(rows)
    for step, (now, then) in enumerate(itertools.pairwise(temperatures)):
        log_weights = log_weights + (now - then) * (point.target - point.base).view_as(log_weights)
        if step == len(temperatures) - 2:
            break
        if rising:
            uneven = _effective(log_weights) < 0.5 * num_walks
            log_mass = log_mass + torch.where(uneven, _log_mean(log_weights), 0.0)
            drawn = torch.where(uneven, _redraw(log_weights, streams, step), number)
            log_weights = torch.where(uneven, 0.0, log_weights)
            ancestors = ancestors.gather(0, drawn)
            point = point.take(_rows(drawn))
        size = (step_sizes[step] * factor).expand(rows)
        point, rate = move(
            target, base, point, then, step, streams, size, num_steps, inverse_mass(then), margin
        )
        if tune:
            factor = factor * (_GAIN * (rate - TARGET_ACCEPTANCE)).exp()
        rates.append(rate)
        sizes.append(size)
    log_mass = log_mass + _log_mean(log_weights)
    effective = _effective(log_weights)
    families = torch.zeros_like(log_weights).scatter_add(0, ancestors, log_weights.softmax(0))
    variance = (families - 1 / num_walks).square().sum(0) * num_walks / max(1, num_walks - 1)
    if num_walks == 1:
        variance = torch.ones_like(variance)
    if rising:
        point = point.take(_rows(_redraw(log_weights, streams, len(temperatures))))
    else:
        log_mass = -log_mass
    return WalkResult(log_mass, variance, effective, point, torch.stack(rates), torch.stack(sizes))


def _log_mean(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def _effective(log_weights: Tensor) -> Tensor:
    return 1 / log_weights.softmax(0).square().sum(0)


def _rows(walks: Tensor) -> Tensor:
    """Numbers of walks of each image, ``(R, N)``, to numbers of rows ``(R * N,)``."""
    return (walks * walks.shape[1] + torch.arange(walks.shape[1], device=walks.device)).flatten()


def _redraw(log_weights: Tensor, streams: Streams, step: int) -> Tensor:
    """Systematic resampling: numbers of walks of each image, by their weights, ``(R, N)``."""
    walks, images = log_weights.shape
    # In float64, where a sum of weights is 1 within less than what a walk more or less takes.
    ends = log_weights.double().softmax(0).cumsum(0)
    uniform = streams.uniform(step, _REDRAW, (), torch.float64).view(walks, images)[0]
    places = (torch.arange(walks, device=ends.device)[:, None] + uniform) / walks
    found = torch.searchsorted(ends.T.contiguous(), places.T.contiguous())
    return found.T.clamp(max=walks - 1)
