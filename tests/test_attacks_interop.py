"""Attack libraries that know nothing of VAEs attack them through plain modules."""

from __future__ import annotations

import warnings

import pytest
import torch
from programs import BatchNormVAE, LinearGaussianVAE
from torch.nn import functional as F

from pyro_vae_defence import attacks
from pyro_vae_defence.attacks.interop import EncoderAttackHead, LatentClassifier
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import LinearClassifier
from pyro_vae_defence.models.pretrained import load_pretrained
from pyro_vae_defence.ops.balls import Linf


def optional(name):
    """A library that may be missing; some warn about other libraries when they are imported."""
    with warnings.catch_warnings():
        # foolbox 3.3.4 imports scipy.ndimage.filters, a name that scipy has deprecated.
        warnings.filterwarnings("ignore", "Please import", DeprecationWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="art")
        return pytest.importorskip(name)


@pytest.fixture
def classifier():
    return LinearClassifier(3, 5)


def images(num=6):
    return torch.rand(num, 1, 4, 4, generator=torch.Generator().manual_seed(3))


def test_undefended_scores_are_the_classifiers(classifier):
    vae, x = LinearGaussianVAE(), images()
    scores = LatentClassifier(vae, classifier)(x)
    assert torch.equal(scores, classifier(program.posterior_mean(vae, x)))
    torch.manual_seed(1)
    sampled = LatentClassifier(vae, classifier, latents="sample")(x)
    torch.manual_seed(1)
    assert torch.equal(sampled, classifier(program.encode(vae, x)))


def test_defended_scores_with_the_gradient_of_the_surrogate(classifier):
    classifier = classifier.double()
    vae, x = LinearGaussianVAE(), images().double().requires_grad_()

    def defended(x):
        assert not x.requires_grad
        return {"z": 2.0 * program.posterior_mean(vae, x)["z"].round(decimals=1) + 1.0}

    def gradient(scores):
        return torch.autograd.grad(F.cross_entropy(scores, torch.zeros(6).long()), x)[0]

    scores = LatentClassifier(vae, classifier, defended=defended)(x)
    assert torch.equal(scores, classifier(defended(x.detach())))
    # By hand: the gradient of the loss at the defended latents, through the guide's mean.
    latents = defended(x.detach())["z"].requires_grad_()
    (upstream,) = torch.autograd.grad(
        F.cross_entropy(classifier(latents), torch.zeros(6).long()), latents
    )
    mean = program.posterior_mean(vae, x)["z"]
    (expected,) = torch.autograd.grad(mean, x, upstream)
    assert torch.allclose(gradient(scores), expected)
    # Another surrogate, here three times as steep.
    scores = LatentClassifier(
        vae,
        classifier,
        defended=defended,
        surrogate=lambda x: {"z": 3.0 * program.posterior_mean(vae, x)["z"]},
    )(x)
    assert torch.equal(scores, classifier(defended(x.detach())))
    assert torch.allclose(gradient(scores), 3.0 * expected)


