"""Per-image arguments of a VAE's programs: labels, masks, the other half of an image.

The programs of a conditional VAE are ``model(x, *conditions)`` and ``guide(x, *conditions)``.
Wherever this library takes images it takes a tuple ``(x, *conditions)`` as well, as a loader yields
them; each condition is a tensor with one row per image. What is computed in rows (chains, restarts,
draws, micro-batches) then has them as it has the images: :class:`BoundVAE` is the one place where
they are selected and repeated. All else sees a VAE whose programs take images alone.

Arguments that a user has bound beforehand, ``functools.partial(vae.model, y=labels)``, are treated
alike: a tensor with one row per image follows the rows.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from pyro_vae_defence.models.sites import aside, get_trace
from pyro_vae_defence.ops.checks import check_on_device
from pyro_vae_defence.types import VAE, ImagesLike, PyroProgram

T = TypeVar("T")

# --- Which arguments programs take ----------------------------------------------------------------


def taken(batch: ImagesLike, vae: VAE) -> tuple[Any, ...]:
    """The entries ``(x, *conditions)`` of a loader's batch that the programs of ``vae`` take.

    An entry is taken where both programs have a positional parameter for it, without a default or
    with the default ``None``; one with another default, such as ``annealing=1.0``, is a setting.
    Entries that nobody takes are left out, and so is ``None`` in the last place.

    Raises:
        ValueError: if the batch is empty, the programs take different arguments, or need more.
    """
    entries = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if not entries:
        raise ValueError("a batch is empty; it must be images, or a tuple that starts with them")
    while len(entries) > 1 and entries[-1] is None:
        entries = entries[:-1]
    (needed, most), (needed_guide, most_guide) = _places(vae.model), _places(vae.guide)
    given = len(entries) - 1
    if given and min(most, given) != min(most_guide, given):
        raise ValueError(
            f"vae.model takes {most:g} arguments beside the images and vae.guide {most_guide:g}; "
            "as in pyro.infer.SVI both are called with the same ones, so let both take them"
        )
    if given < max(needed, needed_guide):
        mend = "pass a tuple (x, *conditions), each condition with one row per image"
        if isinstance(vae, type):
            mend = f"vae is the class {vae.__name__}: pass an instance of it, or {mend}"
        raise ValueError(
            f"the programs need {max(needed, needed_guide)} arguments beside the images, got "
            f"{given}; {mend}"
        )
    return entries[: 1 + int(min(most, given))]


def _places(program: PyroProgram) -> tuple[int, float]:
    """How many arguments beside images a program needs, and how many it takes at most."""
    if isinstance(program, nn.Module):
        program = program.forward
    try:
        parameters = list(inspect.signature(program).parameters.values())
    except (TypeError, ValueError):
        return 0, float("inf")
    needed = most = 0
    images = True
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            return needed, float("inf")
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise ValueError(
                f"argument {parameter.name!r} of a program is needed and keyword-only; conditions "
                f"come by position, (x, {parameter.name}), so drop the * before it"
            )
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            break
        if images:
            images = False
        elif parameter.default is parameter.empty:
            needed, most = needed + 1, most + 1
        elif parameter.default is None:
            most += 1
        else:
            break
    return needed, most


def split(images: ImagesLike, name: str = "x") -> tuple[Tensor, tuple[Tensor, ...]]:
    """Images, which are not looked at, and their conditions.

    Raises:
        ValueError: if a condition is no tensor with one row per image, on the images' device.
    """
    if not isinstance(images, (tuple, list)):
        return cast(Tensor, images), ()
    if not images:
        raise ValueError(f"{name} is empty; it must be images, or a tuple (x, *conditions)")
    x, *conditions = images
    while conditions and conditions[-1] is None:
        conditions.pop()
    for number, value in enumerate(conditions, 1):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name}[{number}] must be a tensor with one row per image, got "
                f"{type(value).__name__}; wrap it in torch.as_tensor"
            )
        if isinstance(x, Tensor):
            check_on_device(f"{name}[{number}]", value, f"{name}[0]", x.device)
        if isinstance(x, Tensor) and value.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"{name}[{number}] must have one row for each of {len(x)} images, got shape "
                f"{tuple(value.shape)}"
            )
    return x, tuple(conditions)


def rows_of(conditions: tuple[Any, ...], rows: Tensor | slice) -> tuple[Any, ...]:
    """Conditions of the images at ``rows``."""
    return tuple(None if value is None else value[rows] for value in conditions)


def kept(value: T) -> T:
    """A tensor, ``None``, or a tuple of such, for a result to hold: a copy without a graph, which a
    caller who fills his buffer with the next batch does not change."""
    given: Any = value
    if isinstance(given, tuple):
        return cast(T, tuple(map(kept, given)))
    return cast(T, None if given is None else given.detach().clone())


# --- Programs of images alone ---------------------------------------------------------------------


def fold(value: Any, num_rows: int) -> Any:
    """Rows of ``value``, copy after copy, as images are repeated; ``ValueError`` if none fits.

    ``None`` stays what it is.
    """
    if value is None:
        return None
    times, rest = divmod(num_rows, len(value))
    if rest or times == 0:
        raise ValueError(
            f"the programs are called with {num_rows} images, but their conditions have "
            f"{len(value)} rows; pass (x, *conditions), each with one row per image"
        )
    return value if times == 1 else value.repeat((times,) + (1,) * (value.dim() - 1))


class BoundProgram:
    """A model or a guide with its per-image arguments: a program of images alone.

    Called with k times as many images as it has rows, it takes them for k copies, one after the
    other, as chains and draws are folded into a batch.
    """

    def __init__(
        self, program: PyroProgram, conditions: tuple[Any, ...], keywords: Mapping[str, Tensor]
    ) -> None:
        self.program, self.conditions, self.keywords = program, conditions, dict(keywords)

    @property
    def num_images(self) -> int:
        """How many images it has arguments of; 0 if it has none."""
        given = (v for v in (*self.conditions, *self.keywords.values()) if v is not None)
        return max((len(value) for value in given), default=0)

    def arguments(self, num_rows: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """What follows the images in a call with ``num_rows`` of them."""
        folded = {name: fold(value, num_rows) for name, value in self.keywords.items()}
        return tuple(fold(value, num_rows) for value in self.conditions), folded

    def around(self, program: PyroProgram) -> BoundProgram:
        """Another program with the same arguments."""
        return BoundProgram(program, self.conditions, self.keywords)

    def take(self, rows: Tensor | slice) -> BoundProgram:
        """The program of the images at ``rows``."""
        keywords = {name: value[rows] for name, value in self.keywords.items()}
        return BoundProgram(self.program, rows_of(self.conditions, rows), keywords)

    def __call__(self, x: Tensor) -> Any:
        """Run the program at images ``x``, of which it may have fewer arguments: see the class."""
        conditions, keywords = self.arguments(len(x))
        return self.program(x, *conditions, **keywords)


class BoundVAE:
    """A VAE with the per-image arguments of some images; see :class:`BoundProgram`.

    Attributes:
        vae: the VAE without them.
        model, guide: programs of images alone.
    """

    def __init__(self, vae: VAE, model: PyroProgram, guide: PyroProgram) -> None:
        self.vae, self.model, self.guide = vae, model, guide

    @property
    def num_images(self) -> int:
        """How many images it has arguments of."""
        programs = (self.model, self.guide)
        return max(p.num_images for p in programs if isinstance(p, BoundProgram))

    def take(self, rows: Tensor | slice) -> BoundVAE:
        """The VAE at the images of ``rows``, int64 or a slice."""
        model, guide = (
            program.take(rows) if isinstance(program, BoundProgram) else program
            for program in (self.model, self.guide)
        )
        return BoundVAE(self.vae, model, guide)


def same_vae(one: VAE, other: VAE) -> bool:
    """Whether two VAEs are of the same programs, whatever conditions they are bound to."""
    one, other = (vae.vae if isinstance(vae, BoundVAE) else vae for vae in (one, other))
    return one is other or (one.model, one.guide) == (other.model, other.guide)


def take(vae: VAE, rows: Tensor | slice) -> VAE:
    """``vae`` at the images of ``rows``: itself unless it has per-image arguments."""
    return vae.take(rows) if isinstance(vae, BoundVAE) else vae


def bind(
    vae: VAE, x: Tensor, conditions: tuple[Tensor, ...] = (), image: Tensor | None = None
) -> VAE:
    """``vae`` with ``conditions``, and what its programs have bound themselves, for images ``x``.

    Without either it is ``vae`` itself. Where ``x`` are rows of a larger set, ``image`` says which
    images of the set they are, int64 ``(N,)``: what programs have bound is the set's.

    Raises:
        ValueError: if the programs do not take the conditions, or need others.
    """
    if isinstance(vae, BoundVAE):
        if not conditions:
            return vae
        vae = vae.vae
    if len(taken((x, *conditions), vae)) <= len(conditions):
        raise ValueError(
            f"vae takes fewer arguments than the {len(conditions)} conditions given beside the "
            "images; write model(self, x, y) and guide(self, x, y), or pass the images alone"
        )
    keywords = [_per_image(program, x, image) for program in (vae.model, vae.guide)]
    if not conditions and not any(keywords):
        return vae
    programs = [
        BoundProgram(program, conditions, own)
        for program, own in zip((vae.model, vae.guide), keywords, strict=True)
    ]
    return BoundVAE(vae, *programs)


def _per_image(program: PyroProgram, x: Tensor, image: Tensor | None) -> dict[str, Tensor]:
    """What a partial program holds for every single image, for the rows ``x``."""
    if not isinstance(program, functools.partial):
        return {}
    index = torch.arange(len(x), device=x.device) if image is None else image
    fewest = int(index.max()) + 1
    held = {
        name: value
        for name, value in program.keywords.items()
        if isinstance(value, Tensor)
        and value.dim() > 0
        and (len(value) >= fewest if image is not None else len(value) == fewest)
    }
    rows = {name: value[index] for name, value in held.items()}
    # Whatever its size, a tensor that serves any number of images as it stands is not theirs: more
    # images than it has rows, since those of an attack may be half of the set.
    copies = 1 + max(map(len, held.values()), default=0) // len(x)
    folded = {name: torch.cat([value] * copies) for name, value in rows.items()}
    many = x.repeat(copies, 1, 1, 1)
    return {
        name: value
        for name, value in rows.items()
        if not _runs(program, many, {**folded, name: held[name]})
    }


def _runs(program: PyroProgram, x: Tensor, keywords: dict[str, Tensor]) -> bool:
    try:
        with torch.no_grad(), aside(x.device):
            get_trace(program, x, **keywords).compute_log_prob()
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False
    return True
