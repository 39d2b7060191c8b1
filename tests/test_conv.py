"""The paper's VAE."""

from __future__ import annotations

import copy

import numpy as np
import pyro
import pytest
import torch
from conftest import shared_path
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae_defence.models import ConvVAE, program


def _load(vae, arrays, prefix):
    encoder = [m for m in vae.encoder if isinstance(m, nn.Conv2d)]
    layers = {
        "encoder": [*encoder, vae.latent_loc, vae.latent_log_variance],
        "decoder": [m for m in vae.decoder if isinstance(m, nn.ConvTranspose2d)],
    }
    with torch.no_grad():
        for part, modules in layers.items():
            for number, module in enumerate(modules):
                for name, parameter in module.named_parameters():
                    value = arrays[f"{prefix}.{part}.{number}.{name}"].astype(np.float32)
                    parameter.copy_(torch.from_numpy(value))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("prefix", "channels"), [("gray", 1), ("rgb", 3)])
def test_reproduces_the_published_architecture(prefix, channels, channels_last):
    arrays = np.load(shared_path("golden", "paper_conv_vae.npz"))
    vae = ConvVAE(channels, channels_last=channels_last)
    _load(vae, arrays, prefix)
    x, z = (torch.from_numpy(arrays[f"{prefix}.{name}"]) for name in ("x", "z"))
    with torch.no_grad():
        q = program.posterior(vae, x)["z"]
        got = {
            "q_mean": q.mean,
            "q_logvar": 2 * q.stddev.log(),
            "x_mean": program.decode(vae, {"z": z}, vae.image_shape),
        }
    for name, value in got.items():
        # The weights are stored in float16.
        np.testing.assert_allclose(value, arrays[f"{prefix}.{name}"], atol=1e-3)


@pytest.mark.usefixtures("float64")
def test_layouts_agree():
    vae = ConvVAE()
    other = ConvVAE(channels_last=False)
    other.load_state_dict(vae.state_dict())
    x, z = torch.rand(3, 1, 28, 28), torch.randn(3, 64)
    assert torch.allclose(vae.posterior(x).mean, other.posterior(x).mean, rtol=0, atol=1e-12)
    assert torch.allclose(vae.decode(z), other.decode(z), rtol=0, atol=1e-12)


def test_initialisation_is_xavier_with_zero_biases():
    vae = ConvVAE()
    weight = vae.encoder[4].weight
    expected = (2 / (64 * 9 + 96 * 9)) ** 0.5
    # 55,296 normals: 5 standard errors of their standard deviation, error rate 6e-7.
    assert abs(weight.std() / expected - 1) < 5 / (2 * weight.numel()) ** 0.5
    assert all((p == 0).all() for n, p in vae.named_parameters() if n.endswith("bias"))


def test_beta_scales_the_latents_of_both_programs(float64):
    # rec - 4 KL: the loss is affine in KL, so two values of beta reveal the weight of KL in the
    # third.
    vae, x = ConvVAE().double(), torch.rand(64, 1, 28, 28)
    with torch.no_grad():
        q = vae.posterior(x)
        kl = torch.distributions.kl_divergence(
            q.base_dist, torch.distributions.Normal(0.0, 1.0)
        ).sum(1)

    def loss(beta):
        torch.manual_seed(0)
        with torch.no_grad():
            return Trace_ELBO(num_particles=1).differentiable_loss(
                lambda x: vae.model(x, beta), lambda x: vae.guide(x, beta), x
            )

    # Same noise for every beta, hence exactly affine; its slope is a one-draw estimate of the KL.
    slope = loss(2.0) - loss(1.0)
    assert torch.allclose(loss(5.0) - loss(1.0), 4 * slope)
    # One draw per image and 64 images: 5 standard errors of log q - log p, which has variance < 2
    # KL + 64.
    assert abs(slope / 64 - kl.mean()) < 5 * ((2 * kl.mean() + 64) / 64) ** 0.5


def test_every_parameter_is_trained_by_plain_svi():
    vae = ConvVAE()
    before = copy.deepcopy(vae.state_dict())
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    svi.step(torch.rand(8, 1, 28, 28))
    svi.step(torch.rand(8, 1, 28, 28))
    after = vae.state_dict()
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert not unchanged


