"""Tables 2 and 3: attacks on encoder and classifier, cells, resumption, tables."""

from __future__ import annotations

import functools
import json

import pytest
from studies import check_resumed, save_model

from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.attack import Attack, AttackConfig, table
from pyro_vae_defence.experiments.configuration import override
from pyro_vae_defence.experiments.paper.printed import TABLE_2, TABLE_3, TABLE_7
from pyro_vae_defence.experiments.tables import NOT_MEASURED
from pyro_vae_defence.experiments.train import MODELS
from pyro_vae_defence.models.classifier import load_classifier
from pyro_vae_defence.models.pretrained import load_pretrained

TINY = {
    "radii": (0.1,),
    "num_references": 10,
    "num_restarts": 2,
    "num_images": 20,
    "attack_steps": 8,
    "chain.num_samples": 2,
    "chain.warmup_steps": 1,
    "chain.num_steps": 1,
}


def attack(output, models, **changes):
    changes = {**TINY, **changes}
    return Attack("mnist_se_0.1", output, models=models, overrides=changes, progress=False).run()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The packaged model and its classifier, as if they had been trained on the packaged images."""
    directory = tmp_path_factory.mktemp("models")
    vae, (classifier, _) = load_pretrained("mnist_vae"), load_classifier("mnist_vae_classifier")
    variance = vae.mean_posterior_variance
    save_model(vae, "mnist_se_0.1", directory, mean_posterior_variance=variance)
    save_model(classifier, "mnist_se_0.1_classifier", directory)
    return directory


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    return output, attack(output, models)


def test_cells_hold_every_figure(run):
    _, result = run
    assert set(result["radii"]) == {"0", "0.1"}
    for cells in result["radii"].values():
        assert list(cells) == ["none", "encoder_samples", "dark_clip_0.2", "hmc", "aware_0.2"]
        for cell in cells.values():
            for entry in (cell["ms_ssim"], *cell["accuracy"]["class"].values()):
                assert 0 <= entry["low"] <= entry["estimate"] <= entry["high"] <= 1
    cells = result["radii"]["0.1"]
    assert cells["none"]["gradients_per_image"] == 0 < cells["aware_0.2"]["gradients_per_image"]
    # The defence is the same with and without an attack: it is not told.
    for cells in result["radii"].values():
        assert cells["aware_0.2"]["settings"]["perturbation"] == "Linf(radius=0.2)"
        assert cells["hmc"]["settings"]["perturbation"] == "None"
    assert set(result["weights"]) == {"mnist_se_0.1", "mnist_se_0.1_classifier"}


def test_without_a_defence_only_attacks_change_classes(run):
    """8 gradients of the classifier change most of this trained model's predictions."""
    cells = {
        radius: cells["none"]["accuracy"]["class"] for radius, cells in run[1]["radii"].items()
    }
    assert cells["0"]["unchanged"]["estimate"] == 1.0
    assert cells["0.1"]["unchanged"]["estimate"] < 0.5


def test_an_interrupted_run_goes_on_where_it_was(run, models, tmp_path):
    again = functools.partial(attack, models=models)
    check_resumed(again, tmp_path, run[1], "radii/0.1/hmc", kept="radii/0/none")


