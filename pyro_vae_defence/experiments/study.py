"""What all studies share: weights, data, seeds, cells, result files and pages.

A study is one class in one file, read from its question to its tables: configuration, names of
configurations, what a cell computes, the section of a page. :class:`Study` gives it the rest:

- weights are loaded by name and recorded with their hashes;
- randomness has one rule, :meth:`Study.generator`: a purpose's draws depend on the seed and the
  purpose alone, not on what else ran before, in this process or an interrupted one;
- a *cell* is what is computed and written at once. Cells that the result file holds are not
  computed again; the file is written atomically after each;
- under ``torchrun`` the processes share the cells (:mod:`pyro_vae_defence.ops.ranks`). Each writes
  those that it has finished into ``NAME.cells``, a file each; the first process makes the result
  file of them when all are there, the same as that of one process but for wall times;
- a result says what it is of: study, name, configuration, weights, command and provenance, and
  where other versions of the code or other machines have made some of its cells, which ones;
- one process at a time, or one launch of torchrun, writes a result; what would keep it from being
  written is found before anything is computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
import shutil
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae_defence import attacks, data, metrics
from pyro_vae_defence.data.loading import Split
from pyro_vae_defence.defence import NoDefence
from pyro_vae_defence.experiments.configuration import override
from pyro_vae_defence.experiments.drawing import save_figure
from pyro_vae_defence.metrics.intervals import unseen_reach
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.classifier import load_classifier
from pyro_vae_defence.models.pretrained import TrainedVAE, WeightCard, load_card, load_pretrained
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.boundary import remembering
from pyro_vae_defence.ops.checks import as_device, check_positive
from pyro_vae_defence.ops.files import check_writable, remove_partial, write_atomically, write_json
from pyro_vae_defence.ops.locks import sole_writer
from pyro_vae_defence.ops.precision import tf32
from pyro_vae_defence.ops.provenance import provenance
from pyro_vae_defence.ops.ranks import Claims
from pyro_vae_defence.types import VAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

C = TypeVar("C")
R = TypeVar("R")

VARIANT = "paper"
METRIC = metrics.metric_name("ms_ssim", VARIANT)
"""The similarity of all studies."""

_PATIENCE = 60  # seconds until a file that another machine has written must be there

Key = tuple[str, ...]
Cell = tuple[Key, Callable[[], Any]]
"""Where a cell stands in the result, part by part, and what computes it."""

_Path = str | os.PathLike[str]


def remembered(method: Callable[..., R]) -> Callable[..., R]:
    """A method that is computed once per study and arguments, and forgotten with the study."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any) -> R:
        memory = self.__dict__.setdefault("_remembered", {})
        key = (method.__name__, *arguments)
        if key not in memory:
            memory[key] = method(self, *arguments)
        return memory[key]

    return call


