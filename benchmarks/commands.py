"""The `protoshard bench` commands."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence

from pipeline.commands import command


def add(commands: argparse._SubParsersAction) -> None:
    """Adds `bench` to the commands of `protoshard`."""
    bench = commands.add_parser("bench", help="measure this version on this machine").add_subparsers(metavar="COMMAND", required=True)
    classifier = command(
        bench,
        "classifier",
        _bench_classifier,
        "time, memory and traffic of a classifier step, against an eager baseline in turn",
        "protoshard bench classifier --classes 200000 --dtype bfloat16",
    )
    _add_bench_classifier(classifier)
    step = command(
        bench,
        "step",
        _bench_step,
        "time of a whole training step, backbone and classifier, against arcface_torch's own in turn",
        "protoshard bench step --dtype float32 bfloat16 --peer ../insightface/recognition/arcface_torch",
    )
    _add_bench_step(step)
    accuracy = command(
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
    cost = command(
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
    loader = command(
        bench,
        "loader",
        _bench_loader,
        "images a second of the training loader, beside DALI's own reader and the usual loaders in turn, and of its feed without decoding",
        "protoshard bench loader --data faces.rec --threads 4",
    )
    _add_bench_loader(loader)
    training = command(
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


def _add_bench_step(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--network", default="iresnet18", metavar="NAME", help="iresnet18, iresnet34, iresnet50 or iresnet100 (iresnet18)")
    bench.add_argument("--batch", type=int, default=32, metavar="N", help="images (32)")
    bench.add_argument("--classes", type=int, default=100_000, metavar="N", help="(100000)")
    bench.add_argument("--image-size", type=int, default=112, metavar="N", help="pixels of a side (112)")
    bench.add_argument(
        "--dtype",
        nargs="+",
        default=["float32"],
        choices=("float32", "bfloat16"),
        metavar="TYPE",
        help="of the products: float32, bfloat16 (float32)",
    )
    bench.add_argument("--layout", nargs="+", default=["nhwc"], choices=("nchw", "nhwc"), help="of images and weights in memory (nhwc)")
    bench.add_argument("--compile", action="store_true", help="measure the backbone with torch.compile too")
    bench.add_argument("--rounds", type=int, default=7, metavar="N", help="steps of each side (7); on a GPU tens of steps")
    bench.add_argument("--keep-memory", action="store_true", help="on a CPU: freed memory stays with the process, for all sides")
    bench.add_argument("--peer", metavar="PATH", help="recognition/arcface_torch of a checkout of InsightFace, to measure beside")
    _add_report(bench, "step")


def _add_bench_loader(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--data", metavar="PATH", help="any set, of which --images are copied into one .rec (drawn faces of 7 KB)")
    bench.add_argument("--images", type=int, default=8000, metavar="N", help="so few that they stay in memory (8000)")
    bench.add_argument("--batch", type=int, default=128, metavar="N", help="images (128)")
    bench.add_argument("--image-size", type=int, default=112, metavar="N", help="pixels of a side (112)")
    bench.add_argument("--threads", type=int, metavar="N", help="or workers, of each side (the cores, at most 16)")
    bench.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each side (7)")
    bench.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of a turn (1)")
    bench.add_argument("--ranks", type=int, default=8, metavar="N", help="feeds at the same time, for the last row (8)")
    bench.add_argument("--feed-only", action="store_true", help="only the feed without decoding")
    _add_report(bench, "loader")


def _add_report(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object")
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "benchmarks", "results", f"{name}.csv")
    command.add_argument("--csv", default=path, metavar="FILE", help=f"append rows to this file (benchmarks/results/{name}.csv)")


def _say_if_emulated(dtypes: Sequence[str]) -> None:
    import torch

    from pipeline.engine.config import has_bfloat16

    if "bfloat16" in dtypes and not torch.cuda.is_available() and not has_bfloat16(torch.device("cpu")):
        print("this processor emulates bfloat16, several times slower than float32", file=sys.stderr)


def _bench_classifier(options: argparse.Namespace) -> None:
    from benchmarks import classifier, record
    from pipeline.distributed import cores

    _say_if_emulated([options.dtype])
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


def _bench_step(options: argparse.Namespace) -> None:
    from benchmarks import record, step

    _say_if_emulated(options.dtype)
    setting = step.Setting(
        options.network, options.batch, options.classes, options.image_size, rounds=options.rounds, keeps_memory=options.keep_memory
    )
    compiled = (False, True) if options.compile else (False,)
    variants = [step.Variant(*choice) for choice in itertools.product(options.dtype, options.layout, compiled)]
    record.report(step.rows(setting, variants, options.peer), step.as_text, options.json, options.csv)


def _bench_accuracy(options: argparse.Namespace) -> None:
    from benchmarks import accuracy, record

    record.report(accuracy.rows(options.classes, options.batch, options.width), accuracy.as_text, options.json, options.csv)


def _bench_losses(options: argparse.Namespace) -> None:
    from benchmarks import loss_cost, record
    from partial_fc import losses

    _say_if_emulated([options.dtype])
    names = options.losses or sorted(losses.REGISTRY)
    found = loss_cost.rows(names, options.classes, options.batch, options.width, options.dtype, options.pairs)
    record.report(found, loss_cost.as_text, options.json, options.csv)


def _bench_loader(options: argparse.Namespace) -> None:
    from benchmarks import loader, loader_peers, record
    from dali_loaders import DataConfig

    threads = DataConfig().thread_count() if options.threads is None else options.threads
    setting = loader_peers.Setting(options.batch, threads, options.image_size, options.rounds, options.seconds)
    rows = loader.rows(setting, options.data, options.images, options.ranks, options.feed_only)
    record.report(rows, loader.as_text, options.json, options.csv)


def _bench_training(options: argparse.Namespace) -> None:
    from benchmarks import record, training

    entries = options.entries or list(training.ENTRIES)
    record.report(training.rows(entries, options.seeds, options.jobs, options.tune), training.as_text, options.json, options.csv)
