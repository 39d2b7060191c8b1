"""Variational autoencoders as Pyro programs: train, attack, defend with MCMC, measure honestly."""

__version__ = "0.1.0.dev0"
