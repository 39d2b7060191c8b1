"""Random streams and arithmetic agree between devices."""

from __future__ import annotations

import pytest
import torch

from pyro_vae_defence.ops.streams import Streams, philox

pytestmark = pytest.mark.cuda


def test_streams_have_the_same_bits(device):
    words = [torch.arange(i, 50_000 + i) * 83_591 % 2**32 for i in range(4)]
    key = (0x1234_5678, 0x9ABC_DEF0)
    here, there = philox(tuple(words), key), philox(tuple(w.to(device) for w in words), key)
    for one, other in zip(here, there, strict=True):
        assert other.device.type == device.type
        assert torch.equal(one, other.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streams_draw_the_same_numbers(device, dtype):
    here, there = (Streams.create(300, 2, seed=2**61 + 5, device=d) for d in ("cpu", device))
    uniform = [s.uniform(3, 7, (33,), dtype).cpu() for s in (here, there)]
    assert torch.equal(*uniform)
    normal = [s.normal(3, 7, (33,), dtype).cpu() for s in (here, there)]
    # Logarithm, cosine and sine are right to a few units in the last place on either.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*normal, rtol=16 * eps, atol=16 * eps)
