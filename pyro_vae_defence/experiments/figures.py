r"""Figures 5, 10, 11, 12 and 16: what an attacker knows, and what an attacker maximises.

Section ``knowledge`` (section 4.4, C.3). Two attackers maximise :math:`\|\tilde z^a - \tilde
z^r\|^2` (eq. 64) in L_inf balls, with :math:`\tilde z^a, \tilde z^r \sim q^{(t)}` (eqs. 65, 66):
the one of ``without_mcmc`` with t = 0, against the guide alone, the one of ``with_mcmc`` with the t
transitions of the defence, by gradients of :mod:`pyro_vae_defence.attacks.adaptive`, of whose
results the one with the largest objective on fresh chains is kept, image by image. :math:`\tilde
z^r` enters by its mean, since

.. math::
    E\|\tilde z^a - \tilde z^r\|^2 = E\|\tilde z^a - E\tilde z^r\|^2
    + \mathrm{tr}\,\mathrm{Var}(\tilde z^r).

Section ``objectives`` (C.6). All that an attacker may maximise, unsupervised, and supervised
towards the image of another class, with one optimiser and budget.

Every attack leaves a *cell* of means over images with 95% intervals:

- ``ms_ssim``: similarity of the reference to the attacked image (``images``), and of the
  reference's reconstruction, one undefended draw, to the attacked image's, ``undefended`` and
  ``defended`` by HMC on the paper's target;
- ``unchanged``: how often the class is what the undefended model gives the reference;
- ``symmetric_kl`` of the guides at reference and attacked image, in nats;
- supervised, ``target_ms_ssim`` and ``target_symmetric_kl``: the same to the target;
- in ``knowledge``, ``examples``: a picture of the first images, and below them both
  reconstructions.
"""

from __future__ import annotations

import base64
import io
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pyro_vae_defence import attacks, metrics, plots
from pyro_vae_defence.attacks import adaptive
from pyro_vae_defence.defence import DefenceResult, DefendedClassifier, MCMCDefence, Reading
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments import study, tables
from pyro_vae_defence.experiments.defences import Setting, colour, label, make_defence
from pyro_vae_defence.experiments.drawing import interval_curve, legend_below, new_figure
from pyro_vae_defence.experiments.study import Cell, Key, Measurement
from pyro_vae_defence.models import program
from pyro_vae_defence.ops import divergences
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.robustness import WhiteBox
from pyro_vae_defence.types import PreparedObjective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATTACKERS = {"without_mcmc": "does not know the defence", "with_mcmc": "knows the defence"}
KINDS = ("unsupervised", "supervised")

Gradient = Literal["bpda", "truncated", "equilibrium"]
AttackObjective = Literal[
    "symmetric_kl", "forward_kl", "reverse_kl", "mean_distance", "squared_wasserstein", "output",
    "cross_entropy",
]  # fmt: skip


def _names_from(known: tuple[str, ...]) -> conf.Mark:
    return conf.must_be(
        f"a tuple of names from {known}",
        lambda value: isinstance(value, tuple) and value and all(each in known for each in value),
    )


def _are_radii(value: Any) -> bool:
    numbers = isinstance(value, tuple) and all(isinstance(each, (int, float)) for each in value)
    return numbers and all(0 < each <= 1 for each in value)


_radii = conf.must_be("a tuple of radii in (0, 1], the range of images", _are_radii)
_Radii = Annotated[tuple[conf.AttackRadius, ...], _radii]


