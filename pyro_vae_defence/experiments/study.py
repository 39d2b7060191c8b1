"""What all studies share: weights, data, seeds, cells, result files and pages.

A study is one class in one file, read from its question to its tables: configuration, names of
configurations, what a cell computes, the section of a page. :class:`Study` gives it the rest:

- weights are loaded by name and recorded with their hashes;
- randomness has one rule, :meth:`Study.generator`: a purpose's draws depend on the seed and the
  purpose alone, not on what else ran before, in this process or an interrupted one;
- a *cell* is what is computed and written at once. Cells that the result file holds are not
  computed again; the file is written atomically after each;
- a result says what it is of: study, name, configuration, weights, command and provenance.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae_defence import data, metrics
from pyro_vae_defence.data.loading import Split
from pyro_vae_defence.defence import NoDefence
from pyro_vae_defence.experiments.configuration import override
from pyro_vae_defence.experiments.drawing import save_figure
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.classifier import load_classifier
from pyro_vae_defence.models.pretrained import TrainedVAE, WeightCard, load_card, load_pretrained
from pyro_vae_defence.ops.checks import check_device, check_positive
from pyro_vae_defence.ops.files import write_atomically
from pyro_vae_defence.ops.provenance import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

C = TypeVar("C")
R = TypeVar("R")

VARIANT = "paper"
METRIC = metrics.metric_name("ms_ssim", VARIANT)
"""The similarity of all studies."""

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
        self.device = check_device("device", device)
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

    def load_classifier(self, name: str) -> Any:
        """A trained classifier; its weights are recorded."""
        classifier, card = load_classifier(name, self.models)
        self.weights[name] = card.sha256
        return classifier.to(self.device)

    @remembered
    def images(self, dataset: str, split: Split = "test") -> data.Images:
        """A dataset, read once."""
        return data.load(dataset, split, self.root)

    def choose(
        self, dataset: str, number: int, purpose: str, split: Split = "test", column: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Class-stratified images ``(N, C, H, W)`` and their labels, ``(N, columns)``."""
        images = self.images(dataset, split)
        chosen = data.stratified(images, number, self.generator(purpose), column)
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

    @property
    def path(self) -> Path:
        """The result file."""
        return self.directory / f"{self.name}.json"

    def run(self) -> dict[str, Any]:
        """Compute the cells that the result file does not hold, within the time; the result.

        Raises:
            ValueError: for weights or data that are missing, or a result file of another run.
        """
        self.load()
        self._resume()
        cells = list(self.cells())
        longest, self.remaining = 0.0, 0
        with tqdm(cells, unit="cell", disable=not self.progress, leave=False) as self._bar:
            for key, compute in self._bar:
                began = time.monotonic()
                late = self._deadline is not None and began + longest > self._deadline
                if self.holds(key):
                    continue
                if late:
                    self.remaining += 1
                else:
                    self.cell(key, compute)
                    longest = max(longest, time.monotonic() - began)
        return self.result

    def holds(self, key: Key) -> bool:
        """Whether the result has the cell."""
        cells = self.result
        for part in key:
            if part not in cells:
                return False
            cells = cells[part]
        return True

    def note(self, text: str) -> None:
        """Say beside the progress bar what is running."""
        self._bar.set_postfix_str(text)

    def cell(self, key: Key, compute: Callable[[], Any]) -> Any:
        """What stands at ``key``, computed and written if nothing does."""
        cells = self.result
        for part in key[:-1]:
            cells = cells.setdefault(part, {})
        if key[-1] not in cells:
            cells[key[-1]] = compute()
            own = self.provenance
            if self.result["provenance"] != own:  # an earlier run's, whose cells are here too
                self.result.setdefault("earlier", []).append(self.result["provenance"])
                self.result["provenance"] = own
            save(self.path, self.result)
        return cells[key[-1]]

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
        """Take over what an earlier run has left in the result file, if there is one."""
        if not self.path.exists():
            return
        earlier = load(self.path)
        for key in ("study", "config", "weights"):
            if earlier.get(key) != self.result[key]:
                raise ValueError(
                    f"{self.path} belongs to another run (its {key} differs); "
                    "move it away, or choose another output directory"
                )
        kept = self.header().keys() - {"provenance"}
        self.result |= {key: part for key, part in earlier.items() if key not in kept}


def interval(
    values: Tensor, image: Tensor | None = None, statistic: str = "mean"
) -> dict[str, float]:
    """Estimate and bootstrap interval over images; with ``image``, restarts of one are resampled
    together."""
    seeded = torch.Generator().manual_seed(0)
    rows = None if image is None else image.cpu()
    found = metrics.bootstrap_interval(values.cpu(), rows, statistic=statistic, generator=seeded)
    return found.to_dict()


def similarity(x: Tensor, y: Tensor, image: Tensor | None = None) -> dict[str, float]:
    """:data:`METRIC` of reconstructions in pairs, with its interval over images."""
    return interval(metrics.ms_ssim(x.cpu(), y.cpu(), variant=VARIANT), image)


def accuracy(found: Tensor, right: Tensor, reference: Tensor) -> dict[str, dict[str, float]]:
    """How often classes found are right, and how often the reference's; these may be longer."""
    some = slice(len(found))
    return {
        "correct": interval(metrics.correct(found, right[some])),
        "unchanged": interval(metrics.adversarial_accuracy(reference[some], found)),
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


# --- Result files and pages -----------------------------------------------------------------------


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result file atomically."""
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def load(path: Path, run: str = "the experiment") -> dict[str, Any]:
    """One result file; ``run`` is what would make it again.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        found = json.loads(path.read_text())
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
    return {path.stem: load(path, run) for path in files}


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
