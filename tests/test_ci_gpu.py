"""``.ci/gpu``: which parts run, what becomes of them, and what the exit code says."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import shared_path

from pyro_vae_defence.experiments.paper.items import ITEMS

ROOT = Path(__file__).resolve().parents[1]

# In the place of Python: notes its arguments, and fails or hangs where it is told to.
STUB = f"""#!/usr/bin/env bash
case "$*" in
    "-m zipfile"*) exec {sys.executable} "$@" ;;
    -) cat > "$CALLS.environment"; exit ;;
    "-c "*) shift 3; for name in "$@"; do [ "$name" = "$WHOLE" ] || echo "$name"; done; exit ;;
    "-m pytest"*) part=tests ;;
    *"benchmark gpu"*) part=benchmark ;;
    *"experiments published"*) part=published ;;
    *"experiments train"*) part=training ;;
    *"experiments bound"*) part=bound ;;
    *) part=evaluation ;;
esac
echo "$part $PYTHONPATH $*" >> "$CALLS"
echo "output of $part"
[ "$LEAVES" != "$part" ] || echo "x: 3 cells are left; run the same again to go on"
[ -z "$IMPORTS" ] || {sys.executable} -c "import $IMPORTS" || exit 5
case " $* " in *" ${{KILLED:-nothing}} "*) exit 137 ;; esac
[ "$FAILS" != "$part" ] || exit 3
[ "$HANGS" != "$part" ] || sleep 60
"""


@pytest.fixture
def ci(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    calls = tmp_path / "calls"

    def run(*arguments, fails="", hangs="", leaves="", imports="", **settings):
        calls.write_text("")
        environment = {
            **os.environ, "PYTHON": str(stub), "OUT": str(tmp_path / "out"), "FAILS": fails,
            "HANGS": hangs, "LEAVES": leaves, "IMPORTS": imports, "CALLS": str(calls),
            "WHEELS": str(tmp_path / "wheels"), "EVALUATION_NAMES": "mnist_large_0.1", **settings,
        }  # fmt: skip
        script = str(ROOT / ".ci" / "gpu")
        done = subprocess.run([script, *arguments], env=environment, capture_output=True, text=True)
        status = tmp_path / "out" / "status.txt"
        found = status.read_text().splitlines() if status.exists() else []
        return done.returncode, calls.read_text().splitlines(), found

    return run


def test_parts_run_in_order_and_leave_logs(ci, tmp_path):
    code, calls, status = ci()
    assert code == 0
    assert [line.split()[0] for line in calls] == ["tests", "benchmark", "evaluation"]
    assert [line.split(",")[0] for line in status] == [
        "tests: ok", "benchmark: ok", "evaluation: ok",
    ]  # fmt: skip
    assert "output of benchmark" in (tmp_path / "out" / "benchmark.log").read_text()
    assert (tmp_path / "out" / "environment.txt").exists()
    assert all("--device cuda" in line for line in calls[1:])


def test_evaluations_follow_each_other_until_their_time_is_up(ci):
    names = "mnist_published_0.1 fashion_mnist_large_0.2"
    _, calls, _ = ci("evaluation", EVALUATION_NAMES=names, EVALUATION_LIMIT="100")
    assert [line.split(" robustness ")[1].split()[0] for line in calls] == names.split()
    assert [line.split("--set dataset=")[1].split()[0] for line in calls] == [
        "mnist_subset",
        "fashion_mnist_subset",
    ]
    assert all(80 <= int(line.split("--time-limit ")[1].split()[0]) <= 85 for line in calls)
    assert ci("evaluation", EVALUATION_NAMES=names, EVALUATION_LIMIT="0")[1] == []


def test_published_results_are_gone_on_from(ci, tmp_path):
    out = tmp_path / "out" / "published"
    out.mkdir(parents=True)
    (out / "mnist_vae.json").write_text("of an earlier run")
    _, calls, _ = ci("published", WHOLE="mnist_vae")
    assert (out / "mnist_vae.json").read_text() == "of an earlier run"
    results = ROOT / "docs" / "results" / "published" / "fashion_mnist_vae.json"
    assert (out / "fashion_mnist_vae.json").read_bytes() == results.read_bytes()
    assert calls[0].split(" published ")[1].split()[0] == "fashion_mnist_vae"  # the other is whole
    datasets = {line.split("--set dataset=")[1].split()[0] for line in calls}
    assert datasets == {"mnist_subset", "fashion_mnist_subset", "color_mnist_subset"}
    names = {line.split(" published ")[1].split()[0] for line in calls}
    needed = {name for item in ITEMS.values() if item.study == "published" for name in item.names}
    assert names == {name for name in needed if not name.endswith("_radii")} - {"mnist_vae"}


def test_trainings_unpack_their_images_and_pass_over_what_is_there(ci, tmp_path):
    models = tmp_path / "out" / "models"
    models.mkdir(parents=True)
    (models / "mnist_vae_longer.json").touch()
    names = "mnist_vae_longer mnist_vae_long fashion_mnist_vae_longer"  # the second is in docs
    raw = tmp_path / "some where" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    with gzip.open(raw / "images.gz", "wb") as file:
        file.write(b"pixels")
    settings = {"TRAINING_NAMES": names, "DATA_ROOT": str(tmp_path / "some where")}
    code, calls, _ = ci("training", **settings)
    assert code == 0
    assert (raw / "images").read_bytes() == b"pixels"
    assert (raw / "images.gz").exists()
    (call,) = calls
    root = settings["DATA_ROOT"]
    assert f"train fashion_mnist_vae_longer --quiet --device cuda --data-root {root} " in call
    assert "dataset" not in call
    _, calls, _ = ci("--cpu", "training", **settings | {"TRAINING_NAMES": "color_mnist_vae_longer"})
    assert "--set dataset=color_mnist_subset" in calls[0]


def test_one_that_fails_does_not_keep_others_from_running(ci):
    names = "mnist_published_0.1 mnist_large_0.1"
    code, calls, status = ci("evaluation", fails="evaluation", EVALUATION_NAMES=names)
    assert code == 4
    assert len(calls) == 2
    assert status[0].startswith("evaluation: failed with 3")
    # Nor is it hidden by another that had to be killed after its time.
    settings = {"EVALUATION_NAMES": names, "KILLED": "mnist_large_0.1"}
    code, _, status = ci("evaluation", fails="evaluation", **settings)
    assert code == 4
    assert status[-1].startswith("evaluation: failed with 3")
    assert ci("evaluation", **settings)[0] == 8


def test_a_rehearsal_leaves_nothing_that_passes_for_a_result(ci, tmp_path):
    code, calls, status = ci("--cpu", "published", "training", PUBLISHED_NAMES="mnist_vae")
    assert code == 0
    assert calls
    assert all(f"--output {tmp_path}/out/rehearsal/" in line for line in calls)
    assert not status
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rehearsal"]


def test_parts_are_chosen_and_rehearsed_on_the_cpu(ci):
    code, calls, _ = ci("--cpu", "evaluation", EVALUATION_ARGS="--set seed=3")
    assert code == 0
    assert len(calls) == 1
    assert "--device cpu" in calls[0]
    assert calls[0].endswith("--set seed=3")


@pytest.mark.parametrize(
    ("part", "bit"),
    [
        ("tests", 1),
        ("benchmark", 2),
        ("evaluation", 4),
        ("published", 16),
        ("training", 32),
        ("bound", 64),
    ],
)
def test_a_failed_part_is_named_and_the_others_run(ci, part, bit):
    one = {"PUBLISHED_NAMES": "mnist_vae", "TRAINING_NAMES": "fashion_mnist_vae_longer"}
    one["BOUND_NAMES"] = "mnist_validation"
    parts = ("tests", "benchmark", "evaluation", "published", "training", "bound")
    code, calls, status = ci(*parts, fails=part, **one)
    assert code == bit
    assert len(calls) == 6
    assert sum("failed with 3" in line for line in status) == 1
    assert next(line for line in status if line.startswith(part)).startswith(f"{part}: failed")


def test_out_of_time_is_no_failure_of_the_code(ci):
    code, calls, status = ci("benchmark", "evaluation", hangs="benchmark", BENCHMARK_LIMIT="1")
    assert code == 8
    assert len(calls) == 2
    assert status[0].startswith("benchmark: out of time")
    assert status[1].startswith("evaluation: ok")


def test_a_study_that_ends_with_cells_left_is_out_of_time(ci):
    code, _, status = ci("evaluation", "bound", leaves="evaluation")
    assert code == 8
    assert status[0].startswith("evaluation: out of time")
    assert status[1].startswith("bound: ok")
    # The next run of the same part is judged by what it says itself; a name without a turn counts.
    code, _, status = ci("evaluation")
    assert code == 0
    assert status[-1].startswith("evaluation: ok")
    code, calls, status = ci("evaluation", EVALUATION_LIMIT="0")
    assert (code, calls) == (8, [])
    assert status[-1].startswith("evaluation: out of time")


def test_wheels_are_importable(ci, tmp_path):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing.py", "")
    code, calls, _ = ci("tests", imports="thing")
    assert code == 0
    repository, site = calls[0].split()[1].split(":")[:2]
    assert repository == str(ROOT)
    assert not Path(site).exists()  # cleaned up


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "result"),
    [
        ("tests", "tests.log"),
        ("benchmark", "benchmark/gpu.json"),
        ("evaluation", "evaluation/mnist_large_0.1.json"),
        ("published", "published/mnist_vae.json"),
        ("training", "models/mnist_vae_longer.safetensors"),
        ("bound", "bound/mnist_validation.json"),
    ],
)
def test_every_part_runs_without_a_gpu(part, result, tmp_path, monkeypatch):
    if part == "evaluation":
        monkeypatch.setenv("PYRO_VAE_DEFENCE_DATA", str(shared_path("data", "MNIST").parent))
    environment = {
        **os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "TEST_PROCESSES": "0",
        "TESTS_ARGS": "-k streams", "TESTS_LIMIT": "900", "BENCHMARK_LIMIT": "900",
        "EVALUATION_LIMIT": "900", "PUBLISHED_LIMIT": "900", "TRAINING_LIMIT": "900",
        "PUBLISHED_NAMES": "mnist_vae", "TRAINING_NAMES": "mnist_vae_longer",
        "BOUND_LIMIT": "900", "BOUND_NAMES": "mnist_validation",
    }  # fmt: skip
    done = subprocess.run([str(ROOT / ".ci" / "gpu"), "--cpu", part], env=environment)
    assert done.returncode == 0
    out = tmp_path / "rehearsal"
    assert (out / "status.txt").read_text().startswith(f"{part}: ok")
    assert (out / result).exists()
    assert "torch" in (out / "environment.txt").read_text()
    if part in ("published", "training"):  # what is whole is not begun again
        log = (out / f"{part}.log").read_bytes()
        subprocess.run([str(ROOT / ".ci" / "gpu"), "--cpu", part], env=environment, check=True)
        assert (out / f"{part}.log").read_bytes() == log


def test_an_unknown_part_is_refused(ci):
    code, calls, _ = ci("trials")
    assert code == 64
    assert not calls
