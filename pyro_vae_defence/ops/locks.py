"""One writer of a file: a lock beside it, which dies with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

_held: set[Path] = set()  # by this process, whose own locks do not stop it
_looking = threading.Lock()


def _forget() -> None:
    """A forked process holds none of its parent's locks, nor those of its parent's threads."""
    global _looking
    _held.clear()
    _looking = threading.Lock()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def sole_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """Be the only process that writes ``path``, of those that ask, for the time of the block.

    The lock is one of the operating system, on a file ``.NAME.lock`` beside ``path``: a killed
    process holds none. Where files cannot be locked, as on Windows and some network disks, nobody
    is kept out.

    Raises:
        ValueError: if another process, or another part of this one, is writing it; or if the lock
            is a file of another user.
    """
    path = Path(os.path.realpath(path))  # one name, whatever links lead there
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f".{path.name}.lock")
    with _looking:
        if path in _held:
            raise ValueError(f"{path} is being written by this very process; choose another place")
        _held.add(path)
    owner = os.getpid()
    descriptor = None
    try:
        descriptor = _locked(place)
        yield
    finally:
        if os.getpid() == owner:  # a process forked within the block has no lock to end
            try:
                if descriptor is not None:
                    # Before it is closed: a file that is not locked may be another's by now.
                    place.unlink(missing_ok=True)
            finally:
                # Closing any descriptor of a file ends all locks on it: before others may look.
                if descriptor is not None:
                    os.close(descriptor)
                _held.discard(path)


def _locked(place: Path) -> int | None:
    """A descriptor of the file with this process's lock on it; ``None`` where there are no locks.

    Raises:
        ValueError: if another process has locked it, or it cannot be opened.
    """
    try:
        import fcntl  # Windows has none
    except ImportError:
        return None
    while True:
        try:
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        except PermissionError as error:
            if not place.exists():  # the directory is what cannot be written
                raise
            name = place.name.removeprefix(".").removesuffix(".lock")
            raise ValueError(
                f"{place} is another user's: {place.with_name(name)} is being written, or a writer "
                "was killed; wait, delete that file if nobody writes, or choose another place"
            ) from error
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
