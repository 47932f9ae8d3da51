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
    from pipeline.train import train_recipe

    config = resolve(options.recipe, options.set)
    run_local(options.ranks, train_recipe, options.recipe, options.set, options.resume)
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


def _bench_classifier(options: argparse.Namespace) -> None:
    from benchmarks import classifier, record
    from pipeline.distributed import cores

    step = options.step if options.step is not None else options.rate < 1 or options.in_backward
    names = ("batch", "width", "rate", "dtype", "ranks", "pairs", "in_backward", "skip_eager")
    shared = {name: getattr(options, name) for name in names}
    threads = options.threads if options.threads is not None else max(1, cores() // max(1, options.ranks))
    settings = [classifier.Setting(classes, threads=threads, step=step, **shared) for classes in options.classes]
    record.report(
        classifier.rows(settings, classifier.ALLOCATORS if options.allocator == "both" else [options.allocator]),
        classifier.as_text,
        options.json,
        options.csv,
    )


def _bench_accuracy(options: argparse.Namespace) -> None:
    from benchmarks import accuracy, record

    record.report(accuracy.rows(options.classes, options.batch, options.width), accuracy.as_text, options.json, options.csv)


def _bench_losses(options: argparse.Namespace) -> None:
    from benchmarks import loss_cost, record
    from partial_fc import losses

    names = options.losses or sorted(losses.REGISTRY)
    found = loss_cost.rows(names, options.classes, options.batch, options.width, options.dtype, options.pairs)
    record.report(found, loss_cost.as_text, options.json, options.csv)


def _bench_training(options: argparse.Namespace) -> None:
    from benchmarks import record, training

    entries = options.entries or list(training.ENTRIES)
    record.report(training.rows(entries, options.seeds, options.jobs, options.tune), training.as_text, options.json, options.csv)


def _plan(options: argparse.Namespace) -> None:
    from pipeline import plan

    names = ("identities", "width", "batch", "ranks", "rate", "optimizer", "dtype", "storage_dtype", "in_backward")
    job = plan.Job(**{name: getattr(options, name) for name in names})
    network = None if options.network is None else 1e9 * options.network
    made = plan.plan(job, plan.find_hardware(options.hardware, job, network))
    print(plan.as_json(made) if options.json else plan.as_text(made))


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

    plan = _command(
        commands,
        "plan",
        _plan,
        "predict memory and step time of the classifier, and what will not fit",
        "protoshard plan --identities 10000000 --ranks 8 --batch 1024 --rate 0.1 --hardware h100-80gb",
    )
    _add_plan(plan)

    bench = commands.add_parser("bench", help="measure this version on this machine").add_subparsers(metavar="COMMAND", required=True)
    classifier = _command(
        bench,
        "classifier",
        _bench_classifier,
        "time, memory and traffic of a classifier step, against an eager baseline in turn",
        "protoshard bench classifier --classes 200000 --dtype bfloat16",
    )
    _add_bench_classifier(classifier)
    accuracy = _command(
        bench,
        "accuracy",
        _bench_accuracy,
        "error of the classifier's gradients against float64, from the first steps to convergence",
        "protoshard bench accuracy --classes 10000 --batch 256",
    )
    accuracy.add_argument("--classes", type=int, default=10_000, metavar="N", help="(10000)")
    accuracy.add_argument("--batch", type=int, default=256, metavar="N", help="(256)")
    accuracy.add_argument("--width", type=int, default=512, metavar="D", help="features per sample (512)")
    _add_report(accuracy, "accuracy")
    cost = _command(
        bench,
        "losses",
        _bench_losses,
        "time of a classifier step with each loss, against CosFace in turn",
        "protoshard bench losses --losses gce npt --dtype bfloat16",
    )
    cost.add_argument("--losses", nargs="+", metavar="NAME", help="with their defaults (all)")
    cost.add_argument("--classes", type=int, default=100_000, metavar="N", help="(100000)")
    cost.add_argument("--batch", type=int, default=512, metavar="N", help="two samples of each identity (512)")
    cost.add_argument("--width", type=int, default=512, metavar="D", help="features per sample (512)")
    cost.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the products (float32)")
    cost.add_argument("--pairs", type=int, default=7, metavar="N", help="steps of each side (7)")
    _add_report(cost, "losses")
    training = _command(
        bench,
        "training",
        _bench_training,
        "train every loss on small data with the same budget, and verify other identities",
        "protoshard bench training --entries cosface gce --seeds 0 1 2",
    )
    training.add_argument("--entries", nargs="+", metavar="NAME", help="of benchmarks/training_entries.py (all)")
    training.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="one training each (0)")
    training.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time, one core each (1)")
    training.add_argument(
        "--tune", action="store_true", help="try the candidates of each entry on identities carved out of the training set"
    )
    _add_report(training, "training")
    return parser


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--identities", type=int, required=True, metavar="N", help="classes of the whole job")
    plan.add_argument("--width", type=int, default=512, metavar="D", help="features per sample (512)")
    plan.add_argument("--batch", type=int, default=1024, metavar="N", help="samples per step, over all ranks (1024)")
    plan.add_argument("--ranks", type=int, default=1, metavar="N", help="(1)")
    plan.add_argument("--rate", type=float, default=1.0, metavar="R", help="share of the classes that take part in a step (1)")
    plan.add_argument("--optimizer", default="sgd", choices=("sgd", "adamw"), help="(sgd)")
    plan.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of the products (bfloat16)")
    plan.add_argument("--storage-dtype", default="float32", choices=("float32", "bfloat16"), help="of the prototypes (float32)")
    plan.add_argument("--in-backward", action="store_true", help="prototypes are updated during backward: no gradient of all of them")
    plan.add_argument("--hardware", default="here", metavar="NAME", help="of one rank: here, measured in some seconds, or a preset (here)")
    plan.add_argument("--network", type=float, metavar="GB/S", help="what a rank sends, for ranks on several machines (the preset's)")
    plan.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def _add_bench_classifier(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--classes", type=int, nargs="+", default=[200_000], metavar="N", help="one measurement each (200000)")
    bench.add_argument("--batch", type=int, default=512, metavar="N", help="of all ranks (512)")
    bench.add_argument("--width", type=int, default=512, metavar="D", help="features per sample (512)")
    bench.add_argument("--rate", type=float, default=1.0, metavar="R", help="share of the classes that take part in a step (1)")
    bench.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of PartialFC; eager is float32 (float32)")
    bench.add_argument("--ranks", type=int, default=1, metavar="N", help="processes on this machine; one GPU each where there are GPUs (1)")
    bench.add_argument("--threads", type=int, metavar="N", help="of each rank (its share of the cores)")
    bench.add_argument("--pairs", type=int, default=7, metavar="N", help="steps of each side (7)")
    bench.add_argument(
        "--step", action=argparse.BooleanOptionalAction, help="include an SGD step on both sides (with --rate below 1 or --in-backward)"
    )
    bench.add_argument("--in-backward", action="store_true", help="PartialFC's prototypes are updated during backward")
    bench.add_argument("--skip-eager", action="store_true", help="PartialFC alone, where the eager side would not fit")
    bench.add_argument(
        "--allocator", default="both", choices=("default", "keeping", "both"), help="malloc as it is, or keeping memory (both)"
    )
    _add_report(bench, "classifier")


def _add_report(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object")
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "benchmarks", "results", f"{name}.csv")
    command.add_argument("--csv", default=path, metavar="FILE", help=f"append rows to this file (benchmarks/results/{name}.csv)")


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
