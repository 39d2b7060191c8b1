"""Recorded energies equal traced ones, or it is said why not; forces in reduced precision."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from elsewhere import Elsewhere
from programs import HierarchicalVAE, LinearGaussianVAE, TutorialVAE
from pyro.infer import MCMC
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import ConvVAE, compiled, program
from pyro_vae_defence.models.compiled import Recorder, ReducedForce
from pyro_vae_defence.models.perturbation import UnknownRadius
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops import precision
from pyro_vae_defence.ops.balls import Linf


class LayeredVAE(ConvVAE):
    """A decoder that calls its transposed convolutions one by one, as decoders usually do."""

    def observation(self, z):
        output = self.decoder(z[:, :, None, None])
        return dist.Bernoulli(logits=output, validate_args=False).to_event(3)


CASES = {
    "linear": (LinearGaussianVAE, (1, 4, 4), None),
    "hierarchical": (HierarchicalVAE, (1, 4, 4), None),
    "tutorial": (TutorialVAE, (1, 28, 28), None),
    "tutorial-aware": (TutorialVAE, (1, 28, 28), Linf(0.1)),
    "conv": (lambda: ConvVAE(latent_dim=3), (1, 28, 28), None),
    "layers": (lambda: LayeredVAE(latent_dim=3), (1, 28, 28), None),
    "conv-contiguous": (lambda: ConvVAE(latent_dim=3, channels_last=False), (1, 28, 28), None),
    "conv-colour-aware": (lambda: ConvVAE(3, latent_dim=3), (3, 28, 28), Linf(0.1)),
}


def build(name, rows):
    make, shape, ball = CASES[name]
    vae = make()
    if isinstance(vae, nn.Module):
        vae = vae.double().eval()
    return vae, torch.rand(rows, *shape), ball


@pytest.mark.parametrize("name", CASES)
def test_recorded_equals_traced(float64, name):
    vae, x, ball = build(name, 3)
    model = program.target(vae, ball)
    energy = program.ModelPotential(model, x)
    recorder = Recorder()
    recorded = recorder(energy)
    for scale in (0.0, 1.0, 5.0):
        z = {n: scale * torch.randn_like(v) for n, v in energy.prototype.items()}
        value, gradient = recorded.energy_and_gradient(z)
        assert (recorded.captured, recorded.why_not) == (True, None)
        expected, slope = lat.value_and_gradient(energy, z)
        assert torch.allclose(value, expected, rtol=1e-12)
        assert torch.allclose(recorded(z), expected)
        for site in z:
            assert torch.allclose(gradient[site], slope[site], rtol=1e-9, atol=1e-9)
        assert not value.requires_grad
    # Other images of the same shape take the same recording.
    other = program.ModelPotential(model, torch.rand_like(x))
    value, _ = recorder(other).energy_and_gradient(z)
    assert torch.allclose(value, other(z), rtol=1e-12)
    assert len(recorder.recordings) == 1


def test_a_recording_is_bitwise_the_model(float64):
    vae, x, _ = build("layers", 3)
    energy = program.potential(vae, x)
    z = {"z": torch.randn(3, 3)}
    value, gradient = lat.value_and_gradient(energy, z)
    with torch.no_grad():
        got = compiled._capture(compiled._BOTH, energy, z)(x, z["z"])
    assert torch.equal(got[0], value)
    assert torch.equal(got[1], gradient["z"])


def test_constants_elsewhere_are_moved_once(float64):
    """Seen from a GPU, all that a model computes of its tensors on the CPU is a constant."""

    class Shifting(LinearGaussianVAE):
        def _to(self, x):
            weight, bias = super()._to(x)
            return weight, bias + torch.linspace(0.0, 1.0, 16).to(x)

    vae, x = Shifting(), torch.rand(3, 1, 4, 4)
    energy, z = program.potential(vae, x), {"z": torch.randn(3, 3)}
    module = compiled._capture(compiled._BOTH, energy, z)
    before, expected = len(module.graph.nodes), module(x, z["z"])
    compiled._fold(module, x.device)
    assert len(module.graph.nodes) == before
    with Elsewhere():
        there = torch.device("lazy")
        compiled._fold(module, there)
        got = module(x.to(there), z["z"].to(there))
    assert len(module.graph.nodes) < before
    assert all(torch.equal(one.cpu(), other) for one, other in zip(got, expected))
    # Compilers want them there, too, where torch takes a number from the host.
    read = {n.target for n in module.graph.nodes if n.op == "get_attr"}
    assert {getattr(module, name).device for name in read} == {there}
    made = [n for n in module.graph.nodes if n.op == "call_function"]
    assert all(
        any(i.op != "get_attr" for i in n.all_input_nodes) for n in made if n.all_input_nodes
    )


def test_what_is_changed_in_place_is_no_constant(float64):
    class Marking(LinearGaussianVAE):
        def _to(self, x):
            weight, bias = super()._to(x)
            marks = torch.zeros(16)
            marks.view(4, 4)[::2] += bias.mean()
            marks.chunk(2)[1].add_(bias.mean())
            return weight, bias + marks + torch.linspace(0.0, 1.0, 16)

    vae, x = Marking(), torch.rand(3, 1, 4, 4)
    energy, z = program.potential(vae, x), {"z": torch.randn(3, 3)}
    module = compiled._capture(compiled._BOTH, energy, z)
    before, expected = len(module.graph.nodes), module(x, z["z"])
    compiled._fold(module, torch.device("cpu", 0))  # another device by its name alone
    assert len(module.graph.nodes) < before
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(module(x, z["z"]), expected))


class CountOperations(TorchDispatchMode):
    """Names of operations; convolutions' backward passes with what they were asked for."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[10]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("record", [False, True])
