r"""Whole transitions as CUDA graphs: noise, integrator, gradients and test in one launch.

A transition of a small model is hundreds of operations that take a GPU less time each than the host
takes to ask for them. A CUDA graph asks once. It repeats operations on the same places in memory,
so that all that changes from one transition to the next has to stand there beforehand: the state,
the step sizes, the metric, the images, and, since noise is a function of counters, the rows of the
random streams, the seed and the number of the transition. One graph therefore serves all runs of a
kernel on batches of one shape; a length of trajectories has a graph of its own, since it is that
many gradients.

:class:`Graph` captures a transition when it first comes up. That one runs as ever, the graph is
made on zeros in place of all numbers, and its replay must then give what the transition gave. What
cannot be captured runs as before on recorded gradients
(:class:`~pyro_vae_defence.models.compiled.Recorder`), and :attr:`Graph.why_not` says why: NUTS
asks the host whether a tree grows, a model may be no fixed sequence of operations, and there are
CUDA graphs on CUDA only. A CPU has nothing to gain: there, a transition recorded as a whole took
longer than one of recorded gradients.

What stays outside: where a run starts, its burn-in included, which happens once; and the adaptation
of step sizes, a few operations that the host asks for while the GPU is busy with the transition,
and whose weights are numbers that change with it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pyro_vae_defence.mcmc.hmc import HMCInfo
from pyro_vae_defence.models.compiled import (
    ForceType,
    Recorded,
    RecordedPotential,
    Recorder,
    ReducedForce,
    check_force_type,
)
from pyro_vae_defence.models.program import ModelPotential
from pyro_vae_defence.ops.precision import tf32_settings
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import LatentsLike

Step = Callable[..., tuple[Any, HMCInfo]]
"""A pure transition, such as :func:`pyro_vae_defence.mcmc.hmc.step` or a ``functools.partial`` of
it with numbers, called with potential, state, streams, step size and ``inverse_mass=``."""

Function = Callable[..., tuple[Tensor, ...]]

# A trajectory of L steps on average has up to 2 L lengths, and a batch whose images leave as they
# are done a few shapes.
_MOST_CAPTURES = 128
# Share of rows in which a replay may differ from the transition by more than rounding: on a GPU
# sums may be made in another order, and a proposal at the edge of acceptance falls to either side.
# Reduced forces move a proposal's energy by tenths of a nat, and one decision in ten with it (20
# leapfrog steps of TF32); a replay that read what another run left would differ wherever rows move,
# of which the second share is one.
_MOST_DIFFERENT = 0.05
_MOST_DIFFERENT_REDUCED = 0.5
_ROUNDING = 1000.0  # units of a type's resolution and of the largest value, as for recordings


class Graph:
    """Capture the transitions of kernels; one graph serves all runs that it is given to.

    Args:
        force_dtype: precision of forces inside trajectories, a ``dtype`` of
            :class:`~pyro_vae_defence.models.compiled.ReducedForce`: ``"tf32"``, ``torch.bfloat16``
            or ``torch.float16``. Energies of the Metropolis test are full ones, so that chains stay
            exact. ``None`` takes energies and forces as torch is set, which for convolutions on a
            GPU may be TF32 for both.
        compile: let :func:`torch.compile` fuse the operations of energies and forces first.

    Attributes:
        captured: whether the last run's transitions are replayed; ``None`` before the first.
        why_not: why some or all are not; ``None`` if they are.

    Raises:
        ValueError: for another ``force_dtype``.

    Example:
        >>> from pyro_vae_defence.defence import MCMCDefence
        >>> from pyro_vae_defence.models import ConvVAE
        >>> graph = Graph()
        >>> defence = MCMCDefence(ConvVAE(), num_samples=2, warmup_steps=1, prepare=graph)
        >>> result = defence(torch.rand(2, 1, 28, 28))
        >>> graph.captured, graph.why_not
        (False, 'there are no graphs of operations on the device cpu')
    """

    def __init__(self, *, force_dtype: ForceType | None = None, compile: bool = False) -> None:
        if force_dtype is not None:
            check_force_type("force_dtype", force_dtype)
        self.force_dtype = force_dtype
        self.captured: bool | None = None
        self.why_not: str | None = None
        self._recorder = Recorder(compile=compile)
        self._transitions: OrderedDict[Any, _Transition] = OrderedDict()
        # Inputs of transitions of one shape, whatever their length, as long as there are any.
        self._inputs: weakref.WeakValueDictionary[Any, _Inputs] = weakref.WeakValueDictionary()
        self._devices: dict[torch.device, Callable[..., Replay]] = {}

    def __repr__(self) -> str:
        options = {"force_dtype": self.force_dtype, "compile": self._recorder.compile}
        given = [f"{name}={value!r}" for name, value in options.items() if value]
        return f"Graph({', '.join(given)})"

    def __reduce__(self) -> tuple[Any, ...]:
        # As of a Recorder: captures are of this process's device.
        kind, compile = type(self), self._recorder.compile
        return functools.partial(kind, force_dtype=self.force_dtype, compile=compile), ()

    def __call__(self, potential: ModelPotential) -> RecordedPotential:
        """The energy of a new run, with forces in their precision and recorded gradients."""
        self.captured = self.why_not = None
        if self.force_dtype is not None:
            potential = ReducedForce(potential, self.force_dtype)
        return self._recorder(potential)

    def refuse(self, why_not: str) -> None:
        """Say why transitions of this run are not replayed."""
        self.captured, self.why_not = False, self.why_not or why_not

    def transition(
        self,
        step: Step,
        potential: RecordedPotential,
        state: Any,
        streams: Streams,
        step_size: Tensor,
        inverse_mass: LatentsLike | None,
    ) -> tuple[Any, HMCInfo]:
        """``step`` of these arguments: replayed, or made and captured when it first comes up.

        A step may depend on nothing else, and has to return a state, whose ``step`` it counts on,
        and an info.
        """
        make = functools.partial(
            step, potential, state, streams, step_size, inverse_mass=inverse_mass
        )
        if step_size.device.type not in CAPTURES:
            self.refuse(f"there are no graphs of operations on the device {step_size.device}")
            return make()
        if potential.captured is False:
            self.refuse(potential.why_not or "")
            return make()
        arguments = (state, streams, step_size, inverse_mass, potential.tensors)
        values = list(_leaves(arguments))
        shape = (potential.signature, tf32_settings(), *map(_look, values))
        inputs = self._inputs.get(shape)
        if inputs is None:
            inputs = self._inputs[shape] = _Inputs(arguments, step_size)
        inputs.set(values)
        placed = potential.with_tensors(inputs.arguments[-1])
        recordings = placed.record(inputs.arguments[0].position)
        if recordings is None:
            self.refuse(placed.why_not or "")
            return make()
        key = (_identity(step), shape)
        known = self._transitions.pop(key, None)
        if known is not None and known.stands_for(recordings):
            self._transitions[key] = known  # last used
            if known.replay is None:
                self.refuse(known.why_not or "")
                return make()
            moved, info = known(state.step)
        else:
            if known is not None or len(self._transitions) >= _MOST_CAPTURES:
                self._release(known, step_size.device)
            moved, info = make()
            known = _Transition(inputs, recordings)
            function = functools.partial(_run, step, placed, inputs.arguments)
            self._capture(known, function, values, state, (moved, info), potential)
            self._transitions[key] = known
            if known.why_not is not None:
                self.refuse(known.why_not)
        self.captured = self.why_not is None
        return moved, info

    def _capture(
        self,
        known: _Transition,
        function: Function,
        values: list[Any],
        state: Any,
        made: tuple[Any, HMCInfo],
        potential: RecordedPotential,
    ) -> None:
        """Give ``known`` its replay, if that does what was made of the same values.

        Up to the slack of forces, since libraries choose their algorithms anew while they are
        captured. The energies that are compared have none.
        """
        inputs = known.inputs
        device = inputs.places[0].device
        inputs.clear()
        try:
            with torch.no_grad():
                if device not in self._devices:
                    self._devices[device] = CAPTURES[device.type](device)
                replay = self._devices[device](function, inputs.places)
                inputs.set(values)
                replayed = replay()
                known.why_not = _difference(replayed, state, made, potential.slack)
                if known.why_not is None and potential.slack:
                    known.why_not = _energy_error(potential, _rebuilt(made, iter(replayed))[0])
        except Exception as error:  # a step that asks the host, memory that is short, a driver
            self._devices.pop(device, None)
            known.why_not = f"capturing failed: {type(error).__name__}: {error}"
        if known.why_not is None:
            known.replay, known.like = replay, _rebuilt(made, itertools.repeat(None))

    def _release(self, known: _Transition | None, device: torch.device) -> None:
        """Let go of one capture: ``known``, or the one that was used least recently."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # it may be running
        if known is None:
            self._transitions.popitem(last=False)


