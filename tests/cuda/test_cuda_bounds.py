"""Masses that no attack can take, and energies that none can raise, agree between devices."""

from __future__ import annotations

import pytest
import torch
from devices import agree, to
from programs import PlaneVAE, plane_classifier

from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.defence.least_energy import (
    ENERGY_SCORES,
    calibrate_energies,
    energy_scores,
)
from pyro_vae_defence.models import program
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.robustness import mass_bound

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("float64")]


@pytest.fixture
def vae():
    return PlaneVAE()


@pytest.fixture
def x(vae):
    z = torch.randn(60, 2, generator=torch.Generator().manual_seed(5))
    return (z @ vae.weight.T).sigmoid().view(-1, 1, 2, 4)


def test_masses(device, vae, x):
    labels = plane_classifier(program.posterior_mean(vae, x)["z"]).argmax(-1)

    def run(place):
        return mass_bound(
            to(vae, place), plane_classifier, x[:3].to(place), labels[:3].to(place), Linf(0.06),
            0.08, x.to(place), num_temperatures=6, num_steps=2, num_walks=4, num_falling=2,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip

    agree(run, device, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ENERGY_SCORES)
def test_energies(device, name, vae, x):
    def run(place):
        defence = MCMCDefence(to(vae, place), num_samples=1, perturbation=Linf(0.1))
        anchors, clean = calibrate_energies(defence, x[:8].to(place), name)
        return anchors, clean, energy_scores(defence, x[8:12].to(place), name, anchors)

    agree(run, device, rtol=1e-5, atol=1e-6)
