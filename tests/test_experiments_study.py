"""What studies share: configurations, seeds, cells, defences by name, the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from pyro_vae_defence.experiments import study as study_module
from pyro_vae_defence.experiments import tables
from pyro_vae_defence.experiments.__main__ import STUDIES, load_studies, main
from pyro_vae_defence.experiments.configuration import (
    ChainConfig,
    Configuration,
    Count,
    Radius,
    describe,
    override,
    parse_settings,
)
from pyro_vae_defence.experiments.defences import KINDS, Setting, label, make_defence
from pyro_vae_defence.experiments.defend import Defend
from pyro_vae_defence.experiments.study import Measurement, write_pages
from pyro_vae_defence.metrics import auroc, detection_interval
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.perturbation import UnknownRadius
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.precision import tf32_settings

EVERY = [study for command in STUDIES for study in load_studies(command)]
MEASUREMENTS = {study.kind: study for study in EVERY if issubclass(study, Measurement)}


@dataclass(frozen=True)
class ToyConfig(Configuration):
    """A toy.

    Args:
        number: how many. More is said here,
            and here.
        radii: radii of attacks; all of them.
        how: the way.
        model: a name, if any.
        chain: of the chains.
        either: a number or a word.
        seed: of everything.
    """

    number: Count = 2
    radii: tuple[Radius, ...] = (0.1,)
    how: Literal["a", "b"] = "a"
    model: str | None = None
    chain: ChainConfig = ChainConfig(step_size=0.3)
    either: int | str = 3
    seed: int = 0


class Toy(Measurement[ToyConfig]):
    kind = command = "toy"
    names = {"plain": ToyConfig()}
    output = "runs/toy"
    fails: bool = False
    computed: list[str]

    def load(self):
        self.computed = []
        self.weights["w"] = "hash"

    def cells(self):
        for key in (("one",), ("nested", "two"), ("nested", "three")):
            yield key, lambda key=key: self.compute(key[-1])

    def compute(self, name):
        if self.fails and name == "three":
            raise KeyboardInterrupt
        self.computed.append(name)
        return float(torch.rand((), generator=self.generator(name)))

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        return f"# {result['name']} {result['one']:.3f}\n"


def toy(output, **overrides):
    return Toy("plain", output, overrides=overrides, progress=False)


def test_cells_are_not_rounded_to_tf32(tmp_path):
    """torch rounds float32 convolutions on CUDA by default."""

    class Looking(Toy):
        def compute(self, name):
            return list(tf32_settings())

    before = tf32_settings()
    result = Looking("plain", output=tmp_path).run()
    assert set(result["one"]) <= {"ieee", False}
    assert tf32_settings() == before != tuple(result["one"])


def test_weights_and_images_are_where_the_study_computes(tmp_path):
    study = Toy("plain", tmp_path, device="meta")
    vae, _ = study.load_conv_vae("mnist_vae")
    x, labels = study.choose("mnist_subset", 10, "images")
    classifier = study.load_classifier("mnist_vae_classifier")
    tensors = [x, labels, *vae.parameters(), *vae.buffers(), *classifier.parameters()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert study.command_line().endswith("toy plain --device meta")
    with pytest.raises(ValueError, match="device='gpu' is no device"):
        Toy("plain", tmp_path, device="gpu")


class TestCells:
    def test_an_interrupted_run_goes_on_with_the_same_draws(self, tmp_path):
        whole = toy(tmp_path / "whole").run()
        study = toy(tmp_path)
        study.fails = True
        with pytest.raises(KeyboardInterrupt):
            study.run()
        assert "three" not in json.loads((tmp_path / "plain.json").read_text())["nested"]
        study = toy(tmp_path)
        result = study.run()
        assert study.computed == ["three"]
        assert (result["one"], result["nested"]) == (whole["one"], whole["nested"])
        assert json.loads((tmp_path / "plain.json").read_text()) == result
        written = (tmp_path / "plain.json").stat().st_mtime_ns
        toy(tmp_path).run()
        assert (tmp_path / "plain.json").stat().st_mtime_ns == written

    def test_no_cell_begins_that_may_end_after_the_limit(self, tmp_path, monkeypatch):
        """Cells of 10 seconds each, of a clock that nothing else moves."""
        seconds = [0.0]
        monkeypatch.setattr(study_module.time, "monotonic", lambda: seconds[0])

        def piece(limit, length=10.0):
            study = Toy("plain", tmp_path, progress=False, time_limit=limit)
            compute = study.compute

            def slow(name):
                seconds[0] += length
                return compute(name)

            study.compute = slow
            result = study.run()
            return study.computed, study.remaining, result

        whole = toy(tmp_path / "whole").run()
        # The second may end at 19.9 or after it, the first cell's length is not known.
        assert piece(19.9)[:2] == (["one"], 2)
        assert piece(0.1)[:2] == (["two"], 1)
        done, remaining, result = piece(20.0)
        assert (done, remaining) == (["three"], 0)
        assert (result["one"], result["nested"]) == (whole["one"], whole["nested"])
        (tmp_path / "plain.json").unlink()
        assert piece(20.0)[:2] == (["one", "two"], 1)
        # Time that has passed before the run counts.
        study = Toy("plain", tmp_path, progress=False, time_limit=1)
        seconds[0] += 1.5
        study.run()
        assert (study.computed, study.remaining) == ([], 1)
        with pytest.raises(ValueError, match="time_limit must be a positive finite number, got 0"):
            Toy("plain", tmp_path, time_limit=0)

    def test_every_cell_says_which_version_has_made_it(self, tmp_path):
        first = toy(tmp_path).run()
        path = tmp_path / "plain.json"

        def change(**changes):
            """As if other versions had made the file, but for its last cell."""
            found = first | {"nested": {"two": 0.5}} | changes
            path.write_text(json.dumps(found))
            return toy(tmp_path).run()

        before, long_before = ({"commit": c, "torch": "2", "threads": 1} for c in ("b", "a"))
        result = change(provenance=before)
        assert result["earlier"] == [{**before, "cells": ["one", "nested/two"]}]
        assert result["provenance"] == first["provenance"]
        assert "; of `one`, `nested/two`: commit `b`, torch 2, 1 thread(s)" in tables.source(result)
        result = change(provenance=before, earlier=[{**long_before, "cells": ["one"]}])
        of = [(each["commit"], each["cells"]) for each in result["earlier"]]
        assert of == [("a", ["one"]), ("b", ["nested/two"])]
        # Files of versions that did not say so: nothing is guessed.
        result = change(provenance=before, earlier=[long_before])
        assert result["earlier"] == [long_before, before]
        # Nothing new is computed: nothing else is claimed.
        path.write_text(json.dumps(first | {"provenance": before}))
        result = toy(tmp_path).run()
        assert result["provenance"] == before
        assert "earlier" not in result

    def test_a_result_says_what_it_is_of(self, tmp_path):
        result = toy(tmp_path, **{"chain.step_size": 0.5}).run()
        assert (result["study"], result["name"]) == ("toy", "plain")
        assert result["weights"] == {"w": "hash"}
        assert result["config"]["chain"]["step_size"] == 0.5
        assert result["command"].endswith("toy plain --set chain.step_size=0.5")
        assert {"commit", "torch", "threads"} <= set(result["provenance"])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"config": {}}, "its config differs"),
            ({"weights": {"w": "x"}}, "its weights differs"),
            ({"study": "other"}, "its study differs"),
        ],
    )
    def test_a_file_of_another_run_is_not_touched(self, tmp_path, change, message):
        toy(tmp_path).run()
        path = tmp_path / "plain.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        before = path.read_text()
        with pytest.raises(ValueError, match=message):
            toy(tmp_path).run()
        assert path.read_text() == before

    def test_seeds_have_one_rule(self, tmp_path):
        def draw(seed, *purpose):
            return torch.rand(3, generator=toy(tmp_path, seed=seed).generator(*purpose))

        assert torch.equal(draw(0, "a", 1), draw(0, "a", 1))
        assert not torch.equal(draw(0, "a", 1), draw(0, "a", 2))
        assert not torch.equal(draw(0, "a"), draw(1, "a"))

    def test_pages_refuse_what_is_no_result(self, tmp_path):
        toy(tmp_path).run()
        (page,) = write_pages({"toy": Toy}, tmp_path)
        assert page.read_text().startswith("# plain 0.")
        (tmp_path / "card.json").write_text('{"name": "x"}')
        with pytest.raises(ValueError, match=r"card\.json is no result of a study"):
            write_pages({"toy": Toy}, tmp_path)
        assert write_pages({"toy": Toy}, tmp_path, skip_foreign=True) == [page]
        with pytest.raises(ValueError, match="no result files"):
            write_pages({"toy": Toy}, tmp_path / "none")


PUBLISHED = Path(__file__).resolve().parents[1] / "docs" / "results"


# What stands in a file of each study after its first cell; the benchmark of attacks has one cell.
FIRST = {
    "attack": "noise_floor",
    "benchmark_samplers": None,
    "compare": "clean",
    "defend": "symmetric_kl",
    "evaluate": None,
    "figures": "clean",
    "hierarchy": "noise_floor",
    "robustness": None,
}


@pytest.mark.parametrize("kind", sorted(FIRST))
def test_what_an_interrupted_run_has_left_can_be_printed(kind, tmp_path):
    study = MEASUREMENTS[kind]
    paths = PUBLISHED.glob("*/*.json")
    result = next(found for p in paths if (found := json.loads(p.read_text())).get("study") == kind)
    header = {"study", "name", "config", "weights", "metric", "command", "provenance", "dataset"}
    partial = {k: v for k, v in result.items() if k in {*header, FIRST[kind]}}
    partial = {part: {} for part in study.parts} | partial
    (tmp_path / "result.json").write_text(json.dumps(partial))
    page, *_ = write_pages({kind: study}, tmp_path)
    assert result["command"] in page.read_text()


class TestConfigurations:
    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("number", 0, "number must be an integer of at least 1, got 0"),
            ("number", 1.5, "number must be an integer"),
            ("number", True, "number must be an integer of at least 1, got True"),
            ("radii", 0.1, "radii must be a tuple"),
            ("radii", (0.1, 1.5), r"radii must lie in \[0, 1\].* got 1.5"),
            ("radii", ("a",), r"radii must lie in \[0, 1\].* got 'a'"),
            ("radii", (float("nan"),), "radii must lie"),
            ("either", 1.5, "either must be of type str, got 1.5"),
            ("how", "c", "how must be one of"),
            ("model", 3, "model must be of type str"),
            ("chain.step_size", 0, "^chain.step_size must be positive and finite, got 0"),
            ("chain.step_size", float("inf"), "step_size must be positive and finite"),
            ("chain.warmup_steps", -1, "warmup_steps must be an integer of at least 0"),
            ("chain.steps", 1, r"unknown setting 'chain.steps'; choose from .*"),
            ("chain", 1, "unknown setting 'chain'; choose from .*chain.step_size"),
            ("number.x", 1, "unknown setting 'number.x'"),
            ("numbers", 1, "unknown setting 'numbers'; choose from number, radii"),
        ],
    )
    def test_a_value_that_does_not_fit_is_named(self, key, value, message):
        with pytest.raises(ValueError, match=message):
            override(ToyConfig(), {key: value})

    def test_nested_settings_change_what_they_name(self):
        settings = parse_settings(("chain.burn_in=30", "how=b", "radii=0.1,0.2"))
        config = override(ToyConfig(), settings)
        assert config == ToyConfig(
            how="b", radii=(0.1, 0.2), chain=ChainConfig(step_size=0.3, burn_in=30)
        )
        with pytest.raises(ValueError, match="--set takes KEY=VALUE, got 'number'"):
            parse_settings(["number"])

    def test_a_setting_has_one_value(self):
        with pytest.raises(ValueError, match="number is set twice, to 1 and 2; set it once"):
            parse_settings(["number=1", "how=b", "number=2"])
        assert parse_settings(["number=1", "number=1"]) == {"number": 1}

    def test_a_seed_is_one_of_torchs(self):
        config = Defend.names["mnist_radius_0.1"]
        assert override(config, {"seed": 2**63 - 1}).seed == 2**63 - 1
        with pytest.raises(
            ValueError, match=r"seed must be below 2\*\*63, .* got 9223372036854775808"
        ):
            override(config, {"seed": 2**63})

    def test_help_comes_from_fields_and_docstring(self):
        lines = list(describe(ToyConfig()))
        assert lines[0] == ("number", "2", "how many")
        assert lines[1] == ("radii", "(0.1,)", "radii of attacks")
        assert ("chain.step_size", "0.3") in [line[:2] for line in lines]


class TestDefences:
    def test_every_kind_is_made_and_labelled_by_its_entry(self):
        """A defence or control is one entry."""
        vae = ConvVAE().eval()
        setting = Setting(
            vae,
            ChainConfig(num_samples=2, warmup_steps=1, num_steps=1),
            metric={"z": torch.ones(64)},
            radius=0.1,
            paper="mnist",
            unknown_radius=lambda: UnknownRadius(Linf, (0.0, 0.1), (0.0, 1.0)),
        )
        x = torch.rand(2, 1, 28, 28)
        for name, kind in KINDS.items():
            defence = make_defence(name, setting)
            assert kind.label in label(name)
            if name != "paper":
                assert defence(x, torch.Generator().manual_seed(0)).reconstruction.shape == x.shape

    @pytest.mark.parametrize("name", KINDS)
    def test_every_kind_takes_the_size_of_micro_batches(self, name):
        setting = Setting(
            ConvVAE(),
            ChainConfig(),
            metric={"z": torch.ones(64)},
            radius=0.1,
            paper="mnist",
            unknown_radius=lambda: UnknownRadius(Linf, (0.0, 0.1), (0.0, 1.0)),
            batch_size=7,
        )
        assert make_defence(name, setting).batch_size == 7

    def test_a_setting_reaches_the_kernel(self):
        setting = Setting(
            ConvVAE(), ChainConfig(step_size=0.123, burn_in=7), metric={"z": torch.ones(64)}
        )
        kernel = make_defence("hmc@20", setting).kernel(ConvVAE().model)
        assert (kernel.step_size, kernel.burn_in) == (0.123, 7)

    def test_what_assumes_a_radius_must_be_told(self):
        setting = Setting(ConvVAE(), ChainConfig(), metric={"z": torch.ones(64)})
        for name in ("aware", "aware_unknown", "dark_clip"):
            with pytest.raises(ValueError, match=f"'{name}' assumes a radius"):
                make_defence(name, setting)
        with pytest.raises(ValueError, match="'paper' is a setting per dataset"):
            make_defence("paper", setting)


class TestCommandLine:
    @pytest.mark.parametrize("command", STUDIES)
    def test_help_of_every_study(self, command, capsys):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for study in load_studies(command):
            config = next(iter(study.names.values()))
            for key, _, what in describe(config):
                assert key in text
                assert what, f"{type(config).__name__}.{key} has no line in its docstring"
                assert what in text

    def test_all_names_are_checked_before_the_first_is_run(self, monkeypatch, capsys):
        monkeypatch.setattr(Measurement, "run", lambda self: pytest.fail("something was computed"))
        assert main(["compare", "mnist", "mnsit"]) == 2
        assert "no comparison named 'mnsit'" in capsys.readouterr().err

    def test_what_a_limit_has_left_is_said(self, monkeypatch, tmp_path, capsys):
        def run(self):
            self.remaining = 3
            return {}

        monkeypatch.setattr(Measurement, "run", run)
        assert main(["compare", "mnist", "--time-limit", "9", "--output", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert said == "mnist: 3 cells are left; run the same again to go on\n"
        assert main(["compare", "mnist", "--time-limit", "0"]) == 2
        assert "time_limit must be a positive" in capsys.readouterr().err

    def test_an_option_without_effect_is_refused(self, capsys):
        assert main(["defend", "mnist_radius_0.1", "--checkpoint", "x.pt"]) == 2
        assert "--checkpoint has no effect on 'mnist_radius_0.1'" in capsys.readouterr().err

    def test_a_study_without_tables_needs_a_name(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["train"])
        assert stop.value.code == 2

    def test_help_names_every_command(self, capsys):
        with pytest.raises(SystemExit):
            main(["--help"])
        text = capsys.readouterr().out
        assert all(f"\n  {command} " in text for command in STUDIES)

    def test_a_command_that_is_none(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["tarin"])
        assert stop.value.code == 2
        assert "invalid choice: 'tarin'" in capsys.readouterr().err


def test_accuracies_without_a_failure_have_an_interval(tmp_path):
    """As earlier versions have written them, and as new ones compute them."""
    flat = {"estimate": 1.0, "low": 1.0, "high": 1.0}
    result = {
        "config": {"num_references": 20},
        "cell": {"accuracy": {"digit": {"correct": dict(flat)}}, "ms_ssim": dict(flat)},
        "reports": {
            "a": {"figure": "accuracy", "clean": {"mean": flat | {"num_images": 50}}},
            "b": {"figure": "similarity", "clean": {"mean": flat | {"num_images": 50}}},
        },
    }
    path = tmp_path / "name.json"
    path.write_text(json.dumps(result))
    found = study_module.read(tmp_path)["name"]
    right = study_module.share(torch.ones(20))
    assert found["cell"]["accuracy"]["digit"]["correct"] == pytest.approx(right)
    assert right["low"] == pytest.approx(0.025 ** (1 / 20))
    assert found["cell"]["ms_ssim"] == flat
    assert found["reports"]["a"]["clean"]["mean"]["low"] == pytest.approx(0.025 ** (1 / 50))
    assert found["reports"]["b"]["clean"]["mean"]["low"] == 1.0
    assert study_module.load(path) == result


def test_accuracies_of_earlier_versions_are_of_the_images_that_were_classified(tmp_path):
    """Of fewer or more than the references beside them, and of pairs where they detect attacks."""
    config = {"num_references": 3, "num_images": 20, "num_noise": 8, "curve_images": 10}

    def flat():
        return {"estimate": 1.0, "low": 1.0, "high": 1.0}

    def cell(number):
        kinds = {kind: {"correct": flat()} for kind in ("clean", "attacked", "noise")}
        against = {f"against_{kind}": {"auroc": flat()} for kind in ("clean", "noise")}
        return {
            "num_classified": number,
            "accuracy": {"class": {"mean": kinds}},
            "detection": {"start_energy": against},
        }

    results = {
        "attack": {"radii": {"0": {"none": {"accuracy": {"class": {"unchanged": flat()}}}}}},
        "compare": {"clean": {"class": flat()}, "radii": {"0.1": {"a": cell(20), "b": cell(6)}}},
    }
    for study, result in results.items():
        text = json.dumps({"study": study, "config": config, **result})
        (tmp_path / f"{study}.json").write_text(text)
    found = study_module.read(tmp_path)
    lows = {
        "attack/radii/0/none/accuracy/class/unchanged": 20,
        "compare/clean/class": 20,
        **{
            f"compare/radii/0.1/{name}/accuracy/class/mean/{kind}/correct": number
            for name, numbers in {"a": (20, 20, 8), "b": (6, 6, 6)}.items()
            for kind, number in zip(("clean", "attacked", "noise"), numbers, strict=True)
        },
        **{
            f"compare/radii/0.1/{name}/detection/start_energy/against_{kind}/auroc": number
            for name, numbers in {"a": (10, 4), "b": (3, 3)}.items()
            for kind, number in zip(("clean", "noise"), numbers, strict=True)
        },
    }
    for place, number in lows.items():
        assert tables.at(found, place)["low"] == pytest.approx(0.025 ** (1 / number)), place
    scores = torch.zeros(8), torch.ones(8)
    detected = detection_interval(auroc, *scores).to_dict()
    place = "compare/radii/0.1/a/detection/start_energy/against_noise/auroc"
    assert tables.at(found, place) == pytest.approx(detected)


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in PUBLISHED.glob("*/tables.md")))
def test_published_tables_are_what_their_command_writes_now(folder, tmp_path, monkeypatch):
    """All words and numbers; pictures are not drawn."""
    monkeypatch.setattr("pyro_vae_defence.experiments.study.save_figure", lambda *_: None)
    images = {"compare_inputs": "images/inputs", "nvae": "results/nvae"}.get(folder, "images")
    place = tmp_path / "results" / folder
    place.mkdir(parents=True)
    for path in (PUBLISHED / folder).glob("*.json"):
        shutil.copy(path, place)
    write_pages(MEASUREMENTS, place, tmp_path / images, skip_foreign=True)
    assert (place / "tables.md").read_text() == (PUBLISHED / folder / "tables.md").read_text()
