"""Training on several hosts over slow links: measured, and what `protoshard plan` says about it. One rank on each host, without Ray.

Each host first trains alone, all at the same time: that is computing. Then they train together."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.record import FOLDER, append, report
from pipeline.plan import Job, Scale, seconds_of
from pipeline.plan.hardware import Hardware
from pipeline.plan.step_time import on_nodes

Start = Callable[[Sequence[str]], "subprocess.Popen[str]"]
__all__ = ["append", "as_text", "measured", "step_seconds"]
LINES = 2  # of metrics that are left out at the beginning
MINUTES = 20  # for a run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slow_links", description=__doc__)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument(
        "--on", action="append", default=[], metavar="COMMAND", help='what takes a command line for a shell of a host: "ssh node1"'
    )
    parser.add_argument("--local", type=int, default=0, metavar="N", help="N ranks on this machine in place of --on")
    parser.add_argument("--address", default="127.0.0.1", help="of the first host, for the others")
    parser.add_argument("--interface", default="lo", help="for gloo (lo)")
    parser.add_argument("--between", type=float, metavar="GB/S", help="the rate of a host's link, 1e9 bytes a second (with --local 1)")
    parser.add_argument("--latency", metavar="TIME", help="of a message between hosts, such as 20ms (with --local 50us)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="run.batch is of all hosts")
    parser.add_argument("--folder", help="for the runs, new, seen by all hosts (with --local one in /tmp)")
    parser.add_argument("--csv", default=f"{FOLDER}/scaling.csv", metavar="FILE")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if bool(options.on) == bool(options.local):
        raise ValueError('say where: --local N for ranks of this machine, or --on "ssh node1" --on "ssh node2"')
    for name, here in (("between", 1.0), ("latency", "50us"), ("folder", None)):
        if getattr(options, name) is None:
            if options.on:
                raise ValueError(f"--on needs --{name}: see --help")
            setattr(options, name, here)
    folder = options.folder or tempfile.mkdtemp(prefix="slow-links-")
    prefixes = [shlex.split(one) for one in options.on] or [[]] * options.local

    def on(prefix: list[str]) -> Start:
        def start(command: Sequence[str]) -> subprocess.Popen[str]:
            words = [*prefix, shlex.join(command)] if prefix else command
            return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        return start

    place = {"address": options.address, "interface": options.interface, "local": bool(options.local)}
    link = {"between": 1e9 * options.between, "latency": seconds_of(options.latency)}
    rows = measured([on(prefix) for prefix in prefixes], options.recipe, options.set, folder, **place, **link)
    report(rows, as_text, options.json, options.csv)


def measured(
    hosts: list[Start],
    recipe: str,
    overrides: Sequence[str],
    folder: str,
    *,
    address: str,
    interface: str,
    between: float,
    latency: float,
    local: bool = False,
) -> Iterator[dict[str, Any]]:
    """One row. Batches are of all hosts together; a host alone takes its share. between: bytes per second; latency: seconds of a message.

    local: the ranks share one machine, and `between` is what one of them sends to another"""
    from dali_loaders import open_data
    from pipeline.resolve import resolve

    config = resolve(recipe, list(overrides))
    count, batch = len(hosts), config.run.batch
    rows = []
    for together in (False, True):
        port = 20000 + secrets.randbelow(10000)
        processes = []
        for rank, start in enumerate(hosts):
            own = {"folder": f"{folder}/together" if together else f"{folder}/alone-{rank}", "batch": batch if together else batch // count}
            if not together:
                own["epochs"] = config.run.epochs / count  # as many steps
            world = {"RANK": rank, "WORLD_SIZE": count} if together else {"RANK": 0, "WORLD_SIZE": 1}
            variables = {
                **world,
                "LOCAL_RANK": rank if local and together else 0,
                "LOCAL_WORLD_SIZE": count if local and together else 1,
                "MASTER_ADDR": address if together else "127.0.0.1",
                "MASTER_PORT": port if together else port + rank,
                "GLOO_SOCKET_IFNAME": interface if together else "lo",
                "OMP_NUM_THREADS": 1,
                "PYTHONPATH": os.getcwd(),
            }
            command = [
                "env",
                *(f"{name}={value}" for name, value in variables.items()),
                sys.executable,
                "-m",
                "pipeline.cli",
                "train",
                recipe,
            ]
            if overrides:
                command += ["--set", *overrides]
            command += ["--set", *(f"run.{name}={value}" for name, value in own.items())]  # again, since these may be among the overrides
            processes.append(start(command))
        try:
            for process in processes:
                output, _ = process.communicate(timeout=60 * MINUTES)
                if process.returncode:
                    raise ValueError(f"a run ended with exit code {process.returncode}: {output[-2000:]}")
        finally:
            for process in processes:
                process.kill()
                process.wait()
        folders = [f"{folder}/together"] if together else [f"{folder}/alone-{rank}" for rank in range(count)]
        rows.append(max(step_seconds(one, batch if together else batch // count) for one in folders))
    alone, step = rows
    identities = len(open_data(config.data).identities)
    engine = config.engine
    of_node = count if local else 1  # ranks
    job = Job(
        identities,
        config.backbone.width,
        batch // count * of_node,
        of_node,
        config.run.accumulation,
        dtype=config.classifier.dtype,
        backbone=config.backbone.name,
        image_size=config.data.image_size,
        engine=engine.name,
        zero_stage=engine.zero_stage,
        precision=engine.precision,
    )
    nodes = count // of_node
    scale = Scale((nodes,), between, latency, alone, config.classifier.gather_dtype, engine.compress, config.run.log_every)
    planned = on_nodes(job, Hardware("CPU", 1 << 34, 1e11, 1e11, 1e10, between, is_gpu=False), scale, nodes, alone)
    yield {
        "recipe": recipe,
        "settings": " ".join(overrides),
        "hosts": nodes,
        "ranks": count,
        "gigabytes_per_s": between / 1e9,
        "latency_ms": 1e3 * latency,
        "computing_ms": round(1e3 * alone, 1),
        "step_ms": round(1e3 * step, 1),
        "planned_ms": round(1e3 * planned.step, 1),
        "planned_over_measured": round(planned.step / step, 3),
        "communication": round(1 - alone / step, 3),
        "planned_communication": round(planned.share, 3),
        "megabytes_of_a_step": round(planned.sent / 1e6, 3),
    }


def step_seconds(folder: str, batch: int) -> float:
    """The median of a run's lines of metrics."""
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        speeds = [row["images_per_second"] for row in map(json.loads, file) if "images_per_second" in row]
    if len(speeds) <= LINES:
        raise ValueError(f"{folder} has {len(speeds)} lines of metrics: train longer, or log more often")
    return batch / statistics.median(speeds[LINES:])


def as_text(row: dict[str, Any]) -> str:
    return (
        f"{row['ranks']} ranks on {row['hosts']} hosts, {row['gigabytes_per_s']:g} GB/s, {row['latency_ms']:g} ms a message: step "
        f"{row['step_ms']:.0f} ms, planned {row['planned_ms']:.0f} ({row['planned_over_measured']:.2f}); "
        f"computing {row['computing_ms']:.0f} ms; communication {row['communication']:.1%}, planned {row['planned_communication']:.1%}"
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"slow_links: {error}")
