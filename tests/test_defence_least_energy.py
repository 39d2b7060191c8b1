"""Least energies: closed forms, the bound that every attack keeps, and what a detector makes of
them."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae_defence import attacks
from pyro_vae_defence.defence import (
    Detector,
    EncoderDefence,
    MCMCDefence,
    NoDefence,
    PosteriorModeDefence,
)
from pyro_vae_defence.defence.least_energy import ENERGY_SCORES
from pyro_vae_defence.models import program
from pyro_vae_defence.models.perturbation import UnknownRadius
from pyro_vae_defence.ops.balls import L1, L2, Linf

BALLS = {Linf: 0.1, L2: 0.3, L1: 1.0}


def images(num_images):
    """Images near the middle of the range, so that no ball of these tests reaches its edges."""
    return (0.5 + 0.07 * torch.randn(num_images, 1, 4, 4)).clamp(0.25, 0.75)


def detector(vae, name, ball, num_images=30, false_alarm=0.1, **options):
    defence = PosteriorModeDefence(vae, perturbation=ball, **options)
    return Detector(defence, name).fit(images(num_images), false_alarm)


def quadratic(vae, x):
    """min_z U_0 = c + r'Pr / 2 with P the inverse covariance of p(x): c, P and r."""
    weight, bias = vae.weight, vae.bias
    precision = torch.linalg.inv(weight @ weight.T + vae.noise**2 * torch.eye(16))
    constant = 16 * math.log(vae.noise) + (16 + vae.z_dim) / 2 * math.log(2 * math.pi)
    return constant, precision, x.flatten(1) - bias


def least_energy(vae, x):
    constant, precision, rest = quadratic(vae, x)
    return constant + (rest @ precision * rest).sum(1) / 2


def energies_of(vae, x, ball, latents):
    """Energies (anchors, N), one anchor at a time."""
    energy = program.potential(vae, x, ball)
    return torch.stack([energy({"z": z.expand(len(x), -1)}) for z in latents])


def ascent(score_of_z, vae, ball):
    """Gradient ascent on the least energy: the gradient at the minimiser is that of the minimum."""

    def prepare(_):
        return lambda x: program.potential(vae, x, ball)({"z": score_of_z(x.detach())})

    return prepare


def exact_mode(vae):
    return lambda x: vae.exact(x)[0]


def attacked(vae, x, ball, anchors):
    """Attacks within the ball: corners, and ascents on least energies with and without a ball."""
    yield ball.inside(x, x + ball.project(torch.randn_like(x).sign() * 0.9))

    def nearest(x):
        return anchors[energies_of(vae, x, ball, anchors).argmin(0)]

    for mode in (exact_mode(vae), nearest):
        for assumed in (None, ball):
            objective = ascent(mode, vae, assumed)
            yield attacks.PGD(objective, ball, num_steps=3, step_size=ball.radius)(x).best()


@pytest.fixture
def _few_steps(monkeypatch):
    """Energies in three dimensions need no more."""
    monkeypatch.setattr("pyro_vae_defence.defence.least_energy._NUM_STEPS", 20)


class TestClosedForm:
    def test_clean_images_have_the_least_energy(self, linear_vae):
        x = images(30)
        found = Detector(PosteriorModeDefence(linear_vae, perturbation=Linf(0.1)), "least_energy")
        expected = least_energy(linear_vae, x).sort().values
        assert torch.allclose(found.fit(x, 0.1).clean_scores, expected)
        assert found.threshold == pytest.approx(float(expected[27]))

    def test_images_have_the_least_energy_within_the_ball(self, linear_vae):
        radius, x = 0.2, images(20)
        found = detector(linear_vae, "least_energy", L2(radius)).score(x)
        # min over |e| <= radius of (r - e)'P(r - e) / 2: e = P r / (P + m), |e| = radius.
        constant, precision, rest = quadratic(linear_vae, x)
        values, vectors = torch.linalg.eigh(precision)
        rest = rest @ vectors
        low, high = torch.zeros(20, 1), torch.full((20, 1), 1e4)
        for _ in range(100):
            m = (low + high) / 2
            outside = (rest * values / (values + m)).norm(dim=1, keepdim=True) > radius
            low, high = torch.where(outside, m, low), torch.where(outside, high, m)
        left = rest * high / (values + high)
        assert torch.allclose(found, constant + (left**2 * values).sum(1) / 2)

    def test_anchors_are_modes_and_none_is_of_the_image_itself(self, linear_vae):
        x = images(12)
        ball = Linf(0.1)
        found = Detector(PosteriorModeDefence(linear_vae, perturbation=ball), "anchor_energy")
        found.fit(x, 0.1)
        modes = linear_vae.exact(x)[0]
        clean = energies_of(linear_vae, x, None, modes)
        clean[range(12), range(12)] = math.inf
        assert torch.allclose(found.clean_scores, clean.amin(0).sort().values)
        new = images(5)
        expected = energies_of(linear_vae, new, ball, modes).amin(0)
        assert torch.allclose(found.score(new), expected)
        assert torch.allclose(found.score(x), energies_of(linear_vae, x, ball, modes).amin(0))


