"""The table of the README."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

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


def change(path, places, value):
    found = json.loads(path.read_text())
    entry = found
    for place in places[:-1]:
        entry = entry[place]
    entry[places[-1]] = value
    path.write_text(json.dumps(found))


def test_every_figure_stands_in_its_place(results):
    black = results / "compare/mnist.json"
    similar = {"estimate": 0.11, "low": 0.1, "high": 0.2}
    change(black, ["radii", "0.2", "hmc", "ms_ssim"], similar)
    read = ["radii", "0.2", "hmc", "accuracy", "class", "reencoded/mean", "attacked", "correct"]
    change(black, read, similar | {"estimate": 0.22})
    known = ["reports", "classification/hmc", "robust", "mean", "estimate"]
    change(results / "robustness/mnist_radius_0.2.json", known, 0.33)
    rows = [line.split(" | ") for line in front_table(results).splitlines() if "paper's" in line]
    assert [row[0] for row in rows] == ["| HMC, the paper's target"]
    assert rows[0][1] == "0.11 / 0.22"
    assert rows[0][3].startswith("0.36 / 0.33")


def test_what_was_not_measured_is_said(results):
    shutil.rmtree(results / "robustness_controls")
    rows = [line for line in front_table(results).splitlines() if "control" in line]
    assert all(row.endswith("| not measured |") for row in rows)


def test_the_readmes_program_runs(capsys):
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "slice(20)" in code
    exec(code.replace("slice(20)", "slice(4)"), {})
    printed = [line.split(" tensor(") for line in capsys.readouterr().out.splitlines()]
    found = {name: float(value.rstrip(")")) for name, value in printed}
    assert list(found) == ["before", "after", "floor"]
    assert found["before"] < found["after"]
