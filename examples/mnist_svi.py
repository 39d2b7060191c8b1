"""Train a VAE by SVI on real digits, attack it, defend it with MCMC, and say how well that worked.

Beside the recommended defence stand the paper's target with the same sampler, a control without any
chain, and the noise floor, the similarity of two reconstructions of one image.

    python examples/mnist_svi.py
    python examples/mnist_svi.py --kernel nuts --radius 0.1 --delta 0.2
    python examples/mnist_svi.py --dataset mnist --data-root DIR --epochs 12

Writes to --output: vae.pt (training checkpoint, resumed when it exists), results.json, panel_*.png,
chains_*.png and chains_*.nc, one of each kind per radius. Whatever is finished when the run is
interrupted stays.
"""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from pathlib import Path

import command_line as cli
import numpy as np
import pyro.infer
import torch
from matplotlib.figure import Figure

from pyro_vae_defence import attacks, data, diagnostics, metrics, plots
from pyro_vae_defence.defence import EncoderDefence, MCMCDefence, NoDefence, clip_dark_pixels
from pyro_vae_defence.defence.mcmc import RECOMMENDED_LENGTHS
from pyro_vae_defence.mcmc import BatchedNUTS
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.objectives import BetaELBO
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.files import atomic_path, write_json
from pyro_vae_defence.ops.provenance import provenance
from pyro_vae_defence.training import FitConfig, fit

METRIC = metrics.metric_name("ms_ssim", "paper")
DATASETS = ("mnist_subset", "fashion_mnist_subset", "mnist", "fashion_mnist", "color_mnist")
UNDEFENDED, CLIPPING = "undefended", "control: dark-pixel clipping"
PAPER, RECOMMENDED = "HMC, the paper's target", "recommended"
# In place of the recommended HMC. The batched NUTS runs in its metric, hence on a scale of order
# one, and a batch costs its largest tree: few would grow beyond 31 leaves. Stock Pyro kernels start
# from the identity.
KERNELS = {
    "hmc": None,
    "nuts": (BatchedNUTS, {"max_tree_depth": 5}),
    "pyro-hmc": (pyro.infer.HMC, {"step_size": 0.1, "num_steps": 10}),
    "pyro-nuts": (pyro.infer.NUTS, {"step_size": 0.1}),
}

NOTE = """\
Similarity of reconstructions to the reference's, and log posterior ratio (median, nats), with 95%
bootstrap intervals over reference images. The noise floor is the similarity of two reconstructions
of the same reference, dark-pixel clipping a control without a chain. The attack does not know the
defence."""


def main():
    started = time.perf_counter()
    options = parse_arguments()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(options.seed)
    train_set, validation_set, test_set = (
        data.load(options.dataset, split, options.data_root, options.download)
        for split in data.SPLITS
    )
    print(f"{train_set}, {test_set}")
    # Too many are refused now, and drawn when the model is trained.
    data.stratified(test_set, options.num_references, torch.Generator())

    vae = ConvVAE(train_set.image_shape[0]).to(options.device)
    nelbo = train(options, vae, train_set, validation_set, output)
    x_ref = test_set.images(data.stratified(test_set, options.num_references)).to(options.device)

    results = {
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "metric": METRIC,
        "validation_nelbo": nelbo,
        "provenance": provenance(),
        "radii": {},
    }
    for radius in options.radius:
        restarts = f"{len(x_ref)} images x {options.num_restarts} restarts"
        print(f"\nradius {radius:g}: attacking {restarts}")
        entry = attack_and_defend(options, vae, train_set, x_ref, radius, output)
        results["radii"][f"{radius:g}"] = entry
        write_json(output / "results.json", results)
    print_table(results["radii"])
    print(f"\nfiles in {output}/: results.json, panel_*.png, chains_*.png, chains_*.nc, vae.pt")
    print(f"{time.perf_counter() - started:.0f} s in all")


