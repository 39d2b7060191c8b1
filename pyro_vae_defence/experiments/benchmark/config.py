"""What benchmarks have in common, and the configuration of that of the sampler engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pyro_vae_defence.experiments.benchmark.samplers import SAMPLERS
from pyro_vae_defence.experiments.configuration import (
    AttackRadius,
    Configuration,
    Count,
    Dataset,
    Natural,
    Positive,
    not_empty,
)
from pyro_vae_defence.experiments.study import C, Measurement
from pyro_vae_defence.models import ConvVAE


@dataclass(frozen=True)
class BenchmarkConfig(Configuration):
    """What the benchmark runs; ``docs/benchmark.md`` says what it measures.

    Args:
        model: name of a trained model with Bernoulli likelihood.
        dataset: test images of this name; the packaged subset needs no download.
        radii: L_inf radii of the attack on the encoder.
        num_images: attacked images, class-stratified.
        num_chains: chains per image.
        samplers: names of :data:`~pyro_vae_defence.experiments.benchmark.samplers.SAMPLERS`; all
            when ``None``.
        max_gradients: budget per chain; samplers known to be slow get a multiple of it and of the
            warm-up.
        warmup_gradients: of these, spent on adaptation.
        window: length of the running mean, in gradients.
        tolerance: distance in nats from the gold run's mean energy that counts as reached.
        similarity_every: least number of gradients between two similarities.
        gold_warmup: gradients per chain before the gold run.
        gold_gradients: gradients per chain of the gold run.
        ess_images: images of the effective sample size.
        ess_gradients: gradients per chain after warm-up of that; 0 leaves it out.
        timed_gradients: gradients per turn when kernels are timed.
        matmul_size: side of the matrices that give the machine's rate.
        rows: batch sizes of the decoder's gradient.
        repeats: turns of everything that is timed.
        engine_images: images for the comparison with other libraries.
        engine_transitions: transitions of that.
        engine_warmup: of these, how many adapt the step size.
        engine_steps: leapfrog steps of HMC.
        engine_tree_depth: largest tree depth of NUTS.
        one_by_one_images: images that run one after the other, over all turns.
        memory_images: numbers of images whose peak memory is measured.
        memory_batch_size: most chains at a time of those runs.
        memory_transitions: transitions of those runs.
        seed: seed of images, attack and chains.
    """

    model: str
    dataset: Dataset = "mnist_subset"
    radii: tuple[AttackRadius, ...] = (0.1, 0.2)
    num_images: Count = 40
    num_chains: Count = 4
    samplers: Annotated[tuple[str, ...], not_empty] | None = None
    max_gradients: Count = 300
    warmup_gradients: Count = 120
    window: Count = 40
    tolerance: Positive = 1.0
    similarity_every: Count = 8
    gold_warmup: Natural = 300
    gold_gradients: Count = 1500
    ess_images: Count = 20
    ess_gradients: Natural = 200
    timed_gradients: Count = 20
    matmul_size: Count = 2048
    rows: Annotated[tuple[Count, ...], not_empty] = (1, 16, 128, 512)
    repeats: Count = 3
    engine_images: Count = 500
    engine_transitions: Count = 12
    engine_warmup: Natural = 6
    engine_steps: Count = 4
    engine_tree_depth: Count = 3
    one_by_one_images: Count = 6
    memory_images: tuple[Count, ...] = (500, 2000, 8000)
    memory_batch_size: Count = 512
    memory_transitions: Count = 2
    seed: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.samplers or () if name not in SAMPLERS]
        if unknown:
            raise ValueError(f"unknown samplers {unknown}; choose from {', '.join(SAMPLERS)}")
        self.refuse_above(ess_images="num_images", one_by_one_images="engine_images")
        if self.engine_warmup >= self.engine_transitions:
            raise ValueError(
                f"engine_warmup must lie in 0..{self.engine_transitions - 1}, below "
                f"engine_transitions, got {self.engine_warmup}"
            )
        if self.warmup_gradients >= self.max_gradients:
            raise ValueError(
                f"warmup_gradients must lie between 0 and max_gradients = {self.max_gradients}, "
                f"got {self.warmup_gradients}"
            )


class Benchmark(Measurement[C]):
    """What all benchmarks have in common."""

    command = "benchmark"
    noun = "benchmark"
    metric = None
    output = "runs/benchmark"
    shared = False  # processes side by side would disturb what is timed
    only_on_cpu: ClassVar[bool] = False
    """Whether it measures a CPU, and refuses another device."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.only_on_cpu and self.device.type != "cpu":
            raise ValueError(
                f"device={str(self.device)!r}: `benchmark {self.name}` measures a CPU; leave it "
                "out, or run `benchmark gpu`"
            )

    def load_bernoulli_vae(self, name: str) -> ConvVAE:
        """A model whose likelihood other libraries know, with a metric, on the device."""
        vae, _ = self.load_conv_vae(name)
        metric = vae.mean_posterior_variance
        if vae.likelihood != "bernoulli" or not metric:
            raise ValueError(
                f"model {name!r} must have a Bernoulli likelihood and a mean posterior variance in "
                "its weights; choose a grey-scale model that this version has trained"
            )
        vae.mean_posterior_variance = {n: v.to(self.device) for n, v in metric.items()}
        return vae
