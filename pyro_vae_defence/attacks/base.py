r"""The template of every attack: objective x ball x optimiser.

All attacks of this package look for

.. math:: \max_\varepsilon \; \Delta(x^r + \varepsilon) \quad \text{subject to} \quad
          \|\varepsilon\|_p \le r, \;\; 0 \le x^r + \varepsilon \le 1 ,

for every reference image from several random starts. :class:`Attack` does what they have in common:
it checks arguments, folds restarts into the batch, cuts the batch into micro-batches, counts
evaluations, lets solved rows leave, keeps progress in a file, and sees that results are inside the
ball. An optimiser adds three methods on *states*, dicts of tensors with one row per (restart,
image) pair: a start, a step, and a finish. Rows do not see each other, nor each other's noise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pyro_vae_defence.attacks.objectives._rows import check_entries, prepare
from pyro_vae_defence.models.conditions import fold, kept, rows_of, split
from pyro_vae_defence.models.program import check_images
from pyro_vae_defence.ops.balls import Ball, check_ball
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import check_integer, check_within, plain
from pyro_vae_defence.ops.files import (
    atomic_save,
    check_writable,
    load_tensors,
    naming,
    real_place,
)
from pyro_vae_defence.ops.latents import rows, unfold
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import (
    Criterion,
    ImagesLike,
    Objective,
    PreparedCriterion,
    PreparedObjective,
)

Start: TypeAlias = Callable[[Tensor, Streams], Tensor]
"""References ``(M, C, H, W)`` and the random streams of their rows -> images to start from."""

State = dict[str, Tensor]
"""What an optimiser knows, one row per (restart, image) pair. Two entries are the template's:
``result``, the perturbation it would return now, and ``result_value``, its objective."""


class FlatAttack(NamedTuple):
    """Perturbed images of all restarts ``(num_restarts * N, C, H, W)``, each with its reference.

    ``index`` says which reference that is, int64 ``(num_restarts * N,)``: what intervals resample.
    """

    images: Tensor
    references: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


class AttackResult(NamedTuple):
    """Perturbed images of every restart.

    Attributes:
        x_adv: ``(num_restarts, N, C, H, W)``, in [0, 1] and in the ball around ``x_ref``.
        objective: value the attacker reached, ``(num_restarts, N)``.
        x_ref: the references ``(N, C, H, W)``.
        num_gradients, num_queries: evaluations of the objective with and without its gradient,
            int64 ``(num_restarts, N)``.
        solved: whether ``stop`` was met, bool ``(num_restarts, N)``; all False without ``stop``.
    """

    x_adv: Tensor
    objective: Tensor
    x_ref: Tensor
    num_gradients: Tensor
    num_queries: Tensor
    solved: Tensor

    def __repr__(self) -> str:
        num_restarts, num_images = self.objective.shape
        reached = self._ranking().amax(0).double().mean()
        best = "unknown" if reached.is_meta else f"{reached:.4g}"
        return (
            f"AttackResult({num_images} images {tuple(self.x_ref.shape[1:])}, {num_restarts} "
            f"restart(s), mean objective of the best {best})"
        )

    def best(self) -> Tensor:
        """The strongest restart of each image, ``(N, C, H, W)``: of those that met ``stop``, if any
        did, the one of the highest objective. One without a value never wins."""
        winner = self._ranking().argmax(0)
        return self.x_adv[winner, torch.arange(len(winner), device=winner.device)]

    def _ranking(self) -> Tensor:
        """The objective, minus infinity where it is no number, or another restart has met ``stop``:
        one that left the batch early has less of it than one that failed to the end."""
        beaten = self.solved.any(0) & ~self.solved
        return self.objective.nan_to_num(nan=-torch.inf).masked_fill(beaten, -torch.inf)

    def flat(self) -> FlatAttack:
        """Restart after restart as one batch; row ``r * N + i`` is restart r of image i."""
        num_restarts, num_images = self.objective.shape
        index = torch.arange(num_images, device=self.x_adv.device).repeat(num_restarts)
        return FlatAttack(self.x_adv.flatten(0, 1), self.x_ref[index], index)


def reaches(threshold: float) -> PreparedCriterion:
    """Criterion for ``stop``: the objective is at least ``threshold``, one number for all."""
    check_within("threshold", threshold, "[-inf, inf]")
    return lambda x_ref: lambda x, value: value >= threshold


@dataclass
class Problem:
    """Rows under attack, with their references ``(rows, C, H, W)`` and random streams.

    ``num_gradients`` and ``num_queries`` count evaluations with and without a gradient, per row.
    """

    objective: Objective
    ball: Ball
    x_ref: Tensor
    streams: Streams
    num_gradients: int = 0
    num_queries: int = 0
    any_finite: Tensor | None = None
    """Whether a number of any gradient was finite, bool ``()``; ``None`` before the first."""
    start_from: Start | None = None
    last: tuple[Tensor, Tensor] | None = None
    """The perturbation that was evaluated last, and its objective."""

    def start(self) -> Tensor:
        """A random point of the ball, clipped so that the image is valid; or what is nearest to
        where to start from."""
        if self.start_from is not None:
            found = self.start_from(self.x_ref, self.streams)
            if not isinstance(found, Tensor) or found.shape != self.x_ref.shape:
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    "start must return an image for each reference, a tensor of shape "
                    f"{tuple(self.x_ref.shape)}, got {got}"
                )
            return self.project(found.detach().to(self.x_ref.dtype) - self.x_ref)
        start = self.ball.random_start(self.x_ref, self.streams)
        return torch.minimum(torch.maximum(start, -self.x_ref), 1.0 - self.x_ref)

    def project(self, perturbation: Tensor) -> Tensor:
        """Nearest perturbation inside the ball whose image is in [0, 1]."""
        return self.ball.project_box(perturbation, -self.x_ref, 1.0 - self.x_ref)

    def climb(self, perturbation: Tensor, gradient: Tensor, length: Tensor | float) -> Tensor:
        """Project a step of a ``length``, perhaps one per row, along the ball's steepest ascent."""
        length = rows(length, gradient) if isinstance(length, Tensor) else length
        return self.project(perturbation + length * self.ball.step_direction(gradient))

    def _evaluate(self, x: Tensor) -> Tensor:
        value = self.objective(x)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"objective must return a tensor with one value per image, shape ({len(x)},), got "
                f"a {type(value).__name__}"
            )
        if value.shape != (len(x),):
            raise ValueError(
                f"objective must return one value per image, shape ({len(x)},), "
                f"got {tuple(value.shape)}; sum over pixels and latents, not over images"
            )
        return value if value.is_floating_point() else value.to(x.dtype)

    def value(self, perturbation: Tensor) -> Tensor:
        """The objective, ``(rows,)``; one query. Raises ``ValueError`` for one of another shape."""
        self.num_queries += 1
        with torch.no_grad():
            value = self._evaluate((self.x_ref + perturbation).clamp(0.0, 1.0))
        self.last = perturbation, value
        return value

    def value_and_gradient(
        self, perturbation: Tensor, *, through_clip: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The objective and its gradient; one gradient. Entries that are not finite become zero.

        The gradient is that at the clipped image. ``through_clip`` differentiates the clipping too:
        clipped pixels have gradient zero, also those that only rounding has put outside.

        Raises ``ValueError`` for an objective without a gradient in the image, or of another shape.
        """
        self.num_gradients += 1
        with torch.enable_grad():
            if through_clip:
                leaf = perturbation.detach().requires_grad_()
                value = self._evaluate((self.x_ref + leaf).clamp(0.0, 1.0))
            else:
                leaf = (self.x_ref + perturbation).clamp(0.0, 1.0).detach().requires_grad_()
                value = self._evaluate(leaf)
            gradient = None
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "objective has no gradient in the image: the guide, or the objective itself, "
                "binarises, quantises or detaches it (x > 0.5, an index, x.detach()), or draws "
                "from a family without reparametrised samples (VonMises, Poisson); use a black-box "
                "attack such as attacks.Square, or a straight-through estimate there"
            )
        # A row whose gradient overflows stays where it is instead of leaving the ball as NaN.
        finite = gradient.isfinite()
        found = finite.any()
        self.any_finite = found if self.any_finite is None else self.any_finite | found
        self.last = perturbation.detach(), value.detach()
        return value.detach(), torch.where(finite, gradient, 0.0)

    def judged(self, criterion: Criterion, state: State) -> State:
        """The state, whose result is what was evaluated last where that meets the criterion: one
        that does may be lower than another that does not."""
        if self.last is None:
            return state
        perturbation, value = self.last
        met = self.judge(criterion, (self.x_ref + perturbation).clamp(0.0, 1.0), value)
        # The published attack starts outside of the ball.
        met = met & (self.ball.norm(perturbation) <= self.ball.radius * (1 + 1e-5))
        return {
            **state,
            "result": torch.where(rows(met, perturbation), perturbation, state["result"]),
            "result_value": torch.where(
                met, value.to(state["result_value"]), state["result_value"]
            ),
            "solved": met,
        }

    def judge(self, criterion: Criterion, perturbed: Tensor, value: Tensor) -> Tensor:
        """What a criterion says of rows, bool. Raises ``ValueError`` if it does not say that."""
        met = criterion(perturbed, value)
        if not (
            isinstance(met, Tensor) and met.dtype == torch.bool and met.shape == (len(perturbed),)
        ):
            said = (
                f"{met.dtype} {tuple(met.shape)}"
                if isinstance(met, Tensor)
                else f"a {type(met).__name__}"
            )
            raise ValueError(
                f"stop must say of every image whether it is met, bool ({len(perturbed)},), got "
                f"{said}"
            )
        return met


def _check_finite(any_finite: Sequence[Tensor | None], value: Tensor) -> None:
    """``ValueError`` if the objective is not finite for a single row in the end, or no gradient had
    a finite number although it is.

    ``any_finite`` are those of the problems of all micro-batches.
    """
    if value.device.type == "meta":
        return
    if not bool(value.isfinite().any()):
        raise ValueError(
            f"objective is not finite at any of the {value.numel()} attacked images, so that "
            f"nothing was maximised (the first value is {float(value.flatten()[0])}); "
            "evaluate it at x_ref, and see where the encoder or a divergence overflows"
        )
    found = [each for each in any_finite if each is not None]
    if len(found) == len(any_finite) and not bool(torch.stack(found).any()):
        raise ValueError(
            "the gradient of objective is not finite at any pixel of any image, so that no "
            "image was moved by it; look for the root or the norm of zero, or an overflow, in "
            "the objective and the encoder, or use a black-box attack such as attacks.Square"
        )


BLACK_BOX_PURPOSE = 3072  # of the streams' draws; see docs/architecture.md


def random_signs(
    streams: Streams, step: int, purpose: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Plus or minus one at random, ``(rows, *shape)``, as black boxes draw them."""
    uniform = streams.uniform(step, BLACK_BOX_PURPOSE + purpose, shape, dtype)
    return torch.where(uniform > 0.5, 1.0, -1.0).to(dtype)


def keep_best(state: State, perturbation: Tensor, value: Tensor) -> State:
    """Replace each row's result where ``value`` is higher."""
    better = value > state["result_value"]
    return {
        **state,
        "result": torch.where(rows(better, perturbation), perturbation, state["result"]),
        "result_value": torch.where(better, value, state["result_value"]),
    }


def first_result(perturbation: Tensor) -> State:
    """The template's entries before anything was evaluated."""
    return {
        "result": perturbation,
        "result_value": torch.full_like(perturbation.flatten(1)[:, 0], -torch.inf),
    }


@dataclass(frozen=True)
class Attack:
    """An attack; use one of its subclasses and call it with reference images.

    Args:
        objective: a prepared objective, e.g. ``attacks.symmetric_kl(vae)``.
        ball: where perturbations live, e.g. ``ops.balls.Linf(0.1)``.
        num_steps: steps of the optimiser, >= 1; the subclass says what a step costs.
        num_restarts: random starts per image, >= 1.
        batch_size: most rows (restarts times images) at a time; results do not depend on it, but
            for objectives with noise of their own (:mod:`~pyro_vae_defence.attacks.adaptive`).
        stop: prepared criterion, e.g. ``attacks.misclassified(vae, classifier)``; rows leave the
            batch with the first image that meets it, be its objective the highest or not. The
            criterion's own evaluations of the model are not counted. It costs a synchronisation
            with the device per step.
        checkpoint: file for progress; finished micro-batches are beside it, in FILE.part0 and so
            on. A call that finds it goes on from there, with the seed stored in it, and removes
            them when it is done.
        checkpoint_every: steps between writes; the end of a micro-batch is always written.
        start: where to start in place of a random point of the ball, see
            :mod:`~pyro_vae_defence.attacks.starts`.

    Raises:
        ValueError: if an argument is out of range, images are not in [0, 1], or the checkpoint
            belongs to other images or settings (objectives and starts cannot be compared: name
            files by them).
    """

    objective: PreparedObjective
    ball: Ball
    num_steps: int = 50
    num_restarts: int = 1
    batch_size: int = 4096
    stop: PreparedCriterion | None = None
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int = 100
    start: Start | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        is_vae = callable(getattr(self.objective, "guide", None))
        if is_vae or not callable(self.objective):
            got = f"a VAE, {type(self.objective).__name__}" if is_vae else repr(self.objective)
            raise ValueError(
                f"objective must be a prepared objective such as symmetric_kl(vae), got {got}"
            )
        check_ball(self.ball)
        if not (self.stop is None or callable(self.stop)):
            raise ValueError(
                f"stop must be a prepared criterion such as reaches(10.0), got {self.stop!r}"
            )
        if not (self.start is None or callable(self.start)):
            raise ValueError(
                f"start must be a start such as starts.stripes(), or None, got {self.start!r}"
            )
        for name in ("num_steps", "num_restarts", "batch_size", "checkpoint_every"):
            check_integer(name, getattr(self, name))
        for entry in dataclasses.fields(self):
            object.__setattr__(self, entry.name, plain(getattr(self, entry.name)))

    # --- What an optimiser adds -------------------------------------------------------------------

    def _start(self, problem: Problem) -> State:
        """The state before the first step, with the entries of :func:`first_result`."""
        raise NotImplementedError

    def _step(self, problem: Problem, state: State, t: int) -> State:
        """The state after step ``t`` (0, 1, ...)."""
        raise NotImplementedError

    def _finish(self, problem: Problem, state: State) -> State:
        """The state after the last step; a last iterate that was not evaluated may be now."""
        return state

    # --- The template -----------------------------------------------------------------------------

    @public
    def __call__(self, x_ref: ImagesLike, generator: torch.Generator | None = None) -> AttackResult:
        """Attack reference images ``(N, C, H, W)`` in [0, 1] from ``num_restarts`` random starts.

        With a tuple ``(x_ref, *conditions)`` the objective's VAE is conditional, and attacked given
        its conditions. The run's seed comes from the ``generator``, or from torch's global seed.

        Raises ``ValueError`` if the objective is not finite for a single row in the end, or no
        gradient of it was.
        """
        x_ref, conditions = split(x_ref, "x_ref")
        check_images(x_ref, "x_ref")
        self._check_entries(len(x_ref))
        image = torch.arange(len(x_ref), device=x_ref.device)
        return self.attack_rows(x_ref, image, draw_seed(generator), conditions)

    def _check_entries(self, num_images: int) -> None:
        """``ValueError`` if labels, targets or starts are not of so many images."""
        for prepared in (self.objective, self.stop, self.start):
            if prepared is not None:
                check_entries(prepared, num_images)

    @public
    def attack_rows(
        self,
        x_ref: Tensor,
        image: Tensor,
        seed: int,
        conditions: tuple[Tensor, ...] = (),
        check: bool = True,
    ) -> AttackResult:
        """Attack images, each with the random streams that ``image`` ``(N,)`` numbers.

        Raises as a call. Without ``check`` objectives and gradients may be finite nowhere: of some
        of the images of an attack, which its others might have spared the error.
        """
        x_ref = kept(x_ref)
        progress = _Progress(self, (x_ref, *conditions), seed)
        chain = torch.arange(self.num_restarts, device=x_ref.device).repeat_interleave(len(x_ref))
        streams = Streams(progress.seed, image.repeat(self.num_restarts), chain)
        number = self.num_restarts * len(x_ref)
        folded = tuple(fold(value, number) for value in (x_ref, *conditions))
        for first in range(len(progress.finished) * self.batch_size, number, self.batch_size):
            part = slice(first, first + self.batch_size)
            rows = rows_of(folded, part)
            progress.finish(*self._attack(rows, _take(streams, part), progress))
        whole = {
            name: unfold(torch.cat([part[name] for part in progress.finished]), self.num_restarts)
            for name in progress.finished[0]
        }
        progress.remove()  # or an objective that was mended would be refused for the other one
        if check:
            _check_finite(progress.any_finite, whole["objective"])
        return AttackResult(x_ref=x_ref, **whole)

    def _attack(
        self, images: tuple[Tensor, ...], streams: Streams, progress: _Progress
    ) -> tuple[State, Tensor | None]:
        """Attack the rows of one micro-batch; returns the fields of the result, one row each, and
        whether a gradient was finite."""
        x_ref = images[0]
        if progress.underway:
            first, active, state, outcome, seen = progress.pop()
            problem, criterion = self._prepare(images, streams, active)
            problem.any_finite = seen
        else:
            first, active = 0, torch.arange(len(x_ref), device=x_ref.device)
            problem, criterion = self._prepare(images, streams)
            zero = torch.zeros_like(active)
            counts = {"num_gradients": zero, "num_queries": zero, "solved": zero.bool()}
            state = _charge(self._start(problem) | counts, problem)
            outcome = {name: torch.zeros_like(state[name]) for name in ("result", *counts)}
        for t in range(first, self.num_steps):
            state = _charge(self._step(problem, state, t), problem)
            if criterion is not None:
                state = problem.judged(criterion, state)
                solved = state["solved"]
                if bool(solved.any()):
                    outcome = _put(outcome, active[solved], _select(state, solved))
                    active, state = active[~solved], _select(state, ~solved)
                    if len(active) == 0:
                        break
                    seen = problem.any_finite
                    problem, criterion = self._prepare(images, streams, active)
                    problem.any_finite = seen
            progress.step(t + 1, active, state, outcome, problem.any_finite)
        if len(active) > 0:
            state = _charge(self._finish(problem, state), problem)
            if criterion is not None:
                state = problem.judged(criterion, state)
            outcome = _put(outcome, active, state)
        x_adv = (x_ref + outcome.pop("result")).clamp(0.0, 1.0)
        x_adv = self.ball.inside(x_ref, x_adv)
        seen = problem.any_finite
        problem, criterion = self._prepare(images, streams)
        with torch.no_grad():
            value = problem._evaluate(x_adv)
        outcome["num_queries"] = outcome["num_queries"] + 1
        if criterion is not None:
            # The last move was judged by no step, and what is returned was rounded into the ball.
            outcome["solved"] = problem.judge(criterion, x_adv, value)
        return {"x_adv": x_adv, "objective": value, **outcome}, seen

    def _prepare(
        self, images: tuple[Tensor, ...], streams: Streams, rows: Tensor | slice = slice(None)
    ) -> tuple[Problem, Criterion | None]:
        images, streams = rows_of(images, rows), _take(streams, rows)
        objective = prepare(self.objective, images, streams)
        problem = Problem(objective, self.ball, images[0], streams, start_from=self.start)
        return problem, (
            None
            if self.stop is None
            else prepare(self.stop, images, streams, needs_conditions=False)
        )


def _charge(state: State, problem: Problem) -> State:
    """Book what the problem has counted since the last call to every row."""
    state = {
        **state,
        "num_gradients": state["num_gradients"] + problem.num_gradients,
        "num_queries": state["num_queries"] + problem.num_queries,
    }
    problem.num_gradients = problem.num_queries = 0
    return state


def _take(streams: Streams, index: Tensor | slice) -> Streams:
    return Streams(streams.seed, streams.image[index], streams.chain[index])


def _select(state: State, mask: Tensor) -> State:
    return {name: value[mask] for name, value in state.items()}


def _put(outcome: State, index: Tensor, state: State) -> State:
    return {name: value.index_copy(0, index, state[name]) for name, value in outcome.items()}


class _Progress:
    """Finished micro-batches and the one under way, in memory and in the checkpoint's files: each
    finished one has its own, which is written once."""

    def __init__(self, attack: Attack, images: tuple[Tensor, ...], seed: int) -> None:
        self.path: Path | None = None
        if attack.checkpoint is not None:
            try:
                check_writable(attack.checkpoint)
                self.path = real_place(attack.checkpoint)
            except OSError as error:
                raise ValueError(
                    f"checkpoint {attack.checkpoint} cannot be written: {error}"
                ) from error
        self.every = attack.checkpoint_every
        self.identity = "" if self.path is None else _identity(attack, images)
        self.seed = seed
        self.finished: list[State] = []
        self.written = 0  # of the finished ones
        self.underway: dict[str, Any] = {}
        self.any_finite: list[Tensor | None] = []
        """Of the problems of finished micro-batches; see :class:`Problem`."""
        if self.path is not None and self.path.exists():
            mend = "delete it to attack from the start"
            with naming(f"checkpoint {self.path} of an attack cannot be read", mend):
                saved = load_tensors(self.path, images[0].device)
                identity, self.seed = saved["identity"], saved["seed"]
                finished, self.underway = saved["finished"], saved["underway"]
                # Files of earlier versions have none.
                self.any_finite = saved.get("any_finite", [None])
            if identity != self.identity:
                raise ValueError(
                    f"checkpoint {str(self.path)!r} belongs to other images or settings; "
                    "delete it, or give this attack another file"
                )
            if isinstance(finished, list):  # in the files of earlier versions
                self.finished = finished
                return
            for number in range(finished):
                place = self._part(number)
                with naming(f"{place} of checkpoint {self.path} cannot be read", mend):
                    part = load_tensors(place, images[0].device)
                    identity, seed = part.pop("identity"), part.pop("seed")
                if (identity, seed) != (self.identity, self.seed):
                    raise ValueError(
                        f"{str(place)!r} belongs to another attack than checkpoint "
                        f"{str(self.path)!r}, whose part it should be; delete the checkpoint to "
                        "attack from the start"
                    )
                self.finished.append(part)
            self.written = finished

    def pop(self) -> tuple[int, Tensor, State, State, Tensor | None]:
        """The micro-batch under way, once: next step, its rows, their state, others' outcome, and
        whether a gradient was finite."""
        saved, self.underway = self.underway, {}
        seen = saved.get("seen")
        return saved["step"], saved["active"], saved["state"], saved["outcome"], seen

    def step(
        self, step: int, active: Tensor, state: State, outcome: State, seen: Tensor | None
    ) -> None:
        if step % self.every == 0:
            self._write(step=step, active=active, state=state, outcome=outcome, seen=seen)

    def finish(self, part: State, any_finite: Tensor | None) -> None:
        self.finished.append(part)
        self.any_finite.append(any_finite)
        self._write()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            for number in range(self.written):
                self._part(number).unlink(missing_ok=True)

    def _part(self, number: int) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.part{number}")

    def _write(self, **underway: Any) -> None:
        if self.path is not None:
            of = {"identity": self.identity, "seed": self.seed}
            # Before the file that counts them.
            for number in range(self.written, len(self.finished)):
                atomic_save(of | self.finished[number], self._part(number))
                self.written = number + 1
            progress = {"finished": self.written, "underway": underway}
            atomic_save(of | progress | {"any_finite": self.any_finite}, self.path)


def _identity(attack: Attack, images: tuple[Tensor, ...]) -> str:
    """A digest of the images, their conditions, and of all settings with a value of their own."""
    skipped = {"objective", "stop", "checkpoint", "checkpoint_every", "start"}
    settings = [
        (entry.name, getattr(attack, entry.name))
        for entry in dataclasses.fields(attack)
        if entry.name not in skipped
    ]
    digest = hashlib.sha256(repr((type(attack).__name__, settings)).encode())
    for value in images:
        if value is None:
            digest.update(b"None")
            continue
        digest.update(repr((tuple(value.shape), value.dtype)).encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
