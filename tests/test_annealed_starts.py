"""Chains that start where walks from the prior end, and what an attacker makes of them."""

from __future__ import annotations

import dataclasses
import functools

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from programs import (
    HierarchicalVAE,
    LinearGaussianVAE,
    PlaneVAE,
    TutorialVAE,
    plane_classifier,
)
from pyro import poutine
from test_enumeration import MODELS, by_hand, images, latents_of

from pyro_vae_defence.attacks import adaptive
from pyro_vae_defence.defence import Detector, MCMCDefence, detection_scores
from pyro_vae_defence.defence.detection import score_names
from pyro_vae_defence.defence.starts import walk_gradients
from pyro_vae_defence.experiments.configuration import ChainConfig
from pyro_vae_defence.experiments.defences import Setting, make_defence
from pyro_vae_defence.experiments.robustness import RobustnessConfig, gradients_per_image
from pyro_vae_defence.mcmc import BatchedHMC, BatchedMAMS, BatchedNUTS, annealed
from pyro_vae_defence.models import program
from pyro_vae_defence.models.compiled import Recorder
from pyro_vae_defence.models.program import ModelPotential
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.robustness import Budget, evaluate_robustness
from pyro_vae_defence.robustness.cost import chain_cost
from pyro_vae_defence.robustness.suite import ATTACKS
from pyro_vae_defence.robustness.whitebox import WhiteBox

pytestmark = pytest.mark.usefixtures("float64")

HMC = functools.partial(BatchedHMC, num_steps=3)
STAY = functools.partial(BatchedHMC, step_size=1e-6, num_steps=1, adapt_step_size=False)


def defend(vae, x, kernel=HMC, num_samples=2, warmup_steps=1, num_chains=1, **options):
    options = {"initial": "annealed", "num_temperatures": 4} | options
    defence = MCMCDefence(vae, kernel, num_samples, warmup_steps, num_chains, **options)
    return defence(x, torch.Generator().manual_seed(9))


# --- The prior's density --------------------------------------------------------------------------


def test_energy_of_a_prior_whose_sites_depend_on_each_other():
    vae, x = HierarchicalVAE(), torch.rand(4, 1, 4, 4)
    energy = program.potential(vae, x, Linf(0.1))
    z = energy.prior(Streams.create(4, seed=1))
    rate = z["rate"].exp()
    expected = dist.Normal(0.0, 1.0).log_prob(z["top"]).sum((1, 2))
    expected += (dist.Gamma(2.0, 1.5).log_prob(rate) + z["rate"])[:, 0]
    expected += dist.Normal(z["top"].sum(-1), 0.5).log_prob(z["low"]).sum(1)
    torch.testing.assert_close(energy.prior_energy(z), -expected)
    # What remains of the energy is the likelihood.
    observed = program.observed(program.target(vae, Linf(0.1)), energy.constrain(z), x)["obs"]
    likelihood = observed["fn"].log_prob(observed["value"])[:, 0]
    torch.testing.assert_close(energy(z) - energy.prior_energy(z), -likelihood)


@pytest.mark.parametrize("model", MODELS)
def test_energy_of_a_prior_with_its_classes_summed_out(model):
    x = images(3)
    latents = {name: value.detach() for name, value in latents_of(model, x).items()}
    expected = by_hand(model, latents, x, leave_out=("obs",))[0].logsumexp(0)
    found = ModelPotential(model, x).prior_energy(latents)
    torch.testing.assert_close(found, -expected)


def test_a_factor_is_no_part_of_what_is_drawn():
    class Tilted(LinearGaussianVAE):
        def model(self, x):
            super().model(x)
            with pyro.plate("more", x.shape[0]):
                pyro.factor("tilt", torch.full((x.shape[0],), 7.0))

    x, z = torch.rand(2, 1, 4, 4), {"z": torch.randn(2, 3)}
    energy = program.potential(Tilted(), x)
    expected = -dist.Normal(0.0, 1.0).log_prob(z["z"]).sum(1)
    torch.testing.assert_close(energy.prior_energy(z), expected)


