"""Which trained models are installed, where others are looked for, and what becomes of cards."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pyro_vae_defence.models import ConvVAE, pretrained
from pyro_vae_defence.models.pretrained import available, load_card, save_card, save_pretrained

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


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "a\\b", ""])
def test_names_that_are_paths_are_refused(tmp_path, name):
    place = tmp_path / "models"
    with pytest.raises(ValueError, match="name must be a file's stem"):
        load_card(name, place)
    with pytest.raises(ValueError, match="name must be a file's stem"):
        save_card(dataclasses.replace(load_card("mnist_vae"), name=name), place)
    assert not list(tmp_path.iterdir())
