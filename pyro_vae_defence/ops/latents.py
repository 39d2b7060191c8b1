"""Arithmetic on latents kept as a dict of tensors, one entry per latent site.

Every tensor has shape ``(N, *event)``: one row per image, or per (chain, image) pair once chains
are folded into the batch. Row ``c * num_images + i`` is then chain ``c`` of image ``i``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae_defence.types import Latents, LatentsLike, Potential


def rows(value: Tensor, like: Tensor) -> Tensor:
    """``value`` ``(N,)`` with singleton dimensions appended, so that it scales rows of ``like``."""
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim()))


def dot(a: LatentsLike, b: LatentsLike) -> Tensor:
    """Inner product per image, summed over sites and event dimensions: shape ``(N,)``."""
    return sum_sites({name: a[name] * b[name] for name in a})


def sum_sites(latents: LatentsLike) -> Tensor:
    """Sum per image over sites and event dimensions: shape ``(N,)``."""
    parts = [value.reshape(value.shape[0], -1).sum(-1) for value in latents.values()]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def add(a: LatentsLike, b: LatentsLike, scale: Tensor | float = 1.0) -> Latents:
    """``a + scale * b``, with ``scale`` a number or one value per image ``(N,)``."""
    if isinstance(scale, Tensor):
        return {name: a[name] + rows(scale, b[name]) * b[name] for name in a}
    return {name: a[name] + scale * b[name] for name in a}


def multiply(a: LatentsLike, b: LatentsLike) -> Latents:
    """Elementwise product, site by site."""
    return {name: a[name] * b[name] for name in a}


def where(mask: Tensor, a: LatentsLike, b: LatentsLike) -> Latents:
    """Rows of ``a`` where ``mask`` (bool, shape ``(N,)``) holds, rows of ``b`` elsewhere."""
    return {name: value.where(rows(mask, value), b[name]) for name, value in a.items()}


def detach(latents: LatentsLike) -> Latents:
    """Detach every site from the graph."""
    return {name: value.detach() for name, value in latents.items()}


def index(latents: LatentsLike, key: Tensor | slice | int) -> Latents:
    """Index every site along its first dimension."""
    return {name: value[key] for name, value in latents.items()}


def repeat(latents: LatentsLike, num_chains: int) -> Latents:
    """Fold copies into the batch: ``(N, *event)`` to ``(num_chains * N, *event)``."""
    return {
        name: value.repeat((num_chains,) + (1,) * (value.dim() - 1))
        for name, value in latents.items()
    }


def unfold(value: Tensor, num_chains: int) -> Tensor:
    """Undo the folding of chains: ``(num_chains * N, ...)`` to ``(num_chains, N, ...)``."""
    return value.reshape((num_chains, value.shape[0] // num_chains, *value.shape[1:]))


def value_and_gradient(potential: Potential, latents: LatentsLike) -> tuple[Tensor, Latents]:
    """Energies ``(N,)`` and their gradients by the latents, from one forward and one backward pass.

    No gradient of a model's parameter is computed; what comes back is detached.
    """
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in latents.items()}
        energy = potential(leaves)
        gradients = torch.autograd.grad(energy.sum(), tuple(leaves.values()))
    return energy.detach(), dict(zip(leaves, gradients, strict=True))
