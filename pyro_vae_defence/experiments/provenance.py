"""Where a result comes from; the functions of :mod:`pyro_vae_defence.ops.provenance`."""

from pyro_vae_defence.ops.provenance import commit, provenance

__all__ = ["commit", "provenance"]
