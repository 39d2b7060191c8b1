"""What a defence returns: the latents it ends with, the chains behind them, and what they cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae_defence import diagnostics
from pyro_vae_defence.types import Latents


class Chains(NamedTuple):
    """What a defence did with some images; names and shapes are those of :class:`DefenceResult`."""

    initial: Latents
    samples: Latents
    sample_stats: dict[str, Tensor]
    num_gradients: Tensor
    convergence: dict[str, Tensor] = {}

    @classmethod
    def join(cls, parts: Sequence[Chains]) -> Chains:
        """Those of the first part's images, the second part's, and so on."""
        return cls(**_along_images(torch.cat, [part._asdict() for part in parts]))

    def take(self, images: Tensor) -> Chains:
        """Those at ``images``, int64, alone."""

        def pick(tensors: list[Tensor], dim: int) -> Tensor:
            return tensors[0].index_select(dim, images)

        return Chains(**_along_images(pick, [self._asdict()]))


@dataclass(frozen=True)
class DefenceResult:
    """Latents after a defence, and how they came about.

    Attributes:
        latents: site -> ``(N, *event)``: where the first chain ends.
        reconstruction: mean of p(x | latents), ``(N, C, H, W)``, clipped to [0, 1].
        samples: site -> ``(chain, draw, N, *event)``.
        sample_stats: name -> ``(chain, draw, N)``, ArviZ's names (``diagnostics.SAMPLE_STATS``).
        initial: site -> ``(chain, N, *event)``: where the chains started.
        x: the images the chains were conditioned on, ``(N, C, H, W)``.
        conditions: further arguments of the programs, one row per image each.
        num_gradients: gradients of the energy spent per image, over all chains, ``(N,)``.
        seconds: wall time of the whole call.
        observation: name of the model's observation site.
        settings: what the run was made with.
        convergence: ``converged``, ``r_hat``, ``energy_drift`` and ``forgotten_after`` per image,
            ``(N,)`` each, of :class:`~pyro_vae_defence.defence.convergence.Convergence`; empty with
            fewer than 4 chains or 8 draws, where nothing can be said.
    """

    latents: Latents
    reconstruction: Tensor
    samples: Latents
    sample_stats: dict[str, Tensor]
    initial: Latents
    x: Tensor
    num_gradients: Tensor
    seconds: float
    observation: str
    settings: dict[str, Any] = field(default_factory=dict)
    convergence: dict[str, Tensor] = field(default_factory=dict)
    conditions: tuple[Tensor, ...] = ()

    @classmethod
    def join(cls, parts: Sequence[DefenceResult]) -> DefenceResult:
        """The result of all images from those of consecutive micro-batches."""
        if len(parts) == 1:
            return parts[0]
        whole = {"seconds", "observation", "settings"}
        fields = [{n: v for n, v in vars(part).items() if n not in whole} for part in parts]
        seconds = sum(part.seconds for part in parts)
        return replace(parts[0], seconds=seconds, **_along_images(torch.cat, fields))

    def to_datatree(self) -> Any:
        """The chains as an ``xarray.DataTree``; see :mod:`pyro_vae_defence.diagnostics`."""
        return diagnostics.to_datatree(
            _to_numpy(self.samples),
            _to_numpy(self.sample_stats),
            _to_numpy({self.observation: self.x}),
            attrs={"inference_library": "pyro_vae_defence", **self.settings},
        )

    def to_arviz(self) -> Any:
        """The chains for ArviZ: groups ``posterior``, ``sample_stats`` and ``observed_data``."""
        return diagnostics.to_arviz(self.to_datatree())


_IMAGE_DIM = {"initial": 1, "samples": 2, "sample_stats": 2}  # 0 in all others


def _along_images(
    change: Callable[[list[Tensor], int], Tensor], parts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """``change`` of each field's tensors, one of every part, and of their dimension of images."""
    changed: dict[str, Any] = {}
    for name, value in parts[0].items():
        dim, values = _IMAGE_DIM.get(name, 0), [part[name] for part in parts]
        if isinstance(value, Tensor):
            changed[name] = change(values, dim)
        elif isinstance(value, tuple):
            changed[name] = tuple(
                None if each[0] is None else change(list(each), dim)
                for each in zip(*values, strict=True)
            )
        else:
            changed[name] = {key: change([each[key] for each in values], dim) for key in value}
    return changed


def setting(value: Any) -> int | float | str:
    """An argument in :attr:`DefenceResult.settings`, where netCDF asks for a number or text."""
    if isinstance(value, functools.partial):
        bound = [f"{name}={part}" for name, part in value.keywords.items()]
        return f"{setting(value.func)}({', '.join([*map(str, value.args), *bound])})"
    if isinstance(value, (int, float, str)):
        return int(value) if isinstance(value, bool) else value
    if not hasattr(value, "__name__") and " object at 0x" in str(value):
        value = type(value)  # where it stands in memory says nothing
    return getattr(value, "__name__", str(value))


def _to_numpy(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}
