"""Numbers in the prose of pages are those of the result files."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_vae_defence.experiments import study, tables
from pyro_vae_defence.experiments.bound import _values
from pyro_vae_defence.experiments.study import interval, shown
from pyro_vae_defence.robustness import RobustnessReport, paired_difference

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"


@functools.cache
def page(name: str) -> str:
    """A page's words, without its line ends."""
    return " ".join((ROOT / "docs" / name).read_text().split())


def says(name: str, *texts: str) -> None:
    assert [text for text in texts if text not in page(name)] == []


@functools.cache
def compared(dataset: str) -> dict[str, Any]:
    return shown(RESULTS / "compare" / f"{dataset}.json")


def read(dataset: str, radius: str, name: str, kind: str = "attacked") -> dict[str, float]:
    """Share of classes read right, in the reading of the main table."""
    accuracy = compared(dataset)["radii"][radius][name]["accuracy"]["class"]
    reading = accuracy.get("reencoded/mean") or next(iter(accuracy.values()))
    return reading[kind]["correct"]


def share(entry: dict[str, float]) -> str:
    return tables.interval(entry, 2)


@functools.cache
def suites(folder: str = "robustness_protocol") -> dict[str, dict[str, Any]]:
    return study.read(RESULTS / folder, "robustness")


@functools.cache
def report(name: str, defence: str, target: str = "classification") -> RobustnessReport:
    return RobustnessReport.from_dict(suites()[name]["reports"][f"{target}/{defence}"])


def test_what_a_radius_costs_and_what_an_unknown_one_keeps():
    fashion = [read("fashion_mnist", "0.2", name) for name in ("aware_unknown", "none", "aware")]
    says(
        "choosing_a_defence.md",
        f"leaves {share(read('fashion_mnist', '0.2', 'aware', 'clean'))} of the clean classes of "
        "1,000 images",
        f"where {share(compared('fashion_mnist')['clean']['class'])} are read right",
        f"keeps {share(fashion[0])} of the classes, and no defence {share(fashion[1])}, where δ = "
        f"0.2 keeps {share(fashion[2])}",
        f"on MNIST it keeps {share(read('mnist', '0.2', 'aware_unknown'))}",
        f"{share(read('fashion_mnist', '0.1', 'aware_0.2'))} of the classes of Fashion-MNIST at",
        f"{share(read('fashion_mnist', '0.2', 'aware_0.1'))} at radius 0.2",
    )
    assert compared("fashion_mnist")["config"]["num_images"] == 1000


# The page, a defence that leaves more, another one, each by suite and name, and what they are of.
DIFFERENCES = {
    "adaptive_attacks.md": [
        ("fashion_mnist_unrolled_0.1/aware", "fashion_mnist_protocol_0.1/dark_clip"),
        ("fashion_mnist_unrolled_0.1/aware", "fashion_mnist_mode_0.1/aware_mode"),
        ("mnist_unrolled_0.1/aware", "mnist_protocol_0.1/dark_clip"),
        ("mnist_unrolled_0.2/aware", "mnist_protocol_0.2/dark_clip"),
        ("mnist_mode_0.2/aware_mode", "mnist_protocol_0.2/dark_clip"),
        ("fashion_mnist_mode_0.1/aware_mode", "fashion_mnist_protocol_0.1/dark_clip"),
        ("fashion_mnist_mode_0.2/aware_mode", "fashion_mnist_protocol_0.2/dark_clip"),
        ("fashion_mnist_unrolled_0.2/aware", "fashion_mnist_protocol_0.2/dark_clip"),
        ("fashion_mnist_unrolled_0.2/aware", "fashion_mnist_mode_0.2/aware_mode"),
        ("fashion_mnist_vote_0.1/recommended", "fashion_mnist_vote_0.1/dark_clip"),
        ("color_mnist_textured_protocol_0.1/hmc", "color_mnist_textured_protocol_0.1/mode"),
        ("color_mnist_textured_protocol_0.1/hmc", "color_mnist_textured_protocol_0.1/aware_mode"),
        ("color_mnist_textured_protocol_0.2/hmc", "color_mnist_textured_protocol_0.2/median"),
        ("color_mnist_textured_protocol_0.2/hmc", "color_mnist_textured_protocol_0.2/mode"),
        ("color_mnist_textured_protocol_0.2/hmc", "color_mnist_textured_protocol_0.2/aware_mode"),
    ],
    "choosing_a_defence.md": [
        ("mnist_unrolled_0.2/aware", "mnist_protocol_0.2/dark_clip"),
        ("fashion_mnist_unrolled_0.1/aware", "fashion_mnist_protocol_0.1/dark_clip"),
        ("fashion_mnist_unrolled_0.1/aware", "fashion_mnist_mode_0.1/aware_mode"),
        ("fashion_mnist_unrolled_0.2/aware", "fashion_mnist_protocol_0.2/dark_clip"),
        ("fashion_mnist_unrolled_0.2/aware", "fashion_mnist_mode_0.2/aware_mode"),
        ("color_mnist_textured_protocol_0.1/hmc", "color_mnist_textured_protocol_0.1/mode"),
        ("color_mnist_textured_protocol_0.2/hmc", "color_mnist_textured_protocol_0.2/median"),
    ],
}


