"""Unrolled chains: the run itself, and its derivative against finite differences."""

from __future__ import annotations

import functools

import pytest
import torch
from programs import LinearGaussianVAE, TutorialVAE

from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS, unrolled
from pyro_vae_defence.mcmc.unrolled import UnrolledKernel, record, replay
from pyro_vae_defence.models import program
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.streams import Streams

KERNELS = {
    "hmc": functools.partial(BatchedHMC, step_size=0.12, num_steps=3),
    "hmc-fixed": functools.partial(
        BatchedHMC, step_size=0.11, num_steps=4, jitter=0.0, adapt_step_size=False
    ),
    "nuts": functools.partial(BatchedNUTS, step_size=0.12, max_tree_depth=3),
    "paper": functools.partial(BatchedHMC, step_size=0.1, preset="paper"),
}
BALLS = {"paper": None, "aware": Linf(0.1)}
ROWS = 6


def case(kind, ball):
    """A VAE, images, a start and its energy: Gaussian likelihood (4x4), or Bernoulli (28x28)."""
    if kind == "gaussian":
        vae, shape = LinearGaussianVAE(), (1, 4, 4)
    else:
        vae, shape = TutorialVAE().double().eval(), (1, 28, 28)
    x = torch.rand(ROWS, *shape, dtype=torch.float64)
    energy = program.potential(vae, x, ball)
    start = {n: v.detach() for n, v in program.encode(vae, x).items()}
    return vae, x, start, lambda x, z: energy.at(x)(z)


def matrix(start):
    return {n: torch.linspace(0.5, 1.5, v.shape[1], dtype=torch.float64) for n, v in start.items()}


CASES = [
    (kind, ball, name)
    for kind in ("gaussian", "bernoulli")
    for ball in BALLS
    for name in KERNELS
    if name != "paper"
] + [("gaussian", "paper", "paper")]


@pytest.mark.parametrize(
    ("kind", "ball", "name"), [c for c in CASES if c[::2] != ("bernoulli", "hmc-fixed")]
)
def test_replay_follows_the_run_and_its_derivative_is_exact(float64, kind, ball, name):
    vae, x, start, energy = case(kind, BALLS[ball])
    streams = Streams.create(ROWS, seed=3)
    mass = matrix(start)
    transitions = 4 if kind == "gaussian" else 2
    kernel = KERNELS[name](program.target(vae, BALLS[ball]), inverse_mass_matrix=mass)
    end, decisions = record(kernel, x, start, streams, transitions, 1)
    again = replay(energy, x, start, streams, decisions, mass)
    for site in end:
        assert torch.allclose(again[site], end[site], atol=1e-9)
    moves = torch.stack([d.offset for d in decisions])
    assert (moves != 0).any()
    if (kind, name) == ("gaussian", "hmc-fixed"):
        assert (moves == 0).any()
    if name == "nuts":
        assert moves.min() < 0 < moves.max()
    if name == "paper":  # one step size for the batch, which goes on to adapt after warm-up
        sizes = torch.stack([d.step_size for d in decisions])
        assert (sizes == sizes[:, :1]).all()
        assert len(set(sizes[:, 0].tolist())) == transitions

    # One direction in images and start at once, one derivative per row.
    directions = [torch.randn_like(x), *(torch.randn_like(v) for v in start.values())]

    def moved(step):
        latents = {n: v + step * d for (n, v), d in zip(start.items(), directions[1:], strict=True)}
        z = replay(energy, x + step * directions[0], latents, streams, decisions, mass)
        return torch.cat([v.flatten(1).sin().sum(1, keepdim=True) for v in z.values()], 1).sum(1)

    leaf = x.clone().requires_grad_()
    begin = {n: v.clone().requires_grad_() for n, v in start.items()}
    z = replay(energy, leaf, begin, streams, decisions, mass)
    value = torch.stack([v.flatten(1).sin().sum(1) for v in z.values()]).sum(0)
    gradients = torch.autograd.grad(value.sum(), (leaf, *begin.values()))
    slope = torch.stack(
        [(g * d).flatten(1).sum(1) for g, d in zip(gradients, directions, strict=True)]
    ).sum(0)
    h = 1e-6
    difference = (moved(h) - moved(-h)) / (2 * h)
    # Rounding of the difference is about 1e-10; truncation is smaller.
    assert torch.allclose(slope, difference, rtol=1e-5, atol=1e-7)
    assert slope.abs().max() > 1e-2


