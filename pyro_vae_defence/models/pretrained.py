"""Trained weights and the cards that describe them.

A model is two files: ``NAME.safetensors`` with the weights, and ``NAME.json``, its card, with their
sha256, the architecture, how it was trained (command, commit, configuration, versions) and what was
measured. Nothing is unpickled, and weights that do not match their card are refused.

Without a directory, models are looked for in two places: among the packaged ones, which examples
and documentation load, and, in a checkout of the project, among the variants of its tables, which
lie beside the results (``docs/results/models``) and are not installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pyro_vae_defence.models.conv import ConvVAE
from pyro_vae_defence.models.nvae import NVAE, NVAEConfig
from pyro_vae_defence.ops.files import write_atomically
from pyro_vae_defence.types import Latents

TrainedVAE: TypeAlias = ConvVAE | NVAE

PACKAGED_MODELS = Path(__file__).parent / "weights"
# Only a checkout has these.
CHECKOUT_MODELS = Path(__file__).parents[2] / "docs" / "results" / "models"

# Attributes of a VAE, site -> tensor, that are stored beside the weights as "attribute.site".
_STATISTICS = ("mean_posterior_variance", "mean_noise_variance")


_VAES: dict[str, Callable[..., TrainedVAE]] = {
    "ConvVAE": ConvVAE,
    "NVAE": lambda **config: NVAE(NVAEConfig.from_dict(config)),
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
    try:
        # A copy under another name is another model: what is measured goes to its own card.
        return replace(WeightCard(**json.loads(path.read_text())), name=name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"card {path} is damaged ({error}); restore or train it again") from error


def load_weights(
    name: str, directory: str | os.PathLike[str] | None = None
) -> tuple[WeightCard, dict[str, Tensor]]:
    """The card and the tensors of a model, once their sha256 was found to match.

    Raises ``ValueError`` for an unknown name, or weights that are tampered with or truncated.
    """
    card = load_card(name, directory)
    path = find(name, directory) / f"{name}.safetensors"
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != card.sha256:
        raise ValueError(
            f"weights {path} do not match their card (sha256): the file is missing, truncated or "
            "altered; restore it or train the model again"
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
    for key in [key for key in tensors if key.startswith(_STATISTICS)]:
        statistic, _, site = key.partition(".")
        statistics.setdefault(statistic, {})[site] = tensors.pop(key).float()
    vae = rebuild(_VAES[card.architecture], card, tensors)
    for statistic, by_site in statistics.items():
        setattr(vae, statistic, by_site)
    return vae


def rebuild(architecture: Callable[..., Any], card: WeightCard, tensors: dict[str, Tensor]) -> Any:
    """A module of ``architecture`` with the card's configuration and these weights, in eval mode.

    Raises ``ValueError`` if the weights do not fit.
    """
    module = architecture(**card.architecture_config)
    if spoiled := sorted(key for key, value in tensors.items() if not value.isfinite().all()):
        raise ValueError(f"weights of {card.name!r} are not finite: {', '.join(spoiled[:5])}")
    try:
        module.load_state_dict({key: value.float() for key, value in tensors.items()})
    except RuntimeError as error:
        message = f"weights of {card.name!r} do not fit {card.architecture}: {error}"
        raise ValueError(message) from error
    return module.eval()


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
    """
    _check_name(name)
    directory = Path(directory)
    tensors: dict[str, Tensor] = {}
    for key, value in vae.state_dict().items():
        # Counters, as batch norm has one, stay whole numbers.
        stored = dtype if value.is_floating_point() else value.dtype
        tensors[key] = value.detach().cpu().to(stored).contiguous()
    for statistic, by_site in zip(_STATISTICS, (mean_posterior_variance, mean_noise_variance)):
        for site, value in (by_site or {}).items():
            tensors[f"{statistic}.{site}"] = value.detach().cpu().float().contiguous()
    content = save_tensors(tensors)
    sha256 = hashlib.sha256(content).hexdigest()
    config = vae.config if isinstance(vae.config, dict) else vae.config.to_dict()
    card = WeightCard(
        name, type(vae).__name__, config, sha256, training, command, provenance, metrics or {}
    )
    write_atomically(directory / f"{name}.safetensors", content)
    save_card(card, directory)
    return card


def save_card(card: WeightCard, directory: str | os.PathLike[str] | None = None) -> None:
    """Write a card atomically, to ``directory`` or over the one that :func:`find` finds."""
    _check_name(card.name)
    place = find(card.name) if directory is None else Path(directory)
    text = json.dumps(asdict(card), indent=2, sort_keys=False) + "\n"
    write_atomically(place / f"{card.name}.json", text.encode())


def _check_name(name: Any) -> None:
    """Refuse names that are paths: their files would lie outside the directory."""
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+", name) or name in (".", ".."):
        raise ValueError(f"name must be a file's stem without directories, got {name!r}")


def _places(directory: str | os.PathLike[str] | None) -> tuple[Path, ...]:
    return (PACKAGED_MODELS, CHECKOUT_MODELS) if directory is None else (Path(directory),)
