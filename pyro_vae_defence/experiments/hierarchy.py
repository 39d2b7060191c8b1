"""Attack the top latent groups of an NVAE and defend it on all groups at once (section 4.3, Figure
4).

One result file per model and radius: for every number of attacked groups, the strength of the
attack and one entry per defence. Images go through the model in parts of ``batch_size``; whatever
is random comes from the images' own streams, so that the parts do not matter (but to the paper's
setting on MNIST, whose one step size couples the images of a part).
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence import attacks, data, metrics
from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.experiments import results
from pyro_vae_defence.experiments.config import HierarchyConfig, command, override
from pyro_vae_defence.experiments.defend import VARIANT, chain_statistics, similarity
from pyro_vae_defence.experiments.registry import HIERARCHIES
from pyro_vae_defence.experiments.results import interval
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import program
from pyro_vae_defence.models.nvae import NVAE, load_official
from pyro_vae_defence.models.pretrained import load_card, load_pretrained
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import VAE, Latents, LatentsLike


@dataclass(frozen=True)
class _Outcome:
    """Latents of the model, one row per attacked image, and what they cost."""

    latents: Latents
    reconstruction: Tensor
    num_gradients: float = 0.0
    seconds: float = 0.0
    stats: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def defend_hierarchy(
    name: str,
    output: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    models: str | os.PathLike[str] | None = None,
    overrides: dict[str, Any] | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Run the experiment ``name``; defences that the result file already holds are not run again.

    Args:
        name: a name of :data:`pyro_vae_defence.experiments.registry.HIERARCHIES`.
        output: directory of the result file ``NAME.json``, written after every defence.
        root: directory of the datasets.
        models: directory of the weights; the packaged ones when ``None``.
        overrides: fields of the configuration to change; they are recorded in the result.
        progress: show progress bars.
        checkpoint: official checkpoint to defend, instead of a trained model of this library.

    Raises:
        ValueError: for an unknown name or override, a model that is no NVAE, images that do not fit
            it, or a result file of another configuration.
    """
    if name not in HIERARCHIES:
        raise ValueError(f"no experiment named {name!r}; choose one of {', '.join(HIERARCHIES)}")
    config = override(HIERARCHIES[name], overrides)
    vae, weights = _load(config, models, checkpoint)
    path = Path(output) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = results.header(
        name,
        config,
        weights,
        command("defend", name, overrides, checkpoint=checkpoint),
        metric=metrics.metric_name("ms_ssim", VARIANT),
    )
    result["groups"] = {}
    results.resume(path, result, "groups")

    test_set = data.load(config.dataset, "test", root)
    if test_set.image_shape != vae.image_shape:
        raise ValueError(
            f"images of {config.dataset!r} have shape {test_set.image_shape}, the model's "
            f"{vae.image_shape}; set dataset=NAME of a fitting one"
        )
    chosen = data.stratified(
        test_set, config.num_references, _generator(config, "references"), config.column
    )
    x_ref = test_set.images(chosen).to(config.device)
    references = x_ref.repeat(config.num_restarts, 1, 1, 1)
    image = torch.arange(len(x_ref)).repeat(config.num_restarts)
    # rec(x^r) decodes one draw of the guide; a second draw gives the noise floor.
    before, again = (
        _undefended(vae, references, config, _generator(config, draw))
        for draw in ("reference", "noise floor")
    )
    result["noise_floor"] = _compare(before.reconstruction, again.reconstruction, image)
    metric = functools.cache(lambda: _metric(vae, config, root))
    for k in config.groups:
        entry = result["groups"].setdefault(str(k), {"defences": {}})
        missing = [d for d in config.defences if d not in entry["defences"]]
        if not missing:
            continue
        x_adv, reached = _attack(vae, x_ref, k, config)
        entry["symmetric_kl"] = interval(reached.cpu(), image)
        for defence in missing:
            generator = _generator(config, defence, k)
            if defence == "none":
                outcome = _undefended(vae, x_adv, config, generator)
            else:
                outcome = _defended(vae, x_adv, defence, config, metric, generator, progress)
            entry["defences"][defence] = _score(
                vae, references, x_adv, before, outcome, image, config
            )
            results.save(path, result)
    return result


def _load(
    config: HierarchyConfig,
    models: str | os.PathLike[str] | None,
    checkpoint: str | os.PathLike[str] | None,
) -> tuple[NVAE, str]:
    """The model on its device, and the sha256 of its weights."""
    if checkpoint is None:
        vae, weights = load_pretrained(config.model, models), load_card(config.model, models).sha256
    else:
        vae = load_official(checkpoint)
        weights = hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
    if not isinstance(vae, NVAE):
        raise ValueError(
            f"model {config.model!r} has no latent groups: it is a {type(vae).__name__}"
        )
    if max(config.groups) > vae.config.num_groups:
        raise ValueError(
            f"groups={config.groups} must be at most the model's {vae.config.num_groups} groups"
        )
    vae.checkpointing = config.checkpointing
    return vae.requires_grad_(False).to(config.device), weights


