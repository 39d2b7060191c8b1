r"""Stochastic variational inference: :func:`fit` trains any Pyro VAE with any Pyro ELBO.

One step is what ``pyro.infer.SVI.step`` does: ``objective.loss_and_grads(model, guide, x)`` under a
capture of the parameters it touches, then one step of the optimiser. The optimiser is a single
``torch.optim.Adam`` over all of them, so that schedules, checkpoints and resumption see everything.

Defaults are the paper's (appendix D.1): Adam at 5e-4, halved when the validation loss has not
fallen for 10 epochs, 300 epochs.

Reference: Kingma, Ba, "Adam", ICLR 2015, https://arxiv.org/abs/1412.6980; Smith, Topin,
"Super-convergence", 2018, https://arxiv.org/abs/1708.07120 (the one-cycle schedule); Pascanu,
Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013,
https://arxiv.org/abs/1211.5063 (the limit on the gradient's norm).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_vae_defence.models import program
from pyro_vae_defence.ops.files import atomic_save, remove_partial
from pyro_vae_defence.training import checkpoints, parallel
from pyro_vae_defence.training.acceleration import compiled_children, in_bfloat16
from pyro_vae_defence.training.averaging import WeightAverage
from pyro_vae_defence.training.config import FitConfig, FitResult, NonFiniteLossError
from pyro_vae_defence.types import VAE, Latents

# Where a run stands, saved with its weights; the last three inside an unfinished epoch: batches
# done, their summed loss, images seen.
_POSITION = ("epoch", "steps", "history", "batch", "loss_sum", "seen")
# What a resumed run may set anew: the weights do not depend on it.
_FREE_SETTINGS = {"progress", "checkpoint_every", "posterior_variance"}


def fit(
    vae: VAE,
    objective: Any,
    loader: Iterable[Any],
    config: FitConfig | None = None,
    *,
    validation: Iterable[Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    tensorboard: str | os.PathLike[str] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> FitResult:
    """Train ``vae`` by stochastic variational inference; its parameters change in place.

    With ``checkpoint`` the run is resumed from that file when it exists, and continues exactly
    where it stood, whenever it was killed: on the same machine and number of threads the weights
    equal those of an uninterrupted run. Exact resumption needs a loader whose order depends on
    torch's global seed, on its own ``generator`` attribute, or on ``set_epoch`` of its sampler,
    alone (``torch.utils.data.DataLoader`` does).

    Within a process group of ``torch.distributed``, as ``torchrun`` makes them, training is
    data-parallel (:mod:`pyro_vae_defence.training.parallel`): call ``fit`` in every process, with a
    loader of that process's share, e.g. by a ``DistributedSampler``. Gradients and losses are
    summed over the processes; ``validation`` may be shared out or the same in each. All start from
    the first process's weights and draw their own noise; the first one alone writes files and calls
    back.

    Args:
        vae: any Pyro VAE. An ``nn.Module`` is trained in train mode and left in eval mode.
        objective: a Pyro ELBO, e.g. ``pyro.infer.Trace_ELBO()`` or one of
            :mod:`pyro_vae_defence.objectives`.
        loader: batches of images ``(B, C, H, W)`` in [0, 1], or tuples that start with one. They
            are moved to the device of the VAE's first parameter where ``vae`` is an ``nn.Module``.
        config: see :class:`FitConfig`.
        validation: batches to validate on after each epoch, as ``loader``'s; the plateau rule needs
            it.
        checkpoint: file written after every epoch, atomically; parent directories are made. Its
            ``"weights"`` are those being trained; an average of them is kept beside.
        tensorboard: directory to log the history to; needs the extra ``tensorboard``.
        on_epoch: called with each new entry of the history, the weights being those validated. What
            it draws from torch's generators does not change the run.

    Raises:
        ValueError: if an argument does not fit, the checkpoint belongs to another configuration, or
            ``tensorboard`` is not installed.
        NonFiniteLossError: as soon as a loss is not finite; the last checkpoint stays.
    """
    program.check_vae(vae)
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
    parallel.check_initialised()
    run = _Run(vae, objective, loader, config, validation)
    path = None if checkpoint is None else Path(checkpoint)
    with contextlib.ExitStack() as stack:
        if config.compile:
            stack.enter_context(compiled_children(vae))
        log = _open_log(tensorboard, stack)
        # The first process's answer holds for all: it has written whatever an earlier call saved.
        if path is not None and parallel.gather(path.exists())[0]:
            run.load(path)
        else:
            run.start()
        if path is not None and parallel.is_first():
            remove_partial(path)
        for entry in run.history:
            log(entry)
        hidden = not (config.progress and parallel.is_first())
        bar = tqdm(total=config.epochs, initial=run.epoch, disable=hidden, unit="epoch")
        stack.enter_context(bar)
        while run.epoch < config.epochs:
            entry = run.train_epoch(path)
            if path is not None:
                run.save(path)
            losses = {k: f"{v:.2f}" for k, v in entry.items() if k.endswith(("loss", "nelbo"))}
            bar.set_postfix(losses)
            bar.update()
            log(entry)
            if on_epoch is not None and parallel.is_first():
                run.report(on_epoch, entry)
        variance = run.finish()
    return FitResult(list(run.history), run.steps, variance)


def evaluate(vae: VAE, objective: Any, loader: Iterable[Any]) -> float:
    """Mean loss of ``objective`` per image, in nats; no parameter changes.

    Batches are moved to the VAE's device, as :func:`fit` does.
    """
    total, count = _loss_and_count(vae, objective, loader)
    if count == 0:
        raise ValueError("the loader is empty; pass at least one batch")
    return total / count


def _loss_and_count(vae: VAE, objective: Any, loader: Iterable[Any]) -> tuple[float, int]:
    total, count = 0.0, 0
    with torch.no_grad(), program.evaluation_mode(vae):
        for x in _images(vae, loader):
            total += float(objective.loss(vae.model, vae.guide, x))
            count += x.shape[0]
    return total, count


def _images(vae: VAE, loader: Iterable[Any]) -> Iterator[Tensor]:
    """The images of each batch, on the VAE's device where it says which that is."""
    parameter = next(vae.parameters(), None) if isinstance(vae, nn.Module) else None
    for batch in loader:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        yield x if parameter is None else x.to(parameter.device)


