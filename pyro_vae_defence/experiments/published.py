"""The paper's own protocol on a trained model: its attacks, its defence, its counting.

Appendix D.2 and Table 8, as the published code has them.

Class-stratified references are attacked from several starts by 50 steps of the published PGD,
through the encoder (symmetric KL) and through each classifier of the guide's means (cross-entropy).
Every start counts. Behind the published chain the last draw is decoded and classified; without it
one draw of the guide is decoded, and its mean classified. A *cell* is one set of images, without or
behind the chain, and holds

- ``ms_ssim``: similarity of the reference's reconstruction, one undefended draw, and the cell's;
- ``ms_ssim_images``: of the references and the cell's images themselves;
- ``mse``: of the cell's reconstruction from the reference, per pixel on the scale 0..255;
- ``accuracy``: per classifier how often the class is the label, and how often it is the one that
  the undefended model gives the reference,

each with a 95% interval and a standard error over references, whose starts belong together. One
chain answers for every number of transitions below its own, since its step size adapts to the end
in any case: ``transitions`` of a cell has the same measures where the chain began and on its way.

On a GPU transitions are captured, with forces in TF32 and energies in float32, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from pyro_vae_defence import attacks, metrics, plots
from pyro_vae_defence.defence import MCMCDefence, NoDefence
from pyro_vae_defence.defence.mcmc import PAPER_SETTINGS
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments import study, tables
from pyro_vae_defence.experiments.classify import CLASSIFIERS, classifiers_of
from pyro_vae_defence.experiments.defences import PaperName, check_published
from pyro_vae_defence.experiments.drawing import interval_curve, legend_below, new_figure
from pyro_vae_defence.experiments.study import METRIC, VARIANT, Cell, Measurement
from pyro_vae_defence.experiments.train import DATASETS, MODELS
from pyro_vae_defence.mcmc.captured import Graph
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import LinearClassifier
from pyro_vae_defence.models.compiled import Recorder
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.types import Latents

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENCODER = "encoder"
"""What is attacked where it is no classifier; these go by what they predict."""

_Counts = tuple[conf.Natural, ...]
_AttackRadii = tuple[conf.AttackRadius, ...]


@dataclass(frozen=True)
class PublishedConfig(conf.Configuration):
    """The published attacks and the published defence of a trained model.

    Args:
        model: name of a trained VAE; its classifiers are found by name.
        dataset: name of its images; those it was trained on when ``None``.
        paper: whose published setting the defence is; the dataset's when ``None``.
        radii: L_inf radii of the attacks, in units of the image range; without any there is no
            chain.
        undefended_radii: further radii of the attack on the encoder, without the chain.
        num_references: class-stratified test images.
        num_restarts: attacks per reference; all of them count, not the worst.
        attack_steps: of an attack.
        num_transitions: after how many the chain is read; the T // 2 + T of the published code when
            ``None``.
        transitions: after how many it is read as well; it runs to the largest of all.
        num_examples: of the first references, how many are kept as pictures.
        seed: seed of references, attacks and defences.
    """

    model: str
    dataset: conf.Dataset | None = None
    paper: PaperName | None = None
    radii: _AttackRadii = (0.1, 0.2)
    undefended_radii: _AttackRadii = ()
    num_references: conf.Several = 50
    num_restarts: conf.Count = 10
    attack_steps: conf.Count = 50
    num_transitions: conf.Count | None = None
    transitions: _Counts = (0, 5, 20, 50, 100, 200, 500)
    num_examples: Annotated[int, conf.between(0, 8)] = 5
    seed: conf.Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_above(num_examples="num_references")
        if not self.radii + self.undefended_radii:
            raise ValueError("radii and undefended_radii are both empty; name an attack's radius")
        if twice := set(self.radii) & set(self.undefended_radii):
            raise ValueError(f"undefended_radii holds {min(twice)!r}, which is one of radii")


def _names() -> dict[str, PublishedConfig]:
    """Tables 2, 3 and 4; longer chains (Figures 6 and 15); more radii (Figures 13 and 14)."""
    counts = (0, 5, 10, 20, 50, 100, 150, 200, 300, 500, 750, 1000, 1500, 2000)
    radii = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    names = {
        name: PublishedConfig(name)
        for name, config in MODELS.items()
        if config.dataset in DATASETS and config.architecture is None
    }
    for dataset in DATASETS:
        plain = names[f"{dataset}_vae"]
        names[f"{dataset}_transitions"] = replace(plain, radii=(0.1,), transitions=counts)
        names[f"{dataset}_radii"] = replace(plain, radii=(), undefended_radii=radii)
    return names


class Published(Measurement[PublishedConfig]):
    """The paper's protocol by the name of the model; its curves by the dataset and what varies."""

    kind = command = "published"
    noun = "model or curve"
    names = _names()
    output = "runs/published"
    parts = ("radii",)

    def load(self) -> None:
        """The model, its classifiers by what they predict, and references of every start.

        Raises:
            ValueError: for a published setting that is not known.
        """
        config = self.config
        self.vae, card = self.load_conv_vae(config.model)
        self.paper = config.paper or card.dataset.removesuffix("_subset")
        check_published(self.paper)
        # What is predicted -> the column of labels, and what predicts it.
        self.tasks: dict[str, tuple[int, LinearClassifier]] = {
            task: (CLASSIFIERS[name].column, self.load_classifier(name))
            for task, name in classifiers_of(config.model).items()
        }
        dataset = config.dataset or card.dataset
        self.x_ref, labels = self.choose(dataset, config.num_references, "references")
        self.index = torch.arange(len(self.x_ref)).repeat(config.num_restarts)
        self.references, self.labels = self.x_ref[self.index], labels[self.index]

    def cells(self) -> Iterator[Cell]:
        """The references, then attacks by radius and by what they go through; each twice."""
        config = self.config
        for radius, what, name in _keys(config.radii, config.undefended_radii, self.tasks):
            yield ("radii", f"{radius:g}", what, name), partial(self.cell, radius, what, name)

    @classmethod
    def complete(cls, result: dict[str, Any]) -> bool:
        """Whether a result file has all cells of its configuration."""
        config = result["config"]
        tasks = classifiers_of(config["model"])
        keys = _keys(config["radii"], config["undefended_radii"], tasks)
        return all(
            tables.at(result, f"radii/{radius:g}/{what}/{name}") for radius, what, name in keys
        )

    def cell(self, radius: float, what: str, name: str) -> dict[str, Any]:
        """One set of images, without or behind the chain."""
        return self.undefended(radius, what) if name == "none" else self.behind(radius, what)

    # --- Images ---

    @study.remembered
    def attacked(self, radius: float, what: str) -> Tensor:
        """References attacked from every start, ``(starts * N, C, H, W)``, themselves at 0."""
        if radius == 0:
            return self.references
        if what == ENCODER:
            objective = attacks.symmetric_kl(self.vae)
        else:
            objective = attacks.cross_entropy(self.vae, self.tasks[what][1])
        config = self.config
        attack = attacks.PGD(
            objective, Linf(radius), config.attack_steps, config.num_restarts, preset="paper"
        )
        return attack(self.x_ref, self.generator("attack", what)).flat().images

    @cached_property
    def before(self) -> Tensor:
        """Undefended reconstructions of the references, which all others are compared with."""
        return self.reconstruct(self.vae, self.references, "before")

    @cached_property
    def predicted(self) -> dict[str, Tensor]:
        """Classes that the undefended model gives the references."""
        tasks = self.tasks.items()
        return {task: found.classify(self.vae, self.references) for task, (_, found) in tasks}

    # --- Cells ---

    def undefended(self, radius: float, what: str) -> dict[str, Any]:
        """A draw of the guide, decoded, and its mean, classified."""
        x = self.attacked(radius, what)
        outcome = NoDefence(self.vae)(x, self.generator("undefended", f"{radius:g}", what))
        classes = {task: found.classify(self.vae, x) for task, (_, found) in self.tasks.items()}
        return {
            "ms_ssim_images": self.similarity(self.references, x),
            **self.measures(outcome.reconstruction, classes),
            **self.pictures(x, outcome.reconstruction),
        }

    def behind(self, radius: float, what: str) -> dict[str, Any]:
        """Where the chain begins, on its way, and where it is read."""
        x = self.attacked(radius, what)
        outcome = self.defence(x, self.generator("chain", f"{radius:g}", what))
        made = outcome.samples.items()
        draws = {site: torch.cat([outcome.initial[site], value[0]]) for site, value in made}
        read = {count: self.at(lat.index(draws, count)) for count in self.counts}
        decoded = self.decode(lat.index(draws, self.count))
        return {
            **read[self.count],
            "transitions": {str(count): found for count, found in read.items()},
            **study.cost(outcome),
            **study.chain_statistics(outcome.sample_stats),
            **self.pictures(x, decoded),
            "num_transitions": self.count,
        }

    @classmethod
    def num_gradients(cls, config: PublishedConfig) -> int:
        """Decoder gradients of all chains of a configuration, all rows together."""
        dataset = MODELS[config.model].dataset
        paper = config.paper or dataset
        length = max(*config.transitions, _count(config, paper))
        sets = 1 + len(config.radii) * (1 + len(classifiers_of(config.model)))
        rows = config.num_references * config.num_restarts
        chains = rows * sets if config.radii else 0
        return chains * (1 + length * PAPER_SETTINGS[paper].num_steps)

    @property
    def count(self) -> int:
        """After how many transitions the chain is read."""
        return _count(self.config, self.paper)

    @property
    def counts(self) -> list[int]:
        """All numbers of transitions at which it is looked at."""
        return sorted({*self.config.transitions, self.count})

    @cached_property
    def defence(self) -> MCMCDefence:
        """The published one, of which every draw is kept."""
        return replace(
            MCMCDefence.paper(self.vae, self.paper),
            num_samples=max(1, *self.counts),
            warmup_steps=0,
            keep_draws=None,
            prepare=on_device(self.device),
            progress=self.progress,
        )

    @torch.no_grad()
    def decode(self, latents: Latents) -> Tensor:
        """Reconstructions of latents, as those of a defence."""
        return program.decode(self.vae, latents, tuple(self.x_ref.shape[1:])).clamp(0, 1)

    def at(self, latents: Latents) -> dict[str, Any]:
        """The measures of one draw of every chain."""
        with torch.no_grad():
            classes = {task: found(latents).argmax(-1) for task, (_, found) in self.tasks.items()}
        return self.measures(self.decode(latents), classes)

    def measures(self, reconstruction: Tensor, classes: dict[str, Tensor]) -> dict[str, Any]:
        """What a cell says of reconstructions and predicted classes."""
        accuracy = {
            task: {
                "correct": self.estimate(
                    metrics.correct(found, self.labels[:, self.tasks[task][0]]), study.share
                ),
                "unchanged": self.estimate(
                    metrics.adversarial_accuracy(self.predicted[task], found), study.share
                ),
            }
            for task, found in classes.items()
        }
        return {
            "ms_ssim": self.similarity(self.before, reconstruction),
            "mse": self.estimate(metrics.mse(self.references, reconstruction)),
            "accuracy": accuracy,
        }

    def similarity(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """:data:`METRIC` of images in pairs."""
        return self.estimate(metrics.ms_ssim(x, y, variant=VARIANT))

    def estimate(
        self, values: Tensor, interval: Callable[[Tensor], dict[str, float]] = study.interval
    ) -> dict[str, float]:
        """Mean, interval and standard error over references, from one value per start."""
        of_reference = values.cpu().double().reshape(self.config.num_restarts, -1).mean(0)
        error = of_reference.std() / len(of_reference) ** 0.5
        return {**interval(of_reference), "standard_error": float(error)}

    def pictures(self, x: Tensor, reconstruction: Tensor) -> dict[str, Any]:
        """References, their reconstructions, the cell's images and theirs, of the first ones."""
        some = slice(self.config.num_examples)
        if not self.config.num_examples:
            return {}
        rows = (self.references, self.before, x, reconstruction)
        return {"examples": plots.picture([images[some] for images in rows])}

    # --- Tables and figures ---

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """A row per set of images, then one per number of transitions."""
        columns, tasks = ["", "", METRIC, "mse"], _tasks(result)
        columns += [f"{what} ({task})" for task in tasks for what in ("unchanged", "correct")]
        rows = [
            [_words(radius, what), "HMC" if name == "hmc" else "no defence", *_row(cell, tasks)]
            for radius, what, cells in _by_set(result)
            for name, cell in cells.items()
        ]
        lines = tables.table(columns, rows)
        curve = [
            [_words(radius, what), count, *_row(found, tasks)]
            for radius, what, cells in _by_set(result)
            for count, found in cells.get("hmc", {}).get("transitions", {}).items()
        ]
        if curve:
            columns[1] = "transitions"
            lines += tables.folded("After fewer transitions", tables.table(columns, curve))
        lines += [f"![Measures over transitions and radii]({figure})\n" for figure in figures]
        return tables.section(f"### published {result['name']}", note(result), lines, result)

    @classmethod
    def figures(cls, result: dict[str, Any]) -> dict[str, Figure]:
        """Measures over the number of transitions; similarities over radii, and images."""
        drawn = {}
        found = [
            (radius, what, cells["hmc"]["transitions"])
            for radius, what, cells in _by_set(result)
            if "hmc" in cells
        ]
        if found:
            drawn["transitions"] = transitions_figure(found)
        over = {
            float(radius): cells["none"]
            for radius, what, cells in _by_set(result)
            if what == ENCODER and "none" in cells
        }
        if len(over) > 3:
            drawn["radii"] = radii_figure(dict(sorted(over.items())))
        return drawn


def _keys(
    radii: Sequence[float], undefended: Sequence[float], tasks: Iterable[str]
) -> Iterator[tuple[float, str, str]]:
    """Radius, what is attacked, and defence of all cells."""
    sets = [(0.0, ENCODER)]
    sets += [(radius, what) for radius in radii for what in (ENCODER, *tasks)]
    for radius, what in sets:
        for name in ("none", "hmc") if radii else ("none",):
            yield radius, what, name
    for radius in undefended:
        yield radius, ENCODER, "none"


def _count(config: PublishedConfig, paper: str) -> int:
    published = PAPER_SETTINGS[paper].num_transitions
    return config.num_transitions or published // 2 + published


def on_device(device: torch.device) -> Graph | Recorder:
    """How long chains are run there: exactly, and without the model's Python at every gradient."""
    return Graph(force_dtype="tf32") if device.type == "cuda" else Recorder()


def note(result: dict[str, Any]) -> str:
    """What was done, in words, from a result file."""
    config = result["config"]
    return (
        f"{references_of(result)}, all of them counted, {config['attack_steps']} steps of the "
        f"published PGD; model `{config['model']}`, seed {config['seed']}. The published HMC, "
        "whose last draw is decoded and classified; without it one draw is decoded and the "
        f"guide's mean classified.{fallback(result)} 95% intervals over references. "
        "*Unchanged* compares with the class of the undefended reference. Attacks do not know the "
        "defence."
    )


def references_of(result: dict[str, Any]) -> str:
    """How many references a result is of, where they are from, and how often each is attacked."""
    config = result["config"]
    images = f"the full test set of `{MODELS[config['model']].dataset}`"
    if name := config["dataset"]:
        images = f"`{name}`, not of the full test set"
    number, starts = config["num_references"], config["num_restarts"]
    return f"{number} class-stratified references of {images}, from {starts} starts each"


def fallback(result: dict[str, Any]) -> str:
    """On which GPU a result was computed, if on one, and what kept chains from replaying
    transitions there."""
    said = ""
    if device := result["provenance"].get("device"):
        said = f" Run on one {device}."
    settings = [cells["hmc"].get("settings", {}) for *_, cells in _by_set(result) if "hmc" in cells]
    why = {each["prepare_why_not"] for each in settings if "prepare_why_not" in each}
    if why:
        said += f" Without captured or recorded transitions: {'; '.join(sorted(why))}."
    return said


def _by_set(result: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Radius, what was attacked, and cells without and behind the chain, as far as there are."""
    for radius, sets in result["radii"].items():
        for what, cells in sets.items():
            if cells:
                yield radius, what, cells


def _tasks(result: dict[str, Any]) -> list[str]:
    """What the classifiers of a result predict."""
    return next((list(one["accuracy"]) for *_, c in _by_set(result) for one in c.values()), [])


def _words(radius: str, what: str) -> str:
    if radius == "0":
        return "references"
    return f"radius {radius}, through the {what if what == ENCODER else f'classifier ({what})'}"


def _row(entry: dict[str, Any], tasks: list[str]) -> list[str]:
    cells = [tables.interval(entry["ms_ssim"]), tables.interval(entry["mse"], 1)]
    places = [f"accuracy/{task}/{what}" for task in tasks for what in ("unchanged", "correct")]
    return cells + tables.intervals(entry, *places, digits=2)


def transitions_figure(found: list[tuple[str, str, dict[str, Any]]]) -> Figure:
    """Similarity and unchanged classes over the number of transitions (Figures 6 and 15)."""
    figure = new_figure(8, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    for radius, what, read in found:
        counts = [int(count) for count in read]
        task = "class" if what == ENCODER else what
        for axes, place in zip(panels, ("ms_ssim", f"accuracy/{task}/unchanged"), strict=True):
            entries = [tables.at(entry, place) for entry in read.values()]
            interval_curve(axes, counts, entries, _words(radius, what))
    for axes, title in zip(panels, (METRIC, "class unchanged"), strict=True):
        axes.set(xlabel="transitions", title=title, ylim=(0, 1.02))
        axes.set_xscale("symlog", linthresh=5)
    legend_below(figure, panels[0], columns=2)
    return figure


def radii_figure(found: dict[float, dict[str, Any]]) -> Figure:
    """Similarity of images and of undefended reconstructions over the radius (Figure 13)."""
    figure = new_figure(5, 3.4)
    axes = figure.subplots()
    for place, text in (
        ("ms_ssim_images", "reference and attacked image"),
        ("ms_ssim", "their reconstructions, no defence"),
    ):
        interval_curve(axes, list(found), [cell[place] for cell in found.values()], text)
    axes.set(xlabel="radius of the attack", ylabel=METRIC, ylim=(0, 1.02))
    legend_below(figure, axes, columns=2)
    return figure
