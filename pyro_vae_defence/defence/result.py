"""What a defence returns: the latents it ends with, the chains behind them, and what they cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae_defence.models import program
from pyro_vae_defence.models.conditions import take
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.types import VAE, Latents


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

    def __repr__(self) -> str:
        num_chains, num_draws = next(iter(self.samples.values())).shape[:2]
        latents = ", ".join(f"{n!r} {tuple(v.shape[1:])}" for n, v in self.latents.items())
        return (
            f"DefenceResult({len(self.x)} images {tuple(self.x.shape[1:])}, latents {latents}, "
            f"{num_chains} chain(s) of {num_draws} draw(s), {self.seconds:.3g} s)"
        )

    @classmethod
    def join(cls, parts: Iterable[DefenceResult]) -> DefenceResult:
        """The result of all images from those of consecutive micro-batches, as of a stream.

        Raises:
            ValueError: for no part, or parts of different settings or shapes, as of two defences.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("parts is empty; join needs one result at least")
        if len(parts) == 1:
            return parts[0]
        kinds = [part._kind() for part in parts]
        for name, first in kinds[0].items():
            if other := [kind[name] for kind in kinds if kind[name] != first]:
                raise ValueError(
                    f"results of different {name} are not joined: {first}, {other[0]}; they must "
                    "be of one defence"
                )
        seconds = sum(part.seconds for part in parts)
        joined = _along_images(torch.cat, [_per_image(part) for part in parts])
        return replace(parts[0], seconds=seconds, **joined)

    def _kind(self) -> dict[str, Any]:
        """What results of one defence have in common."""

        def shape(tensors: list[Tensor], dim: int) -> Any:
            of_all = tuple(tensors[0].shape)
            return of_all[:dim] + of_all[dim + 1 :]

        return {
            "settings": of_defence(self.settings),
            "observation": self.observation,
            **_along_images(shape, [_per_image(self)]),
        }

    def to_datatree(self, image: int | None = None, *, log_likelihood: VAE | None = None) -> Any:
        """The chains as an ``xarray.DataTree``; see :mod:`pyro_vae_defence.diagnostics`.

        Args:
            image: which image's chains, without a dimension of images, as ArviZ's energy and pair
                plots want them; those of all when ``None``.
            log_likelihood: the VAE that was defended, to add a group of that name with
                log p(x_i | z) of each pixel and kept draw, in nats per value that the model
                observes: what ``arviz.loo`` reads. A float for each pixel of each draw; with many
                images take one at a time.

        Raises:
            ValueError: if there is no such image; and for ``log_likelihood`` if the draws are not
                of the posterior p(z | x), or pixels are not independent given the latents.
        """
        from pyro_vae_defence import diagnostics  # xarray and pandas take long to import

        rows, attrs = slice(None), {"inference_library": "pyro_vae_defence", **self.settings}
        if image is not None:
            attrs["image"] = image = diagnostics.check_image(image, len(self.x))
            rows = slice(image, image + 1)
        part, pixels = some_images(self, rows), {}
        if log_likelihood is not None:
            pixels = {self.observation: self._log_likelihood(log_likelihood, rows)}
        tree = diagnostics.to_datatree(
            _to_numpy(part.samples),
            _to_numpy(part.sample_stats),
            _to_numpy({self.observation: part.x}),
            attrs,
            _to_numpy(pixels),
        )
        return tree if image is None else diagnostics.select_image(tree, 0)

    def to_arviz(self, image: int | None = None, *, log_likelihood: VAE | None = None) -> Any:
        """The chains for ArviZ: groups ``posterior``, ``sample_stats`` and ``observed_data``.

        Arguments as for :meth:`to_datatree`.
        """
        from pyro_vae_defence import diagnostics

        return diagnostics.to_arviz(self.to_datatree(image, log_likelihood=log_likelihood))

    def summary(self) -> Any:
        """A ``pandas.DataFrame`` with a row per image: :func:`pyro_vae_defence.diagnostics.summary`
        and ``num_gradients``."""
        from pyro_vae_defence import diagnostics

        table = diagnostics.summary(self.to_datatree())
        table["num_gradients"] = self.num_gradients.cpu().numpy()
        return table

    @public
    @torch.no_grad()
    def _log_likelihood(self, vae: VAE, rows: slice) -> Tensor:
        """log p(x_i | z) of every pixel of some images, ``(chain, draw, N, C, H, W)``, in nats."""
        defence, assumed = self.settings.get("defence"), self.settings.get("perturbation")
        if (defence, assumed) != ("mcmc", setting(None)):
            raise ValueError(
                "log_likelihood is about draws of the posterior p(z | x), which MCMCDefence makes "
                f"without a perturbation; these are of defence={defence!r}, "
                f"perturbation={assumed!r}: leave it out"
            )
        at_all, x = program.at_images(vae, (self.x, *self.conditions), "x", unit_interval=False)
        first, last, _ = rows.indices(len(self.x))
        parts = []
        with program.evaluation_mode(vae):
            for start in range(first, last, ROWS):
                some = slice(start, min(start + ROWS, last))
                parts.append(some_images(self, some)._of_pixels(take(at_all, some), x[some]))
        return torch.cat(parts, 2)

    def _of_pixels(self, vae: VAE, x: Tensor) -> Tensor:
        """The same of all images ``x``, at which the VAE is."""
        shape = next(iter(self.samples.values())).shape[:2]
        draws = {name: value.flatten(0, 1) for name, value in self.samples.items()}
        at_once = max(1, ROWS // len(x))
        decode = program.Decoder(vae, x)
        found = []
        for start in range(0, shape.numel(), at_once):
            some = {n: v[start : start + at_once].flatten(0, 1) for n, v in draws.items()}
            copies = len(next(iter(some.values()))) // len(x)
            found.append(decode.log_likelihood(some, x.repeat(copies, 1, 1, 1)))
        return torch.cat(found).unflatten(0, (*shape, len(x)))


ROWS = 4096
"""Most pairs of image and latents of a result that are decoded at a time."""
_OF_A_RUN = ("prepare_why_not",)
_OF_THE_WHOLE = ("seconds", "observation", "settings")
_IMAGE_DIM = {"initial": 1, "samples": 2, "sample_stats": 2}  # 0 in all others


def of_defence(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that say what a run was made with, and not how it went."""
    return {name: value for name, value in settings.items() if name not in _OF_A_RUN}


def _per_image(result: DefenceResult) -> dict[str, Any]:
    """The fields that have a dimension of images."""
    return {n: v for n, v in vars(result).items() if n not in _OF_THE_WHOLE}


def some_images(result: DefenceResult, rows: slice) -> DefenceResult:
    """The part of these images."""
    first, last, _ = rows.indices(len(result.x))

    def pick(tensors: list[Tensor], dim: int) -> Tensor:
        return tensors[0].narrow(dim, first, last - first)

    return replace(result, **_along_images(pick, [_per_image(result)]))


def _along_images(
    change: Callable[[list[Tensor], int], Any], parts: Sequence[dict[str, Any]]
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
    default: object = object.__repr__  # says where a value stands in memory
    if type(value).__repr__ is default:
        value = type(value)
    return getattr(value, "__name__", str(value))


def _to_numpy(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}
