"""Tables 2 and 3: attacks on the encoder and on the classifiers of a trained model, one result file
per model.

Every model of the tables is attacked and defended alike: models that were trained otherwise
(beta-VAE, beta-TCVAE, SE, AVAE), with and without chains behind their encoder, beside the plain
one. For each radius and defence a cell holds, with 95% intervals over images,

- the similarity of reconstructions before and after an attack on the encoder, all restarts counted;
- per label (on ColorMNIST digit and colour) how often the prediction from an image attacked for it
  has not changed, and how often it is right; radius 0 is the clean images.

The attack on a classifier wants the class predicted without an attack to change, whether that was
right or wrong. Attacks do not know the defence; where there is none they have the exact gradient.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from pyro_vae_defence import attacks
from pyro_vae_defence.defence import DefendedClassifier, Reading
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments import study, tables
from pyro_vae_defence.experiments.classify import CLASSIFIERS, classifiers_of
from pyro_vae_defence.experiments.defences import Setting, known_defence, label, make_defence
from pyro_vae_defence.experiments.paper.printed import TABLE_2, TABLE_3, TABLE_4
from pyro_vae_defence.experiments.study import METRIC, Cell, Measurement
from pyro_vae_defence.experiments.train import DATASETS, MODELS, model_label
from pyro_vae_defence.models.classifier import LinearClassifier
from pyro_vae_defence.ops.balls import Linf

_Name = Annotated[str, known_defence(attack_radius=False)]
_Names = Annotated[tuple[_Name, ...], conf.not_empty]
_Radii = Annotated[tuple[conf.AttackRadius, ...], conf.not_empty]


@dataclass(frozen=True)
class AttackConfig(conf.Configuration):
    """Attacks on the encoder and on the classifiers of a trained model.

    The objectives are the paper's, the optimiser is APGD. A defence is the same whatever the
    attack's radius: what assumes one is named with it.

    Args:
        model: name of a trained VAE; its classifiers are found by name.
        radii: L_inf radii of the attacks, in units of the image range.
        defences: names such as ``hmc``, ``aware_0.2`` or ``dark_clip_0.2``.
        num_references: class-stratified test images whose encodings are attacked.
        num_restarts: how often; all restarts count.
        num_images: class-stratified test images whose classes are attacked, once for every label.
        attack_steps: of an attack.
        reading: how the classifier reads draws, see :mod:`pyro_vae_defence.defence.classifier`;
            without a defence it reads the guide's mean.
        chain: of the defences. Images attacked this hard are encoded so far away that chains
            without a burn-in end on their way.
        seed: seed of images, attacks and defences.
    """

    model: str
    radii: _Radii = (0.1, 0.2)
    defences: _Names = ("none", "encoder_samples", "dark_clip_0.2", "hmc", "aware_0.2")
    num_references: conf.Several = 50
    num_restarts: conf.Count = 2
    num_images: conf.Several = 100
    attack_steps: conf.Count = 50
    reading: Reading = "reencoded"
    chain: conf.ChainConfig = conf.ChainConfig(step_size=0.2, burn_in=30)
    seed: conf.Natural = 0


class Attack(Measurement[AttackConfig]):
    """Every model of Tables 2 and 3 but NVAE, by its name."""

    kind = command = "attack"
    noun = "attacks on a model"
    names = {
        name: AttackConfig(name)
        for name, config in MODELS.items()
        if config.dataset in DATASETS and config.architecture is None
    }
    output = "runs/attack"
    parts = ("radii",)

    def load(self) -> None:
        """The model, its classifiers by label, and images."""
        config = self.config
        self.check_name()
        self.vae, card = self.load_conv_vae(config.model)
        # Name of the label -> its column and what predicts it.
        self.tasks: dict[str, tuple[int, LinearClassifier]] = {
            task: (CLASSIFIERS[name].column, self.load_classifier(name))
            for task, name in classifiers_of(config.model).items()
        }
        dataset = card.dataset
        self.references, _ = self.choose(dataset, config.num_references, "references")
        self.images_, self.labels = self.choose(dataset, config.num_images, "images")
        # Once per restart, and which reference each row is of.
        self.image = torch.arange(len(self.references)).repeat(config.num_restarts)
        self.repeated = self.references[self.image]

    def cells(self) -> Iterator[Cell]:
        """The noise floor, then a cell per radius and defence."""
        yield ("noise_floor",), self.noise_floor
        for radius in (0.0, *self.config.radii):
            for name in self.config.defences:
                yield ("radii", f"{radius:g}", name), partial(self.defended, name, radius)

    def noise_floor(self) -> dict[str, float]:
        """Similarity of two undefended reconstructions of the same reference, one draw each."""
        again = self.reconstruct(self.vae, self.repeated, "again")
        return study.similarity(self.before, again, self.image)

    @cached_property
    def before(self) -> Tensor:
        """Undefended reconstructions, which those of attacked references are compared with."""
        return self.reconstruct(self.vae, self.repeated, "before")

    @cached_property
    def predicted(self) -> dict[str, Tensor]:
        """What every classifier says of the images without attack and defence."""
        x, tasks = self.images_, self.tasks.items()
        return {task: classifier.classify(self.vae, x) for task, (_, classifier) in tasks}

    @study.remembered
    def attacked(self, radius: float) -> dict[str, Tensor]:
        """References attacked through the encoder, and images attacked through each classifier."""
        if radius == 0:
            return {"encoder": self.repeated, **dict.fromkeys(self.tasks, self.images_)}
        attack = partial(attacks.APGD, ball=Linf(radius), num_steps=self.config.attack_steps)
        divergence = attacks.symmetric_kl(self.vae)
        on_encoder = attack(divergence, num_restarts=self.config.num_restarts)
        found = on_encoder(self.references, self.generator("attack encoder"))
        images = {"encoder": found.flat().images}
        for task, (_, classifier) in self.tasks.items():
            on_classifier = attack(attacks.cross_entropy(self.vae, classifier))
            images[task] = on_classifier(self.images_, self.generator("attack", task)).x_adv[0]
        return images

    def defended(self, name: str, radius: float) -> dict[str, Any]:
        """Everything about one defence at one radius."""
        inputs = self.attacked(radius)
        defence = make_defence(name, Setting(self.vae, self.config.chain))
        outcome = defence(inputs["encoder"], self.generator("similarity"))
        accuracies = {}
        for task, (column, classifier) in self.tasks.items():
            if name == "none":
                predicted = classifier.classify(self.vae, inputs[task])
            else:
                behind = DefendedClassifier(defence, classifier, self.config.reading)
                predicted = behind.predict(inputs[task], self.generator("classify"))
            right = self.labels[:, column]
            accuracies[task] = study.accuracy(predicted, right, self.predicted[task])
        return {
            "ms_ssim": study.similarity(self.before, outcome.reconstruction, self.image),
            "accuracy": accuracies,
            **study.cost(outcome),
        }

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """One model as Tables 2 and 3 show it."""
        return _table(f"### {result['name']}", {result["name"]: result})


# --- Tables 2, 3 and 4 ----------------------------------------------------------------------------


def table(number: int, results: str | os.PathLike[str]) -> str:
    """Table 2, 3 or 4 of the paper in Markdown, printed and measured numbers side by side.

    Args:
        number: 2, 3 or 4.
        results: directory with the result files of ``attack``.

    Raises:
        ValueError: for a directory without results, a damaged file, or results that do not belong
            together.
    """
    found = study.read(results, "attack")
    for name, result in found.items():
        if result.get("study") != Attack.kind or result["name"] != name:
            raise ValueError(f"{Path(results) / name}.json is no result of attack; move it away")
    if number == 4:
        return _table_4(found)
    printed = {2: TABLE_2, 3: TABLE_3}[number]
    by_dataset: dict[str, dict[str, Any]] = {MODELS[name].dataset: {} for name in printed}
    for name, config in MODELS.items():
        if config.dataset in by_dataset and (name in found or name in printed):
            by_dataset[config.dataset][name] = found.get(name)
    return "\n".join(
        _table(f"### Table {number}, {DATASETS[dataset]}", models)
        for dataset, models in by_dataset.items()
    )


def _table_4(found: Mapping[str, dict[str, Any]]) -> str:
    """Table 4: models with and without chains, by radius, and what the chains make of them."""
    datasets = ("mnist", "fashion_mnist", "color_mnist")
    columns = [
        *((dataset, "ms_ssim", "ms_ssim", METRIC) for dataset in datasets),
        *((dataset, "accuracy/class/unchanged", "class", "unchanged") for dataset in datasets),
        ("color_mnist", "accuracy/color/unchanged", "color", "unchanged (color)"),
    ]
    heads = ["", *(f"{what}, {DATASETS[dataset]}" for dataset, _, _, what in columns)]
    measured = [found[name] for name in TABLE_4 if name in found]
    if measured:
        _check_alike(measured)
    lines: list[str] = []
    for radius in ("0.1", "0.2"):
        rows = []
        for model in dict.fromkeys(name.partition("mnist_")[2] for name in TABLE_4):
            for defence in ("none", "hmc"):
                row = [_line(f"mnist_{model}", defence)]
                for dataset, place, of, _ in columns:
                    name = f"{dataset}_{model}"
                    printed = TABLE_4[name][defence]
                    row.append(_cell(found.get(name), printed, defence, radius, place, of))
                rows.append(row)
        lines += [f"### Table 4, radius {radius}", "", *tables.table(heads, rows, heads[:5])]
    notes = [_note(measured[0]["config"]), "", *tables.sources(measured)] if measured else []
    return "\n".join([*lines, *notes])


_PRINTED = {**TABLE_2, **TABLE_3}


def _table(title: str, by_model: Mapping[str, dict[str, Any] | None]) -> str:
    """Models in the order given, each with the defences that were measured or printed."""
    found = [result for result in by_model.values() if result is not None]
    notes: list[str] = []
    radii = ["0.1", "0.2"]
    of_paper = [_PRINTED.get(model, {}).get("none", {}) for model in by_model]
    tasks = [task for task in ("class", "color") if any(task in each for each in of_paper)]
    if found:
        config = found[0]["config"]
        _check_alike(found)
        radii = [f"{radius:g}" for radius in config["radii"]]
        cells = [cell for each in found for cell in each["radii"].get("0", {}).values()]
        tasks = list(cells[0]["accuracy"]) if cells else tasks
        notes = [_note(config), "", *tables.sources(found)]
    columns = ["", *(f"{METRIC}, {radius}" for radius in radii)]
    for task in tasks:
        name = "" if len(tasks) == 1 else f" ({task})"
        columns.append(f"correct, clean{name}")
        for radius in radii:
            columns += [f"unchanged, {radius}{name}", f"correct, {radius}{name}"]
    rows = [
        _row(model, defence, result, radii, tasks)
        for model, result in by_model.items()
        for defence in (_PRINTED.get(model, {}) if result is None else result["config"]["defences"])
    ]
    kept = [name for name in columns if name.startswith("unchanged")][: len(radii)]
    shown = [*columns[: 1 + len(radii)], *kept][: tables.MOST_COLUMNS]
    return "\n".join([title, "", *tables.table(columns, rows, shown), *notes])


def _check_alike(results: list[dict[str, Any]]) -> None:
    first = results[0]
    for each in results:
        differs = [k for k, v in each["config"].items() if k != "model" and v != first["config"][k]]
        if differs or each["metric"] != first["metric"]:
            raise ValueError(
                f"results of {first['name']} and {each['name']} do not belong in one table: they "
                f"differ in {', '.join(differs) or 'their metric'}; run attack again with the same "
                "settings"
            )


def _note(config: dict[str, Any]) -> str:
    chain = config["chain"]
    return (
        f"APGD of {config['attack_steps']} steps on the encoder (symmetric KL; "
        f"{config['num_references']} references from {config['num_restarts']} starts, all counted) "
        "and on the classifier (cross-entropy of the class predicted without an attack; "
        f"{config['num_images']} images). Attacks do not know the defence. Chains: "
        f"{chain['burn_in']} gradients of burn-in, {chain['warmup_steps'] + chain['num_samples']} "
        f"transitions of 1 to {2 * chain['num_steps']} leapfrog steps. Behind a defence the "
        f"classifier's reading is `{config['reading']}`, without one it reads the guide's mean. "
        "95% intervals over images. In brackets the paper's figures, of its own models, "
        "attacks and chains: "
        "MSSSIM, and its adversarial accuracy, which on clean images can only be *correct* and "
        "under attack is *unchanged*."
    )


def _row(
    model: str, defence: str, result: dict[str, Any] | None, radii: list[str], tasks: list[str]
) -> list[str]:
    """A model with a defence: similarities, then per label the accuracies."""
    printed = _PRINTED.get(model, {}).get(defence, {})
    cell = functools.partial(_cell, result, printed, defence)
    cells = [_line(model, defence)]
    cells += [cell(radius, "ms_ssim", "ms_ssim") for radius in radii]
    for task in tasks:
        cells.append(cell("0", f"accuracy/{task}/correct", task))
        for radius in radii:
            cells.append(cell(radius, f"accuracy/{task}/unchanged", task))
            cells.append(cell(radius, f"accuracy/{task}/correct"))
    return cells


def _line(model: str, defence: str) -> str:
    """What the line of a model with a defence is called."""
    name = model_label(model)
    return name if defence == "none" else f"{name}; {label(defence)}"


def _cell(
    result: dict[str, Any] | None,
    printed: Mapping[str, Any],
    defence: str,
    radius: str,
    place: str,
    of: str = "",
) -> str:
    """A measured number with its interval, and the printed one in brackets."""
    entry = tables.at(result, f"radii/{radius}/{defence}/{place}")
    of_paper = tables.at(printed, f"{of}/{radius}")
    text = tables.interval(entry, 2) if entry else tables.NOT_MEASURED
    return text if of_paper is None else f"{text} ({of_paper:.2f})"
