r"""Defences: what runs between the encoder and whatever uses its latents.

:class:`MCMCDefence` is the paper's (section 3): latents start at :math:`z_0 \sim q(z|x^a)` and
follow a Markov chain with stationary density proportional to :math:`p(x^a|z)p(z)`; what is decoded
or classified is where the chain ends.
:class:`NoDefence` stops at :math:`z_0`. Both are called with images and return a
:class:`DefenceResult`.

Reference: Kuzina, Welling, Tomczak, "Alleviating Adversarial Attacks on Variational Autoencoders
with MCMC", NeurIPS 2022, https://arxiv.org/abs/2203.09940.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from pyro.infer import MCMC
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae_defence import diagnostics
from pyro_vae_defence.defence.convergence import (
    MIN_CHAINS,
    MIN_DRAWS,
    Convergence,
    ConvergenceRule,
    assess,
)
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.mcmc.kernels import BatchedKernel
from pyro_vae_defence.mcmc.mode import search_mode
from pyro_vae_defence.models.compiled import Recorder, ReducedForce, check_force_dtype
from pyro_vae_defence.models.perturbation import Perturbation
from pyro_vae_defence.models.program import (
    ModelPotential,
    check_images,
    check_vae,
    decode,
    encode,
    evaluation_mode,
    initial_latents,
    observation_site,
    potential,
    target,
)
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import VAE, Latents

KernelFactory = Callable[[Callable[..., Any]], MCMCKernel]

Initial = Literal["guide", "mean", "prior", "mode"]
INITIALS: tuple[str, ...] = get_args(Initial)


class PaperSetting(NamedTuple):
    """One column of Table 8: T transitions of L leapfrog steps."""

    num_transitions: int
    step_size: float
    num_steps: int = 20
    adaptive: bool = True


PAPER_SETTINGS: dict[str, PaperSetting] = {
    "mnist": PaperSetting(500, 0.1),
    "fashion_mnist": PaperSetting(1000, 0.05),
    "color_mnist": PaperSetting(1000, 0.05),
    "mnist_nvae": PaperSetting(2000, 1e-4),
    "celeba_nvae": PaperSetting(1000, 1e-4, num_steps=1, adaptive=False),
}
"""The published defence per dataset, and for NVAE per dataset (Table 8)."""


@dataclass(frozen=True)
class DefenceResult:
    """Latents after a defence, and how they came about.

    Attributes:
        latents: site -> ``(N, *event)``: where the first chain ends.
        reconstruction: mean of p(x | latents), ``(N, C, H, W)``.
        samples: site -> ``(chain, draw, N, *event)``.
        sample_stats: name -> ``(chain, draw, N)``, ArviZ's names (``diagnostics.SAMPLE_STATS``).
        initial: site -> ``(chain, N, *event)``: where the chains started.
        x: the images the chains were conditioned on, ``(N, C, H, W)``.
        num_gradients: gradients of the energy spent per image, over all chains, ``(N,)``.
        seconds: wall time of the whole call.
        observation: name of the model's observation site.
        settings: what the run was made with.
        convergence: ``converged``, ``r_hat``, ``energy_drift`` and ``forgotten_after`` per image,
            ``(N,)`` each, of :class:`~pyro_vae_defence.defence.convergence.Convergence`; empty with
            fewer than 4 chains or 8 draws, where nothing can be said.
    """

    latents: Latents
    reconstruction: Tensor
    samples: Latents
    sample_stats: dict[str, Tensor]
    initial: Latents
    x: Tensor
    num_gradients: Tensor
    seconds: float
    observation: str
    settings: dict[str, Any] = field(default_factory=dict)
    convergence: dict[str, Tensor] = field(default_factory=dict)

    def to_datatree(self) -> Any:
        """The chains as an ``xarray.DataTree``; see :mod:`pyro_vae_defence.diagnostics`."""
        return diagnostics.to_datatree(
            _to_numpy(self.samples),
            _to_numpy(self.sample_stats),
            _to_numpy({self.observation: self.x}),
            attrs={"inference_library": "pyro_vae_defence", **self.settings},
        )

    def to_arviz(self) -> Any:
        """The chains for ArviZ: groups ``posterior``, ``sample_stats`` and ``observed_data``."""
        return diagnostics.to_arviz(self.to_datatree())


class NoDefence:
    """The undefended VAE: one draw from the guide, decoded.

    Args:
        vae: any Pyro VAE.
    """

    def __init__(self, vae: VAE) -> None:
        self.vae = check_vae(vae)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Latents:
        """One draw from q(z | x) per image."""
        return self(x, generator).latents

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> DefenceResult:
        """Encode and decode images ``(N, C, H, W)`` in [0, 1]."""
        check_images(x)
        started = time.perf_counter()
        with torch.no_grad(), evaluation_mode(self.vae):
            streams = Streams.create(x.shape[0], seed=draw_seed(generator), device=x.device)
            latents = encode(self.vae, x, streams=streams)
            energy = potential(self.vae, x)
            energy.check(energy.unconstrain(latents))
            reconstruction = decode(self.vae, latents, tuple(x.shape[1:]))
            site = observation_site(self.vae.model, x)
        return DefenceResult(
            latents,
            reconstruction,
            {name: value[None, None] for name, value in latents.items()},
            {},
            {name: value[None] for name, value in latents.items()},
            x,
            torch.zeros(x.shape[0], dtype=torch.long, device=x.device),
            time.perf_counter() - started,
            site,
            {"defence": "none"},
        )


class MCMCDefence:
    """Run a Markov chain on p(x | z)p(z) from the encoding of x (section 3 of the paper).

    Args:
        vae: any Pyro VAE.
        kernel: any callable from a Pyro model to an ``MCMCKernel``. With a kernel of this library,
            e.g. ``functools.partial(BatchedHMC, num_steps=4)``, all images and chains run as one
            batch; with any other, such as ``pyro.infer.NUTS``, images and chains run one after the
            other, since such a kernel takes a batch for a single state (their noise comes from
            torch's global seed).
        num_samples: transitions per chain after warm-up, >= 1.
        warmup_steps: transitions before them, >= 0, during which kernels adapt.
        num_chains: chains per image, >= 1. Chain 0 is the one that is decoded; more of them serve
            diagnostics (R-hat) and averages.
        initial: where chains start: ``"guide"``, a draw from q(z | x) as in the paper; ``"mean"``,
            its mean; ``"prior"``, a draw from p(z); ``"mode"``, the best of ``mode_steps`` steps of
            :func:`~pyro_vae_defence.mcmc.mode.search_mode` from a draw of the guide, whose
            gradients count.
        mode_steps: steps of that search, >= 0.
        perturbation: perturbations the defender assumes, e.g. ``Linf(0.1)`` or an
            ``UnknownRadius``; the chains then sample the perturbation-aware posterior of
            :mod:`pyro_vae_defence.models.perturbation`. ``None`` is the paper.
        keep_draws: draws kept per chain, the last ones; ``None`` keeps all ``num_samples``. Memory
            per image then depends on this alone. With ``until_converged`` at most its
            ``check_every``, the default.
        max_gradients: most gradients of the energy per image, over all its chains, the start and a
            mode search included; ``None`` for no bound. Where it does not suffice for all
            transitions, warm-up keeps its share ``warmup_steps / (warmup_steps + num_samples)`` of
            those that it does. NUTS is counted by its largest tree, since no image's tree is known
            beforehand.
        until_converged: stop each image's chains when they keep this rule; ``num_samples`` is then
            the most transitions after warm-up. Needs at least 4 chains. An image whose every
            transition between two looks diverged, in all chains, stops too, unconverged. Images
            that are done leave the batch once they are half of it, unless the kernel couples
            images; results do not depend on that.
        capture: record the energy and its gradient once per shape of a batch instead of running the
            model's Python every time (:class:`~pyro_vae_defence.models.compiled.Recorder`, which
            falls back to tracing). A recording takes some tenths of a second and a few gradients.
        compile: also hand recordings to ``torch.compile``.
        force_dtype: precision of forces, e.g. ``torch.bfloat16``; energies stay full, so that
            chains stay exact (:class:`~pyro_vae_defence.models.compiled.ReducedForce`). It pays
            where the device multiplies faster in it; not combined with ``capture``.
        batch_size: most chains (images times ``num_chains``) at a time; results do not depend on it
            unless the kernel itself couples images, as the paper's preset does, or the guide has
            latents that are not Gaussian, whose start comes from torch's global seed.
        progress: show a progress bar.

    Raises:
        ValueError: if an argument is out of range, images are not in [0, 1], or a chain would start
            at a non-finite energy.
    """

    def __init__(
        self,
        vae: VAE,
        kernel: KernelFactory = BatchedHMC,
        num_samples: int = 20,
        warmup_steps: int = 40,
        num_chains: int = 1,
        *,
        initial: Initial = "guide",
        mode_steps: int = 30,
        perturbation: Perturbation | None = None,
        keep_draws: int | None = None,
        max_gradients: int | None = None,
        until_converged: ConvergenceRule | None = None,
        capture: bool = False,
        compile: bool = False,
        force_dtype: torch.dtype | None = None,
        batch_size: int = 4096,
        progress: bool = False,
    ) -> None:
        self.vae = check_vae(vae)
        if not callable(kernel) or isinstance(kernel, MCMCKernel):
            raise ValueError(
                f"kernel must be a callable from a Pyro model to an MCMCKernel, such as BatchedHMC "
                f"or functools.partial(BatchedHMC, step_size=0.1), got {kernel!r}"
            )
        check_integer("num_samples", num_samples, 1)
        check_integer("warmup_steps", warmup_steps, 0)
        check_integer("num_chains", num_chains, 1)
        check_integer("mode_steps", mode_steps, 0)
        check_integer("batch_size", batch_size, 1)
        if max_gradients is not None:
            check_integer("max_gradients", max_gradients, 1)
        if initial not in INITIALS:
            raise ValueError(f"initial must be one of {INITIALS}, got {initial!r}")
        most = num_samples
        if until_converged is not None:
            if not isinstance(until_converged, ConvergenceRule):
                raise ValueError(
                    f"until_converged must be a ConvergenceRule or None, got {until_converged!r}"
                )
            if num_chains < MIN_CHAINS:
                raise ValueError(
                    f"until_converged compares chains: num_chains must be at least {MIN_CHAINS}, "
                    f"got {num_chains}"
                )
            most = min(num_samples, until_converged.check_every)
        if keep_draws is None:
            keep_draws = most
        check_integer("keep_draws", keep_draws, 1)
        if keep_draws > most:
            raise ValueError(
                f"keep_draws must be at most {most}, the fewest draws an image can have, "
                f"got {keep_draws}"
            )
        if capture and force_dtype is not None:
            raise ValueError("capture and force_dtype cannot be combined; give one of them")
        if compile and not capture:
            raise ValueError("compile works on recordings; give capture=True as well")
        check_force_dtype(force_dtype)
        self.kernel = kernel
        self.perturbation = perturbation
        self.model = target(vae, perturbation)
        self.num_samples = num_samples
        self.warmup_steps = warmup_steps
        self.num_chains = num_chains
        self.initial = initial
        self.mode_steps = mode_steps
        self.keep_draws = keep_draws
        self.max_gradients = max_gradients
        self.until_converged = until_converged
        self.capture = capture
        self.compile = compile
        self.force_dtype = force_dtype
        self.batch_size = batch_size
        self.progress = progress

    @classmethod
    def paper(
        cls, vae: VAE, dataset: str = "mnist", num_draws: int | None = None, **options: Any
    ) -> MCMCDefence:
        """The published defence: T // 2 transitions and T more, L leapfrog steps, eq. 67 (Table 8).

        Where the step size adapts (all but NVAE on CelebA), one for the batch makes results depend
        on which images are defended together.

        Args:
            vae: any Pyro VAE.
            dataset: key of :data:`PAPER_SETTINGS`: ``"mnist"``, ``"fashion_mnist"``,
                ``"color_mnist"``, ``"mnist_nvae"`` or ``"celeba_nvae"``.
            num_draws: how many of the last draws are kept, 1 to T; the T of them when ``None``. The
                chain is the same, whose step size adapts to the end if at all; many latents may not
                fit in memory T times.
            **options: further arguments of :class:`MCMCDefence`.
        """
        if dataset not in PAPER_SETTINGS:
            raise ValueError(f"dataset must be one of {sorted(PAPER_SETTINGS)}, got {dataset!r}")
        setting = PAPER_SETTINGS[dataset]
        count = setting.num_transitions
        num_draws = count if num_draws is None else num_draws
        if not 1 <= num_draws <= count:
            raise ValueError(f"num_draws must lie in 1..{count}, got {num_draws!r}")
        kernel = functools.partial(BatchedHMC, step_size=setting.step_size)
        if setting.adaptive:
            kernel = functools.partial(kernel, preset="paper")
        else:
            kernel = functools.partial(
                kernel, num_steps=setting.num_steps, jitter=0.0, adapt_step_size=False
            )
        return cls(vae, kernel, num_draws, count // 2 + count - num_draws, **options)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Latents:
        """Where the first chain of each image ends: site -> ``(N, *event)``."""
        return self(x, generator).latents

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> DefenceResult:
        """Defend images ``(N, C, H, W)`` in [0, 1].

        Args:
            x: images, attacked or not.
            generator: source of the run's seed; torch's global seed when ``None``.
        """
        check_images(x)
        parts = list(self._parts([x], draw_seed(generator), whole=True))
        return parts[0] if len(parts) == 1 else _join(parts, x)

    def stream(
        self, batches: Iterable[Any], generator: torch.Generator | None = None
    ) -> Iterator[DefenceResult]:
        """Defend any number of images in constant memory: one result per micro-batch, as they are
        ready.

        Images are numbered through, so that together the results are those of one call on all
        images.

        Args:
            batches: iterable of images ``(N, C, H, W)`` in [0, 1], or of tuples that start with
                them, e.g. a ``DataLoader``; batches of more than ``batch_size`` chains are divided.
            generator: source of the run's seed; torch's global seed when ``None``.

        Raises:
            ValueError: while iterating, if a batch does not hold images in [0, 1].
        """
        yield from self._parts(batches, draw_seed(generator), whole=False)

    def _parts(self, batches: Iterable[Any], seed: int, whole: bool) -> Iterator[DefenceResult]:
        # The seed was drawn before anything that consumes randomness in proportion to the batch.
        recorder = Recorder(compile=self.compile) if self.capture else None
        first = 0
        for batch in batches:
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            if not whole:
                check_images(images, "batches")
            kernel = self.kernel(self.model)
            if not isinstance(kernel, MCMCKernel):
                raise ValueError(
                    f"kernel must return an MCMCKernel for a Pyro model, it returned {kernel!r}"
                )
            batched = isinstance(kernel, BatchedKernel)
            if not batched and (self.max_gradients is not None or self.until_converged is not None):
                raise ValueError(
                    "max_gradients and until_converged need a kernel of this library, such as "
                    f"BatchedHMC; got {type(kernel).__name__}"
                )
            size = max(1, self.batch_size // self.num_chains) if batched else images.shape[0]
            for x in images.split(size):
                yield self._part(x, seed, first, recorder, batched)
                first += x.shape[0]

    def _part(
        self, x: Tensor, seed: int, first: int, recorder: Recorder | None, batched: bool
    ) -> DefenceResult:
        """The chains of one micro-batch, whose first image has the number ``first``."""
        started = time.perf_counter()
        with evaluation_mode(self.vae):
            site = observation_site(self.vae.model, x)
            if batched:
                run = self._run_batch(x, seed, first, recorder)
            else:
                run = self._run_one_by_one(x, seed, first)
            latents = {name: value[0, -1] for name, value in run.samples.items()}
            with torch.no_grad():
                reconstruction = decode(self.vae, latents, tuple(x.shape[1:]))
        return DefenceResult(
            latents,
            reconstruction,
            run.samples,
            run.stats,
            run.initial,
            x,
            run.num_gradients,
            time.perf_counter() - started,
            site,
            self._settings(),
            run.convergence,
        )

    def _settings(self) -> dict[str, Any]:
        kernel = self.kernel
        options: dict[str, Any] = {}
        while isinstance(kernel, functools.partial):
            options = {**kernel.keywords, **options}
            kernel = kernel.func
        # As netCDF stores attributes, which knows no booleans.
        shown = {
            k: int(v) if isinstance(v, bool) else v
            for k, v in options.items()
            if isinstance(v, (int, float, str))
        }
        return {
            "defence": "mcmc",
            "kernel": getattr(kernel, "__name__", type(kernel).__name__),
            **{f"kernel_{name}": value for name, value in shown.items()},
            "num_samples": self.num_samples,
            "warmup_steps": self.warmup_steps,
            "num_chains": self.num_chains,
            "initial": self.initial,
            "perturbation": str(self.perturbation),
            "keep_draws": self.keep_draws,
            "max_gradients": str(self.max_gradients),
            "until_converged": str(self.until_converged),
            "capture": int(self.capture),
            "force_dtype": str(self.force_dtype),
        }

    # --- Chains of this library: all at once ---

    def _run_batch(self, x: Tensor, seed: int, first: int, recorder: Recorder | None) -> _Run:
        num_images, num_chains, rule = x.shape[0], self.num_chains, self.until_converged
        kernel = self.kernel(self.model)
        assert isinstance(kernel, BatchedKernel)
        kernel.streams = Streams.create(
            num_images, num_chains, seed=seed, first_image=first, device=x.device
        )
        kernel.prepare = self._prepare(recorder)
        warmup_steps, num_samples = self._plan(kernel, seed)
        folded = x.repeat(num_chains, 1, 1, 1)
        kernel.setup(warmup_steps, folded)
        energy = kernel.potential
        assert isinstance(energy, ModelPotential)
        position, gradients = self._start(folded, energy, kernel.streams)
        initial = energy.constrain(position)
        # The start itself costs one gradient.
        gradients = gradients + 1
        history: deque[_Draw] = deque(maxlen=self.keep_draws if rule is None else None)
        collector = _Collector(num_images, num_chains, self.keep_draws)
        present = torch.arange(num_images, device=x.device)  # images in the batch
        running = torch.ones(num_images, dtype=torch.bool, device=x.device)
        with self._bar(warmup_steps + num_samples, "transition") as bar:
            for number in range(1, warmup_steps + num_samples + 1):
                position = kernel.sample(position)
                assert kernel.info is not None
                gradients = gradients + kernel.info.num_steps
                bar.update()
                made = number - warmup_steps
                if made < 1:
                    continue
                history.append(_Draw(position, _statistics(kernel)))
                last = made == num_samples
                if not last and (rule is None or made % rule.check_every):
                    continue
                verdict = self._assess(history, warmup_steps)
                done = running
                if not last:
                    assert rule is not None
                    assert verdict is not None
                    recent = [
                        draw.stats["diverging"] for draw in list(history)[-rule.check_every :]
                    ]
                    stuck = lat.unfold(torch.stack(recent).all(0), num_chains).all(0)
                    done = running & (verdict.converged | stuck)
                collector.collect(energy, history, gradients, verdict, present, done)
                running = running & ~done
                left = int(running.sum())
                if left == 0:
                    break
                if 2 * left <= present.shape[0] and not kernel.couples_images:
                    rows = running.nonzero()[:, 0]
                    chains = torch.arange(num_chains, device=x.device)[:, None]
                    folded_rows = (chains * present.shape[0] + rows).flatten()
                    kernel.keep(folded_rows)
                    assert kernel.state is not None
                    position = kernel.state.position
                    gradients = gradients[folded_rows]
                    history = deque(draw.take(folded_rows) for draw in history)
                    present, running = present[rows], running[rows]
        kernel.cleanup()
        return collector.result({n: lat.unfold(v, num_chains) for n, v in initial.items()})

    def _prepare(
        self, recorder: Recorder | None
    ) -> Callable[[ModelPotential], ModelPotential] | None:
        if self.force_dtype is None:
            return recorder
        return functools.partial(ReducedForce, dtype=self.force_dtype)

    def _plan(self, kernel: BatchedKernel, seed: int) -> tuple[int, int]:
        """Transitions of warm-up and after it that fit ``max_gradients``."""
        total = self.warmup_steps + self.num_samples
        if self.max_gradients is None:
            return self.warmup_steps, self.num_samples
        budget = self.max_gradients // self.num_chains
        spent = 1 + (self.mode_steps + 1 if self.initial == "mode" else 0)
        steps = 0
        while steps < total and spent + kernel.gradients_of(seed, steps) <= budget:
            spent += kernel.gradients_of(seed, steps)
            steps += 1
        if steps == 0:
            raise ValueError(
                f"max_gradients={self.max_gradients} leaves no transition to any of "
                f"{self.num_chains} "
                f"chains: the start takes {spent} of the {budget} gradients of each; raise it"
            )
        warmup_steps = self.warmup_steps * steps // total
        return warmup_steps, min(steps - warmup_steps, self.num_samples)

    def _assess(self, history: Sequence[_Draw], warmup_steps: int) -> Convergence | None:
        if self.num_chains < MIN_CHAINS or len(history) < 2 * MIN_DRAWS:
            return None
        stacked = _stack(history, self.num_chains)
        rule = self.until_converged or ConvergenceRule()
        first = warmup_steps
        if self.until_converged is None:
            first += self.num_samples - len(history)
        return assess(-stacked.stats["lp"], stacked.position, rule, first)

    def _start(self, x: Tensor, energy: ModelPotential, streams: Streams) -> tuple[Latents, Tensor]:
        """Unconstrained starts of the chains, one row of ``x`` each, and the gradients they
        took."""
        drawn_from = "guide" if self.initial == "mode" else self.initial
        with torch.no_grad():
            drawn = initial_latents(self.vae, x, drawn_from, streams)
            start = lat.detach(energy.unconstrain(drawn))
        if self.initial == "mode":
            return search_mode(energy, start, num_steps=self.mode_steps)
        return start, torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    # --- Any other kernel: one image and chain after the other ---

    def _run_one_by_one(self, x: Tensor, seed: int, first: int) -> _Run:
        jobs = [(c, i) for c in range(self.num_chains) for i in range(x.shape[0])]
        with self._bar(len(jobs), "chain") as bar:
            chains = []
            for chain, image in jobs:
                chains.append(self._run_single(x[image : image + 1], seed, first + image, chain))
                bar.update()

        def grid(values: list[Tensor]) -> Tensor:
            stacked = torch.stack(values)
            return stacked.reshape((self.num_chains, x.shape[0], *stacked.shape[1:]))

        initial = {n: grid([c[0][n] for c in chains]) for n in chains[0][0]}
        samples = {n: grid([c[1][n] for c in chains]).transpose(1, 2) for n in chains[0][1]}
        stats = {n: grid([c[2][n] for c in chains]) for n in chains[0][2]}
        num_gradients = stats.pop("num_gradients").sum(0)
        kept = {n: v.transpose(1, 2)[:, -self.keep_draws :] for n, v in stats.items()}
        return _Run(
            initial,
            {n: v[:, -self.keep_draws :] for n, v in samples.items()},
            kept,
            num_gradients,
            {},
        )

    def _run_single(
        self, x: Tensor, seed: int, image: int, chain: int
    ) -> tuple[Latents, Latents, dict[str, Tensor]]:
        streams = Streams(
            seed,
            torch.full((1,), image, device=x.device),
            torch.full((1,), chain, device=x.device),
        )
        energy = potential(self.vae, x, self.perturbation)
        start, spent = self._start(x, energy, streams)
        if not bool(energy(start).isfinite().all()):
            # Pyro's own search for a step size would not come back from here.
            raise ValueError(
                f"the starting energy is not finite for image {image}, chain {chain}; check the "
                "image and what the guide returns for it"
            )
        calls = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return self.model(*args, **kwargs)

        kernel: Any = self.kernel(counted)
        acceptance: list[float] = []
        diverging: list[bool] = []
        step_sizes: list[float] = []
        ends: list[int] = []

        def collect(kernel: Any, params: Any, stage: str, number: int) -> None:
            ends.append(calls)
            if stage.startswith("Warmup"):
                return
            # Pyro's kernels keep running means; their differences are the transitions' own values.
            count = number + 1
            mean = float(getattr(kernel, "_mean_accept_prob", np.nan))
            before = sum(acceptance)
            acceptance.append(min(1.0, max(0.0, mean * count - before)))
            diverging.append(number in getattr(kernel, "_divergences", ()))
            step_sizes.append(float(getattr(kernel, "step_size", np.nan)))

        mcmc = MCMC(
            kernel,
            self.num_samples,
            self.warmup_steps,
            initial_params={name: value.clone() for name, value in start.items()},
            hook_fn=collect,
            disable_progbar=True,
        )
        mcmc.run(x)
        draws = {name: value[:, 0] for name, value in mcmc.get_samples().items()}
        with torch.no_grad():
            repeated = potential(
                self.vae, x.expand(self.num_samples, -1, -1, -1), self.perturbation
            )
            lp = -repeated(repeated.unconstrain(draws))
        sizes = torch.tensor(ends[self.warmup_steps :]) - torch.tensor(
            ends[max(self.warmup_steps - 1, 0) : -1] if self.warmup_steps else [0, *ends[:-1]]
        )
        stats = {
            "acceptance_rate": x.new_tensor(acceptance),
            "diverging": torch.tensor(diverging, device=x.device),
            "lp": lp,
            "step_size": x.new_tensor(step_sizes),
            "n_steps": sizes.to(x.device),
            "num_gradients": torch.tensor(calls, device=x.device) + spent[0],
        }
        initial = {name: value[0] for name, value in energy.constrain(start).items()}
        return initial, draws, stats

    def _bar(self, total: int, unit: str) -> tqdm:
        return tqdm(total=total, unit=unit, disable=not self.progress, leave=False)


class _Draw(NamedTuple):
    """One transition of all rows: unconstrained positions and statistics, ``(rows, ...)``."""

    position: Latents
    stats: dict[str, Tensor]

    def take(self, rows: Tensor) -> _Draw:
        return _Draw(lat.index(self.position, rows), lat.index(self.stats, rows))


class _Run(NamedTuple):
    """The chains of a micro-batch, in the shapes of :class:`DefenceResult`."""

    initial: Latents
    samples: Latents
    stats: dict[str, Tensor]
    num_gradients: Tensor
    convergence: dict[str, Tensor]


def _statistics(kernel: BatchedKernel) -> dict[str, Tensor]:
    info, state = kernel.info, kernel.state
    assert info is not None
    assert state is not None
    return {
        "acceptance_rate": info.acceptance_rate,
        "diverging": info.diverging,
        "energy": info.energy,
        "lp": -state.energy,
        "step_size": info.step_size,
        "n_steps": info.num_steps,
        "tree_depth": info.tree_depth,
    }


def _stack(history: Sequence[_Draw], num_chains: int) -> _Draw:
    """Draws of one transition each to tensors ``(chain, draw, image, ...)``."""

    def stack(values: list[Tensor]) -> Tensor:
        return lat.unfold(torch.stack(values, 1), num_chains).transpose(1, 2)

    first = history[0]
    return _Draw(
        {n: stack([draw.position[n] for draw in history]) for n in first.position},
        {n: stack([draw.stats[n] for draw in history]) for n in first.stats},
    )


class _Collector:
    """Last draws of every image, taken when the image is done."""

    def __init__(self, num_images: int, num_chains: int, keep_draws: int) -> None:
        self.num_images = num_images
        self.num_chains = num_chains
        self.keep_draws = keep_draws
        self.parts: list[tuple[Tensor, _Run]] = []

    def collect(
        self,
        energy: ModelPotential,
        history: Sequence[_Draw],
        gradients: Tensor,
        verdict: Convergence | None,
        present: Tensor,
        done: Tensor,
    ) -> None:
        """Take the images marked by ``done``; ``present`` are the images of the rows."""
        columns = done.nonzero()[:, 0]
        if columns.shape[0] == 0:
            return
        last = _stack(list(history)[-self.keep_draws :], self.num_chains)
        # Whatever the batch, a site's transform acts on its event dimensions, the last ones.
        samples = {n: v[:, :, columns] for n, v in energy.constrain(last.position).items()}
        stats = {n: v[:, :, columns] for n, v in last.stats.items()}
        spent = lat.unfold(gradients, self.num_chains).sum(0)[columns]
        seen = {} if verdict is None else {n: v[columns] for n, v in verdict._asdict().items()}
        self.parts.append((present[columns], _Run({}, samples, stats, spent, seen)))

    def result(self, initial: Latents) -> _Run:
        order = torch.cat([images for images, _ in self.parts]).argsort()
        runs = [run for _, run in self.parts]

        def join(values: Iterable[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
            return {n: v.index_select(dim, order) for n, v in _concatenate(values, dim).items()}

        return _Run(
            initial,
            join((run.samples for run in runs), 2),
            join((run.stats for run in runs), 2),
            torch.cat([run.num_gradients for run in runs])[order],
            join((run.convergence for run in runs), 0),
        )


def _concatenate(values: Iterable[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
    parts = list(values)
    return {name: torch.cat([part[name] for part in parts], dim) for name in parts[0]}


def _join(parts: list[DefenceResult], x: Tensor) -> DefenceResult:
    """Results of consecutive micro-batches of ``x`` as one."""
    return DefenceResult(
        _concatenate((p.latents for p in parts), 0),
        torch.cat([p.reconstruction for p in parts]),
        _concatenate((p.samples for p in parts), 2),
        _concatenate((p.sample_stats for p in parts), 2),
        _concatenate((p.initial for p in parts), 1),
        x,
        torch.cat([p.num_gradients for p in parts]),
        sum(p.seconds for p in parts),
        parts[0].observation,
        parts[0].settings,
        _concatenate((p.convergence for p in parts), 0),
    )


def _to_numpy(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}
