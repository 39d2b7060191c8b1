"""What Pyro kernels share whose every image is a chain of its own.

:class:`BatchedKernel` follows Pyro's ``MCMCKernel`` contract, so
``pyro.infer.MCMC(BatchedHMC(vae.model), num_samples=100).run(x)`` works as with any kernel. Its
relatives differ from Pyro's own kernels in what a batch means: Pyro's take all images of the data
plate as one state with one acceptance and one step size, these run ``x.shape[0]`` independent
chains in one tensor program.

Options, adaptation and bookkeeping are here; a kernel adds its own arguments and its step
(:mod:`~pyro_vae_defence.mcmc.samplers`), whose arithmetic is a pure function in a file of its own.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_vae_defence.mcmc import adaptation, hmc
from pyro_vae_defence.mcmc.burn_in import burn_in as run_burn_in
from pyro_vae_defence.mcmc.captured import Graph, Step, find_graph
from pyro_vae_defence.mcmc.hmc import HMCInfo, HMCState
from pyro_vae_defence.models.compiled import RecordedPotential
from pyro_vae_defence.models.modules import modules_of
from pyro_vae_defence.models.program import ModelPotential
from pyro_vae_defence.ops.boundary import drop_references, note, public, referenced
from pyro_vae_defence.ops.checks import (
    check_flag,
    check_generator,
    check_integer,
    check_positive,
    check_precision,
    plain,
)
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import Latents, LatentsLike, Potential


class KernelOptions(TypedDict, total=False):
    """The keywords every kernel takes; :class:`BatchedKernel` describes them."""

    step_size: float
    adapt_step_size: bool
    target_accept_prob: float | None
    inverse_mass_matrix: LatentsLike | None
    burn_in: int
    generator: torch.Generator | None


class _Run(NamedTuple):
    """What a run carries from one transition to the next, one row per chain.

    ``diverging`` is that of every draw, in a list that grows.
    """

    streams: Streams
    state: Any
    info: HMCInfo | None
    rule_state: adaptation.StepSizeState
    acceptance_sum: Tensor
    diverging: list[Tensor]


class BatchedKernel(MCMCKernel):
    """A kernel with one chain per image; one that derives from it writes ``_step``.

    Args:
        model: Pyro model with one data plate around all its sites.
        potential_fn: instead of a model, energies ``(N,)`` of a dict of latents with ``N`` rows.
        step_size: initial step size, > 0.
        adapt_step_size: adapt each chain's step size by dual averaging during warm-up.
        target_accept_prob: mean acceptance probability to adapt to, in (0, 1); the kernel's
            :attr:`default_target` when ``None``.
        inverse_mass_matrix: diagonal of the inverse mass matrix per site, broadcastable to one
            image's latents; identity when ``None``.
        burn_in: steps of :mod:`~pyro_vae_defence.mcmc.burn_in` from the start to where the first
            transition begins, >= 0, one gradient each. For a metric that whitens; about 30 for
            attacked encodings.
        generator: source of the run's seed, and so of a start from the prior; torch's global seed
            when ``None``. Chains that Pyro's ``MCMC`` runs in processes of their own differ.

    Attributes:
        rule: how step sizes adapt; may be replaced before a run, as ``step_size`` may.
        streams: random streams of the chains, one row per chain; set them before a run to name
            images and chains, leave ``None`` for fresh ones drawn from ``generator``.
        prepare: what makes the run's potential of the model's energy, such as a
            :class:`~pyro_vae_defence.models.compiled.Recorder`, or ``"graph"``, or a
            :class:`~pyro_vae_defence.mcmc.captured.Graph`, for captured transitions; set it before
            a run.
        inverse_mass: the inverse mass matrix as the run's latents have it; ``None`` for the
            identity.

    Raises:
        ValueError: if an argument is out of range.
    """

    default_target = 0.8
    """Acceptance probability to adapt to where ``target_accept_prob`` is ``None``."""

    asks_host: str | None = None
    """What a transition asks the host for, because of which it cannot be captured."""

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Potential | None = None,
        *,
        step_size: float = 0.1,
        adapt_step_size: bool = True,
        target_accept_prob: float | None = None,
        inverse_mass_matrix: LatentsLike | None = None,
        burn_in: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        if (model is None) == (potential_fn is None):
            raise ValueError("give exactly one of model and potential_fn")
        for name, value in (("model", model), ("potential_fn", potential_fn)):
            if value is not None and not callable(value):
                raise ValueError(f"{name} must be callable, got {type(value).__name__}")
        check_flag("adapt_step_size", adapt_step_size)
        # Built in any case, so that a target out of range never passes in silence.
        target = self.default_target if target_accept_prob is None else target_accept_prob
        rule: adaptation.StepSizeRule = adaptation.DualAveraging(target)
        self.model = model
        self.step_size = plain(step_size)
        self.rule = rule if adapt_step_size else adaptation.FixedStepSize()
        self.inverse_mass_matrix = inverse_mass_matrix
        self.burn_in = plain(burn_in)
        self.generator = generator
        BatchedKernel._check(self)
        self.transforms: dict[str, Transform] = {}
        self.streams: Streams | None = None
        self.prepare: Callable[[ModelPotential], ModelPotential] | Literal["graph"] | None = None
        self.inverse_mass: Latents | None = None
        self._potential = potential_fn
        self._initial_params: Latents | None = None
        self._warmup_steps = 0
        self._networks: list[nn.Module] = []  # of the model, which MCMC takes as it is
        self._referenced: set[Tensor] = set()  # their parameters that a trace of the caller has
        self._graph: Graph | None = None
        self._run: _Run | None = None
        self._drawn: Streams | None = None  # from the generator, for this run

    def _check(self) -> None:
        """``ValueError`` for arguments out of range; asked again by each run, as they may have been
        replaced."""
        if isinstance(self.step_size, Tensor) and self.step_size.dim() == 0:
            self.step_size = float(self.step_size)
        check_positive("step_size", self.step_size)
        check_integer("burn_in", self.burn_in, 0)
        check_generator(self.generator)
        if self.inverse_mass_matrix is not None:
            check_inverse_mass(self.inverse_mass_matrix)

    # --- What a kernel adds ---

    def _step(self, num_gradients: int) -> Step:
        """A transition of every chain, which counts ``state.step`` on, as a pure function.

        It is called with potential, state, streams, step sizes ``(N,)`` and ``inverse_mass=``, and
        may depend on nothing else but what this method binds. ``num_gradients`` is what
        :meth:`_most_gradients` says of the transition.
        """
        raise NotImplementedError

    def _extend(self, state: HMCState, streams: Streams) -> Any:
        """The kernel's own state at the start of a run; one that carries more overrides this."""
        return state

    def _most_gradients(self, seed: int, step: int) -> int:
        """As :meth:`gradients_of`, without burn-in."""
        return 1

    # --- Pyro's contract ---

    @public
    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Read the model's sites at its arguments, those of ``MCMC.run``; forget earlier runs.

        During ``warmup_steps`` transitions the step size adapts.

        Raises:
            ValueError: if :attr:`prepare` is of no use, or an argument was replaced by one that is
                out of range.
        """
        self._check()
        self._warmup_steps = warmup_steps
        self._run = self._drawn = None
        self._networks = modules_of(self.model)
        note(self._networks)
        self._referenced = referenced(self._networks)
        self.prepare = prepare = find_graph(self.prepare)
        if self.model is None and prepare is not None:
            raise ValueError(
                f"prepare={prepare!r} needs a model; prepare a potential_fn before it is given"
            )
        if self.model is not None:
            potential = ModelPotential(self.model, *args, **kwargs)
            self._potential = potential if prepare is None else prepare(potential)
            self._graph = prepare if isinstance(prepare, Graph) else None
            # MCMC maps its samples back by the inverse of these.
            self.transforms = {name: t.inv for name, t in potential.transforms.items()}

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
            if self.generator is None:
                self._initial_params = self._potential.prototype
            else:
                like = next(iter(self._potential.prototype.values()))
                self._initial_params = self._potential.prior(self._draw_streams(like))
        return self._initial_params

    @initial_params.setter
    def initial_params(self, params: LatentsLike) -> None:
        self._initial_params = dict(params)

    @property
    def state(self) -> Any:
        """Last state, ``None`` before a run: ``energy`` is the potential energy per chain."""
        return None if self._run is None else self._run.state

    @property
    def info(self) -> HMCInfo | None:
        """Diagnostics of the last transition."""
        return None if self._run is None else self._run.info

    @property
    def why_not(self) -> str | None:
        """Why :attr:`prepare` did not do all it is for in this run; ``None`` if it did."""
        reason: str | None = getattr(self._graph or self._potential, "why_not", None)
        return reason

    @public
    def sample(self, params: LatentsLike) -> Latents:
        """One transition of every chain from ``params`` (unconstrained, one row per chain).

        Raises:
            ValueError: if the first state has the wrong shape or a non-finite energy.
        """
        note(self._networks)
        run = self._run
        if run is None or any(params[name] is not v for name, v in run.state.position.items()):
            run = self._start(params)
        state, info = self._transition(run.state, run.streams, run.rule_state.log_step_size.exp())
        if state.step == 1 and self.burn_in > 0:
            # The gradients of the burn-in count with the first transition.
            info = info._replace(num_steps=info.num_steps + self.burn_in)
        warming = state.step <= self._warmup_steps
        run = run._replace(state=state, info=info)
        if warming or self.rule.adapts_while_sampling:
            adapted = self.rule.update(run.rule_state, info.acceptance_rate)
            if state.step == self._warmup_steps and not self.rule.adapts_while_sampling:
                adapted = adapted._replace(log_step_size=adapted.log_average)
            run = run._replace(rule_state=adapted)
        if not warming:
            run = run._replace(acceptance_sum=run.acceptance_sum + info.acceptance_rate)
            run.diverging.append(info.diverging)
        self._run = run
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
        """What happened after warm-up, by Pyro's names.

        ``"acceptance rate"`` and ``"divergences per image"``, their number, have shape ``(N,)``.
        ``"divergences"`` is a list with the number of its draw for each divergence of an image:
        ``MCMC.summary()`` counts them, and ``arviz.from_pyro``, which ArviZ has until 1.0, marks
        the draws at which any image diverged. It is read from the device, once.
        """
        run = self._run
        if run is None:
            return {}
        none = torch.empty_like(run.acceptance_sum, dtype=torch.bool).expand(0, -1)
        diverging = torch.cat([none, *(draw[None] for draw in run.diverging)])
        num_samples = max(1, run.state.step - self._warmup_steps)
        found = {
            "acceptance rate": run.acceptance_sum / num_samples,
            "divergences per image": diverging.sum(0),
        }
        if diverging.device.type != "meta":
            found["divergences"] = diverging.nonzero()[:, 0].tolist()
        return found

    def cleanup(self) -> None:
        """Let go of the start of the run; its last state and info stay readable."""
        self._initial_params = None
        drop_references(self._networks, self._referenced)

    # --- Runs that end before all chains do ---

    @property
    def couples_images(self) -> bool:
        """Whether a chain depends on the others of its batch, so that none may leave it."""
        return self.rule.couples_images

    def gradients_of(self, seed: int, step: int) -> int:
        """Most gradients per chain of transition ``step`` (from 0) of a run with ``seed``."""
        return self._most_gradients(seed, step) + (self.burn_in if step == 0 else 0)

    def keep(self, rows: Tensor) -> None:
        """Go on with the chains at ``rows``, int64 ``(M,)``, as they would have gone on.

        Raises:
            ValueError: if chains are coupled, or run on a ``potential_fn``, whose rows are its own.
            RuntimeError: if the run has not begun.
        """
        if self.couples_images:
            raise ValueError("this kernel shares one step size in the batch; no chain may leave it")
        if not isinstance(self._potential, ModelPotential):
            raise ValueError("keep needs a model; the rows of a potential_fn cannot be selected")
        if self._run is None:
            raise RuntimeError("call sample(params) first, which begins the run")
        if self.inverse_mass is not None:
            # What has rows of its own; the leading dimension may be missing, or of size 1.
            like = self._run.state.position
            self.inverse_mass = {
                name: value[rows]
                if value.dim() == like[name].dim() and value.shape[0] == like[name].shape[0]
                else value
                for name, value in self.inverse_mass.items()
            }
        self._potential = self._potential.take(rows)
        self._run = _take(self._run, rows)

    # --- Inside ---

    def _transition(self, state: Any, streams: Streams, step_size: Tensor) -> tuple[Any, HMCInfo]:
        """One transition of every chain."""
        step = self._step(self._most_gradients(streams.seed, state.step))
        potential, metric = self.potential, self.inverse_mass
        if self._graph is not None and self.asks_host is not None:
            self._graph.refuse(self.asks_host)
        elif self._graph is not None:
            assert isinstance(potential, RecordedPotential)
            return self._graph.transition(step, potential, state, streams, step_size, metric)
        return step(potential, state, streams, step_size, inverse_mass=metric)

    def _draw_streams(self, like: Tensor) -> Streams:
        """Streams of the run, with a row for each of ``like``; drawn once."""
        if self._drawn is None:
            streams = self.streams
            if streams is None:
                streams = Streams.create(len(like), generator=self.generator, device=like.device)
            # A forked copy of a generator draws the same seed.
            if number := _chain_of_process():
                first = number * (int(streams.chain.max()) + 1)
                streams = streams._replace(chain=streams.chain + first)
            self._drawn = streams
        return self._drawn

    def _start(self, params: LatentsLike) -> _Run:
        """The run at ``params``: a new one, or the present one moved there."""
        if isinstance(self._potential, ModelPotential):
            params = self._potential.check(params)
        state = hmc.init(self.potential, params)
        energy, run = state.energy, self._run
        rows = next(iter(params.values())).shape[0]
        _check_energy(energy, rows)
        streams = self._draw_streams(energy) if run is None else run.streams
        given = streams.image.shape[0]
        if given != rows:
            raise ValueError(f"streams has {given} rows but the latents have {rows}")
        if run is not None:
            return run._replace(state=self._extend(state._replace(step=run.state.step), streams))
        self.inverse_mass = inverse_mass_like(self.inverse_mass_matrix, state.position)
        state = run_burn_in(self.potential, state, streams, self.burn_in, self.inverse_mass)
        return _Run(
            streams,
            self._extend(state, streams),
            info=None,
            rule_state=self.rule.init(torch.full_like(energy, self.step_size)),
            acceptance_sum=torch.zeros_like(energy),
            diverging=[],
        )


def _chain_of_process() -> int:
    """The number of the chain for which Pyro's ``MCMC`` has started this process; 0 elsewhere."""
    name = multiprocessing.current_process().name
    return int(name) if multiprocessing.parent_process() and name.isdecimal() else 0


