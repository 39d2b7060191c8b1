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
the row forgets its pairs and the direction becomes a long projected gradient step, towards a corner
of :math:`C`.

References: Schmidt, van den Berg, Friedlander, Murphy, "Optimizing costly functions with simple
constraints: a limited-memory projected quasi-Newton algorithm", AISTATS 2009,
https://proceedings.mlr.press/v5/schmidt09a.html; Nocedal, Wright, "Numerical optimization", 2006,
procedure 7.6 (products with :math:`B`); Birgin, Martinez, Raydan, "Nonmonotone spectral projected
gradient methods on convex sets", SIAM J. Optim. 2000, https://doi.org/10.1137/S1052623497330963."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae_defence.attacks.base import Attack, Problem, State, first_result, keep_best
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.latents import rows

# Nocedal and Wright: sufficient increase, and how far one trial may shorten the step.
ARMIJO = 1e-4
SHORTEST_CUT, LONGEST_CUT = 0.1, 0.5

# Rejections in a row after which a row gives up its model of the curvature, and how much shorter
# its steps become.
PATIENCE = 6
STIFFEN = 100.0

# A step without a model of the curvature, in diameters of the ball.
LONG = 100.0


@dataclass(frozen=True)
class LBFGS(Attack):
    """Projected L-BFGS; one gradient per step.

    Args:
        memory: pairs the curvature is modelled with, >= 1.
        inner_steps: projected gradient steps on the model per direction, >= 1; they cost no
            evaluation.
    """

    memory: int = 8
    inner_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers("memory", "inner_steps")

    def _start(self, problem: Problem) -> State:
        start = problem.start()
        state = first_result(start)
        value = state["result_value"]
        pairs = start.new_zeros((start.shape[0], self.memory, start[0].numel()))
        return {
            **state,
            "gradient": torch.zeros_like(start),
            "direction": torch.zeros_like(start),
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
        trial = current + rows(length, direction) * direction
        value, gradient = problem.value_and_gradient(trial)

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
        product = (step * change).sum(1)
        # The first evaluation is of the start: there is no step yet.
        usable = accept & (product > 1e-10 * step.norm(dim=1) * change.norm(dim=1)) & (t > 0)
        forget = stuck | (accept & ~usable)
        steps = _push(state["steps"], step, usable, forget)
        changes = _push(state["changes"], change, usable, forget)

        flat = kept.flatten(1).norm(dim=1)
        scale = flat / (LONG * _diameter(problem))
        curvature = torch.where(
            usable, change.square().sum(1) / torch.where(usable, product, 1.0), state["curvature"]
        )
        curvature = torch.where(accept & ~usable, torch.where(scale > 0, scale, 1.0), curvature)
        curvature = torch.where(stuck, STIFFEN * curvature, curvature)

        model = _Model(steps, changes, curvature)
        fresh = accept | stuck
        towards = self._direction(problem, result["result"], kept, model)
        return {
            **result,
            "gradient": kept,
            "direction": torch.where(rows(fresh, towards), towards, direction),
            "length": torch.where(fresh, 1.0, length * cut),
            "steps": steps,
            "changes": changes,
            "curvature": curvature,
            "rejected": torch.where(stuck, 0.0, rejected),
        }

    def _direction(
        self, problem: Problem, current: Tensor, gradient: Tensor, model: _Model
    ) -> Tensor:
        """Minimise the model over the feasible set by spectral projected gradients."""
        direction = torch.zeros_like(current)
        slope = -gradient
        rate = 1.0 / model.curvature
        for _ in range(self.inner_steps):
            target = problem.project(current + direction - rows(rate, slope) * slope)
            move = target - current - direction
            bent = model.times(move)
            bend = _inner(move, bent)
            positive = bend > 0
            safe = torch.where(positive, bend, 1.0)
            share = torch.where(positive, (-_inner(slope, move) / safe).clamp(0.0, 1.0), 0.0)
            direction = direction + rows(share, move) * move
            slope = slope + rows(share, bent) * bent
            rate = torch.where(positive, _inner(move, move) / safe, rate)
        return direction


class _Model:
    """The limited-memory BFGS matrix B, as products with images; missing pairs are zero."""

    def __init__(self, steps: Tensor, changes: Tensor, curvature: Tensor) -> None:
        self.curvature = curvature
        self._down: list[Tensor] = []
        self._up: list[Tensor] = []
        for i in range(steps.shape[1]):
            step, change = steps[:, i], changes[:, i]
            bent = self._apply(step)
            self._down.append(_over_root(bent, (step * bent).sum(1)))
            self._up.append(_over_root(change, (step * change).sum(1)))

    def times(self, images: Tensor) -> Tensor:
        """B v for every row, same shape."""
        return self._apply(images.flatten(1)).reshape(images.shape)

    def _apply(self, vector: Tensor) -> Tensor:
        total = self.curvature[:, None] * vector
        for down, up in zip(self._down, self._up):
            total = total + up * (up * vector).sum(1, keepdim=True)
            total = total - down * (down * vector).sum(1, keepdim=True)
        return total


def _over_root(vector: Tensor, square: Tensor) -> Tensor:
    """``vector / sqrt(square)``, zero where ``square`` is not positive."""
    positive = square > 0
    factor = torch.where(positive, torch.where(positive, square, 1.0).rsqrt(), 0.0)
    return factor[:, None] * vector


def _push(pairs: Tensor, newest: Tensor, use: Tensor, forget: Tensor) -> Tensor:
    """Append a vector to the memory of the rows that use it; empty the memory of those that
    forget."""
    pushed = torch.cat([pairs[:, 1:], newest[:, None]], 1)
    pairs = torch.where(use[:, None, None], pushed, pairs)
    return torch.where(forget[:, None, None], 0.0, pairs)


def _diameter(problem: Problem) -> float:
    """Euclidean diameter of the ball."""
    ball = problem.ball
    widest = 2.0 * ball.radius
    return widest * problem.x_ref[0].numel() ** 0.5 if isinstance(ball, Linf) else widest


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
