"""Noise of low frequency: what it is in closed form, and who takes it."""

from __future__ import annotations

import types

import pytest
import torch
from test_robustness import SMALL, classify, problem

from pyro_vae_defence import attacks
from pyro_vae_defence.attacks import adaptive
from pyro_vae_defence.attacks.noise import low_frequency_noise
from pyro_vae_defence.attacks.starts import in_turn, patches, stripes
from pyro_vae_defence.defence import DefendedClassifier, NoDefence
from pyro_vae_defence.ops.balls import L2, Linf
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.robustness import ATTACKS, WhiteBox
from pyro_vae_defence.robustness.scoring import Accuracy, Fresh
from pyro_vae_defence.robustness.suite import Suite

ROWS = {row.name: row for row in ATTACKS}
SHAPES = [(1, 28, 28), (3, 32, 32), (1, 30, 21), (2, 1, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_pixel_has_variance_one_and_channels_are_independent(shape, float64):
    def basis(step, purpose, event, dtype):
        size = torch.Size(event).numel()
        return torch.eye(size, dtype=dtype).reshape(size, *event)

    streams = types.SimpleNamespace(normal=basis, image=torch.arange(1))
    map_of_grid = low_frequency_noise(streams, 0, 0, shape, torch.float64)
    channels, height, width = shape
    assert len(map_of_grid) == channels * -(-height // 4) * -(-width // 4)
    torch.testing.assert_close(map_of_grid.square().sum(0), torch.ones(shape))
    covariance = torch.einsum("kchw,kdhw->cd", map_of_grid, map_of_grid) / (height * width)
    torch.testing.assert_close(covariance, torch.eye(channels))


def test_a_row_by_hand(float64):
    """Eight pixels of two grid points, which lie at pixels 1.5 and 5.5."""
    streams = types.SimpleNamespace(
        normal=lambda *_: torch.tensor([[[[1.0, 0.0]]]]), image=torch.arange(1)
    )
    found = low_frequency_noise(streams, 0, 0, (1, 1, 8), torch.float64).flatten()
    near = torch.tensor([1.0, 1.0, 0.875, 0.625, 0.375, 0.125, 0.0, 0.0])
    torch.testing.assert_close(found, near / (near.square() + (1 - near).square()).sqrt())


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_power_lies_in_low_frequencies(shape):
    """Most of it in a sixteenth of the plane, where white noise has a sixteenth."""
    streams = Streams.create(200, seed=1)
    noise = low_frequency_noise(streams, 0, 0, shape, torch.float32)
    assert noise.shape == (200, *shape)
    assert noise.dtype == torch.float32
    height, width = (torch.fft.fftfreq(size).abs() for size in shape[1:])
    low = (height[:, None] <= 1 / 8) & (width <= 1 / 8)

    def share(values):
        power = torch.fft.fft2(values).abs().square()
        return float(power[..., low].sum() / power.sum())

    assert share(noise) > 0.75
    assert share(streams.normal(0, 0, shape, torch.float32)) < 0.12


def test_rows_do_not_depend_on_the_batch():
    streams = Streams.create(3, 2, seed=5)
    whole = low_frequency_noise(streams, 1, 7, (3, 9, 10), torch.float32)
    one = Streams(streams.seed, streams.image[4:5], streams.chain[4:5])
    alone = low_frequency_noise(one, 1, 7, (3, 9, 10), torch.float32)
    torch.testing.assert_close(alone, whole[4:5])
    assert not torch.allclose(whole[0], whole[1])


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 10)], ids=str)
def test_patches_lie_at_corners_of_the_ball(shape, float64):
    x = torch.full((2, *shape), 0.5)
    flat = lambda x_ref: lambda y: torch.zeros(len(y), dtype=y.dtype)  # noqa: E731

    def first(ball, start):
        attack = attacks.Square(flat, ball, num_steps=1, num_restarts=3, start=start)
        return attack(x, torch.Generator().manual_seed(3)).x_adv - x

    found = first(Linf(0.1), patches())
    torch.testing.assert_close(found.abs(), torch.full_like(found, 0.1))
    torch.testing.assert_close(
        first(L2(0.3), patches()).flatten(2).norm(dim=2), torch.full((3, 2), 0.3)
    )
    # Neighbours mostly agree, both ways.
    for changes in (found.diff(dim=-1), found.diff(dim=-2)):
        assert float((changes != 0).double().mean()) < 0.25
    assert len({tuple(each.tolist()) for each in found.flatten(0, 1).flatten(1)}) == 6
    turns = first(Linf(0.1), in_turn(stripes(), patches()))
    assert torch.equal(turns[1], found[0])