def _open_log(
    directory: str | os.PathLike[str] | None, stack: contextlib.ExitStack
) -> Callable[[dict[str, float]], None]:
    """A function that writes an entry of the history for TensorBoard, until ``stack`` closes."""
    if directory is None or not parallel.is_first():
        return lambda entry: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard=... needs the package tensorboard; install the extra, "
            "pip install 'pyro-vae-defence[tensorboard]', or leave the argument out"
        ) from error
    # A resumed run writes its whole history again, and hides what earlier files hold.
    writer = SummaryWriter(os.fspath(directory), purge_step=0)
    stack.callback(writer.close)

    def write(entry: dict[str, float]) -> None:
        for name, value in entry.items():
            if name != "epoch":
                writer.add_scalar(name, value, int(entry["epoch"]))

    return write


def _set_epoch(loader: Any, epoch: int) -> None:
    """Tell samplers that shuffle by epoch, as torch's distributed one, which epoch it is."""
    while loader is not None:
        if callable(getattr(loader, "set_epoch", None)):
            loader.set_epoch(epoch)
        inner = getattr(loader, "batch_sampler", None)
        loader = getattr(loader, "sampler", None) if inner is None else inner


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
        self.vae, self.objective, self.config = vae, objective, config
        self.loader, self.validation = loader, validation
        self.model, self.guide = vae.model, vae.guide
        if config.precision == "bfloat16":
            self.model, self.guide = in_bfloat16(vae.model), in_bfloat16(vae.guide)
        # Where the run stands; see _POSITION.
        self.epoch, self.steps, self.batch, self.loss_sum, self.seen = 0, 0, 0, 0.0, 0
        self.history: list[dict[str, float]] = []
        self.parameters: dict[str, Tensor] = {}
        self.optimiser: Any = None
        self.scheduler: Any = None
        self.average: WeightAverage | None = None
        self._resume_rng: dict[str, Any] | None = None
        self._epoch_rng: dict[str, Any] = {}

    # --- Training ---

    def start(self) -> None:
        """Make the processes of a data-parallel run begin alike, but for their noise."""
        if parallel.world_size() == 1:
            return
        if not isinstance(self.vae, nn.Module):
            self._see_parameters()
        parallel.broadcast(self._weights().values())
        parallel.separate_noise()

    def train_epoch(self, path: Path | None) -> dict[str, float]:
        started = time.perf_counter()
        if isinstance(self.vae, nn.Module):
            self.vae.train()
        _set_epoch(self.loader, self.epoch)
        for x in self._remaining_batches():
            if self.steps == 0:
                program.check_images(x, "loader's first batch")
                length = len(self.loader) if isinstance(self.loader, Sized) else None
                parallel.check_shares(length, x)
            self._step(x)
            self.batch += 1
            every = self.config.checkpoint_every
            if path is not None and every is not None and self.steps % every == 0:
                self.save(path)
        if self.seen == 0:
            raise ValueError("loader is empty; pass at least one batch")
        entry = {"epoch": float(self.epoch + 1), "train_loss": self.loss_sum / self.seen}
        entry["learning_rate"] = float(self.optimiser.param_groups[0]["lr"])
        if isinstance(self.vae, nn.Module):
            # The first process's running statistics are the ones that are saved.
            parallel.broadcast(self.vae.buffers())
        if self.validation is not None:
            with self._validated_weights():
                entry["validation_loss"] = self._validate(self.objective, self.validation)
                entry["validation_nelbo"] = self._validate(TraceMeanField_ELBO(), self.validation)
        if self.config.schedule == "plateau":
            self.scheduler.step(entry["validation_loss"])
        entry["seconds"] = time.perf_counter() - started
        self.epoch += 1
        self.batch, self.loss_sum, self.seen = 0, 0.0, 0
        self.history.append(entry)
        return entry

    def finish(self) -> Latents | None:
        """Leave the final weights in the VAE, in eval mode; measure its mean posterior variance."""
        if self.average is not None:
            self.average.swap()
        if isinstance(self.vae, nn.Module):
            self.vae.eval()
        name = "mean_posterior_variance"
        if not (self.config.posterior_variance and hasattr(self.vae, name)):
            return None
        variance = program.mean_posterior_variance(self.vae, _images(self.vae, self.loader))
        parallel.average(variance.values())
        setattr(self.vae, name, variance)
        return variance

    def report(self, on_epoch: Callable[[dict[str, float]], None], entry: dict[str, float]) -> None:
        """Call the user's function in a way that training does not depend on it."""
        # A run resumed from the checkpoint of this epoch will not call it again.
        rng = checkpoints.get_rng(self.loader)
        with self._validated_weights():
            on_epoch(entry)
        checkpoints.set_rng(rng, self.loader)

    def _validated_weights(self) -> contextlib.AbstractContextManager[None]:
        """For a while, put the average of the weights in their place, if there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.swapped()

    def _remaining_batches(self) -> Iterator[Tensor]:
        """The epoch's batches that are not done yet, with the generators where they stood."""
        if self.batch:
            # The order of an epoch was drawn from the generators as they stood at its start.
            checkpoints.set_rng(self._epoch_rng, self.loader)
        else:
            self._epoch_rng = checkpoints.get_rng(self.loader)
        batches = _images(self.vae, self.loader)
        for _ in range(self.batch):
            next(batches, None)
        if self._resume_rng is not None:
            # Before the next batch is fetched, since fetching may draw random transforms.
            checkpoints.set_rng(self._resume_rng, self.loader)
            self._resume_rng = None
        yield from batches

    def _step(self, x: Tensor) -> None:
        if self.optimiser is not None:
            self.optimiser.zero_grad()
        with poutine.trace(param_only=True) as capture:
            loss = float(self.objective.loss_and_grads(self.model, self.guide, x))
        loss, count = parallel.total(loss, x.shape[0])
        self._check_finite(loss, "loss")
        if self.optimiser is None:
            self._make_optimiser(capture.trace)
        trained = self._trained().values()
        parallel.sum_gradients(trained)
        if self.config.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(trained, self.config.clip_norm)
            self._check_finite(float(norm), "norm of the gradient")
        self.optimiser.step()
        if self.config.schedule == "one_cycle":
            self.scheduler.step()
        self.steps += 1
        if self.average is not None:
            self.average.update(self.steps)
        self.loss_sum += loss
        self.seen += int(count)

    def _check_finite(self, value: float, name: str) -> None:
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"the {name} is {value} at epoch {self.epoch + 1}, step {self.steps + 1} (learning "
                f"rate {self.config.learning_rate:g}); lower the learning rate, or look for "
                "non-finite images or a degenerate likelihood"
            )

    def _validate(self, objective: Any, batches: Iterable[Any]) -> float:
        loss, count = parallel.total(*_loss_and_count(self.vae, objective, batches))
        if count == 0:
            raise ValueError("validation is empty; pass at least one batch")
        return loss / count

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

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
        self.optimiser = torch.optim.Adam(list(self._trained().values()), lr=config.learning_rate)
        if config.ema_decay is not None:
            self.average = WeightAverage(self._trained(), config.ema_decay)
        if config.schedule == "plateau":
            self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
                self.optimiser, factor=config.factor, patience=config.patience
            )
        elif config.schedule == "one_cycle":
            if not isinstance(self.loader, Sized):
                raise ValueError("schedule='one_cycle' needs a loader with a length")
            steps = config.epochs * len(self.loader)
            self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
                self.optimiser, config.learning_rate, total_steps=steps, cycle_momentum=False
            )

    def _check_all_registered(self) -> None:
        """Refuse a module parameter that has a gradient but that Pyro does not know."""
        if not isinstance(self.vae, nn.Module):
            return
        known = {id(parameter) for parameter in self.parameters.values()}
        used = {name: p for name, p in self.vae.named_parameters() if p.grad is not None}
        if missing := [name for name, parameter in used.items() if id(parameter) not in known]:
            raise ValueError(
                f"parameters {missing} would not be trained: they have a gradient, but model and "
                "guide do not register these very tensors. Call pyro.module(...) on their modules; "
                "call pyro.clear_param_store() first if another VAE of this process has used the "
                "same names; and keep parameters contiguous (Pyro's parameter store copies others)"
            )

    # --- Checkpoints ---

    def save(self, path: Path) -> None:
        # Every process takes part, since each has generators of its own.
        rng = parallel.gather({"now": checkpoints.get_rng(self.loader), "epoch": self._epoch_rng})
        if not parallel.is_first():
            return
        contents = {
            "format": checkpoints.FORMAT,
            "config": dataclasses.asdict(self.config),
            **{name: getattr(self, name) for name in _POSITION},
            "weights": self._weights(),
            "average": None if self.average is None else self.average.values,
            "optimiser": self.optimiser.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "objective": self._objective_state(),
            "rng": rng,
        }
        atomic_save(contents, path)

    def load(self, path: Path) -> None:
        state = checkpoints.read(path)
        self._check_settings(state, path)
        self._see_parameters()
        self._load_weights(state["weights"], path)
        if self.average is not None:
            # By order, as the optimiser's: names in Pyro's store differ between instances.
            saved = state["average"].values()
            for value, theirs in zip(self.average.values.values(), saved, strict=True):
                value.copy_(theirs)
        self.optimiser.load_state_dict(state["optimiser"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for name in _POSITION:
            setattr(self, name, state[name])
        self._set_objective_state(state["objective"])
        rng = state["rng"][parallel.rank()]
        self._epoch_rng = rng["epoch"]
        if self.batch:
            self._resume_rng = rng["now"]
        else:
            checkpoints.set_rng(rng["now"], self.loader)

    def _check_settings(self, state: dict[str, Any], path: Path) -> None:
        theirs, ours = state["config"], dataclasses.asdict(self.config)
        pairs = {n: (theirs.get(n), ours.get(n)) for n in (theirs | ours).keys() - _FREE_SETTINGS}
        differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        # More epochs than before is a continuation; anything else would be another run.
        if self.config.schedule != "one_cycle" and differing.keys() == {"epochs"}:
            differing = {}
        if len(state["rng"]) != parallel.world_size():
            differing["processes"] = (len(state["rng"]), parallel.world_size())
        if differing:
            raise ValueError(
                f"checkpoint {path} was written with other settings (theirs, yours): {differing}; "
                "use another file, or the same settings"
            )

    def _see_parameters(self) -> None:
        """Run the programs once, so that every parameter exists and the optimiser can be made."""
        rng, objective = checkpoints.get_rng(self.loader), copy.deepcopy(self._objective_state())
        x = next(_images(self.vae, self.loader))
        with poutine.trace(param_only=True) as capture:
            self.objective.loss_and_grads(self.model, self.guide, x)
        self._make_optimiser(capture.trace)
        self.optimiser.zero_grad()
        checkpoints.set_rng(rng, self.loader)
        self._set_objective_state(objective)

    def _objective_state(self) -> dict[str, Any] | None:
        """What an objective keeps from step to step; an annealed one counts them."""
        return self.objective.state_dict() if hasattr(self.objective, "state_dict") else None

    def _set_objective_state(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.objective.load_state_dict(state)

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
                message = f"checkpoint {path} belongs to another architecture: {error}"
                raise ValueError(message) from error
            return
        if others := sorted(weights.keys() ^ self.parameters.keys()):
            raise ValueError(f"checkpoint {path} holds other parameters: {others}")
        with torch.no_grad():
            for name, value in weights.items():
                self.parameters[name].copy_(value)
