"""Controls, classifiers, detection and radii agree between devices; chains leave for ArviZ and
plots."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from devices import agree, to
from matplotlib.figure import Figure
from programs import TutorialVAE

from pyro_vae_defence import defence as defences
from pyro_vae_defence import diagnostics, plots
from pyro_vae_defence.defence import EncoderDefence, MCMCDefence, NoDefence, PosteriorModeDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models.classifier import LinearClassifier
from pyro_vae_defence.models.program import mean_posterior_variance
from pyro_vae_defence.ops.balls import Linf

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("float64")]

CHAIN = {"rtol": 1e-5, "atol": 1e-6}
HMC = functools.partial(BatchedHMC, num_steps=2)
CONTROLS = {
    "none": NoDefence,
    "encoder": functools.partial(EncoderDefence, num_samples=3),
    "dark": functools.partial(
        EncoderDefence, preprocess=functools.partial(defences.clip_dark_pixels, delta=0.1)
    ),
    "extreme": functools.partial(
        EncoderDefence, preprocess=functools.partial(defences.clip_extreme_pixels, delta=0.1)
    ),
    "median": functools.partial(EncoderDefence, preprocess=defences.median_filter),
    "gaussian": functools.partial(EncoderDefence, preprocess=defences.gaussian_filter),
    "mode": functools.partial(PosteriorModeDefence, num_steps=4),
    "aware mode": functools.partial(PosteriorModeDefence, num_steps=4, perturbation=Linf(0.1)),
}


def seeded():
    return torch.Generator().manual_seed(2)


@pytest.fixture
def vae():
    return TutorialVAE().eval()


@pytest.fixture
def x():
    return torch.rand(4, 1, 28, 28)


@pytest.mark.parametrize("name", CONTROLS)
def test_controls(device, name, vae, x):
    def run(place):
        return CONTROLS[name](to(vae, place), batch_size=3)(x.to(place), seeded())

    agree(run, device, **CHAIN)


@pytest.mark.parametrize("reading", defences.READINGS)
def test_classes_of_defended_images(device, reading, vae, x):
    classifier = LinearClassifier(5, 4)

    def run(place):
        chain = MCMCDefence(to(vae, place), HMC, 2, 1, num_chains=2)
        classify = defences.DefendedClassifier(chain, to(classifier, place), reading)
        return classify(x.to(place), seeded()), classify.predict(x.to(place), seeded())

    agree(run, device, **CHAIN)


@pytest.mark.parametrize("perturbation", [None, Linf(0.1)])
def test_detection(device, perturbation, vae, x):
    def run(place):
        chain = MCMCDefence(to(vae, place), HMC, 3, 1, num_chains=2, perturbation=perturbation)
        variance = mean_posterior_variance(to(vae, place), [x.to(place)])
        result = chain(x.to(place), seeded())
        return defences.detection_scores(chain, result, variance), variance

    agree(run, device, **CHAIN)


def test_radii(device, vae, x):
    def run(place):
        mine, images = to(vae, place), x.to(place)
        unknown = defences.calibrate_radius(mine, images, (0.0, 0.1, 0.2), num_steps=3)
        result = MCMCDefence(mine, HMC, 2, 1, perturbation=unknown)(images, seeded())
        probabilities = defences.radius_probabilities(mine, result.latents, images, unknown)
        choice = defences.choose_radius(
            mine, images, (0.05, 0.1), max_clean_cost=1.0, generator=seeded(),
            defence=functools.partial(MCMCDefence, kernel=HMC, num_samples=2, warmup_steps=1),
        )  # fmt: skip
        return unknown.penalties, probabilities, choice

    agree(run, device, **CHAIN)


def test_streams_of_batches(device, vae, x):
    def run(place):
        defence = MCMCDefence(to(vae, place), HMC, 2, 1, batch_size=3)
        return list(defence.stream([x[:2].to(place), x[2:].to(place)], seeded()))

    agree(run, device, **CHAIN)


def test_chains_go_to_arviz_and_plots(device, vae, x):
    result = MCMCDefence(to(vae, device), HMC, 8, 1, num_chains=4)(x.to(device), seeded())
    tree = result.to_datatree()
    (rhat,) = diagnostics.rhat(tree).values()
    assert np.isfinite(rhat).all()
    assert result.to_arviz() is not None
    axes = Figure().subplots(2, 3)
    plots.panel(axes[:1, :2], {"x": result.x[:1], "defended": result.reconstruction[:1]})
    draws = result.samples["latent"][:, :, 0, 0]
    plots.trace(axes[1, 0], draws)
    plots.rank(axes[1, 1], draws, bins=2)
    energy = result.sample_stats["lp"]
    plots.posterior_ratios(axes[1, 2], energy[0], energy[1])
