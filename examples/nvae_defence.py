"""Attack the top latent groups of a hierarchical VAE and defend it on all groups at once.

NVAE's latents are groups of maps, each conditional on those above. The attack moves the guide's
distributions of the topmost groups; the defence runs Hamiltonian Monte Carlo on all groups
together, in the noise of the latents, whose prior is a standard normal whatever the groups above
do.

    python examples/nvae_defence.py                         # the trained model of the library
    python examples/nvae_defence.py --untrained             # random weights, for a quick look
    python examples/nvae_defence.py --checkpoint celeba.pt  # an official checkpoint

The last one needs CelebA in --data-root.
"""

from __future__ import annotations

import functools

import command_line as cli
import pyro
import torch

from pyro_vae_defence import attacks, data, metrics
from pyro_vae_defence.defence import MCMCDefence, NoDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models.nvae import NVAE, NVAEConfig, load_official
from pyro_vae_defence.models.pretrained import load_pretrained
from pyro_vae_defence.models.program import mean_posterior_variance
from pyro_vae_defence.ops.balls import Linf

SMALL = NVAEConfig(
    arch_instance="res_bnswish",
    num_latent_scales=2,
    num_groups_per_scale=2,
    ada_groups=True,
    num_latent_per_group=4,
    num_channels_enc=4,
    num_channels_dec=4,
    num_preprocess_cells=1,
    num_postprocess_cells=1,
    res_dist=True,
)


def load_model(options):
    """The network, in eval mode, and the name of a dataset it is for."""
    if options.checkpoint:
        vae = load_official(options.checkpoint)
        return vae, "celeba64" if vae.config.dataset == "celeba_64" else "mnist_subset"
    if options.untrained:
        return NVAE(SMALL).eval(), "mnist_subset"
    return load_pretrained("mnist_nvae", options.models), "mnist_subset"


def main():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--checkpoint", help="official NVAE checkpoint")
    parser.add_argument("--untrained", action="store_true", help="a small network as it starts")
    parser.add_argument("--models", help="directory of trained models; the packaged by default")
    parser.add_argument("--data-root", help="directory of the datasets")
    parser.add_argument("--groups", type=cli.count, default=2, help="attacked groups, from the top")
    parser.add_argument("--radius", type=cli.radius, default=0.1, help="of the L_inf ball")
    parser.add_argument("--num-images", type=cli.count, default=20, help="to attack")
    parser.add_argument("--attack-steps", type=cli.count, default=50, help="of the attacker")
    parser.add_argument("--warmup-steps", type=cli.unsigned, default=40, help="of a chain")
    parser.add_argument("--device", type=cli.device, default="cpu", help="where to compute")
    options = parser.parse_args()
    pyro.set_rng_seed(options.seed)

    vae, dataset = load_model(options)
    vae = vae.requires_grad_(False).to(options.device)
    vae.checkpointing = vae.config.num_groups > 10  # large networks: time for memory
    train, test = (data.load(dataset, split, options.data_root) for split in ("train", "test"))
    x_ref = test.images(data.stratified(test, options.num_images)).to(options.device)

    # Which groups there are, and how many variables each has on one image.
    for site, shape in zip(vae.sites, vae.config.latent_shapes):
        print(f"{site}: {shape[0]} maps of {shape[1]}x{shape[2]}")

    # The encoder attack on the top groups: an ordinary PGD, told which sites count.
    attack = attacks.PGD(
        attacks.symmetric_kl(vae, sites=options.groups),
        Linf(options.radius),
        num_steps=options.attack_steps,
    )
    x_adv = attack(x_ref).best()

    # Whitening: the noise's mean posterior variance over training images, out of attackers' reach.
    programs = vae.noncentred()
    metric = programs.mean_posterior_variance
    if metric is None:
        some = train.images(torch.arange(min(len(train), 200))).to(options.device)
        metric = mean_posterior_variance(programs, some.split(50))
    metric = {site: value.to(options.device) for site, value in metric.items()}
    kernel = functools.partial(BatchedHMC, step_size=0.2, num_steps=4, inverse_mass_matrix=metric)

    defences = {
        "no defence": NoDefence(vae),
        "HMC, the paper's target": MCMCDefence(programs, kernel, 10, options.warmup_steps),
        "HMC, perturbation-aware": MCMCDefence(
            programs, kernel, 10, options.warmup_steps, perturbation=Linf(options.radius)
        ),
    }
    before = NoDefence(vae)(x_ref).reconstruction
    name = metrics.metric_name("ms_ssim", "paper")
    print(f"\n{name} with the reference's reconstruction, radius {options.radius:g}")
    floor = NoDefence(vae)(x_ref)
    print(f"{'noise floor':25s} {similarity(before, floor.reconstruction)}")
    for label, defence in defences.items():
        result = defence(x_adv)
        gradients = float(result.num_gradients.double().mean())
        print(f"{label:25s} {similarity(before, result.reconstruction)}, {gradients:.0f} gradients")


def similarity(x, y):
    return f"{metrics.bootstrap_interval(metrics.ms_ssim(x, y)):.3f}"


if __name__ == "__main__":
    cli.call(main)
