"""Detection: scores by hand, the promised rate of false alarms, an alarm for every defence."""

from __future__ import annotations

import functools
import json
import math
import pickle
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import HierarchicalVAE, LinearGaussianVAE, TutorialVAE

from pyro_vae_defence import metrics
from pyro_vae_defence.attacks import random_noise
from pyro_vae_defence.defence import (
    Detector,
    EncoderDefence,
    MCMCDefence,
    NoDefence,
    PosteriorModeDefence,
    anomaly_scores,
    clip_dark_pixels,
    detection_scores,
    median_filter,
)
from pyro_vae_defence.defence.detection import score_names
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import ConditionalVAE, ConvVAE, program
from pyro_vae_defence.ops.balls import Linf

KERNEL = functools.partial(BatchedHMC, num_steps=2)
CLIP = functools.partial(clip_dark_pixels, delta=0.3)
AWARE = Linf(0.1)

START = {"start_energy", "start_error"}
MOVED = START | {"energy_drop", "end_energy", "end_error", "distance"}
DEFENCES = {
    "none": (NoDefence, START),
    "encoder": (lambda vae: EncoderDefence(vae, 3), START | {"disagreement"}),
    "one draw behind a filter": (lambda vae: EncoderDefence(vae, 1, CLIP), MOVED),
    "filter": (lambda vae: EncoderDefence(vae, 3, median_filter), MOVED | {"disagreement"}),
    "mode": (lambda vae: PosteriorModeDefence(vae, num_steps=2), MOVED),
    "aware mode": (
        lambda vae: PosteriorModeDefence(vae, num_steps=2, perturbation=AWARE),
        MOVED | {"perturbation_gain"},
    ),
    "chain": (lambda vae: MCMCDefence(vae, KERNEL, 2, 1), MOVED),
    "aware chains": (
        lambda vae: MCMCDefence(vae, KERNEL, 2, 1, 2, perturbation=AWARE),
        MOVED | {"perturbation_gain", "disagreement"},
    ),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def energies(potential, draws):
    return torch.stack([potential({"z": z}) for z in draws.flatten(0, -3)])


def length(z, variance):
    return (z**2 / variance).mean(-1).sqrt()


def errors(vae, draws, x):
    decoded = [program.decode(vae, {"z": z}, (1, 4, 4)) for z in draws.flatten(0, -3)]
    return torch.stack([(d.clamp(0, 1) - x).square().mean((1, 2, 3)) for d in decoded])


class TestScores:
    @pytest.mark.parametrize("name", ["aware chains", "aware mode", "filter"])
    def test_are_what_the_formulas_say(self, linear_vae, name):
        # Dimensions are told apart by their units.
        variance = torch.tensor([1.0, 4.0, 0.25])
        defence = DEFENCES[name][0](linear_vae)
        result = defence(torch.rand(4, 1, 4, 4))
        found = detection_scores(defence, result, {"z": variance})
        assert all(value.shape == (4,) for value in found.values())
        initial, samples = result.initial["z"], result.samples["z"]
        assumed = getattr(defence, "perturbation", None)
        aware = program.potential(linear_vae, result.x, assumed)
        plain = program.potential(linear_vae, result.x)
        end = samples[:, -1]
        gain = energies(plain, end) - energies(aware, end)
        means = samples.mean(1)
        expected = {
            "energy_drop": energies(aware, initial).mean(0) - energies(aware, samples).mean(0),
            "perturbation_gain": gain.mean(0),
            "start_energy": energies(plain, initial).mean(0),
            "start_error": errors(linear_vae, initial, result.x).mean(0),
            "end_energy": energies(plain, end).mean(0),
            "end_error": errors(linear_vae, end, result.x).mean(0),
            "distance": length(means - initial, variance).mean(0),
        }
        parts = samples[0] if name == "filter" else means
        spread = length(parts - parts.mean(0), variance) ** 2
        expected["disagreement"] = spread.mean(0).sqrt()
        assert found.keys() == expected.keys() & DEFENCES[name][1]
        for score, value in found.items():
            assert torch.allclose(value, expected[score]), score

    @pytest.mark.parametrize("name", DEFENCES)
    def test_every_defence_has_those_that_make_sense(self, tutorial_vae, name):
        make, expected = DEFENCES[name]
        defence = make(tutorial_vae)
        found = detection_scores(defence, defence(torch.rand(3, 1, 28, 28)))
        assert found.keys() == expected
        assert all(value.isfinite().all() for value in found.values())

    def test_decode_a_part_of_the_images_at_a_time(self, float64, linear_vae, monkeypatch):
        from pyro_vae_defence.defence import detection as module

        defence, sizes = DEFENCES["aware chains"][0](linear_vae), []
        result = defence(torch.rand(5, 1, 4, 4))
        expected = detection_scores(defence, result)

        def counted(self, latents, x):
            sizes.append(len(x))
            return decode(self, latents, x)

        decode = module.Decoder.__call__
        monkeypatch.setattr(module.Decoder, "__call__", counted)
        monkeypatch.setattr(module, "ROWS", 5)  # two images, each with two chains
        found = detection_scores(defence, result)
        assert sizes == [4, 4, 4, 4, 2, 2]
        torch.testing.assert_close(found, expected)

    def test_a_filter_is_compared_with_the_image_before_it(self, linear_vae):
        x = torch.rand(3, 1, 4, 4)
        plain = EncoderDefence(linear_vae, 2)(x, seeded())
        clipped = EncoderDefence(linear_vae, 2, CLIP)(x, seeded())
        assert torch.equal(clipped.initial["z"], plain.initial["z"])
        assert not torch.equal(clipped.samples["z"][:, 0], plain.initial["z"])
        # The same noise before and after: a filter that changes nothing moves nothing.
        same = EncoderDefence(linear_vae, 1, lambda x: x.clone())
        found = detection_scores(same, same(x))
        assert (found["distance"] == 0).all()
        assert (found["energy_drop"] == 0).all()

    def test_distances_are_on_the_unconstrained_scale(self, float64):
        class Positive:
            def model(self, x):
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
                    mean = z.mean(-1)[:, None, None, None].expand_as(x)
                    pyro.sample("x", dist.Normal(mean, 1.0).to_event(3), obs=x)

            def guide(self, x):
                with pyro.plate("data", len(x)):
                    loc = x.flatten(1)[:, :2]
                    pyro.sample("z", dist.LogNormal(loc, 0.1).to_event(1))

        defence = MCMCDefence(Positive(), KERNEL, 3, 1, 2)
        result = defence(torch.rand(4, 1, 2, 2))
        found = detection_scores(defence, result)["distance"]
        moved = result.samples["z"].log().mean(1) - result.initial["z"].log()
        assert torch.allclose(found, length(moved, torch.tensor(1.0)).mean(0))

    def test_distances_of_a_site_without_event_dimensions(self, float64):
        class Scalar:
            def model(self, x):
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
                    mean = z[:, None, None, None].expand_as(x)
                    pyro.sample("x", dist.Normal(mean, 1.0).to_event(3), obs=x)

            def guide(self, x):
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(x.flatten(1).mean(1), 0.1))

        defence = MCMCDefence(Scalar(), KERNEL, 3, 1, 2)
        result = defence(torch.rand(4, 1, 2, 2))
        moved = result.samples["z"].mean(1) - result.initial["z"]
        expected = moved.abs().mean(0)
        torch.testing.assert_close(detection_scores(defence, result)["distance"], expected)

    def test_several_sites_and_a_wrong_variance(self):
        vae = HierarchicalVAE()
        defence = MCMCDefence(vae, KERNEL, 2, 1, 2)
        result = defence(torch.rand(2, 1, 4, 4))
        assert detection_scores(defence, result)["distance"].shape == (2,)
        with pytest.raises(ValueError, match=r"variance must have the latents' sites \["):
            detection_scores(defence, result, {"other": torch.ones(5)})

    def test_an_image_outside_the_model_is_suspicious(self, linear_vae):
        clean = (0.5 + 0.05 * torch.randn(60, 1, 4, 4)).clamp(0, 1)
        defence = MCMCDefence(linear_vae, KERNEL, 2, 1)
        scores = [
            detection_scores(defence, defence(x))["start_energy"]
            for x in (clean, random_noise(clean, Linf(0.4)))
        ]
        # A blind score has 1/2 with standard error 0.053 (60 of each): 5 of them, error rate 3e-7.
        assert metrics.auroc(*scores) > 0.77


