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
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from pyro_vae_defence import attacks, metrics
from pyro_vae_defence.defence import Defence, DefendedClassifier, Reading
from pyro_vae_defence.experiments.classify import CLASSIFIERS, classifiers_of
from pyro_vae_defence.experiments.configuration import (
    AttackRadius,
    ChainConfig,
    Configuration,
    Count,
    Natural,
    not_empty,
)
from pyro_vae_defence.experiments.defences import Setting, known_defence, label, make_defence
from pyro_vae_defence.experiments.paper import TABLE_2, TABLE_3
from pyro_vae_defence.experiments.study import (
    METRIC,
    Cell,
    Measurement,
    cost,
    interval,
    read,
    similarity,
)
from pyro_vae_defence.experiments.tables import NOT_MEASURED, source
from pyro_vae_defence.experiments.tables import interval as shown
from pyro_vae_defence.experiments.tables import table as table_lines
from pyro_vae_defence.experiments.train import DATASETS, MODELS, model_label
from pyro_vae_defence.models.classifier import LinearClassifier
from pyro_vae_defence.ops.balls import Linf

_Name = Annotated[str, known_defence(attack_radius=False)]
_Names = Annotated[tuple[_Name, ...], not_empty]
_Radii = Annotated[tuple[AttackRadius, ...], not_empty]


@dataclass(frozen=True)
class AttackConfig(Configuration):
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
    num_references: Count = 50
    num_restarts: Count = 2
    num_images: Count = 100
    attack_steps: Count = 50
    reading: Reading = "reencoded"
    chain: ChainConfig = ChainConfig(step_size=0.2, burn_in=30)
    seed: Natural = 0


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
        if config.model != self.name:
            raise ValueError(
                f"model={config.model!r}: results are named after the model; run attack on it"
            )
        self.vae, card = self.load_conv_vae(config.model)
        # Name of the label -> its column and what predicts it.
        self.tasks: dict[str, tuple[int, LinearClassifier]] = {
            task: (CLASSIFIERS[name].column, self.load_classifier(name))
            for task, name in classifiers_of(config.model).items()
        }
        dataset = card.training["dataset"]
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
                cell = functools.partial(self.defended, name, radius)
                yield ("radii", f"{radius:g}", name), cell

    def noise_floor(self) -> dict[str, float]:
        """Similarity of two undefended reconstructions of the same reference, one draw each."""
        return similarity(
            self.before, self.reconstruct(self.vae, self.repeated, "again"), self.image
        )

    @functools.cached_property
    def before(self) -> Tensor:
        """Undefended reconstructions of the references, which those under attack are compared
        with."""
        return self.reconstruct(self.vae, self.repeated, "before")

    @functools.cached_property
    def predicted(self) -> dict[str, Tensor]:
        """What every classifier says of the images without attack and defence."""
        return {
            task: classifier.classify(self.vae, self.images_)
            for task, (_, classifier) in self.tasks.items()
        }

    @functools.cache  # noqa: B019 (a study lives as long as its process)
    def attacked(self, radius: float) -> dict[str, Tensor]:
        """References attacked through the encoder, and images attacked through each classifier."""
        if radius == 0:
            return {"encoder": self.repeated, **dict.fromkeys(self.tasks, self.images_)}
        attack = functools.partial(attacks.APGD, num_steps=self.config.attack_steps)
        on_encoder = attack(
            attacks.symmetric_kl(self.vae), Linf(radius), num_restarts=self.config.num_restarts
        )
        found = on_encoder(self.references, self.generator("attack encoder"))
        images = {"encoder": found.flat().images}
        for task, (_, classifier) in self.tasks.items():
            on_classifier = attack(attacks.cross_entropy(self.vae, classifier), Linf(radius))
            found = on_classifier(self.images_, self.generator("attack", task))
            images[task] = found.x_adv[0]
        return images

    def defended(self, name: str, radius: float) -> dict[str, Any]:
        """Everything about one defence at one radius."""
        inputs = self.attacked(radius)
        defence: Defence = make_defence(name, Setting(self.vae, self.config.chain))
        outcome = defence(inputs["encoder"], self.generator("similarity"))
        accuracy = {}
        for task, (column, classifier) in self.tasks.items():
            if name == "none":
                predicted = classifier.classify(self.vae, inputs[task])
            else:
                behind = DefendedClassifier(defence, classifier, self.config.reading)
                predicted = behind.predict(inputs[task], self.generator("classify"))
            accuracy[task] = {
                "unchanged": interval(
                    metrics.adversarial_accuracy(self.predicted[task], predicted)
                ),
                "correct": interval(metrics.correct(predicted, self.labels[:, column])),
            }
        return {
            "ms_ssim": similarity(self.before, outcome.reconstruction, self.image),
            "accuracy": accuracy,
            **cost(outcome),
        }

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """One model as Tables 2 and 3 show it."""
        return _table(f"### {result['name']}", {result["name"]: result})


