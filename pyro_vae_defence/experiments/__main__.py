"""Command line: ``python -m pyro_vae_defence.experiments COMMAND``."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from typing import Any


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
    top = argparse.ArgumentParser(
        prog="python -m pyro_vae_defence.experiments", description=__doc__
    )
    commands = top.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a named model; resumes when interrupted")
    train.add_argument("name", help="model of the registry, e.g. mnist_vae")
    train.add_argument("--output", default="runs/models", help="directory for weights and cards")
    train.add_argument("--data-root", help="directory of the datasets")
    train.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field of the training configuration, e.g. epochs=2",
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors in the arguments are one line and exit code 2."""
    options = parser().parse_args(arguments)
    try:
        from pyro_vae_defence.experiments.train import train

        card = train(
            options.name,
            options.output,
            options.data_root,
            dict(options.set),
            progress=not options.quiet,
        )
        print(f"{card.name}: validation -ELBO {card.metrics['validation_nelbo']:.2f} nats")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
