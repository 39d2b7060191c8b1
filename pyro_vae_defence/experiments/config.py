"""Frozen configurations of experiments; unknown keys fail, defaults are stated once."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from pyro_vae_defence.ops.checks import check_integer

ObjectiveName = Literal["beta", "beta_tcvae", "se", "avae", "se_avae", "avae_ss", "nvae"]


@dataclass(frozen=True)
class TrainConfig:
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
    beta: float = 1.0
    estimator: Literal["mws", "mss", "published"] = "mws"
    radius: float = 0.1
    gamma: float = 1.0
    rho: float = 0.975
    architecture: dict[str, Any] | None = None
    kl_anneal: float = 0.3
    penalty: float = 1e-2
    epochs: int = 12
    learning_rate: float = 2e-3
    schedule: Literal["plateau", "one_cycle", "constant"] = "one_cycle"
    batch_size: int = 128
    images_per_epoch: int | None = None
    half: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective == "avae_ss" and self.start_from is None:
            raise ValueError(
                "objective 'avae_ss' trains the encoder of a trained model: set start_from=NAME"
            )


DefenceName = Literal["none", "paper", "hmc", "nuts"]


@dataclass(frozen=True)
class DefendConfig:
    """One row block of Table 2: a model, an encoder attack, and defences against it.

    Args:
        model: name of a trained model.
        radius: L_inf radius of the attack, in units of the image range.
        num_references: class-stratified test images.
        num_restarts: attacks per reference; all of them count, not the worst.
        defences: which defences to run: ``none``, ``paper`` (the published setting), and ``hmc``
            and ``nuts``, this library's kernels in the metric of the training set's mean posterior
            variance.
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


HierarchyDefenceName = Literal["none", "paper", "hmc", "aware"]


