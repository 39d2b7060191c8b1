"""Every table and figure of the paper, in its order, and the commands that make it here.

``paper`` lists them; ``paper ITEM`` runs the commands of one, each of which goes on from the result
files that are there. An item of which something is missing says what.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from pyro_vae_defence.experiments.paper.printed import TABLE_2, TABLE_3, TABLE_4, TABLE_7


@dataclasses.dataclass(frozen=True)
class Item:
    """A table or figure.

    Args:
        title: what it shows.
        study: command and directory of its result files.
        names: names of the study.
        table: number of the table that is printed of them.
        missing: what of it nothing here makes yet.
        directory: where its result files are, if not in that of the study.
        where: page or module that says it in words, where nothing is measured.
    """

    title: str
    study: str = ""
    names: tuple[str, ...] = ()
    table: int | None = None
    missing: str = ""
    where: str = ""
    directory: str = ""

    def commands(self, output: str) -> list[list[str]]:
        """Words of the commands that make it, below the directory ``output``."""
        if not self.names:
            return []
        results = str(Path(output) / (self.directory or self.study))
        found = [[self.study, *self.names, "--output", results]]
        if self.table is not None:
            found.append(["table", str(self.table), "--results", results])
        return found

    def there(self, results: Path) -> int:
        """How many of its result files there are in the directory of all studies."""
        place = results / (self.directory or self.study)
        return sum((place / f"{name}.json").is_file() for name in self.names)


_DATASETS = ("mnist", "fashion_mnist", "color_mnist")
_RADII = ("0.1", "0.2")
_FIGURES = ("mnist", "fashion_mnist")
_THEORY = ("mnist_vae_2d", "linear_gaussian")
_NVAE = ("mnist_nvae_radius_0.1", "mnist_nvae_radius_0.2")
_DEFEND = tuple(f"{dataset}_radius_{radius}" for dataset in _DATASETS for radius in _RADII)

ITEMS: dict[str, Item] = {
    "figure_1": Item(
        "An attack in two latent dimensions, and the chain back", "two_latents",
        ("mnist_radius_0.1", "mnist_radius_0.2"),
    ),
    "table_1": Item("Types of attacks", where="docs/api/attacks.md"),
    "lemma_1": Item("Total variation of two posteriors", "theory", _THEORY),
    "theorem_1": Item("What a chain makes of it", "theory", _THEORY),
    "figure_2": Item("Log posterior ratios before and after HMC", "ratios", _FIGURES),
    "figure_3": Item("Examples", "defend", _DEFEND, missing="the picture of the examples"),
    "table_2": Item("Attacks on MNIST and Fashion-MNIST", "attack", tuple(TABLE_2), table=2),
    "table_3": Item("Attacks on ColorMNIST", "attack", tuple(TABLE_3), table=3),
    "figure_4": Item(
        "NVAE: MNIST", "defend", _NVAE, directory="nvae",
        missing="CelebA: its images and checkpoint",
    ),
    "figure_5": Item("An attacker who knows the defence", "figures", _FIGURES),
    "figure_6": Item("Robustness against inference time", missing="the curve over transitions"),
    "figure_7": Item("Log posterior ratios, and their test", "ratios", _FIGURES),
    "table_4": Item("beta-VAE and beta-TCVAE behind HMC", "attack", tuple(TABLE_4), table=4),
    "figure_8": Item("Similarities of Table 4", "attack", tuple(TABLE_4), missing="the picture"),
    "figure_9": Item("Accuracies of Table 4", "attack", tuple(TABLE_4), missing="the picture"),
    "figure_10": Item("An attacker who does not use MCMC", "figures", _FIGURES),
    "figure_11": Item("An attacker who uses MCMC", "figures", _FIGURES),
    "figure_12": Item("Examples of both", "figures", _FIGURES),
    "figure_13": Item("Similarities over radii", missing="the curve over radii; compare has three"),
    "figure_14": Item("The same of reconstructions", missing="the curve over radii"),
    "figure_15": Item("Attacked images over radii", missing="the picture"),
    "figure_16": Item("Objectives of an attack", "figures", _FIGURES),
    "appendix_b_3": Item("Mode against chain", missing="the comparison in one table"),
    "table_5": Item("Seconds per image", missing="seconds against the number of transitions"),
    "table_6": Item("Architecture", where="pyro_vae_defence.models.ConvVAE"),
    "table_7": Item("Likelihood and reconstruction", "evaluate", tuple(TABLE_7), table=7),
    "table_8": Item("Hyperparameters", where="pyro_vae_defence.defence.mcmc.PAPER_SETTINGS"),
}  # fmt: skip
"""Items in the order of the paper."""


def listing(results: Path) -> str:
    """All items: what they show, what makes them, how many of their result files there are.

    Args:
        results: directory of all studies, such as ``docs/results``.
    """
    lines = []
    for name, item in ITEMS.items():
        if item.names:
            made = f"{item.study}, {item.there(results)} of {len(item.names)} results"
        else:
            made = f"see {item.where}" if item.where else ""
        missing = f"missing: {item.missing}" if item.missing else ""
        lines.append(f"{name:<14}{item.title:<56}{'; '.join(filter(None, [made, missing]))}")
    return "\n".join(lines)


def make(names: Sequence[str], output: str, run: Callable[[Sequence[str]], int]) -> int:
    """Run the commands of some items, one after the other; the first exit code that is not 0.

    Args:
        names: of items.
        output: directory below which results are written and looked for.
        run: runs the words of a command.

    Raises:
        ValueError: before anything is run, if an item is unknown or nothing makes it.
    """
    for name in names:
        if name not in ITEMS:
            raise ValueError(f"the paper has no item {name!r}; choose one of {', '.join(ITEMS)}")
        if not ITEMS[name].names:
            item = ITEMS[name]
            why = f"see {item.where}" if item.where else f"missing: {item.missing}"
            raise ValueError(f"nothing makes {name} here ({why}); leave it out")
    for name in names:
        for words in ITEMS[name].commands(output):
            if code := run(words):
                return code
    return 0