# --- What a capture stands on ---------------------------------------------------------------------


class _Inputs:
    """Places in memory for all that changes between transitions of one shape.

    Attributes:
        places: one tensor for each leaf of the arguments that is a tensor or a number.
        arguments: the arguments made of them.
    """

    def __init__(self, arguments: Any, like: Tensor) -> None:
        number = functools.partial(like.new_zeros, (), dtype=torch.long)
        leaves = [v for v in _leaves(arguments) if v is not None]
        self.places = [torch.zeros_like(v) if isinstance(v, Tensor) else number() for v in leaves]
        self._numbers = [p for p, v in zip(self.places, leaves) if not isinstance(v, Tensor)]
        self.arguments: Any = _filled(arguments, self.places)

    def set(self, values: Sequence[Any]) -> None:
        """Write the leaves of other arguments; ``None`` among them is skipped."""
        given = [value for value in values if value is not None]
        with torch.no_grad():
            for place, value in zip(self.places, given, strict=True):
                if isinstance(value, Tensor):
                    place.copy_(value)
                else:
                    # 64 bits of a seed, as a signed number has them.
                    place.fill_(value - 2**64 if value >= 2**63 else value)

    def clear(self) -> None:
        """Write what no transition has: zeros, which are labels, too, and numbers below zero."""
        for place in self.places:
            place.zero_()
        for place in self._numbers:
            place.fill_(-1)


