"""Attack a trained model's encoder and defend it: one result file per model and radius."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae_defence import attacks, data, metrics
from pyro_vae_defence.defence import DefenceResult, MCMCDefence, NoDefence
from pyro_vae_defence.experiments import results
from pyro_vae_defence.experiments.config import DefendConfig, command, override
from pyro_vae_defence.experiments.registry import DEFENCES, HIERARCHIES, MODELS
from pyro_vae_defence.experiments.results import interval
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS
from pyro_vae_defence.models import program
from pyro_vae_defence.models.pretrained import TrainedVAE, load_card, load_pretrained
from pyro_vae_defence.ops.balls import Linf

VARIANT = "paper"


def defend(
    name: str,
    output: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    models: str | os.PathLike[str] | None = None,
    overrides: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the experiment ``name``; defences that the result file already holds are not run again.

    Args:
        name: a name of :data:`pyro_vae_defence.experiments.registry.DEFENCES`.
        output: directory of the result file ``NAME.json``, written after every defence.
        root: directory of the datasets.
        models: directory of the weights; the packaged ones when ``None``.
        overrides: fields of the configuration to change; they are recorded in the result.
        progress: show progress bars.

    Raises:
        ValueError: for an unknown name or override, or a result file of another configuration.
    """
    if name not in DEFENCES:
        known = ", ".join((*DEFENCES, *HIERARCHIES))
        raise ValueError(f"no experiment named {name!r}; choose one of {known}")
    config = override(DEFENCES[name], overrides)
    path = Path(output) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    vae = load_pretrained(config.model, models)
    result = results.header(
        name,
        config,
        load_card(config.model, models).sha256,
        command("defend", name, overrides),
        metric=metrics.metric_name("ms_ssim", VARIANT),
    )
    result["defences"] = {}
    results.resume(path, result, "defences")

    generator = torch.Generator().manual_seed(config.seed)
    dataset = MODELS[config.model].dataset
    test_set = data.load(dataset, "test", root)
    x_ref = test_set.images(data.stratified(test_set, config.num_references, generator))
    attack = attacks.PGD(
        attacks.symmetric_kl(vae),
        Linf(config.radius),
        num_restarts=config.num_restarts,
        preset="paper",
    )
    attacked = attack(x_ref, generator)
    x_adv = attacked.x_adv.flatten(0, 1)
    references = x_ref.repeat(config.num_restarts, 1, 1, 1)
    image = torch.arange(len(x_ref)).repeat(config.num_restarts)
    # rec(x^r) decodes one draw of the guide; a second draw gives the noise floor.
    before, again = (NoDefence(vae)(references, generator) for _ in range(2))
    result["symmetric_kl"] = interval(attacked.objective.flatten(), image)
    result["noise_floor"] = similarity(before.reconstruction, again.reconstruction, image)
    seeds = {d: int(torch.randint(2**62, (), generator=generator)) for d in sorted(_MAKERS)}
    for defence in config.defences:
        if defence in result["defences"]:
            continue
        run = _MAKERS[defence](vae, config, dataset, progress)
        outcome = run(x_adv, torch.Generator().manual_seed(seeds[defence] % 2**63))
        result["defences"][defence] = _score(vae, references, before, outcome, image)
        results.save(path, result)
    return result


def _no_defence(vae: TrainedVAE, config: DefendConfig, dataset: str, progress: bool) -> Any:
    return NoDefence(vae)


def _paper(vae: TrainedVAE, config: DefendConfig, dataset: str, progress: bool) -> Any:
    return MCMCDefence.paper(vae, dataset, progress=progress)


def _batched(
    kernel: Any, vae: TrainedVAE, config: DefendConfig, dataset: str, progress: bool
) -> MCMCDefence:
    options = {"step_size": config.step_size, "inverse_mass_matrix": vae.mean_posterior_variance}
    if kernel is BatchedHMC:
        options["num_steps"] = config.num_steps
    return MCMCDefence(
        vae,
        functools.partial(kernel, **options),
        config.num_samples,
        config.warmup_steps,
        progress=progress,
    )


_MAKERS: dict[str, Any] = {
    "none": _no_defence,
    "paper": _paper,
    "hmc": functools.partial(_batched, BatchedHMC),
    "nuts": functools.partial(_batched, BatchedNUTS),
}


def similarity(x: Tensor, y: Tensor, image: Tensor) -> dict[str, float]:
    """MS-SSIM of reconstructions, with its interval over reference images."""
    return interval(metrics.ms_ssim(x, y, variant=VARIANT), image)


def _score(
    vae: TrainedVAE,
    references: Tensor,
    before: DefenceResult,
    outcome: DefenceResult,
    image: Tensor,
) -> dict[str, Any]:
    energy = program.potential(vae, references)
    with torch.no_grad():
        ratio = metrics.log_posterior_ratio(energy, before.latents, outcome.latents)
        final = program.potential(vae, outcome.x)(outcome.latents)
    return {
        "ms_ssim": similarity(before.reconstruction, outcome.reconstruction, image),
        "log_posterior_ratio_median": interval(ratio, image, "median"),
        "energy": interval(final, image),
        "gradients_per_image": float(outcome.num_gradients.double().mean()),
        "seconds_per_image": outcome.seconds / len(references),
        "settings": outcome.settings,
        **chain_statistics(outcome.sample_stats),
    }


def chain_statistics(stats: dict[str, Tensor]) -> dict[str, float]:
    """Acceptance, divergences and last step size of chains; nothing where there were none."""
    if not stats:
        return {}
    return {
        "acceptance_rate": float(stats["acceptance_rate"].mean()),
        "divergences": int(stats["diverging"].sum()),
        "step_size_last": float(stats["step_size"][:, -1].mean()),
    }
