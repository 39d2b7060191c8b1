"""The beta-ELBO: Pyro's own losses at beta = 1, hand-scaled programs elsewhere, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from objectives_programs import (
    BottomUpVAE,
    ConvVAE,
    HierarchicalVAE,
    LinearVAE,
    TutorialVAE,
    gradients,
)
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide.effect import GuideMessenger
from torch import Tensor, nn

from pyro_vae_defence.objectives import BetaELBO, BetaTCVAE, linear_schedule


def images(vae: nn.Module, n: int = 6) -> Tensor:
    shape = (n, 1, 2, 3) if isinstance(vae, LinearVAE) else (n, 1, 8, 8)
    return torch.rand(shape, dtype=next(vae.parameters()).dtype)


class HeavyPrior(LinearVAE):
    """A Student-t prior: Pyro knows no analytic KL to it."""

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            prior = dist.StudentT(3.0, x.new_zeros(2), x.new_ones(2)).to_event(1)
            z = pyro.sample("z0", prior)
            image = dist.Normal(self.decode(z), 0.5).to_event(1)
            pyro.sample("x", image, obs=x.flatten(1))


class HandScaled(LinearVAE):
    """Latents wrapped in ``poutine.scale`` by the programs' own arguments."""

    def model(self, x: Tensor, model_scale: float = 1.0, guide_scale: float = 1.0) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            with poutine.scale(scale=model_scale):
                prior = dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1)
                z = pyro.sample("z0", prior)
            image = dist.Normal(self.decode(z), self.sigma).to_event(1)
            pyro.sample("x", image, obs=x.flatten(1))

    def guide(self, x: Tensor, model_scale: float = 1.0, guide_scale: float = 1.0) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]), poutine.scale(scale=guide_scale):
            pyro.sample("z0", dist.Normal(*self.posterior(x)).to_event(1))


def loss_and_gradients(
    objective: Trace_ELBO, vae: nn.Module, *args: object
) -> tuple[float, dict[str, Tensor]]:
    vae.zero_grad()
    torch.manual_seed(7)
    loss = objective.loss_and_grads(vae.model, vae.guide, *args)
    return loss, gradients(vae)


@pytest.mark.parametrize("make", [LinearVAE, TutorialVAE, ConvVAE, HierarchicalVAE, HeavyPrior])
@pytest.mark.usefixtures("float64")
def test_beta_one_is_pyros_elbo(make: Callable[[], nn.Module]) -> None:
    vae = make()
    x = images(vae)
    loss, grads = loss_and_gradients(BetaELBO(), vae, x)
    pyro_loss, pyro_grads = loss_and_gradients(TraceMeanField_ELBO(), vae, x)
    assert loss == pytest.approx(pyro_loss)
    torch.testing.assert_close(grads, pyro_grads)


def test_a_guide_may_sample_in_another_order_than_the_model() -> None:
    # A closed form of low's divergence would take top, which the guide draws from low, for
    # independent of it. 5 standard errors: a false alarm has probability below 1e-6.
    vae = BottomUpVAE()
    x = torch.rand(1, 1, 2, 2, dtype=torch.float64).expand(10_000, -1, -1, -1)
    terms = BetaELBO(3.0).terms(vae.model, vae.guide, x)
    torch.testing.assert_close(terms["loss"], 3 * terms["kl"] - terms["reconstruction"])
    parameters = tuple(vae.parameters())
    expected = torch.autograd.grad(vae.kl(), parameters)
    kl = terms["kl"].detach()
    assert (kl.mean() - vae.kl()).abs() < 5 * kl.std() / 100
    found = torch.autograd.grad(terms["kl"].mean(), parameters)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.3)


@pytest.mark.usefixtures("float64")
def test_beta_equals_programs_scaled_by_hand() -> None:
    vae = HandScaled()
    x = images(vae)
    loss, grads = loss_and_gradients(BetaELBO(4.0), vae, x)
    pyro_loss, pyro_grads = loss_and_gradients(TraceMeanField_ELBO(), vae, x, 4.0, 4.0)
    assert loss == pytest.approx(pyro_loss)
    torch.testing.assert_close(grads, pyro_grads)
    assert loss != pytest.approx(loss_and_gradients(BetaELBO(), vae, x)[0], rel=1e-2)


