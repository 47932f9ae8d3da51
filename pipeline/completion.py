"""`protoshard completion SHELL`: a script that completes commands, options, names of recipes and files. shtab makes it, from the parser."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

from dali_loaders.extras import extra
from pipeline.commands import command

SHELLS = ("bash", "zsh", "fish", "tcsh")
NEITHER = (argparse._HelpAction, argparse._VersionAction, argparse._StoreConstAction, argparse._SubParsersAction)


def add(commands: argparse._SubParsersAction, parser: argparse.ArgumentParser) -> None:
    """Adds `completion` to the commands of `protoshard`, whose whole parser this is."""
    run = functools.partial(_print, parser)
    completion = command(
        commands, "completion", run, "print a script for completion in a shell", 'eval "$(protoshard completion bash)"  # in ~/.bashrc'
    )
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def _print(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    with extra("train"):
        import shtab
    from pipeline.recipes import RECIPES

    names = " ".join(RECIPES)
    preamble = f'_protoshard_recipes() {{ compgen -W "{names}" -- "$1"; compgen -f -X "!*.py" -- "$1"; compgen -d -- "$1"; }}'
    recipe = {"bash": "_protoshard_recipes", "zsh": f"({names})", "fish": f"({'; '.join(f'echo {name}' for name in RECIPES)})", "tcsh": "f"}
    for action in _actions(parser):
        if action.dest == "recipe" and action.required:
            action.complete = recipe  # type: ignore[attr-defined]
        elif action.type is None and not action.choices and not isinstance(action, NEITHER):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.shell, preamble=preamble if options.shell == "bash" else ""))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)
