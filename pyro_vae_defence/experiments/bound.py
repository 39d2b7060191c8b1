"""How much of the right class's posterior mass any attack can take, beside what attacks took.

The bound of :func:`pyro_vae_defence.robustness.mass_bound` needs no attack: it is a function of
clean images, for exact inference with the perturbation-aware posterior. Beside it stands the worst
case of adaptive attacks on the same images and the same defence, whose classes are voted by draws.
What lies between the two is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch

from pyro_vae_defence.defence import DefendedClassifier
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments import tables
from pyro_vae_defence.experiments.blocks import InBlocks
from pyro_vae_defence.experiments.defences import Setting, make_defence
from pyro_vae_defence.experiments.study import Cell, Measurement, interval, middle, share
from pyro_vae_defence.experiments.synthesis import bounded_by
from pyro_vae_defence.ops.balls import Linf, reaches
from pyro_vae_defence.robustness import (
    KNOWLEDGE,
    Budget,
    RobustnessReport,
    evaluate_robustness,
    mass_bound,
)


@dataclass(frozen=True)
class BoundConfig(InBlocks):
    """Bounds of one model at several radii, and attacks on the same images.

    Args:
        model: name of a trained model.
        classifier: name of a classifier of its latents; ``<model>_classifier`` when ``None``.
        dataset: name of its images; those it was trained on when ``None``.
        radii: L_inf radii of the attacker.
        ratios: radii of the defender's ball over the attacker's, >= 1.
        num_images: class-stratified images.
        split: of which part of the data set: ``validation`` where one of ``ratios`` is chosen.
        images_per_cell: most images that are evaluated at a time, at least 2.
        num_clean: training images that tell walks where to start.
        num_temperatures, num_steps, num_walks, num_falling: as for
            :func:`~pyro_vae_defence.robustness.mass_bound`.
        attacks: names of :data:`pyro_vae_defence.robustness.KNOWLEDGE`, whose worst case stands
            beside the bound; no defence is attacked when it is empty.
        num_attacked: how many of the images, the first ones, are attacked, in whole cells; all
            where there are fewer.
        chain: of the defence that is attacked.
        budget: of the attacks.
        seed: seed of images, walks and attacks.
    """

    model: str
    classifier: str | None = None
    dataset: conf.Dataset | None = None
    radii: Annotated[tuple[conf.AttackRadius, ...], conf.not_empty] = (0.02, 0.05, 0.1, 0.2)
    ratios: Annotated[
        tuple[Annotated[float, conf.within(1, 100, of_images=False)], ...], conf.not_empty
    ] = (1.0,)
    num_images: conf.Several = 200
    split: Literal["validation", "test"] = "test"
    images_per_cell: conf.Count = 20
    num_clean: conf.Count = 1000
    num_temperatures: Annotated[int, conf.at_least(3)] = 100
    num_steps: conf.Count = 5
    num_walks: Annotated[int, conf.at_least(2)] = 16
    num_falling: conf.Count = 4
    attacks: tuple[Annotated[str, conf.one_of(KNOWLEDGE)], ...] = (
        "transfer", "encoder", "bpda", "equilibrium", "evidence",
    )  # fmt: skip
    num_attacked: conf.Natural = 20
    chain: conf.ChainConfig = conf.ChainConfig(num_samples=5, warmup_steps=20)
    budget: Budget = replace(Budget.standard(), max_evaluations=33_000)
    seed: conf.Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attacks:
            self.refuse_idle("without attacks", "num_attacked")
        for radius in self.radii:
            for ratio in self.ratios:
                reaches(Linf(radius), ratio * radius)  # refuses what is no radius


VALIDATION: dict[str, Any] = {
    "split": "validation",
    "ratios": (1.0, 1.5, 2.0),
    "num_images": 20,
    "attacks": (),
}
"""Settings of the choice of a defender's radius: bounds of other images at several, no attack."""


