"""The kernels as Pyro sees them: contract with MCMC, errors that teach, no stop of the device."""

from __future__ import annotations

import inspect
import json
import math

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from kernels import EXACT, FACTORIES, KERNELS, UNCOUPLED
from programs import HierarchicalVAE, LinearGaussianVAE
from pyro.infer import MCMC
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae_defence import diagnostics
from pyro_vae_defence.mcmc import (
    BatchedGHMC,
    BatchedHMC,
    BatchedMALA,
    BatchedMAMS,
    BatchedNUTS,
    BatchedULA,
)
from pyro_vae_defence.mcmc.kernels import BatchedKernel, KernelOptions
from pyro_vae_defence.ops.streams import Streams

each_kernel = pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)


def gaussian(latents):
    return 0.5 * latents["z"].square().sum(-1)


def run(kernel, *args, start=None, num_samples=4, warmup_steps=3):
    mcmc = MCMC(kernel, num_samples, warmup_steps, initial_params=start, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


# --- Contract with pyro.infer.MCMC ----------------------------------------------------------------


@each_kernel
def test_shapes_dtypes_and_supports(make):
    x = torch.rand(5, 1, 4, 4)
    kernel = make(HierarchicalVAE().model)
    assert isinstance(kernel, MCMCKernel)
    mcmc = run(kernel, x)
    draws = mcmc.get_samples()
    shapes = {name: tuple(value.shape) for name, value in draws.items()}
    assert shapes == {"top": (4, 5, 1, 2), "rate": (4, 5, 1), "low": (4, 5, 3)}
    assert all(value.dtype == torch.float32 for value in draws.values())
    assert (draws["rate"] > 0).all()
    assert mcmc.get_samples(group_by_chain=True)["top"].shape == (1, 4, 5, 1, 2)


@each_kernel
def test_double_precision_follows_from_the_input(make):
    kernel = make(potential_fn=gaussian)
    draws = run(kernel, start={"z": torch.randn(5, 3, dtype=torch.float64)}).get_samples()
    assert draws["z"].dtype == torch.float64
    assert kernel.info.step_size.dtype == kernel.state.energy.dtype == torch.float64


@each_kernel
def test_constrained_sites_of_every_common_support(make):
    def model(x):
        ones = x.new_ones(x.shape[0])
        with pyro.plate("data", x.shape[0]):
            pyro.sample("positive", dist.LogNormal(0 * ones, ones))
            pyro.sample("unit", dist.Beta(2 * ones, 3 * ones))
            pyro.sample("simplex", dist.Dirichlet(x.new_ones(x.shape[0], 3) * 2))
            z = pyro.sample("real", dist.Normal(0 * ones, ones))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

    draws = run(make(model), torch.randn(6)).get_samples()
    assert (draws["positive"] > 0).all()
    assert ((draws["unit"] > 0) & (draws["unit"] < 1)).all()
    assert draws["simplex"].shape == (4, 6, 3)
    assert torch.allclose(draws["simplex"].sum(-1), torch.ones(4, 6), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FACTORIES if name != "burn-in"])
def test_chains_start_at_initial_params(name):
    """At a step size next to nothing a chain stays at its start, on the unconstrained scale."""
    make = FACTORIES[name]
    x = torch.rand(5, 1, 4, 4)
    start = {"top": torch.randn(5, 1, 2), "rate": torch.randn(5, 1), "low": torch.randn(5, 3)}
    kernel = make(HierarchicalVAE().model, step_size=1e-7)
    draws = run(kernel, x, start=start, num_samples=1, warmup_steps=0).get_samples()
    assert torch.allclose(draws["top"][0], start["top"], atol=1e-4)
    assert torch.allclose(draws["rate"][0], start["rate"].exp(), atol=1e-4)


def test_default_start_is_a_draw_from_the_prior():
    vae = LinearGaussianVAE()
    kernel = BatchedHMC(vae.model)
    kernel.setup(0, torch.zeros(2000, 1, 4, 4))
    z = kernel.initial_params["z"]
    # Means of 2000 and variances: 5 standard errors each, an error rate of 4e-6.
    assert z.mean(0).abs().max() < 5 / math.sqrt(2000)
    assert (z.var(0) - 1).abs().max() < 5 * math.sqrt(2 / 2000)


