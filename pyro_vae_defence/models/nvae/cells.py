r"""Residual cells: ``out = skip(x) + 0.1 SE(op_n(... op_1(x)))``.

Two kinds of operation: pre-activated 3x3 convolutions (``res_*``) and inverted residuals, i.e. a
1x1 expansion, a depthwise or grouped convolution and a 1x1 projection
(``mconv_e{expansion}k{kernel}g{groups}``, 0 groups = depthwise).
"""

from __future__ import annotations

import enum
import re
from collections import OrderedDict

from torch import Tensor, nn

from pyro_vae_defence.models.nvae.layers import (
    BatchNormSwish,
    Conv2d,
    FactorisedReduce,
    SqueezeExcite,
    batch_norm,
    nested,
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


def build_op(name: str, in_channels: int, out_channels: int, resize: Resize) -> nn.Sequential:
    """The operation called ``name`` in the table of architectures."""
    if residual := re.fullmatch(r"res_(elu|bnelu|bnswish)(5?)", name):
        return _residual(residual[1], in_channels, out_channels, resize, bool(residual[2]))
    if inverted := re.fullmatch(r"mconv_e(\d+)k(\d+)g(\d+)", name):
        return _inverted_residual(in_channels, out_channels, resize, *map(int, inverted.groups()))
    raise ValueError(f"operation {name!r} is unknown")


def _residual(
    activation: str, in_channels: int, out_channels: int, resize: Resize, wide: bool
) -> nn.Sequential:
    """[batch norm ->] activation -> [nearest upsampling ->] 3x3 convolution."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if activation == "bnswish":
        layers["bn_act"] = BatchNormSwish(in_channels)
    else:
        if activation == "bnelu":
            layers["bn"] = batch_norm(in_channels)
        layers["act"] = nn.ELU()
    if resize is Resize.UP:
        layers["upsample"] = nn.Upsample(scale_factor=2)
    stride = 2 if resize is Resize.DOWN else 1
    # A wide one sees 5x5 through dilation; the kernel remains 3x3.
    dilation = 2 if wide else 1
    layers["conv_0"] = Conv2d(in_channels, out_channels, 3, stride=stride, dilation=dilation)
    return nn.Sequential(layers)


def _inverted_residual(
    in_channels: int, out_channels: int, resize: Resize, expansion: int, kernel: int, groups: int
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
    expand = nn.Conv2d(in_channels, hidden, 1, bias=False)
    spatial = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers = nn.Sequential(
        *upsample,
        batch_norm(in_channels),
        *(nested("conv", nn.Sequential(c, BatchNormSwish(hidden))) for c in (expand, spatial)),
        nn.Conv2d(hidden, out_channels, 1, bias=False),
        batch_norm(out_channels),
    )
    return nested("conv", layers)


class Cell(nn.Module):
    """Residual cell of the operations ``ops``; the first one changes resolution and channels."""

    def __init__(
        self, ops: tuple[str, ...], channels: int, resize: Resize = Resize.NONE, *, use_se: bool
    ) -> None:
        super().__init__()
        out_channels = resize.channels(channels)
        self.skip: nn.Module = nn.Identity()
        if resize is Resize.DOWN:
            self.skip = FactorisedReduce(channels, out_channels)
        elif resize is Resize.UP:
            upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.skip = nn.Sequential(upsample, Conv2d(channels, out_channels, 1, bias=False))
        first, *others = ops
        self._ops = nn.Sequential(
            build_op(first, channels, out_channels, resize),
            *(build_op(name, out_channels, out_channels, Resize.NONE) for name in others),
        )
        self.se = SqueezeExcite(out_channels) if use_se else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform features ``(N, C, H, W)``."""
        branch = self._ops(x)
        return self.skip(x) + RESIDUAL_SCALE * self.se(branch)
