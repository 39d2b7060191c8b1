r"""A few steps towards the mode of each image's posterior: a start for chains, or a baseline of its own.

Adam (Kingma and Ba 2015) on the energy U, whose update is elementwise, so that no image sees another:

.. math::
    m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
    z_{t+1} = z_t - \eta_t \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon},

with a rate :math:`\eta_t` that falls linearly to zero over the search, since the steps are few. What comes back
is the best point visited, so that the energy never ends above its start.

Reference: Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015,
https://arxiv.org/abs/1412.6980.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae_defence.mcmc.integrators import energy_and_gradient
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.types import Latents, LatentsLike, Potential

_DECAY = (0.9, 0.999)  # of gradient and squared gradient; Kingma and Ba's values
_EPSILON = 1e-8


def search_mode(
    potential: Potential,
    start: LatentsLike,
    *,
    num_steps: int = 30,
    learning_rate: float = 0.3,
) -> tuple[Latents, Tensor]:
    """The best of ``num_steps`` Adam steps down the energy of every image.

    Deterministic, and for each row the same whatever the batch. A row whose gradient is not finite goes back
    to its best point.

    Args:
        potential: energy per image.
        start: unconstrained latents, site -> ``(N, *event)``.
        num_steps: Adam steps, >= 0.
        learning_rate: size of the first steps, > 0, on the unconstrained scale.

    Returns:
        The point of least energy visited, site -> ``(N, *event)``, and the gradients spent, ``(N,)``:
        ``num_steps + 1`` per row, the start included.

    Raises:
        ValueError: if an argument is out of range.
    """
    if not (isinstance(num_steps, int) and num_steps >= 0):
        raise ValueError(f"num_steps must be an integer of at least 0, got {num_steps!r}")
    if not (isinstance(learning_rate, (int, float)) and 0 < learning_rate < math.inf):
        raise ValueError(f"learning_rate must be a positive finite number, got {learning_rate!r}")
    position = lat.detach(start)
    energy, gradient = energy_and_gradient(potential, position)
    best, best_energy = position, energy
    mean = {name: torch.zeros_like(value) for name, value in position.items()}
    square = {name: torch.zeros_like(value) for name, value in position.items()}
    for number in range(1, num_steps + 1):
        rate = learning_rate * (1 - (number - 1) / num_steps)
        finite = lat.sum_sites(gradient).isfinite()
        for name, slope in lat.where(finite, gradient, mean).items():
            mean[name] = _DECAY[0] * mean[name] + (1 - _DECAY[0]) * slope
            square[name] = _DECAY[1] * square[name] + (1 - _DECAY[1]) * slope.square()
        step = {
            name: (mean[name] / (1 - _DECAY[0] ** number))
            / ((square[name] / (1 - _DECAY[1] ** number)).sqrt() + _EPSILON)
            for name in position
        }
        position = lat.where(finite, lat.add(position, step, -rate), best)
        energy, gradient = energy_and_gradient(potential, position)
        # Comparisons with NaN are false: such a point is never the best unless it was the start.
        better = energy < best_energy
        best = lat.where(better, position, best)
        best_energy = torch.where(better, energy, best_energy)
    return best, torch.full_like(best_energy, num_steps + 1, dtype=torch.long)
