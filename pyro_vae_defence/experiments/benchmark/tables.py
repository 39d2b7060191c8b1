"""Tables of a benchmark's result file, in Markdown."""

from __future__ import annotations

from typing import Any

from pyro_vae_defence.defence.mcmc import PAPER_SETTINGS
from pyro_vae_defence.experiments.benchmark.samplers import SAMPLERS
from pyro_vae_defence.experiments.tables import interval, source, table

_ENGINES = {
    "hmc": "this library, HMC, all images at once",
    "nuts": "this library, NUTS, all images at once",
    "pyro_hmc": "Pyro, HMC, image by image",
    "pyro_nuts": "Pyro, NUTS, image by image",
    "numpyro_hmc": "NumPyro, HMC, vmap over images, jit",
    "numpyro_nuts": "NumPyro, NUTS, vmap over images, jit",
}


def benchmark_tables(result: dict[str, Any]) -> str:
    """All tables of a result file; sections that are missing are left out."""
    config = result["config"]
    sections = {name: entry["results"] for name, entry in result["sections"].items()}
    seconds = sections.get("seconds_per_gradient", {})
    parts = []
    for name, section in sections.items():
        if name.startswith("chains"):
            parts += _chains(section, seconds, config)
    if "decoder" in sections:
        parts += _decoder(sections["decoder"])
    if "engines" in sections:
        parts += _engines(sections["engines"], config)
    if "memory" in sections:
        parts += _memory(sections["memory"])
    spent = sum(entry["wall_seconds"] for entry in result["sections"].values()) / 60
    parts += [
        f"{source(result)}, {result['provenance']['machine']}; model `{config['model']}`, "
        f"images of `{config['dataset']}`, seed {config['seed']}; {spent:.0f} minutes.",
        "",
    ]
    return "\n".join(parts)


def _table(rows: list[dict[str, str]]) -> list[str]:
    """A table of rows, each from a column's heading to its cell."""
    return table(list(rows[0]), [row.values() for row in rows]) if rows else []


def _chains(
    section: dict[str, Any], seconds: dict[str, float], config: dict[str, Any]
) -> list[str]:
    gold, radius = section["gold"], f"radius {section['radius']:g}"
    rhat = gold["rhat_energy"], gold["rhat_latents"]
    rows, rates = [], []
    for name, entry in section["samplers"].items():
        label, unit = SAMPLERS[name].label, seconds.get(name)
        settled = [entry["gradients_energy"], entry["gradients_similarity"]]
        shown = [f"not within {entry['budget']:,}" if n is None else f"{n:,}" for n in settled]
        known = unit is not None and None not in settled
        rows.append(
            {
                "kernel": label,
                "gradients to energy": shown[0],
                "gradients to MSSSIM": shown[1],
                "seconds per image": f"{max(settled) * unit:.3g}" if known else "",
                "energy above gold at the end (nats)": interval(entry["excess_energy_last"], 1),
                "acceptance": f"{entry['acceptance_rate']:.2f}",
                "divergences": f"{entry['divergences']}",
            }
        )
        if "ess" in entry:
            energy, latents, slowest = (
                entry["ess"][f"{what}_per_gradient"]
                for what in ("energy", "latents", "worst_latent")
            )
            rates.append(
                {
                    "kernel": label,
                    "energy, per 1,000 gradients": f"{1000 * energy:.3g}",
                    "latents, per 1,000 gradients": f"{1000 * latents:.3g}",
                    "slowest latent": f"{1000 * slowest:.3g}",
                    "energy, per second": f"{energy / unit:.3g}" if unit else "",
                    "latents, per second": f"{latents / unit:.3g}" if unit else "",
                }
            )
    lines = [
        f"### Until stationary, {radius}",
        "",
        f"{config['num_images']} attacked images, {config['num_chains']} chains each. Gold run: "
        f"{gold['transitions_per_chain']:,} transitions ({gold['gradients_per_chain']:,} "
        f"gradients) per chain after warm-up; mean energy {gold['energy']:.2f} ± "
        f"{gold['energy_monte_carlo_error']:.2f} nats, MSSSIM[paper] "
        f"{interval(gold['similarity'])}; R-hat of the energy {rhat[0]['median']:.3f} in the "
        f"median over images and {rhat[0]['max']:.3f} at most, of the latents "
        f"{rhat[1]['median']:.3f} and {rhat[1]['q99']:.3f} (99%).",
        "",
        *_table(rows),
        *_against_paper(section["samplers"], seconds),
    ]
    if len(rates) == len(rows):
        lines += [f"#### Effective sample size afterwards, {radius}", "", *_table(rates)]
    return lines


