"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_PARTIAL = ".partial"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file for the block to write, which then takes the place of ``path``.

    No reader ever sees half a file, and an error within the block leaves ``path`` as it was.
    Parent directories are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(_PARTIAL, f".{path.name}.", path.parent)
    temporary = Path(name)
    os.close(descriptor)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp's files are readable by their owner alone.
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | os.PathLike[str], contents: Any, indent: int = 2) -> None:
    """Write ``contents`` as JSON, whole or not at all.

    What has a method ``to_dict`` is written as that; numbers that JSON does not know are null.
    """
    text = json.dumps(_plain(contents), indent=indent, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def atomic_save(contents: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save``, whole or not at all."""
    # An open file: given a path, torch.save would write the temporary name into the archive.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(contents, file)


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
        raise ValueError(f"{path} is damaged ({error})") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of {damaged} does not match")


def remove_partial(path: Path) -> None:
    """Delete the temporary files that killed processes have left beside ``path``."""
    for name in path.parent.glob(f".{glob.escape(path.name)}.*{_PARTIAL}"):
        name.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """``OSError`` if :func:`atomic_path` could not write ``path``; its directory is made."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass
