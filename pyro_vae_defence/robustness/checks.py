"""Symptoms of attacks that fail for want of a gradient, tested on the images at hand.

A check measures, image by image, and judges what it has measured. The two are apart, so that the
images of many reports can be judged together: :func:`join` puts their measurements side by side,
and the verdict is one on all of them. A check is a function of the :class:`Evidence`, a function of
what that one has :class:`Seen`, and a line of their table.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence import attacks
from pyro_vae_defence.attacks import adaptive
from pyro_vae_defence.ops.balls import Ball
from pyro_vae_defence.robustness import fidelity as fidelities
from pyro_vae_defence.robustness.scoring import Accuracy, Scores, Similarity, strongest_of
from pyro_vae_defence.robustness.suite import Candidate, Suite

Verdict = tuple[bool | None, str]
"""Whether a check has passed, ``None`` where it does not apply, and what it saw."""

Interval = Callable[[Tensor], dict[str, float]]
"""Values per image to their mean with ``low`` and ``high``."""


class Seen(NamedTuple):
    """What a check has measured.

    Attributes:
        values: by name, one number per image it has looked at, ``(n,)``; empty where it does not
            apply.
        facts: by name, what holds for all of these images, as JSON knows it.
    """

    values: dict[str, Tensor]
    facts: dict[str, Any]


def join(parts: Sequence[Seen]) -> Seen:
    """What a check has seen of all images of several reports; facts that differ stand together."""
    useful = [part for part in parts if part.values] or parts[:1]
    names = dict.fromkeys(name for part in useful for name in part.values)
    values = {
        name: torch.cat([part.values[name] for part in useful if name in part.values])
        for name in names
    }
    facts = {}
    for name in useful[0].facts:
        several = list(dict.fromkeys(map(str, (part.facts[name] for part in useful))))
        facts[name] = useful[0].facts[name] if len(several) == 1 else "' or '".join(several)
    return Seen(values, facts)


@dataclass(frozen=True)
class Evidence:
    """What the ``suite`` found, and what several checks look at.

    ``scores`` are those of what was found, on fresh seeds; ``clean``, ``noise`` and ``worst`` those
    without an attack, under random noise, and of the worst attacks.
    """

    suite: Suite
    found: list[Candidate]
    scores: list[Scores]
    clean: Scores
    noise: Scores
    worst: Scores

    def of(self, black_box: bool) -> list[int]:
        """Which candidates are black boxes, or are not."""
        return [i for i, each in enumerate(self.found) if each.row.black_box == black_box]

    @functools.cached_property
    def strongest(self) -> Candidate | None:
        """The gradient attack with the lowest mean figure, if any ran."""
        gradient = self.of(black_box=False)
        best = min(gradient, key=lambda i: float(self.scores[i].mean().mean()), default=None)
        return None if best is None else self.found[best]

    @functools.cached_property
    def few(self) -> Suite:
        """The suite of the images that are looked at."""
        return self.suite.at(slice(0, self.suite.budget.check_images))

    def again(self, one: Candidate, num_steps: int, ball: Ball | None = None) -> Tensor:
        """The images under one of the attacks, ``(n, C, H, W)``."""
        return self.few.attack(one.row, one.num_draws, ball, num_steps=num_steps)[0]

    @functools.cached_property
    def by_radius(self) -> list[tuple[float, Scores]]:
        """Scores under the strongest attack, if any, in growing balls up to any image."""
        if self.strongest is None:
            return []
        budget, ball, size = self.suite.budget, self.suite.ball, self.suite.x[0].numel()
        covering = {"L2": size**0.5, "L1": float(size)}.get(ball.norm_name, 1.0)
        radii = [ball.radius / 2, ball.radius, covering]
        if not ball.radius < covering:
            radii = [covering / 2, covering]
        found = []
        for radius in radii:
            x_adv = self.again(self.strongest, budget.check_steps, type(ball)(radius))
            scores = self.few.scorer.score(x_adv, budget.scoring_draws)
            found.append((radius, scores))
        return found


def _nothing(why: str) -> Seen:
    return Seen({}, {"why": why})


_NO_ATTACK = _nothing("needs a gradient attack")


# --- The checks: what each measures, and how it judges that -----------------------------------


def fidelity(evidence: Evidence) -> Seen:
    """Gradients foretell what an attacker's step does to the expected objective."""
    # Each estimator once, with the most draws that it has averaged.
    found = {one.row.name: one for one in evidence.found if not one.row.black_box}
    if not found:
        return _NO_ATTACK
    return Seen(fidelities.measure(evidence.few, list(found.values())), {})


