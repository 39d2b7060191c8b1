"""Where results say they come from."""

from __future__ import annotations

import subprocess

import pytest
import torch

from pyro_vae_defence import __version__
from pyro_vae_defence.ops import provenance
from pyro_vae_defence.ops.checks import as_device


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The package as a copy that nobody tracks, inside the repository of something else."""

    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    git("init", "-q")
    (tmp_path / "theirs.py").touch()
    git("add", "theirs.py")
    git("commit", "-qm", "theirs")
    package = tmp_path / "site-packages/pyro_vae_defence"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(provenance, "__file__", str(package / "ops/provenance.py"))
    monkeypatch.delenv(provenance.COMMIT, raising=False)
    return git


def test_a_copy_inside_another_repository_does_not_name_that_ones_commit(copied):
    assert provenance.commit() == f"release {__version__}"


def test_a_copy_without_a_repository_can_be_told_its_commit(copied, monkeypatch):
    monkeypatch.setenv(provenance.COMMIT, "abc123")
    assert provenance.commit() == "abc123"


def test_a_checkout_names_its_own_commit_whatever_the_environment_says(copied, monkeypatch):
    monkeypatch.setenv(provenance.COMMIT, "abc123")
    copied("add", "site-packages")
    copied("commit", "-qm", "ours")
    assert len(provenance.commit()) == 40


def test_a_run_on_a_card_names_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    found = provenance.provenance(torch.device("cuda", 0))
    assert found["device"] == "H100"
    assert {"cuda", "cudnn"} <= set(found)
    assert "device" not in provenance.provenance(torch.device("cpu"))


def test_devices_are_checked():
    assert as_device("device", "meta") == torch.device("meta")
    for name in ("gpu", f"cuda:{torch.cuda.device_count()}"):
        with pytest.raises(ValueError, match=f"device='{name}' is no device that this machine has"):
            as_device("device", name)
