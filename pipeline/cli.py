"""The `protoshard` command. Bad input ends in one sentence on standard error and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from dali_loaders.names import printable
from dali_loaders.progress import announce, show_warnings
from pipeline import (
    checkpoint_commands,
    completion,
    data_commands,
    endings,
    evaluation_commands,
    export_commands,
    plan_commands,
    recipe_commands,
    report_commands,
    status_commands,
    stopping,
)
from pipeline.commands import Parser, Version, command, count, positionals_first

CHECKOUT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    endings.open_standard_streams()
    endings.show_any_name()
    sys.excepthook = endings.print_traceback
    try:
        return _run(arguments)
    except OSError as error:
        code = endings.without_output(error)
        if code is None:
            raise
        return code


def _run(arguments: list[str] | None) -> int:
    options = argparse.Namespace(when_broken_off="")
    try:
        parser, commands = _parser()
        if (CHECKOUT / "pyproject.toml").exists():  # a wheel has no benchmarks. They stand above, and only the program knows of them
            import_module("benchmarks.commands").add(commands)
        parser.parse_args(positionals_first(sys.argv[1:] if arguments is None else arguments), options)
        show_warnings()
        with stopping.heeded() if options.command is _train else endings.unwinding_on_signals():
            code = options.command(options) or 0
            endings.flush_output()
        return code
    except ValueError as error:
        from pipeline.distributed import describe

        sentence = describe(error)
        if sentence is None:
            raise
        endings.say(sentence)
        return 2
    except KeyboardInterrupt:
        endings.say(f"interrupted{options.when_broken_off}")
        return endings.INTERRUPTED
    except endings.Terminated as end:
        endings.say(f"terminated{options.when_broken_off}")
        return end.code
    except stopping.Stopped as stopped:
        return stopping.end(stopped)
    except endings.Lost as lost:
        endings.say(f"{lost}{options.when_broken_off}")
        return endings.LOST
    finally:
        endings.flush_output()  # also after --help


def _train(options: argparse.Namespace) -> None:
    announce("starting")  # what is imported here takes seconds, on cold disks half a minute
    from pipeline.local_ranks import run_local
    from pipeline.resolve import resolve
    from pipeline.summary import summary
    from pipeline.train import train_recipe
    from pipeline.uneven_batches import check

    announce(f"reading the recipe {printable(options.recipe)}")
    config = resolve(options.recipe, options.set)
    if options.ranks > 1:  # else torchrun may have started more
        check(config, options.ranks)
    run_local(options.ranks, train_recipe, options.recipe, options.set, options.resume, signals=stopping.heeded)
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            print(summary(config.run.folder, config.checkpoint.folder), flush=True)
        except OSError as error:  # the run is complete, whoever hears of it
            if endings.without_output(error) is None:
                raise


def _import_insightface(options: argparse.Namespace) -> None:
    from pipeline.interop.run import import_run

    print(import_run(options.config, options.models, options.out, options.gpus))


def _import_adaface(options: argparse.Namespace) -> None:
    from pipeline.interop.run import import_weights

    print(import_weights(options.weights, options.out, options.colors or "bgr"))


def _import_cvlface(options: argparse.Namespace) -> None:
    from pipeline.interop.run import import_weights

    print(import_weights(options.weights, options.out, options.colors))


def _parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:
    parser = Parser(prog="protoshard", description="Trains open-set recognition models with up to 100 million identities.")
    parser.add_argument("--version", nargs=0, action=Version, help="print the versions of protoshard, Python and torch")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = command(commands, "train", _train, "train a recipe", "protoshard train dogs_small --ranks 2 --set run.epochs=10")
    train.set_defaults(when_broken_off="; --resume auto, the default, continues from the newest checkpoint")
    recipe_commands.add_recipe(train)
    recipe_commands.name_recipes_in_help(train)
    train.add_argument("--ranks", type=count, default=1, metavar="N", help="processes on this machine; one GPU each where there are N (1)")
    train.add_argument(
        "--resume", default="auto", metavar="auto|none|PATH", help="newest checkpoint of the run, a new start, or that checkpoint (auto)"
    )

    evaluation_commands.add(commands)
    report_commands.add(commands)
    status_commands.add(commands)
    data_commands.add(commands)
    checkpoint_commands.add(commands)
    export_commands.add(commands)

    recipe_commands.add(commands)
    completion.add(commands, parser)

    imports = commands.add_parser("import", help="take over runs of other projects").add_subparsers(metavar="PROJECT", required=True)
    insightface = command(
        imports,
        "insightface",
        _import_insightface,
        "turn an arcface_torch run into a recipe and a start checkpoint",
        "protoshard import insightface configs/ms1mv3_r50.py work_dirs/ms1mv3_r50/model.pt --out imported",
    )
    insightface.add_argument("config", metavar="CONFIG.py")
    insightface.add_argument(
        "models",
        metavar="MODEL.pt",
        nargs="*",
        help="model.pt, or all checkpoint_gpu_*.pt of a run, which hold its classifier too (older: model.pt and all softmax_fc_gpu_*.pt)",
    )
    _add_out(insightface)
    insightface.add_argument("--gpus", type=count, default=8, metavar="N", help="GPUs of that run: its batch size is per GPU (8)")

    for name, run, example, default in (
        ("adaface", _import_adaface, "adaface_ir50_ms1mv2.ckpt", "bgr"),
        ("cvlface", _import_cvlface, "model.safetensors", "what the .yaml or config.json beside it says, else rgb"),
    ):
        summary = f"turn a checkpoint of {name}'s IR networks into a start checkpoint"
        weights = command(imports, name, run, summary, f"protoshard import {name} {example} --out imported")
        weights.add_argument("weights", metavar="WEIGHTS")
        _add_out(weights)
        weights.add_argument("--colors", choices=("rgb", "bgr"), help=f"order that the network takes ({default})")

    plan_commands.add(commands)
    return parser, commands


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="imported", metavar="FOLDER", help="of the new run, empty or not there yet (imported)")


def program() -> NoReturn:
    """The command as a process of its own."""
    endings.end_with(main)


if __name__ == "__main__":
    program()
