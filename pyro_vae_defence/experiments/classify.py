"""Train a named classifier: its weights, and the card that says how they came about.

The paper's downstream task is a linear classifier on the guide's means; here also one with hidden
layers, and on draws, of the guide or of p(z|x). A small convolutional one of images is the feature
extractor of the Fréchet distances.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_vae_defence import data, metrics
from pyro_vae_defence.data.loading import Split
from pyro_vae_defence.defence import EncoderDefence
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments.defences import Setting, make_defence
from pyro_vae_defence.experiments.study import Study, check_column, share
from pyro_vae_defence.experiments.train import DATASETS, MODELS, check_card
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import (
    ConvClassifier,
    LinearClassifier,
    MLPClassifier,
    flatten_latents,
)
from pyro_vae_defence.models.pretrained import TrainedVAE, WeightCard, save_pretrained
from pyro_vae_defence.ops.provenance import provenance
from pyro_vae_defence.training import NonFiniteLossError

LatentInputs = Literal["mean", "guide", "posterior"]


@dataclass(frozen=True)
class ClassifierConfig(conf.Configuration):
    """How a classifier is trained; the defaults are the paper's downstream task, but for the batch
    size, which it does not state.

    Args:
        dataset: name for :func:`pyro_vae_defence.data.load`.
        model: trained model whose latents are classified. Without one, a small convolutional
            network classifies images.
        hidden_dim: width of two hidden layers between latents and classes; 0 for none, a linear
            classifier.
        inputs: which latents, the guide's ``"mean"``, draws from the ``"guide"``, or draws from the
            ``"posterior"`` p(z|x) by HMC.
        num_draws: draws per image, where they are draws.
        num_images: class-stratified training images, and a tenth of that for validation and test,
            so at least 20; all if ``None``.
        radius: L_inf radius of the perturbations that chains assume, 0 for the paper's posterior.
        column: which label, where there are several (ColorMNIST: 0 digit, 1 colour).
        optimiser: ``"sgd"`` or ``"adam"``.
        learning_rate: at the start.
        patience: epochs without a lower validation loss after which the learning rate is halved.
        early_stop: epochs without a lower validation loss after which the training stops.
        max_epochs: after these it stops in any case.
        batch_size: images per step.
        seed: seed of initialisation and order.
    """

    dataset: conf.Dataset
    model: str | None = None
    hidden_dim: conf.Natural = 0
    inputs: LatentInputs = "mean"
    num_draws: conf.Count = 4
    num_images: Annotated[int, conf.at_least(20)] | None = None
    radius: conf.Radius = 0.0
    column: conf.Natural = 0
    optimiser: Literal["sgd", "adam"] = "sgd"
    learning_rate: conf.Positive = 1.0
    patience: conf.Count = 3
    early_stop: conf.Count = 20
    max_epochs: conf.Count = 200
    batch_size: conf.Count = 128
    seed: conf.Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            idle = ("hidden_dim", "inputs", "num_draws", "num_images", "radius")
            self.refuse_idle("on a classifier of images, without a model", *idle)
        if self.inputs == "mean":
            self.refuse_idle("on inputs='mean'", "num_draws", "radius")
        if self.inputs == "guide":
            self.refuse_idle("on inputs='guide'", "radius")


# --- Classifiers by name --------------------------------------------------------------------------

# The part of a classifier's name that says which column of labels it predicts.
_PARTS = {"class": "", "color": "_color"}
_COLOURED = ("color_mnist", "color_mnist_textured")


_OF_LAYERS = ClassifierConfig(
    "mnist", "mnist_vae", 256, optimiser="adam", learning_rate=1e-3, max_epochs=40
)


def _as_mnist(dataset: str) -> int | None:
    """ColorMNIST has every image in seven colours; as many as MNIST's will do for variants, draws
    and hidden layers."""
    return 55_000 if dataset in _COLOURED else None


def _classifiers() -> dict[str, ClassifierConfig]:
    classifiers = {}
    for model, config in MODELS.items():
        coloured, as_mnist = config.dataset in _COLOURED, _as_mnist(config.dataset)
        for column, part in enumerate(_PARTS.values() if coloured else ("",)):
            plain = ClassifierConfig(config.dataset, model, column=column)
            if config.start_from is not None:
                plain = replace(plain, num_images=as_mnist)
            name = f"{model}{part}_classifier"
            classifiers[name] = plain
            classifiers[f"{name}_guide"] = replace(plain, inputs="guide", num_images=as_mnist)
            # A tenth of the training images, at some hundred gradients each.
            classifiers[f"{name}_posterior"] = replace(plain, inputs="posterior", num_images=5_500)
    for dataset in ("mnist", "fashion_mnist", "color_mnist_textured"):
        layers = replace(_OF_LAYERS, dataset=dataset, num_images=_as_mnist(dataset))
        classifiers[f"{dataset}_vae_mlp_classifier"] = replace(layers, model=f"{dataset}_vae")
    for dataset in DATASETS:
        features = ClassifierConfig(dataset, optimiser="adam", learning_rate=1e-3, max_epochs=5)
        if dataset == "color_mnist":
            features = replace(features, max_epochs=1)
        classifiers[f"{dataset}_features"] = features
    return classifiers


CLASSIFIERS: dict[str, ClassifierConfig] = _classifiers()
"""``<model>_classifier``, the paper's linear classifier on the guide's means (on ColorMNIST of the
digit; ``<model>_color_classifier`` of the colour), the same with ``_guide`` or ``_posterior``
appended on draws from the guide or from p(z|x); ``<dataset>_vae_mlp_classifier``, with two hidden
layers; and ``<dataset>_features``, whose features measure Fréchet distances."""


def classifiers_of(model: str) -> dict[str, str]:
    """Names of a model's classifiers by what they predict: ``class``, on ColorMNIST ``color``."""
    names = {task: f"{model}{part}_classifier" for task, part in _PARTS.items()}
    return {task: name for task, name in names.items() if name in CLASSIFIERS}


