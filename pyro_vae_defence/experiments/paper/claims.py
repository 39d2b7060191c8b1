"""What the paper claims in words, and what result files say of it.

A claim is about pairs of numbers: that the second is above the first, or not below it. Two numbers
are told apart where their 95% intervals do not overlap, which is a cautious rule for numbers of the
same images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pyro_vae_defence.experiments import tables
from pyro_vae_defence.experiments.published import ENCODER
from pyro_vae_defence.experiments.study import shown
from pyro_vae_defence.experiments.train import DATASETS

Entry = dict[str, float]


_RADII = ("0.1", "0.2")
"""Of the attacks of the paper's tables."""


class Pair(NamedTuple):
    """What is compared, and both numbers as result files hold them."""

    title: str
    first: Entry
    second: Entry


class Claim(NamedTuple):
    """A claim of the paper.

    Attributes:
        text: in words.
        where: section of the paper.
        numbers: what the numbers of a pair are.
        pairs: from the directory of all results.
        kind: whether the second number is said to be above the first, or not below it.
        lower_is_better: whether *above* means a smaller number.
        unlike: where both numbers are not read alike, so that no verdict rests on them: what does.
    """

    text: str
    where: str
    numbers: str
    pairs: Callable[[Path], Iterator[Pair]]
    kind: Literal["above", "not below"]
    lower_is_better: bool = False
    unlike: str = ""


def order(pair: Pair) -> int:
    """1 if the second number is clearly above the first, -1 if below, 0 if intervals overlap."""
    return (pair.second["low"] > pair.first["high"]) - (pair.second["high"] < pair.first["low"])


def verdict(claim: Claim, pairs: list[Pair]) -> str:
    """Whether pairs confirm a claim."""
    sign = -1 if claim.lower_is_better else 1
    found = [sign * order(pair) for pair in pairs]
    if not found:
        return "not measured yet"
    if claim.unlike:
        return f"not read alike: {claim.unlike}"
    if claim.kind == "not below":
        return "**contradicted**" if -1 in found else "not contradicted"
    above, below, number = found.count(1), found.count(-1), len(found)
    if below == 0 and above > 0:
        return "confirmed" if above == number else f"confirmed in {above} of {number}"
    if above == 0 and 2 * below > number:
        return "**contradicted**"
    return f"**not confirmed**: above in {above}, below in {below} of {number}"


def claims_table(results: Path) -> list[str]:
    """Every claim with the numbers of its pairs, in Markdown."""
    rows = []
    for claim in CLAIMS:
        pairs = list(claim.pairs(results))
        numbers = "; ".join(
            f"{title} {_number(first)} → {_number(second)}" for title, first, second in pairs
        )
        said = f"{claim.numbers}: {numbers}" if pairs else ""
        rows.append([f"{claim.text} ({claim.where})", said, verdict(claim, pairs)])
    return tables.table(["the paper says", "measured", ""], rows)


def _number(entry: Entry) -> str:
    return tables.interval(entry, 0 if entry["estimate"] > 10 else 2)


# --- Pairs ----------------------------------------------------------------------------------------


def result(results: Path, study: str, name: str) -> dict[str, Any] | None:
    """A result file below the directory of all studies, ``None`` if there is none."""
    path = results / study / f"{name}.json"
    return shown(path) if path.is_file() else None


def _pairs(
    what: str, before: str, after: str, radii: tuple[str, ...]
) -> Callable[[Path], Iterator[Pair]]:
    """Two places among the cells of one set of images, without and behind the published chain, of
    plain models."""

    def pairs(results: Path) -> Iterator[Pair]:
        for dataset, title in DATASETS.items():
            found = result(results, "published", f"{dataset}_vae")
            for radius in radii:
                cells = tables.at(found, f"radii/{radius}/{what}")
                both = [tables.at(cells, place) for place in (before, after)]
                if all(both):
                    at = "" if radius == "0" else f", {radius}"
                    yield Pair(f"{title}{at}", *both)

    return pairs


def _defended(what: str, place: str, radii: tuple[str, ...]) -> Callable[[Path], Iterator[Pair]]:
    """Without a defence and behind the published chain."""
    return _pairs(what, f"none/{place}", f"hmc/{place}", radii)


