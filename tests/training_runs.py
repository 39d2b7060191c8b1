"""What tests of training share: settings, and processes that die and are gone on with."""

from __future__ import annotations

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from pyro_vae_defence.training import FitConfig


def config(**changes):
    settings = {"epochs": 2, "learning_rate": 1e-2, "schedule": "constant", "progress": False}
    return FitConfig(**{**settings, **changes})


class Killed(Exception):
    pass


class KilledAfter(TraceMeanField_ELBO):
    """An objective after whose first so many steps the process dies; by default it does not."""

    def __init__(self, steps=-1):
        super().__init__()
        self.left = steps

    def loss_and_grads(self, *args):
        if self.left == 0:
            raise Killed
        self.left -= 1
        return super().loss_and_grads(*args)


def assert_equal(one, other):
    """The same tensors by the same names."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def without_times(history):
    return [{**entry, "seconds": 0} for entry in history]


def check_resumed(run, path, killed_at, first=1):
    """A run that was killed goes on with another seed, and other weights, to the same end.

    ``run(path=None, seed=0, left=-1)`` trains as a new process would, for ``left`` steps before it
    dies, and returns weights by name and the history. There is a checkpoint from the step ``first``
    on. The weights at the end are returned.
    """
    whole, history = run()
    with pytest.raises(Killed):
        run(path=path, left=killed_at)
    resumed, other = run(path=path, seed=7 if killed_at >= first else 0)
    assert_equal(whole, resumed)
    assert without_times(history) == without_times(other)
    return whole


class Elsewhere:
    """Images on another device."""

    def __init__(self, x):
        self.x, self.asked = x, []

    def to(self, device):
        self.asked.append(device)
        return self.x
