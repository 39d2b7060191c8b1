"""The sampler engine: what an image costs, against what the machine and other libraries can do.

One result file, section by section, each measured by a file of its own; ``docs/benchmark.md`` says
what is measured and how.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from pyro_vae_defence.experiments.benchmark.chains import chains, seconds_per_gradient
from pyro_vae_defence.experiments.benchmark.config import Benchmark, BenchmarkConfig
from pyro_vae_defence.experiments.benchmark.decoder import decoder
from pyro_vae_defence.experiments.benchmark.engines import engines
from pyro_vae_defence.experiments.benchmark.memory import memory
from pyro_vae_defence.experiments.benchmark.samplers import SAMPLERS
from pyro_vae_defence.experiments.benchmark.tables import benchmark_tables
from pyro_vae_defence.experiments.study import Cell


class BenchmarkSamplers(Benchmark[BenchmarkConfig]):
    """The sampler engine."""

    kind = "benchmark_samplers"
    names = {"samplers": BenchmarkConfig("mnist_vae")}
    only_on_cpu = True
    parts = ("sections",)

    def load(self) -> None:
        """The model, references, and images for the comparison with other libraries."""
        config = self.config
        self.vae = self.load_bernoulli_vae(config.model)
        self.references, _ = self.choose(config.dataset, config.num_images, "references")
        self.many, _ = self.choose(config.dataset, config.engine_images, "engines")

    def cells(self) -> Iterator[Cell]:
        """A cell per section."""
        config, vae, references = self.config, self.vae, self.references
        names = tuple(SAMPLERS) if config.samplers is None else config.samplers
        note = self.note
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "decoder": lambda: decoder(vae, references, config),
            "seconds_per_gradient": lambda: seconds_per_gradient(vae, references, names, config),
            "engines": lambda: engines(vae, self.many, config, note),
            "memory": lambda: memory(self.models, config, note),
        }
        for radius in config.radii:
            parts = functools.partial(chains, vae, references, radius, names, config, note)
            sections[f"chains {radius:g}"] = parts
        for name, measure in sections.items():
            yield ("sections", name), functools.partial(self.measured, measure)

    def measured(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Sections may come from several calls, hence each says where and how long it ran."""
        began = time.perf_counter()
        return {
            "results": measure(),
            "wall_seconds": round(time.perf_counter() - began, 1),
            "commit": self.result["provenance"]["commit"],
        }

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """All tables; sections that are missing are left out."""
        return benchmark_tables(result)
