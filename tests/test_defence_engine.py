"""The defence as an engine: streams, budgets, stopping, starts, recorded energies, memory."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys

import arviz
import numpy as np
import pyro.infer
import pytest
import torch
from programs import HierarchicalVAE, LinearGaussianVAE

from pyro_vae_defence.defence import ConvergenceRule, MCMCDefence
from pyro_vae_defence.defence.convergence import assess, energy_drift, split_r_hat
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS
from pyro_vae_defence.mcmc.mode import search_mode
from pyro_vae_defence.models import program
from pyro_vae_defence.models.compiled import Recorder, ReducedForce
from pyro_vae_defence.ops.balls import Linf

HMC = functools.partial(BatchedHMC, num_steps=3)
STUCK = functools.partial(BatchedHMC, step_size=1e3, num_steps=1, jitter=0.0, adapt_step_size=False)


def defend(vae, x, kernel=HMC, num_samples=6, warmup_steps=4, num_chains=1, **options):
    defence = MCMCDefence(vae, kernel, num_samples, warmup_steps, num_chains, **options)
    return defence(x, torch.Generator().manual_seed(9))


def assert_same(got, expected, site="z"):
    close = functools.partial(torch.allclose, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert close(got.samples[site], expected.samples[site])
    assert close(got.initial[site], expected.initial[site])
    assert close(got.reconstruction, expected.reconstruction)
    assert torch.equal(got.num_gradients, expected.num_gradients)
    for name, value in got.sample_stats.items():
        assert close(value, expected.sample_stats[name]), name
    assert got.convergence.keys() == expected.convergence.keys()
    for name, value in got.convergence.items():
        assert close(value, expected.convergence[name]), name


# --- Streams and memory ---------------------------------------------------------------------------


def test_a_copy_with_other_lengths_keeps_all_its_draws(linear_vae):
    defence = dataclasses.replace(MCMCDefence(linear_vae, HMC, 2, 1), num_samples=5)
    assert defence(torch.rand(2, 1, 4, 4)).samples["z"].shape[:2] == (1, 5)


def test_a_stream_is_one_call_in_parts(linear_vae):
    x = torch.rand(7, 1, 4, 4)
    whole = defend(linear_vae, x, num_chains=2)
    defence = MCMCDefence(linear_vae, HMC, 6, 4, 2, batch_size=6)
    batches = [(x[:5], torch.zeros(5)), x[5:]]  # a loader's pairs, or images
    parts = list(defence.stream(batches, torch.Generator().manual_seed(9)))
    assert [p.x.shape[0] for p in parts] == [3, 2, 2]
    for name in ("samples", "sample_stats"):
        for key, value in getattr(whole, name).items():
            joined = torch.cat([getattr(p, name)[key] for p in parts], 2)
            assert torch.allclose(joined, value, rtol=1e-9)
    with pytest.raises(ValueError, match=r"batches must lie in \[0, 1\]"):
        list(defence.stream([x, 2 + x]))


def test_a_stream_asks_for_a_batch_when_its_turn_comes(linear_vae):
    asked = []

    def batches():
        for number in range(3):
            asked.append(number)
            yield torch.rand(2, 1, 4, 4)

    stream = MCMCDefence(linear_vae, HMC, 1, 1).stream(batches())
    next(stream)
    assert asked == [0]


def test_the_last_draws_are_kept(linear_vae):
    x = torch.rand(3, 1, 4, 4)
    whole, last = defend(linear_vae, x), defend(linear_vae, x, keep_draws=2)
    assert torch.equal(last.samples["z"], whole.samples["z"][:, -2:])
    assert torch.equal(last.sample_stats["lp"], whole.sample_stats["lp"][:, -2:])
    assert torch.equal(last.num_gradients, whole.num_gradients)
    stock = functools.partial(pyro.infer.HMC, step_size=0.1, num_steps=2)
    assert defend(linear_vae, x, stock, keep_draws=2).samples["z"].shape == (1, 2, 3, 3)


MEMORY = """
import functools, resource, sys, torch
sys.path.insert(0, "tests")
from programs import LinearGaussianVAE
from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC
num_images, batch = int(sys.argv[1]), 1000
generator = torch.Generator().manual_seed(0)
batches = (torch.rand(batch, 1, 4, 4, generator=generator) for _ in range(num_images // batch))
kernel = functools.partial(BatchedHMC, num_steps=2)
defence = MCMCDefence(LinearGaussianVAE(), kernel, 10, 10, keep_draws=1, batch_size=batch)
total = sum(result.latents["z"].shape[0] for result in defence.stream(batches))
assert total == num_images
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory(num_images):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(num_images)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images():
    few, many = peak_memory(10_000), peak_memory(100_000)
    assert many < 1.1 * few, (few, many)


def test_nothing_of_a_finished_micro_batch_is_held(linear_vae):
    """The fast counterpart: tensors alive do not add up over the stream."""
    import gc

    counts = []
    defence = MCMCDefence(linear_vae, HMC, 3, 2, keep_draws=1)
    for _ in defence.stream(torch.rand(2, 1, 4, 4) for _ in range(4)):
        gc.collect()
        counts.append(sum(type(value) is torch.Tensor for value in gc.get_objects()))
    assert counts[1] == counts[2] == counts[3]


# --- Budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chains", [1, 2])
@pytest.mark.parametrize("initial", ["guide", "mode"])
def test_a_budget_is_not_exceeded_and_divided(linear_vae, num_chains, initial):
    x = torch.rand(3, 1, 4, 4)
    options = {"num_chains": num_chains, "initial": initial, "mode_steps": 5}
    free = defend(linear_vae, x, num_samples=30, warmup_steps=10, **options)
    budget = 60
    bound = defend(linear_vae, x, num_samples=30, warmup_steps=10, max_gradients=budget, **options)
    assert (bound.num_gradients <= budget).all()
    # One more transition, of at most 6 leapfrog steps per chain, would not have fitted.
    assert (bound.num_gradients > budget - 7 * num_chains).all()
    draws = bound.samples["z"].shape[1]
    assert 0 < draws < 30
    assert (free.num_gradients > budget).all()
    enough = defend(linear_vae, x, num_samples=30, warmup_steps=10, max_gradients=10_000, **options)
    assert_same(enough, free)


def test_a_budget_for_nuts_counts_full_trees(linear_vae):
    x = torch.rand(3, 1, 4, 4)
    kernel = functools.partial(BatchedNUTS, max_tree_depth=3)
    result = defend(linear_vae, x, kernel, max_gradients=36, warmup_steps=0)
    assert result.samples["z"].shape[1] == 5  # 1 + 5 * 7
    assert (result.num_gradients <= 36).all()


# --- Convergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_draws", [8, 9, 50])
def test_split_r_hat_is_arviz(num_draws):
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(5, num_draws, 3)).cumsum(1)
    got = split_r_hat(torch.from_numpy(draws))
    for i in range(3):
        expected = arviz.rhat(draws[:, :, i], method="split")
        assert np.isclose(float(got[i]), expected, rtol=1e-12)
    # One latent dimension: what is assessed of the later half is the same.
    tensor = torch.from_numpy(draws)
    flat = assess(tensor, {"z": tensor[..., None]}, ConvergenceRule())
    later = split_r_hat(tensor[:, num_draws // 2 :])
    assert torch.allclose(flat.r_hat, later)


def test_energy_drift_is_a_t_statistic():
    energy = torch.randn(4, 40, 2000, dtype=torch.float64)
    drift = energy_drift(energy)
    # P(|t_3| > 3.182) = .05; 5 standard errors over 2000 images: error rate 6e-7.
    assert (
        abs(float((drift.abs() > 3.182).double().mean()) - 0.05) < 5 * (0.05 * 0.95 / 2000) ** 0.5
    )
    rising = energy + torch.linspace(0, 5, 40)[:, None]
    assert (energy_drift(rising) > 3).all()


def test_a_drift_of_either_sign_keeps_an_image_from_converging():
    """Chains of equal variance whose later quarter is shifted by 9 standard errors of its mean."""
    flips = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(8)[:, None]
    shift = torch.tensor([0.02, 0.02, 0.02, 0.03], dtype=torch.float64)[:, None, None]
    late = (torch.arange(16) >= 12).double()[:, None]
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
    energy = flips + shift * late * sign  # 4 chains, 16 draws, images that rise and that fall
    for bound, converged in ((8.0, False), (10.0, True)):
        rule = ConvergenceRule(max_drift=bound)
        found = assess(energy, {"z": energy[..., None]}, rule, first=5)
        assert torch.allclose(found.energy_drift, 9 * sign)
        assert found.converged.tolist() == [converged] * 2
        assert found.forgotten_after.tolist() == [13 if converged else -1] * 2


def test_r_hat_is_the_larger_of_the_energys_and_the_latents_mean_one():
    flips = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(8)[:, None]
    apart = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)[:, None, None]
    # Halves of 4 draws with means 0, 0, 1, 1, ...: W = 4/3, B = 4 * 10/7.
    alike, differ = flips + 0 * apart, flips + apart
    still, moved = 3 / 4, 3 / 4 + (10 / 7) / (4 / 3)
    latents = {"a": torch.stack([alike, differ], -1), "b": alike}
    for energy, expected in ((alike, (moved + 2 * still) / 3), (differ, moved)):
        found = assess(energy, latents, ConvergenceRule())
        assert float(found.r_hat) == pytest.approx(expected**0.5)


def test_images_stop_when_converged_and_compaction_changes_nothing(linear_vae, monkeypatch):
    torch.manual_seed(1)
    x = torch.rand(12, 1, 4, 4)
    x[6:] *= 0.1
    rule = ConvergenceRule(max_r_hat=1.05, check_every=10)
    kept = []
    keep = BatchedHMC.keep

    def counted(self, rows):
        kept.append(rows.shape[0])
        return keep(self, rows)

    monkeypatch.setattr(BatchedHMC, "keep", counted)
    kernel = functools.partial(BatchedHMC, num_steps=4, step_size=0.05)
    run = functools.partial(
        defend, linear_vae, x, kernel, 200, 8, 4, initial="prior", until_converged=rule
    )
    compacted = run()
    assert kept  # images left
    monkeypatch.setattr(BatchedHMC, "couples_images", True)
    whole = run()
    assert_same(compacted, whole)
    assert compacted.convergence["converged"].any()
    assert compacted.num_gradients.unique().numel() > 1
    assert compacted.samples["z"].shape == (4, 10, 12, 3)
    monkeypatch.undo()
    # Nor does the micro-batch.
    assert_same(run(batch_size=16), whole)
    converged = compacted.convergence["converged"]
    assert (compacted.convergence["r_hat"][converged] <= 1.05).all()
    after = compacted.convergence["forgotten_after"]
    assert (after[converged] >= 8).all()
    assert (after[~converged] == -1).all()


def test_converged_draws_follow_the_posterior(linear_vae):
    x = torch.rand(2, 1, 4, 4).repeat(150, 1, 1, 1)
    rule = ConvergenceRule(max_r_hat=1.2, check_every=20)
    result = defend(
        linear_vae, x, HMC, 100, 30, 4, initial="prior", until_converged=rule, keep_draws=1
    )
    mean, covariance = linear_vae.exact(x[:2])
    draws = result.samples["z"][:, 0].reshape(4, 150, 2, 3).flatten(0, 1)
    sd = covariance.diagonal().sqrt()
    # Six means of 600 draws, 5 standard errors: error rate 4e-6.
    assert ((draws.mean(0) - mean).abs() < 5 * sd / 600**0.5).all()


def test_chains_that_only_diverge_leave_unconverged(linear_vae):
    rule = ConvergenceRule(check_every=8)
    result = defend(linear_vae, torch.rand(2, 1, 4, 4), STUCK, 80, 0, 4, until_converged=rule)
    assert (result.num_gradients == 4 * (1 + 8)).all()
    assert not result.convergence["converged"].any()


def test_a_coupled_kernel_keeps_its_batch(linear_vae):
    kernel = functools.partial(BatchedHMC, preset="paper")(linear_vae.model)
    kernel.setup(0, torch.rand(2, 1, 4, 4))
    with pytest.raises(ValueError, match="no chain may leave"):
        kernel.keep(torch.tensor([0]))
    other = BatchedHMC(potential_fn=lambda z: z["z"].square().sum(-1))
    with pytest.raises(ValueError, match="keep needs a model"):
        other.keep(torch.tensor([0]))


def test_four_chains_are_assessed_in_any_run(linear_vae):
    x = torch.rand(3, 1, 4, 4)
    result = defend(linear_vae, x, num_samples=40, num_chains=4)
    assert set(result.convergence) == {"converged", "r_hat", "energy_drift", "forgotten_after"}
    assert defend(linear_vae, x, num_chains=3).convergence == {}


# --- Starts ---------------------------------------------------------------------------------------


def test_starts_at_the_mean_or_the_mode(linear_vae):
    x = torch.rand(3, 1, 4, 4)
    mean, _ = linear_vae.exact(x)
    start = defend(linear_vae, x, initial="mean", num_chains=2)
    assert torch.allclose(start.initial["z"], mean.expand(2, 3, 3))
    aware = Linf(0.1)
    result = defend(linear_vae, x, initial="mode", mode_steps=20, perturbation=aware)
    guide = defend(linear_vae, x, perturbation=aware)
    energy = program.potential(linear_vae, x, aware)
    expected, _ = search_mode(energy, {"z": guide.initial["z"][0]}, num_steps=20)
    assert torch.allclose(result.initial["z"][0], expected["z"])
    assert torch.equal(result.num_gradients, guide.num_gradients + 21)


# --- Recorded energies ----------------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", [None, Linf(0.1)])
def test_recorded_chains_are_traced_chains(linear_vae, perturbation):
    x = torch.rand(5, 1, 4, 4)
    options = {"perturbation": perturbation, "num_chains": 2, "batch_size": 4}
    recorded = defend(linear_vae, x, prepare=Recorder(), **options)
    assert recorded.settings["prepare"] == "Recorder()"
    assert_same(recorded, defend(linear_vae, x, **options))


def test_recorded_chains_of_a_hierarchical_constrained_model(float64):
    x = torch.rand(3, 1, 4, 4)
    runs = []
    for prepare in (Recorder(), None):
        runs.append(defend(HierarchicalVAE(), x, initial="mode", mode_steps=3, prepare=prepare))
    for site in ("top", "rate", "low"):
        assert_same(*runs, site=site)


def test_a_recording_serves_every_micro_batch(linear_vae, monkeypatch):
    from pyro_vae_defence.models import compiled

    recorded = []
    capture = compiled._capture
    monkeypatch.setattr(compiled, "_capture", lambda *args: recorded.append(1) or capture(*args))
    defend(linear_vae, torch.rand(6, 1, 4, 4), prepare=Recorder(), batch_size=2)
    assert len(recorded) == 1


def test_reduced_forces(linear_vae):
    half = functools.partial(ReducedForce, dtype=torch.bfloat16)
    x = torch.rand(2, 1, 4, 4).float()
    results = [defend(LinearGaussianVAE(), x, prepare=p) for p in (half, ReducedForce, None)]
    assert results[0].samples["z"].isfinite().all()
    assert torch.equal(results[0].samples["z"], results[1].samples["z"])
    assert not torch.equal(results[0].samples["z"], results[2].samples["z"])
    recorded = [result.settings["prepare"] for result in results]
    assert recorded == ["ReducedForce(dtype=torch.bfloat16)", "ReducedForce", "None"]


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": "start"}, "initial must be one of .* got 'start'"),
        ({"mode_steps": -1}, "mode_steps must be an integer of at least 0, got -1"),
        ({"keep_draws": 0}, "keep_draws must be an integer of at least 1, got 0"),
        ({"keep_draws": 7}, "keep_draws must be at most 6"),
        ({"max_gradients": 0}, "max_gradients must be an integer of at least 1, got 0"),
        ({"max_gradients": 1}, "max_gradients=1 leaves no transition"),
        ({"until_converged": 1.05}, "until_converged must be a ConvergenceRule or None, got 1.05"),
        ({"until_converged": ConvergenceRule()}, "num_chains must be at least 4, got 1"),
        (
            {"prepare": True},
            r"prepare must map a ModelPotential .* such as Recorder\(\), or be 'graph', got True",
        ),
        ({"prepare": lambda energy: 3}, "prepare must return a ModelPotential, it returned 3"),
        (
            {"prepare": functools.partial(ReducedForce, dtype=torch.float64)},
            "dtype must be torch.bfloat16 or torch.float16, or 'tf32', got torch.float64",
        ),
        (
            {"kernel": pyro.infer.NUTS, "max_gradients": 9},
            "need a kernel of this library, such as BatchedHMC; got NUTS",
        ),
        ({"kernel": pyro.infer.NUTS, "prepare": Recorder()}, "prepare need a kernel of this"),
    ],
)
def test_arguments(linear_vae, options, message):
    with pytest.raises(ValueError, match=message):
        defend(linear_vae, torch.rand(2, 1, 4, 4), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_r_hat": 1.0}, r"max_r_hat must lie in \(1, inf\), got 1.0"),
        ({"max_drift": 0.0}, r"max_drift must lie in \(0, inf\], got 0.0"),
        ({"check_every": 7}, "check_every must be an integer of at least 8, got 7"),
    ],
)
def test_rule_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ConvergenceRule(**options)


def test_assess_arguments():
    with pytest.raises(ValueError, match="at least 4 chains, got 3"):
        assess(torch.randn(3, 20, 2), {"z": torch.randn(3, 20, 2, 1)}, ConvergenceRule())
    with pytest.raises(ValueError, match="at least 4 draws"):
        split_r_hat(torch.randn(4, 3))
