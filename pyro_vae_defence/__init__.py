"""Variational autoencoders as Pyro programs: train, attack, defend with MCMC, measure honestly.

Subpackages, and the balls ``Linf``, ``L2`` and ``L1``, are attributes that are imported when they
are first asked for: ``import pyro_vae_defence as pvd`` costs nothing, and ``pvd.attacks.PGD`` needs
no further import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_BALLS = ("L1", "L2", "Linf")
_MODULES = (
    "attacks", "data", "defence", "diagnostics", "experiments", "mcmc", "metrics", "models",
    "objectives", "ops", "plots", "robustness", "training", "types",
)  # fmt: skip

if TYPE_CHECKING:
    from pyro_vae_defence import attacks as attacks
    from pyro_vae_defence import data as data
    from pyro_vae_defence import defence as defence
    from pyro_vae_defence import diagnostics as diagnostics
    from pyro_vae_defence import experiments as experiments
    from pyro_vae_defence import mcmc as mcmc
    from pyro_vae_defence import metrics as metrics
    from pyro_vae_defence import models as models
    from pyro_vae_defence import objectives as objectives
    from pyro_vae_defence import ops as ops
    from pyro_vae_defence import plots as plots
    from pyro_vae_defence import robustness as robustness
    from pyro_vae_defence import training as training
    from pyro_vae_defence import types as types
    from pyro_vae_defence.ops.balls import L1 as L1
    from pyro_vae_defence.ops.balls import L2 as L2
    from pyro_vae_defence.ops.balls import Linf as Linf
else:  # hidden from type checkers, to whom a misspelt name is an error

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name in _BALLS:
            return getattr(importlib.import_module(f"{__name__}.ops.balls"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_BALLS, *_MODULES})
