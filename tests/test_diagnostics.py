"""Chains for ArviZ: any names of sites, one image or all, R-hat, summaries and loo."""

from __future__ import annotations

import functools
import json

import arviz
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from programs import HierarchicalVAE, LinearGaussianVAE
from torch import nn

from pyro_vae_defence import diagnostics
from pyro_vae_defence.defence import EncoderDefence, MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC, BatchedMALA
from pyro_vae_defence.ops.balls import Linf

NAMES = {
    "plain": ({"z": "z"}, {"obs": "obs"}),
    "names of ArviZ": (
        {s: f"{s}_" for s in ("chain", "draw", "image", "metric", "summary")},
        {"image": "image_"},
    ),
    "dimensions of images": ({"channel": "channel", "latent": "latent"}, {"channel": "channel"}),
    "dimensions of sites": (
        {"z": "z", "z_dim": "z_dim", "z_dim_": "z_dim_", "z_dim_1": "z_dim_1"},
        {"obs": "obs", "obs_dim_0": "obs_dim_0"},
    ),
    "slashes": (
        {"vae/z": "vae.z_", "a.b/c": "a.b.c", "/": "_", "vae.z": "vae.z", "image/": "image."},
        {"vae/image": "vae.image"},
    ),
    "taken": ({"image": "image__", "image_": "image_", "draw": "draw_"}, {"obs": "obs"}),
    "characters": (
        {"": "_", ".": "__", "..": "_.", "z\n": "z_", "z ": "z__", "-z": "_z", "z\0": "z___"},
        {"\ud800": "_", "日本": "日本"},
    ),
    "normal forms": ({"e\u0301": "\u00e9_", "\u00e9": "\u00e9"}, {"e\u0301": "\u00e9"}),
}


def arrays(posterior, observed):
    """A different array for every site; sites alternate between two, one and no event dimension."""
    rng = np.random.default_rng(0)
    shapes = [(5, 2), (5,), ()]
    latents = {s: rng.normal(size=(4, 30, 3, *shapes[i % 3])) for i, s in enumerate(posterior)}
    images = {s: rng.random((3, 1, 4, 4)) for s in observed}
    return latents, images


@pytest.mark.parametrize(("posterior", "observed"), NAMES.values(), ids=NAMES.keys())
def test_any_name_passes_through_a_file(posterior, observed, tmp_path):
    latents, images = arrays(posterior, observed)
    assert diagnostics.variable_names(latents) == posterior
    assert diagnostics.variable_names(images) == observed
    tree = diagnostics.to_datatree(latents, None, images)
    chains = diagnostics.to_arviz(tree)
    chains.to_netcdf(str(tmp_path / "chains.nc"))
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    for file in ("chains.nc", "tree.nc"):
        with xarray.open_datatree(tmp_path / file, engine="h5netcdf") as back:
            for group, values, names in (
                ("posterior", latents, posterior),
                ("observed_data", images, observed),
            ):
                assert set(back[group].data_vars) == set(names.values())
                for site, name in names.items():
                    np.testing.assert_array_equal(back[group][name].values, values[site])
                renamed = {site: name for site, name in names.items() if site != name}
                found = json.loads(back[group].attrs.get("renamed_sites", "{}"))
                assert found == renamed
    assert len(arviz.summary(chains, kind="stats")) == sum(v[0, 0].size for v in latents.values())


@pytest.mark.parametrize(("posterior", "observed"), NAMES.values(), ids=NAMES.keys())
def test_diagnostics_answer_by_site(posterior, observed):
    latents, images = arrays(posterior, observed)
    tree = diagnostics.to_datatree(latents, None, images)
    alone = {s: diagnostics.to_datatree({"z": values}) for s, values in latents.items()}
    for function in (diagnostics.rhat, diagnostics.ess):
        found = function(tree)
        assert list(found) == list(latents)
        for site, values in found.items():
            np.testing.assert_allclose(values, function(alone[site])["z"], rtol=1e-12)


def test_names_that_fit_leave_no_mark():
    latents, images = arrays(*NAMES["plain"])
    tree = diagnostics.to_datatree(latents, None, images, attrs={"num_samples": 30})
    assert tree["posterior"].attrs == {"num_samples": 30}
    assert tree["observed_data"].attrs == {}


