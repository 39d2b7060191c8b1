"""Table 5: lines through short chains, the published numbers of transitions, and the table."""

from __future__ import annotations

import json

import pytest

from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.benchmark.seconds import (
    BenchmarkSeconds,
    SecondsConfig,
    published_seconds,
    seconds_at,
)

LINE = {"seconds": {"2": 0.5, "6": 0.9}, "per_transition": 0.1}


def test_seconds_are_a_line_through_both_chains():
    assert [seconds_at(LINE, n) for n in (2, 6, 12)] == pytest.approx([0.5, 0.9, 1.5])
    # T = 100 are 50 + 100 transitions.
    assert published_seconds({"published": LINE}, 100) == pytest.approx(15.3)


def test_a_line_that_falls_is_no_measurement():
    falling = {"seconds": {"2": 0.9, "6": 0.5}, "per_transition": -0.1}
    flat = {"gradients_per_transition": 4.0}

    def table(published, ours):
        found = {"none": 0.5, "published": published | flat, "ours": ours | flat}
        result = {
            "models": {"mnist_vae": found}, "name": "n", "command": "c",
            "config": {"num_images": 2, "lengths": [2, 6], "repeats": 1},
            "provenance": {"commit": "c", "torch": "t", "threads": 1},
        }  # fmt: skip
        return BenchmarkSeconds.section(result, [])

    assert "not measured" not in table(LINE, LINE).lower()
    assert "| mnist_vae | 100 | 0.0099 | 15.3 | 5.46 |" in table(LINE, LINE)
    assert "| mnist_vae | 100 | 0.0099 | 15.3 | not measured |" in table(LINE, falling)
    assert "| mnist_vae | 100 | 0.0099 | not measured | not measured |" in table(falling, LINE)
    assert "| the recommended one | not measured | 4 | not measured |" in table(LINE, falling)
    assert "set longer lengths or more repeats" in table(falling, falling)
    assert "| mnist_vae | 0 | 0.0001 | 0.5 |  |" in table(falling, falling)
    for lines in (LINE, falling), (falling, LINE), (falling, falling):
        assert "| -" not in table(*lines).replace("| ---", "")


def test_benchmark(tmp_path, capsys):
    settings = ["models=('mnist_vae',)", "num_images=2", "lengths=(1, 2)", "repeats=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["benchmark", "seconds", "--quiet", "--output", str(tmp_path), *words]) == 0
    result = json.loads((tmp_path / "seconds.json").read_text())
    found = result["models"]["mnist_vae"]
    assert found["paper"] == "mnist"
    assert found["none"] > 0
    for way, steps in (("published", 20), ("ours", 4)):
        assert found[way]["gradients_per_transition"] == steps
        assert set(found[way]["seconds"]) == {"1", "2"}
    table = BenchmarkSeconds.section(result, [])
    assert "| mnist_vae | 500 | 0.0505 |" in table
    assert table in (tmp_path / "tables.md").read_text()
    assert table.strip() in capsys.readouterr().out


@pytest.mark.parametrize("lengths", [(3, 3), (4, 2), (1, 2, 3), ()])
def test_two_lengths_are_needed(lengths):
    with pytest.raises(ValueError, match="lengths must"):
        SecondsConfig(lengths=lengths)
