r"""Gradients through a randomised, defended encoder for an attacker who knows it (4.4, C.3).

The defended encoder starts at :math:`z_0 \sim q(z|x)` and runs a chain to :math:`z_T = F(x, z_0;
\xi)`; the attacker maximises :math:`E[f(z_T)]`, with f a distance of latents, damage to the
reconstruction, or a classifier's loss. Nothing here knows what the chain is: it comes as a
callable. Eight gradients, by what they take for known:

1. *transfer*: the chain is the identity. The paper's attack.
2. *bpda*: the true :math:`z_T`, with :math:`dz_T/dz_0 = I` and :math:`\partial F/\partial x = 0`.
3. *unroll*: through a differentiable chain with its noise and decisions frozen
   (:mod:`pyro_vae_defence.mcmc.unrolled`).
4. *truncated*: T - K transitions without gradient, then K unrolled, the start of which is constant.
5. *implicit*: as if :math:`z_T` were the mode of :math:`U(\cdot; x)`, where :math:`\nabla_z U = 0`
   gives :math:`dz/dx = -(\nabla_z^2 U)^{-1} \nabla_x \nabla_z U`. The system :math:`\nabla_z^2 U\,
   w = \nabla f` is solved by conjugate gradients on Hessian-vector products, and the gradient is
   :math:`-\nabla_x \langle w, \nabla_z U \rangle`.
6. *equilibrium*: with the chain at stationarity, :math:`z \sim p(z|x) \propto e^{-U(z; x)}`,

   .. math:: \nabla_x E[f(z)] = -\mathrm{Cov}(f(z), \nabla_x U(z; x)),

   from draws of independent chains, which go on from where the attacker's last step left them. No
   gradient goes through the chain. For :math:`U_0`, :math:`-\nabla_x U = \nabla_x \log p(x|z)`: the
   decoder's logits for a Bernoulli likelihood, :math:`(\mu - x)/\sigma^2` for a Gaussian one. For
   the perturbation-aware :math:`U_\delta` the same identity holds with its own derivative.
   :math:`U_\delta` is a minimum over :math:`x^*` in a box that moves with x, so (envelope theorem)
   a pixel contributes :math:`\partial \log p(x^*|z) / \partial x^*_i` where the side :math:`x_i \pm
   \delta` of the box holds :math:`x^*_i`, and nothing where the range [0, 1] or the likelihood's
   own maximum does: there the defence does not see x move.
7. *nes*: a black box, from values alone, by antithetic Gaussian smoothing,
   :math:`\frac{1}{2 \sigma n} \sum_j [f(x + \sigma u_j) - f(x - \sigma u_j)] u_j`, along directions
   of independent pixels, or of low frequency, and over pairs of finite values.
8. *evidence*, for classes: with A the latents that are read as the right one and :math:`M_A =
   \int_A e^{-U(z; x)} dz`, what decides is :math:`\log M_{\neg A} - \log M_A`. Its gradient,

   .. math:: E_A[\nabla_x U(z; x)] - E_{\neg A}[\nabla_x U(z; x)],

   comes from two populations of chains, each kept in its set, and does not vanish where all draws
   of a defence agree on a class, as every other gradient of the class does.

Of these 1 to 5 are *pathwise*: a :class:`DefendedEncoder`, whose values are the defence's latents
and whose derivative is the estimate; :func:`expected` makes an objective of it by averaging over
draws (EOT). 6 and 7 are objectives whose value is the estimated :math:`E[f]` and whose derivative
is the estimate; the value of 8 is the difference of mean energies. All take where chains start,
``start``, the ``chain``, called without gradient unless it is unrolled, and perhaps ``resume``, a
few transitions that stand for the chain where it goes on from its end at the attacker's last step.
An objective's noise is fresh with every call, unless ``resample=False`` freezes it (common random
numbers).

Biases. Unroll is exact for one trajectory, not for how decisions depend on x. BPDA replaces
:math:`\partial_x F + \partial_{z_0} F\, dz_0/dx` by :math:`dz_0/dx`: for a chain that has forgotten
its start, or does not start at the encoding, it is the derivative of the *encoder*. Implicit is
exact at a mode, and off by the difference between the derivative of a mode and of a draw elsewhere.
Truncated omits what the first
T - K transitions carry, which fades with mixing. Equilibrium and NES are unbiased, up to
stationarity and to the smoothing, but noisy.

References: Athalye, Carlini, Wagner, "Obfuscated gradients give a false sense of security", ICML
2018, https://arxiv.org/abs/1802.00420 (BPDA, EOT); Tramer, Carlini, Brendel, Madry, "On adaptive
attacks to adversarial example defenses", NeurIPS 2020, https://arxiv.org/abs/2002.08347; Ilyas,
Engstrom, Athalye, Lin, "Black-box adversarial attacks with limited queries and information", ICML
2018, https://arxiv.org/abs/1804.08598 (NES); Guo, Frank, Weinberger, "Low frequency adversarial
perturbation", UAI 2019, https://arxiv.org/abs/1809.08758 (directions).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_vae_defence.attacks.blackbox import antithetic_gradient
from pyro_vae_defence.attacks.objectives import _rows
from pyro_vae_defence.attacks.objectives.classifiers import check_classes
from pyro_vae_defence.models.classifier import class_margin
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.checks import (
    check_integer,
    check_not_negative,
    check_per_row,
    check_positive,
)
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import ImageEnergy, Latents, LatentsLike, Objective, PreparedObjective

_INTEGERS = (torch.int64, torch.int32)
_DIRECTION = 2  # purpose of the random streams; an attack's start has 0 to 2 of other seeds

Start: TypeAlias = Callable[[Tensor, Streams], Latents]
"""Images ``(M, C, H, W)`` and their rows' streams -> where chains start, differentiable."""

