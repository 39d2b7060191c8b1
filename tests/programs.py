"""Small VAEs that tests share: each a Pyro program of a different kind."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae_defence.models import ConvVAE


class TutorialVAE(nn.Module):
    """As in Pyro's VAE tutorial: fully connected, sites latent and obs, a flattened observation."""

    def __init__(self, z_dim: int = 5, hidden: int = 16) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.hidden = nn.Linear(784, hidden)
        self.loc = nn.Linear(hidden, z_dim)
        self.log_scale = nn.Linear(hidden, z_dim)
        self.decoder = nn.Sequential(
            nn.Linear(z_dim, hidden), nn.Softplus(), nn.Linear(hidden, 784)
        )

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            zeros = x.new_zeros(x.shape[0], self.z_dim)
            z = pyro.sample("latent", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            probs = torch.sigmoid(self.decoder(z))
            pyro.sample(
                "obs",
                dist.Bernoulli(probs, validate_args=False).to_event(1),
                obs=x.reshape(-1, 784),
            )

    def guide(self, x):
        pyro.module("encoder", nn.ModuleList([self.hidden, self.loc, self.log_scale]))
        with pyro.plate("data", x.shape[0]):
            h = nn.functional.softplus(self.hidden(x.reshape(-1, 784)))
            loc, scale = self.loc(h), torch.exp(self.log_scale(h))
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))

    @torch.no_grad()
    def move_bias(self, change):
        """Change a weight ``"in place"``, its parameter (``"replaced"``), or, as ``.to(device)``
        does, the parameter's memory (``"moved"``)."""
        last = self.decoder[2]
        if change == "in place":
            last.bias += 1.0
        elif change == "replaced":
            last.bias = nn.Parameter(last.bias + 1.0)
        else:
            last.bias.data = last.bias + 1.0


class LinearGaussianVAE:
    """p(z) = N(0, I), p(x|z) = N(Wz + b, s^2 I) on 1x4x4 images: every posterior is known
    exactly."""

    noise = 0.3

    def __init__(self, z_dim: int = 3) -> None:
        generator = torch.Generator().manual_seed(7)
        self.weight = torch.randn(16, z_dim, generator=generator, dtype=torch.float64) * 0.7
        self.bias = torch.randn(16, generator=generator, dtype=torch.float64) * 0.1
        self.z_dim = z_dim

    def _to(self, x):
        return self.weight.to(x), self.bias.to(x)

    def model(self, x):
        weight, bias = self._to(x)
        with pyro.plate("data", x.shape[0]):
            zeros = x.new_zeros(x.shape[0], self.z_dim)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            mean = (z @ weight.T + bias).reshape(-1, 1, 4, 4)
            scale = torch.full_like(mean, self.noise)
            pyro.sample("obs", dist.Normal(mean, scale).to_event(3), obs=x)

    def exact(self, x):
        """Mean (N, D) and covariance (D, D) of p(z | x)."""
        weight, bias = self._to(x)
        precision = torch.eye(self.z_dim).to(x) + weight.T @ weight / self.noise**2
        covariance = torch.linalg.inv(precision)
        mean = (x.flatten(1) - bias) @ weight @ covariance.T / self.noise**2
        return mean, covariance

    def guide(self, x):
        # The diagonal of the exact posterior: close to it, but not it.
        mean, covariance = self.exact(x)
        with pyro.plate("data", x.shape[0]):
            scale = covariance.diagonal().sqrt().expand_as(mean)
            pyro.sample("z", dist.Normal(mean, scale).to_event(1))

    def evidence(self, x):
        """log p(x) per image, (N,)."""
        weight, bias = self._to(x)
        covariance = weight @ weight.T + self.noise**2 * torch.eye(16).to(x)
        return dist.MultivariateNormal(bias, covariance).log_prob(x.flatten(1))


class HierarchicalVAE:
    """Two latent groups of different shape, a constrained one, a nested plate, and a factor
    mask."""

    def model(self, x):
        with pyro.plate("data", x.shape[0], dim=-2):
            top = pyro.sample("top", dist.Normal(x.new_zeros(x.shape[0], 1, 2), 1.0).to_event(1))
            rate = pyro.sample("rate", dist.Gamma(2.0 + x.new_zeros(x.shape[0], 1), 1.5))
            with pyro.plate("groups", 3, dim=-1):
                low = pyro.sample("low", dist.Normal(top.sum(-1).expand(-1, 3), 0.5))
            mean = (low.sum(-1) * rate[:, 0])[:, None].expand(-1, 16).reshape(-1, 1, 1, 4, 4)
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(3), obs=x[:, None])

    def guide(self, x):
        with pyro.plate("data", x.shape[0], dim=-2):
            loc = x.flatten(1)[:, None, :2]
            top = pyro.sample("top", dist.Normal(loc, 0.3).to_event(1))
            pyro.sample("rate", dist.Gamma(3.0 + x.new_zeros(x.shape[0], 1), 2.0))
            with pyro.plate("groups", 3, dim=-1):
                pyro.sample("low", dist.Normal(top.sum(-1).expand(-1, 3), 0.6))


class BatchNormVAE(ConvVAE):
    """An encoder that couples the images of a batch, and changes, whenever it runs in train
    mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def posterior(self, x):
        return super().posterior(self.norm(x))


class PlaneVAE(nn.Module):
    """Two latents, Bernoulli images 1x2x4: whatever is an integral can be a sum over a grid."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        weight = 2.5 * torch.randn(8, 2, generator=generator, dtype=torch.float64)
        self.register_buffer("weight", weight)
        self.register_buffer("back", torch.linalg.pinv(weight) * 5)

    def model(self, x):
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(len(x), 2)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            logits = (z @ self.weight.T).view(-1, 1, 2, 4)
            image = dist.Bernoulli(logits=logits, validate_args=False).to_event(3)
            pyro.sample("x", image, obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            mean = (x.flatten(1) - 0.5) @ self.back.T
            pyro.sample("z", dist.Normal(mean, 0.4 * torch.ones_like(mean)).to_event(1))


def energies_under_common_attack(image, epsilon, delta, own, q, other):
    """Energies ``(B,)`` of Bernoulli logits ``other`` ``(B, P)`` in the ball of radius delta around
    the attack that serves each best, plus what it gives to logits ``own`` ``(A, P)`` with weights
    ``q`` ``(A,)``: the least over a net of every pixel, kinks included. ``image`` is ``(P,)``."""

    def energies(pixels, logits, radius):
        reached = (pixels + radius * logits.sign()).clamp(0, 1)
        return torch.nn.functional.softplus(logits) - logits * reached

    net = torch.linspace(-1, 1, 201, dtype=image.dtype)[:, None] * epsilon + image
    kinks = image.new_tensor([delta, 1 - delta])[:, None].expand(2, len(image))
    kinks = torch.maximum(torch.minimum(kinks, net[-1]), net[0])
    net = torch.cat([net, kinks]).clamp(0, 1)[:, None]
    clean = energies(image, own, delta - epsilon)
    gain = ((clean - energies(net, own, delta)) * q[:, None]).sum(1, keepdim=True)
    return (energies(net, other, delta) + gain).amin(0).sum(1)


def plane_classifier(latents):
    """Three classes: sectors of the plane."""
    angles = latents.new_tensor([0.3, 2.4, 4.5])
    return latents @ torch.stack([angles.cos(), angles.sin()]) * 2.0
