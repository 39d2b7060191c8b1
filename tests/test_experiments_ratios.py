"""The study of log posterior ratios: what its values are, its table, its histograms."""

from __future__ import annotations

import json

import pytest
import torch
from studies import save_model

from pyro_vae_defence import metrics
from pyro_vae_defence.defence import NoDefence
from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.ratios import Ratios, RatiosConfig, _per_image, histograms
from pyro_vae_defence.experiments.study import write_pages
from pyro_vae_defence.models import ConvVAE

SETTINGS = {
    "num_references": 4, "num_restarts": 3, "chain.num_samples": 2, "chain.warmup_steps": 1,
    "chain.num_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    variance = {"z": torch.full((3,), 0.5)}
    save_model(ConvVAE(latent_dim=3), "mnist_vae", directory, mean_posterior_variance=variance)
    return directory


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("ratios")
    study = Ratios("mnist", output, None, models, SETTINGS, progress=False)
    study.run()
    return study


@pytest.mark.parametrize("of", ["attacked", "clean"])
def test_ratios_are_of_the_reference(run, of):
    """Of the same draws: how much worse a latent explains the reference than its own encoding."""
    references = run.attacked.references
    assert torch.equal(references[4:8], run.x_ref)
    images = run.attacked.images if of == "attacked" else references
    encode = NoDefence(run.vae)
    encoded = encode(references, run.generator("encoded")).latents["z"]
    before = encode(images, run.generator("before", of)).latents["z"]
    with torch.no_grad():
        joint = [
            -0.5 * z.square().sum(1) + run.vae.observation(z).log_prob(references)
            for z in (encoded, before)
        ]
    found = torch.tensor(run.result["ratios"][of]["before"])
    assert torch.allclose(found, joint[0] - joint[1], atol=2e-3)
    assert not torch.equal(encoded, before)


def test_a_result_is_resumed_and_printed(run, models):
    path = run.path
    stored = json.loads(path.read_text())
    lost = stored["ratios"].pop("clean")
    path.write_text(json.dumps(stored))
    again = Ratios("mnist", path.parent, None, models, SETTINGS, progress=False).run()
    for name in ("before", "after"):
        assert again["ratios"]["clean"][name] == lost[name]
    write_pages({"ratios": Ratios}, path.parent)
    text = (path.parent / "tables.md").read_text()
    cell = stored["ratios"]["attacked"]
    before, after = (torch.tensor(cell[name]) for name in ("before", "after"))
    every = metrics.ks_test(before, after)
    # Row r N + i is of image i.
    one = metrics.ks_test(*(v.reshape(3, 4).median(0).values for v in (before, after)))
    rows = [line for line in text.splitlines() if line.startswith("| attacked images")]
    row = max(rows, key=len)
    assert row.split(" | ")[4:6] == [f"{every.statistic:.2f}", f"{every.p_value:.2g}"]
    assert row.rstrip(" |").split(" | ")[6:] == [f"{one.statistic:.2f}", f"{one.p_value:.2g}"]
    assert "has p = 0.029. The chain is this library's, not" in text
    other = again | {"config": again["config"] | {"model": "fashion_mnist_vae"}}
    assert "p = 0.029" not in Ratios.section(other, [])
    published = again | {"config": again["config"] | {"defence": "paper"}}
    assert "this library's" not in Ratios.section(published, [])
    assert "(images/ratios_mnist.png)\n" in text
    figure = histograms(again)
    assert [len(axes.get_legend().get_texts()) for axes in figure.axes] == [2, 2]


def test_the_median_over_an_even_number_of_attacks_is_between_the_middle_two():
    values = torch.tensor([1.0, 20.0, 3.0, 10.0, 4.0, 50.0, 2.0, -5.0])  # row r N + i is of image i
    found = _per_image(values, {"num_restarts": 4, "num_references": 2})
    assert found.tolist() == [2.5, 15.0]


def test_a_share_of_all_attacks_has_an_interval():
    """Of 4 images, however many attacks each."""
    found = {"ratios": {"attacked": {"before": [2.0, 3.0, 4.0, 5.0] * 3, "after": [1.0] * 12}}}
    config = {
        "num_references": 4, "num_restarts": 3, "radius": 0.1, "model": "m", "seed": 0,
        "defence": "mode",
    }  # fmt: skip
    provenance = {"commit": "c", "torch": "t", "threads": 1}
    text = Ratios.section(
        found | {"config": config, "name": "n", "command": "c", "provenance": provenance}, ["f.png"]
    )
    assert "HMC" not in text
    assert f"| 1.00 [{0.025 ** (1 / 4):.2f}, 1.00] |" in text


def test_wrong_settings(capsys, tmp_path):
    with pytest.raises(ValueError, match="set paper, as in 'mnist'"):
        RatiosConfig("mnist_vae", defence="paper")
    with pytest.raises(ValueError, match="paper='mnist' has no effect without the defence"):
        RatiosConfig("mnist_vae", paper="mnist")
    command = ["ratios", "mnist", "--output", str(tmp_path), "--set", "defence=x"]
    assert main(command) == 2
    assert "no defence is called 'x'" in capsys.readouterr().err
