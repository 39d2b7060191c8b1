"""Every defence and control against the paper's encoder attack, over its radius: one result file
per dataset.

For each radius and defence a cell holds, with 95% intervals over images:

- the similarity of reconstructions before and after the attack, for one draw of the defence and for
  the mean of its draws;
- how often the class of the attacked image is the label, and how often it is the class that the
  *undefended* model gives the reference, a yardstick no defence can bend; the same for clean images
  and for random noise of the attack's radius;
- how well the chains tell attacked images from clean ones and from noise;
- gradients and seconds per image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence import attacks, metrics
from pyro_vae_defence.defence import (
    Defence,
    DefenceResult,
    DefendedClassifier,
    MCMCDefence,
    Reading,
    calibrate_radius,
    detection_scores,
)
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments import study, tables
from pyro_vae_defence.experiments.classify import CLASSIFIERS, LatentInputs, classifiers_of
from pyro_vae_defence.experiments.defences import (
    KINDS,
    Setting,
    chain_words,
    colour,
    defence_spec,
    known_defence,
    label,
    make_defence,
)
from pyro_vae_defence.experiments.drawing import interval_curve, legend_below, new_figure
from pyro_vae_defence.experiments.study import Cell, Key, Measurement
from pyro_vae_defence.experiments.train import DATASETS
from pyro_vae_defence.models import program
from pyro_vae_defence.models.perturbation import UnknownRadius
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNDEFENDED_READING = "guide's mean"

ADVISED = ("hmc", "aware_0.2")
"""What the table of verdicts compares with controls: neither knows the radius of the attack."""

RIVALS = {"hmc": "mode", "aware_0.2": "aware_mode"}
"""Chains, and what descends the same energy and runs none."""

PRICED = ("dark_clip", "extreme_clip", "mode", "aware_mode", "hmc", "aware_0.2", "aware_unknown")
"""What the table of costs has: all that the guide advises."""

PICTURED = {
    "defences": ("none", "hmc", "aware", "aware_0.2", "aware_unknown"),
    "controls": ("dark_clip", "extreme_clip", "median", "gaussian", "mode"),
}
"""Curves over the radius, at most five in a panel; the tables have all."""

CALIBRATION_RADII = (0.0, 0.05, 0.1, 0.2, 0.3)
CALIBRATION_IMAGES = 100
"""Radii of a defence that leaves it open, and clean validation images for its penalties."""

# Classifiers of means read means, or are shown what draws do to them; classifiers of draws read
# draws.
_READINGS: dict[str, tuple[Reading, ...]] = {
    "mean": ("last", "draws", "mean", "reencoded"),
    "guide": ("last", "draws"),
    "posterior": ("last", "draws"),
}


_Name = Annotated[str, known_defence(unknown_radius=True)]


@dataclass(frozen=True)
class CompareConfig(conf.Configuration):
    """Every defence and control against the encoder attack of the paper, over its radius.

    What assumes a radius assumes the attack's own, or that of its name, as in ``aware_0.1``.

    Args:
        model: name of a trained VAE; its classifiers are found by name.
        defences: what to compare, names of :mod:`~pyro_vae_defence.experiments.defences`.
        costs: what to compare at ``cost_radius`` by its cost as well.
        inputs: what the classifiers were trained on, ``mean`` among it; see
            :class:`~pyro_vae_defence.experiments.classify.ClassifierConfig`.
        reading: how classifiers read a defence in the main table, ``READING/INPUTS``; all readings
            are in the result.
        radii: L_inf radii of the attack, in units of the image range; 0 for no attack.
        full_radii: radii with all references, restarts and images; the others have those of the
            curve.
        num_references: class-stratified test images whose reconstructions are compared.
        num_restarts: attacks per reference; all of them count.
        num_images: class-stratified test images that are classified.
        num_noise: of these, with random noise of the attack's radius.
        curve_restarts: attacks per reference at the other radii.
        curve_images: images that are classified there.
        cost_radius: radius of the comparison by cost.
        chain: of the defences, but for names that fix their transitions.
        seed: seed of images, attacks and defences.
    """

    model: str
    defences: Annotated[tuple[_Name, ...], conf.not_empty] = (
        "none", "hmc", "aware", "aware_0.1", "aware_0.2", "aware_unknown", "aware_mode", "mode",
        "encoder_samples", "dark_clip", "dark_clip_0.2", "extreme_clip", "median", "gaussian",
    )  # fmt: skip
    costs: tuple[_Name, ...] = tuple(
        f"{kind}@{transitions}" for kind in ("hmc", "aware_0.2") for transitions in (4, 10, 20, 40)
    )
    inputs: tuple[LatentInputs, ...] = ("mean",)
    reading: str = "reencoded/mean"
    radii: Annotated[tuple[conf.Radius, ...], conf.not_empty] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    full_radii: tuple[conf.Radius, ...] = (0.1, 0.2)
    num_references: conf.Several = 50
    num_restarts: conf.Count = 10
    num_images: conf.Several = 1000
    num_noise: conf.Several = 200
    curve_restarts: conf.Count = 1
    curve_images: conf.Several = 100
    cost_radius: conf.Radius = 0.2
    chain: conf.ChainConfig = conf.ChainConfig()
    seed: conf.Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if "mean" not in self.inputs:
            why = "inputs must hold 'mean', whose classifier is the yardstick, got"
            raise ValueError(f"{why} {self.inputs}")
        known = [f"{how}/{inputs}" for inputs in self.inputs for how in _READINGS[inputs]]
        if self.reading not in known:
            raise ValueError(f"reading must be one of {', '.join(known)}, got {self.reading!r}")
        if strange := set(self.full_radii) - set(self.radii):
            raise ValueError(f"full_radii holds {min(strange)!r}, not one of radii={self.radii}")
        self.refuse_above(
            curve_restarts="num_restarts", curve_images="num_images", num_noise="num_images"
        )


class _Inputs(NamedTuple):
    """What is given to every defence at one radius: attacked references, which reference each is
    of and its undefended reconstruction; images to be classified by kind, and their labels."""

    x_adv: Tensor
    image: Tensor
    before: Tensor
    classified: dict[str, Tensor]
    labels: Tensor


class Compare(Measurement[CompareConfig]):
    """Defences and controls side by side, by the name of the dataset."""

    kind = command = "compare"
    noun = "comparison"
    names = {name: CompareConfig(f"{name}_vae") for name in (*DATASETS, "fashion_mnist_inverted")}
    # Attacked encodings start so far up there that a short chain without a burn-in ends on its way.
    names["color_mnist_textured"] = CompareConfig(
        "color_mnist_textured_vae", chain=conf.ChainConfig(step_size=0.2, burn_in=30)
    )
    output = "runs/compare"
    parts = ("clean", "noise_floor", "radii", "costs")

    def load(self) -> None:
        """The model, its classifiers by label and by what they were trained on, and images."""
        config = self.config
        self.vae, card = self.load_conv_vae(config.model)
        # Name of the label -> its column, and what it was trained on -> classifier.
        self.tasks: dict[str, tuple[int, dict[LatentInputs, Any]]] = {}
        for task, plain in classifiers_of(config.model).items():
            classifiers = {
                inputs: self.load_classifier(plain if inputs == "mean" else f"{plain}_{inputs}")
                for inputs in config.inputs
            }
            self.tasks[task] = CLASSIFIERS[plain].column, classifiers
        self.dataset = card.dataset
        self.references, _ = self.choose(self.dataset, config.num_references, "references")
        self.x, self.labels = self.choose(self.dataset, config.num_images, "images")
        self._clean: dict[tuple[Any, ...], DefenceResult] = {}

    def cells(self) -> Iterator[Cell]:
        """Undefended accuracies, noise floors, a cell per radius and defence, those of costs."""
        config = self.config
        # Where cells stand, the attack's radius, defences, all images or those of the curve.
        parts: list[tuple[Key, float, tuple[str, ...], bool]] = [
            (("radii", f"{radius:g}"), radius, config.defences, radius in config.full_radii)
            for radius in config.radii
        ]
        parts.append((("costs",), config.cost_radius, config.costs, False))
        for task in self.tasks:
            yield ("clean", task), partial(self.undefended_accuracy, task)
        for full in dict.fromkeys(full for _, _, names, full in parts if names):
            yield ("noise_floor", "full" if full else "curve"), partial(self.noise_floor, full)
        for place, radius, names, full in parts:
            for name in names:
                yield (*place, name), partial(self.defended, place, name, radius, full)

    def undefended_accuracy(self, task: str) -> dict[str, float]:
        """Accuracy of the undefended model on clean images."""
        column, _ = self.tasks[task]
        return study.share(metrics.correct(self._undefended(task, self.x), self.labels[:, column]))

    def noise_floor(self, full: bool) -> dict[str, float]:
        """Similarity of two undefended reconstructions of the same reference, one draw each."""
        references, image, before = self._repeated(full)
        return study.similarity(before, self.reconstruct(self.vae, references, "again"), image)

    def defended(self, place: Key, name: str, radius: float, full: bool) -> dict[str, Any]:
        """Everything about one defence at one radius; a copy of the cell at ``place`` that is of
        the same defence by another name, as ``aware`` is ``aware_0.1`` at 0.1."""
        resolved = _resolved(name, radius)
        for other, cell in tables.at(self.result, "/".join(place)).items():
            if _resolved(other, radius) == resolved:
                return cell
        inputs = self.inputs(radius, full)
        setting = Setting(self.vae, self.config.chain, None, radius, self.unknown_radius)
        defence = make_defence(name, setting)
        outcome = defence(inputs.x_adv, self.generator("similarity"))
        with torch.no_grad():
            mean = {site: value.mean((0, 1)) for site, value in outcome.samples.items()}
            decoded = program.decode(self.vae, mean, tuple(inputs.x_adv.shape[1:])).clamp(0, 1)
        runs = {}
        for kind, x in inputs.classified.items():
            # Clean images once, if the defence does not depend on the attack's radius.
            known = self._clean if kind == "clean" else {}
            key = (*resolved, len(x))
            if key not in known:
                known[key] = defence(x, self.generator("classify", kind))
            runs[kind] = known[key]
        entry = {
            "ms_ssim": study.similarity(inputs.before, outcome.reconstruction, inputs.image),
            "ms_ssim_of_mean": study.similarity(inputs.before, decoded, inputs.image),
            "accuracy": {
                task: self._accuracies(task, None if name == "none" else defence, runs, inputs)
                for task in self.tasks
            },
            **study.cost(outcome),
            "num_attacks": len(inputs.x_adv),
            "num_classified": len(inputs.labels),
        }
        if isinstance(defence, MCMCDefence) and "attacked" in runs:
            entry["detection"] = self._detection(defence, runs)
        return entry

    # --- Inputs ---

    @study.remembered
    def inputs(self, radius: float, full: bool) -> _Inputs:
        """Attacked references and images at a radius; the curve's are the first of all."""
        num_images = self.config.num_images if full else self.config.curve_images
        x = self.x[:num_images]
        x_adv, image, before = self._repeated(full)
        classified = {"clean": x}
        if radius > 0:
            restarts = len(image) // len(self.references)
            on_references = study.encoder_attack(self.vae, radius, restarts)
            x_adv = on_references(self.references, self.generator("attack")).flat().images
            on_images = study.encoder_attack(self.vae, radius)
            classified["attacked"] = on_images(x, self.generator("attack images")).x_adv[0]
            some = x[: self.config.num_noise]
            classified["noise"] = attacks.random_noise(some, Linf(radius), self.generator("noise"))
        return _Inputs(x_adv, image, before, classified, self.labels[:num_images])

    @study.remembered
    def _repeated(self, full: bool) -> tuple[Tensor, Tensor, Tensor]:
        """References restart after restart, which one each is, and undefended reconstructions."""
        config = self.config
        restarts = config.num_restarts if full else min(config.curve_restarts, config.num_restarts)
        image = torch.arange(len(self.references)).repeat(restarts)
        references = self.references[image]
        return references, image, self.reconstruct(self.vae, references, "before")

    @study.remembered
    def unknown_radius(self) -> UnknownRadius:
        """A radius left open, with penalties from clean validation images."""
        x, _ = self.choose(self.dataset, CALIBRATION_IMAGES, "calibration", "validation")
        return calibrate_radius(self.vae, x, CALIBRATION_RADII)

    # --- Parts of a cell ---

    def _accuracies(
        self, task: str, defence: Defence | None, runs: dict[str, DefenceResult], inputs: _Inputs
    ) -> dict[str, Any]:
        """Reading/classifier -> kind of image -> how often the class is right, how often kept."""
        column, classifiers = self.tasks[task]
        undefended = {kind: self._undefended(task, x) for kind, x in inputs.classified.items()}
        reference, right = undefended["clean"], inputs.labels[:, column]
        predictions = {UNDEFENDED_READING: undefended}
        if defence is not None:
            predictions = {}
            for trained_on, classifier in classifiers.items():
                for reading in _READINGS[trained_on]:
                    read = DefendedClassifier(defence, classifier, reading).log_probabilities
                    found = {kind: read(run).argmax(-1) for kind, run in runs.items()}
                    predictions[f"{reading}/{trained_on}"] = found
        return {
            reading: {
                kind: study.accuracy(found, right, reference) for kind, found in of_kind.items()
            }
            for reading, of_kind in predictions.items()
        }

    def _detection(self, defence: MCMCDefence, runs: dict[str, DefenceResult]) -> dict[str, Any]:
        """Score -> other images -> AUROC, and false positive rate at 95% of attacks caught."""
        variance = self.vae.mean_posterior_variance
        scores = {kind: detection_scores(defence, run, variance) for kind, run in runs.items()}

        def compare(metric: Any, score: str, kind: str) -> dict[str, float]:
            other = scores[kind][score]
            attacked = scores["attacked"][score][: len(other)]
            seeded = torch.Generator().manual_seed(0)
            return metrics.detection_interval(metric, other, attacked, generator=seeded).to_dict()

        measures = {"auroc": metrics.auroc, "fpr_at_tpr": metrics.fpr_at_tpr}
        return {
            score: {
                f"against_{kind}": {what: compare(of, score, kind) for what, of in measures.items()}
                for kind in ("clean", "noise")
            }
            for score in scores["attacked"]
        }

    def _undefended(self, task: str, x: Tensor) -> Tensor:
        return self.tasks[task][1]["mean"].classify(self.vae, x)

    # --- Tables and figures ---

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """Figures, a table per fully measured radius, ways of classifying, detection; between two
        comments, by which a page takes one dataset from the file of all."""
        config, name = result["config"], result["name"]
        clean = ", ".join(
            f"{task} {tables.interval(value)}" for task, value in result["clean"].items()
        )
        floor = next(iter(result["noise_floor"].values()), None)
        note = (
            f"Model `{config['model']}`; undefended accuracy on clean images: {clean}; noise floor "
            f"of {result['metric']}: {tables.interval(floor)}; seed {config['seed']}."
        )
        lines: list[str] = []
        for radius in config["full_radii"]:
            if cells := result["radii"].get(f"{radius:g}"):
                lines += _main_table(result, radius, cells)
                lines += _readings_tables(radius, cells)
                lines += _detection_table(radius, cells)
        texts = {f"compare_{name}_cost": _cost_text(result)}
        pictures = []
        for figure in figures:
            text = texts.get(Path(figure).stem) or _radius_text(result)
            pictures += [f"![{text}]({figure})", ""]
        whole = tables.section(f"## {name}", note, [*pictures, *lines], result)
        heading, _, rest = whole.partition("\n\n")
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        return f"{heading}\n\n{begin}\n\n{rest}\n{end}\n"

    @classmethod
    def pages(cls, results: dict[str, dict[str, Any]], directory: Path) -> list[Path]:
        """The verdicts on all datasets in one table, ``verdicts.md``, if there are any."""
        path = directory / "verdicts.md"
        if not any(map(headline, results.values())):
            return []
        write_atomically(path, verdicts(list(results.values())).encode())
        return [path]

    @classmethod
    def figures(cls, result: dict[str, Any]) -> dict[str, Figure]:
        """By radius, and by cost where that was measured."""
        by_cost = {"cost": cost_figure(result)} if result["costs"] else {}
        return {"": radius_figure(result), **by_cost}


