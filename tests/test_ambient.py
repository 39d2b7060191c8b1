"""What is ambient, or the form of an input, decides no number: it is left, or refused by name."""

from __future__ import annotations

import contextlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import LinearGaussianVAE
from test_defence_synthesis import PlaneOfClass
from torch import nn

from pyro_vae_defence import attacks, data, defence, metrics, training
from pyro_vae_defence.attacks import starts
from pyro_vae_defence.attacks.interop import EncoderAttackHead
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import LinearClassifier
from pyro_vae_defence.ops.balls import Linf


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _images(count=3):
    return torch.rand(count, 1, 4, 4, generator=_generator(1), dtype=torch.float32)


class Layers(nn.Module):
    """Networks, whose sums ``torch.autocast`` rounds, between distributions in float32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 6))
        self.decoder = nn.Linear(3, 16)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 3), 1.0).to_event(1))
            mean = self.decoder(z).to(z).reshape(-1, 1, 4, 4)
            pyro.sample("obs", dist.Normal(mean, 0.1).to_event(3), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x).to(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


VAE, CLASSIFIER, X = Layers(), LinearClassifier(3, 3), _images()
Z = {"z": torch.randn(3, 3, generator=_generator())}
RESULT = defence.MCMCDefence(VAE, num_samples=2, warmup_steps=1)(X, _generator())


def _undefended(vae, perturbation):
    return defence.NoDefence(vae)


def _choose():
    options = {"max_clean_cost": 1e9, "generator": _generator(), "defence": _undefended}

    def score(result):
        return CLASSIFIER(result.latents)[:, 0].detach().float()

    return defence.choose_radius(VAE, X, (0.0,), score=score, **options)[1]


ALONE = {
    "energy": lambda: program.potential(VAE, X)(Z),
    "energy before an attack": lambda: program.potential(VAE, X, Linf(0.1))(Z),
    "energy of the prior": lambda: program.potential(VAE, X).prior_energy(Z),
    "energy of the guide": lambda: program.guide_potential(VAE, X)(Z),
    "images": lambda: program.Decoder(VAE, X)(Z),
    "pixels": lambda: torch.as_tensor(
        RESULT.to_datatree(log_likelihood=VAE)["log_likelihood"]["obs"].values
    ),
    "latents": lambda: defence.read_latents(VAE, RESULT, "reencoded")["z"],
    "objective": lambda: attacks.maximum_damage(VAE, latents="mean")(X)(X.flip(0)),
    "objective of scores": lambda: attacks.cross_entropy(VAE, CLASSIFIER, torch.tensor([0, 1, 2]))(
        X
    )(X.flip(0)),
    "head": lambda: EncoderAttackHead(VAE, X, attacks.maximum_damage(VAE, latents="mean"))(
        X.flip(0)
    ),
    "filter": lambda: defence.gaussian_filter(X),
    "radius": _choose,
}


@pytest.mark.parametrize("call", ALONE.values(), ids=ALONE)
def test_what_is_called_alone_runs_without_autocast(call):
    expected = call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call()
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_classes_are_read_without_autocast():
    """Scores apart by less than bfloat16 resolves are apart."""
    classifier = LinearClassifier(3, 2)
    nn.init.zeros_(classifier.linear.weight)
    classifier.linear.bias.data = torch.tensor([1.0, 1.001])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert classifier.classify(VAE, X).tolist() == [1, 1, 1]


# --- torch's default dtype ------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _posterior(log_prior):
    read = defence.AnalysisBySynthesis(
        PlaneOfClass(), 3, log_prior=log_prior, num_temperatures=3, num_walks=2
    )
    x = torch.rand(2, 1, 2, 4, generator=_generator(1), dtype=torch.float64)
    return read.log_posterior(x, _generator())


def _stock():
    def kernel(model):
        return pyro.infer.HMC(model, num_steps=2, step_size=0.1)

    guard = defence.MCMCDefence(LinearGaussianVAE(), kernel, num_samples=2, warmup_steps=2)
    return guard(_images(1), _generator()).samples["z"]


DEFAULTS = {
    "classes' prior": lambda: _posterior([0.1, 0.2, 0.3]),
    "a stock kernel": _stock,
    "shares": lambda: metrics.correct(torch.arange(3), torch.tensor([0, 1, 1])),
}


@pytest.mark.parametrize("call", DEFAULTS.values(), ids=DEFAULTS)
def test_torchs_default_dtype_decides_nothing(call):
    expected = call()
    for dtype in (torch.float64, torch.bfloat16):
        with default_dtype(dtype):
            found = call()
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_a_list_of_log_priors_is_exact():
    log_prior = [0.1, 0.2, 0.3]
    exact = torch.tensor(log_prior, dtype=torch.float64)
    assert torch.equal(_posterior(log_prior), _posterior(exact))


# --- The form of inputs ---------------------------------------------------------------------------


def test_training_leaves_no_gradient_in_images():
    x = X.clone().requires_grad_()
    config = training.FitConfig(epochs=1, schedule="constant", progress=False)
    pyro.clear_param_store()

    class Named(Layers):
        def model(self, x):
            pyro.module("layers", self)
            super().model(x)

        def guide(self, x):
            pyro.module("layers", self)
            super().guide(x)

    training.fit(Named(), pyro.infer.Trace_ELBO(), [x], config)
    assert x.grad is None
    trained = {}
    for images in (X, X.double()):
        pyro.clear_param_store()
        vae = Named()
        torch.manual_seed(0)
        training.fit(vae, pyro.infer.Trace_ELBO(), [images], config)
        trained[images.dtype] = torch.cat([p.detach().flatten() for p in vae.parameters()])
    assert torch.equal(*trained.values())


class AsFloat64:
    """Calls that take images, of which NumPy's are float64."""

    loss = staticmethod(
        lambda x: torch.tensor(training.evaluate(VAE, pyro.infer.Trace_ELBO(), [x]))
    )
    variance = staticmethod(lambda x: program.mean_posterior_variance(VAE, [x])["z"])
    classes = staticmethod(lambda x: CLASSIFIER.classify(VAE, x))
    target = staticmethod(
        lambda x: attacks.PGD(attacks.mean_distance(VAE, x), Linf(0.1), 2)(X, _generator()).x_adv
    )