def _against_paper(samplers: dict[str, Any], seconds: dict[str, float]) -> list[str]:
    """What the fastest exact kernel saves against the paper's rule and its full budget."""
    if "paper" not in samplers or "paper" not in seconds:
        return []
    num_steps = PAPER_SETTINGS["mnist"].num_transitions
    full = 1 + 20 * (num_steps // 2 + num_steps)
    budget_seconds = full * seconds["paper"]
    lines = [
        f"The paper's full budget, {full:,} gradients, takes {budget_seconds:.3g} seconds per "
        "image (its seconds per gradient were measured on a share of it)."
    ]
    reached = {
        name: entry["gradients_energy"]
        for name, entry in samplers.items()
        if name != "paper"
        and name in seconds
        and SAMPLERS[name].exact
        and entry["gradients_energy"] is not None
    }
    if reached:
        best = min(reached, key=lambda name: reached[name])
        theirs = samplers["paper"]["gradients_energy"]
        least = "" if theirs is not None else "at least "
        ratio = (theirs or samplers["paper"]["budget"]) / reached[best]
        saved = budget_seconds / (reached[best] * seconds[best])
        lines.append(
            f"The fastest exact kernel, {SAMPLERS[best].label}, needs {least}{ratio:.1f} times "
            "fewer gradients than the paper's rule to reach the energy, and "
            f"{saved:.0f} times less wall time than the full budget."
        )
    return [*lines, ""]


def _decoder(section: dict[str, Any]) -> list[str]:
    rows = [
        {
            "rows": f"{entry['rows']}",
            "MFLOP per row": f"{entry['flops_per_row'] / 1e6:.1f}",
            "µs per row": f"{entry['seconds_per_row'] * 1e6:.0f}",
            "share of the matmul rate": f"{100 * entry['share_of_matmul_rate']:.0f}%",
            "the same, layers as written": f"{100 * entry['share_as_written']:.0f}%",
        }
        for entry in section["rows"]
    ]
    size, operators = section["matmul_size"], section["operators"]
    shares = [f"`{name}` {100 * share:.0f}%" for name, share in operators["shares"].items()]
    return [
        "### One gradient against the matrix-multiply rate",
        "",
        f"A float32 product of two {size} x {size} matrices ran at "
        f"{section['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s. One gradient through the layers "
        f"as they are written takes {section['flops_per_row_as_written'] / 1e6:.1f} MFLOP per row.",
        "",
        *_table(rows),
        f"CPU time at {operators['rows']} rows: {', '.join(shares)}.",
        "",
    ]


def _engines(section: dict[str, Any], config: dict[str, Any]) -> list[str]:
    found = section["engines"]
    rows = []
    for name, entry in found.items():
        ours = found[name.split("_")[-1]]
        seconds, gradients = entry["seconds_per_image"], entry["gradients"]
        relative = seconds / ours["seconds_per_image"]
        rows.append(
            {
                "": _ENGINES[name],
                "gradients per image": f"{gradients:.0f}",
                "acceptance": f"{entry['acceptance_rate']:.2f}",
                "seconds per image": f"{seconds:.3g}",
                "µs per gradient": f"{1e6 * seconds / gradients:.0f}",
                "times this library's, per image": f"{relative:.2f}",
                "per gradient": f"{relative * ours['gradients'] / gradients:.2f}",
            }
        )
    numpyro = section["numpyro"]
    if isinstance(numpyro, str):
        note = f"{numpyro}: not measured."
    else:
        waits = [e["compile_seconds"] for e in found.values() if "compile_seconds" in e]
        note = (
            f"NumPyro {numpyro['numpyro']} on JAX {numpyro['jax']}; compiling took "
            f"{' and '.join(f'{wait:.1f}' for wait in waits)} seconds and is not counted. "
            "Relative differences of the decoders: energies "
            f"{numpyro['energy_difference']:.1g}, gradients {numpyro['gradient_difference']:.1g}."
        )
    return [
        "### Other libraries",
        "",
        f"{section['images']} images, {section['transitions']} transitions; HMC with "
        f"{config['engine_steps']} leapfrog steps, NUTS with trees of at most "
        f"{config['engine_tree_depth']} doublings.",
        "",
        *_table(rows),
        note,
        "",
    ]


def _memory(section: dict[str, Any]) -> list[str]:
    rows = [
        {
            "images": f"{entry['images']:,}",
            "before (MiB)": f"{entry['idle_mib']:.0f}",
            "peak (MiB)": f"{entry['peak_mib']:.0f}",
        }
        for entry in section["measured"]
    ]
    return [
        "### Memory",
        "",
        f"Peak resident memory of HMC in micro-batches of {section['batch_size']:,} chains.",
        "",
        *_table(rows),
    ]
