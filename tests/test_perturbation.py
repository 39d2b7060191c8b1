"""The perturbation-aware posterior: brute force, feasibility, the inequality, gradients, chains."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from mcmc_reference import assert_moments
from scipy.optimize import minimize
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import program
from pyro_vae_defence.models.compiled import Recorder
from pyro_vae_defence.models.nvae.levels import TOLERANCE
from pyro_vae_defence.models.nvae.likelihoods import DiscretisedLogisticMixture, GaussianImage
from pyro_vae_defence.models.perturbation import (
    PerturbationAware,
    UnknownRadius,
    _moving_image,
    most_likely_image,
)
from pyro_vae_defence.ops import reach
from pyro_vae_defence.ops.balls import L1, L2, Ball, Linf
from pyro_vae_defence.ops.streams import Streams

BALLS = {"linf": Linf, "l2": L2, "l1": L1}
RADII = {"linf": 0.15, "l2": 0.7, "l1": 2.0}


def bernoulli(h):
    # Flattened, as in Pyro's tutorial.
    return dist.Bernoulli(logits=h[:, :48], validate_args=False).to_event(1)


def continuous_bernoulli(h):
    return dist.ContinuousBernoulli(logits=h[:, :48].reshape(-1, 3, 4, 4)).to_event(3)


def normal(h):
    loc, scale = (h[:, :48].reshape(-1, 3, 4, 4) / 4, h[:, 48:96].reshape(-1, 3, 4, 4).exp())
    return dist.Normal(loc, scale).to_event(3)


def gaussian_image(h):
    return GaussianImage(h[:, :96].reshape(-1, 6, 4, 4)).to_event(3)


def laplace(h):
    return dist.Laplace(h[:, :48].reshape(-1, 3, 4, 4), 0.3).to_event(3)


def logistic_mixture(h):
    logits = h.reshape(-1, 20, 4, 4)
    return DiscretisedLogisticMixture(logits, num_bits=4, validate_args=False)


LIKELIHOODS = [bernoulli, continuous_bernoulli, normal, gaussian_image, laplace, logistic_mixture]
ONLY_LINF = {laplace, logistic_mixture}
CASES = [
    pytest.param(likelihood, kind, id=f"{likelihood.__name__}-{kind}")
    for likelihood in LIKELIHOODS
    for kind in BALLS
    if kind == "linf" or likelihood not in ONLY_LINF
]


class RandomVAE:
    """z ~ N(0, I) in 4 dimensions, 3x4x4 images, random weights, any likelihood."""

    def __init__(self, likelihood, dtype=torch.float64):
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(4, 320, generator=generator, dtype=dtype)
        self.likelihood = likelihood

    def observation(self, z):
        return self.likelihood(z @ self.weight)

    def model(self, x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0], 4), 1.0).to_event(1))
            fn = self.observation(z)
            pyro.deterministic("mean", fn.mean)
            pyro.sample("obs", fn, obs=x.reshape(-1, *fn.event_shape))

    def guide(self, x):
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0], 4), 1.0).to_event(1))


def references(num_images, dtype=torch.float64):
    """Images on the 16 levels of the discrete likelihood, with black and white parts."""
    return torch.randint(-3, 19, (num_images, 3, 4, 4)).clamp(0, 15).to(dtype) / 15


def attacks_on(x, ball: Ball):
    """Attacks of several kinds, exactly inside the ball and the valid range."""
    streams = Streams.create(x.shape[0])
    large = [torch.randn_like(x), torch.randn_like(x) * 9, ball.radius * torch.randn_like(x).sign()]
    for change in (ball.random_start(x, streams), *map(ball.project, large)):
        attacked = ball.inside(x, (x + change).clamp(0, 1))
        assert (ball.norm(attacked - x) <= ball.radius).all()
        yield attacked


def energy(vae, x, perturbation=None):
    return program.potential(vae, x, perturbation)


# --- Solvers --------------------------------------------------------------------------------------


def brute_force(objective, x, ball):
    """Minimum over what is in reach of one image, by sequential quadratic programming from several
    starts."""
    r, size = ball.radius, len(x)
    # In units of the radius; the L1 ball is smooth in the positive and negative parts of the
    # change.
    parts = 2 if isinstance(ball, L1) else 1
    low, high = np.maximum(-x / r, -1), np.minimum((1 - x) / r, 1)
    constraints = []
    if isinstance(ball, L2):
        constraints = [{"type": "ineq", "fun": lambda w: 1 - (w**2).sum()}]
    elif isinstance(ball, L1):
        constraints = [{"type": "ineq", "fun": lambda w: 1 - w.sum()}]
        low, high = np.zeros(2 * size), np.concatenate([high, -low])

    def change(w):
        return w if parts == 1 else w[:size] - w[size:]

    rng = np.random.default_rng(0)
    results = [
        minimize(
            lambda w: objective(x + r * change(w)),
            low + (high - low) * rng.random(parts * size) / (2 * size),
            bounds=list(zip(low, high, strict=True)),
            constraints=constraints,
            method="SLSQP",
            options={"ftol": 1e-13, "maxiter": 500},
        )
        for _ in range(3)
    ]
    return min(f.fun for f in results if all(c["fun"](f.x) > -1e-9 for c in constraints))


@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.parametrize("radius", [0.05, 0.4, 1.5])
@pytest.mark.filterwarnings("ignore:Values in x were outside bounds")  # older SciPy, of rounding
@pytest.mark.usefixtures("float64")
def test_solvers_find_the_optimum_that_brute_force_finds(kind, radius):
    ball = BALLS[kind](min(radius, 1.0) if kind == "linf" else radius)
    x = torch.rand(3, 4)
    x[0, 0], x[1, 1] = 0.0, 1.0
    slope, target = torch.randn(3, 4) * 3, torch.rand(3, 4) * 2 - 0.5
    precision = (2 * torch.randn(3, 4)).exp()
    linear = reach.maximise_linear(slope, x, ball).numpy()
    quadratic = reach.nearest(target, precision, x, ball).numpy()
    for i in range(3):
        s, a, m = slope[i].numpy(), precision[i].numpy(), target[i].numpy()
        for objective, found in (
            (lambda y, s=s: -(s * y).sum(), linear[i]),
            (lambda y, a=a, m=m: 0.5 * (a * (y - m) ** 2).sum(), quadratic[i]),
        ):
            least = brute_force(objective, x[i].numpy(), ball)
            assert objective(found) == pytest.approx(least, abs=2e-6 * (1 + abs(least)))


@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.parametrize("radius", [1e-3, 0.3, 4.0, 1e3])
def test_solutions_are_inside_exactly_in_single_precision(kind, radius):
    ball = BALLS[kind](min(radius, 1.0) if kind == "linf" else radius)
    x = torch.rand(6, 3, 16, 16)
    x[0], x[1] = 0.0, 1.0
    slope = torch.randn_like(x) * torch.randn_like(x).mul(3).exp()
    slope[2] = 0.0
    precision = torch.randn_like(x).mul(2).exp()
    for found in (
        reach.maximise_linear(slope, x, ball),
        reach.nearest(torch.rand_like(x) * 2 - 0.5, precision, x, ball),
    ):
        assert (ball.norm(x - found) <= radius).all()
        assert found.min() >= 0
        assert found.max() <= 1
        assert found.dtype == x.dtype
    assert torch.equal(reach.maximise_linear(slope, x, ball)[2], x[2])
    # A target within reach is reached.
    near = ball.inside(x, (x + 0.5 * ball.project(torch.randn_like(x))).clamp(0, 1))
    assert torch.allclose(reach.nearest(near, precision, x, ball), near, atol=1e-6)


@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.usefixtures("float64")
def test_solvers_treat_rows_by_themselves_and_never_ask_the_device(kind):
    ball = BALLS[kind](0.5)
    x, slope, precision = torch.rand(3, 7), torch.randn(3, 7), torch.rand(3, 7) + 0.1
    for solve in (
        lambda rows: reach.maximise_linear(slope[rows], x[rows], ball),
        lambda rows: reach.nearest(slope[rows], precision[rows], x[rows], ball),
    ):
        together = solve(slice(None))
        alone = torch.cat([solve(slice(i, i + 1)) for i in range(3)])
        assert torch.allclose(together, alone, rtol=0, atol=1e-12)
    meta = torch.empty(3, 7, device="meta")
    assert reach.maximise_linear(meta, meta, ball).device.type == "meta"
    assert reach.nearest(meta, meta, meta, ball).device.type == "meta"


def best_of_all_triples(mixture, x, radius, candidates):
    """The largest log-probability of each pixel over all triples of these values in reach."""
    best = mixture.log_prob_map(x)
    for triple in itertools.product(*candidates):
        y = torch.stack(triple, -3)
        inside = ((y - x).abs() <= radius).all(-3)
        best = torch.where(inside, torch.maximum(best, mixture.log_prob_map(y)), best)
    return best


def mixture_of(num_components, spread, log_scale, size=6):
    """Components whose means lie anywhere, of a scale, with coefficients of either sign."""
    shape = (2, 3, num_components, size, size)
    colours = [spread * torch.randn(shape), log_scale + torch.randn(shape), torch.randn(shape)]
    weights = 1.5 * torch.randn(2, num_components, size, size)
    return torch.cat([weights, torch.stack(colours, 2).flatten(1, 3)], 1)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("log_scale", [-3.0, -1.0, 2.0])
@pytest.mark.usefixtures("float64")
def test_the_most_likely_levels_are_those_of_all_triples(bits, log_scale):
    """With 8 bits at the edges of the range too, where levels own the tails of the components."""
    radius = 0.3 if bits == 3 else 2.5 / 255
    mixture = DiscretisedLogisticMixture(
        mixture_of(10, 0.7, log_scale), num_bits=bits, validate_args=False
    )
    last = 2**bits - 1
    x = torch.randint(256, (2, 3, 6, 6)) / 255.0
    x[:, :, :2] = torch.randint(3, (2, 3, 2, 6)) / 255.0
    x[:, :, -2:] = 1 - torch.randint(4, (2, 3, 2, 6)) / 255.0
    x[0, :, 3] = torch.rand(3, 6)  # an attacked image is on no grid
    found = most_likely_image(mixture, x, Linf(radius))
    assert ((found - x).abs() <= radius).all()
    assert ((found >= 0) & (found <= 1)).all()
    if bits == 8:
        near = [((x * last).round() + step).clamp(0, last) / last for step in range(-3, 4)]
        candidates = [[value[:, c] for value in (x, *near)] for c in range(3)]
    else:  # any value in reach falls into a level
        steps = [(x + step / 4 * (radius - 1e-12)).clamp(0, 1) for step in range(-4, 5)]
        candidates = [[value[:, c] for value in steps] for c in range(3)]
    best = best_of_all_triples(mixture, x, radius, candidates)
    log_prob = mixture.log_prob_map(found)
    assert (log_prob <= best + 1e-9).all()
    assert (best - log_prob).max() < TOLERANCE + 1e-9
    assert (best - mixture.log_prob_map(x)).sum() > 1


def test_the_search_multiplies_no_matrices():
    """A GPU may be told to round their entries to 10 bits, which no bound would survive."""

    class Products(TorchDispatchMode):
        found = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in function.__name__:
                self.found.append(function)
            return function(*args, **(kwargs or {}))

    mixture = DiscretisedLogisticMixture(mixture_of(3, 0.7, -2.0), validate_args=False)
    with Products() as products:
        torch.rand(2, 2) @ torch.rand(2, 2)
        most_likely_image(mixture, torch.rand(2, 3, 6, 6), Linf(0.1))
    assert products.found == [torch.ops.aten.mm.default]


@pytest.mark.parametrize("radius", [1e-9, 3e-6, 1e-5, 0.1 / 255])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_search_ends_where_a_ball_holds_one_level_or_none(radius, dtype):
    """With values beside a level, on it, between two and at the ends of the range."""
    beside = torch.tensor([-0.5, -9e-4, -5e-4, -1e-6, 0.0, 1e-6, 5e-4, 9e-4], dtype=torch.float64)
    levels = torch.tensor([0.0, 1.0, 11.0, 254.0, 255.0], dtype=torch.float64)
    values = ((levels[:, None] + beside) / 255).clamp(0, 1).to(dtype)
    x = values.flatten()[torch.stack([torch.arange(40).roll(3 * c) for c in range(3)])]
    logits = torch.zeros(10, 1, 40, dtype=dtype)
    logits[1::3], logits[2::3] = 0.9, -7.0
    mixture = DiscretisedLogisticMixture(logits, validate_args=False)
    found = most_likely_image(mixture, x[:, None], Linf(radius))[:, 0]
    assert ((found - x).abs() <= radius).all()
    level = torch.round(x * 255) / 255
    assert ((found == x) | (found == level)).all()
    is_better = mixture.log_prob_map(found[:, None]) >= mixture.log_prob_map(x[:, None])
    assert is_better.all()


@pytest.mark.parametrize("log_scale", [-3.0, 4.0])
def test_the_most_likely_levels_in_float32_are_so_up_to_rounding(log_scale):
    """Narrow components, and wide ones, whose levels have so little mass that digits are lost."""
    mixture = DiscretisedLogisticMixture(mixture_of(10, 0.7, log_scale), validate_args=False)
    x, radius = torch.randint(256, (2, 3, 6, 6)) / 255, 1.5 / 255
    found = most_likely_image(mixture, x, Linf(radius))
    near = [((x * 255).round() + step).clamp(0, 255) / 255 for step in (-1, 0, 1)]
    best = best_of_all_triples(mixture, x, radius, [[v[:, c] for v in near] for c in range(3)])
    log_prob = mixture.log_prob_map(found)
    assert (best - log_prob).max() < TOLERANCE + 3 * 0.01
    exact = DiscretisedLogisticMixture(mixture.logits.double(), validate_args=False)
    assert (exact.log_prob_map(found.double()) - log_prob).abs().max() < 3 * 0.01
    if log_scale < 0:
        assert (best - mixture.log_prob_map(x)).max() > 1


@pytest.mark.usefixtures("float64")
def test_all_256_levels_of_a_channel_are_searched():
    """Too many triples to try: no change of one channel is better, and none of many at random."""
    mixture = DiscretisedLogisticMixture(mixture_of(10, 0.7, -3.0, size=3), validate_args=False)
    x = torch.rand(2, 3, 3, 3)
    found = most_likely_image(mixture, x, Linf(1.0))
    log_prob = mixture.log_prob_map(found)
    for channel in range(3):
        for level in range(256):
            other = found.clone()
            other[:, channel] = level / 255
            assert (mixture.log_prob_map(other) <= log_prob + TOLERANCE + 1e-9).all()
    for _ in range(300):
        other = torch.randint(256, x.shape) / 255.0
        assert (mixture.log_prob_map(other) <= log_prob + TOLERANCE + 1e-9).all()


def test_the_search_of_levels_treats_pixels_by_themselves():
    mixture = DiscretisedLogisticMixture(mixture_of(3, 0.7, -2.0), validate_args=False)
    x, ball = torch.rand(2, 3, 6, 6), Linf(0.1)
    together = most_likely_image(mixture, x, ball)
    alone = DiscretisedLogisticMixture(mixture.logits[1:, :, 2:3, 4:], validate_args=False)
    assert torch.equal(most_likely_image(alone, x[1:, :, 2:3, 4:], ball), together[1:, :, 2:3, 4:])
    several = most_likely_image(mixture.expand((3, 2)), x, ball)
    assert torch.equal(several, together.expand(3, -1, -1, -1, -1))
    broken = DiscretisedLogisticMixture(mixture.logits * math.nan, validate_args=False)
    assert torch.equal(most_likely_image(broken, x, ball), x)


@pytest.mark.usefixtures("float64")
def test_the_search_of_levels_is_not_recorded():
    """Its number of steps is that of one run."""
    potential = energy(RandomVAE(logistic_mixture), references(2), Linf(0.15))
    recorded = Recorder()(potential)
    z = {"z": torch.randn(2, 4)}
    found, _ = recorded.energy_and_gradient(z)
    assert not recorded.captured
    assert recorded.why_not.startswith("recording failed")
    assert torch.equal(found, potential(z))


# --- The energy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("likelihood", "kind"), CASES)
@pytest.mark.usefixtures("float64")
def test_no_attack_in_the_ball_raises_the_energy_of_any_latent(likelihood, kind):
    vae, ball = RandomVAE(likelihood), BALLS[kind](RADII[kind])
    number = 10 if likelihood is logistic_mixture else 20  # whose search is costly
    x_ref = references(number)
    # Each image with latents near the mean of the prior, of the prior, and far out.
    spread = torch.tensor([0.3, 1.0, 2.0]).repeat_interleave(number)[:, None]
    strict = 0
    for x_adv in attacks_on(x_ref, ball):
        z = {"z": spread * torch.randn(3 * number, 4)}
        clean, attacked = x_ref.repeat(3, 1, 1, 1), x_adv.repeat(3, 1, 1, 1)
        reference = energy(vae, clean)(z)
        aware = energy(vae, attacked, ball)(z)
        # Up to rounding of sums of 48 terms, and what a search of 16 pixels may miss.
        slack = 16 * TOLERANCE if likelihood is logistic_mixture else 0.0
        assert (aware <= reference + slack + 1e-9 * (1 + reference.abs())).all()
        strict += int((energy(vae, attacked)(z) > reference).sum())
    # The paper's energy breaks it, or the test would say nothing.
    assert strict > 50


@pytest.mark.parametrize(("likelihood", "kind"), CASES)
@pytest.mark.usefixtures("float64")
def test_minimiser_is_feasible_energy_falls_with_the_radius_and_starts_at_the_paper(
    likelihood, kind
):
    vae, make = RandomVAE(likelihood), BALLS[kind]
    x, z = references(6), {"z": torch.randn(6, 4)}
    fn = vae.observation(z["z"])
    observed = x.reshape(-1, *fn.event_shape)
    paper = energy(vae, x)(z)
    energies = [paper]
    for scale in (1e-9, 0.3, 0.6, 1.0, 3.0):
        ball = make(scale * RADII[kind])
        found = most_likely_image(fn, observed, ball)
        assert found.shape == observed.shape
        assert (ball.norm(observed - found) <= ball.radius).all()
        assert found.min() >= 0
        assert found.max() <= 1
        energies.append(energy(vae, x, ball)(z))
        # The energy is that of the image found.
        assert torch.allclose(energies[-1], energy(vae, found.reshape_as(x))(z))
    assert torch.allclose(energies[1], paper, rtol=1e-5)
    for smaller, larger in itertools.pairwise(energies):
        slack = 16 * TOLERANCE if likelihood is logistic_mixture else 0.0  # 16 pixels
        assert (larger <= smaller + slack + 1e-9 * (1 + smaller.abs())).all()
    assert (energies[-1] <= paper).all()
    assert (energies[-1] < paper).any()


@pytest.mark.parametrize(("likelihood", "kind"), CASES)
@pytest.mark.usefixtures("float64")
def test_gradient_is_that_of_finite_differences(likelihood, kind):
    vae = RandomVAE(likelihood)
    x, z = references(2), 0.7 * torch.randn(2, 4)
    for perturbation in (
        BALLS[kind](RADII[kind]),
        UnknownRadius(BALLS[kind], (0, RADII[kind] / 2, RADII[kind]), (0.0, 3.0, 5.0)),
    ):
        potential = energy(vae, x, perturbation)
        # Kinks have measure zero, and these latents are off them.
        assert torch.autograd.gradcheck(
            lambda z, u=potential: u({"z": z}), z.clone().requires_grad_(), eps=1e-7, atol=1e-4
        )


def test_flattened_and_deterministic_sites_and_nested_plates(tutorial_vae):
    x = torch.rand(3, 1, 28, 28)
    z = {"latent": torch.randn(3, 5)}
    values = [energy(tutorial_vae, x, b)(z) for b in (None, L2(0.5), L2(1.0))]
    assert (values[0] > values[1]).all()
    assert (values[1] > values[2]).all()

    def plated(x):
        with pyro.plate("data", x.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0], 1), 1.0))
            pyro.factor("nothing", torch.zeros_like(z))
            with pyro.plate("pixels", 48, dim=-1):
                pyro.sample("obs", dist.Normal(z, 1.0), obs=x.flatten(1))

    x, z = references(3, torch.float32), {"z": torch.randn(3, 1)}
    paper = program.ModelPotential(plated, x)(z)
    aware = program.ModelPotential(PerturbationAware(plated, Linf(0.1)), x)(z)
    assert (aware < paper).all()
    for perturbation in (L2(0.1), UnknownRadius(Linf, (0.1,), (0.0,))):
        with pytest.raises(ValueError, match="'obs': an L2 or L1 ball and an unknown radius need"):
            program.ModelPotential(PerturbationAware(plated, perturbation), x)(z)


# --- Chains ---------------------------------------------------------------------------------------


class OnePixel:
    """z ~ N(0, 1), one pixel with mean .5 + z / 4: the density of z is known up to a quadrature."""

    def __init__(self, kind):
        self.kind = kind

    def model(self, x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0], 1), 1.0).to_event(1))
            if self.kind == "normal":
                fn = dist.Normal(0.5 + z / 4, 0.1)
            else:
                fn = dist.Bernoulli(logits=4 * z, validate_args=False)
            pyro.sample("obs", fn.to_event(1), obs=x)


@pytest.mark.parametrize("kind", ["normal", "bernoulli", "unknown"])
@pytest.mark.usefixtures("float64")
def test_chains_follow_the_density_with_the_kinks_in_it(kind):
    observed, radius = 0.8, 0.15
    grid = torch.linspace(-6, 6, 20001)
    if kind == "bernoulli":
        logit = 4 * grid
        best = torch.where(logit > 0, observed + radius, observed - radius)
        log_density = best * logit - torch.nn.functional.softplus(logit) - grid.square() / 2
    else:
        distance = (0.5 + grid / 4 - observed).abs()
        near = -0.5 * ((distance - radius).clamp(min=0) / 0.1).square()
        if kind == "unknown":
            near = torch.logaddexp(near - 1.0, -0.5 * (distance / 0.1).square())
        log_density = near - grid.square() / 2
    density = log_density.exp()
    mean = (density * grid).sum() / density.sum()
    variance = (density * (grid - mean).square()).sum() / density.sum()

    perturbation = (
        UnknownRadius(Linf, (0, radius), (0.0, 1.0)) if kind == "unknown" else Linf(radius)
    )
    model = OnePixel("bernoulli" if kind == "bernoulli" else "normal").model
    kernel = BatchedHMC(
        PerturbationAware(model, perturbation), step_size=0.5, num_steps=3, adapt_step_size=False
    )
    rows = 400
    mcmc = pyro.infer.MCMC(
        kernel,
        60,
        20,
        initial_params={"z": mean + variance.sqrt() * torch.randn(rows, 1)},
        disable_progbar=True,
    )
    mcmc.run(torch.full((rows, 1), observed))
    # 2 moments: error rate below 3e-6 (see assert_moments).
    assert_moments((mcmc.get_samples()["z"] - mean) / variance.sqrt(), min_ess=2000)


def test_stock_nuts_takes_the_model(linear_vae):
    x = torch.rand(1, 1, 4, 4)
    for perturbation in (L2(0.3), UnknownRadius(Linf, (0.05, 0.1), (0.0, 1.0))):
        kernel = pyro.infer.NUTS(PerturbationAware(linear_vae.model, perturbation))
        mcmc = pyro.infer.MCMC(kernel, 5, 5, disable_progbar=True)
        mcmc.run(x)
        assert mcmc.get_samples()["z"].shape == (5, 1, 3)
        assert mcmc.get_samples()["z"].isfinite().all()


# --- Unknown radius -------------------------------------------------------------------------------


class TwoComponents:
    """One latent, two pixels observed from -1 to 1, and a component that is summed out."""

    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    slope = torch.tensor([[1.0, -0.5], [0.3, 0.8]], dtype=torch.float64)
    bias = torch.tensor([[0.2, -0.4], [-0.6, 0.5]], dtype=torch.float64)

    def loc(self, z, y):
        return z * self.slope[y] + self.bias[y]

    def model(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            loc = self.loc(z, y)[..., None, None, :]
            pyro.sample("x", dist.Normal(loc, 0.4).to_event(3), obs=2 * x - 1)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0, 0, :1], 1.0).to_event(1))


def test_a_component_is_summed_out_with_a_minimiser_for_each_of_its_values():
    """Of rescaled pixels, too; against a net of every pixel's range."""
    vae, radius = TwoComponents(), 0.15
    x = torch.rand(4, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.randn(4, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    energy = program.ModelPotential(program.target(vae, Linf(radius)), x)({"z": z})
    net = x + radius * torch.linspace(-1, 1, 2001, dtype=torch.float64)[:, None, None, None, None]
    inside = (net >= 0) & (net <= 1)
    joint = []
    for y in range(2):
        likelihood = dist.Normal(vae.loc(z, y)[:, None, None], 0.4).log_prob(2 * net - 1)
        best = torch.where(inside, likelihood, -math.inf).amax(0).sum((1, 2, 3))
        joint.append(vae.weights[y].log() + best + dist.Normal(0.0, 1.0).log_prob(z[:, 0]))
    assert torch.allclose(energy, -torch.stack(joint).logsumexp(0), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("float64")
def test_unknown_radius_is_the_mixture_of_its_balls():
    vae, x, z = RandomVAE(bernoulli), references(5), {"z": torch.randn(5, 4)}
    radii, penalties = (0.0, 0.1, 0.3), (0.5, 4.0, 9.0)
    unknown = UnknownRadius(Linf, radii, penalties)
    each = torch.stack([energy(vae, x, Linf(r) if r else None)(z) for r in radii], -1)
    expected = -(-each - torch.tensor(penalties)).logsumexp(-1)
    assert torch.allclose(energy(vae, x, unknown)(z), expected)
    x_ref = references(5)
    bound = energy(vae, x_ref)(z) + penalties[1]
    for x_adv in attacks_on(x_ref, Linf(0.1)):
        assert (energy(vae, x_adv, unknown)(z) <= bound + 1e-9).all()
    one = UnknownRadius(L2, (0.3,), (0.0,))
    assert torch.allclose(energy(vae, x, one)(z), energy(vae, x, L2(0.3))(z))


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, (0.1,), (0.0,)), "ball must be a kind of ball such as Linf, got 0.1"),
        ((Linf, (), ()), "radii must be finite, >= 0 and increasing"),
        ((Linf, (0.2, 0.1), (0.0, 0.0)), "radii must be finite, >= 0 and increasing"),
        ((Linf, (-0.1, 0.1), (0.0, 0.0)), "radii must be finite, >= 0 and increasing"),
        ((Linf, (0.1, math.inf), (0.0, 0.0)), "radii must be finite, >= 0 and increasing"),
        ((Linf, (0.1, 8), (0.0, 0.0)), "Linf must be at most 1.*got 8.0; .* write 8/255"),
        ((Linf, (0.1, 0.2), (0.0,)), "penalties must be one finite number for each of the 2 radii"),
        (
            (Linf, (0.1,), (math.nan,)),
            "penalties must be one finite number for each of the 1 radii",
        ),
    ],
)
def test_unknown_radius_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnknownRadius(*arguments)


