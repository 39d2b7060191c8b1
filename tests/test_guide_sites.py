"""Kinds of sites in guides: auxiliary noise, Deltas, masks, discrete sites and flows, and what
training objectives make of them."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.reparam import LocScaleReparam
from torch.distributions import kl_divergence
from torch.distributions import transforms as T

from pyro_vae_defence import attacks, metrics
from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import program, sites
from pyro_vae_defence.models.sites import Kind
from pyro_vae_defence.objectives import AVAE, AVAESS, SE, BetaELBO, BetaTCVAE
from pyro_vae_defence.ops import divergences
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.streams import Streams

pytestmark = pytest.mark.usefixtures("float64")

MIX = torch.tensor([[1.0, 0.2, -0.5, 0.3], [0.1, -0.8, 0.4, 0.6], [0.5, 0.5, 0.2, -0.9]]).double()


def images(num=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, 1, 2, 2, generator=generator, dtype=torch.float64)


def loc(x):
    """Of three latents, ``(N, 3)``; the scale likewise."""
    return x.flatten(1) @ MIX.T


def scale(x):
    return 0.2 + 0.5 * x.flatten(1)[:, :3].abs()


class Programs:
    """Three latents behind four pixels. Subclasses say what the guide samples."""

    def prior(self, x):
        return dist.LogNormal(x.new_zeros(3), 1.0).to_event(1)

    def observe(self, x, z):
        pyro.sample("obs", dist.Normal(z @ MIX, 0.5).to_event(1), obs=x.flatten(1))

    def model(self, x):
        with pyro.plate("data", len(x)):
            self.observe(x, pyro.sample("z", self.prior(x)))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            self.latents(x)


class Direct(Programs):
    def latents(self, x):
        pyro.sample("z", dist.LogNormal(loc(x), scale(x)).to_event(1))


class Auxiliary(Programs):
    """The same q(z | x), the way autoguides write it."""

    def latents(self, x):
        noise = dist.Normal(loc(x), scale(x)).to_event(1)
        u = pyro.sample("u", noise, infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u.exp(), log_density=-u.sum(-1), event_dim=1))


class Planar(Programs):
    """A flow that has no inverse; ``direct`` or written as noise and a Delta."""

    def __init__(self, direct):
        self.direct, self.flow = direct, dist.transforms.Planar(3)
        with torch.no_grad():
            self.flow.u.fill_(1.0), self.flow.w.fill_(1.0)

    def prior(self, x):
        return dist.Normal(x.new_zeros(3), 1.0).to_event(1)

    def latents(self, x):
        base = dist.Normal(0.3 * loc(x), 0.7).to_event(1)
        if self.direct:
            return pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))
        u = pyro.sample("u", base, infer={"is_auxiliary": True})
        z = self.flow(u)
        log_density = -self.flow.log_abs_det_jacobian(u, z)
        return pyro.sample("z", dist.Delta(z, log_density=log_density, event_dim=1))


class Factor(Programs):
    """Once more, with the log-determinant in a factor."""

    def latents(self, x):
        noise = dist.Normal(loc(x), scale(x)).to_event(1)
        u = pyro.sample("u", noise, infer={"is_auxiliary": True})
        pyro.factor("determinant", -u.sum(-1), has_rsample=True)
        pyro.sample("z", dist.Delta(u.exp(), event_dim=1))


class NonCentred(Programs):
    """Once more, with noise that knows nothing of the image."""

    def latents(self, x):
        noise = dist.Normal(torch.zeros_like(loc(x)), 1.0).to_event(1)
        u = pyro.sample("u", noise, infer={"is_auxiliary": True})
        z = (loc(x) + scale(x) * u).exp()
        density = -(loc(x) + scale(x) * u).sum(-1) - scale(x).log().sum(-1)
        pyro.sample("z", dist.Delta(z, log_density=density, event_dim=1))


class Deterministic(Programs):
    def latents(self, x):
        pyro.sample("z", dist.Delta(loc(x).exp()).to_event(1))


class Gaussian(Programs):
    def prior(self, x):
        return dist.Normal(x.new_zeros(3), 1.0).to_event(1)

    def latents(self, x):
        pyro.sample("z", self.q(x))

    def q(self, x):
        return dist.Normal(loc(x), scale(x)).to_event(1)


class Flow(Gaussian):
    """A flow that knows neither mean nor variance: z = 1 + 3 u."""

    def q(self, x):
        return dist.TransformedDistribution(super().q(x), [T.AffineTransform(1.0, 3.0, 1)])


class Simplex(Programs):
    def prior(self, x):
        return dist.Dirichlet(x.new_ones(3))

    def latents(self, x):
        pyro.sample("z", dist.Dirichlet(1.0 + loc(x).exp()))


class Unit(Programs):
    def prior(self, x):
        return dist.Uniform(x.new_zeros(3), 1.0).to_event(1)

    def latents(self, x):
        pyro.sample("z", dist.Beta(1.0 + scale(x), 2.0).to_event(1))


class Discrete(Gaussian):
    """A class and a Gaussian given the class."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=x.new_zeros(3)))
            self.observe(x, pyro.sample("z", self.prior(x)) + y[:, None])

    def latents(self, x):
        pyro.sample("y", dist.Categorical(logits=loc(x)))
        super().latents(x)


