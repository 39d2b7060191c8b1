"""Modules are found wherever a VAE's programs can reach them, and nowhere else."""

from __future__ import annotations

import functools
import types
import warnings
from collections import namedtuple
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import TutorialVAE
from pyro import poutine
from pyro.infer import config_enumerate
from torch import nn

from pyro_vae_defence import attacks
from pyro_vae_defence.defence import MCMCDefence
from pyro_vae_defence.mcmc import BatchedHMC
from pyro_vae_defence.models import ConvVAE
from pyro_vae_defence.models.conditions import BoundVAE
from pyro_vae_defence.models.modules import modules_of, networks_of
from pyro_vae_defence.models.program import evaluation_mode
from pyro_vae_defence.ops.balls import Linf


def net():
    return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))


global_net = net()
other_global_net = net()
unnamed_global_net = net()


def helper(x):
    return [global_net(row) for row in x]


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)

    def model(self, x):
        return x

    guide = model


class Slots:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


class OnClass(Holder):
    shared = net()


class Static(Holder):
    @staticmethod
    def model(x):
        return other_global_net(x)

    @functools.cached_property
    def part(self):
        return global_net


class NamesGlobals(Holder):
    def model(self, x):
        return helper(x)

    def guide(self, x):
        return (lambda: other_global_net(x))()


class Callable:
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


class Property(Holder):
    @property
    def model(self):
        inner = self._make()
        return lambda x: inner(x)


class Parts(nn.Module):
    """A module whose parts are no children."""

    def __init__(self, *parts):
        super().__init__()
        self.child = nn.Linear(1, 1)
        self.parts = list(parts)


def by_closure(inner):
    def program(x):
        return inner(x)

    return program


def by_default(x, inner=None, *, other=None):
    return inner, other


def default_with(inner, other):
    program = types.FunctionType(by_default.__code__, globals(), "program")
    program.__defaults__, program.__kwdefaults__ = (inner,), {"other": other}
    return program


Pair = namedtuple("Pair", ["first", "second"])
a, b = net(), net()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: a, [a]),
        (lambda: Holder(a=a, b=b), [a, b]),
        (lambda: Holder(parts=[a, (b,)]), [a, b]),
        (lambda: Holder(parts={"a": a, "b": {"c": b}}), [a, b]),
        (lambda: Holder(pair=Pair(a, Holder(inner=b))), [a, b]),
        (lambda: Holder(inner=Slots(a)), [a]),
        (lambda: Parts(a, [b]), [a, b]),
        (lambda: OnClass(), [OnClass.shared]),
        (lambda: NamesGlobals(), [global_net, other_global_net]),
        (lambda: helper, [global_net]),
        (lambda: Static(), [global_net, other_global_net]),
        (lambda: Static, [global_net, other_global_net]),
        (lambda: Property(_make=lambda: a), [a]),
        (lambda: types.SimpleNamespace(model=Callable(a), guide=Callable(b).__call__), [a, b]),
        (lambda: types.SimpleNamespace(model=functools.partial(max, a, key=b), guide=a), [a, b]),
        (lambda: by_closure(a), [a]),
        (lambda: default_with(a, b), [a, b]),
        (lambda: functools.wraps(by_closure(a))(lambda x: x), [a]),
        (lambda: functools.lru_cache(by_closure(a)), [a]),
        (lambda: poutine.scale(by_closure(a), scale=2.0), [a]),
        (lambda: poutine.block(config_enumerate(by_closure(a))), [a]),
        (lambda: BoundVAE(Holder(a=a), by_closure(b), by_closure(b)), [a, b]),
    ],
)
def test_modules_are_found(make, expected):
    program = make()
    found = modules_of(program)
    assert {id(m) for m in found} >= {id(m) for root in expected for m in root.modules()}
    assert len({id(m) for m in found}) == len(found)
    # No other of this file's networks, whatever else the program is made of.
    ours = [a, b, global_net, other_global_net, unnamed_global_net, OnClass.shared]
    strangers = [root for root in ours if not any(root is m for m in expected)]
    assert not {id(m) for m in found} & {id(m) for root in strangers for m in root.modules()}


def test_circles_end_and_shared_modules_come_once():
    holder = Holder(a=a, again=[a, a], part=a[0])
    holder.itself = holder
    holder.list = [holder]
    holder.list.append(holder.list)
    assert sorted(map(id, modules_of(holder, holder, a))) == sorted(map(id, a.modules()))


