"""The table of the README."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from studies import change

from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.front import front_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/results"


def test_the_readme_shows_what_its_command_prints(capsys):
    assert main(["front", str(RESULTS)]) == 0
    _, _, rest = (ROOT / "README.md").read_text().partition("experiments front -->\n")
    assert rest.split("\n<!-- end -->")[0] == capsys.readouterr().out.strip()


@pytest.fixture
def results(tmp_path):
    for name in ("compare", "robustness", "robustness_controls"):
        shutil.copytree(RESULTS / name, tmp_path / name)
    return tmp_path


def test_every_figure_stands_in_its_place(results):
    black = results / "compare/mnist.json"
    similar = {"estimate": 0.11, "low": 0.1, "high": 0.2}
    change(black, ["radii", "0.2", "hmc", "ms_ssim"], similar)
    read = ["radii", "0.2", "hmc", "accuracy", "class", "reencoded/mean", "attacked", "correct"]
    change(black, read, similar | {"estimate": 0.22})
    report = ["reports", "classification/hmc"]
    for name, value in (("mnist", 0.33), ("fashion_mnist", 0.44)):
        path = results / f"robustness/{name}_radius_0.2.json"
        change(path, [*report, "attacks"], [])
        change(path, [*report, "robust", "mean", "estimate"], value)
    clean = ["reports", "classification/none", "undefended_clean", "estimate"]
    change(results / "robustness/fashion_mnist_radius_0.2.json", clean, 0.55)
    lines = front_table(results).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| HMC, the paper")]
    assert [row[:3] for row in rows] == [["HMC, the paper's target", "0.11 / 0.22", "0.93 / 0.91"]]
    assert rows[0][3:] == ["0.36 *?* / 0.33 *?*", "0.26 *?* / 0.44 *?*"]
    (row,) = (line for line in lines if line.startswith("| without"))
    assert row.endswith("/ 0.55 |")
    # The same defence as the leaderboard has it, which reads it otherwise.
    (legend,) = (line for line in lines if line.startswith("Similarity"))
    assert legend.endswith("it has 0.96 and 0.67 where this table has 0.95 and 0.55.")
    assert "over 5 draws" in legend


def test_a_report_that_calls_itself_unreliable_is_marked_and_says_why(results):
    suite, report = (
        results / "robustness/mnist_radius_0.2.json",
        ["reports", "classification/aware"],
    )

    def front():
        lines = front_table(results).splitlines()
        (row,) = (line for line in lines if "(recommended target)" in line)
        (note,) = (line for line in lines if line.startswith("- *?* marks"))
        return row.split(" | ")[3], note

    cell, note = front()
    assert cell.count("*?*") == 2
    assert "9 of 20" in note
    assert "`finite_differences` in 8" in note
    change(suite, [*report, "unreliable"], False)
    cell, note = front()
    assert cell == "0.93 *?* / 0.82"  # what its strongest attack leaves
    assert "8 of 20" in note
    assert "`finite_differences` in 7" in note


def test_chains_of_the_table_are_told_from_those_that_are_recommended(results):
    change(results / "robustness/mnist_radius_0.2.json", ["config", "chain", "burn_in"], 7)
    (note,) = (line for line in front_table(results).splitlines() if ".recommended" in line)
    recommended, here = note.split("The chains of the table")
    assert (
        "4 chains of 15 warm-up + 10 kept transitions from step size 0.2, burn-in 30" in recommended
    )
    assert "1 chain of 20 warm-up + 5 kept transitions from step size 0.5, burn-in 7" in here


def test_what_was_not_measured_is_said(results):
    shutil.rmtree(results / "robustness_controls")
    rows = [line for line in front_table(results).splitlines() if line.startswith("| control")]
    assert len(rows) == 3
    assert all(row.endswith("| not measured | not measured |") for row in rows)


def test_the_readmes_program_runs(capsys):
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "slice(20)" in code
    exec(code.replace("slice(20)", "slice(4)"), {})
    printed = [line.split(" tensor(") for line in capsys.readouterr().out.splitlines()]
    found = {name: float(value.rstrip(")")) for name, value in printed}
    assert list(found) == ["before", "after", "floor"]
    assert found["before"] < found["after"]