Chain: TypeAlias = Callable[[Tensor, Latents, Streams], Latents]
"""Images, where chains start, and the streams of their rows -> where chains end."""

Directions: TypeAlias = Callable[[Streams, int, int, Tensor], Tensor]
"""Streams of rows, a step and a purpose of theirs, and images ``(M, C, H, W)`` -> directions of the
shape of the images, Gaussian with a standard deviation of 1 per pixel."""

Scale: TypeAlias = tuple[Callable[[Latents], Latents], Callable[[Latents], Latents]]
"""A map of latents to a scale, such as that of their supports, and its inverse."""

Goal: TypeAlias = Callable[[Latents, Tensor], Tensor]
"""Latents of M rows and the attacked images whose latents they are, ``(M, C, H, W)``, which tell of
discrete latents -> what the attacker maximises, ``(M,)``, differentiable."""

PreparedGoal: TypeAlias = Callable[..., Goal]
"""Reference images ``(M, C, H, W)`` -> the :data:`Goal` against these references, row by row. What
it knows per image goes by the rows' random streams, a second argument ``streams`` that it may take,
as a prepared objective may."""


class DefendedEncoder(Protocol):
    """A defended encoder with a derivative of the attacker's choice."""

    def __call__(self, x: Tensor, streams: Streams, previous: Latents | None = None) -> Latents:
        """Latents of images ``(M, C, H, W)``, from their rows' random streams.

        Encoders that can go on do so from ``previous``, where chains ended at the last step.
        """


# --- Pathwise estimators --------------------------------------------------------------------------


def transfer(start: Start) -> DefendedEncoder:
    """The undefended encoder: attacks against it are transferred to the defence."""

    def encode(x: Tensor, streams: Streams, previous: Latents | None = None) -> Latents:
        return start(x, streams)

    return encode


