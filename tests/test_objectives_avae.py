"""AVAE: its constant, its fixed point, numerical integration; the frozen decoder of AVAE-SS."""

from __future__ import annotations

import copy
import math

import numpy as np
import pyro
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from objectives_programs import LinearVAE, TutorialVAE, gradients
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor

from pyro_vae_defence.objectives import AVAE, AVAESS, SE, SEAVAE, BetaELBO
from pyro_vae_defence.objectives.avae import autoencoding

RHO = 0.975


def pair(n: int = 4, d: int = 3) -> list[Tensor]:
    locs = torch.randn(2, n, d, dtype=torch.float64)
    scales = torch.rand(2, n, d, dtype=torch.float64) + 0.1
    return [locs[0], scales[0], locs[1], scales[1]]


def images(n: int = 5) -> Tensor:
    return torch.rand(n, 1, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize("rho", [0.0, 0.5, RHO])
def test_term_is_the_published_formula(rho: float) -> None:
    loc, scale, loc_again, scale_again = pair()
    variance = 1 - rho**2
    expected = (
        ((scale_again**2 + rho**2 * scale**2 + (loc_again - rho * loc) ** 2) / (2 * variance)).sum(
            1
        )
        - 0.5 * (2 * math.pi * math.e * scale_again**2).log().sum(1)
        + loc.shape[1] / 2 * math.log(2 * math.pi * variance)
    )
    torch.testing.assert_close(autoencoding(loc, scale, loc_again, scale_again, rho), expected)


@pytest.mark.parametrize("rho", [0.3, RHO])
def test_term_by_numerical_integration(rho: float) -> None:
    # Independent of any entropy formula: integrate log q(z~) - log N(z~; rho z, 1 - rho^2) over
    # q(z) q(z~) by quadrature, exact for the quadratic integrand up to rounding.
    nodes, weights = hermegauss(20)
    weights = weights / weights.sum()

    def log_normal(z: np.ndarray, loc: np.ndarray | float, scale: float) -> np.ndarray:
        return -0.5 * ((z - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)

    loc, scale, loc_again, scale_again = pair(n=1)
    total = 0.0
    for m, s, m_again, s_again in zip(
        *(v[0].tolist() for v in (loc, scale, loc_again, scale_again))
    ):
        z, z_again = m + s * nodes[:, None], m_again + s_again * nodes[None, :]
        integrand = log_normal(z_again, m_again, s_again) - log_normal(
            z_again, rho * z, math.sqrt(1 - rho**2)
        )
        total += weights @ integrand @ weights
    value = autoencoding(loc, scale, loc_again, scale_again, rho)
    assert value.item() == pytest.approx(total, rel=1e-10)


def test_fixed_point_has_the_known_constant() -> None:
    loc, scale, _, _ = pair()
    loc_again = (RHO * loc).requires_grad_()
    scale_again = torch.full_like(scale, math.sqrt(1 - RHO**2)).requires_grad_()
    value = autoencoding(loc, scale, loc_again, scale_again, RHO)
    constant = (RHO**2 * scale**2).sum(1) / (2 * (1 - RHO**2))
    torch.testing.assert_close(value, constant)
    for gradient in torch.autograd.grad(value.sum(), (loc_again, scale_again)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    # Elsewhere it is larger; without posterior uncertainty the least value is zero.
    for shift, factor in ((0.1, 1.0), (0.0, 1.2), (0.0, 0.8)):
        moved = autoencoding(loc, scale, loc_again + shift, scale_again * factor, RHO)
        assert (moved > constant).all()
    certain = autoencoding(loc, 0 * scale, loc_again, scale_again, RHO)
    torch.testing.assert_close(certain, torch.zeros_like(certain), rtol=0, atol=1e-12)


def test_term_gradients() -> None:
    arguments = tuple(value.requires_grad_() for value in pair())
    assert torch.autograd.gradcheck(lambda *a: autoencoding(*a, RHO), arguments)


def latents_of(vae: LinearVAE, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return poutine.trace(vae.guide).get_trace(x).nodes["z0"]["value"]


def by_hand(vae: LinearVAE, x: Tensor, noise: Tensor, x_again: Tensor, rho: float) -> Tensor:
    """AVAE's loss per image without Pyro, given the noise and the constant second image."""
    loc, scale = vae.posterior(x)
    z = loc + scale * noise
    residual = (x.flatten(1) - vae.decode(z)) / vae.sigma
    reconstruction = (-0.5 * residual**2 - 0.5 * math.log(2 * math.pi * vae.sigma**2)).sum(1)
    kl = 0.5 * (loc**2 + scale**2 - 1 - 2 * scale.log()).sum(1)
    return kl - reconstruction + autoencoding(loc, scale, *vae.posterior(x_again), rho)


def finite_differences(
    vae: LinearVAE, x: Tensor, noise: Tensor, x_again: Tensor, step: float = 1e-6
) -> dict[str, Tensor]:
    """Gradient of the loss by hand, coordinate by coordinate."""
    result = {}
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            gradient = torch.zeros_like(parameter)
            flat = parameter.view(-1)
            for k in range(flat.numel()):
                values = []
                for sign in (1, -1):
                    flat[k] += sign * step
                    values.append(by_hand(vae, x, noise, x_again, RHO).sum().item())
                    flat[k] -= sign * step
                gradient.view(-1)[k] = (values[0] - values[1]) / (2 * step)
            result[name] = gradient
    return result


def test_value_and_gradient_against_the_loss_by_hand() -> None:
    vae, x = LinearVAE(), images()
    loc, scale = vae.posterior(x)
    z = latents_of(vae, x, seed=3)
    noise = ((z - loc) / scale).detach()
    x_again = vae.decode(z).detach().reshape(x.shape)
    torch.manual_seed(3)
    terms = AVAE().terms(vae.model, vae.guide, x)
    torch.testing.assert_close(terms["loss"], by_hand(vae, x, noise, x_again, RHO))
    torch.manual_seed(3)
    vae.zero_grad()
    AVAE().loss_and_grads(vae.model, vae.guide, x)
    expected = finite_differences(vae, x, noise, x_again)
    torch.testing.assert_close(gradients(vae), expected, rtol=1e-6, atol=1e-6)


def test_self_consistent_vae_reaches_the_fixed_point() -> None:
    # An encoder that answers N(0, 1 - rho^2) to everything is consistent with itself.
    vae = LinearVAE(3)
    with torch.no_grad():
        for parameter in vae.encoder.values():
            parameter.zero_()

    def guide(x: Tensor) -> None:
        loc = vae.posterior(x)[0]
        scale = torch.full_like(loc, math.sqrt(1 - RHO**2))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z0", pyro.distributions.Normal(loc, scale).to_event(1))

    terms = AVAE().terms(vae.model, guide, images())
    torch.testing.assert_close(
        terms["autoencoding"], torch.full((5,), 3 * RHO**2 / 2, dtype=torch.float64)
    )


def test_autoencoding_does_not_train_the_decoder() -> None:
    vae, x = LinearVAE(), images()
    found = []
    for objective in (BetaELBO(), AVAE()):
        vae.zero_grad()
        torch.manual_seed(3)
        objective.loss_and_grads(vae.model, vae.guide, x)
        found.append(gradients(vae))
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name]) == name.startswith("decoder"), name


def test_se_avae_counts_the_elbo_once() -> None:
    vae, x = LinearVAE(), images()
    runs = []
    for objective in (
        BetaELBO(),
        SE(lambda x: x + 0.1, 2.0),
        AVAE(),
        SEAVAE(lambda x: x + 0.1, 2.0),
    ):
        torch.manual_seed(3)
        runs.append(objective.terms(vae.model, vae.guide, x))
    elbo, se, avae, both = runs
    torch.testing.assert_close(both["loss"], se["loss"] + avae["loss"] - elbo["loss"])
    for name, value in (se | avae).items():
        if name != "loss":
            torch.testing.assert_close(both[name], value)


def test_avae_ss_trains_the_encoder_alone_on_its_own_images() -> None:
    vae, x = LinearVAE(), images()
    # The same draws as in the objective: latents of the prior, then of the posterior.
    torch.manual_seed(3)
    x_self = vae.decode(torch.randn(5, 2, dtype=torch.float64)).detach().reshape(5, 1, 2, 3)
    z = poutine.trace(vae.guide).get_trace(x_self).nodes["z0"]["value"]
    loc, scale = vae.posterior(x_self)
    noise = ((z - loc) / scale).detach()
    x_again = vae.decode(z).detach().reshape(x_self.shape)

    torch.manual_seed(3)
    terms = AVAESS().terms(vae.model, vae.guide, x)
    torch.testing.assert_close(terms["loss"], by_hand(vae, x_self, noise, x_again, RHO))
    vae.zero_grad()
    torch.manual_seed(3)
    AVAESS().loss_and_grads(vae.model, vae.guide, x)
    assert vae.decoder["weight"].grad is None
    assert vae.decoder["offset"].grad is None
    expected = finite_differences(vae, x_self, noise, x_again)
    encoder = {name: value for name, value in expected.items() if name.startswith("encoder")}
    torch.testing.assert_close(gradients(vae), encoder, rtol=1e-6, atol=1e-6)


def test_avae_ss_does_not_look_at_the_images() -> None:
    vae = LinearVAE()
    losses = []
    for x in (images(), torch.zeros(5, 1, 2, 3, dtype=torch.float64)):
        torch.manual_seed(3)
        losses.append(AVAESS().loss(vae.model, vae.guide, x))
    assert losses[0] == losses[1]


def test_avae_ss_leaves_the_decoder_alone_whatever_the_optimiser_remembers() -> None:
    # Adam has momentum, weight decay and zeroed gradients of the decoder from the first training.
    vae = TutorialVAE()
    x = torch.rand(5, 1, 8, 8)
    optimiser = pyro.optim.Adam({"lr": 1e-2, "weight_decay": 0.1})
    for _ in range(3):
        SVI(vae.model, vae.guide, optimiser, AVAE()).step(x)
    before = copy.deepcopy(vae.state_dict())
    svi = SVI(vae.model, vae.guide, optimiser, AVAESS())
    for _ in range(3):
        svi.step(x)
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("decoder"), name


def test_avae_ss_freezes_weights_shared_by_both_programs_in_their_model_role() -> None:
    # A tied VAE: the encoder is the decoder's transpose. Its gradient is that of the encoder's use.
    vae = LinearVAE()
    with torch.no_grad():
        vae.encoder["loc"].copy_(vae.decoder["weight"].T)
    torch.manual_seed(3)
    AVAESS().loss_and_grads(vae.model, vae.guide, images())
    expected = vae.encoder["loc"].grad.clone()

    tied = LinearVAE()
    tied.encoder["loc"] = None
    tied.posterior = lambda x: (
        x.flatten(1) @ tied.decoder["weight"] + tied.encoder["offset"],
        (x.flatten(1) @ tied.encoder["log_scale"].T - 0.5).exp(),
    )
    pyro.clear_param_store()
    torch.manual_seed(3)
    AVAESS().loss_and_grads(tied.model, tied.guide, images())
    torch.testing.assert_close(tied.decoder["weight"].grad, expected.T)


def test_avae_ss_freezes_a_learned_prior() -> None:
    vae, x = LinearVAE(), images()
    prior_loc = torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)

    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            prior = pyro.distributions.Normal(prior_loc, torch.ones_like(prior_loc)).to_event(1)
            mean = vae.decode(pyro.sample("z0", prior))
            image = pyro.distributions.Normal(mean, vae.sigma).to_event(1)
            pyro.sample("x", image, obs=x.flatten(1))

    AVAE().loss_and_grads(model, vae.guide, x)
    assert prior_loc.grad.abs().sum() > 0
    prior_loc.grad = None
    AVAESS().loss_and_grads(model, vae.guide, x)
    assert prior_loc.grad is None


@pytest.mark.parametrize("rho", [-0.1, 1.0, math.nan])
def test_rho_is_checked(rho: float) -> None:
    for make in (AVAE, AVAESS, lambda rho: SEAVAE(lambda x: x, 1.0, rho)):
        with pytest.raises(ValueError, match=r"rho must lie in \[0, 1\), got"):
            make(rho=rho)
