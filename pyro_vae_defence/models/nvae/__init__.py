"""NVAE, a deep hierarchical VAE, as Pyro programs, with a reader for official checkpoints."""

from .config import PUBLISHED, NVAEConfig
from .nvae import NVAE

__all__ = ["NVAE", "PUBLISHED", "NVAEConfig"]
