"""fit takes VAEs of every build: plain objects, several modules, parameters that appear late."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import shutil
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from objectives_programs import BottomUpVAE
from programs import TutorialVAE
from pyro import poutine
from pyro.infer import (
    SVI,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from training_runs import (
    Elsewhere,
    Killed,
    KilledAfter,
    assert_equal,
    check_resumed,
    config,
    without_times,
)

from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.objectives import BetaELBO
from pyro_vae_defence.training import NonFiniteLossError, evaluate, fit

LATE = 3  # first step in which the late parameters are used
STEPS = 8


def images(count=8):
    return torch.rand(count, 1, 1, 2, generator=torch.Generator().manual_seed(1), device="cpu")


class Steps(nn.Module):
    """Counts the runs of a program in train mode, in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("done", torch.zeros((), dtype=torch.long))

    def next(self):
        self.done += self.training
        return int(self.done)


class Programs:
    """z ~ N(0, I) in two dimensions, image ~ N(decode(z), 1); what is trained is the subclass's."""

    def prior(self, x):
        return dist.Normal(x.new_zeros(2), 1.0).to_event(1)

    def model(self, x):
        self.register_model()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            mean = self.decode(z).reshape(len(x), 1, 1, 2)
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(3), obs=x)

    def guide(self, x):
        self.register_guide()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x.flatten(1)), 0.5).to_event(1))

    def register_model(self):
        pyro.module("decoder", self.decoder)

    def register_guide(self):
        pyro.module("encoder", self.encoder)

    def decode(self, z):
        return self.decoder(z)

    def make(self):
        self.encoder, self.decoder = nn.Linear(2, 2), nn.Linear(2, 2)


class Plain(Programs):
    def __init__(self):
        self.make()


class Module(Programs, nn.Module):
    def __init__(self):
        nn.Module.__init__(self)
        self.make()


class LateParts:
    """A layer and its registration from step LATE on."""

    register_early = False

    def make(self):
        super().make()
        self.extra, self.steps = nn.Linear(2, 2), Steps()

    def register_model(self):
        super().register_model()
        self.late = self.steps.next() >= LATE
        if self.late or self.register_early:
            pyro.module("extra", self.extra)

    def decode(self, z):
        return self.decoder(z) + (self.extra(z) if self.late else 0.0)


class LateModule(LateParts, Module):
    pass


class LatePlain(LateParts, Plain):
    pass


class FromTheStart(LateModule):
    register_early = True


class Before(LateModule):
    """The late layer is registered before others: its gradient's place is not the last."""

    def register_model(self):
        if self.steps.next() >= LATE:
            pyro.module("extra", self.extra)
        self.late = int(self.steps.done) >= LATE
        pyro.module("decoder", self.decoder)


class LateParam(Plain):
    """A constrained parameter of no module that starts at a random value."""

    def make(self):
        super().make()
        self.steps = Steps()

    def decode(self, z):
        if self.steps.next() < LATE:
            return self.decoder(z)
        scale = pyro.param("scale", lambda: torch.rand(2) + 0.5, dist.constraints.positive)
        return self.decoder(z) * scale


class SometimesParam(LateParam):
    """The same in every third step only."""

    def decode(self, z):
        if self.steps.next() % 3 or not self.steps.training:
            return self.decoder(z)
        return self.decoder(z) * pyro.param("scale", torch.ones(2), dist.constraints.positive)


class Made(LateParts):
    """A layer, with running statistics, that is made when it is needed."""

    def make(self):
        super().make()
        self.extra = None

    def register_model(self):
        self.late = self.steps.next() >= LATE
        if self.late and self.extra is None:
            self.extra = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.3))
        pyro.module("decoder", self.decoder)
        if self.extra is not None:
            pyro.module("extra", self.extra)


class MadeModule(Made, Module):
    pass


class MadePlain(Made, Plain):
    pass


class WithStatistics(Plain):
    def make(self):
        super().make()
        self.decoder = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.3))


def everything(vae):
    """Values of all parameters and buffers, whoever holds them."""
    store = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    modules = vars(vae) if not isinstance(vae, nn.Module) else {"": vae}
    for name, module in modules.items():
        if isinstance(module, nn.Module):
            state = module.state_dict(prefix=f"{name}.")
            store |= {key: value.clone() for key, value in state.items()}
    return store


def run(kind, *, path=None, seed=0, left=-1, **changes):
    pyro.clear_param_store()  # as a new process would
    torch.manual_seed(seed)
    vae = kind()
    settings = config(**{"clip_norm": 5.0, "ema_decay": 0.9, "checkpoint_every": 1, **changes})
    batches = images().split(2)
    result = fit(vae, KilledAfter(left), batches, settings, validation=batches, checkpoint=path)
    return everything(vae), without_times(result.history)


# --- Parameters that appear late ------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "one_cycle", "plateau"])
def test_a_late_parameter_is_trained_as_one_that_was_always_there(schedule):
    late, history = run(LateModule, schedule=schedule)
    early, other = run(FromTheStart, schedule=schedule)
    assert_equal(late, early)
    assert history == other


