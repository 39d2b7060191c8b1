"""Test likelihood and reconstruction error of a trained model, beside Table 7 of the paper.

On test images of the model's own dataset, with 95% intervals over images: the negative
log-likelihood by importance sampling, and by annealed importance sampling where asked for; the MSE
of one-sample reconstructions; active units; a Fréchet distance to samples of the model. What was
measured of the full test set also goes into the model's card, under ``test``, if the directory of
models was named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from pyro_vae_defence import metrics
from pyro_vae_defence.experiments import annealing, tables
from pyro_vae_defence.experiments.configuration import (
    Configuration,
    Count,
    Natural,
    Several,
    at_least,
    must_be,
)
from pyro_vae_defence.experiments.paper.printed import TABLE_7
from pyro_vae_defence.experiments.study import Cell, Measurement, check_place, interval, load
from pyro_vae_defence.experiments.train import DATASETS, MODELS, model_label
from pyro_vae_defence.models import program
from pyro_vae_defence.models.pretrained import load_card, save_card
from pyro_vae_defence.ops.ranks import rank
from pyro_vae_defence.ops.streams import Streams, draw_seed

MSE = metrics.metric_name("mse", "0..255")


def nll_name(num_samples: int) -> str:
    """Full name of the NLL by importance sampling, such as ``"nll[iwae 1000]"``."""
    return metrics.metric_name("nll", f"iwae {num_samples}")


@dataclass(frozen=True)
class EvaluateConfig(Configuration):
    """How a trained model is measured.

    Args:
        model: name of a trained model.
        num_images: class-stratified test images, the full test set if ``None``.
        num_samples: importance samples per image.
        rows: pairs of image and sample computed at once, which bounds the memory.
        features: trained feature extractor for a Fréchet distance between the images and as many
            samples of the model.
        ais_images: images whose NLL is also found by annealed importance sampling.
        ais_steps: temperatures of that.
        ais_chains: chains per image of that.
        seed: seed of the choice of images and of all draws.
    """

    model: str
    num_images: Several | None = 1000
    num_samples: Count = 1000
    rows: Count = 1000
    features: str | None = None
    ais_images: Annotated[Natural, must_be("0 or at least 2", lambda n: n != 1)] = 0
    ais_steps: Annotated[int, at_least(3)] = 100
    ais_chains: Count = 4
    seed: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_above(ais_images="num_images")
        if self.ais_images == 0:
            self.refuse_idle("without ais_images", "ais_steps", "ais_chains")


class Evaluate(Measurement[EvaluateConfig]):
    """Any trained model, by its name; the full test set has a file of its own."""

    kind = command = "evaluate"
    metric = None
    noun = "trained model"
    names = {name: EvaluateConfig(name) for name in MODELS}
    output = "runs/evaluate"
    parts = ("metrics",)
    timed = True
    origins: Tensor | None = None  # of the images, where some are made of the same
    shorthands = {"full": ("num_images", None)}

    @classmethod
    def has(cls, name: str) -> bool:
        """Any name: whether it is that of a model, its weights tell."""
        return True

    @classmethod
    def configuration(cls, name: str) -> EvaluateConfig:
        """All models are measured alike."""
        return EvaluateConfig(name)

    @property
    def path(self) -> Path:
        """``NAME.json``, or ``NAME_full.json`` for the full test set."""
        full = "_full" if self.config.num_images is None else ""
        return self.directory / f"{self.name}{full}.json"

    def run(self) -> dict[str, Any]:
        """Measure what is not measured yet; the result.

        Raises:
            OSError: if the result or the card cannot be written.
        """
        # Never into the card of an installed model, nor for what a trial has found.
        of_card = rank() == 0 and self.models is not None and self.config.num_images is None
        if of_card:
            check_place(Path(self.models or "") / f"{self.config.model}.json")
        result = super().run()
        if of_card and not self.remaining:
            self._write_card(result["metrics"])
        return result

    def _write_card(self, metrics: dict[str, Any]) -> None:
        """Write what was measured into the card, unless it is of other weights by now."""
        card = load_card(self.config.model, self.models)
        if card.sha256 == self.card.sha256:
            test = {**card.metrics.get("test", {}), **metrics}
            save_card(replace(card, metrics={**card.metrics, "test": test}), self.models)

    def load(self) -> None:
        """The model, and test images ``(N, C, H, W)`` of its dataset."""
        config = self.config
        self.check_name()
        self.vae, self.card = self.load_vae(config.model)
        dataset = self.result["dataset"] = self.card.dataset
        images, index = self.images(dataset), None
        if config.num_images is not None:
            index = self.chosen(dataset, config.num_images, "images")
        self.x, origins = images.images(index).to(self.device), images.origins(index)
        if len(origins.unique()) < len(origins):
            self.origins = origins
        if config.features is not None:
            self.extractor = self.load_classifier(config.features)

    def cells(self) -> Iterator[Cell]:
        """A cell per metric, by its full name."""
        config = self.config
        cells: dict[str, Callable[[], Any]] = {
            nll_name(config.num_samples): lambda: self.over_images(self.nll),
            MSE: lambda: self.over_images(self.mse()),
            "active_units": self.active_units,
        }
        if config.ais_images:
            cells[f"nll[ais {config.ais_steps}]"] = self.annealed
        if config.features is not None:
            cells[metrics.metric_name("frechet", config.features)] = self.distance
        for name, compute in cells.items():
            yield ("metrics", name), compute

    @cached_property
    def nll(self) -> Tensor:
        """-log p(x) by importance sampling, ``(N,)``, in nats."""
        num_samples, rows = self.config.num_samples, self.config.rows
        return metrics.nll(self.vae, self.x, num_samples, rows, self.generator("nll"))

    def over_images(self, values: Tensor) -> dict[str, float]:
        """Mean of the first images, with its interval; colours of one digit are resampled
        together."""
        image = None if self.origins is None else self.origins[: len(values)]
        return {**interval(values, image), "num_images": len(values)}

    def annealed(self) -> dict[str, Any]:
        """NLL by annealed importance sampling, beside the other one of the same images."""
        config = self.config
        some, schedule = slice(config.ais_images), metrics.sigmoid_schedule(config.ais_steps)
        generator = self.generator("ais")
        walk = annealing.ais(
            self.vae, self.x[some], schedule, config.ais_chains, generator=generator
        )
        both = {
            nll_name(config.num_samples): self.over_images(self.nll[some]),
            "difference": self.over_images(walk.nll - self.nll[some]),
            "acceptance_rate": float(walk.acceptance_rate.mean()),
        }
        return {**self.over_images(walk.nll), "on_the_same_images": both}

    @torch.no_grad()
    def mse(self) -> Tensor:
        """Of one-sample reconstructions, ``(N,)``, on the scale 0..255."""
        errors = [
            metrics.mse(x, self._decode(program.encode(self.vae, x, streams=streams)))
            for x, streams in self._parts("mse")
        ]
        return torch.cat(errors)

    @torch.no_grad()
    def active_units(self) -> dict[str, dict[str, int]]:
        """How many units of every site are active, and how many there are."""
        parts = [program.posterior_mean(self.vae, x) for x, _ in self._parts()]
        units = {
            site: metrics.active_units(torch.cat([means[site] for means in parts]))
            for site in parts[0]
        }
        return {site: {"active": int(u.sum()), "all": u.numel()} for site, u in units.items()}

    @torch.no_grad()
    def distance(self) -> dict[str, float]:
        """Fréchet distance between the images and as many means of p(x | z) at prior draws."""
        samples = [
            self._decode(program.prior(self.vae, x, streams=streams)).clamp(0, 1)
            for x, streams in self._parts("samples")
        ]
        distance = metrics.frechet(self.x, torch.cat(samples), self.extractor.features)
        return {"estimate": float(distance), "num_images": len(self.x)}

    def _decode(self, latents: Any) -> Tensor:
        return program.decode(self.vae, latents, tuple(self.x.shape[1:]))

    def _parts(self, *purpose: object) -> Iterator[tuple[Tensor, Streams]]:
        """``rows`` images at a time, with the images' own streams whatever the number of rows."""
        seed = draw_seed(self.generator(*purpose))
        for first in range(0, len(self.x), self.config.rows):
            x = self.x[first : first + self.config.rows]
            yield x, Streams.create(len(x), seed=seed, first_image=first, device=x.device)

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """A row per metric that is there."""
        rows = []
        for name, entry in result["metrics"].items():
            if "estimate" in entry:
                value = tables.interval(entry, 2) if "low" in entry else f"{entry['estimate']:.2f}"
                rows.append([name, value, f"{entry['num_images']:,}"])
        if units := result["metrics"].get("active_units", {}).values():
            active, every = (sum(site[key] for site in units) for key in ("active", "all"))
            rows.append(["active units", f"{active} of {every}", ""])
        table = tables.table(["metric", "value", "images"], rows)
        return tables.section(f"### evaluate {result['name']}", "", table, result)


