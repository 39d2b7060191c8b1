r"""Mass margin: a conditional VAE that no perturbation makes explain an image by another class.

In analysis by synthesis (:mod:`pyro_vae_defence.defence.synthesis`) the class y of a clean image x
stands under every attack of radius :math:`\epsilon \le \delta` where :math:`M_y^{\delta -
\epsilon}` exceeds all :math:`M_k^{\delta + \epsilon}`, masses of explanations of x in balls of
these radii. With :math:`\delta = \epsilon`, and the ELBO in a ball,

.. math:: \mathcal L_k^r(x) = E_{q(z | x, k)} \max_{\|e\| \le r} \log p(x - e \mid z, k)
          - KL(q(z | x, k) \| p(z | k)) \;\le\; \log M_k^r(x)

in place of each mass's logarithm, minimise

.. math:: -\mathcal L_y^0(x) + \lambda \log\Bigl[1 + \sum_{k \ne y}
          \exp\bigl(\mathcal L_k^{2\epsilon}(x) - \mathcal L_y^0(x)\bigr)\Bigr],

the last of which estimates minus the logarithm of the probability that the label keeps under every
attack. It is no bound of that: too favourable where the guide of other classes is loose.

In an L_inf ball and for a likelihood that is linear in the image, the attack is one for both
classes (:mod:`pyro_vae_defence.models.common_attack`): :math:`\mathcal L_k^{2\epsilon}` is then the
ELBO under the attack that serves class k best, less what this attack gives to the label's draw.
There is less to be trained away, and the likelihood suffers less.

The inner maximum over perturbations has a closed form
(:mod:`pyro_vae_defence.models.perturbation`) and its derivative needs no derivative of the
maximiser: there is no attack in the loop.

A lower bound of another class's mass can be lowered by a worse guide, which says nothing. So the
guide is trained to *raise* all :math:`\mathcal L_k`, those of wrong classes too, while the decoder
lowers them: the guide's derivative of a wrong class's term is that of :math:`-\mathcal L_k`. The
two are told apart at the latent site, of which there may be only one: with more, the KL of one
depends on draws of another. The prior p(z | k) should have no parameters.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae_defence.models.common_attack import UnderCommonAttack, keywords
from pyro_vae_defence.models.perturbation import PerturbationAware
from pyro_vae_defence.models.sites import latent_sites, sample_sites
from pyro_vae_defence.objectives.elbo import ImageELBO, Terms, elbo_terms, log_likelihood
from pyro_vae_defence.ops import latents as lat
from pyro_vae_defence.ops.balls import Ball, Linf, check_ball, reaches
from pyro_vae_defence.ops.checks import check_positive
from pyro_vae_defence.types import Latents, PyroProgram


class MassMargin(ImageELBO):
    """The objective of the module's text, for programs of images and one-hot classes.

    ``ball`` is the attacker's, and that which the classifier will assume. ``weight`` is lambda.
    Terms: ``reconstruction``, ``kl`` (of the label), ``margin`` (the second summand, without its
    weight), ``loss``; and ``guide``, whose value is 0 and whose gradient is the guide's.

    Raises ``ValueError`` if an argument is out of range; when evaluated, if the programs have more
    than one latent site, or are given anything else than images and one-hot classes. Later batches
    of a shape are not looked at on the host: where a class is not one-hot, ``loss`` is NaN.
    """

    def __init__(self, ball: Ball, weight: float = 1.0, *, num_particles: int = 1) -> None:
        super().__init__(num_particles=num_particles)
        self.ball, self.wide = ball, reaches(check_ball(ball), ball.radius)[1]
        self.weight = check_positive("weight", weight)
        self._model: PyroProgram | None = None
        self._aware: PyroProgram
        self._common: UnderCommonAttack | None
        self._checked: set[torch.Size] = set()

    def particle_terms(
        self, model: PyroProgram, guide: PyroProgram, x: Tensor, *args: Any, **kwargs: Any
    ) -> Terms:
        """One draw for every class of every image."""
        y, one_hot = self._check(x, args, kwargs)
        traces = self._get_trace(model, guide, (x, y), {})
        names = [site["name"] for site in latent_sites(traces[0])]
        if len(names) > 1:
            raise ValueError(
                f"vae has {len(names)} latent sites, {', '.join(names)}, but the margin of masses "
                "is for one: sample all latents at one site, or train with another objective"
            )
        terms = elbo_terms(*traces)
        others = _others(y)
        copies = len(others) // len(x)
        images = x.repeat(copies, 1, 1, 1)
        attacked = self._attacked(model, traces[0], x, y, copies)
        evidence, guides = _wrong(attacked, guide, images, others)
        log_ratio = evidence.view(copies, -1) + terms["loss"]
        zero = torch.zeros_like(log_ratio[:1])
        margin = torch.cat([zero, log_ratio]).logsumexp(0).masked_fill(~one_hot, torch.nan)
        raised = guides.view(copies, -1).sum(0)
        own = raised.detach() - raised
        return terms | {
            "margin": margin,
            "guide": own,
            "loss": terms["loss"] + self.weight * margin + own,
        }

    def _attacked(
        self, model: PyroProgram, trace: Trace, x: Tensor, y: Tensor, copies: int
    ) -> PyroProgram:
        """The model of so many copies of the images, attacked, given a run at their labels."""
        if self._model != model:
            self._model, self._aware = model, PerturbationAware(model, self.wide)
            self._common = None
            if isinstance(self.ball, Linf):
                self._common = UnderCommonAttack(model, self.ball, self.ball.radius)
        if self._common is not None and (found := self._common.slopes(trace, x, y)) is not None:
            of_rows = {n: v.repeat(copies, *(1,) * (v.dim() - 1)) for n, v in found.items()}
            return functools.partial(self._common, **keywords(of_rows))
        return self._aware

    def _check(self, x: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        """The classes, and which of them are one-hot, bool ``(N,)``."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            y = args[0]
            if y.dim() == 2 and len(y) == len(x) and y.shape[1] > 1:
                one_hot = (y == y.bool()).all(1) & (y.sum(1) == 1)
                # Waits for the device, hence once.
                if y.shape in self._checked or bool(one_hot.all()):
                    self._checked.add(y.shape)
                    return y, one_hot
        raise ValueError(
            "the programs must be given images and their classes as one-hot vectors (N, K), got "
            f"{[tuple(v.shape) if isinstance(v, Tensor) else v for v in args]} beside the images"
        )


