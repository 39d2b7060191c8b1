"""Whether a VAE keeps its contract, tried on a few images before anything is computed.

Programs are run on three images, again at the same latents, and on one image alone. They must run
on any number of images, with plates that follow it; draw noise in ``pyro.sample`` only; compute of
an image what depends on that image alone, and leave it as it is; have the same latents in model and
guide, with the images as rows; and draw no latents where the prior has no density. What fails is a
``ValueError`` with the mend, wherever it would have gone unnoticed. A likelihood of which no
gradient leads to the latents is a warning, since nothing is wrong but what follows gradients.

A public call may read one VAE a thousand times, an evaluation in every run of the defence. What has
been found :func:`once` is not tried again before that call ends, nor, in a study, after it.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, TypeVar, cast

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_vae_defence.models.conditions import BoundProgram, bind, split, take
from pyro_vae_defence.models.modules import modules_of
from pyro_vae_defence.models.sites import (
    DATA_PLATE,
    Kind,
    Site,
    aside,
    check_same_latents,
    data_frame,
    get_trace,
    image_rows,
    kind,
    latent_sites,
    log_prob_per_image,
    rows_dim,
    sample_sites,
)
from pyro_vae_defence.ops import distributions
from pyro_vae_defence.ops.boundary import known, note, public
from pyro_vae_defence.ops.checks import RefusalError, check_finite, check_precision
from pyro_vae_defence.ops.distributions import innermost, is_discrete, is_point, own_methods
from pyro_vae_defence.ops.precision import full_on
from pyro_vae_defence.types import VAE, ImagesLike, LatentsLike, PyroProgram

T = TypeVar("T")

# --- Validation at the public boundary ------------------------------------------------------------


def check_vae(vae: Any) -> VAE:
    """Return ``vae`` if it has callable ``model`` and ``guide``; raise ``ValueError`` otherwise."""
    for name in ("model", "guide"):
        if not callable(getattr(vae, name, None)):
            raise ValueError(
                f"vae must have two Pyro programs, model(x) and guide(x); "
                f"{type(vae).__name__} has no callable attribute {name!r}"
            )
    return vae


def check_images(
    x: Any, name: str = "x", *, unit_interval: bool = True, half: bool = False
) -> Tensor:
    """Return a batch of images ``x``, or raise a ``ValueError`` that names what is wrong with it.

    Args:
        x: floating-point tensor of shape ``(N, C, H, W)``, values in [0, 1].
        name: the argument's name in messages.
        unit_interval: whether to check the range (one synchronisation with the device).
        half: whether they may be in half precision, for programs that convert them by themselves.
    """
    if not isinstance(x, Tensor):
        mend = "; pass its images, as in batch['image']" if isinstance(x, Mapping) else ""
        raise ValueError(
            f"{name} must be a tensor of images (N, C, H, W), got {type(x).__name__}{mend}"
        )
    if x.dim() != 4 or x.shape[0] == 0:
        mend = "add the missing dimensions, e.g. x[None] for a single image"
        if x.dim() == 2:
            mend += ", or x.view(-1, 1, 28, 28) for rows of pixels, which programs may flatten"
        elif x.dim() == 3:
            mend += "; for batches of images or of a dataset pass data.batches(images, 128), or a "
            mend += "DataLoader(dataset, 128), which yield more than one at a time"
        elif x.dim() >= 4:
            mend = (
                "there is no image" if x.shape[0] == 0 else "leave no others, e.g. x.flatten(0, 1)"
            )
        raise ValueError(
            f"{name} must have shape (N, C, H, W) with N >= 1, got {tuple(x.shape)}; {mend}"
        )
    if not x.is_floating_point():
        raise ValueError(
            f"{name} must be floating point with values in [0, 1], got {x.dtype}; "
            "for 8-bit images use x.float() / 255"
        )
    if not half:
        check_precision(name, x.dtype)
    if unit_interval:
        check_range(x, name)
    return x


def check_range(x: Tensor, name: str = "x") -> None:
    """``ValueError`` naming the argument unless all values of ``x`` are in [0, 1]; one look at the
    device."""
    if x.device.type == "meta" or x.numel() == 0:
        return
    low, high = (float(bound) for bound in x.detach().aminmax())
    if low >= 0.0 and high <= 1.0:
        return
    check_finite(name, x, "images have values in [0, 1]; see where these rows come from")
    mend = "rescale it (x / 255 for 8-bit images) or clamp it"
    if low < 0.0:
        mend = (
            "clamp it, or, if it was rescaled to [-1, 1], pass (x + 1) / 2: a VAE that observes "
            "[-1, 1] is given images in [0, 1] and converts them itself, obs=2 * x - 1"
        )
    raise ValueError(
        f"{name} must lie in [0, 1], got values from {_bound(low)} to {_bound(high)}; {mend}"
    )


def _bound(value: float) -> str:
    """Six digits, or all where six would hide that the value is beyond 0 or 1."""
    short = f"{value:g}"
    return repr(value) if float(short) in (0.0, 1.0) and float(short) != value else short


def check_networks_on_device(what: str, program: Any, name: str, x: Any) -> None:
    """Refuse images ``x`` that no network of a program is on the device of.

    Programs without parameters and buffers have no device, and follow their images. Networks on
    several devices are the program's own affair, as long as images come to one of them.

    Args:
        what: the program's name in messages.
        program: a VAE, a classifier, or whatever else holds networks.
        name: the images' name in messages.
        x: the images, or what else the program is given; what is no tensor is not looked at.

    Raises:
        ValueError: if there is a network, and none on the images' device.
    """
    devices = {
        tensor.device
        for module in modules_of(program)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    if devices and isinstance(x, Tensor) and x.device not in devices:
        there = str(min(devices, key=str))
        raise ValueError(
            f"{name} is on {x.device} but the parameters of {what} on {there}; pass "
            f"{name}.to({there!r}), or move the networks, {what}.to({str(x.device)!r})"
        )


def as_networks(vae: VAE, x: Tensor) -> Tensor:
    """Images in float64, as NumPy makes them, in float32 for networks of float32."""
    if x.dtype == torch.float64 and _dtypes(_parameters(vae)) == {torch.float32}:
        return x.float()
    return x


@public
def at_images(
    vae: VAE, images: ImagesLike, name: str = "x", *, unit_interval: bool = True
) -> tuple[VAE, Tensor]:
    """A VAE at images that may come with conditions: a VAE of images alone, and the images.

    Images in float64, as NumPy makes them, come in float32 for networks of float32.

    Raises:
        ValueError: as :func:`check_vae`, :func:`check_images` and
            :func:`check_networks_on_device`, and if the programs do not take the conditions, a
            condition has not one row per image, or the programs have other latents than each other.
    """
    check_vae(vae)
    x, conditions = split(images, name)
    check_images(x, name, unit_interval=unit_interval)
    if not unit_interval:
        check_finite(name, x, "repair these images or leave them out")
    check_networks_on_device("vae", vae, name, x)
    x = as_networks(vae, x)
    vae = bind(vae, x, conditions)
    if x.device.type != "meta":
        few = torch.arange(min(3, len(x)), device=x.device)  # of which an index makes copies
        some = take(vae, few)
        once("at_images", (some.model, some.guide), x[few], lambda: _check_programs(some, x[few]))
    return vae, x


def once(
    what: str,
    programs: Sequence[PyroProgram],
    x: Tensor,
    find: Callable[[], T],
    others: Sequence[Any] = (),
) -> T:
    """What a check or a reading of programs has found; it runs once in an outermost public call, or
    in a study (:func:`~pyro_vae_defence.ops.boundary.remembering`).

    It is known of the very same programs, with the same weights and modes of their networks, at
    images of the same shape and further arguments of the same shapes, whatever their values.

    Args:
        what: names the check.
        programs: those it runs; bound methods are told by their object.
        x: images, or whatever else comes first, with a row per image.
        find: runs it; nothing is known after an error.
        others: what the programs get beside ``x``, and anything hashable that it depends on.
    """
    parts: list[Any] = []
    arguments: list[Any] = [x, *others]
    for program in programs:
        if isinstance(program, BoundProgram):
            arguments += [*program.conditions, *program.keywords, *program.keywords.values()]
            program = program.program
        if isinstance(program, MethodType):
            parts += [program.__self__, program.__func__]
        else:
            parts.append(program)
    shapes = [_shape(value, len(x)) if isinstance(value, Tensor) else value for value in arguments]
    try:
        references = [weakref.ref(part) for part in parts]
        found, key, state = known(), (what, *map(id, parts), *shapes), _state(programs)
        before, then, value = found.get(key, ((), None, None))
    except TypeError:  # no weak reference, or no hash
        return find()
    # Another object may have got the id of one that is gone.
    same = before and all(ref() is part for ref, part in zip(before, parts, strict=True))
    if same and then == state:
        return cast(T, value)
    result = find()
    found[key] = references, state, result
    return result


def _shape(value: Tensor, num_images: int) -> tuple[Any, ...]:
    """Of images as many rows as are tried, and what each of them is like."""
    rows = min(num_images, 3) if value.shape[:1] == (num_images,) else -1
    return rows, value.shape[rows >= 0 :], value.dtype, value.device


def _state(programs: Sequence[PyroProgram]) -> int:
    """A hash of what changes when networks of programs are trained, loaded or set to a mode."""
    return hash(
        tuple(
            (module.training, *((id(t), -1 if t.is_inference() else t._version) for t in tensors))
            for module in modules_of(*programs)
            for tensors in [(*module.parameters(recurse=False), *module.buffers(recurse=False))]
        )
    )


def _check_programs(vae: VAE, x: Tensor) -> None:
    with torch.no_grad(), evaluation_mode(vae), aside(x.device):
        model = run_untouched("vae.model", vae.model, x.clone())
        guide = run_untouched("vae.guide", vae.guide, x.clone())
        check_same_latents(model, guide, summed_out=True)
        check_latents(guide)
        _check_values(model, guide)
        _check_memory(vae, x, model)
    check_guide_rows(vae, x)


def _check_memory(vae: VAE, x: Tensor, drawn: Trace) -> None:
    """Refuse a model that goes by what the guide has kept of its last images.

    In training the guide has always seen the same images just before. Chains and scores run the
    model on images that are not those. ``drawn`` is a run of the model, whatever was before it.
    """
    latents = {n: s["value"] for n, s in sample_sites(drawn).items() if not s["is_observed"]}

    def model_after_guide(images: Tensor) -> dict[str, Tensor]:
        run_on("vae.guide", vae.guide, images)
        trace = run_on("vae.model", poutine.condition(vae.model, data=latents), x.clone())
        return _per_image(trace, len(x))

    try:
        others = model_after_guide(1.0 - x)
        if _close(_per_image(drawn, len(x)), others):
            return
        # Noise would change them as well.
        own = model_after_guide(x.clone())
        if _close(own, others) or not _close(own, model_after_guide(x.clone())):
            return
    except ValueError:
        return  # a fault of the model's own, which those find who need it
    raise ValueError(
        f"vae.model gives images {_shown(own)} where vae.guide has run on them before, and "
        f"{_shown(others)} where it has run on others: it uses what the guide has kept, such as "
        "features of the encoder; compute in the model what it needs of the image"
    )


def _check_values(model: Trace, guide: Trace) -> None:
    """What a guide draws must have the shape of the model's latents, and a density there."""
    for latent in latent_sites(guide):
        if kind(latent) is Kind.DISCRETE:
            continue  # summed out
        name, value = latent["name"], latent["value"]
        site: Site = model.nodes[name]
        fn, expected = site["fn"], site["value"]
        if value.shape != expected.shape:
            raise ValueError(
                f"latent site {name!r} has the shape {tuple(value.shape)} in the guide and "
                f"{tuple(expected.shape)} in the model, rows first; make them alike"
            )
        inside = distributions.within_bounds(fn, value)
        if inside is not None and bool(value.isfinite().all()) and not bool(inside.all()):
            raise ValueError(
                f"the guide draws values of {name!r} outside the support of the model's "
                f"{type(distributions.innermost(fn)).__name__}, where the prior has no density; "
                "sample it from a family with the same support"
            )