# --- Training one ---------------------------------------------------------------------------------

_ROWS = 1000
"""Inputs that are computed or classified at once."""

# Of the chains whose draws are classified: transitions before the first, and per draw that is kept.
_WARMUP_STEPS = 15
_THINNING = 3


class TrainClassifier(Study[ClassifierConfig]):
    """Weights ``NAME.safetensors`` and their card ``NAME.json`` in ``output``."""

    command = "train"
    noun = "classifier"
    names = CLASSIFIERS
    output = "runs/models"

    def run(self) -> WeightCard:
        """Train the classifier; its card.

        Raises:
            ValueError: for missing data or weights, or another card in the way.
            NonFiniteLossError: if the loss is no number.
        """
        check_card(self.path, self.config)
        with self.writing():
            return self._trained()

    def _trained(self) -> WeightCard:
        config = self.config
        source = provenance()
        started = time.perf_counter()
        training = dataclasses.asdict(config)
        vae = None
        if config.model is not None:
            vae, card = self.load_vae(config.model)
            training["weights"] = card.sha256
        splits: tuple[Split, ...] = ("train", "validation", "test")
        sets = [self.images(config.dataset, split) for split in splits]
        check_column(sets[0], config.column)
        train, validation, test = (_inputs(each, vae, config, self.device) for each in sets)
        torch.manual_seed(config.seed)
        make: Any = ConvClassifier if vae is None else LinearClassifier
        if config.hidden_dim:
            make = partial(MLPClassifier, hidden_dim=config.hidden_dim)
        classifier = make(train[0][0].shape[0], int(train.labels.max()) + 1).to(self.device)
        history = fit_classifier(classifier, train, validation, config)
        correct = torch.cat(
            [metrics.correct(classifier(x).argmax(-1), y) for x, y in data.batches(test, _ROWS)]
        )
        # Draws of one image are not independent, nor colours of one: images are resampled.
        accuracy = share(correct, test.origins)
        accuracy["num_images"] = test.num_images
        return save_pretrained(
            classifier,
            self.name,
            self.directory,
            training={**training, "epochs": len(history)},
            command=self.command_line(),
            provenance={**source, "seconds": round(time.perf_counter() - started, 1)},
            metrics={"validation_cross_entropy": min(history), "test_accuracy": accuracy},
        )

    @classmethod
    def summary(cls, found: WeightCard) -> str:
        """The accuracy it has reached."""
        return f"{found.name}: test accuracy {found.metrics['test_accuracy']['estimate']:.4f}"


