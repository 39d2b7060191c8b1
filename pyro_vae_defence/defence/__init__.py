"""Defences: what runs between the encoder and whatever uses its latents."""

from pyro_vae_defence.defence.classifier import (
    READINGS,
    Defence,
    DefendedClassifier,
    Reading,
    read_latents,
)
from pyro_vae_defence.defence.controls import (
    EncoderDefence,
    clip_dark_pixels,
    clip_extreme_pixels,
    gaussian_filter,
    median_filter,
)
from pyro_vae_defence.defence.detection import detection_scores
from pyro_vae_defence.defence.mcmc import DefenceResult, KernelFactory, MCMCDefence, NoDefence

__all__ = [
    "READINGS",
    "Defence",
    "DefenceResult",
    "DefendedClassifier",
    "EncoderDefence",
    "KernelFactory",
    "MCMCDefence",
    "NoDefence",
    "Reading",
    "clip_dark_pixels",
    "clip_extreme_pixels",
    "detection_scores",
    "gaussian_filter",
    "median_filter",
    "read_latents",
]
