"""The marginal likelihood of images under any Pyro VAE, one value per image, in nats.

:mod:`pyro_vae_defence.metrics.likelihood` has the estimators; here the program supplies the
densities,

    log p(x, z) = -U(z; x)      and      log q(z | x),

both sums of unscaled log-probabilities over the sites of model and guide. Latents of constrained
support are moved on the unconstrained scale, whose log-determinant enters both and leaves log p(x)
as it is.

Every image has its own random stream, so that its estimate depends on the seed and on its place in
the batch, never on how much is computed at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae_defence.metrics.likelihood import Transition, ais, importance_nll, sigmoid_schedule
from pyro_vae_defence.models import program
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.checks import check_integer
from pyro_vae_defence.ops.streams import Streams, draw_seed
from pyro_vae_defence.types import VAE, Latents, LatentsLike

ROWS = 1000
"""Pairs of image and latents computed at once: some 100 MB for the paper's VAE."""


@torch.no_grad()
def nll(
    vae: VAE,
    x: Tensor,
    num_samples: int = 1000,
    rows: int = ROWS,
    generator: torch.Generator | None = None,
) -> Tensor:
    """-log p(x) of every image by importance sampling from the guide (Table 7 of the paper).

    An upper bound in expectation (IWAE's). The VAE is evaluated in eval mode.

    Args:
        vae: any Pyro VAE.
        x: images ``(N, C, H, W)``.
        num_samples: draws from the guide per image; 1000 in the paper.
        rows: pairs of image and draw computed at once; bounds the memory, not the result (up to
            rounding).
        generator: source of randomness; torch's global seed when ``None``.

    Returns:
        Shape ``(N,)``, in nats, without gradient.

    Raises:
        ValueError: ``vae`` or ``x`` is unsuitable, or a number is not positive.
    """
    program.check_vae(vae)
    program.check_images(x, unit_interval=False)
    check_integer("rows", rows)
    seed = draw_seed(generator)
    results = []
    with program.evaluation_mode(vae):
        for first in range(0, x.shape[0], rows):
            batch = x[first : first + rows]
            weigh = _Weights(vae, batch, Streams.create(len(batch), seed=seed, first_image=first))
            chunk = max(1, min(rows // len(batch), num_samples))
            results.append(importance_nll(weigh, num_samples, chunk))
    return torch.cat(results)


class _Weights:
    """Log-weights ``(k, N)`` of the next k draws per image; draws are numbered as chains are."""

    def __init__(self, vae: VAE, x: Tensor, streams: Streams) -> None:
        self.vae = vae
        self.x = x
        self.draw = program.GuideDraws(vae, x)
        self.streams = streams
        self.drawn = 0
        self.potential: program.ModelPotential | None = None

    def __call__(self, count: int) -> Tensor:
        images = len(self.x)
        # Reading a model's sites runs it once: only the last chunk may differ in size.
        if self.potential is None or self.potential.num_images != count * images:
            self.potential = program.potential(self.vae, self.x.repeat(count, 1, 1, 1))
        chain = torch.arange(self.drawn, self.drawn + count).repeat_interleave(images)
        streams = Streams(
            self.streams.seed,
            self.streams.image.repeat(count).to(self.x.device),
            chain.to(self.x.device),
        )
        self.drawn += count
        values, log_q = self.draw(count, streams)
        latents = self.potential.unconstrain(values)
        # U holds minus the log-determinant of the transforms; q, read on the support, does not.
        log_joint = self.potential.log_determinant(latents) - self.potential(latents)
        return (log_joint - log_q).view(count, images)


def ais_log_weights(
    vae: VAE,
    x: Tensor,
    transition: Transition,
    schedule: Tensor | None = None,
    num_chains: int = 10,
    initial: LatentsLike | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Log-weights of annealed importance sampling between the guide and p(z | x).

    With a rising schedule ``log_mean_exp(result)`` estimates log p(x) from below. With a falling
    one, and ``initial`` drawn from the exact posterior, ``-log_mean_exp(result)`` does from above.

    Args:
        vae: any Pyro VAE.
        x: images ``(N, C, H, W)``.
        transition: moves ``num_chains * N`` rows of unconstrained latents, chains folded in; see
            :data:`~pyro_vae_defence.metrics.likelihood.Transition`.
        schedule: inverse temperatures; 100 of :func:`sigmoid_schedule` when ``None``.
        num_chains: M, independent chains per image.
        initial: latents of ``num_chains * N`` rows on their support; draws from the guide when
            ``None``.
        generator: source of the draws from the guide; torch's global seed when ``None``.

    Returns:
        Shape ``(num_chains, N)``, in nats, without gradient.

    Raises:
        ValueError: an argument does not fit, or a falling schedule comes without ``initial``.
    """
    program.check_vae(vae)
    program.check_images(x, unit_interval=False)
    check_integer("num_chains", num_chains)
    schedule = sigmoid_schedule(100) if schedule is None else schedule
    if initial is None and float(schedule[0]) != 0.0:
        raise ValueError(
            "schedule falls, and initial is None: pass exact draws of p(z | x), which simulated "
            "data have"
        )
    repeated = x.repeat(num_chains, 1, 1, 1)
    with program.evaluation_mode(vae):
        potential = program.potential(vae, repeated)
        guide = program.guide_potential(vae, repeated, potential)
        if initial is None:
            streams = Streams.create(len(x), num_chains, generator=generator, device=x.device)
            with torch.no_grad():
                initial = program.encode(vae, repeated, streams=streams)
        start = potential.check(potential.unconstrain(initial))
        log_weights = ais(
            potential, lambda latents: -guide(latents), lat.detach(start), transition, schedule
        )
    return lat.unfold(log_weights, num_chains)


@torch.no_grad()
def simulate(vae: VAE, x: Tensor) -> tuple[Latents, Tensor]:
    """Latents from the prior and images from p(x | z): data with one exact posterior draw each.

    The latents are an exact draw from p(z | x) of the simulated images, as bidirectional Monte
    Carlo needs.

    Args:
        vae: any Pyro VAE whose likelihood can be sampled.
        x: images ``(N, C, H, W)``, of which only shape, dtype and device matter.

    Returns:
        Latents of ``N`` rows and images of the shape of ``x``.
    """
    with program.evaluation_mode(vae):
        latents = program.prior(vae, x)
        images = program.observation(vae, latents, tuple(x.shape[1:])).sample()
    return latents, images.reshape(x.shape)