def train(options, vae, train_set, validation_set, output):
    """SVI with a one-cycle schedule; returns -ELBO on the validation set, at beta = 1."""
    name = f"{options.dataset} beta={options.beta:g} seed={options.seed}"
    result = fit(
        vae,
        BetaELBO(options.beta),
        data.batches(train_set, 64, shuffle=True, drop_last=True, labels=False),
        FitConfig(options.epochs, 1e-3, "one_cycle", posterior_variance=False, name=name),
        validation=data.batches(validation_set, 500, labels=False),
        checkpoint=options.checkpoint or output / "vae.pt",
    )
    nelbo = result.history[-1]["validation_nelbo"]
    seconds = sum(epoch["seconds"] for epoch in result.history)
    trained = f"trained for {len(result.history)} epochs in {seconds:.0f} s"
    print(f"{trained}: validation -ELBO {nelbo:.1f} nats")
    return nelbo


def attack_and_defend(options, vae, train_set, x_ref, radius, output):
    """Everything at one radius; returns what goes into results.json."""
    delta = options.delta or radius
    attack = attacks.PGD(
        attacks.symmetric_kl(vae), Linf(radius), num_restarts=options.num_restarts, preset="paper"
    )
    attacked = attack(x_ref)
    x_adv, references, image = attacked.flat()

    undefended = NoDefence(vae)
    before, again = undefended(references), undefended(references)
    clipped = EncoderDefence(vae, preprocess=functools.partial(clip_dark_pixels, delta=delta))
    lengths = {name: getattr(options, name) for name in RECOMMENDED_LENGTHS}
    defences = {UNDEFENDED: undefended, f"{CLIPPING}, δ = {delta:g}": clipped}
    for name, ball in ((PAPER, None), (f"{RECOMMENDED}, δ = {delta:g}", Linf(delta))):
        chains = MCMCDefence.recommended(vae, ball, train_set, **lengths, progress=True)
        defences[name] = replace(chains, kernel=make_kernel(options, chains.kernel))

    energy = program.potential(vae, references)
    entry = {"delta": delta, "symmetric_kl": float(attacked.objective.mean()), "defences": {}}
    columns = {"reference": references, f"attacked,\nradius {radius:g}": x_adv}
    ratios = {}
    for name, defence in defences.items():
        found = defence(x_adv)
        similarity = metrics.ms_ssim(before.reconstruction, found.reconstruction, variant="paper")
        with torch.no_grad():
            ratios[name] = metrics.log_posterior_ratio(energy, before.latents, found.latents)
        entry["defences"][name] = {
            # Over reference images: restarts on one image stay together.
            "similarity": metrics.bootstrap_interval(similarity, image),
            "log_posterior_ratio": metrics.bootstrap_interval(
                ratios[name], image, statistic="median"
            ),
            "gradients_per_image": float(found.num_gradients.float().mean()),
            "seconds_per_image": found.seconds / len(x_adv),
        }
        columns[name.replace(": ", ":\n").replace(", ", ",\n")] = found.reconstruction
    floor = metrics.ms_ssim(before.reconstruction, again.reconstruction, variant="paper")
    entry["noise_floor"] = metrics.bootstrap_interval(floor, image)
    entry["chains"] = chain_diagnostics(found)  # the last are the recommended ones

    draw_images(columns, output / f"panel_{radius:g}.png")
    first, *_, last = ratios.values()
    draw_chains(found.to_datatree(), first, last, output / f"chains_{radius:g}.png")
    with atomic_path(output / f"chains_{radius:g}.nc") as path:
        found.to_arviz().to_netcdf(str(path))
    return entry


def chain_diagnostics(result):
    """Whether to believe the chains."""
    tree = result.to_datatree()
    rhat = np.concatenate([value.ravel() for value in diagnostics.rhat(tree).values()])
    ess = np.concatenate([value.ravel() for value in diagnostics.ess(tree).values()])
    stats = result.sample_stats
    return {
        "acceptance_rate": float(stats["acceptance_rate"].mean()),
        "divergences": int(stats["diverging"].sum()),
        "rhat_median": float(np.nanmedian(rhat)),
        # Not between two values, which may both be infinite.
        "rhat_95": float(np.nanquantile(rhat, 0.95, method="higher")),
        "ess_median": float(np.nanmedian(ess)),
        "draws": int(np.prod(stats["lp"].shape[:2])),
    }


