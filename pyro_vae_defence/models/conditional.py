r"""A small conditional VAE of images given their class: networks for all classes, or for each.

.. math::
    z \sim N(0, I_D), \qquad x \mid z, y \sim \mathrm{Bernoulli}\bigl(g_\theta(z, y)\bigr), \qquad
    q_\phi(z \mid x, y) = N\bigl(m_\phi(x, y), \mathrm{diag}\, s_\phi^2(x, y)\bigr),

on intensities in [0, 1]. It is made for analysis by synthesis
(:mod:`pyro_vae_defence.defence.synthesis`), which explains every image by every class and
integrates over z: few latents, so that the integral can be estimated well, and dense layers, whose
energies cost less than those of :class:`~pyro_vae_defence.models.ConvVAE`.
Activations are smooth, since chains follow the decoder's gradient.

With one encoder and decoder for all classes, the class is an input. With one for each, the model is
an ensemble of K VAEs which have no parameter in common, :math:`\theta = (\theta_1, \dots,
\theta_K)` and likewise :math:`\phi`, each of images of its own class.

Kingma, Rezende, Mohamed, Welling, "Semi-supervised learning with deep generative models", 2014,
https://arxiv.org/abs/1406.5298 (M2 with observed classes).

Schott, Rauber, Bethge, Brendel, "Towards the first adversarially robust neural network model on
MNIST", ICLR 2019, https://arxiv.org/abs/1805.09190 (one VAE per class).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from pyro_vae_defence.models.scope import ScopedModule
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.types import Latents


class ConditionalVAE(ScopedModule):
    """Images given classes, as two Pyro programs over the sites ``z`` and ``obs``.

    Args:
        image_shape: shape ``(C, H, W)`` of the images.
        num_classes: number of classes K, 2 or more.
        latent_dim: number of latent dimensions D.
        hidden_dim: width of the two hidden layers of encoder and decoder.
        per_class: whether each class has an encoder and a decoder of its own, of this width.

    The programs take images ``(N, C, H, W)`` in [0, 1] and classes as one-hot vectors ``(N, K)``.

    Raises:
        ValueError: if an argument is out of range, or, by the programs, images or classes have
            another shape.

    Example:
        >>> vae, y = ConditionalVAE(), torch.eye(10)[[3, 7]]
        >>> vae.guide(torch.rand(2, 1, 28, 28), y).shape
        torch.Size([2, 10])
    """

    mean_posterior_variance: Latents | None = None
    """The training set's mean variance of the guide per site, where it is known."""

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        latent_dim: int = 10,
        hidden_dim: int = 512,
        per_class: bool = False,
    ) -> None:
        super().__init__()
        self.image_shape = _check_shape(image_shape)
        check_integer("num_classes", num_classes, 2)
        check_integer("latent_dim", latent_dim)
        check_integer("hidden_dim", hidden_dim)
        if not isinstance(per_class, bool):
            raise ValueError(f"per_class must be True or False, got {per_class!r}")
        self.num_classes = num_classes
        self.latent_dim = latent_dim
        self.hidden_dim = hidden_dim
        self.per_class = per_class
        pixels = math.prod(self.image_shape)
        networks = _DensePerClass if per_class else _dense
        self.encoder = networks(pixels, num_classes, hidden_dim, 2 * latent_dim)
        self.decoder = networks(latent_dim, num_classes, hidden_dim, pixels)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this architecture."""
        return {
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
            "latent_dim": self.latent_dim,
            "hidden_dim": self.hidden_dim,
            "per_class": self.per_class,
        }

    def posterior(self, x: Tensor, y: Tensor) -> dist.TorchDistribution:
        """q(z | x, y): images ``(N, C, H, W)`` and one-hot classes ``(N, K)`` to a Gaussian."""
        loc, log_variance = self.encoder(torch.cat([x.flatten(1), y], 1)).chunk(2, 1)
        return dist.Normal(loc, (0.5 * log_variance).exp()).to_event(1)

    def observation(self, z: Tensor, y: Tensor) -> dist.TorchDistribution:
        """p(x | z, y): latents ``(N, D)`` and one-hot classes ``(N, K)`` to a likelihood with event
        shape ``(C, H, W)``."""
        logits = self.decoder(torch.cat([z, y], 1)).reshape(-1, *self.image_shape)
        # Intensities are no outcomes of a coin; their log-likelihood is defined all the same.
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(3)

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Mean of p(x | z, y), images ``(N, C, H, W)``."""
        return self.observation(z, y).mean

    def model(self, x: Tensor, y: Tensor) -> Tensor:
        """Pyro program p(x, z | y)."""
        self._check(x, y)
        pyro.module(f"{self.scope}.decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            zeros = x.new_zeros(x.shape[0], self.latent_dim)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            return pyro.sample("obs", self.observation(z, y.to(z)), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> Tensor:
        """Pyro program q(z | x, y)."""
        self._check(x, y)
        pyro.module(f"{self.scope}.encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            return pyro.sample("z", self.posterior(x, y.to(x)))

    def _check(self, x: Tensor, y: Tensor) -> None:
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"x must have shape (N, *{self.image_shape}), got {tuple(x.shape)}")
        if tuple(y.shape) != (len(x), self.num_classes):
            raise ValueError(
                f"y must be one-hot classes of shape ({len(x)}, {self.num_classes}), got "
                f"{tuple(y.shape)}; see torch.nn.functional.one_hot"
            )


def _dense(inputs: int, num_classes: int, hidden: int, outputs: int) -> nn.Module:
    """Two hidden layers with smooth activations, of inputs that one-hot classes follow."""
    return nn.Sequential(
        nn.Linear(inputs + num_classes, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, outputs),
    )


class _DensePerClass(nn.Module):
    """The same layers once for each class, and of each row those of its class."""

    def __init__(self, inputs: int, num_classes: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        widths = [inputs, hidden, hidden, outputs]
        self.layers = nn.ModuleList(
            _LinearPerClass(num_classes, *each) for each in itertools.pairwise(widths)
        )

    def forward(self, inputs_and_class: Tensor) -> Tensor:
        h, y = inputs_and_class.tensor_split([self.inputs], 1)
        first, second, last = self.layers
        return last(silu(second(silu(first(h, y)), y)), y)


class _LinearPerClass(nn.Module):
    """Linear layers of classes, ``(N, in)`` and one-hot ``(N, K)`` to ``(N, out)``.

    One product of matrices: inputs stand in the columns of their class, zeros in those of others.
    No weights are gathered by rows, and nothing waits for the device.
    """

    def __init__(self, num_classes: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5  # as nn.Linear
        self.weight = nn.Parameter(
            torch.empty(num_classes, inputs, outputs).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.empty(num_classes, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        placed = (y[:, :, None] * x[:, None]).flatten(1)
        return placed @ self.weight.flatten(0, 1) + y @ self.bias


def _check_shape(shape: Any) -> tuple[int, int, int]:
    """The shape of an image, from a tuple or a card's list."""
    if not isinstance(shape, (tuple, list)) or len(shape) != 3:
        raise ValueError(f"image_shape must be (C, H, W), got {shape!r}")
    channels, height, width = shape
    for value in shape:
        check_integer("image_shape", value)
    return channels, height, width
