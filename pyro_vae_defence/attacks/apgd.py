r"""APGD: projected gradient ascent with momentum that chooses its own step size.

.. math::
    z_t = \Pi(x_t + \eta_t d_t), \qquad
    x_{t+1} = \Pi\bigl(x_t + \alpha (z_t - x_t) + (1 - \alpha)(x_t - x_{t-1})\bigr), \quad
    \alpha = 0.75,

with :math:`d_t` the steepest ascent in the ball's norm (the sign of the gradient for L_inf) and
:math:`\eta_0 = 2 r`. At checkpoints :math:`w_j = \lceil p_j T \rceil`, :math:`p_0 = 0`, :math:`p_1
= 0.22`, :math:`p_{j+1} = p_j + \max(p_j - p_{j-1} - 0.03, 0.06)`, a row halves its step and goes on
from its best point if at most 75% of the steps since the last checkpoint have raised the objective,
or the best value is what it was there.

(The original waives the second condition right after a halving. For L1 the original, in a later
paper, adapts the sparsity of its steps; here the exact projection decides on it.)

Reference: Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, https://arxiv.org/abs/2003.01690 (Algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pyro_vae_defence.attacks.base import Attack, Problem, State, first_result, keep_best
from pyro_vae_defence.ops.latents import rows

MOMENTUM = 0.75
IMPROVING_SHARE = 0.75
FIRST_PERIOD = 0.22
PERIOD_DECREASE = 0.03
SHORTEST_PERIOD = 0.06


def checkpoints(num_steps: int) -> list[int]:
    """Steps after which the step size may be halved.

    >>> checkpoints(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    share, period, found = FIRST_PERIOD, FIRST_PERIOD, []
    while share < 1.0:
        # Rounded first: 0.57 * 100 must not become 58 by a unit in the last place.
        found.append(math.ceil(round(share * num_steps, 9)))
        period = max(period - PERIOD_DECREASE, SHORTEST_PERIOD)
        share += period
    return sorted(set(found))


@dataclass(frozen=True)
class APGD(Attack):
    """Ascent without a step size to choose; one gradient per step, and the best iterate counts."""

    num_steps: int = 100

    def _start(self, problem: Problem) -> State:
        start = problem.start()
        state = first_result(start)
        return {
            **state,
            "perturbation": start,
            "previous": start,
            "previous_value": state["result_value"],
            "result_gradient": torch.zeros_like(start),
            "record": state["result_value"],
            "length": torch.full_like(state["result_value"], 2.0 * self.ball.radius),
            "improved": torch.zeros_like(state["result_value"]),
        }

    def _step(self, problem: Problem, state: State, t: int) -> State:
        perturbation = state["perturbation"]
        value, gradient = problem.value_and_gradient(perturbation)
        better = rows(value > state["result_value"], gradient)
        state = keep_best(state, perturbation, value)
        state["result_gradient"] = torch.where(better, gradient, state["result_gradient"])
        state["improved"] = state["improved"] + (value > state["previous_value"])
        state["previous_value"] = value
        if t == 0:
            # The first evaluation is of the start, not of a step.
            state["improved"] = torch.zeros_like(value)
            state["record"] = value
        ends = [0, *checkpoints(self.num_steps)]
        if t in ends[1:]:
            taken = t - ends[ends.index(t) - 1]
            few = state["improved"] <= IMPROVING_SHARE * taken
            halve = few | (state["result_value"] == state["record"])
            perturbation = torch.where(rows(halve, perturbation), state["result"], perturbation)
            gradient = torch.where(rows(halve, gradient), state["result_gradient"], gradient)
            state["previous_value"] = torch.where(halve, state["result_value"], value)
            state["length"] = torch.where(halve, 0.5 * state["length"], state["length"])
            state["improved"] = torch.zeros_like(value)
            state["record"] = state["result_value"]
        moved = problem.climb(perturbation, gradient, state["length"])
        if t > 0:
            moved = problem.project(
                perturbation
                + MOMENTUM * (moved - perturbation)
                + (1.0 - MOMENTUM) * (perturbation - state["previous"])
            )
        return {**state, "perturbation": moved, "previous": perturbation}

    def _finish(self, problem: Problem, state: State) -> State:
        return keep_best(state, state["perturbation"], problem.value(state["perturbation"]))