def test_nes_along_directions_with_a_covariance(float64):
    """Of a linear objective the mean estimate is the covariance times its gradient: pixel by pixel
    within five standard errors; fails for one right implementation in 25,000."""
    copies, shape = 3000, (1, 6, 9)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def smooth(streams, step, purpose, like):
        return low_frequency_noise(streams, step, purpose, tuple(like.shape[1:]), like.dtype)

    objective = adaptive.nes(
        lambda x_ref: lambda x: (x * weight).flatten(1).sum(1), 2, 1e-3,
        torch.Generator().manual_seed(2), smooth,
    )  # fmt: skip
    x = torch.full((copies, *shape), 0.5, requires_grad=True)
    (found,) = torch.autograd.grad(objective(x.detach())(x).sum(), x)
    draws = smooth(Streams.create(20_000, seed=3), 0, 0, x)
    covariance = draws.flatten(1).mT.cov()
    expected = (covariance @ weight.flatten()).view(shape)
    error = found.std(0) / copies**0.5
    # That of the covariance itself is a sixth of the estimate's.
    assert float(((found.mean(0) - expected) / error).abs().max()) < 5
    assert float(((weight - expected) / error).abs().max()) > 20


class TestSuite:
    def suite(self, **options):
        torch.manual_seed(0)
        vae, x, labels = problem(4)
        fresh = Fresh(3)
        box = WhiteBox(vae, NoDefence(vae), x, fresh)
        scorer = Accuracy(box, x, labels, DefendedClassifier(box, classify, "last"), fresh)
        return Suite(box, scorer, x, Linf(0.3), SMALL, attacks.APGD, **options)

    def test_every_second_restart_of_the_black_box_is_smooth(self, monkeypatch):
        suite, seen = self.suite(), []
        gradient = adaptive.antithetic_gradient

        def watched(value, direction, num_pairs, scale):
            seen.append(direction(0))
            return gradient(value, direction, num_pairs, scale)

        monkeypatch.setattr(adaptive, "antithetic_gradient", watched)
        suite.attack(ROWS["black_box"], 1, num_restarts=4, num_steps=1)
        restarts = seen[0].unflatten(0, (4, 4))
        # Images of four pixels a side have one grid point: all pixels are one number.
        constant = restarts.flatten(2).std(2) < 1e-12
        assert constant.all(1).tolist() == [False, True, False, True]
        assert not constant[::2].any()
        # The first restart is what it was without the others.
        alone = self.suite().attack(ROWS["black_box"], 1, num_restarts=1, num_steps=2)
        both = self.suite().attack(ROWS["black_box"], 1, num_restarts=2, num_steps=2)
        white = adaptive.white_directions
        monkeypatch.setattr("pyro_vae_defence.robustness.suite._smooth_in_turn", lambda n: white)
        former = self.suite().attack(ROWS["black_box"], 1, num_restarts=2, num_steps=2)
        assert torch.equal(both[0], former[0])
        assert not torch.equal(both[1], former[1])
        assert torch.equal(alone, self.suite().attack(ROWS["black_box"], 1, num_steps=2))

    def test_square_starts_from_patches_in_turn(self):
        suite = self.suite()
        streams = Streams.create(4, 3, seed=1)
        x_ref = suite.x.repeat(3, 1, 1, 1)
        moved = (suite.start()(x_ref, streams) - x_ref).sign().unflatten(0, (3, 4))
        assert bool((moved[0] == moved[0][..., :1, :]).all())
        assert not bool((moved[1] == moved[1][..., :1, :]).all())
        assert bool((moved[2] == moved[2][..., :1, :1]).all())
        suite.scorer.labels = torch.zeros(4, dtype=torch.long)
        again = (suite.start()(x_ref, streams) - x_ref).sign().unflatten(0, (3, 4))
        assert torch.equal(again[0], moved[0])
        assert bool((again[1] == again[1][..., :1, :1]).all())
