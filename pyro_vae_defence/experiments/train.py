"""Train a named model: its weights, and the card that says how they came about.

Resumes when interrupted. The paper trains every model for 300 epochs with a plateau rule; a
one-cycle schedule reaches a comparable likelihood in a tenth of that, which is what these models
can afford. For the same reason the variants of a model start from the trained plain one and are
trained until they have adapted.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from pyro_vae_defence import objectives
from pyro_vae_defence.attacks import PGD
from pyro_vae_defence.attacks.objectives import squared_wasserstein
from pyro_vae_defence.data import Images
from pyro_vae_defence.data.loading import images_alone
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments.study import Study, load
from pyro_vae_defence.models import ConditionalVAE, ConvVAE, program
from pyro_vae_defence.models.nvae import NVAE, NVAEConfig
from pyro_vae_defence.models.pretrained import TrainedVAE, WeightCard, save_pretrained
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.files import write_atomically
from pyro_vae_defence.ops.provenance import provenance
from pyro_vae_defence.training import FitConfig, checkpoints, evaluate, fit

SE_STEPS = 20
"""Gradient steps of SE's inner maximisation (Cemgil et al. 2020)."""

HALF_TOLERANCE = 0.01
"""Largest change of the validation -ELBO, in nats, for which weights are stored in float16."""


# Fields of TrainConfig that some objectives alone read.
_READ_BY = {
    "beta": ("beta", "beta_tcvae"),
    "estimator": ("beta_tcvae",),
    "radius": ("se", "se_avae", "margin"),
    "weight": ("margin",),
    "gamma": ("se", "se_avae"),
    "rho": ("avae", "se_avae", "avae_ss"),
    "kl_anneal": ("nvae",),
    "penalty": ("nvae",),
}


@dataclass(frozen=True)
class TrainConfig(conf.Configuration):
    """How a named model is trained.

    Args:
        dataset: name for :func:`pyro_vae_defence.data.load`.
        objective: which objective of :mod:`pyro_vae_defence.objectives`.
        start_from: trained model whose weights the training starts from, random ones if ``None``.
            AVAE-SS, which post-processes a trained model, needs it.
        beta: weight of the KL (``beta``) or total correlation (``beta_tcvae``) term.
        estimator: minibatch estimator of the total correlation.
        radius: L_inf radius of SE's perturbations, and of the mass margin's attacker.
        weight: of the mass margin beside the ELBO (``margin``).
        gamma: SE's coupling strength.
        rho: AVAE's correlation (Cemgil et al. 2020).
        architecture: fields of :class:`~pyro_vae_defence.models.nvae.NVAEConfig` for an NVAE;
            ``None`` is the paper's convolutional VAE.
        latent_dim: latent dimensions of that one.
        conditional: whether the class is a condition of both programs, in a
            :class:`~pyro_vae_defence.models.ConditionalVAE` in place of the convolutional one.
        per_class: whether that is one VAE for each class, without a parameter in common.
        kl_anneal: share of the training in which NVAE's KL weight rises to 1.
        penalty: weight of NVAE's spectral and batch-norm penalties.
        epochs: passes over the training set.
        learning_rate: peak learning rate of the one-cycle schedule.
        schedule, clip_norm: see :class:`pyro_vae_defence.training.FitConfig`.
        batch_size: images per step.
        images_per_epoch: images drawn per epoch, all of them if ``None``.
        half: store the weights in float16, unless that changes the validation -ELBO by more than
            0.01 nats.
        seed: seed of initialisation, order and noise.
    """

    dataset: conf.Dataset
    objective: Literal[
        "beta", "beta_tcvae", "se", "avae", "se_avae", "avae_ss", "nvae", "margin"
    ] = "beta"
    start_from: str | None = None
    beta: conf.Positive = 1.0
    estimator: Literal["mws", "mss", "published"] = "mws"
    radius: conf.AttackRadius = 0.1
    weight: conf.Positive = 1.0
    gamma: conf.Positive = 1.0
    rho: conf.Share = 0.975
    architecture: dict[str, Any] | None = None
    latent_dim: conf.Count = 64
    conditional: bool = False
    per_class: bool = False
    kl_anneal: conf.Share = 0.3
    penalty: conf.NotNegative = 1e-2
    epochs: conf.Count = 12
    learning_rate: conf.Positive = 2e-3
    schedule: Literal["plateau", "one_cycle", "constant"] = "one_cycle"
    clip_norm: conf.Positive | None = None
    batch_size: conf.Count = 128
    images_per_epoch: conf.Count | None = None
    half: bool = False
    seed: conf.Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective == "avae_ss" and self.start_from is None:
            what = "trains the encoder of a trained model: set start_from=NAME"
            raise ValueError(f"objective 'avae_ss' {what}")
        if self.rho == 1:
            raise ValueError("rho=1 leaves no noise; it must be below 1")
        if self.kl_anneal == 0:
            raise ValueError("kl_anneal must lie in (0, 1], got 0; a small share is next to none")
        for name, readers in _READ_BY.items():
            if self.objective not in readers:
                self.refuse_idle(f"on the objective {self.objective!r}", name)
        if self.start_from is not None:
            self.refuse_idle("with start_from, whose architecture it is", "latent_dim", "per_class")
        if self.architecture is not None:
            self.refuse_idle("on an NVAE", "latent_dim")
            try:
                NVAEConfig.from_dict(self.architecture)
            except (TypeError, ValueError) as error:
                raise ValueError(f"architecture: {error}") from error
            if self.start_from is not None:
                self.refuse_idle("with start_from, whose architecture it is", "architecture")
        elif self.objective == "nvae" and self.start_from is None:
            raise ValueError(
                "objective 'nvae' needs an architecture; set its fields, see NVAEConfig"
            )
        if self.conditional and (self.objective not in ("beta", "margin") or self.architecture):
            raise ValueError(
                "conditional=True is a dense VAE, trained by the objective 'beta' or 'margin'; "
                f"leave architecture out, got objective {self.objective!r}"
            )
        if self.conditional:
            self.refuse_idle("with conditional=True, whose model has ten", "latent_dim")
        else:
            self.refuse_idle("without conditional=True", "per_class")
        if self.objective == "margin" and not self.conditional:
            raise ValueError("objective 'margin' is of classes: set conditional=True")
        self.refuse_above(batch_size="images_per_epoch")


