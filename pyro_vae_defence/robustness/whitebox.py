"""What an attacker who knows a defence gets of it: its start, chain and energy; no score.

The gradients of ``attacks.adaptive`` are made from these parts. All latents are unconstrained.

Where the attacker knows the seed of a defence too, that is no random defence any more: whatever
noise is asked for, the parts use that which the defence will use, of the same image and chain.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence.attacks import adaptive
from pyro_vae_defence.attacks.adaptive import DefendedEncoder
from pyro_vae_defence.defence import (
    Defence,
    DefenceResult,
    EncoderDefence,
    MCMCDefence,
    NoDefence,
)
from pyro_vae_defence.defence.base import BaseDefence, run_defence
from pyro_vae_defence.defence.chains import Lengths
from pyro_vae_defence.defence.mode import PosteriorModeDefence
from pyro_vae_defence.defence.starts import ChainStart
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS, unrolled
from pyro_vae_defence.mcmc.adaptation import FixedStepSize
from pyro_vae_defence.mcmc.captured import find_graph
from pyro_vae_defence.mcmc.mode import search_mode
from pyro_vae_defence.models import program
from pyro_vae_defence.models.conditions import BoundProgram, BoundVAE, fold, rows_of, split, take
from pyro_vae_defence.models.program import ModelPotential
from pyro_vae_defence.models.tempered import tempered
from pyro_vae_defence.ops.balls import Ball
from pyro_vae_defence.ops.checks import RefusalError, check_finite
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import VAE, ImagesLike, Latents, LatentsLike, Potential

MODE_STEPS = PosteriorModeDefence.num_steps
"""How many steps a mode is searched with."""


def _make_kernel(
    defence: MCMCDefence, model: Callable[..., Any], counted: Callable[..., Any]
) -> Any:
    """The defence's kernel, with the gradients that the defence has it use.

    Its model is ``counted`` where it is run for each of them. Recorded gradients run it no more;
    they are counted without, and their model is the defence's, so that recordings serve both.
    """
    if defence.prepare is not None:
        kernel = defence.kernel(model)
        if isinstance(kernel, BatchedHMC):  # the number of whose gradients the host knows
            kernel.prepare = defence.prepare
            return kernel
    return defence.kernel(counted)


@dataclass(eq=False, repr=False)
class _CountedKernel(unrolled.UnrolledKernel):
    """One that counts the gradients which are no runs of the model, but of its recording."""

    evaluations: list[int] = field(default_factory=lambda: [0])

    def last(
        self, x: Tensor, start: LatentsLike, streams: Streams, number: int = 1
    ) -> list[Latents]:
        self.evaluations[0] += _uncounted(self.make_kernel(), x, streams, self.num_transitions)
        return super().last(x, start, streams, number)


def runs_as(defence: Any, kind: type[BaseDefence]) -> bool:
    """Whether runs of a defence are those of this class. One that derives from it may change them,
    such as the images that its chain sees; then only the whole run tells what it does."""
    names = ("__call__", "parts", "_defend", "_filter", "_run")
    own = all(getattr(type(defence), name, None) is getattr(kind, name) for name in names)
    return own and isinstance(defence, kind)


def _uncounted(kernel: Any, x: Tensor, streams: Streams, num_transitions: int) -> int:
    """Gradients of a run on ``x`` that are no runs of the model, but of its recording."""
    if kernel.prepare is None:
        return 0
    per_row = (kernel.gradients_of(streams.seed, step) for step in range(num_transitions))
    return x.shape[0] * (1 + sum(per_row))


class WhiteBox:
    """A defence as its attacker sees it; called, it runs the defence.

    Where the defence has recorded or captured gradients (its ``prepare``), chains that are run
    forwards have them too; what is differentiated twice has not.

    Args:
        vae: any Pyro VAE; a conditional one bound to its conditions (``program.at_images``).
        defence: what is attacked, anything that maps images to a ``DefenceResult``.
        x: images ``(N, C, H, W)`` on which :attr:`step_size` is found.
        fresh: returns a generator where that needs a seed; torch's global seed by default.
        conditions: of ``x``, which the defence is given too.
        seed: that of the generator with which the defence is called on images ``x``, if the
            attacker knows it.

    Attributes:
        seed: see above.
        num_chains: chains of the defence per image.
        draws: how many of the last draws of each chain count where the seed is known; see
            :meth:`drawn`.
        shape: of an image.
        has_chain: whether anything stands before or behind the encoder.
        steps: whether its transitions are known: this library's HMC or NUTS, in a defence that runs
            as :class:`~pyro_vae_defence.defence.MCMCDefence` does.
        stops: whether chains stop when those of an image have converged, as the defence decides.
        unrollable: whether the whole chain is: such transitions, as many in every run, without a
            burn-in or a search for their start before them.
        decoder: latents on the support of their sites to images.
    """

    def __init__(
        self,
        vae: VAE,
        defence: Defence,
        x: Tensor,
        fresh: Callable[[], torch.Generator | None] = lambda: None,
        conditions: tuple[Tensor, ...] = (),
        seed: int | None = None,
    ) -> None:
        self.vae, self.defence, self.seed = vae, defence, seed
        self.num_chains = int(getattr(defence, "num_chains", 1))
        self.shape = tuple(x.shape[1:])
        self.has_chain = not runs_as(defence, NoDefence)
        self._conditions, self._x, self._fresh = conditions, x, fresh
        self._inverse_temperature = 1.0
        self.draws = 1
        self._evaluations = [0]  # shared with the boxes of some rows
        self._read()
        kernel = self._make_kernel()
        # A kernel that derives from one of these may step otherwise.
        known = getattr(type(kernel), "_step", None) in (BatchedHMC._step, BatchedNUTS._step)
        self.steps = known and runs_as(defence, MCMCDefence)
        searched = getattr(defence, "initial", None) in ("mode", "annealed")
        # All chains of an image decide together when they stop.
        self.stops = getattr(defence, "until_converged", None) is not None
        self.unrollable = self.steps and kernel.burn_in == 0 and not searched and not self.stops

    def _read(self) -> None:
        """What hinges on the conditions of the images."""
        defence = self.defence
        self._target: Any = self.vae.model
        if isinstance(defence, (MCMCDefence, PosteriorModeDefence)):
            self._target = program.target(self.vae, defence.perturbation)
        self._build()

    def _build(self) -> None:
        """What hinges on the target of the chain, or of a surrogate's."""
        defence, model = self.defence, self._target
        if self._inverse_temperature < 1:
            model = tempered(model, self._inverse_temperature)
        counted = self._counted(model)
        self.decoder = program.Decoder(self.vae, self._x)
        self._potential = ModelPotential(counted, self._x)
        self._make_kernel: Callable[[], Any] = lambda: None
        self._own_start: Callable[[Tensor, Streams], Latents] | None = None
        if isinstance(defence, MCMCDefence):
            self._make_kernel = functools.partial(_make_kernel, defence, model, counted)
            if defence.initial not in ("guide", "mean"):
                own = defence.start(self.vae, defence.kernel(model))
                energy, prepare = ModelPotential(model, self._x), find_graph(defence.prepare)
                energy = energy if prepare is None else prepare(energy)
                self._own_start = functools.partial(self._begin, own, energy)

    def _begin(
        self, own: ChainStart, energy: ModelPotential, x: Tensor, streams: Streams
    ) -> Latents:
        """Where chains start that do not at the encoding, without derivative."""
        self._evaluations[0] += len(x) * own.num_gradients
        return own(x.detach(), energy.at(x.detach()), streams)

    def _counted(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The model, whose rows are counted as evaluations."""
        written = model.program if isinstance(model, BoundProgram) else model

        def count(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._evaluations[0] += x.shape[0]
            return written(x, *args, **kwargs)

        return model.around(count) if isinstance(model, BoundProgram) else count

    def at(self, rows: slice) -> WhiteBox:
        """The box of the images at ``rows``."""
        bound = isinstance(self.vae, BoundVAE)
        if not bound and self.seed is None:
            return self
        other = copy.copy(self)
        other.vae, other._x = take(self.vae, rows) if bound else self.vae, self._x[rows]
        other._conditions = rows_of(self._conditions, rows)
        if self.steps:
            other.__dict__["step_size"] = self.step_size
        other._read()
        return other

    def tempered(self, inverse_temperature: float) -> WhiteBox:
        """The box of a surrogate: the transitions, chain and energy of a defence that :attr:`steps`
        with the likelihood of its target to this power, in (0, 1]
        (:mod:`pyro_vae_defence.models.tempered`). The defence stays what it is."""
        other = copy.copy(self)
        other._inverse_temperature = inverse_temperature
        other.__dict__.pop("step_size", None)
        other._build()
        return other

    def drawn(self) -> WhiteBox:
        """The box for readings of all draws that a run with the known seed keeps, and not only of
        the last of each chain. Streams then number draws, chain after chain, in as many copies of
        the rows as there are, and a chain runs once."""
        other = copy.copy(self)
        other.draws = self._kept
        return other

    @functools.cached_property
    def _kept(self) -> int:
        """Draws of each chain that the defence keeps; of one that is no chain, or stops by what it
        sees, the whole run has to tell."""
        if runs_as(self.defence, MCMCDefence) and not self.stops:
            made = self._lengths(self._make_kernel(), draw_seed(self._generator()))
            return min(made.keep_draws, made.num_samples)
        return next(iter(self(self._x).samples.values())).shape[1]

    @property
    def evaluations(self) -> int:
        """Rows that the model has run on so far, those of an unknown defence by its gradients."""
        return self._evaluations[0]

    def state(self) -> dict[str, Any]:
        """What running it has changed: numbers, for :meth:`restore`."""
        return {"evaluations": self.evaluations, "step_size": self.__dict__.get("step_size")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be as another box of this defence and these images was, whose :meth:`state` this is."""
        self._evaluations[0] = state["evaluations"]
        if state["step_size"] is not None:
            self.__dict__["step_size"] = state["step_size"]

    def __call__(self, x: ImagesLike, generator: torch.Generator | None = None) -> DefenceResult:
        """Run the defence on images ``(M, C, H, W)``: all, copy after copy, or with conditions.

        With a known seed every copy is defended by that seed.
        """
        images, conditions = split(x)
        if self.seed is not None:
            copies = images.split(len(self._x))
            own = self._conditions
            return DefenceResult.join([
                self._answer((each, *own) if own else each, self._generator()) for each in copies
            ])  # fmt: skip
        conditions = conditions or tuple(fold(value, len(images)) for value in self._conditions)
        every = (images, *conditions) if conditions else images
        return self._answer(every, generator)

    def _answer(self, x: ImagesLike, generator: torch.Generator | None) -> DefenceResult:
        """A run of the defence, which may leave no image out: attackers would keep away from it."""
        found = run_defence(self.defence, x, generator)
        for name, value in found.latents.items():
            check_finite(
                f"latents[{name!r}] of the defence",
                value,
                "answer every image, be it by the encoding without a defence",
            )
        return found

    def _filter(self, x: Tensor) -> Tensor:
        """What the defence looks at in place of images, as far as it is known."""
        return self.defence._filter(x) if isinstance(self.defence, BaseDefence) else x

    def look(self, x: Tensor) -> Tensor:
        """The images that the defence looks at in place of ``x``, with the derivative of its
        filter, and that of the identity in pixels for which this is zero, or not known (BPDA)."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._filter(x.detach())
        leaf = x.detach().requires_grad_()
        try:
            seen = self._filter(leaf)
        except RuntimeError:  # it leaves torch
            seen = self._filter(x.detach())
        if seen is leaf:  # there is no filter
            return x
        found = seen.detach() + (x - x.detach())

        def pull_back(gradient: Tensor) -> Tensor:
            (own,) = torch.autograd.grad(
                seen, leaf, gradient, retain_graph=True, materialize_grads=True
            )
            return torch.where(own.isfinite() & (own != 0), own, gradient)

        if seen.requires_grad:
            found.register_hook(pull_back)
        return found

    def start(self, x: Tensor, streams: Streams) -> Latents:
        """The :meth:`encoding` of what the defence looks at. Chains that do not start there have a
        start of their own, from which :meth:`chain` runs."""
        return self.encoding(self.look(x), streams)

    def encoding(self, x: Tensor, streams: Streams) -> Latents:
        """The encoding, differentiable in the images: a draw of the guide, or for chains that start
        at its mean the mean."""
        mean = isinstance(self.defence, MCMCDefence) and self.defence.initial == "mean"
        initial = "mean" if mean else "guide"
        drawn = program.initial_latents(self.vae, x, initial, self._known(streams))
        return self._potential.at(x).unconstrain(drawn)

    def energy(self, x: Tensor, latents: Latents) -> Tensor:
        """U(z; x) of the defence's target, ``(M,)``, in nats."""
        return self._potential.at(x)(latents)

    def reachable(self, x: Tensor, ball: Ball) -> Potential:
        """The energy that a latent has after the attack in ``ball`` that serves it best: the
        target's in a ball larger by its radius; at the image as it is where that is not known."""
        assumed = getattr(self.defence, "perturbation", None)
        if assumed is None or isinstance(assumed, type(ball)):
            wide = ball if assumed is None else ball.wider(assumed.radius)
            try:
                energy = ModelPotential(self._counted(program.target(self.vae, wide)), x)
                energy(energy.prototype)
                return energy
            except RefusalError:
                pass
        return functools.partial(self.energy, x)

    def prior(self, x: Tensor, streams: Streams) -> Latents:
        """A draw from p(z) per image."""
        return self._potential.at(x).prior(streams)

    @property
    def kernel(self) -> Any:
        """The defence's kernel, for its settings."""
        return self._make_kernel()

    def constrain(self, latents: Latents) -> Latents:
        """Latents on the support of each site, as classifiers read them."""
        return self._potential.constrain(latents)

    def unconstrain(self, latents: Latents) -> Latents:
        """The inverse of :meth:`constrain`."""
        return self._potential.unconstrain(latents)

    def decode(self, latents: Latents, x: Tensor) -> Tensor:
        """Reconstructions ``(M, C, H, W)`` of images ``x`` from their latents, in [0, 1] as those
        of the defence."""
        return self.decode_support(self.constrain(latents), x).clamp(0.0, 1.0)

    def decode_support(self, latents: Latents, x: Tensor) -> Tensor:
        """Mean images of latents on the support of their sites; ``x`` tells of discrete ones."""
        return self.decoder(latents, self.look(x))

    def forwards(self) -> DefendedEncoder:
        """The defence run forwards, with the derivative of its start."""
        if self.has_chain:
            return adaptive.bpda(self.start, self.chain)
        return adaptive.transfer(self.start)

    def chain(self, x: Tensor, start: Latents, streams: Streams) -> Latents:
        """Where the defence ends; differentiable if unrollable. Chains that do not start at the
        encoding, those that stop when they have converged, and other defences, start by themselves.
        """
        surrogate = self._inverse_temperature < 1
        if self.steps and (surrogate or not self.stops):
            known = self._known(streams)
            x, start = self._once(x), {name: self._once(value) for name, value in start.items()}
            streams = Streams(known.seed, self._once(known.image), self._once(known.chain))
            if self._own_start is not None:
                start = self._own_start(x, streams)
            if self.unrollable:
                last = self._whole(streams.seed).last(x, start, streams, self.draws)
            else:
                last = self._run(self._make_kernel(), x, start, streams)
            return self._every(last)
        # Rows of every draw are copies of the same images, which one run has all draws of.
        x = x[: len(x) // (self.num_chains * self.draws)] if self.draws > 1 else x
        result = self(x.detach(), torch.Generator().manual_seed(streams.seed % 2**63))
        self._evaluations[0] += int(result.num_gradients.sum())
        return self.unconstrain(self._ends(result, streams))

    def _ends(self, result: DefenceResult, streams: Streams) -> Latents:
        """Where a run ends; of a known seed each row's own draw of its own chain."""
        if self.seed is None or self.num_chains * self.draws == 1:
            return result.latents
        chain = streams.chain // self.draws % self.num_chains
        place = streams.chain % self.draws - self.draws
        image = torch.arange(len(chain), device=chain.device) % len(result.x)
        return {name: value[chain, place, image] for name, value in result.samples.items()}

    def _once(self, value: Tensor) -> Tensor:
        """Of rows of every draw those of every chain."""
        if self.draws == 1:
            return value
        return value.unflatten(0, (self.num_chains, self.draws, -1))[:, 0].flatten(0, 1)

    def _every(self, last: list[Latents]) -> Latents:
        """Rows of every draw, where those of every chain were after its last transitions."""
        if self.draws == 1:
            return last[-1]
        chains = [{n: v.unflatten(0, (self.num_chains, -1)) for n, v in z.items()} for z in last]
        return {n: torch.stack([z[n] for z in chains], 1).flatten(0, 2) for n in last[-1]}

    def mode(self, x: Tensor, start: Latents, streams: Streams) -> Latents:
        """Where a :class:`~pyro_vae_defence.defence.PosteriorModeDefence` of the same target ends
        from ``start``, without derivative."""
        return search_mode(self._potential.at(x), start, num_steps=MODE_STEPS)[0]

    def transitions(self, number: int, step_size: float | None = None) -> unrolled.UnrolledKernel:
        """``number`` >= 1 transitions of a defence that :attr:`steps`, to go on with where a chain
        ended; its burn-in is over by then.

        The ``step_size`` is kept throughout; it is :attr:`step_size` when ``None``.
        """

        def make() -> Any:
            kernel = self._make_kernel()
            kernel.burn_in = 0
            kernel.rule = FixedStepSize()
            kernel.step_size = self.step_size if step_size is None else step_size
            return kernel

        return _CountedKernel(make, self.energy, number, evaluations=self._evaluations)

    @functools.cached_property
    def step_size(self) -> float:
        """The step size that a defence that :attr:`steps` arrives at, median over images."""
        x, kernel = self._x, self._make_kernel()
        streams = Streams.create(len(x), generator=self._fresh(), device=x.device)
        with torch.no_grad():
            start = (self._own_start or self.start)(x, streams)
        self._run(kernel, x, start, streams)
        return float(kernel.info.step_size.median())

    def _generator(self) -> torch.Generator:
        assert self.seed is not None
        return torch.Generator().manual_seed(self.seed)

    def _known(self, streams: Streams) -> Streams:
        """The defence's own noise in place of ``streams``, if it is known: rows are copies of all
        images, and draws are those of its chains, in turn."""
        if self.seed is None:
            return streams
        chain = streams.chain // self.draws
        if runs_as(self.defence, EncoderDefence):  # whose every draw is a chain of its own
            last = self.defence.num_samples - self.draws  # type: ignore[attr-defined]
            chain = last + streams.chain % self.draws
        return Streams(draw_seed(self._generator()), streams.image % len(self._x), chain)

    def _run(self, kernel: Any, x: Tensor, start: Latents, streams: Streams) -> list[Latents]:
        """Where whole chains are after their last transitions, as many as there are :attr:`draws`;
        burn-in included, without derivatives."""
        total, warmup_steps = self._numbers(kernel, streams.seed)
        self._evaluations[0] += _uncounted(kernel, x, streams, total)
        return unrolled.run(kernel, x, start, streams, total, warmup_steps, self.draws)

    def _whole(self, seed: int) -> unrolled.UnrolledKernel:
        """The chains of a run with this seed, which decides how many gradients a transition has."""
        numbers = self._numbers(self._make_kernel(), seed)
        counter = self._evaluations
        return _CountedKernel(self._make_kernel, self.energy, *numbers, evaluations=counter)

    def _numbers(self, kernel: Any, seed: int) -> tuple[int, int]:
        """Transitions in all, as many as the defence makes, and how many of them adapt."""
        made = self._lengths(kernel, seed)
        return made.warmup_steps + made.num_samples, made.warmup_steps

    def _lengths(self, kernel: Any, seed: int) -> Lengths:
        """Those of a run of the defence with this seed."""
        defence: Any = self.defence
        made: Lengths = defence.lengths(kernel, defence.start(self.vae, kernel), seed)
        return made
