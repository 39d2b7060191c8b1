"""Printed numbers are the paper's, each in its place; items are made by commands that there are."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import shared_path

from pyro_vae_defence.defence.mcmc import PAPER_SETTINGS
from pyro_vae_defence.experiments.__main__ import load_studies, main
from pyro_vae_defence.experiments.benchmark.seconds import published_seconds, seconds_at
from pyro_vae_defence.experiments.paper.claims import (
    CLAIMS,
    Claim,
    Pair,
    claims_table,
    verdict,
)
from pyro_vae_defence.experiments.paper.items import (
    ITEMS,
    QUICK,
    Item,
    listing,
    make,
    makeable,
    page,
    write_page,
)
from pyro_vae_defence.experiments.paper.printed import TABLE_3, TABLE_4, Printed, corrected, printed
from pyro_vae_defence.experiments.paper.sections import (
    NOTHING,
    SECTIONS,
    difference,
    examples_figure,
)
from pyro_vae_defence.experiments.published import Published
from pyro_vae_defence.models.pretrained import load_card, load_pretrained
from pyro_vae_defence.plots import picture

# Where the text that was read off the pages is not what they say.
MISREAD = {"0.52 (0.03) 0.52 (0.03) 0.66 (0.03)": "0.52 (0.03) 0.66 (0.03)"}
# Numbers of a table that are none of its entries: radii in its head, names of rows.
HEADS = {
    "table_2": ["0.1", "0.2"] * 2,
    # Twice in the head, then SE and SE-AVAE; the last is misread.
    "table_3": [*"0.1 0.2 0.0 0.1 0.2 0.0 0.1 0.2 0.1 0.2 0.1 0.2 1".split()],  # noqa: SIM905
    "table_4": ["0.1", "0.2"],
    "table_5": ["0", "100", "500", "1000"],
    "table_7": ["1", "2", "5", "10", "2", "5", "10", "1"],  # the last is misread, in the head
}
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-\d+)?")


def block(item: str) -> list[str]:
    """The numbers of a table as they follow each other in the paper's text."""
    lines = shared_path("paper.txt").read_text().splitlines()
    caption = f"{item.replace('_', ' ').capitalize()}:"
    at = next(number for number, line in enumerate(lines) if line.startswith(caption))
    rows = [number for number, line in enumerate(lines) if "\t" in line]
    # The table is the lines with tabs next to its caption, before or behind.
    nearest = min(rows, key=lambda number: (abs(number - at), number < at))
    first = last = nearest
    while first - 1 in rows or (not lines[first - 1].strip() and first - 2 in rows):
        first -= 1
    while last + 1 in rows or (not lines[last + 1].strip() and last + 2 in rows):
        last += 1
    text = " ".join(lines[first : last + 1])
    text = re.sub(r"\\[a-z]+|[{}$\\&]", " ", text)  # formulas
    text = re.sub(r"\s+", " ", text)
    for wrong, right in MISREAD.items():
        text = text.replace(wrong, right)
    return NUMBER.findall(text)


def groups(item: str) -> dict[str, list[str]]:
    """Entries of a table that stand side by side in the text."""
    found: dict[str, list[str]] = {}
    for each in printed():
        if each.item != item:
            continue
        dataset, model = each.model.rsplit("_vae", 1)[0], f"{each.model}, {each.defence}"
        key = {
            "table_2": f"{dataset.removesuffix('_beta')}, {each.measure}, {each.at}",
            "table_4": f"{dataset.removesuffix('_beta')}, {each.measure}, {each.at}",
        }.get(item, model)
        if item in ("table_2", "table_4"):
            key = key.replace("_tcvae_2", "")
        numbers = [each.value, *filter(None, [each.standard_error])]
        found.setdefault(key, []).extend(numbers)
    return found


@pytest.mark.parametrize("item", ["table_2", "table_3", "table_4", "table_5", "table_7"])
def test_every_entry_of_a_table(item):
    """All of them are there, side by side as they are printed, and no others."""
    text = block(item)
    entries = [number for each in groups(item).values() for number in each]
    assert sorted(entries + HEADS[item]) == sorted(text)
    if item == "table_7":
        return  # datasets stand in one row
    for name, numbers in groups(item).items():
        places = range(len(text) - len(numbers) + 1)
        assert any(text[p : p + len(numbers)] == numbers for p in places), name


