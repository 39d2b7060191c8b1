"""What the whole suite of adaptive attacks leaves of a defence: one result file per model and
radius.

For each target (the similarity of reconstructions, the accuracy of a classifier) and defence, the
report of :func:`~pyro_vae_defence.robustness.evaluate_robustness`: the worst case image by image
over all attacks, scored on seeds that no attack has seen, with the checks that say whether to
believe it. The attacked images are published beside it, one file per report in ``attacked``, for
:func:`~pyro_vae_defence.robustness.rescore`.

Many images are evaluated block by block, a cell each, and tables join the blocks that are there.
The block is the unit: its draws depend on the seed and its number, its gradients stop to be
averaged, and its checks choose their attack, by its own images. Hence a result does not depend on
the number of processes, or on where runs were interrupted, but it is not that of one evaluation of
all images at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from pyro_vae_defence import attacks, plots
from pyro_vae_defence.defence import Defence, DefendedClassifier, Reading
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments import tables
from pyro_vae_defence.experiments.blocks import InBlocks
from pyro_vae_defence.experiments.defences import (
    PaperName,
    Published,
    Setting,
    chain_words,
    chained,
    check_published,
    label,
    make_defence,
)
from pyro_vae_defence.experiments.defend import Defend
from pyro_vae_defence.experiments.html import ROBUST, robustness_page
from pyro_vae_defence.experiments.study import Cell, Key, Measurement, check_place, remembered
from pyro_vae_defence.mcmc.captured import Graph
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.compiled import Recorder
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.files import write_atomically
from pyro_vae_defence.robustness import (
    KNOWLEDGE,
    Budget,
    Fidelity,
    RobustnessReport,
    evaluate_robustness,
    load_attacked,
    save_attacked,
)
from pyro_vae_defence.robustness.cost import chain_cost, suite_gradients

PUBLISHED_BUDGET = replace(Budget.standard(), max_evaluations=17_000)
"""That of the published reports, whose suite had neither an attack on the evidence nor Square."""

Target = Literal["reconstruction", "classification"]
Gradients = Literal["traced", "recorded", "graph"]


@dataclass(frozen=True)
class RobustnessConfig(InBlocks):
    """The whole suite of adaptive attacks against a model without and with defences.

    The defaults make one dataset and radius a matter of tens of minutes on one thread.

    Args:
        model: name of a trained model.
        classifier: name of a classifier of its latents; ``<model>_classifier`` when ``None``.
        radius: L_inf radius of the attack, and what ``aware`` assumes.
        dataset: name of its images; those it was trained on when ``None``.
        defences: names of :mod:`~pyro_vae_defence.experiments.defences`.
        targets: ``reconstruction`` (MSSSIM) and ``classification`` (accuracy).
        attacks: names of :data:`pyro_vae_defence.robustness.KNOWLEDGE`; unrolling whole chains is
            left out.
        engine: optimiser of :mod:`pyro_vae_defence.attacks`.
        reading: how the classifier reads draws, see :mod:`pyro_vae_defence.defence.classifier`.
        num_images: class-stratified test images.
        images_per_cell: most images that are evaluated at a time, at least 2; all when ``None``.
        num_examples: of the first ones, how many are kept as pictures, at most 8.
        chain: of the defences, but for ``paper``.
        paper: whose published setting the defence ``paper`` is; the dataset's when ``None``.
        gradients: of chains that run forwards: ``traced`` runs the model's Python, ``recorded``
            its recorded operations, ``graph`` captures transitions on a GPU, with forces in TF32
            and energies in float32, which is exact.
        budget: how hard the suite tries.
        checks: run the sanity checks, without which a report counts as unreliable.
        defence_seed: a seed that the defence always runs with and attackers know; ``None`` for
            fresh noise in every run.
        earlier: directory of attacked images, ``attacked`` in the output of the same name with
            fewer attacks, from whose reports these go on, those that it has; ``None`` to run all
            attacks.
        seed: seed of images, attacks and defences.
    """

    model: str
    radius: conf.AttackRadius
    classifier: str | None = None
    dataset: conf.Dataset | None = None
    defences: Annotated[tuple[Published, ...], conf.not_empty] = ("none", "hmc", "aware")
    targets: Annotated[tuple[Target, ...], conf.not_empty] = ("reconstruction", "classification")
    attacks: Annotated[tuple[Annotated[str, conf.one_of(KNOWLEDGE)], ...], conf.not_empty] = (
        "transfer", "encoder", "bpda", "equilibrium", "black_box", "implicit", "truncated",
    )  # fmt: skip
    engine: conf.Engine = "APGD"
    reading: Reading = "reencoded"
    num_images: conf.Several = 32
    images_per_cell: conf.Count | None = None
    num_examples: Annotated[int, conf.between(0, 8)] = 8
    chain: conf.ChainConfig = conf.ChainConfig(num_samples=5, warmup_steps=20)
    paper: PaperName | None = None
    gradients: Gradients = "traced"
    budget: Budget = PUBLISHED_BUDGET
    checks: bool = True
    defence_seed: conf.Natural | None = None
    earlier: str | None = None
    seed: conf.Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if "classification" not in self.targets:
            self.refuse_idle("without the target 'classification'", "classifier")
        if "paper" not in self.defences:
            self.refuse_idle("without the defence 'paper'", "paper")


# --- What it costs ----------------------------------------------------------------------------

RATES = (0.3e6, 1.0e6)
"""Gradients of a decoder per second that estimates assume, of a slow and of a fast large GPU."""


def gradients_per_image(config: RobustnessConfig, defence: str) -> dict[str, float]:
    """Decoder gradients per image and target, by
    :func:`~pyro_vae_defence.robustness.cost.suite_gradients`: of the same defence of a model
    without weights, which a chain's length does not depend on."""
    with torch.random.fork_rng(devices=[]):
        stand_in = ConvVAE()
    paper = config.paper or config.model.removesuffix("_vae")
    metric = {"z": torch.ones(stand_in.latent_dim)}
    setting = Setting(stand_in, config.chain, metric, config.radius, paper=paper)
    cost = chain_cost(make_defence(defence, setting))
    size = len(config.blocks[0])
    return suite_gradients(cost, config.budget, size, config.attacks, config.checks)


