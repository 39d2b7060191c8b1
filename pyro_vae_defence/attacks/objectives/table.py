"""The six attacks of the paper's Table 1 by name."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from pyro_vae_defence.attacks.objectives.classifiers import Classifier, cross_entropy
from pyro_vae_defence.attacks.objectives.outputs import maximum_damage, targeted_output
from pyro_vae_defence.attacks.objectives.posteriors import (
    forward_kl,
    squared_wasserstein,
    symmetric_kl,
)
from pyro_vae_defence.types import VAE, PreparedObjective


class Table1Row(NamedTuple):
    """A row of Table 1.

    Attributes:
        name: the attack's name in the paper.
        attacks: what is compared, ``"posterior"``, ``"output"`` or ``"class"``.
        similarity: the measure, as the table writes it.
        norm: the ball of the works cited there, ``"L2"`` or ``"Linf"``.
        supervised: whether those works attack towards a target.
    """

    name: str
    attacks: str
    similarity: str
    norm: str
    supervised: bool


TABLE_1: dict[str, Table1Row] = {
    "latent_space": Table1Row("Latent Space Attack", "posterior", "KL[A||B]", "L2", True),
    "unsupervised_encoder": Table1Row(
        "Unsupervised Encoder Attack", "posterior", "SKL[A||B]", "L2", False
    ),
    "targeted_output": Table1Row("Targeted Output Attack", "output", "||A-B||^2", "L2", True),
    "maximum_damage": Table1Row("Maximum Damage Attack", "output", "||A-B||^2", "L2", False),
    "projected_gradient_descent": Table1Row(
        "Projected Gradient Descent Attack", "posterior", "W2[A,B]^2", "Linf", False
    ),
    "adversarial_accuracy": Table1Row(
        "Adversarial Accuracy", "class", "cross-entropy", "Linf", False
    ),
}
"""Rows of Table 1 by the name that :func:`table_1` takes. The norm is a record: any ball goes with
any row."""

_POSTERIOR = {
    "latent_space": forward_kl,
    "unsupervised_encoder": symmetric_kl,
    "projected_gradient_descent": squared_wasserstein,
}


def table_1(
    row: str,
    vae: VAE,
    x_target: Tensor | None = None,
    *,
    supervised: bool | None = None,
    classifier: Classifier | None = None,
    labels: Tensor | None = None,
    targets: Tensor | None = None,
    **settings: Any,
) -> PreparedObjective:
    """The objective of one row of the paper's Table 1, for any ball and any optimiser.

    Args:
        row: a name of :data:`TABLE_1`.
        vae: any Pyro VAE.
        x_target: target images ``(N, C, H, W)`` or a single one, for supervised attacks but that on
            a class.
        supervised: towards a target (eq. 4) or away from the reference (eq. 3); the row's own type
            when ``None``.
        classifier: latents to scores, for ``"adversarial_accuracy"`` alone.
        labels: int64 ``(N,)``, for ``"adversarial_accuracy"``; predicted at the references when
            ``None``.
        targets: int64 target classes, for a supervised ``"adversarial_accuracy"``.
        **settings: further arguments of the row's factory, such as ``sites`` or ``num_draws``.

    Raises:
        ValueError: for an unknown row, and where a target is missing or not wanted.
    """
    if row not in TABLE_1:
        raise ValueError(f"row must be one of {', '.join(TABLE_1)}, got {row!r}")
    supervised = TABLE_1[row].supervised if supervised is None else supervised
    on_class = TABLE_1[row].attacks == "class"
    wanted, given = ("targets", targets) if on_class else ("x_target", x_target)
    if supervised and given is None:
        raise ValueError(f"row {row!r} is supervised: give {wanted}, or supervised=False")
    if not supervised and given is not None:
        raise ValueError(f"row {row!r} is unsupervised: leave out {wanted}, or supervised=True")
    if on_class:
        if classifier is None:
            raise ValueError(f"row {row!r} attacks a class: give classifier")
        # Table 1 classifies a draw from the guide.
        settings = {"latents": "sample", **settings}
        return cross_entropy(vae, classifier, labels, targets=targets, **settings)
    if TABLE_1[row].attacks == "posterior":
        return _POSTERIOR[row](vae, x_target, **settings)
    if x_target is None:
        return maximum_damage(vae, **settings)
    return targeted_output(vae, x_target, **settings)
