"""Our encoder attacks beside those of public libraries: same model, images and gradients.

Every method maximises the symmetric KL-divergence from the same references in the same L_inf ball,
once, from its own random start. The libraries see an
:class:`~pyro_vae_defence.attacks.interop.EncoderAttackHead`. Evaluations are counted where all
methods pass: in the objective. What a library returns is scored as it is.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae_defence import attacks
from pyro_vae_defence.attacks.interop import EncoderAttackHead
from pyro_vae_defence.experiments.benchmark.config import Benchmark
from pyro_vae_defence.experiments.configuration import (
    AttackRadius,
    Configuration,
    Dataset,
    Natural,
    Several,
    at_least,
)
from pyro_vae_defence.experiments.study import Cell, interval
from pyro_vae_defence.experiments.tables import interval as shown
from pyro_vae_defence.experiments.tables import table
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.provenance import commit
from pyro_vae_defence.types import Objective, PreparedObjective


@dataclass(frozen=True)
class AttackBenchmarkConfig(Configuration):
    """What the benchmark runs.

    Args:
        model: name of a trained model.
        dataset: name of its test images.
        num_images: class-stratified references.
        radius: of the L_inf ball, in units of the image range.
        num_gradients: gradients per image and method, >= 3.
        seed: seed of the choice of images and of all attacks.
    """

    model: str = "mnist_vae"
    dataset: Dataset = "mnist_subset"
    num_images: Several = 50
    radius: AttackRadius = 0.1
    num_gradients: Annotated[int, at_least(3)] = 50
    seed: Natural = 0


OURS = {
    "ours: APGD": attacks.APGD,
    "ours: L-BFGS": attacks.LBFGS,
    "ours: PGD": attacks.PGD,
    "ours: momentum PGD": attacks.MomentumPGD,
}
_REFERENCE = "ours: APGD"


def _foolbox_pgd(head: nn.Module, x: Tensor, config: AttackBenchmarkConfig) -> Tensor:
    import foolbox

    model = foolbox.PyTorchModel(head, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(steps=config.num_gradients)
    return attack(model, x, _labels(x), epsilons=config.radius)[1]


def _torchattacks_pgd(head: nn.Module, x: Tensor, config: AttackBenchmarkConfig) -> Tensor:
    import torchattacks

    # Its default proportion of step and radius, 2/255 and 8/255.
    step = config.radius / 4
    attack = torchattacks.PGD(head, eps=config.radius, alpha=step, steps=config.num_gradients)
    return attack(x, _labels(x))


def _torchattacks_apgd(head: nn.Module, x: Tensor, config: AttackBenchmarkConfig) -> Tensor:
    import torchattacks

    # It spends two gradients more than it has steps (as counted).
    steps = config.num_gradients - 2
    attack = torchattacks.APGD(head, norm="Linf", eps=config.radius, steps=steps, seed=config.seed)
    return attack(x, _labels(x))


def _art_pgd(head: nn.Module, x: Tensor, config: AttackBenchmarkConfig) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    model = PyTorchClassifier(
        head, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 2, clip_values=(0, 1), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        model,
        eps=config.radius,
        # Its default proportion of step and radius, 0.1 and 0.3.
        eps_step=config.radius / 3,
        max_iter=config.num_gradients,
        num_random_init=1,
        batch_size=len(x),
        verbose=False,
    )
    return torch.as_tensor(attack.generate(x.numpy(), _labels(x).numpy()))


def _labels(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.long)


# Name, package as imported, package as installed, attack.
THEIRS: dict[str, tuple[str, str, Callable[..., Tensor]]] = {
    "foolbox: LinfPGD": ("foolbox", "foolbox", _foolbox_pgd),
    "torchattacks: PGD": ("torchattacks", "torchattacks", _torchattacks_pgd),
    "torchattacks: APGD": ("torchattacks", "torchattacks", _torchattacks_apgd),
    "ART: PGD": ("art", "adversarial-robustness-toolbox", _art_pgd),
}


class BenchmarkAttacks(Benchmark[AttackBenchmarkConfig]):
    """Optimisers of this library and of others, where installed, at equal budgets."""

    kind = "benchmark_attacks"
    names = {"attacks": AttackBenchmarkConfig()}
    only_on_cpu = True

    def load(self) -> None:
        """The model and references."""
        config = self.config
        self.vae, _ = self.load_vae(config.model)
        self.x_ref, _ = self.choose(config.dataset, config.num_images, "references")
        self.prepared = attacks.symmetric_kl(self.vae)
        self.score = self.prepared(self.x_ref)
        self.values: dict[str, Tensor] = {}

    def cells(self) -> Iterator[Cell]:
        """All methods at once, since they are compared image by image."""
        yield ("methods",), self.methods

    def methods(self) -> dict[str, Any]:
        """Every method once."""
        config = self.config
        rows = {}
        for name, optimiser in OURS.items():

            def ours(prepared: PreparedObjective, optimiser: Any = optimiser) -> Tensor:
                attack = optimiser(prepared, Linf(config.radius), num_steps=config.num_gradients)
                return attack(self.x_ref, torch.Generator().manual_seed(config.seed)).best()

            rows[name] = self.measured(name, ours, commit())
        for name, (module, package, attack) in THEIRS.items():
            if importlib.util.find_spec(module) is None:
                continue

            def theirs(prepared: PreparedObjective, attack: Any = attack) -> Tensor:
                return attack(EncoderAttackHead(self.vae, self.x_ref, prepared), self.x_ref, config)

            # The libraries draw from the global generators.
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                np.random.seed(config.seed)  # noqa: NPY002
                rows[name] = self.measured(name, theirs, metadata.version(package))
        for name, entry in rows.items():
            if name != _REFERENCE:
                entry["advantage_of_ours"] = interval(self.values[_REFERENCE] - self.values[name])
        return rows

    def measured(
        self, name: str, attack: Callable[[PreparedObjective], Tensor], version: str
    ) -> dict[str, Any]:
        """What one method reaches, and what it spends."""
        counted = _Counted(self.prepared)
        started = time.perf_counter()
        x_adv = attack(counted).detach()
        seconds = time.perf_counter() - started
        with torch.no_grad():
            self.values[name] = self.score(x_adv)
        return {
            "version": version,
            "symmetric_kl": interval(self.values[name]),
            "num_gradients": counted.num_gradients,
            "num_queries": counted.num_queries,
            "seconds": round(seconds, 2),
            "largest_perturbation": float((x_adv - self.x_ref).abs().max()),
        }

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """A row per method."""
        config = result["config"]
        rows = [
            [
                name,
                _cell(entry["symmetric_kl"]),
                f"{entry['num_gradients']}",
                f"{entry['num_queries']}",
                _cell(entry.get("advantage_of_ours")),
            ]
            for name, entry in result["methods"].items()
        ]
        columns = ["method", "symmetric KL", "gradients", "queries", "advantage of ours"]
        return "\n".join(
            [
                "### Attacks at equal gradients",
                "",
                f"Symmetric KL-divergence (nats, mean over {config['num_images']} images of "
                f"{config['dataset']} with 95% bootstrap interval) that attacks on "
                f"`{config['model']}` reach in the L_inf ball of radius {config['radius']:g}, from "
                f"one random start each, at commit `{result['provenance']['commit'][:12]}` "
                f"(`{result['command']}`). The last column is the mean advantage of "
                f"{_REFERENCE.removeprefix('ours: ')} of this library over the method, image by "
                "image.",
                "",
                *table(columns, rows),
            ]
        )


class _Counted:
    """A prepared objective that counts evaluations with and without gradients."""

    def __init__(self, prepared: PreparedObjective) -> None:
        self.prepared = prepared
        self.num_gradients = self.num_queries = 0

    def __call__(self, x_ref: Tensor, streams: Any = None) -> Objective:
        inner = self.prepared(x_ref, streams=streams)

        def objective(x: Tensor) -> Tensor:
            value = inner(x)
            self.num_gradients += value.requires_grad
            self.num_queries += not value.requires_grad
            return value

        return objective


def _cell(entry: dict[str, float] | None) -> str:
    return "--" if entry is None else shown(entry, 1)
