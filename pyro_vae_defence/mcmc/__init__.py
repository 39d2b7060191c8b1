"""Hamiltonian and Langevin kernels that run one independent chain per image, all in a batch."""

from pyro_vae_defence.mcmc.samplers import (
    BatchedGHMC,
    BatchedHMC,
    BatchedMALA,
    BatchedMAMS,
    BatchedNUTS,
    BatchedULA,
)

__all__ = ["BatchedGHMC", "BatchedHMC", "BatchedMALA", "BatchedMAMS", "BatchedNUTS", "BatchedULA"]
