"""The paper's protocol: what is attacked, where the chain is read, how it is counted."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from studies import check_resumed

from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.defence.mcmc import PAPER_SETTINGS
from pyro_vae_defence.experiments.configuration import override
from pyro_vae_defence.experiments.published import Published, PublishedConfig, note
from pyro_vae_defence.experiments.train import MODELS

TINY = {
    "dataset": "mnist_subset",
    "radii": (0.1,),
    "num_references": 10,
    "num_restarts": 2,
    "attack_steps": 3,
    "num_transitions": 2,
    "transitions": (0, 1, 3),
    "num_examples": 2,
}


def study(output, name="mnist_vae", **changes):
    return Published(name, output, overrides=TINY | changes, progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    found = study(tmp_path_factory.mktemp("results"), undefended_radii=(0.02, 0.3, 0.5))
    found.run()
    return found


def test_cells_hold_every_measure(run):
    result = run.result
    assert [*result["radii"]] == ["0", "0.1", "0.02", "0.3", "0.5"]
    assert [*result["radii"]["0.1"]] == ["encoder", "class"]
    assert [*result["radii"]["0.3"]["encoder"]] == ["none"]
    for cells in result["radii"]["0.1"].values():
        assert [*cells["hmc"]["transitions"]] == ["0", "1", "2", "3"]
        for entry in (cells["none"], cells["hmc"], *cells["hmc"]["transitions"].values()):
            assert set(entry["accuracy"]) == {"class"}
            assert 0 < entry["ms_ssim"]["low"] < entry["ms_ssim"]["high"] < 1
            assert entry["mse"]["standard_error"] > 0
        # Read where the configuration says, although the chain went on.
        for measure in ("ms_ssim", "mse", "accuracy"):
            assert cells["hmc"][measure] == cells["hmc"]["transitions"]["2"][measure]
        # The first state is a gradient, each transition twenty.
        assert cells["hmc"]["gradients_per_image"] == 1 + 20 * 3
    clean = result["radii"]["0"]["encoder"]["none"]
    assert clean["accuracy"]["class"]["unchanged"]["estimate"] == 1.0
    assert clean["ms_ssim_images"]["estimate"] == pytest.approx(1.0, abs=1e-6)


def test_the_attack_gets_stronger_with_its_radius(run):
    cells = [run.result["radii"][radius]["encoder"]["none"] for radius in ("0", "0.1", "0.3")]
    for measure in ("ms_ssim", "ms_ssim_images"):
        values = [cell[measure]["estimate"] for cell in cells]
        assert values == sorted(values, reverse=True)
    x = run.attacked(0.1, "class")
    assert x.shape == (20, 1, 28, 28)
    assert ((x - run.references).abs() <= 0.1 + 1e-6).all()


def test_a_shorter_chain_is_the_beginning_of_a_longer(run):
    """The published defence, its warm-up divided off, ends where the long chain is read."""
    x, seed = run.attacked(0.1, "encoder"), 3
    whole = run.defence(x, torch.Generator().manual_seed(seed))
    short = dataclasses.replace(MCMCDefence.paper(run.vae, "mnist"), num_samples=1, warmup_steps=1)
    end = short(x, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(whole.samples["z"][0, 1], end.latents["z"], atol=1e-5, rtol=1e-5)
    decoded = run.decode({"z": whole.samples["z"][0, 1]})
    torch.testing.assert_close(decoded, end.reconstruction, atol=1e-5, rtol=1e-5)


def test_starts_of_a_reference_are_counted_as_one(run):
    """Two starts of ten references: the error is that of ten means."""
    values = torch.arange(20.0)  # start after start: the means are 5, 6, ..., 14
    found = run.estimate(values)
    assert found["estimate"] == pytest.approx(9.5)
    # Their variance is 55 / 6, over ten of them.
    assert found["standard_error"] == pytest.approx((55 / 60) ** 0.5)
    assert torch.equal(run.labels[:10], run.labels[10:])


def test_the_chain_is_as_long_as_published(tmp_path):
    found = Published("mnist_vae", tmp_path)
    found.paper = "mnist"
    assert found.count == 750  # T // 2 + T of the published code, T = 500
    assert found.counts == [0, 5, 20, 50, 100, 200, 500, 750]
    found.paper = "color_mnist"
    assert found.counts[-1] == 1500
    curves = Published("mnist_transitions", tmp_path)
    curves.paper = "mnist"
    assert curves.count == 750
    assert max(curves.counts) == 2000


def test_an_interrupted_run_goes_on_where_it_was(run, tmp_path):
    def again(output, **changes):
        return study(output, undefended_radii=(0.02, 0.3, 0.5), **changes).run()

    check_resumed(again, tmp_path, run.result, "radii/0.1/class/none", kept="radii/0/encoder/none")


def test_section_and_figures_come_from_the_result_alone(run):
    text = Published.section(run.result, [])
    value = run.result["radii"]["0.1"]["class"]["hmc"]["ms_ssim"]["estimate"]
    assert f"| radius 0.1, through the classifier (class) | HMC | {value:.3f} [" in text
    assert "| radius 0.3, through the encoder | no defence |" in text
    assert [*Published.figures(run.result)] == ["transitions", "radii"]
    assert "references of `mnist_subset`, not of the full test set, from 2 starts" in text
    assert "Run on one" not in text  # a CPU
    empty = {**run.result, "radii": {"0": {"encoder": {}}}}
    assert "### published mnist_vae" in Published.section(empty, [])
    assert Published.figures(empty) == {}


def test_what_kept_a_gpu_from_captured_transitions_is_said(run):
    result = json.loads(json.dumps(run.result))
    result["provenance"]["device"] = "NVIDIA H200"
    assert "Run on one NVIDIA H200. 95%" in note(result)
    settings = result["radii"]["0.1"]["class"]["hmc"]["settings"]
    settings["prepare_why_not"] = "rows differ"
    said = note(result)
    assert "H200. Without captured or recorded transitions: rows differ. 95%" in said
    result["config"]["dataset"] = None
    assert "references of the full test set of `mnist`, from" in note(result)


def test_a_result_is_complete_with_all_its_cells(run):
    cut = json.loads(json.dumps(run.result))
    assert Published.complete(cut)
    whole = cut["radii"]["0.1"]["class"].pop("hmc")
    assert not Published.complete(cut)
    cut["radii"]["0.1"]["class"]["hmc"] = whole
    del cut["radii"]["0.5"]
    assert not Published.complete(cut)


def test_radii_alone_take_no_chain(tmp_path):
    found = Published("mnist_radii", tmp_path)
    found.tasks = {"class": ()}
    keys = [key for key, _ in found.cells()]
    assert keys[0] == ("radii", "0", "encoder", "none")
    assert len(keys) == 1 + len(found.config.undefended_radii)
    assert {key[2:] for key in keys} == {("encoder", "none")}


def test_names_are_those_of_trained_models():
    for name, config in Published.names.items():
        assert config.model in MODELS
        assert MODELS[config.model].dataset in PAPER_SETTINGS
        assert name.endswith(("_transitions", "_radii")) or name == config.model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radii": ()}, "radii and undefended_radii are both empty"),
        ({"undefended_radii": (0.1,)}, "undefended_radii holds 0.1, which is one of radii"),
        ({"num_examples": 9}, "num_examples must be an integer of 0..8"),
        ({"num_references": 4}, "num_examples must be at most num_references = 4"),
        ({"num_transitions": 0}, "num_transitions"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        override(PublishedConfig("mnist_vae"), changes)
