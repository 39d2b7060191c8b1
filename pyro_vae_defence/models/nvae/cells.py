r"""Residual cells: ``out = skip(x) + 0.1 SE(op_n(... op_1(x)))``.

Two kinds of operation: pre-activated 3x3 convolutions (``res_*``) and inverted residuals, i.e. a
1x1 expansion, a depthwise or grouped convolution and a 1x1 projection
(``mconv_e{expansion}k{kernel}g{groups}``, 0 groups = depthwise).
"""

from __future__ import annotations

import enum
import re

from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vae_defence.models.nvae.layers import (
    BatchNormSwish,
    Conv2d,
    FactorisedReduce,
    SqueezeExcite,
    batch_norm,
    nested,
    plain_conv,
    upsampling_skip,
)

RESIDUAL_SCALE = 0.1


class Resize(enum.Enum):
    """What a cell does to the resolution; the number of channels changes inversely."""

    NONE = "none"
    DOWN = "down"
    UP = "up"

    def channels(self, channels: int) -> int:
        """Channels behind a cell that has ``channels`` in front."""
        if self is Resize.DOWN:
            return 2 * channels
        return channels // 2 if self is Resize.UP else channels


class ResidualConv(nn.Module):
    """[batch norm ->] activation -> [nearest upsampling ->] 3x3 convolution."""

    def __init__(
        self, kind: str, in_channels: int, out_channels: int, resize: Resize, dilation: int = 1
    ) -> None:
        super().__init__()
        if kind == "bnswish":
            self.bn_act = BatchNormSwish(in_channels)
        elif kind == "bnelu":
            self.bn = batch_norm(in_channels)
        stride = 2 if resize is Resize.DOWN else 1
        self.conv_0 = Conv2d(in_channels, out_channels, 3, stride=stride, dilation=dilation)
        self.kind = kind
        self.upsample = resize is Resize.UP

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        if self.kind == "bnswish":
            x = self.bn_act(x)
        else:
            x = F.elu(self.bn(x) if self.kind == "bnelu" else x)
        if self.upsample:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv_0(x)


def _conv_batch_norm_swish(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = plain_conv(in_channels, out_channels, kernel_size, stride, groups)
    return nested("conv", nn.Sequential(conv, BatchNormSwish(out_channels)))


def inverted_residual(
    in_channels: int,
    out_channels: int,
    resize: Resize,
    *,
    expansion: int,
    kernel_size: int,
    groups: int,
) -> nn.Sequential:
    """[nearest upsampling ->] batch norm -> 1x1 -> depthwise or grouped -> 1x1 -> batch norm.

    Batch norm and swish follow the first two convolutions, which are ``expansion`` times wider.
    """
    hidden = in_channels * expansion
    groups = groups or hidden
    if hidden % groups:
        raise ValueError(
            f"{in_channels} channels expanded {expansion} times do not divide into {groups} "
            f"groups; choose num_channels_enc and num_channels_dec as multiples of {groups}"
        )
    upsample = [nn.Upsample(scale_factor=2)] if resize is Resize.UP else []
    stride = 2 if resize is Resize.DOWN else 1
    layers = nn.Sequential(
        *upsample,
        batch_norm(in_channels),
        _conv_batch_norm_swish(in_channels, hidden, 1),
        _conv_batch_norm_swish(hidden, hidden, kernel_size, stride, groups),
        plain_conv(hidden, out_channels, 1),
        batch_norm(out_channels),
    )
    return nested("conv", layers)


_RESIDUAL = {
    "res_elu": ("elu", 1),
    "res_bnelu": ("bnelu", 1),
    "res_bnswish": ("bnswish", 1),
    "res_bnswish5": ("bnswish", 2),  # sees 5x5 through dilation; the kernel remains 3x3
}
_INVERTED = re.compile(r"mconv_e(\d+)k(\d+)g(\d+)")


def build_op(name: str, in_channels: int, out_channels: int, resize: Resize) -> nn.Module:
    """The operation called ``name`` in the table of architectures."""
    if name in _RESIDUAL:
        kind, dilation = _RESIDUAL[name]
        return ResidualConv(kind, in_channels, out_channels, resize, dilation)
    match = _INVERTED.fullmatch(name)
    if match is None:
        raise ValueError(f"operation {name!r} is unknown")
    expansion, kernel_size, groups = map(int, match.groups())
    sizes = dict(expansion=expansion, kernel_size=kernel_size, groups=groups)
    return inverted_residual(in_channels, out_channels, resize, **sizes)


class Cell(nn.Module):
    """Residual cell of the operations ``ops``; the first one changes resolution and channels."""

    def __init__(
        self, ops: tuple[str, ...], channels: int, resize: Resize = Resize.NONE, *, use_se: bool
    ) -> None:
        super().__init__()
        out_channels = resize.channels(channels)
        self.skip: nn.Module
        if resize is Resize.NONE:
            self.skip = nn.Identity()
        elif resize is Resize.DOWN:
            self.skip = FactorisedReduce(channels, out_channels)
        else:
            self.skip = upsampling_skip(channels, out_channels)
        first, *others = ops
        self._ops = nn.ModuleList(
            [build_op(first, channels, out_channels, resize)]
            + [build_op(name, out_channels, out_channels, Resize.NONE) for name in others]
        )
        self.se = SqueezeExcite(out_channels) if use_se else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform features ``(N, C, H, W)``."""
        branch = x
        for op in self._ops:
            branch = op(branch)
        return self.skip(x) + RESIDUAL_SCALE * self.se(branch)
