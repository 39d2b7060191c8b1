"""The four stacks of cells: from the image, up, down past the latents, and to the image.

Each stack is one flat list, cells and combiners mixed, as the official state dict numbers them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, cat, nn

from pyro_vae_defence.models.nvae.cells import Cell, Resize
from pyro_vae_defence.models.nvae.config import NVAEConfig
from pyro_vae_defence.models.nvae.layers import Conv2d


class EncoderCombiner(nn.Module):
    """Adds what the decoder knows so far to the encoder's features: ``x_enc + conv1x1(x_dec)``."""

    def __init__(self, encoder_channels: int, decoder_channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(decoder_channels, encoder_channels, 1)

    def forward(self, x_enc: Tensor, x_dec: Tensor) -> Tensor:
        """Combine two feature maps of one resolution."""
        return x_enc + self.conv(x_dec)


class DecoderCombiner(nn.Module):
    """Brings a latent into the decoder's features: ``conv1x1([x_dec, z])``."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels + latent_channels, channels, 1)

    def forward(self, x_dec: Tensor, z: Tensor) -> Tensor:
        """Combine features and latent of one resolution."""
        return self.conv(cat([x_dec, z], dim=1))


def build_pre_process(config: NVAEConfig) -> nn.Sequential:
    """Cells between stem and encoder tower; the last of each block halves the resolution."""
    plain = [Resize.NONE] * (config.num_preprocess_cells - 1)
    resizes = config.num_preprocess_blocks * [*plain, Resize.DOWN]
    return _cells(config.architecture.pre_process, config.num_channels_enc, resizes, config.use_se)


def build_post_process(config: NVAEConfig) -> nn.Sequential:
    """Cells between decoder tower and output; the first of each block doubles the resolution."""
    plain = [Resize.NONE] * (config.num_postprocess_cells - 1)
    resizes = config.num_postprocess_blocks * [Resize.UP, *plain]
    channels = config.num_channels_dec * 2**config.num_postprocess_blocks
    return _cells(config.architecture.post_process, channels, resizes, config.use_se)


def _cells(
    ops: tuple[str, ...], channels: int, resizes: list[Resize], use_se: bool
) -> nn.Sequential:
    cells = nn.Sequential()
    for resize in resizes:
        cells.append(Cell(ops, channels, resize, use_se=use_se))
        channels = resize.channels(channels)
    return cells


class EncoderTower(nn.ModuleList):
    """Bottom-up cells; one combiner per latent group but the top one. Empty for one group."""

    def __init__(self, config: NVAEConfig) -> None:
        super().__init__()
        if config.is_flat:
            return
        ops, use_se = config.architecture.encoder, config.use_se
        multiplier = 2**config.num_preprocess_blocks
        last_scale = config.num_latent_scales - 1
        for scale, num_groups in enumerate(config.groups_per_scale):
            channels = config.num_channels_enc * multiplier
            for group in range(num_groups):
                for _ in range(config.num_cell_per_cond_enc):
                    self.append(Cell(ops, channels, use_se=use_se))
                if (scale, group) != (last_scale, num_groups - 1):
                    self.append(EncoderCombiner(channels, config.num_channels_dec * multiplier))
            if scale < last_scale:
                self.append(Cell(ops, channels, Resize.DOWN, use_se=use_se))
                multiplier *= 2

    def forward(self, features: Tensor, run: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Features of the image -> those at the top, and at the combiners from the top down.

        ``run(cell, features)`` runs a cell; activation checkpointing hooks in here.
        """
        at_combiners = []
        for item in self:
            if isinstance(item, EncoderCombiner):
                at_combiners.append(features)
            else:
                features = run(item, features)
        return features, at_combiners[::-1]

    def combiners(self) -> list[EncoderCombiner]:
        """The combiners from the top down: entry ``g - 1`` belongs to group ``g``."""
        return [item for item in self if isinstance(item, EncoderCombiner)][::-1]


class DecoderTower(nn.ModuleList):
    """Top-down cells with one combiner per latent group. Empty for a model of one group."""

    def __init__(self, config: NVAEConfig) -> None:
        super().__init__()
        if config.is_flat:
            return
        ops, use_se = config.architecture.decoder, config.use_se
        channels = config.num_channels_dec * config.downsampling
        for scale, num_groups in enumerate(reversed(config.groups_per_scale)):
            for group in range(num_groups):
                if (scale, group) != (0, 0):
                    for _ in range(config.num_cell_per_cond_dec):
                        self.append(Cell(ops, channels, use_se=use_se))
                self.append(DecoderCombiner(channels, config.num_latent_per_group))
            if scale < config.num_latent_scales - 1:
                self.append(Cell(ops, channels, Resize.UP, use_se=use_se))
                channels = Resize.UP.channels(channels)
        combiners = [i for i, item in enumerate(self) if isinstance(item, DecoderCombiner)]
        # Group g owns the items from its combiner up to the next one.
        self._segments = list(zip(combiners, [*combiners[1:], len(self)]))

    def advance(self, group: int, features: Tensor, z: Tensor) -> Tensor:
        """Take in the latent of ``group`` and go on to the next group, or to the output."""
        combiner, end = self._segments[group]
        features = self[combiner](features, z)
        for index in range(combiner + 1, end):
            features = self[index](features)
        return features
