"""One command of the `protoshard` parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Command = Callable[[argparse.Namespace], int | None]  # the exit code; None is 0


def start_weights(path: str) -> str:
    """What --from PATH stands for, as an override of a recipe."""
    if not path:
        raise argparse.ArgumentTypeError("the path is empty")
    return f"start.weights={path}"


def command(commands: argparse._SubParsersAction, name: str, run: Command, purpose: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".", epilog=f"example: {example}")
    parser.set_defaults(command=run, when_broken_off="")  # what is then to be said, besides that it was
    return parser
