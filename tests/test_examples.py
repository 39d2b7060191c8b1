"""Every example runs with tiny settings and answers mistakes in one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import fewer_images
import pytest

from pyro_vae_defence import data

ROOT = Path(__file__).resolve().parents[1]

TINY = ["--epochs", 1, "--num-references", 2, "--num-restarts", 1]
TINY += ["--num-chains", 2, "--num-samples", 4, "--warmup-steps", 2]


def run_alone(script, *arguments):
    """A script in a process of its own, as a user starts it, with fewer images to train on."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, fewer_images.__file__, ROOT / "examples" / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )


def run(script, *arguments):
    """The same in this process, which has imported half of it already: what a shell would see."""
    command = [str(ROOT / "examples" / script), *map(str, arguments)]
    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        patch.setattr(sys, "argv", command)
        patch.syspath_prepend(ROOT / "examples")  # as Python does for a script
        patch.setattr(data, "load", fewer_images.fewer(data.load))
        warnings.simplefilter("default")  # a user's own filter
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as left:
            code = left.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The main example in a process of its own: its folder, and what it printed."""
    output = tmp_path_factory.mktemp("first")
    arguments = ("--num-steps", 2, "--kernel", "hmc", "--radius", 0.1, "--output", output)
    return output, run_alone("mnist_svi.py", *TINY, *arguments)


def check(done, output, delta="0.1"):
    assert done.returncode == 0, done.stderr
    files = {path.name for path in output.iterdir()}
    assert files == {"vae.pt", "results.json", "panel_0.1.png", "chains_0.1.png", "chains_0.1.nc"}
    entry = json.loads((output / "results.json").read_text())["radii"]["0.1"]
    clipping = f"control: dark-pixel clipping, δ = {delta}"
    names = ["undefended", clipping, "HMC, the paper's target", f"recommended, δ = {delta}"]
    assert list(entry["defences"]) == names
    for name, found in entry["defences"].items():
        assert any(line.startswith(name) for line in done.stdout.splitlines())
        assert (found["gradients_per_image"] > 0) == (name in names[2:])
    similarities = [found["similarity"] for found in entry["defences"].values()]
    for found in (*similarities, entry["noise_floor"]):
        assert 0 <= found["low"] <= found["estimate"] <= found["high"] <= 1
    assert "noise floor" in done.stdout


def test_mnist_svi(first):
    output, done = first
    check(done, output)


@pytest.mark.parametrize(
    "kernel",
    ["pyro-hmc", *(pytest.param(k, marks=pytest.mark.slow) for k in ("nuts", "pyro-nuts"))],
)
def test_mnist_svi_with_other_kernels(kernel, first, tmp_path):
    shutil.copy(first[0] / "vae.pt", tmp_path)
    extra = ["--num-steps", 2] if kernel.endswith("hmc") else []
    # Larger steps, smaller trees.
    step = ["--step-size", 0.02 if kernel == "pyro-nuts" else 2.5] if "nuts" in kernel else []
    done = run(
        "mnist_svi.py", *TINY, *extra, *step,
        "--kernel", kernel, "--radius", 0.1, "--delta", 0.2, "--output", tmp_path,
    )  # fmt: skip
    check(done, tmp_path, delta="0.2")
    # Finished training is not repeated: the checkpoint would tell another time.
    assert (tmp_path / "vae.pt").read_bytes() == (first[0] / "vae.pt").read_bytes()
    printed = (first[1].stdout, done.stdout)
    trained = [next(s for s in text.splitlines() if "trained" in s) for text in printed]
    assert trained[0] == trained[1]


def test_third_party_attacks():
    done = run("third_party_attacks.py", "--num-images", 4, "--steps", 2)
    assert done.returncode == 0, done.stderr
    for library in ("this library", "foolbox", "torchattacks", "art"):
        assert any(line.startswith(library) for line in done.stdout.splitlines())


NOWHERE = "error: mnist: no file /nowhere/MNIST"
MISTAKES = {
    "mnist_svi.py": [
        (["--radius", -0.1], "must be a positive number of at most 1, the image range, got -0.1"),
        (["--radius", 2], "at most 1, the image range, got 2"),
        (["--delta", 0], "at most 1, the image range, got 0"),
        (["--beta", "nan"], "must be a positive number, got nan"),
        (["--epochs", 0], "must be an integer of at least 1, got 0"),
        (["--warmup-steps", -1], "must be an integer of at least 0, got -1"),
        (["--num-chains", 1.5], "must be an integer of at least 1, got 1.5"),
        (["--seed", -1], "must be an integer from 0 to 2**32 - 1, got -1"),
        (["--kernel", "gibbs"], "invalid choice: 'gibbs'"),
        (["--kernel", "nuts", "--num-steps", 3], "--num-steps has no effect on --kernel nuts"),
        (["--dataset", "cifar"], "invalid choice: 'cifar'"),
        (["--device", "tpu:9"], "no device tpu:9"),
        (["--device", "meta"], "no device meta"),
        (["--num-references", 1001], "error: num=1001 needs 101 images of class 0"),
        (["--dataset", "mnist", "--data-root", "/nowhere"], NOWHERE),
        (["--output", "FILE"], "error: [Errno 17] File exists"),
        (["--checkpoint", "FILE"], "error: checkpoint FILE cannot be read"),
        (["--checkpoint", "DIRECTORY"], "DIRECTORY is a directory"),
    ],
    "bring_your_own_vae.py": [
        (["--epochs", "few"], "must be an integer of at least 1, got few"),
        (["--num-images", 1001], "error: num=1001 needs 101 images of class 0"),
    ],
    "conditional_vae.py": [
        (["--radius", "inf"], "at most 1, the image range, got inf"),
        (["--num-samples", 0], "must be an integer of at least 1, got 0"),
        (["--output", "FILE"], "error: checkpoint FILE/vae.pt cannot be written"),
        (["--output", "/proc/new"], "error: checkpoint /proc/new/vae.pt cannot be written"),
    ],
    "defend_classifier.py": [
        (["--radius", -1], "at most 1, the image range, got -1"),
        (["--num-images", 1001], "error: num=1001 needs 101 images of class 0"),
        (["more"], "unrecognized arguments: more"),
    ],
    "large_dataset.py": [
        (["--max-gradients", 40], "error: max_gradients=40 leaves no transition"),
        (["--images-per-batch", 0], "must be an integer of at least 1, got 0"),
        (["--dataset", "none"], "error: name must be one of mnist"),
        (["--dataset", "mnist", "--data-root", "/nowhere"], NOWHERE),
    ],
    "nvae_defence.py": [
        (["--checkpoint", "/nowhere"], "error: /nowhere: no such file"),
        (["--checkpoint", "FILE"], "error: FILE cannot be read as an official checkpoint"),
        (["--models", "DIRECTORY"], "error: no pretrained model named 'mnist_nvae'"),
        (["--untrained", "--groups", 9], "error: sites=9, but the guide has 3 latent sites"),
    ],
    "third_party_attacks.py": [
        (["--steps", 0], "must be an integer of at least 1, got 0"),
        (["--num-images", 1001], "error: num=1001 needs 101 images of class 0"),
    ],
}
SCRIPTS = {path.name for path in (ROOT / "examples").glob("*.py")} - {"command_line.py"}


def test_every_example_has_mistakes_and_a_seed():
    assert set(MISTAKES) == SCRIPTS
    for script in SCRIPTS:
        shown = run(script, "--help")
        assert shown.returncode == 0
        assert "--seed SEED" in shown.stdout
        assert "pyro.set_rng_seed(options.seed)" in (ROOT / "examples" / script).read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [(script, *case) for script, cases in MISTAKES.items() for case in cases],
)
def test_mistakes_are_one_line(script, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"FILE": tmp_path / "file", "DIRECTORY": tmp_path / "directory"}
    places["FILE"].write_text("nothing that anyone could read")
    places["DIRECTORY"].mkdir()
    done = run(script, *(places.get(each, each) for each in arguments))
    for name, place in places.items():
        message = message.replace(name, str(place))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert set(tmp_path.rglob("*")) <= {
        *places.values(),
        tmp_path / "runs",
        tmp_path / "runs/mnist_svi",
    }


def test_an_interruption_is_one_line(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import command_line

    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        command_line.call(main)
    assert left.value.code == 130
    assert capsys.readouterr().err.strip().startswith("interrupted; what was finished")


def test_a_seed_says_what_comes_out():
    """ART draws from NumPy, everything else from PyTorch."""
    small = ("--num-images", 4, "--steps", 2)
    seeds = (1, 1, 2)
    one, again, other = (run("third_party_attacks.py", *small, "--seed", n).stdout for n in seeds)
    assert one == again != other


def test_bring_your_own_vae():
    small = ("--epochs", 1, "--num-images", 10, "--num-samples", 4, "--warmup-steps", 4)
    done = run("bring_your_own_vae.py", *small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("median R-hat") == 2


def test_defend_classifier():
    small = ("--num-images", 10, "--num-samples", 2, "--warmup-steps", 2)
    done = run("defend_classifier.py", *small)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("[" in line for line in lines[:6]) == 4
    assert sum(line.endswith("raise the alarm") for line in lines) == 3
    assert "perturbation_gain" in lines[-6] + lines[-7]


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


def test_conditional_vae(tmp_path):
    small = ("--epochs", 1, "--num-images", 10, "--num-samples", 2, "--warmup-steps", 2)
    done = run("conditional_vae.py", *small, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    similarity = {name: entry for name, entry in results.items() if name.startswith("similarity")}
    assert len(similarity) == 3
    for entry in similarity.values():
        assert all(0 < entry[kind]["estimate"] <= 1 for kind in ("clean", "attacked"))
    nll = results["-log p(x | y), nats"]
    assert nll["attacked"]["low"] > nll["clean"]["high"]
