"""NVAE's files: official checkpoints and safetensors."""

from __future__ import annotations

import argparse
import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from nvae_reference import official_state_dict, one_pass
from torch import Tensor

from pyro_vae_defence.models.nvae import (
    NVAE,
    NVAEConfig,
    from_official,
    load_official,
    load_safetensors,
    save_safetensors,
)

CONFIG = NVAEConfig(
    num_groups_per_scale=2,
    num_latent_per_group=2,
    num_channels_enc=4,
    num_channels_dec=4,
    num_preprocess_cells=1,
    num_postprocess_cells=1,
    num_nf=1,
    use_se=True,
)
ALIAS = "dec_tower.1._ops.0.conv.1.conv.0.weight_normalized"


class Surprise:
    """Something a checkpoint has no business to hold."""


@pytest.fixture
def vae() -> NVAE:
    torch.manual_seed(0)
    return NVAE(CONFIG).eval()


def checkpoint(vae: NVAE, **args: Any) -> dict[str, Any]:
    """What the official program would write, tensors in shared storages included."""
    shared = torch.cat([v.flatten().float() for v in official_state_dict(vae).values()])
    state_dict: OrderedDict[str, Tensor] = OrderedDict()
    start = 0
    for key, value in official_state_dict(vae).items():
        view = shared[start : start + value.numel()].view(value.shape)
        state_dict[key] = view if value.is_floating_point() else value
        start += value.numel()
    training = {"batch_size": 8, "save": "/somewhere", "seed": 1, "fast_adamax": True}
    return {
        "epoch": 3,
        "state_dict": state_dict,
        "optimizer": {"state": {}},
        "global_step": 7,
        "args": argparse.Namespace(**(CONFIG.to_dict() | training | args)),
        "arch_instance": {"ar_nn": [""]},
        "scheduler": {},
        "grad_scalar": {},
    }


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def same_weights(one: NVAE, other: NVAE) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


# --- Official checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_official(vae: NVAE, tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(checkpoint(vae), path, _use_new_zipfile_serialization=not legacy)
    loaded = load_official(path)
    assert loaded.config == CONFIG
    assert same_weights(loaded, vae)
    assert not loaded.training
    assert not any(module.training for module in loaded.modules())
    os.unlink(path)  # nothing is mapped from the file any more
    x = torch.rand(1, 1, 28, 28)
    noise = [torch.randn(1, *shape) for shape in CONFIG.latent_shapes]
    assert torch.equal(one_pass(loaded, x, noise).logits, one_pass(vae, x, noise).logits)


def test_old_files(vae: NVAE, tmp_path: Path) -> None:
    """Neither the duplicate keys nor the later options, and arguments as a plain dict."""
    content = checkpoint(vae)
    content["state_dict"] = {
        k: v for k, v in content["state_dict"].items() if not k.endswith("weight_normalized")
    }
    later = ("ada_groups", "min_groups_per_scale", "num_mixture_dec")
    content["args"] = {k: v for k, v in vars(content["args"]).items() if k not in later}
    assert same_weights(load_official(save(content, tmp_path / "old.pt")), vae)


def test_batch_counts_are_optional(vae: NVAE, tmp_path: Path) -> None:
    content = checkpoint(vae)
    for key in [k for k in content["state_dict"] if k.endswith("num_batches_tracked")]:
        del content["state_dict"][key]
    assert same_weights(load_official(save(content, tmp_path / "c.pt")), vae)


def test_official_state_dict_has_the_duplicates(vae: NVAE) -> None:
    official = official_state_dict(vae)
    duplicates = {k for k in official if k.endswith(".weight_normalized")}
    assert ALIAS in duplicates
    assert set(official) - duplicates == set(vae.state_dict())
    for key in duplicates:
        original = key.removesuffix("_normalized")
        assert official[key].data_ptr() == official[original].data_ptr()
        assert list(official).index(key) == list(official).index(original) + 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"arch_instance": "res_wnelu"}, "arch_instance='res_wnelu' is unknown"),
        ({"dataset": "stacked_mnist"}, "dataset='stacked_mnist' is unknown"),
        ({"attention": 1}, r"args holds \['attention'\]"),
        ({"use_se": False}, "keys are unexpected: .*se.se.0.bias"),
        ({"num_cell_per_cond_enc": 2}, "keys are missing: enc_tower.1._ops"),
        (
            {"num_channels_dec": 8},
            r"shapes are wrong: dec_sampler.0.1.weight \(4, 16, 1, 1\) instead of \(4, 32, 1, 1\)",
        ),
        ({"num_latent_per_group": 3}, "shapes are wrong: "),
    ],
)
def test_other_architectures_are_refused(
    vae: NVAE, tmp_path: Path, args: dict[str, Any], message: str
) -> None:
    path = save(checkpoint(vae, **args), tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=message) as caught:
        load_official(path)
    assert str(path) in str(caught.value)


