r"""A few steps towards the mode of each image's posterior: a start for chains, or a baseline.

Adam (Kingma and Ba 2015) on the energy U, whose update is elementwise, so that no image sees
another:

.. math::
    m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
    v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
    z_{t+1} = z_t - \eta_t \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon},

with a rate :math:`\eta_t` that falls linearly to zero over the search, since the steps are few.
What comes back is the best point visited, so that the energy never ends above its start.

:func:`search_mode_lbfgs` is the other classic: steps along :math:`-H_t g_t`, where :math:`H_t`
approximates the inverse Hessian by the last few steps, of a length that lowers the energy.

References: Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015,
https://arxiv.org/abs/1412.6980; Nocedal, Wright, "Numerical optimization", 2006, sections 3.1 and
7.2, https://doi.org/10.1007/978-0-387-40065-5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae_defence.mcmc.integrators import energy_and_gradient
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import check_integer, check_positive
from pyro_vae_defence.types import Latents, LatentsLike, Potential

_DECAY = (0.9, 0.999)  # of gradient and squared gradient; Kingma and Ba's values
_EPSILON = 1e-8
_SUFFICIENT_DECREASE = 1e-4  # Nocedal and Wright's value


@public
def search_mode(
    potential: Potential, start: LatentsLike, *, num_steps: int = 30, learning_rate: float = 0.3
) -> tuple[Latents, Tensor]:
    """The best of ``num_steps`` Adam steps down the energy of every image.

    Deterministic, and for each row the same whatever the batch. A row whose gradient is not finite
    goes back to its best point.

    Args:
        potential: energy per image.
        start: unconstrained latents, site -> ``(N, *event)``.
        num_steps: Adam steps, >= 0.
        learning_rate: size of the first steps, > 0, on the unconstrained scale.

    Returns:
        The point of least energy visited, site -> ``(N, *event)``, and the gradients spent,
        ``(N,)``: ``num_steps + 1`` per row, the start included.

    Raises:
        ValueError: if an argument is out of range.
    """
    check_integer("num_steps", num_steps, 0)
    check_positive("learning_rate", learning_rate)
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
        # Minus infinity is no place to be either, where a chain could not start.
        better = (energy < best_energy) & energy.isfinite()
        best = lat.where(better, position, best)
        best_energy = torch.where(better, energy, best_energy)
    return best, torch.full_like(best_energy, num_steps + 1, dtype=torch.long)


@public
def search_mode_lbfgs(
    potential: Potential, start: LatentsLike, *, num_steps: int = 30, memory: int = 10
) -> tuple[Latents, Tensor]:
    """L-BFGS down the energy of every image, with a line search of its own for each.

    One gradient of the batch is one trial of every row: where the energy has fallen enough
    (Armijo's condition) the row moves on in the direction of its own last ``memory`` steps,
    elsewhere it halves its step and tries again. Deterministic, and for each row the same whatever
    the batch; the energy never rises.

    Arguments, result and errors are those of :func:`search_mode`; ``num_steps`` counts trials, and
    ``memory`` >= 1 pairs of steps and changes of gradient are kept.
    """
    check_integer("num_steps", num_steps, 0)
    check_integer("memory", memory)
    shapes = {name: value.shape for name, value in start.items()}
    sizes = [shape[1:].numel() for shape in shapes.values()]

    def flat(latents: LatentsLike) -> Tensor:
        return torch.cat([latents[name].detach()[..., None].flatten(1) for name in shapes], 1)

    def by_site(vector: Tensor) -> Latents:
        parts = zip(shapes.items(), vector.split(sizes, 1), strict=True)
        return {name: part.reshape(shape) for (name, shape), part in parts}

    def evaluate(point: Tensor) -> tuple[Tensor, Tensor]:
        energy, gradient = energy_and_gradient(potential, by_site(point))
        return energy, flat(gradient)

    position = flat(start)
    energy, gradient = evaluate(position)
    # A row without a finite gradient does not move.
    gradient = torch.where(gradient.isfinite().all(1, keepdim=True), gradient, 0.0)
    pairs = position.new_zeros((memory, 2, *position.shape))
    direction = -gradient
    # The first direction has no scale of its own: it starts with unit length.
    step = 1.0 / direction.norm(dim=1).clamp(min=1.0)
    for _ in range(num_steps):
        trial = position + step[:, None] * direction
        trial_energy, trial_gradient = evaluate(trial)
        slope = (direction * gradient).sum(1)
        # Comparisons with NaN are false.
        enough = trial_energy <= energy + _SUFFICIENT_DECREASE * step * slope
        moved = enough & trial_energy.isfinite() & trial_gradient.isfinite().all(1)
        newest = torch.stack([trial - position, trial_gradient - gradient])
        # Without positive curvature along the step the pair would spoil the metric.
        curved = moved & ((newest[0] * newest[1]).sum(1) > 0)
        shifted = torch.cat([pairs[1:], newest[None]])
        pairs = torch.where(curved[:, None], shifted, pairs)
        position = torch.where(moved[:, None], trial, position)
        gradient = torch.where(moved[:, None], trial_gradient, gradient)
        energy = torch.where(moved, trial_energy, energy)
        direction = torch.where(moved[:, None], -_inverse_hessian(pairs, gradient), direction)
        step = torch.where(moved, 1.0, 0.5 * step)
    return by_site(position), torch.full_like(energy, num_steps + 1, dtype=torch.long)


def _inverse_hessian(pairs: Tensor, gradient: Tensor) -> Tensor:
    """The two-loop recursion (Nocedal and Wright, algorithm 7.4) on gradients ``(N, D)``.

    ``pairs`` ``(memory, 2, N, D)`` are steps and changes of gradient, oldest first, zero where
    there is none.
    """
    curvature = pairs.prod(1).sum(-1)
    inverse = torch.where(curvature > 0, 1.0 / curvature, 0.0)[..., None]
    weights = []
    for (change, slope), scale in zip(pairs.flip(0), inverse.flip(0), strict=True):
        weight = scale * (change * gradient).sum(-1, keepdim=True)
        gradient = gradient - weight * slope
        weights.append(weight)
    # The newest pair's curvature sets the scale of what the pairs say nothing about.
    squared = pairs[-1, 1].square().sum(-1, keepdim=True)
    known = curvature[-1][:, None]
    gradient = gradient * torch.where(known > 0, known / squared, 1.0)
    for (change, slope), scale, weight in zip(pairs, inverse, reversed(weights), strict=True):
        gradient = gradient + (weight - scale * (slope * gradient).sum(-1, keepdim=True)) * change
    return gradient
