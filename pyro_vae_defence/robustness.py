r"""How much of a defence the strongest of many attacks leaves.

:func:`evaluate_robustness` runs the attacks of :mod:`pyro_vae_defence.attacks.adaptive` on every
image within a budget and takes, image by image, the worst. A *figure* is one number per image and
draw of the randomised defence, higher for more robust: whether the predicted class is the label, or
the similarity of the attacked image's reconstruction to the reference's. With draws :math:`s = 1,
\dots, S` on seeds that no attack has seen, an image :math:`i` contributes

.. math::
    \text{mean: } \tfrac1S \sum_s m_{is}, \quad \text{single: } m_{i1}, \quad \text{worst of N: } \min_s m_{is}, \quad
    \text{averaged: the figure of the draws' mean output.}

Which attack is an image's worst is decided on other seeds than those it is reported on, so that the
minimum does not collect luck. Intervals are bootstrapped over images.

What a suite of attacks leaves is an upper bound of the true robustness: heuristic, not certified.
An attack that fails
for want of a gradient looks like a robust defence, hence the *checks*: symptoms of such failures,
tested on the images at hand and reported as passed or failed. One that fails makes the report
unreliable.

References: Carlini et al., "On evaluating adversarial robustness", 2019,
https://arxiv.org/abs/1902.06705; Athalye, Carlini, Wagner, "Obfuscated gradients give a false sense
of security", ICML 2018, https://arxiv.org/abs/1802.00420.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pyro_vae_defence
from pyro_vae_defence import attacks, metrics
from pyro_vae_defence.attacks import adaptive
from pyro_vae_defence.attacks.adaptive import PreparedScore
from pyro_vae_defence.defence import Defence, MCMCDefence, NoDefence
from pyro_vae_defence.defence.classifier import reencode
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS, unrolled
from pyro_vae_defence.mcmc.adaptation import FixedStepSize
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import flatten_latents
from pyro_vae_defence.models.program import ModelPotential, check_images, check_vae
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import L1, L2, Ball, Linf
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import VAE, Latents, Objective, PreparedObjective

KNOWLEDGE = {
    "transfer": "encoder, paper's objective",
    "encoder": "encoder and what is done with latents",
    "bpda": "defence, run forwards",
    "equilibrium": "defence and decoder",
    "black_box": "outputs of the defence",
    "implicit": "defence and decoder",
    "truncated": "defence and decoder",
    "unroll": "defence and decoder",
}
"""The attacks and what each knows, in the order in which they run: what every budget must allow
first."""

TRANSFER = ("transfer", "encoder")
"""Attacks on the undefended encoder."""

LEVEL = 0.95


@dataclass(frozen=True)
class Budget:
    """How hard the suite tries.

    Args:
        num_steps: steps of every gradient attack, >= 1.
        num_restarts: random starts per image, each scored by itself, >= 1.
        num_draws: draws averaged per step (EOT), rising: the next is tried unless the last has
            changed the figure by less than ``stable``.
        stable: see ``num_draws``.
        num_chains: chains per image of the equilibrium gradient, >= 2.
        persistent_transitions: transitions per step of chains that go on from the attacker's last
            step; ``None`` runs the whole defence at every step. Chains start with the whole defence
            in either case.
        unrolled_transitions: K of the truncated gradient, >= 1.
        num_iterations: conjugate gradient iterations of the implicit gradient, >= 1.
        num_directions: antithetic pairs per step of the black box, >= 1.
        black_box_steps: its steps, >= 1.
        max_evaluations: decoder evaluations per image after which no further attack starts;
            ``None`` for no limit.
        selection_draws, scoring_draws: runs of the defence that choose the worst attack, and that
            are reported, >= 1.
        check_images, check_steps: images and steps of the attacks that checks need, >= 2 and >= 4.
    """

    num_steps: int = 100
    num_restarts: int = 5
    num_draws: tuple[int, ...] = (1, 5, 20)
    stable: float = 0.02
    num_chains: int = 50
    persistent_transitions: int | None = 2
    unrolled_transitions: int = 2
    num_iterations: int = 10
    num_directions: int = 10
    black_box_steps: int = 50
    max_evaluations: int | None = None
    selection_draws: int = 5
    scoring_draws: int = 20
    check_images: int = 16
    check_steps: int = 20

    def __post_init__(self) -> None:
        least = {"num_chains": 2, "check_images": 2, "check_steps": 4}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("num_draws", "stable") or value is None:
                continue
            check_integer(field.name, value, least.get(field.name, 1))
        draws = self.num_draws
        if not (draws and all(isinstance(n, int) and n >= 1 for n in draws)):
            raise ValueError(f"num_draws must hold integers of at least 1, got {draws!r}")
        if not self.stable >= 0:
            raise ValueError(f"stable must not be negative, got {self.stable!r}")


class Check(NamedTuple):
    """A sanity check: ``passed`` is ``None`` where it does not apply."""

    name: str
    passed: bool | None
    detail: str


class AttackOutcome(NamedTuple):
    """One attack, scored on fresh seeds.

    Attributes:
        name: of :data:`KNOWLEDGE`.
        num_draws: draws (or chains) averaged per step.
        figure: mean figure and interval.
        evaluations: decoder evaluations per image.
        seconds: wall time.
    """

    name: str
    num_draws: int
    figure: dict[str, float]
    evaluations: float
    seconds: float


@dataclass(frozen=True)
class RobustnessReport:
    """What :func:`evaluate_robustness` found.

    Attributes:
        figure: what is measured, e.g. ``"accuracy"`` or ``"ms_ssim[paper]"``; higher is more
            robust.
        threat_model: norm, radius, target and reading.
        robust: the per-image worst case: ``mean``, ``single``, ``worst_of_n`` and ``averaged``,
            each with estimate, interval and number of images.
        clean: the same without an attack.
        undefended_clean: mean figure of the VAE alone without an attack; for reconstructions the
            noise floor, two draws of the guide at the reference.
        random_noise: mean figure under random noise of the same radius.
        attacks: every attack that ran.
        skipped: attacks that did not, and why.
        checks: sanity checks.
        reasons: why the report is unreliable; empty if it is not.
        cost: of defending one clean image, and of the suite.
        seed, budget, defence, versions: what the run was made with.
        strongest: per image, the attack that was its worst.
        per_image: mean figure of the worst case, ``(N,)``.
        x_adv: its images ``(N, C, H, W)``.
    """

    figure: str
    threat_model: dict[str, Any]
    robust: dict[str, dict[str, float]]
    clean: dict[str, dict[str, float]]
    undefended_clean: dict[str, float]
    random_noise: dict[str, float]
    attacks: tuple[AttackOutcome, ...]
    skipped: dict[str, str]
    checks: tuple[Check, ...]
    reasons: tuple[str, ...]
    cost: dict[str, float]
    seed: int
    budget: dict[str, Any]
    defence: dict[str, Any]
    versions: dict[str, str]
    strongest: tuple[str, ...]
    per_image: Tensor
    x_adv: Tensor

    @property
    def reliable(self) -> bool:
        """Whether an attacker with access to the defence ran and no check failed."""
        return not self.reasons

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, as JSON knows it."""
        found = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "x_adv"
        }
        found["attacks"] = [
            {**outcome._asdict(), "knowledge": KNOWLEDGE[outcome.name]} for outcome in self.attacks
        ]
        found["checks"] = [check._asdict() for check in self.checks]
        found["per_image"] = self.per_image.tolist()
        found["unreliable"] = not self.reliable
        found["note"] = "Heuristic, not certified: an upper bound of the true robustness."
        return found

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def evaluate_robustness(
    vae: VAE,
    defence: Defence,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    classifier: Callable[..., Tensor] | None = None,
    ball: Ball | None = None,
    budget: Budget | None = None,
    attacks: Sequence[str] | None = None,
    engine: Callable[..., Any] = attacks.APGD,
    similarity: Callable[[Tensor, Tensor], Tensor] | None = None,
    checks: bool = True,
    generator: torch.Generator | None = None,
) -> RobustnessReport:
    """Attack a defence with everything and report the worst case.

    Args:
        vae: any Pyro VAE.
        defence: what the attacker attacks: :class:`~pyro_vae_defence.defence.NoDefence`,
            :class:`~pyro_vae_defence.defence.MCMCDefence`, or anything that maps images to a
            ``DefenceResult``.
        x: reference images ``(N, C, H, W)`` in [0, 1], N >= 2.
        labels: their classes, int64 ``(N,)``; with a classifier and no labels, those that it
            predicts undefended.
        classifier: measures accuracy instead of similarity. Latents ``(M, D)`` to scores ``(M,
            classes)``, asked about where the defence ends; or a
            :class:`~pyro_vae_defence.defence.DefendedClassifier` of this defence.
        ball: where perturbations live; ``Linf(0.1)`` by default.
        budget: how hard to try.
        attacks: names of :data:`KNOWLEDGE`; all that apply by default.
        engine: optimiser of the attacks, called as ``engine(objective, ball, num_steps=,
            num_restarts=)``.
        similarity: of reconstructions, in pairs, differentiable, 1 for equal ones; the paper's
            MSSSIM by default.
        checks: run the sanity checks; without them the report counts as unreliable.
        generator: source of the seed; torch's global seed when ``None``.

    Raises:
        ValueError: if an argument does not fit.
    """
    check_vae(vae)
    check_images(x)
    if not callable(defence):
        raise ValueError(f"defence must map images to a DefenceResult, got {defence!r}")
    if x.shape[0] < 2:
        raise ValueError(f"x holds {x.shape[0]} image: intervals need two or more")
    ball = Linf(0.1) if ball is None else ball
    if not isinstance(ball, Ball):
        raise ValueError(f"ball must be a Ball such as Linf(0.1), got {ball!r}")
    unknown = sorted(set(attacks or ()) - set(KNOWLEDGE))
    if unknown or (attacks is not None and len(attacks) == 0):
        raise ValueError(
            f"attacks must be names among {', '.join(KNOWLEDGE)}, got {unknown or attacks}"
        )
    if labels is not None and tuple(labels.shape) != (x.shape[0],):
        raise ValueError(f"labels must have shape ({x.shape[0]},), got {tuple(labels.shape)}")
    with program.evaluation_mode(vae, classifier):
        suite = _Suite(
            _Victim(vae, defence, x, labels, classifier, similarity, draw_seed(generator)),
            ball,
            budget or Budget(),
            engine,
        )
        return suite.report(attacks, checks)


