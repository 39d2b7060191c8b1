"""A known seed, and attacked images in a file: the numbers come out again."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch
from programs import LinearGaussianVAE
from pyro import infer
from test_robustness import HMC, SMALL, classify, problem, run

from pyro_vae_defence.defence import (
    ConvergenceRule,
    DefendedClassifier,
    MCMCDefence,
    NoDefence,
)
from pyro_vae_defence.defence.classifier import READINGS, read_latents
from pyro_vae_defence.models import program
from pyro_vae_defence.ops.balls import L1, L2, Linf
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.robustness import (
    RobustnessReport,
    WhiteBox,
    evaluate_robustness,
    load_attacked,
    rescore,
    save_attacked,
)
from pyro_vae_defence.robustness.cost import chain_cost
from pyro_vae_defence.robustness.fidelity import expected_difference
from pyro_vae_defence.robustness.scoring import Accuracy, Fresh
from pyro_vae_defence.robustness.suite import ATTACKS, Suite, check_attacked

SEED = 11


def at_seed():
    return torch.Generator().manual_seed(SEED)


class Flipped:
    """A defence of two classes that tosses a coin for each image, and flips its latents or not."""

    def __init__(self, vae):
        self.vae, self.num_chains = vae, 1

    def __call__(self, x, generator=None):
        found = NoDefence(self.vae)(x, generator)
        sign = 2.0 * torch.randint(2, (len(x), 1), generator=generator) - 1.0
        return dataclasses.replace(found, latents={"z": sign * found.latents["z"]})


class TestKnownSeed:
    @pytest.mark.parametrize("options", [{}, {"burn_in": 3}], ids=["chain", "burn_in"])
    def test_the_attacker_sees_the_noise_of_the_defence(self, options):
        vae, x, _ = problem(4)
        defence = MCMCDefence(vae, functools.partial(HMC, **options), 2, 1, num_chains=2)
        truth = defence(x, at_seed())
        box = WhiteBox(vae, defence, x, seed=SEED)
        assert box.num_chains == 2
        # Two restarts of two chains, with streams of any seed.
        images, streams = x.repeat(4, 1, 1, 1), Streams.create(8, 2, seed=5)
        start = box.start(images, streams)
        with torch.no_grad():
            end = box.chain(images, start, streams)["z"].reshape(2, 2, 4, -1)
        for restart in range(2):
            for chain in range(2):
                torch.testing.assert_close(end[chain, restart], truth.samples["z"][chain, -1])
        # The defence itself, copy after copy; other noise without the seed.
        again = box(x.repeat(3, 1, 1, 1))
        for copy in again.latents["z"].split(4):
            torch.testing.assert_close(copy, truth.latents["z"])
        few = box.at(slice(0, 2))
        torch.testing.assert_close(few(x[:2]).latents["z"], truth.latents["z"][:2])
        assert len(few._x) == 2
        other = WhiteBox(vae, defence, x)
        assert not torch.allclose(other(x).latents["z"], truth.latents["z"])
        assert not torch.allclose(other.start(images, streams)["z"], start["z"])

    @pytest.mark.parametrize(
        ("num_chains", "ending"),
        [(2, {"max_gradients": 24}), (4, {"until_converged": ConvergenceRule(2.0, 9.0, 8)})],
        ids=["max_gradients", "until_converged"],
    )
    def test_chains_that_end_early_do_so_for_the_attacker(self, num_chains, ending):
        vae, x, _ = problem(4)
        defence = MCMCDefence(vae, HMC, 64, 4, num_chains, **ending)
        truth = defence(x, at_seed())
        whole = chain_cost(MCMCDefence(vae, HMC, 64, 4, num_chains)).whole
        assert (truth.num_gradients < whole / 2).all()
        images = x.repeat(num_chains, 1, 1, 1)
        known, fresh = WhiteBox(vae, defence, x, seed=SEED), WhiteBox(vae, defence, x)
        streams = Streams.create(4, num_chains, seed=5)
        start = known.start(images, streams)
        for context in (torch.no_grad, torch.enable_grad):  # as values, and to be differentiated
            with context():
                end = known.chain(images, start, streams)["z"].detach().unflatten(0, (-1, 4))
            torch.testing.assert_close(end, truth.samples["z"][:, -1])
        # Without the seed a draw of the defence, of other noise.
        streams = Streams.create(4, generator=at_seed())
        with torch.no_grad():
            end = fresh.chain(x, fresh.start(x, streams), streams)["z"]
        again = defence(x, torch.Generator().manual_seed(streams.seed)).latents["z"]
        expected = truth.latents["z"] if "max_gradients" in ending else again
        torch.testing.assert_close(end, expected)
        unrolled = next(row for row in ATTACKS if row.name == "unroll")
        assert ("converged" in unrolled.reason(fresh)) == ("until_converged" in ending)
        # A surrogate's chains are of its own energy.
        few = fresh.tempered(0.1)
        assert not torch.allclose(few.chain(x, few.start(x, streams), streams)["z"], end)

    @pytest.mark.parametrize("reading", READINGS)
    def test_attackers_climb_what_the_reading_makes_of_the_run(self, reading):
        """Of all its draws, or of the last one of the first chain."""
        vae, x, labels = problem(4)
        defence = MCMCDefence(vae, HMC, 3, 2, num_chains=2, keep_draws=2)
        box = WhiteBox(vae, defence, x, seed=SEED)
        read = DefendedClassifier(defence, classify, reading)
        scorer = Accuracy(box, x, labels, read, Fresh(3))
        suite = Suite(box, scorer, x, Linf(0.3), SMALL, None)
        unroll = next(row for row in ATTACKS if row.name == "unroll")
        assert suite.draws(unroll) == ((1,) if reading == "last" else (4,))
        objective = suite.objective(unroll, *suite.draws(unroll))(x)

        def margin(images):
            found = read_latents(vae, defence(images, at_seed()), reading)["z"]
            scores = classify(found.flatten(0, 1)).reshape(-1, 4, 2)
            own = scores[:, torch.arange(4), labels]
            return (scores[:, torch.arange(4), 1 - labels] - own).mean(0)

        leaf = x.clone().requires_grad_()
        value = objective(leaf)
        torch.testing.assert_close(value.detach(), margin(x))
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        step = 1e-6 * torch.randn(x.shape, generator=at_seed())
        difference = margin(x + step) - margin(x - step)
        torch.testing.assert_close(
            (gradient * 2 * step).flatten(1).sum(1), difference, rtol=1e-4, atol=1e-9
        )
        # Of two restarts, forwards alone, and in what gradients are judged by.
        moved = (x + 0.1).clamp(0, 1)
        black_box = next(row for row in ATTACKS if row.name == "square")
        both = suite.objective(black_box, *suite.draws(black_box))(x.repeat(2, 1, 1, 1))
        torch.testing.assert_close(
            both(torch.cat([x, moved])), torch.cat([margin(x), margin(moved)])
        )
        found, _ = expected_difference(suite, moved, x, 16, 0)
        torch.testing.assert_close(found, margin(moved) - margin(x))

    def test_a_defence_that_runs_by_itself_runs_once_for_all_draws_of_a_reading(self):
        """And not once for each of them, all of which every run has."""
        vae, x, labels = problem(4)
        chains = MCMCDefence(vae, HMC, 3, 2, num_chains=2, keep_draws=3)
        runs = []

        class Unknown:
            num_chains = 2

            def __init__(self):
                self.vae = vae

            def __call__(self, images, generator=None):
                runs.append(len(images))
                return chains(images, generator)

        defence = Unknown()
        box = WhiteBox(vae, defence, x, seed=SEED)
        read = DefendedClassifier(defence, classify, "vote")
        suite = Suite(box, Accuracy(box, x, labels, read, Fresh(3)), x, Linf(0.3), SMALL, None)
        bpda = next(row for row in ATTACKS if row.name == "bpda")
        assert suite.draws(bpda) == (6,)
        both, moved = x.repeat(2, 1, 1, 1), (x + 0.1).clamp(0, 1)
        objective = suite.objective(bpda, 6)(both)
        runs.clear()
        value = objective(torch.cat([x, moved]))
        assert runs == [4, 4]  # those of two restarts
        known = WhiteBox(vae, chains, x, seed=SEED)
        read = DefendedClassifier(chains, classify, "vote")
        suite = Suite(known, Accuracy(known, x, labels, read, Fresh(3)), x, Linf(0.3), SMALL, None)
        expected = suite.objective(bpda, 6)(both)(torch.cat([x, moved]))
        torch.testing.assert_close(value, expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"keep_draws": 2},
            {"max_gradients": 20},
            {"kernel": functools.partial(infer.HMC, step_size=0.1, num_steps=2)},
        ],
        ids=["few", "cut", "foreign"],
    )
    def test_the_number_of_draws_is_known_without_a_run(self, options, monkeypatch):
        vae, x, _ = problem(2)
        given = {"kernel": HMC, "num_samples": 4, "warmup_steps": 1, **options}
        defence = MCMCDefence(vae, **given)
        kept = defence(x, at_seed()).samples["z"].shape[1]
        monkeypatch.setattr(MCMCDefence, "_run", None)
        assert WhiteBox(vae, defence, x, seed=SEED).drawn().draws == kept

    def test_noise_protects_only_who_keeps_it_to_himself(self):
        vae, x, labels = problem(10)
        defence = Flipped(vae)
        budget = dataclasses.replace(
            SMALL, num_draws=(2,), scoring_draws=6, black_box_steps=4, num_directions=8
        )
        options = {"attacks": ("black_box",), "checks": False}
        known = run(vae, defence, x, labels, budget, defence_seed=SEED, **options)
        unknown = run(vae, defence, x, labels, budget, **options)
        assert known.threat_model == unknown.threat_model | {"defence_seed": SEED}
        assert "whose seed attackers know" in str(known)
        assert "whose seed attackers know" not in str(unknown)
        assert unknown.robust["mean"]["estimate"] > 0.3  # a coin is right half of the time
        assert known.robust["mean"]["estimate"] < 0.15
        # What is scored is the run with this seed, and all runs are one.
        read = classify(defence(known.x_adv, at_seed()).latents["z"]).argmax(-1)
        assert torch.equal(known.per_image, (read == labels).to(known.per_image))
        assert known.robust["mean"]["estimate"] == known.robust["worst_of_n"]["estimate"]
        assert [each.attacks[0].num_draws for each in (known, unknown)] == [1, 2]

    def test_every_attack_runs_and_checks_judge_the_known_noise(self):
        vae, x, labels = problem(8)
        defence = MCMCDefence(vae, HMC, 1, 1)
        asked = ("bpda", "equilibrium", "evidence", "truncated", "unroll")
        report = run(vae, defence, x, labels, SMALL, defence_seed=SEED, attacks=asked)
        assert "truncated" in report.skipped
        assert "its last transitions would have other noise" in report.skipped["truncated"]
        assert not any("truncated did not run" in reason for reason in report.reasons)
        assert {a.name for a in report.attacks} == {*asked} - {"truncated"}
        # The truth of fidelity is the difference of the defence's own ends.
        fresh = Fresh(3)
        box = WhiteBox(vae, defence, x, fresh, seed=SEED)
        scorer = Accuracy(box, x, labels, DefendedClassifier(box, classify, "last"), fresh)
        suite = Suite(box, scorer, x, Linf(0.3), SMALL, None)
        ahead, behind = (x + 0.1).clamp(0, 1), (x - 0.1).clamp(0, 1)
        difference, limit = expected_difference(suite, ahead, behind, 16, 0)
        goal = suite.goal()(x)
        ends = [goal(defence(each, at_seed()).latents, each) for each in (ahead, behind)]
        torch.testing.assert_close(difference, ends[0] - ends[1])
        assert (limit < 1e-9).all()

    @pytest.mark.parametrize("seed", [-1, 1.5, 2**63])
    def test_mistakes(self, seed):
        vae = LinearGaussianVAE()
        with pytest.raises(ValueError, match="defence_seed must be"):
            evaluate_robustness(vae, NoDefence(vae), torch.rand(4, 1, 4, 4), defence_seed=seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    vae, x, labels = problem()
    report = run(vae, NoDefence(vae), x, labels, attacks=("encoder",), checks=False)
    path = save_attacked(report, tmp_path_factory.mktemp("published") / "a.safetensors")
    return vae, report, path


class TestPublished:
    def test_the_figure_comes_out_again_with_fresh_draws(self, made):
        vae, report, path = made
        generator = torch.Generator().manual_seed(9)
        found = rescore(path, vae, NoDefence(vae), classifier=classify, generator=generator)
        assert found.figure == "accuracy"
        assert found.robust["mean"]["estimate"] < 0.15
        assert abs(found.robust["mean"]["estimate"] - report.robust["mean"]["estimate"]) < 0.1
        assert found.clean["mean"]["estimate"] > 0.9
        assert found.per_image.shape == (20,)
        # As many draws as the report has scored, without which "worst of N" is another figure.
        draws = [
            rescore(path, vae, NoDefence(vae), classifier=classify, num_draws=number,
                    generator=torch.Generator().manual_seed(9)).robust
            for number in (report.budget["scoring_draws"], 1)
        ]  # fmt: skip
        assert found.robust == draws[0]
        assert found.robust["worst_of_n"] != draws[1]["worst_of_n"]
        # With known noise to the last bit: the defence's own run.
        known = rescore(
            path, vae, NoDefence(vae), classifier=classify, num_draws=3, defence_seed=SEED
        )
        latents = NoDefence(vae)(report.x_adv, at_seed()).latents["z"]
        right = classify(latents).argmax(-1) == report.labels
        assert torch.equal(known.per_image, right.to(known.per_image))

    def test_the_file_holds_images_and_report(self, made):
        _, report, path = made
        read = load_attacked(path)
        for name in ("x_ref", "x_adv", "labels"):
            assert torch.equal(getattr(read, name), getattr(report, name))
        assert json.loads(read.to_json()) == json.loads(report.to_json())
        assert read.seed == report.seed
        assert read.conditions == ()

    def test_an_accuracy_without_its_labels_is_none(self, made, tmp_path):
        _, report, _ = made
        path = save_attacked(dataclasses.replace(report, labels=None), tmp_path / "b.safetensors")
        with pytest.raises(ValueError, match=r"b\.safetensors cannot be read .*'labels'"):
            load_attacked(path)

    def test_images_outside_of_the_ball_are_no_attack(self, made, tmp_path):
        _, report, _ = made
        x_adv = report.x_adv.clone()
        x_adv[3, 0, 0, 0] = report.x_ref[3, 0, 0, 0] + 0.31 * (
            1 if report.x_ref[3, 0, 0, 0] < 0.5 else -1
        )
        path = save_attacked(dataclasses.replace(report, x_adv=x_adv), tmp_path / "b.safetensors")
        with pytest.raises(ValueError, match=r"Linf ball of radius 0\.3 around .*, by up to 0\.31"):
            load_attacked(path)
        threat = report.threat_model | {"norm": "L2", "radius": 0.3}
        path = save_attacked(dataclasses.replace(report, threat_model=threat), path)
        with pytest.raises(ValueError, match="the L2 ball of radius"):
            load_attacked(path)

    @pytest.mark.parametrize("ball", [Linf(0.001), L2(0.01)])
    def test_what_an_evaluation_takes_for_an_attack_can_be_read(self, ball, made, tmp_path):
        """References plus a perturbation on the border, as rounding leaves the sum."""
        _, report, _ = made
        generator = torch.Generator().manual_seed(3)
        x = torch.rand(6, 1, 4, 4, generator=generator, dtype=torch.float32)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32)
        x_adv = (x + ball.project(100 * noise)).clamp(0, 1)
        norm = ball.norm(x_adv.double() - x.double()).max()
        assert norm > ball.radius * (1 + 4 * torch.finfo(x.dtype).eps)
        check_attacked(x_adv[None], x, ball)
        threat = report.threat_model | {"norm": ball.norm_name, "radius": ball.radius}
        changed = dataclasses.replace(report, x_ref=x, x_adv=x_adv, threat_model=threat)
        found = load_attacked(save_attacked(changed, tmp_path / "a.safetensors"))
        assert torch.equal(found.x_adv, x_adv)

    @pytest.mark.parametrize("ball", [L1, L2])
    def test_at_the_boundary_the_order_of_a_sum_does_not_matter(self, ball, made, tmp_path):
        _, report, _ = made
        generator = torch.Generator().manual_seed(1)
        row = torch.rand(784, generator=generator, dtype=torch.float32)
        order = torch.rand(20, 784, generator=generator).argsort(1)
        x_adv = row[order].view(20, 1, 28, 28)
        norm = ball(1.0).norm(x_adv)
        radius = float(norm.min())
        assert float(norm.max()) > radius

        def load(x_adv):
            threat = report.threat_model | {"norm": ball.norm_name, "radius": radius}
            changed = dataclasses.replace(
                report, x_ref=torch.zeros_like(x_adv), x_adv=x_adv, threat_model=threat
            )
            return load_attacked(save_attacked(changed, tmp_path / "g.safetensors"))

        assert torch.equal(load(x_adv).x_adv, x_adv)
        with pytest.raises(ValueError, match=f"the {ball.norm_name} ball of radius"):
            load((x_adv * (1 + 2e-5)).clamp(max=1.0))

    def test_another_reading_is_another_figure(self, made, tmp_path):
        vae, report, path = made
        defence = NoDefence(vae)
        other = DefendedClassifier(defence, classify, "mean")
        with pytest.raises(ValueError, match=r"reading='last', .* given has reading='mean'"):
            rescore(path, vae, defence, classifier=other)
        threat = report.threat_model | {"reading": "mean"}
        changed = dataclasses.replace(report, threat_model=threat)
        path = save_attacked(changed, tmp_path / "h.safetensors")
        with pytest.raises(ValueError, match=r"DefendedClassifier\(defence, classifier, 'mean'\)"):
            rescore(path, vae, defence, classifier=classify)
        assert rescore(path, vae, defence, classifier=other).figure == "accuracy"

    def test_conditions_that_are_none_are_counted(self, made, tmp_path):
        _, report, _ = made
        one = torch.arange(20.0)
        for conditions in ((None, one, None), (None,), (one, None, None)):
            changed = dataclasses.replace(report, conditions=conditions)
            read = load_attacked(save_attacked(changed, tmp_path / "i.safetensors")).conditions
            assert [value is None for value in read] == [value is None for value in conditions]

    def test_mistakes(self, made, tmp_path):
        vae, report, path = made
        score = functools.partial(rescore, path, vae, NoDefence(vae))
        with pytest.raises(ValueError, match="scored by their accuracy: pass its classifier"):
            score()
        with pytest.raises(ValueError, match="num_draws must be an integer of at least 1, got 0"):
            score(classifier=classify, num_draws=0)
        with pytest.raises(ValueError, match="defence_seed must be"):
            score(classifier=classify, defence_seed=-1)
        with pytest.raises(ValueError, match="defence defends another VAE"):
            rescore(path, LinearGaussianVAE(), NoDefence(vae), classifier=classify)
        with pytest.raises(ValueError, match="report holds no images"):
            save_attacked(RobustnessReport.from_dict(report.to_dict()), tmp_path / "c.safetensors")
        own = dataclasses.replace(report, threat_model=report.threat_model | {"norm": "Mine"})
        with pytest.raises(ValueError, match="ball of norm 'Mine'.*Linf, L2, L1"):
            save_attacked(own, tmp_path / "c.safetensors")
        assert not (tmp_path / "c.safetensors").exists()
        damaged = tmp_path / "d.safetensors"
        damaged.write_bytes(path.read_bytes()[:50])
        with pytest.raises(ValueError, match=r"attacked images .* cannot be read .*another copy"):
            load_attacked(damaged)

    def test_a_similarity_is_scored_by_itself(self, tmp_path):
        vae, x, _ = problem(6)

        def close(one, other):
            return 1.0 - (one - other).square().mean((1, 2, 3))

        ball = L2(1.0)
        options = {"attacks": ("encoder",), "checks": False, "classifier": None, "ball": ball}
        report = run(vae, NoDefence(vae), x, None, SMALL, similarity=close, **options)
        assert report.labels is None
        path = save_attacked(report, tmp_path / "e.safetensors")
        found = rescore(path, vae, NoDefence(vae), similarity=close)
        assert found.robust["mean"]["estimate"] < found.clean["mean"]["estimate"]
        with pytest.raises(ValueError, match="by their similarity: pass its similarity"):
            rescore(path, vae, NoDefence(vae))
        with pytest.raises(ValueError, match="leave out the classifier"):
            rescore(path, vae, NoDefence(vae), classifier=classify)

    def test_labels_may_be_a_condition_too(self, tmp_path):
        vae, x, labels = problem(4)

        class Conditional:
            def model(self, x, y):
                return vae.model(x)

            def guide(self, x, y):
                return vae.guide(x)

        conditional = Conditional()
        report = run(
            conditional, NoDefence(conditional), (x, labels), labels, SMALL,
            attacks=("encoder",), checks=False,
        )  # fmt: skip
        read = load_attacked(save_attacked(report, tmp_path / "f.safetensors"))
        assert torch.equal(read.labels, labels)
        assert torch.equal(read.conditions[0], labels)

    def test_conditions_travel_with_their_images(self, tmp_path):
        vae, x, labels = problem(4)
        shift = torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=x.dtype)

        class Conditional:
            def model(self, x, unused, shift):
                return vae.model(x)

            def guide(self, x, unused=None, shift=None):
                return vae.guide((x + shift[:, None, None, None]).clamp(0, 1))

        conditional = Conditional()
        given = (x, torch.zeros(4), shift)
        report = run(
            conditional, NoDefence(conditional), given, labels, SMALL,
            attacks=("encoder",), checks=False,
        )  # fmt: skip
        path = save_attacked(report, tmp_path / "f.safetensors")
        read = load_attacked(path)
        assert torch.equal(read.conditions[1], shift)
        found = rescore(path, conditional, NoDefence(conditional), classifier=classify)
        assert found.robust["mean"]["num_images"] == 4
        bound, _ = program.at_images(conditional, given)
        assert bound is not conditional
        another = dataclasses.replace(report, images=("another",), x_ref=1 - report.x_ref)
        joined = RobustnessReport.join([report, another])
        assert torch.equal(joined.conditions[1], torch.cat([shift, shift]))
        assert joined.x_ref.shape == (8, 1, 4, 4)
