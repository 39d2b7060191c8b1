"""What is computed for an image is its own: what couples images, or reads them, is found."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_vae_defence import attacks, metrics
from pyro_vae_defence.defence import MCMCDefence, NoDefence
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.ops.balls import L2, Linf

pytestmark = pytest.mark.usefixtures("float64")

SHAPE = (1, 4, 4)
WEIGHT = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def centre(x):
    return x - x.mean(0)


class Programs:
    """z in three dimensions, an image N(sigmoid(Wz), .1); a test changes one line."""

    def prior(self, x):
        return dist.Normal(x.new_zeros(3), 1.0).to_event(1)

    def likelihood(self, x, mean):
        return dist.Normal(mean, 0.1).to_event(1)

    def observation(self, x):
        return x.flatten(1)

    def q(self, x):
        return dist.Normal(x.flatten(1) @ WEIGHT.T, 0.3).to_event(1)

    def further(self, x, z):
        pass

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            fn = self.likelihood(x, (z @ WEIGHT).sigmoid())
            pyro.sample("obs", fn, obs=self.observation(x))
            self.further(x, z)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q(x))


def changed(**parts):
    return type("Changed", (Programs,), {name: staticmethod(f) for name, f in parts.items()})()


def images(number):
    generator = torch.Generator().manual_seed(number)
    return torch.rand(number, *SHAPE, generator=generator, dtype=torch.float64)


# --- Rows are independent -------------------------------------------------------------------------

UNNORMED = nn.BatchNorm1d(3, affine=False, track_running_stats=False).double().eval()

COUPLED = {
    "observation less the mean of the batch": (
        changed(observation=lambda x: centre(x).flatten(1)),
        "model .* couples",
    ),
    "prior scaled by the batch": (
        changed(prior=lambda x: dist.Normal(x.new_zeros(len(x), 3), x.std()).to_event(1)),
        "vae.model .* couples the images",
    ),
    "encoder less the mean of the batch": (
        changed(q=lambda x: dist.Normal(centre(x.flatten(1) @ WEIGHT.T), 0.3).to_event(1)),
        "vae.guide .* couples the images",
    ),
    "batch norm without running statistics": (
        changed(q=lambda x: dist.Normal(UNNORMED(x.flatten(1) @ WEIGHT.T), 0.3).to_event(1)),
        "vae.guide (.* couples|failed)",
    ),
    "an encoding by the image's number": (
        changed(q=lambda x: dist.Normal(WEIGHT.T[: len(x)], 0.3).to_event(1)),
        "vae.guide .* goes by their number",
    ),
    "noise in the encoder": (
        changed(q=lambda x: dist.Normal(x.flatten(1) @ WEIGHT.T + torch.randn(3), 0.3).to_event(1)),
        "vae.guide .* draws noise outside",
    ),
    "noise in the prior": (
        changed(prior=lambda x: dist.Normal(torch.randn(3), 1.0).to_event(1)),
        "vae.model .* draws noise outside",
    ),
}


@pytest.mark.parametrize(("vae", "message"), COUPLED.values(), ids=COUPLED)
def test_programs_that_couple_images_are_refused(vae, message):
    x = images(5)
    for call in (MCMCDefence(vae), lambda x: metrics.nll(vae, x, 2)):
        with pytest.raises(ValueError, match=message):
            call(x)
    if "guide" in message:
        with pytest.raises(ValueError, match=message):
            attacks.PGD(attacks.symmetric_kl(vae), Linf(0.1), 1)(x)
    else:
        with pytest.raises(ValueError, match=message):
            program.potential(vae, x)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 16])
def test_event_dimensions_are_missed_at_any_number_of_images(number):
    """At 16 images a row of pixels would pass for the images' log-probabilities."""
    vae = changed(likelihood=lambda x, mean: dist.Normal(mean, 0.1))
    with pytest.raises(ValueError, match="vae.model failed|to_event"):
        program.potential(vae, images(number))
    vae = changed(q=lambda x: dist.Normal(x.flatten(1) @ WEIGHT.T, 0.3))
    with pytest.raises(ValueError, match="vae.guide failed|to_event|plate left of"):
        attacks.symmetric_kl(vae)(images(number))


