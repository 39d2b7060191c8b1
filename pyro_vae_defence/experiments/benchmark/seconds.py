r"""Table 5: seconds per image against the number of transitions, of the published sampler and ours.

A transition of a chain does the same work wherever it stands in it, so that seconds are a line,

.. math:: s(n) = s(n_1) + (n - n_1) \, \frac{s(n_2) - s(n_1)}{n_2 - n_1},

through two short chains, whose runs take turns; medians over turns. The published sampler makes 20
leapfrog steps per transition (its code took 21 gradients for them, one more than here) and T // 2 +
T transitions where the paper says T. Ours is the recommended chain on the same target, 25
transitions of 4 steps on average after 30 gradients of burn-in. For an NVAE it moves the noise of
the latents.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
from torch import Tensor

from pyro_vae_defence.defence import Defence, MCMCDefence, NoDefence
from pyro_vae_defence.defence.mcmc import PAPER_SETTINGS, RECOMMENDED_LENGTHS
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments import tables
from pyro_vae_defence.experiments.benchmark.config import Benchmark
from pyro_vae_defence.experiments.paper.printed import printed
from pyro_vae_defence.experiments.published import on_device
from pyro_vae_defence.experiments.study import Cell
from pyro_vae_defence.experiments.train import MODELS
from pyro_vae_defence.models.nvae import NVAE

WAYS = {"published": "the published sampler", "ours": "the recommended one"}
PRINTED = (100, 500, 1000)
"""Numbers of transitions in the paper's table, beside none."""


@dataclass(frozen=True)
class SecondsConfig(conf.Configuration):
    """Seconds per image of two samplers.

    Args:
        models: names of trained models that have a published setting.
        num_images: attacked or not, it is the same work; at once.
        lengths: transitions of the short and of the long chain.
        repeats: turns.
        seed: seed of the choice of images and of chains.
    """

    models: Annotated[tuple[Annotated[str, conf.one_of(MODELS)], ...], conf.not_empty] = (
        "mnist_vae", "color_mnist_vae", "mnist_nvae",
    )  # fmt: skip
    num_images: conf.Count = 50
    lengths: tuple[conf.Count, ...] = (2, 6)
    repeats: conf.Count = 3
    seed: conf.Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.lengths) != 2 or self.lengths[0] >= self.lengths[1]:
            raise ValueError(f"lengths must be a short and a long one, got {self.lengths}")


