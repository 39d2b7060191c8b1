"""Attacks on the top groups of an NVAE: result files, resumption, tables and figures; official
CelebA weights."""

from __future__ import annotations

import base64
import io
import json

import pytest
import torch
from conftest import shared_path
from PIL import Image
from studies import save_model, small_nvae

from pyro_vae_defence import data
from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.hierarchy import DefendHierarchy
from pyro_vae_defence.experiments.study import write_pages
from pyro_vae_defence.models import ConvVAE

SMALL = {
    "dataset": "mnist_subset",
    "groups": (1, 3),
    "attack_steps": 2,
    "num_references": 2,
    "num_restarts": 2,
    "chain.num_samples": 1,
    "chain.warmup_steps": 2,
    "chain.num_steps": 1,
    "metric_images": 6,
    "batch_size": 3,
    "num_examples": 2,
}


@pytest.fixture(scope="module")
def models(short_searches, tmp_path_factory):
    """An untrained network of three groups, without a stored metric."""
    torch.manual_seed(0)
    vae = small_nvae()
    directory = tmp_path_factory.mktemp("models")
    for model, name in ((vae, "mnist_nvae"), (ConvVAE(), "flat")):
        save_model(model, name, directory, training={})
    return directory


def run(models, output, **changes):
    settings = {**SMALL, **changes}
    study = DefendHierarchy("mnist_nvae_radius_0.1", output, None, models, settings, progress=False)
    return study.run()


def test_every_group_and_defence_is_scored(models, tmp_path):
    result = run(models, tmp_path)
    assert list(result["groups"]) == ["1", "3"]
    for entry in result["groups"].values():
        assert list(entry["defences"]) == ["none", "hmc", "aware"]
        assert entry["symmetric_kl"]["estimate"] > 0
        assert entry["defences"]["none"]["gradients_per_image"] == 0
        for name in ("hmc", "aware"):
            found = entry["defences"][name]
            assert 0 <= found["ms_ssim"]["estimate"] <= 1
            assert found["gradients_per_image"] >= 4
    # Pictures are of the attack on the most groups: both references, in four rows.
    one, three = (result["groups"][k]["defences"]["hmc"] for k in ("1", "3"))
    assert "examples" not in one
    with Image.open(io.BytesIO(base64.b64decode(three["examples"]))) as pixels:
        assert pixels.size == (2 * 29 + 1, 4 * 29 + 1)
    tables, figure = write_pages({DefendHierarchy.kind: DefendHierarchy}, tmp_path)
    text = tables.read_text()
    estimate = result["groups"]["3"]["defences"]["aware"]["ms_ssim"]["estimate"]
    assert f"{estimate:.3f}" in text
    assert text.count("HMC, perturbation-aware") == 4  # a row per group, in short and in full
    assert figure == tmp_path / "mnist_nvae_groups.png"
    with Image.open(figure) as image:
        assert image.width > 100


def test_defences_and_controls_are_those_of_every_study(models, tmp_path):
    """Chains move noise, others may, and all are scored on latents."""
    names = ("mode", "dark_clip_0.1", "hmc@2")
    found = run(models, tmp_path, groups=(1,), defences=names)["groups"]["1"]["defences"]
    assert list(found) == list(names)
    assert ["acceptance_rate" in found[name] for name in names] == [False, False, True]


def test_results_do_not_depend_on_batches_or_interruptions(models, tmp_path):
    """An attack's and a defence's noise are the image's own; finished entries are kept."""
    changes = {"groups": (2,), "defences": ("none", "hmc")}
    whole = run(models, tmp_path / "whole", **changes, batch_size=100)
    split = run(models, tmp_path / "split", **changes)
    partly = tmp_path / "partly" / "mnist_nvae_radius_0.1.json"
    partly.parent.mkdir()
    del split["groups"]["2"]["defences"]["hmc"]
    partly.write_text(json.dumps(split))
    resumed = run(models, partly.parent, **changes)
    for name in ("none", "hmc"):
        one, other = (r["groups"]["2"]["defences"][name]["ms_ssim"] for r in (whole, resumed))
        assert one["estimate"] == pytest.approx(other["estimate"], abs=1e-4)
    with pytest.raises(ValueError, match="its config differs"):
        run(models, partly.parent, **changes, seed=1)


