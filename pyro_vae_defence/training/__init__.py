"""Stochastic variational inference: :func:`fit` trains any Pyro VAE with any Pyro ELBO."""

from pyro_vae_defence.ops.files import atomic_save
from pyro_vae_defence.training.config import FitConfig, FitResult, NonFiniteLossError
from pyro_vae_defence.training.loop import evaluate, fit

__all__ = ["FitConfig", "FitResult", "NonFiniteLossError", "atomic_save", "evaluate", "fit"]
