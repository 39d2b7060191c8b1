r"""Figures 5, 10, 11, 12 and 16: what an attacker knows, and what an attacker maximises.

Section ``knowledge`` (section 4.4, C.3). Two attackers maximise :math:`\|\tilde z^a - \tilde
z^r\|^2` (eq. 64) in L_inf balls, with :math:`\tilde z^a, \tilde z^r \sim q^{(t)}` (eqs. 65, 66):
the one of ``without_mcmc`` with t = 0, against the guide alone, the one of ``with_mcmc`` with the t
transitions of the defence, by gradients of :mod:`pyro_vae_defence.attacks.adaptive`, of whose
results the one with the largest objective on fresh chains is kept, image by image. :math:`\tilde
z^r` enters by its mean, since

.. math:: E\|\tilde z^a - \tilde z^r\|^2 = E\|\tilde z^a - E\tilde z^r\|^2 + \mathrm{tr}\,\mathrm{Var}(\tilde z^r).

Section ``objectives`` (C.6). All that an attacker may maximise, unsupervised, and supervised
towards the image of another class, with one optimiser and budget.

Every attack leaves a *cell* of means over images with 95% intervals:

- ``ms_ssim``: similarity of the reference to the attacked image (``images``), and of the
  reference's reconstruction, one undefended draw, to the attacked image's, ``undefended`` and
  ``defended`` by HMC on the paper's target;
- ``unchanged``: how often the class is what the undefended model gives the reference;
- ``symmetric_kl`` of the guides at reference and attacked image, in nats;
- supervised, ``target_ms_ssim`` and ``target_symmetric_kl``: the same to the target;
- in ``knowledge``, ``examples``: a picture of the first images, and below them both
  reconstructions.

Budgets are those of :class:`~pyro_vae_defence.experiments.config.FiguresConfig`.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae_defence import attacks, data, metrics
from pyro_vae_defence.attacks import adaptive
from pyro_vae_defence.defence import DefenceResult, DefendedClassifier, MCMCDefence, NoDefence
from pyro_vae_defence.experiments import results
from pyro_vae_defence.experiments.config import FiguresConfig, command, override
from pyro_vae_defence.experiments.defences import whitened_hmc
from pyro_vae_defence.experiments.defend import VARIANT
from pyro_vae_defence.experiments.drawing import picture
from pyro_vae_defence.experiments.registry import FIGURES, MODELS
from pyro_vae_defence.experiments.results import interval
from pyro_vae_defence.experiments.weights import load_conv_vae
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.models.classifier import LinearClassifier, load_classifier
from pyro_vae_defence.ops import divergences
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.robustness import WhiteBox
from pyro_vae_defence.types import PreparedObjective

ATTACKERS = ("without_mcmc", "with_mcmc")
KINDS = ("unsupervised", "supervised")


def figures(
    name: str,
    output: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    models: str | os.PathLike[str] | None = None,
    overrides: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Attack the model of ``name``; cells that the result file already holds are not run again.

    Args:
        name: a name of :data:`pyro_vae_defence.experiments.registry.FIGURES`.
        output: directory of the result file ``NAME.json``, written after every cell.
        root: directory of the datasets.
        models: directory of the weights of VAE and classifier; the packaged ones when ``None``.
        overrides: fields of the configuration to change; they are recorded in the result.
        progress: show a progress bar.

    Raises:
        ValueError: for an unknown name or override, missing weights, or a result file of another
            run.
    """
    if name not in FIGURES:
        raise ValueError(f"no figures named {name!r}; choose one of {', '.join(FIGURES)}")
    config = override(FIGURES[name], overrides)
    study, weights = _load(config, root, models)
    path = Path(output) / f"{name}.json"
    result = results.header(
        f"figures {name}",
        config,
        weights,
        command("figures", name, overrides),
        metric=metrics.metric_name("ms_ssim", VARIANT),
    )
    result |= {"clean": {}, "knowledge": {}, "objectives": {}}
    results.resume(path, result, "clean", "knowledge", "objectives")
    with tqdm(list(_cells(result, study)), unit="cell", disable=not progress, leave=False) as bar:
        for cells, key, measure in bar:
            if key not in cells:
                cells[key] = measure()
                results.save(path, result, indent=1)
    return result


_Cell = tuple[dict[str, Any], str, Callable[[], dict[str, Any]]]
"""Where a cell goes, under which name, and how it is measured."""


