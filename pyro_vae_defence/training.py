r"""Stochastic variational inference: :func:`fit` trains any Pyro VAE with any Pyro ELBO.

One step is what ``pyro.infer.SVI.step`` does: ``objective.loss_and_grads(model, guide, x)`` under a
capture of the parameters it touches, then one step of the optimiser. The optimiser is a single
``torch.optim.Adam`` over all of them, so that schedules, checkpoints and resumption see everything.

Defaults are the paper's (appendix D.1): Adam at 5e-4, halved when the validation loss has not fallen for
10 epochs, 300 epochs.

Reference: Kingma, Ba, "Adam", ICLR 2015, https://arxiv.org/abs/1412.6980; Smith, Topin,
"Super-convergence", 2018, https://arxiv.org/abs/1708.07120 (the one-cycle schedule).
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_vae_defence.models.program import check_images, check_vae, evaluation_mode
from pyro_vae_defence.types import VAE

Schedule = Literal["plateau", "one_cycle", "constant"]

_FORMAT = 1


class NonFiniteLossError(RuntimeError):
    """The training loss became infinite or NaN; the weights are those before that step."""


@dataclass(frozen=True)
class FitConfig:
    """How to train; the defaults are the paper's.

    Args:
        epochs: passes over the training set, >= 1.
        learning_rate: Adam's learning rate; the peak one of the one-cycle schedule. > 0.
        schedule: ``"plateau"`` halves on a stagnant validation loss (the paper), ``"one_cycle"`` rises
            and falls once over all steps, ``"constant"``.
        factor: factor of the plateau rule, in (0, 1).
        patience: epochs without improvement the plateau rule waits for.
        checkpoint_every: steps between checkpoints within an epoch; ``None`` saves at epoch ends only.
        progress: show a progress bar.
    """

    epochs: int = 300
    learning_rate: float = 5e-4
    schedule: Schedule = "plateau"
    factor: float = 0.5
    patience: int = 10
    checkpoint_every: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.epochs, int) and self.epochs >= 1):
            raise ValueError(f"epochs must be an integer of at least 1, got {self.epochs!r}")
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
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {self.checkpoint_every!r}")


@dataclass(frozen=True)
class FitResult:
    """What training measured.

    Attributes:
        history: one dict per epoch: ``epoch``, ``train_loss`` and, with validation data,
            ``validation_loss`` (the objective) and ``validation_nelbo`` (-ELBO at beta = 1), all in nats
            per image; ``learning_rate`` and ``seconds``.
        steps: optimiser steps made in all.
    """

    history: list[dict[str, float]]
    steps: int


def fit(
    vae: VAE,
    objective: Any,
    loader: Iterable[Any],
    config: FitConfig | None = None,
    *,
    validation: Iterable[Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> FitResult:
    """Train ``vae`` by stochastic variational inference; its parameters change in place.

    With ``checkpoint`` the run is resumed from that file when it exists, and continues exactly where it
    stood: on the same machine and number of threads the weights equal those of an uninterrupted run.
    Exact resumption needs a loader whose order depends on torch's global seed, or on its own
    ``generator`` attribute, alone (``torch.utils.data.DataLoader`` does).

    Args:
        vae: any Pyro VAE. An ``nn.Module`` is trained in train mode and left in eval mode.
        objective: a Pyro ELBO, e.g. ``pyro.infer.Trace_ELBO()`` or one of
            :mod:`pyro_vae_defence.objectives`.
        loader: batches of images ``(B, C, H, W)`` in [0, 1], or tuples that start with one.
        config: see :class:`FitConfig`.
        validation: batches to validate on after each epoch. The plateau rule needs it.
        checkpoint: file written after every epoch, atomically; parent directories are made.
        on_epoch: called with each new entry of the history.

    Raises:
        ValueError: if an argument does not fit, or the checkpoint belongs to another configuration.
        NonFiniteLossError: as soon as a loss is not finite; the last checkpoint stays.
    """
    check_vae(vae)
    if not isinstance(objective, ELBO):
        raise ValueError(
            f"objective must be a Pyro ELBO such as pyro.infer.Trace_ELBO(), got {objective!r}"
        )
    config = FitConfig() if config is None else config
    if config.schedule == "plateau" and validation is None:
        raise ValueError(
            "schedule='plateau' watches the validation loss: pass validation=..., "
            "or choose schedule='one_cycle' or 'constant'"
        )
    run = _Run(vae, objective, loader, config, validation)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        run.load(path)

    bar = tqdm(total=config.epochs, initial=run.epoch, disable=not config.progress, unit="epoch")
    with bar:
        while run.epoch < config.epochs:
            entry = run.train_epoch(path)
            if path is not None:
                run.save(path)
            shown = {k: f"{v:.2f}" for k, v in entry.items() if k.endswith(("loss", "nelbo"))}
            bar.set_postfix(shown)
            bar.update()
            if on_epoch is not None:
                on_epoch(entry)
    if isinstance(vae, nn.Module):
        vae.eval()
    return FitResult(list(run.history), run.steps)


def evaluate(
    vae: VAE, objective: Any, loader: Iterable[Any], *, max_images: int | None = None
) -> float:
    """Mean loss of ``objective`` per image, in nats; no parameter changes."""
    total, count = 0.0, 0
    with torch.no_grad(), evaluation_mode(vae):
        for x in _images(loader):
            total += float(objective.loss(vae.model, vae.guide, x))
            count += x.shape[0]
            if max_images is not None and count >= max_images:
                break
    if count == 0:
        raise ValueError("the loader is empty; pass at least one batch")
    return total / count


def atomic_save(contents: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` to a temporary name beside ``path``, then rename: never a half-written file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _images(loader: Iterable[Any]) -> Iterator[Tensor]:
    for batch in loader:
        yield batch[0] if isinstance(batch, (tuple, list)) else batch


class _Run:
    """The state of a training run, everything of which goes into a checkpoint."""

    def __init__(
        self,
        vae: VAE,
        objective: Any,
        loader: Iterable[Any],
        config: FitConfig,
        validation: Iterable[Any] | None,
    ) -> None:
        self.vae = vae
        self.objective = objective
        self.loader = loader
        self.config = config
        self.validation = validation
        self.epoch = 0
        self.steps = 0
        self.history: list[dict[str, float]] = []
        # Position inside an unfinished epoch: batches done, their summed loss, images seen.
        self.batch = 0
        self.loss_sum = 0.0
        self.seen = 0
        self.parameters: dict[str, Tensor] = {}
        self.optimiser: torch.optim.Optimizer | None = None
        self.scheduler: Any = None
        self._resume_rng: dict[str, Any] | None = None
        self._epoch_rng: dict[str, Any] = {}

    # --- Training ---

    def train_epoch(self, path: Path | None) -> dict[str, float]:
        started = time.perf_counter()
        if isinstance(self.vae, nn.Module):
            self.vae.train()
        resumed_at = self.batch
        if resumed_at:
            # The order of an epoch was drawn from the generators as they stood at its start.
            self._set_rng(self._epoch_rng)
        else:
            self._epoch_rng = self._get_rng()
        for number, x in enumerate(_images(self.loader)):
            if number < resumed_at:
                continue
            if number == resumed_at and self._resume_rng is not None:
                self._set_rng(self._resume_rng)
                self._resume_rng = None
            if self.steps == 0 and number == 0:
                check_images(x, "loader's first batch")
            self._step(x)
            self.batch = number + 1
            every = self.config.checkpoint_every
            if path is not None and every is not None and self.steps % every == 0:
                self.save(path)
        if self.seen == 0:
            raise ValueError("loader is empty; pass at least one batch")
        entry = {"epoch": float(self.epoch + 1), "train_loss": self.loss_sum / self.seen}
        assert self.optimiser is not None
        entry["learning_rate"] = float(self.optimiser.param_groups[0]["lr"])
        if self.validation is not None:
            entry["validation_loss"] = evaluate(self.vae, self.objective, self.validation)
            entry["validation_nelbo"] = evaluate(self.vae, TraceMeanField_ELBO(), self.validation)
        if self.config.schedule == "plateau":
            self.scheduler.step(entry["validation_loss"])
        entry["seconds"] = time.perf_counter() - started
        self.epoch += 1
        self.batch, self.loss_sum, self.seen = 0, 0.0, 0
        self.history.append(entry)
        return entry

    def _step(self, x: Tensor) -> None:
        if self.optimiser is not None:
            self.optimiser.zero_grad()
        with poutine.trace(param_only=True) as capture:
            loss = float(self.objective.loss_and_grads(self.vae.model, self.vae.guide, x))
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is {loss} at epoch {self.epoch + 1}, step {self.steps + 1} (learning "
                f"rate {self.config.learning_rate:g}); lower the learning rate, or look for "
                "non-finite images or a degenerate likelihood"
            )
        if self.optimiser is None:
            self._make_optimiser(capture.trace)
        assert self.optimiser is not None
        self.optimiser.step()
        if self.config.schedule == "one_cycle":
            self.scheduler.step()
        self.steps += 1
        self.loss_sum += loss
        self.seen += x.shape[0]

    def _make_optimiser(self, trace: poutine.Trace) -> None:
        nodes: dict[str, Any] = trace.nodes
        self.parameters = {name: site["value"].unconstrained() for name, site in nodes.items()}
        if not self.parameters:
            raise ValueError(
                "no parameter was seen in model or guide; register modules with pyro.module(...) "
                "inside the programs, or derive them from pyro.nn.PyroModule"
            )
        self._check_all_registered()
        config = self.config
        self.optimiser = torch.optim.Adam(
            [p for p in self.parameters.values() if p.requires_grad], lr=config.learning_rate
        )
        if config.schedule == "plateau":
            self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
                self.optimiser, factor=config.factor, patience=config.patience
            )
        elif config.schedule == "one_cycle":
            if not isinstance(self.loader, Sized):
                raise ValueError("schedule='one_cycle' needs a loader with a length")
            self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
                self.optimiser,
                max_lr=config.learning_rate,
                total_steps=config.epochs * len(self.loader),
                cycle_momentum=False,
            )

    def _check_all_registered(self) -> None:
        """Refuse a module parameter that has a gradient but that Pyro does not know."""
        if not isinstance(self.vae, nn.Module):
            return
        known = {id(parameter) for parameter in self.parameters.values()}
        missing = [
            name
            for name, parameter in self.vae.named_parameters()
            if parameter.grad is not None and id(parameter) not in known
        ]
        if missing:
            raise ValueError(
                f"parameters {missing} would not be trained: they have a gradient, but model and "
                "guide do not register these very tensors. Call pyro.module(...) on their modules; "
                "call pyro.clear_param_store() first if another VAE of this process has used the same "
                "names; and keep parameters contiguous (Pyro's parameter store copies others)"
            )

    # --- Checkpoints ---

    def save(self, path: Path) -> None:
        assert self.optimiser is not None
        atomic_save(
            {
                "format": _FORMAT,
                "config": dataclasses.asdict(self.config),
                "epoch": self.epoch,
                "steps": self.steps,
                "batch": self.batch,
                "loss_sum": self.loss_sum,
                "seen": self.seen,
                "history": self.history,
                "weights": self._weights(),
                "optimiser": self.optimiser.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "objective_step": getattr(self.objective, "step", None),
                "rng": self._get_rng(),
                "epoch_rng": self._epoch_rng,
            },
            path,
        )

    def load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = state["format"]
        except Exception as error:
            raise ValueError(
                f"checkpoint {path} cannot be read ({type(error).__name__}: {error}); "
                "it is damaged or no checkpoint of fit: delete it to train from the start"
            ) from error
        if found != _FORMAT:
            raise ValueError(
                f"checkpoint {path} has format {found}, this version reads {_FORMAT}; "
                "delete it to train from the start"
            )
        ours = dataclasses.asdict(self.config)
        differing = {
            name: (value, ours.get(name))
            for name, value in state["config"].items()
            if name not in ("progress", "checkpoint_every") and value != ours.get(name)
        }
        # More epochs than before is a continuation; anything else would be another run.
        if self.config.schedule != "one_cycle" and differing.keys() == {"epochs"}:
            differing = {}
        if differing:
            raise ValueError(
                f"checkpoint {path} was written with other settings (theirs, yours): {differing}; "
                "use another file, or the same settings"
            )
        self._see_parameters()
        self._load_weights(state["weights"], path)
        assert self.optimiser is not None
        self.optimiser.load_state_dict(state["optimiser"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.steps, self.batch = state["epoch"], state["steps"], state["batch"]
        self.loss_sum, self.seen = state["loss_sum"], state["seen"]
        self.history = state["history"]
        if state["objective_step"] is not None:
            # An annealed objective counts its own steps.
            self.objective.step = state["objective_step"]
        self._epoch_rng = state["epoch_rng"]
        if self.batch:
            self._resume_rng = state["rng"]
        else:
            self._set_rng(state["rng"])

    def _see_parameters(self) -> None:
        """Run the programs once, so that every parameter exists and the optimiser can be made."""
        x = next(iter(_images(self.loader)))
        with poutine.trace(param_only=True) as capture:
            self.objective.loss_and_grads(self.vae.model, self.vae.guide, x)
        self._make_optimiser(capture.trace)
        assert self.optimiser is not None
        self.optimiser.zero_grad()

    def _weights(self) -> dict[str, Tensor]:
        """A module's own state, or the parameters of the programs by their Pyro names."""
        if isinstance(self.vae, nn.Module):
            return self.vae.state_dict()
        return {name: value.detach() for name, value in self.parameters.items()}

    def _load_weights(self, weights: dict[str, Tensor], path: Path) -> None:
        if isinstance(self.vae, nn.Module):
            try:
                self.vae.load_state_dict(weights)
            except RuntimeError as error:
                raise ValueError(
                    f"checkpoint {path} belongs to another architecture: {error}"
                ) from error
            return
        if weights.keys() != self.parameters.keys():
            raise ValueError(
                f"checkpoint {path} holds other parameters: "
                f"{sorted(weights.keys() ^ self.parameters.keys())}"
            )
        with torch.no_grad():
            for name, value in weights.items():
                self.parameters[name].copy_(value)

    def _get_rng(self) -> dict[str, Any]:
        state: dict[str, Any] = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        generator = getattr(self.loader, "generator", None)
        if isinstance(generator, torch.Generator):
            state["loader"] = generator.get_state()
        return state

    def _set_rng(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])
        generator = getattr(self.loader, "generator", None)
        if isinstance(generator, torch.Generator) and "loader" in state:
            generator.set_state(state["loader"])