def trace_of(fn, *args):
    return poutine.trace(fn).get_trace(*args)


# --- Classification -------------------------------------------------------------------------------


def test_every_site_has_one_kind():
    def guide(x):
        with pyro.plate("data", 4, subsample_size=2):
            u = pyro.sample("noise", dist.Normal(torch.zeros(2), 1.0), infer={"is_auxiliary": True})
            pyro.sample("point", dist.Delta(u))
            pyro.sample("masked", dist.Normal(u, 1.0).mask(False))
            pyro.sample("plain", dist.Normal(torch.zeros(2, 2), 1.0).to_event(1))
            pyro.sample("class", dist.OneHotCategorical(torch.ones(2, 3)))
            pyro.deterministic("double", 2 * u)
            pyro.factor("factor", u, has_rsample=True)
            pyro.sample("label", dist.Bernoulli(0.5), obs=torch.zeros(2))

    trace = trace_of(guide, None)
    found = {n: sites.kind(s) for n, s in trace.nodes.items() if s["type"] == "sample"}
    assert found == {
        "data": Kind.PLATE, "noise": Kind.AUXILIARY, "point": Kind.POINT, "masked": Kind.LATENT,
        "plain": Kind.LATENT, "class": Kind.DISCRETE, "double": Kind.DETERMINISTIC,
        "factor": Kind.OBSERVED, "label": Kind.OBSERVED,
    }  # fmt: skip
    assert [s["name"] for s in sites.latent_sites(trace)] == ["point", "masked", "plain", "class"]
    assert [s["name"] for s in sites.observed_sites(trace)] == ["factor", "label"]


def test_a_reparametrised_site_is_neither_latent_nor_observed():
    model = poutine.reparam(Gaussian().model, {"z": LocScaleReparam(0.0)})
    trace = trace_of(model, images())
    assert [s["name"] for s in sites.latent_sites(trace)] == ["z_decentered"]
    assert [s["name"] for s in sites.observed_sites(trace)] == ["obs"]
    with pytest.raises(ValueError, match="model observes nothing"):
        sites.observed_sites(trace_of(Gaussian().guide, images()))


# --- Auxiliary noise ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Auxiliary, Factor, NonCentred])
def test_auxiliary_noise_makes_the_latents_and_their_density(make):
    x, streams = images(), Streams.create(4, seed=3)
    latents, log_q = program.sample_with_log_prob(make(), x, streams=streams)
    expected = program.encode(Direct(), x, streams=streams)
    assert latents.keys() == {"z"}
    torch.testing.assert_close(latents["z"], expected["z"])
    by_hand = dist.LogNormal(loc(x), scale(x)).log_prob(latents["z"]).sum(1)
    torch.testing.assert_close(log_q, by_hand)
    nll = functools.partial(metrics.nll, x=x, num_samples=20)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    torch.testing.assert_close(
        nll(make(), generator=generators[0]), nll(Direct(), generator=generators[1])
    )
    # The noise at its mean.
    torch.testing.assert_close(program.posterior_mean(make(), x), {"z": loc(x).exp()})


