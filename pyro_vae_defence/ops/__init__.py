"""What knows no model: balls, divergences, latents as dicts, random streams, checks, files."""
