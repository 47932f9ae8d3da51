"""`launch/multinode.sh`: a recipe on a Ray cluster, which is used where it runs or started here and stopped at the end."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from launch.hosts import Host, read_hosts

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = """example, two machines with 8 GPUs each, named in a file with one host per line:
  launch/multinode.sh glint360k_iresnet100_cosface_8gpu --hosts hosts.txt --set run.folder=/shared/runs/r100 run.batch=2048"""
PASSED_ON = ("OMP_NUM_THREADS", "NCCL_", "GLOO_", "TORCH_", "RAY_TRAIN_", "CUDA_DEVICE_ORDER", "PYTHONUNBUFFERED", "PROTOSHARD_")
JOB_SERVER_SECONDS = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: that of the job, 2 for bad input, 130 or 143 when interrupted."""
    options = parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    try:
        check(options)
        return launch(options)
    except ValueError as error:
        print(f"multinode.sh: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"multinode.sh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("multinode.sh: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/multinode.sh",
        description="Run a recipe through Ray Train: on a running cluster (--address), on the hosts of a file over ssh (--hosts), "
        "or on this machine alone. Workers that die are restarted from the newest checkpoint; what was started is stopped at the end.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="as for `protoshard train`")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hosts", metavar="FILE", help="one [user@]host per line, slots=N for its ranks; the first is the head")
    where.add_argument("--address", metavar="RAY_ADDRESS", help="a running Ray cluster: http://head:8265 or head:6379")
    parser.add_argument("--ranks-per-node", type=int, metavar="R", help="default: the GPUs of a node, or 2 without GPU")
    parser.add_argument("--set", dest="overrides", nargs="+", action="extend", default=[], metavar="section.field=value")
    parser.add_argument("--resume", default="auto", metavar="auto|none|PATH", help="where the first attempt starts (default: auto)")
    parser.add_argument("--max-failures", type=int, default=3, metavar="N", help="restarts after a worker died (default: 3)")
    parser.add_argument("--remote-dir", metavar="DIR", help="the checkout on the hosts, and where relative paths start there "
                        "(default: the path of this checkout, and the current folder)")  # fmt: skip
    return parser


def check(options: argparse.Namespace) -> None:
    """ValueError for what can be known to be wrong before anything is started."""
    if options.ranks_per_node is not None and options.ranks_per_node < 1:
        raise ValueError(f"--ranks-per-node is {options.ranks_per_node}; a node needs at least 1 rank.")
    if options.max_failures < 0:
        raise ValueError(f"--max-failures is {options.max_failures}; give 0 for no restart, or how many to allow.")
    from pipeline.resolve import resolve

    resolve(options.recipe, options.overrides)


def launch(options: argparse.Namespace) -> int:
    if options.address is not None:
        from launch import job

        return job.run(job.connect(options.address), entrypoint(options), passed_on(options), check=lambda: None)
    hosts = read_hosts(options.hosts) if options.hosts else [Host("localhost", "localhost", None, True)]
    if options.ranks_per_node is not None and hosts[0].slots is not None:
        raise ValueError(f"Hosts file {options.hosts} gives slots=N; leave out --ranks-per-node, or the slots.")
    from launch import cluster

    with cluster.started(hosts, root=checkout(options), python=python(options), ranks_per_node=options.ranks_per_node) as running:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=running.token)  # read when Ray is imported
        from launch import job

        client = job.connect(running.dashboard, patience=JOB_SERVER_SECONDS)
        return job.run(client, entrypoint(options), passed_on(options), check=running.check)


def entrypoint(options: argparse.Namespace) -> str:
    """The job's shell command; quoted, so that any --set value survives the shell that runs it."""
    command = [python(options), "-m", "launch.ray_driver", options.recipe, f"--folder={options.remote_dir or os.getcwd()}"]
    command += [f"--resume={options.resume}", f"--max-failures={options.max_failures}"]
    command += [f"--set={override}" for override in options.overrides]
    if options.ranks_per_node is not None:
        command.append(f"--ranks-per-node={options.ranks_per_node}")
    return shlex.join(command)


def checkout(options: argparse.Namespace) -> str:
    return options.remote_dir or str(ROOT)


def python(options: argparse.Namespace) -> str:
    """This interpreter, at the same place in the hosts' checkout."""
    try:
        return str(Path(checkout(options)) / Path(sys.executable).relative_to(ROOT))
    except ValueError:
        return sys.executable


def passed_on(options: argparse.Namespace) -> dict[str, str]:
    """Variables of this shell that the ranks get too, and those that keep Ray quick and readable."""
    defaults = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise every line comes twice
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # needs train loops that report to Ray
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
    }
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), checkout(options)]))
    return defaults | {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)} | {"PYTHONPATH": path}


def leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