def test_a_late_parameter_starts_adams_moments_when_it_appears():
    """Adam's first step has the size of the learning rate, whenever it comes."""
    vae, moves = LatePlain(), []

    def watch(entry):
        moves.append((vae.extra.bias.detach() - start).abs())

    start = vae.extra.bias.detach().clone()
    settings = config(epochs=LATE, learning_rate=1e-3)
    fit(vae, TraceMeanField_ELBO(), [images()], settings, on_epoch=watch)
    assert [bool(move.any()) for move in moves] == [False] * (LATE - 1) + [True]
    torch.testing.assert_close(moves[-1], torch.full((2,), 1e-3), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("kind", "killed_at"),
    [
        (kind, killed_at)
        for kind in (
            LateModule, LatePlain, Before, LateParam, SometimesParam, MadeModule, MadePlain,
        )
        for killed_at in (1, LATE - 1, LATE, LATE + 1, LATE + 2)
        if killed_at >= LATE or not issubclass(kind, Made)
    ],
)  # fmt: skip
def test_resumed_before_or_after_it_appeared_equals_uninterrupted(tmp_path, kind, killed_at):
    check_resumed(functools.partial(run, kind), tmp_path / "c", killed_at)


def test_killed_twice_around_a_parameter_that_is_rarely_used(tmp_path):
    whole, history = run(SometimesParam)
    # The second process, which runs the programs once to find parameters, never sees it.
    for left, seed in ((LATE + 1, 0), (2, 5)):
        with pytest.raises(Killed):
            run(SometimesParam, path=tmp_path / "c", left=left, seed=seed)
    assert torch.load(tmp_path / "c")["steps"] == LATE + 2
    resumed, other = run(SometimesParam, path=tmp_path / "c", seed=7)
    assert_equal(whole, resumed)
    assert history == other


def test_a_parameter_that_is_not_used_again_is_named(tmp_path):
    with pytest.raises(Killed):
        run(SometimesParam, path=tmp_path / "c", left=STEPS - 1)
    with pytest.warns(UserWarning, match=r"have not used \['scale'\]"):
        run(SometimesParam, path=tmp_path / "c", seed=7)
    assert "scale" in torch.load(tmp_path / "c")["weights"]


class Autoguided(Module):
    """Parameters that a PyroModule makes in its first call, and then wraps."""

    def make(self):
        super().make()
        self.autoguide = AutoNormal(self.model)

    def guide(self, x):
        return self.autoguide(x)


def as_by_svi_and_resumed(kind, elbo, path):
    """Trains a ``kind`` of VAE by ``fit``, whole and resumed, as SVI does; what SVI has trained."""

    def make(seed):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = kind()
        torch.manual_seed(seed)
        return vae

    def train(vae, epochs, path=None):
        fit(vae, elbo(), [images()], config(epochs=epochs), checkpoint=path)
        return everything(vae)

    plain = make(1)
    svi = SVI(plain.model, plain.guide, pyro.optim.Adam({"lr": 1e-2}), elbo())
    for _ in range(4):
        svi.step(images())
    trained = everything(plain)
    assert_equal(train(make(1), 4), trained)
    train(make(1), 2, path)
    assert_equal(train(make(7), 4, path), trained)
    return trained


def test_an_autoguide_is_trained_as_by_svi_and_resumed(tmp_path):
    as_by_svi_and_resumed(Autoguided, Trace_ELBO, tmp_path / "c")


class WithAverageBaseline(nn.Module):
    """A class whose gradient TraceGraph_ELBO estimates, less a decaying average of its cost."""

    def __init__(self):
        super().__init__()
        self.means, self.encoder = nn.Parameter(torch.tensor([0.1, 0.9])), nn.Linear(2, 2)

    def model(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(x.new_ones(len(x), 2)))
            mean = self.means[y][:, None].expand(-1, 2)
            pyro.sample("obs", dist.Normal(mean, 0.3).to_event(1), obs=x.flatten(1))

    def guide(self, x):
        pyro.module("vae", self)
        average = {"baseline": {"use_decaying_avg_baseline": True}}
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=self.encoder(x.flatten(1))), infer=average)


def test_an_average_baseline_is_kept_as_by_svi_and_resumed(tmp_path):
    trained = as_by_svi_and_resumed(WithAverageBaseline, TraceGraph_ELBO, tmp_path / "c")
    assert trained["__baseline_avg_downstream_cost_y"].any()


def test_the_store_must_not_be_cleared_while_training():
    with pytest.raises(ValueError, match="'scale' has become another tensor"):
        fit(
            SimpleParam(), Trace_ELBO(), [images()], config(),
            on_epoch=lambda entry: pyro.clear_param_store(),
        )  # fmt: skip


class Scaled:
    def decode(self, z):
        return self.decoder(z) * pyro.param("scale", torch.ones(2))


class SimpleParam(Scaled, Plain):
    pass


class ModuleAndParam(Scaled, Module):
    pass


# --- VAEs that are no modules ---------------------------------------------------------------------


@pytest.mark.parametrize("killed_at", [3, 4])
def test_buffers_of_plain_objects_are_resumed_and_modes_are_set(tmp_path, killed_at):
    whole = check_resumed(functools.partial(run, WithStatistics), tmp_path / "c", killed_at)
    assert whole["decoder.1.num_batches_tracked"] == STEPS
    assert set(torch.load(tmp_path / "c")["weights"]) == {
        *(f"encoder.{name}" for name in ("weight", "bias")),
        *(f"decoder.0.{name}" for name in ("weight", "bias")),
        *(f"decoder.1.{name}" for name in nn.BatchNorm1d(2).state_dict()),
    }


