"""`launch/multinode.sh`: a recipe on a Ray cluster, which is used where it runs or started here and stopped at the end."""

import argparse
import math
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch import job_logs
from launch.checkout import checkout, python
from launch.console import say
from launch.hosts import Host, read_hosts
from launch.options import check, check_jobs, needs_ray, parser
from launch.ranks import check_slots, parse
from launch.variables import passed_on
from pipeline import endings, stopping
from pipeline.commands import positionals_first

if TYPE_CHECKING:
    from launch.job import Ending
    from pipeline.config import TrainConfig  # not here: importing it takes seconds

JOB_SERVER_SECONDS = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: that of the job, which is 75 for one that saved and stopped on request; 2 for bad input; 130 or 143 if interrupted
    otherwise."""
    options = parser().parse_args(positionals_first(sys.argv[1:] if arguments is None else arguments))
    ours = [number for number in stopping.SIGNALS if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)]
    before = {number: signal.signal(number, Leaving()) for number in ours}  # nohup ignores SIGHUP
    try:
        check_jobs(options)
        return attached_to(options) if options.attach or options.stop else launch(options, check(options))
    except ValueError as error:
        print(f"multinode.sh: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"multinode.sh: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        code = endings.without_output(error)  # nobody reads it any more, or a full disk
        if code is None:
            raise
        return code
    except Interrupted as interruption:
        if not interruption.has_begun:
            print(f"multinode.sh: {stopping.unsaved(signal.Signals(interruption.number).name)}", file=sys.stderr)
            return stopping.STOPPED
        print("multinode.sh: interrupted", file=sys.stderr)
        return 128 + interruption.number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def attached_to(options: argparse.Namespace) -> int:
    needs_ray()
    from launch import attached, connecting

    Interrupted.has_begun = True
    client = connecting.connect(options.address)
    return attached.stop(client, options.stop) if options.stop else attached.attach(client, options.attach, options.address)


def launch(options: argparse.Namespace, config: "TrainConfig") -> int:
    if options.address is not None:
        return submit(options, config)
    hosts = read_hosts(options.hosts) if options.hosts else [Host("localhost", "localhost", None, True)]
    if options.ranks_per_node is not None and hosts[0].slots is not None:
        raise ValueError(f"Hosts file {options.hosts} gives slots=N; leave out --ranks-per-node, or the slots.")
    if options.ranks is not None:
        check_slots(parse(options.ranks), hosts, options.ranks_per_node)
    check_batch(config, options, hosts)
    there: dict[str, Any] = {"root": checkout(options), "python": python(options), "ranks_per_node": options.ranks_per_node}
    if options.check or options.dry_run:
        from launch import check_hosts

        there["variables"] = passed_on(options)
        if options.check:
            Interrupted.has_begun = True  # there is nothing to save
            folder = options.remote_dir or os.getcwd()
            return check_hosts.check(hosts, **there, folder=folder, recipe=options.recipe, overrides=options.overrides)
        print(*check_hosts.commands(hosts, **there, dashboard=options.dashboard_host, entrypoint=entrypoint(options)), sep="\n")
        return 0
    from launch import cluster

    job_id = new_id()
    logs = logs_of(options, config, job_id)
    with cluster.started(hosts, **there, dashboard=options.dashboard_host, logs=logs) as running:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=running.token)  # read when Ray is imported
        from launch import connecting, job

        client = connecting.connect(running.dashboard, patience=JOB_SERVER_SECONDS)
        say(f"Ray's dashboard: {running.dashboard}")
        task = job.Task(job_id, entrypoint(options), passed_on(options), ending(options, config))
        Interrupted.has_begun = True
        code = job.run(client, task, running.check)
    if code not in (0, 2, stopping.STOPPED):  # bad input has none
        say(f"logs: {logs}")
    return code


def check_batch(config: "TrainConfig", options: argparse.Namespace, hosts: Sequence[Host] = ()) -> None:
    """ValueError where it is known by now how many ranks there will be, and the batch cannot be divided among them."""
    from pipeline import uneven_batches

    slots = [host.slots or options.ranks_per_node or 0 for host in hosts]
    ranks = parse(options.ranks).most if options.ranks is not None else sum(slots) if all(slots) else 0
    if ranks:
        uneven_batches.check(config, ranks)


def submit(options: argparse.Namespace, config: "TrainConfig") -> int:
    """To a running cluster."""
    check_batch(config, options)
    if options.dry_run:
        print(f"job at {options.address}: {entrypoint(options)}\n    with {' '.join(sorted(passed_on(options)))}")
        return 0
    from launch import attached, check_cluster, connecting, job

    client = connecting.connect(options.address)
    if options.check:
        Interrupted.has_begun = True
        return check_cluster.check(client, job.Task(new_id(), check_entrypoint(options), passed_on(options), ending(options, config)))
    job_id, running = attached.id_for(client, options.name, entrypoint(options))
    end = ending(options, config)
    task = job.Task(job_id, entrypoint(options), passed_on(options), end, attached.described(options.name, end))
    Interrupted.has_begun = True
    if options.detach:
        return attached.detach(client, task, options.address, running)
    if running is not None:
        say(f"job {job_id} of that name runs already: following it, and starting no second")
        return attached.attach(client, job_id, options.address)
    return job.run(client, task, lambda: None, address=options.address)


def logs_of(options: argparse.Namespace, config: "TrainConfig", job_id: str) -> str:
    """The folder of a job's logs, on all hosts."""
    return os.path.join(options.remote_dir or os.getcwd(), config.run.folder, job_logs.FOLDER, job_id)


def new_id() -> str:
    return f"protoshard-{secrets.token_hex(4)}"


def ending(options: argparse.Namespace, config: "TrainConfig") -> "Ending":
    from launch.job import Ending

    return Ending(options.remote_dir or os.getcwd(), os.path.join(config.run.folder, stopping.FILE), 60 * config.run.timeout)


def entrypoint(options: argparse.Namespace) -> str:
    """The job's shell command; quoted, so that any --set value survives the shell that runs it."""
    command = [python(options), "-m", "launch.ray_driver", options.recipe, f"--folder={options.remote_dir or os.getcwd()}"]
    command += [f"--resume={options.resume}", f"--max-failures={options.max_failures}"]
    command += ["--own-cluster"] * (options.address is None)
    command += [f"--set={override}" for override in options.overrides]
    if options.ranks_per_node is not None:
        command.append(f"--ranks-per-node={options.ranks_per_node}")
    if options.ranks is not None:
        command.append(f"--ranks={options.ranks}")
    return shlex.join(command)


def check_entrypoint(options: argparse.Namespace) -> str:
    command = [python(options), "-m", "launch.check_cluster", options.recipe, f"--folder={options.remote_dir or os.getcwd()}"]
    command += [f"--set={override}" for override in options.overrides]
    if options.ranks_per_node is not None:
        command.append(f"--ranks-per-node={options.ranks_per_node}")
    return shlex.join(command)


class Interrupted(KeyboardInterrupt):
    """By a signal. A KeyboardInterrupt, because event loops pass no other on at once."""

    has_begun = False  # whether there may be something to save

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
