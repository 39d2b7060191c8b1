r"""Energies and forces of a model as one recorded tensor program.

A chain asks for :math:`U(z)` and :math:`\nabla U(z)` thousands of times, and each time Pyro runs
the model's Python anew. :class:`Recorder` runs it once per shape under
:func:`torch.fx.experimental.proxy_tensor.make_fx`, forward and input-backward together, and replays
the operations: no Python of the model, no autograd graph, no gradient of a parameter.

A recording stands for the model only if the model is a fixed sequence of operations. Hence it is
refused, and the model traced as before, when recording fails (control flow that asks for a tensor's
value), when an operation draws random numbers, or when recorded and traced values differ by more
than rounding at any of several latents; :attr:`RecordedPotential.why_not` then says why.

What is recorded is also made faster where a decoder's shapes ask for it. A convolution of a single
pixel is a matrix, and a transposed convolution to few channels is a matrix product and a scatter;
general kernels spend ten times the arithmetic on both.

:class:`ReducedForce` evaluates forces in reduced precision and energies in full: a leapfrog step
remains volume preserving and reversible under any deterministic force, so that accepting with
full-precision energies keeps Hamiltonian Monte Carlo exact.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from pyro_vae_defence.models.program import ModelPotential
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.types import Latents, LatentsLike

__all__ = ["RecordedPotential", "Recorder", "ReducedForce"]

# Largest difference taken for rounding, in units of the type's resolution and of the largest value.
_ROUNDING = 1000.0
# Largest relative difference, over a batch, of gradients after a change of rounding: where a
# rectifier's input is zero up to rounding, it takes the other branch, and one image's gradient
# jumps.
_KINKS = 1e-3

_CONVOLUTION = torch.ops.aten.convolution.default
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
_CLONE = torch.ops.aten.clone.default

Program = Callable[..., tuple[Tensor, ...]]
"""Tensor arguments of the model, then latents, to energies and one gradient per latent site."""


class RecordedPotential(ModelPotential):
    """A :class:`~pyro_vae_defence.models.program.ModelPotential` whose gradients come from a
    recording.

    Made by :class:`Recorder`. The recording is made at the first gradient, that is at the start of
    a chain.

    Attributes:
        captured: whether gradients are replayed; ``None`` before the first.
        why_not: why they are not, for the reader of a log; ``None`` if they are.
    """

    def __init__(self, potential: ModelPotential, recorder: Recorder) -> None:
        # Everything a ModelPotential knows, without reading the model again.
        self.__dict__.update(potential.__dict__)
        self._recorder = recorder
        self.captured: bool | None = None
        self.why_not: str | None = None

    def energy_and_gradient(self, latents: LatentsLike) -> tuple[Tensor, Latents]:
        """Energies ``(N,)`` and their gradients, without a graph."""
        program, self.why_not = self._recorder.program(self, latents)
        self.captured = program is not None
        if program is None:
            return lat.value_and_gradient(self, latents)
        names = [site.name for site in self.sites]
        with torch.no_grad():
            energy, *gradients = program(*self.tensors, *(latents[n].detach() for n in names))
        return energy, dict(zip(names, gradients, strict=True))


class Recorder:
    """Record each model once per shape; the recordings are shared by all runs the recorder is given
    to.

    Recordings hold parameters by reference, but rearranged copies of some; make a new recorder once
    parameters have changed.

    Args:
        compile: hand recordings to :func:`torch.compile` as well, which needs a C++ compiler on
            CPUs and seconds per shape.

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
        self._programs: dict[Any, tuple[Program | None, str | None, ModelPotential]] = {}

    def __call__(self, potential: ModelPotential) -> RecordedPotential:
        """The same energy with recorded gradients."""
        return RecordedPotential(potential, self)

    def program(
        self, potential: ModelPotential, latents: LatentsLike
    ) -> tuple[Program | None, str | None]:
        """The recording for ``potential`` at these shapes, or ``None`` and the reason."""
        key = (
            potential.signature,
            *((n, tuple(v.shape), v.dtype, v.device) for n, v in latents.items()),
        )
        if key not in self._programs:
            # The potential is kept, so that the identities in its signature stay taken.
            self._programs[key] = (*self._record(potential, latents), potential)
        return self._programs[key][:2]

    def _record(
        self, potential: ModelPotential, start: LatentsLike
    ) -> tuple[Program | None, str | None]:
        if next(iter(start.values())).device.type == "meta":
            return None, "latents on the meta device have no values to compare"
        try:
            recording = _capture(potential, start)
            program: Program = recording
            expected = _traced(potential, start)
            why_not = _difference(program, expected)
            if why_not is None:
                faster: Program = _rewritten(recording)
                if self.compile:
                    faster = torch.compile(faster, dynamic=False)
                if _difference(faster, expected, _KINKS) is None:
                    program = faster
        except Exception as error:  # whatever a foreign program raises, tracing still works
            return None, f"recording failed: {type(error).__name__}: {error}"
        return (program, None) if why_not is None else (None, why_not)