def test_modules_train_in_train_mode_and_are_left_in_eval_mode():
    vae = WithStatistics()
    modes = []
    vae.decoder.register_forward_hook(lambda module, x, y: modes.append(module.training))
    bound = types.SimpleNamespace(model=vae.model, guide=vae.guide)
    fit(bound, Trace_ELBO(), [images()], config(epochs=2), validation=[images()])
    assert modes == 2 * [True, False, False]
    assert not any(m.training for m in vae.decoder.modules())


def test_parameters_of_modules_and_of_none_stand_in_the_checkpoint(tmp_path):
    for kind in (SimpleParam, ModuleAndParam):
        path = tmp_path / kind.__name__
        whole, _ = run(kind, epochs=4)
        run(kind, epochs=2, path=path)
        resumed, _ = run(kind, epochs=4, path=path, seed=7)
        assert_equal(whole, resumed)
        assert not torch.equal(whole["scale"], torch.ones(2))
        names = {f"{part}.{name}" for part in ("encoder", "decoder") for name in ("weight", "bias")}
        assert set(torch.load(path)["weights"]) == names | {"scale"}


def test_several_instances_of_bound_programs_resume_each_other(tmp_path):
    """Names in Pyro's store differ between instances of a ConvVAE."""
    x = torch.rand(4, 1, 28, 28)

    def train(epochs, path):
        torch.manual_seed(0)
        vae = ConvVAE()
        bound = types.SimpleNamespace(model=vae.model, guide=vae.guide)
        settings = config(epochs=epochs, ema_decay=0.9)
        fit(bound, TraceMeanField_ELBO(), [x, x], settings, checkpoint=path)
        return vae.state_dict()

    whole = train(2, tmp_path / "whole")
    train(1, tmp_path / "parts")
    assert_equal(whole, train(2, tmp_path / "parts"))


def test_a_checkpoint_of_another_plain_vae_is_refused(tmp_path):
    fit(Plain(), Trace_ELBO(), [images()], config(), checkpoint=tmp_path / "c")

    class Wider(Plain):
        def make(self):
            super().make()
            self.decoder = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))

    class OtherShape(Plain):
        def make(self):
            super().make()
            self.encoder = nn.Sequential(nn.Linear(2, 2, bias=False))

    for kind in (Wider, OtherShape):
        pyro.clear_param_store()
        with pytest.raises(ValueError, match="belongs to another architecture"):
            fit(kind(), Trace_ELBO(), [images()], config(), checkpoint=tmp_path / "c")


def test_a_checkpoint_with_a_parameter_of_another_shape_is_refused(tmp_path):
    class Longer(Plain):
        def decode(self, z):
            return self.decoder(z) * pyro.param("scale", torch.ones(3))[:2]

    fit(SimpleParam(), Trace_ELBO(), [images()], config(), checkpoint=tmp_path / "c")
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"'scale' has shape \(3,\), in the checkpoint \(2,\)"):
        fit(Longer(), Trace_ELBO(), [images()], config(), checkpoint=tmp_path / "c")


def test_a_checkpoint_of_a_vae_with_more_parts_is_refused(tmp_path):
    class More(Plain):
        def make(self):
            super().make()
            self.unused = nn.Linear(1, 1)

    fit(More(), Trace_ELBO(), [images()], config(), checkpoint=tmp_path / "c")
    pyro.clear_param_store()
    with pytest.raises(
        ValueError, match=r"\['unused.bias', 'unused.weight'\], which the VAE lacks"
    ):
        fit(Plain(), Trace_ELBO(), [images()], config(), checkpoint=tmp_path / "c")


class NoModule:
    """Two parameters by names of its own."""

    def __init__(self, loc, scale):
        self.names = loc, scale

    def model(self, x):
        loc = pyro.param(self.names[0], torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            mean = (loc + z)[:, None, None, None].expand(x.shape)
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(3), obs=x)

    def guide(self, x):
        scale = pyro.param(self.names[1], torch.ones(()), dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), scale))


def test_a_checkpoint_without_anything_of_the_vae_is_refused(tmp_path):
    path = tmp_path / "c"
    fit(NoModule("loc", "scale"), Trace_ELBO(), [images()], config(), checkpoint=path)
    loc = pyro.param("loc").detach().clone()
    pyro.clear_param_store()
    with pytest.raises(
        ValueError, match=r"holds \['loc', 'scale'\], the programs have \['a', 'b'\]"
    ):
        fit(NoModule("b", "a"), Trace_ELBO(), [images()], config(), checkpoint=path)
    pyro.clear_param_store()
    with pytest.warns(UserWarning, match=r"holds \['scale'\], the programs have \['a'\]"):
        fit(NoModule("loc", "a"), Trace_ELBO(), [images()], config(), checkpoint=path)
    assert torch.equal(pyro.param("loc"), loc)


class Swapped(Plain):
    """One parameter of no module takes the place of another in the second epoch."""

    def make(self):
        super().make()
        self.steps = Steps()

    def decode(self, z):
        name = "one" if self.steps.next() <= STEPS // 2 else "two"
        return self.decoder(z) * pyro.param(name, lambda: torch.rand(2))


