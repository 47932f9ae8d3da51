"""The commands `protoshard eval` and `protoshard protocols`."""

from __future__ import annotations

import argparse
import textwrap

from dali_loaders.progress import announce
from pipeline.commands import command, count

WIDTH = 79


def add(commands: argparse._SubParsersAction) -> None:
    """Adds both to the commands of `protoshard`."""
    evaluate = command(commands, "eval", _eval, "evaluate a checkpoint", "protoshard eval runs/dogs_small --data data/dogs/test.tar --json")
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="a step-N folder, or a run's folder for its newest checkpoint")
    evaluate.add_argument("--data", required=True, metavar="PATH", help="labelled folder, .tar or .rec, .bin pair set, or the protocol's")
    evaluate.add_argument("--protocol", metavar="NAME", help="one of `protoshard protocols` (all_pairs; of a .bin its own)")
    evaluate.add_argument("--recipe", metavar="FILE.py", help="the recipe file that registers the run's backbone, if that is one's own")
    evaluate.add_argument("--ranks", type=count, default=1, metavar="N", help="processes on this machine (1)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    evaluate.add_argument("--figure", metavar="FILE.png", help="also write the ROC curve")
    evaluate.add_argument("--ema", action="store_true", help="the average of the weights that the run kept (run.ema)")
    evaluate.add_argument("--no-flip", action="store_true", help="leave out the mirror image (the recipe decides otherwise)")
    options = evaluate.add_argument_group("options of protocols")
    options.add_argument("--images", metavar="FOLDER", help="where the images are that the files of --data only name")
    options.add_argument("--allow-missing", action="store_true", default=None, help="leave out what lacks images, instead of refusing it")
    options.add_argument("--resamples", type=_draws, metavar="N", help="draws for 95 %% intervals; 0: none (1000, for up to 2,236 images)")
    options.add_argument("--cleaning", metavar="FILE.csv", help="also list identities to merge and misplaced images, and a data.subset")
    command(commands, "protocols", _protocols, "list the protocols and the files that they read", "protoshard protocols")


def _eval(options: argparse.Namespace) -> None:
    from dali_loaders.outputs import check_file

    if options.figure is not None:
        check_file(options.figure, "--figure", ".png", makes_folder=True)
    announce("starting")
    from pipeline.evaluation.evaluate_checkpoint import evaluate_checkpoint
    from pipeline.evaluation.protocols import OPTIONS
    from pipeline.local_ranks import run_local

    settings = options.json, options.figure, options.no_flip, options.ema, options.recipe
    of_protocol = {name: getattr(options, name) for name in OPTIONS}
    run_local(options.ranks, evaluate_checkpoint, options.checkpoint, options.data, options.protocol, of_protocol, *settings)


def _protocols(options: argparse.Namespace) -> None:
    from pipeline.evaluation.protocols import description, names

    for name in names():
        print(name)
        print(textwrap.fill(description(name), WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False))


def _draws(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value
