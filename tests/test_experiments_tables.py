"""Markdown of tables: wide ones and sources are folded away; the page of all results."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest

from pyro_vae_defence.experiments import tables
from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.summary import adaptive

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def test_a_narrow_table_is_printed_as_it_is():
    assert tables.table(["", "a"], [["x", "1"]]) == ["|  | a |", "| --- | --- |", "| x | 1 |", ""]


def test_a_wide_table_shows_some_columns_and_folds_the_whole():
    columns, cells = list("abcdef"), [["1", "2", "3", "4", "5", "6"]]
    whole = ["| a | b | c | d | e | f |", "| --- | --- | --- | --- | --- | --- |"]
    whole += ["| 1 | 2 | 3 | 4 | 5 | 6 |", ""]
    folded = ["<details><summary>All 6 columns</summary>", "", *whole, "</details>", ""]
    text = ["| a | f |", "| --- | --- |", "| 1 | 6 |", ""]
    assert tables.table(columns, iter(cells), ["a", "f"]) == text + folded
    first = [
        "| a | b | c | d | e |",
        "| --- | --- | --- | --- | --- |",
        "| 1 | 2 | 3 | 4 | 5 |",
        "",
    ]
    assert tables.table(columns, iter(cells)) == first + folded
    with pytest.raises(ValueError, match="not in list"):
        tables.table(columns, cells, ["a", "z"])


def test_commands_and_commits_are_folded_away():
    versions = {"commit": "0123456789abcdef-dirty", "torch": "2", "threads": 1}
    result = {"command": "run it", "provenance": versions}
    text = tables.section("# title", "", ["lines", ""], result)
    shown, _, rest = text.partition("<details>")
    assert shown == "# title\n\nlines\n\n"
    assert "- `run it`, commit `0123456789ab-dirty`, torch 2, 1 thread(s)" in rest
    assert rest.rstrip().endswith("</details>")


def test_the_page_of_all_results_is_what_the_command_writes_now(tmp_path, capsys):
    for folder in ("compare", "robustness", "robustness_controls", "robustness_protocol"):
        (tmp_path / folder).mkdir()
        for path in (RESULTS / folder).glob("*.json"):
            shutil.copy(path, tmp_path / folder)
    (tmp_path / "benchmark").mkdir()
    shutil.copy(RESULTS / "benchmark" / "samplers.json", tmp_path / "benchmark")
    assert main(["summary", str(tmp_path), "--images", str(tmp_path.parent / "images")]) == 0
    printed = capsys.readouterr().out
    for page in ("summary.md", "adaptive.md"):
        assert page in printed
        assert (tmp_path / page).read_text() == (RESULTS / page).read_text()


def test_what_adaptive_attackers_leave_stands_in_its_place_and_is_marked(tmp_path):
    suites = []
    for folder in ("robustness", "robustness_controls"):
        path = RESULTS / folder / "mnist_radius_0.2.json"
        suites.append(json.loads(path.read_text()))
    found = {"estimate": 0.5, "low": 0.4, "high": 0.6, "num_images": 20}
    suites[0]["reports"]["classification/aware"]["robust"]["mean"] = found
    for target, unreliable in (("classification", True), ("reconstruction", False)):
        clip = suites[1]["reports"][f"{target}/dark_clip"]
        clip["unreliable"], clip["robust"]["mean"] = unreliable, found | {"estimate": 0.55}

    def row(figure):
        (line,) = (line for line in adaptive(suites) if f", {figure};" in line)
        return line.strip("| ").split(" | ")

    cells = row("accuracy")
    assert cells[0] == "MNIST, 0.2, accuracy; clean 0.95"
    assert cells[1] == "0.03 [0.01, 0.07]"
    assert cells[2] == "0.55 [0.40, 0.60] *?*"
    assert cells[4] == "0.50 [0.40, 0.60] *?*"
    assert "*?*" not in row("similarity")[2]
    # What was measured otherwise is another row.
    suites[1]["config"]["seed"] = 1
    assert sum(", accuracy;" in line for line in adaptive(suites)) == 2


class TestAdaptiveRows:
    @pytest.fixture
    def suites(self):
        folders = ("robustness", "robustness_controls")
        paths = (RESULTS / folder / "mnist_radius_0.2.json" for folder in folders)
        return [json.loads(path.read_text()) for path in paths]

    def rows(self, suites):
        cells = (line.strip("| ").split(" | ") for line in adaptive(suites))
        return {row[0].split(";")[0]: row for row in cells if row[0].startswith("MNIST, 0.2")}

    def test_two_results_of_one_defence_are_refused(self, suites):
        again = copy.deepcopy(suites[0])
        again["config"]["chain"]["num_samples"] = 50
        with pytest.raises(ValueError, match="two results of 'none' in one setting"):
            list(adaptive([*suites, again]))

    def test_a_result_of_one_figure_does_not_stand_among_those_of_the_other(self, suites):
        expected = self.rows(suites)
        controls = suites[1]
        controls["config"]["targets"] = ["classification"]
        names = list(controls["reports"])
        for name in names:
            if name.startswith("reconstruction"):
                del controls["reports"][name]
        found = self.rows(suites)
        assert found["MNIST, 0.2, accuracy"] == expected["MNIST, 0.2, accuracy"]
        similarity = expected["MNIST, 0.2, similarity"]
        similarity[2] = tables.NOT_MEASURED
        assert found["MNIST, 0.2, similarity"] == similarity

    def test_images_that_are_still_to_come_are_said(self, suites):
        suites[0]["config"]["num_images"] = suites[1]["config"]["num_images"] = 100
        cells = self.rows(suites)["MNIST, 0.2, accuracy"]
        assert all(cell.endswith(" (20 images so far)") for cell in cells[1:])


def test_a_summary_of_nothing_is_refused(tmp_path, capsys):
    assert main(["summary", str(tmp_path), "--images", str(tmp_path)]) == 2
    assert "no result files" in capsys.readouterr().err
