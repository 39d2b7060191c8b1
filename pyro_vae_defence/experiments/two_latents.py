r"""Figure 1: encodings of an image under attack, and the chain back, over the exact posterior.

With two latent dimensions the posterior can be seen, and the paper's hypothesis read off: that an
attack puts the encoding where the true posterior has little mass, and that a chain brings it back.
There are two posteriors. The chain goes to :math:`p(z|x^a)`, the attacked image's; *back* is
:math:`p(z|x^r)`, the reference's. For draws of the guide and ends of chains, at references and
attacked images, stand:

- how many nats their density is below that at the mode of :math:`p(z|x^r)`;
- how often they lie in the smallest region that has 95% of either posterior;
- the similarity of their reconstruction to one of the reference, an undefended draw.

Modes and regions are those of a grid (:mod:`pyro_vae_defence.experiments.grids`); densities at
latents are the decoder's. How much the grid's spacing decides is measured by half of it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from pyro_vae_defence import metrics, plots
from pyro_vae_defence.defence import DefenceResult
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments import grids, study, tables
from pyro_vae_defence.experiments.defences import Setting, make_defence
from pyro_vae_defence.experiments.drawing import legend_below, new_figure
from pyro_vae_defence.experiments.study import METRIC, VARIANT, Cell, Measurement, interval
from pyro_vae_defence.models import program

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REGION = 0.95
"""Share of a posterior in its smallest region."""

_DEEPEST = 400.0  # nats below the mode from where on the background is white
_CONTOURS = (3.0, 10.0, 30.0, 100.0)  # nats below the mode


@dataclass(frozen=True)
class TwoLatentsConfig(conf.Configuration):
    """Attacks on a VAE of two latent dimensions, and chains from where they lead.

    Args:
        model: name of a trained model of two latent dimensions.
        radius: L_inf radius of the paper's attack on the encoder.
        num_images: class-stratified test images.
        num_attacks: attacks on each, from different starts.
        num_drawn: of the images, the first ones, that are drawn.
        chain: of the defence, without a warm-up, so that every transition is seen.
        half_width: of the grid.
        spacing: of its nodes.
        seed: seed of images, attacks and chains.
    """

    model: str
    radius: conf.AttackRadius = 0.1
    num_images: conf.Several = 20
    num_attacks: conf.Count = 10
    num_drawn: Annotated[int, conf.at_least(0)] = 1
    chain: conf.ChainConfig = conf.ChainConfig(num_samples=50, warmup_steps=0, step_size=0.3)
    half_width: conf.Positive = 6.0
    spacing: conf.Positive = 0.05
    seed: conf.Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        grids.check_grid(self.half_width, self.spacing)
        self.refuse_above(num_drawn="num_images")
        for name, only in (("num_chains", 1), ("warmup_steps", 0)):
            if (value := getattr(self.chain, name)) != only:
                raise ValueError(f"chain.{name} must be {only}, as paths are drawn, got {value}")


class TwoLatents(Measurement[TwoLatentsConfig]):
    """Where attacks and chains end, image by image."""

    kind = command = "two_latents"
    names = {
        f"mnist_radius_{radius:g}": TwoLatentsConfig("mnist_vae_2d", radius)
        for radius in (0.1, 0.2)
    }
    output = "runs/two_latents"
    parts = ("images", "finer")

    def load(self) -> None:
        """The model, and references ``(N, C, H, W)``."""
        config = self.config
        self.grid = grids.Grid(config.half_width, config.spacing)
        self.vae, card = self.load_conv_vae(config.model)
        if self.vae.latent_dim != 2:
            raise ValueError(f"model must have two latent dimensions, got {self.vae.latent_dim}")
        self.x_ref, _ = self.choose(card.dataset, config.num_images, "references")

    def cells(self) -> Iterator[Cell]:
        """Image after image, then each on a finer grid."""
        for part, compute in (("images", self.image), ("finer", self.finer)):
            for image in range(self.config.num_images):
                yield (part, f"{image:02d}"), partial(compute, image)

    @cached_property
    def versions(self) -> Tensor:
        """References, and behind them their attacked versions: ``(1 + attacks, N, C, H, W)``."""
        attack = study.encoder_attack(self.vae, self.config.radius, self.config.num_attacks)
        return torch.cat([self.x_ref[None], attack(self.x_ref, self.generator("attack")).x_adv])

    @study.remembered
    def energies(self, grid: grids.Grid) -> Tensor:
        """At the nodes, ``(1 + attacks, N, size, size)``."""
        found = grids.energies(self.vae, self.versions.flatten(0, 1), grid)
        return found.unflatten(0, self.versions.shape[:2])

    @cached_property
    def defended(self) -> DefenceResult:
        """Chains from draws of the guide, of all versions of all images."""
        defence = make_defence("hmc", Setting(self.vae, self.config.chain))
        return defence(self.versions.flatten(0, 1), self.generator("defence"))

    def places(self, image: int) -> dict[str, Tensor]:
        """Draws of the guide and ends of chains, of a reference (the first) and its attacked
        versions, ``(1 + attacks, 2)``."""
        rows = torch.arange(len(self.versions)) * len(self.x_ref) + image
        return {
            "start": self.defended.initial["z"][0, rows],
            "end": self.defended.latents["z"][rows],
        }

    @torch.no_grad()
    def on_grid(self, image: int, grid: grids.Grid) -> tuple[dict[str, Any], Tensor]:
        """What a grid says of these places, and of the posteriors of these versions; the log masses
        of these, ``(1 + attacks, cells)``."""
        versions, number = self.versions[:, image], len(self.versions)
        log_p = grids.posterior(self.energies(grid)[:, image])
        references = versions[:1].expand(number, -1, -1, -1)
        at_reference = Below(self.vae, references, log_p[:1].expand(number, -1), grid)
        at_own = Below(self.vae, versions, log_p, grid)
        found: dict[str, Any] = {
            name: {
                "below_mode": at_reference(z).tolist(),
                "inside_reference": at_reference.inside(z).tolist(),
                "inside_own": at_own.inside(z).tolist(),
            }
            for name, z in self.places(image).items()
        }
        found["kl"] = grids.kl(log_p[:1], log_p[1:]).tolist()
        found["variation"] = grids.total_variation(log_p[:1].exp(), log_p[1:].exp()).tolist()
        return found, log_p

    @torch.no_grad()
    def image(self, image: int) -> dict[str, Any]:
        """One reference (the first of its rows) and its attacked versions."""
        versions, places = self.versions[:, image], self.places(image)
        on_grid, log_p = self.on_grid(image, self.grid)
        references = versions[:1].expand(len(versions), -1, -1, -1)
        before = self.reconstruct(self.vae, references, "before", image)
        found: dict[str, Any] = {
            name: {
                "z": z.tolist(),
                **on_grid[name],
                "ms_ssim": metrics.ms_ssim(
                    before.cpu(), self.vae.decode(z).clamp(0, 1).cpu(), variant=VARIANT
                ).tolist(),
            }
            for name, z in places.items()
        }
        found = on_grid | found
        if image < self.config.num_drawn:
            rows = torch.arange(len(versions)) * len(self.x_ref) + image
            draws = self.defended.samples["z"][0][:, rows]
            found["paths"] = draws.transpose(0, 1).tolist()
            found["background"] = [picture(log_p[n], self.grid) for n in (0, 1)]
            shown = [versions[:2], *(self.vae.decode(z[:2]) for z in places.values())]
            found["examples"] = plots.picture(shown)
        return found

    def finer(self, image: int) -> dict[str, Any]:
        """What a grid of half the spacing says of the same."""
        return self.on_grid(image, self.grid._replace(spacing=self.grid.spacing / 2))[0]

    # --- Tables and figures ---

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """Figures, and encodings and ends of chains in numbers."""
        config, cells = result["config"], list(result["images"].values())
        chain = config["chain"]
        note = (
            f"Model `{config['model']}`, {len(cells)} images x {config['num_attacks']} attacks of "
            f"radius {config['radius']:g}, seed {config['seed']}; HMC of {chain['num_samples']} "
            f"transitions of 1 to {2 * chain['num_steps']} leapfrog steps, step size "
            f"{chain['step_size']:g} in the metric of the mean posterior variance. 95% intervals "
            "over images."
        )
        lines = [f"![{_text(result, number)}]({f})\n" for number, f in enumerate(figures)]
        columns = [
            "", "nats below the mode at the reference, median", "inside 95% of p(z given x^r)",
            "inside 95% of p(z given its image)", METRIC,
        ]  # fmt: skip
        rows = [
            [text, *_row(cells, place, attacked)]
            for attacked, of in ((False, "reference"), (True, "attacked"))
            for place, text in (("start", f"{of}, encoded"), ("end", f"{of}, behind HMC"))
        ]
        between = [
            tables.interval(_over_images([cell[name] for cell in cells], "median"), digits)
            for name, digits in (("kl", 1), ("variation", 3))
        ]
        lines += [
            *tables.table(columns, rows),
            f"Exact posteriors at reference and attacked image: KL {between[0]} nats, total "
            f"variation {between[1]}, medians.",
            "",
        ]
        lines += _grid_errors(result)
        return tables.section(f"## {result['name']}", note, lines, result)

    @classmethod
    def figures(cls, result: dict[str, Any]) -> dict[str, Figure]:
        """A figure of each image that is drawn."""
        drawn = {key: cell for key, cell in result["images"].items() if "paths" in cell}
        return {key: latents_figure(result, cell) for key, cell in drawn.items()}


class Below:
    """How far densities of latents are below the posterior's mode, in nats.

    Args:
        vae: the model.
        x: images ``(N, C, H, W)``.
        log_p: log masses of their posteriors in the cells of the grid, ``(N, cells)``.
        grid: where modes and regions are looked for.
    """

    def __init__(self, vae: Any, x: Tensor, log_p: Tensor, grid: grids.Grid) -> None:
        self.potential = program.potential(vae, x)
        self.mode = self.potential({"z": grid.nodes.flatten(0, 1)[log_p.argmax(1)].to(x)})
        descending = log_p.sort(dim=1, descending=True).values
        last = (descending.exp().cumsum(1) < REGION).sum(1, keepdim=True)
        last = last.clamp(max=log_p.shape[1] - 1)
        self.region = (descending[:, :1] - descending.gather(1, last)).squeeze(1).to(x)

    def __call__(self, z: Tensor) -> Tensor:
        """Nats below the mode, ``(N,)``; a little negative where no node is as high."""
        return self.potential({"z": z}) - self.mode

    def inside(self, z: Tensor) -> Tensor:
        """1.0 in the smallest region that has :data:`REGION` of the mass, else 0.0; ``(N,)``."""
        return (self(z) <= self.region).float()


def picture(log_p: Tensor, grid: grids.Grid) -> str:
    """Nats below the mode at the nodes, as the base64 text of a PNG file; :func:`raster` reads it.

    Its values are roots, so that small ones are told apart.
    """
    below = (log_p.max() - log_p).clamp(max=_DEEPEST)
    return plots.picture([(below / _DEEPEST).sqrt().reshape(1, 1, grid.size, grid.size).float()])


def raster(text: str) -> Any:
    """Nats below the mode, ``(size, size)``, of a :func:`picture`."""
    from matplotlib.image import imread

    values = imread(io.BytesIO(base64.b64decode(text)))[..., 0]
    return _DEEPEST * values**2


# --- Tables ---------------------------------------------------------------------------------------


def _over_images(
    values: list[list[float]], statistic: str = "mean", bounds: tuple[float, float] | None = None
) -> dict[str, float]:
    """Of all values, with an interval over images."""
    image = torch.arange(len(values)).repeat_interleave(len(values[0]))
    return interval(torch.tensor(values).flatten(), image, statistic, bounds)


def _entries(cells: list[dict[str, Any]], place: str, attacked: bool) -> dict[str, Any]:
    """Measures of encodings or ends of chains by name, over images."""
    rows = slice(1, None) if attacked else slice(0, 1)
    names = ("below_mode", "inside_reference", "inside_own", "ms_ssim")
    return {
        name: _over_images(
            [cell[place][name][rows] for cell in cells],
            "median" if name == "below_mode" else "mean",
            (0.0, 1.0) if name.startswith("inside") else None,
        )
        for name in names
        if name in cells[0][place]
    }


def _row(cells: list[dict[str, Any]], place: str, attacked: bool) -> list[str]:
    digits = {"below_mode": 1, "inside_reference": 2, "inside_own": 2, "ms_ssim": 3}
    found = _entries(cells, place, attacked)
    return [tables.interval(found[name], digits[name]) for name in digits]


def _grid_errors(result: dict[str, Any]) -> list[str]:
    """What half the spacing of the grid changes, where that was measured of all images."""
    both = [list(result.get(part, {}).values()) for part in ("images", "finer")]
    if len(both[1]) < len(both[0]):
        return []

    def largest(*places: str) -> float:
        """Of single attacks and latents."""
        one, other = (
            torch.tensor([[tables.at(cell, place) for place in places] for cell in cells])
            for cells in both
        )
        return float((one - other).abs().max())

    def of_table(*names: str) -> float:
        """Of the estimates above."""
        found = [
            [_entries(cells, place, attacked)[name]["estimate"] for cells in both]
            for name in names
            for place in ("start", "end")
            for attacked in (False, True)
        ]
        return max(abs(one - other) for one, other in found)

    def of_median(name: str) -> float:
        one, other = (_over_images([cell[name] for cell in cells], "median") for cells in both)
        return abs(one["estimate"] - other["estimate"])

    return [
        f"What the grid leaves: with half its spacing, {result['config']['spacing'] / 2:g}, depths "
        f"in the table change by at most {of_table('below_mode'):.2g} nats, shares by "
        f"{of_table('inside_reference', 'inside_own'):.2g}, the median KL by "
        f"{of_median('kl'):.2g} nats and the median total variation by "
        f"{of_median('variation'):.2g}; of single latents and attacks depths by up to "
        f"{largest('start/below_mode', 'end/below_mode'):.2g} nats, KL by {largest('kl'):.2g}, "
        f"total variations by {largest('variation'):.2g}.",
        "",
    ]


# --- Figures --------------------------------------------------------------------------------------

_ROWS = ("image", "encoded", "behind HMC")
_COLUMNS = ("reference", "attacked")


def latents_figure(result: dict[str, Any], cell: dict[str, Any]) -> Figure:
    """Both posteriors with encodings, chains and where these end; the images beside them."""
    from matplotlib.image import imread

    config = result["config"]
    figure = new_figure(10.5, 4.6)
    left, right, beside = figure.subplots(1, 3, width_ratios=[4, 4, 1.9])
    start, end = (torch.tensor(cell[name]["z"]) for name in ("start", "end"))
    paths = torch.cat([start[:, None], torch.tensor(cell["paths"])], 1)
    every = torch.cat([start, end])
    low, high = (every.amin(0) - 0.6).tolist(), (every.amax(0) + 0.6).tolist()
    for axes, background, rows, title in (
        (left, cell["background"][0], slice(1, None), "posterior of the reference"),
        (right, cell["background"][1], slice(1, 2), "posterior of the first attacked image"),
    ):
        _shade(axes, raster(background), config)
        style: dict[str, Any] = {"ls": "none", "mec": "black", "mew": 0.8}
        for path in paths[rows]:
            axes.plot(*path.T, color="tab:purple", lw=0.7, alpha=0.8, zorder=2)
        axes.plot(
            *start[rows].T, marker="X", ms=8, mfc="tab:red", label="attacked, encoded", **style
        )
        axes.plot(
            *end[rows].T, marker="o", ms=6, mfc="tab:purple", label="where its chain ends", **style
        )
        axes.plot(
            *start[:1].T, marker="*", ms=14, mfc="tab:orange", label="reference, encoded", **style
        )
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="$z_1$")
        axes.set_title(title, fontsize=10)
    left.set_ylabel("$z_2$")
    pixels = imread(io.BytesIO(base64.b64decode(cell["examples"])))
    beside.imshow(pixels)
    high_, wide = pixels.shape[:2]
    beside.set_yticks(
        [(n + 0.5) * high_ / len(_ROWS) for n in range(len(_ROWS))], _ROWS, fontsize=8
    )
    beside.set_xticks([(n + 0.5) * wide / 2 for n in range(2)], _COLUMNS, fontsize=8)
    beside.tick_params(length=0)
    legend_below(figure, left)
    return figure


def _shade(axes: Axes, below: Any, config: dict[str, Any]) -> None:
    """A posterior, dark where it is high, with lines at equal depths below its mode."""
    half = config["half_width"]
    extent = (-half, half, -half, half)
    place: dict[str, Any] = {"extent": extent, "origin": "lower"}
    # The first axis of the grid is the horizontal one.
    axes.imshow(
        below.T**0.5,
        cmap="Greys_r",
        vmin=-8,
        vmax=_DEEPEST**0.5,
        aspect="auto",
        interpolation="bilinear",
        **place,
    )
    lines = axes.contour(below.T, levels=_CONTOURS, colors="black", linewidths=0.6, **place)
    axes.clabel(lines, fontsize=7, fmt="%g", inline_spacing=1)


def _text(result: dict[str, Any], number: int) -> str:
    """What is seen in a figure."""
    config, cell = result["config"], list(result["images"].values())[number]
    below = {
        place: float(torch.tensor(cell[place]["below_mode"][1:]).quantile(0.5))
        for place in ("start", "end")
    }
    return (
        f"Two latent dimensions, dark where the exact posterior is high, with lines 3, 10, 30 and "
        f"100 nats below its mode. Left, of the reference: encodings of {config['num_attacks']} "
        f"attacked images (crosses), chains from there and where they end (dots), and the "
        f"reference's encoding (star); crosses are {below['start']:.0f} nats below the mode, dots "
        f"{below['end']:.0f} (medians). Right, of the first attacked image, with its chain. "
        "Beside them reference and attacked image, decoded from the encoding and from the chain."
    )