@dataclass(frozen=True)
class HierarchyConfig:
    """One panel of Figure 4: attacks on the top latent groups of an NVAE, and defences on all
    groups at once.

    Args:
        model: name of a trained NVAE, or what to call the one of an official checkpoint.
        dataset: name for :func:`pyro_vae_defence.data.load`.
        paper: column of Table 8, a key of :data:`pyro_vae_defence.defence.mcmc.PAPER_SETTINGS`.
        radius: L_inf radius of the attack, in units of the image range.
        groups: numbers :math:`k_A` of attacked groups, counted from the top; one attack each.
        num_references: class-stratified test images.
        num_restarts: attacks per reference; all of them count, not the worst.
        attack_steps: gradient steps of an attack.
        column: which label to stratify by, where there are several.
        defences: which defences to run: ``none``, ``paper`` (the published setting), ``hmc`` (this
            library's HMC on the paper's target, in the metric of the training set's mean posterior
            variance) and ``aware`` (the same on the perturbation-aware target).
        delta: L_inf radius that ``aware`` assumes; the attack's when ``None``.
        noncentred: whether ``hmc`` and ``aware`` move the noise of the latents instead of the
            latents.
        num_samples, warmup_steps, num_steps, step_size: of ``hmc`` and ``aware``.
        metric_images: training images the metric is measured on, if the model comes without.
        batch_size: most images at once, which bounds the memory.
        checkpointing: recompute activations in backward passes, which bounds the memory of large
            models.
        device: torch device everything runs on.
        seed: seed of references, attacks and defences.
    """

    model: str
    dataset: str
    paper: str
    radius: float
    groups: tuple[int, ...]
    num_references: int = 50
    num_restarts: int = 10
    attack_steps: int = 50
    column: int = 0
    defences: tuple[HierarchyDefenceName, ...] = ("none", "hmc", "aware")
    delta: float | None = None
    noncentred: bool = True
    num_samples: int = 10
    warmup_steps: int = 40
    num_steps: int = 4
    step_size: float = 0.2
    metric_images: int = 1000
    batch_size: int = 500
    checkpointing: bool = False
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        known = get_args(HierarchyDefenceName)
        if isinstance(self.defences, str) or not set(self.defences) <= set(known):
            raise ValueError(
                f"defences must be a tuple of names from {known}, got {self.defences!r}"
            )
        if not isinstance(self.groups, tuple) or not all(
            isinstance(k, int) and k >= 1 for k in self.groups
        ):
            raise ValueError(
                "groups must be a tuple of numbers of at least 1, such as (1, 2, 4), got "
                f"{self.groups!r}"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """How a trained model is measured (Table 7).

    Args:
        model: name of a trained model.
        num_images: class-stratified test images; the full test set when ``None``.
        num_samples: importance samples per image.
        rows: pairs of image and sample computed at once, which bounds the memory.
        features: trained feature extractor for the Fréchet distance between as many samples of the
            model as there are images, and the images; ``None`` leaves it out.
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


LatentInputs = Literal["mean", "guide", "posterior"]


@dataclass(frozen=True)
class ClassifierConfig:
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
    num_draws: int = 4
    num_images: int | None = None
    radius: float = 0.0
    column: int = 0
    optimiser: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 1.0
    patience: int = 3
    early_stop: int = 20
    max_epochs: int = 200
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.inputs not in get_args(LatentInputs):
            raise ValueError(f"inputs must be one of {get_args(LatentInputs)}, got {self.inputs!r}")
        check_integer("num_draws", self.num_draws)


# As in pyro_vae_defence.defence.classifier, which is slow to import.
Reading = Literal["last", "draws", "mean", "reencoded"]
CHAINS = ("hmc", "aware", "aware_unknown")
MODES = ("mode", "aware_mode")
CONTROLS = ("mode", "encoder_samples", "dark_clip", "extreme_clip", "median", "gaussian")
WITH_RADIUS = ("aware", "aware_mode", "dark_clip", "extreme_clip")
_NAME = re.compile(r"(?P<kind>[a-z_]+?)(_(?P<radius>[\d.]+))?(@(?P<transitions>\d+))?")


class DefenceSpec(NamedTuple):
    """What a name such as ``aware_0.1@20`` stands for; see :class:`CompareConfig`."""

    kind: str
    radius: float | None
    transitions: int | None


def defence_spec(name: str) -> DefenceSpec:
    """Read the name of a defence or control.

    Raises:
        ValueError: if it names none.
    """
    found = _NAME.fullmatch(name)
    if found and found["kind"] in ("none", *CHAINS, *MODES, *CONTROLS):
        radius = None if found["radius"] is None else float(found["radius"])
        transitions = None if found["transitions"] is None else int(found["transitions"])
        radius_fits = radius is None or (found["kind"] in WITH_RADIUS and radius <= 1)
        transitions_fit = transitions is None or (found["kind"] in CHAINS and transitions > 1)
        if radius_fits and transitions_fit:
            return DefenceSpec(found["kind"], radius, transitions)
    raise ValueError(
        f"defences has no {name!r}; known are none, "
        f"{', '.join(dict.fromkeys(CHAINS + MODES + CONTROLS))}, "
        f"{', '.join(f'{kind}_RADIUS' for kind in WITH_RADIUS)} and KIND@TRANSITIONS for chains"
    )


@dataclass(frozen=True)
class CompareConfig:
    """Every defence and control against the encoder attack of the paper, over its radius.

    Defences are named: ``none``; ``hmc``, chains on the paper's target; ``aware``, chains on the
    perturbation-aware one, ``aware_unknown`` with a radius left open; ``aware_mode``, the mode of
    that target. Controls: ``mode``, the mode of the paper's target; ``encoder_samples``,
    ``dark_clip``, ``extreme_clip``, ``median``, ``gaussian``
    (:mod:`pyro_vae_defence.defence.controls`). What assumes a radius assumes the attack's own, or
    that of its name, as in ``aware_0.1``. ``@20`` appended means one chain of 20 transitions, half
    of them warm-up, instead of the settings below.

    Args:
        model: name of a trained VAE; its classifiers are found by name.
        defences: what to compare.
        costs: what to compare at ``cost_radius`` by its cost as well.
        inputs: what the classifiers were trained on; see :class:`ClassifierConfig`.
        reading: how classifiers read a defence in the main table; all readings are in the result.
        radii: L_inf radii of the attack, in units of the image range; 0 for no attack.
        full_radii: radii with all references, restarts and images; the others have those of the
            curve.
        num_references: class-stratified test images whose reconstructions are compared.
        num_restarts: attacks per reference; all of them count.
        num_images: class-stratified test images that are classified.
        num_noise: of these, with random noise of the attack's radius.
        curve_restarts, curve_images: of these, at the other radii.
        cost_radius: radius of the comparison by cost.
        num_samples, warmup_steps, num_chains, num_steps, step_size, burn_in: of the chains.
        seed: seed of images, attacks and defences.
    """

    model: str
    defences: tuple[str, ...] = (
        "none",
        "hmc",
        "aware",
        "aware_0.1",
        "aware_0.2",
        "aware_unknown",
        "aware_mode",
        "mode",
        "encoder_samples",
        "dark_clip",
        "dark_clip_0.2",
        "extreme_clip",
        "median",
        "gaussian",
    )
    costs: tuple[str, ...] = (
        *(f"hmc@{transitions}" for transitions in (4, 10, 20, 40)),
        *(f"aware_0.2@{transitions}" for transitions in (4, 10, 20, 40)),
    )
    inputs: tuple[LatentInputs, ...] = ("mean",)
    reading: str = "reencoded/mean"
    radii: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    full_radii: tuple[float, ...] = (0.1, 0.2)
    num_references: int = 50
    num_restarts: int = 10
    num_images: int = 1000
    num_noise: int = 200
    curve_restarts: int = 1
    curve_images: int = 100
    cost_radius: float = 0.2
    num_samples: int = 10
    warmup_steps: int = 15
    num_chains: int = 1
    num_steps: int = 4
    step_size: float = 0.5
    burn_in: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("defences", "costs", "inputs", "radii", "full_radii"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name} must be a tuple, got {getattr(self, name)!r}")
        for name in (*self.defences, *self.costs):
            defence_spec(name)
        if "mean" not in self.inputs or not set(self.inputs) <= set(get_args(LatentInputs)):
            raise ValueError(
                f"inputs must hold 'mean' and names from {get_args(LatentInputs)}, got "
                f"{self.inputs}"
            )
        for radius in (*self.radii, self.cost_radius):
            if not 0 <= radius <= 1:
                raise ValueError(f"radii must lie in [0, 1], the range of images, got {radius!r}")
        _check_chains(self)


def _check_chains(config: Any) -> None:
    """Said before an undefended cell is computed, instead of by the first chain."""
    for name in ("num_samples", "num_chains", "num_steps"):
        check_integer(name, getattr(config, name))
    for name in ("warmup_steps", "burn_in"):
        check_integer(name, getattr(config, name), 0)
    if not config.step_size > 0:
        raise ValueError(f"step_size must be positive, got {config.step_size!r}")


@dataclass(frozen=True)
class BenchmarkConfig:
    """What the benchmark of the sampler engine runs; see ``docs/benchmark.md`` for what it
    measures.

    Args:
        model: name of a trained model with Bernoulli likelihood.
        dataset: test images of this name; the packaged subset needs no download.
        radii: L_inf radii of the attack on the encoder.
        num_images: attacked images, class-stratified.
        num_chains: chains per image.
        samplers: names of :data:`~pyro_vae_defence.experiments.benchmark.samplers.SAMPLERS`; all
            when ``None``.
        max_gradients: budget per chain; samplers known to be slow get a multiple of it and of the
            warm-up.
        warmup_gradients: of these, spent on adaptation.
        window: length of the running mean, in gradients.
        tolerance: distance in nats from the gold run's mean energy that counts as reached.
        similarity_every: least number of gradients between two similarities.
        gold_warmup, gold_gradients: gradients per chain of the gold run.
        ess_images, ess_gradients: images, and gradients per chain after warm-up, of the effective
            sample size; 0 gradients leave it out.
        timed_gradients: gradients per turn when kernels are timed.
        matmul_size: side of the matrices that give the machine's rate.
        rows: batch sizes of the decoder's gradient.
        repeats: turns of everything that is timed.
        engine_images: images for the comparison with other libraries.
        engine_transitions, engine_warmup: transitions, and how many of them adapt the step size.
        engine_steps, engine_tree_depth: leapfrog steps of HMC, and largest tree depth of NUTS.
        one_by_one_images: images that run one after the other, over all turns.
        memory_images: numbers of images whose peak memory is measured.
        memory_batch_size, memory_transitions: of those runs.
        seed: seed of images, attack and chains.
    """

    model: str
    dataset: str = "mnist_subset"
    radii: tuple[float, ...] = (0.1, 0.2)
    num_images: int = 40
    num_chains: int = 4
    samplers: tuple[str, ...] | None = None
    max_gradients: int = 300
    warmup_gradients: int = 120
    window: int = 40
    tolerance: float = 1.0
    similarity_every: int = 8
    gold_warmup: int = 300
    gold_gradients: int = 1500
    ess_images: int = 20
    ess_gradients: int = 200
    timed_gradients: int = 20
    matmul_size: int = 2048
    rows: tuple[int, ...] = (1, 16, 128, 512)
    repeats: int = 3
    engine_images: int = 500
    engine_transitions: int = 12
    engine_warmup: int = 6
    engine_steps: int = 4
    engine_tree_depth: int = 3
    one_by_one_images: int = 6
    memory_images: tuple[int, ...] = (500, 2000, 8000)
    memory_batch_size: int = 512
    memory_transitions: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("radii", "rows", "memory_images", "samplers"):
            value = getattr(self, name)
            if not (isinstance(value, tuple) or (name == "samplers" and value is None)):
                raise ValueError(f"{name} must be a tuple such as (1, 2), got {value!r}")
        if not 0 <= self.engine_warmup < self.engine_transitions:
            raise ValueError(
                f"engine_warmup must lie in 0..{self.engine_transitions - 1}, below "
                "engine_transitions, "
                f"got {self.engine_warmup}"
            )
        if not 0 < self.warmup_gradients < self.max_gradients:
            raise ValueError(
                f"warmup_gradients must lie between 0 and max_gradients = {self.max_gradients}, "
                f"got {self.warmup_gradients}"
            )


ENGINES = ("APGD", "PGD", "MomentumPGD")


@dataclass(frozen=True)
class RobustnessConfig:
    """The whole suite of adaptive attacks against a model without and with defences.

    The defaults make one dataset and radius a matter of tens of minutes on one thread. The fields
    from ``num_steps`` on are those of :class:`pyro_vae_defence.robustness.Budget`.

    Args:
        model: name of a trained model; the classifier is the one of its name.
        radius: L_inf radius of the attack, and what the perturbation-aware defence assumes.
        defences: ``none``; ``hmc``, chains on the paper's target, whitened; ``aware``, on the
            perturbation-aware one.
        targets: ``reconstruction`` (MSSSIM) and ``classification`` (accuracy).
        attacks: names of :data:`pyro_vae_defence.robustness.KNOWLEDGE`; unrolling whole chains is
            left out.
        engine: optimiser of :mod:`pyro_vae_defence.attacks`.
        reading: how the classifier reads draws, see :mod:`pyro_vae_defence.defence.classifier`.
        num_images: class-stratified test images.
        num_examples: of these, how many are kept as pictures.
        num_samples, warmup_steps, leapfrog_steps, step_size: of the chains.
        seed: seed of images, attacks and defences.
    """

    model: str
    radius: float
    defences: tuple[str, ...] = ("none", "hmc", "aware")
    targets: tuple[str, ...] = ("reconstruction", "classification")
    attacks: tuple[str, ...] = (
        "transfer",
        "encoder",
        "bpda",
        "equilibrium",
        "black_box",
        "implicit",
        "truncated",
    )
    engine: str = "APGD"
    reading: Reading = "reencoded"
    num_images: int = 32
    num_examples: int = 8
    num_samples: int = 5
    warmup_steps: int = 20
    leapfrog_steps: int = 4
    step_size: float = 0.5
    seed: int = 0
    num_steps: int = 100
    num_restarts: int = 1
    num_draws: tuple[int, ...] = (1,)
    num_chains: int = 8
    persistent_transitions: int = 1
    unrolled_transitions: int = 1
    num_iterations: int = 5
    num_directions: int = 5
    black_box_steps: int = 2
    max_evaluations: int | None = 20_000
    selection_draws: int = 2
    scoring_draws: int = 5
    check_images: int = 16
    check_steps: int = 20

    def __post_init__(self) -> None:
        known = {
            "defences": ("none", "hmc", "aware"),
            "targets": ("reconstruction", "classification"),
        }
        for name, names in known.items():
            value = getattr(self, name)
            if isinstance(value, str) or not set(value) <= set(names):
                raise ValueError(f"{name} must be a tuple of names from {names}, got {value!r}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be APGD, PGD or MomentumPGD, got {self.engine!r}")


@dataclass(frozen=True)
class AttackConfig:
    """Attacks on the encoder and on the classifiers of a trained model, as in Tables 2 and 3.

    The objectives are the paper's, the optimiser is APGD. A defence is the same whatever the
    attack's radius: what assumes one is named with it.

    Args:
        model: name of a trained VAE; its classifiers are found by name.
        radii: L_inf radii of the attacks, in units of the image range.
        defences: names as in :class:`CompareConfig`, such as ``hmc``, ``aware_0.2`` or
            ``dark_clip_0.2``.
        num_references, num_restarts: class-stratified test images whose encodings are attacked, and
            how often; all restarts count.
        num_images: class-stratified test images whose classes are attacked, once for every label.
        attack_steps: of an attack.
        reading: how the classifier reads draws, see :mod:`pyro_vae_defence.defence.classifier`;
            without a defence it reads the guide's mean.
        num_samples, warmup_steps, num_chains, num_steps, step_size, burn_in: of the chains. Images
            attacked this hard are encoded so far away that chains without a burn-in end on their
            way.
        seed: seed of images, attacks and defences.
    """

    model: str
    radii: tuple[float, ...] = (0.1, 0.2)
    defences: tuple[str, ...] = ("none", "encoder_samples", "dark_clip_0.2", "hmc", "aware_0.2")
    num_references: int = 50
    num_restarts: int = 2
    num_images: int = 100
    attack_steps: int = 50
    reading: Reading = "reencoded"
    num_samples: int = 10
    warmup_steps: int = 15
    num_chains: int = 1
    num_steps: int = 4
    step_size: float = 0.2
    burn_in: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("defences", "radii"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not value:
                raise ValueError(f"{name} must be a tuple that is not empty, got {value!r}")
        for name in self.defences:
            kind, assumed, _ = defence_spec(name)
            if kind == "aware_unknown" or (kind in WITH_RADIUS and assumed is None):
                raise ValueError(f"defences: {name!r} assumes a radius; name it, as in 'aware_0.2'")
        for radius in self.radii:
            if not (isinstance(radius, (int, float)) and 0 < radius <= 1):
                raise ValueError(f"radii must lie in (0, 1], the range of images, got {radius!r}")
        if self.reading not in get_args(Reading):
            raise ValueError(f"reading must be one of {get_args(Reading)}, got {self.reading!r}")
        for name in ("num_references", "num_restarts", "num_images", "attack_steps"):
            check_integer(name, getattr(self, name))
        _check_chains(self)


AttackObjective = Literal[
    "symmetric_kl",
    "forward_kl",
    "reverse_kl",
    "mean_distance",
    "squared_wasserstein",
    "output",
    "cross_entropy",
]


@dataclass(frozen=True)
class FiguresConfig:
    """Figures 5, 10, 11, 12 and 16 of the paper: attackers that know the defence or not, and what
    attacks maximise.

    The defaults make one dataset a matter of minutes on one thread.

    Args:
        model: name of a trained model; the classifier is the one of its name.
        radii: L_inf radii of the attackers that do or do not know the defence, in units of the
            image range.
        gradients: of the attacker who does, names of :mod:`pyro_vae_defence.attacks.adaptive`:
            ``bpda``, ``truncated`` or ``equilibrium``. All are tried and the best result is kept,
            image by image.
        num_chains: chains per image that this attacker averages over, and draws of the guide for
            the other one.
        persistent_transitions: transitions of these chains per step; they go on from the last step.
        unrolled_transitions: how many of the last transitions ``truncated`` differentiates.
        objectives: what is compared, ``output`` being maximum damage or the targeted output attack;
            see :mod:`pyro_vae_defence.attacks.objectives`.
        objective_radii: L_inf radii of these attacks.
        engine: optimiser of :mod:`pyro_vae_defence.attacks`, of all attacks.
        num_steps: its steps.
        num_images: class-stratified test images, not one more than a multiple of the classes: the
            target of an image is the image before it.
        num_examples: of these, the first ones, that are kept to be shown.
        reading: how the classifier reads the defence's draws, see
            :mod:`pyro_vae_defence.defence.classifier`.
        num_samples, warmup_steps, leapfrog_steps, step_size: of the defence's chains.
        seed: seed of images, attacks and defences.
    """

    model: str
    radii: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    gradients: tuple[str, ...] = ("bpda", "equilibrium")
    num_chains: int = 8
    persistent_transitions: int = 1
    unrolled_transitions: int = 1
    objectives: tuple[AttackObjective, ...] = get_args(AttackObjective)
    objective_radii: tuple[float, ...] = (0.1, 0.2)
    engine: str = "MomentumPGD"
    num_steps: int = 50
    num_images: int = 20
    num_examples: int = 2
    reading: Reading = "reencoded"
    num_samples: int = 5
    warmup_steps: int = 20
    leapfrog_steps: int = 4
    step_size: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("radii", "objective_radii"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(0 < radius <= 1 for radius in value):
                raise ValueError(
                    f"{name} must be a tuple of radii in (0, 1], the range of images, got {value!r}"
                )
        known = {
            "gradients": ("bpda", "truncated", "equilibrium"),
            "objectives": get_args(AttackObjective),
        }
        for name, names in known.items():
            value = getattr(self, name)
            if isinstance(value, str) or not value or not set(value) <= set(names):
                raise ValueError(f"{name} must be a tuple of names from {names}, got {value!r}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be APGD, PGD or MomentumPGD, got {self.engine!r}")
        for name in ("num_chains", "num_images"):
            check_integer(name, getattr(self, name), 2)
        if not 1 <= self.num_examples <= self.num_images:
            raise ValueError(
                f"num_examples must lie in 1..num_images = {self.num_images}, got "
                f"{self.num_examples!r}"
            )


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
    "Config",
    TrainConfig,
    AttackConfig,
    DefendConfig,
    HierarchyConfig,
    EvaluateConfig,
    ClassifierConfig,
    CompareConfig,
    BenchmarkConfig,
    RobustnessConfig,
    FiguresConfig,
    AttackBenchmarkConfig,
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


def command(name: str, experiment: str, changes: dict[str, Any] | None, **options: Any) -> str:
    """The command line that repeats a run; options that are ``None`` were not given."""
    words = ["python", "-m", "pyro_vae_defence.experiments", name, experiment]
    for option, value in options.items():
        words += [] if value is None else [f"--{option}", str(value)]
    for key, value in (changes or {}).items():
        words += ["--set", f"{key}={value}"]
    return shlex.join(words)