def test_programs_that_set_cudnn_flags():
    """Which torch refuses while precisions are set by its other interface."""

    class Deterministic(ConvVAE):
        def observation(self, z):
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
                return super().observation(z)

    result = NoDefence(Deterministic())(torch.rand(3, 1, 28, 28))
    assert result.reconstruction.shape == (3, 1, 28, 28)


def test_images_changed_in_place():
    def q(x):
        return dist.Normal(x.sub_(0.5).flatten(1) @ WEIGHT.T, 0.3).to_event(1)

    x = images(4)
    before = x.clone()
    with pytest.raises(ValueError, match="vae.guide changes its images in place"):
        NoDefence(changed(q=q))(x)
    assert torch.equal(x, before)


IN_PLACE = {
    "doubles": lambda z: z.mul_(2.0),
    "rectifies": nn.ReLU(inplace=True),
    "clamps": lambda z: z.clamp_(-9.0, 9.0),
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("part", ["model", "guide"])
def test_latents_changed_in_place(part, change):
    """Draws would be weighted by the density of what has become of them."""

    class Changing(Programs):
        pass

    def changing(vae, x):
        with pyro.plate("data", len(x)):
            fn = vae.q(x) if part == "guide" else vae.prior(x)
            z = change(pyro.sample("z", fn))
            if part == "model":
                pyro.sample("obs", vae.likelihood(x, (z @ WEIGHT).sigmoid()), obs=x.flatten(1))

    setattr(Changing, part, changing)
    for compute in (metrics.nll, lambda vae, x: MCMCDefence(vae)(x)):
        with pytest.raises(ValueError, match=rf"vae.{part} changes in place what .* \['z'\]"):
            compute(Changing(), images(4))


class Averaging(Programs, nn.Module):
    """A running mean of encodings is the prior's."""

    def __init__(self, always):
        super().__init__()
        self.always = always
        self.register_buffer("centre", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def prior(self, x):
        return dist.Normal(self.centre, 1.0).to_event(1)

    def guide(self, x):
        self.calls += 1
        if self.training or self.always:
            self.centre = 0.99 * self.centre + 0.01 * (x.flatten(1) @ WEIGHT.T).mean(0)
        super().guide(x)


def test_programs_that_train_themselves_in_eval_mode():
    x, ball = images(4), Linf(0.1)
    program.at_images(Averaging(always=False), x)
    for call in (metrics.nll, lambda vae, x: attacks.PGD(attacks.symmetric_kl(vae), ball)(x)):
        with pytest.raises(
            ValueError, match=r"guide changes \['centre'\] .* only if self.training"
        ):
            call(Averaging(always=True), x)


def test_a_part_of_what_is_filled_later():
    """A view of a tensor whose other parts change; the draw is what it was."""

    class Filling(Programs):
        def guide(self, x):
            means = x.new_zeros(len(x), 2, 3)
            means[:, 0] = x.flatten(1) @ WEIGHT.T
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(means[:, 0], event_dim=1))
            means[:, 1] = 1.0

    result = NoDefence(Filling())(images(3))
    torch.testing.assert_close(result.latents["z"], images(3).flatten(1) @ WEIGHT.T)


@pytest.mark.parametrize("part", ["model", "guide"])
def test_conditions_changed_in_place(part):
    class Repairing(Programs):
        def model(self, x, y):
            if part == "model":
                y[y < 0] = 0
            super().model(x)

        def guide(self, x, y):
            if part == "guide":
                y[y < 0] = 0
            super().guide(x)

    y = torch.tensor([1, -1, 2, -1])
    for compute in (
        metrics.nll,
        lambda vae, images: MCMCDefence(vae)(images),
        lambda vae, images: attacks.PGD(attacks.maximum_damage(vae), Linf(0.1), 1)(images),
    ):
        with pytest.raises(ValueError, match=f"vae.{part} changes what comes with its images"):
            compute(Repairing(), (images(4), y))
    assert y.tolist() == [1, -1, 2, -1]


def half(fn):
    return dist.Normal(fn.mean.bfloat16(), fn.stddev.bfloat16()).to_event(1)


def test_log_probabilities_in_half_precision():
    """As of a network that computes in it: sums of hundreds, to three digits."""
    message = r"log-probabilities in torch.bfloat16.*loc.float\(\)"
    with pytest.raises(ValueError, match=message):
        attacks.symmetric_kl(changed(q=lambda x: half(Programs().q(x))))(images(3))
    vae = changed(
        observation=lambda x: x.flatten(1).bfloat16(),
        likelihood=lambda x, mean: half(Programs().likelihood(x, mean)),
    )
    with pytest.raises(ValueError, match=message):
        metrics.nll(vae, images(3))


def test_latents_of_a_plate_left_of_the_data_plate():
    class Plated(Programs):
        def guide(self, x):
            with pyro.plate("parts", 3, dim=-2), pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal((x.flatten(1) @ WEIGHT.T).T, 0.3))

    vae = Plated()
    for number in (2, 3):
        for compute in (
            attacks.symmetric_kl(vae),
            lambda x: program.encode(vae, x),
            lambda x: program.posterior_mean(vae, x),
        ):
            with pytest.raises(ValueError, match="'z' has a plate left of the data plate"):
                compute(images(number))