class BenchmarkSeconds(Benchmark[SecondsConfig]):
    """Seconds per image over the number of transitions."""

    kind = "benchmark_seconds"
    names = {"seconds": SecondsConfig()}
    parts = ("models",)

    def load(self) -> None:
        """The models, each with images of its dataset's packaged subset."""
        self.of: dict[str, tuple[Any, str, Tensor]] = {}
        for name in self.config.models:
            vae, card = self.load_vae(name)
            dataset = card.dataset.removesuffix("_subset")
            paper = f"{dataset}_nvae" if isinstance(vae, NVAE) else dataset
            if paper not in PAPER_SETTINGS:
                known = ", ".join(PAPER_SETTINGS)
                raise ValueError(f"models holds {name!r}, without a published setting ({known})")
            x, _ = self.choose(f"{dataset}_subset", self.config.num_images, "images")
            self.of[name] = vae, paper, x

    def cells(self) -> Iterator[Cell]:
        """A cell per model."""
        for name in self.of:
            yield ("models", name), partial(self.timed_model, name)

    def defences(self, name: str) -> dict[str, Defence]:
        """No defence, and both samplers in both lengths."""
        vae, paper, _ = self.of[name]
        programs = vae.noncentred() if isinstance(vae, NVAE) else vae
        recommended = MCMCDefence.recommended(programs, None, num_chains=1)
        # All transitions as long as they are on average.
        kernel: Any = recommended.kernel
        even = replace(recommended, kernel=partial(kernel, jitter=0.0))
        chains = {"published": MCMCDefence.paper(vae, paper, 1), "ours": even}
        found: dict[str, Defence] = {"none": NoDefence(vae)}
        for way, chain in chains.items():
            own: dict[str, Any] = {"prepare": on_device(self.device), "keep_draws": 1}
            for length in self.config.lengths:
                found[f"{way} {length}"] = replace(chain, num_samples=length, warmup_steps=0, **own)
        return found

    def timed_model(self, name: str) -> dict[str, Any]:
        """Seconds and gradients per image."""
        config, (_, paper, x) = self.config, self.of[name]
        defences = self.defences(name)
        seconds: dict[str, list[float]] = {way: [] for way in defences}
        gradients = {}
        for turn in range(-1, config.repeats):  # the first records, or captures
            for way, defence in defences.items():
                self.note(f"{name}: {way}")
                generator = torch.Generator().manual_seed(config.seed + turn + 1)
                began = time.perf_counter()
                outcome = defence(x, generator)
                gradients[way] = float(outcome.num_gradients.double().mean())  # waits for a GPU
                if turn >= 0:
                    seconds[way].append((time.perf_counter() - began) / len(x))
        short, long = config.lengths
        lines = {}
        for way in WAYS:
            at_short, at_long = (median(seconds[f"{way} {n}"]) for n in config.lengths)
            few, many = (gradients[f"{way} {n}"] for n in config.lengths)
            lines[way] = {
                "seconds": {str(short): at_short, str(long): at_long},
                "per_transition": (at_long - at_short) / (long - short),
                "gradients_per_transition": (many - few) / (long - short),
            }
        return {"paper": paper, "none": median(seconds["none"]), **lines}

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """Seconds at the printed numbers of transitions, and ratios."""
        rows = []
        for name, found in result["models"].items():
            published, ours = (found[way]["per_transition"] > 0 for way in WAYS)
            whole = seconds_at(found["ours"], sum(_OURS))
            for count in (0, *PRINTED):
                theirs = found["none"] if count == 0 else published_seconds(found, count)
                of_paper = _printed(name, count)
                rows.append(
                    [
                        name,
                        str(count),
                        "" if of_paper is None else f"{of_paper:g}",
                        _digits(theirs, published or count == 0),
                        _digits(theirs / whole, published and ours) if count else "",
                    ]
                )
        columns = ["", "T", "printed (s)", "published sampler (s)", "times ours"]
        details = [
            [
                name,
                label,
                _digits(found[way]["per_transition"], rises),
                f"{found[way]['gradients_per_transition']:.3g}",
                _digits(seconds_at(found["ours"], sum(_OURS)), rises) if way == "ours" else "",
            ]
            for name, found in result["models"].items()
            for way, label in WAYS.items()
            for rises in [found[way]["per_transition"] > 0]
        ]
        lines = tables.table(columns, rows)
        heads = ["", "sampler", "seconds per transition", "gradients per transition", "whole (s)"]
        lines += tables.table(heads, details)
        config = result["config"]
        note = (
            f"Seconds per image, {config['num_images']} images at once, lines through chains of "
            f"{' and '.join(map(str, config['lengths']))} transitions, medians of "
            f"{config['repeats']} turns. T is the paper's number: its code ran T // 2 + T "
            f"transitions. *Ours* is the recommended chain of {sum(_OURS)} transitions on the same "
            "target. Printed seconds are of another machine, and a batch that is not stated: "
            "compare ratios."
        )
        if any(tables.NOT_MEASURED in cells for cells in details):
            note += (
                f" *{tables.NOT_MEASURED.capitalize()}*: the longer chains took no longer than the "
                "shorter ones; set longer lengths or more repeats."
            )
        return tables.section(f"### benchmark {result['name']}", note, lines, result)


def _digits(seconds: float, rises: bool) -> str:
    """Of a line that rises; another one says what else the machine was at."""
    return f"{seconds:.3g}" if rises else tables.NOT_MEASURED


_OURS = (RECOMMENDED_LENGTHS["warmup_steps"], RECOMMENDED_LENGTHS["num_samples"])


def seconds_at(line: dict[str, Any], count: int) -> float:
    """Seconds per image of a chain of so many transitions."""
    short, at_short = next(iter(line["seconds"].items()))
    return at_short + (count - int(short)) * line["per_transition"]


def published_seconds(found: dict[str, Any], count: int) -> float:
    """Seconds per image of the published sampler where the paper says ``count`` transitions."""
    return seconds_at(found["published"], count // 2 + count)


def _printed(model: str, count: int) -> float | None:
    """What Table 5 says."""
    for each in printed():
        if (each.item, each.model, each.at) == ("table_5", model, str(count)):
            return float(each.value)
    return None
