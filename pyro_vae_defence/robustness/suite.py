"""The attacks: what each knows, when it applies, what it maximises, with how many draws.

An adaptive gradient is a function of ``attacks.adaptive`` and a row of :data:`ATTACKS`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence import attacks
from pyro_vae_defence.attacks import adaptive, starts
from pyro_vae_defence.attacks.adaptive import (
    Chain,
    DefendedEncoder,
    Directions,
    PreparedGoal,
    Scale,
)
from pyro_vae_defence.attacks.base import Start
from pyro_vae_defence.attacks.noise import low_frequency_noise
from pyro_vae_defence.defence.classifier import reencode
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import class_scores
from pyro_vae_defence.ops.balls import L2, Ball, Linf
from pyro_vae_defence.ops.latents import rows
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.robustness.budget import Budget
from pyro_vae_defence.robustness.populations import Constrained
from pyro_vae_defence.robustness.scoring import Accuracy, Scorer, Similarity
from pyro_vae_defence.robustness.steps import Steps
from pyro_vae_defence.robustness.whitebox import WhiteBox
from pyro_vae_defence.types import Latents, Objective, PreparedObjective


class Aim(NamedTuple):
    """A goal, of how many draws or chains, and how these go on at the next step, unless anew."""

    goal: PreparedGoal
    num_draws: int
    resume: Chain | None


# --- The objective of every row -------------------------------------------------------------------


def _transfer(suite: Suite, aim: Aim) -> PreparedObjective:
    return attacks.symmetric_kl(suite.box.vae)


def _encoder(suite: Suite, aim: Aim) -> PreparedObjective:
    return suite.expected(aim, adaptive.transfer(suite.box.encoding))


def _bpda(suite: Suite, aim: Aim) -> PreparedObjective:
    return suite.expected(aim, adaptive.bpda(suite.box.start, suite.box.chain, aim.resume))


def _equilibrium(suite: Suite, aim: Aim) -> PreparedObjective:
    parts = (suite.box.start, suite.box.chain, suite.box.energy, aim.goal, aim.num_draws)
    return adaptive.equilibrium(*parts, resume=aim.resume, **suite.options())


def _evidence(suite: Suite, aim: Aim) -> PreparedObjective:
    number = suite.budget.persistent_transitions or 1
    chains = Constrained(suite.box, aim.goal, suite.ball, aim.num_draws, number)
    parts = (chains.right, chains.wrong, suite.box.energy, aim.num_draws)
    return adaptive.evidence(*parts, generator=suite.scorer.fresh())


def _black_box(suite: Suite, aim: Aim) -> PreparedObjective:
    ball, options, size = suite.ball, suite.options(), suite.x[0].numel()
    encode = suite.box.forwards()
    frozen = adaptive.expected(encode, aim.goal, aim.num_draws, resample=False, **options)
    # Smoothed by half the size of a typical perturbation, per pixel.
    typical = {"L2": ball.radius / size**0.5, "L1": ball.radius / size}
    scale = 0.5 * typical.get(ball.norm_name, ball.radius)
    directions = _smooth_in_turn(len(suite.x))
    return adaptive.nes(
        frozen, suite.budget.num_directions, scale, options["generator"], directions
    )


def _smooth_in_turn(num_images: int) -> Directions:
    """Directions of low frequency for restarts number 1, 3, ..., each of so many rows."""

    def directions(streams: Streams, step: int, purpose: int, like: Tensor) -> Tensor:
        smooth = streams.image // num_images % 2 == 1
        white = adaptive.white_directions(streams, step, purpose, like)
        if len(like) <= num_images:
            return white
        low = low_frequency_noise(streams, step, purpose, tuple(like.shape[1:]), like.dtype)
        return torch.where(rows(smooth, like), low, white)

    return directions


def _square(suite: Suite, aim: Aim) -> PreparedObjective:
    encode, options = suite.box.forwards(), suite.options()
    return adaptive.expected(encode, aim.goal, aim.num_draws, resample=False, **options)


def _implicit(suite: Suite, aim: Aim) -> PreparedObjective:
    parts = (suite.box.start, suite.box.chain, suite.box.energy, suite.budget.num_iterations)
    return suite.expected(aim, adaptive.implicit(*parts, resume=aim.resume))


def _mode(suite: Suite, aim: Aim) -> PreparedObjective:
    parts = (suite.box.start, suite.box.mode, suite.box.energy, suite.budget.num_iterations)
    return suite.expected(aim, adaptive.implicit(*parts))


def _truncated(suite: Suite, aim: Aim) -> PreparedObjective:
    last = suite.box.transitions(suite.budget.unrolled_transitions)
    parts = (suite.box.start, suite.box.chain, last, aim.resume)
    return suite.expected(aim, adaptive.truncated(*parts))


def _unroll(suite: Suite, aim: Aim) -> PreparedObjective:
    return suite.expected(aim, adaptive.unroll(suite.box.start, suite.box.chain))


# --- The table ------------------------------------------------------------------------------------


def _with_chain(box: WhiteBox) -> str:
    return "" if box.has_chain else "there is no defence behind the encoder: 'encoder' is exact"


def _with_transitions(box: WhiteBox) -> str:
    unknown = "" if box.steps else "the defence is not a chain whose transitions are known"
    return _with_chain(box) or unknown


def _with_whole_chain(box: WhiteBox) -> str:
    if not box.steps or box.unrollable:
        return _with_transitions(box)
    if box.stops:
        return "chains stop when all of an image's have converged, which is not unrolled"
    before = (
        "burn-in before the transitions" if box.kernel.burn_in else "search for the chain's start"
    )
    return f"the {before} is not unrolled"


class Row(NamedTuple):
    """An attack.

    Attributes:
        name, knowledge: its name, and what the attacker knows.
        objective: what it maximises.
        reason: why it does not apply to a defence; empty where it does.
        draws: averaged per step, one number after the other as :class:`Budget` says.
        black_box: whether it sees values alone.
        transfers: whether it attacks the undefended encoder.
        classes: whether it attacks classes alone.
        own_draws: whether what it averages are not draws of the defence.
        other_noise: whether its values come from other noise than the defence's seed gives.
        square: whether Square maximises it, and not the engine of the others.
        inverse_temperatures: of the defence's likelihood, one stage of the attack after the other,
            each from the images that the last one found; the last is 1, the defence itself.
    """

    name: str
    knowledge: str
    objective: Callable[[Suite, Aim], PreparedObjective]
    reason: Callable[[WhiteBox], str] = lambda box: ""
    draws: Callable[[Budget], tuple[int, ...]] = lambda budget: budget.num_draws
    black_box: bool = False
    transfers: bool = False
    classes: bool = False
    own_draws: bool = False
    other_noise: bool = False
    square: bool = False
    inverse_temperatures: tuple[float, ...] = (1.0,)

    def stages(self, num_steps: int) -> list[tuple[float, int]]:
        """Inverse temperature and number of steps of every stage, as even as can be; the first
        stages are left out where there are fewer steps than stages."""
        number = len(self.inverse_temperatures)
        ends = [num_steps * k // number for k in range(number + 1)]
        numbers = [end - begin for begin, end in itertools.pairwise(ends)]
        pairs = zip(self.inverse_temperatures, numbers, strict=True)
        return [(temperature, steps) for temperature, steps in pairs if steps > 0]


_DECODER = "defence and decoder"


def _chains(budget: Budget) -> tuple[int, ...]:
    return (budget.num_chains,)


def _at_once(budget: Budget) -> tuple[int, ...]:
    """As many draws as anything averages: a search keeps what one noise favours, or two."""
    return (max(budget.num_draws[-1], budget.selection_draws),)


ATTACKS = (
    Row(
        "transfer",
        "encoder, paper's objective",
        _transfer,
        draws=lambda b: (1,),
        transfers=True,
        own_draws=True,
    ),
    Row("encoder", "encoder and what is done with latents", _encoder, transfers=True),
    Row("bpda", "defence, run forwards", _bpda, _with_chain),
    Row("equilibrium", _DECODER, _equilibrium, _with_transitions, _chains, own_draws=True),
    Row("evidence", _DECODER, _evidence, _with_transitions, _chains, classes=True, own_draws=True),
    Row("black_box", "outputs of the defence", _black_box, black_box=True),
    Row("implicit", _DECODER, _implicit, _with_chain),
    Row("mode", _DECODER, _mode, _with_transitions, draws=lambda b: (1,), own_draws=True),
    Row("truncated", _DECODER, _truncated, _with_transitions, other_noise=True),
    Row("square", "outputs of the defence", _square, draws=_at_once, black_box=True, square=True),
    Row(
        "continuation",
        _DECODER,
        _equilibrium,
        _with_transitions,
        _chains,
        own_draws=True,
        inverse_temperatures=(0.1, 0.3, 1.0),
    ),
    Row("unroll", _DECODER, _unroll, _with_whole_chain),
)
"""In the order in which they run: what every budget must allow first."""

KNOWLEDGE = {row.name: row.knowledge for row in ATTACKS}
"""The attacks and what each knows."""

OF_CHAINS = {row.name for row in ATTACKS if row.reason in (_with_transitions, _with_whole_chain)}
"""Those that apply to chains whose transitions are known, and to nothing else."""


# --- Running them ---------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """What one row found with one number of draws: the worst restart ``x_adv`` of each image, the
    mean figure ``(N,)`` that chose it, decoder evaluations per image, and wall time."""

    row: Row
    num_draws: int
    x_adv: Tensor
    selection: Tensor
    evaluations: float
    seconds: float


@dataclass(frozen=True)
class Suite:
    """Attacks on a defence, as attackers see it (``box``), of which the ``scorer`` finds the worst;
    the rest as for :func:`~pyro_vae_defence.robustness.evaluate.evaluate_robustness`."""

    box: WhiteBox
    scorer: Scorer
    x: Tensor
    ball: Ball
    budget: Budget
    engine: Callable[..., Any]

    def options(self) -> dict[str, Any]:
        """What all expectations share, with a seed of their own."""
        return {"of_mean": self.of_mean, "generator": self.scorer.fresh()}

    @functools.cached_property
    def of_mean(self) -> bool | Scale:
        """Whether what counts is the goal at the mean of draws, not its mean over draws: on the
        scale of the reading, the support of each site, or for angles their circle."""
        # Few draws of a chain say nothing of the mean latent; averaged draws do.
        if self.scorer.reading not in ("mean", "reencoded"):
            return False
        to, back = program.scale_of_means(program.angles(self.box.vae, self.x))
        return lambda z: to(self.box.constrain(z)), lambda z: self.box.unconstrain(back(z))

    def draws(self, row: Row) -> tuple[int, ...]:
        """What a row averages; of a defence whose seed is known the draws that it reads: all."""
        return (
            row.draws(self.budget) if row.own_draws else self.known_draws or row.draws(self.budget)
        )

    @property
    def known_draws(self) -> tuple[int, ...]:
        """How many draws a defence has whose seed is known; empty where it is not."""
        if self.box.seed is None:
            return ()
        return (1,) if self.scorer.reading == "last" else (self.box.num_chains * self.seen.draws,)

    @property
    def seen(self) -> WhiteBox:
        """The box of a defence whose seed is known, with all draws that are read of a run of it."""
        every = self.box.seed is not None and self.scorer.reading != "last"
        return self.box.drawn() if every else self.box

    def expected(self, aim: Aim, encode: DefendedEncoder) -> PreparedObjective:
        """Average over draws, which go on from step to step where they can.

        A defence with a seed that is known starts anew at every image.
        """
        persistent = aim.resume is not None and self.box.seed is None
        options = {"persistent": persistent, **self.options()}
        return adaptive.expected(encode, aim.goal, aim.num_draws, **options)

    def why_not(self, row: Row) -> str:
        """Why a row does not apply; empty where it does."""
        if row.square and not isinstance(self.ball, (Linf, L2)):
            return f"Square has no moves in an {self.ball.norm_name} ball"
        if row.classes and not isinstance(self.scorer, Accuracy):
            return "it attacks classes, and no classifier is given"
        if len(row.inverse_temperatures) > 1 and (why := self._why_no_start()):
            return f"the engine takes no start, from which its stages go on: {why}"
        if row.other_noise and self.box.seed is not None:
            return "the defence's seed is known, and its last transitions would have other noise"
        return row.reason(self.box)

    def _why_no_start(self) -> str:
        """Why the engine makes no attack that is given a start; empty where it does."""
        options = {"num_steps": 1, "num_restarts": 1, "batch_size": 1, "start": starts.stripes()}
        try:
            self.engine(attacks.symmetric_kl(self.box.vae), self.ball, **options)
        except (TypeError, ValueError) as error:
            return str(error)
        return ""

    def at(self, rows: slice) -> Suite:
        """The suite of the images at ``rows`` alone."""
        box, scorer, x = self.box.at(rows), self.scorer.at(rows), self.x[rows]
        return dataclasses.replace(self, box=box, scorer=scorer, x=x)

    def goal(self) -> PreparedGoal:
        """What attackers maximise: the classifier's margin, or one minus the similarity."""
        box, scorer = self.box, self.scorer
        if isinstance(scorer, Accuracy):

            def classify(latents: Latents, x: Tensor) -> Tensor:
                latents = box.constrain(latents)
                if scorer.reading in ("reencoded", "vote"):
                    latents = reencode(box.vae, latents, functools.partial(box.decode_support, x=x))
                return class_scores(scorer.classifier.classifier, latents)

            return adaptive.misclassification(classify, scorer.labels)
        assert isinstance(scorer, Similarity)
        compare, reference = scorer.compare, scorer.reference
        return adaptive.output_damage(
            box.decode,
            lambda x_ref: reference.repeat(len(x_ref) // len(reference), 1, 1, 1),
            lambda image, reference: 1.0 - compare(image, reference),
        )

    def objective(self, row: Row, num_draws: int) -> PreparedObjective:
        """What a row maximises, with gradient zero where it has none: attacks go on."""
        number, resume = self.budget.persistent_transitions, None
        if self.box.steps and number is not None:
            resume = self.box.transitions(number)
        suite = self if row.own_draws else dataclasses.replace(self, box=self.seen)
        prepared = row.objective(suite, Aim(self.goal(), num_draws, resume))
        return lambda x_ref: connected(prepared(x_ref))

    def attack(
        self,
        row: Row,
        num_draws: int,
        ball: Ball | None = None,
        memory: Memory | None = None,
        **options: int,
    ) -> Tensor:
        """Attacked images of every restart, ``(num_restarts, n, C, H, W)``."""
        num_steps = self.budget.black_box_steps if row.black_box else self.budget.num_steps
        engine = self.engine
        if row.square:
            # As many queries as the other black box has.
            num_steps *= 2 * self.budget.num_directions + 1
            engine = functools.partial(attacks.Square, start=self.start())
        options = {"num_steps": num_steps, "num_restarts": 1, "batch_size": 2**31, **options}
        found: Tensor | None = None
        for inverse_temperature, of_stage in row.stages(options["num_steps"]):
            suite, is_last = self, inverse_temperature == 1
            if not is_last:
                suite = dataclasses.replace(self, box=self.box.tempered(inverse_temperature))
            objective = suite.objective(row, num_draws)
            if memory is not None and is_last:
                objective = memory.watching(objective)
            begin = {} if found is None else {"start": starts.given(found)}
            settings = {**options, "num_steps": of_stage, **begin}
            attack = engine(objective, ball or self.ball, **settings)
            found = attack(self.x, self.scorer.fresh()).x_adv
            check_attacked(found, self.x, ball or self.ball)
        assert found is not None
        return found

    def start(self) -> Start:
        """Square's: stripes, the nearest image of another class, or any other image where there
        are no classes, and patches, restart after restart."""
        number = torch.arange(len(self.x), device=self.x.device)
        labels = self.scorer.labels if isinstance(self.scorer, Accuracy) else number
        if len(labels.unique()) < 2:
            return starts.in_turn(starts.stripes(), starts.patches())
        other = starts.other_class(labels, self.x, labels)
        return starts.in_turn(starts.stripes(), other, starts.patches())

    def candidates(
        self, table: Iterable[Row], skipped: dict[str, str], steps: Steps
    ) -> Iterator[Candidate]:
        """Run the rows of a table; notes in ``skipped`` what the budget did not allow."""
        budget, num_images, limit = self.budget, len(self.x), self.budget.max_evaluations
        for row in table:
            before: float | None = None
            for num_draws in self.draws(row):
                what = f"{row.name} ({num_draws} draws)"
                if limit is not None and self.box.evaluations >= limit * num_images:
                    skipped.setdefault(what, "the budget was spent")
                    break
                found = steps(f"attack {what}", functools.partial(self.worst, row, num_draws))
                candidate = Candidate(row, num_draws, *found)
                yield candidate
                reached = float(candidate.selection.mean())
                if before is not None and abs(reached - before) <= budget.stable:
                    break
                before = reached

    def worst(self, row: Row, num_draws: int) -> tuple[Tensor, Tensor, float, float]:
        """What a row finds: the fields of a :class:`Candidate` that follow."""
        budget, spent, started = self.budget, self.box.evaluations, time.perf_counter()
        memory = Memory(budget.iterates, row.square) if budget.iterates > 1 else None
        restarts = self.attack(row, num_draws, memory=memory, num_restarts=budget.num_restarts)
        seconds = time.perf_counter() - started
        per_image = (self.box.evaluations - spent) / len(self.x)
        if memory is not None:
            restarts = torch.stack(list(self.best_iterates(restarts, memory)))
        scores = [self.scorer.score(x, budget.selection_draws).mean() for x in restarts]
        selection, winner = torch.stack(scores).min(0)
        x_adv = restarts[winner, torch.arange(len(self.x), device=winner.device)]
        return x_adv, selection, per_image, seconds

    def best_iterates(self, found: Tensor, memory: Memory) -> Iterator[Tensor]:
        """Restart by restart, of what the optimiser has ``found`` and of what the memory has kept
        the image with the lowest mean figure, ``(n, C, H, W)``."""
        image = torch.arange(len(self.x), device=self.x.device)
        for number, own in enumerate(found):
            iterates = [own]
            for kept in memory.images:
                x = kept.unflatten(0, (len(found), len(self.x)))[number]
                x = (self.x + self.ball.project(x - self.x)).clamp(0.0, 1.0)
                iterates.append(self.ball.inside(self.x, x))
            scores = [self.scorer.score(x, self.budget.iterate_draws).mean() for x in iterates]
            yield torch.stack(iterates)[torch.stack(scores).argmin(0), image]


@dataclass(eq=False)
class Memory:
    """The iterates of an attack with the highest objectives, row by row.

    An optimiser keeps the iterate whose objective was highest. Where a few draws estimate the
    objective, that is the luckiest one.

    Args:
        number: most iterates of a row, >= 1.
        queries: whether iterates are also those of which no gradient is asked.
    """

    number: int
    queries: bool
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor | None = None

    def watching(self, prepared: PreparedObjective) -> PreparedObjective:
        """The same objective, whose best arguments are remembered."""

        def prepare(x_ref: Tensor) -> Objective:
            objective = prepared(x_ref)

            def watched(x: Tensor) -> Tensor:
                value = objective(x)
                if x.requires_grad or self.queries:
                    self._keep(x.detach()[None], value.detach()[None])
                return value

            return watched

        return prepare

    def _keep(self, images: Tensor, values: Tensor) -> None:
        values = torch.where(values.isfinite(), values, -torch.inf)
        if self.values is not None:
            images = torch.cat([self.images, images])
            values = torch.cat([self.values, values])
        self.values, order = values.topk(min(self.number, len(values)), 0)
        self.images = images[order, torch.arange(images.shape[1], device=order.device)]


def check_attacked(x_adv: Tensor, x_ref: Tensor, ball: Ball) -> None:
    """Raise ``ValueError`` unless an engine has returned images in the ball, up to rounding."""
    if len(x_adv) == 0 or x_adv.shape[1:] != x_ref.shape:
        raise ValueError(
            f"engine returned x_adv of shape {tuple(x_adv.shape)}, not {('R', *x_ref.shape)} with "
            "R >= 1: one attacked image for each restart and each reference"
        )
    if not all(bool(is_attack(each, x_ref, ball).all()) for each in x_adv):
        size = max(float(ball.norm(each - x_ref).max()) for each in x_adv)
        raise ValueError(
            f"engine returned images that leave [0, 1] or {ball}, by perturbations of norm up to "
            f"{size:.3g}: what they do says nothing of attacks in the ball; project onto it, as "
            "ball.project does"
        )


def is_attack(x_adv: Tensor, x_ref: Tensor, ball: Ball) -> Tensor:
    """Which attacked images are in [0, 1], and in the ball around their references but for what
    rounding has made of a pixel and of their norm, bool ``(N,)``."""
    rounding = torch.finfo(x_ref.dtype).eps
    slack = float(ball.norm(torch.full_like(x_ref[:1], rounding)))
    allowed = ball.radius * (1 + rounding * x_ref[0].numel() ** 0.5) + slack
    in_range = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    return in_range & (ball.norm(x_adv - x_ref) <= allowed)


def connected(objective: Objective) -> Objective:
    """The same, with a gradient of zero where the image has no influence."""
    return lambda x: objective(x) + 0.0 * x.flatten(1).sum(1)
