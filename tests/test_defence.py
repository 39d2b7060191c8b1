"""Defences: shapes, statistics, any kernel, ArviZ, micro-batches."""

from __future__ import annotations

import dataclasses
import functools
import inspect

import numpy as np
import pyro.infer
import pytest
import torch
from kernels import FACTORIES
from programs import BatchNormVAE, HierarchicalVAE, TutorialVAE
from pyro.infer import NUTS
from pyro.infer.mcmc.util import initialize_model

from pyro_vae_defence import diagnostics
from pyro_vae_defence.defence import (
    DefenceResult,
    EncoderDefence,
    MCMCDefence,
    NoDefence,
    PosteriorModeDefence,
    median_filter,
)
from pyro_vae_defence.defence.foreign import EnergyModel
from pyro_vae_defence.defence.mcmc import PAPER_SETTINGS, PaperSetting
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS
from pyro_vae_defence.mcmc.adaptation import FixedStepSize
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.ops.balls import L2, Linf

KERNELS = {
    **FACTORIES,
    "pyro-hmc": functools.partial(pyro.infer.HMC, step_size=0.1, num_steps=3),
    "pyro-nuts": functools.partial(pyro.infer.NUTS, step_size=0.1, max_tree_depth=3),
}
SHORT = {"num_samples": 4, "warmup_steps": 4, "num_chains": 2}
SHARED_STATS = {"acceptance_rate", "diverging", "lp", "step_size", "n_steps"}


@pytest.mark.parametrize("name", KERNELS)
def test_contract_of_every_kernel(tutorial_vae, name):
    x = torch.rand(3, 1, 28, 28)
    result = MCMCDefence(tutorial_vae, KERNELS[name], 5, 4, 2)(x)
    assert result.latents["latent"].shape == (3, 5)
    assert result.reconstruction.shape == x.shape
    assert result.samples["latent"].shape == (2, 5, 3, 5)
    assert torch.equal(result.samples["latent"][0, -1], result.latents["latent"])
    assert result.initial["latent"].shape == (2, 3, 5)
    own = not name.startswith("pyro")
    expected = SHARED_STATS | ({"energy", "tree_depth"} if own else set())
    assert set(result.sample_stats) == expected
    for value in result.sample_stats.values():
        assert value.shape == (2, 5, 3)
        assert value.float().isfinite().all()
    decoded = program.decode(tutorial_vae, result.latents, (1, 28, 28))
    assert torch.allclose(result.reconstruction, decoded, atol=1e-6)
    # lp is the log-density of the draws themselves.
    energy = program.potential(tutorial_vae, x)
    last = energy({"latent": result.samples["latent"][1, 2]})
    assert torch.allclose(result.sample_stats["lp"][1, 2], -last, rtol=1e-4)
    if own and name != "mams":  # which counts kinetic energy from a trajectory's start
        # The Hamiltonian is the potential energy and a positive kinetic energy.
        kinetic = result.sample_stats["energy"] + result.sample_stats["lp"]
        assert (kinetic > 0).all()
    assert (result.num_gradients >= result.sample_stats["n_steps"].sum((0, 1))).all()
    tree = result.to_datatree()
    assert set(tree.children) == {"posterior", "sample_stats", "observed_data"}
    assert tree["posterior"].attrs["num_samples"] == 5


DEFENCES = {
    "hmc": functools.partial(MCMCDefence, kernel=KERNELS["hmc"], **SHORT),
    "nuts": functools.partial(MCMCDefence, kernel=KERNELS["nuts"], **SHORT),
    "adam": functools.partial(PosteriorModeDefence, num_steps=5, perturbation=L2(0.5)),
    "lbfgs": functools.partial(
        PosteriorModeDefence, optimiser="lbfgs", num_steps=5, perturbation=L2(0.5)
    ),
    "encoder": functools.partial(EncoderDefence, num_samples=3),
}


@pytest.mark.parametrize("name", DEFENCES)
@pytest.mark.usefixtures("float64")
def test_does_not_depend_on_the_micro_batch(tutorial_vae, name):
    x = torch.rand(3, 1, 28, 28)
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)

    def run(x, **settings):
        torch.manual_seed(2)
        return DEFENCES[name](tutorial_vae, **settings)(x)

    whole = run(x)
    for rows in (2 * len(whole.samples["latent"]), 1):  # two images with their chains, and one
        other = run(x, batch_size=rows)
        close(other.samples["latent"], whole.samples["latent"])
        assert torch.equal(other.num_gradients, whole.num_gradients)
    # The first image alone is the first image of the batch.
    close(run(x[:1]).samples["latent"], whole.samples["latent"][:, :, :1])


