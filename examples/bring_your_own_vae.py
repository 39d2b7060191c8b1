"""Attack and defend a VAE that knows nothing of this library.

The VAE below is written as in Pyro's own tutorial (https://pyro.ai/examples/vae.html): fully
connected, sites `latent` and `obs`, images flattened inside the programs, trained by
`pyro.infer.SVI`. Attack, defence and diagnostics take it as it is.

    python examples/bring_your_own_vae.py
"""

from __future__ import annotations

import functools

import command_line as cli
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vae_defence import attacks, data, diagnostics, metrics
from pyro_vae_defence.defence import MCMCDefence, NoDefence
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS
from pyro_vae_defence.models.program import mean_posterior_variance
from pyro_vae_defence.ops.balls import Linf

# --- The VAE: nothing of this library ---


class Encoder(nn.Module):
    def __init__(self, z_dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(784, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, z_dim)
        self.fc22 = nn.Linear(hidden_dim, z_dim)

    def forward(self, x):
        hidden = nn.functional.softplus(self.fc1(x.reshape(-1, 784)))
        return self.fc21(hidden), torch.exp(self.fc22(hidden))


class Decoder(nn.Module):
    def __init__(self, z_dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(z_dim, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, 784)

    def forward(self, z):
        return torch.sigmoid(self.fc21(nn.functional.softplus(self.fc1(z))))


class VAE(nn.Module):
    def __init__(self, z_dim=20, hidden_dim=400):
        super().__init__()
        self.encoder = Encoder(z_dim, hidden_dim)
        self.decoder = Decoder(z_dim, hidden_dim)
        self.z_dim = z_dim

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            zeros = x.new_zeros(x.shape[0], self.z_dim)
            z = pyro.sample("latent", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            image = self.decoder(z)
            likelihood = dist.Bernoulli(image, validate_args=False).to_event(1)
            pyro.sample("obs", likelihood, obs=x.reshape(-1, 784))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = self.encoder(x)
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))


# --- Train it with Pyro, then attack and defend it ---


def main():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--epochs", type=cli.count, default=40, help="of training")
    parser.add_argument("--radius", type=cli.radius, default=0.2, help="of the attack, L_inf")
    parser.add_argument("--num-images", type=cli.count, default=50, help="to attack")
    parser.add_argument("--num-samples", type=cli.count, default=30, help="draws per chain")
    parser.add_argument("--warmup-steps", type=cli.unsigned, default=30, help="before them")
    options = parser.parse_args()
    pyro.set_rng_seed(options.seed)

    train, test = (data.load("mnist_subset", split) for split in ("train", "test"))
    x_ref = test.images(data.stratified(test, options.num_images))
    vae = VAE()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for epoch in range(options.epochs):
        loss = sum(svi.step(x) for x, _ in data.batches(train, 64, shuffle=True))
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}: -ELBO {loss / len(train):.1f} nats")

    attack = attacks.PGD(attacks.symmetric_kl(vae), Linf(options.radius))
    x_adv = attack(x_ref).best()

    variance = mean_posterior_variance(vae, data.batches(train, 500))
    undefended = NoDefence(vae)
    before = undefended(x_ref).reconstruction
    kernels = {
        "HMC": functools.partial(BatchedHMC, step_size=0.5, inverse_mass_matrix=variance),
        "NUTS": functools.partial(BatchedNUTS, step_size=0.5, inverse_mass_matrix=variance),
    }
    name = metrics.metric_name("ms_ssim", "paper")
    print(f"\n{name} of reconstructions, radius {options.radius:g}")
    print(f"no defence  {similarity(before, undefended(x_adv))}")
    for label, kernel in kernels.items():
        lengths = options.num_samples, options.warmup_steps
        result = MCMCDefence(vae, kernel, *lengths, num_chains=4)(x_adv)
        rhat = np.median(diagnostics.rhat(result.to_datatree())["latent"])
        print(f"{label:10s}  {similarity(before, result)}, median R-hat {rhat:.2f}")


def similarity(before, result):
    return f"{metrics.bootstrap_interval(metrics.ms_ssim(before, result.reconstruction)):.2f}"


if __name__ == "__main__":
    cli.call(main)
