"""Named experiments that combine the library's parts: ``python -m pyro_vae_defence.experiments
--help``."""
