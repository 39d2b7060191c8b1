"""Names of experiments: which models belong to which table of the paper."""

from __future__ import annotations

from pyro_vae_defence.experiments.config import ClassifierConfig, DefendConfig, TrainConfig

# An epoch of ColorMNIST has every digit in seven colours; a model sees as many images per epoch as on MNIST.
_IMAGES = {"mnist": None, "fashion_mnist": None, "color_mnist": 55_000}


def _models() -> dict[str, TrainConfig]:
    models = {}
    for dataset, images in _IMAGES.items():
        models[f"{dataset}_vae"] = TrainConfig(dataset, epochs=40, images_per_epoch=images)
        for beta in (2, 5, 10):
            for objective, label in (("beta", "beta_vae"), ("beta_tcvae", "tcvae")):
                models[f"{dataset}_{label}_{beta}"] = TrainConfig(
                    dataset,
                    objective,  # type: ignore[arg-type]
                    beta=float(beta),
                    images_per_epoch=images,
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
"""Models of the paper's Table 7: ``<dataset>_vae``, ``<dataset>_beta_vae_<beta>``, ``<dataset>_tcvae_<beta>``; and
``mnist_nvae``, a hierarchical VAE small enough for a processor."""

DEFENCES: dict[str, DefendConfig] = {
    f"{dataset}_radius_{radius:g}": DefendConfig(f"{dataset}_vae", radius)
    for dataset in _IMAGES
    for radius in (0.1, 0.2)
}
"""The encoder attacks of Tables 2 and 3: ``<dataset>_radius_<radius>``."""


def _classifiers() -> dict[str, ClassifierConfig]:
    classifiers = {}
    for model, config in MODELS.items():
        classifiers[f"{model}_classifier"] = ClassifierConfig(config.dataset, model)
        if config.dataset == "color_mnist":
            classifiers[f"{model}_color_classifier"] = ClassifierConfig("color_mnist", model, 1)
    for dataset in _IMAGES:
        classifiers[f"{dataset}_features"] = ClassifierConfig(
            dataset,
            optimiser="adam",
            learning_rate=1e-3,
            max_epochs=1 if dataset == "color_mnist" else 5,
        )
    return classifiers


CLASSIFIERS: dict[str, ClassifierConfig] = _classifiers()
"""``<model>_classifier``, the paper's linear classifier on latents (on ColorMNIST of the digit;
``<model>_color_classifier`` of the colour), and ``<dataset>_features``, whose features measure Fréchet distances."""
