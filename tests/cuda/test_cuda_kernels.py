"""Every kernel walks the same chains on both devices."""

from __future__ import annotations

import functools

import pyro
import pytest
import torch
from devices import agree, to
from kernels import FACTORIES, KERNELS, UNCOUPLED
from programs import HierarchicalVAE, TutorialVAE
from pyro.infer import MCMC

from pyro_vae_defence.defence import ConvergenceRule, MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.compiled import Recorder
from pyro_vae_defence.models.perturbation import UnknownRadius
from pyro_vae_defence.models.program import ModelPotential
from pyro_vae_defence.ops.balls import L1, L2, Linf

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("float64")]

# Chains multiply rounding, tenfold per transition at first.
CHAIN = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def x():
    return torch.rand(4, 1, 28, 28)


def defend(device, vae, x, kernel, **options):
    options = {"num_samples": 3, "warmup_steps": 4, **options}
    defence = MCMCDefence(to(vae, device), kernel, **options)
    return defence(x.to(device), torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FACTORIES)
def test_defended_latents(device, name, x):
    vae = TutorialVAE().eval()
    run = functools.partial(defend, vae=vae, x=x, kernel=FACTORIES[name], num_chains=2)
    agree(run, device, **CHAIN)


@pytest.mark.parametrize("name", KERNELS)
def test_convolutions(device, name, x):
    vae = ConvVAE().eval()
    short = {"num_samples": 1, "warmup_steps": 1}
    run = functools.partial(defend, vae=vae, x=x[:2], kernel=FACTORIES[name], **short)
    agree(run, device, **CHAIN)


@pytest.mark.parametrize("name", KERNELS)
def test_latents_on_an_interval_and_nested_plates(device, name):
    x = torch.rand(3, 1, 4, 4)
    run = functools.partial(defend, vae=HierarchicalVAE(), x=x, kernel=FACTORIES[name])
    agree(run, device, **CHAIN)


@pytest.mark.parametrize("prepare", ["graph", "recorder"])
@pytest.mark.parametrize("name", UNCOUPLED)
def test_prepared_chains_are_the_chains(device, name, prepare, x):
    if device.type == "lazy":
        pytest.skip("a recording needs tensors of torch's own")
    vae = TutorialVAE().eval()
    plain, fast = (
        defend(device, vae, x, FACTORIES[name], num_chains=2, prepare=how)
        for how in (None, "graph" if prepare == "graph" else Recorder())
    )
    for site, draws in plain.samples.items():
        torch.testing.assert_close(fast.samples[site], draws, **CHAIN)
    if device.type == "cuda" and not (prepare == "graph" and name == "nuts"):
        assert "prepare_why_not" not in fast.settings, fast.settings["prepare_why_not"]


OPTIONS = {
    "mean": {"initial": "mean"},
    "prior": {"initial": "prior"},
    "mode": {"initial": "mode", "mode_steps": 3},
    "annealed": {"initial": "annealed", "num_temperatures": 4},
    "linf": {"perturbation": Linf(0.1)},
    "l2": {"perturbation": L2(1.0)},
    "l1": {"perturbation": L1(3.0)},
    "unknown radius": {"perturbation": UnknownRadius(Linf, (0.0, 0.1, 0.2), (0.0, 1.0, 2.0))},
    "bounded": {"max_gradients": 40},
    "kept": {"keep_draws": 1},
    "converged": {
        "num_chains": 4, "num_samples": 20, "until_converged": ConvergenceRule(check_every=10),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_defence(device, name, x):
    kernel = functools.partial(BatchedHMC, num_steps=3)
    run = functools.partial(defend, vae=TutorialVAE().eval(), x=x, kernel=kernel, **OPTIONS[name])
    agree(run, device, **CHAIN)


def test_a_metric_per_image(device, x):
    vae = TutorialVAE().eval()

    def run(place):
        metric = {"latent": torch.linspace(0.5, 2.0, 20).reshape(4, 5).to(place)}
        kernel = functools.partial(BatchedHMC, num_steps=3, inverse_mass_matrix=metric)
        return defend(place, vae, x, kernel)

    agree(run, device, **CHAIN)


@pytest.mark.parametrize("name", KERNELS)
def test_under_pyros_mcmc(device, name, x):
    vae = TutorialVAE().eval()

    def run(place):
        generator = torch.Generator().manual_seed(3)
        kernel = FACTORIES[name](to(vae, place).model, generator=generator)
        potential = ModelPotential(to(vae, place).model, x.to(place))
        start = {site: torch.zeros_like(v) for site, v in potential.prototype.items()}
        mcmc = MCMC(kernel, 2, 2, initial_params=start, disable_progbar=True)
        mcmc.run(x.to(place))
        return mcmc.get_samples(), kernel.diagnostics()

    agree(run, device, **CHAIN)


@pytest.mark.parametrize("name", UNCOUPLED)
def test_results_do_not_depend_on_the_batch_size(device, name, x):
    vae = to(TutorialVAE().eval(), device)

    def run(batch_size):
        kernel = FACTORIES[name]
        return defend(device, vae, x, kernel, num_chains=2, batch_size=batch_size)

    whole, parts = run(4096), run(3)
    for site, draws in whole.samples.items():
        torch.testing.assert_close(parts.samples[site], draws, **CHAIN)
    torch.testing.assert_close(parts.sample_stats["lp"], whole.sample_stats["lp"], **CHAIN)


@pytest.mark.parametrize("kernel", [pyro.infer.HMC, pyro.infer.NUTS])
def test_stock_kernels_run(device, kernel, x):
    kernel = functools.partial(kernel, step_size=0.05)
    result = defend(device, TutorialVAE().eval(), x[:2], kernel, num_samples=2, warmup_steps=1)
    assert result.latents["latent"].device.type == device.type
    assert result.latents["latent"].isfinite().all()
