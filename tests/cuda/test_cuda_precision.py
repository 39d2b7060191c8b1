"""float32, TensorFloat-32 and bfloat16 leave the target's moments right; memory is given back.

A Metropolis test takes whatever force is used, if its energies are right: a rounded force costs
acceptance, not correctness.
"""

from __future__ import annotations

import contextlib
import functools
import gc

import pytest
import torch
from programs import LinearGaussianVAE, TutorialVAE
from torch import nn

from pyro_vae_defence import attacks
from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.compiled import ReducedForce
from pyro_vae_defence.ops.balls import Linf

pytestmark = pytest.mark.cuda

# One in so many draws counts (tests/kernels.py asks for as many), and by how many standard errors a
# mean may be off.
THINNING = 6
STANDARD_ERRORS = 5.0


class LinearModule(nn.Module, LinearGaussianVAE):
    """A linear-Gaussian VAE whose weights are where the module is."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        known = LinearGaussianVAE()
        self.z_dim = known.z_dim
        self.register_buffer("weight", known.weight.float())
        self.register_buffer("bias", known.bias.float())


@contextlib.contextmanager
def tensor_float_32(wanted):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wanted
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


KERNELS = {
    "hmc": functools.partial(BatchedHMC, num_steps=6),
    "nuts": functools.partial(BatchedNUTS, max_tree_depth=4),
}
PRECISIONS = {
    "float32": (False, None),
    "tf32": (True, None),
    "tf32 forces": (False, functools.partial(ReducedForce, dtype="tf32")),
    "bfloat16 forces": (False, ReducedForce),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", KERNELS)
def test_moments(device, name, precision):
    tf32, prepare = PRECISIONS[precision]
    if device.type == "lazy" and prepare is not None:
        pytest.skip("torch.autocast knows no such device")
    # Without a GPU that the lines run is all.
    rows, draws, warmup = (400, 60, 150) if device.type == "cuda" else (100, 6, 10)
    vae = LinearModule().to(device)
    x = torch.rand(1, 1, 4, 4).expand(rows, -1, -1, -1).to(device)
    defence = MCMCDefence(vae, KERNELS[name], draws, warmup, prepare=prepare)
    with tensor_float_32(tf32):
        z = defence(x, torch.Generator().manual_seed(3)).samples["z"][0].double()  # (draw, row, D)
    mean, covariance = LinearGaussianVAE().exact(x[:1].double().cpu())
    sd = covariance.diagonal().sqrt()
    z = (z.cpu() - mean) / sd
    error = STANDARD_ERRORS / (rows * draws / THINNING) ** 0.5
    slack = 0.02 if tf32 else 0.0  # where energies are rounded, too
    assert (z.mean((0, 1)).abs() < error + slack).all()
    assert (z.square().mean((0, 1)) - 1).abs().max() < 2 * error + slack


def test_the_library_leaves_global_settings_alone(device):
    def settings():
        return (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
        )

    before = settings()
    vae, x = ConvVAE().eval().to(device), torch.rand(2, 1, 28, 28).to(device)
    MCMCDefence(vae, num_samples=1, warmup_steps=1)(x)
    attacks.PGD(attacks.symmetric_kl(vae), Linf(0.1), num_steps=1)(x)
    assert settings() == before


def test_tf32_changes_energies_by_little(device):
    """Convolutions round to TensorFloat-32 by default on such GPUs: how much a nat is that?"""
    vae, x = ConvVAE().eval().to(device), torch.rand(8, 1, 28, 28).to(device)
    found = []
    for wanted in (False, True):
        with tensor_float_32(wanted):
            result = MCMCDefence(vae, num_samples=1, warmup_steps=0, initial="mean")(
                x, torch.Generator().manual_seed(1)
            )
            found.append(result.sample_stats["lp"].double())
    relative = ((found[0] - found[1]) / found[0]).abs().max()
    assert relative < 1e-3


@pytest.mark.parametrize("what", ["defence", "attack"])
def test_memory_is_given_back(device, what):
    if device.type != "cuda":
        pytest.skip("counts the memory of a GPU")
    vae, x = TutorialVAE().eval().to(device), torch.rand(64, 1, 28, 28).to(device)

    def run():
        if what == "defence":
            MCMCDefence(vae, num_samples=3, warmup_steps=2, num_chains=4)(x)
        else:
            attacks.APGD(attacks.symmetric_kl(vae), Linf(0.1), num_steps=5, num_restarts=4)(x)
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    run()  # workspaces of libraries stay
    before = run()
    assert run() <= before


def test_memory_does_not_grow_with_the_chain(device):
    if device.type != "cuda":
        pytest.skip("counts the memory of a GPU")
    vae, x = ConvVAE().eval().to(device), torch.rand(256, 1, 28, 28).to(device)

    def peak(num_samples):
        torch.cuda.reset_peak_memory_stats()
        MCMCDefence(vae, num_samples=num_samples, warmup_steps=2, keep_draws=1)(x)
        return torch.cuda.max_memory_allocated()

    peak(2)
    assert peak(20) <= 1.05 * peak(2)
