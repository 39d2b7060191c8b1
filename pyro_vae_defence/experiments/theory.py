r"""Lemmas 1 and 2 and Theorem 1, both sides, where every term can be computed.

With two latent dimensions posteriors are sums over a grid
(:mod:`pyro_vae_defence.experiments.grids`). Part ``lemma`` has, over radii of the paper's attack on
the encoder, the divergence of the exact posteriors at reference and attacked image (eq. 5) and what
Pinsker's inequality makes of it,

.. math::
    TV[p(z|x^r), p(z|x^a)] \le \sqrt{\tfrac12 KL[p(z|x^r) \| p(z|x^a)]}.

Where :math:`\log p(x|z)` is linear in the image but for a term without z, as here, this KL is
:math:`\log E_r e^\delta - E_r \delta` with :math:`\delta = \varepsilon^\top \eta(z)`: all terms of
first order vanish, and it is :math:`\tfrac12 Var_r(\delta)` up to third order, which stands beside
it. Part ``theorem`` has, over radii and transitions t of HMC, both sides of eq. 6,

.. math::
    TV[q^{(t)}(z|x^a), q(z|x^r)] \le TV[q^{(t)}(z|x^a), p(z|x^a)]
    + \sqrt{\tfrac12 KL[p(z|x^r) \| p(z|x^a)]} + \sqrt{\tfrac12 KL[q(z|x^r) \| p(z|x^r)]},

and the right side without Pinsker's inequality. A bound of 1 or more says nothing.

The distributions :math:`q^{(t)}` are those of many chains from draws of the guide, on energies
interpolated between nodes, with a fixed step size in the metric of the mean posterior variance; at
t = 0 and in the limit they are known. Their total variation to a known distribution is measured in
squares of cells. That has two biases: squares hide what differs within (less is seen), and finitely
many chains differ from their own distribution (more is seen). ``floor`` is what as many independent
draws of the posterior would show. Part ``errors`` has what the interpolation changes, and how far
sums with twice the spacing differ.

The model ``linear_gaussian`` is a VAE whose terms are known in closed form, to check all that
against: see :class:`LinearGaussian`.

Reference: Kuzina, Welling, Tomczak, NeurIPS 2022, https://arxiv.org/abs/2203.09940, section 3 and
appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae_defence import plots
from pyro_vae_defence.experiments import configuration as conf
from pyro_vae_defence.experiments import grids, study, tables
from pyro_vae_defence.experiments.drawing import legend_below, new_figure
from pyro_vae_defence.experiments.study import Cell, Measurement, interval, middle, share
from pyro_vae_defence.mcmc import hmc
from pyro_vae_defence.models import program
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import Latents

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINEAR = "linear_gaussian"


# --- A model whose terms are known ----------------------------------------------------------------


class LinearGaussian(nn.Module):
    r"""A VAE of two latents whose posterior is known, with an encoder that can be attacked.

    .. math::
        z \sim N(0, I_2), \quad x | z \sim N(\tfrac12 + W z, \sigma^2 I), \quad
        p(z | x) = N(M (x - \tfrac12), S), \quad q(z|x) = N((M + B)(x - \tfrac12), S),

    where :math:`S = (I + W^\top W / \sigma^2)^{-1}` and :math:`M = S W^\top / \sigma^2`. The
    encoder's error B has rows of the length of M's that are orthogonal to the columns of W: it is
    right for what the decoder makes, and wrong in directions that a perturbation may take. Images
    are (1, 8, 8). In squared Mahalanobis length :math:`|v|_S^2 = v^\top S^{-1} v`,

    .. math::
        KL[p(z|x^r) \| p(z|x^a)] = \tfrac12 |M \varepsilon|_S^2, \qquad
        TV[p(z|x^r), p(z|x^a)] = 2 \Phi(\tfrac12 |M \varepsilon|_S) - 1 .

    Args:
        noise: standard deviation of a pixel, :math:`\sigma`.
        seed: of W and B.
    """

    image_shape = (1, 8, 8)

    def __init__(self, noise: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        number = math.prod(self.image_shape)
        drawn = torch.randn(number, 4, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(drawn).Q
        weight = basis[:, :2] * 0.1 * math.sqrt(number)
        precision = torch.eye(2, dtype=torch.float64) + weight.T @ weight / noise**2
        covariance = torch.linalg.inv(precision)
        mean = covariance @ weight.T / noise**2
        error = basis[:, 2:].T * mean.norm(dim=1, keepdim=True)
        self.noise = noise
        self.weight: Tensor
        self.covariance: Tensor
        self.posterior_mean: Tensor
        self.encoder: Tensor
        for name, value in {
            "weight": weight, "covariance": covariance, "posterior_mean": mean,
            "encoder": mean + error,
        }.items():  # fmt: skip
            self.register_buffer(name, value.float())

    @property
    def mean_posterior_variance(self) -> Latents:
        """The guide's variance, which is that of all images."""
        return {"z": self.covariance.diagonal()}

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x)."""
        loc = (x.flatten(1) - 0.5) @ self.encoder.T
        return dist.Normal(loc, self.covariance.diagonal().sqrt().expand_as(loc)).to_event(1)

    def observation(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z)."""
        mean = (0.5 + z @ self.weight.T).reshape(-1, *self.image_shape)
        return dist.Normal(mean, torch.full_like(mean, self.noise)).to_event(3)

    def model(self, x: Tensor) -> Tensor:
        """Pyro program p(x, z)."""
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(len(x), 2)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            return pyro.sample("obs", self.observation(z), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """Pyro program q(z | x)."""
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.posterior(x))

    def images(self, number: int, generator: torch.Generator) -> Tensor:
        """Draws of the model, clipped to [0, 1]."""
        z = torch.randn(number, 2, generator=generator)
        noise = self.noise * torch.randn(number, *self.image_shape, generator=generator)
        return (self.observation(z).mean + noise).clamp(0, 1)

    def distance(self, x: Tensor, other: Tensor) -> Tensor:
        """:math:`|M (x - x')|_S` of images in pairs, ``(N,)``, float64."""
        moved = (x - other).flatten(1).double() @ self.posterior_mean.double().T
        return (moved @ torch.linalg.inv(self.covariance.double()) * moved).sum(1).sqrt()


