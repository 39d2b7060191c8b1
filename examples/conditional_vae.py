"""Train a conditional VAE, attack it given the labels of images, and defend it with MCMC.

Both programs take the label y beside the image x: p(z), p(x | z, y) and q(z | x, y). A label comes
with its image wherever images go: from the loader into training, and as (x, y) into attack, defence
and score. All of them know the true label, and the attacker moves the image alone.

    python examples/conditional_vae.py
    python examples/conditional_vae.py --radius 0.1 --epochs 60

Writes to --output: vae.pt (training checkpoint, resumed when it exists) and results.json.
"""

from __future__ import annotations

import functools
from pathlib import Path

import command_line as cli
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

from pyro_vae_defence import attacks, data, metrics
from pyro_vae_defence.defence import EncoderDefence, MCMCDefence, NoDefence, clip_dark_pixels
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.files import write_json
from pyro_vae_defence.training import FitConfig, fit

CLASSES, PIXELS = 10, 784


class ConditionalVAE(nn.Module):
    mean_posterior_variance = None  # which fit measures: a metric for chains

    def __init__(self, z_dim=20, hidden=400):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS + CLASSES, hidden), nn.Softplus(), nn.Linear(hidden, 2 * z_dim)
        )
        self.decoder = nn.Sequential(
            nn.Linear(z_dim + CLASSES, hidden), nn.Softplus(), nn.Linear(hidden, PIXELS)
        )

    def model(self, x, y):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.z_dim), 1.0).to_event(1))
            logits = self.decoder(torch.cat([z, nn.functional.one_hot(y, CLASSES)], -1))
            likelihood = dist.Bernoulli(logits=logits, validate_args=False).to_event(1)
            pyro.sample("x", likelihood, obs=x.flatten(1))

    def guide(self, x, y):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            given = torch.cat([x.flatten(1), nn.functional.one_hot(y, CLASSES)], -1)
            loc, log_scale = self.encoder(given).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def main():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--epochs", type=cli.count, default=30, help="of training")
    parser.add_argument("--radius", type=cli.radius, default=0.2, help="of the attack, L_inf")
    parser.add_argument("--delta", type=cli.radius, default=0.2, help="radius the defender assumes")
    parser.add_argument("--num-images", type=cli.count, default=50, help="to attack")
    parser.add_argument("--num-samples", type=cli.count, default=30, help="draws per chain")
    parser.add_argument("--warmup-steps", type=cli.unsigned, default=30, help="before them")
    parser.add_argument("--device", type=cli.device, default="cpu", help="where to compute")
    parser.add_argument("--output", default="runs/conditional_vae", help="directory")
    options = parser.parse_args()
    pyro.set_rng_seed(options.seed)
    attack_ball, assumed = Linf(options.radius), Linf(options.delta)
    train, test = (data.load("mnist_subset", split) for split in ("train", "test"))
    chosen = data.stratified(test, options.num_images)
    x, y = (part.to(options.device) for part in test[chosen])
    output = Path(options.output)

    vae = ConditionalVAE().to(options.device)
    loader = data.batches(train, 64, shuffle=True)  # of images and labels
    config = FitConfig(options.epochs, 1e-3, "one_cycle", name=f"seed={options.seed}")
    trained = fit(vae, TraceMeanField_ELBO(), loader, config, checkpoint=output / "vae.pt")
    print(f"trained for {options.epochs} epochs: {trained.history[-1]['train_loss']:.1f} nats")

    attack = attacks.PGD(attacks.symmetric_kl(vae), attack_ball)
    inputs = {"clean": x, "attacked": attack((x, y)).best()}

    metric = vae.mean_posterior_variance
    kernel = functools.partial(BatchedHMC, step_size=0.5, inverse_mass_matrix=metric)
    lengths = options.num_samples, options.warmup_steps
    clip = functools.partial(clip_dark_pixels, delta=options.delta)
    defences = {
        "no defence": NoDefence(vae),
        "dark-pixel clipping": EncoderDefence(vae, preprocess=clip),
        "MCMC": MCMCDefence(vae, kernel, *lengths, perturbation=assumed),
    }
    before = NoDefence(vae)((x, y)).reconstruction
    rows = {"-log p(x | y), nats": [metrics.nll(vae, (each, y)) for each in inputs.values()]}
    for name, defend in defences.items():
        after = [defend((each, y)).reconstruction for each in inputs.values()]
        rows[f"similarity, {name}"] = [metrics.ms_ssim(before, each) for each in after]
    results = {
        name: dict(zip(inputs, map(metrics.bootstrap_interval, values), strict=True))
        for name, values in rows.items()
    }
    write_json(output / "results.json", results)

    print("\nsimilarity (ms_ssim[paper]) with reconstructions of clean images; its noise floor is")
    print(f"that of clean images without a defence. Radius {options.radius:g}")
    print(f"{'':32s}" + "".join(f"{kind:26s}" for kind in inputs))
    for name, entry in results.items():
        print(f"{name:32s}" + "".join(f"{f'{value:.2f}':26s}" for value in entry.values()))


if __name__ == "__main__":
    cli.call(main)
