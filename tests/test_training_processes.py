"""fit in processes of its own: killed by the system at random moments, and several at once.

Run as a script, this file is what these processes execute.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import TutorialVAE
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from pyro_vae_defence.objectives import BetaELBO, linear_schedule
from pyro_vae_defence.ops.locks import sole_writer
from pyro_vae_defence.training import FitConfig, NonFiniteLossError, fit

ROOT = Path(__file__).resolve().parents[1]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

# Only what hangs outlasts this: on a machine that is busy with ten other things all takes minutes.
TIME_LIMIT = 3600


def run(*command):
    """Run this file with the given prefix and arguments; its output if it fails."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True,
        timeout=TIME_LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


class Images(Dataset):
    """Images by lists of indices, with fresh noise at every access and word of it where asked."""

    def __init__(self, num, noise=0.0, told=None):
        self.images = torch.rand(num, 1, 28, 28, generator=torch.Generator().manual_seed(1))
        self.noise, self.told = noise, told

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if self.told is not None:
            os.write(self.told, b".")
        x = self.images[index].to(torch.get_default_dtype())
        return (x + self.noise * torch.rand_like(x)).clamp(max=1.0) if self.noise else x


# --- Killed at any moment -------------------------------------------------------------------------


class ForgetfulVAE(TutorialVAE):
    """With dropout and batch norm: noise in training, and buffers beside the weights."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(
            nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Softplus(), nn.Dropout(0.2), nn.Linear(16, 784)
        )


EPOCHS, NUM_IMAGES, BATCH_SIZE = 25, 60, 10
STEPS = EPOCHS * NUM_IMAGES // BATCH_SIZE


def train_once(folder, told=None):
    """A run with all there is to resume; in a new process also after a kill."""
    path = folder / "checkpoint.pt"
    torch.manual_seed(os.getpid() if path.exists() else 0)
    vae = ForgetfulVAE()
    images = Images(NUM_IMAGES, noise=0.1, told=told)
    loader = DataLoader(images, batch_size=BATCH_SIZE, shuffle=True)
    settings = FitConfig(
        epochs=EPOCHS, learning_rate=1e-2, patience=0, clip_norm=200.0, ema_decay=0.95,
        checkpoint_every=2, progress=False,
    )  # fmt: skip
    result = fit(
        vae, BetaELBO(linear_schedule(60, end=2.0)), loader, settings,
        validation=[torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(2))],
        checkpoint=path,
    )  # fmt: skip
    history = [{**entry, "seconds": 0.0} for entry in result.history]
    torch.save({"weights": vae.state_dict(), "history": history}, folder / "result.pt")


def fork(call, *arguments):
    """Start a process that makes this call; it shares the imports and nothing else."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def import_what_torch_puts_off():
    """Half of torch, which forked processes need not repeat."""
    torch.optim.Adam([torch.zeros(1)])


def kill_at_random(folder, seed):
    """Train without and with kills; write where they struck."""
    import_what_torch_puts_off()
    (folder / "whole").mkdir()
    (folder / "killed").mkdir()
    started = time.perf_counter()
    assert os.waitpid(fork(train_once, folder / "whole"), 0)[1] == 0
    duration = time.perf_counter() - started
    moments = random.Random(seed)
    kills = []
    while True:
        progress, told = os.pipe()
        child = fork(train_once, folder / "killed", told)
        os.close(told)
        # Six kills at most, then it may finish; more than three, as each comes before a quarter is
        # done. Progress is what the process says, not what the clock says, which runs on while
        # other processes have the cores.
        if len(kills) < 6:
            left = moments.randint(30, EPOCHS * NUM_IMAGES // 5)
            while left and (words := os.read(progress, left)):
                left -= len(words)
            time.sleep(moments.uniform(0, 2) * duration / STEPS)  # anywhere within a step
            os.kill(child, signal.SIGKILL)
        os.close(progress)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
        checkpoint = folder / "killed" / "checkpoint.pt"
        steps = torch.load(checkpoint)["steps"] if checkpoint.exists() else 0
        kills.append(steps)
    (folder / "kills.json").write_text(json.dumps(kills))


@pytest.mark.slow
@needs_fork
def test_killed_at_random_moments_equals_uninterrupted(tmp_path):
    seed = random.randrange(10**6)
    run(__file__, "kill", tmp_path, seed)
    kills = json.loads((tmp_path / "kills.json").read_text())
    message = f"seed {seed}, killed after the checkpoints of steps {kills}"
    assert len(kills) >= 3, message
    assert any(0 < steps < STEPS for steps in kills), message
    whole, killed = (torch.load(tmp_path / name / "result.pt") for name in ("whole", "killed"))
    assert whole["history"] == killed["history"], message
    for name, value in whole["weights"].items():
        assert torch.equal(value, killed["weights"][name]), f"{name}: {message}"


# --- Data-parallel --------------------------------------------------------------------------------


class FixedNoise(dist.Normal):
    """A Gaussian whose draw is given: the same whichever process draws it."""

    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, batch_shape, _instance=None):
        return FixedNoise(*(p.expand(batch_shape) for p in (self.loc, self.scale, self.noise)))

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise


