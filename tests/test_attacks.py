"""Attacks: constraints hold exactly, the published optimiser step by step, one row per image."""

from __future__ import annotations

import math

import pytest
import torch
from programs import BatchNormVAE, LinearGaussianVAE

from pyro_vae_defence import attacks
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.ops.balls import L1, L2, Linf
from pyro_vae_defence.ops.streams import Streams

BALLS = [Linf(0.1), L2(1.0), L1(5.0)]
PRESETS = [None, "paper"]


def quadratic(target):
    """An objective with a known maximiser: minus the squared distance to ``target``."""

    def prepare(x_ref):
        return lambda x: -(x - target).square().flatten(1).sum(1)

    return prepare


@pytest.mark.parametrize("ball", BALLS, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_ball_and_range_hold_exactly(tutorial_vae, ball, preset):
    x = torch.rand(6, 1, 28, 28).round(decimals=1)
    attack = attacks.PGD(
        attacks.symmetric_kl(tutorial_vae), ball, num_steps=5, num_restarts=3, preset=preset
    )
    result = attack(x)
    assert result.x_adv.shape == (3, 6, 1, 28, 28)
    assert result.objective.shape == (3, 6)
    assert result.x_adv.min() >= 0
    assert result.x_adv.max() <= 1
    difference = (result.x_adv - x).flatten(0, 1)
    assert (ball.norm(difference) <= ball.radius).all()
    # The reported objective is that of the returned images.
    again = attacks.symmetric_kl(tutorial_vae)(x.repeat(3, 1, 1, 1))(result.x_adv.flatten(0, 1))
    assert torch.allclose(result.objective.flatten(), again, rtol=1e-4)


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.4)], ids=str)
def test_reaches_the_maximiser_of_a_quadratic(ball, float64):
    x, target = 0.5 * torch.ones(4, 1, 3, 3), torch.rand(4, 1, 3, 3)
    result = attacks.PGD(quadratic(target), ball, num_steps=200, step_size=0.01)(x)
    best = x + ball.project(target - x)
    assert torch.allclose(result.x_adv[0], best, atol=0.02)
    assert (result.objective[0] <= quadratic(target)(x)(best) + 1e-9).all()


def test_published_optimiser_step_by_step(float64):
    # One pixel, objective with gradient g(x): follow the text of the docstring by hand.
    x = torch.full((1, 1, 1, 1), 0.5)

    def prepare(x_ref):
        # Rises for a while, then is flat: the rate must halve once after 20 steps without
        # improvement.
        return lambda v: (0.001 * v).clamp(max=0.001 * 0.52).flatten()

    seen = []

    def recording(x_ref):
        inner = prepare(x_ref)

        def objective(v):
            seen.append(v.item())
            return inner(v)

        return objective

    torch.manual_seed(4)
    attack = attacks.PGD(recording, Linf(0.1), num_steps=4, preset="paper")
    attack(x)
    torch.manual_seed(4)
    seed = int(torch.randint(2**62, ()))
    start = 0.2 * float(Streams.create(1, seed=seed).normal(0, 0, (1, 1, 1)))
    eps = start
    expected = []
    for _ in range(4):
        expected.append(min(max(0.5 + eps, 0.0), 1.0))
        # The first value is outside the ball: eps is clamped only after the first step.
        gradient = 0.001 if 0.5 + eps <= 0.52 else 0.0
        eps = min(max(eps + gradient, -0.1), 0.1)
    assert seen[:4] == pytest.approx(expected)