@pytest.mark.parametrize("own", [False, True])
def test_a_prior_without_density_is_refused(own):
    class Masked(LinearGaussianVAE):
        def model(self, x):
            weight, bias = self._to(x)
            prior = dist.Normal(x.new_zeros(len(x), 3), 1.0)
            with pyro.plate("data", x.shape[0]):
                with poutine.mask(mask=own):
                    z = pyro.sample("z", (prior.mask(False) if own else prior).to_event(1))
                mean = (z @ weight.T + bias).reshape(-1, 1, 4, 4)
                pyro.sample("obs", dist.Normal(mean, self.noise).to_event(3), obs=x)

    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match="'z' is masked out of the model.*initial=\"guide\""):
        defend(Masked(), x)
    assert defend(Masked(), x, initial="guide").latents["z"].isfinite().all()


# --- Where walks end ------------------------------------------------------------------------------


def test_walks_end_near_the_posterior(linear_vae):
    x = torch.rand(2, 1, 4, 4).repeat(400, 1, 1, 1)
    mean, covariance = linear_vae.exact(x[:2])
    sd = covariance.diagonal().sqrt()
    metric = {"z": covariance.diagonal()}
    kernel = functools.partial(STAY, inverse_mass_matrix=metric)
    ends = defend(linear_vae, x, kernel, 1, 0, num_temperatures=20).initial["z"]
    ends = ends.reshape(400, 2, 3)
    # The prior is N(0, 1), ten deviations wide. The last temperature is 0.99; what the walk of 20
    # temperatures lags behind is less than the rest of the bound: 5 standard errors, 6 means.
    assert (sd < 0.15).all()
    assert ((ends.mean(0) - mean).abs() < 0.35 * sd).all()
    assert torch.allclose(ends.std(0), sd.expand(2, 3), rtol=0.3)


def test_the_image_counts_by_the_target_alone(linear_vae):
    class Led(LinearGaussianVAE):
        """An encoder that an attacker leads wherever he likes."""

        def guide(self, x):
            with pyro.plate("data", x.shape[0]):
                loc = 100 * x.flatten(1)[:, :3]
                pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))

    x = torch.rand(3, 1, 4, 4)
    for perturbation in (None, Linf(0.1)):
        one, other = (defend(vae, x, perturbation=perturbation) for vae in (linear_vae, Led()))
        assert torch.equal(one.initial["z"], other.initial["z"])
        assert torch.equal(one.latents["z"], other.latents["z"])
    assert not torch.equal(one.initial["z"], defend(linear_vae, x).initial["z"])  # the target


class TwoModes:
    """A class that is summed out says on which of two sides z is; the image cannot tell, and the
    encoder knows one of them."""

    def model(self, x):
        with pyro.plate("data", x.shape[0]):
            side = pyro.sample("side", dist.Bernoulli(x.new_full((x.shape[0],), 0.7)))
            z = pyro.sample("z", dist.Normal(2.0 * side - 1.0, 0.2))
            mean = z.abs()[..., None, None, None].expand(*z.shape, 1, 4, 4)
            pyro.sample("obs", dist.Normal(mean, 0.3).to_event(3), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[0]):
            pyro.sample("side", dist.Bernoulli(x.new_ones(x.shape[0])))
            pyro.sample("z", dist.Normal(x.flatten(1).mean(1), 0.05))


def test_walks_find_the_mode_that_the_encoder_does_not_know():
    x = torch.full((400, 1, 4, 4), 0.9)
    for initial, share in (("guide", 1.0), ("annealed", 0.7)):
        found = defend(TwoModes(), x, num_temperatures=12, initial=initial)
        for z in (found.initial["z"], found.latents["z"]):
            # 5 standard errors.
            assert abs(float((z > 0).double().mean()) - share) < 5 * (0.21 / 400) ** 0.5
        assert (found.initial["z"].abs() - 0.9).abs().mean() < 0.1  # of draws of the prior: 0.18


SERVED = {
    "constrained": (HierarchicalVAE, {}),
    "perturbation": (HierarchicalVAE, {"perturbation": Linf(0.1)}),
    "several chains": (LinearGaussianVAE, {"num_chains": 3}),
    "nuts": (LinearGaussianVAE, {"kernel": functools.partial(BatchedNUTS, max_tree_depth=2)}),
    "mams": (LinearGaussianVAE, {"kernel": BatchedMAMS}),
    "stock kernel": (
        LinearGaussianVAE,
        {"kernel": functools.partial(pyro.infer.HMC, step_size=0.01, num_steps=2)},
    ),
}


