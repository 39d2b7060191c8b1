"""Transforms to the support of a latent site: right density, right range, or an error."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.contrib.zuko import ZukoToPyro

from pyro_vae_defence.models.supports import transform_of
from pyro_vae_defence.ops.distributions import is_discrete, within_bounds

pytestmark = pytest.mark.usefixtures("float64")

N = 4
ONES = torch.ones(N, 3)


class Bare(dist.TorchDistribution):
    """A distribution that declares no support: independent numbers of one log-density."""

    arg_constraints = {}

    def __init__(self, log_density):
        self.log_density = log_density
        super().__init__((N,), (3,), validate_args=False)

    def log_prob(self, value):
        return self.log_density(value).sum(-1)


def categories(*shape):
    return dist.Categorical(logits=torch.zeros(shape))


REAL = {
    "normal": dist.Normal(ONES, 1.0).to_event(1),
    "mixture": dist.MixtureSameFamily(
        categories(5), dist.Normal(torch.zeros(5, 3), 1.0).to_event(1)
    ).expand([N]),
    "masked": dist.Normal(ONES, 1.0).mask(ONES > 2).to_event(1),
    "expanded": dist.ExpandedDistribution(dist.Normal(0.0, 1.0), [N]),
    "delta": dist.Delta(ONES, event_dim=1),
    "autoregressive flow": dist.TransformedDistribution(
        dist.Normal(ONES, 1.0), [T.affine_autoregressive(3)]
    ),
    "spline flow": dist.TransformedDistribution(
        dist.Normal(ONES, 1.0).to_event(1), [T.spline_coupling(3), T.permute(3)]
    ),
    "logistic": dist.TransformedDistribution(
        dist.Uniform(torch.zeros(N, 3), 1.0),
        [T.SigmoidTransform().inv, T.AffineTransform(1.0, 2.0)],
    ).to_event(1),
    "flow of a mixture": dist.TransformedDistribution(
        dist.MixtureSameFamily(
            categories(N, 5), dist.Normal(torch.zeros(N, 5, 3), 1.0).to_event(1)
        ),
        [T.affine_autoregressive(3)],
    ),
    "wrapped": ZukoToPyro(dist.Normal(ONES, 2.0).to_event(1)),
    "bare": Bare(dist.Normal(0.5, 2.0).log_prob),
    "bare, heavy tails": Bare(dist.StudentT(3.0).log_prob),
}


@pytest.mark.parametrize("fn", REAL.values(), ids=REAL.keys())
def test_unconstrained(fn):
    assert transform_of(fn, torch.zeros(fn.batch_shape + fn.event_shape)) is None


# Distributions, and the value at which the unconstrained scale is zero. Mixtures do not validate:
# torch 2.6 compares a value with the bounds of all components.
CONSTRAINED = {
    "log-normal": (dist.LogNormal(ONES, 1.0).to_event(1), 1.0),
    "gamma": (dist.Gamma(ONES, ONES).mask(ONES > 2).to_event(1), 1.0),
    "beta": (dist.Beta(ONES, ONES).to_event(1), 0.5),
    "dirichlet": (dist.Dirichlet(ONES), 1 / 3),
    "uniform": (dist.Uniform(ONES, 4 * ONES).to_event(1), 2.5),
    "mixture": (
        dist.MixtureSameFamily(
            categories(N, 3, 5), dist.Uniform(torch.zeros(N, 3, 5), 2.0), validate_args=False
        ).to_event(1),
        1.0,
    ),
    "mixture of events": (
        dist.MixtureSameFamily(
            categories(N, 5),
            dist.Uniform(torch.zeros(N, 5, 3), torch.full((5, 3), 2.0)).to_event(1),
            validate_args=False,
        ),
        1.0,
    ),
    "masked mixture": (
        dist.MixtureSameFamily(categories(N, 3, 5), dist.LogNormal(torch.zeros(N, 3, 5), 1.0))
        .mask(False)
        .to_event(1),
        1.0,
    ),
    "wrapped": (ZukoToPyro(dist.Gamma(ONES, 2.0).to_event(1)), 1.0),
    "affine after exponential": (
        dist.TransformedDistribution(
            dist.Normal(ONES, 1.0), [T.ExpTransform(), T.AffineTransform(-1.0, 2.0)]
        ).to_event(1),
        1.0,
    ),
    "affine of a uniform": (
        dist.TransformedDistribution(
            dist.Uniform(torch.zeros(N, 3), 1.0), [T.AffineTransform(-1.0, 2.0)]
        ).to_event(1),
        0.0,
    ),
    "affine after sigmoid, composed": (
        dist.TransformedDistribution(
            dist.Logistic(0 * ONES, ONES),
            [T.ComposeTransform([T.SigmoidTransform(), T.AffineTransform(-1.0, 2.0)])],
        ).to_event(1),
        0.0,
    ),
    "affine after exponential, composed of events": (
        dist.TransformedDistribution(
            dist.Normal(ONES, 1.0),
            T.IndependentTransform(
                T.ComposeTransform([T.ExpTransform(), T.AffineTransform(-1.0, 2.0)]), 1
            ),
        ),
        1.0,
    ),
}


@pytest.mark.parametrize(("fn", "middle"), CONSTRAINED.values(), ids=CONSTRAINED.keys())
def test_constrained(fn, middle):
    draws = torch.full((N, 3), middle)
    transform = transform_of(fn, draws)
    middles = transform.inv(draws)
    torch.testing.assert_close(transform(torch.zeros_like(middles)), draws)
    unconstrained = torch.randn(2, middles.shape[1]) * 3  # other rows than were read
    value = transform(unconstrained)
    assert fn.log_prob(torch.cat([value, value])).isfinite().all()
    torch.testing.assert_close(transform.inv(value), unconstrained)
    log_determinant = transform.log_abs_det_jacobian(unconstrained, value)
    assert log_determinant.shape == (2,)  # of one event, not of its numbers


@pytest.mark.parametrize(
    "name",
    [
        "gamma",
        "uniform",
        "mixture",
        "affine after exponential",
        "affine of a uniform",
        "affine after sigmoid, composed",
    ],
)
def test_density_on_the_unconstrained_scale_integrates_to_one(name):
    fn, middle = CONSTRAINED[name]
    fn = fn.base_dist
    fn = getattr(fn, "base_dist", fn) if name == "gamma" else fn
    transform = transform_of(fn, torch.full((N, 3), middle))
    grid = torch.linspace(-30.0, 30.0, 6001)
    points = grid[:, None, None].expand(-1, N, 3)
    value = transform(points)
    log_density = fn.log_prob(value) + transform.log_abs_det_jacobian(points, value)
    total = torch.trapezoid(log_density.exp(), grid, dim=0)
    torch.testing.assert_close(total, torch.ones(N, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_corners_of_a_simplex_are_alike(dtype):
    """log p(z) + log |det T'(u)| at u = log(z_1 / z_2), also where z_2 is far below the rounding
    of z_1: mass of a sparse family that chains have to find there, as at the other end."""
    a = torch.full((2, 2), 0.1, dtype=dtype)
    fn = dist.Dirichlet(a)
    transform = transform_of(fn, a / a.sum(-1, keepdim=True))
    u = torch.tensor([[80.0], [40.0], [20.0], [3.0], [0.0], [-80.0]], dtype=dtype)
    u.requires_grad_()
    value = transform(u)
    torch.testing.assert_close(transform.inv(value), u)
    log_density = dist.Dirichlet(a[0]).log_prob(value) + transform.log_abs_det_jacobian(u, value)
    logsigmoid = torch.nn.functional.logsigmoid
    normalising = math.lgamma(0.2) - 2 * math.lgamma(0.1)
    expected = 0.1 * (logsigmoid(u) + logsigmoid(-u))[:, 0] + normalising
    torch.testing.assert_close(log_density, expected)
    forces = [torch.autograd.grad(each.sum(), u)[0] for each in (log_density, expected)]
    torch.testing.assert_close(*forces)
    # Beyond what the type holds nothing is 0, of which no density is known.
    far = torch.tensor([[-1e4], [1e4]], dtype=dtype)
    assert (transform(far) > 0).all()
    assert transform.inv(torch.eye(2, dtype=dtype)).isfinite().all()


def test_a_simplex_is_reached_as_by_torch():
    torch.manual_seed(0)
    mixture = dist.MixtureSameFamily(categories(N, 2), dist.Dirichlet(torch.ones(N, 2, 4)))
    for fn in (dist.Dirichlet(torch.ones(N, 2, 4)).to_event(1), mixture):
        transform = transform_of(fn, fn.sample())
        u = torch.randn(5, *fn.event_shape[:-1], 3)
        torch_own = T.StickBreakingTransform()
        torch.testing.assert_close(transform(u), torch_own(u))
        torch.testing.assert_close(transform.inv(transform(u)), u)
        log_determinant = torch_own.log_abs_det_jacobian(u, torch_own(u)).reshape(5, -1).sum(-1)
        found = transform.log_abs_det_jacobian(u, transform(u))
        torch.testing.assert_close(found, log_determinant)


# --- Errors ---------------------------------------------------------------------------------------

PER_IMAGE = torch.arange(1.0, N + 1)[:, None].expand(N, 3)

REFUSED = {
    "differs between images": dist.Uniform(torch.zeros(N, 3), PER_IMAGE).to_event(1),
    "components of different supports": dist.MixtureSameFamily(
        categories(N, 3, 5), dist.Uniform(torch.zeros(N, 3, 5), torch.arange(1.0, 6.0))
    ).to_event(1),
    "parameters per image": dist.TransformedDistribution(
        dist.Uniform(torch.zeros(N, 3), 1.0), [T.AffineTransform(PER_IMAGE, 2.0)]
    ).to_event(1),
    "less than its transforms' codomain": dist.MixtureSameFamily(
        categories(N, 3, 2),
        dist.TransformedDistribution(
            dist.Uniform(torch.zeros(N, 3, 2), 1.0), [T.AffineTransform(-1.0, 2.0)]
        ),
    ).to_event(1),
    "ProjectedNormal .* no bijection": dist.ProjectedNormal(ONES),
    "Bare .* its density does not show": Bare(lambda value: value.log() - value),
}


@pytest.mark.parametrize(("message", "fn"), REFUSED.items(), ids=REFUSED.keys())
def test_support_without_a_transform(message, fn):
    with pytest.raises(ValueError, match=message):
        transform_of(fn, torch.full((N, 3), 0.5))


@pytest.mark.parametrize(
    "log_density",
    [
        lambda value: -value,  # of an exponential, without its zero
        lambda value: value.cos(),  # of a circle
        lambda value: torch.where(value.abs() < 20, 0.0, -math.inf),
    ],
)
def test_density_that_is_none_on_all_numbers(log_density):
    with pytest.raises(ValueError, match="declares no support, .* declare `support`"):
        transform_of(Bare(log_density), torch.full((N, 3), 0.5))


def test_a_circle_is_cut_at_its_ends():
    fn = dist.VonMises(torch.zeros(N, 3), 2.0).to_event(1)
    transform = transform_of(fn, fn.sample())
    u = torch.tensor([[-30.0, 0.0, 30.0]])
    torch.testing.assert_close(transform(u), torch.tensor([[-math.pi, 0.0, math.pi]]))


def test_a_wrapper_that_declares_its_own():
    class Positive(ZukoToPyro):
        support = dist.constraints.positive

    transform = transform_of(Positive(Bare(lambda value: -value)), torch.full((N, 3), 0.5))
    torch.testing.assert_close(transform(torch.zeros(3)), torch.ones(3))


@pytest.mark.parametrize("fn", [dist.Categorical(ONES), dist.Poisson(ONES).to_event(1)])
def test_discrete(fn):
    assert is_discrete(fn)
    with pytest.raises(ValueError, match=r"is discrete; .* marginalise it out"):
        transform_of(fn, ONES)


def test_whole_numbers_of_a_distribution_that_says_nothing():
    with pytest.raises(ValueError, match="Bare .* is discrete"):
        transform_of(Bare(dist.Normal(0.0, 1.0).log_prob), torch.zeros(N, 3, dtype=torch.long))


@pytest.mark.parametrize(
    "name",
    [
        "affine of a uniform",
        "affine after sigmoid, composed",
        "affine after exponential, composed of events",
        "affine after exponential",
    ],
)
def test_values_that_transforms_do_not_reach(name):
    """-1 is the lower end of them all; an event that has one such value is none."""
    fn, _ = CONSTRAINED[name]
    value = torch.full((N, 3), 0.5)
    value[1, 0] = -1.01
    value[2, 2] = -1 - 1e-15  # as rounding may leave it
    inside = within_bounds(fn, value).all(1)
    assert inside.tolist() == [True, False, True, True]


# --- zuko -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", ["MAF", "NSF", "NICE"])
def test_flows_of_zuko(flow):
    zuko = pytest.importorskip("zuko")
    fn = ZukoToPyro(getattr(zuko.flows, flow)(3)()).expand([N])
    assert transform_of(fn, fn()) is None


def test_circular_flow_of_zuko():
    zuko = pytest.importorskip("zuko")
    fn = ZukoToPyro(zuko.flows.NCSF(3)()).expand([N])
    with pytest.raises(ValueError, match="declares no support"):
        transform_of(fn, fn())
