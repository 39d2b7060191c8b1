"""How much of a defence the strongest of many attacks leaves."""

from pyro_vae_defence.robustness.budget import Budget
from pyro_vae_defence.robustness.checks import CHECKS
from pyro_vae_defence.robustness.evaluate import evaluate_robustness
from pyro_vae_defence.robustness.fidelity import Fidelity
from pyro_vae_defence.robustness.mass import MassBound, mass_bound
from pyro_vae_defence.robustness.paired import Difference, paired_difference
from pyro_vae_defence.robustness.published import (
    Rescored,
    load_attacked,
    rescore,
    save_attacked,
)
from pyro_vae_defence.robustness.report import AttackOutcome, Check, RobustnessReport
from pyro_vae_defence.robustness.suite import ATTACKS, KNOWLEDGE
from pyro_vae_defence.robustness.whitebox import WhiteBox

__all__ = [
    "ATTACKS", "CHECKS", "KNOWLEDGE", "AttackOutcome", "Budget", "Check", "Difference", "Fidelity",
    "MassBound", "Rescored", "RobustnessReport", "WhiteBox", "evaluate_robustness",
    "load_attacked", "mass_bound", "paired_difference", "rescore", "save_attacked",
]  # fmt: skip
