"""No inner loop makes the host wait for the device, and nothing mixes devices: seen on the device
of :mod:`elsewhere`, which needs no GPU."""

from __future__ import annotations

import functools

import objectives_programs
import pyro
import pytest
import torch
from devices import to
from elsewhere import HERE, THERE, Elsewhere, waits
from kernels import FACTORIES
from optimisers import OPTIMISERS
from programs import TutorialVAE
from pyro.infer import SVI

from pyro_vae_defence import attacks, training
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.models.classifier import LinearClassifier
from pyro_vae_defence.models.perturbation import UnknownRadius
from pyro_vae_defence.objectives import AVAE, AVAESS, SE, SEAVAE, BetaELBO, BetaTCVAE
from pyro_vae_defence.ops.balls import L1, L2, Linf
from pyro_vae_defence.ops.streams import Streams


@pytest.fixture(autouse=True)
def _elsewhere():
    with Elsewhere():
        yield


@pytest.fixture
def x():
    return torch.rand(3, 1, 28, 28, device=THERE)


class TestTheDevice:
    """What the other tests rely on."""

    def test_operations_are_those_of_the_cpu(self):
        here = torch.rand(3, 4, requires_grad=True)
        there = here.detach().to(THERE).requires_grad_()
        for x in (here, there):
            (x.square().sum(1) * torch.arange(3, device=x.device)).sum().backward()
        assert there.grad.device == THERE
        assert torch.equal(there.grad.to(HERE), here.grad)

    def test_in_place_changes_are_seen_through_views(self):
        x = torch.zeros(3, device=THERE)
        x[1:].add_(2.0)
        assert x.tolist() == [0.0, 2.0, 2.0]
        assert x.mul_(2.0) is x

    def test_devices_do_not_mix(self):
        x = torch.ones(3, device=THERE)
        with pytest.raises(RuntimeError, match="different devices"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=THERE, generator=torch.Generator())
        with pytest.raises((RuntimeError, TypeError), match="numpy"):
            x.numpy()
        assert (x + torch.tensor(1.0)).tolist() == [2.0, 2.0, 2.0]  # a number

    @pytest.mark.parametrize(
        "ask",
        [
            lambda x: float(x.sum()),
            lambda x: bool((x > 0).all()),
            lambda x: x[x > 0],
            lambda x: x.nonzero(),
            lambda x: x.to(HERE),
            lambda x: x.tolist(),
            lambda x: torch.ones(3).to(THERE),
            lambda x: torch.tensor(1.0, device=THERE),
            lambda x: x[[0, 1]],
            lambda x: torch.equal(x, x),
        ],
    )
    def test_the_host_waits(self, ask):
        x = torch.ones(3, device=THERE)
        with waits() as found:
            ask(x)
        assert len(found) == 1

    def test_the_host_does_not_wait(self):
        x = torch.ones(3, device=THERE)
        with waits() as found:
            y = torch.where(x > 0, x, 0.0) + x.new_zeros(3) + torch.full_like(x, 2.0)
            y[1:] = 0.0
            torch.arange(4, device=THERE)[y.long()]
        assert found == []


# --- Chains ---------------------------------------------------------------------------------------

TARGETS = {
    "plain": None,
    "linf": Linf(0.1),
    "l2": L2(1.0),
    "l1": L1(3.0),
    "unknown": UnknownRadius(Linf, (0.0, 0.1), (0.0, 1.0)),
}


def transitions(factory, vae, x, perturbation=None):
    """Host waits of a transition each of warm-up, its end, and after it."""
    kernel = factory(program.target(to(vae, THERE), perturbation))
    kernel.streams = Streams.create(len(x), seed=1, device=THERE)
    kernel.setup(3, x)
    latents = kernel.sample(kernel.initial_params)  # which checks the start
    found = []
    for _ in range(3):
        with waits() as asked:
            latents = kernel.sample(latents)
        found.append((asked, kernel.info))
    return found


@pytest.mark.parametrize("name", [name for name in FACTORIES if name != "nuts"])
def test_a_transition_does_not_wait(name, x):
    for asked, _ in transitions(FACTORIES[name], TutorialVAE(), x):
        assert asked == []


@pytest.mark.parametrize("perturbation", TARGETS.values(), ids=TARGETS)
def test_energies_do_not_wait(perturbation, x):
    factory = functools.partial(BatchedHMC, num_steps=1)
    for asked, _ in transitions(factory, ConvVAE().eval(), x, perturbation):
        assert asked == []


