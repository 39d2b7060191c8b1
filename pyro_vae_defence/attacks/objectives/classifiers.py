r"""Attacks on a classifier of latents: cross-entropy and the difference of logits ratio.

With scores :math:`s = W(z)` of the latents of :math:`x`, label :math:`y`, target class :math:`t`
and scores sorted in descending order :math:`s_{\pi_1} \ge s_{\pi_2} \ge \dots`,

.. math::
    \mathrm{CE} = -\log \mathrm{softmax}(s)_y, \qquad
    \mathrm{DLR} = -\frac{s_y - \max_{i \ne y} s_i}{s_{\pi_1} - s_{\pi_3}}, \qquad
    \mathrm{DLR}_t = -\frac{s_y - s_t}{s_{\pi_1} - (s_{\pi_3} + s_{\pi_4}) / 2} .

DLR is invariant to shift and scale of the scores, so a confident classifier does not make its
gradient vanish; it is positive exactly where the image is misclassified. Labels are the true ones,
or, when ``None``, the classes predicted at the references, as in the paper, whose adversarial
accuracy asks whether the prediction *changed* (section 2.2).

Reference: Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, https://arxiv.org/abs/2003.01690 (section 4, appendix A).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_vae_defence.attacks.objectives import _rows
from pyro_vae_defence.attacks.objectives._rows import Classifier, LatentsOf
from pyro_vae_defence.models.classifier import scores_of_either
from pyro_vae_defence.models.contract import check_networks_on_device
from pyro_vae_defence.models.program import check_vae, evaluation_mode
from pyro_vae_defence.ops.boundary import uncast
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import VAE, Criterion, Objective, PreparedCriterion, PreparedObjective


def cross_entropy(
    vae: VAE,
    classifier: Classifier,
    labels: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    latents: LatentsOf = "mean",
    num_draws: int = 1,
) -> PreparedObjective:
    """Cross-entropy of the label, in nats; with targets, minus that of the target (Table 1).

    Args:
        vae: any Pyro VAE.
        classifier: latents, as site -> values or ``(N, D)`` of all sites together, to scores
            ``(N, num_classes)``, e.g. a ``LinearClassifier``.
        labels: int64 ``(N,)``, not used with targets; those predicted at references if ``None``.
        targets: int64 ``(N,)`` or ``(1,)``, the classes to be reached.
        latents: classify a ``"sample"`` of the guide (as in Table 1), or its ``"mean"``.
        num_draws: noise draws averaged over; one is enough for means.

    Raises:
        ValueError: for labels or targets that are not int64 vectors, or a bad setting.
    """
    return _on_scores(_cross_entropy, 2, vae, classifier, labels, targets, latents, num_draws)


def dlr(
    vae: VAE,
    classifier: Classifier,
    labels: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    latents: LatentsOf = "mean",
    num_draws: int = 1,
) -> PreparedObjective:
    """Difference of logits ratio; as :func:`cross_entropy`, but labels are used with targets too.

    Raises:
        ValueError: as above, and with fewer than 3 classes (4 with targets).
    """
    least = 3 if targets is None else 4
    return _on_scores(_dlr, least, vae, classifier, labels, targets, latents, num_draws)


def misclassified(
    vae: VAE,
    classifier: Classifier,
    labels: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    latents: LatentsOf = "mean",
) -> PreparedCriterion:
    """As :func:`cross_entropy`, for ``stop``: the class is not the label, or it is the target."""
    differs = _on_scores(_differs, 2, vae, classifier, labels, targets, latents, 1)

    def prepare(
        x_ref: Tensor, streams: Streams | None = None, conditions: tuple[Tensor, ...] = ()
    ) -> Criterion:
        objective = differs(x_ref, streams, conditions)

        def criterion(x: Tensor, value: Tensor) -> Tensor:
            with torch.no_grad():
                return objective(x) > 0.5

        return criterion

    return _rows.with_entries(prepare, labels=labels, targets=targets)


def _on_scores(
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    least: int,
    vae: VAE,
    classifier: Classifier,
    labels: Tensor | None,
    targets: Tensor | None,
    latents: LatentsOf,
    num_draws: int,
) -> PreparedObjective:
    """A loss of scores of at least ``least`` classes, labels and targets, averaged over draws."""
    check_vae(vae)
    check_integer("num_draws", num_draws)
    _rows.check_latents(latents)
    if not callable(classifier):
        raise ValueError(f"classifier must map latents to scores, got {classifier!r}")
    for name, classes in (("labels", labels), ("targets", targets)):
        if classes is not None and not (
            isinstance(classes, Tensor) and classes.dim() == 1 and classes.dtype == torch.int64
        ):
            raise ValueError(f"{name} must be an int64 tensor (N,), got {classes!r}")

    check = _rows.GuideCheck()

    @uncast
    def prepare(
        x_ref: Tensor, streams: Streams | None = None, conditions: tuple[Tensor, ...] = ()
    ) -> Objective:
        streams = _rows.own_streams(x_ref, streams)
        rows = _rows.vae_of_rows(vae, x_ref, streams, conditions)
        noises = _rows.draws(streams, num_draws)

        check_networks_on_device("classifier", classifier, "x_ref", x_ref)

        def scores(x: Tensor) -> list[Tensor]:
            with evaluation_mode(vae, classifier):
                encoded = [_rows.encode_rows(rows, x, latents, noise) for noise in noises]
                return [scores_of_either(classifier, each) for each in encoded]

        with torch.no_grad():
            check(rows, x_ref, streams)
            first = torch.stack(scores(x_ref)).mean(0)
        if first.dim() != 2 or first.shape[0] != x_ref.shape[0] or first.shape[1] < least:
            raise ValueError(
                f"classifier must return scores (N, num_classes) of at least {least} classes for "
                f"this objective, got shape {tuple(first.shape)} for {x_ref.shape[0]} images"
            )
        for name, classes in (("labels", labels), ("targets", targets)):
            check_classes(name, classes, first.shape[1])
        label = first.argmax(1) if labels is None else _rows.of_rows(labels, streams, "labels")
        target = None if targets is None else _rows.of_rows(targets, streams, "targets")
        return uncast(lambda x: torch.stack([loss(s, label, target) for s in scores(x)]).mean(0))

    return _rows.with_entries(prepare, labels=labels, targets=targets)


def check_classes(name: str, classes: Tensor | None, num_classes: int) -> None:
    """``ValueError`` unless classes lie in ``0..num_classes - 1``."""
    if classes is None or classes.device.type == "meta":
        return
    low, high = (int(bound) for bound in classes.aminmax())
    if not 0 <= low <= high < num_classes:
        raise ValueError(
            f"{name} must lie in 0..{num_classes - 1}, the classes of the classifier, got values "
            f"from {low} to {high}"
        )


def _differs(scores: Tensor, label: Tensor, target: Tensor | None) -> Tensor:
    predicted = scores.argmax(1)
    return (predicted != label if target is None else predicted == target).to(scores)


def _cross_entropy(scores: Tensor, label: Tensor, target: Tensor | None) -> Tensor:
    if target is None:
        return F.cross_entropy(scores, label, reduction="none")
    return -F.cross_entropy(scores, target, reduction="none")


def _dlr(scores: Tensor, label: Tensor, target: Tensor | None) -> Tensor:
    own = scores.gather(1, label[:, None])[:, 0]
    ordered = scores.sort(dim=1, descending=True).values
    if target is None:
        # The best other class is the second where the label leads.
        other = torch.where(own == ordered[:, 0], ordered[:, 1], ordered[:, 0])
        spread = ordered[:, 0] - ordered[:, 2]
    else:
        other = scores.gather(1, target[:, None])[:, 0]
        spread = ordered[:, 0] - 0.5 * (ordered[:, 2] + ordered[:, 3])
    return (other - own) / spread.clamp(min=torch.finfo(scores.dtype).tiny ** 0.5)
