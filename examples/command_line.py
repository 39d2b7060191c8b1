"""What the examples share: arguments that are checked when they are read, and mistakes in one line.

The examples do not need it to work: it keeps the command line out of what they show.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch

from pyro_vae_defence.training import NonFiniteLossError


def make_parser(doc):
    """A parser described by the first line of a module's text, with the option ``--seed``."""
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    # NumPy takes no others, and `pyro.set_rng_seed` seeds it beside Python and PyTorch.
    seed = number(int, lambda n: 0 <= n < 2**32, "an integer from 0 to 2**32 - 1")
    parser.add_argument("--seed", type=seed, default=0, help="of all random numbers")
    return parser


def call(main):
    """``main()``; what the arguments were wrong about is one line and exit code 2."""
    try:
        main()
    except (ValueError, OSError, NonFiniteLossError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished by then has been kept", file=sys.stderr)
        sys.exit(130)


def number(kind, valid, wanted):
    """An argparse type: a number, refused in one line unless it is valid."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not valid(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    return parse


count = number(int, lambda n: n >= 1, "an integer of at least 1")
unsigned = number(int, lambda n: n >= 0, "an integer of at least 0")
positive = number(float, lambda v: 0 < v < math.inf, "a positive number")
radius = number(float, lambda v: 0 < v <= 1, "a positive number of at most 1, the image range")


def device(text):
    """An argparse type: a place where PyTorch can compute."""
    try:
        torch.zeros(1, device=text).item()  # `meta` computes nothing
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"no device {text}: {reason}") from error
    return text
