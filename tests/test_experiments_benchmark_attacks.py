"""The benchmark of attacks: counts, intervals, table, command line."""

from __future__ import annotations

import importlib.util
import json
import warnings

from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.benchmark.attacks import OURS, THEIRS, BenchmarkAttacks

SMALL = ["--set", "num_images=4", "--set", "num_gradients=4"]


def test_benchmark(tmp_path, capsys):
    with warnings.catch_warnings():
        # What the libraries warn about while they are imported is theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        assert main(["benchmark", "attacks", "--output", str(tmp_path), *SMALL]) == 0
    result = json.loads((tmp_path / "attacks.json").read_text())
    installed = {
        name for name, (module, _, _) in THEIRS.items() if importlib.util.find_spec(module)
    }
    assert result["methods"].keys() == OURS.keys() | installed
    for name, entry in result["methods"].items():
        assert entry["num_gradients"] == 4, name
        assert entry["symmetric_kl"]["estimate"] > 0
        assert entry["largest_perturbation"] <= 0.1 + 1e-6
    table = BenchmarkAttacks.section(result, [])
    assert table in (tmp_path / "tables.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert result["command"].endswith("--set num_gradients=4")


def test_unknown_setting(tmp_path, capsys):
    wrong = ["benchmark", "attacks", "--output", str(tmp_path), "--set", "radii=1"]
    assert main(wrong) == 2
    assert "unknown setting 'radii'" in capsys.readouterr().err
    assert main(["benchmark", "defences"]) == 2
    assert (
        "no benchmark named 'defences'; choose one of samplers, attacks" in capsys.readouterr().err
    )
