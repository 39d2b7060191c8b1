"""The attacks: what each knows, when it applies, what it maximises, with how many draws.

An adaptive gradient is a function of :mod:`pyro_vae_defence.attacks.adaptive` and a row of
:data:`ATTACKS`.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence import attacks
from pyro_vae_defence.attacks import adaptive
from pyro_vae_defence.attacks.adaptive import Chain, DefendedEncoder, PreparedGoal
from pyro_vae_defence.defence.classifier import reencode
from pyro_vae_defence.models.classifier import flatten_latents
from pyro_vae_defence.ops.balls import Ball
from pyro_vae_defence.robustness.budget import Budget
from pyro_vae_defence.robustness.scoring import Accuracy, Scorer
from pyro_vae_defence.robustness.whitebox import WhiteBox
from pyro_vae_defence.types import Latents, Objective, PreparedObjective

ALL = slice(None)


@dataclass(frozen=True)
class Aim:
    """What a row makes its objective of.

    Attributes:
        suite: defence, budget and ball.
        goal: what to maximise where the defence ends.
        num_draws: draws or chains averaged.
        resume: a few transitions from where the last step ended; ``None`` where chains start anew.
        resample: whether noise is fresh at every step.
    """

    suite: Suite
    goal: PreparedGoal
    num_draws: int
    resume: Chain | None
    resample: bool

    @property
    def box(self) -> WhiteBox:
        """The defence."""
        return self.suite.box

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Common to all expectations; their seed is drawn when they are first asked for."""
        # Few draws of a chain say nothing of the mean latent; averaged draws do.
        of_mean = self.suite.scorer.measure.reading in ("mean", "reencoded")
        return {"of_mean": of_mean, "generator": self.suite.scorer.fresh()}

    def expected(self, encode: DefendedEncoder, persistent: bool = False) -> PreparedObjective:
        """Average over draws; ``persistent`` for encoders that can go on."""
        return adaptive.expected(
            encode,
            self.goal,
            self.num_draws,
            persistent=persistent and self.resume is not None,
            resample=self.resample,
            **self.options,
        )


# --- The objective of every row -------------------------------------------------------------------


def _transfer(aim: Aim) -> PreparedObjective:
    return attacks.symmetric_kl(aim.box.vae)


def _encoder(aim: Aim) -> PreparedObjective:
    return aim.expected(adaptive.transfer(aim.box.start))


def _bpda(aim: Aim) -> PreparedObjective:
    return aim.expected(adaptive.bpda(aim.box.start, aim.box.chain, aim.resume), persistent=True)


def _equilibrium(aim: Aim) -> PreparedObjective:
    box = aim.box
    return adaptive.equilibrium(
        box.start, box.chain, box.energy, aim.goal, aim.num_draws, resume=aim.resume, **aim.options
    )


def _black_box(aim: Aim) -> PreparedObjective:
    box = aim.box
    encode = adaptive.bpda(box.start, box.chain) if box.has_chain else adaptive.transfer(box.start)
    frozen = adaptive.expected(encode, aim.goal, aim.num_draws, resample=False, **aim.options)
    # Smoothed by half the size of a typical perturbation, per pixel.
    ball, size = aim.suite.ball, math.prod(box.shape)
    typical = {"L2": ball.radius / size**0.5, "L1": ball.radius / size}
    scale = 0.5 * typical.get(ball.norm_name, ball.radius)
    number = aim.suite.budget.num_directions
    return adaptive.nes(frozen, number, scale, aim.options["generator"])


def _implicit(aim: Aim) -> PreparedObjective:
    box, iterations = aim.box, aim.suite.budget.num_iterations
    encode = adaptive.implicit(box.start, box.chain, box.energy, iterations, resume=aim.resume)
    return aim.expected(encode, persistent=True)


def _truncated(aim: Aim) -> PreparedObjective:
    last = aim.box.transitions(aim.suite.budget.unrolled_transitions)
    encode = adaptive.truncated(aim.box.start, aim.box.chain, last, aim.resume)
    return aim.expected(encode, persistent=True)


def _unroll(aim: Aim) -> PreparedObjective:
    return aim.expected(adaptive.unroll(aim.box.start, aim.box.chain))


# --- The table ------------------------------------------------------------------------------------


def _always(box: WhiteBox) -> str:
    return ""


def _with_chain(box: WhiteBox) -> str:
    return "" if box.has_chain else "there is no defence behind the encoder: 'encoder' is exact"


def _with_transitions(box: WhiteBox) -> str:
    unknown = "" if box.unrollable else "the defence is not a chain whose transitions are known"
    return _with_chain(box) or unknown


class Row(NamedTuple):
    """An attack.

    Attributes:
        name: its name.
        knowledge: what the attacker knows.
        objective: of it, from an :class:`Aim`.
        reason: why it does not apply to a defence; empty where it does.
        num_draws: averaged per step, one after the other as :class:`Budget` says.
        black_box: whether it sees values alone.
        transfers: whether it attacks the undefended encoder.
    """

    name: str
    knowledge: str
    objective: Callable[[Aim], PreparedObjective]
    reason: Callable[[WhiteBox], str] = _always
    num_draws: Callable[[Budget], tuple[int, ...]] = lambda budget: budget.num_draws
    black_box: bool = False
    transfers: bool = False


_DECODER = "defence and decoder"

