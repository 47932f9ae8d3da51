"""`launch/multinode.sh`: a recipe on a Ray cluster, which is used where it runs or started here and stopped at the end."""

import argparse
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch.checkout import checkout, python
from launch.hosts import Host, read_hosts
from launch.options import check, parser
from launch.variables import passed_on
from pipeline import stopping
from pipeline.commands import positionals_first

if TYPE_CHECKING:
    from pipeline.config import TrainConfig  # not here: importing it takes seconds

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


def launch(options: argparse.Namespace, config: "TrainConfig") -> int:
    where = options.remote_dir or os.getcwd(), os.path.join(config.run.folder, stopping.FILE), 60 * config.run.timeout
    if options.address is not None:
        if options.dry_run:
            print(f"job at {options.address}: {entrypoint(options)}")
            return 0
        from launch import check_cluster, connecting, job

        if options.check:
            return check_cluster.check(connecting.connect(options.address), check_entrypoint(options), passed_on(options))
        return job.run(connecting.connect(options.address), entrypoint(options), passed_on(options), lambda: None, job.Ending(*where))
    hosts = read_hosts(options.hosts) if options.hosts else [Host("localhost", "localhost", None, True)]
    if options.ranks_per_node is not None and hosts[0].slots is not None:
        raise ValueError(f"Hosts file {options.hosts} gives slots=N; leave out --ranks-per-node, or the slots.")
    there: dict[str, Any] = {"root": checkout(options), "python": python(options), "ranks_per_node": options.ranks_per_node}
    if options.check or options.dry_run:
        from launch import check_hosts

        if options.check:
            return check_hosts.check(hosts, **there, folder=where[0], recipe=options.recipe, overrides=options.overrides)
        print(*check_hosts.commands(hosts, **there, dashboard=options.dashboard_host, entrypoint=entrypoint(options)), sep="\n")
        return 0
    from launch import cluster

    with cluster.started(hosts, **there, dashboard=options.dashboard_host) as running:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=running.token)  # read when Ray is imported
        from launch import connecting, job

        client = connecting.connect(running.dashboard, patience=JOB_SERVER_SECONDS)
        return job.run(client, entrypoint(options), passed_on(options), running.check, job.Ending(*where))


def entrypoint(options: argparse.Namespace) -> str:
    """The job's shell command; quoted, so that any --set value survives the shell that runs it."""
    command = [python(options), "-m", "launch.ray_driver", options.recipe, f"--folder={options.remote_dir or os.getcwd()}"]
    command += [f"--resume={options.resume}", f"--max-failures={options.max_failures}"]
    command += [f"--set={override}" for override in options.overrides]
    if options.ranks_per_node is not None:
        command.append(f"--ranks-per-node={options.ranks_per_node}")
    return shlex.join(command)


def check_entrypoint(options: argparse.Namespace) -> str:
    command = [python(options), "-m", "launch.check_cluster", options.recipe, f"--folder={options.remote_dir or os.getcwd()}"]
    command += [f"--set={override}" for override in options.overrides]
    if options.ranks_per_node is not None:
        command.append(f"--ranks-per-node={options.ranks_per_node}")
    return shlex.join(command)


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
