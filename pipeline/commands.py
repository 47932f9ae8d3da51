"""One command of the `protoshard` parser, and its option --set."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

Command = Callable[[argparse.Namespace], int | None]  # the exit code; None is 0


def start_weights(path: str) -> str:
    """What --from PATH stands for, as an override of a recipe."""
    if not path:
        raise argparse.ArgumentTypeError("the path is empty")
    return f"start.weights={path}"


class Overrides(argparse.Action):
    """Of --set, nargs="+": adds its section.field=value to those of earlier ones, which it may override. The same field twice in one --set
    is an error: a shell that expands the braces of data.train=set-{000..127}.tar would leave the last of 128 tars."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        for field, count in Counter(value.partition("=")[0].strip() for value in values).items():
            if count > 1:
                raise argparse.ArgumentError(
                    self, f"{field} is given {count} times. Has the shell expanded braces? Then put {field}=VALUE in quotes."
                )
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), *values])


def command(commands: argparse._SubParsersAction, name: str, run: Command, purpose: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".", epilog=f"example: {example}")
    parser.set_defaults(command=run, when_broken_off="")  # what is then to be said, besides that it was
    return parser
