"""Evaluations that go on from an earlier report with more attacks."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from test_robustness import SMALL, classify, problem, run

from pyro_vae_defence.defence import DefendedClassifier, MCMCDefence, PosteriorModeDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.robustness import (
    RobustnessReport,
    evaluate_robustness,
    load_attacked,
    save_attacked,
)

FIRST, MORE = ("encoder", "bpda"), ("encoder", "bpda", "black_box", "implicit", "square")
BALL = Linf(0.16)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def evaluated():
    """What is evaluated, whose defence has no noise, and its report of the first attacks."""
    torch.manual_seed(0)
    vae, x, labels = problem(8)
    given = vae, PosteriorModeDefence(vae, num_steps=5, initial="mean"), x, labels
    return given, run(*given, SMALL, attacks=FIRST, ball=BALL)


def go_on(given, earlier, attacks=MORE, budget=SMALL, **options):
    options = {"classifier": classify, "ball": BALL, "generator": generator(2), **options}
    return evaluate_robustness(*given, budget=budget, attacks=attacks, earlier=earlier, **options)


def test_attacks_of_before_keep_their_figures_and_count(evaluated):
    given, first = evaluated
    more = go_on(given, first)
    assert [each.name for each in more.attacks] == list(MORE)
    for each in first.attacks:
        assert torch.equal(more.values[each.place], first.values[each.place])
    assert not {*more.skipped} & {*MORE}
    left_out = [reason for reason in more.reasons if "not asked for" in reason]
    assert left_out == ["attack transfer did not run: not asked for"]
    assert more.earlier_seeds == (first.seed,) != (more.seed,)
    assert {check.name for check in more.checks} == {check.name for check in first.checks}
    assert {*more.fidelity} == {"encoder", "bpda", "implicit"}
    # What noise does to the defence is nothing: the worst of either is what both leave.
    alone = run(*given, SMALL, attacks=MORE[2:], checks=False, ball=BALL)
    assert bool((more.per_image <= first.per_image).all())
    assert first.robust["mean"]["estimate"] < alone.clean["mean"]["estimate"]
    assert bool((more.per_image == torch.minimum(first.per_image, alone.per_image)).all())
    spent = "attack_evaluations_per_image"
    assert more.cost[spent] > first.cost[spent]
    assert more.cost["seconds"] > first.cost["seconds"]


def test_with_nothing_new_it_is_the_report_scored_again(evaluated):
    given, first = evaluated
    again = go_on(given, first, attacks=FIRST)
    assert torch.equal(again.per_image, first.per_image)
    right = first.per_image == 0
    assert bool(right.any())
    assert torch.equal(again.x_adv[right], first.x_adv[right])
    names = [name for name, wrong in zip(again.strongest, right, strict=True) if wrong]
    assert names == [name for name, wrong in zip(first.strongest, right, strict=True) if wrong]
    assert again.cost["attack_evaluations_per_image"] >= first.cost["attack_evaluations_per_image"]
    # And once more, from what a file holds.
    third = go_on(given, again, attacks=FIRST, generator=generator(3))
    assert third.earlier_seeds == (first.seed, again.seed)


def test_it_is_scored_on_draws_that_no_attack_has_seen():
    """Of images that a lucky draw has chosen the mean comes back, by fresh seeds."""
    torch.manual_seed(0)
    vae, x, labels = problem(8)
    defence = MCMCDefence(vae, functools.partial(BatchedHMC, step_size=0.04, num_steps=3), 1, 2)
    first = run(vae, defence, x, labels, SMALL, attacks=("encoder",), checks=False, ball=BALL)
    flattered = dataclasses.replace(
        first, x_adv=x, values={k: torch.zeros_like(v) for k, v in first.values.items()}
    )
    more = go_on((vae, defence, x, labels), flattered, attacks=("encoder",), checks=False)
    assert more.robust["mean"]["estimate"] > 0.8


def test_from_a_file(evaluated, tmp_path):
    given, first = evaluated
    path = save_attacked(first, tmp_path / "first.safetensors")
    more = go_on(given, load_attacked(path), checks=False)
    direct = go_on(given, first, checks=False)
    assert torch.equal(more.x_adv, direct.x_adv)
    assert more.robust == direct.robust
    written = RobustnessReport.from_dict(more.to_dict())
    assert written.earlier_seeds == (first.seed,)
    assert "earlier_seeds" not in first.to_dict()


def test_a_checkpoint_is_of_one_earlier_report(evaluated, tmp_path):
    given, first = evaluated
    path = tmp_path / "evaluation.pt"
    options = {"checks": False, "checkpoint": path, "keep_checkpoint": True}
    more = go_on(given, first, **options)
    assert torch.equal(go_on(given, first, **options).x_adv, more.x_adv)
    with pytest.raises(ValueError, match="belongs to other images"):
        go_on(given, dataclasses.replace(first, seed=first.seed + 1), **options)


def test_what_the_budget_left_out_stays_left_out(evaluated):
    """More draws than an attack of the earlier report was given."""
    given, first = evaluated
    what, why = "bpda (5 draws)", "the budget was spent"
    short = dataclasses.replace(first, skipped={**first.skipped, what: why})
    more = go_on(given, short, checks=False)
    assert more.skipped[what] == why
    assert f"attack {what} did not run: {why}" in more.reasons


def test_conditions_are_compared(evaluated):
    given, first = evaluated
    other = dataclasses.replace(first, conditions=(torch.ones(8),))
    with pytest.raises(ValueError, match="of other images, labels or conditions"):
        go_on(given, other)


def alike(first, second):
    return 1 - (first - second).abs().flatten(1).mean(1)


def test_mistakes(evaluated):
    given, first = evaluated
    vae, defence, x, labels = given
    budget = dataclasses.replace(SMALL, scoring_draws=3)
    other = PosteriorModeDefence(vae, num_steps=6, initial="mean")
    reread = DefendedClassifier(defence, classify, "reencoded")
    moved = dataclasses.replace(first, x_adv=first.x_adv + 0.5)
    for settings, message in (
        ({"earlier": {}}, r"earlier must be a RobustnessReport, got \{\}"),
        ({"earlier": dataclasses.replace(first, x_adv=None)}, "earlier has no images"),
        (
            {"given": (vae, defence, x.flip(0), labels)},
            "of other images, labels or conditions; give",
        ),
        ({"given": (vae, defence, x, 1 - labels)}, "images, labels or conditions; give"),
        ({"given": (vae, other, x, labels)}, "another defence, by its num_steps; give"),
        ({"budget": budget}, "of other budget; give"),
        ({"ball": Linf(0.15)}, "of other threat model; give"),
        ({"classifier": reread}, "of other threat model; give"),
        (
            {"classifier": None, "given": (vae, defence, x, None), "similarity": alike},
            "conditions, figure, threat model",
        ),
        ({"earlier": dataclasses.replace(first, weights="1")}, "of other weights; give"),
        ({"earlier": dataclasses.replace(first, values={})}, "written by another version"),
        ({"generator": generator(1)}, f"earlier has the seed that generator gives, {first.seed}"),
        ({"earlier": moved}, r"earlier has images that leave \[0, 1\] or Linf\(radius=0.16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            go_on(**{"given": given, "earlier": first, **settings})
    # How long it may take is no other evaluation.
    longer = dataclasses.replace(SMALL, max_evaluations=10**9)
    go_on(given, first, attacks=FIRST, budget=longer, checks=False)
