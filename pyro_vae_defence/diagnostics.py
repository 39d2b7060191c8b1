"""Chains in the form ArviZ reads.

One :class:`xarray.DataTree` is built, with groups ``posterior``, ``sample_stats`` and
``observed_data``. ArviZ 1.x works on it as it is, earlier versions get it wrapped as an
``InferenceData``. Dimensions are named ``chain``, ``draw``, ``image`` and, for a latent site,
``latent``. Only numpy, xarray and ArviZ are imported here.

**Names.** Pyro takes any text as the name of a site; files and ArviZ do not. A variable is named
as its site wherever that is possible, and as :func:`variable_names` says otherwise. A group with
such a variable has an attribute ``renamed_sites``, JSON text of site -> variable, and
:func:`rhat` and :func:`ess` answer by site. Names of dimensions other than ``chain``, ``draw`` and
``image`` give way to variables, since a file can hold only one of a name.

References: the InferenceData schema, https://python.arviz.org/en/stable/schema/schema.html; names
of netCDF, https://docs.unidata.ucar.edu/nug/current/file_format_specifications.html.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray

_LEADING = ("chain", "draw", "image")
_RESERVED = (*_LEADING, "metric", "summary")  # the last two: dimensions of ArviZ's summaries
_IMAGE = ("channel", "height", "width")
_RENAMED = "renamed_sites"

SAMPLE_STATS = (
    "acceptance_rate", "diverging", "energy", "lp", "step_size", "n_steps", "tree_depth",
)  # fmt: skip
"""Statistics of a transition, by ArviZ's names; ``energy`` and ``lp`` are in nats."""


def variable_names(sites: Iterable[str]) -> dict[str, str]:
    """Names of the variables that hold the sites of one group: site -> variable.

    A site gives its variable its own name, unless ArviZ, xarray or netCDF keep the name for
    themselves or cannot hold it. Then

    - ``/`` becomes ``.``, and any other character that netCDF refuses becomes ``_``: control
      characters, blanks at the end, and at the beginning all but letters, digits and ``_``;
      Unicode is normalised (NFC); an empty name becomes ``_``;
    - ``_`` is appended while the name is taken: by another site, as ``chain``, ``draw`` or
      ``image``, or as ``metric`` or ``summary``, which ArviZ's tables use.

    Example:
        >>> variable_names(["z", "vae/z", "vae.z", "image"])
        {'z': 'z', 'vae/z': 'vae.z_', 'vae.z': 'vae.z', 'image': 'image_'}
    """
    candidates = {site: _storable(site) for site in sites}
    names = {s: s for s, name in candidates.items() if s == name and s not in _RESERVED}
    for site, name in candidates.items():
        if site not in names:
            names[site] = _free(name, {*names.values(), *_RESERVED})
    return {site: names[site] for site in candidates}


def _storable(site: str) -> str:
    """The nearest name that netCDF can hold."""
    name = unicodedata.normalize("NFC", site).replace("/", ".")
    # Control characters and halves of surrogate pairs, which UTF-8 has no bytes for.
    name = "".join("_" if unicodedata.category(c) in ("Cc", "Cs") else c for c in name)
    stem = name.rstrip()
    name = stem + "_" * (len(name) - len(stem))
    if not name or (name[0].isascii() and not name[0].isalnum()):
        name = "_" + name[1:]
    return name


def _free(name: str, taken: Container[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _with_dims(
    leading: Sequence[str], own: Sequence[str], values: np.ndarray, names: Mapping[str, str]
) -> tuple[list[str], np.ndarray]:
    """An array and its dimensions, ``own`` as far as it has them and clear of all variables."""
    own = [_free(dim, names.values()) for dim in own]
    return [*leading, *own][: values.ndim], values


def _dataset(
    arrays: Mapping[str, tuple[list[str], np.ndarray]],
    names: Mapping[str, str],
    coords: Mapping[str, np.ndarray],
    attrs: Mapping[str, Any],
) -> xarray.Dataset:
    """One group: arrays with their dimensions under the names of their variables."""
    renamed = {site: name for site, name in names.items() if site != name}
    if renamed:
        attrs = {**attrs, _RENAMED: json.dumps(renamed)}
    variables = {names[site]: array for site, array in arrays.items()}
    return xarray.Dataset(variables, dict(coords), dict(attrs))


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
            width`` if all of them have one size.
        attrs: attributes of the ``posterior`` group, e.g. the sampler's settings.

    Variables are named by :func:`variable_names`. A site's own dimensions are called ``latent``,
    or ``<variable>_dim`` where there are several sites or the site is itself called ``latent``;
    the second and later ones get a number at the end.

    Raises:
        ValueError: if an array has too few dimensions, or groups disagree in size.
    """
    if not posterior:
        raise ValueError("posterior is empty; pass at least one latent site")
    arrays = {name: np.asarray(values) for name, values in posterior.items()}
    leading = next(iter(arrays.values())).shape[:3]
    names = variable_names(arrays)
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
        plain = len(arrays) == 1 and name != "latent"
        base = "latent" if plain else f"{names[name]}_dim"
        own = [base, *(f"{base}_{number}" for number in range(1, values.ndim - 3))]
        variables[name] = _with_dims(_LEADING, own, values, names)
    coords = {name: np.arange(size) for name, size in zip(_LEADING, leading, strict=True)}
    groups = {"posterior": _dataset(variables, names, coords, attrs or {})}
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
        arrays = {name: np.asarray(values) for name, values in observed_data.items()}
        names = variable_names(arrays)
        sizes = {values.shape[1:] for values in arrays.values() if values.ndim == 4}
        shared = len(sizes) == 1 and not set(_IMAGE).intersection(names.values())
        observed = {}
        for name, values in arrays.items():
            if len(values) != leading[2]:
                raise ValueError(
                    f"observed_data[{name!r}] must have {leading[2]} images, got {len(values)}"
                )
            rest = [f"{names[name]}_dim_{number}" for number in range(values.ndim - 1)]
            if shared and values.ndim == 4:
                rest = list(_IMAGE)
            observed[name] = _with_dims(["image"], rest, values, names)
        groups["observed_data"] = _dataset(observed, names, {"image": coords["image"]}, {})
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
    group = tree["posterior"]
    sites = {name: site for site, name in json.loads(group.attrs.get(_RENAMED, "{}")).items()}
    return {sites.get(str(n), str(n)): np.asarray(values[n]) for n in group.data_vars}
