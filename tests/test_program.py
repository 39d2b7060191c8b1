"""Reading VAE programs: sites, posteriors, energies."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import HierarchicalVAE, LinearGaussianVAE, TutorialVAE
from pyro import poutine
from torch import nn

from pyro_vae_defence.models import ConvVAE, contract, program
from pyro_vae_defence.models.compiled import Recorder
from pyro_vae_defence.models.conditions import BoundProgram
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.boundary import public, remembering
from pyro_vae_defence.ops.streams import Streams


def test_energy_of_the_linear_gaussian_vae(linear_vae):
    x, z = torch.randn(5, 1, 4, 4), torch.randn(5, 3)
    mean = z @ linear_vae.weight.T + linear_vae.bias
    expected = -(
        dist.Normal(mean, linear_vae.noise).log_prob(x.flatten(1)).sum(1)
        + dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    )
    assert torch.allclose(program.potential(linear_vae, x)({"z": z}), expected)


def test_energy_of_a_hierarchical_constrained_program(float64):
    x = torch.rand(5, 1, 4, 4)
    energy = program.potential(HierarchicalVAE(), x)
    assert {s.name: s.shape for s in energy.sites} == {"top": (1, 2), "rate": (1,), "low": (3,)}
    assert set(energy.transforms) == {"rate"}
    u = {"top": torch.randn(5, 1, 2), "rate": torch.randn(5, 1), "low": torch.randn(5, 3)}
    rate = u["rate"].exp()
    total = dist.Normal(0.0, 1.0).log_prob(u["top"]).sum((1, 2))
    total += (dist.Gamma(2.0, 1.5).log_prob(rate) + u["rate"])[:, 0]  # |d exp(u) / du| = exp(u)
    total += dist.Normal(u["top"].sum((1, 2))[:, None], 0.5).log_prob(u["low"]).sum(1)
    mean = (u["low"].sum(1) * rate[:, 0])[:, None]
    total += dist.Normal(mean, 1.0).log_prob(x.flatten(1)).sum(1)
    assert torch.allclose(energy(u), -total)
    back = energy.unconstrain(energy.constrain(u))
    assert torch.allclose(back["rate"], u["rate"])


def test_energy_ignores_beta_but_respects_masks(float64):
    x, z = torch.rand(4, 1, 28, 28), torch.randn(4, 64)
    vae = ConvVAE().double().eval()
    plain = program.ModelPotential(vae.model, x)({"z": z})
    scaled = program.ModelPotential(vae.model, x, beta=7.0)({"z": z})
    assert torch.equal(plain, scaled)

    def masked(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=torch.arange(len(x)) != 1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

    value = program.ModelPotential(masked, torch.ones(4))({"z": torch.ones(4)})
    assert value[1] == 0
    assert torch.allclose(
        value[0],
        -dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0))
        - dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0)),
    )


def test_deterministic_sites_have_no_density(float64):
    def model(x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[0], 2), 1.0).to_event(1))
            pyro.deterministic("twice", 2 * z, event_dim=1)
            pyro.sample("obs", dist.Normal(z.sum(-1), 1.0), obs=x)

    energy = program.ModelPotential(model, torch.zeros(3))
    assert [s.name for s in energy.sites] == ["z"]
    assert energy({"z": torch.zeros(3, 2)}).shape == (3,)


@pytest.mark.usefixtures("float64")
def test_rows_do_not_see_each_other(tutorial_vae):
    x, z = torch.rand(6, 1, 28, 28), torch.randn(6, 5)
    whole = program.potential(tutorial_vae, x)({"latent": z})
    for i in range(6):
        alone = program.potential(tutorial_vae, x[i : i + 1])({"latent": z[i : i + 1]})
        assert torch.allclose(whole[i], alone[0], rtol=1e-12)


def test_reads_the_tutorial_vae(tutorial_vae):
    x = torch.rand(3, 1, 28, 28)
    assert program.image_map(tutorial_vae, x).name == "obs"
    q = program.posterior(tutorial_vae, x)
    assert q["latent"].batch_shape == (3,)
    latents = program.encode(tutorial_vae, x)
    assert latents["latent"].shape == (3, 5)
    # Any number of rows decodes, whatever x was.
    images = program.decode(tutorial_vae, {"latent": torch.randn(7, 5)}, (1, 28, 28))
    assert images.shape == (7, 1, 28, 28)
    assert torch.equal(program.posterior_mean(tutorial_vae, x)["latent"], q["latent"].mean)


def test_encoding_draws_from_the_guide_and_from_each_images_stream(linear_vae):
    x = torch.randn(4, 1, 4, 4)
    streams = Streams.create(4, 5000, seed=0)
    folded = x.repeat(5000, 1, 1, 1)
    z = program.encode(linear_vae, folded, streams=streams)["z"].reshape(5000, 4, 3)
    mean, covariance = linear_vae.exact(x)
    sd = covariance.diagonal().sqrt()
    # 12 means, 5 standard errors each: error rate 7e-6.
    assert ((z.mean(0) - mean).abs() < 5 * sd / 5000**0.5).all()
    alone = program.encode(linear_vae, x[2:3], streams=Streams.create(1, seed=0, first_image=2))
    # A matrix product of one row rounds differently from one of 20,000.
    torch.testing.assert_close(alone["z"][0], z[0, 2], rtol=1e-12, atol=1e-12)


def test_what_is_known_of_programs_is_known_until_the_call_ends_or_they_change():
    vae, other, x = TutorialVAE(), TutorialVAE(), torch.rand(5, 1, 28, 28)
    labels, found = torch.arange(5), []

    def look(vae=vae, x=x, *conditions):
        number = len(found)
        model = BoundProgram(vae.model, conditions, {}) if conditions else vae.model
        value = contract.once("look", (model, vae.guide), x, lambda: found.append(x) or number)
        return "again" if len(found) == number else value

    @public
    def call():
        def failing():
            raise ValueError("found")

        assert [look(), look(), look(x=1 - x), look(x=x[:3])] == [0, "again", "again", "again"]
        for change in ({"x": x[:2]}, {"x": x.double()}, {"x": x[..., 1:]}, {"vae": other}):
            assert look(**change) != "again"
            assert look(**change) == look() == "again"
        assert look(vae, x, labels) != "again"
        assert [look(vae, x, 1 - labels), look(vae, x, None)] == ["again", len(found) - 1]
        assert look(vae, x, labels.double()) != "again"
        for change in (vae.eval, lambda: vae.load_state_dict(other.state_dict())):
            change()
            assert look() != "again"
            assert look() == "again"
        # What has failed is not known, nor what cannot be told from others.
        for _ in range(2):
            with pytest.raises(ValueError, match="found"):
                contract.once("fails", (vae.model,), x, failing)
            assert contract.once("list", (vae.model,), x, lambda: len(found), [[]]) == len(found)
            found.append(None)

    call()
    assert look() != "again"
    assert look() != "again"  # no public call is under way
    with remembering():
        assert public(look)() != "again"
        assert public(look)() == look() == "again"
        with remembering():
            assert public(look)() == "again"
            vae.load_state_dict(other.state_dict())
            assert look() != "again"
        assert public(look)() == "again"
    assert public(look)() != "again"


def test_a_call_reads_the_contract_once(linear_vae):
    """However often it runs the defence; one that is wrong is refused by every call."""
    x, runs = torch.rand(3, 1, 4, 4), []

    class Counted(LinearGaussianVAE):
        def guide(self, x):
            runs.append(len(x))
            return super().guide(x)

    vae = Counted()

    @public
    def call(times):
        before = len(runs)
        for _ in range(times):
            program.at_images(vae, x)
        return len(runs) - before

    once = call(1)
    assert once >= 5
    assert call(4) == once
    vae.model = lambda x: LinearGaussianVAE.model(vae, x - x.mean(0))
    for _ in range(2):
        with pytest.raises(ValueError, match="couples the images"):
            program.potential(vae, x)


@pytest.mark.parametrize("make", [LinearGaussianVAE, HierarchicalVAE])
def test_repeated_draws_are_those_of_the_guide_on_repeated_images(make, float64):
    vae = make()
    runs = 0
    guide = vae.guide

    def counted(x):
        nonlocal runs
        runs += 1
        return guide(x)

    vae.guide = counted
    x = torch.rand(3, 1, 4, 4)
    draw = program.GuideDraws(vae, x)
    before = runs
    streams = Streams.create(3, 5, seed=7)
    latents, log_q = draw(5, streams)
    # A flat Gaussian guide has run once and for all.
    assert runs - before == (0 if make is LinearGaussianVAE else 1)
    expected, expected_log_q = program.sample_with_log_prob(
        vae, x.repeat(5, 1, 1, 1), streams=streams
    )
    assert latents.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(latents[name], expected[name])
    torch.testing.assert_close(log_q, expected_log_q)


def test_evaluation_mode_restores_each_module():
    net = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).train()
    net[1].eval()
    with program.evaluation_mode(net, object()):
        assert not any(m.training for m in net.modules())
    assert [m.training for m in net] == [True, False]


def test_mean_posterior_variance_is_an_average_over_images(tutorial_vae):
    x = torch.rand(10, 1, 28, 28)
    variance = program.posterior(tutorial_vae, x)["latent"].variance
    got = program.mean_posterior_variance(tutorial_vae, [(x[:6], None), (x[6:], None)])
    assert torch.allclose(got["latent"], variance.mean(0))
    with pytest.raises(ValueError, match="batches is empty"):
        program.mean_posterior_variance(tutorial_vae, [])


class ClassVAE:
    """A class y whose components of z and of the image differ, in model and guide (Kingma's M2)."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)

        def table(*shape):
            return torch.randn(shape, generator=generator).double()

        self.classes, self.loc, self.bias = table(3), table(3, 2), table(3, 16)
        self.weight, self.inference = table(2, 16), table(16, 3)

    def model(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=self.classes))
            z = pyro.sample("z", dist.Normal(self.loc[y], 0.8).to_event(1))
            mean = z @ self.weight + self.bias[y]
            pyro.sample("obs", dist.Normal(mean, 0.5).to_event(1), obs=x.flatten(1))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=x.flatten(1) @ self.inference))
            pyro.sample("z", dist.Normal(self.loc[y] + x.flatten(1)[:, :2], 0.4).to_event(1))


