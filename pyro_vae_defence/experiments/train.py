"""Train a named model and write its weights and card."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from pyro_vae_defence import data, objectives
from pyro_vae_defence.attacks import PGD
from pyro_vae_defence.attacks.objectives import squared_wasserstein
from pyro_vae_defence.experiments.configuration import (
    AttackRadius,
    Configuration,
    Count,
    Natural,
    Positive,
    Share,
    override,
)
from pyro_vae_defence.experiments.paper import TABLE_7
from pyro_vae_defence.ops.provenance import provenance
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

ObjectiveName = Literal["beta", "beta_tcvae", "se", "avae", "se_avae", "avae_ss", "nvae"]


@dataclass(frozen=True)
class TrainConfig(Configuration):
    """How a named model is trained.

    The paper trains for 300 epochs with a plateau rule; the one-cycle schedule reaches a comparable
    likelihood in a tenth of that, which is what these models can afford. For the same reason the
    variants of a model start from the trained plain one and are trained until they have adapted.

    Args:
        dataset: name for :func:`pyro_vae_defence.data.load`.
        objective: which objective of :mod:`pyro_vae_defence.objectives`.
        start_from: name of a trained model whose weights the training starts from; random ones when
            ``None``. AVAE-SS, which post-processes a trained model, needs it.
        beta: weight of the KL (``beta``) or total correlation (``beta_tcvae``) term.
        estimator: minibatch estimator of the total correlation.
        radius: L_inf radius of SE's perturbations.
        gamma: SE's coupling strength.
        rho: AVAE's correlation (Cemgil et al. 2020).
        architecture: fields of :class:`~pyro_vae_defence.models.nvae.NVAEConfig` for an NVAE;
            ``None`` is the paper's convolutional VAE.
        kl_anneal: share of the training in which NVAE's KL weight rises to 1.
        penalty: weight of NVAE's spectral and batch-norm penalties.
        epochs: passes over the training set.
        learning_rate: peak learning rate of the one-cycle schedule.
        schedule: see :class:`pyro_vae_defence.training.FitConfig`.
        batch_size: images per step.
        images_per_epoch: images drawn per epoch; all of them when ``None``.
        half: store the weights in float16, unless that changes the validation -ELBO by more than
            0.01 nats.
        seed: seed of initialisation, order and noise.
    """

    dataset: str
    objective: ObjectiveName = "beta"
    start_from: str | None = None
    beta: Positive = 1.0
    estimator: Literal["mws", "mss", "published"] = "mws"
    radius: AttackRadius = 0.1
    gamma: Positive = 1.0
    rho: Share = 0.975
    architecture: dict[str, Any] | None = None
    kl_anneal: Share = 0.3
    penalty: float = 1e-2
    epochs: Count = 12
    learning_rate: Positive = 2e-3
    schedule: Literal["plateau", "one_cycle", "constant"] = "one_cycle"
    batch_size: Count = 128
    images_per_epoch: Count | None = None
    half: bool = False
    seed: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective == "avae_ss" and self.start_from is None:
            raise ValueError(
                "objective 'avae_ss' trains the encoder of a trained model: set start_from=NAME"
            )


# An epoch of ColorMNIST has every digit in seven colours; a model sees as many images per epoch as
# on MNIST.
_IMAGES = {"mnist": None, "fashion_mnist": None, "color_mnist": 55_000}


# Passes of a plain model, of which the others are variants.
_EPOCHS = 40

# SE searches a neighbour by 20 gradients of the encoder for every image it sees, twelve times the
# cost of a plain step.
_SE_IMAGES = 30_000

# The coupling that left MNIST most similar under attack, of .1, 1, 10 and 50 in trainings of 7,680
# images.
_SE_GAMMA = 10.0


def _models() -> dict[str, TrainConfig]:
    models = {}
    for dataset, images in _IMAGES.items():
        plain = f"{dataset}_vae"
        models[plain] = TrainConfig(dataset, epochs=_EPOCHS, images_per_epoch=images)
        # As many passes again, for the likelihood alone: every other result is of the first forty.
        models[f"{plain}_long"] = TrainConfig(
            dataset,
            start_from=plain,
            epochs=_EPOCHS,
            learning_rate=1e-3,
            images_per_epoch=images,
            half=True,
        )
        variant = TrainConfig(
            dataset,
            start_from=plain,
            epochs=3,
            learning_rate=1e-3,
            images_per_epoch=images,
            half=True,
        )
        for beta in (2.0, 5.0, 10.0):
            models[f"{dataset}_beta_vae_{beta:g}"] = replace(variant, beta=beta)
            models[f"{dataset}_tcvae_{beta:g}"] = replace(
                variant, objective="beta_tcvae", beta=beta
            )
        if dataset == "fashion_mnist":
            continue
        smooth = replace(
            variant, objective="se", gamma=_SE_GAMMA, epochs=1, images_per_epoch=_SE_IMAGES
        )
        for radius in (0.1, 0.2):
            models[f"{dataset}_se_{radius:g}"] = replace(smooth, radius=radius)
        models[f"{dataset}_avae"] = replace(variant, objective="avae")
        models[f"{dataset}_se_avae"] = replace(smooth, objective="se_avae")
        models[f"{dataset}_avae_ss"] = replace(variant, objective="avae_ss")
    # Backgrounds that no clip of dark pixels can restore.
    models["fashion_mnist_inverted_vae"] = TrainConfig("fashion_mnist_inverted")
    models["color_mnist_textured_vae"] = TrainConfig(
        "color_mnist_textured", images_per_epoch=55_000
    )
    return models


# Six latent groups: two of 8x4x4 and four of 8x8x8.
_SMALL_NVAE = {
    "dataset": "mnist",
    "arch_instance": "res_bnswish",
    "num_latent_scales": 2,
    "num_groups_per_scale": 4,
    "ada_groups": True,
    "num_latent_per_group": 8,
    "num_channels_enc": 8,
    "num_channels_dec": 8,
    "num_preprocess_cells": 1,
    "num_postprocess_cells": 1,
    "use_se": True,
    "res_dist": True,
}

MODELS: dict[str, TrainConfig] = {
    **_models(),
    "mnist_nvae": TrainConfig(
        "mnist", "nvae", architecture=_SMALL_NVAE, epochs=12, learning_rate=4e-3
    ),
}
"""Models of the paper's tables: ``<dataset>_vae``, ``<dataset>_beta_vae_<beta>`` and
``<dataset>_tcvae_<beta>`` (Table 7), ``<dataset>_vae_long``, the plain one after a second training
as long as the first, and for MNIST and ColorMNIST ``<dataset>_se_<radius>``,
``<dataset>_avae``, ``<dataset>_se_avae`` and ``<dataset>_avae_ss`` (Table 3); VAEs of two harder
variants, ``fashion_mnist_inverted_vae`` and ``color_mnist_textured_vae``; and ``mnist_nvae``, a
hierarchical VAE small enough to be trained on a processor."""

DATASETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "color_mnist": "ColorMNIST"}
_FAMILIES = {
    "vae": "VAE",
    "vae_long": "VAE, second training",
    "beta_vae": "β-VAE, β = ",
    "tcvae": "β-TCVAE, β = ",
    "se": "SE, radius ",
    "avae": "AVAE",
    "se_avae": "SE-AVAE, radius 0.1",
    "avae_ss": "AVAE-SS",
}
MODEL_ORDER: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *(each for name in TABLE_7 for each in (name, f"{name}_long") if each in MODELS),
            *MODELS,
        ]
    )
)
"""The second training beside the first, then the paper's order, then what its Table 7 does not
have."""


def model_label(name: str) -> str:
    """What a table calls a model, without its dataset."""
    suffix = name.removeprefix(f"{MODELS[name].dataset}_")
    if suffix in _FAMILIES:
        return _FAMILIES[suffix]
    family, _, value = suffix.rpartition("_")
    return f"{_FAMILIES[family]}{value}" if family in _FAMILIES else suffix


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
