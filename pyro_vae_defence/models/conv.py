r"""The convolutional VAE of the paper (Table 6): 64 latents for 28x28 images, or larger ones.

.. math::
    z \sim N(0, I_{64}), \qquad x \mid z \sim p(x; g_\theta(z)), \qquad
    q_\phi(z \mid x) = N(m_\phi(x), \mathrm{diag}\, s_\phi^2(x)).

The likelihood is Bernoulli on intensities in [0, 1] for grey images and Gaussian with log-variance
:math:`-\log 2\pi` for colour images (the value with which the paper's ColorMNIST likelihoods agree;
it makes the Gaussian's normaliser vanish). The last layer of the decoder has 32 input channels; the
table's 31 is a misprint. Weights are Xavier-normal, biases zero.

Two more sizes, not in the paper, change as little of the table as they can. The encoder halves the
image until one pixel is left, which serves 32x32 as it is; in the decoder, the second layer's
kernel of 4x4 in place of 3x3 makes 8x8 pixels where the paper has 7x7, which the last two layers
double. At 64x64 both have one layer more of stride 2: the encoder ends with another convolution of
128 channels, and the decoder has a transposed one of 32 channels before its last layer.

Reference: Kuzina, Welling, Tomczak, "Alleviating Adversarial Attacks on Variational Autoencoders
with MCMC", NeurIPS 2022, https://arxiv.org/abs/2203.09940, appendix D.1.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vae_defence.models.scope import ScopedModule
from pyro_vae_defence.ops.checks import check_integer, plain
from pyro_vae_defence.types import Latents

Likelihood = Literal["bernoulli", "gaussian"]

GAUSSIAN_LOG_VARIANCE = -math.log(2 * math.pi)
IMAGE_SIZES = (28, 32, 64)
"""Height and width of the images of a :class:`ConvVAE`; the paper's are 28."""


