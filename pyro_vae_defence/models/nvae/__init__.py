"""NVAE, a deep hierarchical VAE, as Pyro programs, with a reader for official checkpoints."""

from pyro_vae_defence.models.nvae.checkpoint import (
    from_official,
    load_official,
    load_safetensors,
    save_safetensors,
)
from pyro_vae_defence.models.nvae.config import PUBLISHED, NVAEConfig
from pyro_vae_defence.models.nvae.noncentred import NonCentredNVAE
from pyro_vae_defence.models.nvae.nvae import NVAE

__all__ = [
    "NVAE",
    "PUBLISHED",
    "NVAEConfig",
    "NonCentredNVAE",
    "from_official",
    "load_official",
    "load_safetensors",
    "save_safetensors",
]
