"""Adaptive gradients against exact derivatives: closed form, quadrature, finite differences with
common noise."""

from __future__ import annotations

import functools

import pytest
import torch
from programs import LinearGaussianVAE, TutorialVAE

from pyro_vae_defence import attacks, data
from pyro_vae_defence.attacks import adaptive
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.mcmc.unrolled import UnrolledKernel
from pyro_vae_defence.models import program
from pyro_vae_defence.models.pretrained import load_pretrained
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.streams import Streams

STANDARD_ERRORS = 5.0  # a component fails by chance with probability 5.7e-7
ROWS = 3
COPIES = 200


@pytest.fixture
def linear(float64):
    vae = LinearGaussianVAE()
    x = torch.rand(ROWS, 1, 4, 4)
    # Rows of the exact posterior mean's derivative: mean(x) = (x - b) A^T.
    _, covariance = vae.exact(x)
    jacobian = covariance @ vae.weight.T / vae.noise**2
    return vae, x, jacobian, covariance


def encoder(vae):
    return lambda x, streams: program.encode(vae, x, streams=streams)


def wrong_encoder(x, streams):
    """Half the right slope, and noise of its own: z0 = B x + .1 noise."""
    return {
        "z": x.flatten(1) @ slope_of_wrong_encoder().T + 0.1 * streams.normal(0, 1, (3,), x.dtype)
    }


def slope_of_wrong_encoder():
    return torch.linspace(-0.5, 0.5, 48, dtype=torch.float64).reshape(3, 16)


def contraction(vae, keep, sd=0.05):
    """A chain whose derivative is known: z -> m(x) + keep (z - m(x)) + noise."""

    def chain(x, start, streams):
        mean = vae.exact(x)[0]
        return {
            "z": mean + keep * (start["z"] - mean) + sd * streams.normal(0, 0, (3,), mean.dtype)
        }

    return chain


def quadratic(x_ref):
    """f(z) = sum(z^2 / 2 + z), for which E f is known under a Gaussian."""
    return lambda latents, x: (0.5 * latents["z"].square() + latents["z"]).sum(1)


def value_and_gradient(objective, x):
    leaf = x.clone().requires_grad_()
    value = objective(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def end_of(encode, x, seed):
    streams = Streams.create(len(x), seed=2 * seed % 2**64)
    return encode(x, streams)["z"].detach()


def prepared(encode, **options):
    generator = torch.Generator().manual_seed(5)
    objective = adaptive.expected(encode, quadratic, resample=False, generator=generator, **options)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(5)))
    return objective, seed


def pull(slope, jacobian):
    return (slope @ jacobian).reshape(-1, 1, 4, 4)


# --- Pathwise estimators --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transfer", "bpda", "unroll", "truncated", "implicit"])
def test_pathwise_estimators_and_their_biases_in_closed_form(linear, name):
    vae, x, jacobian, _ = linear
    keep, wrong = 0.3, slope_of_wrong_encoder()
    chain = contraction(vae, keep)
    energy = program.potential(vae, x)
    encodes = {
        "transfer": adaptive.transfer(wrong_encoder),
        "bpda": adaptive.bpda(wrong_encoder, chain),
        "unroll": adaptive.unroll(wrong_encoder, chain),
        "truncated": adaptive.truncated(wrong_encoder, chain, chain),
        "implicit": adaptive.implicit(wrong_encoder, chain, lambda x, z: energy.at(x)(z), 3),
    }
    # What each derivative is, and hence its bias: the truth is (1 - keep) A + keep B.
    derivative = {
        "transfer": wrong,
        "bpda": wrong,
        "unroll": (1 - keep) * jacobian + keep * wrong,
        "truncated": (1 - keep) * jacobian,
        "implicit": jacobian,
    }[name]
    objective, seed = prepared(encodes[name])
    value, gradient = value_and_gradient(objective(x), x)
    z = end_of(encodes[name], x, seed)
    assert torch.allclose(value, quadratic(x)({"z": z}, x))
    assert torch.allclose(gradient, pull(z + 1, derivative), atol=1e-9)


