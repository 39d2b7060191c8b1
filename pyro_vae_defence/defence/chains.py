"""All chains of a micro-batch at once, with kernels of this library.

Chains fold into the batch: row ``c * N + i`` is chain c of image i. An image's chains stop after
their last transition or, under a :class:`~pyro_vae_defence.defence.convergence.ConvergenceRule`, at
the first look at which they keep it. Images that are done leave the batch once they are half of it,
unless the kernel couples images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae_defence.defence import convergence
from pyro_vae_defence.defence.convergence import Convergence, ConvergenceRule
from pyro_vae_defence.defence.result import Chains
from pyro_vae_defence.defence.starts import ChainStart
from pyro_vae_defence.mcmc.hmc import HMCInfo
from pyro_vae_defence.mcmc.kernels import BatchedKernel
from pyro_vae_defence.models.program import ModelPotential
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.types import Latents


class Lengths(NamedTuple):
    """Transitions of a chain, chains of an image, and how many of a chain's last draws are kept."""

    warmup_steps: int
    num_samples: int
    num_chains: int
    keep_draws: int

    def within(self, max_gradients: int, spent: int, kernel: BatchedKernel, seed: int) -> Lengths:
        """Cut to a budget per image, of which each chain has ``spent`` some before it begins.

        Warm-up keeps its share of the transitions that fit.

        Raises:
            ValueError: if no transition fits.
        """
        total = self.warmup_steps + self.num_samples
        budget = max_gradients // self.num_chains
        steps = 0
        while steps < total and spent + kernel.gradients_of(seed, steps) <= budget:
            spent += kernel.gradients_of(seed, steps)
            steps += 1
        if steps == 0:
            raise ValueError(
                f"max_gradients={max_gradients} leaves no transition to any of {self.num_chains} "
                f"chains: the start takes {spent} of the {budget} gradients of each; raise it"
            )
        warmup_steps = self.warmup_steps * steps // total
        num_samples = min(steps - warmup_steps, self.num_samples)
        return self._replace(warmup_steps=warmup_steps, num_samples=num_samples)


def run_batched(
    kernel: BatchedKernel,
    x: Tensor,
    start: ChainStart,
    lengths: Lengths,
    rule: ConvergenceRule | None,
    progress: bool,
) -> Chains:
    """Run a fresh kernel, whose ``streams`` have a row for each chain of ``x``."""
    warmup_steps, num_samples, num_chains, keep_draws = lengths
    folded = x.repeat(num_chains, 1, 1, 1)
    kernel.setup(warmup_steps, folded)
    energy = kernel.potential
    if not isinstance(energy, ModelPotential):
        raise ValueError(f"prepare must return a ModelPotential, it returned {energy!r}")
    assert kernel.streams is not None
    position = start(folded, energy, kernel.streams)
    initial = {n: lat.unfold(v, num_chains) for n, v in energy.constrain(position).items()}
    # The first state costs one.
    gradients = torch.full((folded.shape[0],), start.num_gradients + 1, device=x.device)
    history: deque[_Draw] = deque(maxlen=keep_draws if rule is None else None)
    present = torch.arange(x.shape[0], device=x.device)  # images in the batch
    running = torch.ones_like(present, dtype=torch.bool)
    finished: list[tuple[Tensor, Chains]] = []
    numbers = range(1, warmup_steps + num_samples + 1)
    for number in tqdm(numbers, unit="transition", disable=not progress, leave=False):
        position = kernel.sample(position)
        info = kernel.info
        assert info is not None
        gradients = gradients + info.num_steps
        made = number - warmup_steps
        if made < 1:
            continue
        history.append(_Draw(position, _statistics(info, kernel.state.energy)))
        last = made == num_samples
        if not last and (rule is None or made % rule.check_every):
            continue
        verdict = _look(history, lengths, rule)
        done = running
        if rule is not None and verdict is not None and not last:
            done = running & (verdict.converged | _stuck(history, rule.check_every, num_chains))
        columns = done.nonzero()[:, 0]
        if columns.shape[0] > 0:
            draws = _stack(list(history)[-keep_draws:], num_chains)
            seen = Chains(
                {name: value[:, present] for name, value in initial.items()},
                # Whatever the batch, a site's transform acts on its event dimensions, the last.
                energy.constrain(draws.position),
                draws.stats,
                lat.unfold(gradients, num_chains).sum(0),
                {} if verdict is None else verdict._asdict(),
            )
            if columns.shape[0] < present.shape[0]:
                seen = seen.take(columns)
            finished.append((present[columns], seen))
        running = running & ~done
        rows = running.nonzero()[:, 0]
        if rows.shape[0] == 0:
            break
        if 2 * rows.shape[0] <= present.shape[0] and not kernel.couples_images:
            chain = torch.arange(num_chains, device=x.device)[:, None]
            folded_rows = (chain * present.shape[0] + rows).flatten()
            kernel.keep(folded_rows)
            position = kernel.state.position
            gradients = gradients[folded_rows]
            history = deque(_Draw(*(lat.index(p, folded_rows) for p in draw)) for draw in history)
            present, running = present[rows], running[rows]
    kernel.cleanup()
    if len(finished) == 1:  # all images, in order: no copy of all draws
        return finished[0][1]
    order = torch.cat([images for images, _ in finished]).argsort()
    return Chains.join([part for _, part in finished]).take(order)


class _Draw(NamedTuple):
    """Unconstrained positions and statistics, of one transition of all rows or of many, stacked."""

    position: Latents
    stats: dict[str, Tensor]


def _statistics(info: HMCInfo, energy: Tensor) -> dict[str, Tensor]:
    """Those of a transition to potential energies ``energy``, by ArviZ's names."""
    return {
        "acceptance_rate": info.acceptance_rate,
        "diverging": info.diverging,
        "energy": info.energy,
        "lp": -energy,
        "step_size": info.step_size,
        "n_steps": info.num_steps,
        "tree_depth": info.tree_depth,
    }


def _stack(history: Sequence[_Draw], num_chains: int) -> _Draw:
    """Draws of one transition each to tensors ``(chain, draw, image, ...)``."""

    def stack(draws: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            name: torch.stack([lat.unfold(draw[name], num_chains) for draw in draws], 1)
            for name in draws[0]
        }

    return _Draw(*map(stack, zip(*history)))


def _look(
    history: Sequence[_Draw], lengths: Lengths, rule: ConvergenceRule | None
) -> Convergence | None:
    """What the draws at hand say; ``None`` where they, or chains, are too few."""
    if lengths.num_chains < convergence.MIN_CHAINS or len(history) < 2 * convergence.MIN_DRAWS:
        return None
    draws = _stack(history, lengths.num_chains)
    # Without a rule, history holds the last draws only.
    first = lengths.warmup_steps + (lengths.num_samples - len(history) if rule is None else 0)
    return convergence.assess(-draws.stats["lp"], draws.position, rule or ConvergenceRule(), first)


def _stuck(history: Sequence[_Draw], recent: int, num_chains: int) -> Tensor:
    """Images whose every one of the ``recent`` transitions diverged, in all chains."""
    diverging = torch.stack([draw.stats["diverging"] for draw in list(history)[-recent:]])
    return lat.unfold(diverging.all(0), num_chains).all(0)
