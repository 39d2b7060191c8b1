"""Draws from streams: the right distribution, the right derivative, and no other row's business."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae_defence.attacks import maximum_damage
from pyro_vae_defence.models import program
from pyro_vae_defence.ops.draws import Noise, draw
from pyro_vae_defence.ops.streams import Streams

pytestmark = pytest.mark.usefixtures("float64")

NUM = 40_000


def make(name, num):
    return FAMILIES[name](lambda *values: torch.tensor(values).expand(num, -1))


FAMILIES = {
    "normal": lambda rows: dist.Normal(rows(1.0, -1.0), rows(0.5, 2.0)),
    "log-normal": lambda rows: dist.LogNormal(rows(0.1, 0.2), rows(0.5, 0.3)),
    "covariance": lambda rows: dist.MultivariateNormal(
        rows(1.0, 2.0), scale_tril=torch.tensor([[1.0, 0.0], [2.0, 0.5]])
    ),
    "low rank": lambda rows: dist.LowRankMultivariateNormal(
        rows(1.0, 2.0, 3.0), torch.tensor([[1.0], [2.0], [0.0]]), torch.tensor([1.0, 0.5, 2.0])
    ),
    "uniform": lambda rows: dist.Uniform(rows(-1.0, 0.0), rows(1.0, 3.0)),
    "Laplace": lambda rows: dist.Laplace(rows(0.0, 1.0), rows(1.0, 2.0)),
    "Gumbel": lambda rows: dist.Gumbel(rows(0.0, 1.0), rows(1.0, 2.0)),
    "exponential": lambda rows: dist.Exponential(rows(2.0, 0.5)),
    "Weibull": lambda rows: dist.Weibull(rows(1.0, 2.0), rows(2.0, 1.5)),
    "Pareto": lambda rows: dist.Pareto(rows(1.0, 2.0), rows(9.0, 12.0)),
    "logistic": lambda rows: dist.Logistic(rows(0.0, 1.0), rows(1.0, 2.0)),
    "ratio of variances": lambda rows: dist.FisherSnedecor(rows(9.0, 1.0), rows(20.0, 25.0)),
    "Kumaraswamy": lambda rows: dist.Kumaraswamy(rows(2.0, 0.7), rows(3.0, 1.0)),
    "concrete": lambda rows: dist.RelaxedOneHotCategorical(
        torch.tensor(0.7), logits=rows(0.0, 1.0, 2.0)
    ),
    "relaxed bits": lambda rows: dist.RelaxedBernoulli(torch.tensor(0.5), logits=rows(0.3, -1.0)),
    "gamma": lambda rows: dist.Gamma(rows(4.0, 1.0), rows(2.0, 1.0)),
    "gamma, steep": lambda rows: dist.Gamma(rows(0.3, 0.8), rows(2.0, 1.0)),
    "inverse gamma": lambda rows: dist.InverseGamma(rows(8.0, 9.0), rows(2.0, 1.0)),
    "beta": lambda rows: dist.Beta(rows(0.5, 2.0), rows(2.0, 3.0)),
    "Dirichlet": lambda rows: dist.Dirichlet(rows(0.4, 2.0, 3.0)),
    "Student's t": lambda rows: dist.StudentT(rows(9.0, 12.0), rows(0.0, 1.0), rows(1.0, 2.0)),
    "sphere": lambda rows: dist.ProjectedNormal(rows(1.0, 0.0, -0.5)),
    "mixture": lambda rows: dist.MixtureSameFamily(
        dist.Categorical(logits=rows(0.0, 1.0)),
        dist.Gamma(rows(4.0, 1.0)[..., None], 2.0).expand((*rows(0.0, 0.0).shape, 3)).to_event(1),
    ),
    "bits": lambda rows: dist.Bernoulli(rows(0.3, 0.9)),
    "classes": lambda rows: dist.OneHotCategorical(logits=rows(0.0, 1.0, 2.0)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_moments_are_those_of_torch(name):
    """Means of some 5 functions, within 5 standard errors: wrong once in 10^5."""
    fn = make(name, NUM)
    ours, theirs = draw(fn, noise(NUM)), fn.sample()
    assert ours.shape == theirs.shape
    for f in (
        lambda v: v,
        lambda v: v.square(),
        lambda v: v[:, 0] * v[:, 1],
        lambda v: v.abs().sqrt(),
        lambda v: (v < 0.5).double(),
    ):
        a, b = f(ours), f(theirs)
        error = ((a.var(0) + b.var(0)) / NUM).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() <= 5 * error + 1e-12).all()


def noise(num, first=0):
    return Noise(Streams.create(num, seed=3, first_image=first), 2048)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Cauchy(torch.tensor(1.0), torch.tensor(2.0)),
        dist.HalfCauchy(torch.tensor(2.0)),
        dist.Exponential(torch.tensor(0.5)),
        dist.Logistic(torch.tensor(1.0), torch.tensor(2.0)),
    ],
)
def test_the_distribution_function_of_draws_is_uniform(fn):
    """Nine deciles of 40,000, within 5 standard errors each: wrong once in 10^5."""
    u = fn.cdf(draw(fn.expand((NUM,)), noise(NUM)))
    for level in torch.arange(0.1, 0.95, 0.1):
        error = (level * (1 - level) / NUM).sqrt()
        assert abs((u < level).double().mean() - level) < 5 * error


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_its_own(name):
    several = draw(make(name, 5), noise(5))
    alone = draw(make(name, 1), noise(1, first=3))
    torch.testing.assert_close(several[3:4], alone)
    if name not in ("bits", "classes"):
        assert not torch.allclose(several[2], several[3])


@pytest.mark.parametrize(
    ("family", "parameter", "expected"),
    [
        (lambda a: dist.Gamma(a, 1.0), 0.4, 1.0),
        (lambda a: dist.Gamma(a, 1.0), 3.0, 1.0),
        (lambda a: dist.Beta(a, torch.full_like(a, 3.0)), 2.0, 3 / 25),  # b / (a + b)^2
        (lambda a: dist.Laplace(torch.ones_like(a), a), 2.0, 0.0),
    ],
)
def test_the_derivative_of_the_mean_is_the_mean_derivative(family, parameter, expected):
    a = torch.full((NUM,), parameter, requires_grad=True)
    (slope,) = torch.autograd.grad(draw(family(a), noise(NUM)).sum(), a)
    assert abs(slope.mean() - expected) < 5 * slope.std() / NUM**0.5


@pytest.mark.parametrize(("dim", "concentration"), [(2, 1.5), (4, 1.0)])
def test_correlations_have_the_variance_that_is_known(dim, concentration):
    """(r + 1) / 2 is Beta(a, a), a = concentration - 1 + dim / 2, for each of them (Lewandowski,
    Kurowicka, Joe, 2009), which torch's own draws are not. 14 moments at 5 standard errors."""
    fn = dist.LKJCholesky(dim, torch.full((NUM,), concentration))
    factor = draw(fn, noise(NUM))
    assert fn.support.check(factor).all()
    row, column = torch.tril_indices(dim, dim, -1)
    found = (factor @ factor.mT)[:, row, column]
    variance = 1 / (2 * (concentration - 1 + dim / 2) + 1)
    for values, expected in ((found, 0.0), (found.square(), variance)):
        assert ((values.mean(0) - expected).abs() <= 5 * values.std(0) / NUM**0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_families_put_their_mass_at_the_corners(dtype):
    """Most of their gamma draws are below the smallest number; E[p_1 p_2] = a_1 a_2 / A / (A + 1).

    Within 5 standard errors: wrong once in 10^6.
    """
    a = 0.01 if dtype == torch.float32 else 0.001
    rows = torch.full((NUM, 2), a, dtype=dtype)
    rows.requires_grad_()
    pair = draw(dist.Dirichlet(rows), noise(NUM))
    one = draw(dist.Beta(*rows.unbind(-1)), noise(NUM))
    for product in (pair.prod(-1), one * (1 - one)):
        (slope,) = torch.autograd.grad(product.sum(), rows, retain_graph=True)
        product = product.detach().double()
        expected = a / (2 * (2 * a + 1))
        assert abs(product.mean() - expected) < 5 * product.std() / NUM**0.5
        expected = 1 / (2 * (2 * a + 1) ** 2)  # its derivative, along equal a
        slope = slope.sum(-1).double()
        assert abs(slope.mean() - expected) < 5 * slope.std() / NUM**0.5


def test_cold_relaxed_classes_stay_on_the_simplex():
    rows = torch.zeros(100, 4, dtype=torch.float32)
    fn = dist.RelaxedOneHotCategorical(rows.new_tensor(0.02), logits=rows)
    value = draw(fn, noise(100))
    assert (value > 0).all()
    assert (value.amin(-1) < 1e-37).any()
    torch.testing.assert_close(value.sum(-1), rows.new_ones(100))
    assert fn.log_prob(value).isfinite().all()


def test_the_rarest_uniforms_give_numbers():
    """2^-33, the least there is, of which twice less one is -1 in float32, and the largest."""

    class Rarest(Noise):
        def uniform(self, like, *event):
            return like.new_tensor([2.0**-33, 1.0])

    rarest = Rarest(Streams.create(2, seed=0), 2048)
    zeros = torch.zeros(2, dtype=torch.float32)
    value = draw(dist.Laplace(zeros, zeros + 1), rarest)
    expected = zeros.new_tensor([-32.0, 22.0]) * math.log(2)
    torch.testing.assert_close(value, expected)
    for fn in (dist.Gumbel(zeros, zeros + 1), dist.RelaxedBernoulli(zeros + 1, logits=zeros)):
        assert draw(fn, rarest).isfinite().all()
    certain = torch.tensor([0.0, 1.0])
    assert torch.equal(draw(dist.Bernoulli(certain), rarest), certain)


def test_what_is_not_known_or_the_programs_own_is_left_alone():
    logits = torch.zeros(2, 3)
    temperature = torch.tensor(0.5)
    for fn in (
        dist.VonMises(logits, 1.0),
        dist.OneHotCategoricalStraightThrough(logits=logits),
        dist.RelaxedBernoulliStraightThrough(temperature, logits=logits),
        dist.RelaxedOneHotCategoricalStraightThrough(temperature, logits=logits),
    ):
        assert draw(fn, noise(2)) is None


def test_a_draw_of_a_mixture_has_no_derivative():
    loc = torch.zeros(2, 3, requires_grad=True)
    mixture = dist.MixtureSameFamily(
        dist.Categorical(logits=torch.zeros(2, 3)), dist.Normal(loc, 1)
    )
    assert not draw(mixture, noise(2)).requires_grad


class ConcreteVAE:
    weight = torch.linspace(-1, 1, 3 * 16).reshape(3, 16)

    def model(self, x):
        with pyro.plate("data", len(x)):
            prior = dist.RelaxedOneHotCategorical(x.new_tensor(0.7), x.new_ones(len(x), 3))
            mean = pyro.sample("z", prior) @ self.weight.to(x)
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(1), obs=x.flatten(1))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            logits = x.flatten(1) @ self.weight.T.to(x)
            pyro.sample("z", dist.RelaxedOneHotCategorical(x.new_tensor(0.7), logits=logits))


def test_an_attack_on_a_guide_that_is_not_gaussian_keeps_its_noise():
    """The objective is a function of the image: 0 at the reference."""
    vae, x = ConcreteVAE(), torch.rand(3, 1, 4, 4)
    objective = maximum_damage(vae)(x)
    torch.testing.assert_close(objective(x), torch.zeros(3))
    other = torch.rand(3, 1, 4, 4)
    assert (objective(other) > 0).all()
    torch.testing.assert_close(objective(other), objective(other))
    streams = Streams.create(3, seed=1)
    pair = program.encode(vae, x, streams=streams), program.encode(vae, x, streams=streams)
    torch.testing.assert_close(*pair)