def test_unrolled_hmc_agrees_with_finite_differences_under_common_noise(linear):
    vae, x, _, _ = linear
    energy = program.potential(vae, x)
    # Short steps: every proposal is accepted, hence no decision depends on x.
    make = functools.partial(
        BatchedHMC, vae.model, step_size=0.02, num_steps=5, adapt_step_size=False
    )
    chain = UnrolledKernel(make, lambda x, z: energy.at(x)(z), 4)
    ones = adaptive.truncated(
        lambda x, streams: {"z": torch.ones(len(x), 3)}, lambda x, z, streams: z, chain
    )
    for encode in (adaptive.unroll(wrong_encoder, chain), ones):
        objective = prepared(encode, num_draws=2)[0](x)
        _, gradient = value_and_gradient(objective, x)
        direction = torch.randn_like(x)
        h = 1e-6
        with torch.no_grad():
            rise = objective(x + h * direction) - objective(x - h * direction)
        slope = (gradient * direction).flatten(1).sum(1)
        assert torch.allclose(slope, rise / (2 * h), rtol=1e-5)


def test_unrolled_gradient_of_a_trained_decoder_is_exact_below_the_scale_of_its_kinks(float64):
    """A rectifier's kinks bend the force where no derivative sees it: only tiny steps agree with
    it."""
    vae = load_pretrained("mnist_vae").double()
    x = data.load("mnist_subset", "test").images(list(range(4))).double()
    potential = program.ModelPotential(vae.model, x)
    make = functools.partial(
        BatchedHMC, vae.model, step_size=0.05, num_steps=4, adapt_step_size=False
    )
    chain = UnrolledKernel(make, lambda images, z: potential.at(images)(z), 1)
    streams = Streams.create(len(x), seed=3)

    def last(images):
        start = program.encode(vae, images, streams=streams)
        return chain(images, start, streams)["z"].square().sum(1)

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(last(leaf).sum(), leaf)
    # The images' own pixels are 0 and 1; an encoder takes any number.
    direction, step = gradient.sign(), 1e-8
    with torch.no_grad():
        seen = (last(x + step * direction) - last(x - step * direction)) / (2 * step)
    torch.testing.assert_close(seen, (gradient * direction).flatten(1).sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("ball", [None, Linf(0.05)], ids=["paper", "aware"])
def test_implicit_is_the_derivative_of_the_mode(float64, ball):
    vae = LinearGaussianVAE()
    x = torch.rand(ROWS, 1, 4, 4)
    energy = program.potential(vae, x, ball)

    def mode(x, start, streams):
        """The mode to machine precision: the energy is piecewise quadratic, so Newton steps end
        there."""
        z = vae.exact(x)[0].detach()
        with torch.enable_grad():
            for _ in range(12):
                z = z.requires_grad_()
                # Second derivatives in z need how x* moves with z, which comes with a gradient in
                # x.
                total = energy.at(x.detach().requires_grad_())({"z": z}).sum()
                (gradient,) = torch.autograd.grad(total, z, create_graph=True)
                hessian = [
                    torch.autograd.grad(gradient[:, d].sum(), z, retain_graph=True)[0]
                    for d in range(3)
                ]
                step = torch.linalg.solve(torch.stack(hessian, 1), gradient[..., None])[..., 0]
                z = (z - step).detach()
        assert step.abs().max() < 1e-9
        return {"z": z}

    encode = adaptive.implicit(encoder(vae), mode, lambda x, z: energy.at(x)(z), 3)
    objective = prepared(encode)[0](x)
    _, gradient = value_and_gradient(objective, x)
    direction = torch.randn_like(x)
    h = 1e-5
    rise = objective(x + h * direction) - objective(x - h * direction)
    slope = (gradient * direction).flatten(1).sum(1)
    assert torch.allclose(slope, rise / (2 * h), rtol=1e-4)
    # With fewer iterations than dimensions, or damping, it is something else.
    rough = adaptive.implicit(encoder(vae), mode, lambda x, z: energy.at(x)(z), 3, damping=50.0)
    _, other = value_and_gradient(prepared(rough)[0](x), x)
    assert not torch.allclose(other, gradient, rtol=0.01)


def test_conjugate_gradients_solve_each_row_and_stop_at_negative_curvature(float64):
    root = torch.randn(4, 5, 5)
    matrices = root @ root.mT + 0.1 * torch.eye(5)
    matrices[3] = -torch.eye(5)
    right = torch.randn(4, 5)
    right[2] = 0.0
    solution = adaptive.conjugate_gradients(
        lambda v: {"z": (matrices @ v["z"][..., None])[..., 0]}, {"z": right}, 20
    )["z"]
    assert torch.allclose(solution[:2], torch.linalg.solve(matrices, right)[:2], rtol=1e-6)
    assert solution[2:].abs().max() == 0


# --- Equilibrium ----------------------------------------------------------------------------------


def assert_unbiased(estimates, truth):
    """Mean of independent estimates ``(R, ...)`` within 5 standard errors of the truth, which must
    not be noise."""
    error = estimates.std(0) / estimates.shape[0] ** 0.5
    score = (estimates.mean(0) - truth) / error
    assert score.abs().max() < STANDARD_ERRORS
    # The test has power: the estimate tells the truth from zero.
    assert (truth.abs() / error).max() > 4 * STANDARD_ERRORS


@pytest.mark.parametrize("of_mean", [False, True])
def test_equilibrium_is_unbiased_for_exact_draws(linear, of_mean):
    vae, x, jacobian, covariance = linear
    root = torch.linalg.cholesky(covariance)
    energy = program.potential(vae, x)

    def exact(x, start, streams):
        return {"z": vae.exact(x)[0] + streams.normal(0, 0, (3,), x.dtype) @ root.T}

    # Copies of the images are independent estimates, in one batch.
    copies = x.repeat(COPIES, 1, 1, 1)
    objective = adaptive.equilibrium(
        encoder(vae), exact, lambda x, z: energy.at(x)(z), quadratic, 50, of_mean=of_mean
    )(copies)
    values, gradients = value_and_gradient(objective, copies)
    mean = vae.exact(x)[0]
    # f is quadratic: E f(z) and f(E z) differ by a constant, and both have derivative f'(mean) A.
    assert_unbiased(gradients.unflatten(0, (COPIES, ROWS)), pull(mean + 1, jacobian))
    expected = quadratic(x)({"z": mean}, x) + 0.5 * covariance.trace() * (1 / 50 if of_mean else 1)
    values = values.unflatten(0, (COPIES, ROWS))
    error = values.std(0) / COPIES**0.5
    assert ((values.mean(0) - expected) / error).abs().max() < STANDARD_ERRORS


def test_equilibrium_of_two_chains_by_hand(float64):
    """Energies z x of chains at 1 and 3, goal z**2: the unbiased covariance of 1, 9 and 1, 3."""
    ends = {"z": torch.tensor([[1.0], [3.0]])}
    x = torch.full((1, 1, 1, 1), 0.5, requires_grad=True)
    objective = adaptive.equilibrium(
        lambda x, streams: ends,
        lambda x, start, streams: ends,
        lambda x, z: z["z"][:, 0] * x[:, 0, 0, 0],
        lambda x_ref: lambda z, x: z["z"][:, 0].square(),
        2,
    )(x.detach())
    value = objective(x)
    value.sum().backward()
    assert value.tolist() == [5.0]
    assert x.grad.flatten().tolist() == [-8.0]


def test_evidence_of_no_chain_is_zero(float64):
    """Of two chains in the right set, with energies 2 and 4, and of none in the wrong one."""
    ends = {"z": torch.tensor([[2.0], [4.0]])}
    x = torch.ones(1, 1, 1, 1, requires_grad=True)
    right, wrong = (
        lambda x_ref, there=there: lambda x, previous, streams: (ends, torch.full((2,), there))
        for there in (True, False)
    )

    def energy(x, z):
        return z["z"][:, 0] * x[:, 0, 0, 0]

    for sets, expected in (((right, wrong), 3.0), ((wrong, right), -3.0)):
        x.grad = None
        value = adaptive.evidence(*sets, energy, 2)(x.detach())(x)
        value.sum().backward()
        assert (value.item(), x.grad.item()) == (expected, expected)


def test_nes_asks_for_images_in_range_alone():
    seen = []

    def prepare(x_ref):
        def objective(x):
            seen.append(x)
            return x.sum((1, 2, 3))

        return objective

    x = torch.rand(2, 1, 4, 4).round().requires_grad_()
    adaptive.nes(prepare, 2, scale=0.5)(x.detach())(x)
    assert len(seen) == 5
    assert all(each.min() >= 0 and each.max() <= 1 for each in seen)


def test_equilibrium_with_persistent_hmc_chains(linear):
    vae, x, jacobian, _ = linear
    energy = program.potential(vae, x)
    make = functools.partial(
        BatchedHMC, vae.model, step_size=0.08, num_steps=5, adapt_step_size=False
    )
    first = UnrolledKernel(make, lambda x, z: energy.at(x)(z), 8)
    resume = UnrolledKernel(make, lambda x, z: energy.at(x)(z), 4)
    copies = x[:1].repeat(COPIES, 1, 1, 1)
    objective = adaptive.equilibrium(
        encoder(vae), first, lambda x, z: energy.at(x)(z), quadratic, 10, resume=resume
    )(copies)
    for _ in range(2):
        _, gradient = value_and_gradient(objective, copies)
    assert_unbiased(gradient, pull(vae.exact(x[:1])[0] + 1, jacobian)[0])


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("radius", [None, 0.1])
def test_equilibrium_of_the_perturbation_aware_posterior_by_quadrature(float64, kind, radius):
    """One latent dimension: expectations and their derivatives by quadrature, draws by
    inversion."""
    ball = None if radius is None else Linf(radius)
    if kind == "gaussian":
        vae, shape, site = LinearGaussianVAE(1), (1, 4, 4), "z"
    else:
        vae, shape, site = TutorialVAE(1).double().eval(), (1, 28, 28), "latent"
        # A decoder that matters: logits of a size that makes posteriors narrow and skewed.
        vae.decoder[-1].weight.data *= 2.0
    x = torch.rand(1, *shape)
    grid = torch.linspace(-6, 6, 1001)[:, None]
    energy = program.potential(vae, x, ball)

    def potential(x, latents):
        return energy.at(x)(latents)

    def density(x):
        return (-potential(x.expand(len(grid), -1, -1, -1), {site: grid})).softmax(0)

    def expectation(x):
        return (density(x) * grid[:, 0].sin()).sum()

    with torch.no_grad():
        cumulative = density(x).cumsum(0)

    def draw(x, start, streams):
        uniform = streams.uniform(0, 0, (), torch.float64)
        return {site: grid[torch.searchsorted(cumulative, uniform).clamp(max=len(grid) - 1)]}

    direction = torch.rand(1, *shape)  # of one sign: components do not cancel
    h = 1e-5
    with torch.no_grad():
        truth = (expectation(x + h * direction) - expectation(x - h * direction)) / (2 * h)
    copies = x.repeat(40, 1, 1, 1)
    objective = adaptive.equilibrium(
        lambda x, streams: {}, draw, potential, lambda x_ref: lambda z, x: z[site][:, 0].sin(), 200
    )(copies)
    slopes = (value_and_gradient(objective, copies)[1] * direction).flatten(1).sum(1)
    assert_unbiased(slopes, truth)


def test_pixels_at_the_range_give_no_gradient_to_the_aware_posterior(float64):
    vae = TutorialVAE().double().eval()
    x = torch.full((2, 1, 28, 28), 0.02)
    latents = {"latent": torch.randn(2, 5)}
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(program.potential(vae, leaf, Linf(0.1))(latents).sum(), leaf)
    logits = vae.decoder(latents["latent"]).reshape(x.shape)
    # Where the likelihood wants less ink, x* = max(x - .1, 0) = 0 whatever x is.
    assert torch.allclose(gradient, torch.where(logits > 0, -logits, 0.0), atol=1e-10)


# --- Black box, averages, engines -----------------------------------------------------------------


def test_nes_estimates_the_gradient_of_the_smoothed_objective(linear):
    _, x, _, _ = linear
    x = 0.3 + 0.4 * x  # no query is clipped
    weight = torch.randn(16)

    def prepare(x_ref):
        return lambda x: (x.flatten(1) @ weight + x.flatten(1).square().sum(1)).detach()

    copies = x.repeat(4 * COPIES, 1, 1, 1)
    objective = adaptive.nes(prepare, 5, 0.02)(copies)
    value, gradients = value_and_gradient(objective, copies)
    # Smoothing a quadratic does not change its slope.
    truth = (weight + 2 * x.flatten(1)).reshape(x.shape)
    assert_unbiased(gradients.unflatten(0, (-1, ROWS)), truth)
    assert torch.equal(value, prepare(x)(copies))
    with torch.no_grad():
        assert not objective(copies).requires_grad


def test_expectation_over_draws(linear):
    vae, x, _, _ = linear
    encode = adaptive.transfer(encoder(vae))
    fresh = adaptive.expected(encode, quadratic, 2)(x)
    assert not torch.equal(fresh(x), fresh(x))
    frozen = adaptive.expected(encode, quadratic, 2, resample=False)(x)
    assert torch.equal(frozen(x), frozen(x))
    many = adaptive.expected(encode, quadratic, 2000, resample=False)(x)(x)
    mean, covariance = vae.exact(x)
    variance = covariance.diagonal()
    truth = quadratic(x)({"z": mean}, x) + 0.5 * variance.sum()
    # Var f = sum (m + 1)^2 v + v^2 / 2 for the guide's independent components.
    error = (((mean + 1).square() * variance + 0.5 * variance.square()).sum(1) / 2000).sqrt()
    assert ((many - truth) / error).abs().max() < STANDARD_ERRORS
    averaged = adaptive.expected(encode, quadratic, 2000, of_mean=True, resample=False)(x)(x)
    error = ((mean + 1).square() @ variance / 2000).sqrt()
    assert ((averaged - quadratic(x)({"z": mean}, x)) / error).abs().max() < STANDARD_ERRORS


def test_draws_are_averaged_on_the_scale_of_the_reading(linear):
    """A goal that is linear on that scale is the same at the mean and in the mean."""
    vae, x, _, _ = linear
    energy = program.potential(vae, x)
    to, back = (lambda z, f=f: {"z": f(z["z"])} for f in (torch.exp, torch.log))

    def goal(x_ref):
        return lambda latents, x: latents["z"].exp().sum(1)

    def derivative(make, of_mean):
        options = {"of_mean": of_mean, "generator": torch.Generator().manual_seed(1)}
        return value_and_gradient(make(goal=goal, **options)(x), x)

    start = encoder(vae)
    for make in (
        functools.partial(adaptive.expected, adaptive.transfer(start), num_draws=5),
        functools.partial(
            adaptive.equilibrium,
            start,
            lambda x, start, streams: start,
            lambda x, z: energy.at(x)(z),
            num_chains=5,
        ),
    ):
        in_the_mean = derivative(make, False)
        torch.testing.assert_close(derivative(make, (to, back)), in_the_mean)
        assert not torch.allclose(derivative(make, True)[0], in_the_mean[0])


def test_persistent_chains_go_on(linear):
    vae, x, _, _ = linear
    seen = []

    def chain(x, start, streams):
        return {"z": torch.zeros(len(x), 3)}

    def resume(x, previous, streams):
        seen.append(previous["z"].clone())
        return {"z": previous["z"] + 1}

    objective = adaptive.expected(
        adaptive.bpda(encoder(vae), chain, resume), quadratic, 2, persistent=True
    )(x)
    for _ in range(3):
        objective(x)
    assert [float(z.mean()) for z in seen] == [0.0, 1.0]


ESTIMATORS = ["transfer", "bpda", "unroll", "truncated", "implicit", "equilibrium", "nes"]


PAIRS = [(name, "classifier") for name in ESTIMATORS]
PAIRS += [
    (name, target) for name in ("unroll", "equilibrium") for target in ("latents", "reconstruction")
]


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_every_estimator_drives_an_attack(linear, name, target):
    vae, x, _, _ = linear
    x = x.float().double()
    energy = program.potential(vae, x)
    make = functools.partial(
        BatchedHMC, vae.model, step_size=0.08, num_steps=3, adapt_step_size=False
    )
    chain = UnrolledKernel(make, lambda x, z: energy.at(x)(z), 2)
    start = encoder(vae)
    normal = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))

    def decode(latents, x):
        return program.decode(vae, latents, (1, 4, 4))

    def classify(latents, x):
        return latents["z"] @ normal

    labels = classify(program.posterior_mean(vae, x), x).argmax(-1)
    goal = {
        "latents": adaptive.latent_distance(lambda x: program.posterior_mean(vae, x)),
        "reconstruction": adaptive.output_damage(
            decode, lambda x: decode(program.posterior_mean(vae, x), x)
        ),
        "classifier": adaptive.misclassification(classify, labels),
    }[target]
    bpda = adaptive.bpda(start, chain)
    objective = {
        "transfer": lambda: adaptive.expected(adaptive.transfer(start), goal),
        "bpda": lambda: adaptive.expected(bpda, goal),
        "unroll": lambda: adaptive.expected(adaptive.unroll(start, chain), goal),
        "truncated": lambda: adaptive.expected(adaptive.truncated(start, chain, chain), goal),
        "implicit": lambda: adaptive.expected(
            adaptive.implicit(start, chain, lambda x, z: energy.at(x)(z), 3), goal
        ),
        "equilibrium": lambda: adaptive.equilibrium(
            start, chain, lambda x, z: energy.at(x)(z), goal, 20, resume=chain
        ),
        "nes": lambda: adaptive.nes(adaptive.expected(bpda, goal, resample=False), 6),
    }[name]()
    result = attacks.PGD(objective, Linf(0.2), 4, num_restarts=2)(x)
    honest = adaptive.expected(adaptive.unroll(start, chain), goal, 50)
    before = honest(x)(x).detach()
    after = honest(x)(result.best()).detach()
    assert (after > before).all()


