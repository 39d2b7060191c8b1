r"""Projected gradient ascent in a ball around each reference: plain, as published, with momentum.

.. math:: \varepsilon_{t+1} = \Pi\bigl(\varepsilon_t + \eta_t d_t\bigr),

where :math:`\Pi` projects on the ball and the range of images and :math:`d_t` is the direction of
steepest ascent in the ball's norm: the sign of the gradient for L_inf, the normalised gradient for
L2, and for L1 too, where the projection makes the step sparse.

The preset ``"paper"`` (appendix D.2, Table 8) goes along the raw gradient instead, from
:math:`\varepsilon_0 \sim N(0, 0.2^2)` per pixel, which the first projection brings into the ball,
50 steps with learning rate 1, halved when the objective has not risen for 20 steps; :math:`x_t =
\mathrm{clip}(x^r + \varepsilon_t, 0, 1)`, and the last iterate is the result.

:class:`MomentumPGD` (MI-FGSM) takes :math:`d_t` from the accumulated gradient
:math:`g_{t+1} = \mu g_t + \nabla\Delta / \|\nabla\Delta\|_1`.

References: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR
2018, https://arxiv.org/abs/1706.06083; Dong et al., "Boosting adversarial attacks with momentum",
CVPR 2018, https://arxiv.org/abs/1710.06081; Kuzina, Welling, Tomczak, NeurIPS 2022, appendix D.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_vae_defence.attacks.base import Attack, Problem, State, first_result, keep_best
from pyro_vae_defence.ops.checks import check_not_negative, check_positive
from pyro_vae_defence.ops.latents import rows

PAPER_START_SCALE = 0.2
PAPER_LEARNING_RATE = 1.0
PAPER_PATIENCE = 20

# torch's ReduceLROnPlateau counts smaller relative changes as none; the published code used it.
_RELATIVE_IMPROVEMENT = 1e-4


@dataclass(frozen=True)
class Ascent(Attack):
    """Steps of one length, whose direction a subclass knows; the best iterate is the result.

    Args:
        step_size: length of a step in units of the image range; 2.5 radii over ``num_steps`` when
            ``None``, enough to cross the ball from any start.
    """

    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None:
            check_positive("step_size", self.step_size)

    def _direction(self, problem: Problem, state: State, t: int) -> tuple[Tensor, Tensor, State]:
        """Value and direction at ``state["perturbation"]``, and what changes in the state."""
        raise NotImplementedError

    def _start(self, problem: Problem) -> State:
        start = problem.start()
        return {**first_result(start), "perturbation": start}

    def _step(self, problem: Problem, state: State, t: int) -> State:
        perturbation = state["perturbation"]
        value, direction, changed = self._direction(problem, state, t)
        state = keep_best(state, perturbation, value) | changed
        length = self.step_size or 2.5 * self.ball.radius / self.num_steps
        return {**state, "perturbation": problem.climb(perturbation, direction, length)}

    def _finish(self, problem: Problem, state: State) -> State:
        return keep_best(state, state["perturbation"], problem.value(state["perturbation"]))


@dataclass(frozen=True)
class PGD(Ascent):
    """Projected gradient ascent; one gradient per step.

    Args:
        preset: ``"paper"`` for the published optimiser: its own step size, and the last iterate.
    """

    preset: Literal["paper"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in (None, "paper"):
            raise ValueError(f"preset must be 'paper' or None, got {self.preset!r}")
        if self.preset == "paper" and self.start is not None:
            raise ValueError("preset='paper' has a start of its own: leave start=None")

    def _direction(self, problem: Problem, state: State, t: int) -> tuple[Tensor, Tensor, State]:
        return *problem.value_and_gradient(state["perturbation"]), {}

    def _start(self, problem: Problem) -> State:
        if self.preset is None:
            return super()._start(problem)
        x_ref = problem.x_ref
        start = PAPER_START_SCALE * problem.streams.normal(
            0, 0, tuple(x_ref.shape[1:]), x_ref.dtype
        )
        state = first_result(start)
        return {
            **state,
            "perturbation": start,
            "rate": torch.full_like(state["result_value"], PAPER_LEARNING_RATE),
            "record": state["result_value"],
            "waited": torch.zeros_like(state["result_value"], dtype=torch.long),
        }

    def _step(self, problem: Problem, state: State, t: int) -> State:
        if self.preset is None:
            return super()._step(problem, state, t)
        # Along the raw gradient, with a rate per row that is halved on plateaus.
        perturbation, rate, record = state["perturbation"], state["rate"], state["record"]
        value, gradient = problem.value_and_gradient(perturbation, through_clip=True)
        moved = problem.ball.project(perturbation + rows(rate, gradient) * gradient)
        better = value > record + _RELATIVE_IMPROVEMENT * record.abs().nan_to_num(posinf=0.0)
        waited = torch.where(better, 0, state["waited"] + 1)
        stagnant = waited > PAPER_PATIENCE
        return {
            **state,
            # The start may lie outside the ball; as a result it is projected, which has a value
            # that was not evaluated.
            "result": problem.ball.project(perturbation),
            "result_value": value if t > 0 else state["result_value"],
            "perturbation": moved,
            "rate": torch.where(stagnant, 0.5 * rate, rate),
            "record": torch.where(better, value, record),
            "waited": torch.where(stagnant, 0, waited),
        }

    def _finish(self, problem: Problem, state: State) -> State:
        if self.preset is None:
            return super()._finish(problem, state)
        return {**state, "result": state["perturbation"]}


@dataclass(frozen=True)
class MomentumPGD(Ascent):
    """Gradient ascent along an accumulated gradient (MI-FGSM); one gradient per step.

    Args:
        decay: factor mu of the accumulated gradient, >= 0; the paper's 1.0 by default.
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("decay", self.decay)

    def _start(self, problem: Problem) -> State:
        state = super()._start(problem)
        return {**state, "momentum": torch.zeros_like(state["perturbation"])}

    def _direction(self, problem: Problem, state: State, t: int) -> tuple[Tensor, Tensor, State]:
        value, gradient = problem.value_and_gradient(state["perturbation"])
        norm = gradient.flatten(1).abs().sum(1)
        unit = gradient / rows(torch.where(norm > 0, norm, 1.0), gradient)
        momentum = self.decay * state["momentum"] + unit
        return value, momentum, {"momentum": momentum}