def test_dimensions_give_way_to_variables():
    shape = (4, 30, 3, 5)
    tree = diagnostics.to_datatree(
        {"z": np.zeros(shape), "z_dim": np.zeros(shape[:3]), "vae/z": np.zeros(shape)},
        None,
        {"width": np.zeros((3, 1, 4, 4)), "width_dim_1": np.zeros(3)},
    )
    assert tree["posterior"]["z"].dims[3:] == ("z_dim_",)
    assert tree["posterior"]["vae.z"].dims[3:] == ("vae.z_dim",)
    dims = ("image", "width_dim_0", "width_dim_1_", "width_dim_2")
    assert tree["observed_data"]["width"].dims == dims


def test_observations_of_several_sizes():
    images = {"left": np.zeros((3, 1, 4, 2)), "right": np.zeros((3, 1, 4, 4))}
    tree = diagnostics.to_datatree({"z": np.zeros((1, 2, 3, 5))}, None, images)
    for name, values in images.items():
        assert tree["observed_data"][name].shape == values.shape
    alike = diagnostics.to_datatree({"z": np.zeros((1, 2, 3, 5))}, None, {"a": images["left"]})
    assert alike["observed_data"]["a"].dims == ("image", "channel", "height", "width")


def test_defence_of_a_vae_with_such_names(tmp_path):
    class Named(nn.Module):
        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("chain", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                more = pyro.sample("vae/z", dist.Normal(x.new_zeros(len(x)), 1.0))
                mean = (z.sum(-1) + more).reshape(-1, 1, 1, 1).expand(x.shape)
                pyro.sample("image", dist.Normal(mean, 1.0).to_event(3), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("chain", dist.Normal(x.flatten(1)[:, :2], 1.0).to_event(1))
                pyro.sample("vae/z", dist.Normal(x.flatten(1)[:, 0], 1.0))

    x = torch.rand(3, 1, 4, 4)
    result = EncoderDefence(Named(), num_samples=5)(x)
    result.to_arviz().to_netcdf(str(tmp_path / "chains.nc"))
    with xarray.open_datatree(tmp_path / "chains.nc", engine="h5netcdf") as back:
        np.testing.assert_array_equal(back["posterior"]["chain_"], result.samples["chain"])
        np.testing.assert_array_equal(back["posterior"]["vae.z"], result.samples["vae/z"])
        np.testing.assert_array_equal(back["observed_data"]["image_"], x)
        renamed = json.loads(back["posterior"].attrs["renamed_sites"])
    assert renamed == {"chain": "chain_", "vae/z": "vae.z"}
    assert set(diagnostics.ess(result.to_datatree())) == {"chain", "vae/z"}


# --- One image, and all of them -------------------------------------------------------------------


# What ArviZ spells otherwise from 1.0 on, as docs/inspecting_chains.md says.
ARVIZ_1 = int(arviz.__version__.split(".")[0]) >= 1
DIVERGENCES = {"visuals": {"divergence": True}} if ARVIZ_1 else {"divergences": True}


def bfmi(chains):
    """Of each chain."""
    found = arviz.bfmi(chains)
    return found["energy"].values if ARVIZ_1 else found


def elpd(loo):
    """Of all data points, and of each."""
    both = (loo.elpd, loo.elpd_i) if ARVIZ_1 else (loo.elpd_loo, loo.loo_i)
    return float(both[0]), both[1].values


def points(axes):
    """Where lines and scattered points stand that are one point each."""
    lines = [line.get_xydata() for line in axes.lines]
    scattered = [np.asarray(each.get_offsets()) for each in axes.collections]
    return [found[0].tolist() for found in (*lines, *scattered) if len(found) == 1]


def chains_of(draws, **stats):
    """A tree of draws ``(chain, draw, image, ...)`` of one site and of what else is given."""
    return diagnostics.to_datatree(
        {"z": draws}, stats, {"obs": np.zeros((draws.shape[2], 1, 4, 4))}
    )


def test_every_dimension_has_coordinates():
    values = {"top": np.zeros((2, 3, 4, 1, 2)), "low": np.zeros((2, 3, 4, 5))}
    log_likelihood = {"obs": np.zeros((2, 3, 4, 1, 6, 6))}
    images = {"obs": np.zeros((4, 1, 6, 6)), "label": np.zeros(4), "text": np.zeros((4, 7))}
    stats = {"lp": np.zeros((2, 3, 4))}
    tree = diagnostics.to_datatree(values, stats, images, log_likelihood=log_likelihood)
    assert set(tree.children) == {"posterior", "sample_stats", "observed_data", "log_likelihood"}
    for group in tree.children.values():
        assert set(group.dims) <= set(group.coords)
        for dim, size in group.sizes.items():
            np.testing.assert_array_equal(group[dim], np.arange(size))
    dims = ("chain", "draw", "image", "channel", "height", "width")
    assert tree["log_likelihood"]["obs"].dims == dims


@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")  # ArviZ's
def test_arviz_works_on_one_image():
    matplotlib.use("Agg")
    rng = np.random.default_rng(0)
    shape = (4, 30, 2)
    diverging = np.zeros(shape, bool)
    diverging[0, 3, 1] = True
    draws, energy = rng.normal(size=(*shape, 3)), rng.normal(size=shape)
    one = diagnostics.select_image(chains_of(draws, energy=energy, diverging=diverging), 1)
    assert all("image" not in group.coords for group in one.children.values())
    np.testing.assert_array_equal(one["posterior"]["z"], draws[:, :, 1])
    chains = diagnostics.to_arviz(one)
    centred = energy[:, :, 1] - energy[:, :, 1].mean(1, keepdims=True)
    expected = np.square(np.diff(energy[:, :, 1])).sum(1) / np.square(centred).sum(1)
    np.testing.assert_allclose(bfmi(chains), expected)
    arviz.plot_energy(chains)
    plt.close("all")
    arviz.plot_pair(chains, var_names=["z"], **DIVERGENCES)
    marked = [point for axes in plt.gcf().axes for point in points(axes)]
    first, second, third = draws[0, 3, 1].tolist()
    assert sorted(marked) == sorted([[first, second], [first, third], [second, third]])
    plt.close("all")


@pytest.mark.skipif(ARVIZ_1, reason="there it is a tree")
def test_a_file_that_arviz_reads_is_as_good_as_the_tree(tmp_path):
    draws = np.random.default_rng(0).normal(size=(4, 30, 2, 3))
    tree = diagnostics.to_datatree({"vae/z": draws}, {"energy": draws[..., 0]})
    diagnostics.to_arviz(tree).to_netcdf(str(tmp_path / "chains.nc"))
    read = arviz.from_netcdf(str(tmp_path / "chains.nc"))
    for function in (diagnostics.rhat, diagnostics.ess):
        np.testing.assert_array_equal(function(read)["vae/z"], function(tree)["vae/z"])
    nested = [diagnostics.rhat_nested(each, [0, 0, 1, 1])["vae/z"] for each in (read, tree)]
    np.testing.assert_array_equal(*nested)
    assert diagnostics.summary(read).equals(diagnostics.summary(tree))
    one = diagnostics.select_image(read, 1)
    np.testing.assert_array_equal(one["posterior"]["vae.z"], draws[:, :, 1])


def test_ess_by_methods_that_ask_for_a_probability():
    tree = chains_of(np.random.default_rng(0).normal(size=(4, 50, 2, 3)))
    for method, prob in (("quantile", 0.9), ("local", (0.1, 0.3))):
        found = diagnostics.ess(tree, method, prob)["z"]
        expected = arviz.ess(diagnostics.to_arviz(tree), method=method, prob=prob)["z"]
        np.testing.assert_array_equal(found, expected)


def test_what_is_no_tree_of_images_is_refused():
    tree = chains_of(np.random.default_rng(0).normal(size=(4, 30, 2)))
    for function in (diagnostics.summary, lambda one: diagnostics.select_image(one, 0)):
        with pytest.raises(ValueError, match="tree has no dimension image"):
            function(diagnostics.select_image(tree, 1))
    for wrong in ({"z": np.zeros((4, 30, 2))}, tree["posterior"].to_dataset()):
        with pytest.raises(ValueError, match="tree must be an xarray.DataTree or"):
            diagnostics.rhat(wrong)


def test_result_gives_one_image_to_arviz(linear_vae):
    x = torch.rand(3, 1, 4, 4)
    result = MCMCDefence(linear_vae, BatchedHMC, 6, 2, num_chains=2)(x)
    chains = result.to_arviz(image=1)
    np.testing.assert_array_equal(chains["posterior"]["z"], result.samples["z"][:, :, 1])
    np.testing.assert_array_equal(chains["observed_data"]["obs"], x[1])
    assert chains["posterior"].attrs["image"] == 1
    assert chains["posterior"]["z"].dims == ("chain", "draw", "latent")
    assert bfmi(chains).shape == (2,)
    for image in (-1, 3, 0.5):
        with pytest.raises(ValueError, match=rf"image must be an integer in 0\.\.2, got {image}"):
            result.to_arviz(image=image)


def test_summary_has_a_row_per_image():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4, 40, 3, 5)) + np.linspace(0, 2, 4)[:, None, None, None] * [
        [0],
        [1],
        [2],
    ]
    energy, diverging = rng.normal(size=(4, 40, 3)), rng.random((4, 40, 3)) < 0.1
    tree = chains_of(draws, energy=energy, diverging=diverging)
    table = diagnostics.summary(tree)
    assert list(table.columns) == ["r_hat", "ess_bulk", "ess_tail", "bfmi", "diverging"]
    assert list(table.index) == [0, 1, 2]
    assert table["r_hat"].is_monotonic_increasing
    for image, row in table.iterrows():
        one = diagnostics.to_arviz(diagnostics.select_image(tree, image))
        assert row["r_hat"] == pytest.approx(float(arviz.rhat(one)["z"].max()))
        for method in ("bulk", "tail"):
            expected = float(arviz.ess(one, method=method)["z"].min())
            assert row[f"ess_{method}"] == pytest.approx(expected)
        assert row["bfmi"] == pytest.approx(bfmi(one).min())
        assert row["diverging"] == diverging[:, :, image].mean()


