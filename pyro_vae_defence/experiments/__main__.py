"""Command line of the studies: ``python -m pyro_vae_defence.experiments STUDY NAME --set
KEY=VALUE``.

Each study is a command. ``STUDY --help`` prints its question, its names and every field of its
configuration. Without a name, a study writes the tables and figures of its output directory anew.
``torchrun --nproc-per-node=N -m pyro_vae_defence.experiments STUDY NAME`` has N processes share it.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae_defence.experiments.configuration import describe, parse_settings

if TYPE_CHECKING:
    from pyro_vae_defence.experiments.study import Measurement, Study

PROGRAM = "python -m pyro_vae_defence.experiments"

STUDIES = {
    "train": ("train:Train", "classify:TrainClassifier"),
    "evaluate": ("evaluate:Evaluate",),
    "attack": ("attack:Attack",),
    "published": ("published:Published",),
    "defend": ("defend:Defend", "hierarchy:DefendHierarchy"),
    "compare": ("compare:Compare",),
    "figures": ("figures:Figures",),
    "robustness": ("robustness:Robustness",),
    "bound": ("bound:Bound",),
    "ratios": ("ratios:Ratios",),
    "two_latents": ("two_latents:TwoLatents",),
    "theory": ("theory:Theory",),
    "synthesis": ("synthesis:Synthesis",),
    "benchmark": (
        "benchmark.run:BenchmarkSamplers",
        "benchmark.attacks:BenchmarkAttacks",
        "benchmark.seconds:BenchmarkSeconds",
        "benchmark.gpu.run:BenchmarkGPU",
    ),
}
"""Command -> studies that share it, each ``module:class``; imported when asked for."""

_ALL_RESULTS = "directory of compare, robustness and benchmark; %(default)s by default"
_SUITES = "directory of robustness, robustness_controls, ...; %(default)s by default"
WEIGHTS = "directory of weights; by default those of the package and of a checkout"

BESIDE = {
    "report": "write the tables, figures and pages of a directory of result files",
    "summary": "write the page of results at a glance, from those of all studies",
    "paper": "list the tables and figures of the paper, or make some: paper table_2",
    "table": "print a table of the paper beside our results",
    "models": "print what the cards of trained models say",
    "front": "print the tables of the README",
    "leaderboard": "write the page that ranks defences by what adaptive attackers leave",
}
"""Commands that compute nothing."""


def load_studies(command: str) -> list[type[Study[Any]]]:
    """The studies of a command."""
    found = []
    for place in STUDIES[command]:
        module, name = place.split(":")
        found.append(getattr(importlib.import_module(f"{__package__}.{module}"), name))
    return found


def measurements() -> dict[str, type[Measurement[Any]]]:
    """All studies with result files, by what these call them."""
    from pyro_vae_defence.experiments.study import Measurement

    every = [study for command in STUDIES for study in load_studies(command)]
    return {study.kind: study for study in every if issubclass(study, Measurement)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors in the arguments are one line and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = [*STUDIES, *BESIDE]
    top = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Studies and what is printed of their results; COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=None if words[:1] and words[0] in commands else _commands(),
    )
    top.add_argument("command", choices=commands, metavar="COMMAND")
    for stream in (sys.stdout, sys.stderr):
        # A terminal without Greek letters still gets the tables.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    command = top.parse_args(words[:1]).command
    # Imported late, so that mistakes in the command answer at once.
    from pyro_vae_defence.training import NonFiniteLossError

    try:
        if command in BESIDE:
            if command == "paper":
                return _paper(words[1:])
            if _superfluous(command):
                return 0
            print(_beside(command, words[1:]))
        else:
            _study(command, words[1:])
    except (ValueError, OSError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _commands() -> str:
    """Commands with the first sentence of their modules, which are read and not imported."""
    lines = []
    for command, places in STUDIES.items():
        place = places[0].split(":")[0].replace(".", "/")
        text = (Path(__file__).parent / f"{place}.py").read_text(encoding="utf-8")
        first = " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())
        lines.append(f"  {command:<12}{first}")
    lines += [f"  {command:<12}{what}" for command, what in BESIDE.items()]
    return "\n".join(lines)


def _study(command: str, words: Sequence[str]) -> None:
    studies = load_studies(command)
    options = _parser(command, studies).parse_args(words)
    if not all(study.shared for study in studies) and _superfluous(command):
        return
    settings = parse_settings(options.set)
    from pyro_vae_defence.experiments.study import check_pages, write_pages
    from pyro_vae_defence.ops import ranks

    if options.device == "cuda":
        ranks.take_gpu()
    first = ranks.rank() == 0
    given = {o: v for study in studies for o in study.options if (v := getattr(options, o))}
    runs = []  # all are made, and so their settings checked, before the first is run
    for name in options.names:
        study = next((each for each in studies if each.has(name)), None)
        if study is None:
            known = ", ".join(name for each in studies for name in each.names)
            raise ValueError(f"no {studies[0].noun} named {name!r}; choose one of {known}")
        if strange := [option for option in given if option not in study.options]:
            raise ValueError(f"--{strange[0]} has no effect on {name!r}; leave it out")
        places = {"root": options.data_root, "models": options.models, **given}
        places["device"] = options.device
        if _measured(studies):
            places["time_limit"] = options.time_limit
        quiet = options.quiet
        runs.append(study(name, options.output, overrides=settings, progress=not quiet, **places))
    if _measured(studies) and first and runs:
        check_pages(options.output, options.images)
    unfinished = False
    for run in runs:
        found = run.run()
        if not first:
            continue
        if remaining := getattr(run, "remaining", 0):
            unfinished = True
            print(f"{run.name}: {remaining} cells are left; run the same again to go on")
        else:
            print(run.summary(found))
    if _measured(studies) and first and not unfinished:
        written = write_pages(
            measurements(), options.output, options.images, f"{command} NAME", bool(runs)
        )
        print("\n".join(f"wrote {path}" for path in written))


def _superfluous(command: str) -> bool:
    """Whether this is a further process of a command that has work for one alone.

    Raises:
        ValueError: in the first of several processes.
    """
    from pyro_vae_defence.ops import ranks

    if ranks.world_size() == 1:
        return False
    if ranks.rank() == 0:
        raise ValueError(f"{command} is work for one process; start it without torchrun")
    return True


def _measured(studies: Sequence[type[Study[Any]]]) -> bool:
    """Whether a command has result files, and so tables and figures."""
    from pyro_vae_defence.experiments.study import Measurement

    return any(issubclass(study, Measurement) for study in studies)


def _parser(command: str, studies: Sequence[type[Study[Any]]]) -> argparse.ArgumentParser:
    text = []
    for study in studies:
        module = sys.modules[study.__module__]
        text += [(module.__doc__ or "").strip(), "", f"names: {', '.join(study.names)}", ""]
        some = next(iter(study.names.values()))
        text += ["settings (--set KEY=VALUE), with what they are in the first of the names:"]
        text += [f"  {key} = {value}\n      {what}" for key, value, what in describe(some)]
        text += [""]
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {command}",
        description="\n".join(text),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    if _measured(studies):
        add("names", nargs="*", metavar="NAME", help="without one, tables and figures alone")
        add("--images", help="directory for figures; OUTPUT/images by default")
        add("--time-limit", type=float, metavar="SECONDS", help="begin no cell that may end later")
    else:
        add("names", nargs="+", metavar="NAME", help="one of the names above")
    add("--output", default=studies[0].output, help="directory for results, %(default)s by default")
    add("--models", help=WEIGHTS)
    add("--data-root", help="directory of the datasets")
    add("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, ...; %(default)s")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    add("--quiet", action="store_true", help="no progress bars")
    for study in studies:
        for option, (field, value) in study.shorthands.items():
            short = f"{field}={value!r}"
            add(f"--{option}", dest="set", action="append_const", const=short, help=short)
        for option, what in study.options.items():
            add(f"--{option}", help=what)
    return parser


def _paper(words: Sequence[str]) -> int:
    """List the items of the paper, or run the commands that make some, in all processes."""
    from pyro_vae_defence.experiments.paper.items import listing, make, makeable, write_page
    from pyro_vae_defence.ops import ranks

    parser = argparse.ArgumentParser(prog=f"{PROGRAM} paper", description=BESIDE["paper"])
    add = parser.add_argument
    add("items", nargs="*", metavar="ITEM", help="or all; without one, the list of them")
    add("--quick", action="store_true", help="tiny sizes, on images that come with the library")
    add("--page", action="store_true", help="write RESULTS/paper.md of the results that are there")
    add("--results", help="of the list and the page; docs/results by default")
    add("--images", help="directory for the page's pictures; docs/images by default")
    add("--output", help="directory of ITEMs; runs/paper by default")
    add("--data-root", help="directory of the datasets")
    add("--device", help="where to compute: cpu, cuda, cuda:1, ...")
    options = parser.parse_args(words)
    if options.items:
        idle, when = ["page", "results", "images"], "with items"
    elif options.page:
        idle, when = ["quick", "output", "data_root", "device"], "on the page"
    else:
        idle, when = ["quick", "output", "data_root", "device", "images"], "on the list"
    if ignored := [name for name in idle if getattr(options, name)]:
        parser.error(f"--{ignored[0].replace('_', '-')} has no effect {when}; leave it out")
    if options.items:
        given = {"--data-root": options.data_root, "--device": options.device}
        further = [word for each in given.items() if each[1] for word in each]
        items = makeable() if options.items == ["all"] else options.items
        output = (options.output or "runs/paper") + ("/quick" if options.quick else "")
        return make(items, output, main, further, options.quick)
    if ranks.rank() == 0:
        results = Path(options.results or "docs/results")
        if not results.is_dir():
            raise ValueError(f"--results {results} is no directory; name that of all studies")
        if options.page:
            print(f"wrote {write_page(results, Path(options.images or 'docs/images'))}")
        else:
            print(listing(results))
    return 0


def _beside(command: str, words: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {command}", description=BESIDE[command])
    if command == "report":
        parser.add_argument("results", help="directory with result files (*.json)")
        parser.add_argument("--images", help="directory for figures; RESULTS/images by default")
        options = parser.parse_args(words)
        from pyro_vae_defence.experiments.study import write_pages

        written = write_pages(measurements(), options.results, options.images)
        return "\n".join(f"wrote {path}" for path in written)
    if command == "summary":
        parser.add_argument("results", nargs="?", default="docs/results", help=_ALL_RESULTS)
        parser.add_argument("--images", default="docs/images", help="directory for its picture")
        options = parser.parse_args(words)
        from pyro_vae_defence.experiments.summary import write_summary

        written = write_summary(options.results, options.images)
        return "\n".join(f"wrote {path}" for path in written)
    if command == "models":
        parser.add_argument("directory", nargs="?", help=WEIGHTS)
        from pyro_vae_defence.experiments.cards import trained_models

        return trained_models(parser.parse_args(words).directory)
    if command == "leaderboard":
        parser.add_argument("results", nargs="?", default="docs/results", help=_SUITES)
        from pyro_vae_defence.experiments.leaderboard import write_leaderboard

        return f"wrote {write_leaderboard(parser.parse_args(words).results)}"
    if command == "front":
        parser.add_argument("results", nargs="?", default="docs/results", help="result files")
        from pyro_vae_defence.experiments.front import front_table

        return front_table(Path(parser.parse_args(words).results))
    parser.add_argument("number", type=int, help="number of the table: 2, 3, 4 or 7")
    parser.add_argument("--results", help="directory of result files; docs/results/... by default")
    options = parser.parse_args(words)
    from pyro_vae_defence.experiments import attack, evaluate

    tables = {2: attack.table, 3: attack.table, 4: attack.table, 7: evaluate.table}
    if options.number not in tables:
        known = ", ".join(map(str, tables))
        raise ValueError(f"no generator for table {options.number}; choose one of {known}")
    module = tables[options.number].__module__.rpartition(".")[2]
    results = options.results or Path("docs/results") / module
    return tables[options.number](options.number, results)


if __name__ == "__main__":
    sys.exit(main())
