"""What the attacker maximises: between posteriors, between outputs, on a classifier of latents; and
Table 1."""

from pyro_vae_defence.attacks.objectives.classifiers import cross_entropy, dlr, misclassified
from pyro_vae_defence.attacks.objectives.outputs import maximum_damage, targeted_output
from pyro_vae_defence.attacks.objectives.posteriors import (
    forward_kl,
    mean_distance,
    reverse_kl,
    squared_wasserstein,
    symmetric_kl,
)
from pyro_vae_defence.attacks.objectives.table import TABLE_1, Table1Row, table_1

__all__ = [
    "TABLE_1",
    "Table1Row",
    "cross_entropy",
    "dlr",
    "forward_kl",
    "maximum_damage",
    "mean_distance",
    "misclassified",
    "reverse_kl",
    "squared_wasserstein",
    "symmetric_kl",
    "table_1",
    "targeted_output",
]
