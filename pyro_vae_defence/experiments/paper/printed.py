"""Numbers printed in the paper, to stand beside measured ones; nothing here is a result of this
library.

``printed.csv`` has them all, one per line and as they are printed: the item (``table_2``), the
model by this library's name, the defence (``none`` or ``hmc``), the measure, where it is taken (the
radius of an attack; in Table 5 the number of transitions), the number, and its standard error where
one is printed.

Source: Kuzina, Welling, Tomczak, "Alleviating Adversarial Attacks on Variational Autoencoders with
MCMC", NeurIPS 2022, https://arxiv.org/abs/2203.09940.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Printed(NamedTuple):
    """A number as it is printed; fields are the columns of the file, all text."""

    item: str
    model: str
    defence: str
    measure: str
    at: str
    value: str
    standard_error: str


@functools.cache
def printed() -> tuple[Printed, ...]:
    """All printed numbers, in the order of the paper."""
    with Path(__file__).with_name("printed.csv").open(newline="", encoding="utf-8") as file:
        return tuple(Printed(**row) for row in csv.DictReader(file))


def _nested(item: str, measures: Sequence[str] = ("ms_ssim", "class", "color")) -> Any:
    """Model -> defence -> measure -> radius -> number."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for each in printed():
        if each.item == item and each.measure in measures:
            of_model = found.setdefault(each.model, {}).setdefault(each.defence, {})
            of_model.setdefault(each.measure, {})[each.at] = float(each.value)
    return found


TABLE_4 = _nested("table_4")
"""Table 4 (appendix C.2), like Tables 2 and 3: models with and without HMC. A few of its numbers
differ from theirs."""


def _attacked(item: str) -> Any:
    """A table of attacks, with what Table 4 alone says of its models behind HMC."""
    found = _nested(item)
    for model, defences in found.items():
        if model in TABLE_4:
            defences.setdefault("hmc", TABLE_4[model]["hmc"])
    return found


def corrected(each: Printed) -> Printed:
    """Table 4's number in place of one that Table 3 has of another model, any other as it is.

    For ColorMNIST's beta-VAE Table 3 prints the MSSSIM of MNIST's, 0.75 and 0.50.
    """
    if each[:4] != ("table_3", "color_mnist_beta_vae_2", "none", "ms_ssim"):
        return each
    place = ("table_4", *each[1:5])
    return next(other for other in printed() if other[:5] == place)


def quoted(each: Printed) -> bool:
    """Whether a number is one that Table 3 quotes from its authors, of their own protocol."""
    return each.item == "table_3" and each.model.startswith(("color_mnist_se_", "color_mnist_avae"))


TABLE_2 = _attacked("table_2")
"""Table 2 (section 4.2): model, defence, measure (MSSSIM under attacks on the encoder, adversarial
accuracy under attacks on the classifier), radius. Its beta-VAE and beta-TCVAE have the MSE that
Table 7 gives for beta = 2; those with HMC stand in Table 4 (appendix C.2) alone."""

TABLE_3 = _attacked("table_3")
"""Table 3 (section 4.2), like Table 2; the figures of SE and AVAE are those it quotes from their
authors, of SE-AVAE that for radius 0.1. For beta-VAE it prints the MSSSIM of MNIST's, 0.75 and
0.50; these here are Table 4's."""
TABLE_3["color_mnist_beta_vae_2"]["none"] |= {
    "ms_ssim": TABLE_4["color_mnist_beta_vae_2"]["none"]["ms_ssim"]
}
del TABLE_3["color_mnist_se_avae_0.2"]

TABLE_7: dict[str, dict[str, float]] = {
    model: {measure: at[""] for measure, at in defences["none"].items()}
    for model, defences in _nested("table_7", ("nll", "mse", "fid")).items()
}
"""Table 7 (appendix D.1), test set: NLL in nats by importance sampling with k = 1000, MSE per pixel
on the scale 0..255, FID on ColorMNIST alone. Model names are this library's; one-sample
reconstructions, 300 epochs."""