@pytest.mark.parametrize("name", DEFENCES)
def test_train_mode_is_restored_and_not_used(name):
    vae = BatchNormVAE().train()
    DEFENCES[name](vae)(torch.rand(2, 1, 28, 28))
    assert vae.training
    assert vae.norm.num_batches_tracked == 0


def test_draws_follow_the_posterior(linear_vae):
    x = torch.rand(4, 1, 4, 4)
    result = MCMCDefence(linear_vae, BatchedHMC, 40, 20, 40)(x)
    mean, covariance = linear_vae.exact(x)
    draws = result.samples["z"]
    chain_means = draws.mean(1)
    effective = 40 * 40 / 4  # HMC on a Gaussian: at least one effective draw in four
    bound = 5 * covariance.diagonal().sqrt() / effective**0.5
    # 12 means, 5 standard errors each: error rate below 1e-5.
    assert ((chain_means.mean(0) - mean).abs() < bound).all()
    assert max(v.max() for v in diagnostics.rhat(result.to_datatree()).values()) < 1.05


def test_starts_at_the_guide_or_the_prior(linear_vae):
    x = torch.rand(2, 1, 4, 4).repeat(500, 1, 1, 1)
    stay = functools.partial(BatchedHMC, step_size=1e-6, num_steps=1, adapt_step_size=False)
    mean, covariance = linear_vae.exact(x[:2])
    for initial, loc, sd in (
        ("guide", mean, covariance.diagonal().sqrt()),
        ("prior", torch.zeros(2, 3), torch.ones(3)),
    ):
        start = MCMCDefence(linear_vae, stay, 1, 0, initial=initial)(x).initial["z"]
        start = start.reshape(500, 2, 3)
        # 6 means each, 5 standard errors: error rate 4e-6.
        assert ((start.mean(0) - loc).abs() < 5 * sd / 500**0.5).all()
        assert torch.allclose(start.std(0), sd.expand(2, 3), rtol=0.2)


def test_constrained_latents_come_back_on_their_support():
    x = torch.rand(3, 1, 4, 4)
    for kernel in (BatchedHMC, BatchedNUTS):
        result = MCMCDefence(HierarchicalVAE(), kernel, 3, 3)(x)
        assert (result.samples["rate"] > 0).all()
        assert (result.initial["rate"] > 0).all()
        assert result.samples["low"].shape == (1, 3, 3, 3)


def test_paper_defence_has_the_published_settings():
    vae = ConvVAE()
    defence = MCMCDefence.paper(vae, "mnist")
    assert (defence.num_samples, defence.warmup_steps) == (500, 250)
    kernel = defence.kernel(vae.model)
    assert (kernel.step_size, kernel.num_steps, kernel.jitter) == (0.1, 20, 0.0)
    other = MCMCDefence.paper(vae, "color_mnist")
    assert (other.num_samples, other.kernel(vae.model).step_size) == (1000, 0.05)
    hierarchy = MCMCDefence.paper(vae, "mnist_nvae", num_draws=1)
    assert (hierarchy.num_samples, hierarchy.warmup_steps) == (1, 2999)
    kernel = hierarchy.kernel(vae.model)
    assert (kernel.step_size, kernel.num_steps) == (1e-4, 20)
    assert kernel.rule.adapts_while_sampling
    fixed = MCMCDefence.paper(vae, "celeba_nvae").kernel(vae.model)
    assert (fixed.step_size, fixed.num_steps, fixed.jitter) == (1e-4, 1, 0.0)
    assert isinstance(fixed.rule, FixedStepSize)
    with pytest.raises(ValueError, match="dataset must be one of"):
        MCMCDefence.paper(vae, "celeba")
    for num_draws in (0, 501):
        with pytest.raises(ValueError, match=r"num_draws must lie in \[1, 500\]"):
            MCMCDefence.paper(vae, "mnist", num_draws)


def test_keeping_fewer_draws_does_not_change_the_paper_chain(linear_vae, monkeypatch):
    monkeypatch.setitem(PAPER_SETTINGS, "mnist", PaperSetting(4, 0.05))
    x = torch.rand(3, 1, 4, 4)
    all_draws, last = (
        MCMCDefence.paper(linear_vae, "mnist", num)(x, torch.Generator().manual_seed(1))
        for num in (None, 1)
    )
    for site, value in last.latents.items():
        assert torch.equal(value, all_draws.latents[site])
    assert torch.equal(last.num_gradients, all_draws.num_gradients)