# --- The study ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TheoryConfig(conf.Configuration):
    """Both sides of the paper's inequalities for one model of two latent dimensions.

    Args:
        model: name of a trained model of two latent dimensions, or ``linear_gaussian``.
        num_images: test images, class-stratified where they have classes.
        radii: L_inf radii of the attack for Lemma 1, ascending.
        theorem_radii: of these, the ones of Theorem 1.
        transitions: numbers of transitions of HMC, ascending; 0 stands for the guide.
        num_chains: chains per image.
        step_size: of leapfrog steps, in units of the metric.
        num_steps: leapfrog steps of a transition are 1 to twice as many.
        half_width: of the grid.
        spacing: of its nodes.
        block: cells along the side of a square in which chains are counted.
        seed: seed of images, attacks and chains.
    """

    model: str
    num_images: conf.Several = 20
    radii: Annotated[tuple[conf.AttackRadius, ...], conf.not_empty] = (
        0.001, 0.003, 0.01, 0.03, 0.1, 0.2,
    )  # fmt: skip
    theorem_radii: tuple[conf.AttackRadius, ...] = (0.01, 0.1, 0.2)
    transitions: Annotated[tuple[conf.Count, ...], conf.not_empty] = (1, 2, 5, 10, 20, 50)
    num_chains: conf.Count = 20_000
    step_size: conf.Positive = 0.3
    num_steps: conf.Count = 4
    half_width: conf.Positive = 6.0
    spacing: conf.Positive = 0.03
    block: conf.Count = 2
    seed: conf.Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        grids.check_grid(self.half_width, self.spacing, self.block)
        for name in ("radii", "transitions"):
            values = getattr(self, name)
            if tuple(sorted(values)) != values:
                raise ValueError(f"{name} must ascend, got {values!r}")
        if strange := set(self.theorem_radii) - set(self.radii):
            raise ValueError(f"theorem_radii must be among radii, got {sorted(strange)}")


