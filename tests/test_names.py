"""The names at the top: everything is there, loaded when it is asked for, and known to mypy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_vae_defence as pvd
from pyro_vae_defence.ops import balls

ROOT = Path(pvd.__file__).parent


def test_every_subpackage_is_an_attribute():
    below = {path.stem for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    below |= {path.stem for path in ROOT.glob("[a-z]*.py")}
    for name in below:
        assert getattr(pvd, name).__name__ == f"pyro_vae_defence.{name}"
    assert below | {"L1", "L2", "Linf", "__version__"} <= set(dir(pvd))


def test_balls_have_one_home():
    for name in ("L1", "L2", "Linf"):
        assert getattr(pvd, name) is getattr(pvd.attacks, name) is getattr(balls, name)
        assert name in pvd.attacks.__all__


def test_models_offers_all_architectures_and_trained_ones():
    from pyro_vae_defence.models import conv, nvae, pretrained

    assert pvd.models.ConvVAE is conv.ConvVAE
    assert pvd.models.NVAE is nvae.NVAE
    assert pvd.models.load_pretrained is pretrained.load_pretrained


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    named = {a.asname for node in block.body for a in node.names if a.asname == a.name}
    assert named == {*pvd._MODULES, *pvd._BALLS}


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'Linfinity'"):
        _ = pvd.Linfinity


def test_nothing_is_loaded_before_it_is_asked_for():
    program = (
        "import sys, pyro_vae_defence as pvd\n"
        "assert not {'torch', 'pyro', 'numpy'} & set(sys.modules)\n"
        "print(pvd.attacks.PGD.__name__, pvd.Linf(0.1))\n"
        # Seconds, where the arithmetic of a network without memory asks for it.
        "pvd.models.load_pretrained('mnist_nvae')\n"
        "pvd.defence.NoDefence, pvd.training.fit, pvd.robustness.evaluate_robustness\n"
        "assert not {'torch._dynamo', 'xarray', 'pandas', 'arviz'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT.parent)},
    )
    assert done.stdout == "PGD Linf(radius=0.1)\n", done.stderr