def difference(one: RobustnessReport, other: RobustnessReport) -> str:
    seeded = torch.Generator().manual_seed(0)
    return share(paired_difference(one, other, generator=seeded)._asdict())


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_between_defences_whose_attackers_know_them(name):
    for pair in DIFFERENCES[name]:
        one, other = (report(*each.split("/")) for each in pair)
        says(name, difference(one, other))
    mode, clip = (
        report(f"mnist_{suite}_0.2", defence, "reconstruction")
        for suite, defence in (("reconstruction", "aware_mode"), ("protocol", "dark_clip"))
    )
    chain = report("mnist_reconstruction_0.2", "aware", "reconstruction")
    says(name, f"{difference(mode, clip)} more than clip", f"{difference(mode, chain)} more than")
    assert all(found.reliable for found in (mode, clip, chain))


def test_similarities_of_fashion_mnist_that_attackers_leave():
    clip = report("fashion_mnist_protocol_0.2", "dark_clip", "reconstruction")
    mode, chain = (
        report("fashion_mnist_reconstruction_0.2", name, "reconstruction")
        for name in ("aware_mode", "aware")
    )
    says(
        "adaptive_attacks.md",
        f"which is {difference(mode, clip)} more than clipping keeps",
        f"from the mode ({difference(chain, mode)} more)",
        f"keeps {difference(chain, clip)} more than clipping",
    )


def test_which_reports_pass_their_checks():
    failed = {
        f"{name}/{key}"
        for name, suite in suites().items()
        for key, found in suite["reports"].items()
        if found["unreliable"]
    }
    assert failed == {
        "fashion_mnist_protocol_0.1/classification/aware",
        "mnist_protocol_0.1/classification/aware",
    }
    says("adaptive_attacks.md", "At radius 0.2 all reports of classes, and those of")
    vote = report("fashion_mnist_vote_0.1", "recommended").robust["mean"]
    says("adaptive_attacks.md", f"leaves {share(vote)} of the classes, in a report that passes")
    annealed = shown(RESULTS / "trials" / "annealed" / "fashion_mnist_radius_0.1.json")["reports"]
    kept = {share(found["robust"]["mean"]) for found in annealed.values()}
    says(
        "method.md", f"leave {kept.pop()} of the classes with either start", "both reports are unr"
    )
    assert not kept
    assert all(found["unreliable"] for found in annealed.values())


STUDIED = ("none", "dark_clip", "median", "gaussian", "mode", "hmc", "aware_mode")


def kept_on_textures(radius: str) -> dict[str, str]:
    suite = f"color_mnist_textured_protocol_{radius}"
    return {name: share(report(suite, name).robust["mean"]) for name in STUDIED}


