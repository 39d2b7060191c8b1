"""What an evaluation found, in Python and in JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Check(NamedTuple):
    """A sanity check: ``passed`` is ``None`` where it does not apply."""

    name: str
    passed: bool | None
    detail: str


class AttackOutcome(NamedTuple):
    """One attack, scored on fresh seeds.

    Attributes:
        name, knowledge: as in :data:`~pyro_vae_defence.robustness.suite.KNOWLEDGE`.
        num_draws: draws (or chains) averaged per step.
        figure: mean figure and interval.
        evaluations, seconds: decoder evaluations per image, and wall time.
    """

    name: str
    num_draws: int
    figure: dict[str, float]
    evaluations: float
    seconds: float
    knowledge: str


@dataclass(frozen=True)
class RobustnessReport:
    """What :func:`~pyro_vae_defence.robustness.evaluate.evaluate_robustness` found.

    Attributes:
        figure: what is measured, e.g. ``"accuracy"`` or ``"ms_ssim[paper]"``; higher is better.
        threat_model: norm, radius, target and reading.
        robust: the per-image worst case: ``mean``, ``single``, ``worst_of_n`` and ``averaged``,
            each with estimate, interval and number of images.
        clean: the same without an attack.
        undefended_clean: mean figure of the VAE alone without an attack; for reconstructions the
            noise floor, two draws of the guide at the reference.
        random_noise: mean figure under random noise of the same radius.
        attacks: every attack that ran.
        skipped: attacks that did not, and why.
        checks: sanity checks.
        reasons: why the report is unreliable; empty if it is not.
        cost: of defending one clean image, and of the suite.
        seed, budget, defence, versions: what the run was made with.
        strongest: per image, the attack that was its worst.
        per_image: mean figure of the worst case, ``(N,)``.
        x_adv: its images ``(N, C, H, W)``.
    """

    figure: str
    threat_model: dict[str, Any]
    robust: dict[str, dict[str, float]]
    clean: dict[str, dict[str, float]]
    undefended_clean: dict[str, float]
    random_noise: dict[str, float]
    attacks: tuple[AttackOutcome, ...]
    skipped: dict[str, str]
    checks: tuple[Check, ...]
    reasons: tuple[str, ...]
    cost: dict[str, float]
    seed: int
    budget: dict[str, Any]
    defence: dict[str, Any]
    versions: dict[str, str]
    strongest: tuple[str, ...]
    per_image: Tensor
    x_adv: Tensor

    @property
    def reliable(self) -> bool:
        """Whether an attacker with access to the defence ran and no check failed."""
        return not self.reasons

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, as JSON knows it."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del found["x_adv"]
        for name in ("attacks", "checks"):
            found[name] = [entry._asdict() for entry in found[name]]
        found["per_image"] = self.per_image.tolist()
        found["unreliable"] = not self.reliable
        found["note"] = "Heuristic, not certified: an upper bound of the true robustness."
        return found

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"
