"""The `protoshard data` commands."""

from __future__ import annotations

import argparse
import json

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
    pack = command(data, "pack", _pack, "pack a set into RecordIO", "protoshard data pack faces.tar faces.rec")
    pack.add_argument("source", metavar="FOLDER_OR_TAR")
    pack.add_argument("out", metavar="OUT.rec")
    check = command(data, "check", _check, "decode every image and report", "protoshard data check faces.tar --fix clean.rec")
    check.add_argument("path", metavar="PATH", help="a folder, .tar or .rec")
    check.add_argument("--reader", default="native", choices=("native", "mxnet"), help="of .rec files (native)")
    check.add_argument("--decoder", default="auto", choices=("auto", "gpu", "cpu"), help="data.decoder of the run to come (auto)")
    check.add_argument("--fix", default="", metavar="OUT.rec", help="write the set without what is wrong; OUT.left_out.txt lists the rest")
    check.add_argument("--model", metavar="CHECKPOINT|RUN", help="also list identities that this network finds near each other")
    check.add_argument("--near", type=_cosine, default=0.7, metavar="COSINE", help="what --model calls near (0.7)")
    check.add_argument("--figure", metavar="FILE.png", help="draw the images per identity")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    preview = command(
        data,
        "preview",
        _preview,
        "draw a sheet of augmented images",
        "protoshard data preview faces.tar faces_small --set data.augment=adaface",
    )
    preview.add_argument("path", metavar="PATH", help="a folder, .tar or .rec")
    preview.add_argument("recipe", metavar="RECIPE", help="name or file of the recipe whose section data.augment is shown")
    preview.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.field=value", help="override fields")
    preview.add_argument("--out", default="preview.png", metavar="FILE.png", help="(preview.png)")
    preview.add_argument("--images", type=int, default=8, metavar="N", help="rows, an image each (8)")
    preview.add_argument("--versions", type=int, default=8, metavar="N", help="augmented versions of each image (8)")
    preview.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")


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
    """Exit code 1 where anything is wrong."""
    from dali_loaders.checking import check

    if options.model:  # first, like figures, because the check takes long
        from pipeline.evaluation.near_identities import near_identities, network

        model = network(options.model)
    if options.figure:
        from pipeline.evaluation import figures
    report = check(options.path, options.reader, decoder=options.decoder, fix=options.fix)
    near = near_identities(model, options.path, options.near, options.reader) if options.model else []
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


def _preview(options: argparse.Namespace) -> None:
    from dali_loaders import open_source
    from dali_loaders.preview import write_preview
    from pipeline.resolve import resolve

    config = resolve(options.recipe, options.set).data
    source = open_source(options.path, config.reader)
    for name in write_preview(options.out, source, config, images=options.images, versions=options.versions, seed=options.seed):
        print(name)
    print(f"{options.out}: a row for each of these images, first as it is, then as training sees it")
