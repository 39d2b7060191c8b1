"""The attack on the evidence of the right class: its gradient against a grid, its populations, and
what it leaves where other gradients have nothing to go by."""

from __future__ import annotations

import functools

import pytest
import torch
from programs import PlaneVAE, plane_classifier

from pyro_vae_defence.attacks import APGD, adaptive
from pyro_vae_defence.defence import DefendedClassifier, MCMCDefence, NoDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import program
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.robustness import Budget, WhiteBox, evaluate_robustness
from pyro_vae_defence.robustness.cost import chain_cost, suite_gradients
from pyro_vae_defence.robustness.populations import Constrained

GRID = torch.linspace(-5, 5, 101, dtype=torch.float64)
DELTA, EPSILON = 0.05, 0.15


@pytest.fixture
def vae(float64):
    return PlaneVAE()


@pytest.fixture
def x(vae):
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(5))
    return (z @ vae.weight.T).sigmoid().view(-1, 1, 2, 4)


def read(vae, latents):
    decoded = (latents @ vae.weight.T).sigmoid().view(-1, 1, 2, 4)
    return plane_classifier(program.posterior_mean(vae, decoded)["z"]).argmax(-1)


@pytest.fixture
def labels(vae, x):
    return read(vae, program.posterior_mean(vae, x)["z"])


def on_grid(vae, x, labels):
    """Energies of a grid ``(points, N)``, and whether a point is read as the label."""
    z = torch.cartesian_prod(GRID, GRID)
    energies = [
        program.potential(vae, image.expand(len(z), -1, -1, -1), Linf(DELTA))({"z": z})
        for image in x
    ]
    return z, torch.stack(energies, 1), read(vae, z)[:, None] == labels


def log_ratio(vae, x, labels):
    """Log-mass of the wrong classes less that of the right one, ``(N,)``."""
    _, energies, right = on_grid(vae, x, labels)
    wrong = (-energies).masked_fill(right, -torch.inf).logsumexp(0)
    return wrong - (-energies).masked_fill(~right, -torch.inf).logsumexp(0)


def test_gradient_is_that_of_the_log_ratio(vae, x, labels):
    """With exact draws of either set from a grid; every pixel within four standard errors of the
    derivative of the grid's sums: fails for one right implementation in 600."""
    number = 4000
    z, energies, right = on_grid(vae, x, labels)

    def population(inside):
        weights = (-energies).masked_fill(~inside, -torch.inf).softmax(0)
        drawn = torch.multinomial(weights.T, number, replacement=True).T.flatten()
        there = torch.ones(number * len(x), dtype=torch.bool)
        return lambda x_ref: lambda images, previous, streams: ({"z": z[drawn]}, there)

    def energy(images, latents):
        return program.potential(vae, images, Linf(DELTA))(latents)

    objective = adaptive.evidence(population(right), population(~right), energy, number)(x)
    image = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(objective(image).sum(), image)
    image = x.clone().requires_grad_()
    (exact,) = torch.autograd.grad(log_ratio(vae, image, labels).sum(), image)
    # The spread of one draw's gradient bounds that of the mean of many.
    repeated = x.repeat(number, 1, 1, 1).requires_grad_()
    spread = 0.0
    for inside in (right, ~right):
        latents, _ = population(inside)(x)(None, None, None)
        (each,) = torch.autograd.grad(energy(repeated, latents).sum(), repeated)
        spread = spread + each.view(number, *x.shape).var(0) / number
    assert bool(((found - exact).abs() <= 4 * spread.sqrt() + 1e-9).all())
    assert float(exact.abs().max()) > 20 * float(spread.sqrt().max())


@pytest.fixture
def defence(vae):
    kernel = functools.partial(BatchedHMC, step_size=0.3, num_steps=3)
    return MCMCDefence(vae, kernel, 4, 4, 1, perturbation=Linf(DELTA))


def margin(vae, labels, x_ref):
    def classify(latents, x):
        decoded = (latents["z"] @ vae.weight.T).sigmoid().view(-1, 1, 2, 4)
        return plane_classifier(program.posterior_mean(vae, decoded)["z"])

    return adaptive.misclassification(classify, labels)(x_ref)


