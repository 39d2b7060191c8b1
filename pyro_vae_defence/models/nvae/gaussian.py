r"""Gaussians of the latent groups, from the raw output of a convolution.

The first half of the channels is the raw mean, the second half the raw log-scale. With
:math:`c(v) = 5 \tanh(v / 5)`,

.. math:: \mu = c(\mu_\text{raw}), \qquad \sigma = t \, (\exp c(\log\sigma_\text{raw}) + 0.01),

where :math:`t` is a temperature. Raw zeros, as at the top prior, give a standard deviation of 1.01.
"""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

CLAMP = 5.0
MIN_SCALE = 0.01


def soft_clamp(value: Tensor) -> Tensor:
    """Smooth and monotone map of the real line into (-5, 5)."""
    return CLAMP * (value / CLAMP).tanh()


def gaussian(raw: Tensor, temperature: float = 1.0) -> dist.Normal:
    """Elementwise Gaussian of shape ``(N, L, h, w)`` from raw parameters ``(N, 2 L, h, w)``."""
    loc, log_scale = raw.chunk(2, dim=1)
    scale = soft_clamp(log_scale).exp() + MIN_SCALE
    return dist.Normal(soft_clamp(loc), temperature * scale, validate_args=False)


def from_noise(q: dist.Normal, noise: Tensor) -> Tensor:
    """The draw of ``q`` that standard normal ``noise`` stands for."""
    return q.loc + q.scale * noise
