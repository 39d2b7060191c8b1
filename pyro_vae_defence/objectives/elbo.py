r"""The beta-ELBO, and the base of all objectives.

For images :math:`x` and latents :math:`z` with :math:`q(z|x)` from the guide,

.. math:: \mathcal L_\beta(x) = E_{q(z|x)} \log p(x|z) - \beta\, KL(q(z|x) \| p(z)),

and the loss is :math:`-\sum_x \mathcal L_\beta(x)`. The weight enters as Pyro means it to, through
``poutine.scale`` on the latent sites of **both** programs: the Kullback-Leibler divergence is a
difference of log-probabilities, one from each, and both must carry beta. Scaling one of them trains
something else: the model alone, :math:`\beta KL + (\beta - 1) H(q)`; the guide alone,
:math:`KL - (\beta - 1) H(q)`, with H the entropy. The objective applies the scale from outside, so
a VAE needs to know nothing about beta, and its programs, run on their own, keep beta = 1: they
are sampled and scored at p(x|z) p(z).

Higgins, Matthey, Pal, Burgess, Glorot, Botvinick, Mohamed, Lerchner, "beta-VAE: Learning Basic
Visual Concepts with a Constrained Variational Framework", 2017,
https://openreview.net/forum?id=Sy2fzU9gl
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.util import torch_item
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_vae_defence.models.observation import ImageMap, read_images_with
from pyro_vae_defence.models.program import evaluation_mode
from pyro_vae_defence.models.sites import (
    Site,
    aside,
    asks_enumeration,
    check_mean_field,
    check_same_latents,
    latent_sites,
    observed_sites,
    per_image,
    sample_sites,
    sampled_in_order,
    whole_size,
)
from pyro_vae_defence.ops.checks import (
    check_integer,
    check_not_negative,
    check_positive,
    check_within,
)
from pyro_vae_defence.ops.distributions import innermost, is_point
from pyro_vae_defence.ops.divergences import known_kl
from pyro_vae_defence.types import PyroProgram

Terms: TypeAlias = dict[str, Tensor]
"""Name of a term -> one value per image ``(N,)``, in nats."""

Schedule: TypeAlias = Callable[[int], float]
"""Number of optimisation steps taken so far -> a weight."""

EncodeSites: TypeAlias = Callable[[Tensor], list[Site]]
"""Images -> the latent sites of one run of the guide on them."""


class ImageELBO(TraceMeanField_ELBO):
    """Base of the objectives: a Pyro ELBO that keeps one value per image until the very end.

    A subclass overrides one hook, :meth:`particle_terms`; ``loss``, ``differentiable_loss`` and
    ``loss_and_grads``, all that :class:`pyro.infer.SVI` and :class:`pyro.infer.elbo.ELBOModule`
    call, are sums of its ``"loss"`` over the images of the batch (sums, as everywhere in Pyro).

    ``num_particles`` draws of the latents are averaged. :attr:`step` counts the calls of
    ``loss_and_grads``, that is the optimisation steps; schedules read it, and whoever trains
    through ``differentiable_loss`` sets it. :meth:`state_dict` has what a resumed run needs.

    Scales and masks that the programs set themselves act on the ELBO, as they do in Pyro; they
    change neither the terms reported nor what an objective adds to the ELBO. The scale of a data
    plate that subsamples is left out, which would raise the ELBO alone above what is added.

    Raises ``ValueError`` if ``num_particles`` is not a positive integer; when evaluated, for
    programs with different latents, and for latents that only Pyro's other ELBOs can train: those
    that the model sums out, and those whose draws have no gradient.
    """

    def __init__(self, *, num_particles: int = 1) -> None:
        check_integer("num_particles", num_particles)
        super().__init__(num_particles=num_particles)
        self.step = 0
        self._observed: tuple[Any, ImageMap] | None = None

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step, for a checkpoint."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.step = state["step"]

    def _get_trace(
        self, model: PyroProgram, guide: PyroProgram, args: Any, kwargs: Any
    ) -> tuple[Trace, Trace]:
        if isinstance(poutine.unwrap(guide), Messenger):
            guide = _alone(guide)
        model, guide = (_OfTheBatch(len(args[0]))(program) for program in (model, guide))
        # Not Pyro's analytic ELBO's, which warns of orders that are dealt with in elbo_terms.
        model_trace, guide_trace = Trace_ELBO._get_trace(self, model, guide, args, kwargs)
        check_trainable(model_trace, guide_trace)
        return model_trace, guide_trace

    def check_mean_field(
        self,
        traces: tuple[Trace, Trace],
        model: PyroProgram,
        guide: PyroProgram,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Refuse a hierarchy by the graph of both traces; without gradients, by that of others."""
        if torch.is_grad_enabled() or len(latent_sites(traces[1])) < 2:
            return check_mean_field(*traces)
        with torch.enable_grad(), evaluation_mode(model, guide), aside(args[0].device):
            check_mean_field(*self._get_trace(model, guide, args, kwargs))

    def mean_image(
        self, model_trace: Trace, model: PyroProgram, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Mean of the image's distribution in a trace, in the shape of ``x``.

        ``ValueError`` as for :class:`~pyro_vae_defence.models.program.Decoder`.
        """
        # How a model observes its image does not change from step to step.
        key = (model, x.shape[1:], x.dtype, x.device)
        if self._observed is None or self._observed[0] != key:
            with evaluation_mode(model):
                self._observed = key, read_images_with(model, x, args, kwargs)
        images = self._observed[1]
        images.check_mean()
        sites = sample_sites(model_trace)
        mean = images.assemble(lambda site: site["fn"].mean, sites, len(x))
        return mean.reshape(x.shape)

    @abstractmethod
    def particle_terms(
        self, model: PyroProgram, guide: PyroProgram, x: Tensor, *args: Any, **kwargs: Any
    ) -> Terms:
        """Terms from one draw of the latents, among them ``"loss"``; see :meth:`terms`."""

    def terms(
        self, model: PyroProgram, guide: PyroProgram, x: Tensor, *args: Any, **kwargs: Any
    ) -> Terms:
        """Every term of the objective, one value per image, for logging.

        ``model`` and ``guide`` run on the images ``x`` of shape ``(N, C, H, W)`` or ``(N, ...)``
        and on the further arguments. The result maps names to tensors ``(N,)`` in nats:
        ``"reconstruction"`` is log p(x|z), ``"kl"`` is KL(q(z|x) || p(z)), both without any
        weight; ``"loss"`` is what training minimises; further names are the subclass's.
        """
        particles = [
            self.particle_terms(model, guide, x, *args, **kwargs) for _ in range(self.num_particles)
        ]
        return {
            name: sum(terms[name] for terms in particles) / self.num_particles
            for name in particles[0]
        }

    def differentiable_loss(
        self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Loss of the batch, a scalar tensor with a gradient."""
        loss = self.terms(model, guide, *args, **kwargs)["loss"].sum()
        warn_if_nan(loss, "loss")
        return loss

    def loss(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> float:
        """Loss of the batch, a number; leaves no gradient and advances no counter."""
        return torch_item(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(
        self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any
    ) -> float:
        """Loss of the batch; adds its gradient to the parameters and one to :attr:`step`."""
        losses = []
        for _ in range(self.num_particles):
            terms = self.particle_terms(model, guide, *args, **kwargs)
            loss = terms["loss"].sum() / self.num_particles
            if loss.requires_grad:
                # One particle at a time, so that only one graph is alive.
                loss.backward(retain_graph=self.retain_graph)
            losses.append(loss.detach().double())
        total = torch_item(sum(losses))  # the one number of a step that is read from the device
        warn_if_nan(torch.tensor(total), "loss")
        self.step += 1
        return total


class BetaELBO(ImageELBO):
    """The ELBO with its KL weighted by beta, for any Pyro VAE, hierarchical ones included.

    ``beta`` is a positive number or a :data:`Schedule` of positive numbers, such as
    :func:`linear_schedule`. The KL is analytic where Pyro knows it, else estimated from the sample,
    as is that of a latent which the guide samples before one that the model samples first.
    That of a ``Delta`` without log-density, a deterministic encoder's, is -log p(z). Terms:
    ``reconstruction``, ``kl``, ``loss``.

    Raises ``ValueError`` if beta is not positive and finite, for a schedule when it is reached.
    """

    def __init__(self, beta: float | Schedule = 1.0, *, num_particles: int = 1) -> None:
        super().__init__(num_particles=num_particles)
        self.beta = check_weight("beta", beta)

    def particle_terms(
        self, model: PyroProgram, guide: PyroProgram, x: Tensor, *args: Any, **kwargs: Any
    ) -> Terms:
        """Run the programs with the guide's sites scaled by beta: a divergence has their scale."""
        beta = weight_at("beta", self.beta, self.step)
        return elbo_terms(*self._get_trace(model, poutine.scale(guide, beta), (x, *args), kwargs))


class Run(NamedTuple):
    """One run of both programs on images.

    Attributes:
        model_trace: the model's trace, at the guide's latents.
        sites: the guide's latent sites.
        images: the images ``(N, C, H, W)`` and the programs' further arguments.
        encode: runs the guide on other images with these arguments: their latent sites.
        decode: the mean image of the run, in the shape of ``x``.
    """

    model_trace: Trace
    sites: list[Site]
    images: tuple[Tensor, ...]
    encode: EncodeSites
    decode: Callable[[], Tensor]


class MeanFieldELBO(ImageELBO):
    """Base of objectives that add terms to the negative ELBO of a Gaussian mean-field VAE.

    A subclass overrides :meth:`extra_terms`. When evaluated, raises ``ValueError`` for a guide that
    is not Gaussian or whose sites depend on each other.
    """

    def particle_terms(
        self, model: PyroProgram, guide: PyroProgram, x: Tensor, *args: Any, **kwargs: Any
    ) -> Terms:
        """Add the further terms to those of the negative ELBO, each with weight one."""
        traces = model_trace, guide_trace = self._get_trace(model, guide, (x, *args), kwargs)
        self.check_mean_field(traces, model, guide, x, *args, **kwargs)

        def encode(x: Tensor) -> list[Site]:
            return latent_sites(poutine.trace(guide).get_trace(x, *args, **kwargs))

        def decode() -> Tensor:
            return self.mean_image(model_trace, model, x, *args, **kwargs)

        run = Run(model_trace, latent_sites(guide_trace), (x, *args), encode, decode)
        terms = elbo_terms(model_trace, guide_trace, mean_field=True)
        return add_terms(terms, self.extra_terms(run))

    @abstractmethod
    def extra_terms(self, run: Run) -> Terms:
        """Terms ``(N,)`` that are added to those of the ELBO."""


class _OfTheBatch(Messenger):
    """Takes back what a data plate that subsamples scales its sites by."""

    def __init__(self, num_images: int) -> None:
        super().__init__()
        self.num_images = num_images

    def _pyro_sample(self, msg: Any) -> None:
        whole = whole_size(msg, self.num_images)
        if whole != self.num_images:
            msg["scale"] = msg["scale"] * self.num_images / whole


def _alone(guide: PyroProgram) -> PyroProgram:
    """A guide that runs the model for its priors, Pyro's ``GuideMessenger``, as one of latents.

    Pyro would take the model's trace from it as well, which the guide's scale is on.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with poutine.block(hide_fn=lambda msg: msg["is_observed"]):
            return guide(*args, **kwargs)

    return run


def check_trainable(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuse latents that differ between the programs, are summed out, or have no gradient."""
    check_same_latents(model_trace, guide_trace)
    for site in latent_sites(model_trace):
        if asks_enumeration(site):
            raise ValueError(
                f"site {site['name']!r} of the model is to be summed out (infer enumerate); "
                "this objective samples all latents: train with pyro.infer.TraceEnum_ELBO"
            )
    for site in _sites_of_q(model_trace, guide_trace):
        if not site["fn"].has_rsample:
            raise ValueError(
                f"site {site['name']!r} of the guide is {type(innermost(site['fn'])).__name__}, "
                "whose draws have no gradient; train with pyro.infer.Trace_ELBO, or with "
                "TraceEnum_ELBO where it is discrete"
            )


def _sites_of_q(model_trace: Trace, guide_trace: Trace) -> list[Site]:
    """The sites of the guide whose log-probabilities add up to log q(z | x)."""
    sites = sample_sites(guide_trace).values()
    return [s for s in sites if not (s["is_observed"] and s["name"] in model_trace.nodes)]


def elbo_terms(model_trace: Trace, guide_trace: Trace, *, mean_field: bool = False) -> Terms:
    """Terms of the ELBO from traces with log-probabilities: ``reconstruction``, ``kl``, ``loss``.

    The reconstruction is the log-probability of all that the model observes, factors included. The
    KL of each site is conditional on the sampled values of the sites before it, which is unbiased
    also for a hierarchy, and in closed form if these are all that the prior can depend on; what
    only the guide has, auxiliary noise and factors, counts as log q. Only ``loss`` carries the
    scales and masks of the sites. ``mean_field`` says that no site depends on another.
    """
    reconstruction = log_likelihood(model_trace)
    loss = -log_likelihood(model_trace, "log_prob")
    kl = torch.zeros_like(reconstruction)
    in_order = sampled_in_order(model_trace, guide_trace)
    for site in _sites_of_q(model_trace, guide_trace):
        divergence = site_kl(site, model_trace, closed=mean_field or site["name"] in in_order)
        kl = kl + per_image(divergence, site)
        loss = loss + per_image(scale_and_mask(divergence, site["scale"], site["mask"]), site)
    return {"reconstruction": reconstruction, "kl": kl, "loss": loss}


def log_likelihood(model_trace: Trace, which: str = "unscaled_log_prob") -> Tensor:
    """Log-probability of all that the model observes, per image ``(N,)``, in nats.

    ``which`` is ``"unscaled_log_prob"``, or ``"log_prob"`` with the sites' scales and masks; the
    trace has computed both.
    """
    terms = [per_image(site[which], site) for site in observed_sites(model_trace)]
    return sum(terms[1:], terms[0])


def add_terms(terms: Terms, extra: Terms) -> Terms:
    """The terms of an ELBO with further ones, each added to the loss with weight one."""
    return terms | extra | {"loss": terms["loss"] + sum(extra.values())}


def site_kl(guide_site: Site, model_trace: Trace, *, closed: bool = True) -> Tensor:
    """KL of one site, in its batch shape; analytic, or else log q - log p, or log q without p.

    ``closed`` is whether a closed form would be right.
    """
    q, value = guide_site["fn"], guide_site["value"]
    if guide_site["name"] not in model_trace.nodes:
        return q.log_prob(value)
    p: Any = model_trace.nodes[guide_site["name"]]["fn"]
    if p.event_dim != q.event_dim:  # as Pyro says, unless its validation is off
        raise ValueError(
            f"site {guide_site['name']!r} has {q.event_dim} event dimensions in the guide and "
            f"{p.event_dim} in the model, whose densities would be of different elements; declare "
            "the same in both with .to_event(...)"
        )
    try:
        # PyTorch's registry has one for Pyro's Delta, without its log_density.
        if closed and not is_point(q):
            return known_kl(q, p)
    except NotImplementedError:
        pass
    return q.log_prob(value) - p.log_prob(value)


def linear_schedule(num_steps: int, end: float = 1.0, start: float = 0.0) -> Schedule:
    """Weight that moves linearly from ``start`` to ``end`` in ``num_steps`` steps and stays there.

    Step ``t`` (from 0) has ``start + (end - start) min(1, (t + 1) / num_steps)``: a warm-up from 0
    is positive from its first step on, as a scale must be. ``start > end`` anneals downwards.

    >>> warm_up = linear_schedule(num_steps=4, end=2.0)
    >>> [warm_up(step) for step in (0, 1, 3, 100)]
    [0.5, 1.0, 2.0, 2.0]

    Raises ``ValueError`` if ``num_steps < 1``, ``start < 0`` or ``end <= 0``.
    """
    check_within("num_steps", num_steps, "[1, inf)")
    check_not_negative("start", start)
    check_positive("end", end)

    return lambda step: start + (end - start) * min(1.0, (step + 1) / num_steps)


def check_weight(name: str, weight: float | Schedule) -> float | Schedule:
    """A weight whose value, if it is constant, was found to be positive and finite."""
    return weight if callable(weight) else check_positive(name, weight)


def weight_at(name: str, weight: float | Schedule, step: int) -> float:
    """Value of a constant or scheduled weight at ``step``, checked to be positive and finite."""
    return check_positive(f"{name} at step {step}", weight(step)) if callable(weight) else weight
