"""Every way to write a VAE, NVAE, conditions and discrete latents agree between devices."""

from __future__ import annotations

import functools

import pytest
import torch
from devices import agree, to
from programs import TutorialVAE
from test_any_vae import CASES
from test_nvae_programs import CONFIGS, build
from torch import nn

from pyro_vae_defence import attacks, data, metrics
from pyro_vae_defence.defence import MCMCDefence, NoDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import program
from pyro_vae_defence.models.nvae import NonCentredNVAE
from pyro_vae_defence.models.pretrained import load_pretrained, save_pretrained
from pyro_vae_defence.ops.balls import Linf

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("float64")]

CHAIN = {"rtol": 1e-5, "atol": 1e-6}
HMC = functools.partial(BatchedHMC, num_steps=3, step_size=0.1)


def seeded():
    return torch.Generator().manual_seed(2)


@pytest.mark.parametrize("name", CASES)
def test_every_way_to_write_a_vae(device, name):
    case = CASES[name]
    made = case.make()
    if not isinstance(made, nn.Module):
        pytest.skip("tensors outside of modules stay where they are")
    images = case.images(3)
    with torch.no_grad():  # parameters that are registered by running
        made.model(*images), made.guide(*images)

    def run(place):
        vae, given = case.given(to(made, place), *to(images, place))
        found = {}
        if not case.undecoded:
            found["chains"] = MCMCDefence(vae, HMC, 2, 2)(given, seeded())
        if not case.unscored:
            found["nll"] = metrics.nll(vae, given, 10, generator=seeded())
        attack = attacks.PGD(case.objective(vae), Linf(0.1), num_steps=2)
        return found | {"attack": attack(given, seeded())}

    agree(run, device, **CHAIN)


@pytest.mark.parametrize("noncentred", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_nvae(device, name, noncentred):
    network = build(CONFIGS[name])
    x = torch.rand(2, *network.image_shape)

    def run(place):
        vae = to(network, place)
        vae = NonCentredNVAE(vae) if noncentred else vae
        result = NoDefence(vae)(x.to(place), seeded())
        energy = program.potential(vae, x.to(place))
        latents = energy.unconstrain(result.latents)
        return result, energy(latents)

    agree(run, device, rtol=1e-6, atol=1e-7)


def test_chains_in_an_nvae(device):
    network = build(CONFIGS["flat"])
    x = torch.rand(2, *network.image_shape)

    def run(place):
        kernel = functools.partial(BatchedHMC, num_steps=2, step_size=1e-3)
        return MCMCDefence(NonCentredNVAE(to(network, place)), kernel, 1, 1)(x.to(place), seeded())

    agree(run, device, **CHAIN)


def test_a_packaged_model_on_packaged_images(device):
    x = data.load("mnist_subset", "test").images(list(range(8))).double()

    def run(place):
        vae = load_pretrained("mnist_vae").double().to(place)
        attack = attacks.PGD(attacks.symmetric_kl(vae), Linf(0.1), num_steps=3)
        x_adv = attack(x.to(place), seeded()).best()
        return metrics.nll(vae, x.to(place), 20, generator=seeded()), x_adv

    agree(run, device, **CHAIN)


def test_weights_are_written_from_the_device_and_read_to_it(device, tmp_path):
    if device.type == "lazy":
        pytest.skip("no file holds tensors of this device")
    vae = to(load_pretrained("mnist_vae"), device)
    save_pretrained(
        vae, "again", tmp_path, training={}, command="none", provenance={},
        mean_posterior_variance={"z": torch.ones(64, device=device)},
    )  # fmt: skip
    again = load_pretrained("again", tmp_path)
    for name, value in vae.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.cpu()), name


def test_loaders_yield_on_the_device(device):
    loader = data.batches(data.load("mnist_subset", "test"), 4, device=device)
    x, labels = next(iter(loader))
    assert x.device.type == labels.device.type == device.type
    result = NoDefence(to(TutorialVAE().eval(), device))(x.to(torch.get_default_dtype()))
    assert result.reconstruction.device.type == device.type