def test_no_defence_is_one_draw_decoded(tutorial_vae):
    x = torch.rand(3, 1, 28, 28)
    result = NoDefence(tutorial_vae)(x)
    assert torch.equal(
        result.reconstruction, program.decode(tutorial_vae, result.latents, (1, 28, 28))
    )
    assert result.num_gradients.tolist() == [0, 0, 0]
    assert result.to_datatree()["posterior"]["latent"].shape == (1, 1, 3, 5)
    torch.manual_seed(0)
    first = NoDefence(tutorial_vae).encode(x)["latent"]
    torch.manual_seed(0)
    assert torch.equal(NoDefence(tutorial_vae).encode(x)["latent"], first)
    assert result.settings == {"defence": "none"}
    # A number of draws or a filter would be another control.
    assert list(inspect.signature(NoDefence).parameters) == ["vae", "batch_size"]


def test_guide_and_model_with_different_latents_are_refused(linear_vae, monkeypatch):
    monkeypatch.setattr(linear_vae, "guide", HierarchicalVAE().guide, raising=False)
    for defence in (NoDefence(linear_vae), EncoderDefence(linear_vae, 2)):
        with pytest.raises(ValueError, match=r"latent sites \['z'\], the guide"):
            defence(torch.rand(2, 1, 4, 4))


@pytest.mark.parametrize(
    "make",
    [
        NoDefence,
        functools.partial(EncoderDefence, num_samples=2, preprocess=median_filter),
        functools.partial(PosteriorModeDefence, num_steps=2),
        functools.partial(MCMCDefence, num_samples=2, warmup_steps=1),
    ],
)
def test_every_defence_streams_and_joins(linear_vae, make):
    x = torch.rand(5, 1, 4, 4)
    whole = make(linear_vae)(x, torch.Generator().manual_seed(1))
    joined = make(linear_vae, batch_size=2)(x, torch.Generator().manual_seed(1))
    parts = list(make(linear_vae).stream([x[:3], x[3:]], torch.Generator().manual_seed(1)))
    assert [len(part.x) for part in parts] == [3, 2]
    assert joined.settings == whole.settings
    tensors = [name for name in vars(whole) if name not in ("seconds", "observation", "settings")]
    for result in (joined, DefenceResult.join(parts)):
        for name in tensors:
            got, expected = getattr(result, name), getattr(whole, name)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_results_of_several_defences_are_not_joined(linear_vae):
    x = torch.rand(2, 1, 4, 4)
    chains = functools.partial(MCMCDefence, linear_vae, warmup_steps=1)
    found = chains(num_samples=2)(x)
    for other, name in (
        (chains(num_samples=2, perturbation=Linf(0.1))(x), "settings"),
        (NoDefence(linear_vae)(x), "settings"),
        (dataclasses.replace(found, observation="other"), "observation"),
        (dataclasses.replace(found, samples={"z": found.samples["z"][:, :1]}), "samples"),
    ):
        with pytest.raises(ValueError, match=f"results of different {name} are not joined"):
            DefenceResult.join([found, other])
    with pytest.raises(ValueError, match="parts is empty"):
        DefenceResult.join([])


def test_results_of_images_of_other_sizes_are_not_joined(linear_vae):
    """The same latents, as of two VAEs."""
    result = NoDefence(linear_vae)(torch.rand(2, 1, 4, 4))
    wide = torch.rand(2, 1, 4, 5)
    other = dataclasses.replace(result, x=wide, reconstruction=wide)
    with pytest.raises(
        ValueError, match=r"different reconstruction are .*\(1, 4, 4\), \(1, 4, 5\)"
    ):
        DefenceResult.join([result, other])


def test_settings_of_numpys_numbers_are_recorded(linear_vae):
    kernel = functools.partial(BatchedHMC, step_size=np.float32(0.25), num_steps=np.int64(2))
    settings = MCMCDefence(linear_vae, kernel, 1, 1)(torch.rand(2, 1, 4, 4)).settings
    assert (settings["kernel_step_size"], settings["kernel_num_steps"]) == (0.25, 2)


def test_results_do_not_hang_on_images_with_a_gradient(linear_vae):
    x = torch.rand(2, 1, 4, 4, requires_grad=True)
    result = NoDefence(linear_vae)(x)
    assert not any(
        value.requires_grad for value in (result.x, result.reconstruction, result.latents["z"])
    )


