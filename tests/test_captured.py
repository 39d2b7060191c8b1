"""Captured transitions are the transitions themselves, bit for bit, or it is said why not."""

from __future__ import annotations

import copy
import functools
import gc
import math
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from kernels import FACTORIES, AskingKernel
from programs import HierarchicalVAE, LinearGaussianVAE, TutorialVAE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae_defence.defence import ConvergenceRule, MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS, captured, hmc
from pyro_vae_defence.mcmc.captured import Graph
from pyro_vae_defence.mcmc.kernels import BatchedKernel
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.compiled import Recorder, ReducedForce
from pyro_vae_defence.ops.streams import Streams

CAPTURABLE = [name for name in FACTORIES if name != "nuts"]


class Tape(TorchDispatchMode):
    """Remembers operations, and the tensors that they read and wrote."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host was asked"
        result = func(*args, **(kwargs or {}))
        writes = func._schema.is_mutable or any(r.alias_info for r in func._schema.returns)
        outputs = [] if writes else [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.calls.append((func, args, kwargs or {}, outputs))
        return result


class Tapes:
    """Stands in for CUDA graphs on the CPU: as there, a replay repeats operations on the same
    places in memory, and all else is frozen."""

    made = replayed = 0

    def __init__(self, device):
        self.device = device

    def __call__(self, function, inputs):
        assert not any(bool((value > 0).any()) for value in inputs)  # nothing to hold on to
        with Tape() as tape:
            results = function(*inputs)
        Tapes.made += 1

        def replay():
            Tapes.replayed += 1
            with torch.no_grad():
                for func, args, kwargs, outputs in tape.calls:
                    values = tree_leaves(func(*args, **kwargs))
                    for place, value in zip(outputs, values, strict=False):
                        place.copy_(value)
            return results

        return replay


@pytest.fixture
def capturing(monkeypatch):
    """A CPU on which transitions can be captured; what counts captures and replays."""
    monkeypatch.setitem(captured.CAPTURES, "cpu", Tapes)
    Tapes.made = Tapes.replayed = 0
    return Tapes


def draw(make, model, x, prepare, *, seed=3, warmup_steps=4, num_samples=4, **options):
    """Positions, energies and infos of a run, and its kernel."""
    kernel = make(model, **options)
    kernel.prepare = prepare
    kernel.streams = Streams.create(len(x), seed=seed)
    kernel.setup(warmup_steps, x)
    torch.manual_seed(0)
    params = {name: 0.1 * torch.randn_like(v) for name, v in kernel.initial_params.items()}
    states = []
    for _ in range(warmup_steps + num_samples):
        params = kernel.sample(params)
        states.append((params, kernel.state.energy, kernel.info))
    return states, kernel


def assert_same(one, other):
    for (z, energy, info), (z_, energy_, info_) in zip(one, other, strict=True):
        assert z.keys() == z_.keys()
        assert all(torch.equal(z[name], z_[name]) for name in z)
        assert torch.equal(energy, energy_)
        for name, value in info._asdict().items():
            assert torch.equal(value, getattr(info_, name)), name
            assert value.dtype == getattr(info_, name).dtype


def assert_captured(graph):
    assert (graph.captured, graph.why_not) == (True, None)


# --- Replayed equals eager ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAPTURABLE)
def test_every_kernel_replayed_is_the_kernel(name, capturing):
    """Adaptation, jitter, burn-in and a metric of two sites included; one capture per length."""
    vae, x, graph, recorder = HierarchicalVAE(), torch.rand(4, 1, 4, 4), Graph(), Recorder()
    metric = {"top": torch.rand(2) + 0.5, "rate": torch.ones(1), "low": torch.rand(4, 3) + 0.5}
    run = functools.partial(draw, FACTORIES[name], vae.model, inverse_mass_matrix=metric)
    states, kernel = run(x, graph)
    assert_captured(graph)
    expected, plain = run(x, recorder)
    assert_same(states, expected)
    assert (kernel.state.step, kernel.why_not) == (8, None)
    diagnostics = kernel.diagnostics()
    for key, value in plain.diagnostics().items():
        assert torch.equal(torch.as_tensor(diagnostics[key]), torch.as_tensor(value)), key
    lengths = {info.num_steps.tolist()[0] for _, _, info in states[1:]}
    assert capturing.made <= len(lengths) + 1
    # Another seed and other images: the same captures.
    x, made = torch.rand(4, 1, 4, 4), capturing.made
    states, _ = run(x, graph, seed=2**64 - 7)
    assert_same(states, run(x, recorder, seed=2**64 - 7)[0])
    if getattr(kernel, "jitter", 0.0) == 0.0:
        assert capturing.made == made == 1
    assert capturing.replayed >= 16


def test_a_network(capturing):
    vae, x = ConvVAE(latent_dim=3).eval(), torch.rand(3, 1, 28, 28)
    graph = Graph()
    make = functools.partial(BatchedHMC, num_steps=2)
    states, _ = draw(make, vae.model, x, graph)
    assert_captured(graph)
    assert_same(states, draw(make, vae.model, x, None)[0])


def test_images_that_are_no_block_of_memory(capturing):
    """Of one image expanded, and of channels last, the graph's own copy has other strides."""
    one, graph, vae = torch.rand(1, 1, 4, 4), Graph(), LinearGaussianVAE()
    for x in (one.expand(3, 1, 4, 4), torch.rand(3, 1, 4, 8)[..., ::2]):
        states, _ = draw(BatchedHMC, vae.model, x, graph)
        assert_captured(graph)
        assert_same(states, draw(BatchedHMC, vae.model, x, Recorder())[0])


