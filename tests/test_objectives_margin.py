"""The margin of masses: its value by hand, its two gradients, and that it raises the margin."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import energies_under_common_attack
from torch.distributions import Normal, kl_divergence

from pyro_vae_defence.models import ConditionalVAE
from pyro_vae_defence.models.perturbation import PerturbationAware, most_likely_image
from pyro_vae_defence.objectives import MassMargin
from pyro_vae_defence.objectives.margin import _others, _wrong
from pyro_vae_defence.ops.balls import L2, Linf

BALL, WIDE = L2(0.3), L2(0.6)
INF = Linf(0.05)


@pytest.fixture
def vae(float64):
    return ConditionalVAE((1, 2, 3), num_classes=3, latent_dim=2, hidden_dim=6)


@pytest.fixture
def batch(float64):
    return torch.rand(4, 1, 2, 3), torch.eye(3)[[0, 1, 2, 0]]


def elbo(vae, x, y, reach):
    """Its value at a draw, in plain terms."""
    q = vae.posterior(x, y).base_dist
    likelihood = vae.observation(q.rsample(), y)
    image = x if reach is None else most_likely_image(likelihood, x, reach)
    return likelihood.log_prob(image) - kl_divergence(q, Normal(0.0, 1.0)).sum(1)


def under_common_attack(vae, x, y):
    """ELBOs of the label, and ``(2, N)`` of other classes under an attack on both, at a draw."""
    q = vae.posterior(x, y).base_dist
    own = vae.observation(q.rsample(), y).base_dist.logits
    right = dist.Bernoulli(logits=own, validate_args=False).log_prob(x).flatten(1).sum(1)
    right = right - kl_divergence(q, Normal(0.0, 1.0)).sum(1)
    others = torch.cat([y.roll(1, 1), y.roll(2, 1)])
    q = vae.posterior(x.repeat(2, 1, 1, 1), others).base_dist
    logits = vae.observation(q.rsample(), others).base_dist.logits.flatten(1)
    images, own, radius = x.flatten(1).repeat(2, 1), own.flatten(1).repeat(2, 1), INF.radius
    rows = zip(images, own[:, None], logits[:, None], strict=True)
    energies = [
        energies_under_common_attack(image, radius, radius, label, torch.ones(1), other)
        for image, label, other in rows
    ]
    wrong = -torch.cat(energies) - kl_divergence(q, Normal(0.0, 1.0)).sum(1)
    return right, wrong.view(2, -1)


def test_value_is_that_of_the_formula_under_one_attack_on_both_classes(vae, batch):
    """And the decoder's derivative, also by what it says of the label."""
    torch.manual_seed(1)
    terms = MassMargin(INF, 3.0).terms(vae.model, vae.guide, *batch)
    torch.manual_seed(1)
    right, wrong = under_common_attack(vae, *batch)
    margin = torch.log1p((wrong - right).exp().sum(0))
    torch.testing.assert_close(terms["margin"], margin)
    torch.testing.assert_close(terms["loss"], -right + 3 * margin)
    parameters = list(vae.decoder.parameters())
    found = torch.autograd.grad(terms["margin"].sum(), parameters, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(margin.sum(), parameters))
    of_two = elbo(vae, batch[0].repeat(2, 1, 1, 1), _others(batch[1]), Linf(0.1)).view(2, -1)
    assert bool((wrong < of_two).any())


def test_value_is_that_of_the_formula_of_two_attacks(vae, batch):
    torch.manual_seed(1)
    terms = MassMargin(BALL, 3.0).terms(vae.model, vae.guide, *batch)
    torch.manual_seed(1)
    x, y = batch
    right = elbo(vae, x, y, None)
    others = torch.cat([y.roll(1, 1), y.roll(2, 1)])
    wrong = elbo(vae, x.repeat(2, 1, 1, 1), others, WIDE).view(2, -1)
    odds = (wrong - right).exp().sum(0)
    torch.testing.assert_close(terms["margin"], torch.log1p(odds))
    torch.testing.assert_close(terms["loss"], -right + 3 * torch.log1p(odds))
    torch.testing.assert_close(terms["reconstruction"] - terms["kl"], right)
    assert torch.equal(terms["guide"], torch.zeros(4))


def test_others_are_all_other_classes(batch):
    y = batch[1]
    every = torch.stack([y, *_others(y).view(2, 4, 3)]).argmax(-1).sort(0).values
    assert torch.equal(every, torch.arange(3)[:, None].expand(-1, 4))


def test_decoder_and_guide_have_a_gradient_of_their_own(vae, batch):
    x, y = batch
    torch.manual_seed(2)
    evidence, guides = _wrong(PerturbationAware(vae.model, WIDE), vae.guide, x, y)
    torch.manual_seed(2)
    whole = elbo(vae, x, y, WIDE).sum()
    for network, mine, other in (
        (vae.decoder, evidence, guides),
        (vae.encoder, guides, evidence),
    ):
        parameters = list(network.parameters())
        expected = torch.autograd.grad(whole, parameters, retain_graph=True)
        found = torch.autograd.grad(mine.sum(), parameters, retain_graph=True)
        torch.testing.assert_close(found, expected)
        none = torch.autograd.grad(other.sum(), parameters, retain_graph=True, allow_unused=True)
        assert none == (None,) * len(parameters)


