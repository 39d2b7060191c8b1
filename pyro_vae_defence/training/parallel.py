r"""What the processes of a data-parallel training tell each other.

Every process holds all weights and sees its own share of each batch. The loss is a sum over images,
so the gradient of the total batch is the *sum* of the processes' gradients,

.. math:: \nabla \sum_{n \in B} \ell_n = \sum_r \nabla \sum_{n \in B_r} \ell_n,

and each process makes the same step as a single one would with the whole batch. With the noise of
the latents that holds in distribution, since each process draws its own; it holds up to rounding
where an image's noise depends on the image alone.

``DistributedDataParallel`` is not used: it wraps the ``forward`` of one module, and a VAE is a pair
of programs that an objective runs as often as it likes.

Outside of an initialised process group there is one process, and the functions change nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _active() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _active() else 0


def is_first() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return rank() == 0


def check_initialised() -> None:
    """Raise ``ValueError`` where torchrun's processes would train without knowing of each other."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    if launched and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _active():
        raise ValueError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, but they have no process "
            "group; call torch.distributed.init_process_group() before fit"
        )


def check_shares(length: int | None, x: Tensor | None) -> None:
    """Raise ``ValueError`` unless the processes have as many batches each, and different images.

    Args:
        length: number of batches, where known.
        x: the first batch; ``None`` if there is none.
    """
    if world_size() == 1:
        return
    lengths, sums = zip(*gather((length, None if x is None else float(x.double().sum()))))
    if None in sums:
        lengths = tuple(0 if of is None else n for n, of in zip(lengths, sums, strict=True))
    if len(set(lengths)) > 1:
        raise ValueError(
            f"loader has {lengths} batches in the different processes; they must have the same "
            "number, as with torch.utils.data.DistributedSampler"
        )
    if len(set(sums)) == 1 and x is not None:
        raise ValueError(
            "loader gives every process the same images; give each its share, e.g. by a "
            "torch.utils.data.DistributedSampler"
        )


def separate_noise() -> None:
    """Seed the processes differently, from what each has in its global generator."""
    if world_size() > 1:
        torch.manual_seed(int(torch.randint(2**62, (), device="cpu")) + rank())


def total(*numbers: float) -> list[float]:
    """Sums of numbers over the processes."""
    if world_size() == 1:
        return list(numbers)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    values = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def total_of_batch(loss: float, count: int) -> tuple[float, float]:
    """Sums of loss and number of images over the processes, each of which has a batch.

    Raises:
        ValueError: in all processes, if one has none left; see :func:`check_all_ended`.
    """
    loss, total_count, ended = total(loss, count, 0)
    if ended:
        _refuse_unequal(False, 0)
    return loss, total_count


def check_all_ended(batches: int) -> None:
    """Raise ``ValueError`` in all processes unless they have as many batches in an epoch.

    The one that has ended an epoch of ``batches`` says so in the message in which others sum the
    losses of their next one, so that nobody waits for what does not come.
    """
    *_, ended = total(0.0, 0, 1)
    if ended != world_size():
        _refuse_unequal(True, batches)


def _refuse_unequal(ended: bool, batches: int) -> None:
    found = [(r, n) for r, (done, n) in enumerate(gather((ended, batches))) if done]
    few = ", ".join(f"process {number} has {count}" for number, count in found)
    raise ValueError(
        f"loader has more batches in some processes than in others ({few}, others more); they must "
        "have the same number, as with torch.utils.data.DistributedSampler"
    )


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum each parameter's gradient over the processes, in place.

    A missing one counts as zero, and stays missing where every process lacks it: an optimiser
    leaves such a parameter alone.
    """
    parameters = list(parameters)
    if world_size() == 1 or not parameters:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    # One message for all of them, and for who has which.
    there = gradients[0].new_tensor([float(p.grad is not None) for p in parameters])
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), there])
    dist.all_reduce(flat)
    sizes = [gradient.numel() for gradient in gradients]
    *sums, there = flat.split([*sizes, len(parameters)])
    for parameter, gradient, summed, some in zip(
        parameters, gradients, sums, there.tolist(), strict=True
    ):
        parameter.grad = gradient.copy_(summed.view_as(gradient)) if some else None


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their mean over the processes."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= world_size()


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of the first process."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank, in each of them."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()
