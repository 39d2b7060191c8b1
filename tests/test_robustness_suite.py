"""What the suite makes of an attack's iterates, and its random search."""

from __future__ import annotations

import dataclasses
import functools
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_robustness import SMALL, classify, problem, run

from pyro_vae_defence import attacks
from pyro_vae_defence.attacks import adaptive
from pyro_vae_defence.defence import (
    DefendedClassifier,
    EncoderDefence,
    MCMCDefence,
    NoDefence,
    PosteriorModeDefence,
    gaussian_filter,
)
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import program
from pyro_vae_defence.ops.balls import L1, Linf
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.robustness import ATTACKS, Budget, WhiteBox, evaluate_robustness
from pyro_vae_defence.robustness.cost import chain_cost, suite_gradients
from pyro_vae_defence.robustness.fidelity import expected_difference
from pyro_vae_defence.robustness.scoring import Accuracy, Fresh, Scores, Similarity
from pyro_vae_defence.robustness.suite import Memory, Suite

ROWS = {row.name: row for row in ATTACKS}


class TestIterates:
    def test_a_memory_keeps_the_highest_values_row_by_row(self):
        values = torch.tensor([[1.0, 5.0], [3.0, torch.nan], [2.0, 7.0], [torch.inf, 6.0]])
        images = torch.arange(8.0).reshape(4, 2, 1, 1, 1)
        calls = iter(values)
        memory = Memory(2, queries=False)
        objective = memory.watching(lambda x_ref: lambda x: next(calls))(images[0])
        for x in images:
            objective(x.clone().requires_grad_())
        assert memory.values.tolist() == [[3.0, 7.0], [2.0, 6.0]]
        assert memory.images.flatten(2)[..., 0].tolist() == [[2.0, 5.0], [4.0, 7.0]]
        # What is no iterate is forgotten, unless queries are.
        for queries, number in ((False, 0), (True, 1)):
            memory = Memory(2, queries)
            memory.watching(lambda x_ref: lambda x: torch.ones(2))(images[0])(images[0])
            assert len(memory.images) == number

    def test_the_lowest_figure_wins_inside_of_the_ball(self):
        x = torch.full((2, 1, 1, 1), 0.5)
        scored = []

        def score(images, num_draws):
            scored.append((images, num_draws))
            return Scores(images.flatten(1).mean(1).expand(num_draws, -1), torch.zeros(2))

        budget = dataclasses.replace(SMALL, iterates=2, iterate_draws=7)
        suite = Suite(None, types.SimpleNamespace(score=score), x, Linf(0.2), budget, None)
        memory = Memory(2, False)
        # Two restarts of two images.
        memory.images = torch.tensor([[0.45, 0.6, 0.4, 0.6], [0.1, 0.6, 0.6, 0.6]])
        memory.images = memory.images.reshape(2, 4, 1, 1, 1)
        found = torch.tensor([[0.55, 0.55], [0.55, 0.65]]).reshape(2, 2, 1, 1, 1)
        first, second = suite.best_iterates(found, memory)
        torch.testing.assert_close(first.flatten(), torch.tensor([0.3, 0.55]))
        torch.testing.assert_close(second.flatten(), torch.tensor([0.4, 0.6]))
        assert {draws for _, draws in scored} == {7}
        assert all(((images - x).abs() <= 0.2).all() for images, _ in scored)

    @pytest.mark.parametrize("name", ["encoder", "square"])
    def test_they_are_chosen_among_where_the_budget_says_so(self, name, monkeypatch):
        vae, x, labels = problem(4)
        seen = []

        def first(suite, found, memory):
            seen.append(memory)
            return iter(memory.images[0].unflatten(0, found.shape[:2]))

        monkeypatch.setattr(Suite, "best_iterates", first)
        options = {"attacks": (name,), "checks": False}
        run(vae, NoDefence(vae), x, labels, SMALL, **options)
        assert seen == []
        budget = dataclasses.replace(SMALL, iterates=2, num_restarts=2, num_steps=3)
        report = run(vae, NoDefence(vae), x, labels, budget, **options)
        (memory,) = seen
        assert memory.images.shape == (2, 2 * 4, 1, 4, 4)
        assert (memory.values[0] >= memory.values[1]).all()
        assert memory.queries == (name == "square")
        # What was chosen is what is scored: an image is its own, or the best iterate of a restart.
        kept = memory.images[0].unflatten(0, (2, 4))
        for number, image in enumerate(report.x_adv):
            assert any(torch.equal(image, each) for each in (x[number], *kept[:, number]))

    @pytest.mark.parametrize("name", ["iterates", "iterate_draws"])
    def test_mistakes(self, name):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            Budget(**{name: 0})


