r"""Energies and forces of a model as recorded tensor programs.

A chain asks for :math:`U(z)` and :math:`\nabla U(z)` thousands of times, and each time Pyro runs
the model's Python anew. :class:`Recorder` runs it once per shape under
:func:`torch.fx.experimental.proxy_tensor.make_fx`, forward and input-backward together, and replays
the operations: no Python of the model, no autograd graph, no gradient of a parameter.

A recording stands for the model only if the model is a fixed sequence of operations. Hence it is
refused, and the model traced as before, when recording fails (control flow that asks for a tensor's
value), or when recorded and traced values differ by more than rounding at any of several latents;
:attr:`RecordedPotential.why_not` then says why.

:class:`ReducedForce` evaluates forces in reduced precision and energies in full: a leapfrog step
remains volume preserving and reversible under any deterministic force, so that accepting with
full-precision energies keeps Hamiltonian Monte Carlo exact. Full means float32 products: on GPUs of
NVIDIA's Ampere generation and later, torch lets convolutions round their factors to TF32, with 10
bits of mantissa, unless it is told otherwise, and what a model returns is then no full energy.

A GPU spends more time on being told each of these operations than on small ones of them:
:mod:`pyro_vae_defence.mcmc.captured` launches those of a whole transition at once.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx

from pyro_vae_defence.models.program import ModelPotential
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.precision import tf32
from pyro_vae_defence.types import Latents, LatentsLike

# Recordings that a recorder keeps, those used last: a server's batches have any size, and labels
# that programs have bound are others at each request. One takes about half a MiB.
_MOST_RECORDINGS = 256
# Largest difference taken for rounding, in units of the type's resolution and of the largest value.
_ROUNDING = 1000.0
# Largest relative difference, over a batch, of gradients after compilation: where a rectifier's
# input is zero up to rounding, it takes the other branch, and one image's gradient jumps.
_KINKS = 1e-3
# The same of forces in reduced precision, of which no chain's exactness depends: a few units of
# bfloat16.
_COARSE = 2e-2

Values = tuple[Tensor, ...]
# Tensor arguments of the model, then latents, to what a function below returns.
Recording = Callable[..., Values]
ForceType: TypeAlias = torch.dtype | Literal["tf32"]


# --- Precision ------------------------------------------------------------------------------------


def check_force_type(name: str, value: Any) -> None:
    """Raise the ``ValueError`` of :class:`ReducedForce`, in which the argument is ``name``."""
    if value not in (torch.bfloat16, torch.float16, "tf32"):
        raise ValueError(
            f"{name} must be torch.bfloat16 or torch.float16, or 'tf32', got {value!r}"
        )


class ReducedForce(ModelPotential):
    """Forces in reduced precision, energies in full precision: see the module's text.

    Whoever asks for energies gets full ones, at the price of a forward pass;
    :func:`pyro_vae_defence.mcmc.hmc.step` asks at the end of a trajectory only.

    Args:
        potential: the model's energy.
        dtype: ``torch.bfloat16`` or ``torch.float16``, under :func:`torch.autocast`; ``"tf32"`` for
            TF32 in convolutions and matrix products of float32, which CUDA alone has: elsewhere
            such forces are full ones.

    Raises:
        ValueError: for another dtype.
    """

    def __init__(self, potential: ModelPotential, dtype: ForceType = torch.bfloat16) -> None:
        check_force_type("dtype", dtype)
        self.__dict__.update(potential.__dict__)
        self.force_type = dtype

    @property
    def signature(self) -> tuple[Any, ...]:
        """That of the potential, and the type of forces."""
        return (self.force_type, *super().signature)

    def __call__(self, latents: LatentsLike) -> Tensor:
        """Energies ``(N,)`` in full precision."""
        with tf32(False):
            return super().__call__(latents)

    def force(self, latents: LatentsLike) -> Latents:
        """Gradient of the energy in reduced precision, in the dtype of ``latents``."""
        device = next(iter(latents.values())).device.type
        on: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(self.force_type, str):
            on = tf32(True)
        elif device != "meta":
            on = torch.autocast(device, self.force_type)
        with on:
            return lat.value_and_gradient(self._evaluate, latents)[1]

    def energy_and_gradient(self, latents: LatentsLike) -> tuple[Tensor, Latents]:
        """Energies ``(N,)`` in full precision and forces in reduced."""
        with torch.no_grad():
            energy = self(latents)
        return energy, self.force(latents)


# --- What is recorded -----------------------------------------------------------------------------


class _Function(NamedTuple):
    """What a recording computes of a potential at latents.

    Attributes:
        values: energies, gradients in the order of the sites, or both.
        has_energy: whether energies come first.
        tf32: what it needs :func:`tf32` to be; ``None`` for torch's own settings. No operation of
            a recording says so.
        slack: largest relative difference of gradients, over a batch, beyond rounding.
    """

    values: Callable[[ModelPotential, LatentsLike], Values]
    has_energy: bool
    tf32: bool | None = None
    slack: float = 0.0


def _in_order(potential: ModelPotential, gradients: LatentsLike) -> Values:
    return tuple(gradients[site.name] for site in potential.sites)


def _energy_and_gradient(potential: ModelPotential, latents: LatentsLike) -> Values:
    energy, gradients = lat.value_and_gradient(potential, latents)
    return (energy, *_in_order(potential, gradients))


def _energy(potential: ModelPotential, latents: LatentsLike) -> Values:
    with torch.no_grad():
        return (potential(latents),)


def _force(potential: Any, latents: LatentsLike) -> Values:
    return _in_order(potential, potential.force(latents))


_BOTH = _Function(_energy_and_gradient, has_energy=True)
_FULL_ENERGY = _Function(_energy, has_energy=True, tf32=False)
_REDUCED = _Function(_force, has_energy=False, slack=_COARSE)
_TF32 = _REDUCED._replace(tf32=True)


def _functions(potential: ModelPotential) -> tuple[_Function, ...]:
    """What there is to record of a potential: all at once, or energies and forces apart."""
    if not isinstance(potential, ReducedForce):
        return (_BOTH,)
    return (_FULL_ENERGY, _TF32 if potential.force_type == "tf32" else _REDUCED)


class Recorded(NamedTuple):
    """What is known of one function of a model at latents of one shape.

    Attributes:
        run: the recording; ``None`` if there is none.
        why_not: why there is none.
        constants: tensors that the recording holds, such as the model's parameters.
        kept: the model's arguments that are no tensors: they stay alive, so that their identities,
            by which recordings are found, stay taken.
    """

    run: Recording | None
    why_not: str | None
    constants: tuple[Tensor, ...] = ()
    kept: Any = None


class RecordedPotential(ModelPotential):
    """An energy of a model whose gradients come from recordings; :class:`Recorder` makes it.

    Recordings are made, or checked, at the first gradient, that is at the start of a chain.

    Attributes:
        captured: whether gradients are replayed; ``None`` before the first.
        why_not: why they are not, for the reader of a log; ``None`` if they are.
    """

    def __init__(
        self, potential: ModelPotential, recorder: Recorder, checked: set[Any] | None = None
    ) -> None:
        # Everything a ModelPotential knows, without reading the model again.
        self.__dict__.update(potential.__dict__)
        self._potential, self._recorder = potential, recorder
        # Recordings, of this potential and its selections of rows.
        self._checked = set() if checked is None else checked
        self.captured: bool | None = None
        self.why_not: str | None = None

    # A selection of rows, or other images, is one of the potential and its recordings.

    def _with(self, potential: ModelPotential) -> RecordedPotential:
        return RecordedPotential(potential, self._recorder, self._checked)

    def take(self, rows: Tensor) -> RecordedPotential:
        """The energy of the images at ``rows``, int64 ``(M,)``, alone."""
        return self._with(self._potential.take(rows))

    def at(self, x: Tensor) -> RecordedPotential:
        """The energy of the same model at other images."""
        return self._with(self._potential.at(x))

    def with_tensors(self, tensors: Sequence[Tensor]) -> RecordedPotential:
        """The same energy with other values for :attr:`tensors`."""
        return self._with(self._potential.with_tensors(tensors))

    @property
    def signature(self) -> tuple[Any, ...]:
        """That of the potential it is made of."""
        return self._potential.signature

    def __call__(self, latents: LatentsLike) -> Tensor:
        """Energies ``(N,)``, in nats, traced."""
        return self._potential(latents)

    @property
    def slack(self) -> float:
        """Largest relative difference, beyond rounding, that two ways to a gradient may have."""
        return max(map(self._recorder._slack, _functions(self._potential)))

    def record(self, latents: LatentsLike) -> tuple[Recorded, ...] | None:
        """All that gradients at latents like these need, made or checked; ``None`` if refused."""
        found = tuple(self._find(what, latents) for what in _functions(self._potential))
        return found if self.captured else None

    def force(self, latents: LatentsLike) -> Latents:
        """Gradient of the energy, without a graph."""
        *_, what = _functions(self._potential)
        values = self._replay(what, latents)[what.has_energy :]
        return {site.name: value for site, value in zip(self.sites, values, strict=True)}

    def energy_and_gradient(self, latents: LatentsLike) -> tuple[Tensor, Latents]:
        """Energies ``(N,)`` and their gradients, without a graph."""
        first, *apart = _functions(self._potential)
        energy, *gradients = self._replay(first, latents)
        if apart:
            return energy, self.force(latents)
        return energy, {s.name: value for s, value in zip(self.sites, gradients, strict=True)}

    def _replay(self, what: _Function, latents: LatentsLike) -> Values:
        recording = self._find(what, latents).run
        if recording is None:
            return what.values(self._potential, latents)
        values = (latents[site.name].detach() for site in self.sites)
        with torch.no_grad():
            return recording(*self.tensors, *values)

    def _find(self, what: _Function, latents: LatentsLike) -> Recorded:
        shapes = ((n, tuple(v.shape), v.dtype) for n, v in latents.items())
        key = (what, self.signature, *shapes)
        known = self._recorder.recordings
        if key not in self._checked or key not in known:
            self._recorder.update(key, what, self._potential, latents)
            self._checked.add(key)
        known.move_to_end(key)
        found = known[key]
        self.why_not = self.why_not or found.why_not
        self.captured = self.why_not is None
        return found


class Recorder:
    """Record each model once per shape, for all runs the recorder is given to.

    Every run compares a recording that it finds with the model where its chains start, and makes it
    anew if they differ, as they do once parameters have changed. Of a :class:`ReducedForce`,
    energies and forces are recorded, each with its precision.

    Args:
        compile: hand recordings to :func:`torch.compile` as well, which needs a C++ compiler on
            CPUs and seconds per shape.

    Attributes:
        recordings: what is known of each model and shape, of the last 256.

    Example:
        >>> from pyro_vae_defence.models import ConvVAE
        >>> from pyro_vae_defence.models.program import potential
        >>> vae, x = ConvVAE().eval(), torch.rand(2, 1, 28, 28)
        >>> recorded = Recorder()(potential(vae, x))
        >>> energy, gradient = recorded.energy_and_gradient({"z": torch.zeros(2, 64)})
        >>> recorded.captured, recorded.why_not
        (True, None)
    """

    def __init__(self, *, compile: bool = False) -> None:
        self.compile = compile
        self.recordings: OrderedDict[Any, Recorded] = OrderedDict()

    def __repr__(self) -> str:
        return f"Recorder({'compile=True' if self.compile else ''})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Recordings hold the weights of this one's models; a copy makes its own.
        return functools.partial(type(self), compile=self.compile), ()

    def __call__(self, potential: ModelPotential) -> RecordedPotential:
        """The same energy with recorded gradients."""
        return RecordedPotential(potential, self)

    def update(
        self, key: Any, what: _Function, potential: ModelPotential, start: LatentsLike
    ) -> None:
        """See to it that ``recordings[key]`` stands for ``potential`` at latents like ``start``."""
        if key in self.recordings:
            recording = self.recordings[key].run
            here = _traced(what, potential, start)
            if recording is None or _difference(what, recording, [here], self._slack(what)) is None:
                return
        kept = [arg for arg in potential._args if not isinstance(arg, Tensor)]
        found = self._record(what, potential, start)
        self.recordings[key] = found._replace(kept=(kept, potential._kwargs))
        if len(self.recordings) > _MOST_RECORDINGS:
            self.recordings.popitem(last=False)

    def _slack(self, what: _Function) -> float:
        return max(what.slack, _KINKS if self.compile else 0.0)

    def _record(self, what: _Function, potential: ModelPotential, start: LatentsLike) -> Recorded:
        if next(iter(start.values())).device.type == "meta":
            return Recorded(None, "latents on the meta device have no values to compare")
        try:
            module = _capture(what, potential, start)
            recording = _under(what.tf32, module)
            expected = [_traced(what, potential, point) for point in (start, potential.prototype)]
            why_not = _difference(what, recording, expected, what.slack)
            if why_not is None and self.compile:
                compiled = _under(what.tf32, torch.compile(module, dynamic=False))
                if _difference(what, compiled, expected, self._slack(what)) is None:
                    recording = compiled
        except Exception as error:  # whatever a foreign program raises, tracing still works
            return Recorded(None, f"recording failed: {type(error).__name__}: {error}")
        if why_not is not None:
            return Recorded(None, why_not)
        held = {**dict(module.named_parameters()), **dict(module.named_buffers()), **vars(module)}
        return Recorded(recording, None, tuple(v for v in held.values() if isinstance(v, Tensor)))


def _capture(what: _Function, potential: ModelPotential, start: LatentsLike) -> fx.GraphModule:
    # Seconds, which not every user needs.
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    names = [site.name for site in potential.sites]
    num_tensors = len(potential.tensors)

    def function(*values: Tensor) -> Values:
        placed = potential.with_tensors(values[:num_tensors])
        return what.values(placed, dict(zip(names, values[num_tensors:], strict=True)))

    values = [t.detach() for t in (*potential.tensors, *(start[name] for name in names))]
    # Shapes of results are noted as fake tensors. Without a mode of all of them each would get one
    # of its own, which takes as long as the recording.
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        module = make_fx(function)(*values)
    _fold(module, values[-1].device)
    return module


def _fold(module: fx.GraphModule, device: torch.device) -> None:
    """Compute once what is made of constants on other devices alone, and keep it on ``device``.

    A copy from the host waits for it, which no replay of a CUDA graph may. Compiled programs copy
    even the numbers, tensors without dimensions, that torch's own kernels take from the host.
    """
    known: dict[fx.Node, Tensor] = {}
    elsewhere: set[fx.Node] = set()
    written = _written(module.graph)
    for node in module.graph.nodes:
        inputs, place, value = node.all_input_nodes, node.kwargs.get("device"), None
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(module)
            away = isinstance(value, Tensor) and value.device != device
        elif place is None:
            away = bool(inputs) and elsewhere >= set(inputs)
        else:
            away = place != device
        if away:
            elsewhere.add(node)
        if _is_pure(node) and known.keys() >= set(inputs) and (inputs or away):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            value, away = node.target(*args, **kwargs), True
        if away and isinstance(value, Tensor) and node not in written:
            known[node] = value
    for number, (node, value) in enumerate(known.items()):
        users = {u for u in node.users if u.op == "call_function"} - known.keys() - elsewhere
        if users:
            module.register_buffer(f"_folded{number}", value.to(device))
            with module.graph.inserting_before(node):
                moved = module.graph.get_attr(f"_folded{number}")
            node.replace_all_uses_with(moved, delete_user_cb=users.__contains__)
    if known:
        module.graph.eliminate_dead_code()
        module.recompile()


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values are changed in place, be it through a view of them."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.target is operator.getitem and node in found:  # one of several views
            fx.node.map_arg(node.args[0], found.add)
        arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
        for position, argument in enumerate(arguments):
            given = node.args[position] if position < len(node.args) else None
            given = node.kwargs.get(argument.name, given)
            aliased = argument.alias_info is not None
            if aliased and (argument.is_write or node in found):
                fx.node.map_arg(given, found.add)
    return found


def _is_pure(node: fx.Node) -> bool:
    """Whether a node is an operation that changes no argument and draws no random number."""
    schema, tags = getattr(node.target, "_schema", None), getattr(node.target, "tags", ())
    return (
        schema is not None
        and not schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in tags
    )


def _under(on: bool | None, recording: Recording) -> Recording:
    """The recording where products of float32 are as :func:`tf32` has them."""
    if on is None:
        return recording

    def run(*values: Tensor) -> Values:
        with tf32(on):
            return recording(*values)

    return run


def _traced(
    what: _Function, potential: ModelPotential, point: LatentsLike
) -> tuple[Values, Values]:
    """Arguments of a recording at some latents, and the values that tracing gives there."""
    arguments = (*potential.tensors, *(point[site.name].detach() for site in potential.sites))
    return arguments, what.values(potential, point)


def _difference(
    what: _Function, recording: Recording, pairs: list[tuple[Values, Values]], slack: float
) -> str | None:
    """``None`` if the recording gives the traced values, else in what it does not."""
    for arguments, expected in pairs:
        with torch.no_grad():
            recorded = recording(*arguments)
        for number, (got, value) in enumerate(zip(recorded, expected, strict=True)):
            gradients = number >= what.has_energy
            finite = value.isfinite()
            same = bool((got.isfinite() == finite).all())
            got, value = torch.where(finite, got, 0.0), torch.where(finite, value, 0.0)
            rounding = _ROUNDING * torch.finfo(value.dtype).eps * value.abs().max().clamp(min=1.0)
            small = (got - value).abs().max() <= rounding
            if gradients:
                small |= (got - value).norm() <= slack * value.norm()
            if not (same and bool(small)):
                kind = "gradients" if gradients else "energies"
                return f"recorded and traced {kind} differ by more than rounding"
    return None
