"""Step sizes: dual averaging as in Pyro, one per image; the paper's rule by hand; freezing."""

from __future__ import annotations

import functools
import math

import pyro.ops.dual_averaging
import pytest
import torch
from pyro.infer import MCMC

from pyro_vae_defence.mcmc import BatchedGHMC, BatchedHMC, BatchedMALA, BatchedMAMS, BatchedNUTS
from pyro_vae_defence.mcmc.adaptation import (
    DualAveraging,
    FixedStepSize,
    PaperStepSize,
    pool_by_image,
)
from pyro_vae_defence.mcmc.kernels import trajectory_length
from pyro_vae_defence.ops.streams import Streams

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("target", [0.65, 0.8])
def test_dual_averaging_equals_pyros(target):
    """Image by image, for a sequence of acceptances that differs between images."""
    acceptances = torch.rand(40, 5) * torch.linspace(0.2, 1.0, 5)
    initial = torch.logspace(-3, 1, 5)
    rule = DualAveraging(target, shrink_factor=10.0)
    state = rule.init(initial)
    peers = [pyro.ops.dual_averaging.DualAveraging(math.log(10 * float(e))) for e in initial]
    for acceptance in acceptances:
        state = rule.update(state, acceptance)
        for i, peer in enumerate(peers):
            peer.step(target - float(acceptance[i]))
            log_step_size, log_average = peer.get_state()
            assert math.isclose(float(state.log_step_size[i]), log_step_size, rel_tol=1e-12)
            assert math.isclose(float(state.log_average[i]), log_average, rel_tol=1e-12)
    assert state.updates == 40


def test_the_paper_rule_by_hand():
    """Eq. 67: eta_t = eta_{t-1} + 0.01 (alpha - 0.9) / 0.9 eta_{t-1}."""
    start = torch.tensor([0.1, 0.4])
    pooled, single = PaperStepSize(), PaperStepSize(pooled=False)
    p, s = pooled.init(start), single.init(start)
    by_hand_pooled, by_hand_single = start.clone(), start.clone()
    for acceptance in (
        torch.tensor([1.0, 0.0]),
        torch.tensor([0.9, 0.3]),
        torch.tensor([0.2, 0.7]),
    ):
        p, s = pooled.update(p, acceptance), single.update(s, acceptance)
        mean = (acceptance[0] + acceptance[1]) / 2
        for i in range(2):
            by_hand_pooled[i] += 0.01 * (mean - 0.9) / 0.9 * by_hand_pooled[i]
            by_hand_single[i] += 0.01 * (acceptance[i] - 0.9) / 0.9 * by_hand_single[i]
        assert torch.allclose(p.log_step_size.exp(), by_hand_pooled, rtol=1e-14)
        assert torch.allclose(s.log_step_size.exp(), by_hand_single, rtol=1e-14)
    # One number written out: acceptance 1 and 0 has mean 0.5, so the step shrinks by 0.01 * 0.4 /
    # 0.9.
    first = pooled.update(pooled.init(start), torch.tensor([1.0, 0.0])).log_step_size.exp()
    assert torch.allclose(first, start * (1 - 0.004 / 0.9), rtol=1e-14)


def test_a_fixed_step_size_stays():
    rule = FixedStepSize()
    state = rule.init(torch.tensor([0.1, 0.2]))
    assert rule.update(state, torch.tensor([0.0, 1.0])) is state


SCALES = torch.logspace(-2, 2, 12).double()


def gaussians(latents):
    return 0.5 * (latents["z"] / SCALES[:, None]).square().sum(-1)


def run(kernel, warmup_steps, num_samples, start=None):
    """The infos of all transitions."""
    infos = []
    start = {"z": torch.randn(12, 20) * SCALES[:, None]} if start is None else start
    MCMC(
        kernel,
        num_samples,
        warmup_steps,
        initial_params=start,
        hook_fn=lambda kernel, *_: infos.append(kernel.info),
        disable_progbar=True,
    ).run()
    return infos


@pytest.mark.parametrize(
    ("make", "warmup_steps"),
    [
        (functools.partial(BatchedHMC, target_accept_prob=0.8), 400),
        (functools.partial(BatchedHMC, target_accept_prob=0.9), 400),
        (functools.partial(BatchedNUTS, target_accept_prob=0.8, max_tree_depth=5), 120),
        (BatchedMALA, 400),
        (BatchedGHMC, 400),
        (BatchedMAMS, 400),
    ],
    ids=["hmc-0.8", "hmc-0.9", "nuts-0.8", "mala", "ghmc", "mams"],
)
def test_every_image_comes_near_its_target_acceptance(make, warmup_steps):
    """Twelve images with scales over four decades, all started at step size 0.1.

    Within 0.1 of the target each: the averaged step size of dual averaging is known to end a little
    on the safe side, and a mean over 150 transitions has a standard error of about 0.02.
    """
    kernel = make(potential_fn=gaussians)
    infos = run(kernel, warmup_steps, 150)
    acceptance = kernel.diagnostics()["acceptance rate"]
    assert acceptance.shape == (12,)
    target = kernel.rule.target
    assert (acceptance - target).abs().max() < 0.1
    recomputed = torch.stack([info.acceptance_rate for info in infos[warmup_steps:]]).mean(0)
    assert torch.allclose(acceptance, recomputed)
    # The step size follows each image's own scale.
    relative = infos[-1].step_size / SCALES
    assert relative.max() / relative.min() < 1.5


