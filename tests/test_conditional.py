"""The dense conditional VAE: its programs, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from pyro_vae_defence.models import ConditionalVAE, program
from pyro_vae_defence.objectives import BetaELBO


@pytest.fixture
def vae():
    return ConditionalVAE((2, 3, 4), num_classes=3, latent_dim=2, hidden_dim=8)


@pytest.fixture
def batch():
    return torch.rand(5, 2, 3, 4), torch.eye(3)[[0, 1, 2, 0, 1]]


def test_energy_is_that_of_prior_and_likelihood(vae, batch):
    x, y = batch
    z = torch.randn(5, 2)
    logits = vae.decoder(torch.cat([z, y], 1)).view(x.shape)
    likelihood = -torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    expected = -likelihood.flatten(1).sum(1) - Normal(0.0, 1.0).log_prob(z).sum(1)
    bound, images = program.at_images(vae, batch)
    torch.testing.assert_close(program.potential(bound, images)({"z": z}), expected)
    torch.testing.assert_close(vae.decode(z, y), logits.sigmoid())


@pytest.mark.parametrize("per_class", [False, True])
def test_config_rebuilds_it(per_class):
    vae = ConditionalVAE((2, 3, 4), 3, latent_dim=2, hidden_dim=8, per_class=per_class)
    other = ConditionalVAE(**vae.config)
    assert other.image_shape == (2, 3, 4)
    other.load_state_dict(vae.state_dict())


@pytest.fixture
def ensemble(float64):
    return ConditionalVAE((2, 3, 4), 3, latent_dim=2, hidden_dim=8, per_class=True)


def of_class(network, k, x):
    """The class's own layers, one after the other, of ``(N, in)``."""
    for number, layer in enumerate(network.layers):
        x = torch.nn.functional.linear(x, layer.weight[k].T, layer.bias[k])
        x = torch.nn.functional.silu(x) if number < 2 else x
    return x


def test_each_row_has_the_networks_of_its_class(ensemble, batch):
    x, y = (each.double() for each in batch)
    z = torch.randn(5, 2)
    q, images = ensemble.posterior(x, y).base_dist, ensemble.decode(z, y)
    for row, k in enumerate(y.argmax(1).tolist()):
        loc, log_variance = of_class(ensemble.encoder, k, x[row].flatten()).chunk(2)
        torch.testing.assert_close(q.loc[row], loc)
        torch.testing.assert_close(q.scale[row], (0.5 * log_variance).exp())
        logits = of_class(ensemble.decoder, k, z[row])
        torch.testing.assert_close(images[row].flatten(), logits.sigmoid())


def test_classes_have_no_parameter_in_common(ensemble, batch):
    """An image of one class moves nothing of another's VAE, and all of its own."""
    x, y = (each.double()[1:2] for each in batch)
    BetaELBO(1.0).terms(ensemble.model, ensemble.guide, x, y)["loss"].sum().backward()
    for parameter in ensemble.parameters():
        assert parameter.shape[0] == 3
        moved = parameter.grad.flatten(1).abs().sum(1) > 0
        assert moved.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": (28, 28)}, "image_shape"),
        ({"image_shape": (0, 28, 28)}, "image_shape"),
        ({"num_classes": 1}, "num_classes"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"hidden_dim": 1.5}, "hidden_dim"),
        ({"per_class": "no"}, "per_class"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ConditionalVAE(**options)


def test_wrong_images_and_classes(vae, batch):
    x, y = batch
    for program_of in (vae.model, vae.guide):
        with pytest.raises(ValueError, match="x must have shape"):
            program_of(x[:, :1], y)
        for wrong in (y[:2], y[:, :2], y.argmax(1)):
            with pytest.raises(ValueError, match="one-hot"):
                program_of(x, wrong)
