"""Defend the images of a data set that does not fit into memory, as long as each image needs.

Images are read, defended and let go batch by batch (``stream``). The four chains of an image stop
as soon as they agree with one another (``until_converged``), and no image may cost more than a
budget of gradients (``max_gradients``). What is kept is one draw of each image; whoever needs the
others writes them to a file before the next batch is read.

    python examples/large_dataset.py --num-images 200
    python examples/large_dataset.py --dataset mnist --data-root data --num-images 10000
"""

from __future__ import annotations

import functools

import command_line as cli
import pyro
import torch

from pyro_vae_defence import data
from pyro_vae_defence.defence import ConvergenceRule, MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models.pretrained import load_pretrained
from pyro_vae_defence.ops.balls import Linf


def read(images, count, size):
    """Batches of images, each read from where it lies when its turn comes; a DataLoader will do."""
    for first in range(0, count, size):
        yield images.images(slice(first, min(first + size, count)))


def main():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--dataset", default="mnist_subset", help="of grey images of 28x28")
    parser.add_argument("--data-root", help="directory of the datasets")
    parser.add_argument("--num-images", type=cli.count, default=100, help="to defend")
    parser.add_argument("--images-per-batch", type=cli.count, default=50, help="read at once")
    parser.add_argument("--delta", type=cli.radius, default=0.1, help="radius the defender assumes")
    gradients = "per image, of 4 chains"
    parser.add_argument("--max-gradients", type=cli.count, default=4000, help=gradients)
    options = parser.parse_args()
    pyro.set_rng_seed(options.seed)
    vae = load_pretrained("mnist_vae")
    test = data.load(options.dataset, "test", options.data_root)
    count = min(options.num_images, len(test))
    kernel = functools.partial(
        BatchedHMC, step_size=0.2, burn_in=10, inverse_mass_matrix=vae.mean_posterior_variance
    )
    defence = MCMCDefence(
        vae,
        kernel,
        num_samples=1000,  # at most: the rule and the budget decide
        warmup_steps=20,
        num_chains=4,
        perturbation=Linf(options.delta),
        keep_draws=1,
        max_gradients=options.max_gradients,
        until_converged=ConvergenceRule(max_r_hat=1.1),
        batch_size=4 * options.images_per_batch,
    )
    latents, gradients, converged, seconds = [], [], [], 0.0
    print(f"{'images':>8s} {'converged':>10s} {'gradients per image':>20s} {'seconds':>8s}")
    for result in defence.stream(read(test, count, options.images_per_batch)):
        latents.append(result.latents["z"])
        gradients.append(result.num_gradients)
        converged.append(result.convergence["converged"])
        seconds += result.seconds
        spent = result.num_gradients.double().mean()
        share = result.convergence["converged"].double().mean()
        print(f"{len(result.x):8d} {share:10.0%} {spent:20.0f} {result.seconds:8.1f}")
    spent, done = torch.cat(gradients), torch.cat(converged)
    print(
        f"\n{count} images, {len(torch.cat(latents))} latents kept, {int(done.sum())} converged: "
        f"{int(spent.sum())} gradients of at most {count * options.max_gradients}, "
        f"{int(spent.min())} to {int(spent.max())} per image, {seconds:.1f} seconds"
    )


if __name__ == "__main__":
    cli.call(main)