@pytest.mark.usefixtures("_few_steps")
class TestBound:
    @pytest.mark.parametrize("kind", BALLS)
    def test_no_attack_raises_a_score_above_the_clean_one(self, linear_vae, kind):
        ball = kind(BALLS[kind])
        x, anchors = images(16), linear_vae.exact(images(6))[0]
        detectors = {}
        for name in ENERGY_SCORES:
            detectors[name] = detector(linear_vae, name, ball)
            detectors[name]._anchors = {"z": anchors}
        clean = {
            "anchor_energy": energies_of(linear_vae, x, None, anchors).amin(0),
            "least_energy": least_energy(linear_vae, x),
        }
        raised = 0
        for x_adv in attacked(linear_vae, x, ball, anchors):
            assert (ball.norm(x_adv - x) <= ball.radius).all()
            for name, found in detectors.items():
                assert (found.score(x_adv) <= clean[name] + 1e-9).all()
            raised += int((least_energy(linear_vae, x_adv) > clean["least_energy"] + 0.1).sum())
        # Without the ball they do raise it, or the test would say nothing.
        assert raised > 32

    @pytest.mark.parametrize("name", ENERGY_SCORES)
    def test_false_alarms_keep_the_promise(self, linear_vae, name):
        """At most one in ten images raises the alarm, also under the attack that raises scores most
        where no ball is assumed, which many more do there."""
        ball = Linf(0.05)
        clean, under_attack, plain = [], [], []
        for _ in range(6):
            found = detector(linear_vae, name, ball, num_images=19)
            x = images(100)
            objective = ascent(exact_mode(linear_vae), linear_vae, None)
            x_adv = attacks.PGD(objective, ball, num_steps=2, step_size=ball.radius)(x).best()
            clean.append(found.predict(x).double().mean())
            under_attack.append(found.predict(x_adv).double().mean())
            plain.append((least_energy(linear_vae, x_adv) > found.threshold).double().mean())
        for rates in (clean, under_attack):
            rates = torch.stack(rates)
            # 5 standard errors of the mean over calibrations: 2e-3 (t, 5 degrees) if it were tight.
            assert rates.mean() < 0.1 + 5 * rates.std() / 6**0.5
        if name == "least_energy":
            assert torch.stack(plain).mean() > 0.3

    def test_calibration_images_do_not_explain_themselves(self, linear_vae):
        """The rate on new clean images with no ball to speak of: near the promise, from below."""
        rates = []
        for _ in range(10):
            found = detector(linear_vae, "anchor_energy", Linf(1e-6), num_images=19)
            rates.append(found.predict(images(100)).double().mean())
        rates = torch.stack(rates)
        error = rates.std() / 10**0.5
        assert 0.02 < rates.mean() < 0.1 + 5 * error

    def test_what_is_far_from_the_data_is_rejected(self, linear_vae):
        for name in ENERGY_SCORES:
            found = detector(linear_vae, name, Linf(0.1))
            assert found.predict(torch.rand(40, 1, 4, 4).round()).double().mean() > 0.5
            assert found.predict(images(40)).double().mean() < 0.3

    def test_anchors_rescue_a_search_that_an_attack_has_sent_astray(self, linear_vae):
        class Broken:
            model = linear_vae.model

            def guide(self, x):
                # Nothing to start from where the first pixel is white.
                loc = linear_vae.exact(x)[0]
                loc = torch.where(x[:, 0, 0, :1] == 1, 1e200, loc)
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

        x = images(6)
        x[:3, 0, 0, 0] = 1
        broken = detector(Broken(), "least_energy", Linf(0.1))
        torch.manual_seed(1)
        assert broken.score(x).isfinite().all()
        sound = detector(linear_vae, "least_energy", Linf(0.1))
        assert torch.allclose(broken.score(x), sound.score(x))