class ConvVAE(ScopedModule):
    """The paper's VAE (Table 6) as two Pyro programs over the sites ``z`` and ``obs``.

    Args:
        in_channels: 1 (grey) or 3 (colour).
        latent_dim: number of latent dimensions; 64 in the paper.
        likelihood: ``"bernoulli"`` or ``"gaussian"``; ``None`` takes the paper's choice, Bernoulli
            for one channel and Gaussian otherwise.
        log_variance: log-variance of the Gaussian likelihood, per pixel.
        channels_last: keep convolutions in the channels-last layout, which is faster on CPUs
            and changes results by rounding only.
        image_size: height and width of the images, one of :data:`IMAGE_SIZES`.

    Images have shape ``(N, in_channels, image_size, image_size)`` with values in [0, 1].

    Raises:
        ValueError: if an argument is out of range, or, by the programs, images have another shape.

    Example:
        >>> vae = ConvVAE()
        >>> vae.guide(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 64])
    """

    mean_posterior_variance: Latents | None = None
    """The training set's mean variance of the guide per site, where it is known."""
    widths = (32, 64, 96, 128)
    """Channels of the hidden layers: of the encoder in this order, of the decoder in reverse."""

    def __init__(
        self,
        in_channels: int = 1,
        latent_dim: int = 64,
        likelihood: Likelihood | None = None,
        log_variance: float = GAUSSIAN_LOG_VARIANCE,
        channels_last: bool = True,
        image_size: int = 28,
    ) -> None:
        super().__init__()
        check_integer("in_channels", in_channels)
        check_integer("latent_dim", latent_dim)
        check_integer("image_size", image_size)
        if likelihood is None:
            likelihood = "bernoulli" if in_channels == 1 else "gaussian"
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"likelihood must be 'bernoulli' or 'gaussian', got {likelihood!r}")
        log_variance = plain(log_variance)
        number = isinstance(log_variance, (int, float)) and not isinstance(log_variance, bool)
        if not (number and abs(log_variance) < 100):
            raise ValueError(f"log_variance must be a number within +-100, got {log_variance!r}")
        if image_size not in IMAGE_SIZES:
            raise ValueError(
                f"image_size must be one of {IMAGE_SIZES}, got {image_size!r}: scale or pad the "
                "images to one of these, e.g. by data.load_folder(path, image_size=64)"
            )
        self.in_channels = in_channels
        self.latent_dim = latent_dim
        self.likelihood: Likelihood = likelihood
        self.log_variance = log_variance
        self.channels_last = channels_last
        self.image_size = image_size
        large = image_size == 64
        first, second, third, last = self.widths

        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, first, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(second, third, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(third, last, 3, stride=2, padding=1),
            nn.ReLU(),
            *((nn.Conv2d(last, last, 3, stride=2, padding=1), nn.ReLU()) if large else ()),
        )
        self.latent_loc = nn.Conv2d(last, latent_dim, 3, stride=2, padding=1)
        self.latent_log_variance = nn.Conv2d(last, latent_dim, 3, stride=2, padding=1)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(latent_dim, last, 3, dilation=2),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(last, third, 3 if image_size == 28 else 4),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(third, second, 3, padding=1),
            nn.ReLU(inplace=True),
            _doubling(second, first),
            nn.ReLU(inplace=True),
            *((_doubling(first, first), nn.ReLU(inplace=True)) if large else ()),
            _doubling(first, in_channels),
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_normal_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of the images."""
        return (self.in_channels, self.image_size, self.image_size)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this architecture."""
        names = ["in_channels", "latent_dim", "likelihood", "log_variance"]
        if self.image_size != 28:  # cards of the paper's size are as they have always been
            names.append("image_size")
        return {name: getattr(self, name) for name in names}

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x): images ``(N, C, H, W)`` to a Gaussian with batch ``(N,)``, event ``(D,)``."""
        hidden = self.encoder(self._layout(x))
        loc = self.latent_loc(hidden).flatten(1)
        scale = (0.5 * self.latent_log_variance(hidden).flatten(1)).exp()
        return dist.Normal(loc, scale).to_event(1)

    def observation(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z): latents ``(N, D)`` to a likelihood with event shape ``(C, H, W)``."""
        first, _, second, relu, third, *others, last = self.decoder
        output = relu(_first_two_layers(z, first, second))
        if z.is_cuda:
            output = _third_layer(output.contiguous(), third)
        else:
            output = third(self._layout(output))
        for layer in others:
            output = layer(output)
        output = last(output) if z.is_cuda else _last_layer(output, last)
        if self.likelihood == "bernoulli":
            # Intensities are no outcomes of a coin; their log-likelihood is defined all the same.
            return dist.Bernoulli(logits=output, validate_args=False).to_event(3)
        scale = math.exp(0.5 * self.log_variance)
        return dist.Normal(output, torch.full_like(output, scale)).to_event(3)

    def decode(self, z: Tensor) -> Tensor:
        """Mean of p(x | z): latents ``(N, D)`` to images ``(N, C, H, W)``."""
        return self.observation(z).mean

    def model(self, x: Tensor, beta: float = 1.0) -> Tensor:
        """Pyro program p(x, z); ``beta`` > 0 scales the log-density of the latents."""
        self._check(x, beta)
        pyro.module(f"{self.scope}.decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            zeros = x.new_zeros(x.shape[0], self.latent_dim)
            with poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            return pyro.sample("obs", self.observation(z), obs=x)

    def guide(self, x: Tensor, beta: float = 1.0) -> Tensor:
        """Pyro program q(z | x), scaled like the model's latents."""
        self._check(x, beta)
        for name in ("encoder", "latent_loc", "latent_log_variance"):
            pyro.module(f"{self.scope}.{name}", getattr(self, name))
        with pyro.plate("data", x.shape[0]), poutine.scale(scale=beta):
            return pyro.sample("z", self.posterior(x))

    def _layout(self, x: Tensor) -> Tensor:
        # Activations only: Pyro's parameter store makes parameters contiguous, hence would train a
        # copy of channels-last weights.
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def _check(self, x: Tensor, beta: float) -> None:
        if not beta > 0:
            raise ValueError(f"beta must be > 0, got {beta}; beta = 1 is the plain VAE")
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(
                f"x must have shape (N, {self.in_channels}, {self.image_size}, {self.image_size}), "
                f"got {tuple(x.shape)}"
            )


def _doubling(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """A layer whose output is twice as high and wide as its input."""
    return nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)


# The decoder's outer layers have shapes that general routines for transposed convolutions handle
# slowly. These two functions compute the same, up to rounding, in about half the time on a CPU.


def _first_two_layers(z: Tensor, first: Any, second: Any) -> Tensor:
    """``second(relu(first(z)))`` of latents ``(N, D)``: ``(N, 96, 7, 7)``, or 8x8 by a kernel of 4.

    A single pixel through a 3x3 kernel of dilation 2 reaches the 9 even positions of 5x5, so the
    first layer is a matrix product. The other 16 positions hold relu(bias) for every image: their
    share of the second layer is computed once; that of the 9 is a transposed convolution.
    """
    weight = first.weight.permute(0, 2, 3, 1).reshape(first.in_channels, -1)
    hidden = torch.addmm(first.bias.repeat(9), z, weight).relu()
    moving = hidden.reshape(-1, 3, 3, first.out_channels).permute(0, 3, 1, 2)
    even = torch.arange(5, device=z.device) % 2 == 0
    constant = (
        first.bias.relu()[:, None, None].expand(-1, 5, 5).masked_fill(even[:, None] & even, 0.0)
    )
    share = F.conv_transpose2d(constant[None], second.weight, second.bias)
    return F.conv_transpose2d(moving, second.weight, stride=2) + share


def _third_layer(x: Tensor, layer: Any) -> Tensor:
    """``layer(x)`` for a stride of 1, as the convolution with the kernel turned round.

    On CUDA in float32 and with gradients, in half the time on an H200.
    """
    weight = layer.weight.flip(2, 3).transpose(0, 1)
    padding = layer.kernel_size[0] - 1 - layer.padding[0]
    return F.conv2d(x, weight, layer.bias, padding=padding)


def _last_layer(x: Tensor, layer: Any) -> Tensor:
    """``layer(x)`` for 4x4 kernels of stride 2: a matrix product, then overlapping sums.

    Not on CUDA, where the gradient of such sums is one launch per image.
    """
    count, channels, height, width = x.shape
    taps = x.permute(0, 2, 3, 1).reshape(-1, channels) @ layer.weight.reshape(channels, -1)
    columns = taps.reshape(count, height * width, -1).transpose(1, 2)
    size = (2 * height, 2 * width)
    return F.fold(columns, size, 4, stride=2, padding=1) + layer.bias[:, None, None]
