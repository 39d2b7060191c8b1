"""Attacked images in a file, beside a report, for others to score again.

A report says what its attacks left; who wants to believe it needs the images. The file of
:func:`save_attacked` holds references, attacked images, labels and conditions as tensors, and the
report with its seeds as text (safetensors, which runs no code when it is read). :func:`rescore`
makes sure that the images are in the ball, and runs a defence on them with noise that nobody has
seen: the same defence, whose figure should come out within its interval, or another one, for whose
attacker these images are a transfer attack.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from pyro_vae_defence.defence import Defence, DefendedClassifier
from pyro_vae_defence.models import program
from pyro_vae_defence.models.conditions import split
from pyro_vae_defence.ops.balls import L1, L2, Linf
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import as_device, check_integer
from pyro_vae_defence.ops.files import naming, write_atomically
from pyro_vae_defence.ops.streams import draw_seed
from pyro_vae_defence.robustness.evaluate import check_same, check_seed
from pyro_vae_defence.robustness.report import SUMMARIES, RobustnessReport
from pyro_vae_defence.robustness.scoring import Fresh, make_scorer
from pyro_vae_defence.robustness.suite import is_attack
from pyro_vae_defence.robustness.whitebox import WhiteBox
from pyro_vae_defence.types import VAE

_REPORT, _CONDITION, _NUMBER = "robustness report", "condition_", "number of conditions"
_BALLS = {ball.norm_name: ball for ball in (Linf, L2, L1)}


class Rescored(NamedTuple):
    """Figures of attacked images, scored anew.

    Attributes:
        figure: what is measured.
        robust, clean: ``mean``, ``single``, ``worst_of_n`` and ``averaged`` of the attacked
            images, and of the references, each with interval and number of images.
        per_image: mean figure of each attacked image, ``(N,)``.
        report: the file's.
    """

    figure: str
    robust: dict[str, dict[str, float]]
    clean: dict[str, dict[str, float]]
    per_image: Tensor
    report: RobustnessReport


def save_attacked(report: RobustnessReport, path: str | os.PathLike[str]) -> Path:
    """Write the images of a report's worst case, with what it takes to score them; the path.

    Raises:
        ValueError: if the report has no images, as one that was read from JSON, or is of a ball of
            one's own, which nobody could check them against.
    """
    if report.x_ref is None or report.x_adv is None:
        raise ValueError(
            "report holds no images, as one that was read from JSON; save that of "
            "evaluate_robustness itself"
        )
    if (norm := report.threat_model["norm"]) not in _BALLS:
        raise ValueError(
            f"report is of a ball of norm {norm!r}, which who reads the images does not have; save "
            f"those of an attack in a ball of {', '.join(_BALLS)}"
        )
    tensors = {"x_ref": report.x_ref, "x_adv": report.x_adv}
    if report.labels is not None:
        tensors["labels"] = report.labels
    given = enumerate(report.conditions)
    tensors |= {f"{_CONDITION}{k}": value for k, value in given if value is not None}
    # Labels may be a condition, too: safetensors asks for memory of its own.
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    texts = {_REPORT: json.dumps(report.to_dict()), _NUMBER: str(len(report.conditions))}
    write_atomically(path, save(own, texts))
    return Path(path)


def load_attacked(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> RobustnessReport:
    """The report of such a file, with its images on ``device``.

    Raises:
        ValueError: if it cannot be read, or its images are not in the ball that it names.
    """
    with naming(f"attacked images {path} cannot be read", "take another copy"):
        with safe_open(path, "pt") as file:
            texts = file.metadata()
            report = RobustnessReport.from_dict(json.loads(texts[_REPORT]))
        tensors = load_file(path, str(device))
        x_ref, x_adv = tensors["x_ref"], tensors["x_adv"]
        given = [int(n.removeprefix(_CONDITION)) for n in tensors if n.startswith(_CONDITION)]
        # Files of early versions do not say how many.
        places = range(int(texts.get(_NUMBER, 1 + max(given, default=-1))))
        conditions = tuple(tensors.get(f"{_CONDITION}{k}") for k in places)
        classes = report.threat_model["target"] == "classification"
        labels = tensors["labels"] if classes else None
        ball = _BALLS[report.threat_model["norm"]](report.threat_model["radius"])
        inside, norm = is_attack(x_adv, x_ref, ball), ball.norm(x_adv - x_ref)
    if not bool(inside.all()):
        raise ValueError(
            f"attacked images {path} leave the range [0, 1] or the {ball.norm_name} ball of radius "
            f"{ball.radius:g} around their references, by up to {float(norm.max()):g}: they are "
            "not those of an attack that the report allows"
        )
    return dataclasses.replace(
        report, x_ref=x_ref, x_adv=x_adv, labels=labels, conditions=conditions
    )


@public
def rescore(
    path: str | os.PathLike[str],
    vae: VAE,
    defence: Defence,
    *,
    classifier: Callable[..., Tensor] | None = None,
    similarity: Callable[[Tensor, Tensor], Tensor] | None = None,
    num_draws: int | None = None,
    defence_seed: int | None = None,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Rescored:
    """Score the attacked images of a file with fresh draws of a defence.

    Args:
        path: what :func:`save_attacked` has written.
        vae, defence, classifier, similarity: as for
            :func:`~pyro_vae_defence.robustness.evaluate.evaluate_robustness`; the figure has to be
            the file's, and the classifier's reading too.
        num_draws: runs of the defence, >= 1; as many as in the report if ``None``: *worst of N* and
            *averaged* of another number are other figures.
        defence_seed: a seed that the defence always runs with; fresh noise if ``None``, also where
            the attacker knew a seed.
        device: where it computes; VAE and classifier are there.
        generator: source of the seed; torch's global seed when ``None``.

    Raises:
        ValueError: if the file cannot be read, its images leave their ball, or an argument does not
            fit it.
    """
    if num_draws is not None:
        check_integer("num_draws", num_draws)
    defence_seed = check_seed(defence_seed)
    device = as_device("device", device)
    check_same(vae, defence, classifier)
    report = load_attacked(path, device)
    num_draws = num_draws or report.budget["scoring_draws"]
    needed = {
        "classifier": (report.threat_model["target"] == "classification", classifier),
        "similarity": (report.figure == "similarity", similarity),
    }
    for name, (wanted, given) in needed.items():
        if wanted != (given is not None):
            raise ValueError(
                f"attacked images {path} are scored by their {report.figure}: "
                f"{'pass its' if wanted else 'leave out the'} {name}"
            )
    reading = classifier.reading if isinstance(classifier, DefendedClassifier) else "last"
    asked = report.threat_model["reading"]
    if reading != asked:
        raise ValueError(
            f"attacked images {path} were scored with reading={asked!r}, the classifier given has "
            f"reading={reading!r}: pass DefendedClassifier(defence, classifier, {asked!r})"
        )
    x_ref, x_adv = report.x_ref, report.x_adv
    assert x_ref is not None
    assert x_adv is not None
    _, conditions = split((x_ref, *report.conditions))
    bound, x = program.at_images(vae, (x_ref, *conditions) if conditions else x_ref, "path")
    fresh = Fresh(draw_seed(generator))
    with program.evaluation_mode(bound, classifier):
        box = WhiteBox(bound, defence, x, fresh, conditions, defence_seed)
        scorer = make_scorer(box, x, report.labels, classifier, similarity, fresh)
        robust, clean = (scorer.score(each, num_draws).summaries() for each in (x_adv, x))

        def intervals(values: dict[str, Tensor]) -> dict[str, dict[str, float]]:
            return {name: scorer.of_figure(values[name]) for name in SUMMARIES}

        return Rescored(
            scorer.figure,
            intervals(robust),
            intervals(clean),
            robust["mean"].detach().cpu(),
            report,
        )