# --- What is attacked -----------------------------------------------------------------------------


class _Scores(NamedTuple):
    """Figures of one set of images: per draw ``(S, N)``, and of the mean output ``(N,)``."""

    per_draw: Tensor
    averaged: Tensor

    def mean(self) -> Tensor:
        return self.per_draw.mean(0)

    def choose(self, others: list[_Scores], winner: Tensor) -> _Scores:
        """The scores of candidate ``winner[i]`` for image i; candidate 0 is this one."""
        every = [self, *others]
        image = torch.arange(len(winner), device=winner.device)
        per_draw = torch.stack([s.per_draw for s in every])[winner, :, image].T
        return _Scores(per_draw, torch.stack([s.averaged for s in every])[winner, image])


class _Victim:
    """A defence and what is done with its latents; scores images, and hands the attacker its
    parts."""

    def __init__(
        self,
        vae: VAE,
        defence: Defence,
        x: Tensor,
        labels: Tensor | None,
        classifier: Callable[..., Tensor] | None,
        similarity: Callable[[Tensor, Tensor], Tensor] | None,
        seed: int,
    ) -> None:
        self.vae, self.defence, self.x, self.seed = vae, defence, x, seed
        self.asked = 0
        self.evaluations = 0
        self.shape = tuple(x.shape[1:])
        self.classifier = classifier
        self.reading = getattr(classifier, "reading", "last")
        self.perturbation = getattr(defence, "perturbation", None)
        model = program.target(vae, self.perturbation)

        def counted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.evaluations += x.shape[0]
            return model(x, *args, **kwargs)

        self.model = counted
        self.prototype = ModelPotential(counted, x)
        self.similarity = similarity or functools.partial(metrics.ms_ssim, variant="paper")
        if classifier is None:
            named = "similarity" if similarity else metrics.metric_name("ms_ssim", "paper")
            self.figure = named
            undefended = NoDefence(vae)
            self.reference = undefended(x, self.generator()).reconstruction
            again = undefended(x, self.generator()).reconstruction
            self.undefended_clean = self.similarity(self.reference, again)
        else:
            self.figure = "accuracy"
            self.base = getattr(classifier, "classifier", classifier)
            with torch.no_grad():
                scores = self.base(flatten_latents(program.posterior_mean(vae, x)))
            self.num_classes = scores.shape[-1]
            self.labels = scores.argmax(-1) if labels is None else labels
            self.undefended_clean = metrics.correct(scores.argmax(-1), self.labels)

    def generator(self) -> torch.Generator:
        """A fresh seed of the run, never used before."""
        self.asked += 1
        return torch.Generator().manual_seed((self.seed + self.asked) % 2**63)

    def score(self, x: Tensor, num_draws: int, rows: slice = slice(None)) -> _Scores:
        """Run the defence ``num_draws`` times on ``x``, attacks on the references ``rows``, on
        fresh seeds."""
        result = self.defence(x.repeat(num_draws, 1, 1, 1), self.generator())
        if self.classifier is None:
            images = lat.unfold(result.reconstruction, num_draws)
            reference = self.reference[rows]
            per_draw = torch.stack([self.similarity(image, reference) for image in images])
            return _Scores(per_draw, self.similarity(images.mean(0), reference))
        if hasattr(self.classifier, "log_probabilities"):
            log_probs = self.classifier.log_probabilities(result)
        else:
            with torch.no_grad():
                log_probs = self.base(flatten_latents(result.latents)).log_softmax(-1)
        log_probs = lat.unfold(log_probs, num_draws)
        labels = self.labels[rows]
        per_draw = torch.stack([metrics.correct(each.argmax(-1), labels) for each in log_probs])
        return _Scores(per_draw, metrics.correct(log_probs.exp().mean(0).argmax(-1), labels))

    # --- Its parts, for the attacker. Latents are unconstrained throughout. ---

    @property
    def of_mean(self) -> bool:
        """Whether the defence averages latents before they are read."""
        return self.reading in ("mean", "reencoded")

    @property
    def has_chain(self) -> bool:
        return not isinstance(self.defence, NoDefence)

    @functools.cached_property
    def unrollable(self) -> bool:
        """Whether the defence is a chain whose every transition is known."""
        if not isinstance(self.defence, MCMCDefence):
            return False
        kernel = self.defence.kernel(self.model)
        return isinstance(kernel, (BatchedHMC, BatchedNUTS)) and kernel.burn_in == 0

    def energy(self, x: Tensor, latents: Latents) -> Tensor:
        return self.prototype.at(x)(latents)

    def start(self, x: Tensor, streams: Streams) -> Latents:
        return self.prototype.at(x).unconstrain(program.encode(self.vae, x, streams=streams))

    def chain(self, x: Tensor, start: Latents, streams: Streams) -> Latents:
        """The whole defence."""
        if self.unrollable:
            return self.whole(x, start, streams)
        generator = torch.Generator().manual_seed(streams.seed % 2**63)
        before = self.evaluations
        result = self.defence(x.detach(), generator)
        self.evaluations = before + int(result.num_gradients.sum())
        return self.prototype.at(x).unconstrain(result.latents)

    @functools.cached_property
    def whole(self) -> unrolled.UnrolledKernel:
        defence: Any = self.defence
        total = defence.warmup_steps + defence.num_samples
        make = functools.partial(defence.kernel, self.model)
        return unrolled.UnrolledKernel(make, self.energy, total, defence.warmup_steps)

    def few(self, num_transitions: int) -> unrolled.UnrolledKernel:
        """Some transitions with the step size that the defence arrives at."""

        def make() -> Any:
            defence: Any = self.defence
            kernel = defence.kernel(self.model)
            kernel.rule, kernel.step_size = FixedStepSize(), self._step_size
            return kernel

        return unrolled.UnrolledKernel(make, self.energy, num_transitions)

    @functools.cached_property
    def _step_size(self) -> float:
        kernel = self.whole.make_kernel()
        streams = Streams.create(self.x.shape[0], generator=self.generator(), device=self.x.device)
        with torch.no_grad():
            start = lat.detach(self.start(self.x, streams))
        numbers = self.whole.num_transitions, self.whole.warmup_steps
        unrolled.run(kernel, self.x, start, streams, *numbers)
        assert kernel.info is not None
        return float(kernel.info.step_size.median())

    def attacked_score(self, rows: slice = slice(None)) -> PreparedScore:
        """What the attacker maximises: the classifier's margin, or one minus the similarity."""

        def decode(latents: Latents) -> Tensor:
            return program.decode(self.vae, self._constrain(latents), self.shape)

        if self.classifier is not None:

            def classify(latents: Latents) -> Tensor:
                constrained = self._constrain(latents)
                if self.reading == "reencoded":
                    constrained = reencode(self.vae, constrained, self.shape)
                return self.base(flatten_latents(constrained))

            return adaptive.misclassification(classify, self.labels[rows])

        reference = self.reference[rows]

        def damage(image: Tensor, reference: Tensor) -> Tensor:
            return 1.0 - self.similarity(image, reference)

        def reconstruct(x_ref: Tensor) -> Tensor:
            return reference.repeat(x_ref.shape[0] // reference.shape[0], 1, 1, 1)

        return adaptive.output_damage(decode, reconstruct, damage)

    def _constrain(self, latents: Latents) -> Latents:
        return self.prototype.constrain(latents)


# --- The suite ------------------------------------------------------------------------------------


class _Candidate(NamedTuple):
    name: str
    num_draws: int
    x_adv: Tensor
    selection: Tensor
    evaluations: float
    seconds: float


class _Suite:
    def __init__(
        self, victim: _Victim, ball: Ball, budget: Budget, engine: Callable[..., Any]
    ) -> None:
        self.victim, self.ball, self.budget, self.engine = victim, ball, budget, engine

    def applicable(self) -> dict[str, str]:
        """Attack -> why it does not apply, empty where it does."""
        victim = self.victim
        reasons = dict.fromkeys(KNOWLEDGE, "")
        if not victim.has_chain:
            for name in ("bpda", "equilibrium", "implicit", "truncated", "unroll"):
                reasons[name] = "there is no defence behind the encoder: 'encoder' is exact"
        elif not victim.unrollable:
            for name in ("equilibrium", "truncated", "unroll"):
                reasons[name] = "the defence is not a chain whose transitions are known"
        return reasons

    def objective(
        self, name: str, num_draws: int, rows: slice = slice(None), resample: bool = True
    ) -> PreparedObjective:
        """The attacker's objective; without a gradient in the image it has gradient zero, and
        attacks go on."""
        prepared = self._objective(name, num_draws, rows, resample)
        return lambda x_ref: _connected(prepared(x_ref))

    def _objective(
        self, name: str, num_draws: int, rows: slice, resample: bool
    ) -> PreparedObjective:
        """The objective with the gradient that gives the attack its name."""
        victim, budget = self.victim, self.budget
        if name == "transfer":
            return attacks.symmetric_kl(victim.vae)
        score, generator = victim.attacked_score(rows), victim.generator()
        # Few draws of a chain say nothing of the mean latent; averaged draws do.
        options: dict[str, Any] = {"generator": generator, "of_mean": victim.of_mean}
        number = budget.persistent_transitions
        persistent = resample and victim.unrollable and number is not None
        resume = victim.few(number) if persistent and number is not None else None
        if name == "equilibrium":
            return adaptive.equilibrium(
                victim.start, victim.chain, victim.energy, score, num_draws, resume=resume, **options
            )  # fmt: skip
        if name == "encoder" or (name == "black_box" and not victim.has_chain):
            encode = adaptive.transfer(victim.start)
        elif name in ("bpda", "black_box"):
            encode = adaptive.bpda(victim.start, victim.chain, resume)
        elif name == "implicit":
            encode = adaptive.implicit(
                victim.start, victim.chain, victim.energy, budget.num_iterations, resume=resume
            )
        elif name == "truncated":
            last = victim.few(budget.unrolled_transitions)
            encode = adaptive.truncated(victim.start, victim.chain, last, resume)
        else:
            encode = adaptive.unroll(victim.start, victim.chain)
        if name == "black_box":
            frozen = adaptive.expected(encode, score, num_draws, resample=False, **options)
            return adaptive.nes(frozen, budget.num_directions, self.ball_scale(), generator)
        persistent = persistent and name in ("bpda", "implicit", "truncated")
        return adaptive.expected(
            encode, score, num_draws, persistent=persistent, resample=resample, **options
        )

    def ball_scale(self) -> float:
        """Smoothing of the black box: half the size of a typical perturbation, per pixel."""
        size = self.victim.x[0].numel()
        typical = {"L2": self.ball.radius / size**0.5, "L1": self.ball.radius / size}
        return 0.5 * typical.get(self.ball.norm_name, self.ball.radius)

    def attack(
        self,
        name: str,
        num_draws: int,
        *,
        rows: slice = slice(None),
        ball: Ball | None = None,
        num_steps: int | None = None,
        num_restarts: int = 1,
    ) -> Tensor:
        """Attacked images of every restart, ``(num_restarts, N, C, H, W)``."""
        steps = self.budget.black_box_steps if name == "black_box" else self.budget.num_steps
        engine = self.engine(
            self.objective(name, num_draws, rows),
            ball or self.ball,
            num_steps=num_steps or steps,
            num_restarts=num_restarts,
            batch_size=2**31,
        )
        return engine(self.victim.x[rows], self.victim.generator()).x_adv

    def candidates(self, names: Sequence[str], skipped: dict[str, str]) -> Iterator[_Candidate]:
        budget, victim = self.budget, self.victim
        for name in names:
            before: float | None = None
            for num_draws in self._num_draws(name):
                limit = budget.max_evaluations
                if limit is not None and victim.evaluations >= limit * len(victim.x):
                    skipped.setdefault(f"{name} ({num_draws} draws)", "the budget was spent")
                    break
                spent, started = victim.evaluations, time.perf_counter()
                x_adv = self.attack(name, num_draws, num_restarts=budget.num_restarts)
                seconds = time.perf_counter() - started
                per_image = (victim.evaluations - spent) / len(victim.x)
                per_restart = torch.stack(
                    [victim.score(each, budget.selection_draws).mean() for each in x_adv]
                )
                selection, winner = per_restart.min(0)
                image = torch.arange(len(winner), device=winner.device)
                yield _Candidate(
                    name, num_draws, x_adv[winner, image], selection, per_image, seconds
                )
                reached = float(selection.mean())
                if before is not None and abs(reached - before) <= budget.stable:
                    break
                before = reached

    def _num_draws(self, name: str) -> tuple[int, ...]:
        if name == "transfer":
            return (1,)
        if name == "equilibrium":
            return (self.budget.num_chains,)
        return self.budget.num_draws

    def report(self, wanted: Sequence[str] | None, with_checks: bool) -> RobustnessReport:
        victim, budget = self.victim, self.budget
        started = time.perf_counter()
        reasons = self.applicable()
        names = [n for n in KNOWLEDGE if (wanted is None or n in wanted) and not reasons[n]]
        skipped = {n: reasons[n] or "not asked for" for n in KNOWLEDGE if n not in names}
        clock = time.perf_counter()
        clean = victim.score(victim.x, budget.scoring_draws)
        clean_seconds = (time.perf_counter() - clock) / (len(victim.x) * budget.scoring_draws)
        clean_result = victim.defence(victim.x, victim.generator())
        noise = victim.score(
            attacks.random_noise(victim.x, self.ball, victim.generator()), budget.scoring_draws
        )
        found = list(self.candidates(names, skipped))
        scores = [victim.score(each.x_adv, budget.scoring_draws) for each in found]
        # Leaving an image alone is an attack too: it counts errors on clean images.
        clean_selection = victim.score(victim.x, budget.selection_draws).mean()
        chosen = torch.stack([clean_selection, *(each.selection for each in found)])
        winner = chosen.argmin(0)
        worst = clean.choose(scores, winner)
        image = torch.arange(len(winner), device=winner.device)
        x_adv = torch.stack([victim.x, *(each.x_adv for each in found)])[winner, image]
        labels = ["none", *(each.name for each in found)]
        spent = victim.evaluations / len(victim.x)
        checks = tuple(self.checks(found, scores, clean, noise, worst)) if with_checks else ()
        failed = [f"check {c.name}: {c.detail}" for c in checks if c.passed is False]
        if not with_checks:
            failed.append("no sanity check ran")
        if victim.has_chain and {each.name for each in found} <= set(TRANSFER):
            failed.append("only transfer attacks ran: no attacker knew the defence")
        return RobustnessReport(
            figure=victim.figure,
            threat_model={
                "norm": self.ball.norm_name,
                "radius": self.ball.radius,
                "target": "reconstruction" if victim.classifier is None else "classification",
                "reading": victim.reading,
            },
            robust=self._figures(worst),
            clean=self._figures(clean),
            undefended_clean=self._interval(victim.undefended_clean),
            random_noise=self._interval(noise.mean()),
            attacks=tuple(
                AttackOutcome(
                    each.name,
                    each.num_draws,
                    self._interval(score.mean()),
                    each.evaluations,
                    each.seconds,
                )
                for each, score in zip(found, scores, strict=True)
            ),
            skipped=skipped,
            checks=checks,
            reasons=tuple(failed),
            cost={
                "defence_gradients_per_image": float(clean_result.num_gradients.double().mean()),
                "defence_seconds_per_image": clean_seconds,
                "attack_evaluations_per_image": spent,
                "seconds": time.perf_counter() - started,
            },
            seed=victim.seed,
            budget=json.loads(json.dumps(dataclasses.asdict(budget))),
            defence=dict(clean_result.settings),
            versions={
                "pyro_vae_defence": pyro_vae_defence.__version__,
                **{name: metadata.version(name) for name in ("torch", "pyro-ppl")},
            },
            strongest=tuple(labels[index] for index in winner.tolist()),
            per_image=worst.mean().detach().cpu(),
            x_adv=x_adv,
        )

    def _interval(self, values: Tensor) -> dict[str, float]:
        found = metrics.bootstrap_interval(
            values.detach(), level=LEVEL, generator=self.victim.generator()
        )
        return {
            "estimate": found.estimate,
            "low": found.low,
            "high": found.high,
            "num_images": found.num_values,
        }

    def _figures(self, scores: _Scores) -> dict[str, dict[str, float]]:
        return {
            "mean": self._interval(scores.mean()),
            "single": self._interval(scores.per_draw[0]),
            "worst_of_n": self._interval(scores.per_draw.amin(0)),
            "averaged": self._interval(scores.averaged),
        }

    # --- Sanity checks ---

    def checks(
        self,
        found: list[_Candidate],
        scores: list[_Scores],
        clean: _Scores,
        noise: _Scores,
        worst: _Scores,
    ) -> Iterator[Check]:
        """The checks of the module's text, with what each saw."""
        gradient = [i for i, each in enumerate(found) if each.name != "black_box"]
        black = [i for i, each in enumerate(found) if each.name == "black_box"]
        yield from self._check_gradients()
        yield self._check_black_box(found, scores, gradient, black)
        if gradient:
            strongest = min(gradient, key=lambda i: float(scores[i].mean().mean()))
            yield from self._check_radii(found[strongest])
            yield self._check_iterations(found[strongest])
        drop_noise, drop = clean.mean() - noise.mean(), clean.mean() - worst.mean()
        excess = self._interval(drop_noise - 0.5 * drop)
        yield Check(
            "random_noise_is_weaker",
            excess["low"] <= 0,
            f"random noise lowers the figure by {float(drop_noise.mean()):.3f}, the attacks by "
            f"{float(drop.mean()):.3f}; half of that is allowed, beyond noise",
        )

    def _check_gradients(self) -> Iterator[Check]:
        """Finite differences with common random numbers, at a small step and at that of the
        ball."""
        victim, names = self.victim, ("finite_differences", "gradients_explain_changes")
        if victim.has_chain and not victim.unrollable:
            for name in names:
                yield Check(name, None, "no exact gradient of this defence is known")
            return
        rows = slice(0, self.budget.check_images)
        x_ref = victim.x[rows]
        score = victim.attacked_score(rows)
        encode = adaptive.transfer(victim.start)
        if victim.has_chain:
            encode = adaptive.unroll(victim.start, victim.few(self.budget.unrolled_transitions))
        prepared = adaptive.expected(encode, score, resample=False, generator=victim.generator())
        objective = _connected(prepared(x_ref))
        x_1, x_2 = (attacks.random_noise(x_ref, self.ball, victim.generator()) for _ in range(2))
        # At the reference itself many objectives have gradient zero.
        x_0 = x_ref + 0.5 * (x_1 - x_ref)
        leaf = x_0.clone().requires_grad_()
        value = objective(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        usable = gradient.isfinite().flatten(1).all(1)
        gradient = torch.where(gradient.isfinite(), gradient, 0.0)
        direction = torch.where(gradient != 0, gradient.sign(), (x_2 - x_ref).sign())
        step = 0.02 * (x_2 - x_ref).abs().amax()
        with torch.no_grad():
            ahead, behind = (
                objective((x_0 + sign * step * direction).clamp(0.0, 1.0)) for sign in (1, -1)
            )
            moved = (x_0 + step * direction).clamp(0, 1) - (x_0 - step * direction).clamp(0, 1)
            predicted = (gradient * moved).flatten(1).sum(1)
            seen = ahead - behind
            larger = torch.maximum(seen.abs(), predicted.abs())
            rounding = 1e-5 * (1 + value.abs())
            agree = usable & ((seen - predicted).abs() <= 0.25 * larger + rounding)
            change = (objective(x_2) - value).abs()
            bound = (gradient * (x_2 - x_0)).abs().flatten(1).sum(1)
            explained = usable & (change <= bound + rounding)
        yield Check(
            names[0],
            bool(agree.double().mean() >= 0.7),
            f"{int(agree.sum())} of {len(agree)} images agree within a quarter (at least 70% must)",
        )
        yield Check(
            names[1],
            bool(explained.double().mean() >= 0.8),
            f"on {int(explained.sum())} of {len(explained)} images a random step in the ball "
            "changes the "
            "objective by no more than the gradient allows (at least 80% must)",
        )

    def _check_black_box(
        self,
        found: list[_Candidate],
        scores: list[_Scores],
        gradient: list[int],
        black: list[int],
    ) -> Check:
        name = "black_box_is_not_stronger"
        if not (gradient and black):
            return Check(name, None, "needs a black-box and a gradient attack")

        def worst(indices: list[int]) -> Tensor:
            selection = torch.stack([found[i].selection for i in indices])
            first, *others = (scores[i] for i in indices)
            return first.choose(others, selection.argmin(0)).mean()

        lead = self._interval(worst(gradient) - worst(black))
        return Check(
            name,
            lead["low"] <= 0,
            f"figure under gradient attacks minus figure under the black box: {_show(lead)}; must "
            "not "
            "lie above 0 beyond noise",
        )

    def _check_radii(self, strongest: _Candidate) -> Iterator[Check]:
        victim, budget = self.victim, self.budget
        rows = slice(0, budget.check_images)
        size = victim.x[0].numel()
        covering = {"L2": L2(size**0.5), "L1": L1(float(size))}.get(self.ball.norm_name, Linf(1.0))
        radius = self.ball.radius
        balls = [type(self.ball)(radius / 2), self.ball, covering]
        if not radius < covering.radius:
            balls = [type(self.ball)(covering.radius / 2), covering]
        figures = []
        for ball in balls:
            x_adv = self.attack(
                strongest.name, strongest.num_draws, rows=rows, ball=ball, num_steps=budget.check_steps
            )[0]  # fmt: skip
            figures.append(victim.score(x_adv, budget.scoring_draws, rows))
        shown = ", ".join(
            f"{ball.radius:g}: {float(f.mean().mean()):.3f}"
            for ball, f in zip(balls, figures, strict=True)
        )
        yield self._check_whole_range(figures[-1], rows)
        rises = [
            self._interval(after.mean() - before.mean())
            for before, after in itertools.pairwise(figures)
        ]
        yield Check(
            "monotone_in_radius",
            all(rise["low"] <= 0 for rise in rises),
            f"'{strongest.name}', {budget.check_steps} steps, figure by radius: {shown}; must not "
            "rise "
            "beyond noise",
        )

    def _check_whole_range(self, figure: _Scores, rows: slice) -> Check:
        """An attacker free to choose any image leaves what another image's prediction would."""
        victim, name = self.victim, "whole_range_leaves_chance"
        if victim.classifier is not None:
            chance = 1.0 / victim.num_classes
            right, of = int(figure.per_draw[0].sum()), figure.per_draw.shape[1]
            # Probability of so many right answers, or more, by chance.
            tail = sum(
                math.comb(of, k) * chance**k * (1 - chance) ** (of - k)
                for k in range(right, of + 1)
            )
            return Check(
                name,
                tail > 0.01,
                f"{right} of {of} right where any image is allowed; by chance {chance * of:.1f} "
                f"(so many or more with probability {tail:.2g})",
            )
        reference = victim.reference[rows]
        unrelated = victim.similarity(reference.roll(1, 0), reference)
        excess = self._interval(figure.mean() - unrelated)
        return Check(
            name,
            excess["low"] <= 0,
            f"figure {float(figure.mean().mean()):.3f} where any image is allowed, unrelated "
            "images have "
            f"{float(unrelated.mean()):.3f}; must not exceed it beyond noise",
        )

    def _check_iterations(self, strongest: _Candidate) -> Check:
        """The attacker's objective, on noise of its own, after no, some, and all steps."""
        victim, budget = self.victim, self.budget
        rows = slice(0, budget.check_images)
        x_ref = victim.x[rows]
        name = strongest.name
        honest = "encoder" if not victim.has_chain else "bpda"
        measure = "transfer" if name == "transfer" else honest
        draws = 1 if name == "transfer" else max(5, budget.selection_draws)
        objective = self.objective(measure, draws, rows, resample=False)(x_ref)
        few, many = (
            self.attack(name, strongest.num_draws, rows=rows, num_steps=steps)[0]
            for steps in (max(1, budget.check_steps // 4), budget.check_steps)
        )
        start = attacks.random_noise(x_ref, self.ball, victim.generator())
        with torch.no_grad():
            values = [objective(each) for each in (start, few, many)]
        rise = self._interval(values[2] - values[0])
        later = self._interval(values[2] - values[1])
        shown = ", ".join(f"{float(value.mean()):.4g}" for value in values)
        return Check(
            "loss_increases_with_iterations",
            rise["low"] > 0 and later["high"] >= 0,
            f"'{name}' objective after 0, {max(1, budget.check_steps // 4)} and "
            f"{budget.check_steps} steps: "
            f"{shown}; must rise from the first to the last beyond noise, and not fall in between",
        )


def _connected(objective: Objective) -> Objective:
    return lambda x: objective(x) + 0.0 * x.flatten(1).sum(1)


def _show(entry: dict[str, float]) -> str:
    return f"{entry['estimate']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"
