r"""One random stream per image, so that results do not depend on how images are batched.

A counter-based generator maps (seed, image, chain, step, purpose) to random bits directly: there is
no state to advance, hence an image draws the same numbers alone, inside any batch, and on any
device. The map is Philox4x32-10,

.. math:: (c_0, c_2) \leftarrow (\mathrm{hi}(M_1 c_2) \oplus c_1 \oplus k_0,\;
                                 \mathrm{hi}(M_0 c_0) \oplus c_3 \oplus k_1), \qquad
          (c_1, c_3) \leftarrow (\mathrm{lo}(M_1 c_2),\; \mathrm{lo}(M_0 c_0)),

ten rounds over a counter of four 32-bit words, the key raised by a Weyl constant after each;
normals follow by the Box-Muller transform.

Reference: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
https://doi.org/10.1145/2063384.2063405 (constants and test vectors).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyro_vae_defence.ops.checks import check_generator

Shape: TypeAlias = tuple[int, ...]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MAX_PURPOSE = 4096
# NumPy needs a third of the time for few words. For more of them torch would use threads.
_FEW = 2**15


def _schedule(word: Any, weyl: int) -> Sequence[Any]:
    """A word of the key in each round."""
    if isinstance(word, Tensor):
        rounds = torch.arange(_ROUNDS, device=word.device)
        return ((word + rounds * weyl) & _MASK).unbind()
    return [(word + number * weyl) & _MASK for number in range(_ROUNDS)]


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10: four broadcastable int64 tensors of 32-bit words to four of random words.

    The second of them, and the two words of the key, may be numbers; the latter are scalars. Arrays
    of NumPy give arrays.
    """
    c0, c1, c2, c3 = counter
    for k0, k1 in zip(_schedule(key[0], _WEYL[0]), _schedule(key[1], _WEYL[1]), strict=True):
        # int64 products wrap, which leaves all 64 bits right; the mask takes off what a product or
        # the sign of one has left above the lower 32, where only a word to multiply must have none.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) ^ c1 ^ k0) & _MASK, product1
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & _MASK, product0
    return c0, c1 & _MASK, c2, c3 & _MASK


def draw_seed(generator: torch.Generator | None = None) -> int:
    """Draw a 62-bit seed from ``generator``, or from torch's global seed when it is ``None``.

    Raises ``ValueError`` for anything else, such as a number.
    """
    check_generator(generator)
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


class Streams(NamedTuple):
    """Random streams of a batch.

    Attributes:
        seed: seed of the whole run, 0 to 2**64 - 1; in a captured transition its 64 bits as int64
            ``()``, so that one capture serves all seeds.
        image: int64 ``(N,)``, the identity of each row's image, 0 to 2**32 - 1.
        chain: int64 ``(N,)``, the chain of each row, 0 to 2**20 - 1.
    """

    seed: int
    image: Tensor
    chain: Tensor

    @classmethod
    def create(
        cls,
        num_images: int,
        num_chains: int = 1,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        first_image: int = 0,
        device: torch.device | str = "cpu",
    ) -> Streams:
        """Streams of images numbered from ``first_image``, with chains folded in."""
        seed = draw_seed(generator) if seed is None else seed
        image = torch.arange(first_image, first_image + num_images, device=device)
        chain = torch.arange(num_chains, device=device).repeat_interleave(num_images)
        return cls(seed, image.repeat(num_chains), chain)

    def uniform(
        self,
        step: int | Tensor,
        purpose: int,
        event_shape: Shape,
        dtype: torch.dtype,
    ) -> Tensor:
        """Uniforms on (0, 1], shape ``(N, *event_shape)``, a function of the arguments alone.

        ``step`` is a number, or int64 ``()``.
        """
        if not 0 <= purpose < _MAX_PURPOSE:
            raise ValueError(f"purpose must lie in 0..{_MAX_PURPOSE - 1}, got {purpose}")
        size = math.prod(event_shape)
        block = torch.arange(-(-size // 4), device=self.image.device)
        chain = (self.chain * _MAX_PURPOSE + purpose)[:, None]
        image, key = self.image[:, None], (self.seed & _MASK, (self.seed >> 32) & _MASK)
        # One broadcast gathers the four words of each block: (N, blocks, 4).
        if self._are_numbers(step) and block.numel() * image.numel() <= _FEW:
            arrays = philox((block.numpy(), step & _MASK, chain.numpy(), image.numpy()), key)
            four = torch.from_numpy(np.stack(np.broadcast_arrays(*arrays), -1))
        else:
            tensors = philox((block, step & _MASK, chain, image), key)
            four = torch.stack(torch.broadcast_tensors(*tensors), -1)
        words = four.flatten(1)[:, :size]
        # Half precision has neither the range nor the digits of a word: it is scaled before.
        wide = torch.promote_types(dtype, torch.float32)
        values = (words.to(wide) + 0.5) * 2.0**-32
        if wide != dtype:
            values = values.clamp(min=torch.finfo(dtype).tiny).to(dtype)
        return values.reshape((-1, *event_shape))

    def _are_numbers(self, step: int | Tensor) -> bool:
        """Whether NumPy can make the words: on the CPU, where nothing is being recorded."""
        counted = isinstance(step, int) and isinstance(self.seed, int)
        return counted and self.image.device.type == "cpu" and type(self.image) is Tensor

    def normal(
        self,
        step: int | Tensor,
        purpose: int,
        event_shape: Shape,
        dtype: torch.dtype,
    ) -> Tensor:
        """Standard normals, shape ``(N, *event_shape)``, a function of the arguments alone."""
        size = math.prod(event_shape)
        half = -(-size // 2)
        wide = torch.promote_types(dtype, torch.float32)
        uniforms = self.uniform(step, purpose, (2 * half,), wide)
        radius = (-2.0 * uniforms[:, :half].log()).sqrt()
        angle = (2.0 * math.pi) * uniforms[:, half:]
        values = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :size]
        return values.to(dtype).contiguous().reshape((-1, *event_shape))
