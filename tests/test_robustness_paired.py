"""Paired differences: right where the answer is known, and told apart where they should be."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from pyro_vae_defence.robustness import RobustnessReport, paired, paired_difference
from pyro_vae_defence.robustness.paired import sign_flip_chance

SUITE = Path(__file__).resolve().parents[1] / "docs/results/robustness/mnist_radius_0.2.json"


def report_of(values, **changes):
    found = json.loads(SUITE.read_text())["reports"]["classification/aware"]
    report = RobustnessReport.from_dict(found)
    values = torch.as_tensor(values, dtype=torch.float64)
    return dataclasses.replace(report, per_image=values, images=(), **changes)


def difference(one, other, level=0.95):
    generator = torch.Generator().manual_seed(0)
    return paired_difference(report_of(one), report_of(other), level=level, generator=generator)


def test_the_chance_of_random_signs_is_that_of_all_of_them():
    values = torch.tensor([0.5, 0.3, -0.2, 0.4, 0.0, 0.7, 0.1, -0.6])
    signs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=8)))
    exact = float(((signs @ values).abs() >= values.sum().abs() - 1e-6).double().mean())
    chance = sign_flip_chance(values, torch.Generator().manual_seed(1))
    # Five standard errors of 10,000 draws.
    assert abs(chance - exact) < 5 * (exact * (1 - exact) / 10_000) ** 0.5
    # Ties count, or n equal differences would have chance 0 instead of 2 / 2^n.
    chance = sign_flip_chance(torch.full((4,), 0.1), torch.Generator().manual_seed(1))
    assert abs(chance - 2 / 2**4) < 0.017
    assert sign_flip_chance(torch.zeros(5), torch.Generator().manual_seed(1)) == 1.0


def test_images_are_paired():
    """What images differ in cancels; without the pairs it would hide the difference."""
    image = torch.linspace(0, 1, 20, dtype=torch.float64)
    gain = 0.1 + 0.02 * torch.sin(torch.arange(20.0))
    found = difference(image + gain, image)
    assert found.estimate == pytest.approx(float(gain.double().mean()))
    assert 0.08 < found.low < found.estimate < found.high < 0.12
    assert found.told_apart
    assert found.num_images == 20
    assert found.chance < 0.001
    back = difference(image, image + gain)
    assert back.told_apart
    assert back.high < 0
    unpaired = difference(image + gain, image.roll(7))
    assert unpaired.low < 0 < unpaired.high
    assert not unpaired.told_apart


def test_a_few_images_decide_nothing_though_the_interval_leaves_zero_out():
    control = torch.zeros(20)
    right = torch.zeros(20)
    right[:5] = 1.0
    found = difference(right, control)
    assert found.low > 0
    assert found.chance == pytest.approx(1 / 16, abs=0.01)
    assert not found.told_apart
    right[:8] = 1.0
    assert difference(right, control).told_apart
    # No difference at all is none.
    assert not difference(control, control).told_apart


def test_gains_that_one_loss_unseen_would_undo_are_not_told_apart():
    """Differences of 0.1 on 9% of all images and -0.9 on 1% have mean zero. In a third of all
    samples of 100 there is no loss, and in a sixth nine gains or more beside it."""
    gains = 0.1 * (torch.arange(100) < 9)
    found = difference(gains, torch.zeros(100))
    assert found.chance < 0.01
    assert found.low < 0 < found.estimate
    assert not found.told_apart
    assert difference(5 * gains, torch.zeros(100)).told_apart  # beyond what a loss would undo


def test_a_higher_level_is_a_wider_interval_and_a_harder_test():
    right = (torch.arange(20) < 7).double()  # chance 1/64
    narrow, wide = (difference(right, torch.zeros(20), level) for level in (0.95, 0.99))
    assert wide.low <= narrow.low < narrow.high <= wide.high
    assert (narrow.told_apart, wide.told_apart) == (True, False)
    assert (narrow.level, wide.level) == (0.95, 0.99)


def test_images_in_other_parts_are_the_same_images():
    """A report that was joined has a hash of each part, another one of them all."""
    x = torch.rand(4, 1, 2, 2)
    values = torch.tensor([0.1, 0.2, 0.3, 0.4])
    whole, parts, others = (
        dataclasses.replace(report_of(values + gain), images=images, x_ref=x_ref)
        for gain, images, x_ref in ((0.1, ("a",), x), (0, ("b", "c"), x), (0, ("d",), x.flip(0)))
    )
    assert paired_difference(whole, parts).estimate == pytest.approx(0.1)
    with pytest.raises(ValueError, match="different images"):
        paired_difference(whole, others)
    with pytest.raises(ValueError, match="different images"):
        paired_difference(whole, dataclasses.replace(parts, x_ref=None))


def test_mistakes():
    report = report_of(torch.rand(20))
    with pytest.raises(ValueError, match="reports of different figure are not compared: accuracy"):
        paired_difference(report, dataclasses.replace(report, figure="similarity"))
    other = dataclasses.replace(report, threat_model={"radius": 0.1})
    with pytest.raises(ValueError, match="reports of different threat_model are not compared"):
        paired_difference(report, other)
    other = dataclasses.replace(report, budget=report.budget | {"num_steps": 1})
    with pytest.raises(ValueError, match="different budgets are not compared, num_steps=100 and 1"):
        paired_difference(report, other)
    # A report whose limit is reached is unreliable, and checks change no figure.
    limits = report.budget | {"max_evaluations": 9, "check_steps": 9, "iterates": 1}
    assert paired_difference(report, dataclasses.replace(report, budget=limits)).estimate == 0.0
    with pytest.raises(ValueError, match="reports of different images are not paired, 20 and 19"):
        paired_difference(report, report_of(torch.rand(19)))
    one, other = (dataclasses.replace(report, images=(name,)) for name in "ab")
    with pytest.raises(ValueError, match="different images are not paired, 20 and 20"):
        paired_difference(one, other)
    labels = torch.arange(20)
    one, other = (dataclasses.replace(report, labels=each) for each in (labels, labels.clone()))
    assert paired_difference(one, other).estimate == 0.0
    assert paired_difference(one, report).estimate == 0.0
    labels[3] = 0
    with pytest.raises(ValueError, match="different labels are not paired"):
        paired_difference(one, other)
    # A model that takes no condition may be compared with one that does.
    none, given = (dataclasses.replace(report, conditions=each) for each in ((), (None, labels)))
    assert paired_difference(none, given).estimate == 0.0
    other = dataclasses.replace(report, conditions=(labels, labels.roll(1)))
    with pytest.raises(ValueError, match="different conditions are not paired"):
        paired_difference(given, other)
    with pytest.raises(ValueError, match="level=1.0 must lie between 0 and 1"):
        paired_difference(report, report, level=1.0)


def test_memory_of_sign_flips_does_not_grow_with_images(monkeypatch, largest_tensor):
    values = torch.rand(300) - 0.45

    def chance():
        return paired.sign_flip_chance(values, torch.Generator().manual_seed(1))

    whole = chance()
    monkeypatch.setattr(paired, "_SIGNS_AT_ONCE", 20_000)
    with largest_tensor as largest:
        assert chance() == whole
    assert largest.size <= 20_000
