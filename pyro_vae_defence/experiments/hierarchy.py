"""Attack the top latent groups of an NVAE and defend it on all groups at once: one panel of Figure
4 (section 4.3).

For every number of attacked groups, the strength of the attack and one entry per defence. Images go
through the model in parts of ``batch_size``; whatever is random comes from the images' own streams,
so that the parts do not matter (but to the paper's setting on MNIST, whose one step size couples
the images of a part).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from pyro_vae_defence import attacks, plots
from pyro_vae_defence.defence import DefenceResult
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments import study, tables
from pyro_vae_defence.experiments.defences import (
    PaperName,
    Published,
    Setting,
    colour,
    label,
    make_defence,
)
from pyro_vae_defence.experiments.defend import SCORE_COLUMNS, score, score_cells, score_section
from pyro_vae_defence.experiments.drawing import interval_curve, new_figure, save_figure
from pyro_vae_defence.experiments.study import METRIC, Cell, Measurement
from pyro_vae_defence.models import program
from pyro_vae_defence.models.nvae import NVAE, load_official
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.types import Latents, Potential

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class HierarchyConfig(conf.Configuration):
    """Attacks on the top latent groups of an NVAE, and defences on all groups at once.

    Args:
        model: name of a trained NVAE, or what to call the one of an official checkpoint.
        dataset: name for :func:`pyro_vae_defence.data.load`.
        paper: whose published setting the defence ``paper`` is.
        radius: L_inf radius of the attack, in units of the image range.
        groups: numbers :math:`k_A` of attacked groups, counted from the top; one attack each.
        num_references: class-stratified test images.
        num_restarts: attacks per reference; all of them count, not the worst.
        attack_steps: gradient steps of an attack.
        column: which label to stratify by, where there are several.
        defences: names of :mod:`~pyro_vae_defence.experiments.defences`; ``aware`` assumes the
            attack's radius.
        noncentred: whether defences other than ``paper`` move the noise of the latents instead of
            the latents.
        chain: of the defences, but for ``paper``.
        metric_images: training images the metric is measured on, if the model comes without.
        batch_size: most images at once, which bounds the memory.
        checkpointing: recompute activations in backward passes, which bounds the memory of large
            models.
        num_examples: of the first references, how many are kept as pictures, under the attack on
            the most groups.
        seed: seed of references, attacks and defences.
    """

    model: str
    dataset: conf.Dataset
    paper: PaperName
    radius: conf.AttackRadius
    groups: Annotated[tuple[conf.Count, ...], conf.not_empty]
    num_references: conf.Several = 50
    num_restarts: conf.Count = 10
    attack_steps: conf.Count = 50
    column: conf.Natural = 0
    defences: Annotated[tuple[Published, ...], conf.not_empty] = ("none", "hmc", "aware")
    noncentred: bool = True
    chain: conf.ChainConfig = conf.ChainConfig(warmup_steps=40, step_size=0.2)
    metric_images: conf.Count = 1000
    batch_size: conf.Count = 500
    checkpointing: bool = False
    num_examples: Annotated[int, conf.between(0, 8)] = 5
    seed: conf.Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_above(num_examples="num_references")


def _hierarchies() -> dict[str, HierarchyConfig]:
    small = HierarchyConfig("mnist_nvae", "mnist", "mnist_nvae", 0.1, groups=(1, 2, 4, 6))
    large = HierarchyConfig(
        "celeba_nvae", "celeba64", "celeba_nvae", 0.05, groups=(1, 5, 10, 20), num_references=20,
        defences=("none", "paper", "hmc", "aware"), batch_size=20, checkpointing=True,
        column=20,  # "Male"
    )  # fmt: skip
    return {
        f"{config.model}_radius_{radius:g}": replace(config, radius=radius)
        for config, radii in ((small, (0.1, 0.2)), (large, (0.05, 0.1)))
        for radius in radii
    }


class DefendHierarchy(Measurement[HierarchyConfig]):
    """``<model>_radius_<radius>`` of Figure 4 and Table 8; the weights of ``celeba_nvae`` are the
    official ones and have to be given as a file.

    Args:
        checkpoint: official checkpoint to defend, instead of a trained model of this library.
        arguments, options: of :class:`~pyro_vae_defence.experiments.study.Study`.
    """

    kind = "hierarchy"
    command = "defend"
    names = _hierarchies()
    output = "runs/results"
    parts = ("groups",)
    options = {"checkpoint": "official NVAE checkpoint (checkpoint.pt) to defend, e.g. CelebA's"}

    def __init__(
        self, *arguments: Any, checkpoint: str | os.PathLike[str] | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.checkpoint = checkpoint

    def command_line(self, **options: Any) -> str:
        """The command that repeats the run."""
        return super().command_line(checkpoint=self.checkpoint, **options)

    def load(self) -> None:
        """The model on its device, and test images that fit it.

        Raises:
            ValueError: for a model that is no NVAE, too many groups, or images that do not fit.
        """
        config = self.config
        if self.checkpoint is None:
            vae, _ = self.load_vae(config.model)
        else:
            vae = load_official(self.checkpoint)
            content = Path(self.checkpoint).read_bytes()
            self.weights[config.model] = hashlib.sha256(content).hexdigest()
        if not isinstance(vae, NVAE):
            what = f"it is a {type(vae).__name__}"
            raise ValueError(f"model {config.model!r} has no latent groups: {what}")
        if max(config.groups) > (most := vae.config.num_groups):
            raise ValueError(f"groups={config.groups} must be at most the model's {most} groups")
        shape = self.images(config.dataset).image_shape
        if shape != vae.image_shape:
            raise ValueError(
                f"images of {config.dataset!r} have shape {shape}, the model's {vae.image_shape}; "
                "set dataset=NAME of a fitting one"
            )
        vae.checkpointing = config.checkpointing
        self.vae = vae.requires_grad_(False).to(self.device)
        self.programs: Any = self.vae.noncentred() if config.noncentred else self.vae
        number, column = config.num_references, config.column
        self.x_ref, _ = self.choose(config.dataset, number, "references", column=column)
        # Once per restart, and which reference each row is of.
        self.references = self.x_ref.repeat(config.num_restarts, 1, 1, 1)
        self.image = torch.arange(len(self.x_ref)).repeat(config.num_restarts)

    def cells(self) -> Iterator[Cell]:
        """The noise floor; then per number of groups the attack, and a cell per defence."""
        yield ("noise_floor",), self.noise_floor
        for k in self.config.groups:
            yield ("groups", str(k), "symmetric_kl"), partial(self.reached, k)
            for name in self.config.defences:
                yield ("groups", str(k), "defences", name), partial(self.defended, name, k)

    @cached_property
    def before(self) -> DefenceResult:
        """rec(x^r) decodes one draw of the guide."""
        return self.undefended(self.references, "before")

    def noise_floor(self) -> dict[str, float]:
        """Similarity of two undefended reconstructions of the same reference."""
        again = self.undefended(self.references, "again")
        return study.similarity(self.before.reconstruction, again.reconstruction, self.image)

    @study.remembered
    def attacked(self, k: int) -> attacks.AttackResult:
        """The attack on the top ``k`` groups."""
        config = self.config
        attack = attacks.PGD(
            attacks.symmetric_kl(self.vae, sites=k),
            Linf(config.radius),
            num_steps=config.attack_steps,
            num_restarts=config.num_restarts,
            preset="paper",
            batch_size=config.batch_size,
        )
        return attack(self.x_ref, self.generator("attack", k))

    def reached(self, k: int) -> dict[str, float]:
        """The symmetric KL over the top ``k`` groups that the attack reaches, in nats."""
        return study.interval(self.attacked(k).objective.flatten(), self.image)

    def defended(self, name: str, k: int) -> dict[str, Any]:
        """One defence against the attack on the top ``k`` groups."""
        x_adv = self.attacked(k).flat().images
        defence = make_defence(name, self.setting(name))
        outcome = defence(x_adv, self.generator("defence", name, k))
        if set(outcome.latents) != set(self.vae.sites):  # it has moved noise
            outcome = replace(outcome, latents=self.to_latents(outcome.latents))
        at_reference, at_attacked = self.energy(self.references), self.energy(x_adv)
        found = score(self.before, outcome, at_reference, at_attacked, self.image)
        if self.config.num_examples and k == max(self.config.groups):
            rows = (self.references, self.before.reconstruction, x_adv, outcome.reconstruction)
            found["examples"] = plots.picture([x[: self.config.num_examples] for x in rows])
        return found

    def undefended(self, x: Tensor, *purpose: object) -> DefenceResult:
        """One draw of the guide, decoded."""
        guide = make_defence("none", self.setting("none"))
        return guide(x, self.generator(*purpose))

    def setting(self, name: str) -> Setting:
        """What a defence runs on: the paper's on latents, others on noise if that is asked for."""
        config = self.config
        options: dict[str, Any] = {"progress": self.progress}
        common: dict[str, Any] = {"batch_size": config.batch_size, "options": options}
        if name in ("none", "paper"):
            if name == "paper":
                options["num_draws"] = 1  # all draws of all groups may not fit in memory
            return Setting(self.vae, config.chain, paper=config.paper, **common)
        return Setting(self.programs, config.chain, self.inverse_mass, config.radius, **common)

    @cached_property
    def inverse_mass(self) -> Latents:
        """Mean posterior variance of what chains move, over training images no attacker changes."""
        config = self.config
        found: Latents | None = self.programs.mean_posterior_variance
        if found is None:
            images = self.images(config.dataset, "train")
            generator = self.generator("metric")
            order = torch.randperm(len(images), generator=generator)[: config.metric_images]
            parts = order.split(config.batch_size)
            batches = (images.images(part).to(self.device) for part in parts)
            found = program.mean_posterior_variance(self.programs, batches, generator=generator)
        return {site: variance.to(self.device) for site, variance in found.items()}

    def energy(self, x: Tensor) -> Potential:
        """U(z; x) = -log p(x | z) - sum_k log p(z_k | z_{>k}), in nats."""

        def energy(part: Tensor, latents: Latents) -> Tensor:
            return program.potential(self.vae, x[part])(lat.index(latents, part))

        parts = self._parts(x)
        return lambda latents: torch.cat([energy(part, latents) for part in parts])

    @torch.no_grad()
    def to_latents(self, noise: Latents) -> Latents:
        """The latents that stand for noise."""
        rows = self._parts(self.references)
        parts = [self.programs.to_latents(lat.index(noise, part)) for part in rows]
        return {site: torch.cat([part[site] for part in parts]) for site in self.vae.sites}

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.arange(len(x), device=x.device).split(self.config.batch_size)

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """A row per number of attacked groups and defence."""
        rows = [
            [k, tables.interval(entry["symmetric_kl"], 1), *score_cells(name, found)]
            for k, entry in result["groups"].items()
            for name, found in entry.get("defences", {}).items()
        ]
        columns = ["attacked groups", "symmetric KL (nats)", "", *SCORE_COLUMNS]
        floor = f" Noise floor of {METRIC}: {tables.interval(result['noise_floor'])}."
        shown = [*columns[:4], "gradients per image"]
        return score_section(result, floor, columns, rows, shown)

    @classmethod
    def pages(cls, results: dict[str, dict[str, Any]], directory: Path) -> list[Path]:
        """Figure 4 of every model, ``MODEL_groups.png``."""
        by_model: dict[Path, list[dict[str, Any]]] = {}
        for result in results.values():
            path = directory / f"{result['config']['model']}_groups.png"
            by_model.setdefault(path, []).append(result)
        for path, found in by_model.items():
            save_figure(groups_figure(found), path, dpi=120)
        return list(by_model)


def groups_figure(results: list[dict[str, Any]]) -> Figure:
    """Similarity against the number of attacked groups (Figure 4), one panel per result."""
    results = sorted(results, key=lambda result: result["config"]["radius"])
    figure = new_figure(3.6 * len(results), 3.2)
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        for name in result["config"]["defences"]:
            points = {
                float(k): entry["defences"][name]["ms_ssim"]
                for k, entry in result["groups"].items()
                if name in entry.get("defences", {})
            }
            entries = list(points.values())
            interval_curve(axes, list(points), entries, label(name), colour(name))
        axes.axhline(result["noise_floor"]["estimate"], color="black", lw=0.8, ls=":")
        axes.set_title(f"radius {result['config']['radius']:g}", fontsize=10)
        axes.set_xlabel("attacked groups, from the top")
    panels[0].set_ylabel(METRIC)
    panels[-1].legend(fontsize=8)
    return figure
