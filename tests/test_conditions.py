"""Per-image arguments: what a row gets is what it gets where all images have its arguments."""

from __future__ import annotations

import functools
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC
from torch.nn.functional import one_hot

from pyro_vae_defence import attacks, metrics
from pyro_vae_defence.attacks.margin import r_margin
from pyro_vae_defence.defence import (
    ConvergenceRule,
    DefendedClassifier,
    EncoderDefence,
    MCMCDefence,
    NoDefence,
    PosteriorModeDefence,
    calibrate_radius,
    detection_scores,
)
from pyro_vae_defence.defence.classifier import read_latents
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import conditions, program
from pyro_vae_defence.ops.balls import L2, Linf
from pyro_vae_defence.robustness import ATTACKS, Budget, evaluate_robustness

pytestmark = pytest.mark.usefixtures("float64")

SHAPE = (1, 4, 4)
CLASSES = 3


class ConditionalVAE:
    """x ~ N(Wz + c_y + m, .2), with a class y and a mask m of pixels that are brighter."""

    def __init__(self):
        options = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64}
        self.weight = 0.2 * torch.randn(2, 16, **options)
        self.centre = torch.rand(CLASSES, 16, **options)
        self.pull = torch.randn(CLASSES, 2, **options)

    def mean(self, z, y, bright):
        centre = 0.5 if y is None else one_hot(y, CLASSES).to(z) @ self.centre
        mean = (z @ self.weight + centre).sigmoid()
        return mean if bright is None else mean + 0.1 * bright.flatten(1)

    def model(self, x, y=None, bright=None, scale=1.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), scale).to_event(1))
            mean = self.mean(z, y, bright)
            pyro.sample("obs", dist.Normal(mean, 0.2).to_event(1), obs=x.flatten(1))

    def guide(self, x, y=None, bright=None, scale=1.0):
        pull = 0.0 if y is None else one_hot(y, CLASSES).to(x) @ self.pull
        with pyro.plate("data", len(x)):
            loc = x.flatten(1) @ self.weight.T + pull
            scale = 0.3 if y is None else 0.3 + 0.1 * y.to(x)[:, None]
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


VAE = ConditionalVAE()
X = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
Y = torch.tensor([2, 0, 1, 1, 2])
BRIGHT = (X < 0.5).to(X)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- Rows -----------------------------------------------------------------------------------------


def chain(images, **options):
    defence = MCMCDefence(VAE, num_samples=4, warmup_steps=3, num_chains=2, **options)
    result = defence(images, seeded())
    return torch.cat(
        [result.samples["z"].transpose(0, 2).flatten(1), result.reconstruction.flatten(1)], 1
    )


def stopped(images):
    rule = ConvergenceRule(check_every=8)
    defence = MCMCDefence(VAE, BatchedHMC, 40, 4, 4, until_converged=rule)
    result = defence(images, seeded())
    return torch.cat([result.latents["z"], result.num_gradients[:, None]], 1)


def stock(images):
    torch.manual_seed(0)
    kernel = functools.partial(HMC, step_size=0.1, num_steps=2, adapt_step_size=False)
    result = MCMCDefence(VAE, kernel, 2, 0)(images, seeded())
    z = result.samples["z"][0].flatten(0, 1)
    repeated = tuple(value.repeat((2,) + (1,) * (value.dim() - 1)) for value in images)
    vae, x = program.at_images(VAE, repeated)
    # Its noise is torch's, so what is compared is the energy of where it went.
    return (
        (result.sample_stats["lp"][0].flatten() + program.potential(vae, x)({"z": z})).view(2, -1).T
    )


def detected(images):
    defence = MCMCDefence(VAE, num_samples=4, warmup_steps=3, num_chains=2, perturbation=Linf(0.1))
    scores = detection_scores(defence, defence(images, seeded()))
    return torch.stack(list(scores.values()), 1)