def test_summary_of_chains_that_stand_still():
    draws = np.random.default_rng(0).normal(size=(4, 40, 2, 5))
    draws[:, :, 1, 3] = 0.5
    table = diagnostics.summary(chains_of(draws))
    assert list(table.columns) == ["r_hat", "ess_bulk", "ess_tail"]
    assert table.loc[0].notna().all()
    # ArviZ would count every draw of the latent that never moves.
    assert table.loc[1].isna().all()


def test_chains_that_each_stand_still_somewhere_else():
    draws = np.random.default_rng(0).normal(size=(4, 20, 2, 5))
    draws[:, :, 1, 3] = np.arange(4)[:, None]
    table = diagnostics.summary(chains_of(draws))
    assert table.loc[0, "r_hat"] < 1.2
    assert table.loc[1, "r_hat"] > 1e6


def test_result_has_a_summary():
    result = MCMCDefence(HierarchicalVAE(), BatchedHMC, 6, 2, num_chains=2)(torch.rand(3, 1, 4, 4))
    table = result.summary()
    assert table["num_gradients"].tolist() == result.num_gradients.tolist()
    accepted = result.sample_stats["acceptance_rate"].mean((0, 1))
    np.testing.assert_allclose(table["acceptance_rate"], accepted, rtol=1e-6)


