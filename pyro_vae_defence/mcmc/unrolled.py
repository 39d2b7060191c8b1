r"""Chains as differentiable functions of the image and of where they start.

A transition makes discrete decisions (accept or not, which leaf of a tree) and continuous moves.
With the noise and the decisions of a run frozen, where the chain ends is a smooth function of the
image x and of the start :math:`z_0`: each transition follows the leapfrog orbit

.. math:: (z, r) \mapsto \Phi_\epsilon^{k}(z, r), \qquad r = M^{1/2} \xi_t, \quad k \in \mathbb{Z},

for a number k of steps that the run has decided: 0 where it rejected, L where HMC accepted, and in
NUTS the signed distance from the start to the leaf that was chosen, all of whose trees lie on one
orbit. :func:`record` runs a kernel and notes k and the step size per chain, :func:`replay` follows
them again with a graph through every gradient of U (so that U is differentiated twice). A chain
that has arrived takes steps of size zero, which is the identity in values and in derivatives, so
that rows need no masks and discarded moves cannot spoil a gradient with NaN.

The derivative is that of one trajectory. It omits how decisions, and step sizes that adapt, depend
on x, and is therefore biased for the derivative of an expectation, by the flow of probability
across the boundaries of decisions. The published chain, whose step size follows the acceptance of
its whole batch to the end (eq. 67), is no exception: its step sizes are recorded, and constants.

Through many transitions a derivative may grow without bound although the chain mixes: frozen
noise makes it a product of as many Jacobians as there are leapfrog steps, each of determinant one.
Nothing is clipped here. What overflows is infinite or NaN, in its own row alone; attacks take such
entries for zero, and those that step along signs see no scale.

Memory is bounded by recomputing: a transition keeps where it started, and its graph is built again
when its gradient is asked for. Until then nothing is computed where the run has recorded the end of
every transition. Nothing is read back to the host, except that NUTS asks for the longest of its
chains.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_vae_defence.mcmc.hmc import HMCInfo, draw_momentum
from pyro_vae_defence.mcmc.integrators import Phase, leapfrog
from pyro_vae_defence.mcmc.kernels import BatchedKernel
from pyro_vae_defence.mcmc.samplers import BatchedHMC, BatchedNUTS
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import ImageEnergy, Latents, LatentsLike


class Decision(NamedTuple):
    """What a transition decided, per chain.

    Attributes:
        step: number of the transition, which selects its noise.
        step_size: leapfrog step size, ``(N,)``.
        offset: leapfrog steps from the old state to the new one, int64 ``(N,)``: negative against
            time, 0 for a chain that stayed.
        length: a number of leapfrog steps that no chain exceeds, as small as is known without
            asking the device.
        end: where the transition ended, latents of ``N`` rows.
    """

    step: int
    step_size: Tensor
    offset: Tensor
    length: int
    end: Latents


def record(
    kernel: BatchedKernel,
    x: Tensor,
    start: LatentsLike,
    streams: Streams,
    num_transitions: int,
    warmup_steps: int = 0,
) -> tuple[Latents, list[Decision]]:
    """Run a kernel: where its chains end, without graph, and one decision per transition.

    Args:
        kernel: a kernel of this library, made from a Pyro model and not running elsewhere.
        x: images ``(N, C, H, W)``, the model's argument.
        start: unconstrained latents of ``N`` rows.
        streams: random streams of the rows.
        num_transitions: transitions in all, >= 1.
        warmup_steps: how many of them adapt.

    Raises:
        ValueError: for a kernel whose decisions are not known, a number out of range, or a chain
            that would start at a non-finite energy.
    """
    if not isinstance(kernel, (BatchedHMC, BatchedNUTS)):
        got = type(kernel).__name__
        raise ValueError(f"kernel must be a BatchedHMC or BatchedNUTS to be unrolled, got {got}")
    if kernel.burn_in > 0:
        got = f"burn_in={kernel.burn_in}"
        raise ValueError(f"kernel has {got}, which is not unrolled; use burn_in=0")
    end, decisions = lat.detach(start), []
    steps = _transitions(kernel, x, start, streams, num_transitions, warmup_steps)
    for step, (end, info) in enumerate(steps):
        if isinstance(kernel, BatchedHMC):  # a chain stays, or goes the whole length
            length = kernel.gradients_of(streams.seed, step)
        else:
            length = int(info.offset.abs().max())
        decisions.append(Decision(step, info.step_size, info.offset, length, end))
    return end, decisions


def run(
    kernel: BatchedKernel,
    x: Tensor,
    start: LatentsLike,
    streams: Streams,
    num_transitions: int,
    warmup_steps: int = 0,
    number: int = 1,
) -> list[Latents]:
    """Where the chains of any batched kernel are after each of the last ``number`` transitions, the
    last one last; the other arguments are those of :func:`record`."""
    steps = _transitions(kernel, x, start, streams, num_transitions, warmup_steps)
    return list(deque((position for position, _ in steps), maxlen=number))


def _transitions(
    kernel: BatchedKernel,
    x: Tensor,
    start: LatentsLike,
    streams: Streams,
    num_transitions: int,
    warmup_steps: int,
) -> Iterator[tuple[Latents, HMCInfo]]:
    check_integer("num_transitions", num_transitions)
    kernel.streams = streams
    kernel.setup(warmup_steps, x.detach())
    position = lat.detach(start)
    for _ in range(num_transitions):
        position = kernel.sample(position)
        assert kernel.info is not None
        yield position, kernel.info


def replay(
    energy: ImageEnergy,
    x: Tensor,
    start: LatentsLike,
    streams: Streams,
    decisions: list[Decision],
    inverse_mass: LatentsLike | None = None,
    recorded: bool = False,
) -> Latents:
    """Follow recorded decisions again: where the chains end, differentiable in ``x`` and ``start``.

    Args:
        energy: U(z; x) on the unconstrained scale, twice differentiable.
        x, start: images and latents, of the run or others.
        streams, inverse_mass: those of the run.
        decisions: those of :func:`record`, or its last ones.
        recorded: ``x`` and ``start`` have the values of the run, so that transitions end where they
            did then, and are computed again for their gradients alone.
    """
    names = tuple(start)

    def follow(decision: Decision, x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        position = dict(zip(names, values, strict=True))
        potential = _Tracked(energy, x)
        momentum = draw_momentum(streams, decision.step, position, inverse_mass)
        # Nobody reads the energies.
        unread = torch.zeros_like(decision.step_size)
        phase = Phase(position, momentum, unread, potential.force(position))
        for number in range(decision.length):
            moving = number < decision.offset.abs()
            step_size = torch.where(moving, decision.offset.sign() * decision.step_size, 0.0)
            phase = leapfrog(potential, phase, step_size, inverse_mass, needs_energy=False)
        return tuple(phase.position[name] for name in names)

    values = tuple(start.values())
    for decision in decisions:
        ends = tuple(decision.end[name] for name in names) if recorded else None
        values = _Recomputed.apply(functools.partial(follow, decision), ends, x, *values)
    return dict(zip(names, values, strict=True))


class _Tracked(NamedTuple):
    """U(.; x) whose force has a graph where gradients are recorded, and none elsewhere."""

    energy: ImageEnergy
    x: Tensor

    def __call__(self, latents: Latents, /) -> Tensor:
        return self.energy(self.x, latents)

    def force(self, position: Latents) -> Latents:
        """Gradient of U in z, which ``leapfrog`` asks for."""
        if not torch.is_grad_enabled():
            return lat.value_and_gradient(self, position)[1]
        total = self(position).sum()
        gradients = torch.autograd.grad(total, tuple(position.values()), create_graph=True)
        return dict(zip(position, gradients, strict=True))


class _Recomputed(torch.autograd.Function):
    """A function, or its values, without its graph, which is built when a gradient is asked for.

    ``torch.utils.checkpoint`` will not do: the function takes gradients itself, and the reentrant
    variant would leave gradients on a model's parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., tuple[Tensor, ...]],
        values: tuple[Tensor, ...] | None,
        *inputs: Tensor,
    ) -> Any:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        if values is not None:  # known; views, since an input cannot be an output of its own
            return tuple(value.view_as(value) for value in values)
        with torch.no_grad():
            return function(*(value.detach() for value in inputs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with torch.enable_grad():
            inputs = tuple(value.detach().requires_grad_() for value in ctx.saved_tensors)
            outputs = ctx.function(*inputs)
            found = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
        return (None, None, *found)


@dataclass(eq=False, repr=False)
class UnrolledKernel:
    """A kernel's run as a function that is differentiable in the image and in the start.

    Called without gradients being recorded, it just runs the kernel.

    Args:
        make_kernel: makes a fresh :class:`~pyro_vae_defence.mcmc.BatchedHMC` or
            :class:`~pyro_vae_defence.mcmc.BatchedNUTS` for a Pyro model.
        energy: the energy of that model, U(z; x) on the unconstrained scale.
        num_transitions: transitions in all, >= 1.
        warmup_steps: how many of them adapt.
    """

    make_kernel: Callable[[], BatchedKernel]
    energy: ImageEnergy
    num_transitions: int
    warmup_steps: int = 0

    def __call__(self, x: Tensor, start: LatentsLike, streams: Streams) -> Latents:
        """Where chains end from unconstrained latents of ``N`` rows, for ``N`` images."""
        return self.last(x, start, streams)[-1]

    def last(
        self, x: Tensor, start: LatentsLike, streams: Streams, number: int = 1
    ) -> list[Latents]:
        """Where they are after each of the last ``number`` transitions, the last one last.

        Raises:
            ValueError: if there are not so many.
        """
        if not 1 <= number <= max(1, self.num_transitions):
            raise ValueError(
                f"number must be in 1..{self.num_transitions}, the transitions, got {number!r}"
            )
        kernel = self.make_kernel()
        numbers = self.num_transitions, self.warmup_steps
        if not torch.is_grad_enabled():
            return run(kernel, x, start, streams, *numbers, number)
        with torch.no_grad():
            _, decisions = record(kernel, x, start, streams, *numbers)
        first = len(decisions) - number + 1
        found: list[Latents] = []
        for part in (decisions[:first], *([each] for each in decisions[first:])):
            begin = found[-1] if found else start
            found.append(
                replay(self.energy, x, begin, streams, part, kernel.inverse_mass, recorded=True)
            )
        return found
