"""The commands about recipes: `protoshard recipes`, and `protoshard config`, which prints one with its fields and what they mean."""

from __future__ import annotations

import argparse
import inspect
import os
import textwrap

from pipeline.commands import add_overrides, command, start_weights

CODES = "0 trained to the end; 2 bad input; 75 stopped on request and saved; 76 a rank was lost: docs/debugging.md"
WIDTH = 79


def add(commands: argparse._SubParsersAction) -> None:
    """Adds `recipes` and `config` to the commands of `protoshard`."""
    command(commands, "recipes", _recipes, "list the recipes, what they expect and give", "protoshard recipes")
    config = command(commands, "config", _config, "print a resolved recipe", "protoshard config dogs_small --set loss=arcface --explain")
    add_recipe(config)
    config.add_argument("--explain", action="store_true", help="with what each field means, may be and is by default")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a name from `protoshard recipes`, or a Python file with a function recipe()")
    add_overrides(parser)
    parser.add_argument(
        "--from",
        dest="set",
        action="append",
        type=start_weights,
        default=[],
        metavar="CHECKPOINT|RUN|FILE",
        help="begin a new run with the backbone of that checkpoint, run, .pt or .safetensors file; short for --set start.weights=",
    )


def name_recipes_in_help(parser: argparse.ArgumentParser) -> None:
    """Below the help: the names, which take torch to import, and the exit codes."""
    plain = parser.format_help

    def format_help() -> str:
        from pipeline.recipes import RECIPES

        below = [textwrap.fill(f"recipes: {', '.join(RECIPES)}", WIDTH), textwrap.fill(f"exit codes: {CODES}", WIDTH)]
        return "\n".join([plain(), *below, ""])

    parser.format_help = format_help  # type: ignore[method-assign]


def _recipes(options: argparse.Namespace) -> None:
    from pipeline.recipes import RECIPES

    paragraph = textwrap.TextWrapper(WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    for name, recipe in RECIPES.items():
        command_line, _, rest = inspect.cleandoc(recipe.__doc__ or "").partition("\n")
        config = recipe()
        sets = [path for path in (config.data.train, *(path for _, _, path in config.evaluation.sets())) if path]
        found = ", ".join(path if os.path.exists(path) else f"{path} (not there)" for path in sets) or "yours: --set data.train=PATH"
        print(name)
        print(f"    {command_line}")
        for text in (" ".join(rest.split()), f"Data: {found}"):
            print(paragraph.fill(text))


def _config(options: argparse.Namespace) -> None:
    from pipeline.config import as_text
    from pipeline.resolve import resolve

    config = resolve(options.recipe, options.set)
    if options.explain:
        from pipeline.field_help import explained

        print(explained(config))
    else:
        print(as_text(config))
