"""Results of a defence on a whole dataset, written as they come into a Zarr store.

Images are defended a *chunk* at a time, and a chunk of images is one Zarr chunk of every array. So
memory does not depend on how many images there are, the processes of ``torchrun`` write to one
store without knowing of each other, and what is lost with a killed process is its last chunk.

**What is finished.** The store is ``PATH.partial`` until it is whole; it is renamed at the end, so
that nobody reads the fill values of chunks that are not there. A file in its ``.finished`` marks a
chunk all of whose arrays have reached the disk. A chunk without it is made anew, whatever there is.

**What belongs together.** Attributes of the root group say what the results are of: settings, seed,
number of images, versions, and hashes of the defence with its networks and of some of the images. A
store is only continued by the very same; the mark of a chunk holds a hash of all of its images,
which are read again then. A finished store holds a hash of each image, and is compared with all.

The format is Zarr 2, which all of its libraries read, with the conventions of xarray; groups and
names are those of :mod:`pyro_vae_defence.diagnostics`. Reference: https://zarr-specs.readthedocs.io.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import glob
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm.auto import tqdm

import pyro_vae_defence
from pyro_vae_defence.defence.result import DefenceResult
from pyro_vae_defence.models.modules import networks_of
from pyro_vae_defence.ops.files import check_writable, locating, write_atomically
from pyro_vae_defence.ops.locks import sole_writer
from pyro_vae_defence.ops.ranks import Claims

if TYPE_CHECKING:
    import xarray

_FINISHED, _NEW = ".finished", ".new"
_HASH = "image_hash"  # of each image, beside the results
_POLL = 0.1  # seconds between looks at what another process is to make
_PATIENCE = 60.0  # seconds until files of another machine must be seen

Chunk = Callable[[Any, int], DefenceResult]
"""A batch of the dataset, and the number of its first image, to what the defence makes of it."""


def check_dataset(dataset: Any) -> int:
    """The number of images of a dataset.

    Raises:
        ValueError: if it has no length or no items, or is empty.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"dataset must have a length and items by number, got {type(dataset).__name__}; "
            "defence.stream() takes any iterable of batches"
        )
    if not (length := len(dataset)):
        raise ValueError("dataset is empty; it must hold at least one image")
    return length


def check_zarr() -> None:
    """Raise ``ImportError`` with what to install, if Zarr is missing."""
    if importlib.util.find_spec("zarr") is None:
        raise ImportError(
            "to_zarr needs Zarr, which is not installed; run pip install 'pyro-vae-defence[zarr]'"
        )


