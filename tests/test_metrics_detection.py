"""Detection: rank statistics against brute force and scipy, intervals that cover."""

from __future__ import annotations

import functools

import pytest
import torch
from scipy import stats

from pyro_vae_defence import metrics


def scores(ties):
    negatives, positives = torch.randn(40), torch.randn(30) + 0.7
    if ties:
        negatives, positives = negatives.round(), positives.round()
    return negatives, positives


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_the_mann_whitney_statistic(ties):
    negatives, positives = scores(ties)
    above = (positives[:, None] > negatives).double()
    equal = (positives[:, None] == negatives).double()
    found = metrics.auroc(negatives, positives)
    assert float(found) == pytest.approx(float((above + equal / 2).mean()))
    u = stats.mannwhitneyu(positives.numpy(), negatives.numpy()).statistic
    assert float(found) == pytest.approx(u / (40 * 30))
    # The other way round the alarm is wrong where it was right.
    assert float(metrics.auroc(positives, negatives)) == pytest.approx(1 - float(found))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tpr", [0.5, 0.95, 1.0])
def test_fpr_is_the_smallest_among_thresholds_that_catch_enough(ties, tpr):
    negatives, positives = scores(ties)
    found = float(metrics.fpr_at_tpr(negatives, positives, tpr))
    rates = [
        float((negatives >= threshold).double().mean())
        for threshold in torch.cat([negatives, positives])
        if (positives >= threshold).double().mean() >= tpr - 1e-9
    ]
    assert found == pytest.approx(min(rates))


def test_extremes_by_hand():
    low, high = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert float(metrics.auroc(low, high)) == 1.0
    assert float(metrics.fpr_at_tpr(low, high)) == 0.0
    assert float(metrics.auroc(low, low)) == 0.5
    assert float(metrics.fpr_at_tpr(low, low)) == 1.0
    # 19 of 20 are 95 percent: the one that is missed may score lowest.
    twenty = torch.arange(20.0)
    assert float(metrics.fpr_at_tpr(torch.tensor([0.5]), twenty)) == 0.0
    assert float(metrics.fpr_at_tpr(torch.tensor([1.5]), twenty)) == 1.0
    # The smallest share there is is one image.
    assert float(metrics.fpr_at_tpr(torch.tensor([18.5]), twenty, 1e-12)) == 0.0


def test_infinite_energies_are_the_highest_scores():
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([torch.inf, 0.5])
    assert float(metrics.auroc(low, high)) == 0.75


def test_interval_covers_the_true_value():
    # Scores N(0, 1) and N(1, 1), independent: AUROC = Phi(1 / sqrt 2).
    truth = stats.norm.cdf(0.5**0.5)
    generator = torch.Generator().manual_seed(3)
    covered = 0
    for _ in range(30):
        negatives, positives = torch.randn(80), torch.randn(80) + 1
        found = metrics.detection_interval(
            metrics.auroc, negatives, positives, num_resamples=100, generator=generator
        )
        assert found.low <= found.estimate <= found.high
        covered += found.low <= truth <= found.high
    # Nominal 95 percent, percentile intervals of 80 images somewhat less, say 0.92: fewer than 22
    # of 30 has probability 1e-3 (binomial); the seeds are fixed.
    assert covered >= 22


def area_of_others(negatives, positives):
    """AUROC over pairs of two images, which their scores tell apart here; by brute force."""
    above = (positives[:, None] > negatives).double() + (positives[:, None] == negatives) / 2
    others = (negatives[:, None] != negatives) | (positives[:, None] != positives)
    return above[others].mean()


@pytest.mark.parametrize("size", [4, 13])
def test_areas_of_resamples_are_over_pairs_of_two_images(size):
    negatives, positives = torch.randn(size), torch.randn(size).round()
    positives[0], negatives[1] = torch.inf, positives[1]
    seed, number = 1, 300
    found = metrics.detection_interval(
        metrics.auroc, negatives, positives, 0.8, number, torch.Generator().manual_seed(seed)
    )
    rows = torch.randint(size, (number, size), generator=torch.Generator().manual_seed(seed))
    alone = (rows == rows[:, :1]).all(1)  # which has no two images
    assert bool(alone.any()) == (size == 4)
    rows[alone] = torch.arange(size)
    areas = torch.stack([area_of_others(negatives[row], positives[row]) for row in rows])
    wanted = areas.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    assert [found.low, found.high] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("shift", "noise"), [(0.1, 0.0), (0.3, 0.1), (1.0, 0.3)])