@pytest.mark.parametrize("make", [Auxiliary, Factor])
def test_divergences_of_the_noise_are_those_of_the_latents(make):
    x, other = images(seed=1), images(seed=2)
    p, q = (program.posterior(Direct(), each)["z"] for each in (x, other))
    value = attacks.symmetric_kl(make())(other)(x)
    torch.testing.assert_close(value, 0.5 * (kl_divergence(p, q) + kl_divergence(q, p)))
    result = attacks.PGD(attacks.symmetric_kl(make()), Linf(0.1), num_steps=3)(x)
    reached = attacks.symmetric_kl(make())(x)(result.x_adv[0])
    torch.testing.assert_close(result.objective[0], reached)
    assert (result.objective > 0).all()


def test_noise_that_the_image_transforms_has_no_divergence_of_its_own():
    with pytest.raises(
        ValueError, match="'z' of the guide makes a latent .* function of the image"
    ):
        attacks.symmetric_kl(NonCentred())(images())


@pytest.mark.parametrize("make", [Auxiliary, Deterministic])
def test_defences_run_on_guides_with_deltas(make):
    x = images()
    for initial in ("guide", "mean"):
        result = MCMCDefence(make(), BatchedHMC, 2, 2, initial=initial)(x)
        assert result.samples.keys() == {"z"}
        assert result.latents["z"].isfinite().all()


# --- Deltas without a density ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["symmetric_kl", "forward_kl", "reverse_kl", "squared_wasserstein"]
)
def test_a_point_has_no_divergence(name):
    with pytest.raises(ValueError, match=r"site 'z'.*mean"):
        getattr(attacks, name)(Deterministic())(images())


def test_points_are_compared_by_their_place():
    x, other = images(seed=1), images(seed=2)
    value = attacks.mean_distance(Deterministic())(other)(x)
    torch.testing.assert_close(value, (loc(x).exp() - loc(other).exp()).square().sum(1))
    torch.testing.assert_close(program.encode(Deterministic(), x), {"z": loc(x).exp()})


