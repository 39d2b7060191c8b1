"""Chains that are kept where a defence reads the right class, or where it does not.

What the *evidence* attack of :mod:`pyro_vae_defence.attacks.adaptive` moves. A population starts at
latents of its set that explain the reference best, or would once it is attacked: their energy is
the defence's, in a ball larger by the attacker's radius. Candidates are encodings of all references
at hand and draws from the prior. From step to step it goes on by transitions of the defence's
metric, which are rejected where they leave the set. Its step sizes begin with the defence's and
follow the acceptance, by less and less: chains at the edge of their set need smaller ones. Where
modes of a set do not mix, their weights are those of the starts, not of their masses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae_defence.attacks.adaptive import Goal, Population
from pyro_vae_defence.mcmc import hmc
from pyro_vae_defence.mcmc.kernels import inverse_mass_like
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import Ball
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.robustness.whitebox import WhiteBox
from pyro_vae_defence.types import Latents

_ENCODINGS, _PRIOR_DRAWS = 64, 32  # most candidates of either kind
_TARGET, _GAIN = 0.7, 0.5  # acceptance, and the first change of the log step size per deviation
_NATS = 10.0  # above the best candidate where chains may start
_STEPS = 5  # of a trajectory, where the defence's kernel has no number of its own


@dataclass(eq=False)
class Constrained:
    """Populations of a defence, of which ``margin`` says where the classifier errs.

    Args:
        box: the defence.
        margin: what an attacker of the class maximises, for references given: positive where the
            class that is read is wrong.
        ball: the attacker's.
        num_chains: copies of the references, one for each chain.
        number: transitions per call, >= 1.
    """

    box: WhiteBox
    margin: Callable[[Tensor], Goal]
    ball: Ball
    num_chains: int
    number: int

    def right(self, x_ref: Tensor) -> Population:
        """Chains in the set that is read as the right class."""
        return self._population(x_ref, wrong=False)

    def wrong(self, x_ref: Tensor) -> Population:
        """Chains in the set of all other classes."""
        return self._population(x_ref, wrong=True)

    def _population(self, x_ref: Tensor, wrong: bool) -> Population:
        goal = self.margin(x_ref)
        kernel = self.box.kernel
        num_steps = int(getattr(kernel, "num_steps", _STEPS))
        size = x_ref.new_full((len(x_ref),), self.box.step_size)

        there = x_ref.new_zeros(len(x_ref), dtype=torch.bool)
        made = 0

        def population(
            x: Tensor, previous: Latents | None, streams: Streams
        ) -> tuple[Latents, Tensor]:
            nonlocal there, size, made
            if previous is None:
                previous, there = self.search(x_ref, wrong, streams)
            energy = functools.partial(self.box.energy, x)

            def inside(latents: Latents) -> Tensor:
                with torch.no_grad():
                    return (goal(latents, x) > 0) == wrong

            state = hmc.init(energy, previous)
            metric = inverse_mass_like(kernel.inverse_mass_matrix, state.position)
            for _ in range(self.number):
                state, info = hmc.step(energy, state, streams, size, num_steps, metric, inside)
                made += 1
                size = size * (_GAIN * made**-0.5 * (info.acceptance_rate - _TARGET)).exp()
            return state.position, there

        return population

    @torch.no_grad()
    def search(self, x_ref: Tensor, wrong: bool, streams: Streams) -> tuple[Latents, Tensor]:
        """Latents of the set, the best of each reference's candidates for its chains, and which
        rows have one."""
        images = len(x_ref) // self.num_chains
        x_ref = x_ref[:images]
        energy, goal = self.box.reachable(x_ref, self.ball), self.margin(x_ref)
        one = Streams(streams.seed, streams.image[:images], streams.chain[:images])
        encoded = self.box.start(x_ref, one)
        candidates = [
            lat.index(encoded, one.image.new_full((images,), k))
            for k in range(min(images, _ENCODINGS))
        ]
        # Further draws of an image's own encoding, and of the prior.
        draws = [self.box.start] * self.num_chains + [self.box.prior] * _PRIOR_DRAWS
        candidates += [
            draw(x_ref, one._replace(chain=one.chain + 1 + k)) for k, draw in enumerate(draws)
        ]
        candidates = [{name: each[name] for name in encoded} for each in candidates]
        energies = [
            torch.where((goal(each, x_ref) > 0) == wrong, energy(each), torch.inf)
            for each in candidates
        ]
        values, order = torch.stack(energies).sort(0)
        # Chains of one image start at different ones, but not far above the best.
        found = (values < values[0] + _NATS).sum(0)
        rank = torch.arange(self.num_chains, device=order.device)[:, None]
        rank = torch.minimum(rank, (found - 1).clamp(min=0))
        chosen = order.gather(0, rank)
        image = torch.arange(images, device=order.device).expand_as(chosen)
        stacked = {name: torch.stack([c[name] for c in candidates]) for name in encoded}
        latents = {name: v[chosen, image].flatten(0, 1) for name, v in stacked.items()}
        return latents, (found > 0).repeat(self.num_chains)
