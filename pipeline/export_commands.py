"""The commands that take a model out of a run and use it: `protoshard export`, `embed`, `match`, `search`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from dali_loaders.names import printable
from dali_loaders.progress import announce
from pipeline.commands import command

if TYPE_CHECKING:
    from pipeline.export import Model

MODEL = "a folder of protoshard export; or a step-N folder, or a run's for its newest checkpoint"
COMPARED = "an image, a set of images in any form, or embeddings (.parquet, .npy)"


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the four commands to those of `protoshard`."""
    export = command(
        commands, "export", _export, "make a folder of a model that works by itself", "protoshard export runs/faces_small model"
    )
    export.add_argument("run", metavar="RUN|CHECKPOINT", help="a run's folder, for its newest checkpoint, or a step-N folder")
    export.add_argument("out", metavar="OUT", help="the new folder")
    onnx = "also model.onnx, compared with torch (where the extra export is installed)"
    export.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=None, help=onnx)
    export.add_argument("--torch-export", action="store_true", help="also model.pt2, a program of torch.export")
    export.add_argument("--prototypes", action="store_true", help="also the prototypes, merged from the parts of all ranks")
    export.add_argument("--data", metavar="SET", help="measure thresholds on this labelled set (those that the run measured)")
    export.add_argument("--faces", action="store_true", help="images are aligned faces: the five points of ArcFace's template are noted")
    export.set_defaults(when_broken_off="; nothing was written")
    embed = command(commands, "embed", _embed, "write the embeddings of images to a file", "protoshard embed model photos/ photos.parquet")
    embed.add_argument("model", metavar="MODEL", help=MODEL)
    embed.add_argument("images", metavar="IMAGES", help="a set in any form, a folder of images, or one image")
    embed.add_argument("out", metavar="OUT", help="a .parquet; or a .npy, with OUT.csv (identity and name of each row) and OUT.json")
    embed.add_argument("--ranks", type=int, default=1, metavar="N", help="processes on this machine (1)")
    embed.add_argument("--no-flip", action="store_true", help="leave out the mirror image (the model decides otherwise)")
    embed.add_argument("--decoder", default="auto", choices=("auto", "dali", "opencv"), help="(auto: DALI where it is installed)")
    embed.set_defaults(when_broken_off="; the same command goes on where it stopped")
    match = command(commands, "match", _match, "compare two images, or two sets", "protoshard match a.jpg b.jpg --model model --far 1e-3")
    match.add_argument("first", metavar="A", help=COMPARED)
    match.add_argument("second", metavar="B", help="likewise; of a set the mean embedding counts, as of one identity")
    match.add_argument("--far", metavar="1e-N", help="also decide, by the model's threshold at that false accept rate")
    search = command(commands, "search", _search, "find the nearest images", "protoshard search gallery.parquet queries.parquet --top 5")
    search.add_argument("gallery", metavar="GALLERY", help=COMPARED)
    search.add_argument("queries", metavar="QUERY", help="likewise")
    search.add_argument("--top", type=int, default=10, metavar="K", help="images of the gallery for each query (10)")
    search.add_argument("--out", metavar="FILE.csv", help="write the table there (standard output)")
    search.add_argument("--faiss", action="store_true", help="by faiss, of the extra search; its answers are exact too")
    for one in (match, search):
        one.add_argument("--model", metavar="MODEL", help=f"what embeds images: {MODEL}")
    match.add_argument("--json", action="store_true", help="print one JSON object")
    for one in (export, embed, match, search):
        one.add_argument("--ema", action="store_true", help="of a run: the average of the weights that it kept (run.ema)")
        one.add_argument("--recipe", metavar="FILE.py", help="the recipe file that registers the network, if that is one's own")


def _export(options: argparse.Namespace) -> None:
    announce("starting")
    from pipeline.export.model_folder import export

    export(
        options.run,
        options.out,
        ema=options.ema,
        recipe=options.recipe,
        data=options.data,
        faces=options.faces,
        onnx=options.onnx,
        program=options.torch_export,
        prototypes=options.prototypes,
    )


def _embed(options: argparse.Namespace) -> int:
    """1 where images were left out."""
    announce("starting")
    from pipeline.local_ranks import run_local

    settings = options.model, options.images, options.out, options.ema, options.recipe, options.no_flip, options.decoder
    run_local(options.ranks, _embed_on_rank, *settings)
    return 1 if os.path.exists(f"{options.out}.unreadable.txt") else 0


def _embed_on_rank(model: str, images: str, out: str, ema: bool, recipe: str | None, no_flip: bool, decoder: str) -> None:
    import torch.distributed as dist

    from pipeline.export.embed_set import embed_set

    done = embed_set(model, images, out, ema=ema, recipe=recipe, flip=False if no_flip else None, decoder=decoder)
    if dist.get_rank() == 0:
        print(f"{out}: {done.rows:,} embeddings of width {done.width}, decoded with {done.decoder}")
        if done.remark:
            print(done.remark)
        if done.unreadable:
            print(f"{done.unreadable} images cannot be decoded: {out}.unreadable.txt lists them")


def _match(options: argparse.Namespace) -> None:
    announce("starting")
    from pipeline.export.comparing import match

    found = match(options.first, options.second, _model(options), options.far)
    if options.json:
        print(json.dumps(asdict(found)))
        return
    for line in found.remarks:
        print(line, file=sys.stderr)
    print(f"cosine {found.cosine:.4f}")
    if found.threshold is not None:
        verdict = "the same" if found.decision else "different"
        print(f"{verdict} identity at FAR {found.far} (threshold {found.threshold:.4f}, measured on {printable(found.set or '')})")


def _search(options: argparse.Namespace) -> None:
    announce("starting")
    from dali_loaders.outputs import check_file
    from pipeline.export.comparing import search, write_csv
    from pipeline.export.new_folder import check_new, new_file

    if options.out is not None:
        check_new(options.out)
        check_file(options.out, "--out", ".csv")
    remarks: list[str] = []
    found = search(options.gallery, options.queries, _model(options), options.top, options.faiss, remarks)
    first = next(found, None)
    rows = (row for part in ([first] if first else [], found) for row in part)
    for line in remarks:
        print(line, file=sys.stderr)
    if not options.out:
        write_csv(rows, sys.stdout)
        return
    with new_file(options.out) as file:
        count = write_csv(rows, file)
    print(f"{options.out}: {count:,} lines")


def _model(options: argparse.Namespace) -> Model | None:
    if options.model is None:
        if options.ema or options.recipe:
            raise ValueError(
                f"{'--ema' if options.ema else '--recipe'} says how --model is read, and there is none: name one, or leave it out"
            )
        return None
    from pipeline.export.model_folder import open_model

    return open_model(options.model, ema=options.ema, recipe=options.recipe)
