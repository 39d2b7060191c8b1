"""VAEs as people write them in Pyro: each is trained, attacked, defended, scored and exported.

A :class:`Case` says how a VAE is written and what it means: log p(x, z) by ``torch.distributions``
alone, latents on their support. Everything else is one contract for all of them.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.nn.functional import one_hot, softplus

from pyro_vae_defence import metrics
from pyro_vae_defence.attacks import PGD, maximum_damage, mean_distance, symmetric_kl
from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import program
from pyro_vae_defence.ops.balls import Linf
from pyro_vae_defence.training import FitConfig, fit

pytestmark = pytest.mark.usefixtures("float64")

SHAPE, PIXELS, LATENTS, CLASSES = (1, 4, 4), 16, 2, 3


def pictures(count):
    """Left or right halves, or all, bright: images, one-hot classes and a positive size."""
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(count) % CLASSES
    x = torch.full((count, *SHAPE), 0.1)
    x[y != 0, :, :, :2] = 0.7
    x[y != 1, :, :, 2:] = 0.7
    x = x + 0.2 * torch.rand(x.shape, generator=generator)
    size = 0.5 + torch.rand(count, 1, generator=generator)
    return x, one_hot(y, CLASSES).to(x), size


def cat(*parts):
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], -1)


def normal(loc, scale):
    return td.Independent(td.Normal(loc, scale), 1)


def bernoulli(logits):
    return td.Independent(td.Bernoulli(logits=logits, validate_args=False), 1)


def standard(z):
    return td.Normal(0.0, 1.0).log_prob(z).sum(-1)


class Encoder(nn.Module):
    def __init__(self, given=PIXELS, latents=LATENTS):
        super().__init__()
        self.layer = nn.Linear(given, 2 * latents)

    def forward(self, x):
        loc, log_scale = self.layer(x).chunk(2, -1)
        return loc, (0.3 * log_scale).exp()


# --- As in Pyro's tutorials -----------------------------------------------------------------------


class Tutorial(nn.Module):
    """examples/vae.py: sites latent and obs, a flattened observation."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), nn.Linear(LATENTS, PIXELS)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(torch.Size((x.shape[0], LATENTS)))
            z = pyro.sample("latent", dist.Normal(z_loc, torch.ones_like(z_loc)).to_event(1))
            loc_img = torch.sigmoid(self.decoder(z))
            likelihood = dist.Bernoulli(loc_img, validate_args=False).to_event(1)
            pyro.sample("obs", likelihood, obs=x.reshape(-1, PIXELS))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder(x.reshape(-1, PIXELS))
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


def tutorial(vae, latents, x):
    z = latents["latent"]
    return standard(z) + bernoulli(vae.decoder(z)).log_prob(x.flatten(1))


class SemiSupervised(nn.Module):
    """examples/vae/ss_vae_M2.py: q(y | x) q(z | x, y); y is observed, or enumerated."""

    def __init__(self):
        super().__init__()
        self.encoder_y = nn.Linear(PIXELS, CLASSES)
        self.encoder_z = Encoder(PIXELS + CLASSES)
        self.decoder = nn.Linear(LATENTS + CLASSES, PIXELS)

    def model(self, xs, ys=None):
        pyro.module("ss_vae", self)
        with pyro.plate("data", len(xs)):
            zs = pyro.sample("z", dist.Normal(xs.new_zeros(len(xs), LATENTS), 1.0).to_event(1))
            alpha = xs.new_ones(len(xs), CLASSES) / CLASSES
            ys = pyro.sample("y", dist.OneHotCategorical(alpha), obs=ys)
            likelihood = dist.Bernoulli(logits=self.decoder(cat(zs, ys)), validate_args=False)
            pyro.sample("x", likelihood.to_event(1), obs=xs.flatten(1))

    def guide(self, xs, ys=None):
        with pyro.plate("data", len(xs)):
            if ys is None:
                q_y = dist.OneHotCategorical(logits=self.encoder_y(xs.flatten(1)))
                ys = pyro.sample("y", q_y, infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(*self.encoder_z(cat(xs.flatten(1), ys))).to_event(1))


def semi_supervised(vae, latents, x, y=None):
    z = latents["z"]
    if y is not None:
        likelihood = bernoulli(vae.decoder(cat(z, y))).log_prob(x.flatten(1))
        return standard(z) + likelihood - math.log(CLASSES)
    classes = torch.eye(CLASSES).split(1)
    return torch.stack([semi_supervised(vae, latents, x, y) for y in classes]).logsumexp(0)


