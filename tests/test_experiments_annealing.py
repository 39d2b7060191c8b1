"""AIS with this library's HMC, against the exact evidence, importance sampling, and a bracket.

Tolerances are 5 standard errors of log-average weights (delta method) for each of 4 images: fewer
than one failure in 1,000 new seeds, skewness of the weights included.
"""

from __future__ import annotations

import pytest
import torch
from programs import HierarchicalVAE
from test_metrics_evidence import WideGuide, standard_errors

from pyro_vae_defence import metrics
from pyro_vae_defence.experiments.annealing import HMCTransition, ais, guide_variance
from pyro_vae_defence.mcmc import hmc
from pyro_vae_defence.models import program
from pyro_vae_defence.ops.streams import Streams

CHAINS = 200


@pytest.fixture
def simulated(float64):
    vae = WideGuide()
    torch.manual_seed(0)
    latents, x = metrics.simulate(vae, torch.zeros(4, 1, 4, 4))
    return vae, latents, x


def test_ais_agrees_with_the_evidence_and_with_importance_sampling(simulated):
    vae, _, x = simulated
    result = ais(vae, x, metrics.sigmoid_schedule(15), CHAINS, num_steps=3)
    assert result.log_weights.shape == (CHAINS, 4)
    assert (standard_errors(result.log_weights, vae.evidence(x)) < 5).all()
    assert (result.acceptance_rate > 0.6).all()
    # Annealing narrows the weights of the same number of draws from the guide.
    nothing = metrics.ais_log_weights(
        vae, x, lambda latents, potential, step: latents, [0.0, 1.0], CHAINS
    )
    assert (result.log_weights.std(0) < 0.7 * nothing.std(0)).all()
    iwae = metrics.nll(vae, x, 5000)
    assert (standard_errors(result.log_weights, -iwae) < 6).all()
    torch.testing.assert_close(result.nll, -metrics.log_mean_exp(result.log_weights))


def test_bidirectional_walks_bracket_the_evidence(simulated):
    vae, _, x = simulated
    schedule = metrics.sigmoid_schedule(10)
    mean, covariance = vae.exact(x)
    exact = torch.distributions.MultivariateNormal(mean, covariance).sample((CHAINS,))
    forward = ais(vae, x, schedule, CHAINS, num_steps=3).log_weights
    backward = ais(
        vae, x, schedule.flip(0), CHAINS, num_steps=3, initial={"z": exact.flatten(0, 1)}
    ).log_weights
    assert (standard_errors(backward, -vae.evidence(x)) < 5).all()
    lower, upper = forward.mean(0), -backward.mean(0)
    assert (lower < vae.evidence(x)).all()
    assert (vae.evidence(x) < upper).all()
    assert (upper - lower < 1.0).all()


def test_one_simulated_draw_per_image_brackets_the_average_evidence(float64):
    """As for a model without exact posterior: one exact draw per image; 5 standard errors over
    300."""
    vae = WideGuide()
    latents, x = metrics.simulate(vae, torch.zeros(300, 1, 4, 4))
    schedule = metrics.sigmoid_schedule(20)
    plain = metrics.ais_log_weights(vae, x, lambda z, potential, step: z, [0.0, 1.0], 1)[0]
    lower = ais(vae, x, schedule, 1, num_steps=3).log_weights[0]
    upper = -ais(vae, x, schedule.flip(0), 1, num_steps=3, initial=latents).log_weights[0]
    exact = vae.evidence(x)
    for gap in (exact - lower, upper - exact):
        error = gap.std() / 300**0.5
        assert gap.mean() > -5 * error
        # Annealing closes most of what one draw from the guide leaves open.
        assert gap.mean() < 0.5 * (exact - plain).mean()


def test_a_kernel_that_always_accepts_is_seen(simulated, monkeypatch):
    vae, _, x = simulated
    adjusted = hmc.step

    def always(potential, state, streams, step_size, num_steps, inverse_mass=None):
        momentum = hmc.draw_momentum(streams, state.step, state.position, inverse_mass)
        phase = hmc.Phase(state.position, momentum, state.energy, state.gradient)
        for _ in range(num_steps):
            phase = hmc.leapfrog(potential, phase, 1.6 * torch.ones_like(step_size), inverse_mass)
        _, info = adjusted(potential, state, streams, step_size, num_steps, inverse_mass)
        return hmc.HMCState(phase.position, phase.energy, phase.gradient, state.step + 1), info

    monkeypatch.setattr(hmc, "step", always)
    log_weights = ais(vae, x, metrics.sigmoid_schedule(15), CHAINS, num_steps=3).log_weights
    assert (standard_errors(log_weights, vae.evidence(x)) > 5).any()


def test_tuned_step_sizes_are_frozen_per_temperature_and_row(simulated):
    vae, _, x = simulated
    potential = program.potential(vae, x)
    start = {"z": torch.zeros(4, 3)}
    pilot = HMCTransition(Streams.create(4, seed=0), torch.full((4,), 0.01), 2, tune=True)
    latents = start
    for step in range(30):
        latents = pilot(latents, potential, step)
    sizes = torch.stack(pilot.step_sizes)
    assert sizes.shape == (30, 4)
    assert (sizes[-1] > sizes[0]).all()
    frozen = HMCTransition(Streams.create(4, seed=0), sizes, 2)
    latents = start
    for step in range(30):
        latents = frozen(latents, potential, step)
    assert torch.equal(torch.stack(frozen.step_sizes), sizes)
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        HMCTransition(Streams.create(4, seed=0), sizes, 0)


def test_rows_do_not_see_each_other(simulated):
    vae, _, x = simulated
    sizes = torch.full((4,), 0.3)

    def move(images, rows):
        transition = HMCTransition(
            Streams(5, torch.arange(4)[rows], torch.zeros(4, dtype=torch.long)[rows]),
            sizes[rows],
        )
        return transition({"z": torch.ones(4, 3)[rows]}, program.potential(vae, images[rows]), 0)

    whole = move(x, slice(0, 4))["z"]
    torch.testing.assert_close(move(x, slice(2, 3))["z"], whole[2:3])


def test_constrained_latents_walk_without_a_metric():
    vae = HierarchicalVAE()
    x = torch.rand(2, 1, 4, 4)
    assert guide_variance(vae, x) is None
    result = ais(vae, x, metrics.sigmoid_schedule(4), 2, num_steps=2)
    assert result.log_weights.isfinite().all()


def test_a_walk_needs_an_inner_temperature(simulated):
    vae, _, x = simulated
    with pytest.raises(ValueError, match=r"schedule has 2 temperatures.*metrics\.nll"):
        ais(vae, x, [0.0, 1.0])