def test_graphs_built_again_give_the_gradient_of_graphs_kept_and_leave_parameters_alone(
    float64, monkeypatch
):
    vae, x, start, energy = case("bernoulli", None)
    streams = Streams.create(ROWS, seed=1)
    _, decisions = record(KERNELS["hmc"](vae.model), x, start, streams, 4, 2)
    found = []
    for build_again in (True, False):
        leaf = x.clone().requires_grad_()
        z = {"latent": start["latent"].clone().requires_grad_()}
        with monkeypatch.context() as patch:
            if not build_again:
                patch.setattr(
                    unrolled._Recomputed, "apply", lambda function, ends, *values: function(*values)
                )
            z = replay(energy, leaf, z, streams, decisions)
        found.append(torch.autograd.grad(z["latent"].square().sum(), leaf)[0])
    assert torch.allclose(*found, rtol=1e-10)
    leaf = x.clone().requires_grad_()
    replay(energy, leaf, start, streams, decisions)["latent"].sum().backward()
    assert leaf.grad is not None
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_a_rejected_or_diverged_row_is_its_start(float64):
    vae, x, start, energy = case("gaussian", None)
    streams = Streams.create(ROWS, seed=2)
    # Far too long steps: energies overflow, everything is rejected.
    kernel = BatchedHMC(vae.model, step_size=1e6, num_steps=40, jitter=0.0, adapt_step_size=False)
    _, decisions = record(kernel, x, start, streams, 2)
    assert all(d.offset.eq(0).all() for d in decisions)
    # Replay with length forced, as in a batch where another row moved.
    decisions = [d._replace(length=3) for d in decisions]
    leaf, begin = x.clone().requires_grad_(), {"z": start["z"].clone().requires_grad_()}
    z = replay(energy, leaf, begin, streams, decisions)["z"]
    assert torch.equal(z, start["z"])
    weight = torch.randn_like(z)
    gradient_x, gradient_z = torch.autograd.grad((weight * z).sum(), (leaf, begin["z"]))
    assert torch.equal(gradient_z, weight)
    assert gradient_x.abs().max() == 0


def test_lengths_of_hmc_are_known_without_asking_the_device(float64):
    vae, x, start, _ = case("gaussian", None)
    streams = Streams.create(ROWS, seed=2)
    kernel = BatchedHMC(vae.model, step_size=1e6, num_steps=4)  # everything is rejected
    _, decisions = record(kernel, x, start, streams, 5)
    lengths = [kernel.gradients_of(streams.seed, step) for step in range(5)]
    assert [d.length for d in decisions] == lengths
    assert len(set(lengths)) > 1
    kernel = KERNELS["nuts"](vae.model)
    _, decisions = record(kernel, x, start, streams, 5)
    assert [d.length for d in decisions] == [int(d.offset.abs().max()) for d in decisions]


@pytest.mark.parametrize("name", KERNELS)
def test_recorded_ends_stand_for_the_forward_pass(float64, name):
    """The values of the run bit by bit, nothing computed for them, and the same derivative."""
    vae, x, start, energy = case("gaussian", None)
    streams = Streams.create(ROWS, seed=4)
    kernel = KERNELS[name](vae.model)
    end, decisions = record(kernel, x, start, streams, 3, 1)
    calls = []

    def counted(x, z):
        calls.append(len(x))
        return energy(x, z)

    found = []
    for recorded in (True, False):
        leaf, begin = x.clone().requires_grad_(), {"z": start["z"].clone().requires_grad_()}
        calls.clear()
        z = replay(counted, leaf, begin, streams, decisions, recorded=recorded)["z"]
        assert (not calls) == recorded
        assert torch.allclose(z, end["z"], atol=1e-12)
        found.append([z, *torch.autograd.grad(z.sin().sum(), (leaf, begin["z"]))])
    assert torch.equal(found[0][0], end["z"])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["hmc", "nuts", "paper"])
def test_unrolled_kernel_is_a_chain(float64, name):
    vae, x, start, energy = case("gaussian", None)
    streams = Streams.create(ROWS, seed=5)
    chain = UnrolledKernel(lambda: KERNELS[name](vae.model), energy, 5, 2)
    with torch.no_grad():
        plain = chain(x, start, streams)
    leaf = x.clone().requires_grad_()
    tracked = chain(leaf, start, streams)
    assert not plain["z"].requires_grad
    assert tracked["z"].requires_grad
    assert torch.equal(plain["z"], tracked["z"])
    if name == "paper":  # whose rows see each other
        return
    # Row by row as in the batch.
    alone = Streams(streams.seed, streams.image[2:3], streams.chain[2:3])
    single = chain(x[2:3], {"z": start["z"][2:3]}, alone)
    assert torch.allclose(single["z"], plain["z"][2:3], atol=1e-9)


def test_mistakes(float64):
    vae, x, start, _ = case("gaussian", None)
    streams = Streams.create(ROWS, seed=5)
    with pytest.raises(ValueError, match="must be a BatchedHMC or BatchedNUTS to be unrolled"):
        record(object(), x, start, streams, 3)
    with pytest.raises(ValueError, match="num_transitions must be an integer of at least 1, got 0"):
        record(KERNELS["hmc"](vae.model), x, start, streams, 0)
    for number in (0, 3):
        with pytest.raises(ValueError, match=f"number must be in 1..2, .* got {number}"):
            UnrolledKernel(lambda: KERNELS["hmc"](vae.model), None, 2).last(
                x, start, streams, number
            )
