"""Names of experiments: which models belong to which table of the paper."""

from __future__ import annotations

from dataclasses import replace

from pyro_vae_defence.experiments.config import (
    AttackConfig,
    BenchmarkConfig,
    ClassifierConfig,
    CompareConfig,
    DefendConfig,
    FiguresConfig,
    HierarchyConfig,
    RobustnessConfig,
    TrainConfig,
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

DEFENCES: dict[str, DefendConfig] = {
    f"{dataset}_radius_{radius:g}": DefendConfig(f"{dataset}_vae", radius)
    for dataset in _IMAGES
    for radius in (0.1, 0.2)
}
"""The encoder attacks of Tables 2 and 3: ``<dataset>_radius_<radius>``."""

HIERARCHIES: dict[str, HierarchyConfig] = {
    **{
        f"mnist_nvae_radius_{radius:g}": HierarchyConfig(
            "mnist_nvae", "mnist", "mnist_nvae", radius, groups=(1, 2, 4, 6)
        )
        for radius in (0.1, 0.2)
    },
    **{
        f"celeba_nvae_radius_{radius:g}": HierarchyConfig(
            "celeba_nvae",
            "celeba64",
            "celeba_nvae",
            radius,
            groups=(1, 5, 10, 20),
            num_references=20,
            column=20,  # "Male"
            defences=("none", "paper", "hmc", "aware"),
            batch_size=20,
            checkpointing=True,
        )
        for radius in (0.05, 0.1)
    },
}
"""The attacks on hierarchical VAEs of Figure 4 and Table 8: ``<model>_radius_<radius>``. The
weights of ``celeba_nvae`` are the official ones and have to be given as a file."""


ROBUSTNESS: dict[str, RobustnessConfig] = {
    name: RobustnessConfig(config.model, config.radius) for name, config in DEFENCES.items()
}
"""The suite of adaptive attacks: ``<dataset>_radius_<radius>``."""

ATTACKS: dict[str, AttackConfig] = {
    name: AttackConfig(name)
    for name, config in MODELS.items()
    if config.dataset in _IMAGES and config.architecture is None
}
"""Tables 2 and 3: every model of their datasets but NVAE, by its name."""

FIGURES: dict[str, FiguresConfig] = {
    dataset: FiguresConfig(f"{dataset}_vae") for dataset in ("mnist", "fashion_mnist")
}
"""Figures 5, 10, 11, 12 and 16, by the name of the dataset."""

COMPARISONS: dict[str, CompareConfig] = {
    **{
        dataset: CompareConfig(f"{dataset}_vae") for dataset in (*_IMAGES, "fashion_mnist_inverted")
    },
    # Attacked encodings start so far up there that a short chain without a burn-in ends on its way.
    "color_mnist_textured": CompareConfig("color_mnist_textured_vae", burn_in=30, step_size=0.2),
}
"""Defences and controls side by side, by the name of the dataset."""

# The part of a classifier's name that says which column of labels it predicts.
_PARTS = {"class": "", "color": "_color"}
_LABELS = dict.fromkeys(("color_mnist", "color_mnist_textured"), tuple(_PARTS.values()))


def _classifiers() -> dict[str, ClassifierConfig]:
    classifiers = {}
    for model, config in MODELS.items():
        for column, label in enumerate(_LABELS.get(config.dataset, ("",))):
            # ColorMNIST has every image in seven colours; to read variants of a model and draws, as
            # many images as MNIST's will do.
            as_mnist = 55_000 if config.dataset in _LABELS else None
            plain = ClassifierConfig(config.dataset, model, column=column)
            if config.start_from is not None:
                plain = replace(plain, num_images=as_mnist)
            guide = replace(plain, inputs="guide", num_images=as_mnist)
            # A tenth of the training images, at some hundred gradients each.
            posterior = replace(plain, inputs="posterior", num_images=5_500)
            classifiers[f"{model}{label}_classifier"] = plain
            classifiers[f"{model}{label}_classifier_guide"] = guide
            classifiers[f"{model}{label}_classifier_posterior"] = posterior
    for dataset in _IMAGES:
        classifiers[f"{dataset}_features"] = ClassifierConfig(
            dataset,
            optimiser="adam",
            learning_rate=1e-3,
            max_epochs=1 if dataset == "color_mnist" else 5,
        )
    return classifiers


CLASSIFIERS: dict[str, ClassifierConfig] = _classifiers()
"""``<model>_classifier``, the paper's linear classifier on the guide's means (on ColorMNIST of the
digit; ``<model>_color_classifier`` of the colour), the same with ``_guide`` or ``_posterior``
appended on draws from the guide or from p(z|x), and ``<dataset>_features``, whose features measure
Fréchet distances."""


def classifiers_of(model: str) -> dict[str, str]:
    """Names of the paper's classifiers of a model, by what they predict: ``class``, and on
    ColorMNIST ``color``."""
    names = {task: f"{model}{part}_classifier" for task, part in _PARTS.items()}
    return {task: name for task, name in names.items() if name in CLASSIFIERS}


BENCHMARKS: dict[str, BenchmarkConfig] = {"samplers": BenchmarkConfig("mnist_vae")}
"""``samplers``, the benchmark of the sampler engine."""
