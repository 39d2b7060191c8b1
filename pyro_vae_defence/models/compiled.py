r"""Energies and forces of a model as one recorded tensor program.

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
full-precision energies keeps Hamiltonian Monte Carlo exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae_defence.models.program import ModelPotential
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.types import Latents, LatentsLike

# Largest difference taken for rounding, in units of the type's resolution and of the largest value.
_ROUNDING = 1000.0
# Largest relative difference, over a batch, of gradients after compilation: where a rectifier's
# input is zero up to rounding, it takes the other branch, and one image's gradient jumps.
_KINKS = 1e-3

Values = tuple[Tensor, ...]
# Tensor arguments of the model, then latents, to energies and one gradient per latent site.
Recording = Callable[..., Values]


class RecordedPotential(ModelPotential):
    """An energy of a model whose gradients come from a recording; :class:`Recorder` makes it.

    The recording is made, or checked, at the first gradient, that is at the start of a chain.

    Attributes:
        captured: whether gradients are replayed; ``None`` before the first.
        why_not: why they are not, for the reader of a log; ``None`` if they are.
    """

    def __init__(self, potential: ModelPotential, recorder: Recorder) -> None:
        # Everything a ModelPotential knows, without reading the model again.
        self.__dict__.update(potential.__dict__)
        self._recorder = recorder
        self._checked: set[Any] = set()  # recordings, of this potential and its selections of rows
        self.captured: bool | None = None
        self.why_not: str | None = None

    def energy_and_gradient(self, latents: LatentsLike) -> tuple[Tensor, Latents]:
        """Energies ``(N,)`` and their gradients, without a graph."""
        key = (self.signature, *((n, tuple(v.shape), v.dtype) for n, v in latents.items()))
        if key not in self._checked:
            self._recorder.update(key, self, latents)
            self._checked.add(key)
        recording, self.why_not = self._recorder.recordings[key][:2]
        self.captured = recording is not None
        if recording is None:
            return lat.value_and_gradient(self, latents)
        names = [site.name for site in self.sites]
        with torch.no_grad():
            energy, *gradients = recording(*self.tensors, *(latents[n].detach() for n in names))
        return energy, dict(zip(names, gradients, strict=True))


class Recorder:
    """Record each model once per shape, for all runs the recorder is given to.

    Every run compares a recording that it finds with the model where its chains start, and makes it
    anew if they differ, as they do once parameters have changed.

    Args:
        compile: hand recordings to :func:`torch.compile` as well, which needs a C++ compiler on
            CPUs and seconds per shape.

    Attributes:
        recordings: what is known of each model and shape: the recording or ``None``, why not, and
            the arguments it is for.

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
        self.recordings: dict[Any, tuple[Recording | None, str | None, Any]] = {}

    def __repr__(self) -> str:
        return f"Recorder({'compile=True' if self.compile else ''})"

    def __call__(self, potential: ModelPotential) -> RecordedPotential:
        """The same energy with recorded gradients."""
        return RecordedPotential(potential, self)

    def update(self, key: Any, potential: ModelPotential, start: LatentsLike) -> None:
        """See to it that ``recordings[key]`` stands for ``potential`` at latents like ``start``."""
        if key in self.recordings:
            recording = self.recordings[key][0]
            here = _traced(potential, start)
            if recording is None or _difference(recording, [here], self._kinks) is None:
                return
        # Arguments that are no tensors are kept, so that their identities in the key stay taken.
        others = [arg for arg in potential._args if not isinstance(arg, Tensor)]
        self.recordings[key] = (*self._record(potential, start), (others, potential._kwargs))

    @property
    def _kinks(self) -> float:
        return _KINKS if self.compile else 0.0

    def _record(
        self, potential: ModelPotential, start: LatentsLike
    ) -> tuple[Recording | None, str | None]:
        if next(iter(start.values())).device.type == "meta":
            return None, "latents on the meta device have no values to compare"
        try:
            recording: Recording = _capture(potential, start)
            expected = [_traced(potential, point) for point in (start, potential.prototype)]
            why_not = _difference(recording, expected)
            if why_not is None and self.compile:
                compiled = torch.compile(recording, dynamic=False)
                if _difference(compiled, expected, self._kinks) is None:
                    recording = compiled
        except Exception as error:  # whatever a foreign program raises, tracing still works
            return None, f"recording failed: {type(error).__name__}: {error}"
        return (recording, None) if why_not is None else (None, why_not)


def _capture(potential: ModelPotential, start: LatentsLike) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx  # seconds, which not every user needs

    names = [site.name for site in potential.sites]
    num_tensors = len(potential.tensors)

    def energy_and_gradients(*values: Tensor) -> Values:
        placed = potential.with_tensors(values[:num_tensors])
        latents = dict(zip(names, values[num_tensors:], strict=True))
        energy, gradients = lat.value_and_gradient(placed, latents)
        return (energy, *(gradients[name] for name in names))

    values = [t.detach() for t in (*potential.tensors, *(start[name] for name in names))]
    return make_fx(energy_and_gradients)(*values)


def _traced(potential: ModelPotential, point: LatentsLike) -> tuple[Values, Values]:
    """Arguments of a recording at some latents, and the values that tracing gives there."""
    names = [site.name for site in potential.sites]
    energy, gradient = lat.value_and_gradient(potential, point)
    arguments = (*potential.tensors, *(point[n].detach() for n in names))
    return arguments, (energy, *(gradient[n] for n in names))


def _difference(
    recording: Recording, pairs: list[tuple[Values, Values]], kinks: float = 0.0
) -> str | None:
    """``None`` if the recording gives the traced values, else in what it does not."""
    for arguments, expected in pairs:
        with torch.no_grad():
            recorded = recording(*arguments)
        for number, (got, value) in enumerate(zip(recorded, expected, strict=True)):
            finite = value.isfinite()
            same = bool((got.isfinite() == finite).all())
            got, value = torch.where(finite, got, 0.0), torch.where(finite, value, 0.0)
            rounding = _ROUNDING * torch.finfo(value.dtype).eps * value.abs().max().clamp(min=1.0)
            small = (got - value).abs().max() <= rounding
            if number > 0:
                small |= (got - value).norm() <= kinks * value.norm()
            if not (same and bool(small)):
                what = "gradients" if number else "energies"
                return f"recorded and traced {what} differ by more than rounding"
    return None


class ReducedForce(ModelPotential):
    """Forces from :func:`torch.autocast`, energies in full precision: see the module's text.

    Whoever asks for energies gets full ones, at the price of a forward pass;
    :func:`pyro_vae_defence.mcmc.hmc.step` asks at the end of a trajectory only.

    Args:
        potential: the model's energy.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Raises:
        ValueError: for another dtype.
    """

    def __init__(self, potential: ModelPotential, dtype: torch.dtype = torch.bfloat16) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype!r}")
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
