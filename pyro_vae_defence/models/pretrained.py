"""Trained weights and the cards that describe them.

A model is two files: ``NAME.safetensors`` with the weights, and ``NAME.json``, its card, with their
sha256, the architecture, how it was trained (command, commit, configuration, versions) and what was
measured. Nothing is unpickled; weights that do not match their card, and files that are not as this
module writes them, are refused by the path of the file. Names of models are never paths.

Without a directory, models are looked for in two places: among the packaged ones, which examples
and documentation load, and, in a checkout of the project, among the variants of its tables, which
lie beside the results (``docs/results/models``) and are not installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from pyro_vae_defence.models.conditional import ConditionalVAE
from pyro_vae_defence.models.conv import ConvVAE
from pyro_vae_defence.models.nvae import NVAE, NVAEConfig
from pyro_vae_defence.models.nvae.checkpoint import from_weights
from pyro_vae_defence.models.weights import check_finite, fill
from pyro_vae_defence.ops.files import naming, write_atomically
from pyro_vae_defence.types import Latents

TrainedVAE: TypeAlias = ConvVAE | ConditionalVAE | NVAE
R = TypeVar("R")

PACKAGED_MODELS = Path(__file__).parent / "weights"
# Only a checkout has these.
CHECKOUT_MODELS = Path(__file__).parents[2] / "docs" / "results" / "models"

# Attributes of a VAE, site -> tensor, that are stored beside the weights as "attribute.site".
_STATISTICS = ("mean_posterior_variance", "mean_noise_variance")


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_RESTORE = "restore the file or train the model again"


def _conv_vae(config: dict[str, Any], weights: dict[str, Tensor]) -> ConvVAE:
    return fill(lambda: ConvVAE(**config), weights)


def _conditional_vae(config: dict[str, Any], weights: dict[str, Tensor]) -> ConditionalVAE:
    return fill(lambda: ConditionalVAE(**config), weights)


def _nvae(config: dict[str, Any], weights: dict[str, Tensor]) -> NVAE:
    return from_weights(NVAEConfig.from_dict(config), weights)


_VAES: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], TrainedVAE]] = {
    "ConvVAE": _conv_vae,
    "ConditionalVAE": _conditional_vae,
    "NVAE": _nvae,
}


@dataclass(frozen=True)
class WeightCard:
    """What is known about trained weights.

    Attributes:
        name: the model's name.
        architecture: class name, e.g. ``"ConvVAE"``.
        architecture_config: its constructor's arguments.
        sha256: of the weights file.
        training: configuration of the training run.
        command: the command that trained it.
        provenance: commit, versions of libraries, wall time in seconds, machine.
        metrics: what was measured, by the metric's full name.
    """

    name: str
    architecture: str
    architecture_config: dict[str, Any]
    sha256: str
    training: dict[str, Any]
    command: str
    provenance: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def dataset(self) -> str:
        """What the model was trained on; ``ValueError`` if the card does not say."""
        found = self.training.get("dataset")
        if not isinstance(found, str):
            raise ValueError(
                f"card of {self.name!r} does not say what the model was trained on: add its "
                '"dataset" to "training"'
            )
        return found


def available(directory: str | os.PathLike[str] | None = None) -> list[str]:
    """Names of the models in ``directory``, or in all places of the module's text."""
    return sorted({path.stem for place in _places(directory) for path in place.glob("*.json")})


def find(name: str, directory: str | os.PathLike[str] | None = None) -> Path:
    """The place that has a model's card, the first one if several; ``ValueError`` if none has."""
    _check_name(name)
    for place in _places(directory):
        if (place / f"{name}.json").is_file():
            return place
    known = ", ".join(available(directory)) or "none"
    if directory is None and not CHECKOUT_MODELS.is_dir():
        known += (
            "; the variants of the tables are not installed: run from a checkout of the project, "
            "or pass its docs/results/models as directory (--models)"
        )
    raise ValueError(f"no pretrained model named {name!r}; available: {known}")