@each_kernel
def test_diagnostics_and_summary(make, capsys):
    kernel = make(potential_fn=gaussian)
    mcmc = run(kernel, start={"z": torch.randn(5, 3)}, num_samples=6, warmup_steps=0)
    own = mcmc.diagnostics()
    acceptance, divergences = (
        own[name]["chain 0"] for name in ("acceptance rate", "divergences per image")
    )
    assert acceptance.shape == divergences.shape == (5,)
    assert ((acceptance > 0.5) & (acceptance <= 1)).all()
    assert (divergences == 0).all()
    assert own["z"]["n_eff"].shape == (5, 3)
    mcmc.summary()
    assert "Number of divergences: 0" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_stays_where_everything_else_is_forbidden(name, value, float64):
    """Infinite, NaN and minus infinite energies are divergences, not places to go."""

    def lonely(latents):
        z = latents["z"]
        return torch.where(z.eq(0).all(-1), 0.0, value) + 0.0 * z.sum(-1)

    kernel = FACTORIES[name](potential_fn=lonely, step_size=0.3)
    z = kernel.sample({"z": torch.zeros(6, 2)})["z"]
    assert kernel.info.diverging.all()
    assert not kernel.info.accepted.any()
    assert (kernel.info.offset == 0).all()
    assert (kernel.info.acceptance_rate == 0).all()
    assert (z == 0).all()
    assert kernel.state.energy.isfinite().all()
    assert kernel.info.energy.isfinite().all()


def test_divergences_are_counted_after_warm_up_only(capsys):
    def cliff(latents):  # finite at 0 only: every proposal diverges
        z = latents["z"]
        return torch.where(z.eq(0).all(-1), 0.0, math.inf) + 0.0 * z.sum(-1)

    kernel = BatchedHMC(potential_fn=cliff)
    draws = run(kernel, start={"z": torch.zeros(3, 2)}, num_samples=4, warmup_steps=5)
    assert (draws.get_samples()["z"] == 0).all()
    assert kernel.diagnostics()["divergences per image"].tolist() == [4, 4, 4]
    assert kernel.diagnostics()["acceptance rate"].tolist() == [0.0, 0.0, 0.0]
    # One entry for each divergence, which Pyro's summary counts.
    assert kernel.diagnostics()["divergences"] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    draws.summary()
    assert "Number of divergences: 12" in capsys.readouterr().out


@each_kernel
def test_arviz_reads_a_run(make):
    vae, x = LinearGaussianVAE(), torch.rand(3, 1, 4, 4)
    mcmc = MCMC(make(vae.model), num_samples=6, warmup_steps=2, disable_progbar=True)
    mcmc.run(x)
    tree = diagnostics.to_datatree(mcmc.get_samples(group_by_chain=True))
    found = diagnostics.to_arviz(tree)["posterior"]["z"]
    assert found.dims == ("chain", "draw", "image", "latent")
    assert found.shape == (1, 6, 3, 3)
    np.testing.assert_array_equal(found[0], mcmc.get_samples()["z"])
    assert arviz.summary(diagnostics.to_arviz(tree), kind="stats").shape[0] == 9
    if hasattr(arviz, "from_pyro"):  # until 1.0
        found = arviz.from_pyro(mcmc, log_likelihood=False)
        np.testing.assert_array_equal(found.posterior["z"][0], mcmc.get_samples()["z"])
        assert found.posterior["z"].shape == (1, 6, 3, 3)
        np.testing.assert_array_equal(found.observed_data["obs"], x)
        assert found.sample_stats["diverging"].shape == (1, 6)


