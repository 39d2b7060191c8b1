"""Defences: what runs between the encoder and whatever uses its latents."""

from pyro_vae_defence.defence.convergence import Convergence, ConvergenceRule
from pyro_vae_defence.defence.mcmc import DefenceResult, KernelFactory, MCMCDefence, NoDefence

__all__ = [
    "Convergence",
    "ConvergenceRule",
    "DefenceResult",
    "KernelFactory",
    "MCMCDefence",
    "NoDefence",
]
