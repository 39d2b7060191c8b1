"""Which trained models are installed, where others are looked for, and what becomes of cards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae_defence.models import ConvVAE, pretrained
from pyro_vae_defence.models.pretrained import available, load_card, save_card, save_pretrained
from pyro_vae_defence.models.weights import fill

PACKAGE = Path(pretrained.__file__).resolve().parents[1]
LARGEST_WHEEL = 20e6  # bytes

# What examples, documentation and tests load.
INSTALLED = {
    *(f"{dataset}_vae" for dataset in ("mnist", "fashion_mnist", "color_mnist")),
    *(f"{dataset}_vae_classifier" for dataset in ("mnist", "fashion_mnist", "color_mnist")),
    *(f"{dataset}_features" for dataset in ("mnist", "fashion_mnist", "color_mnist")),
    "color_mnist_vae_color_classifier",
    "mnist_nvae",
}


def test_the_wheel_is_small_and_holds_no_variant():
    installed = {path.stem for path in pretrained.PACKAGED_MODELS.iterdir()}
    assert installed == INSTALLED
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    # Weights and images do not shrink when they are packed, source does.
    assert sum(path.stat().st_size for path in files) < LARGEST_WHEEL


def test_a_checkout_has_the_variants_of_the_tables_too():
    names = available()
    assert len(names) == len(set(names))
    assert set(names) - INSTALLED == set(available(pretrained.CHECKOUT_MODELS))
    card = load_card("mnist_beta_vae_2")
    assert (card.training["beta"], card.training["start_from"]) == (2.0, "mnist_vae")
    vae = pretrained.load_pretrained("mnist_beta_vae_2")
    assert vae.mean_posterior_variance["z"].shape == (64,)


def test_without_a_checkout_the_message_says_where_variants_are(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "CHECKOUT_MODELS", tmp_path / "absent")
    assert set(available()) == INSTALLED
    with pytest.raises(ValueError, match=r"'mnist_beta_vae_2'; available: .* from a checkout"):
        load_card("mnist_beta_vae_2")
    with pytest.raises(ValueError, match="available: none$"):
        load_card("mnist_vae", tmp_path)


def test_a_card_is_written_where_it_was_found(monkeypatch, tmp_path):
    first, second = tmp_path / "installed", tmp_path / "beside"
    monkeypatch.setattr(pretrained, "PACKAGED_MODELS", first)
    monkeypatch.setattr(pretrained, "CHECKOUT_MODELS", second)
    known = {"training": {}, "command": "none", "provenance": {}}
    for name, places in {"a": [first, second], "b": [second]}.items():
        for place in places:
            save_pretrained(ConvVAE(), name, place, **known)
        save_card(dataclasses.replace(load_card(name), metrics={"m": 1.0}))
    assert available() == ["a", "b"]
    assert load_card("a", first).metrics == load_card("b", second).metrics == {"m": 1.0}
    assert load_card("a", second).metrics == {}  # the installed one comes first
    with pytest.raises(ValueError, match="no pretrained model named 'c'; available: a, b"):
        save_card(dataclasses.replace(load_card("a"), name="c"))


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/a", "..", "a\\b", "a\0b", "", "a" * 5000, None, 3]
)
def test_names_that_are_paths_are_refused(tmp_path, name):
    place = tmp_path / "models"
    with pytest.raises(ValueError, match="name must be a file's stem"):
        load_card(name, place)
    with pytest.raises(ValueError, match="name must be a file's stem"):
        save_card(dataclasses.replace(load_card("mnist_vae"), name=name), place)
    assert not list(tmp_path.iterdir())


# --- Files that are not as they were written ------------------------------------------------------

CARD = json.loads((pretrained.PACKAGED_MODELS / "mnist_vae.json").read_text())
WEIGHTS = (pretrained.PACKAGED_MODELS / "mnist_vae.safetensors").read_bytes()
CONFIG = CARD["architecture_config"]


def altered(directory, change=None, weights=WEIGHTS, **entries):
    """The packaged model with some tensors or entries of its card changed, its sha256 right."""
    if change is not None:
        tensors = safetensors.torch.load(weights)
        change(tensors)
        weights = safetensors.torch.save(tensors)
    sha256 = hashlib.sha256(weights).hexdigest()
    (directory / "mine.safetensors").write_bytes(weights)
    (directory / "mine.json").write_text(json.dumps({**CARD, "sha256": sha256, **entries}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architecture_config": [1]}, "its architecture_config is"),
        ({"training": None}, "its training is None"),
        ({"sha256": 3}, "its sha256 is 3"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
        ({"architecture_config": {**CONFIG, "foo": 1}}, "no network.* argument 'foo'"),
        ({"architecture_config": {**CONFIG, "in_channels": "1"}}, "no network"),
        ({"architecture_config": {**CONFIG, "in_channels": 10**9}}, r"shapes are wrong: decoder"),
        ({"architecture_config": {**CONFIG, "latent_dim": 10**20}}, "no network"),
        ({"architecture_config": {**CONFIG, "latent_dim": 32}}, r"shapes are wrong: "),
        ({"architecture_config": {**CONFIG, "log_variance": "1"}}, "no network.* within ..100"),
    ],
)
def test_cards_that_do_not_fit_are_refused_by_their_file(tmp_path, entries, message):
    altered(tmp_path, **entries)
    with pytest.raises(ValueError, match=message) as caught:
        pretrained.load_pretrained("mine", tmp_path)
    assert str(tmp_path / "mine.") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "null", "[" * 100_000, "\xff", '{"name": 1}'])
def test_files_that_are_no_card_are_refused(tmp_path, text):
    (tmp_path / "mine.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=rf"card {tmp_path}/mine.json is damaged \(.*\); restore"):
        load_card("mine", tmp_path)


KEY, VARIANCE = "encoder.0.weight", "mean_posterior_variance.z"


def put(key, value):
    return lambda tensors: tensors.update({key: value(tensors[key]).contiguous()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(KEY, lambda v: v * math.nan), f"not finite numbers of floating point: {KEY}"),
        (put(KEY, lambda v: v.long()), f"not finite numbers of floating point: {KEY}"),
        (put(KEY, lambda v: v.double().fill_(1e300)), f"not finite numbers .*: {KEY}"),
        (put(KEY, lambda v: v[None]), rf"shapes are wrong: {KEY} \(1, 32, 1, 3, 3\) instead of"),
        (lambda tensors: tensors.pop(KEY), f"keys are missing: {KEY}"),
        (put(VARIANCE, lambda v: v[:3]), r"mean_posterior_variance has shapes \{'z': \(3,\)\}"),
        (put(VARIANCE, lambda v: -v), "mean_posterior_variance is not positive"),
        (put(VARIANCE, lambda v: v * math.nan), f"not finite .*: {VARIANCE}"),
        (lambda tensors: tensors.update({"mean_noise_variance.z": torch.ones(64)}), "has shapes"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_their_file(tmp_path, change, message):
    altered(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        pretrained.load_pretrained("mine", tmp_path)
    assert f"weights {tmp_path}/mine.safetensors do not fit" in str(caught.value)


@pytest.mark.parametrize("weights", [b"", WEIGHTS[:50], b"no safetensors"])
def test_files_that_are_no_weights_are_refused(tmp_path, weights):
    altered(tmp_path, weights=weights)
    with pytest.raises(ValueError, match=f"weights {tmp_path}/mine.safetensors cannot be read"):
        pretrained.load_pretrained("mine", tmp_path)


def test_nothing_is_written_that_could_not_be_read(tmp_path):
    known = {"training": {}, "command": "none", "provenance": {}}
    vae = ConvVAE()
    with torch.no_grad():
        vae.encoder[0].bias[0] = 1e5
    for changes, message in (
        ({"dtype": torch.float16}, "not finite numbers of floating point: encoder.0.bias"),
        ({"dtype": torch.int32}, "dtype must be one of floating point"),
        ({"provenance": {"when": object()}}, "holds what JSON does not know"),
        ({"vae": torch.nn.DataParallel(vae)}, "wrapped in a DataParallel: pass what is inside"),
    ):
        arguments = {"vae": vae, "name": "a", "directory": tmp_path, **known, **changes}
        with pytest.raises(ValueError, match=message):
            save_pretrained(**arguments)
    assert not list(tmp_path.iterdir())


def test_an_installed_package_is_not_written_into(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "PACKAGED_MODELS", tmp_path)
    monkeypatch.setattr(pretrained, "CHECKOUT_MODELS", tmp_path / "absent")
    altered(tmp_path)
    before = (tmp_path / "mine.json").read_bytes()
    with pytest.raises(ValueError, match="'mine' belongs to the installed package"):
        save_card(dataclasses.replace(load_card("mine"), metrics={}))
    assert (tmp_path / "mine.json").read_bytes() == before
    assert not pretrained.writable(None)
    assert pretrained.writable(tmp_path)


def test_loading_draws_the_same_random_numbers_as_making_the_network(tmp_path):
    altered(tmp_path)
    torch.manual_seed(0)
    ConvVAE(**CONFIG)
    expected = torch.rand(1)
    torch.manual_seed(0)
    pretrained.load_pretrained("mine", tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_a_card_without_a_dataset_says_so():
    card = dataclasses.replace(load_card("mnist_vae"), training={})
    with pytest.raises(ValueError, match="'mnist_vae' does not say what the model was trained on"):
        _ = card.dataset


def test_a_network_without_memory_draws_nothing():
    """Draws on the device meta would import PyTorch's compiler, a second and more."""
    drawn = []

    class Draws(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default):
                drawn.append(args[0].device.type)
            return func(*args, **(kwargs or {}))

    def make():
        layer = nn.Linear(2, 3)
        nn.init.xavier_normal_(layer.weight)
        return layer

    weights = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    with Draws():
        network = fill(make, weights)
    assert drawn == 3 * ["cpu"]
    assert torch.equal(network.weight, weights["weight"])


def test_weights_with_counts_in_floating_point_load():
    """Those of the packaged NVAE were written so."""
    _, tensors = pretrained.load_weights("mnist_nvae")
    counts = [value for name, value in tensors.items() if name.endswith("num_batches_tracked")]
    assert counts
    assert not any(value.dtype == torch.int64 for value in counts)
    vae = pretrained.load_pretrained("mnist_nvae")
    assert vae.image_shape == (1, 28, 28)
