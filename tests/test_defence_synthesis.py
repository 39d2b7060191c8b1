"""Analysis by synthesis: the inequalities of energies, the masses and their derivative against a
grid, and every attack of a net above the bound."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import energies_under_common_attack
from pyro import poutine
from torch.nn.functional import one_hot

from pyro_vae_defence.defence import AnalysisBySynthesis
from pyro_vae_defence.models import program
from pyro_vae_defence.ops.balls import L1, L2, Linf, reaches

CLASSES = 3
EPSILON, DELTA = 0.05, 0.08


class PlaneOfClass:
    """Two latents, Bernoulli images 1x2x4, three classes with decoders and priors of their own."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(CLASSES, 8, 2, generator=generator, dtype=torch.float64)
        self.bias = 3 * torch.randn(CLASSES, 8, generator=generator, dtype=torch.float64)
        self.shift = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, -0.5]], dtype=torch.float64)

    def logits(self, z, y):
        weight = (y @ self.weight.flatten(1)).view(-1, 8, 2)
        return ((weight * z[:, None]).sum(-1) + y @ self.bias).view(-1, 1, 2, 4)

    def observe(self, x, z, y):
        image = dist.Bernoulli(logits=self.logits(z, y), validate_args=False).to_event(3)
        pyro.sample("x", image, obs=x)

    def model(self, x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y @ self.shift, 1.0).to_event(1))
            self.observe(x, z, y)

    def guide(self, x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(y @ self.shift, torch.ones(len(x), 2)).to_event(1))


class TwoSites(PlaneOfClass):
    """The same density of images, with one latent on its own scale and one positive."""

    def model(self, x, y):
        loc = y @ self.shift
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.LogNormal(loc[:, 1:], 1.0).to_event(1))
            a = pyro.sample("a", dist.Normal(loc[:, :1], 1.0).to_event(1))
            self.observe(x, torch.cat([a, b.log()], 1), y)

    def guide(self, x, y):
        with pyro.plate("data", len(x)):
            zero = torch.zeros(len(x), 1)
            pyro.sample("a", dist.Normal(zero, 1.0).to_event(1))
            pyro.sample("b", dist.LogNormal(zero, 1.0).to_event(1))


GRID = torch.linspace(-5, 5, 51, dtype=torch.float64)


def energies(vae, x, y, z, reach):
    """Energies of latents ``(M, 2)`` at one image and class."""
    given = one_hot(torch.tensor(y), CLASSES).double().expand(len(z), -1)
    bound, images = program.at_images(vae, (x.expand(len(z), -1, -1, -1), given))
    return program.potential(bound, images, reach)({"z": z})


def grid_masses(vae, x, reach):
    """Log-masses of every class at every image, ``(N, K)``."""
    z = torch.cartesian_prod(GRID, GRID)
    area = 2 * math.log(float(GRID[1] - GRID[0]))
    return torch.stack(
        [
            torch.stack(
                [(-energies(vae, image, y, z, reach)).logsumexp(0) + area for y in range(CLASSES)]
            )
            for image in x
        ]
    )


@pytest.fixture
def vae(float64):
    return PlaneOfClass()


@pytest.fixture
def x(vae):
    """An image of each class."""
    y = torch.eye(CLASSES)
    z = torch.randn(CLASSES, 2, generator=torch.Generator().manual_seed(5))
    return vae.logits(z, y).sigmoid()


LABELS = torch.arange(CLASSES)


def make(vae, reach, **options):
    options = {"num_temperatures": 8, "num_walks": 12, **options}
    return AnalysisBySynthesis(vae, CLASSES, reach, **options)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("ball", [Linf(0.06), L2(0.2), L1(0.4)])
def test_energies_are_ordered_at_every_latent(vae, ball):
    """U_{delta+eps}(z; x_r) <= U_delta(z; x_a) <= U_{delta-eps}(z; x_r), class by class."""
    generator = seeded(1)
    delta = 1.5 * ball.radius
    narrow, wide = reaches(ball, delta)
    z = 2 * torch.randn(200, 2, generator=generator)
    strict = 0
    for _ in range(4):
        clean = torch.rand(1, 1, 2, 4, generator=generator).round(decimals=1)
        noise = torch.randn(1, 1, 2, 4, generator=generator)
        step = ball.project(noise.sign() * ball.radius if isinstance(ball, Linf) else noise)
        attacked = ball.inside(clean, (clean + step).clamp(0, 1))
        for y in range(CLASSES):
            low, middle, high = (
                energies(vae, image[0], y, z, reach)
                for image, reach in (
                    (clean, wide), (attacked, type(ball)(delta)), (clean, narrow),
                )
            )  # fmt: skip
            assert bool((low <= middle + 1e-9).all())
            assert bool((middle <= high + 1e-9).all())
            strict += int((high - low > 1e-3).sum())
    assert strict > 400  # it says something