@pytest.mark.parametrize("generator", [0, "a", 1.5])
def test_a_generator_is_no_number(linear_vae, generator):
    with pytest.raises(ValueError, match=f"generator must be a torch.Generator, .* {generator!r}"):
        NoDefence(linear_vae)(torch.rand(2, 1, 4, 4), generator)


# --- Kernels that are not of this library ---------------------------------------------------------


class Tempered(TutorialVAE):
    """A beta-VAE's scale, which Pyro's own reading of the model would sample."""

    def model(self, x):
        with pyro.poutine.scale(scale=7.0):
            super().model(x)


@pytest.mark.parametrize("ball", [None, Linf(0.1)])
@pytest.mark.parametrize(
    ("vae", "shape"), [(HierarchicalVAE(), (1, 4, 4)), (Tempered(), (1, 28, 28))]
)
def test_foreign_kernels_move_on_the_librarys_potential(vae, shape, ball, float64):
    vae = vae.double() if isinstance(vae, torch.nn.Module) else vae
    energy = program.potential(vae, torch.rand(1, *shape), ball)
    model = EnergyModel(energy)
    _, pyros, transforms, _ = initialize_model(model, (torch.rand(1, *shape),))
    for scale in (0.0, 1.0, 3.0):
        z = {name: scale * torch.randn_like(value) for name, value in energy.prototype.items()}
        assert all(torch.equal(transforms[name](value), value) for name, value in z.items())
        before = model.num_calls
        assert torch.allclose(pyros(z), energy(z)[0], rtol=1e-12)
        assert model.num_calls == before + 1


@pytest.mark.parametrize("kernel", [pyro.infer.RandomWalkKernel, lambda model: NUTS(model)])
def test_any_factory_of_a_foreign_kernel_will_do(linear_vae, kernel):
    result = MCMCDefence(linear_vae, kernel, 6, 4, 2)(torch.rand(2, 1, 4, 4))
    assert result.samples["z"].shape == (2, 6, 2, 3)
    for name in ("acceptance_rate", "lp"):
        assert result.sample_stats[name].isfinite().all()
    assert (result.num_gradients > result.sample_stats["n_steps"].sum((0, 1))).all()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_gradients_of_a_compiled_foreign_kernel_are_counted(linear_vae):
    options = {"step_size": 0.1, "num_steps": 3, "adapt_step_size": False}
    kernel = functools.partial(pyro.infer.HMC, **options, ignore_jit_warnings=True)
    compiled, plain = (
        MCMCDefence(linear_vae, functools.partial(kernel, jit_compile=jit), 4, 2)(
            torch.rand(2, 1, 4, 4), torch.Generator().manual_seed(0)
        )
        for jit in (True, False)
    )
    assert torch.equal(compiled.sample_stats["n_steps"], plain.sample_stats["n_steps"])
    # One run of the model more, in which it is recorded.
    assert torch.equal(compiled.num_gradients, plain.num_gradients + 1)


