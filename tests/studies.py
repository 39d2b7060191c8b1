"""What tests of studies share: untrained models, result files that are changed or interrupted."""

from __future__ import annotations

import functools
import json

import pytest

from pyro_vae_defence.experiments.tables import at
from pyro_vae_defence.experiments.train import MODELS
from pyro_vae_defence.models.nvae import NVAE, NVAEConfig
from pyro_vae_defence.models.pretrained import save_pretrained

save_model = functools.partial(
    save_pretrained, training={"dataset": "mnist_subset"}, command="none", provenance={}
)
"""Save a model as if it had been trained on the packaged images."""


def small_nvae():
    """An untrained network of three groups, of the kind that is trained on MNIST."""
    small = {"num_groups_per_scale": 2, "num_latent_per_group": 2}
    small |= {"num_channels_enc": 4, "num_channels_dec": 4}
    return NVAE(NVAEConfig.from_dict(MODELS["mnist_nvae"].architecture | small))


def change(path, places, value):
    """Put a value at a place of a result file, such as ``["radii", "0.2"]``."""
    found = json.loads(path.read_text())
    entry = found
    for place in places[:-1]:
        entry = entry[place]
    entry[places[-1]] = value
    path.write_text(json.dumps(found))


def check_resumed(run, directory, result, lost, kept):
    """A run that finds a part of its result computes what is not there, and nothing else.

    Args:
        run: computes a study in a directory, with settings that change; its result.
        directory: where nothing is yet.
        result: of an uninterrupted run.
        lost: cell that is not there, such as ``"radii/0.1/hmc"``.
        kept: cell that is.
    """
    path = directory / f"{result['name']}.json"
    cut = json.loads(json.dumps(result))
    place, _, last = lost.rpartition("/")
    del at(cut, place)[last]
    at(cut, kept)["marked"] = True
    path.write_text(json.dumps(cut))
    again = run(directory)
    assert at(again, kept)["marked"]
    found = json.loads(path.read_text())
    assert _without_times(at(found, lost)) == _without_times(at(result, lost))
    before = path.stat().st_mtime_ns
    run(directory)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="belongs to another run"):
        run(directory, seed=1)


def _without_times(cell):
    return {key: value for key, value in cell.items() if "seconds" not in key}