def estimate(config: RobustnessConfig) -> str:
    """What the largest cell of a configuration costs, and all of them, in words."""
    size = max(map(len, config.blocks))
    of = {name: sum(gradients_per_image(config, name).values()) for name in config.defences}
    largest = max(of.values()) * size
    total = sum(of.values()) * config.num_images * len(config.targets)
    cell, whole = ([gradients / rate for rate in RATES] for gradients in (largest, total))
    return (
        f"largest cell: {size} images, {largest / 1e6:,.1f} million decoder gradients, "
        f"{cell[1]:,.0f} to {cell[0]:,.0f} s at {RATES[1] / 1e6:g} to {RATES[0] / 1e6:g} million "
        f"per second; all cells: {whole[1] / 60:,.0f} to {whole[0] / 60:,.0f} min"
    )


def large_configurations() -> dict[str, RobustnessConfig]:
    """Many images, ``<dataset>_large_<radius>``: 1,000 of the test set, which is not packaged.

    The full budget, 5 restarts, 20 draws and 50 chains, is 1.27 million gradients per image, target
    and chain. Of it 50 chains, 100 steps and 20 scored draws are kept, with 2 restarts and 5 draws:
    0.27 million. Of these the equilibrium gradient takes 116,000 (2 restarts of 50 chains, 100
    steps of about 10 gradients, and twice a whole chain of 115), truncated unrolling 30,000, the
    black box 27,000 in no more than 2 steps of 5 directions, implicit 22,000, BPDA 11,000, scoring
    23,000 and the checks at most 44,000. A cell of 125 images is 34 million, or 34 to 114 seconds
    of a large GPU at 1 to 0.3 million per second, and 1,000 images of one dataset and radius 18 to
    61 minutes; the full budget would take 85 to 283. The largest batch has 125 x 2 x 50 = 12,500
    rows.
    """
    budget = Budget(
        num_restarts=2,
        num_draws=(5,),
        num_chains=50,
        persistent_transitions=1,
        unrolled_transitions=1,
        num_iterations=5,
        num_directions=5,
        black_box_steps=2,
        selection_draws=2,
        scoring_draws=20,
    )
    return {
        f"{dataset}_large_{radius:g}": RobustnessConfig(
            f"{dataset}_vae",
            radius,
            num_images=1000,
            images_per_cell=125,
            gradients="graph",
            budget=budget,
        )
        for dataset in ("mnist", "fashion_mnist")
        for radius in (0.1, 0.2)
    }


