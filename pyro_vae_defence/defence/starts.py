r"""Where chains start: at the encoding of the image, or where no attacker has led the encoder.

*Annealed* starts are walks from the prior to the target :math:`e^{-U}`. A walk begins at a draw
of :math:`p(z)` and makes one Hamiltonian transition at each of the densities

.. math:: \pi_b(z) \propto p(z)^{1-b}\, e^{-b\,U(z; x)}, \qquad 0 < b_1 < \dots < b_{K-1} < 1,

between them (:mod:`pyro_vae_defence.mcmc.annealed`). It ends one temperature before the target,
where the chain goes on. It knows the image by U alone: an attacker who wants it elsewhere has to
change the posterior, and not the encoder.

The walks of an image are independent of each other, and nothing is drawn anew. Weights, by which
sequential Monte Carlo would, correct what a walk did not reach at temperatures that change too
fast; the chain that follows leaves the target invariant and corrects that as well. With a few
chains per image, drawing anew would make copies of one of them, and chains that share their start
cannot tell a second mode. Without weights each walk may adapt its step size, too. What remains of
the start, as of any, is in which mode a chain of finite length ends.

The scales on which a walk moves lie between the prior's, known by draws of it, and the kernel's:
their inverses are interpolated. The walk of a row has noise of its own, other than the chain's.

Neal, "Annealed importance sampling", 2001, https://arxiv.org/abs/physics/9803008.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pyro_vae_defence.mcmc import annealed
from pyro_vae_defence.mcmc.kernels import inverse_mass_like
from pyro_vae_defence.mcmc.mode import search_mode
from pyro_vae_defence.metrics.likelihood import sigmoid_schedule
from pyro_vae_defence.models.program import ModelPotential, in_guide_order, initial_latents
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import VAE, Latents, LatentsLike

Initial = Literal["guide", "mean", "prior", "mode", "annealed"]
INITIALS: tuple[Initial, ...] = get_args(Initial)

_NUM_STEPS = 4  # leapfrog steps of a transition
_STEP_SIZE = 0.4  # of the first one, in units of its scales
_PRIOR_DRAWS = 16  # of each row, which tell the prior's scales
# Seeds of walks, clear of those of chains, which have 62 bits.
_WALKS = 2**63


def walk_gradients(num_temperatures: int) -> int:
    """Gradients of the energy that a walk of so many temperatures takes."""
    return (num_temperatures - 1) * _NUM_STEPS + 1


class ChainStart(NamedTuple):
    """Where the chains of a VAE start.

    Attributes:
        vae, initial, mode_steps, num_temperatures: as of
            :class:`~pyro_vae_defence.defence.MCMCDefence`.
        inverse_mass: diagonal of the kernel's inverse mass matrix; the identity when ``None``.
    """

    vae: VAE
    initial: Initial
    mode_steps: int
    num_temperatures: int
    inverse_mass: LatentsLike | None

    @property
    def num_gradients(self) -> int:
        """Gradients of the energy it takes per chain."""
        if self.initial == "annealed":
            return walk_gradients(self.num_temperatures)
        return self.mode_steps + 1 if self.initial == "mode" else 0

    def __call__(self, x: Tensor, energy: ModelPotential, streams: Streams) -> Latents:
        """Unconstrained latents, one row for each of ``x``, without derivative."""
        if self.initial == "annealed":
            return in_guide_order(self.vae, x, self._anneal(energy, streams))
        drawn_from = "guide" if self.initial == "mode" else self.initial
        with torch.no_grad():
            drawn = initial_latents(self.vae, x, drawn_from, streams)
            start = lat.detach(energy.unconstrain(drawn))
        if self.initial == "mode":
            start, _ = search_mode(energy, start, num_steps=self.mode_steps)
        return start

    def _anneal(self, energy: ModelPotential, streams: Streams) -> Latents:
        seeds = [(streams.seed + _WALKS + k) % 2**64 for k in range(1 + _PRIOR_DRAWS)]
        start, *draws = (energy.prior(streams._replace(seed=seed)) for seed in seeds)
        smallest = {name: torch.finfo(value.dtype).tiny for name, value in start.items()}
        of_prior = {
            name: torch.stack([draw[name] for draw in draws]).var(0).clamp(min=smallest[name])
            for name in start
        }
        at_target = inverse_mass_like(self.inverse_mass, start)

        def scales(b: float) -> Latents:
            return {
                name: 1 / ((1 - b) / value + b / (1.0 if at_target is None else at_target[name]))
                for name, value in of_prior.items()
            }

        schedule = sigmoid_schedule(self.num_temperatures)
        first = next(iter(start.values()))
        step_sizes = first.new_full((len(schedule) - 2,), _STEP_SIZE)
        walks = annealed.walk(
            energy,
            energy.prior_energy,
            start,
            1,  # of a row: rows are independent
            schedule,
            streams._replace(seed=seeds[0]),
            step_sizes,
            _NUM_STEPS,
            scales,
            tune=True,
        )
        return walks.end.position