def test_numbers_of_table_7_stand_in_their_rows():
    text = block("table_7")
    for beta, model in [("1", "vae"), *itertools.product(["2", "5", "10"], ["beta_vae", "tcvae"])]:
        name = model if beta == "1" else f"{model}_{beta}"
        row = [
            p.value
            for dataset in ("mnist", "fashion_mnist", "color_mnist")
            for p in printed()
            if p.item == "table_7" and p.model == f"{dataset}_{name}"
        ]
        assert [beta, *row] in [text[p : p + 8] for p in range(len(text))], name


def test_hyperparameters_and_numbers_in_the_text():
    text = shared_path("paper.txt").read_text()
    wanted = {p.value for p in printed() if p.item == "table_8"}
    table = text[text.index("# of reference points") : text.index("Table 8:")]
    assert wanted <= set(NUMBER.findall(table)) | {"True", "False"}
    for model in dict.fromkeys(p.model for p in printed() if p.item == "table_8"):
        chain = [p.value for p in printed() if p[:3] == ("table_8", model, "hmc")]
        assert " ".join(chain) in table
    (p_value,) = [p.value for p in printed() if p.item == "figure_7"]
    assert f"p-value is equal to {p_value}" in text


def test_presets_are_table_8():
    for model in dict.fromkeys(p.model for p in printed() if p.item == "table_8"):
        chain = [p.value for p in printed() if p[:3] == ("table_8", model, "hmc")]
        setting = PAPER_SETTINGS[model.removesuffix("_vae")]
        numbers = [float(value) for value in chain[:3]]
        assert [setting.num_transitions, setting.step_size, setting.num_steps] == numbers
        assert str(setting.adaptive) == chain[3]


def test_numbers_are_numbers_and_in_order():
    items = [each.item for each in printed()]
    assert list(dict.fromkeys(items)) == sorted(set(items), key=items.index)
    keys = [each[:5] for each in printed() if each.measure != "radius"]
    assert len(set(keys)) == len(keys)
    for each in printed():
        assert each.value in ("True", "False") or float(each.value) >= 0
        assert not each.standard_error or float(each.standard_error) >= 0


# --- Items ----------------------------------------------------------------------------------------

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def test_items_are_those_of_the_paper():
    text = shared_path("paper.txt").read_text()
    found = re.findall(r"(?m)^(Table|Figure) (\d+)", text)
    names = {f"{kind.lower()}_{number}" for kind, number in found}
    assert names | {"lemma_1", "theorem_1", "appendix_b_3"} == set(ITEMS)


def test_every_item_has_a_study_or_says_what_is_missing():
    for name, item in ITEMS.items():
        assert bool(item.names) == bool(item.study), name
        assert item.names or item.missing or item.where, name
        if item.names:
            known = [known for study in load_studies(item.study) for known in study.names]
            assert set(item.names) <= set(known), name
            assert item.place in QUICK, name
    assert set(SECTIONS) <= set(ITEMS)


def test_the_list_is_on_the_page(capsys):
    assert main(["paper", "--results", str(RESULTS)]) == 0
    listed = capsys.readouterr().out
    assert listed.strip() == listing(RESULTS)
    assert listed in (RESULTS.parent / "paper.md").read_text()


def test_results_in_part_are_told_from_whole_ones(tmp_path):
    """Of ``published``; a file of two sets of images out of ten is no result of Table 2."""
    (tmp_path / "published").mkdir()
    whole = json.loads((RESULTS / "published" / "mnist_radii.json").read_text())
    del whole["radii"]["0.2"]
    for name, radii in (("fashion_mnist", None), ("mnist", whole["radii"])):
        text = (RESULTS / "published" / f"{name}_radii.json").read_text()
        found = {**json.loads(text), **({"radii": radii} if radii else {})}
        (tmp_path / "published" / f"{name}_radii.json").write_text(json.dumps(found))
    assert ITEMS["figure_13"].there(tmp_path) == (1, 1)
    assert "published, 1 of 3 results and 1 in part; no chains" in listing(tmp_path)


