"""Defences and controls by name: how studies make them, and what tables call them.

A name is ``KIND``, ``KIND_RADIUS`` for what assumes a radius, or ``KIND@TRANSITIONS`` for one chain
of so many transitions, half of them warm-up, as in ``aware_0.2@20``. What assumes a radius and
names none assumes the attack's own. A new defence or control is one entry of :data:`KINDS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

from pyro_vae_defence.defence import (
    Defence,
    EncoderDefence,
    MCMCDefence,
    NoDefence,
    PosteriorModeDefence,
    clip_dark_pixels,
    clip_extreme_pixels,
    gaussian_filter,
    median_filter,
)
from pyro_vae_defence.defence.mcmc import PAPER_SETTINGS, RECOMMENDED_KERNEL
from pyro_vae_defence.experiments.configuration import ChainConfig, Mark, one_of
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS
from pyro_vae_defence.models.perturbation import Perturbation, UnknownRadius
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.types import VAE, LatentsLike

MODE_STEPS = 30
"""Gradients of a search for the posterior mode by L-BFGS."""


@dataclass(frozen=True)
class Setting:
    """What a defence is made with besides its name.

    Args:
        vae: the model it runs on.
        chain: settings of chains.
        metric: diagonal of their inverse mass matrix; the VAE's ``mean_posterior_variance`` if
            ``None``.
        radius: what a name without a radius assumes.
        unknown_radius: what ``aware_unknown`` assumes, asked for when needed.
        paper: whose published setting ``paper`` is, a key of
            :data:`~pyro_vae_defence.defence.mcmc.PAPER_SETTINGS`.
        batch_size: most rows at a time, of any defence; its own default when ``None``.
        options: further arguments of :class:`~pyro_vae_defence.defence.MCMCDefence`.
    """

    vae: VAE
    chain: ChainConfig
    metric: LatentsLike | None = None
    radius: float | None = None
    unknown_radius: Callable[[], UnknownRadius] | None = None
    paper: str | None = None
    batch_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, int]:
        """The argument that every defence takes."""
        return {} if self.batch_size is None else {"batch_size": self.batch_size}


def whitened(kernel: Any, setting: Setting, **more: Any) -> Callable[..., Any]:
    """A kernel in the metric of the setting, for :class:`~pyro_vae_defence.defence.MCMCDefence`."""
    metric = setting.metric
    if metric is None:
        metric = setting.vae.mean_posterior_variance  # type: ignore[attr-defined]
    chain = {"step_size": setting.chain.step_size, "burn_in": setting.chain.burn_in}
    return partial(kernel, inverse_mass_matrix=metric, **chain, **more)


def _chains(
    setting: Setting,
    assumed: Perturbation | None,
    transitions: int | None,
    kernel: Any = BatchedHMC,
    **more: Any,
) -> MCMCDefence:
    chain = setting.chain
    own = {"num_steps": chain.num_steps} if kernel is BatchedHMC else {}
    lengths = (chain.num_samples, chain.warmup_steps, chain.num_chains)
    if transitions is not None:
        lengths = (transitions - transitions // 2, transitions // 2, 1)
    moves, options = whitened(kernel, setting, **own), setting.rows | setting.options | more
    return MCMCDefence(setting.vae, moves, *lengths, perturbation=assumed, **options)


def _recommended(setting: Setting, assumed: Perturbation | None, _: int | None) -> Defence:
    options = setting.rows | setting.options
    if setting.metric is not None:
        moves = partial(BatchedHMC, inverse_mass_matrix=setting.metric, **RECOMMENDED_KERNEL)
        options = {"kernel": moves, **options}
    return MCMCDefence.recommended(setting.vae, assumed, **options)


def _mode(setting: Setting, assumed: Perturbation | None, _: int | None) -> Defence:
    how: dict[str, Any] = {"initial": "mean", "perturbation": assumed, **setting.rows}
    return PosteriorModeDefence(setting.vae, "lbfgs", MODE_STEPS, **how)


def _paper(setting: Setting, *_: Any) -> Defence:
    if setting.paper is None:
        raise ValueError("'paper' is a setting per dataset; name it in Setting(paper=...)")
    return MCMCDefence.paper(setting.vae, setting.paper, **setting.rows, **setting.options)


def _filtered(preprocess: Any, setting: Setting, *_: Any) -> Defence:
    return EncoderDefence(setting.vae, preprocess=preprocess, **setting.rows)


def _clipped(clip: Any, setting: Setting, assumed: Any, _: int | None) -> Defence:
    delta = 0.0 if assumed is None else assumed.radius
    return EncoderDefence(setting.vae, preprocess=partial(clip, delta=delta), **setting.rows)


class Kind(NamedTuple):
    """One kind of defence or control.

    Attributes:
        label: what tables call it.
        make: from setting, assumed perturbation (``None`` for radius 0) and number of transitions.
        role: a control stands for what a defence has to beat.
        radius: whether it assumes a radius.
        chain: whether it is a chain, whose transitions a name may fix.
    """

    label: str
    make: Callable[[Setting, Any, int | None], Defence]
    role: Literal["none", "defence", "control"] = "defence"
    radius: bool = False
    chain: bool = False


def _control(label: str, make: Any, radius: bool = False) -> Kind:
    return Kind(f"control: {label}", make, "control", radius)


KINDS: dict[str, Kind] = {
    "none": Kind("no defence", lambda set_up, *_: NoDefence(set_up.vae, **set_up.rows), "none"),
    "recommended": Kind("MCMCDefence.recommended", _recommended, radius=True),
    "paper": Kind("HMC, the paper's setting", _paper),
    "hmc": Kind("HMC, the paper's target", _chains, chain=True),
    "nuts": Kind("NUTS, the paper's target", partial(_chains, kernel=BatchedNUTS), chain=True),
    "aware": Kind("HMC, perturbation-aware", _chains, radius=True, chain=True),
    "annealed": Kind(
        "HMC, perturbation-aware, from annealed starts",
        partial(_chains, initial="annealed"),
        radius=True,
        chain=True,
    ),
    "aware_unknown": Kind("HMC, perturbation-aware, radius unknown", _chains, chain=True),
    "aware_mode": Kind("mode, perturbation-aware", _mode, radius=True),
    "mode": _control("mode of the paper's target", _mode),
    "encoder_samples": _control("mean of encoder samples", partial(_filtered, None)),
    "dark_clip": _control("dark-pixel clipping", partial(_clipped, clip_dark_pixels), True),
    "extreme_clip": _control(
        "dark- and bright-pixel clipping", partial(_clipped, clip_extreme_pixels), True
    ),
    "median": _control("median filter", partial(_filtered, median_filter)),
    "gaussian": _control("Gaussian filter", partial(_filtered, gaussian_filter)),
}
"""Defences and controls by name."""

_NAME = re.compile(r"(?P<kind>[a-z_]+?)(_(?P<radius>\d+\.?\d*|\.\d+))?(@(?P<transitions>\d+))?")


class DefenceSpec(NamedTuple):
    """What a name such as ``aware_0.1@20`` stands for."""

    kind: str
    radius: float | None
    transitions: int | None

    @property
    def role(self) -> str:
        """``"none"``, ``"defence"`` or ``"control"``."""
        return KINDS[self.kind].role


def defence_spec(name: str) -> DefenceSpec:
    """Read the name of a defence or control.

    Raises:
        ValueError: if it names none.
    """
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    if found and (kind := KINDS.get(found["kind"])):
        radius = None if found["radius"] is None else float(found["radius"])
        transitions = None if found["transitions"] is None else int(found["transitions"])
        radius_fits = radius is None or (kind.radius and radius <= 1)
        transitions_fit = transitions is None or (kind.chain and transitions > 1)
        if radius_fits and transitions_fit:
            return DefenceSpec(found["kind"], radius, transitions)
    with_radius = ", ".join(f"{name}_RADIUS" for name, kind in KINDS.items() if kind.radius)
    raise ValueError(
        f"no defence is called {name!r}; known are {', '.join(KINDS)}, {with_radius} and "
        "KIND@TRANSITIONS for chains"
    )


def known_defence(
    published: bool = False, unknown_radius: bool = False, attack_radius: bool = True
) -> Mark:
    """A defence's name in a configuration, as an annotation of ``str``.

    Args:
        published: whether the configuration says whose setting ``paper`` is.
        unknown_radius: whether the study knows what ``aware_unknown`` assumes.
        attack_radius: whether a name without a radius may assume the attack's.
    """

    def check(name: str, value: Any) -> None:
        try:
            kind, radius, _ = defence_spec(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if kind == "paper" and not published:
            why = "'paper' is a setting per dataset, which the study defend knows"
            raise ValueError(f"{name}: {why}")
        if (kind == "aware_unknown" and not unknown_radius) or (
            KINDS[kind].radius and radius is None and not attack_radius
        ):
            raise ValueError(f"{name}: {value!r} assumes a radius; name it, as in 'aware_0.2'")

    return check


Published = Annotated[str, known_defence(published=True)]
"""Name of a defence in a study that knows whose setting ``paper`` is."""

PaperName = Annotated[str, one_of(PAPER_SETTINGS)]
"""Of a published setting of the defence."""


def check_published(dataset: str) -> None:
    """Raise a ``ValueError`` if the paper has no setting for a dataset."""
    if dataset not in PAPER_SETTINGS:
        known = ", ".join(PAPER_SETTINGS)
        raise ValueError(f"no published setting for {dataset!r}: set paper to one of {known}")


def label(name: str) -> str:
    """What a table calls a defence."""
    kind, radius, transitions = defence_spec(name)
    text = KINDS[kind].label
    if KINDS[kind].radius:
        text += " δ = radius" if radius is None else f" δ = {radius:g}"
    return text if transitions is None else f"{text}, {transitions} transitions"


def chained(name: str) -> bool:
    """Whether a defence runs the chains of a configuration."""
    return KINDS[defence_spec(name).kind].chain


def chain_words(chain: Mapping[str, Any]) -> str:
    """Chains in words: from the fields of a
    :class:`~pyro_vae_defence.experiments.configuration.ChainConfig` in a result file."""
    number = chain["num_chains"]
    return (
        f"{number} chain{'' if number == 1 else 's'} of {chain['warmup_steps']} warm-up + "
        f"{chain['num_samples']} kept transitions from step size {chain['step_size']:g}, burn-in "
        f"{chain['burn_in']}"
    )


_COLOURS = {
    "none": "tab:blue", "hmc": "tab:orange", "aware": "tab:green", "aware_unknown": "tab:red",
    "aware_mode": "tab:purple", "aware_0.1": "yellowgreen", "aware_0.2": "darkolivegreen",
    "paper": "gold", "nuts": "teal", "mode": "tab:pink", "encoder_samples": "navy",
    "dark_clip": "tab:brown", "dark_clip_0.2": "peru", "extreme_clip": "black",
    "median": "tab:cyan", "gaussian": "tab:gray", "recommended": "crimson",
    "annealed": "lightseagreen",
}  # fmt: skip


def colour(name: str) -> str:
    """The colour of a defence in every figure; names that have none of their own take that of
    their kind."""
    own = name.partition("@")[0]
    return _COLOURS[own if own in _COLOURS else defence_spec(name).kind]


def make_defence(name: str, setting: Setting) -> Any:
    """The defence or control of a name.

    Raises:
        ValueError: for an unknown name, or one that assumes a radius it is not given.
    """
    kind, assumed, transitions = defence_spec(name)
    delta = setting.radius if assumed is None else assumed
    unknown = kind == "aware_unknown"
    if (KINDS[kind].radius and delta is None) or (unknown and setting.unknown_radius is None):
        raise ValueError(f"{name!r} assumes a radius; name it, as in 'aware_0.2'")
    perturbation: Perturbation | None = None
    if unknown:
        assert setting.unknown_radius is not None
        perturbation = setting.unknown_radius()
    elif KINDS[kind].radius and delta:
        perturbation = Linf(delta)
    return KINDS[kind].make(setting, perturbation, transitions)