# --- Models by name -------------------------------------------------------------------------------

DATASETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "color_mnist": "ColorMNIST"}
"""Datasets of the paper's tables, and what these call them."""

# SE searches a neighbour by 20 gradients of the encoder for every image it sees, twelve times the
# cost of a plain step.
_SE_IMAGES = 30_000

# The coupling that left MNIST most similar under attack, of .1, 1, 10 and 50 in trainings of 7,680
# images.
_SE_GAMMA = 10.0

# Six latent groups: two of 8x4x4 and four of 8x8x8.
_SMALL_NVAE = {
    "dataset": "mnist", "arch_instance": "res_bnswish", "num_latent_scales": 2,
    "num_groups_per_scale": 4, "ada_groups": True, "num_latent_per_group": 8,
    "num_channels_enc": 8, "num_channels_dec": 8, "num_preprocess_cells": 1,
    "num_postprocess_cells": 1, "use_se": True, "res_dist": True,
}  # fmt: skip


def _models() -> dict[str, TrainConfig]:
    models: dict[str, TrainConfig] = {}
    for dataset in DATASETS:
        # An epoch of ColorMNIST has every digit in seven colours; a model sees as many images per
        # epoch as on MNIST.
        images = 55_000 if dataset == "color_mnist" else None
        name = f"{dataset}_vae"
        plain = TrainConfig(dataset, epochs=40, images_per_epoch=images)
        # As many passes again, for the likelihood alone: every other result is of the first forty.
        again = replace(plain, start_from=name, learning_rate=1e-3, half=True)
        # The paper's 300 passes in all, for a GPU, which batches of this size keep busy.
        rest = replace(again, epochs=260, batch_size=512)
        variant = replace(again, epochs=3)
        models |= {name: plain, f"{name}_long": again, f"{name}_longer": rest}
        families = {"beta_vae": variant, "tcvae": replace(variant, objective="beta_tcvae")}
        for family, config in families.items():
            for beta in (2.0, 5.0, 10.0):
                models[f"{dataset}_{family}_{beta:g}"] = replace(config, beta=beta)
    for dataset in ("mnist", "color_mnist"):
        variant = replace(models[f"{dataset}_vae_long"], epochs=3)
        few = replace(variant, epochs=1, images_per_epoch=_SE_IMAGES)
        smooth = replace(few, objective="se", gamma=_SE_GAMMA)
        for radius in (0.1, 0.2):
            models[f"{dataset}_se_{radius:g}"] = replace(smooth, radius=radius)
        models[f"{dataset}_avae"] = replace(variant, objective="avae")
        models[f"{dataset}_se_avae"] = replace(smooth, objective="se_avae")
        models[f"{dataset}_avae_ss"] = replace(variant, objective="avae_ss")
    # Whose posteriors can be computed on a grid.
    models["mnist_vae_2d"] = TrainConfig("mnist", latent_dim=2, epochs=10, half=True)
    # Backgrounds that no clip of dark pixels can restore.
    for dataset, images in (("fashion_mnist_inverted", None), ("color_mnist_textured", 55_000)):
        models[f"{dataset}_vae"] = TrainConfig(dataset, images_per_epoch=images)
    small = TrainConfig("mnist", "nvae", architecture=_SMALL_NVAE, learning_rate=4e-3)
    return {**models, "mnist_nvae": small}


