"""Attacks: what an attacker maximises (objectives) and how (one file per optimiser), apart."""

from pyro_vae_defence.attacks.apgd import APGD
from pyro_vae_defence.attacks.base import Attack, AttackResult, reaches
from pyro_vae_defence.attacks.blackbox import NES, Square
from pyro_vae_defence.attacks.lbfgs import LBFGS
from pyro_vae_defence.attacks.margin import RMargin, r_margin
from pyro_vae_defence.attacks.noise import random_noise
from pyro_vae_defence.attacks.objectives import (
    cross_entropy,
    dlr,
    forward_kl,
    maximum_damage,
    mean_distance,
    misclassified,
    reverse_kl,
    squared_wasserstein,
    symmetric_kl,
    targeted_output,
)
from pyro_vae_defence.attacks.pgd import PGD, MomentumPGD
from pyro_vae_defence.ops.balls import L1, L2, Linf

__all__ = [
    "APGD", "L1", "L2", "LBFGS", "NES", "PGD", "Attack", "AttackResult", "Linf", "MomentumPGD",
    "RMargin", "Square", "cross_entropy", "dlr", "forward_kl", "maximum_damage", "mean_distance",
    "misclassified", "r_margin", "random_noise", "reaches", "reverse_kl", "squared_wasserstein",
    "symmetric_kl", "targeted_output",
]  # fmt: skip
