"""One writer of a file: a lock beside it, which dies with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_held: set[Path] = set()  # by this process, whose own locks do not stop it


@contextlib.contextmanager
def sole_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """Be the only process that writes ``path``, of those that ask, for the time of the block.

    The lock is one of the operating system, on a file ``.NAME.lock`` beside ``path``: a killed
    process holds none. Where files cannot be locked, as on Windows and some network disks, nobody
    is kept out.

    Raises:
        ValueError: if another process, or another part of this one, is writing it.
    """
    path = Path(path).absolute()
    place = path.with_name(f".{path.name}.lock")
    if path in _held:
        raise ValueError(f"{path} is being written by this very process; choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(place)
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        if descriptor is not None:
            # Before it is closed: a file that is not locked may be another's by now.
            place.unlink(missing_ok=True)
            os.close(descriptor)


def _locked(place: Path) -> int | None:
    """A descriptor of the file with this process's lock on it; ``None`` where there are no locks.

    Raises:
        ValueError: if another process has locked it.
    """
    try:
        import fcntl  # Windows has none
    except ImportError:
        return None
    while True:
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                name = place.name.removeprefix(".").removesuffix(".lock")
                raise ValueError(
                    f"{place.with_name(name)} is being written by {who or 'another process'}; wait "
                    "for it, or choose another place"
                ) from error
            return None
        try:
            # The last holder may have removed the file between the two calls above.
            same = os.fstat(descriptor).st_ino == os.stat(place).st_ino
        except FileNotFoundError:
            same = False
        if same:
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)
