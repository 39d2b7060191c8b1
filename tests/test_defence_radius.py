"""Choosing, calibrating and scoring the assumed radius."""

from __future__ import annotations

import functools

import pytest
import torch

from pyro_vae_defence.defence import (
    MCMCDefence,
    NoDefence,
    PosteriorModeDefence,
    calibrate_radius,
    choose_radius,
    radius_probabilities,
    scores_by_radius,
)
from pyro_vae_defence.defence import radius as radius_module
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import program
from pyro_vae_defence.models.perturbation import UnknownRadius
from pyro_vae_defence.ops.balls import L2, Linf

RADII = (0.0, 0.1, 0.3, 0.6)
MODE = functools.partial(PosteriorModeDefence, optimiser="lbfgs", num_steps=15, initial="mean")


def clean_images(vae, num_images, noise=0.02):
    """Images the linear VAE explains well: decoded prior draws of small spread, a little noise."""
    z = {"z": 0.15 * torch.randn(num_images, 3)}
    mean = program.decode(vae, z, (1, 4, 4))
    return (mean + noise * torch.randn_like(mean)).clamp(0, 1)


@pytest.fixture
def vae(linear_vae):
    # Means around the middle of the valid range, and a likelihood that takes no noise for granted.
    linear_vae.bias = linear_vae.bias + 0.5
    linear_vae.noise = 0.03
    return linear_vae


def test_penalties_are_quantiles_of_the_clean_gains(vae):
    x = clean_images(vae, 40)
    half, most = (calibrate_radius(vae, x, RADII, quantile=q, num_steps=20) for q in (0.5, 0.95))
    assert half.radii == RADII
    assert half.penalties[0] == most.penalties[0] == 0.0
    for a, b in zip(half.penalties, half.penalties[1:], strict=False):
        assert 0 <= a < b + 1e-6
    assert all(a < b for a, b in zip(half.penalties[1:], most.penalties[1:], strict=True))
    # By definition: half of the images gain less than the penalty.
    result = MODE(vae, num_steps=20, perturbation=None)(x)
    other = MODE(vae, num_steps=20, perturbation=Linf(0.1))(x)
    gain = (other.sample_stats["lp"] - result.sample_stats["lp"]).flatten()
    assert ((gain < half.penalties[1]).float().mean() - 0.5).abs() <= 0.1
    split = calibrate_radius(vae, x, RADII, quantile=0.5, num_steps=20, batch_size=7)
    assert split.penalties == pytest.approx(half.penalties, abs=1e-3)


@pytest.mark.usefixtures("float64")
def test_a_penalty_is_the_order_statistic_that_promises_a_rate_for_further_images(vae):
    """Of n + 1 exchangeable gains the last is above the others' k-th smallest with a probability of
    1 - k / (n + 1): k is the least for which this is no more than 1 - quantile."""
    x = clean_images(vae, 5)

    def penalty(images, quantile):
        return calibrate_radius(vae, images, (0.1,), quantile=quantile, num_steps=2).penalties[0]

    gains = sorted(penalty(image, 0.95) for image in x.split(1))
    for quantile, k in ((0.0, 1), (1 / 3, 2), (0.5, 3), (0.6, 4), (0.8, 5), (0.95, 5), (1.0, 5)):
        assert penalty(x, quantile) == pytest.approx(gains[k - 1], rel=1e-9)


def test_rounding_does_not_raise_the_rank_of_a_penalty(vae, monkeypatch):
    assert 25 * 0.28 > 7
    gains = torch.arange(1.0, 25.0)
    monkeypatch.setattr(radius_module, "_gains", lambda *args: gains[None])
    unknown = calibrate_radius(vae, clean_images(vae, 24), (0.1,), quantile=0.28)
    assert unknown.penalties == (7.0,)


def test_probabilities_tell_clean_images_from_attacked_ones(vae):
    x = clean_images(vae, 60)
    unknown = calibrate_radius(vae, x[:40], RADII, num_steps=20)
    x = x[40:]
    # Perturbations that no latents explain.
    x_adv = (x + 0.2 * torch.randn_like(x).sign()).clamp(0, 1)
    found = []
    for images in (x, x_adv):
        latents = MODE(vae, perturbation=unknown).encode(images)
        probability = radius_probabilities(vae, latents, images, unknown)
        assert probability.shape == (20, 4)
        assert torch.allclose(probability.sum(1), torch.ones(20))
        found.append(probability)
    # Most clean images keep radius 0; what is too small for an attack is excluded, what is too
    # large is not.
    assert found[0][:, 0].mean() > 0.7
    assert found[1][:, :2].sum(1).max() < 0.01


def test_probabilities_of_a_flattened_observation(tutorial_vae):
    x = torch.rand(3, 1, 28, 28)
    unknown = UnknownRadius(Linf, (0.1, 0.2), (0.0, 0.0))
    probability = radius_probabilities(tutorial_vae, {"latent": torch.zeros(3, 5)}, x, unknown)
    # Without penalties the larger ball is the likelier one.
    assert (probability[:, 1] > 0.5).all()


