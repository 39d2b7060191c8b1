r"""Stochastic variational inference: :func:`fit` trains any Pyro VAE with any Pyro ELBO.

One step is what ``pyro.infer.SVI.step`` does: ``objective.loss_and_grads(model, guide, x)`` under a
capture of the parameters it touches, then one step of the optimiser. The optimiser is a single
``torch.optim.Adam`` over all of them, so that schedules, checkpoints and resumption see everything.
Parameters that the programs register later join it then.

Defaults are the paper's (appendix D.1): Adam at 5e-4, halved when the validation loss has not
fallen for 10 epochs, 300 epochs.

Reference: Kingma, Ba, "Adam", ICLR 2015, https://arxiv.org/abs/1412.6980; Smith, Topin,
"Super-convergence", 2018, https://arxiv.org/abs/1708.07120 (the one-cycle schedule); Pascanu,
Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013,
https://arxiv.org/abs/1211.5063 (the limit on the gradient's norm).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, TraceEnum_ELBO, TraceTailAdaptive_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae_defence.models import program
from pyro_vae_defence.models.contract import mend_networks
from pyro_vae_defence.models.modules import modules_of, networks_of
from pyro_vae_defence.models.sites import aside, check_same_latents, get_trace, whole_size
from pyro_vae_defence.objectives import BetaELBO, ImageELBO
from pyro_vae_defence.ops.boundary import drop_references, note, public
from pyro_vae_defence.ops.checks import as_device
from pyro_vae_defence.ops.files import atomic_save, check_writable, remove_partial
from pyro_vae_defence.ops.locks import sole_writer
from pyro_vae_defence.training import checkpoints, parallel
from pyro_vae_defence.training.acceleration import compiled_children, in_bfloat16
from pyro_vae_defence.training.averaging import WeightAverage
from pyro_vae_defence.training.batches import Reader
from pyro_vae_defence.training.config import FitConfig, FitResult, NonFiniteLossError
from pyro_vae_defence.training.parameters import Parameters
from pyro_vae_defence.types import VAE, Latents

# Where a run stands, saved with its weights; the last three inside an unfinished epoch: batches
# done, their summed loss, images seen.
_POSITION = ("epoch", "steps", "history", "batch", "loss_sum", "seen")
# What an ELBO may answer to programs that it is not for.
_NOT_ANALYTIC = (AssertionError, KeyError, NotImplementedError, RuntimeError, ValueError)
# What a resumed run may set anew: the weights do not depend on it.
_FREE_SETTINGS = {"progress", "checkpoint_every", "posterior_variance"}


@public
@torch.enable_grad()
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
    device: str | torch.device | None = None,
) -> FitResult:
    """Train ``vae`` by stochastic variational inference; its parameters change in place.

    With ``checkpoint`` the run is resumed from that file when it exists, and continues exactly
    where it stood, whenever it was killed: on the same machine and number of threads the weights
    equal those of an uninterrupted run. Exact resumption needs loaders whose order, and whose
    random transforms, depend on the global seeds of torch, NumPy and Python, on the ``generator``
    attribute of itself or its samplers, or on ``set_epoch`` of a sampler, alone
    (``torch.utils.data.DataLoader`` does). What programs count themselves has to be a persistent
    buffer of a module.

    What is trained is what the programs register with Pyro, whenever they do. Modules are found
    wherever the programs reach them (:func:`pyro_vae_defence.models.modules.modules_of`).

    Within a process group of ``torch.distributed``, as ``torchrun`` makes them, training is
    data-parallel (:mod:`pyro_vae_defence.training.parallel`): call ``fit`` in every process, with a
    loader of that process's share, e.g. by a ``DistributedSampler``. Gradients and losses are
    summed over the processes; ``validation`` may be shared out or the same in each. All start from
    the first process's weights and draw their own noise; the first one alone writes files and calls
    back.

    Public calls of other threads run while a batch is fetched and in ``on_epoch``, and wait
    otherwise: ``loader`` may have a thread that defends or attacks images. Where it draws from
    torch's global seed while others do, give it a ``generator`` of its own: the seed is shared.

    Args:
        vae: any Pyro VAE. Its modules are trained in train mode and left in eval mode.
        objective: a Pyro ELBO, e.g. ``pyro.infer.Trace_ELBO()`` or one of
            :mod:`pyro_vae_defence.objectives`.
        loader: batches of images ``(B, C, H, W)`` in [0, 1], or tuples ``(x, *conditions)`` of
            these and tensors with one row per image, with which the programs are called where they
            take them. They are moved to ``device``.
        config: see :class:`FitConfig`.
        validation: batches to validate on after each epoch, as ``loader``'s; the plateau rule needs
            it.
        checkpoint: file written after every epoch, atomically; parent directories are made. Its
            ``"weights"`` are those being trained, with the buffers: the ``state_dict`` of a VAE
            that is a module, else those of its modules by their paths, and Pyro's parameters of no
            module by their names. An average is kept beside.
        tensorboard: directory to log the history to; needs the extra ``tensorboard``.
        on_epoch: called with each new entry of the history, the weights being those validated, in
            eval mode. What it draws from global generators does not change the run.
        device: where to train, e.g. ``"cuda"``: all modules of the VAE are moved there, and stay
            there, and so is every batch. Parameters of no module are made by the programs, where
            the images are. ``None`` leaves the modules where they are and moves batches to the
            first parameter's device.

    Warns:
        UserWarning: if the loader yields more than images and neither program takes it.

    Raises:
        ValueError: if an argument does not fit, the checkpoint belongs to another configuration, or
            ``tensorboard`` is not installed; for data the programs cannot take; and for parameters
            that the loss depends on but that would not be trained, before they should have been.
        NonFiniteLossError: as soon as a loss, a gradient or the gradient's square is not finite;
            weights and statistics are those before that step, and the last checkpoint stays. After
            an epoch also for a loss of ``validation`` or a variance of the guide that is not
            finite; where that loss is infinite by the fault of ``validation``, the epoch is in the
            checkpoint first.
    """
    program.check_vae(vae)
    note(modules_of(vae))
    _check_objective(objective)
    config = FitConfig() if config is None else config
    if not isinstance(config, FitConfig):
        raise ValueError(f"config must be a FitConfig such as FitConfig(epochs=10), got {config!r}")
    if not (on_epoch is None or callable(on_epoch)):
        raise ValueError(f"on_epoch must be callable, an entry of the history, got {on_epoch!r}")
    if config.schedule == "plateau" and validation is None:
        raise ValueError(
            "schedule='plateau' watches the validation loss: pass validation=..., "
            "or choose schedule='one_cycle' or 'constant'"
        )
    parallel.check_initialised()
    place = None if device is None else as_device("device", device)
    if place is not None:
        for network in networks_of(vae).values():
            network.to(place)
    for name, batches in (("loader", loader), ("validation", validation)):
        if isinstance(batches, Iterator):
            raise ValueError(
                f"{name} can be read only once, and every epoch reads it; give a list of batches "
                f"or a DataLoader, got {batches!r}"
            )
        known = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
        if not known and (batches is not None or name == "loader"):
            raise ValueError(
                f"{name} must be a list of batches or a DataLoader, got {batches!r:.100}"
            )
    run = _Run(vae, objective, loader, config, validation, place)
    # Wherever links lead, and whatever directory is the current one later.
    path = None if checkpoint is None else Path(os.path.realpath(checkpoint))
    with contextlib.ExitStack() as stack:
        if path is not None:
            _take_place(path, stack)
        if config.compile:
            stack.enter_context(compiled_children(vae))
        log = _open_log(tensorboard, stack)
        # The first process's answer holds for all: it has written whatever an earlier call saved.
        if path is not None and parallel.gather(path.exists())[0]:
            run.load(path)
            if run.epoch < config.epochs and getattr(loader, "persistent_workers", False):
                raise ValueError(
                    f"checkpoint {path} cannot be continued with a loader of persistent_workers: "
                    "the workers' random states are in no checkpoint; give a loader with "
                    "persistent_workers=False (random transforms then differ from those of a "
                    "run that was not interrupted, unless that one had no persistent workers)"
                )
            if (begun := run.epoch + (run.batch > 0)) > config.epochs:
                raise ValueError(
                    f"epochs={config.epochs} is less than the {begun} that checkpoint {path} has "
                    "begun; use another file, or as many epochs or more"
                )
        else:
            run.start()
        if validation is not None and run.epoch < config.epochs:
            run.check_validation(validation)
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


@public
def evaluate(vae: VAE, objective: Any, loader: Iterable[Any]) -> float:
    """Mean loss of ``objective`` per image, in nats; no parameter changes.

    Batches are what :func:`fit` takes, checked and moved to the VAE's device in the same way.
    """
    program.check_vae(vae)
    _check_objective(objective)
    total, count = _loss_and_count(Reader(vae), objective, loader, "loader")
    if count == 0:
        raise ValueError("the loader is empty; pass at least one batch")
    return total / count


def _check_objective(objective: Any) -> None:
    if not isinstance(objective, ELBO):
        raise ValueError(
            "objective must be a Pyro ELBO such as pyro.infer.Trace_ELBO(), got "
            f"{objective if isinstance(objective, type) else type(objective).__name__}"
        )
    if isinstance(objective, TraceTailAdaptive_ELBO):
        raise ValueError(
            "objective TraceTailAdaptive_ELBO has gradients but no loss, which is watched here; "
            "take another, e.g. pyro.infer.RenyiELBO(), or train with pyro.infer.SVI"
        )


def _loss_and_count(
    reader: Reader, objective: Any, loader: Iterable[Any], name: str
) -> tuple[float, int]:
    vae, total, count = reader.vae, 0.0, 0
    with torch.no_grad(), program.evaluation_mode(vae):
        for batch in reader.read(loader, name):
            with _Loss(objective, batch) as of_batch:
                loss = objective.loss(vae.model, vae.guide, *batch)
            total += of_batch.number(loss)
            count += batch[0].shape[0]
    return total, count


class _Loss(Messenger):
    """Makes a number of an objective's loss, the sum over the images of a batch.

    Where a data plate subsamples, Pyro's own objectives estimate the sum over all of its images.
    """

    def __init__(self, objective: Any, batch: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.count = self.whole = len(batch[0])
        self.is_sum = isinstance(objective, ImageELBO)

    def _pyro_sample(self, msg: Any) -> None:
        if not self.is_sum and (whole := whole_size(msg, self.count)) != self.count:
            self.whole = whole

    def number(self, loss: Any) -> float:
        """Of a loss, or of several, which ``pyro.infer.ReweightedWakeSleep`` returns."""
        return float(sum(loss) if isinstance(loss, tuple) else loss) * self.count / self.whole


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


def _length(loader: Any) -> int | None:
    """Number of batches, if the loader knows: a ``DataLoader`` of an ``IterableDataset`` has a
    ``__len__`` that may fail."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _set_epoch(loader: Any, epoch: int) -> None:
    """Tell samplers that shuffle by epoch, as torch's distributed one, which epoch it is."""
    for each in checkpoints.chain(loader):
        if callable(getattr(each, "set_epoch", None)):
            each.set_epoch(epoch)