def _others(y: Tensor) -> Tensor:
    """One-hot vectors of all other classes, ``((K - 1) N, K)``, class after class."""
    return torch.cat([y.roll(shift, 1) for shift in range(1, y.shape[1])])


def _wrong(model: PyroProgram, guide: PyroProgram, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The ELBO of rows, with the model's gradient alone, and with the guide's alone, ``(N,)``.

    For one latent site: the KL's own derivative is the guide's, and the image's force on the draw.
    """
    guide_trace = poutine.trace(guide).get_trace(x, y)
    drawn: Latents = {}
    leaves: Latents = {}
    for site in sample_sites(guide_trace).values():
        if site["value"].requires_grad:  # not in validation, without gradients
            drawn[site["name"]] = site["value"]
            leaves[site["name"]] = site["value"] = site["value"].detach().requires_grad_()
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(x, y)
    model_trace.compute_log_prob()
    reconstruction = log_likelihood(model_trace)
    for name, value in drawn.items():
        guide_trace.nodes[name]["value"] = value
    kl = elbo_terms(model_trace, guide_trace)["kl"]
    raised = -kl
    if leaves and reconstruction.requires_grad:
        # Zero where the image does not depend on the latent.
        forces = torch.autograd.grad(
            reconstruction.sum(),
            [*leaves.values()],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        along = dict(zip(leaves, forces, strict=True))
        raised = raised + lat.dot(along, drawn)
    return reconstruction - kl.detach(), raised