def test_unknown_arguments_can_be_ignored(vae: NVAE, tmp_path: Path) -> None:
    path = save(checkpoint(vae, use_wandb=True), tmp_path / "checkpoint.pt")
    assert same_weights(load_official(path, ignore_args=("use_wandb",)), vae)


def test_altered_state_dicts_are_refused(vae: NVAE, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"

    def refused(message: str, **changes: Any) -> None:
        content = checkpoint(vae)
        content["state_dict"].update(changes)
        for key in [k for k, v in content["state_dict"].items() if v is None]:
            del content["state_dict"][key]
        save(content, path)
        with pytest.raises(ValueError, match=message):
            load_official(path)

    weight = vae.state_dict()["stem.weight"]
    refused("keys are missing: stem.bias", **{"stem.bias": None})
    refused("keys are unexpected: attention.weight", **{"attention.weight": weight})
    refused("keys are unexpected: stem.weight_norm", **{"stem.weight_normalized": weight})
    refused(r"stem.weight \(4, 1, 9\) instead of", **{"stem.weight": weight.flatten(2)})
    refused("other things than tensors: stem.bias", **{"stem.bias": [0.0] * 4})
    refused("other things than tensors: ", **{ALIAS: [0.0]})
    refused("weight_normalized'] differs", **{ALIAS: 2 * official_state_dict(vae)[ALIAS]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, "it lacks args and state_dict"),
        ({"state_dict": {}}, "it lacks args"),
        ([1, 2], "it holds a list, no dict"),
        ({"state_dict": {}, "args": 3}, "args must be a mapping or a namespace, not a int"),
        ({"state_dict": {}, "args": {}, "extra": Surprise()}, "cannot be read .*Surprise"),
    ],
)
def test_other_files_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message.replace(" .*", "(?s: .*)")):
        load_official(save(content, tmp_path / "checkpoint.pt"))


def test_damaged_files_are_refused(vae: NVAE, tmp_path: Path) -> None:
    path = save(checkpoint(vae), tmp_path / "checkpoint.pt")
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read as an official checkpoint"):
            load_official(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_official(tmp_path / "absent.pt")


# --- Safetensors ----------------------------------------------------------------------------------


def test_safetensors(vae: NVAE, tmp_path: Path) -> None:
    path = tmp_path / "nvae.safetensors"
    save_safetensors(vae, path)
    loaded = load_safetensors(path)
    assert loaded.config == CONFIG
    assert same_weights(loaded, vae)
    assert not loaded.training
    assert os.listdir(tmp_path) == ["nvae.safetensors"]


def test_a_failed_write_leaves_the_old_file(
    vae: NVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "nvae.safetensors"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_safetensors(vae, path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["nvae.safetensors"]


def test_other_safetensors_are_refused(vae: NVAE, tmp_path: Path) -> None:
    path = tmp_path / "nvae.safetensors"
    save_safetensors(vae, path)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="cannot be read as an NVAE safetensors file"):
        load_safetensors(path)
    tensors = dict(vae.state_dict())
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match="format is None"):
        load_safetensors(path)
    metadata = {"format": "pyro_vae_defence.nvae.v1", "config": '{"num_groups": 3}'}
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"unknown NVAE configuration keys \['num_groups'\]"):
        load_safetensors(path)
    with pytest.raises(FileNotFoundError):
        load_safetensors(tmp_path / "absent")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped(vae: NVAE, tmp_path: Path, prefix: str) -> None:
    content = checkpoint(vae)
    content["state_dict"] = {prefix + k: v for k, v in content["state_dict"].items()}
    assert same_weights(load_official(save(content, tmp_path / "c.pt")), vae)
    content["state_dict"]["stem.bias"] = torch.zeros(4)
    with pytest.raises(ValueError, match="weights are there twice"):
        load_official(save(content, tmp_path / "c.pt"))


