r"""Step size adaptation, one step size per image.

*Dual averaging* (Nesterov; Hoffman and Gelman 2014, section 3.2): with target :math:`\delta` and
observed acceptance probability :math:`\alpha_t`,

.. math::
    \bar h_t = \Bigl(1 - \tfrac{1}{t + t_0}\Bigr) \bar h_{t-1}
        + \tfrac{\delta - \alpha_t}{t + t_0}, \quad
    \log\epsilon_t = \mu - \tfrac{\sqrt t}{\gamma} \bar h_t, \quad
    \log\bar\epsilon_t = t^{-\kappa} \log\epsilon_t + (1 - t^{-\kappa}) \log\bar\epsilon_{t-1} ,

and sampling continues with :math:`\bar\epsilon` after warm-up.

*The paper's rule* (eq. 67): :math:`\eta_t = \eta_{t-1} (1 + 0.01 (\alpha_{t-1} - 0.9) / 0.9)`,
never frozen. As in the published code :math:`\alpha` is the mean over the batch, so that all images
share one step size. Since it adapts to the end and follows the chain, the chain has no exact
stationary distribution.

References: Hoffman, Gelman, "The No-U-Turn Sampler", JMLR 2014, https://arxiv.org/abs/1111.4246;
Kuzina, Welling, Tomczak, NeurIPS 2022, eq. 67.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_PAPER_RATE = 0.01  # relative change per unit of relative error, eq. 67


class StepSizeState(NamedTuple):
    """What a rule carries from one transition to the next; all tensors have shape ``(N,)``.

    Attributes:
        log_step_size: logarithm of the step size the next transition uses.
        log_average: logarithm of the averaged step size that sampling uses.
        gradient_average: running mean of target minus acceptance.
        shrinkage: logarithm of the step size that dual averaging shrinks towards.
        updates: number of updates so far.
    """

    log_step_size: Tensor
    log_average: Tensor
    gradient_average: Tensor
    shrinkage: Tensor
    updates: int


class StepSizeRule:
    """What adapts step sizes; a rule that derives from it writes :meth:`update`.

    Attributes:
        adapts_while_sampling: whether it goes on after warm-up, or keeps its average from there on.
        couples_images: whether a step size depends on the other rows of the batch.
    """

    adapts_while_sampling = False
    couples_images = False

    def init(self, step_size: Tensor) -> StepSizeState:
        """State for initial step sizes ``(N,)``."""
        log = step_size.log()
        return StepSizeState(log, log, torch.zeros_like(log), log, 0)

    def update(self, state: StepSizeState, acceptance_rate: Tensor) -> StepSizeState:
        """State after a transition with acceptance probabilities ``(N,)``."""
        raise NotImplementedError


@dataclass(frozen=True)
class FixedStepSize(StepSizeRule):
    """Keep the initial step size."""

    def update(self, state: StepSizeState, acceptance_rate: Tensor) -> StepSizeState:
        """Return the state unchanged."""
        return state


@dataclass(frozen=True)
class DualAveraging(StepSizeRule):
    """Dual averaging on the acceptance probability, independently per image.

    Args:
        target: acceptance probability to reach, in (0, 1).
        gamma, t0, kappa: regularisation scale, iteration offset and averaging exponent; the
            defaults are those of Hoffman and Gelman (2014, section 3.2).
        shrink_factor: the step size is shrunk towards ``shrink_factor`` times its initial value.
            They take 10, which favours bold trials; a warm-up of ten or twenty transitions has none
            to lose.
    """

    target: float = 0.8
    gamma: float = 0.05
    t0: float = 10.0
    kappa: float = 0.75
    shrink_factor: float = 1.0

    def __post_init__(self) -> None:
        _check_target(self.target)

    def init(self, step_size: Tensor) -> StepSizeState:
        """State for initial step sizes ``(N,)``."""
        return super().init(step_size)._replace(shrinkage=(self.shrink_factor * step_size).log())

    def update(self, state: StepSizeState, acceptance_rate: Tensor) -> StepSizeState:
        """State after a transition with acceptance probabilities ``(N,)``."""
        t = state.updates + 1
        weight = 1.0 / (t + self.t0)
        gradient = (1 - weight) * state.gradient_average + weight * (self.target - acceptance_rate)
        log_step_size = state.shrinkage - t**0.5 / self.gamma * gradient
        # The first average is the first value: where it starts has no weight.
        decay = t**-self.kappa
        log_average = decay * log_step_size + (1 - decay) * state.log_average
        return StepSizeState(log_step_size, log_average, gradient, state.shrinkage, t)


@dataclass(frozen=True)
class PaperStepSize(StepSizeRule):
    """The paper's multiplicative rule (eq. 67): one step size for the batch, never frozen.

    Args:
        target: acceptance probability to reach, in (0, 1).
    """

    target: float = 0.9

    adapts_while_sampling = True
    couples_images = True

    def __post_init__(self) -> None:
        _check_target(self.target)

    def update(self, state: StepSizeState, acceptance_rate: Tensor) -> StepSizeState:
        """State after a transition with acceptance probabilities ``(N,)``, which are averaged."""
        acceptance_rate = acceptance_rate.mean().expand_as(acceptance_rate)
        change = torch.log1p(_PAPER_RATE * (acceptance_rate - self.target) / self.target)
        log = state.log_step_size + change
        return state._replace(log_step_size=log, log_average=log, updates=state.updates + 1)


def _check_target(target: float) -> None:
    if not (isinstance(target, numbers.Real) and 0 < float(target) < 1):
        raise ValueError(f"target_accept_prob must lie in (0, 1), got {target!r}")
