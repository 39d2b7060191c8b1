"""Chains in the form ArviZ reads.

One :class:`xarray.DataTree` is built, with groups ``posterior``, ``sample_stats``,
``observed_data`` and ``log_likelihood``. ArviZ 1.x works on it as it is, earlier versions get it
wrapped as an ``InferenceData``. Dimensions are named ``chain``, ``draw``, ``image`` and, for a
latent site, ``latent``; each has coordinates. What is said of a tree here is said of such an
``InferenceData`` as well, as ``arviz.from_netcdf`` makes of a file. Only numpy, xarray and ArviZ
are imported here.

Each image has chains of its own, whereas ArviZ's energy and pair plots and its BFMI are about one
set of chains: they take :func:`select_image` of a tree. :func:`summary` has a row per image.

**Names.** Pyro takes any text as the name of a site; files and ArviZ do not. A variable is named
as its site wherever that is possible, and as :func:`variable_names` says otherwise. A group with
such a variable has an attribute ``renamed_sites``, JSON text of site -> variable, and
:func:`rhat` and :func:`ess` answer by site. Names of dimensions other than ``chain``, ``draw`` and
``image`` give way to variables, since a file can hold only one of a name.

References: the InferenceData schema, https://python.arviz.org/en/stable/schema/schema.html; names
of netCDF, https://docs.unidata.ucar.edu/nug/current/file_format_specifications.html; Margossian,
Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman, "Nested R-hat: assessing the convergence of Markov
chain Monte Carlo when running many short chains", Bayesian Analysis, 2024,
https://arxiv.org/abs/2110.13017; Betancourt, "Diagnosing suboptimal cotangent disintegrations in
Hamiltonian Monte Carlo", 2016, https://arxiv.org/abs/1604.00695 (BFMI).
"""

from __future__ import annotations

import json
import unicodedata
import warnings
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
    """One group: arrays with their dimensions under the names of their variables.

    Dimensions without coordinates are numbered.
    """
    renamed = {site: name for site, name in names.items() if site != name}
    if renamed:
        attrs = {**attrs, _RENAMED: json.dumps(renamed)}
    variables = {names[site]: array for site, array in arrays.items()}
    sizes = {d: n for dims, values in arrays.values() for d, n in zip(dims, values.shape)}
    numbered = {dim: np.arange(size) for dim, size in sizes.items()}
    return xarray.Dataset(variables, {**numbered, **coords}, dict(attrs))


