"""What the whole suite of adaptive attacks leaves of a defence: one result file per model and
radius.

For each target (the similarity of reconstructions, the accuracy of a classifier) and defence, the
report of :func:`~pyro_vae_defence.robustness.evaluate_robustness`: the worst case image by image
over all attacks, scored on seeds that no attack has seen, with the checks that say whether to
believe it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from pyro_vae_defence import attacks
from pyro_vae_defence.defence import Defence, DefendedClassifier, Reading
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments import tables
from pyro_vae_defence.experiments.defences import Setting, known_defence, label, make_defence
from pyro_vae_defence.experiments.defend import Defend
from pyro_vae_defence.experiments.drawing import picture
from pyro_vae_defence.experiments.html import ROBUST, robustness_page
from pyro_vae_defence.experiments.study import Cell, Measurement
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.files import write_atomically
from pyro_vae_defence.robustness import KNOWLEDGE, Budget, evaluate_robustness

Target = Literal["reconstruction", "classification"]


@dataclass(frozen=True)
class RobustnessConfig(conf.Configuration):
    """The whole suite of adaptive attacks against a model without and with defences.

    The defaults make one dataset and radius a matter of tens of minutes on one thread.

    Args:
        model: name of a trained model; the classifier is the one of its name.
        radius: L_inf radius of the attack, and what ``aware`` assumes.
        defences: names of :mod:`~pyro_vae_defence.experiments.defences`.
        targets: ``reconstruction`` (MSSSIM) and ``classification`` (accuracy).
        attacks: names of :data:`pyro_vae_defence.robustness.KNOWLEDGE`; unrolling whole chains is
            left out.
        engine: optimiser of :mod:`pyro_vae_defence.attacks`.
        reading: how the classifier reads draws, see :mod:`pyro_vae_defence.defence.classifier`.
        num_images: class-stratified test images.
        num_examples: of these, how many are kept as pictures.
        chain: of the defences.
        budget: how hard the suite tries.
        seed: seed of images, attacks and defences.
    """

    model: str
    radius: conf.AttackRadius
    defences: tuple[Annotated[str, known_defence()], ...] = ("none", "hmc", "aware")
    targets: tuple[Target, ...] = ("reconstruction", "classification")
    attacks: tuple[Annotated[str, conf.one_of(KNOWLEDGE)], ...] = (
        "transfer", "encoder", "bpda", "equilibrium", "black_box", "implicit", "truncated",
    )  # fmt: skip
    engine: conf.Engine = "APGD"
    reading: Reading = "reencoded"
    num_images: conf.Count = 32
    num_examples: conf.Count = 8
    chain: conf.ChainConfig = conf.ChainConfig(num_samples=5, warmup_steps=20)
    budget: Budget = Budget(
        num_restarts=1,
        num_draws=(1,),
        num_chains=8,
        persistent_transitions=1,
        unrolled_transitions=1,
        num_iterations=5,
        num_directions=5,
        black_box_steps=2,
        max_evaluations=20_000,
        selection_draws=2,
        scoring_draws=5,
    )
    seed: conf.Natural = 0


class Robustness(Measurement[RobustnessConfig]):
    """Every adaptive attack against the models of ``defend``, undefended and defended."""

    kind = command = "robustness"
    metric = None  # every report names its own figure
    names = {
        name: RobustnessConfig(config.model, config.radius) for name, config in Defend.names.items()
    }
    output = "runs/robustness"
    parts = ("reports",)

    def load(self) -> None:
        """The model, its classifier where one is a target, and images."""
        config = self.config
        self.vae, card = self.load_conv_vae(config.model)
        if "classification" in config.targets:
            self.classifier = self.load_classifier(f"{config.model}_classifier")
        self.x, labels = self.choose(card.training["dataset"], config.num_images, "images")
        self.labels = labels[:, 0]

    def cells(self) -> Iterator[Cell]:
        """A report per target and defence."""
        for target in self.config.targets:
            for name in self.config.defences:
                yield ("reports", f"{target}/{name}"), partial(self.report, target, name)

    def report(self, target: Target, name: str) -> dict[str, Any]:
        """One defence under the whole suite, and the first images under their worst attack."""
        config = self.config
        defence = make_defence(name, Setting(self.vae, config.chain, radius=config.radius))
        classify = None
        if target == "classification":
            classify = DefendedClassifier(defence, self.classifier, config.reading)
        report = evaluate_robustness(
            self.vae,
            defence,
            self.x,
            self.labels,
            classifier=classify,
            ball=Linf(config.radius),
            budget=config.budget,
            attacks=config.attacks,
            engine=getattr(attacks, config.engine),
            generator=self.generator(f"{target}/{name}"),
        )
        return {**report.to_dict(), "examples": self.examples(defence, report.x_adv)}

    def examples(self, defence: Defence, x_adv: Tensor) -> str:
        """The first images, not chosen: reference, worst attack, what the defence makes of it."""
        x, x_adv = (images[: self.config.num_examples] for images in (self.x, x_adv))
        outcome = defence(x_adv, torch.Generator().manual_seed(0))
        return picture((x, x_adv, outcome.reconstruction))

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """The worst cases, and what each attack left."""
        config, budget = result["config"], result["config"]["budget"]
        columns = [
            "", "figure", "clean", "random noise", "robust, mean", "robust, averaged",
            f"worst of {budget['scoring_draws']} draws", "decoder evaluations per image",
            "reliable",
        ]  # fmt: skip
        rows = [
            [
                label(key.split("/")[1]),
                report["figure"],
                *tables.intervals(report, "clean/mean", "random_noise", *ROBUST),
                f"{report['cost']['attack_evaluations_per_image']:,.0f}",
                "no" if report["unreliable"] else "yes",
            ]
            for key, report in result["reports"].items()
        ]
        note = (
            f"{config['num_images']} images, L_inf radius {config['radius']:g}, model "
            f"`{config['model']}`, classes read `{config['reading']}`, {budget['num_steps']} "
            f"steps of {config['engine']}, {budget['num_restarts']} restart(s), seed "
            f"{config['seed']}. Higher is more robust; per-image worst case over attacks on "
            "fresh seeds, 95% intervals over images. Heuristic, not certified."
        )
        lines = tables.table(columns, rows, ["", "figure", "clean", "robust, mean", "reliable"])
        for key, report in result["reports"].items():
            # What each attack left, those that were skipped, and why not to believe the report.
            each_one = [
                f"- {each['name']} ({each['num_draws']} draws): {tables.interval(each['figure'])}"
                for each in report["attacks"]
            ]
            each_one += [f"- skipped {name}: {why}" for name, why in report["skipped"].items()]
            each_one += [*(f"- unreliable: {reason}" for reason in report["reasons"]), ""]
            why = ", and why it is unreliable" if report["unreliable"] else ""
            lines += tables.folded(f"{key}, figure under each attack{why}", each_one)
        return tables.section(f"### robustness {result['name']}", note, lines, result)

    @classmethod
    def pages(cls, results: dict[str, dict[str, Any]], directory: Path) -> list[Path]:
        """One self-contained page of all reports, ``report.html``."""
        path = directory / "report.html"
        write_atomically(path, robustness_page(list(results.values())).encode())
        return [path]
