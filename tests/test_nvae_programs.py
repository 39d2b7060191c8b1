"""NVAE's two programs: contract, sharing, gradients, training, the non-centred form."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch
from nvae_reference import SMALL as GREY
from nvae_reference import log_probs, one_pass, traces
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_vae_defence.models import program
from pyro_vae_defence.models.nvae import NVAE, NonCentredNVAE, NVAEConfig
from pyro_vae_defence.objectives import NVAEObjective
from pyro_vae_defence.ops.streams import Streams
from pyro_vae_defence.training import FitConfig, fit
from pyro_vae_defence.types import VAE

COLOUR: dict[str, Any] = GREY.to_dict() | {"dataset": "cifar10", "num_nf": 1}
CONFIGS = {
    "grey": GREY,
    "mixture": NVAEConfig.from_dict(COLOUR | {"num_mixture_dec": 2}),
    "gaussian": NVAEConfig.from_dict(COLOUR | {"num_mixture_dec": 1, "res_dist": False}),
    "flat": NVAEConfig.from_dict(
        GREY.to_dict() | {"num_latent_scales": 1, "num_groups_per_scale": 1, "num_nf": 2}
    ),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.fixture(params=CONFIGS)
def vae(request: pytest.FixtureRequest) -> NVAE:
    return build(CONFIGS[request.param])


def build(config: NVAEConfig, **options: bool) -> NVAE:
    """A network whose tensors all differ from their initial values."""
    vae = NVAE(config, **options).double().eval()
    with torch.no_grad():
        for tensor in [*vae.parameters(), *vae.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return vae


def images(vae: Any, num: int = 3) -> Tensor:
    return torch.rand(num, *vae.image_shape, dtype=torch.float64)


def run(vae: Any, x: Tensor) -> tuple[poutine.Trace, poutine.Trace]:
    return traces(vae.guide, vae.model, x)


def joint(vae: Any, x: Tensor, latents: dict[str, Tensor]) -> Tensor:
    trace = poutine.trace(poutine.condition(vae.model, data=latents)).get_trace(x)
    trace.compute_log_prob()
    return log_probs(trace, (*vae.sites, "obs")).sum(dim=1)


# --- Contract -------------------------------------------------------------------------------------


@pytest.mark.parametrize("noncentred", [False, True])
def test_contract(vae: NVAE, noncentred: bool) -> None:
    programs = vae.noncentred() if noncentred else vae
    assert isinstance(programs, VAE)
    x = images(programs)
    guide, model = run(programs, x)
    latent_sites = [n for n in guide.nodes if guide.nodes[n]["type"] == "sample" and n != "data"]
    assert latent_sites == list(programs.sites)
    observed = [n for n, s in model.nodes.items() if s.get("is_observed")]
    assert [n for n in observed if n != "data"] == ["obs"]
    assert torch.equal(model.nodes["obs"]["value"], x)
    for trace in (guide, model):
        for site in programs.sites:
            node = trace.nodes[site]
            assert [frame.name for frame in node["cond_indep_stack"]] == ["data"]
            assert node["log_prob"].shape == (3,)
    shapes = [guide.nodes[site]["value"].shape[1:] for site in programs.sites]
    assert [tuple(shape) for shape in shapes] == list(vae.config.latent_shapes)
    latents = {site: guide.nodes[site]["value"] for site in programs.sites}
    assert programs.decode(latents).shape == x.shape
    torch.testing.assert_close(programs.decode(latents), model.nodes["obs"]["fn"].mean)


def test_images_of_a_batch_do_not_meet(vae: NVAE) -> None:
    x = images(vae)
    with torch.no_grad():
        guide, model = run(vae, x)
        latents = {site: guide.nodes[site]["value"] for site in vae.sites}
        together = joint(vae, x, latents)
        alone = [
            joint(vae, x[i : i + 1], {k: v[i : i + 1] for k, v in latents.items()})
            for i in range(3)
        ]
    torch.testing.assert_close(together, torch.cat(alone))
    torch.testing.assert_close(together, log_probs(model, (*vae.sites, "obs")).sum(1))


def test_one_pass_agrees_with_the_programs(vae: NVAE) -> None:
    x = images(vae)
    with torch.no_grad():
        terms = one_pass(vae, x)
        latents = {site: group.z for site, group in zip(vae.sites, terms.groups)}
        guide = poutine.trace(poutine.condition(vae.guide, data=latents)).get_trace(x)
        model = poutine.trace(poutine.condition(vae.model, data=latents)).get_trace(x)
        guide.compute_log_prob()
        model.compute_log_prob()
    torch.testing.assert_close(log_probs(guide, vae.sites), terms.log_q)
    torch.testing.assert_close(log_probs(model, vae.sites), terms.log_p)
    torch.testing.assert_close(-model.nodes["obs"]["log_prob"], terms.reconstruction_loss)
    if not vae.config.num_nf:
        kl = torch.distributions.kl_divergence
        exact = [kl(guide.nodes[s]["fn"], model.nodes[s]["fn"]) for s in vae.sites]
        torch.testing.assert_close(torch.stack(exact, dim=1), terms.kl)


def test_guides_behind_one_flow_have_exact_kl() -> None:
    """Volume is preserved and the map is shared, so the KL is that of the Gaussians."""
    vae = build(CONFIGS["mixture"])
    with torch.no_grad():
        first, second = (
            poutine.trace(vae.guide).get_trace(images(vae)).nodes["z_00"]["fn"] for _ in range(2)
        )
        exact = torch.distributions.kl_divergence(first, second)
        # Monte Carlo, two-sided at 5 standard errors: false alarm below 1e-6 per image.
        draws = 1000
        z = first.sample((draws,))
        log_ratio = first.log_prob(z) - second.log_prob(z)
    error = log_ratio.std(0) / draws**0.5
    assert exact.shape == (3,)
    assert ((log_ratio.mean(0) - exact).abs() < 5 * error).all()


def test_mode_of_a_flow_posterior_is_its_densest_point() -> None:
    vae = build(CONFIGS["mixture"])
    with torch.no_grad():
        q = poutine.trace(vae.guide).get_trace(images(vae)).nodes["z_00"]["fn"]
        top = q.log_prob(q.mode)
        assert all((q.log_prob(q.sample()) < top).all() for _ in range(20))
    assert torch.equal(q.mean, q.mode)
    assert q.variance.shape == q.mean.shape


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("noncentred", [False, True])
def test_gradients_reach_images_latents_and_weights(vae: NVAE, noncentred: bool) -> None:
    programs = vae.noncentred() if noncentred else vae
    x = images(programs).requires_grad_()
    guide, model = run(programs, x)
    loss = guide.log_prob_sum() - model.log_prob_sum()
    unused = {"prior_ftr0"} if vae.config.is_flat else set()
    named = dict(vae.named_parameters())
    values = [x, *(guide.nodes[site]["value"] for site in programs.sites), *named.values()]
    names = ["x", *programs.sites, *named]
    gradients = torch.autograd.grad(loss, values, allow_unused=True)
    for name, gradient in zip(names, gradients):
        if name in unused:
            assert gradient is None
        else:
            assert gradient is not None, name
            assert gradient.isfinite().all(), name
    assert gradients[0].abs().amax(dim=(1, 2, 3)).min() > 0


def test_gradient_of_the_joint_density_is_right(vae: NVAE) -> None:
    vae.requires_grad_(False)
    x = images(vae, 1)
    with torch.no_grad():
        latents = vae.guide(x)
    leaves = {site: z.clone().requires_grad_() for site, z in latents.items()}
    gradients = torch.autograd.grad(joint(vae, x, leaves).sum(), list(leaves.values()))
    direction = [torch.randn_like(z) for z in latents.values()]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction))

    def moved(step: float) -> Tensor:
        return joint(vae, x, {k: z + step * d for (k, z), d in zip(latents.items(), direction)})

    with torch.no_grad():
        difference = ((moved(1e-5) - moved(-1e-5)) / 2e-5).sum()
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-6)


# --- Sharing --------------------------------------------------------------------------------------


def count_calls(vae: NVAE) -> Counter[str]:
    calls: Counter[str] = Counter()
    for name, module in vae.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def test_an_elbo_runs_every_layer_once(vae: NVAE) -> None:
    calls = count_calls(vae)
    with torch.no_grad():
        run(vae, images(vae))
        assert set(calls.values()) == {1}
        vae.share = False
        calls.clear()
        run(vae, images(vae))
    twice = {name for name, count in calls.items() if count == 2}
    assert bool(twice) == (not vae.config.is_flat)
    assert not any(name.startswith("enc_tower") for name in twice)


def test_sharing_changes_nothing(vae: NVAE) -> None:
    x = images(vae)
    results = []
    for share in (True, False):
        vae.share = share
        torch.manual_seed(1)
        guide, model = run(vae, x)
        loss = guide.log_prob_sum() - model.log_prob_sum()
        used = [p for n, p in vae.named_parameters() if n != "prior_ftr0"]
        results.append([loss, *torch.autograd.grad(loss, used)])
    for shared, own in zip(*results):
        torch.testing.assert_close(shared, own)


@pytest.mark.parametrize("change", ["weights", "buffers", "latents", "frozen latents", "mode"])
def test_a_stale_path_is_not_reused(change: str) -> None:
    vae = build(GREY)
    x = images(vae)
    vae.requires_grad_(False)
    latents = vae.guide(x)
    with torch.no_grad():
        if change == "weights":
            for parameter in vae.parameters():
                parameter.mul_(1.1)
        elif change == "buffers":
            for name, buffer in vae.named_buffers():
                if name.endswith("running_var"):
                    buffer.mul_(1.1)
        elif change == "latents":
            latents["z_00"].mul_(1.1)
        elif change == "mode":
            vae.train()
    if change == "frozen latents":  # as a sampler does with its initial values
        for z in latents.values():
            z.requires_grad_()
    value = joint(vae, x, latents)
    copies = {k: z.detach().clone().requires_grad_(z.requires_grad) for k, z in latents.items()}
    expected = joint(vae, x, copies)
    assert torch.equal(value, expected)
    if change == "frozen latents":
        ours = torch.autograd.grad(value.sum(), list(latents.values()))
        theirs = torch.autograd.grad(expected.sum(), list(copies.values()))
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other)


def test_another_number_of_images_takes_nothing_over() -> None:
    vae = build(GREY)
    vae.guide(images(vae, 3))
    torch.manual_seed(1)
    after = vae.model(images(vae, 2)).mean
    torch.manual_seed(1)
    torch.testing.assert_close(after, vae.model(images(vae, 2)).mean)


# --- Memory ---------------------------------------------------------------------------------------


def gradients(vae: NVAE, x: Tensor, latents: dict[str, Tensor]) -> tuple[list[Tensor], int]:
    """Gradients of the joint density by image and latents, and how many values were kept for
    them."""
    leaves = {site: z.detach().requires_grad_() for site, z in latents.items()}
    image = x.clone().requires_grad_()
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        guide = poutine.trace(poutine.condition(vae.guide, data=leaves)).get_trace(image)
        guide.compute_log_prob()
        total = joint(vae, image, leaves).sum() - log_probs(guide, vae.sites).sum()
    found = torch.autograd.grad(total, [image, *leaves.values()])
    return list(found), sum(kept.values())


def test_checkpointing_changes_memory_alone(vae: NVAE) -> None:
    x = images(vae)
    with torch.no_grad():
        latents = {site: z.clone() for site, z in vae.guide(x).items()}
    plain, all_kept = gradients(vae, x, latents)
    vae.checkpointing = True
    recomputed, kept = gradients(vae, x, latents)
    for one, other in zip(plain, recomputed):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    # What remains is outside the segments; these keep their inputs besides.
    assert kept < 0.5 * all_kept


def test_checkpointing_leaves_training_alone() -> None:
    """A second pass would move the running statistics twice."""
    x = images(build(GREY))
    buffers = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        vae = build(GREY, checkpointing=checkpointing).train()
        torch.manual_seed(3)
        terms = one_pass(vae, x)
        (terms.reconstruction_loss + terms.kl.sum(1)).sum().backward()
        buffers.append([b.clone() for b in vae.buffers()])
    assert all(torch.equal(one, other) for one, other in zip(*buffers))


def test_flow_guides_draw_from_the_images_own_streams() -> None:
    vae = build(CONFIGS["mixture"])
    x = images(vae)
    together = program.encode(vae, x, streams=Streams.create(3, seed=1))
    alone = program.encode(vae, x[1:2], streams=Streams.create(1, seed=1, first_image=1))
    for site in vae.sites:
        torch.testing.assert_close(together[site][1:2], alone[site])
    other = program.encode(vae, x, streams=Streams.create(3, seed=2))
    assert not torch.allclose(together["z_00"], other["z_00"])


def test_inference_mode() -> None:
    vae = build(GREY)
    with torch.inference_mode():
        _, model = run(vae, images(vae))
    assert model.nodes["obs"]["log_prob"].shape == (3,)


def test_copies_leave_the_path_behind() -> None:
    vae = build(GREY)
    vae.guide(images(vae))
    twin = copy.deepcopy(vae)
    twin = pickle.loads(pickle.dumps(twin))
    x = images(vae)
    noise = [torch.randn(3, *shape, dtype=torch.float64) for shape in vae.config.latent_shapes]
    assert torch.equal(one_pass(twin, x, noise).logits, one_pass(vae, x, noise).logits)


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_svi_trains(vae: NVAE, elbo: Any) -> None:
    vae.train()
    other = copy.deepcopy(vae)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), elbo())
    x = images(vae, 4)
    SVI(other.model, other.guide, pyro.optim.Adam({"lr": 1e-3}), elbo()).step(x)
    for name, parameter in vae.named_parameters():
        assert torch.equal(parameter, before[name]), "two networks share parameters"
    losses = [svi.step(x) for _ in range(8)]
    unchanged = {n for n, p in vae.named_parameters() if torch.equal(p, before[n])}
    assert unchanged == ({"prior_ftr0"} if vae.config.is_flat else set())
    assert sum(losses[-3:]) < sum(losses[:3])


def test_eval_mode_registers_nothing() -> None:
    vae = build(GREY)
    run(vae, images(vae))
    assert not list(pyro.get_param_store())


# --- Samples and the non-centred form -------------------------------------------------------------


def test_samples(vae: NVAE) -> None:
    with torch.no_grad():
        pictures = vae.sample(5, temperature=0.7)
    assert pictures.shape == (5, *vae.image_shape)
    assert pictures.dtype == torch.float64
    assert 0 <= pictures.min() < pictures.max() <= 1


def test_temperature_scales_the_top_group(vae: NVAE) -> None:
    noise = [torch.randn(2, *shape, dtype=torch.float64) for shape in vae.config.latent_shapes]
    with torch.no_grad():
        top = vae.walk_by_noise(noise, 0.5).latents[0]
    torch.testing.assert_close(top, 0.5 * 1.01 * noise[0])


def test_noncentred_is_a_change_of_variables(vae: NVAE) -> None:
    x = images(vae)
    noncentred = vae.noncentred()
    assert isinstance(noncentred, NonCentredNVAE)
    with torch.no_grad():
        guide = poutine.trace(noncentred.guide).get_trace(x)
        guide.compute_log_prob()
        noise = {site: guide.nodes[site]["value"] for site in noncentred.sites}
        latents = noncentred.to_latents(noise)
        for site, value in noncentred.to_noise(latents).items():
            torch.testing.assert_close(value, noise[site])
        torch.testing.assert_close(noncentred.decode(noise), vae.decode(latents))

        model = poutine.trace(poutine.condition(vae.model, data=latents)).get_trace(x)
        scales = [model.nodes[site]["fn"].base_dist.scale for site in vae.sites]
        log_volume = sum(scale.log().sum(dim=(1, 2, 3)) for scale in scales)
        torch.testing.assert_close(joint(noncentred, x, noise), joint(vae, x, latents) + log_volume)
        centred = poutine.trace(poutine.condition(vae.guide, data=latents)).get_trace(x)
        centred.compute_log_prob()
    torch.testing.assert_close(
        log_probs(guide, noncentred.sites).sum(1),
        log_probs(centred, vae.sites).sum(1) + log_volume,
    )


# --- Bad input ------------------------------------------------------------------------------------


def test_wrong_images_are_refused() -> None:
    vae = build(GREY)
    for shape in [(2, 3, 28, 28), (2, 1, 30, 30), (1, 28, 28)]:
        for call in (vae.model, vae.guide, vae.noncentred().model, vae.noncentred().guide):
            with pytest.raises(ValueError, match="x has shape"):
                call(torch.rand(shape, dtype=torch.float64))


def test_wrong_latents_are_refused() -> None:
    vae = build(GREY)
    latents = vae.guide(images(vae, 2))
    with pytest.raises(ValueError, match="latents have the sites"):
        vae.decode({k: z for k, z in latents.items() if k != "z_01"})
    with pytest.raises(ValueError, match="latents have the sites"):
        vae.noncentred().decode(latents)
    with pytest.raises(ValueError, match=r"latents\['z_01'\] has shape"):
        vae.decode(latents | {"z_01": latents["z_01"][:1]})


def test_wrong_sampling_arguments_are_refused() -> None:
    vae = build(GREY)
    with pytest.raises(ValueError, match="num must be an integer of at least 1, got 0"):
        vae.sample(0)
    with pytest.raises(ValueError, match=r"temperature must lie in \(0, inf\], got 0"):
        vae.sample(1, 0)


# --- Placement ------------------------------------------------------------------------------------


def test_everything_follows_the_device() -> None:
    """On the meta device an operation that left a tensor behind on the CPU would fail."""
    for config in CONFIGS.values():
        vae = NVAE(config).train().to("meta")
        x = torch.rand(2, *vae.image_shape, device="meta")
        # The likelihood, in which the two of colours differ, is the same of both pairs.
        colour = config.dataset != "mnist"
        for programs in (vae,) if colour else (vae, vae.noncentred()):
            with pyro.validation_enabled(False):  # it would look for NaN, where there are no values
                _, model = run(programs, x)
            assert model.nodes["obs"]["log_prob"].device.type == "meta"
        if not colour:
            assert one_pass(vae, x).kl.device.type == "meta"
        assert vae.sample(2).shape == x.shape


# --- What the network makes of images -------------------------------------------------------------


@pytest.mark.parametrize("noncentred", [False, True])
def test_padded_images_are_refused_by_every_program(noncentred: bool) -> None:
    vae = build(GREY)
    programs = vae.noncentred() if noncentred else vae
    for run_program in (programs.model, programs.guide):
        with pytest.raises(ValueError, match=r"\(N, 1, 28, 28\); .* pass x\[\.\.\., 2:-2, 2:-2\]"):
            run_program(torch.rand(2, 1, 32, 32))
        with pytest.raises(ValueError, match=r"\(N, 1, 28, 28\)$"):
            run_program(torch.rand(2, 1, 30, 30))


@pytest.mark.parametrize("noncentred", [False, True])
def test_a_network_of_five_bits_sees_five_bits(noncentred: bool) -> None:
    vae = build(NVAEConfig.from_dict(COLOUR | {"num_mixture_dec": 2, "num_x_bits": 5}))
    programs = vae.noncentred() if noncentred else vae
    x = torch.randint(256, (2, 3, 32, 32)) / 255.0
    x = x.double()
    reduced = torch.div((255 * x).round(), 8, rounding_mode="floor") / 31
    assert not torch.equal(reduced, x)
    found = []
    for images in (x, reduced):
        torch.manual_seed(1)
        guide, model = run(programs, images)
        assert torch.equal(model.nodes["obs"]["value"], images)
        found.append(torch.stack([model.nodes["obs"]["log_prob"], guide.log_prob_sum().expand(2)]))
    assert torch.equal(*found)
    # Attacks have a derivative to follow: that with respect to the levels.
    latents = {site: value.detach() for site, value in programs.guide(x).items()}

    def gradient(images: Tensor) -> Tensor:
        images = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(joint(programs, images, latents).sum(), images)
        return slope

    assert gradient(x).abs().max() > 0
    assert torch.equal(gradient(x), gradient(reduced))
    eight = build(NVAEConfig.from_dict(COLOUR | {"num_mixture_dec": 2}))
    assert not torch.equal(eight.bottom_up(x)[0], eight.bottom_up(reduced)[0])


def test_levels_need_a_likelihood_of_levels() -> None:
    for values in (GREY.to_dict(), COLOUR | {"num_mixture_dec": 1}):
        with pytest.raises(ValueError, match="num_x_bits=5 needs a likelihood of levels"):
            NVAEConfig.from_dict(values | {"num_x_bits": 5})


def test_a_network_without_batch_norm_trains() -> None:
    small = {"arch_instance": "res_elu", "num_latent_scales": 1, "ada_groups": False}
    vae = NVAE(NVAEConfig.from_dict(GREY.to_dict() | small))
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in vae.modules())
    x = (torch.rand(4, 1, 28, 28) < 0.1).float()
    objective = NVAEObjective(vae, num_steps=12)
    config = FitConfig(epochs=12, learning_rate=1e-2, schedule="constant", progress=False)
    history = fit(vae, objective, [x], config).history
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    assert vae.decode(vae.guide(x)).isfinite().all()
