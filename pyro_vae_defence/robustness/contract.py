"""Do a defence and a classifier of one's own keep their contract, tried on a few images?

Figures are per image, and attacks look for what a defence answers, time and again. Both take for
granted that

- an answer is of its own image, whatever stands beside it in the batch;
- the same images with the same generator have the same answer, before the attacks and after them;
- a result is of one piece: its reconstruction is that of its latents, and these are the last draw
  of its first chain. Attackers follow the latents, and nothing else.

Defences of this package do so, but for the paper's preset, whose step size is one for the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae_defence.defence import EncoderDefence, MCMCDefence, PosteriorModeDefence
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import class_scores, flatten_latents
from pyro_vae_defence.models.conditions import take
from pyro_vae_defence.ops.boundary import governed
from pyro_vae_defence.ops.checks import check_finite
from pyro_vae_defence.robustness.scoring import Accuracy, Scorer, Similarity
from pyro_vae_defence.robustness.suite import Suite
from pyro_vae_defence.robustness.whitebox import runs_as
from pyro_vae_defence.types import VAE

NUM_IMAGES = 8
_ROUNDING = 1e-3  # of the largest value


class Trial:
    """Answers to the first images of a ``suite``, with one seed, before and after the attacks."""

    def __init__(self, suite: Suite, seed: int) -> None:
        few, scorer = slice(0, NUM_IMAGES), suite.scorer
        self.x, self._seed = suite.x[few], suite.box.seed
        self._answers: dict[str, Callable[[Tensor], Tensor]] = {}
        if isinstance(scorer, Accuracy):
            vae, classifier = take(suite.box.vae, few), scorer.classifier.classifier
            self._answers["classifier"] = functools.partial(_scores, vae, classifier, seed)
        if _is_own(suite.box.defence):
            self._answers["defence"] = functools.partial(_run, scorer.at(few), seed)

    @torch.no_grad()
    def before(self) -> tuple[dict[str, Tensor], list[str]]:
        """The answers, and who does not repeat them.

        Raises:
            ValueError: for answers that hinge on other images, results that are not of one piece,
                and answers that differ although the seed is always the same.
        """
        first = self._answer()
        again = self._answer()
        restless = [name for name, answer in first.items() if not _same(answer, again[name])]
        if restless and self._seed is not None:
            raise ValueError(
                f"defence_seed={self._seed} is the seed of every run, but two runs by it differ, "
                f"by the {' and the '.join(restless)}: {_REPEAT}; or leave defence_seed out"
            )
        half = len(self.x) // 2
        others = torch.cat([self.x[:half], 1.0 - self.x[half:]])
        for name, answer in first.items():
            if name not in restless and not _same(
                answer[:half], self._answers[name](others)[:half]
            ):
                raise ValueError(
                    f"{name} answers an image otherwise if other images of its batch change, so "
                    "that there is no figure per image; make each row of its own image alone: no "
                    "mean, sorting or memory over the batch, and rows in their order"
                )
        return first, restless

    @torch.no_grad()
    def after(self, first: dict[str, Tensor], restless: list[str]) -> list[str]:
        """Reasons not to believe a report, from what :meth:`before` returned."""
        reasons = [
            f"the {name} answers the same images with the same seed otherwise the next time: "
            f"{_REPEAT}"
            for name in restless
        ]
        return reasons + [
            f"the {name} answers the same images with the same seed otherwise after the attacks "
            "than before them: it keeps something of what it was asked, so that what was attacked "
            "is not what was scored; have it keep nothing from call to call"
            for name, answer in self._answer().items()
            if name not in restless and not _same(first[name], answer)
        ]

    def _answer(self) -> dict[str, Tensor]:
        return {name: answer(self.x) for name, answer in self._answers.items()}


_REPEAT = (
    "take all noise from the generator that it is called with, or from torch's global one, and "
    "keep nothing from call to call"
)


def _is_own(defence: object) -> bool:
    """Whether what a defence does is anybody's own, and not this package's."""
    if runs_as(defence, EncoderDefence):
        return defence.preprocess is not None  # type: ignore[attr-defined]
    return not any(runs_as(defence, kind) for kind in (MCMCDefence, PosteriorModeDefence))


def _scores(vae: VAE, classifier: Callable[[Tensor], Tensor], seed: int, x: Tensor) -> Tensor:
    latents = program.posterior_mean(vae, x)
    with governed(torch.Generator().manual_seed(seed)):
        scores = class_scores(classifier, latents)
    check_finite("the score of classes", scores, "see what the classifier makes of latents")
    return scores


def _run(scorer: Scorer, seed: int, x: Tensor) -> Tensor:
    """Latents, one row per image, which decide what is scored."""
    result = scorer.defence(x, torch.Generator().manual_seed(seed))
    if isinstance(scorer, Similarity):
        decode = program.Decoder(scorer.defence.vae, result.x)
        if not _same(result.reconstruction, decode(result.latents, result.x).clamp(0.0, 1.0)):
            raise ValueError(
                "defence returns a reconstruction that is not that of its latents, through which "
                "it is attacked; return the latents that give it, or let what makes images of "
                "images be the preprocess of an EncoderDefence"
            )
    elif scorer.reading != "last":
        for name, value in result.latents.items():
            if not _same(result.samples[name][0, -1], value):
                raise ValueError(
                    f"defence returns samples[{name!r}], which reading={scorer.reading!r} reads, "
                    "whose last draw of the first chain is not its latents, through which it is "
                    "attacked; return both of the same chains"
                )
    return flatten_latents(result.latents)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two finite answers are equal up to rounding."""
    one, other = one.double(), other.double()
    return bool(((one - other).abs() <= _ROUNDING * one.abs().max()).all())