class Theory(Measurement[TheoryConfig]):
    """Divergences of posteriors, and bounds of what a chain leaves, by model."""

    kind = command = "theory"
    metric = None
    names = {
        # Its guides are as narrow as 0.010.
        "mnist_vae_2d": TheoryConfig("mnist_vae_2d", spacing=0.015, block=4),
        LINEAR: TheoryConfig(LINEAR),
    }
    output = "runs/theory"
    parts = ("lemma", "theorem")

    def load(self) -> None:
        """The model and images ``(N, C, H, W)``."""
        config = self.config
        self.grid = grids.Grid(config.half_width, config.spacing)
        self.vae: Any
        if config.model == LINEAR:
            linear = LinearGaussian()
            images = linear.images(config.num_images, self.generator("images"))
            self.vae, self.x_ref = linear.to(self.device), images.to(self.device)
            return
        self.vae, card = self.load_conv_vae(config.model)
        if self.vae.latent_dim != 2:
            raise ValueError(f"model must have two latent dimensions, got {self.vae.latent_dim}")
        self.x_ref, _ = self.choose(card.dataset, config.num_images, "images")

    def cells(self) -> Iterator[Cell]:
        """Radii of the lemma, radii of the theorem, errors."""
        for radius in self.config.radii:
            yield ("lemma", f"{radius:g}"), partial(self.lemma, radius)
        for radius in self.config.theorem_radii:
            yield ("theorem", f"{radius:g}"), partial(self.theorem, radius)
        yield ("errors",), self.errors

    # --- Attacks and densities ---

    @cached_property
    def attacked(self) -> dict[float, Tensor]:
        """The paper's attack on the encoder, one start: radius -> images."""
        found = {}
        for radius in self.config.radii:
            attack = study.encoder_attack(self.vae, radius)
            found[radius] = attack(self.x_ref, self.generator("attack", f"{radius:g}")).x_adv[0]
        return found

    @cached_property
    def energies(self) -> dict[float, Tensor]:
        """Energies at the nodes by radius, 0 for the references."""
        every = {0.0: self.x_ref, **self.attacked}
        found = grids.energies(self.vae, torch.cat(list(every.values())), self.grid)
        return dict(zip(every, found.split(len(self.x_ref)), strict=True))

    def guide(self, x: Tensor) -> Tensor:
        """Log masses of q(z | x) in the cells."""
        with torch.no_grad():
            return grids.guide(self.vae.posterior(x), self.grid)

    # --- Lemma 1 ---

    def lemma(self, radius: float) -> dict[str, Any]:
        """Divergences of the exact posteriors at one radius."""
        x_adv, at_reference = self.attacked[radius], self.energies[0.0]
        p_ref, p_adv = map(grids.posterior, (at_reference, self.energies[radius]))
        change = (at_reference - self.energies[radius]).flatten(1)
        mean = (p_ref.exp() * change).sum(1, keepdim=True)
        divergence = grids.kl(p_ref, p_adv)
        variation = grids.total_variation(p_ref.exp(), p_adv.exp())
        bound = (divergence / 2).sqrt()
        found = {
            "norm": (x_adv - self.x_ref).flatten(1).norm(dim=1),
            "kl": divergence,
            "second_order": (p_ref.exp() * (change - mean).square()).sum(1) / 2,
            "variation": variation,
            "pinsker": bound,
        }
        cell: dict[str, Any] = {name: median(value) for name, value in found.items()}
        cell["vacuous"] = share((bound >= 1).float())
        cell["most_over_bound"] = float((variation - bound).max())
        if self.config.model == LINEAR:
            distance = self.vae.distance(x_adv, self.x_ref)
            exact = torch.erf(distance / math.sqrt(8))
            cell["closed_form"] = {
                "kl_error": float((divergence - distance.square() / 2).abs().max()),
                "variation_error": float((variation - exact).abs().max()),
            }
        return cell

    # --- Theorem 1 ---

    def theorem(self, radius: float) -> dict[str, Any]:
        """Both sides of eq. 6 over the number of transitions, at one radius."""
        config, grid, x_adv = self.config, self.grid, self.attacked[radius]
        p_ref, p_adv = (grids.posterior(self.energies[r]) for r in (0.0, radius))
        q_ref, q_adv = map(self.guide, (self.x_ref, x_adv))
        posteriors, approximation = grids.kl(p_ref, p_adv), grids.kl(q_ref, p_ref)
        rest = (posteriors / 2).sqrt() + (approximation / 2).sqrt()
        exact = {
            "posteriors": grids.total_variation(p_ref.exp(), p_adv.exp()),
            "approximation": grids.total_variation(q_ref.exp(), p_ref.exp()),
        }
        blocks = {
            name: grids.in_blocks(value, grid, config.block)
            for name, value in {"p_adv": p_adv, "q_ref": q_ref}.items()
        }
        # Mean distance of a mean of draws from its expectation, cell by cell.
        spread = blocks["p_adv"] * (1 - blocks["p_adv"]) / config.num_chains
        floor = 0.5 * (2 * spread / math.pi).sqrt().sum(1)
        walks = [self.walk(image, radius) for image in range(len(x_adv))]
        found: dict[str, tuple[Tensor, Tensor]] = {
            "0": (
                grids.total_variation(q_adv.exp(), q_ref.exp()),
                grids.total_variation(q_adv.exp(), p_adv.exp()),
            )
        }
        for number, count in enumerate(config.transitions):
            shares = torch.stack([walk[number] for walk, _ in walks])
            variations = (grids.total_variation(shares, blocks[n]) for n in ("q_ref", "p_adv"))
            found[str(count)] = tuple(variations)  # type: ignore[assignment]
        limit = grids.total_variation(p_adv.exp(), q_ref.exp())
        found["limit"] = (limit, torch.zeros_like(limit))
        return {
            "pinsker_posteriors": median((posteriors / 2).sqrt()),
            "pinsker_approximation": median((approximation / 2).sqrt()),
            **{name: median(value) for name, value in exact.items()},
            "floor": median(floor),
            "hidden": median(limit - grids.total_variation(blocks["p_adv"], blocks["q_ref"])),
            "acceptance_rate": interval(torch.tensor([rate for _, rate in walks])),
            "transitions": {
                count: {
                    "left": median(left),
                    "to_target": median(to_target),
                    "right": median(to_target + rest),
                    "right_exact": median(to_target + sum(exact.values())),
                    "vacuous": share((to_target + rest >= 1).float()),
                    "most_over_bound": float((left - to_target - rest).max()),
                    "most_over_exact": float((left - to_target - sum(exact.values())).max()),
                }
                for count, (left, to_target) in found.items()
            },
        }

    def walk(self, image: int, radius: float) -> tuple[list[Tensor], float]:
        """Where chains of one attacked image are after each number of transitions, as shares in
        squares; mean acceptance."""
        config, grid = self.config, self.grid
        table = grids.Table(self.energies[radius][image], grid)
        with torch.no_grad():
            q = self.vae.posterior(self.attacked[radius][image : image + 1])
        metric = {"z": self.vae.mean_posterior_variance["z"].cpu().double()[None]}
        purpose = ("chains", f"{radius:g}", image)
        generator = self.generator(*purpose, "start")
        noise = torch.randn(config.num_chains, 2, generator=generator, dtype=torch.float64)
        start = q.mean.cpu().double() + q.stddev.cpu().double() * noise
        streams = Streams.create(config.num_chains, generator=self.generator(*purpose))
        step_size = torch.full((config.num_chains,), config.step_size, dtype=torch.float64)
        state, shares, rates = hmc.init(table, {"z": start}), [], []
        for number in range(config.transitions[-1]):
            length = hmc.trajectory_length(streams.seed, number, config.num_steps, 1.0)
            state, info = hmc.step(table, state, streams, step_size, length, metric, grid.contains)
            rates.append(info.acceptance_rate.mean())
            if number + 1 in config.transitions:
                shares.append(grid.shares(state.position["z"], config.block))
        return shares, float(torch.stack(rates).mean())

    # --- What the grid leaves ---

    def errors(self) -> dict[str, float]:
        """Interpolation against the decoder, and sums over the grid against a coarser one."""
        radius = self.config.radii[-1]
        found: dict[str, list[Tensor]] = {"energy": [], "variation": []}
        for image, energy in enumerate(self.energies[radius]):
            log_p = grids.posterior(energy[None])[0]
            z = grids.draws(log_p, self.grid, 200, self.generator("errors", image))
            x = self.attacked[radius][image : image + 1].expand(len(z), -1, -1, -1)
            with torch.no_grad():
                decoder = program.potential(self.vae, x)({"z": z.to(x)}).cpu().double()
            # Energies are known up to a constant of the image.
            error = grids.Table(energy, self.grid)({"z": z}) - decoder
            error = error - error.mean()
            found["energy"].append(error.abs().mean())
            weight = error.exp() / error.exp().mean()
            found["variation"].append(0.5 * (weight - 1).abs().mean())
        fine, coarse = (
            [grids.posterior(self.energies[r][:, ::step, ::step]) for r in (0.0, radius)]
            for step in (1, 2)
        )
        variations = [grids.total_variation(p.exp(), q.exp()) for p, q in (fine, coarse)]
        divergences = [grids.kl(p, q) for p, q in (fine, coarse)]
        return {
            "interpolation_energy": float(middle(torch.stack(found["energy"]))),
            "interpolation_energy_most": float(torch.stack(found["energy"]).max()),
            "interpolation_variation": float(middle(torch.stack(found["variation"]))),
            "interpolation_variation_most": float(torch.stack(found["variation"]).max()),
            "spacing_variation_most": float((variations[0] - variations[1]).abs().max()),
            "spacing_kl_most": float((divergences[0] - divergences[1]).abs().max()),
        }

    # --- Tables and figures ---

    @classmethod
    def section(cls, result: dict[str, Any], figures: list[str]) -> str:
        """Lemma 1 over radii, eq. 6 over transitions, errors."""
        config = result["config"]
        note = (
            f"Model `{config['model']}`, {config['num_images']} images, seed {config['seed']}; the "
            "paper's attack on the encoder from one start. Medians over images with 95% intervals. "
            f"Grid of spacing {config['spacing']:g}. HMC: {config['num_chains']:,} chains per "
            f"image, step size {config['step_size']:g} in the metric of the mean posterior "
            f"variance, 1 to {2 * config['num_steps']} leapfrog steps, no adaptation."
        )
        lines = [f"![{_text(result)}]({figure})\n" for figure in figures]
        lines += [*_lemma_table(result), *_theorem_tables(result), *_errors(result)]
        return tables.section(f"## {result['name']}", note, lines, result)

    @classmethod
    def figures(cls, result: dict[str, Any]) -> dict[str, Figure]:
        """Divergence over radii, and both sides of eq. 6 over transitions."""
        return {"": bounds_figure(result)}