class FixedNoiseVAE(TutorialVAE):
    """The noise of an image is a function of the image."""

    def guide(self, x):
        pyro.module("encoder", nn.ModuleList([self.hidden, self.loc, self.log_scale]))
        with pyro.plate("data", x.shape[0]):
            flat = x.reshape(-1, 784)
            h = nn.functional.softplus(self.hidden(flat))
            loc, scale = self.loc(h), torch.exp(self.log_scale(h))
            noise = 2 * torch.sin(100 * flat[:, : self.z_dim])
            pyro.sample("latent", FixedNoise(loc, scale, noise).to_event(1))


class Killed(Exception):
    pass


class NoiseOfProcess(TraceMeanField_ELBO):
    """Records what the global generator gives at each step, and dies at one of them."""

    def __init__(self, last=None):
        super().__init__()
        self.noise, self.last = [], last

    def loss_and_grads(self, *args):
        if len(self.noise) == self.last:
            raise Killed
        self.noise.append(float(torch.rand(())))
        return super().loss_and_grads(*args)


class NonFiniteInSecond(TraceMeanField_ELBO):
    def loss_and_grads(self, *args):
        loss = super().loss_and_grads(*args)
        return float("nan") if torch.distributed.get_rank() == 1 else loss


class LatePlainVAE:
    """No module; a label; a layer that is registered from the start but used from the sixth step
    on, and a scale that appears in the seventh."""

    def __init__(self, random_scale):
        self.networks = FixedNoiseVAE()
        self.label, self.extra = nn.Embedding(4, 5), nn.Linear(5, 784)
        self.count, self.random_scale = nn.BatchNorm1d(1), random_scale

    def model(self, x, y):
        self.count(x[:, 0, 0, :1])
        step = int(self.count.num_batches_tracked)
        pyro.module("decoder", self.networks.decoder)
        pyro.module("label", self.label)
        with pyro.plate("data", x.shape[0]):
            prior = dist.Normal(x.new_zeros(x.shape[0], 5), 1.0).to_event(1)
            h = pyro.sample("latent", prior) + self.label(y)
            logits = self.networks.decoder(h)
            pyro.module("extra", self.extra)
            if step >= 6:
                logits = logits + self.extra(h)
            if step >= 7:
                start = torch.rand(1) + 0.5 if self.random_scale else torch.ones(1)
                logits = logits * pyro.param("scale", start, dist.constraints.positive)
            pixels = dist.Bernoulli(logits=logits, validate_args=False).to_event(1)
            pyro.sample("obs", pixels, obs=x.reshape(-1, 784))

    def guide(self, x, y):
        self.networks.guide(x)


class Labelled(Images):
    def __getitem__(self, index):
        return super().__getitem__(index), torch.as_tensor(index) % 4