def test_two_instances_and_copies_do_not_share_parameters():
    first = ConvVAE()
    clone, second = copy.deepcopy(first), ConvVAE()
    x = torch.rand(4, 1, 28, 28)
    names = set()
    for vae in (first, clone, second):
        with poutine.trace(param_only=True) as capture:
            Trace_ELBO().loss_and_grads(vae.model, vae.guide, x)
        seen = {id(s["value"].unconstrained()) for s in capture.trace.nodes.values()}
        assert seen == {id(p) for p in vae.parameters()}
        names |= set(capture.trace.nodes)
    assert len(names) == 3 * len(list(first.parameters()))


def test_gaussian_likelihood_has_no_normaliser(float64):
    vae = ConvVAE(3).double()
    z = torch.randn(2, 64)
    mean = vae.decode(z)
    assert torch.allclose(vae.observation(z).log_prob(mean), torch.zeros(2), atol=1e-9)


def test_runs_on_meta():
    vae = ConvVAE().to("meta")
    x = torch.rand(2, 1, 28, 28, device="meta")
    energy = program.potential(vae, x)
    assert energy({"z": torch.zeros(2, 64, device="meta")}).shape == (2,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels must be an integer of at least 1, got 0"),
        ({"in_channels": "rgb"}, "in_channels must be an integer of at least 1, got 'rgb'"),
        ({"image_size": "28"}, "image_size must be an integer of at least 1, got '28'"),
        ({"latent_dim": 0}, "latent_dim must be an integer of at least 1, got 0"),
        ({"likelihood": "poisson"}, "likelihood must be 'bernoulli' or 'gaussian', got 'poisson'"),
        (
            {"image_size": 48},
            r"image_size must be one of \(28, 32, 64\), got 48: scale .*image_size=64",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvVAE(**arguments)


def test_bad_images_and_beta():
    vae = ConvVAE()
    with pytest.raises(
        ValueError, match=r"x must have shape \(N, 1, 28, 28\), got \(2, 3, 28, 28\)"
    ):
        vae.guide(torch.rand(2, 3, 28, 28))
    with pytest.raises(ValueError, match="beta must be > 0, got 0"):
        vae.model(torch.rand(2, 1, 28, 28), beta=0)


@pytest.mark.parametrize(("in_channels", "image_size"), [(1, 28), (3, 28), (1, 32), (3, 64)])
def test_the_decoder_equals_its_layers_one_by_one(in_channels, image_size):
    """Also in the gradients of inputs and parameters, with biases that are not zero."""
    torch.manual_seed(0)
    vae = ConvVAE(in_channels, image_size=image_size).double()
    for parameter in vae.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    z = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    outputs = vae.observation(z), vae.decoder(z[:, :, None, None])
    fast = outputs[0].base_dist
    fast = fast.logits if in_channels == 1 else fast.mean
    torch.testing.assert_close(fast, outputs[1])
    weights = torch.randn_like(fast)
    inputs = [z, *vae.decoder.parameters()]
    one, other = (
        torch.autograd.grad((output * weights).sum(), inputs) for output in (fast, outputs[1])
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize(("image_size", "middle", "layers"), [(32, 8, 5), (64, 8, 6)])
def test_larger_images(in_channels, image_size, middle, layers):
    vae = ConvVAE(in_channels, image_size=image_size)
    shape = (in_channels, image_size, image_size)
    assert vae.image_shape == shape
    x, z = torch.rand(2, *shape), torch.randn(2, 64)
    assert vae.encoder(x).shape[2:] == (2, 2)  # which the last convolution makes one pixel
    assert vae.posterior(x).event_shape == (64,)
    assert vae.decoder[:3](z[:, :, None, None]).shape == (2, 96, middle, middle)
    assert vae.decode(z).shape == (2, *shape)
    assert len([m for m in vae.decoder if isinstance(m, nn.ConvTranspose2d)]) == layers
    wrong = rf"x must have shape \(N, {in_channels}, {image_size}, {image_size}\), got"
    with pytest.raises(ValueError, match=wrong):
        vae.guide(torch.rand(2, in_channels, 28, 28))


@pytest.mark.parametrize("image_size", [32, 64])
def test_every_parameter_of_larger_images_is_trained(image_size):
    vae = ConvVAE(3, image_size=image_size)
    before = copy.deepcopy(vae.state_dict())
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    for _ in range(2):
        svi.step(torch.rand(4, *vae.image_shape))
    after = vae.state_dict()
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_the_paper_size_has_the_configuration_it_always_had():
    """Cards of trained weights hold it: neither old nor new ones may change."""
    names = ["in_channels", "latent_dim", "likelihood", "log_variance"]
    assert list(ConvVAE().config) == names
    config = ConvVAE(3, 7, image_size=64).config
    assert list(config) == [*names, "image_size"]
    assert ConvVAE(**config).config == config