def _one_is_faithful(seen: Seen, interval: Interval) -> Verdict:
    found = fidelities.estimators(seen.values)

    def those(reached: bool) -> str:
        some = [f"{name} ({each})" for name, each in found.items() if each.reached == reached]
        return "; ".join(some) or "none"

    return (
        any(each.reached for each in found.values()),
        "gradients that foretell what a step does to the expected objective: "
        f"{those(True)}. That do not: {those(False)}. One must, with an agreement of at least "
        f"{fidelities.LEAST_AGREEMENT:g}, where chance is 0.5, and so many right images that "
        f"chance gives them with probability {fidelities.LARGEST_CHANCE:g} or less",
    )


def black_box_is_not_stronger(evidence: Evidence) -> Seen:
    """An attacker who sees more does more."""
    gradient, black = evidence.of(black_box=False), evidence.of(black_box=True)
    if not (gradient and black):
        return _nothing("needs a black-box and a gradient attack")

    def worst(indices: list[int]) -> Tensor:
        selections = torch.stack([evidence.found[i].selection for i in indices])
        winner = strongest_of(selections, evidence.suite.budget.selection_draws)
        first, *others = (evidence.scores[i] for i in indices)
        return first.choose(others, winner).mean()

    return Seen({"gradient": worst(gradient), "black_box": worst(black)}, {})


def _no_lead(seen: Seen, interval: Interval) -> Verdict:
    lead = interval(seen.values["gradient"] - seen.values["black_box"])
    return (
        lead["low"] <= 0,
        "figure under gradient attacks minus figure under the black box: "
        f"{lead['estimate']:.3f} [{lead['low']:.3f}, {lead['high']:.3f}]; must not lie above 0 "
        "beyond noise",
    )


def whole_range_leaves_chance(evidence: Evidence) -> Seen:
    """An attacker free to choose any image leaves what another image's prediction would."""
    if not evidence.by_radius:
        return _NO_ATTACK
    _, scores = evidence.by_radius[-1]
    scorer = evidence.few.scorer
    if isinstance(scorer, Accuracy):
        return Seen({"right": scores.per_draw[0]}, {"chance": 1.0 / scorer.num_classes})
    assert isinstance(scorer, Similarity)
    reference = scorer.reference
    unrelated = scorer.compare(reference.roll(1, 0), reference)
    return Seen({"figure": scores.mean(), "unrelated": unrelated}, {})


def _no_more_than_chance(seen: Seen, interval: Interval) -> Verdict:
    if "right" in seen.values:
        chance = seen.facts["chance"]
        right, of = int(seen.values["right"].sum()), len(seen.values["right"])
        # Probability of so many right answers, or more, by chance.
        tail = sum(
            math.comb(of, k) * chance**k * (1 - chance) ** (of - k) for k in range(right, of + 1)
        )
        return (
            tail > 0.01,
            f"{right} of {of} right where any image is allowed; by chance {chance * of:.1f} "
            f"(so many or more with probability {tail:.2g})",
        )
    figure, unrelated = seen.values["figure"], seen.values["unrelated"]
    excess = interval(figure - unrelated)
    return (
        excess["low"] <= 0,
        f"figure {float(figure.mean()):.3f} where any image is allowed, unrelated images "
        f"have {float(unrelated.mean()):.3f}; must not exceed it beyond noise",
    )


def monotone_in_radius(evidence: Evidence) -> Seen:
    """A larger ball leaves no more."""
    strongest, tried = evidence.strongest, evidence.by_radius
    if strongest is None:
        return _NO_ATTACK
    facts = {"attack": strongest.row.name, "num_steps": evidence.suite.budget.check_steps}
    return Seen({f"{radius:g}": scores.mean() for radius, scores in tried}, facts)


def _no_rise(seen: Seen, interval: Interval) -> Verdict:
    shown = ", ".join(f"{radius}: {float(m.mean()):.3f}" for radius, m in seen.values.items())
    rises = [interval(after - before) for before, after in itertools.pairwise(seen.values.values())]
    return (
        all(rise["low"] <= 0 for rise in rises),
        f"'{seen.facts['attack']}', {seen.facts['num_steps']} steps, figure by radius: "
        f"{shown}; must not rise beyond noise",
    )