@pytest.mark.parametrize("make", [LinearVAE, TutorialVAE, ConvVAE, HierarchicalVAE, HeavyPrior])
@pytest.mark.usefixtures("float64")
def test_implied_beta(make: Callable[[], nn.Module]) -> None:
    vae = make()
    x = images(vae)
    terms = BetaELBO(4.0).terms(vae.model, vae.guide, x)
    torch.testing.assert_close(terms["loss"], 4.0 * terms["kl"] - terms["reconstruction"])


def test_trace_elbo_implies_beta_only_if_both_programs_are_scaled() -> None:
    # 2000 draws per program pair; each mean is asked to be within 5 standard errors: a false alarm
    # has probability below 1e-6 per comparison.
    vae = HandScaled()
    x = images(vae, 2).repeat(1000, 1, 1, 1)
    kl = BetaELBO().terms(vae.model, vae.guide, x)["kl"].detach()
    entropy = dist.Normal(*vae.posterior(x)).entropy().sum(1).detach()

    def weighted(model_scale: float, guide_scale: float) -> Tensor:
        guide_trace = poutine.trace(vae.guide).get_trace(x, model_scale, guide_scale)
        model_trace = poutine.trace(poutine.replay(vae.model, trace=guide_trace)).get_trace(
            x, model_scale, guide_scale
        )
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
        return (guide_trace.nodes["z0"]["log_prob"] - model_trace.nodes["z0"]["log_prob"]).detach()

    for scales, expected in {
        (4.0, 4.0): 4 * kl,
        (4.0, 1.0): 4 * kl + 3 * entropy,
        (1.0, 4.0): kl - 3 * entropy,
    }.items():
        error = weighted(*scales) - expected
        assert error.mean().abs() < 5 * error.std() / math.sqrt(len(error))
    assert (3 * entropy).mean().abs() > 1.0


class Amortised(GuideMessenger):
    """The posteriors of a VAE, asked for while the model runs."""

    def __init__(self, vae: LinearVAE) -> None:
        super().__init__(vae.model)
        self.vae = vae

    def get_posterior(self, name: str, prior: object) -> dist.Independent:
        pyro.module("encoder", self.vae.encoder)
        return dist.Normal(*self.vae.posterior(self.args_kwargs[0][0])).to_event(1)


def test_beta_of_a_guide_that_runs_the_model_is_that_of_latents() -> None:
    vae = LinearVAE()
    x, losses = images(vae), []
    for guide in (vae.guide, Amortised(vae)):
        torch.manual_seed(0)
        losses.append(BetaELBO(4.0).terms(vae.model, guide, x)["loss"])
    torch.testing.assert_close(*losses)


def test_terms_against_closed_forms() -> None:
    vae = LinearVAE(3)
    x = images(vae)
    torch.manual_seed(3)
    terms = BetaELBO(2.5).terms(vae.model, vae.guide, x)
    torch.manual_seed(3)
    z = poutine.trace(vae.guide).get_trace(x).nodes["z0"]["value"]
    loc, scale = vae.posterior(x)
    kl = 0.5 * (loc**2 + scale**2 - 1 - 2 * scale.log()).sum(1)
    residual = (x.flatten(1) - vae.decode(z)) / vae.sigma
    reconstruction = (-0.5 * residual**2 - 0.5 * math.log(2 * math.pi * vae.sigma**2)).sum(1)
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(terms["reconstruction"], reconstruction)
    torch.testing.assert_close(terms["loss"], 2.5 * kl - reconstruction)


class Point(LinearVAE):
    """A deterministic encoder behind a flow of its own, whose log-density is known."""

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, scale = self.posterior(x)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z0", dist.Delta(loc, -scale.log().sum(1), event_dim=1))


def test_the_divergence_of_a_point_has_its_log_density() -> None:
    vae = Point()
    x = images(vae)
    loc, scale = vae.posterior(x)
    expected = -scale.log().sum(1) - dist.Normal(0.0, 1.0).log_prob(loc).sum(1)
    torch.testing.assert_close(BetaELBO().terms(vae.model, vae.guide, x)["kl"], expected)


