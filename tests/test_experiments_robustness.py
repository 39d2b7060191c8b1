"""The experiment behind the table of adaptive attacks: files, resumption, command line."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
import re
from pathlib import Path
from unittest.mock import Mock

import matplotlib.image
import pytest
import torch
from conftest import NARROW
from studies import save_model

from pyro_vae_defence.defence import DefendedClassifier, MCMCDefence, NoDefence
from pyro_vae_defence.defence.mcmc import (
    PAPER_SETTINGS,
    RECOMMENDED_KERNEL,
    RECOMMENDED_LENGTHS,
    PaperSetting,
)
from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.defences import label
from pyro_vae_defence.experiments.html import robustness_page
from pyro_vae_defence.experiments.robustness import (
    RATES,
    Robustness,
    RobustnessConfig,
    estimate,
    gradients_per_image,
    reports,
)
from pyro_vae_defence.experiments.study import shown, write_pages
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.classifier import LinearClassifier, MLPClassifier, load_classifier
from pyro_vae_defence.models.pretrained import load_pretrained
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.plots import picture
from pyro_vae_defence.robustness import KNOWLEDGE, load_attacked, rescore
from pyro_vae_defence.robustness.suite import Suite

SETTINGS = {
    "num_images": 4, "chain.num_samples": 1, "chain.warmup_steps": 1, "chain.num_steps": 2,
    "budget.num_steps": 2, "budget.num_chains": 2, "budget.selection_draws": 1,
    "budget.scoring_draws": 2, "budget.check_images": 2, "budget.check_steps": 4,
    "budget.check_draws": 2,
    "attacks": ("encoder", "equilibrium"), "defences": ("none", "aware"),
    "targets": ("classification",),
}  # fmt: skip


PUBLISHED = Path(__file__).resolve().parents[1] / "docs" / "results"
FEW = ("transfer", "encoder")  # attacks that are over before a clock is of use


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setattr(ConvVAE, "widths", NARROW)
    torch.manual_seed(0)
    vae = ConvVAE().eval()
    variance = {"z": torch.full((64,), 0.3)}
    save_model(vae, "mnist_vae", tmp_path / "models", mean_posterior_variance=variance)
    save_model(LinearClassifier(64, 10), "mnist_vae_classifier", tmp_path / "models")
    return tmp_path / "models"


def test_the_classifier_is_one_of_the_models_latents(models, tmp_path):
    """Another may read as many, and mean nothing."""
    torch.manual_seed(1)
    own = {"model": "mnist_vae"}
    for name, training in {
        "own": own,
        "foreign": {"model": "fashion_mnist_vae"},
        "images": {"model": None},
        "older": own | {"weights": "of another training"},
        "colours": own | {"column": 1},
    }.items():
        save_model(MLPClassifier(64, 10, 8), name, models, training=training)

    def made(name):
        return Robustness(
            "mnist_radius_0.2", tmp_path / name, models=models,
            overrides={**SETTINGS, "classifier": name, "defences": ("none",)}, progress=False,
        )  # fmt: skip

    result = made("own").run()
    assert set(result["weights"]) == {"mnist_vae", "own"}
    assert "classifier `own`, classes read" in Robustness.section(result, [])
    assert "classifier <code>own</code>" in robustness_page([result])
    with pytest.raises(ValueError, match="'foreign' reads latents of 'fashion_mnist_vae'"):
        made("foreign").run()
    with pytest.raises(ValueError, match="'images' reads images; name one of latents of 'mnist"):
        made("images").run()
    with pytest.raises(ValueError, match="'older' reads latents of other weights of 'mnist_vae'"):
        made("older").run()
    with pytest.raises(ValueError, match="'colours' predicts column 1 of the labels"):
        made("colours").run()


def test_a_result_is_written_resumed_and_printed(models, tmp_path, capsys):
    output = tmp_path / "out"
    study = functools.partial(
        Robustness, "mnist_radius_0.2", output, models=models, overrides=SETTINGS, progress=False
    )
    result = study().run()
    assert list(result["reports"]) == ["classification/none", "classification/aware"]
    aware = result["reports"]["classification/aware"]
    assert aware["defence"]["perturbation"] == "Linf(radius=0.2)"
    assert [a["name"] for a in aware["attacks"]] == ["encoder", "equilibrium"]
    assert aware["robust"]["mean"]["num_images"] == 4
    assert aware["threat_model"]["reading"] == "reencoded"
    attacked = load_attacked(
        output / "attacked" / "mnist_radius_0.2_classification_aware.safetensors"
    )
    assert attacked.seed == aware["seed"]
    assert attacked.x_adv.shape == (4, 1, 28, 28)
    path = output / "mnist_radius_0.2.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))

    # A report that was lost is made again, and is what it was; the other is not touched.
    stored = json.loads(path.read_text())
    lost = stored["reports"].pop("classification/none")
    stored["reports"]["classification/aware"]["seed"] = "kept"
    path.write_text(json.dumps(stored))
    again = study().run()["reports"]
    assert again["classification/aware"]["seed"] == "kept"
    for key in ("robust", "clean", "seed", "per_image"):
        assert again["classification/none"][key] == lost[key]

    table = Robustness.section(json.loads(json.dumps(result)), [])
    assert "| no defence | accuracy |" in table
    assert "- skipped bpda: not asked for" in table
    tables, page = write_pages({"robustness": Robustness}, output)
    assert "robustness mnist_radius_0.2" in tables.read_text()
    assert page == output / "report.html"
    page = (output / "report.html").read_text()
    # Everything is inside: the only sources are data, no link, no script.
    assert set(re.findall(r'(?:src|href)="([a-z]+:|[^#d])', page)) == {"data:"}
    assert "<script" not in page
    assert page.count("<svg") == 1
    assert page.count('src="data:image/png;base64,') == 2
    estimate = aware["robust"]["mean"]["estimate"]
    assert f"{estimate:.3f} [" in page
    assert "decoder evaluations" not in page
    assert "defence and decoder" in page  # what the equilibrium attacker knows
    unreliable = sum(found["unreliable"] for found in result["reports"].values())
    assert page.count("Unreliable:") == unreliable
    examples = matplotlib.image.imread(io.BytesIO(base64.b64decode(aware["examples"])))
    # Three rows of four images, a frame of one pixel around each.
    assert examples.shape == (3 * 29 + 1, 4 * 29 + 1, 4)
    command = ["robustness", "mnist_radius_0.2", "--output", str(output), "--models", str(models)]
    assert main([*command, "--set", "num_images=4", "--set", "radius=.7"]) == 2
    assert "belongs to another run (its config differs)" in capsys.readouterr().err
    assert main([*command, "--set", "radius=7"]) == 2
    assert "radius must lie in (0, 1], the range of images, got 7" in capsys.readouterr().err


def test_reports_go_on_with_more_attacks(models, tmp_path):
    def made(name, **changes):
        overrides = {**SETTINGS, "defences": ("none", "aware"), **changes}
        return Robustness(
            "mnist_radius_0.2", tmp_path / name, models=models, overrides=overrides, progress=False
        )

    first = made("first").run()["reports"]
    place = str(tmp_path / "first" / "attacked")
    changes = {"attacks": ("encoder", "equilibrium", "bpda"), "earlier": place}
    result = made("more", **changes, defences=("none", "median", "aware")).run()
    for key, report in result["reports"].items():
        if key not in first:  # nobody has attacked the median before
            assert key.endswith("median")
            assert not report.get("earlier_seeds")
            continue
        before = first[key]
        assert report["earlier_seeds"] == (before["seed"],)
        names = [each["name"] for each in report["attacks"]]
        chain = ["equilibrium", "bpda"] if key.endswith("aware") else []
        assert names == ["encoder", *chain]
        assert report["values"].items() >= {
            (name, text) for name, text in before["values"].items() if name.startswith("attacks")
        }
    assert "the worst images of the report of seed" in Robustness.section(result, [])
    path = tmp_path / "more" / "attacked" / "mnist_radius_0.2_classification_aware.safetensors"
    assert load_attacked(path).earlier_seeds == (first["classification/aware"]["seed"],)
    with pytest.raises(ValueError, match="earlier must not be where new attacked images are"):
        made("first", **changes).run()
    with pytest.raises(ValueError, match="earlier must have attacked images of one of these"):
        made("third", **changes | {"earlier": str(tmp_path)}).run()


def test_the_recommended_defence_is_evaluated_as_it_is(models, tmp_path, monkeypatch):
    monkeypatch.setitem(RECOMMENDED_LENGTHS, "warmup_steps", 1)
    monkeypatch.setitem(RECOMMENDED_LENGTHS, "num_samples", 1)
    monkeypatch.setitem(RECOMMENDED_KERNEL, "burn_in", 2)
    settings = {name: value for name, value in SETTINGS.items() if name != "defences"}
    settings |= {"attacks": ("encoder", "bpda"), "checks": False}
    study = Robustness("mnist_recommended_0.1", tmp_path, models=models, overrides=settings)
    study.progress = False
    (report,) = study.run()["reports"].values()
    made = MCMCDefence.recommended(study.vae, Linf(0.1))(study.x[:1])
    assert report["defence"] == made.settings
    assert made.settings["num_chains"] == 4
    assert [attack["name"] for attack in report["attacks"]] == ["encoder", "bpda"]


def test_images_that_cannot_be_written_are_found_before_the_attacks(models, tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_vae_defence.experiments.robustness.evaluate_robustness", None)
    (tmp_path / "attacked").write_text("in the way")
    study = Robustness("mnist_radius_0.2", tmp_path, models=models, overrides=SETTINGS)
    study.progress = False
    with pytest.raises(OSError, match=r"mnist_radius_0\.2_.*\.safetensors cannot be written"):
        study.run()


def test_a_report_is_kept_until_its_result_file_is_written(models, tmp_path, monkeypatch):
    one = {**SETTINGS, "attacks": ("encoder",), "defences": ("none",), "checks": False}
    study = functools.partial(
        Robustness, "mnist_radius_0.2", tmp_path, models=models, overrides=one, progress=False
    )
    with monkeypatch.context() as patch:
        patch.setattr("pyro_vae_defence.experiments.study.save", Mock(side_effect=OSError("full")))
        with pytest.raises(OSError, match="full"):
            study().run()
    (kept,) = tmp_path.glob(".*.pt")
    with monkeypatch.context() as patch:
        patch.setattr(Suite, "attack", None)  # all of it is found
        assert study().run()["reports"].keys() == {"classification/none"}
    assert not kept.exists()
    kept.touch()  # killed before it was deleted
    study().run()
    assert not kept.exists()


class TestBlocks:
    SETTINGS = {**SETTINGS, "num_images": 5, "images_per_cell": 3, "attacks": ("encoder",),
                "num_examples": 2}  # fmt: skip

    def study(self, models, output, **more):
        settings = {**self.SETTINGS, **more}
        name = "mnist_radius_0.2"
        return Robustness(name, output, models=models, overrides=settings, progress=False)

    def test_blocks_are_cells_of_their_own_and_one_report(self, models, tmp_path):
        result = self.study(models, tmp_path).run()
        assert result["reports"] == {}
        published = sorted(path.name for path in (tmp_path / "attacked").iterdir())
        assert published[-1] == "mnist_radius_0.2_classification_none_001.safetensors"
        assert len(published) == 4
        blocks = result["blocks"]["classification/none"]
        assert [b["robust"]["mean"]["num_images"] for b in blocks.values()] == [2, 3]
        assert ["examples" in block for block in blocks.values()] == [True, False]
        joined = reports(result)
        assert list(joined) == ["classification/none", "classification/aware"]
        report = joined["classification/none"]
        assert report["robust"]["mean"]["num_images"] == 5
        per_image = blocks["000"]["per_image"] + blocks["001"]["per_image"]
        assert report["per_image"] == per_image
        assert report["robust"]["mean"]["estimate"] == pytest.approx(sum(per_image) / 5)
        assert report["examples"] == blocks["000"]["examples"]
        # The same after a way through the file, and in tables and pages.
        path = tmp_path / "mnist_radius_0.2.json"
        assert reports(json.loads(path.read_text())) == joined
        table = Robustness.section(result, [])
        assert "5 images in blocks of at most 3, L_inf radius 0.2" in table
        assert "so far" not in table
        _, page = write_pages({"robustness": Robustness}, tmp_path)
        assert f"classification, {label('aware')}, 5 images" in page.read_text()
        # A file of blocks is no larger than it has to be.
        assert len(json.dumps(blocks["001"]["values"])) < 1500

        # Whatever order blocks are made in, and in however many runs.
        stored = json.loads(path.read_text())
        lost = stored["blocks"]["classification/none"].pop("000")
        path.write_text(json.dumps(stored))
        partial = Robustness.section(stored, [])
        assert "| no defence (3 images so far) |" in partial
        again = json.loads(json.dumps(self.study(models, tmp_path).run()))
        assert list(again["blocks"]["classification/none"]) == ["001", "000"]
        for made in (again["blocks"]["classification/none"]["000"], lost):
            made["cost"] = made["attacks"][0]["seconds"] = None  # wall times differ
        assert again["blocks"]["classification/none"]["000"] == lost
        again = json.loads(path.read_text())
        assert reports(again)["classification/none"]["robust"] == report["robust"]
        assert list(reports(again)) == list(joined)

    def test_a_block_is_the_unit(self, models, tmp_path):
        """Its draws are its own, whatever the blocks beside it."""
        study = self.study(models, tmp_path, defences=("none",), checks=False)
        study.load()
        cells = {key: compute for key, compute in study.cells()}
        second = cells[("blocks", "classification/none", "001")]()
        first = cells[("blocks", "classification/none", "000")]()
        other = self.study(models, tmp_path, defences=("none",), checks=False).run()["blocks"]
        assert second["robust"] == other["classification/none"]["001"]["robust"]
        assert first["robust"] == other["classification/none"]["000"]["robust"]
        assert second["seed"] != first["seed"]

    @pytest.mark.parametrize(
        ("number", "size", "blocks"),
        [(5, 3, [2, 3]), (1000, 125, [125] * 8), (4, 4, [4]), (7, None, [7]), (6, 4, [3, 3])],
    )
    def test_blocks_are_even(self, number, size, blocks):
        config = RobustnessConfig("m", 0.1, num_images=number, images_per_cell=size)
        assert list(map(len, config.blocks)) == blocks
        assert [i for block in config.blocks for i in block] == list(range(number))

    def test_a_block_has_two_images(self):
        with pytest.raises(ValueError, match="images_per_cell=2 leaves a block of 3 images with"):
            RobustnessConfig("m", 0.1, num_images=3, images_per_cell=2)

    def test_results_of_earlier_versions_are_shown(self):
        tables, results = [], sorted(PUBLISHED.glob("robustness/*.json"))
        for path in results:
            found = shown(path)
            assert "blocks" not in found
            for report in found["reports"].values():  # which were chosen by few draws
                single = min(each["figure"]["estimate"] for each in report["attacks"])
                assert report["robust"]["mean"]["estimate"] <= single
            tables.append(Robustness.section(found, []))
        assert "\n".join(tables) == (PUBLISHED / "robustness/tables.md").read_text()


def test_the_published_chain_is_attacked_in_blocks_of_its_batch(models, tmp_path, monkeypatch):
    monkeypatch.setitem(PAPER_SETTINGS, "mnist", PaperSetting(1, 0.1))  # 1 transition of 20 steps
    changes = {
        "dataset": "fashion_mnist_subset", "num_images": 4, "images_per_cell": 2,
        "paper": "mnist", "gradients": "recorded",
        "targets": ("classification",), "attacks": ("bpda", "unroll"), "budget.num_steps": 2,
        "budget.num_draws": (2,), "budget.persistent_transitions": 1, "budget.scoring_draws": 2,
    }  # fmt: skip
    name = "mnist_published_0.1"  # the model of other images than it was trained on
    run = functools.partial(Robustness, name, tmp_path, models=models, progress=False)
    result = run(overrides=changes).run()
    blocks = result["blocks"]["classification/paper"]
    assert list(blocks) == ["000", "001"]
    assert blocks["000"]["defence"]["prepare"] == "Recorder()"
    assert blocks["000"]["defence"]["keep_draws"] == 1
    assert blocks["000"]["threat_model"]["reading"] == "last"
    report = reports(result)["classification/paper"]
    assert [a["name"] for a in report["attacks"]] == ["bpda", "unroll"]
    left_out = [name for name in KNOWLEDGE if name not in ("bpda", "unroll")]
    assert report["reasons"] == (
        "no sanity check ran", *(f"attack {n} did not run: not asked for" for n in left_out),
    )  # fmt: skip
    assert report["cost"]["defence_gradients_per_image"] == 1 + 20
    del changes["paper"]
    with pytest.raises(ValueError, match="no published setting for 'mnist_subset'"):
        run(overrides=changes).run()


class TestCosts:
    def test_the_estimate_is_the_time_that_published_results_took(self):
        """Seconds of each attack per gradient of the model, the same for all within a factor 2."""
        found = json.loads((PUBLISHED / "robustness/mnist_radius_0.1.json").read_text())
        expected = gradients_per_image(RobustnessConfig("mnist_vae", 0.1), "hmc")
        report = found["reports"]["classification/hmc"]
        known = {a["name"]: a for a in report["attacks"]}
        rates = {n: known[n]["seconds"] / expected[n] for n in known if n not in FEW}
        assert len(rates) == 5
        middle = sorted(rates.values())[2]
        assert all(0.5 * middle < rate < 2 * middle for rate in rates.values()), rates
        # And the evaluations that were counted, all of which are gradients or as dear as one.
        for name in ("bpda", "equilibrium", "black_box"):
            assert 0.75 < known[name]["evaluations"] / expected[name] < 1.1

    def test_a_recommended_chain_is_that_of_its_settings(self):
        """Four chains of 141 gradients each, which is what its runs count."""
        config = Robustness.names["mnist_recommended_0.1"]
        config = dataclasses.replace(config, attacks=("bpda",), checks=False)
        runs = 4 * config.budget.scoring_draws  # of clean, noisy, and twice of attacked images
        expected = runs * 4 * 141
        assert gradients_per_image(config, "recommended")["scoring"] == expected

    def test_a_chain_of_so_many_transitions_is_that_long(self):
        config = dataclasses.replace(Robustness.names["mnist_radius_0.1"], checks=False)
        costs = [
            gradients_per_image(config, f"aware@{number}")["scoring"] for number in (200, 400, 600)
        ]
        assert (costs[2] - costs[0]) / (costs[1] - costs[0]) == pytest.approx(2, rel=0.1)

    @pytest.mark.parametrize("name", [n for n, c in Robustness.names.items() if c.images_per_cell])
    def test_a_cell_of_the_large_evaluation_ends_in_time(self, name):
        config = Robustness.names[name]
        largest = max(
            sum(gradients_per_image(config, defence).values()) * len(config.blocks[0])
            for defence in config.defences
        )
        most = 120 if "large" in name else 400
        assert largest / RATES[0] < most
        assert f"largest cell: {len(config.blocks[0])} images" in estimate(config)


def test_a_page_escapes_what_it_is_told_and_flags_what_is_unreliable(models, tmp_path):
    settings = {**SETTINGS, "attacks": ("transfer",), "defences": ("aware",)}
    result = Robustness(
        "mnist_radius_0.2", tmp_path, models=models, overrides=settings, progress=False
    ).run()
    result["command"] = "<b>&"
    page = robustness_page([result])
    assert "&lt;b&gt;&amp;" in page
    assert "only transfer attacks ran: no attacker knew the defence" in page
    with pytest.raises(ValueError, match="holds no report; run the experiment robustness"):
        robustness_page([])


def test_curves_of_a_page_say_what_they_are_and_mark_what_is_unreliable():
    path = Path(__file__).resolve().parents[1] / "docs/results/robustness/mnist_radius_0.2.json"
    result = json.loads(path.read_text())
    page = robustness_page([result])
    curves = page[: page.index("<section>")].split("<h2>")[1:]
    assert len(curves) == 2
    for curve in curves:
        for name in ("none", "hmc", "aware"):
            assert f">{label(name)}</text>" in curve
            assert f">{name}</text>" not in curve
        # One scale for all.
        assert all(
            f">{tick}</text>" in curve for tick in ("0.0", "0.2", "0.4", "0.6", "0.8", "1.0")
        )
        assert "Hollow points" in curve
        assert ">unreliable report</text>" in curve
        assert curve.count("fill: #ffffff; stroke") == 3  # two points and the legend
    for report in result["reports"].values():
        report["unreliable"] = False
    page = robustness_page([result])
    assert "Hollow points" not in page
    assert "fill: #ffffff; stroke" not in page[: page.index("<section>")]
    assert f"reconstruction, {label('hmc')}, 20 images</h3>" in page.replace("&#x27;", "'")


def test_a_curve_is_of_results_that_differ_in_the_radius_alone():
    one, other = (shown(PUBLISHED / f"robustness/mnist_radius_{r}.json") for r in ("0.1", "0.2"))
    vote = other | {"name": "vote", "config": other["config"] | {"reading": "vote"}}

    def headings(*results):
        page = robustness_page(results)
        curves = page[: page.index("<section>")].split("<h2>")[1:]
        return [curve.partition("</h2>")[0] for curve in curves]

    targets = [f"mnist_vae, {target}" for target in ("reconstruction", "classification")]
    assert headings(one, other) == targets
    assert headings(one, other, vote) == [
        f"{target}: {names}"
        for names in ("mnist_radius_0.1, mnist_radius_0.2", "vote")
        for target in targets
    ]


def test_a_result_can_be_taken_from_the_file_of_all():
    path = Path(__file__).resolve().parents[1] / "docs/results/robustness/mnist_radius_0.2.json"
    section = Robustness.section(json.loads(path.read_text()), [])
    heading, _, rest = section.partition("<!-- begin mnist_radius_0.2 -->")
    assert heading == "### robustness mnist_radius_0.2\n\n"
    taken = rest.partition("<!-- end mnist_radius_0.2 -->")[0]
    assert (
        "1 chain of 20 warm-up + 5 kept transitions from step size 0.5, burn-in 0; seed 0" in taken
    )
    assert "Commands, commits, versions" in taken


def test_pictures_are_rows_of_images():
    dark, bright = torch.zeros(2, 1, 3, 3), torch.full((2, 1, 3, 3), 1.5)
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(picture((dark, bright)))))
    assert pixels.shape == (9, 9, 4)
    assert (pixels[1:4, 1:4, :3] == 0).all()
    assert (pixels[5:8, 5:8, :3] == 1).all()


def test_every_dataset_and_radius_has_an_experiment():
    assert {"mnist_radius_0.1", "mnist_radius_0.2", "fashion_mnist_radius_0.2"} <= set(
        Robustness.names
    )
    assert all(f"_{config.radius:g}" in name for name, config in Robustness.names.items())
    assert RobustnessConfig("m", 0.1).budget.num_steps >= 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defences": "none"}, "defences must be a tuple"),
        ({"defences": ("latents",)}, "no defence is called 'latents'"),
        ({"targets": "latents"}, "targets must be a tuple"),
        ({"targets": ("latents",)}, "targets must be one of"),
        ({"engine": "SGD"}, "engine must be APGD, PGD or MomentumPGD, got 'SGD'"),
        ({"attacks": ("x",)}, "attacks must be one of .*, got 'x'"),
    ],
)
def test_mistakes(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RobustnessConfig("mnist_vae", 0.1, **change)
    with pytest.raises(ValueError, match="no experiment named 'x'"):
        Robustness("x", tmp_path)


class TestPublishedImages:
    """What the repository publishes of its evaluations of most images, for others to score."""

    FILES = sorted((PUBLISHED / "robustness_protocol" / "attacked").glob("*.safetensors"))

    def test_there_is_a_file_of_every_report(self):
        expected = {
            f"{path.stem}_{key.replace('/', '_')}"
            for path in (PUBLISHED / "robustness_protocol").glob("*.json")
            for key in json.loads(path.read_text())["reports"]
        }
        assert {path.stem for path in self.FILES} == expected

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    def test_it_holds_the_images_that_the_report_is_of(self, path):
        """Files of images outside of their ball are refused."""
        report = load_attacked(path)
        name, target, of = re.fullmatch(
            r"(.+)_(classification|reconstruction)_(.+)", path.stem
        ).groups()
        result = json.loads((path.parents[1] / f"{name}.json").read_text())
        known = result["reports"][f"{target}/{of}"]
        assert len(report.x_adv) == result["config"]["num_images"] == 100
        assert report.threat_model["radius"] == result["config"]["radius"]
        known.pop("examples", None)  # pictures of some
        assert json.loads(report.to_json()) == known

    @pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist"])
    def test_scored_again_they_leave_what_the_report_says(self, dataset):
        """Draws of the encoder are all that differs, 5 per image in the report and here. A tenth of
        them are read right, so that either mean has a standard error of at most 0.013, and the
        difference 0.019; the bar is 4 of these, which chance passes once in 16,000 times."""
        stem = f"{dataset}_protocol_0.1_classification_none.safetensors"
        vae = load_pretrained(f"{dataset}_vae")
        reader = load_classifier(f"{dataset}_vae_mlp_classifier")[0]
        again = rescore(
            self.FILES[0].with_name(stem),
            vae,
            none := NoDefence(vae),
            classifier=DefendedClassifier(none, reader, "reencoded"),
            num_draws=5,
            generator=torch.Generator().manual_seed(1),
        )
        told, found = (of.robust["mean"]["estimate"] for of in (again.report, again))
        assert found == pytest.approx(told, abs=0.076)
