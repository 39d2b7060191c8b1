"""The tables of the README."""

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
    """Of the suite of attacks chains at both radii and another reading, without their images."""
    shutil.copytree(RESULTS / "compare", tmp_path / "compare")
    protocol = tmp_path / "robustness_protocol"
    protocol.mkdir()
    for name in ("mnist_unrolled_0.1", "mnist_unrolled_0.2", "mnist_protocol_0.2",
                 "fashion_mnist_unrolled_0.2", "fashion_mnist_vote_0.1"):  # fmt: skip
        shutil.copy(RESULTS / f"robustness_protocol/{name}.json", protocol)
    return tmp_path


def rows(results, start):
    """Cells of the rows that begin so, in both tables."""
    lines = front_table(results).splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith(start)]


def test_every_figure_stands_in_its_place(results):
    black = results / "compare/mnist.json"
    similar = {"estimate": 0.11, "low": 0.1, "high": 0.2}
    change(black, ["radii", "0.2", "aware", "ms_ssim"], similar)
    read = ["radii", "0.2", "aware", "accuracy", "class", "reencoded/mean", "attacked", "correct"]
    change(black, read, similar | {"estimate": 0.22})
    report = ["reports", "classification/aware"]
    for name, value in (("mnist_unrolled_0.1", 0.99), ("mnist_unrolled_0.2", 0.33),
                        ("fashion_mnist_unrolled_0.2", 0.44)):  # fmt: skip
        path = results / f"robustness_protocol/{name}.json"
        change(path, [*report, "attacks"], [])
        ends = {"low": 0.3, "high": 0.5, "num_images": 100}
        change(path, [*report, "robust", "mean"], {"estimate": value, **ends})
    clean = {"estimate": 0.55, "low": 0.5, "high": 0.6}
    change(path, [*report, "undefended_clean"], clean)
    unaware, known = rows(results, "| HMC, perturbation-aware")
    assert unaware[1:] == ["0.11 / 0.22", "0.90 / 0.87"]
    assert known[1:] == ["0.33 [0.30, 0.50]", "0.44 [0.30, 0.50]"]
    assert rows(results, "| without")[1][2] == "0.55 [0.50, 0.60]"
    # What has no report at this radius, and what only some data sets have.
    assert len(rows(results, "| mode")) == 1
    assert rows(results, "| no defence")[1][1:] == ["0.00 [0.00, 0.04]", "not measured"]


def test_a_report_that_calls_itself_unreliable_is_marked(results):
    assert "*?*" not in front_table(results)
    path = results / "robustness_protocol/mnist_unrolled_0.2.json"
    change(path, ["reports", "classification/aware", "unreliable"], True)
    assert rows(results, "| HMC, perturbation-aware")[1][1].endswith("0.93] *?*")
    assert "*?* marks a report" in front_table(results)


def test_chains_of_the_tables_are_told_from_those_that_are_recommended(results):
    path = results / "robustness_protocol/mnist_unrolled_0.2.json"
    change(path, ["config", "chain", "burn_in"], 7)
    (note,) = (line for line in front_table(results).splitlines() if ".recommended" in line)
    here, recommended = note.split("`MCMCDefence.recommended`")
    assert (
        "4 chains of 15 warm-up + 10 kept transitions from step size 0.2, burn-in 30" in recommended
    )
    assert "5 kept transitions from step size 0.5, burn-in 7 (MNIST, black background);" in here


def test_the_readmes_program_runs(capsys):
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "slice(20)" in code
    exec(code.replace("slice(20)", "slice(4)"), {})
    printed = [line.split(" tensor(") for line in capsys.readouterr().out.splitlines()]
    found = {name: float(value.rstrip(")")) for name, value in printed}
    assert list(found) == ["before", "after", "floor"]
    assert found["before"] < found["after"]