def to_datatree(
    posterior: Mapping[str, np.ndarray],
    sample_stats: Mapping[str, np.ndarray] | None = None,
    observed_data: Mapping[str, np.ndarray] | None = None,
    attrs: Mapping[str, Any] | None = None,
    log_likelihood: Mapping[str, np.ndarray] | None = None,
) -> xarray.DataTree:
    """Chains as one ``xarray.DataTree``.

    Args:
        posterior: site -> array ``(chain, draw, image, *event)``.
        sample_stats: name -> array ``(chain, draw, image)``.
        observed_data: site -> array ``(image, ...)``; four-dimensional ones get ``channel, height,
            width`` if all of them have one size.
        attrs: attributes of the ``posterior`` group, e.g. the sampler's settings.
        log_likelihood: site -> array ``(chain, draw, image, ...)`` with an entry for each value of
            the site's ``observed_data``, in nats; what ``arviz.loo`` reads.

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
        groups["observed_data"] = _images("observed_data", observed_data, ("image",), coords)
    if log_likelihood:
        groups["log_likelihood"] = _images("log_likelihood", log_likelihood, _LEADING, coords)
    return xarray.DataTree.from_dict(groups)


def _images(
    group: str, sites: Mapping[str, Any], leading: Sequence[str], coords: Mapping[str, np.ndarray]
) -> xarray.Dataset:
    """A group with a value, or one per draw, for each element of observed sites."""
    arrays = {name: np.asarray(values) for name, values in sites.items()}
    names, count = variable_names(arrays), len(leading)
    expected = tuple(len(coords[dim]) for dim in leading)
    own = {values.shape[count:] for values in arrays.values() if values.ndim == count + 3}
    shared = len(own) == 1 and not set(_IMAGE).intersection(names.values())
    found = {}
    for name, values in arrays.items():
        if values.shape[:count] != expected:
            raise ValueError(
                f"{group}[{name!r}] must have ({', '.join(leading)}) = {expected}, got "
                f"{values.shape[:count]}"
            )
        rest = [f"{names[name]}_dim_{number}" for number in range(values.ndim - count)]
        if shared and values.ndim == count + 3:
            rest = list(_IMAGE)
        found[name] = _with_dims(leading, rest, values, names)
    return _dataset(found, names, {dim: coords[dim] for dim in leading}, {})


def check_image(image: Any, count: int) -> int:
    """The number of one of ``count`` images, from 0, or a ``ValueError`` if there is none."""
    if not (isinstance(image, (int, np.integer)) and 0 <= image < count):
        raise ValueError(f"image must be an integer in 0..{count - 1}, got {image!r}")
    return int(image)


def _as_tree(chains: Any, *, images: bool = False) -> xarray.DataTree:
    """Chains as a tree; a ``ValueError`` if they are none, or have to be of ``images`` and are not.

    An ``InferenceData`` is a tree without the class.
    """
    groups = getattr(chains, "groups", None)
    if callable(groups):
        chains = xarray.DataTree.from_dict({name: chains[name] for name in groups()})
    if not isinstance(chains, xarray.DataTree) or "posterior" not in chains.children:
        raise ValueError(
            "tree must be an xarray.DataTree or an arviz.InferenceData with a group posterior, as "
            f"result.to_datatree() is, got {type(chains).__name__}"
        )
    if images and "image" not in chains["posterior"].sizes:
        raise ValueError(
            "tree has no dimension image, since it is of one image alone, as select_image makes "
            "it: pass the tree of all images; to one image arviz.summary and the like apply"
        )
    return chains


def _in_order(chains: Any, *, images: bool = False) -> xarray.DataTree:
    """The same with the module's order of dimensions, which ``xarray.concat`` along a new ``image``
    changes, for what counts them."""
    tree = _as_tree(chains, images=images)
    if lost := sorted({"chain", "draw"}.difference(tree["posterior"].sizes)):
        raise ValueError(
            f"tree has no dimension {' and none '.join(lost)}: keep it where you select, as "
            f"tree.isel({lost[0]}=[0]) does"
        )
    groups = {
        name: group.to_dataset().transpose(*_LEADING, ..., missing_dims="ignore")
        for name, group in tree.children.items()
    }
    return xarray.DataTree.from_dict(groups)


def select_image(tree: xarray.DataTree, image: int) -> xarray.DataTree:
    """The chains of one image, without the dimension ``image``: all of ArviZ applies to them.

    Raises:
        ValueError: if the tree has no image of that number, from 0.
    """
    tree = _as_tree(tree, images=True)
    image = check_image(image, tree["posterior"].sizes["image"])
    groups = {n: g.to_dataset().isel(image=image, drop=True) for n, g in tree.children.items()}
    return xarray.DataTree.from_dict(groups)


def to_arviz(tree: xarray.DataTree) -> Any:
    """What the installed ArviZ works on: the tree itself from 1.0, else an ``InferenceData``."""
    import arviz

    tree = _as_tree(tree)
    if int(arviz.__version__.split(".")[0]) >= 1:
        return tree
    groups: dict[str, Any] = {name: group.to_dataset() for name, group in tree.children.items()}
    if "log_likelihood" in groups:
        # Its loo is NaN where draws differ by less than 1 + eps shows; the same is fine.
        groups["log_likelihood"] = groups["log_likelihood"].astype(float).round(12)
    with warnings.catch_warnings():  # of early versions, of a group that their schema has not
        warnings.filterwarnings("ignore", ".* group is not defined", UserWarning)
        return arviz.InferenceData(**groups)


def rhat(tree: xarray.DataTree) -> dict[str, np.ndarray]:
    """ArviZ's rank-normalised split R-hat: site -> values ``(image, *event)``.

    NaN of one chain alone and where the chains do not move at all, huge or infinite where each
    stands still elsewhere.
    """
    import arviz

    tree = _in_order(tree)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _per_site(tree, arviz.rhat(to_arviz(tree)))


def ess(
    tree: xarray.DataTree, method: str = "bulk", prob: float | tuple[float, float] | None = None
) -> dict[str, np.ndarray]:
    """ArviZ's effective sample size by any of its methods: site -> values ``(image, *event)``.

    ``prob`` is what ``"quantile"`` and ``"local"`` are about.
    """
    import arviz

    tree = _in_order(tree)
    return _per_site(tree, arviz.ess(to_arviz(tree), method=method, prob=prob))


def rhat_nested(tree: xarray.DataTree, superchain_ids: Sequence[int]) -> dict[str, np.ndarray]:
    r"""Nested R-hat of many short chains: site -> values ``(image, *event)``.

    Chains are grouped into K superchains of M chains each, all chains of a superchain started at
    the same point. With :math:`\bar\theta_{mk}` the mean of the N draws of chain m of superchain
    k and :math:`s^2_{mk}` their variance, :math:`\bar\theta_k` the mean of the superchain and
    :math:`\bar\theta` that of all (Margossian et al. 2024, eq. 4 to 8),

    .. math:: \hat B = \frac{1}{K - 1} \sum_k (\bar\theta_k - \bar\theta)^2, \quad
        \hat W = \frac1K \sum_k \Bigl[ \frac{1}{M - 1} \sum_m (\bar\theta_{mk} -
        \bar\theta_k)^2 + \frac1M \sum_m s^2_{mk} \Bigr], \quad
        \mathfrak n \hat R = \sqrt{1 + \hat B / \hat W} .

    A term whose denominator is 0, for M = 1 or N = 1, is left out; where chains do not move at all
    it is NaN. Since means of superchains have M N draws, short chains can pass where R-hat of
    single chains cannot; draws of chains that forgot their start, but are too short for more than
    one independent draw each, have a value near :math:`\sqrt{1 + 1 / M}`. Groups of chains that
    started apart hide a start that is not yet forgotten; what they can tell apart is two ways to
    start, against two runs of one way.

    Args:
        tree: chains of at least two superchains.
        superchain_ids: for each chain the number of its superchain.

    Raises:
        ValueError: if there is not one number per chain, fewer than two superchains, or superchains
            of unequal size; and for a single draw of single chains.
    """
    group = _in_order(tree)["posterior"].to_dataset()
    num_chains, num_draws = (group.sizes[dim] for dim in ("chain", "draw"))
    ids = np.asarray(superchain_ids)
    if ids.shape != (num_chains,):
        raise ValueError(
            f"superchain_ids must have one entry for each of {num_chains} chains, got shape "
            f"{ids.shape}"
        )
    counts = np.unique(ids, return_counts=True)[1]
    if len(counts) < 2 or counts.min() != counts.max():
        raise ValueError(
            "superchain_ids must name at least 2 superchains, all of as many chains; they have "
            f"{counts.tolist()} chains"
        )
    size = int(counts[0])
    if size == 1 and num_draws == 1:
        raise ValueError(
            "one draw of one chain per superchain has no variance; draw more of either"
        )

    def nested(draws: np.ndarray) -> np.ndarray:
        ordered = draws.astype(float)[ids.argsort(kind="stable")]
        ordered = ordered - ordered[:1, :1]  # 0, without rounding, where nothing moves
        nest = ordered.reshape(len(counts), size, *draws.shape[1:])
        chains = nest.mean(2)
        within = np.zeros_like(chains[:, 0])
        if size > 1:
            within += chains.var(1, ddof=1)
        if num_draws > 1:
            within += nest.var(2, ddof=1).mean(1)
        with np.errstate(invalid="ignore", divide="ignore"):  # of what does not move
            return np.sqrt(1 + chains.mean(1).var(0, ddof=1) / within.mean(0))

    return _per_site(tree, {name: nested(v.values) for name, v in group.data_vars.items()})


def summary(tree: xarray.DataTree) -> Any:
    """A ``pandas.DataFrame`` with a row per image, where ``arviz.summary`` has one per latent.

    Its columns, by ArviZ's names, and NaN where nothing can be said:

    - ``r_hat``: the largest rank-normalised split R-hat of the image's latents;
    - ``ess_bulk``, ``ess_tail``: the smallest effective sample size of its latents, NaN where one
      never moves, to which ArviZ gives the number of draws;
    - ``bfmi``: the smallest Bayesian fraction of missing information of its chains;
    - ``diverging``: the share of its draws that diverged;
    - ``acceptance_rate``: their mean.

    The last three are there if the tree has what they are made of. ``summary(tree).describe()``
    tells of all images, ``.nlargest(5, "r_hat")`` of the worst.

    Raises:
        ValueError: for chains of one image without a dimension of images.
    """
    tree = _in_order(tree, images=True)
    draws = tree["posterior"].to_dataset()
    still = _per_site(tree, {name: _still(v.values) for name, v in draws.data_vars.items()})
    columns = {"r_hat": _over_latents(np.max, rhat(tree))}
    for method in ("bulk", "tail"):
        found = {s: np.where(still[s], np.nan, v) for s, v in ess(tree, method).items()}
        columns[f"ess_{method}"] = _over_latents(np.min, found)
    stats = xarray.Dataset()
    if "sample_stats" in tree.children:
        stats = tree["sample_stats"].to_dataset()
    if "energy" in stats:
        energy = stats["energy"].values.astype(float)
        bfmi = np.full_like(energy[:, 0], np.nan)
        if energy.shape[1] > 1:
            with np.errstate(invalid="ignore", divide="ignore"):  # of what does not move
                bfmi = np.square(np.diff(energy, axis=1)).mean(1) / energy.var(1, ddof=1)
        columns["bfmi"] = bfmi.min(0)
    for name in ("diverging", "acceptance_rate"):
        if name in stats:
            columns[name] = stats[name].values.mean((0, 1))
    image = {"image": draws["image"].values}
    return xarray.Dataset({n: ("image", v) for n, v in columns.items()}, image).to_dataframe()


def _still(draws: np.ndarray) -> np.ndarray:
    """Whether all draws ``(chain, draw, ...)`` are the same."""
    return (draws == draws[:1, :1]).all((0, 1))


def _over_latents(reduce: Any, sites: Mapping[str, np.ndarray]) -> np.ndarray:
    """One number per image of the values of all its latents; NaN if one of them is."""
    rows = [values.reshape(len(values), -1) for values in sites.values()]
    return reduce(np.concatenate(rows, 1), axis=1)


def _per_site(tree: xarray.DataTree, values: Any) -> dict[str, np.ndarray]:
    group = _as_tree(tree)["posterior"]
    sites = {name: site for site, name in json.loads(group.attrs.get(_RENAMED, "{}")).items()}
    return {sites.get(str(n), str(n)): np.asarray(values[n]) for n in group.data_vars}
