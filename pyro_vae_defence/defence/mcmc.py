r"""The paper's defence (section 3): a Markov chain between an encoder and whoever uses its latents.

Latents start at :math:`z_0 \sim q(z|x^a)` and follow a chain with stationary density proportional
to :math:`p(x^a|z)p(z)`; what is decoded or classified is where the chain ends.

Reference: Kuzina, Welling, Tomczak, "Alleviating Adversarial Attacks on Variational Autoencoders
with MCMC", NeurIPS 2022, https://arxiv.org/abs/2203.09940.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_vae_defence.defence.base import BaseDefence
from pyro_vae_defence.defence.chains import Lengths, run_batched
from pyro_vae_defence.defence.convergence import MIN_CHAINS, ConvergenceRule
from pyro_vae_defence.defence.foreign import KernelFactory, run_one_by_one
from pyro_vae_defence.defence.result import Chains, setting
from pyro_vae_defence.defence.starts import INITIALS, ChainStart, Initial
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.mcmc.captured import find_graph
from pyro_vae_defence.mcmc.kernels import BatchedKernel
from pyro_vae_defence.models.conditions import rows_of, split
from pyro_vae_defence.models.contract import check_images, check_vae, run_on
from pyro_vae_defence.models.modules import networks_of
from pyro_vae_defence.models.perturbation import Perturbation
from pyro_vae_defence.models.program import (
    ModelPotential,
    mean_posterior_variance,
    potential,
    target,
)
from pyro_vae_defence.ops.checks import check_integer, check_within, plain
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import VAE


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

RECOMMENDED_KERNEL: dict[str, Any] = {"step_size": 0.2, "num_steps": 4, "burn_in": 30}
RECOMMENDED_LENGTHS: dict[str, int] = {"num_samples": 10, "warmup_steps": 15, "num_chains": 4}
"""What :meth:`MCMCDefence.recommended` says of them."""

_ROWS = 500
"""Training images that are encoded at once."""


@dataclass(eq=False, repr=False)
class MCMCDefence(BaseDefence):
    """Run a Markov chain on p(x | z)p(z) from the encoding of x (section 3 of the paper).

    Args:
        kernel: any callable from a Pyro model to an ``MCMCKernel``. With a kernel of this library,
            e.g. ``functools.partial(BatchedHMC, num_steps=4)``, all images and chains run as one
            batch; with any other, such as ``pyro.infer.NUTS``, one after the other, on the same
            potential (:mod:`~pyro_vae_defence.defence.foreign`). Such a kernel takes neither
            ``max_gradients`` nor ``until_converged`` nor ``prepare``.
        num_samples: transitions per chain after warm-up, >= 1.
        warmup_steps: transitions before them, >= 0, during which kernels adapt.
        num_chains: chains per image, >= 1. Chain 0 is the one that is decoded; more of them serve
            diagnostics (R-hat) and averages.
        initial: where chains start: ``"guide"``, a draw from q(z | x) as in the paper; ``"mean"``,
            its mean; ``"prior"``, a draw from p(z); ``"mode"``, the best of ``mode_steps`` steps of
            :func:`~pyro_vae_defence.mcmc.mode.search_mode` from a draw of the guide, whose
            gradients count; ``"annealed"``, the end of a walk of ``num_temperatures`` steps from a
            draw of p(z) to the target, whose gradients count
            (:mod:`~pyro_vae_defence.defence.starts`). The encoder has no part in it, so that an
            attacker of the encoder does not choose where chains start.
        mode_steps: steps of that search, >= 0.
        num_temperatures: steps of that walk, >= 2, of 4 gradients each.
        perturbation: perturbations the defender assumes, e.g. ``Linf(0.1)`` or an
            ``UnknownRadius``; the chains then sample the perturbation-aware posterior of
            :mod:`pyro_vae_defence.models.perturbation`. ``None`` is the paper.
        keep_draws: draws kept per chain, the last ones; ``None`` keeps all ``num_samples``. Memory
            per image then depends on this alone. With ``until_converged``, which looks at all
            draws, at most its ``check_every``, the default.
        max_gradients: most gradients of the energy per image, over all its chains, the start and
            what leads there included; ``None`` for no bound. Where it does not suffice for all
            transitions, warm-up keeps its share ``warmup_steps / (warmup_steps + num_samples)`` of
            those that it does. NUTS is counted by its largest tree, since no image's tree is known
            beforehand.
        until_converged: stop each image's chains when they keep this rule; ``num_samples`` is then
            the most transitions after warm-up. Needs at least 4 chains. An image whose every
            transition between two looks diverged, in all chains, stops too, unconverged. Images
            that are done leave the batch, which changes no result.
        prepare: how the model's energy, or a whole transition, is evaluated.
            :class:`Recorder() <pyro_vae_defence.models.compiled.Recorder>` records energy and
            gradient once per shape of a batch instead of running the model's Python every time,
            ``Recorder(compile=True)`` compiles them as well, and
            :class:`~pyro_vae_defence.models.compiled.ReducedForce` computes forces in bfloat16,
            float16 or TF32. ``"graph"``, which stands for
            :class:`Graph() <pyro_vae_defence.mcmc.captured.Graph>`, launches each transition as one
            CUDA graph, with forces in reduced precision where it is asked for them; on a CPU it is
            a ``Recorder()``. One of these serves all micro-batches, and all calls; any other
            callable from a ``ModelPotential`` to one will do. Where one cannot do what it is for,
            the run goes on without, and ``settings["prepare_why_not"]`` of its result says why.
            ``None`` runs the model's Python every time: recording takes longer than short runs do.
        batch_size: most chains (images times ``num_chains``) at a time. Results do not depend on
            it, unless the kernel couples images, as the paper's preset does, or noise comes from
            torch's global generators: that of other kernels, and of starts where the latents of
            the guide, or of the prior, are of families unknown to
            :mod:`pyro_vae_defence.ops.draws`, such as ``VonMises``.
        progress: show a progress bar.

    Raises:
        ValueError: as :class:`BaseDefence`, and if a chain would start at a non-finite energy, or
            at a walk from a prior without density.
    """

    kernel: KernelFactory = BatchedHMC
    num_samples: int = 20
    warmup_steps: int = 40
    num_chains: int = 1
    _: KW_ONLY
    initial: Initial = "guide"
    mode_steps: int = 30
    num_temperatures: int = 20
    perturbation: Perturbation | None = None
    keep_draws: int | None = None
    max_gradients: int | None = None
    until_converged: ConvergenceRule | None = None
    prepare: Callable[[ModelPotential], ModelPotential] | Literal["graph"] | None = None
    progress: bool = False

    def _check(self) -> None:
        super()._check()
        if not callable(self.kernel) or isinstance(self.kernel, MCMCKernel):
            raise ValueError(
                f"kernel must be a callable from a Pyro model to an MCMCKernel, such as BatchedHMC "
                f"or functools.partial(BatchedHMC, step_size=0.1), got {self.kernel!r}"
            )
        self.prepare = find_graph(self.prepare)
        self._why_not: str | None = None  # what the last run's `prepare` says
        if self.initial not in INITIALS:
            raise ValueError(f"initial must be one of {INITIALS}, got {self.initial!r}")
        check_integer("num_samples", self.num_samples, 1)
        check_integer("warmup_steps", self.warmup_steps, 0)
        check_integer("num_chains", self.num_chains, 1)
        check_integer("mode_steps", self.mode_steps, 0)
        check_integer("num_temperatures", self.num_temperatures, 2)
        if self.max_gradients is not None:
            check_integer("max_gradients", self.max_gradients, 1)
        rule = self.until_converged
        if rule is not None:
            if not isinstance(rule, ConvergenceRule):
                raise ValueError(f"until_converged must be a ConvergenceRule or None, got {rule!r}")
            if self.num_chains < MIN_CHAINS:
                raise ValueError(
                    f"until_converged compares chains: num_chains must be at least {MIN_CHAINS}, "
                    f"got {self.num_chains}"
                )
        if self.keep_draws is not None:
            check_integer("keep_draws", self.keep_draws, 1)
            if self.keep_draws > self._fewest_draws:
                raise ValueError(
                    f"keep_draws must be at most {self._fewest_draws}, the fewest draws an image "
                    f"can have, got {self.keep_draws}"
                )
        target(self.vae, self.perturbation)  # checks it

    @classmethod
    def paper(
        cls, vae: VAE, dataset: str = "mnist", num_draws: int | None = None, **options: Any
    ) -> MCMCDefence:
        """The published defence: T // 2 transitions and T more, L leapfrog steps, eq. 67 (Table 8).

        Where the step size adapts (all but NVAE on CelebA), one for the batch makes results depend
        on which images are defended together.

        Args:
            vae: any Pyro VAE.
            dataset: key of :data:`PAPER_SETTINGS`.
            num_draws: how many of the last draws are kept, 1 to T; the T of them when ``None``. The
                chain is the same, whose step size adapts to the end if at all; many latents may not
                fit in memory T times.
            **options: further arguments of :class:`MCMCDefence`.
        """
        if dataset not in PAPER_SETTINGS:
            raise ValueError(f"dataset must be one of {sorted(PAPER_SETTINGS)}, got {dataset!r}")
        count, step_size, num_steps, adaptive = PAPER_SETTINGS[dataset]
        num_draws = count if num_draws is None else num_draws
        check_within("num_draws", num_draws, f"[1, {count}]")
        rule: dict[str, Any] = {"preset": "paper"}
        if not adaptive:
            rule = {"num_steps": num_steps, "jitter": 0.0, "adapt_step_size": False}
        kernel = functools.partial(BatchedHMC, step_size=step_size, **rule)
        return cls(vae, kernel, num_draws, count // 2 + count - num_draws, **options)

    @classmethod
    def recommended(
        cls, vae: VAE, ball: Perturbation | None, train_images: Any = None, **options: Any
    ) -> MCMCDefence:
        """What this library recommends: short chains on the perturbation-aware posterior.

        - *Target*: the posterior of whatever image in ``ball`` around the given one explains it
          best. The paper's target takes the perturbation for signal. On MNIST and Fashion-MNIST
          this one kept more under every attack that was tried, those of attackers who know the
          defence included; on textured backgrounds and on ColorMNIST it does not always.
        - *Sampler*: HMC of 4 leapfrog steps on average (jittered) in the metric of the training
          set's mean posterior variance, after 30 steps of burn-in, from a step size of 0.2: the
          first exact sampler to reach the stationary energy in the benchmark, after 33 gradients at
          both radii. Without the burn-in, chains on textured backgrounds do not arrive. A single
          latent dimension is sampled without it.
        - *Lengths*: 15 transitions of warm-up and 10 draws in each of 4 chains, about 570 gradients
          per image. One chain in place of four (``num_chains=1``) costs a quarter and gives the
          same reconstruction; four have an R-hat, and their mean latents and classes vary less.

        It is a heuristic, not a certificate, and where an image's background is black, clipping
        dark pixels may do as well: compare it with :class:`EncoderDefence` on your own images.

        Args:
            vae: any Pyro VAE.
            ball: largest perturbation that is assumed, such as ``Linf(0.1)``, best not smaller than
                an attacker's; an ``UnknownRadius`` of :func:`calibrate_radius`; ``None`` assumes
                none, which is the paper's target.
            train_images: images the VAE was trained on, some thousand suffice, for the metric:
                images ``(N, C, H, W)``, a tuple ``(x, *conditions)``, a dataset, or a loader. They
                may be left out if the VAE knows its ``mean_posterior_variance``, as trained models
                of this library do. Never images that an attacker may have changed.
            **options: further arguments of :class:`MCMCDefence`, which go before those above. A
                ``kernel`` made of one of this library gets the metric, if it is known and the
                kernel has none; its step size, length and burn-in are its own, those above are not
                used.

        Raises:
            ValueError: if the metric is not known and ``train_images`` is missing or empty, if it
                is given beside a ``kernel`` that has no use for it, or as :class:`MCMCDefence`.

        Example:
            >>> from pyro_vae_defence.models.pretrained import load_pretrained
            >>> from pyro_vae_defence.ops.balls import Linf
            >>> defence = MCMCDefence.recommended(load_pretrained("mnist_vae"), Linf(0.1))
            >>> defence(torch.rand(2, 1, 28, 28)).samples["z"].shape
            torch.Size([4, 10, 2, 64])
        """
        check_vae(vae)
        given = {"perturbation": ball, **RECOMMENDED_LENGTHS, **options}
        own = given.pop("kernel", None)
        takes_metric = own is None or _takes_metric(own)
        if train_images is not None and not takes_metric:
            name = setting(getattr(own, "func", own))
            raise ValueError(
                f"train_images are there for a metric, which kernel={name} does not take: "
                "it has one already, or is not made of a kernel of this library; leave them out"
            )
        metric = getattr(vae, "mean_posterior_variance", None)
        if train_images is not None:
            metric = mean_posterior_variance(vae, _batches(vae, train_images))
        if own is not None:
            if takes_metric and metric is not None:
                own = functools.partial(own, inverse_mass_matrix=metric)
            return cls(vae, own, **given)
        if metric is None:
            raise ValueError(
                "train_images is missing, and the VAE does not know its mean_posterior_variance: "
                "pass images it was trained on, e.g. MCMCDefence.recommended(vae, Linf(0.1), "
                "train_images)"
            )
        settings = dict(RECOMMENDED_KERNEL)
        if sum(value.numel() for value in metric.values()) == 1:
            settings["burn_in"] = 0  # its direction has nowhere to turn
        kernel = functools.partial(BatchedHMC, inverse_mass_matrix=metric, **settings)
        return cls(vae, kernel, **given)

    def start(self, vae: VAE, kernel: MCMCKernel) -> ChainStart:
        """Where chains start that a kernel runs on ``vae``, this one's with its conditions."""
        metric = kernel.inverse_mass_matrix if isinstance(kernel, BatchedKernel) else None
        return ChainStart(vae, self.initial, self.mode_steps, self.num_temperatures, metric)

    def lengths(self, kernel: MCMCKernel, start: ChainStart, seed: int) -> Lengths:
        """How many transitions a run of ``kernel`` with this seed makes, at most where chains may
        converge earlier. ``max_gradients`` cuts the kernels of this library alone.

        Raises:
            ValueError: if ``max_gradients`` leaves no transition.
        """
        lengths = Lengths(self.warmup_steps, self.num_samples, self.num_chains, self._kept_draws)
        if self.max_gradients is None or not isinstance(kernel, BatchedKernel):
            return lengths
        return lengths.within(self.max_gradients, start.num_gradients + 1, kernel, seed)

    @property
    def _fewest_draws(self) -> int:
        """Draws that every image has at least."""
        rule = self.until_converged
        return self.num_samples if rule is None else min(self.num_samples, rule.check_every)

    @property
    def _kept_draws(self) -> int:
        return self._fewest_draws if self.keep_draws is None else self.keep_draws

    def _run(self, vae: VAE, x: Tensor, streams: Streams) -> Chains:
        kernel = self.kernel(target(vae, self.perturbation))
        if not isinstance(kernel, MCMCKernel):
            raise ValueError(
                f"kernel must return an MCMCKernel for a Pyro model, it returned {kernel!r}"
            )
        start = self.start(vae, kernel)
        lengths = self.lengths(kernel, start, streams.seed)
        if not isinstance(kernel, BatchedKernel):
            if (self.max_gradients, self.until_converged, self.prepare) != (None, None, None):
                raise ValueError(
                    "max_gradients, until_converged and prepare need a kernel of this library, "
                    f"such as BatchedHMC; got {type(kernel).__name__}"
                )
            with torch.no_grad():
                run_on("vae.model", vae.model, x)  # on all images, before one after the other
            energy_of = functools.partial(potential, perturbation=self.perturbation)
            return run_one_by_one(self.kernel, energy_of, x, streams, start, lengths, self.progress)
        kernel.streams, kernel.prepare = streams, self.prepare
        chains = run_batched(kernel, x, start, lengths, self.until_converged, self.progress)
        self._why_not = kernel.why_not
        return chains

    def _settings(self) -> dict[str, Any]:
        kernel: Any = self.kernel
        options: dict[str, Any] = {}
        if isinstance(kernel, functools.partial):
            kernel, options = kernel.func, kernel.keywords
        known = {n: plain(v) for n, v in options.items()}
        named = {n: setting(v) for n, v in known.items() if isinstance(v, (int, float, str))}
        if _is_batched(kernel):
            given = options.get("inverse_mass_matrix") is not None
            named["inverse_mass_matrix"] = "diagonal" if given else "identity"
        apart = {"vae", "kernel", "batch_size", "progress"}
        return {
            "defence": "mcmc",
            "kernel": setting(kernel),
            **{f"kernel_{name}": value for name, value in named.items()},
            **{f.name: setting(getattr(self, f.name)) for f in fields(self) if f.name not in apart},
            "keep_draws": self._kept_draws,
            **({} if self._why_not is None else {"prepare_why_not": self._why_not}),
        }