@pytest.mark.parametrize("name", SERVED)
def test_starts_do_not_depend_on_the_batch(name):
    make, options = SERVED[name]
    x = torch.rand(5, 1, 4, 4)
    whole = defend(make(), x, **options)
    chains = options.get("num_chains", 1)
    parts = defend(make(), x, batch_size=2 * chains, **options)
    first = defend(make(), x[:1], **options)
    for site, value in whole.initial.items():
        torch.testing.assert_close(parts.initial[site], value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(first.initial[site], value[:, :1], rtol=1e-9, atol=1e-9)
    # Chains of an image have walks of their own.
    flat = next(iter(whole.initial.values())).flatten(2)
    assert len({tuple(row) for row in flat.flatten(0, 1).tolist()}) == 5 * chains


def test_recorded_energies_lead_to_the_same_starts(linear_vae):
    x = torch.rand(2, 1, 4, 4)
    one, other = (defend(linear_vae, x, prepare=how).initial["z"] for how in (None, Recorder()))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_walks_have_noise_of_their_own(linear_vae, monkeypatch):
    seeds, step = set(), annealed.hmc.step

    def spy(potential, state, streams, *args, **kwargs):
        seeds.add(streams.seed)
        return step(potential, state, streams, *args, **kwargs)

    monkeypatch.setattr(annealed.hmc, "step", spy)
    defend(linear_vae, torch.rand(2, 1, 4, 4))
    of_chain = min(seeds)
    # The chain's noise, and the walk's, further away than any seeds that are drawn.
    assert seeds == {of_chain, of_chain + 2**63}
    assert of_chain < 2**62


# --- What it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chains", [1, 2])
def test_gradients_of_walks_count(linear_vae, num_chains, monkeypatch):
    x = torch.rand(3, 1, 4, 4)
    asked = []
    at = annealed.Point.at.__func__

    def counted(cls, *args):
        asked.append(1)
        return at(cls, *args)

    guide = defend(linear_vae, x, num_chains=num_chains, initial="guide")
    monkeypatch.setattr(annealed.Point, "at", classmethod(counted))
    found = defend(linear_vae, x, num_chains=num_chains, num_temperatures=6)
    assert len(asked) == walk_gradients(6) == 21
    assert torch.equal(found.num_gradients, guide.num_gradients + 21 * num_chains)
    assert found.settings["initial"] == "annealed"
    assert found.settings["num_temperatures"] == 6
    # And count in a budget, of which something has to be left.
    options = {"num_chains": num_chains, "num_samples": 30, "num_temperatures": 6}
    bound = defend(linear_vae, x, max_gradients=40 * num_chains, **options)
    assert (bound.num_gradients <= 40 * num_chains).all()
    assert (bound.num_gradients > 33 * num_chains).all()
    with pytest.raises(ValueError, match="the start takes 22 of the 20 gradients"):
        defend(linear_vae, x, max_gradients=20 * num_chains, **options)


def test_arguments(linear_vae):
    with pytest.raises(ValueError, match="num_temperatures must be an integer of at least 2"):
        MCMCDefence(linear_vae, num_temperatures=1)
    assert defend(linear_vae, torch.rand(1, 1, 4, 4), num_temperatures=2).latents


# --- What attackers know of it --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("initial", "prepare"),
    [(name, None) for name in ("guide", "mean", "prior", "mode", "annealed")]
    + [("annealed", Recorder())],
)
def test_the_white_box_runs_the_defences_chain(linear_vae, initial, prepare):
    x = torch.rand(4, 1, 4, 4)
    options = {"initial": initial, "mode_steps": 3, "num_temperatures": 4, "prepare": prepare}
    kernel = functools.partial(HMC, jitter=0.0)
    defence = MCMCDefence(linear_vae, kernel, 2, 1, perturbation=Linf(0.1), **options)
    box = WhiteBox(linear_vae, defence, x)
    found = defence(x, torch.Generator().manual_seed(1))
    streams = Streams.create(4, generator=torch.Generator().manual_seed(1))
    begin, spent = box.start(x, streams), box.evaluations
    with torch.no_grad():
        end = box.chain(x, begin, streams)
    torch.testing.assert_close(end["z"], found.latents["z"], rtol=1e-9, atol=1e-9)
    assert box.evaluations - spent >= int(found.num_gradients.sum())
    assert found.num_gradients.tolist() == [chain_cost(defence).whole] * 4