def _capture(potential: ModelPotential, start: LatentsLike) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx  # seconds, which not every user needs

    names = [site.name for site in potential.sites]
    num_tensors = len(potential.tensors)

    def energy_and_gradients(*values: Tensor) -> tuple[Tensor, ...]:
        placed = potential.with_tensors(values[:num_tensors])
        latents = dict(zip(names, values[num_tensors:], strict=True))
        energy, gradients = lat.value_and_gradient(placed, latents)
        return (energy, *(gradients[name] for name in names))

    values = [t.detach() for t in (*potential.tensors, *(start[name] for name in names))]
    program = make_fx(energy_and_gradients)(*values)
    for node in program.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ValueError(f"the model draws random numbers ({node.target})")
    return program


Values = tuple[Tensor, ...]


def _traced(potential: ModelPotential, start: LatentsLike) -> list[tuple[Values, Values]]:
    """Arguments of a recording and the values that tracing gives, at the start and elsewhere."""
    names = [site.name for site in potential.sites]
    pairs = []
    for point in (lat.detach(start), lat.detach(potential.prototype)):
        energy, gradient = lat.value_and_gradient(potential, point)
        arguments = (*potential.tensors, *(point[n] for n in names))
        pairs.append((arguments, (energy, *(gradient[n] for n in names))))
    return pairs


def _difference(
    program: Program, pairs: list[tuple[Values, Values]], kinks: float = 0.0
) -> str | None:
    """``None`` if the recording gives the traced values, else in what it does not."""
    for arguments, expected in pairs:
        with torch.no_grad():
            recorded = program(*arguments)
        for number, (got, value) in enumerate(zip(recorded, expected, strict=True)):
            finite = value.isfinite()
            same = bool((got.isfinite() == finite).all())
            got, value = torch.where(finite, got, 0.0), torch.where(finite, value, 0.0)
            rounding = _ROUNDING * torch.finfo(value.dtype).eps * value.abs().max().clamp(min=1.0)
            small = (got - value).abs().max() <= rounding
            if number > 0:
                small |= (got - value).norm() <= kinks * value.norm()
            if not (same and bool(small)):
                return (
                    f"recorded and traced {'gradients' if number else 'energies'} differ "
                    "by more than rounding"
                )
    return None


# --- Faster equivalents of recorded operations ----------------------------------------------------


def _rewritten(program: fx.GraphModule) -> fx.GraphModule:
    """A copy without what general convolution kernels do badly; values change by rounding only."""
    # Constants, parameters among them, are shared with the original.
    program = fx.GraphModule(program, copy.deepcopy(program.graph))
    matrices: dict[Any, str] = {}
    for node in list(program.graph.nodes):
        if node.target not in (_CONVOLUTION, _CONVOLUTION_BACKWARD):
            continue
        backward = node.target is _CONVOLUTION_BACKWARD
        image, weight = node.args[1 if backward else 0], node.args[2 if backward else 1]
        if weight.op != "get_attr":
            continue
        settings = node.args[4:10] if backward else node.args[3:9]
        with program.graph.inserting_before(node):
            if all(size == 1 for size in image.meta["val"].shape[2:]):
                matrix = _matrix(program, weight, settings, matrices)
                if not backward:
                    _replace_forward(program, node, matrix)
                elif list(node.args[10]) == [True, False, False]:
                    _replace_backward(program, node, matrix)
            elif not backward and _scatters_to_few_channels(program, weight, settings):
                stride, padding, dilation = (tuple(setting) for setting in settings[:3])
                size = tuple(node.meta["val"].shape[2:])
                arguments = (image, weight, node.args[2], size, stride, padding, dilation)
                node.replace_all_uses_with(
                    program.graph.call_function(_scatter_convolution, arguments)
                )
    program.graph.eliminate_dead_code()
    program.recompile()
    return program


def _matrix(
    program: fx.GraphModule, weight: fx.Node, settings: Any, known: dict[Any, str]
) -> fx.Node:
    """Attribute holding the matrix (C_in, H, W, C_out) of a convolution of single pixels."""
    key = (weight.target, str(settings))
    if key not in known:
        filters = getattr(program, str(weight.target)).detach()
        transposed, groups = settings[3], settings[5]
        channels = filters.shape[0] if transposed else filters.shape[1] * groups
        identity = torch.eye(channels, dtype=filters.dtype, device=filters.device)
        pixels = identity.reshape(channels, channels, *[1] * (filters.dim() - 2))
        response = _CONVOLUTION(pixels, filters, None, *settings)
        known[key] = f"_pixel_matrix{len(known)}"
        program.register_buffer(known[key], response.movedim(1, -1).contiguous())
    return program.graph.get_attr(known[key])


