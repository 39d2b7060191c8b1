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
across the boundaries of decisions.

Memory is bounded by recomputing: a transition keeps where it started, and its graph is built again
when its gradient is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_vae_defence.mcmc import hmc
from pyro_vae_defence.mcmc.integrators import Phase, energy_and_gradient, leapfrog, velocity
from pyro_vae_defence.mcmc.kernels import BatchedHMC, BatchedKernel, BatchedNUTS
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import ImageEnergy, Latents, LatentsLike, Potential

ADAM_DECAYS = (0.9, 0.999)
"""Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015,
https://arxiv.org/abs/1412.6980."""
_ADAM_EPSILON = 1e-8


class Decision(NamedTuple):
    """What a transition decided, per chain.

    Attributes:
        step: number of the transition, which selects its noise.
        step_size: leapfrog step size, ``(N,)``.
        offset: leapfrog steps from the old state to the new one, int64 ``(N,)``: negative against
            time, 0 for a chain that stayed.
        length: largest number of leapfrog steps of a chain.
    """

    step: int
    step_size: Tensor
    offset: Tensor
    length: int


# --- Recording ------------------------------------------------------------------------------------


def record(
    kernel: BatchedKernel,
    x: Tensor,
    start: LatentsLike,
    streams: Streams,
    num_transitions: int,
    warmup_steps: int = 0,
) -> tuple[Latents, list[Decision]]:
    """Run a kernel and note its decisions.

    Args:
        kernel: a kernel of this library, made from a Pyro model and not running elsewhere.
        x: images ``(N, C, H, W)``, the model's argument.
        start: unconstrained latents of ``N`` rows.
        streams: random streams of the rows.
        num_transitions: transitions in all, >= 1.
        warmup_steps: how many of them adapt.

    Returns:
        Where the chains end, unconstrained and without graph, and one decision per transition.

    Raises:
        ValueError: for a kernel whose decisions are not known, a number out of range, or a chain
            that would start at a non-finite energy.
    """
    if not isinstance(kernel, (BatchedHMC, BatchedNUTS)):
        raise ValueError(
            "kernel must be a BatchedHMC or BatchedNUTS to be unrolled, got "
            f"{type(kernel).__name__}"
        )
    if kernel.burn_in > 0:
        raise ValueError(
            f"kernel has burn_in={kernel.burn_in}, which is not unrolled; use burn_in=0"
        )
    inverse_mass = _inverse_mass(kernel.inverse_mass_matrix, start)
    before, decisions = lat.detach(start), []
    steps = _transitions(kernel, x, start, streams, num_transitions, warmup_steps)
    for step, (position, info) in enumerate(steps):
        if isinstance(kernel, BatchedNUTS):
            reach = int(info.num_steps.max())
            offset = _find_offset(
                kernel.potential, before, position, streams, step, info.step_size, reach, inverse_mass
            )  # fmt: skip
        else:
            offset = torch.where(info.accepted, info.num_steps, 0)
        decisions.append(Decision(step, info.step_size, offset, int(offset.abs().max())))
        before = position
    return before, decisions


def run(
    kernel: BatchedKernel,
    x: Tensor,
    start: LatentsLike,
    streams: Streams,
    num_transitions: int,
    warmup_steps: int = 0,
) -> Latents:
    """Where the chains end that :func:`record` follows, for any batched kernel and without noting
    decisions."""
    end = lat.detach(start)
    for position, _ in _transitions(kernel, x, start, streams, num_transitions, warmup_steps):
        end = position
    return end


def _transitions(
    kernel: BatchedKernel,
    x: Tensor,
    start: LatentsLike,
    streams: Streams,
    num_transitions: int,
    warmup_steps: int,
) -> Iterator[tuple[Latents, hmc.HMCInfo]]:
    if not num_transitions >= 1:
        raise ValueError(f"num_transitions must be at least 1, got {num_transitions!r}")
    kernel.streams = streams
    kernel.setup(warmup_steps, x.detach())
    position = lat.detach(start)
    for _ in range(num_transitions):
        position = kernel.sample(position)
        assert kernel.info is not None
        yield position, kernel.info


