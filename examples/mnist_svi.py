"""Train a VAE by SVI on real digits, attack it, defend it with MCMC, and look at the chains.

    python examples/mnist_svi.py
    python examples/mnist_svi.py --kernel nuts --radius 0.1
    python examples/mnist_svi.py --dataset mnist --data-root DIR --epochs 12

Writes to --output: vae.pt (training checkpoint, resumed when it exists), results.json, panel_*.png,
chains_*.png and chains_*.nc, one of each kind per radius. Whatever is finished when the run is
interrupted stays.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.infer
import torch

from pyro_vae_defence import attacks, data, diagnostics, metrics, plots
from pyro_vae_defence.defence import MCMCDefence, NoDefence
from pyro_vae_defence.experiments.provenance import provenance
from pyro_vae_defence.mcmc import BatchedHMC, BatchedNUTS
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.files import write_atomically
from pyro_vae_defence.training import FitConfig, NonFiniteLossError, fit

DATASETS = ("mnist_subset", "fashion_mnist_subset", "mnist", "fashion_mnist", "color_mnist")
KERNELS = ("hmc", "nuts", "pyro-hmc", "pyro-nuts")
# Initial step size and number of leapfrog steps. The batched kernels run in the metric of the
# training set's mean posterior variance, hence on a scale of order one; stock Pyro kernels start
# from the identity.
DEFAULT_STEP = {"hmc": (0.5, 4), "nuts": (0.5, 4), "pyro-hmc": (0.1, 10), "pyro-nuts": (0.1, 10)}


def main() -> int:
    options = parse_arguments()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    train_set = data.load(options.dataset, "train", options.data_root, options.download)
    test_set = data.load(options.dataset, "test", options.data_root, options.download)
    print(f"{train_set}, {test_set}")

    vae, nelbo = train(options, train_set, output)
    metric = program.mean_posterior_variance(
        vae, (x.to(options.device) for x, _ in data.batches(train_set, 500))
    )
    chosen = data.stratified(test_set, options.num_references)
    x_ref = test_set.images(chosen).to(options.device)

    results = {
        "options": {k: v for k, v in vars(options).items() if k != "output"},
        "metric": metrics.metric_name("ms_ssim", "paper"),
        "validation_nelbo": nelbo,
        "provenance": provenance(),
        "radii": {},
    }
    for radius in options.radius:
        print(
            f"\nradius {radius:g}: attacking {len(x_ref)} images x {options.num_restarts} restarts"
        )
        entry = attack_and_defend(options, vae, metric, x_ref, radius, output)
        results["radii"][f"{radius:g}"] = entry
        write_atomically(output / "results.json", json.dumps(results, indent=2).encode())
    print_table(results)
    print(f"\nfiles in {output}/: results.json, panel_*.png, chains_*.png, chains_*.nc, vae.pt")
    return 0


def train(options, train_set, output):
    """The paper's VAE, trained by SVI with a one-cycle schedule."""
    vae = ConvVAE(train_set.image_shape[0]).to(options.device)
    validation_set = data.load(options.dataset, "validation", options.data_root, options.download)
    loader = OnDevice(data.batches(train_set, 64, shuffle=True, drop_last=True), options.device)
    # The programs know their beta; the objective stays Pyro's own.
    weighted = Weighted(vae, options.beta)
    result = fit(
        weighted,
        pyro.infer.TraceMeanField_ELBO(),
        loader,
        FitConfig(
            epochs=options.epochs,
            learning_rate=1e-3,
            schedule="one_cycle",
            name=f"{options.dataset} beta={options.beta:g} seed={options.seed}",
        ),
        validation=OnDevice(data.batches(validation_set, 500), options.device),
        checkpoint=options.checkpoint or output / "vae.pt",
    )
    vae.eval()
    last = result.history[-1]
    print(
        f"trained for {len(result.history)} epochs in "
        f"{sum(h['seconds'] for h in result.history):.0f} s: "
        f"validation -ELBO {last['validation_nelbo']:.1f} nats"
    )
    return vae, last["validation_nelbo"]


