"""Foolbox, torchattacks and the Adversarial Robustness Toolbox attack a VAE.

Two attacks with each library that is installed: on a classifier of the VAE's latents, and on its
encoder. The libraries see plain modules that map images to scores; nothing in them knows of VAEs.

    pip install pyro-vae-defence[attacks]
    python examples/third_party_attacks.py
"""

from __future__ import annotations

import importlib.util

import command_line as cli
import pyro
import torch

from pyro_vae_defence import attacks, data
from pyro_vae_defence.attacks.interop import EncoderAttackHead, LatentClassifier
from pyro_vae_defence.models.classifier import load_classifier
from pyro_vae_defence.models.pretrained import load_pretrained
from pyro_vae_defence.ops.balls import Linf


def with_foolbox(model, x, labels, radius, steps):
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    return foolbox.attacks.LinfPGD(steps=steps)(wrapped, x, labels, epsilons=radius)[1]


def with_torchattacks(model, x, labels, radius, steps):
    import torchattacks

    return torchattacks.PGD(model, eps=radius, alpha=radius / 4, steps=steps)(x, labels)


def with_art(model, x, labels, radius, steps):
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    wrapped = PyTorchClassifier(
        model,
        torch.nn.CrossEntropyLoss(),
        tuple(x.shape[1:]),
        model(x).shape[1],
        clip_values=(0, 1),
        device_type="cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        wrapped,
        eps=radius,
        eps_step=radius / 4,
        max_iter=steps,
        num_random_init=1,
        batch_size=len(x),
        verbose=False,
    )
    return torch.as_tensor(attack.generate(x.numpy(), labels.numpy()))


LIBRARIES = {"foolbox": with_foolbox, "torchattacks": with_torchattacks, "art": with_art}


def main():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--radius", type=cli.radius, default=0.1, help="of the attacks, L_inf")
    parser.add_argument("--steps", type=cli.count, default=50, help="of each attack")
    parser.add_argument("--num-images", type=cli.count, default=20, help="to attack")
    options = parser.parse_args()
    pyro.set_rng_seed(options.seed)  # NumPy, too, from which ART draws

    vae = load_pretrained("mnist_vae")
    classifier, _ = load_classifier("mnist_vae_classifier")
    test = data.load("mnist_subset", "test")
    x = test.images(data.stratified(test, options.num_images))
    predicted = classifier.classify(vae, x)
    symmetric_kl = attacks.symmetric_kl(vae)
    divergence = symmetric_kl(x)

    ours = attacks.APGD(symmetric_kl, Linf(options.radius), num_steps=options.steps)(x)
    print(f"{'this library':15} symmetric KL {ours.objective.mean():8.1f} nats")
    for name, attack in LIBRARIES.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name:15} not installed")
            continue
        model = LatentClassifier(vae, classifier)
        x_adv = attack(model, x, predicted, options.radius, options.steps)
        changed = (classifier.classify(vae, x_adv) != predicted).double().mean()
        # Label 0 is the reference's side of the two scores.
        head = EncoderAttackHead(vae, x)
        zeros = torch.zeros(len(x), dtype=torch.long)
        x_adv = attack(head, x, zeros, options.radius, options.steps)
        with torch.no_grad():
            reached = divergence(x_adv).mean()
        print(f"{name:15} symmetric KL {reached:8.1f} nats, classes changed {changed:.0%}")


if __name__ == "__main__":
    cli.call(main)