def published_configurations() -> dict[str, RobustnessConfig]:
    """Adaptive attacks on the published chain, 100 images of the whole test set.

    ``<dataset>_published_<radius>`` is BPDA with 20 draws (and the paper's attack beside it),
    ``<dataset>_published_unrolled_<radius>`` the gradient through all transitions, 750 of 20 steps
    for MNIST and 1,500 for Fashion-MNIST. Classes are read at the last draw, as published. What is
    defended together, rows of one step size (eq. 67), are the copies of a block's 50 images, as
    many as the paper had: in the attack its draws and restarts, in scoring the scored draws.

    A chain is 15,002 gradients one after the other (30,002). Run whole, a step of BPDA on 100
    images would be 20 x 100 x 15,002 = 30 million gradients, 30 to 100 seconds. Chains therefore
    go on from the attacker's last step by 10 transitions at the step size they had arrived at: 50
    steps, with a whole chain at the first and at the end, are 0.8 million per image (1.4), scoring
    0.36 (0.72). A cell of 50 images is 58 million (106), 58 to 194 seconds (106 to 354) if a GPU is
    busy; few rows may not keep it so, and the eleven whole chains of a cell then take as long as
    11 x 750 transitions one after the other.

    Unrolled, a step is a whole chain forwards and four gradients' worth for each of its gradients
    backwards, whose operations the host asks for one by one: 15,000 leapfrog steps differentiated
    twice. That allows 2 steps, of 5 restarts at once.

    Sanity checks would run some twenty whole chains more for each cell, and are left out.
    """
    draws = {"selection_draws": 1, "scoring_draws": 5}
    forwards = Budget(
        num_steps=50, num_restarts=1, num_draws=(20,), persistent_transitions=10, **draws
    )
    unrolled = Budget(num_steps=2, num_restarts=5, num_draws=(1,), **draws)
    kinds: dict[str, tuple[tuple[str, ...], Budget]] = {
        "published": (("transfer", "bpda"), forwards),
        "published_unrolled": (("unroll",), unrolled),
    }
    return {
        f"{dataset}_{kind}_{radius:g}": RobustnessConfig(
            f"{dataset}_vae",
            radius,
            defences=("paper",),
            attacks=tried,
            reading="last",
            num_images=100,
            images_per_cell=50,
            num_examples=0,
            gradients="graph",
            budget=budget,
            checks=False,
        )
        for kind, (tried, budget) in kinds.items()
        for dataset in ("mnist", "fashion_mnist")
        for radius in (0.1, 0.2)
    }


def recommended_configurations() -> dict[str, RobustnessConfig]:
    """The defence that the library recommends, as it is, ``<dataset>_recommended_<radius>``.

    A run of it is 4 chains, each of a burn-in and 25 transitions: 564 gradients, five times those
    of ``aware`` by default. The budget is the default one, but for the evaluations after which no
    attack begins, so that it is attacked by as many as ``aware`` is.
    """
    budget = replace(Budget.standard(), max_evaluations=60_000)
    return {
        f"{dataset}_recommended_{radius:g}": RobustnessConfig(
            f"{dataset}_vae", radius, defences=("recommended",), num_images=20, budget=budget
        )
        for dataset in ("mnist", "fashion_mnist", "color_mnist")
        for radius in (0.1, 0.2)
    }


PROTOCOL_ATTACKS = (
    "transfer", "encoder", "bpda", "equilibrium", "evidence", "black_box", "implicit", "mode",
    "truncated", "continuation", "square",
)  # fmt: skip