class Scanvi(nn.Module):
    """examples/scanvi: two latents, an observed class and size, everything scaled."""

    def __init__(self):
        super().__init__()
        self.scale_factor = 1.0 / (16 * PIXELS)
        self.z2_decoder, self.x_decoder = Encoder(LATENTS + CLASSES), nn.Linear(LATENTS, PIXELS)
        self.classifier, self.sizes = nn.Linear(LATENTS, CLASSES), nn.Linear(LATENTS, 1)
        self.z2_encoder, self.z1_encoder = Encoder(), Encoder(LATENTS + CLASSES)

    def model(self, x, y=None, size=None):
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale_factor):
            z1 = pyro.sample("z1", dist.Normal(0, x.new_ones(LATENTS)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=self.classifier(z1)), obs=y)
            z2 = pyro.sample("z2", dist.Normal(*self.z2_decoder(cat(z1, y))).to_event(1))
            pyro.sample("l", dist.LogNormal(self.sizes(z2), 0.5).to_event(1), obs=size)
            mean = self.x_decoder(z2).sigmoid()
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x.flatten(1))

    def guide(self, x, y=None, size=None):
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale_factor):
            z2 = pyro.sample("z2", dist.Normal(*self.z2_encoder(x.flatten(1))).to_event(1))
            pyro.sample("z1", dist.Normal(*self.z1_encoder(cat(z2, y))).to_event(1))


def scanvi(vae, latents, x, y, size):
    z1, z2 = latents["z1"], latents["z2"]
    given = normal(*vae.z2_decoder(cat(z1, y))).log_prob(z2)
    label = (y * vae.classifier(z1).log_softmax(-1)).sum(-1)
    sizes = td.LogNormal(vae.sizes(z2), 0.5).log_prob(size).sum(-1)
    image = normal(vae.x_decoder(z2).sigmoid(), 0.5).log_prob(x.flatten(1))
    return standard(z1) + label + given + sizes + image


class TheOtherHalf(nn.Module):
    """examples/cvae: one half of an image is given, the other is what the model observes."""

    def __init__(self):
        super().__init__()
        half = PIXELS // 2
        self.baseline = nn.Linear(half, half)
        self.prior, self.encoder = Encoder(half), Encoder(PIXELS)
        self.decoder = nn.Linear(LATENTS, half)

    def logits(self, z, half):
        return self.decoder(z) + self.baseline(half.flatten(1))

    def model(self, x, half):
        pyro.module("generation_net", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(*self.prior(half.flatten(1))).to_event(1))
            likelihood = dist.Bernoulli(logits=self.logits(z, half), validate_args=False)
            pyro.sample("y", likelihood.to_event(1), obs=x[..., 2:].flatten(1))

    def guide(self, x, half):
        with pyro.plate("data", len(x)):
            given = torch.cat([x[..., 2:], half], -1).flatten(1)
            pyro.sample("z", dist.Normal(*self.encoder(given)).to_event(1))


class TheWhole(TheOtherHalf):
    def to_images(self, latents, half):
        missing = self.logits(latents["z"], half).sigmoid().reshape(half.shape)
        return torch.cat([half, missing], -1)


def the_other_half(vae, latents, x, half):
    z = latents["z"]
    prior = normal(*vae.prior(half.flatten(1))).log_prob(z)
    return prior + bernoulli(vae.logits(z, half)).log_prob(x[..., 2:].flatten(1))


class Flow(Tutorial):
    """examples/dmm.py: an inverse autoregressive flow as guide."""

    def __init__(self):
        super().__init__()
        self.iaf = dist.transforms.affine_autoregressive(LATENTS, hidden_dims=[8])

    def guide(self, x):
        pyro.module("flow", self)
        with pyro.plate("data", len(x)):
            base = dist.Normal(*self.encoder(x.flatten(1)))
            pyro.sample("latent", dist.TransformedDistribution(base, [self.iaf]))


class FullCovariance(Tutorial):
    """A guide with a covariance matrix per image."""

    def __init__(self):
        super().__init__()
        self.lower = nn.Linear(PIXELS, LATENTS * LATENTS)

    def guide(self, x):
        pyro.module("lower", self.lower)
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x.flatten(1))
            lower = self.lower(x.flatten(1)).reshape(-1, LATENTS, LATENTS).tril(-1)
            scale_tril = lower + torch.diag_embed(scale)
            pyro.sample("latent", dist.MultivariateNormal(loc, scale_tril=scale_tril))


