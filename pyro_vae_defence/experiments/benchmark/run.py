"""The benchmark as a whole: one result file, section by section."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_vae_defence import data
from pyro_vae_defence.experiments import results
from pyro_vae_defence.experiments.benchmark.chains import chains, seconds_per_gradient
from pyro_vae_defence.experiments.benchmark.decoder import decoder
from pyro_vae_defence.experiments.benchmark.engines import engines
from pyro_vae_defence.experiments.benchmark.memory import memory
from pyro_vae_defence.experiments.benchmark.samplers import SAMPLERS
from pyro_vae_defence.experiments.config import command, override
from pyro_vae_defence.experiments.registry import BENCHMARKS
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.pretrained import load_card, load_pretrained


def benchmark(
    name: str,
    output: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    models: str | os.PathLike[str] | None = None,
    overrides: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the benchmark ``name``; sections that the result file already holds are not run again.

    Args:
        name: a name of :data:`pyro_vae_defence.experiments.registry.BENCHMARKS`.
        output: directory of the result file ``NAME.json``, written after every section.
        root: directory of the datasets; the packaged subsets need none.
        models: directory of the weights; the packaged ones when ``None``.
        overrides: fields of :class:`~pyro_vae_defence.experiments.config.BenchmarkConfig` to
            change; they are recorded in the result.
        progress: say what is running.

    Raises:
        ValueError: for an unknown name, override or kernel, a result file of another configuration,
            a model without Bernoulli likelihood or without a mean posterior variance, or fewer
            images than asked for.
    """
    if name not in BENCHMARKS:
        raise ValueError(
            f"no benchmark named {name!r}; choose one of {', '.join((*BENCHMARKS, 'attacks'))}"
        )
    config = override(BENCHMARKS[name], overrides)
    names = tuple(SAMPLERS) if config.samplers is None else config.samplers
    unknown = [sampler for sampler in names if sampler not in SAMPLERS]
    if unknown:
        raise ValueError(f"unknown samplers {unknown}; choose from {', '.join(SAMPLERS)}")
    vae = load_pretrained(config.model, models)
    if (
        not isinstance(vae, ConvVAE)
        or vae.likelihood != "bernoulli"
        or not vae.mean_posterior_variance
    ):
        raise ValueError(
            f"model {config.model!r} must have a Bernoulli likelihood and a mean posterior "
            "variance in its "
            "weights; choose a grey-scale model that this version has trained"
        )
    path = Path(output) / f"{name}.json"
    result = results.header(
        f"benchmark {name}",
        config,
        load_card(config.model, models).sha256,
        command("benchmark", name, overrides),
    )
    result["sections"] = {}
    results.resume(path, result, "sections")

    test_set = data.load(config.dataset, "test", root)
    generator = torch.Generator().manual_seed(config.seed)
    references = test_set.images(data.stratified(test_set, config.num_images, generator))
    many = test_set.images(data.stratified(test_set, config.engine_images, generator))

    with tqdm(disable=not progress, bar_format="{desc} [{elapsed}]") as bar:
        note = bar.set_description_str
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "decoder": lambda: decoder(vae, references, config),
            "seconds_per_gradient": lambda: seconds_per_gradient(vae, references, names, config),
            "engines": lambda: engines(vae, many, config, note),
            "memory": lambda: memory(config.model, models, config, note),
            **{
                f"chains {radius:g}": functools.partial(
                    chains, vae, references, radius, names, config, note
                )
                for radius in config.radii
            },
        }
        for section, measure in sections.items():
            if section in result["sections"]:
                continue
            note(section)
            began = time.perf_counter()
            found = measure()
            # Sections may come from several calls, hence each says where and how long it ran.
            result["sections"][section] = {
                "results": found,
                "wall_seconds": round(time.perf_counter() - began, 1),
                "commit": result["provenance"]["commit"],
            }
            results.save(path, result, indent=1)
    return result