class FirstPixel(Detector):
    """A detector whose score is the first pixel; 1 stands for what is no number."""

    def _scores(self, x, generator):
        pixel = (x[0] if isinstance(x, tuple) else x)[:, 0, 0, 0]
        return {"start_error": torch.where(pixel == 1, math.nan, pixel), "other": -pixel}


def images_of(values):
    return torch.as_tensor(values)[:, None, None, None].expand(-1, 1, 2, 2)


@pytest.fixture
def first_pixel(linear_vae):
    return FirstPixel(NoDefence(linear_vae))


class TestThreshold:
    @pytest.mark.parametrize(
        ("num_images", "false_alarm", "rank"),
        [(19, 0.05, 19), (20, 0.05, 20), (39, 0.05, 38), (99, 0.29, 71), (1, 0.5, 1), (9, 0.1, 9)],
    )
    def test_is_an_order_statistic(self, first_pixel, num_images, false_alarm, rank):
        values = torch.arange(num_images) / 200
        detector = first_pixel.fit(images_of(values[torch.randperm(num_images)]), false_alarm)
        assert detector is first_pixel
        assert detector.threshold == values[rank - 1]
        assert rank == math.ceil((num_images + 1) * (1 - false_alarm) - 1e-9)
        new = images_of([values[rank - 1], values[rank - 1] + 1e-3])
        assert detector.predict(new).tolist() == [False, True]

    @pytest.mark.parametrize(("num_images", "false_alarm", "needed"), [(18, 0.05, 19), (8, 0.1, 9)])
    def test_too_few_images(self, first_pixel, num_images, false_alarm, needed):
        few = images_of(torch.arange(num_images) / 200)
        with pytest.raises(
            ValueError, match=f"{num_images} clean .* pass at least {needed} images"
        ):
            first_pixel.fit(few, false_alarm)
        first_pixel.fit(images_of(torch.arange(needed) / 200), false_alarm)

    @pytest.mark.parametrize("ties", [False, True])
    def test_false_alarms_keep_the_promise(self, first_pixel, ties):
        rates = []
        for _ in range(200):
            values = torch.rand(239) * 0.9
            values = (values * 10).round() / 11 if ties else values
            first_pixel.fit(images_of(values[:39]), 0.1)
            rates.append(first_pixel.predict(images_of(values[39:])).double().mean())
        rates = torch.stack(rates)
        error = rates.std() / 200**0.5
        assert rates.mean() < 0.1 + 5 * error
        if not ties:  # 4 of 40
            assert abs(rates.mean() - 0.1) < 5 * error

    def test_p_values_agree_with_the_alarm(self, first_pixel):
        values = (torch.rand(50) * 10).round() / 20
        first_pixel.fit(images_of(values), 0.1)
        new = torch.linspace(0, 0.99, 100)
        found = first_pixel.p_value(images_of(new))
        by_hand = torch.stack([(1 + (values >= v).sum()) / 51 for v in new])
        assert torch.allclose(found, by_hand.double())
        assert torch.equal(first_pixel.predict(images_of(new)), found <= 0.1)

    def test_an_image_without_a_score_raises_the_alarm(self, first_pixel):
        first_pixel.fit(images_of(torch.arange(19) / 20))
        new = images_of([0.0, 1.0])
        assert first_pixel.score(new).tolist() == [0.0, math.inf]
        assert first_pixel.predict(new).tolist() == [False, True]
        assert first_pixel.p_value(new).tolist() == [1.0, 0.05]
        first_pixel._scores = lambda *args: {"start_error": torch.tensor([-math.inf, 0.0])}
        assert first_pixel.predict(new).tolist() == [True, False]

    def test_clean_images_without_a_score(self, first_pixel):
        values = torch.arange(39) / 40
        values[:1] = 1
        assert first_pixel.fit(images_of(values)).threshold == values[-1]
        values[:2] = 1
        with pytest.raises(ValueError, match="2 of 39 clean images have a start_error that is not"):
            first_pixel.fit(images_of(values))


