"""Which observed sites are the image, in which units, and what is refused."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import HaarTransform
from pyro.infer.reparam import HaarReparam
from torch.nn import functional as F

from pyro_vae_defence import attacks, metrics
from pyro_vae_defence.defence import MCMCDefence, NoDefence, calibrate_radius
from pyro_vae_defence.defence.radius import radius_probabilities
from pyro_vae_defence.models import program
from pyro_vae_defence.models.observation import _read_site, probes
from pyro_vae_defence.models.perturbation import UnknownRadius
from pyro_vae_defence.ops.balls import L1, L2, Linf

pytestmark = pytest.mark.usefixtures("float64")

SHAPE = (3, 4, 4)
SIZE = 48


def sample(name, fn, x):
    pyro.sample(name, fn, obs=x)


def normal(mean, scale=0.1):
    return dist.Normal(mean, scale).to_event(mean.dim() - 1)


class Observing:
    """Two latents, a mean image m(z) in (0, 1), and any way to observe x with it."""

    def __init__(self, observe, to_images=None):
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(2, SIZE, generator=generator)
        self.observe = observe
        if to_images is not None:
            self.to_images = to_images

    def mean(self, z):
        return (z @ self.weight).sigmoid().view(-1, *SHAPE)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            self.observe(x, self.mean(z))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.flatten(1)[:, :2], 0.3).to_event(1))


# --- Served ---------------------------------------------------------------------------------------


def rows_apart(x, m):
    for row in range(4):
        sample(f"row_{row}", normal(m[:, :, row]), x[:, :, row])


def channels_apart(x, m):
    sample("red", normal(m[:, 0]), x[:, 0])
    sample("rest", dist.Laplace(m[:, 1:].flatten(1), 0.1).to_event(1), x[:, 1:].flatten(1))


SHIFT, SCALE = (
    torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1),
    torch.tensor([0.2, 0.3, 0.1])[:, None, None],
)
LAST = (0, 2, 3, 1)

SERVED = {
    "as it is": lambda x, m: sample("obs", normal(m), x),
    "flattened": lambda x, m: sample("obs", normal(m.flatten(1)), x.flatten(1)),
    "2x - 1": lambda x, m: sample("obs", normal(2 * m - 1), 2 * x - 1),
    "1 - x": lambda x, m: sample("obs", normal(1 - m), 1 - x),
    "standardised by channel": lambda x, m: sample(
        "obs", normal(((m - SHIFT) / SCALE).flatten(1)), ((x - SHIFT) / SCALE).flatten(1)
    ),
    "counts": lambda x, m: sample(
        "obs", dist.Poisson(255 * m, validate_args=False).to_event(3), 255 * x
    ),
    "channels last": lambda x, m: sample("obs", normal(m.permute(LAST)), x.permute(LAST)),
    "rows apart": rows_apart,
    "channels apart": channels_apart,
}


@pytest.mark.parametrize("observe", SERVED.values(), ids=SERVED)
def test_decodes_to_the_mean_image(observe):
    vae, z = Observing(observe), torch.randn(7, 2)
    image = program.decode(vae, {"z": z}, SHAPE)
    torch.testing.assert_close(image, vae.mean(z), rtol=1e-12, atol=1e-12)
    result = NoDefence(vae)(torch.rand(3, *SHAPE))
    torch.testing.assert_close(result.reconstruction, vae.mean(result.latents["z"]))


@pytest.mark.parametrize(
    "name", ["2x - 1", "channels last", "rows apart", "standardised by channel"]
)
def test_simulates_in_units_of_the_image(name):
    vae = Observing(SERVED[name])
    latents, x = metrics.simulate(vae, torch.rand(400, *SHAPE))
    residual = x - vae.mean(latents["z"])
    slope = {"2x - 1": 2.0, "standardised by channel": 1 / SCALE}.get(name, 1.0)
    ratio = (residual * slope / 0.1).square().mean((0, 2, 3))
    # 6,400 squares per channel: five standard errors, wrong once in a million.
    torch.testing.assert_close(ratio, torch.ones(3), rtol=0, atol=5 * math.sqrt(2 / 6400))


def test_one_mean_for_several_pixels():
    """A likelihood whose log_prob broadcasts is of all pixels."""
    vae = Observing(lambda x, m: sample("obs", normal(m.mean(1, keepdim=True)), x))
    x = torch.rand(6, *SHAPE)
    result = NoDefence(vae)(x)
    grey = vae.mean(result.latents["z"]).mean(1, keepdim=True).expand(6, *SHAPE)
    torch.testing.assert_close(result.reconstruction, grey)
    assert attacks.maximum_damage(vae)(x)(x).shape == (6,)
    latents, drawn = metrics.simulate(vae, torch.rand(400, *SHAPE))
    residual = (drawn - vae.mean(latents["z"]).mean(1, keepdim=True)) / 0.1
    noise = residual.movedim(1, 0).flatten(1)
    # 6,400 products of each pair of channels: five standard errors.
    assert (noise @ noise.T / 6400 - torch.eye(3)).abs().max() < 5 * math.sqrt(2 / 6400)


def test_reading_uses_up_no_random_numbers():
    x, before = torch.rand(2, *SHAPE), torch.get_rng_state()
    program.image_map(Observing(SERVED["2x - 1"]), x)
    assert torch.equal(before, torch.get_rng_state())


def test_what_a_reparametrisation_leaves_is_no_part_of_the_image():
    plain = Observing(SERVED["as it is"])
    vae = Observing(SERVED["as it is"])
    vae.model = poutine.reparam(plain.model, {"z": HaarReparam(dim=-1)})
    x, z = torch.rand(4, *SHAPE), torch.randn(4, 2)
    haar = {"z_haar": HaarTransform(dim=-1)(z)}
    torch.testing.assert_close(program.decode(vae, haar, SHAPE), plain.mean(z))
    for perturbation in (None, Linf(0.1)):
        energies = [
            program.potential(each, x, perturbation)(at)
            for each, at in ((vae, haar), (plain, {"z": z}))
        ]
        torch.testing.assert_close(*energies)


def test_further_observations_are_no_part_of_the_image():
    def observe(x, m):
        sample("label", dist.Categorical(logits=m[:, 0, 0]), torch.ones(len(x), dtype=torch.long))
        sample("brightness", dist.Normal(m.mean((1, 2, 3)), 1.0), torch.zeros(len(x)))
        pyro.factor("penalty", -m.square().sum((1, 2, 3)))
        pyro.deterministic("twice", 2 * m, event_dim=3)
        sample("obs", normal(m), x)

    vae, z, x = Observing(observe), torch.randn(5, 2), torch.rand(5, *SHAPE)
    assert program.image_map(vae, x).name == "obs"
    torch.testing.assert_close(program.decode(vae, {"z": z}, SHAPE), vae.mean(z))
    m = vae.mean(z)
    expected = (
        dist.Normal(0.0, 1.0).log_prob(z).sum(1)
        + m[:, 0, 0].log_softmax(1)[:, 1]
        + dist.Normal(m.mean((1, 2, 3)), 1.0).log_prob(torch.tensor(0.0))
        - m.square().sum((1, 2, 3))
        + dist.Normal(m, 0.1).log_prob(x).sum((1, 2, 3))
    )
    torch.testing.assert_close(program.potential(vae, x)({"z": z}), -expected)


def test_a_model_of_one_number_of_images_is_refused():
    kept = torch.rand(6, *SHAPE)
    vae = Observing(lambda x, m: sample("obs", normal(m * kept), x))
    for call in (program.potential, program.Decoder, NoDefence(vae)):
        arguments = (
            (torch.rand(6, *SHAPE),)
            if isinstance(call, NoDefence)
            else (vae, torch.rand(6, *SHAPE))
        )
        with pytest.raises(ValueError, match="must run on any number of images"):
            call(*arguments)


# --- Refused, with what to write ------------------------------------------------------------------


def reads_the_image(x, m):
    sample("obs", normal(m + 0.1 * x.flip(3)), x)


def hurdle(x, m):
    sample("shown", dist.Bernoulli(m).to_event(3), (x > 0).to(x))
    sample("obs", dist.Normal(m, 0.1).mask(x > 0).to_event(3), x)


REFUSED = {
    "which pixels are not black, and these": (hurdle, r"which pixels count at \['obs'\]"),
    "crop": (lambda x, m: sample("obs", normal(m[..., 1:]), x[..., 1:]), "36 of 48 values"),
    "half given the rest": (
        lambda x, m: sample("obs", normal(m[..., 2:] * x[..., :2]), x[..., 2:]),
        "reads the image otherwise.*as a condition",
    ),
    "smaller image": (
        lambda x, m: sample("obs", normal(F.avg_pool2d(m, 2)), F.avg_pool2d(x, 2)),
        "not affine in single pixels",
    ),
    "grey": (lambda x, m: sample("obs", normal(m.mean(1)), x.mean(1)), "not affine in single"),
    "fixed binarisation": (
        lambda x, m: sample("obs", dist.Bernoulli(m).to_event(3), (x > 0.5).to(x)),
        "not affine in single pixels.*to_images",
    ),
    "256 classes": (
        lambda x, m: sample(
            "obs", dist.Categorical(torch.ones(256)).expand(x.shape).to_event(3), (255 * x).long()
        ),
        "not affine in single pixels",
    ),
    "dynamic binarisation": (
        lambda x, m: sample("obs", dist.Bernoulli(m).to_event(3), torch.bernoulli(x)),
        "something else in another run.*noise",
    ),
    "dequantisation": (
        lambda x, m: sample("obs", normal(m), x + torch.rand_like(x) / 256),
        "something else in another run",
    ),
    "dropout in the decoder": (
        lambda x, m: sample("obs", normal(torch.nn.functional.dropout(m)), x),
        r"noise outside pyro\.sample, such as a binarisation, dequantisation or dropout",
    ),
    "channels last": (
        lambda x, m: sample("obs", normal(m.movedim(1, -1)), x),
        r"a value of shape \(7, 3, 4, 4\) under a distribution of shape \(7, 4, 4, 3\)",
    ),
    "a decoder that reads the image": (reads_the_image, "reads the image otherwise"),
    "no mean": (
        lambda x, m: sample("obs", dist.Cauchy(m, 0.1).to_event(3), x),
        r"likelihood at \['obs'\] has no mean that is known and finite",
    ),
    "twice": (
        lambda x, m: (sample("obs", normal(m), x), sample("again", normal(m), x)),
        "some more than once",
    ),
    "nothing": (lambda x, m: None, r"observes 0 of 48 values of the image, at no site"),
}


@pytest.mark.parametrize(("observe", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_before_anything_is_computed(observe, message, monkeypatch):
    vae, x = Observing(observe), torch.rand(3, *SHAPE)
    monkeypatch.setattr(MCMCDefence, "_run", lambda *args: pytest.fail("a chain was run"))
    with pytest.raises(ValueError, match=message):
        MCMCDefence(vae)(x)
    with pytest.raises(ValueError, match=message):
        program.decode(vae, {"z": torch.zeros(3, 2)}, SHAPE)
    with pytest.raises(ValueError, match=message):
        attacks.maximum_damage(vae)(x)


@pytest.mark.parametrize("name", ["dynamic binarisation", "dequantisation"])
def test_refuses_an_energy_that_is_noise(name):
    with pytest.raises(ValueError, match=r"noise outside pyro\.sample"):
        program.potential(Observing(REFUSED[name][0]), torch.rand(3, *SHAPE))


def test_a_program_in_float32_observes_images_of_float64():
    def observe(x, m):
        sample("obs", normal(m.float()), 2 * x.float() - 1)

    vae = Observing(observe)
    x = torch.rand(3, *SHAPE, dtype=torch.float64)
    scale = program.image_map(vae, x).sites[0].scale
    assert torch.allclose(scale, torch.full_like(scale, 2.0), rtol=1e-5)
    attack = attacks.PGD(attacks.maximum_damage(vae), Linf(0.1), num_steps=1)
    assert attack(x).x_adv.dtype == torch.float64


def test_too_few_event_dimensions_are_named():
    """Of grey images, the plate makes N rows of the one channel: Pyro says nothing either."""

    class TooFew(Observing):
        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                mean = z.sum(-1)[:, None, None, None] + 0 * x
                pyro.sample("obs", dist.Normal(mean, 1.0).to_event(2), obs=x)

    x = torch.rand(3, 1, 4, 4)
    for call in (NoDefence(TooFew(None)), lambda x: metrics.nll(TooFew(None), x, num_samples=2)):
        with pytest.raises(ValueError, match=r"'obs'.*no row per image.*2 event dimensions"):
            call(x)


class TestToImages:
    observe = staticmethod(REFUSED["smaller image"][0])

    def test_says_what_latents_look_like(self):
        vae = Observing(self.observe, to_images=lambda latents: vae.mean(latents["z"]))
        result = MCMCDefence(vae, num_samples=2, warmup_steps=2)(torch.rand(3, *SHAPE))
        torch.testing.assert_close(result.reconstruction, vae.mean(result.latents["z"]))
        assert result.observation == "x"

    def test_must_return_images(self):
        vae = Observing(self.observe, to_images=lambda latents: vae.mean(latents["z"])[:, 0])
        with pytest.raises(ValueError, match=r"must return images \(3, 3, 4, 4\).*got \(3, 4, 4\)"):
            NoDefence(vae)(torch.rand(3, *SHAPE))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda images: images + 0.05 * torch.rand_like(images), "other images in another"),
            (lambda images: images / images.amax(), "among others than for them alone"),
            (lambda images: 2 * images - 1, r"in \[0, 1\], got values from -.*clamp\(0, 1\)"),
            (lambda images: 255 * images, r"in \[0, 1\], got values from .* to [12]"),
        ],
    )
    def test_must_return_them_as_the_model_means_them(self, change, message):
        """Noise, images that go by others, and other units would go into every score."""
        vae = Observing(self.observe, to_images=lambda latents: change(vae.mean(latents["z"])))
        x = torch.rand(3, *SHAPE)
        for compute in (NoDefence(vae), attacks.maximum_damage(vae)):
            with pytest.raises(ValueError, match=message):
                compute(x)

    def test_is_tried_once_in_a_call(self):
        calls = []

        def to_images(latents):
            calls.append(len(latents["z"]))
            return vae.mean(latents["z"])

        vae = Observing(self.observe, to_images=to_images)
        NoDefence(vae, batch_size=1)(torch.rand(4, *SHAPE))
        assert calls == [3, 3, 1, 1, 1] + 4 * [1]

    def test_may_overshoot_a_little(self):
        vae = Observing(self.observe, to_images=lambda latents: 1.2 * vae.mean(latents["z"]) - 0.1)
        result = NoDefence(vae)(torch.rand(3, *SHAPE))
        expected = (1.2 * vae.mean(result.latents["z"]) - 0.1).clamp(0, 1)
        torch.testing.assert_close(result.reconstruction, expected)


# --- Perturbation-aware posteriors ----------------------------------------------------------------

UNKNOWN = UnknownRadius(Linf, (0.0, 0.05, 0.2), (0.0, 3.0, 9.0))


def rescaled(a, b, family=dist.Normal):
    """Observes a x + b; its density is that of x but for the factor |a| per pixel."""
    return Observing(
        lambda x, m: sample("obs", family(a * m + b, abs(a) * 0.1).to_event(3), a * x + b)
    )


@pytest.mark.parametrize("family", [dist.Normal, dist.Laplace])
@pytest.mark.parametrize("perturbation", [Linf(0.1), L2(0.5), UNKNOWN], ids=str)
@pytest.mark.parametrize(("a", "b"), [(2.0, -1.0), (255.0, 0.0), (-1.0, 1.0), (3.2, -0.4)])
def test_ball_and_range_are_those_of_the_image(a, b, perturbation, family):
    if family is dist.Laplace and isinstance(perturbation, L2):
        pytest.skip("no minimiser is known")
    plain, other = rescaled(1.0, 0.0, family), rescaled(a, b, family)
    x, z = torch.rand(4, *SHAPE).requires_grad_(), torch.randn(4, 2).requires_grad_()
    found = []
    for vae, factor in ((plain, 1.0), (other, abs(a))):
        energy = program.potential(vae, x, perturbation)({"z": z})
        found.append((energy - SIZE * math.log(factor), *torch.autograd.grad(energy.sum(), (x, z))))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_linf_balls_of_an_image_in_parts():
    whole, parts = Observing(SERVED["as it is"]), Observing(SERVED["rows apart"])
    x, z = torch.rand(4, *SHAPE), {"z": torch.randn(4, 2)}
    energies = [program.potential(vae, x, Linf(0.1))(z) for vae in (whole, parts)]
    torch.testing.assert_close(*energies)
    with pytest.raises(ValueError, match="observed at one site"):
        program.potential(parts, x, L2(0.5))


def test_linf_balls_of_pixels_at_sites_of_their_own():
    """As a sequence has them, one after the other: values ``(N,)``, without event dimensions."""

    def observe(x, m, scale=0.1):
        for number, (value, mean) in enumerate(zip(x.flatten(1).T, m.flatten(1).T, strict=True)):
            sample(f"x_{number}", dist.Normal(mean, scale), value)

    whole, pixels = Observing(SERVED["as it is"]), Observing(observe)
    x, z = torch.rand(4, *SHAPE), {"z": torch.randn(4, 2)}
    energies = [program.potential(vae, x, Linf(0.1))(z) for vae in (whole, pixels)]
    torch.testing.assert_close(*energies)


def test_further_observations_are_not_perturbed():
    def observe(x, m):
        sample("brightness", dist.Normal(m.mean((1, 2, 3)), 0.1), torch.full((len(x),), 0.9))
        sample("obs", normal(m), x)

    vae, x, z = Observing(observe), torch.rand(4, *SHAPE), {"z": torch.randn(4, 2)}
    alone = Observing(SERVED["as it is"])
    label = dist.Normal(vae.mean(z["z"]).mean((1, 2, 3)), 0.1).log_prob(torch.tensor(0.9))
    expected = program.potential(alone, x, Linf(0.1))(z) - label
    torch.testing.assert_close(program.potential(vae, x, Linf(0.1))(z), expected)


@pytest.mark.parametrize("name", ["smaller image", "a decoder that reads the image", "nothing"])
def test_refuses_to_perturb_what_is_not_pixels(name):
    with pytest.raises(ValueError, match="perturbation"):
        program.potential(Observing(REFUSED[name][0]), torch.rand(3, *SHAPE), Linf(0.1))


@pytest.mark.parametrize(("edge", "refused"), [(0.005, True), (1e-6, False)])
def test_refuses_to_perturb_what_is_clipped(edge, refused):
    def observe(x, m):
        sample("obs", normal(2 * m - 1), 2 * x.clamp(edge, 1 - edge) - 1)

    vae, z = Observing(observe), {"z": torch.randn(4, 2)}
    x = (2 * torch.rand(4, *SHAPE) - 0.5).clamp(0, 1)
    torch.testing.assert_close(program.decode(vae, z, SHAPE), vae.mean(z["z"]))
    if refused:
        with pytest.raises(ValueError, match=r"clips the image that it observes at \['obs'\]"):
            program.potential(vae, x, Linf(0.1))
    else:
        expected = program.potential(Observing(SERVED["2x - 1"]), x, Linf(0.1))(z)
        energy = program.potential(vae, x, Linf(0.1))(z)
        torch.testing.assert_close(energy, expected, rtol=1e-4, atol=1e-2)


def test_refuses_to_rescale_an_unknown_likelihood():
    vae = Observing(lambda x, m: sample("obs", dist.StudentT(5.0, m, 0.1).to_event(3), 2 * x))
    with pytest.raises(ValueError, match="rescaled image with a StudentT"):
        program.potential(vae, torch.rand(3, *SHAPE), Linf(0.1))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_masked_pixels_take_no_share_of_a_ball(scale):
    """Rescaled or not: an L_inf ball is that of the others, L2 and L1 balls are refused."""
    known = torch.rand(SHAPE) > 0.4

    def observe(x, m):
        likelihood = dist.Normal(scale * m, 0.1 * scale)
        sample("obs", likelihood.mask(known).to_event(3), scale * x)

    def others(x, m):
        likelihood = dist.Normal(scale * m[:, known], 0.1 * scale).to_event(1)
        sample("obs", likelihood, scale * x[:, known])

    x, z = torch.rand(4, *SHAPE), {"z": torch.randn(4, 2)}
    found, expected = (
        program.potential(Observing(each), x, Linf(0.1))(z) for each in (observe, others)
    )
    torch.testing.assert_close(found, expected)
    for ball in (L2(0.1), L1(0.1), UnknownRadius(L2, (0.0, 0.1), (0.0, 1.0))):
        with pytest.raises(ValueError, match="perturbation must be an Linf ball for a masked"):
            program.potential(Observing(observe), x, ball)(z)


def test_radii_of_a_rescaled_image():
    plain, other = rescaled(1.0, 0.0), rescaled(2.0, -1.0)
    x, z = torch.rand(4, *SHAPE), {"z": torch.randn(4, 2)}
    found = [radius_probabilities(vae, z, x, UNKNOWN) for vae in (plain, other)]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(found[0].sum(1), torch.ones(4))
    unknown = [calibrate_radius(vae, x, (0.0, 0.1), num_steps=3) for vae in (plain, other)]
    assert unknown[0].penalties == pytest.approx(unknown[1].penalties, rel=1e-6)


# --- Plates ---------------------------------------------------------------------------------------


class Plated:
    """One latent and one pixel; the plate is the test's."""

    def __init__(self, plate):
        self.plate = plate

    def model(self, x):
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("obs", dist.Normal(z, 0.5), obs=x.flatten())

    def guide(self, x):
        with self.plate(x):
            pyro.sample("z", dist.Normal(x.flatten(), 0.5))