# --- Tables 2 and 3 -------------------------------------------------------------------------------


def table(number: int, results: str | os.PathLike[str]) -> str:
    """Table 2 or 3 of the paper in Markdown, printed and measured numbers side by side.

    Args:
        number: 2 or 3.
        results: directory with the result files of ``attack``.

    Raises:
        ValueError: for a directory without results, a damaged file, or results that do not belong
            together.
    """
    found = read(results, "attack")
    for name, result in found.items():
        if result.get("study") != Attack.kind or result["name"] != name:
            raise ValueError(f"{Path(results) / name}.json is no result of attack; move it away")
    printed = {2: TABLE_2, 3: TABLE_3}[number]
    datasets = dict.fromkeys(MODELS[name].dataset for name in printed)
    return "\n".join(
        _table(
            f"### Table {number}, {DATASETS[dataset]}",
            {
                name: found.get(name)
                for name in MODELS
                if MODELS[name].dataset == dataset and (name in found or name in printed)
            },
        )
        for dataset in datasets
    )


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
        tasks = list(next(iter(found[0]["radii"]["0"].values()))["accuracy"])
        notes = [_note(config), "", *(f"- {source(each)}" for each in found), ""]
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
    return "\n".join([title, "", *table_lines(columns, rows), *notes])


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
        f"transitions of {chain['num_steps']} leapfrog steps. Behind a defence the classifier's "
        f"reading is `{config['reading']}`, without one it reads the guide's mean. 95% intervals "
        "over images; where all images agree the interval has no width, and of n images about 3/n "
        "may still differ. In brackets the paper's figures, of its own models, attacks and chains: "
        "MSSSIM, and its adversarial accuracy, which on clean images can only be *correct* and "
        "under "
        "attack is *unchanged*."
    )


def _row(
    model: str,
    defence: str,
    result: dict[str, Any] | None,
    radii: list[str],
    tasks: list[str],
) -> list[str]:
    """A model with a defence: similarities, then per label the accuracies."""
    printed = _PRINTED.get(model, {}).get(defence, {})

    def cell(radius: str, *keys: str, of: str = "") -> str:
        entry: Any = {} if result is None else result["radii"].get(radius, {}).get(defence)
        for key in keys:
            entry = entry.get(key) if entry else None
        of_paper = printed.get(of, {}).get(radius)
        return (shown(entry, 2) if entry else NOT_MEASURED) + (
            "" if of_paper is None else f" ({of_paper:.2f})"
        )

    name = model_label(model)
    cells = [name if defence == "none" else f"{name}; {label(defence)}"]
    cells += [cell(radius, "ms_ssim", of="ms_ssim") for radius in radii]
    for task in tasks:
        cells.append(cell("0", "accuracy", task, "correct", of=task))
        for radius in radii:
            cells.append(cell(radius, "accuracy", task, "unchanged", of=task))
            cells.append(cell(radius, "accuracy", task, "correct"))
    return cells
