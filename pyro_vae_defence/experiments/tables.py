"""The paper's tables beside this library's measurements, from result files alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pyro_vae_defence.experiments.evaluate import MSE, nll_name
from pyro_vae_defence.experiments.markdown import interval, row
from pyro_vae_defence.experiments.paper import TABLE_7
from pyro_vae_defence.experiments.registry import MODELS

NOT_MEASURED = "not measured"
_DATASETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "color_mnist": "ColorMNIST"}


def table(number: int, results: str | os.PathLike[str]) -> str:
    """A table of the paper in Markdown, printed and measured numbers side by side.

    A measurement on the full test set goes before one on a part of it.

    Args:
        number: 7.
        results: directory with the result files of ``evaluate``.

    Raises:
        ValueError: for a table that has no generator, or a damaged result file.
    """
    if number != 7:
        raise ValueError(f"no generator for table {number}; choose 7")
    return "\n".join(_table_7(dataset, Path(results)) for dataset in _DATASETS)


def _table_7(dataset: str, results: Path) -> str:
    lines = [
        f"### Table 7, {_DATASETS[dataset]}",
        "",
        "| | NLL, paper | NLL, ours | MSE, paper | MSE, ours | test images |",
        "|---|---|---|---|---|---|",
    ]
    sources = []
    printed_of = {name: row for name, row in TABLE_7.items() if MODELS[name].dataset == dataset}
    # The paper's one plain model stands beside both of ours.
    plain, long = f"{dataset}_vae", f"{dataset}_vae_long"
    for name in (plain, long, *(name for name in printed_of if name != plain)):
        printed = printed_of[plain if name == long else name]
        result = _read(name, results)
        if name == long and result is None:
            continue
        cells = [_label(name.removeprefix(f"{dataset}_")), f"{printed['nll']:g}", NOT_MEASURED]
        cells += [f"{printed['mse']:g}", NOT_MEASURED, ""]
        if result is not None:
            measured = result["metrics"]
            nll = measured[nll_name(result["config"]["num_samples"])]
            cells[2], cells[4] = interval(nll, 2), interval(measured[MSE], 1)
            cells[5] = f"{nll['num_images']:,}"
            sources.append(
                f"- `{result['command']}`, commit `{result['provenance']['commit'][:12]}`, "
                f"{result['config']['num_samples']} importance samples, seed {result['config']['seed']}"
            )
        lines.append(row(cells))
    lines += ["", "NLL in nats; MSE per pixel on the scale 0..255. 95% intervals over images.", ""]
    return "\n".join([*lines, *sources, ""] if sources else lines)


def _read(name: str, results: Path) -> dict[str, Any] | None:
    for path in (results / f"{name}_full.json", results / f"{name}.json"):
        if path.exists():
            try:
                return json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(
                    f"result file {path} is damaged ({error}); run evaluate {name} again"
                ) from error
    return None


def _label(suffix: str) -> str:
    plain = {"vae": "VAE", "vae_long": "VAE, second training"}
    if suffix in plain:
        return plain[suffix]
    family, beta = suffix.rsplit("_", 1)
    return f"{'β-VAE' if family == 'beta_vae' else 'β-TCVAE'}, β = {beta}"