@pytest.mark.parametrize("name", ["expected", "equilibrium", "nes"])
def test_labels_follow_rows_that_leave_and_rows_of_any_micro_batch(linear, name):
    """Rows that are left may be a multiple of the labels, and other images than these are of."""
    vae, _, _, _ = linear
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    start, chain = encoder(vae), contraction(vae, 0.3)
    seen = []

    def classify(latents, x):
        return torch.stack([x.mean((1, 2, 3)), x.new_zeros(len(x))], 1)

    # Of the second image a dark one is wrong, of the first one a bright one.
    goal = adaptive.misclassification(classify, torch.tensor([1, 0]))

    def watched(x_ref, streams):
        inner = goal(x_ref, streams)

        def value(latents, x):
            found = inner(latents, x)
            bright = x.mean((1, 2, 3))
            seen.append(torch.equal(found, torch.where(streams.image == 0, bright, -bright)))
            return found

        return value

    energy = program.potential(vae, x)
    once = adaptive.expected(adaptive.transfer(start), watched)
    objective = {
        "expected": lambda: once,
        "equilibrium": lambda: adaptive.equilibrium(
            start, chain, lambda x, z: energy.at(x)(z), watched, 2
        ),
        "nes": lambda: adaptive.nes(once, 1),
    }[name]()
    early = attacks.reaches(float(x.mean()))
    for options in ({"stop": early}, {"batch_size": 3}):
        attacks.PGD(objective, Linf(0.2), 4, num_restarts=3, **options)(x)
    assert len(seen) > 8
    assert all(seen)