@dataclass(frozen=True)
class FiguresConfig(conf.Configuration):
    """Figures 5, 10, 11, 12 and 16 of the paper: attackers that know the defence or not, and what
    attacks maximise.

    The defaults make one dataset a matter of minutes on one thread.

    Args:
        model: name of a trained model; the classifier is the one of its name.
        radii: L_inf radii of the attackers that do or do not know the defence, in units of the
            image range.
        gradients: of the attacker who does: ``bpda``, ``truncated``, ``equilibrium``, see
            :mod:`pyro_vae_defence.attacks.adaptive`. All are tried and the best result is kept,
            image by image.
        attack_chains: chains per image that this attacker averages over, and draws of the guide for
            the other one.
        persistent_transitions: transitions of these chains per step; they go on from the last step.
        unrolled_transitions: how many of the last transitions ``truncated`` differentiates.
        objectives: what is compared, ``output`` being maximum damage or the targeted output attack;
            see :mod:`pyro_vae_defence.attacks.objectives`.
        objective_radii: L_inf radii of these attacks.
        engine: optimiser of :mod:`pyro_vae_defence.attacks`, of all attacks.
        attack_steps: its steps.
        num_images: class-stratified test images, not one more than a multiple of the classes: the
            target of an image is the image before it.
        num_examples: of these, the first ones, that are kept to be shown.
        reading: how the classifier reads the defence's draws, see
            :mod:`pyro_vae_defence.defence.classifier`.
        chain: of the defence, one per image without a burn-in, which attackers cannot unroll.
        seed: seed of images, attacks and defences.
    """

    model: str
    radii: _Radii = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    gradients: Annotated[tuple[Gradient, ...], _names_from(get_args(Gradient))] = (
        "bpda",
        "equilibrium",
    )
    attack_chains: Annotated[int, conf.at_least(2)] = 8
    persistent_transitions: conf.Count = 1
    unrolled_transitions: conf.Count = 1
    objectives: Annotated[tuple[AttackObjective, ...], _names_from(get_args(AttackObjective))] = (
        get_args(AttackObjective)
    )
    objective_radii: _Radii = (0.1, 0.2)
    engine: conf.Engine = "MomentumPGD"
    attack_steps: conf.Count = 50
    num_images: Annotated[int, conf.at_least(2)] = 20
    num_examples: int = 2
    reading: Reading = "reencoded"
    chain: conf.ChainConfig = conf.ChainConfig(num_samples=5, warmup_steps=20)
    seed: conf.Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_examples <= self.num_images:
            raise ValueError(
                f"num_examples must lie in 1..num_images = {self.num_images}, got "
                f"{self.num_examples!r}"
            )
        for name, only in (("num_chains", 1), ("burn_in", 0)):
            if (value := getattr(self.chain, name)) != only:
                raise ValueError(
                    f"chain.{name} must be {only}, for attackers who unroll the chain, got {value}"
                )


