r"""Step size adaptation, one step size per image.

*Dual averaging* (Nesterov; Hoffman and Gelman 2014, section 3.2): with target :math:`\delta` and
observed acceptance probability :math:`\alpha_t`,

.. math::
    \bar h_t = \Bigl(1 - \tfrac{1}{t + t_0}\Bigr) \bar h_{t-1} + \tfrac{\delta - \alpha_t}{t + t_0}, \quad
    \log\epsilon_t = \mu - \tfrac{\sqrt t}{\gamma} \bar h_t, \quad
    \log\bar\epsilon_t = t^{-\kappa} \log\epsilon_t + (1 - t^{-\kappa}) \log\bar\epsilon_{t-1} ,

and sampling continues with :math:`\bar\epsilon` after warm-up.

*The paper's rule* (eq. 67): :math:`\eta_t = \eta_{t-1} (1 + 0.01 (\alpha_{t-1} - 0.9) / 0.9)`,
never frozen. The published code took for :math:`\alpha` the mean over the batch, so that all images
share one step size; ``pooled`` chooses between that and one per image. Since it adapts to the end
and follows the chain, the chain has no exact stationary distribution.

*Replicas.* Chains of one image share a target, hence may share a step size: :func:`pool_by_image`
replaces the acceptance of each by their mean, whose noise is smaller.

References: Hoffman, Gelman, "The No-U-Turn Sampler", JMLR 2014, https://arxiv.org/abs/1111.4246;
Kuzina, Welling, Tomczak, NeurIPS 2022, eq. 67.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


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


def _check_target(target: float) -> None:
    if not 0 < target < 1:
        raise ValueError(f"target_accept_prob must lie in (0, 1), got {target}")


@dataclass(frozen=True)
class FixedStepSize:
    """Keep the initial step size."""

    adapts_while_sampling = False

    def init(self, step_size: Tensor) -> StepSizeState:
        """State for initial step sizes ``(N,)``."""
        log = step_size.log()
        return StepSizeState(log, log, torch.zeros_like(log), log, 0)

    def update(self, state: StepSizeState, acceptance: Tensor) -> StepSizeState:
        """Return the state unchanged."""
        return state


@dataclass(frozen=True)
class DualAveraging:
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

    adapts_while_sampling = False

    def __post_init__(self) -> None:
        _check_target(self.target)

    def init(self, step_size: Tensor) -> StepSizeState:
        """State for initial step sizes ``(N,)``."""
        log = step_size.log()
        shrinkage = (self.shrink_factor * step_size).log()
        return StepSizeState(log, torch.zeros_like(log), torch.zeros_like(log), shrinkage, 0)

    def update(self, state: StepSizeState, acceptance: Tensor) -> StepSizeState:
        """State after a transition with acceptance probabilities ``(N,)``."""
        t = state.updates + 1
        weight = 1.0 / (t + self.t0)
        gradient = (1 - weight) * state.gradient_average + weight * (self.target - acceptance)
        log_step_size = state.shrinkage - t**0.5 / self.gamma * gradient
        decay = t**-self.kappa
        log_average = decay * log_step_size + (1 - decay) * state.log_average
        return StepSizeState(log_step_size, log_average, gradient, state.shrinkage, t)


@dataclass(frozen=True)
class PaperStepSize:
    """The paper's multiplicative rule (eq. 67), which goes on while sampling.

    Args:
        target: acceptance probability to reach, in (0, 1).
        rate: relative change per unit of relative error.
        pooled: one step size for the batch from its mean acceptance, as the published code did.
    """

    target: float = 0.9
    rate: float = 0.01
    pooled: bool = True

    adapts_while_sampling = True

    def __post_init__(self) -> None:
        _check_target(self.target)

    def init(self, step_size: Tensor) -> StepSizeState:
        """State for initial step sizes ``(N,)``."""
        log = step_size.log()
        return StepSizeState(log, log, torch.zeros_like(log), log, 0)

    def update(self, state: StepSizeState, acceptance: Tensor) -> StepSizeState:
        """State after a transition with acceptance probabilities ``(N,)``."""
        if self.pooled:
            acceptance = acceptance.mean().expand_as(acceptance)
        change = torch.log1p(self.rate * (acceptance - self.target) / self.target)
        log = state.log_step_size + change
        return state._replace(log_step_size=log, log_average=log, updates=state.updates + 1)


StepSizeRule = FixedStepSize | DualAveraging | PaperStepSize


def pool_by_image(values: Tensor, image: Tensor) -> Tensor:
    """Mean of ``values`` over the rows of the same image, returned for every row.

    A sum over an image's own rows, in their order: it does not depend on the other images of a
    batch.

    Args:
        values: one per row, ``(N,)``.
        image: int64 ``(N,)``, the image of each row, in any order.
    """
    order = image.argsort(stable=True)
    ordered = image[order]
    begins = torch.cat([torch.zeros_like(ordered[:1]), (ordered[1:] != ordered[:-1]).long()])
    # Numbers of the images present, row by row; there are at most N of them.
    group = torch.empty_like(order).scatter(0, order, begins.cumsum(0))
    sums = torch.zeros_like(values).index_add(0, group, values)
    counts = torch.zeros_like(values).index_add(0, group, torch.ones_like(values))
    return (sums / counts.clamp(min=1.0))[group]