class TestMode:
    """The mode of a chain's target, whose derivative is in closed form."""

    def suite(self, perturbation=None, **options):
        torch.manual_seed(0)
        vae, x, labels = problem(6)
        kernel = functools.partial(BatchedHMC, step_size=0.04, num_steps=3)
        defence = MCMCDefence(vae, kernel, 1, 2, perturbation=perturbation, **options)
        fresh = Fresh(3)
        box = WhiteBox(vae, defence, x, fresh)
        scorer = Accuracy(box, x, labels, DefendedClassifier(defence, classify, "last"), fresh)
        budget = dataclasses.replace(SMALL, num_iterations=3)  # as many as there are latents
        return Suite(box, scorer, x, Linf(0.3), budget, attacks.APGD)

    def test_its_derivative_is_exact_where_the_posterior_is_gaussian(self):
        suite = self.suite()
        x = suite.x.clone().requires_grad_()
        suite.objective(ROWS["mode"], 1)(suite.x)(x).sum().backward()
        again = suite.x.clone().requires_grad_()
        mean, _ = suite.box.vae.exact(again)
        suite.goal()(suite.x)({"z": mean}, again).sum().backward()
        assert bool((again.grad.abs().amax((1, 2, 3)) > 0.1).all())
        torch.testing.assert_close(x.grad, again.grad)

    @pytest.mark.parametrize("perturbation", [None, Linf(0.1)])
    def test_the_mode_is_that_of_the_defence_of_this_name(self, perturbation):
        box = self.suite(perturbation, initial="mean").box
        streams = Streams.create(6, seed=0)
        found = box.mode(box._x, box.start(box._x, streams), streams)
        rival = PosteriorModeDefence(box.vae, initial="mean", perturbation=perturbation)
        assert torch.equal(found["z"], rival(box._x).latents["z"])

    def test_in_the_suite(self):
        suite = self.suite()
        assert suite.why_not(ROWS["mode"]) == ""
        for other in (NoDefence(suite.box.vae), PosteriorModeDefence(suite.box.vae)):
            box = WhiteBox(suite.box.vae, other, suite.x)
            assert dataclasses.replace(suite, box=box).why_not(ROWS["mode"])
        found = suite.worst(ROWS["mode"], 1)
        expected = suite_gradients(
            chain_cost(suite.box.defence), suite.budget, 6, ("mode",), checks=False
        )
        assert 0.7 < found[2] / expected["mode"] < 1.5


class TestSquare:
    def suite(self, num=6, **options):
        vae, x, labels = problem(num)
        fresh = Fresh(3)
        box = WhiteBox(vae, NoDefence(vae), x, fresh)
        scorer = Accuracy(box, x, labels, DefendedClassifier(box, classify, "last"), fresh)
        return Suite(box, scorer, x, Linf(0.3), SMALL, attacks.APGD, **options)

    def test_it_sees_values_alone_as_many_as_the_other_black_box(self):
        suite = self.suite()
        budget = dataclasses.replace(SMALL, black_box_steps=3, num_directions=4)
        suite = dataclasses.replace(suite, budget=budget)
        assert suite.draws(ROWS["square"]) == (1,)
        averaged = dataclasses.replace(budget, num_draws=(1, 5), selection_draws=2)
        assert dataclasses.replace(suite, budget=averaged).draws(ROWS["square"]) == (5,)
        seen = []

        def watched(row, num_draws):
            def prepare(x_ref):
                def objective(x):
                    seen.append(x)
                    assert not x.requires_grad
                    return x.flatten(1).sum(1)

                return objective

            return prepare

        object.__setattr__(suite, "objective", watched)
        x_adv = suite.attack(ROWS["square"], 1, num_restarts=2)
        assert len(seen) == 3 * (2 * 4 + 1) + 1  # and what is returned, once more
        assert x_adv.shape == (2, *suite.x.shape)
        # Stripes first; and the nearest image of another class, as far as the ball goes.
        first, second = seen[0].unflatten(0, (2, 6))
        assert ((first - suite.x).sign() == (first - suite.x).sign()[..., :1, :]).all()
        labels, flat = suite.scorer.labels, suite.x.flatten(1)
        distance = torch.cdist(flat, flat)
        distance[labels[:, None] == labels] = torch.inf
        other = suite.x[distance.argmin(1)]
        expected = suite.x + (other - suite.x).clamp(-0.3, 0.3)
        torch.testing.assert_close(second, expected)

    def test_classes_that_are_all_alike_leave_stripes(self):
        suite = self.suite()
        suite.scorer.labels = torch.zeros(6, dtype=torch.long)
        assert suite.attack(ROWS["square"], 1, num_restarts=2).shape == (2, *suite.x.shape)

    def test_a_ball_without_moves_is_said(self):
        vae, x, labels = problem(4)
        report = run(vae, NoDefence(vae), x, labels, SMALL, ball=L1(1.0), checks=False)
        assert report.skipped["square"] == "Square has no moves in an L1 ball"
        assert not any("square" in reason for reason in report.reasons)

    def test_little_is_left_without_any_gradient(self):
        vae, x, labels = problem()
        budget = dataclasses.replace(SMALL, black_box_steps=8, num_directions=8, num_restarts=2)
        report = run(vae, NoDefence(vae), x, labels, budget, attacks=("square",), checks=False)
        assert report.clean["mean"]["estimate"] > 0.9
        assert report.robust["mean"]["estimate"] < 0.3