def _is_batched(kernel: Any) -> bool:
    return isinstance(kernel, type) and issubclass(kernel, BatchedKernel)


def _takes_metric(kernel: Any) -> bool:
    """Whether a kernel is made of one of this library, and has no metric yet."""
    if isinstance(kernel, functools.partial):
        return _is_batched(kernel.func) and "inverse_mass_matrix" not in kernel.keywords
    return _is_batched(kernel)


def _batches(vae: VAE, images: Any) -> Iterator[Any]:
    """Batches of images, a dataset or a loader, on the device of the VAE's first parameter."""
    parameters = (p for network in networks_of(vae).values() for p in network.parameters())
    device = next((parameter.device for parameter in parameters), None)
    if isinstance(images, (Tensor, tuple)):
        x, conditions = split(images, "train_images")
        parts = [slice(first, first + _ROWS) for first in range(0, len(x), _ROWS)]
        images = [(x[rows], *rows_of(conditions, rows)) for rows in parts]
    elif isinstance(images, Dataset):
        images = DataLoader(images, batch_size=_ROWS)
    for batch in images:
        entries = batch if isinstance(batch, (tuple, list)) else (batch,)
        check_images(entries[0] if entries else batch, "train_images")
        yield tuple(e.to(device) if isinstance(e, Tensor) and device else e for e in entries)
