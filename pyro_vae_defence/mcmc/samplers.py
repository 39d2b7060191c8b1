"""Hamiltonian and Langevin kernels with one independent chain per image.

Each is its own arguments and one step, on :class:`~pyro_vae_defence.mcmc.kernels.BatchedKernel`,
whose keywords all of them take: ``step_size``, ``adapt_step_size``, ``target_accept_prob``,
``inverse_mass_matrix``, ``burn_in``, ``generator``.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pyro_vae_defence.mcmc import ghmc, hmc, langevin, mams, nuts
from pyro_vae_defence.mcmc.adaptation import PaperStepSize
from pyro_vae_defence.mcmc.captured import Step
from pyro_vae_defence.mcmc.ghmc import GHMCState
from pyro_vae_defence.mcmc.hmc import HMCState
from pyro_vae_defence.mcmc.integrators import check_dimension
from pyro_vae_defence.mcmc.kernels import BatchedKernel, KernelOptions
from pyro_vae_defence.ops.checks import check_integer, check_within, plain
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import Potential

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.11


class _JitteredKernel(BatchedKernel):
    """A kernel whose trajectories have a length of their own at every transition."""

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Potential | None = None,
        *,
        num_steps: int = 4,
        jitter: float = 1.0,
        **options: Unpack[KernelOptions],
    ) -> None:
        super().__init__(model, potential_fn, **options)
        self.num_steps: int = plain(num_steps)
        self.jitter = jitter
        self._check()

    def _check(self) -> None:
        super()._check()
        check_integer("num_steps", self.num_steps)
        check_within("jitter", self.jitter, "[0, 1]", "0 keeps lengths fixed")

    def _most_gradients(self, seed: int, step: int) -> int:
        return hmc.trajectory_length(seed, step, self.num_steps, self.jitter)


class BatchedHMC(_JitteredKernel):
    """Hamiltonian Monte Carlo.

    A setting for attacked images, the first to reach the stationary energy in this library's
    benchmark on MNIST: ``step_size=0.2, num_steps=4, burn_in=30`` with a metric that whitens, such
    as ``inverse_mass_matrix=vae.mean_posterior_variance``.

    The other arguments are those of :class:`~pyro_vae_defence.mcmc.kernels.BatchedKernel`;
    ``target_accept_prob`` is 0.8, or 0.9 in the paper's rule.

    Args:
        num_steps: leapfrog steps per transition, >= 1, about which lengths are jittered.
        jitter: 0 to 1. The length of each transition is drawn uniformly from the integers between
            (1 - jitter) and (1 + jitter) times ``num_steps``, at least 1, common to the batch. A
            fixed length resonates with the target's own frequencies; 0 keeps it fixed.
        preset: ``"paper"`` for the published setting: 20 fixed leapfrog steps and one step size for
            the batch that follows eq. 67 to the end.

    Example:
        >>> import pyro.infer
        >>> from pyro_vae_defence.models import ConvVAE
        >>> kernel = BatchedHMC(ConvVAE().eval().model, step_size=0.1, num_steps=4)
        >>> mcmc = pyro.infer.MCMC(kernel, num_samples=3, warmup_steps=2, disable_progbar=True)
        >>> mcmc.run(torch.rand(5, 1, 28, 28))
        >>> mcmc.get_samples()["z"].shape
        torch.Size([3, 5, 64])
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Potential | None = None,
        *,
        num_steps: int = 4,
        jitter: float = 1.0,
        preset: Literal["paper"] | None = None,
        **options: Unpack[KernelOptions],
    ) -> None:
        if preset not in (None, "paper"):
            raise ValueError(f"preset must be 'paper' or None, got {preset!r}")
        if preset == "paper":
            if (num_steps, jitter) != (4, 1.0) or not options.get("adapt_step_size", True):
                raise ValueError(
                    "preset 'paper' has its own num_steps, jitter and adaptation; leave them out"
                )
            num_steps, jitter = 20, 0.0
        super().__init__(model, potential_fn, num_steps=num_steps, jitter=jitter, **options)
        if preset == "paper":
            target = options.get("target_accept_prob")
            self.rule = PaperStepSize() if target is None else PaperStepSize(target)

    def _step(self, num_gradients: int) -> Step:
        return functools.partial(hmc.step, num_steps=num_gradients)