def test_tables_come_from_the_files_alone(run, capsys):
    output, result = run
    text = table(2, output)
    value = result["radii"]["0.1"]["aware_0.2"]["ms_ssim"]["estimate"]
    assert f"| SE, radius 0.1; HMC, perturbation-aware δ = 0.2 | {value:.2f} [" in text
    assert "### Table 2, MNIST" in text
    assert "### Table 2, Fashion-MNIST" in text
    # The paper's models stand there without a measurement; ColorMNIST's have two labels.
    assert f"| VAE; HMC, the paper's target | {NOT_MEASURED} (0.88) |" in text
    assert "correct, clean (color)" in table(3, output)
    assert table(3, output).count("## Table 3") == 1
    assert main(["table", "2", "--results", str(output)]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_printed_figures_stand_beside_the_model_and_defence_they_are_of(run, tmp_path):
    result = json.loads((run[0] / "mnist_se_0.1.json").read_text())
    result["name"] = result["config"]["model"] = "mnist_vae"
    (tmp_path / "mnist_vae.json").write_text(json.dumps(result))
    mnist = table(2, tmp_path).split("### Table 2, Fashion-MNIST")[0]
    rows = {line.split(" | ")[0]: line for line in mnist.splitlines()}
    for printed in ("(0.70)", "(0.90)", "(0.08)"):
        assert printed in rows["| VAE"]
    assert rows["| VAE"].count("(") == 3
    assert "(0.88)" in rows["| VAE; HMC, the paper's target"]
    assert "(" not in rows["| VAE; HMC, perturbation-aware δ = 0.2"]


def test_results_that_do_not_belong_in_one_table_are_refused(run, tmp_path):
    result = json.loads((run[0] / "mnist_se_0.1.json").read_text())
    (tmp_path / "mnist_se_0.1.json").write_text(json.dumps(result))
    result["name"] = result["config"]["model"] = "mnist_vae"
    result["config"]["attack_steps"] = 5
    (tmp_path / "mnist_vae.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="do not belong in one table: they differ in attack_steps"):
        table(2, tmp_path)
    (tmp_path / "mnist_avae.json").write_text("{}")
    with pytest.raises(ValueError, match=r"mnist_avae\.json is no result of attack"):
        table(2, tmp_path)
    (tmp_path / "mnist_avae.json").write_text("{")
    with pytest.raises(ValueError, match=r"mnist_avae\.json is damaged"):
        table(3, tmp_path)


def test_paper_and_registry_agree_on_names():
    assert set(TABLE_2) | set(TABLE_3) | set(TABLE_7) <= set(Attack.names)
    # Latent groups, and variants whose chains need other settings.
    others = {"mnist_nvae", "fashion_mnist_inverted_vae", "color_mnist_textured_vae"}
    assert set(MODELS) - set(Attack.names) == others
    for printed in (*TABLE_2.values(), *TABLE_3.values()):
        assert set(printed) <= {"none", "hmc"}
        for measures in printed.values():
            assert set(measures) <= {"ms_ssim", "class", "color"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defences": "none"}, "defences must be a tuple that is not empty, got 'none'"),
        ({"defences": ()}, "defences must be a tuple that is not empty"),
        ({"defences": ("nots",)}, "no defence is called 'nots'"),
        ({"defences": ("paper",)}, "'paper' is a setting per dataset"),
        ({"defences": ("aware",)}, "'aware' assumes a radius; name it, as in 'aware_0.2'"),
        ({"radii": 0.1}, "radii must be a tuple that is not empty, got 0.1"),
        ({"radii": (0.0, 0.1)}, r"radii must lie in \(0, 1\]"),
        ({"radii": ("a",)}, r"radii must lie in \(0, 1\]"),
        ({"reading": "foo"}, "reading must be one of"),
        ({"chain.step_size": 0.0}, "chain.step_size must be positive"),
        ({"num_restarts": 0}, "num_restarts must be an integer of at least 1, got 0"),
        ({"chain.warmup_steps": -1}, "warmup_steps must be an integer of at least 0, got -1"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        override(AttackConfig("mnist_vae"), changes)


def test_mistakes_are_one_line(models, tmp_path, capsys):
    arguments = ["--models", str(models), "--output", str(tmp_path)]
    assert main(["attack", "mnist_nvae", *arguments]) == 2
    assert "no attacks on a model named 'mnist_nvae'" in capsys.readouterr().err
    assert main(["attack", "mnist_vae", *arguments]) == 2
    assert "no pretrained model named 'mnist_vae'" in capsys.readouterr().err
    assert main(["attack", "mnist_vae", *arguments, "--set", "model=mnist_se_0.1"]) == 2
    assert "results are named after the model" in capsys.readouterr().err
    assert main(["table", "3", "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no result files" in error
    assert "run attack first" in error