def defend(vae, x, prepare, seed=1, kernel=BatchedHMC, **options):
    defence = MCMCDefence(vae, kernel, 8, 4, prepare=prepare, **options)
    return defence(x, torch.Generator().manual_seed(seed))


def test_a_defence_in_micro_batches_of_two_shapes(capturing):
    vae, x = LinearGaussianVAE(), torch.rand(5, 1, 4, 4)
    graph = Graph()
    options = {"batch_size": 4, "num_chains": 2}
    for seed in (1, 2):
        result = defend(vae, x, graph, seed, **options)
        expected = defend(vae, x, None, seed, **options)
        assert torch.equal(result.samples["z"], expected.samples["z"])
        assert torch.equal(result.num_gradients, expected.num_gradients)
        for name, value in expected.sample_stats.items():
            assert torch.equal(result.sample_stats[name], value), name
        assert result.settings["prepare"] == "Graph()"
        assert "prepare_why_not" not in result.settings
    assert_captured(graph)
    assert capturing.made <= 2 * 8  # shapes, lengths


def test_images_that_leave_the_batch(capturing):
    vae, x, graph = LinearGaussianVAE(), torch.rand(6, 1, 4, 4), Graph()
    rule = ConvergenceRule(check_every=8, max_r_hat=1.6)
    options = {"until_converged": rule, "num_chains": 4, "num_samples": 40, "warmup_steps": 10}
    results = []
    for prepare in (graph, None):
        defence = MCMCDefence(vae, BatchedHMC, prepare=prepare, **options)
        results.append(defence(x, torch.Generator().manual_seed(0)))
    result, expected = results
    shapes = {key[1][-1][0][0] for key in graph._transitions}
    assert len(shapes) > 1, "no image left early; the test shows nothing"
    assert torch.equal(result.num_gradients, expected.num_gradients)
    assert torch.equal(result.samples["z"], expected.samples["z"])
    assert_captured(graph)


# --- Stale inputs are seen ------------------------------------------------------------------------


def test_a_transition_that_holds_on_to_something_is_refused(capturing):
    """A step with a memory of its own, which a replay does not have."""
    numbers = iter(range(100))

    def forgetful(potential, state, streams, step_size, inverse_mass=None):
        shifted = streams._replace(chain=streams.chain + next(numbers))
        return hmc.step(potential, state, shifted, step_size, 1, inverse_mass)

    class Forgetful(BatchedKernel):
        def _step(self, num_gradients):
            return forgetful

    graph = Graph()
    _, kernel = draw(Forgetful, LinearGaussianVAE().model, torch.rand(4, 1, 4, 4), graph)
    assert graph.captured is False
    assert "a replay and the transition differ in 100% of the rows" in kernel.why_not


@pytest.mark.parametrize("name", ["hmc-fixed", "mala", "ghmc", "ula"])
def test_one_capture_serves_the_first_transition_and_the_others(name, capturing):
    """Three dimensions: normals come in pairs, of which one is left over."""
    draw(FACTORIES[name], LinearGaussianVAE().model, torch.rand(4, 1, 4, 4), Graph())
    assert capturing.made == 1


