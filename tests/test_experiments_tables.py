"""Markdown of tables: wide ones and sources are folded away; the page of all results."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pyro_vae_defence.experiments import tables
from pyro_vae_defence.experiments.__main__ import main

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
    for folder in ("compare", "robustness"):
        (tmp_path / folder).mkdir()
        for path in (RESULTS / folder).glob("*.json"):
            shutil.copy(path, tmp_path / folder)
    (tmp_path / "benchmark").mkdir()
    shutil.copy(RESULTS / "benchmark" / "samplers.json", tmp_path / "benchmark")
    assert main(["summary", str(tmp_path), "--images", str(tmp_path.parent / "images")]) == 0
    assert "summary.md" in capsys.readouterr().out
    assert (tmp_path / "summary.md").read_text() == (RESULTS / "summary.md").read_text()


def test_a_summary_of_nothing_is_refused(tmp_path, capsys):
    assert main(["summary", str(tmp_path), "--images", str(tmp_path)]) == 2
    assert "no result files" in capsys.readouterr().err
