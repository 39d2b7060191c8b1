"""NVAE's parts: configuration, cells, flows, likelihoods, regularisers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from nvae_reference import one_pass
from torch import Tensor, nn

from pyro_vae_defence.models.nvae import NVAE, PUBLISHED, NVAEConfig
from pyro_vae_defence.models.nvae.cells import Cell, Resize, build_op
from pyro_vae_defence.models.nvae.config import ARCHITECTURES
from pyro_vae_defence.models.nvae.flows import (
    AutoregressiveShift,
    FlowPair,
    FlowPosterior,
    ShiftTransform,
    invert_shift,
)
from pyro_vae_defence.models.nvae.layers import Conv2d, FactorisedReduce, effective_weight
from pyro_vae_defence.models.nvae.likelihoods import (
    DiscretisedLogisticMixture,
    GaussianImage,
    crop,
    pad,
    quantise,
)
from pyro_vae_defence.objectives.nvae import (
    SpectralPenalty,
    balance_kl,
    batch_norm_penalty,
    kl_balance_weights,
    kl_coefficient,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- Configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(num_latent_scales=2, num_groups_per_scale=10, ada_groups=True), (10, 5)),
        (dict(num_latent_scales=3, num_groups_per_scale=20, ada_groups=True), (20, 10, 5)),
        (dict(num_latent_scales=3, num_groups_per_scale=7, ada_groups=True), (7, 3, 1)),
        (dict(num_latent_scales=2, num_groups_per_scale=3), (3, 3)),
    ],
)
def test_groups_per_scale(options: dict[str, Any], expected: tuple[int, ...]) -> None:
    config = NVAEConfig(**options)
    assert config.groups_per_scale == expected
    assert config.num_groups == sum(expected) == len(config.latent_shapes)


def test_published_groups_and_shapes() -> None:
    """Section 12 of the architecture's description."""
    assert PUBLISHED["celeba_256"].groups_per_scale == (16, 8, 4, 4, 4)
    assert PUBLISHED["cifar10"].groups_per_scale == (30,)
    assert PUBLISHED["mnist"].latent_shapes == ((20, 4, 4),) * 5 + ((20, 8, 8),) * 10
    assert PUBLISHED["celeba_64"].latent_shapes == (
        ((20, 8, 8),) * 5 + ((20, 16, 16),) * 10 + ((20, 32, 32),) * 20
    )


def test_config_survives_a_round_trip() -> None:
    for config in PUBLISHED.values():
        assert NVAEConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dataset="stacked_mnist"), "dataset='stacked_mnist' is unknown"),
        (dict(arch_instance="res_wnelu"), "arch_instance='res_wnelu' is unknown"),
        (dict(use_se=1), "use_se=1 is not of type bool"),
        (dict(num_nf=True), "num_nf=True is not of type int"),
        (dict(num_nf=-1), "num_nf=-1 must be at least 0"),
        (dict(num_latent_scales=0), "num_latent_scales=0 must be at least 1"),
        (dict(num_x_bits=9), "num_x_bits=9 must lie in 1..8"),
        (dict(num_preprocess_blocks=1), "num_preprocess_blocks=1 and num_postprocess_blocks=2"),
        (dict(num_latent_scales=5), "num_latent_scales=5 halve the image 6 times"),
        (dict(num_channels_enc=1), "num_channels_enc=1"),
        (dict(num_groups_per_scale=1, num_channels_enc=16), "num_channels_enc=16"),
    ],
)
def test_bad_configurations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NVAEConfig(**options)


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown NVAE configuration keys \['num_groups'\]"):
        NVAEConfig.from_dict({"num_groups": 3})


def test_official_args() -> None:
    config = PUBLISHED["celeba_64"]
    args = config.to_dict() | {"batch_size": 16, "save": "somewhere", "seed": 1}
    assert NVAEConfig.from_official_args(args) == config
    old = {k: v for k, v in args.items() if k not in ("ada_groups", "min_groups_per_scale")}
    assert NVAEConfig.from_official_args(old) == dataclasses.replace(config, ada_groups=False)
    with pytest.raises(ValueError, match=r"args holds \['use_attention'\]"):
        NVAEConfig.from_official_args(args | {"use_attention": True})
    extended = args | {"use_wandb": True}
    assert NVAEConfig.from_official_args(extended, ignore_args=("use_wandb",)) == config
    with pytest.raises(ValueError, match=r"args lacks \['res_dist'\]"):
        NVAEConfig.from_official_args({k: v for k, v in args.items() if k != "res_dist"})


