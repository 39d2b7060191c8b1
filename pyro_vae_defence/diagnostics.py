"""Chains in the form ArviZ reads.

One :class:`xarray.DataTree` is built, with groups ``posterior``, ``sample_stats`` and
``observed_data``. ArviZ 1.x works on it as it is, earlier versions get it wrapped as an
``InferenceData``. Dimensions are named ``chain``, ``draw``, ``image`` and, for a latent site,
``latent``. Only numpy, xarray and ArviZ are imported here.

Reference: the InferenceData schema, https://python.arviz.org/en/stable/schema/schema.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray

_LEADING = ("chain", "draw", "image")

SAMPLE_STATS = (
    "acceptance_rate", "diverging", "energy", "lp", "step_size", "n_steps", "tree_depth",
)  # fmt: skip
"""Statistics of a transition, by ArviZ's names; ``energy`` and ``lp`` are in nats."""


def event_dims(site: str, event_shape: tuple[int, ...], single: bool) -> list[str]:
    """Names of a latent site's own dimensions.

    ``latent`` for the one vector-valued site of a plain VAE; several sites may differ in size and
    carry their own name, as does a site that is itself called ``latent`` (xarray keeps that name
    for the variable).
    """
    base = "latent" if single and site != "latent" else f"{site}_dim"
    return [base if number == 0 else f"{base}_{number}" for number in range(len(event_shape))]


def to_datatree(
    posterior: Mapping[str, np.ndarray],
    sample_stats: Mapping[str, np.ndarray] | None = None,
    observed_data: Mapping[str, np.ndarray] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> xarray.DataTree:
    """Chains as one ``xarray.DataTree``.

    Args:
        posterior: site -> array ``(chain, draw, image, *event)``.
        sample_stats: name -> array ``(chain, draw, image)``.
        observed_data: site -> array ``(image, ...)``; four-dimensional ones get ``channel, height,
            width``.
        attrs: attributes of the ``posterior`` group, e.g. the sampler's settings.

    Raises:
        ValueError: if an array has too few dimensions, or groups disagree in size.
    """
    if not posterior:
        raise ValueError("posterior is empty; pass at least one latent site")
    arrays = {name: np.asarray(values) for name, values in posterior.items()}
    leading = next(iter(arrays.values())).shape[:3]
    variables = {}
    for name, values in arrays.items():
        if values.ndim < 3:
            raise ValueError(
                f"posterior[{name!r}] must have dimensions (chain, draw, image, ...), "
                f"got shape {values.shape}"
            )
        if values.shape[:3] != leading:
            raise ValueError(
                f"posterior[{name!r}] has (chain, draw, image) = {values.shape[:3]}, "
                f"other sites have {leading}"
            )
        own = event_dims(name, values.shape[3:], len(arrays) == 1)
        variables[name] = ([*_LEADING, *own], values)
    coords = {name: np.arange(size) for name, size in zip(_LEADING, leading, strict=True)}
    groups = {"posterior": xarray.Dataset(variables, coords, dict(attrs or {}))}
    if sample_stats:
        stats = {}
        for name, values in sample_stats.items():
            values = np.asarray(values)
            if values.shape != leading:
                raise ValueError(
                    f"sample_stats[{name!r}] must have shape (chain, draw, image) = {leading}, "
                    f"got {values.shape}"
                )
            stats[name] = (_LEADING, values)
        groups["sample_stats"] = xarray.Dataset(stats, coords)
    if observed_data:
        observed = {}
        for name, values in observed_data.items():
            values = np.asarray(values)
            if len(values) != leading[2]:
                raise ValueError(
                    f"observed_data[{name!r}] must have {leading[2]} images, got {len(values)}"
                )
            rest = [f"{name}_dim_{number}" for number in range(values.ndim - 1)]
            if values.ndim == 4:
                rest = ["channel", "height", "width"]
            observed[name] = (["image", *rest], values)
        groups["observed_data"] = xarray.Dataset(observed, {"image": coords["image"]})
    return xarray.DataTree.from_dict(groups)


def to_arviz(tree: xarray.DataTree) -> Any:
    """What the installed ArviZ works on: the tree itself from 1.0, else an ``InferenceData``."""
    import arviz

    if int(arviz.__version__.split(".")[0]) >= 1:
        return tree
    groups: dict[str, Any] = {name: group.to_dataset() for name, group in tree.children.items()}
    return arviz.InferenceData(**groups)


def rhat(tree: xarray.DataTree) -> dict[str, np.ndarray]:
    """ArviZ's rank-normalised split R-hat: site -> values ``(image, *event)``.

    NaN where the chains do not move at all.
    """
    import arviz

    return _per_site(tree, arviz.rhat(to_arviz(tree)))


def ess(tree: xarray.DataTree) -> dict[str, np.ndarray]:
    """ArviZ's bulk effective sample size: site -> values ``(image, *event)``."""
    import arviz

    return _per_site(tree, arviz.ess(to_arviz(tree)))


def _per_site(tree: xarray.DataTree, values: Any) -> dict[str, np.ndarray]:
    return {str(site): np.asarray(values[site]) for site in tree["posterior"].data_vars}