def _generator(config: HierarchyConfig, *purpose: object) -> torch.Generator:
    """A generator per purpose: what is done does not depend on what else is, or was done before."""
    words = "/".join(map(str, (config.seed, *purpose)))
    digest = hashlib.sha256(words.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def _parts(num: int, config: HierarchyConfig) -> Iterator[slice]:
    for first in range(0, num, config.batch_size):
        yield slice(first, first + config.batch_size)


@torch.no_grad()
def _undefended(
    vae: NVAE, x: Tensor, config: HierarchyConfig, generator: torch.Generator
) -> _Outcome:
    """One draw from the guide, decoded."""
    started = time.perf_counter()
    seed = _seed(generator)
    latents, reconstructions = [], []
    for part in _parts(len(x), config):
        some = x[part]
        streams = Streams.create(len(some), seed=seed, first_image=part.start, device=x.device)
        latents.append(program.encode(vae, some, streams=streams))
        reconstructions.append(vae.decode(latents[-1]))
    return _Outcome(
        _concatenate(latents), torch.cat(reconstructions), seconds=time.perf_counter() - started
    )


def _attack(vae: NVAE, x_ref: Tensor, k: int, config: HierarchyConfig) -> tuple[Tensor, Tensor]:
    """Attacked images, restarts in turn, and the symmetric KL they reach over the top ``k``
    groups."""
    generator = _generator(config, "attack", k)
    attack = attacks.PGD(
        attacks.symmetric_kl(vae, sites=k),
        Linf(config.radius),
        num_steps=config.attack_steps,
        num_restarts=config.num_restarts,
        preset="paper",
        batch_size=config.batch_size,
    )
    attacked = attack(x_ref, generator)
    return attacked.x_adv.flatten(0, 1), attacked.objective.flatten()


def _metric(vae: NVAE, config: HierarchyConfig, root: str | os.PathLike[str] | None) -> Latents:
    """Mean posterior variance of what ``hmc`` moves, over training images: nothing an attacker can
    change."""
    programs: VAE = vae.noncentred() if config.noncentred else vae
    stored = vae.mean_noise_variance if config.noncentred else vae.mean_posterior_variance
    if stored is None:
        train_set = data.load(config.dataset, "train", root)
        num = min(config.metric_images, len(train_set))
        generator = _generator(config, "metric")
        order = torch.randperm(len(train_set), generator=generator)[:num]
        batches = (train_set.images(order[p]).to(config.device) for p in _parts(num, config))
        stored = program.mean_posterior_variance(programs, batches, generator=generator)
    return {site: variance.to(config.device) for site, variance in stored.items()}


def _defended(
    vae: NVAE,
    x: Tensor,
    defence: str,
    config: HierarchyConfig,
    metric: Callable[[], Latents],
    generator: torch.Generator,
    progress: bool,
) -> _Outcome:
    options: dict[str, Any] = {"batch_size": config.batch_size, "progress": progress}
    if defence == "paper":
        run = MCMCDefence.paper(vae, config.paper, num_draws=1, **options)
    else:
        radius = config.radius if config.delta is None else config.delta
        kernel = functools.partial(
            BatchedHMC,
            step_size=config.step_size,
            num_steps=config.num_steps,
            inverse_mass_matrix=metric(),
        )
        run = MCMCDefence(
            vae.noncentred() if config.noncentred else vae,
            kernel,
            config.num_samples,
            config.warmup_steps,
            perturbation=Linf(radius) if defence == "aware" else None,
            **options,
        )
    outcome = run(x, generator)
    latents = outcome.latents
    if defence != "paper" and config.noncentred:
        with torch.no_grad():
            parts = [
                vae.noncentred().to_latents(lat.index(latents, part))
                for part in _parts(len(x), config)
            ]
        latents = _concatenate(parts)
    return _Outcome(
        latents,
        outcome.reconstruction,
        float(outcome.num_gradients.double().mean()),
        outcome.seconds,
        outcome.sample_stats,
        outcome.settings,
    )


@torch.no_grad()
def _energy(vae: NVAE, x: Tensor, latents: LatentsLike, config: HierarchyConfig) -> Tensor:
    """U(z; x) = -log p(x | z) - sum_k log p(z_k | z_{>k}) per image, ``(N,)``, in nats."""
    return torch.cat(
        [
            program.potential(vae, x[part])(lat.index(latents, part))
            for part in _parts(len(x), config)
        ]
    )


def _score(
    vae: NVAE,
    references: Tensor,
    x_adv: Tensor,
    before: _Outcome,
    outcome: _Outcome,
    image: Tensor,
    config: HierarchyConfig,
) -> dict[str, Any]:
    at_reference = functools.partial(_energy, vae, references, config=config)
    ratio = metrics.log_posterior_ratio(at_reference, before.latents, outcome.latents)
    energy = _energy(vae, x_adv, outcome.latents, config)
    return {
        "ms_ssim": _compare(before.reconstruction, outcome.reconstruction, image),
        "log_posterior_ratio_median": interval(ratio.cpu(), image, "median"),
        "energy": interval(energy.cpu(), image),
        "gradients_per_image": outcome.num_gradients,
        "seconds_per_image": outcome.seconds / len(references),
        "settings": outcome.settings,
        **chain_statistics(outcome.stats),
    }


def _compare(x: Tensor, y: Tensor, image: Tensor) -> dict[str, float]:
    return similarity(x.cpu(), y.cpu(), image)


def _concatenate(parts: list[Latents]) -> Latents:
    return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}
