"""Pyro kernels whose every image is a chain of its own.

:class:`BatchedHMC` and its relatives follow Pyro's ``MCMCKernel`` contract, so
``pyro.infer.MCMC(BatchedHMC(vae.model), num_samples=100).run(x)`` works as with any kernel. They
differ from Pyro's own kernels in what a batch means: Pyro's take all images of the data plate as
one state with one acceptance and one step size, these run ``x.shape[0]`` independent chains in one
tensor program.

The arithmetic lives in :mod:`~pyro_vae_defence.mcmc.hmc`, :mod:`~pyro_vae_defence.mcmc.nuts`,
:mod:`~pyro_vae_defence.mcmc.ghmc`, :mod:`~pyro_vae_defence.mcmc.mams`,
:mod:`~pyro_vae_defence.mcmc.langevin` and :mod:`~pyro_vae_defence.mcmc.adaptation`; this file only
wires it to Pyro.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.distributions import Transform

from pyro_vae_defence.mcmc import ghmc, hmc, langevin, mams, nuts
from pyro_vae_defence.mcmc.adaptation import (
    DualAveraging,
    FixedStepSize,
    PaperStepSize,
    StepSizeRule,
    StepSizeState,
    pool_by_image,
)
from pyro_vae_defence.mcmc.burn_in import burn_in as run_burn_in
from pyro_vae_defence.mcmc.ghmc import GHMCState
from pyro_vae_defence.mcmc.hmc import HMCInfo, HMCState
from pyro_vae_defence.mcmc.integrators import dimension
from pyro_vae_defence.models.program import ModelPotential
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import Latents, LatentsLike, Potential

Preset = Literal["paper"]


class BatchedKernel(MCMCKernel):
    """What the batched kernels share: set-up, adaptation, bookkeeping.

    Attributes:
        streams: random streams of the chains, one row per chain; set them before a run to name
            images and chains, leave ``None`` for fresh ones drawn from ``generator``.
        prepare: what makes the run's potential of the model's energy, such as a
            :class:`~pyro_vae_defence.models.compiled.Recorder`; set it before a run.
        state: last state; ``state.energy`` is the potential energy per chain.
        info: diagnostics of the last transition.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None,
        potential_fn: Potential | None,
        step_size: float,
        rule: StepSizeRule,
        inverse_mass_matrix: LatentsLike | None,
        generator: torch.Generator | None,
        pool_replicas: bool = False,
        burn_in: int = 0,
    ) -> None:
        if (model is None) == (potential_fn is None):
            raise ValueError("give exactly one of model and potential_fn")
        for name, value in (("model", model), ("potential_fn", potential_fn)):
            if value is not None and not callable(value):
                raise ValueError(f"{name} must be callable, got {type(value).__name__}")
        if not (isinstance(step_size, (int, float)) and 0 < step_size < math.inf):
            raise ValueError(f"step_size must be a positive finite number, got {step_size!r}")
        check_integer("burn_in", burn_in, 0)
        if inverse_mass_matrix is not None:
            _check_inverse_mass(inverse_mass_matrix)
        self.model = model
        self.step_size = step_size
        self.rule = rule
        self.inverse_mass_matrix = inverse_mass_matrix
        self.generator = generator
        self.pool_replicas = pool_replicas
        self.burn_in = burn_in
        self.transforms: dict[str, Transform] = {}
        self.streams: Streams | None = None
        self.prepare: Callable[[ModelPotential], ModelPotential] | None = None
        self.info: HMCInfo | None = None
        self.state: HMCState | GHMCState | None = None
        self._potential = potential_fn
        self._run_streams: Streams | None = None
        self._initial_params: Latents | None = None
        self._warmup_steps = 0
        self._steps_done = 0
        self._unrecorded_steps = 0
        self._adaptation: StepSizeState | None = None
        self._acceptance_sum: Tensor | None = None
        self._divergences: Tensor | None = None

    # --- Pyro's contract ---

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Read the model's sites at its arguments and forget any earlier run.

        Args:
            warmup_steps: transitions during which the step size adapts.
            *args: the model's arguments, as given to ``MCMC.run``.
            **kwargs: its keyword arguments.
        """
        self._warmup_steps = warmup_steps
        self._steps_done = 0
        self.state = None
        self.info = None
        self._adaptation = None
        self._acceptance_sum = None
        self._divergences = None
        if self.model is not None:
            potential = ModelPotential(self.model, *args, **kwargs)
            self._potential = potential if self.prepare is None else self.prepare(potential)
            # MCMC maps its samples back by the inverse of these.
            self.transforms = {name: t.inv for name, t in potential.transforms.items()}
        self._run_streams = self.streams

    @property
    def potential(self) -> Potential:
        """Energy per image; for a model, known after :meth:`setup`."""
        if self._potential is None:
            raise RuntimeError("call setup(warmup_steps, *model_args) first")
        return self._potential

    @property
    def initial_params(self) -> Latents:
        """Where the chains start, unconstrained; a draw from the prior unless it was set."""
        if self._initial_params is None:
            if not isinstance(self._potential, ModelPotential):
                raise ValueError(
                    "initial_params must be given with potential_fn: "
                    "MCMC(kernel, ..., initial_params={site: tensor of shape (N, ...)})"
                )
            self._initial_params = self._potential.prototype
        return self._initial_params

    @initial_params.setter
    def initial_params(self, params: LatentsLike) -> None:
        self._initial_params = dict(params)

    def sample(self, params: LatentsLike) -> Latents:
        """One transition of every chain from ``params`` (unconstrained, one row per chain).

        Raises:
            ValueError: if the first state has the wrong shape or a non-finite energy.
        """
        state = self.state
        if state is None or any(params[name] is not v for name, v in state.position.items()):
            state = self._start(params)
        assert self._adaptation is not None
        assert self._run_streams is not None
        state, info = self._step(state, self._run_streams, self._adaptation.log_step_size.exp())
        self._steps_done += 1
        # The gradients of the burn-in count with the first transition.
        info = info._replace(num_steps=info.num_steps + self._unrecorded_steps)
        self._unrecorded_steps = 0
        warming = self._steps_done <= self._warmup_steps
        if warming or self.rule.adapts_while_sampling:
            acceptance = info.acceptance_rate
            if self.pool_replicas:
                acceptance = pool_by_image(acceptance, self._run_streams.image)
            adaptation = self.rule.update(self._adaptation, acceptance)
            if self._steps_done == self._warmup_steps and not self.rule.adapts_while_sampling:
                adaptation = adaptation._replace(log_step_size=adaptation.log_average)
            self._adaptation = adaptation
        if not warming:
            assert self._acceptance_sum is not None
            assert self._divergences is not None
            self._acceptance_sum = self._acceptance_sum + info.acceptance_rate
            self._divergences = self._divergences + info.diverging
        self.state, self.info = state, info
        return dict(state.position)

    def logging(self) -> dict[str, str]:
        """Mean step size and acceptance for the progress bar; they are read from the CPU only.

        Elsewhere they would stop the device once per transition; see :meth:`diagnostics` instead.
        """
        if self.info is None or self.info.step_size.device.type != "cpu":
            return {}
        return {
            "step size": f"{float(self.info.step_size.mean()):.2e}",
            "acc. prob": f"{float(self.info.acceptance_rate.mean()):.3f}",
        }

    def diagnostics(self) -> dict[str, Any]:
        """Per-image acceptance rate and number of divergences after warm-up, shape ``(N,)``
        each."""
        if self._acceptance_sum is None or self._divergences is None:
            return {}
        num_samples = max(1, self._steps_done - self._warmup_steps)
        return {
            "acceptance rate": self._acceptance_sum / num_samples,
            # Not "divergences": MCMC.summary() prints that entry's length as their number.
            "divergences per image": self._divergences,
        }

    def cleanup(self) -> None:
        """Let go of the start of the run; its last state and info stay readable."""
        self._initial_params = None

    # --- Runs that end before all chains do ---

    per_row: tuple[str, ...] = (
        "state",
        "info",
        "_run_streams",
        "_adaptation",
        "_acceptance_sum",
        "_divergences",
    )
    """Attributes with one row per chain, tensors or nests of them; a subclass adds its own."""

    @property
    def couples_images(self) -> bool:
        """Whether a chain depends on the others of its batch, so that none may leave it."""
        return isinstance(self.rule, PaperStepSize) and self.rule.pooled

    def gradients_of(self, seed: int, step: int) -> int:
        """Most gradients per chain that transition ``step`` (from 0) of a run with ``seed`` can
        take."""
        return self._most_gradients(seed, step) + (self.burn_in if step == 0 else 0)

    def keep(self, rows: Tensor) -> None:
        """Go on with the chains at ``rows`` alone, int64 ``(M,)``; they move as they would have
        moved.

        Raises:
            ValueError: if chains are coupled, or run on a ``potential_fn``, whose rows are its own.
        """
        if self.couples_images:
            raise ValueError("this kernel shares one step size in the batch; no chain may leave it")
        if not isinstance(self._potential, ModelPotential):
            raise ValueError("keep needs a model; the rows of a potential_fn cannot be selected")
        size = self._potential.num_images
        self._potential = self._potential.take(rows)
        for name in self.per_row:
            setattr(self, name, _take(getattr(self, name), rows))
        if self.inverse_mass_matrix is not None and self.state is not None:
            self.inverse_mass_matrix = {
                name: value[rows]
                if value.dim() == self.state.position[name].dim() and value.shape[0] == size
                else value
                for name, value in self.inverse_mass_matrix.items()
            }

    # --- Inside ---

    def _most_gradients(self, seed: int, step: int) -> int:
        return 1

    def _step(self, state: Any, streams: Streams, step_size: Tensor) -> tuple[Any, HMCInfo]:
        raise NotImplementedError

    def _extend(self, state: HMCState, streams: Streams) -> Any:
        """The kernel's own state at the start of a run; a kernel that carries more overrides
        this."""
        return state

    def _burn_in(self, state: HMCState, streams: Streams) -> HMCState:
        if self.burn_in == 0:
            return state
        _check_dimension(state.position, "burn_in > 0")
        self._unrecorded_steps = self.burn_in
        metric = self._inverse_mass(state.position)
        return run_burn_in(self.potential, state, streams, self.burn_in, metric)

    def _start(self, params: LatentsLike) -> Any:
        if isinstance(self._potential, ModelPotential):
            params = self._potential.check(params)
        state = hmc.init(self.potential, params)
        energy = state.energy
        rows = next(iter(params.values())).shape[0]
        if tuple(energy.shape) != (rows,):
            raise ValueError(
                f"potential_fn must return one energy per row, shape ({rows},), "
                f"got {tuple(energy.shape)}"
            )
        if energy.device.type != "meta":
            bad = (~energy.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"the starting energy is not finite for {len(bad)} of {rows} rows "
                    f"(first rows: {bad[:5]}); check the images and the initial latents of these "
                    "rows"
                )
        if self._run_streams is None:
            self._run_streams = Streams.create(rows, generator=self.generator, device=energy.device)
        elif self._run_streams.image.shape[0] != rows:
            raise ValueError(
                f"streams has {self._run_streams.image.shape[0]} rows but the latents have {rows}"
            )
        if self._adaptation is None:
            self._adaptation = self.rule.init(torch.full_like(energy, self.step_size))
            self._acceptance_sum = torch.zeros_like(energy)
            self._divergences = torch.zeros_like(energy, dtype=torch.long)
            state = self._burn_in(state, self._run_streams)
        return self._extend(state._replace(step=self._steps_done), self._run_streams)

    def _inverse_mass(self, like: LatentsLike) -> LatentsLike | None:
        matrix = self.inverse_mass_matrix
        if matrix is None:
            return None
        if matrix.keys() != like.keys():
            raise ValueError(
                f"inverse_mass_matrix must have the model's sites {sorted(like)}, "
                f"got {sorted(matrix)}"
            )
        for name, diagonal in matrix.items():
            shape, fitting = tuple(diagonal.shape), tuple(like[name].shape)
            ends = zip(reversed(shape), reversed(fitting))
            if len(shape) > len(fitting) or any(size not in (1, full) for size, full in ends):
                raise ValueError(
                    f"inverse_mass_matrix[{name!r}] of shape {shape} must broadcast to the "
                    "latents' "
                    f"{fitting}; give it one image's shape {fitting[1:]}"
                )
        return {name: matrix[name].to(like[name]) for name in like}


def _take(nest: Any, rows: Tensor) -> Any:
    """Rows of every tensor in a nest of mappings and tuples; numbers stay as they are."""
    if isinstance(nest, Tensor):
        return nest[rows] if nest.dim() else nest
    if isinstance(nest, Mapping):
        return {name: _take(value, rows) for name, value in nest.items()}
    if isinstance(nest, tuple):
        parts = [_take(value, rows) for value in nest]
        return type(nest)(*parts) if hasattr(nest, "_fields") else tuple(parts)
    return nest


def _check_inverse_mass(matrix: LatentsLike) -> None:
    if not (
        isinstance(matrix, Mapping) and all(isinstance(value, Tensor) for value in matrix.values())
    ):
        raise ValueError(
            "inverse_mass_matrix must be a dict from site to tensor, e.g. "
            f"mean_posterior_variance(vae, loader), got {type(matrix).__name__}"
        )
    for site, diagonal in matrix.items():
        if not bool(((diagonal > 0) & diagonal.isfinite()).all()):
            raise ValueError(
                f"inverse_mass_matrix[{site!r}] must be positive and finite; "
                "it is the diagonal of the inverse mass matrix, e.g. posterior variances"
            )


def _check_dimension(position: LatentsLike, what: str) -> None:
    if dimension(position) < 2:
        raise ValueError(
            f"{what} needs at least 2 latent dimensions, since a direction must be able to turn; "
            "use BatchedHMC without burn-in for 1"
        )


def _check_trajectory(num_steps: int, jitter: float) -> None:
    check_integer("num_steps", num_steps)
    if not 0.0 <= jitter <= 1.0:
        raise ValueError(f"jitter must lie in [0, 1], got {jitter!r}; 0 keeps lengths fixed")


def trajectory_length(seed: int, step: int, num_steps: int, jitter: float) -> int:
    """Length of the trajectory of transition ``step``, uniform on (1 - jitter) to (1 + jitter)
    ``num_steps``.

    A function of seed and transition alone, like all noise of a run; at least 1.
    """
    low = max(1, math.ceil((1 - jitter) * num_steps))
    high = max(low, math.floor((1 + jitter) * num_steps))
    return random.Random(seed * 2**32 + step).randint(low, high)


class _AdaptedKernel(BatchedKernel):
    """A kernel whose step size follows dual averaging on the acceptance probability."""

    default_target = 0.8
    """Acceptance probability to adapt to where ``target_accept_prob`` is ``None``."""

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Potential | None = None,
        step_size: float = 0.1,
        adapt_step_size: bool = True,
        target_accept_prob: float | None = None,
        inverse_mass_matrix: LatentsLike | None = None,
        pool_replicas: bool = False,
        burn_in: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        target = self.default_target if target_accept_prob is None else target_accept_prob
        # Built in any case, so that a target out of range never passes in silence.
        averaging = DualAveraging(target)
        rule = averaging if adapt_step_size else FixedStepSize()
        super().__init__(
            model,
            potential_fn,
            step_size,
            rule,
            inverse_mass_matrix,
            generator,
            pool_replicas,
            burn_in,
        )


class BatchedHMC(_AdaptedKernel):
    """Hamiltonian Monte Carlo with one independent chain per image.

    A setting for attacked images, the first to reach the stationary energy in this library's
    benchmark on MNIST: ``step_size=0.2, num_steps=4, burn_in=30`` with a metric that whitens, such
    as ``inverse_mass_matrix=vae.mean_posterior_variance``.

    Args:
        model: Pyro model with one data plate around all its sites.
        potential_fn: instead of a model, energies ``(N,)`` of a dict of latents with ``N`` rows.
        step_size: initial leapfrog step size, > 0.
        num_steps: leapfrog steps per transition, >= 1: the mean when lengths are jittered.
        jitter: 0 to 1. The length of each transition is drawn uniformly from the integers between
            (1 - jitter) and (1 + jitter) times ``num_steps``, at least 1, common to the batch. A
            fixed length resonates with the target's own frequencies; 0 keeps it fixed.
        adapt_step_size: adapt each image's step size by dual averaging during warm-up.
        target_accept_prob: acceptance probability to adapt to; 0.8, or 0.9 in the paper's rule.
        inverse_mass_matrix: diagonal of the inverse mass matrix per site, broadcastable to one
            image's latents; identity when ``None``.
        preset: ``"paper"`` for the published setting: 20 fixed leapfrog steps and one step size for
            the batch that follows eq. 67 to the end.
        pool_replicas: adapt one step size per image instead of one per chain, to the mean
            acceptance of the image's chains.
        burn_in: steps of :mod:`~pyro_vae_defence.mcmc.burn_in` from the start to where the first
            transition begins, >= 0, one gradient each. For a metric that whitens; about 30 for
            attacked encodings.
        generator: source of the run's seed; torch's global seed when ``None``.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import functools, pyro.infer
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
        step_size: float = 0.1,
        num_steps: int = 4,
        jitter: float = 1.0,
        adapt_step_size: bool = True,
        target_accept_prob: float | None = None,
        inverse_mass_matrix: LatentsLike | None = None,
        preset: Preset | None = None,
        pool_replicas: bool = False,
        burn_in: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        if preset not in (None, "paper"):
            raise ValueError(f"preset must be 'paper' or None, got {preset!r}")
        super().__init__(
            model,
            potential_fn,
            step_size,
            adapt_step_size,
            target_accept_prob,
            inverse_mass_matrix,
            pool_replicas,
            burn_in,
            generator,
        )
        if preset == "paper":
            self.rule = PaperStepSize(0.9 if target_accept_prob is None else target_accept_prob)
            num_steps, jitter = 20, 0.0
        _check_trajectory(num_steps, jitter)
        self.num_steps = num_steps
        self.jitter = jitter

    def _most_gradients(self, seed: int, step: int) -> int:
        return trajectory_length(seed, step, self.num_steps, self.jitter)

    def _step(
        self, state: HMCState, streams: Streams, step_size: Tensor
    ) -> tuple[HMCState, HMCInfo]:
        return hmc.step(
            self.potential,
            state,
            streams,
            step_size,
            trajectory_length(streams.seed, state.step, self.num_steps, self.jitter),
            self._inverse_mass(state.position),
        )


