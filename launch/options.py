"""The command line of `launch/multinode.sh`, and what of it can be refused before anything is started."""

import argparse
import importlib.util
import re
from typing import TYPE_CHECKING

from dali_loaders.extras import missing
from launch import ranks
from launch.variables import chosen_variables
from pipeline.commands import Overrides

if TYPE_CHECKING:
    from pipeline.config import TrainConfig  # not here: importing it takes seconds

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
EXAMPLE = """examples:
  launch/multinode.sh faces_small --ranks-per-node 2                     # this machine alone
  launch/multinode.sh RECIPE --hosts hosts.txt --check                   # are these machines ready?
  launch/multinode.sh glint360k_iresnet100_cosface_8gpu --hosts hosts.txt --ranks 8:16 \\
      --set data.train=/data/glint360k/train.rec run.folder=/shared/runs/r100 run.batch=2048 optimizer.lr=0.2
  launch/multinode.sh RECIPE --address http://head:8265 --name faces --detach
exit codes: 0 done, 1 failed, 2 bad input or a check that failed, 75 saved and stopped on request"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/multinode.sh",
        description="Run a recipe through Ray Train: on a running cluster (--address), on the hosts of a file over ssh (--hosts), "
        "or on this machine alone. Workers that die are restarted from the newest checkpoint; what was started is stopped at the end.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="as for `protoshard train`")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hosts", metavar="FILE", help="one [user@]host per line, slots=N for its ranks, address=A under which "
                       "others reach it; the first is the head")  # fmt: skip
    where.add_argument("--address", metavar="RAY_ADDRESS", help="a running Ray cluster: http://head:8265 or head:6379")
    before = parser.add_mutually_exclusive_group()
    before.add_argument("--check", action="store_true", help="look at all hosts first: versions, GPUs, disks, clocks, folders, network; "
                        "print a table and start nothing")  # fmt: skip
    before.add_argument("--dry-run", action="store_true", help="print the commands of a run and start nothing")
    parser.add_argument("--dashboard-host", metavar="ADDRESS", help="with --hosts: where the dashboard of the head listens, such as "
                        "0.0.0.0 (default: on the head's loopback alone, which this machine reaches through ssh)")  # fmt: skip
    parser.add_argument("--ranks", metavar="N|MIN:MAX", help="ranks of the job (default: all that have a place); with MIN:MAX it goes on "
                        "with fewer when hosts are lost, and with more when they are back")  # fmt: skip
    parser.add_argument("--ranks-per-node", type=int, metavar="R", help="ranks of each host (default: its GPUs, or 2 without GPU)")
    parser.add_argument("--set", dest="overrides", nargs="+", action=Overrides, default=[], metavar="section.field=value",
                        help="fields of the recipe, as for `protoshard train`")  # fmt: skip
    parser.add_argument("--resume", default="auto", metavar="auto|none|PATH", help="where the first attempt starts: from the "
                        "newest checkpoint of the run if there is one, anew, or from that checkpoint (default: auto)")  # fmt: skip
    parser.add_argument("--from", dest="overrides", action="append", type="start.weights={}".format, default=[],
                        metavar="CHECKPOINT|RUN|FILE", help="begin a new run with that backbone, as for `protoshard train`")  # fmt: skip
    parser.add_argument("--max-failures", type=int, default=3, metavar="N", help="restarts after a worker died, until there is a newer "
                        "checkpoint (default: 3)")  # fmt: skip
    parser.add_argument("--env", nargs="+", action="extend", default=[], metavar="NAME[=VALUE]",
                        help="variables for the ranks, beside those of NCCL, CUDA, torch and the like, "
                        "which travel by themselves (docs/clusters.md); without VALUE, as in this shell")  # fmt: skip
    parser.add_argument("--remote-dir", metavar="DIR", help="the checkout on the hosts, and where relative paths start there "
                        "(default: the path of this checkout, and the current folder)")  # fmt: skip
    jobs = parser.add_argument_group("jobs on a running cluster, with --address")
    jobs.add_argument("--name", default="", help="a name for the job: the same command, given again while it runs, follows it")
    jobs.add_argument("--detach", action="store_true", help="leave once the job runs, with exit code 0")
    jobs.add_argument("--attach", metavar="JOB", help="follow a job, by name or id, to its end, and end with its exit code; without RECIPE")
    jobs.add_argument("--stop", metavar="JOB", help="ask a job to save and stop, and wait for it (up to run.timeout); without RECIPE")
    return parser


def check_jobs(options: argparse.Namespace) -> None:
    """ValueError for options on jobs that do not go together."""
    other = next((f"--{name} {value}" for name in ("attach", "stop") if (value := getattr(options, name))), "")
    if other and options.recipe:
        raise ValueError(f"{other} is about a job that runs, so give no RECIPE with it.")
    if options.attach and options.stop:
        raise ValueError("--attach and --stop exclude each other; stop the job, or follow it.")
    if not (options.recipe or other):
        raise ValueError("RECIPE is missing; see launch/multinode.sh --help.")
    needs = other or (options.detach and "--detach") or (options.name and f"--name {options.name}")
    if needs and options.address is None:
        raise ValueError(
            f"{needs} needs a cluster that outlives this command: give --address (docs/clusters.md says how to start one), or run "
            "without it under tmux or nohup."
        )
    if options.name and not NAME.fullmatch(options.name):
        raise ValueError(f"--name {options.name} is no name of a job; give up to 64 letters, digits, dots, dashes and underscores.")
    if other:
        unused = [f"--{flag}" for flag in given(options) if flag not in ("attach", "stop", "address")]
        if unused:
            raise ValueError(f"{other} is about a job that runs; leave out {', '.join(unused)}.")
    if (options.check or options.dry_run) and (options.name or options.detach):
        raise ValueError(f"{'--check' if options.check else '--dry-run'} starts no job; leave out --name and --detach.")
    if options.dashboard_host and options.address:
        raise ValueError("--dashboard-host is about a cluster that is started here; the one at --address has its dashboard.")


def given(options: argparse.Namespace) -> list[str]:
    """Options that differ from their defaults, by their names on the command line."""
    default = parser()
    names = {"overrides": "set"}
    return [names.get(name, name.replace("_", "-")) for name, value in vars(options).items() if value != default.get_default(name)]


def needs_ray() -> None:
    if importlib.util.find_spec("ray") is None:  # importing it would be too early: it reads its cluster's token then
        raise missing("train", "ray")


def check(options: argparse.Namespace) -> "TrainConfig":
    """The resolved recipe. ValueError for what can be known to be wrong before anything is started."""
    needs_ray()
    if "start.weights=" in options.overrides:
        raise ValueError("--from is given an empty path: name a checkpoint, a run or a weight file, or leave it out")
    if options.ranks_per_node is not None and options.ranks_per_node < 1:
        raise ValueError(f"--ranks-per-node is {options.ranks_per_node}; a node needs at least 1 rank.")
    if options.ranks is not None:
        ranks.parse(options.ranks)
    if options.max_failures < 0:
        raise ValueError(f"--max-failures is {options.max_failures}; give 0 for no restart, or how many to allow.")
    chosen_variables(options.env)
    from pipeline.resolve import resolve

    return resolve(options.recipe, options.overrides)
