"""NUTS, grown iteratively under masks, against a recursive implementation given the same noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mcmc_reference import Noise, RecursiveNUTS

from pyro_vae_defence.mcmc import hmc, nuts
from pyro_vae_defence.mcmc.integrators import Phase, leapfrog
from pyro_vae_defence.ops.streams import Streams

pytestmark = pytest.mark.usefixtures("float64")

# Each target twice: as the library sees it, and in closed form for one chain.

SCALES = np.array([0.3, 1.0, 3.0])


def gaussian(latents):
    return 0.5 * (latents["z"] / torch.from_numpy(SCALES)).square().sum(-1)


def gaussian_density(z):
    return 0.5 * np.sum((z / SCALES) ** 2), z / SCALES**2


def banana(latents):
    x, y, w = latents["z"].unbind(-1)
    return 0.5 * x.square() + 5.0 * (y - x.square()).square() + 0.5 * w.square()


def banana_density(z):
    x, y, w = z
    bend = y - x**2
    return 0.5 * x**2 + 5 * bend**2 + 0.5 * w**2, np.array([x - 20 * x * bend, 10 * bend, w])


def funnel(latents):
    v, x = latents["z"][:, 0], latents["z"][:, 1:]
    return v.square() / 18 + 0.5 * x.square().sum(-1) * (-v).exp() + v


def funnel_density(z):
    v, x = z[0], z[1:]
    with np.errstate(over="ignore", invalid="ignore"):
        energy = v**2 / 18 + 0.5 * np.sum(x**2) * np.exp(-v) + v
        gradient = np.array([v / 9 - 0.5 * np.sum(x**2) * np.exp(-v) + 1, *(x * np.exp(-v))])
    return energy, gradient


def walled(latents):
    z = latents["z"]
    return 0.5 * z.square().sum(-1) + torch.where(z[:, 0] > 1.0, torch.inf, 0.0)


def walled_density(z):
    return 0.5 * np.sum(z**2) + (math.inf if z[0] > 1.0 else 0.0), z


TARGETS = {
    "gaussian": (gaussian, gaussian_density),
    "banana": (banana, banana_density),
    "funnel": (funnel, funnel_density),
    "walled": (walled, walled_density),
}
ROWS = 90
MAX_TREE_DEPTH = 6


def noise_of(streams, step):
    """The numbers nuts.step takes from the stream of each row."""

    def uniform(purpose, size):
        return streams.uniform(step, purpose, (size,), torch.float64).numpy()

    forward = uniform(nuts._DIRECTION, MAX_TREE_DEPTH) > 0.5
    subtree = np.log(uniform(nuts._SUBTREE, MAX_TREE_DEPTH))
    leaves = [np.log(uniform(nuts._LEAF + depth, 2**depth)) for depth in range(MAX_TREE_DEPTH)]
    rows = range(len(streams.image))
    return [Noise(forward[i], subtree[i], [leaf[i] for leaf in leaves]) for i in rows]


def row(streams, i):
    return streams._replace(image=streams.image[i : i + 1], chain=streams.chain[i : i + 1])


@pytest.mark.parametrize(
    "inverse_mass", [None, np.array([0.5, 1.0, 4.0])], ids=["unit", "diagonal"]
)
@pytest.mark.parametrize("name", TARGETS)
def test_equals_the_recursive_reference(name, inverse_mass):
    """Same trajectory, leaf count, depth, flags and state, row by row, over two transitions."""
    potential, density = TARGETS[name]
    step_size = torch.logspace(-2, 1.0, ROWS)  # from "max depth reached" to "diverges at once"
    streams = Streams.create(ROWS, seed=11)
    metric = None if inverse_mass is None else {"z": torch.from_numpy(inverse_mass)}
    z = torch.randn(ROWS, 3)
    z[:, 0] = -z[:, 0].abs()
    state = hmc.init(potential, {"z": z})
    seen = {"diverging": 0, "turned": 0, "deepest": 0, "moved": 0}
    for step in range(2):
        momentum = hmc.draw_momentum(streams, step, state.position, metric)["z"].numpy()
        noise = noise_of(streams, step)
        before = state.position["z"].numpy()
        state, info = nuts.step(potential, state, streams, step_size, MAX_TREE_DEPTH, metric)
        for i in range(ROWS):
            sampler = RecursiveNUTS(
                density,
                float(step_size[i]),
                MAX_TREE_DEPTH,
                np.ones(3) if inverse_mass is None else inverse_mass,
            )
            expected = sampler.transition(before[i], momentum[i], noise[i])
            assert int(info.num_steps[i]) == expected.num_leaves
            assert int(info.tree_depth[i]) == expected.depth
            assert bool(info.diverging[i]) == expected.diverging
            assert bool(info.accepted[i]) == expected.accepted
            assert int(info.offset[i]) == expected.offset
            got = state.position["z"][i].numpy()
            assert np.allclose(got, expected.position, rtol=1e-9, atol=1e-11)
            assert np.isclose(float(info.energy[i]), expected.hamiltonian, rtol=1e-9)
            assert np.isclose(float(info.acceptance_rate[i]), expected.acceptance, atol=1e-8)
            energy, gradient = density(got)
            assert np.isclose(float(state.energy[i]), energy)
            assert np.allclose(state.gradient["z"][i].numpy(), gradient)
            seen["diverging"] += expected.diverging
            seen["turned"] += not expected.diverging and expected.num_leaves < 2**MAX_TREE_DEPTH - 1
            seen["deepest"] += expected.num_leaves == 2**MAX_TREE_DEPTH - 1
            seen["moved"] += expected.accepted
    # Every way a tree can end was seen, or the comparison shows little.
    assert min(seen.values()) >= 10, seen


@pytest.mark.parametrize("name", TARGETS)
def test_a_batch_equals_its_rows_alone(name):
    """Rows that turn, diverge or go on at different times do not disturb each other."""
    potential, _ = TARGETS[name]
    rows = 24
    step_size = torch.logspace(-1.5, 1.0, rows)
    streams = Streams.create(rows, seed=3)
    z = torch.randn(rows, 3)
    z[:, 0] = -z[:, 0].abs()
    whole, whole_info = nuts.step(
        potential, hmc.init(potential, {"z": z}), streams, step_size, MAX_TREE_DEPTH
    )
    for i in range(rows):
        alone, info = nuts.step(
            potential,
            hmc.init(potential, {"z": z[i : i + 1]}),
            row(streams, i),
            step_size[i : i + 1],
            MAX_TREE_DEPTH,
        )
        assert torch.allclose(alone.position["z"][0], whole.position["z"][i], rtol=1e-12, atol=0)
        for got, expected in zip(info, whole_info, strict=True):
            assert torch.allclose(got[0], expected[i], rtol=1e-12, atol=0)
    assert whole_info.num_steps.unique().numel() > 3


def test_checkpoints_close_the_right_subtrees():
    """Walking a tree of depth 5: an odd leaf closes every aligned block of 2, 4, 8, ... it ends."""
    stored: dict[int, int] = {}
    for leaf in range(32):
        if leaf % 2 == 0:
            stored[(leaf >> 1).bit_count()] = leaf
            continue
        firsts = [stored[number] for number in nuts._subtrees_closed_by(leaf)]
        ends = [size for size in (2, 4, 8, 16, 32) if (leaf + 1) % size == 0]
        assert firsts == [leaf + 1 - size for size in ends]


def test_a_batch_of_finished_trees_costs_no_gradient():
    calls = 0

    def counted(latents):
        nonlocal calls
        calls += 1
        return gaussian(latents)

    state = hmc.init(counted, {"z": torch.randn(4, 3)})
    calls = 0
    _, info = nuts.step(counted, state, Streams.create(4, seed=0), torch.full((4,), 0.5), 10)
    # At most one gradient per leaf of the largest tree at every depth.
    depth = int(info.tree_depth.max())
    assert int(info.num_steps.max()) <= calls < 2**depth


def test_the_first_leaf_of_a_subtree_is_taken_whatever_the_uniform(monkeypatch):
    """In float32 a uniform may round to 1; the candidate must still be one of the leaves."""

    def extreme(self, step, purpose=0, event_shape=(), dtype=None):
        value = 1.0 if purpose >= nuts._LEAF else 0.75 if purpose == nuts._DIRECTION else 1e-9
        return torch.full((len(self.image), *event_shape), value, dtype=dtype)

    streams = Streams.create(3, seed=0)
    state = hmc.init(gaussian, {"z": torch.ones(3, 3)})
    momentum = hmc.draw_momentum(streams, 0, state.position, None)
    monkeypatch.setattr(hmc.Streams, "uniform", extreme)
    monkeypatch.setattr(hmc, "draw_momentum", lambda *_: momentum)
    after, info = nuts.step(gaussian, state, streams, torch.full((3,), 0.1), 1)
    assert info.accepted.all()
    first = leapfrog(gaussian, Phase(state.position, momentum, *state[1:3]), torch.full((3,), 0.1))
    assert torch.equal(after.position["z"], first.position["z"])
