"""Controls: filters against brute force, the defences' interface, noise of an attack's size."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from programs import HierarchicalVAE
from scipy import ndimage

from pyro_vae_defence.attacks import random_noise
from pyro_vae_defence.defence import (
    EncoderDefence,
    clip_dark_pixels,
    clip_extreme_pixels,
    gaussian_filter,
    median_filter,
)
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import MLPClassifier
from pyro_vae_defence.ops.balls import L1, L2, Linf

FILTERS = {
    "none": None,
    "dark": functools.partial(clip_dark_pixels, delta=0.2),
    "extreme": functools.partial(clip_extreme_pixels, delta=0.2),
    "median": median_filter,
    "gaussian": gaussian_filter,
}


@pytest.mark.parametrize("name", FILTERS)
def test_contract_of_every_control(tutorial_vae, name):
    x = torch.rand(3, 1, 28, 28)
    result = EncoderDefence(tutorial_vae, 4, FILTERS[name])(x)
    assert result.samples["latent"].shape == (1, 4, 3, 5)
    assert torch.equal(result.samples["latent"][0, -1], result.latents["latent"])
    assert (result.samples["latent"][0, 0] != result.samples["latent"][0, 1]).all()
    assert result.initial["latent"].shape == (1, 3, 5)
    filtered = x if FILTERS[name] is None else FILTERS[name](x)
    assert torch.equal(result.x, filtered)
    decoded = program.decode(tutorial_vae, result.latents, (1, 28, 28))
    assert torch.equal(result.reconstruction, decoded)
    assert result.num_gradients.tolist() == [0, 0, 0]
    assert result.to_datatree()["posterior"]["latent"].shape == (1, 4, 3, 5)
    assert ("0.2" in result.settings["preprocess"]) == (name in ("dark", "extreme"))


def test_draws_follow_the_guide_at_the_filtered_image(linear_vae):
    x = torch.rand(2, 1, 4, 4)
    clip = functools.partial(clip_dark_pixels, delta=0.5)
    result = EncoderDefence(linear_vae, 5, clip)(x.repeat(400, 1, 1, 1))
    mean, covariance = linear_vae.exact(clip(x))
    draws = result.samples["z"][0].reshape(2000, 2, 3)
    sd = covariance.diagonal().sqrt()
    # 6 means, 5 standard errors each: error rate 4e-6. The unfiltered image's mean is elsewhere.
    assert ((draws.mean(0) - mean).abs() < 5 * sd / 2000**0.5).all()
    assert not ((draws.mean(0) - linear_vae.exact(x)[0]).abs() < 5 * sd / 2000**0.5).all()
    assert torch.allclose(draws.std(0), sd.expand(2, 3), rtol=0.1)


def test_hierarchies():
    assert EncoderDefence(HierarchicalVAE(), 2)(torch.rand(3, 1, 4, 4)).latents["rate"].min() > 0


def test_clips_undo_what_a_perturbation_did_to_the_extremes():
    x = torch.rand(50, 2, 6, 6).round()
    # Multiples of a power of two are added without rounding.
    noisy = (x + 0.125 * torch.randn(x.shape).sign()).clamp(0, 1)
    assert torch.equal(clip_extreme_pixels(noisy, 0.125), x)
    dark = clip_dark_pixels(noisy, 0.125)
    assert torch.equal(dark, torch.where(x == 0, 0.0, noisy))
    middle = torch.full((1, 1, 2, 2), 0.5)
    assert torch.equal(clip_extreme_pixels(middle, 0.25), middle)
    for clip in (clip_dark_pixels, clip_extreme_pixels):  # dark wins
        assert torch.equal(clip(middle, 0.5), torch.zeros_like(middle))


@pytest.mark.parametrize("size", [1, 3, 5])
def test_median_filter_is_scipys(size):
    x = torch.rand(2, 3, 7, 6)
    expected = ndimage.median_filter(x.numpy(), (1, 1, size, size), mode="nearest")
    assert torch.equal(median_filter(x, size), torch.from_numpy(expected))


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_gaussian_filter_is_scipys(sigma, float64):
    x = torch.rand(2, 3, 7, 6)
    expected = ndimage.gaussian_filter(
        x.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=3.0
    )
    # scipy rounds the cut-off to the nearest pixel, 1.5 to 2 and 3 to 3.
    assert torch.allclose(gaussian_filter(x, sigma), torch.from_numpy(expected), atol=1e-12)


@pytest.mark.parametrize("name", ["dark", "extreme", "median", "gaussian"])
def test_filters_stay_on_their_device(name):
    assert FILTERS[name](torch.rand(2, 1, 8, 8, device="meta")).device.type == "meta"


@pytest.mark.parametrize("ball", [Linf(0.125), L2(0.5), L1(0.125)], ids=str)
def test_noise_is_as_large_as_the_ball(ball):
    x = torch.full((40, 1, 6, 6), 0.5)
    noisy = random_noise(x, ball)
    size = ball.norm(noisy - x)
    assert (size <= ball.radius).all()
    assert torch.allclose(size, torch.full_like(size, ball.radius), rtol=1e-4)
    assert (noisy[0] != noisy[1]).any()
    dark = random_noise(torch.zeros(3, 1, 6, 6), ball)
    assert dark.min() == 0
    # Signs of L_inf noise are fair coins: 1440 of them, 5 standard errors, error rate 6e-7.
    if isinstance(ball, Linf):
        assert abs(float((noisy > x).double().mean()) - 0.5) < 5 * 0.5 / 1440**0.5
    x = x.double()
    torch.manual_seed(1)
    first = random_noise(x[:2], ball)
    torch.manual_seed(1)
    assert torch.allclose(random_noise(x, ball)[:2], first, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, x: EncoderDefence(v, clip_dark_pixels), "got a function; pass a filter by name"),
        (
            lambda v, x: EncoderDefence(v, preprocess=clip_dark_pixels),
            r"needs delta too; bind .*functools.partial\(clip_dark_pixels, delta=0.1\)",
        ),
        (lambda v, x: EncoderDefence(v, 0), "num_samples must be an integer of at least 1, got 0"),
        (lambda v, x: EncoderDefence(v, batch_size=0), "batch_size must be an integer"),
        (lambda v, x: EncoderDefence(v, preprocess=3), "preprocess must map images to images"),
        (lambda v, x: EncoderDefence(3), "vae must have two Pyro programs"),
        (lambda v, x: EncoderDefence(v, preprocess=lambda x: x[:1])(x), "must keep the shape"),
        (
            lambda v, x: EncoderDefence(v, preprocess=lambda x: x + 2)(x),
            r"preprocess\(x\) must lie",
        ),
        (lambda v, x: clip_dark_pixels(x, -0.1), r"delta must lie in \[0, 1\]"),
        (lambda v, x: clip_extreme_pixels(x, 1.5), r"delta must lie in \[0, 1\]"),
        (lambda v, x: median_filter(x, 2), "size must be an odd integer"),
        (lambda v, x: median_filter(x, "3"), "size must be an integer"),
        (lambda v, x: gaussian_filter(x, float("inf")), "sigma must be a positive finite number"),
        (lambda v, x: gaussian_filter(x, 0.0), "sigma must be a positive finite number"),
        (lambda v, x: median_filter(x[0]), r"shape \(N, C, H, W\).*got \(1, 28, 28\).*x\[None\]"),
        (lambda v, x: gaussian_filter(x[0]), r"x must have shape \(N, C, H, W\)"),
        (lambda v, x: gaussian_filter(x.byte()), "got torch.uint8; for 8-bit images use"),
        (lambda v, x: median_filter(x.byte()), "x must be floating point"),
        (lambda v, x: clip_extreme_pixels(x.byte(), 0.1), "x must be floating point"),
        (lambda v, x: random_noise(x, 0.1), "ball must be a Ball such as"),
        (lambda v, x: random_noise(x + 1, Linf(0.1)), r"x must lie in \[0, 1\]"),
    ],
)
def test_mistakes(tutorial_vae, call, message):
    with pytest.raises(ValueError, match=message):
        call(tutorial_vae, torch.rand(2, 1, 28, 28))


def test_numpys_numbers_are_numbers():
    x = torch.rand(1, 1, 5, 5)
    assert torch.equal(median_filter(x, np.int64(3)), median_filter(x, 3))
    assert MLPClassifier(2, 2, dropout=np.float32(0.5)).config["dropout"] == 0.5
