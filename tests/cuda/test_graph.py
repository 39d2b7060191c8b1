"""Transitions replayed by CUDA graphs are the transitions themselves, without a word to the host.

What else captured transitions have to do is tested on any machine in ``tests/test_captured.py``.
"""

from __future__ import annotations

import functools
import gc
import math

import pyro
import pytest
import torch
from kernels import FACTORIES, AskingKernel
from programs import HierarchicalVAE, LinearGaussianVAE, TutorialVAE

from pyro_vae_defence.defence import ConvergenceRule, MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS, captured
from pyro_vae_defence.mcmc.captured import Graph
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.models.compiled import Recorder, ReducedForce
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.precision import tf32, tf32_settings
from pyro_vae_defence.ops.streams import Streams

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CAPTURABLE = [name for name in FACTORIES if name != "nuts"]


def begin(make, model, x, prepare, *, seed=3, warmup_steps=4, **options):
    """A kernel and where it starts, the same for the same seed."""
    kernel = make(model, **options)
    kernel.prepare = prepare
    kernel.streams = Streams.create(len(x), seed=seed, device=x.device)
    kernel.setup(warmup_steps, x)
    generator = torch.Generator().manual_seed(0)
    start = {
        name: 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype).to(v.device)
        for name, v in kernel.initial_params.items()
    }
    return kernel, start


def draw(*args, num_transitions=8, **options):
    """Positions, energies and infos of a run, and its kernel."""
    kernel, params = begin(*args, **options)
    states = []
    for _ in range(num_transitions):
        params = kernel.sample(params)
        states.append((params, kernel.state.energy, kernel.info))
    return states, kernel


def assert_close(one, other, rtol=1e-8, atol=1e-8):
    for (z, energy, info), (z_, energy_, info_) in zip(one, other, strict=True):
        close = functools.partial(torch.testing.assert_close, rtol=rtol, atol=atol)
        close(z, z_)
        close(energy, energy_)
        close(info._asdict(), info_._asdict())


def assert_captured(graph):
    assert (graph.captured, graph.why_not) == (True, None)


@pytest.fixture
def linear(float64):
    return LinearGaussianVAE()


def images(*shape):
    return torch.rand(*shape, device="cuda")


@pytest.fixture
def count(monkeypatch):
    """How often something was captured."""
    made = []
    capture = captured.CUDAGraphs.__call__
    monkeypatch.setattr(
        captured.CUDAGraphs, "__call__", lambda *args: made.append(1) or capture(*args)
    )
    return made


# --- Replayed equals eager ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAPTURABLE)
def test_every_kernel(name, float64):
    vae, x, graph = HierarchicalVAE(), images(5, 1, 4, 4), Graph()
    metric = {"top": torch.rand(2) + 0.5, "rate": torch.ones(1), "low": torch.rand(5, 3) + 0.5}
    run = functools.partial(draw, FACTORIES[name], vae.model, inverse_mass_matrix=metric)
    states, _ = run(x, graph)
    assert_captured(graph)
    assert_close(states, run(x, Recorder())[0])
    x = images(5, 1, 4, 4)
    states, _ = run(x, graph, seed=2**64 - 7)
    assert_captured(graph)
    assert_close(states, run(x, None, seed=2**64 - 7)[0])


def test_one_capture_serves_all_seeds(linear, count):
    graph = Graph()
    for seed in (1, 2, 2**63):
        x = images(5, 1, 4, 4)
        run = functools.partial(draw, BatchedHMC, linear.model, x, seed=seed, jitter=0.0)
        assert_close(run(graph)[0], run(None)[0])
    assert_captured(graph)
    assert len(count) == 1


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # of the compiler's own dependencies
def test_a_network(compile):
    """In single precision; where a proposal is at the edge of acceptance a chain may fork."""
    vae, x, graph = ConvVAE().cuda().eval(), images(64, 1, 28, 28), Graph(compile=compile)
    run = functools.partial(draw, BatchedHMC, vae.model, x, num_steps=4, num_transitions=12)
    states, _ = run(graph)
    assert_captured(graph)
    expected, _ = run(Recorder(compile=compile))
    for (z, energy, _), (z_, energy_, _) in zip(states[:8], expected[:8], strict=True):
        same = (z["z"] - z_["z"]).abs().amax(1) < 1e-2
        assert same.float().mean() >= 0.9
        torch.testing.assert_close(energy[same], energy_[same], rtol=1e-3, atol=1e-1)


def test_defences_in_micro_batches_and_images_that_leave(linear):
    x, graph = images(7, 1, 4, 4), Graph()
    rule = ConvergenceRule(check_every=8, max_r_hat=1.6)
    options = {"until_converged": rule, "num_chains": 4, "num_samples": 40, "warmup_steps": 10}
    results = []
    for prepare in (graph, None):
        defence = MCMCDefence(linear, BatchedHMC, prepare=prepare, batch_size=16, **options)
        results.append(defence(x, torch.Generator().manual_seed(0)))
    one, other = results
    assert_captured(graph)
    assert "prepare_why_not" not in one.settings
    assert torch.equal(one.num_gradients, other.num_gradients)
    torch.testing.assert_close(one.samples, other.samples, rtol=1e-6, atol=1e-6)


