"""The arguments of benchmarks/first_gpu.sh."""

from __future__ import annotations

import argparse
import os
import signal
import sys

import torch

from benchmarks import peer
from benchmarks.first_gpu import runner
from benchmarks.first_gpu.page import Page
from benchmarks.first_gpu.table import STEPS


def main(arguments: list[str] | None = None) -> int:
    """0 where every step ran or was left out, 1 where one failed, 2 for bad input."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(
        prog="bash benchmarks/first_gpu.sh",
        description="Measures what only a GPU can tell, in order of worth, and keeps it as one CSV file and one Markdown page in OUT. "
        "ARCFACE_TORCH=PATH names a checkout of insightface/recognition/arcface_torch to measure beside.",
        epilog="example: bash benchmarks/first_gpu.sh runs/first_gpu 25",
    )
    parser.add_argument("out", metavar="OUT", help="folder of the results; earlier ones there are kept")
    parser.add_argument(
        "minutes", metavar="MINUTES", nargs="?", type=float, default=25.0, help="steps for which these do not suffice are left out (25)"
    )
    parser.add_argument("--small", action="store_true", help="sizes for a few minutes, also without a GPU")
    parser.add_argument("--only", metavar="STEP,...", default=",".join(names), help=f"some of {', '.join(names)} (all)")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"there is no step {unknown[0]!r}: known are {', '.join(names)}")
    if not options.small and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: add --small for a run on the CPU")
    command = " ".join(["bash benchmarks/first_gpu.sh", *(arguments if arguments is not None else sys.argv[1:])])
    for name in ("ARCFACE_TORCH", "PROTOSHARD_DATA"):
        if os.environ.get(name):
            os.environ[name] = os.path.abspath(os.environ[name])  # steps run in the repository's folder
    try:
        if path := os.environ.get("ARCFACE_TORCH"):
            peer.check(path)
        page = Page(options.out, command)
    except ValueError as error:
        parser.error(str(error))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, which ends what runs
    try:
        failed = runner.run(page, [step for step in STEPS if step.name in wanted], options.minutes, options.small)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"results: {page.path}.md and .csv; " + (f"failed: {', '.join(failed)}" if failed else "nothing failed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