def test_interval_of_scores_that_images_share_covers_the_area(shift, noise):
    """An attack moves scores that differ much from image to image, by little, in one direction."""
    torch.manual_seed(5)
    truth = stats.norm.cdf(shift / (2 + noise**2) ** 0.5)
    covered = 0
    for _ in range(100):
        clean = torch.randn(30)
        attacked = clean + shift + noise * torch.randn(30)
        found = metrics.detection_interval(metrics.auroc, clean, attacked, num_resamples=100)
        assert found.low <= found.estimate <= found.high
        covered += found.low <= truth <= found.high
    # Of 0.93 and more, fewer than 84 of 100 have a probability of 1e-3 (binomial).
    assert covered >= 84


@pytest.mark.parametrize(("num_images", "tpr"), [(2, 0.95), (13, 0.95), (40, 0.95), (40, 0.8)])
def test_rates_of_resamples_leave_open_whether_the_thresholds_image_raises_the_alarm(
    num_images, tpr
):
    """By brute force, with ties and infinite scores, and more resamples than are taken at once."""
    negatives, positives = torch.randn(num_images), (torch.randn(num_images) + 0.5).round()
    positives[0], negatives[1] = torch.inf, positives[1]
    statistic = (
        metrics.fpr_at_tpr if tpr == 0.95 else functools.partial(metrics.fpr_at_tpr, tpr=tpr)
    )
    found = metrics.detection_interval(
        statistic,
        negatives,
        positives,
        num_resamples=300,
        generator=torch.Generator().manual_seed(1),
    )
    drawn = torch.randint(num_images, (300, num_images), generator=torch.Generator().manual_seed(1))
    least, most = [], []
    for row in drawn.tolist():
        pairs = [(float(positives[image]), float(negatives[image]), image) for image in row]
        threshold, _, own = sorted(pairs)[round((1 - tpr) * num_images - 0.49)]
        certain = [n >= threshold for _, n, image in pairs if image != own]
        least.append(sum(certain) / num_images)
        most.append((sum(certain) + row.count(own)) / num_images)
    low, high = (
        float(torch.tensor(values, dtype=torch.float64).quantile(tail))
        for values, tail in ((least, 0.025), (most, 0.975))
    )
    estimate = float(statistic(negatives, positives))
    assert found[:3] == pytest.approx((estimate, min(low, estimate), max(high, estimate)))
    assert found.low < found.high


@pytest.mark.parametrize(("shift", "noise"), [(0.001, 0.0), (0.1, 0.15), (0.02, 0.05)])
def test_interval_of_scores_that_images_share_covers_the_rate(shift, noise):
    torch.manual_seed(5)
    spread = (1 + noise**2) ** 0.5
    truth = stats.norm.sf(shift + spread * stats.norm.ppf(0.05))
    covered = 0
    for _ in range(100):
        clean = torch.randn(30)
        attacked = clean + shift + noise * torch.randn(30)
        found = metrics.detection_interval(metrics.fpr_at_tpr, clean, attacked, num_resamples=100)
        covered += found.low <= truth <= found.high
    # Of 0.95 and more, fewer than 87 of 100 have a probability of 1e-3 (binomial).
    assert covered >= 87


def test_images_are_resampled_with_both_their_scores():
    # An attack that always raises the score by 0.1 keeps that order in every resample of pairs.
    clean = torch.arange(50.0)
    shifted = metrics.detection_interval(lambda t, s: (s - t).mean(), clean, clean + 0.1)
    assert shifted.high - shifted.low == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("number", [float, torch.Tensor.float, lambda value: value.numpy()])
def test_a_statistic_may_return_any_number(number):
    clean, attacked = torch.arange(20.0), torch.arange(20.0) + 3

    def interval(statistic):
        generator = torch.Generator().manual_seed(1)
        return metrics.detection_interval(statistic, clean, attacked, generator=generator)

    found = interval(lambda t, s: number((s > t.median()).double().mean()))
    wanted = interval(lambda t, s: (s > t.median()).double().mean())
    assert found[:3] == pytest.approx(wanted[:3], abs=1e-6)


def test_interval_of_scores_that_tell_nearly_all_images_apart_covers_the_area():
    """A detector misses 0.01 of the attacked images: none of a hundred in a third of samples."""
    torch.manual_seed(3)
    area, covered = 0.99 * stats.norm.cdf(4 / 2**0.5), [0, 0]
    for _ in range(40):
        clean = torch.randn(100)
        attacked = torch.where(torch.rand(100) < 0.01, -8.0, torch.randn(100) + 4)
        for reverse in (False, True):
            pair = (attacked, clean) if reverse else (clean, attacked)
            found = metrics.detection_interval(metrics.auroc, *pair, num_resamples=50)
            covered[reverse] += found.low <= (1 - area if reverse else area) <= found.high
    # Of 0.95 and more, fewer than 33 of 40 have a probability of 7e-4 (binomial).
    assert min(covered) >= 33


