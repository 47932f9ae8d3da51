"""`launch/multinode.sh`: a recipe on a Ray cluster, which is used where it runs or started here and stopped at the end."""

import argparse
import importlib.util
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dali_loaders.extras import missing
from launch.hosts import Host, read_hosts
from pipeline import stopping
from pipeline.commands import Overrides, positionals_first

if TYPE_CHECKING:
    from pipeline.config import TrainConfig  # not here: importing it takes seconds

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = """example, two machines with 8 GPUs each, named in a file with one host per line:
  launch/multinode.sh glint360k_iresnet100_cosface_8gpu --hosts hosts.txt \\
      --set data.train=/data/glint360k/train.rec run.folder=/shared/runs/r100 run.batch=2048 optimizer.lr=0.2"""
# Variables that ranks inherit from the shell of the launcher: names, and with a "_" at the end, beginnings of names. docs/clusters.md has
# the same list. OMPI_MCA_ and not OMPI_: mpirun sets the others, such as ranks, which would hold for one process only.
PASSED_ON = (
    *("NCCL_", "GLOO_", "FI_", "OFI_NCCL_", "EFA_", "RDMAV_", "UCX_", "UCC_", "OMPI_MCA_", "IBV_", "MLX5_"),  # the network
    *("CUDA_", "CUBLAS_", "CUBLASLT_", "CUDNN_", "NVIDIA_TF32_OVERRIDE", "DALI_"),  # the GPU
    *("PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "TRITON_", "DS_"),
    *("OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_"),  # threads and instructions of CPUs
    *("PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", "RAY_TRAIN_", "PROTOSHARD_"),
)
SAME_MACHINES = ("LD_LIBRARY_PATH", "CC", "CXX")  # only to hosts of --hosts, which have the same checkout and so the same libraries
OF_THIS_MACHINE = ("CUDA_VISIBLE_DEVICES",)  # which GPUs a rank gets is for Ray to say
JOB_SERVER_SECONDS = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: that of the job, which is 75 for one that saved and stopped on request; 2 for bad input; 130 or 143 if interrupted
    otherwise."""
    options = parser().parse_args(positionals_first(sys.argv[1:] if arguments is None else arguments))
    for number in stopping.SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # nohup ignores SIGHUP
            signal.signal(number, Leaving())
    try:
        return launch(options, check(options))
    except ValueError as error:
        print(f"multinode.sh: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"multinode.sh: {error}", file=sys.stderr)
        return 1
    except Interrupted as interruption:
        print("multinode.sh: interrupted", file=sys.stderr)
        return 128 + interruption.number


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
    parser.add_argument("--set", dest="overrides", nargs="+", action=Overrides, default=[], metavar="section.field=value")
    parser.add_argument("--resume", default="auto", metavar="auto|none|PATH", help="where the first attempt starts (default: auto)")
    parser.add_argument("--from", dest="overrides", action="append", type="start.weights={}".format, default=[],
                        metavar="CHECKPOINT|RUN|FILE", help="begin a new run with that backbone, as for `protoshard train`")  # fmt: skip
    parser.add_argument("--max-failures", type=int, default=3, metavar="N", help="restarts after a worker died (default: 3)")
    parser.add_argument("--env", nargs="+", action="extend", default=[], metavar="NAME[=VALUE]",
                        help="variables for the ranks beside those of docs/clusters.md; without VALUE, as in this shell")  # fmt: skip
    parser.add_argument("--remote-dir", metavar="DIR", help="the checkout on the hosts, and where relative paths start there "
                        "(default: the path of this checkout, and the current folder)")  # fmt: skip
    return parser


def check(options: argparse.Namespace) -> "TrainConfig":
    """The resolved recipe. ValueError for what can be known to be wrong before anything is started."""
    if importlib.util.find_spec("ray") is None:  # importing it would be too early: it reads its cluster's token then
        raise missing("ray", "train")
    if "start.weights=" in options.overrides:
        raise ValueError("--from is given an empty path: name a checkpoint, a run or a weight file, or leave it out")
    if options.ranks_per_node is not None and options.ranks_per_node < 1:
        raise ValueError(f"--ranks-per-node is {options.ranks_per_node}; a node needs at least 1 rank.")
    if options.max_failures < 0:
        raise ValueError(f"--max-failures is {options.max_failures}; give 0 for no restart, or how many to allow.")
    chosen_variables(options.env)
    from pipeline.resolve import resolve

    return resolve(options.recipe, options.overrides)


def launch(options: argparse.Namespace, config: "TrainConfig") -> int:
    where = options.remote_dir or os.getcwd(), os.path.join(config.run.folder, stopping.FILE), 60 * config.run.timeout
    if options.address is not None:
        from launch import job

        return job.run(job.connect(options.address), entrypoint(options), passed_on(options), lambda: None, job.Ending(*where))
    hosts = read_hosts(options.hosts) if options.hosts else [Host("localhost", "localhost", None, True)]
    if options.ranks_per_node is not None and hosts[0].slots is not None:
        raise ValueError(f"Hosts file {options.hosts} gives slots=N; leave out --ranks-per-node, or the slots.")
    from launch import cluster

    with cluster.started(hosts, root=checkout(options), python=python(options), ranks_per_node=options.ranks_per_node) as running:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=running.token)  # read when Ray is imported
        from launch import job

        client = job.connect(running.dashboard, patience=JOB_SERVER_SECONDS)
        return job.run(client, entrypoint(options), passed_on(options), running.check, job.Ending(*where))


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
    known = (*PASSED_ON, *(SAME_MACHINES if options.address is None else ()), "PYTHONPATH")
    variables = defaults | {name: value for name, value in os.environ.items() if travels(name, known)} | chosen_variables(options.env)
    path = os.pathsep.join(filter(None, [variables.get("PYTHONPATH"), checkout(options)]))
    return variables | {"PYTHONPATH": path}


def travels(name: str, known: Sequence[str]) -> bool:
    return name not in OF_THIS_MACHINE and any(name.startswith(entry) if entry.endswith("_") else name == entry for entry in known)


def chosen_variables(settings: Sequence[str]) -> dict[str, str]:
    """Of --env. ValueError: a variable that this shell has not, or one that must differ from host to host."""
    variables = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name:
            raise ValueError(f"--env {setting} names no variable; give --env NAME or --env NAME=VALUE.")
        if name in OF_THIS_MACHINE:
            raise ValueError(f"--env {name}: Ray gives each rank its GPUs; limit a host with slots=N, or --ranks-per-node.")
        if not equals and name not in os.environ:
            raise ValueError(f"--env {name}: this shell has no such variable; export it, or give --env {name}=VALUE.")
        variables[name] = value if equals else os.environ[name]
    return variables


class Interrupted(KeyboardInterrupt):
    """By a signal. A KeyboardInterrupt, because event loops pass no other on at once."""

    def __init__(self, number: int) -> None:
        self.number = number


class Leaving:
    """A signal handler, which takes a signal that comes twice at once for one."""

    def __init__(self) -> None:
        self.last = -math.inf

    def __call__(self, number: int, frame: object) -> None:
        before, self.last = self.last, time.monotonic()
        if self.last - before > stopping.AGAIN:
            raise Interrupted(number)


if __name__ == "__main__":
    sys.exit(main())