def test_costs_are_those_of_the_chains():
    # 500 rows; MNIST has 750 transitions on 5 sets of images, ColorMNIST 1,500 on 7.
    assert Published.num_gradients(Published.names["mnist_vae"]) == 500 * 5 * (750 * 20 + 1)
    assert Published.num_gradients(Published.names["color_mnist_vae"]) == 500 * 7 * (1500 * 20 + 1)
    assert Published.num_gradients(Published.names["mnist_transitions"]) == 500 * 3 * 40_001
    assert ITEMS["figure_13"].cost() == "no chains"
    assert ITEMS["figure_6"].cost() == "200 million gradients"


def test_an_item_runs_its_command_and_prints_what_is_made_of_it(tmp_path, capsys):
    ran = []

    def run(words):
        ran.append(list(words))
        return 0

    items = ["figure_4", "table_4", "figure_8", "table_8"]
    assert make(items, str(tmp_path), run, ["--device", "cuda"]) == 0
    assert ran == [
        ["defend", *ITEMS["figure_4"].names, "--output", f"{tmp_path}/nvae", "--device", "cuda"],
        ["published", *TABLE_4, "--output", f"{tmp_path}/published", "--device", "cuda"],
    ]
    printed = capsys.readouterr().out
    assert "## Table 4: beta-VAE and beta-TCVAE behind HMC" in printed
    assert "| mnist | step_size | 0.1 | 0.1 |" in printed
    ran.clear()
    assert make(["figure_3"], str(tmp_path), run) == 0
    assert [words[0] for words in ran] == ["published", "defend"]
    ran.clear()
    assert make(["table_4", "figure_4"], str(tmp_path), lambda words: ran.append(words) or 2) == 2
    assert len(ran) == 1


def test_quick_is_the_first_name_on_packaged_images(tmp_path):
    ran = []
    assert make(["table_3"], str(tmp_path), lambda w: ran.append(w) or 0, quick=True) == 0
    (words,) = ran
    assert words[:2] == ["published", "color_mnist_vae"]
    models = words[words.index("--models") + 1]
    assert "num_transitions=2" in words
    assert load_card("color_mnist_vae", models).dataset == "color_mnist_subset"
    vae = load_pretrained("color_mnist_vae", models)
    weights = load_pretrained("color_mnist_vae").state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())


