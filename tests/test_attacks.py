"""Attacks: constraints hold exactly, the published optimiser step by step, one row per image."""

from __future__ import annotations

import math

import pytest
import torch
from programs import BatchNormVAE, LinearGaussianVAE

from pyro_vae_defence import attacks
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.streams import Streams


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
    start = 0.2 * float(Streams.create(1, seed=seed).normal(0, 0, (1, 1, 1), torch.float32))
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


def test_published_rate_is_that_of_torchs_plateau_rule(float64):
    """Of values that rise, stand, rise by less than its threshold, fall, half recover, and rise."""
    values = [1.0, 1.1, *22 * [1.1], *(1.1 + 4e-6 * k for k in range(24))]
    values += [*12 * [0.5], *12 * [0.9], 1.2, *23 * [1.2]]
    parameter = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    rule = torch.optim.lr_scheduler.ReduceLROnPlateau(parameter, "max", factor=0.5, patience=20)
    expected, seen = [], []
    for value in values:
        expected.append(1e-4 * rule.get_last_lr()[0])
        rule.step(value)

    def prepare(x_ref):
        def objective(v):
            seen.append(v.item())
            return (values[min(len(seen), len(values)) - 1] + 1e-4 * (v - v.detach())).flatten()

        return objective

    generator = torch.Generator().manual_seed(1)
    x = torch.full((1, 1, 1, 1), 0.5)
    attacks.PGD(prepare, Linf(0.4), num_steps=len(values), preset="paper")(x, generator)
    steps = torch.tensor(seen).diff()[: len(values) - 1]
    # The first step may bring the start into the ball, too.
    assert torch.allclose(steps[1:], torch.tensor(expected[1:-1]), rtol=0, atol=1e-12)
    assert len(set(expected)) == 5


def test_generator_decides(tutorial_vae):
    x = torch.rand(2, 1, 28, 28)
    attack = attacks.PGD(attacks.symmetric_kl(tutorial_vae), Linf(0.1), 2)
    generator = torch.Generator().manual_seed(1)
    first = attack(x, generator).x_adv
    assert torch.equal(attack(x, generator.manual_seed(1)).x_adv, first)
    assert not torch.equal(attack(x, generator.manual_seed(2)).x_adv, first)


@pytest.mark.parametrize(
    ("value", "solved", "best"),
    [
        ([[1.0, 5.0], [2.0, 3.0]], None, [1, 0]),
        # Those that met the criterion first; none without a value.
        (
            [[1.0, 5.0, 2.0], [2.0, 3.0, 1.0], [3.0, 4.0, -torch.inf]],
            [[True, False, False], [True, True, False], [False, False, True]],
            [1, 1, 2],
        ),
        ([[torch.nan], [2.0]], None, [1]),
    ],
)
def test_best_takes_the_strongest_restart_per_image(value, solved, best):
    value = torch.tensor(value)
    solved = torch.zeros_like(value, dtype=torch.bool) if solved is None else torch.tensor(solved)
    # Whose pixel is the number of the restart.
    x_adv = torch.arange(len(value)).reshape(-1, 1, 1, 1, 1).expand(*value.shape, 1, 1, 1)
    count = torch.ones_like(value, dtype=torch.long)
    result = attacks.AttackResult(x_adv, value, x_adv[0], count, count, solved)
    assert result.best().flatten().tolist() == best


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


def test_the_encoder_is_attacked_in_eval_mode():
    vae = BatchNormVAE().train()
    objective = attacks.symmetric_kl(vae)(torch.rand(2, 1, 28, 28))
    objective(torch.rand(2, 1, 28, 28))
    assert vae.norm.num_batches_tracked == 0
    assert vae.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_restarts": 0}, "num_restarts must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"preset": "adam"}, "preset must be 'paper' or None, got 'adam'"),
        ({"ball": 0.1}, "ball must be a Ball such as Linf"),
        ({"objective": None}, "objective must be a prepared objective"),
        ({"objective": ConvVAE()}, r"such as symmetric_kl\(vae\), got a VAE, ConvVAE"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        attacks.PGD(**{"objective": lambda x_ref: None, "ball": Linf(0.1), **settings})


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