# --- What reads the image -------------------------------------------------------------------------

READS = {
    "scale of the likelihood": changed(
        likelihood=lambda x, mean: dist.Normal(mean, 0.05 + 0.3 * x.flatten(1)).to_event(1)
    ),
    "prior": changed(prior=lambda x: dist.Normal(x.flatten(1) @ WEIGHT.T, 1.0).to_event(1)),
    "factor": changed(further=lambda x, z: pyro.factor("f", x.flatten(1).sum(1))),
    "another likelihood": changed(
        further=lambda x, z: pyro.sample(
            "label", dist.Normal(x.flatten(1).sum(1), 1.0), obs=x.new_zeros(len(x))
        )
    ),
    "attribute of the image": changed(
        further=lambda x, z: pyro.sample(
            "brightness", dist.Normal(z.sum(1), 1.0), obs=x.flatten(1).mean(1)
        )
    ),
}


@pytest.mark.parametrize("vae", READS.values(), ids=READS)
def test_energies_that_read_the_image_have_no_perturbation(vae):
    """Their images are decoded, since the mean image is known from latents."""
    x, z = images(4), torch.randn(4, 3)
    assert program.potential(vae, x)({"z": z}).shape == (4,)
    decoded = program.decode(vae, {"z": z}, SHAPE)
    torch.testing.assert_close(decoded.flatten(1), (z @ WEIGHT).sigmoid())
    with pytest.raises(ValueError, match="perturbation"):
        program.potential(vae, x, Linf(0.1))


MISSING = {
    "black pixels masked": lambda x, mean: dist.Normal(mean, 0.1).mask(x.flatten(1) > 0),
    "white pixels masked": lambda x, mean: dist.Normal(mean, 0.1).mask(x.flatten(1) < 1),
    "black pixels uncertain": lambda x, mean: dist.Normal(
        mean, torch.where(x.flatten(1) == 0, 1.0, 0.1)
    ),
}


@pytest.mark.parametrize("likelihood", MISSING.values(), ids=MISSING)
def test_pixels_that_stand_for_missing_ones_have_no_perturbation(likelihood):
    """A perturbation could make a pixel count that did not, or hide it."""
    vae = changed(likelihood=lambda x, mean: likelihood(x, mean).to_event(1))
    z = {"z": torch.randn(4, 3)}
    decoded = program.decode(vae, z, SHAPE)
    torch.testing.assert_close(decoded.flatten(1), (z["z"] @ WEIGHT).sigmoid())
    with pytest.raises(ValueError, match="reads the image otherwise than to observe it"):
        program.potential(vae, images(4), Linf(0.1))


def test_a_mean_that_reads_black_pixels_is_not_decoded():
    vae = changed(
        likelihood=lambda x, mean: dist.Normal(
            torch.where(x.flatten(1) == 0, 0.0, mean), 0.1
        ).to_event(1)
    )
    with pytest.raises(ValueError, match="the model reads the image"):
        NoDefence(vae)(images(3))


OTHER_PIXELS = {
    "background removed": lambda x: torch.where(x < 0.2, 0.0, x).flatten(1),
    "light saturated": lambda x: torch.where(x > 0.8, 1.0, x).flatten(1),
    "8 bits": lambda x: ((255 * x).round() / 255).flatten(1),
}


