r"""The posterior mode as a defence: optimisation in place of sampling (appendix B.3 of the paper).

:class:`PosteriorModeDefence` minimises the same energies that
:class:`~pyro_vae_defence.defence.MCMCDefence` samples,

.. math:: z^* = \arg\min_z U(z; x^a), \qquad U = -\log p(x^a \mid z) - \log p(z),

or their perturbation-aware variants. It is cheaper than a chain and gives one point; a mode need
not look like the posterior's bulk, whose distance from it grows with the number of latents.

Reference: Kuzina, Welling, Tomczak, NeurIPS 2022, https://arxiv.org/abs/2203.09940.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae_defence.defence.base import BaseDefence
from pyro_vae_defence.defence.result import Chains, setting
from pyro_vae_defence.mcmc.mode import search_mode, search_mode_lbfgs
from pyro_vae_defence.models.perturbation import Perturbation
from pyro_vae_defence.models.program import initial_latents, potential, target
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.checks import check_integer, check_positive
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import VAE

_STARTS = ("guide", "mean", "prior")


@dataclass(eq=False, repr=False)
class PosteriorModeDefence(BaseDefence):
    """Descend from the encoding of x to the mode of p(x | z)p(z) (appendix B.3 of the paper).

    The mode is that of the density on the unconstrained scale; for latents on all of R these are
    the same.

    Args:
        optimiser: ``"adam"`` or ``"lbfgs"``; either treats every image by itself.
        num_steps: gradient evaluations after the first, >= 0.
        learning_rate: of Adam, > 0, falling linearly to zero; L-BFGS has a line search instead.
        initial: where the search starts: ``"guide"``, a draw from q(z | x); ``"mean"``, the guide's
            mean, which makes the defence deterministic; or ``"prior"``.
        perturbation: perturbations the defender assumes, as for
            :class:`~pyro_vae_defence.defence.MCMCDefence`.

    A result holds one "draw" of one chain per image; its only statistic is ``lp``, minus the energy
    in nats. Results do not depend on ``batch_size``.
    """

    optimiser: Literal["adam", "lbfgs"] = "adam"
    num_steps: int = 50
    learning_rate: float = 0.3
    _: KW_ONLY
    initial: Literal["guide", "mean", "prior"] = "guide"
    perturbation: Perturbation | None = None

    def _check(self) -> None:
        super()._check()
        target(self.vae, self.perturbation)  # checks it
        if self.optimiser not in ("adam", "lbfgs"):
            raise ValueError(f"optimiser must be 'adam' or 'lbfgs', got {self.optimiser!r}")
        if self.initial not in _STARTS:
            raise ValueError(f"initial must be one of {_STARTS}, got {self.initial!r}")
        check_integer("num_steps", self.num_steps, 0)
        check_positive("learning_rate", self.learning_rate)

    def _run(self, vae: VAE, x: Tensor, streams: Streams) -> Chains:
        energy = potential(vae, x, self.perturbation)
        with torch.no_grad():
            initial = initial_latents(vae, x, self.initial, streams)
            start = lat.detach(energy.unconstrain(initial))
        energy.check(start)
        if self.optimiser == "adam":
            mode, gradients = search_mode(
                energy, start, num_steps=self.num_steps, learning_rate=self.learning_rate
            )
        else:
            mode, gradients = search_mode_lbfgs(energy, start, num_steps=self.num_steps)
        with torch.no_grad():
            found, log_prob = energy.constrain(mode), -energy(mode)
        return Chains(
            {name: value[None] for name, value in initial.items()},
            {name: value[None, None] for name, value in found.items()},
            {"lp": log_prob[None, None]},
            gradients,
        )

    def _settings(self) -> dict[str, Any]:
        adam = {"learning_rate": self.learning_rate} if self.optimiser == "adam" else {}
        return {
            "defence": "mode",
            "optimiser": self.optimiser,
            "num_steps": self.num_steps,
            **adam,
            "initial": self.initial,
            "perturbation": setting(self.perturbation),
        }