class Mixed(Programs):
    """Noise for z, none for c."""

    def observe(self, x, z):
        pyro.sample("c", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        super().observe(x, z)

    def latents(self, x):
        Auxiliary.latents(self, x)
        pyro.sample("c", dist.Delta(x.flatten(1)[:, :2]).to_event(1))


class Wide(Programs):
    """More noise than latents."""

    def latents(self, x):
        u = pyro.sample("u", dist.Normal(x.flatten(1), 1.0).to_event(1), infer={"is_auxiliary": 1})
        pyro.sample("z", dist.Delta(u[:, :3].exp(), log_density=u[:, 3], event_dim=1))


class Marginal(Programs):
    """Noise behind a latent with a density of its own."""

    def latents(self, x):
        u = pyro.sample("u", dist.Normal(loc(x), 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("z", dist.LogNormal(u, 1.0).to_event(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Deterministic, "site 'z' of the guide is a Delta"),
        (Mixed, "site 'c' of the guide is a Delta"),
        (Wide, r"auxiliary sites \['u'\] of the guide hold more numbers"),
        (Marginal, r"auxiliary sites \['u'\] of the guide hold more numbers"),
    ],
)
def test_draws_without_a_known_density(make, message):
    with pytest.raises(ValueError, match=message):
        metrics.nll(make(), images(), 2)


def test_only_deltas_with_noise_are_replaced_by_it():
    q = program.posterior(Mixed(), images())
    assert list(q) == ["u", "c"]
    assert list(program.encode(Mixed(), images())) == ["z", "c"]


@pytest.mark.parametrize("make", [Auxiliary, Deterministic])
def test_a_delta_has_no_density_at_given_latents(make):
    x = images()
    with pytest.raises(ValueError, match="at given latents is not known"):
        program.guide_potential(make(), x)({"z": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match="at given latents is not known"):
        metrics.ais_log_weights(make(), x, lambda *_: None, num_chains=1)


# --- Masks ----------------------------------------------------------------------------------------

ROWS = torch.tensor([True, False, True, False])


def rows(x):
    return torch.arange(len(x)) % 2 == 0


class Masked(Programs):
    """A site that counts in some rows, one that never does, and one in two of three places."""

    def guide(self, x):
        data = pyro.plate("data", len(x), dim=-2)
        with data, poutine.mask(mask=rows(x)[:, None]):
            pyro.sample("z", dist.Normal(loc(x)[:, None], scale(x)[:, None]).to_event(1))
        with data, poutine.mask(mask=False):
            pyro.sample("none", dist.Normal(100 * x.sum((2, 3)), 1.0))
        places = x.flatten(1)[:, :3]
        count = poutine.mask(mask=torch.tensor([True, True, False]))
        with data, pyro.plate("places", 3, dim=-1), count:
            pyro.sample("place", dist.Normal(places, 1.0 + places))


@pytest.mark.parametrize(
    ("name", "divergence"),
    [
        ("forward_kl", kl_divergence),
        ("reverse_kl", lambda p, q: kl_divergence(q, p)),
        ("symmetric_kl", lambda p, q: 0.5 * (kl_divergence(p, q) + kl_divergence(q, p))),
        ("mean_distance", lambda p, q: (p.mean - q.mean) ** 2),
        (
            "squared_wasserstein",
            lambda p, q: (p.mean - q.mean) ** 2 + (p.stddev - q.stddev) ** 2,
        ),
    ],
)
def test_divergences_leave_out_what_is_masked(name, divergence):
    x, other = images(seed=1), images(seed=2)

    def by_hand(parameters):
        p, q = (torch.distributions.Normal(*parameters(each)) for each in (x, other))
        return divergence(p, q)

    z = by_hand(lambda x: (loc(x), scale(x))).sum(1)
    places = by_hand(lambda x: (x.flatten(1)[:, :3], 1.0 + x.flatten(1)[:, :3]))
    expected = torch.where(ROWS, z, 0.0) + places[:, 0] + places[:, 1]
    torch.testing.assert_close(getattr(attacks, name)(Masked())(other)(x), expected)
    # A mask of the distribution itself, below the event, is no other thing.
    everywhere = getattr(attacks, name)(Gaussian())(other)(x)

    class Inner(Gaussian):
        def q(self, x):
            return dist.Normal(loc(x), scale(x)).mask(rows(x)[:, None].expand(-1, 3)).to_event(1)

    inner = getattr(attacks, name)(Inner())(other)(x)
    torch.testing.assert_close(inner, torch.where(ROWS, everywhere, 0.0))


# --- Discrete sites, flows ------------------------------------------------------------------------


def test_discrete_sites_have_divergences_but_no_mean_of_their_own():
    x, other = images(seed=1), images(seed=2)
    p, q = loc(x).softmax(1), loc(other).softmax(1)
    expected = (p * (p / q).log()).sum(1)
    value = attacks.forward_kl(Discrete(), sites="y")(other)(x)
    torch.testing.assert_close(value, expected)
    assert list(program.encode(Discrete(), x)) == ["z"]
    with pytest.raises(ValueError, match="site 'y' is Categorical, whose mean is NaN"):
        attacks.mean_distance(Discrete())(other)


def test_flows_have_no_mean():
    with pytest.raises(ValueError, match=r"'z' is TransformedDistribution.*initial=\"guide\""):
        program.posterior_mean(Flow(), images())
    with pytest.raises(ValueError, match="'z' is TransformedDistribution.*symmetric_kl"):
        attacks.mean_distance(Flow())(images())


def test_an_infinite_mean():
    class Heavy(Programs):
        def latents(self, x):
            pyro.sample("z", dist.HalfCauchy(scale(x)).to_event(1))

    with pytest.raises(ValueError, match="'z' is HalfCauchy, whose mean is infinite"):
        program.posterior_mean(Heavy(), images())


class Folded(Programs):
    """|u| for Gaussian u, whose divergence is less than that of u."""

    def prior(self, x):
        return dist.HalfNormal(x.new_ones(3)).to_event(1)

    def latents(self, x):
        pyro.sample("z", dist.FoldedDistribution(dist.Normal(loc(x), scale(x))).to_event(1))


def test_a_fold_has_no_divergence_of_its_base():
    x = images()
    with pytest.raises(ValueError, match="no KL-divergence is registered"):
        attacks.symmetric_kl(Folded())(x)
    q = dist.Normal(loc(x), scale(x)).to_event(1)
    base = dist.TransformedDistribution(q, dist.transforms.SoftmaxTransform())
    with pytest.raises(ValueError, match="no KL-divergence is registered"):
        divergences.kl({"z": base}, {"z": base})
    within = dist.TransformedDistribution(base, dist.transforms.AffineTransform(0.0, 2.0))
    with pytest.raises(ValueError, match="no KL-divergence is registered"):
        divergences.kl({"z": within}, {"z": within})


def test_half_gaussians_have_the_divergence_of_whole_ones():
    scales = torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0, 0.7]])
    whole, half = (
        divergences.kl(*({"z": make(s).to_event(1)} for s in scales))
        for make in (lambda s: dist.Normal(0 * s, s), dist.HalfNormal)
    )
    torch.testing.assert_close(whole, half)


