"""Every optimiser through the same tests: known maxima, balls, batches, early exit, resume, honest
counts."""

from __future__ import annotations

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import LinearGaussianVAE
from torch.utils._pytree import tree_leaves

from pyro_vae_defence import attacks
from pyro_vae_defence.attacks import adaptive, base, blackbox
from pyro_vae_defence.attacks.apgd import checkpoints
from pyro_vae_defence.attacks.base import Problem
from pyro_vae_defence.models import program
from pyro_vae_defence.models.classifier import LinearClassifier
from pyro_vae_defence.ops.balls import L1, L2, Linf
from pyro_vae_defence.ops.streams import Streams

BALLS = [Linf(0.2), L2(1.0), L1(3.0)]
SHAPE = (4, 1, 4, 4)

# Settings that suffice for the known maxima below, and what a step costs: (gradients, queries).
OPTIMISERS = {
    "PGD": (attacks.PGD, {"num_steps": 100}),
    "MomentumPGD": (attacks.MomentumPGD, {"num_steps": 100}),
    "APGD": (attacks.APGD, {"num_steps": 80}),
    "LBFGS": (attacks.LBFGS, {"num_steps": 20}),
    "Square": (attacks.Square, {"num_steps": 400, "share": 0.3}),
    "NES": (attacks.NES, {"num_steps": 100, "num_directions": 30}),
}
EVERY = [*OPTIMISERS, "paper"]
# How far from the maximum they may end, as a share of what there is to gain from the reference on:
# little for those that adapt their steps, more for fixed steps, most for those that do not see a
# gradient.
TOLERANCE = {
    "PGD": 0.05,
    "MomentumPGD": 0.05,
    "APGD": 1e-5,
    "LBFGS": 1e-6,
    "Square": 0.15,
    "NES": 0.2,
}

# Where the arithmetic does not matter.
SMALL = {"NES": {"num_directions": 4}, "LBFGS": {"inner_steps": 2}}


def make(name, objective, ball, **settings):
    optimiser, defaults = (
        (attacks.PGD, {"preset": "paper"}) if name == "paper" else OPTIMISERS[name]
    )
    return optimiser(objective, ball, **{**defaults, **settings})


