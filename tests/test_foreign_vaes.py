"""VAEs that others have written, as they are: pyroVED's models, and zuko's flows in Pyro's wrapper.

Each is trained, attacked, defended and scored. Right values come from its networks and
``torch.distributions`` alone: energies, divergences of the guide, and evidences, which in two
latent dimensions are sums over a grid. pyroVED and zuko are no requirement of this library;
``pip install pyroved zuko`` to run these.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vae_defence import metrics
from pyro_vae_defence.attacks import PGD, maximum_damage, mean_distance, symmetric_kl
from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.training import FitConfig, fit

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64")]

SIDE, PIXELS, CLASSES = 8, 64, 3
SMALL = {"hidden_dim_e": [16], "hidden_dim_d": [16], "device": "cpu"}


def pictures(count):
    """Bars and boxes ``(N, 1, 8, 8)`` of three classes, with noise, and one-hot labels."""
    y = torch.arange(count) % CLASSES
    x = torch.zeros(count, 1, SIDE, SIDE)
    x[y == 0, :, 2:6, 3:5] = 0.8
    x[y == 1, :, 3:5, 1:7] = 0.8
    x[y == 2, :, 2:6, 2:6] = 0.8
    return x + 0.1 * torch.rand(x.shape), nn.functional.one_hot(y, CLASSES).to(x)


def pyroved(name, **settings):
    models = pytest.importorskip("pyroved").models
    return getattr(models, name)((SIDE, SIDE), latent_dim=2, **SMALL, **settings)


# --- What each VAE is, by hand ------------------------------------------------------------------


def standard_normal(vae, z):
    return td.Normal(0.0, 1.0).log_prob(z).sum(-1)


@dataclasses.dataclass
class Case:
    """A VAE and what it means.

    ``likelihood(vae, z, y)`` is p(x | z, y) over flat pixels, ``prior(vae, z)`` log p(z) and
    ``encoder(vae, x, y)`` the guide's means and standard deviations; ``labels`` says whether images
    come with y.
    """

    make: Callable[[], Any]
    likelihood: Callable[..., td.Distribution]
    encoder: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    site: str = "latent"
    labels: bool = False
    log_label: float = 0.0  # of its prior, where the model observes it
    mixture: bool = False  # over y, unless labels say which
    prior: Callable[..., torch.Tensor] = standard_normal


def bernoulli(vae, z, y=None):
    loc = vae.decoder(z if y is None else torch.cat([z, y], -1))
    return td.Independent(td.Bernoulli(loc.reshape(len(z), PIXELS), validate_args=False), 1)


def rotated(vae, z, y=None):
    """The decoder at coordinates turned by the first latent."""
    cos, sin = z[:, 0, None].cos(), z[:, 0, None].sin()
    line = torch.linspace(-1, 1, SIDE)
    first, second = line.repeat_interleave(SIDE), line.flip(0).repeat(SIDE)
    grid = torch.stack([cos * first - sin * second, sin * first + cos * second], -1)
    rest = z[:, 1:] if y is None else torch.cat([z[:, 1:], y], -1)
    loc = vae.decoder(grid, rest).reshape(len(z), PIXELS)
    return td.Independent(td.Bernoulli(loc, validate_args=False), 1)


def encode(vae, x, y=None):
    flat = x.flatten(1) if y is None else torch.cat([x.flatten(1), y], -1)
    return vae.encoder_z(flat)[:2]


CASES = {
    "iVAE": Case(functools.partial(pyroved, "iVAE"), bernoulli, encode),
    "iVAE, Gaussian": Case(
        functools.partial(pyroved, "iVAE", sampler_d="gaussian", decoder_sig=0.2),
        lambda vae, z, y: td.Independent(td.Normal(vae.decoder(z).flatten(1), 0.2), 1),
        encode,
    ),
    "iVAE, rotation": Case(functools.partial(pyroved, "iVAE", invariances=["r"]), rotated, encode),
    "iVAE, labels": Case(
        functools.partial(pyroved, "iVAE", c_dim=CLASSES), bernoulli, encode, labels=True
    ),
    "iVAE, rotation and labels": Case(
        functools.partial(pyroved, "iVAE", c_dim=CLASSES, invariances=["r"]),
        rotated,
        encode,
        labels=True,
    ),
    "jiVAE": Case(
        functools.partial(pyroved, "jiVAE", discrete_dim=CLASSES),
        bernoulli,
        encode,
        site="latent_cont",
        mixture=True,
    ),
    "ssiVAE, labels": Case(
        functools.partial(pyroved, "ssiVAE", num_classes=CLASSES, hidden_dim_cls=[16]),
        bernoulli,
        encode,
        site="z",
        labels=True,
        log_label=-math.log(CLASSES),
    ),
}


class FlowVAE(nn.Module):
    """As in Pyro's tutorials on zuko: a flow as prior, as guide, or both, in two dimensions."""

    def __init__(self, prior, guide):
        super().__init__()
        flows = pytest.importorskip("zuko").flows
        settings = {"features": 2, "transforms": 1, "hidden_features": (16,)}
        self.flow = getattr(flows, prior)(**settings) if prior else None
        if guide:
            self.flow_guide = getattr(flows, guide)(context=PIXELS, **settings)
        self.encoder = nn.Linear(PIXELS, 4)
        self.decoder = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, PIXELS))
        self.has_flow_guide = guide is not None

    def prior(self):
        if self.flow is not None:
            return ZukoToPyro(self.flow())
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def model(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            likelihood = dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1)
            pyro.sample("obs", likelihood, obs=x.flatten(1))

    def encoder_z(self, x):
        mean, log_scale = self.encoder(x).chunk(2, -1)
        return mean, log_scale.exp()

    def guide(self, x):
        pyro.module("vae", self)
        x = x.flatten(1)
        with pyro.plate("data", len(x)):
            if self.has_flow_guide:
                pyro.sample("z", ZukoToPyro(self.flow_guide(x)))
            else:
                pyro.sample("z", dist.Normal(*self.encoder_z(x)).to_event(1))