def check_guide_rows(vae: VAE, x: Tensor) -> None:
    """:func:`check_rows` of the guide at images ``x``, which it must not change either."""

    def run(rows: Tensor, latents: LatentsLike) -> Trace:
        return run_untouched("vae.guide", take(vae, rows).guide, x[rows], latents=latents)

    with evaluation_mode(vae):
        check_rows("vae.guide", run, len(x), x)


def check_kept_guide(vae: VAE, x: Tensor) -> None:
    """Refuse a guide whose q(z | x), if it is kept, becomes another when it runs on other images.

    A transform that is told its image, ``flow.context = h``, is one object for all of them: what
    was found at a reference is then compared with itself.
    """
    few = slice(0, 3)
    vae, x = take(vae, few), x[few]
    with torch.no_grad(), evaluation_mode(vae), aside(x.device):
        trace = run_on("vae.guide", vae.guide, x.clone())
        before = _per_image(trace, len(x))
        run_on("vae.guide", vae.guide, 1.0 - x)
        after = _per_image(trace, len(x))
    if not _close(before, after):
        raise ValueError(
            f"vae.guide gives images {_shown(before)} and, once it has run on others, those very "
            f"distributions give {_shown(after)}: they share what it has computed of its last "
            "images, such as the context of a flow; make new transforms in each call, as "
            "ConditionalTransform.condition does"
        )