def bpda(start: Start, chain: Chain, resume: Chain | None = None) -> DefendedEncoder:
    """The chain's end, with the derivative of its start (backward pass differentiable)."""

    def encode(x: Tensor, streams: Streams, previous: Latents | None = None) -> Latents:
        begin = start(x, streams)
        end = _run(chain, resume, x, begin, streams, previous)
        return straight_through(end, begin)

    return encode


def straight_through(values: LatentsLike, differentiable: LatentsLike) -> Latents:
    """``values`` bit for bit, with the derivative of ``differentiable``, site by site."""
    return {n: values[n].detach() + _derivative_only(v) for n, v in differentiable.items()}


def unroll(start: Start, chain: Chain) -> DefendedEncoder:
    """The derivative through start and chain, such as a ``mcmc.unrolled.UnrolledKernel``."""

    def encode(x: Tensor, streams: Streams, previous: Latents | None = None) -> Latents:
        return chain(x, start(x, streams), streams)

    return encode


def truncated(
    start: Start, first: Chain, last: Chain, resume: Chain | None = None
) -> DefendedEncoder:
    """The derivative through the last transitions alone; their noise is not that of the first."""

    def encode(x: Tensor, streams: Streams, previous: Latents | None = None) -> Latents:
        middle = _run(first, resume, x, start(x, streams), streams, previous)
        return last(x, middle, streams._replace(seed=streams.seed ^ 1))

    return encode


def implicit(
    start: Start,
    chain: Chain,
    energy: ImageEnergy,
    num_iterations: int = 10,
    damping: float = 0.0,
    resume: Chain | None = None,
) -> DefendedEncoder:
    r"""The chain's end, with the derivative of a mode of U(z; x).

    Args:
        start, chain, resume: see the module's text; the chain may be a mode search.
        energy: U(z; x), twice differentiable.
        num_iterations: conjugate gradient iterations, >= 1, each one Hessian-vector product. In D
            dimensions D of them solve the system but for rounding.
        damping: :math:`\lambda \ge 0` of :math:`\nabla_z^2 U + \lambda I`, where the Hessian is
            not positive definite. Iterations of a row stop at a direction of negative curvature.

    Raises:
        ValueError: if a number is out of range.
    """
    check_integer("num_iterations", num_iterations)
    check_not_negative("damping", damping)

    def pull_back(names: tuple[str, ...], x: Tensor, end: Any, gradients: Any) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            latents = {n: v.detach().requires_grad_() for n, v in zip(names, end, strict=True)}
            inputs = tuple(latents.values())
            slope = torch.autograd.grad(energy(x, latents).sum(), inputs, create_graph=True)

            def hessian(direction: Latents) -> Latents:
                along = tuple(direction.values())
                product = torch.autograd.grad(slope, inputs, along, retain_graph=True)
                return lat.add(dict(zip(names, product, strict=True)), direction, damping)

            right = dict(zip(names, gradients, strict=True))
            solution = conjugate_gradients(hessian, right, num_iterations)
            return torch.autograd.grad(slope, x, tuple(-v for v in solution.values()))[0]

    def encode(x: Tensor, streams: Streams, previous: Latents | None = None) -> Latents:
        with torch.no_grad():
            end = _run(chain, resume, x, start(x, streams), streams, previous)
        values = _WithDerivative.apply(functools.partial(pull_back, tuple(end)), x, *end.values())
        return dict(zip(end, values, strict=True))

    return encode


