"""Command line: ``python -m pyro_vae_defence.experiments COMMAND``."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from typing import Any

from pyro_vae_defence.experiments.registry import CLASSIFIERS, HIERARCHIES


def _setting(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(prog="python -m pyro_vae_defence.experiments")
    commands = top.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a named model; resumes when interrupted")
    train.add_argument("name", help="model or classifier of the registry, e.g. mnist_vae")
    train.add_argument(
        "--models",
        help="directory of the weights a model starts from or a classifier reads; the packaged "
        "ones by default",
    )
    train.add_argument("--output", default="runs/models", help="directory for weights and cards")

    defend = commands.add_parser("defend", help="attack a trained model's encoder and defend it")
    defend.add_argument("name", help="experiment of the registry, e.g. mnist_radius_0.1")
    defend.add_argument("--output", default="runs/results", help="directory for result files")
    defend.add_argument(
        "--checkpoint", help="official NVAE checkpoint (checkpoint.pt) to defend, e.g. CelebA's"
    )

    evaluate = commands.add_parser("evaluate", help="measure a trained model on test images")
    evaluate.add_argument("name", help="name of a trained model, e.g. mnist_vae")
    evaluate.add_argument("--output", default="runs/evaluate", help="directory for result files")
    evaluate.add_argument(
        "--full",
        action="append_const",
        const=("num_images", None),
        dest="set",
        default=[],
        help="the full test set instead of 1,000 class-stratified images",
    )

    compare = commands.add_parser(
        "compare",
        help="every defence and control over the attack's radius, with tables and figures",
    )
    figures = commands.add_parser(
        "figures", help="Figures 5, 10, 11, 12 and 16: attackers' knowledge and objectives"
    )
    for command, directory in ((compare, "runs/compare"), (figures, "runs/figures")):
        command.add_argument(
            "names", nargs="*", help="datasets, e.g. mnist; without any, tables and figures alone"
        )
        command.add_argument("--output", default=directory, help="directory for result files")
        command.add_argument(
            "--images", default=f"{directory}/images", help="directory for the figures"
        )

    benchmark = commands.add_parser("benchmark", help="measure a part of the library")
    benchmark.add_argument("name", help="what to measure: samplers or attacks")
    benchmark.add_argument("--output", default="runs/benchmark", help="directory for result files")

    robustness = commands.add_parser(
        "robustness", help="every adaptive attack against a trained model, undefended and defended"
    )
    robustness.add_argument("name", help="experiment of the registry, e.g. mnist_radius_0.1")
    robustness.add_argument(
        "--output", default="runs/robustness", help="directory for result files"
    )

    attack = commands.add_parser(
        "attack",
        help="Tables 2 and 3: attacks on the encoder and the classifiers of a trained model",
    )
    attack.add_argument("name", help="name of a trained model, e.g. mnist_vae")
    attack.add_argument("--output", default="runs/attack", help="directory for result files")

    for command in (train, defend, evaluate, compare, figures, robustness, attack, benchmark):
        if command is not train:
            command.add_argument(
                "--models", help="directory of weights; the packaged ones by default"
            )
        command.add_argument("--data-root", help="directory of the datasets")
        command.add_argument(
            "--set",
            type=_setting,
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="change a field of the configuration, e.g. --set seed=1",
        )
        command.add_argument("--quiet", action="store_true", help="no progress bars")

    report = commands.add_parser("report", help="write the tables of a directory of result files")
    report.add_argument("results", help="directory with result files (*.json)")

    models = commands.add_parser("models", help="print what the cards of trained models say")
    models.add_argument("directory", nargs="?", help="of weights; the packaged ones by default")

    table = commands.add_parser("table", help="print a table of the paper beside our results")
    table.add_argument("number", type=int, help="number of the table: 2, 3 or 7")
    table.add_argument(
        "--results",
        help="directory with the result files of attack (2 and 3) or evaluate (7); "
        "docs/results/... by default",
    )
    return top


def _places(
    options: argparse.Namespace,
) -> tuple[str, str | None, str | None, dict[str, Any]]:
    """What every command takes that computes something: where to write, the data, the weights, the
    settings."""
    return options.output, options.data_root, options.models, dict(options.set)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors in the arguments are one line and exit code 2."""
    options = parser().parse_args(arguments)
    # Imported late, so that --help and mistakes in the arguments answer at once.
    from pyro_vae_defence.training import NonFiniteLossError

    try:
        # Imported late, so that --help and mistakes answer at once.
        if options.command == "train" and options.name in CLASSIFIERS:
            from pyro_vae_defence.experiments.classify import train_classifier

            card = train_classifier(options.name, *_places(options))
            print(f"{card.name}: test accuracy {card.metrics['test_accuracy']['estimate']:.4f}")
        elif options.command == "train":
            from pyro_vae_defence.experiments.train import train

            card = train(
                options.name,
                options.output,
                options.data_root,
                dict(options.set),
                progress=not options.quiet,
                models=options.models,
            )
            print(f"{card.name}: validation -ELBO {card.metrics['validation_nelbo']:.2f} nats")
        elif options.command == "defend" and options.name in HIERARCHIES:
            from pyro_vae_defence.experiments.hierarchy import defend_hierarchy
            from pyro_vae_defence.experiments.report import report

            defend_hierarchy(
                options.name,
                *_places(options),
                progress=not options.quiet,
                checkpoint=options.checkpoint,
            )
            print(report(options.output))
        elif options.command == "defend":
            from pyro_vae_defence.experiments.defend import defend
            from pyro_vae_defence.experiments.report import report

            defend(options.name, *_places(options), progress=not options.quiet)
            print(report(options.output))
        elif options.command == "benchmark":
            from pyro_vae_defence.experiments.benchmark.run import benchmark
            from pyro_vae_defence.experiments.benchmark_attacks import benchmark_attacks
            from pyro_vae_defence.experiments.report import write_report

            if options.name == "attacks":
                benchmark_attacks(*_places(options))
            else:
                benchmark(options.name, *_places(options), progress=not options.quiet)
            print(write_report(options.output).read_text())
        elif options.command == "evaluate":
            from pyro_vae_defence.experiments.evaluate import evaluate

            result = evaluate(options.name, *_places(options))
            print(json.dumps(result["metrics"], indent=2))
        elif options.command in ("compare", "figures"):
            if options.command == "compare":
                from pyro_vae_defence.experiments.compare import compare as run
                from pyro_vae_defence.experiments.compare_report import write_comparison as write
            else:
                from pyro_vae_defence.experiments.figures import figures as run
                from pyro_vae_defence.experiments.figures_report import write_figures as write

            for name in options.names:
                run(name, *_places(options), progress=not options.quiet)
            tables, drawn = write(options.output, options.images)
            print("\n".join(f"wrote {path}" for path in (tables, *drawn)))
        elif options.command == "robustness":
            from pyro_vae_defence.experiments.report import robustness_table
            from pyro_vae_defence.experiments.robustness import robustness

            result = robustness(options.name, *_places(options))
            print(robustness_table(result))
        elif options.command == "attack":
            from pyro_vae_defence.experiments.attack import attack
            from pyro_vae_defence.experiments.tables import attacked

            result = attack(options.name, *_places(options))
            print(attacked(result))
        elif options.command == "models":
            from pyro_vae_defence.experiments.tables import trained_models

            print(trained_models(options.directory))
        elif options.command == "table":
            from pyro_vae_defence.experiments.tables import table

            print(table(options.number, options.results))
        else:
            from pyro_vae_defence.experiments.report import write_report

            print(f"wrote {write_report(options.results)}")
    except (ValueError, OSError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