def test_labels_of_another_number_of_images_are_refused(linear):
    vae, x, _, _ = linear
    goal = adaptive.misclassification(lambda z, x: z["z"], torch.tensor([0]).repeat(2 * ROWS))
    objective = adaptive.nes(adaptive.expected(adaptive.transfer(encoder(vae)), goal))
    with pytest.raises(ValueError, match="labels has 6 entries, but the attack has 3 images"):
        attacks.PGD(objective, Linf(0.1), 1)(x)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2], "labels must be an int64 tensor"),
        (torch.tensor([0.0, 1.0, 2.0]), "labels must be an int64 tensor"),
        (torch.eye(3).long(), "labels must be an int64 tensor"),
        (torch.tensor([0, 1, 3]), r"labels must lie in 0\.\.2, .* got values from 0 to 3"),
        (torch.tensor([-1, 0, 1]), r"labels must lie in 0\.\.2, .* got values from -1 to 1"),
    ],
)
def test_labels_must_be_classes_of_the_scores(linear, labels, message):
    vae, x, _, _ = linear

    def call():
        goal = adaptive.misclassification(lambda z, x: z["z"], labels)
        return adaptive.expected(adaptive.transfer(encoder(vae)), goal, 2)(x)(x)

    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("of_mean", [False, True])
