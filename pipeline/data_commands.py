"""The `protoshard data` commands."""

from __future__ import annotations

import argparse

from pipeline.commands import command


def add(commands: argparse._SubParsersAction) -> None:
    """Adds `data` to the commands of `protoshard`."""
    data = commands.add_parser("data", help="make, pack and check data sets").add_subparsers(metavar="COMMAND", required=True)
    faces = command(data, "faces", _faces, "draw a procedural-faces set", "protoshard data faces data/faces.tar --identities 400")
    faces.add_argument("out", metavar="OUT", help="a .tar, a .rec, or a folder")
    faces.add_argument("--identities", type=int, default=400, metavar="N", help="(400)")
    faces.add_argument("--images", type=int, default=20, metavar="N", help="images of each identity (20)")
    faces.add_argument("--size", type=int, default=112, metavar="PIXELS", help="side of an image (112)")
    faces.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    faces.add_argument("--first-identity", type=int, default=0, metavar="N", help="sets that share no number share no identity (0)")
    pack = command(data, "pack", _pack, "pack a set into RecordIO or tar shards", "protoshard data pack photos faces.rec --resize 112")
    pack.add_argument("source", metavar="DATA", help="a set in any form")
    pack.add_argument("out", metavar="OUT", help="a .rec; or a .tar, for shards OUT-000.tar, OUT-001.tar, ...")
    pack.add_argument("--resize", type=int, default=0, metavar="PIXELS", help="encode images of another size anew, as JPEG (as they are)")
    pack.add_argument("--quality", type=int, default=95, metavar="N", help="of JPEGs encoded anew (95)")
    pack.add_argument("--landmarks", default="", metavar="FILE.csv", help="path,x1,y1,...,x5,y5 of each image: cut its face out, 112 x 112")
    pack.add_argument("--shard-size", type=int, default=10_000, metavar="N", help="images of a tar shard (10000)")
    pack.add_argument("--verify", action="store_true", help="decode every image, read all back and compare")
    pack.add_argument("--resume", action="store_true", help="when broken off keep what is done; the same command goes on from it")
    pack.add_argument("--workers", type=int, default=0, metavar="N", help="threads (one for each core, at most 8)")
    pairs = command(data, "pairs", _pairs, "make a .bin pair set", "protoshard data pairs test.tar test.bin --folds 10 --pairs 300")
    pairs.add_argument("data", metavar="DATA", help="a set in any form; with --list the folder of its images")
    pairs.add_argument("out", metavar="OUT.bin")
    pairs.add_argument("--folds", type=int, default=10, metavar="N", help="that share no identity if the set is large enough (10)")
    pairs.add_argument("--pairs", type=int, default=300, metavar="N", help="genuine pairs of a fold, and as many of impostors (300)")
    pairs.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice (0)")
    pairs.add_argument("--list", metavar="FILE.txt", help="pairs of LFW (pairs.txt), CALFW or CPLFW, in place of random ones")
    pairs.add_argument("--landmarks", default="", metavar="FILE.csv", help="of each image, as for pack: cut its face out, 112 x 112")
    check = command(data, "check", _check, "decode every image and report", "protoshard data check faces.tar")
    check.add_argument("path", metavar="PATH", help="a folder, .tar or .rec")
    check.add_argument("--reader", default="native", choices=("native", "mxnet"), help="of .rec files (native)")
    check.add_argument("--decoder", default="auto", choices=("auto", "gpu", "cpu"), help="data.decoder of the run to come (auto)")


def _faces(options: argparse.Namespace) -> None:
    from dali_loaders.faces import FacesConfig, write_faces

    write_faces(options.out, FacesConfig(options.identities, options.images, options.size, options.seed, options.first_identity))
    print(f"{options.identities * options.images} images of {options.identities} identities in {options.out}")


def _pack(options: argparse.Namespace) -> int:
    """1 where something was left out."""
    from dali_loaders import open_source
    from dali_loaders.packing import PackConfig, pack

    options.when_broken_off = "; the same command goes on where it stopped" if options.resume else "; nothing was written"
    config = PackConfig(options.resize, options.quality, options.landmarks, options.shard_size, options.verify)
    source = open_source(options.source)
    report = pack(source, options.out, config, workers=options.workers, resume=options.resume)
    if source.account.passed_over:
        print(f"{options.source}:", "\n".join(source.account.lines()))
    print(report)
    return 1 if report.left_out_list else 0


def _pairs(options: argparse.Namespace) -> None:
    from pipeline.evaluation.make_pairs import pairs_of_list, pairs_of_set

    if options.list:
        print(pairs_of_list(options.list, options.data, options.out, options.landmarks))
    else:
        print(pairs_of_set(options.data, options.out, options.folds, options.pairs, options.seed, options.landmarks))


def _check(options: argparse.Namespace) -> None:
    from dali_loaders.checking import check

    print(check(options.path, options.reader, decoder=options.decoder))
