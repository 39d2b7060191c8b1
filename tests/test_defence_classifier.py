"""Classification behind a defence, and what its chains say about attacks."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import HierarchicalVAE
from pyro.infer import HMC
from torch import nn

from pyro_vae_defence import metrics
from pyro_vae_defence.defence import (
    READINGS,
    AnalysisBySynthesis,
    DefendedClassifier,
    EncoderDefence,
    MCMCDefence,
    NoDefence,
    PosteriorModeDefence,
    anomaly_scores,
    read_latents,
)
from pyro_vae_defence.defence.classifier import reencode
from pyro_vae_defence.defence.starts import INITIALS
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.models.classifier import ConvClassifier, LinearClassifier
from pyro_vae_defence.ops.divergences import squared_mean_distance
from pyro_vae_defence.robustness import WhiteBox

KERNEL = functools.partial(BatchedHMC, num_steps=2)


def softmax(scores):
    return scores.exp() / scores.exp().sum(-1, keepdim=True)


class TestReadings:
    @pytest.fixture
    def run(self, float64, tutorial_vae):
        defence = MCMCDefence(tutorial_vae, KERNEL, 4, 2, 3)
        return defence, LinearClassifier(5, 10), defence(torch.rand(6, 1, 28, 28))

    def test_are_what_the_formulas_say(self, run):
        defence, classifier, result = run
        draws = result.samples["latent"]
        mean = draws.mean((0, 1))
        decoded = program.decode(defence.vae, {"latent": mean}, (1, 28, 28))
        encoded = program.posterior_mean(defence.vae, decoded)["latent"]
        expected = {
            "last": softmax(classifier(draws[0, -1])),
            "draws": softmax(classifier(draws)).mean((0, 1)),
            "mean": softmax(classifier(mean)),
            "reencoded": softmax(classifier(encoded)),
            "vote": sum(self.votes(defence.vae, classifier, z) for z in draws.flatten(0, 1)) / 12,
        }
        assert set(expected) == set(READINGS)
        for reading, probabilities in expected.items():
            found = DefendedClassifier(defence, classifier, reading).log_probabilities(result)
            assert found.shape == (6, 10)
            assert torch.allclose(found.exp(), probabilities, rtol=0, atol=1e-12)
            # Readings differ, or the options would be one.
            others = [p for name, p in expected.items() if name != reading]
            assert all((found.exp() - other).abs().max() > 1e-4 for other in others)

    def test_encode_images_in_range_again(self, linear_vae):
        means = torch.linspace(-0.5, 1.5, 32).view(2, 1, 4, 4)
        found = reencode(linear_vae, {"z": torch.zeros(2, 3)}, lambda latents: means)
        expected = program.posterior_mean(linear_vae, means.clamp(0, 1))
        assert torch.equal(found["z"], expected["z"])

    @staticmethod
    def votes(vae, classifier, draw):
        decoded = program.decode(vae, {"latent": draw}, (1, 28, 28))
        chosen = classifier(program.posterior_mean(vae, decoded)["latent"]).argmax(-1)
        return torch.eye(10)[chosen]

    def test_call_and_prediction_are_those_of_the_run(self, run):
        defence, classifier, _ = run
        x = torch.rand(4, 1, 28, 28)
        classify = DefendedClassifier(defence, classifier, "draws")
        result = defence(x, torch.Generator().manual_seed(1))
        log_probabilities = classify(x, torch.Generator().manual_seed(1))
        assert torch.equal(log_probabilities, classify.log_probabilities(result))
        assert not log_probabilities.requires_grad
        predicted = classify.predict(x, torch.Generator().manual_seed(1))
        assert torch.equal(predicted, log_probabilities.argmax(-1))

    def test_of_a_single_draw_agree(self, float64, tutorial_vae):
        classifier, x = LinearClassifier(5, 10), torch.rand(4, 1, 28, 28)
        result = NoDefence(tutorial_vae)(x)
        last, draws, mean = (
            DefendedClassifier(NoDefence(tutorial_vae), classifier, reading).log_probabilities(
                result
            )
            for reading in ("last", "draws", "mean")
        )
        assert torch.allclose(last, draws, rtol=0, atol=1e-12)
        assert torch.allclose(last, mean, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("reading", READINGS)
    def test_work_for_every_control_and_hierarchies(self, reading):
        vae = HierarchicalVAE()
        for defence in (NoDefence(vae), EncoderDefence(vae, 3), MCMCDefence(vae, KERNEL, 2, 1)):
            classify = DefendedClassifier(defence, LinearClassifier(6, 3), reading)
            log_probabilities = classify(torch.rand(4, 1, 4, 4))
            assert torch.allclose(log_probabilities.logsumexp(-1), torch.zeros(4), atol=1e-5)

    @pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool])
    def test_classes_as_one_hot_vectors_are_scores(self, float64, tutorial_vae, kind):
        """As of a tree or of nearest neighbours."""
        head, x = LinearClassifier(5, 3), torch.rand(4, 1, 28, 28)
        defence = EncoderDefence(tutorial_vae, 3)
        result = defence(x)
        found, expected = (
            DefendedClassifier(
                defence, lambda z, to=to: torch.eye(3)[head(z).argmax(1)].to(to), "draws"
            ).log_probabilities(result)
            for to in (kind, torch.float64)
        )
        assert torch.equal(found, expected)

    def test_log_probabilities_survive_certainty(self, tutorial_vae):
        classifier = LinearClassifier(5, 3)
        with torch.no_grad():
            classifier.linear.bias.copy_(torch.tensor([0.0, 500.0, 0.0]))
        classify = DefendedClassifier(EncoderDefence(tutorial_vae, 4), classifier, "draws")
        found = classify(torch.rand(2, 1, 28, 28))
        assert found.isfinite().all()
        assert (found[:, 0] < -400).all()

    def test_use_the_classifier_in_eval_mode(self, tutorial_vae):
        classifier = nn.Sequential(nn.Dropout(0.9), LinearClassifier(5, 3)).train()
        classify = DefendedClassifier(EncoderDefence(tutorial_vae, 1), classifier, "mean")
        x = torch.rand(3, 1, 28, 28)
        first, again = (classify(x, torch.Generator().manual_seed(0)) for _ in range(2))
        assert torch.equal(first, again)
        assert classifier.training


class AngleVAE:
    """The image is a wave, its phase the latent."""

    at = 2 * math.pi * torch.arange(16) / 16

    def __init__(self, turns=0):
        self.turns = turns

    def wave(self, z):
        return 0.5 + 0.4 * torch.cos(z[:, None] - self.at.to(z))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.VonMises(x.new_zeros(len(x)), x.new_full((), 0.1)))
            pyro.sample("x", dist.Normal(self.wave(z), 0.3).to_event(1), obs=x.flatten(1))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            flat, at = x.flatten(1) - 0.5, self.at.to(x)
            loc = torch.atan2(flat @ at.sin(), flat @ at.cos()) + 2 * math.pi * self.turns
            pyro.sample("z", dist.VonMises(loc, x.new_full((), 50.0)))


@pytest.mark.usefixtures("float64")
class TestAngles:
    phase = torch.tensor([-3.1, -1.0, 0.0, 2.0, 3.14], dtype=torch.float64)

    @pytest.fixture
    def images(self):
        return AngleVAE().wave(self.phase).reshape(-1, 1, 4, 4)

    @pytest.mark.parametrize("reading", ["mean", "reencoded"])
    def test_have_a_direction_for_a_mean(self, images, reading):
        vae = AngleVAE()
        result = EncoderDefence(vae, 300)(images, torch.Generator().manual_seed(1))
        found = read_latents(vae, result, reading)["z"]
        # Standard error of the mean direction: 1 / sqrt(50 * 300) = 0.008.
        assert (found - self.phase).cos().min() > math.cos(5 * 0.008)

    @pytest.mark.parametrize("turns", [0, 1, -2])
    def test_are_the_same_after_a_turn(self, images, turns):
        vae = AngleVAE(turns)
        torch.testing.assert_close(program.posterior_mean(vae, images)["z"], self.phase)
        defence = MCMCDefence(vae, KERNEL, 1, 0, initial="mean")
        torch.testing.assert_close(defence(images).initial["z"][0], self.phase)

    def test_are_near_each_other_across_the_cut(self):
        p, q = ({"z": dist.VonMises(torch.tensor([at]), 1.0)} for at in (3.1, -3.1))
        difference = 2 * math.pi - 6.2
        assert squared_mean_distance(p, q).item() == pytest.approx(difference**2)


def test_the_papers_protocol_is_one_setting():
    vae = ConvVAE()
    paper = DefendedClassifier.paper(vae, LinearClassifier(64, 10), num_chains=2)
    assert paper.reading == "last"
    assert isinstance(paper.defence, MCMCDefence)
    assert (paper.defence.num_samples, paper.defence.num_chains) == (500, 2)


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (LinearClassifier(64, 10), "a LinearClassifier of num_latents=64 is given latents of"),
        (torch.nn.Linear(64, 10), "classifier failed: .*mat1 and mat2 shapes cannot be multiplied"),
        (ConvClassifier(1, 10), "classifier failed: .* not of images"),
        (lambda z: z.sum(1), r"classifier must return scores \(2, classes\), got \(2,\)"),
    ],
)
def test_a_classifier_of_something_else_is_told_what_it_is_given(classifier, message):
    vae = HierarchicalVAE()
    sites = program.posterior_mean(vae, x := torch.rand(2, 1, 4, 4))
    named = ", ".join(rf"'{name}' \({value[0].numel()}\)" for name, value in sites.items())
    total = sum(value[0].numel() for value in sites.values())
    for match in (message, rf"shape \(2, {total}\), .* in their order, {named}"):
        with pytest.raises(ValueError, match=match):
            DefendedClassifier(NoDefence(vae), classifier, "last")(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, c: DefendedClassifier(3, c), "defence must be callable"),
        (lambda d, c: DefendedClassifier(c, d), "defence must know its VAE"),
        (lambda d, c: DefendedClassifier(d, 3), "classifier must be callable"),
        (lambda d, c: DefendedClassifier(d, c, "median"), "reading must be one of .* got 'median'"),
        (lambda d, c: read_latents(d.vae, None, "median"), "reading must be one of"),
    ],
)
def test_mistakes(tutorial_vae, call, message):
    defence = MCMCDefence(tutorial_vae, KERNEL, 1, 0)
    with pytest.raises(ValueError, match=message):
        call(defence, LinearClassifier(5, 3))


class OwnDefence:
    def __init__(self, vae, returned):
        self.vae, self.returned = vae, returned

    def __call__(self, x, generator=None):
        return self.returned(NoDefence(self.vae), x, generator)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda d, x, g: d(x, g).reconstruction, "a DefenceResult, it returned a Tensor"),
        (lambda d, x, g: d(x[:2], g), "one row per image: of 3 images it returned 2"),
    ],
)
def test_what_a_defence_returns_is_checked_wherever_one_is_run(tutorial_vae, returned, message):
    x = torch.rand(3, 1, 28, 28)
    defence = OwnDefence(tutorial_vae, returned)
    classifier = LinearClassifier(5, 3)
    runs = [
        lambda: DefendedClassifier(defence, classifier)(x),
        lambda: anomaly_scores(defence, x),
        lambda: WhiteBox(tutorial_vae, defence, x)(x),
    ]
    for run in runs:
        with pytest.raises(ValueError, match=message):
            run()


class TwoOrders:
    """Pixels are .5 + .2 (left, right), up to noise; the guide samples the right one first."""

    def model(self, x, y=None):
        with pyro.plate("data", len(x)):
            left, right = (
                pyro.sample(name, dist.Normal(x.new_zeros(1), 1.0).to_event(1))
                for name in ("left", "right")
            )
            mean = 0.5 + 0.2 * torch.cat([left, right], 1)
            pyro.sample("x", dist.Normal(mean, 0.02).to_event(1), obs=x.flatten(1))

    def guide(self, x, y=None):
        with pyro.plate("data", len(x)):
            for name, pixel in (("right", 1), ("left", 0)):
                mean = (x.flatten(1)[:, pixel : pixel + 1] - 0.5) / 0.2
                pyro.sample(name, dist.Normal(mean, 0.1).to_event(1))


class TestOrderOfSites:
    """Latents come in the guide's order, in which classifiers were trained on its encodings."""

    vae = TwoOrders()
    x = torch.tensor([[0.7, 0.3], [0.3, 0.7]]).view(2, 1, 1, 2)

    @pytest.mark.parametrize("kernel", [KERNEL, lambda model: HMC(model, num_steps=1)])
    @pytest.mark.parametrize("initial", INITIALS)
    def test_wherever_chains_start(self, initial, kernel):
        options = {"initial": initial, "mode_steps": 1, "num_temperatures": 2}
        result = MCMCDefence(self.vae, kernel, 1, 0, **options)(self.x)
        for latents in (result.initial, result.samples, result.latents):
            assert list(latents) == ["right", "left"]

    def test_of_what_the_model_draws(self):
        assert list(metrics.simulate(self.vae, self.x)[0]) == ["right", "left"]
        few = {"num_temperatures": 3, "num_steps": 1, "num_walks": 2}
        classify = AnalysisBySynthesis(self.vae, 2, **few)
        assert list(classify.explain(self.x, torch.tensor([0, 1]))) == ["right", "left"]

    def test_decides_the_class(self, float64):
        defence = PosteriorModeDefence(self.vae, "lbfgs", num_steps=5, initial="prior")
        result = defence(self.x.double(), torch.Generator().manual_seed(0))

        def is_right_bright(z):
            return torch.cat([-z[:, :1], z[:, :1]], 1)

        for reading in READINGS:
            classify = DefendedClassifier(defence, is_right_bright, reading)
            assert classify.log_probabilities(result).argmax(1).tolist() == [0, 1]