def load_card(name: str, directory: str | os.PathLike[str] | None = None) -> WeightCard:
    """Read the card of a model; ``ValueError`` if there is no such model, or a damaged card."""
    path = find(name, directory) / f"{name}.json"
    with naming(f"card {path} is damaged", _RESTORE):
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError(f"it holds a {type(entries).__name__}, no entries by name")
        # A copy under another name is another model: what is measured goes to its own card.
        card = replace(WeightCard(**entries), name=name)
        for entry in fields(card):
            kind, value = dict if "dict" in str(entry.type) else str, getattr(card, entry.name)
            if not isinstance(value, kind):
                raise ValueError(f"its {entry.name} is {value!r}, not of type {kind.__name__}")
    return card


def load_weights(
    name: str, directory: str | os.PathLike[str] | None = None
) -> tuple[WeightCard, dict[str, Tensor]]:
    """The card and the tensors of a model, once their sha256 was found to match.

    Raises ``ValueError`` for an unknown name, or weights that are tampered with or truncated.
    """
    card = load_card(name, directory)
    path = find(name, directory) / f"{name}.safetensors"
    with naming(f"weights {path} cannot be read", _RESTORE):
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != card.sha256:
            raise ValueError(
                "they do not match their card by sha256: the file is missing, truncated or altered"
            )
        return card, load_tensors(content)


def load_pretrained(name: str, directory: str | os.PathLike[str] | None = None) -> TrainedVAE:
    """A trained VAE in eval mode, on the CPU.

    Its attribute ``mean_posterior_variance`` (site -> one image's shape) is the training set's
    average of the guide's variance, the metric for samplers that an attacker cannot move. An NVAE's
    ``mean_noise_variance`` is the same for the programs of
    :meth:`~pyro_vae_defence.models.nvae.NVAE.noncentred`.

    Args:
        name: one of :func:`available`.
        directory: where the files are; ``None`` as in the module's text.

    Raises:
        ValueError: for an unknown name, or weights that are tampered with, truncated or misfit.
    """
    card, tensors = load_weights(name, directory)
    if card.architecture not in _VAES:
        raise ValueError(
            f"card of {name!r} asks for architecture {card.architecture!r}; "
            f"this version knows {sorted(_VAES)}"
        )
    statistics: dict[str, Latents] = {}
    for key in list(tensors):
        statistic, _, site = key.partition(".")
        if statistic in _STATISTICS:
            statistics.setdefault(statistic, {})[site] = tensors.pop(key)
    vae = rebuild(_VAES[card.architecture], card, tensors, directory)
    with _misfit(card, directory):
        for statistic, by_site in statistics.items():
            _check_statistic(vae, statistic, by_site)
            setattr(vae, statistic, {site: value.float() for site, value in by_site.items()})
    return vae


def rebuild(
    architecture: Callable[[dict[str, Any], dict[str, Tensor]], R],
    card: WeightCard,
    tensors: dict[str, Tensor],
    directory: str | os.PathLike[str] | None = None,
) -> R:
    """What ``architecture`` makes of the card's configuration and these weights.

    Raises ``ValueError`` naming the file in ``directory`` if the weights do not fit.
    """
    with _misfit(card, directory), torch.device("cpu"):  # whatever the caller's default is
        return architecture(card.architecture_config, tensors)


def _misfit(
    card: WeightCard, directory: str | os.PathLike[str] | None
) -> contextlib.AbstractContextManager[None]:
    path = find(card.name, directory) / f"{card.name}.safetensors"
    return naming(f"weights {path} do not fit the {card.architecture} of their card", _RESTORE)


def _check_statistic(vae: TrainedVAE, statistic: str, by_site: Latents) -> None:
    """Refuse variances of other sites or shapes than the latents', and those that are not > 0."""
    shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(vae, NVAE):
        programs = vae if statistic == "mean_posterior_variance" else vae.noncentred()
        shapes = dict(zip(programs.sites, vae.config.latent_shapes))
    elif statistic == "mean_posterior_variance":
        shapes = {"z": (vae.latent_dim,)}
    found = {site: tuple(value.shape) for site, value in by_site.items()}
    if found != shapes:
        raise ValueError(f"{statistic} has shapes {found}, the latents {shapes}")
    check_finite({f"{statistic}.{site}": value for site, value in by_site.items()})
    if not all((value > 0).all() for value in by_site.values()):
        raise ValueError(f"{statistic} is not positive everywhere")