def make_kernel(options, recommended):
    """The kernel with its settings, those of the command line where it has them."""
    if options.kernel == "hmc":
        kernel, settings = recommended.func, recommended.keywords
    else:
        kernel, settings = KERNELS[options.kernel]
    if options.kernel == "nuts":
        shared = ("burn_in", "step_size", "inverse_mass_matrix")
        settings = {**settings, **{name: recommended.keywords[name] for name in shared}}
    given = {"step_size": options.step_size, "num_steps": options.num_steps}
    settings = {name: given.get(name) or value for name, value in settings.items()}
    return functools.partial(kernel, **settings)


def draw_images(columns, path):
    rows = min(5, len(columns["reference"]))
    figure = Figure((1.4 * len(columns), 0.4 + 1.4 * rows))
    plots.panel(figure.subplots(rows, len(columns), squeeze=False), columns)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_chains(tree, ratio_before, ratio_after, path):
    figure = Figure((9, 6))
    axes = figure.subplots(2, 2)
    lp = tree["sample_stats"]["lp"].values
    site, values = next(iter((k, v.values) for k, v in tree["posterior"].data_vars.items()))
    plots.trace(axes[0, 0], lp[:, :, 0], "log density of the first image (nats)")
    axes[0, 0].legend(fontsize=7)
    plots.rank(axes[0, 1], lp[:, :, 0], "log density of the first image")
    plots.trace(axes[1, 0], values[:, :, 0].reshape(*lp.shape[:2], -1)[..., 0], f"{site}[0]")
    plots.posterior_ratios(axes[1, 1], ratio_before, ratio_after)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def print_table(radii):
    for radius, entry in radii.items():
        names = [*entry["defences"], "noise floor"]
        width = max(map(len, names))
        columns = (METRIC, "log posterior ratio", "gradients", "s / image")
        print(f"\nradius {radius}\n{'':{width}}" + "".join(f"  {name:>21}" for name in columns))
        for name, found in entry["defences"].items():
            cells = [f"{found[key]:.2f}" for key in ("similarity", "log_posterior_ratio")]
            cells += [f"{found[f'{what}_per_image']:.3g}" for what in ("gradients", "seconds")]
            print(f"{name:<{width}}" + "".join(f"  {cell:>21}" for cell in cells))
        floor = f"{entry['noise_floor']:.2f}"
        print(f"{'noise floor':<{width}}  {floor:>21}")
        print(
            "chains of the last: acceptance {acceptance_rate:.2f}, {divergences} divergences, R-hat"
            " {rhat_median:.2f} in the median and {rhat_95:.2f} at most in 95%, bulk ESS "
            "{ess_median:.0f} of {draws} draws".format(**entry["chains"])
        )
    print(f"\n{NOTE}")


def parse_arguments():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--kernel", choices=KERNELS, default="hmc")
    parser.add_argument("--dataset", choices=DATASETS, default="mnist_subset")
    parser.add_argument("--data-root", help="directory of full datasets")
    parser.add_argument("--download", action="store_true", help="fetch a missing dataset")
    parser.add_argument("--epochs", type=cli.count, default=30)
    parser.add_argument("--beta", type=cli.positive, default=1.0, help="weight of the KL term")
    parser.add_argument("--radius", type=cli.radius, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--num-references", type=cli.count, default=50)
    parser.add_argument("--num-restarts", type=cli.count, default=2)
    parser.add_argument("--delta", type=cli.radius, help="assumed radius; the attack's by default")
    for name, default in RECOMMENDED_LENGTHS.items():
        kind = cli.unsigned if name == "warmup_steps" else cli.count
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default)
    parser.add_argument("--step-size", type=cli.positive, help="initial step size")
    parser.add_argument("--num-steps", type=cli.count, help="leapfrog steps of HMC")
    parser.add_argument("--device", type=cli.device, default="cpu")
    parser.add_argument("--output", default="runs/mnist_svi")
    parser.add_argument("--checkpoint", help="training checkpoint; OUTPUT/vae.pt when not given")
    options = parser.parse_args()
    if options.num_steps and options.kernel.endswith("nuts"):
        parser.error(f"--num-steps has no effect on --kernel {options.kernel}; leave it out")
    return options


if __name__ == "__main__":
    cli.call(main)