def attacked(objective, images, **options):
    options = {"num_steps": 3, "num_restarts": 2, "batch_size": 3} | options
    result = attacks.PGD(objective, Linf(0.1), **options)(images, seeded())
    return torch.cat([result.x_adv.flatten(2), result.objective[..., None]], 2).transpose(0, 1)


def classifier(latents):
    return latents["z"] @ VAE.pull.T


def annealed(images):
    def transition(latents, potential, step):
        return {"z": 0.9 * latents["z"]}  # deterministic: rows are compared, not densities

    return metrics.ais_log_weights(VAE, images, transition, num_chains=2, generator=seeded()).T


ROWWISE = {
    "nothing": lambda images: NoDefence(VAE)(images, seeded()).reconstruction,
    "encoder": lambda images: (
        EncoderDefence(VAE, 3)(images, seeded()).samples["z"][0].transpose(0, 1)
    ),
    "chain": chain,
    "chain in micro-batches": functools.partial(chain, batch_size=4),
    "chain that knows perturbations": functools.partial(chain, perturbation=Linf(0.1)),
    "chain from the mode": functools.partial(chain, initial="mode"),
    "chain from the prior": functools.partial(chain, initial="prior"),
    "chain from walks": functools.partial(chain, initial="annealed", num_temperatures=4),
    "chains that leave": stopped,
    "stock kernel": stock,
    "mode": lambda images: PosteriorModeDefence(VAE, num_steps=5)(images, seeded()).latents["z"],
    "re-encoded": lambda images: read_latents(
        VAE, MCMCDefence(VAE, num_samples=2, warmup_steps=2)(images, seeded())
    )["z"][0],
    "class probabilities": lambda images: DefendedClassifier(
        MCMCDefence(VAE, num_samples=2, warmup_steps=2, batch_size=2), lambda z: z @ VAE.pull.T
    )(images, seeded()),
    "detection": detected,
    "symmetric_kl": lambda images: attacked(attacks.symmetric_kl(VAE), images),
    "maximum_damage": lambda images: attacked(attacks.maximum_damage(VAE), images),
    "cross_entropy": lambda images: attacked(
        attacks.cross_entropy(VAE, classifier), images, stop=attacks.misclassified(VAE, classifier)
    ),
    "margin": lambda images: torch.stack(
        r_margin(
            VAE,
            attacks.PGD(attacks.maximum_damage(VAE), L2(2.0), 2),
            images,
            0.4,
            num_bisections=2,
            num_draws=3,
            generator=seeded(),
        ),
        1,
    ),
    "nll": lambda images: metrics.nll(VAE, images, 20, rows=4, generator=seeded()),
    "annealed": annealed,
}


@pytest.mark.parametrize("compute", ROWWISE.values(), ids=ROWWISE)
def test_rows_keep_their_arguments(compute):
    together = compute((X, Y, BRIGHT))
    assert len(together) == len(X)
    for row in (1, 2, 4):  # of every class, and the last
        same = (X, Y[row].expand(5), BRIGHT[row].expand(5, *SHAPE))
        torch.testing.assert_close(compute(same)[row], together[row], rtol=1e-9, atol=1e-9)
    # It can fail: the arguments matter.
    if compute is not stock:
        others = compute((X, (Y + 1) % CLASSES, BRIGHT))
        assert not torch.allclose(others, together, rtol=1e-3, atol=1e-3)


def test_energy_by_hand():
    vae, x = program.at_images(VAE, (X, Y, BRIGHT))
    z = torch.randn(5, 2)
    mean = (z @ VAE.weight + VAE.centre[Y]).sigmoid() + 0.1 * BRIGHT.flatten(1)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    expected = expected + dist.Normal(mean, 0.2).log_prob(X.flatten(1)).sum(1)
    energy = program.potential(vae, x)
    torch.testing.assert_close(energy({"z": z}), -expected)
    rows = torch.tensor([3, 0])
    torch.testing.assert_close(energy.take(rows)({"z": z[rows]}), -expected[rows])
    torch.testing.assert_close(
        energy.at(x.repeat(2, 1, 1, 1))({"z": z.repeat(2, 1)}), -expected.repeat(2)
    )
    with pytest.raises(ValueError, match="called with 7 images, but their conditions have 5 rows"):
        energy.at(torch.rand(7, *SHAPE))


