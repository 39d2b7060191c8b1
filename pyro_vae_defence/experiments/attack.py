"""Tables 2 and 3: attacks on the encoder and on the classifiers of a trained model, one result file
per model.

Every model of the tables is attacked and defended alike: models that were trained otherwise
(beta-VAE, beta-TCVAE, SE, AVAE), with and without chains behind their encoder, beside the plain
one. For each radius and defence a cell holds, with 95% intervals over images,

- the similarity of reconstructions before and after an attack on the encoder, all restarts counted;
- per label (on ColorMNIST digit and colour) how often the prediction from an image attacked for it
  has not changed, and how often it is right; radius 0 is the clean images.

The attack on a classifier wants the class predicted without an attack to change, whether that was
right or wrong. Attacks do not know the defence; where there is none they have the exact gradient.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence import attacks, data, metrics
from pyro_vae_defence.defence import Defence, DefendedClassifier, NoDefence
from pyro_vae_defence.experiments import results
from pyro_vae_defence.experiments.config import AttackConfig, command, override
from pyro_vae_defence.experiments.defences import named_defence
from pyro_vae_defence.experiments.defend import VARIANT, similarity
from pyro_vae_defence.experiments.registry import ATTACKS, CLASSIFIERS, classifiers_of
from pyro_vae_defence.experiments.results import interval
from pyro_vae_defence.experiments.weights import load_conv_vae
from pyro_vae_defence.models.classifier import LinearClassifier, load_classifier
from pyro_vae_defence.ops.balls import Linf


def attack(
    name: str,
    output: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    models: str | os.PathLike[str] | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Attack the trained model ``name``; cells that the result file already holds are not run
    again.

    Args:
        name: a name of :data:`pyro_vae_defence.experiments.registry.ATTACKS`.
        output: directory of the result file ``NAME.json``, written after every cell.
        root: directory of the datasets.
        models: directory of the weights of VAE and classifiers; the packaged ones when ``None``.
        overrides: fields of the configuration to change, but ``model``; they are recorded in the
            result.

    Raises:
        ValueError: for an unknown name or override, weights that are missing, or a result file of
            another run.
    """
    if name not in ATTACKS:
        raise ValueError(
            f"no attacks on a model named {name!r}; choose one of {', '.join(ATTACKS)}"
        )
    config = override(ATTACKS[name], overrides)
    if config.model != name:
        raise ValueError(
            f"model={config.model!r}: results are named after the model; run attack on it"
        )
    study = _Study(config, root, models)
    path = Path(output) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = results.header(
        f"attack {name}",
        config,
        study.weights,
        command("attack", name, overrides),
        metric=metrics.metric_name("ms_ssim", VARIANT),
    )
    result |= {"noise_floor": {}, "radii": {}}
    results.resume(path, result, "noise_floor", "radii")
    result["noise_floor"] = result["noise_floor"] or study.noise_floor()
    for radius in (0.0, *config.radii):
        cells = result["radii"].setdefault(f"{radius:g}", {})
        missing = [kind for kind in config.defences if kind not in cells]
        inputs = study.inputs(radius) if missing else {}
        for kind in missing:
            cells[kind] = study.cell(kind, inputs)
            results.save(path, result, indent=1)
    return result


class _Study:
    """A trained VAE with its classifiers and test images."""

    def __init__(
        self,
        config: AttackConfig,
        root: str | os.PathLike[str] | None,
        models: str | os.PathLike[str] | None,
    ) -> None:
        self.config = config
        self.vae, card = load_conv_vae(config.model, models)
        self.weights = {config.model: card.sha256}
        # Name of the label -> its column and what predicts it.
        self.tasks: dict[str, tuple[int, LinearClassifier]] = {}
        for task, classifier in classifiers_of(config.model).items():
            loaded, of = load_classifier(classifier, models)
            assert isinstance(loaded, LinearClassifier)
            self.tasks[task] = CLASSIFIERS[classifier].column, loaded
            self.weights[classifier] = of.sha256
        test_set = data.load(card.training["dataset"], "test", root)
        chosen = data.stratified(test_set, config.num_references, self._generator("references"))
        self.references = test_set.images(chosen)
        # Once per restart, and which reference each row is of.
        self.repeated = self.references.repeat(config.num_restarts, 1, 1, 1)
        self.image = torch.arange(len(chosen)).repeat(config.num_restarts)
        chosen = data.stratified(test_set, config.num_images, self._generator("images"))
        self.images = test_set.images(chosen)
        self.labels = test_set.labels[chosen].reshape(len(chosen), -1)

    @functools.cached_property
    def before(self) -> Tensor:
        """Undefended reconstructions of the references, which those under attack are compared
        with."""
        return self._reconstructions("before")

    @functools.cached_property
    def predicted(self) -> dict[str, Tensor]:
        """What every classifier says of the images without attack and defence."""
        return {
            task: classifier.classify(self.vae, self.images)
            for task, (_, classifier) in self.tasks.items()
        }

    def noise_floor(self) -> dict[str, float]:
        """Similarity of two undefended reconstructions of the same reference, one draw each."""
        return similarity(self.before, self._reconstructions("again"), self.image)

    def inputs(self, radius: float) -> dict[str, Tensor]:
        """References attacked through the encoder, and images attacked through each classifier."""
        if radius == 0:
            return {"encoder": self.repeated, **dict.fromkeys(self.tasks, self.images)}
        found = self._attack(attacks.symmetric_kl(self.vae), radius, self.config.num_restarts)
        inputs = {
            "encoder": found(self.references, self._generator("attack encoder")).x_adv.flatten(0, 1)
        }
        for task, (_, classifier) in self.tasks.items():
            objective = attacks.cross_entropy(self.vae, classifier)
            found = self._attack(objective, radius, 1)
            inputs[task] = found(self.images, self._generator(f"attack {task}")).x_adv[0]
        return inputs

    def cell(self, kind: str, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Everything about one defence at one radius."""
        defence: Defence = named_defence(self.vae, kind, self.config)
        outcome = defence(inputs["encoder"], self._generator("similarity"))
        accuracy = {}
        for task, (column, classifier) in self.tasks.items():
            if kind == "none":
                predicted = classifier.classify(self.vae, inputs[task])
            else:
                predicted = DefendedClassifier(defence, classifier, self.config.reading).predict(
                    inputs[task], self._generator("classify")
                )
            accuracy[task] = {
                "unchanged": interval(
                    metrics.adversarial_accuracy(self.predicted[task], predicted)
                ),
                "correct": interval(metrics.correct(predicted, self.labels[:, column])),
            }
        return {
            "ms_ssim": similarity(self.before, outcome.reconstruction, self.image),
            "accuracy": accuracy,
            "gradients_per_image": float(outcome.num_gradients.double().mean()),
            "seconds_per_image": outcome.seconds / len(inputs["encoder"]),
            "settings": outcome.settings,
        }

    def _attack(self, objective: Any, radius: float, num_restarts: int) -> attacks.Attack:
        return attacks.APGD(
            objective, Linf(radius), num_steps=self.config.attack_steps, num_restarts=num_restarts
        )

    def _reconstructions(self, purpose: str) -> Tensor:
        """Of the references, from one draw of the guide each, once per restart."""
        return NoDefence(self.vae)(self.repeated, self._generator(purpose)).reconstruction

    def _generator(self, purpose: str) -> torch.Generator:
        return results.generator(self.config.seed, purpose)
