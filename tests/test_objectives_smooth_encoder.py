"""SE: Omega as a minimum over couplings, its limits, and what the full objective does with x'."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from objectives_programs import LinearVAE, gradients
from pyro.poutine.messenger import Messenger
from scipy.optimize import minimize_scalar
from torch import Tensor

from pyro_vae_defence.objectives import SE, SEAVAE, BetaELBO
from pyro_vae_defence.objectives.smooth_encoder import omega


def pair(n: int = 4, d: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Means and standard deviations of two batches of Gaussians."""
    locs = torch.randn(2, n, d, dtype=dtype)
    scales = torch.rand(2, n, d, dtype=dtype) + 0.1
    return [locs[0], scales[0], locs[1], scales[1]]


def images(n: int = 5) -> Tensor:
    return torch.rand(n, 1, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize("gamma", [0.1, 1.0, 10.0, 50.0])
def test_omega_is_the_least_cost_over_couplings(gamma: float) -> None:
    loc, scale, loc_adv, scale_adv = (value[0] for value in pair())
    total = 0.0
    for m, s, m_adv, s_adv in zip(
        loc.tolist(), scale.tolist(), loc_adv.tolist(), scale_adv.tolist()
    ):

        def cost(r: float, s: float = s, s_adv: float = s_adv, gap: float = m - m_adv) -> float:
            distance = gap**2 + s**2 + s_adv**2 - 2 * r * s * s_adv
            return gamma / 2 * distance - 0.5 * math.log(1 - r**2)

        best = minimize_scalar(
            cost, bounds=(0, 1 - 1e-12), method="bounded", options={"xatol": 1e-12}
        )
        total += best.fun
    value = omega(loc[None], scale[None], loc_adv[None], scale_adv[None], gamma)
    assert value.item() == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("gamma", [1e-3, 1.0, 1e3])
def test_omega_is_the_published_formula(gamma: float) -> None:
    loc, scale, loc_adv, scale_adv = pair()
    u = (1 + 4 * gamma**2 * scale**2 * scale_adv**2).sqrt()
    distance = (loc - loc_adv) ** 2 + scale**2 + scale_adv**2
    expected = gamma / 2 * distance.sum(1) - 0.5 * ((u - 1) - ((u + 1) / 2).log()).sum(1)
    torch.testing.assert_close(omega(loc, scale, loc_adv, scale_adv, gamma), expected)


def test_omega_vanishes_with_gamma() -> None:
    arguments = [value.requires_grad_() for value in pair()]
    value = omega(*arguments, 0.0)
    assert torch.equal(value, torch.zeros_like(value))
    for gradient in torch.autograd.grad(value.sum(), arguments):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    # To first order it is gamma / 2 times the cost of independent latents.
    loc, scale, loc_adv, scale_adv = arguments
    slope = 0.5 * ((loc - loc_adv) ** 2 + scale**2 + scale_adv**2).sum(1)
    torch.testing.assert_close(omega(*arguments, 1e-8) / 1e-8, slope)


@pytest.mark.parametrize("gamma", [1e4, 1e6])
def test_omega_becomes_the_wasserstein_distance_plus_logs(gamma: float) -> None:
    loc, scale, loc_adv, scale_adv = pair()
    wasserstein = ((loc - loc_adv) ** 2 + (scale - scale_adv) ** 2).sum(1)
    logs = 0.5 * (1 + (gamma * scale * scale_adv).log()).sum(1)
    rest = omega(loc, scale, loc_adv, scale_adv, gamma) - gamma / 2 * wasserstein - logs
    # The next term of the expansion, 1 / (8 gamma s s'), itself up to a relative O(1 / gamma).
    expected = (1 / (8 * gamma * scale * scale_adv)).sum(1)
    assert (rest / expected - 1).abs().max() < max(100 / gamma, 1e-2)


def test_omega_keeps_its_digits_in_single_precision() -> None:
    for gamma in (1e-6, 1.0, 1e6):
        loc, scale, _, _ = pair()
        arguments = (loc, scale, loc + 1e-3, scale + 1e-3)
        single = omega(*(value.float() for value in arguments), gamma).double()
        rounded = omega(*(value.float().double() for value in arguments), gamma)
        torch.testing.assert_close(single, rounded, rtol=1e-5, atol=0)


def test_omega_is_symmetric_and_positive() -> None:
    loc, scale, loc_adv, scale_adv = pair()
    value = omega(loc, scale, loc_adv, scale_adv, 2.0)
    torch.testing.assert_close(omega(loc_adv, scale_adv, loc, scale, 2.0), value)
    assert (omega(loc, scale, loc, scale, 2.0) > 0).all()
    assert (value > omega(loc, scale, loc, scale_adv, 2.0)).all()


def test_omega_gradients() -> None:
    arguments = tuple(value.requires_grad_() for value in pair())
    for gamma in (0.0, 0.3, 50.0):
        assert torch.autograd.gradcheck(lambda *a, g=gamma: omega(*a, g), arguments)


def test_objective_against_closed_forms() -> None:
    vae, x, gamma = LinearVAE(), images(), 3.0
    x_adv = (x + 0.2).clamp(0, 1)
    torch.manual_seed(1)
    elbo = BetaELBO().terms(vae.model, vae.guide, x)
    torch.manual_seed(1)
    terms = SE(lambda _: x_adv, gamma).terms(vae.model, vae.guide, x)
    loc_adv, scale_adv = vae.posterior(x_adv)
    kl_adv = 0.5 * (loc_adv**2 + scale_adv**2 - 1 - 2 * scale_adv.log()).sum(1)
    coupling = omega(*vae.posterior(x), loc_adv, scale_adv, gamma)
    torch.testing.assert_close(terms["kl_adv"], kl_adv)
    torch.testing.assert_close(terms["omega"], coupling)
    torch.testing.assert_close(terms["reconstruction"], elbo["reconstruction"])
    torch.testing.assert_close(terms["loss"], elbo["loss"] + kl_adv + coupling)


def test_no_gradient_flows_through_the_perturbation() -> None:
    vae, x = LinearVAE(), images()

    def perturb(x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(vae.posterior(x)[0].mean())

    found = []
    for function in (perturb, lambda x: perturb(x).detach()):
        vae.zero_grad()
        torch.manual_seed(1)
        SE(function, 3.0).loss_and_grads(vae.model, vae.guide, x)
        found.append(gradients(vae))
    torch.testing.assert_close(found[0], found[1])


def test_both_encodings_receive_gradients() -> None:
    # Clean and perturbed images light different pixels, so different columns of the encoder.
    vae = LinearVAE()
    x = torch.zeros(1, 1, 2, 3, dtype=torch.float64)
    x_adv = x.clone()
    x[..., 0, 0], x_adv[..., 0, 1] = 1.0, 1.0
    terms = SE(lambda _: x_adv, 3.0).terms(vae.model, vae.guide, x)
    (gradient,) = torch.autograd.grad(terms["omega"].sum(), vae.encoder["loc"])
    gap = (vae.posterior(x)[0] - vae.posterior(x_adv)[0])[0].detach()
    assert gap.abs().min() > 1e-3
    torch.testing.assert_close(gradient[:, 0], 3.0 * gap)
    torch.testing.assert_close(gradient[:, 1], -3.0 * gap)
    assert torch.equal(gradient[:, 2:], torch.zeros_like(gradient[:, 2:]))


def test_only_the_clean_image_is_reconstructed() -> None:
    vae, x = LinearVAE(), images()
    found = []
    for objective in (BetaELBO(), SE(lambda x: x + 0.3, 3.0)):
        vae.zero_grad()
        torch.manual_seed(1)
        objective.loss_and_grads(vae.model, vae.guide, x)
        found.append(gradients(vae))
    for name in ("decoder.weight", "decoder.offset"):
        torch.testing.assert_close(found[0][name], found[1][name])
    assert not torch.allclose(found[0]["encoder.loc"], found[1]["encoder.loc"])


def test_perturb_may_differentiate_in_evaluation_and_is_hidden_from_pyro() -> None:
    vae, x = LinearVAE(), images()
    seen = []

    def perturb(x: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        pyro.sample("attack_noise", pyro.distributions.Normal(0.0, 1.0))
        return x

    class Recorder(Messenger):
        names: list[str] = []

        def _pyro_sample(self, msg: dict) -> None:
            self.names.append(msg["name"])

    with torch.no_grad(), Recorder() as outer:
        SE(perturb, 1.0).loss(vae.model, vae.guide, x)
    assert seen == [True]
    assert "z0" in outer.names
    assert "attack_noise" not in outer.names


@pytest.mark.parametrize("objective", [SE, SEAVAE])
def test_arguments_are_checked(objective: type) -> None:
    vae = LinearVAE()
    for gamma in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="gamma must be a positive finite number"):
            objective(lambda x: x, gamma)
    with pytest.raises(ValueError, match="perturb returned shape"):
        objective(lambda x: x[:, :, :1], 1.0).loss(vae.model, vae.guide, images())
