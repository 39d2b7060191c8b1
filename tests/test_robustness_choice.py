"""The worst case of each image is chosen by few draws, and must not be kinder than one attack."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from pyro_vae_defence.robustness.checks import black_box_is_not_stronger
from pyro_vae_defence.robustness.scoring import Scores, strongest_of, worst_case


# Of 20,000 images means of figures have a standard error of .004 at most.
def test_choosing_by_two_draws_leaves_no_more_than_the_strongest_attack():
    """Accuracies of four candidates whose chances differ from image to image."""
    generator = torch.Generator().manual_seed(0)
    general = torch.tensor([0.9, 0.8, 0.5, 0.45])[:, None]
    chances = (general + 0.5 * (torch.rand(4, 20_000, generator=generator) - 0.5)).clamp(0, 1)
    drawn = torch.rand(2, 4, 20_000, generator=generator) < chances
    winner = strongest_of(drawn.double().mean(0), 2)
    left = chances.gather(0, winner[None]).mean()
    assert left < chances.mean(1).min() + 0.005
    first = chances.gather(0, drawn.double().mean(0).argmin(0)[None]).mean()
    assert first > left + 0.02  # who comes first among equals


def test_ties_go_to_the_strongest_in_general():
    selections = torch.tensor([[0.0, 0.5, 1.0, 1.0], [0.0, 0.5, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]])
    assert strongest_of(selections, 2).tolist() == [1, 1, 1, 1]
    selections[2, 1] = 0.0
    assert strongest_of(selections, 2).tolist()[1] == 2


def _scores(per_draw):
    return Scores(torch.tensor(per_draw), torch.tensor(per_draw).mean(0))


def test_no_single_attack_leaves_less_than_the_worst_case():
    clean, one = _scores([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]), _scores([[0.0, 1.0, 0.0]] * 2)
    other = _scores([[1.0, 0.5, 0.0]] * 2)
    # By luck the first attack looks weak where it is strong: the choice alone would leave 0.5.
    lucky = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    worst, winner = worst_case(clean, [one, other], lucky, 2)
    assert winner.tolist() == [1, 1, 1]
    assert torch.equal(worst.per_draw, one.per_draw)
    # Where the choice leaves less, it is the choice.
    worst, winner = worst_case(
        clean, [one, other], torch.stack([*map(Scores.mean, (clean, one, other))]), 2
    )
    assert winner.tolist() == [1, 2, 1]
    assert worst.mean().tolist() == [0.0, 0.5, 0.0]
    worst, winner = worst_case(clean, [], lucky[:1], 2)
    assert winner.tolist() == [0, 0, 0]
    assert worst.mean().tolist() == [1.0, 1.0, 1.0]


def test_the_black_box_is_compared_with_the_strongest_gradient_attack_in_general():
    """Two gradient attacks that tie on most selections: the first one leaves everything."""
    selections = {"transfer": [0.5, 0.5, 0.5, 1.0], "encoder": [0.5, 0.5, 0.5, 0.0]}
    figures = {"transfer": torch.ones(4), "encoder": torch.zeros(4), "black_box": torch.zeros(4)}
    found = [
        SimpleNamespace(selection=torch.tensor(selections.get(name, [0.5] * 4))) for name in figures
    ]
    evidence = SimpleNamespace(
        suite=SimpleNamespace(budget=SimpleNamespace(selection_draws=2)),
        found=found,
        scores=[Scores(figure[None], figure) for figure in figures.values()],
        of=lambda black_box: [2] if black_box else [0, 1],
    )
    seen = black_box_is_not_stronger(evidence)
    assert seen.values["gradient"].tolist() == seen.values["black_box"].tolist() == [0.0] * 4
