"""The study of analysis by synthesis, and the training of its model."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pyro_vae_defence.defence import AnalysisBySynthesis
from pyro_vae_defence.defence.synthesis import MarginBound
from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.study import check_finite, write_pages
from pyro_vae_defence.experiments.synthesis import Synthesis, SynthesisConfig, row, side_by_side
from pyro_vae_defence.experiments.train import MODELS, Train, TrainConfig
from pyro_vae_defence.models import ConditionalVAE
from pyro_vae_defence.models.pretrained import load_card, load_pretrained

SETTINGS = {
    "num_images": 4, "images_per_cell": 2, "num_attacked": 3, "radii": (0.1,),
    "num_temperatures": 3, "num_steps": 1, "num_walks": 2, "num_falling": 1, "attack_steps": 2,
    "attack_temperatures": 3, "num_targets": 1,
}  # fmt: skip

SMALL = MODELS["mnist_nvae"].architecture


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A conditional VAE, hardly trained."""
    directory = tmp_path_factory.mktemp("models")
    changes = {"dataset": "mnist_subset", "epochs": 1, "images_per_epoch": 128}
    Train("mnist_conditional", directory, overrides=changes, progress=False).run()
    return directory


def test_a_conditional_model_is_trained_and_loaded(models):
    card = load_card("mnist_conditional", models)
    assert card.architecture == "ConditionalVAE"
    vae = load_pretrained("mnist_conditional", models)
    assert isinstance(vae, ConditionalVAE)
    assert vae.mean_posterior_variance["z"].shape == (10,)
    # Which class it is makes a difference to a decoder that was given classes.
    z = torch.zeros(2, 10)
    one, other = vae.decode(z, torch.eye(10)[[0, 1]])
    assert not torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "avae", "conditional": True},
        {"architecture": SMALL, "conditional": True},
        {"objective": "margin"},
        {"per_class": True},
    ],
)
def test_objectives_of_conditional_models(changes):
    with pytest.raises(ValueError, match="conditional=True"):
        TrainConfig("mnist", **changes)


def test_one_vae_per_class_is_trained_and_loaded(tmp_path):
    changes = {"dataset": "mnist_subset", "epochs": 1, "images_per_epoch": 128}
    card = Train("mnist_per_class", tmp_path, overrides=changes, progress=False).run()
    assert card.training["per_class"]
    vae = load_pretrained("mnist_per_class", tmp_path)
    assert isinstance(vae, ConditionalVAE)
    assert vae.per_class
    number = sum(parameter.numel() for parameter in vae.parameters())
    shared = sum(parameter.numel() for parameter in ConditionalVAE().parameters())
    assert 0.75 < number / shared < 1
    with pytest.raises(ValueError, match="per_class=True has no effect with start_from"):
        TrainConfig("mnist", conditional=True, per_class=True, start_from="mnist_per_class")


def test_training_goes_on_with_the_margin(models):
    changes = {"dataset": "mnist_subset", "epochs": 1, "images_per_epoch": 128}
    card = Train("mnist_conditional_margin", models, models=models, overrides=changes,
                 progress=False).run()  # fmt: skip
    assert card.training["start_from_sha256"] == load_card("mnist_conditional", models).sha256
    changes = {**changes, "start_from": "mnist_vae"}
    study = Train("fashion_mnist_conditional_margin", models, overrides=changes, progress=False)
    with pytest.raises(ValueError, match="start_from='mnist_vae' is a ConvVAE"):
        study.run()


def test_a_result_is_written_resumed_and_printed(models, tmp_path):
    options = {"models": models, "progress": False}
    changes = {"dataset": "mnist_subset", **SETTINGS}
    result = Synthesis("mnist", tmp_path, overrides=changes, **options).run()
    assert [len(block["margin"]) for block in result["bounds"]["0.1"].values()] == [2, 2]
    # Whole blocks are attacked, as far as they hold images that may be.
    (attacked,) = result["attacks"]["0.1"].values()
    assert set(attacked["right"]) == {"mass", "evidence_1"}

    path = tmp_path / "mnist.json"
    stored = json.loads(path.read_text())
    lost = stored["bounds"]["0.1"].pop("001")
    path.write_text(json.dumps(stored))
    again = Synthesis("mnist", tmp_path, overrides=changes, **options).run()
    assert again["bounds"]["0.1"]["001"] == lost
    write_pages({"synthesis": Synthesis}, tmp_path)
    assert "| 0.1 | 4 |" in (tmp_path / "tables.md").read_text()
    assert not (tmp_path / "models.md").exists()


