r"""Discrete latents of a Pyro program, summed out exactly and within each image.

A Hamiltonian chain moves continuous latents z. Where a program also samples discrete ones y (the
component of a mixture, a class, the states of a hidden Markov chain), the density it needs is

.. math:: \log p(x_n, z_n) = \log \sum_y p(x_n \mid z_n, y)\, p(z_n \mid y)\, p(y),

and the image that z decodes to is :math:`\sum_y p(y \mid z)\, E[x \mid z, y]`. Both come from one
run of the program in which each discrete site takes all its values at once, in a dimension of its
own left of all plates (Pyro's parallel enumeration, as in ``TraceEnum_ELBO``). The sum over several
sites follows their dependences: Pyro's tensor variable elimination [1], with the data plate kept as
a batch dimension. A discrete site in an inner plate is summed out element by element, and the
plate's elements are multiplied afterwards.

The program has to broadcast over the dimensions that enumeration adds on the left, as for
``TraceEnum_ELBO``: index tables by y, add and multiply rather than concatenate or reshape.

As there, scales are ignored here and a mask removes the log-probability of a site, but not that of
an enumerated one: where everything that depends on y is masked, p(y) sums to one and nothing is
left of y, while a masked p(y) would leave the number of its values.

[1] Tensor variable elimination for plated factor graphs, Obermeyer et al. 2019,
https://arxiv.org/abs/1902.03210
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pyro_vae_defence.models.sites import Site, get_trace, latent_sites, sample_sites
from pyro_vae_defence.ops.checks import RefusalError
from pyro_vae_defence.ops.distributions import is_discrete
from pyro_vae_defence.types import PyroProgram

# A packed tensor of Pyro: its attribute ``_pyro_dims`` names each dimension by a symbol.
Packed = Any

_BROADCAST = (
    "let it broadcast over dimensions left of its plates: index tables by the discrete value, add "
    "and multiply rather than concatenate or reshape"
)
_ROUNDING = 1e-3  # between log-probabilities of one program in differently shaped operations


def enumerable(trace: Trace) -> list[str]:
    """Names of the discrete latent sites of a plain trace, in program order, which can be summed.

    Raises:
        ValueError: if a discrete latent has no finite list of values, e.g. a Poisson.
    """
    names = []
    for site in latent_sites(trace):
        if not is_discrete(site["fn"]):
            continue
        if not site["fn"].has_enumerate_support:
            raise ValueError(
                f"latent site {site['name']!r} is discrete ({site['fn']}) and its values cannot be "
                "enumerated; bound it (a Categorical over its first values), sample the "
                "components in a pyro.plate instead of .to_event(), or use a continuous relaxation"
            )
        names.append(site["name"])
    return names


def marginalised(
    program: PyroProgram, plain: Trace, plate: Any, *args: Any, **kwargs: Any
) -> tuple[Trace, bool]:
    """A trace with the discrete sites enumerated, and how it expands them for :func:`in_parallel`.

    Enumerated values have size 1 in the dimensions of plates; for programs that do not broadcast
    so, they are expanded to full size.

    Args:
        program: with as many latents conditioned as are known.
        plain: a trace of it as it is, at the same arguments.
        plate: the data plate.
        args, kwargs: of the program.

    Raises:
        ValueError: if the program runs neither way, or as another density: as
            :func:`check_broadcast`, where all continuous latents are conditioned.
    """
    whole = len(latent_sites(plain)) == len(enumerable(plain))
    failure: ValueError | None = None
    for expand in (False, True):
        try:
            trace = get_trace(in_parallel(program, plain, expand), *args, **kwargs)
            if whole:
                check_broadcast(plain, trace, plate)
            return trace, expand
        except ValueError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def in_parallel(program: PyroProgram, trace: Trace, expand: bool = False) -> PyroProgram:
    """The program with all :func:`enumerable` sites of its plain ``trace`` enumerated in parallel.

    What the program itself says of enumeration (``config_enumerate``) has no effect; ``expand`` is
    as there. Running it raises ``ValueError`` where the program does not broadcast.
    """
    names = set(enumerable(trace))
    frames = [frame for site in sample_sites(trace).values() for frame in site["cond_indep_stack"]]
    first = min((frame.dim for frame in frames if frame.vectorized), default=0) - 1

    def configure(site: Site) -> Any:
        chosen = "parallel" if site["name"] in names else None
        return {"enumerate": chosen, "num_samples": None, "expand": expand}

    enumerated = EnumMessenger(first)(poutine.infer_config(program, configure))

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return enumerated(*args, **kwargs)
        except (torch.OutOfMemoryError, RefusalError):
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise RefusalError(
                f"the program failed with its discrete sites {sorted(names)} enumerated in "
                f"parallel: {error}; {_BROADCAST}"
            ) from error

    return run


def log_density(trace: Trace, plate: Any) -> Tensor:
    """Log-density within each image of a trace of :func:`in_parallel`, discrete sites summed out.

    Args:
        trace: the program with every continuous latent conditioned.
        plate: the data plate of size ``N``, its name or its frame.

    Returns:
        ``(N,)``, in nats: unscaled, masked, differentiable.

    Raises:
        ValueError: if a site stands outside the data plate, or depends on a discrete site of a
            plate that it is not in, or on discrete sites of two plates that cross.
    """
    factors = _Factors.read(trace, plate, sample_sites(trace))
    data = trace.plate_to_symbol[_name(plate)]
    return factors.contract(frozenset(data), set())[...]


def is_enumerated(trace: Trace) -> bool:
    """Whether a trace is one of :func:`in_parallel` with something to sum out."""
    return any(_is_enumerated(site) for site in sample_sites(trace).values())


def marginal_mean(trace: Trace, plate: Any, name: str, given: Collection[str]) -> Tensor:
    """Mean of the site ``name`` given the latents ``given``, averaged over discrete sites.

    With the image's site and all continuous latents it is E[x | z], of the weights p(y | z). The
    mean of a guide's site is that of q(z | x) if none is given.

    Args:
        trace, plate: as in :func:`log_density`.
        name: the site whose mean it is.
        given: names of the conditioned sites that tell something about the discrete ones.

    Returns:
        Of the shape of the site's mean without enumeration. A mean that does not depend on a
        discrete site is returned as it is.
    """
    site: Site = trace.nodes[name]
    mean, events = site["fn"].mean, len(site["fn"].event_shape)
    sites = sample_sites(trace)
    known = [n for n, s in sites.items() if n in given or _is_enumerated(s)]
    factors = _Factors.read(trace, plate, known)
    symbols = {symbol: dim for dim, symbol in site["infer"]["_dim_to_symbol"].items()}
    depends = {
        symbol
        for symbol, dim in symbols.items()
        if symbol in factors.owners and mean.dim() >= events - dim and mean.shape[dim - events] > 1
    }
    if not depends:
        return mean
    _check_owners(name, depends, factors.ordinals[name], factors.owners)
    logits = packed.unpack(factors.contract(factors.ordinals[name], depends), symbols)
    dims = [symbols[symbol] for symbol in depends]
    weights = (logits - logits.logsumexp(dims, keepdim=True)).exp()
    weights = weights.reshape(weights.shape + (1,) * events)
    total = (weights * mean).sum([dim - events for dim in dims], keepdim=True)
    depth = max(-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized)
    return total.reshape(total.shape[-depth - events :])


def check_broadcast(plain: Trace, trace: Trace, plate: Any) -> None:
    """Refuse a program that enumeration misleads, e.g. by flattening the enumerated dimension.

    Args:
        plain: a trace of the program as it is.
        trace: one of :func:`in_parallel`, with the continuous latents of ``plain``.
        plate: the data plate.

    Raises:
        ValueError: if, where the discrete sites have the values of ``plain``, a log-probability is
            not the same in both, but for rounding.
    """
    factors = _Factors.read(trace, plate, sample_sites(trace))
    plain.symbolize_dims(dict(trace.plate_to_symbol))
    sites, enumerated = sample_sites(plain), {}
    for name, site in sample_sites(trace).items():
        if _is_enumerated(site):
            events = len(site["fn"].event_shape)
            chosen = site["value"] == sites[name]["value"]
            chosen = chosen.reshape((*chosen.shape[: chosen.dim() - events], -1)).all(-1)
            symbol, symbols = site["infer"]["_enumerate_symbol"], site["infer"]["_dim_to_symbol"]
            enumerated[symbol] = packed.pack(chosen, symbols)
    term: Packed
    for name, term in factors.terms.items():
        for symbol in factors.owners.keys() & set(term._pyro_dims):
            term, selected = packed.broadcast_all(term, enumerated[symbol])
            dims = term._pyro_dims
            term = torch.where(selected, term, 0.0).sum(dims.index(symbol))
            term._pyro_dims = dims.replace(symbol, "")
        masked = not _is_enumerated(trace.nodes[name])
        expected = _packed_log_prob(sites[name], masked=masked)
        term, expected = packed.broadcast_all(term, expected)
        same = term.is_meta or torch.allclose(
            term, expected, rtol=_ROUNDING, atol=_ROUNDING, equal_nan=True
        )
        if not same:
            raise ValueError(
                f"site {name!r} has another log-probability where discrete sites are enumerated "
                f"in parallel than where they are sampled; {_BROADCAST}"
            )


# --- Factors --------------------------------------------------------------------------------------


class _Factors(NamedTuple):
    """Log-probabilities of sites, packed, and the plates they stand in."""

    terms: dict[str, Packed]  # by site
    ordinals: dict[str, frozenset[str]]  # by site: the symbols of its plates
    owners: dict[str, frozenset[str]]  # the same by the symbol of an enumerated site
    sizes: dict[str, int]  # by the symbol of a plate

    @classmethod
    def read(cls, trace: Trace, plate: Any, names: Collection[str]) -> _Factors:
        trace.symbolize_dims()
        sites = sample_sites(trace)
        ordinals = {name: _ordinal(trace, site) for name, site in sites.items()}
        owners = {
            site["infer"]["_enumerate_symbol"]: ordinals[name]
            for name, site in sites.items()
            if _is_enumerated(site)
        }
        frames = [f for s in sites.values() for f in s["cond_indep_stack"] if f.vectorized]
        sizes = {trace.plate_to_symbol[frame.name]: frame.size for frame in frames}
        unsized = {symbol for symbol, size in sizes.items() if size < 0}
        terms = {}
        for name in names:
            if trace.plate_to_symbol.get(_name(plate)) not in ordinals[name]:
                raise ValueError(
                    f"site {name!r} must stand inside the vectorised data plate {_name(plate)!r}, "
                    "since its log-probability has to belong to one image"
                )
            masked = not _is_enumerated(sites[name])
            terms[name] = _packed_log_prob(sites[name], masked=masked)
            _check_owners(name, terms[name]._pyro_dims, ordinals[name], owners)
        for symbol in unsized:  # a plate without a size has that of its sites
            found = [
                size
                for term in terms.values()
                for dim, size in zip(term._pyro_dims, term.shape, strict=True)
                if dim == symbol
            ]
            sizes[symbol] = max(found, default=1)
        return cls(terms, ordinals, owners, sizes)

    def contract(self, plates: frozenset[str], kept: set[str]) -> Packed:
        """The factors' product with all enumerated sites but ``kept`` summed out, per element."""
        tree: OrderedDict[frozenset[str], list[Packed]] = OrderedDict()
        for name, term in self.terms.items():
            tree.setdefault(self.ordinals[name], []).append(term)
        ring = _Ring(dim_to_size=self.sizes)
        try:
            return contract_to_tensor(tree, set(self.owners), plates, kept, ring=ring)
        except NotImplementedError as error:
            raise ValueError(f"discrete sites cannot be summed out: {error}") from None


