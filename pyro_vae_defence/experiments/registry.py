"""Names of experiments: which models belong to which table of the paper."""

from __future__ import annotations

import dataclasses

from pyro_vae_defence.experiments.config import (
    ClassifierConfig,
    CompareConfig,
    DefendConfig,
    TrainConfig,
)

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
    # Backgrounds that no clip of dark pixels can restore.
    models["fashion_mnist_inverted_vae"] = TrainConfig("fashion_mnist_inverted")
    models["color_mnist_textured_vae"] = TrainConfig(
        "color_mnist_textured", images_per_epoch=55_000
    )
    return models


MODELS: dict[str, TrainConfig] = _models()
"""Models of the paper's Table 7: ``<dataset>_vae``, ``<dataset>_beta_vae_<beta>``, ``<dataset>_tcvae_<beta>``; and VAEs
of two harder variants, ``fashion_mnist_inverted_vae`` and ``color_mnist_textured_vae``."""

DEFENCES: dict[str, DefendConfig] = {
    f"{dataset}_radius_{radius:g}": DefendConfig(f"{dataset}_vae", radius)
    for dataset in _IMAGES
    for radius in (0.1, 0.2)
}
"""The encoder attacks of Tables 2 and 3: ``<dataset>_radius_<radius>``."""


COMPARISONS: dict[str, CompareConfig] = {
    dataset: CompareConfig(f"{dataset}_vae")
    for dataset in (*_IMAGES, "fashion_mnist_inverted", "color_mnist_textured")
}
"""Defences and controls side by side, by the name of the dataset."""

# The part of a classifier's name that says which column of labels it predicts.
_LABELS = {"color_mnist": ("", "_color"), "color_mnist_textured": ("", "_color")}


def _classifiers() -> dict[str, ClassifierConfig]:
    classifiers = {}
    for model, config in MODELS.items():
        for column, label in enumerate(_LABELS.get(config.dataset, ("",))):
            plain = ClassifierConfig(config.dataset, model, column=column)
            # ColorMNIST has every image in seven colours; draws of as many images as MNIST's will do.
            guide = dataclasses.replace(
                plain, inputs="guide", num_images=55_000 if config.dataset in _LABELS else None
            )
            # A tenth of the training images, at some hundred gradients each.
            posterior = dataclasses.replace(plain, inputs="posterior", num_images=5_500)
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
"""``<model>_classifier``, the paper's linear classifier on the guide's means (on ColorMNIST of the digit;
``<model>_color_classifier`` of the colour), the same with ``_guide`` or ``_posterior`` appended on draws from the
guide or from p(z|x), and ``<dataset>_features``, whose features measure Fréchet distances."""
