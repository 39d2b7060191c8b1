"""NVAE's objective: what it adds up, how its weights move, what a checkpoint of it holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from nvae_reference import SMALL, one_pass
from torch.utils.data import DataLoader

from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.nvae import NVAE
from pyro_vae_defence.objectives import BetaELBO, NVAEObjective
from pyro_vae_defence.objectives.nvae import (
    balance_kl,
    batch_norm_penalty,
    kl_balance_weights,
)
from pyro_vae_defence.training import FitConfig, fit

TINY = dataclasses.replace(  # of the cells of the network that is trained on MNIST
    SMALL, arch_instance="res_bnswish", num_channels_enc=2, num_channels_dec=2, use_se=False
)


@pytest.fixture
def vae():
    return NVAE(TINY)


@pytest.fixture
def x():
    return torch.rand(6, 1, 28, 28)


@pytest.mark.usefixtures("float64")
def test_loss_is_the_published_sum(vae, x):
    objective = NVAEObjective(vae, 100, penalty=0.5)
    objective.step = 15  # half way up: beta = 1/2, but for the first constant steps
    torch.manual_seed(1)
    terms = objective.terms(vae.model, vae.guide, x)
    torch.manual_seed(1)
    direct = one_pass(vae, x)
    beta = (15 - 1e-4 * 100) / 30
    balanced, _ = balance_kl(direct.kl, kl_balance_weights(TINY), beta)
    singular = sum(
        torch.linalg.matrix_norm(weights, ord=2).sum()
        for convs in objective.spectral._convs
        for weights in [objective.spectral._matrices(convs)]
    )
    penalty = 0.5 * (singular + batch_norm_penalty(vae))
    expected = direct.reconstruction_loss + balanced + penalty
    torch.testing.assert_close(terms["reconstruction"], -direct.reconstruction_loss)
    torch.testing.assert_close(terms["kl"], direct.kl.sum(1))
    # Forty power iterations come within a percent of the singular values.
    torch.testing.assert_close(terms["penalty"], penalty.expand(6), rtol=0.01, atol=0)
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-3, atol=0)


@pytest.mark.usefixtures("float64")
def test_behind_the_annealing_it_is_the_elbo_and_the_penalty(vae, x):
    objective = NVAEObjective(vae, 10)
    objective.step = 10
    torch.manual_seed(1)
    terms = objective.terms(vae.model, vae.guide, x)
    torch.manual_seed(1)
    elbo = BetaELBO().terms(vae.model, vae.guide, x)
    torch.testing.assert_close(terms["loss"] - terms["penalty"], elbo["loss"])


def test_penalty_has_the_gradient_of_its_weight(vae, x):
    """The penalty counts once per image, so that its share of a mean does not depend on the
    batch."""
    weight = vae.stem.log_weight_norm
    gradients = []
    for penalty in (0.0, 2.0):
        torch.manual_seed(1)
        vae.zero_grad()
        NVAEObjective(vae, 10, penalty=penalty).loss_and_grads(vae.model, vae.guide, x)
        gradients.append(weight.grad.clone())
    difference = gradients[1] - gradients[0]
    vae.zero_grad()
    NVAEObjective(vae, 10).spectral().backward()
    torch.testing.assert_close(difference, 2.0 * len(x) * weight.grad, rtol=0.02, atol=1e-2)


def test_interrupted_training_resumes_exactly(tmp_path, x):
    """The singular vectors are part of a checkpoint, as is the step the annealing has reached."""

    def run(epochs, path):
        torch.manual_seed(3)
        vae = NVAE(TINY)
        loader = DataLoader(torch.rand(12, 1, 28, 28), batch_size=6)
        config = FitConfig(epochs=epochs, schedule="constant", progress=False)
        fit(vae, NVAEObjective(vae, 4), loader, config, checkpoint=path)
        return vae.state_dict()

    whole = run(2, tmp_path / "whole.pt")
    run(1, tmp_path / "parts.pt")
    resumed = run(2, tmp_path / "parts.pt")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_bad_arguments(vae):
    with pytest.raises(ValueError, match="vae must be an NVAE, got ConvVAE"):
        NVAEObjective(ConvVAE(), 10)
    with pytest.raises(ValueError, match=r"num_steps must lie in \[1, inf\), got 0"):
        NVAEObjective(vae, 0)
    with pytest.raises(ValueError, match=r"kl_anneal must lie in \(0, 1\], got 0"):
        NVAEObjective(vae, 10, kl_anneal=0)
    with pytest.raises(ValueError, match="penalty must be at least 0 and finite, got -1"):
        NVAEObjective(vae, 10, penalty=-1)


def test_networks_without_batch_norm_have_no_penalty_on_it() -> None:
    network = torch.nn.Conv2d(1, 1, 1).double()
    penalty = batch_norm_penalty(network)
    assert penalty.dtype == torch.float64
    assert penalty.item() == 0
    network = torch.nn.Sequential(network, torch.nn.BatchNorm2d(2))
    torch.nn.init.constant_(network[1].weight, -3.0)
    assert batch_norm_penalty(network).item() == 3
