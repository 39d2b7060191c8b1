"""Hamiltonian kernels that run one independent chain per image in one tensor program."""

from pyro_vae_defence.mcmc.kernels import BatchedHMC, BatchedNUTS

__all__ = ["BatchedHMC", "BatchedNUTS"]
