"""Reading official checkpoints; reading and writing safetensors files.

An official ``checkpoint.pt`` is a dict with ``state_dict`` and ``args`` (an ``argparse.Namespace``)
beside the state of its training. It is unpickled with ``weights_only=True``; nothing but tensors,
containers and that namespace can be in it. Convolutions without weight normalisation appear twice
in its state dict, as ``*.weight`` and ``*.weight_normalized``; files older than that duplicate lack
it, and files of this library do too.

Both formats are checked for changed bits: the archive that ``torch.save`` writes has checksums,
which torch does not look at, and :func:`save_safetensors` adds one to its file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pyro_vae_defence.models.nvae.config import NVAEConfig
from pyro_vae_defence.models.nvae.nvae import NVAE
from pyro_vae_defence.models.weights import fill, plain_names
from pyro_vae_defence.ops.files import load_tensors, naming, write_atomically

SAFETENSORS_FORMAT = "pyro_vae_defence.nvae.v1"


def load_official(path: str | os.PathLike[str], *, ignore_args: tuple[str, ...] = ()) -> NVAE:
    """Model of an official checkpoint, on the CPU, in eval mode.

    Args:
        path: file in the official format, written by CPU or GPU.
        ignore_args: names of stored arguments to ignore, for files of a modified training program.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file, if it is no checkpoint or damaged, holds other objects than
            described above, or what :func:`from_official` refuses.
    """
    path = _existing(path)
    mend = "pass a checkpoint.pt of the official program as it was written"
    with naming(f"{path} cannot be read as an official checkpoint", mend):
        # Optimiser state makes up two thirds of a file; mapped, it is read for checksums alone.
        checkpoint = load_tensors(path, classes=[argparse.Namespace], mmap=True)
        if not isinstance(checkpoint, Mapping):
            raise ValueError(f"it holds a {type(checkpoint).__name__}, no dict")
        if missing := [key for key in ("args", "state_dict") if key not in checkpoint]:
            raise ValueError(f"it lacks {' and '.join(missing)}")
        args, weights = checkpoint["args"], checkpoint["state_dict"]
        return from_official(args, weights, ignore_args=ignore_args)


def from_official(
    args: Any, state_dict: Mapping[str, Tensor], *, ignore_args: tuple[str, ...] = ()
) -> NVAE:
    """Model of an official checkpoint's two parts in memory, on the CPU, in eval mode.

    The architecture is rebuilt from ``args``, as the official evaluation does; ``res_elu`` models
    keep their trained weights (the official program overwrites some in its first pass). What
    ``DistributedDataParallel`` and ``torch.compile`` put before the names of weights is left out.

    Args:
        args: the arguments of the training, a mapping or an ``argparse.Namespace``.
        state_dict: the weights.
        ignore_args: names of arguments to ignore, for those of a modified training program.

    Raises:
        ValueError: naming arguments that are missing, unknown or unsupported, keys or shapes of
            ``state_dict`` that do not fit, or weights that are not finite.
    """
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, Mapping):
        raise ValueError(f"args must be a mapping or a namespace, not a {type(args).__name__}")
    config = NVAEConfig.from_official_args(args, ignore_args=ignore_args)
    return from_weights(config, _without_aliases(plain_names(state_dict)))


def from_weights(config: NVAEConfig, weights: Mapping[str, Tensor]) -> NVAE:
    """The network of a configuration with these weights; errors as :func:`from_official`."""
    if config.num_parts > len(weights):  # before as many are made
        raise ValueError(
            f"the configuration asks for {config.num_parts} cells and flows, but there are "
            f"{len(weights)} weights"
        )
    # Nothing reads the count of batches.
    return fill(lambda: NVAE(config), weights, optional="num_batches_tracked")


def save_safetensors(vae: NVAE, path: str | os.PathLike[str]) -> None:
    """Write the weights, and the configuration as JSON in the metadata, whole or not at all."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in vae.state_dict().items()}
    config = json.dumps(vae.config.to_dict(), sort_keys=True)
    metadata = {"format": SAFETENSORS_FORMAT, "config": config, "sha256": _digest(tensors)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_safetensors(path: str | os.PathLike[str]) -> NVAE:
    """Model of a file of :func:`save_safetensors`, on the CPU, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or foreign, or its configuration, keys or shapes do not fit.
    """
    path = _existing(path)
    mend = "write it again by save_safetensors"
    with naming(f"{path} cannot be read as an NVAE safetensors file", mend):
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if (found := metadata.get("format")) != SAFETENSORS_FORMAT:
                raise ValueError(f"its format is {found!r}, expected {SAFETENSORS_FORMAT!r}")
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        # Files of earlier versions have none.
        if metadata.get("sha256", digest := _digest(weights)) != digest:
            raise ValueError("it is damaged: its weights do not have the sha256 it names")
        config = json.loads(metadata.get("config", "null"))
        if not isinstance(config, dict):
            raise ValueError("its metadata holds no config")
        return from_weights(NVAEConfig.from_dict(config), weights)


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_aliases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official weights without duplicates, each of which must equal its original."""
    kept = dict(weights)
    for alias, value in weights.items():
        layer = alias.removesuffix(".weight_normalized")
        original = weights.get(f"{layer}.weight")
        # Normalised convolutions have no duplicate.
        if layer == alias or original is None or f"{layer}.log_weight_norm" in weights:
            continue
        kind = (value.dtype, value.layout)
        if kind != (original.dtype, original.layout) or not torch.equal(value, original):
            raise ValueError(f"state_dict[{alias!r}] differs from its original, {layer}.weight")
        del kept[alias]
    return kept
