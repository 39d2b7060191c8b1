"""Mixed devices are told on a GPU as ``tests/test_devices.py`` has them told on ``meta``."""

from __future__ import annotations

import pytest
import torch
from devices import to
from programs import TutorialVAE

from pyro_vae_defence import attacks, metrics
from pyro_vae_defence.defence import DefendedClassifier, MCMCDefence, NoDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models.classifier import LinearClassifier
from pyro_vae_defence.ops.balls import Linf

pytestmark = pytest.mark.cuda

X = torch.rand(3, 1, 28, 28)


def pgd(objective, x):
    return attacks.PGD(objective, Linf(0.1), num_steps=1)(x)


CASES = {
    "images": lambda vae, there: MCMCDefence(vae)(there),
    "vae": lambda vae, there: NoDefence(to(vae, there.device))(X),
    "likelihood": lambda vae, there: metrics.nll(vae, there),
    "attack": lambda vae, there: pgd(attacks.symmetric_kl(vae), there),
    "target": lambda vae, there: pgd(attacks.symmetric_kl(vae, there), X),
    "labels": lambda vae, there: pgd(
        attacks.cross_entropy(
            vae, LinearClassifier(5, 4), torch.zeros(3, dtype=torch.long, device=there.device)
        ),
        X,
    ),
    "classifier": lambda vae, there: DefendedClassifier(
        NoDefence(vae), LinearClassifier(5, 4).to(there.device)
    )(X),
    "similarity": lambda vae, there: metrics.ms_ssim(X, there),
}


@pytest.mark.parametrize("name", CASES)
def test_devices_are_named_with_the_mend(device, name):
    if device.type == "cpu":
        pytest.skip("needs two devices")
    with pytest.raises(ValueError, match=rf"(?s){device.type}.*\.to\('"):
        CASES[name](TutorialVAE().eval(), X.to(device))


def test_what_follows_by_itself(device):
    """A metric and a generator of the CPU, and a generator of the device."""
    vae, x = TutorialVAE().eval().to(device), X.to(device)

    def kernel(model):
        metric = {"latent": torch.full((5,), 0.5)}
        return BatchedHMC(model, num_steps=2, inverse_mass_matrix=metric)

    generators = [torch.Generator()]
    if device.type == "cuda":
        generators.append(torch.Generator(device))
    for generator in generators:
        result = MCMCDefence(vae, kernel, 1, 1)(x, generator)
        assert result.latents["latent"].device.type == device.type
