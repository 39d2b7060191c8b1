"""Train a named model and write its weights and card."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pyro
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from pyro_vae_defence import data, objectives
from pyro_vae_defence.attacks import PGD
from pyro_vae_defence.attacks.objectives import squared_wasserstein
from pyro_vae_defence.experiments.config import TrainConfig, command, override
from pyro_vae_defence.experiments.provenance import provenance
from pyro_vae_defence.experiments.registry import MODELS
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.models.nvae import NVAE, NVAEConfig
from pyro_vae_defence.models.pretrained import (
    TrainedVAE,
    WeightCard,
    load_card,
    load_pretrained,
    save_pretrained,
)
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.training import FitConfig, evaluate, fit

SE_STEPS = 20
"""Gradient steps of SE's inner maximisation (Cemgil et al. 2020)."""

HALF_TOLERANCE = 0.01
"""Largest change of the validation -ELBO, in nats, for which weights are stored in float16."""


def make_vae(config: TrainConfig, in_channels: int) -> TrainedVAE:
    """The untrained model a configuration names, for images of ``in_channels`` channels."""
    if config.architecture is None:
        return ConvVAE(in_channels)
    return NVAE(NVAEConfig.from_dict(config.architecture))


def make_objective(config: TrainConfig, vae: TrainedVAE, data_size: int, num_steps: int) -> Any:
    """The Pyro ELBO a configuration names, for ``num_steps`` optimisation steps in all."""

    def perturb(x: torch.Tensor) -> torch.Tensor:
        attack = PGD(squared_wasserstein(vae), Linf(config.radius), num_steps=SE_STEPS)
        return attack(x).best()

    if config.objective == "beta":
        return objectives.BetaELBO(config.beta)
    if config.objective == "beta_tcvae":
        return objectives.BetaTCVAE(config.beta, data_size, estimator=config.estimator)
    if config.objective == "se":
        return objectives.SE(perturb, config.gamma)
    if config.objective == "avae":
        return objectives.AVAE(config.rho)
    if config.objective == "se_avae":
        return objectives.SEAVAE(perturb, config.gamma, config.rho)
    if config.objective == "avae_ss":
        return objectives.AVAESS(config.rho)
    if config.objective == "nvae":
        if not isinstance(vae, NVAE):
            raise ValueError(
                "objective 'nvae' needs an architecture; set its fields, see NVAEConfig"
            )
        return objectives.NVAEObjective(
            vae, num_steps, kl_anneal=config.kl_anneal, penalty=config.penalty
        )
    raise ValueError(f"unknown objective {config.objective!r}")


def train(
    name: str,
    output: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    overrides: dict[str, Any] | None = None,
    progress: bool = True,
    models: str | os.PathLike[str] | None = None,
) -> WeightCard:
    """Train the model ``name`` of the registry; resumes when interrupted.

    Writes ``NAME.safetensors`` and ``NAME.json`` to ``output``, with a checkpoint and the history
    beside them in ``output/NAME``.

    Args:
        name: a name of :data:`pyro_vae_defence.experiments.registry.MODELS`.
        output: directory for the results.
        root: directory of the datasets.
        overrides: fields of the configuration to change; they are recorded in the card.
        progress: show a progress bar.
        models: directory of the model it starts from, where its configuration names one; the
            packaged ones when ``None``.

    Raises:
        ValueError: for an unknown name or override.
    """
    if name not in MODELS:
        raise ValueError(f"no model named {name!r}; choose one of {', '.join(MODELS)}")
    config = override(MODELS[name], overrides)
    folder = Path(output) / name
    folder.mkdir(parents=True, exist_ok=True)

    train_set = data.load(config.dataset, "train", root)
    validation_set = data.load(config.dataset, "validation", root)
    count = config.images_per_epoch or len(train_set)
    sampler = BatchSampler(RandomSampler(train_set, num_samples=count), config.batch_size, True)
    loader: DataLoader[Any] = DataLoader(train_set, sampler=sampler, batch_size=None)
    # About 5,000 images; a stride of 6 visits all seven colours of ColorMNIST.
    stride = 6 if len(validation_set) > 5000 else 1
    validation = [
        validation_set.images(
            list(range(len(validation_set)))[first : first + 500 * stride : stride]
        )
        for first in range(0, len(validation_set), 500 * stride)
    ]

    torch.manual_seed(config.seed)
    pyro.clear_param_store()
    training = dataclasses.asdict(config)
    if config.start_from is None:
        vae = make_vae(config, train_set.image_shape[0])
    else:
        vae = load_pretrained(config.start_from, models).train()
        training["start_from_sha256"] = load_card(config.start_from, models).sha256
    num_steps = config.epochs * len(loader)
    objective = make_objective(config, vae, len(train_set), num_steps)
    result = fit(
        vae,
        objective,
        loader,
        FitConfig(
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            schedule=config.schedule,
            checkpoint_every=200,
            progress=progress,
            name=f"{name}: {config}",
        ),
        validation=validation,
        checkpoint=folder / "checkpoint.pt",
        on_epoch=lambda entry: _append(folder / "history.jsonl", entry),
    )
    measured = {"validation_nelbo": result.history[-1]["validation_nelbo"]}
    dtype = torch.float32
    if config.half:
        before, after = (_nelbo(each, validation) for each in (vae, _rounded(vae)))
        measured["validation_nelbo_change[float16]"] = after - before
        if abs(after - before) <= HALF_TOLERANCE:
            dtype = torch.float16
    noise_variance = None
    if isinstance(vae, NVAE):
        noise_variance = program.mean_posterior_variance(vae.noncentred(), loader)
    return save_pretrained(
        vae,
        name,
        output,
        training=training,
        command=command("train", name, overrides),
        provenance={
            **provenance(),
            "seconds": round(sum(entry["seconds"] for entry in result.history), 1),
        },
        metrics=measured,
        mean_posterior_variance=result.mean_posterior_variance,
        mean_noise_variance=noise_variance,
        dtype=dtype,
    )


def _rounded(vae: TrainedVAE) -> TrainedVAE:
    """A copy whose weights went through float16."""
    rounded = copy.deepcopy(vae)
    rounded.load_state_dict({key: value.half() for key, value in vae.state_dict().items()})
    return rounded


def _nelbo(vae: TrainedVAE, validation: Any) -> float:
    """Validation -ELBO with the same draws whichever model it is of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return evaluate(vae, objectives.BetaELBO(1.0), validation)


def _append(path: Path, entry: dict[str, float]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