def test_the_attack_sees_the_chosen_groups_alone(models, tmp_path):
    """Symmetric KL over more groups is a sum of more terms."""
    result = run(models, tmp_path, defences=("none",), groups=(1, 2, 3))
    reached = [entry["symmetric_kl"]["estimate"] for entry in result["groups"].values()]
    assert reached[0] < reached[1] < reached[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": (4,)}, "at most the model's 3 groups"),
        ({"groups": 2}, "groups must be a tuple"),
        ({"groups": ()}, "groups must be a tuple"),
        ({"groups": (0,)}, "groups must be an integer of at least 1, got 0"),
        ({"defences": "hmc"}, "defences must be a tuple"),
        ({"defences": ("other",)}, "no defence is called 'other'"),
        ({"defences": ("aware_unknown",)}, "assumes a radius; name it"),
        ({"dataset": "color_mnist"}, "shape"),
        ({"model": "flat"}, "has no latent groups"),
    ],
)
def test_mistakes(models, tmp_path, changes, message):
    root = shared_path("data") if changes.get("dataset") == "color_mnist" else None
    settings = {**SMALL, **changes}
    with pytest.raises(ValueError, match=message):
        DefendHierarchy("mnist_nvae_radius_0.1", tmp_path, root, models, settings).run()


def test_unknown_name():
    with pytest.raises(ValueError, match="no experiment named 'omniglot'"):
        DefendHierarchy("omniglot", "nowhere")


# --- CelebA with official weights -----------------------------------------------------------------


def celeba(root, num):
    """A folder in torchvision's layout with ``num`` random images per split."""
    folder = root / "celeba"
    pictures = folder / "img_align_celeba"
    pictures.mkdir(parents=True)
    names = ["Attribute"] * 20 + ["Male"] + ["Attribute"] * 19
    partition, attributes = [], [str(3 * num), " ".join(names)]
    for number in range(3 * num):
        file = f"{number:06d}.png"
        pixels = torch.randint(256, (218, 178, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(pictures / file)
        partition.append(f"{file} {number // num}")
        attributes.append(f"{file} " + " ".join(["1" if number % 2 else "-1"] * 40))
    (folder / "list_eval_partition.txt").write_text("\n".join(partition))
    (folder / "list_attr_celeba.txt").write_text("\n".join(attributes))
    return root


@pytest.mark.slow
def test_table_8_of_celeba_is_one_command(tmp_path, capsys):
    """The whole way of `defend celeba_nvae_radius_0.1`, on a tiny model in the official format."""
    checkpoint = shared_path("golden", "nvae", "celeba64_checkpoint.pt")
    config = DefendHierarchy.names["celeba_nvae_radius_0.1"]
    assert (config.num_references, config.num_restarts, config.attack_steps) == (20, 10, 50)
    arguments = ["defend", "celeba_nvae_radius_0.1", "--checkpoint", str(checkpoint)]
    arguments += ["--data-root", str(celeba(tmp_path, 2)), "--output", str(tmp_path / "results")]
    # A small radius: the search of levels, which `aware` makes at each step, is quick.
    small = {"groups": (2,), "num_references": 2, "num_restarts": 1, "metric_images": 2}
    small |= {"num_examples": 2}
    small |= {"radius": 0.01}
    small |= {"chain.num_samples": 1, "chain.warmup_steps": 1, "chain.num_steps": 1}
    small |= {"attack_steps": 2, "defences": ("none", "hmc", "aware")}
    for key, value in small.items():
        arguments += ["--set", f"{key}={value}"]
    assert main([*arguments, "--quiet"]) == 0, capsys.readouterr().err
    assert "HMC, the paper's target" in capsys.readouterr().out
    result = json.loads((tmp_path / "results" / "celeba_nvae_radius_0.1.json").read_text())
    assert set(result["groups"]["2"]["defences"]) == {"none", "hmc", "aware"}
    assert f"--checkpoint {checkpoint}" in result["command"]
    assert len(data.load("celeba64", "test", tmp_path)) == 2


def test_weights_of_celeba_have_to_be_given(tmp_path):
    with pytest.raises(ValueError, match="no pretrained model named 'celeba_nvae'"):
        DefendHierarchy("celeba_nvae_radius_0.05", tmp_path).run()
