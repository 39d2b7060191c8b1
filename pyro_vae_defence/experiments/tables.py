"""The paper's tables beside this library's measurements, from result files alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pyro_vae_defence.experiments import results as result_files
from pyro_vae_defence.experiments.defences import label
from pyro_vae_defence.experiments.defend import VARIANT
from pyro_vae_defence.experiments.evaluate import MSE, nll_name
from pyro_vae_defence.experiments.markdown import interval, row, source
from pyro_vae_defence.experiments.paper import TABLE_2, TABLE_3, TABLE_7
from pyro_vae_defence.experiments.registry import ATTACKS, MODELS
from pyro_vae_defence.metrics import metric_name
from pyro_vae_defence.models.pretrained import WeightCard, available, load_card

NOT_MEASURED = "not measured"
NOT_PRINTED = "–"
_DATASETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "color_mnist": "ColorMNIST"}
_FAMILIES = {
    "vae": "VAE",
    "vae_long": "VAE, second training",
    "beta_vae": "β-VAE, β = ",
    "tcvae": "β-TCVAE, β = ",
    "se": "SE, radius ",
    "avae": "AVAE",
    "se_avae": "SE-AVAE, radius 0.1",
    "avae_ss": "AVAE-SS",
}
# The second training beside the first, then the paper's order, then what its Table 7 does not have.
_ORDER = list(
    dict.fromkeys(
        [
            *(each for name in TABLE_7 for each in (name, f"{name}_long") if each in MODELS),
            *MODELS,
        ]
    )
)
_INPUTS = {"mean": "guide's mean", "guide": "guide's draws", "posterior": "posterior draws"}
_PRINTED = {**TABLE_2, **TABLE_3}
_DIRECTORIES = {2: "docs/results/attack", 3: "docs/results/attack", 7: "docs/results/evaluate"}


def table(number: int, results: str | os.PathLike[str] | None = None) -> str:
    """A table of the paper in Markdown, printed and measured numbers side by side.

    A measurement on the full test set goes before one on a part of it.

    Args:
        number: 2, 3 or 7.
        results: directory with the result files of ``attack`` (2 and 3) or ``evaluate`` (7); the
            published ones of the working directory when ``None``.

    Raises:
        ValueError: for a table that has no generator, a directory without results, or a damaged
            result file.
    """
    if number not in _DIRECTORIES:
        known = ", ".join(map(str, _DIRECTORIES))
        raise ValueError(f"no generator for table {number}; choose one of {known}")
    directory = Path(_DIRECTORIES[number] if results is None else results)
    if number == 7:
        return "\n".join(_table_7(dataset, directory) for dataset in _DATASETS)
    found = result_files.read(directory, "attack")
    for name, result in found.items():
        if result.get("experiment") != f"attack {name}" or name not in ATTACKS:
            raise ValueError(f"{directory / name}.json is no result of attack; move it away")
    printed = TABLE_2 if number == 2 else TABLE_3
    datasets = dict.fromkeys(MODELS[name].dataset for name in printed)
    return "\n".join(
        _attacked(
            f"### Table {number}, {_DATASETS[dataset]}",
            {
                name: found.get(name)
                for name in _ORDER
                if MODELS[name].dataset == dataset and (name in found or name in printed)
            },
        )
        for dataset in datasets
    )


def attacked(result: dict[str, Any]) -> str:
    """One result of ``attack`` as Tables 2 and 3 show it."""
    name = result["config"]["model"]
    return _attacked(f"### {name}", {name: result})


def _attacked(title: str, by_model: dict[str, dict[str, Any] | None]) -> str:
    found = [result for result in by_model.values() if result is not None]
    notes: list[str] = []
    radii, metric = ["0.1", "0.2"], metric_name("ms_ssim", VARIANT)
    of_paper = [_PRINTED.get(model, {}).get("none", {}) for model in by_model]
    tasks = [task for task in ("class", "color") if any(task in each for each in of_paper)]
    if found:
        config, metric = found[0]["config"], found[0]["metric"]
        for each in found:
            differs = [k for k, v in each["config"].items() if k != "model" and v != config[k]]
            if differs or each["metric"] != metric:
                raise ValueError(
                    f"results of {config['model']} and {each['config']['model']} do not belong in "
                    "one table: "
                    f"they differ in {', '.join(differs) or 'their metric'}; run attack again "
                    "with the same settings"
                )
        radii = [f"{radius:g}" for radius in config["radii"]]
        tasks = list(next(iter(found[0]["radii"]["0"].values()))["accuracy"])
        notes = [_attacked_note(config), "", *(f"- {source(each)}" for each in found), ""]
    columns = ["", *(f"{metric}, {radius}" for radius in radii)]
    for task in tasks:
        name = "" if len(tasks) == 1 else f" ({task})"
        columns.append(f"correct, clean{name}")
        for radius in radii:
            columns += [f"unchanged, {radius}{name}", f"correct, {radius}{name}"]
    lines = [title, "", row(columns), row(["---"] * len(columns))]
    for model, result in by_model.items():
        printed = _PRINTED.get(model, {})
        for defence in printed if result is None else result["config"]["defences"]:
            lines.append(
                row(_attacked_row(model, defence, result, printed.get(defence, {}), radii, tasks))
            )
    return "\n".join([*lines, "", *notes])


def _attacked_note(config: dict[str, Any]) -> str:
    transitions = config["warmup_steps"] + config["num_samples"]
    return (
        f"APGD of {config['attack_steps']} steps on the encoder (symmetric KL; "
        f"{config['num_references']} "
        f"references from {config['num_restarts']} starts, all counted) and on the classifier "
        "(cross-entropy of the "
        f"class predicted without an attack; {config['num_images']} images). Attacks do not know "
        "the defence. Chains: "
        f"{config['burn_in']} gradients of burn-in, {transitions} transitions of "
        f"{config['num_steps']} leapfrog "
        f"steps. Behind a defence the classifier's reading is `{config['reading']}`, without one "
        "it reads the guide's "
        "mean. 95% intervals over images; where all images agree the interval has no width, and "
        "of n images about 3/n "
        "may still differ. In brackets the paper's figures, of its own models, attacks and "
        "chains: MSSSIM, and its "
        "adversarial accuracy, which on clean images can only be *correct* and under attack is "
        "*unchanged*."
    )


def _attacked_row(
    name: str,
    defence: str,
    result: dict[str, Any] | None,
    printed: dict[str, dict[str, float]],
    radii: list[str],
    tasks: list[str],
) -> list[str]:
    """A model with a defence: similarities, then per label the accuracies."""

    def cell(radius: str, *keys: str, of: str = "") -> str:
        entry: Any = {} if result is None else result["radii"].get(radius, {}).get(defence)
        for key in keys:
            entry = entry.get(key) if entry else None
        of_paper = printed.get(of, {}).get(radius)
        return (interval(entry, 2) if entry else NOT_MEASURED) + (
            "" if of_paper is None else f" ({of_paper:.2f})"
        )

    cells = [_label(name) if defence == "none" else f"{_label(name)}; {label(defence)}"]
    cells += [cell(radius, "ms_ssim", of="ms_ssim") for radius in radii]
    for task in tasks:
        cells.append(cell("0", "accuracy", task, "correct", of=task))
        for radius in radii:
            cells.append(cell(radius, "accuracy", task, "unchanged", of=task))
            cells.append(cell(radius, "accuracy", task, "correct"))
    return cells


def _table_7(dataset: str, results: Path) -> str:
    lines = [
        f"### Table 7, {_DATASETS[dataset]}",
        "",
        "| | NLL, paper | NLL, ours | MSE, paper | MSE, ours | test images |",
        "|---|---|---|---|---|---|",
    ]
    sources = []
    plain = f"{dataset}_vae"
    for name in _ORDER:
        if MODELS[name].dataset != dataset:
            continue
        result = _read(name, results)
        # Models that the paper's table does not have are shown once they are measured.
        if result is None and name not in TABLE_7:
            continue
        # Its one plain model stands beside both of ours.
        printed = TABLE_7.get(plain if name == f"{plain}_long" else name)
        nll_printed, mse_printed = (
            NOT_PRINTED if printed is None else f"{printed[key]:g}" for key in ("nll", "mse")
        )
        cells = [_label(name), nll_printed, NOT_MEASURED, mse_printed, NOT_MEASURED, ""]
        if result is not None:
            measured = result["metrics"]
            nll = measured[nll_name(result["config"]["num_samples"])]
            cells[2], cells[4] = interval(nll, 2), interval(measured[MSE], 1)
            cells[5] = f"{nll['num_images']:,}"
            sources.append(
                f"- `{result['command']}`, commit `{result['provenance']['commit'][:12]}`, "
                f"{result['config']['num_samples']} importance samples, seed "
                f"{result['config']['seed']}"
            )
        lines.append(row(cells))
    lines += ["", "NLL in nats; MSE per pixel on the scale 0..255. 95% intervals over images.", ""]
    return "\n".join([*lines, *sources, ""] if sources else lines)


def _read(name: str, results: Path) -> dict[str, Any] | None:
    for path in (results / f"{name}_full.json", results / f"{name}.json"):
        if path.exists():
            return result_files.load(path, f"evaluate {name}")
    return None


def _label(name: str) -> str:
    """What a table calls a model, without its dataset."""
    suffix = name.removeprefix(f"{MODELS[name].dataset}_")
    if suffix in _FAMILIES:
        return _FAMILIES[suffix]
    family, _, value = suffix.rpartition("_")
    return f"{_FAMILIES[family]}{value}" if family in _FAMILIES else suffix


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
    rank = {name: index for index, name in enumerate(_ORDER)}
    classifiers = [card for card in cards if card.architecture.endswith("Classifier")]
    vaes = sorted(
        (card for card in cards if card not in classifiers),
        key=lambda card: rank.get(card.name, len(rank)),
    )
    lines = [
        "| model | objective | starts from | epochs | minutes | validation -ELBO | NLL | MSE | "
        "active units |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(_vae_row(card)) for card in vaes),
        "",
        "Validation -ELBO in nats at β = 1, whatever was trained; *NLL*, in nats, and *MSE*, on "
        "the scale 0..255, of "
        "test images, with the metric's settings in the card.",
        "",
        "| classifier | reads | predicts | epochs | minutes | test accuracy |",
        "|---|---|---|---|---|---|",
        *(row(_classifier_row(card)) for card in classifiers),
        "",
    ]
    return "\n".join(lines)


def _vae_row(card: WeightCard) -> list[str]:
    training, test = card.training, card.metrics.get("test", {})
    # The metrics' names carry their settings: "nll[iwae 1000]".
    nll, mse = (
        next((value for name, value in test.items() if name.startswith(f"{what}[")), None)
        for what in ("nll", "mse")
    )
    units = test.get("active_units", {}).values()
    active = f"{sum(u['active'] for u in units)} of {sum(u['all'] for u in units)}" if units else ""
    return [
        f"`{card.name}`",
        _objective(training),
        "" if training.get("start_from") is None else f"`{training['start_from']}`",
        _epochs(training),
        _minutes(card),
        f"{card.metrics['validation_nelbo']:.2f}" if "validation_nelbo" in card.metrics else "",
        NOT_MEASURED if nll is None else interval(nll, 2),
        NOT_MEASURED if mse is None else interval(mse, 1),
        active,
    ]


def _objective(training: dict[str, Any]) -> str:
    """What was trained, with the settings that belong to it."""
    words = {
        "beta": "β = {beta:g}",
        "beta_tcvae": "β = {beta:g} on the total correlation",
        "se": "SE, radius {radius:g}, γ = {gamma:g}",
        "avae": "AVAE, ρ = {rho:g}",
        "se_avae": "SE-AVAE, radius {radius:g}, γ = {gamma:g}, ρ = {rho:g}",
        "avae_ss": "AVAE-SS, ρ = {rho:g}",
        "nvae": "NVAE's",
    }
    return words.get(training.get("objective", ""), "").format(**training)


def _epochs(training: dict[str, Any]) -> str:
    images = training.get("images_per_epoch") or training.get("num_images")
    return f"{training.get('epochs', '')}" + (f" of {images:,} images" if images else "")


def _minutes(card: WeightCard) -> str:
    return f"{card.provenance['seconds'] / 60:.1f}" if "seconds" in card.provenance else ""


def _classifier_row(card: WeightCard) -> list[str]:
    training = card.training
    model, column = training.get("model"), training.get("column", 0)
    # Cards of before there was a choice do not name it.
    reads = _INPUTS[training.get("inputs", "mean")]
    return [
        f"`{card.name}`",
        "images" if model is None else f"{reads} of `{model}`",
        ("class", "colour")[column],
        _epochs(training),
        _minutes(card),
        interval(card.metrics["test_accuracy"])
        if "test_accuracy" in card.metrics
        else NOT_MEASURED,
    ]