def _replace_forward(program: fx.GraphModule, node: fx.Node, matrix: fx.Node) -> None:
    replacement = program.graph.call_function(
        _pixel_convolution, (node.args[0], matrix, node.args[2], node.meta["val"].is_contiguous())
    )
    users = list(node.users)
    to_channels_last = [
        user
        for user in users
        if user.target is _CLONE and user.kwargs.get("memory_format") is torch.channels_last
    ]
    if users and users == to_channels_last:
        # The matrix gives this layout by itself.
        replacement.args = (*replacement.args[:3], False)
        for user in users:
            user.replace_all_uses_with(replacement)
    node.replace_all_uses_with(replacement)


def _replace_backward(program: fx.GraphModule, node: fx.Node, matrix: fx.Node) -> None:
    gradient, image = node.args[0], node.args[1]
    assert isinstance(image, fx.Node)
    shape = list(image.meta["val"].shape)
    replacement = program.graph.call_function(
        _pixel_convolution_backward, (gradient, matrix, shape)
    )
    for user in list(node.users):
        # The others are gradients of parameters, which nobody asked for.
        if user.target is operator.getitem and user.args[1] == 0:
            user.replace_all_uses_with(replacement)


def _scatters_to_few_channels(program: fx.GraphModule, weight: fx.Node, settings: Any) -> bool:
    transposed, groups = settings[3], settings[5]
    filters = getattr(program, str(weight.target))
    # An image's one to three channels, which vectorised kernels pad to a register's width.
    return bool(transposed and groups == 1 and filters.dim() == 4 and filters.shape[1] <= 4)


def _pixel_convolution(x: Tensor, matrix: Tensor, bias: Tensor | None, contiguous: bool) -> Tensor:
    """Convolution of single pixels (N, C_in, 1, 1) by its matrix (C_in, H, W, C_out)."""
    rows = x.reshape(x.shape[0], -1) @ matrix.flatten(1)
    output = rows.view(-1, *matrix.shape[1:])
    if bias is not None:
        output += bias
    output = output.movedim(-1, 1)
    return output.contiguous() if contiguous else output


def _pixel_convolution_backward(gradient: Tensor, matrix: Tensor, shape: list[int]) -> Tensor:
    """Gradient of :func:`_pixel_convolution` with respect to its pixels."""
    rows = gradient.movedim(1, -1).reshape(gradient.shape[0], -1)
    return (rows @ matrix.flatten(1).T).reshape(shape)


def _scatter_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Transposed convolution as one matrix product per pixel and a sum of overlapping patches."""
    pixels = x.movedim(1, -1).reshape(-1, x.shape[1])
    patches = (pixels @ weight.flatten(1)).view(x.shape[0], -1, weight[0].numel())
    kernel = tuple(weight.shape[2:])
    output = F.fold(patches.transpose(1, 2), size, kernel, dilation, padding, stride)
    return output if bias is None else output + bias[:, None, None]


# --- Forces in reduced precision ------------------------------------------------------------------


def check_force_dtype(dtype: Any) -> None:
    """Raise ``ValueError`` unless ``dtype`` is a reduced precision, or ``None``."""
    if dtype not in (torch.bfloat16, torch.float16, None):
        raise ValueError(
            f"force_dtype must be torch.bfloat16, torch.float16 or None, got {dtype!r}"
        )


class ReducedForce(ModelPotential):
    """Forces from :func:`torch.autocast`, energies in full precision: exact Hamiltonian dynamics
    all the same.

    The force is a deterministic function of the latents. Whoever asks for energies gets full ones,
    at the price of a forward pass; :func:`pyro_vae_defence.mcmc.hmc.step` asks at the end of a
    trajectory only.

    Args:
        potential: the model's energy.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """

    def __init__(self, potential: ModelPotential, dtype: torch.dtype) -> None:
        check_force_dtype(dtype)
        self.__dict__.update(potential.__dict__)
        self._dtype = dtype

    def force(self, latents: LatentsLike) -> Latents:
        """Gradient of the energy in reduced precision, in the dtype of ``latents``."""
        device = next(iter(latents.values())).device.type
        on = contextlib.nullcontext() if device == "meta" else torch.autocast(device, self._dtype)
        with on:
            return lat.value_and_gradient(self, latents)[1]

    def energy_and_gradient(self, latents: LatentsLike) -> tuple[Tensor, Latents]:
        """Energies ``(N,)`` in full precision and forces in reduced."""
        with torch.no_grad():
            energy = self(latents)
        return energy, self.force(latents)