MODELS: dict[str, TrainConfig] = _models()
"""Models in the order of tables: ``<dataset>_vae``, ``<dataset>_vae_long``, the plain one after a
second training as long as the first, ``<dataset>_vae_longer``, the plain one after 260 further
epochs, ``<dataset>_beta_vae_<beta>`` and ``<dataset>_tcvae_<beta>`` (Table 7); for MNIST and
ColorMNIST ``<dataset>_se_<radius>``, ``<dataset>_avae``, ``<dataset>_se_avae`` and
``<dataset>_avae_ss`` (Table 3); ``mnist_vae_2d``, with two latent dimensions (Figure 1); VAEs of
two harder variants, ``fashion_mnist_inverted_vae`` and ``color_mnist_textured_vae``; and
``mnist_nvae``, a hierarchical VAE small enough to be trained on a processor."""


def _conditional_models() -> dict[str, TrainConfig]:
    models = {}
    for dataset, epochs in (("mnist", 40), ("fashion_mnist", 12)):
        name = f"{dataset}_conditional"
        plain = TrainConfig(dataset, conditional=True, epochs=epochs, half=True)
        # Ten classes are explained at each step.
        few = replace(plain, start_from=name, epochs=4, images_per_epoch=10_000, learning_rate=1e-3)
        models[name] = plain
        models[f"{name}_margin"] = replace(few, objective="margin", radius=0.1, weight=3.0)
    # Without a limit, far from the others an image of Fashion-MNIST gets a variance of e^77, whose
    # gradient no step survives. Those of other batches have norms of some 3,000.
    for dataset, clip_norm in (("mnist", None), ("fashion_mnist", 1e4)):
        plain = models[f"{dataset}_conditional"]
        # Each of the ten sees a tenth of the images.
        many = replace(plain, per_class=True, epochs=40, clip_norm=clip_norm)
        models[f"{dataset}_per_class"] = many
    return models


CONDITIONAL_MODELS = _conditional_models()
"""VAEs given the class, for analysis by synthesis, which stand in no table of the others:
``<dataset>_conditional``, and ``<dataset>_conditional_margin``, which goes on from there with the
margin of masses at radius 0.1; and ``<dataset>_per_class``, one small VAE for each class."""

# Of each class's VAE: ten have about as many parameters as the one that all classes share.
_PER_CLASS_WIDTH = 64

_FAMILIES = {
    "vae": "VAE",
    "vae_long": "VAE, second training",
    "vae_longer": "VAE, 300 epochs in all",
    "vae_2d": "VAE, two latent dimensions",
    "beta_vae": "β-VAE, β = ",
    "tcvae": "β-TCVAE, β = ",
    "se": "SE, radius ",
    "avae": "AVAE",
    "se_avae": "SE-AVAE, radius 0.1",
    "avae_ss": "AVAE-SS",
}


