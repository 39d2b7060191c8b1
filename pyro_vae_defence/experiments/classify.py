"""Train a named classifier and write its weights and card."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from pyro_vae_defence import data, metrics
from pyro_vae_defence.defence import EncoderDefence, MCMCDefence
from pyro_vae_defence.experiments.configuration import (
    Configuration,
    Count,
    Natural,
    Positive,
    Radius,
    override,
)
from pyro_vae_defence.ops.provenance import provenance
from pyro_vae_defence.experiments.study import as_entry
from pyro_vae_defence.experiments.train import DATASETS, MODELS
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import (
    ConvClassifier,
    LinearClassifier,
    flatten_latents,
)
from pyro_vae_defence.models.pretrained import (
    TrainedVAE,
    WeightCard,
    load_card,
    load_pretrained,
    save_pretrained,
)
from pyro_vae_defence.ops.balls import Linf

LatentInputs = Literal["mean", "guide", "posterior"]


@dataclass(frozen=True)
class ClassifierConfig(Configuration):
    """How a classifier is trained; the defaults are the paper's downstream task, but for the batch
    size, which it does not state.

    Args:
        dataset: name for :func:`pyro_vae_defence.data.load`.
        model: trained model whose latents are classified, linearly; ``None`` classifies images by a
            small convolutional network.
        inputs: which latents: the guide's ``"mean"``, draws from the ``"guide"``, or draws from the
            ``"posterior"`` p(z|x) by HMC.
        num_draws: draws per image, where they are draws.
        num_images: class-stratified training images, and a tenth of that for validation and test;
            all when ``None``.
        radius: L_inf radius of the perturbations that the chains assume; 0 for the paper's
            posterior.
        column: which label, where there are several (ColorMNIST: 0 digit, 1 colour).
        optimiser: ``"sgd"`` or ``"adam"``.
        learning_rate: at the start; halved when the validation loss has not fallen for ``patience``
            epochs.
        patience: epochs.
        early_stop: stop when the validation loss has not fallen for so many epochs.
        max_epochs: stop in any case.
        batch_size: images per step.
        seed: seed of initialisation and order.
    """

    dataset: str
    model: str | None = None
    inputs: LatentInputs = "mean"
    num_draws: Count = 4
    num_images: Count | None = None
    radius: Radius = 0.0
    column: Natural = 0
    optimiser: Literal["sgd", "adam"] = "sgd"
    learning_rate: Positive = 1.0
    patience: Count = 3
    early_stop: Count = 20
    max_epochs: Count = 200
    batch_size: Count = 128
    seed: Natural = 0


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
    for dataset in DATASETS:
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


_ROWS = 1000

# Of the chains whose draws are classified: transitions before the first, and per draw that is kept.
_WARMUP_STEPS = 15
_THINNING = 3


def train_classifier(
    name: str,
    output: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    models: str | os.PathLike[str] | None = None,
    overrides: dict[str, Any] | None = None,
) -> WeightCard:
    """Train the classifier ``name`` of the registry; writes ``NAME.safetensors`` and its card to
    ``output``.

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
        _inputs(data.load(config.dataset, split, root), vae, config)
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
    # Draws of one image are not independent: images are resampled.
    image = torch.arange(len(test)) % test.num_images
    found = metrics.bootstrap_interval(correct, image, generator=torch.Generator().manual_seed(0))
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
            "test_accuracy": {**as_entry(found), "num_images": found.num_groups},
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
    """Inputs in memory and one label each; row ``d * num_images + i`` is draw d of image i."""

    def __init__(self, inputs: Tensor, labels: Tensor, num_images: int) -> None:
        super().__init__(inputs, labels)
        self.labels = labels
        self.num_images = num_images


class _OneLabel:
    """Images on demand with one of their labels."""

    def __init__(self, dataset: data.Images, labels: Tensor) -> None:
        self.dataset = dataset
        self.labels = labels
        self.num_images = len(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.dataset.images(index), self.labels[index]


def _inputs(dataset: data.Images, vae: TrainedVAE | None, config: ClassifierConfig) -> Any:
    """What a classifier reads: latents, computed once, or the images themselves."""
    labels = dataset.labels if dataset.labels.dim() == 1 else dataset.labels[:, config.column]
    if vae is None:
        return _OneLabel(dataset, labels)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.arange(len(dataset))
    if config.num_images is not None:
        # A tenth of it decides when to stop, and what accuracy the card names.
        wanted = config.num_images if dataset.split == "train" else config.num_images // 10
        if wanted < len(dataset):
            chosen = data.stratified(dataset, wanted, generator, config.column)
    draw = _draw(vae, config)
    parts = [draw(dataset.images(some), generator) for some in chosen.split(_ROWS)]
    inputs = torch.cat(parts, 1)
    return _Labelled(inputs.flatten(0, 1), labels[chosen].repeat(len(inputs)), len(chosen))


def _draw(vae: TrainedVAE, config: ClassifierConfig) -> Callable[[Tensor, torch.Generator], Tensor]:
    """From images to ``(num_draws, N, D)`` latents of the kind a configuration names."""

    def mean(x: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad(), program.evaluation_mode(vae):
            return flatten_latents(program.posterior_mean(vae, x))[None]

    if config.inputs == "mean":
        return mean
    defence: Any = EncoderDefence(vae, config.num_draws)
    if config.inputs == "posterior":
        kernel = whitened_hmc(vae, step_size=0.5, num_steps=4)
        defence = MCMCDefence(
            vae,
            kernel,
            num_samples=_THINNING * config.num_draws,
            warmup_steps=_WARMUP_STEPS,
            perturbation=Linf(config.radius) if config.radius > 0 else None,
        )
    thinning = _THINNING if config.inputs == "posterior" else 1

    def draws(x: Tensor, generator: torch.Generator) -> Tensor:
        samples = defence(x, generator).samples
        kept = {name: value[0, thinning - 1 :: thinning] for name, value in samples.items()}
        return torch.cat([value.flatten(2) for value in kept.values()], 2)

    return draws