def test_masses_are_those_of_a_grid(vae, x):
    """Forty estimates of each of nine masses: nine means within four standard errors (one right
    implementation in 400 fails); and what an estimate says of its own error is about true."""
    reach, copies = Linf(DELTA), 40
    found = make(vae, reach).log_masses(x.repeat(copies, 1, 1, 1), seeded(2))
    truth = grid_masses(vae, x, reach)
    weights = (found.log_mass.view(copies, CLASSES, CLASSES) - truth).exp()
    error = weights.std(0) / copies**0.5
    assert bool(((weights.mean(0) - 1).abs() < 4 * error).all())
    assert bool((error < 0.1).all())
    stated = found.standard_error.view(copies, CLASSES, CLASSES).square().mean(0).sqrt()
    assert bool((weights.std(0) < 3 * stated).all())
    assert bool((weights.std(0) > stated / 3).all())
    assert float(found.acceptance_rate.min()) > 0.5


def test_sites_may_have_a_support(vae, x):
    """The same density in other words has the same masses."""
    copies = 30
    found = make(TwoSites(), Linf(DELTA)).log_masses(x[:1].repeat(copies, 1, 1, 1), seeded(2))
    weights = (found.log_mass - grid_masses(vae, x[:1], Linf(DELTA))).exp()
    assert bool(((weights.mean(0) - 1).abs() < 4 * weights.std(0) / copies**0.5).all())


def test_sites_may_have_no_event_dimensions(x):
    class Scalars(TwoSites):
        def model(self, x, y):
            loc = y @ self.shift
            with pyro.plate("data", len(x)):
                b = pyro.sample("b", dist.LogNormal(loc[:, 1], 1.0))
                a = pyro.sample("a", dist.Normal(loc[:, 0], 1.0))
                self.observe(x, torch.stack([a, b.log()], 1), y)

        def guide(self, x, y):
            with pyro.plate("data", len(x)):
                pyro.sample("a", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.sample("b", dist.LogNormal(torch.zeros(len(x)), 1.0))

    one, other = (
        make(each, Linf(DELTA), num_temperatures=3, num_walks=2).log_masses(x, seeded(2))
        for each in (TwoSites(), Scalars())
    )
    torch.testing.assert_close(other.log_mass, one.log_mass)


def test_a_class_may_leave_its_latents_no_room(vae, x):
    """Its mass is then its likelihood at its one latent."""

    class Narrow(PlaneOfClass):
        def model(self, x, y):
            scale = y @ torch.tensor([1.0, 1e-5, 1.0])
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(y @ self.shift, scale[:, None]).to_event(1))
                self.observe(x, z, y)

    found = make(Narrow(), None, num_temperatures=12, num_walks=24).log_masses(x, seeded(2))
    logits = vae.logits(vae.shift[1:2], torch.eye(CLASSES)[1:2])
    truth = dist.Bernoulli(logits=logits, validate_args=False).log_prob(x).flatten(1).sum(1)
    assert bool(((found.log_mass[:, 1] - truth).abs() < 1.0).all())
    assert bool((found.standard_error[:, 1] < 0.6).all())


def test_derivative_is_that_of_the_integral(vae, x):
    """Against a difference of masses on the grid, in one direction; without perturbation the
    derivative exists everywhere."""
    direction = torch.randn(x[:1].shape, generator=seeded(7))
    step = 1e-4
    high, low = (grid_masses(vae, x[:1] + sign * step * direction, None) for sign in (1, -1))
    truth = ((high - low) / (2 * step))[0]
    images = x[:1].repeat(60, 1, 1, 1).requires_grad_()
    found = make(vae, None).log_masses(images, seeded(4)).log_mass
    for y in range(CLASSES):
        (gradient,) = torch.autograd.grad(found[:, y].sum(), images, retain_graph=True)
        slopes = (gradient * direction).flatten(1).sum(1)
        assert abs(float(slopes.mean() - truth[y])) < 4 * float(slopes.std()) / 60**0.5
        assert float(slopes.std()) / 60**0.5 < 0.2 * float(truth.abs().max())


