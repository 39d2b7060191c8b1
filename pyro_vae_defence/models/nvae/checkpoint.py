"""Reading official checkpoints; reading and writing safetensors files.

An official ``checkpoint.pt`` is a dict with ``state_dict`` and ``args`` (an ``argparse.Namespace``)
beside the state of its training. It is unpickled with ``weights_only=True``; nothing but tensors,
containers and that namespace can be in it. Convolutions without weight normalisation appear twice
in its state dict, as ``*.weight`` and ``*.weight_normalized``; files older than that duplicate lack
it, and files of this library do too.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pyro_vae_defence.models.nvae.config import NVAEConfig
from pyro_vae_defence.models.nvae.nvae import NVAE
from pyro_vae_defence.ops.files import check_archive, write_atomically

SAFETENSORS_FORMAT = "pyro_vae_defence.nvae.v1"


def load_official(path: str | os.PathLike[str], *, ignore_args: tuple[str, ...] = ()) -> NVAE:
    """Model of an official checkpoint, on the CPU, in eval mode.

    The architecture is rebuilt from the file's ``args``, as the official evaluation does;
    ``res_elu`` models keep their trained weights (the official program overwrites some in its first
    pass).

    Args:
        path: file in the official format, written by CPU or GPU.
        ignore_args: names of stored arguments to ignore, for files of a modified training program.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint or damaged, holds other objects than described above,
            arguments that are missing, unknown or unsupported, or a state dict whose keys or shapes
            do not fit; the message names them.
    """
    path = Path(path)
    checkpoint = _unpickle(path)
    try:
        state_dict, args = checkpoint["state_dict"], checkpoint["args"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an official checkpoint; it lacks {error}") from error
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    try:
        if not isinstance(args, Mapping) or not isinstance(state_dict, Mapping):
            raise ValueError("not an official checkpoint; args and state_dict must be mappings")
        network = NVAE(NVAEConfig.from_official_args(args, ignore_args=ignore_args))
        _load(network, _without_aliases(network, state_dict))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return network.eval()


def save_safetensors(vae: NVAE, path: str | os.PathLike[str]) -> None:
    """Write the weights, and the configuration as JSON in the metadata, whole or not at all."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in vae.state_dict().items()}
    config = json.dumps(vae.config.to_dict(), sort_keys=True)
    metadata = {"format": SAFETENSORS_FORMAT, "config": config}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_safetensors(path: str | os.PathLike[str]) -> NVAE:
    """Model of a file of :func:`save_safetensors`, on the CPU, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or foreign, or its configuration, keys or shapes do not fit.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if (found := metadata.get("format")) != SAFETENSORS_FORMAT:
            raise ValueError(f"format is {found!r}, expected {SAFETENSORS_FORMAT!r}")
        network = NVAE(NVAEConfig.from_dict(json.loads(metadata["config"])))
        _load(network, state_dict)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an NVAE safetensors file: {error}") from error
    return network.eval()


def _unpickle(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Optimiser state makes up two thirds of a file; mapped, it is never read.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a file that is no checkpoint makes torch raise anything
        if isinstance(error, pickle.UnpicklingError):
            # torch's own words advise to run whatever the file holds.
            found = re.search(r"GLOBAL (\S+)|Unsupported \w+ (\S+)", str(error))
            what = found[0] if found else "other things than tensors and containers"
        else:
            what = f"{type(error).__name__}: {error}"
        message = f"{path}: cannot be read as a checkpoint of plain tensors: {what}"
        raise ValueError(message) from error


def _without_aliases(network: NVAE, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official state dict without duplicates, each of which must equal its original."""
    named = {_plain_name(key): value for key, value in state_dict.items()}
    if len(named) != len(state_dict):
        raise ValueError("state_dict holds weights twice, with and without a prefix module.")
    state_dict = named
    if others := sorted(str(k) for k, v in state_dict.items() if not isinstance(v, Tensor)):
        raise ValueError(f"state_dict holds other things than tensors: {_few(others)}")
    for name in [name for name, part in network.named_modules() if type(part) is nn.Conv2d]:
        key, alias = f"{name}.weight", f"{name}.weight_normalized"
        duplicate, original = state_dict.pop(alias, None), state_dict.get(key)
        if duplicate is None or original is None:
            continue  # an old file, or a missing key that is reported with all the others
        if not torch.equal(duplicate, original):
            raise ValueError(f"state_dict[{alias!r}] differs from state_dict[{key!r}]")
    return state_dict


def _plain_name(key: Any) -> str:
    """A key without what ``DistributedDataParallel`` and ``torch.compile`` put before it."""
    return re.sub(r"^(?:module\.|_orig_mod\.)+", "", str(key))


def _load(network: NVAE, state_dict: Mapping[str, Tensor]) -> None:
    expected = network.state_dict()
    # Only a count of batches, which nothing reads.
    optional = {key for key in expected if key.endswith("num_batches_tracked")}
    problems = {
        "keys are missing": sorted(set(expected) - optional - set(state_dict)),
        "keys are unexpected": sorted(set(state_dict) - set(expected)),
        "shapes are wrong": [
            f"{key} {tuple(value.shape)} instead of {tuple(expected[key].shape)}"
            for key, value in state_dict.items()
            if key in expected and value.shape != expected[key].shape
        ],
    }
    if found := [f"{what}: {_few(items)}" for what, items in problems.items() if items]:
        raise ValueError("the weights do not fit the configuration; " + "; ".join(found))
    if spoiled := [
        key
        for key, value in state_dict.items()
        if value.is_floating_point() != expected[key].is_floating_point()
        or not value.isfinite().all()
    ]:
        raise ValueError(
            f"these weights are not finite numbers of floating point: {_few(sorted(spoiled))}"
        )
    network.load_state_dict(expected | dict(state_dict))


def _few(items: list[str]) -> str:
    shown = ", ".join(items[:5])
    return shown if len(items) <= 5 else f"{shown} and {len(items) - 5} more"
