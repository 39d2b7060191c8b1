"""Small VAEs that the tests of the objectives train, each a plain pair of Pyro programs."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

IMAGE = (1, 2, 3)


class LinearVAE(nn.Module):
    """Linear-Gaussian VAE in float64, images ``(N, 1, 2, 3)``; ``splits`` are its latent sites."""

    def __init__(self, latent_dim: int = 2, splits: tuple[int, ...] | None = None) -> None:
        super().__init__()
        pixels = IMAGE[0] * IMAGE[1] * IMAGE[2]
        generator = torch.Generator().manual_seed(5)

        def parameter(*shape: int, size: float = 0.4) -> nn.Parameter:
            return nn.Parameter(
                size * torch.randn(*shape, generator=generator, dtype=torch.float64)
            )

        self.encoder = nn.ParameterDict(
            {
                "loc": parameter(latent_dim, pixels),
                "offset": parameter(latent_dim),
                "log_scale": parameter(latent_dim, pixels, size=0.2),
            }
        )
        self.decoder = nn.ParameterDict(
            {"weight": parameter(pixels, latent_dim), "offset": parameter(pixels)}
        )
        self.sigma = 0.5
        self.splits = splits or (latent_dim,)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.flatten(1)
        loc = flat @ self.encoder["loc"].T + self.encoder["offset"]
        return loc, (flat @ self.encoder["log_scale"].T - 0.5).exp()

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.decoder["weight"].T + self.decoder["offset"]

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = [
                pyro.sample(f"z{i}", dist.Normal(x.new_zeros(n), x.new_ones(n)).to_event(1))
                for i, n in enumerate(self.splits)
            ]
            mean = self.decode(torch.cat(z, 1))
            pyro.deterministic("mean", mean, event_dim=1)
            pyro.sample("x", dist.Normal(mean, self.sigma).to_event(1), obs=x.flatten(1))

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, scale = self.posterior(x)
        with pyro.plate("data", x.shape[0]):
            for i, (m, s) in enumerate(zip(loc.split(self.splits, 1), scale.split(self.splits, 1))):
                pyro.sample(f"z{i}", dist.Normal(m, s).to_event(1))


class TutorialVAE(nn.Module):
    """In the style of Pyro's tutorial: sites ``latent`` and ``obs``, flattened Bernoulli pixels."""

    def __init__(self, latent_dim: int = 3) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(nn.Linear(64, 8), nn.Softplus(), nn.Linear(8, 2 * latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 8), nn.Softplus(), nn.Linear(8, 64))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc = x.new_zeros(x.shape[0], self.latent_dim)
            z = pyro.sample("latent", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            probs = self.decoder(z).sigmoid()
            image = dist.Bernoulli(probs, validate_args=False).to_event(1)
            pyro.sample("obs", image, obs=x.reshape(-1, 64))

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x.reshape(-1, 64)).chunk(2, 1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


class ConvVAE(nn.Module):
    """Convolutions, a latent map, Gaussian pixels; both programs register all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 4, 2, 1), nn.SiLU(), nn.Conv2d(4, 4, 4, 2, 1))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(2, 4, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(4, 1, 4, 2, 1)
        )

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2, 2, 2), 1.0).to_event(3))
            pyro.sample("image", dist.Normal(self.decoder(z), 0.4).to_event(3), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, 1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(3))


class HierarchicalVAE(nn.Module):
    """Two latent sites, the second conditional on the first in both programs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Linear(64, 4), nn.Linear(66, 4)])
        self.decoder = nn.ModuleList([nn.Linear(2, 2), nn.Linear(4, 64)])

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            top = pyro.sample("top", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            low = pyro.sample("low", dist.Normal(self.decoder[0](top), 1.0).to_event(1))
            mean = self.decoder[1](torch.cat([top, low], 1))
            pyro.sample("image", dist.Normal(mean, 0.4).to_event(1), obs=x.flatten(1))

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder[0](x.flatten(1)).chunk(2, 1)
            top = pyro.sample("top", dist.Normal(loc, log_scale.exp()).to_event(1))
            loc, log_scale = self.encoder[1](torch.cat([x.flatten(1), top], 1)).chunk(2, 1)
            pyro.sample("low", dist.Normal(loc, log_scale.exp()).to_event(1))


class BottomUpVAE(nn.Module):
    """The model samples ``top``, then ``low`` given it, the guide ``low``, then ``top`` given it.

    One number each, whose KL of one image ``(1, 2, 2)`` is known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.slope = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", x.shape[0]):
            top = pyro.sample("top", dist.Normal(x.new_zeros(len(x)), 1.0))
            low = pyro.sample("low", dist.Normal(self.slope * top, 0.5))
            pyro.sample(
                "x", dist.Normal(low[:, None].expand(-1, 4), 1.0).to_event(1), obs=x.flatten(1)
            )

    def guide(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", x.shape[0]):
            low = pyro.sample("low", dist.Normal(self.loc.expand(len(x)), 1.0))
            pyro.sample("top", dist.Normal(0.6 * low, 0.7))

    def kl(self) -> Tensor:
        square = self.loc**2 + 1  # E low^2
        top = 0.36 * square + 0.49
        mismatch = (1 - 0.6 * self.slope) ** 2 * square + (0.7 * self.slope) ** 2
        return 0.5 * top + 2 * mismatch - 1 + math.log(0.5 / 0.7)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients of the parameters that have one, by name."""
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
