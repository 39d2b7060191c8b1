r"""Random perturbations as large as an attack's, and noise of low frequency.

How much of an attack's effect is mere size says :func:`random_noise`,

.. math:: x' = \mathrm{clip}(x + r\, d(n), 0, 1), \qquad n \sim N(0, I),

with d the direction of steepest ascent in the norm of the ball: for L_inf every pixel moves by the
full radius, up or down at random, for L2 the direction is uniform on the sphere, for L1 one random
pixel moves. Clipping to the range of images may make it smaller, as it does attacks'.

Noise of low frequency, :func:`low_frequency_noise`, is that of a grid of every fourth pixel,
interpolated: :math:`u = A_H\, n\, A_W^\top` per channel, with n standard normal on the grid and
rows of A, the weights of linear interpolation, scaled to norm 1, so that every pixel has variance
1. All pixels of a patch answer a black box's question together, where along independent pixels
their answers mostly cancel.

Reference: Guo, Frank, Weinberger, "Low frequency adversarial perturbation", UAI 2019,
https://arxiv.org/abs/1809.08758 (which takes cosines).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pyro_vae_defence.models.program import check_images
from pyro_vae_defence.ops.balls import Ball, check_ball
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.streams import Streams, draw_seed

_GRID = 4  # pixels of an image to one of the grid, along either side


@public
def random_noise(x: Tensor, ball: Ball, generator: torch.Generator | None = None) -> Tensor:
    """A random extreme point of the ball around every image: images, in [0, 1] and in the ball.

    Args:
        x: images ``(N, C, H, W)`` in [0, 1].
        ball: size and norm of the perturbations, e.g. ``Linf(0.1)``.
        generator: source of the seed; torch's global seed when ``None``.

    Raises:
        ValueError: if ``x`` holds no images in [0, 1], or ``ball`` is not a ball.
    """
    check_images(x)
    check_ball(ball)
    x = x.detach()  # or the noise would hang on it
    streams = Streams.create(x.shape[0], seed=draw_seed(generator), device=x.device)
    noise = streams.normal(0, 0, tuple(x.shape[1:]), x.dtype)
    perturbation = ball.project(ball.radius * ball.steepest_ascent(noise))
    return ball.inside(x, (x + perturbation).clamp(0.0, 1.0))


def low_frequency_noise(
    streams: Streams, step: int, purpose: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Gaussian noise of low frequency, mean 0 and variance 1 at every pixel.

    Args:
        streams: of the rows, M.
        step, purpose: of the draw, as for :meth:`~pyro_vae_defence.ops.streams.Streams.normal`.
        shape: ``(C, H, W)`` of an image, any sizes >= 1. Channels are independent.
        dtype: of the result.

    Returns:
        ``(M, C, H, W)``.
    """

    def weights(size: int) -> Tensor:
        grid = torch.eye(-(-size // _GRID), dtype=dtype, device=streams.image.device)
        spread = interpolate(grid[None], size=size, mode="linear", align_corners=False)[0]
        return spread / spread.norm(dim=0)

    channels, height, width = shape
    down, across = weights(height), weights(width)
    noise = streams.normal(step, purpose, (channels, len(down), len(across)), dtype)
    return down.mT @ noise @ across
