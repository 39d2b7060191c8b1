"""What a public call takes of its caller's context, and what it leaves behind.

It takes images, grad mode and a generator, nothing else. A serving process calls from
:func:`torch.inference_mode`, from :func:`torch.autocast`, and from several threads; images may have
been made in inference mode. Chains and attacks differentiate, their energies are sums over pixels
that need the precision of the images, and Pyro's stack of handlers, its parameter store and the
train mode of networks are one for the whole process. So a public call runs

- outside inference mode, on ordinary copies of tensors that were made in it; what it returns has no
  gradient there, as under :func:`torch.no_grad`;
- without autocast, in the dtype of the images;
- outside of the caller's Pyro handlers and plates, which would change programs, and see nothing;
- one at a time: calls from other threads wait. What reads a caller's batches lets them run while
  it fetches one, which may need them in a thread of its own, and training also between epochs;
- given a ``generator``, with torch's global generators seeded by it, and as they were afterwards.
  What is not drawn from random streams, the noise of Pyro's kernels, of families that are not
  transformed Gaussians, of a user's own programs, is then repeated with all the rest.

It leaves the process as it was, however it ends. An interrupt (Ctrl-C) may come at any line, also
while Pyro enters a plate or a network's mode is being set, so that no ``finally`` of theirs runs.
Where the outermost public call ends, Pyro's handlers, plates and validation and torch's grad mode
are what they were where it began. If it has failed, so are the modes of its networks: those among
its arguments, and those that are :func:`noted <note>` before their mode changes. They can be
pickled afterwards, and so can others of the same names: what Pyro's store hangs on parameters, a
weak reference, is taken off where it was not before.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import infer, poutine
from pyro.nn import PyroModule
from pyro.poutine import runtime
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")

_DEVICES = ("cpu", "cuda")
_VALIDATING = (dist, infer, poutine)
_END: Any = object()
_lock = threading.RLock()
_begun: _Begun | None = None  # the outermost public call under way, or one that was cut off
_kept: dict[Any, Any] | None = None  # what is known between calls, while they are `remembering`


def _renew() -> None:
    """A child that is forked while another thread holds the lock would wait forever."""
    global _lock, _begun
    _lock, _begun = threading.RLock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def public(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function, but no generator, a public call as the module's text describes it.

    A function that is given a ``generator`` must draw from it: what torch's global seed governs
    follows from the generator's state, and a second call would repeat it.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _lock._is_owned():  # type: ignore[attr-defined]
            run = _outermost
        elif _begun is None:  # an interrupt came between the end of a call and this
            _lock.release()
            run = _outermost
        else:
            run = _inside
        with _lock:
            return run(function, args, kwargs)

    return cast("Callable[P, T]", call)


def uncast(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function run without ``torch.autocast``, as public calls do, whoever calls it.

    For what they call in their inner loops, and callers by themselves: it waits for nobody, since
    autograd may call it in a thread of its own.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        casting = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
        if not casting:
            return function(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            for device in casting:
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return call


def nested() -> bool:
    """Whether the public call that asks was made inside another, as metrics are by attacks.

    What an outermost call checks of its arguments at the cost of a look at the device is left to
    the call around it.
    """
    return _lock._is_owned() and _begun is not None and _begun.depth > 1  # type: ignore[attr-defined]


def known() -> dict[Any, Any]:
    """What has been found out in the outermost public call under way, and is not asked again there.

    But in :func:`remembering`, it is forgotten where that call ends, and outside of one it is a new
    dictionary each time.
    """
    if _begun is None or not _lock._is_owned():  # type: ignore[attr-defined]
        return {} if _kept is None else _kept
    return _begun.known


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """What is done inside knows what earlier public calls have found.

    For studies, whose programs nobody changes but by training or loading their networks.
    """
    global _kept
    before, _kept = _kept, {} if _kept is None else _kept
    try:
        yield
    finally:
        _kept = before


class Pause:
    """``with pause:`` lets other threads' public calls run, for what is a caller's own.

    They leave Pyro's handlers and everything else as they find it. It is of the public call that
    makes it, and does nothing unless that is an outermost one. No generator, whose ``finally``
    could come after the call when an interrupt cuts it off.
    """

    def __init__(self) -> None:
        self._begun = None if _begun is None or nested() else _begun

    def __enter__(self) -> None:
        global _begun
        if self._begun is not None:
            _begun = None
            self._begun.lock.release()

    def __exit__(self, *error: object) -> None:
        if self._begun is not None:
            self._begun.go_on()


def fetched(batches: Iterable[T], pause: Pause) -> Iterator[T]:
    """``batches``, where other threads may run while one is waited for."""
    with pause:
        following = iter(batches)
    while True:
        with pause:
            batch = next(following, _END)
        if batch is _END:
            return
        yield batch


def note(modules: Iterable[nn.Module]) -> None:
    """Remember the modes of networks before they change, for a call that fails."""
    if _begun is not None and _lock._is_owned():  # type: ignore[attr-defined]
        for module in modules:
            if module not in _begun.modes:
                _begun.referenced |= referenced([module])
                context = module._pyro_context if isinstance(module, PyroModule) else None
                _begun.modes[module] = module.training, getattr(context, "active", 0)


def drop_references(modules: Iterable[nn.Module], but: Container[Tensor] = ()) -> None:
    """Take off what Pyro's store hangs on parameters at each use, a weak reference.

    It is in the way of pickling and of ``torch.save``. Pyro looks at it right after each use only;
    a caller may look at it in a trace of his own, so the parameters in ``but`` keep it.
    """
    _drop(referenced(modules), but)


def _drop(parameters: Iterable[Tensor], but: Container[Tensor]) -> None:
    for parameter in parameters:
        if parameter not in but:
            del vars(parameter)["unconstrained"]


def referenced(modules: Iterable[nn.Module]) -> set[Tensor]:
    """The parameters that have such a reference."""
    return {
        parameter
        for module in modules
        for parameter in vars(module).get("_parameters", {}).values()
        if _has(parameter)
    }


def _stored() -> set[Tensor]:
    """Those of Pyro's store, which other networks of the same names use as well."""
    return {tensor for tensor in pyro.get_param_store()._params.values() if _has(tensor)}


