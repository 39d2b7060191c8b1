"""However a public call ends, the process is as it was: interrupts, pickling, memory, threads."""

import copy
import gc
import io
import itertools
import pickle
import random
import sys
import threading
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroSample
from pyro.poutine import runtime
from torch import nn

from pyro_vae_defence import attacks, defence, mcmc, metrics, training
from pyro_vae_defence.models import ConvVAE, program
from pyro_vae_defence.ops import boundary
from pyro_vae_defence.ops.balls import Linf

PLACES = 6
_numbers = itertools.count()


class ModuleVAE(nn.Module):
    """A user's own, with what has a train mode."""

    name = ""  # fit refuses names that another VAE has

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4))
        self.decoder = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.3))

    def model(self, x):
        pyro.module(f"{self.name}decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0], 2), 1.0).to_event(1))
            mean = self.decoder(z).reshape(x.shape)
            pyro.sample("obs", dist.Normal(mean, 0.5).to_event(3), obs=x)

    def guide(self, x):
        pyro.module(f"{self.name}encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            mean, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _images(count=3):
    return torch.rand(count, 1, 4, 4, generator=_generator(1))


def _vae():
    torch.manual_seed(0)
    return ModuleVAE().train()


def _defend(vae):
    return defence.MCMCDefence(vae, num_samples=1, warmup_steps=1)(_images(), _generator()).samples[
        "z"
    ]


def _stock(vae):
    torch.manual_seed(0)
    kernel = lambda model: infer.HMC(model, num_steps=2, step_size=0.1)  # noqa: E731
    guard = defence.MCMCDefence(vae, kernel, num_samples=1, warmup_steps=1)
    return guard(_images(1), _generator()).samples["z"]


def _attack(vae):
    return attacks.PGD(attacks.symmetric_kl(vae), Linf(0.1), 2)(_images(), _generator()).x_adv


def _encode(vae):
    torch.manual_seed(0)
    return program.encode(vae, _images())["z"]


def _fit(vae):
    vae = copy.deepcopy(vae)
    vae.name = f"fitted{next(_numbers)}"
    torch.manual_seed(0)
    config = training.FitConfig(epochs=1, schedule="constant", ema_decay=0.9, progress=False)
    training.fit(vae, TraceMeanField_ELBO(), [_images(), _images()], config)
    return torch.cat([parameter.detach().flatten() for parameter in vae.parameters()])


CALLS = {"defend": _defend, "stock": _stock, "attack": _attack, "fit": _fit}


def _state(vae):
    return (
        list(runtime._PYRO_STACK),
        list(runtime._DIM_ALLOCATOR._stack),
        [place.is_validation_enabled() for place in (dist, infer, poutine)],
        torch.is_grad_enabled(),
        [module.training for module in vae.modules()],
    )


def _interrupted(call, at, files):
    """Lines run in ``files``, parts of ``file:function``; Ctrl-C comes at line number ``at``, if
    there is such a one."""
    lines, before = 0, sys.gettrace()

    def line(frame, event, argument):
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return line

    def entered(frame, event, argument):
        place = f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
        return line if any(part in place for part in files) else None

    sys.settrace(entered)
    try:
        call()
    except KeyboardInterrupt:
        assert lines >= at
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_after_ctrl_c_at_any_line_all_is_as_before(call):
    vae, files = _vae(), ("/pyro/", "pyro_vae_defence", "contextlib.py")
    expected, before = call(vae), _state(vae)
    total = _interrupted(lambda: call(vae), 0, files)
    for at in random.Random(0).sample(range(1, total + 1), PLACES):
        _interrupted(lambda: call(vae), at, files)
        assert _state(vae) == before, at
    assert torch.equal(call(vae), expected)


def test_contexts_that_ctrl_c_cuts_off_have_ended_with_the_call():
    """They are generators, which else put back what they have found when the interrupt is dropped:
    within a chain, that Pyro's validation is off."""
    vae, ends = _vae(), ("contextlib.py:__exit__",)
    _stock(vae)
    before = _state(vae)
    total = _interrupted(lambda: _stock(vae), 0, ends)
    for at in random.Random(0).sample(range(1, total + 1), 3 * PLACES):
        _interrupted(lambda: _stock(vae), at, ends)
        assert _state(vae) == before, at


def test_after_ctrl_c_within_the_boundary_itself_the_next_call_is_right():
    vae = _vae()
    vae.eval()
    expected, before = _encode(vae), _state(vae)
    files = (boundary.__file__,)
    total = _interrupted(lambda: _encode(vae), 0, files)
    assert total > 20
    for at in range(1, total + 1):
        _interrupted(lambda: _encode(vae), at, files)
        assert torch.equal(_encode(vae), expected), at
        assert not boundary._lock._is_owned()
        assert _state(vae) == before, at


def test_ctrl_c_while_a_plate_is_entered_does_not_poison_later_calls(monkeypatch):
    vae, allocator = _vae(), runtime._DIM_ALLOCATOR
    expected = _defend(vae)
    allocate = allocator.allocate

    def interrupted(name, dim):
        allocate(name, dim)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(allocator, "allocate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _defend(vae)
    assert allocator._stack == []
    assert torch.equal(_defend(vae), expected)


def test_handlers_of_the_caller_stay():
    vae = _vae().eval()
    with pyro.plate("mine", 2, dim=-3), poutine.trace() as mine, pyro.validation_enabled(False):
        before = _state(vae)
        with pytest.raises(ValueError, match="x must have shape"):
            defence.NoDefence(vae)(_images()[0])
        _encode(vae)
        assert _state(vae) == before
        assert len(before[0]) >= 2
        assert mine in before[0]
    assert runtime._PYRO_STACK == []


def _trained():
    vae = _vae()
    pyro.clear_param_store()
    config = training.FitConfig(epochs=1, schedule="constant", progress=False)
    training.fit(vae, TraceMeanField_ELBO(), [_images()], config)
    return torch.cat([value.detach().flatten() for value in vae.parameters()])


@pytest.mark.parametrize("call", [_trained, lambda: _defend(_vae().eval())], ids=["fit", "defend"])
@pytest.mark.parametrize(
    "handler",
    [
        lambda: pyro.plate("data", 3),
        lambda: pyro.plate("mine", 2),
        lambda: poutine.scale(scale=0.1),
        lambda: poutine.mask(mask=False),
        lambda: poutine.seed(rng_seed=3),
        lambda: poutine.block(),
        lambda: poutine.trace(),
    ],
    ids=["data", "mine", "scale", "mask", "seed", "block", "trace"],
)
def test_handlers_of_the_caller_change_nothing(call, handler):
    torch.manual_seed(0)
    expected = call()
    torch.manual_seed(0)
    with handler():
        torch.manual_seed(0)
        assert torch.equal(call(), expected)


class Sampled(PyroModule):
    """Draws a value, which Pyro keeps while a call of the module is under way."""

    def __init__(self):
        super().__init__()
        self.noise = PyroSample(lambda self: dist.Normal(0.0, 1.0))


def test_a_cut_call_of_a_pyro_module_keeps_no_samples():
    module = Sampled()

    @boundary.public
    def cut():
        boundary.note([module])
        module._pyro_context.__enter__()
        assert module.noise == module.noise
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut()
    assert module._pyro_context.active == 0
    assert module._pyro_context.cache == {}


# --- Pickling, memory, threads --------------------------------------------------------------------


def _sample(vae):
    kernel = mcmc.BatchedHMC(vae.eval().model, generator=_generator())
    run = infer.MCMC(kernel, num_samples=1, warmup_steps=1, disable_progbar=True)
    run.run(_images())
    return run.get_samples()["z"]


USES = {"defend": _defend, "attack": _attack, "encode": _encode, "sample": _sample}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_users_module_can_be_stored_after_use(use):
    vae = _vae()
    expected = use(vae)
    again = pickle.loads(pickle.dumps(vae))
    stored = io.BytesIO()
    torch.save(vae, stored)
    again.load_state_dict(vae.state_dict())
    assert torch.equal(use(again), expected)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_a_trace_of_the_caller_holds_stays_usable(use):
    vae = _vae()
    with poutine.trace(param_only=True) as captured:
        vae.guide(_images())
    use(vae)
    sites = list(captured.trace.nodes.values())
    assert len(sites) == 4
    assert all(site["value"].unconstrained() is site["value"] for site in sites)


def test_a_vae_can_be_stored_while_it_is_trained_and_afterwards():
    vae, stored = _vae(), []
    pyro.clear_param_store()
    config = training.FitConfig(epochs=2, schedule="constant", progress=False)
    training.fit(
        vae,
        TraceMeanField_ELBO(),
        [_images()],
        config,
        on_epoch=lambda entry: stored.append(pickle.dumps(vae)),
    )
    stored.append(pickle.dumps(vae))
    assert len(stored) == 3
    last = pickle.loads(stored[-1])
    assert all(map(torch.equal, last.state_dict().values(), vae.state_dict().values()))


def test_networks_that_are_gone_leave_pyros_store():
    x = torch.rand(1, 1, 28, 28, generator=_generator())
    gone, sizes = [], []
    for _ in range(4):
        vae = ConvVAE().eval()
        program.encode(vae, x)
        copied = pickle.loads(pickle.dumps(vae))
        defence.NoDefence(copied)(x)
        names = [name for name in pyro.get_param_store() if vae.scope in name]
        assert names
        gone.append(weakref.ref(next(vae.parameters())))
        sizes.append(len(pyro.get_param_store()))
        del vae, copied
        gc.collect()
    assert len(set(sizes)) == 1
    assert [parameter() is None for parameter in gone] == [True, True, True, False]


def test_calls_and_training_in_threads_give_what_they_give_alone():
    vae, other, x = _vae(), _vae(), _images()
    small = torch.rand(2, 1, 28, 28, generator=_generator())
    # The seed of the process is set and used under one lock.
    seeded = boundary.public(_fit)
    jobs = [
        lambda: _defend(vae),
        lambda: _attack(vae),
        lambda: seeded(other),
        lambda: metrics.nll(other, x, num_samples=2, generator=_generator()),
        lambda: metrics.ms_ssim(small, small.flip(3), variant="paper"),
    ]
    expected, found = [job() for job in jobs], {}

    def run(number):
        order = jobs if number else jobs[::-1]
        found[number] = [[job() for job in order] for _ in range(3)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, rounds in found.items():
        for results in rounds:
            for result, right in zip(results, expected if number else expected[::-1], strict=True):
                assert torch.equal(result, right)
    assert len(found) == 2


class _Threaded:
    """Batches that a thread makes with public calls while they are waited for."""

    def __init__(self, work):
        self.work, self.done = work, []

    def __iter__(self):
        for _ in range(2):
            thread = threading.Thread(target=lambda: self.done.append(self.work()), daemon=True)
            thread.start()
            thread.join(20)
            yield _images()


@pytest.mark.parametrize("reads", ["fit", "evaluate", "mean_posterior_variance"])
def test_batches_may_be_made_by_a_thread_that_defends(reads):
    vae, guard = _vae(), defence.NoDefence(_vae())
    expected = guard(_images(), _generator()).reconstruction
    loader = _Threaded(lambda: guard(_images(), _generator()).reconstruction)
    before, met = _state(vae), []

    def on_epoch(entry):
        thread = threading.Thread(target=lambda: met.append(loader.work()), daemon=True)
        thread.start()
        thread.join(20)

    def call(batches):
        torch.manual_seed(0)
        vae = _vae()
        vae.mean_posterior_variance = None
        if reads == "mean_posterior_variance":
            return program.mean_posterior_variance(vae, batches)["z"]
        if reads == "evaluate":
            return torch.tensor(training.evaluate(vae, TraceMeanField_ELBO(), batches))
        vae.name = f"fitted{next(_numbers)}"
        config = training.FitConfig(epochs=1, schedule="constant", progress=False)
        objective = TraceMeanField_ELBO()
        options = {"validation": batches, "on_epoch": on_epoch}
        training.fit(vae, objective, batches, config, **options)
        return torch.cat([parameter.detach().flatten() for parameter in vae.parameters()])

    found = call(loader)
    # A look at the first batch, an epoch, its loss twice, and the variance: each time the thread
    # has ended in between.
    times = {"fit": 9, "evaluate": 2, "mean_posterior_variance": 2}[reads]
    assert len(loader.done) == times
    assert len(met) == (reads == "fit")
    assert all(torch.equal(done, expected) for done in loader.done + met)
    assert torch.equal(found, call([_images(), _images()]))
    assert _state(vae) == before
    assert not boundary._lock._is_owned()
    assert boundary._begun is None


def test_ctrl_c_in_a_pause_ends_the_call_that_paused():
    def cut():
        raise KeyboardInterrupt
        yield

    vae = _vae().eval()
    expected, before = _encode(vae), _state(vae)

    def call():
        program.mean_posterior_variance(vae, [_images()])

    with pytest.raises(KeyboardInterrupt):
        program.mean_posterior_variance(vae, cut())
    total = _interrupted(call, 0, (boundary.__file__,))
    assert total > 20
    for at in range(1, total + 1):
        _interrupted(call, at, (boundary.__file__,))
        assert torch.equal(_encode(vae), expected), at
        assert not boundary._lock._is_owned()
        assert _state(vae) == before, at