def protocol_configurations() -> dict[str, RobustnessConfig]:
    """What a claim asks for where there is no GPU: the same 100 images, two restarts, the whole
    suite. Classes are read by the classifier with hidden layers, which loses fewer of them where
    nobody attacks.

    ``<dataset>_protocol_<radius>`` has one chain and the recommended four, whose draws are averaged
    before they are re-encoded, and beside them no defence and the cheapest control.
    ``<dataset>_vote_<radius>`` lets every draw of the four vote, which loses fewer classes.
    ``<dataset>_mode_<radius>`` is the mode of the one chain's target, the rival that a chain has to
    beat. ``<dataset>_unrolled_<radius>`` is the one chain again, with the gradient through all of
    it, and ``<dataset>_reconstruction_<radius>`` that and the mode attacked for their
    reconstructions. ``<dataset>_known_seed_<radius>`` is one chain as long whose attacker knows its
    random numbers, so that the gradient through the whole chain is exact; it keeps one draw, since
    such an attacker runs it once for each.
    ``<dataset>_doubled_<radius>`` is the vote again under the attacks that took most, with twice
    the steps: what they leave less than before is what the budget was too small for.
    ``color_mnist_textured_protocol_<radius>`` has the four chains that are recommended where the
    likelihood is a wide Gaussian, on the paper's target, and beside them its mode and filters,
    and mode and chains of the perturbation-aware target.

    A report of one chain is 10 million gradients, about an hour of one thread, and one of the
    recommended four 15 million. The suite is that without unrolling, but where it is said.
    """
    budget = replace(Budget.standard(), num_restarts=2, max_evaluations=None)
    kinds: dict[str, dict[str, Any]] = {
        "protocol": {
            "attacks": PROTOCOL_ATTACKS,
            "defences": ("none", "dark_clip", "aware", "recommended"),
            "targets": ("classification", "reconstruction"),
        },
        "vote": {
            "defences": ("none", "dark_clip", "recommended"),
            "targets": ("classification",),
            "attacks": PROTOCOL_ATTACKS,
            "reading": "vote",
        },
        "mode": {
            "defences": ("aware_mode",),
            "targets": ("classification",),
            "attacks": PROTOCOL_ATTACKS,
        },
        "unrolled": {
            "defences": ("aware",),
            "targets": ("classification",),
            "attacks": (*PROTOCOL_ATTACKS, "unroll"),
        },
        "reconstruction": {
            "defences": ("aware_mode", "aware"),
            "targets": ("reconstruction",),
            "attacks": (*PROTOCOL_ATTACKS, "unroll"),
            "classifier": None,
        },
        "known_seed": {
            "defences": ("aware",),
            "targets": ("classification",),
            "attacks": (*PROTOCOL_ATTACKS, "unroll"),
            "chain": conf.ChainConfig(num_samples=1, warmup_steps=24),
            "defence_seed": 0,
        },
        "doubled": {
            "defences": ("recommended",),
            "targets": ("classification",),
            "attacks": ("equilibrium", "implicit", "truncated", "continuation"),
            "reading": "vote",
            "budget": replace(budget, num_steps=2 * budget.num_steps),
        },
    }
    made = {(name, kind): kinds[kind] for kind in kinds for name in ("mnist", "fashion_mnist")}
    textured = (
        "none", "dark_clip", "median", "gaussian", "mode", "hmc", "aware_mode", "aware",
    )  # fmt: skip
    made["color_mnist_textured", "protocol"] = {
        **kinds["protocol"],
        "defences": textured,
        "targets": ("classification",),
        "chain": conf.ChainConfig(num_chains=4, step_size=0.2, burn_in=30),
    }
    return {
        f"{dataset}_{kind}_{radius:g}": RobustnessConfig(
            f"{dataset}_vae",
            radius,
            num_images=100,
            **{"budget": budget, "classifier": f"{dataset}_vae_mlp_classifier", **settings},
        )
        for (dataset, kind), settings in made.items()
        for radius in (0.1, 0.2)
    }