# --- The variance as a metric ---------------------------------------------------------------------


def variance_of(make, x, **options):
    generator = torch.Generator().manual_seed(2)
    return program.mean_posterior_variance(make(), [x], generator=generator, **options)["z"]


def test_closed_forms_of_the_unconstrained_variance():
    x = images(50)
    expected = scale(x).square().mean(0)
    torch.testing.assert_close(variance_of(Gaussian, x), expected)
    torch.testing.assert_close(variance_of(Direct, x), expected)  # that of log z
    assert (variance_of(Deterministic, x) == 0).all()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Auxiliary, lambda x: scale(x).square()),
        (Flow, lambda x: 9 * scale(x).square()),
        # The logit of Beta(a, b) is a difference of logarithms of Gammas.
        (Unit, lambda x: torch.polygamma(1, 1 + scale(x)) + torch.polygamma(1, torch.tensor(2.0))),
    ],
)
def test_other_variances_are_estimated_from_draws(make, expected):
    x = images(200)
    # 200 x 31 degrees of freedom, standard error 1.8 % (Gaussian) to 2.3 %.
    torch.testing.assert_close(variance_of(make, x), expected(x).mean(0), rtol=0.12, atol=0)


def test_estimated_variances_do_not_depend_on_batches():
    x = images(6)
    whole, parts = (
        program.mean_posterior_variance(Flow(), x.split(n), torch.Generator().manual_seed(4))["z"]
        for n in (6, 2)
    )
    torch.testing.assert_close(whole, parts)


def test_a_metric_fits_the_kernel():
    x = images()
    variance = program.mean_posterior_variance(Simplex(), [x])
    assert variance["z"].shape == (2,)
    kernel = functools.partial(BatchedHMC, inverse_mass_matrix=variance)
    assert MCMCDefence(Simplex(), kernel, 2, 2)(x).latents["z"].shape == (4, 3)
    # Kernels do not move discrete latents.
    assert list(program.mean_posterior_variance(Discrete(), [x])) == ["z"]


def test_a_variance_that_does_not_exist():
    class Heavy(Gaussian):
        def q(self, x):
            return dist.Cauchy(loc(x), scale(x)).to_event(1)

    with pytest.raises(ValueError, match="site 'z' of the guide, .* not finite"):
        variance_of(Heavy, images())
    with pytest.raises(ValueError, match="'z' is Cauchy, whose mean is NaN"):
        program.posterior_mean(Heavy(), images())


# --- What an attack asks of its objective ---------------------------------------------------------


