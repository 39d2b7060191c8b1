"""Named experiments: cards, result files, resumption, tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from studies import save_model

from pyro_vae_defence.experiments import train
from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.defend import Defend
from pyro_vae_defence.experiments.paper.printed import TABLE_7
from pyro_vae_defence.experiments.study import write_pages
from pyro_vae_defence.experiments.train import (
    HALF_TOLERANCE,
    MODELS,
    Train,
    TrainConfig,
    make_objective,
)
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.nvae import NVAE
from pyro_vae_defence.models.pretrained import (
    available,
    load_card,
    load_pretrained,
    save_pretrained,
)

TINY = {"dataset": "mnist_subset", "epochs": 1, "images_per_epoch": 256}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    Train("mnist_vae", directory, overrides=TINY, progress=False).run()
    return directory


def saved(directory, name="toy"):
    variance = {"z": torch.rand(64) + 0.1}
    return save_model(ConvVAE(), name, directory, training={}, mean_posterior_variance=variance)


class TestWeights:
    @pytest.mark.parametrize("image_size", [28, 64])
    def test_round_trip(self, tmp_path, image_size):
        vae = ConvVAE(3, image_size=image_size)
        save_pretrained(
            vae, "toy", tmp_path, training={"epochs": 1}, command="c", provenance={"commit": "x"},
            metrics={"m": 1.0}, mean_posterior_variance={"z": torch.full((64,), 0.5)},
        )  # fmt: skip
        loaded = load_pretrained("toy", tmp_path)
        assert not loaded.training
        state = vae.state_dict()
        assert all(torch.equal(state[k], v) for k, v in loaded.state_dict().items())
        assert torch.equal(loaded.mean_posterior_variance["z"], torch.full((64,), 0.5))
        card = load_card("toy", tmp_path)
        assert (card.architecture_config["in_channels"], card.metrics) == (3, {"m": 1.0})
        assert available(tmp_path) == ["toy"]

    @pytest.mark.parametrize(
        "damage", [lambda b: b[:-1], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""]
    )
    def test_tampered_weights_are_refused(self, tmp_path, damage):
        saved(tmp_path)
        path = tmp_path / "toy.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ValueError, match="do not match their card"):
            load_pretrained("toy", tmp_path)

    def test_unknown_and_damaged_cards(self, tmp_path):
        saved(tmp_path)
        with pytest.raises(ValueError, match="no pretrained model named 'other'; available: toy"):
            load_pretrained("other", tmp_path)
        card = tmp_path / "toy.json"
        fields = json.loads(card.read_text())
        card.write_text(json.dumps({**fields, "architecture": "Other"}))
        with pytest.raises(ValueError, match="architecture 'Other'"):
            load_pretrained("toy", tmp_path)
        card.write_text("{")
        with pytest.raises(ValueError, match="is damaged"):
            load_pretrained("toy", tmp_path)


def test_train_writes_weights_card_and_history(models):
    card = load_card("mnist_vae", models)
    assert card.training["epochs"] == 1
    assert card.command.startswith("python -m pyro_vae_defence.experiments train mnist_vae --set")
    assert card.metrics["validation_nelbo"] < 600
    assert set(card.provenance) >= {"commit", "torch", "seconds", "threads"}
    assert load_pretrained("mnist_vae", models).mean_posterior_variance["z"].shape == (64,)
    history = (models / "mnist_vae" / "history.jsonl").read_text().splitlines()
    assert len(history) == 1


def test_train_a_vae_of_two_dimensions(tmp_path):
    changes = {**TINY, "images_per_epoch": 128, "half": False}
    card = Train("mnist_vae_2d", tmp_path, overrides=changes, progress=False).run()
    assert (card.architecture_config["latent_dim"], card.training["latent_dim"]) == (2, 2)
    assert load_pretrained("mnist_vae_2d", tmp_path).mean_posterior_variance["z"].shape == (2,)
    for name in ("mnist_vae_long", "mnist_nvae"):
        with pytest.raises(ValueError, match="latent_dim=2 has no effect"):
            Train(name, tmp_path, overrides={"latent_dim": 2})


TINY_NVAE = {
    **(MODELS["mnist_nvae"].architecture or {}),
    "num_groups_per_scale": 2,
    "num_latent_per_group": 2,
    "num_channels_enc": 4,
    "num_channels_dec": 4,
}


@pytest.fixture(scope="module")
def nvae_models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nvae")
    changes = {**TINY, "architecture": TINY_NVAE, "images_per_epoch": 128}
    Train("mnist_nvae", directory, overrides=changes, progress=False).run()
    return directory


def test_train_an_nvae(nvae_models):
    card = load_card("mnist_nvae", nvae_models)
    assert card.architecture == "NVAE"
    assert card.architecture_config["num_groups_per_scale"] == 2
    vae = load_pretrained("mnist_nvae", nvae_models)
    assert isinstance(vae, NVAE)
    assert not vae.training
    shapes = dict(zip(vae.sites, vae.config.latent_shapes))
    assert {site: tuple(v.shape) for site, v in vae.mean_posterior_variance.items()} == shapes
    noise = vae.noncentred().mean_posterior_variance
    assert set(noise) == {"eps_00", "eps_01", "eps_02"}
    assert all((v > 0).all() for v in noise.values())


def test_defend_writes_results_and_runs_nothing_twice(models, tmp_path):
    changes = {
        "num_references": 10,
        "num_restarts": 1,
        "chain.num_samples": 1,
        "chain.warmup_steps": 1,
    }

    def run(**more):
        settings = {**changes, **more}
        study = Defend("mnist_radius_0.1", tmp_path, None, models, settings, progress=False)
        return study.run()

    first = run(defences=("none", "hmc"))
    assert set(first["defences"]) == {"none", "hmc"}
    path = tmp_path / "mnist_radius_0.1.json"
    written = path.stat().st_mtime_ns
    again = run(defences=("none", "hmc"))
    assert again["defences"] == first["defences"]
    assert path.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="belongs to another run"):
        run(defences=("none",))
    text = write_pages({Defend.kind: Defend}, tmp_path)[0].read_text()
    assert "ms_ssim[paper]" in text
    estimate = json.loads(path.read_text())["defences"]["hmc"]["ms_ssim"]["estimate"]
    assert f"{estimate:.3f}" in text


@pytest.mark.parametrize("objective", ["beta", "beta_tcvae", "se", "avae", "se_avae", "avae_ss"])
def test_every_objective_of_a_configuration_trains(objective):
    vae = ConvVAE()
    own = {"beta": 2.0} if objective.startswith("beta") else {}
    config = TrainConfig("mnist_subset", objective, "mnist_vae", **own)
    loss = make_objective(config, vae, 1000, 10).loss_and_grads(
        vae.model, vae.guide, torch.rand(4, 1, 28, 28)
    )
    assert loss == loss
    assert vae.encoder[0].weight.grad is not None


def test_models_are_those_of_table_7():
    for dataset in ("mnist", "fashion_mnist", "color_mnist"):
        names = {n for n in TABLE_7 if n.startswith(dataset + "_") and MODELS[n].dataset == dataset}
        assert len(names) == 7
    assert all(entry.model in MODELS for entry in Defend.names.values())
    for dataset in ("mnist", "color_mnist"):
        for variant in ("se_0.1", "se_0.2", "avae", "se_avae", "avae_ss"):
            assert MODELS[f"{dataset}_{variant}"].start_from == f"{dataset}_vae"
        assert MODELS[f"{dataset}_se_0.2"].radius == 0.2
        assert {MODELS[f"{dataset}_se{also}"].gamma for also in ("_0.1", "_0.2", "_avae")} == {10.0}
    for dataset in ("mnist", "fashion_mnist", "color_mnist"):
        suffixes = ("", "_long", "_longer")
        plain, long, longer = (MODELS[f"{dataset}_vae{suffix}"] for suffix in suffixes)
        for again in (long, longer):
            assert again.start_from == f"{dataset}_vae"
            assert (again.objective, again.beta) == ("beta", 1.0)
        assert long.epochs == plain.epochs
        assert plain.epochs + longer.epochs == 300  # the paper's


def test_the_coupling_of_se_is_the_one_that_the_published_sweep_found():
    sweep = Path(__file__).resolve().parents[1] / "docs" / "results" / "se_gamma"
    robust = {}
    for path in sweep.glob("*.json"):
        result, card = (json.loads(p.read_text()) for p in (path, sweep / "cards" / path.name))
        assert result["weights"] == {card["name"]: card["sha256"]}
        report = result["reports"]["reconstruction/none"]
        robust[card["training"]["gamma"]] = report["robust"]["mean"]["estimate"]
    assert set(robust) == {0.1, 1, 10, 50}
    assert MODELS["mnist_se_0.1"].gamma == max(robust, key=lambda gamma: robust[gamma])


def test_a_variant_starts_from_trained_weights(models, tmp_path):
    """AVAE-SS leaves the decoder as it found it, up to float16; the encoder learns."""
    card = Train("mnist_avae_ss", tmp_path, None, models, TINY, progress=False).run()
    before, after = (
        load_pretrained(*where) for where in (("mnist_vae", models), (card.name, tmp_path))
    )
    assert card.training["start_from_sha256"] == load_card("mnist_vae", models).sha256
    assert abs(card.metrics["validation_nelbo_change[float16]"]) <= HALF_TOLERANCE
    size = (tmp_path / "mnist_avae_ss.safetensors").stat().st_size
    assert size < 0.6 * (models / "mnist_vae.safetensors").stat().st_size
    for name, value in before.state_dict().items():
        found = after.state_dict()[name]
        if name.startswith("decoder"):
            assert torch.equal(found, value.half().float())
        elif name.endswith("weight"):
            assert not torch.equal(found, value.half().float())


def test_a_training_is_named_after_the_weights_that_it_started_from(models, tmp_path, monkeypatch):
    """So that a checkpoint is not continued from other weights of the same name."""
    names = []

    def stop(vae, objective, loader, config, **options):
        names.append(config.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", stop)
    for name in ("mnist_avae", "mnist_vae"):
        with pytest.raises(KeyboardInterrupt):
            Train(name, tmp_path, None, models, TINY, progress=False).run()
    assert names[0].endswith(load_card("mnist_vae", models).sha256)
    assert names[1].endswith(")")


def test_avae_ss_needs_a_trained_model():
    with pytest.raises(ValueError, match="set start_from=NAME"):
        TrainConfig("mnist", "avae_ss")


def test_the_list_of_commands_in_any_locale(monkeypatch, capsys):
    """Modules are read for it, whose texts have Greek letters."""
    opened = Path.open

    def ascii_unless_told(path, mode="r", encoding=None, **options):
        ours = "b" in mode or encoding not in (None, "locale")
        return opened(path, mode, encoding=encoding if ours else "ascii", **options)

    monkeypatch.setattr(Path, "open", ascii_unless_told)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "robustness  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "mnist_gan"], "no model named 'mnist_gan'"),
        (["train", "mnist_vae", "--set", "epoch=3"], "unknown setting 'epoch'"),
        (["train", "mnist_vae", "--data-root", "/nowhere"], "pass download=True"),
        (["defend", "mnist"], "no experiment named 'mnist'"),
        (["defend", "mnist_radius_0.1", "--models", "/nowhere"], "no pretrained model"),
        (["report", "/nowhere"], "no result files"),
        (["defend", "mnist_radius_0.1", "--set", "defences=hmc"], "defences must be a tuple"),
    ],
)
def test_command_line_mistakes(arguments, message, capsys, tmp_path):
    if arguments[0] != "report":
        arguments = [*arguments, "--output", str(tmp_path)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
