"""Every optimiser of attacks, quick, for tests that are the same for all of them."""

from __future__ import annotations

import functools

from pyro_vae_defence import attacks

OPTIMISERS = {
    "PGD": attacks.PGD,
    "PGD-paper": functools.partial(attacks.PGD, preset="paper"),
    "MomentumPGD": attacks.MomentumPGD,
    "APGD": attacks.APGD,
    "LBFGS": functools.partial(attacks.LBFGS, inner_steps=2),
    "Square": attacks.Square,
    "NES": functools.partial(attacks.NES, num_directions=2),
}
