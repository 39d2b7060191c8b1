"""What the suite costs, in gradients of the decoder per image, before it runs.

A model of what :func:`~pyro_vae_defence.robustness.evaluate.evaluate_robustness` does: the chain of
a defence, one gradient of a goal, two for a Hessian-vector product, four for a gradient that is
differentiated again. Runs of the network without gradient are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pyro_vae_defence.defence import Defence, MCMCDefence, NoDefence
from pyro_vae_defence.defence.mode import PosteriorModeDefence
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS
from pyro_vae_defence.mcmc.kernels import BatchedKernel
from pyro_vae_defence.models.program import target
from pyro_vae_defence.robustness.budget import Budget
from pyro_vae_defence.robustness.fidelity import RANDOM_DIRECTIONS
from pyro_vae_defence.robustness.suite import ATTACKS, KNOWLEDGE, OF_CHAINS
from pyro_vae_defence.robustness.whitebox import MODE_STEPS, runs_as

_BLACK_BOXES = [row.name for row in ATTACKS if row.black_box]


class ChainCost(NamedTuple):
    """Gradients of a defence per image.

    Attributes:
        whole: of a run, with all its chains.
        transition: of one transition of one chain, on average.
        transitions: how many a chain makes; 0 for a defence that is none, such as a filter.
        chains: of a run, where attackers run one per draw.
    """

    whole: float
    transition: float = 0.0
    transitions: int = 0
    chains: int = 1


def chain_cost(defence: Defence) -> ChainCost | None:
    """What one image costs a defence; ``None`` for :class:`~pyro_vae_defence.defence.NoDefence`.

    That of NUTS is an upper bound, its largest trees, and so is that of chains that stop when they
    have converged; what is not known counts as one.
    """
    if runs_as(defence, NoDefence):
        return None
    if isinstance(defence, PosteriorModeDefence):
        return ChainCost(float(defence.num_steps + 1))
    if not isinstance(defence, MCMCDefence):
        return ChainCost(1.0)
    kernel = defence.kernel(target(defence.vae, defence.perturbation))
    begin = defence.start(defence.vae, kernel)
    made, start = defence.lengths(kernel, begin, 0), begin.num_gradients
    number = made.warmup_steps + made.num_samples
    if not isinstance(kernel, BatchedKernel):
        length = float(getattr(kernel, "num_steps", None) or 1)
        return ChainCost((start + number * length + 1) * defence.num_chains, length, number)
    lengths = [kernel.gradients_of(0, step) for step in range(number)]
    first = kernel.burn_in
    whole = (start + sum(lengths) + 1) * defence.num_chains
    if not runs_as(defence, MCMCDefence):
        return ChainCost(float(whole))
    # Chains of other kernels, and those that stop together, attackers run as the defence does.
    alone = isinstance(kernel, (BatchedHMC, BatchedNUTS)) and defence.until_converged is None
    chains = defence.num_chains if alone else 1
    return ChainCost(float(whole), (sum(lengths) - first) / number, number, chains)


def suite_gradients(
    chain: ChainCost | None,
    budget: Budget,
    num_images: int,
    attacks: Sequence[str] = tuple(KNOWLEDGE),
    checks: bool = True,
) -> dict[str, float]:
    """Decoder gradients per image of each attack, of ``scoring``, and of ``checks``.

    Args:
        chain: what the defence costs; ``None`` if there is none.
        budget: how hard the suite tries.
        num_images: images that are evaluated together.
        attacks: names in :data:`~pyro_vae_defence.robustness.suite.ATTACKS`.
        checks: whether the sanity checks run.
    """
    whole = 1.0 if chain is None else chain.whole
    one = 1.0 if chain is None else chain.whole / chain.chains
    length = 0.0 if chain is None else chain.transition
    transitions = 0 if chain is None else chain.transitions
    known = transitions > 0
    going_on = one
    if budget.persistent_transitions is not None and (known or chain is None):
        going_on = budget.persistent_transitions * length + 2 if known else 0.0
    of_step = {
        "transfer": 1.0,
        "encoder": 1.0,
        "bpda": going_on + 2,
        "equilibrium": going_on + 3,
        # Two populations, whose transitions each begin with a gradient.
        "evidence": 2 * ((budget.persistent_transitions or 1) * length + 2),
        "implicit": going_on + 2 * budget.num_iterations + 3,
        "truncated": going_on + 4 * length * budget.unrolled_transitions + 4,
        "mode": MODE_STEPS + 2 * budget.num_iterations + 4,
        "unroll": one + 4 * transitions * length,
    }
    of_step["continuation"] = of_step["equilibrium"]
    draws = {row.name: row.draws(budget) for row in ATTACKS}
    stages = {row.name: row.stages for row in ATTACKS}

    def attack(name: str, rows: int, num_steps: int) -> float:
        if name in _BLACK_BOXES:
            queries = budget.black_box_steps * (2 * budget.num_directions + 1) + 2
            return rows * queries * one
        # Where a stage begins, and the value of what it found.
        runs = chain is not None and name not in ("transfer", "encoder", "unroll")
        whole_runs = 2 * len(stages[name](num_steps)) if runs else 0
        of_run = MODE_STEPS + 1 if name == "mode" else one
        return rows * (num_steps * of_step[name] + whole_runs * of_run)

    found: dict[str, float] = {}
    for name in attacks:
        if chain is None and name not in ("transfer", "encoder", *_BLACK_BOXES):
            continue
        if not known and name in OF_CHAINS:
            continue
        limit = budget.max_evaluations
        if limit is not None and sum(found.values()) >= limit:
            break
        found[name] = attack(name, budget.num_restarts * sum(draws[name]), budget.num_steps)
    per_attack = budget.num_restarts * budget.selection_draws + budget.scoring_draws
    if budget.iterates > 1:
        per_attack += budget.num_restarts * (budget.iterates + 1) * budget.iterate_draws
    scored = 2 * budget.scoring_draws + budget.selection_draws + 1 + per_attack * len(found)
    found["scoring"] = scored * whole
    if checks:
        # Five attacks by the strongest, at worst the most expensive, on a few images.
        rows = max(budget.num_chains, *budget.num_draws)
        kinds = [name for name in found if name not in ("scoring", *_BLACK_BOXES)]
        worst = max((attack(name, rows, budget.check_steps) for name in kinds), default=0.0)
        looked_at = budget.scoring_draws * whole + max(5, budget.selection_draws) * one
        # The mean gradient of each, and two ends per direction.
        averaged = sum(attack(name, draws[name][-1], budget.check_steps) for name in kinds)
        ends = 2 * (len(kinds) + RANDOM_DIRECTIONS) * budget.check_draws if kinds else 0
        of_checks = 5 * worst + 3 * looked_at + averaged + ends * one
        found["checks"] = of_checks * min(budget.check_images, num_images) / num_images
    return found
