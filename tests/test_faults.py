"""Whatever happens to a study, its files are whole, and the same command goes on from there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys

import pytest
import torch
from faults import DISK
from test_processes import SMALL, Toy, save_models, toy, without_times

from pyro_vae_defence.experiments.__main__ import STUDIES, load_studies, main
from pyro_vae_defence.experiments.classify import TrainClassifier
from pyro_vae_defence.experiments.configuration import describe, override
from pyro_vae_defence.experiments.defend import Defend
from pyro_vae_defence.experiments.evaluate import Evaluate
from pyro_vae_defence.experiments.robustness import Robustness
from pyro_vae_defence.experiments.study import Measurement, NotFiniteError, check_finite, load
from pyro_vae_defence.experiments.train import Train
from pyro_vae_defence.models.pretrained import load_weights
from pyro_vae_defence.ops.locks import sole_writer

EVERY = [study for command in STUDIES for study in load_studies(command)]
KINDS = ("kill", "kill while writing", "full")
QUICK = {
    f"budget.{name}": 1
    for name in (
        "num_steps", "num_iterations", "num_directions", "black_box_steps", "selection_draws",
        "scoring_draws",
    )
}  # fmt: skip
TINY = {
    **SMALL,
    Robustness: (
        "mnist_radius_0.1",
        {**QUICK, "chain.num_samples": 1, "chain.warmup_steps": 1, "num_images": 4,
         "images_per_cell": 2, "num_examples": 1, "targets": ("classification",), "checks": False,
         "defences": ("none", "hmc"), "attacks": ("transfer", "encoder")},
    ),
}  # fmt: skip


def words(study, output, models):
    """The command line of a study with tiny settings."""
    name, settings = TINY[study]
    sets = (f"--set={key}={value!r}" for key, value in settings.items())
    return [study.command, name, "--quiet", f"--output={output}", f"--models={models}", *sets]


def check_files(directory):
    """Every file that is there is whole."""
    for path in directory.rglob("*"):
        if path.suffix == ".json":
            load(path)
        if path.name == "tables.md":
            assert path.read_text().rstrip().endswith(("</details>", "-->"))


def contents(directory):
    """What is left of a run, but for times."""
    texts = {
        path.relative_to(directory): without_times(path.read_text())
        for path in directory.rglob("*")
        if path.suffix in (".json", ".md", ".html")
    }
    hidden = [path.name for path in directory.rglob(".*") if not path.name.endswith(".partial")]
    assert hidden == []  # no lock stays
    return {name: text.replace(str(directory), "OUTPUT") for name, text in texts.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    save_models(directory)
    return directory


class TestDisks:
    @pytest.mark.parametrize("study", [Defend, Evaluate], ids=lambda study: study.__name__)
    def test_a_study_goes_on_after_a_fault(self, study, models, tmp_path, monkeypatch):
        self.try_faults(study, models, tmp_path, monkeypatch, some=2)

    @pytest.mark.slow
    @pytest.mark.parametrize("study", TINY, ids=lambda study: study.__name__)
    def test_a_study_goes_on_after_any_fault(self, study, models, tmp_path, monkeypatch):
        self.try_faults(study, models, tmp_path, monkeypatch, some=10**9)

    def try_faults(self, study, models, tmp_path, monkeypatch, some):
        """Cells are computed once, and then remembered: it is the writing that is tried."""
        known = {}
        compute_one = study._compute_one

        def remember(self, number, key, compute, claims):
            def known_or_new():
                if key not in known:
                    known[key] = compute()
                return json.loads(json.dumps(known[key]))

            return compute_one(self, number, key, known_or_new, claims)

        monkeypatch.setattr(study, "_compute_one", remember)
        # Figures take long to draw, and are written as tables are.
        monkeypatch.setattr(study, "figures", classmethod(lambda cls, result: {}))
        monkeypatch.setattr("pyro_vae_defence.experiments.robustness.robustness_page", str)
        whole = tmp_path / "whole"
        assert main(words(study, whole, models)) == 0
        expected = contents(whole)
        assert len(expected) >= 2
        for kind in KINDS:
            counted = tmp_path / f"{kind} counted"
            with DISK.below(counted, None, kind) as disk:
                assert main(words(study, counted, models)) == 0
            moments = disk.moments
            assert moments > 1
            for fault in range(moments - 1, 0, -max(1, moments // some)):
                output = tmp_path / f"{kind} {fault}"
                with DISK.below(output, fault, kind):
                    assert main(words(study, output, models)) == 2  # unless it is killed
                    assert kind == "full"
                check_files(output)
                assert main(words(study, output, models)) == 0
                assert contents(output) == expected

    def test_a_toy_goes_on_after_any_fault(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Toy, "provenance", {"commit": "none"})
        toy(tmp_path / "whole").run()
        expected = without_times((tmp_path / "whole" / "plain.json").read_text())
        for kind in KINDS:
            with DISK.below(tmp_path, None, kind) as disk:
                toy(tmp_path / f"{kind} counted").run()
            moments = disk.moments
            assert moments >= 7
            for fault in range(moments):
                output = tmp_path / f"{kind} {fault}"
                said = contextlib.nullcontext()
                if kind == "full":
                    said = pytest.raises(OSError, match="No space left on device")
                with DISK.below(tmp_path, fault, kind), said:
                    toy(output).run()
                check_files(output)
                toy(output).run()
                assert without_times((output / "plain.json").read_text()) == expected
                assert [p.name for p in output.iterdir() if p.suffix != ".partial"] == [
                    "plain.json"
                ]

    @pytest.mark.parametrize(
        "kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
    )
    def test_training_goes_on_after_a_fault(self, kind, models, tmp_path):
        settings = {"dataset": "mnist_subset", "epochs": 2, "images_per_epoch": 64}
        settings |= {"batch_size": 32}

        def train(output):
            Train("mnist_vae", output, overrides=settings, progress=False).run()

        def trained(output):
            lines = (output / "mnist_vae" / "history.jsonl").read_text().splitlines()
            history = [json.loads(line) | {"seconds": 0} for line in lines]
            return *load_weights("mnist_vae", output), history

        with DISK.below(tmp_path, None, kind) as disk:
            train(tmp_path / "whole")
        expected = trained(tmp_path / "whole")
        assert [entry["epoch"] for entry in expected[2]] == [1, 2]
        moments = disk.moments
        for fault in (moments // 2, moments - 3):  # at a checkpoint, and at the card
            output = tmp_path / f"{fault}"
            with DISK.below(output, fault, kind):
                train(output)
            train(output)
            card, weights, history = trained(output)
            assert card.sha256 == expected[0].sha256
            assert all(torch.equal(weights[name], value) for name, value in expected[1].items())
            assert history == expected[2]

    def test_a_place_that_cannot_be_written_is_found_first(self, models, tmp_path, capsys):
        file = tmp_path / "file"
        file.write_text("")

        def compute(*_):
            pytest.fail("something was computed")

        for study in TINY:
            for output in (file, file / "below"):
                assert main(words(study, output, models)) == 2
                assert "cannot be written" in capsys.readouterr().err
        for name in ("mnist_vae", "mnist_vae_classifier"):
            assert main(["train", name, f"--output={file}"]) == 2
            assert "cannot be written" in capsys.readouterr().err
        assert main([*words(Robustness, tmp_path / "out", models), f"--images={file}"]) == 2
        assert "cannot be written" in capsys.readouterr().err

    def test_damaged_results_beside_it_are_found_first(self, models, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(Measurement, "run", lambda self: pytest.fail("something was computed"))
        (tmp_path / "other.json").write_text('{"study": "def')
        assert main(words(Robustness, tmp_path, models)) == 2
        assert "other.json is damaged" in capsys.readouterr().err


class TestNumbers:
    def test_what_is_no_number_is_named_and_not_written(self, tmp_path):
        study = toy(tmp_path)
        study.compute = lambda name: {"metric": [1.0, {"estimate": math.nan}]}
        with pytest.raises(ValueError, match=r"^cell floor: metric/estimate is nan; nothing was"):
            study.run()
        assert not (tmp_path / "plain.json").exists()
        with pytest.raises(NotFiniteError, match="^what was measured is inf"):
            check_finite(math.inf)
        check_finite({"a": [1, 2.0, "nan", None, True]})


class TestWriters:
    def test_another_writer_is_refused_and_named(self, tmp_path):
        """A writer in another process, which is then killed: its lock dies with it."""
        path = tmp_path / "result.json"
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            with sole_writer(path):
                os.write(told, b".")
                signal.pause()
        os.read(ready, 1)
        with pytest.raises(ValueError, match=f"is being written by process {child} on"):
            sole_writer(path).__enter__()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with sole_writer(path):
            assert (tmp_path / ".result.json.lock").exists()
            with pytest.raises(ValueError, match="by this very process"):
                sole_writer(path).__enter__()
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_without_locks_keeps_nobody_out(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "fcntl", None)
        with sole_writer(tmp_path / "result.json"):
            assert list(tmp_path.iterdir()) == []

    def test_a_study_at_work_is_not_met(self, tmp_path):
        being_written = pytest.raises(ValueError, match=r"plain\.json is being written")
        with sole_writer(tmp_path / "plain.json"), being_written:
            toy(tmp_path).run()
        toy(tmp_path).run()

    def test_a_study_removes_what_a_killed_one_left(self, tmp_path):
        """Of its own result, and of weights that training writes; others may be at work."""
        for name in (".plain.json.abc.partial", ".plain.safetensors.abc.partial"):
            (tmp_path / name).write_bytes(b"half a file")
        (tmp_path / ".other.json.abc.partial").write_bytes(b"another run's")
        with sole_writer(tmp_path / "plain.json"), pytest.raises(ValueError, match="written"):
            toy(tmp_path).run()
        assert len(list(tmp_path.glob(".plain.*.partial"))) == 2
        toy(tmp_path).run()
        assert [path.name for path in tmp_path.glob(".*")] == [".other.json.abc.partial"]

    def test_training_overwrites_nothing_of_others(self, tmp_path, models):
        toy(tmp_path).run()
        (tmp_path / "plain.json").rename(tmp_path / "mnist_vae.json")
        with pytest.raises(ValueError, match="mnist_vae.json is no card of weights"):
            Train("mnist_vae", tmp_path, progress=False).run()
        card = {"training": {**dataclasses.asdict(TrainClassifier.names["mnist_vae_classifier"])}}
        card["training"]["max_epochs"] = 7
        (tmp_path / "mnist_vae_classifier.json").write_text(json.dumps(card))
        with pytest.raises(ValueError, match="trained with max_epochs=7, not 200; move it away"):
            TrainClassifier("mnist_vae_classifier", tmp_path, progress=False).run()

    def test_another_start_is_another_training(self, tmp_path, models):
        """A checkpoint is not continued from weights that it did not start from."""
        settings = {"dataset": "mnist_subset", "epochs": 1, "images_per_epoch": 32}
        settings |= {"batch_size": 32, "half": False}

        def train(start):
            options = {"models": start, "overrides": settings, "progress": False}
            return Train("mnist_avae", tmp_path / "out", **options).run()

        train(models)
        torch.manual_seed(1)
        save_models(tmp_path / "others", seed=1)
        with pytest.raises(ValueError, match="written with other settings"):
            train(tmp_path / "others")


NONSENSE = (
    -1, 0, 1, -0.5, 0.0, 1.7, True, "false", "abc", "", None, math.nan, math.inf, (), (1, 1),
    ("none", "none"), (math.nan,), (-1,), (0.5, 0.50000001), ("a", "b"), {}, {"a": 1}, [1], 10**9,
)  # fmt: skip

MEANT = {
    # Names are looked up before anything is computed, in a directory that nobody knows yet.
    "model": {"false", "abc", ""}, "features": {"false", "abc", ""},
    "start_from": {"false", "abc", ""}, "classifier": {"false", "abc", ""},
    "earlier": {"false", "abc", ""},
    "architecture": {"{}"},  # all defaults
    # What is left out is not computed.
    "costs": {"()"}, "full_radii": {"()"}, "radii": {"()"}, "objective_radii": {"()"},
    "compiled_rows": {"()"}, "memory_images": {"()"}, "attacks": {"()"},
    "undefended_radii": {"()"}, "theorem_radii": {"()"}, "transitions": {"()"},
}  # fmt: skip


@pytest.mark.parametrize("study", EVERY, ids=lambda study: study.__name__)
def test_every_setting_is_what_it_should_be_or_refused(study):
    """In one line that names it, when the configuration is made."""
    config = study.configuration(next(iter(study.names)))
    for key, _, _ in describe(config):
        place, _, field = key.rpartition(".")
        before = getattr(getattr(config, place) if place else config, field)
        for value in NONSENSE:
            said, refused = f"{key}={value!r}", None
            try:
                override(config, {key: value})
            except ValueError as error:
                refused = str(error)
            if refused is not None:
                assert field in refused, said
                assert "\n" not in refused, said
                continue
            if str(value) in MEANT.get(field, ()):
                continue
            assert not isinstance(value, (str, list, dict, tuple)), said
            assert isinstance(value, bool) == isinstance(before, bool), said
            if value is None:
                assert "None" in str(type(config).__annotations__.get(field)) or place, said
            else:
                assert 0 <= value < math.inf, said
                assert isinstance(value, int) or not isinstance(before, int), said


@pytest.mark.parametrize(
    ("study", "settings", "message"),
    [
        (Train, {"objective": "avae", "beta": 2.0}, "beta=2.0 has no effect on the objective 'av"),
        (Train, {"objective": "avae", "rho": 1.0}, "rho=1 leaves no noise"),
        (Train, {"objective": "nvae"}, "objective 'nvae' needs an architecture"),
        (Train, {"architecture": {"num_latent_scales": 0}}, "^architecture: num_latent_scales=0"),
        (Train, {"architecture": {}, "start_from": "x"}, "architecture={} has no effect with"),
        (Train, {"images_per_epoch": 10}, "batch_size must be at most images_per_epoch = 10"),
        (TrainClassifier, {"model": None, "num_images": 100}, "num_images=100 has no effect on a"),
        (TrainClassifier, {"num_draws": 3}, "num_draws=3 has no effect on inputs='mean'"),
        (TrainClassifier, {"inputs": "guide", "radius": 0.1}, "radius=0.1 has no effect on inputs"),
    ],
)
def test_settings_that_contradict_each_other(study, settings, message):
    with pytest.raises(ValueError, match=message):
        override(study.configuration(next(iter(study.names))), settings)


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        ("compare", {"full_radii": (0.15,)}, "full_radii holds 0.15, not one of radii"),
        ("compare", {"curve_images": 2000}, "curve_images must be at most num_images = 1000"),
        ("compare", {"num_noise": 2000}, "num_noise must be at most num_images = 1000"),
        ("compare", {"curve_restarts": 11}, "curve_restarts must be at most num_restarts = 10"),
        ("compare", {"radii": (0.1, 0.1000001)}, "radii must hold 0.1 once"),
        ("evaluate", {"ais_images": 2000}, "ais_images must be at most num_images = 1000"),
        ("evaluate", {"ais_images": 1}, "ais_images must be 0 or at least 2"),
        ("evaluate", {"ais_steps": 7}, "ais_steps=7 has no effect without ais_images"),
        ("defend", {"defences": ("none",), "paper": "mnist"}, "paper='mnist' has no effect with"),
        ("robustness", {"paper": "mnist"}, "paper='mnist' has no effect without the defence"),
        ("robustness", {"budget.num_draws": (5, 1)}, r"num_draws must rise, got \(5, 1\)"),
        ("robustness", {"num_examples": 9}, r"num_examples must be an integer of 0\.\.8"),
        ("robustness", {"dataset": "mnits"}, "dataset must be one of mnist, fashion_mnist"),
    ],
)
def test_contradictions_in_measurements(command, settings, message):
    study = load_studies(command)[0]
    with pytest.raises(ValueError, match=message):
        override(study.configuration(next(iter(study.names), "mnist_vae")), settings)
