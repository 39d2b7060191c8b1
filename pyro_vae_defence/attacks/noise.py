r"""Random perturbations as large as an attack's: how much of its effect is mere size?

.. math:: x' = \mathrm{clip}(x + r\, d(n), 0, 1), \qquad n \sim N(0, I),

with d the direction of steepest ascent in the norm of the ball: for L_inf every pixel moves by the
full radius, up or down at random, for L2 the direction is uniform on the sphere, for L1 one random
pixel moves. Clipping to the range of images may make it smaller, as it does attacks'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae_defence.models.program import check_images
from pyro_vae_defence.ops.balls import Ball, check_ball
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.streams import Streams, draw_seed


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
    streams = Streams.create(x.shape[0], seed=draw_seed(generator), device=x.device)
    noise = streams.normal(0, 0, tuple(x.shape[1:]), x.dtype)
    perturbation = ball.project(ball.radius * ball.steepest_ascent(noise))
    return ball.inside(x, (x + perturbation).clamp(0.0, 1.0))
