"""An evaluation that is stopped goes on where it was, and finds what it would have found."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from programs import LinearGaussianVAE

from pyro_vae_defence.attacks import random_noise
from pyro_vae_defence.defence import MCMCDefence, NoDefence
from pyro_vae_defence.defence.store import fingerprint
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.ops.locks import sole_writer
from pyro_vae_defence.robustness import Budget, evaluate_robustness
from pyro_vae_defence.robustness import steps as module
from pyro_vae_defence.robustness.evaluate import _own

BUDGET = Budget(
    num_steps=2, num_restarts=1, num_draws=(1, 2), stable=0.0, num_chains=4, num_iterations=2,
    num_directions=1, black_box_steps=1, selection_draws=1, scoring_draws=2, check_images=4,
    check_steps=4, check_draws=2,
)  # fmt: skip

ATTACKS = ("transfer", "bpda")


def classify(latents):
    return torch.stack([latents[:, 0], -latents[:, 0]], 1)


@pytest.fixture
def vae(float64):
    return LinearGaussianVAE()


@pytest.fixture
def evaluate(vae):
    x = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    defence = MCMCDefence(vae, functools.partial(BatchedHMC, num_steps=2), 2, 1)

    def run(seed=1, **options):
        options = {"classifier": classify, "ball": Linf(0.2), "budget": BUDGET, **options}
        generator = torch.Generator().manual_seed(seed)
        return evaluate_robustness(
            vae,
            options.pop("defence", defence),
            options.pop("x", x),
            generator=generator,
            **options,
        )

    return run


def found(report):
    contents = copy.deepcopy(report.to_dict())
    del contents["cost"]["seconds"], contents["cost"]["defence_seconds_per_image"]
    for attack in contents["attacks"]:
        del attack["seconds"]
    return contents


class Killed(BaseException):
    pass


def stopping(monkeypatch, when=lambda done: True):
    """Every run ends where it has written what ``when`` is true of."""
    save = module.atomic_save

    def stop(contents, where):
        save(contents, where)
        if when(contents["done"]):
            raise Killed

    monkeypatch.setattr(module, "atomic_save", stop)


def test_every_step_in_a_run_of_its_own(evaluate, tmp_path, monkeypatch):
    """The first run names the seed."""
    # One that climbs without the chain, two that climb it, and one without a gradient.
    attacks = ("transfer", "bpda", "evidence", "square")
    whole = evaluate(attacks=attacks, checks=False)
    path, runs = tmp_path / "evaluation.pt", 0
    stopping(monkeypatch)
    while True:
        try:
            report = evaluate(seed=1 + runs, attacks=attacks, checks=False, checkpoint=path)
            break
        except Killed:
            runs += 1
            assert path.exists()
    # The trial, clean figures and run, noise, attacks and their scores, the selection, the checks.
    assert runs == 6 + 2 * len(whole.attacks)
    assert found(report) == found(whole)
    assert torch.equal(report.x_adv, whole.x_adv)
    assert report.cost["seconds"] > 0
    assert not path.exists()


def test_checks_are_not_repeated(evaluate, tmp_path, monkeypatch):
    path, options = tmp_path / "evaluation.pt", {"attacks": ["transfer"]}
    whole = evaluate(**options)
    assert whole.checks
    stopping(monkeypatch, lambda done: "checks" in done)
    with pytest.raises(Killed):
        evaluate(**options, checkpoint=path)
    assert found(evaluate(**options, checkpoint=path)) == found(whole)


def test_a_file_of_another_evaluation_is_refused(evaluate, vae, tmp_path, monkeypatch):
    path = tmp_path / "evaluation.pt"
    stopping(monkeypatch)
    with pytest.raises(Killed):
        evaluate(checkpoint=path)
    x = random_noise(torch.full((4, 1, 4, 4), 0.5), Linf(0.1), torch.Generator().manual_seed(0))
    longer = MCMCDefence(vae, functools.partial(BatchedHMC, num_steps=3), 2, 1)
    for other in (
        {"x": x}, {"defence": longer}, {"ball": Linf(0.1)}, {"attacks": ["transfer"]},
        {"classifier": None}, {"checks": False}, {"budget": Budget.quick()}, {"defence_seed": 1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="belongs to other images, another defence or other"):
            evaluate(checkpoint=path, **other)
    for other in (Noisy(0.1, vae), functools.partial(classify)):
        name = "defence" if isinstance(other, Noisy) else "classifier"
        with pytest.raises(ValueError, match="belongs to other"):
            evaluate(checkpoint=path, **{name: other})
    with torch.no_grad():
        vae.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"evaluation\.pt.* belongs to other"):
        evaluate(checkpoint=path)


def test_a_file_that_is_none_is_named(evaluate, tmp_path):
    path = tmp_path / "evaluation.pt"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"checkpoint .*evaluation\.pt of an evaluation cannot"):
        evaluate(checkpoint=path)
    with pytest.raises(IsADirectoryError):
        evaluate(checkpoint=tmp_path)


def test_one_evaluation_at_a_time_writes_a_file(evaluate, tmp_path):
    """What finishes first deletes what the others have found."""
    path = tmp_path / "evaluation.pt"
    with sole_writer(path), pytest.raises(ValueError, match=r"evaluation\.pt is being written by"):
        evaluate(checkpoint=path)
    evaluate(checkpoint=path, attacks=("transfer",), checks=False)
    assert list(tmp_path.iterdir()) == []


class Noisy:
    """A defence that is no dataclass."""

    def __init__(self, scale, vae):
        self.scale, self.vae = scale, vae

    def __call__(self, x, generator=None):
        return NoDefence(self.vae)(x, generator)


class Slotted:
    """An object without a dictionary of its own."""

    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale


@pytest.mark.parametrize("what", ["attribute", "slot", "closure", "default", "method", "text"])
def test_what_an_object_or_a_function_holds_tells_it_from_others(what, vae):
    def made(scale):
        scorer = Noisy(scale, vae)
        return {
            "attribute": scorer,
            "slot": Slotted(scale),
            "closure": lambda z: scale * z,
            "default": lambda z, by=scale: by * z,
            "method": scorer.__call__,
            "text": eval(f"lambda z: {scale} * z"),
        }[what]

    first, same, other = (fingerprint(_own(made(scale))) for scale in (0.1, 0.1, 0.2))
    assert first == same != other
