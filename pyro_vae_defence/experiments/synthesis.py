"""Analysis by synthesis: a classifier from one conditional VAE, its bound, and attacks on it.

The class is the one of largest mass of explanations, perturbations included
(:mod:`pyro_vae_defence.defence.synthesis`). The bound needs no attack: it is a function of clean
images, for exact inference. Beside it stands, on some of the same images, the worst case of attacks
that know the classifier (:mod:`pyro_vae_defence.robustness.synthesis`). What lies between is not
known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from pyro_vae_defence.attacks import APGD, PGD
from pyro_vae_defence.defence import AnalysisBySynthesis
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments import study, tables
from pyro_vae_defence.experiments.blocks import InBlocks
from pyro_vae_defence.experiments.study import Cell, Measurement
from pyro_vae_defence.experiments.train import CONDITIONAL_MODELS
from pyro_vae_defence.models import ConditionalVAE
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.files import as_json, write_atomically
from pyro_vae_defence.robustness.synthesis import class_evidence, mass_margin


@dataclass(frozen=True)
class SynthesisConfig(InBlocks):
    """One conditional model at several radii.

    Args:
        model: name of a trained :class:`~pyro_vae_defence.models.ConditionalVAE`.
        dataset: name of its images; those it was trained on when ``None``.
        radii: L_inf radii of the attacker, and of the ball that the classifier assumes.
        num_images: class-stratified test images.
        images_per_cell: most images that are evaluated at a time, at least 2.
        num_attacked: how many of them are attacked, in whole cells; 0 for none.
        num_temperatures, num_steps, num_walks: as for
            :class:`~pyro_vae_defence.defence.AnalysisBySynthesis`.
        num_falling: falling walks per image and class, of the bound.
        attack_steps: steps of an attack, one gradient each.
        attack_temperatures, attack_walks: of the fresh walks at each step of the attack on masses.
        num_targets: other classes that the attack on evidence tries, one after the other.
        seed: seed of images, walks and attacks.
    """

    model: str
    dataset: conf.Dataset | None = None
    radii: Annotated[tuple[conf.AttackRadius, ...], conf.not_empty] = (0.05, 0.1, 0.2)
    num_images: conf.Several = 60
    images_per_cell: conf.Count = 10
    num_attacked: conf.Natural = 10
    num_temperatures: Annotated[int, conf.at_least(3)] = 15
    num_steps: conf.Count = 2
    num_walks: Annotated[int, conf.at_least(2)] = 4
    num_falling: conf.Count = 2
    attack_steps: conf.Count = 20
    attack_temperatures: Annotated[int, conf.at_least(3)] = 6
    attack_walks: Annotated[int, conf.at_least(2)] = 2
    num_targets: conf.Count = 2
    seed: conf.Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_above(num_falling="num_walks", num_attacked="num_images")
        if 0 < self.num_attacked < self.first_block:
            raise ValueError(
                f"num_attacked={self.num_attacked} is less than the {self.first_block} images of a "
                "cell, so that none would be attacked; choose at least as many, a smaller "
                "images_per_cell, or 0 for none"
            )


class Synthesis(Measurement[SynthesisConfig]):
    """Classes by analysis by synthesis: clean, bounded, attacked."""

    kind = command = "synthesis"
    metric = None
    names = {
        model.replace("_conditional", ""): SynthesisConfig(model) for model in CONDITIONAL_MODELS
    }
    output = "runs/synthesis"
    parts = ("bounds", "attacks")

    def load(self) -> None:
        """The model and test images."""
        config = self.config
        vae, card = self.load_vae(config.model)
        if not isinstance(vae, ConditionalVAE):
            raise ValueError(
                f"model must be a ConditionalVAE, {config.model!r} is a {type(vae).__name__}"
            )
        self.vae = vae.requires_grad_(False)
        self.x, labels = self.choose(config.dataset or card.dataset, config.num_images, "images")
        self.labels = labels[:, 0]

    def cells(self) -> Iterator[Cell]:
        """Block after block, so that every radius gains images alike."""
        for number, images in enumerate(self.config.blocks):
            rows = slice(images.start, images.stop)
            for radius in self.config.radii:
                key, block = f"{radius:g}", f"{number:03d}"
                given = (radius, rows, f"{key} {block}")
                yield ("bounds", key, block), partial(self.bound, *given)
                if images.stop <= self.config.num_attacked:
                    yield ("attacks", key, block), partial(self.attacked, *given)

    def classifier(self, radius: float) -> AnalysisBySynthesis:
        """The one that is evaluated."""
        config = self.config
        return AnalysisBySynthesis(
            self.vae,
            self.vae.num_classes,
            Linf(radius),
            inverse_mass_matrix=self.vae.mean_posterior_variance,
            num_temperatures=config.num_temperatures,
            num_steps=config.num_steps,
            num_walks=config.num_walks,
        )

    def bound(self, radius: float, rows: slice, purpose: str) -> dict[str, Any]:
        """Predictions for clean images, and what no attack can change."""
        x, labels, classify = self.x[rows], self.labels[rows], self.classifier(radius)
        predicted = classify.predict(x, self.generator("predict", purpose))
        found = classify.margin_bound(
            x,
            labels,
            Linf(radius),
            num_falling=self.config.num_falling,
            generator=self.generator("bound", purpose),
        )
        estimates = {
            "right": (predicted == labels).tolist(),
            "common_attack": found.common_attack,
            "margin": found.margin.tolist(),
            "standard_error": found.standard_error.tolist(),
            "gap_right": found.gap[:, 0].tolist(),
            "gap_wrong": found.gap[:, 1].tolist(),
        }
        written: dict[str, Any] = as_json(estimates)  # ``None`` where a mass was not found
        return written

    def attacked(self, radius: float, rows: slice, purpose: str) -> dict[str, Any]:
        """Whether the label is still predicted, attack by attack."""
        config, ball = self.config, Linf(radius)
        x, labels, classify = self.x[rows], self.labels[rows], self.classifier(radius)
        cheap = replace(
            classify,
            num_temperatures=config.attack_temperatures,
            num_walks=config.attack_walks,
        )

        def judged(x_adv: Tensor, name: str) -> list[bool]:
            predicted = classify.predict(x_adv, self.generator("judge", name, purpose))
            return (predicted == labels).tolist()

        noise = self.generator("attacks", purpose)
        objective = mass_margin(cheap, labels, noise)
        x_adv = APGD(objective, ball, num_steps=config.attack_steps)(x, noise).best()
        right = {"mass": judged(x_adv, "mass")}
        most = classify.margin_bound(x, labels, ball, generator=noise).wrong.argsort(1).flip(1)
        for rank in range(min(config.num_targets, self.vae.num_classes - 1)):
            name = f"evidence_{rank + 1}"
            objective = class_evidence(classify, labels, most[:, rank], ball, generator=noise)
            x_adv = PGD(objective, ball, num_steps=config.attack_steps)(x, noise).best()
            right[name] = judged(x_adv, name)
        return {"right": right}

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """Accuracy, bound and worst case by radius."""
        config = result["config"]
        rows = [
            row(key, bounds, result.get("attacks", {}).get(key, {}))
            for key, bounds in result["bounds"].items()
        ]
        columns = [
            "radius", "images", "accuracy, clean", "accuracy under any attack, bound",
            "images attacked", "accuracy under these attacks", "bound, the same images",
            "mass alone", "evidence alone", "margin of the bound, nats",
            "its standard error", "falling less rising, right, nats",
            "falling less rising, wrong, nats",
        ]  # fmt: skip
        attacks = "nothing attacked"
        if config["num_attacked"]:
            attacks = (
                "attacks: APGD on masses, and PGD on the evidence of the "
                f"{config['num_targets']} likeliest other classes, {config['attack_steps']} steps "
                "each, one start"
            )
        note = (
            f"Model `{config['model']}`; the classifier assumes the attack's radius; "
            f"{config['num_walks']} rising and {config['num_falling']} falling walks of "
            f"{config['num_temperatures']} temperatures for each image and class, seed "
            f"{config['seed']}; {bounded_by(result['bounds'])}; {attacks}. Estimated, for exact "
            "inference: not certified. 95% intervals over images; the last four columns are "
            "medians."
        )
        shown = ["radius", *columns[2:6]]
        lines = tables.table(columns, rows, shown)
        return tables.section(f"## {result['name']}", note, lines, result)

    @classmethod
    def pages(cls, results: dict[str, dict[str, Any]], directory: Path) -> list[Path]:
        """The models radius by radius in one table, ``models.md``, if there are several."""
        path = directory / "models.md"
        if len(results) < 2:
            return []
        write_atomically(path, side_by_side(results).encode())
        return [path]


def side_by_side(results: dict[str, dict[str, Any]]) -> str:
    """Accuracy, bound and worst case of results, dataset by dataset and radius by radius."""
    lines = []
    for name, result in results.items():
        model, dataset = (result["config"][field] for field in ("model", "dataset"))
        if dataset is None and model in CONDITIONAL_MODELS:
            dataset = CONDITIONAL_MODELS[model].dataset
        for key, bounds in result["bounds"].items():
            cells = row(key, bounds, result.get("attacks", {}).get(key, {}))
            shown = [f"`{name}`, {cells[1]}", key, *cells[2:6]]
            lines.append(((dataset or model, float(key)), shown))
    columns = [
        "model, images", "radius", "accuracy, clean", "accuracy under any attack, bound",
        "images attacked", "accuracy under these attacks",
    ]  # fmt: skip
    ordered = sorted(lines, key=lambda line: line[0])
    few = [name for name in columns if name != "images attacked"]
    return "\n".join(tables.table(columns, [cells for _, cells in ordered], few))


def bounded_by(bounds: Mapping[str, Mapping[str, Any]]) -> str:
    """Which attacks the blocks of a result bound, radius by radius, in words."""
    blocks = [block for of_radius in bounds.values() for block in of_radius.values()]
    # Older results do not name it.
    if all(block.get("common_attack", False) for block in blocks):
        return "bounds of one attack on both sides"
    return "bounds of two attacks, one on either side"


def row(key: str, bounds: dict[str, Any], attacked: dict[str, Any]) -> list[str]:
    """One radius of the table."""

    def values(name: str, blocks: dict[str, Any] = bounds) -> Tensor:
        unknown = -torch.inf if name == "margin" else torch.nan
        found = [v for block in sorted(blocks) for v in blocks[block][name]]
        return torch.tensor([unknown if v is None else v for v in found])

    def share(right: Tensor) -> str:
        return tables.interval(study.share(right.float()))

    def median(name: str) -> str:
        return f"{float(study.middle(values(name).double())):.1f}"

    margins = values("margin")
    cells = ["", "", "", "", ""]
    if tried := sorted(bounds.keys() & attacked.keys()):  # of several processes one may be behind
        names = list(attacked[tried[0]]["right"])
        right = {
            name: torch.tensor([v for block in tried for v in attacked[block]["right"][name]])
            for name in names
        }
        clean = values("right", {block: bounds[block] for block in tried})
        same = values("margin", {block: bounds[block] for block in tried}) > 0
        mass = right["mass"] & clean
        evidence = torch.stack([right[n] for n in names if n != "mass"]).all(0) & clean
        cells = [
            str(len(clean)), share(mass & evidence), share(same), share(mass), share(evidence)
        ]  # fmt: skip
    return [
        key,
        str(len(margins)),
        share(values("right")),
        share(margins > 0),
        *cells,
        median("margin"),
        median("standard_error"),
        median("gap_right"),
        median("gap_wrong"),
    ]
