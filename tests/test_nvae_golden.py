"""NVAE against the official program's outputs, for tiny models with random weights.

The tolerance is 1e-5 of an array's largest entry in float32 and 1e-12 in float64. One model's data
is packaged; the full set is looked for beside the repository (or in ``PVD_SHARED``).
"""

from __future__ import annotations

import copy
import functools
import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import nvae_reference
import pyro
import pytest
import torch
from nvae_reference import log_probs, official_state_dict, one_pass
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn import functional as F

from pyro_vae_defence.models.nvae import (
    NVAE,
    PUBLISHED,
    NVAEConfig,
    flows,
    layers,
    load_official,
    load_safetensors,
)
from pyro_vae_defence.models.nvae.likelihoods import image_likelihood
from pyro_vae_defence.models.weights import _WithoutDraws
from pyro_vae_defence.objectives.nvae import (
    SpectralPenalty,
    balance_kl,
    batch_norm_penalty,
    kl_balance_weights,
)

DATA = Path(__file__).parent / "data"
SHARED = Path(os.environ.get("PVD_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
GOLDEN = SHARED / "golden" / "nvae"
MODELS = ("mnist_nf0", "mnist_nf1", "celeba64")

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no reference data at {GOLDEN}")
Arrays = dict[str, Tensor]

# Power iterations after which no penalty is off by more than 1e-6 of itself.
CONVERGED = 400


def read_arrays(path: Path) -> Arrays:
    with np.load(path) as file:
        arrays = {k: torch.from_numpy(v) for k, v in file.items() if v.dtype.kind in "fi"}
    if "x" in arrays and arrays["x"].shape[1:] == (
        1,
        32,
        32,
    ):  # the official program pads before the network
        inside = arrays["x"][:, :, 2:30, 2:30]
        assert torch.equal(F.pad(inside, (2, 2, 2, 2)), arrays["x"])
        arrays["x"] = inside
    return arrays


@functools.cache
def load_golden(name: str) -> tuple[NVAE, Arrays]:
    vae = load_official(GOLDEN / f"{name}_checkpoint.pt")
    return vae.requires_grad_(False), read_arrays(GOLDEN / f"{name}_golden.npz")


@pytest.fixture(params=MODELS)
def golden(request: pytest.FixtureRequest) -> tuple[NVAE, Arrays]:
    return copy.deepcopy(load_golden(request.param))  # tests change it


@functools.cache
def load_packaged() -> tuple[NVAE, Arrays]:
    vae = load_safetensors(DATA / "nvae_celeba64_tiny.safetensors")
    return vae.requires_grad_(False), read_arrays(DATA / "nvae_celeba64_tiny_golden.npz")


@pytest.fixture
def packaged() -> tuple[NVAE, Arrays]:
    return copy.deepcopy(load_packaged())


def check(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance


def groups(vae: NVAE, arrays: Arrays, name: str) -> list[Tensor]:
    return [arrays[f"{name}_{group:02d}"] for group in range(vae.config.num_groups)]


class ReplayNoise(Messenger):
    """Draws Gaussian sites, also behind flows, from recorded noise."""

    def __init__(self, noise: dict[str, Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.noise:
            return
        fn = msg["fn"]
        transforms = getattr(fn, "transforms", [])
        gaussian = (fn.base_dist if transforms else fn).base_dist
        value = gaussian.loc + gaussian.scale * self.noise[msg["name"]]
        for transform in transforms:
            value = transform(value)
        msg["value"] = value


def traces(vae: NVAE, arrays: Arrays, x: Tensor) -> tuple[poutine.Trace, poutine.Trace]:
    noise = dict(zip(vae.sites, groups(vae, arrays, "eps")))
    return nvae_reference.traces(ReplayNoise(noise)(vae.guide), vae.model, x)


# --- Always run -----------------------------------------------------------------------------------


def test_packaged_model_reproduces_the_official_numbers(packaged: tuple[NVAE, Arrays]) -> None:
    vae, expected = packaged
    terms = one_pass(vae, expected["x"], groups(vae, expected, "eps"))
    check(terms.logits[:, :, ::8, ::8], expected["logits_every_8th"])
    check(terms.log_q, expected["log_q_per_group"])
    check(terms.log_p, expected["log_p_per_group"])
    check(terms.kl, expected["kl_all"])
    check(terms.reconstruction_loss, expected["recon_loss"])
    check(batch_norm_penalty(vae)[None], expected["batchnorm_loss"])
    check(SpectralPenalty(vae, warmup_iterations=CONVERGED)()[None], expected["sr_loss_converged"])
    check(kl_balance_weights(vae.config), expected["alpha_i"])


@pytest.mark.parametrize("share", [True, False])
def test_packaged_model_traces_to_the_official_numbers(
    packaged: tuple[NVAE, Arrays], share: bool
) -> None:
    vae, expected = packaged
    vae.share = share
    guide, model = traces(vae, expected, expected["x"])
    check(log_probs(guide, vae.sites), expected["log_q_per_group"])
    check(log_probs(model, vae.sites), expected["log_p_per_group"])
    check(-model.nodes["obs"]["log_prob"], expected["recon_loss"])


@functools.cache
def published(name: str) -> NVAE:
    """A network of published size, without values, of which thousands are slow to leave out."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"), _WithoutDraws():
        for module in (layers, flows):
            patch.setattr(module, "filter_norm", lambda weight: weight[:, :1, :1, :1])
        patch.setattr(
            flows, "autoregressive_mask", lambda m, n, k, **options: torch.empty(m, n, k, k)
        )
        return NVAE(PUBLISHED[name])


# Section 5 of the architecture's description: number of state-dict keys, millions of parameters.
@pytest.mark.parametrize(
    ("name", "num_keys", "millions"),
    [
        ("mnist", 2016, 33.363),
        ("cifar10", 3838, 130.852),
        ("celeba_64", 4596, 153.281),
        ("celeba_256", 5354, 330.799),
    ],
)
def test_published_sizes(name: str, num_keys: int, millions: float) -> None:
    vae = published(name)
    assert len(official_state_dict(vae)) == num_keys
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 3) == millions


# --- With the full set ----------------------------------------------------------------------------


@needs_golden
@pytest.mark.parametrize("name", ["mnist", "celeba_64"])
def test_published_keys_and_shapes(name: str) -> None:
    with gzip.open(GOLDEN / "published_keys" / f"{name}_keys.txt.gz", "rt") as file:
        header, *expected = file.read().splitlines()
    config = NVAEConfig.from_official_args(json.loads(header.removeprefix("# args ")))
    assert config == PUBLISHED[name]
    actual = [
        f"{key} {'x'.join(map(str, value.shape)) or 'scalar'}"
        for key, value in official_state_dict(published(name)).items()
    ]
    assert actual == expected


@needs_golden
def test_one_pass(golden: tuple[NVAE, Arrays]) -> None:
    vae, expected = golden
    terms = one_pass(vae, expected["x"], groups(vae, expected, "eps"))
    check(terms.logits, expected["logits"])
    for group, term in enumerate(terms.groups):
        check(term.posterior.loc, expected[f"q_mu_{group:02d}"])
        check(term.posterior.scale, expected[f"q_sigma_{group:02d}"])
        if group > 0:
            check(term.prior.loc, expected[f"p_mu_{group:02d}"])
        check(term.prior.scale, expected[f"p_sigma_{group:02d}"])
        check(term.z, expected[f"z_{group:02d}"])
        if vae.config.num_nf:
            check(term.z_base, expected[f"z_pre_{group:02d}"])
        check(term.kl_map.sum(dim=(2, 3)).mean(dim=0), expected[f"kl_diag_{group:02d}"])
    assert not terms.groups[0].prior.loc.any()
    assert not expected["p_mu_00"].any()
    check(terms.kl, expected["kl_all"])
    check(terms.log_q, expected["log_q_per_group"])
    check(terms.log_p, expected["log_p_per_group"])
    log_q, log_p, loss = terms.log_q.sum(1), terms.log_p.sum(1), terms.reconstruction_loss
    check(log_q, expected["log_q"])
    check(log_p, expected["log_p"])
    check(loss, expected["recon_loss"])
    check(loss + terms.kl.sum(1), expected["nelbo"])
    check(log_p - log_q - loss, expected["log_iw"])
    if vae.config.is_grey:
        full = torch.distributions.Bernoulli(logits=terms.logits, validate_args=False)
        check(full.log_prob(F.pad(expected["x"], (2, 2, 2, 2))), expected["log_prob"])
        check(full.mean, expected["image_mean"])
    else:
        likelihood = image_likelihood(vae.config, terms.logits)
        check(likelihood.log_prob_map(expected["x"]), expected["log_prob"])


@needs_golden
def test_double_precision(golden: tuple[NVAE, Arrays]) -> None:
    vae, expected = golden
    vae.double()
    noise = [e.double() for e in groups(vae, expected, "eps")]
    terms = one_pass(vae, expected["x"].double(), noise)
    log_q, log_p, loss = terms.log_q.sum(1), terms.log_p.sum(1), terms.reconstruction_loss
    check(terms.kl, expected["f64_kl_all"], 1e-12)
    check(log_q, expected["f64_log_q"], 1e-12)
    check(log_p, expected["f64_log_p"], 1e-12)
    check(loss, expected["f64_recon_loss"], 1e-12)
    check(loss + terms.kl.sum(1), expected["f64_nelbo"], 1e-12)
    check(log_p - log_q - loss, expected["f64_log_iw"], 1e-12)
    if "f64_logits" in expected:
        check(terms.logits, expected["f64_logits"], 1e-12)


@needs_golden
@pytest.mark.parametrize("share", [True, False])
def test_programs(golden: tuple[NVAE, Arrays], share: bool) -> None:
    vae, expected = golden
    vae.share = share
    guide, model = traces(vae, expected, expected["x"])
    for site in vae.sites:
        check(guide.nodes[site]["value"], expected[site])
    check(log_probs(guide, vae.sites), expected["log_q_per_group"])
    check(log_probs(model, vae.sites), expected["log_p_per_group"])
    check(-model.nodes["obs"]["log_prob"], expected["recon_loss"])
    assert tuple(model.nodes["obs"]["value"].shape[1:]) == vae.image_shape


@needs_golden
def test_guide_scores_foreign_latents(golden: tuple[NVAE, Arrays]) -> None:
    """With flows this inverts them; the latents come from the file, not from a draw."""
    vae, expected = golden
    latents = dict(zip(vae.sites, groups(vae, expected, "z")))
    guide = poutine.trace(poutine.condition(vae.guide, data=latents)).get_trace(expected["x"])
    guide.compute_log_prob()
    check(log_probs(guide, vae.sites), expected["log_q_per_group"])


@needs_golden
def test_samples(golden: tuple[NVAE, Arrays]) -> None:
    vae, expected = golden
    noise = groups(vae, expected, "sample_eps")
    path = vae.walk_by_noise(noise)
    latents = dict(zip(vae.sites, path.latents))
    for site, z in latents.items():
        check(z, expected[f"sample_{site}"])
    check(vae.output(path), expected["sample_logits"])
    cooler = vae.output(vae.walk_by_noise(noise, 0.6))
    if vae.config.is_grey:
        check(cooler, expected["sample_logits_t0.6"])
        check(vae.decode(latents), expected["sample_image_mean"][:, :, 2:30, 2:30])
    else:
        check(cooler[:, :, :16, :16], expected["sample_logits_t0.6_crop"])
        check(vae.decode(latents), expected["sample_image_mean"])
        uniforms = expected["sample_u_mix"], expected["sample_u_logistic"]
        likelihood = vae.observation(latents)
        check(likelihood.draw(*uniforms), expected["sample_image"])
        check(likelihood.draw(*uniforms, temperature=0.5), expected["sample_image_t0.5"])


@needs_golden
def test_regularisers(golden: tuple[NVAE, Arrays]) -> None:
    vae, expected = golden
    check(batch_norm_penalty(vae)[None], expected["batchnorm_loss"])
    check(SpectralPenalty(vae, warmup_iterations=CONVERGED)()[None], expected["sr_loss_converged"])
    alpha = kl_balance_weights(vae.config)
    check(alpha, expected["alpha_i"])
    balanced, coefficients = balance_kl(expected["kl_all"], alpha, 0.5)
    check(balanced, expected["balanced_kl_at_0.5"])
    check(coefficients, expected["balanced_kl_coeffs_at_0.5"])


@needs_golden
@pytest.mark.parametrize("by", ["forward", "programs"])
def test_training_mode(by: str) -> None:
    """Batch statistics are used, and updated once, also by an ELBO that runs two programs."""
    vae, expected = copy.deepcopy(load_golden("mnist_nf0"))
    vae.requires_grad_().train()
    if by == "forward":
        terms = one_pass(vae, expected["x"], groups(vae, expected, "eps"))
        check(terms.logits.detach(), expected["trainmode_logits"])
        check(terms.kl.detach(), expected["trainmode_kl_all"])
    else:
        pyro.clear_param_store()
        guide, model = traces(vae, expected, expected["x"])
        kl = [
            torch.distributions.kl_divergence(guide.nodes[site]["fn"], model.nodes[site]["fn"])
            for site in vae.sites
        ]
        check(torch.stack(kl, dim=1).detach(), expected["trainmode_kl_all"])
    state = vae.state_dict()
    running = torch.cat([state[k].flatten() for k in sorted(state) if "running_" in k])
    check(running, expected["trainmode_running_stats"])


@needs_golden
@pytest.mark.parametrize("name", MODELS)
def test_plain_and_full_checkpoints_are_the_same(name: str) -> None:
    full, _ = load_golden(name)
    plain = load_official(GOLDEN / f"{name}_checkpoint_plain.pt")
    assert full.config == plain.config
    official = torch.load(GOLDEN / f"{name}_checkpoint_plain.pt", weights_only=True)["state_dict"]
    assert list(official) == list(official_state_dict(full))
    plainly = official_state_dict(plain)
    for key, value in official_state_dict(full).items():
        assert torch.equal(value, official[key])
        assert torch.equal(value, plainly[key])