def _resolved(name: str, radius: float) -> tuple[str, float | None, int | None]:
    """What a defence is at a radius of the attack, whatever it is called."""
    kind, assumed, transitions = defence_spec(name)
    own = KINDS[kind].radius and assumed is None
    return kind, radius if own else assumed, transitions


def _reading(result: dict[str, Any], cell: dict[str, Any], task: str) -> dict[str, Any]:
    """Kind of images -> accuracies, in the reading of the main table."""
    found = cell["accuracy"][task]
    return found.get(result["config"]["reading"]) or found[UNDEFENDED_READING]


def _accuracy(result: dict[str, Any], cell: dict[str, Any]) -> dict[str, float]:
    """Accuracy of the first label under attack, or on clean images where nothing is attacked."""
    found = _reading(result, cell, next(iter(result["clean"])))
    return found.get("attacked", found["clean"])["correct"]


def _main_table(result: dict[str, Any], radius: float, cells: dict[str, Any]) -> list[str]:
    tasks = list(result["clean"])
    some = next(iter(cells.values()))
    measures = {
        "attacked/correct": "correct, attacked",
        "attacked/unchanged": "unchanged",
        "clean/correct": "correct, clean",
        "noise/correct": "correct, noise",
    }
    columns = ["", f"{result['metric']}, one draw", "mean of draws"]
    for task in tasks:
        of = "" if len(tasks) == 1 else f" ({task})"
        columns += [f"{measure}{of}" for measure in measures.values()]
    columns += ["gradients / image", "seconds / image", "verdict"]
    of = "" if len(tasks) == 1 else f" ({tasks[0]})"
    shown = ["", "verdict", "mean of draws", f"correct, attacked{of}", f"correct, clean{of}"]
    rows = []
    for name, cell in cells.items():
        values = [label(name), *tables.intervals(cell, "ms_ssim", "ms_ssim_of_mean")]
        for task in tasks:
            values += tables.intervals(_reading(result, cell, task), *measures)
        values += [f"{cell['gradients_per_image']:.0f}", f"{cell['seconds_per_image']:.2g}"]
        rows.append([*values, verdict(result, cells, name)])
    return [
        f"### Radius {radius:g}",
        "",
        f"{some['num_attacks']} attacks on {result['config']['num_references']} references, "
        f"{some['num_classified']} images classified (reading `{result['config']['reading']}`; no "
        f"defence: by the {UNDEFENDED_READING}). 95% intervals over images. *Verdict*: against the "
        f"best control, on {result['metric']} of the mean of draws and on correct {tasks[0]} under "
        f"attack: {_best_controls(result, cells)}.",
        "",
        *tables.table(columns, rows, shown),
    ]


