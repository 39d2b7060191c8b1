"""Defences and controls by name, as experiments and their tables call them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pyro_vae_defence.defence import (
    EncoderDefence,
    MCMCDefence,
    NoDefence,
    PosteriorModeDefence,
    clip_dark_pixels,
    clip_extreme_pixels,
    gaussian_filter,
    median_filter,
)
from pyro_vae_defence.experiments.config import (
    CHAINS,
    MODES,
    WITH_RADIUS,
    AttackConfig,
    CompareConfig,
    defence_spec,
)
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models.perturbation import Perturbation, UnknownRadius
from pyro_vae_defence.models.pretrained import TrainedVAE
from pyro_vae_defence.ops.balls import Linf

MODE_STEPS = 30
"""Gradients of a search for the posterior mode by L-BFGS."""

_KINDS = {
    "none": "no defence",
    "hmc": "HMC, the paper's target",
    "aware": "HMC, perturbation-aware",
    "aware_unknown": "HMC, perturbation-aware, radius unknown",
    "aware_mode": "mode, perturbation-aware",
    "mode": "control: mode of the paper's target",
    "encoder_samples": "control: mean of encoder samples",
    "dark_clip": "control: dark-pixel clipping",
    "extreme_clip": "control: dark- and bright-pixel clipping",
    "median": "control: median filter",
    "gaussian": "control: Gaussian filter",
}


def label(name: str) -> str:
    """What a table calls a defence."""
    kind, radius, transitions = defence_spec(name)
    text = _KINDS[kind]
    if kind in WITH_RADIUS:
        text += " δ = radius" if radius is None else f" δ = {radius:g}"
    return text if transitions is None else f"{text}, {transitions} transitions"


def whitened_hmc(
    vae: TrainedVAE, step_size: float, num_steps: int, burn_in: int = 0
) -> Callable[..., BatchedHMC]:
    """HMC in the metric of the training set's mean posterior variance, for :class:`MCMCDefence`.

    Args:
        vae: a trained VAE, which carries that variance.
        step_size: at the start; it adapts during the warm-up.
        num_steps: leapfrog steps of a transition.
        burn_in: gradients of microcanonical dynamics before the first transition.
    """
    return functools.partial(
        BatchedHMC,
        step_size=step_size,
        num_steps=num_steps,
        inverse_mass_matrix=vae.mean_posterior_variance,
        burn_in=burn_in,
    )


def named_defence(
    vae: TrainedVAE,
    name: str,
    config: AttackConfig | CompareConfig,
    radius: float | None = None,
    unknown_radius: Callable[[], UnknownRadius] | None = None,
) -> Any:
    """The defence or control of a name; see
    :class:`~pyro_vae_defence.experiments.config.CompareConfig`.

    Args:
        vae: a trained VAE.
        name: such as ``aware_0.2``.
        config: settings of chains; a name with ``@TRANSITIONS`` overrules the lengths.
        radius: what a name without a radius assumes, as ``aware`` does.
        unknown_radius: what ``aware_unknown`` assumes, asked for when needed.

    Raises:
        ValueError: for an unknown name, or one that assumes a radius it is not given.
    """
    kind, assumed, transitions = defence_spec(name)
    delta = radius if assumed is None else assumed
    if (kind in WITH_RADIUS and delta is None) or (
        kind == "aware_unknown" and unknown_radius is None
    ):
        raise ValueError(f"{name!r} assumes a radius; name it, as in 'aware_0.2'")
    if kind in CHAINS:
        kernel = whitened_hmc(vae, config.step_size, config.num_steps, config.burn_in)
        lengths = (config.num_samples, config.warmup_steps, config.num_chains)
        if transitions is not None:
            lengths = (transitions - transitions // 2, transitions // 2, 1)
        assumes: Perturbation | None = None
        if kind == "aware_unknown":
            assert unknown_radius is not None
            assumes = unknown_radius()
        elif kind == "aware" and delta:
            assumes = Linf(delta)
        return MCMCDefence(vae, kernel, *lengths, perturbation=assumes)
    if kind in MODES:
        ball = Linf(delta) if kind == "aware_mode" and delta else None
        return PosteriorModeDefence(vae, "lbfgs", MODE_STEPS, initial="mean", perturbation=ball)
    if kind == "none":
        return NoDefence(vae)
    filters: dict[str, Any] = {
        "encoder_samples": None,
        "median": median_filter,
        "gaussian": gaussian_filter,
    }
    clips: dict[str, Any] = {"dark_clip": clip_dark_pixels, "extreme_clip": clip_extreme_pixels}
    if kind in clips:
        return EncoderDefence(vae, preprocess=functools.partial(clips[kind], delta=delta))
    return EncoderDefence(vae, preprocess=filters[kind])