def test_pyro_is_told_the_draws_at_which_an_image_diverged():
    def diverged(mcmc):
        """Which draws, as ArviZ reads it from a run of Pyro while it does."""
        marked = [draw in mcmc.diagnostics()["divergences"]["chain 0"] for draw in range(4)]
        if hasattr(arviz, "from_pyro"):  # until 1.0
            assert arviz.from_pyro(mcmc).sample_stats["diverging"].values.tolist() == [marked]
        return marked

    kernel = BatchedHMC(potential_fn=gaussian)
    mcmc = run(kernel, start={"z": torch.randn(3, 2)}, num_samples=4, warmup_steps=2)
    assert diverged(mcmc) == [False] * 4

    def cliff(latents):  # finite at 0 and, for the first image, everywhere
        z = latents["z"]
        z = torch.where(torch.arange(3)[:, None] == 0, 0.0, z)
        return torch.where(z.eq(0).all(-1), 0.0, math.inf) + 0.0 * z.sum(-1)

    kernel = BatchedHMC(potential_fn=cliff)
    mcmc = run(kernel, start={"z": torch.zeros(3, 2)}, num_samples=4, warmup_steps=5)
    assert diverged(mcmc) == [True] * 4
    assert kernel.diagnostics()["divergences per image"].tolist() == [0, 4, 4]


@each_kernel
def test_logging_is_json(make):
    kernel = make(potential_fn=gaussian)
    assert kernel.logging() == {}
    assert kernel.diagnostics() == {}
    run(kernel, start={"z": torch.randn(5, 3)})
    logged = json.loads(json.dumps(kernel.logging()))
    assert logged.keys() == {"step size", "acc. prob"}
    assert 0 <= float(logged["acc. prob"]) <= 1


@each_kernel
def test_state_holds_the_energy_and_gradient_of_its_position(make):
    """The last draw is the last state, and what the state reuses is what would be computed anew."""
    vae, x = LinearGaussianVAE(), torch.rand(5, 1, 4, 4).double()
    kernel = make(vae.model)
    last = run(kernel, x).get_samples()["z"][-1]
    z = kernel.state.position["z"].clone().requires_grad_()
    assert torch.equal(last, z)
    energy = kernel.potential({"z": z})
    assert torch.allclose(kernel.state.energy, energy)
    assert torch.allclose(kernel.state.gradient["z"], torch.autograd.grad(energy.sum(), z)[0])
    assert not kernel.state.energy.requires_grad


@each_kernel
def test_save_params_selects_sites(make):
    x = torch.rand(5, 1, 4, 4)
    mcmc = MCMC(make(HierarchicalVAE().model), 3, 2, save_params=["rate"], disable_progbar=True)
    mcmc.run(x)
    assert set(mcmc.get_samples()) == {"rate"}


# --- Arguments and budgets ------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_arguments_come_in_one_order(name):
    """Model, potential, then a kernel's own by keyword, then those of all kernels."""
    first, second, *own, options = inspect.signature(KERNELS[name].kind).parameters.values()
    assert (first.name, second.name) == ("model", "potential_fn")
    assert {parameter.kind for parameter in own} <= {inspect.Parameter.KEYWORD_ONLY}
    shared = inspect.signature(BatchedKernel).parameters.keys() - {"model", "potential_fn"}
    assert shared == KernelOptions.__annotations__.keys()
    if options.kind is inspect.Parameter.VAR_KEYWORD:
        assert not shared & {parameter.name for parameter in own}
    else:  # a kernel without arguments of its own has the base's
        assert {parameter.name for parameter in [*own, options]} == shared
    with pytest.raises(TypeError, match="stepsize"):
        KERNELS[name].kind(potential_fn=gaussian, stepsize=0.1)
    with pytest.raises(TypeError, match="positional"):
        KERNELS[name].kind(None, gaussian, 0.1)


@each_kernel
def test_no_transition_takes_more_gradients_than_announced(make):
    kernel = make(potential_fn=gaussian)
    kernel.streams = Streams.create(5, seed=3)
    params = {"z": torch.randn(5, 3)}
    for step in range(6):
        params = kernel.sample(params)
        most = kernel.gradients_of(3, step)
        assert (kernel.info.num_steps <= most).all()
        assert isinstance(kernel, BatchedNUTS) or (kernel.info.num_steps == most).all()


