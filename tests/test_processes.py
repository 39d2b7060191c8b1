"""Studies and stores of results by processes of torchrun, and when these are killed.

Run as a script, this file is what the processes execute.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from programs import TutorialVAE
from studies import save_model, small_nvae
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.attack import Attack
from pyro_vae_defence.experiments.compare import Compare
from pyro_vae_defence.experiments.configuration import Configuration
from pyro_vae_defence.experiments.defend import Defend
from pyro_vae_defence.experiments.evaluate import Evaluate
from pyro_vae_defence.experiments.figures import Figures
from pyro_vae_defence.experiments.hierarchy import DefendHierarchy
from pyro_vae_defence.experiments.published import Published
from pyro_vae_defence.experiments.study import Measurement, load, save
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.classifier import LinearClassifier
from pyro_vae_defence.models.pretrained import load_card
from pyro_vae_defence.ops import ranks
from pyro_vae_defence.ops.locks import sole_writer
from pyro_vae_defence.ops.ranks import Claims

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--nnodes=1", "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0")  # fmt: skip


def launch(*command, processes=2, restarts=0, torchrun=TORCHRUN):
    """Run this file, or a module with ``-m``, in processes of torchrun."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    options = (f"--nproc-per-node={processes}", f"--max-restarts={restarts}") if torchrun else ()
    return subprocess.run(
        [sys.executable, *torchrun, *options, *map(str, command)],
        env=environment, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip


def take_part_forked(*arguments):
    """What torchrun does after reading its options, but that processes need not import again."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="forked", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, take_part)(*arguments)


def restarts():
    """How often torchrun has started these processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


# --- What the processes do ------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyConfig(Configuration):
    """A toy.

    Args:
        seed: of everything.
    """

    seed: int = 0


class Toy(Measurement[ToyConfig]):
    """Seven cells, of which some processes die or fail."""

    kind = command = "toy"
    names = {"plain": ToyConfig()}
    output = "runs/toy"
    parts = ("radii",)
    timed = True
    dies: str | None = None  # in which cell a process is killed
    fails: str | None = None

    def load(self):
        self.weights["w"] = "hash"
        self.computed = []

    def cells(self):
        yield ("floor",), lambda: self.compute("floor")
        for radius in ("0", "0.1"):
            for name in ("none", "hmc", "aware/0.2"):
                key = ("radii", radius, name)
                yield key, functools.partial(self.compute, "/".join(key))

    def compute(self, name):
        if self.dies == name and restarts() < 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fails == name:
            raise ValueError("no such thing")
        self.computed.append(name)
        number = float(torch.rand((), generator=self.generator(name)))
        return {"number": number, "seconds": 0.1 * (1 + ranks.rank())}

    @classmethod
    def section(cls, result, figures):
        return f"# {result['name']}\n"


def toy(output):
    return Toy("plain", output, progress=False)


class Noise:
    """Images made when they are asked for, however many."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(index))


def defend(path, length=20, chunk_size=3, dies=None):
    """Defend noise; a process is killed at the chunk that begins with image ``dies``."""
    torch.manual_seed(0)
    kernel = functools.partial(BatchedHMC, num_steps=1)
    defence = MCMCDefence(TutorialVAE().eval(), kernel, num_samples=2, warmup_steps=1)
    if dies is not None:
        before = defence._defend

        def killed(vae, x, seed, first_image, *more):
            if first_image == dies and restarts() < 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return before(vae, x, seed, first_image, *more)

        defence._defend = killed
    generator = torch.Generator().manual_seed(7)
    return defence.to_zarr(Noise(length), path, generator=generator, chunk_size=chunk_size)


def take_part(folder, *what):
    """A process of its own: a study, a store, or what memory a store takes."""
    if "killed" in what:
        Toy.dies = "radii/0.1/hmc"
    if "failing" in what:
        Toy.fails = "radii/0.1/hmc"
    if "absent" in what:
        ranks._PATIENCE, ranks._BEAT = 3.0, 0.5
        if ranks.rank() == 1:
            return
    if "study" in what:
        study = toy(folder)
        study.run()
        save(folder / f"computed{ranks.rank()}", {"computed": study.computed})
    if "store" in what:
        defend(folder / "store", dies=15 if "killed" in what else None)
    if "memory" in what:
        defend(folder / "store", int(what[-1]), 500)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
        save(folder / f"memory{ranks.rank()}", {"peak": peak})


# --- Studies --------------------------------------------------------------------------------------


def without_times(text):
    """A result file but for what is measured in seconds."""
    return re.sub(r'"(\w*_)?seconds(_\w*)?": [0-9.e-]+', "seconds", text)


@pytest.fixture
def expected(tmp_path):
    """What one process writes."""
    toy(tmp_path / "one").run()
    return without_times((tmp_path / "one" / "plain.json").read_text())


class Pretended(Claims):
    """One of several processes that run one after the other in this one."""

    taken: set = set()
    number, all = 0, 1

    def __init__(self, name):
        self.rank, self.size = self.number, self.all

    def claim(self, item):
        new = item not in self.taken
        self.taken.add(item)
        return new

    def leave(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def agree(self, what):
        pass

    def waiting(self, until=None):
        return iter(())


@pytest.fixture
def pretend(monkeypatch):
    """Let this process be one of many."""
    monkeypatch.setattr("pyro_vae_defence.experiments.study.Claims", Pretended)

    def be(number, count, *claimed):
        monkeypatch.setattr(Pretended, "number", number)
        monkeypatch.setattr(Pretended, "all", count)
        monkeypatch.setattr(Pretended, "taken", set(claimed))

    be(0, 1)
    return be


CHAIN = {"chain.num_samples": 1, "chain.warmup_steps": 1, "chain.num_steps": 1}
FEW = {"num_references": 3, "num_restarts": 2}
SMALL = {
    Attack: ("mnist_vae", {**CHAIN, **FEW, "radii": (0.1,), "num_images": 10, "attack_steps": 2}),
    Compare: (
        "mnist",
        {
            **CHAIN, **FEW, "radii": (0.0, 0.1), "full_radii": (0.1,), "num_images": 10,
            "num_noise": 10, "curve_images": 10, "cost_radius": 0.1, "costs": ("hmc@2",),
            "defences": ("none", "aware", "aware_0.1", "aware_unknown", "mode"),
        },
    ),
    Defend: ("mnist_radius_0.1", {**CHAIN, **FEW, "defences": ("none", "hmc", "mode")}),
    DefendHierarchy: (
        "mnist_nvae_radius_0.1",
        {**CHAIN, **FEW, "dataset": "mnist_subset", "groups": (1, 3), "attack_steps": 2,
         "metric_images": 6, "batch_size": 3, "num_examples": 2},
    ),
    Evaluate: ("mnist_vae", {"num_images": 10, "num_samples": 3, "ais_images": 2, "ais_steps": 3}),
    Figures: (
        "mnist",
        {**CHAIN, "radii": (0.1, 1.0), "objective_radii": (0.2,), "attack_chains": 2,
         "attack_steps": 2, "num_images": 3, "num_examples": 1},
    ),
    Published: (
        "mnist_vae",
        {**FEW, "paper": "celeba_nvae", "radii": (0.1,), "attack_steps": 2, "num_transitions": 2,
         "transitions": (0,), "num_examples": 1},
    ),
}  # fmt: skip


def save_models(directory, seed=0):
    """Untrained ones, as if they had been trained on the packaged images."""
    torch.manual_seed(seed)
    variance = {"z": torch.rand(64) + 0.1}
    save_model(ConvVAE(), "mnist_vae", directory, mean_posterior_variance=variance)
    save_model(LinearClassifier(64, 10), "mnist_vae_classifier", directory)
    save_model(small_nvae(), "mnist_nvae", directory)


class TestStudies:
    def test_torchrun_makes_what_one_process_makes(self, tmp_path, expected):
        """A study and a store, each in two processes."""
        pytest.importorskip("zarr")
        from test_defence_store import assert_same

        done = launch(__file__, tmp_path, "study", "store", "forked", torchrun=())
        assert done.returncode == 0, done.stderr[-4000:]
        assert without_times((tmp_path / "plain.json").read_text()) == expected
        assert not (tmp_path / "plain.cells").exists()
        shares = [json.loads((tmp_path / f"computed{r}").read_text())["computed"] for r in (0, 1)]
        assert len(shares[0] + shares[1]) == 7
        assert len({*shares[0], *shares[1]}) == 7
        assert_same(tmp_path / "store", defend(tmp_path / "one" / "store"))

    @pytest.mark.parametrize("count", [2, 3, 10])
    def test_any_number_of_processes(self, tmp_path, expected, pretend, count):
        shares = {number: set(range(number, 7, count)) for number in range(count)}
        for number in reversed(range(count)):
            pretend(number, count, *(set(range(7)) - shares[number]))
            toy(tmp_path).run()
        assert without_times((tmp_path / "plain.json").read_text()) == expected
        result = json.loads((tmp_path / "plain.json").read_text())
        assert result["seconds"] < 1  # the sum over cells

    def test_cells_that_a_killed_launch_has_left_are_taken_up(self, tmp_path, expected, pretend):
        """By one process, or another number of them; what both had is counted once."""
        pretend(2, 3, 0, 1, 5)
        toy(tmp_path).run()
        assert not (tmp_path / "plain.json").exists()
        assert len(list((tmp_path / "plain.cells").iterdir())) == 4
        pretend(0, 1)
        study = toy(tmp_path)
        study.run()
        assert study.computed == ["floor", "radii/0/none", "radii/0.1/hmc"]
        assert without_times((tmp_path / "plain.json").read_text()) == expected
        assert not (tmp_path / "plain.cells").exists()
        study = toy(tmp_path)
        study.run()
        assert study.computed == []

    def test_a_result_file_that_one_process_has_left_is_taken_up(self, tmp_path, expected, pretend):
        study = toy(tmp_path)
        study.fails = "radii/0/hmc"
        with pytest.raises(ValueError, match="^no such thing$"):
            study.run()
        pretend(1, 2, 4, 5)
        toy(tmp_path).run()
        pretend(0, 2, 3, 6)
        study = toy(tmp_path)
        study.run()
        assert study.computed == ["radii/0.1/none", "radii/0.1/hmc"]
        assert without_times((tmp_path / "plain.json").read_text()) == expected

    def test_cells_of_another_run_are_refused(self, tmp_path, pretend):
        pretend(1, 2, 0)
        toy(tmp_path).run()
        with pytest.raises(ValueError, match=r"00001\.json belongs to another run \(its config"):
            Toy("plain", tmp_path, progress=False, overrides={"seed": 1}).run()

    def test_where_cells_come_from_is_known(self, tmp_path, pretend, monkeypatch):
        pretend(1, 2, 0, 1, 2)
        monkeypatch.setattr(Toy, "provenance", {"commit": "before"})
        toy(tmp_path).run()
        monkeypatch.undo()
        result = toy(tmp_path).run()
        made = ["radii/0/aware/0.2", "radii/0.1/none", "radii/0.1/hmc", "radii/0.1/aware/0.2"]
        assert result["earlier"] == [{"commit": "before", "cells": made}]
        assert "torch" in result["provenance"]

    def test_a_cell_that_fails_is_named(self, tmp_path, pretend):
        pretend(1, 2)
        study = toy(tmp_path)
        study.fails = "radii/0.1/hmc"
        with pytest.raises(ValueError, match=r"^process 1, cell radii/0\.1/hmc: no such thing$"):
            study.run()
        assert len(list((tmp_path / "plain.cells").iterdir())) == 2

    def test_output_that_machines_do_not_share_is_noticed(self, tmp_path, pretend, monkeypatch):
        monkeypatch.setattr("pyro_vae_defence.experiments.study._PATIENCE", 0)
        pretend(0, 2, 3)
        with pytest.raises(
            ValueError, match=r"cells radii/0/aware/0.2 were computed, but are not in .*cells"
        ):
            toy(tmp_path).run()

    def test_cells_for_which_time_did_not_suffice_are_left(self, tmp_path, expected, pretend):
        pretend(1, 2, 0, 1, 2)
        toy(tmp_path).run()
        pretend(0, 2, 3, 4, 5, 6)
        late = Toy("plain", tmp_path, progress=False, time_limit=1e-9)
        late.run()
        assert (late.computed, late.remaining) == ([], 3)
        assert not (tmp_path / "plain.json").exists()
        pretend(0, 2)
        study = toy(tmp_path)
        study.run()
        assert (len(study.computed), study.remaining) == (3, 0)
        assert without_times((tmp_path / "plain.json").read_text()) == expected

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", list(SMALL))
    def test_every_study_is_that_of_one_process(self, kind, tmp_path, pretend):
        """Each process has every second cell, so that none finds what another has computed."""
        name, settings = SMALL[kind]
        models = tmp_path / "models"
        save_models(models)

        def run(output):
            study = kind(name, output, models=models, overrides=settings, progress=False)
            study.run()
            return study

        count = len(list(run(tmp_path / "one").cells()))
        assert count > 2
        pretend(1, 2, *range(0, count, 2))
        run(tmp_path / "two")
        pretend(0, 2, *range(1, count, 2))
        path = run(tmp_path / "two").path
        one = (tmp_path / "one" / path.name).read_text()
        assert without_times(path.read_text()) == without_times(one)

    @pytest.mark.slow
    def test_a_killed_process_loses_the_cell_it_was_at(self, tmp_path, expected):
        done = launch(__file__, tmp_path, "study", "killed")
        assert done.returncode != 0
        assert not (tmp_path / "plain.json").exists()
        left = {"/".join(load(path)["key"]) for path in (tmp_path / "plain.cells").iterdir()}
        assert left
        assert "radii/0.1/hmc" not in left
        done = launch(__file__, tmp_path, "study", processes=3)
        assert done.returncode == 0, done.stderr[-4000:]
        assert without_times((tmp_path / "plain.json").read_text()) == expected

    @pytest.mark.slow
    def test_nobody_waits_for_a_process_that_stays_away(self, tmp_path):
        done = launch(__file__, tmp_path, "study", "absent")
        assert done.returncode != 0
        assert "process 1 does not take part for 3 seconds" in done.stderr

    @pytest.mark.slow
    def test_a_launch_does_not_meet_another_of_the_same_result(self, tmp_path):
        with sole_writer(tmp_path / "plain.json"):
            done = launch(__file__, tmp_path, "study")
        assert done.returncode != 0
        assert "plain.json is being written by process" in done.stderr
        assert not (tmp_path / "plain.json").exists()

    @pytest.mark.slow
    def test_a_process_that_fails_ends_all(self, tmp_path):
        done = launch(__file__, tmp_path, "study", "failing")
        assert done.returncode != 0
        assert re.search(r"process [01], cell radii/0\.1/hmc: no such thing", done.stderr)
        assert list((tmp_path / "plain.cells").iterdir())


class TestWaiting:
    """Two processes of one launch, both in this one."""

    @pytest.fixture
    def both(self, monkeypatch):
        store = torch.distributed.HashStore()
        monkeypatch.setattr(ranks, "_store", lambda: store)
        monkeypatch.setattr(ranks, "world_size", lambda: 2)
        monkeypatch.setattr(ranks, "_POLL", 0.0)
        monkeypatch.setattr(ranks, "_BEAT", 0.01)
        monkeypatch.setattr(ranks, "_PATIENCE", 0.2)
        found = []
        for rank in range(2):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(Claims, "_made", Counter())
            found.append(Claims("work"))
        return found

    def wait(self, claims, until=None):
        start = time.monotonic()
        for _ in claims.waiting(until):
            assert time.monotonic() - start < 30

    def test_a_process_at_work_is_waited_for(self, both):
        first, second = both
        with first, second:
            start = time.monotonic()
            for _ in first.waiting():
                if time.monotonic() - start > 0.6:  # three times the patience
                    second.leave()
                    first.leave()

    def test_a_process_that_stays_away_is_named(self, both):
        first, second = both
        with first, pytest.raises(RuntimeError, match="process 1 does not take part for 0.2 sec"):
            self.wait(first)
        second.__enter__()
        second._ended.set()  # as if it had been stopped
        with pytest.raises(RuntimeError, match="process 1 gives no sign of life any more"):
            self.wait(first)

    def test_a_process_that_failed_is_named_at_once(self, both, monkeypatch):
        monkeypatch.setattr(ranks, "_PATIENCE", 1e9)
        first, second = both
        with pytest.raises(KeyError), second:
            raise KeyError
        with pytest.raises(RuntimeError, match="process 1 has failed"):
            self.wait(first)

    def test_what_an_ended_process_has_made_must_be_seen(self, both):
        first, second = both
        with second:
            second.leave()
        with pytest.raises(RuntimeError, match="process 1 has ended, and what it has made is not"):
            self.wait(first, lambda: False)
        first.leave()
        self.wait(first)

    def test_processes_at_different_work_are_told(self, both):
        first, second = both
        first.agree("seven cells")
        first.agree("seven cells")
        with pytest.raises(ValueError, match="process 1 .*: six cells instead of seven cells"):
            second.agree("six cells")


class TestCommandLine:
    @pytest.mark.parametrize(
        "words", [["train", "mnist_vae"], ["models"], ["benchmark", "attacks"]]
    )
    def test_work_for_one_process_is_refused_in_one_line(self, words, monkeypatch, capsys):
        monkeypatch.setattr(ranks, "world_size", lambda: 2)
        for rank, code in ((0, 2), (1, 0)):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            assert main(words) == code
            printed = capsys.readouterr()
            assert printed.out == ""
            refused = f"error: {words[0]} is work for one process; start it without torchrun\n"
            assert printed.err == (refused if rank == 0 else "")

    def test_a_process_without_a_gpu_is_told(self, monkeypatch):
        monkeypatch.setattr(ranks, "world_size", lambda: 3)
        monkeypatch.setenv("LOCAL_RANK", "2")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(ValueError, match="process 2 .* --nproc-per-node=2"):
            ranks.take_gpu()

    @pytest.mark.slow
    def test_a_study_of_the_package(self, tmp_path):
        """``evaluate``, two of whose cells need the same values."""
        texts = []
        vae = ConvVAE()
        for folder in (tmp_path / "one", tmp_path / "two"):
            save_model(vae, "mnist_vae", folder / "models", metrics={})
            words = ["evaluate", "mnist_vae", "--output", folder, "--models", folder / "models"]
            for setting in ("num_images=20", "num_samples=3", "ais_images=2", "ais_steps=3"):
                words += ["--set", setting]
            words = ["-m", "pyro_vae_defence.experiments", *map(str, words), "--quiet"]
            done = launch(*words, processes=1 if folder.name == "one" else 2)
            assert done.returncode == 0, done.stderr[-4000:]
            assert done.stdout.count("wrote") == 1
            texts.append(without_times((folder / "mnist_vae.json").read_text()))
            # Of a part of the test set: the card stays as it is.
            assert load_card("mnist_vae", folder / "models").metrics == {}
        assert texts[0] == texts[1]


class TestStores:
    @pytest.fixture(autouse=True)
    def _zarr(self):
        pytest.importorskip("zarr")

    @pytest.mark.slow
    def test_a_killed_process_loses_its_chunk(self, tmp_path, monkeypatch):
        from test_defence_store import assert_same

        done = launch(__file__, tmp_path, "store", "killed")
        assert done.returncode != 0
        path, partial = tmp_path / "store", tmp_path / "store.partial"
        assert not path.exists()
        finished = {int(mark.name) for mark in (partial / ".finished").iterdir()}
        assert finished
        assert 5 not in finished
        files = {
            number: partial / "posterior" / "latent" / f"0.0.{number}.0" for number in finished
        }
        made = {number: file.stat().st_mtime_ns for number, file in files.items()}
        done = launch(__file__, tmp_path, "store", processes=3)
        assert done.returncode == 0, done.stderr[-4000:]
        for number, when in made.items():
            assert (path / files[number].relative_to(partial)).stat().st_mtime_ns == when
        assert_same(path, defend(tmp_path / "one"))

    @pytest.mark.slow
    def test_torchruns_restarts_survive_a_kill(self, tmp_path, expected):
        from test_defence_store import assert_same

        done = launch(__file__, tmp_path, "study", "store", "killed", restarts=2)
        assert done.returncode == 0, done.stderr[-4000:]
        assert without_times((tmp_path / "plain.json").read_text()) == expected
        assert_same(tmp_path / "store", defend(tmp_path / "one" / "store"))

    @pytest.mark.slow
    def test_memory_does_not_depend_on_the_number_of_images(self, tmp_path):
        """100,000 images in two processes take at most 10% more than 10,000."""
        peaks = {}
        for length in (10_000, 100_000):
            folder = tmp_path / str(length)
            folder.mkdir()
            done = launch(__file__, folder, "memory", length)
            assert done.returncode == 0, done.stderr[-4000:]
            found = [json.loads((folder / f"memory{r}").read_text())["peak"] for r in (0, 1)]
            peaks[length] = max(found)
        print(peaks)
        assert peaks[100_000] < 1.1 * peaks[10_000]


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = take_part_forked if "forked" in sys.argv else take_part
    run(Path(sys.argv[1]), *sys.argv[2:])
