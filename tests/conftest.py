"""Fixtures every test may use."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path

import pyro
import pytest
import torch
from elsewhere import Elsewhere
from programs import LinearGaussianVAE, TutorialVAE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.ops.streams import Streams

NARROW = (4, 4, 6, 8)
SHARED = Path(os.environ.get("PVD_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))


def shared_path(*parts: str) -> Path:
    """A file of the reference data beside the repository; skips the test when it is missing."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"reference data not on this machine: ../shared/{'/'.join(parts)}")
    return path


def pytest_collection_finish():
    """What importing everything has made stays: collecting garbage need not look at it each time,
    which takes a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _clean_pyro():
    """Every test starts from an empty parameter store and a seed that depends on nothing."""
    pyro.clear_param_store()
    # Where there is no GPU, torch.manual_seed would write down the stack for each kind of device.
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def device():
    """The device that tests in ``tests/cuda`` compare with the CPU.

    ``PVD_TEST_DEVICE`` says which: ``cuda`` by default. Without a GPU, ``lazy`` is the device of
    :mod:`elsewhere`, which finds what would fail on one.
    """
    name = os.environ.get("PVD_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    with Elsewhere() if name == "lazy" else contextlib.nullcontext():
        yield torch.device(name)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="module")
def narrow():
    """The paper's VAE with few channels for a whole module: studies do the same with it, sooner.

    Packaged weights do not fit into it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConvVAE, "widths", NARROW)
        yield


@pytest.fixture(scope="module")
def short_searches():
    """Searches of posterior modes in studies are of three gradients for a whole module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_vae_defence.experiments.defences.MODE_STEPS", 3)
        yield


@pytest.fixture
def tutorial_vae():
    return TutorialVAE().eval()


@pytest.fixture
def linear_vae(float64):
    return LinearGaussianVAE()


@pytest.fixture
def used_noise(monkeypatch):
    """Step and purpose of every draw from streams, in order."""
    used = []
    uniform = Streams.uniform  # which normals are made of, too

    def recorded(self, step, purpose=0, *arguments):
        used.append((step, purpose))
        return uniform(self, step, purpose, *arguments)

    monkeypatch.setattr(Streams, "uniform", recorded)
    return used


class LargestTensor(TorchDispatchMode):
    """The most numbers that any operation inside has returned in a tensor."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = (v.numel() for v in tree_leaves(found) if isinstance(v, torch.Tensor))
        self.size = max(self.size, *sizes, 0)
        return found


@pytest.fixture
def largest_tensor():
    """``with largest_tensor as largest:``, and then ``largest.size``."""
    return LargestTensor()
