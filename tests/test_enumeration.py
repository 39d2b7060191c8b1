"""Discrete latents summed out, against sums over all their values written out by hand."""

from __future__ import annotations

import functools
import itertools
import math
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae_defence.attacks import PGD, maximum_damage
from pyro_vae_defence.models.enumeration import (
    check_broadcast,
    enumerable,
    in_parallel,
    is_enumerated,
    log_density,
    marginal_mean,
)
from pyro_vae_defence.models.program import ModelPotential
from pyro_vae_defence.models.sites import log_prob_per_image, sample_sites
from pyro_vae_defence.ops.balls import Linf

pytestmark = pytest.mark.usefixtures("float64")

PIXELS = 4


def images(count=3):
    return torch.rand(count, PIXELS, generator=torch.Generator().manual_seed(1)).double()


@functools.cache
def table(*shape):
    """Numbers that programs take for parameters."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).double()


# --- Programs: model(x), with latents "z" and others, and its discrete sites ----------------------


def mixture(x):
    """A mixture in z alone."""
    with pyro.plate("data", x.shape[0]):
        y = pyro.sample("y", dist.Categorical(logits=table(3)))
        z = pyro.sample("z", dist.Normal(table(3, 2)[y], 0.7).to_event(1))
        pyro.sample("obs", dist.Normal(z @ table(2, PIXELS), 0.5).to_event(1), obs=x)


def two_classes(x):
    """A chain y -> w of different supports; the likelihood depends on both."""
    with pyro.plate("data", x.shape[0]):
        y = pyro.sample("y", dist.Categorical(logits=table(3)))
        w = pyro.sample("w", dist.Bernoulli(logits=table(3)[y]))
        z = pyro.sample("z", dist.Normal(table(3, 2)[y], 0.7).to_event(1))
        loc = z @ table(2, PIXELS) + table(3, PIXELS)[y] * w[..., None]
        pyro.sample("obs", dist.Normal(loc, 0.5).to_event(1), obs=x)


def markov_chain(x):
    """A hidden Markov chain of four steps with recycled dimensions; it emits parts of z."""
    with pyro.plate("data", x.shape[0], dim=-2):
        y, emitted = 0, []
        for step in pyro.markov(range(4)):
            y = pyro.sample(f"y{step}", dist.Categorical(logits=table(3, 3)[y]))
            loc = table(5, 3)[step][y]
            emitted.append(pyro.sample(f"z{step}", dist.Normal(loc, 0.6)))
        z = torch.stack(emitted, -1)
        loc = z @ table(4, PIXELS)
        pyro.sample("obs", dist.Normal(loc, 0.5).to_event(1), obs=x[:, None])


def nested(x):
    """A class per image, one per group of an inner plate that depends on it, and scales."""
    with pyro.plate("data", x.shape[0], dim=-3):
        y = pyro.sample("y", dist.OneHotCategorical(logits=table(2)))
        loc = y @ table(2, 2)
        top = pyro.sample("top", dist.Normal(loc, 0.8).to_event(1))
        with pyro.plate("groups", 2, dim=-1), poutine.scale(scale=0.3):
            w = pyro.sample("w", dist.Categorical(logits=y @ table(2, 3)))
            low = pyro.sample("low", dist.Normal(table(3)[w] + top.sum(-1), 0.5))
            pixels = x.reshape(-1, 1, 2, PIXELS // 2)
            loc = low[..., None] + table(3, 2)[w]
            pyro.sample("obs", dist.Normal(loc, 0.4).to_event(1), obs=pixels)


def masked(x):
    """The class and all that depends on it are masked in some images, and some pixels in all."""
    present = torch.arange(x.shape[0]) % 2 == 0
    with pyro.plate("data", x.shape[0]):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = z @ table(2, PIXELS)
        with poutine.mask(mask=present):
            y = pyro.sample("y", dist.Categorical(logits=table(3)))
            pyro.sample("v", dist.Normal(table(3)[y] + z.sum(-1), 0.5))
        seen = torch.tensor([True, False, True, True])
        fn = dist.Normal(loc, 0.5).mask(seen).to_event(1)
        pyro.sample("obs", fn, obs=x)


MODELS = [mixture, two_classes, markov_chain, nested]


def latents_of(model, x):
    """A draw of the continuous latents."""
    trace = poutine.trace(model).get_trace(x)
    discrete = enumerable(trace)
    return {
        name: site["value"].requires_grad_()
        for name, site in sample_sites(trace).items()
        if not site["is_observed"] and name not in discrete
    }


def enumerated(model, latents, x):
    conditioned = poutine.condition(model, data=latents)
    plain = poutine.trace(conditioned).get_trace(x)
    return poutine.trace(in_parallel(conditioned, plain)).get_trace(x)


def configurations(model, latents, x):
    """A plain trace for every value of every element of every discrete site."""
    conditioned = poutine.condition(model, data=latents)
    plain = poutine.trace(conditioned).get_trace(x)
    choices = []
    for name in enumerable(plain):
        site = plain.nodes[name]
        fn, value = site["fn"], site["value"]
        events = fn.event_shape
        values = fn.enumerate_support(expand=False).reshape(-1, *events)
        elements = value[0].numel() // max(1, math.prod(events))
        shape = (1, *value.shape[1:])
        choices.append(
            [
                (name, torch.stack(chosen).reshape(shape).expand(value.shape))
                for chosen in itertools.product(values, repeat=elements)
            ]
        )
    for chosen in itertools.product(*choices):
        yield poutine.trace(poutine.condition(conditioned, data=dict(chosen))).get_trace(x)


def by_hand(model, latents, x, leave_out=()):
    """Log-probability per image of every configuration of the discrete sites, and its trace."""
    traces = list(configurations(model, latents, x))
    sums = []
    for trace in traces:
        sites = [site for name, site in sample_sites(trace).items() if name not in leave_out]
        sums.append(sum(log_prob_per_image(site, len(x)) for site in sites))
    return torch.stack(sums), traces


def gradients(value, latents):
    return torch.autograd.grad(value.sum(), list(latents.values()))


# --- The density ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_density_is_the_sum_over_all_configurations(model, count):
    x = images(count)
    latents = latents_of(model, x)
    density = log_density(enumerated(model, latents, x), "data")
    expected = by_hand(model, latents, x)[0].logsumexp(0)
    torch.testing.assert_close(density, expected)
    torch.testing.assert_close(gradients(density, latents), gradients(expected, latents))


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_is_its_images_one_by_one(model):
    x = images(3)
    latents = latents_of(model, x)
    together = log_density(enumerated(model, latents, x), "data")
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in latents.items()}
        alone = log_density(enumerated(model, one, x[row : row + 1]), "data")
        torch.testing.assert_close(alone, together[row : row + 1])


def test_where_all_that_depends_on_a_class_is_masked_nothing_is_left_of_it():
    x = images(3)
    latents = latents_of(masked, x)
    density = log_density(enumerated(masked, latents, x), "data")
    z, v = latents["z"], latents["v"]
    seen = torch.tensor([True, False, True, True])
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    pixels = dist.Normal(z @ table(2, PIXELS), 0.5).log_prob(x)
    expected = expected + pixels[:, seen].sum(-1)
    classes = table(3).log_softmax(0)
    means = table(3) + z.sum(-1, keepdim=True)
    mixed = (classes + dist.Normal(means, 0.5).log_prob(v[:, None])).logsumexp(-1)
    expected = expected + torch.tensor([1.0, 0.0, 1.0]) * mixed
    torch.testing.assert_close(density, expected)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(z, event_dim=1))
            pyro.sample("v", dist.Delta(v))

    elbo = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    loss = elbo.loss(config_enumerate(masked), guide, x)
    torch.testing.assert_close(-loss, expected.sum().item())


@pytest.mark.parametrize(("model", "plates"), [(mixture, 1), (two_classes, 1), (markov_chain, 2)])
def test_density_of_all_images_is_pyros(model, plates):
    x = images(3)
    latents = latents_of(model, x)
    trace = enumerated(model, latents, x)
    density = log_density(trace, "data")
    evaluator = TraceEinsumEvaluator(trace, has_enumerable_sites=True, max_plate_nesting=plates)
    torch.testing.assert_close(density.sum(), evaluator.log_prob(trace))


def test_annotations_of_the_program_have_no_effect():
    x = images(2)
    latents = latents_of(two_classes, x)
    expected = log_density(enumerated(two_classes, latents, x), "data")
    for options in ({"default": "sequential"}, {"num_samples": 2}, {"expand": True}):
        model = config_enumerate(two_classes, **options)
        assert torch.equal(log_density(enumerated(model, latents, x), "data"), expected)


def test_prior_and_likelihood_that_disagree_by_hundreds_of_nats():
    torch.set_default_dtype(torch.float32)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=torch.tensor([0.0, 500.0])))
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(y.to(x), 0.02), obs=x)

    trace = enumerated(model, {"z": torch.zeros(1, 1)}, torch.zeros(1))
    # y = 0: log p(y) = -500. y = 1: log p(x | y) is 50**2 / 2 = 1250 less.
    normal = -math.log(0.02) - math.log(2 * math.pi)
    torch.testing.assert_close(log_density(trace, "data"), torch.tensor([normal - 500.0]))


def test_states_out_of_reach_leave_gradients_finite():
    moves = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]).log()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            first = pyro.sample(
                "first", dist.Categorical(logits=torch.tensor([0.0, 0.0, -math.inf]))
            )
            second = pyro.sample("second", dist.Categorical(logits=moves[first]))
            loc = (z * (torch.eye(3)[first] + 2 * torch.eye(3)[second])).sum(-1)
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=x)

    z, x = torch.tensor([[0.1, 0.2, 0.3]], requires_grad=True), torch.zeros(1)
    density = log_density(enumerated(model, {"z": z}, x), "data")
    locs = torch.stack([3 * z[0, 0], z[0, 1] + 2 * z[0, 0], 3 * z[0, 1]])
    paths = torch.tensor([0.5, 0.25, 0.25]).log() + dist.Normal(locs, 1.0).log_prob(x)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + paths.logsumexp(0)
    torch.testing.assert_close(density, expected)
    torch.testing.assert_close(gradients(density, {"z": z}), gradients(expected, {"z": z}))


def test_image_that_no_class_explains_has_density_zero():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=table(3)))
            pyro.factor("explained", torch.where(x > y, 0.0, -math.inf))

    density = log_density(enumerated(model, {}, torch.tensor([0.5, -0.5])), "data")
    expected = torch.tensor([table(3).log_softmax(0)[0].item(), -math.inf])
    torch.testing.assert_close(density, expected)


@pytest.mark.parametrize("model", MODELS)
def test_recording(model):
    x = images(2)
    latents = latents_of(model, x)

    program = in_parallel(model, poutine.trace(model).get_trace(x))

    def density_and_gradients(*values):
        values = dict(zip(latents, (v.detach().requires_grad_() for v in values), strict=True))
        with poutine.block(), pyro.validation_enabled(False):
            trace = poutine.trace(poutine.condition(program, data=values)).get_trace(x)
            density = log_density(trace, "data")
        return density.detach(), *gradients(density, values)

    recording = make_fx(density_and_gradients)(*(v.detach() for v in latents.values()))
    others = [value.detach() + 0.5 for value in latents.values()]
    torch.testing.assert_close(recording(*others), density_and_gradients(*others))


# --- Means ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("model", [two_classes, nested])
def test_mean_of_the_image_is_weighted_by_the_classes_given_the_latents(model, count):
    x = images(count)
    latents = latents_of(model, x)
    mean = marginal_mean(enumerated(model, latents, x), "data", "obs", latents)
    log_weights, traces = by_hand(model, latents, x, leave_out=["obs"])
    weights = log_weights.softmax(0)
    means = torch.stack([trace.nodes["obs"]["fn"].mean for trace in traces])
    expected = (weights.reshape(*weights.shape, *[1] * (means.dim() - 2)) * means).sum(0)
    torch.testing.assert_close(mean, expected)


def test_mean_that_does_not_depend_on_the_class_is_the_plain_one():
    x = images(3)
    latents = latents_of(mixture, x)
    mean = marginal_mean(enumerated(mixture, latents, x), "data", "obs", latents)
    assert torch.equal(mean, latents["z"] @ table(2, PIXELS))


def test_guide_with_a_class():
    x = images(3)

    def guide(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=x @ table(PIXELS, 3)))
            pyro.sample("z", dist.Normal(y @ table(3, 2) + x[:, :2], 0.5).to_event(1))

    z = {"z": torch.ones(3, 2)}
    classes = (x @ table(PIXELS, 3)).log_softmax(-1)
    locs = table(3, 2) + x[:, None, :2]
    expected = (classes + dist.Normal(locs, 0.5).log_prob(z["z"][:, None]).sum(-1)).logsumexp(-1)
    torch.testing.assert_close(log_density(enumerated(guide, z, x), "data"), expected)
    mean = marginal_mean(enumerated(guide, {}, x), "data", "z", given=())
    torch.testing.assert_close(mean, (classes.exp()[..., None] * locs).sum(1))


# --- What cannot be summed ------------------------------------------------------------------------


def test_sites_and_dimensions_that_are_found():
    x = images(2)
    assert enumerable(poutine.trace(nested).get_trace(x)) == ["y", "w"]
    trace = enumerated(nested, latents_of(nested, x), x)
    assert is_enumerated(trace)
    assert trace.nodes["w"]["value"].shape == (3, 1, 1, 1, 1)  # left of y, left of three plates
    assert not is_enumerated(poutine.trace(nested).get_trace(x))


@pytest.mark.parametrize(
    "fn", [dist.Poisson(2.0), dist.Bernoulli(torch.full((3,), 0.5)).to_event(1)]
)
def test_discrete_site_without_a_list_of_values(fn):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", fn)

    with pytest.raises(ValueError, match="latent site 'y' is discrete .* cannot be enumerated"):
        enumerable(poutine.trace(model).get_trace(images()))


def test_image_that_depends_on_the_classes_of_an_inner_plate():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            with pyro.plate("objects", 2, dim=-1):
                y = pyro.sample("y", dist.Categorical(logits=table(3)))
            loc = table(3)[y].sum(-1, keepdim=True)
            pyro.sample("obs", dist.Normal(loc[..., None], 1.0).to_event(1), obs=x[:, None])

    trace = enumerated(model, {}, images())
    with pytest.raises(ValueError, match="'obs' depends on a discrete latent of a plate"):
        log_density(trace, "data")
    with pytest.raises(ValueError, match="'obs' depends on a discrete latent of a plate"):
        marginal_mean(trace, "data", "obs", given=())


def test_classes_of_plates_that_cross():
    def model(x):
        with pyro.plate("data", len(x), dim=-3):
            rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1)
            with rows:
                y = pyro.sample("y", dist.Categorical(logits=table(3)))
            with columns:
                w = pyro.sample("w", dist.Categorical(logits=table(3)))
            with rows, columns:
                loc = table(3)[y] + table(3)[w]
                pyro.sample("obs", dist.Normal(loc, 1.0), obs=x.reshape(-1, 2, 2))

    with pytest.raises(ValueError, match="cannot be summed out: Expected tree-structured"):
        log_density(enumerated(model, {}, images()), "data")


def test_the_same_classes_in_a_sequential_plate():
    def model(x):
        with pyro.plate("data", len(x)):
            loc = 0.0
            for index in pyro.plate("objects", 2):
                y = pyro.sample(f"y{index}", dist.Categorical(logits=table(3)))
                loc = loc + table(3)[y]
            pyro.sample(
                "obs", dist.Normal(loc[..., None], 1.0).expand_by([]).to_event(1), obs=x[:, :1]
            )

    x = images()
    density = log_density(enumerated(model, {}, x), "data")
    classes, values = table(3).log_softmax(0), table(3)
    pairs = [
        classes[i] + classes[j] + dist.Normal(values[i] + values[j], 1.0).log_prob(x[:, 0])
        for i in range(3)
        for j in range(3)
    ]
    torch.testing.assert_close(density, torch.stack(pairs).logsumexp(0))


def test_class_outside_of_the_data_plate():
    def model(x):
        y = pyro.sample("y", dist.Categorical(logits=table(3)))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(table(3)[y], 1.0), obs=x[:, 0])

    with pytest.raises(ValueError, match="'y' must stand inside the vectorised data plate 'data'"):
        log_density(enumerated(model, {}, images()), "data")


def test_program_that_concatenates():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=table(3)))
            loc = torch.cat([y, x], -1).sum(-1)
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=x[:, 0])

    with pytest.raises(ValueError, match=r"\['y'\] enumerated in parallel.*broadcast"):
        enumerated(model, {}, images())


def test_program_that_takes_classes_for_images():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=table(3)))
            pyro.sample("z", dist.Normal(table(3)[y.reshape(-1)], 1.0))

    x = images(3)  # as many as classes: no shape is wrong
    plain = poutine.trace(poutine.condition(model, data={"y": torch.tensor([1, 2, 0])})).get_trace(
        x
    )
    plain.nodes["y"]["is_observed"] = False
    latents = {"z": plain.nodes["z"]["value"]}
    with pytest.raises(ValueError, match="site 'z' has another log-probability"):
        check_broadcast(plain, enumerated(model, latents, x), "data")


@pytest.mark.parametrize("model", [*MODELS, masked])
def test_programs_that_broadcast_pass(model):
    x = images(3)
    plain = poutine.trace(model).get_trace(x)
    discrete = enumerable(plain)
    sites = sample_sites(plain).items()
    latents = {n: s["value"] for n, s in sites if not s["is_observed"] and n not in discrete}
    check_broadcast(plain, enumerated(model, latents, x), "data")


def test_a_vae_of_classes_alone_has_nothing_to_decode():
    def guide(x):
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=table(3)[None] + x[:, :1, 0, 0]))

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=table(3)))
            loc = table(3)[y, None, None, None]
            pyro.sample("obs", dist.Normal(loc, 1.0).to_event(3), obs=x)

    vae, x = types.SimpleNamespace(model=model, guide=guide), torch.rand(2, 1, 2, 2)
    with pytest.raises(ValueError, match="no continuous site.*RelaxedOneHotCategorical"):
        PGD(maximum_damage(vae), Linf(0.1), num_steps=1)(x)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_plate_without_a_size(count, float64):
    def model(x):
        with pyro.plate("data"):
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(len(x), 3)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            shift = torch.arange(3.0)[y][..., None]
            pyro.sample("obs", dist.Normal(z + shift, 1.0).to_event(1), obs=x)

    x, z = torch.randn(count, 2), torch.randn(count, 2)
    parts = [dist.Normal(z + shift, 1.0).log_prob(x).sum(1) for shift in range(3)]
    expected = (
        torch.stack(parts).logsumexp(0) - math.log(3) + dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    )
    torch.testing.assert_close(ModelPotential(model, x)({"z": z}), -expected)
