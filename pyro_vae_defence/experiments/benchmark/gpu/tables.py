"""Tables of the benchmark of a GPU, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pyro_vae_defence.experiments.tables import at, section, table

GRADIENTS_PER_SECOND = 1e6
DEFENCE_SECONDS = 10.0
TIMES_NUMPYRO = 2.0

_FAILED = "failed"
_PRECISIONS = ("float32", "TF32", "bfloat16")
_PLAIN = ("captured", "recorded", "eager")
_COMPILED = ("captured", "compiled", "captured, compiled")


def gpu_tables(result: dict[str, Any]) -> str:
    """All tables of a result file; sections that are missing are left out."""
    config, sections = result["config"], result["sections"]
    found = {name: entry.get("results", {}) for name, entry in sections.items()}
    parts = _goals(found, _device(result) is not None)
    if "card" in found:
        parts += _card(found["card"])
    for kind, engines in (("gradients", _PLAIN), ("compiled", _COMPILED)):
        parts += _rates(found, kind, engines, config)
    if "defence" in found:
        parts += _defence(found["defence"])
    for name in ("numpyro", "torchebm"):
        if name in found:
            parts += _library(name, found[name], config)
    if "training" in found:
        parts += _training(found["training"], config)
    if "attack" in found:
        parts += _attack(found["attack"], config)
    for name, entry in found.get("profile", {}).items():
        parts += _profile(name, entry, config)
    parts += _remarks(sections)
    spent = sum(entry["wall_seconds"] for entry in sections.values()) / 60
    versions = result["provenance"]
    machine = (
        f"{versions['device']}, driver {versions.get('driver', 'unknown')}, CUDA "
        f"{versions['cuda']}, cuDNN {versions['cudnn']}"
        if _device(result)
        else "**A run on a CPU**, which tries the program and measures no GPU"
    )
    note = f"{machine}; model `{config['model']}`, seed {config['seed']}; {spent:.0f} minutes."
    return section("### One GPU", note, parts, result)


def _device(result: dict[str, Any]) -> str | None:
    return result["provenance"].get("device")


def _seconds(value: float) -> str:
    return f"{value:.3g}"


def _cell(entry: Mapping[str, Any] | None, key: str, form: str) -> str:
    """A number of an entry, or that there is none."""
    if entry is None:
        return ""
    if "error" in entry:
        return _FAILED
    return format(entry[key], form) if key in entry else ""


# --- Goals ----------------------------------------------------------------------------------------


def _goals(found: dict[str, Any], on_gpu: bool) -> list[str]:
    rows = [_rate_goal(found), _defence_goal(found), _numpyro_goal(found), _exact_goal(found)]
    shown = []
    for goal, measured, met in rows:
        if met is None or not on_gpu:
            shown.append([goal, measured, "not measured yet"])
        else:
            shown.append([goal, measured, "met" if met else "not met"])
    return table(["goal", "measured", ""], shown)


Goal = tuple[str, str, bool | None]


def _rate_goal(found: dict[str, Any]) -> Goal:
    rates = [
        (entry["gradients_per_second"], f"{way}, {name.split()[1]} rows")
        for name, ways in found.items()
        if name.startswith(("gradients", "compiled"))
        for way, entry in ways.items()
        if "gradients_per_second" in entry
    ]
    goal = f"{GRADIENTS_PER_SECOND:,.0f} gradients per second, exact chains"
    if not rates:
        return goal, "", None
    best, way = max(rates)
    return goal, f"{best:,.0f} ({way})", best >= GRADIENTS_PER_SECOND


def _defence_goal(found: dict[str, Any]) -> Goal:
    goal = f"10,000 images with 4 chains stationary in less than {DEFENCE_SECONDS:g} seconds"
    section = found.get("defence", {})
    times = [
        (entry["seconds"], way)
        for way, entry in section.get("ways", {}).items()
        if "seconds" in entry and not way.endswith("to the end")
    ]
    if not times:
        return goal, "", None
    seconds, way = min(times)
    of = f"{section['images']:,} images with {section['chains']} chains"
    enough = section["images"] >= 10_000 and section["chains"] >= 4
    met = section["settled"] and seconds < DEFENCE_SECONDS if enough else None
    return goal, f"{_seconds(seconds)} s ({way}; {of})", met


def _numpyro_goal(found: dict[str, Any]) -> Goal:
    goal = f"at least {TIMES_NUMPYRO:g} times NumPyro, in the same precision"
    ratios = [
        (ratio, precision)
        for precision in ("float32", "TF32")
        if (ratio := _ratio(at(found, "numpyro/ways") or {}, f"NumPyro, {precision}")) is not None
    ]
    if not ratios:
        return goal, "", None
    measured = ", ".join(f"{ratio:.2f} ({precision})" for ratio, precision in ratios)
    return goal, measured, min(ratios)[0] >= TIMES_NUMPYRO


def _exact_goal(found: dict[str, Any]) -> Goal:
    """The same of chains whose energies are in float32, however their forces are rounded."""
    goal = f"at least {TIMES_NUMPYRO:g} times NumPyro, chains exact in float32"
    ways = at(found, "numpyro/ways") or {}
    rates = [
        (entry["gradients_per_second"], way + "; fell back" * ("why_not" in entry))
        for way, entry in ways.items()
        if "gradients_per_second" in entry and "NumPyro" not in way
    ]
    theirs = at(ways, "NumPyro, float32/gradients_per_second")
    if not rates or not theirs:
        return goal, "", None
    best, way = max(rates)
    return goal, f"{best / theirs:.2f} ({way})", best / theirs >= TIMES_NUMPYRO


def _ratio(ways: Mapping[str, Any], theirs: str) -> float | None:
    """How many times as fast the captured chains of the same precision are."""
    precision = theirs.rpartition(", ")[2] if ", " in theirs else "float32"
    own = at(ways, f"captured, {precision}/gradients_per_second")
    other = at(ways, f"{theirs}/gradients_per_second")
    return own / other if own and other else None


# --- Sections -------------------------------------------------------------------------------------


def _card(found: dict[str, Any]) -> list[str]:
    if not found:
        return []
    rates, gradient = found["rates"], found["gradient"]
    rows = []
    for name, entry in rates.items():
        limit = ""
        if "error" not in entry:
            needed = gradient["bytes_per_row" if name == "copy" else "flops_per_row"]
            limit = f"{entry['per_second'] / needed:,.0f}"
        unit = "TB/s" if name == "copy" else "TFLOP/s"
        rate = f"{entry['per_second'] / 1e12:.3g} {unit}" if limit else _FAILED
        what = "copy" if name == "copy" else f"matrix product, {name}"
        rows.append([what, rate, limit])
    return [
        "#### The card",
        "",
        f"One gradient takes {gradient['flops_per_row'] / 1e6:.2f} MFLOP per row "
        f"({gradient['flops_per_row_as_written'] / 1e6:.2f} by the layers as written), and its "
        f"operators read and write {gradient['bytes_per_row'] / 1e3:.0f} kB in float32, one after "
        "the other. The last column is how many gradients per second the rate would allow if "
        "nothing else took time.",
        "",
        *table(["", "rate", "gradients per second at that rate"], rows),
    ]


def _rates(
    found: dict[str, Any], kind: str, engines: Sequence[str], config: dict[str, Any]
) -> list[str]:
    sizes = sorted(int(name.split()[1]) for name in found if name.startswith(f"{kind} "))
    if not sizes:
        return []
    what = {"gradients": "Gradients per second", "compiled": "The same, compiled"}[kind]
    note = (
        f"Within transitions of {config['num_steps']} steps; in brackets the share of the card's "
        "matrix rate in the precision of the forces. Energies that are compared are in float32."
    )
    lines = [f"#### {what}", "", note, ""]
    flops = at(found, "card/gradient/flops_per_row")
    for precision in _PRECISIONS:
        rate = at(found, f"card/rates/{precision}/per_second")
        names = [f"{engine}, {precision}" for engine in engines]
        if not any(name in found[f"{kind} {rows}"] for rows in sizes for name in names):
            continue
        rows = []
        for size in sizes:
            row = [f"{size:,}"]
            for name in names:
                entry = found[f"{kind} {size}"].get(name)
                cell = _cell(entry, "gradients_per_second", ",.0f")
                if entry and flops and rate and "gradients_per_second" in entry:
                    cell += f" ({entry['gradients_per_second'] * flops / rate:.1%})"
                row.append(cell)
            rows.append(row)
        lines += [f"Forces in {precision}:", "", *table(["rows", *engines], rows)]
    first = next(int(name.split()[1]) for name in found if name.startswith(f"{kind} "))
    lines += [
        f"At {first:,} rows:",
        "",
        *table(
            [
                "",
                "first transition (s)",
                "memory (MiB)",
                "acceptance",
                "largest error of an energy (nats)",
            ],
            [
                [
                    name,
                    _cell(entry, "first_seconds", ".3g"),
                    _cell(entry, "peak_mib", ",.0f"),
                    _cell(entry, "acceptance_rate", ".2f"),
                    _cell(entry, "largest_energy_error", ".2g"),
                ]
                for name, entry in found[f"{kind} {first}"].items()
            ],
        ),
    ]
    return lines


def _defence(found: dict[str, Any]) -> list[str]:
    if not found:
        return []
    gold = found["gold"]
    apart = gold["halves_apart"]
    halves = "" if apart is None else f", halves from other starts {apart:+.2f} nats apart"
    reached = (
        f"stationary after {found['gradients_per_chain']} gradients"
        if found["settled"]
        else f"**not stationary** within {found['gradients_to_the_end']} gradients"
    )
    images = f"{found['images']:,} images"
    if found["different_images"] < found["images"]:
        images += f" ({found['different_images']:,} different ones, taken in turn)"
    rows = [
        [
            name,
            _cell(entry, "seconds", ".3g"),
            _cell(entry, "first_seconds", ".3g"),
            _cell(entry, "energy_above_gold", "+.2f"),
        ]
        for name, entry in found["ways"].items()
    ]
    return [
        "#### A defence until its energy is stationary",
        "",
        f"{images}, {found['chains']} chains each: {reached} per chain, which is "
        f"{found['transitions']} transition(s); to the end are {found['gradients_to_the_end']}. "
        f"Gold run: {gold['images']:,} images, {gold['transitions_per_chain']} transitions per "
        f"chain, mean energy {gold['energy']:.2f} nats{halves}.",
        "",
        *table(["", "seconds", "the first time", "energy above gold (nats)"], rows),
    ]


def _library(name: str, found: dict[str, Any], config: dict[str, Any]) -> list[str]:
    if not found:
        return []
    title = {"numpyro": "NumPyro", "torchebm": "torchebm"}[name]
    version = {
        "numpyro": lambda: (
            f"NumPyro {found['numpyro']} on JAX {found['jax']}, relative differences of the "
            f"decoders {found['energy_difference']:.1g} (energies) and "
            f"{found['gradient_difference']:.1g} (gradients)"
        ),
        "torchebm": lambda: f"torchebm {found['torchebm']}",
    }[name]()
    rows = []
    for way, entry in found["ways"].items():
        ratio = None if way.startswith("captured") else _ratio(found["ways"], way)
        first = entry.get("compile_seconds", entry.get("first_seconds"))
        rows.append(
            [
                way,
                _cell(entry, "gradients_per_second", ",.0f"),
                "" if ratio is None else f"{ratio:.2f}",
                "" if first is None else _seconds(first),
                _cell(entry, "acceptance_rate", ".2f"),
            ]
        )
    note = (
        f"{found['rows']:,} chains, {config['library_transitions']} transitions of "
        f"{config['num_steps']} steps; {version}."
    )
    if (asked := at(found, "ways/torchebm/gradients_per_transition")) is not None:
        energies = at(found, "ways/torchebm/energies_per_transition")
        note += (
            f" torchebm evaluates {asked:g} gradients and {energies:g} energies per transition "
            f"of {config['num_steps']} steps; the rate counts the steps."
        )
    columns = [
        "",
        "gradients per second",
        "captured, same precision, is faster by",
        "first run or compilation (s)",
        "acceptance",
    ]
    return [f"#### {title}", "", note, "", *table(columns, rows)]


def _training(found: dict[str, Any], config: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            _cell(entry, "seconds", ".3g"),
            _cell(entry, "first_seconds", ".3g"),
            _cell(entry, "train_loss", ".1f"),
        ]
        for name, entry in found.items()
    ]
    if not rows:
        return []
    columns = ["", "seconds", "the first epoch", "loss of the second (nats)"]
    note = f"{config['epoch_images']:,} images."
    return ["#### An epoch of training", "", note, "", *table(columns, rows)]


def _attack(found: dict[str, Any], config: dict[str, Any]) -> list[str]:
    rows = [[name, _cell(entry, "seconds_per_step", ".3g")] for name, entry in found.items()]
    if not rows:
        return []
    note = f"{config['ascent_images']:,} images."
    return ["#### A step of APGD", "", note, "", *table(["objective", "seconds"], rows)]


def _profile(name: str, entry: dict[str, Any], config: dict[str, Any]) -> list[str]:
    if "error" in entry:
        return []
    rows = [
        [f"`{kernel['name']}`".replace("|", "\\|"), f"{kernel['share']:.1%}", f"{kernel['count']}"]
        for kernel in entry["longest"]
    ]
    return [
        f"#### Profile: {name}",
        "",
        f"One transition of {config['num_steps']} steps with {config['profile_rows']:,} chains "
        f"takes {1e3 * entry['wall_seconds']:.3g} ms, of which kernels run "
        f"{1e3 * entry['busy_seconds']:.3g} ms ({entry['kernels']} of them) and none runs "
        f"{entry['idle_share']:.0%}.",
        "",
        *table(["kernel", "share of that time", "calls"], rows),
    ]


# --- What was not measured ------------------------------------------------------------------------


def _remarks(sections: dict[str, Any]) -> list[str]:
    lines = list(_reasons(sections))
    return ["#### Not as asked", "", *lines, ""] if lines else []


def _reasons(sections: dict[str, Any]) -> Iterable[str]:
    for name, entry in sections.items():
        if "error" in entry:
            yield f"- {name}: {entry['error']}"
        results = entry.get("results", {})
        for ways in (results, results.get("ways", {}), results.get("rates", {})):
            for way, found in ways.items():
                if isinstance(found, dict):
                    for key, what in (("error", "failed"), ("why_not", "fell back")):
                        if key in found:
                            yield f"- {name}, {way}: {what}: {found[key]}"