@pytest.mark.usefixtures("_few_steps")
class TestPrograms:
    @pytest.mark.parametrize("name", ENERGY_SCORES)
    def test_scores_do_not_depend_on_micro_batches(self, linear_vae, name):
        calibration, x = images(10), images(7)
        one, other = (
            Detector(
                PosteriorModeDefence(linear_vae, perturbation=Linf(0.1), batch_size=size), name
            ).fit(calibration, 0.1)
            for size in (3, 4096)
        )
        assert torch.allclose(one.clean_scores, other.clean_scores)
        assert torch.allclose(one.score(x), other.score(x))

    @pytest.mark.parametrize("name", ENERGY_SCORES)
    @pytest.mark.usefixtures("float64")
    def test_conditions_follow_their_images(self, name):
        class Shifted:
            """p(x | z, y) about z + y, a positive latent z, and classes c that are summed out."""

            def model(self, x, y):
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
                    c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                    mean = (z.mean(-1) / 4 + y / 4 + c / 8)[..., None, None, None]
                    scale = torch.full((1, 2, 2), 0.2)
                    pyro.sample("x", dist.Normal(mean.expand(*mean.shape[:-3], 1, 2, 2), scale)
                                .to_event(3), obs=x)  # fmt: skip

            def guide(self, x, y):
                with pyro.plate("data", len(x)):
                    loc = x.flatten(1)[:, :2] - y[:, None] / 4
                    pyro.sample("z", dist.LogNormal(loc, 0.1).to_event(1))

        ball = Linf(0.05)
        clean, y = torch.rand(12, 1, 2, 2), torch.rand(12)
        defence = PosteriorModeDefence(Shifted(), perturbation=ball, batch_size=5)
        found = Detector(defence, name).fit((clean, y), 0.1)
        x, labels = torch.rand(7, 1, 2, 2), torch.rand(7)
        together = found.score((x, labels))
        assert together.isfinite().all()
        alone = [found.score((x[n : n + 1], labels[n : n + 1])) for n in (0, 5, 6)]
        assert torch.allclose(together[[0, 5, 6]], torch.cat(alone))
        assert not torch.allclose(together, found.score((x, labels.flip(0))))

    def test_the_defence_is_not_run(self, linear_vae):
        # Deterministic, whatever its seed; a chain's length does not matter.
        x, calibration = images(4), images(10)
        defences = (
            MCMCDefence(linear_vae, num_samples=1, perturbation=Linf(0.1)),
            PosteriorModeDefence(linear_vae, num_steps=0, perturbation=Linf(0.1)),
        )
        one, other = (Detector(d, "least_energy").fit(calibration, 0.1) for d in defences)
        assert torch.equal(one.score(x), other.score(x))


@pytest.mark.usefixtures("_few_steps")
class TestReport:
    @pytest.mark.parametrize("name", ENERGY_SCORES)
    def test_states_what_holds_and_what_it_assumes(self, linear_vae, name):
        found = detector(linear_vae, name, Linf(0.1))
        x = images(20)
        noise = attacks.random_noise(x, Linf(0.1))
        noise[:2] = x[:2] + 0.15
        report = found.report(x, noise, Linf(0.2))
        assert report.guarantee.startswith(
            "No attack within Linf(radius=0.1) raises the alarm for more than 10.0% of clean images"
        )
        assert "18 of 20 attacked images lie in this ball" in report.guarantee
        exact = "It is for an exact minimum" in report.guarantee
        assert exact == (name == "least_energy")
        assert name in report.auroc
        assert "No attack within Linf(radius=0.1)" in str(report)
        assert report.to_dict()["guarantee"] == report.guarantee
        kinds = {"clean": x, "attacked": noise}
        for kind, values in kinds.items():
            assert report.alarms[kind].estimate == found.predict(values).double().mean()

    def test_mistakes(self, linear_vae):
        unknown = UnknownRadius(Linf, (0.0, 0.1), (0.0, 1.0))
        without = (
            NoDefence(linear_vae),
            EncoderDefence(linear_vae),
            PosteriorModeDefence(linear_vae),
            PosteriorModeDefence(linear_vae, perturbation=unknown),
        )
        for defence in without:
            with pytest.raises(ValueError, match="'least_energy' needs a defence that assumes a"):
                Detector(defence, "least_energy")
        found = Detector(PosteriorModeDefence(linear_vae, perturbation=Linf(0.1)), "anchor_energy")
        with pytest.raises(ValueError, match=r"call fit\(clean_images\) first"):
            found.score(images(3))
        with pytest.raises(ValueError, match="anchor_energy needs two clean images or more, got 1"):
            found.fit(images(1), 0.5)
        with pytest.raises(ValueError, match="score_name must be one of .*anchor_energy, least_"):
            Detector(found.defence, "energy")