# What becomes of the metric is the same for all kernels.
@pytest.mark.parametrize(
    ("rows_of_metric", "name"), [(1, "hmc"), *((6, name) for name in UNCOUPLED)]
)
def test_chains_that_stay_move_as_they_would_have_moved(name, rows_of_metric, linear_vae):
    x, metric = torch.rand(6, 1, 4, 4), {"z": torch.linspace(0.5, 2, 3 * rows_of_metric)}
    metric = {"z": 0.01 * metric["z"].reshape(rows_of_metric, 3)}
    rows = torch.tensor([4, 1])

    def moved(leave):
        kernel = FACTORIES[name](linear_vae.model, inverse_mass_matrix=metric)
        kernel.streams = Streams.create(6, seed=2)
        kernel.setup(4, x)
        params = {"z": torch.linspace(-1, 1, 18).reshape(6, 3)}
        for step in range(8):
            params = kernel.sample(params)
            if step == 2 and leave:
                kernel.keep(rows)
                params = kernel.state.position
        return params["z"], kernel

    (stayed, kernel), (whole, other) = moved(True), moved(False)
    assert torch.allclose(stayed, whole[rows], rtol=1e-9)
    assert torch.allclose(kernel.info.step_size, other.info.step_size[rows], rtol=1e-9)
    found, expected = kernel.diagnostics(), other.diagnostics()
    assert found.pop("divergences") == expected.pop("divergences") == []
    for entry, value in found.items():
        assert torch.allclose(value, expected[entry][rows], rtol=1e-9)
    # A run of its own has all rows again.
    kernel.streams = None
    assert run(kernel, x).get_samples()["z"].shape == (4, 6, 3)


def test_chains_leave_a_run_that_has_begun():
    kernel = BatchedHMC(LinearGaussianVAE().model)
    kernel.setup(0, torch.rand(2, 1, 4, 4))
    with pytest.raises(RuntimeError, match="call sample"):
        kernel.keep(torch.tensor([0]))


# --- Seeds and repeated runs ----------------------------------------------------------------------


@each_kernel
def test_same_seed_same_chains(make):
    start = {"z": torch.randn(5, 3)}

    def draws(seed):
        torch.manual_seed(seed)
        return run(make(potential_fn=gaussian), start=start).get_samples()["z"]

    first = draws(1)
    assert torch.equal(first, draws(1))
    assert (first[-1] != draws(2)[-1]).any(-1).all()