def problem(kind):
    """References with saturated pixels, an objective, and its maximiser in a ball."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(*SHAPE, generator=generator, dtype=torch.float64)
    x = torch.where(torch.rand(*SHAPE, generator=generator) < 0.3, 0.0, x)
    towards = torch.randn(*SHAPE, generator=generator, dtype=torch.float64)

    def prepare(x_ref, streams):
        # Rows follow their images, whatever the batch.
        own = towards[streams.image]
        if kind == "linear":
            return lambda y: (own * y).flatten(1).sum(1)
        bend = torch.linspace(1, 20, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
        weight = 1.0 if kind == "quadratic" else bend
        return lambda y: -(weight * (y - x_ref - own).square()).flatten(1).sum(1)

    def maximiser(ball):
        if kind == "linear":
            # The projection of a far step maximises a linear function (test_ops).
            return x + ball.project_box(1e4 * towards, -x, 1 - x)
        return x + ball.project_box(towards, -x, 1 - x)

    return x, prepare, maximiser


def assert_same(one, other):
    """Equal up to the rounding of sums, which may depend on the number of rows."""
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def objective_at(prepare, x, y):
    return prepare(x, Streams.create(x.shape[0], seed=0))(y)


def supported(name, ball):
    if name == "Square" and isinstance(ball, L1):
        pytest.skip("Square is defined for L_inf and L2")


def test_square_climbs_in_an_l2_ball(float64):
    # Squares of at least 3 x 3 pixels are coarse on 4 x 4 images: larger ones, with some structure.
    x = torch.full((4, 2, 12, 12), 0.5)
    slope = torch.ones(1, 2, 12, 12)
    slope[..., 6:] = -1.0
    slope = slope / slope.norm()

    def prepare(x_ref):
        return lambda y: (slope * (y - x_ref)).flatten(1).sum(1)

    # The maximum is 1; the inner product with a random direction has standard deviation 0.06.
    reached = attacks.Square(prepare, L2(1.0), num_steps=150, share=0.3)(x).objective
    assert (reached > 0.24).all()


@pytest.mark.parametrize("side", [2, 3, 4, 5])
def test_squares_patterns_are_the_published_sums(side):
    """Equation 2: sum_{k=0}^M 1 / (n + 1 - k)^2, n = h // 2, M = n - max(|r - n - 1|, |s - w // 2 -
    1|) for rows r and columns s from 1 on; the two halves have opposite signs."""
    n, found = side // 2, blackbox._pattern(side, torch.zeros((), dtype=torch.float64))
    expected = torch.zeros(side, side, dtype=torch.float64)
    for first, width, sign in ((0, side // 2, 1), (side // 2, side - side // 2, -1)):
        for r in range(1, side + 1):
            for s in range(1, width + 1):
                m = n - max(abs(r - n - 1), abs(s - width // 2 - 1))
                value = sum(1 / (n + 1 - k) ** 2 for k in range(m + 1))
                expected[r - 1, first + s - 1] = sign * value
    torch.testing.assert_close(found, expected / expected.norm())


def test_squares_l2_move_spends_the_budget_of_its_windows(float64):
    """The second window is emptied for the first, which takes what the ball has left, too, in equal
    parts per channel; nothing else changes. Windows lie anywhere, patterns in both directions."""
    rows, channels, size = 400, 2, 6
    x = torch.full((rows, channels, size, size), 0.5)
    before = 0.03 * torch.randn_like(x)
    problem = Problem(lambda y: y, L2(0.4), x, Streams.create(rows, seed=1))
    after = blackbox._l2_move(problem, before, 2, 1)  # at least 3, and odd
    mask, _, _ = blackbox._window(problem, 3, 1, 1)
    other, _, _ = blackbox._window(problem, 3, 1, 3)
    places = mask.flatten(1).double().argmax(1)
    assert set(places.tolist()) == {6 * i + j for i in range(4) for j in range(4)}
    assert (mask.sum((1, 2, 3)) == 9).all()
    torch.testing.assert_close(after[(~(mask | other)).expand_as(x)],
                               before[(~(mask | other)).expand_as(x)])  # fmt: skip
    assert after[(other & ~mask).expand_as(x)].abs().max() == 0
    left = (0.16 - before.square().sum((1, 2, 3))) / channels
    both = torch.where(mask | other, before, 0.0).square().sum((2, 3))
    inside = torch.where(mask, after, 0.0)
    torch.testing.assert_close(inside.square().sum((2, 3)), both + left[:, None])
    pattern, seen = blackbox._pattern(3, x), set()
    for row in range(20):
        window = mask[row, 0]
        for channel in range(channels):
            own = before[row, channel][window].reshape(3, 3)
            new = inside[row, channel][window].reshape(3, 3)
            for kind, each in (("straight", pattern), ("turned", pattern.T)):
                for sign in (1, -1):
                    wanted = own / own.norm() + sign * each
                    if torch.allclose(new / new.norm(), wanted / wanted.norm()):
                        seen.add((kind, sign))
                        break
                else:
                    continue
                break
            else:
                pytest.fail(f"row {row} has another pattern")
    assert len(seen) == 4
    moved = blackbox._l2_move(problem, before, 4, 1)
    mask, other = (blackbox._window(problem, 5, 1, number)[0] for number in (1, 3))
    assert torch.equal((moved - before).abs().amax(1, keepdim=True) > 1e-12, mask | other)


@pytest.mark.parametrize(
    ("name", "kind", "ball"),
    [
        # NES takes PGD's steps along an estimate, whose thousands of queries are left to the long
        # run where the ball and the objective are those of no more than one of these.
        pytest.param(name, kind, ball, marks=[pytest.mark.slow] * (name == "NES" and later))
        for name in OPTIMISERS
        for kind, later_balls in (("linear", L1), ("quadratic", (Linf, L2)))
        for ball in BALLS
        for later in [isinstance(ball, later_balls)]
    ],
    ids=str,
)
def test_reaches_a_known_maximum(name, kind, ball):
    supported(name, ball)
    if name == "Square" and isinstance(ball, L2):
        pytest.skip("has a test of its own, on larger images")
    x, prepare, maximiser = problem(kind)
    result = make(name, prepare, ball)(x)
    best = objective_at(prepare, x, maximiser(ball))
    gain = best - objective_at(prepare, x, x)
    short = (best - result.objective[0]) / gain
    assert (short >= -1e-6).all()
    assert (short <= TOLERANCE[name]).all()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**80], ids=["saturated", "steep"])
@pytest.mark.parametrize("ball", BALLS, ids=str)
@pytest.mark.parametrize("name", ["PGD", "MomentumPGD", "APGD", "LBFGS"])
def test_gradients_whose_squares_float32_does_not_have_lead_as_far(name, ball, scale):
    # Of a classifier that is sure by 70 nats, cross-entropy has gradients of 1e-30.
    x = problem("linear")[0].float()
    slope = torch.linspace(-1, 2, 16).reshape(1, 1, 4, 4)

    def attack(scale):
        def prepare(x_ref):
            return lambda y: scale * (slope * (y - x_ref)).flatten(1).sum(1)

        return make(name, prepare, ball, num_steps=10)(x, torch.Generator().manual_seed(0))

    expected = attack(1.0)
    assert (expected.objective > 0).all()
    torch.testing.assert_close(attack(scale).x_adv, expected.x_adv, rtol=0, atol=1e-5)


def test_quasi_newton_needs_few_gradients_where_the_curvature_varies():
    # In a box every pixel has its own maximum, whatever the weights.
    x, prepare, maximiser = problem("bent")
    best = objective_at(prepare, x, maximiser(Linf(1.0)))
    gain = best - objective_at(prepare, x, x)
    short = (best - attacks.LBFGS(prepare, Linf(1.0), num_steps=25)(x).objective[0]) / gain
    assert (short <= 1e-4).all()
    plain = (best - attacks.PGD(prepare, Linf(1.0), num_steps=25)(x).objective[0]) / gain
    assert (short < plain).all()


def lbfgs_trials(values, slopes):
    """Of an objective with these values and slopes, call after call: how far each trial of L-BFGS
    is from the reference towards the corner of the ball, and where the result is."""
    x, trials = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64), []

    def prepare(x_ref):
        def objective(y):
            trials.append((y.detach() - x_ref) / 0.25)
            if len(trials) > len(values):  # the attack looks at its result
                return y.flatten(1).sum(1)
            value, slope = values[len(trials) - 1], slopes[len(trials) - 1]
            return value + slope * (y - y.detach()).flatten(1).sum(1)

        return objective

    ball, start = Linf(0.25), lambda x, streams: x
    attacks.LBFGS(prepare, ball, num_steps=len(values), start=start)(x)
    found = torch.stack(trials).flatten(1)
    torch.testing.assert_close(found, found[:, :1].expand_as(found))
    return found[:-1, 0].tolist(), float(found[-1, 0])


def test_lbfgs_line_search_by_hand():
    """The slope along the first direction, which leads to the corner, is 1."""
    one = [1.0] * 3
    # Back to the top of the parabola through what is known; at most to a tenth, at least to half.
    for last, share in ((-0.25, 0.4), (-9.0, 0.1), (0.5e-4, 0.5)):
        trials, end = lbfgs_trials([0.0, last, 1.0], one)
        assert trials == pytest.approx([0, 1, share])
        assert end == pytest.approx(share)
    # A rise of at least 1e-4 of the slope times the length of the step is accepted, no other.
    assert lbfgs_trials([0.0, 2e-4], one)[1] == 1
    assert lbfgs_trials([0.0, 0.5e-4], one)[1] == 0
    assert lbfgs_trials([0.0, -1.0, 0.5e-4], one)[1] == pytest.approx(0.25)


def test_lbfgs_models_the_curvature_and_forgets_it_where_there_is_none():
    # From 0.25 with half the slope of 0, Newton's step ends at 0.5. There the slope has risen.
    trials, _ = lbfgs_trials([0.0, -1.0, 1.0, 2.0, 3.0], [1.0, 0.0, 0.5, 0.8, 0.0])
    assert trials == pytest.approx([0, 1, 0.25, 0.5, 1])


def test_lbfgs_gives_up_after_six_rejections():
    """Steps of 100 diameters, then of 1, both of which the ball ends at its corner, then of 1/100,
    which is 0.02 of the way there."""
    trials, end = lbfgs_trials([0.0] + 18 * [-1.0], 19 * [1e-6])
    shorter = 0.1 ** torch.arange(6)
    expected = torch.cat([torch.zeros(1), shorter, shorter, 0.02 * shorter])
    assert trials == pytest.approx(expected.tolist(), rel=1e-4)
    assert end == 0


@pytest.mark.parametrize("ball", BALLS, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_ball_and_range_hold_and_more_steps_are_no_worse(name, ball):
    supported(name, ball)
    vae = LinearGaussianVAE()
    x = torch.rand(*SHAPE).round(decimals=1)
    prepared = attacks.symmetric_kl(vae)
    seen = []

    def recording(x_ref):
        inner = prepared(x_ref)

        def objective(y):
            assert y.min() >= 0
            assert y.max() <= 1
            seen.append(inner(y))
            return seen[-1]

        return objective

    settings = {"num_steps": 12, "num_restarts": 2}
    if name == "NES":
        settings["num_directions"] = 4
    result = make(name, recording, ball, **settings)(x)
    assert result.x_adv.shape == (2, *SHAPE)
    assert result.x_adv.min() >= 0
    assert result.x_adv.max() <= 1
    assert (ball.norm((result.x_adv - x).flatten(0, 1)) <= ball.radius).all()
    assert torch.allclose(result.objective[1], prepared(x)(result.x_adv[1]), rtol=1e-4)
    # The best so far: nothing it has seen beats it, unless it looked outside the ball (NES's
    # directions, the published start).
    if name not in ("NES", "paper"):
        best_seen = torch.stack([value.detach() for value in seen]).amax(0)
        assert torch.allclose(result.objective.flatten(), best_seen, rtol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_counts_are_honest(name):
    calls = {"gradient": 0, "value": 0}

    def prepare(x_ref):
        def objective(y):
            calls["gradient" if y.requires_grad else "value"] += 1
            return y.square().flatten(1).sum(1)

        return objective

    x = torch.rand(*SHAPE)
    result = make(name, prepare, Linf(0.1), num_steps=7, **SMALL.get(name, {}))(x)
    assert result.num_gradients.unique().tolist() == [calls["gradient"]]
    assert result.num_queries.unique().tolist() == [calls["value"]]
    assert calls["gradient"] == (0 if name in ("Square", "NES") else 7)
    assert calls["value"] == {"paper": 1, "LBFGS": 1, "Square": 8, "NES": 7 * 5 + 2}.get(name, 2)


@pytest.mark.parametrize("name", EVERY)
def test_result_does_not_depend_on_the_batch(name):
    x, prepare, _ = problem("quadratic")

    def run(x, **settings):
        torch.manual_seed(3)
        extra = SMALL.get(name, {})
        return make(name, prepare, L2(0.5), num_steps=9, num_restarts=2, **extra, **settings)(x)

    whole = run(x)
    parts = run(x, batch_size=3)
    for one, other in zip(whole, parts):
        assert_same(one, other)
    assert_same(run(x[:2]).x_adv, whole.x_adv[:, :2])
    assert not torch.equal(whole.x_adv[0], whole.x_adv[1])


@pytest.mark.parametrize("name", OPTIMISERS)
def test_solved_rows_leave_and_the_others_do_not_notice(name):
    x, prepare, _ = problem("linear")
    extra = SMALL.get(name, {})
    torch.manual_seed(3)
    full = make(name, prepare, Linf(0.2), num_steps=15, **extra)(x)
    # Two images can get above the threshold, two cannot.
    threshold = full.objective[0].sort().values[1:3].mean().item()
    torch.manual_seed(3)
    early = make(name, prepare, Linf(0.2), num_steps=15, stop=attacks.reaches(threshold), **extra)(
        x
    )
    solved = early.solved[0]
    assert torch.equal(solved, full.objective[0] >= threshold)
    assert (early.objective[0][solved] >= threshold).all()
    assert_same(early.x_adv[0][~solved], full.x_adv[0][~solved])
    spent = (early.num_gradients + early.num_queries)[0]
    assert (spent[solved] < (full.num_gradients + full.num_queries)[0][solved]).all()
    assert torch.equal(spent[~solved], (full.num_gradients + full.num_queries)[0][~solved])
    assert not full.solved.any()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_image_that_meets_the_criterion_counts_though_another_is_higher(name):
    """As a wrong class may have less cross-entropy than a right one. Attacks start just below a
    peak, and step over it by more: what is asked for lies beyond."""
    x = torch.full((8, 1, 1, 1), 0.5, dtype=torch.float64)

    def peak(x_ref):
        return lambda x: -(x - 0.5).abs().flatten(1).sum(1)

    def beyond(x_ref):
        return lambda x, value: (x > 0.52).flatten(1).all(1)

    def start(x_ref, streams):
        return x_ref - 0.001

    settings = {**SMALL.get(name, {}), "num_steps": 10, "start": start}
    result = make(name, peak, Linf(0.1), stop=beyond, **settings)(x)
    assert result.solved.all()
    assert (result.x_adv > 0.52).all()
    assert (result.objective < -0.02).all()


def test_the_papers_start_outside_the_ball_meets_no_criterion():
    """The published start is as large as 0.2 per pixel: its objective is not that of its
    projection."""
    x = torch.full(SHAPE, 0.5, dtype=torch.float64)

    def distance(x_ref):
        return lambda y: (y - x_ref).square().sum((1, 2, 3))

    attack = attacks.PGD(distance, Linf(0.05), num_steps=30, preset="paper")
    goal = 0.99 * attack(x, torch.Generator().manual_seed(1)).objective.min().item()
    stopping = dataclasses.replace(attack, stop=attacks.reaches(goal))
    result = stopping(x, torch.Generator().manual_seed(1))
    assert result.solved.all()
    assert (result.objective >= goal).all()


def test_criterion_on_classes_and_targets_follow_rows_that_leave():
    torch.manual_seed(1)
    vae, classifier = LinearGaussianVAE(), LinearClassifier(3, 4).double()
    x = torch.rand(12, 1, 4, 4).double()
    labels = classifier.classify(vae, x)
    attack = attacks.APGD(
        attacks.dlr(vae, classifier, labels),
        Linf(0.15),
        num_steps=30,
        stop=attacks.misclassified(vae, classifier, labels),
    )
    result = attack(x)
    changed = classifier.classify(vae, result.best()) != labels
    assert torch.equal(result.solved[0], changed)
    assert 0 < changed.sum() < 12
    assert (result.num_gradients[0][changed] < 30).all()
    # The runners-up.
    targets = classifier(program.posterior_mean(vae, x)).topk(2).indices[:, 1]
    towards = dataclasses.replace(
        attack,
        objective=attacks.dlr(vae, classifier, labels, targets=targets),
        stop=attacks.misclassified(vae, classifier, targets=targets),
        ball=Linf(0.5),
    )(x)
    assert torch.equal(classifier.classify(vae, towards.best()) == targets, towards.solved[0])
    assert towards.solved.any()


class _Interrupt(Exception):
    pass


@pytest.mark.parametrize("stop", [None, attacks.reaches(-8.0)], ids=["all", "early exit"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_resumes_where_it_was_interrupted(name, stop, tmp_path):
    x, prepare, _ = problem("quadratic")
    extra = SMALL.get(name, {})
    settings = {"num_steps": 10, "num_restarts": 2, "batch_size": 5, "stop": stop, **extra}
    path = tmp_path / "progress.pt"
    calls = []

    def counting(budget):
        def counted(x_ref, streams):
            inner = prepare(x_ref, streams)

            def objective(y):
                calls.append(1)
                if len(calls) > budget:
                    raise _Interrupt
                return inner(y)

            return objective

        return counted

    torch.manual_seed(3)
    whole = make(name, counting(10**6), L2(0.5), **settings)(x)
    total = len(calls)
    calls.clear()
    torch.manual_seed(3)
    keep = {**settings, "checkpoint": path, "checkpoint_every": 2}
    with pytest.raises(_Interrupt):
        make(name, counting(total - 4), L2(0.5), **keep)(x)
    assert path.exists()
    calls.clear()
    # Another seed now: the file's is used.
    resumed = make(name, counting(10**6), L2(0.5), **keep)(x)
    assert len(calls) < total / 2
    for one, other in zip(whole, resumed):
        assert torch.equal(one, other)
    assert not path.exists()


def test_a_checkpoint_writes_each_finished_part_once(tmp_path, monkeypatch):
    """All of them at every write made the cost quadratic in the number of images."""
    x = problem("quadratic")[0][:1].repeat(8, 1, 1, 1)
    left, sizes, save = [math.inf], [], base.atomic_save

    def limited(x_ref):
        def objective(y):
            left[0] -= 1
            if left[0] < 0:
                raise _Interrupt
            return (y * x.new_tensor([1.0, -1.0, 2.0, 0.5])).flatten(1).sum(1)

        return objective

    def counted(contents, path):
        sizes.append(sum(v.numel() for v in tree_leaves(contents) if isinstance(v, torch.Tensor)))
        save(contents, path)

    monkeypatch.setattr(base, "atomic_save", counted)
    path, seed = tmp_path / "c.pt", torch.Generator().manual_seed
    attack = attacks.PGD(limited, L2(0.5), 2, batch_size=1)
    keep = dataclasses.replace(attack, checkpoint=path)
    whole = attack(x, seed(4))

    def same(found):
        assert all(torch.equal(one, other) for one, other in zip(whole, found))
        assert not list(tmp_path.iterdir())

    same(keep(x, seed(4)))
    of_result = sum(v.numel() for v in whole) - whole.x_ref.numel()
    assert sum(sizes) <= of_result + 8 * 9  # and whether gradients were finite, at each write

    def interrupt():
        left[0] = 14  # evaluations, which finish some of the eight parts
        with pytest.raises(_Interrupt):
            keep(x, seed(4))
        left[0] = math.inf

    interrupt()
    assert len(list(tmp_path.glob("c.pt.part*"))) > 1
    same(keep(x, seed(5)))
    # A file of an earlier version, which held the parts itself.
    interrupt()
    saved = torch.load(path)
    parts = [torch.load(tmp_path / f"c.pt.part{n}") for n in range(saved["finished"])]
    own = [{k: v for k, v in part.items() if k not in ("identity", "seed")} for part in parts]
    for part in tmp_path.glob("c.pt.part*"):
        part.unlink()
    torch.save(saved | {"finished": own}, path)
    same(keep(x, seed(5)))
    # Parts of another run, or none.
    interrupt()
    torch.save(parts[0] | {"seed": 5}, tmp_path / "c.pt.part0")
    with pytest.raises(ValueError, match=r"c\.pt\.part0' belongs to another attack .*; delete"):
        keep(x)
    (tmp_path / "c.pt.part0").unlink()
    with pytest.raises(ValueError, match=r"c\.pt\.part0 of checkpoint .* cannot be read"):
        keep(x)


def test_a_place_where_no_checkpoint_can_be_is_found_before_any_step(tmp_path):
    x = problem("quadratic")[0]
    steps = []
    counting = lambda x_ref: lambda y: steps.append(1)  # noqa: E731
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "c.pt", tmp_path):
        with pytest.raises(ValueError, match=f"checkpoint {place} cannot be written"):
            attacks.PGD(counting, L2(0.5), 3, checkpoint=place)(x)
    assert not steps


def test_a_checkpoint_stays_where_it_was_asked_for(tmp_path, monkeypatch):
    x = problem("quadratic")[0]
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    calls = []

    def wandering(x_ref):
        def objective(y):
            monkeypatch.chdir(tmp_path / "there")
            calls.append(1)
            if len(calls) == 3:
                raise _Interrupt
            return y.flatten(1).sum(1)

        return objective

    with pytest.raises(_Interrupt):
        attacks.PGD(wandering, L2(0.5), 3, checkpoint="c.pt", checkpoint_every=1)(x)
    assert (tmp_path / "here" / "c.pt").exists()
    assert not list((tmp_path / "there").iterdir())


def test_checkpoint_of_another_attack(tmp_path):
    x, prepare, _ = problem("quadratic")

    def failing(x_ref, streams):
        if streams.image[0] > 0:
            raise _Interrupt
        return prepare(x_ref, streams)

    path = tmp_path / "progress.pt"
    attack = attacks.PGD(failing, L2(0.5), 3, batch_size=1, checkpoint=path)
    with pytest.raises(_Interrupt):
        attack(x)
    for other in (
        dataclasses.replace(attack, ball=L2(0.6)),
        dataclasses.replace(attack, num_steps=4),
    ):
        with pytest.raises(ValueError, match="belongs to other images or settings"):
            other(x)
    with pytest.raises(ValueError, match="belongs to other images or settings"):
        attack(x.flip(0))
    content = path.read_bytes()
    for damaged in (content[:100], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"progress\.pt of an attack .*; delete it"):
            attack(x)
    torch.save({"identity": 1}, path)
    with pytest.raises(ValueError, match=r"progress\.pt of an attack .*'seed'.*; delete it"):
        attack(x)


def lengths_of_apgd(prepare, num_steps, x):
    """Step lengths of all rows in a ball of radius 0.1, step after step."""
    lengths = []

    class Recording(attacks.APGD):
        def _step(self, problem, state, t):
            state = super()._step(problem, state, t)
            lengths.append(state["length"].tolist())
            return state

    Recording(prepare, Linf(0.1), num_steps=num_steps)(x)
    return lengths


def test_apgd_checkpoints_and_halving(float64):
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(50)[0] == 11
    # A flat objective never improves: the step is halved at each checkpoint. A linear one always
    # does until it reaches the ball's border.
    x = torch.full((2, 1, 1, 1), 0.5)
    slope = torch.tensor([0.0, 1e-9]).reshape(2, 1, 1, 1)

    def prepare(x_ref):
        return lambda y: (slope * y).flatten()

    flat, sloped = zip(*lengths_of_apgd(prepare, 100, x))
    assert flat[21] == pytest.approx(0.2)
    assert flat[22] == pytest.approx(0.1)
    assert flat[99] == pytest.approx(0.2 / 2**8)
    assert sloped[99] == pytest.approx(0.2 / 2**8)


def test_apgd_steps_by_hand(float64):
    # One pixel, concave parabola: the formula of METHOD 7 with the first step plain.
    seen = []

    def prepare(x_ref):
        def objective(y):
            seen.append(y.item())
            return -(y - 0.53).square().flatten()

        return objective

    attacks.APGD(prepare, Linf(0.1), num_steps=9)(torch.full((1, 1, 1, 1), 0.5))

    def clip(value):
        return min(max(value, 0.4), 0.6)

    at = [seen[0]]
    at.append(clip(at[0] + (0.2 if at[0] < 0.53 else -0.2)))
    z = clip(at[1] + (0.2 if at[1] < 0.53 else -0.2))
    at.append(clip(at[1] + 0.75 * (z - at[1]) + 0.25 * (at[1] - at[0])))
    # checkpoints(9) starts at 2: one improving step of two at most, so halve and go back to the
    # best.
    assert checkpoints(9)[0] == 2
    best = max(at, key=lambda v: -((v - 0.53) ** 2))
    z = clip(best + (0.1 if best < 0.53 else -0.1))
    at.append(clip(best + 0.75 * (z - best) + 0.25 * (best - at[1])))
    assert seen[:4] == pytest.approx(at)


def test_apgd_is_its_algorithm_pixel_by_pixel(float64):
    """Against Algorithm 1 in plain numbers, on a curve with several maxima in the ball."""
    num_rows, num_steps, radius = 40, 20, 0.1
    x = torch.linspace(0.1, 0.9, num_rows).reshape(-1, 1, 1, 1)
    seen = []

    def prepare(x_ref):
        def objective(y):
            seen.append(y.detach().flatten())
            return ((25 * y).sin() + y).flatten()

        return objective

    attack = attacks.APGD(prepare, Linf(radius), num_steps, start=lambda x_ref, streams: x_ref)
    found = attack(x)
    seen = torch.stack(seen)
    halved = kept = 0
    for row in range(num_rows):
        reference = float(x[row])
        low, high = max(reference - radius, 0.0), min(reference + radius, 1.0)

        def value(y):
            return math.sin(25 * y) + y

        def moved(y, length, slope_at, low=low, high=high):
            slope = 25 * math.cos(25 * slope_at) + 1
            return min(max(y + math.copysign(length, slope), low), high)

        y = before = best = reference
        length, rises, checkpoint = 2 * radius, 0, 0
        record = last = value(best)
        for t in range(num_steps):
            assert float(seen[t, row]) == pytest.approx(y, abs=1e-9)
            rises += value(y) > last
            last = value(y)
            best = max(best, y, key=value)
            if t in checkpoints(num_steps):
                few, same = rises <= 0.75 * (t - checkpoint), value(best) == record
                halved, kept = halved + (few or same), kept + (not few and not same)
                if few or same:
                    y, length, last = best, length / 2, value(best)
                rises, checkpoint, record = 0, t, value(best)
            z = moved(y, length, y)
            step = z if t == 0 else y + 0.75 * (z - y) + 0.25 * (y - before)
            y, before = min(max(step, low), high), y
        best = max(best, y, key=value)
        assert float(found.objective[0, row]) == pytest.approx(value(best), abs=1e-9)
    assert min(halved, kept) > 10


def test_apgd_halves_by_either_condition(float64):
    """Of 8 steps up to the first checkpoint, 7 rise from a depth below the start, 6 to a new best
    value, which is 75% of them, or 7 to a new one."""
    rows = [
        [0.0, -9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0],
        [0.0, -1.0, -2.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        [0.0, -1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    ]
    # Up to the second one all rise from a depth.
    rows = [[*row, -9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0] for row in rows]
    calls = iter(torch.tensor(rows).T)

    def prepare(x_ref):
        return lambda y: next(calls, torch.zeros(3)) + 0.0 * y.flatten()

    lengths = lengths_of_apgd(prepare, 36, torch.full((3, 1, 1, 1), 0.5))
    assert checkpoints(36)[:2] == [8, 15]
    assert lengths[7] == pytest.approx([0.2, 0.2, 0.2])
    assert lengths[8] == lengths[14] == pytest.approx([0.1, 0.1, 0.2])
    assert lengths[15] == pytest.approx([0.05, 0.05, 0.1])


def test_momentum_remembers(float64):
    # The gradient changes its sign after a few steps; with momentum the iterate overshoots.
    def run(decay):
        seen = []

        def prepare(x_ref):
            def objective(y):
                seen.append(y.item())
                return -(y - 0.45).abs().flatten()

            return objective

        torch.manual_seed(0)
        x = torch.full((1, 1, 1, 1), 0.5)
        attacks.MomentumPGD(prepare, Linf(0.1), num_steps=20, step_size=0.02, decay=decay)(x)
        assert seen[0] > 0.47
        return min(seen)

    assert run(1.0) < run(0.0) - 0.01


@pytest.mark.parametrize("name", OPTIMISERS)
def test_stays_on_the_device_of_the_images(name):
    x = torch.empty(*SHAPE, device="meta", dtype=torch.float32)
    extra = SMALL.get(name, {})

    def prepare(x_ref):
        return lambda y: (y - x_ref).square().flatten(1).sum(1)

    # Three steps: APGD's first checkpoint is before the third.
    # What every ball does, PGD shows; but for Square, the others do not ask which it is.
    for ball in BALLS if name == "PGD" else BALLS[:2] if name == "Square" else BALLS[:1]:
        result = make(name, prepare, ball, num_steps=3, **extra)(x)
        assert {value.device.type for value in result} == {"meta"}
        assert result.x_adv.dtype == result.objective.dtype == torch.float32


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", EVERY)
def test_rows_without_a_finite_value_stay_in_the_ball(name, value):
    def prepare(x_ref, streams):
        broken = torch.where(streams.image == 0, value, 1.0)
        return lambda y: (broken[:, None] * y.flatten(1)).sum(1)

    x = torch.full((2, 1, 4, 4), 0.5)
    extra = SMALL.get(name, {})
    result = make(name, prepare, Linf(0.1), num_steps=20, **extra)(x)
    assert result.x_adv.isfinite().all()
    assert ((result.x_adv[0] - x).abs() <= 0.1).all()
    assert result.objective[0, 1] > 8.0


@pytest.mark.parametrize(
    ("optimiser", "settings", "message"),
    [
        (attacks.APGD, {"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        (attacks.APGD, {"stop": 3}, "stop must be a prepared criterion"),
        (attacks.APGD, {"checkpoint_every": 0}, "checkpoint_every must be an integer"),
        (attacks.MomentumPGD, {"decay": -1.0}, "decay must be at least 0 and finite, got -1.0"),
        (attacks.MomentumPGD, {"decay": math.inf}, "decay must be at least 0 and finite, got inf"),
        (attacks.MomentumPGD, {"step_size": 0.0}, "step_size must be a positive .* got 0.0"),
        (attacks.PGD, {"step_size": math.inf}, "step_size must be a positive .* got inf"),
        (attacks.PGD, {"step_size": True}, "step_size must be a positive .* got True"),
        (attacks.LBFGS, {"memory": 0}, "memory must be an integer of at least 1, got 0"),
        (attacks.LBFGS, {"inner_steps": 0}, "inner_steps must be an integer of at least 1"),
        (attacks.Square, {"ball": L1(3.0)}, "Square needs an Linf or L2 ball"),
        (attacks.Square, {"share": 0.0}, r"share must lie in \(0, 1\], got 0.0"),
        (attacks.NES, {"num_directions": 5}, "num_directions must be even, got 5"),
        (attacks.NES, {"scale": -1.0}, "scale must be a positive .* got -1.0"),
        (attacks.NES, {"scale": math.inf}, "scale must be a positive .* got inf"),
    ],
)
def test_bad_settings(optimiser, settings, message):
    with pytest.raises(ValueError, match=message):
        optimiser(**{"objective": problem("linear")[1], "ball": Linf(0.1), **settings})


@pytest.mark.parametrize("threshold", ["3", torch.ones(2), math.nan])
def test_a_threshold_is_one_number(threshold):
    with pytest.raises(ValueError, match="threshold must lie in"):
        attacks.reaches(threshold)


# --- The r-robustness margin ----------------------------------------------------------------------


class PixelVAE:
    """Encodes the mean of an image with hardly any noise and decodes it into every pixel."""

    def model(self, x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0], 1), 1.0).to_event(1))
            mean = z[:, :, None, None].expand(-1, 1, 4, 4)
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(3), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(x.mean((2, 3)), 1e-4).to_event(1))


def test_r_margin_brackets_the_exact_margin(float64):
    # An L_inf perturbation of radius R moves each of 16 decoded pixels by R, the image by 4 R,
    # where the range of images leaves room: margins are r / 4, and infinite where the radius needed
    # is not tried.
    vae = PixelVAE()
    x = torch.stack([torch.full((1, 4, 4), value) for value in (0.5, 0.3, 0.7)])
    attack = attacks.PGD(attacks.maximum_damage(vae), Linf(0.3), 10)
    margin = attacks.r_margin(vae, attack, x, r=0.4, num_draws=4)
    assert (margin.survived <= 0.1).all()
    assert (margin.broken >= 0.1 - 1e-3).all()
    assert torch.allclose(margin.broken - margin.survived, torch.tensor(0.3 / 2**6))
    never = attacks.r_margin(vae, attack, x, r=2.0, num_bisections=2, num_draws=4)
    assert never.survived.tolist() == pytest.approx([0.3] * 3)
    assert never.broken.isinf().all()
    # Two reconstructions of the same image differ by more: nothing to be robust about.
    noise = attacks.r_margin(vae, attack, x, r=1e-6, num_bisections=2, num_draws=4)
    assert noise.survived.tolist() == noise.broken.tolist() == [0.0] * 3


def test_r_margin_decides_in_the_attacks_micro_batches(float64, monkeypatch):
    vae, x = PixelVAE(), torch.rand(5, 1, 4, 4)
    sizes, decode = [], program.Decoder.__call__

    def counted(self, latents, images):
        sizes.append(len(images))
        return decode(self, latents, images)

    monkeypatch.setattr(program.Decoder, "__call__", counted)
    attack = attacks.PGD(attacks.maximum_damage(vae), L2(0.8), num_steps=2)
    found = []
    for batch_size in (5, 2):
        sizes.clear()
        attack = dataclasses.replace(attack, batch_size=batch_size)
        generator = torch.Generator().manual_seed(1)
        found.append(attacks.r_margin(vae, attack, x, 0.4, num_bisections=2, generator=generator))
        assert max(sizes) == batch_size
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_r_margin_of_images_without_a_gradient_at_smaller_radii(float64):
    """What the largest radius shows is not lost."""

    class Dark(PixelVAE):
        """Does not see pixels of 0.3 and less, and has no gradient where it sees none."""

        def guide(self, x):
            with pyro.plate("data", x.shape[0]):
                seen = (x * (x > 0.3)).square().mean((2, 3)).sqrt()
                pyro.sample("z", dist.Normal(seen, 1e-4).to_event(1))

    vae, x = Dark(), torch.full((1, 1, 4, 4), 0.05)
    attack = attacks.PGD(attacks.maximum_damage(vae), Linf(0.9), 10)
    margin = attacks.r_margin(vae, attack, x, r=0.4, num_draws=4)
    # A pixel is seen from 0.25 on; where all starts are dark nothing moves.
    assert 0.25 - 0.9 / 2**6 <= float(margin.survived) < float(margin.broken) < 0.9


@pytest.mark.parametrize("kind", [attacks.PGD, attacks.Square])
def test_r_margin_of_an_objective_that_is_never_finite_is_refused(kind):
    attack = kind(lambda x_ref: lambda x: x.flatten(1).sum(1) * torch.nan, Linf(0.3), 2)
    with pytest.raises(ValueError, match="objective is not finite at any of the 1 attacked"):
        attacks.r_margin(PixelVAE(), attack, torch.rand(1, 1, 4, 4), 0.4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0.0}, "r must be a positive finite number, got 0.0"),
        ({"num_bisections": -1}, "num_bisections must be an integer of at least 0, got -1"),
        ({"num_draws": 0}, "num_draws must be an integer of at least 1, got 0"),
        ({"attack": attacks.maximum_damage}, "attack must be an attack such as PGD"),
    ],
)
def test_r_margin_settings(settings, message):
    vae = PixelVAE()
    attack = attacks.PGD(attacks.maximum_damage(vae), Linf(0.3), 1)
    x = torch.rand(1, 1, 4, 4)
    with pytest.raises(ValueError, match=message):
        attacks.r_margin(vae, **{"attack": attack, "x_ref": x, "r": 1.0, **settings})


def test_pairs_without_a_finite_value_are_left_out_of_an_estimate(float64):
    """One such query of an image made its whole estimate none, and the image stood still."""
    steps = torch.randn(4, 3, 1, 2, 2)
    slope = torch.randn(1, 2, 2)

    def value(step):
        bad = torch.tensor([False, bool((step[1] == 0.1 * steps[2, 1]).all()), True])
        return torch.where(bad, torch.nan, (step * slope).flatten(1).sum(1))

    found = blackbox.antithetic_gradient(value, lambda i: steps[i], 4, 0.1)
    along = (steps * slope).sum((2, 3, 4), keepdim=True) * steps
    torch.testing.assert_close(found[0], along[:, 0].mean(0))
    torch.testing.assert_close(found[1], along[[0, 1, 3], 1].mean(0))
    assert found[2].isnan().all()


def test_an_attack_without_gradients_moves_images_beside_ones_without_a_value(float64):
    """Of one query in five, so that hardly a step had values of all 50."""
    x = torch.full((4, 1, 4, 4), 0.5)

    def prepare(x_ref):
        def objective(y):
            seen = (1e4 * y.flatten(1).sum(1)).frac() <= 0.8
            return torch.where(seen, y[:, 0, 1:].sum((1, 2)), torch.nan)

        return objective

    for attack in (
        attacks.NES(prepare, L2(0.5), 20),
        attacks.PGD(adaptive.nes(prepare, 25, scale=1e-3), L2(0.5), 20),
    ):
        found = attack(x, torch.Generator().manual_seed(0)).objective
        assert (found > 0.5 * 12 + 0.5 * 0.5 * 12**0.5).all()
