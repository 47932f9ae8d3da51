"""The `protoshard data` commands."""

from __future__ import annotations

import argparse
import json

from dali_loaders.config import TIMEOUT
from dali_loaders.outputs import check_file
from dali_loaders.progress import announce
from pipeline.commands import add_overrides, command, count


def add(commands: argparse._SubParsersAction) -> None:
    """Adds `data` to the commands of `protoshard`."""
    data = commands.add_parser("data", help="make, pack and check data sets").add_subparsers(metavar="COMMAND", required=True)
    faces = command(data, "faces", _faces, "draw a procedural-faces set", "protoshard data faces data/faces.tar --identities 400")
    faces.add_argument("out", metavar="OUT", help="a .tar, a .rec, or a folder")
    faces.add_argument("--identities", type=count, default=400, metavar="N", help="(400)")
    faces.add_argument("--images", type=count, default=20, metavar="N", help="images of each identity (20)")
    faces.add_argument("--size", type=count, default=112, metavar="PIXELS", help="side of an image (112)")
    faces.add_argument("--seed", type=count, default=0, metavar="N", help="(0)")
    faces.add_argument("--first-identity", type=count, default=0, metavar="N", help="sets that share no number share no identity (0)")
    pack = command(data, "pack", _pack, "pack a set into RecordIO or tar shards", "protoshard data pack photos faces.rec --resize 112")
    pack.add_argument("source", metavar="DATA", help="a set in any form")
    pack.add_argument("out", metavar="OUT", help="a .rec; or a .tar, for shards OUT-000.tar, OUT-001.tar, ...")
    pack.add_argument("--resize", type=count, default=0, metavar="PIXELS", help="encode images of another size anew, as JPEG (as they are)")
    pack.add_argument("--quality", type=count, default=95, metavar="N", help="of JPEGs encoded anew (95)")
    pack.add_argument("--landmarks", default="", metavar="FILE.csv", help="path,x1,y1,...,x5,y5 of each image: cut its face out, 112 x 112")
    pack.add_argument("--shard-size", type=count, default=10_000, metavar="N", help="images of a tar shard (10000)")
    pack.add_argument("--verify", action="store_true", help="decode every image, read all back and compare")
    pack.add_argument("--resume", action="store_true", help="when broken off keep what is done; the same command goes on from it")
    pack.add_argument("--workers", type=count, default=0, metavar="N", help="threads (one for each core, at most 8)")
    pairs = command(data, "pairs", _pairs, "make a .bin pair set", "protoshard data pairs test.tar test.bin --folds 10 --pairs 300")
    pairs.add_argument("data", metavar="DATA", help="a set in any form; with --list the folder of its images")
    pairs.add_argument("out", metavar="OUT.bin")
    pairs.add_argument("--folds", type=count, default=10, metavar="N", help="that share no identity if the set is large enough (10)")
    pairs.add_argument("--pairs", type=count, default=300, metavar="N", help="genuine pairs of a fold, and as many of impostors (300)")
    pairs.add_argument("--seed", type=count, default=0, metavar="N", help="of the choice (0)")
    pairs.add_argument("--list", metavar="FILE.txt", help="pairs of LFW (pairs.txt), CALFW or CPLFW, in place of random ones")
    pairs.add_argument("--landmarks", default="", metavar="FILE.csv", help="of each image, as for pack: cut its face out, 112 x 112")
    check = command(data, "check", _check, "decode every image and report", "protoshard data check faces.tar --fix clean.rec")
    check.add_argument("path", metavar="PATH", help="a folder, .tar or .rec")
    check.add_argument("--reader", default="native", choices=("native", "mxnet"), help="of .rec files (native)")
    check.add_argument("--decoder", default="auto", choices=("auto", "gpu", "cpu"), help="data.decoder of the run to come (auto)")
    check.add_argument("--fix", default="", metavar="OUT.rec", help="write the set without what is wrong; OUT.left_out.txt lists the rest")
    check.add_argument("--model", metavar="CHECKPOINT|RUN", help="also list identities that this network finds near each other")
    check.add_argument("--near", type=_cosine, default=0.7, metavar="COSINE", help="what --model calls near (0.7)")
    check.add_argument("--figure", metavar="FILE.png", help="draw the images per identity")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    for takes_addresses in (pack, check):
        takes_addresses.add_argument("--cache", default="", metavar="FOLDER", help="for sets at remote addresses: data.cache")
        takes_addresses.add_argument(
            "--timeout",
            type=_seconds,
            default=TIMEOUT,
            metavar="SECONDS",
            help=f"for the read of an image: data.timeout ({TIMEOUT:g}; 0: any time)",
        )
    preview = command(
        data,
        "preview",
        _preview,
        "draw a sheet of augmented images",
        "protoshard data preview faces.tar faces_small --set data.augment=adaface",
    )
    preview.add_argument("path", metavar="PATH", help="a folder, .tar or .rec")
    preview.add_argument("recipe", metavar="RECIPE", help="name or file of the recipe whose section data.augment is shown")
    add_overrides(preview)
    preview.add_argument("--out", default="preview.png", metavar="FILE.png", help="(preview.png)")
    preview.add_argument("--images", type=count, default=8, metavar="N", help="rows, an image each (8)")
    preview.add_argument("--versions", type=count, default=8, metavar="N", help="augmented versions of each image (8)")
    preview.add_argument("--seed", type=count, default=0, metavar="N", help="(0)")