@pytest.mark.parametrize("observation", OTHER_PIXELS.values(), ids=OTHER_PIXELS)
def test_pixels_that_change_somewhere_are_no_map(observation):
    with pytest.raises(ValueError, match="not affine in single pixels"):
        NoDefence(changed(observation=observation))(images(3))


def test_pixels_kept_from_the_edges_are_pixels():
    vae = changed(
        observation=lambda x: x.flatten(1).clamp(1e-3, 1 - 1e-3),
        likelihood=lambda x, mean: dist.Beta(5 * mean, 5 * (1 - mean)).to_event(1),
    )
    z = torch.randn(4, 3)
    decoded = program.decode(vae, {"z": z}, SHAPE)
    torch.testing.assert_close(decoded.flatten(1), (z @ WEIGHT).sigmoid())


def test_pixels_observed_more_than_once_have_no_perturbation():
    vae = changed(
        observation=lambda x: x.flatten(1).repeat(1, 2),
        likelihood=lambda x, mean: dist.Normal(mean.repeat(1, 2), 0.1).to_event(1),
    )
    with pytest.raises(ValueError, match="pixels more than once"):
        program.potential(vae, images(3), L2(0.5))


def test_a_mask_of_pixels_in_the_likelihood():
    mask = torch.arange(16) % 3 > 0
    vae = changed(likelihood=lambda x, mean: dist.Normal(mean, 0.1).mask(mask).to_event(1))
    x, z = images(4), torch.randn(4, 3)
    mean = (z @ WEIGHT).sigmoid()
    flat = x.flatten(1)
    closest = mean.clamp(flat - 0.1, flat + 0.1).clamp(0.0, 1.0)
    densities = dist.Normal(mean, 0.1).log_prob(closest)[:, mask].sum(1)
    expected = -densities - dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(program.potential(vae, x, Linf(0.1))({"z": z}), expected)
    with pytest.raises(ValueError, match="Linf ball for a masked likelihood"):
        program.potential(vae, x, L2(0.5))


# --- Conditions -----------------------------------------------------------------------------------