PLATES = {
    "sized": lambda x: pyro.plate("data", len(x)),
    "without a size": lambda x: pyro.plate("data"),
    "of another name": lambda x: pyro.plate("batch", len(x)),
    "subsample": lambda x: pyro.plate("data", 1000, subsample=x),
    "subsample_size": lambda x: pyro.plate("data", 1000, subsample_size=len(x)),
    "subsample_size of more": lambda x: pyro.plate("data", 5, subsample_size=len(x)),
}


@pytest.mark.parametrize("plate", PLATES.values(), ids=PLATES)
def test_data_plates(plate):
    vae, x, z = Plated(plate), torch.rand(5, 1, 1, 1), torch.randn(5)
    expected = -dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(z, 0.5).log_prob(x.flatten())
    torch.testing.assert_close(program.potential(vae, x)({"z": z}), expected)
    torch.testing.assert_close(program.decode(vae, {"z": z}, (1, 1, 1)).flatten(), z)
    drawn, log_prob = program.sample_with_log_prob(vae, x)
    torch.testing.assert_close(log_prob, dist.Normal(x.flatten(), 0.5).log_prob(drawn["z"]))
    assert metrics.nll(vae, x, 10).shape == (5,)


@pytest.mark.parametrize(("size", "number"), [(1000, 4), (1000, 128), (3, 4), (3, 128)])
def test_a_plate_that_subsamples_another_number_is_refused(size, number):
    vae = Plated(lambda x: pyro.plate("data", size, subsample_size=number))
    with pytest.raises(ValueError, match="failed on images .* inside plate"):
        program.potential(vae, torch.rand(5, 1, 1, 1))