def test_published_rate_is_halved_after_twenty_steps_without_improvement(float64):
    x = torch.full((1, 1, 1, 1), 0.5)
    values = []

    def prepare(x_ref):
        def objective(v):
            values.append(v.item())
            # Constant value, constant gradient: never an improvement after the first step.
            return (1e-4 * (v - v.detach()) + 1.0).flatten()

        return objective

    torch.manual_seed(1)
    attacks.PGD(prepare, Linf(0.4), num_steps=50, preset="paper")(x)
    steps = torch.tensor(values[:50]).diff()
    # Evaluation 1 sets the record; the 21st without improvement, evaluation 22, exceeds the
    # patience of 20 and halves the rate of the steps after its own. Differences of steps, the first
    # of which also brings the start into the ball.
    assert torch.allclose(steps[1:22], torch.full((21,), 1e-4), atol=1e-12)
    assert torch.allclose(steps[22:43], torch.full((21,), 5e-5), atol=1e-12)
    assert torch.allclose(steps[43:], torch.full((6,), 2.5e-5), atol=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.usefixtures("float64")
def test_result_does_not_depend_on_the_batch(tutorial_vae, preset):
    x = torch.rand(5, 1, 28, 28)

    def run(x, **settings):
        torch.manual_seed(3)
        attack = attacks.PGD(
            attacks.symmetric_kl(tutorial_vae), Linf(0.1), 4, preset=preset, **settings
        )
        return attack(x).x_adv

    whole = run(x, num_restarts=2)
    assert torch.allclose(run(x, num_restarts=2, batch_size=3), whole, rtol=0, atol=1e-12)
    assert torch.allclose(run(x[:1], num_restarts=2), whole[:, :1], rtol=0, atol=1e-12)
    assert not torch.equal(whole[0], whole[1])


def test_generator_decides(tutorial_vae):
    x = torch.rand(2, 1, 28, 28)
    attack = attacks.PGD(attacks.symmetric_kl(tutorial_vae), Linf(0.1), 2)
    generator = torch.Generator().manual_seed(1)
    first = attack(x, generator).x_adv
    assert torch.equal(attack(x, generator.manual_seed(1)).x_adv, first)
    assert not torch.equal(attack(x, generator.manual_seed(2)).x_adv, first)


def test_best_takes_the_strongest_restart_per_image():
    value = torch.tensor([[1.0, 5.0], [2.0, 3.0]])
    x_adv = torch.arange(4.0).reshape(2, 2, 1, 1, 1)
    count = torch.ones_like(value, dtype=torch.long)
    result = attacks.AttackResult(x_adv, value, x_adv[0], count, count, count > 1)
    assert result.best().flatten().tolist() == [2.0, 1.0]


def test_flat_keeps_each_image_beside_its_reference():
    value = torch.zeros(2, 3)
    x_adv = torch.arange(6.0).reshape(2, 3, 1, 1, 1)
    x_ref = torch.tensor([10.0, 20.0, 30.0]).reshape(3, 1, 1, 1)
    count = torch.zeros_like(value, dtype=torch.long)
    flat = attacks.AttackResult(x_adv, value, x_ref, count, count, count > 0).flat()
    assert flat.images.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert flat.references.flatten().tolist() == [10, 20, 30, 10, 20, 30]
    assert flat.index.tolist() == [0, 1, 2, 0, 1, 2]


def test_symmetric_kl_vanishes_with_its_gradient_at_the_reference():
    vae = LinearGaussianVAE()
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64).requires_grad_()
    value = attacks.symmetric_kl(vae)(x.detach())(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value.abs().max() == 0
    assert gradient.abs().max() == 0
    moved = attacks.symmetric_kl(vae)(x.detach())(x + 0.1)
    mean = program.posterior(vae, x)["z"].mean
    other = program.posterior(vae, x + 0.1)["z"].mean
    variance = program.posterior(vae, x)["z"].variance
    assert torch.allclose(moved, ((mean - other) ** 2 / (2 * variance)).sum(1))


def test_attack_beats_random_noise_of_equal_radius(tutorial_vae):
    x = torch.rand(20, 1, 28, 28)
    prepared = attacks.symmetric_kl(tutorial_vae)
    attacked = attacks.PGD(prepared, Linf(0.1))(x).objective[0]
    noise = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    assert (attacked > 2 * prepared(x)(noise)).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_without_a_finite_gradient_stay_in_the_ball(preset):
    def prepare(x_ref):
        # Infinite slope for the first image, an ordinary one for the second.
        slope = torch.tensor([torch.inf, 1.0]).reshape(-1, 1, 1, 1)
        return lambda x: (slope * x).flatten(1).sum(1)

    x = torch.full((2, 1, 2, 2), 0.5)
    result = attacks.PGD(prepare, Linf(0.1), 3, num_restarts=1, preset=preset)(x)
    assert result.x_adv.isfinite().all()
    assert (result.x_adv[0] - x).abs().max() <= 0.1


def test_best_takes_a_restart_that_met_the_criterion():
    value = torch.tensor([[1.0, 5.0, 2.0], [2.0, 3.0, 1.0], [3.0, 4.0, -torch.inf]])
    solved = torch.tensor([[True, False, False], [True, True, False], [False, False, True]])
    x_adv = torch.arange(9.0).reshape(3, 3, 1, 1, 1)
    count = torch.ones_like(value, dtype=torch.long)
    result = attacks.AttackResult(x_adv, value, x_adv[0], count, count, solved)
    assert result.best().flatten().tolist() == [3.0, 4.0, 8.0]


def test_best_ignores_restarts_without_a_value():
    value = torch.tensor([[torch.nan], [2.0]])
    x_adv = torch.arange(2.0).reshape(2, 1, 1, 1, 1)
    count = torch.ones_like(value, dtype=torch.long)
    result = attacks.AttackResult(x_adv, value, x_adv[0], count, count, count > 1)
    assert result.best().item() == 1.0


def test_the_encoder_is_attacked_in_eval_mode():
    vae = BatchNormVAE().train()
    objective = attacks.symmetric_kl(vae)(torch.rand(2, 1, 28, 28))
    objective(torch.rand(2, 1, 28, 28))
    assert vae.norm.num_batches_tracked == 0
    assert vae.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"num_restarts": 0}, "num_restarts must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"step_size": -0.1}, "step_size must be a positive finite number, got -0.1"),
        ({"preset": "adam"}, "preset must be 'paper' or None, got 'adam'"),
        ({"ball": 0.1}, "ball must be a Ball such as Linf"),
        ({"objective": None}, "objective must be a prepared objective"),
        ({"objective": ConvVAE()}, r"such as symmetric_kl\(vae\), got a VAE, ConvVAE"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        attacks.PGD(**{"objective": quadratic(0.0), "ball": Linf(0.1), **settings})


def test_bad_images(tutorial_vae):
    attack = attacks.PGD(attacks.symmetric_kl(tutorial_vae), Linf(0.1))
    with pytest.raises(ValueError, match="x_ref must lie in"):
        attack(2 * torch.ones(1, 1, 28, 28))
    with pytest.raises(ValueError, match=r"x_ref must have shape \(N, C, H, W\)"):
        attack(torch.ones(28, 28))
    with pytest.raises(ValueError, match="no callable attribute 'model'"):
        attacks.symmetric_kl(object())
    assert math.isfinite(float(attack(torch.ones(1, 1, 28, 28)).objective))


def test_a_result_is_shown_in_a_line():
    x = torch.rand(3, 1, 4, 4)
    objective = torch.tensor([[1.0, 2.0, torch.nan], [3.0, 0.0, 1.0]])
    zero = torch.zeros(2, 3)
    found = attacks.AttackResult(x.expand(2, 3, 1, 4, 4), objective, x, zero, zero, zero.bool())
    assert repr(found) == (
        "AttackResult(3 images (1, 4, 4), 2 restart(s), mean objective of the best 2)"
    )