@pytest.mark.parametrize(
    ("dtype", "off", "captured"),
    [(None, 1e-3, False), (torch.bfloat16, 1e-3, True), (torch.bfloat16, 0.1, False)],
)
def test_replays_may_differ_as_forces_may(dtype, off, captured, capturing):
    """Libraries choose other algorithms while they are captured, which round differently."""
    numbers = iter(range(100))

    def drifting(potential, state, streams, step_size, inverse_mass=None):
        moved, info = hmc.step(potential, state, streams, step_size, 1, inverse_mass)
        rate = info.acceptance_rate.mul(1 + off * next(numbers))
        factor = 1 + off * next(numbers)
        position = {name: value * factor for name, value in moved.position.items()}
        moved = moved._replace(position=position, energy=potential(position))
        return moved, info._replace(acceptance_rate=rate)

    class Drifting(BatchedKernel):
        def _step(self, num_gradients):
            return drifting

    graph = Graph(force_dtype=dtype)
    draw(Drifting, LinearGaussianVAE().model, torch.rand(4, 1, 4, 4), graph, num_samples=0)
    assert graph.captured is captured


@pytest.mark.parametrize(("off", "captured"), [(0.0, True), (1e-2, False)])
def test_energies_that_are_compared_have_no_slack(off, captured, capturing):
    """A replay whose energies are rounded as its forces may be is refused."""
    numbers = iter(range(100))

    def rounding(potential, state, streams, step_size, inverse_mass=None):
        moved, info = hmc.step(potential, state, streams, step_size, 1, inverse_mass)
        return moved._replace(energy=moved.energy * (1 + off * min(next(numbers), 1))), info

    class Rounding(BatchedKernel):
        def _step(self, num_gradients):
            return rounding

    graph = Graph(force_dtype=torch.bfloat16)
    draw(Rounding, LinearGaussianVAE().model, torch.rand(4, 1, 4, 4), graph, num_samples=0)
    assert graph.captured is captured
    assert captured or "energies of a replay are off by" in graph.why_not


@pytest.mark.parametrize(
    ("dtype", "rows", "captured"),
    [(None, 2, False), (torch.bfloat16, 6, True), (torch.bfloat16, 20, False)],
)
def test_decisions_may_differ_as_energies_of_proposals_do(dtype, rows, captured, capturing):
    """Of 20 chains so many stay where they are, which the transition moves."""
    numbers = iter(range(100))

    def deciding(potential, state, streams, step_size, inverse_mass=None):
        small = 0.4 * step_size  # most chains move
        moved, info = hmc.step(potential, state, streams, small, 1, inverse_mass)
        if next(numbers) == 0:
            return moved, info
        stay = torch.arange(20) < rows
        position = {
            name: torch.where(stay[:, None], state.position[name], value)
            for name, value in moved.position.items()
        }
        return moved._replace(position=position, energy=potential(position)), info

    class Deciding(BatchedKernel):
        def _step(self, num_gradients):
            return deciding

    graph = Graph(force_dtype=dtype)
    draw(Deciding, LinearGaussianVAE().model, torch.rand(20, 1, 4, 4), graph, num_samples=0)
    assert graph.captured is captured
    assert captured or "differ in" in graph.why_not


@pytest.mark.parametrize(
    ("step_size", "dtype"), [(0.1, None), (0.165, None), (0.165, torch.bfloat16)]
)
@pytest.mark.parametrize("stale", ["state", "seed", "step", "step_size", "images", "metric"])
def test_mutant_an_input_that_is_not_written(stale, step_size, dtype, capturing, monkeypatch):
    """Such a replay differs from the transition it was made beside, and is refused, also where few
    rows move."""
    vae, x = LinearGaussianVAE(), torch.rand(20, 1, 4, 4)
    # state: position, energy, gradient, step; seed, image, chain; step size; metric; images
    place = {"state": 0, "step": 3, "seed": 4, "step_size": 7, "metric": 8, "images": 9}[stale]
    write = captured._Inputs.set

    def forget(self, values):
        kept = self.places[place].clone()
        write(self, values)
        self.places[place].copy_(kept)

    monkeypatch.setattr(captured._Inputs, "set", forget)
    metric = {"z": torch.rand(3) + 0.5}
    graph = Graph(force_dtype=dtype)
    run = functools.partial(draw, BatchedHMC, vae.model, x, jitter=0.0, warmup_steps=0)
    run(graph, inverse_mass_matrix=metric, step_size=step_size)
    assert graph.captured is False
    assert "differ" in graph.why_not