class Robustness(Measurement[RobustnessConfig]):
    """Every adaptive attack against the models of ``defend``, undefended and defended."""

    kind = command = "robustness"
    metric = None  # every report names its own figure
    names = {
        **{name: RobustnessConfig(c.model, c.radius) for name, c in Defend.names.items()},
        **recommended_configurations(),
        **protocol_configurations(),
        **large_configurations(),
        **published_configurations(),
    }
    output = "runs/robustness"
    parts = ("reports", "blocks")

    def load(self) -> None:
        """The model, its classifier where one is a target, and images.

        Raises:
            ValueError: for a published setting that is not known, or attacked images of ``earlier``
                that cannot be read or would be overwritten, or none of these reports'.
        """
        config = self.config
        self.earlier: dict[Key, RobustnessReport] = {}
        self.vae, card = self.load_conv_vae(config.model)
        self.paper = config.paper or card.dataset
        if "paper" in config.defences:
            check_published(self.paper)
        if "classification" in config.targets:
            self.classifier = self.load_classifier(config.classifier, config.model)
        self.x, labels = self.choose(config.dataset or card.dataset, config.num_images, "images")
        self.labels = labels[:, 0]
        if config.earlier is not None:
            place = Path(config.earlier)
            if place.resolve() == self._images.resolve():
                raise ValueError(
                    f"earlier must not be where new attacked images are written, {str(place)!r}; "
                    "give another --output"
                )
            files = {key: place / self._images_name(key) for key, _ in self.cells()}
            self.earlier = {
                key: load_attacked(file, self.device)
                for key, file in files.items()
                if file.exists()
            }
            if not self.earlier:
                raise ValueError(
                    f"earlier must have attacked images of one of these reports, got none such as "
                    f"{str(next(iter(files.values())))!r}; give their directory, or leave it out"
                )
        if self.progress and config.images_per_cell is not None:
            print(estimate(config), file=sys.stderr)

    def cells(self) -> Iterator[Cell]:
        """A report per target and defence; in blocks, of one block after the other."""
        config = self.config
        for number, images in enumerate(config.blocks):
            for target in config.targets:
                for name in config.defences:
                    key: Key = ("reports", f"{target}/{name}")
                    if config.images_per_cell is None:
                        yield key, partial(self.report, key)
                    else:
                        key = ("blocks", key[1], f"{number:03d}")
                        yield key, partial(self.report, key, images)

    @remembered
    def defence(self, name: str) -> Defence:
        """A defence, whose recorded or captured gradients serve all cells."""
        config = self.config
        options: dict[str, Any] = {}
        if config.gradients == "recorded":
            options["prepare"] = Recorder()
        elif config.gradients == "graph":
            options["prepare"] = Graph(force_dtype="tf32" if self.device.type == "cuda" else None)
        if config.reading == "last":
            options["keep_draws"] = 1  # nobody reads the others
        setting = Setting(
            self.vae, config.chain, radius=config.radius, paper=self.paper, options=options
        )
        return make_defence(name, setting)

    def report(self, key: Key, images: range | None = None) -> dict[str, Any]:
        """One defence under the whole suite, and the first images under their worst attack.

        All images go into a file of their own, for others to score again. What was killed goes on
        after the last of its attacks.
        """
        target, name = key[1].split("/")
        number = None if images is None else int(key[2])
        config, defence = self.config, self.defence(name)
        classify = None
        if target == "classification":
            classify = DefendedClassifier(defence, self.classifier, config.reading)
        rows = slice(None) if images is None else slice(images.start, images.stop)
        images_file = self._images / self._images_name(key)
        check_place(images_file)
        purpose: tuple[object, ...] = (key[1],) if number is None else (key[1], "block", number)
        earlier = self.earlier.get(key)
        if earlier is not None:
            purpose += ("after", earlier.seed)
        report = evaluate_robustness(
            self.vae,
            defence,
            self.x[rows],
            None if classify is None else self.labels[rows],
            classifier=classify,
            ball=Linf(config.radius),
            budget=config.budget,
            attacks=config.attacks,
            engine=getattr(attacks, config.engine),
            checks=config.checks,
            defence_seed=config.defence_seed,
            earlier=earlier,
            generator=self.generator(*purpose),
            checkpoint=self._checkpoint(key),
            keep_checkpoint=True,
        )
        save_attacked(report, images_file)
        found = report.to_dict()
        if not number and config.num_examples > 0:  # of all images, or of the first block
            assert report.examples is not None
            found["examples"] = plots.picture(report.examples[:, : config.num_examples])
        return found

    def saved(self, key: Key) -> None:
        """Delete the checkpoint of a report, which is safe now."""
        self._checkpoint(key).unlink(missing_ok=True)

    @property
    def _images(self) -> Path:
        """Where attacked images are written."""
        return self.directory / "attacked"

    def _images_name(self, key: Key) -> str:
        return f"{self._stem(key)}.safetensors"

    def _stem(self, key: Key) -> str:
        """Of the files of a report, or of one of a block."""
        return "_".join([self.name, *key[1].split("/"), *key[2:]])

    def _checkpoint(self, key: Key) -> Path:
        return self.directory / f".{self._stem(key)}.pt"

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """The worst cases, and what each attack left; between two comments, by which a page takes
        one result from the file of all."""
        config, budget = result["config"], result["config"]["budget"]
        found = reports(result)
        columns = [
            "", "figure", "clean", "random noise", "robust, mean", "robust, averaged",
            f"worst of {scored_draws(config)} draws", "decoder evaluations per image",
            "reliable",
        ]  # fmt: skip
        rows = [
            [
                label(key.split("/")[1]) + so_far(report, config),
                report["figure"],
                *tables.intervals(report, "clean/mean", "random_noise", *ROBUST),
                f"{report['cost']['attack_evaluations_per_image']:,.0f}",
                "no" if report["unreliable"] else "yes",
            ]
            for key, report in found.items()
        ]
        moved = any(map(chained, config["defences"]))  # others have chains of their own
        chains = f"chains: {chain_words(config['chain'])}; " if moved else ""
        classifier = config.get("classifier")  # which results before this setting do not name
        read_by = "" if classifier is None else f", classifier `{classifier}`"
        note = (
            f"{config['num_images']} images{in_blocks(config)}, L_inf radius "
            f"{config['radius']:g}, model `{config['model']}`{read_by}, classes read "
            f"`{config['reading']}`, {budget['num_steps']} steps of {config['engine']}, "
            f"{budget['num_restarts']} restart(s); {chains}seed {config['seed']}. Higher is more "
            f"robust; per-image worst case over attacks {on_seeds(config)}, 95% intervals over "
            "images. Heuristic, not certified."
        )
        lines = tables.table(columns, rows, ["", "figure", "clean", "robust, mean", "reliable"])
        for key, report in found.items():
            # What each attack left, those that were skipped, whose gradients can be trusted, and
            # why not to believe the report.
            each_one = [
                f"- {each['name']} ({each['num_draws']} draws): {tables.interval(each['figure'])}"
                for each in report["attacks"]
            ]
            seeds = report.get("earlier_seeds", ())
            each_one += [f"- the worst images of the report of seed {seed} again" for seed in seeds]
            each_one += [f"- skipped {name}: {why}" for name, why in report["skipped"].items()]
            each_one += [
                f"- fidelity of {name}{'' if each['reached'] else ', bar not reached'}: "
                f"{Fidelity(**each)}"
                for name, each in report.get("fidelity", {}).items()
            ]
            each_one += [*(f"- unreliable: {reason}" for reason in report["reasons"]), ""]
            why = ", and why it is unreliable" if report["unreliable"] else ""
            target, name = key.split("/")
            title = f"{target}, {label(name)}: figure under each attack{why}"
            lines += tables.folded(title, each_one)
        own = result["name"]
        lines = [f"<!-- begin {own} -->", "", note, "", *lines]
        whole = tables.section(f"### robustness {own}", "", lines, result)
        return f"{whole}\n<!-- end {own} -->\n"

    @classmethod
    def pages(cls, results: dict[str, dict[str, Any]], directory: Path) -> list[Path]:
        """One self-contained page of all reports, ``report.html``."""
        path = directory / "report.html"
        joined = [{**result, "reports": reports(result)} for result in results.values()]
        write_atomically(path, robustness_page(joined).encode())
        return [path]