@pytest.mark.parametrize("make", [BatchedHMC, functools.partial(BatchedNUTS, max_tree_depth=3)])
def test_frozen_after_warm_up(make):
    """Sampling uses the averaged step size from its first transition to its last."""
    kernel = make(potential_fn=gaussians)
    infos = run(kernel, 20, 10)
    warmup = torch.stack([info.step_size for info in infos[:20]])
    sampling = torch.stack([info.step_size for info in infos[20:]])
    assert (warmup[1:] != warmup[:-1]).all()
    assert (sampling == sampling[0]).all()
    rule = DualAveraging()
    state = rule.init(torch.full((12,), 0.1))
    for info in infos[:20]:
        state = rule.update(state, info.acceptance_rate)
    assert torch.allclose(sampling[0], state.log_average.exp())


def test_no_warm_up_keeps_the_initial_step_size():
    infos = run(BatchedHMC(potential_fn=gaussians, step_size=0.03), 0, 4)
    assert all(torch.allclose(info.step_size, torch.tensor(0.03)) for info in infos)


def test_without_adaptation_the_step_size_stays():
    infos = run(BatchedHMC(potential_fn=gaussians, step_size=0.03, adapt_step_size=False), 5, 5)
    assert all(torch.allclose(info.step_size, torch.tensor(0.03)) for info in infos)


def test_the_paper_preset_goes_on_in_sampling():
    """One step size for the batch, eq. 67 at every transition of warm-up and sampling, L = 20."""
    kernel = BatchedHMC(potential_fn=gaussians, step_size=0.1, preset="paper")
    infos = run(kernel, 6, 6)
    expected = 0.1
    for info in infos:
        assert torch.allclose(info.step_size, torch.tensor(expected), rtol=1e-12)
        assert (info.num_steps == 20).all()
        expected += 0.01 * (float(info.acceptance_rate.mean()) - 0.9) / 0.9 * expected
    assert len({float(info.step_size[0]) for info in infos}) == 12


def test_jittered_lengths_have_the_stated_range_and_mean():
    for num_steps, jitter, low, high in (
        (4, 1.0, 1, 8),
        (4, 0.5, 2, 6),
        (5, 0.0, 5, 5),
        (1, 1.0, 1, 2),
    ):
        lengths = torch.tensor([trajectory_length(1, t, num_steps, jitter) for t in range(4000)])
        assert (int(lengths.min()), int(lengths.max())) == (low, high)
        # 5 standard errors of a uniform integer's mean: an error rate of 6e-7.
        width = math.sqrt(((high - low + 1) ** 2 - 1) / 12 / 4000)
        assert abs(float(lengths.double().mean()) - (low + high) / 2) <= 5 * width


# --- Replicas -------------------------------------------------------------------------------------


def test_pooling_averages_the_rows_of_an_image():
    image = torch.tensor([7, 3, 7, 2**31, 3, 7])
    values = torch.tensor([0.1, 0.2, 0.4, 0.9, 0.6, 1.0])
    pooled = pool_by_image(values, image)
    assert torch.allclose(pooled, torch.tensor([0.5, 0.4, 0.5, 0.9, 0.4, 0.5]))
    alone = pool_by_image(values[image == 7], image[image == 7])
    assert torch.equal(alone, pooled[image == 7])


@pytest.mark.parametrize("make", [BatchedHMC, BatchedMALA, BatchedGHMC, BatchedMAMS])
def test_replicas_share_a_step_size(make):
    """One step size per image, and less noise in it: 3 images of 16 chains each, of three
    scales."""
    scales = torch.tensor([0.1, 1.0, 10.0]).repeat(16)

    def potential(latents):
        return 0.5 * (latents["z"] / scales[:, None]).square().sum(-1)

    spread = {}
    for pool_replicas in (False, True):
        kernel = make(potential_fn=potential, pool_replicas=pool_replicas)
        kernel.streams = Streams.create(3, 16, seed=1)
        start = {"z": torch.randn(48, 10) * scales[:, None]}
        step_size = run(kernel, 60, 2, start)[-1].step_size.reshape(16, 3)
        spread[pool_replicas] = step_size.log().std(0)
        # A shared step size is an image's own all the same.
        relative = step_size.mean(0) / scales[:3]
        assert relative.max() / relative.min() < 1.5
    assert (spread[False] > 0.02).all()
    assert (spread[True] == 0).all()
