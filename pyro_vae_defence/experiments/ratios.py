r"""Figures 2 and 7: log posterior ratios before and after HMC, as histograms, with their test.

.. math:: \log PR(z^r, z) = \log p(x^r, z^r) - \log p(x^r, z)

(eqs. 11 and 62), in nats, with :math:`z^r \sim q(z|x^r)`: how much worse than its own encoding z
explains the *reference*. Before the defence z is a draw of the guide, after it the end of a chain;
of attacked images, and of the references themselves, where 0 is what two draws of the guide differ
by. The Kolmogorov-Smirnov test (C.1) asks whether before and after have one distribution. It takes
values for independent; attacks on one image are not, so it stands here twice, for all attacks as in
the paper, and for one number per image, the median over its attacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae_defence import metrics, plots
from pyro_vae_defence.attacks.base import FlatAttack
from pyro_vae_defence.defence import NoDefence
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments import study, tables
from pyro_vae_defence.experiments.defences import (
    PaperName,
    Published,
    Setting,
    chained,
    label,
    make_defence,
)
from pyro_vae_defence.experiments.drawing import new_figure
from pyro_vae_defence.experiments.paper.printed import printed
from pyro_vae_defence.experiments.study import Cell, Measurement, cost, interval, middle, share
from pyro_vae_defence.models import program

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF = {"attacked": "attacked images", "clean": "the references themselves"}


@dataclass(frozen=True)
class RatiosConfig(conf.Configuration):
    """Log posterior ratios of one model under the paper's attack on its encoder.

    Args:
        model: name of a trained model.
        radius: L_inf radius of the attack, in units of the image range.
        num_references: class-stratified test images.
        num_restarts: attacks per reference; all of them count, not the worst.
        defence: name of :mod:`~pyro_vae_defence.experiments.defences`.
        chain: of the defence, but for ``paper``.
        paper: whose published setting the defence ``paper`` is.
        seed: seed of references, attack and defences.
    """

    model: str
    radius: conf.AttackRadius = 0.1
    num_references: conf.Several = 50
    num_restarts: conf.Count = 10
    defence: Published = "hmc"
    chain: conf.ChainConfig = conf.ChainConfig(num_samples=20, warmup_steps=30)
    paper: PaperName | None = None
    seed: conf.Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.defence != "paper":
            self.refuse_idle("without the defence 'paper'", "paper")
        elif self.paper is None:
            raise ValueError("defence='paper' is a setting per dataset: set paper, as in 'mnist'")


class Ratios(Measurement[RatiosConfig]):
    """Ratios before and after a chain, of attacked and of clean images."""

    kind = command = "ratios"
    metric = None
    names = {
        **{dataset: RatiosConfig(f"{dataset}_vae") for dataset in ("mnist", "fashion_mnist")},
        "mnist_paper": RatiosConfig("mnist_vae", num_restarts=1, defence="paper", paper="mnist"),
    }
    output = "runs/ratios"
    parts = ("ratios",)

    def load(self) -> None:
        """The model, and references ``(N, C, H, W)`` of its dataset."""
        self.vae, card = self.load_vae(self.config.model)
        self.x_ref, _ = self.choose(card.dataset, self.config.num_references, "references")

    def cells(self) -> Iterator[Cell]:
        """Attacked images, and the references."""
        for of in OF:
            yield ("ratios", of), partial(self.ratios, of)

    @cached_property
    def attacked(self) -> FlatAttack:
        """Every restart of the paper's attack beside its reference."""
        attack = study.encoder_attack(self.vae, self.config.radius, self.config.num_restarts)
        return attack(self.x_ref, self.generator("attack")).flat()

    @torch.no_grad()
    def ratios(self, of: str) -> dict[str, Any]:
        """Ratios before and after the defence, one per attack; row ``r N + i`` is of image i."""
        config, references = self.config, self.attacked.references
        images = self.attacked.images if of == "attacked" else references
        setting = Setting(
            self.vae,
            config.chain,
            radius=config.radius,
            paper=config.paper,
            options={"progress": self.progress},
        )
        undefended = NoDefence(self.vae)
        encoded = undefended(references, self.generator("encoded")).latents
        before = undefended(images, self.generator("before", of)).latents
        after = make_defence(config.defence, setting)(images, self.generator("after", of))
        energy = program.potential(self.vae, references)
        return {
            name: [
                round(value, 3)
                for value in metrics.log_posterior_ratio(energy, encoded, latents).tolist()
            ]
            for name, latents in {"before": before, "after": after.latents}.items()
        } | cost(after)

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """The histograms, medians, and the test."""
        config = result["config"]
        (paper,) = (each for each in printed() if each.item == "figure_7")
        note = (
            f"{config['num_references']} reference images x {config['num_restarts']} attacks, "
            f"radius {config['radius']:g}, model `{config['model']}`, seed {config['seed']}; "
            f"defence: {label(config['defence'])}. Medians with 95% intervals over images. *All* "
            "takes every attack for independent, as the paper's test does."
        )
        if config["model"] == paper.model:
            note += f" The paper's, of its attacked images and its chain, has p = {paper.value}."
        if config["defence"] != "paper" and chained(config["defence"]):
            note += " The chain is this library's, not the paper's published setting."
        lines = [f"![{_text(result)}]({figure})\n" for figure in figures]
        columns = [
            "of", "median before (nats)", "median after (nats)", "lower after", "KS distance, all",
            "p, all", "KS distance, one per image", "p, one per image",
        ]  # fmt: skip
        rows = [[OF[of], *_row(cell, config)] for of, cell in result["ratios"].items()]
        shown = [*columns[:4], columns[7]]
        return tables.section(
            f"## {result['name']}", note, [*lines, *tables.table(columns, rows, shown)], result
        )

    @classmethod
    def figures(cls, result: dict[str, Any]) -> dict[str, Figure]:
        """Histograms, a panel of attacked images and one of clean ones."""
        return {"": histograms(result)}