def test_explanations_are_draws_of_the_posterior(vae, x):
    """Means of 40 runs against the grid's, for another class than the image's own too; and a
    positive latent comes on its own scale."""
    copies, reach, classes = 40, Linf(DELTA), torch.tensor([0, 2, 2])
    found = make(vae, reach).explain(x.repeat(copies, 1, 1, 1), classes.repeat(copies), seeded(6))
    assert found["z"].shape == (12, 3 * copies, 2)
    means = found["z"].mean(0).view(copies, 3, 2)
    z = torch.cartesian_prod(GRID, GRID)
    for number, y in enumerate(classes.tolist()):
        weights = (-energies(vae, x[number], y, z, reach)).softmax(0)
        error = means[:, number].std(0) / copies**0.5
        assert bool(((means[:, number].mean(0) - weights @ z).abs() < 4.5 * error).all())
        assert bool((error < 0.1).all())
    positive = make(TwoSites(), reach).explain(x, classes, seeded(6))
    assert bool((positive["b"] > 0).all())
    with pytest.raises(ValueError, match="classes"):
        make(vae, reach).explain(x, classes + 1)


def exact_margin(vae, x, log_prior):
    """The bound's margin, by masses on the grid, under one attack on both classes."""
    narrow, _ = reaches(Linf(EPSILON), DELTA)
    right = (grid_masses(vae, x, narrow) + log_prior).diagonal()
    z = torch.cartesian_prod(GRID, GRID)
    area = 2 * math.log(float(GRID[1] - GRID[0]))
    every = one_hot(LABELS, CLASSES).double()[:, None].expand(-1, len(z), -1)
    logits = [vae.logits(z, y).flatten(1) for y in every]
    wrong = torch.full((len(x), CLASSES), -math.inf)
    for y, image in enumerate(x):
        q = (-energies(vae, image, y, z, narrow)).softmax(0)
        for other in set(range(CLASSES)) - {y}:
            prior = 0.5 * (z - vae.shift[other]).square().sum(1) + math.log(2 * math.pi)
            under = energies_under_common_attack(
                image.flatten(), EPSILON, DELTA, logits[y], q, logits[other]
            )
            wrong[y, other] = (-(under + prior)).logsumexp(0) + area + log_prior[other]
    return right, wrong


def test_bound_is_the_less_favourable_of_two_estimates(vae, x):
    """Rising estimates and falling ones agree with the grid, each in its own mean."""
    copies, log_prior = 24, torch.tensor([0.0, 0.5, -0.5])
    classify = make(vae, Linf(DELTA), log_prior=log_prior)
    images, labels = x.repeat(copies, 1, 1, 1), LABELS.repeat(copies)
    bound = classify.margin_bound(images, labels, Linf(EPSILON), num_falling=6, generator=seeded(3))
    right, wrong = exact_margin(vae, x, log_prior)
    gap = bound.gap[:, 0]
    for estimate, sign in (
        (bound.right - gap.clamp(max=0), 1),
        (bound.right + gap.clamp(min=0), -1),
    ):
        weights = (sign * (estimate.view(copies, -1) - right)).exp()
        assert bool(((weights.mean(0) - 1).abs() < 4 * weights.std(0) / copies**0.5).all())
    # The larger of two estimates of a wrong class, the smaller of the right one: on the safe side.
    margin = bound.margin.view(copies, -1).mean(0)
    exact = right - wrong.amax(1)
    assert bool((margin < exact).all())
    assert bool((margin > exact - 1.0).all())
    others = ~torch.eye(CLASSES, dtype=torch.bool)
    found = bound.wrong.view(copies, CLASSES, CLASSES).mean(0)
    assert bool((found > wrong)[others].all())
    assert bool((bound.right.view(copies, -1).mean(0) < right).all())
    assert bool((bound.wrong.view(copies, CLASSES, -1).diagonal(0, 1, 2) == -math.inf).all())
    assert torch.equal(bound.kept, bound.margin > 0)