class _Run:
    """The state of a training run, everything of which goes into a checkpoint."""

    def __init__(
        self,
        vae: VAE,
        objective: Any,
        loader: Iterable[Any],
        config: FitConfig,
        validation: Iterable[Any] | None,
        device: torch.device | None,
    ) -> None:
        self.vae, self.objective, self.config = vae, objective, config
        self.loader, self.validation = self._loaders = loader, validation
        self.model, self.guide = vae.model, vae.guide
        if config.precision == "bfloat16":
            self.model, self.guide = in_bfloat16(vae.model), in_bfloat16(vae.guide)
        # Where the run stands; see _POSITION.
        self.epoch, self.steps, self.batch, self.loss_sum, self.seen = 0, 0, 0, 0.0, 0
        self.history: list[dict[str, float]] = []
        self.reader = Reader(vae, parallel.is_first(), device)
        self.parameters = Parameters(vae)
        self.optimiser: Any = None
        self.scheduler: Any = None
        self.average: WeightAverage | None = None
        self._last: tuple[Tensor, ...] | None = None  # batch of this process
        self._statistics: tuple[list[Tensor], list[Tensor]] = [], []  # and as they were
        self._resume_rng: dict[str, Any] | None = None
        self._epoch_rng: dict[str, Any] = {}

    # --- Training ---

    def start(self) -> None:
        """Make the processes of a data-parallel run begin alike, but for their noise."""
        if parallel.world_size() > 1:
            state = self.parameters.weights().values()
            parallel.broadcast(value for value in state if isinstance(value, Tensor))
            parallel.separate_noise()

    def check_validation(self, batches: Iterable[Any]) -> None:
        """Refuse batches that nothing can be validated on, before an epoch is lost to them."""
        rng = checkpoints.get_rng(*self._loaders)
        reader = Reader(self.vae, device=self.reader.device)
        empty = next(reader.read(batches, "validation"), None) is None
        checkpoints.set_rng(rng, *self._loaders)
        if all(parallel.gather(empty)):
            raise ValueError("validation is empty; pass at least one batch")

    def train_epoch(self, path: Path | None) -> dict[str, float]:
        started = time.perf_counter()
        self._set_mode(training=True)
        buffers = [b for network in self.parameters.networks.values() for b in network.buffers()]
        self._statistics = buffers, [buffer.clone() for buffer in buffers]
        _set_epoch(self.loader, self.epoch)
        length = _length(self.loader)
        counted_on = length if self.config.schedule == "one_cycle" else None
        for batch in self._remaining_batches():
            if self.batch == counted_on:
                self.batch += 1  # one too many
                break
            if self.steps == 0:
                parallel.check_shares(length, batch[0])
            self._step(batch)
            self.batch += 1
            self._last = batch
            every = self.config.checkpoint_every
            if path is not None and every is not None and self.steps % every == 0:
                self.save(path)
        if self.steps == 0:
            parallel.check_shares(length, None)
        parallel.check_all_ended(self.batch)
        if self.seen == 0:
            raise ValueError("loader is empty; pass at least one batch")
        if counted_on is not None and self.batch != counted_on:
            raise ValueError(
                f"loader yields {'more' if self.batch > counted_on else self.batch} batches, by "
                f"its len() it has {length}, which schedule='one_cycle' counts on; give one whose "
                "len() holds in every epoch, or choose schedule='constant' or 'plateau'"
            )
        entry = {"epoch": float(self.epoch + 1), "train_loss": self.loss_sum / self.seen}
        entry["learning_rate"] = float(self.optimiser.param_groups[0]["lr"])
        # The first process's running statistics are the ones that are saved.
        for network in self.parameters.networks.values():
            parallel.broadcast(network.buffers())
        if self.validation is not None:
            where, rng = f"epoch {self.epoch + 1}", checkpoints.get_rng(*self._loaders)
            with self._validated_weights(), self._finite("validation loss", where):
                loss = entry["validation_loss"] = self._validate(self.objective, self.validation)
                if finite := math.isfinite(loss):
                    nelbo = self._analytic_nelbo(self.validation)
                    if nelbo is not None:
                        entry["validation_nelbo"] = nelbo
            if not finite:
                # The loss is that of all processes, which take part in this.
                checkpoints.set_rng(rng, *self._loaders)
                if path is not None and not any(parallel.gather(self._spoiled())):
                    self.save(path)
                raise self._not_finite(loss, "validation loss", where)
        if self.config.schedule == "plateau":
            # Of a negative loss torch's relative threshold would count a rise as an improvement.
            plateau = self.scheduler
            plateau.threshold = math.copysign(plateau.threshold, plateau.best)
            plateau.step(entry["validation_loss"])
        entry["seconds"] = time.perf_counter() - started
        self.epoch += 1
        self.batch, self.loss_sum, self.seen = 0, 0.0, 0
        self.history.append(entry)
        return entry

    def finish(self) -> Latents | None:
        """Leave the final weights in the VAE, in eval mode; measure its mean posterior variance."""
        if self.average is not None:
            self.average.swap()
        self._set_mode(training=False)
        self.parameters.warn_unused()
        name = "mean_posterior_variance"
        if not (self.config.posterior_variance and hasattr(self.vae, name)):
            return None
        batches = self.reader.read(self.loader, "loader")
        with self._finite("guide's variance", f"the end of epoch {self.epoch}"):
            variance = program.mean_posterior_variance(self.vae, batches)
        parallel.average(variance.values())
        setattr(self.vae, name, variance)
        return variance

    def _set_mode(self, *, training: bool) -> None:
        """Put all modules into train or eval mode, by their own methods, which may do more."""
        self.parameters.look()
        for network in self.parameters.networks.values():
            network.train(training)

    def report(self, on_epoch: Callable[[dict[str, float]], None], entry: dict[str, float]) -> None:
        """Call the user's function in a way that training does not depend on it."""
        drop_references(modules_of(self.vae))  # it may store the VAE
        # A run resumed from the checkpoint of this epoch will not call it again.
        rng = checkpoints.get_rng(*self._loaders)
        self._set_mode(training=False)  # until the next epoch
        with self._validated_weights(), self.reader.pause:
            on_epoch(entry)
        checkpoints.set_rng(rng, *self._loaders)

    def _validated_weights(self) -> contextlib.AbstractContextManager[None]:
        """For a while, put the average of the weights in their place, if there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.swapped()

    def _remaining_batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The epoch's batches that are not done yet, with the generators where they stood."""
        if self.batch:
            # The order of an epoch was drawn from the generators as they stood at its start.
            checkpoints.set_rng(self._epoch_rng, *self._loaders)
        else:
            self._epoch_rng = checkpoints.get_rng(*self._loaders)
        batches = self.reader.read(self.loader, "loader")
        for _ in range(self.batch):
            next(batches, None)
        if self._resume_rng is not None:
            # Before the next batch is fetched, since fetching may draw random transforms.
            checkpoints.set_rng(self._resume_rng, *self._loaders)
            self._resume_rng = None
        yield from batches

    def _step(self, batch: tuple[Tensor, ...]) -> None:
        if self._statistics[0]:
            torch._foreach_copy_(self._statistics[1], self._statistics[0])
        try:
            with self.parameters, _Loss(self.objective, batch) as of_batch:
                found = self.objective.loss_and_grads(self.model, self.guide, *batch)
            loss = of_batch.number(found)
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if parallel.world_size() == 1 and self._diverged(batch):
                loss = math.nan  # Pyro has found it before the loss was there
            elif self.steps > 0 or isinstance(error, ValueError):
                raise
            else:
                raise self._failed(batch, error) from error
        loss, count = parallel.total_of_batch(loss, batch[0].shape[0])
        self._check_finite(loss, "loss")
        if self.parameters.take_new() or self.optimiser is None:
            self._optimise_all()
        trained = self.parameters.trained.values()
        parallel.sum_gradients(trained)
        # Infinite where Adam's mean of squares would overflow, after which its steps are zero.
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        self._check_finite(float(norm), "norm of the gradient")
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, self.config.clip_norm, norm)
        try:
            self.optimiser.step()
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            self._check_finite(math.inf, "step of the optimiser")
        if self.config.schedule == "one_cycle":
            self.scheduler.step()
        self.steps += 1
        if self.average is not None:
            self.average.update(self.steps)
        self.loss_sum += loss
        self.seen += int(count)

    def _failed(self, batch: tuple[Tensor, ...], error: Exception) -> ValueError:
        shapes = [None if v is None else tuple(v.shape) for v in batch]
        mend = "the programs must run on any number of images of one size"
        if len(batch) > 1:
            mend = (
                "if what loader yields beside the images is not theirs, give a loader of images "
                "alone, e.g. data.batches(..., labels=False)"
            )
        mend = mend_networks(self.vae, batch[0], batch[1:]) or mend
        if isinstance(error, (AssertionError, KeyError)):  # as Pyro's where latents differ
            with torch.no_grad(), aside(batch[0].device), contextlib.suppress(type(error)):
                model, guide = (get_trace(program, *batch) for program in (self.model, self.guide))
                check_same_latents(model, guide)
        said = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
        return ValueError(
            f"the programs failed on loader's first batch, of shapes {shapes}: {said}; {mend}"
        )

    def _check_finite(self, value: float, name: str) -> None:
        """End a step that has come to no number, with the statistics from before it."""
        if not math.isfinite(value):
            for buffer, kept in zip(*self._statistics, strict=True):
                buffer.copy_(kept)
            raise self._not_finite(value, name, f"epoch {self.epoch + 1}, step {self.steps + 1}")

    def _not_finite(self, value: float, name: str, where: str) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"the {name} is {value} at {where} (learning rate {self.config.learning_rate:g}); "
            "lower the learning rate, set clip_norm, or look for non-finite images or a degenerate "
            "likelihood"
        )

    @contextlib.contextmanager
    def _finite(self, name: str, where: str) -> Iterator[None]:
        """Turn what Pyro or torch say of weights that have diverged into one error."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            known = isinstance(error, (NonFiniteLossError, torch.OutOfMemoryError))
            if not known and parallel.world_size() == 1 and self._spoiled():
                raise self._not_finite(math.nan, name, where) from error
            raise

    def _spoiled(self) -> bool:
        """Whether the weights, as they are validated, have diverged at this process's last batch.

        A checkpoint of such weights would take the place of a good one.
        """
        with program.evaluation_mode(self.vae):
            return self._last is not None and self._diverged(self._last)

    def _diverged(self, batch: tuple[Tensor, ...]) -> bool:
        """Whether the programs' densities are no numbers, as seen without Pyro's validation.

        Programs may talk to other processes (``SyncBatchNorm``): not for one process alone.
        """
        with torch.no_grad(), pyro.validation_enabled(False), aside(batch[0].device):
            try:
                guide = poutine.trace(self.guide).get_trace(*batch)
                model = poutine.trace(poutine.replay(self.model, guide)).get_trace(*batch)
                densities = guide.log_prob_sum(), model.log_prob_sum()
            except Exception:
                return False
        return not all(math.isfinite(value) for value in densities)

    def _validate(self, objective: Any, batches: Iterable[Any]) -> float:
        loss, count = parallel.total(
            *_loss_and_count(self.reader, objective, batches, "validation")
        )
        if count == 0:
            raise ValueError("validation is empty; pass at least one batch")
        return loss / count

    def _analytic_nelbo(self, batches: Iterable[Any]) -> float | None:
        """The negative ELBO at beta = 1, whatever the programs scale by, with analytic divergences
        where they are known; ``None`` where an objective of images is not for the programs."""
        loss, count, failed = 0.0, 0, False
        with contextlib.ExitStack() as stack:
            if isinstance(self.objective, TraceEnum_ELBO):
                # That what is enumerated needs the objective which the user has chosen.
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", UserWarning)
            try:
                stack.enter_context(_Unscaled())
                loss, count = _loss_and_count(self.reader, BetaELBO(), batches, "validation")
            except torch.OutOfMemoryError:
                raise
            except _NOT_ANALYTIC:
                # The objective has just been evaluated on these batches, so they are not to blame.
                failed = True
        loss, total, failures = parallel.total(loss, count, failed)
        return None if failures else loss / total

    def _optimise_all(self) -> None:
        """Have the optimiser and the average take care of all parameters seen so far."""
        trained, config = self.parameters.trained, self.config
        if not trained:
            raise ValueError(
                "no parameter was seen in model or guide; register modules with pyro.module(...) "
                "inside the programs, or derive them from pyro.nn.PyroModule"
            )
        if self.optimiser is not None:
            self.optimiser.param_groups[0]["params"] = list(trained.values())
            if self.average is not None:
                self.average.add(trained)
            return
        self.optimiser = torch.optim.Adam(list(trained.values()), lr=config.learning_rate)
        if config.ema_decay is not None:
            self.average = WeightAverage(trained, config.ema_decay)
        if config.schedule == "plateau":
            self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
                self.optimiser, factor=config.factor, patience=config.patience
            )
        elif config.schedule == "one_cycle":
            if (length := _length(self.loader)) is None:
                raise ValueError(
                    "schedule='one_cycle' needs a loader with a length; give one that has it, or "
                    "choose schedule='constant' or 'plateau'"
                )
            steps = config.epochs * length
            self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
                self.optimiser, config.learning_rate, total_steps=steps, cycle_momentum=False
            )

    # --- Checkpoints ---

    def save(self, path: Path) -> None:
        # Every process takes part, since each has generators of its own.
        rng = parallel.gather(
            {"now": checkpoints.get_rng(*self._loaders), "epoch": self._epoch_rng}
        )
        if not parallel.is_first():
            return
        contents = {
            "format": checkpoints.FORMAT,
            "config": dataclasses.asdict(self.config),
            **{name: getattr(self, name) for name in _POSITION},
            "length": _length(self.loader),
            "weights": self.parameters.weights(),
            "parameters": list(self.parameters.trained),
            "of_no_module": self.parameters.of_no_module(),
            "average": None if self.average is None else self.average.values,
            "optimiser": self.optimiser.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            # What an objective keeps from step to step; an annealed one counts them.
            "objective": getattr(self.objective, "state_dict", lambda: None)(),
            "rng": rng,
        }
        atomic_save(contents, path)

    def load(self, path: Path) -> None:
        state = checkpoints.read(path)
        self._check_settings(state, path)
        for name in _POSITION:
            setattr(self, name, state[name])
        try:
            self._load_weights(state)
        except ValueError as error:
            message = f"checkpoint {path} belongs to another architecture: {error}"
            raise ValueError(message) from error
        self._optimise_all()
        if self.average is not None:
            for name, value in self.average.values.items():
                value.copy_(state["average"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if state["objective"] is not None:
            self.objective.load_state_dict(state["objective"])
        rng = state["rng"][parallel.rank()]
        self._epoch_rng = rng["epoch"]
        if self.batch:
            self._resume_rng = rng["now"]
        else:
            checkpoints.set_rng(rng["now"], *self._loaders)

    def _load_weights(self, state: dict[str, Any]) -> None:
        """Load weights and buffers, also of what the programs make only when they run."""
        loose = {name: state["weights"].pop(name) for name in state["of_no_module"]}
        self.parameters.load_modules(state["weights"], strict=True)
        self.parameters.expect(state["parameters"], loose)
        before = set(pyro.get_param_store().keys())
        self._run_once()
        if left := self.parameters.load_modules(state["weights"], strict=False):
            raise ValueError(f"it holds {sorted(left)}, which the VAE lacks")
        self.parameters.settle(before)

    def _run_once(self) -> None:
        """Run the programs as a step does, and leave all random generators as they were."""
        rng = checkpoints.get_rng(*self._loaders)
        self._set_mode(training=True)
        _set_epoch(self.loader, self.epoch)
        batch = next(self.reader.read(self.loader, "loader"))
        with self.parameters:
            self.objective.loss_and_grads(self.model, self.guide, *batch)
        checkpoints.set_rng(rng, *self._loaders)

    def _check_settings(self, state: dict[str, Any], path: Path) -> None:
        theirs, ours = state["config"], dataclasses.asdict(self.config)
        pairs = {n: (theirs.get(n), ours.get(n)) for n in (theirs | ours).keys() - _FREE_SETTINGS}
        differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        # More epochs than before is a continuation; anything else would be another run.
        if self.config.schedule != "one_cycle" and differing.keys() == {"epochs"}:
            differing = {}
        # Whole epochs may be followed by others; a batch that is done has to be the same images.
        if state["batch"] or self.config.schedule == "one_cycle":
            _set_epoch(self.loader, state["epoch"])
            lengths = state.get("length"), _length(self.loader)
            if None not in lengths and lengths[0] != lengths[1]:
                differing["batches of an epoch"] = lengths
        if len(state["rng"]) != parallel.world_size():
            differing["processes"] = (len(state["rng"]), parallel.world_size())
        if differing:
            raise ValueError(
                f"checkpoint {path} was written with other settings (theirs, yours): {differing}; "
                "use another file, or the same settings"
            )


class _Unscaled(Messenger):
    """Takes back what programs and their plates scale sites by."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["scale"] = 1.0


def _take_place(path: Path, stack: contextlib.ExitStack) -> None:
    """Let the first process be the only one to write a checkpoint until ``stack`` closes;
    ``ValueError`` in every process where it cannot."""
    problem = None
    if parallel.is_first():
        try:
            check_writable(path)
            stack.enter_context(sole_writer(path))
        except (OSError, ValueError) as error:
            problem = str(error)
    if (problem := parallel.gather(problem)[0]) is not None:
        raise ValueError(f"checkpoint {path} cannot be written: {problem}")