@contextlib.contextmanager
def evaluation_mode(*programs: Any) -> Iterator[None]:
    """Put every module that ``programs`` can reach into eval mode for a while.

    Which these are says :func:`pyro_vae_defence.models.modules.modules_of`. Train-mode batch norm
    couples the images of a batch and would be changed by mere evaluation, and dropout makes
    energies random. Modes are restored module by module.
    """
    modules = modules_of(*programs)
    note(modules)
    modes = [module.training for module in modules]
    try:
        for module in modules:
            _set_mode(module, False)
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            _set_mode(module, mode)


def _set_mode(module: nn.Module, training: bool) -> None:
    # A module's own setter looks through its parameters and children first.
    if "training" in module.__dict__:
        module.__dict__["training"] = training
    else:
        module.training = training


# --- Running programs -----------------------------------------------------------------------------


def run_on(name: str, program: PyroProgram, x: Tensor, *args: Any, **kwargs: Any) -> Trace:
    """:func:`get_trace` of the user's program ``name`` at images ``x``.

    Raises:
        ValueError: in place of whatever the program raises.
    """
    try:
        return get_trace(program, x, *args, **kwargs)
    except (torch.OutOfMemoryError, RefusalError):
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        call = name.rpartition(".")[2]
        mend = mend_networks(program, x) or (
            f"it must run on any number of images, as {call}(x), or as {call}(x, *conditions) "
            f'where images come with conditions, with one pyro.plate("{DATA_PLATE}", x.shape[0]) '
            "around all its sample sites, and .to_event(1) for what belongs to one image"
        )
        raise ValueError(
            f"{name} failed on images of shape {tuple(x.shape)}: {error}; {mend}"
        ) from error


