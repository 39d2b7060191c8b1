r"""Attacks on analysis by synthesis, whose gradients need no derivative of a walk.

What decides between the label y and the others at an attacked image is

.. math:: \log \sum_{k \ne y} \pi_k M_k^\delta(x) - \log \pi_y M_y^\delta(x),

and its gradient is a difference of mean forces on the image, :math:`-E[\partial_x U_{\delta,k}(z;
x)]` over each class's posterior (:mod:`pyro_vae_defence.defence.synthesis`). Two objectives:

``mass_margin``
    The difference itself, estimated by fresh walks at every step, always with the same noise
    (common random numbers), so that an attack with memory of values, such as
    :class:`~pyro_vae_defence.attacks.APGD`, can be used.

``class_evidence``
    Two populations of chains, of the label's posterior and of one other class's, go on from step to
    step while the image moves: cheap, but for one other class at a time. Those of largest mass in
    the bound promise most. Chains of the other class start where they explain some image of the
    larger ball.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_vae_defence.attacks.objectives import _rows
from pyro_vae_defence.defence.synthesis import AnalysisBySynthesis
from pyro_vae_defence.mcmc import hmc
from pyro_vae_defence.models import program
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import Ball, reaches
from pyro_vae_defence.ops.checks import check_on_device
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import Latents, Objective, PreparedObjective

_TARGET, _GAIN = 0.7, 0.5  # acceptance, and the first change of the log step size per deviation


def mass_margin(
    classifier: AnalysisBySynthesis, labels: Tensor, generator: torch.Generator | None = None
) -> PreparedObjective:
    """Log-odds of all other classes against the label, ``(N,)``, in nats: positive where it lost.

    Args:
        classifier: that is attacked; fewer walks than it decides with are cheaper.
        labels: classes of the references, int64 ``(N,)``, or one for all.
        generator: of the noise, which is the same at every call; torch's global seed when ``None``.

    Raises:
        ValueError: if the labels are no classes of the classifier; by the attack, if they are not
            on the images' device, or not as many.
    """
    labels = _classes(classifier, "labels", labels)
    seed = draw_seed(generator)

    def prepare(x_ref: Tensor, streams: Streams) -> Objective:
        own = one_hot(_rows.of_rows(labels, streams, "labels"), classifier.num_classes).bool()

        def objective(x: Tensor) -> Tensor:
            masses = classifier.log_posterior(x, torch.Generator().manual_seed(seed))
            return masses.masked_fill(own, -torch.inf).logsumexp(1) - masses[own]

        return objective

    return _rows.with_entries(prepare, labels=labels)


def class_evidence(
    classifier: AnalysisBySynthesis,
    labels: Tensor,
    targets: Tensor,
    ball: Ball,
    *,
    step_size: float = 0.3,
    generator: torch.Generator | None = None,
) -> PreparedObjective:
    """Mean energy of chains of the label less that of chains of another class, ``(N,)``, in nats.

    Args:
        classifier: that is attacked, perturbation-aware.
        labels: classes of the references, int64 ``(N,)``, or one for all.
        targets: the other classes, likewise; none is its image's label.
        ball: the attacker's, of the kind that the classifier assumes.
        step_size: of the chains, to begin with; they have ``classifier.num_walks`` each.
        generator: of the seed; torch's global seed when ``None``.

    Raises:
        ValueError: if the classifier assumes no such ball, or for labels and targets as
            :func:`mass_margin`.
    """
    assumed = classifier.perturbation
    if type(assumed) is not type(ball):
        raise ValueError(f"ball must be of the kind that the classifier assumes, got {ball!r}")
    assert assumed is not None
    labels = _classes(classifier, "labels", labels)
    targets = _classes(classifier, "targets", targets, labels.device)
    if targets.shape != labels.shape:
        raise ValueError(
            f"targets must have the shape of labels, {tuple(labels.shape)}, got "
            f"{tuple(targets.shape)}: give one other class for each label"
        )
    if bool((same := targets == labels).any()):
        row = int(same.int().argmax())
        raise ValueError(
            f"targets must differ from labels, but both are {int(labels[row])} at image {row}: "
            "chains of one class say nothing; choose another class"
        )
    wide = dataclasses.replace(classifier, perturbation=reaches(ball, assumed.radius)[1])
    noise = torch.Generator().manual_seed(draw_seed(generator))

    def prepare(x_ref: Tensor, streams: Streams) -> Objective:
        own = _rows.of_rows(labels, streams, "labels")
        other = _rows.of_rows(targets, streams, "targets")
        chains = [
            _Chains(classifier, own, classifier.explain(x_ref, own, noise), step_size),
            _Chains(classifier, other, wide.explain(x_ref, other, noise), step_size),
        ]

        def objective(x: Tensor) -> Tensor:
            right, wrong = (each(x, draw_seed(noise)) for each in chains)
            return right - wrong

        return objective

    return _rows.with_entries(prepare, labels=labels, targets=targets)


def _classes(
    classifier: AnalysisBySynthesis,
    name: str,
    classes: Tensor,
    device: torch.device | None = None,
) -> Tensor:
    """Classes of an attack's images, whose number is not known yet; on the device of labels."""
    if not isinstance(classes, Tensor) or classes.dim() != 1 or len(classes) == 0:
        got = tuple(classes.shape) if isinstance(classes, Tensor) else type(classes).__name__
        raise ValueError(f"{name} must be an int64 tensor (N,), one class per image, got {got}")
    if device is not None:
        check_on_device(name, classes, "labels", device)
    return classifier.check_classes(name, classes, classes)


class _Chains:
    """Chains of one class's posterior for each image, which go on while the image moves."""

    def __init__(
        self, classifier: AnalysisBySynthesis, classes: Tensor, latents: Latents, step_size: float
    ) -> None:
        self.classifier, self.number = classifier, classifier.num_walks
        self.given = one_hot(classes, classifier.num_classes)
        self.latents: Latents | None = None
        self.start = {name: value.flatten(0, 1) for name, value in latents.items()}
        self.size = next(iter(self.start.values())).new_full(
            (self.number * len(classes),), step_size
        )
        self.made = 0

    def __call__(self, x: Tensor, seed: int) -> Tensor:
        """Move the chains once, and return their mean energies ``(N,)``, differentiable in x."""
        vae, images = program.at_images(self.classifier.vae, (x, self.given.to(x.dtype)))
        energy = program.potential(vae, images, self.classifier.perturbation)
        energy = energy.at(images.repeat(self.number, 1, 1, 1))
        if self.latents is None:
            self.latents = energy.unconstrain(self.start)
        metric = self.classifier.inverse_mass_matrix
        if metric is not None:
            metric = {name: metric[name][None].to(value) for name, value in self.latents.items()}
        with torch.no_grad():
            still = energy.at(images.detach().repeat(self.number, 1, 1, 1))
            state = hmc.init(still, self.latents)
            streams = Streams.create(len(x), self.number, seed=seed, device=x.device)
            state, info = hmc.step(
                still, state, streams, self.size, self.classifier.num_steps, metric
            )
        self.made += 1
        change = _GAIN * self.made**-0.5 * (info.acceptance_rate - _TARGET)
        self.size, self.latents = self.size * change.exp(), state.position
        return lat.unfold(energy(lat.detach(state.position)), self.number).mean(0)