@pytest.mark.slow
def test_every_item_goes_through_quickly(tmp_path, capsys):
    assert main(["paper", "all", "--quick", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in makeable():
        if name in SECTIONS:
            assert f": {ITEMS[name].title}" in printed
    assert NOTHING not in printed
    assert len(list((tmp_path / "quick" / "images").glob("paper_figure_*.png"))) == 7
    text = write_page(tmp_path / "quick", tmp_path / "quick" / "images").read_text()
    assert "](images/paper_figure_3.png)" in text


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("table_44", "the paper has no item 'table_44'; choose one of figure_1, table_1"),
        ("table_1", "nothing makes table_1 here (see docs/api/attacks.md); leave it out"),
        ("figure_x", "nothing makes figure_x here (missing: a study)"),
    ],
)
def test_items_that_nothing_makes_are_refused_before_anything_runs(
    item, message, capsys, monkeypatch
):
    monkeypatch.setitem(ITEMS, "figure_x", Item("a figure", missing="a study"))
    assert main(["paper", "table_2", item]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quick"], "--quick has no effect on the list; leave it out"),
        (["--images", "x"], "--images has no effect on the list"),
        (["--page", "--data-root", "x"], "--data-root has no effect on the page"),
        (["table_2", "--page"], "--page has no effect with items"),
        (["table_2", "--results", "x"], "--results has no effect with items"),
    ],
)
def test_options_that_do_nothing_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        main(["paper", *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("page_option", [[], ["--page"]])
def test_a_directory_of_results_that_is_not_there_is_refused(page_option, tmp_path, capsys):
    assert main(["paper", *page_option, "--results", str(tmp_path / "typo")]) == 2
    assert "is no directory; name that of all studies" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_names_wait_for_their_own_weights(tmp_path, capsys, monkeypatch):
    """Without the model of two latents, the linear Gaussian one is still made."""
    assert {"figure_1", "lemma_1", "theorem_1"} <= set(makeable())
    monkeypatch.setattr("pyro_vae_defence.experiments.paper.items.available", lambda *_: [])
    assert "lemma_1" in makeable()
    assert "figure_1" not in makeable()
    ran = []
    assert make(["lemma_1"], str(tmp_path), lambda words: ran.append(words) or 0) == 0
    assert ran == [["theory", "linear_gaussian", "--output", f"{tmp_path}/theory"]]
    said = capsys.readouterr().out
    assert "lemma_1: without mnist_vae_2d, for the weights of mnist_vae_2d are not there" in said
    with pytest.raises(ValueError, match="figure_1 needs the weights of mnist_vae_2d; train them"):
        make(["figure_1"], str(tmp_path), lambda words: ran.append(words) or 0)
    assert len(ran) == 1


# --- Claims in words ------------------------------------------------------------------------------


def pair(first, second):
    """Numbers with intervals of half a tenth to both sides."""
    entries = [{"estimate": x, "low": x - 0.05, "high": x + 0.05} for x in (first, second)]
    return Pair("", *entries)


ABOVE, BELOW, SAME = pair(0.5, 0.7), pair(0.7, 0.5), pair(0.5, 0.58)


@pytest.mark.parametrize(
    ("kind", "lower_is_better", "pairs", "said"),
    [
        ("above", False, [ABOVE, ABOVE], "confirmed"),
        ("above", False, [ABOVE, SAME], "confirmed in 1 of 2"),
        ("above", False, [BELOW, BELOW, SAME], "**contradicted**"),
        ("above", False, [BELOW, SAME], "**not confirmed**: above in 0, below in 1 of 2"),
        ("above", False, [SAME], "**not confirmed**: above in 0, below in 0 of 1"),
        ("above", True, [BELOW], "confirmed"),
        ("not below", False, [ABOVE, SAME], "not contradicted"),
        ("not below", False, [ABOVE, BELOW], "**contradicted**"),
        ("not below", True, [ABOVE], "**contradicted**"),
        ("not below", True, [], "not measured yet"),
    ],
)
def test_what_pairs_say_of_a_claim(kind, lower_is_better, pairs, said):
    claim = Claim("", "", "", lambda results: iter(()), kind, lower_is_better)
    assert verdict(claim, pairs) == said


def test_no_verdict_rests_on_what_is_not_read_alike():
    claim = Claim("", "", "", lambda results: iter(()), "not below", unlike="see the next row")
    assert verdict(claim, [BELOW]) == "not read alike: see the next row"
    assert verdict(claim, []) == "not measured yet"


def test_claims_are_read_off_results():
    """What the chain does to MNIST's clean classes, read off one draw; who knows the chain."""
    cells = json.loads((RESULTS / "published" / "mnist_vae.json").read_text())["radii"]["0"]
    cells = cells["encoder"]

    def correct(cell):
        return f"{cell['accuracy']['class']['correct']['estimate']:.2f}"

    rows = claims_table(RESULTS)
    (at,) = [place for place, line in enumerate(rows) if "non-attacked inputs" in line]
    first, end = correct(cells["none"]), correct(cells["hmc"])
    assert re.search(rf"mean without a defence .* MNIST {first} \[.*?\] → {end} \[", rows[at])
    assert rows[at].endswith("| not read alike: see the next row |")
    first = correct(cells["hmc"]["transitions"]["0"])
    assert re.search(rf"draw of the encoder .* MNIST {first} \[.*?\] → {end} \[", rows[at + 1])
    assert rows[at + 1].endswith("| not contradicted |")
    (row,) = [line for line in rows if "Who knows the chain" in line]
    assert row.endswith("| **contradicted** |")
    assert len(rows) == len(CLAIMS) + 3
    assert all(claim.unlike == "" or "next row" in claim.unlike for claim in CLAIMS)


def test_the_paper_s_t_of_100_is_150_transitions(tmp_path):
    """Its code ran T // 2 + T."""
    read = {
        str(count): {"ms_ssim": {"estimate": x, "low": x, "high": x}}
        for count, x in {0: 0.1, 100: 0.2, 150: 0.3, 2000: 0.4}.items()
    }
    radii = {"0.1": {"encoder": {"hmc": {"transitions": read}}}}
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "mnist_transitions.json").write_text(json.dumps({"radii": radii}))
    (row,) = [line for line in claims_table(tmp_path) if "T = 100" in line]
    assert "MNIST, 150 → 2000 0.30 [0.30, 0.30] → 0.40 [" in row


# --- Printed beside ours --------------------------------------------------------------------------


def test_a_difference_has_both_errors():
    each = Printed("table_2", "mnist_vae", "none", "ms_ssim", "0.1", "0.70", "0.03")
    found = difference(each, {"estimate": 0.8, "low": 0.7, "high": 0.9, "standard_error": 0.04})
    assert found == pytest.approx((0.1, 0.1 - 1.96 * 0.05, 0.1 + 1.96 * 0.05))
    # Without a printed one, and ours from its interval: 0.392 = 2 x 1.96 x 0.1.
    alone = each._replace(standard_error="")
    found = difference(alone, {"estimate": 0.7, "low": 0.504, "high": 0.896})
    assert found == pytest.approx((0.0, -0.196, 0.196))


def test_a_share_on_which_all_agree_has_a_wilson_interval():
    """50 of 50: from 50 / (50 + 1.96²) = 0.9287 to 1, and 0 of 50 the other way round."""
    one = {"estimate": 1.0, "low": 1.0, "high": 1.0, "standard_error": 0.0}
    each = Printed("table_2", "mnist_vae", "none", "class", "0", "1.00", "0.00")
    found = difference(each, one, 50)
    assert found == pytest.approx((0.0, -0.07135, 0.07135), abs=1e-5)
    none = {"estimate": 0.0, "low": 0.0, "high": 0.0, "standard_error": 0.0}
    found = difference(each._replace(value="0.10", standard_error="0.03"), none, 10)
    # Ours goes up to 1.96² / (10 + 1.96²) = 0.27753, and what is printed 0.0588 to both sides.
    assert found == pytest.approx((-0.1, -0.1588, -0.1 + (0.27753**2 + 0.0588**2) ** 0.5), abs=1e-5)
    # A similarity is no share, and no error is printed here.
    found = difference(each._replace(measure="ms_ssim", standard_error=""), one)
    assert found == (0.0, 0.0, 0.0)


def test_table_3_has_its_own_numbers_and_counts_no_quoted_ones(tmp_path):
    def entry(value):
        return {"estimate": value, "low": value, "high": value, "standard_error": 0.1}

    def write(model, cell, at="0.1", what="encoder"):
        found = {
            "study": "published", "name": model, "radii": {at: {what: {"none": cell}}},
            "command": "run",
            "config": {"num_references": 50, "num_restarts": 10, "dataset": None, "model": model},
            "provenance": {"commit": "abc", "torch": "2", "threads": 1},
        }  # fmt: skip
        (tmp_path / "published" / f"{model}.json").write_text(json.dumps(found))

    (tmp_path / "published").mkdir()
    write("color_mnist_beta_vae_2", {"ms_ssim": entry(0.9)})
    accuracy = {"correct": entry(0.5), "unchanged": entry(0.5)}
    cell = {"mse": entry(1372.0), "accuracy": {"class": accuracy, "color": accuracy}}
    write("color_mnist_se_0.1", cell, "0")
    text = "\n".join(SECTIONS["table_3"](tmp_path, tmp_path))
    row = "ms_ssim[paper], radius 0.1 | 0.50 (0.04) of Table 4; here 0.75, which is MNIST's | 0.90"
    assert row in text
    assert "| class, clean | 0.94, quoted | 0.50" in text
    assert "Of 1 printed numbers that are measured, ours differs from 1 by" in text
    assert "3 that the paper quotes from Cemgil et al." in text
    assert "- `run`, commit `abc`" in text
    assert "- `color_mnist_beta_vae_2`, `color_mnist_se_0.1`: 50 class-stratified" in text


def test_numbers_of_another_model_are_corrected():
    changed = {each.at: each for each in printed() if corrected(each) != each}
    assert {at: (each.value, corrected(each).value) for at, each in changed.items()} == {
        "0.1": ("0.75", "0.50"),
        "0.2": ("0.5", "0.38"),
    }
    nested = TABLE_3["color_mnist_beta_vae_2"]["none"]["ms_ssim"]
    assert nested == {at: float(corrected(each).value) for at, each in changed.items()}


def test_printed_numbers_meet_the_cell_that_they_are_of(tmp_path):
    def entry(value):
        return {"estimate": value, "low": value, "high": value, "standard_error": 0.0}

    def cell(start):
        accuracy = {"correct": entry(start + 0.1), "unchanged": entry(start + 0.2)}
        return {"ms_ssim": entry(start), "mse": entry(578.7), "accuracy": {"class": accuracy}}

    radii = {
        "0": {"encoder": {"none": cell(0.8), "hmc": cell(0.3)}},
        "0.1": {"encoder": {"none": cell(0.7)}, "class": {"none": cell(0.1)}},
    }
    (tmp_path / "published").mkdir()
    found = {
        "study": "published", "name": "mnist_vae", "command": "run", "radii": radii,
        "config": {
            "num_references": 50, "num_restarts": 2, "dataset": "mnist_subset", "model": "mnist_vae"
        },
        "provenance": {"commit": "abc", "torch": "2", "threads": 1},
    }  # fmt: skip
    (tmp_path / "published" / "mnist_vae.json").write_text(json.dumps(found))
    text = "\n".join(SECTIONS["table_2"](tmp_path, tmp_path))
    for row in (
        "| MNIST, VAE | ms_ssim[paper], radius 0.1 | 0.70 (0.02) | 0.70 [0.70, 0.70] | 0.00 [",
        "| MNIST, VAE | class, clean | 0.90 (0.04) | 0.90 [0.90, 0.90] |",
        "| MNIST, VAE | class, radius 0.1 | 0.08 (0.04) | 0.30 [0.30, 0.30] | 0.22 [",
        "| MNIST, VAE + HMC | class, clean | 0.76 (0.01) | 0.40 [",
        "| MNIST, VAE | MSE | 578.7 | 578.7 [578.7, 578.7] | 0.0 [",
    ):
        assert row in text
    # Radius 0.1 of the classes, both clean ones, and the similarity; MSE of HMC is 478.1.
    assert "Of 6 printed numbers that are measured, ours differs from 3 by more than" in text
    assert "For 2 no error is printed, and their intervals have ours alone." in text
    assert "- `mnist_vae`: 50 class-stratified references of `mnist_subset`, not of" in text
    assert "set, from 2 starts each." in text


def test_rows_of_nvae_stand_in_figure_3(tmp_path):
    assert examples_figure(tmp_path) is None
    shades = [torch.full((2, 1, 28, 28), shade / 5) for shade in range(1, 6)]
    seen = {"none": shades[:4], "hmc": [*shades[:3], shades[4]]}
    cells = {name: {"examples": picture(rows)} for name, rows in seen.items()}
    groups = {"2": {"defences": {}}, "10": {"defences": cells}}
    (tmp_path / "nvae").mkdir()
    (tmp_path / "nvae" / "mnist_nvae_radius_0.1.json").write_text(json.dumps({"groups": groups}))
    figure = examples_figure(tmp_path)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_title() == "MNIST, NVAE"
    pixels = axes.images[0].get_array()
    centres = [float(pixels[int((row + 0.5) * len(pixels) / 5), 15, 0]) for row in range(5)]
    assert centres == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=0.01)