def verdict(result: dict[str, Any], cells: dict[str, Any], name: str) -> str:
    """Whether a defence beats the best control of its table, on similarity and on accuracy under
    attack.

    *Better* and *worse* are said only where the 95% intervals do not overlap.
    """
    best = best_controls(result, cells)
    if defence_spec(name).role != "defence" or not best:
        return ""
    words = []
    for what, (control, values) in best.items():
        words.append(f"{what}: {_word(values[name], values[control])}")
    return "; ".join(words)


def _word(one: dict[str, float], other: dict[str, float]) -> str:
    if one["low"] > other["high"]:
        return "better"
    return "**worse**" if one["high"] < other["low"] else "not told apart"


def best_controls(
    result: dict[str, Any], cells: dict[str, Any]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """``"similarity"`` and ``"accuracy"`` under attack -> the best control, and the entries of all
    cells; nothing where nothing is attacked or there is no control."""
    controls = [cell for cell in cells if defence_spec(cell).role == "control"]
    first = next(iter(result["clean"]))
    if not all("attacked" in _reading(result, cell, first) for cell in cells.values()):
        return {}
    measured = {
        "similarity": {cell: cells[cell]["ms_ssim_of_mean"] for cell in cells},
        "accuracy": {cell: _accuracy(result, cells[cell]) for cell in cells},
    }
    return {
        what: (max(controls, key=lambda control: values[control]["estimate"]), values)
        for what, values in measured.items()
        if controls
    }


def _best_controls(result: dict[str, Any], cells: dict[str, Any]) -> str:
    """Which control is the best, by similarity and by accuracy."""
    found = best_controls(result, cells)
    words = [f"{_control(control)} by {what}" for what, (control, _) in found.items()]
    return " and ".join(words) or "none was measured"


def _control(name: str) -> str:
    return label(name).removeprefix("control: ")


class Headline(NamedTuple):
    """What matters most of one dataset, at the radius of the comparison by cost.

    Attributes:
        name: the dataset and the radius.
        accuracy: name of a defence -> how often the class is right under attack.
        control: the control that is best at that.
        verdicts: what is said of each of :data:`ADVISED` and of the mode of the perturbation-aware
            posterior, where measured.
    """

    name: str
    accuracy: dict[str, dict[str, float]]
    control: str
    verdicts: dict[str, str]


def headline(result: dict[str, Any]) -> Headline | None:
    """The headline of a result; ``None`` where there is no control or no attack."""
    radius = f"{result['config']['cost_radius']:g}"
    cells = result["radii"].get(radius, {})
    best = best_controls(result, cells)
    if not best:
        return None
    control, accuracy = best["accuracy"]
    names = _measured(cells, float(radius), (*ADVISED, "aware_mode"))
    return Headline(
        f"{result['name'].replace('_', ' ')}, {radius}",
        accuracy | {name: accuracy[cell] for name, cell in names.items()},
        control,
        {name: verdict(result, cells, cell) for name, cell in names.items()},
    )


def _measured(cells: dict[str, Any], radius: float, names: tuple[str, ...]) -> dict[str, str]:
    """Those of some defences that have a cell, which may go by another name: what assumes the
    attack's radius is also called by it."""
    found = {_resolved(cell, radius): cell for cell in cells}
    return {n: found[_resolved(n, radius)] for n in names if _resolved(n, radius) in found}


def verdicts(results: list[dict[str, Any]]) -> str:
    """A row per dataset and defence that is advised; chains against modes of the same energy; and
    what all of it costs."""
    found = [(headline(result), result) for result in results]
    rows = [
        [
            words,
            line.name,
            label(name),
            tables.interval(line.accuracy[name]),
            f"{tables.interval(line.accuracy[line.control])}, {_control(line.control)}",
        ]
        for line, _ in found
        if line is not None
        for name, words in line.verdicts.items()
    ]
    columns = ["verdict", "data set, radius", "defence", "correct, attacked", "best control"]
    named = [result for line, result in found if line is not None]
    chains: dict[str, list[str]] = {}
    for result in named:
        chains.setdefault(chain_words(result["config"]["chain"]), []).append(
            result["name"].replace("_", " ")
        )
    words = "; ".join(f"{', '.join(names)}: {chain}" for chain, names in chains.items())
    note = f"Chains, which are not those of `MCMCDefence.recommended`: {words}."
    lines = [*tables.table(columns, rows), note, "", *_rivals(named)]
    return "\n".join([*lines, "<!-- costs -->", "", *_costs(named), *tables.sources(named)])


def _rivals(results: list[dict[str, Any]]) -> Iterator[str]:
    """Chains against the modes of their energies, a row per dataset and target."""
    rows = []
    for result in results:
        radius = result["config"]["cost_radius"]
        cells = result["radii"][f"{radius:g}"]
        for chain, mode in RIVALS.items():
            found = _measured(cells, radius, (chain, mode))
            if len(found) < 2:
                continue
            one, other = (cells[cell] for cell in found.values())
            similarity = _word(one["ms_ssim_of_mean"], other["ms_ssim_of_mean"])
            pair = _accuracy(result, one), _accuracy(result, other)
            rows.append([
                f"similarity: {similarity}; accuracy: {_word(*pair)}",
                f"{result['name'].replace('_', ' ')}, {radius:g}",
                label(chain),
                *map(tables.interval, pair),
            ])  # fmt: skip
    columns = ["chain against mode", "data set, radius", "chain", "correct, chain", "correct, mode"]
    if rows:
        yield "Chains against the mode of the same target, which runs no chain:"
        yield ""
        yield from tables.table(columns, rows)


def _costs(results: list[dict[str, Any]]) -> Iterator[str]:
    """Gradients and seconds per image, from the least to the most over what a CPU computed."""
    results = [result for result in results if "device" not in result["provenance"]]
    rows = []
    for name in PRICED:
        cells = []
        for result in results:
            radius = result["config"]["cost_radius"]
            at_radius = result["radii"][f"{radius:g}"]
            cells += [at_radius[cell] for cell in _measured(at_radius, radius, (name,)).values()]
        if cells:
            gradients, seconds = (
                [cell[f"{what}_per_image"] for cell in cells] for what in ("gradients", "seconds")
            )
            rows.append([label(name), _range(gradients, ".0f"), _range(seconds, ".2g")])
    threads = " or ".join(str(n) for n in sorted({r["provenance"]["threads"] for r in results}))
    files = ", ".join(f"`{result['name']}.json`" for result in results)
    yield (
        f"What an image costs in a batch with others, on a CPU with {threads} thread(s), from the "
        f"least to the most over {files}:"
    )
    yield ""
    yield from tables.table(["", "gradients / image", "seconds / image"], rows)


def _range(values: list[float], form: str) -> str:
    return " to ".join(dict.fromkeys(format(value, form) for value in (min(values), max(values))))


def _readings_tables(radius: float, cells: dict[str, Any]) -> Iterator[str]:
    """Correct classes under attack and without, for every way to classify."""

    def both(found: dict[str, Any]) -> str:
        kinds = [kind for kind in ("attacked", "clean") if kind in found]
        return " / ".join(f"{found[kind]['correct']['estimate']:.3f}" for kind in kinds)

    found = {n: cell["accuracy"] for n, cell in cells.items() if defence_spec(n).role != "none"}
    for task, ways in next(iter(found.values()), {}).items():
        what = f"{task}, radius {radius:g}"
        yield f"Ways to classify ({what}): correct under attack / on clean images."
        yield ""
        rows = [[label(name), *map(both, of[task].values())] for name, of in found.items()]
        yield from tables.table(["", *ways], rows)


def _detection_table(radius: float, cells: dict[str, Any]) -> list[str]:
    """AUROC and false positive rates of every score."""
    rows = [
        [
            label(name),
            score.replace("_", " "),
            *(
                cell
                for other in found.values()
                for cell in tables.intervals(other, "auroc", "fpr_at_tpr")
            ),
        ]
        for name, entry in cells.items()
        for score, found in entry.get("detection", {}).items()
    ]
    if not rows:
        return []
    columns = ["", "score"]
    for kind in ("clean images", "noise of equal radius"):
        columns += [f"AUROC, {kind}", f"FPR at 95% TPR, {kind}"]
    shown = [*columns[:3], columns[4]]
    return [
        f"Telling attacked images from others (radius {radius:g}); *start energy* needs no chain "
        "and is the control.",
        "",
        *tables.table(columns, rows, shown),
    ]


def radius_figure(result: dict[str, Any]) -> Figure:
    """Accuracy under attack and similarity over the radius: defences above, controls below."""
    drawn = {
        title: {name: _over_radii(result, name) for name in names}
        for title, names in _pictured(result).items()
    }
    return _panels(result, drawn, "radius of the attack", ", mean of draws")


def cost_figure(result: dict[str, Any]) -> Figure:
    """Accuracy and similarity at one radius against gradients; what needs none is a level line."""
    radius = f"{result['config']['cost_radius']:g}"
    lines: dict[str, list[tuple[float, Any]]] = {}
    for name, cell in result["costs"].items():
        lines.setdefault(name.partition("@")[0], []).append((cell["gradients_per_image"], cell))
    return _panels(result, {"": lines}, f"gradients per image, radius {radius}", free=_free(result))


def _pictured(result: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Row of panels -> names of its curves, of what was measured."""
    measured = result["config"]["defences"]
    rows = {
        title: tuple(name for name in names if name in measured)
        for title, names in PICTURED.items()
    }
    return {title: names for title, names in rows.items() if names}


def _over_radii(result: dict[str, Any], name: str) -> list[tuple[float, Any]]:
    return [(float(r), cells[name]) for r, cells in result["radii"].items() if name in cells]


def _free(result: dict[str, Any]) -> dict[str, Any]:
    """What needs no gradient, at the radius of the comparison by cost."""
    cells = result["radii"].get(f"{result['config']['cost_radius']:g}", {})
    return {name: cells[name] for name in ("none", "dark_clip", "median") if name in cells}


def _panels(
    result: dict[str, Any],
    drawn: dict[str, dict[str, list[tuple[float, Any]]]],
    xlabel: str,
    of: str = "",
    free: dict[str, Any] | None = None,
) -> Figure:
    """A row of panels per title, one for accuracy and one for similarity: lines through cells,
    ``free`` across."""
    figure = new_figure(8, 3.7 * len(drawn))
    rows = figure.subfigures(len(drawn), 1, squeeze=False)[:, 0]
    for part, (title, lines) in zip(rows, drawn.items(), strict=True):
        panels = part.subplots(1, 2)
        for axes, quality, value in (
            (panels[0], f"correct {next(iter(result['clean']))}", partial(_accuracy, result)),
            (panels[1], f"{result['metric']}{of}", lambda cell: cell["ms_ssim_of_mean"]),
        ):
            for name, points in lines.items():
                if points:
                    x, cells = zip(*points, strict=True)
                    interval_curve(axes, x, list(map(value, cells)), label(name), colour(name))
            for name, cell in (free or {}).items():
                level = value(cell)["estimate"]
                style: dict[str, Any] = {
                    "ls": "--",
                    "lw": 1.5,
                    "color": colour(name),
                    "label": label(name),
                }
                axes.axhline(level, **style)
            axes.set(xlabel=xlabel, ylabel=quality, ylim=(0, 1.02), title=title)
        legend_below(part, panels[0], columns=2)
    return figure


def _radius_text(result: dict[str, Any]) -> str:
    """What is seen in :func:`radius_figure`."""
    radius = f"{result['config']['cost_radius']:g}"
    found = result["radii"].get(radius, {})
    ends = [
        f"{label(name)} {_accuracy(result, found[name])['estimate']:.3f}"
        for names in _pictured(result).values()
        for name in names
        if name in found
    ]
    return (
        f"Curves over the radius of the attack on {result['name']}: correct classes on the left, "
        "similarity on the right; defences above, controls below. "
        f"Correct at radius {radius}: {', '.join(ends)}."
    )


def _cost_text(result: dict[str, Any]) -> str:
    """What is seen in :func:`cost_figure`."""
    ends = [
        f"{label(name)} {_accuracy(result, cell)['estimate']:.3f}"
        for name, cell in (result["costs"] | _free(result)).items()
    ]
    return (
        f"Curves over the gradients per image on {result['name']}: correct classes on the left, "
        f"similarity on the right; dashed across, what needs no gradient. Correct: "
        f"{', '.join(ends)}."
    )
