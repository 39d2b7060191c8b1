"""Images that are evaluated block by block, a cell each, so that an interrupted study goes on."""

from __future__ import annotations

import itertools

from pyro_vae_defence.experiments.configuration import Configuration


class InBlocks(Configuration):
    """Base of configurations whose ``num_images`` are evaluated ``images_per_cell`` at a time.

    Raises:
        ValueError: for blocks of which one has less than the two images that an interval needs.
    """

    num_images: int
    images_per_cell: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images_per_cell is not None and self.first_block < 2:
            raise ValueError(
                f"images_per_cell={self.images_per_cell!r} leaves a block of {self.num_images} "
                "images with less than 2, which an interval needs; choose a larger one"
            )

    @property
    def blocks(self) -> list[range]:
        """Numbers of the images of each block, as even as can be; one block of all where
        ``images_per_cell`` is ``None``."""
        ends = [self.num_images * k // self._number for k in range(self._number + 1)]
        return [range(*pair) for pair in itertools.pairwise(ends)]

    @property
    def first_block(self) -> int:
        """Images of the first block, the fewest of any; without making all, of which there may be
        as many as images."""
        return self.num_images // self._number

    @property
    def _number(self) -> int:
        return -(-self.num_images // (self.images_per_cell or self.num_images))
