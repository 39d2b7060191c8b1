"""The benchmark of a GPU, on the CPU: what it counts, what survives a failure, what it says."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.benchmark import engines
from pyro_vae_defence.experiments.benchmark.gpu import (
    card,
    defence,
    libraries,
    profiling,
    run,
    steps,
    timing,
    ways,
)
from pyro_vae_defence.experiments.benchmark.gpu.config import GPUBenchmarkConfig
from pyro_vae_defence.experiments.benchmark.gpu.gradients import gradients
from pyro_vae_defence.experiments.benchmark.gpu.run import BenchmarkGPU
from pyro_vae_defence.experiments.benchmark.gpu.tables import gpu_tables
from pyro_vae_defence.experiments.benchmark.gpu.ways import CAPTURED, EAGER, Way
from pyro_vae_defence.models import program
from pyro_vae_defence.models.pretrained import load_pretrained
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.precision import tf32_settings

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "benchmark_gpu"

TINY = {
    "seconds": 0.01, "repeats": 1, "matmul_size": 16, "copy_mebibytes": 1, "rows": (3, 2),
    "compiled_rows": (), "num_images": 4, "num_chains": 2, "attack_steps": 2, "warmup_steps": 1,
    "num_samples": 1, "window": 1, "gold_images": 3, "gold_warmup": 1, "gold_samples": 1,
    "library_transitions": 2, "library_warmup": 1, "epoch_images": 10, "epoch_batch_sizes": (5,),
    "ascent_images": 3, "ascent_steps": 3, "profile_rows": 2,
}  # fmt: skip


def silent(text):
    pass


@pytest.fixture(scope="module")
def vae():
    return load_pretrained("mnist_vae")


class TestTurns:
    def test_what_fails_costs_the_others_nothing(self):
        calls = []

        def late():
            def call():
                calls.append("late")
                if len(calls) > 1:
                    raise RuntimeError("out of\n  memory")

            return call

        def early():
            raise ValueError("no such library")

        makers = {"early": early, "late": late, "good": lambda: lambda: None}
        found = timing.turns(makers, CPU, 0.01, 3, silent)
        assert found["early"] == {"error": "ValueError: no such library"}
        assert found["late"]["error"] == "RuntimeError: out of memory"
        assert calls == ["late", "late"]
        assert "seconds" not in found["late"]
        assert 0 < found["good"]["seconds"] < 0.01
        assert found["good"]["turns"] >= 1

    def test_turns_end_with_the_budget(self):
        number = 0

        def call():
            nonlocal number
            number += 1
            time.sleep(0.02)

        found = timing.turns({"slow": lambda: call}, CPU, 0.05, 1000, silent)
        assert number <= 5
        assert found["slow"]["seconds"] >= 0.02

    def test_a_call_may_bring_its_own_clock(self):
        found = timing.turns({"other process": lambda: lambda: 3.0}, CPU, 0.01, 2, silent)
        assert found["other process"]["seconds"] == 3.0

    def test_long_errors_are_cut(self):
        assert len(timing.failure(RuntimeError("x" * 1000))["error"]) == 300


class TestCard:
    def test_bytes_are_those_of_what_is_read_and_written(self):
        a, b = torch.ones(10, 20), torch.ones(20)
        with card.BytesMoved() as moved:
            a.T.reshape(2, 100)[:, :50]  # transposing moves nothing, the copy reads and writes
        assert moved.bytes == 4 * 2 * 200
        with card.BytesMoved() as moved:
            a + b.expand(10, 20)  # what is broadcast is read once
        assert moved.bytes == 4 * (200 + 20 + 200)
        with card.BytesMoved() as moved:
            a.add_(1.0)
        assert moved.bytes == 4 * 2 * 200

    def test_operations_of_a_gradient_are_those_of_large_batches(self, vae):
        x, z = torch.rand(400, 1, 28, 28), torch.randn(400, 64)
        found = card.one_gradient(vae, x)
        potential = program.potential(vae, x)
        with FlopCounterMode(display=False) as counter:
            lat.value_and_gradient(potential, {"z": z})
        assert found["flops_per_row"] == pytest.approx(counter.get_total_flops() / 400, rel=1e-2)
        # What every gradient must read and write: an image, latents and their gradient.
        assert found["bytes_per_row"] > 4 * (784 + 2 * 64)


def test_every_way_prepares_the_force_it_is_named_after(vae):
    x = torch.rand(2, 1, 28, 28)
    z = {"z": torch.randn(2, 64)}
    full = lat.value_and_gradient(program.potential(vae, x), z)[1]["z"]
    for way in ways.PLAIN:
        prepare = way.prepare()
        potential = program.potential(vae, x)
        prepared = potential if prepare is None else prepare(potential)
        force = prepared.force(z)["z"] if hasattr(prepared, "force") else None
        if way.precision == "float32":
            assert force is None or torch.equal(force, full)
        else:
            assert force is not None, way
            exact = way.precision == "TF32"  # which a CPU does not have
            assert bool((force - full).norm() < 1e-5 * full.norm()) == exact, way
    assert {str(way) for way in ways.COMPILED} >= {"compiled, float32", str(CAPTURED)}
    assert Way("captured, compiled", "TF32").prepare().force_dtype == "tf32"


def test_gradients_are_counted_and_energies_checked(vae):
    config = GPUBenchmarkConfig(**TINY)
    settings = tf32_settings()
    found = gradients(vae, torch.rand(2, 1, 28, 28), 3, (EAGER, CAPTURED), config, silent)
    assert tf32_settings() == settings
    for entry in found.values():
        assert entry["gradients_per_second"] == pytest.approx(3 * 4 / entry["seconds"])
        assert entry["largest_energy_error"] < 1e-2
        assert 0 <= entry["acceptance_rate"] <= 1
    assert "why_not" not in found[str(EAGER)]
    assert "cpu" in found[str(CAPTURED)]["why_not"]
    # The same chains, whatever computes them.
    assert found[str(EAGER)]["energy"] == pytest.approx(found[str(CAPTURED)]["energy"], rel=0.1)


def test_a_wrong_energy_is_seen(vae, monkeypatch):
    class Wrong(Way):
        def prepare(self):
            def off(potential):
                potential.energy_and_gradient = lambda latents: (
                    potential(latents).detach() + 7.0,
                    lat.value_and_gradient(potential, latents)[1],
                )
                return potential

            return off

    config = GPUBenchmarkConfig(**TINY)
    found = gradients(vae, torch.rand(2, 1, 28, 28), 2, (Wrong("eager"),), config, silent)
    assert found[str(EAGER)]["largest_energy_error"] == pytest.approx(7.0, abs=1e-2)


def test_the_trajectory_does_not_depend_on_micro_batches(vae):
    x = torch.rand(3, 1, 28, 28)
    gold = torch.tensor([500.0, 510.0])
    compared = torch.tensor([True, False, True])
    found = []
    for batch_size in (6, 2):
        config = GPUBenchmarkConfig(**{**TINY, "batch_size": batch_size})
        found.append(defence._trajectory(vae, x, compared, gold, config))
    (gradients, excess), (again, other) = found
    assert gradients[0] == 1
    assert gradients[1] > 30  # the burn-in's
    assert (gradients == again).all()
    assert excess == pytest.approx(other, abs=0.1)


@pytest.fixture
def small(monkeypatch):
    """Little of everything, and no other library."""
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(run, "PLAIN", (EAGER, Way("captured", "float64")))
    monkeypatch.setattr(defence, "WAYS", (EAGER,))
    monkeypatch.setattr(steps, "TRAININGS", {"float32": (False, {}), "bad": (False, {"x": 1})})
    monkeypatch.setattr(steps, "WAYS", (EAGER,))
    monkeypatch.setattr(profiling, "WAYS", (EAGER,))


def settings(**changes):
    return [
        word for key, value in {**TINY, **changes}.items() for word in ("--set", f"{key}={value}")
    ]


def test_results_failures_tables_and_resumption(small, tmp_path, capsys):
    command = ["benchmark", "gpu", "--quiet", "--output", str(tmp_path)]
    assert main([*command, *settings()]) == 0
    path = tmp_path / "gpu.json"
    first = json.loads(path.read_text())
    sections = first["sections"]
    assert list(sections) == [
        "card", "gradients 3", "defence", "numpyro", "profile", "gradients 2", "torchebm",
        "training", "attack",
    ]  # fmt: skip
    assert engines.NO_NUMPYRO in sections["numpyro"]["error"]
    assert "torchebm is not installed" in sections["torchebm"]["error"]
    found = {name: entry["results"] for name, entry in sections.items() if "results" in entry}
    assert set(found) == set(sections) - {"numpyro", "torchebm"}
    # An engine that fails does not lose the others.
    assert found["gradients 3"]["captured, float64"] == {"error": "KeyError: 'float64'"}
    assert found["gradients 3"]["eager, float32"]["gradients_per_second"] > 0
    assert "unexpected keyword" in found["training"]["bad, batches of 5"]["error"]
    assert found["training"]["float32, batches of 5"]["seconds"] > 0
    measured = found["defence"]
    assert (measured["images"], measured["chains"], measured["gold"]["images"]) == (4, 2, 3)
    assert "energy_above_gold" in measured["ways"]["captured, float32, to the end"]
    assert found["attack"]["symmetric KL"]["seconds_per_step"] > 0
    assert found["profile"]["eager, float32"]["longest"]

    printed = capsys.readouterr().out
    text = (tmp_path / "tables.md").read_text()
    assert text in printed
    assert "**A run on a CPU**" in text
    assert text.count("not measured yet") == 4
    assert "- gradients 3, captured, float64: failed: KeyError: 'float64'" in text
    assert f"- numpyro: ValueError: {engines.NO_NUMPYRO}" in text
    assert max(line.count("|") for line in text.splitlines()) == 6  # five columns

    # One section less: that one alone is run again.
    kept = {name: entry for name, entry in sections.items() if name != "training"}
    first["sections"] = kept
    path.write_text(json.dumps(first))
    assert main([*command, *settings()]) == 0
    again = json.loads(path.read_text())["sections"]
    assert again.keys() == sections.keys()
    assert all(again[name] == kept[name] for name in kept)

    # Figures of two devices in one table would be compared.
    first["provenance"]["device"] = "a card"
    path.write_text(json.dumps(first))
    assert main([*command, *settings()]) == 2
    assert "is of a card, this is a CPU; choose another output" in capsys.readouterr().err


def test_a_section_that_fails_is_recorded_and_a_dead_device_ends_the_run(tmp_path, monkeypatch):
    study = BenchmarkGPU("gpu", tmp_path, overrides=TINY, progress=False)
    monkeypatch.setattr(study, "note", silent)

    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")

    entry = study.measured("card", fails)
    assert entry["error"] == "OutOfMemoryError: CUDA out of memory"
    assert entry["wall_seconds"] >= 0

    def dead(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(run, "wait", dead)
    with pytest.raises(ValueError, match="cpu does not answer any more .*illegal.* same command"):
        study.measured("card", dict)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["library_warmup=2"], "library_warmup must lie in 0..1"),
        (["rows=()"], "rows must be a tuple that is not empty"),
        (["ascent_steps=2"], "ascent_steps must be"),
        (["model=color_mnist_vae"], "must have a Bernoulli likelihood"),
    ],
)
def test_command_line_mistakes(arguments, message, capsys, tmp_path):
    given = dict(word.split("=") for word in arguments)
    assert main(["benchmark", "gpu", "--output", str(tmp_path), *settings(**given)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def result(**sections):
    """A result file of a card."""
    provenance = {
        "commit": "c", "torch": "t", "threads": 1, "machine": "x", "device": "a card",
        "driver": "1", "cuda": "2", "cudnn": 3,
    }  # fmt: skip
    entries = {name: {"results": found, "wall_seconds": 1.0} for name, found in sections.items()}
    return {
        "study": "benchmark_gpu",
        "config": json.loads(json.dumps(vars(GPUBenchmarkConfig()))),
        "command": "python",
        "provenance": provenance,
        "sections": entries,
    }


def rated(**rates):
    return {name: {"gradients_per_second": rate} for name, rate in rates.items()}


def goals(**sections):
    lines = gpu_tables(result(**sections)).splitlines()
    start = lines.index("| goal | measured |  |") + 2
    return [line.strip("| ").rpartition(" | ")[2] for line in lines[start : start + 4]]


def test_goals_are_met_not_met_or_open():
    assert goals() == ["not measured yet"] * 4
    ways = {"captured, float32": {"seconds": 9.0}, "captured, float32, to the end": {"seconds": 2}}
    stationary = {
        "images": 10_000, "different_images": 1000, "chains": 4, "settled": True, "ways": ways,
        "gradients_per_chain": 35, "gradients_to_the_end": 131, "transitions": 1,
        "gold": {"images": 1000, "energy": 1.0, "halves_apart": 0.1, "transitions_per_chain": 9},
    }  # fmt: skip
    names = {"numpyro": "1", "jax": "2", "energy_difference": 0.1, "gradient_difference": 0.1}
    rates = {"captured, float32": 10.0, "NumPyro, float32": 4.9}
    numpyro = {"rows": 4, **names, "ways": rated(**rates)}
    rate = rated(**{"captured, TF32": 1e6, "eager, TF32": 9e5})
    found = {"gradients 8192": rate, "defence": stationary, "numpyro": numpyro}
    assert goals(**found) == ["met"] * 4
    text = gpu_tables(result(**found))
    assert "a card, driver 1, CUDA 2, cuDNN 3" in text
    assert "1,000,000 (captured, TF32, 8192 rows)" in text
    assert "(1,000 different ones, taken in turn)" in text
    assert "2.04 (float32)" in text
    assert "2.04 (captured, float32)" in text

    # The slower precision counts; a run that did not settle, or of fewer images, reaches nothing.
    # Where energies of both sides are in float32, this library's fastest forces count.
    numpyro["ways"] |= rated(**{"captured, TF32": 10.1, "NumPyro, TF32": 6.0})
    rate["captured, TF32"]["gradients_per_second"] = 999_999
    unsettled = found | {"defence": stationary | {"settled": False}}
    assert goals(**unsettled) == [*["not met"] * 3, "met"]
    assert "2.06 (captured, TF32)" in gpu_tables(result(**found))
    numpyro["ways"]["captured, TF32"]["why_not"] = "it fell back"
    assert "2.06 (captured, TF32; fell back)" in gpu_tables(result(**found))
    assert goals(defence=stationary | {"images": 9999})[1] == "not measured yet"
    stationary["ways"]["captured, float32"]["seconds"] = 10.0
    assert goals(**found)[1] == "not met"


def test_shares_are_of_the_rate_in_the_same_precision():
    card = {
        "rates": {
            "float32": {"per_second": 50e12}, "bfloat16": {"per_second": 800e12},
            "copy": {"per_second": 3e12},
        },
        "gradient": {
            "flops_per_row": 20e6, "flops_per_row_as_written": 30e6, "bytes_per_row": 1e6
        },
    }  # fmt: skip
    rates = rated(**{"captured, float32": 1e6, "captured, bfloat16": 2e6, "eager, float32": 5e5})
    rates["recorded, float32"] = {"error": "OutOfMemoryError: no"}
    text = gpu_tables(result(card=card, **{"gradients 512": rates}))
    assert "| 512 | 1,000,000 (40.0%) | failed | 500,000 (20.0%) |" in text
    assert "| 512 | 2,000,000 (5.0%) |  |  |" in text
    assert "| matrix product, float32 | 50 TFLOP/s | 2,500,000 |" in text
    assert "| copy | 3 TB/s | 3,000,000 |" in text
    assert "- gradients 512, recorded, float32: failed: OutOfMemoryError: no" in text


def test_published_results_are_of_a_gpu():
    for path in RESULTS.glob("*.json"):
        assert "device" in json.loads(path.read_text())["provenance"], path


@pytest.mark.slow
def test_torchebm_runs_the_same_chains(vae):
    pytest.importorskip("torchebm")
    config = GPUBenchmarkConfig(**TINY)
    found = libraries.torchebm(vae, torch.rand(3, 1, 28, 28), config, silent)
    theirs = found["ways"]["torchebm"]
    assert theirs["gradients_per_transition"] == 2 * config.num_steps
    assert theirs["energies_per_transition"] == 2
    gradients = found["rows"] * (1 + 2 * config.num_steps)
    assert theirs["gradients_per_second"] == pytest.approx(gradients / theirs["seconds"])


@pytest.mark.slow
def test_numpyro_runs_the_same_chains(vae):
    pytest.importorskip("numpyro")
    config = GPUBenchmarkConfig(**TINY)
    found = libraries.numpyro(vae, torch.rand(3, 1, 28, 28), config, silent)
    assert found["energy_difference"] < 1e-3
    for name in libraries.NUMPYRO:
        assert found["ways"][name]["gradients_per_second"] > 0
        assert found["ways"][name]["compile_seconds"] > 0


def test_an_energy_that_is_not_the_models_is_refused(vae):
    x, z = torch.rand(2, 1, 28, 28), torch.randn(2, 64)
    right = program.potential(vae, x)
    libraries._check_energy(vae, x, z, lambda z: right({"z": z}) + 3.0)
    with pytest.raises(ValueError, match="written for torchebm is off by"):
        libraries._check_energy(vae, x, z, lambda z: 1.01 * right({"z": z}))