class BatchedNUTS(BatchedKernel):
    """The No-U-Turn Sampler with one independent tree per image.

    A batch costs as many gradients as its largest tree; smaller trees wait, unchanged. The other
    arguments are those of :class:`~pyro_vae_defence.mcmc.kernels.BatchedKernel`.

    Args:
        max_tree_depth: largest number of doublings, 1 to 20.
    """

    asks_host = "NUTS asks the host once per leaf whether any tree still grows"

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Potential | None = None,
        *,
        max_tree_depth: int = 10,
        **options: Unpack[KernelOptions],
    ) -> None:
        super().__init__(model, potential_fn, **options)
        self.max_tree_depth: int = plain(max_tree_depth)
        self._check()

    def _check(self) -> None:
        super()._check()
        depth = self.max_tree_depth
        if not (isinstance(depth, numbers.Integral) and 1 <= depth <= 20):
            raise ValueError(f"max_tree_depth must be an integer in 1..20, got {depth!r}")

    def _most_gradients(self, seed: int, step: int) -> int:
        return 2**self.max_tree_depth - 1

    def _step(self, num_gradients: int) -> Step:
        return functools.partial(nuts.step, max_tree_depth=self.max_tree_depth)


class BatchedMALA(BatchedKernel):
    """The Metropolis-adjusted Langevin algorithm: HMC with one leapfrog step per transition.

    The arguments are those of :class:`~pyro_vae_defence.mcmc.kernels.BatchedKernel`; the noise of a
    step has standard deviation ``step_size``.
    """

    # Optimal in high dimensions: Roberts and Rosenthal 1998,
    # https://doi.org/10.1111/1467-9868.00123
    default_target = 0.574

    def _step(self, num_gradients: int) -> Step:
        return functools.partial(hmc.step, num_steps=1)


class BatchedGHMC(BatchedKernel):
    """Generalised HMC: the momentum is kept in part from one transition to the next.

    The other arguments are those of :class:`~pyro_vae_defence.mcmc.kernels.BatchedKernel`;
    ``target_accept_prob`` is 0.9, since every rejection turns the momentum.

    Args:
        num_steps: leapfrog steps per transition, >= 1, always as many.
        persistence: share of the momentum a transition keeps, in [0, 1); 0 is HMC. A chain goes on
            in one direction for about ``num_steps * step_size / (1 - persistence)``.
    """

    default_target = 0.9

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Potential | None = None,
        *,
        num_steps: int = 1,
        persistence: float = 0.8,
        **options: Unpack[KernelOptions],
    ) -> None:
        super().__init__(model, potential_fn, **options)
        self.num_steps: int = plain(num_steps)
        self.persistence = persistence
        self._check()

    def _check(self) -> None:
        super()._check()
        check_integer("num_steps", self.num_steps)
        check_within("persistence", self.persistence, "[0, 1)", "0 draws the momentum anew")

    def _extend(self, state: HMCState, streams: Streams) -> GHMCState:
        return ghmc.init(state, streams, self.inverse_mass)

    def _most_gradients(self, seed: int, step: int) -> int:
        return self.num_steps

    def _step(self, num_gradients: int) -> Step:
        return functools.partial(ghmc.step, num_steps=num_gradients, persistence=self.persistence)


class BatchedMAMS(_JitteredKernel):
    """The Metropolis-adjusted microcanonical sampler: particles turn, but keep their speed.

    ``num_steps`` (4) and ``jitter`` (1.0) are those of :class:`BatchedHMC`, ``step_size`` is on the
    scale of HMC's. The other arguments are those of
    :class:`~pyro_vae_defence.mcmc.kernels.BatchedKernel`; there must be two latent dimensions or
    more.
    """

    default_target = 0.9  # Robnik et al. 2025

    def _extend(self, state: HMCState, streams: Streams) -> HMCState:
        check_dimension(state.position, "MAMS")
        return state

    def _step(self, num_gradients: int) -> Step:
        return functools.partial(mams.step, num_steps=num_gradients)


class BatchedULA(BatchedKernel):
    """The unadjusted Langevin algorithm, a baseline: **biased**, its draws are not from the target.

    Nothing is rejected but a step to a non-finite energy. The acceptance rate in ``info`` and
    ``diagnostics()`` is what MALA's test would have accepted at the same step size; it measures the
    bias. See :mod:`~pyro_vae_defence.mcmc.langevin` for its size on a Gaussian.

    The arguments are those of :class:`~pyro_vae_defence.mcmc.kernels.BatchedKernel`; the noise of a
    step has standard deviation ``step_size``. The closer ``target_accept_prob`` (0.9) is to 1, the
    smaller are bias and steps.
    """

    default_target = 0.9

    def _step(self, num_gradients: int) -> Step:
        return langevin.step
