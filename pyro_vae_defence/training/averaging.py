r"""Moving average of the weights.

After step :math:`t = 1, 2, \dots` with weights :math:`w_t`,

.. math:: \bar w_t = d_t\, \bar w_{t-1} + (1 - d_t)\, w_t, \qquad
          d_t = \min\{d, (1 + t) / (10 + t)\}.

The smaller decay of the first steps lets the average forget the initial weights, and changes
nothing once :math:`t > (10 d - 1) / (1 - d)`. Parameters are averaged on Pyro's unconstrained
scale; buffers, such as the statistics of batch norm, are not averaged.

Reference: Polyak, Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992,
https://doi.org/10.1137/0330046
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class WeightAverage:
    """The moving average of some parameters, and a way to put it in their place.

    Args:
        parameters: name -> parameter; the average starts at their present values.
        decay: limit of the decay, in (0, 1).

    Attributes:
        values: name -> average, while it is not in place of the parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.decay = decay
        self.values: dict[str, Tensor] = {}
        self.add(parameters)

    def add(self, parameters: Mapping[str, Tensor]) -> None:
        """Average these parameters too; those that have not moved so far join without a trace."""
        for name, value in parameters.items():
            if name not in self.parameters:
                self.parameters[name] = value
                self.values[name] = value.detach().clone()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step ``step`` >= 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self.values.items():
            value.lerp_(self.parameters[name], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and average, bit for bit; a second call undoes the first."""
        for name, value in self.values.items():
            kept = value.clone()
            value.copy_(self.parameters[name])
            self.parameters[name].copy_(kept)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the average in place of the parameters for a while."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