@pytest.mark.usefixtures("float64")
class TestDiscreteLatents:
    """Sums over three classes, written out."""

    def setup_method(self):
        self.vae = ClassVAE()
        generator = torch.Generator().manual_seed(4)
        self.x = torch.rand(4, 1, 4, 4, generator=generator).double()
        self.z = torch.randn(4, 2, generator=generator).double().requires_grad_()

    def energy(self, rows=slice(None)):
        vae, x, z = self.vae, self.x[rows].flatten(1)[:, None], self.z[rows][:, None]
        means = z @ vae.weight + vae.bias
        terms = vae.classes.log_softmax(0) + dist.Normal(vae.loc, 0.8).log_prob(z).sum(-1)
        return -(terms + dist.Normal(means, 0.5).log_prob(x).sum(-1)).logsumexp(-1)

    def guide_parts(self):
        x = self.x.flatten(1)
        return (x @ self.vae.inference).log_softmax(-1), self.vae.loc + x[:, None, :2]

    def test_energy_and_gradient(self):
        potential = program.potential(self.vae, self.x)
        assert [site.name for site in potential.sites] == ["z"]
        assert potential.prototype.keys() == {"z"}
        energy = potential({"z": self.z})
        torch.testing.assert_close(energy, self.energy())
        found = torch.autograd.grad(energy.sum(), self.z)
        torch.testing.assert_close(found, torch.autograd.grad(self.energy().sum(), self.z))
        rows = torch.tensor([2, 0])
        torch.testing.assert_close(potential.take(rows)({"z": self.z[rows]}), self.energy(rows))
        torch.testing.assert_close(potential.at(self.x[:1])({"z": self.z[:1]}), self.energy([0]))

    def test_perturbation_aware_energy(self):
        vae, x, z = self.vae, self.x.flatten(1)[:, None], self.z[:, None]
        means = z @ vae.weight + vae.bias
        closest = means.clamp(x - 0.1, x + 0.1).clamp(0.0, 1.0)  # of each class
        terms = vae.classes.log_softmax(0) + dist.Normal(vae.loc, 0.8).log_prob(z).sum(-1)
        terms = terms + dist.Normal(means, 0.5).log_prob(closest).sum(-1)
        energy = program.potential(vae, self.x, Linf(0.1))({"z": self.z})
        torch.testing.assert_close(energy, -terms.logsumexp(-1))

    def test_recording(self):
        recorded = Recorder()(program.potential(self.vae, self.x))
        energy, gradient = recorded.energy_and_gradient({"z": self.z})
        assert recorded.captured, recorded.why_not
        torch.testing.assert_close(energy, self.energy())
        expected = torch.autograd.grad(self.energy().sum(), self.z)[0]
        torch.testing.assert_close(gradient["z"], expected)

    def test_density_of_the_guide(self):
        classes, locs = self.guide_parts()
        latents, log_prob = program.sample_with_log_prob(self.vae, self.x)
        assert latents.keys() == {"z"}

        def expected(z):
            return (classes + dist.Normal(locs, 0.4).log_prob(z[:, None]).sum(-1)).logsumexp(-1)

        torch.testing.assert_close(log_prob, expected(latents["z"]))
        energy = program.guide_potential(self.vae, self.x)({"z": self.z})
        torch.testing.assert_close(energy, -expected(self.z))

    def test_means(self):
        classes, locs = self.guide_parts()
        mean = program.posterior_mean(self.vae, self.x)["z"]
        torch.testing.assert_close(mean, (classes.exp()[..., None] * locs).sum(1))
        z, vae = self.z[:, None], self.vae
        weights = (vae.classes + dist.Normal(vae.loc, 0.8).log_prob(z).sum(-1)).softmax(-1)
        expected = (weights[..., None] * (z @ vae.weight + vae.bias)).sum(1)
        decoded = program.decode(vae, {"z": self.z}, (1, 4, 4))
        torch.testing.assert_close(decoded, expected.reshape(4, 1, 4, 4))

    def test_draws_are_the_continuous_latents(self):
        assert program.encode(self.vae, self.x).keys() == {"z"}
        assert program.prior(self.vae, self.x).keys() == {"z"}

    def test_draws_are_of_each_images_stream(self):
        streams = Streams.create(4, seed=1)
        together = program.encode(self.vae, self.x, streams=streams)["z"]
        one = Streams.create(1, seed=1, first_image=2)
        alone = program.encode(self.vae, self.x[2:3], streams=one)["z"]
        torch.testing.assert_close(together[2:3], alone)

    @pytest.mark.parametrize(
        "fn",
        [
            dist.Categorical(torch.tensor([0.2, 0.5, 0.3])),
            dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])),
            dist.Bernoulli(torch.tensor([0.2, 0.9])).to_event(1),
        ],
    )
    def test_classes_have_their_probabilities(self, fn):
        def guide(x):
            with pyro.plate("data", len(x)):
                y = pyro.sample("y", fn)
                assert y.dtype == fn.sample().dtype
                pyro.sample("z", dist.Delta(y.reshape(len(x), -1).double(), event_dim=1))

        self.vae.guide = guide
        count = 4000
        x, streams = torch.zeros(count, 1, 4, 4), Streams.create(count, seed=2)
        found = program.encode(self.vae, x, streams=streams)["z"]
        expected = fn.sample((100_000,)).reshape(100_000, -1).double()
        # Five standard errors, of which one is below 0.8 / sqrt(count).
        assert (found.mean(0) - expected.mean(0)).abs().max() < 5 * 0.8 / count**0.5

    def test_programs_that_take_classes_for_images(self):
        def program_with(likelihood):
            def run(x):
                with pyro.plate("data", len(x)):
                    y = pyro.sample("y", dist.Categorical(logits=torch.zeros(8)))
                    shift = torch.arange(8.0)[y.reshape(-1)]  # of 8 images, one for each class
                    pyro.sample("z", dist.Normal(shift, 1.0))
                    if likelihood:
                        fn = dist.Normal(torch.zeros(len(x), 16), 1.0).to_event(1)
                        pyro.sample("obs", fn, obs=x.flatten(1))

            return run

        vae, x = ClassVAE(), torch.zeros(8, 1, 4, 4)
        vae.model, vae.guide = program_with(True), program_with(False)
        for read in (
            program.potential,
            program.sample_with_log_prob,
            program.posterior_mean,
            lambda vae, x: program.decode(vae, {"z": torch.zeros(8)}, (1, 4, 4)),
        ):
            with pytest.raises(ValueError, match="site 'z' has another log-probability"):
                read(vae, x)

    def test_distributions_that_are_mixtures(self):
        with pytest.raises(ValueError, match=r".z. depends on discrete latents"):
            program.posterior(self.vae, self.x)
        with pytest.raises(ValueError, match="'obs' depends on discrete latents"):
            program.observed(self.vae.model, {"z": self.z}, self.x)
        with pytest.raises(ValueError, match="'obs' depends on discrete latents"):
            program.Decoder(self.vae, self.x).sample({"z": self.z})


