"""What may go wrong with a disk: the process is killed, or there is no room, at any moment."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


class Killed(BaseException):
    """The process is dead, and touches the disk no more."""


class Disk:
    """Counts the moments at which something below a directory is about to change.

    Attributes:
        moments: how many there were.
        fault: the moment at which the fault comes, from 0; ``None`` for none.
        kind: ``"kill"``, ``"kill while writing"``, which leaves half of what was to be written, or
            ``"full"``: there is no room, and never will be until the fault is taken away.
    """

    def __init__(self) -> None:
        self.directory: Path | None = None
        self.moments, self.fault, self.kind = 0, None, "kill"
        self.dead = False
        sys.addaudithook(self._audit)
        write = Path.write_bytes

        def write_half(path, content):
            if self._concerns(path) and self.kind == "kill while writing" and self._is_time():
                write(path, content[: len(content) // 2])
                self._die()
            return write(path, content)

        self.write_bytes = write_half

    @contextlib.contextmanager
    def below(self, directory, fault=None, kind="kill"):
        """Have the fault, if any, come while the block runs; whether it came."""
        self.directory, self.moments, self.fault, self.kind = directory, 0, fault, kind
        before, Path.write_bytes = Path.write_bytes, self.write_bytes
        try:
            yield self
        except (Killed, OSError) as error:
            if not isinstance(error, Killed) and error.errno != errno.ENOSPC:
                raise
        finally:
            self.directory, self.dead = None, False
            Path.write_bytes = before

    def _concerns(self, path):
        if self.directory is None or not isinstance(path, (str, os.PathLike)):
            return False
        return Path(path).is_relative_to(self.directory)

    def _audit(self, event, arguments):
        if self.directory is None:
            return
        if event == "open":
            path, _, flags = arguments
            changes = bool(flags & _WRITING)
        else:
            path, changes = arguments[0] if arguments else None, event in _CHANGES
        if not (changes and self._concerns(path)):
            return
        if self.dead:
            raise Killed
        # Where there is no room, files can still be removed and take another's place.
        if self.kind == "full" and event not in ("open", "os.mkdir"):
            return
        if self.kind != "kill while writing" and self._is_time():
            if self.kind == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            self._die()

    def _is_time(self):
        self.moments += 1
        if self.fault is None:
            return False
        return self.moments > self.fault if self.kind == "full" else self.moments == self.fault + 1

    def _die(self):
        self.dead = True
        raise Killed


DISK = Disk()  # audit hooks are for ever: one serves all tests
