"""Step sizes: dual averaging as in Pyro, one per image; the paper's rule by hand; freezing."""

from __future__ import annotations

import math

import pyro.ops.dual_averaging
import pytest
import torch
from kernels import EXACT, FACTORIES, KERNELS
from pyro.infer import MCMC

from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.mcmc.adaptation import DualAveraging, FixedStepSize, PaperStepSize
from pyro_vae_defence.mcmc.hmc import trajectory_length

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
    rule = PaperStepSize()
    state = rule.init(start)
    by_hand = start.clone()
    for acceptance in (
        torch.tensor([1.0, 0.0]),
        torch.tensor([0.9, 0.3]),
        torch.tensor([0.2, 0.7]),
    ):
        state = rule.update(state, acceptance)
        mean = (acceptance[0] + acceptance[1]) / 2
        for i in range(2):
            by_hand[i] += 0.01 * (mean - 0.9) / 0.9 * by_hand[i]
        assert torch.allclose(state.log_step_size.exp(), by_hand, rtol=1e-14)
    # One number written out: acceptance 1 and 0 has mean 0.5, so the step shrinks by 0.01 * 0.4 /
    # 0.9.
    first = rule.update(rule.init(start), torch.tensor([1.0, 0.0])).log_step_size.exp()
    assert torch.allclose(first, start * (1 - 0.004 / 0.9), rtol=1e-14)


def test_a_fixed_step_size_stays():
    rule = FixedStepSize()
    state = rule.init(torch.tensor([0.1, 0.2]))
    assert rule.update(state, torch.tensor([0.0, 1.0])) is state


SCALES = torch.logspace(-2, 2, 12).double()


def gaussians(scales=SCALES):
    return lambda latents: 0.5 * (latents["z"] / scales[:, None]).square().sum(-1)


def run(kernel, warmup_steps, num_samples, scales=SCALES):
    """The infos of all transitions."""
    infos = []
    start = {"z": torch.randn(len(scales), 20) * scales[:, None]}
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
    ("name", "options"), [*((name, {}) for name in EXACT), ("hmc", {"target_accept_prob": 0.9})]
)
def test_every_image_comes_near_its_target_acceptance(name, options):
    """16 chains of twelve images with scales over four decades, all started at step size 0.1.

    Within 0.1 of the target each image. The averaged step size of dual averaging is known to end a
    little on the safe side, by 0.06 here, and means have standard errors of at most 0.01: a right
    kernel fails once in a thousand seeds.
    """
    # MALA, whose steps are noisiest, needs the longest averages.
    warmup_steps, scales = {"nuts": 100, "mala": 400}.get(name, 250), SCALES.repeat(16)
    kernel = FACTORIES[name](potential_fn=gaussians(scales), **options)
    infos = run(kernel, warmup_steps, 160 if name == "mala" else 40, scales)
    acceptance = kernel.diagnostics()["acceptance rate"]
    assert acceptance.shape == (16 * 12,)
    target = kernel.rule.target
    assert (acceptance.view(16, 12).mean(0) - target).abs().max() < 0.1
    recomputed = torch.stack([info.acceptance_rate for info in infos[warmup_steps:]]).mean(0)
    assert torch.allclose(acceptance, recomputed)
    # The step size follows each image's own scale; one chain's varies by a tenth.
    relative = (infos[-1].step_size / scales).view(16, 12).mean(0)
    assert relative.max() / relative.min() < 1.2


@pytest.mark.parametrize("name", KERNELS)
def test_frozen_after_warm_up(name):
    """Sampling uses the averaged step size from its first transition to its last."""
    kernel = FACTORIES[name](potential_fn=gaussians())
    infos = run(kernel, 20, 10)
    warmup = torch.stack([info.step_size for info in infos[:20]])
    sampling = torch.stack([info.step_size for info in infos[20:]])
    assert (warmup[1:] != warmup[:-1]).all()
    assert (sampling == sampling[0]).all()
    rule = DualAveraging(kernel.default_target)
    state = rule.init(torch.full((12,), 0.1))
    for info in infos[:20]:
        state = rule.update(state, info.acceptance_rate)
    assert torch.allclose(sampling[0], state.log_average.exp())


def test_no_warm_up_keeps_the_initial_step_size():
    infos = run(BatchedHMC(potential_fn=gaussians(), step_size=0.03), 0, 4)
    assert all(torch.allclose(info.step_size, torch.tensor(0.03)) for info in infos)


def test_without_adaptation_the_step_size_stays():
    infos = run(BatchedHMC(potential_fn=gaussians(), step_size=0.03, adapt_step_size=False), 5, 5)
    assert all(torch.allclose(info.step_size, torch.tensor(0.03)) for info in infos)


def test_the_paper_preset_goes_on_in_sampling():
    """One step size for the batch, eq. 67 at every transition of warm-up and sampling, L = 20."""
    kernel = BatchedHMC(potential_fn=gaussians(), step_size=0.1, preset="paper")
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
        (10, 0.7, 3, 17),  # 1 - 0.7 is more than 0.3 in binary
    ):
        lengths = torch.tensor([trajectory_length(1, t, num_steps, jitter) for t in range(4000)])
        assert (int(lengths.min()), int(lengths.max())) == (low, high)
        # 5 standard errors of a uniform integer's mean: an error rate of 6e-7.
        width = math.sqrt(((high - low + 1) ** 2 - 1) / 12 / 4000)
        assert abs(float(lengths.double().mean()) - (low + high) / 2) <= 5 * width