def _has(parameter: Tensor | None) -> bool:
    return parameter is not None and "unconstrained" in vars(parameter)


def ordinary(value: Any) -> Any:
    """``value`` with copies of the tensors made in inference mode, which cannot be saved."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) in (tuple, list):
        return type(value)(map(ordinary, value))
    # Anything else, such as a dict of a chain's latents, keeps its identity unless it has to go.
    if type(value) is dict and any(
        isinstance(v, Tensor) and v.is_inference() for v in value.values()
    ):
        return {name: ordinary(entry) for name, entry in value.items()}
    return value


class _Begun:
    """What an outermost call found, and the networks it has come across since."""

    def __init__(self) -> None:
        self.lock = _lock
        self.handlers = list(runtime._PYRO_STACK)
        self.plates = list(runtime._DIM_ALLOCATOR._stack)
        self.validation = [place.is_validation_enabled() for place in _VALIDATING]
        self.grad = torch.is_grad_enabled()
        # Whether a network trains, and how many calls of a PyroModule are under way.
        self.modes: dict[nn.Module, tuple[bool, int]] = {}
        self.referenced = _stored()  # parameters with a reference of Pyro's store
        self.known: dict[Any, Any] = {} if _kept is None else _kept
        self.failed = True
        self.depth = 0  # public calls inside each other

    def go_on(self) -> None:
        """Be the call under way again, after a pause or an interrupt of one."""
        global _begun
        if not self.lock._is_owned():  # type: ignore[attr-defined]
            self.lock.acquire()
        if _begun is not None and _begun is not self:
            _begun.end()  # a call in the pause, interrupted while it ended
        _begun = self

    def end(self) -> None:
        """Put things back; to do it twice does no harm."""
        runtime._PYRO_STACK[:] = self.handlers
        runtime._DIM_ALLOCATOR._stack[:] = self.plates
        for place, enabled in zip(_VALIDATING, self.validation, strict=True):
            if place.is_validation_enabled() != enabled:
                place.enable_validation(enabled)
        if torch.is_grad_enabled() != self.grad:
            torch.set_grad_enabled(self.grad)
        if not self.handlers:  # a handler such as that of SVI.step may want them still
            drop_references(self.modes, self.referenced)
            _drop(_stored(), self.referenced)
        if self.failed:
            for module, (training, active) in self.modes.items():
                module.training = training
                # A call that seems to be under way would keep the values of PyroSample.
                if isinstance(module, PyroModule) and module._pyro_context.active > active:
                    module._pyro_context.active = active
                    module._pyro_context.cache.clear()


def _outermost(function: Callable[..., T], args: Sequence[Any], kwargs: Mapping[str, Any]) -> T:
    global _begun
    if _begun is not None:
        _begun.end()  # interrupted while it ended
    _begun = begun = _Begun()
    try:
        runtime._PYRO_STACK.clear()
        runtime._DIM_ALLOCATOR._stack.clear()
        for value in args:
            if isinstance(value, nn.Module):
                note(value.modules())
        result = _inside(function, args, kwargs)
        begun.failed = False
        return result
    except BaseException as error:
        _end_contexts(error)
        raise
    finally:
        begun.go_on()
        begun.end()
        _begun = None


def _end_contexts(error: BaseException) -> None:
    """End contexts that are generators and were cut off on their way out, such as Pyro's validation
    and torch's forks of its generators. Else they end, and put back what they have found, whenever
    the error is dropped: by then that is out of date."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == contextlib.contextmanager.__code__.co_filename:
            frame.clear()


@uncast
def _inside(function: Callable[..., T], args: Sequence[Any], kwargs: Mapping[str, Any]) -> T:
    inference = torch.is_inference_mode_enabled()
    generators = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Generator)]
    if not (inference or generators):
        return _call(function, args, kwargs)
    with contextlib.ExitStack() as stack:
        if inference:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # leaving inference mode turned it on
        for generator in generators:
            stack.enter_context(governed(generator))
        return _call(function, args, kwargs)


@contextlib.contextmanager
def governed(generator: torch.Generator) -> Iterator[None]:
    """torch's global generators seeded by what ``generator`` would draw next; it draws nothing."""
    everywhere = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    places = [(place, place.get_state()) for place in (torch.default_generator, *everywhere)]
    if any(generator is place for place, _ in places):
        yield
        return
    following = torch.Generator(generator.device)
    following.set_state(generator.get_state())
    seed = int(torch.randint(2**62, (), generator=following, device=generator.device))
    try:
        for place, _ in places:
            place.manual_seed(seed)
        yield
    finally:
        for place, state in places:
            place.set_state(state)


def _call(function: Callable[..., T], args: Sequence[Any], kwargs: Mapping[str, Any]) -> T:
    begun = _begun
    assert begun is not None
    begun.depth += 1
    try:
        return function(*map(ordinary, args), **{name: ordinary(v) for name, v in kwargs.items()})
    finally:
        begun.depth -= 1
