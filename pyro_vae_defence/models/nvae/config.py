"""What decides an NVAE: the official arguments, architectures and data sets.

Reference: NVAE: A Deep Hierarchical Variational Autoencoder, A. Vahdat and J. Kautz, NeurIPS 2020,
https://arxiv.org/abs/2007.03898. Field names and defaults are those of the official command line,
so that the arguments stored in a published checkpoint are a configuration as they stand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """Operations of a residual cell, in order, for the four places a cell can stand in."""

    encoder: tuple[str, ...]
    decoder: tuple[str, ...]
    pre_process: tuple[str, ...]
    post_process: tuple[str, ...]


_ELU, _BNELU = ("res_elu", "res_elu"), ("res_bnelu", "res_bnelu")
_RES33, _RES35 = ("res_bnswish", "res_bnswish"), ("res_bnswish", "res_bnswish5")
_RES53, _RES55 = ("res_bnswish5", "res_bnswish"), ("res_bnswish5", "res_bnswish5")
_MCONV3, _MCONV6, _MCONV11 = ("mconv_e3k5g0",), ("mconv_e6k5g0",), ("mconv_e6k11g0",)
_GROUPED = ("mconv_e3k5g8",)

ARCHITECTURES: dict[str, Architecture] = {
    "res_elu": Architecture(_ELU, _ELU, _ELU, _ELU),
    "res_bnelu": Architecture(_BNELU, _BNELU, _BNELU, _BNELU),
    "res_bnswish": Architecture(_RES33, _RES33, _RES33, _RES33),
    "mbconv_sep": Architecture(_MCONV6, _MCONV6, _MCONV3, _MCONV3),
    "mbconv_sep11": Architecture(_MCONV11, _MCONV11, _MCONV3, _MCONV3),
    "res_mbconv": Architecture(_RES33, _MCONV6, _RES33, _MCONV3),
    "res53_mbconv": Architecture(_RES53, _MCONV6, _RES53, _MCONV3),
    "res35_mbconv": Architecture(_RES35, _MCONV6, _RES35, _MCONV3),
    "res55_mbconv": Architecture(_RES55, _MCONV6, _RES55, _MCONV3),
    # The official code lists this one but lacks its 9x9 operations: no official checkpoint has it.
    "res_mbconv9": Architecture(_RES33, ("mconv_e6k9g0",), _RES33, ("mconv_e3k9g0",)),
    "mbconv_res": Architecture(_MCONV6, _RES33, _MCONV3, _RES33),
    "mbconv_den": Architecture(_MCONV6, _MCONV6, _GROUPED, _GROUPED),
}
"""``arch_instance`` -> operations of its cells."""

INPUT_SIZES: dict[str, int] = {
    "mnist": 32, "omniglot": 32, "cifar10": 32, "imagenet_32": 32, "imagenet_64": 64,
    "celeba_64": 64, "celeba_256": 256, "lsun_church_64": 64, "lsun_church_128": 128,
    "lsun_bedroom_128": 128, "lsun_bedroom_256": 256, "ffhq": 256,
}  # fmt: skip
"""``dataset`` -> height and width of what the network reads."""

# Options that old files lack, with the values those files were trained with.
_OLD_FILE_DEFAULTS = {"ada_groups": False, "min_groups_per_scale": 1, "num_mixture_dec": 10}

# Stored beside the configuration and without influence on the network.
_TRAINING_ARGS = {
    "root", "save", "data", "batch_size", "learning_rate", "learning_rate_min", "weight_decay",
    "weight_decay_norm", "weight_decay_norm_init", "weight_decay_norm_anneal", "epochs",
    "warmup_epochs", "fast_adamax", "kl_anneal_portion", "kl_const_portion", "kl_const_coeff",
    "cont_training", "num_proc_node", "node_rank", "local_rank", "global_rank",
    "num_process_per_node", "master_address", "seed", "distributed", "num_total_iter",
}  # fmt: skip


@dataclass(frozen=True)
class NVAEConfig:
    """Configuration of an NVAE; names and defaults are the official arguments'.

    ``num_latent_scales`` resolutions carry latents, each half the one before. The first, finest one
    has ``num_groups_per_scale`` groups; the others have as many or, with ``ada_groups``, half
    (rounded down) of the scale before, but at least ``min_groups_per_scale``. One scale with one
    group is a plain VAE without towers.

    Raises:
        ValueError: a field of the wrong type or out of range, an unknown ``dataset`` or
            ``arch_instance``, or sizes that do not fit together; the message names the field.
    """

    dataset: str = "mnist"
    arch_instance: str = "res_mbconv"
    num_latent_scales: int = 1
    num_groups_per_scale: int = 10
    ada_groups: bool = False
    min_groups_per_scale: int = 1
    num_latent_per_group: int = 20
    num_channels_enc: int = 32
    num_channels_dec: int = 32
    num_preprocess_blocks: int = 2
    num_preprocess_cells: int = 3
    num_postprocess_blocks: int = 2
    num_postprocess_cells: int = 3
    num_cell_per_cond_enc: int = 1
    num_cell_per_cond_dec: int = 1
    num_nf: int = 0
    num_x_bits: int = 8
    num_mixture_dec: int = 10
    use_se: bool = False
    res_dist: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, expected = getattr(self, field.name), type(field.default)
            if type(value) is not expected:
                raise ValueError(f"{field.name}={value!r} is not of type {expected.__name__}")
            least = 0 if field.name == "num_nf" else 1
            if type(value) is int and value < least:
                raise ValueError(f"{field.name}={value} must be at least {least}")
        for name, known in (("dataset", INPUT_SIZES), ("arch_instance", ARCHITECTURES)):
            if (value := getattr(self, name)) not in known:
                choices = ", ".join(sorted(known))
                raise ValueError(f"{name}={value!r} is unknown; choose one of {choices}")
        if self.num_x_bits > 8:
            raise ValueError(f"num_x_bits={self.num_x_bits} must lie in 1..8")
        if self.num_x_bits < 8 and (self.is_grey or self.num_mixture_dec == 1):
            raise ValueError(
                f"num_x_bits={self.num_x_bits} needs a likelihood of levels: a colour dataset, and "
                "num_mixture_dec of at least 2"
            )
        if self.num_preprocess_blocks != self.num_postprocess_blocks:
            raise ValueError(
                f"num_preprocess_blocks={self.num_preprocess_blocks} and num_postprocess_blocks="
                f"{self.num_postprocess_blocks} must be equal: output and input have one size"
            )
        halvings = self.num_preprocess_blocks + self.num_latent_scales - 1
        if halvings > self.input_size or self.input_size % self.downsampling:
            raise ValueError(
                f"num_preprocess_blocks={self.num_preprocess_blocks} and num_latent_scales="
                f"{self.num_latent_scales} halve the image {halvings} times, but images of "
                f"{self.dataset!r} have side {self.input_size}; take fewer blocks or scales"
            )
        encoder, decoder = self.num_channels_enc, self.num_channels_dec
        widths = f"num_channels_enc={encoder} and num_channels_dec={decoder}"
        if min(encoder, decoder) < 2:
            raise ValueError(f"{widths} must be at least 2: down cells divide twice as many by 4")
        if self.is_flat and encoder != decoder:
            raise ValueError(f"{widths} must be equal in a model of one group")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NVAEConfig:
        """Configuration from a mapping; absent fields take their defaults.

        Raises:
            ValueError: unknown keys (named), or values the class refuses.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(map(str, set(values) - known)):
            raise ValueError(f"unknown NVAE configuration keys {unknown}; known: {sorted(known)}")
        return cls(**values)

    @classmethod
    def from_official_args(
        cls, args: Mapping[str, Any], *, ignore_args: tuple[str, ...] = ()
    ) -> NVAEConfig:
        """Configuration from the arguments stored in an official checkpoint.

        Options that only concern training are dropped; those that old files lack (``ada_groups``,
        ``min_groups_per_scale``, ``num_mixture_dec``) take the values old files were trained with.

        Args:
            args: the stored arguments, name -> value.
            ignore_args: further names to drop, for files of a modified training program.

        Raises:
            ValueError: an argument is missing, or neither known nor listed in ``ignore_args``.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(map(str, set(args) - known - _TRAINING_ARGS - set(ignore_args))):
            raise ValueError(
                f"args holds {unknown}, which the official program does not have; if they do not "
                f"change the network, name them in ignore_args"
            )
        values = _OLD_FILE_DEFAULTS | {k: v for k, v in args.items() if k in known}
        if missing := sorted(known - set(values)):
            raise ValueError(f"args lacks {missing}; the network cannot be rebuilt without them")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON; :meth:`from_dict` reads them back."""
        return dataclasses.asdict(self)

    @property
    def architecture(self) -> Architecture:
        """The cells' operations."""
        return ARCHITECTURES[self.arch_instance]

    @property
    def is_flat(self) -> bool:
        """Whether there is a single group, hence no towers."""
        return self.num_latent_scales == 1 and self.num_groups_per_scale == 1

    @property
    def is_grey(self) -> bool:
        """Whether images have one channel and a Bernoulli likelihood."""
        return self.dataset in ("mnist", "omniglot")

    @property
    def input_size(self) -> int:
        """Height and width of what the network reads and writes."""
        return INPUT_SIZES[self.dataset]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of an image; grey ones are 28x28, padded for the network only."""
        return (1, 28, 28) if self.is_grey else (3, self.input_size, self.input_size)

    @property
    def output_channels(self) -> int:
        """Channels of the network's output, the parameters of the likelihood."""
        if self.is_grey:
            return 1
        return 6 if self.num_mixture_dec == 1 else 10 * self.num_mixture_dec

    @property
    def downsampling(self) -> int:
        """Ratio of the image's side to the top group's; also the channel multiplier at the top."""
        return int(2 ** (self.num_preprocess_blocks + self.num_latent_scales - 1))

    @property
    def groups_per_scale(self) -> tuple[int, ...]:
        """Number of groups on each scale, finest first."""
        groups = [self.num_groups_per_scale]
        while len(groups) < self.num_latent_scales:
            halved = max(self.min_groups_per_scale, groups[-1] // 2)
            groups.append(halved if self.ada_groups else groups[-1])
        return tuple(groups)

    @property
    def num_groups(self) -> int:
        """Number of latent groups, i.e. of latent sites."""
        return sum(self.groups_per_scale)

    @property
    def num_parts(self) -> int:
        """Number of cells and flows, a part of the layers, which have one weight each at least."""
        pre, post = self.num_preprocess_cells, self.num_postprocess_cells
        parts = self.num_preprocess_blocks * (pre + post) + self.num_groups * self.num_nf
        if not self.is_flat:
            parts += self.num_groups * self.num_cell_per_cond_enc
            parts += (self.num_groups - 1) * self.num_cell_per_cond_dec
        return parts

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shape ``(L, h, w)`` of every group, from the top (coarsest) down."""
        top = self.input_size // self.downsampling
        return tuple(
            (self.num_latent_per_group, top << scale, top << scale)
            for scale, groups in enumerate(reversed(self.groups_per_scale))
            for _ in range(groups)
        )


def _published(
    dataset: str, scales: int, groups: int, channels: int, flows: int, least: int = 1, bits: int = 8
) -> NVAEConfig:
    blocks, cells = (2, 3) if dataset == "mnist" else (1, 2)
    return NVAEConfig(
        dataset=dataset,
        num_latent_scales=scales,
        num_groups_per_scale=groups,
        ada_groups=scales > 1,
        min_groups_per_scale=least,
        num_channels_enc=channels,
        num_channels_dec=channels,
        num_preprocess_blocks=blocks,
        num_preprocess_cells=cells,
        num_postprocess_blocks=blocks,
        num_postprocess_cells=cells,
        num_cell_per_cond_enc=2,
        num_cell_per_cond_dec=2,
        num_nf=flows,
        num_x_bits=bits,
        use_se=True,
        res_dist=True,
    )


PUBLISHED: dict[str, NVAEConfig] = {
    "mnist": _published("mnist", 2, 10, 32, flows=0),
    "cifar10": _published("cifar10", 1, 30, 128, flows=1),
    "celeba_64": _published("celeba_64", 3, 20, 64, flows=1),
    "imagenet_32": _published("imagenet_32", 1, 28, 192, flows=1),
    "celeba_256": _published("celeba_256", 5, 16, 30, flows=2, least=4, bits=5),
    "ffhq": _published("ffhq", 5, 16, 30, flows=2, least=4, bits=5),
}
"""The settings of the published models, by ``dataset``."""