@pytest.mark.parametrize("missed", ["attacked image", "false alarm"])
def test_one_image_that_was_missed_may_stand_for_more(missed):
    """99 of 100 attacked images above all others, or 99 of 100 others below all attacked ones."""
    one = torch.arange(100) < 1
    clean, attacked = torch.zeros(100), torch.ones(100)
    if missed == "attacked image":
        attacked = torch.where(one, -1.0, attacked)
    else:
        clean = torch.where(one, 2.0, clean)
    wanted = 0.99 * 0.025 ** (1 / 50)
    found = metrics.detection_interval(metrics.auroc, clean, attacked)
    assert (found.estimate, found.low) == pytest.approx((0.99, wanted))
    # Where the score points the wrong way, the other end.
    found = metrics.detection_interval(metrics.auroc, attacked, clean)
    assert (found.estimate, found.high) == pytest.approx((0.01, 1 - wanted))


def test_interval_of_scores_that_tell_all_images_apart_covers_the_area():
    """An area of 0.98 is 1 in most samples of ten images; the interval must cover it in 95%."""
    torch.manual_seed(3)
    area, runs, covered, perfect = 0.98, 200, 0, 0
    shift = stats.norm.ppf(area) * 2**0.5
    for _ in range(runs):
        negatives, positives = torch.randn(10), torch.randn(10) + shift
        if float(metrics.auroc(negatives, positives)) == 1.0:
            found = metrics.detection_interval(
                metrics.auroc, negatives, positives, num_resamples=20
            )
            perfect += 1
            covered += found.low <= area <= found.high == 1.0
    assert perfect > runs / 3
    assert covered == perfect
    low, high = torch.zeros(10), torch.ones(10)
    share = 1 - 0.025 ** (1 / 5)
    for statistic, negatives, positives, ends in (
        (metrics.auroc, low, high, (1 - share, 1.0)),
        (metrics.auroc, high, low, (0.0, share)),
        (metrics.auroc, low, low, (0.5 - share / 2, 0.5 + share / 2)),
        (metrics.fpr_at_tpr, low, high, (0.0, share)),
    ):
        found = metrics.detection_interval(statistic, negatives, positives)
        assert (found.low, found.high) == pytest.approx(ends)


@pytest.mark.parametrize("count", [0, 1, 13, 40])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_interval_of_a_rate_is_wilsons(count, level):
    alarms = torch.arange(40) < count
    found = metrics.rate_interval(alarms, level)
    expected = stats.binomtest(count, 40).proportion_ci(level, method="wilson")
    assert found.estimate == count / 40
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.high > found.low


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.fpr_at_tpr])
def test_stays_on_its_device(metric):
    placed = metric(torch.rand(4, device="meta"), torch.rand(3, device="meta"))
    assert placed.device.type == "meta"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: metrics.auroc(s[None], s), r"negatives has shape \(1, 5\)"),
        (lambda s: metrics.auroc(s, s.long()), "positives has shape .* dtype torch.int64"),
        (lambda s: metrics.fpr_at_tpr(s, s / 0 * 0), "positives has scores that are not a number"),
        (lambda s: metrics.fpr_at_tpr(s, s, 0.0), r"tpr must lie in \(0, 1\], got 0.0"),
        (
            lambda s: metrics.detection_interval(
                functools.partial(metrics.fpr_at_tpr, tpr=1.5), s, s
            ),
            r"tpr must lie in \(0, 1\], got 1.5",
        ),
        (
            lambda s: metrics.detection_interval(metrics.auroc, s, s[1:]),
            "negatives has 5 scores and positives 4",
        ),
        (lambda s: metrics.detection_interval(metrics.auroc, s, s, level=2.0), "level=2.0"),
        (lambda s: metrics.rate_interval(s), r"alarms has shape \(5,\) and dtype torch.float32"),
        (lambda s: metrics.rate_interval(s > 0, level=1.0), "level=1.0 must lie between"),
        (
            lambda s: metrics.detection_interval(metrics.auroc, s, s, num_resamples=0),
            "num_resamples must be an integer of at least 1, got 0",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(5) + 1)


@pytest.mark.parametrize("statistic", [metrics.auroc, metrics.fpr_at_tpr, lambda a, b: a.mean()])
def test_memory_does_not_grow_with_images(statistic, monkeypatch, largest_tensor):
    negatives = torch.rand(300, dtype=torch.float64)
    positives = negatives + 0.3 * torch.rand(300)

    def interval():
        generator = torch.Generator().manual_seed(2)
        return metrics.detection_interval(
            statistic, negatives, positives, num_resamples=50, generator=generator
        )

    whole = interval()
    monkeypatch.setattr(metrics.intervals, "_VALUES_AT_ONCE", 2000)
    with largest_tensor as largest:
        parts = interval()
    assert largest.size <= 2000
    assert parts == whole
