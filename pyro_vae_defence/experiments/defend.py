"""Attack a trained model's encoder and defend it: one row block of Tables 2 and 3 per radius.

The paper's attack from several starts on every reference, all of them counted; for each defence the
similarity of reconstructions before and after, the median log posterior ratio (eq. 11), the energy
of the attacked image where the defence ends, and what it cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any

import torch
from torch import Tensor

from pyro_vae_defence import metrics
from pyro_vae_defence.attacks.base import AttackResult, FlatAttack
from pyro_vae_defence.defence import DefenceResult, NoDefence
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments import study, tables
from pyro_vae_defence.experiments.defences import (
    PaperName,
    Published,
    Setting,
    check_published,
    label,
    make_defence,
)
from pyro_vae_defence.experiments.study import METRIC, Cell, Measurement
from pyro_vae_defence.models import program
from pyro_vae_defence.types import Potential


@dataclass(frozen=True)
class DefendConfig(conf.Configuration):
    """A model, an encoder attack, and defences against it.

    Args:
        model: name of a trained model.
        radius: L_inf radius of the attack, in units of the image range.
        num_references: class-stratified test images.
        num_restarts: attacks per reference; all of them count, not the worst.
        defences: names of :mod:`~pyro_vae_defence.experiments.defences`.
        chain: of the defences, but for ``paper``.
        paper: whose published setting the defence ``paper`` is; the dataset's when ``None``.
        seed: seed of references, attack and defences.
    """

    model: str
    radius: conf.AttackRadius
    num_references: conf.Several = 50
    num_restarts: conf.Count = 10
    defences: Annotated[tuple[Published, ...], conf.not_empty] = ("none", "hmc", "paper")
    chain: conf.ChainConfig = conf.ChainConfig(num_samples=20, warmup_steps=30)
    paper: PaperName | None = None
    seed: conf.Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if "paper" not in self.defences:
            self.refuse_idle("without the defence 'paper'", "paper")


class Defend(Measurement[DefendConfig]):
    """Defences against the paper's attack on one model."""

    kind = command = "defend"
    names = {
        f"{dataset}_radius_{radius:g}": DefendConfig(f"{dataset}_vae", radius)
        for dataset in ("mnist", "fashion_mnist", "color_mnist")
        for radius in (0.1, 0.2)
    }
    output = "runs/results"
    parts = ("defences",)

    def load(self) -> None:
        """The model, and references ``(N, C, H, W)`` of its dataset."""
        self.vae, card = self.load_vae(self.config.model)
        dataset = card.dataset
        self.paper = self.config.paper or dataset
        if "paper" in self.config.defences:
            check_published(self.paper)
        self.x_ref, _ = self.choose(dataset, self.config.num_references, "references")

    @cached_property
    def attack(self) -> AttackResult:
        """The paper's, from every start."""
        attack = study.encoder_attack(self.vae, self.config.radius, self.config.num_restarts)
        return attack(self.x_ref, self.generator("attack"))

    @cached_property
    def attacked(self) -> FlatAttack:
        """Every restart beside its reference."""
        return self.attack.flat()

    @cached_property
    def before(self) -> DefenceResult:
        """rec(x^r) decodes one draw of the guide."""
        return NoDefence(self.vae)(self.attacked.references, self.generator("before"))

    def cells(self) -> Iterator[Cell]:
        """What the attack reached, the noise floor, then a cell per defence."""
        yield ("symmetric_kl",), self.reached
        yield ("noise_floor",), self.noise_floor
        for name in self.config.defences:
            yield ("defences", name), partial(self.defended, name)

    def reached(self) -> dict[str, float]:
        """The symmetric KL that the attack reaches, in nats."""
        return study.interval(self.attack.objective.flatten(), self.attacked.index)

    def noise_floor(self) -> dict[str, float]:
        """Similarity of two undefended reconstructions of the same reference."""
        again = self.reconstruct(self.vae, self.attacked.references, "again")
        return study.similarity(self.before.reconstruction, again, self.attacked.index)

    def defended(self, name: str) -> dict[str, Any]:
        """One defence against all attacks."""
        setting = Setting(
            self.vae,
            self.config.chain,
            radius=self.config.radius,
            paper=self.paper,
            options={"progress": self.progress},
        )
        images, references, image = self.attacked
        outcome = make_defence(name, setting)(images, self.generator("defence", name))
        at_reference = program.potential(self.vae, references)
        return score(self.before, outcome, at_reference, program.potential(self.vae, images), image)

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """A row per defence, and the noise floor."""
        rows = [score_cells(name, entry) for name, entry in result["defences"].items()]
        rows.append(["noise floor", tables.interval(result.get("noise_floor")), *[""] * 5])
        columns = ["", *SCORE_COLUMNS]
        shown = [*columns[:4], "gradients per image"]
        return score_section(result, "", columns, rows, shown)


# --- Scores, also of hierarchical models ----------------------------------------------------------


@torch.no_grad()
def score(
    before: DefenceResult,
    outcome: DefenceResult,
    at_reference: Potential,
    at_attacked: Potential,
    image: Tensor,
) -> dict[str, Any]:
    """What a defence has reached and what it cost.

    Args:
        before: undefended references.
        outcome: their attacked images, defended.
        at_reference: energies (N,) of latents at the references.
        at_attacked: at the attacked images.
        image: which reference each row is of, (N,).
    """
    ratio = metrics.log_posterior_ratio(at_reference, before.latents, outcome.latents)
    return {
        "ms_ssim": study.similarity(before.reconstruction, outcome.reconstruction, image),
        "log_posterior_ratio_median": study.interval(ratio, image, "median"),
        "energy": study.interval(at_attacked(outcome.latents), image),
        **study.cost(outcome),
        **study.chain_statistics(outcome.sample_stats),
    }


SCORE_COLUMNS = (
    METRIC,
    "median log posterior ratio (nats)",
    "energy of x_adv (nats)",
    "acceptance",
    "gradients per image",
    "seconds per image",
)


def score_cells(name: str, entry: dict[str, Any]) -> list[str]:
    """A defence, and the cells below :data:`SCORE_COLUMNS`."""
    acceptance = entry.get("acceptance_rate")
    return [
        label(name),
        tables.interval(entry["ms_ssim"]),
        *tables.intervals(entry, "log_posterior_ratio_median", "energy", digits=1),
        "" if acceptance is None else f"{acceptance:.2f}",
        f"{entry['gradients_per_image']:.0f}",
        f"{entry['seconds_per_image']:.3g}",
    ]


def score_section(
    result: dict[str, Any],
    more: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    shown: Sequence[str],
) -> str:
    """The section of a result with scores; ``more`` ends its note, ``shown`` are the columns in the
    text."""
    config = result["config"]
    note = (
        f"{config['num_references']} reference images x {config['num_restarts']} restarts, radius "
        f"{config['radius']:g}, model `{config['model']}`, seed {config['seed']}. 95% intervals "
        f"over reference images.{more}"
    )
    lines = tables.table(columns, rows, shown)
    return tables.section(f"### {result['name']}", note, lines, result)
