"""Every attack, objective and adaptive gradient finds the same images on both devices."""

from __future__ import annotations

import functools

import pytest
import torch
from devices import agree, to
from optimisers import OPTIMISERS
from programs import TutorialVAE

from pyro_vae_defence import attacks
from pyro_vae_defence.attacks.margin import r_margin
from pyro_vae_defence.attacks.noise import random_noise
from pyro_vae_defence.defence import DefendedClassifier, MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models.classifier import LinearClassifier
from pyro_vae_defence.ops.balls import L1, L2, Linf
from pyro_vae_defence.robustness import KNOWLEDGE, Budget, evaluate_robustness

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("float64")]

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
BALLS = [Linf(0.1), L2(1.0), L1(3.0)]


@pytest.fixture
def x():
    return torch.rand(4, 1, 28, 28)


@pytest.fixture
def vae():
    return TutorialVAE().eval()


LABELS = torch.tensor([0, 3, 1, 2])


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("ball", BALLS, ids=str)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers(device, name, ball, vae, x):
    if name == "Square" and isinstance(ball, L1):
        pytest.skip("Square is defined for L_inf and L2")

    def run(place):
        objective = attacks.symmetric_kl(to(vae, place))
        attack = OPTIMISERS[name](objective, ball, num_steps=4, num_restarts=2)
        return attack(x.to(place), seeded())

    found = agree(run, device, **CLOSE)
    assert (ball.norm((found.x_adv - found.x_ref).flatten(0, 1)) <= ball.radius).all()


OBJECTIVES = {
    "forward_kl": lambda vae, classifier, y, labels: attacks.forward_kl(vae),
    "reverse_kl": lambda vae, classifier, y, labels: attacks.reverse_kl(vae),
    "mean_distance": lambda vae, classifier, y, labels: attacks.mean_distance(vae),
    "squared_wasserstein": lambda vae, classifier, y, labels: attacks.squared_wasserstein(vae),
    "to a target": lambda vae, classifier, y, labels: attacks.symmetric_kl(vae, y),
    "maximum_damage": lambda vae, classifier, y, labels: attacks.maximum_damage(vae),
    "draws": lambda vae, classifier, y, labels: attacks.maximum_damage(
        vae, latents="sample", num_draws=2
    ),
    "targeted_output": lambda vae, classifier, y, labels: attacks.targeted_output(vae, y),
    "cross_entropy": lambda vae, classifier, y, labels: attacks.cross_entropy(
        vae, classifier, labels
    ),
    "dlr": lambda vae, classifier, y, labels: attacks.dlr(vae, classifier, labels),
    "own labels": lambda vae, classifier, y, labels: attacks.cross_entropy(vae, classifier),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(device, name, vae, x):
    y, classifier = torch.rand_like(x), LinearClassifier(5, 4)

    def run(place):
        given = (to(value, place) for value in (vae, classifier, y, LABELS))
        attack = attacks.PGD(OBJECTIVES[name](*given), Linf(0.1), num_steps=3, batch_size=3)
        return attack(x.to(place), seeded())

    agree(run, device, **CLOSE)


def test_rows_leave_when_they_are_done(device, vae, x):
    classifier = LinearClassifier(5, 4)

    def run(place):
        mine, judge, labels = (to(value, place) for value in (vae, classifier, LABELS))
        attack = attacks.APGD(
            attacks.cross_entropy(mine, judge, labels), Linf(0.2), num_steps=8, num_restarts=2,
            stop=attacks.misclassified(mine, judge, labels),
        )  # fmt: skip
        return attack(x.to(place), seeded()), attack(x.to(place), seeded()).best()

    agree(run, device, **CLOSE)


def test_progress_is_kept_and_taken_up(device, vae, x, tmp_path):
    if device.type == "lazy":
        pytest.skip("no file holds tensors of this device")

    class InterruptedError(Exception):
        pass

    objective = attacks.symmetric_kl(to(vae, device))
    calls = []

    def interrupted(x_ref, streams):
        inner = objective(x_ref, streams)

        def value(y):
            calls.append(1)
            if len(calls) == 4:
                raise InterruptedError
            return inner(y)

        return value

    settings = {"num_steps": 5, "checkpoint": tmp_path / "attack.pt", "checkpoint_every": 1}
    with pytest.raises(InterruptedError):
        attacks.PGD(interrupted, Linf(0.1), **settings)(x.to(device), seeded())
    resumed = attacks.PGD(objective, Linf(0.1), **settings)(x.to(device), seeded(5))
    whole = attacks.PGD(objective, Linf(0.1), num_steps=5)(x.to(device), seeded())
    torch.testing.assert_close(resumed.x_adv, whole.x_adv)


@pytest.mark.parametrize("ball", BALLS, ids=str)
def test_noise(device, ball, x):
    agree(lambda place: random_noise(x.to(place), ball, seeded()), device)


def test_margin(device, vae, x):
    def run(place):
        mine = to(vae, place)
        attack = attacks.PGD(attacks.maximum_damage(mine), L2(3.0), num_steps=2)
        options = {"num_bisections": 2, "num_draws": 2, "generator": seeded()}
        return r_margin(mine, attack, x.to(place), 0.5, **options)

    agree(run, device)


@pytest.mark.parametrize("name", KNOWLEDGE)
def test_adaptive_attacks(device, name, vae, x):
    """Each row of the suite, scored and checked: the estimators of ``attacks.adaptive``."""
    classifier = LinearClassifier(5, 4)
    budget = Budget(
        num_steps=2, num_restarts=1, num_draws=(1,), num_chains=2, num_iterations=2,
        num_directions=2, black_box_steps=2, selection_draws=1, scoring_draws=2, check_images=2,
        check_steps=4, persistent_transitions=1, unrolled_transitions=1,
    )  # fmt: skip

    def run(place):
        mine = to(vae, place)
        kernel = functools.partial(BatchedHMC, num_steps=2)
        defence = MCMCDefence(mine, kernel, num_samples=2, warmup_steps=2)
        report = evaluate_robustness(
            mine, defence, x[:3].to(place), LABELS[:3].to(place),
            classifier=DefendedClassifier(defence, to(classifier, place)),
            ball=Linf(0.1), budget=budget, attacks=(name,), generator=seeded(),
        )  # fmt: skip
        return report.x_adv

    agree(run, device, **CLOSE)