def test_controls_that_adaptive_attackers_have_met_on_textured_backgrounds():
    gaussian, median = (
        read("color_mnist_textured", "0.2", name) for name in ("gaussian", "median")
    )
    assert gaussian["low"] > median["high"]
    kept = kept_on_textures("0.2")
    assert {kept[name] for name in STUDIED if name not in ("hmc", "aware_mode")} == {kept["none"]}
    assert kept["none"].startswith("0.00")
    says(
        "choosing_a_defence.md",
        f"leave {kept['hmc']} of the classes behind four such chains",
        f"{kept['aware_mode']} behind the mode of the perturbation-aware target, and nothing",
    )
    says("adaptive_attacks.md", f"keeps {kept['aware_mode']}, and is not told apart", "All reports")
    kept = kept_on_textures("0.1")
    says(
        "adaptive_attacks.md",
        f"leave {kept['hmc']} of the classes of 100 images behind the chains",
        f"the mode of the chains' target, {kept['mode']}; of the Gaussian filter",
        f"filter {kept['gaussian']} is left, of the median {kept['median']}, of clipping nothing",
        f"and of no defence {kept['none']}",
        f"target keeps {kept['aware_mode']}",
    )
    says("choosing_a_defence.md", f"{kept['hmc']} behind the chains, {kept['aware_mode']}")


def test_what_the_defenders_radius_changes():
    bounds = shown(RESULTS / "bound" / "mnist_validation.json")["bounds"]
    kept = {key: _values(found.values(), "log_ratio").sigmoid() for key, found in bounds.items()}
    own, twice = (
        torch.stack([of for key, of in kept.items() if float(key.split()[1]) == ratio])
        for ratio in (1.0, 2.0)
    )
    found = interval((twice - own).mean(0), bounds=(-1.0, 1.0))
    shares = [", ".join(f"{value:.2f}" for value in of.mean(1)[:3]) for of in (twice, own)]
    last = [f"{of[3].mean():.2f}" for of in (twice, own)]
    said = " in place of ".join(f"{s} and {l}" for s, l in zip(shares, last, strict=True))
    says("mass_bound.md", said.replace(" in place", " of them in place"), f"{share(found)} more")


def test_attacks_by_another_optimiser():
    """What the page of the paper says of models that were trained otherwise."""
    fashion = [shown(p)["radii"] for p in sorted((RESULTS / "attack").glob("fashion*.json"))]
    unchanged = {
        (name, radius): [of[radius][name]["accuracy"]["class"]["unchanged"] for of in fashion]
        for name in ("hmc", "aware_0.2", "dark_clip_0.2")
        for radius in ("0.1", "0.2")
    }

    def span(name: str, radius: str) -> str:
        found = [entry["estimate"] for entry in unchanged[name, radius]]
        return f"{min(found):.2f} to {max(found):.2f}"

    says("paper.md", f"{span('hmc', '0.1')} unchanged", f"keeps {span('aware_0.2', '0.2')} of")
    says("paper.md", f"where clipping keeps {span('dark_clip_0.2', '0.2')}")
    pairs = list(zip(unchanged["aware_0.2", "0.2"], unchanged["dark_clip_0.2", "0.2"], strict=True))
    similar = [[of["0.2"][n]["ms_ssim"] for n in ("dark_clip_0.2", "aware_0.2")] for of in fashion]
    assert all(round(a["low"] - b["high"], 9) <= 0 for a, b in (*pairs, *similar))
    apart = {"0.1": 0, "0.2": 0}
    for path in (RESULTS / "attack").glob("mnist_*.json"):
        for radius in apart:
            cells = shown(path)["radii"][radius]
            chain, clip = (cells[name] for name in ("aware_0.2", "dark_clip_0.2"))
            apart[radius] += chain["ms_ssim"]["low"] > clip["ms_ssim"]["high"]
            one, other = (cell["accuracy"]["class"]["unchanged"] for cell in (chain, clip))
            assert one["low"] <= other["high"]
    assert apart == {"0.1": 0, "0.2": 6}
    says("paper.md", "keeps more behind six of the eight models")


def test_gains_of_the_hierarchy():
    gained, left = [], []
    for radius in ("0.1", "0.2"):
        found = shown(RESULTS / "nvae" / f"mnist_nvae_radius_{radius}.json")
        floor = found["noise_floor"]["estimate"]
        for cells in (group["defences"] for group in found["groups"].values()):
            none, hmc, aware = (
                cells[name]["ms_ssim"]["estimate"] for name in ("none", "hmc", "aware")
            )
            gained.append(hmc - none)
            left.append((aware - none) / (floor - none))
    assert f"{max(gained):.2f}" == "0.05"
    assert min(left) > 0.5
    says("results/paper.md", "gains at most 0.05 of similarity, on the perturbation-aware one most")
