"""The leaderboard."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from result_files import change

from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.leaderboard import write_leaderboard

RESULTS = Path(__file__).resolve().parents[1] / "docs/results"


@pytest.fixture
def results(tmp_path):
    for path in RESULTS.glob("robustness*/*.json"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name)
    return tmp_path


def ranking(results, model="`mnist_vae`, 0.2"):
    """Rows of a model and radius in the first table."""
    page = write_leaderboard(results).read_text().split("<details>")[0]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines()]
    return [row[1:] for row in rows if row[0].startswith(model)]


def test_the_leaderboard_is_what_its_command_writes(results, capsys):
    assert main(["leaderboard", str(results)]) == 0
    assert capsys.readouterr().out.startswith("wrote ")
    assert (results / "leaderboard.md").read_text() == (RESULTS / "leaderboard.md").read_text()


def test_the_worst_case_ranks_and_figures_stand_in_their_places(results):
    names = [row[0] for row in ranking(results)]
    assert names[0] == "HMC, perturbation-aware δ = radius"
    assert names[-1] == "no defence"
    hmc = results / "robustness/mnist_radius_0.2.json"
    report = ["reports", "classification/hmc"]
    for number, places in enumerate(
        [["clean", "mean"], ["attacks", 0, "figure"], ["robust", "mean"]], 1
    ):
        found = {"estimate": 0.89 + number / 100, "low": 0.1, "high": 1.0, "num_images": 20}
        change(hmc, report + places, found)
    change(hmc, [*report, "unreliable"], False)
    cells = [f"{0.89 + number / 100:.2f} [0.10, 1.00]" for number in (1, 2, 3)]
    assert ranking(results)[0] == ["HMC, the paper's target", *cells]
    change(hmc, [*report, "unreliable"], True)
    assert ranking(results)[0][-1] == f"{cells[-1]} *?*"


def test_other_images_or_attacks_are_another_ranking(results):
    before = [row[0] for row in ranking(results)]
    change(results / "robustness_controls/mnist_radius_0.2.json", ["config", "seed"], 1)
    after = [row[0] for row in ranking(results)]
    assert sorted(before) == sorted(after)
    assert after[-2:] == ["control: dark-pixel clipping δ = radius", "control: median filter"]


def test_two_results_of_one_defence_or_none_at_all(results, tmp_path):
    shutil.copytree(results / "robustness", results / "robustness_again")
    with pytest.raises(ValueError, match="two results of 'aware' in one setting"):
        write_leaderboard(results)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no result files"):
        write_leaderboard(tmp_path / "empty")