class _Transition:
    """One captured transition, or the reason why it is none.

    Attributes:
        inputs: where it reads.
        replay: runs it; ``None`` if it was refused.
        why_not: why it was.
        like: what it returns, with ``None`` for every leaf.
    """

    def __init__(self, inputs: _Inputs, recordings: tuple[Recorded, ...]) -> None:
        self.inputs = inputs
        self.replay: Replay | None = None
        self.why_not: str | None = None
        self.like: Any = None
        self._recordings = recordings
        # Aliases, so that no other tensor comes to stand where a replay reads a constant.
        self._constants = [
            (constant, constant.detach()) for each in recordings for constant in each.constants
        ]

    def stands_for(self, recordings: tuple[Recorded, ...]) -> bool:
        """Whether it was made of these recordings, and their tensors are still where they were."""
        if any(a is not b for a, b in zip(recordings, self._recordings, strict=True)):
            return False
        return all(now.data_ptr() == then.data_ptr() for now, then in self._constants)

    def __call__(self, number: int) -> tuple[Any, HMCInfo]:
        """State and info after transition ``number`` (from 0)."""
        assert self.replay is not None
        # The next replay writes to the same places.
        values = iter([value.clone() for value in self.replay()])
        state, info = _rebuilt(self.like, values)
        return state._replace(step=number + 1), info


def _run(step: Step, potential: RecordedPotential, like: Any, *places: Tensor) -> tuple[Any, ...]:
    """A transition as a function of tensors alone."""
    state, streams, step_size, inverse_mass, tensors = _filled(like, places)
    placed = potential.with_tensors(tensors)
    return tuple(_leaves(step(placed, state, streams, step_size, inverse_mass=inverse_mass)))


def _identity(step: Any) -> Any:
    """Equal for steps that do the same, hashable."""
    if isinstance(step, functools.partial):
        return (_identity(step.func), step.args, *sorted(step.keywords.items()))
    return step


