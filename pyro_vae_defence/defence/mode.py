r"""The posterior mode as a defence: optimisation in place of sampling (appendix B.3 of the paper).

:class:`PosteriorModeDefence` minimises the same energies that
:class:`~pyro_vae_defence.defence.MCMCDefence` samples,

.. math:: z^* = \arg\min_z U(z; x^a), \qquad U = -\log p(x^a \mid z) - \log p(z),

or their perturbation-aware variants. It is cheaper than a chain and gives one point; a mode need
not look like the posterior's bulk, whose distance from it grows with the number of latents.

Reference: Kuzina, Welling, Tomczak, "Alleviating Adversarial Attacks on Variational Autoencoders
with MCMC", NeurIPS 2022, https://arxiv.org/abs/2203.09940.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae_defence.defence.mcmc import DefenceResult
from pyro_vae_defence.mcmc.mode import search_mode, search_mode_lbfgs
from pyro_vae_defence.models.perturbation import Perturbation
from pyro_vae_defence.models.program import (
    check_images,
    check_vae,
    decode,
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

_STARTS = ("guide", "mean", "prior")


class PosteriorModeDefence:
    """Descend from the encoding of x to the mode of p(x | z)p(z) (appendix B.3 of the paper).

    The mode is that of the density on the unconstrained scale; for latents on all of R these are
    the same.

    Args:
        vae: any Pyro VAE.
        optimiser: ``"adam"`` or ``"lbfgs"``; either treats every image by itself.
        num_steps: gradient evaluations after the first, >= 0.
        learning_rate: of Adam, > 0, falling linearly to zero; L-BFGS has a line search instead.
        initial: where the search starts: ``"guide"``, a draw from q(z | x); ``"mean"``, the guide's
            mean, which makes the defence deterministic; or ``"prior"``.
        perturbation: perturbations the defender assumes, as for
            :class:`~pyro_vae_defence.defence.MCMCDefence`.
        batch_size: most images at a time; results do not depend on it.

    Raises:
        ValueError: if an argument is out of range, or images are not in [0, 1].
    """

    def __init__(
        self,
        vae: VAE,
        optimiser: Literal["adam", "lbfgs"] = "adam",
        num_steps: int = 50,
        learning_rate: float = 0.3,
        *,
        initial: Literal["guide", "mean", "prior"] = "guide",
        perturbation: Perturbation | None = None,
        batch_size: int = 4096,
    ) -> None:
        self.vae = check_vae(vae)
        target(vae, perturbation)
        if optimiser not in ("adam", "lbfgs"):
            raise ValueError(f"optimiser must be 'adam' or 'lbfgs', got {optimiser!r}")
        if initial not in _STARTS:
            raise ValueError(f"initial must be one of {_STARTS}, got {initial!r}")
        check_integer("num_steps", num_steps, 0)
        check_integer("batch_size", batch_size)
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {learning_rate!r}")
        self.optimiser = optimiser
        self.num_steps = num_steps
        self.learning_rate = learning_rate
        self.initial = initial
        self.perturbation = perturbation
        self.batch_size = batch_size

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Latents:
        """Latents of images ``(N, C, H, W)`` after the defence: site -> ``(N, *event)``."""
        return self(x, generator).latents

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> DefenceResult:
        """Encode images ``(N, C, H, W)`` in [0, 1], descend and decode.

        Args:
            x: images, possibly attacked.
            generator: source of the seed for the start; torch's global seed when ``None``.

        Returns:
            One "draw" of one chain per image; its only statistic is ``lp``, minus the energy in
            nats.
        """
        check_images(x)
        started = time.perf_counter()
        seed = draw_seed(generator)
        with evaluation_mode(self.vae):
            parts = [
                self._search(x[first : first + self.batch_size], seed, first)
                for first in range(0, x.shape[0], self.batch_size)
            ]
            latents = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
            initial = {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}
            log_prob = torch.cat([part[2] for part in parts])
            gradients = torch.cat([part[3] for part in parts])
            with torch.no_grad():
                reconstruction = decode(self.vae, latents, tuple(x.shape[1:]))
            site = observation_site(self.vae.model, x)
        return DefenceResult(
            latents,
            reconstruction,
            {name: value[None, None] for name, value in latents.items()},
            {"lp": log_prob[None, None]},
            {name: value[None] for name, value in initial.items()},
            x,
            gradients,
            time.perf_counter() - started,
            site,
            self._settings(),
        )

    def _search(
        self, x: Tensor, seed: int, first_image: int
    ) -> tuple[Latents, Latents, Tensor, Tensor]:
        streams = Streams.create(x.shape[0], seed=seed, first_image=first_image, device=x.device)
        energy = potential(self.vae, x, self.perturbation)
        with torch.no_grad():
            initial = initial_latents(self.vae, x, self.initial, streams)
            start = lat.detach(energy.unconstrain(initial))
        energy.check(start)
        if self.optimiser == "adam":
            mode, gradients = search_mode(
                energy, start, num_steps=self.num_steps, learning_rate=self.learning_rate
            )
        else:
            mode, gradients = search_mode_lbfgs(energy, start, num_steps=self.num_steps)
        with torch.no_grad():
            return energy.constrain(mode), initial, -energy(mode), gradients

    def _settings(self) -> dict[str, Any]:
        adam = {"learning_rate": self.learning_rate} if self.optimiser == "adam" else {}
        return {
            "defence": "mode",
            "optimiser": self.optimiser,
            "num_steps": self.num_steps,
            **adam,
            "initial": self.initial,
            "perturbation": str(self.perturbation),
        }
