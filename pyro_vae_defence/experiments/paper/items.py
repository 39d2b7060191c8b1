"""Every table and figure of the paper, in its order, and the commands that make it here.

``paper`` lists them; ``paper ITEM`` runs the commands of one, each of which goes on from the result
files that are there, and prints what :mod:`~pyro_vae_defence.experiments.paper.sections` makes of
them. ``--quick`` runs the first of the commands' names in tiny sizes, on images that come with the
library. An item of which something is missing says what.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_vae_defence.experiments.paper.claims import claims_table
from pyro_vae_defence.experiments.paper.printed import TABLE_2, TABLE_3, TABLE_4, TABLE_7
from pyro_vae_defence.experiments.paper.sections import SECTIONS
from pyro_vae_defence.experiments.published import Published
from pyro_vae_defence.experiments.study import load
from pyro_vae_defence.models.pretrained import (
    PACKAGED_MODELS,
    available,
    find,
    load_card,
    save_card,
)
from pyro_vae_defence.ops.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Item:
    """A table or figure.

    Args:
        title: what it shows.
        study: command and directory of its result files.
        names: names of the study.
        missing: what of it nothing here makes yet.
        directory: where its result files are, if not in that of the study.
        where: page or module that says it in words, where nothing is measured.
        why: what our numbers say about it, in a sentence or two.
        weights: models that names of it need, where these do not come with the library.
        minutes: what its results have taken on one thread, where that was measured.
        beside: item whose results it shows as well.
    """

    title: str
    study: str = ""
    names: tuple[str, ...] = ()
    missing: str = ""
    where: str = ""
    directory: str = ""
    why: str = ""
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    minutes: int = 0
    beside: str = ""

    @property
    def place(self) -> str:
        """Its directory among those of all studies."""
        return self.directory or self.study

    def command(self, output: str, options: Sequence[str] = (), quick: bool = False) -> list[str]:
        """Words of the command that makes its results below the directory ``output``."""
        names = self.makeable()
        if not names:
            return []
        if quick:
            names = names[:1]
            sets = [f"{key}={value!r}" for key, value in QUICK.get(self.place, {}).items()]
            options = [*options, "--quiet", *(word for each in sets for word in ("--set", each))]
        return [self.study, *names, "--output", str(Path(output) / self.place), *options]

    def makeable(self) -> tuple[str, ...]:
        """Its names whose weights are there."""
        there = available() if self.weights else ()
        return tuple(
            name for name in self.names if name not in self.weights or self.weights[name] in there
        )

    def there(self, results: Path) -> tuple[int, int]:
        """How many of its result files there are in the directory of all studies, and how many more
        that lack cells; of those, only files of ``published`` tell."""
        paths = [results / self.place / f"{name}.json" for name in self.names]
        there = [path for path in paths if path.is_file()]
        if self.study != Published.command:
            return len(there), 0
        complete = sum(Published.complete(load(path)) for path in there)
        return complete, len(there) - complete

    def cost(self) -> str:
        """Decoder gradients of its results, all rows together, or minutes of one thread."""
        if self.study != Published.command:
            return f"{self.minutes} minutes of one thread" if self.minutes else ""
        total = sum(Published.num_gradients(Published.names[name]) for name in self.names)
        return f"{total / 1e6:,.0f} million gradients" if total else "no chains"


_CHAIN = {"chain.num_samples": 2, "chain.warmup_steps": 1, "chain.num_steps": 1}
_FEW = {"num_references": 10, "num_restarts": 2}
QUICK: dict[str, dict[str, Any]] = {
    "published": {**_FEW, "attack_steps": 2, "num_transitions": 2, "transitions": (0,)},
    "defend": {**_CHAIN, **_FEW, "defences": ("none", "hmc")},
    "nvae": {
        **_CHAIN, "num_references": 4, "num_restarts": 1, "groups": (1,), "attack_steps": 2,
        "dataset": "mnist_subset", "metric_images": 6, "num_examples": 4,
    },
    "figures": {
        **_CHAIN, "radii": (0.1, 1.0), "objective_radii": (0.1,), "attack_chains": 2,
        "attack_steps": 2, "num_images": 3, "num_examples": 1,
    },
    "compare": {
        **_CHAIN, **_FEW, "radii": (0.0, 0.1, 0.2), "num_images": 20, "num_noise": 10,
        "curve_images": 10, "costs": (), "defences": ("none", "mode", "hmc", "aware_mode", "aware"),
    },
    "evaluate": {"num_images": 10, "num_samples": 3},
    "theory": {
        "num_images": 2, "radii": (0.1,), "theorem_radii": (0.1,), "num_chains": 100,
        "half_width": 3.0, "spacing": 0.05, "transitions": (1,),  # as guides are narrow
    },
    "ratios": {**_CHAIN, **_FEW},
    "two_latents": {
        "num_images": 3, "num_attacks": 2, "spacing": 0.5, "num_drawn": 1,
        "chain.num_samples": 4, "chain.num_steps": 1,
    },
    "benchmark": {
        "models": ("mnist_vae",), "num_images": 2, "lengths": (1, 2), "repeats": 1,
    },
}  # fmt: skip
"""Tiny settings of ``--quick``, by the directory of results."""

_DATASETS = ("mnist", "fashion_mnist", "color_mnist")
_FIGURES = ("mnist", "fashion_mnist")
_THEORY = ("mnist_vae_2d", "linear_gaussian")
_FLAT = {"mnist_vae_2d": "mnist_vae_2d"}
_ATTACKED = ("mnist_radius_0.1", "mnist_radius_0.2")
_NVAE = ("mnist_nvae_radius_0.1", "mnist_nvae_radius_0.2")
_PLAIN = tuple(f"{dataset}_vae" for dataset in _DATASETS)
_TRANSITIONS = tuple(f"{dataset}_transitions" for dataset in _DATASETS)
_RADII = tuple(f"{dataset}_radii" for dataset in _DATASETS)

_APGD = "[Models trained otherwise](#models-trained-otherwise-and-defended)"
_KNOWS = (
    "Contradicted: an attacker who follows the gradient of the chain's own distribution brings "
    "defended reconstructions of MNIST to 0.83 at radius 0.1 and 0.65 at 0.2, where the images "
    "still agree to 0.96 and 0.87 ([pictures](figures.md)). The published attacker had no gradient "
    "through an accepted move."
)

ITEMS: dict[str, Item] = {
    "figure_1": Item(
        "An attack in two latent dimensions, and the chain back", "two_latents",
        _ATTACKED, weights=dict.fromkeys(_ATTACKED, "mnist_vae_2d"),
    ),
    "table_1": Item("Types of attacks", where="docs/api/attacks.md"),
    "lemma_1": Item("Total variation of two posteriors", "theory", _THEORY, weights=_FLAT),
    "theorem_1": Item("What a chain makes of it", "theory", _THEORY, weights=_FLAT),
    "figure_2": Item("Log posterior ratios before and after HMC", "ratios", _FIGURES),
    "figure_3": Item(
        "Examples", "published", _PLAIN, beside="figure_4",
        why="The first references of the studies, not chosen ones, at radius 0.1. NVAE's rows are "
        "of Figure 4's result: an attack on all of its groups, and this library's HMC on the noise "
        "of the latents.",
    ),
    "table_2": Item(
        "Attacks on MNIST and Fashion-MNIST", "published", tuple(TABLE_2),
        why="Weights of 40 epochs in place of 300 and other references; the same attack, chain and "
        f"counting. Attacks with a better optimiser leave less: {_APGD}.",
    ),
    "table_3": Item(
        "Attacks on ColorMNIST", "published", tuple(TABLE_3),
        why="As for Table 2. Undefended reconstructions of our weights under the published attack "
        "are far more alike than the printed 0.36 and 0.19 (Figure 13: 0.91 at radius 0.1); APGD "
        f"brings them to 0.72 and 0.43: {_APGD}.",
    ),
    "figure_4": Item(
        "NVAE: MNIST", "defend", _NVAE, directory="nvae", minutes=12,
        missing="CelebA: its images and checkpoint",
        why="A smaller NVAE of our own training. HMC on the paper's target gains at most 0.05 of "
        "similarity, on the perturbation-aware one most of what the attack takes "
        "([Hierarchical VAEs](nvae.md)).",
    ),
    "figure_5": Item(
        "An attacker who knows the defence", "figures", _FIGURES, why=_KNOWS, minutes=10
    ),
    "figure_6": Item(
        "Robustness against inference time", "published", _TRANSITIONS,
        why="Seconds are of another machine than the paper's, and of many images at once: the "
        "shape is what compares.",
    ),
    "figure_7": Item("Log posterior ratios, and their test", "ratios", _FIGURES),
    "table_4": Item(
        "beta-VAE and beta-TCVAE behind HMC", "published", tuple(TABLE_4),
        why="As for Tables 2 and 3; weights of beta = 2, whose MSE the paper's have.",
    ),
    "figure_8": Item(
        "Similarities of Table 4", "published", tuple(TABLE_4), why="Table 4 as a picture."
    ),
    "figure_9": Item(
        "Accuracies of Table 4", "published", tuple(TABLE_4), why="Table 4 as a picture."
    ),
    "figure_10": Item(
        "An attacker who does not use MCMC", "figures", _FIGURES, minutes=10,
        why="Behind HMC reconstructions are a little more similar at 11 of 12 radii and data sets, "
        "but intervals over 20 images overlap at all of them. From radius 0.1 to 1, undefended to "
        "defended: MNIST 0.80 to 0.85, 0.67 to 0.67, 0.38 to 0.51, 0.19 to 0.34, 0.09 to 0.19, "
        "0.04 to 0.10; Fashion-MNIST 0.66 to 0.74, 0.51 to 0.62, 0.36 to 0.41, 0.21 to 0.28, "
        "0.11 to 0.20, 0.09 to 0.10. The attack has an optimiser that the paper's lacks "
        "([pictures](figures.md)).",
    ),
    "figure_11": Item("An attacker who uses MCMC", "figures", _FIGURES, why=_KNOWS, minutes=10),
    "figure_12": Item(
        "Examples of both", "figures", _FIGURES, minutes=10,
        why="The first references, not chosen ones ([pictures](figures.md)).",
    ),
    "figure_13": Item(
        "Similarities over radii", "published", _RADII,
        missing="CelebA: its images and checkpoint",
        why="Images stay alike and reconstructions do not, as the paper finds on MNIST; on "
        "ColorMNIST it is the other way round at radii 0.05 and 0.1, and from 0.2 on the two are "
        "not told apart, for the published optimiser.",
    ),
    "figure_14": Item(
        "Attacked images over radii", "published", _RADII,
        missing="CelebA: its images and checkpoint",
        why="By the text of C.4; the paper prints its caption under Figure 15.",
    ),
    "figure_15": Item(
        "Robustness over transitions", "published", _TRANSITIONS,
        why="By the text of C.5, which says that nothing is gained after 100 transitions; the "
        "paper prints the caption of Figure 14 under it.",
    ),
    "figure_16": Item(
        "Objectives of an attack", "figures", _FIGURES, minutes=10,
        why="As in the paper no objective is the strongest by every measure "
        "([pictures](figures.md)).",
    ),
    "appendix_b_3": Item(
        "Mode against chain", "compare", _DATASETS, minutes=137,
        why="Not confirmed: the mode's reconstructions are a little more similar than the chain's "
        "(short, whitened HMC) in every row, on either target, mostly within the intervals, at a "
        "quarter of the gradients. What randomness is worth where attackers know the defence "
        "is another matter ([Adaptive attacks](adaptive_attacks.md)).",
    ),
    "table_5": Item(
        "Seconds per image", "benchmark", ("seconds",),
        missing="CelebA: its checkpoint",
        why="Seconds are proportional to transitions, as printed; the recommended chain, whole and "
        "on the same target, takes about a hundredth of the published one of T = 500 on one "
        "thread ([Benchmark](benchmark.md) says where both arrive).",
    ),
    "table_6": Item(
        "Architecture", where="pyro_vae_defence.models.ConvVAE",
        why="The same layers; the printed 31 channels of the last one are a misprint for 32.",
    ),
    "table_7": Item(
        "Likelihood and reconstruction", "evaluate", tuple(TABLE_7), minutes=57,
        why="Ours have seen fewer epochs, and beta-VAE and beta-TCVAE three after those of the "
        "plain model; all are on 1,000 test images, with k = 1,000 importance samples as printed.",
    ),
    "table_8": Item(
        "Hyperparameters", where="pyro_vae_defence.defence.mcmc.PAPER_SETTINGS",
        why="The presets are the printed ones; the code ran T // 2 + T transitions.",
    ),
}  # fmt: skip
"""Items in the order of the paper."""


def listing(results: Path) -> str:
    """All items: what they show, what makes them, how many of their result files there are, whole
    and in part, what these cost.

    Args:
        results: directory of all studies, such as ``docs/results``.
    """
    lines = []
    for name, item in ITEMS.items():
        if item.names:
            complete, part = item.there(results)
            made = f"{item.study}, {complete} of {len(item.names)} results"
            made += f" and {part} in part" if part else ""
        else:
            made = f"see {item.where}" if item.where else ""
        missing = f"missing: {item.missing}" if item.missing else ""
        said = "; ".join(filter(None, [made, item.cost(), missing]))
        lines.append(f"{name:<14}{item.title:<56}{said}")
    return "\n".join(lines)


def makeable() -> list[str]:
    """Items of which something is made here, with the weights that are there."""
    return [name for name, item in ITEMS.items() if item.makeable() or name in SECTIONS]


def make(
    names: Sequence[str],
    output: str,
    run: Callable[[Sequence[str]], int],
    options: Sequence[str] = (),
    quick: bool = False,
) -> int:
    """Run the commands of some items, each once, and print what is made of their results; the first
    exit code that is not 0.

    Args:
        names: of items.
        output: directory below which results are written and looked for.
        run: runs the words of a command.
        options: further words of all commands, such as ``["--device", "cuda"]``.
        quick: the first name of each command alone, in tiny sizes.

    Raises:
        ValueError: before anything is run, if an item is unknown or nothing makes it.
    """
    for name in names:
        if name not in ITEMS:
            raise ValueError(f"the paper has no item {name!r}; choose one of {', '.join(ITEMS)}")
        item = ITEMS[name]
        if not (item.names or name in SECTIONS):
            why = f"see {item.where}" if item.where else f"missing: {item.missing}"
            raise ValueError(f"nothing makes {name} here ({why}); leave it out")
        waiting = [each for each in item.names if each not in item.makeable()]
        if waiting:
            models = ", ".join(sorted({item.weights[each] for each in waiting}))
            if waiting == [*item.names]:
                raise ValueError(
                    f"{name} needs the weights of {models}; train them, or leave it out"
                )
            print(
                f"{name}: without {', '.join(waiting)}, for the weights of {models} are not there"
            )
    if quick:
        more = {
            item.weights[each]
            for item in map(ITEMS.__getitem__, names)
            for each in item.makeable()
            if each in item.weights
        }
        options = ["--models", str(models_of_subsets(Path(output) / "models", more)), *options]
    ran: list[list[str]] = []
    for name in names:
        for each in filter(None, (name, ITEMS[name].beside)):
            words = ITEMS[each].command(output, options, quick)
            if words and words not in ran:
                ran.append(words)
                if code := run(words):
                    return code
        if name in SECTIONS:
            lines = SECTIONS[name](Path(output), Path(output) / "images")
            print("\n".join([f"## {_heading(name)}", "", *lines]))
    return 0


def models_of_subsets(directory: Path, more: Iterable[str] = ()) -> Path:
    """Copies of the packaged models, and of others by name, whose cards name the packaged images as
    what they were trained on, so that studies find these; the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in {*available(PACKAGED_MODELS), *more}:
        card = load_card(name)
        shutil.copyfile(find(name) / f"{name}.safetensors", directory / f"{name}.safetensors")
        training = {**card.training, "dataset": f"{card.dataset}_subset"}
        save_card(dataclasses.replace(card, training=training), directory)
    return directory


# --- The page -------------------------------------------------------------------------------------


def _heading(name: str) -> str:
    words = name.split("_")
    number = ".".join(word.upper() for word in words[1:])
    return f"{words[0].capitalize()} {number}: {ITEMS[name].title}"


def page(results: Path, images: Path) -> str:
    """All items of which something is said or made, in Markdown; pictures go to ``images``."""
    lines = ["<!-- Written by `python -m pyro_vae_defence.experiments paper --page`. -->", ""]
    lines += ["### What it claims in words", ""]
    lines += ["Intervals of 95% over images; where they overlap, numbers count as not told apart."]
    lines += ["", *claims_table(results)]
    for name, item in ITEMS.items():
        if not (item.why or name in SECTIONS):
            continue
        lines += [f"### {_heading(name)}", "", item.why, ""]
        if name in SECTIONS:
            lines += SECTIONS[name](results, images)
    return "\n".join(lines)


def write_page(results: Path, images: Path) -> Path:
    """Write the page ``paper.md`` into the directory of all studies; its path."""
    path = results / "paper.md"
    text = page(results, images).replace(f"]({images}/", f"]({os.path.relpath(images, results)}/")
    write_atomically(path, text.encode())
    return path