def _find_offset(
    potential: Potential,
    start: LatentsLike,
    end: LatentsLike,
    streams: Streams,
    step: int,
    step_size: Tensor,
    reach: int,
    inverse_mass: LatentsLike | None,
) -> Tensor:
    """Signed number of leapfrog steps after which the orbit through ``start`` comes closest to
    ``end``.

    The leaf chosen was computed by the same steps, so the distance is zero but for rounding.
    """

    def distance(position: LatentsLike) -> Tensor:
        return lat.sum_sites({n: (v - end[n]).square() for n, v in position.items()})

    momentum = hmc.draw_momentum(streams, step, start, inverse_mass)
    origin = Phase(dict(start), momentum, *energy_and_gradient(potential, start))
    nearest = distance(start)
    offset = torch.zeros_like(nearest, dtype=torch.long)
    for sign in (1, -1):
        phase = origin
        for number in range(1, reach + 1):
            phase = leapfrog(potential, phase, sign * step_size, inverse_mass)
            away = distance(phase.position)
            nearer = away < nearest
            nearest = torch.where(nearer, away, nearest)
            offset = torch.where(nearer, sign * number, offset)
    return offset


def _inverse_mass(matrix: LatentsLike | None, like: LatentsLike) -> Latents | None:
    return None if matrix is None else {name: matrix[name].to(like[name]) for name in like}


# --- Replaying ------------------------------------------------------------------------------------


def replay(
    energy: ImageEnergy,
    x: Tensor,
    start: LatentsLike,
    streams: Streams,
    decisions: list[Decision],
    inverse_mass: LatentsLike | None = None,
    checkpoint: bool = True,
) -> Latents:
    """Follow recorded decisions again: where the chains end, differentiable in ``x`` and ``start``.

    Args:
        energy: U(z; x) on the unconstrained scale, twice differentiable.
        x: images ``(N, C, H, W)``.
        start: unconstrained latents of ``N`` rows.
        streams: those of the recorded run.
        decisions: of :func:`record`, or its last ones.
        inverse_mass: diagonal of M^-1 per site; identity when ``None``.
        checkpoint: build the graph of one transition at a time; ``False`` keeps them all, which
            saves a third of the time at the price of memory that grows with the number of leapfrog
            steps.
    """
    names = tuple(start)
    inverse_mass = _inverse_mass(inverse_mass, start)
    values = tuple(start.values())
    for decision in decisions:

        def transition(x: Tensor, *values: Tensor, decision: Decision = decision) -> Any:
            position = dict(zip(names, values, strict=True))
            moved = _follow(energy, x, position, streams, decision, inverse_mass)
            return tuple(moved[name] for name in names)

        values = _recomputed(transition, checkpoint, x, *values)
    return dict(zip(names, values, strict=True))


def _follow(
    energy: ImageEnergy,
    x: Tensor,
    position: Latents,
    streams: Streams,
    decision: Decision,
    inverse_mass: LatentsLike | None,
) -> Latents:
    momentum = hmc.draw_momentum(streams, decision.step, position, inverse_mass)
    gradient = _gradient(energy, x, position)
    for number in range(decision.length):
        moving = number < decision.offset.abs()
        step_size = torch.where(moving, decision.offset.sign() * decision.step_size, 0.0)
        momentum = lat.add(momentum, gradient, -0.5 * step_size)
        position = lat.add(position, velocity(momentum, inverse_mass), step_size)
        gradient = _gradient(energy, x, position)
        momentum = lat.add(momentum, gradient, -0.5 * step_size)
    return position


def _gradient(energy: ImageEnergy, x: Tensor, position: Latents) -> Latents:
    """Gradient of U in z; with a graph where gradients are recorded, without one elsewhere."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create_graph:
            x = x.detach()
            position = {name: value.detach().requires_grad_() for name, value in position.items()}
        total = energy(x, position).sum()
        gradients = torch.autograd.grad(total, tuple(position.values()), create_graph=create_graph)
    return dict(zip(position, gradients, strict=True))


class _Recomputed(torch.autograd.Function):
    """A function without its graph, which is built again when a gradient is asked for.

    ``torch.utils.checkpoint`` will not do: the function takes gradients itself, and the reentrant
    variant would leave gradients on a model's parameters.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Any:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with torch.enable_grad():
            inputs = tuple(value.detach().requires_grad_() for value in ctx.saved_tensors)
            outputs = ctx.function(*inputs)
            found = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
        return (None, *found)


def _recomputed(function: Callable[..., Any], checkpoint: bool, *inputs: Tensor) -> Any:
    if checkpoint or not torch.is_grad_enabled():
        return _Recomputed.apply(function, *inputs)
    return function(*(v if v.requires_grad else v.detach().requires_grad_() for v in inputs))


