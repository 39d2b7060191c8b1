"""Defences: what runs between the encoder and whatever uses its latents."""

from pyro_vae_defence.defence.mcmc import DefenceResult, KernelFactory, MCMCDefence, NoDefence
from pyro_vae_defence.defence.mode import PosteriorModeDefence
from pyro_vae_defence.defence.radius import (
    RadiusChoice,
    calibrate_radius,
    choose_radius,
    radius_probabilities,
    scores_by_radius,
)

__all__ = [
    "DefenceResult",
    "KernelFactory",
    "MCMCDefence",
    "NoDefence",
    "PosteriorModeDefence",
    "RadiusChoice",
    "calibrate_radius",
    "choose_radius",
    "radius_probabilities",
    "scores_by_radius",
]
