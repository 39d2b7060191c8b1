"""An image's chain does not depend on the images, chains and micro-batches it runs beside."""

from __future__ import annotations

import functools

import pytest
import torch
from kernels import FACTORIES, UNCOUPLED
from programs import HierarchicalVAE
from pyro.infer import MCMC

from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.ops.streams import Streams

pytestmark = pytest.mark.usefixtures("float64")

ROWS = 7
# Near the posterior variances of the linear VAE: unadjusted steps of a fixed size need a metric,
# without which rows fly off, and differences of rounding grow with them.
METRIC = {"z": torch.full((3,), 0.01)}
SCALES = torch.logspace(-2, 2, ROWS).double()
SHIFTS = torch.linspace(-5, 5, ROWS).double() * SCALES


def very_different(rows):
    """Posteriors whose widths span four decades, skewed by a quartic term."""
    scale, shift = SCALES[rows, None], SHIFTS[rows, None]

    def potential(latents):
        y = (latents["z"] - shift) / scale
        return (0.5 * y.square() + 0.1 * y.pow(4) + 0.3 * y.sin()).sum(-1)

    return potential


def select(streams, rows):
    return streams._replace(image=streams.image[rows], chain=streams.chain[rows])


def run(kernel, streams, start, *args, warmup_steps=10, num_samples=3):
    """Draws (num_samples, N, ...) per site, and the infos of all transitions."""
    kernel.streams = streams
    infos = []
    mcmc = MCMC(
        kernel,
        num_samples,
        warmup_steps,
        initial_params=start,
        hook_fn=lambda kernel, *_: infos.append(kernel.info),
        disable_progbar=True,
    )
    mcmc.run(*args)
    return mcmc.get_samples(), infos


def assert_same_chains(alone, together, rows, rtol):
    (draws, infos), (all_draws, all_infos) = alone, together
    for name, value in draws.items():
        assert torch.allclose(value, all_draws[name][:, rows], rtol=rtol, atol=rtol)
    for info, whole in zip(infos, all_infos, strict=True):
        for got, expected in zip(info, whole, strict=True):
            assert torch.allclose(got, expected[rows], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", UNCOUPLED)
def test_images_with_very_different_posteriors(name):
    """Adaptation, tree sizes, acceptances and draws equal those of each image alone.

    Up to the last bit of elementary functions, which processors round differently in vectors of
    different length, as it grows over 13 transitions: step sizes follow acceptances, which follow
    positions, so that it grows tenfold in each of the first.
    """
    start = {"z": SHIFTS[:, None] + torch.randn(ROWS, 3) * SCALES[:, None]}
    streams = Streams.create(ROWS, seed=4)
    make = FACTORIES[name]
    # Energies of a million nats leave few digits to the difference of two of them.
    step_size = {"hmc-fixed": 0.005, "mams": 0.05}.get(name, 0.1)
    together = run(
        make(potential_fn=very_different(slice(None)), step_size=step_size), streams, start
    )
    for i in range(0, ROWS, 2):
        rows = slice(i, i + 1)
        kernel = make(potential_fn=very_different(rows), step_size=step_size)
        alone = run(kernel, select(streams, rows), {"z": start["z"][rows]})
        assert_same_chains(alone, together, rows, rtol=1e-9)
    if name != "hmc-fixed":
        step_sizes = together[1][-1].step_size
        assert step_sizes.max() / step_sizes.min() > 100  # the images do differ


# Without the burn-in: where three dimensions turn as sharply as from a draw of the prior, it
# multiplies the rounding of matrix products by some hundred a step. Elementwise energies, above,
# and micro-batches, below, cover it.
@pytest.mark.parametrize("name", [name for name in UNCOUPLED if name != "burn-in"])
def test_images_of_a_pyro_model(name, linear_vae):
    x = torch.randn(ROWS, 1, 4, 4) * torch.logspace(-1, 1, ROWS)[:, None, None, None]
    start = {"z": torch.randn(ROWS, 3)}
    streams = Streams.create(ROWS, seed=5)
    make = functools.partial(
        FACTORIES[name], linear_vae.model, step_size=0.5, inverse_mass_matrix=METRIC
    )
    together = run(make(), streams, start, x)
    for i in range(0, ROWS, 2):
        rows = slice(i, i + 1)
        alone = run(make(), select(streams, rows), {"z": start["z"][rows]}, x[rows])
        # A matrix product of one row rounds differently from one of seven.
        assert_same_chains(alone, together, rows, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in UNCOUPLED if name != "hmc-fixed"])