def test_resumed_when_a_parameter_takes_the_place_of_another(tmp_path):
    whole, history = run(Swapped)
    run(Swapped, epochs=1, path=tmp_path / "c")
    with pytest.warns(UserWarning, match=r"holds \['one'\], the programs have \['two'\]"):
        resumed, other = run(Swapped, path=tmp_path / "c", seed=7)
    assert_equal({n: v for n, v in whole.items() if n != "one"}, resumed)
    assert history == other


class MadeAfterRegistration(Module):
    """Its module is registered before it makes a layer, hence with it in the next step only."""

    def make(self):
        super().make()
        self.steps = Steps()

    def register_model(self):
        pyro.module("model", self)

    def decode(self, z):
        if self.steps.next() < LATE:
            return self.decoder(z)
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(2, 2)
            self.start = self.extra.weight.detach().clone()
        return self.decoder(z) + self.extra(z)


@pytest.mark.parametrize("epoch", [1, LATE])
def test_a_layer_that_is_registered_one_step_after_it_was_made(epoch):
    vae = MadeAfterRegistration()
    batches = images().split(8 // LATE if epoch == 1 else 8)
    fit(vae, TraceMeanField_ELBO(), batches, config(epochs=epoch))
    assert torch.equal(vae.extra.weight, vae.start) == (epoch == LATE)


def test_a_tensor_with_two_names_is_trained_once():
    class Twice(Module):
        def register_model(self):
            super().register_model()
            pyro.module("again", self.decoder)

    assert_equal({n: v for n, v in run(Twice)[0].items() if "again" not in n}, run(Module)[0])


def test_batches_are_moved_to_the_device_of_plain_objects():
    x = Elsewhere(images())
    fit(Plain(), Trace_ELBO(), [x], config(epochs=1))
    evaluate(Plain(), Trace_ELBO(), [x])
    assert x.asked == [torch.device("cpu")] * 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [LatePlain, LateParam, MadePlain])
def test_late_parameters_on_a_gpu(tmp_path, kind):
    def on_gpu():
        with torch.device("cuda"):
            return kind()

    with torch.device("cuda"):
        check_resumed(functools.partial(run, on_gpu), tmp_path / "c", LATE + 2)


# --- What would not be trained --------------------------------------------------------------------


def refused(vae, batches=None, **changes):
    """The message with which fit refuses a VAE, whose parameters do not change."""
    parameters = [p for m in vars(vae).values() if isinstance(m, nn.Module) for p in m.parameters()]
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(ValueError, match="would not be trained") as error:
        fit(vae, TraceMeanField_ELBO(), batches or [images()], config(**changes))
    return str(error.value), all(map(torch.equal, before, parameters))


class Forgetful(Plain):
    def register_guide(self):
        pass


def test_forgotten_registration_in_a_plain_object():
    message, unchanged = refused(Forgetful())
    assert "['encoder.weight', 'encoder.bias'] would not be trained" in message
    assert "call pyro.module(...)" in message
    assert "clear_param_store" not in message
    assert unchanged


def test_names_taken_by_another_plain_vae():
    first = Plain()
    fit(first, Trace_ELBO(), [images()], config(epochs=1))
    before = first.decoder.weight.detach().clone()
    message, unchanged = refused(Plain())
    assert "decoder.weight" in message
    assert "encoder.weight" in message
    assert "pyro.clear_param_store() first" in message
    assert "call pyro.module(...)" not in message
    assert unchanged
    assert torch.equal(before, first.decoder.weight)
    # The first may go on.
    fit(first, Trace_ELBO(), [images()], config(epochs=1))


def test_a_late_layer_that_is_not_registered():
    class LateForgetful(LatePlain):
        def register_model(self):
            pyro.module("decoder", self.decoder)
            self.late = self.steps.next() >= LATE

    vae, losses = LateForgetful(), []
    with pytest.raises(ValueError, match=r"\['extra.weight', 'extra.bias'\] would not be trained"):
        fit(
            vae, Trace_ELBO(), [images()], config(epochs=5),
            on_epoch=lambda entry: losses.append(entry["train_loss"]),
        )  # fmt: skip
    assert len(losses) == LATE - 1


def test_a_late_layer_that_is_made_and_not_registered(tmp_path):
    class Unregistered(MadePlain):
        def register_model(self):
            pyro.module("decoder", self.decoder)
            self.late = self.steps.next() >= LATE
            if self.late and self.extra is None:
                self.extra = nn.Linear(2, 2)

    path = tmp_path / "c"
    with pytest.raises(ValueError, match=r"\['extra.weight', 'extra.bias'\] would not be trained"):
        fit(Unregistered(), Trace_ELBO(), [images()] * 2, config(epochs=4), checkpoint=path)
    assert torch.load(path)["epoch"] == 1


