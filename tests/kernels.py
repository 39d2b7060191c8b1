"""The kernels under test: a new one is its step, its class, and one entry of :data:`KERNELS`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from pyro_vae_defence.mcmc import (
    BatchedGHMC,
    BatchedHMC,
    BatchedMALA,
    BatchedMAMS,
    BatchedNUTS,
    BatchedULA,
    hmc,
)
from pyro_vae_defence.mcmc.kernels import BatchedKernel


class Truth(NamedTuple):
    """Chains long enough for their moments to be compared with known ones.

    Attributes:
        warmup_steps: transitions from a start off the target, during which step sizes adapt.
        num_samples: draws after them.
        ess: how many independent draws each chain must be worth on average: 2.5 of them in each of
            400 rows put 5 standard errors of a mean at 0.16 standard deviations.
        options: the kernel's own.
        seeds: how often that is done.
    """

    warmup_steps: int
    num_samples: int
    ess: float
    options: dict[str, Any] = {}
    seeds: tuple[int, ...] = (0,)


class Thinned(NamedTuple):
    """Chains of which every ``thinning``-th draw is kept, until draws are all but independent."""

    warmup_steps: int
    thinning: int
    options: dict[str, Any] = {}


class Kernel(NamedTuple):
    """How a kernel is tested.

    Attributes:
        kind: its class.
        options: settings for the many small runs that every kernel has to pass.
        targets: chains on targets with known moments; ``None`` for a kernel that is biased.
        posterior: chains on Pyro models with known posteriors, where these are tested too.
        calibration: chains for simulation-based calibration.
    """

    kind: Callable[..., Any]
    options: dict[str, Any] = {}
    targets: Truth | None = None
    posterior: Truth | None = None
    calibration: Thinned | None = None


KERNELS = {
    "hmc": Kernel(
        BatchedHMC,
        {"num_steps": 4},
        targets=Truth(150, 60, 10.0, {"num_steps": 6}, seeds=(0, 1, 2)),
        posterior=Truth(100, 30, 5.0, {"num_steps": 4}, seeds=(0, 1, 2)),
        calibration=Thinned(60, 4, {"num_steps": 5}),
    ),
    "nuts": Kernel(
        BatchedNUTS,
        {"max_tree_depth": 5},
        targets=Truth(40, 20, 2.5, {"step_size": 0.3, "max_tree_depth": 4}, seeds=(0, 1, 2)),
        posterior=Truth(30, 10, 2.0, {"max_tree_depth": 4}, seeds=(0, 1, 2)),
        calibration=Thinned(30, 5, {"max_tree_depth": 4}),
    ),
    "mala": Kernel(BatchedMALA, targets=Truth(400, 300, 2.5), calibration=Thinned(200, 25)),
    "ghmc": Kernel(
        BatchedGHMC,
        {"num_steps": 2},
        # More rejections than by default, each of which turns the momentum.
        targets=Truth(300, 200, 2.5, {"target_accept_prob": 0.7}),
        calibration=Thinned(150, 15, {"persistence": 0.7}),
    ),
    "mams": Kernel(
        BatchedMAMS,
        {"num_steps": 4},
        targets=Truth(150, 60, 2.5, {"num_steps": 6, "target_accept_prob": 0.8}),
        calibration=Thinned(60, 4, {"num_steps": 5}),
    ),
    "ula": Kernel(BatchedULA),
}


def _asking(potential, state, streams, step_size, inverse_mass=None):
    num_steps = 1 if bool(state.energy.sum() > 1e9) else 2
    return hmc.step(potential, state, streams, step_size, num_steps, inverse_mass)


class AskingKernel(BatchedKernel):
    """HMC that asks the host how many steps it takes, and so is not captured."""

    def _step(self, num_gradients):
        return _asking


EXACT = [name for name, kernel in KERNELS.items() if kernel.targets is not None]

FACTORIES: dict[str, Callable[..., Any]] = {
    **{name: functools.partial(k.kind, **k.options) for name, k in KERNELS.items()},
    # Settings that are wired differently and have to pass the same.
    "hmc-paper": functools.partial(BatchedHMC, preset="paper"),
    "hmc-fixed": functools.partial(BatchedHMC, num_steps=3, jitter=0.0, adapt_step_size=False),
    "burn-in": functools.partial(BatchedHMC, num_steps=4, burn_in=10),
}
"""Name -> what makes a kernel, with small settings, from a model or ``potential_fn=``."""

UNCOUPLED = [name for name in FACTORIES if name != "hmc-paper"]
"""All but the one setting that couples the images of a batch."""
