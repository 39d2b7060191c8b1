"""Hamiltonian and Langevin kernels that run one independent chain per image in one tensor
program."""

from pyro_vae_defence.mcmc.samplers import (
    BatchedGHMC,
    BatchedHMC,
    BatchedMALA,
    BatchedMAMS,
    BatchedNUTS,
    BatchedULA,
)

__all__ = ["BatchedGHMC", "BatchedHMC", "BatchedMALA", "BatchedMAMS", "BatchedNUTS", "BatchedULA"]
