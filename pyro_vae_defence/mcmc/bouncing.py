r"""Hamiltonian Monte Carlo in a set A of latents, at whose border trajectories bounce.

Most of the mass of a set may lie at its border: the density outside is larger still. There every
other proposal of a chain that is merely rejected outside of A is lost, and its steps have to be
short. Here the drift of a leapfrog step, :math:`z' = z + \epsilon M^{-1} r`, that leaves A turns
the momentum around at the normal n of the border and drifts once more,

.. math::
    r' = r - 2\, \frac{n^\top M^{-1} r}{n^\top M^{-1} n}\, n, \qquad
    z'' = z' + \epsilon M^{-1} r', \qquad n = \nabla m(z'),

for a margin m that is positive in A and negative outside. As n is a function of z' alone, the map
from (z, r) to (z'', r') preserves volume and the kinetic energy, and from (z'', -r') it leads by
the same z' back to (z, -r): transitions stay exact, whatever the normal. A trajectory that ends
outside of A is rejected.

References: Skilling, "Bayesian computation in big spaces: nested sampling and Galilean Monte
Carlo", 2012, https://doi.org/10.1063/1.3703630; Afshar, Domke, "Reflection, refraction, and
Hamiltonian Monte Carlo", NeurIPS 2015 (who find the point where the border is crossed).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae_defence.mcmc import hmc
from pyro_vae_defence.mcmc.integrators import Drift, drift, velocity
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.types import Latents, LatentsLike, Potential

Margin = Callable[[Latents, Tensor], Tensor]
"""Latents ``(M, *event)`` of rows of a batch, and the numbers of these, int64 ``(M,)``, to how far
inside of its set each one lies, ``(M,)``: below zero outside. Differentiable, or each proposal
outside is lost."""


def step(
    potential: Potential,
    state: hmc.HMCState,
    streams: Streams,
    step_size: Tensor,
    num_steps: int,
    margin: Margin,
    inverse_mass: LatentsLike | None = None,
) -> tuple[hmc.HMCState, hmc.HMCInfo]:
    """One transition of every chain in its set: ``num_steps`` gradients, and as many looks at the
    margin and one. Arguments as :func:`pyro_vae_defence.mcmc.hmc.step`."""
    return hmc.step(
        potential,
        state,
        streams,
        step_size,
        num_steps,
        inverse_mass,
        lambda latents: _value(margin, latents) >= 0,
        bouncing(margin),
    )


def bouncing(margin: Margin) -> Drift:
    """The drift that turns around where it has left the set."""

    def bounce(
        position: Latents, momentum: Latents, step_size: Tensor, inverse_mass: LatentsLike | None
    ) -> tuple[Latents, Latents]:
        position, momentum = drift(position, momentum, step_size, inverse_mass)
        outside = _value(margin, position) < 0
        if not bool(outside.any()):
            return position, momentum
        turned = _reflected(momentum, _normals(margin, position, outside), inverse_mass)
        again, turned = drift(position, turned, step_size, inverse_mass)
        return lat.where(outside, again, position), lat.where(outside, turned, momentum)

    return bounce


@torch.no_grad()
def _value(margin: Margin, latents: Latents) -> Tensor:
    """The margin of all rows, ``(N,)``."""
    first = next(iter(latents.values()))
    return margin(latents, torch.arange(len(first), device=first.device))


def _normals(margin: Margin, latents: Latents, outside: Tensor) -> Latents:
    """Gradients of the margin where rows are outside of their set, and zero elsewhere."""
    rows = outside.nonzero()[:, 0]
    with torch.enable_grad():
        leaves = {n: v[rows].detach().requires_grad_() for n, v in latents.items()}
        total = margin(leaves, rows).sum()
        if not total.requires_grad:
            return {name: torch.zeros_like(each) for name, each in latents.items()}
        found = torch.autograd.grad(
            total, tuple(leaves.values()), allow_unused=True, materialize_grads=True
        )
    return {
        name: torch.zeros_like(each).index_copy(0, rows, part)
        for (name, each), part in zip(latents.items(), found, strict=True)
    }


def _reflected(momentum: Latents, normal: Latents, inverse_mass: LatentsLike | None) -> Latents:
    """Momenta turned around at planes of these normals; as they are where one is zero."""
    along = velocity(normal, inverse_mass)
    length = lat.dot(normal, along)
    share = torch.where(length > 0, lat.dot(momentum, along) / length, 0.0)
    return lat.add(momentum, normal, -2 * share)