def test_no_attack_of_a_net_passes_the_bound(vae, x):
    """Corners of the ball, and the worst one for the decoder's logits at the image's own latent.
    The bound is better than that of two attacks."""
    zero = torch.zeros(CLASSES)
    right, wrong = exact_margin(vae, x, zero)
    bound = right - wrong.amax(1)
    of_two = grid_masses(vae, x, reaches(Linf(EPSILON), DELTA)[1]).fill_diagonal_(-math.inf)
    assert bool((bound > right - of_two.amax(1) + 0.05).all())
    signs = (torch.rand(6, 1, 2, 4, generator=seeded(4)) - 0.5).sign()
    for number, image in enumerate(x):
        corners = torch.cat([signs, -image.logit()[None].sign()])
        attacked = (image + EPSILON * corners).clamp(0, 1)
        masses = grid_masses(vae, attacked, Linf(DELTA))
        others = masses.clone()
        others[:, number] = -math.inf
        margins = masses[:, number] - others.amax(1)
        assert bool((margins >= bound[number]).all())
        clean = grid_masses(vae, image[None], Linf(DELTA))[0]
        clean_margin = clean[number] - clean[torch.arange(CLASSES) != number].amax()
        assert float(margins.min()) < float(clean_margin)  # attacks attack


def test_the_class_is_that_of_largest_mass(vae, x):
    classify = make(vae, Linf(DELTA))
    assert classify.predict(x, seeded(1)).tolist() == [0, 1, 2]
    sure = AnalysisBySynthesis(
        vae, CLASSES, log_prior=torch.tensor([-90.0, 0.0, -90.0]), num_temperatures=4
    )
    assert sure.predict(x, seeded(1)).tolist() == [1, 1, 1]


class OfIntensities(PlaneOfClass):
    """A Beta likelihood, which has no density where a pixel is 0."""

    def observe(self, x, z, y):
        mean = self.logits(z, y).sigmoid()
        image = dist.Beta(2 + mean, 3 - mean, validate_args=False).to_event(3)
        pyro.sample("x", image, obs=x)


def test_an_image_that_no_class_explains_has_none(x):
    """Not class 0, which the largest of numbers that are none would be."""
    grey = x.clamp(0.1, 0.9)
    classify = AnalysisBySynthesis(OfIntensities(), CLASSES, num_temperatures=3, num_walks=2)
    assert classify.predict(grey).shape == (len(x),)
    black = grey.clone()
    black[1, 0, 0, 0] = 0.0
    assert not classify.log_masses(black).log_mass[1].isfinite().any()
    with pytest.raises(ValueError, match=r"likeliest class is not finite for 1 of .*rows: \[1\]"):
        classify.predict(black)


class ObservesItsClass(PlaneOfClass):
    probs = torch.tensor([0.8, 0.15, 0.05], dtype=torch.float64)

    def model(self, x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.OneHotCategorical(self.probs), obs=y)
            z = pyro.sample("z", dist.Normal(y @ self.shift, 1.0).to_event(1))
            self.observe(x, z, y)


class WeighsItsClass(ObservesItsClass):
    def model(self, x, y):
        with pyro.plate("data", len(x)):
            pyro.factor("y", y @ self.probs.log())
            z = pyro.sample("z", dist.Normal(y @ self.shift, 1.0).to_event(1))
            self.observe(x, z, y)


