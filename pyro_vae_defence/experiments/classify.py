"""Train a named classifier and write its weights and card."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from pyro_vae_defence import data, metrics
from pyro_vae_defence.experiments.config import ClassifierConfig, command, override
from pyro_vae_defence.experiments.provenance import provenance
from pyro_vae_defence.experiments.registry import CLASSIFIERS
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import (
    ConvClassifier,
    LinearClassifier,
    flatten_latents,
)
from pyro_vae_defence.models.pretrained import (
    WeightCard,
    load_card,
    load_pretrained,
    save_pretrained,
)
from pyro_vae_defence.types import VAE

_ROWS = 1000


def train_classifier(
    name: str,
    output: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    models: str | os.PathLike[str] | None = None,
    overrides: dict[str, Any] | None = None,
) -> WeightCard:
    """Train the classifier ``name`` of the registry; writes ``NAME.safetensors`` and its card to ``output``.

    Args:
        name: a name of :data:`pyro_vae_defence.experiments.registry.CLASSIFIERS`.
        output: directory for weights and card.
        root: directory of the datasets.
        models: directory of the VAE's weights; the packaged ones when ``None``.
        overrides: fields of the configuration to change; they are recorded in the card.

    Raises:
        ValueError: for an unknown name or override.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"no classifier named {name!r}; choose one of {', '.join(CLASSIFIERS)}")
    config = override(CLASSIFIERS[name], overrides)
    source = provenance()
    started = time.perf_counter()
    vae = None if config.model is None else load_pretrained(config.model, models)
    train, validation, test = (
        _inputs(data.load(config.dataset, split, root), vae, config.column)
        for split in ("train", "validation", "test")
    )
    torch.manual_seed(config.seed)
    num_classes = int(train.labels.max()) + 1
    if vae is None:
        classifier: Any = ConvClassifier(train[0][0].shape[0], num_classes)
    else:
        classifier = LinearClassifier(train[0][0].shape[0], num_classes)
    history = fit_classifier(classifier, train, validation, config)
    correct = torch.cat(
        [metrics.correct(classifier(x).argmax(-1), y) for x, y in data.batches(test, _ROWS)]
    )
    found = metrics.bootstrap_interval(correct, generator=torch.Generator().manual_seed(0))
    training = dataclasses.asdict(config)
    if config.model is not None:
        training["weights"] = load_card(config.model, models).sha256
    return save_pretrained(
        classifier,
        name,
        output,
        training={**training, "epochs": len(history)},
        command=command("train", name, overrides),
        provenance={**source, "seconds": round(time.perf_counter() - started, 1)},
        metrics={
            "validation_cross_entropy": min(history),
            "test_accuracy": {
                "estimate": found.estimate,
                "low": found.low,
                "high": found.high,
                "num_images": found.num_values,
            },
        },
    )


def fit_classifier(
    classifier: nn.Module, train: Any, validation: Any, config: ClassifierConfig
) -> list[float]:
    """Train in place and leave the best epoch's weights.

    Args:
        classifier: inputs to scores ``(N, classes)``.
        train, validation: datasets of inputs and labels that take lists of indices.
        config: see :class:`~pyro_vae_defence.experiments.config.ClassifierConfig`.

    Returns:
        The mean cross-entropy on the validation set after every epoch, in nats.
    """
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[config.optimiser]
    optimiser = make(classifier.parameters(), lr=config.learning_rate)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=0.5, patience=config.patience
    )
    loader = data.batches(train, config.batch_size, shuffle=True)
    history: list[float] = []
    best: dict[str, Tensor] = {}
    while len(history) < config.max_epochs:
        classifier.train()
        for x, labels in loader:
            optimiser.zero_grad()
            F.cross_entropy(classifier(x), labels).backward()
            optimiser.step()
        loss = _cross_entropy(classifier, data.batches(validation, _ROWS))
        if not history or loss < min(history):
            best = copy.deepcopy(classifier.state_dict())
        history.append(loss)
        scheduler.step(loss)
        if len(history) - 1 - history.index(min(history)) >= config.early_stop:
            break
    classifier.load_state_dict(best)
    classifier.eval()
    return history


@torch.no_grad()
def _cross_entropy(classifier: nn.Module, loader: Iterable[Any]) -> float:
    classifier.eval()
    losses = [F.cross_entropy(classifier(x), y, reduction="none") for x, y in loader]
    return float(torch.cat(losses).mean())


class _Labelled(TensorDataset):
    """Inputs in memory and one label each."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        super().__init__(inputs, labels)
        self.labels = labels


class _OneLabel:
    """Images on demand with one of their labels."""

    def __init__(self, dataset: data.Images, labels: Tensor) -> None:
        self.dataset = dataset
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.dataset.images(index), self.labels[index]


def _inputs(dataset: data.Images, vae: VAE | None, column: int) -> Any:
    """What a classifier reads: the guide's means, computed once, or the images themselves."""
    labels = dataset.labels if dataset.labels.dim() == 1 else dataset.labels[:, column]
    if vae is None:
        return _OneLabel(dataset, labels)
    with torch.no_grad(), program.evaluation_mode(vae):
        means = [
            flatten_latents(program.posterior_mean(vae, x)) for x, _ in data.batches(dataset, _ROWS)
        ]
    return _Labelled(torch.cat(means), labels)
