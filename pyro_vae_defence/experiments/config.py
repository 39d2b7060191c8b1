"""Frozen configurations of experiments; unknown keys fail, defaults are stated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ObjectiveName = Literal["beta", "beta_tcvae", "se", "avae", "se_avae", "avae_ss"]


@dataclass(frozen=True)
class TrainConfig:
    """How a named model is trained.

    The paper trains for 300 epochs with a plateau rule; the one-cycle schedule reaches a comparable
    likelihood in a tenth of that, which is what these models can afford.

    Args:
        dataset: name for :func:`pyro_vae_defence.data.load`.
        objective: which objective of :mod:`pyro_vae_defence.objectives`.
        beta: weight of the KL (``beta``) or total correlation (``beta_tcvae``) term.
        estimator: minibatch estimator of the total correlation.
        radius: L_inf radius of SE's perturbations.
        gamma: SE's coupling strength.
        rho: AVAE's correlation (Cemgil et al. 2020).
        epochs: passes over the training set.
        learning_rate: peak learning rate of the one-cycle schedule.
        schedule: see :class:`pyro_vae_defence.training.FitConfig`.
        batch_size: images per step.
        images_per_epoch: images drawn per epoch; all of them when ``None``.
        seed: seed of initialisation, order and noise.
    """

    dataset: str
    objective: ObjectiveName = "beta"
    beta: float = 1.0
    estimator: Literal["mws", "mss", "published"] = "mws"
    radius: float = 0.1
    gamma: float = 1.0
    rho: float = 0.975
    epochs: int = 12
    learning_rate: float = 2e-3
    schedule: Literal["plateau", "one_cycle", "constant"] = "one_cycle"
    batch_size: int = 128
    images_per_epoch: int | None = None
    seed: int = 0
