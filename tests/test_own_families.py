"""A user's class derived from a known family has its own draws and density, not the family's."""

from __future__ import annotations

import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import kl

from pyro_vae_defence import attacks, metrics
from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.models import program
from pyro_vae_defence.models.perturbation import most_likely_image
from pyro_vae_defence.objectives import AVAE, BetaELBO
from pyro_vae_defence.ops import distributions, divergences
from pyro_vae_defence.ops.balls import Linf

pytestmark = pytest.mark.usefixtures("float64")


class OfAnother:
    """Draws and density of ``true``, whatever family else a class derives from."""

    @property
    def mean(self):
        return self.true.mean

    def rsample(self, sample_shape=()):
        return self.true.rsample(sample_shape)

    def sample(self, sample_shape=()):
        return self.true.sample(sample_shape)

    def log_prob(self, value):
        return self.true.log_prob(value)


class Twice(OfAnother, dist.Normal):
    """A Gaussian of twice the scale it says."""

    @property
    def true(self):
        return dist.Normal(self.loc, 2 * self.scale)


class Quadratic(dist.Bernoulli):
    """Weighs an intensity by its distance from the mean."""

    mean = dist.Bernoulli.mean

    def log_prob(self, value):
        return -10 * (value - self.probs).square()


class Noisy(dist.Normal):
    """Draws in its own way, with the density of its family."""

    def sample(self, sample_shape=()):
        return self.loc.expand(sample_shape + self.batch_shape)


class Programs:
    """One latent, an image that does not depend on it unless a test says so."""

    def __init__(self, q=Twice, scale=0.6, likelihood=None):
        self.q, self.scale, self.likelihood = q, scale, likelihood

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            mean = x.new_zeros(len(x), 4)
            fn = self.likelihood(mean + z) if self.likelihood else dist.Normal(mean, 1.0)
            pyro.sample("obs", fn.to_event(1), obs=x.flatten(1))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc = 0.1 * x.flatten(1).sum(1, keepdim=True)
            pyro.sample("z", self.q(loc, self.scale).to_event(1))


X = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_evidence_is_that_of_its_own_draws():
    """With draws of half the scale the estimate would be off by 0.1 nats or more."""
    exact = -dist.Normal(0.0, 1.0).log_prob(X.flatten(1)).sum(1)
    found = metrics.nll(Programs(), X, 20_000, generator=torch.Generator().manual_seed(0))
    assert (found - exact).abs().max() < 0.02  # four standard errors


class Together(OfAnother, dist.Independent):
    """As :class:`Twice`, with the density of all elements at once."""

    def __init__(self, loc, scale):
        super().__init__(dist.Normal(loc, scale), 1)
        self.true = dist.Normal(loc, 2 * scale).to_event(1)

    def expand(self, batch_shape, _instance=None):
        shape = (*batch_shape, self.base_dist.loc.shape[-1])
        return Together(self.base_dist.loc.expand(shape), self.base_dist.scale.expand(shape))


def test_a_class_of_independent_elements_is_not_what_is_inside():
    """Whose density, draws and divergences would be those of half the scale."""

    class Apart(Programs):
        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", Together(0.1 * x.flatten(1).sum(1, keepdim=True), 0.6))

    exact = -dist.Normal(0.0, 1.0).log_prob(X.flatten(1)).sum(1)
    found = metrics.nll(Apart(), X, 20_000, generator=torch.Generator().manual_seed(0))
    assert (found - exact).abs().max() < 0.02  # four standard errors
    with pytest.raises(ValueError, match="no KL-divergence is registered"):
        attacks.PGD(attacks.symmetric_kl(Apart()), Linf(0.1), 1)(X)
    with pytest.raises(ValueError, match="'z' is Together; this objective needs Gaussian"):
        AVAE().loss(Apart().model, Apart().guide, X)


def test_its_variance_is_that_of_its_own_draws():
    found = program.mean_posterior_variance(Programs(), [X.repeat(300, 1, 1, 1)])["z"]
    assert abs(found.item() - 1.44) < 0.1


def test_divergences_of_the_family_are_not_its_own():
    vae = Programs()
    with pytest.raises(ValueError, match="no KL-divergence is registered"):
        attacks.PGD(attacks.symmetric_kl(vae), Linf(0.1), 1)(X)
    with pytest.raises(ValueError, match="'z' is Twice; this objective needs Gaussian"):
        AVAE().loss(vae.model, vae.guide, X)


def wrappers(loc):
    """Layers around a class of one's own: which one it is, distributions from the outside."""
    other = dist.Normal(loc, 1.0).expand((3, 2, 4)).to_event(1)
    loc = loc.expand(3, 2, 4)
    return {
        "mixed": (dist.Independent(Together(loc, 0.6), 1), other.to_event(1)),
        "independent": (dist.Independent(Together(loc, 0.6), 1),) * 2,
        "masked": (Together(loc, 0.6).mask(torch.ones(3, 2) > 0).to_event(1),) * 2,
        "transformed": (exp_of(Twice(loc, 0.6)), exp_of(Twice(loc + 1, 0.6))),
    }


