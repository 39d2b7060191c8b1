"""A GPU: gradients per second against what the card can do, defences, other libraries, training.

One result file, section by section, the most wanted first; ``docs/benchmark_gpu.md`` says what is
measured and how. What fails, such as a library that is missing or a batch that does not fit, is
recorded in its place. It runs on the CPU too, which tries the program and measures no GPU.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence import attacks
from pyro_vae_defence.experiments.benchmark.config import Benchmark
from pyro_vae_defence.experiments.benchmark.gpu.card import card
from pyro_vae_defence.experiments.benchmark.gpu.config import GPUBenchmarkConfig
from pyro_vae_defence.experiments.benchmark.gpu.defence import defence
from pyro_vae_defence.experiments.benchmark.gpu.gradients import gradients
from pyro_vae_defence.experiments.benchmark.gpu.libraries import numpyro, torchebm
from pyro_vae_defence.experiments.benchmark.gpu.profiling import profiles
from pyro_vae_defence.experiments.benchmark.gpu.steps import ascent, training
from pyro_vae_defence.experiments.benchmark.gpu.tables import gpu_tables
from pyro_vae_defence.experiments.benchmark.gpu.timing import failure, release, wait
from pyro_vae_defence.experiments.benchmark.gpu.ways import COMPILED, PLAIN, cycled
from pyro_vae_defence.experiments.study import Cell, remembered
from pyro_vae_defence.ops.balls import Linf


class BenchmarkGPU(Benchmark[GPUBenchmarkConfig]):
    """The sampler engine on a GPU."""

    kind = "benchmark_gpu"
    names = {"gpu": GPUBenchmarkConfig()}
    parts = ("sections",)

    def load(self) -> None:
        """The model, its classifier, and all images."""
        config = self.config
        self.vae = self.load_bernoulli_vae(config.model)
        self.classifier = self.load_classifier(f"{config.model}_classifier")
        test = self.images(config.dataset, "test")
        most = min(max(config.num_images, config.ascent_images), len(test))
        chosen = torch.randperm(len(test), generator=self.generator("images"))[:most]
        self.x = test.images(chosen).to(self.device)
        self.labels = test.labels[chosen].reshape(most, -1)[:, 0].to(self.device)

    def cells(self) -> Iterator[Cell]:
        """A cell per section and batch size."""
        config, vae, x, note = self.config, self.vae, self.x, self.note
        was, now = (run.get("device") for run in (self.result["provenance"], self.provenance))
        if was != now:
            raise ValueError(
                f"{self.path} is of {was or 'a CPU'}, this is {now or 'a CPU'}; "
                "choose another output directory"
            )
        sizes = {*config.rows, *config.compiled_rows}
        at = {rows: functools.partial(gradients, vae, x, rows) for rows in sizes}
        first, *others = config.rows
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "card": lambda: card(vae, x, config, note),
            f"gradients {first}": lambda: at[first](PLAIN, config, note),
            "defence": lambda: defence(vae, self.attacked(), config, note),
            "numpyro": lambda: numpyro(vae, self.attacked(), config, note),
            "profile": lambda: profiles(vae, x, config, note),
        }
        for rows in others:
            sections[f"gradients {rows}"] = functools.partial(at[rows], PLAIN, config, note)
        sections |= {
            "torchebm": lambda: torchebm(vae, self.attacked(), config, note),
            "training": lambda: training(self.epoch(), config, self.device, note),
            "attack": self.ascents,
        }
        for rows in config.compiled_rows:
            sections[f"compiled {rows}"] = functools.partial(at[rows], COMPILED, config, note)
        for name, measure in sections.items():
            yield ("sections", name), functools.partial(self.measured, name, measure)

    def measured(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A section, or the error that kept it from being measured."""
        self.note(name)
        try:
            wait(self.device)
        except RuntimeError as error:
            raise ValueError(
                f"{self.device} does not answer any more ({failure(error)['error']}); "
                "run the same command again, which goes on after the section that failed"
            ) from error
        began = time.perf_counter()
        try:
            entry: dict[str, Any] = {"results": measure()}
        except Exception as error:  # the other sections go on
            entry = failure(error)
        torch.compiler.reset()
        release(self.device)
        return {**entry, "wall_seconds": round(time.perf_counter() - began, 1)}

    @remembered
    def attacked(self) -> Tensor:
        """The images of the defence, each once, attacked by the paper's objective."""
        config = self.config
        objective = attacks.symmetric_kl(self.vae)
        attack = attacks.PGD(objective, Linf(config.radius), num_steps=config.attack_steps)
        return attack(self.x[: config.num_images], self.generator("attack")).best()

    def epoch(self) -> Tensor:
        """Images of a training epoch, on the host."""
        train = self.images(self.config.dataset, "train")
        every = train.images(torch.arange(min(len(train), self.config.epoch_images)))
        return cycled(every, self.config.epoch_images)

    def ascents(self) -> dict[str, Any]:
        """Steps of attacks, on images that are taken in turn where there are fewer."""
        config = self.config
        x, labels = (cycled(part, config.ascent_images) for part in (self.x, self.labels))
        return ascent(self.vae, self.classifier, x, labels, config, self.note)

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """All tables; sections that are missing are left out."""
        return gpu_tables(result)