class TestDetector:
    @pytest.mark.parametrize("name", DEFENCES)
    def test_works_with_every_defence(self, linear_vae, name):
        defence = DEFENCES[name][0](linear_vae)
        expected = "energy_drop" if "aware" in name else "start_error"
        clean = torch.rand(20, 1, 4, 4)
        detector = Detector(defence).fit(clean, 0.1, seeded(1))
        assert detector.score_name == expected
        score = detector.score(clean, seeded(1))
        assert torch.equal(score, detection_scores(defence, defence(clean, seeded(1)))[expected])
        assert detector.predict(clean, seeded(1)).sum() == 1  # 2 of 21 are allowed, a new one too

    def test_the_generator_governs_kernels_of_others_too(self, linear_vae):
        """Their noise comes from torch's global seed."""
        kernel = functools.partial(pyro.infer.HMC, num_steps=2, step_size=0.1)
        defence, x = MCMCDefence(linear_vae, kernel, 2, 1), torch.rand(2, 1, 4, 4)
        detector = Detector(defence, "end_energy")
        found = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            found.append(detector.score(x, seeded()))
        assert torch.equal(*found)
        expected = detection_scores(defence, defence(x, seeded()))["end_energy"]
        assert torch.equal(found[0], expected)

    def test_a_threshold_is_of_one_score(self, linear_vae):
        detector = Detector(NoDefence(linear_vae)).fit(torch.rand(20, 1, 4, 4), 0.1, seeded())
        detector.score_name = "start_energy"
        with pytest.raises(ValueError, match="threshold is of score_name='start_error', which is"):
            detector.predict(torch.rand(2, 1, 4, 4))

    @pytest.mark.parametrize("name", ["defence", "variance"])
    def test_a_threshold_is_of_one_defence(self, linear_vae, name):
        x = torch.rand(20, 1, 4, 4)
        detector = Detector(NoDefence(linear_vae)).fit(x, 0.1, seeded())
        found = detector.predict(x, seeded())
        assert torch.equal(pickle.loads(pickle.dumps(detector)).predict(x, seeded()), found)
        other = {"defence": EncoderDefence(linear_vae, 5), "variance": {"z": torch.full((3,), 2.0)}}
        setattr(detector, name, other[name])
        with pytest.raises(ValueError, match=f"threshold is of another {name}"):
            detector.predict(x)

    def test_a_threshold_is_of_one_defence_as_it_was(self):
        """Whose settings, and weights, may have been changed in place."""
        x, vae = torch.rand(20, 1, 28, 28), TutorialVAE().eval()
        defence = PosteriorModeDefence(vae, num_steps=2, perturbation=Linf(0.1))
        detector = Detector(defence, variance={"latent": torch.ones(5)})

        def changes(name, change, back):
            found = detector.fit(x, 0.1, seeded()).predict(x, seeded())
            change()
            with pytest.raises(ValueError, match=f"threshold is of another {name} than"):
                detector.predict(x)
            back()
            assert torch.equal(detector.predict(x, seeded()), found)

        def let(name, value):
            return lambda: setattr(defence, name, value)

        changes(
            r"defence\.perturbation", let("perturbation", Linf(0.2)), let("perturbation", Linf(0.1))
        )
        changes(r"defence\.num_steps", let("num_steps", 3), let("num_steps", 2))
        weight, variance = vae.decoder[0].weight.data, detector.variance["latent"]
        changes("weights of the VAE", lambda: weight.mul_(2), lambda: weight.div_(2))
        changes("variance", lambda: variance.mul_(2), lambda: variance.div_(2))
        defence.batch_size = 7  # changes nothing
        detector.predict(x)
        detector.fit(x, 0.1, seeded()).predict(x)

    @pytest.mark.parametrize(
        ("variance", "message"),
        [
            ({"z": torch.tensor([1.0, -1.0])}, r"variance\['z'\] must be positive and finite"),
            ({"z": torch.tensor([1.0, math.nan])}, r"variance\['z'\] must be positive and finite"),
            ({"z": 1.0}, "variance must be a dict from site to tensor"),
            ([1.0], "variance must be a dict from site to tensor, got list"),
        ],
    )
    def test_what_is_no_variance(self, linear_vae, variance, message):
        with pytest.raises(ValueError, match=message):
            Detector(NoDefence(linear_vae), variance=variance)

    def test_a_variance_of_another_shape(self, linear_vae):
        detector = Detector(MCMCDefence(linear_vae, KERNEL, 2, 1), variance={"z": torch.ones(7)})
        with pytest.raises(ValueError, match=r"variance\['z'\] must have one image's shape \("):
            detector.score(torch.rand(2, 1, 4, 4))

    def test_scores_do_not_depend_on_micro_batches(self, linear_vae):
        x = torch.rand(7, 1, 4, 4)
        found = [
            Detector(MCMCDefence(linear_vae, KERNEL, 2, 1, 2, batch_size=size)).score(x, seeded())
            for size in (4, 100)
        ]
        assert torch.allclose(*found)

    def test_a_defence_of_somebody_else(self, linear_vae):
        class Theirs:
            vae = linear_vae

            def __call__(self, x, generator=None):
                return MCMCDefence(linear_vae, KERNEL, 2, 1)(x, generator)

        x = torch.rand(20, 1, 4, 4)
        detector = Detector(Theirs(), "distance").fit(x, 0.1)
        assert detector.predict(x).shape == (20,)

    def test_the_unit_of_distance_is_the_models(self, linear_vae):
        defence = EncoderDefence(linear_vae, 3)
        x = torch.rand(4, 1, 4, 4)
        plain = Detector(defence, "disagreement").score(x, seeded())
        linear_vae.mean_posterior_variance = {"z": torch.full((3,), 4.0)}
        found = Detector(defence, "disagreement").score(x, seeded())
        assert torch.allclose(found, plain / 2)

    @pytest.mark.parametrize("make", [np.float32, torch.tensor])
    def test_any_scalar_is_a_rate_that_reports_can_store(self, linear_vae, make):
        x, new = torch.rand(2, 20, 1, 4, 4)
        detector = Detector(NoDefence(linear_vae)).fit(x, make(0.25))
        assert type(detector.false_alarm) is float
        found = detector.report(new, (new + 0.1).clamp(0, 1), Linf(0.2))
        assert json.loads(found.to_json())["false_alarm"] == 0.25

    def test_mistakes(self, linear_vae):
        x = torch.rand(20, 1, 4, 4)
        detector = Detector(NoDefence(linear_vae))
        for call in (detector.predict, detector.p_value):
            with pytest.raises(ValueError, match=r"no threshold yet: call fit\(clean_images\)"):
                call(x)
        with pytest.raises(ValueError, match="no threshold yet"):
            detector.report(x, x, AWARE)
        with pytest.raises(ValueError, match="score_name must be one of start_energy, start_error"):
            Detector(NoDefence(linear_vae), "energy_drop")
        with pytest.raises(ValueError, match=r"false_alarm must lie in \(0, 1\), got 5; use 0.05"):
            detector.fit(x, 5)
        with pytest.raises(ValueError, match="defence must be callable, .* got 3"):
            Detector(3)
        with pytest.raises(ValueError, match="defence must know its VAE"):
            Detector(lambda x: x)
        detector.fit(x)
        with pytest.raises(ValueError, match=r"same two or more images .* \(20, 1, 4, 4\) and \(3"):
            detector.report(x, x[:3], AWARE)
        with pytest.raises(ValueError, match="ball must be"):
            detector.report(x, x, 0.1)
        with pytest.raises(ValueError, match="level=95 must lie between"):
            detector.report(x, x, AWARE, level=95)
        new = torch.rand(20, 1, 4, 4)
        with pytest.raises(ValueError, match="x_adv equals x: pass the images after the attack"):
            detector.report(new, new, AWARE)
        with pytest.raises(ValueError, match="x_adv leaves the ball around x for 1 of 20 images, "):
            detector.report(new, torch.cat([1 - new[:1].round(), new[1:]]), Linf(0.4))
        far = torch.zeros_like(new)
        far[0, 0, 0, 0] = AWARE.radius + 0.6 / 255
        with pytest.raises(ValueError, match="x_adv leaves the ball around x for 1 of 20 images, "):
            detector.report(new / 2, new / 2 + far, AWARE)
        for adv in (random_noise(x, AWARE), random_noise(x, AWARE)):
            half = torch.cat([x[:7], new[7:]]), torch.cat([adv[:7], new[7:]])
            with pytest.raises(ValueError, match="7 of 20 images of x are among those that the"):
                detector.report(*half, AWARE)
        # Images of 8 bits are as near to the ball as rounding leaves them.
        detector.report(new, (random_noise(new, AWARE) * 255).round() / 255, AWARE)

    def test_mistakes_are_named_by_what_was_given(self, linear_vae):
        x, labels = torch.rand(20, 1, 4, 4), torch.arange(20)
        detector = Detector(NoDefence(linear_vae))
        for call in (
            detector.fit,
            detector.score,
            functools.partial(anomaly_scores, detector.defence),
        ):
            with pytest.raises(ValueError, match="vae takes fewer arguments than the 1 conditions"):
                call((x, labels))
        for call in (detector.score, functools.partial(anomaly_scores, detector.defence)):
            with pytest.raises(ValueError, match=r"^x must "):
                call(2 * x)
        for call in (Detector, lambda vae: anomaly_scores(vae, x)):
            for vae in (ConvVAE(), LinearGaussianVAE()):  # a module can be called
                with pytest.raises(ValueError, match=r"defence is a VAE, a \w+; pass NoDefence"):
                    call(vae)


