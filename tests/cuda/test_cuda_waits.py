"""No inner loop makes the host wait for the GPU: PyTorch's own detector raises where one does.

``tests/test_host_reads.py`` says the same of more, without a GPU.
"""

from __future__ import annotations

import contextlib
import functools

import pyro
import pytest
import torch
from elsewhere import waits
from kernels import FACTORIES
from optimisers import OPTIMISERS
from programs import TutorialVAE

from pyro_vae_defence import attacks
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.objectives import BetaELBO
from pyro_vae_defence.ops.balls import L1, L2, Linf
from pyro_vae_defence.ops.streams import Streams

pytestmark = pytest.mark.cuda


@contextlib.contextmanager
def no_waiting(device):
    """What makes the host wait for the device fails."""
    if device.type != "cuda":
        with waits() as asked:
            yield
        assert asked == []
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def x(device):
    if device.type == "cpu":
        pytest.skip("nothing waits there; PVD_TEST_DEVICE=lazy is a device of its own")
    return torch.rand(4, 1, 28, 28).to(device)


def test_the_detector_detects(device, x):
    with pytest.raises((RuntimeError, AssertionError)), no_waiting(device):
        float(x.sum())


def run_transitions(factory, vae, x, device, perturbation=None):
    kernel = factory(program.target(vae.to(device), perturbation))
    kernel.streams = Streams.create(len(x), seed=1, device=device)
    kernel.setup(3, x)
    latents = kernel.sample(kernel.initial_params)  # which checks the start
    for _ in range(3):
        with no_waiting(device):
            latents = kernel.sample(latents)


@pytest.mark.parametrize("name", [name for name in FACTORIES if name != "nuts"])
def test_a_transition(device, name, x):
    run_transitions(FACTORIES[name], TutorialVAE().eval(), x, device)


def test_nuts_asks_whether_any_tree_grows(device, x):
    with pytest.raises((RuntimeError, AssertionError)):
        run_transitions(FACTORIES["nuts"], TutorialVAE().eval(), x, device)


@pytest.mark.parametrize("perturbation", [None, Linf(0.1), L2(1.0), L1(3.0)], ids=str)
def test_energies_of_convolutions(device, perturbation, x):
    factory = functools.partial(BatchedHMC, num_steps=1)
    run_transitions(factory, ConvVAE().eval(), x, device, perturbation)


@pytest.mark.parametrize("ball", [Linf(0.1), L2(1.0), L1(3.0)], ids=str)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_attack_step(device, name, ball, x):
    if name == "Square" and isinstance(ball, L1):
        pytest.skip("Square is defined for L_inf and L2")
    objective = attacks.symmetric_kl(ConvVAE().eval().to(device))
    attack = OPTIMISERS[name](objective, ball, num_steps=4)
    problem, _ = attack._prepare((x,), Streams.create(len(x), seed=1, device=device))
    state = attack._step(problem, attack._start(problem), 0)
    with no_waiting(device):
        for t in range(1, attack.num_steps):
            state = attack._step(problem, state, t)
        attack._finish(problem, state)


def test_a_training_step(device, x):
    vae, objective = ConvVAE().to(device), BetaELBO()
    optimiser = torch.optim.Adam(vae.parameters(), capturable=device.type == "cuda")
    with pyro.validation_enabled(False):
        for number in range(2):
            with no_waiting(device) if number else contextlib.nullcontext():
                objective.terms(vae.model, vae.guide, x)["loss"].sum().backward()
                optimiser.step()
