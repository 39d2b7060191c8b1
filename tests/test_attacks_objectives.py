"""Objectives: closed forms, targets and noise that follow the rows, Table 1, what bad guides are
told."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import BatchNormVAE, HierarchicalVAE, LinearGaussianVAE
from torch.distributions import kl_divergence
from torch.nn import functional as F

from pyro_vae_defence import attacks
from pyro_vae_defence.attacks import interop
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import LinearClassifier, flatten_latents
from pyro_vae_defence.ops.balls import L1, L2, Linf
from pyro_vae_defence.ops.streams import Streams

BALLS = [Linf(0.1), L2(1.0), L1(3.0)]


class TwoLevelVAE:
    """A Gaussian guide of two levels on 1x4x4 images, the lower mean bent by the draw above it."""

    def model(self, x):
        with pyro.plate("data", x.shape[0]):
            top = pyro.sample("top", dist.Normal(x.new_zeros(x.shape[0], 2), 1.0).to_event(1))
            low = pyro.sample("low", dist.Normal(top.sin(), 1.0).to_event(1))
            mean = torch.cat([top, low], 1).repeat(1, 4).reshape(-1, 1, 4, 4)
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(3), obs=x)

    def guide(self, x):
        flat = x.flatten(1)
        with pyro.plate("data", x.shape[0]):
            top = pyro.sample("top", dist.Normal(flat[:, :2], 0.3 + flat[:, 2:4]).to_event(1))
            pyro.sample("low", dist.Normal(flat[:, 4:6] + (3 * top).sin(), 0.4).to_event(1))


class QuadrantVAE:
    """Two latents: the first two pixels, centred."""

    def model(self, x):
        raise AssertionError("attacks on the encoder do not run the model")

    def guide(self, x):
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(x.flatten(1)[:, :2] - 0.5, 0.1).to_event(1))


def images(num=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, 1, 4, 4, generator=generator, dtype=torch.float64)


DIVERGENCES = {
    "symmetric_kl": lambda p, q: 0.5 * (kl_divergence(p, q) + kl_divergence(q, p)),
    "forward_kl": kl_divergence,
    "reverse_kl": lambda p, q: kl_divergence(q, p),
    "mean_distance": lambda p, q: (p.mean - q.mean).square().sum(1),
    "squared_wasserstein": lambda p, q: (
        (p.mean - q.mean).square().sum(1) + (p.stddev - q.stddev).square().sum(1)
    ),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_from_the_reference_and_to_a_target(name):
    vae, x_ref, x = TwoLevelVAE(), images(seed=1), images(seed=2)
    x_target = images(seed=3)

    def expected(other):
        p, q = program.posterior(vae, x)["top"], program.posterior(vae, other)["top"]
        return DIVERGENCES[name](p, q)

    factory = getattr(attacks, name)
    away = factory(vae, sites="top")(x_ref)
    assert torch.allclose(away(x), expected(x_ref))
    assert (away(x_ref).abs() < 1e-12).all()
    towards = factory(vae, x_target, sites=["top"])(x_ref)
    assert torch.allclose(towards(x), -expected(x_target))
    assert (towards(x_target).abs() < 1e-12).all()


def test_groups_add_up_and_share_the_noise_of_both_images():
    vae, x_ref, x = TwoLevelVAE(), images(seed=1), images(seed=2)
    streams = Streams.create(4, seed=5)
    values = {
        sites: attacks.symmetric_kl(vae, sites=sites)(x_ref, streams)(x)
        for sites in (None, 1, 2, "top", "low")
    }
    assert torch.equal(values[1], values["top"])
    assert torch.equal(values[2], values[None])
    assert torch.allclose(values["top"] + values["low"], values[None])
    # Zero at the reference: both sides see the same draw of the level above.
    assert attacks.symmetric_kl(vae)(x_ref, streams)(x_ref).abs().max() == 0


def test_draws_are_averaged_and_fixed():
    vae, x_ref, x = TwoLevelVAE(), images(seed=1), images(seed=2)
    streams = Streams.create(4, seed=5)
    many = attacks.symmetric_kl(vae, num_draws=3)(x_ref, streams)
    single = [
        attacks.symmetric_kl(vae)(x_ref, Streams.create(4, seed=seed))(x) for seed in (5, 6, 7)
    ]
    assert torch.allclose(many(x), torch.stack(single).mean(0))
    assert torch.equal(many(x), many(x))
    assert not torch.allclose(single[0], single[1])


@pytest.mark.parametrize("prepared", ["symmetric_kl", "maximum_damage"])
def test_random_encoders_do_not_see_the_batch(prepared):
    vae, x = TwoLevelVAE(), images(5)

    def run(x, **settings):
        torch.manual_seed(3)
        attack = attacks.PGD(getattr(attacks, prepared)(vae), Linf(0.1), 4, **settings)
        return attack(x)

    whole = run(x, num_restarts=2)
    parts = run(x, num_restarts=2, batch_size=3)
    assert torch.allclose(parts.x_adv, whole.x_adv)
    assert torch.allclose(parts.objective, whole.objective)
    assert torch.allclose(run(x[:2], num_restarts=2).objective, whole.objective[:, :2])


def test_outputs():
    vae, x_ref, x = LinearGaussianVAE(), images(seed=1), images(seed=2)
    x_target = images(seed=3)
    streams = Streams.create(4, seed=5)

    def decoded(x, latents):
        z = program.posterior_mean(vae, x)
        if latents == "sample":
            z = program.encode(vae, x, streams=streams)
        return z["z"] @ vae.weight.T

    for latents in ("mean", "sample"):
        away = attacks.maximum_damage(vae, latents=latents)(x_ref, streams)
        distance = (decoded(x, latents) - decoded(x_ref, latents)).square().sum(1)
        assert torch.allclose(away(x), distance)
        towards = attacks.targeted_output(vae, x_target, latents=latents)(x_ref, streams)
        distance = (decoded(x, latents) - decoded(x_target, latents)).square().sum(1)
        assert torch.allclose(towards(x), -distance)


@pytest.fixture
def classifier():
    return LinearClassifier(3, 5).double()


def test_cross_entropy_and_its_targets(classifier):
    vae, x_ref, x = LinearGaussianVAE(), images(seed=1), images(seed=2)
    scores = classifier(program.posterior_mean(vae, x))
    predicted = classifier(program.posterior_mean(vae, x_ref)).argmax(1)
    labels, targets = torch.tensor([0, 1, 2, 3]), torch.tensor([4])
    for given, label in ((None, predicted), (labels, labels)):
        value = attacks.cross_entropy(vae, classifier, given)(x_ref)(x)
        assert torch.allclose(value, F.cross_entropy(scores, label, reduction="none"))
    value = attacks.cross_entropy(vae, classifier, targets=targets)(x_ref)(x)
    assert torch.allclose(value, scores.log_softmax(1)[:, 4])
    streams = Streams.create(4, seed=2)
    sampled = classifier(program.encode(vae, x, streams=streams))
    value = attacks.cross_entropy(vae, classifier, labels, latents="sample")(x_ref, streams)(x)
    assert torch.allclose(value, F.cross_entropy(sampled, labels, reduction="none"))


def test_a_classifier_reads_sites_or_all_of_them_together(classifier):
    vae, x_ref, x = LinearGaussianVAE(), images(seed=1), images(seed=2)
    expected = attacks.cross_entropy(vae, classifier)(x_ref)(x)
    for read in (classifier.linear, lambda z: classifier.linear(z[:, :3])):
        assert torch.equal(attacks.cross_entropy(vae, read)(x_ref)(x), expected)
        scores = interop.LatentClassifier(vae, read)(x)
        assert torch.equal(scores, interop.LatentClassifier(vae, classifier)(x))
    of_images = torch.nn.Conv2d(1, 5, 3).double()
    with pytest.raises(ValueError, match=r"classifier failed: .*it is given latents of shape"):
        attacks.misclassified(vae, of_images)(x_ref)


def test_difference_of_logits_ratio(float64):
    vae, x = LinearGaussianVAE(), images(3)
    scores = torch.tensor([[4.0, 1.0, 3.0, 0.0], [1.0, 5.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    labels, targets = torch.tensor([0, 0, 2]), torch.tensor([1, 3, 0])
    value = attacks.dlr(vae, lambda z: scores, labels)(x)(x)
    assert value.tolist() == pytest.approx([-(4 - 3) / (4 - 1), -(1 - 5) / (5 - 1), 0.0])
    value = attacks.dlr(vae, lambda z: scores, labels, targets=targets)(x)(x)
    assert value.tolist() == pytest.approx([-(4 - 1) / (4 - 0.5), -(1 - 0) / (5 - 0.5), 0.0])
    # Shift and scale of the scores do not matter.
    again = attacks.dlr(vae, lambda z: 7 * scores + 3, labels, targets=targets)(x)(x)
    assert torch.allclose(value, again)
    for settings, needed in (({}, 3), ({"targets": targets}, 4)):
        few = attacks.dlr(vae, lambda z, n=needed: scores[:, : n - 1], labels, **settings)
        with pytest.raises(ValueError, match=f"scores .* of at least {needed} classes"):
            few(x)


def test_class_attacks_change_classes():
    # Two latents, four quadrants: every class is within reach of radius 1.
    vae, x = QuadrantVAE(), images(6)

    def scores(latents):
        return latents["z"] @ torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]], dtype=torch.float64)

    def classify(x):
        return scores(program.posterior_mean(vae, x)).argmax(1)

    before = classify(x)
    targets = (before + 1) % 4
    for factory in (attacks.cross_entropy, attacks.dlr):
        away = attacks.PGD(factory(vae, scores), Linf(1.0), 20)(x)
        assert (classify(away.best()) != before).all()
        towards = attacks.PGD(factory(vae, scores, targets=targets), Linf(1.0), 20)(x)
        assert (classify(towards.best()) == targets).all()


@pytest.mark.parametrize("ball", BALLS, ids=str)
@pytest.mark.parametrize("supervised", [True, False])
@pytest.mark.parametrize("name", [*DIVERGENCES, "output", "cross_entropy"])
def test_every_objective_drives_an_attack(name, supervised, ball, classifier):
    vae, x = LinearGaussianVAE(), images(3)
    target = images(3, seed=8) if supervised else None
    if name == "cross_entropy":
        targets = torch.tensor([1]) if supervised else None
        prepared = attacks.cross_entropy(vae, classifier, targets=targets, latents="sample")
    elif name != "output":
        prepared = getattr(attacks, name)(vae, target)
    else:
        prepared = (
            attacks.targeted_output(vae, target) if supervised else attacks.maximum_damage(vae)
        )
    torch.manual_seed(2)
    result = attacks.PGD(prepared, ball, 30)(x)
    assert (ball.norm(result.x_adv[0] - x) <= ball.radius).all()
    # The attack gets further than a random point of the ball, by a margin.
    torch.manual_seed(2)
    start = attacks.PGD(prepared, ball, 1, step_size=1e-9)(x)
    assert (result.objective > start.objective).all()


def test_targets_follow_their_images_through_restarts_and_micro_batches():
    vae, x, x_target = LinearGaussianVAE(), images(5), images(5, seed=9)
    prepared = attacks.mean_distance(vae, x_target)
    result = attacks.APGD(prepared, Linf(1.0), 60, num_restarts=2, batch_size=3)(x)
    reached = program.posterior_mean(vae, result.x_adv[1])["z"]
    wanted = program.posterior_mean(vae, x_target)["z"]
    distances = (reached[:, None] - wanted[None]).square().sum(-1)
    assert distances.argmin(1).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="x_target has 3 entries, but the attack has 5 images"):
        attacks.PGD(attacks.mean_distance(vae, x_target[:3]), Linf(0.1), 1)(x)


class _Guide:
    def __init__(self, guide):
        self.guide = guide

    def model(self, x):
        raise AssertionError("attacks on the encoder do not run the model")


def _no_plate(x):
    pyro.sample("z", dist.Normal(x.flatten(1)[:, :2], 1.0).to_event(2))


def _wrong_plate(x):
    with pyro.plate("data", 7):
        pyro.sample("z", dist.Normal(x.flatten(1)[:, :2], 1.0).to_event(1))


def _no_event(x):
    with pyro.plate("data", x.shape[0]):
        pyro.sample("z", dist.Normal(x.flatten(1)[:, :2], 1.0))


def _no_site(x):
    return x


def _two_arguments(x, y):
    return x


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (_no_plate, "site 'z' stands in no data plate"),
        (_wrong_plate, "vae.guide failed on images of shape"),
        (_no_event, r"vae.guide failed on images of shape .* \.to_event\(1\)"),
        (_no_site, "vae.guide has no latent site"),
        (_two_arguments, "need 1 arguments beside the images, got 0"),
    ],
)
def test_guides_that_break_the_contract(guide, message):
    with pytest.raises(ValueError, match=message):
        attacks.symmetric_kl(_Guide(guide))(images())
    with pytest.raises(ValueError, match=message):
        attacks.PGD(attacks.maximum_damage(_Guide(guide)), Linf(0.1), 1)(images())


def test_families_without_the_divergence():
    x = images()
    with pytest.raises(ValueError, match="squared_wasserstein needs factorised Gaussian"):
        attacks.squared_wasserstein(HierarchicalVAE())(x)(x)

    def mixture(x):
        weights = dist.Categorical(torch.ones(x.shape[0], 2).to(x))
        parts = dist.Normal(x.flatten(1)[:, :2], 1.0)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.MixtureSameFamily(weights, parts))

    with pytest.raises(ValueError, match="no KL-divergence is registered between"):
        attacks.symmetric_kl(_Guide(mixture))(x)(x)
    assert attacks.mean_distance(_Guide(mixture))(x)(x).tolist() == [0.0] * 4


def test_modules_are_evaluated_in_eval_mode():
    vae, x = BatchNormVAE().train(), torch.rand(2, 1, 28, 28)
    classifier = torch.nn.Sequential(torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 4)).train()
    for prepared in (
        attacks.forward_kl(vae, x),
        attacks.maximum_damage(vae),
        attacks.dlr(vae, lambda z: classifier(z["z"])),
        attacks.cross_entropy(vae, LinearClassifier(64, 4).train()),
    ):
        prepared(x)(x)
    assert vae.norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda v: attacks.symmetric_kl(v, sites=0),
            "sites must be names, or a number of at least",
        ),
        (
            lambda v: attacks.symmetric_kl(v, sites=[]),
            "sites must be names, or a number of at leas",
        ),
        (lambda v: attacks.symmetric_kl(v, sites=2)(images()), "sites=2, but the guide has 1"),
        (lambda v: attacks.symmetric_kl(v, sites="y")(images()), r"no latent site \['y'\]"),
        (
            lambda v: attacks.symmetric_kl(v, num_draws=0),
            "num_draws must be an integer of at least",
        ),
        (lambda v: attacks.forward_kl(v, 2 * images()), "x_target must lie in"),
        (lambda v: attacks.symmetric_kl(v)(2 * images() - 1), "x_ref must lie in"),
        (lambda v: attacks.dlr(v, flatten_latents)(images() * torch.nan), "x_ref is not finite"),
        (lambda v: attacks.targeted_output(v, images()[0]), "x_target must have shape"),
        (lambda v: attacks.maximum_damage(v, latents="mode"), "latents must be 'sample' or 'mean'"),
        (lambda v: attacks.dlr(v, None), "classifier must map latents to scores"),
        (
            lambda v: attacks.dlr(v, flatten_latents, torch.ones(4)),
            "labels must be an int64 tensor",
        ),
        (
            lambda v: attacks.cross_entropy(v, flatten_latents, targets=[1]),
            "targets must be an int64 tensor",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make(LinearGaussianVAE())


def test_objectives_stay_on_the_device_of_the_images():
    vae = LinearGaussianVAE()
    x = torch.empty(3, 1, 4, 4, device="meta", dtype=torch.float32)
    labels = torch.empty(3, dtype=torch.int64, device="meta")
    for prepared in (
        attacks.symmetric_kl(vae, x),
        attacks.maximum_damage(vae),
        attacks.dlr(vae, flatten_latents, labels),
    ):
        value = prepared(x)(x)
        assert value.shape == (3,)
        assert value.device.type == "meta"
        assert value.dtype == torch.float32


def test_sites_from_an_iterator_and_a_number_of_numpys():
    """An iterator would be empty after the first look, and nothing would be compared."""
    vae, x = LinearGaussianVAE(), torch.rand(2, 1, 4, 4)
    other = (x + 0.1).clamp(max=1.0)
    expected = attacks.symmetric_kl(vae)(x)(other)
    for sites in (iter(["z"]), np.int64(1), "z", ["z"]):
        assert torch.equal(attacks.symmetric_kl(vae, sites=sites)(x)(other), expected)