def test_mutant_results_that_the_next_replay_overwrites(capturing, monkeypatch):
    class NoCopy(torch.Tensor):
        def clone(self):
            return self

    vae, x = LinearGaussianVAE(), torch.rand(4, 1, 4, 4)
    call = captured._Transition.__call__

    def uncopied(self, number):
        replay = self.replay
        self.replay = lambda: [value.as_subclass(NoCopy) for value in replay()]
        result = call(self, number)
        self.replay = replay
        return result

    monkeypatch.setattr(captured._Transition, "__call__", uncopied)
    states, _ = draw(BatchedHMC, vae.model, x, Graph(), jitter=0.0)
    with pytest.raises(AssertionError):
        assert_same(states, draw(BatchedHMC, vae.model, x, None, jitter=0.0)[0])


# --- Parameters that change -----------------------------------------------------------------------


@pytest.mark.parametrize("change", ["in place", "replaced", "moved"])
def test_changed_parameters_are_noticed(change, capturing):
    vae, x, graph = TutorialVAE().eval(), torch.rand(3, 1, 28, 28), Graph()
    run = functools.partial(draw, BatchedHMC, vae.model, x, jitter=0.0)
    run(graph)
    assert capturing.made == 1
    vae.move_bias(change)
    pyro.clear_param_store()
    states, _ = run(graph)
    assert_same(states, run(None)[0])
    assert_captured(graph)
    assert capturing.made == (1 if change == "in place" else 2)


# --- What is not captured -------------------------------------------------------------------------


def test_nuts_says_why_not(capturing):
    vae, x, graph = LinearGaussianVAE(), torch.rand(3, 1, 4, 4), Graph()
    nuts = functools.partial(BatchedNUTS, max_tree_depth=3)
    states, kernel = draw(nuts, vae.model, x, graph)
    assert_same(states, draw(nuts, vae.model, x, None)[0])
    assert kernel.potential.captured  # gradients are recorded
    assert graph.captured is False
    assert kernel.why_not == "NUTS asks the host once per leaf whether any tree still grows"
    result = defend(vae, x, graph, kernel=nuts)
    assert result.settings["prepare_why_not"] == kernel.why_not


def test_a_cpu_says_why_not():
    vae, x, graph = LinearGaussianVAE(), torch.rand(3, 1, 4, 4), Graph()
    states, kernel = draw(BatchedHMC, vae.model, x, graph)
    assert_same(states, draw(BatchedHMC, vae.model, x, Recorder())[0])
    assert kernel.potential.captured
    assert kernel.why_not == "there are no graphs of operations on the device cpu"


def branching(x):
    with pyro.plate("data", x.shape[0]):
        z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0]), 1.0))
        scale = 1.0 if float(z.sum()) > 0 else 2.0
        pyro.sample("obs", dist.Normal(z, scale), obs=x)


@pytest.mark.parametrize("prepare", [Graph(), Recorder()])
def test_a_model_that_branches_says_why_not(prepare, capturing):
    x = torch.randn(4)
    states, kernel = draw(BatchedHMC, branching, x, prepare)
    assert_same(states, draw(BatchedHMC, branching, x, None)[0])
    assert kernel.why_not.startswith("recording failed")
    assert capturing.made == 0
    # A model that can be recorded, with the same graph.
    _, kernel = draw(BatchedHMC, LinearGaussianVAE().model, torch.rand(2, 1, 4, 4), prepare)
    assert kernel.why_not is None


def test_a_step_that_asks_the_host_says_why_not(capturing):
    graph = Graph()
    model, x = LinearGaussianVAE().model, torch.rand(3, 1, 4, 4)
    states, _ = draw(AskingKernel, model, x, graph)
    assert_same(states, draw(AskingKernel, model, x, None)[0])
    assert graph.captured is False
    assert graph.why_not.startswith("capturing failed")


# --- Memory ---------------------------------------------------------------------------------------


def test_captures_are_few_and_go_with_the_graph(capturing, monkeypatch):
    monkeypatch.setattr(captured, "_MOST_CAPTURES", 2)
    graph, model = Graph(), LinearGaussianVAE().model
    for rows in (2, 3, 4):
        x = torch.rand(rows, 1, 4, 4)
        states = draw(BatchedHMC, model, x, graph, jitter=0.0)[0]
        assert_same(states, draw(BatchedHMC, model, x, None, jitter=0.0)[0])
    assert len(graph._transitions) == 2
    assert capturing.made == 3
    held = [weakref.ref(transition.inputs) for transition in graph._transitions.values()]
    assert len(graph._inputs) == 2
    del graph
    gc.collect()
    assert [each() for each in held] == [None, None]


def test_lengths_share_their_inputs(capturing):
    graph = Graph()
    draw(BatchedHMC, LinearGaussianVAE().model, torch.rand(3, 1, 4, 4), graph, num_samples=20)
    assert len(graph._transitions) > 3
    assert len({id(t.inputs) for t in graph._transitions.values()}) == 1


