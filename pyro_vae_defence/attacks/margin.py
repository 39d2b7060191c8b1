r"""The r-robustness margin: how far an attacker may go before most outputs move by more than r.

An encoder is random, so robustness at :math:`x` is a statement about the distribution of
reconstructions: the VAE is r-robust to a perturbation :math:`\varepsilon` if

.. math:: \Pr\bigl( \| g(\tilde z_\varepsilon) - g(\tilde z) \|_2 \le r \bigr) > \tfrac12, \qquad
          \tilde z_\varepsilon \sim q(z|x + \varepsilon), \; \tilde z \sim q(z|x),

and its margin :math:`R^r(x)` is the largest radius such that it is r-robust to every perturbation
in the ball. An attack can only show that a radius is too large, hence bisection over radii gives an
*upper* estimate of the margin, as good as the attack.

Reference: Camuto, Willetts, Roberts, Holmes, Rainforth, "Towards a theoretical understanding of the
robustness of variational autoencoders", AISTATS 2021, https://arxiv.org/abs/2007.07365 (definitions
1 and 2)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae_defence.attacks.base import Attack
from pyro_vae_defence.attacks.objectives._rows import draws, reconstruct
from pyro_vae_defence.models.conditions import rows_of, split, take
from pyro_vae_defence.models.program import at_images, evaluation_mode
from pyro_vae_defence.ops.boundary import public
from pyro_vae_defence.ops.checks import check_integer, check_positive
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import VAE, ImagesLike


class RMargin(NamedTuple):
    """Brackets of the margin per image, in the units of the ball.

    Attributes:
        survived: ``(N,)``, the largest radius tried at which the attack failed; 0 if there is none.
        broken: ``(N,)``, the smallest radius tried at which it succeeded; infinite if there is
            none, and 0 where two reconstructions of the reference mostly differ by more than r.
    """

    survived: Tensor
    broken: Tensor


@public
def r_margin(
    vae: VAE,
    attack: Attack,
    x_ref: ImagesLike,
    r: float,
    *,
    num_bisections: int = 6,
    num_draws: int = 20,
    generator: torch.Generator | None = None,
) -> RMargin:
    """Estimate the r-robustness margin of each image by bisection over attack radii.

    Args:
        vae: any Pyro VAE.
        attack: e.g. ``PGD(maximum_damage(vae), L2(5.0))``, whose ball has the largest radius of
            interest. Any restart that succeeds counts. Its ``batch_size`` bounds decisions, too.
        x_ref: reference images ``(N, C, H, W)`` in [0, 1], or ``(x_ref, *conditions)``.
        r: largest Euclidean distance between reconstructions that is tolerated, > 0.
        num_bisections: radii tried after the largest; each halves the bracket.
        num_draws: pairs of reconstructions per decision, with noise the attack has not seen.
        generator: source of the run's seed; torch's global seed when ``None``.

    Raises:
        ValueError: for a bad setting, or as the attack with its largest radius.
    """
    if not isinstance(attack, Attack):
        raise ValueError(
            f"attack must be an attack such as PGD(maximum_damage(vae), L2(5.0)), got {attack!r}"
        )
    conditions = split(x_ref, "x_ref")[1]
    vae, x_ref = at_images(vae, x_ref, "x_ref")
    check_integer("num_draws", num_draws)
    check_positive("r", r)
    check_integer("num_bisections", num_bisections, 0)
    attack._check_entries(len(x_ref))
    references = x_ref
    num_images, largest = x_ref.shape[0], attack.ball.radius
    # The attack's noise is the same at every radius; that of the decisions is fresh.
    attacker, *decider = (draw_seed(generator) for _ in range(3))

    def breaks(index: Tensor, radius: float) -> Tensor:
        """Whether an attack on the images ``index`` succeeds within ``radius``, bool."""
        repeated = dataclasses.replace(
            attack, ball=dataclasses.replace(attack.ball, radius=radius), checkpoint=None
        )
        given = rows_of(conditions, index)
        # Bisected are those that the first attack, of all images, has broken.
        whole = radius == largest
        x_adv = repeated.attack_rows(references[index], index, attacker, given, whole).x_adv
        return torch.stack([differs(x, index) for x in x_adv]).any(0)

    def differs(x: Tensor, index: Tensor) -> Tensor:
        """Whether at least half of the reconstructions of ``x`` are more than r away."""
        parts = zip(x.split(attack.batch_size), index.split(attack.batch_size), strict=True)
        return torch.cat([some_differ(*part) for part in parts])

    @torch.no_grad()
    def some_differ(x: Tensor, index: Tensor) -> Tensor:
        streams = (Streams(seed, index, torch.zeros_like(index)) for seed in decider)
        read = reconstruct("sample", take(vae, index), x)
        far = []
        with evaluation_mode(vae):
            for noise, noise_ref in zip(*(draws(s, num_draws) for s in streams)):
                difference = read(x, noise) - read(references[index], noise_ref)
                far.append(difference.flatten(1).norm(dim=1) > r)
        return torch.stack(far).double().mean(0) >= 0.5

    every = torch.arange(num_images, device=x_ref.device)
    at_rest = differs(x_ref, every)
    at_most = breaks(every, largest)
    survived = x_ref.new_full((num_images,), largest).masked_fill(at_most | at_rest, 0.0)
    broken = torch.full_like(survived, torch.inf)
    broken = broken.masked_fill(at_most, largest).masked_fill(at_rest, 0.0)
    for _ in range(num_bisections):
        middle = 0.5 * (survived + broken)
        # Images with the same bracket are attacked together.
        for radius in middle[middle.isfinite() & (middle > 0)].unique().tolist():
            index = every[middle == radius]
            fell = breaks(index, radius)
            broken[index] = torch.where(fell, radius, broken[index])
            survived[index] = torch.where(fell, survived[index], radius)
    return RMargin(survived, broken)