def test_stream_passes_on_what_a_loader_yields():
    batches = list(zip(X.split(2), Y.split(2), BRIGHT.split(2), ["a", "b", "c"], strict=True))
    results = list(NoDefence(VAE).stream(batches, seeded()))
    found = torch.cat([result.reconstruction for result in results])
    torch.testing.assert_close(found, NoDefence(VAE)((X, Y, BRIGHT), seeded()).reconstruction)
    assert torch.equal(results[1].conditions[0], Y[2:4])


def test_radius_penalties_are_of_conditional_gains():
    both = calibrate_radius(
        VAE, (X, Y, BRIGHT), (0.0, 0.1), num_steps=3, batch_size=2, quantile=1.0
    )
    parts = [
        calibrate_radius(
            VAE, (X[i : i + 1], Y[i : i + 1], BRIGHT[i : i + 1]), (0.0, 0.1), num_steps=3
        )
        for i in range(5)
    ]
    assert both.penalties[1] == pytest.approx(max(part.penalties[1] for part in parts))


@pytest.mark.parametrize(
    "classify", [pytest.param(None, marks=pytest.mark.slow), lambda z: z @ VAE.pull.T]
)
def test_robustness_is_that_of_the_conditional_vae(classify):
    budget = Budget(
        num_steps=2,
        num_restarts=1,
        num_draws=(1,),
        num_chains=2,
        num_directions=2,
        check_steps=4,
        check_images=2,
        check_draws=2,
        scoring_draws=2,
        selection_draws=1,
        num_iterations=2,
        black_box_steps=2,
        unrolled_transitions=1,
    )

    def report(vae, images):
        return evaluate_robustness(
            vae,
            MCMCDefence(vae, functools.partial(BatchedHMC, num_steps=1), 1, 1),
            images,
            Y if classify else None,
            classifier=classify,
            budget=budget,
            similarity=lambda a, b: 1 - (a - b).square().mean((1, 2, 3)),
            generator=seeded(),
        )

    # A VAE whose class and mask are bound says the same where all images have these.
    same = report(VAE, (X, torch.full_like(Y, 1), torch.ones_like(X)))
    assert len(same.attacks) == len([row for row in ATTACKS if classify or not row.classes])
    bound = types.SimpleNamespace(
        model=lambda x: VAE.model(x, torch.ones(len(x), dtype=torch.long), torch.ones_like(x)),
        guide=lambda x: VAE.guide(x, torch.ones(len(x), dtype=torch.long), torch.ones_like(x)),
    )
    alone = report(bound, X)
    torch.testing.assert_close(same.per_image, alone.per_image)
    assert [a.figure for a in same.attacks] == [a.figure for a in alone.attacks]


def test_the_mean_posterior_variance_is_that_given_the_conditions():
    """The guide's scale is 0.3 + 0.1 y, and 0.3 where it is not told."""
    batches = [(X[:2], Y[:2]), (X[2:], Y[2:])]
    expected = (0.3 + 0.1 * Y).square().mean().expand(2)
    torch.testing.assert_close(program.mean_posterior_variance(VAE, batches)["z"], expected)
    alone = program.mean_posterior_variance(VAE, [X])["z"]
    torch.testing.assert_close(alone, torch.full((2,), 0.09))
    needs = types.SimpleNamespace(model=lambda x, y: None, guide=lambda x, y: None)
    with pytest.raises(ValueError, match="need 1 arguments beside the images, got 0"):
        program.mean_posterior_variance(needs, [X])
    with pytest.raises(ValueError, match="vae is the class .*: pass an instance"):
        program.mean_posterior_variance(type(VAE), [X])


