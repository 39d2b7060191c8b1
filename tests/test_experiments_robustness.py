"""The experiment behind the table of adaptive attacks: files, resumption, command line."""

from __future__ import annotations

import base64
import io
import json
import re

import matplotlib.image
import pytest
import torch

from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.config import RobustnessConfig
from pyro_vae_defence.experiments.drawing import picture
from pyro_vae_defence.experiments.html import robustness_page
from pyro_vae_defence.experiments.registry import ROBUSTNESS
from pyro_vae_defence.experiments.report import report, robustness_table, write_report
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

    write_report(output)
    page = (output / "report.html").read_text()
    # Everything is inside: the only sources are data, no link, no script.
    assert set(re.findall(r'(?:src|href)="([a-z]+:|[^#d])', page)) == {"data:"}
    assert "<script" not in page
    assert page.count("<svg") == 1
    assert page.count('src="data:image/png;base64,') == 2
    estimate = aware["robust"]["mean"]["estimate"]
    assert f"{estimate:.3f} [" in page
    assert "decoder evaluations" not in page
    assert "defence and decoder" in page  # what the equilibrium attacker knows
    unreliable = sum(found["unreliable"] for found in result["reports"].values())
    assert page.count("Unreliable:") == unreliable
    examples = matplotlib.image.imread(io.BytesIO(base64.b64decode(aware["examples"])))
    # Three rows of four images, a frame of one pixel around each.
    assert examples.shape == (3 * 29 + 1, 4 * 29 + 1, 4)
    assert (
        main(["robustness", "mnist_radius_0.2", "--output", str(output), "--set", "radius=7"]) == 2
    )
    assert "belongs to another run (its config differs)" in capsys.readouterr().err


def test_a_page_escapes_what_it_is_told_and_flags_what_is_unreliable(models, packaged, tmp_path):
    settings = {**SETTINGS, "attacks": ("transfer",), "defences": ("aware",)}
    result = robustness("mnist_radius_0.2", tmp_path, models=models, overrides=settings)
    result["command"] = "<b>&"
    page = robustness_page([result])
    assert "&lt;b&gt;&amp;" in page
    assert "only transfer attacks ran: no attacker knew the defence" in page
    with pytest.raises(ValueError, match="holds no report; run the experiment robustness"):
        robustness_page([])


def test_pictures_are_rows_of_images():
    dark, bright = torch.zeros(2, 1, 3, 3), torch.full((2, 1, 3, 3), 1.5)
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(picture((dark, bright)))))
    assert pixels.shape == (9, 9, 4)
    assert (pixels[1:4, 1:4, :3] == 0).all()
    assert (pixels[5:8, 5:8, :3] == 1).all()


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