def exp_of(base):
    return dist.TransformedDistribution(base, [dist.transforms.ExpTransform()]).to_event(2)


@pytest.mark.parametrize("name", ["mixed", "independent", "masked", "transformed"])
def test_nor_are_they_inside_of_other_wrappers(name):
    for p, q in itertools.permutations(wrappers(torch.zeros(1))[name]):
        with pytest.raises(ValueError, match="no KL-divergence .* has a log_prob of its own"):
            divergences.kl({"z": p}, {"z": q})


class Same(dist.Normal):
    """A Gaussian whose density is written anew."""

    def log_prob(self, value):
        return dist.Normal(self.loc, self.scale).log_prob(value)


def test_refusals_name_what_works(monkeypatch):
    """For the same density written anew, and for whatever ``squared_wasserstein`` is not."""
    vae, student = Programs(Same), functools.partial(dist.StudentT, 0.5)
    with pytest.raises(ValueError, match="register one for these classes .*register_kl"):
        attacks.symmetric_kl(vae)(X)(1 - X)
    with pytest.raises(ValueError, match=r"use attacks\.mean_distance"):
        attacks.squared_wasserstein(vae)(X)(1 - X)
    with pytest.raises(ValueError, match=r"use attacks\.symmetric_kl"):
        attacks.squared_wasserstein(Programs(dist.Laplace))(X)(1 - X)
    with pytest.raises(ValueError, match=r"use attacks\.maximum_damage"):
        attacks.squared_wasserstein(Programs(student))(X)(1 - X)
    known = {"mean_distance": [Same, dist.Laplace], "symmetric_kl": [dist.Laplace]}
    for name, families in known.items():
        for q in families:
            assert bool((getattr(attacks, name)(Programs(q))(X)(1 - X) > 0).all())
    likelihood = lambda mean: Same(mean, 0.1)  # noqa: E731
    aware = Programs(dist.Normal, likelihood=likelihood)
    z = {"z": torch.tensor([[0.2], [0.4], [-0.3]])}
    with pytest.raises(ValueError, match=r"\(Same, minimiser\), .*dispatch\(Normal\) where"):
        program.potential(aware, X, Linf(0.1))(z)

    # The two mends.
    monkeypatch.setitem(kl._KL_REGISTRY, (Same, Same), kl._kl_normal_normal)
    monkeypatch.setattr(kl, "_KL_MEMOIZE", {})
    gaussian = Programs(dist.Normal)
    found = attacks.symmetric_kl(vae)(X)(1 - X)
    torch.testing.assert_close(found, attacks.symmetric_kl(gaussian)(X)(1 - X))
    most_likely_image.register(Same, most_likely_image.dispatch(dist.Normal))
    plain = Programs(dist.Normal, likelihood=lambda mean: dist.Normal(mean, 0.1))
    expected = program.potential(plain, X, Linf(0.1))(z)
    torch.testing.assert_close(program.potential(aware, X, Linf(0.1))(z), expected)


def test_the_elbo_is_that_of_its_own_density():
    """An estimate at the draw, as Pyro's ``Trace_ELBO`` has it, not the family's closed form."""
    vae = Programs()
    torch.manual_seed(1)
    found = BetaELBO().terms(vae.model, vae.guide, X)["kl"]
    torch.manual_seed(1)
    guide = poutine.trace(vae.guide).get_trace(X)
    z = guide.nodes["z"]["value"]
    q = dist.Normal(0.1 * X.flatten(1).sum(1, keepdim=True), 1.2)
    expected = (q.log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)).sum(1)
    torch.testing.assert_close(found, expected)


def bernoulli(mean):
    return Quadratic(logits=mean, validate_args=False)


def twice(mean):
    return Twice(mean, 0.1)


@pytest.mark.parametrize("likelihood", [bernoulli, twice])
def test_the_most_likely_image_of_the_family_is_not_its_own(likelihood):
    vae = Programs(dist.Normal, likelihood=likelihood)
    name = type(likelihood(X)).__name__
    with pytest.raises(ValueError, match=f"the likelihood {name} has a log_prob of its own"):
        MCMCDefence(vae, perturbation=Linf(0.1))(X)


def test_other_draws_do_not_change_the_most_likely_image():
    z = {"z": torch.tensor([[0.2], [0.4], [-0.3]])}
    found = program.potential(
        Programs(dist.Normal, likelihood=lambda m: Noisy(m, 0.1)), X, Linf(0.1)
    )(z)
    distance = ((X.flatten(1) - z["z"]).abs() - 0.1).clamp(min=0)
    below = torch.minimum(X.flatten(1), torch.tensor(0.1))  # as far as 0 at most
    distance = torch.where(z["z"] < 0, X.flatten(1) - below - z["z"], distance)
    log_prob = -0.5 * (distance / 0.1).square() - math.log(0.1) - 0.5 * math.log(2 * math.pi)
    expected = -log_prob.sum(1) - dist.Normal(0.0, 1.0).log_prob(z["z"]).sum(1)
    torch.testing.assert_close(found, expected)


