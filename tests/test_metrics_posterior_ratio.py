"""Log posterior ratio against a Gaussian, Kolmogorov-Smirnov against enumeration and scipy."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.stats
import torch

from pyro_vae_defence.metrics import ks_test, log_posterior_ratio


def test_ratio_of_a_gaussian_posterior():
    """p(z | x) = N(x/2, 1/2) for z ~ N(0, 1), x | z ~ N(z, 1); the evidence cancels."""
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    posterior = torch.distributions.Normal(x / 2, 0.5**0.5)

    def potential(latents):
        return 0.5 * latents["z"] ** 2 + 0.5 * (x - latents["z"]) ** 2

    z_1, z_2 = x / 2, torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    ratio = log_posterior_ratio(potential, {"z": z_1}, {"z": z_2})
    torch.testing.assert_close(ratio, posterior.log_prob(z_1) - posterior.log_prob(z_2))
    assert torch.equal(ratio, -log_posterior_ratio(potential, {"z": z_2}, {"z": z_1}))
    assert ratio[2] == 0  # the same latent
    assert (ratio[:2] > 0).all()  # the mode against another latent


def test_ratio_refuses_latents_that_do_not_belong_together():
    def potential(latents):
        return latents["z"].sum(-1)

    with pytest.raises(ValueError, match=r"latents_2 has sites {'w': .*pass latents of one model"):
        log_posterior_ratio(potential, {"z": torch.zeros(2, 3)}, {"w": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"latents_2 has sites {'z': \(1, 3\)}"):
        log_posterior_ratio(potential, {"z": torch.zeros(2, 3)}, {"z": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match=r"potential must return one number per row, shape \(2,\)"):
        log_posterior_ratio(lambda z: potential(z).sum(), *2 * [{"z": torch.zeros(2, 3)}])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 3), (4, 6), (5, 3)])
def test_p_value_counts_interleavings(n, m):
    """Every interleaving is equally likely: list them all."""
    tests = []
    for chosen in itertools.combinations(range(n + m), n):
        rest = sorted(set(range(n + m)) - set(chosen))
        tests.append(ks_test(torch.tensor(chosen).double(), torch.tensor(rest).double()))
    for test in tests:
        share = sum(t.statistic >= test.statistic - 1e-12 for t in tests) / len(tests)
        assert test.p_value == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize(
    ("n", "m", "shift"), [(50, 50, 0.3), (40, 75, 0.5), (500, 500, 0.15), (97, 101, 2.5)]
)
def test_agrees_with_scipy(n, m, shift):
    generator = torch.Generator().manual_seed(n + m)
    a = torch.randn(n, generator=generator)
    b = torch.randn(m, generator=generator) + shift
    ours, theirs = ks_test(a, b), scipy.stats.ks_2samp(a.numpy(), b.numpy(), method="exact")
    assert ours.statistic == pytest.approx(theirs.statistic, rel=1e-12)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-7)
    assert ks_test(b, a) == pytest.approx(ours, rel=1e-9)


def test_ties_and_extremes():
    same = torch.arange(5.0)
    assert ks_test(same, same) == (0.0, 1.0)
    apart = ks_test(same, same + 10)
    assert apart.statistic == 1
    assert apart.p_value == pytest.approx(2 / 252)  # two of C(10, 5) interleavings
    far = torch.arange(400.0)
    tiny = 2 / math.comb(800, 400)  # 1e-239, to full relative accuracy
    assert ks_test(far, far + 1000).p_value == pytest.approx(tiny, rel=1e-9, abs=0)
    tied = ks_test(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0]))
    assert tied.statistic == pytest.approx(1 / 3)


def test_ks_refuses_bad_samples():
    good = torch.zeros(3)
    with pytest.raises(ValueError, match=r"a has shape \(0,\): pass a vector"):
        ks_test(good[:0], good)
    with pytest.raises(ValueError, match=r"b has shape \(3, 1\): pass a vector"):
        ks_test(good, good[:, None])
    with pytest.raises(ValueError, match="b contains NaN"):
        ks_test(good, good * float("nan"))
