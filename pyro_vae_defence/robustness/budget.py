"""How hard the suite tries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyro_vae_defence.ops.checks import check_integer, check_not_negative, plain

_OPTIONAL = ("persistent_transitions", "max_evaluations")
_LEAST = {"num_chains": 2, "check_images": 2, "check_steps": 4, "check_draws": 2}


@dataclass(frozen=True)
class Budget:
    """How hard the suite tries.

    Args:
        num_steps: steps of every gradient attack, >= 1, which *continuation* shares out among its
            stages.
        num_restarts: random starts per image, each scored by itself, >= 1.
        num_draws: draws averaged per step (EOT), rising: the next is tried unless the last has
            changed the figure by less than ``stable``.
        stable: see ``num_draws``.
        num_chains: chains per image of the equilibrium gradient, and of either set of *evidence*,
            >= 2.
        persistent_transitions: transitions per step of chains that go on from the attacker's last
            step; ``None`` runs the whole defence, with which chains start anyway, at every step.
        unrolled_transitions: K of the truncated gradient, >= 1.
        num_iterations: conjugate gradient iterations of the implicit gradient, >= 1.
        num_directions: antithetic pairs per step of the black box, >= 1, of low frequency in
            restarts number 1, 3, ...
        black_box_steps: its steps, >= 1. Square has as many queries.
        max_evaluations: decoder evaluations per image after which no further attack starts;
            ``None`` for no limit.
        iterates: how many of a restart's iterates, those with the highest objectives, which few
            draws may have flattered, are scored to choose what the restart has found, >= 1; 1
            takes what the optimiser returns.
        iterate_draws: runs of the defence that score each of these, >= 1.
        selection_draws, scoring_draws: runs of the defence that choose the worst attack, and that
            are reported, >= 1.
        check_images, check_steps: images and steps of the attacks that checks need, >= 2 and >= 4.
        check_draws: chains per image at either end of a step whose effect gradients have to
            foretell, >= 2.

    :meth:`quick`, :meth:`standard` and :meth:`thorough` are budgets to begin with;
    :func:`~pyro_vae_defence.robustness.cost.suite_gradients` says what one costs.

    Raises:
        ValueError: if a number is out of range.
    """

    num_steps: int = 100
    num_restarts: int = 5
    num_draws: tuple[int, ...] = (1, 5, 20)
    stable: float = 0.02
    num_chains: int = 50
    persistent_transitions: int | None = 2
    unrolled_transitions: int = 2
    num_iterations: int = 10
    num_directions: int = 10
    black_box_steps: int = 50
    max_evaluations: int | None = None
    iterates: int = 1
    iterate_draws: int = 20
    selection_draws: int = 5
    scoring_draws: int = 20
    check_images: int = 16
    check_steps: int = 20
    check_draws: int = 64

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            no_limit = value is None and field.name in _OPTIONAL
            if field.name not in ("num_draws", "stable") and not no_limit:
                check_integer(field.name, value, _LEAST.get(field.name, 1))
        draws = self.num_draws
        if not (isinstance(draws, tuple) and draws):
            raise ValueError(f"num_draws must be a tuple of integers, got {draws!r}")
        for number in draws:
            check_integer("num_draws", number)
        if list(draws) != sorted(set(draws)):
            raise ValueError(f"num_draws must rise, got {draws!r}")
        check_not_negative("stable", self.stable)
        object.__setattr__(self, "num_draws", tuple(map(plain, draws)))
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))

    @classmethod
    def quick(cls) -> Budget:
        """For seeing that everything runs: a third of :meth:`standard` or less, attack by attack.

        Every attack that applies runs, whatever the chain costs, so that defences can be compared.
        Attacks of so few steps leave much more than stronger ones would; report no number of it.
        """
        return cls(
            num_steps=10,
            num_restarts=1,
            num_draws=(1,),
            num_chains=4,
            persistent_transitions=1,
            unrolled_transitions=1,
            num_iterations=3,
            num_directions=2,
            black_box_steps=1,
            selection_draws=1,
            scoring_draws=3,
            check_images=8,
            check_steps=8,
            check_draws=8,
        )

    @classmethod
    def standard(cls) -> Budget:
        """What one processor can do.

        About 56,000 decoder gradients of attacks per image behind a chain of 25 transitions, a
        fifth as many again to score them, and for each of the images that checks look at at most
        95,000.
        """
        return cls(
            num_restarts=1,
            num_draws=(1,),
            num_chains=8,
            persistent_transitions=1,
            unrolled_transitions=1,
            num_iterations=5,
            num_directions=5,
            black_box_steps=2,
            max_evaluations=51_000,
            selection_draws=2,
            scoring_draws=5,
            check_draws=16,
        )

    @classmethod
    def thorough(cls) -> Budget:
        """For claims, on a GPU: restarts, rising numbers of draws, many chains.

        About four million decoder gradients of attacks per image behind a chain of 25 transitions,
        and a million to choose among their iterates.
        """
        return cls(black_box_steps=2, iterates=5, max_evaluations=3_800_000)


def effort(budget: Mapping[str, Any]) -> dict[str, Any]:
    """What of a report's budget two defences have to have in common to be compared: all but what
    only judges a report, and the limit, where which binds a report is unreliable."""
    first = {"iterates": 1, "iterate_draws": Budget().iterate_draws}  # before there was a choice
    return {
        field.name: budget.get(field.name, first.get(field.name))
        for field in dataclasses.fields(Budget)
        if not field.name.startswith("check_") and field.name != "max_evaluations"
    }
