"""Adversarial accuracy, correctness and active units."""

from __future__ import annotations

import pytest
import torch

from pyro_vae_defence.metrics import active_units, adversarial_accuracy, correct


@pytest.mark.parametrize("score", [adversarial_accuracy, correct])
def test_score_is_one_where_classes_agree(score):
    agreement = score(torch.tensor([3, 1, 4, 9]), torch.tensor([3, 1, 5, 1]))
    assert torch.equal(agreement, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    placed = score(
        torch.zeros(4, device="meta", dtype=torch.int64), torch.zeros(4, device="meta").int()
    )
    assert placed.shape == (4,)
    assert placed.device.type == "meta"


def test_shares_are_not_rounded_to_a_narrow_default_dtype():
    classes = torch.arange(7)
    torch.set_default_dtype(torch.bfloat16)  # put back by a fixture
    assert float(correct(classes, classes.clamp(max=5)).mean()) == pytest.approx(6 / 7, rel=1e-6)


def test_classes_that_do_not_fit_are_refused():
    classes = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"prediction_ref has shape \(2, 10\).*logits.argmax"):
        adversarial_accuracy(torch.zeros(2, 10), classes)
    with pytest.raises(ValueError, match="prediction_adv has 1 classes: pass 2"):
        adversarial_accuracy(classes, classes[:1])
    with pytest.raises(ValueError, match=r"prediction has .* dtype torch.float32"):
        correct(classes.float(), classes)
    with pytest.raises(ValueError, match="label has 1 classes: pass 2"):
        correct(classes, classes[:1])


def test_active_units_move_more_than_the_threshold():
    # Two images: means +-m have unbiased variance 2 m^2, so 0.01 lies at m = 0.0707.
    means = torch.tensor([0.0, 0.0706, 0.0708, 1.0]) * torch.tensor([[1.0], [-1.0]])
    assert active_units(means).tolist() == [False, False, True, True]
    assert active_units(means, threshold=0.0).tolist() == [False, True, True, True]
    assert active_units(means + 5.0).tolist() == [False, False, True, True]
    two = torch.tensor([[0.0, 0.0], [2.0, 2.5]])  # unbiased variances of 2 and 3.125
    assert active_units(two, threshold=2.0).tolist() == [False, True]


def test_active_units_keep_the_shape_of_the_event():
    assert active_units(torch.zeros(5, 2, 4, 4)).shape == (2, 4, 4)
    assert active_units(torch.zeros(5, 7, device="meta")).device.type == "meta"


def test_active_units_refuse_bad_arguments():
    with pytest.raises(ValueError, match=r"means has shape \(1, 64\)"):
        active_units(torch.zeros(1, 64))
    with pytest.raises(ValueError, match=r"means has shape \(64,\)"):
        active_units(torch.zeros(64))
    with pytest.raises(
        ValueError, match=r"threshold must lie in \[0, inf\], got -1.0; it is a variance"
    ):
        active_units(torch.zeros(2, 64), threshold=-1.0)