# --- Table 7 --------------------------------------------------------------------------------------


def table(number: int, results: str | os.PathLike[str]) -> str:
    """Table 7 of the paper in Markdown, printed and measured numbers side by side; the full test
    set goes before a part of it.

    Args:
        number: 7.
        results: directory with the result files of ``evaluate``.

    Raises:
        ValueError: for a damaged result file, or one of another study.
    """
    return "\n".join(_table(dataset, Path(results)) for dataset in DATASETS)


def _table(dataset: str, results: Path) -> str:
    rows, sources = [], []
    for name in (name for name, config in MODELS.items() if config.dataset == dataset):
        files = (results / f"{name}_full.json", results / f"{name}.json")
        path = next((path for path in files if path.exists()), None)
        # Models that the paper's table does not have are shown once they are measured.
        if path is None and name not in TABLE_7:
            continue
        # Its one plain model stands beside all of ours.
        printed = TABLE_7.get(name.partition("_long")[0])
        of_paper = ["–", "–"] if printed is None else [f"{printed[k]:g}" for k in ("nll", "mse")]
        nll, mse = tables.NOT_MEASURED, tables.NOT_MEASURED
        if path is not None:
            result = load(path, f"evaluate {name}")
            if result.get("study") != Evaluate.kind:
                raise ValueError(f"{path} is no result of evaluate; move it away")
            config, measured = result["config"], result["metrics"]
            entry = measured[nll_name(config["num_samples"])]
            nll = tables.interval(entry, 2)
            mse = tables.interval(measured[MSE], 1) if MSE in measured else mse
            sources.append(
                f"- `{result['command']}`, commit `{result['provenance']['commit'][:12]}`, "
                f"{entry['num_images']:,} test images, {config['num_samples']} importance samples, "
                f"seed {config['seed']}"
            )
        rows.append([model_label(name), of_paper[0], nll, of_paper[1], mse])
    columns = ["", "NLL, paper", "NLL, ours", "MSE, paper", "MSE, ours"]
    note = (
        "NLL in nats; MSE per pixel on the scale 0..255. 95% intervals over images, whose number "
        "stands with the command."
    )
    lines = [f"### Table 7, {DATASETS[dataset]}", "", *tables.table(columns, rows), note, ""]
    folded = tables.folded("Commands, commits, importance samples", [*sources, ""])
    return "\n".join([*lines, *folded] if sources else lines)