def write(
    path: str | os.PathLike[str],
    dataset: Any,
    chunk_size: int,
    defend: Chunk,
    identity: Mapping[str, Any],
    observed_data: bool,
    progress: bool,
) -> Path:
    """Defend what a store does not hold yet; see the module.

    Args:
        path: of the store; a directory.
        dataset: items by number, images or tuples that start with them.
        chunk_size: images per chunk, >= 1.
        defend: the defence of a chunk.
        identity: what the results depend on beside the images; JSON.
        observed_data: whether to write the images, too.
        progress: show a progress bar over chunks.

    Raises:
        ValueError: if there is something else at ``path``, it cannot be written, or another process
            that is none of torchrun's is writing it.
    """
    path = Path(path).absolute()
    length = check_dataset(dataset)
    chunk_size = min(chunk_size, length)
    some = [dataset[number] for number in sorted({0, length // 2, length - 1})]
    identity = {
        **json.loads(json.dumps(identity)),
        "num_images": length,
        "chunk_size": chunk_size,
        "observed_data": observed_data,
        "images_hash": fingerprint(some),
        "inference_library": "pyro_vae_defence",
        "inference_library_version": pyro_vae_defence.__version__,
        "torch": metadata.version("torch"),
    }
    store = _Store(path, identity)
    if path.exists():
        store.check(path)
        store.check_every_image(dataset)
        shutil.rmtree(path / _FINISHED, ignore_errors=True)
        return path
    if store.partial.exists():
        store.check(store.partial)
    try:
        check_writable(path)
    except OSError as error:
        raise ValueError(f"path={str(path)!r} cannot be written: {error}") from error
    total = -(-length // chunk_size)
    with Claims(f"store {path}") as claims, contextlib.ExitStack() as stack:
        claims.agree(json.dumps(identity, sort_keys=True))
        if claims.rank == 0:
            stack.enter_context(sole_writer(path))
        stack.enter_context(locating(store.partial))
        hidden = claims.rank > 0 or not progress
        with tqdm(total=total, unit="chunk", disable=hidden, leave=False) as bar:

            def show() -> None:
                bar.n = store.num_finished()
                bar.refresh()

            for number in claims.order(total):
                if not claims.claim(number):
                    continue
                first = number * chunk_size
                rows = range(first, min(first + chunk_size, length))
                images = [dataset[row] for row in rows]
                if store.is_finished(number):
                    store.check_images(number, first, images)
                    continue
                result = defend(default_collate(images), first)
                groups = _groups(result, images, observed_data)
                if not store.partial.exists() and claims.claim("store"):
                    store.create(groups, length, chunk_size)
                for _ in claims.waiting(store.partial.exists):
                    pass
                store.put(groups, number, first, fingerprint(images))
                show()
            claims.leave()
            for _ in claims.waiting():
                show()
        if claims.rank == 0:
            for number in range(total):
                _wait_for(store.partial / _FINISHED / str(number))
            store.close()
        for _ in claims.waiting(path.exists):
            pass
    return path


class _Store:
    """A store on its way: ``PATH.partial``, with marks of what is finished."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.partial = path.with_name(f"{path.name}.partial")
        self._checked = False

    def check(self, place: Path) -> None:
        """Raise ``ValueError`` if something else is there than this store."""
        try:
            found = json.loads((place / ".zattrs").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{place} is no store of to_zarr; choose another path") from error
        was, now = _flat(found), _flat(self.identity)
        # Hashes last: they say least.
        for name in sorted({**now, **was}, key=lambda name: name.endswith("_hash")):
            if was.get(name) != now.get(name):
                raise ValueError(
                    f"{place} holds another run: its {name} is {was.get(name)!r}, now it is "
                    f"{now.get(name)!r}; delete it, or choose another path"
                )
        self._checked = True

    def mark(self, number: int) -> Path:
        """Of a finished chunk; it holds a hash of the chunk's images."""
        return self.partial / _FINISHED / str(number)

    def is_finished(self, number: int) -> bool:
        return self.mark(number).exists()

    def check_images(self, number: int, first: int, images: Sequence[Any]) -> None:
        """Raise ``ValueError`` if a finished chunk is of other images."""
        if self.mark(number).read_text() != fingerprint(images):
            raise ValueError(
                f"{self.partial} holds results of other images: some of dataset[{first}] to "
                f"dataset[{first + len(images) - 1}] have changed; the dataset must give the same "
                "every time. Delete the store, or choose another path"
            )

    def check_every_image(self, dataset: Any) -> None:
        """Raise ``ValueError`` if the finished store is of other images."""
        import zarr

        arrays: Any = zarr.open_group(str(self.path), mode="r")["defence"]
        if _HASH not in arrays:  # of an earlier version
            return
        for number, found in enumerate(arrays[_HASH][:].tolist()):
            if found != _hash(dataset[number]):
                raise ValueError(
                    f"{self.path} holds results of other images: dataset[{number}] has changed; "
                    "the dataset must give the same every time. Delete the store, or choose "
                    "another path"
                )

    def num_finished(self) -> int:
        return len(list((self.partial / _FINISHED).glob("[0-9]*")))

    def create(self, groups: Mapping[str, xarray.Dataset], length: int, chunk_size: int) -> None:
        """All groups and arrays with nothing in them but coordinates, at once or not at all."""
        import zarr

        version: dict[str, Any] = {"zarr_format": 2} if int(zarr.__version__[0]) > 2 else {}
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        # No mkdtemp, whose directories are their owner's alone whatever the umask.
        new = self.partial.with_name(f".{self.path.name}.{secrets.token_hex(8)}{_NEW}")
        new.mkdir()
        place = str(new)
        import xarray

        try:
            root = xarray.Dataset(attrs=dict(self.identity))
            root.to_zarr(place, mode="w", consolidated=False, **version)
            for name, group in groups.items():
                encoding = {
                    variable: {"chunks": tuple(_sizes(values, chunk_size))}
                    for variable, values in group.data_vars.items()
                }
                encoding["image"] = {"chunks": (length,)}
                group.isel(image=slice(0)).to_zarr(
                    place, group=name, mode="a", encoding=encoding, consolidated=False, **version
                )
            arrays: Any = zarr.open_group(place, mode="r+")
            for name, group in groups.items():
                for variable, values in {**group.data_vars, "image": group["image"]}.items():
                    arrays[f"{name}/{variable}"].resize(tuple(_sizes(values, length)))
                arrays[f"{name}/image"][:] = np.arange(length)
            zarr.consolidate_metadata(place)
            (new / _FINISHED).mkdir()
            new.rename(self.partial)
        finally:  # where it did not get its name
            shutil.rmtree(new, ignore_errors=True)

    def put(
        self, groups: Mapping[str, xarray.Dataset], number: int, first: int, images_hash: str
    ) -> None:
        """Write a chunk, and when it has reached the disk its mark."""
        if not self._checked:
            self.check(self.partial)
        if not (self.partial / "defence" / _HASH).exists():  # begun by an earlier version
            groups = {**groups, "defence": groups["defence"].drop_vars(_HASH)}
        for name, group in groups.items():
            # Fill values are written, too: what a library makes of a missing chunk is its affair.
            group.drop_vars(list(group.coords)).to_zarr(
                str(self.partial),
                group=name,
                mode="r+",
                region={"image": slice(first, first + group.sizes["image"])},
                write_empty_chunks=True,
            )
            for variable, values in group.data_vars.items():
                place = (str(number if dim == "image" else 0) for dim in values.dims)
                with (self.partial / name / str(variable) / ".".join(place)).open("rb") as file:
                    os.fsync(file.fileno())
        write_atomically(self.mark(number), images_hash.encode())

    def close(self) -> None:
        """Give the store its name: all chunks are there."""
        self.partial.rename(self.path)
        shutil.rmtree(self.path / _FINISHED)
        for left in self.path.parent.glob(f".{glob.escape(self.path.name)}.*{_NEW}"):
            shutil.rmtree(left)  # of processes that were killed when they began


def _flat(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes with a name for each setting."""
    settings = attributes.get("settings", {})
    return {f"settings.{name}": value for name, value in settings.items()} | {
        name: value for name, value in attributes.items() if name != "settings"
    }


def _groups(
    result: DefenceResult, images: Sequence[Any], observed_data: bool
) -> dict[str, xarray.Dataset]:
    """What is written of some images: ArviZ's groups, and one of what there is once per image."""
    tree = result.to_datatree()
    groups = {name: group.to_dataset() for name, group in tree.children.items()}
    if not observed_data:
        del groups["observed_data"]
    once = {"num_gradients": result.num_gradients, **result.convergence}
    decoded = (("image", "channel", "height", "width"), _to_numpy(result.reconstruction))
    hashes = (("image",), np.array([_hash(image) for image in images], dtype=np.uint64))
    import xarray

    groups["defence"] = xarray.Dataset(
        {
            "reconstruction": decoded,
            **{n: (("image",), _to_numpy(v)) for n, v in once.items()},
            _HASH: hashes,
        },
        {"image": groups["posterior"]["image"]},
    )
    return groups


def _hash(image: Any) -> int:
    """Of an item of the dataset, below 2**64."""
    return int(fingerprint(image), 16)


def _sizes(values: xarray.DataArray, images: int) -> list[int]:
    return [images if dim == "image" else size for dim, size in values.sizes.items()]


def _to_numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _wait_for(path: Path) -> None:
    """Wait for a file that another machine has written.

    Raises:
        ValueError: if it is not there after some time.
    """
    until = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > until:
            raise ValueError(f"{path} is missing; let path be on a disk that all machines share")
        time.sleep(_POLL)


# --- What results are of --------------------------------------------------------------------------


def fingerprint(*values: Any) -> str:
    """A hash of what values hold: numbers, texts, tensors, networks, functions, and what is made of
    these.

    Of other objects it knows the name alone.
    """
    found, seen = hashlib.sha256(), dict[Any, int]()
    for value in values:
        _feed(found.update, value, seen)
    return found.hexdigest()[:16]


def _feed(update: Callable[[bytes], Any], value: Any, seen: dict[Any, int]) -> None:
    def word(*words: Any) -> None:
        update(f"{words!r};".encode())

    def feed(part: Any) -> None:
        _feed(update, part, seen)

    if isinstance(value, np.ndarray):
        try:
            value = torch.as_tensor(np.ascontiguousarray(value))
        except (TypeError, ValueError):  # texts, and what else torch has no numbers for
            word("array", value.dtype.str, value.shape)
            value = value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Tensor):
        word("tensor", str(value.dtype), tuple(value.shape))
        plain = value.detach().cpu().contiguous().reshape(-1)
        update(plain.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, nn.Module) and value in seen:  # which it leads back to
        word("module", seen[value])
    elif isinstance(value, nn.Module):
        seen[value] = len(seen)
        for name, module in value.named_modules():
            # What the mode is, and a name in Pyro's store, differ between equal networks.
            apart = ("training", "scope")
            own = [(k, v) for k, v in vars(module).items() if k not in apart and _is_plain(v)]
            word("module", name, type(module).__qualname__, sorted(own))
            if beside := _beside_weights(module):
                feed(beside)
        feed(dict(value.state_dict()))
        del seen[value]
    elif isinstance(value, functools.partial):
        word("partial")
        feed([value.func, value.args, value.keywords])
    elif isinstance(value, FunctionType) and _package(value) in ("torch", "pyro"):
        word("function", value.__module__, value.__qualname__)  # the code differs between versions
    elif isinstance(value, FunctionType):
        # Functions call themselves and each other, along more ways than can be gone.
        known = value in seen
        word("function", seen.setdefault(value, len(seen)))
        if not known:
            feed(held_by(value))
    elif isinstance(value, Mapping):
        word("mapping", len(value))
        for key, part in value.items():
            feed([key, part])
    elif isinstance(value, (list, tuple)):
        word("sequence", len(value))
        for part in value:
            feed(part)
    elif isinstance(value, (set, frozenset)):
        word("set", sorted(map(fingerprint, value)))  # whose order is another in every process
    elif isinstance(value, enum.Enum):
        word("enum", type(value).__qualname__, value.name)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        word("dataclass", type(value).__qualname__)
        feed({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif value is None or isinstance(value, (*_NUMBERS, str, bytes, *_PLAIN)):
        word(value)
    else:
        word("object", getattr(value, "__qualname__", type(value).__qualname__))


_NUMBERS = (bool, int, float, complex)
_PLAIN = (range, torch.dtype, torch.device)
_SETTINGS = (*_NUMBERS, str, bytes, range, torch.dtype, enum.Enum, np.generic, type(None))
_DATA = (*_SETTINGS, torch.device, np.ndarray, Tensor)


def held_by(function: FunctionType) -> list[Any]:
    """What tells a function from others: its name, what it does, and with what."""
    names, code = function.__globals__, function.__code__
    used = {name: names[name] for name in sorted(_names(code)) if name in names}
    around = {name: value for name, value in used.items() if _counts(value, function)}
    closed = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # of a name that has no value yet
            closed[name] = cell.cell_contents
    given = function.__defaults__, function.__kwdefaults__
    return [function.__qualname__, _words(code), closed, *given, around]


def _counts(value: Any, function: FunctionType) -> bool:
    """Whether a global value is part of what a function is, and not of a library."""
    if isinstance(value, FunctionType):
        return value.__module__ == function.__module__
    is_dataclass = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return is_dataclass or isinstance(value, (nn.Module, functools.partial)) or _is_data(value)


_MOST_DATA = 10_000  # parts of a container, beyond which it is a dataset or a cache, not a setting


def _is_data(value: Any, leaves: tuple[type, ...] = _DATA) -> bool:
    """Whether a value is a number, a text, an array, or a container of such and of such containers,
    of at most so many parts in all; one that holds itself has more."""
    todo, seen = [value], 0
    while todo:
        part = todo.pop()
        if isinstance(part, (dict, list, tuple, set, frozenset)):
            seen += len(part)
            if seen > _MOST_DATA:
                return False
            todo += [*part, *part.values()] if isinstance(part, dict) else part
        elif not isinstance(part, leaves):
            return False
    return True


_OF_EVERY_MODULE = {*vars(nn.Module()), "_compiled_call_impl"}


def _beside_weights(module: nn.Module) -> dict[str, Any]:
    """What a network computes with beside its weights and plain attributes: functions, such as an
    activation, containers of settings, and buffers that it does not store.

    Not tensors among its attributes, which a run may have left there, nor the device. Networks of
    this package hold nothing of the kind that their weights and plain attributes do not tell.
    """
    if _package(type(module)) == "pyro_vae_defence":
        return {}
    held = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
    found = {k: v for k, v in held.items() if callable(v) or _is_data(v, _SETTINGS)}
    found |= {name: getattr(module, name) for name in module._non_persistent_buffers_set}
    return {k: v for k, v in sorted(found.items()) if not _is_plain(v)}


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", None)).partition(".")[0]


def _names(code: CodeType) -> set[str]:
    """Names that code and functions in it ask for, of attributes too."""
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _words(code: CodeType) -> list[Any]:
    """Operations, names and numbers of code, and of functions in it."""
    parts = [_words(part) if isinstance(part, CodeType) else part for part in code.co_consts]
    return [code.co_code, code.co_names, parts]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def weights_fingerprint(vae: Any) -> str:
    """A hash of a VAE's networks, attributes, and of Pyro's parameters, once its programs have run.

    The store also holds parameters of networks, under names with ``$$$``, which come and go.
    """
    own = {} if isinstance(vae, nn.Module) else getattr(vae, "__dict__", {})
    named = {n: v for n, v in pyro.get_param_store().items() if "$$$" not in n}
    return fingerprint(type(vae).__qualname__, networks_of(vae), own, named)
