"""One command of the `protoshard` parser, its option --set, and how numbers of things are given."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from importlib import metadata
from typing import Any, NoReturn

Command = Callable[[argparse.Namespace], int | None]  # the exit code; None is 0
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


class Parser(argparse.ArgumentParser):
    """Its errors are one sentence, with the nearest name where a command or a choice is none."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            from partial_fc.fields import hint_at  # which imports torch

            known = [name.strip("' ") for name in choice[2].split(",")]
            message = f"{message[: choice.start()]}{choice[1]!r} is unknown: {hint_at(choice[1], known)}"
        elif number := re.search(r"invalid \w+ value: (.*)", message):
            message = f"{message[: number.start()]}{number[1]} is no number"
        elif message.startswith("the following arguments are required"):
            message += f"; see {self.prog} --help"
        elif message.startswith("unrecognized arguments"):
            message += f"; see {self.prog} COMMAND --help"
        self.exit(2, f"{self.prog}: {message}\n")


class Version(argparse.Action):
    """Of --version: this package's and what it runs on, none of which has to be imported for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"protoshard {_version('protoshard')} (Python {sys.version.split()[0]}, torch {_version('torch')})")
        parser.exit()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def start_weights(path: str) -> str:
    """What --from PATH stands for, as an override of a recipe."""
    if not path:
        raise argparse.ArgumentTypeError("the path is empty")
    return f"start.weights={path}"


def count(text: str) -> int:
    """A number of things: 10000000, 10_000_000, 10,000,000, 1e7 or 10M."""
    match = re.fullmatch(r"([-+]?\d+(?:[_,]\d{3})*(?:\.\d+)?(?:e\+?\d{1,2})?)([kmgb]?)", text.strip().lower())
    value = Decimal(re.sub("[_,]", "", match[1])) * UNITS[match[2]] if match else Decimal("NaN")
    if not match or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, such as 10000000, 1e7 or 10M")
    return int(value)


class Overrides(argparse.Action):
    """Of --set, nargs="+": adds its section.field=value to those of earlier ones, which it may override: so a script can give its own
    before those of its caller. The same field twice in one --set is an error: a shell that expands the braces of
    data.train=set-{000..127}.tar would leave the last of 128 tars."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        for field, times in Counter(value.partition("=")[0].strip() for value in values).items():
            if times > 1:
                raise argparse.ArgumentError(
                    self, f"{field} is given {times} times. Has the shell expanded braces? Then put {field}=VALUE in quotes."
                )
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), *values])


def positionals_first(arguments: Sequence[str]) -> list[str]:
    """The same command with what stands behind the last section.field=value of a --set, up to the next option, in front of it: argparse
    would give --set the recipe of `train --set run.epochs=3 faces_small` too. A field without a value stays, for --set to complain of."""
    found: list[str] = []
    at = 0
    while at < len(arguments):
        end = at + 1
        if arguments[at] == "--set":
            while end < len(arguments) and not arguments[end].startswith("-"):
                end += 1
            group = list(arguments[at + 1 : end])
            size = max((i for i, word in enumerate(group, 1) if "=" in word), default=len(group))
            found += [*group[size:], "--set", *group[:size]]
        else:
            found.append(arguments[at])
        if arguments[at] == "--":
            return [*found, *arguments[end:]]
        at = end
    return found


def command(commands: argparse._SubParsersAction, name: str, run: Command, purpose: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".", epilog=f"example: {example}")
    parser.set_defaults(command=run, when_broken_off="")  # what is then to be said, besides that it was
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        nargs="+",
        action=Overrides,
        default=[],
        metavar="FIELD=VALUE",
        help="override fields, as run.epochs=10 (protoshard config RECIPE --explain: all); the last of a field counts",
    )