def test_a_plate_in_the_third_dimension():
    def model(x):
        with pyro.plate("data", len(x), dim=-3):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(z, 0.5).to_event(1), obs=x.view(-1, 1, 1, 2))

    x, z = torch.rand(5, 1, 1, 2), torch.randn(5, 1, 1, 2)
    expected = -dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(z, 0.5).log_prob(x)
    energy = program.ModelPotential(model, x)
    torch.testing.assert_close(energy({"z": z}), expected.sum((1, 2, 3)))


class TestOtherPlates:
    """Six groups beside the images, of which there are five, or six."""

    def model_of(self, name, data_dim):
        def model(x):
            data = pyro.plate(name, len(x), dim=data_dim)
            groups = pyro.plate("groups", 6, dim=-3 - data_dim)
            with data, groups:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with data:
                mean = z.sum(-1 if data_dim == -2 else -2)
                mean = mean[:, None] if data_dim == -2 else mean
                value = x.flatten()[:, None] if data_dim == -2 else x.flatten()
                pyro.sample("obs", dist.Normal(mean, 1.0), obs=value)

        return model

    @pytest.mark.parametrize("num_images", [5, 6])
    @pytest.mark.parametrize("name", ["data", "batch"])
    def test_leftmost_data_plate(self, name, num_images):
        x, z = torch.rand(num_images, 1, 1, 1), torch.randn(num_images, 6)
        energy = program.ModelPotential(self.model_of(name, -2), x)
        expected = -dist.Normal(0.0, 1.0).log_prob(z).sum(1)
        expected = expected - dist.Normal(z.sum(1), 1.0).log_prob(x.flatten())
        torch.testing.assert_close(energy({"z": z}), expected)

    @pytest.mark.parametrize("num_images", [5, 6])
    @pytest.mark.parametrize("name", ["data", "batch"])
    def test_refuses_another_order(self, name, num_images):
        x = torch.rand(num_images, 1, 1, 1)
        with pytest.raises(ValueError, match="data plate"):
            program.ModelPotential(self.model_of(name, -1), x)