def _look(value: Any) -> Any:
    """What of an argument a capture depends on."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.device)
    return type(value)


def _leaves(nest: Any) -> Iterator[Any]:
    """What a nest of mappings and tuples holds, in order."""
    if isinstance(nest, (Mapping, tuple)):
        for part in nest.values() if isinstance(nest, Mapping) else nest:
            yield from _leaves(part)
    else:
        yield nest


def _rebuilt(nest: Any, leaves: Iterator[Any]) -> Any:
    """The nest with other leaves, as many as it takes."""
    if isinstance(nest, Mapping):
        return {name: _rebuilt(part, leaves) for name, part in nest.items()}
    if isinstance(nest, tuple):
        parts = [_rebuilt(part, leaves) for part in nest]
        return type(nest)(*parts) if hasattr(nest, "_fields") else tuple(parts)
    return next(leaves)


def _filled(nest: Any, values: Sequence[Any]) -> Any:
    """The nest with other leaves but for those that are ``None``."""
    given = iter(values)
    leaves = [leaf if leaf is None else next(given) for leaf in _leaves(nest)]
    return _rebuilt(nest, iter(leaves))


def _difference(
    replayed: Sequence[Any], state: Any, made: tuple[Any, HMCInfo], slack: float
) -> str | None:
    """``None`` if a replay does what the transition from ``state`` did, else how far it is off.

    ``slack`` is the relative difference of forces that is none, beside rounding. Where there is
    any, states are compared and decisions, not the acceptance rates: these follow differences of
    energies, which are small beside the energies.
    """
    wrong: Tensor | None = None
    moved, info = made
    leaves = list(_leaves(moved))
    decided = len(leaves)
    leaves += _leaves(info)
    for number, (got, value) in enumerate(zip(replayed, leaves, strict=True)):
        if slack and number >= decided and torch.is_tensor(value) and value.is_floating_point():
            continue
        if not isinstance(value, Tensor):
            off = cast(Tensor, got) != value
        elif value.is_floating_point():
            # Infinities and NaN of a diverging proposal have to be the same, too.
            finite = value.isfinite()
            size = torch.where(finite, value, 0.0).abs().amax()
            rounding = max(slack, _ROUNDING * torch.finfo(value.dtype).eps) * size.clamp(min=1.0)
            off = torch.where(finite, ~((got - value).abs() <= rounding), got.isfinite())
        else:
            off = got != value
        rows = off.reshape(off.shape[0], -1).any(1) if off.dim() > 0 else off
        wrong = rows if wrong is None else wrong | rows
    assert wrong is not None
    share = float(wrong.float().mean())
    most = _MOST_DIFFERENT
    if slack:
        pairs = zip(state.position.values(), moved.position.values(), strict=True)
        rows = torch.stack([(a != b).reshape(len(a), -1).any(1) for a, b in pairs]).any(0)
        most = max(most, _MOST_DIFFERENT_REDUCED * float(rows.float().mean()))
    if share <= most:
        return None
    return f"a replay and the transition differ in {share:.0%} of the rows"


def _energy_error(potential: RecordedPotential, state: Any) -> str | None:
    """``None`` if the energies of a state are the full ones at its position, up to rounding."""
    full = potential(state.position)
    rounding = _ROUNDING * torch.finfo(full.dtype).eps * full.abs().amax().clamp(min=1.0)
    error = float(torch.where(full.isfinite(), (state.energy - full).abs(), 0.0).amax())
    if error <= rounding:
        return None
    return f"energies of a replay are off by {error:.3g} nats"


# --- Capturing on a device ------------------------------------------------------------------------

Replay = Callable[[], Sequence[Tensor]]
"""Runs a captured function on what its inputs hold then; results stand until the next replay."""


class CUDAGraphs:
    """Captures on one CUDA device, which share a stream and a pool of memory.

    Sharing is safe, since replays follow each other on one stream, and whoever wants results copies
    them before the next.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Function, inputs: Sequence[Tensor]) -> Replay:
        """Capture ``function(*inputs)``, which must neither ask the host nor wait for it.

        Raises:
            RuntimeError: if it does.
        """
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        # The stream is named once more, since torch leaves it current where a capture fails. Only
        # this thread's calls matter: others may pin memory, as loaders do.
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            # Libraries choose their algorithms and allocate their own memory; and what waits for
            # the device is found while nothing is captured yet.
            with _no_waiting():
                function(*inputs)
            try:
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    outputs = function(*inputs)
            except BaseException:
                # Torch's generator goes on believing in a capture until one has succeeded.
                with (
                    contextlib.suppress(RuntimeError),  # what went wrong first is what is told
                    torch.cuda.graph(
                        torch.cuda.CUDAGraph(),
                        stream=torch.cuda.Stream(),
                        capture_error_mode="thread_local",
                    ),
                ):
                    torch.zeros((), device=self.device)
                raise
        current.wait_stream(self.stream)

        def replay() -> Sequence[Tensor]:
            graph.replay()
            return outputs

        return replay


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """A ``RuntimeError`` where torch makes the host wait for the device, instead of waiting."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


CAPTURES: dict[str, Callable[[torch.device], Callable[[Function, Sequence[Tensor]], Replay]]] = {
    "cuda": CUDAGraphs
}
"""Type of device -> what captures there."""


def find_graph(prepare: Any) -> Any:
    """``prepare`` of a kernel or defence, in which ``"graph"`` stands for ``Graph()``.

    Raises:
        ValueError: if it is no callable and not ``None``.
    """
    if isinstance(prepare, str) and prepare == "graph":
        return Graph()
    if not (prepare is None or callable(prepare)):
        raise ValueError(
            "prepare must map a ModelPotential to another, such as Recorder(), or be 'graph', got "
            f"{prepare!r}"
        )
    return prepare
