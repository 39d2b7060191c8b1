"""One contract for all objectives: SVI trains any Pyro VAE, and every loss is the same sum."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import pytest
import torch
from objectives_programs import (
    ConvVAE,
    HierarchicalVAE,
    LinearVAE,
    TutorialVAE,
    gradients,
)
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_vae_defence.objectives import AVAE, AVAESS, SE, SEAVAE, BetaELBO, BetaTCVAE, ImageELBO

DATA_SIZE = 100
ELBO_TERMS = {"reconstruction", "kl", "loss"}


def pgd(guide: Callable[[Tensor], None], radius: float = 0.1, steps: int = 3) -> Callable:
    """Sign-gradient ascent on the squared Wasserstein distance, enough of an attack for a test."""

    def posterior(x: Tensor) -> tuple[Tensor, Tensor]:
        *_, normal = (
            site["fn"].base_dist
            for site in poutine.trace(guide).get_trace(x).nodes.values()
            if isinstance(site.get("fn"), dist.Independent)
        )
        return normal.loc, normal.scale

    def perturb(x: Tensor) -> Tensor:
        loc, scale = (value.detach() for value in posterior(x))
        x_adv = (x + radius * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            loc_adv, scale_adv = posterior(x_adv)
            distance = ((loc_adv - loc) ** 2 + (scale_adv - scale) ** 2).sum()
            step = radius / 2 * torch.autograd.grad(distance, x_adv)[0].sign()
            x_adv = torch.max(torch.min(x_adv + step, x + radius), x - radius).clamp(0, 1)
        return x_adv

    return perturb


OBJECTIVES: dict[str, tuple[Callable[..., ImageELBO], set[str]]] = {
    "elbo": (lambda guide, **kw: BetaELBO(**kw), set()),
    "beta": (lambda guide, **kw: BetaELBO(4.0, **kw), set()),
    **{
        f"tcvae-{estimator}": (
            lambda guide, estimator=estimator, **kw: BetaTCVAE(5.0, DATA_SIZE, estimator, **kw),
            {"total_correlation"},
        )
        for estimator in ("mws", "mss", "published")
    },
    "se": (lambda guide, **kw: SE(pgd(guide), 2.0, **kw), {"kl_adv", "omega"}),
    "avae": (lambda guide, **kw: AVAE(**kw), {"autoencoding"}),
    "se-avae": (
        lambda guide, **kw: SEAVAE(pgd(guide), 2.0, **kw),
        {"kl_adv", "omega", "autoencoding"},
    ),
    "avae-ss": (lambda guide, **kw: AVAESS(**kw), {"autoencoding"}),
}
MEAN_FIELD_ONLY = [name for name in OBJECTIVES if name not in ("elbo", "beta")]


@pytest.fixture(params=[TutorialVAE, ConvVAE])
def vae(request: pytest.FixtureRequest) -> nn.Module:
    return request.param()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, 1, 8, 8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_svi_trains_any_vae(name: str, vae: nn.Module, x: Tensor) -> None:
    objective = OBJECTIVES[name][0](vae.guide)
    assert isinstance(objective, Trace_ELBO)
    before = copy.deepcopy(vae.state_dict())
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), objective)
    losses = [svi.step(x) for _ in range(3)]
    assert all(isinstance(loss, float) and abs(loss) < 1e6 for loss in losses)
    assert objective.step == 3
    for key, value in vae.state_dict().items():
        frozen = name == "avae-ss" and key.startswith("decoder")
        assert torch.equal(value, before[key]) == frozen, key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_is_the_sum_of_the_images_losses(name: str, vae: nn.Module, x: Tensor) -> None:
    make, extra = OBJECTIVES[name]
    objective = make(vae.guide)
    results = []
    for call in (objective.terms, objective.differentiable_loss, objective.loss):
        torch.manual_seed(1)
        results.append(call(vae.model, vae.guide, x))
    terms, differentiable, number = results
    assert set(terms) == ELBO_TERMS | extra
    assert all(value.shape == (5,) and value.dtype == x.dtype for value in terms.values())
    assert objective.step == 0
    vae.zero_grad()
    torch.manual_seed(1)
    stepped = objective.loss_and_grads(vae.model, vae.guide, x)
    by_step = gradients(vae)
    torch.manual_seed(1)
    with torch.no_grad():
        evaluated = objective.loss(vae.model, vae.guide, x)
    expected = terms["loss"].sum().item()
    assert [differentiable.item(), number, stepped, evaluated] == pytest.approx([expected] * 4)
    vae.zero_grad()
    differentiable.backward()
    assert by_step
    torch.testing.assert_close(gradients(vae), by_step)


@pytest.mark.parametrize(
    "objective",
    [
        BetaELBO(3.0),
        *(BetaTCVAE(5.0, 30, estimator) for estimator in ("mws", "mss", "published")),
        SE(lambda x: x + 0.1, 3.0),
    ],
)
def test_gradient_by_finite_differences(objective: ImageELBO) -> None:
    vae, x = LinearVAE(), torch.rand(4, 1, 2, 3, dtype=torch.float64)

    def loss(*_: Tensor) -> Tensor:
        torch.manual_seed(11)  # common noise
        return objective.differentiable_loss(vae.model, vae.guide, x)

    assert torch.autograd.gradcheck(loss, tuple(vae.parameters()), check_undefined_grad=False)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.usefixtures("float64")
def test_particles_are_averaged(name: str, x: Tensor) -> None:
    vae = TutorialVAE()
    make = OBJECTIVES[name][0]
    torch.manual_seed(1)
    single = make(vae.guide)
    runs = [single.terms(vae.model, vae.guide, x) for _ in range(3)]
    torch.manual_seed(1)
    terms = make(vae.guide, num_particles=3).terms(vae.model, vae.guide, x)
    for key, value in terms.items():
        torch.testing.assert_close(value, torch.stack([run[key] for run in runs]).mean(0))
    assert not torch.equal(runs[0]["loss"], runs[1]["loss"])

    objective = make(vae.guide, num_particles=3)
    vae.zero_grad()
    torch.manual_seed(1)
    objective.loss_and_grads(vae.model, vae.guide, x)
    by_step = gradients(vae)
    vae.zero_grad()
    torch.manual_seed(1)
    objective.differentiable_loss(vae.model, vae.guide, x).backward()
    torch.testing.assert_close(gradients(vae), by_step)
    assert objective.step == 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_torch_optimisers_train_through_the_elbo_module(name: str, x: Tensor) -> None:
    vae = ConvVAE()
    objective = OBJECTIVES[name][0](vae.guide)
    loss = objective.differentiable_loss(vae.model, vae.guide, x)
    loss.backward()
    trained = {key.split(".")[0] for key in gradients(vae)}
    assert trained == ({"encoder"} if name == "avae-ss" else {"encoder", "decoder"})


@pytest.mark.parametrize("name", ["se", "se-avae"])
def test_latents_may_be_split_into_sites(name: str) -> None:
    # The terms compared here do not depend on the draws, which differ between the two programs.
    x = torch.rand(4, 1, 2, 3, dtype=torch.float64)
    results = []
    for splits in ((3,), (1, 2)):
        vae = LinearVAE(3, splits)
        objective = SE(lambda x: x + 0.1, 2.0) if name == "se" else SEAVAE(lambda x: x + 0.1, 2.0)
        terms = objective.terms(vae.model, vae.guide, x)
        results.append({key: terms[key] for key in ("kl", "kl_adv", "omega")})
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", ["tcvae-mws", "tcvae-mss", "tcvae-published", "avae", "avae-ss"])
def test_split_latents_train(name: str) -> None:
    vae = LinearVAE(3, (1, 2))
    objective = OBJECTIVES[name][0](vae.guide)
    objective.loss_and_grads(vae.model, vae.guide, torch.rand(4, 1, 2, 3, dtype=torch.float64))
    assert all(p.grad.abs().sum() > 0 for p in vae.encoder.parameters())


@pytest.mark.parametrize("name", MEAN_FIELD_ONLY)
def test_hierarchies_are_refused_where_the_formula_needs_mean_field(name: str, x: Tensor) -> None:
    vae = HierarchicalVAE()
    make, _ = OBJECTIVES[name]
    objective = make(vae.guide)
    with pytest.raises(ValueError, match=r"depend on each other.*BetaELBO"):
        objective.loss(vae.model, vae.guide, x)
    with pytest.raises(ValueError, match=r"depend on each other.*BetaELBO"), torch.no_grad():
        objective.loss(vae.model, vae.guide, x)


def test_a_hierarchical_prior_is_refused_too() -> None:
    linear = LinearVAE(4, (2, 2))

    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            top = pyro.sample("z0", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            low = pyro.sample("z1", dist.Normal(top, 1.0).to_event(1))
            mean = linear.decode(torch.cat([top, low], 1))
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x.flatten(1))

    x = torch.rand(4, 1, 2, 3, dtype=torch.float64)
    for objective in (AVAE(), AVAESS(), BetaTCVAE(2.0, 10)):
        with pytest.raises(ValueError, match="depend on each other"):
            objective.loss(model, linear.guide, x)


@pytest.mark.parametrize("name", MEAN_FIELD_ONLY)
def test_other_than_gaussian_guides_are_refused(name: str, x: Tensor) -> None:
    vae = TutorialVAE()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            loc = vae.encoder(x.flatten(1))[:, :3]
            pyro.sample("latent", dist.Laplace(loc, torch.ones_like(loc)).to_event(1))

    objective = OBJECTIVES[name][0](vae.guide)
    with pytest.raises(ValueError, match=r"site 'latent' is Laplace.*Gaussian"):
        objective.loss(vae.model, guide, x)


def test_observations_must_stand_inside_the_plate(x: Tensor) -> None:
    vae = TutorialVAE()

    def labelled(x: Tensor) -> None:
        vae.model(x)
        pyro.sample("label", dist.Normal(x.new_zeros(()), 1.0), obs=x.new_zeros(()))

    with pytest.raises(ValueError, match="site 'label' stands in no data plate"):
        BetaELBO().loss(labelled, vae.guide, x)


def test_autoencoding_needs_an_image_mean(x: Tensor) -> None:
    vae = TutorialVAE()

    class Meanless(dist.Normal):
        @property
        def mean(self) -> Tensor:
            raise NotImplementedError

    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            loc = x.new_zeros(x.shape[0], 3)
            z = pyro.sample("latent", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("obs", Meanless(vae.decoder(z), 1.0).to_event(1), obs=x.flatten(1))

    for objective in (AVAE(), AVAESS()):
        with pytest.raises(ValueError, match="no mean that is known"):
            objective.loss(model, vae.guide, x)


@contextmanager
def same_noise(transpose: bool) -> Iterator[None]:
    """Common noise for programs that draw ``(N, D)`` and for those that draw ``(D, N)``."""

    def draw(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        if transpose:
            return torch.randn(*reversed(shape), dtype=dtype, generator=generator).T
        return torch.randn(shape, dtype=dtype, generator=generator)

    generator = torch.Generator().manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributions.normal._standard_normal", draw)
        patch.setattr("torch.distributions.Normal.sample", torch.distributions.Normal.rsample)
        yield


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("data_dim", [-2, -1])
def test_plates_other_than_data_are_summed_within_the_image(name: str, data_dim: int) -> None:
    # The same programs with latents and pixels as plates, left or right of the images' plate.
    plain = LinearVAE(2)
    other_dim = -3 - data_dim

    def turned(value: Tensor) -> Tensor:
        return value if data_dim == -2 else value.T

    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=data_dim):
            with pyro.plate("latent", 2, dim=other_dim):
                z = pyro.sample("z0", dist.Normal(x.new_zeros(1, 1), x.new_ones(1, 1)))
            with pyro.plate("pixel", 6, dim=other_dim):
                image = dist.Normal(turned(plain.decode(turned(z))), plain.sigma)
                pyro.sample("x", image, obs=turned(x.flatten(1)))

    def guide(x: Tensor) -> None:
        loc, scale = (turned(value) for value in plain.posterior(x))
        with pyro.plate("data", x.shape[0], dim=data_dim), pyro.plate("latent", 2, dim=other_dim):
            pyro.sample("z0", dist.Normal(loc, scale))

    x = torch.rand(4, 1, 2, 3, dtype=torch.float64)
    results = []
    for programs in ((plain.model, plain.guide), (model, guide)):
        objective = OBJECTIVES[name][0](programs[1])
        if isinstance(objective, SE | SEAVAE):
            objective.perturb = lambda x: x + 0.1
        with same_noise(transpose=programs[0] is model and data_dim == -1):
            results.append(objective.terms(*programs, x))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.usefixtures("float64")
def test_a_plate_that_subsamples_raises_no_term_above_others(
    name: str, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, make, plate, found = TutorialVAE(), OBJECTIVES[name][0], pyro.plate, []
    plates = (plate, lambda name, size: plate("images", 1000, subsample=torch.arange(size)))
    for each in plates:
        monkeypatch.setattr(pyro, "plate", each)
        vae.zero_grad()
        torch.manual_seed(1)
        loss = make(vae.guide).loss_and_grads(vae.model, vae.guide, x)
        found.append((loss, gradients(vae)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("num_particles", [0, -1, 1.5])
def test_num_particles_is_checked(num_particles: float) -> None:
    with pytest.raises(ValueError, match="num_particles"):
        BetaELBO(num_particles=num_particles)