def test_what_the_programs_do_not_train_is_nobodys_fault():
    class Frozen(Plain):
        def make(self):
            super().make()
            self.frozen = nn.Linear(2, 2).requires_grad_(False)
            self.unused = nn.Linear(2, 2)
            self.constant = nn.Linear(2, 2)
            # What somebody else left there.
            self.unused.weight.grad = torch.ones(2, 2)

        def decode(self, z):
            with torch.no_grad():
                constant = self.constant(z)
            return self.frozen(self.decoder(z)) + constant + pyro.param("a", torch.zeros(2))

    vae = Frozen()
    before = {n: m.weight.clone() for n, m in vars(vae).items() if isinstance(m, nn.Module)}
    fit(vae, Trace_ELBO(), [images()], config())
    moved = {n for n, weight in before.items() if not torch.equal(weight, getattr(vae, n).weight)}
    assert moved == {"encoder", "decoder"}
    assert pyro.param("a").abs().min() > 0


class OfPyroModules(PyroModule, Programs):
    """Layers that register themselves, one of which is frozen."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = (PyroModule[nn.Linear](2, 2) for _ in range(2))
        self.encoder.requires_grad_(False)
        self.noise = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def register_model(self):
        pass

    register_guide = register_model


class WithNoise(OfPyroModules):
    def prior(self, x):
        return dist.Normal(x.new_zeros(2), self.noise).to_event(1)


@pytest.mark.parametrize("used", [False, True])
def test_frozen_layers_of_pyro_modules_stay_frozen(used):
    vae = OfPyroModules()
    weight, bias = vae.encoder.weight.clone(), vae.decoder.bias.clone()
    if used:
        program.encode(vae, images())
        assert not vae.encoder.weight.requires_grad
    fit(vae, Trace_ELBO(), [images()], config())
    assert not any(p.requires_grad for p in vae.encoder.parameters())
    assert torch.equal(vae.encoder.weight, weight)
    assert not torch.equal(vae.decoder.bias, bias)


def test_a_frozen_copy_freezes_nothing_but_itself():
    vae = OfPyroModules().requires_grad_(True)
    fit(vae, Trace_ELBO(), [images()], config())
    best, weight = copy.deepcopy(vae).requires_grad_(False), vae.encoder.weight.clone()
    program.encode(best, images())
    assert not any(parameter.requires_grad for parameter in best.parameters())
    fit(vae, Trace_ELBO(), [images()], config())
    assert not torch.equal(vae.encoder.weight, weight)
    assert torch.equal(best.encoder.weight, weight)


def test_parameters_of_a_pyro_module_whose_programs_are_plain_methods():
    with pytest.raises(ValueError, match=r"noise_unconstrained.*pyro\.nn\.pyro_method"):
        fit(WithNoise(), Trace_ELBO(), [images()], config())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(images())


class OfUnlikeLength(list):
    """Batches, by its length as many as ``says``."""

    says = 2

    def __len__(self):
        return self.says


@pytest.mark.parametrize(("size", "found"), [(2, "more"), (8, "1")])
def test_one_cycle_counts_on_the_length_of_the_loader(size, found):
    batches = OfUnlikeLength(images().split(size))
    with pytest.raises(ValueError, match=f"yields {found} batches, .* it has 2, .*one_cycle"):
        fit(Plain(), Trace_ELBO(), batches, config(epochs=1, schedule="one_cycle"))
    pyro.clear_param_store()
    fit(Plain(), Trace_ELBO(), batches, config(epochs=1))


@pytest.mark.parametrize(
    ("schedule", "left", "fits"),
    [("constant", 5, False), ("constant", 4, True), ("one_cycle", 4, False)],
)
def test_another_number_of_batches_follows_whole_epochs_alone(tmp_path, schedule, left, fits):
    """Of a cycle the rest would have another length, of an epoch other images would be left out."""
    path, settings = tmp_path / "c", config(schedule=schedule, checkpoint_every=1)
    with pytest.raises(Killed):
        fit(Plain(), KilledAfter(left), images().split(2), settings, checkpoint=path)
    for size in (4, 1):
        pyro.clear_param_store()
        expected = contextlib.nullcontext()
        if not fits:
            message = rf"other settings .*'batches of an epoch': \(4, {8 // size}\)"
            expected = pytest.raises(ValueError, match=message)
        copy_of = shutil.copy(path, tmp_path / f"copy{size}")
        with expected:
            fit(Plain(), Trace_ELBO(), images().split(size), settings, checkpoint=copy_of)


def test_an_objective_without_a_loss_is_refused():
    with pytest.raises(ValueError, match="no loss, .*RenyiELBO"):
        fit(Plain(), TraceTailAdaptive_ELBO(num_particles=2), [images()], config())


def test_loaders_without_a_length():
    stream = DataLoader(Stream(), batch_size=4)
    assert fit(Module(), Trace_ELBO(), stream, config()).steps == 4
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="needs a loader with a length"):
        fit(Module(), Trace_ELBO(), stream, config(schedule="one_cycle"))


def test_gradients_from_before_training_are_none_of_its_own():
    vae = SimpleParam()
    pyro.param("scale", torch.ones(2))
    unconstrained = dict(pyro.get_param_store().named_parameters())["scale"]
    unconstrained.grad = torch.full((2,), torch.nan)
    vae.decoder.bias.grad = torch.full((2,), torch.nan)
    fit(vae, Trace_ELBO(), [images()], config())
    assert pyro.param("scale").isfinite().all()
    assert vae.decoder.bias.isfinite().all()


def test_nothing_registered_at_all():
    class Silent(Forgetful):
        def register_model(self):
            pass

    with pytest.raises(ValueError, match="no parameter was seen in model or guide; register"):
        fit(Silent(), Trace_ELBO(), [images()], config())


class Misnamed(Module):
    def guide(self, x):
        self.register_guide()
        with pyro.plate("data", len(x)):
            pyro.sample("latent", dist.Normal(self.encoder(x.flatten(1)), 0.5).to_event(1))


@pytest.mark.filterwarnings("ignore:Found (non-auxiliary )?vars")
def test_latents_that_differ_are_named_in_place_of_pyros_key_error():
    message = r"model has the latent sites \['z'\], the guide \['latent'\]"
    with pytest.raises(ValueError, match=message):
        fit(Misnamed(), TraceMeanField_ELBO(), [images()], config())


# --- Data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            images()[0],
            r"first batch must have shape \(N, C, H, W\).*DataLoader\(dataset, 128\)",
        ),
        (
            images().flatten(1),
            r"first batch must have shape \(N, C, H, W\).* x.view\(-1, 1, 28, 28",
        ),
        ((255 * images()).byte(), r"first batch must be floating point .* x.float\(\) / 255"),
        (255 * images(), r"first batch must lie in \[0, 1\], got .* rescale it"),
        (images() - 0.5, r"first batch must lie in \[0, 1\]"),
        (images().index_fill(0, torch.tensor([2]), torch.nan), r"NaN .* rows \[2\]; repair"),
        (images().index_fill(0, torch.tensor([0]), torch.inf), r"infinite .* rows \[0\]"),
        (images().tolist(), "first batch must be a tensor of images .* got list"),
        ({"image": images()}, "first batch must be a tensor of images .* got dict"),
        ((), "a batch is empty"),
    ],
)
def test_data_that_programs_cannot_take(batch, message):
    vae = Plain()
    before = vae.decoder.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        fit(vae, Trace_ELBO(), [batch], config())
    assert torch.equal(before, vae.decoder.weight)
    with pytest.raises(ValueError, match=message):
        fit(vae, Trace_ELBO(), [images()], config(epochs=1, learning_rate=1e-9), validation=[batch])
    with pytest.raises(ValueError, match=message):
        evaluate(vae, Trace_ELBO(), [batch])


def test_nan_in_a_later_batch_is_refused_before_it_changes_anything():
    """Also where the objective would not notice."""

    class Masked(WithStatistics):
        def model(self, x):
            super().model(x.nan_to_num())

        def guide(self, x):
            super().guide(x.nan_to_num())

    vae, bad = Masked(), images()
    bad[5, 0, 0, 1] = torch.nan
    seen = []

    class Batches:
        def __iter__(self):
            yield images()
            seen.append({n: v.clone() for n, v in vae.decoder.state_dict().items()})
            yield bad

    with pytest.raises(NonFiniteLossError, match=r"loader's batch 2 has NaN .* \[5\]") as error:
        fit(vae, Trace_ELBO(), Batches(), config())
    assert isinstance(error.value, ValueError)
    assert_equal(seen[0], vae.decoder.state_dict())


def test_large_half_precision_batches_are_finite():
    class Half(Plain):
        def model(self, x):
            super().model(x.float())

        def guide(self, x):
            super().guide(x.float())

    x = torch.ones(40_000, 1, 1, 2, dtype=torch.float16)
    assert evaluate(Half(), Trace_ELBO(), [x]) > 0


# --- Validation -----------------------------------------------------------------------------------


class Mixture(Plain):
    """A prior of two unit Gaussians at -1 and 1 whose component the model sums out."""

    @config_enumerate
    def model(self, x):
        self.register_model()
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=x.new_zeros(2)))
            z = pyro.sample("z", dist.Normal(2.0 * y[..., None] - 1, x.new_ones(2)).to_event(1))
            mean = self.decoder(z)[..., None, None, :]
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(3), obs=x)


class Coin(Plain):
    """A discrete latent that the guide samples or enumerates."""

    def model(self, x):
        self.register_model()
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(x.new_full((), 0.5)))
            mean = self.decoder(torch.stack([y, 1 - y], -1))[..., None, None, :]
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(3), obs=x)

    def guide(self, x):
        self.register_guide()
        with pyro.plate("data", len(x)):
            logits = self.encoder(x.flatten(1))[:, 0]
            pyro.sample("y", dist.Bernoulli(logits=logits))


class EnumeratedCoin(Coin):
    guide = config_enumerate(Coin.guide)


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        (Mixture, TraceEnum_ELBO(max_plate_nesting=1)),
        (Coin, Trace_ELBO()),
        (EnumeratedCoin, TraceEnum_ELBO(max_plate_nesting=1)),
        (Coin, ReweightedWakeSleep(num_particles=2)),
    ],
)
def test_validation_without_an_analytic_elbo(kind, objective):
    x = images()
    result = fit(kind(), objective, [x], config(schedule="plateau"), validation=[x[:3], x[3:]])
    for entry in result.history:
        assert entry["validation_loss"] > 0
        assert "validation_nelbo" not in entry


@pytest.mark.parametrize("plate", ["data", "images"])
@pytest.mark.parametrize(
    "objective", [BetaELBO, Trace_ELBO, TraceMeanField_ELBO, lambda: Trace_ELBO(2, 1, None, True)]
)
def test_losses_are_per_image_where_a_plate_subsamples(objective, plate, monkeypatch):
    whole, found, x = pyro.plate, [], torch.rand(8, 1, 28, 28)

    def subsampling(name, size, **other):  # Pyro opens one of particles, too
        given = (plate, 60_000) if name == "data" else (name, size)
        return whole(*given, subsample=torch.arange(size), **other)

    for each in (whole, subsampling):
        monkeypatch.setattr(pyro, "plate", each)
        pyro.clear_param_store()
        torch.manual_seed(1)
        vae, settings = TutorialVAE(), config(epochs=1, learning_rate=1e-12)
        entry = fit(vae, objective(), [x[:5], x[5:]], settings, validation=[x]).history[0]
        found.append([entry["train_loss"], entry["validation_loss"], entry["validation_nelbo"]])
        found[-1].append(evaluate(vae, objective(), [x[:2], x]))
    assert found[1] == pytest.approx(found[0])


def test_validation_loss_of_an_enumerated_model_is_its_objective():
    """With the guide's noise known, log sum_y p(y) p(z | y) by hand."""
    vae, x = Mixture(), images()
    settings = config(epochs=1, learning_rate=1e-12)
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    torch.manual_seed(3)
    fit(vae, objective, [x], settings)
    torch.manual_seed(4)
    found = evaluate(vae, objective, [x])
    torch.manual_seed(4)
    with torch.no_grad():
        q = dist.Normal(vae.encoder(x.flatten(1)), 0.5).to_event(1)
        z = q.sample()
        components = [dist.Normal(torch.full((2,), at), 1.0).to_event(1) for at in (-1.0, 1.0)]
        prior = (
            torch.stack([p.log_prob(z) for p in components]).logsumexp(0) - torch.tensor(2.0).log()
        )
        likelihood = dist.Normal(vae.decoder(z), 1.0).to_event(1).log_prob(x.flatten(1))
        expected = (q.log_prob(z) - prior - likelihood).mean()
    torch.testing.assert_close(torch.tensor(found), expected)


