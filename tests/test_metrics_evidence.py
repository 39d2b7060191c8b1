"""Marginal likelihood read from Pyro programs, against the exact evidence of a linear-Gaussian VAE.

Statistical tests allow 5 standard errors of the log-average weight (delta method) per image, for 6
images: for normal errors 4 tests in a million fail, for these skewed weights fewer than one in
1,000.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import HierarchicalVAE, LinearGaussianVAE, TutorialVAE
from pyro import poutine
from pyro.infer.autoguide.effect import GuideMessenger

from pyro_vae_defence import metrics
from pyro_vae_defence.metrics.evidence import _weights
from pyro_vae_defence.models import ConvVAE, contract, program
from pyro_vae_defence.ops.streams import Streams


class WideGuide(LinearGaussianVAE):
    """The linear-Gaussian VAE with a guide that is off in mean and width, and covers the
    posterior."""

    def posterior(self, x):
        mean, covariance = self.exact(x)
        scale = 1.5 * covariance.diagonal().sqrt().expand_as(mean)
        return dist.Normal(mean + 0.05, scale).to_event(1)

    def guide(self, x):
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", self.posterior(x))


@pytest.fixture
def wide(float64):
    return WideGuide()


@pytest.fixture
def x(float64):
    return metrics.simulate(LinearGaussianVAE(), torch.zeros(6, 1, 4, 4))[1]


@pytest.fixture
def inside(x):
    """Images that everybody may pass: in [0, 1]."""
    return x.clamp(0, 1)


def standard_errors(log_weights, log_mean):
    relative = (log_weights - metrics.log_mean_exp(log_weights)).exp()
    error = relative.std(dim=0) / math.sqrt(log_weights.shape[0])
    return (metrics.log_mean_exp(log_weights) - log_mean).abs() / error


def test_nll_agrees_with_the_exact_evidence(wide, inside):
    log_weights = _weights(wide, inside, Streams.create(6, seed=1))(2000)
    exact = wide.evidence(inside)
    assert (standard_errors(log_weights, exact) < 5).all()
    assert (standard_errors(log_weights, exact + 0.5) > 5).all()  # the power to see half a nat
    # The public function makes the same estimate in its own chunks.
    generator = torch.Generator().manual_seed(3)
    assert (metrics.nll(wide, inside, 2000, generator=generator) + exact).abs().max() < 0.5


def test_nll_does_not_depend_on_what_is_computed_at_once(wide, inside):
    def run(rows):
        return metrics.nll(wide, inside, 50, rows, torch.Generator().manual_seed(0))

    for rows in (1, 4, 6, 17, 1000):
        torch.testing.assert_close(run(rows), run(300), rtol=0, atol=1e-10)
    assert not torch.equal(run(300), metrics.nll(wide, inside, 50, 300))


def test_no_run_has_more_rows_than_are_asked_for():
    """Those that check the programs neither."""
    seen = []

    class Counting(LinearGaussianVAE):
        def model(self, x):
            seen.append(len(x))
            super().model(x)

    metrics.nll(Counting(), torch.rand(12, 1, 4, 4, dtype=torch.float64), 5, rows=4)
    assert seen[-1] == 4
    assert max(seen) < 12


def test_intensities_lie_in_the_range_of_all_images():
    vae, x = TutorialVAE(), torch.rand(5, 1, 28, 28)
    x[4] *= 2
    for estimate in (
        lambda: metrics.nll(vae, x, 2, rows=2),
        lambda: metrics.ais_log_weights(vae, x, lambda z, *_: z, num_chains=1),
    ):
        with pytest.raises(ValueError, match=r"x must lie in \[0, 1\] where site"):
            estimate()


def test_nll_of_an_exact_guide_needs_one_draw(inside):
    class Exact(LinearGaussianVAE):
        def guide(self, x):
            mean, covariance = self.exact(x)
            with pyro.plate("data", x.shape[0]):
                pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    vae = Exact()
    torch.testing.assert_close(
        metrics.nll(vae, inside, 1), -vae.evidence(inside), rtol=0, atol=1e-9
    )


def test_scaled_programs_have_the_same_nll():
    """A beta-VAE's KL weight is no part of its likelihood."""
    vae = ConvVAE().double()
    x = torch.rand(2, 1, 28, 28, dtype=torch.float64)

    class Beta:
        def model(self, x):
            return vae.model(x, beta=5.0)

        def guide(self, x):
            return vae.guide(x, beta=5.0)

    plain, scaled = (metrics.nll(v, x, 3, generator=torch.Generator()) for v in (vae, Beta()))
    torch.testing.assert_close(plain, scaled)


