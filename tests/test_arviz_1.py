"""The conversion under ArviZ 1.x, in an interpreter of its own (downloads ArviZ, hence slow)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import matplotlib
matplotlib.use("Agg")
import numpy as np, arviz, xarray
from pyro_vae_defence import diagnostics

assert int(arviz.__version__.split(".")[0]) >= 1, arviz.__version__
rng = np.random.default_rng(0)
tree = diagnostics.to_datatree(
    {"z": rng.normal(size=(4, 50, 3, 5))},
    {
        "lp": rng.normal(size=(4, 50, 3)),
        "energy": rng.normal(size=(4, 50, 3)),
        "diverging": rng.random((4, 50, 3)) < 0.1,
    },
    {"obs": rng.random((3, 1, 6, 6))},
    log_likelihood={"obs": rng.normal(size=(4, 50, 3, 1, 6, 6)) * np.logspace(-18, 0, 6)},
)
chains = diagnostics.to_arviz(tree)
assert isinstance(chains, xarray.DataTree)
assert chains["posterior"]["z"].dims == ("chain", "draw", "image", "latent")
rhat, ess = diagnostics.rhat(tree)["z"], diagnostics.ess(tree)["z"]
assert rhat.shape == ess.shape == (3, 5)
assert rhat.max() < 1.1 and ess.min() > 60
assert len(arviz.summary(chains)) == 15
chains.to_netcdf("chains.nc")

# Plots ask for a coordinate of every dimension.
arviz.plot_trace(chains)
arviz.plot_rank(chains)
one = diagnostics.to_arviz(diagnostics.select_image(tree, 1))
np.testing.assert_allclose(arviz.bfmi(one)["energy"].min(), diagnostics.summary(tree)["bfmi"][1])
arviz.plot_energy(one)
arviz.plot_pair(one, visuals={"divergence": True})
assert np.isfinite(arviz.loo(one).elpd) and arviz.loo(one).n_data_points == 36
ids = np.array([0, 1, 0, 1])
theirs = arviz.rhat_nested(chains, superchain_ids=ids, method="identity")["z"]
np.testing.assert_allclose(diagnostics.rhat_nested(tree, ids)["z"], theirs)

sites = ["vae/z", "chain", "metric", "summary", "sample", "vae/z_dim"]
draws = {site: rng.normal(size=(4, 50, 3, 5)) for site in sites}
tree = diagnostics.to_datatree(draws, None, {"image": rng.random((3, 1, 28, 28))})
assert list(diagnostics.rhat(tree)) == list(diagnostics.ess(tree)) == sites
assert len(arviz.summary(tree)) == 90
tree.to_netcdf("named.nc")
with xarray.open_datatree("named.nc") as back:
    for site, name in diagnostics.variable_names(sites).items():
        assert (back["posterior"][name].values == draws[site]).all()
print("converted")
"""


@pytest.mark.slow
def test_conversion_under_arviz_1(tmp_path):
    python = next((p for v in ("3.13", "3.12") if (p := _interpreter(v))), None)
    if python is None:
        pytest.skip("no Python 3.12 or 3.13 on this machine")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    ours = tmp_path / "venv" / "bin" / "python"
    install = [ours, "-m", "pip", "install", "-q", "arviz>=1", "h5netcdf", "h5py", "matplotlib"]
    subprocess.run(install, check=True)
    done = subprocess.run(
        [ours, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "converted", done.stderr


def _interpreter(version):
    """A working interpreter on the path or under pyenv, whose shims fail unless selected."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(root.glob(f"versions/{version}.*/bin/python"))
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", "import venv"], capture_output=True).returncode == 0:
            return candidate
    return None