class Study(ABC, Generic[C]):
    """One run of a study: a configuration, and what it needs to be computed.

    Args:
        name: a key of :attr:`names`.
        output: directory for what is made.
        root: directory of the datasets.
        models: directory of weights and cards; where they are found without it, see
            :mod:`pyro_vae_defence.models.pretrained`.
        overrides: fields of the configuration to change, such as ``{"chain.step_size": 0.3}``; they
            are recorded in the result.
        progress: show progress bars.
        device: where it computes, such as ``"cuda"`` or ``"cuda:1"``; weights and images are moved
            there. Random draws are those of a CPU, and so are chains up to rounding.

    Raises:
        ValueError: for an unknown name, override or device.
    """

    command: ClassVar[str]
    """The study on the command line; studies with other names of configurations may share it."""
    noun: ClassVar[str] = "experiment"
    """What a name of the study names, for messages."""
    names: ClassVar[Mapping[str, Any]]
    """Configurations by name."""
    output: ClassVar[str]
    """Directory for what is made, by default."""
    shorthands: ClassVar[Mapping[str, tuple[str, Any]]] = {}
    """Options of the command line that set a field: option -> field and value."""
    options: ClassVar[Mapping[str, str]] = {}
    """Further options of the command line, arguments of the class: option -> what it is."""
    shared: ClassVar[bool] = False
    """Whether several processes can share the work."""

    def __init__(
        self,
        name: str,
        output: _Path,
        root: _Path | None = None,
        models: _Path | None = None,
        overrides: Mapping[str, Any] | None = None,
        progress: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = name
        self.device = as_device("device", device)
        self.config: C = override(self.configuration(name), overrides)
        self.directory = Path(output)
        self.root = root
        self.models = models
        self.overrides = dict(overrides or {})
        self.progress = progress
        self.weights: dict[str, str] = {}

    @classmethod
    def has(cls, name: str) -> bool:
        """Whether the study has a configuration of this name."""
        return name in cls.names

    @classmethod
    def configuration(cls, name: str) -> Any:
        """The configuration of a name."""
        if not cls.has(name):
            raise ValueError(f"no {cls.noun} named {name!r}; choose one of {', '.join(cls.names)}")
        return cls.names[name]

    @property
    def path(self) -> Path:
        """The file that is written last: a result, or the card of weights."""
        return self.directory / f"{self.name}.json"

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only one to write :attr:`path`, which can be written, and weights beside it.

        What killed processes left of them is removed.

        Raises:
            OSError: if it cannot.
            ValueError: if another process is writing it.
        """
        check_place(self.path)
        with sole_writer(self.path):
            for suffix in (".json", ".safetensors"):
                remove_partial(self.path.with_suffix(suffix))
            yield

    @abstractmethod
    def run(self) -> Any:
        """Compute what is not there yet; what was found."""

    @classmethod
    @abstractmethod
    def summary(cls, found: Any) -> str:
        """What the command line prints of :meth:`run`."""

    def generator(self, *purpose: object) -> torch.Generator:
        """The randomness of a purpose."""
        words = " ".join(map(str, (self.config.seed, *purpose)))  # type: ignore[attr-defined]
        return torch.Generator().manual_seed(zlib.crc32(words.encode()))

    def command_line(self, **options: Any) -> str:
        """The command that repeats the run, with further options but those that are ``None``."""
        words = ["python", "-m", "pyro_vae_defence.experiments", self.command, self.name]
        if self.device.type != "cpu":
            words += ["--device", str(self.device)]
        for option, value in options.items():
            words += [] if value is None else [f"--{option}", str(value)]
        for key, value in self.overrides.items():
            words += ["--set", f"{key}={value}"]
        return shlex.join(words)

    # --- Weights and data ---

    def load_vae(self, name: str) -> tuple[TrainedVAE, WeightCard]:
        """A trained VAE and its card; its weights are recorded.

        Raises:
            ValueError: for a name that is unknown, or damaged weights.
        """
        vae, card = load_pretrained(name, self.models), load_card(name, self.models)
        self.weights[name] = card.sha256
        return vae.to(self.device), card

    def check_name(self) -> None:
        """Raise a ``ValueError`` if the run is of another model than the one it is named after."""
        model = self.config.model  # type: ignore[attr-defined]
        if model != self.name:
            why = f"results are named after the model; run {self.command} on it"
            raise ValueError(f"model={model!r}: {why}")

    def load_conv_vae(self, name: str) -> tuple[ConvVAE, WeightCard]:
        """A trained VAE without latent groups and its card."""
        vae, card = self.load_vae(name)
        if not isinstance(vae, ConvVAE):
            raise ValueError(f"model must be a ConvVAE, {name!r} is a {type(vae).__name__}")
        return vae, card

    def load_classifier(self, name: str | None, model: str | None = None) -> Any:
        """A trained classifier, of the latents of ``model`` if given; its weights are recorded.
        Without a name it is ``<model>_classifier``.

        Raises:
            ValueError: for one that was trained on something else, or on latents of another model
                or of a loaded one's other weights, which may have as many; or for one of other
                labels than the first.
        """
        name = f"{model}_classifier" if name is None else name
        classifier, card = load_classifier(name, self.models)
        if model is not None:
            training = card.training
            if (reads := training.get("model", model)) != model:
                of = "images" if reads is None else f"latents of {reads!r}"
                raise ValueError(
                    f"classifier {name!r} reads {of}; name one of latents of {model!r}"
                )
            weights = self.weights.get(model)
            if training.get("weights", weights) != weights:
                raise ValueError(
                    f"classifier {name!r} reads latents of other weights of {model!r} than those "
                    "at hand; train it again"
                )
            if column := training.get("column", 0):
                raise ValueError(
                    f"classifier {name!r} predicts column {column} of the labels; name one of "
                    "column 0"
                )
        self.weights[name] = card.sha256
        return classifier.to(self.device)

    @remembered
    def images(self, dataset: str, split: Split = "test") -> data.Images:
        """A dataset, read once."""
        return data.load(dataset, split, self.root)

    def chosen(
        self, dataset: str, number: int, purpose: str, split: Split = "test", column: int = 0
    ) -> Tensor:
        """Which images of a dataset :meth:`choose` returns, ``(N,)``."""
        images = self.images(dataset, split)
        check_column(images, column)
        return data.stratified(images, number, self.generator(purpose), column)

    def choose(
        self, dataset: str, number: int, purpose: str, split: Split = "test", column: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Class-stratified images ``(N, C, H, W)`` and their labels, ``(N, columns)``."""
        images = self.images(dataset, split)
        chosen = self.chosen(dataset, number, purpose, split, column)
        labels = images.labels[chosen].reshape(len(chosen), -1)
        return images.images(chosen).to(self.device), labels.to(self.device)

    def reconstruct(self, vae: Any, x: Tensor, *purpose: object) -> Tensor:
        """Undefended: one draw of the guide, decoded."""
        return NoDefence(vae)(x, self.generator(*purpose)).reconstruction


class Measurement(Study[C]):
    """A study whose result is a file of cells, ``NAME.json`` in ``output``, written after each.

    Args:
        time_limit: seconds from here, > 0, in which runs should end: no cell begins that would not
            end in time if it took as long as the longest of this run before it. The first begins
            if any time is left, so that repeated runs get on.
        arguments, options: of :class:`Study`.

    Attributes:
        remaining: how many cells the last run has left to the next one.
    """

    kind: ClassVar[str]
    """Name of the study in result files, unique."""
    metric: ClassVar[str | None] = METRIC
    """Similarity that its cells hold, if that is one and the same."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Parts of a result that hold cells; they are there from the beginning."""
    timed: ClassVar[bool] = False
    """Whether a result holds the ``seconds`` of all its cells."""
    shared = True
    _sources: list[dict[str, Any]]  # provenance of all that has made cells, the latest last
    _makers: dict[str, dict[str, Any]]  # provenance by cell, where it is known
    _of_file: dict[str, Any] | None  # provenance of the file's cells that it attributes to no other
    remaining = 0

    def __init__(self, *arguments: Any, time_limit: float | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if time_limit is not None:
            check_positive("time_limit", time_limit)
        self._deadline = None if time_limit is None else time.monotonic() + time_limit

    # --- What a study says ---

    @abstractmethod
    def load(self) -> None:
        """Read weights and data by the methods below, before anything is computed."""

    @abstractmethod
    def cells(self) -> Iterator[Cell]:
        """All cells in the order in which they are computed."""

    @classmethod
    @abstractmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """Markdown of a result; ``figures`` are the relative paths of its figures."""

    @classmethod
    def figures(cls, result: dict[str, Any]) -> dict[str, Figure]:
        """Figures of a result by what they show; no more than its name where that is empty."""
        return {}

    @classmethod
    def pages(cls, results: dict[str, dict[str, Any]], directory: Path) -> list[Path]:
        """Write what a directory of results gets beyond sections and their figures."""
        return []

    @classmethod
    def summary(cls, found: dict[str, Any]) -> str:
        """The section of a result, without figures."""
        return cls.section(found, [])

    # --- Running it ---

    @functools.cached_property
    def result(self) -> dict[str, Any]:
        """What the result file holds, or will hold."""
        return self.header() | {part: {} for part in self.parts}

    def run(self) -> dict[str, Any]:
        """Compute the cells that the result file does not hold, within the time; the result.

        Under ``torchrun`` the whole result in its first process, and in the others what they know.
        On CUDA, products of float32 are not rounded to TF32 unless a cell says so.

        Raises:
            ValueError: for weights or data that are missing, or a result file of another run.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(tf32(False))
            stack.enter_context(remembering())
            claims = Claims(f"{self.kind} {self.path}")
            stack.enter_context(claims)
            if claims.rank == 0:
                stack.enter_context(self.writing())
            self.load()
            self._resume()
            cells = list(self.cells())
            self._attribute(cells)
            claims.agree(json.dumps([self.result["config"], [key for key, _ in cells]]))
            hidden = claims.rank > 0 or not self.progress
            self._bar = tqdm(total=len(cells), unit="cell", disable=hidden, leave=False)
            stack.enter_context(self._bar)
            with self._watched(cells, claims):
                self._compute(cells, claims)
                claims.leave()
                if claims.rank == 0:
                    for _ in claims.waiting():
                        pass
            self.remaining = self._join(cells, claims) if claims.rank == 0 else 0
        return self.result

    def holds(self, key: Key) -> bool:
        """Whether the result has the cell."""
        cells = self.result
        for part in key:
            if part not in cells:
                return False
            cells = cells[part]
        return True

    def saved(self, key: Key) -> None:
        """Put away what was kept to compute a cell again, which is in a file now."""

    def note(self, text: str) -> None:
        """Say beside the progress bar what is running."""
        self._bar.set_postfix_str(text)

    def _compute(self, cells: Sequence[Cell], claims: Claims) -> None:
        """Compute and write the cells that are nowhere, and that no other process computes."""
        longest = 0.0
        for number in claims.order(len(cells)):
            if self._deadline is not None and time.monotonic() + longest > self._deadline:
                break
            key, compute = cells[number]
            if self.holds(key):
                self.saved(key)
            elif claims.claim(number):
                seconds = self._compute_one(number, key, compute, claims)
                longest = max(longest, seconds)
            if claims.size == 1:
                self._bar.update()

    def _compute_one(
        self, number: int, key: Key, compute: Callable[[], Any], claims: Claims
    ) -> float:
        """Compute and write a cell; the seconds that it took."""
        self._place(key)  # cells may look at those beside them
        started = time.monotonic()
        try:
            found = compute()
            check_finite(found)
        except Exception as error:
            if claims.size == 1 and not isinstance(error, NotFiniteError):
                raise
            # What the command line shows as one line stays so.
            kind = ValueError if isinstance(error, (ValueError, OSError)) else RuntimeError
            who = "" if claims.size == 1 else f"process {claims.rank}, "
            raise kind(f"{who}cell {'/'.join(key)}: {error}") from error
        seconds = time.monotonic() - started
        self._put(key, found, seconds, self.provenance)
        if claims.size == 1:
            save(self.path, self.result)
        else:
            piece = {"key": key, "found": found, "seconds": seconds}
            save(self._pieces / f"{number:05d}.json", self.header() | piece)
        self.saved(key)
        return seconds

    def _place(self, key: Key) -> dict[str, Any]:
        """The part of the result that a cell stands in, made if there is none."""
        place = self.result
        for part in key[:-1]:
            place = place.setdefault(part, {})
        return place

    def _put(self, key: Key, found: Any, seconds: float, source: dict[str, Any]) -> None:
        """Take up a cell, what it cost, and its provenance, which becomes the result's."""
        self._place(key)[key[-1]] = found
        if self.timed:
            self.result["seconds"] = round(self.result.pop("seconds", 0.0) + seconds, 1)
        self._makers["/".join(key)] = source
        self._sources = [*(other for other in self._sources if other != source), source]
        self._name_sources()

    def _attribute(self, cells: Sequence[Cell]) -> None:
        """Note who has made the cells that the result file held."""
        for key, _ in cells:
            if self._of_file is not None and self.holds(key):
                self._makers.setdefault("/".join(key), self._of_file)
        if self._sources:
            self._name_sources()

    def _name_sources(self) -> None:
        """Say in the result who has made it: its provenance, and which cells others have made."""
        *others, self.result["provenance"] = self._sources
        self.result.pop("earlier", None)
        for other in others:
            cells = [name for name, source in self._makers.items() if source == other]
            entry = other | ({"cells": cells} if cells else {})
            self.result.setdefault("earlier", []).append(entry)

    # --- Many processes ---

    @property
    def _pieces(self) -> Path:
        """Directory of the cells that several processes have finished, a file each."""
        return self.path.with_suffix(".cells")

    @contextlib.contextmanager
    def _watched(self, cells: Sequence[Cell], claims: Claims) -> Iterator[None]:
        """Have the bar count what all processes finish, also while this one is at a cell."""
        known, old = sum(self.holds(key) for key, _ in cells), set(self._pieces.glob("*.json"))
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(1.0):
                self._bar.n = known + len(set(self._pieces.glob("*.json")) - old)
                self._bar.refresh()

        if claims.size > 1 and not self._bar.disable:
            threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _take_pieces(self) -> None:
        """Take over the cells that are in files of their own."""
        for path in sorted(self._pieces.glob("*.json")):
            piece = load(path)
            self._check(piece, path)
            if not self.holds(key := tuple(piece["key"])):
                self._put(key, piece["found"], piece["seconds"], piece["provenance"])

    def _join(self, cells: Sequence[Cell], claims: Claims) -> int:
        """Write the result file with all cells, in the order in which one process computes them.

        Returns:
            How many cells nobody has computed, for lack of time; then they all stay where they are.

        Raises:
            ValueError: if a cell was computed, but is in no file.
        """
        for _ in range(_PATIENCE + 1):  # with file systems that show files of other machines late
            self._take_pieces()
            missing = [number for number, (key, _) in enumerate(cells) if not self.holds(key)]
            if not missing:
                break
            if any([claims.claim(number) for number in missing]):
                return len(missing)
            time.sleep(1.0)
        else:
            names = ", ".join("/".join(cells[number][0]) for number in missing)
            raise ValueError(
                f"cells {names} were computed, but are not in {self._pieces}; let --output be a "
                "directory that all machines share, and run again"
            )
        if not self._pieces.exists():
            return 0
        placed: set[Key] = {(part,) for part in self.parts}
        for key, _ in cells:
            place = self.result
            for depth, part in enumerate(key, 1):
                if key[:depth] not in placed:
                    placed.add(key[:depth])
                    place[part] = place.pop(part)
                place = place[part]
        for last in ("seconds", "earlier"):
            if last in self.result:
                self.result[last] = self.result.pop(last)
        save(self.path, self.result)
        shutil.rmtree(self._pieces)
        return 0

    def header(self) -> dict[str, Any]:
        """What a result is of."""
        return {
            "study": self.kind,
            "name": self.name,
            "config": json.loads(json.dumps(dataclasses.asdict(self.config))),  # type: ignore[call-overload]
            "weights": self.weights,
            **({} if self.metric is None else {"metric": self.metric}),
            "command": self.command_line(),
            "provenance": self.provenance,
        }

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """Of the cells that this run computes; a result lists those of earlier ones as well."""
        return provenance(self.device)

    def _resume(self) -> None:
        """Take over what earlier runs have left, be it a result file or cells in files."""
        self._sources, self._makers, self._of_file = [], {}, None
        if self.path.exists():
            earlier = load(self.path)
            self._check(earlier, self.path)
            kept = self.header().keys() - {"provenance"}
            self.result |= {key: part for key, part in earlier.items() if key not in kept}
            for other in earlier.get("earlier", []):
                source = {key: part for key, part in other.items() if key != "cells"}
                self._sources.append(source)
                self._makers |= dict.fromkeys(other.get("cells", ()), source)
            self._sources.append(earlier["provenance"])
            # Earlier versions did not say whose each cell is.
            if all("cells" in other for other in earlier.get("earlier", [])):
                self._of_file = earlier["provenance"]
        self._take_pieces()

    def _check(self, earlier: dict[str, Any], path: Path) -> None:
        for key in ("study", "config", "weights"):
            if earlier.get(key) != self.result[key]:
                raise ValueError(
                    f"{path} belongs to another run (its {key} differs); "
                    "move it away, or choose another output directory"
                )


def encoder_attack(vae: VAE, radius: float, num_restarts: int = 1) -> attacks.PGD:
    """The paper's attack on the encoder, in an L_inf ball."""
    objective = attacks.symmetric_kl(vae)
    return attacks.PGD(objective, Linf(radius), num_restarts=num_restarts, preset="paper")


def check_column(images: data.Images, column: int) -> None:
    """Raise a ``ValueError`` if images have no label of this number."""
    number = 1 if images.labels.dim() == 1 else images.labels.shape[1]
    if column >= number:
        raise ValueError(f"column={column!r} must be below {number}, the labels of {images!r}")


def interval(
    values: Tensor,
    image: Tensor | None = None,
    statistic: str = "mean",
    bounds: tuple[float, float] | None = None,
) -> dict[str, float]:
    """Estimate and bootstrap interval over images; with ``image``, restarts of one are resampled
    together. ``bounds`` as for :func:`~pyro_vae_defence.metrics.bootstrap_interval`."""
    seeded = torch.Generator().manual_seed(0)
    rows = None if image is None else image.cpu()
    found = metrics.bootstrap_interval(
        values.cpu(), rows, statistic=statistic, generator=seeded, bounds=bounds
    )
    return found.to_dict()


def middle(values: Tensor) -> Tensor:
    """Median over the first dimension, of what is a number: of the middle two the mean, where
    torch's is the lower one."""
    return (values.nanmedian(0).values - (-values).nanmedian(0).values) / 2


def share(values: Tensor, image: Tensor | None = None) -> dict[str, float]:
    """:func:`interval` of what lies in [0, 1], such as an accuracy."""
    return interval(values, image, bounds=(0.0, 1.0))


def similarity(x: Tensor, y: Tensor, image: Tensor | None = None) -> dict[str, float]:
    """:data:`METRIC` of reconstructions in pairs, with its interval over images."""
    return interval(metrics.ms_ssim(x.cpu(), y.cpu(), variant=VARIANT), image)


def accuracy(found: Tensor, right: Tensor, reference: Tensor) -> dict[str, dict[str, float]]:
    """How often classes found are right, and how often the reference's; these may be longer."""
    some = slice(len(found))
    return {
        "correct": share(metrics.correct(found, right[some])),
        "unchanged": share(metrics.adversarial_accuracy(reference[some], found)),
    }


def cost(outcome: Any) -> dict[str, Any]:
    """What a defence's result has cost, and what it was made with."""
    return {
        "gradients_per_image": float(outcome.num_gradients.double().mean()),
        "seconds_per_image": outcome.seconds / len(outcome.x),
        "settings": outcome.settings,
    }


def chain_statistics(stats: dict[str, Tensor]) -> dict[str, float]:
    """Acceptance, divergences and last step size of chains; nothing where there were none."""
    if "acceptance_rate" not in stats:  # searches of a mode have energies alone
        return {}
    return {
        "acceptance_rate": float(stats["acceptance_rate"].mean()),
        "divergences": int(stats["diverging"].sum()),
        "step_size_last": float(stats["step_size"][:, -1].mean()),
    }


class NotFiniteError(ValueError):
    """What was measured is infinite or NaN, which no result file takes."""


def check_finite(found: Any, place: str = "") -> None:
    """:class:`NotFiniteError` naming a number that is infinite or NaN, within what a cell holds."""
    if isinstance(found, Mapping):
        for name, part in found.items():
            check_finite(part, f"{place}/{name}" if place else str(name))
    elif isinstance(found, (list, tuple)):
        for part in found:
            check_finite(part, place)
    elif isinstance(found, float) and not math.isfinite(found):
        raise NotFiniteError(f"{place or 'what was measured'} is {found}; nothing was written")


# --- Result files and pages -----------------------------------------------------------------------


def check_place(path: Path) -> None:
    """Raise an ``OSError`` that names the file if it cannot be written; its directory is made."""
    try:
        check_writable(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    write_json(path, result, indent=1)


def load(path: Path, run: str = "the experiment") -> dict[str, Any]:
    """One result file; ``run`` is what would make it again.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"result file {path} is damaged ({error}); move it away and run {run} again"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no result file: it holds a {type(found).__name__}")
    return found


def read(directory: _Path, run: str = "an experiment") -> dict[str, dict[str, Any]]:
    """The result files of a directory by file name, in order; ``run`` is what would make some.

    Raises:
        ValueError: if there is none, or one is damaged.
    """
    files = sorted(Path(directory).glob("*.json"))
    if not files:
        raise ValueError(f"no result files (*.json) in {directory}; run {run} first")
    return {path.stem: shown(path, run) for path in files}


def shown(path: Path, run: str = "the experiment") -> dict[str, Any]:
    """One result file as pages show it; arguments and errors as of :func:`load`."""
    found = load(path, run)
    config = found.get("config", {})
    number = config.get("num_images") or config.get("num_references") or 0
    _give_width(found, number, config.get("num_noise", number), False)
    if found.get("study") == "robustness":
        blocks = (part for parts in found.get("blocks", {}).values() for part in parts.values())
        for report in (*found.get("reports", {}).values(), *blocks):
            _take_least(report)
    return found


def _take_least(report: dict[str, Any]) -> None:
    """Give a report the figure of its strongest single attack where that is less than its worst
    case, which earlier versions chose by few draws alone."""
    strongest = min(report["attacks"], key=lambda each: each["figure"]["estimate"], default=None)
    worst_case = report["robust"]["mean"]["estimate"]
    if strongest is None or strongest["figure"]["estimate"] >= worst_case:
        return
    report["robust"]["mean"] = strongest["figure"]
    values = report.get("values", {})
    place = f"attacks/{strongest['name']}/{strongest['num_draws']}"
    if place in values:
        values["robust/mean"] = values[place]
    else:
        report["per_image"] = []  # not kept: nothing is paired with it


_FIGURES = {"robust", "clean", "undefended_clean", "random_noise", "attacks"}
_OF_PAIRS = {"auroc", "fpr_at_tpr"}


def _give_width(entry: Any, number: int, noise: int, is_share: bool) -> None:
    """Give intervals of no width a width, of what is 0 or 1 on all images, in result files that
    earlier versions have written: those of :func:`share`, and of
    :func:`~pyro_vae_defence.metrics.detection_interval`.

    Args:
        entry: what a result holds, changed in place.
        number: of the images that were classified, which a cell of ``compare`` says itself.
        noise: how many of them were classified with noise, at most.
        is_share: whether it is of what lies in [0, 1].
    """
    if isinstance(entry, list):
        for each in entry:
            _give_width(each, number, noise, is_share)
    if not isinstance(entry, dict):
        return
    if "estimate" in entry:
        value = entry["estimate"]
        number = entry.get("num_images") or number
        if is_share and number and value in (0, 1) and entry.get("low") == entry.get("high"):
            entry["low"], entry["high"] = unseen_reach(value, number)
        return
    number = entry.get("num_classified", number)
    shares = {"correct", "unchanged", *_OF_PAIRS}
    if entry.get("figure") == "accuracy":
        shares |= _FIGURES
    elif entry.get("study") == "compare":
        shares |= {"clean"}
    for key, part in entry.items():
        of = min(number, noise) if key in ("noise", "against_noise") else number
        of = of // 2 if key in _OF_PAIRS else of
        _give_width(part, of, noise, is_share or key in shares)


def check_pages(directory: _Path, images: _Path | None = None) -> None:
    """Find out before a run what would keep :func:`write_pages` from writing after it.

    Raises:
        OSError: if tables or figures cannot be written.
        ValueError: if the directory holds a damaged result file.
    """
    directory = Path(directory)
    check_place(directory / "tables.md")
    if images is not None:
        check_place(Path(images) / "figure.png")
    for path in sorted(directory.glob("*.json")):
        load(path)


def write_pages(
    studies: Mapping[str, type[Measurement[Any]]],
    directory: _Path,
    images: _Path | None = None,
    run: str = "an experiment",
    skip_foreign: bool = False,
) -> list[Path]:
    """Write ``tables.md`` beside the result files of a directory, their figures, and further pages.

    Args:
        studies: studies by :attr:`Measurement.kind`.
        directory: of the result files; a section of ``tables.md`` each.
        images: directory of the figures, ``KIND_FILE_WHAT.png``; ``images`` below the results by
            default.
        run: what would make result files.
        skip_foreign: leave out files of no study, instead of refusing them.

    Returns:
        What was written, the tables first.

    Raises:
        ValueError: if the directory holds no result file, a damaged one, or one of no study.
    """
    results = read(directory, run)
    if skip_foreign:
        results = {name: found for name, found in results.items() if found.get("study") in studies}
    directory = Path(directory)
    images = directory / "images" if images is None else Path(images)
    sections, drawn = [], []
    by_study: dict[type[Measurement[Any]], dict[str, dict[str, Any]]] = {}
    for name, result in results.items():
        if result.get("study") not in studies:
            raise ValueError(f"{directory / name}.json is no result of a study; move it away")
        study = studies[result["study"]]
        by_study.setdefault(study, {})[name] = result
        links = []
        for what, figure in study.figures(result).items():
            target = images / ("_".join(filter(None, (study.kind, name, what))) + ".png")
            save_figure(figure, target)
            links.append(Path(os.path.relpath(target, directory)).as_posix())
            drawn.append(target)
        sections.append(study.section(result, links))
    tables = directory / "tables.md"
    write_atomically(tables, "\n".join(sections).encode())
    more = [path for study, found in by_study.items() for path in study.pages(found, directory)]
    return [tables, *drawn, *more]
