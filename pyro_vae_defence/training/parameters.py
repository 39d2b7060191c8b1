"""Which parameters a VAE's programs train, from when on, and what a checkpoint calls them.

As for ``pyro.infer.SVI`` the programs say it themselves, by ``pyro.param`` and ``pyro.module``
while they run, be it late: a branch may be taken after some epochs, and a module be made then.
Tensors of the VAE's modules are known by their path, ``"decoder.0.weight"``, since names in Pyro's
store may differ between instances; others by their name there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae_defence.models.modules import modules_of, networks_of
from pyro_vae_defence.models.sites import KeepFrozen
from pyro_vae_defence.training import parallel
from pyro_vae_defence.types import VAE

_AVERAGE = "__baseline_avg_downstream_cost_"
"""How names of decaying average baselines begin, by which ``TraceGraph_ELBO`` keeps them in Pyro's
store. Each step puts another tensor there, and no gradient leads to it."""


class Parameters(KeepFrozen):
    """A handler that takes note of the parameters that programs register under it.

    Attributes:
        trained: path or name -> unconstrained tensor, each once, in the order of a step.
        networks: path -> outermost module of the VAE.
    """

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae
        self.trained: dict[str, Tensor] = {}
        self._registered: dict[str, Tensor] = {}  # by names in Pyro's store
        self._new: dict[str, Tensor] = {}
        self._restored: dict[str, Tensor] = {}  # of a checkpoint, until a program registers them
        self._averages: dict[str, Tensor] = {}  # of a checkpoint
        self._said = False  # that these do not fit the programs
        self._order: dict[str, int] = {}
        self.look()

    def look(self) -> None:
        """See which modules there are now."""
        self.networks = networks_of(self.vae)
        self._paths: dict[Tensor, str] = {}
        for prefix, network in self.networks.items():
            for name, parameter in network.named_parameters(prefix):
                self._paths.setdefault(parameter, name)
        registered = {id(tensor) for tensor in self._registered.values()}
        self._unregistered = {n: p for p, n in self._paths.items() if id(p) not in registered}
        self._num_modules = len(modules_of(self.vae))

    # --- While programs run ---

    def __enter__(self) -> Parameters:
        # What has a gradient afterwards has it from these programs, registered or not. What they
        # make meanwhile they may register when they run again.
        self._watched = self._unregistered
        for tensors in (self.trained, self._registered, self._unregistered):
            for tensor in tensors.values():
                tensor.grad = None
        super().__enter__()
        return self

    def _pyro_post_param(self, msg: Any) -> None:
        super()._pyro_post_param(msg)
        name, value = msg["name"], msg["value"]
        if name.startswith(_AVERAGE):
            return  # not trained
        tensor = value.unconstrained() if hasattr(value, "unconstrained") else value
        known = self._registered.get(name)
        if known is tensor:
            return
        # A PyroModule wraps what it has made just now, an autoguide's locations, as its Parameter.
        wrapped = name in self._new and isinstance(tensor, nn.Parameter)
        if known is not None and not (wrapped and known.data_ptr() == tensor.data_ptr()):
            raise ValueError(
                f"parameter {name!r} has become another tensor, which would not be trained; do not "
                "clear Pyro's parameter store or replace parameters while fit runs"
            )
        if tensor not in self._paths:
            self.look()  # its module may have been made just now
        tensor.grad = None
        store = pyro.get_param_store()
        restored = self._restored.pop(self._key(name, tensor), None)
        if restored is not None:
            if restored.shape != tensor.shape:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(tensor.shape)}, in the checkpoint "
                    f"{tuple(restored.shape)}; it belongs to another architecture"
                )
            restored.data = restored.data.to(tensor)
            tensor = restored
            store.set_state({"params": {name: tensor}, "constraints": {}})
            msg["value"] = store[name]
        elif parallel.world_size() > 1:
            parallel.broadcast([tensor])
            if name in store:
                msg["value"] = store[name]
        self._registered[name] = self._new[name] = tensor

    def _key(self, name: str, tensor: Tensor) -> str:
        if tensor in self._paths:
            return self._paths[tensor]
        while name in self._paths.values():
            name += "'"
        return name

    # --- After they have run ---

    def take_new(self) -> bool:
        """Take up what was registered since the last call; whether there was anything.

        Raises:
            ValueError: as :meth:`check`, before anything is taken up.
        """
        self.check()
        if self._new or len(modules_of(self.vae)) != self._num_modules:
            self.look()
        known = {id(tensor) for tensor in self.trained.values()}
        fresh = {self._key(name, t): t for name, t in self._new.items() if id(t) not in known}
        self._new = {}
        self._add(fresh)
        return bool(fresh)

    def _add(self, tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            self._order.setdefault(key, len(self._order))
        together = self.trained | tensors
        self.trained = {key: together[key] for key in sorted(together, key=self._order.__getitem__)}

    def check(self) -> None:
        """Refuse parameters of modules that have a gradient but that Pyro does not know.

        Raises:
            ValueError: with their names and what is to be done.
        """
        used = {name: p for name, p in self._watched.items() if p.grad is not None}
        registered = {id(tensor) for tensor in self._registered.values()} if used else set()
        missing = {name: p for name, p in used.items() if id(p) not in registered}
        if not missing:
            return
        mends = []
        ends = {name.rpartition(".")[2] for name in missing}
        strangers = [n for n, t in self._registered.items() if t not in self._paths]
        if taken := [n for n in strangers if n.replace("$$$", ".").rpartition(".")[2] in ends]:
            mends.append(
                f"Pyro's parameter store is global and holds other tensors by the names {taken}: "
                "call pyro.clear_param_store() first if another VAE of this process has used them, "
                "or give each VAE names of its own"
            )
        if not all(parameter.is_contiguous() for parameter in missing.values()):
            mends.append("keep parameters contiguous (Pyro's parameter store copies others)")
        modules = [m for network in self.networks.values() for m in network.modules()]
        owners = {id(p): m for m in modules for p in m.parameters(recurse=False)}
        if any(isinstance(owners.get(id(p)), PyroModule) for p in missing.values()):
            mends.append(
                "decorate the programs with pyro.nn.pyro_method: a PyroModule registers what is "
                "its own in forward and in methods so decorated"
            )
        if not mends:
            mends.append("call pyro.module(...) on their modules inside the programs")
        raise ValueError(
            f"parameters {list(missing)} would not be trained: they have a gradient, but model and "
            f"guide do not register these very tensors; {'; '.join(mends)}"
        )

    def warn_unused(self) -> None:
        """Say which parameters of a checkpoint no program has registered in this process."""
        if self._restored and not self._said:
            warnings.warn(
                f"the programs have not used {sorted(self._restored)} since training was resumed: "
                "the checkpoint has the values of these parameters, Pyro's parameter store has not",
                UserWarning,
                stacklevel=2,
            )

    # --- Checkpoints ---

    def weights(self) -> dict[str, Any]:
        """The state of all modules, and the parameters that belong to none."""
        self.look()
        state: dict[str, Any] = {}
        for prefix, network in self.networks.items():
            state |= network.state_dict(prefix=_dotted(prefix))
        loose = self._loose() | _averages()
        return state | {key: tensor.detach() for key, tensor in loose.items()}

    def of_no_module(self) -> list[str]:
        """Names of the parameters that belong to no module, and of average baselines."""
        return [*self._loose(), *_averages()]

    def _loose(self) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in self.trained.items() if tensor not in self._paths}

    def load_modules(self, weights: Mapping[str, Any], strict: bool) -> set[str]:
        """Load the state of the modules there are; names of what none of them has.

        Raises:
            ValueError: if something does not fit or, when ``strict``, is not in ``weights``.
        """
        self.look()
        left = set(weights)
        for prefix, network in self.networks.items():
            start = _dotted(prefix)
            names = network.state_dict(prefix=start).keys() & weights.keys()
            left -= names
            try:
                state = {name[len(start) :]: weights[name] for name in names}
                network.load_state_dict(state, strict)
            except RuntimeError as error:
                raise ValueError(str(error)) from error
        return left

    def expect(self, order: Iterable[str], loose: Mapping[str, Tensor]) -> None:
        """Take up a checkpoint's parameters of no module, which programs are to register, and its
        average baselines.

        Args:
            order: names of all its parameters.
            loose: values of these.
        """
        self._order = {key: position for position, key in enumerate(order)}
        self._averages = {n: value for n, value in loose.items() if n.startswith(_AVERAGE)}
        self._restored = {
            key: value.clone().requires_grad_()
            for key, value in loose.items()
            if key not in self._averages
        }
        self._add(self._restored)

    def settle(self, before: set[str]) -> None:
        """Compare a checkpoint's parameters with what a first run of the programs registered.

        Average baselines, which that run has moved, are then those of the checkpoint.

        What they registered too early, since the checkpoint was written before it was reached,
        goes, so that it is initialised when it is due.

        Args:
            before: names in Pyro's store before that run.

        Raises:
            ValueError: if the VAE has nothing that the checkpoint holds.
        """
        self.look()
        self.check()
        paths = {path: tensor for tensor, path in self._paths.items()}
        early = [
            name
            for name, tensor in self._new.items()
            if tensor not in self._paths and self._key(name, tensor) not in self._order
        ]
        if early and self._restored:
            differ = f"it holds {sorted(self._restored)}, the programs have {early}"
            if not self._order.keys() & (paths.keys() | {self._key(*i) for i in self._new.items()}):
                raise ValueError(differ)
            warnings.warn(
                f"the checkpoint is of a step with other parameters: {differ}; start anew unless "
                "one takes the place of the other now",
                UserWarning,
                stacklevel=2,
            )
            self._said = True
        for name in early:
            del self._registered[name], self._new[name]
            if name not in before:
                del pyro.get_param_store()[name]
        self._add({key: paths[key] for key in self._order if key in paths})
        for name, value in self._averages.items():
            pyro.get_param_store()[name] = value.clone()


def _averages() -> dict[str, Tensor]:
    """Average baselines as they are now, by their names in Pyro's store."""
    store = pyro.get_param_store().items()
    return {name: value for name, value in store if name.startswith(_AVERAGE)}


def _dotted(prefix: str) -> str:
    return f"{prefix}." if prefix else ""