class Binarised(Gaussian):
    def guide(self, x):
        super().guide((x > 0.5).to(x))


@pytest.mark.parametrize(
    "objective",
    [
        attacks.symmetric_kl(Binarised()),
        lambda x_ref: lambda x: x.detach().sum((1, 2, 3)),
        lambda x_ref: lambda x: (x > 0.5).to(x).sum((1, 2, 3)) * torch.ones(1, requires_grad=True),
    ],
)
def test_an_objective_without_gradient(objective):
    with pytest.raises(ValueError, match=r"no gradient in the image.*attacks\.Square"):
        attacks.PGD(objective, Linf(0.1), num_steps=2)(images())
    assert attacks.Square(objective, Linf(0.1), num_steps=2)(images()).objective.shape == (1, 4)


@pytest.mark.parametrize("attack", [attacks.PGD, attacks.Square])
@pytest.mark.parametrize("shape", [(), (4, 3), (1,)])
def test_an_objective_of_another_shape(attack, shape):
    with pytest.raises(ValueError, match=r"one value per image, shape \(4,\)"):
        attack(lambda x_ref: lambda x: x.sum() * torch.ones(shape), Linf(0.1), num_steps=1)(
            images()
        )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_objective_without_a_value(value):
    def prepared(rows):
        return lambda x_ref: lambda x: x.sum((1, 2, 3)) * 0 + rows

    everywhere = prepared(torch.tensor([value]))
    with pytest.raises(ValueError, match=f"not finite at any of the 8 .* value is {value}"):
        attacks.PGD(everywhere, Linf(0.1), num_steps=1, num_restarts=2)(images())
    somewhere = prepared(torch.tensor([value, 1.0, value, value]))
    result = attacks.PGD(somewhere, Linf(0.1), num_steps=1)(images())
    assert result.objective.isfinite().tolist() == [[False, True, False, False]]


# --- Two programs, the same latents ---------------------------------------------------------------


def compare(model, guide):
    x = images()
    return sites.check_same_latents(trace_of(model, x), trace_of(guide, x))


def test_programs_share_their_latents():
    compare(Auxiliary().model, Auxiliary().guide)
    compare(Discrete().model, Discrete().guide)
    enumerated = pyro.infer.config_enumerate(Discrete().model)
    compare(enumerated, Gaussian().guide)
    compare(enumerated, Discrete().guide)
    with pytest.raises(ValueError, match=r"model has .* \['y', 'z'\], the guide \['z'\]"):
        compare(Discrete().model, Gaussian().guide)
    with pytest.raises(ValueError, match=r"model has .* \['z'\], the guide \['y', 'z'\]"):
        compare(Gaussian().model, Discrete().guide)

    with pytest.raises(ValueError, match=r"model marks its sites \['u'\] as auxiliary"):
        compare(Auxiliary().guide, Gaussian().guide)


# --- Training objectives --------------------------------------------------------------------------


class Several(Gaussian):
    """Two observations and a factor, one of them scaled and one masked."""

    def observe(self, x, z):
        super().observe(x, z)
        with poutine.scale(scale=2.0), poutine.mask(mask=rows(x)):
            pyro.sample("sum", dist.Normal(z.sum(1), 1.0), obs=x.sum((1, 2, 3)))
        pyro.factor("penalty", -z.pow(4).sum(-1))


def test_the_reconstruction_is_all_that_is_observed():
    x = images()
    torch.manual_seed(1)
    terms = BetaELBO().terms(Several().model, Several().guide, x)
    torch.manual_seed(1)
    z = trace_of(Several().guide, x).nodes["z"]["value"]
    image = dist.Normal(z @ MIX, 0.5).log_prob(x.flatten(1)).sum(1) - z.pow(4).sum(1)
    total = dist.Normal(z.sum(1), 1.0).log_prob(x.sum((1, 2, 3)))
    torch.testing.assert_close(terms["reconstruction"], image + total)
    loss = terms["kl"] - image - torch.where(ROWS, 2 * total, 0.0)
    torch.testing.assert_close(terms["loss"], loss)
    with pytest.raises(ValueError, match="model observes nothing"):
        BetaELBO().loss(Gaussian().guide, Gaussian().guide, x)


