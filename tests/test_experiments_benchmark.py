"""The benchmark of the sampler engine: what it counts, when it says stationary, what it writes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pyro_vae_defence.experiments.__main__ import main
from pyro_vae_defence.experiments.benchmark import engines
from pyro_vae_defence.experiments.benchmark.chains import encodings, run
from pyro_vae_defence.experiments.benchmark.config import BenchmarkConfig
from pyro_vae_defence.experiments.benchmark.decoder import layer_flops
from pyro_vae_defence.experiments.benchmark.memory import memory, peak_memory
from pyro_vae_defence.experiments.benchmark.numpyro_engine import Job, Place, energy, serve
from pyro_vae_defence.experiments.benchmark.run import BenchmarkSamplers
from pyro_vae_defence.experiments.benchmark.samplers import SAMPLERS
from pyro_vae_defence.experiments.benchmark.settling import running_means, settled
from pyro_vae_defence.experiments.study import write_pages
from pyro_vae_defence.models import contract, program
from pyro_vae_defence.models.pretrained import load_pretrained

TINY = {
    "radii": (0.1,), "num_images": 10, "num_chains": 2, "samplers": ("hmc", "paper"),
    "max_gradients": 8, "warmup_gradients": 4, "window": 3, "gold_warmup": 20,
    "gold_gradients": 60, "ess_images": 2, "ess_gradients": 30, "timed_gradients": 2,
    "matmul_size": 64, "rows": (1, 2), "repeats": 1, "engine_images": 10,
    "engine_transitions": 2, "engine_warmup": 1, "engine_steps": 2, "engine_tree_depth": 1,
    "one_by_one_images": 1, "memory_images": (), "memory_transitions": 1,
}  # fmt: skip


class TestSettling:
    def test_running_means_are_those_of_a_loop(self):
        generator = np.random.default_rng(0)
        gradients = 1 + np.cumsum(generator.integers(1, 8, 40))
        values = generator.normal(size=(40, 3))
        means = running_means(gradients, values, 10)
        expected = [
            values[(gradients >= g) & (gradients < g + 10)].mean(0)
            for g in gradients
            if g + 10 <= gradients[-1]
        ]
        assert np.allclose(means, expected)

    def test_a_decay_settles_where_its_running_mean_does(self):
        gradients = np.arange(1, 401)
        values = 50 * np.exp(-gradients / 20)
        found = settled(gradients, values, -1, 1, 30)
        means = running_means(gradients, values, 30)
        assert means[found - 1] <= 1 < means[found - 2]

    def test_a_crossing_does_not_count(self):
        gradients = np.arange(1, 401)
        values = np.where(gradients < 200, 10.0, 0.0)
        values[50:100] = 0.0  # long enough for a window to lie inside
        assert running_means(gradients, values, 30)[60] == 0
        assert settled(gradients, values, -1, 1, 30) > 190

    def test_single_draws_may_leave_while_the_mean_stays(self):
        gradients = np.arange(1, 401)
        values = np.where(gradients % 2 == 0, 5.0, -5.0)
        assert settled(gradients, values, -1, 1, 30) == 1

    @pytest.mark.parametrize("arrival", [345, 400])
    def test_the_last_moment_is_no_evidence(self, arrival):
        gradients = np.arange(1, 401)
        assert settled(gradients, np.where(gradients < arrival, 10.0, 0.0), -1, 1, 30) is None

    def test_never_there_not_finite_and_too_short(self):
        gradients = np.arange(1, 401)
        assert settled(gradients, np.full(400, 2.0), -1, 1, 30) is None
        assert settled(gradients, np.full(400, np.nan), -1, 1, 30) is None
        assert settled(gradients[:10], np.zeros(10), -1, 1, 30) is None

    def test_window_must_be_positive(self):
        with pytest.raises(ValueError, match="window must be positive, got 0"):
            settled(np.arange(1, 9), np.zeros(8), -1, 1, 0)


@pytest.fixture(scope="module")
def vae():
    return load_pretrained("mnist_vae")


@pytest.mark.parametrize("name", SAMPLERS)
def test_gradients_are_counted_as_the_decoder_sees_them(name, vae, monkeypatch):
    x = torch.rand(3, *vae.image_shape)
    start, streams = encodings(vae, x, 2, 0)
    backward_passes = 0
    grad = torch.autograd.grad

    def counted(*arguments, **options):
        nonlocal backward_passes
        backward_passes += 1
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    monkeypatch.setattr(contract, "_check_slope", lambda *_: None)  # none of the chain's
    folded = x.repeat(2, 1, 1, 1)
    trace = run(vae, SAMPLERS[name], folded, start, streams, 25, 10, folded, 5)
    assert trace.gradients[-1] == backward_passes >= 25
    assert trace.energy.shape == (len(trace.gradients), 6)
    assert trace.position.shape == (len(trace.gradients), 6, 64)
    assert trace.similarity.shape == (len(trace.similarity_at), 6)
    assert (np.diff(trace.gradients[trace.similarity_at]) >= 5).all()
    last = program.potential(vae, folded)(trace.last).detach().double().numpy()
    assert np.allclose(trace.energy[-1], last, rtol=1e-5)


def test_the_decoder_of_the_jax_engine_is_that_of_torch(vae, monkeypatch):
    jax = pytest.importorskip("jax")
    x = torch.rand(3, *vae.image_shape)
    z = torch.randn(3, 64)
    layers = engines.decoder_layers(vae)
    images = x.permute(0, 2, 3, 1).numpy()
    found = jax.vmap(lambda z, image: energy(layers, z, image))(z.numpy(), images)
    expected = program.potential(vae, x)({"z": z}).detach().numpy()
    assert np.allclose(np.asarray(found), expected, rtol=1e-5)


def test_a_wrong_decoder_in_jax_is_an_error(vae):
    class Wrong:
        def send(self, request):
            assert request == "energy"

        def recv(self):
            return np.zeros(3), np.zeros((3, 64))

    with pytest.raises(ValueError, match="decoders in torch and JAX disagree"):
        engines.same_decoder(vae, torch.rand(3, 1, 28, 28), torch.randn(3, 64), Wrong())


def test_numpyro_runs_what_it_is_asked(vae, monkeypatch):
    pytest.importorskip("numpyro")
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None)  # it is this process here
    for name in ("JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "")  # so that it is taken back

    class Connection:
        def __init__(self, requests):
            self.requests, self.answers = requests, []
            self.send = self.answers.append

        def recv(self):
            return self.requests.pop(0)

    job = Job("HMC", 0, 5, 2, 0.02, 0)
    wrong = job._replace(algorithm="neither")
    connection = Connection([job, wrong, job, None])
    x, z = np.full((2, 28, 28, 1), 0.5, np.float32), np.zeros((2, 64), np.float32)
    metric = vae.mean_posterior_variance["z"].numpy()
    serve(connection, Place("cpu", 0, 1), engines.decoder_layers(vae), metric, x, z)
    versions, first, failed, second = connection.answers
    assert set(versions["versions"]) == {"jax", "numpyro"}
    assert first["gradients"] == first["batch_gradients"] == 1 + 5 * 2
    assert first["finite"]
    assert 0.5 < first["acceptance_rate"] <= 1
    assert failed.keys() == {"error"}
    assert second["compile_seconds"] == first["compile_seconds"]


class Pipe:
    """An end of a pipe with one answer, or none."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def poll(self, limit):
        return bool(self.answers)

    def recv(self):
        if isinstance(self.answers[0], Exception):
            raise self.answers[0]
        return self.answers[0]