def mend_networks(program: Any, x: Tensor, conditions: Sequence[Any] = ()) -> str | None:
    """What to do where a program failed since its networks do not fit images, or what comes with
    them; ``None`` if they do.

    A program may well convert its images, so that this is no error in itself.
    """
    parameters = _parameters(program)
    if any(parameter.is_inference() for parameter in parameters):
        return "the networks were made in torch.inference_mode: make or load them outside of it"
    dtypes = _dtypes(parameters)
    if len(dtypes) != 1:
        return None
    (dtype,) = dtypes
    to_vae = _CONVERSIONS.get(dtype, f"to({dtype})")
    if x.dtype == dtype:
        while isinstance(program, functools.partial) and program.args:  # of Pyro's handlers
            program = program.args[-1]
        if isinstance(program, BoundProgram):
            conditions = program.conditions
        for number, value in enumerate(conditions, 1):
            other = isinstance(value, Tensor) and value.dtype != dtype
            if other and value.is_floating_point():
                return (
                    f"the parameters are {dtype} and condition {number} beside the images is "
                    f"{value.dtype}: convert it, y.{to_vae}"
                )
        return None
    to_images = _CONVERSIONS.get(x.dtype, f"to({x.dtype})")
    # Images in less than single precision are refused.
    either = f"the images, x.{to_vae}, or " if dtype in _CONVERSIONS else ""
    return (
        f"the parameters are {dtype} and the images {x.dtype}: convert {either}the VAE, "
        f"vae.{to_images}"
    )


