"""What a user's type checker finds in a project of the user's own, where the package is installed.

mypy looks at an installed package only if it says that it is typed (``py.typed``, PEP 561); the
package's own checks (``make lint``) would pass without.
"""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

# Pyro has types of its own, but not everywhere.
SETTINGS = """\
[mypy]
strict = True
untyped_calls_exclude = pyro
[mypy-pyro.*]
ignore_missing_imports = True
"""

PROGRAM = """\
import functools

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae_defence as pvd
from pyro_vae_defence import attacks, data, defence, metrics, training
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.robustness import Budget, evaluate_robustness
from pyro_vae_defence.types import VAE


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(784, 8)
        self.decoder = nn.Linear(4, 784)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x.flatten(1))

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x.flatten(1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def similarity(vae: VAE, images: Tensor, defend: defence.Defence) -> float:
    attack = attacks.PGD(attacks.symmetric_kl(vae), pvd.Linf(0.1), num_steps=3)
    x_adv: Tensor = attack(images).best()
    before = defence.NoDefence(vae)(images).reconstruction
    interval = metrics.bootstrap_interval(metrics.ms_ssim(before, defend(x_adv).reconstruction))
    return interval.estimate


vae = Mine()
train = data.load("mnist_subset", "train")
config = training.FitConfig(epochs=1, learning_rate=1e-3, schedule="one_cycle")
fitted = training.fit(vae, TraceMeanField_ELBO(), data.batches(train, 64, shuffle=True), config)
loss: float = fitted.history[-1]["train_loss"]
x: Tensor = train.images(slice(4))
kernel = functools.partial(BatchedHMC, step_size=0.1)
chains = defence.MCMCDefence(vae, kernel, 10, 5, perturbation=pvd.Linf(0.1))
recommended = defence.MCMCDefence.recommended(vae, pvd.Linf(0.1), x)
print(similarity(vae, x, chains), similarity(vae, x, recommended))
chains(x).to_arviz().to_netcdf("chains.nc")
report = evaluate_robustness(vae, chains, x, ball=pvd.Linf(0.1), budget=Budget.quick())
report.save_html("report.html")
"""

MISTAKES = {
    'data.load("mnist_subset", "train").images("first")': "arg-type",
    "attacks.PGD(attacks.symmetric_kl(vae), radius=0.1)": "call-arg",
    "attacks.PGD(attacks.symmetric_kl(vae), 0.1)": "arg-type",
    "defence.NoDefence(nn.Linear(2, 2))": "arg-type",
    'training.FitConfig(epochs="many")': "arg-type",
    "defence.NoDefence(vae)(x).reconstructions": "attr-defined",
    "pvd.Linf(0.1).radios": "attr-defined",
}


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """What mypy says of a program, in an environment with the package and all else of this one."""
    pytest.importorskip("mypy")
    place = tmp_path_factory.mktemp("project")
    venv.create(place / "venv", with_pip=False)
    variables = {"base": str(place / "venv"), "platbase": str(place / "venv")}
    site = Path(sysconfig.get_path("purelib", vars=variables))
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    patterns = settings["options.package_data"]["pyro_vae_defence"].split()
    for pattern in ("**/*.py", *(pattern for pattern in patterns if "/" not in pattern)):
        for source in (ROOT / "pyro_vae_defence").glob(pattern):
            target = site / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    (place / "mypy.ini").write_text(SETTINGS)

    def run(program: str) -> subprocess.CompletedProcess[str]:
        (place / "program.py").write_text(program)
        python = site.parents[2] / "bin" / "python"
        command = [sys.executable, "-m", "mypy", "--python-executable", python, "program.py"]
        return subprocess.run(
            list(map(str, command)), cwd=place, capture_output=True, text=True, check=False
        )

    return run


def test_a_users_mistakes_are_found_and_nothing_else(check):
    done = check(PROGRAM + "\n".join(MISTAKES) + "\n")
    found = re.findall(r"(?m)^program\.py:(\d+): error: .* \[([a-z-]+)\]$", done.stdout)
    first = PROGRAM.count("\n") + 1
    wanted = [(str(number), kind) for number, kind in enumerate(MISTAKES.values(), first)]
    assert found == wanted, done.stdout + done.stderr