def median(values: Tensor) -> dict[str, float]:
    """Median over images with its interval."""
    return interval(values, statistic="median")


# --- Tables ---------------------------------------------------------------------------------------


def _lemma_table(result: dict[str, Any]) -> list[str]:
    columns = [
        "radius", "KL of the posteriors (nats)", "growth", "total variation",
        "Pinsker's bound of it", "images where the bound is 1 or more", "L2 norm",
        "second order (nats)",
    ]  # fmt: skip
    rows, before = [], None
    for radius, cell in result["lemma"].items():
        growth = "" if before is None else f"{_growth(before, cell):.2f}"
        norm = cell["norm"]["estimate"]
        rows.append([
            radius, _number(cell["kl"]), growth, tables.interval(cell["variation"]),
            tables.interval(cell["pinsker"]), f"{cell['vacuous']['estimate']:.2f}", f"{norm:.3g}",
            _number(cell["second_order"]),
        ])  # fmt: skip
        before = cell
    closed = [c["closed_form"] for c in result["lemma"].values() if "closed_form" in c]
    known = []
    if closed:
        most = {name: max(cell[name] for cell in closed) for name in closed[0]}
        known = [
            f"Off the closed forms by {most['kl_error']:.1g} nats and {most['variation_error']:.1g}"
            " of total variation at most.",
            "",
        ]
    return [
        "### Lemma 1",
        "",
        "*Growth* is the exponent of the KL in the L2 norm of the perturbation, from one row to "
        "the next: above 1 where KL = o(norm), as eq. 5 has it.",
        "",
        *tables.table(columns, rows, [*columns[:3], *columns[4:6]]),
        *known,
    ]