def test_a_gradient_is_one_forward_and_one_backward_to_the_latents(record):
    vae, x = LayeredVAE(latent_dim=3).eval(), torch.rand(2, 1, 28, 28)
    energy = program.potential(vae, x)
    z = {"z": torch.randn(2, 3)}
    potential = Recorder()(energy) if record else energy
    kernel = BatchedHMC(potential_fn=potential, num_steps=3, jitter=0.0)
    kernel.setup(0)
    params = kernel.sample(z)
    with CountOperations() as counted:
        kernel.sample(params)
    assert all(mask == [True, False, False] for mask in counted.masks)
    # Five layers and three gradients.
    assert counted.names.count("aten::convolution") == len(counted.masks) == 15
    assert "aten::_local_scalar_dense" not in counted.names
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())


# --- Models that cannot be recorded ---------------------------------------------------------------


def plated(observe):
    def model(x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0]), 1.0))
            observe(z, x)

    return model


def branching(z, x):
    scale = 1.0 if float(z.sum()) > 0 else 2.0
    pyro.sample("obs", dist.Normal(z, scale), obs=x)


def escaping(z, x):
    shift = torch.from_numpy(0.5 * z.detach().numpy())  # unseen by the recording
    pyro.sample("obs", dist.Normal(z + shift, 1.0), obs=x)


@pytest.mark.filterwarnings("ignore:the density of")
@pytest.mark.parametrize(
    ("observe", "reason"),
    [
        (branching, "recording failed"),
        (escaping, "recording failed|differ by more than rounding"),
    ],
)
def test_falls_back_to_tracing_and_says_why(observe, reason):
    x = torch.randn(4)
    energy = program.ModelPotential(plated(observe), x)
    recorded = Recorder()(energy)
    z = {"z": torch.randn(4)}
    torch.manual_seed(1)
    recorded.energy_and_gradient(z)
    assert recorded.captured is False
    assert re.search(reason, recorded.why_not)
    torch.manual_seed(1)
    value, _ = recorded.energy_and_gradient(z)
    torch.manual_seed(1)
    assert torch.equal(value, energy(z))


