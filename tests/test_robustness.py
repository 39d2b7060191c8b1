"""The suite: what it finds where the answer is known, and that it notices when it has been
fooled."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import types

import numpy as np
import pytest
import torch
from programs import LinearGaussianVAE

from pyro_vae_defence import data
from pyro_vae_defence.attacks import APGD
from pyro_vae_defence.defence import (
    DefendedClassifier,
    EncoderDefence,
    MCMCDefence,
    NoDefence,
    PosteriorModeDefence,
)
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS
from pyro_vae_defence.mcmc.adaptation import FixedStepSize
from pyro_vae_defence.mcmc.unrolled import UnrolledKernel
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.models.compiled import Recorder
from pyro_vae_defence.models.conditions import BoundVAE, same_vae
from pyro_vae_defence.models.pretrained import load_pretrained
from pyro_vae_defence.ops.balls import L2, Linf
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.robustness import (
    ATTACKS,
    CHECKS,
    KNOWLEDGE,
    Budget,
    RobustnessReport,
    WhiteBox,
    evaluate_robustness,
)
from pyro_vae_defence.robustness.checks import Seen, join
from pyro_vae_defence.robustness.cost import ChainCost, chain_cost, suite_gradients
from pyro_vae_defence.robustness.scoring import Fresh, figure_bounds, interval

TINY = Budget(
    num_steps=8, num_restarts=2, num_draws=(1, 2), stable=0.0, num_chains=8, num_iterations=3,
    num_directions=12, black_box_steps=8, selection_draws=3, scoring_draws=4, check_images=10,
    check_steps=8,
)  # fmt: skip
SMALL = Budget(
    num_steps=2, num_restarts=1, num_draws=(1,), num_chains=4, num_iterations=2, num_directions=1,
    black_box_steps=1, selection_draws=1, scoring_draws=2, check_images=4, check_steps=4,
    check_draws=4,
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
    assert len({c.name for c in report.checks}) == 6
    without_chain = {"transfer", "encoder", "black_box", "square"}
    assert {outcome.name for outcome in report.attacks} == without_chain
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


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64, torch.bool])
def test_json_takes_numbers_of_every_kind(kind, undefended):
    """A similarity may have any: the report of hours must not be lost at its end."""
    _, report = undefended
    values = {name: value.to(kind) for name, value in report.values.items()}
    found = json.loads(dataclasses.replace(report, values=values).to_json())
    read = RobustnessReport.from_dict(found).values
    assert read.keys() == values.keys()
    assert all(torch.equal(read[name], value) for name, value in values.items())
    assert {value.dtype for value in read.values()} == {kind}


@pytest.mark.parametrize("mask", MASKS)
def test_gradient_masking_is_caught(mask):
    vae, x, labels = problem()
    masked = Masked(vae, MASKS[mask])
    named = ("transfer", "encoder", "black_box")
    report = run(masked, NoDefence(masked), x, labels, attacks=named)
    assert not report.reliable
    assert json.loads(report.to_json())["unreliable"] is True
    failed = {c.name for c in report.checks if c.passed is False}
    # Where a sigmoid is flat, what is left of the gradient still has the right direction.
    assert ("fidelity" in failed) == (mask == "quantised")
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
    report = run(blinded, NoDefence(blinded), x, None, attacks=("transfer", "encoder"))
    assert report.robust["mean"]["estimate"] == 1.0
    assert check(report, "whole_range_leaves_chance").passed is False
    assert check(report, "loss_increases_with_iterations").passed is False
    assert not report.reliable


HMC = functools.partial(BatchedHMC, step_size=0.04, num_steps=3)


@pytest.mark.parametrize("delta", [None, pytest.param(0.1, marks=pytest.mark.slow)])
def test_every_attack_runs_against_a_chain(delta):
    vae, x, labels = problem(10)
    budget = Budget(
        num_steps=4, num_restarts=1, num_draws=(1,), num_chains=8, num_iterations=3,
        num_directions=4, black_box_steps=2, selection_draws=2, scoring_draws=3, check_images=8,
        check_steps=4, check_draws=32 if delta is None else 4,
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
        assert check(report, "fidelity").passed
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
    assert report.reasons[0] == "no sanity check ran"

    def somebodys(x, generator=None):
        return NoDefence(vae)((x + 0.01).clamp(0, 1), generator)

    report = run(vae, somebodys, x, labels, SMALL)
    assert {o.name for o in report.attacks} == {
        "transfer",
        "encoder",
        "bpda",
        "implicit",
        "black_box",
        "square",
    }
    # Fewer images than can decide.
    assert check(report, "fidelity").passed is False
    assert list(report.fidelity) == ["transfer", "encoder", "bpda", "implicit"]
    assert report.skipped["unroll"] == "the defence is not a chain whose transitions are known"


def test_a_report_without_a_gradient_attack_lists_every_check():
    vae, x, labels = problem(8)
    report = run(vae, NoDefence(vae), x, labels, SMALL, attacks=("black_box",))
    assert [c.name for c in report.checks] == [c.name for c in CHECKS]
    assert {c.name for c in report.checks if c.passed is None} == {
        "fidelity",
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


class Mirrored(MCMCDefence):
    def __call__(self, x, generator=None):
        return super().__call__(1 - x, generator)


class Filtered(MCMCDefence):
    def _filter(self, x):
        return 1 - x


class MirroredEncoder(NoDefence):
    def __call__(self, x, generator=None):
        return super().__call__(1 - x, generator)


class OwnStep(BatchedHMC):
    def _step(self, num_gradients):
        step = super()._step(num_gradients)
        return lambda potential, *arguments, **options: step(potential, *arguments, **options)


@pytest.mark.parametrize("kind", [Mirrored, Filtered, MirroredEncoder])
def test_what_derives_from_a_defence_is_attacked_as_a_whole(kind):
    """Its chain was run on images that it never saw, or it passed for no defence at all."""
    vae, x, _ = problem(4)
    defence = kind(vae) if kind is MirroredEncoder else kind(vae, HMC, 2, 3)
    box, streams = WhiteBox(vae, defence, x, seed=5), Streams.create(4, seed=0)
    assert box.has_chain
    assert not box.steps
    truth = defence(x, torch.Generator().manual_seed(5))
    end = box.chain(x, box.start(x, streams), streams)
    assert torch.equal(end["z"], truth.latents["z"])
    assert box._kept == truth.samples["z"].shape[1]
    cost = chain_cost(defence)
    assert cost is not None
    assert cost.transitions == 0


def test_a_kernel_that_steps_in_its_own_way_is_not_unrolled_as_another():
    vae, x, _ = problem(4)
    box = WhiteBox(vae, MCMCDefence(vae, OwnStep, 2, 3), x)
    assert box.has_chain
    assert not box.steps


PAPER = functools.partial(BatchedHMC, step_size=0.1, preset="paper")


def test_the_white_box_of_the_published_chain_with_recorded_gradients():
    vae, x, _ = problem(4)
    boxes = [
        WhiteBox(vae, MCMCDefence(vae, PAPER, 2, 1, prepare=prepare), x)
        for prepare in (None, Recorder())
    ]
    streams = Streams.create(4, seed=3)
    ends = []
    for box in boxes:
        assert box.unrollable
        few = box.transitions(2).make_kernel()
        assert isinstance(few.rule, FixedStepSize)  # at which the batch had arrived
        assert few.step_size == box.step_size != 0.1
        with torch.no_grad():
            ends.append(box.chain(x, box.start(x, streams), streams)["z"])
    assert torch.allclose(*ends, atol=1e-9)
    # Recorded gradients are counted though the model does not run: 3 transitions of 20 steps.
    recorded = boxes[1]
    recorder = recorded.defence.prepare
    assert all(recording is not None for recording, *_ in recorder.recordings.values())
    number = len(recorder.recordings)
    before = recorded.evaluations
    with torch.no_grad():
        recorded.chain(x, recorded.start(x, streams), streams)
        recorded.transitions(2)(x, recorded.start(x, streams), streams)
    assert recorded.evaluations == before + 4 * (1 + 3 * 20) + 4 * (1 + 2 * 20)
    # The defence itself, and another box of it, find the same recordings.
    recorded.defence(x)
    other = WhiteBox(vae, recorded.defence, x)
    with torch.no_grad():
        other.chain(x, other.start(x, streams), streams)
    assert len(recorder.recordings) == number


@pytest.mark.slow
def test_adaptive_attacks_on_the_published_chain_of_fewer_transitions():
    """30 of 20 steps: BPDA whose chains go on, and the gradient through all of them."""
    vae = load_pretrained("mnist_vae").requires_grad_(False)
    images = data.load("mnist_subset", "test")
    x = images.images(data.stratified(images, 4, torch.Generator().manual_seed(0)))
    defence = MCMCDefence(vae, PAPER, 20, 10, keep_draws=1, prepare=Recorder())
    budget = Budget(
        num_steps=4, num_restarts=1, num_draws=(2,), persistent_transitions=3,
        selection_draws=1, scoring_draws=2,
    )  # fmt: skip
    report = evaluate_robustness(
        vae, defence, x, ball=Linf(0.2), budget=budget, attacks=("bpda", "unroll"), checks=False,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert [a.name for a in report.attacks] == ["bpda", "unroll"]
    for attack in report.attacks:
        assert attack.figure["estimate"] < report.clean["mean"]["estimate"] - 0.05
    assert report.per_image.isfinite().all()

    # Through all transitions a gradient is finite, and what it owes to the start fades.
    box = WhiteBox(vae, defence, x)
    streams = Streams.create(4, seed=1)
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        start = box.start(x, streams)
    begin = {"z": start["z"].clone().requires_grad_()}
    z = box.chain(leaf, begin, streams)["z"]
    of_x, of_start = torch.autograd.grad(z.square().sum(), (leaf, begin["z"]))
    assert of_x.isfinite().all()
    assert (of_start.norm(dim=1) < 2 * z.norm(dim=1)).all()


def test_the_white_box_of_a_chain_with_a_burn_in():
    """Its transitions are known to go on with; the chain as a whole has values, no derivative."""
    vae, x, labels = problem(4)
    kernel = functools.partial(HMC, burn_in=3)
    defence = MCMCDefence(vae, kernel, 2, 1)
    box = WhiteBox(vae, defence, x)
    assert box.steps
    assert not box.unrollable
    found = defence(x, torch.Generator().manual_seed(1))
    streams = Streams.create(4, generator=torch.Generator().manual_seed(1))
    start = box.start(x, streams)
    assert torch.equal(start["z"], found.initial["z"][0])
    spent = box.evaluations
    assert torch.equal(box.chain(x, start, streams)["z"], found.latents["z"])
    assert box.evaluations >= spent + int(found.num_gradients.sum())
    few = box.transitions(2).make_kernel()
    assert (few.burn_in, kernel.keywords["burn_in"]) == (0, 3)
    assert box.transitions(1)(x, found.latents, streams)["z"].shape == found.latents["z"].shape
    table = {row.name: row.reason(box) for row in ATTACKS}
    assert table["unroll"] == "the burn-in before the transitions is not unrolled"
    assert {table[name] for name in ("equilibrium", "truncated", "implicit")} == {""}
    report = evaluate_robustness(
        vae, defence, x, labels, classifier=classify, ball=Linf(RADIUS), budget=SMALL,
        attacks=("equilibrium", "truncated"), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert [each.name for each in report.attacks] == ["equilibrium", "truncated"]
    assert set(report.fidelity) == {"equilibrium", "truncated"}


def test_the_white_box_of_what_has_no_known_transitions():
    vae, x, _ = problem(4)
    undefended = WhiteBox(vae, NoDefence(vae), x)
    assert not undefended.has_chain
    mode = PosteriorModeDefence(vae, num_steps=4, initial="mean", perturbation=Linf(0.1))
    box = WhiteBox(vae, mode, x)
    assert box.has_chain
    assert not box.unrollable
    before = box.evaluations
    end = box.chain(x, {}, Streams.create(4, seed=1))
    assert torch.equal(end["z"], mode(x).latents["z"])
    # Counted as the defence counts itself.
    assert box.evaluations == before + int(mode(x).num_gradients.sum())


def _similarity(a, b):
    return 1 - (a - b).square().flatten(1).mean(1)


@pytest.mark.parametrize(
    ("similarity", "message"),
    [
        (lambda a, b: (a - b).square().flatten(1).mean(1), "a distance has to be turned round"),
        (lambda a, b: _similarity(a, b).mean(), r"shape \(3,\), got torch.float32 of shape \(\)"),
        (lambda a, b: _similarity(a, b)[:, None], r"got torch.float32 of shape \(3, 1\)"),
        (lambda a, b: (_similarity(a, b) > 0.5).long(), "got torch.int64"),
        (lambda a, b: 1.0, "got float"),
        ("ssim", "similarity must map two batches"),
    ],
)
def test_what_is_no_similarity_is_refused_at_the_start(similarity, message):
    vae, x = LinearGaussianVAE(), torch.rand(3, 1, 4, 4)
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(vae, NoDefence(vae), x, similarity=similarity, budget=SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": None}, "engine must be an optimiser"),
        ({"engine": APGD(lambda x: None, Linf(0.1))}, "engine must be an optimiser such as"),
        ({"checks": "no"}, "checks must be True or False, got 'no'"),
        ({"labels": ["a", "b", "c"], "classifier": classify}, "labels must be classes, .*'a'"),
        ({"classifier": lambda z: classify(z)[:, :1]}, "scores of two or more classes, got 1"),
        ({"defence": lambda x, generator=None: x}, "it returned a Tensor; .*preprocess"),
    ],
)
def test_settings_that_fit_nothing_are_refused_at_the_start(settings, message):
    vae, x = LinearGaussianVAE(), torch.rand(3, 1, 4, 4)
    settings = {"defence": NoDefence(vae), "similarity": _similarity, **settings}
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(vae, x=x, budget=SMALL, **settings)


def test_attacks_from_an_iterator_numpys_seed_and_images_with_a_gradient():
    vae = LinearGaussianVAE()
    x = torch.rand(3, 1, 4, 4, requires_grad=True)
    report = evaluate_robustness(
        vae, NoDefence(vae), x, similarity=_similarity, budget=SMALL, checks=False,
        attacks=iter(["encoder"]), defence_seed=np.int64(3),
    )  # fmt: skip
    assert [each.name for each in report.attacks] == ["encoder"]
    assert not report.x_adv.requires_grad
    assert not report.x_ref.requires_grad
    assert type(report.threat_model["defence_seed"]) is int


@pytest.mark.parametrize(
    ("attacked", "message"),
    [
        (lambda x: x[None] + 0.31 * (0.5 - x).sign(), r"leave \[0, 1\] or Linf.*norm up to 0.31"),
        (lambda x: x[None] * torch.nan, "norm up to nan"),
        (lambda x: x, r"shape \(8, 1, 4, 4\), not \('R', 8, 1, 4, 4\)"),
    ],
)
def test_what_an_engine_returns_is_in_the_ball(attacked, message):
    def engine(objective, ball, **options):
        return lambda x, generator: types.SimpleNamespace(x_adv=attacked(x))

    vae, x, labels = problem(8)
    with pytest.raises(ValueError, match=f"engine returned .*{message}"):
        run(vae, NoDefence(vae), x, labels, SMALL, engine=engine)


def test_a_report_of_settings_that_are_no_json_can_be_written():
    vae, x, labels = problem(4)

    def defence(images, generator=None):
        settings = {"defence": "somebody's", "widths": (1, 2), "scale": torch.tensor(0.5)}
        return dataclasses.replace(NoDefence(vae)(images, generator), settings=settings)

    report = run(vae, defence, x, labels, SMALL, attacks=["transfer"], checks=False)
    assert report.defence == {"defence": "somebody's", "widths": [1, 2], "scale": "tensor(0.5000)"}
    read = RobustnessReport.from_dict(json.loads(report.to_json()))
    assert read.defence == report.defence


def test_seconds_are_those_of_one_run(monkeypatch):
    """Where the seed is known there is one, whatever the budget says."""
    vae, x, labels = problem(4)
    clock = itertools.count()
    module = importlib.import_module("pyro_vae_defence.robustness.evaluate")
    monkeypatch.setattr(
        module, "time", types.SimpleNamespace(perf_counter=lambda: 8.0 * next(clock))
    )
    for seed, runs in ((None, SMALL.scoring_draws), (3, 1)):
        options = {"attacks": ["transfer"], "checks": False, "defence_seed": seed}
        report = run(vae, NoDefence(vae), x, labels, SMALL, **options)
        assert report.cost["defence_seconds_per_image"] == 8.0 / (4 * runs)


def test_reconstructions_are_scored_by_similarity():
    vae, x, _ = problem()

    def similarity(a, b):
        return (-(a - b).square().flatten(1).sum(1)).exp()

    report = run(
        vae, NoDefence(vae), x, None, classifier=None, similarity=similarity, ball=L2(1.0),
        attacks=("transfer", "encoder", "square"),
    )  # fmt: skip
    assert report.figure == "similarity"
    assert report.robust["mean"]["estimate"] < report.random_noise["estimate"]
    assert report.random_noise["estimate"] < report.undefended_clean["estimate"]
    assert report.threat_model["target"] == "reconstruction"
    assert check(report, "fidelity").passed


@pytest.fixture(scope="module")
def parts():
    """Reports of 5, 3 and 6 images of one problem."""
    torch.manual_seed(0)
    vae, x, labels = problem(14)
    named = ("transfer", "encoder", "black_box")
    return [
        run(vae, NoDefence(vae), x[rows], labels[rows], SMALL, attacks=named)
        for rows in (slice(0, 5), slice(5, 8), slice(8, 14))
    ]


class TestJoin:
    """Reports of some images each are one report of all of them."""

    def test_every_figure_is_that_of_all_values(self, parts):
        joined = RobustnessReport.join(parts)
        assert joined.values.keys() == parts[0].values.keys()
        fresh = Fresh(parts[0].seed)
        for shown, name, check in zip(joined.checks, joined.evidence, CHECKS, strict=True):
            values = {
                key: torch.cat([part.evidence[name].values[key] for part in parts])
                for key in parts[0].evidence[name].values
            }
            seen = Seen(values, joined.evidence[name].facts)
            verdict = check.judge(seen, lambda v: interval(v, fresh()))
            assert (name, *verdict) == shown
        # In the order of an evaluation, of which every interval draws a seed of its own.
        places = [f"robust/{name}" for name in joined.robust]
        places += [f"clean/{name}" for name in joined.clean]
        places += ["undefended_clean", "random_noise", *(a.place for a in joined.attacks)]
        shown = [
            *joined.robust.values(), *joined.clean.values(), joined.undefended_clean,
            joined.random_noise, *(a.figure for a in joined.attacks),
        ]  # fmt: skip
        assert set(places) == set(joined.values)
        for place, entry in zip(places, shown, strict=True):
            values = torch.cat([part.values[place] for part in parts])
            assert torch.equal(joined.values[place], values)
            assert entry == interval(values, fresh(), figure_bounds(joined.figure))
            assert entry["num_images"] == 14
        assert torch.equal(joined.per_image, torch.cat([part.per_image for part in parts]))
        assert torch.equal(joined.x_adv, torch.cat([part.x_adv for part in parts]))
        assert joined.strongest == sum((part.strongest for part in parts), ())

    def test_of_one_it_is_that_one_and_an_evaluation_judges_as_a_join_does(self, parts):
        one = parts[0]
        assert RobustnessReport.join([one]) is one
        # What stands in an evaluation's report follows from its own values.
        for name, entry in one.robust.items():
            assert entry["estimate"] == pytest.approx(float(one.values[f"robust/{name}"].mean()))
        assert all(
            check.judge(one.evidence[c.name], lambda v: {"low": 0, "high": 0, "estimate": 0})[0]
            in (True, False, None)
            for check, c in zip(CHECKS, one.checks, strict=True)
        )

    def test_json_in_between_changes_nothing(self, parts):
        texts = [json.loads(part.to_json()) for part in parts]
        read = [RobustnessReport.from_dict(text) for text in texts]
        assert [json.loads(report.to_json()) for report in read] == texts
        assert read[0].x_adv is None
        through, joined = (RobustnessReport.join(each).to_dict() for each in (read, parts))
        assert through == joined
        values = parts[0].values["undefended_clean"]
        again = read[0].values["undefended_clean"]
        assert (again.dtype, again.tolist()) == (values.dtype, values.tolist())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_numbers_are_exact_as_text_and_short(self, parts, dtype):
        values = torch.tensor([0.95, 1.0, 1 / 3, 1e-30, -0.0, float("inf")], dtype=dtype)
        report = dataclasses.replace(parts[0], values={"a": values})
        text = report.to_dict()["values"]["a"]
        assert text.startswith(f"{str(dtype).removeprefix('torch.')} 0.95 1.0 0.333333")
        again = RobustnessReport.from_dict(json.loads(report.to_json())).values["a"]
        assert (again.dtype, again.tolist()) == (dtype, values.tolist())

    def test_costs_are_means_over_images_and_time_is_a_sum(self, parts):
        joined = RobustnessReport.join(parts)
        assert joined.cost["seconds"] == sum(part.cost["seconds"] for part in parts)
        name = "defence_seconds_per_image"
        expected = sum(n * part.cost[name] for n, part in zip((5, 3, 6), parts, strict=True)) / 14
        assert joined.cost[name] == pytest.approx(expected)
        assert joined.attacks[0].seconds == sum(part.attacks[0].seconds for part in parts)

    def test_an_attack_that_some_have_made_is_reported_on_their_images(self, parts):
        last = parts[2].attacks[-1]
        less = dataclasses.replace(
            parts[2],
            attacks=parts[2].attacks[:-1],
            values={k: v for k, v in parts[2].values.items() if k != last.place},
            skipped={last.name: "the budget was spent"},
        )
        joined = RobustnessReport.join([*parts[:2], less])
        assert joined.attacks[-1].name == last.name
        assert joined.attacks[-1].figure["num_images"] == 8
        assert joined.skipped[last.name] == "the budget was spent (1 of 3 parts)"
        # Those that an evaluation skips, all skip.
        assert joined.skipped["bpda"].endswith("(2 of 3 parts)")

    def test_verdicts_are_of_all_images(self, parts):
        def agreeing(part, number):
            agree = 4 * (torch.arange(len(part.per_image)) < number).long()
            seen = {"clear": torch.full_like(agree, 4), "agree": agree, "cosine": agree / 4}
            values = {f"encoder/{name}": value for name, value in (seen | {"rise": agree}).items()}
            evidence = part.evidence | {"fidelity": Seen(values, {})}
            return dataclasses.replace(part, evidence=evidence)

        # 3 images would fail alone; 13 of 14 are enough, 11 of 14 are not.
        assert not check(agreeing(parts[1], 3), "fidelity").passed
        joined = RobustnessReport.join(list(map(agreeing, parts, (5, 2, 6))))
        assert check(joined, "fidelity").passed
        joined = RobustnessReport.join(list(map(agreeing, parts, (5, 1, 5))))
        assert not check(joined, "fidelity").passed
        assert "check fidelity: gradients that foretell what a step does" in joined.reasons[0]
        assert "right on 11 of 14 images" in joined.reasons[0]
        # What is no check's stays.
        alone = dataclasses.replace(parts[1], reasons=("no sanity check ran",))
        assert "no sanity check ran" in RobustnessReport.join([parts[0], alone]).reasons

    def test_objectives_of_two_kinds_are_judged_apart(self):
        sizes = {"encoder": 1e3, "defence": 1e-3}
        rising = {
            f"{kind}, {n} steps": (torch.arange(4.0) + n) * size
            for kind, size in sizes.items()
            for n in (0, 1, 4)
        }
        facts = {"attack": "bpda", "num_steps": [1, 4]}
        (rule,) = (c for c in CHECKS if c.name == "loss_increases_with_iterations")
        generator = torch.Generator().manual_seed(0)
        passed, said = rule.judge(Seen(rising, facts), lambda v: interval(v, generator))
        assert passed
        assert said.count(" and ") == 3
        # The small numbers fall: the large ones do not hide it.
        falling = rising | {"defence, 4 steps": -torch.arange(4.0)}
        assert not rule.judge(Seen(falling, facts), lambda v: interval(v, generator))[0]
        parts = [
            Seen({k: v for k, v in rising.items() if k.startswith(kind)}, facts | {"attack": name})
            for kind, name in (("encoder", "transfer"), ("defence", "bpda"))
        ]
        seen = join(parts)
        assert seen.values.keys() == rising.keys()
        assert seen.facts == {"attack": "transfer' or 'bpda", "num_steps": [1, 4]}

    @pytest.mark.parametrize(("left", "passed"), [(0.3, False), (0.0, True)])
    def test_noise_speaks_against_attacks_that_leave_something(self, left, passed):
        """It may do most of the harm where none is left to do."""
        (rule,) = (c for c in CHECKS if c.name == "random_noise_is_weaker")
        values = {"clean": torch.ones(20), "noise": torch.full((20,), 0.4)}
        values["worst"] = torch.full((20,), left)
        generator = torch.Generator().manual_seed(0)
        assert rule.judge(Seen(values, {}), lambda v: interval(v, generator))[0] is passed

    def test_weights_are_one_models(self):
        vae, x, labels = problem(8)
        heads = [torch.nn.Linear(3, 2, dtype=torch.float64) for _ in range(2)]
        reports = [
            run(
                vae, NoDefence(vae), x[rows], labels[rows], SMALL, attacks=("encoder",),
                classifier=heads[number], checks=False,
            )
            for rows, number in ((slice(0, 4), 0), (slice(4, 8), 0), (slice(4, 8), 1))
        ]  # fmt: skip
        first, same, other = reports
        joined = RobustnessReport.join([first, same])
        assert joined.weights == first.weights == same.weights != ""
        with pytest.raises(ValueError, match="reports 0 and 1 .* with different weights"):
            RobustnessReport.join([first, other])
        # One of an earlier version says nothing of them.
        old = {k: v for k, v in other.to_dict().items() if k != "weights"}
        assert RobustnessReport.join([first, RobustnessReport.from_dict(old)]).weights

    def test_mistakes(self, parts):
        with pytest.raises(ValueError, match="reports is empty"):
            RobustnessReport.join([])
        other = dataclasses.replace(parts[1], figure="similarity")
        with pytest.raises(ValueError, match="reports of different figure are not joined"):
            RobustnessReport.join([parts[0], other])
        other = dataclasses.replace(parts[1], defence={"defence": "mcmc"})
        with pytest.raises(ValueError, match="reports of different defence are not joined"):
            RobustnessReport.join([parts[0], other])
        again = RobustnessReport.from_dict(json.loads(parts[1].to_json()))
        with pytest.raises(ValueError, match="reports 1 and 2 are of the same images"):
            RobustnessReport.join([*parts[:2], again])
        with pytest.raises(ValueError, match="reports 0 and 1 are of the same images"):
            RobustnessReport.join([RobustnessReport.join(parts), again])
        overlapping = torch.cat([parts[1].x_ref[1:], parts[0].x_ref[:1]])
        other = dataclasses.replace(parts[1], images=("other",), x_ref=overlapping)
        with pytest.raises(ValueError, match="reports 0 and 1 are of the same images, all or some"):
            RobustnessReport.join([parts[0], other])
        # Of a VAE that may be given labels, or not.
        labels = torch.zeros(len(parts[0].per_image))
        for first, second in (((labels,), ()), ((None,), (labels,)), ((labels,), (None,))):
            one, other = (
                dataclasses.replace(part, conditions=own)
                for part, own in zip(parts, (first, second), strict=False)
            )
            with pytest.raises(ValueError, match="reports with other conditions are not joined"):
                RobustnessReport.join([one, other])
        # How gradients came about in a run is no other defence.
        how = parts[1].defence | {"prepare_why_not": "no GPU"}
        RobustnessReport.join([parts[0], dataclasses.replace(parts[1], defence=how)])
        old = {k: v for k, v in parts[1].to_dict().items() if k not in ("values", "evidence")}
        read = RobustnessReport.from_dict(old)
        assert read.robust == parts[1].robust
        with pytest.raises(ValueError, match="no values per image, an earlier version"):
            RobustnessReport.join([parts[0], read])


def test_transfer_alone_is_not_an_evaluation_and_a_budget_is_kept():
    vae, x, labels = problem(8)
    defence = MCMCDefence(vae, HMC, 1, 1)
    report = run(vae, defence, x, labels, SMALL, attacks=("transfer", "encoder"), checks=False)
    assert report.reasons[:2] == (
        "no sanity check ran", "only transfer attacks ran: no attacker knew the defence",
    )  # fmt: skip
    left_out = [name for name in KNOWLEDGE if name not in ("transfer", "encoder")]
    assert report.reasons[2:] == tuple(f"attack {n} did not run: not asked for" for n in left_out)
    limited = dataclasses.replace(SMALL, max_evaluations=10)
    report = run(vae, defence, x, labels, limited, checks=False)
    assert report.skipped["unroll (1 draws)"] == "the budget was spent"
    assert {o.name for o in report.attacks} == {"transfer", "encoder", "bpda"}
    assert "attack unroll (1 draws) did not run: the budget was spent" in report.reasons
    assert not report.reliable
    # What does not apply is no reason, and nothing at all has words of its own.
    report = run(vae, NoDefence(vae), x, labels, SMALL, attacks="bpda", checks=False)
    assert report.reasons == (
        "no sanity check ran", "no attack ran",
        *(
            f"attack {n} did not run: not asked for"
            for n in ("transfer", "encoder", "black_box", "square")
        ),
    )  # fmt: skip


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
        ({"defence": 3}, "defence must be callable, images to a DefenceResult, got 3"),
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


def test_the_attacker_knows_the_model_that_is_defended():
    vae, other, x = LinearGaussianVAE(), LinearGaussianVAE(), torch.rand(4, 1, 4, 4)
    defence = NoDefence(vae)
    with pytest.raises(ValueError, match="defence defends another VAE, a LinearGaussianVAE"):
        evaluate_robustness(other, defence, x)
    behind = DefendedClassifier(NoDefence(vae), classify)
    with pytest.raises(ValueError, match="classifier is a DefendedClassifier of another defence"):
        evaluate_robustness(vae, defence, x, classifier=behind)
    # The same programs are the same VAE, by whatever name, and with conditions bound.
    same = types.SimpleNamespace(model=vae.model, guide=vae.guide)
    run(same, defence, x.double(), None, SMALL, attacks=("encoder",), checks=False)
    assert same_vae(BoundVAE(vae, lambda x: x, lambda x: x), vae)
    assert not same_vae(BoundVAE(vae, lambda x: x, lambda x: x), other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"num_chains": 1}, "num_chains must be an integer of at least 2, got 1"),
        ({"num_draws": ()}, r"num_draws must be a tuple of integers, got \(\)"),
        ({"stable": -1.0}, "stable must be at least 0 and finite, got -1.0"),
    ],
)
def test_bad_budgets(change, message):
    with pytest.raises(ValueError, match=message):
        Budget(**change)


def test_a_budget_of_numpys_numbers_can_be_written():
    """A report holds it as JSON, which is made when everything has run."""
    budget = Budget(num_steps=np.int64(3), num_draws=(np.int64(1),), stable=np.float32(0.5))
    assert json.loads(json.dumps(dataclasses.asdict(budget))) == json.loads(
        json.dumps(dataclasses.asdict(Budget(num_steps=3, num_draws=(1,), stable=0.5)))
    )


class TestWithoutAManual:
    """Budgets by name, what they cost, the progress bar, and the page."""

    def test_budgets_rise(self):
        chain = ChainCost(whole=25 * 4.5 + 2, transition=4.5, transitions=25)
        budgets = (Budget.quick(), Budget.standard(), Budget.thorough())
        costs = [suite_gradients(chain, budget, num_images=20) for budget in budgets]
        attacks = [sum(v for k, v in c.items() if k not in ("scoring", "checks")) for c in costs]
        assert attacks[0] - costs[0]["unroll"] < 0.25 * attacks[1]
        assert all(costs[0][name] < costs[1][name] / 3 for name in KNOWLEDGE if name in costs[1])
        assert 54_000 < attacks[1] < 58_000  # "about 56,000"
        assert 3.8e6 < attacks[2] < 4.2e6
        assert "unroll" not in costs[1]  # the budget is spent before
        # A quick one leaves no attack out, whatever the chain costs.
        paper = ChainCost(whole=750 * 20 + 2, transition=20, transitions=750)
        for each in (chain, paper):
            assert {*KNOWLEDGE} <= set(suite_gradients(each, Budget.quick(), num_images=20))

    def test_what_a_defence_costs_is_what_it_takes(self):
        vae, x = ConvVAE().eval(), torch.rand(2, 1, 28, 28)
        kernel = functools.partial(BatchedHMC, num_steps=3, jitter=0.0, burn_in=7)
        defence = MCMCDefence(vae, kernel, 2, 1, num_chains=2)
        cost = chain_cost(defence)
        assert cost == ChainCost(whole=2 * (7 + 1 + 9), transition=3.0, transitions=3, chains=2)
        assert defence(x).num_gradients.tolist() == [cost.whole] * 2
        bounded = MCMCDefence(vae, kernel, 20, 10, num_chains=2, max_gradients=2 * (7 + 1 + 12))
        assert chain_cost(bounded).transitions == 4
        assert bounded(x).num_gradients.tolist() == [chain_cost(bounded).whole] * 2
        assert chain_cost(NoDefence(vae)) is None
        assert chain_cost(EncoderDefence(vae)).transitions == 0
        no_chain = suite_gradients(None, Budget.quick(), 2)
        assert set(no_chain) == {
            "transfer", "encoder", "black_box", "square", "scoring", "checks",
        }  # fmt: skip

    def test_a_budget_is_a_budget(self):
        vae, x = ConvVAE().eval(), torch.rand(2, 1, 28, 28)
        for wrong in ("quick", Budget.quick):
            with pytest.raises(ValueError, match=r"budget must be a Budget such as Budget.quick"):
                evaluate_robustness(vae, NoDefence(vae), x, budget=wrong)

    def test_the_page_of_a_report_loads_nothing(self, tmp_path, capsys):
        vae, x = ConvVAE().eval(), torch.rand(3, 1, 28, 28)
        few = {"num_steps": 2, "check_images": 2, "check_steps": 4, "check_draws": 4}
        budget = dataclasses.replace(Budget.quick(), **few)
        report = evaluate_robustness(
            vae, NoDefence(vae), x, budget=budget, attacks=("transfer", "encoder"), progress=True
        )
        assert "encoder" in capsys.readouterr().err
        reference, attacked, _ = report.examples
        assert reference.equal(x)
        assert attacked.equal(report.x_adv)
        page = report.save_html(tmp_path / "report.html").read_text()
        estimate = report.robust["mean"]["estimate"]
        for text in (f"{estimate:.3f} [", "transfer", report.checks[0].name, "data:image/png"):
            assert text in page
        assert "http" not in page
        text = str(report)
        for each in (report.robust["mean"], report.clean["mean"], report.attacks[1].figure):
            assert f"{each['estimate']:.3f} [{each['low']:.3f}, {each['high']:.3f}]" in text
        assert "worst for\ntransfer (1)" in text
        assert "Unreliable:\n- " in text
        assert "- attack black_box did not run: not asked for" in text
        assert "tensor" not in text + repr(report)
        assert len(repr(report)) < 150
        again = RobustnessReport.from_dict(json.loads(report.to_json()))
        assert "data:image/png" not in again.save_html(tmp_path / "again.html").read_text()