def _faces(options: argparse.Namespace) -> None:
    announce("starting")  # as below: what a command imports may take seconds
    from dali_loaders.faces import FacesConfig, write_faces

    write_faces(options.out, FacesConfig(options.identities, options.images, options.size, options.seed, options.first_identity))
    print(f"{options.identities * options.images} images of {options.identities} identities in {options.out}")


def _pack(options: argparse.Namespace) -> int:
    """1 where something was left out."""
    options.when_broken_off = "; the same command goes on where it stopped" if options.resume else "; nothing was written"
    check_file(options.out, "the packed set", ".rec", ".tar")
    announce("starting")
    from dali_loaders import open_source
    from dali_loaders.packing import PackConfig, pack

    config = PackConfig(options.resize, options.quality, options.landmarks, options.shard_size, options.verify)
    source = open_source(options.source, cache=options.cache)
    report = pack(source, options.out, config, workers=options.workers, resume=options.resume, timeout=options.timeout)
    print(*source.account.remarks(options.source), report, sep="\n")
    return 1 if report.left_out_list else 0


def _pairs(options: argparse.Namespace) -> None:
    check_file(options.out, "the pair set", ".bin")
    announce("starting")
    from pipeline.evaluation.make_pairs import pairs_of_list, pairs_of_set

    if options.list:
        print(pairs_of_list(options.list, options.data, options.out, options.landmarks))
    else:
        print(pairs_of_set(options.data, options.out, options.folds, options.pairs, options.seed, options.landmarks))


def _check(options: argparse.Namespace) -> None:
    """Exit code 1 where anything is wrong."""
    if options.fix:
        check_file(options.fix, "the clean set", ".rec")
    if options.figure is not None:
        check_file(options.figure, "--figure", ".png", makes_folder=True)
    announce("starting")
    from dali_loaders.checking import check

    if options.model:  # first, like figures, because the check takes long
        from pipeline.evaluation.near_identities import near_identities, network

        model = network(options.model)
    if options.figure:
        from pipeline.evaluation import figures
    report = check(options.path, options.reader, decoder=options.decoder, fix=options.fix, cache=options.cache, timeout=options.timeout)
    near = near_identities(model, options.path, options.near, options.reader, options.cache) if options.model else []
    if options.json:
        print(json.dumps(report.as_dict() | ({"near": [pair._asdict() for pair in near]} if options.model else {})))
    else:
        print(report)
        if options.model:
            print(f"identities with a cosine above {options.near:g}: {len(near)} pairs")
        for first, second, cosine in near:
            print(f"  {first} and {second}: {cosine:.3f}")
    if options.figure:
        figures.save_png(figures.identities_figure(report.counts, "Images per identity"), options.figure)
    if report.wrong:
        raise SystemExit(1)


def _cosine(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no cosine from 0 to below 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds from 0 on")
    return value


def _preview(options: argparse.Namespace) -> None:
    check_file(options.out, "--out", ".png")
    announce("starting")
    from dali_loaders import open_source
    from dali_loaders.preview import write_preview
    from pipeline.resolve import resolve

    config = resolve(options.recipe, options.set).data
    source = open_source(options.path, config.reader)
    for name in write_preview(options.out, source, config, images=options.images, versions=options.versions, seed=options.seed):
        print(name)
    print(f"{options.out}: a row for each of these images, first as it is, then as training sees it")
