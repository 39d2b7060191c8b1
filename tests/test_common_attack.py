"""Energies under one attack on two sets: the closed form against nets of every pixel, whatever the
model's units and sites, and what is not known."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import PlaneVAE, energies_under_common_attack

from pyro_vae_defence.models import common_attack, program
from pyro_vae_defence.ops.balls import L2, Linf, reaches

EPSILON, DELTA = 0.06, 0.1


class InUnits(PlaneVAE):
    """Pixels in [-1, 1], each a batch dimension."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-4):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1, 1, 1, 2), 1.0).to_event(1))
            logits = (z.view(-1, 2) @ self.weight.T).view(-1, 1, 2, 4) / 2
            image = dist.Bernoulli(logits=logits, validate_args=False)
            with pyro.plate("c", 1, dim=-3), pyro.plate("h", 2, dim=-2), pyro.plate("w", 4, dim=-1):
                pyro.sample("x", image, obs=2 * x - 1)


class InParts(PlaneVAE):
    """Two sites, one for each row of pixels."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            logits = z @ self.weight.T
            for name, part in (("top", slice(4)), ("bottom", slice(4, 8))):
                image = dist.Bernoulli(logits=logits[:, part], validate_args=False).to_event(1)
                pyro.sample(name, image, obs=x.flatten(1)[:, part])


class Scaled(PlaneVAE):
    """What a training has it count half, energies count whole."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            image = dist.Bernoulli(logits=(z @ self.weight.T).view(-1, 1, 2, 4)).to_event(3)
            with pyro.poutine.scale(scale=0.5):
                pyro.sample("x", image, obs=x)


@pytest.fixture
def x():
    x = torch.rand(3, 1, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.round(decimals=1)  # some pixels at 0 and 1


def draws(number, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 2, generator=generator, dtype=torch.float64)


def mean_slopes(vae, x, own):
    """Of draws ``(copies * N, 2)``, a part of which is counted first."""
    slopes = common_attack.MeanSlopes(vae, x)
    slopes.add({"z": own[: len(x)]})
    slopes.add({"z": own[len(x) :]})
    return slopes.means


@pytest.mark.parametrize("kind", [PlaneVAE, InParts, Scaled])
def test_energy_is_the_least_over_a_net_of_attacks(float64, x, kind):
    vae = kind()
    own, other = draws(4 * len(x), 2), draws(5 * len(x), 3)
    means = mean_slopes(vae, x, own)
    found = common_attack.potential(vae, x.repeat(5, 1, 1, 1), Linf(EPSILON), DELTA, means)
    found = found({"z": other}).view(5, len(x))
    prior = -dist.Normal(0.0, 1.0).log_prob(other).sum(1).view(5, len(x))
    for row, image in enumerate(x.flatten(1)):
        logits = own[row :: len(x)] @ vae.weight.T
        q = torch.full((4,), 0.25)
        others = other[row :: len(x)] @ vae.weight.T
        truth = energies_under_common_attack(image, EPSILON, DELTA, logits, q, others)
        assert torch.allclose(found[:, row], truth + prior[:, row], rtol=0, atol=1e-9)


def test_rescaled_pixels_in_plates_have_the_same_attack(float64, x):
    """Twice the pixels at half the logits: the energies differ by what no attack changes."""
    own, other = draws(4 * len(x), 2), draws(len(x), 3)
    found = []
    for vae, shape in ((PlaneVAE(), (2,)), (InUnits(), (1, 1, 1, 2))):
        slopes = common_attack.MeanSlopes(vae, x)
        slopes.add({"z": own.view(-1, *shape)})
        latents = {"z": other.view(-1, *shape)}
        at_two = common_attack.potential(vae, x, Linf(EPSILON), DELTA, slopes.means)(latents)
        found.append(at_two - program.potential(vae, x)(latents))
    assert torch.allclose(*found, rtol=0, atol=1e-9)
    assert bool((found[0] < -0.05).any())


def test_energy_lies_between_those_of_two_attacks_and_of_any(float64, x):
    """Above the larger ball's; below any attack's energy and gain. Its gradient is that of nearby
    energies."""
    vae, ball = PlaneVAE(), Linf(EPSILON)
    narrow, wide = reaches(ball, DELTA)
    own, other = draws(4 * len(x), 2), {"z": draws(len(x), 3)}
    means = mean_slopes(vae, x, own)
    found = common_attack.potential(vae, x, ball, DELTA, means)
    copies = x.repeat(4, 1, 1, 1)
    assert bool((found(other) > program.potential(vae, x, wide)(other) + 1e-3).all())
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        signs = (torch.rand(x.shape, generator=generator) - 0.5).sign()
        attacked = (x + EPSILON * signs).clamp(0, 1)
        clean = program.potential(vae, copies, narrow)({"z": own})
        under = program.potential(vae, attacked.repeat(4, 1, 1, 1), Linf(DELTA))({"z": own})
        gain = (clean - under).view(4, -1).mean(0)
        assert bool((gain >= 0).all())
        energy = program.potential(vae, attacked, Linf(DELTA))(other) + gain
        assert bool((found(other) <= energy + 1e-9).all())
    z = other["z"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: found({"z": z}), z)


def test_what_is_not_known_is_told(float64, x):
    class Gaussian(PlaneVAE):
        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                mean = (z @ self.weight.T).sigmoid().view(-1, 1, 2, 4)
                pyro.sample("x", dist.Normal(mean, 0.1).to_event(3), obs=x)

    class Masked(PlaneVAE):
        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                image = dist.Bernoulli(logits=(z @ self.weight.T).view(-1, 1, 2, 4))
                seen = torch.ones(1, 2, 4, dtype=torch.bool)
                seen[0, 0, 0] = False
                pyro.sample("x", image.mask(seen).to_event(3), obs=x)

    class PixelsFirst(PlaneVAE):
        """A plate of pixels left of that of the images, whose slopes have no row per image."""

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                image = dist.Bernoulli(logits=self.weight @ z.T, validate_args=False)
                with pyro.plate("pixels", 8, dim=-2):
                    pyro.sample("x", image, obs=x.flatten(1).T)

    torch.manual_seed(7)
    assert common_attack.is_known(PlaneVAE(), x, Linf(EPSILON))
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))  # asking draws nothing that anyone would miss
    assert not common_attack.is_known(PixelsFirst(), x, Linf(EPSILON))
    assert common_attack.is_known(InUnits(), x, Linf(EPSILON))
    assert not common_attack.is_known(PlaneVAE(), x, L2(EPSILON))
    assert not common_attack.is_known(Gaussian(), x, Linf(EPSILON))
    assert not common_attack.is_known(Masked(), x, Linf(EPSILON))
