"""The experiment behind the table of adaptive attacks: files, resumption, command line."""

from __future__ import annotations

import json

import pytest
import torch

from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.config import RobustnessConfig
from pyro_vae_defence.experiments.registry import ROBUSTNESS
from pyro_vae_defence.experiments.report import report, robustness_table
from pyro_vae_defence.experiments.robustness import robustness
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.classifier import LinearClassifier
from pyro_vae_defence.models.pretrained import save_pretrained

SETTINGS = {
    "num_images": 4, "num_samples": 1, "warmup_steps": 1, "leapfrog_steps": 2, "num_steps": 2,
    "num_chains": 2, "selection_draws": 1, "scoring_draws": 2, "check_images": 2, "check_steps": 4,
    "attacks": ("encoder", "equilibrium"), "defences": ("none", "aware"),
    "targets": ("classification",),
}  # fmt: skip


@pytest.fixture
def models(tmp_path):
    torch.manual_seed(0)
    vae = ConvVAE().eval()
    known = {"training": {"dataset": "mnist_subset"}, "command": "none", "provenance": {}}
    save_pretrained(
        vae, "mnist_vae", tmp_path / "models", mean_posterior_variance={"z": torch.full((64,), 0.3)},
        **known,
    )  # fmt: skip
    save_pretrained(LinearClassifier(64, 10), "mnist_vae_classifier", tmp_path / "models", **known)
    return tmp_path / "models"


@pytest.fixture
def packaged(monkeypatch):
    """Images that come with the package, under the dataset's own name."""
    from pyro_vae_defence import data
    from pyro_vae_defence.experiments import robustness as module

    subset = data.load("mnist_subset", "test")
    monkeypatch.setattr(module.data, "load", lambda *_: subset)


def test_a_result_is_written_resumed_and_printed(models, packaged, tmp_path, capsys):
    output = tmp_path / "out"
    run = {"output": output, "models": models, "overrides": SETTINGS}
    result = robustness("mnist_radius_0.2", **run)
    assert list(result["reports"]) == ["classification/none", "classification/aware"]
    aware = result["reports"]["classification/aware"]
    assert aware["defence"]["perturbation"] == "Linf(radius=0.2)"
    assert [a["name"] for a in aware["attacks"]] == ["encoder", "equilibrium"]
    assert aware["robust"]["mean"]["num_images"] == 4
    assert aware["threat_model"]["reading"] == "reencoded"
    path = output / "mnist_radius_0.2.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))

    # A report that was lost is made again, and is what it was; the other is not touched.
    stored = json.loads(path.read_text())
    lost = stored["reports"].pop("classification/none")
    stored["reports"]["classification/aware"]["seed"] = "kept"
    path.write_text(json.dumps(stored))
    again = robustness("mnist_radius_0.2", **run)["reports"]
    assert again["classification/aware"]["seed"] == "kept"
    for key in ("robust", "clean", "seed", "per_image"):
        assert again["classification/none"][key] == lost[key]

    table = robustness_table(json.loads(json.dumps(result)))
    assert "| no defence | accuracy |" in table
    assert "- skipped bpda: not asked for" in table
    assert "robustness mnist_radius_0.2" in report(output)
    assert (
        main(["robustness", "mnist_radius_0.2", "--output", str(output), "--set", "radius=7"]) == 2
    )
    assert "belongs to another run (its config differs)" in capsys.readouterr().err


def test_every_dataset_and_radius_has_an_experiment():
    assert {"mnist_radius_0.1", "mnist_radius_0.2", "fashion_mnist_radius_0.2"} <= set(ROBUSTNESS)
    assert all(f"_{config.radius:g}" in name for name, config in ROBUSTNESS.items())
    assert RobustnessConfig("m", 0.1).num_steps >= 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defences": "none"}, "defences must be a tuple of names"),
        ({"targets": ("latents",)}, "targets must be a tuple of names"),
        ({"engine": "SGD"}, "engine must be APGD, PGD or MomentumPGD, got 'SGD'"),
    ],
)
def test_mistakes(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RobustnessConfig("mnist_vae", 0.1, **change)
    with pytest.raises(ValueError, match="no experiment named 'x'"):
        robustness("x", tmp_path)
