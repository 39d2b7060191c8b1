"""Tensor arithmetic that knows no model: balls, divergences, latents as dicts, random streams."""