def test_analytic_validation_stays_where_there_is_one():
    result = fit(Plain(), Trace_ELBO(), [images()], config(epochs=1), validation=[images()])
    assert result.history[0]["validation_nelbo"] == pytest.approx(
        result.history[0]["validation_loss"], rel=0.5
    )


# --- Conditions -----------------------------------------------------------------------------------


class Conditional(Plain):
    """Means of images and latents by label; ``calls`` are the labels the programs were given."""

    mean_posterior_variance = None

    def __init__(self):
        super().__init__()
        self.means = nn.Embedding(3, 2)
        self.scales = nn.Embedding(3, 2)
        self.calls = []

    def register_model(self):
        pyro.module("decoder", self.decoder)
        pyro.module("means", self.means)

    def register_guide(self):
        pyro.module("encoder", self.encoder)
        pyro.module("scales", self.scales)

    def model(self, x, y=None):
        self.register_model()
        self.calls.append(y)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            mean = (self.decoder(z) + self.means(y)).reshape(len(x), 1, 1, 2)
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(3), obs=x)

    def guide(self, x, y=None):
        self.register_guide()
        with pyro.plate("data", len(x)):
            scale = self.scales(y).exp()
            pyro.sample("z", dist.Normal(self.encoder(x.flatten(1)), scale).to_event(1))


