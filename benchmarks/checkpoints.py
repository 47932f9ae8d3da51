"""How fast checkpoints are written, verified and read, against a plain copy of the same bytes in turn (by as many processes, to the disk
and synced, or into memory); and how long a step waits for a save that is written beside it:
`python -m benchmarks.checkpoints FOLDER --classes 1000000 --ranks 2 --onto 3`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.record import append
from partial_fc.shards import ClassShard
from pipeline import checkpoint
from pipeline.agreement import Agreement
from pipeline.checkpoint import CheckpointConfig, Part, Saver
from pipeline.distributed import join
from pipeline.local_ranks import run_local
from pipeline.measuring import peak_memory


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
        row = {"classes": options.classes, "width": options.width, "asynchronous": int(not options.synchronous), **row}
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
    parser.add_argument(
        "--gradient-seconds", type=float, default=0.5, metavar="S", help="for which the next step computes before it moves weights (0.5)"
    )
    parser.add_argument("--synchronous", action="store_true", help="without the copy in host memory")
    parser.add_argument("--csv", metavar="FILE", help="append the figures to it")
    return parser


def matrices(options: argparse.Namespace) -> dict[str, Part]:
    """Prototypes and momentum of this rank."""
    shard = ClassShard.of_rank(options.classes, dist.get_rank(), dist.get_world_size())
    generator = torch.Generator().manual_seed(dist.get_rank())
    drawn = torch.randn(min(shard.rows, 1024), options.width, generator=generator)
    names = ("prototypes", "prototypes.momentum_buffer")
    rows = {name: drawn.repeat(-(-shard.rows // 1024), 1)[: shard.rows] for name in names}
    return {name: replace(checkpoint.rows(mine, shard.first, options.classes), settled=True) for name, mine in rows.items()}


def together(work: Callable[[], Any]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def newest(folder: str) -> str:
    return os.path.join(folder, checkpoint.complete(folder)[-1])


def copy_to_disk(source: str, target: str) -> None:
    """By the system's own means, until it is on the disk."""
    with open(source, "rb") as read, open(target, "wb") as write:
        shutil.copyfileobj(read, write, 1 << 24)
        os.fsync(write.fileno())
    os.remove(target)


def copy_to_memory(sources: list[str], out: memoryview) -> None:
    for source in sources:
        with open(source, "rb", buffering=0) as read:
            at = 0
            while count := read.readinto(out[at : at + (1 << 24)]):
                at = at + count if at + count < len(out) else 0


def saving(options: argparse.Namespace, folder: str, out: str) -> None:
    place = join("cpu")
    state = matrices(options)
    saver = Saver(folder, CheckpointConfig(keep=1, asynchronous=not options.synchronous), Agreement())
    saver.reserve(state)
    copies, saves, stalls = [], [], []
    steps = itertools.count(1)

    def save() -> None:
        """As training does it: the next step computes its gradients, and then wants to move the weights."""
        start = time.perf_counter()
        saver.start(next(steps), state, {"consumed": 0})
        begun = time.perf_counter()
        left, right = torch.ones(256, 512), torch.ones(512, 512)
        while time.perf_counter() - begun < options.gradient_seconds:
            left @ right
        computed = time.perf_counter()
        saver.fence()
        stalls.append(begun - start + time.perf_counter() - computed)
        saver.finish()
        if saver.trouble:
            raise ValueError(saver.trouble)

    memory = peak_memory(save, place.device)[0]  # of the first one, which is not timed
    stalls.clear()
    for _ in range(options.rounds):
        mine = os.path.join(newest(folder), f"rank-{place.rank:05d}.safetensors")
        copies.append(together(lambda: copy_to_disk(mine, os.path.join(options.folder, f"copy-{place.rank}"))))  # noqa: B023
        saves.append(together(save))
    report(out, "save", options.ranks, state, saves, copies, memory, stalls)


def loading(options: argparse.Namespace, folder: str, out: str) -> None:
    place = join("cpu")
    agreement = Agreement()
    state = matrices(options)
    saved = checkpoint.open_checkpoint(newest(folder))
    files = sorted(os.path.join(saved.path, name) for name in os.listdir(saved.path) if name.endswith(".safetensors"))
    copies, checks, loads = [], [], []
    buffer = memoryview(bytearray(min(os.path.getsize(files[0]), 1 << 30)))  # beside the state there may be no room for a file

    def verify() -> None:
        fault = saved.fault(agreement)
        assert fault is None, fault

    def load() -> None:
        for name, part in state.items():
            saved.fill(name, part.tensor, part.start)

    memory = peak_memory(load, place.device)[0]
    for _ in range(options.rounds):
        copies.append(together(lambda: copy_to_memory(files[place.rank :: place.world_size], buffer)))
        checks.append(together(verify))
        loads.append(together(load))
    report(out, "verify", options.onto, state, checks, copies, 0, [])
    report(out, "load", options.onto, state, loads, copies, memory, [])


def report(
    out: str, what: str, ranks: int, state: dict[str, Part], times: list[float], copies: list[float], memory: int, stalls: list[float]
) -> None:
    """One row, by rank 0. Every rank calls it."""
    told: list[Any] = [None] * ranks
    dist.all_gather_object(told, (sum(part.tensor.nbytes for part in state.values()), memory, median(stalls or [0.0])))
    size, memory, stall = sum(one[0] for one in told), max(one[1] for one in told), max(one[2] for one in told)
    row = {
        "what": what,
        "ranks": ranks,
        "GB": round(size / 1e9, 3),
        "seconds": round(median(times), 3),
        "GB_per_s": round(size / 1e9 / median(times), 3),
        "copy_GB_per_s": round(size / 1e9 / median(copies), 3),
        "of_the_copy": [round(copy / one, 3) for copy, one in zip(copies, times, strict=True)],
        "extra_GB_of_a_rank": round(memory / 1e9, 3),
        "stall_s": round(stall, 3),
        "stall_share": round(stall / median(times), 4),
    }
    if dist.get_rank() == 0:
        with open(out, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