def _theorem_tables(result: dict[str, Any]) -> Iterator[str]:
    for radius, cell in result["theorem"].items():
        value = {
            name: tables.interval(cell[name])
            for name in (
                "pinsker_posteriors", "posteriors", "pinsker_approximation", "approximation",
                "floor", "hidden", "acceptance_rate",
            )
        }  # fmt: skip
        yield f"### Theorem 1, radius {radius}"
        yield ""
        yield (
            f"Of the right side, between the posteriors {value['pinsker_posteriors']} (total "
            f"variation itself: {value['posteriors']}), between guide and posterior at the "
            f"reference {value['pinsker_approximation']} (itself: {value['approximation']}). "
            f"As many independent draws of the target would show {value['floor']} instead of 0; "
            f"squares hide {value['hidden']} of the left side in the limit. Acceptance "
            f"{value['acceptance_rate']}."
        )
        yield ""
        columns = [
            "transitions", "left side", "chain to its target", "right side",
            "images where it is 1 or more", "right side without Pinsker",
        ]  # fmt: skip
        rows = [
            [
                count,
                *tables.intervals(entry, "left", "to_target", "right"),
                f"{entry['vacuous']['estimate']:.2f}",
                tables.interval(entry["right_exact"]),
            ]
            for count, entry in cell["transitions"].items()
        ]
        yield from tables.table(columns, rows, columns[:5])


