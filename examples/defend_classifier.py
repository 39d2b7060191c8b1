"""Attack a classifier of latents through its VAE's encoder, defend it, and raise the alarm.

The packaged VAE and linear classifier read the packaged part of MNIST. An encoder attack moves the
latents of every image as far as it can; the table shows the classes that are still right, without a
defence, behind the best control (a clip of dark pixels), and behind chains that sample the paper's
posterior and the perturbation-aware one. The last lines say how well the chains tell attacked
images from clean ones.

    python examples/defend_classifier.py --radius 0.2
"""

from __future__ import annotations

import functools

import command_line as cli
import pyro

from pyro_vae_defence import attacks, data, metrics
from pyro_vae_defence.defence import (
    DefendedClassifier,
    Detector,
    EncoderDefence,
    MCMCDefence,
    clip_dark_pixels,
)
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models.classifier import load_classifier
from pyro_vae_defence.models.pretrained import load_pretrained
from pyro_vae_defence.ops.balls import Linf


def main():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--radius", type=cli.radius, default=0.2, help="of the attack, L_inf")
    parser.add_argument("--delta", type=cli.radius, default=0.2, help="radius the defender assumes")
    parser.add_argument("--num-images", type=cli.count, default=100, help="to attack")
    parser.add_argument("--num-samples", type=cli.count, default=10, help="draws per chain")
    parser.add_argument("--warmup-steps", type=cli.unsigned, default=15, help="before them")
    options = parser.parse_args()
    pyro.set_rng_seed(options.seed)
    attack_ball, assumed = Linf(options.radius), Linf(options.delta)
    vae = load_pretrained("mnist_vae")
    classifier, _ = load_classifier("mnist_vae_classifier")
    test = data.load("mnist_subset", "test")
    chosen = data.stratified(test, options.num_images)
    x, labels = test.images(chosen), test.labels[chosen]
    x_adv = attacks.PGD(attacks.symmetric_kl(vae), attack_ball)(x).best()
    inputs = {"clean": x, "attacked": x_adv, "noise": attacks.random_noise(x, attack_ball)}

    # The metric is a property of the training set, which an attacker cannot move.
    kernel = functools.partial(
        BatchedHMC, step_size=0.5, inverse_mass_matrix=vae.mean_posterior_variance
    )
    chains = functools.partial(
        MCMCDefence, vae, kernel, options.num_samples, options.warmup_steps, num_chains=2
    )
    aware = chains(perturbation=assumed)
    clip = functools.partial(clip_dark_pixels, delta=options.delta)
    defences = {
        "no defence": DefendedClassifier(EncoderDefence(vae), classifier, "mean"),
        "dark-pixel clipping": DefendedClassifier(EncoderDefence(vae, preprocess=clip), classifier),
        "paper's posterior": DefendedClassifier(chains(), classifier),
        f"delta {options.delta:g}": DefendedClassifier(aware, classifier),
    }
    print(f"correct classes of {len(x)} images, radius {options.radius:g}, 95% intervals")
    print(f"{'':20s}" + "".join(f"{kind:24s}" for kind in inputs))
    for name, classify in defences.items():
        found = [correct(classify, images, labels) for images in inputs.values()]
        print(f"{name:20s}" + "".join(f"{text:24s}" for text in found))

    calibration = data.load("mnist_subset", "validation").images(slice(options.num_images))
    detector = Detector(aware).fit(calibration, false_alarm=0.1)
    print(f"\n{detector.report(x, x_adv, attack_ball)}")


def correct(classify, x, labels):
    return f"{metrics.bootstrap_interval(metrics.correct(classify.predict(x), labels)):.3f}"


if __name__ == "__main__":
    cli.call(main)