def test_parameters_changed_in_place_are_seen():
    vae = TutorialVAE().eval()
    energy = program.potential(vae, torch.rand(2, 1, 28, 28))
    recorded = Recorder()(energy)
    z = {"latent": torch.randn(2, 5)}
    recorded.energy_and_gradient(z)
    with torch.no_grad():
        vae.decoder[2].bias += 1.0
    assert torch.allclose(recorded.energy_and_gradient(z)[0], energy(z))


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_a_run_after_training_records_anew(change):
    """Some constants of a recording are computed of parameters, as in ConvVAE's first layers."""
    vae, x, z = ConvVAE(latent_dim=3).eval(), torch.rand(2, 1, 28, 28), {"z": torch.randn(2, 3)}
    recorder = Recorder()
    recorder(program.potential(vae, x)).energy_and_gradient(z)
    with torch.no_grad():
        if change == "in place":
            vae.decoder[0].bias += 1.0
        else:
            vae.decoder[2] = nn.ConvTranspose2d(128, 96, 3)
    pyro.clear_param_store()
    energy = program.potential(vae, x)
    value, gradient = recorder(energy).energy_and_gradient(z)
    expected, slope = lat.value_and_gradient(energy, z)
    assert torch.allclose(value, expected)
    assert torch.allclose(gradient["z"], slope["z"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ball", [Linf(0.1), UnknownRadius(Linf, [0.0, 0.1], [0.0, 1.0])], ids=str)
def test_one_recording_serves_all_micro_batches_and_calls(ball, float64):
    recorder, vae, x = Recorder(), LinearGaussianVAE(), torch.rand(4, 1, 4, 4)
    for perturbation in (ball, dataclasses.replace(ball)):
        defence = MCMCDefence(
            vae,
            num_samples=1,
            warmup_steps=1,
            prepare=recorder,
            perturbation=perturbation,
            batch_size=2,
        )
        defence(x)
    assert len(recorder.recordings) == 1
    for other in (None, Linf(0.2)):
        MCMCDefence(vae, prepare=recorder, perturbation=other, num_samples=1)(x)
    assert len(recorder.recordings) == 3


def test_chains_are_those_of_the_traced_model(linear_vae):
    x, start = torch.rand(5, 1, 4, 4), {"z": torch.randn(5, 3)}
    energy = program.potential(linear_vae, x)
    draws = []
    for potential in (energy, Recorder()(energy)):
        generator = torch.Generator().manual_seed(3)
        kernel = BatchedHMC(potential_fn=potential, generator=generator)
        mcmc = MCMC(kernel, 20, 10, initial_params=start, disable_progbar=True)
        mcmc.run()
        draws.append(mcmc.get_samples()["z"])
    assert torch.allclose(draws[0], draws[1], rtol=1e-9, atol=1e-9)


# --- Forces in reduced precision ------------------------------------------------------------------


def test_reduced_forces_sample_the_exact_posterior():
    """Forces of three digits, energies in full."""
    vae = LinearGaussianVAE()
    x = torch.rand(1, 1, 4, 4).repeat(1000, 1, 1, 1)
    energy = program.potential(vae, x)
    reduced = ReducedForce(energy, torch.bfloat16)
    z = {"z": torch.randn(1000, 3)}
    value, force = reduced.energy_and_gradient(z)
    assert torch.equal(value, energy(z))
    assert torch.equal(force["z"], reduced.force(z)["z"])  # a function of z
    exact = lat.value_and_gradient(energy, z)[1]
    error = (force["z"] - exact["z"]).norm() / exact["z"].norm()
    assert 1e-4 < error < 0.1  # it is reduced
    mean, covariance = vae.exact(x[:1])
    kernel = BatchedHMC(
        potential_fn=reduced, step_size=0.1, num_steps=5, generator=torch.Generator().manual_seed(0)
    )
    mcmc = MCMC(kernel, 1, 40, initial_params=z, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["z"][-1]
    sd = covariance.diagonal().sqrt()
    # Three means and three variances over 1000 chains, 5 standard errors: error rate 4e-6.
    assert ((draws.mean(0) - mean[0]).abs() < 5 * sd / math.sqrt(1000)).all()
    assert ((draws.var(0) / sd.square() - 1).abs() < 5 * math.sqrt(2 / 1000)).all()


def test_only_the_last_energy_of_a_trajectory_is_asked_for():
    energy = program.potential(LinearGaussianVAE(), torch.rand(2, 1, 4, 4))

    class Counting(ReducedForce):
        forces = energies = 0

        def force(self, latents):
            self.forces += 1
            return super().force(latents)

        def energy_and_gradient(self, latents):
            self.energies += 1
            return super().energy_and_gradient(latents)

    counting = Counting(energy, torch.bfloat16)
    kernel = BatchedHMC(potential_fn=counting, num_steps=5, jitter=0.0)
    kernel.setup(0)
    kernel.sample(kernel.sample({"z": torch.zeros(2, 3)}))
    assert (counting.energies, counting.forces) == (3, 11)  # start and two ends; each a force


class Seeing(LinearGaussianVAE):
    """Remembers how torch is set when its model runs."""

    def model(self, x):
        self.seen = precision.tf32_settings()
        super().model(x)


def test_energies_are_full_and_forces_tf32_whatever_torch_is_set_to():
    vae = Seeing()
    energy = program.potential(vae, torch.rand(2, 1, 4, 4))
    z = {"z": torch.randn(2, 3)}
    with precision.tf32(True):
        rounding = precision.tf32_settings()
    with precision.tf32(False):
        full = precision.tf32_settings()
    assert set(rounding).isdisjoint(full)
    reduced = ReducedForce(energy, "tf32")
    for on, set_to in ((True, rounding), (False, full)):
        with precision.tf32(on):
            energy(z)
            assert vae.seen == set_to  # else the test shows nothing
            reduced(z)
            assert vae.seen == full
            reduced.force(z)
            assert vae.seen == rounding
            reduced.energy_and_gradient(z)
            assert precision.tf32_settings() == set_to


def test_settings_come_back_after_an_interrupt():
    def interrupted(x):
        if ready:
            raise KeyboardInterrupt
        LinearGaussianVAE().model(x)

    ready = False
    reduced = ReducedForce(program.ModelPotential(interrupted, torch.rand(2, 1, 4, 4)), "tf32")
    ready, before = True, precision.tf32_settings()
    for ask in (reduced, reduced.force):
        with pytest.raises(KeyboardInterrupt):
            ask({"z": torch.zeros(2, 3)})
        assert precision.tf32_settings() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, "tf32"])
def test_recorded_reduced_forces(dtype):
    vae, x = LayeredVAE(latent_dim=3).eval(), torch.rand(2, 1, 28, 28)
    energy, z = program.potential(vae, x), {"z": torch.randn(2, 3)}
    reduced, recorder = ReducedForce(energy, dtype), Recorder()
    recorded = recorder(reduced)
    value, force = recorded.energy_and_gradient(z)
    assert (recorded.captured, recorded.why_not) == (True, None)
    assert torch.equal(value, energy(z))
    assert torch.equal(force["z"], reduced.force(z)["z"])
    assert torch.equal(recorded.force(z)["z"], force["z"])
    # Forces of another precision are another recording.
    plain = recorder(energy).energy_and_gradient(z)[1]
    assert torch.equal(plain["z"], force["z"]) == (dtype == "tf32")  # a CPU has no TF32
    assert len(recorder.recordings) == 3
    alone = recorded.take(torch.tensor([1]))
    assert torch.allclose(alone.force({"z": z["z"][1:]})["z"], force["z"][1:], rtol=1e-2)


def test_recordings_run_with_the_settings_they_are_for(monkeypatch):
    seen = []
    energy = program.potential(LinearGaussianVAE(), torch.rand(2, 1, 4, 4))
    recorded = Recorder()(ReducedForce(energy, "tf32"))
    z = {"z": torch.zeros(2, 3)}
    recorded.energy_and_gradient(z)
    forward = torch.fx.GraphModule.__call__
    monkeypatch.setattr(
        torch.fx.GraphModule,
        "__call__",
        lambda *args: seen.append(precision.tf32_settings()) or forward(*args),
    )
    recorded.energy_and_gradient(z)
    with precision.tf32(True):
        rounding = precision.tf32_settings()
    assert [settings == rounding for settings in seen] == [False, True]


def test_force_dtype():
    energy = program.potential(LinearGaussianVAE(), torch.rand(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"dtype must be torch.bfloat16 .* torch.float32"):
        ReducedForce(energy, torch.float32)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own dependencies
def test_compiled_recordings_equal_traced_energies():
    vae = TutorialVAE().eval()
    energy = program.potential(vae, torch.rand(3, 1, 28, 28))
    recorded = Recorder(compile=True)(energy)
    z = {"latent": torch.randn(3, 5)}
    value, gradient = recorded.energy_and_gradient(z)
    assert (recorded.captured, recorded.why_not) == (True, None)
    expected, slope = lat.value_and_gradient(energy, z)
    assert torch.allclose(value, expected, rtol=1e-4)
    assert torch.allclose(gradient["latent"], slope["latent"], rtol=1e-3, atol=1e-3)
