"""Trained weights and the cards that describe them.

A model is two files: ``NAME.safetensors`` with the weights, and ``NAME.json``, its card, with the
sha256 of the weights, the architecture, how it was trained (command, commit, configuration,
versions) and what was measured. Nothing is unpickled, and weights that do not match their card are
refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
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

PACKAGED = Path(__file__).parent / "weights"

# Attributes of a VAE, site -> tensor, that are stored beside the weights as "attribute.site".
_STATISTICS = ("mean_posterior_variance", "mean_noise_variance")


def _nvae(**config: Any) -> NVAE:
    return NVAE(NVAEConfig.from_dict(config))


_ARCHITECTURES: dict[str, Callable[..., TrainedVAE]] = {"ConvVAE": ConvVAE, "NVAE": _nvae}


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
    """Names of the models in ``directory`` (packaged ones when ``None``)."""
    return sorted(path.stem for path in _directory(directory).glob("*.json"))


def load_card(name: str, directory: str | os.PathLike[str] | None = None) -> WeightCard:
    """Read the card of a model.

    Raises:
        ValueError: if there is no such model, or the card is damaged.
    """
    path = _directory(directory) / f"{name}.json"
    if not path.exists():
        raise ValueError(
            f"no pretrained model named {name!r}; available: "
            f"{', '.join(available(directory)) or 'none'}"
        )
    try:
        return WeightCard(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"card {path} is damaged ({error}); restore or train it again") from error


def load_weights(
    name: str, directory: str | os.PathLike[str] | None = None
) -> tuple[WeightCard, dict[str, Tensor]]:
    """The card and the tensors of a model, once their sha256 was found to match.

    Raises:
        ValueError: for an unknown name, or weights that are tampered with or truncated.
    """
    card = load_card(name, directory)
    path = _directory(directory) / f"{name}.safetensors"
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
        directory: where the files are; the packaged ones when ``None``.

    Raises:
        ValueError: for an unknown name, or weights that are tampered with, truncated or misfit.
    """
    card, tensors = load_weights(name, directory)
    if card.architecture not in _ARCHITECTURES:
        raise ValueError(
            f"card of {name!r} asks for architecture {card.architecture!r}; "
            f"this version knows {sorted(_ARCHITECTURES)}"
        )
    vae = _ARCHITECTURES[card.architecture](**card.architecture_config)
    for statistic in _STATISTICS:
        prefix = f"{statistic}."
        by_site = {
            key.removeprefix(prefix): tensors.pop(key).float()
            for key in list(tensors)
            if key.startswith(prefix)
        }
        if by_site:
            setattr(vae, statistic, by_site)
    try:
        vae.load_state_dict({key: value.float() for key, value in tensors.items()})
    except RuntimeError as error:
        raise ValueError(f"weights of {name!r} do not fit {card.architecture}: {error}") from error
    return vae.eval()


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
        vae: the trained module; its ``config`` holds the constructor's arguments, or knows them by
            ``to_dict``.
        name: file stem.
        directory: made when missing.
        training, command, provenance, metrics: see :class:`WeightCard`.
        mean_posterior_variance, mean_noise_variance: stored beside the weights, always in float32.
        dtype: precision of the stored weights.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {
        # Counters, as batch norm has one, stay whole numbers.
        key: value.detach()
        .cpu()
        .to(dtype if value.is_floating_point() else value.dtype)
        .contiguous()
        for key, value in vae.state_dict().items()
    }
    for statistic, by_site in zip(_STATISTICS, (mean_posterior_variance, mean_noise_variance)):
        for site, value in (by_site or {}).items():
            tensors[f"{statistic}.{site}"] = value.detach().cpu().float().contiguous()
    content = save_tensors(tensors)
    card = WeightCard(
        name,
        type(vae).__name__,
        vae.config if isinstance(vae.config, dict) else vae.config.to_dict(),
        hashlib.sha256(content).hexdigest(),
        training,
        command,
        provenance,
        metrics or {},
    )
    write_atomically(directory / f"{name}.safetensors", content)
    save_card(card, directory)
    return card


def save_card(card: WeightCard, directory: str | os.PathLike[str]) -> None:
    """Write a card atomically."""
    text = json.dumps(asdict(card), indent=2, sort_keys=False) + "\n"
    write_atomically(Path(directory) / f"{card.name}.json", text.encode())


def _directory(directory: str | os.PathLike[str] | None) -> Path:
    return PACKAGED if directory is None else Path(directory)