class BatchedNUTS(_AdaptedKernel):
    """The No-U-Turn Sampler with one independent tree per image.

    A batch costs as many gradients as its largest tree; smaller trees wait, unchanged.

    Args:
        model: Pyro model with one data plate around all its sites.
        potential_fn: instead of a model, energies ``(N,)`` of a dict of latents with ``N`` rows.
        step_size: initial leapfrog step size, > 0.
        max_tree_depth: largest number of doublings, 1 to 20.
        adapt_step_size: adapt each image's step size by dual averaging during warm-up.
        target_accept_prob: mean acceptance probability to adapt to; 0.8.
        inverse_mass_matrix: diagonal of the inverse mass matrix per site, broadcastable to one
            image's latents; identity when ``None``.
        pool_replicas: adapt one step size per image instead of one per chain, to the mean
            acceptance of the image's chains.
        burn_in: steps of :mod:`~pyro_vae_defence.mcmc.burn_in` from the start to where the first
            transition begins, >= 0, one gradient each. For a metric that whitens; about 30 for
            attacked encodings.
        generator: source of the run's seed; torch's global seed when ``None``.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Potential | None = None,
        step_size: float = 0.1,
        max_tree_depth: int = 10,
        adapt_step_size: bool = True,
        target_accept_prob: float | None = None,
        inverse_mass_matrix: LatentsLike | None = None,
        pool_replicas: bool = False,
        burn_in: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            model,
            potential_fn,
            step_size,
            adapt_step_size,
            target_accept_prob,
            inverse_mass_matrix,
            pool_replicas,
            burn_in,
            generator,
        )
        if not (isinstance(max_tree_depth, int) and 1 <= max_tree_depth <= 20):
            raise ValueError(f"max_tree_depth must be an integer in 1..20, got {max_tree_depth!r}")
        self.max_tree_depth = max_tree_depth

    def _most_gradients(self, seed: int, step: int) -> int:
        return 2**self.max_tree_depth - 1

    def _step(
        self, state: HMCState, streams: Streams, step_size: Tensor
    ) -> tuple[HMCState, HMCInfo]:
        return nuts.step(
            self.potential,
            state,
            streams,
            step_size,
            self.max_tree_depth,
            self._inverse_mass(state.position),
        )


class BatchedMALA(_AdaptedKernel):
    """The Metropolis-adjusted Langevin algorithm: HMC with one leapfrog step, one gradient per
    transition.

    Args:
        model: Pyro model with one data plate around all its sites.
        potential_fn: instead of a model, energies ``(N,)`` of a dict of latents with ``N`` rows.
        step_size: initial step size, > 0; the noise of a step has this standard deviation.
        adapt_step_size: adapt each image's step size by dual averaging during warm-up.
        target_accept_prob: acceptance probability to adapt to; 0.574, optimal in high dimensions
            (Roberts and Rosenthal 1998, https://doi.org/10.1111/1467-9868.00123).
        inverse_mass_matrix: diagonal of the inverse mass matrix per site, broadcastable to one
            image's latents; identity when ``None``.
        pool_replicas: adapt one step size per image instead of one per chain, to the mean
            acceptance of the image's chains.
        burn_in: steps of :mod:`~pyro_vae_defence.mcmc.burn_in` from the start to where the first
            transition begins, >= 0, one gradient each. For a metric that whitens; about 30 for
            attacked encodings.
        generator: source of the run's seed; torch's global seed when ``None``.

    Raises:
        ValueError: if an argument is out of range.
    """

    default_target = 0.574

    def _step(
        self, state: HMCState, streams: Streams, step_size: Tensor
    ) -> tuple[HMCState, HMCInfo]:
        inverse_mass = self._inverse_mass(state.position)
        return hmc.step(self.potential, state, streams, step_size, 1, inverse_mass)


class BatchedGHMC(_AdaptedKernel):
    """Generalised HMC: the momentum is kept in part from one transition to the next.

    Args:
        model: Pyro model with one data plate around all its sites.
        potential_fn: instead of a model, energies ``(N,)`` of a dict of latents with ``N`` rows.
        step_size: initial leapfrog step size, > 0.
        num_steps: leapfrog steps per transition, >= 1, always as many.
        persistence: share of the momentum a transition keeps, in [0, 1); 0 is HMC. A chain goes on
            in one direction for about ``num_steps * step_size / (1 - persistence)``.
        adapt_step_size: adapt each image's step size by dual averaging during warm-up.
        target_accept_prob: acceptance probability to adapt to; 0.9, since every rejection turns the
            momentum.
        inverse_mass_matrix: diagonal of the inverse mass matrix per site, broadcastable to one
            image's latents; identity when ``None``.
        pool_replicas: adapt one step size per image instead of one per chain, to the mean
            acceptance of the image's chains.
        burn_in: steps of :mod:`~pyro_vae_defence.mcmc.burn_in` from the start to where the first
            transition begins, >= 0, one gradient each. For a metric that whitens; about 30 for
            attacked encodings.
        generator: source of the run's seed; torch's global seed when ``None``.

    Raises:
        ValueError: if an argument is out of range.
    """

    default_target = 0.9

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Potential | None = None,
        step_size: float = 0.1,
        num_steps: int = 1,
        persistence: float = 0.8,
        adapt_step_size: bool = True,
        target_accept_prob: float | None = None,
        inverse_mass_matrix: LatentsLike | None = None,
        pool_replicas: bool = False,
        burn_in: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            model,
            potential_fn,
            step_size,
            adapt_step_size,
            target_accept_prob,
            inverse_mass_matrix,
            pool_replicas,
            burn_in,
            generator,
        )
        _check_trajectory(num_steps, jitter=0.0)
        if not 0.0 <= persistence < 1.0:
            raise ValueError(
                f"persistence must lie in [0, 1), got {persistence!r}; 0 draws the momentum anew"
            )
        self.num_steps = num_steps
        self.persistence = persistence

    def _extend(self, state: HMCState, streams: Streams) -> GHMCState:
        return ghmc.init(state, streams, self._inverse_mass(state.position))

    def _most_gradients(self, seed: int, step: int) -> int:
        return self.num_steps

    def _step(
        self, state: GHMCState, streams: Streams, step_size: Tensor
    ) -> tuple[GHMCState, HMCInfo]:
        return ghmc.step(
            self.potential,
            state,
            streams,
            step_size,
            self.num_steps,
            self.persistence,
            self._inverse_mass(state.position),
        )


class BatchedMAMS(_AdaptedKernel):
    """The Metropolis-adjusted microcanonical sampler: HMC's relative whose particles keep their
    speed.

    Args:
        model: Pyro model with one data plate around all its sites.
        potential_fn: instead of a model, energies ``(N,)`` of a dict of latents with ``N`` rows.
        step_size: initial step size, > 0, on the scale of HMC's.
        num_steps: steps per transition, >= 1: the mean when lengths are jittered.
        jitter: 0 to 1, as for :class:`BatchedHMC`.
        adapt_step_size: adapt each image's step size by dual averaging during warm-up.
        target_accept_prob: acceptance probability to adapt to; 0.9 (Robnik et al. 2025).
        inverse_mass_matrix: diagonal of the inverse mass matrix per site, broadcastable to one
            image's latents; identity when ``None``.
        pool_replicas: adapt one step size per image instead of one per chain, to the mean
            acceptance of the image's chains.
        burn_in: steps of :mod:`~pyro_vae_defence.mcmc.burn_in` from the start to where the first
            transition begins, >= 0, one gradient each. For a metric that whitens; about 30 for
            attacked encodings.
        generator: source of the run's seed; torch's global seed when ``None``.

    Raises:
        ValueError: if an argument is out of range, or there are fewer than two latent dimensions.
    """

    default_target = 0.9

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Potential | None = None,
        step_size: float = 0.1,
        num_steps: int = 4,
        jitter: float = 1.0,
        adapt_step_size: bool = True,
        target_accept_prob: float | None = None,
        inverse_mass_matrix: LatentsLike | None = None,
        pool_replicas: bool = False,
        burn_in: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            model,
            potential_fn,
            step_size,
            adapt_step_size,
            target_accept_prob,
            inverse_mass_matrix,
            pool_replicas,
            burn_in,
            generator,
        )
        _check_trajectory(num_steps, jitter)
        self.num_steps = num_steps
        self.jitter = jitter

    def _extend(self, state: HMCState, streams: Streams) -> HMCState:
        _check_dimension(state.position, "MAMS")
        return state

    def _most_gradients(self, seed: int, step: int) -> int:
        return trajectory_length(seed, step, self.num_steps, self.jitter)

    def _step(
        self, state: HMCState, streams: Streams, step_size: Tensor
    ) -> tuple[HMCState, HMCInfo]:
        return mams.step(
            self.potential,
            state,
            streams,
            step_size,
            trajectory_length(streams.seed, state.step, self.num_steps, self.jitter),
            self._inverse_mass(state.position),
        )


class BatchedULA(_AdaptedKernel):
    """The unadjusted Langevin algorithm, a baseline: **biased**, its draws are not from the target.

    Nothing is rejected but a step to a non-finite energy. The acceptance rate in ``info`` and
    ``diagnostics()`` is what MALA's test would have accepted at the same step size; it measures the
    bias. See :mod:`~pyro_vae_defence.mcmc.langevin` for its size on a Gaussian.

    Args:
        model: Pyro model with one data plate around all its sites.
        potential_fn: instead of a model, energies ``(N,)`` of a dict of latents with ``N`` rows.
        step_size: initial step size, > 0; the noise of a step has this standard deviation.
        adapt_step_size: adapt each image's step size by dual averaging during warm-up.
        target_accept_prob: the acceptance probability, had there been a test, to adapt to; 0.9. The
            closer to 1, the smaller are bias and steps.
        inverse_mass_matrix: diagonal of the inverse mass matrix per site, broadcastable to one
            image's latents; identity when ``None``.
        pool_replicas: adapt one step size per image instead of one per chain, to the mean
            acceptance of the image's chains.
        burn_in: steps of :mod:`~pyro_vae_defence.mcmc.burn_in` from the start to where the first
            transition begins, >= 0, one gradient each. For a metric that whitens; about 30 for
            attacked encodings.
        generator: source of the run's seed; torch's global seed when ``None``.

    Raises:
        ValueError: if an argument is out of range.
    """

    default_target = 0.9

    def _step(
        self, state: HMCState, streams: Streams, step_size: Tensor
    ) -> tuple[HMCState, HMCInfo]:
        inverse_mass = self._inverse_mass(state.position)
        return langevin.step(self.potential, state, streams, step_size, inverse_mass)