class _WithDerivative(torch.autograd.Function):
    """Values as they are; gradients of them give the image's by ``pull_back(x, values, them)``."""

    @staticmethod
    def forward(ctx: Any, pull_back: Callable[..., Tensor], x: Tensor, *values: Tensor) -> Any:
        ctx.pull_back = pull_back
        ctx.save_for_backward(x, *values)
        return tuple(value.clone() for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, *values = ctx.saved_tensors
        return None, ctx.pull_back(x, values, gradients), *(None for _ in values)


def conjugate_gradients(
    matrix: Callable[[Latents], Latents], right: LatentsLike, num_iterations: int
) -> Latents:
    """Solve one symmetric positive definite system per row, from zero.

    ``matrix`` multiplies each row by its matrix. Rows stop when solved, or at negative curvature.
    """
    solution = {name: torch.zeros_like(value) for name, value in right.items()}
    residual, direction = dict(right), dict(right)
    norm = lat.dot(residual, residual)
    for _ in range(num_iterations):
        product = matrix(direction)
        curvature = lat.dot(direction, product)
        going = (curvature > 0) & (norm > 0)
        length = torch.where(going, norm / torch.where(going, curvature, 1.0), 0.0)
        solution = lat.add(solution, direction, length)
        residual = lat.add(residual, product, -length)
        new_norm = lat.dot(residual, residual)
        ratio = torch.where(going, new_norm / torch.where(going, norm, 1.0), 0.0)
        direction = lat.add(residual, direction, ratio)
        # Zero marks a row that has stopped.
        norm = torch.where(going, new_norm, 0.0)
    return solution


@torch.no_grad()
def _run(
    chain: Chain,
    resume: Chain | None,
    x: Tensor,
    begin: LatentsLike,
    streams: Streams,
    previous: Latents | None,
) -> Latents:
    if resume is not None and previous is not None:
        return lat.detach(resume(x.detach(), previous, streams))
    return lat.detach(chain(x.detach(), lat.detach(begin), streams))


# --- Objectives -----------------------------------------------------------------------------------


def expected(
    encode: DefendedEncoder,
    goal: PreparedGoal,
    num_draws: int = 1,
    *,
    of_mean: bool | Scale = False,
    persistent: bool = False,
    resample: bool = True,
    generator: torch.Generator | None = None,
) -> PreparedObjective:
    """Expectation over transformation: the goal averaged over draws of a randomised encoder.

    Args:
        encode: the encoder; its derivative is the attack's.
        goal: what to maximise.
        num_draws: draws per image and call, >= 1.
        of_mean: the goal at the mean of the draws instead, against a defence that averages latents;
            a :data:`Scale` if it averages them on another one than that of the encoder's.
        persistent: hand the encoder where its chains ended at the call before.
        resample: fresh noise with every call; ``False`` for common random numbers.
        generator: of the seed, drawn when references are prepared, once per micro-batch: an
            attack's ``batch_size`` decides which noise an image meets, not its distribution. The
            global one when ``None``.

    Raises:
        ValueError: if ``num_draws`` is out of range, or ``persistent`` comes without ``resample``.
    """
    check_integer("num_draws", num_draws)
    _check_noise(persistent, resample)

    def prepare(x_ref: Tensor, streams: Streams | None = None) -> Objective:
        goal_ref = _at(goal, x_ref, streams, 1 if of_mean else num_draws)
        noise = _noise(num_draws, resample, generator)
        previous: Latents | None = None

        def objective(x: Tensor) -> Tensor:
            nonlocal previous
            images = x.repeat(num_draws, 1, 1, 1)
            latents = encode(images, noise(x), previous)
            if persistent:
                previous = lat.detach(latents)
            if of_mean:
                to, back = scale_of(of_mean)
                mean = back(_mean(to(latents), num_draws))
                return check_per_row("goal", goal_ref(mean, x), len(x))
            values = check_per_row("goal", goal_ref(latents, images), len(images))
            return lat.unfold(values, num_draws).mean(0)

        return objective

    return _rows.with_entries_of(goal, prepare)


def equilibrium(
    start: Start,
    chain: Chain,
    energy: ImageEnergy,
    goal: PreparedGoal,
    num_chains: int = 50,
    *,
    resume: Chain | None = None,
    of_mean: bool | Scale = False,
    resample: bool = True,
    generator: torch.Generator | None = None,
) -> PreparedObjective:
    r"""The goal at stationarity, with derivative :math:`-\mathrm{Cov}(f(z), \nabla_x U(z; x))`.

    The covariance is the unbiased one, over chains of one image, which are independent. The goal
    need not be differentiable, unless ``of_mean``; what it reads of the image itself counts as
    constant.

    Args:
        start, chain, resume: see the module's text; the chain reaches stationarity.
        energy: U(z; x), differentiable in the image.
        goal, resample, generator: as for :func:`expected`.
        num_chains: independent chains per image, >= 2 for a covariance.
        of_mean: maximise the goal at the mean latent, f(E[z]), with the derivative
            :math:`-\mathrm{Cov}(\langle \nabla f(\bar z), z \rangle, \nabla_x U)`, whose bias is
            that of :math:`f(\bar z)` for :math:`f(E[z])`; z on the :data:`Scale`, if it is one.

    Raises:
        ValueError: as for :func:`expected`.
    """
    check_integer("num_chains", num_chains, 2)
    _check_noise(resume is not None, resample)

    def prepare(x_ref: Tensor, streams: Streams | None = None) -> Objective:
        goal_ref = _at(goal, x_ref, streams, 1 if of_mean else num_chains)
        noise = _noise(num_chains, resample, generator)
        previous: Latents | None = None

        def objective(x: Tensor) -> Tensor:
            nonlocal previous
            images, streams = x.repeat(num_chains, 1, 1, 1), noise(x)
            begin = {} if resume is not None and previous is not None else start(images, streams)
            latents = _run(chain, resume, images, begin, streams, previous)
            previous = latents
            if of_mean:
                to, back = scale_of(of_mean)
                averaged = to(latents)
                value, slope = lat.value_and_gradient(
                    lambda mean: check_per_row("goal", goal_ref(back(mean), x.detach()), len(x)),
                    _mean(averaged, num_chains),
                )
                per_chain = lat.dot(lat.repeat(slope, num_chains), averaged)
            else:
                with torch.no_grad():
                    per_chain = check_per_row("goal", goal_ref(latents, images), len(images))
                value = lat.unfold(per_chain, num_chains).mean(0)
            per_chain = lat.unfold(per_chain, num_chains)
            weight = (per_chain - per_chain.mean(0)) / (num_chains - 1)
            energies = lat.unfold(energy(images, latents), num_chains)
            return value + _derivative_only(-(weight * energies).sum(0))

        return objective

    return _rows.with_entries_of(goal, prepare)


Population: TypeAlias = Callable[[Tensor, Latents | None, Streams], tuple[Latents, Tensor]]
"""Images ``(M, C, H, W)``, where chains were at the last step, and streams of their rows -> where
they are, and whether the row has a chain, bool ``(M,)``."""


def evidence(
    right: Callable[[Tensor], Population],
    wrong: Callable[[Tensor], Population],
    energy: ImageEnergy,
    num_chains: int = 8,
    *,
    generator: torch.Generator | None = None,
) -> PreparedObjective:
    """The evidence of the wrong classes against the right one, by chains kept in either set.

    Its value is the mean energy of chains in the right set less that of chains in the wrong one, in
    nats, and its derivative that of log M of the wrong set less log M of the right one, once chains
    are stationary. A mean over no chain is 0.

    Args:
        right, wrong: reference images, in as many copies as there are chains, to what moves the
            chains of either set.
        energy: U(z; x), differentiable in the image.
        num_chains: independent chains per image and set, >= 1.
        generator: of the seed; the global one when ``None``.

    Raises:
        ValueError: if ``num_chains`` is out of range.
    """
    check_integer("num_chains", num_chains)

    def prepare(x_ref: Tensor) -> Objective:
        copies = x_ref.repeat(num_chains, 1, 1, 1)
        populations = [population(copies) for population in (right, wrong)]
        noise = _noise(num_chains, True, generator)
        previous: list[Latents | None] = [None, None]

        def objective(x: Tensor) -> Tensor:
            images, streams = x.repeat(num_chains, 1, 1, 1), noise(x)
            means = []
            for number, population in enumerate(populations):
                with torch.no_grad():
                    latents, there = population(images.detach(), previous[number], streams)
                previous[number] = lat.detach(latents)
                energies = torch.where(there, energy(images, lat.detach(latents)), 0.0)
                count = lat.unfold(there, num_chains).sum(0).clamp(min=1)
                means.append(lat.unfold(energies, num_chains).sum(0) / count)
            return means[0] - means[1]

        return objective

    return prepare


def white_directions(streams: Streams, step: int, purpose: int, like: Tensor) -> Tensor:
    """Standard normal directions, independent per pixel."""
    return streams.normal(step, purpose, tuple(like.shape[1:]), like.dtype)


def nes(
    objective: PreparedObjective,
    num_directions: int = 10,
    scale: float = 0.05,
    generator: torch.Generator | None = None,
    directions: Directions = white_directions,
) -> PreparedObjective:
    """A black box: values of an objective, with a derivative estimated from values.

    The references are prepared anew for every call, so that the noise of an objective with
    ``resample=False`` is one for the ``2 num_directions + 1`` queries of a call, and fresh for the
    next.

    Args:
        objective: what to maximise; no gradient is asked of it.
        num_directions: antithetic pairs per call, >= 1.
        scale: standard deviation of the smoothing per pixel, > 0, in units of the image range.
        generator: source of the seed of directions; torch's global seed when ``None``.
        directions: of which differences are taken. Where pixels of a direction have the covariance
            C, the estimate is that of C times the gradient of the objective, smoothed by such
            directions: an ascent too.

    Raises:
        ValueError: if a number is out of range.
    """
    check_integer("num_directions", num_directions)
    check_positive("scale", scale)

    def prepare(x_ref: Tensor, streams: Streams | None = None) -> Objective:
        noise, rows = _noise(1, True, generator), streams

        def black_box(x: Tensor) -> Tensor:
            streams = noise(x)
            fresh = None if rows is None else rows._replace(seed=streams.seed)
            with torch.no_grad():
                inner = _rows.prepare(objective, (x_ref,), fresh)
                value = inner(x)
                if not x.requires_grad:
                    return value
                gradient = antithetic_gradient(
                    lambda step: inner((x + step).clamp(0.0, 1.0)),
                    lambda number: directions(streams, number, _DIRECTION, x),
                    num_directions,
                    scale,
                )
            return value + _derivative_only((gradient * x).flatten(1).sum(1))

        return black_box

    return _rows.with_entries_of(objective, prepare)


def _at(goal: PreparedGoal, x_ref: Tensor, streams: Streams | None, copies: int) -> Goal:
    """The goal against so many copies of the references, each with the rows' numbers."""
    if streams is not None:
        image, chain = (number.repeat(copies) for number in streams[1:])
        streams = Streams(streams.seed, image, chain)
    found: Goal = _rows.prepare(goal, (x_ref.repeat(copies, 1, 1, 1),), streams)
    return found


def scale_of(of_mean: bool | Scale) -> Scale:
    """The scale on which latents are averaged, their own unless another is given."""
    return of_mean if isinstance(of_mean, tuple) else (dict, dict)


def _derivative_only(surrogate: Tensor) -> Tensor:
    """Zero in value, but for its derivative."""
    return surrogate - surrogate.detach()


def _mean(latents: LatentsLike, num: int) -> Latents:
    return {name: lat.unfold(value, num).mean(0) for name, value in latents.items()}


def _noise(
    num_draws: int, resample: bool, generator: torch.Generator | None
) -> Callable[[Tensor], Streams]:
    """Streams of each call: other ones every time, or always the same."""
    seed = draw_seed(generator)
    calls = itertools.count() if resample else itertools.repeat(0)

    def streams(x: Tensor) -> Streams:
        # Even seeds: the odd ones are those of truncated's last transitions.
        even = 2 * (seed + next(calls)) % 2**64
        return Streams.create(x.shape[0], num_draws, seed=even, device=x.device)

    return streams


def _check_noise(persistent: bool, resample: bool) -> None:
    if persistent and not resample:
        raise ValueError("persistent chains need fresh noise at every call: leave resample=True")


# --- Goals ----------------------------------------------------------------------------------------


def latent_distance(encode: Callable[[Tensor], Latents]) -> PreparedGoal:
    r"""Squared distance :math:`\|z - z^r\|^2` of latents (eq. 64), summed over sites.

    ``encode`` maps references to :math:`z^r`, as the defended encoder does, without gradient.
    """

    def prepare(x_ref: Tensor) -> Goal:
        with torch.no_grad():
            reference = lat.detach(encode(x_ref))

        def goal(latents: Latents, x: Tensor) -> Tensor:
            difference = lat.add(latents, reference, -1.0)
            return lat.dot(difference, difference)

        return goal

    return prepare


def output_damage(
    decode: Callable[[Latents, Tensor], Tensor],
    reconstruct: Callable[[Tensor], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> PreparedGoal:
    """How far the decoded latents are from the reference's reconstruction.

    Args:
        decode: latents and the images attacked to the images decoded, differentiable.
        reconstruct: reference images to their reconstructions; called once, without gradient.
        distance: of image pairs, one value per pair; squared and summed over pixels when ``None``.
    """

    def prepare(x_ref: Tensor) -> Goal:
        with torch.no_grad():
            reference = reconstruct(x_ref)

        def goal(latents: Latents, x: Tensor) -> Tensor:
            if distance is not None:  # which may change what it is given
                return distance(decode(latents, x).clone(), reference.clone())
            return (decode(latents, x) - reference).square().flatten(1).sum(1)

        return goal

    return prepare


def misclassification(
    classify: Callable[[Latents, Tensor], Tensor], labels: Tensor
) -> PreparedGoal:
    r"""The margin :math:`\max_{j \ne y} s_j - s_y` of scores: positive where the classifier errs,
    infinite where it has no answer, NaN, which would else keep attackers away.

    Args:
        classify: latents and attacked images of M rows to scores ``(M, classes)``, differentiable.
        labels: classes of the references, int64 ``(N,)``. References may come repeated whole, or
            in any order with their streams, as an attack prepares them.

    Raises:
        ValueError: if labels are no classes of the scores; in an attack on another number of
            images; without streams, when references are prepared whose number is no multiple of the
            labels'.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.dtype not in _INTEGERS:
        raise ValueError(f"labels must be an int64 tensor (N,), got {labels!r}")
    checked = False

    def margin(latents: Latents, x: Tensor, own: Tensor) -> Tensor:
        nonlocal checked
        scores = classify(latents, x)
        if not checked:
            if scores.dim() != 2 or len(scores) != len(own):
                raise ValueError(
                    f"classify must return scores ({len(own)}, classes) for as many rows, got "
                    f"shape {tuple(scores.shape)}"
                )
            check_classes("labels", labels, scores.shape[1])
            checked = True
        value = -class_margin(scores, own)
        return torch.where(value.isnan(), torch.inf, value)

    def prepare(x_ref: Tensor, streams: Streams | None = None) -> Goal:
        if streams is not None:
            own = _rows.of_rows(labels, streams, "labels")
            return lambda latents, x: margin(latents, x, own)
        times, rest = divmod(x_ref.shape[0], labels.shape[0])
        if rest:
            raise ValueError(
                f"labels has {labels.shape[0]} entries for {x_ref.shape[0]} references; they must "
                "come in one batch (restarts folded), so choose a larger batch_size"
            )
        repeated = labels.repeat(times)
        return lambda latents, x: margin(latents, x, repeated)

    return _rows.with_entries(prepare, labels=labels)