def test_guides_raise_what_decoders_lower(vae, batch):
    """The signs, against the formula with one or the other held fixed."""
    x, y = batch
    torch.manual_seed(3)
    terms = MassMargin(BALL).terms(vae.model, vae.guide, x, y)
    torch.manual_seed(3)
    right = elbo(vae, x, y, None)
    wrong = elbo(vae, x.repeat(2, 1, 1, 1), _others(y), WIDE)

    def margin(wrong):
        return torch.log1p((wrong.view(2, -1) - right).exp().sum(0)).sum()

    def gradient(value, network):
        return torch.autograd.grad(value, list(network.parameters()), retain_graph=True)

    found = terms["margin"].sum()
    torch.testing.assert_close(gradient(found, vae.decoder), gradient(margin(wrong), vae.decoder))
    of_right = gradient(margin(wrong.detach()), vae.encoder)
    torch.testing.assert_close(gradient(found, vae.encoder), of_right)
    raised = gradient(-wrong.sum(), vae.encoder)
    torch.testing.assert_close(gradient(terms["guide"].sum(), vae.encoder), raised)


def test_training_by_svi_and_validation_without_gradients(vae, batch):
    svi = pyro.infer.SVI(
        vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), objective := MassMargin(INF)
    )
    first = sum(svi.step(*batch) for _ in range(5))
    for _ in range(40):
        svi.step(*batch)
    assert sum(svi.step(*batch) for _ in range(5)) < first
    assert objective.step == 50
    with torch.no_grad():
        assert torch.isfinite(objective.terms(vae.model, vae.guide, *batch)["loss"]).all()


def test_wrong_arguments(vae, batch):
    x, y = batch
    for ball in (0.1, None):
        with pytest.raises(ValueError, match="ball"):
            MassMargin(ball)
    with pytest.raises(ValueError, match="weight"):
        MassMargin(L2(1.0), 0.0)
    for wrong in ((x,), (x, y.argmax(1)), (x, y[:2]), (x, 0.5 * y), (x, y + y.roll(1, 1))):
        with pytest.raises(ValueError, match="one-hot"):
            MassMargin(BALL).terms(vae.model, vae.guide, *wrong)


class Chain:
    """Two latents, of which the second depends on the first."""

    def __init__(self, vae):
        self.vae = vae

    def model(self, x, y):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(first, 1.0).to_event(1))
            pyro.sample("x", self.vae.observation(z, y), obs=x)

    def guide(self, x, y):
        with pyro.plate("data", len(x)):
            q = self.vae.posterior(x, y)
            pyro.sample("z", dist.Normal(pyro.sample("first", q), 1.0).to_event(1))


def test_latents_of_more_than_one_site_are_refused(vae, batch):
    chain = Chain(vae)
    with pytest.raises(ValueError, match="vae has 2 latent sites, first, z, but .* is for one"):
        MassMargin(BALL).terms(chain.model, chain.guide, *batch)


@pytest.mark.parametrize("learned", [False, True])
def test_an_image_that_does_not_depend_on_the_latent_has_no_force_on_it(vae, batch, learned):
    """The ELBO is then a likelihood less a KL, whose derivative alone is the guide's."""
    x, y = batch
    logits = torch.randn(1, 2, 3, requires_grad=learned)

    def model(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            likelihood = dist.Bernoulli(logits=logits.expand(len(x), -1, -1, -1))
            pyro.sample("obs", likelihood.to_event(3), obs=x)

    x = x.round()
    evidence, guides = _wrong(model, vae.guide, x, y)
    kl = kl_divergence(vae.posterior(x, y).base_dist, Normal(0.0, 1.0)).sum(1)
    log_odds = logits.detach()
    likelihood = (x * log_odds - log_odds.exp().log1p()).flatten(1).sum(1)
    torch.testing.assert_close(evidence, likelihood - kl)
    parameters = list(vae.encoder.parameters())
    found = torch.autograd.grad(guides.sum(), parameters)
    torch.testing.assert_close(found, torch.autograd.grad(-kl.sum(), parameters))


def test_classes_are_looked_at_once_and_wrong_ones_later_are_no_number(vae, batch):
    x, y = batch
    objective = MassMargin(BALL)
    looked = []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.__bool__ and args[0].dtype == torch.bool:
                looked.append(function)
            return function(*args, **(kwargs or {}))

    def check(y):
        with Watched():
            return objective._check(x, (y,), {})[1]

    assert bool(check(y).all())
    assert bool(check(y).all())
    assert len(looked) == 1
    soft = y.clone()
    soft[2] = 1 / 3
    loss = objective.terms(vae.model, vae.guide, x, soft)["loss"]
    assert torch.equal(loss.isnan(), torch.arange(4) == 2)