# --- Nested R-hat ---------------------------------------------------------------------------------


def test_nested_r_hat_by_hand():
    # Superchains of means 3 and 7; chain means differ by 4 and 2, draws of a chain by 2.
    chains = np.array([[0, 2], [5, 7], [4, 6], [7, 9]], float)
    tree = chains_of(chains[:, :, None])
    # B = 8, W = ((8 + 2) + (2 + 2)) / 2.
    found = diagnostics.rhat_nested(tree, [0, 1, 0, 1])["z"]
    np.testing.assert_allclose(found, [np.sqrt(1 + 8 / 7)])
    one_draw = diagnostics.rhat_nested(chains_of(chains[:, :1, None]), ["a", "b", "a", "b"])["z"]
    # Without variances of draws: first draws 0, 4 and 5, 7.
    np.testing.assert_allclose(one_draw, [np.sqrt(1 + 8 / ((8 + 2) / 2))])


def test_nested_r_hat_of_single_chains_is_r_hat():
    draws = np.random.default_rng(0).normal(size=(5, 20, 2, 3)) + np.arange(5)[:, None, None, None]
    plain = arviz.rhat(diagnostics.to_arviz(chains_of(draws)), method="identity")["z"].values
    nested = diagnostics.rhat_nested(chains_of(draws), range(5))["z"]
    # R-hat weighs the variance of draws by (N - 1) / N.
    np.testing.assert_allclose(nested**2, plain**2 + 1 / 20)


def test_nested_r_hat_of_chains_that_stand_still_is_no_number():
    draws = np.broadcast_to(np.random.default_rng(0).normal(size=100), (4, 20, 100))
    assert np.isnan(diagnostics.rhat_nested(chains_of(draws), [0, 0, 1, 1])["z"]).all()


