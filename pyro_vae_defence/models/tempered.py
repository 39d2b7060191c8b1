r"""A model whose likelihood counts for less: a surrogate that attackers climb first.

.. math:: U_b(z; x) = -b \log p(x \mid z) - \log p(z), \qquad 0 < b \le 1.

At a small inverse temperature b the posterior is wide, and its draws are read as several classes
where those of b = 1 agree on one. The tempered likelihood is that of the program at hand: around a
:class:`~pyro_vae_defence.models.perturbation.PerturbationAware` model it is the one of the most
likely image, which is the same image for every b.

Whatever the program observes is tempered: the image in all its parts, and further data. The weight
of a ``pyro.factor`` is left as it is. Of discrete latents y that are summed out every value has a
tempered likelihood, :math:`U_b = -\log \sum_y p(z, y)\, p(x \mid z, y)^b`.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae_defence.models.conditions import BoundProgram
from pyro_vae_defence.models.sites import Kind, kind
from pyro_vae_defence.ops.distributions import Reweighted
from pyro_vae_defence.types import PyroProgram


class _TemperedLikelihood(Reweighted):
    """A likelihood to the power of an inverse temperature, not normalised."""

    def __init__(self, likelihood: Any, inverse_temperature: float) -> None:
        super().__init__(likelihood)
        self.inverse_temperature = inverse_temperature

    def log_prob(self, value: Tensor) -> Tensor:
        return self.inverse_temperature * self.likelihood.log_prob(value)


class _Temper(Messenger):
    """Replace the distributions of what a program itself observes."""

    def __init__(self, inverse_temperature: float) -> None:
        super().__init__()
        self.inverse_temperature = inverse_temperature

    def _pyro_sample(self, msg: Any) -> None:
        # A latent is conditioned on by who stands outside, and no observation yet.
        if kind(msg) is Kind.OBSERVED and not isinstance(msg["fn"], Unit):
            msg["fn"] = _TemperedLikelihood(msg["fn"], self.inverse_temperature)


@dataclass(frozen=True)
class Tempered:
    """A Pyro model with its likelihood to the power of ``inverse_temperature``.

    Conditioned on latents, minus its log-density is :math:`U_b(z; x)`; any kernel takes it.

    Args:
        model: Pyro model p(x, z) that observes its image.
        inverse_temperature: b, in (0, 1].

    Raises:
        ValueError: if ``inverse_temperature`` is out of range.

    Example:
        >>> import torch
        >>> from pyro_vae_defence.models import ConvVAE
        >>> from pyro_vae_defence.models.program import ModelPotential
        >>> vae, x = ConvVAE().eval(), torch.rand(2, 1, 28, 28)
        >>> z = {"z": torch.ones(2, 64)}
        >>> tempered = ModelPotential(Tempered(vae.model, 0.1), x)
        >>> bool((tempered(z) < ModelPotential(vae.model, x)(z)).all())
        True
    """

    model: PyroProgram
    inverse_temperature: float

    def __post_init__(self) -> None:
        b = self.inverse_temperature
        number = isinstance(b, numbers.Real) and not isinstance(b, bool)
        if not (number and 0 < b <= 1):
            raise ValueError(
                f"inverse_temperature must be a number in (0, 1], got {b!r}; 1 is the model as it "
                "is"
            )

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the model with its observations tempered."""
        with _Temper(self.inverse_temperature):
            return self.model(x, *args, **kwargs)


def tempered(model: PyroProgram, inverse_temperature: float) -> PyroProgram:
    """:class:`Tempered`, with the conditions that the model is bound to."""
    if isinstance(model, BoundProgram):
        return model.around(Tempered(model.program, inverse_temperature))
    return Tempered(model, inverse_temperature)
