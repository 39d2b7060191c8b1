"""The suite: what it finds where the answer is known, and that it notices when it has been
fooled."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch
from programs import LinearGaussianVAE

from pyro_vae_defence.defence import (
    DefendedClassifier,
    MCMCDefence,
    NoDefence,
    PosteriorModeDefence,
)
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS
from pyro_vae_defence.mcmc.adaptation import FixedStepSize
from pyro_vae_defence.mcmc.unrolled import UnrolledKernel
from pyro_vae_defence.models import program
from pyro_vae_defence.ops.balls import L2, Linf
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.robustness import CHECKS, KNOWLEDGE, Budget, WhiteBox, evaluate_robustness

TINY = Budget(
    num_steps=8, num_restarts=2, num_draws=(1, 2), stable=0.0, num_chains=8, num_iterations=3,
    num_directions=12, black_box_steps=8, selection_draws=3, scoring_draws=4, check_images=10,
    check_steps=8,
)  # fmt: skip
SMALL = Budget(
    num_steps=2, num_restarts=1, num_draws=(1,), num_chains=4, num_iterations=2, num_directions=1,
    black_box_steps=1, selection_draws=1, scoring_draws=2, check_images=4, check_steps=4,
)  # fmt: skip
RADIUS = 0.3


def classify(latents):
    """Two classes, on both sides of z_0 = 0."""
    return 5.0 * torch.stack([latents[:, 0], -latents[:, 0]], 1)


def problem(num=20):
    """Images of two classes that z_0 tells apart, by less than an attack can move it."""
    vae = LinearGaussianVAE()
    vae.noise = 0.15
    labels = torch.arange(num) % 2
    # The sign of the slope of E[z_0 | x].
    _, covariance = vae.exact(torch.zeros(1, 16, dtype=torch.float64))
    direction = (covariance @ vae.weight.T)[0].sign() * (1.0 - 2.0 * labels[:, None])
    x = 0.5 + 0.17 * direction + 0.03 * torch.randn(num, 16, dtype=torch.float64)
    return vae, x.clamp(0, 1).reshape(-1, 1, 4, 4), labels


class Masked:
    """A VAE whose encoder has no useful gradient but is no more robust for it."""

    def __init__(self, vae, squash):
        self.model = vae.model
        self.guide = lambda x: vae.guide(squash(x))


MASKS = {
    "quantised": lambda x: (5 * x).round() / 5,
    "saturated": lambda x: torch.sigmoid(4000 * (x - 0.5)),
}


def run(vae, defence, x, labels, budget=TINY, **options):
    options = {"classifier": classify, "ball": Linf(RADIUS), **options}
    generator = torch.Generator().manual_seed(1)
    return evaluate_robustness(
        vae, defence, x, labels, budget=budget, generator=generator, **options
    )


def check(report, name):
    return next(c for c in report.checks if c.name == name)


@pytest.fixture(scope="module")
def undefended():
    torch.manual_seed(0)
    vae, x, labels = problem()
    return x, run(vae, NoDefence(vae), x, labels)


def test_nothing_is_left_of_an_undefended_encoder_and_the_checks_agree(undefended):
    x, report = undefended
    assert report.clean["mean"]["estimate"] > 0.9
    assert report.robust["mean"]["estimate"] < 0.1
    assert report.random_noise["estimate"] > 0.8
    assert report.reliable, report.reasons
    assert [c.passed for c in report.checks] == [True] * len(report.checks)
    assert len({c.name for c in report.checks}) == 7
    assert {outcome.name for outcome in report.attacks} == {"transfer", "encoder", "black_box"}
    assert report.skipped["unroll"] == "there is no defence behind the encoder: 'encoder' is exact"
    assert report.figure == "accuracy"
    # The images are those of the worst case, inside of the ball.
    assert report.x_adv.shape == x.shape
    assert (report.x_adv - x).abs().max() <= RADIUS
    assert 0 <= report.x_adv.min() <= report.x_adv.max() <= 1
    assert report.per_image.shape == (20,)
    assert len(report.strongest) == 20
    # The worst of several draws is no better than one draw, or their mean.
    assert report.robust["worst_of_n"]["estimate"] <= report.robust["single"]["estimate"]
    assert report.robust["worst_of_n"]["estimate"] <= report.robust["mean"]["estimate"]
    for outcome in report.attacks:
        assert report.robust["mean"]["estimate"] <= outcome.figure["estimate"] + 0.05


def test_json_says_what_was_done(undefended):
    _, report = undefended
    found = json.loads(report.to_json())
    assert found["threat_model"] == {
        "norm": "Linf", "radius": RADIUS, "target": "classification", "reading": "last",
    }  # fmt: skip
    assert found["robust"]["mean"]["num_images"] == 20
    assert found["attacks"][0]["knowledge"] == KNOWLEDGE["transfer"]
    assert found["budget"]["num_steps"] == 8
    assert set(found["versions"]) == {"pyro_vae_defence", "torch", "pyro-ppl"}
    assert found["unreliable"] is False
    assert "not certified" in found["note"]
    assert found["per_image"] == report.per_image.tolist()
    assert {"seed", "cost", "checks", "clean", "skipped", "strongest"} <= set(found)
    assert "x_adv" not in found


@pytest.mark.parametrize("mask", MASKS)
def test_gradient_masking_is_caught(mask):
    vae, x, labels = problem()
    masked = Masked(vae, MASKS[mask])
    report = run(masked, NoDefence(masked), x, labels)
    assert not report.reliable
    assert json.loads(report.to_json())["unreliable"] is True
    failed = {c.name for c in report.checks if c.passed is False}
    assert "gradients_explain_changes" in failed
    assert "loss_increases_with_iterations" in failed
    assert all(any(name in reason for reason in report.reasons) for name in failed)
    # The black box is not fooled, and the check says so.
    assert "black_box_is_not_stronger" in failed
    assert report.robust["mean"]["estimate"] < 0.5


def test_an_encoder_that_does_not_look_is_not_robust():
    vae, x, _ = problem()

    def blind(images):
        return vae.guide(x[:1].expand_as(images))

    blinded = Masked(vae, lambda x: x)
    blinded.guide = blind
    report = run(blinded, NoDefence(blinded), x, None)
    assert report.robust["mean"]["estimate"] == 1.0
    assert check(report, "whole_range_leaves_chance").passed is False
    assert check(report, "loss_increases_with_iterations").passed is False
    assert not report.reliable


HMC = functools.partial(BatchedHMC, step_size=0.04, num_steps=3)


@pytest.mark.parametrize("delta", [None, 0.1])
def test_every_attack_runs_against_a_chain(delta):
    vae, x, labels = problem(10)
    budget = Budget(
        num_steps=4, num_restarts=1, num_draws=(1,), num_chains=8, num_iterations=3,
        num_directions=4, black_box_steps=2, selection_draws=2, scoring_draws=3, check_images=6,
        check_steps=4,
    )  # fmt: skip
    perturbation = None if delta is None else Linf(delta)
    defence = MCMCDefence(vae, HMC, 1, 2, perturbation=perturbation)
    report = run(vae, defence, x, labels, budget)
    assert {outcome.name for outcome in report.attacks} == set(KNOWLEDGE)
    assert report.skipped == {}
    # The chain starts at the posterior and stays there: nothing is left at this radius without
    # delta.
    if delta is None:
        assert report.robust["mean"]["estimate"] < 0.2
        assert check(report, "finite_differences").passed
    by_name = {outcome.name: outcome for outcome in report.attacks}
    assert by_name["transfer"].evaluations == 0
    assert by_name["bpda"].evaluations > 4 * 2
    assert report.cost["defence_gradients_per_image"] > 3
    assert report.defence["defence"] == "mcmc"


def test_nuts_any_other_defence_and_readings():
    vae, x, labels = problem(8)
    nuts = MCMCDefence(vae, functools.partial(BatchedNUTS, step_size=0.04, max_tree_depth=2), 2, 2)
    named = ("unroll", "equilibrium")
    report = run(
        vae, nuts, x, labels, SMALL, attacks=named, checks=False,
        classifier=DefendedClassifier(nuts, classify, "reencoded"),
    )  # fmt: skip
    assert [outcome.name for outcome in report.attacks] == ["equilibrium", "unroll"]
    assert report.threat_model["reading"] == "reencoded"
    assert report.reasons == ("no sanity check ran",)

    def somebodys(x, generator=None):
        return NoDefence(vae)((x + 0.01).clamp(0, 1), generator)

    report = run(vae, somebodys, x, labels, SMALL)
    assert {o.name for o in report.attacks} == {
        "transfer",
        "encoder",
        "bpda",
        "implicit",
        "black_box",
    }
    assert check(report, "finite_differences").passed is None
    assert report.skipped["unroll"] == "the defence is not a chain whose transitions are known"


def test_a_report_without_a_gradient_attack_lists_every_check():
    vae, x, labels = problem(8)
    report = run(vae, NoDefence(vae), x, labels, SMALL, attacks=("black_box",))
    assert [c.name for c in report.checks] == [c.name for c in CHECKS]
    assert {c.name for c in report.checks if c.passed is None} == {
        "black_box_is_not_stronger",
        "whole_range_leaves_chance",
        "monotone_in_radius",
        "loss_increases_with_iterations",
    }


def test_the_white_box_is_the_defence_in_parts():
    vae, x, _ = problem(4)
    defence = MCMCDefence(vae, HMC, 2, 3, perturbation=Linf(0.1))
    box = WhiteBox(vae, defence, x)
    assert box.has_chain
    assert box.unrollable
    streams = Streams.create(4, seed=3)
    start = box.start(x, streams)
    assert torch.equal(start["z"], program.encode(vae, x, streams=streams)["z"])
    assert torch.equal(box.energy(x, start), program.potential(vae, x, Linf(0.1))(start))
    spent = box.evaluations
    whole = UnrolledKernel(
        lambda: HMC(program.target(vae, Linf(0.1))), box.energy, 5, warmup_steps=3
    )
    with torch.no_grad():
        assert torch.equal(box.chain(x, start, streams)["z"], whole(x, start, streams)["z"])
    assert box.evaluations > spent + 4 * 5
    # A few transitions keep the step size at which the defence arrives, or another.
    few = box.transitions(2).make_kernel()
    assert few.step_size == box.step_size != 0.04
    assert box.transitions(2, 0.01).make_kernel().step_size == 0.01
    assert isinstance(few.rule, FixedStepSize)


def test_the_white_box_of_what_has_no_known_transitions():
    vae, x, _ = problem(4)
    undefended = WhiteBox(vae, NoDefence(vae), x)
    assert not undefended.has_chain
    burn_in = MCMCDefence(vae, functools.partial(HMC, burn_in=3), 1, 1)
    assert not WhiteBox(vae, burn_in, x).unrollable
    mode = PosteriorModeDefence(vae, num_steps=4, initial="mean", perturbation=Linf(0.1))
    box = WhiteBox(vae, mode, x)
    assert box.has_chain
    assert not box.unrollable
    before = box.evaluations
    end = box.chain(x, {}, Streams.create(4, seed=1))
    assert torch.equal(end["z"], mode(x).latents["z"])
    # Counted as the defence counts itself.
    assert box.evaluations == before + int(mode(x).num_gradients.sum())


def test_reconstructions_are_scored_by_similarity():
    vae, x, _ = problem()

    def similarity(a, b):
        return (-(a - b).square().flatten(1).sum(1)).exp()

    report = run(
        vae, NoDefence(vae), x, None, classifier=None, similarity=similarity, ball=L2(1.0)
    )  # fmt: skip
    assert report.figure == "similarity"
    assert report.robust["mean"]["estimate"] < report.random_noise["estimate"]
    assert report.random_noise["estimate"] < report.undefended_clean["estimate"]
    assert report.threat_model["target"] == "reconstruction"
    assert check(report, "finite_differences").passed


def test_transfer_alone_is_not_an_evaluation_and_a_budget_is_kept():
    vae, x, labels = problem(8)
    defence = MCMCDefence(vae, HMC, 1, 1)
    report = run(vae, defence, x, labels, SMALL, attacks=("transfer", "encoder"), checks=False)
    assert "only transfer attacks ran: no attacker knew the defence" in report.reasons
    limited = dataclasses.replace(SMALL, max_evaluations=10)
    report = run(vae, defence, x, labels, limited, checks=False)
    assert report.skipped["unroll (1 draws)"] == "the budget was spent"
    assert {o.name for o in report.attacks} == {"transfer", "encoder", "bpda"}


def test_the_generator_decides():
    vae, x, labels = problem(8)
    reports = [run(vae, NoDefence(vae), x, labels, SMALL, checks=False) for _ in range(2)]
    assert torch.equal(reports[0].x_adv, reports[1].x_adv)
    first, second = (report.to_dict() for report in reports)
    assert first["robust"] == second["robust"]
    assert first["clean"] == second["clean"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.rand(1, 1, 4, 4)}, "x holds 1 image: intervals need two or more"),
        ({"defence": 3}, "defence must map images to a DefenceResult, got 3"),
        ({"ball": 0.1}, "ball must be a Ball such as Linf"),
        ({"attacks": ("fgsm",)}, r"attacks must be names among .*, got \['fgsm'\]"),
        ({"attacks": ()}, r"attacks must be names among .*, got \(\)"),
        ({"labels": torch.zeros(3)}, r"labels must have shape \(4,\), got \(3,\)"),
    ],
)
def test_mistakes(change, message):
    vae = LinearGaussianVAE()
    settings = {"defence": NoDefence(vae), "x": torch.rand(4, 1, 4, 4), **change}
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(vae, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"num_chains": 1}, "num_chains must be an integer of at least 2, got 1"),
        ({"num_draws": ()}, r"num_draws must hold integers of at least 1, got \(\)"),
        ({"stable": -1.0}, "stable must not be negative, got -1.0"),
    ],
)
def test_bad_budgets(change, message):
    with pytest.raises(ValueError, match=message):
        Budget(**change)