@pytest.mark.parametrize("make", [Auxiliary, Factor, NonCentred, Deterministic])
def test_deltas_train_as_with_pyro(make):
    x = images()
    losses = {}
    for name, elbo in {"ours": BetaELBO(), "double": BetaELBO(2.0), "pyro": Trace_ELBO()}.items():
        torch.manual_seed(1)
        losses[name] = elbo.loss(make().model, make().guide, x)
    assert losses["ours"] == pytest.approx(losses["pyro"], rel=1e-12)
    torch.manual_seed(1)
    terms = BetaELBO().terms(make().model, make().guide, x)
    # beta on every part of log q and log p(z).
    assert losses["double"] - losses["ours"] == pytest.approx(float(terms["kl"].sum()), rel=1e-12)


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_latents_that_an_objective_cannot_train():
    x = images()
    with pytest.raises(ValueError, match="'y' of the guide is Categorical, .*TraceEnum_ELBO"):
        BetaELBO().loss(Discrete().model, Discrete().guide, x)
    enumerated = pyro.infer.config_enumerate(Discrete().model)
    for objective in (BetaELBO(), BetaTCVAE(2.0, 100), AVAESS()):
        with pytest.raises(ValueError, match="site 'y' of the model .*TraceEnum_ELBO"):
            objective.loss(enumerated, Gaussian().guide, x)
        with pytest.raises(ValueError, match=r"the guide \['z'\]"):
            objective.loss(Discrete().model, Gaussian().guide, x)


@pytest.mark.parametrize(
    "objective", [AVAE(), AVAESS(), BetaTCVAE(2.0, 100), SE(lambda x: x, gamma=1.0)]
)
def test_closed_forms_name_what_is_not_gaussian(objective):
    with pytest.raises(
        ValueError, match="site .z. is (Delta|LogNormal); this objective needs Gaussian"
    ):
        objective.loss(Auxiliary().model, Auxiliary().guide, images())


# --- What Deltas made of noise say of their density -----------------------------------------------


def made(function, log_density, size=3):
    class Made(Programs):
        def latents(self, x):
            fn = dist.Normal(loc(x)[:, :size], 1.0).to_event(1)
            u = pyro.sample("u", fn, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(function(u), log_density=log_density(u), event_dim=1))

    return Made()


REFUSED = {
    "none": (made(torch.exp, lambda u: torch.zeros(len(u))), "log_density 0 where their function"),
    "another": (made(lambda u: 2 * u.exp(), lambda u: -u.sum(-1)), "log_density .* where their"),
    "fewer numbers": (
        made(lambda u: (u @ torch.ones(2, 3).to(u)).exp(), lambda u: u[:, 0] * 0, 2),
        "3 numbers made of 2",
    ),
}


@pytest.mark.parametrize(("vae", "message"), REFUSED.values(), ids=REFUSED)
def test_a_log_density_that_is_not_the_functions_is_refused(vae, message):
    with pytest.raises(ValueError, match=message):
        metrics.nll(vae, images(), 2)


def test_a_log_density_that_is_the_functions_is_taken():
    vae = made(lambda u: 2 * u.exp(), lambda u: -u.sum(-1) - 3 * math.log(2.0))
    assert metrics.nll(vae, images(), 2).isfinite().all()


def test_a_flow_without_an_inverse_is_noise_and_a_delta():
    with pytest.raises(ValueError, match=r"flow without an inverse, as Planar.*is_auxiliary"):
        metrics.nll(Planar(direct=True), images())
    # Up to five standard errors of an effective size of 3,000; it is 3,400 and more.
    x = images(2)
    found = metrics.nll(Planar(False), x, 20_000, 20_000, torch.Generator().manual_seed(0))
    covariance = MIX.T @ MIX + 0.25 * torch.eye(4)
    exact = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(x.flatten(1))
    torch.testing.assert_close(found, -exact, rtol=0, atol=0.09)
