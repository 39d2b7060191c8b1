"""What an evaluation has found so far, in a file from which it goes on.

An evaluation is a sequence of steps: figures of clean images and of noise, every attack, every
score, all checks. Each draws its seeds from one counter, so that what the file holds of a step,
together with where the counter stood after it, stands for running it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from pyro_vae_defence.ops.files import atomic_save, load_tensors, naming, real_place
from pyro_vae_defence.robustness.scoring import Fresh
from pyro_vae_defence.robustness.whitebox import WhiteBox

T = TypeVar("T")


class Steps:
    """Steps by name; those that the file holds are not computed again.

    Args:
        path: the file, of ``torch.save``; ``None`` for none.
        identity: what the evaluation is of.
        seed: of the evaluation, if there is no file yet.
        device: of the tensors in it.

    Attributes:
        seed: of the evaluation, that of the file if there is one.

    Raises:
        ValueError: for a damaged file, or one of another evaluation.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        identity: str,
        seed: int,
        device: torch.device,
    ) -> None:
        self.path = None if path is None else real_place(path)
        self.identity, self.seed = identity, seed
        self._done: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._before, self._began = 0.0, time.perf_counter()
        if self.path is not None and self.path.exists():
            mend = "delete it to evaluate from the start"
            with naming(f"checkpoint {self.path} of an evaluation cannot be read", mend):
                saved = load_tensors(self.path, device)
                found, self.seed = saved["identity"], saved["seed"]
                self._done, self._before = saved["done"], saved["seconds"]
            if found != identity:
                raise ValueError(
                    f"checkpoint {str(self.path)!r} belongs to other images, another defence or "
                    "other settings; delete it, or give this evaluation another file"
                )

    def begin(self, box: WhiteBox, fresh: Fresh) -> None:
        """Name what steps change besides what they return."""
        self._box, self._fresh = box, fresh

    @property
    def seconds(self) -> float:
        """Wall time of all runs of this evaluation."""
        return self._before + time.perf_counter() - self._began

    def __call__(self, name: str, compute: Callable[[], T]) -> T:
        """What ``compute`` returns: tensors, numbers and texts in tuples, lists and dicts."""
        if name in self._done:
            value, after = self._done[name]
            self._fresh.number = after["seeds"]
            self._box.restore(after["box"])
            return value
        value = compute()
        if self.path is not None:
            after = {"seeds": self._fresh.number, "box": self._box.state()}
            self._done[name] = value, after
            progress = {"identity": self.identity, "seed": self.seed, "done": self._done}
            atomic_save(progress | {"seconds": self.seconds}, self.path)
        return value

    def finish(self) -> None:
        """Delete the file: all is found."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
