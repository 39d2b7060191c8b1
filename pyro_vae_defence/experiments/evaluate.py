"""Test likelihood and reconstruction error of a trained model: one result file per model."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence import data, metrics
from pyro_vae_defence.experiments import annealing, results
from pyro_vae_defence.experiments.config import EvaluateConfig, command, override
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import load_classifier
from pyro_vae_defence.models.pretrained import (
    load_card,
    load_pretrained,
    save_card,
)
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import VAE

MSE = metrics.metric_name("mse", "0..255")


def evaluate(
    name: str,
    output: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    models: str | os.PathLike[str] | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure the trained model ``name`` on test images of its own dataset.

    Writes ``NAME.json`` to ``output`` (``NAME_full.json`` for the full test set), and the metrics
    into the model's card under ``test``.

    Args:
        name: name of a trained model.
        output: directory of the result file.
        root: directory of the datasets.
        models: directory of weights and cards; the packaged ones when ``None``.
        overrides: fields of :class:`~pyro_vae_defence.experiments.config.EvaluateConfig` to change;
            they are recorded in the result.

    Raises:
        ValueError: for an unknown name or override.
    """
    config = override(EvaluateConfig(name), {**(overrides or {}), "model": name})
    vae = load_pretrained(name, models)
    card = load_card(name, models)
    dataset = card.training["dataset"]
    result = results.header(
        f"evaluate {name}",
        config,
        card.sha256,
        command("evaluate", name, overrides),
        dataset=dataset,
    )
    generator = torch.Generator().manual_seed(config.seed)
    test_set = data.load(dataset, "test", root)
    if config.num_images is None:
        x = test_set.images()
    else:
        x = test_set.images(data.stratified(test_set, config.num_images, generator))

    started = time.perf_counter()
    result["metrics"] = measure(vae, x, config, generator)
    if config.features is not None:
        extractor, _ = load_classifier(config.features, models)
        name_of_distance = metrics.metric_name("frechet", config.features)
        samples = sample(vae, x, config.rows, generator)
        result["metrics"][name_of_distance] = {
            "estimate": float(metrics.frechet(x, samples, extractor.features)),
            "num_images": len(x),
        }
    result["seconds"] = round(time.perf_counter() - started, 1)

    path = Path(output) / f"{name}{'_full' if config.num_images is None else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results.save(path, result)
    measured = {**card.metrics, "test": result["metrics"]}
    save_card(dataclasses.replace(card, metrics=measured), models)
    return result


def measure(
    vae: VAE, x: Tensor, config: EvaluateConfig, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """NLL, MSE of one-sample reconstructions, and active units of any Pyro VAE on images ``x``.

    Returns:
        Metric's full name -> estimate and 95% interval over images, or active and all units per
        site.
    """
    ais: dict[str, Any] = {}
    nll = metrics.nll(vae, x, config.num_samples, config.rows, generator)
    errors, means = [], []
    with torch.no_grad(), program.evaluation_mode(vae):
        # Draws come from the images' own streams, whatever the size of the batches.
        seed = draw_seed(generator)
        for first in range(0, len(x), config.rows):
            batch = x[first : first + config.rows]
            streams = Streams.create(len(batch), seed=seed, first_image=first, device=x.device)
            latents = program.encode(vae, batch, streams=streams)
            decoded = program.decode(vae, latents, tuple(x.shape[1:]))
            errors.append(metrics.mse(batch, decoded))
            means.append(program.posterior_mean(vae, batch))
    if config.ais_images > 0:
        some = slice(0, config.ais_images)
        walk = annealing.ais(
            vae,
            x[some],
            metrics.sigmoid_schedule(config.ais_steps),
            config.ais_chains,
            generator=generator,
        )
        both = {
            nll_name(config.num_samples): _interval(nll[some]),
            "difference": _interval(walk.nll - nll[some]),
            "acceptance_rate": float(walk.acceptance_rate.mean()),
        }
        ais = {f"nll[ais {config.ais_steps}]": {**_interval(walk.nll), "on_the_same_images": both}}
    units = {site: torch.cat([mean[site] for mean in means]) for site in means[0]}
    return {
        nll_name(config.num_samples): _interval(nll),
        MSE: _interval(torch.cat(errors)),
        **ais,
        "active_units": {
            site: {"active": int(metrics.active_units(mean).sum()), "all": mean[0].numel()}
            for site, mean in units.items()
        },
    }


@torch.no_grad()
def sample(
    vae: VAE, like: Tensor, rows: int = 1000, generator: torch.Generator | None = None
) -> Tensor:
    """Means of p(x | z) at draws from the prior, clamped to [0, 1]: as many images as ``like`` has,
    of its shape."""
    seed = draw_seed(generator)
    images = []
    with program.evaluation_mode(vae):
        for first in range(0, len(like), rows):
            batch = like[first : first + rows]
            streams = Streams.create(len(batch), seed=seed, first_image=first, device=like.device)
            latents = program.prior(vae, batch, streams=streams)
            images.append(program.decode(vae, latents, tuple(like.shape[1:])))
    return torch.cat(images).clamp(0, 1)


def nll_name(num_samples: int) -> str:
    """Full name of the NLL by importance sampling, such as ``"nll[iwae 1000]"``."""
    return metrics.metric_name("nll", f"iwae {num_samples}")


def _interval(values: Tensor) -> dict[str, float]:
    return {**results.interval(values), "num_images": len(values)}