class Truncated(dist.Normal):
    """A Gaussian on [0, 1]."""

    def log_prob(self, value):
        mass = self.cdf(torch.ones(())) - self.cdf(torch.zeros(()))
        return super().log_prob(value) - mass.log()


class Exact(Truncated):
    """... that knows its mean."""

    @property
    def mean(self):
        unit = dist.Normal(0.0, 1.0)
        low, high = -self.loc / self.scale, (1 - self.loc) / self.scale
        mass = unit.cdf(high) - unit.cdf(low)
        difference = unit.log_prob(low).exp() - unit.log_prob(high).exp()
        return self.loc + self.scale * difference / mass


def mixture(family):
    def likelihood(mean):
        components = family(mean[..., None] + torch.tensor([0.0, 0.5]), 0.3)
        return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(2)), components)

    return likelihood


@pytest.mark.parametrize("likelihood", [lambda m: Truncated(m, 0.3), mixture(Truncated)])
def test_the_mean_of_the_family_is_not_its_own(likelihood):
    """At the edge it is another than zero, where an image would be decoded to."""
    with pytest.raises(ValueError, match="needs a mean of its own"):
        MCMCDefence(Programs(dist.Normal, likelihood=likelihood))(X)


def test_nor_is_that_of_a_guide():
    with pytest.raises(ValueError, match="'z' is Truncated, which has a log_prob of its own"):
        attacks.mean_distance(Programs(Truncated))(X)


@pytest.mark.parametrize(("family", "offset"), [(Exact, 0.2386448), (Same, 0.0)])
def test_a_mean_of_its_own_or_of_the_same_density(family, offset):
    """The mean of N(0, .3^2) on [0, 1] is .3 (phi(0) - phi(10 / 3)) / (Phi(10 / 3) - 1 / 2)."""
    vae = Programs(dist.Normal, likelihood=lambda m: family(m, 0.3))
    decoded = program.decode(vae, {"z": torch.zeros(2, 1)}, (1, 2, 2))
    torch.testing.assert_close(decoded, torch.full((2, 1, 2, 2), offset), rtol=1e-6, atol=0)


class Grey(dist.Bernoulli):
    """The cross-entropy, of pixels between black and white too, by another formula."""

    def log_prob(self, value):
        return value * self.logits - torch.nn.functional.softplus(self.logits)


def test_validation_of_a_family_does_not_judge_the_mean_of_a_class():
    likelihood = lambda mean: Grey(logits=mean, validate_args=True)  # noqa: E731
    vae = Programs(dist.Normal, likelihood=likelihood)
    decoded = program.decode(vae, {"z": torch.zeros(2, 1)}, (1, 2, 2))
    torch.testing.assert_close(decoded, torch.full((2, 1, 2, 2), 0.5))


class Shift(dist.transforms.Transform):
    """Adds what it was told last."""

    domain = codomain = dist.constraints.real_vector
    bijective = True
    shift = 0.0

    def _call(self, value):
        return value + self.shift

    def _inverse(self, value):
        return value - self.shift

    def log_abs_det_jacobian(self, value, moved):
        return value.new_zeros(value.shape[:-1])


class OneFlow(Programs):
    """A flow as guide, one for all images, which is told its image in every call."""

    flow = Shift()

    def guide(self, x):
        with pyro.plate("data", len(x)):
            self.flow.shift = x.flatten(1).sum(1, keepdim=True)
            base = dist.Normal(x.new_zeros(len(x), 1), 0.3).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


@pytest.mark.parametrize("number", [1, 3])
def test_a_flow_that_is_told_its_image_is_one_for_all_of_them(number):
    """The divergence of two images would be that of the base distributions, which is zero."""
    with pytest.raises(ValueError, match="they share what it has computed of its last images"):
        attacks.PGD(attacks.symmetric_kl(OneFlow()), Linf(0.1), 1)(X[:number])
    objective = attacks.maximum_damage(OneFlow(likelihood=lambda z: dist.Normal(z, 1.0)))(X)
    moved = 4 * (1 - 2 * X).flatten(1).sum(1).square()  # of the latent, in each of four pixels
    torch.testing.assert_close(objective(1 - X), moved)


def test_a_density_that_agrees_with_its_family_at_the_mean_alone_has_another_mean():
    class Skewed(dist.Normal):
        def log_prob(self, value):
            stretched = torch.where(value > self.loc, self.loc + 2 * (value - self.loc), value)
            return super().log_prob(stretched)

    class Same(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value)

    rows = torch.zeros(3, 2), torch.ones(3, 2)
    assert not distributions.mean_is_own(Skewed(*rows).to_event(1))
    assert distributions.mean_is_own(Same(*rows).to_event(1))


def test_elements_count_that_no_mask_leaves_out():
    inner, outer = torch.tensor([[True, True, False]] * 2), torch.tensor([True, False])
    fn = dist.Normal(torch.zeros(2, 3), 1.0).mask(inner).to_event(1).mask(outer)
    assert torch.equal(distributions.counted(fn), inner & outer[:, None])
