"""What the whole suite of adaptive attacks leaves of a defence: one result file per dataset and
radius."""

from __future__ import annotations

import dataclasses
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence import attacks, data
from pyro_vae_defence.defence import Defence, DefendedClassifier, MCMCDefence, NoDefence
from pyro_vae_defence.experiments import results
from pyro_vae_defence.experiments.config import RobustnessConfig, command, override
from pyro_vae_defence.experiments.defences import whitened_hmc
from pyro_vae_defence.experiments.drawing import picture
from pyro_vae_defence.experiments.registry import MODELS, ROBUSTNESS
from pyro_vae_defence.experiments.weights import load_conv_vae
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.classifier import load_classifier
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.robustness import Budget, evaluate_robustness


def robustness(
    name: str,
    output: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    models: str | os.PathLike[str] | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the experiment ``name``; reports that the result file already holds are not made again.

    Args:
        name: a name of :data:`pyro_vae_defence.experiments.registry.ROBUSTNESS`.
        output: directory of the result file ``NAME.json``, written after every report.
        root: directory of the datasets.
        models: directory of the weights of VAE and classifier; the packaged ones when ``None``.
        overrides: fields of the configuration to change; they are recorded in the result.

    Raises:
        ValueError: for an unknown name or override, missing weights, or a result file of another
            configuration.
    """
    if name not in ROBUSTNESS:
        raise ValueError(f"no experiment named {name!r}; choose one of {', '.join(ROBUSTNESS)}")
    config = override(ROBUSTNESS[name], overrides)
    path = Path(output) / f"{name}.json"
    vae, card_of_vae = load_conv_vae(config.model, models)
    weights = {config.model: card_of_vae.sha256}
    classifier = None
    if "classification" in config.targets:
        classifier, card = load_classifier(f"{config.model}_classifier", models)
        weights[card.name] = card.sha256
    result = results.header(
        f"robustness {name}", config, weights, command("robustness", name, overrides)
    )
    result["reports"] = {}
    results.resume(path, result, "reports")

    test_set = data.load(MODELS[config.model].dataset, "test", root)
    chosen = data.stratified(
        test_set, config.num_images, torch.Generator().manual_seed(config.seed)
    )
    x, labels = test_set.images(chosen), test_set.labels[chosen]
    labels = labels if labels.dim() == 1 else labels[:, 0]
    for target in config.targets:
        for kind in config.defences:
            key = f"{target}/{kind}"
            if key in result["reports"]:
                continue
            defence = _defence(kind, vae, config)
            classify = None
            if target == "classification":
                assert classifier is not None
                classify = DefendedClassifier(defence, classifier, config.reading)
            report = evaluate_robustness(
                vae,
                defence,
                x,
                labels,
                classifier=classify,
                ball=Linf(config.radius),
                budget=_budget(config),
                attacks=config.attacks,
                engine=getattr(attacks, config.engine),
                # A seed of its own: a report does not depend on which others are made.
                generator=torch.Generator().manual_seed(config.seed + zlib.crc32(key.encode())),
            )
            result["reports"][key] = {
                **report.to_dict(),
                "examples": _examples(defence, x, report.x_adv, config.num_examples),
            }
            results.save(path, result, indent=1)
    return result


def _examples(defence: Defence, x: Tensor, x_adv: Tensor, number: int) -> str:
    """The first images, not chosen: reference, worst attack and what the defence makes of it."""
    x, x_adv = x[:number], x_adv[:number]
    outcome = defence(x_adv, torch.Generator().manual_seed(0))
    return picture((x, x_adv, outcome.reconstruction))


def _budget(config: RobustnessConfig) -> Budget:
    known = {field.name for field in dataclasses.fields(Budget)}
    found: dict[str, Any] = {k: v for k, v in vars(config).items() if k in known}
    return Budget(**found)


def _defence(kind: str, vae: ConvVAE, config: RobustnessConfig) -> Defence:
    if kind == "none":
        return NoDefence(vae)
    kernel = whitened_hmc(vae, config.step_size, config.leapfrog_steps)
    perturbation = Linf(config.radius) if kind == "aware" else None
    return MCMCDefence(
        vae, kernel, config.num_samples, config.warmup_steps, perturbation=perturbation
    )