def test_nested_r_hat_passes_short_chains_that_have_forgotten_their_start():
    draws = np.random.default_rng(0).normal(size=(2000 * 4, 1, 1))
    ids = np.repeat(np.arange(2000), 4)
    # B and W are chi squared about 1/4 and 1, of 1999 and 6000 degrees: B / W has a relative
    # standard error of .037, the root of 1 + B / W one of .0037. 0.02 is 5 of them, rate 6e-7.
    assert diagnostics.rhat_nested(chains_of(draws), ids)["z"] == pytest.approx(
        np.sqrt(1.25), rel=0.02
    )
    starts = np.random.default_rng(1).normal(size=(2000, 1, 1))[ids]
    assert diagnostics.rhat_nested(chains_of(0.5 * draws + starts), ids)["z"] > 2


@pytest.mark.parametrize(
    ("ids", "num_draws", "message"),
    [
        ([0, 1], 5, r"one entry for each of 4 chains, got shape \(2,\)"),
        ([0, 0, 0, 0], 5, r"at least 2 superchains, all of as many chains; they have \[4\]"),
        ([0, 0, 0, 1], 5, r"they have \[3, 1\]"),
        ([0, 1, 2, 3], 1, "has no variance; draw more"),
    ],
)
def test_superchains_that_are_none(ids, num_draws, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.rhat_nested(chains_of(np.zeros((4, num_draws, 2))), ids)


# --- Log-likelihoods ------------------------------------------------------------------------------


def log_likelihood_of(result, vae, **image):
    tree = result.to_datatree(**image, log_likelihood=vae)
    return torch.tensor(tree["log_likelihood"][result.observation].values)


@pytest.mark.parametrize("rows", [7, 2])
def test_log_likelihood_of_pixels_adds_up_to_the_density(rows, tutorial_vae, monkeypatch):
    """Two draws of the three images at a time, or two images of one draw."""
    from pyro_vae_defence.defence import result as module

    monkeypatch.setattr(module, "ROWS", rows)
    sizes, log_likelihood = [], module.program.Decoder.log_likelihood

    def counted(self, latents, x):
        sizes.append(len(x))
        return log_likelihood(self, latents, x)

    monkeypatch.setattr(module.program.Decoder, "log_likelihood", counted)
    x = torch.rand(3, 1, 28, 28)
    result = MCMCDefence(tutorial_vae, BatchedMALA, 5, 2, num_chains=2)(x)
    found = log_likelihood_of(result, tutorial_vae)
    assert found.shape == (2, 5, 3, 1, 28, 28)
    assert max(sizes) <= rows
    prior = dist.Normal(0.0, 1.0).log_prob(result.samples["latent"]).sum(-1)
    total = found.sum((-3, -2, -1)).float() + prior
    torch.testing.assert_close(total, result.sample_stats["lp"], rtol=1e-5, atol=1e-3)
    probs = torch.sigmoid(tutorial_vae.decoder(result.samples["latent"])).double()
    by_hand = x.double() * probs.log().unflatten(-1, (1, 28, 28))
    by_hand = by_hand + (1 - x.double()) * (1 - probs).log().unflatten(-1, (1, 28, 28))
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        log_likelihood_of(result, tutorial_vae, image=2), found[:, :, 2], rtol=1e-5, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
def test_leave_one_out_is_what_it_says(linear_vae):
    """A pixel given the other ones, in closed form, of draws from the exact posterior."""
    x, num_draws = torch.rand(2, 1, 4, 4), 1000
    mean, covariance = linear_vae.exact(x)
    exact = dist.MultivariateNormal(mean, covariance)
    draws = exact.sample((4, num_draws))
    result = MCMCDefence(linear_vae, BatchedHMC, 1, 0)(x)
    object.__setattr__(result, "samples", {"z": draws})
    object.__setattr__(result, "sample_stats", {})
    for image in range(2):
        found = arviz.loo(result.to_arviz(image, log_likelihood=linear_vae), pointwise=True)
        marginal = linear_vae.weight @ linear_vae.weight.T + linear_vae.noise**2 * torch.eye(16)
        precision = torch.linalg.inv(marginal)
        residual = precision @ (x[image].flatten() - linear_vae.bias)
        variance = 1 / precision.diagonal()
        expected = dist.Normal(0.0, variance.sqrt()).log_prob(residual * variance)
        # 4000 draws, weighted, in whose tail the outliers are; p(x_i | x) would add up to 3 more.
        total, of_pixels = elpd(found)
        np.testing.assert_allclose(of_pixels.ravel(), expected, atol=0.3)
        assert total == pytest.approx(float(expected.sum()), abs=0.3)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
@pytest.mark.filterwarnings("ignore:The point-wise LOO is the same")
@pytest.mark.parametrize("logit", [-20.0, -36.0, -200.0])
def test_loo_of_pixels_that_are_all_but_certain(logit):
    class Certain(LinearGaussianVAE):
        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 3), 1.0).to_event(1))
                logits = logit + z.sum(-1).reshape(-1, 1, 1, 1).expand(x.shape)
                likelihood = dist.Bernoulli(logits=logits, validate_args=False)
                pyro.sample("obs", likelihood.to_event(3), obs=x)

    vae, x = Certain(), torch.zeros(1, 1, 4, 4)
    result = MCMCDefence(vae, BatchedMALA, 20, 2, num_chains=2)(x)
    found = log_likelihood_of(result, vae)
    expected = -(logit + result.samples["z"].double().sum(-1)).exp()
    torch.testing.assert_close(found[..., 0, 0, 0], expected, rtol=1e-4, atol=0.0)
    loo = arviz.loo(result.to_arviz(0, log_likelihood=vae), pointwise=True)
    assert np.isfinite(elpd(loo)[0])