def loss_increases_with_iterations(evidence: Evidence) -> Seen:
    """The attacker's objective, on noise of its own, after no, some, and all steps."""
    suite, strongest = evidence.few, evidence.strongest
    if strongest is None:
        return _NO_ATTACK
    budget, scorer, x_ref = suite.budget, suite.scorer, suite.x
    of_encoder = strongest.row.name == "transfer"
    if of_encoder:
        prepared = suite.objective(strongest.row, 1)
    else:
        goal, draws = suite.goal(), suite.known_draws or (max(5, budget.selection_draws),)
        options = {"resample": False, **suite.options()}
        prepared = adaptive.expected(suite.seen.forwards(), goal, *draws, **options)
    objective = prepared(x_ref)
    steps = (max(1, budget.check_steps // 4), budget.check_steps)
    few, many = (evidence.again(strongest, number) for number in steps)
    start = attacks.random_noise(x_ref, suite.ball, scorer.fresh())
    with torch.no_grad():
        values = [objective(each) for each in (start, few, many)]
    # The encoder's divergence and what a defence leaves are numbers of two kinds.
    kind = "encoder" if of_encoder else "defence"
    named = {f"{kind}, {number} steps": v for number, v in zip((0, *steps), values, strict=True)}
    return Seen(named, {"attack": strongest.row.name, "num_steps": list(steps)})


def _rises(seen: Seen, interval: Interval) -> Verdict:
    first, last = seen.facts["num_steps"]
    passed, shown = True, []
    in_turn = iter(seen.values.values())
    for start, few, many in zip(in_turn, in_turn, in_turn, strict=True):
        rise, later = interval(many - start), interval(many - few)
        passed &= rise["low"] > 0 and later["high"] >= 0
        shown.append(", ".join(f"{float(value.mean()):.4g}" for value in (start, few, many)))
    return (
        passed,
        f"'{seen.facts['attack']}' objective after 0, {first} and {last} steps: "
        f"{' and '.join(shown)}; must "
        "rise from the first to the last beyond noise, and not fall in between",
    )


def random_noise_is_weaker(evidence: Evidence) -> Seen:
    """Half of what attacks do is more than noise does."""
    scores = {"clean": evidence.clean, "noise": evidence.noise, "worst": evidence.worst}
    return Seen({name: each.mean() for name, each in scores.items()}, {})


def _does_less(seen: Seen, interval: Interval) -> Verdict:
    clean, noise, worst = (seen.values[name] for name in ("clean", "noise", "worst"))
    if not worst.any():
        return True, "the attacks leave nothing, so that none could be stronger"
    drop_noise, drop = clean - noise, clean - worst
    excess = interval(drop_noise - 0.5 * drop)
    return (
        excess["low"] <= 0,
        f"random noise lowers the figure by {float(drop_noise.mean()):.3f}, the attacks by "
        f"{float(drop.mean()):.3f}; half of that is allowed, beyond noise",
    )


class SanityCheck(NamedTuple):
    """What a check measures, and how that is judged where it has values.

    Attributes:
        name: under which it is reported, that of ``measure``.
        measure: what it has seen of the evidence.
        judge_values: whether that is as it should be.
    """

    name: str
    measure: Callable[[Evidence], Seen]
    judge_values: Callable[[Seen, Interval], Verdict]

    def judge(self, seen: Seen, interval: Interval) -> Verdict:
        """Whether it has passed, and in words what it saw."""
        return self.judge_values(seen, interval) if seen.values else (None, seen.facts["why"])


_CHECKS: dict[Callable[[Evidence], Seen], Callable[[Seen, Interval], Verdict]] = {
    fidelity: _one_is_faithful,
    black_box_is_not_stronger: _no_lead,
    whole_range_leaves_chance: _no_more_than_chance,
    monotone_in_radius: _no_rise,
    loss_increases_with_iterations: _rises,
    random_noise_is_weaker: _does_less,
}

CHECKS = tuple(SanityCheck(measure.__name__, measure, judge) for measure, judge in _CHECKS.items())
"""In the order in which they run."""