class TestReport:
    def test_the_page_has_all_numbers_and_loads_nothing(self, report, tmp_path):
        page = report.save_html(tmp_path / "report.html").read_text()
        for rate in (*report.alarms.values(), *report.auroc["other"].values()):
            assert f"{rate.estimate:.3f} [{rate.low:.3f}, {rate.high:.3f}]" in page
        assert "0.473684" in page  # the threshold
        assert "http" not in page
        assert "src=" not in page
        assert repr(report).startswith("DetectionReport(start_error, alarms: clean 0.250 [")

    @pytest.mark.parametrize("name", ["none", "aware chains"])
    def test_has_every_score_of_the_defence(self, linear_vae, name):
        clean = torch.rand(20, 1, 4, 4)
        detector = Detector(DEFENCES[name][0](linear_vae)).fit(clean, 0.1)
        clean = torch.rand(20, 1, 4, 4)
        report = detector.report(clean, random_noise(clean, AWARE), AWARE)
        assert report.auroc.keys() == DEFENCES[name][1]
        assert tuple(report.auroc) == score_names(detector.defence)
        assert f"* {detector.score_name}" in str(report)

    @pytest.fixture
    def report(self, first_pixel):
        first_pixel.fit(images_of(torch.arange(19) / 38))  # the threshold is 18/38
        clean, adv = images_of([0.2, 0.4, 0.6, 0.3]), images_of([0.4, 0.8, 1.0, 0.9])
        return first_pixel.report(clean, adv, Linf(0.6), generator=seeded())

    def test_rates_and_areas_by_hand(self, report):
        assert report.alarms["clean"].estimate == 0.25
        assert report.alarms["attacked"].estimate == 0.75
        assert (report.score_name, report.false_alarm, report.threshold) == (
            "start_error",
            0.05,
            pytest.approx(18 / 38),
        )
        # Of 16 pairs, 0.4 beats 0.2 and 0.3 and ties with 0.4; the others beat all.
        found = report.auroc["start_error"]["against_clean"]
        assert found.estimate == (12 + 2 + 0.5) / 16
        assert found.low <= found.estimate <= found.high
        assert report.auroc["other"]["against_clean"].estimate == pytest.approx(1 - 14.5 / 16)

    def test_noise_is_as_large_as_the_attack(self, report):
        clean = images_of([0.2, 0.4, 0.6, 0.3])
        noise = random_noise(clean, Linf(0.6), seeded())[:, 0, 0, 0]
        assert report.alarms["noise"].estimate == (noise > 18 / 38).double().mean()
        adv = torch.tensor([0.4, 0.8, math.inf, 0.9])
        found = report.auroc["start_error"]["against_noise"].estimate
        assert found == (adv[:, None] > noise).double().mean()

    def test_wrong_classes_that_are_accepted_are_errors(self, first_pixel, tmp_path):
        first_pixel.fit(images_of(torch.arange(19) / 38))  # the threshold is 18/38
        clean, adv = images_of([0.2, 0.4, 0.6, 0.3]), images_of([0.4, 0.8, 1.0, 0.3 + 2**-5])

        def classify(x):
            return (x[:, 0, 0, 0] > 0.35).long()

        def report(classify, x=clean, labels=(0, 0, 1, 0)):
            labels = torch.tensor(labels)
            return first_pixel.report(x, adv, Linf(0.6), labels=labels, classify=classify)

        found = report(classify)
        shares = {
            kind: [share.estimate for share in of.values()] for kind, of in found.outcomes.items()
        }
        # Classes 0, 1, 1, 0 and 1, 1, 1, 0; alarms at the third, and at the second and third.
        assert shares["clean"] == [0.5, 0.25, 0.25]
        assert shares["attacked"] == [0.25, 0.25, 0.5]
        assert sum(shares["noise"]) == 1
        for kind, rate in found.alarms.items():
            assert found.outcomes[kind]["rejected"] == rate
        assert "accepted, right         accepted, wrong         rejected" in str(found)
        assert "attacked  0.250 [" in str(found)
        assert (
            json.loads(found.to_json())["outcomes"]["clean"]["accepted, wrong"]["estimate"] == 0.25
        )
        assert "accepted, wrong" in found.save_html(tmp_path / "report.html").read_text()
        # Conditions go to the classifier with their images.
        given = []
        report(lambda x: given.append(x) or classify(x[0]), (clean, torch.arange(4)))
        assert given[0][1].tolist() == [0, 1, 2, 3] * 3
        plain = first_pixel.report(clean, adv, Linf(0.6))
        assert plain.outcomes is None
        assert "accepted" not in str(plain)

        with pytest.raises(ValueError, match="labels and classify go together: pass both"):
            first_pixel.report(clean, adv, Linf(0.6), labels=torch.arange(4))
        with pytest.raises(ValueError, match="labels and classify go together: pass both"):
            first_pixel.report(clean, adv, Linf(0.6), classify=classify)
        with pytest.raises(ValueError, match="classify must be callable, .* got 3"):
            report(3)
        with pytest.raises(ValueError, match=r"labels has shape \(3,\) .* each of 4 images"):
            report(classify, labels=(0, 1, 1))
        with pytest.raises(ValueError, match=r"labels has shape \(4,\) and dtype torch.float"):
            report(classify, labels=(0.0, 1.0, 1.0, 1.0))
        with pytest.raises(ValueError, match=r"classify returned shape \(12, 4\) .* logits.argmax"):
            report(lambda x: x.flatten(1))

    def test_can_be_printed_and_stored(self, report):
        text = str(report)
        assert "Alarm: start_error above 0.473684, set for at most 5.0% of clean images" in text
        assert "clean     0.250 [" in text
        assert "* start_error" in text
        assert "  other" in text
        stored = json.loads(report.to_json())
        assert stored["alarms"]["attacked"]["estimate"] == 0.75
        assert stored["auroc"].keys() == {"start_error", "other"}
        assert stored["ball"] == "Linf(radius=0.6)"


