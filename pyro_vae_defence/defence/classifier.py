r"""Classification behind a defence: from the draws of a chain to class probabilities.

A defence turns images into draws :math:`z_{c,t}` of chains c at times t. A classifier of latents
reads them in one of five ways (:data:`Reading`),

.. math::
    \begin{aligned}
    \text{last:} \quad & p(y \mid z_{1,T}), \\
    \text{draws:} \quad & \tfrac{1}{CT} \textstyle\sum_{c,t} p(y \mid z_{c,t}), \\
    \text{mean:} \quad & p(y \mid \bar z), \qquad
        \bar z = \tfrac{1}{CT} \textstyle\sum_{c,t} z_{c,t}, \\
    \text{reencoded:} \quad & p\bigl(y \mid E_q[z \mid g(\bar z)]\bigr),
        \qquad g(z) = E[x \mid z], \\
    \text{vote:} \quad & \tfrac{1}{CT} \textstyle\sum_{c,t}
        1\bigl[y = \mathrm{argmax}_k\, p(k \mid E_q[z \mid g(z_{c,t})])\bigr].
    \end{aligned}

*Last* is the paper's protocol. A draw is noisier than the means that the paper's classifier was
trained on, which costs it dearly on clean images already: average over draws with a classifier that
was trained on draws, or hand the classifier a mean (of angles, their direction). *Reencoded*
decodes the mean and encodes the image that comes out, which has left the attack behind, so that the
classifier reads what it was trained on. *Vote* does so with every draw and counts classes; how many
votes an attack can take is bounded by :func:`pyro_vae_defence.robustness.mass_bound`. Of classes
with equally many votes, as 10 and 10 of 20 draws, the one of the lowest number is predicted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_vae_defence.defence.base import Defence, check_defence, runs
from pyro_vae_defence.defence.mcmc import MCMCDefence
from pyro_vae_defence.defence.result import DefenceResult
from pyro_vae_defence.models.classifier import class_scores
from pyro_vae_defence.models.conditions import bind, split
from pyro_vae_defence.models.contract import check_networks_on_device
from pyro_vae_defence.models.program import (
    Decoder,
    evaluation_mode,
    mean_of_draws,
    posterior_mean,
)
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import check_finite
from pyro_vae_defence.types import VAE, ImagesLike, Latents, LatentsLike

Reading = Literal["last", "draws", "mean", "reencoded", "vote"]
"""How a classifier reads the draws of a defence; see the module's text."""

READINGS: tuple[Reading, ...] = get_args(Reading)


@public
def read_latents(vae: VAE, result: DefenceResult, reading: Reading = "reencoded") -> Latents:
    """Latents a classifier is asked about, ``num`` per image: site -> ``(num, N, *event)``.

    Args:
        vae: the VAE that was defended.
        result: what its defence returned.
        reading: ``"draws"`` gives every draw of every chain, ``"vote"`` every one re-encoded, the
            others one value per image.

    Raises:
        ValueError: for an unknown reading.
    """
    _check_reading(reading)
    if reading == "last":
        return {name: value[None] for name, value in result.latents.items()}
    vae = bind(vae, result.x, result.conditions)
    values = {name: value.flatten(0, 1) for name, value in result.samples.items()}
    if reading not in ("draws", "vote"):
        means = mean_of_draws(vae, result.x, values)
        values = {name: value[None] for name, value in means.items()}
    if reading in ("reencoded", "vote"):
        with torch.no_grad(), evaluation_mode(vae):
            decode = functools.partial(Decoder(vae, result.x), x=result.x)
            number = len(next(iter(values.values())))
            every = [reencode(vae, lat.index(values, k), decode) for k in range(number)]
            values = {name: torch.stack([each[name] for each in every]) for name in values}
    return values


def _check_reading(reading: Any) -> None:
    if reading not in READINGS:
        raise ValueError(f"reading must be one of {READINGS}, got {reading!r}")