def labelled(count=8, size=3):
    y = torch.arange(count) % 3
    return list(zip(images(count).split(size), y.split(size), strict=True))


def test_labels_reach_both_programs_in_training_validation_and_evaluation():
    vae, batches = Conditional(), labelled()
    labels = [y for _, y in batches]
    result = fit(vae, Trace_ELBO(), batches, config(epochs=1), validation=batches)
    # Training, its objective and the analytic ELBO.
    assert len(vae.calls) == 9
    assert all(map(torch.equal, vae.calls, 3 * labels))
    evaluate(vae, Trace_ELBO(), batches)
    assert all(map(torch.equal, vae.calls[9:], labels))
    # Unweighted, whatever the size of the batches.
    y = torch.cat(labels)
    expected = (2 * vae.scales.weight[y]).exp().mean(0)
    torch.testing.assert_close(result.mean_posterior_variance["z"], expected.detach())
    assert vae.mean_posterior_variance is result.mean_posterior_variance


def test_conditional_means_are_learnt():
    """With z of no use to the decoder each mean tends to its images'."""
    x = torch.tensor([0.1, 0.1, 0.5, 0.9]).reshape(4, 1, 1, 1).expand(-1, -1, -1, 2)
    y = torch.tensor([0, 0, 1, 2])
    vae = Conditional()
    nn.init.zeros_(vae.decoder.weight)
    nn.init.zeros_(vae.decoder.bias)
    vae.decoder.requires_grad_(False)
    nn.init.zeros_(vae.means.weight)
    settings = config(epochs=100, learning_rate=0.05, posterior_variance=False)
    vae.register_model = lambda: pyro.module("means", vae.means)
    fit(vae, TraceMeanField_ELBO(), [(x, y)], settings)
    expected = torch.tensor([0.1, 0.5, 0.9])[:, None].expand(-1, 2)
    torch.testing.assert_close(vae.means.weight.detach(), expected, rtol=0, atol=0.01)


