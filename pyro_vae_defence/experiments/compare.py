"""Every defence and control against the paper's encoder attack, over its radius: one result file
per dataset.

For each radius and defence a cell holds, with 95% intervals over images:

- the similarity of reconstructions before and after the attack, for one draw of the defence and for
  the mean of its draws;
- how often the class of the attacked image is the label, and how often it is the class that the
  *undefended* model gives the reference, a yardstick no defence can bend; the same for clean images
  and for random noise of the attack's radius;
- how well the chains tell attacked images from clean ones and from noise;
- gradients and seconds per image.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae_defence import attacks, data, metrics
from pyro_vae_defence.defence import (
    Defence,
    DefenceResult,
    DefendedClassifier,
    MCMCDefence,
    NoDefence,
    calibrate_radius,
    detection_scores,
)
from pyro_vae_defence.experiments import results
from pyro_vae_defence.experiments.config import (
    WITH_RADIUS,
    CompareConfig,
    command,
    defence_spec,
    override,
)
from pyro_vae_defence.experiments.defences import named_defence
from pyro_vae_defence.experiments.defend import VARIANT
from pyro_vae_defence.experiments.registry import CLASSIFIERS, COMPARISONS, classifiers_of
from pyro_vae_defence.experiments.results import interval
from pyro_vae_defence.experiments.weights import load_conv_vae
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.models.classifier import LinearClassifier, load_classifier
from pyro_vae_defence.models.perturbation import UnknownRadius
from pyro_vae_defence.ops.balls import Linf

UNDEFENDED_READING = "guide's mean"

CALIBRATION_RADII = (0.0, 0.05, 0.1, 0.2, 0.3)
CALIBRATION_IMAGES = 100
"""Radii of a defence that leaves it open, and clean validation images for its penalties."""

# Classifiers of means read means, or are shown what draws do to them; classifiers of draws read
# draws.
_READINGS: dict[str, tuple[Any, ...]] = {
    "mean": ("last", "draws", "mean", "reencoded"),
    "guide": ("last", "draws"),
    "posterior": ("last", "draws"),
}


def compare(
    name: str,
    output: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    models: str | os.PathLike[str] | None = None,
    overrides: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare defences on the dataset ``name``; cells that the result file already holds are not
    run again.

    Args:
        name: a name of :data:`pyro_vae_defence.experiments.registry.COMPARISONS`.
        output: directory of the result file ``NAME.json``, written after every cell.
        root: directory of the datasets.
        models: directory of the weights of VAE and classifiers; the packaged ones when ``None``.
        overrides: fields of the configuration to change; they are recorded in the result.
        progress: show a progress bar.

    Raises:
        ValueError: for an unknown name or override, weights that are missing, or a result file of
            another run.
    """
    if name not in COMPARISONS:
        raise ValueError(f"no comparison named {name!r}; choose one of {', '.join(COMPARISONS)}")
    config = override(COMPARISONS[name], overrides)
    study = _Study.load(config, root, models)
    path = Path(output) / f"{name}.json"
    result = results.header(
        f"compare {name}",
        config,
        study.weights,
        command("compare", name, overrides),
        metric=metrics.metric_name("ms_ssim", VARIANT),
    )
    result |= {
        "clean": study.undefended_accuracy(),
        "noise_floor": {},
        "radii": {},
        "costs": {},
    }
    results.resume(path, result, "noise_floor", "radii", "costs")

    # (where cells go, radius, names, all images or those of the curve)
    parts: list[tuple[dict[str, Any], float, tuple[str, ...], bool]] = [
        (result["radii"].setdefault(f"{r:g}", {}), r, config.defences, r in config.full_radii)
        for r in config.radii
    ]
    parts.append((result["costs"], config.cost_radius, config.costs, False))
    total = sum(len(names) for _, _, names, _ in parts)
    with tqdm(total=total, unit="cell", disable=not progress, leave=False) as bar:
        for cells, radius, names, full in parts:
            missing = [defence for defence in names if defence not in cells]
            bar.update(len(names) - len(missing))
            inputs = study.inputs(radius, full) if missing else None
            for defence in missing:
                assert inputs is not None
                same = study.same(defence, radius, cells)
                cells[defence] = cells[same] if same else study.cell(defence, radius, inputs)
                result["noise_floor"].setdefault("full" if full else "curve", inputs.noise_floor)
                results.save(path, result, indent=1)
                bar.update()
    return result


@dataclass(frozen=True)
class _Task:
    """One column of labels, and the classifiers that predict it, by what they were trained on."""

    column: int
    classifiers: dict[str, LinearClassifier]


