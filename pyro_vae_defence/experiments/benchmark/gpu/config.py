"""Configuration of the benchmark of a GPU, which the files of its sections share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pyro_vae_defence.experiments.configuration import (
    AttackRadius,
    Configuration,
    Count,
    Dataset,
    Natural,
    Positive,
    at_least,
    not_empty,
)


@dataclass(frozen=True)
class GPUBenchmarkConfig(Configuration):
    """What the benchmark runs; ``docs/benchmark_gpu.md`` says what it measures.

    Args:
        model: name of a trained ``ConvVAE`` with Bernoulli likelihood.
        dataset: its images; where there are fewer than asked for they are taken in turn.
        seconds: time per section for what is repeated, after everything has run twice.
        repeats: turns of everything that is timed, at most.
        matmul_size: side of the matrices that give the card's rate.
        copy_mebibytes: size of the copy that gives its bandwidth.
        rows: chains of one batch, in the order in which they are measured.
        compiled_rows: the same for compiled gradients, which come last and take the time of
            several compilations each.
        num_steps: leapfrog steps of a transition.
        step_size: of the chains whose gradients are counted, and of those of the comparison with
            other libraries, where adaptation starts from it.
        num_images: images of the defence, and of the comparison with other libraries.
        num_chains: chains per image.
        batch_size: most chains at a time of the defence.
        radius: L_inf radius of the attack.
        attack_steps: gradients of the attack.
        warmup_steps: transitions of the defence during which the step size adapts.
        num_samples: transitions after them.
        tolerance: distance in nats from the gold run's mean energy that counts as reached.
        window: length of the running mean, in gradients.
        gold_images: images of the gold run.
        gold_warmup: transitions before the gold run.
        gold_samples: transitions of the gold run.
        library_transitions: transitions of the comparison with other libraries.
        library_warmup: of these, how many adapt the step size.
        library_seconds: longest wait for an answer of another library.
        epoch_images: images of a training epoch.
        epoch_batch_sizes: batch sizes of training.
        ascent_images: images of one attack's step.
        ascent_steps: gradients of the attack whose step is timed, >= 3.
        profile_rows: chains of the transitions that are profiled.
        seed: seed of images, attack and chains.
    """

    model: str = "mnist_vae"
    dataset: Dataset = "mnist_subset"
    seconds: Positive = 6.0
    repeats: Count = 5
    matmul_size: Count = 8192
    copy_mebibytes: Count = 1024
    rows: Annotated[tuple[Count, ...], not_empty] = (8192, 32768, 65536, 2048, 512)
    compiled_rows: tuple[Count, ...] = (8192, 32768, 65536, 2048, 512)
    num_steps: Count = 4
    step_size: Positive = 0.2
    num_images: Count = 10_000
    num_chains: Count = 4
    batch_size: Count = 65_536
    radius: AttackRadius = 0.1
    attack_steps: Count = 20
    warmup_steps: Count = 15
    num_samples: Count = 10
    tolerance: Positive = 1.0
    window: Count = 40
    gold_images: Count = 1000
    gold_warmup: Count = 50
    gold_samples: Count = 150
    library_transitions: Count = 12
    library_warmup: Natural = 6
    library_seconds: Positive = 90.0
    epoch_images: Count = 50_000
    epoch_batch_sizes: Annotated[tuple[Count, ...], not_empty] = (512, 100)
    ascent_images: Count = 1000
    ascent_steps: Annotated[int, at_least(3)] = 20
    profile_rows: Count = 8192
    seed: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.library_warmup >= self.library_transitions:
            raise ValueError(
                f"library_warmup must lie in 0..{self.library_transitions - 1}, below "
                f"library_transitions, got {self.library_warmup}"
            )