class Figures(Measurement[FiguresConfig]):
    """Attackers' knowledge and objectives, by the name of the dataset."""

    kind = command = "figures"
    noun = "figures"
    names = {dataset: FiguresConfig(f"{dataset}_vae") for dataset in ("mnist", "fashion_mnist")}
    output = "runs/figures"
    parts = ("clean", "knowledge", "objectives")

    def load(self) -> None:
        """The model, its classifier, and references ``(N, C, H, W)``."""
        config = self.config
        self.vae, card = self.load_conv_vae(config.model)
        self.classifier = self.load_classifier(f"{config.model}_classifier")
        dataset = card.dataset
        self.x_ref, labels = self.choose(dataset, config.num_images, "references")
        self.labels = labels[:, 0]
        # What supervised attacks aim at: of every image the image before it.
        self.target = self.x_ref.roll(1, 0)
        if bool((self.labels == self.labels.roll(1)).any()):
            raise ValueError(
                f"num_images={config.num_images} leaves an image whose target is of its own class; "
                "ask for one more"
            )

    def cells(self) -> Iterator[Cell]:
        """No attack, a cell per radius and attacker, and per radius, kind and objective."""
        yield ("clean", "reference"), lambda: self._cell("clean", self.x_ref, examples=True)
        config, product = self.config, itertools.product
        for radius, attacker in product(config.radii, ATTACKERS):
            key: Key = ("knowledge", f"{radius:g}", attacker)
            yield key, partial(self.knowledge, attacker, radius)
        for radius, kind, name in product(config.objective_radii, KINDS, config.objectives):
            key = ("objectives", f"{radius:g}", kind, name)
            yield key, partial(self.objective, kind, name, radius)

    def knowledge(self, attacker: str, radius: float) -> dict[str, Any]:
        """One attacker of Figures 5, 10, 11 and 12 at one radius."""
        gradients = self.config.gradients if attacker == "with_mcmc" else ("exact",)
        objectives = {}
        for gradient in gradients:
            purpose = f"{attacker} {gradient} {radius:g}"
            generator = self.generator(purpose, "objective")
            objectives[purpose] = self.latent_distance(gradient, generator)
        started = time.perf_counter()
        found = [self.attack(each, radius, purpose) for purpose, each in objectives.items()]
        seconds = (time.perf_counter() - started) / len(self.x_ref)
        winner = torch.cat([each.objective for each in found]).argmax(0)
        x_adv = torch.cat([each.x_adv for each in found])[
            winner, torch.arange(len(winner), device=winner.device)
        ]
        return {
            **self._cell(f"{attacker} {radius:g}", x_adv, examples=True),
            "strongest": {name: int((winner == i).sum()) for i, name in enumerate(gradients)},
            "attack_seconds_per_image": seconds,
        }

    def objective(self, kind: str, name: str, radius: float) -> dict[str, Any]:
        """One objective of Figure 16 at one radius."""
        purpose, supervised = f"{kind} {name} {radius:g}", kind == "supervised"
        found = self.attack(self._prepared(name, supervised), radius, purpose)
        return self._cell(purpose, found.x_adv[0], supervised)

    def attack(
        self, objective: PreparedObjective, radius: float, purpose: str
    ) -> attacks.AttackResult:
        """The references attacked from one random start."""
        config = self.config
        engine = getattr(attacks, config.engine)
        # Objectives with chains of their own see all images at once.
        attack = engine(objective, Linf(radius), num_steps=config.attack_steps, batch_size=2**31)
        return attack(self.x_ref, self.generator(purpose, "attack"))

    def _cell(
        self, purpose: str, x: Tensor, supervised: bool = False, examples: bool = False
    ) -> dict[str, Any]:
        """What is measured of images ``x`` that stem from the references."""
        defence = self.hmc()
        run = defence(x, self.generator(purpose, "defended"))
        behind = DefendedClassifier(defence, self.classifier, self.config.reading)
        predicted = {
            "undefended": self.classifier.classify(self.vae, x),
            "defended": behind.log_probabilities(run).argmax(-1),
        }
        reference = self.classifier.classify(self.vae, self.x_ref)
        before = self.reconstruct(self.vae, self.x_ref, "before")
        after = {
            "undefended": self.reconstruct(self.vae, x, purpose, "undefended"),
            "defended": run.reconstruction,
        }

        def divergence(reference: Tensor) -> dict[str, float]:
            with torch.no_grad():
                q, q_ref = (program.posterior(self.vae, images) for images in (x, reference))
                return study.interval(divergences.symmetric_kl(q, q_ref))

        def similar(before: Tensor) -> dict[str, Any]:
            return {name: study.similarity(before, decoded) for name, decoded in after.items()}

        cell: dict[str, Any] = {
            "ms_ssim": {"images": study.similarity(self.x_ref, x), **similar(before)},
            "unchanged": {
                name: study.share(metrics.adversarial_accuracy(reference, found))
                for name, found in predicted.items()
            },
            "symmetric_kl": divergence(self.x_ref),
        }
        if supervised:
            cell["target_ms_ssim"] = similar(before.roll(1, 0))
            cell["target_symmetric_kl"] = divergence(self.target)
        if examples:
            rows = [images[: self.config.num_examples] for images in (x, *after.values())]
            cell["examples"] = plots.picture(rows)
        return cell

    # --- What attackers maximise ---

    def _prepared(self, name: str, supervised: bool) -> PreparedObjective:
        """An objective of Table 1 or C.6 by name."""
        target = self.target if supervised else None
        if name == "cross_entropy":
            # Unsupervised, away from the class predicted at the reference.
            targets = self.labels.roll(1) if supervised else None
            return attacks.cross_entropy(self.vae, self.classifier, targets=targets)
        if name != "output":
            return getattr(attacks, name)(self.vae, target)
        if target is None:
            return attacks.maximum_damage(self.vae)
        return attacks.targeted_output(self.vae, target)

    def latent_distance(self, gradient: str, generator: torch.Generator) -> PreparedObjective:
        """Equation 64: ``"exact"`` of the guide alone, else of the defended one by a gradient."""
        number, box = self.config.attack_chains, self._box
        if gradient == "exact":
            score = adaptive.latent_distance(partial(program.posterior_mean, self.vae))
            encode = adaptive.transfer(box.start)
            return adaptive.expected(encode, score, number, generator=generator)
        mean = {name: value.mean((0, 1)) for name, value in self._defended.samples.items()}
        score = adaptive.latent_distance(lambda x: lat.repeat(mean, number))
        # With the step size that the defence arrives at.
        step_size = float(self._defended.sample_stats["step_size"].median())
        resume = box.transitions(self.config.persistent_transitions, step_size)
        if gradient == "equilibrium":
            return adaptive.equilibrium(
                box.start, box.chain, box.energy, score, number, resume=resume, generator=generator
            )
        if gradient == "bpda":
            encode = adaptive.bpda(box.start, box.chain, resume)
        else:
            last = box.transitions(self.config.unrolled_transitions, step_size)
            encode = adaptive.truncated(box.start, box.chain, last, resume)
        return adaptive.expected(encode, score, number, persistent=True, generator=generator)

    # --- The defence ---

    def hmc(self, num_chains: int = 1) -> MCMCDefence:
        """HMC on the paper's target, in the metric of the mean posterior variance."""
        chain = replace(self.config.chain, num_chains=num_chains)
        return make_defence("hmc", Setting(self.vae, chain))

    @cached_property
    def _defended(self) -> DefenceResult:
        """The references behind the defence, in as many chains as the attacker has."""
        defence = self.hmc(self.config.attack_chains)
        return defence(self.x_ref, self.generator("references defended"))

    @cached_property
    def _box(self) -> WhiteBox:
        return WhiteBox(self.vae, self.hmc(), self.x_ref)

    # --- Tables and figures ---

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """Budgets, figures, a table of attackers and one per radius and kind of objectives."""
        config, chain = result["config"], result["config"]["chain"]
        note = (
            f"{config['num_images']} images, model `{config['model']}`, seed {config['seed']}; "
            f"L_inf balls. Every attack: {config['attack_steps']} steps of {config['engine']} from "
            "one random start. Defence: one HMC chain per image on the paper's target, "
            f"{chain['warmup_steps']} + {chain['num_samples']} transitions of 1 to "
            f"{2 * chain['num_steps']} leapfrog steps, whitened; its last draw is decoded, "
            f"classes are read by `{config['reading']}`. {result['metric']} of reconstructions is "
            "to one undefended draw at the reference. "
            "95% intervals over images. Heuristic, not certified."
        )
        lines = []
        for figure in figures:
            lines += [f"![{_text(result, Path(figure).stem)}]({figure})", ""]
        lines += [*_knowledge_table(result), *_objectives_tables(result)]
        return tables.section(f"## {result['name']}", note, lines, result)

    @classmethod
    def figures(cls, result: dict[str, Any]) -> dict[str, Figure]:
        """Figures 5, 10 and 11 in one, 12, and 16."""
        return {
            "knowledge": knowledge_figure(result),
            "examples": examples_figure(result),
            **{f"objectives_{kind}": objectives_figure(result, kind) for kind in KINDS},
        }


