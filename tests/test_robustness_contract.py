"""Defences and classifiers of one's own that no figure could be believed of, and those it can."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_robustness import SMALL, problem, run

from pyro_vae_defence.attacks import adaptive
from pyro_vae_defence.defence import DefendedClassifier, EncoderDefence, MCMCDefence, NoDefence
from pyro_vae_defence.defence.base import run_defence
from pyro_vae_defence.robustness import WhiteBox
from pyro_vae_defence.robustness.contract import _is_own

VAE, X, LABELS = problem(6)


def scores(latents):
    return 5.0 * torch.stack([latents[:, 0], -latents[:, 0]], 1)


def filtering(preprocess):
    return EncoderDefence(VAE, 1, preprocess)


def wrapped(change):
    """No defence, whose result is changed."""
    plain = NoDefence(VAE)
    defence = lambda x, generator=None: change(plain(x, generator))  # noqa: E731
    defence.vae = VAE
    return defence


def of_latents(change):
    return wrapped(
        lambda result: dataclasses.replace(
            result, latents={name: change(value) for name, value in result.latents.items()}
        )
    )


def evaluate(defence, **options):
    options = {"attacks": ("transfer",), "checks": False, **options}
    return run(VAE, defence, X, LABELS, SMALL, **options)


BATCH = "answers an image otherwise if other images of its batch change"
WRONG = {
    "centred by the batch": (lambda: filtering(lambda x: (x - x.mean(0) + 0.5).clamp(0, 1)), BATCH),
    "sorted": (lambda: filtering(lambda x: x[x.flatten(1).mean(1).argsort()]), BATCH),
    "rows in another order": (lambda: of_latents(lambda z: z.flip(0)), BATCH),
    "fewer rows": (lambda: of_latents(lambda z: z[:1]), r"one row per image: of 6 .* 1 of latents"),
    "no answer": (
        lambda: of_latents(lambda z: torch.where(z[:, :1] > 0, torch.nan, z)),
        "latents.* of the defence is not finite for .* answer every image",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_defences_without_a_figure_per_image_are_refused(name):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        evaluate(make())


def test_classifiers_without_a_figure_per_image_are_refused():
    with pytest.raises(ValueError, match="classifier " + BATCH):
        evaluate(NoDefence(VAE), classifier=lambda z: scores(z) - scores(z).mean(0))


def test_what_is_scored_is_what_is_attacked():
    """Attackers follow latents: a reconstruction or draws of another origin were never attacked."""

    def other(result):
        return dataclasses.replace(result, reconstruction=0.5 * result.reconstruction)

    def draws(result):
        return dataclasses.replace(result, samples={"z": -result.samples["z"]})

    with pytest.raises(ValueError, match="reconstruction that is not that of its latents"):
        run(VAE, wrapped(other), X, None, SMALL, classifier=None, checks=False,
            similarity=lambda a, b: 1 - (a - b).abs().flatten(1).mean(1))  # fmt: skip
    defence = wrapped(draws)
    with pytest.raises(ValueError, match=r"samples\['z'\].*reading='mean'"):
        evaluate(defence, classifier=DefendedClassifier(defence, scores, "mean"))
    for fine in (wrapped(other), wrapped(draws)):  # nobody reads them
        assert not any("answers" in reason for reason in evaluate(fine).reasons)


def numpys_noise(z):
    return torch.from_numpy(np.random.default_rng().normal(size=z.shape)).to(z)


def noise_of_its_own(x):
    return (x + 0.1 * numpys_noise(x)).clamp(0, 1)


def test_noise_that_no_seed_governs_is_said_and_is_no_known_seed():
    reasons = evaluate(filtering(noise_of_its_own)).reasons
    assert any("the defence answers" in reason and "next time" in reason for reason in reasons)
    with pytest.raises(ValueError, match="defence_seed=3 .* by the defence.*leave defence_seed"):
        evaluate(filtering(noise_of_its_own), defence_seed=3)


def test_what_a_defence_keeps_of_its_images_is_said():
    calls = [0]

    def tiring(x):
        calls[0] += 1
        return x if calls[0] < 6 else 1 - x

    reasons = evaluate(filtering(tiring)).reasons
    assert any("the defence answers" in reason and "after the attacks" in reason
               for reason in reasons)  # fmt: skip


def noisy(x, generator=None):
    return NoDefence(VAE)((x + 0.1 * torch.randn_like(x)).clamp(0, 1), generator)


HONEST = {
    "half precision": lambda: filtering(lambda x: x.bfloat16().to(x)),
    "noise of torch's": lambda: filtering(lambda x: (x + 0.1 * torch.randn_like(x)).clamp(0, 1)),
    "a function with noise": lambda: noisy,
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_ones_pass(name):
    """With a known seed, which all that is random has to follow."""
    report = evaluate(HONEST[name](), defence_seed=3)
    others = [reason for reason in report.reasons if "did not run" not in reason]
    assert others[0] == "no sanity check ran"
    assert not any("answers" in reason for reason in others)


def test_defences_of_this_package_are_not_tried():
    assert not _is_own(NoDefence(VAE))
    assert not _is_own(EncoderDefence(VAE))
    assert not _is_own(MCMCDefence.paper(VAE))
    assert _is_own(filtering(lambda x: x))


def rounding(x):
    return x.mul_(5).round_().div_(5)


def test_images_are_not_changed_in_place():
    """References became those that the defence had made of them, and attacks what it answered."""
    x = X.clone()

    def defence(x, generator=None):
        return NoDefence(VAE)(rounding(x), generator)

    run_defence(defence, x, torch.Generator().manual_seed(0))
    box = WhiteBox(VAE, filtering(rounding), x)
    leaf = x.clone().requires_grad_()
    for images in (x, leaf):
        expected = (5 * images.detach()).round() / 5
        torch.testing.assert_close(box.look(images).detach(), expected)
    assert torch.equal(x, X)
    assert torch.equal(leaf.detach(), X)


def test_a_similarity_may_change_what_it_is_given():
    """The mean of draws, and the reference that all draws are compared with, were what it left."""

    def kept(one, other):
        return 1 - (one - other).abs().flatten(1).mean(1)

    def changed(one, other):
        return 1 - other.sub_(one).abs_().flatten(1).mean(1) + 0 * one.zero_().flatten(1).sum(1)

    options = {"attacks": ("transfer", "encoder"), "classifier": None, "checks": False}
    found, expected = (
        run(VAE, NoDefence(VAE), X, None, SMALL, similarity=similarity, **options)
        for similarity in (changed, kept)
    )
    assert found.robust == expected.robust
    assert torch.equal(found.x_adv, expected.x_adv)


def test_torchs_noise_in_a_function_follows_the_generator():
    first, again, other = (
        run_defence(noisy, X, torch.Generator().manual_seed(seed)).latents["z"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_torchs_noise_differs_from_run_to_run_where_the_generator_is_not_used():
    """Five draws of a figure were the same one."""

    def ignoring(x, generator=None):
        return NoDefence(VAE)((x + 0.1 * torch.randn_like(x)).clamp(0, 1))

    generator = torch.Generator().manual_seed(0)
    draws = [run_defence(ignoring, X, generator).latents["z"] for _ in range(2)]
    assert not torch.equal(*draws)
    # One that is used moves on by itself.
    expected = torch.Generator().manual_seed(0)
    first = NoDefence(VAE)(X, expected).latents["z"]
    generator.manual_seed(0)
    assert torch.equal(run_defence(NoDefence(VAE), X, generator).latents["z"], first)
    assert torch.equal(generator.get_state(), expected.get_state())


@pytest.mark.parametrize(("noise", "said"), [(torch.randn_like, False), (numpys_noise, True)])
def test_classifiers_may_draw_from_torchs_generator_and_from_no_other(noise, said):
    reasons = evaluate(NoDefence(VAE), classifier=lambda z: scores(z + 0.1 * noise(z))).reasons
    assert any("the classifier answers" in reason for reason in reasons) == said


def test_no_answer_is_an_error():
    """NaN was the least of all objectives, so that attackers kept away from it."""
    latents = {"z": torch.tensor([[0.5], [torch.nan]])}
    goal = adaptive.misclassification(lambda z, x: scores(z["z"]), torch.tensor([0, 0]))
    assert goal(torch.zeros(2, 1, 4, 4))(latents, torch.zeros(2, 1, 4, 4)).tolist() == [
        -5.0,
        torch.inf,
    ]
