"""What the attacker maximises: between posteriors, between outputs, on a classifier of latents."""

from pyro_vae_defence.attacks.objectives.classifiers import cross_entropy, dlr, misclassified
from pyro_vae_defence.attacks.objectives.outputs import maximum_damage, targeted_output
from pyro_vae_defence.attacks.objectives.posteriors import (
    forward_kl,
    mean_distance,
    reverse_kl,
    squared_wasserstein,
    symmetric_kl,
)

__all__ = [
    "cross_entropy", "dlr", "forward_kl", "maximum_damage", "mean_distance", "misclassified",
    "reverse_kl", "squared_wasserstein", "symmetric_kl", "targeted_output",
]  # fmt: skip