def test_numbers_in_words_are_those_of_results():
    """What sentences say of Figures 5, 10, 11 and 13, Table 3 and the mode."""
    knowledge = json.loads((RESULTS / "figures" / "mnist.json").read_text())["knowledge"]

    def value(radius, attacker, name):
        return f"{knowledge[radius][attacker]['ms_ssim'][name]['estimate']:.2f}"

    said = ITEMS["figure_11"].why
    for radius in ("0.1", "0.2"):
        for name in ("defended", "images"):
            assert value(radius, "with_mcmc", name) in said
    above, overlapping, parts = 0, 0, []
    for dataset, title in (("mnist", "MNIST"), ("fashion_mnist", "Fashion-MNIST")):
        found = json.loads((RESULTS / "figures" / f"{dataset}.json").read_text())["knowledge"]
        ends = []
        for radius in found:
            cell = found[radius]["without_mcmc"]["ms_ssim"]
            one, other = cell["undefended"], cell["defended"]
            above += other["estimate"] > one["estimate"]
            overlapping += other["low"] <= one["high"]
            ends.append(f"{one['estimate']:.2f} to {other['estimate']:.2f}")
        parts.append(f"{title} {', '.join(ends)}")
    assert (above, overlapping) == (11, 12)
    assert "; ".join(parts) in ITEMS["figure_10"].why
    radii = json.loads((RESULTS / "published" / "color_mnist_radii.json").read_text())["radii"]
    assert f"{radii['0.1']['encoder']['none']['ms_ssim']['estimate']:.2f}" in ITEMS["table_3"].why
    orders = {}
    for radius, cells in radii.items():
        images, found = (cells["encoder"]["none"][key] for key in ("ms_ssim_images", "ms_ssim"))
        orders[radius] = (found["low"] > images["high"]) - (found["high"] < images["low"])
    assert [radius for radius, order in orders.items() if order == 1] == ["0.05", "0.1"]
    assert [radius for radius, order in orders.items() if order == 0] == [
        "0.2",
        "0.3",
        "0.4",
        "0.5",
    ]
    apgd = json.loads((RESULTS / "attack" / "color_mnist_vae.json").read_text())["radii"]
    for radius in ("0.1", "0.2"):
        assert f"{apgd[radius]['none']['ms_ssim']['estimate']:.2f}" in ITEMS["table_3"].why
    for dataset in ("mnist", "fashion_mnist", "color_mnist"):
        cells = json.loads((RESULTS / "compare" / f"{dataset}.json").read_text())["radii"]
        for radius in ("0.1", "0.2"):
            for mode, chain in (("mode", "hmc"), ("aware_mode", "aware")):
                one, other = (cells[radius][name] for name in (mode, chain))
                assert one["ms_ssim"]["estimate"] > other["ms_ssim"]["estimate"]
                assert one["gradients_per_image"] * 3 < other["gradients_per_image"]
    for found in json.loads((RESULTS / "benchmark" / "seconds.json").read_text())[
        "models"
    ].values():
        ours = seconds_at(found["ours"], 25)
        assert 80 < published_seconds(found, 500) / ours < 125


def test_the_page_is_written_of_results():
    assert page(RESULTS, RESULTS.parent / "images").splitlines()[2:] == [
        line.replace("](../images/", f"]({RESULTS.parent / 'images'}/")
        for line in (RESULTS / "paper.md").read_text().splitlines()[2:]
    ]


def test_table_4_has_its_numbers_beside_ours(capsys):
    assert main(["table", "4", "--results", str(RESULTS / "attack")]) == 0
    text = capsys.readouterr().out
    result = json.loads((RESULTS / "attack" / "color_mnist_tcvae_2.json").read_text())
    ours = result["radii"]["0.2"]["hmc"]["accuracy"]["color"]["unchanged"]
    value, low, high = (ours[part] for part in ("estimate", "low", "high"))
    assert f"{value:.2f} [{low:.2f}, {high:.2f}] (0.72)" in text
    assert text.count("β-TCVAE, β = 2; HMC, the paper's target") == 4
    assert text.strip() == (RESULTS / "attack" / "table_4.md").read_text().strip()