def _row(cell: dict[str, Any], config: dict[str, Any]) -> list[str]:
    before, after = (torch.tensor(cell[name]) for name in ("before", "after"))
    image = torch.arange(config["num_references"]).repeat(config["num_restarts"])
    every, one = (
        metrics.ks_test(*pair)
        for pair in ((before, after), (_per_image(before, config), _per_image(after, config)))
    )
    return [
        *(tables.interval(interval(v, image, "median"), 1) for v in (before, after)),
        tables.interval(share((after < before).float(), image), 2),
        f"{every.statistic:.2f}",
        f"{every.p_value:.2g}",
        f"{one.statistic:.2f}",
        f"{one.p_value:.2g}",
    ]


def _per_image(values: Tensor, config: dict[str, Any]) -> Tensor:
    """Medians over the attacks on each image."""
    return middle(values.reshape(config["num_restarts"], config["num_references"]))


def histograms(result: dict[str, Any]) -> Figure:
    """Ratios before and after the defence (Figures 2 and 7)."""
    figure = new_figure(9, 3.4)
    for axes, (of, cell) in zip(
        figure.subplots(1, len(OF), squeeze=False)[0], result["ratios"].items(), strict=False
    ):
        plots.posterior_ratios(axes, *(torch.tensor(cell[name]) for name in ("before", "after")))
        axes.set_title(f"{result['name']}: {OF[of]}", fontsize=10)
        axes.set_ylabel("attacks" if of == "attacked" else "draws")
    return figure


def _text(result: dict[str, Any]) -> str:
    """What is seen in the figure."""
    medians = [
        f"of {OF[of]} the median is "
        + " before and ".join(
            f"{float(torch.tensor(cell[name]).quantile(0.5)):.1f}" for name in ("before", "after")
        )
        + " nats after"
        for of, cell in result["ratios"].items()
    ]
    return (
        f"Histograms of log posterior ratios on {result['name']}, blue undefended and "
        f"orange, hatched, defended: {'; '.join(medians)}."
    )
