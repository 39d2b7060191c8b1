r"""The leapfrog integrator on latents kept as dicts, with a step size per image.

For :math:`H(z, r) = U(z) + \tfrac12 r^\top M^{-1} r` one step of size :math:`\epsilon` is

.. math::
    r' = r - \tfrac{\epsilon}{2} \nabla U(z), \qquad
    z^* = z + \epsilon M^{-1} r', \qquad
    r^* = r' - \tfrac{\epsilon}{2} \nabla U(z^*),

volume preserving and reversible, with energy error :math:`O(\epsilon^3)` per step. Each costs one gradient.

Reference: Neal, "MCMC using Hamiltonian dynamics", Handbook of MCMC, 2011,
https://arxiv.org/abs/1206.1901.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.types import Latents, LatentsLike, Potential


class Phase(NamedTuple):
    """A point of phase space per image, with what was computed there.

    Attributes:
        position: latents, unconstrained, site -> ``(N, *event)``.
        momentum: same shapes.
        energy: potential energy U, ``(N,)``, in nats.
        gradient: gradient of U, same shapes as ``position``.
    """

    position: Latents
    momentum: Latents
    energy: Tensor
    gradient: Latents


def energy_and_gradient(potential: Potential, position: LatentsLike) -> tuple[Tensor, Latents]:
    """Energies ``(N,)`` and their gradients; rows do not see each other's values.

    A potential that has a method of this name is asked for both, as those of
    :mod:`pyro_vae_defence.models.compiled` do; any other is differentiated.
    """
    own = getattr(potential, "energy_and_gradient", None)
    return lat.value_and_gradient(potential, position) if own is None else own(position)


def velocity(momentum: LatentsLike, inverse_mass: LatentsLike | None) -> Latents:
    """``M^-1 r`` for a diagonal metric; ``None`` stands for the identity."""
    return dict(momentum) if inverse_mass is None else lat.multiply(momentum, inverse_mass)


def kinetic_energy(momentum: LatentsLike, inverse_mass: LatentsLike | None) -> Tensor:
    """Kinetic energy per image, ``(N,)``, in nats."""
    return 0.5 * lat.dot(momentum, velocity(momentum, inverse_mass))


def leapfrog(
    potential: Potential,
    phase: Phase,
    step_size: Tensor,
    inverse_mass: LatentsLike | None = None,
    needs_energy: bool = True,
) -> Phase:
    """One leapfrog step: one gradient.

    Args:
        potential: energy per image.
        phase: current point.
        step_size: one per image ``(N,)``; negative values integrate backwards.
        inverse_mass: diagonal of M^-1, site -> tensor broadcastable to ``(N, *event)``.
        needs_energy: ``False`` where nobody reads the energy of the new point: a potential with a method
            ``force`` is then asked for the force alone, and the energy is left as it was.
    """
    momentum = lat.add(phase.momentum, phase.gradient, -0.5 * step_size)
    position = lat.add(phase.position, velocity(momentum, inverse_mass), step_size)
    force = None if needs_energy else getattr(potential, "force", None)
    if force is None:
        energy, gradient = energy_and_gradient(potential, position)
    else:
        energy, gradient = phase.energy, force(position)
    momentum = lat.add(momentum, gradient, -0.5 * step_size)
    return Phase(position, momentum, energy, gradient)