def _errors(result: dict[str, Any]) -> list[str]:
    if not (found := result.get("errors")):
        return []
    over = {
        name: max(
            entry[name]
            for cell in result["theorem"].values()
            for entry in cell["transitions"].values()
        )
        for name in ("most_over_bound", "most_over_exact")
        if result["theorem"]
    }
    lines = [
        "### Errors",
        "",
        f"Interpolated energies are off the decoder's by {found['interpolation_energy']:.2g} nats "
        f"(median over images of the mean, at most {found['interpolation_energy_most']:.2g}), "
        "which changes a posterior by a total variation of "
        f"{found['interpolation_variation']:.2g} (at most "
        f"{found['interpolation_variation_most']:.2g}). Twice the spacing changes the total "
        f"variation of two posteriors by {found['spacing_variation_most']:.2g} at most, their KL "
        f"by {found['spacing_kl_most']:.2g} nats.",
        "",
    ]
    if over:
        lines += [
            f"Left side less right side, the most of any image, radius and number of transitions: "
            f"{over['most_over_bound']:.3f}; without Pinsker's inequality "
            f"{over['most_over_exact']:.3f}.",
            "",
        ]
    return lines


def _growth(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Exponent of the median KL in the median norm between two cells."""
    kl, norm = (
        math.log(after[name]["estimate"] / before[name]["estimate"]) for name in ("kl", "norm")
    )
    return kl / norm


def _number(entry: dict[str, float]) -> str:
    """An interval of three digits, small numbers too."""
    return f"{entry['estimate']:.3g} [{entry['low']:.3g}, {entry['high']:.3g}]"


# --- Figures --------------------------------------------------------------------------------------

_SIDES = {
    "left": ("left side: chain to guide at the reference", "o", "-"),
    "to_target": ("chain to its own target", "s", "--"),
    "right": ("right side of eq. 6", "^", "-"),
    "right_exact": ("right side without Pinsker", "v", ":"),
}
_COLOURS = {"left": "black", "to_target": "0.45", "right": "tab:red", "right_exact": "tab:orange"}
_MOST = 1.6


def bounds_figure(result: dict[str, Any]) -> Figure:
    """The KL of Lemma 1 over radii; a panel of both sides of eq. 6 for each radius."""
    lemma, theorem = result["lemma"], result["theorem"]
    figure = new_figure(3.4 * (1 + len(theorem)), 3.8)
    first, *others = figure.subplots(1, 1 + len(theorem), squeeze=False)[0]
    radii = [float(radius) for radius in lemma]
    entries = [cell["kl"] for cell in lemma.values()]
    estimate, low, high = ([e[k] for e in entries] for k in ("estimate", "low", "high"))
    plots.curve(first, radii, estimate, low, high, "KL", "black")
    second = [cell["second_order"]["estimate"] for cell in lemma.values()]
    first.plot(radii, second, "--", color="0.45", label="second order")
    first.axhline(2, color="black", lw=0.8, ls=":")
    first.annotate("the bound is 1 above 2 nats", (radii[0], 2.3), fontsize=8)
    first.set(xscale="log", yscale="log", xlabel="radius of the attack")
    first.set_ylabel("KL of the exact posteriors (nats)")
    first.set_title("Lemma 1", fontsize=10)
    first.legend(fontsize=8, loc="lower right")
    for axes, (radius, cell) in zip(others, theorem.items(), strict=True):
        places = range(len(cell["transitions"]))
        for side, (text, marker, line) in _SIDES.items():
            values = [entry[side]["estimate"] for entry in cell["transitions"].values()]
            shown = [min(value, _MOST) for value in values]
            style: dict[str, Any] = {"marker": marker, "ls": line, "color": _COLOURS[side]}
            axes.plot(places, shown, label=text, ms=4, **style)
        axes.axhline(1, color="black", lw=0.8, ls=":")
        axes.set_xticks(places, list(cell["transitions"]), fontsize=8)
        axes.set(ylim=(-0.03, _MOST + 0.05), xlabel="transitions")
        axes.set_title(f"Theorem 1, radius {radius}", fontsize=10)
    if others:
        others[0].set_ylabel("total variation, and bounds of it")
    legend_below(figure, *others, columns=2)
    return figure


def _text(result: dict[str, Any]) -> str:
    """What is seen in the figure."""
    last = next(reversed(result["lemma"].items()), None)
    lemma = f"; at radius {last[0]} it is {last[1]['kl']['estimate']:.3g} nats" if last else ""
    panels = [
        f"at radius {radius} the left side goes from "
        f"{cell['transitions']['0']['left']['estimate']:.2f} to "
        f"{cell['transitions']['limit']['left']['estimate']:.2f} in the limit, the right side to "
        f"{cell['transitions']['limit']['right']['estimate']:.2f}"
        for radius, cell in result["theorem"].items()
    ]
    return (
        f"{result['name']}: the KL of exact posteriors over the radius on logarithmic axes{lemma}. "
        "Beside it curves over transitions: total variation of chain and guide, of chain and its "
        f"target, and two bounds, cut off at {_MOST}; {'; '.join(panels)}."
    )
