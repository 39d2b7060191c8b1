"""VAEs as Pyro programs, and what reads them."""

from pyro_vae_defence.models.conv import ConvVAE

__all__ = ["ConvVAE"]
