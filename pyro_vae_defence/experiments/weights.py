"""What experiments read of trained models."""

from __future__ import annotations

import os

from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.pretrained import WeightCard, load_card, load_pretrained


def load_conv_vae(
    model: str, directory: str | os.PathLike[str] | None = None
) -> tuple[ConvVAE, WeightCard]:
    """A trained VAE without latent groups, and its card.

    Args:
        model: its name.
        directory: of weights and cards; the packaged ones when ``None``.

    Raises:
        ValueError: for a name that is unknown or of another architecture, or damaged weights.
    """
    vae = load_pretrained(model, directory)
    if not isinstance(vae, ConvVAE):
        raise ValueError(f"model must be a ConvVAE, {model!r} is a {type(vae).__name__}")
    return vae, load_card(model, directory)
