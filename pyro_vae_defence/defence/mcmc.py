r"""Defences: what runs between the encoder and whatever uses its latents.

:class:`MCMCDefence` is the paper's (section 3): latents start at :math:`z_0 \sim q(z|x^a)` and follow a
Markov chain with stationary density proportional to :math:`p(x^a|z)p(z)`; what is decoded or classified is
where the chain ends.
:class:`NoDefence` stops at :math:`z_0`. Both are called with images and return a :class:`DefenceResult`.

Reference: Kuzina, Welling, Tomczak, "Alleviating Adversarial Attacks on Variational Autoencoders with
MCMC", NeurIPS 2022, https://arxiv.org/abs/2203.09940.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pyro.infer import MCMC
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae_defence import diagnostics
from pyro_vae_defence.mcmc.kernels import BatchedHMC, BatchedKernel
from pyro_vae_defence.models.perturbation import Perturbation
from pyro_vae_defence.models.program import (
    ModelPotential,
    check_images,
    check_vae,
    decode,
    encode,
    evaluation_mode,
    observation_site,
    potential,
    prior,
    target,
)
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import VAE, Latents

KernelFactory = Callable[[Callable[..., Any]], MCMCKernel]


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
        kernel: any callable from a Pyro model to an ``MCMCKernel``. With a kernel of this library, e.g.
            ``functools.partial(BatchedHMC, num_steps=4)``, all images and chains run as one batch; with
            any other, such as ``pyro.infer.NUTS``, images and chains run one after the other, since such
            a kernel takes a batch for a single state (their noise comes from torch's global seed).
        num_samples: draws kept per chain, >= 1.
        warmup_steps: transitions before them, >= 0, during which kernels adapt.
        num_chains: chains per image, >= 1. Chain 0 is the one that is decoded; more of them serve
            diagnostics (R-hat) and averages.
        initial: where chains start: ``"guide"``, a draw from q(z | x) as in the paper, or ``"prior"``.
        perturbation: perturbations the defender assumes, e.g. ``Linf(0.1)`` or an ``UnknownRadius``; the chains
            then sample the perturbation-aware posterior of :mod:`pyro_vae_defence.models.perturbation`.
            ``None`` is the paper.
        batch_size: most chains (images times ``num_chains``) at a time; results do not depend on it
            unless the kernel itself couples images, as the paper's preset does, or the guide has
            latents that are not Gaussian, whose start comes from torch's global seed.
        progress: show a progress bar.

    Raises:
        ValueError: if an argument is out of range, images are not in [0, 1], or a chain would start at
            a non-finite energy.
    """

    def __init__(
        self,
        vae: VAE,
        kernel: KernelFactory = BatchedHMC,
        num_samples: int = 20,
        warmup_steps: int = 40,
        num_chains: int = 1,
        *,
        initial: Literal["guide", "prior"] = "guide",
        perturbation: Perturbation | None = None,
        batch_size: int = 4096,
        progress: bool = False,
    ) -> None:
        self.vae = check_vae(vae)
        if not callable(kernel) or isinstance(kernel, MCMCKernel):
            raise ValueError(
                f"kernel must be a callable from a Pyro model to an MCMCKernel, such as BatchedHMC "
                f"or functools.partial(BatchedHMC, step_size=0.1), got {kernel!r}"
            )
        smallest = {"num_samples": 1, "warmup_steps": 0, "num_chains": 1, "batch_size": 1}
        given = {
            "num_samples": num_samples,
            "warmup_steps": warmup_steps,
            "num_chains": num_chains,
            "batch_size": batch_size,
        }
        for name, value in given.items():
            if not (isinstance(value, int) and value >= smallest[name]):
                raise ValueError(
                    f"{name} must be an integer of at least {smallest[name]}, got {value!r}"
                )
        if initial not in ("guide", "prior"):
            raise ValueError(f"initial must be 'guide' or 'prior', got {initial!r}")
        self.kernel = kernel
        self.perturbation = perturbation
        self.model = target(vae, perturbation)
        self.num_samples = num_samples
        self.warmup_steps = warmup_steps
        self.num_chains = num_chains
        self.initial = initial
        self.batch_size = batch_size
        self.progress = progress

    @classmethod
    def paper(
        cls, vae: VAE, dataset: str = "mnist", num_draws: int | None = None, **options: Any
    ) -> MCMCDefence:
        """The published defence: T // 2 transitions and T more, L leapfrog steps, eq. 67 (Table 8).

        Where the step size adapts (all but NVAE on CelebA), one for the batch makes results depend on which images
        are defended together.

        Args:
            vae: any Pyro VAE.
            dataset: key of :data:`PAPER_SETTINGS`: ``"mnist"``, ``"fashion_mnist"``, ``"color_mnist"``,
                ``"mnist_nvae"`` or ``"celeba_nvae"``.
            num_draws: how many of the last draws are kept, 1 to T; the T of them when ``None``. The chain is the
                same, whose step size adapts to the end if at all; many latents may not fit in memory T times.
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
        started = time.perf_counter()
        # Drawn before anything that consumes randomness in proportion to the batch.
        seed = draw_seed(generator)
        with evaluation_mode(self.vae):
            site = observation_site(self.vae.model, x)
            kernel = self.kernel(self.model)
            if not isinstance(kernel, MCMCKernel):
                raise ValueError(
                    f"kernel must return an MCMCKernel for a Pyro model, it returned {kernel!r}"
                )
            batched = isinstance(kernel, BatchedKernel)
            run = self._run_batched if batched else self._run_one_by_one
            initial, samples, stats = run(x, seed)
            latents = {name: value[0, -1] for name, value in samples.items()}
            with torch.no_grad():
                reconstruction = decode(self.vae, latents, tuple(x.shape[1:]))
        num_gradients = stats.pop("num_gradients").sum(0)
        return DefenceResult(
            latents,
            reconstruction,
            samples,
            stats,
            initial,
            x,
            num_gradients,
            time.perf_counter() - started,
            site,
            self._settings(),
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
        }

    # --- Chains of this library: all at once ---

    def _run_batched(self, x: Tensor, seed: int) -> tuple[Latents, Latents, dict[str, Tensor]]:
        images_at_once = max(1, self.batch_size // self.num_chains)
        parts = [
            self._run_batch(x[first : first + images_at_once], seed, first)
            for first in range(0, x.shape[0], images_at_once)
        ]
        initial = {n: torch.cat([p[0][n] for p in parts], 1) for n in parts[0][0]}
        samples = {n: torch.cat([p[1][n] for p in parts], 2) for n in parts[0][1]}
        # num_gradients is (chain, image), the others (chain, draw, image).
        stats = {n: torch.cat([p[2][n] for p in parts], -1) for n in parts[0][2]}
        return initial, samples, stats

    def _run_batch(
        self, x: Tensor, seed: int, first_image: int
    ) -> tuple[Latents, Latents, dict[str, Tensor]]:
        folded = x.repeat(self.num_chains, 1, 1, 1)
        streams = Streams.create(
            x.shape[0],
            self.num_chains,
            seed=seed,
            first_image=first_image,
            device=x.device,
        )
        energy = potential(self.vae, folded, self.perturbation)
        start = self._start(folded, energy, streams)
        kernel = self.kernel(self.model)
        assert isinstance(kernel, BatchedKernel)
        kernel.streams = streams
        # The start itself costs one gradient.
        gradients = torch.ones(folded.shape[0], dtype=torch.long, device=x.device)
        collected: dict[str, list[Tensor]] = {name: [] for name in diagnostics.SAMPLE_STATS}

        def collect(kernel: Any, params: Any, stage: str, number: int) -> None:
            nonlocal gradients
            gradients = gradients + kernel.info.num_steps
            bar.update()
            if stage.startswith("Warmup"):
                return
            info = kernel.info
            for name, value in (
                ("acceptance_rate", info.acceptance_rate),
                ("diverging", info.diverging),
                ("energy", info.energy),
                ("lp", -kernel.state.energy),
                ("step_size", info.step_size),
                ("n_steps", info.num_steps),
                ("tree_depth", info.tree_depth),
            ):
                collected[name].append(value)

        mcmc = MCMC(
            kernel,
            self.num_samples,
            self.warmup_steps,
            initial_params=start,
            hook_fn=collect,
            disable_progbar=True,
        )
        with self._bar(self.num_samples + self.warmup_steps, "transition") as bar:
            mcmc.run(folded)
        draws = mcmc.get_samples()
        samples = {
            name: lat.unfold(value.transpose(0, 1), self.num_chains).transpose(1, 2)
            for name, value in draws.items()
        }
        stats = {
            name: lat.unfold(torch.stack(values, 1), self.num_chains).transpose(1, 2)
            for name, values in collected.items()
        }
        stats["num_gradients"] = lat.unfold(gradients, self.num_chains)
        initial = {
            name: lat.unfold(value, self.num_chains)
            for name, value in energy.constrain(start).items()
        }
        return initial, samples, stats

    def _start(self, x: Tensor, energy: ModelPotential, streams: Streams) -> Latents:
        """Unconstrained starting points of the chains, one row of ``x`` each."""
        draw = encode if self.initial == "guide" else prior
        with torch.no_grad():
            return lat.detach(energy.unconstrain(draw(self.vae, x, streams=streams)))

    # --- Any other kernel: one image and chain after the other ---

    def _run_one_by_one(self, x: Tensor, seed: int) -> tuple[Latents, Latents, dict[str, Tensor]]:
        jobs = [(c, i) for c in range(self.num_chains) for i in range(x.shape[0])]
        with self._bar(len(jobs), "chain") as bar:
            chains = []
            for chain, image in jobs:
                chains.append(self._run_single(x[image : image + 1], seed, image, chain))
                bar.update()

        def grid(values: list[Tensor]) -> Tensor:
            stacked = torch.stack(values)
            return stacked.reshape((self.num_chains, x.shape[0], *stacked.shape[1:]))

        initial = {n: grid([c[0][n] for c in chains]) for n in chains[0][0]}
        samples = {n: grid([c[1][n] for c in chains]).transpose(1, 2) for n in chains[0][1]}
        stats = {n: grid([c[2][n] for c in chains]) for n in chains[0][2]}
        per_draw = {n: v.transpose(1, 2) for n, v in stats.items() if n != "num_gradients"}
        return initial, samples, {**per_draw, "num_gradients": stats["num_gradients"]}

    def _run_single(
        self, x: Tensor, seed: int, image: int, chain: int
    ) -> tuple[Latents, Latents, dict[str, Tensor]]:
        streams = Streams(
            seed,
            torch.full((1,), image, device=x.device),
            torch.full((1,), chain, device=x.device),
        )
        energy = potential(self.vae, x, self.perturbation)
        start = self._start(x, energy, streams)
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
            "num_gradients": torch.tensor(calls, device=x.device),
        }
        initial = {name: value[0] for name, value in energy.constrain(start).items()}
        return initial, draws, stats

    def _bar(self, total: int, unit: str) -> tqdm:
        return tqdm(total=total, unit=unit, disable=not self.progress, leave=False)


def _to_numpy(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}
