"""Frozen configurations of experiments; unknown keys fail, defaults are stated once."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

ObjectiveName = Literal["beta", "beta_tcvae", "se", "avae", "se_avae", "avae_ss"]


@dataclass(frozen=True)
class TrainConfig:
    """How a named model is trained.

    The paper trains for 300 epochs with a plateau rule; the one-cycle schedule reaches a comparable
    likelihood in a tenth of that, which is what these models can afford.

    Args:
        dataset: name for :func:`pyro_vae_defence.data.load`.
        objective: which objective of :mod:`pyro_vae_defence.objectives`.
        beta: weight of the KL (``beta``) or total correlation (``beta_tcvae``) term.
        estimator: minibatch estimator of the total correlation.
        radius: L_inf radius of SE's perturbations.
        gamma: SE's coupling strength.
        rho: AVAE's correlation (Cemgil et al. 2020).
        epochs: passes over the training set.
        learning_rate: peak learning rate of the one-cycle schedule.
        schedule: see :class:`pyro_vae_defence.training.FitConfig`.
        batch_size: images per step.
        images_per_epoch: images drawn per epoch; all of them when ``None``.
        seed: seed of initialisation, order and noise.
    """

    dataset: str
    objective: ObjectiveName = "beta"
    beta: float = 1.0
    estimator: Literal["mws", "mss", "published"] = "mws"
    radius: float = 0.1
    gamma: float = 1.0
    rho: float = 0.975
    epochs: int = 12
    learning_rate: float = 2e-3
    schedule: Literal["plateau", "one_cycle", "constant"] = "one_cycle"
    batch_size: int = 128
    images_per_epoch: int | None = None
    seed: int = 0


DefenceName = Literal["none", "paper", "hmc", "nuts"]


@dataclass(frozen=True)
class DefendConfig:
    """One row block of Table 2: a model, an encoder attack, and defences against it.

    Args:
        model: name of a trained model.
        radius: L_inf radius of the attack, in units of the image range.
        num_references: class-stratified test images.
        num_restarts: attacks per reference; all of them count, not the worst.
        defences: which defences to run: ``none``, ``paper`` (the published setting), and ``hmc`` and ``nuts``, this
            library's kernels in the metric of the training set's mean posterior variance.
        num_samples, warmup_steps, num_steps, step_size: of ``hmc`` and ``nuts``.
        seed: seed of references, attack and defences.
    """

    model: str
    radius: float
    num_references: int = 50
    num_restarts: int = 10
    defences: tuple[DefenceName, ...] = ("none", "hmc", "paper")
    num_samples: int = 20
    warmup_steps: int = 30
    num_steps: int = 4
    step_size: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        known = get_args(DefenceName)
        if isinstance(self.defences, str) or not set(self.defences) <= set(known):
            raise ValueError(
                f"defences must be a tuple of names from {known}, got {self.defences!r}"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """How a trained model is measured (Table 7).

    Args:
        model: name of a trained model.
        num_images: class-stratified test images; the full test set when ``None``.
        num_samples: importance samples per image.
        rows: pairs of image and sample computed at once, which bounds the memory.
        features: trained feature extractor for the Fréchet distance between as many samples of the model as there are
            images, and the images; ``None`` leaves it out.
        ais_images: of so many of the images, the NLL by annealed importance sampling as well.
        ais_steps, ais_chains: temperatures and chains of that.
        seed: seed of the choice of images and of all draws.
    """

    model: str
    num_images: int | None = 1000
    num_samples: int = 1000
    rows: int = 1000
    features: str | None = None
    ais_images: int = 0
    ais_steps: int = 100
    ais_chains: int = 4
    seed: int = 0


@dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained; the defaults are the paper's downstream task, but for the batch size, which it
    does not state.

    Args:
        dataset: name for :func:`pyro_vae_defence.data.load`.
        model: trained model whose guide's means are classified, linearly; ``None`` classifies images by a small
            convolutional network.
        column: which label, where there are several (ColorMNIST: 0 digit, 1 colour).
        optimiser: ``"sgd"`` or ``"adam"``.
        learning_rate: at the start; halved when the validation loss has not fallen for ``patience`` epochs.
        patience: epochs.
        early_stop: stop when the validation loss has not fallen for so many epochs.
        max_epochs: stop in any case.
        batch_size: images per step.
        seed: seed of initialisation and order.
    """

    dataset: str
    model: str | None = None
    column: int = 0
    optimiser: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 1.0
    patience: int = 3
    early_stop: int = 20
    max_epochs: int = 200
    batch_size: int = 128
    seed: int = 0


@dataclass(frozen=True)
class AttackBenchmarkConfig:
    """The benchmark of attacks.

    Args:
        model: name of a trained model.
        dataset: name of its test images.
        num_images: class-stratified references.
        radius: of the L_inf ball, in units of the image range.
        num_gradients: gradients per image and method, >= 3.
        seed: seed of the choice of images and of all attacks.
    """

    model: str = "mnist_vae"
    dataset: str = "mnist_subset"
    num_images: int = 50
    radius: float = 0.1
    num_gradients: int = 50
    seed: int = 0


Config = TypeVar(
    "Config", TrainConfig, DefendConfig, EvaluateConfig, ClassifierConfig, AttackBenchmarkConfig
)


def override(config: Config, changes: dict[str, Any] | None) -> Config:
    """A configuration with some fields changed.

    Raises:
        ValueError: for an unknown field.
    """
    fields = [f.name for f in dataclasses.fields(config)]
    for key in changes or {}:
        if key not in fields:
            raise ValueError(f"unknown setting {key!r}; choose from {', '.join(fields)}")
    return dataclasses.replace(config, **(changes or {}))


def command(name: str, experiment: str, changes: dict[str, Any] | None) -> str:
    """The command line that repeats a run."""
    words = ["python", "-m", "pyro_vae_defence.experiments", name, experiment]
    for key, value in (changes or {}).items():
        words += ["--set", f"{key}={value}"]
    return shlex.join(words)