class UnrolledKernel:
    """A kernel's run as a function that is differentiable in the image and in the start.

    Called without gradients being recorded, it just runs the kernel.

    Args:
        make_kernel: makes a fresh :class:`~pyro_vae_defence.mcmc.BatchedHMC` or
            :class:`~pyro_vae_defence.mcmc.BatchedNUTS` for a Pyro model.
        energy: the energy of that model, U(z; x) on the unconstrained scale.
        num_transitions: transitions in all, >= 1.
        warmup_steps: how many of them adapt.
        checkpoint: see :func:`replay`.
    """

    def __init__(
        self,
        make_kernel: Callable[[], BatchedKernel],
        energy: ImageEnergy,
        num_transitions: int,
        warmup_steps: int = 0,
        checkpoint: bool = True,
    ) -> None:
        self.make_kernel = make_kernel
        self.energy = energy
        self.num_transitions = num_transitions
        self.warmup_steps = warmup_steps
        self.checkpoint = checkpoint

    def __call__(self, x: Tensor, start: LatentsLike, streams: Streams) -> Latents:
        """Where the chains of images ``(N, C, H, W)`` end, from unconstrained latents of ``N``
        rows."""
        kernel = self.make_kernel()
        numbers = self.num_transitions, self.warmup_steps
        if not torch.is_grad_enabled():
            return run(kernel, x, start, streams, *numbers)
        with torch.no_grad():
            _, decisions = record(kernel, x, start, streams, *numbers)
        matrix = kernel.inverse_mass_matrix
        return replay(self.energy, x, start, streams, decisions, matrix, self.checkpoint)


# --- Mode search ----------------------------------------------------------------------------------


class UnrolledModeSearch:
    r"""Adam steps down U(z; x), differentiable in the image and in the start.

    The step is :math:`-\eta s \odot \hat m / \sqrt{\hat v + \epsilon^2}`, with the guard
    :math:`\epsilon` inside of the root, where its derivative is finite at a gradient of zero.

    Args:
        energy: U(z; x) on the unconstrained scale, twice differentiable.
        num_steps: Adam steps, >= 1, each one gradient.
        learning_rate: :math:`\eta` > 0, in units of ``scale``.
        scale: s, a typical width of the posterior per site, e.g. the root of the mean posterior
            variance; 1 when ``None``.
        checkpoint: see :func:`replay`.
    """

    def __init__(
        self,
        energy: ImageEnergy,
        num_steps: int = 30,
        learning_rate: float = 0.1,
        scale: LatentsLike | None = None,
        checkpoint: bool = True,
    ) -> None:
        if not num_steps >= 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps!r}")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {learning_rate!r}")
        self.energy = energy
        self.num_steps = num_steps
        self.learning_rate = learning_rate
        self.scale = scale
        self.checkpoint = checkpoint

    def __call__(self, x: Tensor, start: LatentsLike, streams: Streams | None = None) -> Latents:
        """Where the search ends for images ``(N, C, H, W)``; ``streams`` are not used, it is not
        random."""
        names = tuple(start)
        values = [*start.values(), *(torch.zeros_like(v) for _ in range(2) for v in start.values())]
        for number in range(1, self.num_steps + 1):

            def step(x: Tensor, *values: Tensor, number: int = number) -> Any:
                sites = iter(values)
                position, first, second = (self._take(names, sites) for _ in range(3))
                moved = self._step(x, position, first, second, number)
                return tuple(value for part in moved for value in part.values())

            values = _recomputed(step, self.checkpoint, x, *values)
        return self._take(names, iter(values))

    @staticmethod
    def _take(names: tuple[str, ...], values: Iterator[Tensor]) -> Latents:
        return {name: next(values) for name in names}

    def _step(
        self, x: Tensor, position: Latents, first: Latents, second: Latents, number: int
    ) -> tuple[Latents, Latents, Latents]:
        decay_1, decay_2 = ADAM_DECAYS
        gradient = _gradient(self.energy, x, position)
        first = {n: decay_1 * first[n] + (1 - decay_1) * g for n, g in gradient.items()}
        second = {n: decay_2 * second[n] + (1 - decay_2) * g.square() for n, g in gradient.items()}
        moved = {}
        for name, value in position.items():
            mean = first[name] / (1 - decay_1**number)
            root = (second[name] / (1 - decay_2**number) + _ADAM_EPSILON**2).sqrt()
            width = 1.0 if self.scale is None else self.scale[name].to(value)
            moved[name] = value - self.learning_rate * width * mean / root
        return moved, first, second