def test_training_with_labels_is_resumed(tmp_path):
    def train(path=None, seed=0, left=-1):
        pyro.clear_param_store()
        torch.manual_seed(seed)
        vae, batches, settings = Conditional(), labelled(), config(checkpoint_every=1)
        objective = KilledAfter(left)
        result = fit(vae, objective, batches, settings, validation=batches, checkpoint=path)
        return everything(vae), result.history

    check_resumed(train, tmp_path / "c", 4)


def test_labels_that_nobody_takes_are_said_once():
    batches = [(x, y, y) for x, y in labelled()]
    with pytest.warns(UserWarning, match=r"2 more entries .* model\(self, x, y\)") as warned:
        fit(Plain(), Trace_ELBO(), batches, config(), validation=batches)
    assert len(warned) == 1
    pyro.clear_param_store()
    # None is no label, a conditional VAE takes one, and an evaluation says nothing.
    fit(Plain(), Trace_ELBO(), [(images(), None)], config())
    pyro.clear_param_store()
    with pytest.warns(UserWarning, match="1 more entry "):
        fit(Conditional(), Trace_ELBO(), batches, config(epochs=1))
    evaluate(Plain(), Trace_ELBO(), batches)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0] * 8, "must be a tensor with one row per image, got list"),
        (tuple(range(8)), "must be a tensor with one row per image, got tuple"),
        (torch.zeros(7, dtype=torch.long), r"one row for each of 8 images, got shape \(7,\)"),
        (torch.tensor(1), "one row for each of 8 images"),
    ],
)
def test_conditions_without_a_row_per_image(y, message):
    with pytest.raises(ValueError, match=message):
        fit(Conditional(), Trace_ELBO(), [(images(), y)], config())


def test_a_label_that_is_needed():
    class Needs(Conditional):
        def model(self, x, y):
            super().model(x, y)

        def guide(self, x, y):
            super().guide(x, y)

    with pytest.raises(ValueError, match="the programs need 1 argument"):
        fit(Needs(), Trace_ELBO(), [images()], config())


def test_settings_with_a_default_are_no_labels():
    class Annealed(TutorialVAE):
        def model(self, x, annealing=1.0):
            assert annealing == 1.0
            super().model(x)

        def guide(self, x, annealing=1.0):
            super().guide(x)

    batch = (torch.rand(4, 1, 28, 28), torch.zeros(4))
    with pytest.warns(UserWarning, match="1 more entry"):
        fit(Annealed(), Trace_ELBO(), [batch], config(epochs=1))


def test_validation_nelbo_of_a_guide_that_samples_in_another_order():
    # What the closed form of a dependent site says is nats off; 5 standard errors allow 0.5.
    vae = BottomUpVAE()
    x = torch.rand(1, 1, 2, 2, dtype=torch.float64).expand(2000, -1, -1, -1)
    [entry] = fit(vae, Trace_ELBO(), [x[:2]], config(epochs=1), validation=[x]).history
    sampled = evaluate(vae, Trace_ELBO(), [x])
    assert entry["validation_nelbo"] == pytest.approx(sampled, abs=0.5)


class Weighted(Plain):
    """A beta-VAE whose programs scale and mask by themselves; its mean image is a constant."""

    def make(self):
        super().make()
        nn.init.zeros_(self.decoder.weight)
        self.encoder.double(), self.decoder.double()

    def model(self, x):
        self.register_model()
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=4.0):
                z = pyro.sample("z", self.prior(x))
            seen = dist.Normal(self.decode(z).reshape(x.shape), 1.0).to_event(3)
            with poutine.scale(scale=0.5), poutine.mask(mask=x.sum((1, 2, 3)) < 1):
                pyro.sample("obs", seen, obs=x)

    def guide(self, x):
        with poutine.scale(scale=4.0):
            super().guide(x)

    def kl(self, x):
        q = torch.distributions.Normal(self.encoder(x.flatten(1)), 0.5)
        return torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)


class Halved(Weighted):
    """Noise of twice the prior's deviation, halved: the prior."""

    def guide(self, x):
        with pyro.plate("data", len(x)):
            noise = dist.Normal(x.new_zeros(2), 2.0).to_event(1)
            noise = pyro.sample("noise", noise, infer={"is_auxiliary": True})
            log_density = torch.full_like(noise[:, 0], 4.0).log()
            pyro.sample("z", dist.Delta(noise / 2, log_density=log_density, event_dim=1))

    def kl(self, x):
        return torch.zeros(len(x))


@pytest.mark.parametrize("kind", [Weighted, Halved])
def test_validation_nelbo_is_at_beta_one_and_of_the_density_that_programs_state(kind):
    """Exact where the image does not depend on the latent."""
    vae, x, settings = kind(), images().double(), config(epochs=1, learning_rate=1e-12)
    [entry] = fit(vae, Trace_ELBO(), [x], settings, validation=x.split(3)).history
    seen = x.sum((1, 2, 3)) < 1
    errors = (x.flatten(1) - vae.decoder.bias).square().sum(1) / 2 + math.log(2 * math.pi)
    expected = (errors * seen + vae.kl(x)).mean().detach()
    assert 0 < seen.sum() < len(x)
    assert entry["validation_nelbo"] == pytest.approx(float(expected), rel=1e-6)
