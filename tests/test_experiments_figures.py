"""Figures of attackers' knowledge and objectives: cells, resumption, tables and pictures from the
file alone."""

from __future__ import annotations

import base64
import io
import json

import pytest
import torch
from matplotlib.image import imread
from studies import check_resumed, save_model

from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.classify import CLASSIFIERS
from pyro_vae_defence.experiments.figures import (
    ATTACKERS,
    Figures,
    FiguresConfig,
    examples_figure,
    knowledge_figure,
    objectives_figure,
)
from pyro_vae_defence.experiments.study import write_pages
from pyro_vae_defence.experiments.train import MODELS
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.classifier import LinearClassifier

TINY = {
    "radii": (0.1, 1.0),
    "objective_radii": (0.2,),
    "attack_chains": 2,
    "attack_steps": 2,
    "num_images": 3,
    "num_examples": 1,
    "chain.num_samples": 1,
    "chain.warmup_steps": 1,
    "chain.num_steps": 1,
}


@pytest.fixture(scope="module")
def models(narrow, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    variance = {"z": torch.rand(64) + 0.1}
    save_model(ConvVAE(), "mnist_vae", directory, mean_posterior_variance=variance)
    save_model(LinearClassifier(64, 10), "mnist_vae_classifier", directory)
    return directory


def study(output, models, changes=TINY):
    return Figures("mnist", output, None, models, changes, progress=False)


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    return output, study(output, models).run()


def test_cells_hold_every_measure(run):
    _, result = run
    assert list(result["knowledge"]) == ["0.1", "1"]
    assert all(list(cells) == list(ATTACKERS) for cells in result["knowledge"].values())
    assert list(result["objectives"]["0.2"]) == ["unsupervised", "supervised"]
    for cells in result["objectives"]["0.2"].values():
        assert tuple(cells) == FiguresConfig("m").objectives
    cell = result["objectives"]["0.2"]["supervised"]["output"]
    assert list(cell["ms_ssim"]) == ["images", "undefended", "defended"]
    assert list(cell["target_ms_ssim"]) == ["undefended", "defended"]
    entries = [*cell["ms_ssim"].values(), *cell["unchanged"].values(), cell["symmetric_kl"]]
    for entry in (*entries, *cell["target_ms_ssim"].values(), cell["target_symmetric_kl"]):
        assert 0 <= entry["low"] <= entry["estimate"] <= entry["high"]
    assert "target_ms_ssim" not in result["objectives"]["0.2"]["unsupervised"]["output"]
    assert "examples" not in cell


def test_attacks_stay_in_their_ball_and_no_attack_changes_nothing(run):
    _, result = run
    clean = result["clean"]["reference"]
    assert clean["ms_ssim"]["images"]["estimate"] == 1.0
    assert clean["symmetric_kl"]["estimate"] == 0.0
    assert clean["unchanged"]["undefended"]["estimate"] == 1.0
    # The attacked image is the uppermost of three tiles with a margin of one pixel.
    x_ref = pixels(clean["examples"])[1:29, 1:29]
    assert x_ref.shape == (28, 28)
    for radius, cells in result["knowledge"].items():
        for cell in cells.values():
            picture = pixels(cell["examples"])
            assert picture.shape == (3 * 29 + 1, 30)
            # 8 bits on either side.
            assert 0 < abs(picture[1:29, 1:29] - x_ref).max() <= float(radius) + 1.01 / 255
            assert cell["symmetric_kl"]["estimate"] > 0


def pixels(picture):
    return imread(io.BytesIO(base64.b64decode(picture)))[..., 0]


def test_every_supervised_target_is_of_another_class(models, tmp_path):
    every = study(tmp_path, models, {"num_images": 20})
    every.load()
    assert set(every.weights) == {"mnist_vae", "mnist_vae_classifier"}
    assert not bool((every.labels == every.labels.roll(1)).any())
    assert torch.equal(every.target[1:], every.x_ref[:-1])


def test_the_attacker_who_knows_keeps_the_best_of_the_gradients(models, tmp_path):
    knows = study(tmp_path, models, {**TINY, "gradients": ("truncated", "equilibrium")})
    knows.load()
    purposes = {gradient: f"with_mcmc {gradient} 0.1" for gradient in knows.config.gradients}
    values = torch.cat(
        [
            knows.attack(
                knows.latent_distance(gradient, knows.generator(purpose, "objective")),
                0.1,
                purpose,
            ).objective
            for gradient, purpose in purposes.items()
        ]
    )
    truncated = int((values[0] >= values[1]).sum())
    strongest = knows.knowledge("with_mcmc", 0.1)["strongest"]
    assert strongest == {"truncated": truncated, "equilibrium": TINY["num_images"] - truncated}


@pytest.mark.parametrize("lost", ["knowledge/1/with_mcmc", "objectives/0.2/supervised/reverse_kl"])
def test_an_interrupted_run_goes_on_where_it_was(run, models, tmp_path, lost):
    def again(output, **changes):
        return study(output, models, {**TINY, **changes}).run()

    check_resumed(again, tmp_path, run[1], lost, kept="clean/reference")


def test_pictures_and_tables_leave_out_what_is_not_there(run, tmp_path, capsys):
    cut = json.loads(json.dumps(run[1]))
    del cut["knowledge"]["1"]["with_mcmc"]
    (tmp_path / "mnist.json").write_text(json.dumps(cut))
    assert main(["figures", "--output", str(tmp_path), "--images", str(tmp_path)]) == 0
    assert "figures_mnist_objectives_supervised.png" in capsys.readouterr().out
    assert "| 1 | knows the defence" not in (tmp_path / "tables.md").read_text()


def test_tables_and_figures_come_from_the_files_alone(run, capsys):
    output, result = run
    images = output / "images"
    tables, *drawn = write_pages({"figures": Figures}, output, images)
    text = tables.read_text()
    for attacker, label in zip(ATTACKERS, ("does not know", "knows"), strict=True):
        value = result["knowledge"]["0.1"][attacker]["ms_ssim"]["images"]["estimate"]
        assert f"| 0.1 | {label} the defence | {value:.3f} [" in text
    assert "Radius 0.2, supervised" in text
    assert "| squared Wasserstein | " in text
    assert "2 steps of MomentumPGD" in text
    shown = ("knowledge", "examples", "objectives_unsupervised", "objectives_supervised")
    names = [f"figures_mnist_{what}.png" for what in shown]
    assert [path.name for path in drawn] == names
    assert all(path.stat().st_size > 5000 for path in drawn)
    before = [path.read_bytes() for path in drawn]
    # Alt texts say what is seen.
    end = result["knowledge"]["1"]["with_mcmc"]["ms_ssim"]["defended"]["estimate"]
    picture = "images/figures_mnist_knowledge.png"
    assert f"HMC, the paper's target, attacker knows the defence {end:.3f}.]({picture})" in text
    assert main(["report", str(output)]) == 0
    assert "tables.md" in capsys.readouterr().out
    assert [path.read_bytes() for path in drawn] == before
    assert tables.read_text() == text
    assert "### Objectives (Figure 16)" in text


def test_pictures_have_the_papers_panels(run):
    _, result = run
    knowledge = knowledge_figure(result)
    assert [len(axes.lines) for axes in knowledge.axes] == [3] * 4
    black, orange = knowledge.axes[3].lines[:2]
    assert list(black.get_xdata()) == [0.0, 0.1, 1.0]
    found = result["knowledge"]["1"]["with_mcmc"]["ms_ssim"]
    assert black.get_ydata()[-1] == found["images"]["estimate"]
    assert orange.get_ydata()[-1] == found["defended"]["estimate"]
    examples = examples_figure(result).axes
    assert [axes.get_title() for axes in examples] == ["reference", "radius 0.1", "radius 1"] * 2
    drawn = examples[5].images[0].get_array()[..., 0]
    assert (drawn == pixels(result["knowledge"]["1"]["with_mcmc"]["examples"])).all()
    assert [axes.axison for axes in objectives_figure(result, "supervised").axes] == [True] * 6
    panels = objectives_figure(result, "unsupervised").axes
    assert [axes.axison for axes in panels] == [True] * 4
    assert panels[1].get_title().endswith("↓")


def test_registry_has_model_and_classifier():
    for config in Figures.names.values():
        assert config.model in MODELS
        assert f"{config.model}_classifier" in CLASSIFIERS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radii": 0.1}, "radii must be a tuple of radii"),
        ({"objective_radii": (0.0, 0.1)}, r"objective_radii must be a tuple of radii in \(0, 1\]"),
        ({"objectives": ("kl",)}, "objectives must be a tuple of names"),
        ({"gradients": ("unroll",)}, "gradients must be a tuple of names"),
        ({"gradients": ()}, r"gradients must be a tuple of names .* got \(\)"),
        ({"engine": "SGD"}, "engine must be APGD, PGD or MomentumPGD, got 'SGD'"),
        ({"attack_chains": 1}, "attack_chains must be an integer of at least 2"),
        ({"chain.num_chains": 2}, "chain.num_chains must be 1, for attackers who unroll the chain"),
        ({"chain.burn_in": 3}, "chain.burn_in must be 0, for attackers who unroll .* got 3"),
        ({"num_examples": 0}, r"num_examples must lie in 1..num_images = 3, got 0"),
        ({"num_images": 11}, "num_images=11 leaves an image whose target is of its own class"),
        ({"num_image": 3}, "unknown setting 'num_image'"),
    ],
)
def test_mistakes(changes, message, models, tmp_path):
    with pytest.raises(ValueError, match=message):
        study(tmp_path, models, {**TINY, **changes}).run()


def test_mistakes_of_names(tmp_path, capsys):
    with pytest.raises(ValueError, match="no figures named 'x'; choose one of mnist"):
        Figures("x", tmp_path)
    with pytest.raises(ValueError, match="no result files"):
        write_pages({"figures": Figures}, tmp_path)
    assert main(["figures", "x", "--output", str(tmp_path)]) == 2
    assert "no figures named 'x'" in capsys.readouterr().err
