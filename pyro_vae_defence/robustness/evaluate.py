r"""How much of a defence the strongest of many attacks leaves.

:func:`evaluate_robustness` runs the attacks of :mod:`pyro_vae_defence.attacks.adaptive` on every
image within a budget and takes, image by image, the worst. A *figure* is one number per image and
draw of the randomised defence, higher for more robust: whether the predicted class is the label, or
the similarity of the attacked image's reconstruction to the reference's. With draws :math:`s = 1,
\dots, S` on seeds that no attack has seen, an image :math:`i` contributes

.. math::
    \text{mean: } \tfrac1S \sum_s m_{is}, \quad \text{single: } m_{i1}, \quad
    \text{worst of N: } \min_s m_{is}, \quad
    \text{averaged: the figure of the draws' mean output.}

Which attack is an image's worst is decided on other seeds than those it is reported on, so that the
minimum does not collect luck. Intervals are bootstrapped over images.

Randomness that the attacker cannot foresee is part of the threat model. What is left of a defence
without it, with a seed that is fixed and known, is asked for by ``defence_seed``: attacks then see
the very noise that is scored.

What a suite of attacks leaves is an upper bound of the true robustness: heuristic, not certified.
An attack that fails for want of a gradient looks like a robust defence, hence the *checks*:
symptoms of such failures, tested on the images at hand and reported as passed or failed. One that
fails makes the report unreliable, and so does an attack that applies to the defence and did not
run, by choice or for want of budget.

References: Carlini et al., "On evaluating adversarial robustness", 2019,
https://arxiv.org/abs/1902.06705; Athalye, Carlini, Wagner, "Obfuscated gradients give a false sense
of security", ICML 2018, https://arxiv.org/abs/1802.00420.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import pyro_vae_defence
from pyro_vae_defence.attacks import APGD, Attack, random_noise
from pyro_vae_defence.defence import Defence, DefendedClassifier
from pyro_vae_defence.defence.base import check_defence
from pyro_vae_defence.defence.result import setting
from pyro_vae_defence.defence.store import fingerprint, held_by, weights_fingerprint
from pyro_vae_defence.models import program
from pyro_vae_defence.models.conditions import kept, same_vae, split
from pyro_vae_defence.models.modules import networks_of
from pyro_vae_defence.ops.balls import Ball, Linf, check_ball
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import check_flag, check_integer, is_integer
from pyro_vae_defence.ops.files import check_writable
from pyro_vae_defence.ops.locks import sole_writer
from pyro_vae_defence.ops.streams import draw_seed
from pyro_vae_defence.robustness.budget import Budget
from pyro_vae_defence.robustness.checks import CHECKS, Evidence, Seen
from pyro_vae_defence.robustness.contract import Trial
from pyro_vae_defence.robustness.cost import chain_cost, suite_gradients
from pyro_vae_defence.robustness.earlier import check_earlier, check_same_defence, of_earlier
from pyro_vae_defence.robustness.report import AttackOutcome, Check, RobustnessReport, conclude
from pyro_vae_defence.robustness.scoring import (
    Accuracy,
    Fresh,
    Scorer,
    Scores,
    make_scorer,
    worst_case,
)
from pyro_vae_defence.robustness.steps import Steps
from pyro_vae_defence.robustness.suite import ATTACKS, KNOWLEDGE, Suite
from pyro_vae_defence.robustness.whitebox import WhiteBox
from pyro_vae_defence.types import VAE, ImagesLike

_EXAMPLES = 8  # images that a report shows


@public
@torch.enable_grad()
def evaluate_robustness(
    vae: VAE,
    defence: Defence,
    x: ImagesLike,
    labels: Tensor | None = None,
    *,
    classifier: Callable[..., Tensor] | None = None,
    ball: Ball | None = None,
    budget: Budget | None = None,
    attacks: Sequence[str] | None = None,
    engine: Callable[..., Any] = APGD,
    similarity: Callable[[Tensor, Tensor], Tensor] | None = None,
    checks: bool = True,
    defence_seed: int | None = None,
    earlier: RobustnessReport | None = None,
    generator: torch.Generator | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    keep_checkpoint: bool = False,
    progress: bool = False,
) -> RobustnessReport:
    """Attack a defence with everything and report the worst case.

    Args:
        vae: any Pyro VAE, which the attacker knows.
        defence: what the attacker attacks: :class:`~pyro_vae_defence.defence.NoDefence`,
            :class:`~pyro_vae_defence.defence.MCMCDefence`, or images to a ``DefenceResult``. If it
            has an attribute ``vae``, that is the one given here.
        x: reference images ``(N, C, H, W)`` in [0, 1], N >= 2, or ``(x, *conditions)``, which the
            attacker knows and does not change.
        labels: their classes, int64 ``(N,)``; those predicted undefended when ``None``.
        classifier: measures accuracy instead of similarity. Latents ``(M, D)`` to scores ``(M,
            classes)``, asked about where the defence ends; or a
            :class:`~pyro_vae_defence.defence.DefendedClassifier` of this very defence.
        ball: where perturbations live; ``Linf(0.1)`` by default.
        budget: how hard to try; :meth:`Budget.standard` by default.
        attacks: names in :data:`~pyro_vae_defence.robustness.suite.ATTACKS`; all by default.
            Without one that applies to the defence the report counts as unreliable.
        engine: optimiser of the attacks, called as ``engine(objective, ball, num_steps=,
            num_restarts=, batch_size=)``, and with ``start=``
            (:mod:`~pyro_vae_defence.attacks.starts`) for the later stages of *continuation*, which
            is left out where the engine does not take it. What it returns, called as an attack, has
            images ``x_adv``, ``(restarts, N, C, H, W)``, in the ball.
        similarity: of reconstructions in pairs, differentiable, 1 if equal; the paper's MSSSIM.
        checks: run the sanity checks; without them the report counts as unreliable.
        defence_seed: a seed that the defence always runs with, and that the attacker knows:
            ``defence(x, torch.Generator().manual_seed(defence_seed))``, all images in one call. A
            figure is then that of one run, since all runs are the same. ``None`` for fresh noise in
            every run, which no attacker foresees.
        earlier: a report of the same evaluation with fewer attacks, with its images, as
            :func:`~pyro_vae_defence.robustness.published.load_attacked` reads it. Its attacks do
            not run again and keep their figures; its worst images are a candidate beside what the
            others find, and all candidates, and all checks, are scored anew.
        generator: source of the seed; torch's global seed when ``None``.
        checkpoint: a file for what has been found so far, written after every attack. The
            same call goes on from it where it is there, with its seed, and deletes it at the end.
            One process at a time writes it.
        keep_checkpoint: leave the file, with which the same call returns the same report at once:
            delete it when the report is safe.
        progress: show a progress bar, of decoder gradients per image: how many there will be at
            most, by :mod:`~pyro_vae_defence.robustness.cost`, and how long they take at the present
            rate.

    Raises:
        ValueError: if an argument does not fit, a defence or classifier of one's own does not keep
            its contract (:mod:`~pyro_vae_defence.robustness.contract`), or images of the engine
            leave the ball.
    """
    conditions = kept(split(x)[1])
    vae, x = program.at_images(vae, x)
    x = kept(x)
    check_defence(defence, needs_vae=False)
    check_same(vae, defence, classifier)
    if len(x) < 2:
        raise ValueError(f"x holds {len(x)} image: intervals need two or more")
    ball = check_ball(Linf(0.1) if ball is None else ball)
    if not (budget is None or isinstance(budget, Budget)):
        raise ValueError(f"budget must be a Budget such as Budget.quick(), got {budget!r}")
    if not callable(engine) or isinstance(engine, Attack):
        raise ValueError(f"engine must be an optimiser such as attacks.APGD itself, got {engine!r}")
    check_flag("checks", checks)
    named = (attacks,) if isinstance(attacks, str) else attacks
    attacks = tuple(KNOWLEDGE if named is None else named)
    unknown = sorted(set(attacks) - set(KNOWLEDGE))
    if unknown or not attacks:
        raise ValueError(
            f"attacks must be names among {', '.join(KNOWLEDGE)}, got {unknown or attacks}"
        )
    if not (earlier is None or isinstance(earlier, RobustnessReport)):
        raise ValueError(f"earlier must be a RobustnessReport, got {earlier!r:.100}")
    labels = kept(check_labels(labels, x, classifier))
    defence_seed = check_seed(defence_seed)
    budget = budget or Budget.standard()
    identity = ""
    if checkpoint is not None:
        check_writable(checkpoint)
        given = (
            ball,
            dataclasses.asdict(budget),
            attacks,
            _own(engine),
            _own(similarity),
            checks,
            defence_seed,
            *(() if earlier is None else (earlier.seed, earlier.x_adv)),
        )
        identity = fingerprint(
            x, labels, conditions, weights_fingerprint(vae), _own(defence), _own(classifier), given
        )
    alone = contextlib.nullcontext() if checkpoint is None else sole_writer(checkpoint)
    with alone, program.evaluation_mode(vae, classifier):
        steps = Steps(checkpoint, identity, draw_seed(generator), x.device)
        fresh = Fresh(steps.seed)
        box = WhiteBox(vae, defence, x, fresh, conditions, defence_seed)
        scorer = make_scorer(box, x, labels, classifier, similarity, fresh)
        suite = Suite(box, scorer, x, ball, budget, engine)
        steps.begin(box, fresh)
        chain = chain_cost(defence)
        known = {each.name for each in earlier.attacks} if earlier else set()
        to_run = [name for name in attacks if name not in known]
        expected = suite_gradients(chain, suite.budget, len(x), to_run, checks)
        total = sum(expected.values())
        with tqdm(
            total=total, unit="gradient", unit_scale=True, disable=not progress, leave=False
        ) as bar:
            report = _report(suite, conditions, attacks, checks, earlier, steps, expected, bar)
        if not keep_checkpoint:
            steps.finish()
    return report


def _read_by(scorer: Scorer) -> Any:
    """The classifier of latents, if there is one."""
    return scorer.classifier.classifier if isinstance(scorer, Accuracy) else None


def _own(value: Any, depth: int = 5) -> Any:
    """What a defence, a classifier or a function holds, for a fingerprint, but for what is known
    otherwise: of dataclasses their fields, of other objects their attributes, of functions what
    they close over."""
    if depth == 0 or isinstance(value, (type, nn.Module, Tensor)):
        return value
    own = functools.partial(_own, depth=depth - 1)
    if isinstance(value, Mapping):
        return {name: own(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [own(part) for part in value]
    if isinstance(value, functools.partial):
        return own([value.func, value.args, value.keywords])
    if isinstance(value, MethodType):
        return own([value.__func__, value.__self__])
    if isinstance(value, FunctionType):
        return own(held_by(value))
    if dataclasses.is_dataclass(value):
        held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    else:
        slots = (getattr(each, "__slots__", ()) for each in type(value).__mro__)
        names = [n for each in slots for n in ((each,) if isinstance(each, str) else each)]
        held = {name: getattr(value, name) for name in names if hasattr(value, name)}
        held |= getattr(value, "__dict__", {})
    if not held:
        return value
    apart = ("vae", "defence", "batch_size", "progress", "prepare")
    return [type(value).__qualname__, own({k: v for k, v in held.items() if k not in apart})]


def check_seed(defence_seed: Any) -> int | None:
    """The seed; what is none of a generator is refused."""
    if defence_seed is None:
        return None
    check_integer("defence_seed", defence_seed, 0)
    if defence_seed >= 2**63:
        raise ValueError(f"defence_seed must be below 2**63, got {defence_seed!r}")
    return int(defence_seed)


def check_same(vae: VAE, defence: Defence, classifier: Any) -> None:
    """Refuse a defence of another VAE, and a classifier behind another defence."""
    defended = getattr(defence, "vae", None)
    if defended is not None and not same_vae(vae, defended):
        raise ValueError(
            f"defence defends another VAE, a {type(defended).__name__}, than vae, so that the "
            "attacker would know the wrong model; pass defence.vae as vae"
        )
    if isinstance(classifier, DefendedClassifier) and classifier.defence is not defence:
        raise ValueError(
            "classifier is a DefendedClassifier of another defence than the one evaluated; make "
            "it of this one, DefendedClassifier(defence, ...)"
        )


def check_labels(labels: Any, x: Tensor, classifier: Any) -> Tensor | None:
    """Labels as int64 on the device of the images ``x``."""
    if labels is None:
        return None
    try:
        found = torch.as_tensor(labels, device=x.device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"labels must be classes, integers from 0 on, got {labels!r:.200}"
        ) from error
    if tuple(found.shape) != (len(x),):
        raise ValueError(f"labels must have shape ({len(x)},), got {tuple(found.shape)}")
    if classifier is None:
        raise ValueError(
            "labels are given without a classifier, so that nothing would be compared with them; "
            "pass classifier too, or leave labels out to measure similarity"
        )
    if not is_integer(found):
        raise ValueError(f"labels must be classes, integers from 0 on, got dtype {found.dtype}")
    return found.long()


def _report(
    suite: Suite,
    conditions: tuple[Tensor, ...],
    names: Sequence[str],
    checks: bool,
    earlier: RobustnessReport | None,
    steps: Steps,
    expected: Mapping[str, float],
    bar: Any,
) -> RobustnessReport:
    """Run the suite; the order of these lines decides which seed is used for what."""
    box, scorer, budget, x = suite.box, suite.scorer, suite.budget, suite.x
    threat_model = {
        "norm": suite.ball.norm_name,
        "radius": suite.ball.radius,
        "target": scorer.target,
        "reading": scorer.reading,
        **({} if box.seed is None else {"defence_seed": box.seed}),
    }
    weights = fingerprint(networks_of(box.vae), networks_of(_read_by(scorer)))
    ran, before_cost = set(), {"attack_evaluations_per_image": 0.0, "seconds": 0.0}
    if earlier is not None:
        check_earlier(earlier, suite, conditions, threat_model, weights, steps.seed)
        ran, before_cost = {each.name for each in earlier.attacks}, earlier.cost
    trial = Trial(suite, steps.seed)  # which no figure has
    answers = steps("trial", trial.before)
    idle = {row.name: why for row in ATTACKS if (why := suite.why_not(row))}
    other = [row for row in ATTACKS if row.name not in ran]
    table = [row for row in other if row.name in names and row.name not in idle]
    skipped = {row.name: idle.get(row.name, "not asked for") for row in other if row not in table}
    if earlier is not None:  # more draws of an attack that ran with few, for which it had no budget
        skipped |= {what: w for what, w in earlier.skipped.items() if what.split(" (")[0] in ran}

    def score(name: str, images: Callable[[], Tensor], num_draws: int) -> Scores:
        return Scores(*steps(name, lambda: tuple(scorer.score(images(), num_draws))))

    def clean_figures() -> tuple[Tensor, Tensor, float]:
        clock = time.perf_counter()
        figures = scorer.score(x, budget.scoring_draws)
        return *figures, (time.perf_counter() - clock) / figures.per_draw.numel()

    def clean_run() -> tuple[float, dict[str, Any]]:
        result = scorer.defence(x, scorer.fresh())
        # Whose defence it is may put anything there, and reports must not be lost when written.
        settings = json.loads(json.dumps(result.settings, default=setting))
        return float(result.num_gradients.double().mean()), settings

    *figures, clean_seconds = steps("clean", clean_figures)
    clean = Scores(*figures)
    gradients, settings = steps("clean run", clean_run)
    if earlier is not None:
        check_same_defence(earlier, settings)
    noise = score(
        "noise", lambda: random_noise(x, suite.ball, scorer.fresh()), budget.scoring_draws
    )
    found = []
    for each in suite.candidates(table, skipped, steps):
        found.append(each)
        bar.update(expected.get(each.row.name, 0.0) / len(suite.draws(each.row)))
        bar.set_postfix_str(each.row.name)
    scores = [
        score(f"score {number}", functools.partial(getattr, each, "x_adv"), budget.scoring_draws)
        for number, each in enumerate(found)
    ]
    # Leaving an image alone is an attack too: it counts errors on clean images.
    clean_selection = score("selection", lambda: x, budget.selection_draws).mean()
    offers = [(("none",) * len(x), x, clean_selection, clean)]
    offers += [
        ((each.row.name,) * len(x), each.x_adv, each.selection, of)
        for each, of in zip(found, scores, strict=True)
    ]
    if earlier is not None:
        assert earlier.x_adv is not None
        before = earlier.x_adv.to(x)
        selection = score("earlier selection", lambda: before, budget.selection_draws).mean()
        again = score("earlier score", lambda: before, budget.scoring_draws)
        offers.append((earlier.strongest, before, selection, again))
        past, past_scores = of_earlier(earlier, before, len(clean.per_draw))
        found, scores = [*past, *found], [*past_scores, *scores]
    strongest, x_adv, selections, figures_of = zip(*offers, strict=True)
    selection = torch.stack(selections)
    worst, winner = worst_case(clean, figures_of[1:], selection, budget.selection_draws)
    bar.update(expected["scoring"])
    spent = box.evaluations / len(x)
    evidence = Evidence(suite, found, scores, clean, noise, worst)

    def look() -> list[tuple[Any, ...]]:
        # One step, since what one check has tried serves others.
        looked = []
        for check in CHECKS if checks else ():
            seen = check.measure(evidence)
            looked.append((check.name, *seen, *check.judge(seen, scorer.interval)))
        return looked

    measured, verdicts, reasons = {}, [], []
    for name, seen_values, facts, *verdict in steps("checks", look):
        measured[name] = Seen(seen_values, facts)
        verdicts.append(Check(name, *verdict))
    reasons += trial.after(*answers)
    if not checks:
        reasons.append("no sanity check ran")
    if not found:
        reasons.append("no attack ran")
    elif box.has_chain and all(each.row.transfers for each in found):
        reasons.append("only transfer attacks ran: no attacker knew the defence")
    reasons += [
        f"attack {name} did not run: {why}" for name, why in skipped.items() if name not in idle
    ]
    outcomes = [
        AttackOutcome(
            each.row.name, each.num_draws, {}, each.evaluations, each.seconds, each.row.knowledge
        )
        for each in found
    ]
    values = {
        **{f"robust/{name}": value for name, value in worst.summaries().items()},
        **{f"clean/{name}": value for name, value in clean.summaries().items()},
        "undefended_clean": scorer.undefended,
        "random_noise": noise.mean(),
        **{each.place: score.mean() for each, score in zip(outcomes, scores, strict=True)},
    }
    attacked = torch.stack(x_adv)[winner, torch.arange(len(x), device=x.device)]
    few = slice(_EXAMPLES)
    shown = box.at(few)(attacked[few], scorer.fresh())
    return RobustnessReport(
        figure=scorer.figure,
        threat_model=threat_model,
        **conclude(values, outcomes, verdicts, reasons, scorer.of_figure),
        evidence={
            name: Seen(
                {key: value.detach().cpu() for key, value in seen.values.items()}, seen.facts
            )
            for name, seen in measured.items()
        },
        skipped=skipped,
        cost={
            "defence_gradients_per_image": gradients,
            "defence_seconds_per_image": clean_seconds,
            "attack_evaluations_per_image": spent + before_cost["attack_evaluations_per_image"],
            "seconds": steps.seconds + before_cost["seconds"],
        },
        seed=steps.seed,
        budget=json.loads(json.dumps(dataclasses.asdict(budget))),
        defence=settings,
        versions={
            "pyro_vae_defence": pyro_vae_defence.__version__,
            **{name: metadata.version(name) for name in ("torch", "pyro-ppl")},
        },
        strongest=tuple(strongest[k][image] for image, k in enumerate(winner.tolist())),
        x_adv=attacked,
        examples=torch.stack([x[few], attacked[few], shown.reconstruction]).cpu(),
        images=(fingerprint(x),),
        weights=weights,
        earlier_seeds=() if earlier is None else (*earlier.earlier_seeds, earlier.seed),
        x_ref=x,
        labels=scorer.labels if isinstance(scorer, Accuracy) else None,
        conditions=conditions,
    )