# --- Layers and cells -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_runs(arch: str) -> None:
    config = NVAEConfig(
        arch_instance=arch,
        num_latent_scales=2,
        num_groups_per_scale=1,
        num_latent_per_group=2,
        num_channels_enc=8,
        num_channels_dec=8,
        num_preprocess_cells=2,
        num_postprocess_cells=2,
        use_se=True,
        res_dist=True,
    )
    vae = NVAE(config)
    terms = one_pass(vae, torch.rand(2, 1, 28, 28))
    assert terms.logits.shape == (2, 1, 32, 32)
    loss = (terms.reconstruction_loss + terms.kl.sum(1)).mean()
    loss.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_weight_norm() -> None:
    conv = Conv2d(3, 4, 5, groups=1)
    with torch.no_grad():
        conv.log_weight_norm.copy_(torch.randn(4, 1, 1, 1))
    lengths = conv.effective_weight().flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, conv.log_weight_norm.exp().flatten(), rtol=1e-4, atol=0)
    # It starts with the length torch's own initialisation gave, up to the two small constants.
    fresh = Conv2d(3, 4, 5)
    torch.testing.assert_close(fresh.effective_weight(), fresh.weight, rtol=0.02, atol=0)


def test_factorised_reduce_reads_every_pixel_once() -> None:
    """Output channels 0..3 read the pixels (0, 0), (1, 1), (0, 1), (1, 0) of each 2x2 block."""
    layer = FactorisedReduce(1, 4)
    touched_by = {(0, 0): 0, (1, 1): 1, (0, 1): 2, (1, 0): 3}
    for row, column in itertools.product(range(4), repeat=2):
        x = torch.zeros(1, 1, 4, 4)
        x[0, 0, row, column] = 1.0
        change = layer(x) - layer(torch.zeros_like(x))
        channel = touched_by[row % 2, column % 2]
        assert change[0].nonzero().tolist() == [[channel, row // 2, column // 2]]


@pytest.mark.parametrize("resize", Resize)
@pytest.mark.parametrize("ops", [("res_bnelu", "res_elu"), ("mconv_e3k5g0",), ("res_bnswish5",)])
def test_cells_change_resolution_and_channels(ops: tuple[str, ...], resize: Resize) -> None:
    cell = Cell(ops, 8, resize, use_se=True)
    sizes = {Resize.NONE: (8, 6), Resize.DOWN: (16, 3), Resize.UP: (4, 12)}
    channels, side = sizes[resize]
    assert cell(torch.randn(2, 8, 6, 6)).shape == (2, channels, side, side)


def test_residual_branch_is_scaled() -> None:
    """Without its branch a cell of stride 1 is the identity; the branch enters with factor 0.1."""
    cell = Cell(("res_elu",), 4, use_se=False)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(cell(x), x + 0.1 * cell._ops[0](x))


def test_bad_operations_are_refused() -> None:
    with pytest.raises(ValueError, match="operation 'res_wnelu' is unknown"):
        build_op("res_wnelu", 4, 4, Resize.NONE)
    with pytest.raises(ValueError, match="do not divide into 8 groups"):
        build_op("mconv_e3k5g8", 4, 4, Resize.NONE)


# --- Flows ----------------------------------------------------------------------------------------


def strong_shift(mirror: bool) -> AutoregressiveShift:
    """A flow far from the identity."""
    shift = AutoregressiveShift(2, mirror=mirror).double()
    with torch.no_grad():
        for name, parameter in shift.named_parameters():
            if name.endswith("log_weight_norm"):
                parameter.add_(1.5)
    return shift


@pytest.mark.parametrize("mirror", [False, True])
def test_shift_is_autoregressive(mirror: bool) -> None:
    """In the order rows, columns, channels its Jacobian is strictly triangular; mirrored, rows and
    columns run backwards.
    """
    shift = strong_shift(mirror)
    z = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: shift(v[None])[0], z[0])
    axes = (1, 2, 0, 4, 5, 3)  # (row, column, channel) twice
    if mirror:
        jacobian = jacobian.flip(1, 2, 4, 5)
    matrix = jacobian.permute(axes).reshape(40, 40)
    assert matrix.triu().abs().max() == 0
    assert (matrix.tril(-1).abs() > 0).sum() > 200


@pytest.mark.parametrize("mirror", [False, True])
def test_shift_is_inverted(mirror: bool) -> None:
    shift = strong_shift(mirror)
    z = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    y = z - shift(z)
    assert (y - z).abs().max() > 0.5
    torch.testing.assert_close(invert_shift(shift, y), z, rtol=0, atol=1e-12)


def test_gradient_of_the_inverse() -> None:
    """Against the inverse of the forward map's Jacobian, and of a weight by finite differences."""
    shift = strong_shift(False)
    z = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    y = (z - shift(z)).detach()
    forward = torch.autograd.functional.jacobian(lambda v: v - shift(v), z).reshape(18, 18)
    backward = torch.autograd.functional.jacobian(lambda v: invert_shift(shift, v), y)
    torch.testing.assert_close(backward.reshape(18, 18), forward.inverse())

    bias = shift.mu.conv_0.bias
    assert bias is not None
    probe = torch.randn_like(y)
    (slope,) = torch.autograd.grad((invert_shift(shift, y) * probe).sum(), bias)
    with torch.no_grad():
        values = []
        for step in (1e-6, -1e-6):
            bias[0] += step
            values.append((invert_shift(shift, y) * probe).sum())
            bias[0] -= step
    torch.testing.assert_close(slope[0], (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def transforms(pair: FlowPair) -> list[ShiftTransform]:
    return [ShiftTransform(shift) for shift in pair.children()]


def test_flow_posterior_density() -> None:
    """Against the change of variables with the Jacobian by automatic differentiation."""
    pair = FlowPair(2).double()
    loc, log_scale = torch.randn(2, 3, 2, 3, 3, dtype=torch.float64)
    base = dist.Normal(loc, log_scale.exp()).to_event(3)
    q = FlowPosterior(base, transforms(pair), validate_args=False)
    z = q.sample()
    x = z
    log_det = torch.zeros(3, dtype=torch.float64)
    for transform in reversed(transforms(pair)):
        inverse = invert_shift(transform.shift, x)
        for image in range(3):
            jacobian = torch.autograd.functional.jacobian(
                lambda v, t=transform: v - t.shift(v[None])[0], inverse[image]
            )
            log_det[image] += torch.linalg.slogdet(jacobian.reshape(18, 18))[1]
        x = inverse
    torch.testing.assert_close(q.log_prob(z), base.log_prob(x) - log_det)
    torch.testing.assert_close(q.log_prob(z.clone()), q.log_prob(z))
    assert q.rsample((4,)).shape == (4, 3, 2, 3, 3)
    assert q.expand((5, 3)).sample().shape == (5, 3, 2, 3, 3)


def test_flow_gradients_are_those_of_the_sample() -> None:
    pair = FlowPair(2).double()
    loc = torch.zeros(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    q = FlowPosterior(
        dist.Normal(loc, torch.ones_like(loc)).to_event(3), transforms(pair), validate_args=False
    )
    z = q.rsample()
    (gradient,) = torch.autograd.grad(z.sum(), loc, retain_graph=True)
    assert gradient.abs().min() > 0
    # log q of a reparameterised sample of a volume-preserving flow does not depend on loc at all.
    (gradient,) = torch.autograd.grad(q.log_prob(z).sum(), loc)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)


def test_equal_flows() -> None:
    pair, other = FlowPair(2), FlowPair(2)
    assert transforms(pair) == transforms(pair)
    assert transforms(pair) != transforms(other)
    assert hash(ShiftTransform(pair.cell1)) == hash(ShiftTransform(pair.cell1))


# --- Likelihoods ----------------------------------------------------------------------------------


def test_mixture_sums_to_one() -> None:
    """Over all colours of a pixel with 8 levels per channel."""
    logits = torch.randn(1, 20, 1, 1, dtype=torch.float64)
    levels = torch.arange(8, dtype=torch.float64) / 7
    colours = torch.tensor(list(itertools.product(levels, repeat=3)), dtype=torch.float64)
    likelihood = DiscretisedLogisticMixture(logits, num_bits=3)
    log_prob = likelihood.log_prob(colours[:, :, None, None])
    assert log_prob.shape == (512,)
    torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_mixture_is_finite_and_differentiable_everywhere() -> None:
    logits = 30 * torch.randn(2, 30, 4, 4)
    logits.requires_grad_()
    x = torch.rand(2, 3, 4, 4).mul(255).round().div(255)
    x[0, :, 0], x[1, :, 0] = 0.0, 1.0
    x.requires_grad_()
    log_prob = DiscretisedLogisticMixture(logits).log_prob(x)
    for gradient in torch.autograd.grad(log_prob.sum(), [logits, x]):
        assert gradient.isfinite().all()


def test_mixture_samples_follow_their_density() -> None:
    """Red levels drawn 20,000 times against their probabilities: no frequency is off by more than 5
    standard errors (false alarm below 1e-5).
    """
    logits = torch.randn(1, 20, 1, 1, dtype=torch.float64)
    likelihood = DiscretisedLogisticMixture(logits, num_bits=3)
    draws = likelihood.sample((20_000,))
    assert draws.shape == (20_000, 1, 3, 1, 1)
    observed = (draws.flatten(1)[:, 0] * 7).round().long()
    frequency = torch.bincount(observed, minlength=8) / 20_000
    levels = torch.arange(8, dtype=torch.float64) / 7
    colours = torch.tensor(list(itertools.product(levels, repeat=3)), dtype=torch.float64)
    joint = likelihood.log_prob(colours[:, :, None, None]).exp()
    expected = joint.reshape(8, 8, 8).sum(dim=(1, 2))
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert ((frequency - expected).abs() < 5 * error + 1e-4).all()


def test_mixture_expands() -> None:
    likelihood = DiscretisedLogisticMixture(torch.randn(1, 20, 2, 2))
    x = torch.rand(1, 3, 2, 2)
    larger = likelihood.expand((3,))
    torch.testing.assert_close(larger.log_prob(x), likelihood.log_prob(x).expand(3))
    assert larger.batch_shape == (3,)


def test_mixture_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="10 channels per component"):
        DiscretisedLogisticMixture(torch.zeros(1, 12, 2, 2))
    likelihood = DiscretisedLogisticMixture(torch.zeros(1, 10, 2, 2), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        likelihood.log_prob(torch.full((1, 3, 2, 2), 1.5))


def test_gaussian_image_is_the_density_of_the_rescaled_image() -> None:
    logits = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    x = torch.rand(2, 3, 3, 3, dtype=torch.float64)
    loc = 5 * (logits[:, :3] / 5).tanh()
    scale = (5 * (logits[:, 3:] / 5).tanh()).exp() + 0.01
    expected = torch.distributions.Normal(loc, scale).log_prob(2 * x - 1)
    likelihood = GaussianImage(logits)
    torch.testing.assert_close(likelihood.log_prob(x), expected)
    torch.testing.assert_close(likelihood.mean, (loc + 1) / 2)
    larger = likelihood.expand((4, 2, 3, 3, 3))
    torch.testing.assert_close(larger.log_prob(x), expected.expand(4, 2, 3, 3, 3))


def test_quantise() -> None:
    levels = torch.arange(256) / 255
    assert torch.equal(quantise(levels, 8), levels)
    five = quantise(levels, 5)
    assert five.unique().numel() == 32
    assert (five.min(), five.max()) == (0, 1)
    assert ((five * 31).round() == (torch.arange(256) // 8)).all()
    with pytest.raises(ValueError, match="num_bits=0"):
        quantise(levels, 0)


def test_crop_undoes_pad() -> None:
    config = NVAEConfig()
    x = torch.rand(2, 1, 28, 28)
    padded = pad(config, x)
    assert padded.shape == (2, 1, 32, 32)
    assert torch.equal(crop(config, padded), x)
    assert padded.sum() == pytest.approx(float(x.sum()))


# --- Regularisers ---------------------------------------------------------------------------------


def small_network() -> nn.Sequential:
    return nn.Sequential(Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1), Conv2d(2, 3, 3))


def test_spectral_penalty() -> None:
    network = small_network().double()
    with torch.no_grad():  # a gap between the two largest values, for power iteration to converge
        for conv in (network[0], network[3]):
            conv.log_weight_norm[0] += 1.0
        network[2].weight[0] *= 3.0
    penalty = SpectralPenalty(network, warmup_iterations=1000)
    convs = [m for m in network if isinstance(m, nn.Conv2d)]
    exact = sum(torch.linalg.svdvals(effective_weight(c).flatten(1))[0] for c in convs)
    value = penalty()
    torch.testing.assert_close(value, exact, rtol=1e-9, atol=0)
    ours = torch.autograd.grad(value, convs[0].parameters(), allow_unused=True)
    theirs = torch.autograd.grad(exact, convs[0].parameters(), allow_unused=True)
    for one, other in zip(ours, theirs):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert not list(penalty.parameters())


def test_spectral_penalty_resumes() -> None:
    network = small_network()
    first = SpectralPenalty(network, num_iterations=1, warmup_iterations=1)
    first()
    second = SpectralPenalty(network, num_iterations=1, warmup_iterations=1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(), second())
    with pytest.raises(ValueError, match="num_iterations=0"):
        SpectralPenalty(network, num_iterations=0)


def test_batch_norm_penalty() -> None:
    network = small_network()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
    assert batch_norm_penalty(network) == 2.0


def test_kl_balance() -> None:
    config = NVAEConfig(num_latent_scales=2, num_groups_per_scale=4, ada_groups=True)
    alpha = kl_balance_weights(config)
    # Two groups at the top share 1, four below share 4.
    assert alpha.tolist() == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    kl = torch.rand(3, 6).requires_grad_()
    balanced, coefficients = balance_kl(kl, alpha, 0.5)
    size = kl.detach().mean(0) + 0.01
    expected = size / alpha / (size / alpha).mean()
    torch.testing.assert_close(coefficients, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(balanced, 0.5 * (kl * coefficients).sum(1))
    assert not coefficients.requires_grad
    plain, _ = balance_kl(kl, alpha, 1.0)
    torch.testing.assert_close(plain, kl.sum(1))
    with pytest.raises(ValueError, match=r"beta must lie in \(0, 1\], got 0"):
        balance_kl(kl, alpha, 0.0)


def test_kl_coefficient() -> None:
    assert kl_coefficient(0, 1000) == 1e-4
    assert kl_coefficient(300, 1000, constant_portion=0.0) == pytest.approx(1.0)
    assert kl_coefficient(150, 1000, constant_portion=0.0) == pytest.approx(0.5)
    assert kl_coefficient(1000, 1000) == 1.0


def test_reconstruction_uses_the_middle_of_the_image_only() -> None:
    vae = NVAE(NVAEConfig(num_groups_per_scale=1, num_channels_enc=4, num_channels_dec=4)).eval()
    x = torch.rand(1, 1, 28, 28)
    terms = one_pass(vae, x)
    inner = terms.logits[:, :, 2:30, 2:30]
    bce = nn.functional.binary_cross_entropy_with_logits(inner, x, reduction="sum")
    torch.testing.assert_close(terms.reconstruction_loss[0], bce)
    assert math.isfinite(float(bce.detach()))


def test_latents_are_independent_of_global_state() -> None:
    """The same noise gives the same latents, whatever the global seed."""
    vae = NVAE(NVAEConfig(num_groups_per_scale=1, num_channels_enc=4, num_channels_dec=4)).eval()
    noise: list[Tensor] = [torch.randn(1, *shape) for shape in vae.config.latent_shapes]
    first = vae.walk_by_noise(noise).latents
    torch.manual_seed(1)
    second = vae.walk_by_noise(noise).latents
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
