r"""The No-U-Turn Sampler, one independent tree per image, grown in lockstep under masks.

Multinomial NUTS: a trajectory is doubled forwards or backwards in time until it turns back on
itself, states being drawn with weights :math:`\exp(-H)`. Within a new subtree a leaf replaces the
candidate with probability (its weight) / (weight so far); between the old tree and a complete new
subtree the candidate changes with probability :math:`\min(1, w_\mathrm{new} / w_\mathrm{old})`. A
(sub)tree with end momenta :math:`r_-, r_+` and momentum sum :math:`\rho` has turned when

.. math:: r_\pm^\top M^{-1} \bigl(\rho - \tfrac12 (r_- + r_+)\bigr) \le 0

for one of its ends; a new subtree any part of which has turned or diverged is dropped whole, which
keeps the transition reversible.

The tree is built leaf by leaf instead of recursively. Leaf n closes as many subtrees as n has
trailing one bits, and their first leaves are remembered under the number of one bits of n // 2, so
that ``max_tree_depth`` momenta suffice. Because all growing trees of a batch have the same depth,
these indices are ordinary integers. The end of a loop is a question to the device (is any tree
still growing?), asked once per leaf, next to a full gradient.

References: Hoffman, Gelman, "The No-U-Turn Sampler", JMLR 2014, https://arxiv.org/abs/1111.4246;
Betancourt, "A conceptual introduction to HMC", 2017, https://arxiv.org/abs/1701.02434, appendix
A.4; Phan, Pradhan, Jankowiak, "Composable effects for flexible and accelerated probabilistic
programming in NumPyro", 2019, https://arxiv.org/abs/1912.11554 (the iterative scheme).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence.mcmc import hmc
from pyro_vae_defence.mcmc.hmc import HMCInfo, HMCState
from pyro_vae_defence.mcmc.integrators import Phase, kinetic_energy, leapfrog, velocity
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import Latents, LatentsLike, Potential

_DIRECTION = 1
_SUBTREE = 2
_LEAF = 3  # + depth


class _End(NamedTuple):
    """An end of a tree, ``offset`` leapfrog steps from where the transition began."""

    phase: Phase
    offset: Tensor


class _Candidate(NamedTuple):
    position: Latents
    energy: Tensor
    gradient: Latents
    hamiltonian: Tensor
    offset: Tensor


class _Subtree(NamedTuple):
    end: _End
    candidate: _Candidate
    log_weight: Tensor
    momentum_sum: Latents
    complete: Tensor
    diverging: Tensor
    acceptance_sum: Tensor
    num_leaves: Tensor


def is_turning(
    momentum_left: LatentsLike,
    momentum_right: LatentsLike,
    momentum_sum: LatentsLike,
    inverse_mass: LatentsLike | None,
) -> Tensor:
    """The generalised U-turn criterion per image, bool ``(N,)``."""
    ends = lat.add(momentum_left, momentum_right)
    middle = velocity(lat.add(momentum_sum, ends, -0.5), inverse_mass)
    return (lat.dot(momentum_left, middle) <= 0) | (lat.dot(momentum_right, middle) <= 0)


def _where(mask: Tensor, a: Any, b: Any) -> Any:
    """Rows of ``a`` where ``mask`` holds, rows of ``b`` elsewhere, in every part."""
    if isinstance(a, Tensor):
        return torch.where(mask, a, b)
    if isinstance(a, dict):
        return lat.where(mask, a, b)
    return type(a)(*(_where(mask, x, y) for x, y in zip(a, b)))


def _subtrees_closed_by(leaf: int) -> range:
    """Checkpoints of the subtrees whose last leaf is ``leaf``, inner first; none if it is even."""
    last = (leaf >> 1).bit_count()
    trailing_ones = (leaf ^ (leaf + 1)).bit_length() - 1
    return range(last, last - trailing_ones, -1)


def _grow(
    potential: Potential,
    edge: _End,
    start: Tensor,
    direction: Tensor,
    step_size: Tensor,
    log_uniform: Tensor,
    growing: Tensor,
    inverse_mass: LatentsLike | None,
) -> _Subtree:
    """Add leaves beyond ``edge`` to the trees marked by ``growing``, one per ``log_uniform``."""
    phase, offset = edge
    candidate = _Candidate(phase.position, phase.energy, phase.gradient, start, offset)
    log_weight = torch.full_like(step_size, -torch.inf)
    momentum_sum = {name: torch.zeros_like(value) for name, value in phase.momentum.items()}
    turning = torch.zeros_like(growing)
    diverging = torch.zeros_like(growing)
    acceptance_sum = torch.zeros_like(step_size)
    leaves = torch.zeros_like(offset)
    checkpoints: dict[int, tuple[Latents, Latents]] = {}
    signed_step = direction * step_size
    asked = growing

    for leaf in range(log_uniform.shape[1]):
        if leaf > 0 and not bool(growing.any()):
            break
        phase = _where(growing, leapfrog(potential, phase, signed_step, inverse_mass), phase)
        offset = offset + direction
        hamiltonian = phase.energy + kinetic_energy(phase.momentum, inverse_mass)
        error = hmc.energy_error(hamiltonian, start)

        acceptance_sum += torch.where(growing, (-error).clamp(max=0.0).exp(), 0.0)
        leaves += growing
        total = torch.logaddexp(log_weight, -error)
        # The first finite leaf is always taken, even where a float32 uniform has rounded to 1; a
        # leaf of zero weight never is (inf - inf is NaN).
        taken = growing & (log_uniform[:, leaf] <= -error - total)
        at_leaf = _Candidate(phase.position, phase.energy, phase.gradient, hamiltonian, offset)
        candidate = _where(taken, at_leaf, candidate)
        log_weight = torch.where(growing, total, log_weight)
        momentum_sum = lat.where(growing, lat.add(momentum_sum, phase.momentum), momentum_sum)

        diverging |= growing & (error > hmc.DIVERGENCE_THRESHOLD)
        if leaf % 2 == 0:
            checkpoints[(leaf >> 1).bit_count()] = (phase.momentum, momentum_sum)
        for number in _subtrees_closed_by(leaf):
            first, sum_before = checkpoints[number]
            part = lat.add(lat.add(momentum_sum, sum_before, -1.0), first)
            turning |= growing & is_turning(first, phase.momentum, part, inverse_mass)
        growing = growing & ~diverging & ~turning

    end = _End(phase, offset)
    return _Subtree(
        end, candidate, log_weight, momentum_sum, asked & growing, diverging, acceptance_sum, leaves
    )


def step(
    potential: Potential,
    state: HMCState,
    streams: Streams,
    step_size: Tensor,
    max_tree_depth: int = 10,
    inverse_mass: LatentsLike | None = None,
) -> tuple[HMCState, HMCInfo]:
    """One transition of every chain: at most ``2 ** max_tree_depth - 1`` gradients.

    ``max_tree_depth`` is the largest number of doublings; the other arguments are those of
    :func:`~pyro_vae_defence.mcmc.hmc.step`. In the info, ``offset`` tells which leaf was chosen.
    """
    momentum = hmc.draw_momentum(streams, state.step, state.position, inverse_mass)
    start = state.energy + kinetic_energy(momentum, inverse_mass)
    offset = torch.zeros_like(step_size, dtype=torch.long)
    left = right = _End(Phase(state.position, momentum, state.energy, state.gradient), offset)
    candidate = _Candidate(state.position, state.energy, state.gradient, start, offset)
    log_weight = torch.zeros_like(step_size)
    momentum_sum = momentum
    active = torch.ones_like(step_size, dtype=torch.bool)
    diverging = torch.zeros_like(active)
    acceptance_sum = torch.zeros_like(step_size)
    num_leaves = torch.zeros_like(offset)
    depths = torch.zeros_like(offset)
    shape = (max_tree_depth,)
    forward = streams.uniform(state.step, _DIRECTION, shape, step_size.dtype) > 0.5
    log_uniform = streams.uniform(state.step, _SUBTREE, shape, step_size.dtype).log()

    for depth in range(max_tree_depth):
        if depth > 0 and not bool(active.any()):
            break
        ahead = forward[:, depth]
        edge, direction = _where(ahead, right, left), torch.where(ahead, 1, -1)
        choices = streams.uniform(state.step, _LEAF + depth, (2**depth,), step_size.dtype).log()
        subtree = _grow(potential, edge, start, direction, step_size, choices, active, inverse_mass)
        depths += active
        diverging |= subtree.diverging
        acceptance_sum += subtree.acceptance_sum
        num_leaves += subtree.num_leaves
        complete = subtree.complete

        taken = complete & (log_uniform[:, depth] < subtree.log_weight - log_weight)
        candidate = _where(taken, subtree.candidate, candidate)
        total = torch.logaddexp(log_weight, subtree.log_weight)
        log_weight = torch.where(complete, total, log_weight)
        whole = lat.add(momentum_sum, subtree.momentum_sum)
        momentum_sum = lat.where(complete, whole, momentum_sum)
        right = _where(complete & ahead, subtree.end, right)
        left = _where(complete & ~ahead, subtree.end, left)
        turning = is_turning(left.phase.momentum, right.phase.momentum, momentum_sum, inverse_mass)
        active = complete & ~turning

    info = HMCInfo(
        acceptance_rate=acceptance_sum / num_leaves,
        accepted=candidate.offset != 0,
        diverging=diverging,
        energy=candidate.hamiltonian,
        step_size=step_size,
        num_steps=num_leaves,
        tree_depth=depths,
        offset=candidate.offset,
    )
    return HMCState(*candidate[:3], state.step + 1), info
