"""The Gauss-Newton metric: equal to Jacobians and closed forms, and no image enters it."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from programs import HierarchicalVAE, LinearGaussianVAE, TutorialVAE

from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.fisher import gauss_newton_variance

NUM_PROBES = 20_000


def assert_close(variance, precision, kurtosis=3.0):
    """Within 5 standard errors of the mean of squares with the given kurtosis: 6e-7 per entry."""
    standard_error = ((kurtosis - 1) / NUM_PROBES) ** 0.5
    assert ((variance * precision - 1).abs() < 5 * standard_error / (1 - 5 * standard_error)).all()


def test_linear_gaussian_vae_in_closed_form(linear_vae):
    """Prior precision 1 and W'W / s^2; the score is Gaussian there, hence the kurtosis of 3."""
    x = torch.rand(2, 1, 4, 4)
    variance = gauss_newton_variance(linear_vae, x, num_probes=NUM_PROBES, batch_size=6000)["z"]
    weight = linear_vae.weight
    precision = 1 + weight.square().sum(0) / linear_vae.noise**2
    assert variance.shape == (3,)
    assert variance.dtype == torch.float64
    assert_close(variance, precision)


def test_bernoulli_decoder_against_its_jacobian(float64):
    """Mean over latents of the prior of J' p (1 - p) J, from Jacobians of the logits, plus 1."""
    vae = TutorialVAE().eval()
    with torch.no_grad():
        vae.decoder[2].weight.mul_(4.0)  # so that the likelihood outweighs the prior
    num_probes, num_latents = 6000, 300
    variance = gauss_newton_variance(vae, torch.zeros(1, 1, 28, 28), num_probes=num_probes)
    z = torch.randn(num_latents, 5)
    with torch.no_grad():
        jacobian = torch.func.vmap(torch.func.jacfwd(vae.decoder))(z)
        probability = torch.sigmoid(vae.decoder(z))
    information = (jacobian.square() * (probability * (1 - probability))[..., None]).sum(1)
    precision = 1 + information.mean(0)
    assert (precision > 2).all()
    # Both sides are estimates. Given z the score is close to normal, so that its square varies by
    # twice E[curvature^2]; 5 standard errors, 6e-7 per entry.
    spread = information.var(0)
    variance_of_probes = (2 * (precision.square() + spread) + spread) / num_probes
    standard_error = (spread / num_latents + variance_of_probes).sqrt()
    assert ((1 / variance["latent"] - precision).abs() < 5 * standard_error).all()


def test_sites_of_a_hierarchical_model_with_a_constrained_one():
    """Names and shapes are those of one image's unconstrained latents, of any common family."""
    variance = gauss_newton_variance(HierarchicalVAE(), torch.zeros(1, 1, 4, 4), num_probes=500)
    shapes = {name: tuple(value.shape) for name, value in variance.items()}
    assert shapes == {"top": (1, 2), "rate": (1,), "low": (3,)}
    assert all((value > 0).all() for value in variance.values())


def test_curvature_of_a_skewed_prior():
    """exp(z) ~ Gamma(2, 1.5) has mean curvature 2 in z: E[1.5 exp(z)]; nothing else depends on
    z."""
    import pyro

    class Skewed:
        def model(self, x):
            with pyro.plate("data", x.shape[0]):
                pyro.sample("rate", dist.Gamma(x.new_full(x.shape[:1], 2.0), 1.5))
                pyro.sample("obs", dist.Normal(torch.zeros_like(x), 1.0).to_event(3), obs=x)

        guide = model

    variance = gauss_newton_variance(Skewed(), torch.zeros(1, 1, 2, 2), num_probes=NUM_PROBES)
    # The squared score (exp(z) 1.5 - 2)^2 of a Gamma(2) variable has kurtosis 3 + 6 / 2.
    assert_close(variance["rate"], torch.tensor(2.0), kurtosis=6.0)


def test_no_image_enters():
    """Only shape, dtype and device of x are read, so an attacker has nothing to move."""
    vae = ConvVAE().eval()

    def metric(x):
        torch.manual_seed(1)
        return gauss_newton_variance(vae, x, num_probes=8, batch_size=4)["z"]

    assert torch.equal(metric(torch.zeros(1, 1, 28, 28)), metric(torch.rand(3, 1, 28, 28)))


def test_it_is_a_metric_for_kernels(linear_vae):
    x = torch.rand(2, 1, 4, 4)
    kernel = BatchedHMC(
        linear_vae.model, inverse_mass_matrix=gauss_newton_variance(linear_vae, x, num_probes=50)
    )
    kernel.setup(0, x)
    assert kernel.sample(kernel.initial_params)["z"].shape == (2, 3)


def test_errors_that_teach():
    vae, x = LinearGaussianVAE(), torch.zeros(1, 1, 4, 4)
    for name in ("num_probes", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            gauss_newton_variance(vae, x, **{name: 0})
    with pytest.raises(ValueError, match="vae must have two Pyro programs"):
        gauss_newton_variance(object(), x)
    vae.weight = vae.weight * torch.inf
    with pytest.raises(ValueError, match="no usable gradient by site 'z'"):
        gauss_newton_variance(vae, x)