def flow(prior, guide):
    return Case(
        functools.partial(FlowVAE, prior, guide),
        lambda vae, z, y: td.Independent(
            td.Bernoulli(logits=vae.decoder(z), validate_args=False), 1
        ),
        encode,
        site="z",
        prior=lambda vae, z: vae.flow().log_prob(z) if prior else standard_normal(vae, z),
    )


FLOWS = {
    "spline prior": flow("NSF", None),
    "autoregressive prior": flow("MAF", None),
    "spline guide": flow(None, "NSF"),
    "both": flow("NSF", "MAF"),
}


def log_joint(case, vae, x, y, z):
    """log p(x, z), or log p(x, y, z) where the model observes y: one value per row."""

    def given(label):
        return case.likelihood(vae, z, label).log_prob(x.flatten(1))

    if case.mixture:
        one_hot = torch.eye(CLASSES).unsqueeze(1).expand(-1, len(z), -1)
        likelihood = torch.stack([given(y) for y in one_hot]).logsumexp(0) - math.log(CLASSES)
    else:
        likelihood = given(y) + case.log_label
    return likelihood + case.prior(vae, z)


def decoded(case, vae, x, y, z):
    """Mean of p(x | z, y), for a mixture over p(y | z, x)."""
    if not case.mixture:
        return case.likelihood(vae, z, y).mean.reshape(x.shape)
    one_hot = torch.eye(CLASSES).unsqueeze(1).expand(-1, len(z), -1)
    given = [case.likelihood(vae, z, y) for y in one_hot]
    weights = torch.stack([p.log_prob(x.flatten(1)) for p in given]).softmax(0)
    mean = (weights[..., None] * torch.stack([p.mean for p in given])).sum(0)
    return mean.reshape(x.shape)


def evidence(case, vae, x, y):
    """log p of each image by a sum over a grid of two latent dimensions."""
    line = torch.linspace(-6, 6, 161)
    grid = torch.cartesian_prod(line, line)
    area = (line[1] - line[0]).square().log()

    def of(n):
        rows = x[n : n + 1].expand(len(grid), -1, -1, -1)
        label = None if y is None else y[n : n + 1].expand(len(grid), -1)
        return log_joint(case, vae, rows, label, grid).logsumexp(0) + area

    return torch.stack([of(n) for n in range(len(x))])


def trained(case):
    vae = case.make().double()
    x, y = pictures(60)
    batches = [(x, y) if case.labels else x] * 5
    config = FitConfig(epochs=30, schedule="constant", learning_rate=5e-3, progress=False)
    history = fit(vae, Trace_ELBO(), batches, config).history
    assert history[-1]["train_loss"] < 0.75 * history[0]["train_loss"]
    x, y = pictures(4)
    return vae, x, y if case.labels else None, (x, y) if case.labels else x


HMC = functools.partial(BatchedHMC, num_steps=5, step_size=0.1)


@pytest.mark.parametrize("name", CASES)
def test_pyroved(name):
    case = CASES[name]
    vae, x, y, images = trained(case)
    check_attacks(case, vae, x, y, images)
    check_defence(case, vae, x, y, images)
    if case.likelihood is not rotated:  # two latents, not three
        check_evidence(case, vae, x, y, images)


@pytest.mark.parametrize("name", FLOWS)
def test_zuko(name):
    case = FLOWS[name]
    vae, x, y, images = trained(case)
    if vae.has_flow_guide:
        check_attacks_on_a_flow(vae, x)
    else:
        check_attacks(case, vae, x, y, images)
    check_defence(case, vae, x, y, images)
    check_evidence(case, vae, x, y, images)