def _parameters(program: Any) -> list[Tensor]:
    return [p for module in modules_of(program) for p in module.parameters(recurse=False)]


def _dtypes(tensors: list[Tensor]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors}


_CONVERSIONS = {torch.float32: "float()", torch.float64: "double()"}


def check_rows(
    name: str, run: Callable[[Tensor, dict[str, Tensor]], Trace], num_images: int, like: Tensor
) -> None:
    """Refuse a program in which what is computed for an image is not the image's own.

    It is run on a few images, in reverse order at the same latents, which a program that has kept
    what it computed of as many images would not see, and on the last of them alone; in full
    float32, since TF32 rounds differently where a batch has another size. Densities are compared at
    what is observed and at what the observations' distributions draw: the images are so unlikely to
    draws of the prior that noise would be lost in the rounding of huge numbers.

    Warns of a likelihood that changes with latents to which no gradient leads: it was computed
    under ``torch.no_grad()``, or of detached latents. Chains stay exact and hardly move. Where it
    leads, it must be that of the density.

    Args:
        name: of the program, in messages.
        run: traces the program at some rows of its images, conditioned on values of its latents.
        num_images: how many images there are.
        like: a tensor on their device.

    Raises:
        ValueError: if it fails, its plates do not follow the number of images, it draws noise
            outside ``pyro.sample``, couples images, or changes its networks.
    """
    rows = torch.arange(3 if num_images > 2 else 2, device=like.device) % num_images
    weights = _weights(run)
    with torch.no_grad(), aside(like.device), full_on(like.device):
        drawn = run(rows, {})
        sites = [s for s in sample_sites(drawn).values() if not s["is_observed"]]
        for site in sites:
            data_frame(site, len(rows))
        latents = {site["name"]: site["value"] for site in sites}
        last = len(rows) - 1  # which a program that numbers its rows would not call the first
        own = {s["name"]: s["value"].narrow(rows_dim(s), last, 1) for s in sites}
        draws = _draws(drawn)
        own_draws = {n: v.narrow(rows_dim(drawn.nodes[n]), last, 1) for n, v in draws.items()}
        together = _per_image(drawn, len(rows), draws)
        turned_latents = {s["name"]: s["value"].flip(rows_dim(s)) for s in sites}
        turned_draws = {n: v.flip(rows_dim(drawn.nodes[n])) for n, v in draws.items()}
        other_order = run(rows.flip(0), turned_latents)
        turned = _per_image(other_order, len(rows), turned_draws)
        observes = any(site["is_observed"] for site in sample_sites(drawn).values())
        # Those with a discrete support need no gradient, floating-point numbers as they may be.
        moving = {s["name"] for s in sites if observes and not is_discrete(s["fn"])}
        leaves = {
            n: v.clone().requires_grad_(n in moving and v.is_floating_point())
            for n, v in own.items()
        }
        with torch.set_grad_enabled(observes), warnings.catch_warnings():
            # Programs that ask for a number of a latent are told so of those in use alone.
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True")
            alone = _per_image(run(rows[last:], leaves), 1, own_draws)
        in_order = _close({key: value.flip(0) for key, value in together.items()}, turned)
        if not (in_order and _observe_alike(drawn, other_order, turned=True)):
            # Which fault it is says a run that differs in nothing.
            second = run(rows, latents)
            again = _per_image(second, len(rows), draws)
            if not (_close(together, again) and _observe_alike(drawn, second)):
                raise ValueError(
                    f"{name} gives images {_shown(together)} and, at the same latents, "
                    f"{_shown(again)}: it draws noise outside pyro.sample, such as a binarisation, "
                    "dequantisation or F.dropout(h); fix the noise, F.dropout(h, training=self."
                    "training), or do it to the images beforehand"
                )
        if not _close({key: value[-1:] for key, value in together.items()}, alone):
            raise ValueError(
                f"{name} gives an image {_shown(together)} among others and {_shown(alone)} alone: "
                "it couples the images of a batch, as batch statistics do, or goes by their number "
                "in it; make what is computed of an image depend on that image alone"
            )
        if not in_order:
            raise ValueError(
                f"{name} gives images {_shown(together)} and in another order {_shown(turned)}: it "
                "keeps what it has computed of other images of the same shape, or goes by their "
                "number in the batch; make what is computed of an image depend on that image alone"
            )
        if observes:
            copies = rows[last:].expand(len(rows))
            dims = {s["name"]: rows_dim(s) for s in sites}
            _check_gradient(name, run, copies, alone, leaves, latents, dims)
    now = _weights(run)
    if changed := [key for key, was in weights.items() if key in now and not _equal(now[key], was)]:
        names = sorted({found for _, found in changed})
        raise ValueError(
            f"{name} changes {names} of its networks when it runs, in eval mode too, so that "
            "attacks and defences would move the VAE that they look at; update running averages "
            "and the like only if self.training"
        )


