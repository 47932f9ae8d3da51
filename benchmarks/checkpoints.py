"""How fast checkpoints are written, verified and read, against a plain copy of as many bytes in turn; and how long a step waits for a save
that is written beside it: `python -m benchmarks.checkpoints FOLDER --classes 1000000 --ranks 2 --onto 3`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.record import append
from partial_fc.shards import ClassShard
from pipeline import checkpoint
from pipeline.agreement import Agreement
from pipeline.checkpoint import CheckpointConfig, Part, Saver
from pipeline.distributed import join, run_local
from pipeline.measuring import hardware, peak_memory

STEP = 1


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    os.makedirs(options.folder, exist_ok=True)
    out = os.path.join(options.folder, "measured.json")
    folder = os.path.join(options.folder, "checkpoints")
    try:
        run_local(options.ranks, saving, options, folder, out)
        run_local(options.onto, loading, options, folder, out)
    finally:
        with open(out) as file:
            rows = [json.loads(line) for line in file]
        shutil.rmtree(folder, ignore_errors=True)
        os.remove(out)
    for row in rows:
        row = {"hardware": hardware(), "classes": options.classes, "width": options.width, **row}
        print(", ".join(f"{key} {value}" for key, value in row.items()))
        if options.csv:
            append(options.csv, row)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="on the disk in question; needs room for three times the state")
    parser.add_argument("--classes", type=int, default=1_000_000, metavar="N", help="(1000000)")
    parser.add_argument("--width", type=int, default=512, metavar="D", help="(512)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="that save (2)")
    parser.add_argument("--onto", type=int, default=3, metavar="N", help="that load (3)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of which the median counts (3)")
    parser.add_argument("--synchronous", action="store_true", help="without the copy in host memory")
    parser.add_argument("--csv", metavar="FILE", help="append the figures to it")
    return parser


def matrices(options: argparse.Namespace) -> dict[str, Part]:
    """Prototypes and momentum of this rank."""
    shard = ClassShard.of_rank(options.classes, dist.get_rank(), dist.get_world_size())
    generator = torch.Generator().manual_seed(dist.get_rank())
    drawn = torch.randn(min(shard.rows, 1024), options.width, generator=generator)
    names = ("prototypes", "prototypes.momentum_buffer")
    return {name: checkpoint.rows(drawn.repeat(-(-shard.rows // 1024), 1)[: shard.rows], shard.first, options.classes) for name in names}


def together(work: Callable[[], Any]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def plain_copy(source: str, target: str, share: int) -> None:
    """This rank's bytes of a file from memory that is warm, to the disk, by the system's own means."""
    with open(source, "rb") as read, open(target, "wb") as write:
        shutil.copyfileobj(read, write, 1 << 24)
        assert write.tell() >= share
        os.fsync(write.fileno())


def saving(options: argparse.Namespace, folder: str, out: str) -> None:
    place = join("cpu")
    state = matrices(options)
    size = sum(part.tensor.numel() * part.tensor.element_size() for part in state.values())
    total = torch.tensor(size)
    dist.all_reduce(total)
    saver = Saver(folder, CheckpointConfig(keep=1, asynchronous=not options.synchronous), Agreement())
    saver.reserve(state)
    copies, saves, stalls = [], [], []

    def save() -> None:
        before = saver.stall
        start = time.perf_counter()
        saver.start(STEP, state, {"consumed": 0})
        stalls.append(time.perf_counter() - start)
        saver.finish()
        if saver.trouble:
            raise ValueError(saver.trouble)
        del before

    memory = peak_memory(save, place.device)[0]  # also the first one, which is not timed
    stalls.clear()
    mine = os.path.join(folder, f"step-{STEP:08d}", f"rank-{place.rank:05d}.safetensors")
    for _ in range(options.rounds):
        target = os.path.join(options.folder, f"copy-{place.rank}")
        copies.append(together(lambda: plain_copy(mine, target, size)))  # noqa: B023
        os.remove(target)
        saves.append(together(save))
    if place.is_first:
        copied, saved = median(copies), median(saves)
        report(out, "save", options, total, saved, copied, stall_share=round(median(stalls) / saved, 4), stall=round(median(stalls), 3))
        report(out, "copy", options, total, copied, copied, extra_memory_of_a_rank_GB=round(memory / 1e9, 3))


def loading(options: argparse.Namespace, folder: str, out: str) -> None:
    place = join("cpu")
    agreement = Agreement()
    state = matrices(options)
    size = sum(part.tensor.numel() * part.tensor.element_size() for part in state.values())
    total = torch.tensor(size)
    dist.all_reduce(total)
    saved = checkpoint.open_checkpoint(os.path.join(folder, f"step-{STEP:08d}"))
    files = sorted(name for name in os.listdir(saved.path) if name.endswith(".safetensors"))
    copies, checks, loads = [], [], []

    def copy() -> None:
        """The ranks share the files, of which there are as many as ranks wrote them."""
        for name in files[place.rank :: place.world_size]:
            target = os.path.join(options.folder, f"copy-{name}")
            plain_copy(os.path.join(saved.path, name), target, 0)
            os.remove(target)

    def verify() -> None:
        fault = saved.fault(agreement)
        assert fault is None, fault

    def load() -> None:
        for name, part in state.items():
            saved.fill(name, part.tensor, part.start)

    for _ in range(options.rounds):
        copies.append(together(copy))
        checks.append(together(verify))
        loads.append(together(load))
    memory = peak_memory(load, place.device)[0]
    if place.is_first:
        report(out, "verify", options, total, median(checks), median(copies))
        report(out, "load", options, total, median(loads), median(copies), extra_memory_of_a_rank_GB=round(memory / 1e9, 3))


def report(out: str, what: str, options: argparse.Namespace, total: torch.Tensor, seconds: float, copied: float, **more: float) -> None:
    ranks = options.ranks if what in ("save", "copy") else options.onto
    row = {
        "what": what,
        "asynchronous": int(not options.synchronous),
        "ranks": ranks,
        "GB": round(int(total) / 1e9, 3),
        "seconds": round(seconds, 3),
        "GB_per_second": round(int(total) / 1e9 / seconds, 3),
        "of_a_plain_copy": round(copied / seconds, 3),
        **more,
    }
    with open(out, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