def reencode(vae: VAE, latents: LatentsLike, decode: Callable[[LatentsLike], Tensor]) -> Latents:
    """Guide's mean at the decoded ``latents``, differentiable: site -> ``(N, *event)``."""
    # A Gaussian likelihood's mean may leave the range the encoder knows.
    return posterior_mean(vae, decode(latents).clamp(0.0, 1.0))


@dataclass(eq=False, repr=False)
class DefendedClassifier:
    """Classes of images, predicted from latents that went through a defence.

    Args:
        defence: any defence or control, e.g. ``MCMCDefence(vae, perturbation=Linf(0.1))``.
        classifier: latents ``(M, D)`` of all sites together to scores ``(M, classes)``, such as a
            :class:`~pyro_vae_defence.models.classifier.LinearClassifier`, not a classifier of
            images. Sites are joined in the guide's order, as
            :func:`~pyro_vae_defence.models.classifier.flatten_latents` does; no check can tell
            another order of the same D. For ``reading="draws"`` it should be one trained on draws,
            else one trained on the guide's means.
        reading: what the classifier is asked about, see the module's text.

    Raises:
        ValueError: if an argument is not what it should be.

    Example:
        >>> from pyro_vae_defence.defence import MCMCDefence
        >>> from pyro_vae_defence.models import ConvVAE
        >>> from pyro_vae_defence.models.classifier import LinearClassifier
        >>> defence = MCMCDefence(ConvVAE(), num_samples=2, warmup_steps=1)
        >>> classify = DefendedClassifier(defence, LinearClassifier(64, 10))
        >>> classify.predict(torch.rand(3, 1, 28, 28)).shape
        torch.Size([3])
    """

    defence: Defence
    classifier: Callable[[Tensor], Tensor]
    reading: Reading = "reencoded"

    def __post_init__(self) -> None:
        check_defence(self.defence)
        if not callable(self.classifier):
            raise ValueError(f"classifier must be callable, got {self.classifier!r}")
        _check_reading(self.reading)

    @classmethod
    def paper(
        cls, vae: VAE, classifier: Callable[[Tensor], Tensor], *args: Any, **options: Any
    ) -> DefendedClassifier:
        """The published protocol: one draw, and a classifier trained on the guide's means.

        Further arguments go to :meth:`MCMCDefence.paper`.
        """
        return cls(MCMCDefence.paper(vae, *args, **options), classifier, "last")

    @public
    def __call__(self, x: ImagesLike, generator: torch.Generator | None = None) -> Tensor:
        """Log-probabilities of classes, ``(N, classes)`` in nats, of images ``(N, C, H, W)``.

        For ``reading="vote"`` they are logarithms of shares of votes, -inf for none. Arguments as
        those of the defence.
        """
        check_networks_on_device("classifier", self.classifier, "x", split(x)[0])
        parts = runs(self.defence, x, generator)
        return torch.cat([self.log_probabilities(part) for part in parts])

    def predict(self, x: ImagesLike, generator: torch.Generator | None = None) -> Tensor:
        """The most probable class of each image, int64 ``(N,)``."""
        return self(x, generator).argmax(-1)

    @public
    @torch.no_grad()
    def log_probabilities(self, result: DefenceResult) -> Tensor:
        """As a call, from a run of the defence that is at hand: ``(N, classes)``."""
        latents = read_latents(self.defence.vae, result, self.reading)
        num, rows = next(iter(latents.values())).shape[:2]
        folded = {name: value.flatten(0, 1) for name, value in latents.items()}
        with evaluation_mode(self.classifier):
            scores = class_scores(self.classifier, folded)
        check_finite("the score of classes", scores, "see what the classifier makes of latents")
        log_probs = scores.log_softmax(-1)
        if self.reading == "vote":
            votes = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])
            log_probs = votes.to(scores).log()
        return log_probs.unflatten(0, (num, rows)).logsumexp(0) - math.log(num)
