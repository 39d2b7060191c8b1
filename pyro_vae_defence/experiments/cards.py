"""The page of trained models: what their cards say."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pyro_vae_defence.experiments.tables import NOT_MEASURED, interval, table
from pyro_vae_defence.experiments.train import MODELS
from pyro_vae_defence.models.pretrained import WeightCard, available, load_card
from pyro_vae_defence.ops.files import naming

_OBJECTIVES = {
    "beta": "β = {beta:g}",
    "beta_tcvae": "β = {beta:g} on the total correlation",
    "se": "SE, radius {radius:g}, γ = {gamma:g}",
    "avae": "AVAE, ρ = {rho:g}",
    "se_avae": "SE-AVAE, radius {radius:g}, γ = {gamma:g}, ρ = {rho:g}",
    "avae_ss": "AVAE-SS, ρ = {rho:g}",
    "nvae": "NVAE's",
    "margin": "mass margin, radius {radius:g}, weight {weight:g}",
}
_INPUTS = {"mean": "guide's mean", "guide": "guide's draws", "posterior": "posterior draws"}


def trained_models(directory: str | os.PathLike[str] | None = None) -> str:
    """What the cards of trained VAEs and of classifiers say, in Markdown; what a card does not say
    is left out.

    Args:
        directory: of weights and cards; the packaged ones when ``None``.

    Raises:
        ValueError: for a directory without cards, or a damaged one.
    """
    names = available(directory)
    if not names:
        raise ValueError(f"no trained models in {directory}; run train first")
    cards = [load_card(name, directory) for name in names]
    rank = {name: index for index, name in enumerate(MODELS)}
    classifiers = [card for card in cards if card.architecture.endswith("Classifier")]
    vaes = sorted(
        (card for card in cards if card not in classifiers),
        key=lambda card: rank.get(card.name, len(rank)),
    )
    of_vaes = "model|objective|starts from|epochs|minutes|validation -ELBO|NLL|MSE|active units"
    of_classifiers = "classifier|reads|predicts|epochs|minutes|test accuracy"
    return "\n".join(
        [
            *table(of_vaes.split("|"), [_row(_vae, card) for card in vaes]),
            "Validation -ELBO in nats at β = 1, whatever was trained; *NLL*, in nats, and *MSE*, "
            "on the scale 0..255, of test images, with the metric's settings in the card.",
            "",
            *table(of_classifiers.split("|"), [_row(_classifier, card) for card in classifiers]),
        ]
    )


def _row(make: Callable[[WeightCard], list[Any]], card: WeightCard) -> list[Any]:
    with naming(f"card of {card.name!r} cannot be printed", "mend or remove it"):
        return make(card)


def _vae(card: WeightCard) -> list[str]:
    training, test = card.training, card.metrics.get("test", {})
    # The metrics' names carry their settings: "nll[iwae 1000]".
    measures = {name.partition("[")[0]: entry for name, entry in reversed(test.items())}
    units = test.get("active_units", {}).values()
    objective, start = training.get("objective", ""), training.get("start_from")
    nelbo = card.metrics.get("validation_nelbo")
    return [
        f"`{card.name}`",
        _OBJECTIVES.get(objective, "").format(**training),
        "" if start is None else f"`{start}`",
        *_effort(card),
        "" if nelbo is None else f"{nelbo:.2f}",
        interval(measures.get("nll"), 2) or NOT_MEASURED,
        interval(measures.get("mse"), 1) or NOT_MEASURED,
        f"{sum(u['active'] for u in units)} of {sum(u['all'] for u in units)}" if units else "",
    ]


def _classifier(card: WeightCard) -> list[str]:
    training, model = card.training, card.training.get("model")
    # Cards of before there was a choice do not name it.
    reads = _INPUTS[training.get("inputs", "mean")]
    if training.get("hidden_dim"):
        reads = f"{reads}, two hidden layers,"
    return [
        f"`{card.name}`",
        "images" if model is None else f"{reads} of `{model}`",
        ("class", "colour")[training.get("column", 0)],
        *_effort(card),
        interval(card.metrics.get("test_accuracy")) or NOT_MEASURED,
    ]


def _effort(card: WeightCard) -> list[Any]:
    """Epochs and minutes of the training."""
    training, seconds = card.training, card.provenance.get("seconds")
    images = training.get("images_per_epoch") or training.get("num_images")
    epochs = f"{training.get('epochs', '')}" + (f" of {images:,} images" if images else "")
    return [epochs, "" if seconds is None else f"{seconds / 60:.1f}"]