def test_derivatives_of_a_start_that_is_not_the_encoding(linear_vae):
    x = torch.rand(3, 1, 4, 4)
    streams = Streams.create(3, seed=2)

    def slope(encode):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(encode(leaf, streams)["z"].sum(), leaf)[0]

    boxes = {
        initial: WhiteBox(
            linear_vae, MCMCDefence(linear_vae, HMC, 2, 1, initial=initial, num_temperatures=4), x
        )
        for initial in ("guide", "prior", "mode", "annealed")
    }
    encoder = slope(adaptive.transfer(boxes["guide"].start))
    for initial, box in boxes.items():
        # BPDA takes the encoder's derivative, whatever the start.
        torch.testing.assert_close(slope(adaptive.bpda(box.start, box.chain)), encoder)
        assert box.unrollable == (initial in ("guide", "prior"))
        reasons = {row.name: row.reason(box) for row in ATTACKS}
        unrolled = "" if box.unrollable else "the search for the chain's start is not unrolled"
        assert reasons["unroll"] == unrolled
        assert {why for name, why in reasons.items() if name != "unroll"} == {""}
    # Unrolled, a start of its own is a constant.
    box = boxes["prior"]
    begin = {"z": torch.randn(3, 3, requires_grad=True)}
    end = box.chain(x.clone().requires_grad_(), begin, streams)["z"]
    assert torch.autograd.grad(end.sum(), begin["z"], allow_unused=True) == (None,)


def test_attacks_on_annealed_starts():
    vae = PlaneVAE().eval()
    x = torch.rand(2, 1, 2, 4)
    kernel = functools.partial(BatchedHMC, num_steps=2, step_size=0.2)
    defence = MCMCDefence(
        vae, kernel, 1, 0, perturbation=Linf(0.1), initial="annealed", num_temperatures=2
    )
    budget = Budget(
        num_steps=2, num_restarts=1, num_draws=(2,), num_chains=2, persistent_transitions=1,
        selection_draws=1, scoring_draws=1,
    )  # fmt: skip
    tried = ("bpda", "equilibrium", "evidence", "truncated")
    report = evaluate_robustness(
        vae, defence, x, classifier=plane_classifier, ball=Linf(0.1), budget=budget, checks=False,
        attacks=(*tried, "unroll"), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert [each.name for each in report.attacks] == list(tried)
    assert report.skipped["unroll"] == "the search for the chain's start is not unrolled"
    assert report.defence["initial"] == "annealed"
    assert report.per_image.isfinite().all()


def test_the_named_defence_is_aware_but_for_its_start():
    vae = TutorialVAE().eval()
    setting = Setting(vae, ChainConfig(), {"latent": torch.ones(5)}, radius=0.1)
    annealed_starts, aware = (make_defence(f"{name}@6", setting) for name in ("annealed", "aware"))
    for field in dataclasses.fields(MCMCDefence):
        one, other = (getattr(each, field.name) for each in (annealed_starts, aware))
        if field.name == "initial":
            assert (one, other) == ("annealed", "guide")
        elif field.name != "kernel":
            assert one == other
    costs = [
        sum(gradients_per_image(RobustnessConfig("mnist_vae", 0.1), name).values())
        for name in ("annealed", "aware")
    ]
    assert costs[0] > costs[1]


def test_scores_of_an_encoding_where_chains_do_not_start(linear_vae):
    x = torch.rand(3, 1, 4, 4)
    own = {"energy_drop", "start_energy", "start_error", "distance"}
    found = {}
    for initial in ("guide", "annealed"):
        defence = MCMCDefence(linear_vae, HMC, 2, 1, 2, initial=initial, num_temperatures=4)
        found[initial] = set(detection_scores(defence, defence(x)))
        assert found[initial] == set(score_names(defence))
    assert found["guide"] - found["annealed"] == own
    with pytest.raises(ValueError, match=r"score_name must be one of end_energy.* got 'start_err"):
        Detector(defence)
