r"""Volume-preserving autoregressive flows that enrich the posterior of a latent group.

.. math:: z' = z - m(z), \qquad \log\lvert\det \partial z' / \partial z\rvert = 0,

where :math:`m` is a masked convolutional network: in raster order, and by channel within a pixel,
:math:`m_i` reads only elements before :math:`i`. A mirrored flow starts at the other end.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import AffineTransform, ComposeTransform, Transform

from pyro_vae_defence.models.nvae.layers import Conv2d, filter_norm, nested

HIDDEN_FACTOR = 6
SHIFT_INIT = 0.1


def autoregressive_mask(
    out_channels: int, in_channels: int, kernel_size: int, *, zero_diag: bool, mirror: bool
) -> Tensor:
    """Which weights a causal convolution may use: 1 or 0, shape ``(C_out, C_in, k, k)``.

    Rows above the centre are free, and so is the left half of the centre row; at the centre itself
    an output channel reads the input channels of earlier blocks, and of its own unless
    ``zero_diag``. ``mirror`` flips space, not channels. A depthwise kernel reads its own channel.
    """
    centre = kernel_size**2 // 2
    # Made on the CPU whatever the default device: integers are slow to divide on ``meta``.
    mask = torch.zeros(out_channels, in_channels, kernel_size**2, device="cpu")
    mask[:, :, :centre] = 1
    # Outputs and inputs fall into the same number of consecutive blocks, the latent's channels.
    num_blocks = min(out_channels, in_channels)
    block_out = torch.arange(out_channels, device="cpu")[:, None] // (out_channels // num_blocks)
    block_in = torch.arange(in_channels, device="cpu") // (in_channels // num_blocks)
    mask[:, :, centre] = (block_in < block_out + (not zero_diag)).to(mask.dtype)
    return (mask.flip(2) if mirror else mask).unflatten(2, (kernel_size, kernel_size))


class MaskedConv2d(Conv2d):
    """Causal convolution: the weight is masked, then normalised."""

    mask: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, mirror: bool,
        zero_diag: bool = False, init_scale: float = 1.0, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, **options)
        shape = self.weight.shape[:3]
        mask = autoregressive_mask(*shape, zero_diag=zero_diag, mirror=mirror)
        self.register_buffer("mask", mask.to(self.weight), persistent=False)
        with torch.no_grad():
            self.log_weight_norm.copy_((init_scale * (filter_norm(self.direction()) + 1e-2)).log())

    def direction(self) -> Tensor:
        """The masked weight."""
        return self.weight * self.mask


class AutoregressiveShift(nn.Module):
    """The network ``m(z)``; z and result ``(..., L, h, w)``, element i reads those before it."""

    def __init__(self, channels: int, *, mirror: bool) -> None:
        super().__init__()
        hidden = HIDDEN_FACTOR * channels
        context = nn.Sequential(
            MaskedConv2d(channels, hidden, 3, mirror=mirror, zero_diag=True, bias=False),
            nn.ELU(),
            MaskedConv2d(hidden, hidden, 5, mirror=mirror, groups=hidden, bias=False),
            nn.ELU(),
            nn.ELU(),  # the ELU of an ELU: the published models are trained that way
        )
        shift = MaskedConv2d(hidden, channels, 1, mirror=mirror, init_scale=SHIFT_INIT)
        self.conv = nested("convz", context)
        self.mu = nested("conv_0", shift)

    def forward(self, z: Tensor) -> Tensor:
        """The shift ``m(z)``."""
        return self.mu(self.conv(z.flatten(0, -4))).reshape(z.shape)


class FlowPair(nn.Module):
    """Two flows, the second one mirrored; a :class:`ShiftTransform` applies each of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cell1 = AutoregressiveShift(channels, mirror=False)
        self.cell2 = AutoregressiveShift(channels, mirror=True)


class ShiftTransform(Transform):
    """``z -> z - m(z)`` on events ``(L, h, w)``.

    The value just produced is inverted from the cache. Any other value is inverted by iterating
    ``z = y + m(z)``, which ends after at most ``L h w`` steps, in practice much earlier, because
    ``m`` is strictly autoregressive; gradients are the implicit function's, first order only.

    Two transforms are equal when they share their network, so that the divergence of two posteriors
    behind the same flow is, as it must be, the divergence of their Gaussians.
    """

    domain = codomain = constraints.independent(constraints.real, 3)
    bijective = True

    def __init__(self, shift: nn.Module, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.shift = shift

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShiftTransform) and other.shift is self.shift

    def __hash__(self) -> int:
        return hash((ShiftTransform, id(self.shift)))

    def with_cache(self, cache_size: int = 1) -> ShiftTransform:
        """The same transform with another cache size."""
        return ShiftTransform(self.shift, cache_size)

    def _call(self, x: Tensor) -> Tensor:
        return x - self.shift(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return invert_shift(self.shift, y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zero for every event."""
        return x.new_zeros(x.shape[:-3])


class FlowPosterior(dist.TransformedDistribution):
    """Gaussian behind flows: the posterior of a latent group, event shape ``(L, h, w)``.

    Two posteriors behind the same flows have an exact KL-divergence. Moments have no closed form;
    ``mean``, the mode, and ``variance`` are stand-ins for those who need a point and a scale.
    """

    @property
    def mode(self) -> Tensor:
        """The Gaussian's mean sent through the flows; exact, since they do not stretch volume."""
        return ComposeTransform(self.transforms)(self.base_dist.mean)

    mean = mode

    @property
    def variance(self) -> Tensor:
        """The Gaussian's variance, rescaled by affine transforms alone."""
        variance = self.base_dist.variance
        for transform in self.transforms:
            if isinstance(transform, AffineTransform):
                variance = variance * transform.scale**2
        return variance


def invert_shift(shift: nn.Module, y: Tensor) -> Tensor:
    """The ``z`` with ``z - m(z) = y``, shapes ``(..., L, h, w)``."""
    max_steps = y.shape[-3:].numel() + 1

    def iterate(step: Any, start: Tensor) -> Tensor:
        value = start
        for _ in range(max_steps):
            last, value = value, step(value)
            if (value - last).abs().amax() <= 4 * torch.finfo(y.dtype).eps * value.abs().amax():
                break
        return value

    with torch.no_grad():
        z = iterate(lambda value: y + shift(value), y)
    if not torch.is_grad_enabled():
        return z

    # dz = dy + dm + J dz with J strictly triangular: the last step carries dy and dm, the hook
    # solves for dz.
    result = y + shift(z)
    if result.requires_grad:
        anchor = z.detach().requires_grad_()
        shifted = shift(anchor)

        def solve(grad: Tensor) -> Tensor:
            def step(value: Tensor) -> Tensor:
                return grad + torch.autograd.grad(shifted, anchor, value, retain_graph=True)[0]

            return iterate(step, grad)

        result.register_hook(solve)
    return result