def test_global_latents_are_named():
    class Global(Plated):
        def model(self, x):
            pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
            super().model(x)

    with pytest.raises(ValueError, match=r"'sigma'.*global.*poutine\.condition"):
        program.potential(Global(PLATES["sized"]), torch.rand(5, 1, 1, 1))
    vae = Global(PLATES["sized"])
    model = poutine.condition(vae.model, data={"sigma": torch.tensor(0.5)})
    hide = r"images, hide it, poutine\.block\(vae\.model, hide=\['sigma'\]\)$"
    with pytest.raises(ValueError, match="'sigma' stands in no data plate.*" + hide):
        program.ModelPotential(model, torch.rand(5, 1, 1, 1))
    # What the message says to write.
    x, hidden = torch.rand(5, 1, 1, 1), poutine.block(model, hide=["sigma"])
    energy, expected = (
        program.ModelPotential(hidden, x),
        program.potential(Plated(PLATES["sized"]), x),
    )
    z = energy.prototype
    torch.testing.assert_close(energy(z), expected(z))


def test_a_map_that_is_not_quite_affine_is_none():
    x = probes(torch.zeros(1, 1, 3, 3, dtype=torch.float32)).flatten(1)
    found = _read_site("x", 2 * x.flip(1) - 1, x)
    assert found.pixels.tolist() == [*range(8, -1, -1)]
    assert torch.allclose(found.scale, torch.full_like(found.scale, 2))
    assert torch.allclose(found.shift, torch.full_like(found.shift, -1))
    # A curve, and what is cut off far from where the pixels are numbered.
    for rows in (x + 1e-4 * x.square(), x.clamp(0.05, 0.95)):
        assert _read_site("x", rows, x) is None