@pytest.mark.parametrize("make", [TutorialVAE, HierarchicalVAE, ConvVAE])
def test_any_program_has_an_nll(make):
    side = 4 if make is HierarchicalVAE else 28
    nll = metrics.nll(make(), torch.rand(3, 1, side, side), 5)
    assert nll.shape == (3,)
    assert nll.isfinite().all()
    assert not nll.requires_grad


@pytest.mark.parametrize("concentration", [1.0, 0.1, 0.01])
def test_a_guide_at_the_corners_has_the_weights_of_its_draws(concentration):
    """Guide and prior are one sparse family, which tells nothing of x: all weights are p(x)."""

    class Sparse:
        def model(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Dirichlet(x.new_full((len(x), 5), concentration)))
                mean = torch.full_like(x, 0.5)
                pyro.sample("obs", dist.Normal(mean, 1.0).to_event(3), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Dirichlet(x.new_full((len(x), 5), concentration)))

    x = torch.rand(3, 1, 2, 2)
    exact = -dist.Normal(0.5, 1.0).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(metrics.nll(Sparse(), x, 50), exact, rtol=0, atol=1e-3)


def test_constrained_latents_keep_their_evidence(float64):
    """z ~ Gamma(2, 3), x | z ~ Normal(0, z^{-1/2}): log p(x) is known in closed form."""

    class Gamma:
        def model(self, x):
            with pyro.plate("data", x.shape[0]):
                z = pyro.sample("z", dist.Gamma(2.0 + x.new_zeros(len(x)), 3.0))
                scale = z.rsqrt()[:, None, None, None]
                pyro.sample("obs", dist.Normal(0.0 * x, scale).to_event(3), obs=x)

        def guide(self, x):
            with pyro.plate("data", x.shape[0]):
                pyro.sample("z", dist.Gamma(2.0 + x.new_zeros(len(x)), 2.0))

    x = torch.tensor([0.2, 1.0, 2.0]).view(3, 1, 1, 1)
    rate = 3 + x.flatten() ** 2 / 2
    exact = 2 * math.log(3) - 0.5 * math.log(2 * math.pi) + math.lgamma(2.5) - 2.5 * rate.log()
    vae = Gamma()
    log_weights = _weights(vae, x, Streams.create(3, seed=0))(4000)
    assert (standard_errors(log_weights, exact) < 5).all()
    # The same log-weights on the unconstrained scale, from the guide's own energy.
    latents = {"z": torch.tensor([-0.3, 0.1, 0.4])}
    weight = program.guide_potential(vae, x)(latents) - program.potential(vae, x)(latents)
    z = latents["z"].exp()
    log_p = dist.Gamma(2.0, 3.0).log_prob(z) + dist.Normal(0.0, z.rsqrt()).log_prob(x.flatten())
    torch.testing.assert_close(weight, log_p - dist.Gamma(2.0, 2.0).log_prob(z))


def test_guide_potential_is_the_density_of_the_draw(wide, x):
    values, log_q = program.sample_with_log_prob(wide, x)
    torch.testing.assert_close(program.guide_potential(wide, x)(values), -log_q)
    mean, covariance = wide.exact(x)
    scale = 1.5 * covariance.diagonal().sqrt()
    expected = dist.Normal(mean + 0.05, scale).to_event(1).log_prob(values["z"])
    torch.testing.assert_close(log_q, expected)


def test_a_factor_of_the_guide_is_part_of_its_density(wide, x):
    class Factor(WideGuide):
        def guide(self, x):
            with pyro.plate("data", x.shape[0]):
                z = pyro.sample("z", self.posterior(x))
                pyro.factor("weight", 0.1 * z.sum(-1), has_rsample=True)

    z = torch.randn(6, 3)
    found = program.guide_potential(Factor(), x)({"z": z})
    torch.testing.assert_close(found, -wide.posterior(x).log_prob(z) - 0.1 * z.sum(-1))


def test_guide_with_other_sites_is_refused(wide, x):
    class Other(LinearGaussianVAE):
        def guide(self, x):
            with pyro.plate("data", x.shape[0]):
                zeros = x.new_zeros(len(x), 3)
                pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
                pyro.sample("extra", dist.Normal(zeros[:, 0], 1.0))

    with pytest.raises(ValueError, match=r"guide has the latent sites \['extra', 'z'\]"):
        program.guide_potential(Other(), x)({"z": torch.zeros(6, 3)})


def test_simulated_latents_are_posterior_draws(float64):
    """Over 4,000 images the standardised error has covariance I, each entry within 5 standard
    errors."""
    torch.manual_seed(0)
    vae = LinearGaussianVAE()
    latents, images = metrics.simulate(vae, torch.zeros(4000, 1, 4, 4))
    mean, covariance = vae.exact(images)
    whitened = torch.linalg.solve(torch.linalg.cholesky(covariance), (latents["z"] - mean).T)
    found = whitened @ whitened.T / 4000
    assert (found - torch.eye(3)).abs().max() < 5 * math.sqrt(2 / 4000)
    assert images.shape == (4000, 1, 4, 4)