def reports(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The reports of a result by target and defence; blocks that are there are one report."""
    found = dict(result["reports"])
    for key, blocks in result.get("blocks", {}).items():
        parts = [RobustnessReport.from_dict(blocks[number]) for number in sorted(blocks)]
        pictures = [part["examples"] for part in blocks.values() if "examples" in part]
        examples = {"examples": pictures[0]} if pictures else {}
        found[key] = RobustnessReport.join(parts).to_dict() | examples
    config = result["config"]
    order = [f"{target}/{name}" for target in config["targets"] for name in config["defences"]]
    return {key: found[key] for key in sorted(found, key=order.index)}


def in_blocks(config: dict[str, Any]) -> str:
    """How many images a cell of a result has, where that is not all."""
    size = config.get("images_per_cell")
    return "" if size is None else f" in blocks of at most {size}"


def scored_draws(config: dict[str, Any]) -> int:
    """How many runs of a defence the figures of a result are of: one where its seed is known."""
    number: int = config["budget"]["scoring_draws"]
    return number if config.get("defence_seed") is None else 1  # older results do not name it


def on_seeds(config: dict[str, Any]) -> str:
    """On which seeds a defence was scored."""
    known = config.get("defence_seed")
    return "on fresh seeds" if known is None else f"that know the defence's seed, {known}"


def so_far(report: dict[str, Any], config: dict[str, Any]) -> str:
    """How many images a report has where some are still to come."""
    number = report["robust"]["mean"]["num_images"]
    return "" if number >= config["num_images"] else f" ({number} images so far)"