def check_attacks_on_a_flow(vae, x):
    """A flow has neither a mean nor a divergence in closed form; what it decodes to can move."""
    for objective in (mean_distance, symmetric_kl):
        with pytest.raises(ValueError, match="site 'z'.*maximum_damage"):
            PGD(objective(vae), Linf(0.1), num_steps=2)(x)
    found = PGD(maximum_damage(vae), Linf(0.1), num_steps=5)(x)
    assert (found.x_adv - x).abs().max() <= 0.1 + 1e-12
    assert (found.objective > 0).all()


@torch.no_grad()
def guide(case, vae, x, y):
    mean, scale = case.encoder(vae, x, y)
    return td.Independent(td.Normal(mean, scale), 1)


def check_attacks(case, vae, x, y, images):
    for objective, expected in (
        (mean_distance, lambda p, q: (p.mean - q.mean).square().sum(-1)),
        (symmetric_kl, lambda p, q: (td.kl_divergence(p, q) + td.kl_divergence(q, p)) / 2),
    ):
        attack = PGD(objective(vae, sites=[case.site]), Linf(0.1), num_steps=10, num_restarts=2)
        found = attack(images)
        assert (found.x_adv - x).abs().max() <= 0.1 + 1e-12
        for restart in range(2):
            p, q = guide(case, vae, x, y), guide(case, vae, found.x_adv[restart], y)
            torch.testing.assert_close(found.objective[restart], expected(p, q))
        assert (found.objective > 1e-3).all()


def check_defence(case, vae, x, y, images):
    result = MCMCDefence(vae, HMC, num_samples=6, warmup_steps=10, num_chains=2)(images)
    draws = result.samples[case.site]
    assert draws.shape[:3] == (2, 6, 4)
    for chain in range(2):
        for draw in range(6):
            expected = log_joint(case, vae, x, y, draws[chain, draw])
            torch.testing.assert_close(result.sample_stats["lp"][chain, draw], expected)
    assert result.sample_stats["acceptance_rate"].mean() > 0.5
    expected = decoded(case, vae, x, y, result.latents[case.site])
    torch.testing.assert_close(result.reconstruction, expected)
    chains = result.to_arviz()
    assert chains.posterior[case.site].shape == draws.shape


def check_evidence(case, vae, x, y, images):
    estimate = metrics.nll(vae, images, 4000)
    # Some thousand draws from a trained guide; its standard error is below 0.03.
    torch.testing.assert_close(estimate, -evidence(case, vae, x, y), atol=0.15, rtol=0)


def test_a_factorised_guide_with_classes():
    """The divergences of ``jiVAE``'s q(z | x) q(y | x) add up."""
    vae = pyroved("jiVAE", discrete_dim=CLASSES)
    x, _ = pictures(4)
    found = PGD(symmetric_kl(vae), Linf(0.1), num_steps=5)(x)
    (p, p_y), (q, q_y) = ((s[:2], s[2]) for s in map(vae.encoder_z, (x, found.x_adv[0])))
    p, q = (td.Independent(td.Normal(*parameters), 1) for parameters in (p, q))
    p_y, q_y = td.Categorical(p_y), td.Categorical(q_y)
    terms = [td.kl_divergence(*pair) for pair in ((p, q), (q, p), (p_y, q_y), (q_y, p_y))]
    torch.testing.assert_close(found.objective[0], sum(terms) / 2)


def test_classes_that_no_label_tells():
    """``ssiVAE`` without labels: z depends on y in its guide, so that q(z | x) is a mixture."""
    case = dataclasses.replace(CASES["ssiVAE, labels"], labels=False, mixture=True)
    vae, x, y, images = trained(case)
    for objective in (mean_distance, symmetric_kl):
        with pytest.raises(ValueError, match=r"'z' depends on discrete latents.*maximum_damage"):
            PGD(objective(vae), Linf(0.1), num_steps=1)(x)
    found = PGD(maximum_damage(vae), Linf(0.1), num_steps=3)(x)
    assert (found.objective > 0).all()
    check_defence(case, vae, x, y, images)
    check_evidence(case, vae, x, y, images)


def test_labels_that_are_missing_or_too_many():
    x, y = pictures(4)
    for vae, images in (
        (pyroved("iVAE", c_dim=CLASSES), x),
        (pyroved("iVAE"), (x, y)),
    ):
        for call in (
            PGD(mean_distance(vae), Linf(0.1), num_steps=1),
            MCMCDefence(vae, HMC, 1, 1),
            functools.partial(metrics.nll, vae, num_samples=2),
        ):
            with pytest.raises(ValueError, match=r"vae.(model|guide) failed on"):
                call(images)


def test_a_model_that_runs_enumerated_only():
    """``jiVAE`` with invariances repeats z for every class, and there is one class at a time."""
    vae = pyroved("jiVAE", discrete_dim=CLASSES, invariances=["r"])
    with pytest.raises(ValueError, match=r"vae.model failed on"):
        MCMCDefence(vae, HMC, 1, 1)(pictures(4)[0])