@dataclass(frozen=True)
class _Inputs:
    """What is given to every defence at one radius."""

    x_adv: Tensor
    image: Tensor
    before: Tensor
    noise_floor: dict[str, float]
    classified: dict[str, Tensor]
    labels: Tensor


class _Study:
    """A trained VAE with its classifiers, test images, and defences by name."""

    def __init__(
        self,
        config: CompareConfig,
        vae: ConvVAE,
        tasks: dict[str, _Task],
        weights: dict[str, str],
        load_split: Callable[[str], data.Images],
    ) -> None:
        self.config = config
        self.vae = vae
        self.tasks = tasks
        self.weights = weights
        self.load_split = load_split
        test_set = load_split("test")
        chosen = data.stratified(test_set, config.num_references, self._generator("references"))
        self.references = test_set.images(chosen)
        chosen = data.stratified(test_set, config.num_images, self._generator("images"))
        self.images = test_set.images(chosen)
        self.labels = test_set.labels[chosen].reshape(len(chosen), -1)
        self._clean: dict[tuple[Any, ...], DefenceResult] = {}
        self._unknown: UnknownRadius | None = None

    @classmethod
    def load(
        cls,
        config: CompareConfig,
        root: str | os.PathLike[str] | None,
        models: str | os.PathLike[str] | None,
    ) -> _Study:
        """Read weights and data."""
        vae, card = load_conv_vae(config.model, models)
        weights = {config.model: card.sha256}
        tasks = {}
        for task, plain in classifiers_of(config.model).items():
            classifiers: dict[str, LinearClassifier] = {}
            for inputs in config.inputs:
                name = plain if inputs == "mean" else f"{plain}_{inputs}"
                classifiers[inputs], of = load_classifier(name, models)
                weights[name] = of.sha256
            tasks[task] = _Task(CLASSIFIERS[plain].column, classifiers)
        known = [f"{how}/{inputs}" for inputs in config.inputs for how in _READINGS[inputs]]
        if config.reading not in known:
            raise ValueError(f"reading must be one of {', '.join(known)}, got {config.reading!r}")
        load = functools.partial(data.load, card.training["dataset"], root=root)
        return cls(config, vae, tasks, weights, load)

    def undefended_accuracy(self) -> dict[str, Any]:
        """Accuracy of the undefended model on clean images, per task."""
        return {
            task: interval(
                metrics.correct(self._undefended(task, self.images), self._labels(task)),
                torch.arange(len(self.images)),
            )
            for task in self.tasks
        }

    def inputs(self, radius: float, full: bool) -> _Inputs:
        """Attack references and images at a radius; the curve's are the first of all."""
        config = self.config
        restarts = config.num_restarts if full else min(config.curve_restarts, config.num_restarts)
        num_images = len(self.images) if full else min(config.curve_images, len(self.images))
        x = self.images[:num_images]
        references = self.references.repeat(restarts, 1, 1, 1)
        before, again = (
            NoDefence(self.vae)(references, self._generator(purpose)).reconstruction
            for purpose in ("before", "again")
        )
        image = torch.arange(len(self.references)).repeat(restarts)
        classified = {"clean": x}
        x_adv = references
        if radius > 0:
            attack = functools.partial(
                attacks.PGD, attacks.symmetric_kl(self.vae), Linf(radius), preset="paper"
            )
            found = attack(num_restarts=restarts)(self.references, self._generator("attack"))
            x_adv = found.x_adv.flatten(0, 1)
            classified["attacked"] = attack()(x, self._generator("attack images")).x_adv[0]
            some = x[: config.num_noise]
            classified["noise"] = attacks.random_noise(some, Linf(radius), self._generator("noise"))
        floor = interval(metrics.ms_ssim(before, again, variant=VARIANT), image)
        return _Inputs(x_adv, image, before, floor, classified, self.labels[:num_images])

    def cell(self, name: str, radius: float, inputs: _Inputs) -> dict[str, Any]:
        """Everything about one defence at one radius."""
        defence = self.defence(name, radius)
        outcome = defence(inputs.x_adv, self._generator("similarity"))
        with torch.no_grad():
            mean = {site: value.mean((0, 1)) for site, value in outcome.samples.items()}
            decoded = program.decode(self.vae, mean, tuple(inputs.x_adv.shape[1:]))
        runs = {
            kind: self._run(name, radius, defence, kind, x) for kind, x in inputs.classified.items()
        }
        entry = {
            "ms_ssim": self._similarity(inputs, outcome.reconstruction),
            "ms_ssim_of_mean": self._similarity(inputs, decoded),
            "accuracy": {
                task: self._accuracy(name, defence, task, runs, inputs) for task in self.tasks
            },
            "gradients_per_image": float(outcome.num_gradients.double().mean()),
            "seconds_per_image": outcome.seconds / len(inputs.x_adv),
            "num_attacks": len(inputs.x_adv),
            "num_classified": len(inputs.labels),
            "settings": outcome.settings,
        }
        if isinstance(defence, MCMCDefence) and "attacked" in runs:
            entry["detection"] = self._detection(defence, runs)
        return entry

    def defence(self, name: str, radius: float) -> Any:
        """The defence or control of a name; see :class:`CompareConfig`."""
        return named_defence(self.vae, name, self.config, radius, self.unknown_radius)

    def same(self, name: str, radius: float, cells: dict[str, Any]) -> str | None:
        """A defence among ``cells`` that at this radius is ``name``, as ``aware`` is ``aware_0.1``
        at 0.1."""
        return next(
            (c for c in cells if self._resolved(c, radius) == self._resolved(name, radius)), None
        )

    def _resolved(self, name: str, radius: float) -> tuple[str, float | None, int | None]:
        kind, assumed, transitions = defence_spec(name)
        delta = radius if assumed is None and kind in WITH_RADIUS else assumed
        return kind, delta, transitions

    def unknown_radius(self) -> UnknownRadius:
        """A radius left open, with penalties from clean validation images."""
        if self._unknown is None:
            validation_set = self.load_split("validation")
            chosen = data.stratified(
                validation_set, CALIBRATION_IMAGES, self._generator("calibration")
            )
            x = validation_set.images(chosen)
            self._unknown = calibrate_radius(self.vae, x, CALIBRATION_RADII)
        return self._unknown

    def _run(
        self, name: str, radius: float, defence: Defence, kind: str, x: Tensor
    ) -> DefenceResult:
        """Defend images to be classified; clean ones once, if the defence does not depend on the
        attack's radius."""
        generator = self._generator(f"classify {kind}")
        if kind != "clean":
            return defence(x, generator)
        key = (*self._resolved(name, radius), len(x))
        if key not in self._clean:
            self._clean[key] = defence(x, generator)
        return self._clean[key]

    def _similarity(self, inputs: _Inputs, reconstruction: Tensor) -> dict[str, float]:
        return interval(
            metrics.ms_ssim(inputs.before, reconstruction, variant=VARIANT), inputs.image
        )

    def _accuracy(
        self,
        name: str,
        defence: Defence,
        task: str,
        runs: dict[str, DefenceResult],
        inputs: _Inputs,
    ) -> dict[str, Any]:
        """Reading/classifier -> share of images with the right class, and with the reference's, per
        kind of image."""
        reference = self._undefended(task, inputs.classified["clean"])
        label = self._labels(task)[: len(reference)]
        predictions = {
            UNDEFENDED_READING: {
                kind: self._undefended(task, x) for kind, x in inputs.classified.items()
            }
        }
        if name != "none":
            predictions = {
                f"{reading}/{trained_on}": {
                    kind: DefendedClassifier(defence, classifier, reading)
                    .log_probabilities(run)
                    .argmax(-1)
                    for kind, run in runs.items()
                }
                for trained_on, classifier in self.tasks[task].classifiers.items()
                for reading in _READINGS[trained_on]
            }
        image = torch.arange(len(reference))
        return {
            reading: {
                kind: {
                    "correct": interval(
                        metrics.correct(found, label[: len(found)]), image[: len(found)]
                    ),
                    "unchanged": interval(
                        metrics.adversarial_accuracy(reference[: len(found)], found),
                        image[: len(found)],
                    ),
                }
                for kind, found in of_kind.items()
            }
            for reading, of_kind in predictions.items()
        }

    def _detection(self, defence: MCMCDefence, runs: dict[str, DefenceResult]) -> dict[str, Any]:
        """Score -> other images -> AUROC and false positive rate at 95% of attacked images
        caught."""
        scores = {
            kind: detection_scores(defence, run, self.vae.mean_posterior_variance)
            for kind, run in runs.items()
        }
        return {
            score: {
                f"against_{kind}": {
                    metric.__name__: results.as_entry(
                        metrics.detection_interval(
                            metric,
                            scores[kind][score],
                            value[: len(scores[kind][score])],
                            generator=torch.Generator().manual_seed(0),
                        )
                    )
                    for metric in (metrics.auroc, metrics.fpr_at_tpr)
                }
                for kind in ("clean", "noise")
            }
            for score, value in scores["attacked"].items()
        }

    def _undefended(self, task: str, x: Tensor) -> Tensor:
        return self.tasks[task].classifiers["mean"].classify(self.vae, x)

    def _labels(self, task: str) -> Tensor:
        return self.labels[:, self.tasks[task].column]

    def _generator(self, purpose: str) -> torch.Generator:
        return results.generator(self.config.seed, purpose)
