"""Section ``decoder``: a gradient of the energy against the machine's matrix-multiply rate.

Torch itself counts the operations of one gradient while it runs
(:class:`torch.utils.flop_counter.FlopCounterMode`: convolutions and matrix products, two per
multiply-add); the rate is that of one large float32 product in the same process. A model may
compute its layers in another way than they are written, with fewer operations: the share of the
rate counts what is computed, and beside it stands the share that the layers as written would amount
to. Products and gradients take turns and medians are compared, so that whatever else the machine
does slows both.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pyro_vae_defence.experiments.benchmark.config import BenchmarkConfig
from pyro_vae_defence.mcmc.integrators import energy_and_gradient
from pyro_vae_defence.models import ConvVAE, program

_CALLS = 3  # per turn and median
_OPERATORS = 6  # listed in the breakdown


def decoder(vae: ConvVAE, x: Tensor, config: BenchmarkConfig) -> dict[str, Any]:
    """Share of the matrix-multiply rate that one gradient reaches, for each of ``config.rows``.

    Rows are taken from images ``x``, repeated as needed.
    """
    generator = torch.Generator().manual_seed(config.seed)
    size = config.matmul_size
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    out = torch.empty(size, size)

    calls: dict[int, Callable[[], Any]] = {}
    flops = {}
    for rows in config.rows:
        repeated = x.repeat(-(-rows // len(x)), 1, 1, 1)[:rows]
        z = {"z": torch.randn(rows, vae.latent_dim, generator=generator)}
        potential = program.potential(vae, repeated)
        calls[rows] = functools.partial(energy_and_gradient, potential, z)
        with FlopCounterMode(display=False) as counter:
            calls[rows]()
        flops[rows] = counter.get_total_flops()

    rates: list[float] = []
    seconds: dict[int, list[float]] = {rows: [] for rows in config.rows}
    shares: dict[int, list[float]] = {rows: [] for rows in config.rows}
    for _ in range(config.repeats):
        for rows in config.rows:
            rate = 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=out))
            rates.append(rate)
            seconds[rows].append(_seconds(calls[rows]))
            shares[rows].append(flops[rows] / seconds[rows][-1] / rate)
    largest, written = max(config.rows), layer_flops(vae)
    return {
        "matmul_size": size,
        "matmul_flops_per_second": float(np.median(rates)),
        "flops_per_row_as_written": written,
        "rows": [
            {
                "rows": rows,
                "flops_per_row": flops[rows] / rows,
                "seconds_per_row": float(np.median(seconds[rows])) / rows,
                "share_of_matmul_rate": float(np.median(shares[rows])),
                "share_as_written": float(np.median(shares[rows])) * written * rows / flops[rows],
            }
            for rows in config.rows
        ],
        "operators": {"rows": largest, "shares": _breakdown(calls[largest])},
    }


def layer_flops(vae: ConvVAE) -> int:
    """Operations of one row's gradient through the decoder's layers as they are written.

    Every input pixel of a transposed convolution meets the whole kernel, two operations per weight;
    backwards, with respect to the input alone, it is as many again.
    """
    total, side = 0, 1
    for layer in vae.decoder:
        if isinstance(layer, nn.ConvTranspose2d):
            total += 2 * 2 * side**2 * layer.weight.numel()
            extent = layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
            side = (side - 1) * layer.stride[0] - 2 * int(layer.padding[0]) + extent
    return total


def _seconds(call: Callable[[], Any]) -> float:
    """Median wall time of a few calls, after one to warm up."""
    call()
    times = []
    for _ in range(_CALLS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def _breakdown(call: Callable[[], Any]) -> dict[str, float]:
    """Operators' shares of one call's CPU time, without what they call, largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    ordered = sorted(events, key=lambda event: -event.self_cpu_time_total)[:_OPERATORS]
    return {event.key: event.self_cpu_time_total / total for event in ordered}