def _cells(result: dict[str, Any], study: _Study) -> Iterator[_Cell]:
    yield result["clean"], "reference", study.clean
    for radius in study.config.radii:
        cells = result["knowledge"].setdefault(f"{radius:g}", {})
        for attacker in ATTACKERS:
            yield cells, attacker, functools.partial(study.knowledge, attacker, radius)
    for radius in study.config.objective_radii:
        kinds = result["objectives"].setdefault(f"{radius:g}", {})
        for kind in KINDS:
            cells = kinds.setdefault(kind, {})
            for objective in study.config.objectives:
                yield cells, objective, functools.partial(study.objective, kind, objective, radius)


def _load(
    config: FiguresConfig,
    root: str | os.PathLike[str] | None,
    models: str | os.PathLike[str] | None,
) -> tuple[_Study, dict[str, str]]:
    """Read weights and data; the weights' hashes by name."""
    vae, card_of_vae = load_conv_vae(config.model, models)
    classifier, card = load_classifier(f"{config.model}_classifier", models)
    weights = {config.model: card_of_vae.sha256, card.name: card.sha256}
    test_set = data.load(MODELS[config.model].dataset, "test", root)
    chosen = data.stratified(
        test_set, config.num_images, results.generator(config.seed, "references")
    )
    labels = test_set.labels[chosen]
    if bool((labels == labels.roll(1)).any()):
        raise ValueError(
            f"num_images={config.num_images} leaves an image whose target is of its own class; "
            "ask for one more"
        )
    return _Study(config, vae, classifier, test_set.images(chosen), labels), weights