def _packed_log_prob(site: Site, *, masked: bool) -> Packed:
    try:
        log_prob = site["fn"].log_prob(site["value"])
        if masked:
            log_prob = scale_and_mask(log_prob, mask=site["mask"])
        return packed.pack(log_prob, site["infer"]["_dim_to_symbol"])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"site {site['name']!r}: {error}; {_BROADCAST}") from error


class _Ring(LogRing):
    """Sums of products of probabilities on the log scale that cannot underflow.

    Pyro's own ring multiplies exponentials, each scaled by its own maximum. Log-likelihoods of
    images differ by hundreds of nats between values of y; where the prior's differ as much the
    other way, every product is zero. Here one variable at a time is summed, the cheapest first, by
    logsumexp of the sum of the terms that know it.
    """

    def sumproduct(self, terms: Iterable[Packed], dims: Iterable[str]) -> Packed:
        terms, pending = list(terms), set(dims)
        while pending:
            joined = {dim: [term for term in terms if dim in term._pyro_dims] for dim in pending}
            dim = min(sorted(pending), key=lambda dim: _table_size(joined[dim]))
            pending.remove(dim)
            terms = [term for term in terms if dim not in term._pyro_dims]
            terms.append(_sum_out(_add(joined[dim]), dim))
        return _add(terms)


