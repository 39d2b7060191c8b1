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
    """All tables of a result file of :func:`~pyro_vae_defence.experiments.benchmark.run.benchmark`.

    Sections that are missing are left out.
    """
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


def _chains(
    section: dict[str, Any], seconds: dict[str, float], config: dict[str, Any]
) -> list[str]:
    gold = section["gold"]
    rhat = gold["rhat_energy"], gold["rhat_latents"]
    rows, rates = [], []
    for name, entry in section["samplers"].items():
        energy, similarity = entry["gradients_energy"], entry["gradients_similarity"]
        known = None not in (energy, similarity) and name in seconds
        rows.append(
            [
                SAMPLERS[name].label,
                _count(energy, entry["budget"]),
                _count(similarity, entry["budget"]),
                f"{max(energy, similarity) * seconds[name]:.3g}" if known else "",
                interval(entry["excess_energy_last"], 1),
                f"{entry['acceptance_rate']:.2f}",
                f"{entry['divergences']}",
            ]
        )
        if "ess" in entry:
            ess = [entry["ess"][f"{what}_per_gradient"] for what in ("energy", "latents")]
            per_gradient = [*ess, entry["ess"]["worst_latent_per_gradient"]]
            rates.append(
                [
                    SAMPLERS[name].label,
                    *(f"{1000 * rate:.3g}" for rate in per_gradient),
                    *(f"{rate / seconds[name]:.3g}" if name in seconds else "" for rate in ess),
                ]
            )
    columns = [
        "kernel",
        "gradients to energy",
        "gradients to MSSSIM",
        "seconds per image",
        "energy above gold at the end (nats)",
        "acceptance",
        "divergences",
    ]
    lines = [
        f"### Until stationary, radius {section['radius']:g}",
        "",
        f"{config['num_images']} attacked images, {config['num_chains']} chains each. Gold run: "
        f"{gold['transitions_per_chain']:,} transitions ({gold['gradients_per_chain']:,} "
        f"gradients) per chain after warm-up; mean energy {gold['energy']:.2f} ± "
        f"{gold['energy_monte_carlo_error']:.2f} nats, MSSSIM[paper] "
        f"{interval(gold['similarity'])}; R-hat of the energy {rhat[0]['median']:.3f} in the "
        f"median over images and {rhat[0]['max']:.3f} at most, of the latents "
        f"{rhat[1]['median']:.3f} and {rhat[1]['q99']:.3f} (99%).",
        "",
        *table(columns, rows),
        *_against_paper(section["samplers"], seconds),
    ]
    if len(rates) == len(rows):
        columns = [
            "kernel",
            "energy, per 1,000 gradients",
            "latents, per 1,000 gradients",
            "slowest latent",
            "energy, per second",
            "latents, per second",
        ]
        title = f"#### Effective sample size afterwards, radius {section['radius']:g}"
        lines += [title, "", *table(columns, rates)]
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
        [
            f"{entry['rows']}",
            f"{entry['flops_per_row'] / 1e6:.1f}",
            f"{entry['seconds_per_row'] * 1e6:.0f}",
            f"{100 * entry['share_of_matmul_rate']:.0f}%",
            f"{100 * entry['share_as_written']:.0f}%",
        ]
        for entry in section["rows"]
    ]
    columns = [
        "rows",
        "MFLOP per row",
        "µs per row",
        "share of the matmul rate",
        "the same, layers as written",
    ]
    size, operators = section["matmul_size"], section["operators"]
    shares = ", ".join(
        f"`{name}` {100 * share:.0f}%" for name, share in operators["shares"].items()
    )
    return [
        "### One gradient against the matrix-multiply rate",
        "",
        f"A float32 product of two {size} x {size} matrices ran at "
        f"{section['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s. One gradient through the layers "
        f"as they are written takes {section['flops_per_row_as_written'] / 1e6:.1f} MFLOP per row.",
        "",
        *table(columns, rows),
        f"CPU time at {operators['rows']} rows: {shares}.",
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
            [
                _ENGINES[name],
                f"{gradients:.0f}",
                f"{entry['acceptance_rate']:.2f}",
                f"{seconds:.3g}",
                f"{1e6 * seconds / gradients:.0f}",
                f"{relative:.2f}",
                f"{relative * ours['gradients'] / gradients:.2f}",
            ]
        )
    columns = [
        "",
        "gradients per image",
        "acceptance",
        "seconds per image",
        "µs per gradient",
        "times this library's, per image",
        "per gradient",
    ]
    numpyro = section["numpyro"]
    if isinstance(numpyro, str):
        note = f"{numpyro}: not measured."
    else:
        compiled = " and ".join(
            f"{entry['compile_seconds']:.1f}"
            for entry in found.values()
            if "compile_seconds" in entry
        )
        note = (
            f"NumPyro {numpyro['numpyro']} on JAX {numpyro['jax']}; compiling took {compiled} "
            "seconds and is not counted. Relative differences of the decoders: energies "
            f"{numpyro['energy_difference']:.1g}, gradients {numpyro['gradient_difference']:.1g}."
        )
    return [
        "### Other libraries",
        "",
        f"{section['images']} images, {section['transitions']} transitions; HMC with "
        f"{config['engine_steps']} leapfrog steps, NUTS with trees of at most "
        f"{config['engine_tree_depth']} doublings.",
        "",
        *table(columns, rows),
        note,
        "",
    ]


def _memory(section: dict[str, Any]) -> list[str]:
    rows = [
        [f"{entry['images']:,}", f"{entry['idle_mib']:.0f}", f"{entry['peak_mib']:.0f}"]
        for entry in section["measured"]
    ]
    return [
        "### Memory",
        "",
        f"Peak resident memory of HMC in micro-batches of {section['batch_size']:,} chains.",
        "",
        *table(["images", "before (MiB)", "peak (MiB)"], rows),
    ]


def _count(gradients: int | None, budget: int) -> str:
    return f"not within {budget:,}" if gradients is None else f"{gradients:,}"
