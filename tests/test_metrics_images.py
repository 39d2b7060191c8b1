"""MS-SSIM, SSIM and MSE: golden values, symmetries, gradients, placement, errors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyro_vae_defence.metrics import images as images_module
from pyro_vae_defence.metrics import metric_name, ms_ssim, mse, ssim
from pyro_vae_defence.metrics.images import _relu_power
from pyro_vae_defence.ops.boundary import public

# Eleven pairs of the complete file: digits against noisy and against other digits (one scores 0).
PACKAGED = Path(__file__).parent / "data" / "paper_msssim_small.npz"
SHARED = Path(os.environ.get("PVD_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))

METRICS = {
    "ms_ssim[paper]": (ms_ssim, 28),
    "ms_ssim[standard]": (lambda x, y: ms_ssim(x, y, variant="standard"), 161),
    "ssim": (ssim, 28),
    "mse": (mse, 28),
}


@pytest.fixture(params=METRICS)
def metric_and_pair(request):
    metric, side = METRICS[request.param]
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4, 3, side, side, generator=generator)
    y = (x + 0.2 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    return metric, x, y


def assert_golden(path: Path, dtype: torch.dtype) -> None:
    with np.load(path) as golden:
        for kind in ("gray", "rgb"):
            a, b = (torch.from_numpy(golden[f"{kind}_{side}"]).to(dtype) for side in "ab")
            expected = torch.from_numpy(golden[f"{kind}_msssim"])
            assert (ms_ssim(a, b).double() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paper_variant_matches_the_packaged_golden_values(dtype):
    assert_golden(PACKAGED, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paper_variant_matches_all_golden_values(dtype):
    path = SHARED / "golden" / "paper_msssim.npz"
    if not path.exists():
        pytest.skip("the complete golden file is not on this machine")
    assert_golden(path, dtype)


def test_paper_variant_matches_its_formula_on_other_sizes():
    """The docstring's formula by plain convolutions, on sides where rows and columns differ."""
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(3, 2, 45, 70, generator=generator, dtype=torch.float64)
    y = (x + 0.3 * torch.rand(x.shape, generator=generator, dtype=torch.float64)) / 1.3
    expected = torch.ones(3, dtype=torch.float64)
    a, b = x, y
    for weight in (0.0448, 0.2856, 0.3001, 0.2363, 0.1333):
        size = min(14, *a.shape[-2:])
        g = torch.exp(-((torch.arange(size, dtype=torch.float64) - size // 2) ** 2) / 4.5)
        window = (torch.outer(g, g) / g.sum() ** 2).expand(2, 1, size, size)

        def mean(image, window=window):
            return F.conv2d(image, window, groups=2)

        m_a, m_b = mean(a), mean(b)
        contrast = (2 * (mean(a * b) - m_a * m_b) + 0.03**2) / (
            mean(a**2) - m_a**2 + mean(b**2) - m_b**2 + 0.03**2
        )
        luminance = (2 * m_a * m_b + 0.01**2) / (m_a**2 + m_b**2 + 0.01**2)
        last = weight == 0.1333
        term = (luminance * contrast if last else contrast).mean(dim=(1, 2, 3)).clamp(min=0)
        expected *= term ** (4 * weight) if last else term**weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    assert expected.min() > 0.1  # the comparison is about something
    torch.testing.assert_close(ms_ssim(x, y), expected, rtol=0, atol=1e-12)


def test_variants_differ_and_carry_their_names():
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(2, 1, 176, 176, generator=generator)
    y = (x + 0.5 * torch.rand(x.shape, generator=generator)) / 1.5
    assert (ms_ssim(x, y, "paper") - ms_ssim(x, y, "standard")).abs().min() > 1e-3
    assert metric_name("ms_ssim", "paper") == "ms_ssim[paper]"


def test_identical_images_score_one_and_have_no_error():
    x = torch.rand(3, 1, 161, 161, generator=torch.Generator().manual_seed(4))
    assert torch.equal(ms_ssim(x, x), torch.ones(3))
    for similarity in (ms_ssim(x, x, "standard"), ssim(x, x)):
        torch.testing.assert_close(similarity, torch.ones(3), rtol=0, atol=1e-5)  # float32
    assert torch.equal(mse(x, x), torch.zeros(3))


def test_constant_images_score_their_luminance(float64):
    black, white = torch.zeros(1, 1, 28, 28), torch.ones(1, 1, 28, 28)
    assert ms_ssim(black, black).item() == pytest.approx(1)
    luminance = 0.01**2 / (1 + 0.01**2)
    assert ms_ssim(black, white).item() == pytest.approx(luminance ** (4 * 0.1333), rel=1e-9)


def test_mse_is_on_the_255_scale():
    x = torch.zeros(2, 3, 28, 28)
    y = x.clone()
    y[0] += 0.1
    y[1, 0, 0, 0] = 1
    torch.testing.assert_close(mse(x, y), torch.tensor([25.5**2, 255**2 / (3 * 28**2)]))
    torch.testing.assert_close(mse(x, y, scale=1), mse(x, y) / 255**2)


def test_batch_equals_one_by_one(metric_and_pair):
    metric, x, y = metric_and_pair
    x, y = x.double(), y.double()
    together = metric(x, y)
    alone = torch.cat([metric(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    assert together.shape == (4,)
    assert together.unique().numel() == 4
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_order_of_the_pair_does_not_matter(metric_and_pair):
    metric, x, y = metric_and_pair
    x, y = x.double(), y.double()
    torch.testing.assert_close(metric(x, y), metric(y, x), rtol=1e-12, atol=1e-12)


def test_dtype_and_device_come_from_the_input(metric_and_pair):
    metric, x, y = metric_and_pair
    assert metric(x.double(), y.double()).dtype == torch.float64
    placed = metric(x.to("meta"), y.to("meta"))
    assert placed.device.type == "meta"
    assert placed.shape == (4,)


def test_gradient_reaches_only_the_image_it_belongs_to(metric_and_pair):
    metric, x, y = metric_and_pair
    y.requires_grad_()
    (gradient,) = torch.autograd.grad(metric(x, y)[1], y)
    assert gradient.isfinite().all()
    assert gradient[1].abs().max() > 0
    assert gradient[[0, 2, 3]].abs().max() == 0


def test_gradient_of_the_paper_variant_by_finite_differences():
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(2, 1, 17, 16, generator=generator, dtype=torch.float64)
    y = (x + 0.3 * torch.rand(x.shape, generator=generator, dtype=torch.float64)) / 1.3
    assert torch.autograd.gradcheck(ms_ssim, (x, y.requires_grad_()), fast_mode=True)


def test_gradient_is_zero_rather_than_nan_where_the_score_is_zero():
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(6))
    y = (1 - x).requires_grad_()  # negative covariance at every scale
    score = ms_ssim(x, y)
    assert torch.equal(score, torch.zeros(2))
    (gradient,) = torch.autograd.grad(score.sum(), y)
    assert torch.equal(gradient, torch.zeros_like(y))


def test_gradient_of_a_factor_is_zero_at_the_kink():
    base = torch.tensor([-1.0, 0.0, 4.0], requires_grad=True)
    power = _relu_power(base, 0.5)
    (gradient,) = torch.autograd.grad(power.sum(), base)
    assert power.tolist() == [0, 0, 2]
    assert gradient.tolist() == [0, 0, 0.25]


def images(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("metric", [ms_ssim, ssim, mse])
def test_pairs_that_do_not_fit_are_refused(metric):
    with pytest.raises(ValueError, match=r"x has shape \(2, 784\): reshape"):
        metric(images(2, 784), images(2, 784))
    with pytest.raises(ValueError, match=r"y has shape \(1, 1, 28, 28\) but x has"):
        metric(images(2, 1, 28, 28), images(1, 1, 28, 28))
    with pytest.raises(ValueError, match=r"dtype torch.uint8.*convert both"):
        metric(images(2, 1, 28, 28, dtype=torch.uint8), images(2, 1, 28, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"y has dtype torch\.float64"):
        metric(images(2, 1, 28, 28), images(2, 1, 28, 28, dtype=torch.float64))


@pytest.mark.parametrize("metric", [ms_ssim, ssim, mse])
def test_values_that_are_no_images_are_refused(metric, monkeypatch):
    x = torch.rand(3, 1, 28, 28)
    nothing = x.clone()
    nothing[1, 0, 3, 4] = torch.nan
    for pair, message in {
        (255 * x, x): r"x must lie in \[0, 1\], got values from .*x / 255 for 8-bit images",
        (x, 2 * x - 1): r"y must lie in \[0, 1\], got .* pass \(x \+ 1\) / 2",
        (x, nothing): r"y is not finite for 1 of 3 rows \(first rows: \[1\]\)",
    }.items():
        if metric is mse and pair[1].min() < 0:
            continue  # a decoded image may leave the range
        with pytest.raises(ValueError, match=message):
            metric(*pair)

    # Inside another call nothing waits for the device.
    looked = []
    monkeypatch.setattr(images_module, "check_range", lambda *args: looked.append(args))
    found = public(lambda: metric(x, x.flip(0)))()
    assert looked == []
    assert torch.equal(metric(x, x.flip(0)), found)
    assert len(looked) == (1 if metric is mse else 2)


def test_sizes_variants_and_scales_out_of_range_are_refused():
    small, tiny = images(1, 1, 160, 200), images(1, 1, 15, 28)
    with pytest.raises(ValueError, match="sides above 160 pixels: use variant='paper'"):
        ms_ssim(small, small, variant="standard")
    with pytest.raises(ValueError, match="sides of at least 16 pixels: use ssim"):
        ms_ssim(tiny, tiny)
    with pytest.raises(ValueError, match="sides of at least 11 pixels: resize"):
        ssim(tiny[..., :10, :], tiny[..., :10, :])
    with pytest.raises(ValueError, match="variant='published' is unknown: choose one of"):
        ms_ssim(small, small, variant="published")
    with pytest.raises(ValueError, match="scale must be a positive finite number, got 0"):
        mse(small, small, scale=0)
