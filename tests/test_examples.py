"""Every example runs with tiny settings and answers mistakes in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TINY = ["--epochs", 1, "--num-references", 10, "--num-restarts", 1]
TINY += ["--num-chains", 2, "--num-samples", 4, "--warmup-steps", 2]


def run(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("kernel", ["hmc", "nuts", "pyro-hmc", "pyro-nuts"])
def test_mnist_svi(kernel, tmp_path):
    extra = ["--num-steps", 2] if kernel.endswith("hmc") else []
    small = ["--num-references", 2] if kernel.startswith("pyro") else []
    step = ["--step-size", 0.02] if kernel == "pyro-nuts" else []
    done = run(
        "mnist_svi.py", *TINY, *extra, *small, *step,
        "--kernel", kernel, "--radius", 0.1, "--output", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ms_ssim[paper], defended" in done.stdout
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"vae.pt", "results.json", "panel_0.1.png", "chains_0.1.png", "chains_0.1.nc"}
    entry = json.loads((tmp_path / "results.json").read_text())["radii"]["0.1"]
    for name in ("undefended", "defended", "noise_floor"):
        assert 0 <= entry[name]["low"] <= entry[name]["estimate"] <= entry[name]["high"] <= 1
    assert entry["gradients_per_image"] > 0


def test_finished_training_is_not_repeated(tmp_path):
    arguments = ("mnist_svi.py", *TINY, "--num-steps", 1, "--output", tmp_path, "--radius")
    first = run(*arguments, 0.1)
    again = run(*arguments, 0.2)
    assert first.returncode == again.returncode == 0, again.stderr
    trained = [next(s for s in r.stdout.splitlines() if "trained" in s) for r in (first, again)]
    assert trained[0] == trained[1]


def test_third_party_attacks():
    done = run("third_party_attacks.py", "--num-images", 4, "--steps", 2)
    assert done.returncode == 0, done.stderr
    for library in ("this library", "foolbox", "torchattacks", "art"):
        assert any(line.startswith(library) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--radius", "-0.1"], "must be a positive number, got -0.1"),
        (["--radius", "2"], "must be at most 1, the image range, got 2"),
        (["--epochs", "0"], "must be an integer of at least 1, got 0"),
        (["--kernel", "gibbs"], "invalid choice: 'gibbs'"),
        (["--dataset", "cifar"], "invalid choice: 'cifar'"),
        (["--device", "tpu:9"], "no device tpu:9"),
        (["--dataset", "mnist", "--data-root", "/nowhere"], "pass download=True"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    done = run("mnist_svi.py", "--output", tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_bring_your_own_vae():
    done = run("bring_your_own_vae.py", "--epochs", 1, "--num-images", 10)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("median R-hat") == 2


def test_defend_classifier():
    small = ("--num-images", 20, "--num-samples", 2, "--warmup-steps", 2)
    done = run("defend_classifier.py", *small)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("[" in line for line in lines) == 4
    assert "perturbation gain" in done.stdout
    assert lines[-1].endswith("gradients per image")
    wrong = run("defend_classifier.py", *small, "--radius", -1)
    assert wrong.returncode == 2
    assert "radius must be a positive finite number" in wrong.stderr.splitlines()[-1]
    assert "Traceback" not in wrong.stderr


def test_nvae_defence():
    done = run(
        "nvae_defence.py", "--untrained",
        "--num-images", 2, "--attack-steps", 2, "--warmup-steps", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "z_02: 4 maps of 8x8" in done.stdout
    assert "HMC, perturbation-aware" in done.stdout


def test_large_dataset():
    small = ("--num-images", 5, "--images-per-batch", 3)
    done = run("large_dataset.py", *small, "--max-gradients", 600)
    assert done.returncode == 0, done.stderr
    batches = [line.split() for line in done.stdout.splitlines()[1:3]]
    assert [int(batch[0]) for batch in batches] == [3, 2]
    assert all(0 < float(batch[2]) <= 600 for batch in batches)
    assert "5 images, 5 latents kept" in done.stdout
    poor = run("large_dataset.py", *small, "--max-gradients", 40)
    assert poor.returncode == 2
    assert "max_gradients=40 leaves no transition" in poor.stderr.splitlines()[-1]
