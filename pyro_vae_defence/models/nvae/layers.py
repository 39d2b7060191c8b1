r"""Layers NVAE is built of. Images and feature maps have shape ``(N, C, H, W)``.

Weight-normalised convolution: filter ``o`` has direction :math:`v_o` and log-length :math:`g_o`,

.. math:: w_o = e^{g_o} \, v_o / (\lVert v_o \rVert_2 + 10^{-5}).

Attribute names are those of the official state dict; they are part of the file format.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHT_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.05


def filter_norm(weight: Tensor) -> Tensor:
    """Length of every filter, ``(C_out, 1, 1, 1)``."""
    return weight.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()


class Conv2d(nn.Conv2d):
    """Convolution with normalised weights and "same" padding; ``options`` are torch's."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, **options: Any
    ) -> None:
        padding = options.get("dilation", 1) * (kernel_size - 1) // 2
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, **options)
        self.log_weight_norm = nn.Parameter(self.weight.new_empty(out_channels, 1, 1, 1))
        # Starting at the length torch's own initialisation gave; on ``meta``, where there is none,
        # arithmetic would import torch's compiler.
        if not self.weight.is_meta:
            with torch.no_grad():
                self.log_weight_norm.copy_((filter_norm(self.weight) + 1e-2).log())

    def direction(self) -> Tensor:
        """The weight that is normalised."""
        return self.weight

    def effective_weight(self) -> Tensor:
        """The weight the convolution uses, ``(C_out, C_in / groups, k, k)``."""
        weight = self.direction()
        norm = filter_norm(weight)
        return self.log_weight_norm.exp() * weight / (norm + WEIGHT_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``."""
        return self._conv_forward(x, self.effective_weight(), self.bias)


def effective_weight(conv: nn.Conv2d) -> Tensor:
    """The weight a convolution of the network uses, whether it is normalised or not."""
    return conv.effective_weight() if isinstance(conv, Conv2d) else conv.weight


def nested(name: str, layer: nn.Module) -> nn.Sequential:
    """``layer`` one level down in the state dict, under ``name``."""
    return nn.Sequential(OrderedDict({name: layer}))


def batch_norm(channels: int) -> nn.Sequential:
    """Batch norm with NVAE's momentum, without activation."""
    return nested("bn", nn.BatchNorm2d(channels, momentum=BATCH_NORM_MOMENTUM))


class BatchNormSwish(nn.BatchNorm2d):
    """Batch norm, then ``x * sigmoid(x)``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=BATCH_NORM_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate ``x``."""
        return F.silu(super().forward(x))


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate computed from all channel means (Hu, Shen and Sun, 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.se = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x``."""
        return self.se(x.mean(dim=(2, 3)))[:, :, None, None] * x


class FactorisedReduce(nn.Module):
    """Skip connection that halves the resolution and maps ``in_channels`` to ``out_channels``.

    Four 1x1 convolutions of stride 2 read the four pixels of each 2x2 block and write a quarter of
    the channels each, so that no pixel is lost.
    """

    # (rows, columns) dropped at the top left in front of conv_1 .. conv_4.
    _SHIFTS = ((0, 0), (1, 1), (0, 1), (1, 0))

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        quarter = out_channels // 4
        for number, width in enumerate((*3 * [quarter], out_channels - 3 * quarter), 1):
            self.add_module(f"conv_{number}", Conv2d(in_channels, width, 1, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` -> ``(N, out_channels, H / 2, W / 2)``."""
        x = F.silu(x)
        parts = [conv(x[:, :, dy:, dx:]) for conv, (dy, dx) in zip(self.children(), self._SHIFTS)]
        return torch.cat(parts, dim=1)
