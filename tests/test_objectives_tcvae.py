"""Total correlation: loops, exact enumeration, a Gaussian aggregate posterior in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from objectives_programs import LinearVAE, gradients
from torch import Tensor

from pyro_vae_defence.objectives import BetaELBO, BetaTCVAE
from pyro_vae_defence.objectives.tcvae import _stratified_log_weights, total_correlation

ESTIMATORS = ["mws", "mss", "published"]


def batch(m: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    loc = torch.randn(m, d, dtype=torch.float64)
    scale = torch.rand(m, d, dtype=torch.float64) + 0.3
    return loc + scale * torch.randn_like(loc), loc, scale


def loops(z: Tensor, loc: Tensor, scale: Tensor, n: int, estimator: str) -> list[float]:
    """The definitions, one scalar at a time."""
    m, dims = z.shape

    def density(i: int, j: int, d: int) -> float:
        u = (z[i, d] - loc[j, d]).item() / scale[j, d].item()
        return math.exp(-0.5 * u * u) / (scale[j, d].item() * math.sqrt(2 * math.pi))

    def weight(i: int, j: int) -> float:
        if estimator != "mss":
            return 1 / (n * m)
        if i == j:
            return 1 / n
        return (n - (m - 1)) / (n * (m - 1)) if j == (i + 1) % m else 1 / (m - 1)

    result = []
    for i in range(m):
        pairs = [(j, i) if estimator == "published" else (i, j) for j in range(m)]
        joint = sum(
            weight(*pair) * math.prod(density(*pair, d) for d in range(dims)) for pair in pairs
        )
        marginals = [sum(weight(*pair) * density(*pair, d) for pair in pairs) for d in range(dims)]
        result.append(math.log(joint) - sum(math.log(marginal) for marginal in marginals))
    return result


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("m", [2, 3, 7])
def test_equals_loops(estimator: str, m: int) -> None:
    z, loc, scale = batch(m, 3)
    expected = torch.tensor(loops(z, loc, scale, 20, estimator), dtype=torch.float64)
    torch.testing.assert_close(total_correlation(z, loc, scale, 20, estimator), expected)


def test_estimators_differ() -> None:
    z, loc, scale = batch(7, 3)
    values = [total_correlation(z, loc, scale, 20, estimator) for estimator in ESTIMATORS]
    for one, other in itertools.combinations(values, 2):
        assert (one - one.mean() - other + other.mean()).abs().max() > 1e-2


@pytest.mark.parametrize(("n", "m"), [(5, 2), (5, 3), (5, 4), (5, 5)])
def test_stratified_density_is_unbiased(n: int, m: int) -> None:
    # All batches that hold image 0, in every order: their average is the mean over the data set.
    values = torch.rand(n, dtype=torch.float64)
    weights = _stratified_log_weights(m, n).exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(m, dtype=torch.float64))
    for row in range(m):
        estimates = []
        for others in itertools.permutations(range(1, n), m - 1):
            members = [*others[:row], 0, *others[row:]]
            estimates.append(weights[row] @ values[members])
        torch.testing.assert_close(torch.stack(estimates).mean(), values.mean())


def equicorrelated(d: int, correlation: float, variance: float) -> Tensor:
    unit = (1 - correlation) * torch.eye(d) + correlation * torch.ones(d, d)
    return variance * unit.double()


def gaussian_batch(m: int, covariance: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Encodings N(x, noise^2) of images x ~ N(0, covariance), so that q(z) is Gaussian as well."""
    d = len(covariance)
    loc = torch.randn(m, d, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    scale = torch.full_like(loc, noise)
    return loc + scale * torch.randn_like(loc), loc, scale


def gaussian_total_correlation(total: Tensor) -> float:
    return 0.5 * (total.diagonal().log().sum() - total.logdet()).item()


@pytest.mark.parametrize("estimator", ["mws", "mss"])
def test_gaussian_aggregate_posterior_in_the_large_batch_limit(estimator: str) -> None:
    # Error to expect: the logarithm of a mean of M densities r = q(z|x) / q(z) is biased by
    # Var(r) / 2M to leading order, upwards when the sample's own encoding is among the M (mws of
    # all data), downwards when it is not (mss of vast data). For Gaussians Var(r) is
    # det(covariance + noise) / det(noise) - 1, so here the total correlation of .52 nats may be off
    # by .003. Against log q(z) - sum log q(z_d) at the same z, the sampling error is below .001;
    # the test allows 5 standard errors: false alarms have probability below 1e-6.
    m, repeats, noise = 400, 80, 1.0
    covariance = equicorrelated(3, 0.9, 2.0)
    total = covariance + noise**2 * torch.eye(3)
    joint = total.det().item() / noise**6 - 1
    marginals = (total.diagonal() / noise**2 - 1).sum().item()
    bias = (joint - marginals) / (2 * m)
    aggregate = torch.distributions.MultivariateNormal(torch.zeros(3).double(), total)
    marginal = torch.distributions.Normal(0.0, total.diagonal().sqrt())
    data_size, offset = (m, 2 * math.log(m)) if estimator == "mws" else (10**9, 0.0)
    errors = []
    for _ in range(repeats):
        z, loc, scale = gaussian_batch(m, covariance, noise)
        exact = aggregate.log_prob(z) - marginal.log_prob(z).sum(1)
        estimate = total_correlation(z, loc, scale, data_size, estimator) - offset
        errors.append((estimate - exact).mean())
    values = torch.stack(errors)
    standard_error = values.std().item() / math.sqrt(repeats)
    assert standard_error < 1e-3
    assert abs(values.mean().item()) < 5 * standard_error + bias
    assert gaussian_total_correlation(total) > 50 * (5 * standard_error + bias)


@pytest.mark.parametrize("estimator", ["mws", "mss"])
def test_a_paper_sized_batch_barely_sees_the_total_correlation(estimator: str) -> None:
    # 64 latents, batches of 128, a sharp encoder; true total correlations of 0 and of 27 nats. The
    # estimates differ by less than a fifth of that, which is about 7 standard errors.
    m, d, noise, repeats = 128, 64, 0.1, 10
    estimates, truths = [], []
    for correlation in (0.0, 0.6):
        covariance = equicorrelated(d, correlation, 1.0)
        truths.append(gaussian_total_correlation(covariance + noise**2 * torch.eye(d)))
        batches = [gaussian_batch(m, covariance, noise) for _ in range(repeats)]
        values = [total_correlation(*batch, 55_000, estimator).mean() for batch in batches]
        estimates.append(torch.stack(values).mean().item())
    assert truths[0] == pytest.approx(0, abs=1e-9)
    assert truths[1] == pytest.approx(26.6, abs=0.1)
    assert abs(estimates[1] - estimates[0]) < truths[1] / 5


def test_beta_weights_the_total_correlation() -> None:
    vae = LinearVAE()
    x = torch.rand(6, 1, 2, 3, dtype=torch.float64)
    runs = {}
    for name, objective in {
        "elbo": BetaELBO(),
        "one": BetaTCVAE(1.0, 50),
        "five": BetaTCVAE(5.0, 50),
        "schedule": BetaTCVAE(lambda step: 5.0 + step, 50),
    }.items():
        torch.manual_seed(2)
        runs[name] = objective.terms(vae.model, vae.guide, x)
    torch.testing.assert_close(runs["one"]["loss"], runs["elbo"]["loss"])
    expected = runs["elbo"]["loss"] + 4 * runs["one"]["total_correlation"]
    torch.testing.assert_close(runs["five"]["loss"], expected)
    torch.testing.assert_close(runs["schedule"]["loss"], expected)
    assert (runs["five"]["loss"] - runs["elbo"]["loss"]).abs().min() > 1e-3


def test_decoder_and_shifts_do_not_feel_the_total_correlation() -> None:
    vae = LinearVAE()
    x = torch.rand(6, 1, 2, 3, dtype=torch.float64)
    found = []
    for objective in (BetaELBO(), BetaTCVAE(5.0, 50)):
        vae.zero_grad()
        torch.manual_seed(2)
        objective.loss_and_grads(vae.model, vae.guide, x)
        found.append(gradients(vae))
    for name, gradient in found[0].items():
        # Nor does a shift of all encodings, of which the total correlation is invariant.
        untouched = name.startswith("decoder") or name == "encoder.offset"
        assert torch.allclose(gradient, found[1][name]) == untouched


def test_large_distances_do_not_overflow() -> None:
    z, loc, scale = (value.float() for value in batch(8, 4))
    for estimator in ESTIMATORS:
        value = total_correlation(1e3 * z, 1e3 * loc, 1e-3 * scale, 8, estimator)
        assert value.isfinite().all()


def test_arguments_are_checked() -> None:
    z, loc, scale = batch(4, 2)
    with pytest.raises(ValueError, match="estimator='mean'"):
        BetaTCVAE(2.0, 10, "mean")
    with pytest.raises(ValueError, match="estimator='mean'"):
        total_correlation(z, loc, scale, 10, "mean")
    with pytest.raises(ValueError, match=r"data_size must lie in \[1, inf\), got 0"):
        BetaTCVAE(2.0, 0)
    with pytest.raises(ValueError, match="data_size=3 is smaller than the batch of 4"):
        total_correlation(z, loc, scale, 3)
    with pytest.raises(ValueError, match="at least 2 images"):
        total_correlation(z[:1], loc[:1], scale[:1], 10, "mss")
    with pytest.raises(ValueError, match=r"beta must be a positive finite number, got 0\.0"):
        BetaTCVAE(0.0, 10)