def model_label(name: str) -> str:
    """What a table calls a model, without its dataset."""
    suffix = name.removeprefix(f"{MODELS[name].dataset}_")
    if suffix in _FAMILIES:
        return _FAMILIES[suffix]
    family, _, value = suffix.rpartition("_")
    return f"{_FAMILIES[family]}{value}" if family in _FAMILIES else suffix


# --- Training one ---------------------------------------------------------------------------------


class Train(Study[TrainConfig]):
    """Weights ``NAME.safetensors`` and card ``NAME.json``; checkpoint and history in ``NAME/``."""

    command = "train"
    noun = "model"
    names = MODELS | CONDITIONAL_MODELS
    output = "runs/models"

    def run(self) -> WeightCard:
        """Train the model, or go on where an interrupted training stopped; its card.

        Raises:
            ValueError: for missing data or weights to start from, or a checkpoint or card of
                another run.
            NonFiniteLossError: if the loss is no number.
        """
        check_card(self.path, self.config)
        with self.writing():
            return self._trained()

    def _trained(self) -> WeightCard:
        config = self.config
        folder = self.directory / self.name
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint, history = folder / "checkpoint.pt", folder / "history.jsonl"
        # What stands in the checkpoint but not in the file, if the process was killed in between,
        # gets there with the next epoch.
        entries = checkpoints.read(checkpoint)["history"] if checkpoint.exists() else []
        train_set = self.images(config.dataset, "train")
        count = config.images_per_epoch or len(train_set)
        sampler = BatchSampler(RandomSampler(train_set, num_samples=count), config.batch_size, True)
        collate = (
            functools.partial(_with_classes, train_set) if config.conditional else images_alone
        )
        loader: DataLoader[Any] = DataLoader(
            train_set, sampler=sampler, batch_size=None, collate_fn=collate
        )
        validation = self._validation()

        torch.manual_seed(config.seed)
        pyro.clear_param_store()
        training = dataclasses.asdict(config)
        of = f"{self.name}: {config}"
        if config.start_from is None:
            vae = make_vae(config, train_set)
        else:
            vae, start = self.load_vae(config.start_from)
            if config.conditional != isinstance(vae, ConditionalVAE):
                raise ValueError(
                    f"start_from={config.start_from!r} is a {type(vae).__name__}, which "
                    f"conditional={config.conditional} does not fit"
                )
            vae.train()
            training["start_from_sha256"] = start.sha256
            of += f", from {start.sha256}"
        vae = vae.to(self.device)
        result = fit(
            vae,
            make_objective(config, vae, len(train_set), config.epochs * len(loader)),
            loader,
            FitConfig(
                epochs=config.epochs,
                learning_rate=config.learning_rate,
                schedule=config.schedule,
                clip_norm=config.clip_norm,
                checkpoint_every=200,
                progress=self.progress,
                name=of,
            ),
            validation=validation,
            checkpoint=checkpoint,
            on_epoch=lambda entry: _append(history, entries, entry),
        )
        _write_lines(history, result.history)
        measured = {"validation_nelbo": result.history[-1]["validation_nelbo"]}
        dtype = torch.float32
        if config.half:
            before, after = (_nelbo(each, validation) for each in (vae, _rounded(vae)))
            measured["validation_nelbo_change[float16]"] = after - before
            if abs(after - before) <= HALF_TOLERANCE:
                dtype = torch.float16
        noise_variance = None
        if isinstance(vae, NVAE):
            noise_variance = program.mean_posterior_variance(
                vae.noncentred(), (x.to(self.device) for x in loader)
            )
        seconds = sum(entry["seconds"] for entry in result.history)
        return save_pretrained(
            vae,
            self.name,
            self.directory,
            training=training,
            command=self.command_line(),
            provenance={**provenance(self.device), "seconds": round(seconds, 1)},
            metrics=measured,
            mean_posterior_variance=result.mean_posterior_variance,
            mean_noise_variance=noise_variance,
            dtype=dtype,
        )

    @classmethod
    def summary(cls, found: WeightCard) -> str:
        """The likelihood it has reached."""
        return f"{found.name}: validation -ELBO {found.metrics['validation_nelbo']:.2f} nats"

    def _validation(self) -> list[Any]:
        """About 5,000 images; a stride of 6 visits all seven colours of ColorMNIST."""
        images = self.images(self.config.dataset, "validation")
        chosen = torch.arange(0, len(images), 6 if len(images) > 5000 else 1)
        if self.config.conditional:
            return [_with_classes(images, images[some]) for some in chosen.split(500)]
        return [images.images(some) for some in chosen.split(500)]