def test_nuts_asks_once_per_leaf_whether_any_tree_grows(x):
    factory = functools.partial(BatchedNUTS, max_tree_depth=3)
    for asked, info in transitions(factory, TutorialVAE(), x):
        leaves = int(info.num_steps.max())
        assert all("nuts.py" in each and "_local_scalar_dense" in each for each in asked)
        assert len(asked) <= leaves + 1


# --- Attacks --------------------------------------------------------------------------------------


def steps(attack, x):
    """Host waits of an attack's steps, after the first, and of its end."""
    streams = Streams.create(len(x), seed=1, device=THERE)
    problem, _ = attack._prepare((x,), streams)
    state = attack._step(problem, attack._start(problem), 0)
    with waits() as asked:
        for t in range(1, attack.num_steps):
            state = attack._step(problem, state, t)
        attack._finish(problem, state)
    return asked


@pytest.mark.parametrize("ball", [Linf(0.1), L2(1.0), L1(3.0)], ids=str)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_attack_step_does_not_wait(name, ball, x):
    if name == "Square" and isinstance(ball, L1):
        pytest.skip("Square is defined for L_inf and L2")
    objective = attacks.symmetric_kl(to(TutorialVAE(), THERE))
    assert steps(OPTIMISERS[name](objective, ball, num_steps=4), x) == []


OBJECTIVES = {
    "symmetric_kl": lambda vae, classifier, y, labels: attacks.symmetric_kl(vae),
    "mean_distance": lambda vae, classifier, y, labels: attacks.mean_distance(vae, y),
    "maximum_damage": lambda vae, classifier, y, labels: attacks.maximum_damage(vae),
    "draws": lambda vae, classifier, y, labels: attacks.maximum_damage(vae, latents="sample"),
    "targeted_output": lambda vae, classifier, y, labels: attacks.targeted_output(vae, y),
    "cross_entropy": lambda vae, classifier, y, labels: attacks.cross_entropy(
        vae, classifier, labels
    ),
    "dlr": lambda vae, classifier, y, labels: attacks.dlr(vae, classifier, labels),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_do_not_wait(name, x):
    labels = torch.arange(len(x), device=THERE)
    given = to((TutorialVAE().eval(), LinearClassifier(5, 4)), THERE)
    objective = OBJECTIVES[name](*given, x.flip(0), labels)
    assert steps(attacks.PGD(objective, Linf(0.1), num_steps=3), x) == []


# --- Training -------------------------------------------------------------------------------------


@pytest.fixture
def unvalidated():
    """Pyro reads back the parameters of every distribution where it validates them."""
    with pyro.validation_enabled(False):
        yield


@pytest.fixture
def small():
    return torch.rand(4, 1, 8, 8, device=THERE)


def perturb(x):
    return (x + 0.1 * torch.rand_like(x)).clamp(0, 1)


TRAINING = {
    "elbo": BetaELBO,
    "particles": lambda: BetaELBO(num_particles=3),
    "tcvae": lambda: BetaTCVAE(5.0, 100),
    "se": lambda: SE(perturb, 2.0),
    "avae": AVAE,
    "avae-ss": AVAESS,
    "se-avae": lambda: SEAVAE(perturb, 2.0),
}


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.usefixtures("unvalidated")
def test_a_training_step_reads_its_loss(name, small):
    vae, objective = objectives_programs.TutorialVAE().to(THERE), TRAINING[name]()
    optimiser = torch.optim.Adam(vae.parameters())
    for number in range(2):
        with waits() as asked:
            objective.loss_and_grads(vae.model, vae.guide, small)
            optimiser.step()
        assert number == 0 or len(asked) == 1


@pytest.mark.usefixtures("unvalidated")
def test_a_step_of_svi_reads_its_loss(small):
    vae = objectives_programs.TutorialVAE().to(THERE)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), BetaELBO())
    svi.step(small)
    with waits() as asked:
        svi.step(small)
    assert len(asked) == 1


@pytest.mark.usefixtures("unvalidated")
def test_fit_reads_images_loss_and_norm(small):
    """What stops a run before it spoils its weights: three numbers a step, and no more."""
    vae = objectives_programs.TutorialVAE().to(THERE)
    config = training.FitConfig(1, schedule="constant", clip_norm=1.0, posterior_variance=False)
    with waits() as few:
        training.fit(vae, BetaELBO(), [small] * 2, config)
    with waits() as many:
        training.fit(vae, BetaELBO(), [small] * 5, config)
    assert len(many) - len(few) == 3 * 3
