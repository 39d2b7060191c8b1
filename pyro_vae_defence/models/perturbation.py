r"""The perturbation-aware posterior: what a defender samples who assumes that x may have been perturbed.

The posterior of an attacked image is the wrong posterior: it takes the perturbation for signal. If the
perturbation is assumed to lie in a ball of radius :math:`\delta`, the energy becomes

.. math::
    U_\delta(z; x) = \min_{\|e\|_p \le \delta,\; 0 \le x - e \le 1} \bigl[-\log p(x - e \mid z)\bigr] - \log p(z).

For every attack inside the ball, :math:`e = x^a - x^r` is feasible, hence
:math:`U_\delta(z; x^a) \le U_0(z; x^r)` for all z: no such attack can lower the unnormalised density of a
latent that explained the reference; it can only add other explanations. :math:`\delta` is the defender's choice,
not knowledge of the attack, and :math:`\delta = 0` is the paper's defence.

The minimiser :math:`x^* = x - e` is found per likelihood by :func:`most_likely_image`. For the gradient in z it may be
taken for a constant, by the envelope theorem; energies use it in full, so that Hamiltonian kernels stay exact for
:math:`\exp(-U_\delta)`. It stays in the graph nevertheless: second derivatives need how it moves with z, and an
attacker needs how it moves with x, which is where the ball, and not the range [0, 1] or the likelihood, holds it,

.. math::
    \nabla_x U_\delta(z; x) = -\nabla \log p(x^* \mid z) \odot 1[|x^* - x| = \delta].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from pyro_vae_defence.ops.balls import Ball, Linf

__all__ = ["PerturbationAware", "most_likely_image"]


@functools.singledispatch
def most_likely_image(likelihood: Any, x: Tensor, ball: Ball) -> Tensor:
    """The image x - e with e in the ball and values in [0, 1] that ``likelihood`` finds most probable.

    To add a likelihood, register a function of the same three arguments for its class::

        @most_likely_image.register
        def _(likelihood: MyLikelihood, x: Tensor, ball: Ball) -> Tensor: ...

    Args:
        likelihood: p(x | z) with one row per image.
        x: observed images, of the shape the likelihood observes, values in [0, 1].
        ball: where perturbations live.

    Returns:
        Images of the shape of ``x``.

    Raises:
        ValueError: for a likelihood or a ball without a known minimiser.
    """
    raise ValueError(
        f"no perturbation-aware posterior is known for the likelihood {type(likelihood).__name__}; "
        "register its minimiser with most_likely_image.register"
    )


@most_likely_image.register
def _(likelihood: Independent, x: Tensor, ball: Ball) -> Tensor:
    return most_likely_image(likelihood.base_dist, x, ball)


@most_likely_image.register
def _(likelihood: Bernoulli, x: Tensor, ball: Ball) -> Tensor:
    # The log-likelihood is linear in x, with the logits as slope.
    low, high = _interval(likelihood, x, ball)
    return torch.where(likelihood.logits > 0, high, low)


@most_likely_image.register
def _(likelihood: Normal, x: Tensor, ball: Ball) -> Tensor:
    low, high = _interval(likelihood, x, ball)
    return torch.minimum(torch.maximum(likelihood.loc, low), high)


def _interval(likelihood: Distribution, x: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
    """Smallest and largest value each pixel may have had."""
    if not isinstance(ball, Linf):
        raise ValueError(
            f"perturbation must be an Linf ball for a {type(likelihood).__name__} likelihood, got {ball!r}"
        )
    return (x - ball.radius).clamp(min=0.0), (x + ball.radius).clamp(max=1.0)


class _MostLikely(Messenger):
    """Replace the observed image by the most likely one in reach."""

    def __init__(self, ball: Ball) -> None:
        super().__init__()
        self.ball = ball

    def _pyro_sample(self, msg: Any) -> None:
        # Latents conditioned from outside are not yet observed here: this is the innermost handler.
        if not msg["is_observed"] or isinstance(msg["fn"], _Subsample):
            return
        msg["value"] = most_likely_image(msg["fn"], msg["value"], self.ball)


class PerturbationAware:
    """A Pyro model whose observation is the most likely image within a ball around its argument.

    Conditioned on latents, minus its log-density is :math:`U_\\delta(z; x)`; any kernel takes it for a model.

    Args:
        model: Pyro model p(x, z) that observes its image.
        ball: perturbations the defender assumes, e.g. ``Linf(0.1)``.

    Example:
        >>> from pyro_vae_defence.models import ConvVAE
        >>> from pyro_vae_defence.models.program import ModelPotential
        >>> vae, x = ConvVAE().eval(), torch.rand(2, 1, 28, 28)
        >>> z = {"z": torch.ones(2, 64)}
        >>> aware = ModelPotential(PerturbationAware(vae.model, Linf(0.1)), x)
        >>> bool((aware(z) < ModelPotential(vae.model, x)(z)).all())
        True
    """

    def __init__(self, model: Callable[..., Any], ball: Ball) -> None:
        if not isinstance(ball, Ball):
            raise ValueError(f"perturbation must be a ball such as Linf(0.1), got {ball!r}")
        self.model = model
        self.ball = ball

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with its observation replaced."""
        with _MostLikely(self.ball):
            return self.model(*args, **kwargs)