class Prior(GuideMessenger):
    """Pyro's guide that runs the model, observation included, with a posterior at its latents."""

    def get_posterior(self, name, prior):
        return WideGuide().posterior(*self.args_kwargs[0])


class LabelledGuide(WideGuide):
    """A guide that observes, too: what the encoder says of a class."""

    def guide(self, x):
        super().guide(x)
        with pyro.plate("rows", len(x)):
            pyro.sample(
                "y", dist.Bernoulli(probs=x.new_full((len(x),), 0.2)), obs=x.new_ones(len(x))
            )


@pytest.mark.parametrize("make", [lambda: Prior(WideGuide().model), lambda: LabelledGuide().guide])
def test_what_a_guide_observes_is_no_part_of_its_density(make, wide, inside):
    other = WideGuide()
    other.guide = make()
    found = [
        metrics.nll(vae, inside, 3, generator=torch.Generator().manual_seed(1))
        for vae in (wide, other)
    ]
    torch.testing.assert_close(*found)
    z = {"z": torch.randn(6, 3)}
    found = [program.guide_potential(vae, inside)(z) for vae in (wide, other)]
    torch.testing.assert_close(*found)


class Masked:
    """A latent that counts for some images, in model and guide or in one of them."""

    def __init__(self, in_model=True, in_guide=True):
        self.in_model, self.in_guide = in_model, in_guide

    def model(self, x, known):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            with poutine.mask(mask=known if self.in_model else True):
                pyro.sample("u", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=x.flatten(1))

    def guide(self, x, known):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.flatten(1) / 2, 0.5**0.5).to_event(1))
            with poutine.mask(mask=known if self.in_guide else True):
                pyro.sample("u", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))


def test_masks_are_those_of_both_programs(float64):
    """Of one alone the ratio of densities is that of different latents."""
    x, known = torch.rand(3, 1, 1, 1), torch.tensor([True, False, True])
    expected = -torch.distributions.Normal(0, 2**0.5).log_prob(x.flatten())
    torch.testing.assert_close(metrics.nll(Masked(), (x, known), 2), expected)
    for in_model, in_guide, numbers in (
        (True, False, "1 of 3.*for 0"),
        (False, True, "0 of 3.*for 1"),
    ):
        vae = Masked(in_model, in_guide)
        with pytest.raises(ValueError, match=f"'u' is masked for {numbers}"):
            metrics.nll(vae, (x, known), 2)
        with pytest.raises(ValueError, match=f"'u' is masked for {numbers}"):
            metrics.ais_log_weights(vae, (x, known), lambda latents, *_: latents)


def test_what_clips_its_draws_is_no_simulation(float64):
    class Clipped(LinearGaussianVAE):
        def model(self, x):
            return super().model(x.clamp(0, 1))

    with pytest.raises(ValueError, match="clips .* of 96 pixels drawn"):
        metrics.simulate(Clipped(), torch.zeros(6, 1, 4, 4))


def test_bad_arguments_are_refused(wide, x, inside):
    with pytest.raises(ValueError, match="rows must be an integer of at least 1, got 0"):
        metrics.nll(wide, inside, rows=0)
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1, got 0"):
        metrics.nll(wide, inside, 0)
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1, got '9'"):
        metrics.nll(wide, inside, "9")
    with pytest.raises(ValueError, match="x must have shape"):
        metrics.nll(wide, x[0])
    with pytest.raises(ValueError, match="x is not finite for 2 of 2"):
        metrics.nll(wide, torch.full((2, 1, 4, 4), torch.nan))
    assert bool(metrics.nll(wide, 2 * inside - 1, 2).isfinite().all())  # a Gaussian knows them
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\] where site 'obs' observes it"):
        metrics.nll(TutorialVAE().eval(), 2 * torch.rand(2, 1, 28, 28) - 1, 2)
    with pytest.raises(ValueError, match="vae must have two Pyro programs"):
        metrics.nll(object(), x)

    def stay(latents, potential, step):
        return latents

    with pytest.raises(ValueError, match="num_chains must be an integer of at least 1, got 0"):
        metrics.ais_log_weights(wide, x, stay, num_chains=0)
    with pytest.raises(ValueError, match="schedule falls, and initial is None"):
        metrics.ais_log_weights(wide, x, stay, torch.tensor([1.0, 0.5, 0.0]))
    for schedule in (100, "all", torch.tensor(0.5)):
        with pytest.raises(ValueError, match="schedule must be inverse temperatures"):
            metrics.ais_log_weights(wide, x, stay, schedule)
    with pytest.raises(ValueError, match="must run strictly from 0 to 1"):
        metrics.ais_log_weights(wide, x, stay, [])
    with pytest.raises(ValueError, match=r"latents\['z'\] must have shape \(12, 3\)"):
        metrics.ais_log_weights(wide, x, stay, num_chains=2, initial={"z": torch.zeros(6, 3)})


