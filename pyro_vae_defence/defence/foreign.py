r"""Kernels that are not of this library, such as :class:`pyro.infer.NUTS`: one chain at a time.

A stock kernel takes a batch of images for a single state with one acceptance, so that each chain of
each image gets a run of its own. What it samples is not left to Pyro's reading of the user's model.
The kernel is made for an :class:`EnergyModel`, a Pyro program over the unconstrained latents u with
the density

.. math:: p(u) \propto \exp(-U(u; x)) ,

where U is the potential that batched kernels move on: all kernels share one target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae_defence.defence.chains import Lengths
from pyro_vae_defence.defence.result import Chains
from pyro_vae_defence.defence.starts import ChainStart
from pyro_vae_defence.models.conditions import take
from pyro_vae_defence.models.program import ModelPotential
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import VAE

KernelFactory = Callable[[Callable[..., Any]], MCMCKernel]


class _Counted(torch.autograd.Function):
    """A value as it is, counted: as an operation, which a compiled kernel runs each time, too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, model: EnergyModel) -> Tensor:
        model.num_calls += 1
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class EnergyModel:
    """A Pyro program whose log-density is minus an energy, whatever arguments it is run with.

    Every site is real and has density 1; the energy enters as a factor.

    Args:
        energy: energy of one image.

    Attributes:
        num_calls: how many energies were asked for.
    """

    def __init__(self, energy: ModelPotential) -> None:
        self.energy = energy
        self.num_calls = 0
        self._zeros = {name: torch.zeros_like(v) for name, v in energy.prototype.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Sample the latents and weigh them."""
        latents = {}
        for name, zeros in self._zeros.items():
            # Masked, a normal has density 1; kernels that look for a start can still draw from it.
            normal = dist.Normal(zeros, torch.ones_like(zeros)).to_event(zeros.dim())
            # A mask of Python's own would give a log-probability of torch's default dtype.
            nothing = torch.zeros((), dtype=torch.bool, device=zeros.device)
            latents[name] = pyro.sample(name, normal.mask(nothing))
        pyro.factor("minus the energy", _Counted.apply(-self.energy(latents).sum(), self))


def run_one_by_one(
    make_kernel: Callable[[EnergyModel], MCMCKernel],
    energy_of: Callable[[VAE, Tensor], ModelPotential],
    x: Tensor,
    streams: Streams,
    start: ChainStart,
    lengths: Lengths,
    progress: bool,
) -> Chains:
    """Run a fresh kernel for each chain of each image of ``x``, a row of ``streams`` each.

    These decide on starts alone; the kernels' own noise comes from torch's global generators.

    Raises:
        ValueError: if a chain would start at a non-finite energy.
    """
    folded = x.repeat(lengths.num_chains, 1, 1, 1)
    runs = []
    for row in tqdm(range(len(folded)), unit="chain", disable=not progress, leave=False):
        one = slice(row, row + 1)
        alone = Streams(streams.seed, streams.image[one], streams.chain[one])
        image = slice(row % len(x), row % len(x) + 1)
        begin = start._replace(vae=take(start.vae, image))
        runs.append(_run(make_kernel, energy_of, folded[one], alone, begin, lengths))

    def grid(values: list[Tensor]) -> Tensor:
        """One tensor ``(chain, image, ...)``."""
        return lat.unfold(torch.stack(values), lengths.num_chains)

    def by_draw(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {n: grid([value[n] for value in values]).transpose(1, 2) for n in values[0]}

    return Chains(
        {n: grid([run.initial[n] for run in runs]) for n in runs[0].initial},
        by_draw([run.samples for run in runs]),
        by_draw([run.sample_stats for run in runs]),
        grid([run.num_gradients for run in runs]).sum(0),
    )


def _run(
    make_kernel: Callable[[EnergyModel], MCMCKernel],
    energy_of: Callable[[VAE, Tensor], ModelPotential],
    x: Tensor,
    streams: Streams,
    start: ChainStart,
    lengths: Lengths,
) -> Chains:
    """One chain of one image, without the dimensions of chains and images."""
    energy = energy_of(start.vae, x)
    position = start(x, energy, streams)
    if not bool(energy(position).isfinite().all()):
        # Pyro's own search for a step size would not come back from here.
        raise ValueError(
            f"the starting energy is not finite for image {int(streams.image)}, chain "
            f"{int(streams.chain)}; check the image and what the guide returns for it"
        )
    model = EnergyModel(energy)
    calls = [0]  # by the end of each transition
    acceptance: list[float] = []
    diverging: list[bool] = []
    step_sizes: list[float] = []

    def collect(kernel: Any, params: Any, stage: str, number: int) -> None:
        calls.append(model.num_calls)
        if stage.startswith("Warmup"):
            return
        report = kernel.diagnostics()
        # Pyro's kernels keep running means, whose differences are the transitions' own values: of
        # acceptance probabilities, which their logging() rounds, or else of what was accepted.
        share = report.get("acceptance rate", np.nan)
        total = (number + 1) * float(getattr(kernel, "_mean_accept_prob", share))
        acceptance.append(min(1.0, max(0.0, total - sum(acceptance))))
        diverging.append(number in report.get("divergences", ()))
        step_sizes.append(float(getattr(kernel, "step_size", np.nan)))

    mcmc = MCMC(
        make_kernel(model),
        lengths.num_samples,
        lengths.warmup_steps,
        initial_params={name: value.clone() for name, value in position.items()},
        hook_fn=collect,
        disable_progbar=True,
    )
    with torch.enable_grad():  # which Pyro's kernels leave to the caller
        mcmc.run(x)
    found = mcmc.get_samples()  # in an order of Pyro's own
    draws = {name: found[name][:, 0] for name in position}
    with torch.no_grad():
        repeated = energy_of(start.vae, x.expand(lengths.num_samples, -1, -1, -1))
        samples = repeated.constrain(draws)
        stats = {
            "acceptance_rate": x.new_tensor(acceptance),
            "diverging": torch.tensor(diverging, device=x.device),
            "lp": -repeated(draws),
            "step_size": x.new_tensor(step_sizes),
            "n_steps": torch.tensor(calls, device=x.device).diff()[lengths.warmup_steps :],
        }
    kept = slice(-lengths.keep_draws, None)
    return Chains(
        lat.index(energy.constrain(position), 0),
        lat.index(samples, kept),
        lat.index(stats, kept),
        torch.tensor(model.num_calls + start.num_gradients, device=x.device),
    )