def _weights(program: Any) -> dict[tuple[int, str], Tensor]:
    """Sums of the parameters and buffers of a program's networks, but for those that count."""
    return {
        (id(module), name): value.detach().sum(dtype=torch.float64)
        for module in modules_of(program)
        for name, value in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        )
        if not is_lazy(value) and value.is_floating_point()
    }


def _draws(trace: Trace) -> dict[str, Tensor]:
    """A draw at every site that observes something, where its distribution has one.

    Points are left out: at a draw, which is theirs, rounding alone takes all of the density. So are
    classes that sample in their own way, such as pixel by pixel, a network at a time.
    """
    draws = {}
    for name, site in sample_sites(trace).items():
        fn = site["fn"]
        without = isinstance(fn, dist.Unit) or is_point(fn)
        own = own_methods(type(innermost(fn)), object) & {"sample", "rsample"}
        if site["is_observed"] and not (without or own):
            # Those that weigh only have none, nor have parameters out of range.
            with contextlib.suppress(AttributeError, RuntimeError, TypeError, ValueError):
                value = fn.sample()
                if value.shape == site["value"].shape:
                    draws[name] = value
    return draws


def _observe_alike(one: Trace, other: Trace, *, turned: bool = False) -> bool:
    """Whether two runs on the same images, or on these in reverse order, observe the same, in every
    part."""
    there = sample_sites(other)
    for name, site in sample_sites(one).items():
        if site["is_observed"]:
            value = there[name]["value"]
            value = value.flip(rows_dim(site)) if turned else value
            if not torch.allclose(site["value"], value, rtol=1e-5, atol=1e-6, equal_nan=True):
                return False
    return True


def _check_gradient(
    name: str,
    run: Callable[[Tensor, dict[str, Tensor]], Trace],
    copies: Tensor,
    found: dict[str, Tensor],
    leaves: dict[str, Tensor],
    latents: dict[str, Tensor],
    dims: dict[str, int],
) -> None:
    """Warn of a likelihood that changes with latents to which no gradient leads.

    Args:
        name: of the program.
        run: traces it at some rows of its images, conditioned on values of its latents.
        copies: the number of one image, as often as there are ``latents``, those of some images.
        found: what :func:`_per_image` has found of that image alone at the ``leaves``.
        leaves: its latents, of which those that are numbers require a gradient.
        latents: of some images, as many as there are ``copies``.
        dims: which dimension of latents the images are.
    """
    todo = [value.grad_fn for key, value in found.items() if key not in leaves]
    seen = set[Any]()
    while todo:
        if (node := todo.pop()) is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    reached = {id(getattr(node, "variable", None)) for node in seen}
    unseen = [n for n, v in leaves.items() if v.requires_grad and id(v) not in reached]
    if torch.is_inference_mode_enabled():
        return
    if not unseen:
        _check_slope(name, run, copies, leaves, latents, dims)
        return
    mixed = {n: v if n in unseen else leaves[n].expand_as(v) for n, v in latents.items()}
    moved = _per_image(run(copies, mixed), len(copies))
    moved = {key: value for key, value in moved.items() if key not in leaves}
    if not _close(moved, {key: value[:1].expand_as(value) for key, value in moved.items()}):
        warnings.warn(
            f"the likelihood of {name} changes with the latents {unseen}, and no gradient leads to "
            "them: it is computed under torch.no_grad(), or of values that are detached or "
            "compared. Chains stay exact but hardly move, since forces are those of the prior, and "
            "attacks see nothing of it; compute it from the latents by differentiable functions",
            stacklevel=2,
        )


