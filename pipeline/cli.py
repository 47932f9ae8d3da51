"""The `protoshard` command. Bad input ends in one sentence on standard error and exit code 2."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable

Command = Callable[[argparse.Namespace], None]


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        options.command(options)
    except ValueError as error:
        from pipeline.distributed import describe

        sentence = describe(error)
        if sentence is None:
            raise
        print(f"protoshard: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("protoshard: interrupted; --resume auto, the default, continues from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


def _train(options: argparse.Namespace) -> None:
    from pipeline.config import resolve
    from pipeline.distributed import run_local
    from pipeline.summary import summary
    from pipeline.train import train

    config = resolve(options.recipe, options.set)
    run_local(options.ranks, train, config, options.resume)
    if int(os.environ.get("RANK", 0)) == 0:
        print(summary(config.run.folder))


def _eval(options: argparse.Namespace) -> None:
    from pipeline.distributed import run_local
    from pipeline.evaluation.checkpointed import evaluate_checkpoint

    run_local(options.ranks, evaluate_checkpoint, options.checkpoint, options.data, options.json, options.figure, options.no_flip)


def _faces(options: argparse.Namespace) -> None:
    from dali_loaders.faces import FacesConfig, write_faces

    write_faces(options.out, FacesConfig(options.identities, options.images, options.size, options.seed, options.first_identity))
    print(f"{options.identities * options.images} images of {options.identities} identities in {options.out}")


def _pack(options: argparse.Namespace) -> None:
    from dali_loaders import open_source
    from dali_loaders.packing import pack

    source = open_source(options.source)
    pack(source, options.out)
    print(f"{len(source)} images of {len(source.identities)} identities in {options.out}")


def _check(options: argparse.Namespace) -> None:
    from dali_loaders.checking import check

    print(check(options.path, options.reader))


def _config(options: argparse.Namespace) -> None:
    from pipeline.config import as_text, resolve

    print(as_text(resolve(options.recipe, options.set)))


def _import_insightface(options: argparse.Namespace) -> None:
    from pipeline.insightface import import_run

    print(import_run(options.config, options.models, options.out, options.gpus))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="protoshard", description="Trains open-set recognition models with up to 100 million identities.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = _command(commands, "train", _train, "train a recipe", "protoshard train dogs_small --ranks 2 --set run.epochs=10")
    _add_recipe(train)
    train.add_argument("--ranks", type=int, default=1, metavar="N", help="processes on this machine; one GPU each where there are N (1)")
    train.add_argument(
        "--resume", default="auto", metavar="auto|none|PATH", help="newest checkpoint of the run, a new start, or that checkpoint (auto)"
    )

    evaluate = _command(
        commands, "eval", _eval, "evaluate a checkpoint", "protoshard eval runs/dogs_small --data data/dogs/test.tar --json"
    )
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="a step-N folder, or a run's folder for its newest checkpoint")
    evaluate.add_argument("--data", required=True, metavar="PATH", help="labelled folder, .tar or .rec, or an InsightFace .bin pair set")
    evaluate.add_argument("--ranks", type=int, default=1, metavar="N", help="processes on this machine (1)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    evaluate.add_argument("--figure", metavar="FILE.png", help="also write the ROC curve")
    evaluate.add_argument("--no-flip", action="store_true", help="leave out the mirror image (the recipe decides otherwise)")

    data = commands.add_parser("data", help="make, pack and check data sets").add_subparsers(metavar="COMMAND", required=True)
    faces = _command(data, "faces", _faces, "draw a procedural-faces set", "protoshard data faces data/faces.tar --identities 400")
    faces.add_argument("out", metavar="OUT", help="a .tar, a .rec, or a folder")
    faces.add_argument("--identities", type=int, default=400, metavar="N", help="(400)")
    faces.add_argument("--images", type=int, default=20, metavar="N", help="images of each identity (20)")
    faces.add_argument("--size", type=int, default=112, metavar="PIXELS", help="side of an image (112)")
    faces.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    faces.add_argument("--first-identity", type=int, default=0, metavar="N", help="sets that share no number share no identity (0)")
    pack = _command(data, "pack", _pack, "pack a set into RecordIO", "protoshard data pack faces.tar faces.rec")
    pack.add_argument("source", metavar="FOLDER_OR_TAR")
    pack.add_argument("out", metavar="OUT.rec")
    check = _command(data, "check", _check, "decode every image and report", "protoshard data check faces.tar")
    check.add_argument("path", metavar="PATH", help="a folder, .tar or .rec")
    check.add_argument("--reader", default="native", choices=("native", "mxnet"), help="of .rec files (native)")

    config = _command(commands, "config", _config, "print a resolved recipe", "protoshard config dogs_small --set loss.margin=0.3")
    _add_recipe(config)

    imports = commands.add_parser("import", help="take over runs of other projects").add_subparsers(metavar="PROJECT", required=True)
    insightface = _command(
        imports,
        "insightface",
        _import_insightface,
        "turn an arcface_torch run into a recipe and a start checkpoint",
        "protoshard import insightface configs/ms1mv3_r50.py work_dirs/ms1mv3_r50/model.pt --out imported",
    )
    insightface.add_argument("config", metavar="CONFIG.py")
    insightface.add_argument(
        "models", metavar="MODEL.pt", nargs="*", help="model.pt, or all checkpoint_gpu_*.pt of a run, which hold its classifier too"
    )
    insightface.add_argument("--out", default="imported", metavar="FOLDER", help="(imported)")
    insightface.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of that run: its batch size is per GPU (8)")
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: Command, purpose: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".", epilog=f"example: {example}")
    parser.set_defaults(command=run)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a name from pipeline/recipes, or a Python file with a function recipe()")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="section.field=value", help="override fields; may be repeated"
    )


if __name__ == "__main__":
    sys.exit(main())