# --- The host -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hmc-fixed", "hmc-paper", "mala", "ghmc", "ula"])
def test_a_replayed_transition_does_not_wait_for_the_device(name, linear):
    kernel, params = begin(FACTORIES[name], linear.model, images(5, 1, 4, 4), Graph())
    params = kernel.sample(params)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            params = kernel.sample(params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_captured(kernel.prepare)
    assert params["z"].isfinite().all()


def test_a_step_that_asks_the_host_says_why_not(linear):
    """And leaves the device as it was."""
    graph, x, stream = Graph(), images(5, 1, 4, 4), torch.cuda.current_stream()
    states, _ = draw(AskingKernel, linear.model, x, graph)
    assert graph.captured is False
    assert graph.why_not.startswith("capturing failed")
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    assert_close(states, draw(AskingKernel, linear.model, x, None)[0])
    # The same graph captures what can be.
    states, _ = draw(BatchedHMC, linear.model, x, graph)
    assert_captured(graph)
    assert_close(states, draw(BatchedHMC, linear.model, x, None)[0])


def test_nuts_says_why_not(linear):
    graph, x = Graph(), images(5, 1, 4, 4)
    nuts = functools.partial(BatchedNUTS, max_tree_depth=3)
    states, kernel = draw(nuts, linear.model, x, graph)
    assert kernel.potential.captured
    assert "NUTS asks the host" in graph.why_not
    assert_close(states, draw(nuts, linear.model, x, None)[0])


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["in place", "replaced", "moved"])
def test_changed_parameters_are_noticed(change, float64, count):
    vae, x, graph = TutorialVAE().cuda().double().eval(), images(3, 1, 28, 28), Graph()
    run = functools.partial(draw, BatchedHMC, vae.model, x, jitter=0.0)
    run(graph)
    vae.move_bias(change)
    pyro.clear_param_store()
    states, _ = run(graph)
    assert_close(states, run(None)[0])
    assert_captured(graph)
    assert len(count) == (1 if change == "in place" else 2)


def test_memory_is_given_back_with_the_graph():
    vae, x = ConvVAE().cuda().eval(), images(256, 1, 28, 28)
    make = functools.partial(BatchedHMC, jitter=0.0)
    draw(make, vae.model, x, Recorder(), num_transitions=2)  # what libraries keep
    draw(make, vae.model, x, Graph(), num_transitions=2)
    pyro.clear_param_store()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graph = Graph()
    draw(make, vae.model, x, graph, num_transitions=2)
    assert_captured(graph)
    del graph
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # The workspace that a library keeps for the capturing stream is below 64 MiB.
    assert torch.cuda.memory_reserved() <= before + 64 * 2**20


# --- Precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["tf32", torch.bfloat16, torch.float16])
def test_forces_are_reduced_and_energies_are_full(dtype):
    """Whatever torch is set to, and whether traced, recorded or captured."""
    vae, x = ConvVAE().cuda().eval(), images(64, 1, 28, 28)
    double = ConvVAE().cuda().double().eval()
    double.load_state_dict(vae.state_dict())
    energy, exact = program.potential(vae, x), program.potential(double, x.double())
    z = {"z": torch.randn(64, 64, device="cuda")}
    slope = lat.value_and_gradient(exact, {"z": z["z"].double()})[1]["z"]
    with tf32(False), torch.no_grad():
        full = energy(z)
    with tf32(True), torch.no_grad():
        assert not torch.equal(energy(z), full)  # else the card has no TF32
    for on in (False, True):
        with tf32(on):
            before = tf32_settings()
            for potential in (ReducedForce(energy, dtype), Recorder()(ReducedForce(energy, dtype))):
                value, force = potential.energy_and_gradient(z)
                torch.testing.assert_close(value, full, rtol=1e-6, atol=0.0)
                error = (force["z"].double() - slope).norm() / slope.norm()
                assert 1e-5 < error < 0.05
            graph = Graph(force_dtype=dtype)
            states, _ = draw(BatchedHMC, vae.model, x, graph, jitter=0.0)
            assert_captured(graph)
            assert tf32_settings() == before
        params, energies, _ = states[-1]
        with tf32(False), torch.no_grad():
            torch.testing.assert_close(energies, energy(params), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", ["tf32", torch.bfloat16])
def test_captured_reduced_forces_sample_the_exact_posterior(dtype):
    vae = LinearGaussianVAE()
    x = images(1, 1, 4, 4).repeat(4000, 1, 1, 1)
    mean, covariance = (value.cpu() for value in vae.exact(x[:1].cpu()))
    graph = Graph(force_dtype=dtype)
    make = functools.partial(BatchedHMC, step_size=0.1, num_steps=5)
    states, _ = draw(make, vae.model, x, graph, warmup_steps=1, num_transitions=50)
    assert_captured(graph)
    draws, sd = states[-1][0]["z"].cpu(), covariance.diagonal().sqrt()
    # Three means and three variances over 4000 chains, 5 standard errors: error rate 4e-6.
    assert ((draws.mean(0) - mean[0]).abs() < 5 * sd / math.sqrt(4000)).all()
    assert ((draws.var(0) / sd.square() - 1).abs() < 5 * math.sqrt(2 / 4000)).all()


def test_a_change_of_torchs_settings_is_captured_anew(count):
    vae, x, graph = ConvVAE().cuda().eval(), images(8, 1, 28, 28), Graph()
    run = functools.partial(draw, BatchedHMC, vae.model, x, graph, jitter=0.0)
    for on in (False, True, False):
        with tf32(on):
            run()
            assert_captured(graph)
    assert len(count) == 2
