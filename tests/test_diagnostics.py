"""Names of sites that ArviZ, xarray or netCDF cannot hold, through files and back."""

from __future__ import annotations

import json

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from torch import nn

from pyro_vae_defence import diagnostics
from pyro_vae_defence.defence import EncoderDefence

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
