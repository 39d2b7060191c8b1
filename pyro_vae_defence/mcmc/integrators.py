r"""Integrators on latents kept as dicts, with a step size per image.

*Leapfrog.* For :math:`H(z, r) = U(z) + \tfrac12 r^\top M^{-1} r` one step of size :math:`\epsilon`
is

.. math::
    r' = r - \tfrac{\epsilon}{2} \nabla U(z), \qquad
    z^* = z + \epsilon M^{-1} r', \qquad
    r^* = r' - \tfrac{\epsilon}{2} \nabla U(z^*),

volume preserving and reversible, with energy error :math:`O(\epsilon^3)` per step. Each costs one
gradient.

*Isokinetic.* Microcanonical dynamics keep the speed and turn the direction u, :math:`|u| = 1`. In
whitened coordinates :math:`y = M^{1/2} z`, of d dimensions,

.. math:: \dot y = \sqrt d\, u, \qquad \dot u = -\tfrac{\sqrt d}{d - 1} (1 - u u^\top) \nabla_y U .

The speed :math:`\sqrt d` is that of a typical momentum of Hamiltonian dynamics, so that step sizes
of both compare. Both halves of the flow are known in closed form: the drift is straight, and over a
time t at a fixed gradient :math:`g = \nabla_y U`, with :math:`e = -g / |g|`, :math:`c = e^\top u`
and :math:`\delta = t \sqrt d\, |g| / (d - 1)`,

.. math::
    u(t) \propto u + e\, (\sinh\delta + c (\cosh\delta - 1)), \qquad
    K(t) - K(0) = (d - 1) \log(\cosh\delta + c \sinh\delta) ,

where exp(K) is the change of volume on the sphere, which plays the part of a kinetic energy: the
flow keeps U + K. The symmetric composition is reversible and its error of U + K is
:math:`O(\epsilon^3)` per step.

References: Neal, "MCMC using Hamiltonian dynamics", Handbook of MCMC, 2011,
https://arxiv.org/abs/1206.1901; Ver Steeg, Galstyan, "Hamiltonian dynamics with non-Newtonian
momentum for rapid sampling", NeurIPS 2021, https://arxiv.org/abs/2111.02434; Robnik, De Luca,
Silverstein, Seljak, "Microcanonical Hamiltonian Monte Carlo", JMLR 2023,
https://arxiv.org/abs/2212.08549.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
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


Drift = Callable[[Latents, Latents, Tensor, LatentsLike | None], tuple[Latents, Latents]]
"""Position, momentum, step size and M^-1 to position and momentum after the drift of a step."""


def drift(
    position: Latents, momentum: Latents, step_size: Tensor, inverse_mass: LatentsLike | None
) -> tuple[Latents, Latents]:
    """Straight on."""
    return lat.add(position, velocity(momentum, inverse_mass), step_size), momentum


def leapfrog(
    potential: Potential,
    phase: Phase,
    step_size: Tensor,
    inverse_mass: LatentsLike | None = None,
    needs_energy: bool = True,
    drift: Drift = drift,
) -> Phase:
    """One leapfrog step: one gradient.

    Args:
        potential: energy per image.
        phase: current point.
        step_size: one per image ``(N,)``; negative values integrate backwards.
        inverse_mass: diagonal of M^-1, site -> tensor broadcastable to ``(N, *event)``.
        needs_energy: ``False`` where nobody reads the energy of the new point: a potential with a
            method ``force`` is then asked for the force alone, and the energy is left as it was.
        drift: moves the position; reversible, and keeps volume and kinetic energy.
    """
    momentum = lat.add(phase.momentum, phase.gradient, -0.5 * step_size)
    position, momentum = drift(phase.position, momentum, step_size, inverse_mass)
    force = None if needs_energy else getattr(potential, "force", None)
    if force is None:
        energy, gradient = energy_and_gradient(potential, position)
    else:
        energy, gradient = phase.energy, force(position)
    momentum = lat.add(momentum, gradient, -0.5 * step_size)
    return Phase(position, momentum, energy, gradient)


def dimension(latents: LatentsLike) -> int:
    """Number of latent dimensions of one image, over all sites."""
    return sum(math.prod(value.shape[1:]) for value in latents.values())


def check_dimension(latents: LatentsLike, what: str) -> None:
    """Raise a ``ValueError`` that names ``what`` where there is no room for a direction to turn."""
    if dimension(latents) < 2:
        raise ValueError(
            f"{what} needs at least 2 latent dimensions, since a direction must be able to turn; "
            "use BatchedHMC without burn-in for 1"
        )


def normalise(direction: LatentsLike) -> Latents:
    """Each image's vector divided by its length, over all sites."""
    inverse = lat.dot(direction, direction).rsqrt()
    return {name: lat.rows(inverse, value) * value for name, value in direction.items()}


def _turn(
    direction: LatentsLike, gradient: LatentsLike, time: Tensor, inverse_mass: LatentsLike | None
) -> tuple[Latents, Tensor]:
    """Direction and kinetic energy after ``time`` at a fixed gradient."""
    d = dimension(direction)
    if inverse_mass is not None:
        gradient = {name: value * inverse_mass[name].sqrt() for name, value in gradient.items()}
    # The smallest normal number stands for 0, where nothing turns.
    length = lat.dot(gradient, gradient).sqrt().clamp(min=torch.finfo(time.dtype).tiny)
    downhill = {name: -value / lat.rows(length, value) for name, value in gradient.items()}
    delta = time * length * (math.sqrt(d) / (d - 1))
    cosine = lat.dot(downhill, direction).clamp(-1.0, 1.0)
    # Everything is divided by exp(delta) / 2, which overflows for steep gradients.
    decay = (-delta).exp()
    along = (1 - decay) * (1 + decay + cosine * (1 - decay))
    turned = {
        name: lat.rows(2 * decay, value) * value + lat.rows(along, value) * downhill[name]
        for name, value in direction.items()
    }
    stretch = 0.5 * ((1 + cosine) + (1 - cosine) * decay.square())
    return normalise(turned), (d - 1) * (delta + stretch.log())


def isokinetic(
    potential: Potential, phase: Phase, step_size: Tensor, inverse_mass: LatentsLike | None = None
) -> tuple[Phase, Tensor]:
    """One step of microcanonical dynamics, one gradient, and its change of kinetic energy (nats).

    Arguments as :func:`leapfrog`; the momentum is the direction u, of length 1 when whitened.
    """
    half = 0.5 * step_size
    direction, first = _turn(phase.momentum, phase.gradient, half, inverse_mass)
    speed = math.sqrt(dimension(direction))
    scale = None if inverse_mass is None else {n: value.sqrt() for n, value in inverse_mass.items()}
    position = lat.add(phase.position, velocity(direction, scale), speed * step_size)
    energy, gradient = energy_and_gradient(potential, position)
    direction, second = _turn(direction, gradient, half, inverse_mass)
    return Phase(position, direction, energy, gradient), first + second