def test_settings_survive_netcdf(tutorial_vae, tmp_path):
    kernel = functools.partial(BatchedHMC, num_steps=1, adapt_step_size=False)
    result = MCMCDefence(tutorial_vae, kernel, 2, 0)(torch.rand(1, 1, 28, 28))
    result.to_arviz().to_netcdf(str(tmp_path / "chains.nc"))
    assert result.settings["kernel_adapt_step_size"] == 0
    assert "tensor" not in repr(result)
    assert len(repr(result)) < 150


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_samples": 0}, "num_samples must be an integer of at least 1, got 0"),
            ({"warmup_steps": -1}, "warmup_steps must be an integer of at least 0, got -1"),
            ({"num_chains": 0}, "num_chains must be an integer of at least 1, got 0"),
            ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
            ({"initial": "encoder"}, "initial must be one of .*, got .encoder."),
            ({"kernel": "hmc"}, "kernel must be a callable from a Pyro model"),
            (
                {"kernel": BatchedHMC(ConvVAE().model)},
                "kernel must be a callable from a Pyro model",
            ),
        ],
    )
    def test_settings(self, tutorial_vae, settings, message):
        with pytest.raises(ValueError, match=message):
            MCMCDefence(tutorial_vae, **settings)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("initial", "priors", "initial must be one of"),  # was taken for the guide
            ("num_samples", 0, "num_samples must be an integer of at least 1"),
            ("num_chains", 0, "num_chains must be an integer of at least 1"),
            ("keep_draws", 9, "keep_draws must be at most 2"),
            ("kernel", 3, "kernel must be a callable"),
            ("batch_size", 0, "batch_size must be an integer"),
        ],
    )
    def test_settings_that_were_replaced(self, linear_vae, name, value, message):
        defence, x = MCMCDefence(linear_vae, BatchedHMC, 2, 1), torch.rand(2, 1, 4, 4)
        setattr(defence, name, value)
        for call in (defence, lambda x: list(defence.stream([x]))):
            with pytest.raises(ValueError, match=message):
                call(x)
        other = PosteriorModeDefence(linear_vae, num_steps=2)
        other.initial = "annealed"
        with pytest.raises(ValueError, match="initial must be one of"):
            other(x)

    def test_not_a_vae(self):
        with pytest.raises(ValueError, match="vae must have two Pyro programs"):
            MCMCDefence(torch.nn.Linear(1, 1))

    def test_images_outside_the_unit_interval(self, tutorial_vae):
        with pytest.raises(ValueError, match=r"x must lie in \[0, 1\], got values from -1"):
            MCMCDefence(tutorial_vae)(-torch.ones(1, 1, 28, 28))

    def test_kernel_that_makes_no_kernel(self, tutorial_vae):
        with pytest.raises(ValueError, match="kernel must return an MCMCKernel"):
            MCMCDefence(tutorial_vae, lambda model: 3)(torch.rand(1, 1, 28, 28))

    def test_non_finite_start(self, tutorial_vae):
        with torch.no_grad():
            tutorial_vae.decoder[2].bias[0] = torch.nan
        with pytest.raises(ValueError, match="not finite for image 0, chain 0"):
            MCMCDefence(tutorial_vae, KERNELS["pyro-hmc"])(torch.rand(2, 1, 28, 28))
        with pytest.raises(ValueError, match="starting energy is not finite for 2 of 2 rows"):
            MCMCDefence(tutorial_vae)(torch.rand(2, 1, 28, 28))


class TestArviz:
    def arrays(self):
        rng = np.random.default_rng(0)
        posterior = {"z": rng.normal(size=(4, 50, 3, 5))}
        stats = {"lp": rng.normal(size=(4, 50, 3)), "diverging": np.zeros((4, 50, 3), bool)}
        return posterior, stats, {"obs": rng.random((3, 1, 28, 28))}

    def test_dimensions(self):
        tree = diagnostics.to_datatree(*self.arrays())
        assert tree["posterior"]["z"].dims == ("chain", "draw", "image", "latent")
        assert tree["sample_stats"]["lp"].dims == ("chain", "draw", "image")
        dims = ("image", "channel", "height", "width")
        assert tree["observed_data"]["obs"].dims == dims
        # xarray keeps a variable's own name from being one of its dimensions.
        values = {"latent": np.zeros((1, 2, 3, 5))}
        assert diagnostics.to_datatree(values)["posterior"]["latent"].dims[-1] == "latent_dim"
        two = {"a": np.zeros((1, 2, 3, 5)), "b": np.zeros((1, 2, 3, 4, 2))}
        assert diagnostics.to_datatree(two)["posterior"]["b"].dims[3:] == ("b_dim", "b_dim_1")

    def test_conversion_and_diagnostics(self, tmp_path):
        tree = diagnostics.to_datatree(*self.arrays())
        chains = diagnostics.to_arviz(tree)
        assert chains.posterior["z"].shape == (4, 50, 3, 5)
        chains.to_netcdf(str(tmp_path / "chains.nc"))
        rhat, ess = diagnostics.rhat(tree)["z"], diagnostics.ess(tree)["z"]
        assert rhat.shape == ess.shape == (3, 5)
        # Independent draws of four chains.
        assert rhat.max() < 1.1
        assert ess.min() > 60

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda p, s, o: p.clear(), "posterior is empty"),
            (lambda p, s, o: p.update(z=np.zeros((2, 3))), "must have dimensions"),
            (lambda p, s, o: p.update(y=np.zeros((4, 9, 3, 5))), "other sites have"),
            (lambda p, s, o: s.update(lp=np.zeros((4, 50))), "must have shape"),
            (
                lambda p, s, o: o.update(obs=np.zeros((2, 1))),
                r"must have \(image\) = \(3,\), got \(2,\)",
            ),
        ],
    )
    def test_errors(self, change, message):
        arrays = self.arrays()
        change(*arrays)
        with pytest.raises(ValueError, match=message):
            diagnostics.to_datatree(*arrays)
