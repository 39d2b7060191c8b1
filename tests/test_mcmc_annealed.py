"""Walks through temperatures against masses of Gaussians in half-spaces, known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_vae_defence.mcmc import annealed
from pyro_vae_defence.metrics import sigmoid_schedule
from pyro_vae_defence.ops.streams import Streams

WALKS, IMAGES = 4, 300
MEAN, SCALE, CONSTANT = 1.5, 0.5, 7.0
"""Of the target: exp(CONSTANT) N(z_1; MEAN, SCALE^2) N(z_2; 0, 1), in the set z_1 < 1."""


def base(latents):
    """Standard Gaussian restricted to z_1 < 1, normalised there."""
    z = latents["z"]
    inside = math.log(0.5 * (1 + math.erf(1 / math.sqrt(2))))
    return 0.5 * z.square().sum(-1) + math.log(2 * math.pi) + inside


def target(latents):
    z = latents["z"]
    away = torch.stack([(z[:, 0] - MEAN) / SCALE, z[:, 1]], -1)
    return 0.5 * away.square().sum(-1) + math.log(2 * math.pi * SCALE) - CONSTANT


def margin(latents, rows):
    return 1.0 - latents["z"][:, 0]


def allowed(latents):
    return latents["z"][:, 0] < 1.0


TRUTH = CONSTANT + math.log(0.5 * (1 + math.erf((1 - MEAN) / SCALE / math.sqrt(2))))


def from_set(mean, scale, number, generator):
    """Exact draws of N(mean, scale^2) x N(0, 1) in the set, by rejection."""
    z = torch.randn(40 * number, 2, generator=generator)
    z[:, 0] = mean + scale * z[:, 0]
    return {"z": z[z[:, 0] < 1.0][:number]}


def walk(falling=False, walks=WALKS, **options):
    generator = torch.Generator().manual_seed(3)
    schedule = sigmoid_schedule(40)
    start = from_set(*((MEAN, SCALE) if falling else (0.0, 1.0)), walks * IMAGES, generator)
    streams = Streams.create(IMAGES, walks, seed=5)
    arguments = {
        "schedule": schedule.flip(0) if falling else schedule,
        "step_sizes": torch.full((39,), 0.4),
        "num_steps": 2,
        "margin": margin,
        **options,
    }
    return annealed.walk(target, base, start, walks, streams=streams, **arguments)


def standard_errors(log_values):
    """How many standard errors the mean of exp(log_values) is from 1."""
    values = log_values.exp()
    return float((values.mean() - 1) / (values.std() / len(values) ** 0.5))


# Fails for one right implementation in 15,000 per direction (four standard errors).
@pytest.mark.parametrize("walks", [1, WALKS])
def test_mean_weights_are_the_mass_in_the_set(float64, walks):
    found = walk(walks=walks)
    assert abs(standard_errors(found.log_mass - TRUTH)) < 4
    assert bool(allowed(found.end.position).all())
    # Without the set the mass would be another, which this could not be told from otherwise.
    assert abs(standard_errors(found.log_mass - CONSTANT)) > 20


def test_falling_walks_have_the_inverse_of_the_mass(float64):
    found = walk(falling=True)
    assert abs(standard_errors(TRUTH - found.log_mass)) < 4
    # By Jensen's inequality the two directions hold the truth between them, in expectation.
    assert walk().log_mass.mean() < TRUTH < found.log_mass.mean()


def test_walks_end_as_draws_of_the_target(float64):
    """Drawn anew by their weights: means of many walks, within four standard errors."""
    ends = walk(walks=40).end.position["z"]
    exact = from_set(MEAN, SCALE, 10_000, torch.Generator().manual_seed(8))["z"]
    by_image = ends.view(40, IMAGES, 2).mean(0)
    for number in range(2):
        means = by_image[:, number]
        error = ((means.var() / IMAGES) + exact[:, number].var() / len(exact)).sqrt()
        assert abs(means.mean() - exact[:, number].mean()) < 4 * error


def test_variance_tells_the_spread_of_estimates(float64):
    found = walk(walks=20)
    true = (found.log_mass - TRUTH).exp().var()
    assert 0.6 < float(found.variance.mean() / true) < 1.7
    assert bool(((found.effective >= 1) & (found.effective <= 20)).all())


def test_mass_and_variance_of_walks_that_stand_still(float64):
    """Steps of size 0, so that all is known but who is drawn: nobody of the first image, whose
    weights are even, and families of walks of the second one, at both inner temperatures."""
    gains = torch.tensor([
        [0.1, 0.2, -0.1, 0.0, 0.3, 0.0, 0.4, -0.2],
        [0.0, 110.0, 0.0, 120.0, 90.0, 0.0, 100.0, 0.0],
    ]).T  # fmt: skip
    streams, schedule = Streams.create(2, 8, seed=5), [0.0, 0.04, 0.3, 1.0]
    found = annealed.walk(
        lambda latents: -latents["z"][:, 0], lambda latents: 0.0 * latents["z"][:, 0],
        {"z": gains.reshape(16, 1)}, 8, schedule, streams, torch.zeros(2), 1,
    )  # fmt: skip
    even = gains[:, 0].softmax(0)
    assert float(found.log_mass[0]) == pytest.approx(math.log(gains[:, 0].exp().mean()))
    assert float(found.variance[0]) == pytest.approx(float((even - 1 / 8).square().sum() * 8 / 7))
    gain, family, log_mass = gains[:, 1], torch.arange(8), 0.0
    for step, rise in enumerate((0.04, 0.26)):
        weights = (rise * gain).exp()
        log_mass += math.log(weights.mean())
        assert weights.sum().square() / weights.square().sum() < 4
        drawn = annealed._redraw(torch.stack([0 * gain, rise * gain], 1), streams, step)[:, 1]
        gain, family = gain[drawn], family[drawn]
    weights = (0.7 * gain).exp()
    assert float(found.log_mass[1]) == pytest.approx(log_mass + math.log(weights.mean()))
    shares = torch.stack([weights[family == each].sum() for each in range(8)]) / weights.sum()
    variance = float((shares - 1 / 8).square().sum() * 8 / 7)
    assert float(found.variance[1]) == pytest.approx(variance)


def test_one_walk_knows_nothing_of_its_spread(float64):
    assert walk(walks=1, schedule=[0.0, 0.5, 1.0]).variance.unique().tolist() == [1.0]


def test_redrawing_is_by_weights_and_systematic(float64):
    weights = torch.tensor([[0.5, 0.0], [0.24, 1.0], [0.26, 0.0], [0.0, 0.0]])
    counts = torch.zeros(4, 2)
    for seed in range(200):
        drawn = annealed._redraw(weights.log(), Streams.create(2, 4, seed=seed), 0)
        count = torch.stack([(drawn == walk).sum(0) for walk in range(4)]).double()
        assert bool(((count - 4 * weights).abs() < 1).all())
        counts += count / 200
    # The second walk of the first image is drawn once in 24 of 25 times.
    assert torch.allclose(counts, 4 * weights, rtol=0, atol=0.08)


def test_images_do_not_see_each_other(float64):
    """An image's walks are the same beside others and alone, bit for bit."""
    start = from_set(0.0, 1.0, 8, torch.Generator().manual_seed(3))
    options = dict(schedule=sigmoid_schedule(6), step_sizes=torch.full((5,), 0.4), num_steps=2)
    streams = Streams.create(2, 4, seed=5)
    both = annealed.walk(target, base, start, 4, streams=streams, margin=margin, **options)
    mine = torch.arange(4) * 2 + 1
    own = Streams(5, streams.image[mine], streams.chain[mine])
    alone = {"z": start["z"][mine]}
    one = annealed.walk(target, base, alone, 4, streams=own, margin=margin, **options)
    assert torch.equal(both.log_mass[1:], one.log_mass)
    assert torch.equal(both.end.position["z"][mine], one.end.position["z"])


def test_tuning_moves_towards_the_acceptance_wanted(float64):
    sizes = torch.full((29,), 3.0)
    options = {"schedule": sigmoid_schedule(30), "step_sizes": sizes, "margin": None}
    wild, tuned = walk(**options), walk(**options, tune=True)
    aim = annealed.TARGET_ACCEPTANCE
    end = tuned.acceptance_rate[-5:].mean()
    assert abs(end - aim) < 0.5 * abs(wild.acceptance_rate[-5:].mean() - aim)
    assert torch.equal(wild.step_sizes, sizes[:, None].expand_as(wild.step_sizes))
