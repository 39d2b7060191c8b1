"""Defences: what runs between the encoder and whatever uses its latents."""

from pyro_vae_defence.defence.base import BaseDefence, Defence
from pyro_vae_defence.defence.classifier import READINGS, DefendedClassifier, Reading, read_latents
from pyro_vae_defence.defence.controls import (
    EncoderDefence,
    NoDefence,
    clip_dark_pixels,
    clip_extreme_pixels,
    gaussian_filter,
    median_filter,
)
from pyro_vae_defence.defence.convergence import Convergence, ConvergenceRule
from pyro_vae_defence.defence.detection import anomaly_scores, detection_scores
from pyro_vae_defence.defence.detector import DetectionReport, Detector
from pyro_vae_defence.defence.foreign import KernelFactory
from pyro_vae_defence.defence.mcmc import MCMCDefence
from pyro_vae_defence.defence.mode import PosteriorModeDefence
from pyro_vae_defence.defence.radius import (
    RadiusChoice,
    calibrate_radius,
    choose_radius,
    radius_probabilities,
    scores_by_radius,
)
from pyro_vae_defence.defence.result import DefenceResult
from pyro_vae_defence.defence.synthesis import AnalysisBySynthesis, ClassMasses, MarginBound

__all__ = [
    "READINGS",
    "AnalysisBySynthesis",
    "BaseDefence",
    "ClassMasses",
    "Convergence",
    "ConvergenceRule",
    "Defence",
    "DefenceResult",
    "DefendedClassifier",
    "DetectionReport",
    "Detector",
    "EncoderDefence",
    "KernelFactory",
    "MCMCDefence",
    "MarginBound",
    "NoDefence",
    "PosteriorModeDefence",
    "RadiusChoice",
    "Reading",
    "anomaly_scores",
    "calibrate_radius",
    "choose_radius",
    "clip_dark_pixels",
    "clip_extreme_pixels",
    "detection_scores",
    "gaussian_filter",
    "median_filter",
    "radius_probabilities",
    "read_latents",
    "scores_by_radius",
]