_STEP = 1e-3  # of the way between two draws of the prior: few kinks of rectifiers lie there
_OFF = 0.1  # a share of the change, which curvature over such a step does not explain
_PLACES = (0.0, 0.25, 0.5)  # on that way: at one of them there may be a kink


def _check_slope(
    name: str,
    run: Callable[[Tensor, dict[str, Tensor]], Trace],
    copies: Tensor,
    leaves: dict[str, Tensor],
    latents: dict[str, Tensor],
    dims: dict[str, int],
) -> None:
    """Warn of a density that changes on a short way otherwise than its gradient says.

    Ways lead from ``latents`` to the ``leaves``, which are the last of them; other arguments are
    those of :func:`_check_gradient`. All of them must be off at several places, so that a kink at
    one is none: of a single image, there is but one way.
    """
    ways = {n: v.detach() - latents[n] for n, v in leaves.items() if v.requires_grad}

    def at(*shares: float, gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Log-densities there, a row per share, and their rounding; or slopes along the ways."""
        points = {
            n: torch.cat([v + s * ways[n] if n in ways else v for s in shares], dims[n])
            for n, v in latents.items()
        }
        moving = [points[n].requires_grad_(gradient) for n in ways]
        with torch.set_grad_enabled(gradient):
            trace = run(copies.repeat(len(shares)), points)
            sites = [s for s in sample_sites(trace).values() if not is_point(s["fn"])]
            total = torch.stack([log_prob_per_image(s, len(copies) * len(shares)) for s in sites])
            total = total.sum(0).view(len(shares), -1)
            if gradient:
                gradients = torch.autograd.grad(total.sum(), moving, allow_unused=True)
        size = sum(s["value"].numel() for s in sites) / total.numel()
        rounding = 20 * torch.finfo(total.dtype).eps * (total.detach().abs() + 10 * size)
        if gradient:
            total = torch.zeros_like(total)
            for (name, way), found in zip(ways.items(), gradients, strict=True):
                if found is not None:
                    total += image_rows(found * way, trace.nodes[name]).sum(1)
        return total, rounding

    if not ways:
        return
    for place in _PLACES:
        (before, after), (rounding, _) = at(place, place + 2 * _STEP)
        ((slope,), _) = at(place + _STEP, gradient=True)
        change, foretold = after - before, 2 * _STEP * slope
        most = torch.maximum(change.abs(), foretold.abs())
        off = ((change - foretold).abs() > _OFF * most + rounding) & foretold.isfinite()
        if not bool(off[:-1].all()):
            return
    warnings.warn(
        f"the density of {name} changes by {float(change[0]):.4g} nats on a short way of its "
        f"latents where its gradient foretells {float(foretold[0]):.4g}: a part of it is "
        "detached, or its gradient is estimated straight through a step. Chains with a "
        "Metropolis test stay exact, with forces that lead elsewhere; others and searches for "
        "modes go astray; compute it from the latents by differentiable functions",
        stacklevel=2,
    )


def _per_image(
    trace: Trace, num_images: int, draws: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Log-probabilities of all sites by image, and where a Delta is.

    Of the sites of ``draws`` also those of draws, in multiples of 1 + 1% of their elements: sums of
    so many numbers may be zero, up to their rounding.
    """
    found = {}
    for name, value in (draws or {}).items():
        with contextlib.suppress(IndexError, KeyError, RuntimeError, ValueError):
            log_prob = log_prob_per_image({**trace.nodes[name], "value": value}, num_images)
            found[f"a draw of {name}"] = log_prob / (1 + 0.01 * value.numel() / num_images)
    for name, site in sample_sites(trace).items():
        if is_point(site["fn"]):
            found[name] = image_rows(innermost(site["fn"]).v, site)
            continue
        try:
            log_prob = log_prob_per_image(site, num_images)
        except torch.OutOfMemoryError:
            raise
        except (IndexError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"site {name!r}, a {type(innermost(site['fn'])).__name__}, has no log-probability "
                f"at its values of shape {tuple(site['value'].shape)}: {error}; an observation "
                "must be of its distribution's kind, a latent's density known everywhere: of a "
                "flow without an inverse, as Planar, sample what it transforms as noise, "
                "infer={'is_auxiliary': True}, and the latent as Delta(value, log_density=...)"
            ) from error
        if log_prob.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"site {name!r} has log-probabilities in {log_prob.dtype}, sums that lose their "
                "differences; convert its value and its parameters, as in "
                "dist.Normal(loc.float(), scale.float()), where a network computes in half "
                "precision"
            )
        found[name] = log_prob
    return found