def save_pretrained(
    vae: Any,
    name: str,
    directory: str | os.PathLike[str],
    *,
    training: dict[str, Any],
    command: str,
    provenance: dict[str, Any],
    metrics: dict[str, Any] | None = None,
    mean_posterior_variance: Latents | None = None,
    mean_noise_variance: Latents | None = None,
    dtype: torch.dtype = torch.float32,
) -> WeightCard:
    """Write weights and card atomically, the card last.

    Args:
        vae: the trained module, with constructor arguments in ``config``, or in its ``to_dict()``.
        name: file stem.
        directory: made when missing.
        training, command, provenance, metrics: see :class:`WeightCard`.
        mean_posterior_variance, mean_noise_variance: stored beside the weights, always in float32.
        dtype: precision of the stored weights.

    Raises:
        ValueError: before anything is written, for a name that is a path, a module inside a
            wrapper, a card that JSON cannot hold, or weights that are not finite, be it in
            ``dtype``.
    """
    _check_name(name)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be one of floating point, got {dtype}")
    directory = Path(directory)
    if isinstance(vae, _WRAPPERS) or hasattr(vae, "_orig_mod"):
        raise ValueError(
            f"vae is wrapped in a {type(vae).__name__}: pass what is inside, vae.module or "
            "vae._orig_mod"
        )
    tensors: dict[str, Tensor] = {}
    for key, value in vae.state_dict().items():
        # Counters, as batch norm has one, stay whole numbers.
        stored = dtype if value.is_floating_point() else value.dtype
        tensors[key] = value.detach().cpu().to(stored).contiguous()
    for statistic, by_site in zip(_STATISTICS, (mean_posterior_variance, mean_noise_variance)):
        for site, value in (by_site or {}).items():
            tensors[f"{statistic}.{site}"] = value.detach().cpu().float().contiguous()
    check_finite({key: value for key, value in tensors.items() if value.is_floating_point()})
    content = save_tensors(tensors)
    sha256 = hashlib.sha256(content).hexdigest()
    config = vae.config if isinstance(vae.config, dict) else vae.config.to_dict()
    card = WeightCard(
        name, type(vae).__name__, config, sha256, training, command, provenance, metrics or {}
    )
    text = _card_text(card)
    write_atomically(directory / f"{name}.safetensors", content)
    write_atomically(directory / f"{name}.json", text)
    return card


def save_card(card: WeightCard, directory: str | os.PathLike[str] | None = None) -> None:
    """Write a card atomically, to ``directory`` or over the one that :func:`find` finds.

    Raises ``ValueError`` for a name that is a path, or one of an installed package, which is not
    written into (:func:`writable`).
    """
    _check_name(card.name)
    if not writable(directory):
        raise ValueError(
            f"{card.name!r} belongs to the installed package, which is not written into; copy its "
            "two files into a directory of yours and pass that as directory"
        )
    place = find(card.name) if directory is None else Path(directory)
    write_atomically(place / f"{card.name}.json", _card_text(card))


def writable(directory: str | os.PathLike[str] | None) -> bool:
    """Whether cards of ``directory`` may be changed; without one, those of a checkout alone."""
    return directory is not None or CHECKOUT_MODELS.is_dir()


def _card_text(card: WeightCard) -> bytes:
    try:
        return (json.dumps(asdict(card), indent=2, sort_keys=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"card of {card.name!r} holds what JSON does not know: {error}") from error


def _check_name(name: Any) -> None:
    """Refuse names that are paths: their files would lie outside the directory."""
    stem = isinstance(name, str) and re.fullmatch(r"[^/\\\0]{1,200}", name)
    if not stem or name in (".", ".."):
        raise ValueError(f"name must be a file's stem without directories, got {name!r:.200}")


def _places(directory: str | os.PathLike[str] | None) -> tuple[Path, ...]:
    return (PACKAGED_MODELS, CHECKOUT_MODELS) if directory is None else (Path(directory),)
