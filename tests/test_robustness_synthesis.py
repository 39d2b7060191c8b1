"""Attacks on analysis by synthesis: their gradients against masses on a grid, and that they lower
the margin, though not below the bound."""

from __future__ import annotations

import pytest
import torch
from test_defence_synthesis import (
    CLASSES,
    DELTA,
    EPSILON,
    LABELS,
    PlaneOfClass,
    exact_margin,
    grid_masses,
    make,
    seeded,
)

from pyro_vae_defence.attacks import APGD, PGD
from pyro_vae_defence.ops.balls import L2, Linf
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.robustness.synthesis import class_evidence, mass_margin


@pytest.fixture
def vae(float64):
    return PlaneOfClass()


@pytest.fixture
def x(vae):
    z = torch.randn(CLASSES, 2, generator=seeded(5))
    return vae.logits(z, torch.eye(CLASSES)).sigmoid()


def margins(vae, x):
    """Log-mass of the label less that of all other classes, ``(N,)``, by the grid."""
    masses = grid_masses(vae, x, Linf(DELTA))
    own = torch.eye(CLASSES, dtype=torch.bool)
    return masses[own] - masses.masked_fill(own, -torch.inf).logsumexp(1)


def test_attacks_lower_the_margin_and_not_below_the_bound(vae, x):
    classify = make(vae, Linf(DELTA), num_temperatures=4, num_walks=4)
    clean, (right, wrong) = margins(vae, x), exact_margin(vae, x, torch.zeros(CLASSES))
    bound = right - wrong.logsumexp(1)
    nearest = grid_masses(vae, x, Linf(DELTA)).fill_diagonal_(-torch.inf).argmax(1)
    ball = Linf(EPSILON)
    for attack in (
        APGD(mass_margin(classify, LABELS, seeded(1)), ball, num_steps=4),
        PGD(class_evidence(classify, LABELS, nearest, ball, generator=seeded(1)), ball, 6),
    ):
        attacked = margins(vae, attack(x, seeded(2)).best())
        random = margins(vae, (x + EPSILON * torch.randn(x.shape).sign()).clamp(0, 1))
        assert bool((attacked >= bound).all())
        assert bool((attacked < clean).all())
        # Most of what the bound allows, and more than noise takes.
        assert float((clean - attacked).sum()) > 0.5 * float((clean - bound).sum())
        assert float(attacked.sum()) < float(random.sum())


def test_noise_of_the_margin_is_the_same_at_every_call(vae, x):
    classify = make(vae, Linf(DELTA), num_temperatures=3, num_walks=2)
    objective = mass_margin(classify, LABELS, seeded(1))(x, Streams.create(CLASSES, seed=0))
    assert torch.equal(objective(x), objective(x))
    assert not torch.equal(objective(x), objective((x + 1e-3).clamp(0, 1)))


def test_another_kind_of_ball_is_refused(vae):
    for reach in (None, L2(0.1)):
        with pytest.raises(ValueError, match="kind"):
            class_evidence(make(vae, reach), LABELS, LABELS, Linf(EPSILON))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([0, 1, 2], "must be an int64 tensor .*got list"),
        (LABELS[:, None], "must be an int64 tensor"),
        (LABELS.double(), "must be integers from 0 on, got dtype torch.float64"),
        (LABELS + 1, r"must lie in 0\.\.2, got values from 1 to 3"),
        (LABELS - 1, r"must lie in 0\.\.2, got values from -1 to 1"),
    ],
)
def test_classes_are_refused_that_are_none(vae, classes, message):
    classify, ball = make(vae, Linf(DELTA)), Linf(EPSILON)
    for name, objective in (
        ("labels", lambda: mass_margin(classify, classes)),
        ("labels", lambda: class_evidence(classify, classes, LABELS, ball)),
        ("targets", lambda: class_evidence(classify, LABELS, classes, ball)),
    ):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            objective()


def test_classes_are_refused_that_are_not_the_images(vae, x):
    classify, ball = make(vae, Linf(DELTA)), Linf(EPSILON)
    with pytest.raises(
        ValueError, match="targets must differ from labels, but both are 1 at image"
    ):
        class_evidence(classify, LABELS, torch.tensor([1, 1, 0]), ball)
    with pytest.raises(
        ValueError, match=r"targets must have the shape of labels, \(3,\), got \(2,"
    ):
        class_evidence(classify, LABELS, torch.tensor([1, 2]), ball)
    with pytest.raises(ValueError, match="targets is on meta but labels on cpu"):
        class_evidence(classify, LABELS, torch.ones(3, dtype=torch.int64, device="meta"), ball)
    more = torch.tensor([0, 1, 2, 0])
    for objective, name in (
        (mass_margin(classify, more), "labels"),
        (class_evidence(classify, more, (more + 1) % 3, ball), "labels"),
    ):
        with pytest.raises(ValueError, match=f"{name} has 4 entries, but the attack has 3 images"):
            PGD(objective, ball, num_steps=1)(x)
