"""The comparison of defences: cells, resumption, tables that say who loses, figures."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from studies import check_resumed, save_model

from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.classify import CLASSIFIERS
from pyro_vae_defence.experiments.compare import (
    Compare,
    CompareConfig,
    best_controls,
    headline,
    radius_figure,
    verdict,
    verdicts,
)
from pyro_vae_defence.experiments.configuration import ChainConfig
from pyro_vae_defence.experiments.defences import KINDS, colour, defence_spec, label
from pyro_vae_defence.experiments.study import write_pages
from pyro_vae_defence.experiments.train import MODELS
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.classifier import LinearClassifier

TINY = {
    "defences": ("none", "aware", "aware_0.1", "aware_unknown", "aware_mode", "dark_clip", "mode"),
    "costs": ("hmc@2",),
    "inputs": ("mean", "guide"),
    "radii": (0.0, 0.1),
    "full_radii": (0.1,),
    "num_references": 4,
    "num_restarts": 2,
    "num_images": 12,
    "num_noise": 6,
    "curve_restarts": 1,
    "curve_images": 6,
    "cost_radius": 0.1,
    "chain.num_chains": 2,
    "chain.num_samples": 2,
    "chain.warmup_steps": 1,
    "chain.num_steps": 1,
    "chain.burn_in": 3,
}


@pytest.fixture(scope="module")
def models(narrow, short_searches, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    variance = {"z": torch.rand(64) + 0.1}
    save_model(ConvVAE(), "mnist_vae", directory, mean_posterior_variance=variance)
    for name in ("mnist_vae_classifier", "mnist_vae_classifier_guide"):
        save_model(LinearClassifier(64, 10), name, directory)
    return directory


def compare(output, models, **changes):
    return Compare("mnist", output, None, models, {**TINY, **changes}, progress=False).run()


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_vae_defence.experiments.compare.CALIBRATION_IMAGES", 10)
        return output, compare(output, models)


def test_cells_hold_every_figure(run):
    _, result = run
    assert set(result["radii"]) == {"0", "0.1"}
    for cells in result["radii"].values():
        assert list(cells) == list(TINY["defences"])
    cell = result["radii"]["0.1"]["aware"]
    assert (cell["num_attacks"], cell["num_classified"]) == (8, 12)
    assert result["radii"]["0"]["aware"]["num_classified"] == 6
    readings = {f"{how}/mean" for how in ("last", "draws", "mean", "reencoded")}
    assert set(cell["accuracy"]["class"]) == readings | {"last/guide", "draws/guide"}
    kinds = cell["accuracy"]["class"]["reencoded/mean"]
    assert set(kinds) == {"clean", "attacked", "noise"}
    for entry in (cell["ms_ssim"], cell["ms_ssim_of_mean"], kinds["attacked"]["unchanged"]):
        assert 0 <= entry["low"] <= entry["estimate"] <= entry["high"] <= 1
    scores = {"energy_drop", "perturbation_gain", "start_energy", "distance", "disagreement"}
    scores |= {"start_error", "end_energy", "end_error"}
    assert set(cell["detection"]) == scores
    assert set(cell["detection"]["distance"]) == {"against_clean", "against_noise"}
    assert cell["settings"]["perturbation"] == "Linf(radius=0.1)"
    # 3 transitions of at least one leapfrog step in 2 chains, their starts and burn-ins; 2 of them
    # in one chain.
    assert cell["gradients_per_image"] >= 14
    assert 6 <= result["costs"]["hmc@2"]["gradients_per_image"] < cell["gradients_per_image"]
    assert result["radii"]["0"]["aware"]["settings"]["perturbation"] == "None"


def test_means_outside_of_the_unit_interval_are_clipped_as_reconstructions_are(tmp_path):
    torch.manual_seed(0)
    vae = ConvVAE(likelihood="gaussian")
    assert vae.decode(torch.randn(9, 64)).min() < 0
    save_model(vae, "mnist_vae", tmp_path, mean_posterior_variance={"z": torch.ones(64)})
    save_model(LinearClassifier(64, 10), "mnist_vae_classifier", tmp_path)
    few = {"defences": ("none",), "costs": (), "inputs": ("mean",), "radii": (0.0,)}
    found = compare(tmp_path, tmp_path, **few, full_radii=())
    cell = found["radii"]["0"]["none"]
    assert cell["ms_ssim"] == cell["ms_ssim_of_mean"]  # of one draw


def test_the_attacks_own_radius_and_the_same_one_by_name_agree(run):
    cells = run[1]["radii"]["0.1"]
    for key in ("ms_ssim", "accuracy", "detection"):
        assert cells["aware"][key] == cells["aware_0.1"][key]


def test_without_an_attack_nothing_is_to_be_detected(run):
    cells = run[1]["radii"]["0"]
    assert all("detection" not in cell for cell in cells.values())
    assert set(cells["none"]["accuracy"]["class"]) == {"guide's mean"}
    found = cells["none"]["accuracy"]["class"]["guide's mean"]["clean"]
    assert found["unchanged"]["estimate"] == 1.0


def test_an_interrupted_run_goes_on_where_it_was(run, models, tmp_path):
    again = functools.partial(compare, models=models)
    check_resumed(again, tmp_path, run[1], "radii/0.1/mode", kept="radii/0/none")


def test_tables_and_figures_come_from_the_files_alone(run, tmp_path, capsys):
    output, result = run
    tables, *figures = write_pages({"compare": Compare}, output, tmp_path / "images")
    figures = [path for path in figures if path.suffix == ".png"]
    text = tables.read_text()
    value = result["radii"]["0.1"]["aware_0.1"]["ms_ssim"]["estimate"]
    assert f"| HMC, perturbation-aware δ = 0.1 | {value:.3f} [" in text
    assert "control: dark-pixel clipping δ = radius" in text
    assert "not told apart" in text
    assert "<!-- begin mnist -->" in text
    assert "<!-- end mnist -->" in text
    assert "start energy" in text
    assert [path.name for path in figures] == ["compare_mnist.png", "compare_mnist_cost.png"]
    assert all(path.stat().st_size > 5000 for path in figures)
    before = [path.read_bytes() for path in figures]
    assert main(["compare", "--output", str(output), "--images", str(tmp_path / "images")]) == 0
    assert "compare_mnist_cost.png" in capsys.readouterr().out
    assert [path.read_bytes() for path in figures] == before


PROVENANCE = {
    "command": "compare toy",
    "provenance": {"commit": "c0ffee", "torch": "2", "threads": 1},
}


def test_a_defence_that_does_not_beat_the_best_control_is_told_so():
    def cell(similarity, accuracy):
        def entry(value):
            return {"estimate": value, "low": value - 0.01, "high": value + 0.01}

        attacked = {"correct": entry(accuracy)}
        return {
            "ms_ssim_of_mean": entry(similarity),
            "accuracy": {"class": {"reencoded/mean": {"attacked": attacked, "clean": attacked}}},
            "gradients_per_image": 100 * similarity,
            "seconds_per_image": accuracy / 10,
        }

    chain = dataclasses.asdict(ChainConfig())
    result = {"clean": {"class": {}}, "config": {"reading": "reencoded/mean", "chain": chain}}
    cells = {
        "aware": cell(0.9, 0.5),
        "hmc": cell(0.8, 0.615),
        "median": cell(0.7, 0.6),
        "dark_clip": cell(0.85, 0.1),
        "aware_mode": cell(0.95, 0.51),
    }
    assert verdict(result, cells, "aware") == "similarity: better; accuracy: **worse**"
    assert verdict(result, cells, "hmc") == "similarity: **worse**; accuracy: not told apart"
    assert verdict(result, cells, "median") == ""
    best = best_controls(result, cells)
    assert {what: control for what, (control, _) in best.items()} == {
        "similarity": "dark_clip",
        "accuracy": "median",
    }
    # What assumes the attack's radius is advised by the name that fixes it.
    result |= {"name": "toy", "radii": {"0.2": cells}}
    result["config"]["cost_radius"] = 0.2
    found = headline(result)
    assert found.control == "median"
    assert found.accuracy["aware_0.2"] == found.accuracy["aware"]
    assert list(found.verdicts) == ["hmc", "aware_0.2", "aware_mode"]
    table = verdicts([result | PROVENANCE])
    value = "0.500 [0.490, 0.510] | 0.600 [0.590, 0.610], median filter |"
    words = "similarity: better; accuracy: **worse**"
    assert f"| {words} | toy, 0.2 | HMC, perturbation-aware δ = 0.2 | {value}" in table
    # A chain is also set beside the mode of its own target, where that was measured.
    words = "similarity: **worse**; accuracy: not told apart"
    pair = "0.500 [0.490, 0.510] | 0.510 [0.500, 0.520] |"
    assert f"| {words} | toy, 0.2 | HMC, perturbation-aware δ = 0.2 | {pair}" in table
    assert table.count("HMC, the paper's target") == 2  # a verdict and a cost
    # Costs are from the least to the most over results.
    cheap = result | {"radii": {"0.2": cells | {"aware_0.2": cell(0.3, 0.02)}}, "name": "cheap"}
    del cheap["radii"]["0.2"]["aware"]
    table = verdicts([result | PROVENANCE, cheap | PROVENANCE])
    assert "1 thread(s), from the least to the most over `toy.json`, `cheap.json`:" in table
    assert "| HMC, perturbation-aware δ = 0.2 | 30 to 90 | 0.002 to 0.05 |" in table
    assert "| control: dark-pixel clipping δ = radius | 85 | 0.01 |" in table
    del cells["median"], cells["dark_clip"]
    assert headline(result) is None


def test_names_of_defences():
    assert defence_spec("aware_0.15@20") == ("aware", 0.15, 20)
    assert defence_spec("encoder_samples") == ("encoder_samples", None, None)
    assert label("hmc@10") == "HMC, the paper's target, 10 transitions"
    for name in (
        "nothing",
        "median_0.1",
        "median@3",
        "aware_2",
        "hmc@1",
        "hmc_0.1",
        "aware_0.1.2",
        "aware_.",
    ):
        with pytest.raises(ValueError, match=f"no defence is called '{name}'"):
            defence_spec(name)


def test_registry_has_model_and_classifiers_of_every_comparison():
    for config in Compare.names.values():
        assert config.model in MODELS
        for inputs in ("", "_guide", "_posterior"):
            assert f"{config.model}_classifier{inputs}" in CLASSIFIERS
            if "color" in config.model:
                assert f"{config.model}_color_classifier{inputs}" in CLASSIFIERS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defences": "hmc"}, "defences must be a tuple"),
        ({"defences": ("hcm",)}, "no defence is called 'hcm'"),
        ({"radii": (0.1, 2.0)}, r"radii must lie in \[0, 1\]"),
        ({"chain.burn_in": -1}, "burn_in must be an integer of at least 0, got -1"),
        ({"inputs": ("guide",)}, "inputs must hold 'mean'"),
        ({"reading": "mean/posterior"}, "reading must be one of"),
        ({"inputs": ("mean", "posterior")}, "no pretrained model named 'mnist_vae_classifier_post"),
    ],
)
def test_mistakes(changes, message, models, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare(tmp_path, models, **changes)
    with pytest.raises(ValueError, match="no comparison named 'x'"):
        Compare("x", tmp_path)
    assert isinstance(Compare.names["mnist"], CompareConfig)


def test_every_defence_has_a_colour_of_its_own():
    own = [*KINDS, "aware_0.1", "aware_0.2", "dark_clip_0.2"]
    colours = [to_rgb(colour(name)) for name in own]
    assert len(set(colours)) == len(own)
    assert colour("aware_0.2@20") == colour("aware_0.2")
    assert colour("aware_0.3") == colour("aware")


def test_no_panel_has_more_than_five_curves():
    entry = {"estimate": 0.5, "low": 0.4, "high": 0.6}
    cell = {"ms_ssim_of_mean": entry, "accuracy": {"class": {"reencoded/mean": {}}}}
    cell["accuracy"]["class"]["reencoded/mean"] = {"clean": {"correct": entry}}
    cells = dict.fromkeys(CompareConfig("mnist_vae").defences, cell)
    result = {
        "name": "toy",
        "metric": "ms_ssim",
        "clean": {"class": {}},
        "config": {"defences": list(cells), "reading": "reencoded/mean", "cost_radius": 0.2},
        "radii": {"0.1": cells, "0.2": cells},
    }
    panels = radius_figure(result).findobj(Axes)
    assert [len(axes.lines) for axes in panels] == [5, 5, 5, 5]
    for axes in panels:
        assert len({line.get_color() for line in axes.lines}) == 5