def test_scores_and_choice(vae):
    x = clean_images(vae, 12)

    def closeness(result):
        return -(result.reconstruction - x).square().flatten(1).mean(1)

    scores = scores_by_radius(vae, x, RADII, score=closeness, defence=MODE)
    assert scores.shape == (4, 12)
    for radius, row in zip(RADII, scores, strict=True):
        result = MODE(vae, perturbation=Linf(radius) if radius else None)(x)
        assert torch.allclose(row, closeness(result))
    # A larger ball explains more of a clean image away.
    assert scores[3].mean() < scores[0].mean()
    generator = torch.Generator().manual_seed(5)
    bound = float((scores[0] - scores[2]).mean()) + 1e-6
    choice = choose_radius(
        vae, x, RADII, max_clean_cost=bound, score=closeness, defence=MODE, generator=generator
    )
    assert choice.clean_costs.shape == (4, 12)
    means = choice.clean_costs.double().mean(1)
    assert choice.radius == max(r for r, c in zip(RADII, means, strict=True) if c <= bound)
    # The baseline is the undefended VAE, and all radii share their noise.
    seed = torch.Generator().manual_seed(5)
    seed = int(torch.randint(2**62, (), generator=seed))
    undefended = closeness(NoDefence(vae)(x, torch.Generator().manual_seed(seed)))
    assert torch.allclose(choice.clean_costs, undefended - scores, atol=1e-6)


def test_the_largest_radius_that_costs_no_more_than_the_bound_is_chosen(vae):
    """In any order of the candidates, and with the same noise for all of them and no defence."""
    x = clean_images(vae, 2)
    costs, starts = {str(Linf(d)): 2.5 * d for d in (0.1, 0.2, 0.3)}, []
    defence = functools.partial(PosteriorModeDefence, num_steps=1, initial="guide")

    def score(result):
        starts.append(result.initial["z"])
        return torch.full((2,), -costs.get(result.settings.get("perturbation"), 0.0))

    # A mean of 0.5 is within a bound of 0.5.
    for bound, chosen in ((0.5, 0.2), (0.4, 0.1)):
        for generator in (None, torch.Generator().manual_seed(3)):
            starts.clear()
            choice = choose_radius(
                vae,
                x,
                (0.2, 0.3, 0.1),
                max_clean_cost=bound,
                score=score,
                defence=defence,
                generator=generator,
            )
            assert choice.radius == chosen
            assert choice.clean_costs[:, 0].tolist() == pytest.approx([0.5, 0.75, 0.25])
            assert all(torch.equal(start, starts[0]) for start in starts)
    with pytest.raises(ValueError, match=r"the least is 0.5\); allow more"):
        choose_radius(vae, x, (0.2, 0.3), max_clean_cost=0.2, score=score, defence=defence)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_scores_of_any_dtype_have_differences(vae, dtype):
    """An image that only the undefended VAE has right costs 1, one that only a defence has, -1."""
    right = iter([[1, 0, 1], [0, 1, 1], [1, 1, 1]])
    choice = choose_radius(
        vae,
        clean_images(vae, 3),
        (0.1, 0.2),
        max_clean_cost=0.0,
        score=lambda result: torch.tensor(next(right), dtype=dtype),
        defence=MODE,
    )
    assert choice.clean_costs.tolist() == [[1.0, -1.0, 0.0], [0.0, -1.0, 0.0]]
    assert choice.radius == 0.2


def test_a_chain_with_an_unknown_radius_records_it(vae):
    x = clean_images(vae, 2)
    unknown = UnknownRadius(L2, (0.0, 0.5), (0.0, 3.0))
    kernel = functools.partial(BatchedHMC, num_steps=2)
    result = MCMCDefence(vae, kernel, 3, 3, perturbation=unknown)(x)
    assert result.settings["perturbation"] == "UnknownRadius(L2, (0.0, 0.5), (0.0, 3.0))"
    energy = program.potential(vae, x, unknown)(result.latents)
    assert torch.allclose(-result.sample_stats["lp"][0, -1], energy, rtol=1e-4)


def test_arguments(vae):
    x = clean_images(vae, 3)
    with pytest.raises(ValueError, match=r"quantile must lie in \[0, 1\], got 95"):
        calibrate_radius(vae, x, RADII, quantile=95)
    with pytest.raises(ValueError, match="radii must be finite, >= 0 and increasing"):
        calibrate_radius(vae, x, (0.2, 0.1))
    for radii, message in (
        ("0.1", "radii must be several numbers, such as .*, got '0.1'"),
        (0.1, "radii must be several numbers"),
        ((0.1, -0.2), "each of radii must be at least 0 and finite, got -0.2"),
    ):
        with pytest.raises(ValueError, match=message):
            scores_by_radius(vae, x, radii, score=lambda result: 1 / 0)
        with pytest.raises(ValueError, match=message):
            choose_radius(vae, x, radii, max_clean_cost=0.1)
    with pytest.raises(ValueError, match="radii is empty"):
        scores_by_radius(vae, x, ())
    with pytest.raises(ValueError, match=r"score must return one number per row, shape \(3,\)"):
        scores_by_radius(vae, x, (0.1,), score=lambda result: result.x, defence=MODE)

    def only_small(vae, perturbation):
        if perturbation is not None and perturbation.radius > 0.1:
            raise ValueError(f"perturbation={perturbation} is too large")
        return MODE(vae, perturbation=perturbation)

    ran = []
    options = {"score": ran.append, "defence": only_small}
    for chosen in (scores_by_radius, functools.partial(choose_radius, max_clean_cost=0.1)):
        with pytest.raises(ValueError, match="is too large"):
            chosen(vae, x, (0.0, 0.1, 0.2), **options)
    assert not ran
    with pytest.raises(ValueError, match="keeps the clean cost within max_clean_cost=-10 "):
        choose_radius(
            vae,
            x,
            (0.1,),
            max_clean_cost=-10.0,
            score=lambda result: result.x.mean((1, 2, 3)),
            defence=MODE,
        )