# --- Forces in reduced precision ------------------------------------------------------------------


def test_reduced_forces_replayed_are_reduced_forces(capturing):
    """Of which an energy is asked for at the end of a trajectory, in full precision."""
    vae, x = LinearGaussianVAE(), torch.rand(4, 1, 4, 4)
    for dtype in (torch.bfloat16, "tf32"):
        graph = Graph(force_dtype=dtype)
        states, kernel = draw(BatchedHMC, vae.model, x, graph)
        assert_captured(graph)
        reduced = functools.partial(ReducedForce, dtype=dtype)
        assert_same(states, draw(BatchedHMC, vae.model, x, reduced)[0])
        assert repr(graph) == f"Graph(force_dtype={dtype!r})"
        z, energy, _ = states[-1]
        assert torch.equal(energy, kernel.potential(z))
    plain = draw(BatchedHMC, vae.model, x, None)[0]
    assert_same(states, plain)  # a CPU has no TF32
    states, _ = draw(BatchedHMC, vae.model, x, Graph(force_dtype=torch.bfloat16))
    assert not torch.equal(states[-1][0]["z"], plain[-1][0]["z"])


def test_captured_reduced_forces_sample_the_exact_posterior(capturing):
    vae = LinearGaussianVAE()
    x = torch.rand(1, 1, 4, 4).repeat(1000, 1, 1, 1)
    mean, covariance = vae.exact(x[:1])
    graph = Graph(force_dtype=torch.bfloat16)
    make = functools.partial(BatchedHMC, step_size=0.1, num_steps=5, jitter=0.0)
    states, _ = draw(make, vae.model, x, graph, warmup_steps=0, num_samples=25)
    assert_captured(graph)
    assert capturing.replayed == 25
    draws, sd = states[-1][0]["z"], covariance.diagonal().sqrt()
    # Three means and three variances over 1000 chains, 5 standard errors: error rate 4e-6.
    assert ((draws.mean(0) - mean[0]).abs() < 5 * sd / math.sqrt(1000)).all()
    assert ((draws.var(0) / sd.square() - 1).abs() < 5 * math.sqrt(2 / 1000)).all()


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.float32, "bf16", 16])
def test_force_dtype(value):
    with pytest.raises(ValueError, match=r"force_dtype must be torch.bfloat16 .* got "):
        Graph(force_dtype=value)


def test_prepare_by_name():
    vae = LinearGaussianVAE()
    assert MCMCDefence(vae, prepare="graph").prepare.force_dtype is None
    with pytest.raises(ValueError, match="prepare must .* or be 'graph', got 'graphs'"):
        MCMCDefence(vae, prepare="graphs")
    kernel = BatchedHMC(vae.model)
    kernel.prepare = "cuda"
    with pytest.raises(ValueError, match="prepare must .* or be 'graph', got 'cuda'"):
        kernel.setup(0, torch.rand(2, 1, 4, 4))
    kernel.prepare = "graph"
    kernel.setup(0, torch.rand(2, 1, 4, 4))
    assert isinstance(kernel.prepare, Graph)


@pytest.mark.parametrize("prepare", ["graph", Graph(force_dtype="tf32"), Recorder()], ids=str)
def test_a_defence_that_has_run_is_copied_without_its_recordings(prepare, float64):
    defence = MCMCDefence(LinearGaussianVAE(), num_samples=2, warmup_steps=1, prepare=prepare)
    x = torch.rand(2, 1, 4, 4)
    expected = defence(x, torch.Generator().manual_seed(0)).latents["z"]
    for again in (pickle.loads(pickle.dumps(defence)), copy.deepcopy(defence)):
        assert repr(again.prepare) == repr(defence.prepare)
        recorder = getattr(again.prepare, "_recorder", again.prepare)
        assert not recorder.recordings
        assert torch.equal(again(x, torch.Generator().manual_seed(0)).latents["z"], expected)


def test_prepare_needs_a_model_and_a_kernel_of_this_library():
    vae = LinearGaussianVAE()
    kernel = BatchedHMC(potential_fn=lambda latents: latents["z"].square().sum(-1))
    kernel.prepare = "graph"
    with pytest.raises(ValueError, match=r"prepare=Graph\(\) needs a model"):
        kernel.setup(0)
    defence = MCMCDefence(vae, pyro.infer.NUTS, prepare="graph")
    with pytest.raises(ValueError, match="prepare need a kernel of this library"):
        defence(torch.rand(1, 1, 4, 4))
