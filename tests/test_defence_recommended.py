"""What the library recommends, as an object."""

from __future__ import annotations

import functools

import pytest
import torch
from programs import LinearGaussianVAE, TutorialVAE
from pyro.infer import HMC
from torch.utils.data import DataLoader, TensorDataset

from pyro_vae_defence import data
from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.experiments.configuration import ChainConfig
from pyro_vae_defence.experiments.defences import Setting, label, make_defence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models.pretrained import load_pretrained
from pyro_vae_defence.models.program import mean_posterior_variance
from pyro_vae_defence.ops.balls import Linf

SHORT = {"num_samples": 2, "warmup_steps": 1, "num_chains": 1}


@pytest.fixture
def x():
    return torch.rand(7, 1, 28, 28)


def test_it_is_the_defence_of_its_docstring(tutorial_vae, x):
    metric = mean_posterior_variance(tutorial_vae, [x])
    kernel = functools.partial(
        BatchedHMC, step_size=0.2, num_steps=4, burn_in=30, inverse_mass_matrix=metric
    )
    by_hand = MCMCDefence(tutorial_vae, kernel, 10, 15, 4, perturbation=Linf(0.1))
    found, wanted = (
        defence(x[:2], torch.Generator().manual_seed(1))
        for defence in (MCMCDefence.recommended(tutorial_vae, Linf(0.1), x), by_hand)
    )
    assert found.samples["latent"].equal(wanted.samples["latent"])
    assert found.settings == wanted.settings
    # "About 570": 4 chains of 31 gradients and 25 trajectories of 1 to 8 steps, standard error 46.
    assert abs(float(found.num_gradients.double().mean()) - 574) < 3 * 46


def test_a_single_latent_dimension_is_sampled_too():
    """Means and variances within 5 standard errors of 400 chains: wrong once in 280,000 runs."""
    vae, images = LinearGaussianVAE(1), torch.rand(100, 1, 4, 4)
    found = MCMCDefence.recommended(vae, None, images)(images, torch.Generator().manual_seed(0))
    mean, covariance = vae.exact(images)
    moved = (found.samples["z"][:, -1] - mean) / covariance.sqrt()
    assert abs(float(moved.mean())) < 5 / 400**0.5
    assert abs(float(moved.square().mean()) - 1) < 5 * (2 / 400) ** 0.5


def test_training_images_come_in_every_form(tutorial_vae):
    images = torch.rand(600, 1, 28, 28)
    labels = torch.zeros(600)
    forms = [
        images,
        (images, labels),
        TensorDataset(images, labels),
        DataLoader(TensorDataset(images, labels), batch_size=70),
        [images[:1], images[1:]],
    ]
    wanted = mean_posterior_variance(tutorial_vae, [images])["latent"]
    for form in forms:
        defence = MCMCDefence.recommended(tutorial_vae, None, form)
        metric = defence.kernel.keywords["inverse_mass_matrix"]["latent"]
        torch.testing.assert_close(metric, wanted, msg=f"{type(form)}")
    few = data.load("mnist_subset", "test")
    assert MCMCDefence.recommended(tutorial_vae, None, few).perturbation is None


def test_what_is_given_goes_before_what_is_recommended(x):
    vae = load_pretrained("mnist_vae")  # knows its metric
    defence = MCMCDefence.recommended(vae, Linf(0.2), **SHORT, keep_draws=1)
    assert defence.kernel.keywords["inverse_mass_matrix"] is vae.mean_posterior_variance
    assert defence(x).samples["z"].shape == (1, 1, 7, 64)
    own_kernel = MCMCDefence.recommended(TutorialVAE(), None, kernel=BatchedHMC)
    assert (own_kernel.kernel, own_kernel.num_chains) == (BatchedHMC, 4)
    assert own_kernel._settings()["kernel_inverse_mass_matrix"] == "identity"
    assert defence._settings()["kernel_inverse_mass_matrix"] == "diagonal"
    own = MCMCDefence.recommended(vae, Linf(0.2), x).kernel.keywords["inverse_mass_matrix"]
    assert not own["z"].equal(vae.mean_posterior_variance["z"])


def test_a_kernel_of_ones_own_has_the_metric(tutorial_vae, x):
    short = functools.partial(BatchedHMC, num_steps=3)
    with_images = MCMCDefence.recommended(tutorial_vae, None, x, kernel=short).kernel
    metric = MCMCDefence.recommended(tutorial_vae, None, x).kernel.keywords["inverse_mass_matrix"]
    assert with_images.func is BatchedHMC
    assert with_images.keywords.keys() == {"num_steps", "inverse_mass_matrix"}
    assert with_images.keywords["inverse_mass_matrix"]["latent"].equal(metric["latent"])
    known = load_pretrained("mnist_vae")
    found = MCMCDefence.recommended(known, None, kernel=short).kernel.keywords
    assert found["inverse_mass_matrix"] is known.mean_posterior_variance
    # What has no use for training images is not given any.
    for kernel in (HMC, functools.partial(short, inverse_mass_matrix=metric)):
        with pytest.raises(ValueError, match="train_images are there for a metric, which kernel="):
            MCMCDefence.recommended(tutorial_vae, None, x, kernel=kernel)
        assert MCMCDefence.recommended(tutorial_vae, None, kernel=kernel).kernel is kernel


def test_what_it_cannot_do_without_is_named(tutorial_vae, x):
    with pytest.raises(ValueError, match="train_images is missing.* does not know its mean_poster"):
        MCMCDefence.recommended(tutorial_vae, Linf(0.1))
    with pytest.raises(ValueError, match="is empty"):
        MCMCDefence.recommended(tutorial_vae, Linf(0.1), x[:0])
    for wrong, message in (
        (255 * x, "train_images must lie in .0, 1., got values from"),
        (x.numpy(), "train_images must be a tensor of images"),
        ("folder", "train_images must be a tensor of images"),
        (torch.zeros(4), "train_images must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            MCMCDefence.recommended(tutorial_vae, Linf(0.1), wrong)
    with pytest.raises(ValueError, match=r"perturbation.*Linf\(0.1\)"):
        MCMCDefence.recommended(tutorial_vae, 0.1, x)
    with pytest.raises(ValueError, match="model"):
        MCMCDefence.recommended(object(), Linf(0.1), x)
    with pytest.raises(TypeError, match="num_sample"):
        MCMCDefence.recommended(tutorial_vae, Linf(0.1), x, num_sample=3)


def test_images_are_moved_to_the_vae():
    vae = TutorialVAE().to("meta")
    seen = []
    guide = vae.guide
    vae.guide = lambda x: seen.append(x.device.type) or guide(x)
    MCMCDefence.recommended(vae, None, torch.rand(2, 1, 28, 28))
    assert set(seen) == {"meta"}


def test_studies_know_it_by_name():
    vae = load_pretrained("mnist_vae")
    setting = Setting(vae, ChainConfig(), radius=0.1)
    found = make_defence("recommended", setting)
    assert found._settings() == MCMCDefence.recommended(vae, Linf(0.1))._settings()
    metric = {"z": torch.full((64,), 0.5)}
    other = make_defence("recommended_0.2", Setting(vae, ChainConfig(), metric, batch_size=3))
    assert other.kernel.keywords["inverse_mass_matrix"] is metric
    assert (other.perturbation.radius, other.batch_size) == (0.2, 3)
    assert label("recommended_0.2") == "MCMCDefence.recommended δ = 0.2"