def _take(nest: Any, rows: Tensor) -> Any:
    """Rows of every tensor in a nest of mappings, lists and named tuples; numbers stay."""
    if isinstance(nest, Tensor):
        return nest[rows]
    if isinstance(nest, Mapping):
        return {name: _take(value, rows) for name, value in nest.items()}
    if isinstance(nest, list):
        return [_take(value, rows) for value in nest]
    if isinstance(nest, tuple):
        return type(nest)(*(_take(value, rows) for value in nest))
    return nest


def _check_energy(energy: Tensor, rows: int) -> None:
    if tuple(energy.shape) != (rows,):
        raise ValueError(
            f"potential_fn must return one energy per row, shape ({rows},), "
            f"got {tuple(energy.shape)}"
        )
    check_precision("the energy", energy.dtype)
    if energy.device.type != "meta":
        bad = (~energy.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"the starting energy is not finite for {len(bad)} of {rows} rows "
                f"(first rows: {bad[:5]}); check the images and the initial latents of these rows"
            )


def check_inverse_mass(matrix: LatentsLike) -> None:
    """``ValueError`` unless it holds positive numbers by site."""
    if not (isinstance(matrix, Mapping) and all(isinstance(v, Tensor) for v in matrix.values())):
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


def inverse_mass_like(matrix: LatentsLike | None, like: LatentsLike) -> Latents | None:
    """The matrix where its sites and shapes fit latents, on their device and in their dtype."""
    if matrix is None:
        return None
    if matrix.keys() != like.keys():
        raise ValueError(
            f"inverse_mass_matrix must have the model's sites {sorted(like)}, got {sorted(matrix)}"
        )
    for name, diagonal in matrix.items():
        shape, fitting = tuple(diagonal.shape), tuple(like[name].shape)
        ends = zip(reversed(shape), reversed(fitting))
        if len(shape) > len(fitting) or any(size not in (1, full) for size, full in ends):
            raise ValueError(
                f"inverse_mass_matrix[{name!r}] of shape {shape} must broadcast to the latents' "
                f"{fitting}; give it one image's shape {fitting[1:]}"
            )
    return {name: matrix[name].to(like[name]) for name in like}