class WeighsItsLatents(PlaneOfClass):
    def model(self, x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.factor("prior", (z @ self.shift.mT * y).sum(-1))  # of the first class, nothing
            self.observe(x, z, y)


PRIOR_OPTIONS = {"num_temperatures": 3, "num_steps": 1, "num_walks": 2}


@pytest.mark.parametrize("kind", [ObservesItsClass, WeighsItsClass])
def test_priors_of_classes_count_once(vae, x, kind):
    """Those of a model that observes or weighs its class are in its masses."""
    weighing = kind()
    log_prior = weighing.probs.log()
    expected, own = (
        AnalysisBySynthesis(each, CLASSES, log_prior=prior, **PRIOR_OPTIONS).log_posterior(
            x, seeded(1)
        )
        for each, prior in ((vae, log_prior), (weighing, None))
    )
    assert torch.allclose(own, expected)
    with pytest.raises(ValueError, match="log_prior is given, and the model .* site 'y'"):
        AnalysisBySynthesis(weighing, CLASSES, log_prior=log_prior, **PRIOR_OPTIONS).predict(x)
    hidden, alike = kind(), kind()
    hidden.model = poutine.block(hidden.model, hide=["y"])
    alike.probs = torch.ones(CLASSES, dtype=torch.float64) / CLASSES  # weigh nothing
    for each in (hidden, alike):
        again = AnalysisBySynthesis(each, CLASSES, log_prior=log_prior, **PRIOR_OPTIONS)
        assert torch.allclose(again.log_posterior(x, seeded(1)), expected)


def test_a_prior_of_latents_is_none_of_classes(x):
    log_prior = torch.tensor([0.0, 1.0, 2.0])
    alone, both = (
        AnalysisBySynthesis(WeighsItsLatents(), CLASSES, log_prior=prior, **PRIOR_OPTIONS)
        for prior in (None, log_prior)
    )
    expected = (alone.log_posterior(x, seeded(1)) + log_prior).log_softmax(-1)
    assert torch.allclose(both.log_posterior(x, seeded(1)), expected)


def test_an_image_is_the_same_in_any_batch(vae, x):
    options = {"num_temperatures": 4, "num_walks": 4}
    whole = make(vae, Linf(DELTA), **options).log_masses(x, seeded(1))
    parts = make(vae, Linf(DELTA), **options, rows=1).log_masses(x, seeded(1))
    alone = make(vae, Linf(DELTA), **options).log_masses(x[:1], seeded(1))
    for one, other, first in zip(whole, parts, alone, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)
        assert torch.allclose(one[:1], first, rtol=0, atol=1e-9)
    bounds = [
        make(vae, Linf(DELTA), **options, rows=rows).margin_bound(
            x, LABELS, Linf(EPSILON), generator=seeded(1)
        )
        for rows in (1600, 8)
    ]
    assert all(bound.common_attack for bound in bounds)
    for one, other in zip(*(bound[:-1] for bound in bounds), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)
    again = make(vae, Linf(DELTA), **options).margin_bound(
        x, LABELS, Linf(EPSILON), generator=seeded(1)
    )
    assert torch.equal(again.wrong, bounds[0].wrong)


def test_a_metric_changes_walks_and_no_mass(vae, x):
    metric = {"z": torch.tensor([0.3, 0.5])}
    copies = 30
    found = make(vae, Linf(DELTA), inverse_mass_matrix=metric).log_masses(
        x[:1].repeat(copies, 1, 1, 1), seeded(2)
    )
    weights = (found.log_mass - grid_masses(vae, x[:1], Linf(DELTA))).exp()
    assert bool(((weights.mean(0) - 1).abs() < 4 * weights.std(0) / copies**0.5).all())
    plain = make(vae, Linf(DELTA)).log_masses(x[:1], seeded(2)).log_mass
    assert not torch.equal(plain[0], found.log_mass[0])


def test_what_was_replaced_is_what_counts(vae, x):
    """A VAE, its weights, a metric or a perturbation: as of a classifier made with them."""
    options = {"num_classes": CLASSES, "num_temperatures": 4, "num_walks": 2}
    options |= {"vae": vae, "perturbation": Linf(DELTA)}
    classify, other = AnalysisBySynthesis(**options), PlaneOfClass()

    def changed(before):
        found, expected = (
            each.log_masses(x, seeded(1)).log_mass
            for each in (classify, AnalysisBySynthesis(**options))
        )
        assert torch.equal(found, expected)
        assert not torch.equal(found, before)
        return found

    found = changed(torch.zeros(3, 3))
    other.shift = other.shift + 3.0
    for name, value in (
        ("inverse_mass_matrix", {"z": torch.tensor([0.3, 0.5])}),
        ("perturbation", Linf(0.01)),
        ("vae", other),
        ("num_walks", 3),
    ):
        options[name] = value
        setattr(classify, name, value)
        found = changed(found)
    other.shift -= 6.0  # as training changes weights
    changed(found)


def test_rows_bound_what_is_computed_at_once(x):
    """Where all walks of one image are more than that, too."""
    seen = []

    class Watched(PlaneOfClass):
        def observe(self, x, z, y):
            seen.append(len(x))
            super().observe(x, z, y)

    options = {"num_temperatures": 3, "num_walks": 4}
    few = make(Watched(), None, **options, rows=200).log_masses(x, seeded(1))
    assert max(seen) == 200
    seen.clear()
    few = make(Watched(), None, **options, rows=8).log_masses(x, seeded(1))
    assert max(seen[len(seen) // 2 :]) == 8
    seen.clear()
    make(Watched(), None, **(options | {"num_walks": 2}), rows=200).log_masses(x, seeded(1))
    assert max(seen) == 200  # pilots are more
    every = make(Watched(), None, **options).log_masses(x, seeded(1))
    assert torch.allclose(few.log_mass, every.log_mass)


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("num_walks", 0),
            ("num_walks", 1),
            ("num_temperatures", 2),
            ("num_steps", 0),
            ("rows", 0),
            ("num_classes", 1),
            ("perturbation", 0.1),
            ("log_prior", torch.zeros(2)),
            ("inverse_mass_matrix", {"z": -torch.ones(2)}),
        ],
    )
    def test_that_were_replaced(self, vae, x, name, value):
        classify = make(vae, Linf(DELTA))
        setattr(classify, name, value)
        for call in (
            classify.predict,
            lambda x: classify.explain(x, LABELS),
            lambda x: classify.margin_bound(x, LABELS, Linf(EPSILON)),
        ):
            with pytest.raises(ValueError, match=name):
                call(x)

    def test_of_the_classifier(self, vae):
        for options, message in (
            ({"num_classes": 1}, "num_classes"),
            ({"perturbation": 0.1}, "perturbation"),
            ({"log_prior": torch.zeros(2)}, "log_prior"),
            ({"log_prior": "uniform"}, "log_prior must be 3 finite numbers, .* got 'uniform'"),
            ({"log_prior": torch.tensor([0.0, 0.0, -math.inf])}, "log_prior"),
            ({"num_temperatures": 2}, "num_temperatures"),
            ({"num_steps": 0}, "num_steps"),
            ({"num_walks": 1}, "num_walks"),
            ({"rows": 0}, "rows"),
        ):
            with pytest.raises(ValueError, match=message):
                AnalysisBySynthesis(vae, **{"num_classes": CLASSES, **options})

    def test_of_images(self, vae, x):
        classify = make(vae, Linf(DELTA))
        with pytest.raises(ValueError, match="images alone"):
            classify.log_masses((x, torch.eye(3)))
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            classify.log_masses(x + 1)
        with pytest.raises(ValueError, match="x "):
            classify.log_masses(x[:0])

    def test_of_programs(self, x, vae):
        class Unconditional:
            def model(self, x):
                vae.model(x, torch.eye(CLASSES)[:1].expand(len(x), -1))

            def guide(self, x):
                vae.guide(x, torch.eye(CLASSES)[:1].expand(len(x), -1))

        with pytest.raises(ValueError, match="conditions"):
            make(Unconditional(), None).log_masses(x)
        with pytest.raises(ValueError, match=r"vae\.model failed"):
            AnalysisBySynthesis(vae, 4, num_temperatures=3).log_masses(x)
        mappings = {"w": torch.ones(2)}, {"z": torch.ones(3)}, {"z": torch.zeros(2)}, {"z": 1.0}
        for metric in (*mappings, torch.ones(2)):
            with pytest.raises(ValueError, match="inverse_mass_matrix"):
                make(vae, None, inverse_mass_matrix=metric).log_masses(x)

    def test_of_the_bound(self, vae, x):
        classify = make(vae, Linf(DELTA))
        for wrong in (LABELS[:2], LABELS.double(), LABELS > 0, LABELS + 1, LABELS - 1):
            with pytest.raises(ValueError, match="labels"):
                classify.margin_bound(x, wrong, Linf(EPSILON))
        with pytest.raises(ValueError, match="delta"):
            classify.margin_bound(x, LABELS, Linf(0.09))
        with pytest.raises(ValueError, match="kind"):
            classify.margin_bound(x, LABELS, L2(0.01))
        with pytest.raises(ValueError, match="kind"):
            make(vae, None).margin_bound(x, LABELS, Linf(0.01))
        for number in (0, 17):
            with pytest.raises(ValueError, match="num_falling"):
                classify.margin_bound(x, LABELS, Linf(EPSILON), num_falling=number)