def test_a_row_says_what_the_blocks_do():
    gaps = {"standard_error": [0.5, 0.5], "gap_right": [1.0, 2.0], "gap_wrong": [2.0, 2.0]}
    bounds = {
        "000": {"right": [True, True], "margin": [-1.0, 2.0], **gaps},
        "001": {"right": [True, False], "margin": [1.0, -3.0], **gaps},
    }
    attacked = {"000": {"right": {"mass": [True, True], "evidence_1": [False, True]}}}
    cells = row("0.1", bounds, attacked)
    assert [cell.split(" [")[0] for cell in cells] == [
        "0.1", "4", "0.750", "0.500", "2", "0.500", "0.500", "1.000", "0.500", "0.0", "0.5",
        "1.5", "2.0",
    ]  # fmt: skip
    assert row("0.1", bounds, {})[4:9] == [""] * 5
    assert row("0.1", bounds, attacked | {"002": attacked["000"]}) == cells  # not bounded yet


def test_a_mass_that_was_not_found_keeps_no_class_and_loses_no_cell(monkeypatch, tmp_path):
    lost = torch.tensor([math.inf, 1.0])
    found = MarginBound(
        -lost, torch.tensor([[0.0], [-3.0]]), lost, lost[:, None].repeat(1, 2), True
    )
    monkeypatch.setattr(AnalysisBySynthesis, "margin_bound", lambda *args, **kwargs: found)
    monkeypatch.setattr(
        AnalysisBySynthesis, "predict", lambda self, x, generator: torch.zeros(2, dtype=torch.long)
    )
    study = Synthesis("mnist", tmp_path)
    study.x, study.labels = torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.long)
    study.classifier = lambda radius: AnalysisBySynthesis.__new__(AnalysisBySynthesis)
    block = study.bound(0.1, slice(2), "000")
    check_finite(block)
    cells = row("0.1", {"000": json.loads(json.dumps(block, allow_nan=False))}, {})
    assert [cell.split(" [")[0] for cell in cells[2:4]] == ["1.000", "0.500"]
    assert cells[9:] == ["-inf", "1.0", "1.0", "1.0"]


def test_images_that_are_wrong_already_are_not_robust():
    bounds = {
        "000": {
            "right": [False, True], "margin": [-1.0, 2.0], "standard_error": [0.5, 0.5],
            "gap_right": [1.0, 2.0], "gap_wrong": [2.0, 2.0],
        }
    }  # fmt: skip
    cells = row("0.1", bounds, {"000": {"right": {"mass": [True, True], "evidence_1": [True] * 2}}})
    assert cells[5].startswith("0.500")


def test_models_stand_side_by_side_radius_by_radius():
    def result(model, margin, attacks):
        block = {"right": [True, True], "margin": [margin, 2.0]}
        gaps = {key: [1.0, 1.0] for key in ("standard_error", "gap_right", "gap_wrong")}
        bounds = {key: {"000": block | gaps} for key in ("0.2", "0.1")}
        return {
            "config": {"model": model, "dataset": None},
            "bounds": bounds,
            "attacks": {key: {"000": {"right": attacks}} for key in bounds},
        }

    lost = {"mass": [True, False], "evidence_1": [True, True]}
    kept = {"mass": [True, True], "evidence_1": [True, True]}
    text = side_by_side(
        {
            "mnist": result("mnist_conditional", 1.0, kept),
            "fashion_mnist": result("fashion_mnist_conditional", 1.0, kept),
            "mnist_per_class": result("mnist_per_class", -1.0, lost),
        }
    )
    # Bound and attacks may be of other images: how many stands beside them in the whole table.
    whole = text.partition("All 6 columns")[2].splitlines()
    rows = [line.split(" | ") for line in whole if line.startswith("| `")]
    assert [[cell.split(" [")[0].strip("| `") for cell in cells] for cells in rows] == [
        ["fashion_mnist`, 2", "0.1", "1.000", "1.000", "2", "1.000"],
        ["fashion_mnist`, 2", "0.2", "1.000", "1.000", "2", "1.000"],
        ["mnist`, 2", "0.1", "1.000", "1.000", "2", "1.000"],
        ["mnist_per_class`, 2", "0.1", "1.000", "0.500", "2", "0.500"],
        ["mnist`, 2", "0.2", "1.000", "1.000", "2", "1.000"],
        ["mnist_per_class`, 2", "0.2", "1.000", "0.500", "2", "0.500"],
    ]


@pytest.mark.parametrize(
    "setting", ["radii=(0.0,)", "num_walks=1", "num_attacked=1000", "num_attacked=9"]
)
def test_wrong_settings_end_in_a_line(setting, capsys, tmp_path):
    assert main(["synthesis", "mnist", "--output", str(tmp_path), "--set", setting]) == 2
    assert setting.split("=")[0] in capsys.readouterr().err


def test_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ConditionalVAE"):
        Synthesis(
            "mnist", tmp_path, overrides={"model": "mnist_vae", **SETTINGS}, progress=False
        ).run()
    assert SynthesisConfig("mnist_conditional", num_attacked=0).num_attacked == 0