def _from_a_draw(what: str, place: str, radii: tuple[str, ...]) -> Callable[[Path], Iterator[Pair]]:
    """Where the published chain begins, a draw of the encoder, and where it ends."""
    return _pairs(what, f"hmc/transitions/0/{place}", f"hmc/{place}", radii)


def _longer(results: Path) -> Iterator[Pair]:
    """The published chain of T = 100, which is 150 transitions, and at its end, under attack."""
    for dataset, title in DATASETS.items():
        for name in (f"{dataset}_transitions", f"{dataset}_vae"):
            found = result(results, "published", name)
            read = tables.at(found, f"radii/0.1/{ENCODER}/hmc/transitions")
            if read and "150" in read:
                last = max(read, key=int)
                yield Pair(f"{title}, 150 → {last}", read["150"]["ms_ssim"], read[last]["ms_ssim"])
                break


def _known(results: Path) -> Iterator[Pair]:
    """Images and defended reconstructions, attacked by who knows the defence."""
    for dataset in ("mnist", "fashion_mnist"):
        found = result(results, "figures", dataset)
        for radius in _RADII:
            cell = tables.at(found, f"knowledge/{radius}/with_mcmc/ms_ssim")
            if cell:
                yield Pair(f"{DATASETS[dataset]}, {radius}", cell["images"], cell["defended"])


def _compared(first: str, second: str) -> Callable[[Path], Iterator[Pair]]:
    """Similarities behind two defences of ``compare``."""

    def pairs(results: Path) -> Iterator[Pair]:
        for dataset, title in DATASETS.items():
            found = result(results, "compare", dataset)
            for radius in _RADII:
                cells = tables.at(found, f"radii/{radius}") or {}
                both = [tables.at(cells, f"{name}/ms_ssim") for name in (first, second)]
                if all(both):
                    yield Pair(f"{title}, {radius}", *both)

    return pairs


CLAIMS = (
    Claim(
        "The chain makes reconstructions of attacked images more similar",
        "4.2, Tables 2 to 4",
        "MSSSIM, no defence → HMC",
        _defended(ENCODER, "ms_ssim", _RADII),
        "above",
    ),
    Claim(
        "It keeps more classes under attacks on the classifier",
        "4.2, Tables 2 to 4",
        "classes unchanged, encoder's mean without a defence → last draw of HMC",
        _defended("class", "accuracy/class/unchanged", _RADII),
        "above",
        unlike="see the next row",
    ),
    Claim(
        "The same, where both are read off one draw, as the paper reads the chain",
        "our question",
        "classes unchanged, draw of the encoder → last draw of HMC",
        _from_a_draw("class", "accuracy/class/unchanged", _RADII),
        "above",
    ),
    Claim(
        "Clean images are reconstructed no worse",
        "3, 4.2",
        "MSE, no defence → HMC",
        _defended(ENCODER, "mse", ("0",)),
        "not below",
        lower_is_better=True,
    ),
    Claim(
        "The performance on non-attacked inputs is not decreased",
        "abstract",
        "classes correct, encoder's mean without a defence → last draw of HMC",
        _defended(ENCODER, "accuracy/class/correct", ("0",)),
        "not below",
        unlike="see the next row",
    ),
    Claim(
        "The same, where both are read off one draw: what the chain itself changes",
        "our question",
        "classes correct, draw of the encoder → last draw of HMC",
        _from_a_draw(ENCODER, "accuracy/class/correct", ("0",)),
        "not below",
    ),
    Claim(
        "Nothing more is gained after T = 100, which is 150 transitions of its code",
        "C.5",
        "MSSSIM by transitions",
        _longer,
        "not below",
        lower_is_better=True,
    ),
    Claim(
        "Who knows the chain does not succeed: reconstructions stay as similar as images",
        "4.4, C.3",
        "MSSSIM under that attack, images → defended reconstructions",
        _known,
        "not below",
    ),
    Claim(
        "A chain may be better than the mode of the posterior",
        "B.3",
        "MSSSIM, mode → this library's short, whitened HMC of 121 gradients",
        _compared("mode", "hmc"),
        "above",
    ),
    Claim(
        "The chain is better than clipping dark pixels, a baseline that the paper did not have and "
        "that is told the attack's radius",
        "our question",
        "MSSSIM, clipping → this library's short, whitened HMC of 121 gradients",
        _compared("dark_clip", "hmc"),
        "above",
    ),
)
"""In the order of the argument, not of the paper."""