def attack_and_defend(options, vae, metric, x_ref, radius, output):
    """Everything at one radius; returns what goes into results.json."""
    attack = attacks.PGD(
        attacks.symmetric_kl(vae), Linf(radius), num_restarts=options.num_restarts, preset="paper"
    )
    attacked = attack(x_ref)
    x_adv = attacked.x_adv.flatten(0, 1)
    references = x_ref.repeat(options.num_restarts, 1, 1, 1)
    image = torch.arange(len(x_ref)).repeat(options.num_restarts)

    undefended = NoDefence(vae)
    before = undefended(references)
    again = undefended(references)
    broken = undefended(x_adv)
    defence = MCMCDefence(
        vae,
        make_kernel(options, metric),
        num_samples=options.num_samples,
        warmup_steps=options.warmup_steps,
        num_chains=options.num_chains,
        progress=True,
    )
    defended = defence(x_adv)
    tree = defended.to_datatree()

    def similarity(reconstruction):
        return metrics.ms_ssim(before.reconstruction, reconstruction, variant="paper")

    broken_similarity = similarity(broken.reconstruction)
    defended_similarity = similarity(defended.reconstruction)

    energy = program.potential(vae, references)
    with torch.no_grad():
        ratio_before = metrics.log_posterior_ratio(energy, before.latents, broken.latents)
        ratio_after = metrics.log_posterior_ratio(energy, before.latents, defended.latents)
    rhat = np.concatenate([v.ravel() for v in diagnostics.rhat(tree).values()])
    ess = np.concatenate([v.ravel() for v in diagnostics.ess(tree).values()])
    stats = defended.sample_stats
    entry = {
        "undefended": interval(broken_similarity, image),
        "defended": interval(defended_similarity, image),
        "difference": interval(defended_similarity - broken_similarity, image),
        "noise_floor": interval(similarity(again.reconstruction), image),
        "log_posterior_ratio_undefended": interval(ratio_before, image, "median"),
        "log_posterior_ratio_defended": interval(ratio_after, image, "median"),
        "symmetric_kl": float(attacked.objective.mean()),
        "acceptance_rate": float(stats["acceptance_rate"].mean()),
        "divergences": int(stats["diverging"].sum()),
        "rhat_median": finite(np.nanmedian(rhat)),
        "rhat_95": finite(np.nanquantile(rhat, 0.95)),
        "ess_median": finite(np.nanmedian(ess)),
        "draws": options.num_chains * options.num_samples,
        "gradients_per_image": float(defended.num_gradients.float().mean()),
        "seconds_per_image": defended.seconds / len(x_adv),
    }
    save_pictures(
        output, radius, tree, ratio_before, ratio_after,
        {
            "reference": references,
            "its\nreconstruction": before.reconstruction,
            f"adversarial\nradius {radius:g}": x_adv,
            "its\nreconstruction ": broken.reconstruction,
            "after\nMCMC": defended.reconstruction,
        },
    )  # fmt: skip
    save_chains(defended.to_arviz(), output / f"chains_{radius:g}.nc")
    return entry


def make_kernel(options, metric):
    step_size, num_steps = DEFAULT_STEP[options.kernel]
    step_size = step_size if options.step_size is None else options.step_size
    num_steps = num_steps if options.num_steps is None else options.num_steps
    if options.kernel == "hmc":
        return functools.partial(
            BatchedHMC, step_size=step_size, num_steps=num_steps, inverse_mass_matrix=metric
        )
    if options.kernel == "nuts":
        # A batch costs its largest tree; in this metric few trees would grow beyond 31 leaves.
        return functools.partial(
            BatchedNUTS, step_size=step_size, max_tree_depth=5, inverse_mass_matrix=metric
        )
    if options.kernel == "pyro-hmc":
        return functools.partial(pyro.infer.HMC, step_size=step_size, num_steps=num_steps)
    return functools.partial(pyro.infer.NUTS, step_size=step_size)


class Weighted(torch.nn.Module):
    """A ConvVAE whose programs run at a given beta."""

    def __init__(self, vae, beta):
        super().__init__()
        self.vae, self.beta = vae, beta

    def model(self, x):
        # Training weighs the KL term; validation is the plain ELBO.
        return self.vae.model(x, self.beta if self.training else 1.0)

    def guide(self, x):
        return self.vae.guide(x, self.beta if self.training else 1.0)


class OnDevice:
    """A loader whose images move to a device."""

    def __init__(self, loader, device):
        self.loader, self.device = loader, device

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return (x.to(self.device) for x, _ in self.loader)


def interval(values, groups, statistic="mean"):
    """Estimate and 95% bootstrap interval over reference images, as a dict."""
    result = metrics.bootstrap_interval(values.cpu(), groups, statistic=statistic)
    return {"estimate": result.estimate, "low": result.low, "high": result.high}


def finite(value):
    return float(value) if math.isfinite(value) else None


def save_chains(chains, path):
    temporary = path.with_suffix(".tmp")
    chains.to_netcdf(str(temporary))
    temporary.replace(path)


