"""Training objectives: each is a Pyro ELBO with one overridden hook, for ``pyro.infer.SVI``."""

from pyro_vae_defence.objectives.avae import AVAE, AVAESS, SEAVAE
from pyro_vae_defence.objectives.elbo import BetaELBO, ImageELBO, Schedule, linear_schedule
from pyro_vae_defence.objectives.margin import MassMargin
from pyro_vae_defence.objectives.nvae import NVAEObjective
from pyro_vae_defence.objectives.smooth_encoder import SE
from pyro_vae_defence.objectives.tcvae import BetaTCVAE

__all__ = [
    "AVAE",
    "AVAESS",
    "SE",
    "SEAVAE",
    "BetaELBO",
    "BetaTCVAE",
    "ImageELBO",
    "MassMargin",
    "NVAEObjective",
    "Schedule",
    "linear_schedule",
]
