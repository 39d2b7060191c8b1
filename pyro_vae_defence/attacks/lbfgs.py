r"""A projected quasi-Newton method: L-BFGS in the ball.

With :math:`f = -\Delta`, the feasible set :math:`C` (the ball and the range of images) and the
limited-memory BFGS matrix :math:`B_t` of the last pairs :math:`s = \varepsilon_{t+1} -
\varepsilon_t`, :math:`y = \nabla f_{t+1} - \nabla f_t`,

.. math::
    d_t \approx \arg\min_{\varepsilon_t + d \in C} \;
    \langle \nabla f_t, d \rangle + \tfrac12 \langle d, B_t d \rangle, \qquad
    \varepsilon_{t+1} = \varepsilon_t + \tau_t d_t ,

where :math:`\tau_t \in (0, 1]` satisfies Armijo's condition. The inner problem costs no evaluation
of the objective: it is solved by spectral projected gradients, with exact projections on :math:`C`,
whatever the ball; for L_inf :math:`C` is a box and the method does what L-BFGS-B does. Every step
evaluates one trial point per row: rows that accept it build the next direction, the others shorten
:math:`\tau`.

Where the curvature along a step is not positive, as where an attack maximises a convex function,
the row forgets its pairs and takes a long projected gradient step, towards a corner of :math:`C`.

References: Schmidt, van den Berg, Friedlander, Murphy, "Optimizing costly functions with simple
constraints: a limited-memory projected quasi-Newton algorithm", AISTATS 2009,
https://proceedings.mlr.press/v5/schmidt09a.html; Nocedal, Wright, "Numerical optimization", 2006,
procedure 7.6 (products with :math:`B`); Birgin, Martinez, Raydan, "Nonmonotone spectral projected
gradient methods on convex sets", SIAM J. Optim. 2000, https://doi.org/10.1137/S1052623497330963."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae_defence.attacks.base import Attack, Problem, State, first_result, keep_best
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.latents import rows

# Nocedal and Wright: sufficient increase, and how far one trial may shorten the step.
ARMIJO = 1e-4
SHORTEST_CUT, LONGEST_CUT = 0.1, 0.5

# Rejections after which a row gives up its model of the curvature, and how its steps shrink then.
PATIENCE = 6
STIFFEN = 100.0

# A step without a model of the curvature, in diameters of the ball.
LONG = 100.0


@dataclass(frozen=True)
class LBFGS(Attack):
    """Projected L-BFGS; one gradient per step.

    Args:
        memory: pairs the curvature is modelled with, >= 1.
        inner_steps: projected gradient steps on the model per direction, >= 1, not evaluated.
    """

    memory: int = 8
    inner_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("memory", self.memory)
        check_integer("inner_steps", self.inner_steps)

    def _start(self, problem: Problem) -> State:
        start = problem.start()
        state = first_result(start)
        # Squares of float32 gradients, as of a saturated softmax, may all be zero, or overflow.
        value, still = state["result_value"].double(), torch.zeros_like(start).double()
        pairs = still.new_zeros((start.shape[0], self.memory, start[0].numel()))
        return {
            **state,
            "result_value": value,
            "gradient": still,
            "direction": still,
            "length": torch.ones_like(value),
            "steps": pairs,
            "changes": pairs,
            "curvature": torch.ones_like(value),
            "rejected": torch.zeros_like(value),
        }

    def _step(self, problem: Problem, state: State, t: int) -> State:
        # The result is the current point: steps are accepted only upwards.
        current, before = state["result"], state["gradient"]
        direction, length = state["direction"], state["length"]
        trial = current + (rows(length, direction) * direction).to(current.dtype)
        value, gradient = (each.double() for each in problem.value_and_gradient(trial))

        slope = _inner(before, direction)
        accept = value >= state["result_value"] + ARMIJO * length * slope
        result = keep_best(state, trial, torch.where(accept, value, -torch.inf))
        kept = torch.where(rows(accept, gradient), gradient, before)

        # Quadratic through the current value and slope and the trial's value.
        missing = state["result_value"] + slope * length - value
        cut = slope * length / (2.0 * missing)
        cut = cut.nan_to_num(nan=LONGEST_CUT).clamp(SHORTEST_CUT, LONGEST_CUT)
        rejected = torch.where(accept, 0.0, state["rejected"] + 1.0)
        stuck = rejected >= PATIENCE

        step = (trial - current).flatten(1)
        change = (before - gradient).flatten(1)  # of f = -objective
        product = _inner(step, change)
        # The first evaluation is of the start: there is no step yet, and the product is 0.
        usable = accept & (product > 1e-10 * step.norm(dim=1) * change.norm(dim=1))
        forget = stuck | (accept & ~usable)
        steps = _push(state["steps"], step, usable, forget)
        changes = _push(state["changes"], change, usable, forget)

        diameter = 2.0 * self.ball.radius
        if isinstance(self.ball, Linf):
            diameter = diameter * kept[0].numel() ** 0.5
        scale = kept.flatten(1).norm(dim=1) / (LONG * diameter)
        bend = change.square().sum(1) / torch.where(usable, product, 1.0)
        curvature = torch.where(usable, bend, state["curvature"])
        curvature = torch.where(accept & ~usable, torch.where(scale > 0, scale, 1.0), curvature)
        curvature = torch.where(stuck, STIFFEN * curvature, curvature)

        fresh = accept | stuck
        model = {"steps": steps, "changes": changes, "curvature": curvature}
        towards = self._direction(problem, result["result"], kept, model)
        return {
            **result,
            **model,
            "gradient": kept,
            "direction": torch.where(rows(fresh, towards), towards, direction),
            "length": torch.where(fresh, 1.0, length * cut),
            "rejected": torch.where(stuck, 0.0, rejected),
        }

    def _direction(
        self, problem: Problem, current: Tensor, gradient: Tensor, model: State
    ) -> Tensor:
        """Minimise the model over the feasible set by spectral projected gradients."""
        direction = torch.zeros_like(current)
        slope = -gradient
        times, rate = _bfgs(**model), 1.0 / model["curvature"]
        for _ in range(self.inner_steps):
            target = current + direction - rows(rate, slope) * slope
            target = problem.project(target.to(current.dtype))
            move = target - current - direction
            bent = times(move)
            bend = _inner(move, bent)
            positive = bend > 0
            safe = torch.where(positive, bend, 1.0)
            share = torch.where(positive, (-_inner(slope, move) / safe).clamp(0.0, 1.0), 0.0)
            direction = direction + rows(share, move) * move
            slope = slope + rows(share, bent) * bent
            rate = torch.where(positive, _inner(move, move) / safe, rate)
        return direction


def _bfgs(steps: Tensor, changes: Tensor, curvature: Tensor) -> Callable[[Tensor], Tensor]:
    """Multiplies images by the limited-memory BFGS matrix B; missing pairs are zero."""
    corrections: list[tuple[Tensor, Tensor]] = []

    def times(images: Tensor) -> Tensor:
        vector = images.flatten(1)
        total = curvature[:, None] * vector
        for down, up in corrections:
            total = total + up * (up * vector).sum(1, keepdim=True)
            total = total - down * (down * vector).sum(1, keepdim=True)
        return total.reshape(images.shape)

    for step, change in zip(steps.unbind(1), changes.unbind(1)):
        bent = times(step)
        down, up = _over_root(bent, _inner(step, bent)), _over_root(change, _inner(step, change))
        corrections.append((down, up))
    return times


def _over_root(vector: Tensor, square: Tensor) -> Tensor:
    """``vector / sqrt(square)``, zero where ``square`` is not positive."""
    positive = square > 0
    factor = torch.where(positive, torch.where(positive, square, 1.0).rsqrt(), 0.0)
    return factor[:, None] * vector


def _push(pairs: Tensor, newest: Tensor, use: Tensor, forget: Tensor) -> Tensor:
    """Append a vector to the memory of rows that use it; empty that of rows that forget."""
    pushed = torch.cat([pairs[:, 1:], newest[:, None]], 1)
    pairs = torch.where(use[:, None, None], pushed, pairs)
    return torch.where(forget[:, None, None], 0.0, pairs)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
