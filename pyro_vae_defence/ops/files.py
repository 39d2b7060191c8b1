"""Files that are whole or absent: written under a temporary name, then renamed.

What reads a file of others says which one is wrong, in one line (:func:`naming`).
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import pickle
import re
import secrets
import stat
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

_PARTIAL = ".partial"
_LONGEST_REASON = 500


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file for the block to write, which then takes the place of ``path``.

    No reader ever sees half a file, and an error within the block leaves ``path`` as it was.
    Parent directories are made. A file that is there keeps its permissions, a new one has what the
    umask leaves; a symbolic link stays, and what it leads to is replaced. ``OSError`` naming
    ``path`` if it cannot be written.
    """
    path = real_place(path)
    temporary = _new_beside(path)
    try:
        with locating(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locating(path: str | os.PathLike[str]) -> Iterator[None]:
    """An ``OSError`` in the block that names no file, as of a full disk, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def real_place(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a file to be written, wherever symbolic links lead.

    Raises:
        OSError: if a directory is there, or anything else that is no file, such as ``/dev/null``,
            which a file would replace.
    """
    place = Path(os.path.realpath(path))
    if place.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    if place.exists() and not place.is_file():
        raise OSError(f"{path} is no ordinary file, and would be replaced by one; name another")
    return place


def _new_beside(path: Path) -> Path:
    """An empty temporary file in the directory of ``path``, which is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        name = f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}"
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path.with_name(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            os.close(descriptor)
            return path.with_name(name)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | os.PathLike[str], contents: Any, indent: int = 2) -> None:
    """Write ``contents`` as JSON, whole or not at all.

    What has a method ``to_dict`` is written as that; numbers that JSON does not know are null.
    """
    text = json.dumps(as_json(contents), indent=indent, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def as_json(value: Any) -> Any:
    """``value`` as :func:`write_json` writes it."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def atomic_save(contents: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save``, whole or not at all."""
    # An open file: given a path, torch.save would write the temporary name into the archive.
    with atomic_path(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(contents, file)
        except RuntimeError as error:
            # What torch makes of an error of writing, which it met first.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_tensors(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    classes: Sequence[type] = (),
    mmap: bool = False,
) -> Any:
    """Contents of a file of ``torch.save``: tensors, containers, and objects of ``classes``.

    Nothing else is unpickled. ``mmap`` leaves tensors in the file until they are read.

    Raises:
        OSError: the file is missing or cannot be opened.
        ValueError: it is damaged, no such file, or holds anything else.
    """
    with open(path, "rb"):
        pass
    check_archive(path)
    mmap = mmap and zipfile.is_zipfile(path)
    with torch.serialization.safe_globals(list(classes)):
        try:
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        except Exception as error:  # a file that is no checkpoint makes torch raise anything
            if is_out_of_memory(error):
                raise
            raise ValueError(reason(error)) from error


def reason(error: BaseException) -> str:
    """An error in one line, without torch's advice to unpickle whatever a file may hold."""
    text = " ".join(str(error).split())
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:
        found = re.search(r"GLOBAL \S+|Unsupported \w+ \S+", text)
        what = f" ({found[0]})" if found else ""
        return f"it is damaged or holds other things than tensors and containers{what}"
    if len(text) > _LONGEST_REASON:
        text = text[:_LONGEST_REASON] + "..."
    known = isinstance(error, (ValueError, OSError)) and not isinstance(error, UnicodeError)
    return text if known else f"{type(error).__name__}: {text}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, which is no fault of what was read."""
    # On the CPU torch raises a plain RuntimeError.
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


@contextlib.contextmanager
def naming(what: str, mend: str) -> Iterator[None]:
    """Whatever fails in the block, which reads a file, is a ``ValueError`` in one line.

    For files of others, where any damage may raise any error. That memory is short is no such
    failure, and is raised as it is.

    Args:
        what: begins the message, with the file's path: ``"card a.json is damaged"``.
        mend: ends it, unless the file could not even be opened.
    """
    try:
        yield
    except OSError as error:
        # Not the file's fault: nothing is to be deleted.
        raise ValueError(f"{what} ({error})") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{what} ({reason(error)}); {mend}") from error


def check_archive(path: str | os.PathLike[str]) -> None:
    """``ValueError`` if a file of ``torch.save`` fails its checksums, which torch does not check.

    The old format, which is no archive, has none.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise ValueError(f"it is damaged ({error})") from error
    if damaged is not None:
        raise ValueError(f"it is damaged: the checksum of {damaged} does not match")


def remove_partial(path: Path) -> None:
    """Delete the temporary files that killed processes have left beside ``path``."""
    path = real_place(path)
    for name in path.parent.glob(f".{glob.escape(path.name)}.*{_PARTIAL}"):
        name.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """``OSError`` if :func:`atomic_path` could not write ``path``; its directory is made."""
    _new_beside(real_place(path)).unlink()