def test_encoder_head_rises_with_the_symmetric_kl():
    vae, x_ref = LinearGaussianVAE(), images().double()
    x = (x_ref + 0.1 * torch.randn(x_ref.shape)).clamp(0, 1).requires_grad_()
    value = attacks.symmetric_kl(vae)(x_ref)(x)
    scores = EncoderAttackHead(vae, x_ref)(x)
    assert torch.equal(scores[:, 1], value)
    assert torch.equal(scores[:, 0], torch.zeros(6))
    loss = F.cross_entropy(scores, torch.zeros(6).long(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    (own,) = torch.autograd.grad(value.sum(), x)
    assert torch.equal(gradient.sign(), own.sign())


def test_modules_keep_their_modes():
    vae, classifier = BatchNormVAE().train(), LinearClassifier(64, 3)
    model = LatentClassifier(vae, classifier)
    assert not model.training
    model(torch.rand(2, 1, 28, 28))
    assert vae.training
    assert vae.norm.num_batches_tracked == 0
    assert len(list(model.parameters())) == len(list(vae.parameters())) + 2


def test_wrappers_stay_on_the_device_of_the_images():
    vae, x = LinearGaussianVAE(), torch.empty(4, 1, 4, 4, device="meta")
    classifier = LinearClassifier(3, 5).to("meta")
    model = LatentClassifier(vae, classifier, defended=lambda x: program.posterior_mean(vae, x))
    assert model(x).shape == (4, 5)
    assert model(x).device.type == "meta"
    head = EncoderAttackHead(vae, x, lambda x_ref: lambda x: x.flatten(1).sum(1))
    assert head(x).device.type == "meta"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v, c: LatentClassifier(object(), c), "no callable attribute 'model'"),
        (lambda v, c: LatentClassifier(v, None), "classifier must map latents to scores, got None"),
        (lambda v, c: LatentClassifier(v, c, latents="mode"), "latents must be 'sample' or 'mean'"),
        (lambda v, c: LatentClassifier(v, c, defended=3), "defended must map images to latents"),
        (lambda v, c: LatentClassifier(v, c, surrogate=v.guide), "give defended too"),
        (
            lambda v, c: LatentClassifier(v, c, defended=lambda x: {"y": x})(images()),
            "must have the same latent sites",
        ),
        (lambda v, c: EncoderAttackHead(v, 2 * images()), "x_ref must lie in"),
        (lambda v, c: EncoderAttackHead(v, images())(images(2)), "attack all of them in one batch"),
    ],
)
def test_bad_arguments(make, message, classifier):
    with pytest.raises(ValueError, match=message):
        make(LinearGaussianVAE(), classifier)


# --- The libraries --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mnist():
    from pyro_vae_defence import data

    return load_pretrained("mnist_vae"), data.load("mnist_subset", "test").images(slice(0, 8))


def foolbox_attack(model, x, labels, radius, steps):
    foolbox = optional("foolbox")
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(steps=steps)
    return attack(wrapped, x, labels, epsilons=radius)[1]


def torchattacks_attack(model, x, labels, radius, steps):
    torchattacks = optional("torchattacks")
    return torchattacks.PGD(model, eps=radius, alpha=radius / 4, steps=steps)(x, labels)


def art_attack(model, x, labels, radius, steps):
    optional("art.estimators.classification")
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classes = int(model(x).shape[1])
    wrapped = PyTorchClassifier(
        model,
        torch.nn.CrossEntropyLoss(),
        tuple(x.shape[1:]),
        classes,
        clip_values=(0, 1),
        device_type="cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        wrapped, eps=radius, eps_step=radius / 4, max_iter=steps, num_random_init=1,
        batch_size=len(x), verbose=False,
    )  # fmt: skip
    return torch.as_tensor(attack.generate(x.numpy(), labels.numpy()))


LIBRARIES = [foolbox_attack, torchattacks_attack, art_attack]


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_change_classes(library, mnist):
    vae, x = mnist
    from pyro_vae_defence.models.classifier import load_classifier

    classifier, _ = load_classifier("mnist_vae_classifier")
    labels = classifier.classify(vae, x)
    x_adv = library(LatentClassifier(vae, classifier), x, labels, 0.2, 10)
    assert (x_adv - x).abs().max() <= 0.2 + 1e-6
    assert (classifier.classify(vae, x_adv) != labels).double().mean() > 0.5


@pytest.mark.parametrize("library", LIBRARIES)
def test_ours_reaches_at_least_their_objective(library, mnist):
    vae, x = mnist
    prepared, steps = attacks.symmetric_kl(vae), 30
    x_adv = library(EncoderAttackHead(vae, x), x, torch.zeros(len(x)).long(), 0.1, steps)
    theirs = prepared(x)(x_adv).detach()
    random = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    assert (theirs > prepared(x)(random)).double().mean() > 0.5
    ours = attacks.APGD(prepared, Linf(0.1), num_steps=steps)(x).objective[0]
    assert ours.mean() >= theirs.mean()