class Mixture:
    """z in the plane, a class y of three, and pixels that both brighten."""

    def __init__(self):
        generator = torch.Generator().manual_seed(4)
        self.weight, self.centre = torch.randn(2, 4, 4, generator=generator)[:, :3]

    def model(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3) / 3))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = z @ self.weight[:2] + self.centre[y]
            fn = dist.Bernoulli(logits=logits, validate_args=False).to_event(1)
            pyro.sample("obs", fn, obs=x.flatten(1))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3) / 3))
            loc = x.flatten(1) @ self.weight[:2].T
            pyro.sample("z", dist.Normal(loc, 0.3).to_event(1))
            return y


def ending(box, encode):
    """A box of a chain that ends where ``encode`` says."""
    scale = {"constrain": box.constrain, "unconstrain": box.unconstrain}
    return types.SimpleNamespace(
        forwards=lambda: encode, steps=True, has_chain=True, seed=None, vae=box.vae, **scale
    )


class Positive(Mixture):
    """Two latents above zero."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            fn = dist.Bernoulli(logits=z @ self.weight[:2], validate_args=False).to_event(1)
            pyro.sample("obs", fn, obs=x.flatten(1))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x.flatten(1) @ self.weight[:2].T, 0.8).to_event(1))


class Angles(Mixture):
    """Two angles around the border between -pi and pi."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.VonMises(torch.zeros(2), 0.1).to_event(1))
            fn = dist.Bernoulli(logits=z.cos() @ self.weight[:2], validate_args=False).to_event(1)
            pyro.sample("obs", fn, obs=x.flatten(1))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc = torch.pi + 0.5 * x.flatten(1) @ self.weight[:2].T
            pyro.sample("z", dist.VonMises(loc, 9.0).to_event(1))


@pytest.mark.parametrize("kind", [Positive, Angles])
def test_means_of_other_latents_are_attacked_as_they_are_read(float64, kind):
    vae, fresh = kind(), Fresh(3)
    x = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    box = WhiteBox(vae, EncoderDefence(vae, num_samples=3), x, fresh)
    linear = lambda z: torch.stack([z[:, 0], z[:, 1], -z.sum(1)], 1)  # noqa: E731
    for reading in ("mean", "reencoded"):
        classifier = DefendedClassifier(box, linear, reading)
        scorer = Accuracy(box, x, torch.tensor([0, 1, 2]), classifier, fresh)
        suite = Suite(box, scorer, x, Linf(0.3), SMALL, attacks.APGD)
        results = [box.defence(y, torch.Generator().manual_seed(2)) for y in (x, 1 - x)]
        draws = [box.unconstrain({"z": r.samples["z"].flatten(0, 2)})["z"] for r in results]
        read = [scorer.classifier.log_probabilities(result) for result in results]
        margin = adaptive.misclassification(lambda p, _: p, scorer.labels)(x)
        clean, scored = (margin(log_probs, x) for log_probs in read)

        def encode(images, streams, previous=None):
            return {"z": draws[int(torch.equal(images[: len(x)], 1 - x))]}  # noqa: B023

        goal = suite.goal()
        nothing = lambda images, latents: images.flatten(1).sum(1)  # noqa: E731
        for objective in (
            adaptive.expected(encode, goal, 3, **suite.options()),
            adaptive.equilibrium(
                encode, lambda x, z, _: z, nothing, goal, num_chains=3, **suite.options()
            ),
        ):
            torch.testing.assert_close(objective(x)(1 - x), scored)
        suite = dataclasses.replace(suite, box=ending(box, encode))
        object.__setattr__(suite, "goal", lambda goal=goal: goal)
        difference, _ = expected_difference(suite, 1 - x, x, 3, 0)
        torch.testing.assert_close(difference, scored - clean)


