"""Section ``card``: what the card can do, and what one gradient asks of it.

The rate is that of one large matrix product in each precision, the bandwidth that of a large copy,
bytes read and written. Torch counts the operations of one gradient of the energy while it runs, and
the bytes that its operators read and write, one after the other as they are: the fewest that the
same operators could move without being fused. Over the bandwidth, these bytes are a time below
which operators that are not fused cannot come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pyro_vae_defence.experiments.benchmark.decoder import layer_flops
from pyro_vae_defence.experiments.benchmark.gpu.config import GPUBenchmarkConfig
from pyro_vae_defence.experiments.benchmark.gpu.timing import Call, turns
from pyro_vae_defence.experiments.benchmark.gpu.ways import Note, cycled
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.precision import tf32


def card(vae: ConvVAE, x: Tensor, config: GPUBenchmarkConfig, note: Note) -> dict[str, Any]:
    """Rates in operations per second by precision, bandwidth in bytes per second, and what one
    row's gradient takes of both."""
    device, size = x.device, config.matmul_size
    elements = config.copy_mebibytes * 2**20 // 4

    def product(precision: str) -> Callable[[], Call]:
        def make() -> Call:
            dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
            a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            out = torch.empty_like(a)

            def call() -> None:
                with tf32(precision == "TF32"):
                    torch.mm(a, b, out=out)

            return call

        return make

    def copy() -> Call:
        source = torch.randn(elements, device=device)
        target = torch.empty_like(source)
        return lambda: _nothing(target.copy_(source))

    makers: dict[str, Callable[[], Call]] = {
        precision: product(precision) for precision in ("float32", "TF32", "bfloat16")
    }
    found = turns({**makers, "copy": copy}, device, config.seconds, config.repeats, note)
    for name, entry in found.items():
        if "error" not in entry:
            amount = 8 * elements if name == "copy" else 2 * size**3
            entry["per_second"] = amount / entry["seconds"]
    return {"rates": found, "gradient": one_gradient(vae, x)}


def _nothing(_: Tensor) -> None:
    return None


def one_gradient(vae: ConvVAE, x: Tensor) -> dict[str, float]:
    """Operations and bytes of one more row's gradient, and the operations of its layers as written.

    What a batch computes once, whatever its rows, is left out.
    """
    counts = []
    for rows in (1, 2):
        potential = program.potential(vae, cycled(x, rows))
        z = {"z": torch.randn(rows, vae.latent_dim, device=x.device)}
        with FlopCounterMode(display=False) as flops:
            lat.value_and_gradient(potential, z)
        with BytesMoved() as moved:
            lat.value_and_gradient(potential, z)
        counts.append((flops.get_total_flops(), moved.bytes))
    (flops_before, bytes_before), (flops_after, bytes_after) = counts
    return {
        "flops_per_row": flops_after - flops_before,
        "flops_per_row_as_written": layer_flops(vae),
        "bytes_per_row": bytes_after - bytes_before,
    }


class BytesMoved(TorchDispatchMode):
    """Counts the bytes of what operators read and write; views and empty tensors move nothing.

    Attributes:
        bytes: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        found = func(*args, **(kwargs or {}))
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        written = [value for value in tree_leaves(found) if isinstance(value, Tensor)]
        places = {value.untyped_storage().data_ptr() for value in read}
        seen = any(value.untyped_storage().data_ptr() in places for value in written)
        if (func._schema.is_mutable or not seen) and "empty" not in func._schema.name:
            self.bytes += sum(map(_size, read + written))
        return found


def _size(value: Tensor) -> int:
    """Bytes of a tensor; what is broadcast is read once."""
    sizes = zip(value.shape, value.stride())
    elements = 1
    for size, stride in sizes:
        elements *= size if stride or size == 0 else 1
    return elements * value.element_size()