def train_late(rank, world_size, epochs, checkpoint=None, seed=0, random_scale=False):
    """As train_share, for what appears late: four steps per epoch."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    vae = LatePlainVAE(random_scale)
    settings = FitConfig(
        epochs=epochs, learning_rate=1e-2, clip_norm=300.0, ema_decay=0.9, schedule="constant",
        progress=False,
    )  # fmt: skip
    loader = share_of(Labelled(48), 12, rank, world_size, shuffle=True)
    fit(vae, TraceMeanField_ELBO(), loader, settings, checkpoint=checkpoint)
    named = {"scale": pyro.param("scale").detach().clone()} if epochs > 1 else {}
    for part in ("networks", "label", "extra"):
        state = getattr(vae, part).state_dict(prefix=f"{part}.")
        named |= {name: value.clone() for name, value in state.items()}
    return named


class Uncounted:
    """Batches whose number nobody can ask for, different ones in each process."""

    def __init__(self, rank, number):
        self.batches = [torch.full((2, 1, 28, 28), 0.1 * (1 + rank))] * number

    def __iter__(self):
        return iter(self.batches)


def share_of(dataset, batch_size, rank, world_size, shuffle):
    sampler = DistributedSampler(dataset, world_size, rank, shuffle=shuffle, seed=3)
    batches = BatchSampler(sampler, batch_size // world_size, False)
    return DataLoader(dataset, sampler=batches, batch_size=None)


def train_share(rank, world_size, epochs, checkpoint=None, objective=None, seed=0):
    """Train on this process's share, from initial weights that may differ between processes."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    vae = FixedNoiseVAE()
    settings = FitConfig(
        epochs=epochs, learning_rate=1e-2, patience=0, clip_norm=300.0, ema_decay=0.9,
        checkpoint_every=3, progress=False,
    )  # fmt: skip
    result = fit(
        vae, objective or TraceMeanField_ELBO(),
        share_of(Images(48), 12, rank, world_size, shuffle=True),
        settings,
        validation=share_of(Images(20), 10, rank, world_size, shuffle=False),
        checkpoint=checkpoint,
    )  # fmt: skip
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    return weights, [{**entry, "seconds": 0.0} for entry in result.history]