@pytest.mark.parametrize("value", [torch.full((4,), float("nan")), torch.ones(4).long()])
def test_weights_that_are_no_finite_floats_are_refused(
    vae: NVAE, tmp_path: Path, value: Tensor
) -> None:
    content = checkpoint(vae)
    content["state_dict"]["stem.bias"] = value
    with pytest.raises(ValueError, match="not finite numbers of floating point: stem.bias"):
        load_official(save(content, tmp_path / "c.pt"))


def test_a_flipped_bit_is_refused(vae: NVAE, tmp_path: Path) -> None:
    path = save(checkpoint(vae), tmp_path / "c.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.pt.*damaged"):
        load_official(path)


def test_no_message_advises_to_unpickle_anything(tmp_path: Path) -> None:
    path = save({"state_dict": Surprise()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="Surprise") as caught:
        load_official(path)
    assert "weights_only" not in str(caught.value)


def test_a_state_dict_in_memory(vae: NVAE) -> None:
    content = checkpoint(vae)
    assert same_weights(from_official(content["args"], content["state_dict"]), vae)
    loaded = from_official(CONFIG.to_dict(), vae.state_dict())
    assert same_weights(loaded, vae)
    assert not loaded.training
    for args, weights, message in (
        (3, vae.state_dict(), "args must be a mapping or a namespace, not a int"),
        (CONFIG.to_dict(), 3, "the weights are a int, not names and tensors"),
        (CONFIG.to_dict(), {1: torch.ones(1)}, "other things than tensors: 1"),
        ({"num_nf": 1}, {}, r"args lacks \['arch_instance'"),
    ):
        with pytest.raises(ValueError, match=message):
            from_official(args, weights)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_groups_per_scale", 10**9),
        ("num_preprocess_cells", 10**9),
        ("num_nf", 10**9),
        ("num_channels_enc", 10**12),
        ("num_latent_per_group", 10**30),
        ("num_latent_scales", 10**12),
        ("num_channels_dec", "4"),
        ("num_channels_dec", 4.0),
        ("use_se", 1),
    ],
)
def test_no_network_is_made_before_its_weights_are_compared(
    vae: NVAE, tmp_path: Path, name: str, value: Any
) -> None:
    path = save(checkpoint(vae, **{name: value}), tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt cannot be read as an official checkpoint"):
        load_official(path)


def test_weights_of_other_kinds_are_refused(vae: NVAE) -> None:
    stem = vae.state_dict()["stem.bias"]
    for value in (stem.to_sparse(), stem.to("meta"), stem.to(torch.complex64), stem > 0):
        with pytest.raises(ValueError, match=r"finite numbers of floating point: stem\.bias"):
            from_official(CONFIG.to_dict(), {**vae.state_dict(), "stem.bias": value})
    count = next(key for key in vae.state_dict() if key.endswith("num_batches_tracked"))
    wrong = (1.5, -3.0, -3, math.inf, math.nan, 1e30, 2**53, True)
    for value in map(torch.tensor, wrong):
        with pytest.raises(ValueError, match=f"no counts from 0 to below 2\\^53: {count}"):
            from_official(CONFIG.to_dict(), {**vae.state_dict(), count: value})
    for value in map(torch.tensor, (7, 7.0, 2**53 - 1)):
        read = from_official(CONFIG.to_dict(), {**vae.state_dict(), count: value})
        assert torch.equal(read.state_dict()[count], value.long())


def test_a_flipped_bit_of_safetensors_is_refused(vae: NVAE, tmp_path: Path) -> None:
    path = tmp_path / "nvae.safetensors"
    save_safetensors(vae, path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="do not have the sha256 it names"):
        load_safetensors(path)


@pytest.mark.parametrize("config", ["", "[1]", "[" * 100_000, '{"num_nf": "1"}'])
def test_safetensors_with_another_configuration_are_refused(
    vae: NVAE, tmp_path: Path, config: str
) -> None:
    metadata = {"format": "pyro_vae_defence.nvae.v1", "config": config}
    safetensors.torch.save_file(dict(vae.state_dict()), tmp_path / "n.safetensors", metadata)
    with pytest.raises(ValueError, match=r"n\.safetensors cannot be read as") as caught:
        load_safetensors(tmp_path / "n.safetensors")
    assert "\n" not in str(caught.value)
