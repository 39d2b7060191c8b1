"""The tables of the README: what attackers who do not know defences, and those who do, leave of
each, from the result files of other studies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_vae_defence.defence.mcmc import RECOMMENDED_KERNEL, RECOMMENDED_LENGTHS
from pyro_vae_defence.experiments import study, tables
from pyro_vae_defence.experiments.classify import classifiers_of
from pyro_vae_defence.experiments.defences import chain_words, chained, label
from pyro_vae_defence.experiments.leaderboard import Entry, by_defence
from pyro_vae_defence.experiments.robustness import reports
from pyro_vae_defence.experiments.study import shown
from pyro_vae_defence.experiments.summary import MARKED, readers, worst_case

RADIUS = "0.2"
BLACK, TEXTURED = "mnist", "color_mnist_textured"
TITLES = {
    BLACK: "MNIST, black background",
    "fashion_mnist": "Fashion-MNIST",
    TEXTURED: "ColorMNIST, textured background",
}
DEFENCES = ("none", "dark_clip", "median", "gaussian", "mode", "hmc", "aware_mode", "aware")
READING = "reencoded/mean"


def front_table(results: Path) -> str:
    """Similarity and accuracy under attack, by what the attacker knows, in Markdown.

    Args:
        results: directory whose subdirectories ``compare`` and ``robustness_protocol`` hold result
            files.

    Raises:
        ValueError: for a damaged result file, or two results of one defence.
    """
    return "\n".join([*_unaware(results), "", *_aware(results)])


def _unaware(results: Path) -> Iterator[str]:
    found = {name: shown(results / f"compare/{name}.json") for name in (BLACK, TEXTURED)}
    yield f"Under attacks of L_inf radius {RADIUS} = δ whose attacker does not know the defence:"
    yield ""
    rows = [["without an attack", *map(_clean, found.values())]]
    for name in DEFENCES:
        rows.append([_title(name), *(_under_attack(result, name) for result in found.values())])
    yield from tables.table(["", *(TITLES[name] for name in found)], rows)
    attacks, references, images = (
        " or ".join(f"{n:,}" for n in sorted({result["config"][of] for result in found.values()}))
        for of in ("num_restarts", "num_references", "num_images")
    )
    linear = ", ".join(
        f"`{classifiers_of(each['config']['model'])['class']}`" for each in found.values()
    )
    widths = " and ".join(f"{_widths(result)} ({TITLES[name]})" for name, result in found.items())
    yield (
        f"Similarity (`ms_ssim[paper]`) of reconstructions, {attacks} attacks on each of "
        f"{references} images / share of classes read right of {images} images, by the linear "
        f"classifiers {linear}; 1 is best. Without an attack: two undefended reconstructions, and "
        f"the class at the encoding of the image. 95% intervals are {widths} wide. A "
        "*mode* descends the same energy and runs no chain. "
        f"{_chains((name, result['config']) for name, result in found.items())}"
    )


def _aware(results: Path) -> Iterator[str]:
    every = list(study.read(results / "robustness_protocol", "robustness").values())
    suites = {name: list(_at_radius(every, name)) for name in TITLES}
    found = {name: by_defence(entries) for name, entries in suites.items() if entries}
    entries = [entry for each in found.values() for entry in each.values()]
    images, restarts = (
        " or ".join(map(str, sorted(numbers)))
        for numbers in (
            {entry.num_images for entry in entries},
            {entry.config["budget"]["num_restarts"] for entry in entries},
        )
    )
    yield (
        "Share of classes read right under attackers who know the defence, the worst of a suite of "
        f"attacks for each of {images} images:"
    )
    yield ""
    plain = [next(iter(each.values())).report["undefended_clean"] for each in found.values()]
    rows = [["without an attack", *(tables.interval(each, 2) for each in plain)]]
    for name in DEFENCES:
        if any(name in each for each in found.values()):
            rows.append([_title(name), *(worst_case(each.get(name)) for each in found.values())])
    yield from tables.table(["", *(TITLES[name] for name in found)], rows)
    with_chains = (entry for entry in entries if chained(entry.defence))
    notes = [
        f"The same radius, {restarts} restart(s), 95% intervals; the images are another choice "
        f"than above.{readers([entry.result for entry in entries])} A stronger attack may lower "
        "all of it.",
        *([MARKED] if any(entry.report["unreliable"] for entry in entries) else []),
        _chains((e.config["model"].removesuffix("_vae"), e.config) for e in with_chains),
        f"`MCMCDefence.recommended` runs {chain_words(RECOMMENDED_KERNEL | RECOMMENDED_LENGTHS)}.",
    ]
    yield " ".join(notes)


def _chains(configs: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    of: dict[str, dict[str, None]] = {}
    for name, config in configs:
        of.setdefault(chain_words(config["chain"]), {})[TITLES[name]] = None
    said = "; ".join(f"{words} ({' and '.join(names)})" for words, names in of.items())
    return f"Chains: {said}."


def _at_radius(suites: Sequence[dict[str, Any]], dataset: str) -> Iterator[Entry]:
    """Defences whose classes are read as others' are, in reports of fresh noise."""
    for suite in suites:
        config = suite["config"]
        if config["model"] != f"{dataset}_vae" or config["radius"] != float(RADIUS):
            continue
        for key, report in reports(suite).items():
            target, name = key.split("/")
            entry = Entry(suite, name, report)
            if target == "classification" and not entry.unlike:
                yield entry


def _title(name: str) -> str:
    return label(name) + (" (recommended target)" if name == "aware" else "")


def _clean(result: Mapping[str, Any]) -> str:
    floor = tables.at(result, "noise_floor/full/estimate")
    return f"{floor:.2f} / {tables.at(result, 'clean/class/estimate'):.2f}"


def _figures(result: Mapping[str, Any], name: str) -> list[dict[str, float]]:
    entry = result["radii"][RADIUS][name]
    accuracy = entry["accuracy"]["class"]
    reading = accuracy.get(READING) or next(iter(accuracy.values()))
    return [entry["ms_ssim"], reading["attacked"]["correct"]]


def _under_attack(result: Mapping[str, Any], name: str) -> str:
    return " / ".join(f"{figure['estimate']:.2f}" for figure in _figures(result, name))


def _widths(result: Mapping[str, Any]) -> str:
    """The narrowest and the widest interval of the defences."""
    figures = [figure for name in DEFENCES for figure in _figures(result, name)]
    widths = [figure["high"] - figure["low"] for figure in figures]
    return f"{min(widths):.2f} to {max(widths):.2f}"