class TestDiscreteLatents:
    """Attackers decode what is scored: given the image, which tells of the discrete latents."""

    def suite(self, reading, x, preprocess):
        vae, fresh = Mixture(), Fresh(3)
        box = WhiteBox(vae, EncoderDefence(vae, 2, preprocess), x, fresh)
        compare = lambda one, other: -(one - other).abs().flatten(1).sum(1)  # noqa: E731
        if reading is None:
            scorer = Similarity(box, x, compare, fresh)
        else:
            linear = lambda z: torch.stack([z[:, 0], z[:, 1], -z.sum(1)], 1)  # noqa: E731
            classifier = DefendedClassifier(box, linear, reading)
            scorer = Accuracy(box, x, torch.tensor([0, 1, 2]), classifier, fresh)
        return Suite(box, scorer, x, Linf(0.3), SMALL, attacks.APGD)

    @pytest.mark.parametrize("preprocess", [None, lambda x: 0.5 - 0.4 * x])
    @pytest.mark.parametrize("reading", [None, "last", "reencoded"])
    def test_the_goal_is_what_is_scored(self, float64, reading, preprocess):
        x = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(1)).round()
        suite = self.suite(reading, x, preprocess)
        attacked = (0.7 * x + 0.2).clamp(0, 1)
        result = suite.box.defence(attacked, torch.Generator().manual_seed(2))
        if reading is None:
            scored = 1.0 - suite.scorer.compare(result.reconstruction, suite.scorer.reference)
        else:
            log_probs = suite.scorer.classifier.log_probabilities(result)
            scored = adaptive.misclassification(lambda *_: log_probs, suite.scorer.labels)(x)(0, 0)
        mean = {"z": result.samples["z"].mean((0, 1))}
        latents = mean if reading == "reencoded" else result.latents
        goal = suite.goal()
        torch.testing.assert_close(goal(x)(latents, attacked), scored)

        # So it is wherever the goal is asked.
        def encode(images, streams, previous=None):
            return {"z": latents["z"].repeat(len(images) // len(x), 1)}

        nothing = lambda images, latents: images.flatten(1).sum(1)  # noqa: E731
        for of_mean in (False, True):
            options = {"goal": goal, "of_mean": of_mean}
            for objective in (
                adaptive.expected(encode, num_draws=2, **options),
                adaptive.equilibrium(encode, lambda x, z, _: z, nothing, num_chains=2, **options),
            ):
                torch.testing.assert_close(objective(x)(attacked), scored)
        other = goal(x)(latents, x)
        suite = dataclasses.replace(suite, box=ending(suite.box, encode))
        object.__setattr__(suite, "goal", lambda: goal)
        difference, _ = expected_difference(suite, attacked, x, 2, 0)
        torch.testing.assert_close(difference, scored - other)
        assert bool((difference.abs() > 1e-6).all()) == (reading != "last")


class Linear:
    """One latent, whose mean the encoder reads off the images by a weight per pixel, bent a
    little; a decoder without that latent."""

    def __init__(self, weight):
        self.weight = weight

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            mean = (0.5 + 0.0 * z[..., None, None]).expand(x.shape)
            pyro.sample("obs", dist.Normal(mean, 0.3).to_event(3), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            mean = (x - 0.5).flatten(1) @ self.weight[:, None]
            mean = mean + 0.1 * mean.square()
            pyro.sample("z", dist.Normal(mean, 0.01 * mean.square() + 0.001).to_event(1))


def _outside_of_torch(x):
    return torch.from_numpy(np.round(3 * x.numpy()) / 3)


class TestFilters:
    """A filter before the encoder is known to the attacker, and so is its derivative."""

    BLUR = functools.partial(gaussian_filter, sigma=0.7)

    def vae(self):
        """Its weights are a checkerboard's: what a blur leaves of them has other signs."""
        row, column = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
        noise = torch.randn(36, generator=torch.Generator().manual_seed(0))
        return Linear(((row + column) % 2 * 2.0 - 1.0).flatten() + 0.5 * noise)

    def test_the_best_attack_on_a_blur_is_found(self, float64):
        """No image survives: a perturbation of known sign moves each mean past the boundary."""
        vae = self.vae()
        slope = gaussian_filter(torch.eye(36).reshape(-1, 1, 6, 6), 0.7).flatten(1) @ vae.weight
        # Means at the filtered images, from 60% to 90% of the way that an attack can move them.
        target = 0.1 * slope.abs().sum() * torch.linspace(0.6, 0.9, 6)
        x = 0.5 + (target[:, None] / slope.square().sum() * slope).reshape(-1, 1, 6, 6)
        labels, read = torch.ones(6, dtype=torch.long), lambda z: torch.cat([-z, z], 1)
        defence = EncoderDefence(vae, 1, self.BLUR)
        report = evaluate_robustness(
            vae, defence, x, labels, classifier=read, ball=Linf(0.1),
            budget=dataclasses.replace(SMALL, num_steps=10), checks=False,
            attacks=("bpda",), generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert report.clean["mean"]["estimate"] == 1
        # As if the blur were none, an attack would move them by less than half of that.
        assert 2 * slope @ vae.weight.sign() < slope.abs().sum()
        assert report.robust["mean"]["estimate"] == 0

    def test_the_derivative_is_that_of_the_filter(self, float64):
        vae = self.vae()
        x = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
        box, streams = WhiteBox(vae, EncoderDefence(vae, 1, self.BLUR), x), Streams.create(3)
        end = program.encode(vae, self.BLUR(x), streams=streams)["z"].sum()
        found = box.start(x, streams)["z"].sum()
        torch.testing.assert_close(found, end)
        expected = torch.autograd.grad(end, x)[0]
        torch.testing.assert_close(torch.autograd.grad(found, x)[0], expected)

    @pytest.mark.parametrize(
        "preprocess",
        [_outside_of_torch, lambda x: (3 * x).round() / 3, lambda x: 0.5 * x.detach() + 0.2],
    )
    def test_pixels_without_a_derivative_have_the_encoders_at_the_filtered_image(
        self, float64, preprocess
    ):
        vae, x = self.vae(), torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))
        box, streams = WhiteBox(vae, EncoderDefence(vae, 2, preprocess), x), Streams.create(3)
        leaves = x.clone().requires_grad_(), preprocess(x).requires_grad_()
        found, expected = (
            torch.autograd.grad(encode(leaf, streams)["z"].sum(), leaf)[0]
            for encode, leaf in zip((box.start, box.encoding), leaves, strict=True)
        )
        torch.testing.assert_close(found, expected)

    def test_a_clip_has_its_own_derivative_where_it_has_one(self, float64):
        """Dark pixels, which it sets to 0, have that of the encoder."""
        vae, x = self.vae(), torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))
        clip = lambda x: torch.where(x <= 0.4, 0.0, x.square())  # noqa: E731
        box, leaf = WhiteBox(vae, EncoderDefence(vae, 2, clip), x), x.clone().requires_grad_()
        (found,) = torch.autograd.grad((box.look(leaf) * (1 + x)).sum(), leaf)
        torch.testing.assert_close(found, (1 + x) * torch.where(x <= 0.4, 1.0, 2 * x))

    @pytest.mark.parametrize("every", [False, True])
    def test_noise_of_a_known_seed_is_that_of_each_draw(self, float64, every):
        vae, x = self.vae(), torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))
        defence = EncoderDefence(vae, 4, self.BLUR)
        box = WhiteBox(vae, defence, x, seed=7)
        box, number = (box.drawn(), 4) if every else (box, 1)
        streams = Streams.create(3, number, seed=1)
        draws = defence(x, torch.Generator().manual_seed(7)).samples["z"][0, -number:]
        found = box.start(x.repeat(number, 1, 1, 1), streams)["z"]
        torch.testing.assert_close(found, draws.flatten(0, 1))


def test_images_are_compared_as_they_are_scored(float64):
    """Means of a Gaussian decoder that leave [0, 1], which the defence clips."""
    vae, x, _ = problem(4)
    vae.bias = vae.bias + 0.9
    box, fresh = WhiteBox(vae, NoDefence(vae), x), Fresh(3)
    compare = lambda one, other: -(one - other).square().flatten(1).sum(1)  # noqa: E731
    suite = Suite(box, Similarity(box, x, compare, fresh), x, Linf(0.3), SMALL, attacks.APGD)
    result = box(1 - x, torch.Generator().manual_seed(0))
    assert (program.Decoder(vae, x)(result.latents) > 1).any()
    scored = 1 - compare(result.reconstruction, suite.scorer.reference)
    torch.testing.assert_close(suite.goal()(x)(result.latents, 1 - x), scored)