UNIFORM = {
    "plain": dist.Uniform(torch.zeros(1), 1.0),
    "affine": dist.TransformedDistribution(
        dist.Uniform(torch.zeros(1), 2.0), [dist.transforms.AffineTransform(0.0, 0.5)]
    ),
    "composed": dist.TransformedDistribution(
        dist.Logistic(torch.zeros(1), torch.ones(1)),
        dist.transforms.ComposeTransform(
            [dist.transforms.SigmoidTransform(), dist.transforms.AffineTransform(1.0, -1.0)]
        ),
    ),
}


class Truncated(LinearGaussianVAE):
    """p(z) uniform on (0, 1), q(z | x) a Gaussian that leaves it now and then."""

    prior = "plain"

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", UNIFORM[self.prior].to_event(1))
            pyro.sample("obs", dist.Normal(z, 0.5).to_event(1), obs=x.flatten(1)[:, :1])

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_full((len(x), 1), 0.5), 0.4).to_event(1))


@pytest.mark.parametrize("prior", UNIFORM)
def test_draws_outside_the_support_have_no_weight(prior, float64, monkeypatch):
    """A fifth of the draws; the truth is an integral over (0, 1) of a Gaussian density."""
    monkeypatch.setattr(Truncated, "prior", prior)
    monkeypatch.setattr(contract, "_check_values", lambda *_: None)  # it may see some of them
    x = torch.rand(3, 1, 1, 1)
    normal = torch.distributions.Normal(x.flatten(), 0.5)
    truth = -(normal.cdf(torch.tensor(1.0)) - normal.cdf(torch.tensor(0.0))).log()
    found = metrics.nll(
        Truncated(), x, 40_000, rows=20_000, generator=torch.Generator().manual_seed(1)
    )
    # Relative weights have a standard deviation below 1: five standard errors.
    torch.testing.assert_close(found, truth, rtol=0, atol=5 / math.sqrt(40_000))


@pytest.mark.parametrize("prior", UNIFORM)
def test_a_guide_outside_the_support_is_refused(prior, float64, monkeypatch):
    monkeypatch.setattr(Truncated, "prior", prior)

    class Wide(Truncated):
        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.new_full((len(x), 1), 9.0), 0.4).to_event(1))

    with pytest.raises(ValueError, match="draws values of 'z' outside the support of"):
        metrics.nll(Wide(), torch.rand(3, 1, 1, 1), 10)


def test_a_guide_has_no_density_beyond_its_support(float64):
    """There an Exponential's formula has a value above 1, which annealed walks took for one."""

    class Positive(LinearGaussianVAE):
        def guide(self, x):
            with pyro.plate("data", x.shape[0]):
                pyro.sample("z", dist.Exponential(x.new_ones(x.shape[0], 3)).to_event(1))

    x = torch.rand(2, 1, 4, 4)
    energy = program.guide_potential(Positive(), x)
    found = energy({"z": torch.tensor([[0.5, 1.0, 2.0], [0.5, -1.0, 2.0]])})
    assert found.tolist() == [3.5, math.inf]


def test_a_guide_of_another_shape_is_refused(float64):
    class Larger(LinearGaussianVAE):
        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.new_zeros(len(x), 4), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"shape \(3, 4\) in the guide and \(3, 3\) in the model"):
        metrics.nll(Larger(), torch.rand(3, 1, 4, 4), 10)


def test_nan_is_no_estimate(float64):
    class Broken(LinearGaussianVAE):
        def guide(self, x):
            with pyro.plate("data", len(x)):
                loc = x.new_full((len(x), 3), torch.nan)
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"log p\(x\) of images \[0, 1\] is not a number"):
        metrics.nll(Broken(), torch.rand(2, 1, 4, 4), 10)


def test_a_generator_goes_on_where_starts_are_given(wide, x):
    def noisy(latents, *_):
        return {name: value + 0.1 * torch.randn_like(value) for name, value in latents.items()}

    def draw(generator):
        start = {"z": torch.zeros(6, 3)}
        return metrics.ais_log_weights(
            wide, x, noisy, torch.tensor([1.0, 0.5, 0.0]), 1, start, generator
        )

    generator = torch.Generator().manual_seed(0)
    first, second = draw(generator), draw(generator)
    assert not torch.equal(first, second)
    assert torch.equal(draw(torch.Generator().manual_seed(0)), first)
