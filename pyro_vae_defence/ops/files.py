"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import glob
import os
import tempfile
from pathlib import Path

_PARTIAL = ".partial"


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` so that no reader ever sees half a file; parents are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(_PARTIAL, f".{path.name}.", path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are readable by their owner alone.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_partial(path: Path) -> None:
    """Delete the temporary files that killed processes have left beside ``path``."""
    for name in path.parent.glob(f".{glob.escape(path.name)}.*{_PARTIAL}"):
        name.unlink(missing_ok=True)