# --- Arguments bound beforehand -------------------------------------------------------------------


def partial(**arguments):
    return types.SimpleNamespace(
        model=functools.partial(VAE.model, **arguments),
        guide=functools.partial(VAE.guide, **arguments),
    )


def test_partial_programs_keep_their_rows():
    bound = partial(y=Y, bright=BRIGHT)
    defence = MCMCDefence(bound, num_samples=2, warmup_steps=2, num_chains=2, batch_size=4)
    found = defence(X, seeded()).samples["z"]
    given = MCMCDefence(VAE, num_samples=2, warmup_steps=2, num_chains=2, batch_size=4)
    torch.testing.assert_close(found, given((X, Y, BRIGHT), seeded()).samples["z"])
    torch.testing.assert_close(
        attacked(attacks.symmetric_kl(bound), X),
        attacked(attacks.symmetric_kl(VAE), (X, Y, BRIGHT)),
    )
    torch.testing.assert_close(
        metrics.nll(bound, X, 20, generator=seeded()),
        metrics.nll(VAE, (X, Y, BRIGHT), 20, generator=seeded()),
    )


def test_parts_of_a_result_keep_the_rows_that_partial_programs_have_bound(monkeypatch):
    """A part of the images was taken for all of them, with the first labels."""
    both = partial(y=Y, bright=BRIGHT), VAE
    defences = [MCMCDefence(vae, num_samples=2, warmup_steps=2, num_chains=2) for vae in both]
    results = [
        defence(images, seeded())
        for defence, images in zip(defences, (X, (X, Y, BRIGHT)), strict=True)
    ]
    for module in ("detection", "result"):
        monkeypatch.setattr(f"pyro_vae_defence.defence.{module}.ROWS", 4)
    torch.testing.assert_close(*map(detection_scores, defences, results))
    for image in (None, 3):
        found, expected = (
            result.to_datatree(image, log_likelihood=vae)["log_likelihood"]["obs"].values
            for result, vae in zip(results, both, strict=True)
        )
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("rows", [[3, 1], [0, 0], [2], [0, 1, 2, 3, 0]])
def test_rows_of_an_attack_keep_what_programs_have_bound(rows):
    """Also half of the images: twice as many as these are as many as there are labels."""
    index = torch.tensor(rows)
    bound = conditions.bind(partial(y=Y[:4], bright=BRIGHT[:4]), X[index], (), index)
    expected = conditions.bind(VAE, X[index], (Y[index], BRIGHT[index]))
    torch.testing.assert_close(
        program.potential(bound, X[index])({"z": torch.ones(len(rows), 2)}),
        program.potential(expected, X[index])({"z": torch.ones(len(rows), 2)}),
    )


def test_a_tensor_that_is_no_images_own_stays_whole():
    """Five weights and five images are a coincidence."""
    weights = torch.randn(5, 16)

    class Weighted(ConditionalVAE):
        def model(self, x, y=None, weights=None):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(5), 1.0).to_event(1))
                mean = z @ weights + one_hot(y, CLASSES).to(z) @ self.centre
                pyro.sample("obs", dist.Normal(mean, 0.2).to_event(1), obs=x.flatten(1))

        def guide(self, x, y=None, weights=None):
            with pyro.plate("data", len(x)):
                loc = x.flatten(1) @ weights.T + one_hot(y, CLASSES).to(x).sum(1, keepdim=True)
                pyro.sample("z", dist.Normal(loc, 0.3).to_event(1))

    vae = Weighted()
    bound = types.SimpleNamespace(
        model=functools.partial(vae.model, y=Y, weights=weights),
        guide=functools.partial(vae.guide, y=Y, weights=weights),
    )
    at, x = program.at_images(bound, X)
    assert set(at.model.keywords) == {"y"}
    rows = torch.tensor([4, 1])
    z = torch.randn(5, 5)
    whole = program.potential(at, x)({"z": z})
    mean = z @ weights + vae.centre[Y]
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    expected = expected + dist.Normal(mean, 0.2).log_prob(X.flatten(1)).sum(1)
    torch.testing.assert_close(whole, -expected)
    part = program.potential(conditions.take(at, rows), x[rows])({"z": z[rows]})
    torch.testing.assert_close(part, -expected[rows])