def save_pictures(output, radius, tree, ratio_before, ratio_after, columns):
    rows = min(5, len(columns["reference"]))
    size = (1.4 * len(columns), 0.4 + 1.4 * rows)
    figure, axes = plt.subplots(rows, len(columns), figsize=size, squeeze=False)
    plots.panel(axes, columns)
    figure.tight_layout()
    figure.savefig(output / f"panel_{radius:g}.png", dpi=110)
    plt.close(figure)

    figure, axes = plt.subplots(2, 2, figsize=(9, 6))
    lp = tree["sample_stats"]["lp"].values
    site, values = next(iter((k, v.values) for k, v in tree["posterior"].data_vars.items()))
    plots.trace(axes[0, 0], lp[:, :, 0], "log p(x, z) of the first image (nats)")
    axes[0, 0].legend(fontsize=7)
    plots.rank(axes[0, 1], lp[:, :, 0], "log p(x, z) of the first image")
    plots.trace(axes[1, 0], values[:, :, 0].reshape(*lp.shape[:2], -1)[..., 0], f"{site}[0]")
    plots.posterior_ratios(axes[1, 1], ratio_before, ratio_after)
    figure.tight_layout()
    figure.savefig(output / f"chains_{radius:g}.png", dpi=110)
    plt.close(figure)


def print_table(results):
    def cell(entry, digits=2):
        return f"{entry['estimate']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"

    rows = [
        (f"{results['metric']}, undefended", lambda e: cell(e["undefended"])),
        (f"{results['metric']}, defended", lambda e: cell(e["defended"])),
        ("  defended minus undefended, paired", lambda e: cell(e["difference"])),
        (f"{results['metric']}, noise floor", lambda e: cell(e["noise_floor"])),
        ("median log posterior ratio, undefended (nats)",
         lambda e: cell(e["log_posterior_ratio_undefended"], 1)),
        ("median log posterior ratio, defended (nats)",
         lambda e: cell(e["log_posterior_ratio_defended"], 1)),
        ("acceptance rate", lambda e: f"{e['acceptance_rate']:.2f}"),
        ("divergences", lambda e: str(e["divergences"])),
        ("R-hat, median and 95% "
         "quantile", lambda e: f"{show(e['rhat_median'])}, {show(e['rhat_95'])}"),
        ("bulk ESS of all draws, median", lambda e: f"{show(e['ess_median'], 0)} of {e['draws']}"),
        ("gradients per image", lambda e: f"{e['gradients_per_image']:.0f}"),
        ("seconds per image", lambda e: f"{e['seconds_per_image']:.3f}"),
    ]  # fmt: skip
    width = max(len(label) for label, _ in rows)
    print("\n" + " " * width + "".join(f"  {'radius ' + r:>22}" for r in results["radii"]))
    for label, show_entry in rows:
        values = (show_entry(entry) for entry in results["radii"].values())
        print(f"{label:<{width}}" + "".join(f"  {value:>22}" for value in values))
    print("intervals: 95% bootstrap over reference images")


def show(value, digits=2):
    return "n/a" if value is None else f"{value:.{digits}f}"


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    positive, unsigned = at_least(1), at_least(0)
    parser.add_argument("--kernel", choices=KERNELS, default="hmc")
    parser.add_argument("--dataset", choices=DATASETS, default="mnist_subset")
    parser.add_argument("--data-root", help="directory of full datasets")
    parser.add_argument("--download", action="store_true", help="fetch a missing dataset")
    parser.add_argument("--epochs", type=positive, default=30)
    parser.add_argument("--beta", type=positive_float, default=1.0, help="weight of the KL term")
    parser.add_argument("--radius", type=radius, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--num-references", type=positive, default=50)
    parser.add_argument("--num-restarts", type=positive, default=2)
    parser.add_argument("--num-chains", type=positive, default=4)
    parser.add_argument("--num-samples", type=positive, default=30)
    parser.add_argument("--warmup-steps", type=unsigned, default=30)
    parser.add_argument("--step-size", type=positive_float, help="initial step size")
    parser.add_argument("--num-steps", type=positive, help="leapfrog steps of HMC")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/mnist_svi")
    parser.add_argument("--checkpoint", help="training checkpoint; OUTPUT/vae.pt when not given")
    return parser.parse_args()


def at_least(smallest):
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {smallest}, got {text}"
            )
        return value

    return parse


def positive_float(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def radius(text):
    value = positive_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, the image range, got {text}")
    return value


def device(text):
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"no device {text}: {str(error).splitlines()[0]}"
        ) from error
    return text


if __name__ == "__main__":
    started = time.perf_counter()
    try:
        code = main()
    except (ValueError, OSError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\ninterrupted; finished work is in the output directory", file=sys.stderr)
        code = 130
    else:
        print(f"{time.perf_counter() - started:.0f} s in all")
    sys.exit(code)
