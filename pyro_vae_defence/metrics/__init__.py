"""Scores of images, latents and models: pure functions, one value per image or per set of them."""

from pyro_vae_defence.metrics.accuracy import adversarial_accuracy, correct
from pyro_vae_defence.metrics.detection import auroc, detection_interval, fpr_at_tpr, rate_interval
from pyro_vae_defence.metrics.evidence import ais_log_weights, nll, simulate
from pyro_vae_defence.metrics.frechet import fid, frechet, frechet_distance
from pyro_vae_defence.metrics.images import MS_SSIM_VARIANTS, metric_name, ms_ssim, mse, ssim
from pyro_vae_defence.metrics.intervals import Interval, bootstrap_interval
from pyro_vae_defence.metrics.latents import active_units
from pyro_vae_defence.metrics.likelihood import (
    Transition,
    ais,
    importance_nll,
    log_mean_exp,
    sigmoid_schedule,
)
from pyro_vae_defence.metrics.posterior_ratio import KSTest, ks_test, log_posterior_ratio

__all__ = [
    "MS_SSIM_VARIANTS", "Interval", "KSTest", "Transition", "active_units", "adversarial_accuracy",
    "ais", "ais_log_weights", "auroc", "bootstrap_interval", "correct", "detection_interval", "fid",
    "fpr_at_tpr", "frechet", "frechet_distance", "importance_nll", "ks_test", "log_mean_exp",
    "log_posterior_ratio", "metric_name", "ms_ssim", "mse", "nll", "rate_interval",
    "sigmoid_schedule", "simulate", "ssim",
]  # fmt: skip