ATTACKS = (
    Row(
        "transfer",
        "encoder, paper's objective",
        _transfer,
        num_draws=lambda budget: (1,),
        transfers=True,
    ),
    Row("encoder", "encoder and what is done with latents", _encoder, transfers=True),
    Row("bpda", "defence, run forwards", _bpda, _with_chain),
    Row(
        "equilibrium",
        _DECODER,
        _equilibrium,
        _with_transitions,
        num_draws=lambda budget: (budget.num_chains,),
    ),
    Row("black_box", "outputs of the defence", _black_box, black_box=True),
    Row("implicit", _DECODER, _implicit, _with_chain),
    Row("truncated", _DECODER, _truncated, _with_transitions),
    Row("unroll", _DECODER, _unroll, _with_transitions),
)
"""In the order in which they run: what every budget must allow first."""

KNOWLEDGE = {row.name: row.knowledge for row in ATTACKS}
"""The attacks and what each knows."""


# --- Running them ---------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """What one row found with one number of draws.

    Attributes:
        row: the attack.
        num_draws: draws per step.
        x_adv: the worst restart of each image, ``(N, C, H, W)``.
        selection: mean figure that chose it, ``(N,)``.
        evaluations: decoder evaluations per image.
        seconds: wall time.
    """

    row: Row
    num_draws: int
    x_adv: Tensor
    selection: Tensor
    evaluations: float
    seconds: float


@dataclass(frozen=True)
class Suite:
    """Attacks on a defence.

    Attributes:
        box: the defence as attackers see it.
        scorer: what decides which attack is the worst.
        x: references ``(N, C, H, W)``.
        ball: where perturbations live.
        budget: how hard to try.
        engine: optimiser, see :func:`~pyro_vae_defence.robustness.evaluate_robustness`.
    """

    box: WhiteBox
    scorer: Scorer
    x: Tensor
    ball: Ball
    budget: Budget
    engine: Callable[..., Any]

    def goal(self, rows: slice = ALL) -> PreparedGoal:
        """What attackers maximise: the classifier's margin, or one minus the similarity."""
        box, measure = self.box, self.scorer.measure
        if isinstance(measure, Accuracy):

            def classify(latents: Latents) -> Tensor:
                latents = box.constrain(latents)
                if measure.reading == "reencoded":
                    latents = reencode(box.vae, latents, box.shape)
                return measure.classifier.classifier(flatten_latents(latents))

            return adaptive.misclassification(classify, measure.labels[rows])
        reference = measure.reference[rows]

        def damage(image: Tensor, reference: Tensor) -> Tensor:
            return 1.0 - measure.compare(image, reference)

        def reconstruct(x_ref: Tensor) -> Tensor:
            return reference.repeat(x_ref.shape[0] // reference.shape[0], 1, 1, 1)

        return adaptive.output_damage(box.decode, reconstruct, damage)

    def objective(
        self, row: Row, num_draws: int, rows: slice = ALL, resample: bool = True
    ) -> PreparedObjective:
        """The objective of a row; without a gradient in the image it has gradient zero, and attacks
        go on."""
        number, resume = self.budget.persistent_transitions, None
        if resample and self.box.unrollable and number is not None:
            resume = self.box.transitions(number)
        prepared = row.objective(Aim(self, self.goal(rows), num_draws, resume, resample))
        return lambda x_ref: connected(prepared(x_ref))

    def attack(
        self,
        row: Row,
        num_draws: int,
        *,
        rows: slice = ALL,
        ball: Ball | None = None,
        num_steps: int | None = None,
        num_restarts: int = 1,
    ) -> Tensor:
        """Attacked images of every restart, ``(num_restarts, N, C, H, W)``."""
        steps = self.budget.black_box_steps if row.black_box else self.budget.num_steps
        attack = self.engine(
            self.objective(row, num_draws, rows),
            ball or self.ball,
            num_steps=num_steps or steps,
            num_restarts=num_restarts,
            batch_size=2**31,
        )
        return attack(self.x[rows], self.scorer.fresh()).x_adv

    def candidates(self, table: Iterable[Row], skipped: dict[str, str]) -> Iterator[Candidate]:
        """Run the rows of a table; notes in ``skipped`` what the budget did not allow."""
        budget, num_images = self.budget, len(self.x)
        limit = budget.max_evaluations
        for row in table:
            before: float | None = None
            for num_draws in row.num_draws(budget):
                spent, started = self.box.evaluations, time.perf_counter()
                if limit is not None and spent >= limit * num_images:
                    skipped.setdefault(f"{row.name} ({num_draws} draws)", "the budget was spent")
                    break
                restarts = self.attack(row, num_draws, num_restarts=budget.num_restarts)
                seconds = time.perf_counter() - started
                per_image = (self.box.evaluations - spent) / num_images
                scores = [self.scorer.score(x, budget.selection_draws).mean() for x in restarts]
                selection, winner = torch.stack(scores).min(0)
                image = torch.arange(len(winner), device=winner.device)
                x_adv = restarts[winner, image]
                yield Candidate(row, num_draws, x_adv, selection, per_image, seconds)
                reached = float(selection.mean())
                if before is not None and abs(reached - before) <= budget.stable:
                    break
                before = reached


def connected(objective: Objective) -> Objective:
    """The same, with a gradient of zero where the image has no influence."""
    return lambda x: objective(x) + 0.0 * x.flatten(1).sum(1)
