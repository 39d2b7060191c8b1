"""VAEs as Pyro programs, and what reads them."""

from pyro_vae_defence.models.conditional import ConditionalVAE
from pyro_vae_defence.models.conv import ConvVAE
from pyro_vae_defence.models.nvae import NVAE
from pyro_vae_defence.models.pretrained import load_pretrained

__all__ = ["NVAE", "ConditionalVAE", "ConvVAE", "load_pretrained"]