class TestAnomalies:
    def test_are_what_the_formulas_say(self, linear_vae):
        x = torch.rand(4, 1, 4, 4)
        defence = EncoderDefence(linear_vae, 3, CLIP)
        found = anomaly_scores(defence, x, seeded())
        draws = defence(x, seeded()).samples["z"]
        # About the image that was passed, not the filtered one.
        assert torch.allclose(found["error"], errors(linear_vae, draws, x).mean(0))
        expected = energies(program.potential(linear_vae, x), draws).mean(0)
        assert torch.allclose(found["energy"], expected)

    def test_the_energy_of_a_constrained_latent_is_that_of_its_own_density(self):
        class Positive:
            def model(self, x):
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Gamma(x.new_full((len(x),), 3.0), 2.0))
                    mean = z[:, None, None, None].expand(x.shape)
                    pyro.sample("obs", dist.Normal(mean, 1.0).to_event(3), obs=x)

            def guide(self, x):
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Gamma(x.new_full((len(x),), 3.0), 4.0))

        vae, x = Positive(), torch.rand(3, 1, 4, 4)
        for defence in (EncoderDefence(vae, 3), MCMCDefence(vae, KERNEL, 2, 1)):
            z = defence(x, seeded()).samples["z"].flatten(0, 1)
            likelihood = dist.Normal(z[:, :, None, None, None], 1.0).log_prob(x).sum((2, 3, 4))
            expected = -(likelihood + dist.Gamma(3.0, 2.0).log_prob(z)).mean(0)
            assert torch.allclose(anomaly_scores(defence, x, seeded())["energy"], expected)

    def test_do_not_depend_on_micro_batches(self, linear_vae):
        x = torch.rand(7, 1, 4, 4)
        one, other = (
            anomaly_scores(EncoderDefence(linear_vae, 3, CLIP, batch_size=size), x, seeded())
            for size in (2, 100)
        )
        assert all(torch.allclose(one[name], other[name]) for name in ("error", "energy"))

    def test_follow_what_programs_have_bound_and_take_images_of_numpy(self):
        """Labels in a partial program are of all images, not of a micro-batch."""
        vae = ConditionalVAE((1, 2, 2), 3, 2, 4).eval()
        x, y = torch.rand(5, 1, 2, 2, dtype=torch.float64), torch.eye(3)[[2, 0, 1, 1, 2]]
        bound = types.SimpleNamespace(
            model=functools.partial(vae.model, y=y), guide=functools.partial(vae.guide, y=y)
        )
        found = anomaly_scores(EncoderDefence(bound, 2, batch_size=2), x, seeded())
        expected = anomaly_scores(EncoderDefence(vae, 2), (x.float(), y), seeded())
        torch.testing.assert_close(found, expected)

    def test_draws_are_decoded_one_at_a_time(self, linear_vae, largest_tensor):
        kernel = functools.partial(BatchedHMC, num_steps=1)
        defence, x = MCMCDefence(linear_vae, kernel, 50, 0), torch.rand(4, 1, 4, 4)
        with largest_tensor as largest:
            anomaly_scores(defence, x)
        assert largest.size <= 20 * x.numel()

    def test_an_anomaly_stands_out(self, linear_vae):
        z = torch.randn(60, 3)
        normal = (z @ linear_vae.weight.T + linear_vae.bias).sigmoid().view(-1, 1, 4, 4)
        anomalies = torch.rand(60, 1, 4, 4).round()
        defences = NoDefence(linear_vae), MCMCDefence(linear_vae, KERNEL, 2, 1)
        for defence in defences:
            scores = [anomaly_scores(defence, x)["error"] for x in (normal, anomalies)]
            # As above: a blind score has 1/2 with standard error 0.053.
            assert metrics.auroc(*scores) > 0.77