# --- Signatures and errors ------------------------------------------------------------------------


def vae_of(model, guide=None):
    return types.SimpleNamespace(model=model, guide=guide or model)


@pytest.mark.parametrize(
    ("program_", "entries"),
    [
        (lambda x: None, 1),
        (lambda x, y: None, 2),
        (lambda x, y=None: None, 2),
        (lambda x, y=None, mask=None: None, 3),
        (lambda x, beta=1.0: None, 1),
        (lambda x, y=None, beta=1.0, mask=None: None, 2),
        (lambda x, *rest: None, 3),
        (lambda x, *, y=None: None, 1),
        (lambda x, **rest: None, 1),
        (functools.partial(lambda x, y=None: None, y=3), 1),
    ],
)
def test_what_programs_take_of_a_batch(program_, entries):
    assert len(conditions.taken((X, Y, BRIGHT), vae_of(program_))) == entries
    assert len(conditions.taken((X, None, None), vae_of(lambda x, y=None: None))) == 1
    assert conditions.taken(X, vae_of(lambda x: None)) == (X,)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((X, [2, 0, 1, 1, 2]), r"x\[1\] must be a tensor with one row per image, got list"),
        ((X, Y[:4]), r"x\[1\] must have one row for each of 5 images, got shape \(4,\)"),
        ((X, torch.tensor(2)), r"x\[1\] must have one row for each"),
        ((), "x is empty"),
        ((X, Y, BRIGHT, Y), "takes fewer arguments than the 3 conditions"),
    ],
)
def test_conditions_that_do_not_fit(images, message):
    for call in (NoDefence(VAE), functools.partial(metrics.nll, VAE)):
        with pytest.raises(ValueError, match=message):
            call(images)


def test_programs_that_take_different_arguments():
    vae = vae_of(lambda x, y: None, lambda x: None)
    with pytest.raises(ValueError, match="vae.model takes 1 arguments.*vae.guide 0"):
        NoDefence(vae)((X, Y))
    with pytest.raises(ValueError, match="need 1 arguments beside the images, got 0"):
        NoDefence(vae_of(lambda x, y: None))(X)


def test_an_objective_without_conditions_says_so():
    def objective(x_ref):
        return lambda x: x.flatten(1).sum(1)

    with pytest.raises(ValueError, match="takes no conditions"):
        attacks.PGD(objective, Linf(0.1), 1)((X, Y))


def test_an_attack_resumes_only_with_its_conditions(tmp_path):
    path = tmp_path / "progress.pt"
    calls = iter(range(100))

    def interrupted(x_ref, streams=None, conditions=()):
        prepared = attacks.symmetric_kl(VAE)(x_ref, streams=streams, conditions=conditions)

        def objective(x):
            if next(calls) == 12:
                raise KeyboardInterrupt
            return prepared(x)

        return objective

    options = {"num_steps": 5, "batch_size": 3, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        attacks.PGD(interrupted, Linf(0.1), **options)((X, Y, BRIGHT), seeded())
    with pytest.raises(ValueError, match="belongs to other images"):
        attacks.PGD(interrupted, Linf(0.1), **options)((X, Y.flip(0), BRIGHT), seeded())
    resumed = attacks.PGD(interrupted, Linf(0.1), **options)((X, Y, BRIGHT), seeded(5))
    options = {"num_steps": 5, "batch_size": 3}
    whole = attacks.PGD(attacks.symmetric_kl(VAE), Linf(0.1), **options)((X, Y, BRIGHT), seeded())
    torch.testing.assert_close(resumed.x_adv, whole.x_adv)