def test_images_of_a_hierarchical_constrained_model(name):
    x = torch.rand(ROWS, 1, 4, 4)
    start = {
        "top": torch.randn(ROWS, 1, 2),
        "rate": torch.randn(ROWS, 1),
        "low": torch.randn(ROWS, 1, 3)[:, 0],
    }
    streams = Streams.create(ROWS, seed=6)
    make = functools.partial(FACTORIES[name], HierarchicalVAE().model)
    together = run(make(), streams, start, x, warmup_steps=8, num_samples=3)
    assert (together[0]["rate"] > 0).all()
    for i in (0, ROWS - 1):
        rows = slice(i, i + 1)
        part = {site: value[rows] for site, value in start.items()}
        alone = run(make(), select(streams, rows), part, x[rows], warmup_steps=8, num_samples=3)
        assert_same_chains(alone, together, rows, rtol=1e-9)


def test_the_order_of_images_does_not_matter():
    start = {"z": SHIFTS[:, None] + torch.randn(ROWS, 3) * SCALES[:, None]}
    streams = Streams.create(ROWS, seed=4)
    order = torch.randperm(ROWS)
    together = run(BatchedHMC(potential_fn=very_different(slice(None))), streams, start)
    shuffled = run(
        BatchedHMC(potential_fn=very_different(order)),
        select(streams, order),
        {"z": start["z"][order]},
    )
    assert_same_chains(shuffled, together, order, rtol=1e-9)


def test_the_paper_rule_does_couple_images(linear_vae):
    """The pooled step size is what makes `batch_size` matter there, as the documentation says."""
    x = torch.randn(4, 1, 4, 4) * torch.tensor([0.1, 1.0, 10.0, 30.0])[:, None, None, None]
    start = {"z": torch.randn(4, 3)}
    streams = Streams.create(4, seed=5)
    make = functools.partial(BatchedHMC, linear_vae.model, step_size=0.12, preset="paper")
    _, together = run(make(), streams, start, x)
    rows = slice(0, 1)
    _, alone = run(make(), select(streams, rows), {"z": start["z"][rows]}, x[rows])
    pooled = together[-1].step_size
    assert torch.allclose(pooled, pooled[0], rtol=1e-12, atol=0)
    assert not torch.allclose(alone[-1].step_size, pooled[0], rtol=1e-6, atol=0)


# --- MCMCDefence ----------------------------------------------------------------------------------


def defend(vae, x, kernel, **options):
    defence = MCMCDefence(vae, kernel, num_samples=3, warmup_steps=6, **options)
    return defence(x, torch.Generator().manual_seed(9))


def assert_same_results(got, expected, images=slice(None), chains=slice(None)):
    close = functools.partial(torch.allclose, rtol=1e-9, atol=1e-9)
    assert close(got.initial["z"], expected.initial["z"][chains, images])
    assert close(got.samples["z"], expected.samples["z"][chains, :, images])
    assert got.sample_stats.keys() == expected.sample_stats.keys()
    for name, value in got.sample_stats.items():
        assert close(value, expected.sample_stats[name][chains, :, images]), name


@pytest.mark.parametrize("name", [name for name in UNCOUPLED if name != "hmc-fixed"])
def test_micro_batches_do_not_matter(name, linear_vae):
    x = torch.rand(4, 1, 4, 4)
    kernel = functools.partial(FACTORIES[name], step_size=0.5, inverse_mass_matrix=METRIC)
    whole = defend(linear_vae, x, kernel, num_chains=2)
    assert whole.samples["z"].shape == (2, 3, 4, 3)
    assert not torch.equal(*whole.sample_stats["step_size"])  # each chain has its own
    for batch_size in (1, 6):
        parts = defend(linear_vae, x, kernel, num_chains=2, batch_size=batch_size)
        assert_same_results(parts, whole)
        assert torch.equal(parts.num_gradients, whole.num_gradients)
        assert torch.allclose(parts.reconstruction, whole.reconstruction)


@pytest.mark.parametrize("name", ["hmc", "nuts"])
def test_chains_are_folded_into_the_batch(name, linear_vae):
    """Chain 0 of three is the chain of one; the chains differ; image i is image i."""
    x = torch.rand(5, 1, 4, 4)
    three = defend(linear_vae, x, FACTORIES[name], num_chains=3)
    one = defend(linear_vae, x, FACTORIES[name], num_chains=1)
    assert_same_results(one, three, chains=slice(0, 1))
    assert torch.allclose(one.latents["z"], three.latents["z"])
    assert torch.equal(three.latents["z"], three.samples["z"][0, -1])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (three.samples["z"][a] != three.samples["z"][b]).any(-1).all()
    first = defend(linear_vae, x[:2], FACTORIES[name], num_chains=3)
    assert_same_results(first, three, images=slice(0, 2))