def _close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(
        name in other and torch.allclose(value, other[name], rtol=1e-4, atol=1e-3, equal_nan=True)
        for name, value in one.items()
    )


def _shown(found: dict[str, Tensor]) -> str:
    return "log-probabilities " + ", ".join(f"{n} {float(v.sum()):.6g}" for n, v in found.items())


def run_untouched(
    name: str,
    program: PyroProgram,
    x: Tensor,
    *args: Any,
    latents: LatentsLike | None = None,
    handler: Messenger | None = None,
    **kwargs: Any,
) -> Trace:
    """:func:`run_on` of a program, conditioned on ``latents`` or under a ``handler``, if any.

    Raises:
        ValueError: if it changes in place what it is given or has sampled, and as :func:`run_on`.
    """
    others = [*args, *kwargs.values()]
    if isinstance(program, BoundProgram):
        others += [*program.conditions, *program.keywords.values()]
    given = [("its images", x)]
    given += [("what comes with its images", v) for v in others if isinstance(v, Tensor)]
    before = [value.clone() for _, value in given]
    samples = _Samples()
    handled = poutine.condition(program, data=dict(latents)) if latents else program
    handled = handled if handler is None else handler(handled)
    trace = run_on(name, samples(handled), x, *args, **kwargs)
    for (what, value), was in zip(given, before, strict=True):
        if not _equal(value, was):
            raise ValueError(f"{name} changes {what} in place; let it work on a copy, x.clone()")
    if changed := samples.changed():
        raise ValueError(
            f"{name} changes in place what it has sampled at {changed}, as z.clamp_() and "
            "nn.ReLU(inplace=True) do, so that its density is that of another value; let it work "
            "on a copy, z.clone()"
        )
    return trace


class _Samples(Messenger):
    """Remembers latents as they were when they were sampled."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[str, tuple[Tensor, Tensor, int]] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if isinstance(value, Tensor) and not value.is_inference():
            self._found[msg["name"]] = value, value.clone(), value._version

    def changed(self) -> list[str]:
        """Names of the sites whose values have been changed since.

        A view counts the changes of all of the tensor that it is a part of.
        """
        return [
            name
            for name, (value, was, version) in self._found.items()
            if not _equal(value, was) or (value._version != version and not value._is_view())
        ]


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.device.type == "meta":  # without values
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())


_STRAIGHT_THROUGH = (
    dist.RelaxedOneHotCategoricalStraightThrough,
    dist.RelaxedBernoulliStraightThrough,
)


def check_latents(trace: Trace) -> None:
    """Refuse latents whose rows are not images, or whose draws have no density.

    With a plate left of the data plate the first dimension is another; straight-through relaxations
    draw from the edge of their support.
    """
    for site in latent_sites(trace):
        if isinstance(innermost(site["fn"]), _STRAIGHT_THROUGH):
            raise ValueError(
                f"latent site {site['name']!r} draws values at which "
                f"{type(innermost(site['fn'])).__name__} has no density; use "
                "RelaxedOneHotCategorical, or a discrete OneHotCategorical, which is summed out"
            )
        if site["value"].dim() != -rows_dim(site):
            raise ValueError(
                f"latent site {site['name']!r} has a plate left of the data plate; make the data "
                "plate the leftmost one"
            )
