"""The study of bounds: a result in blocks, its table, and that both halves have the same images."""

from __future__ import annotations

import json

import pytest
import torch

from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.bound import Bound, BoundConfig, row
from pyro_vae_defence.experiments.study import check_finite, write_pages
from pyro_vae_defence.robustness import RobustnessReport
from pyro_vae_defence.robustness.mass import MassBound, Masses

SETTINGS = {
    "dataset": "mnist_subset", "num_images": 5, "images_per_cell": 3, "radii": (0.05,),
    "ratios": (1.0,),
    "num_clean": 60, "num_temperatures": 3, "num_steps": 1, "num_walks": 4, "num_falling": 1,
    "attacks": ("encoder",), "chain.num_samples": 2, "chain.warmup_steps": 1,
    "chain.num_steps": 1, "budget.num_steps": 2, "budget.selection_draws": 1,
    "budget.scoring_draws": 1,
}  # fmt: skip


def test_a_result_is_written_resumed_and_printed(tmp_path):
    result = Bound("mnist", tmp_path, overrides=SETTINGS, progress=False).run()
    (key,) = result["bounds"]
    blocks = result["bounds"][key]
    assert [len(block["log_ratio"]) for block in blocks.values()] == [2, 3]
    # What was attacked are the images of the bound, under the ball that the defender assumes.
    reports = result["attacks"][key]
    assert [len(report["per_image"]) for report in reports.values()] == [2, 3]
    assert reports["000"]["threat_model"]["reading"] == "vote"
    assert reports["000"]["defence"]["perturbation"] == "Linf(radius=0.05)"
    assert blocks["000"]["delta"] == 0.05

    path = tmp_path / "mnist.json"
    stored = json.loads(path.read_text())
    lost = stored["bounds"][key].pop("001")
    path.write_text(json.dumps(stored))
    again = Bound("mnist", tmp_path, overrides=SETTINGS, progress=False).run()
    assert again["bounds"][key]["001"] == lost
    write_pages({"bound": Bound}, tmp_path)
    assert "| 0.05 | 0.05 | 5 | " in (tmp_path / "tables.md").read_text()


def test_a_row_says_what_the_blocks_do():
    masses = {"rising": [1.0, 2.0], "falling": [2.0, 5.0]}
    blocks = {
        "000": {"log_ratio": [-1.0, 2.0], "right": masses, "wrong": masses},
        "001": {"log_ratio": [1.0, 3.0], "right": masses, "wrong": masses},
    }
    cells = row("0.1 2", blocks, {})
    assert cells[:3] == ["0.1", "0.2", "4"]
    assert cells[3].startswith("0.750 [")
    assert cells[4:7] == ["0", "", ""]
    share = torch.tensor([-1.0, 2.0, 1.0, 3.0]).sigmoid().mean()
    assert cells[7].startswith(f"{float(share):.3f} [")
    assert cells[8:] == ["2.0", "2.0"]  # the mean of 1 and 3


def test_a_mass_that_no_walk_has_found_keeps_no_vote_and_loses_no_cell():
    found, lost = torch.tensor([3.0, -torch.inf]), torch.tensor([1.0, 2.0])
    right, wrong = (Masses(mass, mass, lost, lost, lost) for mass in (found, lost))
    block = MassBound(0.1, 0.2, right, wrong, common_attack=False).to_dict()
    check_finite(block)
    cells = row("0.1 2", {"000": json.loads(json.dumps(block, allow_nan=False))}, {})
    assert cells[3].startswith("0.500 [")
    assert cells[7].startswith(f"{float(torch.tensor(2.0).sigmoid() / 2):.3f} [")
    assert cells[8:] == ["0.0", "0.0"]


def test_the_first_images_alone_are_attacked_and_the_gap_is_theirs(tmp_path):
    settings = {**SETTINGS, "num_attacked": 1}
    result = Bound("mnist", tmp_path, overrides=settings, progress=False).run()
    (key,) = result["bounds"]
    attacked = result["attacks"][key]
    assert sorted(result["bounds"][key]) == ["000", "001"]
    assert list(attacked) == ["000"]
    cells = row(key, result["bounds"][key], attacked)
    assert row(key, result["bounds"][key], attacked | {"999": None}) == cells  # not bounded yet
    kept = RobustnessReport.from_dict(attacked["000"]).values["robust/averaged"]
    promised = torch.tensor(result["bounds"][key]["000"]["log_ratio"]) > 0
    assert cells[4] == "2"
    assert cells[6].startswith(f"{float((kept - promised.float()).mean()):.3f} [")


def test_other_images_choose_the_radius_of_the_defender(tmp_path):
    settings = {
        **{name: value for name, value in SETTINGS.items() if name != "attacks"},
        "dataset": "mnist_subset", "num_images": 3, "ratios": (1.0, 2.0),
    }  # fmt: skip
    study = Bound("mnist_validation", tmp_path, overrides=settings, progress=False)
    result = study.run()
    assert sorted(result["bounds"]) == ["0.05 1", "0.05 2"]
    assert result["attacks"] == {}
    test = Bound("mnist", tmp_path, overrides=settings, progress=False)
    test.load()
    others = {each.numpy().tobytes() for each in test.x}
    assert not others & {each.numpy().tobytes() for each in study.x}


def test_no_attack_is_named_where_none_is_made(tmp_path):
    with pytest.raises(ValueError, match="num_attacked=3 has no effect without attacks"):
        BoundConfig("mnist_vae", attacks=(), num_attacked=3)
    settings = {**SETTINGS, "num_attacked": 0}
    study = Bound("mnist", tmp_path, overrides=settings, progress=False)
    assert {key[0] for key, _ in study.cells()} == {"bounds"}
    assert "attacks: none." in Bound.section(study.result, [])


def test_blocks_hold_every_image_once():
    config = BoundConfig("mnist_vae", num_images=50, images_per_cell=20)
    assert [i for block in config.blocks for i in block] == list(range(50))
    assert max(map(len, config.blocks)) <= 20
    with pytest.raises(ValueError, match="images_per_cell"):
        BoundConfig("mnist_vae", num_images=3, images_per_cell=2)


@pytest.mark.parametrize(
    "setting", ["ratios=(0.9,)", "num_walks=1", "num_temperatures=2", "radii=(0.0,)"]
)
def test_wrong_settings_end_in_a_line(setting, capsys, tmp_path):
    assert main(["bound", "mnist", "--output", str(tmp_path), "--set", setting]) == 2
    assert setting.split("=")[0] in capsys.readouterr().err
