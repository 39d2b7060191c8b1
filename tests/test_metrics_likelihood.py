"""Marginal likelihood of a linear-Gaussian VAE, whose exact value is known.

z ~ N(0, I_3), x | z ~ N(A z, 0.5^2 I_5). Statistical tests allow 5 standard errors of log-average
weights (delta method) for each of 4 images. The weights are skewed, so the normal tail is
optimistic: over 100 seeds the largest of 1,200 deviations was 4.0, and a new seed should fail less
than one test in 1,000.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from pyro_vae_defence.metrics import ais, importance_nll, log_mean_exp, sigmoid_schedule

NUM_IMAGES, NUM_CHAINS, LATENT, PIXELS, NOISE = 4, 400, 3, 5, 0.5


class LinearGaussian:
    """Model, exact posterior and evidence; rows of latents are chains times images."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(PIXELS, LATENT, generator=generator, dtype=torch.float64)
        z = torch.randn(NUM_IMAGES, LATENT, generator=generator, dtype=torch.float64)
        noise = torch.randn(NUM_IMAGES, PIXELS, generator=generator, dtype=torch.float64)
        self.x = z @ self.weight.T + NOISE * noise
        eye = torch.eye(LATENT, dtype=torch.float64)
        precision = eye + self.weight.T @ self.weight / NOISE**2
        mean = torch.linalg.solve(precision, (self.x @ self.weight / NOISE**2).T).T
        self.posterior = MultivariateNormal(mean, precision_matrix=precision)
        evidence_covariance = self.weight @ self.weight.T + NOISE**2 * torch.eye(PIXELS).double()
        evidence = MultivariateNormal(torch.zeros(PIXELS).double(), evidence_covariance)
        self.log_evidence = evidence.log_prob(self.x)
        # A guide that is wrong in mean, width and correlation, but covers the posterior.
        self.guide = Normal(mean + 0.1, 1.5 * precision.inverse().diagonal().sqrt())

    def potential(self, latents):
        z = latents["z"].view(-1, NUM_IMAGES, LATENT)
        log_prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_likelihood = Normal(z @ self.weight.T, NOISE).log_prob(self.x).sum(-1)
        return -(log_prior + log_likelihood).flatten()

    def log_guide(self, latents):
        z = latents["z"].view(-1, NUM_IMAGES, LATENT)
        return self.guide.log_prob(z).sum(-1).flatten()

    def log_weights(self, z):
        latents = {"z": z.reshape(-1, LATENT)}
        return (-self.potential(latents) - self.log_guide(latents)).view(-1, NUM_IMAGES)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return LinearGaussian()


def mala(latents, potential, step, *, size=0.25, adjust=True):
    """Metropolis-adjusted Langevin: exactly invariant and reversible when adjusted."""

    def energy_and_gradient(z):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            energy = potential({"z": z})
            return energy.detach(), torch.autograd.grad(energy.sum(), z)[0]

    def log_move(start, gradient, end):
        return -((end - start + 0.5 * size**2 * gradient) ** 2).sum(-1) / (2 * size**2)

    z = latents["z"]
    energy, gradient = energy_and_gradient(z)
    proposal = z - 0.5 * size**2 * gradient + size * torch.randn_like(z)
    new_energy, new_gradient = energy_and_gradient(proposal)
    log_accept = energy - new_energy
    log_accept = log_accept + log_move(proposal, new_gradient, z) - log_move(z, gradient, proposal)
    accept = torch.rand_like(energy).log() < log_accept
    if not adjust:
        accept = torch.ones_like(accept)
    return {"z": torch.where(accept[:, None], proposal, z)}


def standard_errors(log_weights, log_mean):
    """How many standard errors the log-average weight lies from ``log_mean``, per image."""
    relative = (log_weights - log_mean_exp(log_weights)).exp()
    error = relative.std(dim=0) / math.sqrt(log_weights.shape[0])
    return (log_mean_exp(log_weights) - log_mean).abs() / error


def run_ais(vae, initial, schedule, transition=mala):
    log_weights = ais(
        vae.potential, vae.log_guide, {"z": initial.flatten(0, 1)}, transition, schedule
    )
    return log_weights.view(-1, NUM_IMAGES)


