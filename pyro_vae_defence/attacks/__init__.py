"""Attacks: what an attacker maximises (objectives) and how (engines), apart."""

from pyro_vae_defence.attacks.noise import random_noise
from pyro_vae_defence.attacks.objectives import squared_wasserstein, symmetric_kl
from pyro_vae_defence.attacks.pgd import PGD, AttackResult

__all__ = ["PGD", "AttackResult", "random_noise", "squared_wasserstein", "symmetric_kl"]
