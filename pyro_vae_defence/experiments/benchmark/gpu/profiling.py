"""Section ``profile``: what a transition spends its time on.

The same transition, captured and eager, under torch's profiler: the kernels that take most of the
card's time, and the share of the wall time (measured without the profiler) in which none runs,
which launches and Python take.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pyro_vae_defence.experiments.benchmark.chains import encodings
from pyro_vae_defence.experiments.benchmark.gpu.config import GPUBenchmarkConfig
from pyro_vae_defence.experiments.benchmark.gpu.timing import Call, failure, release, timed, wait
from pyro_vae_defence.experiments.benchmark.gpu.ways import (
    CAPTURED,
    EAGER,
    Note,
    Way,
    cycled,
    transitions,
)
from pyro_vae_defence.models import ConvVAE

WAYS = (CAPTURED, Way("captured", "bfloat16"), EAGER)

_KERNELS = 10  # listed
_LONGEST = 100  # characters of a kernel's name
_COUNT = 5  # transitions of a wall time


def profiles(vae: ConvVAE, x: Tensor, config: GPUBenchmarkConfig, note: Note) -> dict[str, Any]:
    """The profile of one transition with ``profile_rows`` chains, by way."""
    images = cycled(x, config.profile_rows)
    start, streams = encodings(vae, images, 1, config.seed)
    found: dict[str, Any] = {}
    for way in WAYS:
        note(f"profile: {way}")
        try:
            found[str(way)] = _profile(transitions(vae, images, start, streams, way, config)[1], x)
        except Exception as error:  # the others go on
            found[str(way)] = failure(error)
        release(images.device)
    return found


def _profile(call: Call, x: Tensor) -> dict[str, Any]:
    device = x.device
    timed(call, device, 2)  # the first of which records and captures
    wall = timed(call, device, _COUNT)
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        call()
        wait(device)
    seconds: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, int] = defaultdict(int)
    for event in profiled.events():
        if on_gpu and event.device_type == DeviceType.CUDA:
            spent = event.time_range.elapsed_us()
        elif not on_gpu:
            spent = event.self_cpu_time_total
        else:
            continue
        seconds[event.name] += spent / 1e6
        counts[event.name] += 1
    if not seconds:
        raise RuntimeError("the profiler saw no kernel")
    busy = sum(seconds.values())
    ordered = sorted(seconds, key=lambda name: -seconds[name])[:_KERNELS]
    return {
        "wall_seconds": wall,
        "busy_seconds": busy,
        "idle_share": max(0.0, 1.0 - busy / wall),
        "kernels": sum(counts.values()),
        "longest": [
            {"name": name[:_LONGEST], "share": seconds[name] / busy, "count": counts[name]}
            for name in ordered
        ],
    }
