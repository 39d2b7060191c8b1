"""Surrogates with a tempered likelihood, and the attack that goes through them to the defence."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import LinearGaussianVAE
from pyro import poutine
from test_robustness import SMALL, classify, problem, run

from pyro_vae_defence import attacks
from pyro_vae_defence.attacks.starts import given
from pyro_vae_defence.defence import DefendedClassifier, MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.models.compiled import Recorder
from pyro_vae_defence.models.perturbation import UnknownRadius
from pyro_vae_defence.models.program import ModelPotential
from pyro_vae_defence.models.tempered import Tempered, tempered
from pyro_vae_defence.ops.balls import L2, Linf
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.robustness import ATTACKS, WhiteBox
from pyro_vae_defence.robustness.cost import ChainCost, chain_cost, suite_gradients
from pyro_vae_defence.robustness.scoring import Accuracy, Fresh
from pyro_vae_defence.robustness.suite import Suite

ROWS = {row.name: row for row in ATTACKS}
HMC = functools.partial(BatchedHMC, step_size=0.04, num_steps=3)


class Several:
    """A positive latent, an image in two parts, one under a mask, a label, and a factor."""

    def __init__(self):
        self.weight = torch.randn(2, 16, generator=torch.Generator().manual_seed(2)).double()

    def model(self, x, y):
        flat = x.flatten(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(flat.new_full((len(x), 2), 2.0), 1.0).to_event(1))
            mean = z @ self.weight
            pyro.factor("weight", -0.1 * z.sum(1))
            with poutine.mask(mask=y > 0):
                top = dist.Normal(mean[:, :8], torch.full_like(mean[:, :8], 0.5)).to_event(1)
                pyro.sample("top", top, obs=flat[:, :8])
            bottom = dist.Bernoulli(logits=mean[:, 8:], validate_args=False).to_event(1)
            pyro.sample("bottom", bottom, obs=flat[:, 8:])
            pyro.sample("label", dist.Bernoulli(logits=z[:, 0]), obs=y)


class TestTempered:
    @pytest.mark.parametrize(
        "perturbation",
        [None, Linf(0.1), L2(0.5), UnknownRadius(Linf, (0.0, 0.1), (0.0, 3.0))],
        ids=str,
    )
    def test_energy_is_the_sum_of_its_parts(self, float64, perturbation):
        vae, x = ConvVAE().double().eval(), torch.rand(3, 1, 28, 28)
        target = program.target(vae, perturbation)
        z = {"z": torch.randn(3, 64)}
        whole = ModelPotential(target, x)(z)
        of_prior = -dist.Normal(0.0, 1.0).log_prob(z["z"]).sum(1)
        found = ModelPotential(Tempered(target, 0.3), x)(z)
        torch.testing.assert_close(found, 0.3 * (whole - of_prior) + of_prior)
        assert torch.equal(ModelPotential(Tempered(target, 1.0), x)(z), whole)

    def test_all_that_is_observed_is_tempered_and_nothing_else(self, float64):
        vae, x, y = Several(), torch.rand(4, 1, 4, 4), torch.tensor([0.0, 1.0, 1.0, 0.0])
        log_z = {"z": torch.randn(4, 2)}
        z = log_z["z"].exp()
        mean = z @ vae.weight
        flat = x.flatten(1)
        likelihood = (
            y * dist.Normal(mean[:, :8], 0.5).log_prob(flat[:, :8]).sum(1)
            + (flat[:, 8:] * mean[:, 8:] - torch.nn.functional.softplus(mean[:, 8:])).sum(1)
            + y * z[:, 0] - torch.nn.functional.softplus(z[:, 0])
        )  # fmt: skip
        # With the logarithm of the derivative of exp.
        prior = dist.Gamma(2.0, 1.0).log_prob(z).sum(1) - 0.1 * z.sum(1) + log_z["z"].sum(1)
        for b in (0.2, 1.0):
            found = ModelPotential(Tempered(vae.model, b), x, y)(log_z)
            torch.testing.assert_close(found, -b * likelihood - prior)

    def test_values_of_a_discrete_latent_have_a_likelihood_each(self, float64):
        def model(x):
            flat = x.flatten(1)
            with pyro.plate("data", len(x)):
                y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])))
                z = pyro.sample("z", dist.Normal(flat.new_zeros(len(x)), 1.0))
                mean = (z + 2.0 * y)[..., None].expand((*y.shape[:-1], len(x), 16))
                pyro.sample("x", dist.Normal(mean, 0.8).to_event(1), obs=flat)

        x, z = torch.rand(3, 1, 4, 4), torch.randn(3)
        values = [
            torch.tensor(p).log()
            + 0.2 * dist.Normal((z + 2.0 * y)[:, None], 0.8).log_prob(x.flatten(1)).sum(1)
            for y, p in ((0, 0.3), (1, 0.7))
        ]
        expected = -torch.stack(values).logsumexp(0) - dist.Normal(0.0, 1.0).log_prob(z)
        torch.testing.assert_close(ModelPotential(Tempered(model, 0.2), x)({"z": z}), expected)

    def test_conditions_are_kept(self, float64):
        vae, x, y = Several(), torch.rand(3, 1, 4, 4), torch.tensor([0.0, 1.0, 1.0])
        vae.guide = vae.model
        bound = program.BoundProgram(vae.model, (y,), {})
        z = {"z": torch.randn(6, 2)}
        twice = x.repeat(2, 1, 1, 1)
        expected = ModelPotential(Tempered(vae.model, 0.5), twice, y.repeat(2))(z)
        assert torch.equal(ModelPotential(tempered(bound, 0.5), twice)(z), expected)

    @pytest.mark.parametrize("wrong", [0.0, -0.1, 1.5, float("nan"), "0.5", None, True])
    def test_mistakes(self, wrong):
        with pytest.raises(ValueError, match=r"inverse_temperature must be a number in \(0, 1\]"):
            Tempered(lambda x: None, wrong)

    def test_a_surrogates_chain_reaches_the_tempered_posterior(self):
        """Which is that of more noise; fails for one right chain in 25,000."""
        vae, x, _ = problem(2)
        kernel = functools.partial(BatchedHMC, step_size=0.3, num_steps=5)
        defence, number = MCMCDefence(vae, kernel, 1, 40), 400
        wider = LinearGaussianVAE()
        wider.noise = vae.noise * 10**0.5
        box = WhiteBox(vae, defence, x)
        surrogate, images = box.tempered(0.1), x.repeat(number, 1, 1, 1)
        streams = Streams.create(2, number, seed=4)
        z = surrogate.chain(images, box.start(images, streams), streams)["z"].view(number, 2, -1)
        mean, covariance = wider.exact(x)
        score = (z.mean(0) - mean) / (covariance.diagonal() / number).sqrt()
        assert score.abs().max() < 4.5
        spread = covariance.diagonal().expand(2, -1)
        torch.testing.assert_close(z.var(0), spread, rtol=0.35, atol=0.0)
        # The box itself is the defence's still, and counts for both.
        latents = {"z": z[0]}
        torch.testing.assert_close(box.energy(x, latents), program.potential(vae, x)(latents))
        assert box.step_size < surrogate.step_size
        assert box.evaluations == surrogate.evaluations > 0

    def test_recorded_gradients_serve_surrogates(self):
        """Those of one temperature serve all of its boxes."""
        vae, x, _ = problem(3)
        ends = []
        for prepare in (None, Recorder()):
            defence = MCMCDefence(vae, HMC, 2, 1, perturbation=Linf(0.1), prepare=prepare)
            box = WhiteBox(vae, defence, x, Fresh(1)).tempered(0.3)
            streams = Streams.create(3, seed=2)
            start = box.start(x, streams)
            with torch.no_grad():
                end = box.chain(x, start, streams)
                ends.append(box.transitions(2, 0.05)(x, end, streams)["z"])
        torch.testing.assert_close(*ends)
        recordings = prepare.recordings
        assert len(recordings) > 0
        assert all(recording is not None for recording, *_ in recordings.values())
        number = len(recordings)
        for b, new in ((0.3, False), (0.4, True)):
            with torch.no_grad():
                box.tempered(b).transitions(2, 0.05)(x, end, streams)
            assert (len(recordings) > number) == new

    def test_rows_of_a_conditional_surrogate_keep_their_conditions(self):
        vae, x, y = Several(), torch.rand(3, 1, 4, 4).double(), torch.tensor([0.0, 1.0, 1.0])

        def guide(x, y):
            with pyro.plate("data", len(x)):
                one = x.new_ones(len(x), 2)
                pyro.sample("z", dist.Gamma(one + y[:, None], one).to_event(1))

        vae.guide = guide
        defence = MCMCDefence(vae, HMC, 1, 1)
        bound, images = program.at_images(vae, (x, y))
        few = WhiteBox(bound, defence, images, conditions=(y,)).tempered(0.2).at(slice(1, 3))
        z = {"z": torch.randn(2, 2).double()}
        expected = ModelPotential(Tempered(vae.model, 0.2), x[1:], y[1:])(z)
        torch.testing.assert_close(few.energy(x[1:], z), expected)


def suite_of(num=6, delta=0.1, **budget):
    torch.manual_seed(0)
    vae, x, labels = problem(num)
    defence = MCMCDefence(vae, HMC, 1, 2, perturbation=None if delta is None else Linf(delta))
    fresh = Fresh(3)
    box = WhiteBox(vae, defence, x, fresh)
    scorer = Accuracy(box, x, labels, DefendedClassifier(defence, classify, "last"), fresh)
    budget = dataclasses.replace(SMALL, **budget)
    return Suite(box, scorer, x, Linf(0.3), budget, attacks.APGD)


class TestContinuation:
    def test_stages_share_the_steps(self):
        row = ROWS["continuation"]
        assert row.stages(100) == [(0.1, 33), (0.3, 33), (1.0, 34)]
        assert row.stages(2) == [(0.3, 1), (1.0, 1)]
        assert row.stages(1) == [(1.0, 1)]
        assert ROWS["equilibrium"].stages(7) == [(1.0, 7)]
        # Every attack ends on the defence itself.
        assert all(each.stages(steps)[-1][0] == 1 for each in ATTACKS for steps in (1, 10))

    @pytest.mark.parametrize("delta", [None, 0.1])
    def test_with_one_stage_it_is_equilibrium(self, delta):
        alone = ROWS["continuation"]._replace(inverse_temperatures=(1.0,))
        found = [
            suite_of(4, delta).attack(row, 4, num_steps=5) for row in (alone, ROWS["equilibrium"])
        ]
        assert torch.equal(*found)

    def test_each_stage_begins_where_the_last_one_ended(self):
        suite, seen = suite_of(num_restarts=2), []

        def engine(objective, ball, **options):
            def run(x, generator):
                number = options["num_restarts"]
                further = 0.1 * ball.radius * (len(seen) + torch.arange(number))
                images = x + further.view(-1, 1, 1, 1, 1)
                seen.append((objective, options, images.clamp(0, 1)))
                return attacks.base.AttackResult(seen[-1][2], *[torch.zeros(number, len(x))] * 5)

            return run

        own = []

        def objective(each, row, num_draws):
            own.append(each.box._inverse_temperature)
            return len(own)

        suite = dataclasses.replace(suite, engine=engine)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Suite, "objective", objective)
            found = suite.attack(ROWS["continuation"], 4, num_steps=9, num_restarts=2)
        assert own == [0.1, 0.3, 1.0]
        assert [each[0] for each in seen] == [1, 2, 3]
        assert [each[1]["num_steps"] for each in seen] == [3, 3, 3]
        assert "start" not in seen[0][1]
        assert torch.equal(found, seen[-1][2])
        streams = Streams.create(len(suite.x), 2, seed=0)
        for before, after in itertools.pairwise(seen):
            begin = after[1]["start"](suite.x.repeat(2, 1, 1, 1), streams)
            assert torch.equal(begin.unflatten(0, (2, -1)), before[2])

    def test_only_iterates_of_the_defence_are_remembered(self):
        suite, calls = suite_of(iterates=2), []

        class Watching:
            def watching(self, prepared):
                calls.append(prepared)
                return prepared

        suite.attack(ROWS["continuation"], 4, memory=Watching(), num_steps=3)
        assert len(calls) == 1

    def test_covariance_sees_classes_on_which_draws_of_the_defence_agree(self):
        """Behind a chain all of whose draws are read alike the gradient of classes vanishes, that
        of the surrogate does not, and points the right way."""
        suite = suite_of(8)
        object.__setattr__(suite, "goal", lambda: lambda x_ref: hard(suite, x_ref))
        gradients = []
        for b in (1.0, 0.03):
            box = suite.box if b == 1 else suite.box.tempered(b)
            one = dataclasses.replace(suite, box=box)
            object.__setattr__(one, "goal", suite.goal)
            x = suite.x.clone().requires_grad_()
            value = one.objective(ROWS["continuation"], 64)(suite.x)(x)
            gradients.append(torch.autograd.grad(value.sum(), x)[0])
        silent, speaking = (each.flatten(1) for each in gradients)
        agreed = silent.abs().amax(1) == 0
        assert agreed.sum() >= 4
        assert bool((speaking[agreed].abs().amax(1) > 0).all())
        # Errors grow along -(1 - 2 y) d E[z_0 | x].
        _, covariance = suite.box.vae.exact(suite.x)
        slope = (covariance @ suite.box.vae.weight.T)[0] * (2.0 * suite.scorer.labels[:, None] - 1)
        assert bool(((speaking * slope).sum(1)[agreed] > 0).all())

    def test_an_engine_that_takes_no_start_is_not_asked(self):
        suite = suite_of(4)
        assert suite.why_not(ROWS["continuation"]) == ""

        def engine(objective, ball, num_steps, num_restarts, batch_size):
            raise NotImplementedError

        other = dataclasses.replace(suite, engine=engine)
        assert "takes no start" in other.why_not(ROWS["continuation"])
        assert other.why_not(ROWS["equilibrium"]) == ""
        several = dataclasses.replace(suite, engine=lambda *args, **options: None)
        assert several.why_not(ROWS["continuation"]) == ""
        # A keyword that is there, but refused.
        paper = functools.partial(attacks.PGD, preset="paper")
        own = dataclasses.replace(suite, engine=paper, ball=L2(0.5))
        assert own.why_not(ROWS["continuation"]).endswith("leave start=None")
        assert own.why_not(ROWS["equilibrium"]) == ""

    def test_in_the_suite(self):
        vae, x, labels = problem(4)
        defence = MCMCDefence(vae, HMC, 1, 2, perturbation=Linf(0.1))
        budget = dataclasses.replace(SMALL, num_steps=6)
        names = ("equilibrium", "continuation")
        report = run(vae, defence, x, labels, budget, attacks=names, checks=False)
        assert [each.name for each in report.attacks] == list(names)
        expected = suite_gradients(chain_cost(defence), budget, len(x), names, checks=False)
        for each in report.attacks:
            # The step sizes of chains that go on are found by runs that are not in the estimate.
            assert 0.7 < each.evaluations / expected[each.name] < 1.6
        # As many steps, and two whole chains more for each further stage.
        chain = ChainCost(100.0, 4.0, 25, 1)
        costs = suite_gradients(chain, budget, 4, names, checks=False)
        assert costs["continuation"] - costs["equilibrium"] == 4 * 4 * 100.0


def hard(suite, x_ref):
    """Whether the sign of z_0 is wrong, which has no derivative."""
    labels = suite.scorer.labels.repeat(len(x_ref) // len(suite.x))
    return lambda latents, x: ((latents["z"][:, 0] > 0) == (labels == 1)).to(x_ref)


def test_starts_that_are_given(float64):
    x = torch.rand(3, 1, 4, 4)
    images = torch.rand(2, 3, 1, 4, 4)
    flat = lambda x_ref: lambda y: torch.zeros(len(y), dtype=y.dtype)  # noqa: E731
    for ball in (Linf(0.2), L2(0.4)):
        attack = attacks.Square(flat, ball, num_steps=1, num_restarts=2, start=given(images))
        expected = [x + ball.project_box(each - x, -x, 1 - x) for each in images]
        torch.testing.assert_close(attack(x).x_adv, torch.stack(expected))


@pytest.mark.parametrize(
    "shape",
    [(3, 3, 4, 4), (1, 3, 3, 4, 4), (2, 2, 3, 4, 4), (2, 3, 1, 4, 4), (2, 3, 3, 4, 1)],
    ids=str,
)
def test_starts_that_do_not_fit(shape):
    """Most of these would broadcast against three colour images, or index another dimension."""
    x = torch.rand(3, 3, 4, 4)
    flat = lambda x_ref: lambda y: y.flatten(1).sum(1)  # noqa: E731
    attack = attacks.PGD(
        flat, Linf(0.1), num_steps=1, num_restarts=2, start=given(torch.rand(shape))
    )
    with pytest.raises(ValueError, match="images (must be one for every|has 2 entries)"):
        attack(x)
