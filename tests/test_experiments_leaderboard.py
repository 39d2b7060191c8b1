"""The leaderboard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from studies import change

from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.leaderboard import write_leaderboard
from pyro_vae_defence.experiments.robustness import Robustness

RESULTS = Path(__file__).resolve().parents[1] / "docs/results"


@pytest.fixture
def results(tmp_path):
    for path in RESULTS.glob("robustness*/*.json"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name)
    return tmp_path


@pytest.fixture
def earlier_controls(results):
    """Which count as reliable without Square, and keep but the worst case of each image."""
    path = results / "robustness_controls/mnist_radius_0.2.json"
    for name in json.loads(path.read_text())["reports"]:
        change(path, ["reports", name, "unreliable"], False)
        change(path, ["reports", name, "reasons"], [])
        change(path, ["reports", name, "values"], {})


def ranking(results, model="`mnist_vae`, 0.2, 20"):
    """Rows of a model, radius and number of images in the first table."""
    page = write_leaderboard(results).read_text().split("<details>")[0]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines()]
    return [row[1:] for row in rows if f"{row[0]} |".startswith(model)]


def test_the_leaderboard_is_what_its_command_writes(results, capsys):
    assert main(["leaderboard", str(results)]) == 0
    assert capsys.readouterr().out.startswith("wrote ")
    assert (results / "leaderboard.md").read_text() == (RESULTS / "leaderboard.md").read_text()


def test_the_worst_case_ranks_and_figures_stand_in_their_places(results):
    hmc = results / "robustness/mnist_radius_0.2.json"
    report = ["reports", "classification/hmc"]
    attacks = json.loads(hmc.read_text())["reports"]["classification/hmc"]["attacks"][:1]
    change(hmc, [*report, "attacks"], attacks)
    for number, places in enumerate(
        [["clean", "mean"], ["robust", "mean"], ["attacks", 0, "figure"]], 1
    ):
        found = {"estimate": 0.89 + number / 100, "low": 0.1, "high": 1.0, "num_images": 20}
        change(hmc, report + places, found)
    change(hmc, [*report, "unreliable"], False)
    cells = [f"{0.89 + number / 100:.2f} [0.10, 1.00]" for number in (1, 3, 2)]
    assert ranking(results)[0] == ["HMC, the paper's target", *cells]
    # What one attack leaves everywhere is no less than the worst case.
    found = {"estimate": 0.85, "low": 0.1, "high": 1.0, "num_images": 20}
    change(hmc, [*report, "attacks", 0, "figure"], found)
    assert ranking(results)[0] == [
        "HMC, the paper's target",
        cells[0],
        *["0.85 [0.10, 1.00]"] * 2,
    ]
    change(hmc, [*report, "attacks"], [])
    change(hmc, [*report, "unreliable"], True)
    assert f"{cells[-1]} *?*" in [row[-1] for row in ranking(results)]


@pytest.mark.usefixtures("earlier_controls")
def test_an_unreliable_report_stands_below_all_reliable_ones(results):
    suite = results / "robustness/mnist_radius_0.2.json"
    aware = ["reports", "classification/aware", "unreliable"]

    def names():
        rows = ranking(results)
        marks = [row[-1].endswith("*?*") for row in rows]
        assert marks == sorted(marks)
        return [row[0].split(" δ")[0] for row in rows]

    filters = ["control: dark-pixel clipping", "control: median filter"]
    chains = ["MCMCDefence.recommended", "HMC, perturbation-aware", "HMC, the paper's target"]
    assert names() == [*filters, "no defence", *chains]
    change(suite, aware, False)
    assert names() == [chains[1], *filters, "no defence", chains[0], chains[2]]
    assert "then those marked *?*" in write_leaderboard(results).read_text().split("##")[0]


def test_the_recommended_defence_itself_has_a_name_and_chains_of_its_own(results):
    """Its directory is picked up, and stands beside the chains that share its target."""
    names = [row[0] for row in ranking(results)]
    assert (
        names.index("MCMCDefence.recommended δ = radius")
        == names.index("HMC, perturbation-aware δ = radius") - 1
    )
    settings = write_leaderboard(results).read_text().split("## Settings")[1]
    start = "- `mnist_vae`, 0.2 (MCMCDefence.recommended"
    (line,) = (line for line in settings.splitlines() if line.startswith(start))
    chains = "4 chains of 15 warm-up + 10 kept transitions from step size 0.2, burn-in 30"
    assert line.endswith(f"; {chains}")


def test_other_images_or_attacks_are_another_ranking(results):
    before = [row[0] for row in ranking(results)]
    change(results / "robustness_controls/mnist_radius_0.2.json", ["config", "seed"], 1)
    after = [row[0] for row in ranking(results)]
    assert sorted(before) == sorted(after)
    filters = ["control: dark-pixel clipping δ = radius", "control: median filter"]
    assert after[-2:] == filters
    # Their title says that they are not of the ranking above.
    other = ranking(results, "`mnist_vae`, 0.2, 20, setting 2 |")
    assert [row[0] for row in other] == filters


def test_another_classifier_is_another_ranking_and_named(results):
    path = results / "robustness_controls/mnist_radius_0.2.json"
    change(path, ["config", "classifier"], "another_classifier")
    assert ranking(results, "`mnist_vae`, 0.2, 20, setting 2 |")
    settings = write_leaderboard(results).read_text().split("## Settings")[1]
    assert settings.count(" by `another_classifier`") == 1


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["config", "budget", "black_box_steps"], 1),
        (["config", "budget", "persistent_transitions"], None),
        (["config", "budget", "selection_draws"], 50),
        (["config", "budget", "iterates"], 3),
        (["weights", "mnist_vae"], "0" * 64),
        (["weights", "mnist_vae_classifier"], "0" * 64),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_another_budget_or_other_weights_are_another_ranking(results, place, value):
    """Who was attacked less, or is of another model of the same name, is not above the others."""
    change(results / "robustness_controls/mnist_radius_0.2.json", place, value)
    other = {row[0] for row in ranking(results, "`mnist_vae`, 0.2, 20, setting 2 |")}
    filters = {"control: dark-pixel clipping δ = radius", "control: median filter"}
    assert other == filters or (other and not other & filters)
    # Similarities are no classifier's.
    again = write_leaderboard(results).read_text().split("## Similarity")[1]
    assert ("`mnist_vae`, 0.2, 20, setting 2 |" in again) == (place[-1] != "mnist_vae_classifier")


def test_a_seed_that_attackers_know_is_said_with_the_one_run_there_is(results):
    path = results / "robustness_controls/mnist_radius_0.2.json"
    change(path, ["config", "defence_seed"], 7)
    change(path, ["config", "budget", "scoring_draws"], 5)
    settings = write_leaderboard(results).read_text().split("## Settings")[1]
    (line,) = (line for line in settings.splitlines() if "attackers know" in line)
    assert "1 scored draw of a seed that attackers know" in line
    result = json.loads(path.read_text())
    section = Robustness.section(result, [])
    assert "worst case over attacks that know the defence's seed, 7, 95% intervals" in section
    assert "worst of 1 draws" in section
    result["config"]["defence_seed"] = None
    section = Robustness.section(result, [])
    assert "worst case over attacks on fresh seeds" in section
    assert "worst of 5 draws" in section


def test_what_only_judges_a_report_or_was_no_choice_before_makes_no_other_ranking(results):
    path = results / "robustness_controls/mnist_radius_0.2.json"
    for name, value in {"check_draws": 1, "max_evaluations": None, "iterates": 1}.items():
        change(path, ["config", "budget", name], value)
    assert not ranking(results, "`mnist_vae`, 0.2, 20, setting 2 |")


def test_two_results_of_one_defence_or_none_at_all(results, tmp_path):
    shutil.copytree(results / "robustness", results / "robustness_again")
    with pytest.raises(ValueError, match="two results of 'none' in one setting"):
        write_leaderboard(results)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no result files"):
        write_leaderboard(tmp_path / "empty")


class TestMoreAttacks:
    """The same chains, evaluated again."""

    @pytest.fixture
    def again(self, results):
        path = results / "robustness_again/mnist_radius_0.2.json"
        path.parent.mkdir()
        result = json.loads((results / "robustness/mnist_radius_0.2.json").read_text())
        report = result["reports"]["classification/aware"]
        report["robust"]["mean"] = {"estimate": 0.1, "low": 0.0, "high": 0.2, "num_images": 20}
        result["reports"] = {"classification/aware": report}
        result["config"]["attacks"] += ["evidence", "unroll"]
        path.write_text(json.dumps(result))
        return path

    def test_those_on_chains_alone_rank_beside_defences_without_a_chain(self, results, again):
        rows = ranking(results)
        aware = [row for row in rows if row[0].startswith("HMC, perturbation-aware")]
        assert [row[-1] for row in aware] == ["0.10 [0.00, 0.20] *?*"]
        assert not ranking(results, "`mnist_vae`, 0.2, 20, setting 2 |")

    def test_those_that_others_could_have_had_are_another_ranking(self, results, again):
        attacks = json.loads(again.read_text())["config"]["attacks"]
        change(again, ["config", "attacks"], [*attacks, "square"])
        titles = "`mnist_vae`, 0.2, 20 |", "`mnist_vae`, 0.2, 20, setting 2 |"
        assert sorted(len(ranking(results, title)) for title in titles) == [1, 6]

    def test_other_chains_or_other_attacks_are_told_from_the_first(self, results, again):
        change(again, ["config", "chain", "num_steps"], 7)
        with pytest.raises(ValueError, match="two results of 'aware' in one setting"):
            write_leaderboard(results)
        first = results / "robustness/mnist_radius_0.2.json"
        change(again, ["config", "chain"], json.loads(first.read_text())["config"]["chain"])
        attacks = json.loads(again.read_text())["config"]["attacks"]
        change(again, ["config", "attacks"], [name for name in attacks if name != "truncated"])
        with pytest.raises(ValueError, match="two results of 'aware' in one setting"):
            write_leaderboard(results)


class TestWhichToPrefer:
    SUITE = "robustness/mnist_radius_0.2.json"
    CLIP = "the best control (dark-pixel clipping δ = radius)"

    @pytest.fixture
    def results(self, results):
        """Worst cases as they were chosen: no single attack leaves less."""
        for place in (self.SUITE, "robustness_controls/mnist_radius_0.2.json"):
            for key in json.loads((results / place).read_text())["reports"]:
                change(results / place, ["reports", key, "attacks"], [])
        return results

    def said(self, results, what="accuracy"):
        """The line of a ranking, and verdicts of its defences."""
        page = write_leaderboard(results).read_text().split("<!-- end preferred")[0]
        (line,) = (x for x in page.splitlines() if x.startswith(f"- `mnist_vae`, 0.2, 20, {what}:"))
        rows = [line.strip("| ").split(" | ") for line in page.splitlines()]
        verdicts = {row[2]: row[0] for row in rows if row[1:2] == [f"`mnist_vae`, 0.2, 20, {what}"]}
        return line.partition(": ")[2], verdicts

    @pytest.mark.usefixtures("earlier_controls")
    def test_an_unreliable_lead_is_not_preferred_and_a_reliable_one_is(self, results):
        control = results / "robustness_controls/mnist_radius_0.2.json"
        change(control, ["reports", "classification/dark_clip", "per_image"], [0.5] * 20)
        line, verdicts = self.said(results)
        aware = "HMC, perturbation-aware δ = radius"
        assert verdicts[aware] == "ahead in an unreliable report"
        assert verdicts["HMC, the paper's target"] == "worse"
        assert line.startswith(f"**none** is to be preferred to {self.CLIP}; ahead in an")
        place = ["reports", "classification/aware"]
        change(results / self.SUITE, [*place, "unreliable"], False)
        change(results / self.SUITE, [*place, "reasons"], [])
        line, verdicts = self.said(results)
        assert verdicts[aware] == "better"
        assert line.startswith(f"**{aware}** is to be preferred to {self.CLIP}; better: {aware};")
        # A control that nobody has attacked properly beats no one.
        change(control, ["reports", "classification/dark_clip", "reasons"], ["weak"])
        verdicts = self.said(results)[1]
        assert verdicts["HMC, the paper's target"] == "behind an unreliable report"

    def test_it_says_how_many_images_were_compared(self, results):
        """Not those of the first report of the ranking, which may have others."""
        place = ["reports", "classification/none"]
        found = {"estimate": 0.999, "low": 0.9, "high": 1.0, "num_images": 25}
        change(results / self.SUITE, [*place, "robust", "mean"], found)
        change(results / self.SUITE, [*place, "unreliable"], False)
        assert ranking(results, "`mnist_vae`, 0.2, 25 |")[0][0] == "no defence"
        assert len(self.said(results)[1]) == 3

    def test_none_can_be_told_apart(self, results):
        for kind in ("hmc", "aware"):
            change(
                results / self.SUITE, ["reports", f"classification/{kind}", "per_image"],
                [1.0] * 16 + [0.0] * 4,
            )  # fmt: skip
        (results / "robustness_recommended/mnist_recommended_0.2.json").unlink()
        line, verdicts = self.said(results)
        assert line == f"**none** can be told apart from {self.CLIP}."
        assert set(verdicts.values()) == {"not told apart"}

    @pytest.mark.usefixtures("earlier_controls")
    def test_other_images_are_not_paired(self, results):
        """A part of the images, or without a control, says nothing."""
        control = results / "robustness_controls/mnist_radius_0.2.json"
        for name in ("dark_clip", "median"):
            change(control, ["reports", f"classification/{name}", "per_image"], [1.0] * 19)
        line, verdicts = self.said(results)
        assert line == f"no defence is known image by image on the images of {self.CLIP}."
        assert not verdicts
        for folder in ("robustness_controls", "robustness_protocol"):
            shutil.rmtree(results / folder)
        page = write_leaderboard(results).read_text()
        assert "so that nothing can be preferred: " in page
        assert "`mnist_vae`, 0.2, 20;" in page
        assert "| verdict |" not in page


def test_values_of_images_that_were_not_kept_are_not_paired(results):
    """The single attack that leaves less than the worst case of an earlier version."""
    page = write_leaderboard(results).read_text().split("<!-- end preferred")[0]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines()]
    of = [row[2] for row in rows if row[1:2] == ["`fashion_mnist_vae`, 0.2, 20, accuracy"]]
    assert of == ["MCMCDefence.recommended δ = radius"]


def test_a_ranking_says_how_classes_are_read_and_whether_the_seed_is_known(results):
    protocol = results / "robustness_protocol"
    shutil.copy(protocol / "mnist_protocol_0.1.json", protocol / "other.json")
    change(protocol / "other.json", ["name"], "other")
    change(protocol / "other.json", ["config", "defence_seed"], 3)
    change(protocol / "other.json", ["config", "reading"], "vote")
    page = write_leaderboard(results).read_text()
    clip = "| control: dark-pixel clipping δ = radius | 0.98 "
    assert page.count(f"| `mnist_vae`, 0.1, 100 {clip}") == 2  # in short, and with all columns
    assert page.count(f"| `mnist_vae`, 0.1, 100, read `vote`, seed known {clip}") == 2


def test_the_mode_of_its_target_is_a_rival_of_a_chain(results):
    """On the same images; where it was not attacked, the control is the only one."""
    page = write_leaderboard(results).read_text().split("<!-- end preferred")[0]
    aware, mode = "HMC, perturbation-aware δ = radius", "mode, perturbation-aware δ = radius"
    start = f"- `fashion_mnist_vae`, 0.1, 100, accuracy: **{aware}** is to be preferred to the "
    (line,) = (x for x in page.splitlines() if x.startswith(start + mode))
    assert line.endswith(f", of the same target; better: {aware}.")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines()]
    of = "`fashion_mnist_vae`, 0.1, 100"
    rivals = [row[3] for row in rows if row[2:3] == [aware] and row[1].startswith(of)]
    assert rivals.count(mode) == 1
    assert not any(row[2:4] == [mode, mode] for row in rows)
    for names in ("*_mode_*.json", "*_reconstruction_*.json", "color_*.json"):
        for path in (results / "robustness_protocol").glob(names):
            path.unlink()
    assert mode not in write_leaderboard(results).read_text()


def test_reconstructions_are_ranked_together_whoever_reads_classes(results):
    page = write_leaderboard(results).read_text()
    start = "- `mnist_vae`, 0.2, 100, similarity: "
    lines = [line for line in page.splitlines() if line.startswith(start)]
    assert ["best control" in line for line in lines] == [True, False]
    assert "to be preferred to the mode, perturbation-aware" in lines[1]