def test_populations_stay_in_their_sets_and_reach_their_moments(vae, x, labels, defence):
    """Means of energies over either set, from chains that started at a search."""
    chains, copies = 40, x.repeat(40, 1, 1, 1)
    box = WhiteBox(vae, defence, x)
    of_class = functools.partial(margin, vae, labels)
    own = Constrained(box, of_class, Linf(EPSILON), chains, number=2)
    _, energies, right = on_grid(vae, x, labels)
    for population, inside, wrong in (
        (own.right(copies), right, False),
        (own.wrong(copies), ~right, True),
    ):
        latents, means = None, []
        for call in range(60):
            streams = Streams.create(len(x), chains, seed=100 + call)
            latents, there = population(copies, latents, streams)
            assert bool(there.all())
            assert bool(((of_class(copies)(latents, copies) > 0) == wrong).all())
            means.append(box.energy(copies, latents).view(chains, -1).mean(0))
        weights = (-energies).masked_fill(~inside, -torch.inf).softmax(0)
        exact = (weights * energies).sum(0)
        # 40 chains of 80 transitions behind their start: a tenth of the deviation of one draw would
        # be some 60 independent ones.
        deviation = ((weights * energies.square()).sum(0) - exact.square()).sqrt()
        assert bool(((torch.stack(means[20:]).mean(0) - exact).abs() < 0.2 * deviation).all())


def test_a_set_without_a_candidate_pulls_nobody(vae, x, labels, defence):
    box = WhiteBox(vae, defence, x)
    everywhere = lambda x_ref: lambda latents, x: -torch.ones(len(x_ref))  # noqa: E731
    own = Constrained(box, everywhere, Linf(EPSILON), 2, number=1)
    _, there = own.wrong(x.repeat(2, 1, 1, 1))(
        x.repeat(2, 1, 1, 1), None, Streams.create(len(x), 2, seed=0)
    )
    assert not bool(there.any())
    objective = adaptive.evidence(own.right, own.wrong, box.energy, 2)(x)
    assert bool(objective(x).isfinite().all())


def test_attack_takes_mass_where_all_draws_agree(vae, x, labels, defence):
    """Judged by the sums of the grid: more than nine of ten corners of the ball."""
    box, fresh = WhiteBox(vae, defence, x), torch.Generator().manual_seed(3)
    own = Constrained(box, functools.partial(margin, vae, labels), Linf(EPSILON), 8, number=1)
    objective = adaptive.evidence(own.right, own.wrong, box.energy, 8, generator=fresh)
    found = APGD(objective, Linf(EPSILON), num_steps=12)(x, fresh).x_adv[0]
    corners = [
        (x + EPSILON * (torch.rand(x.shape, generator=fresh) - 0.5).sign()).clamp(0, 1)
        for _ in range(30)
    ]
    at_random = torch.stack([log_ratio(vae, corner, labels) for corner in corners]).quantile(0.9, 0)
    taken, clean = log_ratio(vae, found, labels), log_ratio(vae, x, labels)
    assert bool((taken > clean + 0.5).all())
    assert bool((taken > at_random).all())


def test_in_the_suite_it_runs_beside_the_others(vae, x, labels, defence):
    budget = Budget(num_steps=3, num_restarts=1, num_draws=(1,), num_chains=2, scoring_draws=2)
    report = evaluate_robustness(
        vae,
        defence,
        x,
        labels,
        classifier=DefendedClassifier(defence, plane_classifier, "vote"),
        ball=Linf(EPSILON),
        budget=budget,
        attacks=("equilibrium", "evidence"),
        checks=False,
        generator=torch.Generator().manual_seed(0),
    )
    assert [each.name for each in report.attacks] == ["equilibrium", "evidence"]
    expected = suite_gradients(chain_cost(defence), budget, len(x), ("evidence",), checks=False)
    ratio = report.attacks[1].evaluations / expected["evidence"]
    assert 0.7 < ratio < 6  # its search is not in the estimate, and large beside three steps


def test_it_says_where_it_does_not_apply(vae, x, labels):
    budget = Budget.quick()
    of_images = evaluate_robustness(
        vae, NoDefence(vae), x, budget=budget, attacks=("transfer", "evidence"), checks=False,
        similarity=lambda a, b: -(a - b).square().flatten(1).sum(1),
    )  # fmt: skip
    assert "classifier" in of_images.skipped["evidence"]