def test_straight_through_draws_have_no_density():
    def model(x):
        logits = x.new_zeros(len(x), 3)
        with pyro.plate("data", len(x)):
            fn = dist.RelaxedOneHotCategoricalStraightThrough(x.new_tensor(0.5), logits=logits)
            z = pyro.sample("z", fn)
            pyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="'z' draws values .*StraightThrough has no density"):
        program.ModelPotential(model, torch.zeros(3, 3))


def test_mixture_prior(float64):
    def model(x):
        components = dist.Normal(torch.tensor([[-1.0, 0.0], [2.0, 1.0]]), 0.5).to_event(1)
        prior = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), components)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=x)

    x, z = torch.randn(3, 2), torch.randn(3, 2)
    parts = [
        torch.tensor(share).log() + dist.Normal(torch.tensor(loc), 0.5).log_prob(z).sum(-1)
        for share, loc in [(0.3, [-1.0, 0.0]), (0.7, [2.0, 1.0])]
    ]
    expected = torch.stack(parts).logsumexp(0) + dist.Normal(z, 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(program.ModelPotential(model, x)({"z": z}), -expected)


class TestErrors:
    def test_not_a_vae(self):
        with pytest.raises(ValueError, match="no callable attribute 'model'"):
            program.check_vae(object())

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            ([1.0], "must be a tensor of images"),
            (torch.rand(1, 28, 28), r"must have shape \(N, C, H, W\)"),
            (torch.rand(0, 1, 28, 28), r"must have shape \(N, C, H, W\).* there is no image"),
            (torch.zeros(1, 1, 28, 28, dtype=torch.uint8), "x.float"),
            (torch.full((1, 1, 2, 2), 1.5), r"must lie in \[0, 1\], got values from 1.5 to 1.5"),
            (torch.full((1, 1, 2, 2), torch.nan), r"x is not finite for 1 of 1 rows \(first rows"),
            (torch.full((1, 1, 2, 2), 200.0), r"got values from 200 to 200; rescale it \(x / 255"),
            (torch.full((1, 1, 2, 2), -0.5), r"itself, obs=2 \* x - 1"),
        ],
    )
    def test_images(self, x, message):
        with pytest.raises(ValueError, match=message):
            program.check_images(x)

    def test_site_outside_the_plate(self):
        def model(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[0]), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=x)

        with pytest.raises(ValueError, match="site 'z' stands in no data plate.*if it is global"):
            program.ModelPotential(model, torch.zeros(3))

    def test_plate_of_another_size(self):
        def model(x):
            with pyro.plate("data", 2):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
                pyro.sample("obs", dist.Normal(z, 1.0), obs=x[:2])

        with pytest.raises(ValueError, match="2 rows in its data plate 'data', but x holds 3"):
            program.ModelPotential(model, torch.zeros(3))

    @pytest.mark.parametrize(
        ("prior", "message"),
        [
            (dist.Bernoulli(0.5), "no continuous latent site"),
            (dist.Poisson(1.0), "latent site 'z' is discrete .* cannot be enumerated"),
        ],
    )
    def test_discrete_latent(self, prior, message):
        def model(x):
            with pyro.plate("data", x.shape[0]):
                z = pyro.sample("z", prior)
                pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

        with pytest.raises(ValueError, match=message):
            program.ModelPotential(model, torch.zeros(3))

    def test_wrong_latents(self):
        energy = program.potential(LinearGaussianVAE(), torch.zeros(3, 1, 4, 4))
        with pytest.raises(ValueError, match=r"must have the model's sites \['z'\]"):
            energy.check({"y": torch.zeros(3, 3)})
        with pytest.raises(ValueError, match=r"latents\['z'\] must be a tensor, got a ndarray"):
            energy.check({"z": torch.zeros(3, 3).numpy()})
        with pytest.raises(ValueError, match=r"must have shape \(3, 3\)"):
            energy.check({"z": torch.zeros(2, 3)})