def test_what_is_large_and_holds_nothing_is_not_entered():
    holder = Holder(images=[torch.zeros(1)] * 1000, table=list(range(1000)), a=a)
    assert modules_of(holder) == list(a.modules())


def test_paths_of_outermost_modules():
    vae = Holder(encoder=a, parts=[b, a[0]], inner=Holder(decoder=global_net))
    networks = networks_of(vae)
    assert networks == {"encoder": a, "parts.0": b, "inner.decoder": global_net}
    assert list(networks_of(TutorialVAE())) == [""]
    conv = ConvVAE()
    bound = types.SimpleNamespace(model=conv.model, guide=functools.partial(conv.guide))
    assert networks_of(bound) == {"model": conv}
    # Two on one path keep two names.
    assert list(networks_of(functools.partial(max, a, **{"0": b}))) == ["0", "0'"]


class DropoutVAE(TutorialVAE):
    """Noise and running statistics in train mode."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(
            nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 784)
        )


def bindings(vae):
    return {
        "bound methods": types.SimpleNamespace(model=vae.model, guide=vae.guide),
        "partial": types.SimpleNamespace(
            model=vae.model, guide=functools.partial(vae.guide), name="net"
        ),
        "handlers": types.SimpleNamespace(
            model=poutine.scale(vae.model, scale=0.5), guide=lambda x: vae.guide(x)
        ),
    }


@pytest.mark.parametrize("binding", ["bound methods", "partial", "handlers"])
def test_attacks_and_defences_see_eval_mode_and_leave_modes_alone(binding):
    vae = DropoutVAE().train()
    vae.decoder[2].eval()
    modes, seen = [m.training for m in vae.modules()], set()
    vae.decoder.register_forward_hook(lambda module, x, y: seen.add(module[1].training))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    bound, x = bindings(vae)[binding], torch.rand(3, 1, 28, 28)
    MCMCDefence(bound, BatchedHMC, num_samples=1, warmup_steps=1)(x)
    attacks.PGD(attacks.symmetric_kl(bound), Linf(0.1), num_steps=1)(x)
    assert seen == {False}
    assert [m.training for m in vae.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


def test_modes_are_restored_after_an_error_and_a_change_inside():
    vae = Holder(a=a.train())
    a[1].eval()

    def fail():
        assert not any(m.training for m in a.modules())
        a.train()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), evaluation_mode(vae):
        fail()
    assert [m.training for m in a.modules()] == [True, True, False]


def test_what_answers_to_every_name_is_left_alone():
    assert modules_of(Holder(mock=mock.MagicMock(), library=torch, a=a)) == list(a.modules())


def test_a_module_is_found_as_soon_as_it_is_made():
    vae = Holder(parts=[])
    assert modules_of(vae) == []
    vae.parts.append(a)
    assert modules_of(vae) == list(a.modules())


def test_a_scripted_module_is_put_into_eval_mode():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather compile
        scripted = torch.jit.script(nn.Sequential(nn.Dropout(0.5)))
    with evaluation_mode(Holder(scripted=scripted)):
        assert torch.equal(scripted(torch.ones(9)), torch.ones(9))
    assert scripted.training
    assert all(m.training for m in scripted.modules())


def test_pyro_objects_that_hold_modules():
    spline = dist.transforms.spline_coupling(2)

    class Flow(Holder):
        def guide(self, x):
            return pyro.sample("z", self.q)

    vae = Flow(q=dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [spline]))
    assert spline in modules_of(vae)


def test_networks_of_an_imported_module():
    namespace = types.ModuleType("networks_elsewhere")
    namespace.decoder = nn.Linear(2, 3)
    namespace.other = nn.Linear(2, 3)
    source = "def model(x):\n    return networks.decoder(x)\n"
    found = {"networks": namespace, "__name__": "__main__"}
    exec(source, found)
    assert modules_of(found["model"]) == [namespace.decoder]


def test_networks_that_a_wrapped_program_names():
    """What wraps a program of the library goes by the name of its module, and is not its code."""

    @functools.wraps(ConvVAE.guide)
    def guide(vae, x):
        return ConvVAE.guide(vae, global_net(x))

    assert guide.__module__.startswith("pyro_vae_defence")
    assert set(global_net.modules()) <= set(modules_of(guide))


def test_a_module_of_a_users_that_is_called_as_a_standard_one():
    around = {"net": net(), "__name__": "code"}
    exec("def guide(x): return net(x)", around)
    assert set(modules_of(around["guide"])) == set(around["net"].modules())