class Deterministic(Tutorial):
    """An encoder without noise."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(PIXELS, LATENTS)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("latent", dist.Delta(self.encoder(x.flatten(1))).to_event(1))


class Annealed(Tutorial):
    """examples/dmm.py, too: an annealing factor on latents, which is no condition."""

    def model(self, x, annealing_factor=0.3):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=annealing_factor):
                z = pyro.sample("latent", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            likelihood = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            pyro.sample("obs", likelihood.to_event(1), obs=x.flatten(1))

    def guide(self, x, annealing_factor=0.3):
        with poutine.scale(scale=annealing_factor):
            super().guide(x)


class Plates(Tutorial):
    """A plate for every dimension, in place of to_event."""

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-2):
            with pyro.plate("latents", LATENTS, dim=-1):
                z = pyro.sample("latent", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("pixels", PIXELS, dim=-1):
                likelihood = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
                pyro.sample("obs", likelihood, obs=x.flatten(1))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x), dim=-2), pyro.plate("latents", LATENTS, dim=-1):
            pyro.sample("latent", dist.Normal(*self.encoder(x.flatten(1))))


class Missing(Tutorial):
    """Pixels that are not known are masked."""

    def model(self, x, known):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            likelihood = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            likelihood = likelihood.mask(known.flatten(1)).to_event(1)
            pyro.sample("obs", likelihood, obs=x.flatten(1))

    def guide(self, x, known):
        super().guide(x * known)


def missing(vae, latents, x, known):
    z = latents["latent"]
    pixels = td.Bernoulli(logits=vae.decoder(z), validate_args=False).log_prob(x.flatten(1))
    return standard(z) + (pixels * known.flatten(1)).sum(-1)


class Binarised(Tutorial):
    """Pixels become 0 or 1 inside the model."""

    def model(self, x):
        super().model((x > 0.5).to(x))


def binarised(vae, latents, x):
    return tutorial(vae, latents, (x > 0.5).to(x))


# --- Priors ---------------------------------------------------------------------------------------


class Vamp(Tutorial):
    """A VampPrior: the mixture of the guide at pseudo-inputs."""

    def __init__(self):
        super().__init__()
        self.pseudo_inputs = nn.Parameter(torch.rand(CLASSES, PIXELS))

    def model(self, x):
        pyro.module("vamp", self)
        loc, scale = self.encoder(self.pseudo_inputs.clamp(0, 1))
        mixture = dist.Categorical(logits=x.new_zeros(CLASSES))
        prior = dist.MixtureSameFamily(mixture, dist.Normal(loc, scale).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", prior)
            likelihood = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            pyro.sample("obs", likelihood.to_event(1), obs=x.flatten(1))


def vamp(vae, latents, x):
    z = latents["latent"]
    loc, scale = vae.encoder(vae.pseudo_inputs.clamp(0, 1))
    prior = normal(loc, scale).log_prob(z[:, None]).logsumexp(1) - math.log(CLASSES)
    return prior + bernoulli(vae.decoder(z)).log_prob(x.flatten(1))


class FlowPrior(Tutorial):
    """A flow in front of a standard normal distribution."""

    def __init__(self):
        super().__init__()
        self.flow = dist.transforms.affine_autoregressive(LATENTS, hidden_dims=[8])

    def model(self, x):
        pyro.module("flow_prior", self)
        base = dist.Normal(x.new_zeros(LATENTS), 1.0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.TransformedDistribution(base, [self.flow]))
            likelihood = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            pyro.sample("obs", likelihood.to_event(1), obs=x.flatten(1))


def flow_prior(vae, latents, x):
    z = latents["latent"]
    noise = z
    for _ in range(LATENTS + 1):  # each round makes one more element right
        mean, log_scale = vae.flow.arn(noise)
        noise = (z - mean) / log_scale.exp()
    prior = standard(noise) - log_scale.sum(-1)
    return prior + bernoulli(vae.decoder(z)).log_prob(x.flatten(1))


class Clusters(Tutorial):
    """A Gaussian mixture by an enumerated component, which the guide does not mention."""

    def __init__(self):
        super().__init__()
        self.logits, self.locs = nn.Parameter(torch.randn(CLASSES)), nn.Linear(CLASSES, LATENTS)

    def model(self, x):
        pyro.module("clusters", self)
        with pyro.plate("data", len(x)):
            component = dist.OneHotCategorical(logits=self.logits)
            c = pyro.sample("c", component, infer={"enumerate": "parallel"})
            z = pyro.sample("latent", dist.Normal(self.locs(c), 0.7).to_event(1))
            likelihood = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            pyro.sample("obs", likelihood.to_event(1), obs=x.flatten(1))


def clusters(vae, latents, x):
    z = latents["latent"]
    components = normal(vae.locs(torch.eye(CLASSES)), 0.7).log_prob(z[:, None])
    prior = (vae.logits.log_softmax(-1) + components).logsumexp(-1)
    return prior + bernoulli(vae.decoder(z)).log_prob(x.flatten(1))


class Constrained(nn.Module):
    """Latents on a simplex and on two half-lines."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(PIXELS, 3 + 2 + 4), nn.Linear(3 + 1 + 2, PIXELS)

    def model(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            topics = pyro.sample("topics", dist.Dirichlet(x.new_full((len(x), 3), 2.0)))
            rate = pyro.sample("rate", dist.Gamma(x.new_full((1,), 3.0), 2.0).to_event(1))
            size = pyro.sample("size", dist.LogNormal(x.new_zeros(2), 0.5).to_event(1))
            mean = self.decoder(cat(topics, rate, size)).sigmoid()
            pyro.sample("obs", dist.Normal(mean, 0.5).to_event(1), obs=x.flatten(1))

    def guide(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            a, b, c = self.encoder(x.flatten(1)).split([3, 2, 4], -1)
            pyro.sample("topics", dist.Dirichlet(1 + softplus(a)))
            pyro.sample(
                "rate", dist.Gamma(2 + softplus(b[:, :1]), 1 + softplus(b[:, 1:])).to_event(1)
            )
            pyro.sample("size", dist.LogNormal(c[:, :2], 0.5 + softplus(c[:, 2:])).to_event(1))


def constrained(vae, latents, x):
    topics, rate, size = (latents[name] for name in ("topics", "rate", "size"))
    prior = td.Dirichlet(torch.full((3,), 2.0)).log_prob(topics)
    prior = prior + td.Gamma(3.0, 2.0).log_prob(rate).sum(-1)
    prior = prior + td.LogNormal(0.0, 0.5).log_prob(size).sum(-1)
    return prior + normal(vae.decoder(cat(topics, rate, size)).sigmoid(), 0.5).log_prob(
        x.flatten(1)
    )


class Sticks(Tutorial):
    """Sticks broken by a Kumaraswamy distribution."""

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Beta(x.new_ones(LATENTS), 2.0).to_event(1))
            likelihood = dist.Bernoulli(logits=self.decoder(v), validate_args=False)
            pyro.sample("obs", likelihood.to_event(1), obs=x.flatten(1))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            a, b = self.encoder(x.flatten(1))
            pyro.sample("v", dist.Kumaraswamy(1 + softplus(a), 1 + b).to_event(1))


def sticks(vae, latents, x):
    v = latents["v"]
    prior = td.Beta(1.0, 2.0).log_prob(v).sum(-1)
    return prior + bernoulli(vae.decoder(v)).log_prob(x.flatten(1))


class Concrete(nn.Module):
    """A class that is relaxed to a point of the simplex."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(PIXELS, CLASSES), nn.Linear(CLASSES, PIXELS)
        self.register_buffer("temperature", torch.tensor(0.7))

    def model(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            prior = dist.RelaxedOneHotCategorical(self.temperature, x.new_ones(len(x), CLASSES))
            z = pyro.sample("z", prior)
            likelihood = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            pyro.sample("obs", likelihood.to_event(1), obs=x.flatten(1))

    def guide(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            logits = self.encoder(x.flatten(1))
            q = dist.RelaxedOneHotCategorical(self.temperature, logits=logits)
            pyro.sample("z", q)


def concrete(vae, latents, x):
    z = latents["z"]
    # Maddison, Mnih, Teh, "The concrete distribution", 2017, eq. 10.
    t = vae.temperature
    prior = math.lgamma(CLASSES) + (CLASSES - 1) * t.log() - (t + 1) * z.log().sum(-1)
    prior = prior - CLASSES * (-t * z.log()).logsumexp(-1)
    return prior + bernoulli(vae.decoder(z)).log_prob(x.flatten(1))


class Auxiliary(nn.Module):
    """A guide as Pyro's autoguides make it: auxiliary noise, and a Delta on the support."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), nn.Linear(LATENTS, PIXELS)

    def model(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(x.new_zeros(LATENTS), 0.5).to_event(1))
            mean = self.decoder(z).sigmoid()
            pyro.sample("obs", dist.Normal(mean, 0.5).to_event(1), obs=x.flatten(1))

    def guide(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            noise = dist.Normal(*self.encoder(x.flatten(1))).to_event(1)
            u = pyro.sample("noise", noise, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u.sum(-1), event_dim=1))


def auxiliary(vae, latents, x):
    z = latents["z"]
    prior = td.LogNormal(0.0, 0.5).log_prob(z).sum(-1)
    return prior + normal(vae.decoder(z).sigmoid(), 0.5).log_prob(x.flatten(1))


# --- Likelihoods ----------------------------------------------------------------------------------


class Likelihood(nn.Module):
    """Images rescaled as its likelihood would have them."""

    def __init__(self, likelihood, rescale=lambda x: x):
        super().__init__()
        self.likelihood, self.rescale = likelihood, rescale
        self.encoder, self.decoder = Encoder(), nn.Linear(LATENTS, PIXELS)

    def model(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            likelihood = self.likelihood(dist, self.decoder(z).reshape(x.shape))
            pyro.sample("image", likelihood.to_event(3), obs=self.rescale(x))

    def guide(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(self.rescale(x).flatten(1))
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def likelihood(vae, latents, x):
    z = latents["z"]
    image = vae.likelihood(td, vae.decoder(z).reshape(x.shape)).log_prob(vae.rescale(x))
    return standard(z) + image.flatten(1).sum(-1)


def laplace(family, h):
    return family.Laplace(h.tanh(), 0.5)


def student(family, h):
    return family.StudentT(4.0, 4 * h, 1.0)  # its mean may leave the range of images


def beta(family, h):
    return family.Beta(1 + softplus(h), 1 + softplus(-h))


def continuous_bernoulli(family, h):
    return family.ContinuousBernoulli(logits=h)


def gaussian(family, h):
    return family.Normal(h.tanh(), 0.7)


class Parts(nn.Module):
    """Two halves of the image at a site each, and an attribute that is observed further."""

    def __init__(self):
        super().__init__()
        self.encoder, self.attribute = Encoder(), nn.Linear(LATENTS, CLASSES)
        self.top, self.bottom = nn.Linear(LATENTS, PIXELS // 2), nn.Linear(LATENTS, PIXELS // 2)

    def model(self, x, y):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            top, bottom = x.flatten(1).chunk(2, -1)
            pyro.sample("top", dist.Normal(self.top(z).sigmoid(), 0.5).to_event(1), obs=top)
            bottom_half = dist.Bernoulli(logits=self.bottom(z), validate_args=False).to_event(1)
            pyro.sample("bottom", bottom_half, obs=bottom)
            pyro.sample("attribute", dist.Bernoulli(logits=self.attribute(z)).to_event(1), obs=y)

    def guide(self, x, y):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*self.encoder(x.flatten(1))).to_event(1))


def parts(vae, latents, x, y):
    z = latents["z"]
    top, bottom = x.flatten(1).chunk(2, -1)
    image = normal(vae.top(z).sigmoid(), 0.5).log_prob(top)
    image = image + bernoulli(vae.bottom(z)).log_prob(bottom)
    return standard(z) + image + bernoulli(vae.attribute(z)).log_prob(y)


# --- Ways of holding parameters and arguments -----------------------------------------------------


class PyroModel(PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder = PyroModule[nn.Linear](LATENTS, PIXELS)
        self.noise = PyroParam(torch.tensor(0.5), dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            mean = self.decoder(z).sigmoid()
            pyro.sample("obs", dist.Normal(mean, self.noise).to_event(1), obs=x.flatten(1))


class PyroGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder = PyroModule[nn.Linear](PIXELS, LATENTS)
        self.scale = PyroParam(torch.ones(LATENTS), dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc = self.encoder(x.flatten(1))
            pyro.sample("z", dist.Normal(loc, self.scale).to_event(1))


def pyro_modules():
    return types.SimpleNamespace(model=PyroModel(), guide=PyroGuide())


def of_pyro_modules(vae, latents, x):
    z, model = latents["z"], vae.model
    return standard(z) + normal(model.decoder(z).sigmoid(), model.noise).log_prob(x.flatten(1))


class Plain:
    """No module itself, and a plate that is not told its size."""

    def __init__(self):
        self.trunk, self.head = nn.Linear(PIXELS, 8), nn.Linear(8, LATENTS)
        self.decoder = nn.Linear(LATENTS, PIXELS)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data"):
            zeros = x.new_zeros(len(x), LATENTS)
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            likelihood = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            pyro.sample("obs", likelihood.to_event(1), obs=x.flatten(1))

    def guide(self, x):
        pyro.module("trunk", self.trunk)
        pyro.module("head", self.head)
        with pyro.plate("data"):
            loc = self.head(self.trunk(x.flatten(1)).tanh())
            pyro.sample("z", dist.Normal(loc, 0.8).to_event(1))


def plain(vae, latents, x):
    z = latents["z"]
    return standard(z) + bernoulli(vae.decoder(z)).log_prob(x.flatten(1))


def closures():
    """Two functions, whose parameters are in Pyro's store alone."""
    start = torch.randn(LATENTS, PIXELS)

    def model(x):
        weight = pyro.param("weight", start)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            likelihood = dist.Bernoulli(logits=z @ weight, validate_args=False).to_event(1)
            pyro.sample("obs", likelihood, obs=x.flatten(1))

    def guide(x):
        loc = x.flatten(1) @ pyro.param("projection", 0.1 * start.T)
        scale = pyro.param("scale", torch.ones(LATENTS), dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return types.SimpleNamespace(model=model, guide=guide)


def of_closures(vae, latents, x):
    z = latents["z"]
    return standard(z) + bernoulli(z @ pyro.param("weight")).log_prob(x.flatten(1))


def bound(vae, x, y):
    """The same programs with labels bound beforehand."""
    model, guide = (functools.partial(program, ys=y) for program in (vae.model, vae.guide))
    return types.SimpleNamespace(model=model, guide=guide), x


# --- The table ------------------------------------------------------------------------------------


def given(vae, x, *conditions):
    return vae, (x, *conditions) if conditions else x


def labels(x, y, size):
    return (y,)


def half(x, y, size):
    return (x[..., :2],)


ENUMERATED = functools.partial(TraceEnum_ELBO, max_plate_nesting=1)
FLOW = "'latent' is TransformedDistribution, whose mean is not known.*symmetric_kl"
UNKNOWN = "maximum_damage"
MIXTURE = r"'z' depends on discrete latents.*maximum_damage"


@dataclass(frozen=True)
class Case:
    """A VAE and what it means.

    Attributes:
        make: makes it.
        log_joint: log p(x, z) by hand, of ``(vae, latents, x, *conditions)``, shape ``(N,)``.
        conditions: what comes with images, of ``pictures``.
        given: the VAE and the images as they are handed to the library.
        objective: an attack's that applies.
        refused: what those that do not apply say.
        undecoded: what a defence says of a VAE that it cannot decode.
        unscored: what ``nll`` says of a guide without density.
        idle: parameters that this use of the VAE does not train.
    """

    make: Callable[[], Any]
    log_joint: Callable[..., torch.Tensor]
    conditions: Callable[..., tuple[torch.Tensor, ...]] = lambda x, y, size: ()
    given: Callable[..., tuple[Any, Any]] = given
    objective: Callable[..., Any] = symmetric_kl
    elbo: Callable[[], Any] = Trace_ELBO
    refused: dict[Callable[..., Any], str] = field(default_factory=dict)
    undecoded: str = ""
    unscored: str = ""
    idle: str = "nothing"

    def images(self, count):
        x, y, size = pictures(count)
        return x, *self.conditions(x, y, size)


M2 = Case(SemiSupervised, semi_supervised, labels, idle="encoder_y")


def images_in(family, rescale=lambda x: x):
    return Case(functools.partial(Likelihood, family, rescale), likelihood)


CASES = {
    "tutorial": Case(Tutorial, tutorial),
    "M2, labels": M2,
    "M2, labels bound": Case(
        SemiSupervised, semi_supervised, labels, given=bound, idle="encoder_y"
    ),
    "M2, no labels": Case(
        SemiSupervised,
        semi_supervised,
        objective=maximum_damage,
        elbo=ENUMERATED,
        refused={mean_distance: MIXTURE, symmetric_kl: MIXTURE},
    ),
    "scANVI": Case(Scanvi, scanvi, lambda x, y, size: (y, size), objective=mean_distance),
    "CVAE": Case(
        TheOtherHalf, the_other_half, half, undecoded="give the VAE a method to_images"
    ),
    "CVAE, to_images": Case(TheWhole, the_other_half, half),
    "IAF": Case(Flow, tutorial, refused={mean_distance: FLOW}),
    "full covariance": Case(FullCovariance, tutorial),
    "deterministic": Case(
        Deterministic,
        tutorial,
        objective=mean_distance,
        refused={symmetric_kl: UNKNOWN},
        unscored="Delta",
    ),
    "annealed": Case(Annealed, tutorial),
    "plates": Case(Plates, tutorial),
    "missing pixels": Case(Missing, missing, lambda x, y, size: (x < 0.8,)),
    "binarised": Case(
        Binarised, binarised, undecoded="give the VAE a method to_images"
    ),
    "VampPrior": Case(Vamp, vamp),
    "flow prior": Case(FlowPrior, flow_prior),
    "enumerated component": Case(Clusters, clusters, elbo=ENUMERATED),
    "constrained": Case(Constrained, constrained),
    "auxiliary": Case(Auxiliary, auxiliary),
    "stick-breaking": Case(
        Sticks, sticks, objective=mean_distance, refused={symmetric_kl: UNKNOWN}
    ),
    "concrete": Case(
        Concrete,
        concrete,
        objective=functools.partial(maximum_damage, num_draws=10),
        refused={mean_distance: UNKNOWN, symmetric_kl: UNKNOWN},
    ),
    "continuous Bernoulli": images_in(continuous_bernoulli),
    "Laplace, 2x - 1": images_in(laplace, lambda x: 2 * x - 1),
    "Student's t, standardised": images_in(student, lambda x: (x - 0.4) / 0.3),
    "beta": images_in(beta),
    "Gaussian, 2x - 1": images_in(gaussian, lambda x: 2 * x - 1),
    "parts": Case(Parts, parts, labels),
    "PyroModule": Case(pyro_modules, of_pyro_modules),
    "plain": Case(Plain, plain),
    "closures": Case(closures, of_closures),
}  # fmt: skip

COUNT = 3
HMC = functools.partial(BatchedHMC, num_steps=3, step_size=0.2)


@pytest.fixture(params=CASES)
def trained(request):
    """A case, its VAE after two epochs, and what happened in them."""
    case = CASES[request.param]
    vae = case.make()
    batches = [case.images(12)] * 12
    handed = case.given(vae, *batches[0])[0]
    loader = [case.given(vae, *batch)[1] for batch in batches]
    with torch.no_grad():  # registers parameters
        for written in (vae.guide, vae.model):
            poutine.trace(written).get_trace(*batches[0])
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    config = FitConfig(epochs=2, learning_rate=0.02, schedule="constant", progress=False)
    history = fit(handed, case.elbo(), loader, config).history
    return case, vae, before, [entry["train_loss"] for entry in history]


def log_det(energy, latents):
    """Of the map from unconstrained latents to the support, per row, by its derivative."""
    total = torch.zeros(len(next(iter(latents.values()))))
    for name, transform in energy.transforms.items():
        for row, u in enumerate(energy.unconstrain(latents)[name]):
            jacobian = torch.autograd.functional.jacobian(transform, u)
            total[row] += jacobian[: len(u)].slogdet()[1]  # a simplex has one element more
    return total


def first_rows(draws, chain, draw):
    return {name: value[chain, draw] for name, value in draws.items()}


def test_contract(trained):
    case, vae, before, losses = trained
    check_training(case, before, losses)
    check_energy(case, vae)
    check_attack(case, vae)
    check_evidence(case, vae)
    check_defence(case, vae)


def check_training(case, before, losses):
    assert losses[1] < losses[0]
    store = dict(pyro.get_param_store().items())
    assert store.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(value, store[name]) == (case.idle in name), name


def check_energy(case, vae):
    x, *conditions = case.images(COUNT)
    at_x, _ = program.at_images(*case.given(vae, x, *conditions))
    energy = program.potential(at_x, x)
    latents = program.prior(at_x, x)
    expected = -case.log_joint(vae, latents, x, *conditions) - log_det(energy, latents)
    torch.testing.assert_close(energy(energy.unconstrain(latents)), expected)


def check_attack(case, vae):
    x, *conditions = case.images(COUNT)
    handed, images = case.given(vae, x, *conditions)
    for objective, message in case.refused.items():
        with pytest.raises(ValueError, match=message):
            PGD(objective(handed), Linf(0.1), num_steps=1)(images)
    near, far = (
        PGD(case.objective(handed), Linf(radius), num_steps=5)(images) for radius in (0.02, 0.1)
    )
    assert (far.x_adv - x).abs().max() <= 0.1 + 1e-12
    assert far.x_adv.min() >= 0
    assert far.x_adv.max() <= 1
    assert (near.objective > 0).all()
    assert (far.objective > 1.5 * near.objective).all()


def check_evidence(case, vae):
    """p(x) from the guide's draws, and as the mean of p(x | z) over draws from the prior."""
    x, *conditions = case.images(COUNT)
    handed, images = case.given(vae, x, *conditions)
    if case.unscored:
        with pytest.raises(ValueError, match=case.unscored):
            metrics.nll(handed, images)
        return
    groups, few, many = 20, 1600, 400

    def repeated(times):
        return [value.repeat((times,) + (1,) * (value.dim() - 1)) for value in (x, *conditions)]

    # Copies of an image have draws of their own. Many rows at once cost little more than few.
    handed, copies = case.given(vae, *repeated(groups))
    generator = torch.Generator().manual_seed(2)
    from_guide = metrics.nll(handed, copies, few, rows=16_000, generator=generator)
    from_guide = from_guide.view(groups, COUNT)
    with torch.no_grad():
        trace = poutine.trace(vae.model).get_trace(*repeated(groups * many))
        trace.compute_log_prob()
    log_likelihood = sum(
        site["unscaled_log_prob"].reshape(groups * many * COUNT, -1).sum(-1)
        for site in trace.nodes.values()
        if site["type"] == "sample" and site["is_observed"] and site["name"] != "data"
    )
    from_prior = log_likelihood.reshape(groups, many, COUNT).logsumexp(1) - math.log(many)
    level = from_prior.max(0).values
    p, q = (from_prior - level).exp(), (-from_guide - level).exp()
    error = ((p.var(0) + q.var(0)) / groups).sqrt()
    # Means of 20: beyond 5 standard errors once in 10^4.
    assert ((p.mean(0) - q.mean(0)).abs() < 5 * error).all()
    assert (error < 0.15 * p.mean(0)).all()


def check_defence(case, vae):
    x, *conditions = case.images(COUNT)
    handed, images = case.given(vae, x, *conditions)
    defend = MCMCDefence(handed, HMC, num_samples=3, warmup_steps=3, num_chains=2)
    if case.undecoded:
        with pytest.raises(ValueError, match=case.undecoded):
            defend(images)
        return

    def run(order):
        torch.manual_seed(4)
        handed, images = case.given(vae, *(value[order] for value in (x, *conditions)))
        defend.vae = handed
        return defend(images, torch.Generator().manual_seed(5))

    result = run(torch.arange(COUNT))
    assert result.reconstruction.shape == x.shape
    assert result.reconstruction.min() >= 0
    assert result.reconstruction.max() <= 1
    energy = program.potential(program.at_images(handed, images)[0], x)
    for site in energy.sites:
        assert result.samples[site.name].shape[:3] == (2, 3, COUNT)
    for chain in range(2):
        for draw in range(3):
            latents = first_rows(result.samples, chain, draw)
            expected = case.log_joint(vae, latents, x, *conditions) + log_det(energy, latents)
            torch.testing.assert_close(result.sample_stats["lp"][chain, draw], expected)

    # The first image keeps its number, and with it its noise, while the others change places.
    other = run(torch.tensor([0, 2, 1]))
    torch.testing.assert_close(other.reconstruction[0], result.reconstruction[0])
    for name, value in result.samples.items():
        torch.testing.assert_close(other.samples[name][0, :, 0], value[0, :, 0])
    assert not torch.allclose(other.reconstruction[1], result.reconstruction[1])

    tree = result.to_datatree()
    assert set(tree["posterior"].data_vars) == {site.name for site in energy.sites}
    assert tree["sample_stats"]["lp"].shape == (2, 3, COUNT)