@pytest.mark.parametrize("wrong", [lambda z: z.sum(), lambda z: z[:, :1], lambda z: z])
def test_goals_give_a_number_per_row(linear, of_mean, wrong):
    vae, x, _, _ = linear
    start, chain, energy = encoder(vae), contraction(vae, 0.3), program.potential(vae, x)

    def goal(x_ref):
        return lambda latents, x: wrong(latents["z"])

    for objective in (
        adaptive.expected(adaptive.transfer(start), goal, 2, of_mean=of_mean),
        adaptive.equilibrium(
            start, chain, lambda x, z: energy.at(x)(z), goal, ROWS, of_mean=of_mean
        ),
    ):
        with pytest.raises(ValueError, match="goal must return one number per row"):
            objective(x)(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda f: adaptive.expected(f, quadratic, 0),
            "num_draws must be an integer of at least 1",
        ),
        (
            lambda f: adaptive.expected(f, quadratic, persistent=True, resample=False),
            "persistent chains need fresh noise",
        ),
        (
            lambda f: adaptive.equilibrium(f, f, f, quadratic, 1),
            "num_chains must be an integer of at",
        ),
        (lambda f: adaptive.nes(f, 0), "num_directions must be an integer of at least 1, got 0"),
        (lambda f: adaptive.nes(f, 3, 0.0), "scale must be a positive finite number, got 0.0"),
        (lambda f: adaptive.implicit(f, f, f, 0), "num_iterations must be an integer of at l"),
        (
            lambda f: adaptive.implicit(f, f, f, 3, -1.0),
            "damping must be at least 0 and finite",
        ),
        (
            lambda f: adaptive.misclassification(f, torch.tensor([0, 0, 0]))(
                torch.rand(4, 1, 4, 4)
            ),
            "labels has 3 entries for 4 references",
        ),
        (
            lambda f: adaptive.misclassification(lambda z, x: x[:, 0, 0, 0], torch.tensor([0]))(
                x := torch.rand(4, 1, 4, 4)
            )({}, x),
            r"classify must return scores \(4, classes\) .* got shape \(4,\)",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda *_: None)
