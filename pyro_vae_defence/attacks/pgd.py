r"""Projected gradient ascent in a ball around each reference image.

.. math::
    x_t = \mathrm{clip}(x^r + \varepsilon_t, 0, 1), \qquad
    \varepsilon_{t+1} = \Pi_{\|\varepsilon\|_p \le r}\bigl(\varepsilon_t + \eta_t d_t\bigr),

where :math:`d_t` is the direction of steepest ascent in the norm (the sign of the gradient for the L_inf ball) or,
in the paper's setting, the raw gradient. Each restart of each image is a row of one batch: restarts do not
see each other, and a row's noise comes from the image's own stream.

The preset ``"paper"`` (appendix D.2, Table 8): :math:`\varepsilon_0 \sim N(0, 0.2^2)` per pixel, which the first
projection brings into the ball, 50 steps along the raw gradient with learning rate 1, halved when the
objective has not risen for 20 steps, and the last iterate as the result.

References: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018,
https://arxiv.org/abs/1706.06083; Kuzina, Welling, Tomczak, NeurIPS 2022, appendix D.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence.models.program import check_images
from pyro_vae_defence.ops.balls import Ball
from pyro_vae_defence.ops.latents import rows, unfold
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import Objective, PreparedObjective

PAPER_START_SCALE = 0.2
PAPER_LEARNING_RATE = 1.0
PAPER_NUM_STEPS = 50
PAPER_PATIENCE = 20

# torch's ReduceLROnPlateau counts smaller relative changes as none; the published code used it.
_RELATIVE_IMPROVEMENT = 1e-4


class AttackResult(NamedTuple):
    """Perturbed images of every restart.

    Attributes:
        x_adv: ``(num_restarts, N, C, H, W)``, in [0, 1] and in the ball around ``x_ref``.
        objective: value the attacker reached, ``(num_restarts, N)``.
        x_ref: the references ``(N, C, H, W)``.
        num_gradients: gradients of the objective spent per restart and image.
    """

    x_adv: Tensor
    objective: Tensor
    x_ref: Tensor
    num_gradients: int

    def best(self) -> Tensor:
        """The strongest restart of each image, ``(N, C, H, W)``; one without a value never wins."""
        winner = self.objective.nan_to_num(nan=-torch.inf).argmax(0)
        return self.x_adv[winner, torch.arange(len(winner), device=winner.device)]


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent; call it with reference images.

    Args:
        objective: a prepared objective, e.g. ``attacks.symmetric_kl(vae)``.
        ball: where perturbations live, e.g. ``ops.balls.Linf(0.1)``.
        num_steps: gradient steps, >= 1.
        step_size: length of a step in units of the image range; 2.5 radii over ``num_steps`` when
            ``None``. Not used by the paper's preset.
        num_restarts: random starts per image, >= 1.
        preset: ``"paper"`` for the published optimiser.
        batch_size: most rows (restarts times images) at a time; results do not depend on it, but for
            objectives that are random themselves, as through a guide with several latent levels, whose
            noise comes from torch's global seed.

    Raises:
        ValueError: if an argument is out of range, or images are not in [0, 1].
    """

    objective: PreparedObjective
    ball: Ball
    num_steps: int = PAPER_NUM_STEPS
    step_size: float | None = None
    num_restarts: int = 1
    preset: Literal["paper"] | None = None
    batch_size: int = 4096

    def __post_init__(self) -> None:
        if not callable(self.objective):
            raise ValueError(
                f"objective must be a prepared objective such as symmetric_kl(vae), "
                f"got {self.objective!r}"
            )
        if not isinstance(self.ball, Ball):
            raise ValueError(f"ball must be a Ball such as Linf(0.1), got {self.ball!r}")
        for name in ("num_steps", "num_restarts", "batch_size"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size!r}")
        if self.preset not in (None, "paper"):
            raise ValueError(f"preset must be 'paper' or None, got {self.preset!r}")

    def __call__(self, x_ref: Tensor, generator: torch.Generator | None = None) -> AttackResult:
        """Attack every image from ``num_restarts`` random starts.

        Args:
            x_ref: reference images ``(N, C, H, W)`` in [0, 1].
            generator: source of the run's seed; torch's global seed when ``None``.
        """
        check_images(x_ref, "x_ref")
        num_images = x_ref.shape[0]
        folded = x_ref.repeat(self.num_restarts, 1, 1, 1)
        streams = Streams.create(
            num_images,
            self.num_restarts,
            seed=draw_seed(generator),
            device=x_ref.device,
        )
        x_adv, value = [], []
        for first in range(0, folded.shape[0], self.batch_size):
            part = slice(first, first + self.batch_size)
            some = Streams(streams.seed, streams.image[part], streams.chain[part])
            adversarial, reached = self._attack(folded[part], some)
            x_adv.append(adversarial)
            value.append(reached)
        return AttackResult(
            unfold(torch.cat(x_adv), self.num_restarts),
            unfold(torch.cat(value), self.num_restarts),
            x_ref,
            self.num_steps,
        )

    def _attack(self, x_ref: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        objective = self.objective(x_ref)
        if self.preset == "paper":
            perturbation = self._ascend_as_published(objective, x_ref, streams)
        else:
            perturbation = self._ascend(objective, x_ref, streams)
        x_adv = self.ball.inside(x_ref, (x_ref + perturbation).clamp(0.0, 1.0))
        with torch.no_grad():
            return x_adv, objective(x_adv)

    def _ascend(self, objective: Objective, x_ref: Tensor, streams: Streams) -> Tensor:
        """Steepest ascent in the ball's norm; returns each row's best iterate."""
        length = self.step_size
        if length is None:
            length = 2.5 * self.ball.radius / self.num_steps
        perturbation = _keep_valid(x_ref, self.ball.random_start(x_ref, streams))
        best, best_value = perturbation, torch.full_like(x_ref[:, 0, 0, 0], -torch.inf)
        for _ in range(self.num_steps):
            value, gradient = _value_and_gradient(objective, x_ref, perturbation)
            better = value > best_value
            best = torch.where(rows(better, best), perturbation, best)
            best_value = torch.where(better, value, best_value)
            moved = perturbation + length * self.ball.steepest_ascent(gradient)
            perturbation = _keep_valid(x_ref, self.ball.project(moved))
        with torch.no_grad():
            better = objective(x_ref + perturbation) > best_value
        return torch.where(rows(better, best), perturbation, best)

    def _ascend_as_published(self, objective: Objective, x_ref: Tensor, streams: Streams) -> Tensor:
        """Raw-gradient ascent with a rate halved on plateaus, per row; returns the last iterate."""
        event = tuple(x_ref.shape[1:])
        perturbation = PAPER_START_SCALE * streams.normal(0, 0, event, x_ref.dtype)
        rate = torch.full_like(x_ref[:, 0, 0, 0], PAPER_LEARNING_RATE)
        best = torch.full_like(rate, -torch.inf)
        waited = torch.zeros_like(rate, dtype=torch.long)
        for _ in range(self.num_steps):
            value, gradient = _value_and_gradient(objective, x_ref, perturbation)
            perturbation = self.ball.project(perturbation + rows(rate, gradient) * gradient)
            better = value > best + _RELATIVE_IMPROVEMENT * best.abs().nan_to_num(posinf=0.0)
            best = torch.where(better, value, best)
            waited = torch.where(better, 0, waited + 1)
            stagnant = waited > PAPER_PATIENCE
            rate = torch.where(stagnant, 0.5 * rate, rate)
            waited = torch.where(stagnant, 0, waited)
        return perturbation


def _keep_valid(x_ref: Tensor, perturbation: Tensor) -> Tensor:
    """Shrink a perturbation so that the perturbed image lies in [0, 1]; never leaves a ball."""
    return (x_ref + perturbation).clamp(0.0, 1.0) - x_ref


def _value_and_gradient(
    objective: Objective, x_ref: Tensor, perturbation: Tensor
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = perturbation.detach().requires_grad_()
        value = objective((x_ref + leaf).clamp(0.0, 1.0))
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    # A row whose gradient overflows stays where it is instead of leaving the ball as NaN.
    return value.detach(), torch.where(gradient.isfinite(), gradient, 0.0)
