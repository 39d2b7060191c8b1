"""Evaluation of trained models: result files, cards, and the paper's table beside them."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from programs import LinearGaussianVAE
from studies import save_model

from pyro_vae_defence import metrics
from pyro_vae_defence.experiments import attack
from pyro_vae_defence.experiments import evaluate as evaluate_module
from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.cards import trained_models
from pyro_vae_defence.experiments.evaluate import Evaluate, EvaluateConfig, nll_name, table
from pyro_vae_defence.experiments.paper.printed import TABLE_7
from pyro_vae_defence.experiments.study import interval, write_pages
from pyro_vae_defence.experiments.tables import NOT_MEASURED
from pyro_vae_defence.experiments.train import MODELS
from pyro_vae_defence.models import ConvVAE, pretrained
from pyro_vae_defence.models.pretrained import (
    load_card,
    load_pretrained,
    save_card,
)


@pytest.fixture
def models(narrow, tmp_path):
    save_model(ConvVAE(), "mnist_vae", tmp_path / "models", metrics={"validation_nelbo": 1.0})
    return tmp_path / "models"


def measured(output, models, **changes):
    return Evaluate("mnist_vae", output, models=models, overrides=changes, progress=False).run()


def test_measured_numbers_are_those_of_the_exact_model(float64, tmp_path):
    """NLL within 5 standard errors of the exact one, MSE of its expectation (two tests, 1e-6)."""
    torch.manual_seed(0)
    vae = LinearGaussianVAE()
    x = metrics.simulate(vae, torch.zeros(200, 1, 4, 4))[1].clamp(0, 1)
    study = Evaluate("toy", tmp_path, overrides={"num_samples": 200, "rows": 64})
    study.vae, study.x = vae, x
    found = {name: compute() for (_, name), compute in study.cells()}
    gap = torch.tensor(found["nll[iwae 200]"]["estimate"]) + vae.evidence(x).mean()
    assert (
        abs(gap) < 0.05
    )  # an exact bound would be 0; the guide's own gap is 0.4 nats for one draw
    # E||x - Wz - b||^2 / 16 for z from the guide: the exact posterior's mean, the guide's variance.
    mean, covariance = vae.exact(x)
    residual = (x.flatten(1) - mean @ vae.weight.T - vae.bias).square().mean(1)
    spread = (vae.weight.square() * covariance.diagonal()).sum() / 16
    expected = 255**2 * (residual + spread).mean()
    entry = found["mse[0..255]"]
    half_width = (entry["high"] - entry["low"]) / 2
    assert abs(entry["estimate"] - expected) < 5 / 1.96 * half_width
    assert entry["num_images"] == 200
    assert found["active_units"] == {"z": {"active": 3, "all": 3}}


def test_colours_of_a_digit_count_once(narrow, tmp_path):
    save_model(ConvVAE(3), "color_mnist_vae", tmp_path, training={"dataset": "color_mnist_subset"})
    changes = {"num_images": None}
    study = Evaluate("color_mnist_vae", tmp_path / "out", models=tmp_path, overrides=changes)
    study.load()
    assert study.origins is not None
    of_digits = torch.linspace(0, 1, len(study.x) // 7).square()
    found = study.over_images(of_digits.repeat_interleave(7))
    assert found == pytest.approx({**interval(of_digits), "num_images": 7000})


def test_a_trial_is_written_and_leaves_the_card_alone(models, tmp_path):
    changes = {"num_images": 20, "num_samples": 4, "rows": 30}
    result = measured(tmp_path / "out", models, **changes)
    assert json.loads((tmp_path / "out" / "mnist_vae.json").read_text()) == result
    assert set(result["provenance"]) >= {"commit", "torch", "threads"}
    assert result["config"]["num_images"] == 20
    entry = result["metrics"][nll_name(4)]
    assert entry["low"] < entry["estimate"] < entry["high"]
    card = load_card("mnist_vae", models)
    assert card.metrics == {"validation_nelbo": 1.0}  # a trial's figures are no model's
    assert result["weights"] == {"mnist_vae": card.sha256}
    written = write_pages({Evaluate.kind: Evaluate}, tmp_path / "out")[0].read_text()
    assert f"| nll[iwae 4] | {entry['estimate']:.2f} [" in written
    assert "| active units | " in written
    assert measured(tmp_path / "out", models, **changes) == result  # nothing is measured twice
    again = measured(tmp_path / "again", models, **{**changes, "rows": 7})
    assert again["metrics"][nll_name(4)]["estimate"] == pytest.approx(entry["estimate"], rel=1e-5)


def test_full_test_set_has_a_file_of_its_own_and_the_card(models, tmp_path):
    arguments = ["evaluate", "mnist_vae", "--models", str(models), "--output", str(tmp_path)]
    assert main([*arguments, "--full", "--set", "num_samples=1"]) == 0
    result = json.loads((tmp_path / "mnist_vae_full.json").read_text())
    assert result["metrics"]["mse[0..255]"]["num_images"] == 1000
    assert "--set num_images=None" in result["command"]
    # It goes into the card, beside what was measured otherwise, whose weights it still fits.
    test = load_card("mnist_vae", models).metrics["test"]
    assert test == result["metrics"]
    assert main([*arguments, "--full", "--set", "num_samples=2", "--output", f"{tmp_path}/2"]) == 0
    both = load_card("mnist_vae", models).metrics["test"]
    assert both.keys() - test.keys() == {nll_name(2)}
    assert both[nll_name(1)] == test[nll_name(1)]
    load_pretrained("mnist_vae", models)


def test_cards_that_nobody_named_are_left_alone(models, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGED_MODELS", models)
    monkeypatch.setattr(evaluate_module, "save_card", None)
    for settings in ({}, {"num_images": None}):
        settings = {"num_samples": 1, "num_images": 10, **settings}
        Evaluate("mnist_vae", tmp_path, overrides=settings, progress=False).run()


def test_a_card_of_other_weights_is_left_alone(models, tmp_path):
    study = Evaluate("mnist_vae", tmp_path, models=models, progress=False)
    study.load()
    card = replace(load_card("mnist_vae", models), sha256="of a training since then")
    save_card(card, models)
    study._write_card({"mse[0..255]": {}})
    assert load_card("mnist_vae", models) == card


def test_table_7_prints_files_and_says_what_is_missing(models, tmp_path, capsys):
    measured(tmp_path, models, num_images=10, num_samples=2)
    path = tmp_path / "mnist_vae.json"
    result = json.loads(path.read_text())
    result["metrics"][nll_name(2)].update(estimate=87.654, low=86.0, high=89.0)
    path.write_text(json.dumps(result))
    text = table(7, tmp_path)
    assert re.search(r"\| VAE \| 88.3 \| 87.65 \[86.00, 89.00\] \| 578.6 \|", text)
    assert text.count(NOT_MEASURED) == 2 * 20
    assert text.count("### Table 7") == 3
    # The full test set goes first, when there is one.
    result["metrics"][nll_name(2)]["estimate"] = 99.0
    (tmp_path / "mnist_vae_full.json").write_text(json.dumps(result))
    assert "99.00" in table(7, tmp_path)
    # Longer trainings have rows once they are measured, beside the paper's one plain model.
    for name, label in {"long": "second training", "longer": "300 epochs in all"}.items():
        (tmp_path / f"mnist_vae_{name}.json").write_text(json.dumps(result))
        assert f"| VAE, {label} | 88.3 | 99.00" in table(7, tmp_path)
    assert main(["table", "7", "--results", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out.count(NOT_MEASURED) == 2 * 21


def test_paper_and_library_agree_on_names():
    assert set(TABLE_7) <= set(MODELS)
    assert len(TABLE_7) == 21
    for printed in TABLE_7.values():
        assert set(printed) <= {"nll", "mse", "fid"}
    # The paper: beta = 1 has the lowest NLL and MSE on every dataset.
    for dataset in ("mnist", "fashion_mnist", "color_mnist"):
        rows = [TABLE_7[name] for name in TABLE_7 if MODELS[name].dataset == dataset]
        assert min(rows, key=lambda row: row["nll"]) is rows[0]


def test_cards_make_a_table(models, tmp_path, capsys):
    assert main(["models", str(models)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith("| `mnist_vae` | ")
    assert main(["models", str(tmp_path)]) == 2
    assert "no trained models in" in capsys.readouterr().err


def test_packaged_models_stand_in_the_documentation():
    """The page's tables are what the commands print now."""
    results = Path(__file__).resolve().parents[1] / "docs" / "results"
    assert (results / "models.md").read_text() == trained_models() + "\n"
    for number, directory, made in (
        (2, "attack", attack.table),
        (3, "attack", attack.table),
        (7, "evaluate", table),
    ):
        written = (results / directory / f"table_{number}.md").read_text()
        assert written == made(number, results / directory) + "\n"


def test_config_defaults_are_the_papers():
    config = dataclasses.asdict(EvaluateConfig("x"))
    assert (config["num_images"], config["num_samples"]) == (1000, 1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "mnist_gan"], "no pretrained model named 'mnist_gan'"),
        (["evaluate", "mnist_vae", "--set", "images=3"], "unknown setting 'images'"),
        (
            ["evaluate", "mnist_vae", "--set", "num_samples=0"],
            "num_samples must be an integer of at least 1, got 0",
        ),
        (["evaluate", "mnist_vae", "--set", "model=other"], "results are named after the model"),
        (["table", "9"], "no generator for table 9"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, models):
    if arguments[0] == "evaluate":
        arguments = [*arguments, "--models", str(models), "--output", str(tmp_path)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_damaged_result_file_is_named(tmp_path):
    (tmp_path / "mnist_vae.json").write_text("{")
    with pytest.raises(ValueError, match=r"mnist_vae\.json is damaged .*run evaluate mnist_vae"):
        table(7, tmp_path)