# --- Tables ---------------------------------------------------------------------------------------

_DEFENCES = {"undefended": label("none"), "defended": label("hmc")}
_COLOURS = {"undefended": colour("none"), "defended": colour("hmc")}
_SHOWN = {"images": "image", **_DEFENCES}

# (attacker, reconstructions) -> where the paper shows it.
_PANELS = {
    ("without_mcmc", "undefended"): "Figure 10 (a)",
    ("without_mcmc", "defended"): "Figures 10 (b), 5 (a)",
    ("with_mcmc", "undefended"): "not in the paper",
    ("with_mcmc", "defended"): "Figures 11, 5 (b)",
}


class _Measure(NamedTuple):
    """A quantity of cells: key, title, where a successful attack moves it, digits printed."""

    key: str
    title: str
    direction: str
    digits: int = 3

    def of(self, cell: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Name of the reconstruction or ``""`` -> entry, as the cell has it."""
        found = tables.at(cell, self.key) or {}
        if "estimate" in found:
            return {"": found}
        return {key: entry for key, entry in found.items() if key != "images"}


_MEASURES = (
    _Measure("ms_ssim/images", "images: reference, attacked", "↑"),
    _Measure("ms_ssim", "reconstructions: reference, attacked", "↓"),
    _Measure("symmetric_kl", "symmetric KL to the reference (nats)", "↑", 1),
    _Measure("unchanged", "class unchanged", "↓"),
    _Measure("target_ms_ssim", "reconstructions: target, attacked", "↑"),
    _Measure("target_symmetric_kl", "symmetric KL to the target (nats)", "↓", 1),
)


def _knowledge_table(result: dict[str, Any]) -> list[str]:
    config, metric = result["config"], result["metric"]
    columns = [
        "radius", "attacker", f"{metric}: images",
        *(f"reconstructions, {name}" for name in _DEFENCES.values()),
        *(f"class unchanged, {name}" for name in _DEFENCES.values()),
        "symmetric KL (nats)", "seconds per image of the attack", "best gradient, images",
    ]  # fmt: skip
    rows = [["0", "none", *_values(result["clean"]["reference"]), "", ""]]
    for radius, cells in result["knowledge"].items():
        for attacker, cell in cells.items():
            seconds = f"{cell['attack_seconds_per_image']:.2g}"
            strongest = ", ".join(f"{name} {count}" for name, count in cell["strongest"].items())
            rows.append([radius, ATTACKERS[attacker], *_values(cell), seconds, strongest])
    return [
        "### Attackers with and without knowledge of the defence (Figures 5, 10, 11)",
        "",
        f"Both maximise eq. 64, the one without knowledge over {config['attack_chains']} draws of "
        f"the guide per image and step, the other over {config['attack_chains']} chains, which go "
        f"on from the last step for {config['persistent_transitions']} transition(s), by each of "
        f"the gradients {', '.join(config['gradients'])}, of whose results the one with the "
        "largest objective on fresh chains is kept, image by image.",
        "",
        *tables.table(columns, rows, [*columns[:2], *columns[3:6]]),
    ]


def _values(cell: dict[str, Any]) -> list[str]:
    """Similarities, classes and divergence as :func:`_knowledge_table` orders them."""
    places = [f"ms_ssim/{name}" for name in _SHOWN] + [f"unchanged/{name}" for name in _DEFENCES]
    return [*tables.intervals(cell, *places), *tables.intervals(cell, "symmetric_kl", digits=1)]


def _objectives_tables(result: dict[str, Any]) -> Iterator[str]:
    yield "### Objectives (Figure 16)"
    yield ""
    for radius, kinds in result["objectives"].items():
        for kind, cells in kinds.items():
            yield f"Radius {radius}, {kind}; arrows show where a successful attack moves a figure."
            yield ""
            some = next(iter(cells.values()))
            columns = [
                f"{measure.title}{f', {_DEFENCES[name]}' if name else ''} {measure.direction}"
                for measure in _MEASURES
                for name in measure.of(some)
            ]
            rows = [[_label(name)] for name in cells]
            for row, cell in zip(rows, cells.values(), strict=True):
                for measure in _MEASURES:
                    found = measure.of(cell).values()
                    row += [tables.interval(entry, measure.digits) for entry in found]
            yield from tables.table(["objective", *columns], rows, ["objective", *columns[1:5]])


def _label(objective: str) -> str:
    return objective.replace("_", " ").replace("kl", "KL").replace("wass", "Wass")


# --- Figures --------------------------------------------------------------------------------------


def knowledge_figure(result: dict[str, Any]) -> Figure:
    """Similarity of images (black) and reconstructions over the radius (Figures 5, 10, 11)."""
    figure = new_figure(8, 6.5)
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for axes, ((attacker, defence), place) in zip(panels, _PANELS.items(), strict=True):
        found = {0.0: result["clean"]["reference"]} | {
            float(radius): cells[attacker]
            for radius, cells in result["knowledge"].items()
            if attacker in cells
        }
        for name, text, color in (
            ("images", "images", "black"),
            (defence, f"reconstructions, {_DEFENCES[defence]}", _COLOURS[defence]),
        ):
            entries = [cell["ms_ssim"][name] for cell in found.values()]
            interval_curve(axes, list(found), entries, text, color)
        floor = result["clean"]["reference"]["ms_ssim"]["undefended"]["estimate"]
        axes.axhline(floor, color="gray", lw=1, ls=":", label="two draws at the reference")
        title = f"attacker {ATTACKERS[attacker]};\n{_DEFENCES[defence]} ({place})"
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0, 1.02)
    for axes in figure.axes[2:]:
        axes.set_xlabel("radius of the attack")
    for axes in figure.axes[::2]:
        axes.set_ylabel(result["metric"])
    legend_below(figure, *figure.axes, columns=2)
    return figure


def examples_figure(result: dict[str, Any]) -> Figure:
    """Attacked images and their reconstructions over the radius, a row per attacker (Figure 12)."""
    number = result["config"]["num_examples"]
    width, height = 0.6 * number + 0.1, 0.6 * len(_SHOWN) + 0.35
    columns = {"reference": dict.fromkeys(ATTACKERS, result["clean"]["reference"])}
    columns |= {f"radius {radius}": cells for radius, cells in result["knowledge"].items()}
    size = (len(columns) * width + 2.2, len(ATTACKERS) * height)
    from matplotlib.image import imread

    figure = new_figure(*size)
    grid = figure.subplots(len(ATTACKERS), len(columns), squeeze=False)
    for panels, (attacker, title) in zip(grid, ATTACKERS.items(), strict=True):
        for axes, (column, cells) in zip(panels, columns.items(), strict=True):
            axes.set(xticks=[], yticks=[])
            axes.set_title(column, fontsize=9)
            if attacker in cells:
                pixels = imread(io.BytesIO(base64.b64decode(cells[attacker]["examples"])))
                axes.imshow(pixels)
        tile = pixels.shape[0] / len(_SHOWN)
        centres = [(place + 0.5) * tile for place in range(len(_SHOWN))]
        panels[0].set_yticks(centres, list(_SHOWN.values()), fontsize=9)
        panels[0].set_ylabel(f"attacker\n{title}", fontsize=9)
    return figure


def objectives_figure(result: dict[str, Any], kind: str) -> Figure:
    """What each objective of a kind does (Figure 16): a panel per measure."""
    objectives = result["config"]["objectives"]
    markers = dict(zip(result["objectives"], itertools.cycle("os^vD")))
    found = {measure: _series(result, kind, measure) for measure in _MEASURES}
    found = {measure: series for measure, series in found.items() if series}
    rows = max(1, -(-len(found) // 2))
    figure = new_figure(8, 0.6 + 3 * rows)
    grid = figure.subplots(rows, 2, sharey=True, squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.set_axis_off()
    for (measure, series), axes in zip(found.items(), grid.flat):
        for number, ((radius, name), points) in enumerate(series.items()):
            shift = 0.6 * ((number + 0.5) / len(series) - 0.5)
            low, estimate, high = (
                torch.tensor([entry[key] for entry in points.values()])
                for key in ("low", "estimate", "high")
            )
            error = torch.stack([estimate - low, high - estimate]).clamp(min=0)
            text = ", ".join(filter(None, (_DEFENCES.get(name), f"radius {radius}")))
            color = _COLOURS.get(name, "black")
            style: dict[str, Any] = {"fmt": markers[radius], "color": color, "ms": 5, "lw": 1.2}
            places = [place + shift for place in points]
            axes.errorbar(estimate, places, xerr=error.numpy(), label=text, **style)
        axes.set_title(f"{measure.title} {measure.direction}", fontsize=10)
        axes.set_yticks(range(len(objectives)), [_label(name) for name in objectives])
        axes.set_ylim(len(objectives) - 0.5, -0.5)
    legend_below(figure, *figure.axes)
    return figure


def _series(
    result: dict[str, Any], kind: str, measure: _Measure
) -> dict[tuple[str, str], dict[int, dict[str, float]]]:
    """Radius and defence -> number of the objective -> entry, as far as a run has come."""
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for radius, kinds in result["objectives"].items():
        for place, objective in enumerate(result["config"]["objectives"]):
            for name, entry in measure.of(kinds.get(kind, {}).get(objective, {})).items():
                found.setdefault((radius, name), {})[place] = entry
    return found


def _text(result: dict[str, Any], stem: str) -> str:
    """What is seen in a figure, by the end of its name."""
    name, radii = result["name"], [radius for radius, cells in result["knowledge"].items() if cells]
    if stem.endswith("_examples"):
        return (
            f"Rows of small images of {name}: attacked images, and below each its reconstruction "
            "without and with the defence; above by an attacker who does not know the defence, "
            "below by one who does; from left to right the radius grows from 0."
        )
    if stem.endswith("_knowledge"):
        ends = [
            f"{_DEFENCES[defence]}, attacker {ATTACKERS[attacker]} "
            f"{cells['ms_ssim'][defence]['estimate']:.3f}"
            for attacker, cells in (result["knowledge"][radii[-1]] if radii else {}).items()
            for defence in _DEFENCES
        ]
        return (
            f"Four panels of curves over the radius on {name}: the similarity of images in black, "
            "of reconstructions in blue without and in orange with the defence. "
            f"Reconstructions at radius {radii[-1] if radii else 0}: {', '.join(ends)}."
        )
    return (
        f"Points with intervals on {name}, one row per objective of the attack, one panel per "
        "measure: blue without, orange with the defence, black what both share; circles for the "
        "first radius, squares for the next."
    )
