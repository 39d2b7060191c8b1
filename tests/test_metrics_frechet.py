"""Fréchet distances, against closed forms and SciPy's matrix square root."""

from __future__ import annotations

import sys

import pytest
import scipy.linalg
import torch

from pyro_vae_defence import metrics


def test_distance_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 5, generator=generator, dtype=torch.float64) @ torch.diag(
        torch.tensor([3.0, 1.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    )
    b = 0.5 + torch.randn(100, 5, generator=generator, dtype=torch.float64)
    root = scipy.linalg.sqrtm((a.mT.cov() @ b.mT.cov()).numpy()).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + (a.mT.cov() + b.mT.cov()).trace()
    expected = expected - 2 * float(root.trace())
    torch.testing.assert_close(metrics.frechet_distance(a, b), expected)
    torch.testing.assert_close(metrics.frechet_distance(b, a), expected)


def test_distance_of_shifted_features_is_the_squared_shift():
    a = torch.randn(50, 3, dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert float(metrics.frechet_distance(a, a + shift)) == pytest.approx(5.25)
    assert float(metrics.frechet_distance(a, a)) == pytest.approx(0.0, abs=1e-12)
    # More features than images: covariances are singular, the distance stays defined.
    few = torch.randn(4, 30, dtype=torch.float64)
    assert float(metrics.frechet_distance(few, few + 1.0)) == pytest.approx(30.0, rel=1e-6)


def test_frechet_of_images_runs_the_extractor_in_chunks():
    sizes = []

    def extractor(images):
        sizes.append(len(images))
        return images.mean((2, 3))

    x, y = torch.rand(7, 3, 4, 4), torch.rand(5, 3, 4, 4)
    found = metrics.frechet(x, y, extractor, rows=3)
    torch.testing.assert_close(found, metrics.frechet_distance(x.mean((2, 3)), y.mean((2, 3))))
    assert sizes == [3, 3, 1, 3, 2]


def test_an_extractor_is_in_eval_mode_and_stays_as_it_was():
    """Dropout would be drawn, and batch norm would couple images and move its averages."""
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.5)
    ).train()
    x, y = torch.rand(2, 8, 1, 4, 4)
    found = metrics.frechet(x, y, network)
    assert network.training
    assert int(network[1].num_batches_tracked) == 0
    expected = metrics.frechet_distance(network.eval()(x), network(y))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("distance", [metrics.fid, lambda *a: metrics.frechet(*a, torch.flatten)])
def test_images_of_another_range_are_refused(distance):
    x = torch.rand(4, 1, 28, 28)
    for other in (255 * x, (255 * x).byte(), -x, x * torch.nan, x.numpy()):
        for name, pair in (("x", (other, x)), ("y", (x, other))):
            with pytest.raises(ValueError, match=f"^{name} (must|is not finite)"):
                distance(*pair)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match="rows must be an integer of at least 1, got 0"):
        metrics.frechet(torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4), torch.flatten, rows=0)
    with pytest.raises(ValueError, match=r"features has shape \(1, 3\): pass \(N, F\)"):
        metrics.frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"other has shape \(5, 2\)"):
        metrics.frechet_distance(torch.zeros(5, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="what extractor returns must be a tensor, got a ndarray"):
        metrics.frechet(*2 * [torch.rand(2, 1, 4, 4)], lambda x: x.flatten(1).numpy())


def test_fid_names_what_is_missing(tmp_path, monkeypatch):
    x = torch.rand(4, 1, 28, 28)
    with pytest.raises(ValueError, match="weights_path='.*none.pth' is no file"):
        metrics.fid(x, x, tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"x has shape \(4, 2, 28, 28\)"):
        metrics.fid(x.repeat(1, 2, 1, 1), x)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match=r"pip install 'pyro-vae-defence\[metrics\]'"):
        metrics.fid(x, x)


def test_fid_feeds_colour_images_of_both_sets_to_torchmetrics(monkeypatch):
    """Where torchmetrics is installed, through its real class with a small network for
    Inception."""
    module = pytest.importorskip("torchmetrics.image.fid")

    class Small(torch.nn.Module):
        num_features = 3

        def forward(self, images):
            return images.mean((2, 3))

    class Patched(module.FrechetInceptionDistance):
        def __init__(self, **options):
            assert options == {"normalize": True, "feature_extractor_weights_path": None}
            super().__init__(feature=Small(), normalize=True)

    monkeypatch.setattr(module, "FrechetInceptionDistance", Patched)
    x, y = torch.rand(60, 3, 8, 8), 0.5 * torch.rand(70, 3, 8, 8)
    expected = metrics.frechet(x, y, lambda images: images.mean((2, 3)))
    assert float(metrics.fid(x, y)) == pytest.approx(float(expected), rel=1e-3)