@each_kernel
def test_generator_argument(make):
    """A generator decides the run alone; torch's global seed is neither read nor moved."""
    start = {"z": torch.randn(5, 3)}

    def draws(seed):
        kernel = make(potential_fn=gaussian, generator=torch.Generator().manual_seed(seed))
        return run(kernel, start=start).get_samples()["z"]

    before = torch.get_rng_state()
    first = draws(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(first, draws(1))
    assert (first[-1] != draws(2)[-1]).any(-1).all()


@each_kernel
def test_two_runs_of_one_kernel_are_independent(make):
    """Nothing of a run enters the next, on other images and of another number."""
    vae = LinearGaussianVAE()
    kernel = make(vae.model, step_size=0.05)
    x, other = torch.rand(5, 1, 4, 4), 9.0 * torch.rand(3, 1, 4, 4)
    start = {"z": torch.zeros(5, 3)}
    torch.manual_seed(1)
    first = run(kernel, x, start=start).get_samples()["z"]
    step_size = kernel.info.step_size
    again = run(kernel, x, start=start).get_samples()["z"]
    assert (first[-1] != again[-1]).any(-1).all()
    assert run(kernel, other).get_samples()["z"].shape == (4, 3, 3)
    torch.manual_seed(1)
    assert torch.equal(run(kernel, x, start=start).get_samples()["z"], first)
    assert torch.equal(kernel.info.step_size, step_size)


@each_kernel
def test_no_two_uses_share_noise(make, used_noise):
    """With many sites too, every purpose of a transition is its own, and none is the guide's."""
    kernel = make(potential_fn=lambda latents: sum(v.square().sum(-1) for v in latents.values()))
    start = {f"z{number}": torch.randn(1, 1) for number in range(96)}
    kernel.setup(0)
    kernel.sample(kernel.sample(start))
    assert len(set(used_noise)) == len(used_noise)
    assert max(purpose for _, purpose in used_noise) < 2048  # where those of the guide begin


def test_persistent_momentum_is_drawn_anew_for_a_run():
    """The momentum belongs to the state: it starts from N(0, M), and goes on only within a run."""
    kernel = BatchedGHMC(
        potential_fn=gaussian, inverse_mass_matrix={"z": torch.tensor([4.0])}, step_size=1e-6
    )
    kernel.setup(0)
    kernel.sample({"z": torch.zeros(4000, 1)})
    # 4000 draws of variance 1/4: 5 standard errors of a variance, an error rate of 6e-7.
    variance = kernel.state.momentum["z"].var()
    assert abs(float(variance) - 0.25) < 5 * 0.25 * math.sqrt(2 / 4000)
    before = kernel.state.momentum["z"]
    kernel.sample(kernel.state.position)
    after = kernel.state.momentum["z"]
    # Persistence 0.8 is the correlation of consecutive momenta; its standard error is 0.006.
    correlation = torch.corrcoef(torch.stack([before[:, 0], after[:, 0]]))[0, 1]
    assert abs(float(correlation) - 0.8) < 0.03


def test_one_dimension_is_too_few_for_microcanonical_dynamics():
    with pytest.raises(ValueError, match="MAMS needs at least 2 latent dimensions"):
        run(BatchedMAMS(potential_fn=gaussian), start={"z": torch.randn(5, 1)})
    with pytest.raises(ValueError, match="burn_in > 0 needs at least 2 latent dimensions"):
        run(BatchedHMC(potential_fn=gaussian, burn_in=5), start={"z": torch.randn(5, 1)})


def test_images_of_a_batch_do_not_share_noise():
    start = {"z": torch.zeros(4, 3)}
    draws = run(BatchedHMC(potential_fn=gaussian), start=start).get_samples()["z"][-1]
    assert torch.unique(draws, dim=0).shape[0] == 4


# --- Errors that teach ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (BatchedHMC, {"step_size": 0.0}, "step_size must be a positive finite number, got 0.0"),
        (BatchedHMC, {"preset": "paper", "num_steps": 5}, "preset 'paper' has its own num_steps"),
        (BatchedHMC, {"preset": "paper", "adapt_step_size": False}, "preset 'paper' has its own"),
        (BatchedHMC, {"step_size": -1.0}, "step_size must be a positive"),
        (BatchedHMC, {"step_size": math.nan}, "step_size must be a positive"),
        (BatchedNUTS, {"step_size": math.inf}, "step_size must be a positive finite"),
        (BatchedHMC, {"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        (BatchedHMC, {"num_steps": 2.5}, "num_steps must be an integer"),
        (BatchedHMC, {"jitter": -0.1}, r"jitter must lie in \[0, 1\], got -0.1"),
        (BatchedHMC, {"jitter": 1.1}, r"jitter must lie in \[0, 1\], got 1.1"),
        (BatchedHMC, {"target_accept_prob": 0.0}, r"target_accept_prob must lie in \(0, 1\)"),
        (BatchedHMC, {"target_accept_prob": 1.0}, r"target_accept_prob must lie in \(0, 1\)"),
        (BatchedNUTS, {"target_accept_prob": 1.5}, r"target_accept_prob must lie in \(0, 1\)"),
        (
            BatchedHMC,
            {"target_accept_prob": 0.0, "preset": "paper"},
            r"target_accept_prob must lie in \(0, 1\)",
        ),
        (
            BatchedHMC,
            {"target_accept_prob": 2.0, "adapt_step_size": False},
            r"target_accept_prob must lie in \(0, 1\)",
        ),
        (BatchedNUTS, {"max_tree_depth": 0}, "max_tree_depth must be an integer in 1..20, got 0"),
        (BatchedNUTS, {"max_tree_depth": 21}, "max_tree_depth must be an integer in 1..20"),
        (BatchedMALA, {"target_accept_prob": 1.0}, r"target_accept_prob must lie in \(0, 1\)"),
        (BatchedULA, {"step_size": 0.0}, "step_size must be a positive finite number, got 0.0"),
        (BatchedGHMC, {"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        (BatchedGHMC, {"persistence": 1.0}, r"persistence must lie in \[0, 1\), got 1.0"),
        (BatchedGHMC, {"persistence": -0.1}, r"persistence must lie in \[0, 1\), got -0.1"),
        (BatchedMAMS, {"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        (BatchedMAMS, {"jitter": 2.0}, r"jitter must lie in \[0, 1\], got 2.0"),
        (BatchedHMC, {"burn_in": -1}, "burn_in must be an integer of at least 0, got -1"),
        (BatchedNUTS, {"burn_in": 2.5}, "burn_in must be an integer of at least 0, got 2.5"),
        (BatchedHMC, {"preset": "papper"}, "preset must be 'paper' or None, got 'papper'"),
        (
            BatchedHMC,
            {"inverse_mass_matrix": {"z": torch.tensor([1.0, 0.0])}},
            r"inverse_mass_matrix\['z'\] must be positive and finite",
        ),
        (
            BatchedNUTS,
            {"inverse_mass_matrix": {"z": torch.tensor([1.0, math.inf])}},
            r"inverse_mass_matrix\['z'\] must be positive and finite",
        ),
    ],
)
def test_arguments_out_of_range(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(potential_fn=gaussian, **options)


@each_kernel
def test_exactly_one_of_model_and_potential(make):
    with pytest.raises(ValueError, match="exactly one of model and potential_fn"):
        make()
    with pytest.raises(ValueError, match="exactly one of model and potential_fn"):
        make(LinearGaussianVAE().model, gaussian)
    with pytest.raises(ValueError, match="model must be callable, got str"):
        make("model")


@each_kernel
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ({"w": torch.ones(3)}, r"inverse_mass_matrix must have the model's sites \['z'\]"),
        ({"z": torch.ones(3), "w": torch.ones(3)}, r"must have the model's sites \['z'\]"),
        ({"z": torch.ones(4)}, r"inverse_mass_matrix\['z'\] of shape \(4,\) must broadcast to"),
        ({"z": torch.ones(2, 1, 3)}, r"of shape \(2, 1, 3\) must broadcast to .* \(5, 3\)"),
    ],
)
def test_inverse_mass_matrix_that_does_not_fit(make, matrix, message):
    kernel = make(potential_fn=gaussian, inverse_mass_matrix=matrix)
    with pytest.raises(ValueError, match=message):
        run(kernel, start={"z": torch.randn(5, 3)})


@each_kernel
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_non_finite_starting_energy(make, value):
    def broken(latents):
        energy = gaussian(latents)
        return torch.where(torch.arange(5) == 3, value, energy)

    message = r"starting energy is not finite for 1 of 5 rows \(first rows: \[3\]\)"
    with pytest.raises(ValueError, match=message):
        run(make(potential_fn=broken), start={"z": torch.randn(5, 3)})


@each_kernel
def test_wrong_shapes_and_sites(make):
    vae, x = LinearGaussianVAE(), torch.rand(5, 1, 4, 4)
    with pytest.raises(ValueError, match=r"latents\['z'\] must have shape \(5, 3\)"):
        run(make(vae.model), x, start={"z": torch.randn(4, 3)})
    with pytest.raises(ValueError, match=r"must have the model's sites \['z'\], got \['y'\]"):
        run(make(vae.model), x, start={"y": torch.randn(5, 3)})
    total = make(potential_fn=lambda latents: latents["z"].square().sum())
    with pytest.raises(ValueError, match=r"one energy per row, shape \(5,\), got \(\)"):
        run(total, start={"z": torch.randn(5, 3)})
    kernel = make(potential_fn=gaussian)
    kernel.streams = Streams.create(4, seed=0)
    with pytest.raises(ValueError, match="streams has 4 rows but the latents have 5"):
        run(kernel, start={"z": torch.randn(5, 3)})


@each_kernel
def test_a_potential_needs_a_start(make):
    with pytest.raises(ValueError, match="initial_params must be given with potential_fn"):
        run(make(potential_fn=gaussian))
    with pytest.raises(RuntimeError, match="call setup"):
        make(LinearGaussianVAE().model).potential  # noqa: B018


# --- Placement ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FACTORIES if name != "nuts"])
def test_kernels_run_on_a_device_that_cannot_answer(name):
    """Tensors on "meta" have no values: whatever asks for one (a host sync) raises."""
    metric = {"z": torch.ones(3)}
    kernel = FACTORIES[name](potential_fn=gaussian, inverse_mass_matrix=metric)
    kernel.setup(warmup_steps=2)
    params = {"z": torch.empty(5, 3, device="meta")}
    for _ in range(4):
        params = kernel.sample(params)
        assert kernel.logging() == {}
    assert params["z"].device.type == kernel.state.energy.device.type == "meta"
    assert {value.device.type for value in kernel.info} == {"meta"}
    assert kernel.diagnostics()["acceptance rate"].device.type == "meta"


def test_the_meta_device_notices_a_host_sync():
    def asking(latents):
        energy = gaussian(latents)
        return energy if float(energy.sum()) > 0 else -energy

    kernel = BatchedHMC(potential_fn=asking)
    kernel.setup(warmup_steps=2)
    with pytest.raises((RuntimeError, NotImplementedError)):
        kernel.sample({"z": torch.empty(5, 3, device="meta")})


class CountSyncs(TorchDispatchMode):
    """Count the operations that hand a tensor's value to Python."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default or "nonzero" in func.name():
            self.count += 1
        return func(*args, **(kwargs or {}))


@each_kernel
def test_host_syncs_of_a_transition(make):
    """NUTS asks once per leaf of the largest tree; the others never, model or potential."""
    vae, x = LinearGaussianVAE(), torch.rand(5, 1, 4, 4)
    kernel = make(vae.model)
    kernel.setup(3, x)
    params = kernel.sample(kernel.initial_params)  # checks the start, which asks
    for _ in range(5):
        with CountSyncs() as syncs:
            params = kernel.sample(params)
        if isinstance(kernel, BatchedNUTS):
            depth = int(kernel.info.tree_depth.max())
            assert 0 < syncs.count <= 2**depth
        else:
            assert syncs.count == 0


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        (BatchedHMC, "step_size", 0.0, "step_size must be a positive finite number"),
        (BatchedHMC, "step_size", -0.1, "step_size must be a positive finite number"),
        (BatchedHMC, "step_size", float("nan"), "step_size must be a positive finite number"),
        (BatchedHMC, "inverse_mass_matrix", {"z": -torch.ones(3)}, r"\['z'\] must be positive"),
        (BatchedHMC, "num_steps", 0, "num_steps must be an integer of at least 1"),
        (BatchedHMC, "jitter", -1.0, "jitter must lie in"),
        (BatchedHMC, "burn_in", -1, "burn_in must be an integer of at least 0"),
        (BatchedGHMC, "num_steps", 0, "num_steps must be an integer of at least 1"),
        (BatchedGHMC, "persistence", 1.5, "persistence must lie in"),
        (BatchedNUTS, "max_tree_depth", 0, "max_tree_depth must be an integer in"),
    ],
)
def test_an_argument_that_was_replaced_is_looked_at(kind, name, value, message):
    """Of 0 steps, or a negative matrix, chains stood still."""
    kernel = kind(potential_fn=lambda latents: latents["z"].square().sum(-1))
    setattr(kernel, name, value)
    with pytest.raises(ValueError, match=message):
        kernel.setup(1)
    kernel = BatchedHMC(potential_fn=lambda latents: latents["z"].square().sum(-1))
    kernel.step_size = torch.tensor(0.25)
    kernel.setup(1)
    assert kernel.step_size == 0.25