class Conditioned(Programs):
    """Observes the image less a template of its class."""

    def model(self, x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            mean = (z @ WEIGHT).sigmoid()
            template = 0.1 * y[:, None]
            fn = dist.Normal(mean - template, 0.1).to_event(1)
            pyro.sample("obs", fn, obs=x.flatten(1) - template)

    def guide(self, x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q(x))


def test_units_that_are_a_condition_are_refused():
    x = images(4)
    with pytest.raises(ValueError, match="the same for all images.*a scale that is a condition"):
        NoDefence(Conditioned())((x, torch.tensor([0.0, 1.0, 2.0, 3.0])))
    vae, x = program.at_images(Conditioned(), (x, torch.tensor([0.0, 1.0, 2.0, 3.0])))
    with pytest.raises(ValueError, match="perturbation"):
        program.potential(vae, x, Linf(0.1))
    same = NoDefence(Conditioned())((x, torch.full((4,), 2.0)))
    expected = (same.latents["z"] @ WEIGHT).sigmoid()
    torch.testing.assert_close(same.reconstruction.flatten(1), expected)


class Labelled(Programs):
    """Observes the image and, where it is known, its class."""

    def model(self, x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.sample(
                "obs", dist.Normal((z @ WEIGHT).sigmoid(), 0.1).to_event(1), obs=x.flatten(1)
            )
            with poutine.mask(mask=y >= 0):
                pyro.sample("label", dist.Categorical(logits=z), obs=y.clamp(min=0))

    def guide(self, x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q(x))


def test_classes_that_are_observed_are_not_perturbed():
    x, y, z = images(4), torch.tensor([0, 2, -1, 1]), torch.randn(4, 3)
    vae, x = program.at_images(Labelled(), (x, y))
    label = z.log_softmax(1).gather(1, y.clamp(min=0)[:, None])[:, 0]
    expected = program.potential(Programs(), x, Linf(0.1))({"z": z}) - label * (y >= 0)
    torch.testing.assert_close(program.potential(vae, x, Linf(0.1))({"z": z}), expected)


def test_simulated_latents_are_draws_of_the_posterior():
    """Given a class that depends on them they are not, nor where the prior reads the image."""

    class Independent(Labelled):
        def model(self, x, y):
            with pyro.plate("data", len(x)):
                pyro.sample("label", dist.Categorical(torch.ones(3)), obs=y)
                z = pyro.sample("z", dist.Normal(y[:, None].to(x), x.new_ones(3)).to_event(1))
                fn = dist.Normal((z @ WEIGHT).sigmoid(), 0.1).to_event(1)
                pyro.sample("obs", fn, obs=x.flatten(1))

    x, y = images(4), torch.tensor([0, 2, 1, 1])
    with pytest.raises(ValueError, match=r"observes \['label'\] beside the image"):
        metrics.simulate(Labelled(), (x, y))
    latents, drawn = metrics.simulate(Independent(), (x, y))
    assert drawn.shape == x.shape
    assert latents["z"].shape == (4, 3)
    for name in ("prior", "scale of the likelihood", "factor"):
        with pytest.raises(ValueError, match="draws of its prior are none"):
            metrics.simulate(READS[name], x)


def test_a_class_that_says_which_part_is_observed_is_no_label():
    """Under the class of the first image nothing of it is."""

    class Shown(Labelled):
        def model(self, x, y):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.prior(x))
                fn = dist.Normal((z @ WEIGHT).sigmoid(), 0.1).to_event(1)
                pyro.sample("obs", fn, obs=x.flatten(1))
                pyro.sample("shown", fn, obs=y[:, None] * x.flatten(1))

    vae, x = program.at_images(Shown(), (images(3), torch.tensor([0.0, 1.0, 1.0])))
    with pytest.raises(ValueError, match=r"another kind at \['shown'\]"):
        program.potential(vae, x, Linf(0.1))


def test_none_among_conditions():
    class Optional(Programs):
        def model(self, x, mask=None, y=None):
            Conditioned.model(self, x, y)

        def guide(self, x, mask=None, y=None):
            Conditioned.guide(self, x, y)

    x, y = images(4), torch.ones(4)
    vae, x = program.at_images(Optional(), (x, None, y))
    other, _ = program.at_images(Conditioned(), (x, y))
    z = {"z": torch.randn(4, 3)}
    torch.testing.assert_close(program.potential(vae, x)(z), program.potential(other, x)(z))
    result = MCMCDefence(Optional(), num_samples=1, warmup_steps=1, batch_size=2)((x, None, y))
    assert result.conditions[0] is None
    assert torch.equal(result.conditions[1], y)


def test_keyword_only_conditions_are_named():
    class Keyword(Programs):
        def model(self, x, *, y):
            Conditioned.model(self, x, y)

        def guide(self, x, *, y):
            Conditioned.guide(self, x, y)

    for call in (
        lambda: NoDefence(Keyword())((images(3), torch.ones(3))),
        lambda: NoDefence(Keyword())(images(3)),
    ):
        with pytest.raises(ValueError, match="'y' of a program is needed and keyword-only"):
            call()


# --- What the guide has kept, and what one image does not show ------------------------------------


class Keeping(Programs):
    """The guide keeps features of its images, of which the model makes use."""

    def guide(self, x):
        self.kept = x.flatten(1) @ WEIGHT.T
        super().guide(x)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.sample(
                "obs", self.likelihood(x, ((z + self.kept) @ WEIGHT).sigmoid()), obs=x.flatten(1)
            )


@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_model_that_uses_what_the_guide_has_kept(number):
    """It trains well, since there the guide has seen the same images just before."""
    vae, x = Keeping(), images(number)
    for call in (MCMCDefence(vae, num_samples=1, warmup_steps=0), lambda x: metrics.nll(vae, x, 2)):
        vae.guide(x[:3])
        with pytest.raises(ValueError, match="vae.model .* uses what the guide has kept"):
            call(x)


def noise_of(size):
    return lambda x, mean: dist.Normal(mean + size * torch.randn_like(mean), 1e-4).to_event(1)


@pytest.mark.parametrize("part", ["likelihood", "observation"])
def test_noise_that_is_small_beside_how_unlikely_images_are(part):
    """It changes energies by some nats; those of a draw of the prior are some 10^8."""
    sharp = {"likelihood": noise_of(3e-5)}
    if part == "observation":
        sharp = {
            "likelihood": noise_of(0.0),
            "observation": lambda x: x.flatten(1) + 3e-5 * torch.randn(len(x), 16),
        }
    for _ in range(3):
        with pytest.raises(ValueError, match="vae.model .* draws noise outside"):
            program.potential(changed(**sharp), images(4))
    program.potential(changed(likelihood=noise_of(0.0)), images(4))


BOUNDS = {
    "another latent": lambda x, top: dist.Uniform(torch.zeros_like(top), top).to_event(1),
    "the image": lambda x, top: dist.Uniform(0.0, x.flatten(1).sum(1, keepdim=True)).to_event(1),
    "the start of a tail": lambda x, top: dist.Pareto(top, torch.full_like(top, 3.0)).to_event(1),
}


@pytest.mark.parametrize("lower", BOUNDS.values(), ids=BOUNDS)
def test_bounds_that_move_are_refused_for_a_single_image(lower):
    """One row has the bounds of one draw, which other latents and images do not have."""

    class Bounded(Programs):
        def model(self, x):
            with pyro.plate("data", len(x)):
                top = pyro.sample("top", dist.LogNormal(x.new_zeros(len(x), 1), 0.5).to_event(1))
                z = pyro.sample("z", lower(x, top))
                mean = (top + z).expand(-1, 16)
                pyro.sample("obs", self.likelihood(x, mean), obs=self.observation(x))

    for number in (1, 3):
        with pytest.raises(ValueError, match="'z'.* has a support that differs between images"):
            program.potential(Bounded(), images(number))
    with pytest.raises(ValueError, match="'z'.* has a support that differs between images"):
        program.potential(Bounded(), images(1).expand(3, -1, -1, -1))


class Cached(Programs):
    """Keeps what it has computed once of so many images."""

    def __init__(self, part):
        self.part, self.cache = part, {}

    def kept(self, part, value):
        return self.cache.setdefault(len(value), value) if part == self.part else value

    def q(self, x):
        return dist.Normal(self.kept("encoding", x.flatten(1) @ WEIGHT.T), 0.3).to_event(1)

    def observation(self, x):
        return self.kept("image", x.flatten(1))


@pytest.mark.parametrize(("part", "name"), [("encoding", "guide"), ("image", "model")])
def test_what_was_computed_of_other_images_of_the_same_shape(part, name):
    with pytest.raises(ValueError, match=f"vae.{name} .* of other images of the same shape"):
        metrics.nll(Cached(part), images(4), 2)
    if name == "guide":
        with pytest.raises(ValueError, match="vae.guide .* of other images of the same shape"):
            attacks.symmetric_kl(Cached(part))(images(3))
    metrics.nll(Cached("nothing"), images(4), 2)


class Sampler(dist.Normal):
    """Draws of another shape than that of what is observed, which are nothing to compare."""

    def sample(self):
        return super().sample()[..., 0]


def test_points_that_are_observed_and_draws_of_another_shape_are_no_fault():
    """A point that is rounded otherwise in another order of images has no density where it was."""

    class Observing(Programs):
        def likelihood(self, x, mean):
            mean = mean * (1 + 1e-7 * len(x))
            pyro.sample("mean", dist.Delta(mean).to_event(1), obs=mean)
            return Sampler(mean, 0.3).to_event(1)

    for number in (1, 3):
        assert program.potential(Observing(), images(number)).sites[0].name == "z"


class TestGradients:
    """Where no gradient leads from the likelihood to latents, chains hardly move: a warning."""

    def gap(self, decode):
        """z moves the mean by ``decode``, w by a network."""

        class Two(Programs):
            def model(self, x):
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", self.prior(x))
                    w = pyro.sample("w", self.prior(x))
                    fn = self.likelihood(x, decode(z) + w @ WEIGHT)
                    pyro.sample("obs", fn, obs=self.observation(x))

        return Two()

    @torch.no_grad()
    def under_no_grad(self, z):
        return z @ WEIGHT

    @pytest.mark.parametrize("number", [1, 4])
    @pytest.mark.parametrize("assumed", [None, Linf(0.1)])
    def test_a_likelihood_without_one_is_told(self, number, assumed):
        detached = lambda z: z.detach() @ WEIGHT  # noqa: E731
        compared = lambda z: (z > 0).to(z) @ WEIGHT  # noqa: E731
        torch.manual_seed(0)
        for decode in (self.under_no_grad, detached, compared):
            with pytest.warns(UserWarning, match=r"latents \['z'\], and no gradient leads"):
                program.potential(self.gap(decode), images(number), assumed)
        plain = changed(likelihood=lambda x, mean: dist.Normal(mean.detach(), 0.1).to_event(1))
        with torch.no_grad(), pytest.warns(UserWarning, match=r"latents \['z'\], and no gradient"):
            program.potential(plain, images(number), assumed)

    def test_what_has_one_or_needs_none_is_not(self):
        network = nn.Linear(3, 16)
        relu = lambda z: (network(z) - 1e3).relu()  # noqa: E731 -- zero, as is its gradient
        for decode in (network, relu, lambda z: torch.zeros(16)):
            vae, x = self.gap(decode), images(4)
            program.potential(vae, x)
            with torch.no_grad():
                program.potential(vae, x)
        with torch.inference_mode():
            program.potential(Programs(), images(4))

    @pytest.mark.parametrize("number", [1, 4])
    def test_one_of_another_function_is_told(self, number):
        torch.manual_seed(0)
        straight_through = lambda z: 9 * (z + (z.round() - z).detach()) @ WEIGHT  # noqa: E731
        half_detached = lambda z: 5 * (z + z.detach()) @ WEIGHT  # noqa: E731
        for decode in (straight_through, half_detached):
            for assumed in (None, Linf(0.1)):
                with pytest.warns(UserWarning, match="its gradient foretells"):
                    program.potential(self.gap(decode), images(number), assumed)

    def test_kinks_and_curves_are_no_other_function(self):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 16))
        for decode in (network, lambda z: 3 * z.abs() @ WEIGHT, lambda z: z.exp() @ WEIGHT):
            for dtype in (torch.float64, torch.float32):
                vae = self.gap(lambda z, d=decode, t=dtype: d(z.double()).to(t))
                for seed in range(10):
                    torch.manual_seed(seed)
                    program.potential(vae, images(4))

    def test_a_kink_at_the_one_place_of_a_single_image_is_none(self):
        """Of one image there is one way, here from 0 to 1, and a kink near where it starts."""

        class Numbered(dist.Normal):
            def rsample(self, sample_shape=()):
                return torch.arange(len(self.loc)).to(self.loc)[:, None]

        class OfOne(Programs):
            def model(self, x):
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", Numbered(x.new_zeros(len(x), 1), 1.0).to_event(1))
                    fn = dist.Laplace(z.expand(-1, 16), 0.1).to_event(1)
                    pyro.sample("obs", fn, obs=self.observation(x))

        for kink in (0.0003, 0.0012):  # before, or behind, where the slope is taken
            program.potential(OfOne(), torch.full((1, *SHAPE), kink))

    @pytest.mark.parametrize(
        ("classes", "number_of"),
        [
            (lambda x: dist.Bernoulli(x.new_full((len(x),), 0.5)), lambda y: y.long()),
            (
                lambda x: dist.OneHotCategorical(x.new_full((len(x), 3), 1 / 3)),
                lambda y: y.argmax(-1),
            ),
        ],
    )
    def test_discrete_latents_need_none(self, classes, number_of):
        """Their values may be floating-point numbers, and are summed out."""

        class Classes(Programs):
            def model(self, x):
                with pyro.plate("data", len(x)):
                    y = pyro.sample("y", classes(x))
                    z = pyro.sample("z", self.prior(x))
                    mean = z @ WEIGHT + WEIGHT[number_of(y)]
                    pyro.sample("obs", self.likelihood(x, mean), obs=self.observation(x))

            def guide(self, x):
                with pyro.plate("data", len(x)):
                    pyro.sample("y", classes(x))
                    pyro.sample("z", self.q(x))

        torch.manual_seed(0)
        program.potential(Classes(), images(4))
