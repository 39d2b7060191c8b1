"""How to train, what comes of it, and how it fails."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.types import Latents

LearningRateSchedule = Literal["plateau", "one_cycle", "constant"]
Precision = Literal["float32", "bfloat16"]


class NonFiniteLossError(RuntimeError):
    """The training loss became infinite or NaN; the weights are those before that step."""


@dataclass(frozen=True)
class FitConfig:
    """How to train; the defaults are the paper's.

    Args:
        epochs: passes over the training set, >= 1.
        learning_rate: Adam's learning rate; the peak one of the one-cycle schedule. > 0.
        schedule: ``"plateau"`` halves on a stagnant validation loss (the paper), ``"one_cycle"``
            rises and falls once over all steps, ``"constant"``.
        factor: factor of the plateau rule, in (0, 1).
        patience: epochs without improvement the plateau rule waits for.
        clip_norm: largest norm, over all parameters together, of the gradient of a batch's loss (a
            sum over its images); a longer one is shortened to it. > 0, or ``None`` for no limit.
        ema_decay: decay, in (0, 1), of the moving average of the weights that validation sees and
            training ends with (:mod:`pyro_vae_defence.training.averaging`); ``None`` keeps the
            weights themselves.
        precision: ``"bfloat16"`` computes layers of float32 weights in bfloat16; weights,
            distributions and losses stay in float32, validation too
            (:mod:`pyro_vae_defence.training.acceleration`).
        compile: compile the module's children with ``torch.compile`` while training.
        posterior_variance: whether to measure :attr:`FitResult.mean_posterior_variance` at the end.
        checkpoint_every: steps between checkpoints within an epoch; ``None`` saves at epoch ends
            only.
        progress: show a progress bar.
        name: what is trained, e.g. ``"mnist beta=1 seed=0"``; a checkpoint of another name is
            refused. The objective and the loader of a resumed run cannot be compared, their name
            can.
    """

    epochs: int = 300
    learning_rate: float = 5e-4
    schedule: LearningRateSchedule = "plateau"
    factor: float = 0.5
    patience: int = 10
    clip_norm: float | None = None
    ema_decay: float | None = None
    precision: Precision = "float32"
    compile: bool = False
    posterior_variance: bool = True
    checkpoint_every: int | None = None
    progress: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}")
        if self.schedule not in ("plateau", "one_cycle", "constant"):
            raise ValueError(
                f"schedule must be 'plateau', 'one_cycle' or 'constant', got {self.schedule!r}"
            )
        if not 0 < self.factor < 1:
            raise ValueError(f"factor must lie in (0, 1), got {self.factor!r}")
        if self.patience < 0:
            raise ValueError(f"patience must be at least 0, got {self.patience!r}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(
                f"clip_norm must be positive, or None for no limit; got {self.clip_norm!r}"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"ema_decay must lie in (0, 1), or be None for no average; got {self.ema_decay!r}"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {self.checkpoint_every!r}")


@dataclass(frozen=True)
class FitResult:
    """What training measured.

    Attributes:
        history: one dict per epoch: ``epoch``, ``train_loss`` and, with validation data,
            ``validation_loss`` (the objective) and ``validation_nelbo`` (-ELBO at beta = 1), all in
            nats per image; ``learning_rate`` and ``seconds``.
        steps: optimiser steps made in all.
        mean_posterior_variance: the guide's variance, averaged over the images of the training
            loader, site name -> one image's shape: a metric for chains that no attacker can move.
            Measured for a VAE that has an attribute of this name, which is set too; else ``None``.
    """

    history: list[dict[str, float]]
    steps: int
    mean_posterior_variance: Latents | None = None
