"""Tables from result files; the documentation includes what this writes and nothing typed by
hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pyro_vae_defence.experiments.benchmark.tables import benchmark_tables
from pyro_vae_defence.experiments.benchmark_attacks import attacks_table
from pyro_vae_defence.experiments.drawing import interval_curve
from pyro_vae_defence.experiments.figures_report import section as figures_section
from pyro_vae_defence.experiments.figures_report import write_figures
from pyro_vae_defence.experiments.html import robustness_page
from pyro_vae_defence.experiments.markdown import interval, row, source
from pyro_vae_defence.experiments.results import read
from pyro_vae_defence.ops.files import write_atomically

_LABELS = {
    "none": "no defence",
    "hmc": "HMC, dual averaging",
    "nuts": "NUTS, dual averaging",
    "paper": "HMC, the paper's setting",
    "aware": "HMC, perturbation-aware",
}

_CHAINS = {
    "none": "no defence",
    "hmc": "HMC on the paper's target, whitened",
    "aware": "HMC on the perturbation-aware target, delta = radius",
}


def report(results: str | os.PathLike[str]) -> str:
    """Markdown tables of the result files of ``defend``, ``robustness``, ``evaluate`` and
    ``benchmark`` in a directory.

    Raises:
        ValueError: if the directory holds no result file.
    """
    return "\n".join(_table(result) for result in read(results).values())


def write_report(results: str | os.PathLike[str]) -> Path:
    """Write :func:`report` to ``tables.md`` beside the result files, and what belongs to them.

    Figure 4 of the hierarchical ``MODEL`` is ``MODEL_groups.png``, one panel per radius; robustness
    reports make one self-contained page, ``report.html``. A directory of ``figures`` gets its
    figures in ``images``.
    """
    path = Path(results) / "tables.md"
    every = list(read(results).values())
    if all("knowledge" in result for result in every):
        return write_figures(results, Path(results) / "images")[0]
    path.write_text("\n".join(_table(result) for result in every))
    by_model: dict[str, list[dict[str, Any]]] = {}
    for result in every:
        if "groups" in result:
            by_model.setdefault(result["config"]["model"], []).append(result)
    for model, found in by_model.items():
        groups_figure(found).savefig(Path(results) / f"{model}_groups.png", dpi=120)
    if any("reports" in result for result in every):
        write_atomically(Path(results) / "report.html", robustness_page(every).encode())
    return path


def groups_figure(results: Sequence[dict[str, Any]]) -> Figure:
    """Similarity of reconstructions against the number of attacked groups (Figure 4), one panel per
    result."""
    results = sorted(results, key=lambda result: result["config"]["radius"])
    figure = Figure(figsize=(3.6 * len(results), 3.2), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        for defence in result["config"]["defences"]:
            points = {
                float(k): entry["defences"][defence]["ms_ssim"]
                for k, entry in result["groups"].items()
                if defence in entry["defences"]
            }
            interval_curve(axes, list(points), list(points.values()), _LABELS[defence])
        axes.axhline(result["noise_floor"]["estimate"], color="black", lw=0.8, ls=":")
        axes.set_title(f"radius {result['config']['radius']:g}", fontsize=9)
        axes.set_xlabel("attacked groups, from the top")
    panels[0].set_ylabel(results[0]["metric"])
    panels[-1].legend(fontsize=7)
    return figure


def _table(result: dict[str, Any]) -> str:
    for key, table in _TABLES.items():
        if key in result:
            return table(result)
    config = result["config"]
    lines = [
        f"### {result['experiment']}",
        "",
        f"{config['num_references']} reference images x {config['num_restarts']} restarts, radius "
        f"{config['radius']:g}, model `{config['model']}`, seed {config['seed']}. 95% intervals "
        "over "
        "reference images.",
        "",
        f"| | {result['metric']} | median log posterior ratio (nats) | energy of x_adv (nats) | "
        "acceptance | gradients per image | seconds per image |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in result["defences"].items():
        acceptance = entry.get("acceptance_rate")
        lines.append(
            f"| {_LABELS[name]} | {interval(entry['ms_ssim'], 3)} | "
            f"{interval(entry['log_posterior_ratio_median'], 1)} | {interval(entry['energy'], 1)} "
            "| "
            f"{'' if acceptance is None else f'{acceptance:.2f}'} | "
            f"{entry['gradients_per_image']:.0f} | {entry['seconds_per_image']:.3g} |"
        )
    lines += [
        f"| noise floor | {interval(result['noise_floor'], 3)} | | | | | |",
        "",
        f"{source(result)}.",
        "",
    ]
    return "\n".join(lines)


def _hierarchy_table(result: dict[str, Any]) -> str:
    config = result["config"]
    lines = [
        f"### {result['experiment']}",
        "",
        f"{config['num_references']} reference images x {config['num_restarts']} restarts, radius "
        f"{config['radius']:g}, model `{config['model']}`, seed {config['seed']}. 95% intervals "
        "over reference "
        f"images. Noise floor of {result['metric']}: {interval(result['noise_floor'], 3)}.",
        "",
        f"| attacked groups | symmetric KL (nats) | | {result['metric']} | median log posterior "
        "ratio (nats) | "
        "energy of x_adv (nats) | acceptance | gradients per image | seconds per image |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for k, entry in result["groups"].items():
        for name, found in entry["defences"].items():
            acceptance = found.get("acceptance_rate")
            cells = [
                k,
                interval(entry["symmetric_kl"], 1),
                _LABELS[name],
                interval(found["ms_ssim"], 3),
                interval(found["log_posterior_ratio_median"], 1),
                interval(found["energy"], 1),
                "" if acceptance is None else f"{acceptance:.2f}",
                f"{found['gradients_per_image']:.0f}",
                f"{found['seconds_per_image']:.3g}",
            ]
            lines.append(row(cells))
    lines += [
        "",
        f"{source(result)}.",
        "",
    ]
    return "\n".join(lines)


def robustness_table(result: dict[str, Any]) -> str:
    """The worst cases of a result file, and what each attack left, as Markdown."""
    config = result["config"]
    lines = [
        f"### {result['experiment']}",
        "",
        f"{config['num_images']} images, L_inf radius {config['radius']:g}, model "
        f"`{config['model']}`, classes read "
        f"`{config['reading']}`, {config['num_steps']} steps of {config['engine']}, "
        f"{config['num_restarts']} "
        f"restart(s), seed {config['seed']}. Higher is more robust; per-image worst case over "
        "attacks on fresh seeds, "
        "95% intervals over images. Heuristic, not certified.",
        "",
        "| | figure | clean | random noise | robust, mean | robust, averaged | worst of "
        f"{config['scoring_draws']} draws | decoder evaluations per image | reliable |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, report in result["reports"].items():
        robust = report["robust"]
        lines.append(
            f"| {_CHAINS[key.split('/')[1]]} | {report['figure']} | "
            f"{interval(report['clean']['mean'], 3)} | {interval(report['random_noise'], 3)} | "
            f"{interval(robust['mean'], 3)} | {interval(robust['averaged'], 3)} | "
            f"{interval(robust['worst_of_n'], 3)} | "
            f"{report['cost']['attack_evaluations_per_image']:,.0f} | "
            f"{'no' if report['unreliable'] else 'yes'} |"
        )
    for key, report in result["reports"].items():
        lines += ["", f"{key}, figure under each attack:", ""]
        lines += [
            f"- {a['name']} ({a['num_draws']} draws): {interval(a['figure'], 3)}"
            for a in report["attacks"]
        ]
        lines += [f"- skipped {name}: {why}" for name, why in report["skipped"].items()]
        lines += [f"- unreliable: {reason}" for reason in report["reasons"]]
    lines += [
        "",
        f"{source(result)}.",
        "",
    ]
    return "\n".join(lines)


def evaluate_table(result: dict[str, Any]) -> str:
    """What ``evaluate`` measured of one model, as Markdown."""
    lines = [
        f"### {result['experiment']}",
        "",
        "| metric | value | images |",
        "|---|---|---|",
    ]
    for name, entry in result["metrics"].items():
        if "low" in entry:
            lines.append(row([name, interval(entry, 2), f"{entry['num_images']:,}"]))
        elif "estimate" in entry:
            lines.append(row([name, f"{entry['estimate']:.2f}", f"{entry['num_images']:,}"]))
    units = result["metrics"]["active_units"].values()
    active, every = (sum(site[key] for site in units) for key in ("active", "all"))
    lines += [
        row(["active units", f"{active} of {every}", ""]),
        "",
        f"{source(result)}.",
        "",
    ]
    return "\n".join(lines)


# What a result file of each experiment has and no other; all others are of ``defend``.
_TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "reports": robustness_table,
    "sections": benchmark_tables,
    "methods": attacks_table,
    "groups": _hierarchy_table,
    "metrics": evaluate_table,
    "knowledge": figures_section,
}