def _with_classes(images: Images, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A batch with its classes as one-hot vectors."""
    x, labels = batch
    return x, torch.nn.functional.one_hot(labels, len(images.class_names)).to(x.dtype)


def make_vae(config: TrainConfig, images: Images) -> TrainedVAE:
    """The untrained model a configuration names, for images of a dataset."""
    image_shape = images.image_shape
    if config.conditional:
        classes = len(images.class_names)
        if config.per_class:
            return ConditionalVAE(image_shape, classes, hidden_dim=_PER_CLASS_WIDTH, per_class=True)
        return ConditionalVAE(image_shape, classes)
    if config.architecture is None:
        return ConvVAE(image_shape[0], config.latent_dim, image_size=image_shape[-1])
    return NVAE(NVAEConfig.from_dict(config.architecture))


def make_objective(config: TrainConfig, vae: TrainedVAE, data_size: int, num_steps: int) -> Any:
    """The Pyro ELBO a configuration names, for ``num_steps`` optimisation steps in all.

    Raises:
        ValueError: for NVAE's objective of another model.
    """

    def perturb(x: Tensor) -> Tensor:
        attack = PGD(squared_wasserstein(vae), Linf(config.radius), num_steps=SE_STEPS)
        return attack(x).best()

    def nvae() -> Any:
        if not isinstance(vae, NVAE):
            raise ValueError(
                "objective 'nvae' needs an architecture; set its fields, see NVAEConfig"
            )
        kl_anneal, penalty = config.kl_anneal, config.penalty
        return objectives.NVAEObjective(vae, num_steps, kl_anneal=kl_anneal, penalty=penalty)

    beta, estimator = config.beta, config.estimator
    makers = {
        "beta": lambda: objectives.BetaELBO(beta),
        "beta_tcvae": lambda: objectives.BetaTCVAE(beta, data_size, estimator=estimator),
        "se": lambda: objectives.SE(perturb, config.gamma),
        "avae": lambda: objectives.AVAE(config.rho),
        "se_avae": lambda: objectives.SEAVAE(perturb, config.gamma, config.rho),
        "avae_ss": lambda: objectives.AVAESS(config.rho),
        "nvae": nvae,
        "margin": lambda: objectives.MassMargin(Linf(config.radius), config.weight),
    }
    return makers[config.objective]()


def _rounded(vae: TrainedVAE) -> TrainedVAE:
    """A copy whose weights went through float16."""
    rounded = copy.deepcopy(vae)
    rounded.load_state_dict({key: value.half() for key, value in vae.state_dict().items()})
    return rounded


def _nelbo(vae: TrainedVAE, validation: list[Any]) -> float:
    """Validation -ELBO with the same draws whichever model it is of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return evaluate(vae, objectives.BetaELBO(1.0), validation)


def check_card(path: Path, config: Any) -> None:
    """Raise a ``ValueError`` if there is something else than the card of such a training."""
    if not path.exists():
        return
    before = load(path, "train").get("training")
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    if not isinstance(before, dict):
        raise ValueError(f"{path} is no card of weights; choose another output directory")
    # Cards of before there was a choice do not name it.
    before = {field.name: field.default for field in dataclasses.fields(config)} | before
    for name, value in ours.items():
        if (theirs := before[name]) != value:
            raise ValueError(
                f"{path} is of weights that were trained with {name}={theirs!r}, not {value!r}; "
                "move it away, or choose another output directory"
            )


def _append(path: Path, entries: list[dict[str, float]], entry: dict[str, float]) -> None:
    entries.append(entry)
    _write_lines(path, entries)


def _write_lines(path: Path, entries: list[dict[str, float]]) -> None:
    write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in entries).encode())