def _table_size(terms: list[Packed]) -> int:
    sizes = {dim: n for term in terms for dim, n in zip(term._pyro_dims, term.shape, strict=True)}
    return math.prod(sizes.values())


def _add(terms: list[Packed]) -> Packed:
    total, *others = packed.broadcast_all(*terms)
    for other in others:
        dims, total = total._pyro_dims, total + other
        total._pyro_dims = dims
    return total


def _sum_out(term: Packed, dim: str) -> Packed:
    position, low = term._pyro_dims.index(dim), torch.finfo(term.dtype).min
    # The derivative of logsumexp is not a number where all terms are -inf, as for a state of a
    # chain that cannot be reached; it is zero here.
    impossible = (term == -math.inf).all(position)
    result = term.clamp(min=low).logsumexp(position).masked_fill(impossible, -math.inf)
    result._pyro_dims = term._pyro_dims.replace(dim, "")
    return result


def _is_enumerated(site: Site) -> bool:
    return (site["infer"] or {}).get("_enumerate_dim") is not None


def _name(plate: Any) -> str:
    name: str = getattr(plate, "name", plate)
    return name


def _ordinal(trace: Trace, site: Site) -> frozenset[str]:
    frames = (frame for frame in site["cond_indep_stack"] if frame.vectorized)
    return frozenset(trace.plate_to_symbol[frame.name] for frame in frames)


def _check_owners(
    name: str, symbols: Iterable[str], ordinal: frozenset[str], owners: dict[str, frozenset[str]]
) -> None:
    """Refuse a site outside a plate that depends on a discrete site inside it.

    All elements of the plate were enumerated together, as if they had one value in common.
    """
    if any(not owners.get(symbol, ordinal) <= ordinal for symbol in symbols):
        raise ValueError(
            f"site {name!r} depends on a discrete latent of a plate that it does not stand in; "
            "sample that latent in a sequential plate: for i in pyro.plate(name, size)"
        )