def all_equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def error(kind, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kind as raised:
        return str(raised)
    return None


def parallel(folder):
    """Two processes that meet through a file: no port that another process might take."""
    import_what_torch_puts_off()
    children = [fork(take_part, folder, rank, 2) for rank in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def take_part(folder, rank, size):
    """What each of the processes does; it writes what it saw."""
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    # Initial weights differ, and all follow the first process.
    whole, history = train_share(rank, size, 5, seed=rank)
    parts = folder / "parts.pt"
    train_share(rank, size, 2, parts, seed=rank)
    resumed, resumed_history = train_share(rank, size, 5, parts, seed=7)
    # Seeds agree, and noise does not. An epoch has four steps; the checkpoint is that of the sixth.
    noise = NoiseOfProcess()
    train_share(rank, size, 3, None, noise)
    first, second = NoiseOfProcess(last=7), NoiseOfProcess()
    error(Killed, train_share, rank, size, 3, folder / "killed.pt", first)
    train_share(rank, size, 3, folder / "killed.pt", second, seed=7)
    same = DataLoader(Images(8), batch_size=4)
    uneven = DataLoader(Images(4 + 4 * rank), batch_size=4)
    constant = FitConfig(epochs=1, schedule="constant", progress=False)
    pyro.clear_param_store()
    vae = FixedNoiseVAE()

    def unequal(*numbers):
        pyro.clear_param_store()
        loader = Uncounted(rank, numbers[rank])
        return error(ValueError, fit, FixedNoiseVAE(), TraceMeanField_ELBO(), loader, constant)

    with sole_writer(folder / "held.pt") if rank == 0 else contextlib.nullcontext():
        held = error(ValueError, train_share, rank, size, 1, folder / "held.pt")
    late = train_late(rank, size, 4, seed=rank, random_scale=True)
    late_parts = folder / "late.pt"
    train_late(rank, size, 2, late_parts, seed=rank, random_scale=True)
    resumed_late = train_late(rank, size, 4, late_parts, seed=7, random_scale=True)
    report = {
        "late": late,
        "late_resumed": all_equal(late, resumed_late),
        "late_fixed": train_late(rank, size, 4, seed=rank),
        "weights": whole,
        "history": history,
        "resumed": all_equal(whole, resumed) and history == resumed_history,
        "noise": noise.noise,
        # The second run's first call only finds the parameters.
        "resumed_noise": first.noise[:6] + second.noise[1:],
        "same": error(ValueError, fit, vae, TraceMeanField_ELBO(), same, constant),
        "uneven": error(ValueError, fit, vae, TraceMeanField_ELBO(), uneven, constant),
        "fewer": unequal(3, 2),
        "none": unequal(0, 2),
        "empty": unequal(0, 0),
        "held": held,
        "nan": error(NonFiniteLossError, train_share, rank, size, 1, None, NonFiniteInSecond()),
    }
    torch.save(report, folder / f"report{rank}.pt")
    # Neither hangs up while the other still listens.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def uninitialised(folder):
    """torchrun without a process group."""
    message = error(ValueError, train_share, 0, 1, 1)
    (folder / f"message{os.environ['RANK']}").write_text(str(message))


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch was built without gloo",
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    run(__file__, "parallel", folder)
    return [torch.load(folder / f"report{rank}.pt") for rank in range(2)]


@needs_fork
@needs_gloo
class TestTwoProcesses:
    def test_loss_curve_is_that_of_one_process(self, reports, float64):
        weights, history = train_share(0, 1, 5)
        for one, two in zip(history, reports[0]["history"], strict=True):
            assert one.keys() == two.keys()
            assert [two[name] for name in one] == pytest.approx(list(one.values()), rel=1e-9)
        assert history[-1]["validation_nelbo"] < 0.99 * history[0]["validation_nelbo"]
        for name, value in weights.items():
            torch.testing.assert_close(reports[0]["weights"][name], value, rtol=1e-7, atol=1e-9)

    def test_processes_agree(self, reports):
        assert reports[0]["history"] == reports[1]["history"]
        assert all_equal(reports[0]["weights"], reports[1]["weights"])

    def test_resumption_is_exact(self, reports):
        assert all(report["resumed"] for report in reports)

    def test_parameters_that_appear_late_are_trained_alike(self, reports, float64):
        first, second = reports
        assert all_equal(first["late"], second["late"])
        assert first["late_resumed"]
        assert second["late_resumed"]
        assert first["late"]["scale"] != first["late_fixed"]["scale"]
        # And as in one process, where Adam's moments start when they appear.
        for name, value in train_late(0, 1, 4).items():
            torch.testing.assert_close(first["late_fixed"][name], value, rtol=1e-7, atol=1e-9)

    def test_noise_differs_between_processes_and_is_resumed(self, reports):
        first, second = reports
        assert len(first["noise"]) == 3 * 4
        assert not set(first["noise"]) & set(second["noise"])
        assert first["resumed_noise"] == first["noise"]
        assert second["resumed_noise"] == second["noise"]

    def test_errors_reach_every_process(self, reports):
        for report in reports:
            assert "loader gives every process the same images" in report["same"]
            assert "loader has (1, 2) batches" in report["uneven"]
            assert "(process 1 has 2, others more)" in report["fewer"]
            assert "loader has (0, None) batches" in report["none"]
            assert "loader is empty" in report["empty"]
            assert "held.pt is being written by this very process" in report["held"]
            assert "the loss is nan at epoch 1, step 1" in report["nan"]

    def test_other_number_of_processes_is_refused(self, reports, tmp_path, float64):
        path = tmp_path / "c.pt"
        train_share(0, 1, 1, path)
        state = torch.load(path)
        torch.save({**state, "rng": state["rng"] * 2}, path)
        with pytest.raises(ValueError, match=r"other settings .*'processes': \(2, 1\)"):
            train_share(0, 1, 1, path)


@pytest.mark.slow
@needs_gloo
def test_torchrun_without_a_process_group_is_refused(tmp_path):
    run(*TORCHRUN, __file__, "uninitialised", tmp_path)
    for rank in range(2):
        message = (tmp_path / f"message{rank}").read_text()
        assert "torchrun started 2 processes" in message
        assert "init_process_group() before fit" in message


if __name__ == "__main__":
    task, folder, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    if task == "kill":
        kill_at_random(Path(folder), int(rest[0]))
    else:
        {"parallel": parallel, "uninitialised": uninitialised}[task](Path(folder))