@pytest.mark.parametrize(
    ("pipe", "message"),
    [
        (Pipe(), "NumPyro did not answer within 3 seconds"),
        (Pipe(EOFError()), "the process that runs NumPyro has ended"),
        (Pipe({"error": "RuntimeError: no GPU"}), "NumPyro failed: RuntimeError: no GPU"),
    ],
)
def test_a_worker_without_an_answer_is_an_error(pipe, message):
    with pytest.raises(RuntimeError, match=message):
        engines.Worker(pipe, 3.0).recv()


@pytest.mark.parametrize("name", ["samplers", "attacks"])
def test_other_devices_are_refused(name, capsys, tmp_path):
    arguments = ["benchmark", name, "--device", "meta", "--output", str(tmp_path)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"device='meta': `benchmark {name}` measures a CPU" in error
    assert error.count("\n") == 1


def test_operations_of_the_layers_are_those_torch_counts(vae):
    z = torch.randn(3, 64, 1, 1, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(vae.decoder(1.0 * z).sum(), z)
    assert counter.get_total_flops() == 3 * layer_flops(vae)


def test_results_tables_and_resumption(tmp_path, monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    first = BenchmarkSamplers("samplers", tmp_path, overrides=TINY, progress=False).run()
    sections = {name: entry["results"] for name, entry in first["sections"].items()}
    assert list(sections) == [
        "decoder", "seconds_per_gradient", "engines", "memory", "chains 0.1"
    ]  # fmt: skip
    # Only the latents are differentiated: gradients of weights would add half as much again.
    for entry in sections["decoder"]["rows"]:
        assert entry["flops_per_row"] < 1.2 * sections["decoder"]["flops_per_row_as_written"]
        assert 0 < entry["share_of_matmul_rate"] < 10
    assert set(sections["seconds_per_gradient"]) == {"hmc", "paper"}
    assert sections["engines"]["numpyro"] == engines.NO_NUMPYRO
    found = sections["engines"]["engines"]
    assert set(found) == {"hmc", "nuts", "pyro_hmc", "pyro_nuts"}
    assert found["hmc"]["gradients"] == 1 + 2 * 2
    chains = sections["chains 0.1"]
    assert set(chains["samplers"]) == {"hmc", "paper"}
    assert chains["gold"]["rhat_energy"]["max"] > 1
    paper = chains["samplers"]["paper"]
    assert paper["budget"] == 1 + 20 * 4
    assert paper["trajectory"][0][0] == 1
    assert paper["ess"]["energy_per_gradient"] > 0

    path = tmp_path / "samplers.json"
    written = path.stat().st_mtime_ns
    assert json.loads(path.read_text()) == first
    again = BenchmarkSamplers("samplers", tmp_path, overrides=TINY, progress=False).run()
    assert again["sections"] == first["sections"]
    assert path.stat().st_mtime_ns == written
    # One section less: that one alone is run again.
    first["sections"].pop("seconds_per_gradient")
    path.write_text(json.dumps(first))
    again = BenchmarkSamplers("samplers", tmp_path, overrides=TINY, progress=False).run()
    assert set(again["sections"]) == set(sections)
    assert again["sections"]["decoder"] == first["sections"]["decoder"]
    with pytest.raises(ValueError, match="belongs to another run"):
        BenchmarkSamplers("samplers", tmp_path, overrides={**TINY, "seed": 1}, progress=False).run()

    (tables,) = write_pages({"benchmark_samplers": BenchmarkSamplers}, tmp_path)
    text = tables.read_text()
    assert engines.NO_NUMPYRO in text
    assert SAMPLERS["paper"].label in text
    assert "15,001 gradients" in text
    assert f"{chains['gold']['energy']:.2f}" in text
    assert f"{100 * sections['decoder']['rows'][1]['share_of_matmul_rate']:.0f}%" in text


@pytest.mark.slow
def test_memory_of_a_fresh_process():
    config = BenchmarkConfig(
        "mnist_vae", memory_images=(6,), memory_batch_size=3, memory_transitions=1
    )
    ballast = torch.ones(2**28)  # 1 GiB, which a child must not inherit
    found = memory(None, config, lambda text: None)["measured"]
    assert found[0]["images"] == 6
    assert 50 < found[0]["idle_mib"] <= found[0]["peak_mib"] < 1024
    assert peak_memory() > ballast.numel() * 4 / 2**20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sampler"], "no benchmark named 'sampler'; choose one of samplers"),
        (["samplers", "--set", "samplers=('hmc', 'x')"], "unknown samplers ['x']; choose from"),
        (["samplers", "--set", "radii=0.1"], "radii must be a tuple"),
        (["samplers", "--set", "engine_warmup=30"], "engine_warmup must lie in 0..11"),
        (["samplers", "--set", "warmup_gradients=300"], "warmup_gradients must lie between"),
        (["samplers", "--models", "/nowhere"], "no pretrained model"),
    ],
)
def test_command_line_mistakes(arguments, message, capsys, tmp_path):
    assert main(["benchmark", *arguments, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_command_writes_the_table(monkeypatch, tmp_path, capsys):
    def measured(self):
        assert (self.name, self.overrides, self.progress) == ("samplers", {"seed": 1}, False)
        result = {
            "study": "benchmark_samplers",
            "config": {"model": "m", "dataset": "d", "seed": 1},
            "command": "python",
            "provenance": {"commit": "c", "torch": "t", "threads": 1, "machine": "x"},
            "sections": {},
        }
        (tmp_path / "samplers.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(BenchmarkSamplers, "run", measured)
    arguments = ["samplers", "--set", "seed=1", "--quiet", "--output", str(tmp_path)]
    assert main(["benchmark", *arguments]) == 0
    assert (tmp_path / "tables.md").read_text() in capsys.readouterr().out