@dataclass(frozen=True)
class _Study:
    """A trained VAE with its classifier, references ``(N, C, H, W)`` and their labels."""

    config: FiguresConfig
    vae: ConvVAE
    classifier: LinearClassifier
    x_ref: Tensor
    labels: Tensor

    # --- Cells ---

    def clean(self) -> dict[str, Any]:
        """No attack: the floors of noise, and what the defence costs."""
        return self._cell("clean", self.x_ref, examples=True)

    def knowledge(self, attacker: str, radius: float) -> dict[str, Any]:
        """One attacker of Figures 5, 10, 11 and 12 at one radius."""
        gradients = self.config.gradients if attacker == "with_mcmc" else ("exact",)
        purposes = [f"{attacker} {gradient} {radius:g}" for gradient in gradients]
        objectives = [
            self._latent_distance(gradient, self._generator(f"{purpose} objective"))
            for gradient, purpose in zip(gradients, purposes, strict=True)
        ]
        started = time.perf_counter()
        found = [
            self._attack(objective, radius, purpose)
            for objective, purpose in zip(objectives, purposes, strict=True)
        ]
        seconds = (time.perf_counter() - started) / len(self.x_ref)
        winner = torch.cat([each.objective for each in found]).argmax(0)
        x_adv = torch.cat([each.x_adv for each in found])[winner, torch.arange(len(winner))]
        return {
            **self._cell(f"{attacker} {radius:g}", x_adv, examples=True),
            "strongest": {name: int((winner == i).sum()) for i, name in enumerate(gradients)},
            "attack_seconds_per_image": seconds,
        }

    def objective(self, kind: str, name: str, radius: float) -> dict[str, Any]:
        """One objective of Figure 16 at one radius."""
        purpose, supervised = f"{kind} {name} {radius:g}", kind == "supervised"
        found = self._attack(self._prepared(name, supervised), radius, purpose)
        return self._cell(purpose, found.x_adv[0], supervised)

    def _attack(
        self, objective: PreparedObjective, radius: float, purpose: str
    ) -> attacks.AttackResult:
        engine = getattr(attacks, self.config.engine)
        # Objectives with chains of their own see all images at once.
        attack = engine(objective, Linf(radius), num_steps=self.config.num_steps, batch_size=2**31)
        return attack(self.x_ref, self._generator(f"{purpose} attack"))

    def _cell(
        self, purpose: str, x: Tensor, supervised: bool = False, examples: bool = False
    ) -> dict[str, Any]:
        """What is measured of images ``x`` that stem from the references."""
        runs = {
            "undefended": NoDefence(self.vae)(x, self._generator(f"{purpose} undefended")),
            "defended": self._hmc()(x, self._generator(f"{purpose} defended")),
        }

        def similarity(reference: Tensor, image: Tensor) -> dict[str, float]:
            return interval(metrics.ms_ssim(reference, image, variant=VARIANT))

        def divergence(reference: Tensor) -> dict[str, float]:
            with torch.no_grad():
                q, q_ref = (program.posterior(self.vae, images) for images in (x, reference))
                return interval(divergences.symmetric_kl(q, q_ref))

        cell: dict[str, Any] = {
            "ms_ssim": {
                "images": similarity(self.x_ref, x),
                **{
                    name: similarity(self._reconstruction, run.reconstruction)
                    for name, run in runs.items()
                },
            },
            "unchanged": self._unchanged(x, runs["defended"]),
            "symmetric_kl": divergence(self.x_ref),
        }
        if supervised:
            cell["target_ms_ssim"] = {
                name: similarity(self._reconstruction.roll(1, 0), run.reconstruction)
                for name, run in runs.items()
            }
            cell["target_symmetric_kl"] = divergence(self._target)
        if examples:
            shown = (x, *(run.reconstruction for run in runs.values()))
            cell["examples"] = picture([images[: self.config.num_examples] for images in shown])
        return cell

    def _unchanged(self, x: Tensor, defended: DefenceResult) -> dict[str, Any]:
        reference = self.classifier.classify(self.vae, self.x_ref)
        behind = DefendedClassifier(self._hmc(), self.classifier, self.config.reading)
        predicted = {
            "undefended": self.classifier.classify(self.vae, x),
            "defended": behind.log_probabilities(defended).argmax(-1),
        }
        return {
            name: interval(metrics.adversarial_accuracy(reference, found))
            for name, found in predicted.items()
        }

    @functools.cached_property
    def _reconstruction(self) -> Tensor:
        """Of the references, one draw of the guide; an image's target is the image before it."""
        return NoDefence(self.vae)(self.x_ref, self._generator("before")).reconstruction

    @property
    def _target(self) -> Tensor:
        return self.x_ref.roll(1, 0)

    # --- What attackers maximise ---

    def _prepared(self, name: str, supervised: bool) -> PreparedObjective:
        """An objective of Table 1 or C.6 by name."""
        target = self._target if supervised else None
        if name == "cross_entropy":
            # Unsupervised, away from the class predicted at the reference.
            targets = self.labels.roll(1) if supervised else None
            return attacks.cross_entropy(self.vae, self.classifier, targets=targets)
        if name != "output":
            return getattr(attacks, name)(self.vae, target)
        if target is None:
            return attacks.maximum_damage(self.vae)
        return attacks.targeted_output(self.vae, target)

    def _latent_distance(self, gradient: str, generator: torch.Generator) -> PreparedObjective:
        """Equation 64: with ``"exact"`` of the guide alone, else of the defended guide by this
        gradient."""
        number, box = self.config.num_chains, self._white_box
        if gradient == "exact":
            score = adaptive.latent_distance(functools.partial(program.posterior_mean, self.vae))
            encode = adaptive.transfer(box.start)
            return adaptive.expected(encode, score, number, generator=generator)
        mean = {name: value.mean((0, 1)) for name, value in self._defended.samples.items()}
        score = adaptive.latent_distance(lambda x: lat.repeat(mean, number))
        # What the defence arrives at.
        step_size = float(self._defended.sample_stats["step_size"].median())
        resume = box.transitions(self.config.persistent_transitions, step_size)
        if gradient == "equilibrium":
            return adaptive.equilibrium(
                box.start, box.chain, box.energy, score, number, resume=resume, generator=generator
            )
        if gradient == "bpda":
            encode = adaptive.bpda(box.start, box.chain, resume)
        else:
            last = box.transitions(self.config.unrolled_transitions, step_size)
            encode = adaptive.truncated(box.start, box.chain, last, resume)
        return adaptive.expected(encode, score, number, persistent=True, generator=generator)

    @functools.cached_property
    def _white_box(self) -> WhiteBox:
        return WhiteBox(self.vae, self._hmc(), self.x_ref)

    # --- The defence ---

    def _hmc(self, num_chains: int = 1) -> MCMCDefence:
        """HMC in the metric of the mean posterior variance."""
        config = self.config
        kernel = whitened_hmc(self.vae, config.step_size, config.leapfrog_steps)
        return MCMCDefence(self.vae, kernel, config.num_samples, config.warmup_steps, num_chains)

    @functools.cached_property
    def _defended(self) -> DefenceResult:
        """The references behind the defence, in as many chains as the attacker has."""
        return self._hmc(self.config.num_chains)(self.x_ref, self._generator("references defended"))

    def _generator(self, purpose: str) -> torch.Generator:
        return results.generator(self.config.seed, purpose)
