"""Fidelity of gradients: truths in closed form, right and wrong estimators, chance."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from programs import LinearGaussianVAE

from pyro_vae_defence.attacks import APGD, adaptive
from pyro_vae_defence.defence import DefendedClassifier, MCMCDefence, NoDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.ops.balls import L1, L2, Linf
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.robustness import Budget, RobustnessReport, WhiteBox, evaluate_robustness
from pyro_vae_defence.robustness import fidelity as fidelities
from pyro_vae_defence.robustness.checks import CHECKS, Seen, join
from pyro_vae_defence.robustness.cost import chain_cost, suite_gradients
from pyro_vae_defence.robustness.scoring import Accuracy, Fresh
from pyro_vae_defence.robustness.suite import ATTACKS, Candidate, Row, Suite

HMC = functools.partial(BatchedHMC, step_size=0.04, num_steps=3)
BUDGET = dataclasses.replace(
    Budget.quick(), num_chains=16, check_images=16, check_draws=16, check_steps=4
)
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def linear(latents):
    """Two classes: the margin is 10 z_0, or -10 z_0 where the label is 0."""
    return 5.0 * torch.stack([latents[:, 0], -latents[:, 0]], 1)


def curved(latents):
    return torch.stack([latents.square().sum(1), torch.zeros_like(latents[:, 0])], 1)


def make_suite(
    num=16, defend=MCMCDefence, classify=linear, reading="last", ball=None, make_box=WhiteBox,
    num_chains=1,
):  # fmt: skip
    vae = LinearGaussianVAE()
    vae.noise = 0.15
    defence = NoDefence(vae)
    if defend is MCMCDefence:
        defence = MCMCDefence(vae, HMC, 2, 2, num_chains=num_chains)
    generator = torch.Generator().manual_seed(1)
    x = 0.3 + 0.4 * torch.rand(num, 1, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(num) % 2
    fresh = Fresh(0)
    box = make_box(vae, defence, x, fresh)
    scorer = Accuracy(box, x, labels, DefendedClassifier(defence, classify, reading), fresh)
    return Suite(box, scorer, x, ball or Linf(0.1), BUDGET, APGD)


def slope(suite):
    """Gradient of the expected margin of ``linear``, ``(N, 1, 4, 4)``: exact for chains too, which
    start at a draw of mean E[z | x] and keep that."""
    zero, one = (
        suite.box.vae.exact(each)[0] for each in (torch.zeros(1, 16).double(), torch.eye(16))
    )
    sign = 2.0 * suite.scorer.labels - 1.0
    return (10.0 * sign[:, None] * (one - zero)[:, 0]).view(-1, 1, 4, 4)


def of_gradient(name, gradient):
    """An estimator whose gradient is given."""

    def objective(suite, aim):
        return lambda x_ref: lambda x: (x * gradient[: len(x)]).flatten(1).sum(1)

    return Candidate(Row(name, "", objective), 1, *([None] * 4))


def of_attack(suite, name):
    row = next(row for row in ATTACKS if row.name == name)
    return Candidate(row, row.draws(suite.budget)[-1], *([None] * 4))


def measured(suite, *found):
    return fidelities.estimators(fidelities.measure(suite, found))


@pytest.mark.parametrize("defend", [NoDefence, MCMCDefence])
@pytest.mark.parametrize("reading", ["last", "mean"])
def test_differences_are_those_of_the_expectation(float64, defend, reading):
    """Common noise cancels where all that an image does is to move the posterior."""
    suite = make_suite(4, defend, reading=reading)
    ahead, behind = suite.x + 0.02 * torch.rand_like(suite.x), suite.x
    difference, error = fidelities.expected_difference(suite, ahead, behind, 5, seed=3)
    expected = (slope(suite) * (ahead - behind)).flatten(1).sum(1)
    torch.testing.assert_close(difference, expected, rtol=1e-9, atol=1e-11)
    assert (error < 1e-10).all()
    assert (error > 2e-14).all()  # what is smaller may be rounding


@pytest.mark.parametrize("reading", ["last", "mean"])
def test_errors_are_those_of_the_mean_or_of_leaving_draws_out(float64, reading):
    suite = make_suite(3, NoDefence, curved, reading)
    ahead, behind, number = suite.x + 0.05, suite.x - 0.05, 6
    difference, error = fidelities.expected_difference(suite, ahead, behind, number, seed=3)
    streams = Streams.create(3, number, seed=3)
    draws = [
        suite.box.start(x.repeat(number, 1, 1, 1), streams)["z"].view(number, 3, -1)
        for x in (ahead, behind)
    ]
    sign = 1.0 - 2.0 * suite.scorer.labels

    def damage(latents):
        return -sign * latents.square().sum(-1)

    if reading == "last":
        each = damage(draws[0]) - damage(draws[1])
        value, expected = each.mean(0), each.std(0) / math.sqrt(number)
    else:
        value = damage(draws[0].mean(0)) - damage(draws[1].mean(0))
        others = [[k for k in range(number) if k != left_out] for left_out in range(number)]
        left = torch.stack(
            [damage(draws[0][k].mean(0)) - damage(draws[1][k].mean(0)) for k in others]
        )
        expected = ((number - 1) / number * (left - left.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(difference, value)
    torch.testing.assert_close(error, 2 * expected)
    assert (expected > 1e-6).all()


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.3), L1(1.0)])
def test_a_right_gradient_is_faithful_and_wrong_ones_are_caught(float64, ball):
    suite = make_suite(ball=ball)
    right = slope(suite)
    signs = (torch.arange(16) // 2 % 2 * 2.0 - 1.0).view(-1, 1, 1, 1)  # of half of either class
    zero, one = (
        suite.box.vae.exact(each)[0] for each in (torch.zeros(1, 16).double(), torch.eye(16))
    )
    another = signs * (one - zero)[:, 1].view(1, 1, 4, 4)
    found = measured(
        suite,
        of_gradient("right", 1e-100 * right),  # gradients have any size
        of_gradient("negated", -right),
        of_gradient("zero", 0.0 * right),
        of_gradient("another", another),
    )
    good = found["right"]
    assert (good.agreement, good.right, good.images, good.chance) == (1.0, 16, 16, 2.0**-16)
    assert good.cosine == pytest.approx(1.0)
    assert good.share == 1.0
    assert good.reached
    negated = found["negated"]
    assert (negated.agreement, negated.right, negated.images, negated.chance) == (0, 0, 16, 1)
    assert negated.cosine == pytest.approx(-1.0)
    assert negated.share == pytest.approx(-1.0)
    assert (found["zero"].agreement, found["zero"].cosine, found["zero"].share) == (0, 0, 0)
    # The wrong objective goes up for as many images as down.
    assert abs(found["another"].cosine) < 0.1
    assert abs(found["another"].share) < 0.1
    assert abs(found["another"].agreement - 0.5) < 0.1
    assert [name for name, each in found.items() if each.reached] == ["right"]


class Chaotic(WhiteBox):
    """A chain whose end is an exact draw of the posterior for every image, and jumps with it."""

    def chain(self, x, start, streams):
        mean, covariance = self.vae.exact(x)
        weights = streams.normal(0, 8, (16,), x.dtype)
        phase = streams.uniform(0, 9, (mean.shape[1],), x.dtype)
        phase = (phase + 300.0 * (weights * x.flatten(1)).sum(1, keepdim=True)) % 1.0
        noise = torch.special.ndtri(phase.clamp(1e-12, 1 - 1e-12))
        return {"z": mean + noise @ torch.linalg.cholesky(covariance).T}


def test_of_a_chaotic_trajectory_the_frozen_gradient_says_nothing_the_equilibrium_does(float64):
    suite = make_suite(make_box=Chaotic)
    suite.box.steps = False  # whole chains at every step
    found = measured(suite, of_attack(suite, "unroll"), of_attack(suite, "equilibrium"))
    assert found["equilibrium"].reached
    assert found["equilibrium"].cosine > 0.8
    assert found["equilibrium"].share == 1.0
    assert not found["unroll"].reached
    assert abs(found["unroll"].cosine) < 0.4
    # Though it is the derivative of its trajectory.
    streams = Streams.create(16, seed=1)
    encode = adaptive.unroll(suite.box.start, suite.box.chain)
    image = suite.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(encode(image, streams)["z"][:, 0].sum(), image)
    step = 1e-9 * torch.ones_like(image)
    with torch.no_grad():
        ends = [encode(image + sign * step, streams)["z"][:, 0] for sign in (1, -1)]
    torch.testing.assert_close(
        (ends[0] - ends[1]) / 2e-9, gradient.flatten(1).sum(1), rtol=1e-3, atol=1e-3
    )


class OneNoise(WhiteBox):
    """A defence that draws one number for all images of a call."""

    def chain(self, x, start, streams):
        noise = torch.randn((), generator=torch.Generator().manual_seed(streams.seed))
        return {"z": self.vae.exact(x)[0] * (1 + noise)}


def test_draws_of_a_defence_with_one_noise_per_call_are_calls(float64):
    """Their spread over 40 seeds is what 16 draws say of it; a ratio off by 1.6 is 4 deviations."""
    suite = make_suite(num=4, make_box=OneNoise)
    suite.box.steps = False
    ahead, behind = suite.x + 0.05, suite.x - 0.05
    found = [fidelities.expected_difference(suite, ahead, behind, 16, 100 * n) for n in range(40)]
    differences, limits = map(torch.stack, zip(*found, strict=True))
    ratio = differences.std(0) / (limits / 2).square().mean(0).sqrt()
    assert ((ratio > 1 / 1.6) & (ratio < 1.6)).all(), ratio


def test_the_seed_decides_and_neighbours_do_not(float64):
    suite, again = make_suite(3), make_suite(3)
    names = ("bpda", "equilibrium")
    first, second = (
        fidelities.measure(each, [of_attack(each, name) for name in names])
        for each in (suite, again)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    part = make_suite(3)
    part = part.at(slice(0, 2))
    few = fidelities.measure(part, [of_attack(part, name) for name in names])
    for name, value in few.items():
        torch.testing.assert_close(value, first[name][:2], rtol=1e-8, atol=1e-10)
    # How many others are measured changes no estimator's gradient, and no truth.
    other = make_suite(3)
    alone = fidelities.measure(other, [of_attack(other, "bpda")])
    assert torch.equal(alone["bpda/rise"], first["bpda/rise"])


def test_the_bar_is_reached_by_chance_at_most_once_in_a_hundred():
    one = torch.ones(1, dtype=torch.int64)
    for images in range(20):
        chance = 0.0
        for right in range(images + 1):
            agree = torch.cat([one.expand(right), 0 * one.expand(images - right)])
            values = {"e/clear": one.expand(images), "e/agree": agree}
            values |= {"e/cosine": agree.double(), "e/rise": agree.double()}
            found = fidelities.estimators(values)["e"]
            assert (found.right, found.images) == (right, images)
            chance += found.reached * math.comb(images, right) / 2**images
        assert chance <= 0.01
        assert (chance > 0) == (images >= 7)


def test_a_few_per_cent_above_chance_is_no_fidelity_however_many_images():
    clear, agree = torch.full((1000,), 10), torch.full((1000,), 6)
    values = {"e/clear": clear, "e/agree": agree, "e/cosine": 0.1 * clear, "e/rise": 0.1 * clear}
    found = fidelities.estimators(values)["e"]
    assert (found.agreement, found.right) == (0.6, 1000)
    assert not found.reached
    assert fidelities.estimators(values | {"e/agree": torch.full((1000,), 7)})["e"].reached


def test_the_check_lists_what_did_not_reach_the_bar_and_joins_images():
    check = next(check for check in CHECKS if check.name == "fidelity")

    def seen(number, **agreeing):
        values = {}
        for name, agree in agreeing.items():
            values[f"{name}/clear"] = torch.full((number,), 4)
            values[f"{name}/agree"] = torch.full((number,), agree)
            values[f"{name}/cosine"] = torch.full((number,), agree / 4)
            values[f"{name}/rise"] = torch.full((number,), agree / 8)
        return Seen(values, {})

    parts = [seen(5, bpda=1, equilibrium=4), seen(4, bpda=1, equilibrium=4, unroll=0)]
    assert not check.judge(parts[0], None)[0]  # five images decide nothing
    passed, said = check.judge(join(parts), None)
    assert passed
    assert (
        "expected objective: equilibrium (agreement 1.00, right on 9 of 9 images, cosine 1.00"
        in said
    )
    assert "That do not: bpda (agreement 0.25, right on 0 of 9 images" in said
    assert "unroll (agreement 0.00, right on 0 of 4 images" in said
    passed, said = check.judge(seen(20, bpda=1), None)
    assert (passed, "expected objective: none. That do not: bpda" in said) == (False, True)
    passed, said = check.judge(seen(20, bpda=0)._replace(values={
        "bpda/clear": torch.zeros(20).long(), "bpda/agree": torch.zeros(20).long(),
        "bpda/cosine": torch.zeros(20), "bpda/rise": torch.zeros(20),
    }), None)  # fmt: skip
    assert (passed, "bpda (no clear difference)" in said) == (False, True)


@pytest.fixture(scope="module")
def report():
    suite = make_suite(8, NoDefence)
    budget = dataclasses.replace(
        BUDGET, num_steps=2, check_images=8, scoring_draws=2, check_draws=4
    )
    return evaluate_robustness(
        suite.box.vae, suite.box.defence, suite.x, suite.scorer.labels, classifier=linear,
        ball=Linf(0.1), budget=budget, attacks=("encoder", "black_box"),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def test_a_report_states_it(report, tmp_path):
    assert list(report.fidelity) == ["encoder"]  # black boxes follow no gradient
    assert report.fidelity["encoder"].reached
    assert report.checks[0].name == "fidelity"
    assert report.checks[0].passed
    found = json.loads(report.to_json())
    assert found["fidelity"]["encoder"] == report.fidelity["encoder"]._asdict()
    again = RobustnessReport.from_dict(found)
    assert again.fidelity == report.fidelity
    assert f"encoder                 {report.fidelity['encoder']}" in str(report)
    page = report.save_html(tmp_path / "report.html").read_text()
    assert "bar of fidelity" in page
    assert "8 of 8" in page


def test_reports_of_earlier_versions_are_shown_and_joined_with_the_checks_they_had(report):
    path = RESULTS / "robustness" / "mnist_radius_0.1.json"
    old = json.loads(path.read_text())["reports"]["reconstruction/hmc"]
    read = RobustnessReport.from_dict(old)
    assert read.fidelity == {}
    assert read.checks[0].name == "finite_differences"
    assert read.checks[0].passed is False
    assert "check finite_differences: 5 of 16 images agree" in str(read)
    assert "fidelity" not in str(read)
    # Blocks that an earlier version has written, joined by this one.
    checks = (read.checks[0], *report.checks[1:])
    evidence = {k: v for k, v in report.evidence.items() if k != "fidelity"}
    written = {"checks": checks, "evidence": evidence, "x_ref": None}  # as read from JSON
    block = dataclasses.replace(report, **written, reasons=())
    passing = dataclasses.replace(
        block, images=("another",), checks=(checks[0]._replace(passed=True), *checks[1:])
    )
    for parts, passed in (([block, passing], False), ([passing, block], False)):
        joined = RobustnessReport.join(parts)
        assert {c.name: c.passed for c in joined.checks}["finite_differences"] is passed
        assert any(r.startswith("check finite_differences: 5 of 16") for r in joined.reasons)
    third = dataclasses.replace(passing, images=("a third",))
    joined = RobustnessReport.join([passing, third])
    assert {c.name: c.passed for c in joined.checks}["finite_differences"] is True


@pytest.mark.parametrize("num_chains", [1, 3])
def test_what_it_costs_is_what_was_estimated(num_chains):
    """A draw is one chain, also of a defence that runs several."""
    suite = make_suite(4, num_chains=num_chains)
    names = ("bpda", "equilibrium", "truncated")
    suite.box.transitions(1)  # the step size is found
    before = suite.box.evaluations
    fidelities.measure(suite, [of_attack(suite, name) for name in names])
    counted = (suite.box.evaluations - before) / 4
    chain = chain_cost(suite.box.defence)

    def expected(**changes):
        budget = dataclasses.replace(suite.budget, check_images=4, **changes)
        return suite_gradients(chain, budget, 4, names)

    few, many = (expected(check_draws=draws)["checks"] for draws in (2, 16))
    ends = 2 * (3 + fidelities.RANDOM_DIRECTIONS) * chain.whole / num_chains
    assert many - few == pytest.approx(14 * ends)
    # The mean gradient is that of an attack of as many steps.
    averaged = sum(expected(num_steps=suite.budget.check_steps)[name] for name in names)
    assert 0.75 < counted / (averaged + 16 * ends) < 1.3


def test_budgets_need_two_draws():
    with pytest.raises(ValueError, match="check_draws must be an integer of at least 2, got 1"):
        Budget(check_draws=1)