class Correlated(LinearGaussianVAE):
    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 3), 1.0).to_event(1))
            mean = z.sum(-1, keepdim=True).expand(-1, 16)
            pixels = dist.MultivariateNormal(mean, torch.eye(16).to(x))
            pyro.sample("obs", pixels, obs=x.flatten(1))


@pytest.mark.parametrize(
    ("vae", "defence", "message"),
    [
        (LinearGaussianVAE(), EncoderDefence, "defence='encoder'"),
        (
            LinearGaussianVAE(),
            functools.partial(MCMCDefence, perturbation=Linf(0.1)),
            r"perturbation='Linf\(radius=0.1\)'",
        ),
        (Correlated(), MCMCDefence, "MultivariateNormal, one number for several values"),
    ],
)
def test_log_likelihood_that_would_not_be_one(vae, defence, message):
    result = defence(vae, num_samples=2)(torch.rand(2, 1, 4, 4))
    assert "log_likelihood" not in result.to_datatree().children
    with pytest.raises(ValueError, match=message):
        result.to_arviz(log_likelihood=vae)


def test_a_summary_of_single_draws_says_that_it_knows_nothing():
    vae, x = LinearGaussianVAE(), torch.rand(2, 1, 4, 4)
    table = MCMCDefence(vae, num_samples=1, warmup_steps=1, num_chains=2)(x).summary()
    assert table[["r_hat", "bfmi"]].isna().all(axis=None)
    assert table["acceptance_rate"].notna().all()


def test_images_joined_along_a_new_dimension_have_the_diagnostics_of_all():
    """xarray puts a new dimension first, where counting dimensions took images for chains."""
    draws = np.random.default_rng(0).normal(size=(4, 12, 6, 2))
    tree = diagnostics.to_datatree({"z": draws}, {"energy": draws[..., 0], "lp": draws[..., 1]})
    parts = [diagnostics.select_image(tree, image) for image in range(6)]
    names = ("posterior", "sample_stats")
    joined = {n: xarray.concat([part[n].to_dataset() for part in parts], "image") for n in names}
    joined = xarray.DataTree.from_dict(joined)
    assert joined["posterior/z"].dims[0] == "image"
    groups = {name: tree[name].to_dataset() for name in names}
    backwards = xarray.DataTree.from_dict(
        {name: group.transpose(*reversed(list(group.dims))) for name, group in groups.items()}
    )
    ids = [0, 0, 1, 1]
    for find in (diagnostics.rhat, diagnostics.ess, lambda t: diagnostics.rhat_nested(t, ids)):
        for other in (joined, backwards):
            np.testing.assert_array_equal(find(other)["z"], find(tree)["z"])
    np.testing.assert_array_equal(diagnostics.summary(joined), diagnostics.summary(tree))


@pytest.mark.parametrize("dim", ["chain", "draw"])
def test_a_dimension_that_was_selected_away_is_named(dim):
    tree = diagnostics.to_datatree({"z": np.zeros((2, 8, 3, 1))}).isel({dim: 0})
    for find in (diagnostics.rhat, diagnostics.summary, diagnostics.ess):
        with pytest.raises(ValueError, match=rf"no dimension {dim}: keep it.*isel\({dim}=\[0\]"):
            find(tree)
