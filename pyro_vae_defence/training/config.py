"""How to train, what comes of it, and how it fails."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal, get_args

from pyro_vae_defence.ops.checks import check_flag, check_integer, check_positive, plain
from pyro_vae_defence.types import Latents

LearningRateSchedule = Literal["plateau", "one_cycle", "constant"]
Precision = Literal["float32", "bfloat16"]


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN; weights and statistics are those before that step."""


class NonFiniteImagesError(NonFiniteLossError, ValueError):
    """Images hold NaN or infinite values, so that no loss was computed; nothing has changed."""


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
            training ends with (:mod:`pyro_vae_defence.training.averaging`); ``None`` for no
            average.
        precision: ``"bfloat16"`` computes layers of float32 weights in bfloat16; weights,
            distributions and losses stay in float32, validation too
            (:mod:`pyro_vae_defence.training.acceleration`).
        compile: compile the module's children with ``torch.compile`` while training.
        posterior_variance: whether to measure :attr:`FitResult.mean_posterior_variance` at the end.
        checkpoint_every: steps between checkpoints within an epoch; ``None``: at epoch ends only.
        progress: show a progress bar.
        name: what is trained, e.g. ``"mnist beta=1 seed=0"``; a checkpoint of another name is
            refused. It stands for the objective and the loader of a resumed run, of which only the
            number of batches can be compared.
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
        check_integer("patience", self.patience, 0)
        check_positive("learning_rate", self.learning_rate)
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        if self.checkpoint_every is not None:
            check_integer("checkpoint_every", self.checkpoint_every)
        for name in ("compile", "posterior_variance", "progress"):
            check_flag(name, getattr(self, name))
        ema, factor = self.ema_decay, self.factor
        schedules, precisions = get_args(LearningRateSchedule), get_args(Precision)
        allowed = {
            "schedule": (self.schedule in schedules, "be 'plateau', 'one_cycle' or 'constant',"),
            "factor": (_is_share(factor), "lie in (0, 1),"),
            "ema_decay": (
                ema is None or _is_share(ema),
                "lie in (0, 1), or be None for no average;",
            ),
            "precision": (self.precision in precisions, "be 'float32' or 'bfloat16',"),
            "name": (isinstance(self.name, str), "be text,"),
        }
        for name, (holds, rule) in allowed.items():
            if not holds:
                raise ValueError(f"{name} must {rule} got {getattr(self, name)!r}")
        for entry in fields(self):
            object.__setattr__(self, entry.name, plain(getattr(self, entry.name)))


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and 0 < float(value) < 1


@dataclass(frozen=True)
class FitResult:
    """What training measured.

    Attributes:
        history: one dict per epoch: ``epoch``, ``train_loss`` and, with validation data,
            ``validation_loss`` (the objective) and ``validation_nelbo`` (-ELBO at beta = 1, also of
            programs that scale their sites by themselves), all in nats per image;
            ``learning_rate`` and ``seconds``. There is no ``validation_nelbo`` of programs that
            :class:`~pyro_vae_defence.objectives.BetaELBO` is not for, such as those with a discrete
            latent.
        steps: optimiser steps made in all.
        mean_posterior_variance: the guide's variance, averaged over the images of the training
            loader, site name -> one image's shape: a metric for chains that no attacker can move.
            Measured for a VAE that has an attribute of this name, which is set too; else ``None``.
    """

    history: list[dict[str, float]]
    steps: int
    mean_posterior_variance: Latents | None = None