class BatchNorm(LinearVAE):
    """Two latents, read from images by a layer that counts its runs."""

    def __init__(self) -> None:
        super().__init__(3, (2, 1))
        self.norm = nn.BatchNorm1d(6, dtype=torch.float64)

    def guide(self, x: Tensor) -> None:
        super().guide(self.norm(x.flatten(1)))


def test_asking_whether_sites_depend_leaves_batch_norm_alone() -> None:
    vae = BatchNorm()
    with torch.no_grad():
        BetaTCVAE(2.0, 10).loss(vae.model, vae.guide, images(vae))
    assert int(vae.norm.num_batches_tracked) == 1


def test_programs_stay_unscaled() -> None:
    vae = LinearVAE()
    x = images(vae)
    SVI(vae.model, vae.guide, pyro.optim.Adam({}), BetaELBO(4.0)).step(x)
    for program in (vae.model, vae.guide):
        trace = poutine.trace(program).get_trace(x)
        assert all(site["scale"] == 1.0 for site in trace.nodes.values() if "scale" in site)


def test_scales_and_masks_of_the_programs_act_on_the_loss_only() -> None:
    vae = LinearVAE()
    x = images(vae)
    mask = torch.tensor([True, False, True, True, False, True])
    torch.manual_seed(3)
    plain = BetaELBO(2.0).terms(vae.model, vae.guide, x)
    torch.manual_seed(3)
    wrapped = BetaELBO(2.0).terms(
        *(poutine.mask(poutine.scale(f, scale=0.1), mask=mask) for f in (vae.model, vae.guide)), x
    )
    torch.testing.assert_close(wrapped["reconstruction"], plain["reconstruction"])
    torch.testing.assert_close(wrapped["kl"], plain["kl"])
    torch.testing.assert_close(wrapped["loss"], 0.1 * plain["loss"] * mask)


def test_schedule_follows_the_optimisation_steps() -> None:
    vae = LinearVAE()
    x = images(vae)
    objective = BetaELBO(linear_schedule(num_steps=4, end=2.0))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.0}), objective)

    def implied_beta() -> float:
        terms = objective.terms(vae.model, vae.guide, x)
        return ((terms["loss"] + terms["reconstruction"]) / terms["kl"]).mean().item()

    betas = []
    for _ in range(6):
        betas.append(implied_beta())
        svi.step(x)
    assert betas == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    resumed = BetaELBO(linear_schedule(num_steps=4, end=2.0))
    resumed.step = 2
    terms = resumed.terms(vae.model, vae.guide, x)
    torch.testing.assert_close(terms["loss"], 1.5 * terms["kl"] - terms["reconstruction"])


def test_linear_schedule_anneals_in_both_directions() -> None:
    down = linear_schedule(num_steps=2, end=1.0, start=10.0)
    assert [down(step) for step in range(3)] == [5.5, 1.0, 1.0]
    assert linear_schedule(1)(0) == 1.0


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_beta_must_be_positive_and_finite(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta.* must be a positive finite number"):
        BetaELBO(beta)
    vae = LinearVAE()
    with pytest.raises(ValueError, match=r"beta at step 0.* must be a positive finite number"):
        BetaELBO(lambda step: beta).loss(vae.model, vae.guide, images(vae))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 3, "end": 0.0}, "end"),
        ({"num_steps": 3, "start": -0.1}, "start"),
        ({"num_steps": 3, "start": math.inf}, "start"),
    ],
)
def test_linear_schedule_checks_its_arguments(arguments: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        linear_schedule(**arguments)


@pytest.mark.parametrize("model_dims", [0, 1])
@pytest.mark.parametrize("guide_dims", [0, 1])
def test_event_dimensions_are_asked_for_without_pyros_validation(
    model_dims: int, guide_dims: int
) -> None:
    """Of as many images as dimensions, a latent that declares none has one row for each of them."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(model_dims))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(guide_dims))

    x = torch.rand(3, 3)
    with pyro.validation_enabled(False):
        if model_dims == guide_dims == 1:
            kl = BetaELBO().terms(model, guide, x)["kl"]
            torch.testing.assert_close(kl, 0.5 * x.square().sum(1))
        else:
            with pytest.raises(ValueError, match=r"site 'z'.*event dimensions"):
                BetaELBO().terms(model, guide, x)