def fit_classifier(
    classifier: nn.Module, train: Any, validation: Any, config: ClassifierConfig
) -> list[float]:
    """Train in place and leave the best epoch's weights.

    Args:
        classifier: inputs to scores ``(N, classes)``.
        train, validation: datasets of inputs and labels that take lists of indices.
        config: how.

    Returns:
        The mean cross-entropy on the validation set after every epoch, in nats.

    Raises:
        NonFiniteLossError: if that is no number.
    """
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[config.optimiser]
    optimiser = make(classifier.parameters(), lr=config.learning_rate)
    scheduler = ReduceLROnPlateau(optimiser, factor=0.5, patience=config.patience)
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
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the validation loss is {loss} after epoch {len(history) + 1}; choose a smaller "
                f"learning_rate than {config.learning_rate:g}"
            )
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


@dataclass
class _Labelled:
    """Inputs, read when asked for, and labels; row ``d * num_images + i`` is draw d of image i,
    and ``origins`` what each is made of."""

    read: Callable[[Any], Tensor]
    labels: Tensor
    num_images: int
    origins: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.read(index), self.labels[index]


def _inputs(
    dataset: data.Images, vae: TrainedVAE | None, config: ClassifierConfig, device: torch.device
) -> _Labelled:
    """What a classifier reads: latents, computed once, or the images themselves."""
    labels = dataset.labels if dataset.labels.dim() == 1 else dataset.labels[:, config.column]
    labels = labels.to(device)

    def images(index: Any) -> Tensor:
        return dataset.images(index).to(device)

    if vae is None:
        return _Labelled(images, labels, len(labels), dataset.origins())
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.arange(len(dataset))
    if config.num_images is not None:
        # A tenth of it decides when to stop, and what accuracy the card names.
        wanted = config.num_images if dataset.split == "train" else config.num_images // 10
        if wanted < len(dataset):
            chosen = data.stratified(dataset, wanted, generator, config.column)
    draw = _draw(vae, config)
    parts = [draw(images(some), generator) for some in chosen.split(_ROWS)]
    inputs = torch.cat(parts, 1)
    read = inputs.flatten(0, 1).__getitem__
    rows = chosen.repeat(len(inputs))
    return _Labelled(read, labels[rows], len(chosen), dataset.origins(rows))


def _draw(vae: TrainedVAE, config: ClassifierConfig) -> Callable[[Tensor, torch.Generator], Tensor]:
    """From images to ``(num_draws, N, D)`` latents of the kind a configuration names."""

    def mean(x: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad(), program.evaluation_mode(vae):
            return flatten_latents(program.posterior_mean(vae, x))[None]

    if config.inputs == "mean":
        return mean
    thinning, defence = 1, EncoderDefence(vae, config.num_draws)
    if config.inputs == "posterior":
        thinning = _THINNING
        chain = conf.ChainConfig(thinning * config.num_draws, _WARMUP_STEPS)
        defence = make_defence("aware", Setting(vae, chain, radius=config.radius))

    def draws(x: Tensor, generator: torch.Generator) -> Tensor:
        samples = defence(x, generator).samples
        kept = [value[0, thinning - 1 :: thinning] for value in samples.values()]
        return torch.cat([value.flatten(2) for value in kept], 2)

    return draws
