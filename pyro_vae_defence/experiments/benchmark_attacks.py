"""Our encoder attacks beside those of public attack libraries: same model, images and budget of
gradients.

Every method maximises the symmetric KL-divergence from the same references in the same L_inf ball,
once, from its own random start. The libraries see an
:class:`~pyro_vae_defence.attacks.interop.EncoderAttackHead`. Evaluations are counted where all
methods pass: in the objective. What a library returns is scored as it is.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae_defence import attacks, data
from pyro_vae_defence.attacks.interop import EncoderAttackHead
from pyro_vae_defence.experiments import markdown, results
from pyro_vae_defence.experiments.config import AttackBenchmarkConfig, command, override
from pyro_vae_defence.experiments.provenance import provenance
from pyro_vae_defence.models.pretrained import load_card, load_pretrained
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.types import Objective, PreparedObjective

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


def benchmark_attacks(
    output: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    models: str | os.PathLike[str] | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run every method once; writes ``attacks.json`` to ``output``.

    Libraries that are not installed are left out.

    Args:
        output: directory of the result file.
        root: directory of the datasets.
        models: directory of the weights; the packaged ones when ``None``.
        overrides: fields of :class:`AttackBenchmarkConfig` to change; they are recorded in the
            result.

    Raises:
        ValueError: for an unknown override.
    """
    config = override(AttackBenchmarkConfig(), overrides)
    source = provenance()
    vae = load_pretrained(config.model, models)
    test_set = data.load(config.dataset, "test", root)
    generator = torch.Generator().manual_seed(config.seed)
    x_ref = test_set.images(data.stratified(test_set, config.num_images, generator))
    prepared = attacks.symmetric_kl(vae)
    score = prepared(x_ref)
    rows: dict[str, dict[str, Any]] = {}
    values: dict[str, Tensor] = {}

    def run(name: str, attack: Callable[[PreparedObjective], Tensor], version: str) -> None:
        counted = _Counted(prepared)
        started = time.perf_counter()
        x_adv = attack(counted).detach()
        seconds = time.perf_counter() - started
        with torch.no_grad():
            values[name] = score(x_adv)
        rows[name] = {
            "version": version,
            "symmetric_kl": results.interval(values[name]),
            "num_gradients": counted.num_gradients,
            "num_queries": counted.num_queries,
            "seconds": round(seconds, 2),
            "largest_perturbation": float((x_adv - x_ref).abs().max()),
        }

    for name, optimiser in OURS.items():
        run(name, _our_attack(optimiser, x_ref, config), source["commit"])
    for name, (module, package, attack) in THEIRS.items():
        if importlib.util.find_spec(module) is None:
            continue
        # The libraries draw from the global generators.
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            np.random.seed(config.seed)  # noqa: NPY002
            run(name, _their_attack(attack, vae, x_ref, config), metadata.version(package))
    for name, entry in rows.items():
        if name != _REFERENCE:
            entry["advantage_of_ours"] = results.interval(values[_REFERENCE] - values[name])
    result = {
        "benchmark": "attacks",
        "config": dataclasses.asdict(config),
        "weights": load_card(config.model, models).sha256,
        "command": command("benchmark", "attacks", overrides),
        "provenance": source,
        "methods": rows,
    }
    results.save(Path(output) / "attacks.json", result)
    return result


def attacks_table(result: dict[str, Any]) -> str:
    """A result of :func:`benchmark_attacks` as a Markdown table."""
    config = result["config"]
    lines = [
        "### Attacks at equal gradients",
        "",
        f"Symmetric KL-divergence (nats, mean over {config['num_images']} images of "
        f"{config['dataset']} with 95% bootstrap interval) that attacks on `{config['model']}` "
        "reach in "
        f"the L_inf ball of radius {config['radius']:g}, from one random start each, at commit "
        f"`{result['provenance']['commit'][:12]}` (`{result['command']}`). The last column is the "
        "mean advantage of "
        f"{_REFERENCE.removeprefix('ours: ')} of this library over the method, image by image.",
        "",
        "| method | symmetric KL | gradients | queries | advantage of ours |",
        "|---|---|---|---|---|",
    ]
    for name, entry in result["methods"].items():
        lines.append(
            f"| {name} | {_cell(entry['symmetric_kl'])} | {entry['num_gradients']} | "
            f"{entry['num_queries']} | {_cell(entry.get('advantage_of_ours'))} |"
        )
    return "\n".join(lines) + "\n"


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


def _our_attack(
    optimiser: type[attacks.Attack], x_ref: Tensor, config: AttackBenchmarkConfig
) -> Callable[[PreparedObjective], Tensor]:
    def attack(prepared: PreparedObjective) -> Tensor:
        generator = torch.Generator().manual_seed(config.seed)
        settings = optimiser(prepared, Linf(config.radius), num_steps=config.num_gradients)
        return settings(x_ref, generator).best()

    return attack


def _their_attack(
    attack: Callable[..., Tensor], vae: Any, x_ref: Tensor, config: AttackBenchmarkConfig
) -> Callable[[PreparedObjective], Tensor]:
    return lambda prepared: attack(EncoderAttackHead(vae, x_ref, prepared), x_ref, config)


def _cell(entry: dict[str, float] | None) -> str:
    return "--" if entry is None else markdown.interval(entry, 1)