def test_refusals():
    x = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"perturbation must be a ball such as Linf\(0.1\)"):
        PerturbationAware(RandomVAE(normal).model, 0.1)
    with pytest.raises(ValueError, match="no perturbation-aware posterior is known for .* Gamma"):
        most_likely_image(dist.Gamma(x, 1.0), x, Linf(0.1))
    for likelihood in (laplace, logistic_mixture):
        with pytest.raises(ValueError, match="perturbation must be an Linf ball for a"):
            most_likely_image(likelihood(torch.randn(2, 320)), x, L2(0.1))
    for solve in (reach.maximise_linear, functools.partial(reach.nearest, x)):
        with pytest.raises(ValueError, match="ball must be an Linf, L2 or L1 ball"):
            solve(x, x, Ball(0.1))


@pytest.mark.parametrize("ball", [L2(0.6), L1(1.5)], ids=str)
def test_pixels_at_the_range_do_not_move_with_the_image(ball):
    x = torch.rand(5, 1, 3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    logits = torch.randn(5, 1, 3, 3, generator=torch.Generator().manual_seed(2))
    closest = _moving_image(dist.Bernoulli(logits=logits).to_event(3), x, ball)
    (moves,) = torch.autograd.grad(closest.sum(), x)
    between = (closest > 0) & (closest < 1)
    assert torch.equal(moves, between.to(moves))
    assert 0 < int(between.sum()) < between.numel()