def test_importance_nll_agrees_with_the_evidence(vae):
    log_weights = vae.log_weights(vae.guide.sample((2000,)))
    stream = iter(log_weights.split(100))
    nll = importance_nll(lambda rows: next(stream), num_samples=2000, chunk=100)
    torch.testing.assert_close(nll, -log_mean_exp(log_weights), rtol=0, atol=1e-12)
    assert (standard_errors(log_weights, vae.log_evidence) < 5).all()
    # The test has the power to see an error of 0.3 nats in every image.
    assert (standard_errors(log_weights, vae.log_evidence + 0.3) > 5).all()


def test_importance_nll_is_exact_under_the_exact_posterior(vae):
    def sample_and_weight(rows):
        z = vae.posterior.sample((rows,))
        joint = -vae.potential({"z": z.flatten(0, 1)}).view(rows, NUM_IMAGES)
        return joint - vae.posterior.log_prob(z)

    nll = importance_nll(sample_and_weight, num_samples=3)
    torch.testing.assert_close(nll, -vae.log_evidence, rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_importance_nll_does_not_depend_on_the_chunk(chunk):
    # Weights far below the smallest float64: only a stream of logarithms survives.
    log_weights = (
        -5000 + 30 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    )
    asked = []

    def sample_and_weight(rows):
        asked.append(rows)
        return log_weights[sum(asked) - rows : sum(asked)].requires_grad_()

    nll = importance_nll(sample_and_weight, num_samples=50, chunk=chunk)
    expected = math.log(50) - log_weights.detach().logsumexp(0)
    torch.testing.assert_close(nll, expected, rtol=0, atol=1e-9)
    assert max(asked) <= chunk
    assert not nll.requires_grad


def test_ais_agrees_with_the_evidence(vae):
    initial = vae.guide.sample((NUM_CHAINS,))
    log_weights = run_ais(vae, initial, sigmoid_schedule(30))
    assert (standard_errors(log_weights, vae.log_evidence) < 5).all()
    # Annealing sharpens: the weights vary less than those of plain importance sampling.
    assert (log_weights.std(0) < 0.7 * vae.log_weights(initial).std(0)).all()


def test_ais_from_the_prior_agrees_where_importance_sampling_is_poor(vae):
    """Far from the posterior the average needs annealing; the tolerance stays 5 standard errors."""
    vae.guide = Normal(torch.zeros(NUM_IMAGES, LATENT).double(), 1.0)
    log_weights = run_ais(vae, vae.guide.sample((NUM_CHAINS,)), sigmoid_schedule(200))
    assert (standard_errors(log_weights, vae.log_evidence) < 5).all()


def test_bidirectional_ais_brackets_the_evidence(vae):
    schedule = sigmoid_schedule(30)
    forward = run_ais(vae, vae.guide.sample((NUM_CHAINS,)), schedule)
    backward = run_ais(vae, vae.posterior.sample((NUM_CHAINS,)), schedule.flip(0))
    assert (standard_errors(backward, -vae.log_evidence) < 5).all()
    # Averages of logarithms are bounds; here both gaps exceed their standard errors.
    lower, upper = forward.mean(0), -backward.mean(0)
    assert (lower < vae.log_evidence).all()
    assert (vae.log_evidence < upper).all()
    assert (upper - lower < 1.0).all()


def test_ais_sees_a_kernel_that_always_accepts(vae):
    def unadjusted(latents, potential, step):
        return mala(latents, potential, step, adjust=False)

    log_weights = run_ais(vae, vae.guide.sample((NUM_CHAINS,)), sigmoid_schedule(30), unadjusted)
    assert (standard_errors(log_weights, vae.log_evidence) > 5).any()


def test_one_ais_step_is_importance_sampling(vae):
    initial = vae.guide.sample((5,))

    def never(latents, potential, step):
        raise AssertionError("a single step has no inner temperature")

    weights = run_ais(vae, initial, [0.0, 1.0], never)
    torch.testing.assert_close(weights, vae.log_weights(initial))
    torch.testing.assert_close(run_ais(vae, initial, [1.0, 0.0], never), -vae.log_weights(initial))


def test_ais_anneals_through_the_inner_temperatures(vae):
    seen = []

    def record(latents, potential, step):
        energy = potential(latents)
        blend = (energy + vae.log_guide(latents)) / (
            vae.potential(latents) + vae.log_guide(latents)
        )
        seen.append((step, round(blend.mean().item(), 6), torch.is_grad_enabled()))
        return latents

    run_ais(vae, vae.guide.sample((1,)), [0.0, 0.25, 0.75, 1.0], record)
    assert seen == [(0, 0.25, False), (1, 0.75, False)]


def test_estimators_run_where_the_tensors_are():
    latents = {"z": torch.zeros(6, 3, device="meta")}

    def energy(z):
        return z["z"].sum(-1)

    result = ais(energy, energy, latents, lambda z, potential, step: z, sigmoid_schedule(3))
    assert result.shape == (6,)
    assert result.device.type == "meta"
    nll = importance_nll(lambda rows: torch.zeros(rows, 6, device="meta"), num_samples=10, chunk=4)
    assert nll.device.type == "meta"


def test_sigmoid_schedule_is_slow_at_its_ends():
    schedule = sigmoid_schedule(10)
    assert schedule.shape == (11,)
    assert (schedule[0], schedule[-1]) == (0, 1)
    steps = schedule.diff()
    assert (steps > 0).all()
    assert steps[5] > 4 * steps[0]
    torch.testing.assert_close(steps, steps.flip(0))


def test_bad_arguments_are_refused(vae):
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1, got 0"):
        importance_nll(lambda rows: torch.zeros(rows, 2), num_samples=0)
    with pytest.raises(ValueError, match="chunk must be an integer of at least 1, got 0"):
        importance_nll(lambda rows: torch.zeros(rows, 2), chunk=0)
    with pytest.raises(ValueError, match=r"sample_and_weight\(100\) has shape \(2,\).*\(100, N\)"):
        importance_nll(lambda rows: torch.zeros(2))
    with pytest.raises(ValueError, match="log-weights of 2 images, before of 4: return them of"):
        importance_nll(lambda rows: torch.zeros(rows, rows), num_samples=10, chunk=4)
    for schedule in ([], [0.0], [0.0, 0.5], [0.0, 0.6, 0.4, 1.0], [0.0, 0.5, 0.5, 1.0]):
        with pytest.raises(ValueError, match=r"schedule=.*use sigmoid_schedule"):
            run_ais(vae, vae.guide.sample((1,)), schedule)
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 1, got 0"):
        sigmoid_schedule(0)
    with pytest.raises(ValueError, match="steepness must be a positive finite number, got -1"):
        sigmoid_schedule(5, steepness=-1)
    with pytest.raises(ValueError, match="what sample_and_weight returns must be a tensor"):
        importance_nll(lambda rows: [[0.0]] * rows)
    for weights, message in (
        ([0.0], "log_weights must be a tensor, got a list"),
        (torch.zeros(0, 3), r"log_weights has shape \(0, 3\): pass \(M, N\), one row or more"),
    ):
        with pytest.raises(ValueError, match=message):
            log_mean_exp(weights)


def test_densities_that_are_not_one_number_per_row_are_refused():
    """Of as many dimensions as rows, or of one, they gave a matrix of weights."""
    latents = {"z": torch.zeros(3, 3)}

    def right(z):
        return z["z"].square().sum(-1)

    for name, wrong, shape in (
        ("log_q", lambda z: Normal(0.0, 1.0).log_prob(z["z"]), r"\(3, 3\)"),
        ("log_q", lambda z: right(z)[:, None], r"\(3, 1\)"),
        ("potential", lambda z: right(z).sum(), r"\(\)"),
    ):
        given = {"potential": right, "log_q": right, name: wrong}
        message = rf"{name} must return one number per row, shape \(3,\), got {shape}"
        with pytest.raises(ValueError, match=message):
            ais(**given, initial=latents, transition=lambda z, *_: z, schedule=[0.0, 1.0])
    for wrong in (lambda z, *_: (z, 1.0), lambda z, *_: {"z": z["z"][:1]}):
        with pytest.raises(ValueError, match=r"transition must return latents of the sites and"):
            ais(right, right, latents, wrong, [0.0, 0.5, 1.0])