@pytest.mark.parametrize("name", ["loss", "variance", "classes", "target"])
def test_images_in_float64_come_in_the_networks_float32(name):
    found = []
    for x in (X.flip(0), X.flip(0).double()):
        torch.manual_seed(0)
        found.append(getattr(AsFloat64, name)(x))
    assert torch.equal(*found)
    assert found[0].dtype == found[1].dtype


def test_images_that_are_no_such_images_are_named():
    bytes_ = (255 * X).byte()
    attack = attacks.mean_distance(VAE)
    with pytest.raises(ValueError, match=r"images must be floating point .* torch\.uint8"):
        attacks.PGD(attack, Linf(0.1), start=starts.given(bytes_[None]))
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        starts.given(255 * X[None])
    with pytest.raises(ValueError, match=r"x must be floating point .* torch\.uint8"):
        CLASSIFIER.classify(VAE, bytes_)
    with pytest.raises(ValueError, match="x must be a tensor of images"):
        defence.clip_extreme_pixels([X], 0.1)


def test_masks_are_no_classes():
    classes = torch.tensor([0, 1, 2])
    right = classes == classes.flip(0)
    for call in (metrics.correct, metrics.adversarial_accuracy):
        with pytest.raises(ValueError, match=r"dtype torch\.bool: pass integer classes"):
            call(right, classes)
        with pytest.raises(ValueError, match=r"dtype torch\.bool: pass integer classes"):
            call(classes, right)
    with pytest.raises(ValueError, match="labels must be a vector of integer classes"):
        starts.other_class(right, X, classes)
    x_adv = (X.flip(2) + 0.1).clamp(max=1)
    detector = defence.Detector(defence.NoDefence(VAE)).fit(_images(9), 0.2, _generator())
    with pytest.raises(ValueError, match=r"labels has .* dtype torch\.bool"):
        detector.report(X.flip(2), x_adv, Linf(0.1), labels=right, classify=lambda x: x)


def test_seeds_of_data_are_generators():
    digits = data.load("mnist_subset", "test")
    for call in (
        lambda: data.stratified(digits, 20, 0),
        lambda: data.random_split(digits, (0.5, 0.5), 0),
        lambda: data.batches(digits, 20, shuffle=True, generator=0),
    ):
        with pytest.raises(ValueError, match=r"generator must be a torch\.Generator"):
            call()