class Bound(Measurement[BoundConfig]):
    """A bound without an attack, and attacks.

    Classes are read by the classifier with hidden layers, and the defender assumes twice the
    attacker's radius, which kept most of the draws of validation images, by little.
    """

    kind = command = "bound"
    metric = None
    names = {
        f"{dataset}{ending}": BoundConfig(
            f"{dataset}_vae", classifier=f"{dataset}_vae_mlp_classifier", **settings
        )
        for dataset in ("mnist", "fashion_mnist")
        for ending, settings in (("", {"ratios": (2.0,)}), ("_validation", VALIDATION))
    }
    output = "runs/bound"
    parts = ("bounds", "attacks")

    def load(self) -> None:
        """The model, its classifier, images, and clean ones of the training set."""
        config = self.config
        self.vae, card = self.load_conv_vae(config.model)
        dataset = config.dataset or card.training["dataset"]
        self.classifier = self.load_classifier(config.classifier, config.model)
        self.x, labels = self.choose(dataset, config.num_images, "images", config.split)
        self.labels = labels[:, 0]
        self.clean, _ = self.choose(dataset, config.num_clean, "clean images", "train")

    def cells(self) -> Iterator[Cell]:
        """Block after block, so that every radius gains images alike."""
        for number, images in enumerate(self.config.blocks):
            rows = slice(images.start, images.stop)
            for radius in self.config.radii:
                for ratio in self.config.ratios:
                    key, block = f"{radius:g} {ratio:g}", f"{number:03d}"
                    given = (radius, ratio * radius, rows, f"{key} {block}")
                    yield ("bounds", key, block), partial(self.bound, *given)
                    if self.config.attacks and images.start < self.config.num_attacked:
                        yield ("attacks", key, block), partial(self.attacked, *given)

    def bound(self, radius: float, delta: float, rows: slice, purpose: str) -> dict[str, Any]:
        """Masses around some images."""
        config = self.config
        found = mass_bound(
            self.vae,
            self.classifier,
            self.x[rows],
            self.labels[rows],
            Linf(radius),
            delta,
            self.clean,
            num_temperatures=config.num_temperatures,
            num_steps=config.num_steps,
            num_walks=config.num_walks,
            num_falling=config.num_falling,
            rows=config.images_per_cell * config.num_walks,
            generator=self.generator("bound", purpose),
        )
        return found.to_dict()

    def attacked(self, radius: float, delta: float, rows: slice, purpose: str) -> dict[str, Any]:
        """The worst case of attacks on the same images, classes voted by draws."""
        config = self.config
        defence = make_defence("aware", Setting(self.vae, config.chain, radius=delta))
        report = evaluate_robustness(
            self.vae,
            defence,
            self.x[rows],
            self.labels[rows],
            classifier=DefendedClassifier(defence, self.classifier, "vote"),
            ball=Linf(radius),
            budget=config.budget,
            attacks=config.attacks,
            checks=False,
            generator=self.generator("attacks", purpose),
        )
        return report.to_dict()

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """Bound, worst case, and what lies between."""
        config = result["config"]
        rows = [
            row(key, dict(sorted(bounds.items())), result.get("attacks", {}).get(key, {}))
            for key, bounds in result["bounds"].items()
        ]
        columns = [
            "attack's radius", "defender's radius", "images", "votes kept under any attack",
            "images attacked", "votes kept under these attacks", "gap: these less any, same images",
            "share of draws kept under any attack", "falling less rising, right, nats",
            "falling less rising, wrong, nats",
        ]  # fmt: skip
        attacks = config["attacks"] if config.get("num_attacked", 1) else ()
        of = config.get("split", "test")  # which results before this setting do not name
        classifier = config.get("classifier")
        read_by = "" if classifier is None else f", classes read by `{classifier}`"
        note = (
            f"Model `{config['model']}`, {of} images{read_by}, perturbation-aware, "
            f"{config['num_walks']} "
            f"rising and {config['num_falling']} falling walks of {config['num_temperatures']} "
            f"temperatures for each image and set, seed {config['seed']}; "
            f"{bounded_by(result['bounds'])}; attacks: "
            f"{', '.join(attacks) or 'none'}. Estimated, for exact inference: not "
            "certified. 95% intervals over images; differences of walks are medians."
        )
        lines = tables.table(columns, rows, [*columns[:2], columns[3], *columns[5:7]])
        return tables.section(f"## {result['name']}", note, lines, result)


def row(key: str, bounds: dict[str, Any], attacked: dict[str, Any]) -> list[str]:
    """One radius of the table."""
    radius, ratio = map(float, key.split())
    log_ratio = _values(bounds.values(), "log_ratio")
    differences = []
    for of in ("right", "wrong"):
        falling, rising = (
            _values((block[of] for block in bounds.values()), way) for way in ("falling", "rising")
        )
        differences.append(f"{float(middle(falling - rising)):.1f}")
    number, worst, gap = "0", "", ""
    if tried := sorted(bounds.keys() & attacked.keys()):  # of several processes one may be behind
        report = RobustnessReport.join([RobustnessReport.from_dict(attacked[n]) for n in tried])
        kept = report.values["robust/averaged"]
        promised = _values((bounds[block] for block in tried), "log_ratio") > 0
        number, worst = str(len(kept)), tables.interval(report.robust["averaged"])
        gap = tables.interval(interval(kept - promised.float(), bounds=(-1.0, 1.0)))
    return [
        f"{radius:g}",
        f"{ratio * radius:g}",
        str(len(log_ratio)),
        tables.interval(share((log_ratio > 0).float())),
        number,
        worst,
        gap,
        tables.interval(share(log_ratio.sigmoid())),
        *differences,
    ]


def _values(blocks: Iterable[dict[str, Any]], name: str) -> torch.Tensor:
    """Of all images of some blocks; -inf where no walk has found a mass."""
    values = [value for block in blocks for value in block[name]]
    return torch.tensor([-torch.inf if value is None else value for value in values])
